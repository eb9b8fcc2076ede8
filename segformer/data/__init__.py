"""Files and arrays: data-set folder -> shards -> sample order -> augmented uint8 batches.

Never imports models, engine or torch.distributed; rank and world size arrive as ints.
"""
