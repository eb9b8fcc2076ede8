"""The state of a run on disk: its format, saving while training goes on, the lease, reading it back."""
