"""Label files of other tools: what each format says of an image."""
