"""A trained model in use: export, convert, evaluate, predict, report."""
