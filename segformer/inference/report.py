"""The report of a run: one page of its scores, curve, pictures and configuration.

    runs/<name>/report.html     scores, how they came about, curve.png, table of classes, classes.png,
                                confusion.png, overlays/*.jpg, overlays/worst/*.jpg, train_batch.jpg,
                                configuration

It opens offline on any device: pictures are base64 inside it, and nothing is fetched. Every text that comes
from the run is escaped. A run without evaluation, checkpoint or shards gets a report without those parts, and
a classifier one without overlays.
"""

import contextlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segformer.checkpoint.format import TrainState
from segformer.checkpoint.reader import CONFIG, newest_state, stored_config
from segformer.data.loading.mixture import Mixture
from segformer.data.shards.format import ShardSet, Split
from segformer.data.shards.reader import ShardReader
from segformer.data.sources.dataset import class_palette
from segformer.data.sources.decode import decode_mask, decode_stored
from segformer.errors import CheckpointError, ConfigError, DataError, at_least, reported, say
from segformer.evaluation.drawing import displayed, write_picture
from segformer.evaluation.metrics import SCORES, ClassificationScores, SegmentationScores
from segformer.evaluation.tables import Row
from segformer.files import write_atomic
from segformer.inference.page import (
    Html,
    bar,
    cards,
    chip,
    element,
    escape,
    figure,
    folded,
    image,
    natural,
    page,
    percent,
    section,
    table,
)
from segformer.inference.pictures import (
    MOST_CURVES,
    history,
    mean_iou,
    series,
    write_class_curves,
    write_curve,
    write_overlays,
)
from segformer.inference.predicting.outputs import writing
from segformer.inference.predictor import Predictor
from segformer.inference.provenance import data_of, provenance
from segformer.telemetry.confusion import confusion_picture, mistakes
from segformer.training.config import RunConfig, as_yaml, to_run_config
from segformer.training.header import FIRST_BATCH, network_name
from segformer.training.task import open_shards, training_crop

MANY_CLASSES, FEW_CLASSES = 200, 5  # a longer table is folded away; so many need no list of mistakes
MISTAKES = 10  # of a list of pairs that are confused
LOOKED, LOOK_S = 32, 20.0  # validation images and seconds in which the worst are looked for, at most
MOST_PICTURES = 40  # of a gallery: they are part of the page
WORST = "overlays/worst"
NO_EVALUATION = "No evaluation has been made yet."


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """Which run to report on."""

    checkpoint: str = "???"
    "Directory of the run."
    overlays: int | None = None
    "Validation pictures to draw; null takes the run's own number."
    device: str = "auto"
    "Where to compute the predictions: cpu, cuda, cuda:1, or auto."

    def __post_init__(self) -> None:
        at_least(self, "", overlays=0)


def report(cfg: ReportConfig) -> Path:
    """Draw curve and overlays of a run and write its report; returns the path of report.html."""
    run = Path(cfg.checkpoint)
    if not (run / CONFIG).is_file():
        raise CheckpointError(
            f"{run} is not a run directory: it has no config.yaml; give one such as runs/sample"
        )
    state = newest_state(run / "checkpoints") or TrainState()
    run_config = to_run_config(stored_config(run, state), str(run / CONFIG))
    count = run_config.overlays if cfg.overlays is None else cfg.overlays
    if write_curve(run) is None:
        say("report: nothing has been logged yet, so there is no curve")
    looked = 0
    if count and run_config.data.task == "segmentation":
        looked = _draw_overlays(run, run_config, count, cfg.device)
    path = run / "report.html"
    with writing(path):
        write_atomic(path, _page(run, run_config, state, looked))
    for label, name in (("curve", "curve.png"), ("image, target, prediction", "overlays")):
        if (run / name).exists():
            say(f"{label}: {run / name}")
    say(f"report: {path}")
    return path


