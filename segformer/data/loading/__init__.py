"""Sample order, crop, augmentation, workers, batches."""
