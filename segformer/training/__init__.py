"""Configuration, losses, optimizer, task, run, loop."""
