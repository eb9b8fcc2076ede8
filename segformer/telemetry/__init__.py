"""What a person sees of a run: rates, logger, wandb and TensorBoard, profiler."""
