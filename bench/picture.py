"""The rows of peers.py as a picture: time and peak memory of every contender, ours fused = 1."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colors, which color-blind readers tell apart; ours are blue.
COLORS = {
    "fused": "#0072B2",
    "fused+compile": "#56B4E9",
    "reference": "#999999",
    "transformers": "#D55E00",
    "transformers+compile": "#E69F00",
    "original": "#CC79A7",
    "smp": "#009E73",
}
INK, GRID = "#1F2933", "#E4E7EB"
TITLE: dict[str, Any] = {"loc": "left", "color": INK, "fontsize": 10}
WIDTH = 0.8  # of the bars of a cell


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG of two panels, cells side by side, a bar for every contender that was measured.

    None where nothing was measured.
    """
    from matplotlib.figure import Figure

    measured = [row for row in rows if row["ms_median"] is not None]
    if not measured:
        print(f"nothing was measured, so {path} is not written")
        return
    cells = list(dict.fromkeys(_cell(row) for row in measured))
    names = [name for name in COLORS if any(row["contender"] == name for row in measured)]
    figure = Figure(figsize=(max(6.0, 1.7 * len(cells)), 6.4), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1)
    _panel(above, measured, cells, names, _time)
    above.set_title("Time of a step, ours fused = 1; whiskers: all rounds", **TITLE)
    _panel(below, measured, cells, names, lambda row: _memory(row, measured))
    below.set_title("Peak memory of a step, weights included, ours fused = 1", **TITLE)
    columns = min(len(names), 3 if len(cells) < 4 else 6)
    legend = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 9}
    figure.legend(*above.get_legend_handles_labels(), **legend)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(f"written: {path}")


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row['mode']}\n{row['variant'].upper()} {row['size']}\nbatch {row['batch']}"


Values = tuple[float | None, float | None, float | None]  # height of a bar, ends of its whisker


def _time(row: Mapping[str, Any]) -> Values:
    return row["times_fused"], row["times_fused_min"], row["times_fused_max"]


def _memory(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Values:
    """Peak and weights over those of ours; no bar where one of them is not known."""
    ours = next((r for r in rows if _cell(r) == _cell(row) and r["contender"] == "fused"), None)
    if row["peak_mib"] is None or ours is None or ours["peak_mib"] is None:
        return None, None, None
    value = (row["peak_mib"] + row["weights_mib"]) / (ours["peak_mib"] + ours["weights_mib"])
    return value, None, None


def _panel(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], cells: Sequence[str], names: Sequence[str], value: Any
) -> None:
    for name in names:
        for row in rows:
            height, low, high = value(row) if row["contender"] == name else (None, None, None)
            if height is None:
                continue
            # The bars of a cell stand side by side around its place, in the order of COLORS.
            beside = [n for n in names if any(r["contender"] == n and _cell(r) == _cell(row) for r in rows)]
            width = WIDTH / len(beside)
            place = cells.index(_cell(row)) - WIDTH / 2 + (beside.index(name) + 0.5) * width
            axes.bar(place, height, 0.9 * width, color=COLORS[name])
            top = height
            if low is not None and high is not None:
                axes.vlines(place, low, high, color=INK, linewidth=1)
                top = max(top, high)
            axes.annotate(
                f"{height:.1f}", (place, top), (0, 2), textcoords="offset points",
                ha="center", fontsize=7, color=INK,
            )  # fmt: skip
        axes.bar(0, 0, color=COLORS[name], label=name)
    axes.set_xticks(range(len(cells)), cells, fontsize=8)
    axes.axhline(1, color=INK, linewidth=0.8)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
