"""The report of a run: one page of its scores, curve, pictures and configuration.

    runs/<name>/report.html     scores, table of classes, curve.png, overlays/*.jpg, configuration

It opens offline on any device: pictures are base64 inside it, and nothing is fetched. Every text that comes
from the run is escaped. A run without evaluation, checkpoint or shards gets a report without those parts, and
a classifier one without overlays.
"""

import base64
import contextlib
import html
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
from segformer.inference.pictures import history, series, write_curve, write_overlays
from segformer.inference.predict import Predictor, writing
from segformer.models.encoders import BACKBONES
from segformer.models.variants import VARIANTS
from segformer.training.config import RunConfig, as_yaml, to_run_config
from segformer.training.task import training_crop

MANY_CLASSES = 200  # a longer table is folded away

_STYLE = """
:root { --ink: #1f2933; --soft: #5f6b7a; --line: #e4e7eb; --page: #f5f7fa; --card: #fff; --bar: #0072b2; }
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
h1, td:first-child, figcaption { overflow-wrap: anywhere; }
.card, pre, table { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card, pre { padding: 12px 16px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px;
         margin-top: 20px; }
.card b { display: block; font-size: 26px; line-height: 1.2; }
img { display: block; width: 100%; height: auto; border-radius: 12px; background: #fff; }
table { width: 100%; border-spacing: 0; }
th, td, b { text-align: right; font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; font-weight: 600; }
th:first-child, td:first-child, .card b { text-align: left; }
.chip { display: inline-block; width: 14px; height: 14px; border-radius: 4px; margin-right: 8px;
        border: 1px solid #7b8794; vertical-align: -2px; }
.bar { width: 36%; }
.bar i { display: block; height: 10px; border-radius: 5px; background: var(--bar); min-width: 2px; }
figure { margin: 0 0 16px; }
pre { margin: 0; overflow-x: auto; font-size: 13px; line-height: 1.45; }
@media (max-width: 560px) { .bar { display: none; } h1 { font-size: 23px; } .gallery { margin: 0 -8px; } }
"""


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
        predictor = Predictor.from_export(run, device)
        split = ShardSet.open(cfg.data.shards, cfg.loader.storage).split(cfg.eval_split)
        reader = ShardReader(split)
        ids = np.linspace(0, split.num_samples - 1, min(count, split.num_samples)).round().astype(int)
        raws = (reader.read(sample_id) for sample_id in ids.tolist())
        decoded = ((raw.key, decode_image(raw.image), decode_mask(raw.target)) for raw in raws)
        samples = ((key, image, target, predictor(image)) for key, image, target in decoded)
        write_overlays(samples, run / "overlays", classes=predictor.classes, palette=predictor.palette)


def _page(run: Path, cfg: RunConfig) -> str:
    """The report as HTML, from config.yaml, metrics.jsonl, curve.png and overlays/."""
    rows = history(run)
    evaluations = [row for row in rows if row["kind"] in ("eval", "final")]
    title, config = html.escape(cfg.name), html.escape(as_yaml(asdict(cfg)))
    figures = [
        f"<figure>{_image(path, 'image/jpeg')}<figcaption>{html.escape(path.stem[3:])}</figcaption></figure>"
        for path in sorted((run / "overlays").glob("*.jpg"))
    ]
    curve = run / "curve.png"
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body><main>",
        f"<h1>{title}</h1>\n<p>{html.escape(_subtitle(cfg))}</p>",
        _cards(rows, evaluations, cfg),
        f"<h2>Training</h2>{_image(curve, 'image/png')}" if curve.is_file() else "",
        _class_table(evaluations[-1], cfg) if evaluations else "<p>No evaluation has been made yet.</p>",
        f'<h2>Validation images</h2><div class="gallery">{"".join(figures)}</div>' if figures else "",
        f"<details><summary>Configuration</summary><pre>{config}</pre></details>",
        "</main></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _image(path: Path, kind: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{html.escape(path.stem)}" src="data:{kind};base64,{data}">'


def _subtitle(cfg: RunConfig) -> str:
    crop = " x ".join(map(str, training_crop(cfg)))
    backbone = BACKBONES[VARIANTS[cfg.model.variant].backbone].title
    network = backbone if cfg.data.task == "classification" else "SegFormer"
    return (
        f"{network}-{cfg.model.variant.upper()} on {cfg.data.name or cfg.data.shards}: {cfg.steps} steps of "
        f"{cfg.global_batch} crops of {crop}, seed {cfg.seed}"
    )


def _cards(rows: list[dict[str, Any]], evaluations: list[dict[str, Any]], cfg: RunConfig) -> str:
    last = evaluations[-1] if evaluations else {}
    (key, first), *others = SCORES[cfg.data.task].NAMES.items()
    _, scores = series(rows, ("eval", "final"), key)
    steps, losses = series(rows, ("train",), "loss")
    _, rates = series(rows, ("train",), "images_per_s")
    cards = {
        first: _figure(last.get(key)),
        f"best {first}": _figure(scores.max() if len(scores) else None),
        **{name: _figure(last.get(other)) for other, name in others},
        "last loss": f"{losses[-1]:.3f}" if len(losses) else "-",
        f"of {cfg.steps} steps": str(steps[-1]) if len(steps) else "0",
        "images/s, median": f"{np.median(rates):.1f}" if len(rates) else "-",
    }
    shown = [f'<div class="card"><b>{value}</b><span>{name}</span></div>' for name, value in cards.items()]
    return f'<div class="cards">{"".join(shown)}</div>'


def _figure(value: Any) -> str:
    """A share as per cent, a count with commas; "-" where it was not measured or the class did not occur."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{100 * value:.1f}" if isinstance(value, float) and value == value else "-"


def _class_table(row: dict[str, Any], cfg: RunConfig) -> str:
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
    names, colors = _class_names(cfg), class_palette(cfg.data)
    lines = []
    for k, figures in enumerate(scores):
        name = html.escape(names[k] if k < len(names) else f"class {k}")
        color = "#{:02x}{:02x}{:02x}".format(*colors[k]) if k < len(colors) else "transparent"
        bar = f'<i style="width:{100 * figures[0]:.1f}%"></i>' if isinstance(figures[0], float) else ""
        lines.append(_line(f'<span class="chip" style="background:{color}"></span>{name}', bar, figures))
    head = f'<tr><th>class</th><th class="bar"></th>{"".join(f"<th>{text}</th>" for text in heads)}</tr>'
    table = f"<table>{head}{''.join(lines)}{_line(total[0], '', total[1:])}</table>"
    title = f"Classes at step {int(row['step'])}"
    if len(lines) > MANY_CLASSES:
        return f"<details><summary>{title}</summary>{table}</details>"
    return f"<h2>{title}</h2>{table}"


def _line(name: str, bar: str, figures: tuple[Any, ...]) -> str:
    cells = "".join(f"<td>{_figure(value)}</td>" for value in figures)
    return f'<tr><td>{name}</td><td class="bar">{bar}</td>{cells}</tr>'


def _class_names(cfg: RunConfig) -> list[str]:
    """The names in the configuration, or in the shards where it leaves them to these; [] without both."""
    if named := cfg.data.classes or cfg.data.class_dirs:
        return list(named)
    with contextlib.suppress(ConfigError, DataError):
        return ShardSet.open(cfg.data.shards, cfg.loader.storage, verify=False).classes
    return []
