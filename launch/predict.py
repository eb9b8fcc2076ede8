"""Segment photographs.

python launch/predict.py checkpoint=runs/mine input=photos/images/val \\
    output=predictions/mine
"""

from segformer.errors import importing

with importing(__name__):
    from segformer.inference.predict import PredictConfig, predict
    from segformer.training.config import cli

if __name__ == "__main__":
    cli(PredictConfig, "predict", predict)
