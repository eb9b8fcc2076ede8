"""The report of a run: one page of its scores, curve, pictures and configuration.

    runs/<name>/report.html     scores, table of classes, curve.png, overlays/*.jpg, configuration

It opens offline on any device: pictures are base64 inside it, and nothing is fetched. Every text that comes
from the run is escaped. A run without evaluation, checkpoint or shards gets a report without those parts, and
a classifier one without overlays.
"""

import contextlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segformer.checkpoint.format import TrainState
from segformer.checkpoint.reader import CONFIG, newest_state, stored_config
from segformer.data.shards.format import ShardSet
from segformer.data.shards.reader import ShardReader
from segformer.data.sources.dataset import class_palette
from segformer.data.sources.decode import decode_image, decode_mask
from segformer.errors import CheckpointError, ConfigError, DataError, at_least, reported, say
from segformer.evaluation.metrics import SCORES
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
    page,
    percent,
    section,
    table,
)
from segformer.inference.pictures import history, series, write_curve, write_overlays
from segformer.inference.predict import writing
from segformer.inference.predictor import Predictor
from segformer.models.encoders import BACKBONES
from segformer.models.variants import VARIANTS
from segformer.training.config import RunConfig, as_yaml, to_run_config
from segformer.training.task import training_crop

MANY_CLASSES = 200  # a longer table is folded away
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
    if count and run_config.data.task == "segmentation":
        _draw_overlays(run, run_config, count, cfg.device)
    path = run / "report.html"
    with writing(path):
        write_atomic(path, _page(run, run_config))
    for label, name in (("curve", "curve.png"), ("image, target, prediction", "overlays")):
        if (run / name).exists():
            say(f"{label}: {run / name}")
    say(f"report: {path}")
    return path


def _draw_overlays(run: Path, cfg: RunConfig, count: int, device: str) -> None:
    """Predict `count` images spread evenly over the evaluation split and draw them beside their targets."""
    # A report of what there is beats none.
    with reported(lambda error: say(f"report: no new overlays: {error}"), on=(CheckpointError, DataError)):
        predictor = Predictor(run, device=device)
        split = ShardSet.open(cfg.data.shards, cfg.loader.storage).split(cfg.eval_split)
        reader = ShardReader(split)
        ids = np.linspace(0, split.num_samples - 1, min(count, split.num_samples)).round().astype(int)
        raws = (reader.read(sample_id) for sample_id in ids.tolist())
        decoded = ((raw.key, decode_image(raw.image), decode_mask(raw.target)) for raw in raws)
        samples = ((key, image, target, predictor(image).mask) for key, image, target in decoded)
        write_overlays(samples, run / "overlays", classes=predictor.classes, palette=predictor.palette)


def _page(run: Path, cfg: RunConfig) -> str:
    """The report as HTML, from config.yaml, metrics.jsonl, curve.png and overlays/."""
    rows = history(run)
    evaluations = [row for row in rows if row["kind"] in ("eval", "final")]
    figures = [figure(path, path.stem[3:]) for path in sorted((run / "overlays").glob("*.jpg"))]
    curve = run / "curve.png"
    parts = [
        element("h1", cfg.name),
        element("p", _subtitle(cfg)),
        _cards(rows, evaluations, cfg),
        section("Training", image(curve)) if curve.is_file() else Html(),
        _class_table(evaluations[-1], cfg) if evaluations else element("p", NO_EVALUATION),
        section("Validation images", element("div", *figures, class_="gallery")) if figures else Html(),
        folded("Configuration", element("pre", as_yaml(asdict(cfg)))),
    ]
    return page(cfg.name, parts)


def _subtitle(cfg: RunConfig) -> str:
    crop = " x ".join(map(str, training_crop(cfg)))
    backbone = BACKBONES[VARIANTS[cfg.model.variant].backbone].title
    network = backbone if cfg.data.task == "classification" else "SegFormer"
    return (
        f"{network}-{cfg.model.variant.upper()} on {cfg.data.name or cfg.data.shards}: {cfg.steps} steps of "
        f"{cfg.global_batch} crops of {crop}, seed {cfg.seed}"
    )


def _cards(rows: list[dict[str, Any]], evaluations: list[dict[str, Any]], cfg: RunConfig) -> Html:
    last = evaluations[-1] if evaluations else {}
    (key, first), *others = SCORES[cfg.data.task].NAMES.items()
    _, scores = series(rows, ("eval", "final"), key)
    steps, losses = series(rows, ("train",), "loss")
    _, rates = series(rows, ("train",), "images_per_s")
    values = {
        first: percent(last.get(key)),
        f"best {first}": percent(scores.max() if len(scores) else None),
        **{name: percent(last.get(other)) for other, name in others},
        "last loss": f"{losses[-1]:.3f}" if len(losses) else "-",
        f"of {cfg.steps} steps": str(steps[-1]) if len(steps) else "0",
        "images/s, median": f"{np.median(rates):.1f}" if len(rates) else "-",
    }
    return cards(values)


def _class_table(row: dict[str, Any], cfg: RunConfig) -> Html:
    """The scores of every class, the first of them also as a bar, and those of all classes together."""
    heads: tuple[str, ...]
    scores: list[tuple[Any, ...]]
    total: tuple[Any, ...]
    if "iou" in row:
        heads, total = ("IoU, %", "accuracy, %"), ("mean", row.get("miou"), row.get("macc"))
        scores = list(zip(row["iou"], row["acc"], strict=True))
    else:
        counts = row.get("counts") or []
        heads, images = ("top-1, %", "top-5, %", "images"), sum(count for count, *_ in counts)
        total = ("all", row.get("top1"), row.get("top5"), images)
        scores = [(*(hits / n if n else None for hits in right), n) for n, *right in counts]
    names, colors = class_names(cfg), class_palette(cfg.data)
    lines = []
    for k, figures in enumerate(scores):
        name = escape(names[k] if k < len(names) else f"class {k}")
        mark = chip(colors[k]) if k < len(colors) else ""
        lines.append((Html(mark + name), bar(figures[0]), *map(percent, figures)))
    lines.append((total[0], bar(None), *map(percent, total[1:])))
    shown = table(("class", Html('<th class="bar"></th>'), *heads), lines, "total")
    title = f"Classes at step {int(row['step'])}"
    if len(lines) > MANY_CLASSES:
        return folded(title, shown)
    return section(title, shown)


def class_names(cfg: RunConfig) -> list[str]:
    """The names in the configuration, or in the shards where it leaves them to these; [] without both."""
    if named := cfg.data.classes or cfg.data.class_dirs:
        return list(named)
    with contextlib.suppress(ConfigError, DataError):
        return ShardSet.open(cfg.data.shards, cfg.loader.storage, verify=False).classes
    return []
