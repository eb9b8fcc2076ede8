"""Runs held against each other: what each reached, how sure that is, and in which settings they differ.

    <output>/index.html       all of it on one page, which opens offline
    <output>/comparison.csv   a line for each run
    <output>/curves.png       validation score and loss of all runs
    <output>/images/*.jpg     a validation image, its target, the prediction of each run

Two kinds of intervals, which answer two questions:

    over images    the bootstrap: would the same model score alike on other images? And its difference to the
                   first run, on the same images?
    over seeds     runs that differ in `seed` alone are one group: mean and standard deviation of their scores

Runs with other data share no images: they are compared by their logs, and a line says so. A run that is not
finished is compared as far as it is; an export, and what is damaged, is refused.
"""

import glob
import io
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segformer.checkpoint.reader import CONFIG
from segformer.data.shards.format import Split
from segformer.data.shards.reader import ShardReader
from segformer.errors import ConfigError, at_least, say
from segformer.evaluation.bootstrap import REPLICATES, mean_iou
from segformer.evaluation.drawing import INK, displayed, grid, legend, panels, write_picture
from segformer.files import write_atomic
from segformer.inference.compared import (
    MARK,
    Comparison,
    Entry,
    common_images,
    open_entry,
    read_sample,
    scored,
)
from segformer.inference.export import check_output
from segformer.inference.page import Html, element, figure, folded, page, percent, section, table
from segformer.inference.pictures import GRID, series, smoothed
from segformer.inference.predicting.outputs import writing
from segformer.inference.predictor import Predictor
from segformer.inference.report import MANY_CLASSES, class_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colors, which color-blind readers tell apart; then the same ones with other lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":")
SIDE, MOST_PREDICTIONS = 400, 7  # pixels of a picture's long side; runs in a row of pictures


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """Which runs to compare, and by how many images."""

    runs: list[str] = field(default_factory=list)
    "Run directories, or folders of runs; the others are held against the first."
    output: str = "comparison"
    "Folder of the page, the table and the pictures; made if it does not exist."
    images: int = 6
    "Validation images to show; 0 predicts nothing, so that there are no intervals, and is quick."
    device: str = "auto"
    "Where to compute the predictions: cpu, cuda, cuda:1, or auto."

    def __post_init__(self) -> None:
        at_least(self, "", images=0)
        check_output(self.output, "a page, a table and pictures are written into a folder")


def compare(cfg: CompareConfig, *, logged: Collection[str] = ()) -> Path:
    """Print the table of some runs and write their page; returns the path of index.html.

    logged: those of cfg.runs that are compared by their logs alone.

    Raises:
        ConfigError: there are not two runs, or of different tasks, or the output can't be written.
        CheckpointError: what is given is no run, or is damaged.
    """
    folders, output = run_folders(cfg.runs), Path(cfg.output)
    entries = [open_entry(path) for path in folders]
    if len(entries) < 2:
        raise ConfigError(
            f"a comparison needs two or more runs, not {len(entries)}; give runs=[runs/a,runs/b]"
        )
    leaves = [path.resolve().name for path in folders]
    for entry, leaf in zip(entries, leaves, strict=True):
        entry.name = leaf if leaves.count(leaf) == 1 else str(entry.folder)
    note, split = common_images(entries) if cfg.images else ("images=0", None)
    if split is not None:
        for entry in entries:
            if str(entry.folder) in logged:
                continue
            entry.areas = scored(entry, split, cfg.device)
    found = Comparison(entries)
    print(found.text())
    if note:
        say(f"no intervals over images and no pictures: {note}")
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        write_atomic(output / "comparison.csv", found.csv())
        write_curves(found, output / "curves.png")
        pictures = [] if split is None else _pictures(entries, split, output / "images", cfg)
        write_atomic(output / "index.html", _page(found, output, pictures, note))
    say(f"comparison: {output / 'index.html'}")
    return output / "index.html"


def run_folders(given: list[str]) -> list[Path]:
    """The run directories that are meant: a folder without config.yaml stands for the runs in it."""
    found: dict[Path, None] = {}
    for text in given:
        for path in map(Path, sorted(glob.glob(text)) if glob.has_magic(text) else [text]):
            inside = sorted(place.parent for place in path.glob(f"*/{CONFIG}"))
            found |= dict.fromkeys([path] if (path / CONFIG).is_file() or not inside else inside)
    return list(found)


