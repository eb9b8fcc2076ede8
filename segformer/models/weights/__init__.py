"""Files of weights of every known format, in and out."""
