"""The operations of SegFormer that are more than a library call; suite.py chooses between their two forms."""
