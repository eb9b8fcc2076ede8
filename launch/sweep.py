"""Train the same thing with several settings, and compare the runs.

python launch/sweep.py name=lr experiment=sample optim.lr=3e-4,1e-3 seed=0,1
python launch/sweep.py name=wide experiment=sample sweep.random=20 \\
    sweep.halving=3 'optim.lr=log(1e-5,1e-2)' model.dropout=0.0..0.3

Takes every override of launch/train.py. A list with commas is tried value by
value, several lists in every combination; ranges are drawn from
(sweep.random). With sweep.halving=3 all settings are trained to a part of
their steps, and one in three goes on from there.

The runs are runs/<name>/<settings>, one process for each GPU (sweep.jobs=2:
two at a time). Stopped by Ctrl-C they save their states; the same command goes
on. At the end they are compared.
"""

import re
import sys
from dataclasses import fields
from pathlib import Path

from segformer.errors import importing

with importing(__name__):
    from segformer.sweep.plan import SweepConfig
    from segformer.sweep.queue import check, sweep
    from segformer.training.choices import take_conf
    from segformer.training.config import cli

OPTIONS = ("--help", "-h", "--check")


def main() -> None:
    """The command line; see above."""
    ours = {field.name for field in fields(SweepConfig)}
    conf, given = take_conf(sys.argv[1:])
    own = [one for one in given if one in OPTIONS or re.split(r"[.=]", one, maxsplit=1)[0] in ours]
    training = [*conf, *(one for one in given if one not in own)]
    train = [sys.executable, str(Path(__file__).with_name("train.py"))]
    sys.argv[1:] = own
    cli(SweepConfig, "sweep", lambda cfg: sweep(cfg, training, train), lambda cfg: check(cfg, training))
    if {"--help", "-h"} & set(own):
        print("\nAnd every key of launch/train.py.")


if __name__ == "__main__":
    main()
