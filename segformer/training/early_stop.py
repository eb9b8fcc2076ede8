"""Early stopping: a run ends after an evaluation where its score has not gained for long enough.

A function of the settings and of the scores that TrainState keeps, and of nothing else: a run that was killed
stops where it would have, and one that goes on under other settings as if it had had them from the beginning.
Only evaluations of eval_every count, not those of a pause or of a last step: they would move the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from segformer.errors import at_least, within


@dataclass(kw_only=True, slots=True)
class EarlyStopConfig:
    """When to end a run whose validation score has stopped rising."""

    metric: str | None = None
    "Score to watch: miou, macc or aacc, of a classifier top1, top5 or macc; null takes the first."
    patience: int = 0
    "Evaluations in a row without a gain after which the run ends; 0 never ends it early."
    min_gain: float = 0.0
    "Least rise above the best score so far that is a gain, as a share: 0.001 is 0.1 % mIoU."

    def __post_init__(self) -> None:
        at_least(self, "early_stop.", patience=0)
        within(self, "early_stop.", min_gain=(0, 1))


def stops_early(
    cfg: EarlyStopConfig, names: Mapping[str, str], evaluations: Sequence[Mapping[str, Any]]
) -> str:
    """Why the last of these evaluations is that of a run, in words; "" where the run goes on.

    evaluations: {"step": ..., score: value}, in their order; names: score -> its name (Scores.NAMES).
    """
    metric = cfg.metric or next(iter(names))
    best, best_step, waited = -math.inf, 0, 0
    for row in evaluations:
        score, waited = row.get(metric, -math.inf), waited + 1  # one that is not finite is left out
        if score > best and score >= best + cfg.min_gain:
            best, best_step, waited = score, row["step"], 0
    if not 0 < cfg.patience <= waited:
        return ""
    gain = f"gain of {100 * cfg.min_gain:g}%" if cfg.min_gain else "gain"
    since = f"since {100 * best:.2f}% at step {best_step}" if best_step else "yet"
    count = f"{waited} evaluation{'s' * (waited > 1)}"
    return f"no {gain} in {names[metric]} for {count}, {since}"
