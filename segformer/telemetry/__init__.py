"""The log of a run: rates, files, progress bar, wandb and TensorBoard, profiler."""
