"""Segment photographs.

python launch/predict.py checkpoint=<run or export> input=<file or folder> output=<folder> [step=best|<step>]
"""

from segformer.command import importing

with importing(__name__):
    from segformer.config import cli
    from segformer.predict import PredictConfig, predict

if __name__ == "__main__":
    cli(PredictConfig, "predict", predict)
