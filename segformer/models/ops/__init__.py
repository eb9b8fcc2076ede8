"""The operations of the network that are more than a library call; backend.py lists them."""
