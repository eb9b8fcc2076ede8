"""Predictions of files: what is read, in which order it is done, and what is written."""