def write_curves(found: Comparison, path: Path) -> None:
    """Draw validation score and smoothed loss of all runs over their steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 4.6), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(drawn)
    left, right = drawn.subplots(1, 2)
    for index, entry in enumerate(found.entries):
        color = COLORS[index % len(COLORS)]
        style: dict[str, Any] = {"color": color, "linestyle": LINES[index // len(COLORS) % len(LINES)]}
        steps, scores = entry.scores
        left.plot(steps, 100 * scores, **style, marker="o", markersize=5, linewidth=1.8, label=entry.name)
        steps, losses = series(entry.rows, ("train",), "loss")
        if len(steps):
            right.plot(steps, smoothed(losses, max(1.0, len(losses) / 40)), **style, linewidth=1.8)
    _dress(left, f"validation {found.score}, %")
    _dress(right, "training loss, smoothed")
    columns = min(4, len(found.entries))
    drawn.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=11, labelcolor=INK)
    data = io.BytesIO()
    drawn.savefig(data, format="png")
    write_atomic(path, data.getvalue())


def _dress(axes: "Axes", title: str) -> None:
    axes.set_title(title, color=INK, fontsize=13)
    axes.set_xlabel("optimizer step", color=INK, fontsize=11)
    axes.grid(True, color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, labelsize=10, length=0)


def chosen(areas: np.ndarray, count: int) -> list[int]:
    """Images to show, from areas (runs, N, 3, K): half those whose mIoU differs most between the runs, the
    others spread evenly over the rest."""
    scores = mean_iou(areas)  # (runs, N)
    spread = np.nan_to_num(scores.max(0) - scores.min(0), nan=-1.0)
    most = np.argsort(-spread, kind="stable")[: (count + 1) // 2].tolist()
    rest = np.setdiff1d(np.arange(areas.shape[1]), most)
    even = np.linspace(0, len(rest) - 1, min(count // 2, len(rest))).round().astype(int)
    return most + rest[even].tolist()


def _pictures(entries: list[Entry], split: Split, folder: Path, cfg: CompareConfig) -> list[tuple[Path, str]]:
    """Draw the chosen images, one file each, in place of those of an earlier comparison; (file, caption)."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("[0-9][0-9].jpg"):
        old.unlink()
    shown = [entry for entry in entries if entry.areas is not None][:MOST_PREDICTIONS]
    areas = np.stack([entry.areas for entry in shown if entry.areas is not None])
    ids, reader = chosen(areas, cfg.images), ShardReader(split)
    masks: list[list[np.ndarray]] = [[] for _ in ids]
    for entry in shown:  # one model at a time
        predictor = Predictor(entry.folder, step=str(entry.step), device=cfg.device)
        for found, sample_id in zip(masks, ids, strict=True):
            found.append(predictor(read_sample(reader, sample_id)[0]).mask)
    pictures = []
    for index, (sample_id, found) in enumerate(zip(ids, masks, strict=True)):
        pixels, target = read_sample(reader, sample_id)
        image = displayed(pixels)
        scores = [
            f"{entry.name}  {100 * score:.0f}%"
            for entry, score in zip(shown, mean_iou(areas[:, sample_id]), strict=True)
        ]
        drawn = panels(image, [target, *found], predictor.palette, SIDE, alpha=0.55)
        cells = list(zip(["image", "target", *scores], drawn, strict=True))
        names = legend([target, *found], predictor.classes, predictor.palette)
        picture = grid(cells, names, columns=min(len(cells), 5), font_size=24)
        path = folder / f"{index:02d}.jpg"
        write_picture(path, picture, quality=85)
        pictures.append((path, split.key(sample_id)))
    return pictures


def _page(found: Comparison, output: Path, pictures: list[tuple[Path, str]], note: str) -> str:
    """The comparison as HTML."""
    over_images = (
        f"95%: bootstrap over the validation images, {REPLICATES} draws, the same ones for all runs. It says "
        "what other images would give, and nothing about another seed."
    )
    seeds = element("p", "Runs that differ in their seed alone: what another seed would give.")
    if any(map(found.differs, range(len(found.entries)))):
        over_images = f"{over_images} {MARK}"
    curves = "Evaluations of the validation split, and the loss of the log lines."
    parts = [
        element("h1", f"{len(found.entries)} runs compared"),
        element("p", f"No intervals over images and no pictures: {note}" if note else over_images),
        section("Scores", table(*found.table())),
        section("Over seeds", seeds, table(*found.seeds())) if found.groups() else Html(),
        section("Curves", figure(output / "curves.png", curves)),
        section("Settings that differ", _settings(found)),
        _classes(found),
    ]
    if pictures:
        first = element("p", "First those whose mIoU differs most between the runs, then some of the others.")
        shown = element("div", *(figure(path, caption) for path, caption in pictures), class_="gallery")
        parts.append(section("Validation images", first, shown))
    return page("comparison", parts)


def _settings(found: Comparison) -> Html:
    rows = [[key, *map(str, values)] for key, values in found.settings.items()]
    if not rows:
        return element("p", "None: the runs have the same settings.")
    return table(["setting", *(entry.name for entry in found.entries)], rows)


def _classes(found: Comparison) -> Html:
    """Scores of each class side by side, the highest in bold; nothing where the classes are not the same."""
    names = class_names(found.entries[0].config)
    columns = [entry.class_scores for entry in found.entries]
    same = all(class_names(entry.config) == names for entry in found.entries)
    if not same or not names or any(len(column) != len(names) for column in columns):
        return Html()
    rows = []
    for name, *scores in zip(names, *columns, strict=True):
        top = max((score for score in scores if score is not None), default=None)
        cells = [element("b", percent(x)) if x is not None and x == top else percent(x) for x in scores]
        rows.append([name, *cells])
    shown = table(["class", *(entry.name for entry in found.entries)], rows)
    title = "IoU of each class, %" if found.key == "miou" else "Accuracy of each class, %"
    return folded(title, shown) if len(rows) > MANY_CLASSES else section(title, shown)
