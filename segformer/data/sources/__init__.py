"""Any data set as users have it -> (key, image, mask)."""
