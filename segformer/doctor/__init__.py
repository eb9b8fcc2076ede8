"""A look at data and settings before the GPU hour."""
