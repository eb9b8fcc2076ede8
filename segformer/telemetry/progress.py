"""How a run looks while it trains: the figures of a line, and a bar on a terminal.

    step 40/500  loss 0.4123  lr 1.2e-04  grad 1.32  18.4 img/s  data wait 1%  eta 3m10s

A line has room for what one looks at again and again. MFU, a rank that is slow, a loss that stands out and
steps that were skipped appear only where there is something to say.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any

STRAGGLER, SPIKE = 1.2, 2.0  # from where on a line speaks of them
BAR = 42  # columns of a bar without figures


def duration(seconds: float) -> str:
    """Seconds as 47s, 3m20s or 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def shown_figures(values: Mapping[str, Any]) -> list[str]:
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
    """Whether standard error is a terminal with a size; without one (some containers) no bar is drawn."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 0
    except (OSError, ValueError):
        return False


class Bar:
    """A progress bar on standard error. A terminal that goes away takes the bar with it, not the run."""

    def __init__(self, step: int, steps: int) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(
            total=steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.1,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def advance(self) -> None:
        """One step is done."""
        self._try(lambda: self._bar.update(1))

    def show(self, figures: list[str]) -> None:
        """Put as many figures beside the bar as the terminal has columns for."""
        room = shutil.get_terminal_size().columns - BAR
        while len(figures) > 1 and len(", ".join(figures)) > room:
            figures = figures[:-1]
        self._try(lambda: self._bar.set_postfix_str(", ".join(figures)))

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self._try(lambda: self._bar.write(text, file=sys.stderr))

    def close(self) -> None:
        """Leave the bar as it is."""
        self._try(lambda: self._bar.close())

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except OSError:
            self._bar.disable = True
