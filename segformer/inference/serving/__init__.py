"""A model behind an address: the page, and REST for programs."""
