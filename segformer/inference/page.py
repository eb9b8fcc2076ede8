"""The HTML of our pages: one file that opens offline on any device, in light and in dark.

Pictures are base64 inside the page, nothing is fetched, and no page has a script. Text is escaped where it
enters: what is not `Html` already is text.
"""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
:root { --ink: #1f2933; --soft: #5f6b7a; --line: #e4e7eb; --page: #f5f7fa; --card: #fff; --bar: #0072b2;
        color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa5b1; --line: #323f4b; --page: #12181f; --card: #1b232c;
          --bar: #56b4e9; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { margin: 0; font-size: 28px; }
h2, summary { margin: 40px 0 12px; font-size: 20px; font-weight: 600; }
p, .card span, th, figcaption { color: var(--soft); margin: 4px 0 0; font-size: 14px; font-weight: 500; }
h1, p, td:first-child, figcaption { overflow-wrap: anywhere; }
.card, pre, .table { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card, pre { padding: 12px 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px;
         margin-top: 20px; }
.card b { display: block; font-size: 26px; line-height: 1.2; }
img { display: block; width: 100%; height: auto; border-radius: 12px; background: #fff; }
.table { overflow-x: auto; }
.natural img { width: auto; max-width: none; border-radius: 0; }
table { width: 100%; border-spacing: 0; }
th, td, b { text-align: right; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
.total tr:last-child td { font-weight: 600; }
th:first-child, td:first-child, .card b { text-align: left; }
td:first-child { min-width: 110px; }
.facts td { text-align: left; overflow-wrap: anywhere; }
.facts td:first-child { color: var(--soft); width: 30%; }
.chip { display: inline-block; width: 14px; height: 14px; border-radius: 4px; margin-right: 8px;
        border: 1px solid #7b8794; vertical-align: -2px; }
.bar { width: 30%; }
.bar i { display: block; height: 10px; border-radius: 5px; background: var(--bar); min-width: 2px; }
figure { margin: 0 0 16px; }
pre { margin: 0; overflow-x: auto; font-size: 13px; line-height: 1.45; }
@media (max-width: 560px) { .bar { display: none; } h1 { font-size: 23px; } .gallery { margin: 0 -8px; }
  th, td { padding: 6px; font-size: 14px; } }
"""
_KINDS = {".png": "image/png", ".jpg": "image/jpeg"}


class Html(str):
    """A piece of a page, which is put in as it is."""


def escape(value: object) -> Html:
    """A value as a piece of a page: text is escaped, a piece stays as it is."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def page(title: str, parts: Iterable[Html]) -> str:
    """The whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def element(tag: str, *children: object, **attributes: object) -> Html:
    """`<tag ...>children</tag>`; `class_` is written as class."""
    written = "".join(f' {name.rstrip("_")}="{escape(value)}"' for name, value in attributes.items())
    return Html(f"<{tag}{written}>{''.join(map(escape, children))}</{tag}>")


def image(path: Path, alt: str = "") -> Html:
    """A picture, .png or .jpg, inside the page."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return Html(f'<img alt="{escape(alt or path.stem)}" src="data:{_KINDS[path.suffix]};base64,{data}">')


def figure(path: Path, caption: str) -> Html:
    """A picture above its caption."""
    return element("figure", image(path), element("figcaption", caption))


def natural(path: Path) -> Html:
    """A picture with fine print, at its own size in a box that scrolls."""
    return element("div", image(path), class_="table natural")


def cards(values: Mapping[str, object]) -> Html:
    """Name -> value: the large numbers at the head of a page."""
    shown = [element("div", element("b", v), element("span", n), class_="card") for n, v in values.items()]
    return element("div", *shown, class_="cards")


def section(title: str, *content: Html) -> Html:
    """Content below its heading."""
    return Html(element("h2", title) + "".join(content))


def folded(title: str, *content: Html) -> Html:
    """Content that a click on its title unfolds."""
    return element("details", element("summary", title), *content)


def table(heads: Sequence[object], rows: Iterable[Sequence[object]], kind: str = "") -> Html:
    """A table of rows, names at the left and numbers at the right; without `heads` there is no first line.

    kind: total, where the last row is one of the whole; facts, for text beside its name.
    A cell, or head, that is an element `td` or `th` already is put in as it is.
    """
    lines = [_row("td", row) for row in rows]
    first = [_row("th", heads)] if heads else []
    return element("div", element("table", *first, *lines, class_=kind), class_="table")


def _row(tag: str, cells: Sequence[object]) -> Html:
    ready = [isinstance(cell, Html) and cell.startswith(("<td", "<th")) for cell in cells]
    written = (c if done else element(tag, c) for c, done in zip(cells, ready, strict=True))
    return element("tr", *written)


def percent(value: Any) -> str:
    """A share as per cent, a count with commas; "-" for what was not measured or did not occur."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{100 * value:.2f}" if isinstance(value, float) and value == value else "-"


def chip(color: Sequence[int]) -> Html:
    """A small square of a color (red, green, blue)."""
    return Html('<span class="chip" style="background:#{:02x}{:02x}{:02x}"></span>'.format(*color))


def bar(share: Any) -> Html:
    """A cell with a bar as long as `share` of it; empty where the share is unknown."""
    known = isinstance(share, float) and share == share
    return Html('<td class="bar">' + (f'<i style="width:{100 * share:.1f}%"></i>' if known else "") + "</td>")
