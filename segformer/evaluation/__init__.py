"""Scores, inference modes, drawing."""
