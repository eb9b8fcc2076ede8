"""Tables of scores, as text, CSV and Markdown."""

import csv
import io
import math
from collections.abc import Sequence

from segformer.errors import printable

Row = dict[str, str | float | int | None]
"A line of a table of scores: title of the column -> name, share from 0 to 1, or count."


def figure(value: str | float | int | None) -> str:
    """A share as per cent, a count with commas; `-` where there is no score."""
    if isinstance(value, str | int):
        return printable(value) if isinstance(value, str) else f"{value:,}"
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"


def percent(share: float) -> str:
    """A share as it stands in a line of text: 57.26%."""
    return f"{100 * share:.2f}%"


def as_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV, shares from 0 to 1 with all digits; an empty field where there is no score."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: Sequence[Row]) -> str:
    """Rows as a table of Markdown, with the figures of `table`."""
    heads = list(rows[0])
    cells = [[figure(value).replace("|", "\\|") for value in row.values()] for row in rows]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def aligned(rows: Sequence[Row]) -> str:
    """Rows as text, names at the left and numbers at the right, a rule below the first, above the last."""
    cells = [list(rows[0]), *([figure(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
