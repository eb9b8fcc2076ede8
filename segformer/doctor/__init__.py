"""A look at data and settings before a run (examine.py), and what it is made of."""
