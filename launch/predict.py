"""Segment photographs.

python launch/predict.py checkpoint=<run or export> input=<file or folder> output=<folder>
"""

from segformer.config import cli
from segformer.predict import PredictConfig, predict

if __name__ == "__main__":
    cli(PredictConfig, "predict", predict)
