"""The command that converts weights: any known format in, any that can hold the model out.

    source  ->  format, variant, classes and epsilons are found (models/weights/read.py)
            ->  encoder_only: without the head    class_map: another class layer (models/weights/class_map.py)
            ->  checked against the network that the sizes say, every tensor of it
            ->  out: a directory for ours and hf, a .pth for nvlabs, smp and mmseg (models/weights/write.py)

It prints what it found, what it left out and what it wrote. Refuses everything that those modules refuse, and
to write over its source.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from segformer.errors import ConfigError, listed, reraise_as, say, within
from segformer.files import parse_json, parse_yaml, read_text
from segformer.inference.export import check_network, check_output, complete, unshown
from segformer.models.variants import NORM_PROFILES
from segformer.models.weights.bundle import Metadata, Weights
from segformer.models.weights.class_map import check_distinct, map_classes
from segformer.models.weights.key_maps import ALIGNED, TITLES, WRITTEN
from segformer.models.weights.read import PROFILES, read_weights
from segformer.models.weights.write import (
    images_of,
    in_transformers,
    shown,
    write_export,
    write_hf,
    write_pth,
)

MOST = 2**20  # bytes of a file of class names


@dataclass(kw_only=True, slots=True)
class ConvertConfig:
    """Source, target and changes of a conversion."""

    checkpoint: str = "???"
    "File, directory or run to read; its format is found."
    output: str = "???"
    "Directory to write for ours and hf, .pth file for nvlabs, smp and mmseg."
    to: str = "ours"
    "ours (an export: SegFormer.from_pretrained, model.pretrained, predict.py), hf, nvlabs, smp or mmseg."
    encoder_only: bool = False
    "Leave the head out: the encoder is what every format holds."
    class_map: Any = None
    "Target class -> class of the source or null (a fresh row), by index or name; or a YAML or JSON file."
    classes: Any = None
    "Names of the target classes: a list, or a YAML or JSON file with a list or with `classes: [...]`."
    norm_profile: str | None = None
    "LayerNorm epsilons that the weights were trained with, where they are not those of the format."
    seed: int = 0
    "Seed of fresh rows of the class layer."

    def __post_init__(self) -> None:
        for key, what in (("checkpoint", "a file, directory or run"), ("output", "a directory or .pth file")):
            if not getattr(self, key).strip():
                raise ConfigError(f"{key}= is empty; give {what}")
        within(self, "", seed=(0, 2**63 - 1))
        if self.to not in ("ours", *WRITTEN):
            raise ConfigError(f"to={self.to} is unknown; use one of ours, {', '.join(WRITTEN)}")
        if self.to in ("ours", "hf"):
            check_output(self.output, f"to={self.to} writes a folder (to=nvlabs, smp and mmseg a .pth file)")
        if self.norm_profile is not None and self.norm_profile not in NORM_PROFILES:
            raise ConfigError(
                f"norm_profile={self.norm_profile} is unknown; use one of {', '.join(NORM_PROFILES)}, or null"
            )


def convert(cfg: ConvertConfig) -> list[Path]:
    """Convert `cfg.checkpoint`; returns the files written.

    Raises:
        CheckpointError: the source can't be read, is damaged or is no SegFormer.
        ConfigError: the class map, the class names or the place to write doesn't fit.
    """
    source, out = Path(cfg.checkpoint), Path(cfg.output)
    class_map, target = _mapping(cfg.class_map), _named(cfg.classes)
    classes = target.classes
    weights = read_weights(cfg.checkpoint, encoder_only=cfg.encoder_only)
    if weights.format == "run" and weights.arch.kind != "encoder":
        complete(weights)
    weights.arch.norm_profile = cfg.norm_profile or weights.arch.norm_profile
    place = source.resolve()
    if out.resolve() in (place, place.parent if source.is_file() else place):
        raise ConfigError(f"output={out} is where the source lies; choose another place")
    _report(weights)
    if class_map is not None:
        generator = torch.Generator().manual_seed(cfg.seed)
        before = weights.arch.num_classes
        weights = map_classes(weights, class_map, target_classes=classes, generator=generator)
        say(f"class map  {before} -> {weights.arch.num_classes} classes: {_few(weights.metadata.classes)}")
    elif classes:
        if len(classes) != (count := weights.arch.num_classes):
            raise ConfigError(f"classes has {len(classes)} names, but the model has {count or 'no'} classes")
        say(f"named      {_few(classes)}")
        weights.metadata.classes = classes
    weights.metadata.palette = target.palette or weights.metadata.palette
    check_network(weights)
    if cfg.to == "ours":
        written = write_export(weights, out, converted_from=weights.title)
    elif cfg.to == "hf":
        written = write_hf(weights, out)
    else:
        written = write_pth(weights, out, cfg.to)
    _report_written(cfg.to, weights, out, written)
    return written


def _mapping(given: Any) -> dict[Any, Any] | None:
    """`class_map` as given on the command line, or read from the file that it names."""
    content = _read_file(given, "class_map") if isinstance(given, str) else given
    if content is None or isinstance(content, dict):
        return content
    raise ConfigError("class_map must be a mapping, or a file with one: target class -> source class or null")


def _named(given: Any) -> Metadata:
    """Names of the target classes, and their colors where a file has `palette:` beside `classes:`."""
    if given is None:
        return Metadata()
    content = _read_file(given, "classes") if isinstance(given, str) else given
    described = content if isinstance(content, dict) else {"classes": content}
    names = described.get("classes")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ConfigError("classes must be a list of names, or a file with one, alone or as `classes:`")
    check_distinct(names, "classes")
    named = Metadata(classes=names, palette=described.get("palette") or [])
    named.check(len(names))
    return named


def _read_file(path: str, key: str) -> Any:
    """The content of a YAML or JSON file."""
    unreadable = (OSError, ValueError)
    with reraise_as(ConfigError, f"{key}={path} can't be read", "give a YAML or JSON file", on=unreadable):
        text = read_text(Path(path), most=MOST)
        return parse_json(text.encode()) if path.endswith(".json") else parse_yaml(text)


def _report(weights: Weights) -> None:
    arch = weights.arch
    head = {
        "segmentation": f"segmentation, {arch.num_classes} classes, decoder_dim {arch.decoder_dim}"
        + (", head of mmsegmentation" if arch.head == "mmseg" else ""),
        "classification": f"image classifier, {arch.num_classes} classes",
        "encoder": "encoder without a head",
    }[arch.kind]
    say(f"source     {weights.source}: {weights.title}")
    say(f"model      {arch.variant}, {head}, {weights.parameters:,} parameters")
    if not shown(weights):
        say("images     {} channels of {}".format(*images_of(weights)))
    profile = weights.config().norm_profile
    block, embed = NORM_PROFILES[profile]
    say(f"epsilons   {profile}: {block:g} in blocks, {embed:g} after embedding and reduction")
    if arch.num_classes:
        say(f"classes    {_few(weights.metadata.classes)}")
    if weights.dropped:
        say(f"left out   {len(weights.dropped)} tensors: {listed(sorted(weights.dropped))}")
    for note in weights.notes:
        say(f"note       {note}")


def _report_written(to: str, weights: Weights, out: Path, written: list[Path]) -> None:
    size = sum(path.stat().st_size for path in written) / 1e6
    say(f"wrote      {', '.join(map(str, written))} ({size:.1f} MB)")
    arch = weights.arch
    profile = PROFILES.get(to, arch.norm_profile)
    if profile != arch.norm_profile:
        say(
            f"note       {TITLES[to]} runs LayerNorm with the epsilons of profile {profile}, these weights "
            f"are of profile {arch.norm_profile}: outputs differ slightly"
        )
    if to == "ours" and not in_transformers(weights):
        say("note       transformers has no such network and can't run this export; segformer does")
    elif to in ("ours", "hf") and not shown(weights):
        say(f"note       {unshown(weights)}")
    if (to, arch.kind) == ("smp", "segmentation"):
        say(f"note       {ALIGNED}")
    use = _USE.get((to, arch.kind)) or _USE[to, "encoder"]
    head = "model.head=mmseg " if arch.head == "mmseg" else ""
    say("use        " + use.format(out=out, arch=arch, head=head))


# (format, kind) -> how the file is loaded; a kind that is not listed as the encoder is.
_USE = {
    ("ours", "encoder"): "model.pretrained={out} in training",
    ("ours", "segmentation"): (
        '{head}model.pretrained={out} in training, SegFormer.from_pretrained("{out}"), '
        "launch/predict.py checkpoint={out}"
    ),
    ("hf", "encoder"): 'SegformerModel.from_pretrained("{out}")',
    ("hf", "segmentation"): 'SegformerForSemanticSegmentation.from_pretrained("{out}")',
    ("hf", "classification"): 'SegformerForImageClassification.from_pretrained("{out}")',
    ("smp", "encoder"): 'model.encoder.load_state_dict(torch.load("{out}"))',
    ("smp", "segmentation"): (
        'smp.Segformer("mit_{arch.variant}", encoder_weights=None, decoder_segmentation_channels='
        '{arch.decoder_dim}, classes={arch.num_classes}).load_state_dict(torch.load("{out}"))'
    ),
    ("nvlabs", "encoder"): "model=dict(pretrained='{out}') in the config",
    ("nvlabs", "segmentation"): "python tools/test.py <config> {out}",
    ("mmseg", "segmentation"): "python tools/test.py <config> {out}",
    ("mmseg", "encoder"): "backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='{out}'))",
}


def _few(names: list[str]) -> str:
    return listed(names, 5) or "not named"