def _draw_overlays(run: Path, cfg: RunConfig, count: int, device: str) -> int:
    """Draw `count` images of the evaluation split beside their targets, half of them the worst ones found.

    Returns how many were looked at for the worst: evenly spread ones, in random order, until there are LOOKED
    or LOOK_S seconds have passed. The other half is spread evenly over the rest of the split.
    """
    scores: dict[int, float] = {}
    # A report of what there is beats none.
    with reported(lambda error: say(f"report: no new overlays: {error}"), on=(CheckpointError, DataError)):
        predictor = Predictor(run, device=device)
        split = open_shards(cfg).split(cfg.eval_split)
        parts = [split] if isinstance(split, Split) else split.parts
        readers = [ShardReader(part) for part in parts]

        def seen(sample_id: int) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
            index, own = (0, sample_id) if isinstance(split, Split) else split.place(sample_id)
            raw = readers[index].read(own)
            image, target = decode_stored(raw.image, parts[index].pixels), decode_mask(raw.target)
            target = target if isinstance(split, Split) else split.tables[index][target]
            return split.key(sample_id), displayed(image), target, predictor(image).mask

        until = time.monotonic() + LOOK_S
        spread = _spread(np.arange(split.num_samples), LOOKED)
        for sample_id in np.random.default_rng(0).permutation(spread).tolist() if count > 1 else ():
            _, _, target, prediction = seen(sample_id)
            if (score := mean_iou(target, prediction)) is not None:
                scores[sample_id] = score
            if time.monotonic() > until:
                break
        worst = sorted(scores, key=scores.__getitem__)[: count // 2]
        even = _spread(np.setdiff1d(np.arange(split.num_samples), worst), count - len(worst)).tolist()
        for ids, folder in ((even, run / "overlays"), (worst, run / WORST)):
            write_overlays(map(seen, ids), folder, classes=predictor.classes, palette=predictor.palette)
    return len(scores)


def _spread(ids: np.ndarray, count: int) -> np.ndarray:
    """At most `count` of the ids, spread evenly."""
    return ids[np.linspace(0, len(ids) - 1, min(count, len(ids))).round().astype(int)]


def _page(run: Path, cfg: RunConfig, state: TrainState, looked: int) -> str:
    """The report as HTML, from config.yaml, metrics.jsonl, shards and the pictures in the run."""
    rows = history(run)
    evaluations = [row for row in rows if row["kind"] in ("eval", "final")]
    shards, names = _shards(cfg), class_names(cfg)
    curve, batch = run / "curve.png", run / FIRST_BATCH
    parts = [
        element("h1", cfg.name),
        element("p", _subtitle(cfg)),
        _cards(rows, evaluations, cfg),
        section("How it came about", table((), provenance(run, cfg, state, rows, shards), "facts")),
        section("Training", image(curve)) if curve.is_file() else Html(),
        _classes(run, evaluations[-1], cfg, names, shards) if evaluations else element("p", NO_EVALUATION),
        _gallery("Validation images", run / "overlays"),
        _gallery(f"The worst of {looked or 'the'} validation images looked at", run / WORST),
        section("The first batch, as the model sees it", image(batch)) if batch.is_file() else Html(),
        folded("Configuration", element("pre", as_yaml(asdict(cfg)))),
    ]
    return page(cfg.name, parts)


def _gallery(title: str, folder: Path) -> Html:
    paths = sorted(folder.glob("*.jpg"))
    figures = [figure(path, path.stem.partition("_")[2]) for path in paths[:MOST_PICTURES]]
    if len(paths) > MOST_PICTURES:
        title += f" (the first {MOST_PICTURES} of {len(paths)} in {folder.name})"
    return section(title, element("div", *figures, class_="gallery")) if figures else Html()


def _subtitle(cfg: RunConfig) -> str:
    crop = " x ".join(map(str, training_crop(cfg)))
    return (
        f"{network_name(cfg)} on {cfg.data.name or data_of(cfg)}: {cfg.steps} steps of "
        f"{cfg.global_batch} crops of {crop}, seed {cfg.seed}"
    )


def _cards(rows: list[dict[str, Any]], evaluations: list[dict[str, Any]], cfg: RunConfig) -> Html:
    last = evaluations[-1] if evaluations else {}
    (key, first), *others = SCORES[cfg.data.task].NAMES.items()
    scored, scores = series(rows, ("eval", "final"), key)
    best = int(scores.argmax()) if len(scores) else 0
    steps, losses = series(rows, ("train",), "loss")
    _, rates = series(rows, ("train",), "images_per_s")
    values = {
        f"{first}, step {last.get('step', '-')}": percent(last.get(key)),
        f"best {first}, step {scored[best]}" if len(scores) else f"best {first}": (
            percent(float(scores[best]) if len(scores) else None)
        ),
        **{name: percent(last.get(other)) for other, name in others},
        "last loss": f"{losses[-1]:.3f}" if len(losses) else "-",
        f"of {cfg.steps} steps": str(steps[-1]) if len(steps) else "0",
        "images/s, median": f"{np.median(rates):.1f}" if len(rates) else "-",
    }
    return cards(values)


def _classes(
    run: Path, row: dict[str, Any], cfg: RunConfig, names: list[str], shards: ShardSet | Mixture | None
) -> Html:
    """The scores of every class, the first of them also as a bar; their curves; what is taken for what."""
    kind = SegmentationScores if "confusion" in row else ClassificationScores
    counts = row.get("confusion") or row.get("counts") or []
    if not counts:
        return Html()
    names = [names[k] if k < len(names) else f"class {k}" for k in range(len(counts))]
    lines = kind.from_counts(torch.tensor(counts)).rows(names)
    if cfg.mixture.sets and "miou" in row:  # the means are those over the sets
        lines[-1] |= {"IoU": row["miou"], "accuracy": row["macc"], "precision": None, "F1": None}
    if isinstance(shards, ShardSet) and "confusion" in row:
        for name in (cfg.train_split, cfg.eval_split):
            pixels = shards.split(name).class_pixels
            for line, count in zip(lines, [*pixels.tolist(), int(pixels.sum())], strict=True):
                line[f"of {name}"] = count / max(1, int(pixels.sum()))
    shown = _class_table(lines, class_palette(cfg.data))
    title = f"Classes at step {int(row['step'])}, %"
    parts = [folded(title, shown) if len(names) > MANY_CLASSES else section(title, shown)]
    if curves := write_class_curves(run, names):
        few = "" if len(names) <= MOST_CURVES else f" of the {MOST_CURVES} classes where it is lowest"
        parts.append(section(f"IoU{few} over the steps, %", image(curves)))
    if "confusion" in row:
        parts.append(_confusion(run / "confusion.png", counts, names))
    return Html("".join(parts))


def _class_table(lines: list[Row], colors: np.ndarray) -> Html:
    heads = [head for head in lines[0] if head != "pixels"]
    rows = []
    for k, line in enumerate(lines):
        name, *figures = (value for head, value in line.items() if head != "pixels")
        mark = chip(colors[k]) if k < min(len(colors), len(lines) - 1) else ""
        share = figures[0] if k < len(lines) - 1 else None  # the last line is that of all classes
        rows.append((Html(mark + escape(name)), bar(share), *map(percent, figures)))
    return table((heads[0], Html('<th class="bar"></th>'), *heads[1:]), rows, "total")


def _confusion(path: Path, counts: list[list[int]], names: list[str]) -> Html:
    """The confusion matrix, and where there are many classes the pairs that are confused most."""
    with writing(path):
        write_picture(path, confusion_picture(counts, names))
    parts = [section("Confusion matrix", natural(path))]
    if len(names) > FEW_CLASSES:
        heads = ("class", "taken for", "% of its pixels", "pixels")
        found = mistakes(counts, MISTAKES)
        pairs = [(names[m.label], names[m.prediction], percent(m.share), f"{m.pixels:,}") for m in found]
        parts.append(section("Confused most", table(heads, pairs)))
    return Html("".join(parts))


def class_names(cfg: RunConfig) -> list[str]:
    """The names in the configuration, or in the shards where it leaves them to these; [] without both."""
    shards = None if (cfg.data.classes or cfg.data.class_dirs) and not cfg.mixture.sets else _shards(cfg)
    if isinstance(shards, Mixture):
        return shards.scored_classes
    return list(cfg.data.classes or cfg.data.class_dirs or (shards.classes if shards else ()))


def _shards(cfg: RunConfig) -> ShardSet | Mixture | None:
    """The shards of the run, with both its splits; None where they can't be opened."""
    with contextlib.suppress(ConfigError, DataError):
        return open_shards(cfg, verify=False)
    return None
