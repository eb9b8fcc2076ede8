"""The figures of a log line, and the progress bar of a terminal.

    step 40/500  loss 0.4123  lr 1.2e-04  grad 1.32  18.4 img/s  data wait 1%  eta 3m10s

A line has room for what one looks at again and again. MFU, a rank that is slow, a loss that stands out and
steps that were skipped appear only where there are any.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

STRAGGLER, SPIKE = 1.2, 2.0  # from where on a line has them
_UNITS = {"images": "img", "tiles": "tile", "frames": "frame"}
EVERY = 30.0  # seconds between two lines on how far an evaluation is


def duration(seconds: float) -> str:
    """Seconds as 47s, 3m20s or 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def train_figures(values: Mapping[str, Any]) -> list[str]:
    """The figures of a training interval that a line has room for; those that are None are left out."""
    known = {name: value for name, value in values.items() if value is not None}
    rates = [value for name, value in known.items() if name == "lr" or name.startswith("lr/")]
    shown = [f"loss {known['loss']:.4f}" if "loss" in known else "no finite loss"]
    if rates:
        shown.append(f"lr {known.get('lr', max(rates)):.1e}")
    for name, text in (
        ("grad_norm", "grad {:.2f}"),
        ("images_per_s", "{:.1f} img/s"),
        ("data_wait", "data wait {:.0%}"),
        ("mfu", "mfu {:.1%}"),
    ):
        if name in known:
            shown.append(text.format(known[name]))
    if known.get("straggler", 1) >= STRAGGLER:
        shown.append(f"rank {known['straggler_rank']} {known['straggler']:.1f}x slow")
    if not known.get("loss_spike", 1) < SPIKE:
        shown.append(f"loss spike {known['loss_spike']:.1f}x")
    if known.get("skipped"):
        shown.append(f"skipped {known['skipped']:.0f}")
    return shown


def on_terminal() -> bool:
    """True where standard error is a terminal with a size; without one (some containers) no bar is drawn."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 0


def open_bar(step: int, steps: int) -> Any:
    """A progress bar on standard error, which tqdm cuts at the edge and disables where the terminal ends."""
    from tqdm import tqdm

    return tqdm(
        total=steps,
        initial=step,
        unit="step",
        dynamic_ncols=True,
        smoothing=0.1,
        bar_format="{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
    )


class Evaluated:
    """How far an evaluation is: every 30 s `evaluated 200 of 2000 images, 31.2 img/s, eta 58s` to `line`."""

    def __init__(
        self, total: int, line: Callable[[str], None], verb: str = "evaluated", what: str = "images"
    ) -> None:
        self._total, self._line, self._verb, self._what, self._done = total, line, verb, what, 0
        self._start = self._said = time.monotonic()

    def add(self, images: int) -> None:
        """So many more are done, over all ranks."""
        self._done, now = min(self._done + images, self._total), time.monotonic()
        if now - self._said < EVERY or self._done == self._total:
            return
        self._said, rate = now, self._done / (now - self._start)
        left = duration((self._total - self._done) / rate)
        done = f"{self._verb} {self._done} of {self._total} {self._what}"
        self._line(f"{done}, {rate:.1f} {_UNITS[self._what]}/s, eta {left}")


@contextlib.contextmanager
def evaluated(
    total: int, line: Callable[[str], None], verb: str = "evaluated", what: str = "images"
) -> Iterator[Callable[[int], None]]:
    """`Evaluated.add` where standard error is a file, and a progress bar's on a terminal."""
    if not on_terminal():
        yield Evaluated(total, line, verb, what).add
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=_UNITS[what], dynamic_ncols=True, leave=False) as bar:

        def add(images: int) -> None:
            bar.update(min(images, total - bar.n))

        yield add


def beside_bars() -> contextlib.AbstractContextManager[Any]:
    """What is printed inside stands above the bars that there are."""
    from tqdm import tqdm

    return tqdm.external_write_mode()
