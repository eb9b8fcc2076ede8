"""Files and arrays: data-set folder -> shards -> sample order -> augmented uint8 batches."""
