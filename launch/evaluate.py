"""Score a run or an export on a split.

    python launch/evaluate.py checkpoint=runs/mine
    python launch/evaluate.py checkpoint=runs/sample split=val
    deepspeed --num_accelerators 4 launch/evaluate.py checkpoint=runs/sample

Several ranks share the images.
"""

from segformer.errors import importing

with importing(__name__):
    from segformer.inference.score import EvaluateConfig, evaluate_checkpoint
    from segformer.training.config import cli

if __name__ == "__main__":
    cli(EvaluateConfig, "evaluate", evaluate_checkpoint)
