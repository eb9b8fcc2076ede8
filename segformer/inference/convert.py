"""The command that converts weights: any known format in, any that can hold the model out.

    source  ->  format, variant, classes and epsilons are found (models/convert.py)
            ->  encoder_only: without the head      class_map: another class layer (models/remap.py)
            ->  checked against the network that the sizes say, every tensor of it
            ->  out: a directory for ours and hf, a .pth for nvlabs, smp and mmseg (models/save.py)

It prints what it found, what it left out and what it wrote. Refuses everything that those modules refuse, and
to write over its source.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from segformer.errors import ConfigError
from segformer.inference.export import read_run
from segformer.models.segformer import MiTClassifier, build_encoder, build_model, check_strict
from segformer.models.variants import NORM_PROFILES
from segformer.models.weights.card import Card, colours
from segformer.models.weights.class_map import check_distinct
from segformer.models.weights.convert import PROFILES, Weights, read_weights
from segformer.models.weights.files import SUFFIXES
from segformer.models.weights.names import TITLES, WRITTEN, listed, printable
from segformer.models.weights.save import write_hf, write_pth
from segformer.models.weights.sizes import find_sizes

_SHOWN = 5  # class names printed
_UNFIT = "get the whole file again, or take the encoder alone, where that is sound, with encoder_only=true"
_CARRIED = ("view", "shards", "digest", "step", "scores")


@dataclass(kw_only=True, slots=True)
class ConvertConfig:
    """What to convert into what."""

    checkpoint: str = "???"
    "File, directory or run to read; its format is found."
    output: str = "???"
    "Directory to write for ours and hf, .pth file for nvlabs, smp and mmseg."
    to: str = "ours"
    "ours (an export: SegFormer.from_pretrained, model.pretrained, predict.py), hf, nvlabs, smp or mmseg."
    encoder_only: bool = False
    "Leave the head out; needed for the encoder of an mmsegmentation model and to write one."
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
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must be from 0 to {2**63 - 1}")
        if self.to not in ("ours", *WRITTEN):
            raise ConfigError(f"to={self.to} is unknown; use one of ours, {', '.join(WRITTEN)}")
        if self.to in ("ours", "hf") and Path(self.output).suffix.lower() in SUFFIXES:
            raise ConfigError(
                f"output={self.output} is the name of a file, but to={self.to} writes a directory; give a "
                "directory, or one of to=nvlabs, smp, mmseg for a .pth file"
            )
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
    out = Path(cfg.output)
    _keep_apart(Path(cfg.checkpoint), out)
    class_map, (classes, palette) = _mapping(cfg.class_map), _named(cfg.classes)
    weights = _read(cfg)
    _report(weights)
    if class_map is not None:
        generator = torch.Generator().manual_seed(cfg.seed)
        before = weights.sizes.num_classes
        weights = weights.mapped(class_map, target_classes=classes, generator=generator)
        print(f"class map  {before} -> {weights.sizes.num_classes} classes: {_few(weights.card.classes)}")
    elif classes is not None:
        if len(classes) != weights.sizes.num_classes:
            has = weights.sizes.num_classes or "no"
            raise ConfigError(f"classes has {len(classes)} names, but the model has {has} classes")
        print(f"named      {_few(classes)}")
        weights = replace(weights, card=replace(weights.card, classes=classes))
    if palette is not None:
        weights = replace(weights, card=replace(weights.card, palette=palette))
    check_network(weights)
    if cfg.to == "ours":
        carried = {key: value for key, value in (weights.section or {}).items() if key in _CARRIED}
        written = write_hf(weights, out, section={**carried, "converted_from": weights.title})
    elif cfg.to == "hf":
        written = write_hf(weights, out, section=None)
    else:
        written = write_pth(weights, out, cfg.to)
    _report_written(cfg.to, weights, out, written)
    return written


def check_network(weights: Weights) -> None:
    """Raise CheckpointError naming every tensor that is missing or of another shape than the network has."""
    sizes, config = weights.sizes, weights.config()
    with torch.device("meta"):
        if sizes.kind == "classification":
            network: torch.nn.Module = MiTClassifier(build_encoder(config), sizes.num_classes or 0)
        else:
            network = build_model(config, sizes.num_classes or 1)
    prefixes = ("backbone.",) if sizes.kind == "encoder" else ("",)
    source = f"{weights.source} as {sizes.variant}"
    check_strict(network, weights.state, source=source, prefixes=prefixes, do=_UNFIT)


def _keep_apart(source: Path, out: Path) -> None:
    try:
        places = {source.resolve(), source.resolve().parent} if source.is_file() else {source.resolve()}
        same = out.resolve() in places
    except (OSError, ValueError, RuntimeError):  # too long, closed to us, links in a circle
        return  # whoever reads or writes it says so
    if same:
        raise ConfigError(f"output={out} is where the source lies; choose another place")


def _read(cfg: ConvertConfig) -> Weights:
    source = Path(cfg.checkpoint)
    if _is_run(source):
        trained = read_run(source)
        card = Card(classes=trained.classes, palette=trained.palette, mean=trained.mean, std=trained.std)
        weights = Weights(
            source=cfg.checkpoint,
            state=trained.state,
            sizes=find_sizes(trained.state),
            format="run",
            norm_profile=trained.model.norm_profile,
            card=card,
            section={key: getattr(trained, key) for key in _CARRIED},
        )
        weights = weights.encoder() if cfg.encoder_only else weights
    else:
        weights = read_weights(cfg.checkpoint, encoder_only=cfg.encoder_only)
    if cfg.norm_profile is not None:
        weights = replace(weights, norm_profile=cfg.norm_profile)
    return weights


def _is_run(source: Path) -> bool:
    try:
        return (source / "config.yaml").is_file() and (source / "checkpoints").is_dir()
    except (OSError, ValueError):
        return False  # reading it says why


def _mapping(given: Any) -> dict[Any, Any] | None:
    """`class_map` as given on the command line, or read from the file that it names."""
    content = _read_file(given, "class_map") if isinstance(given, str) else given
    if content is not None and not isinstance(content, dict):
        raise ConfigError(
            "class_map must be a mapping, or a file with one: target class -> source class or null"
        )
    return content


def _named(given: Any) -> tuple[list[str] | None, list[list[int]] | None]:
    """Names of the target classes, and their colours where a file has `palette:` beside `classes:`."""
    content = _read_file(given, "classes") if isinstance(given, str) else given
    if given is None:
        return None, None
    described = content if isinstance(content, dict) else {"classes": content}
    names, palette = described.get("classes"), described.get("palette") or None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or not names:
        raise ConfigError(
            "classes must be a list of names, or a file with such a list, alone or as `classes:`"
        )
    check_distinct(names, "classes")
    try:
        return names, None if palette is None else colours(palette, len(names))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"classes={given}: its palette can't be used ({error})") from None


def _read_file(path: str, key: str) -> Any:
    """The content of a YAML or JSON file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            return json.loads(text, object_pairs_hook=_once)
        _check_once(yaml.compose(text, yaml.SafeLoader))
        return yaml.safe_load(text)
    except ConfigError as error:
        raise ConfigError(f"{key}={path} {error}") from None
    except OSError as error:
        raise ConfigError(f"{key}={path} can't be read: {error.strerror}; give a YAML or JSON file") from None
    except RecursionError:
        raise ConfigError(f"{key}={path} is nested too deeply; give a plain list or mapping") from None
    except (ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(f"{key}={path} is no YAML or JSON: {' '.join(str(error).split())}") from None


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The mapping of `pairs`; ConfigError, of which Python would say nothing, where a key comes twice."""
    content: dict[Any, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ConfigError(f"has {printable(str(key))} twice; give each key once")
        content[key] = value
    return content


def _check_once(root: yaml.Node | None) -> None:
    """Raise ConfigError where a mapping of a YAML file has a key twice; safe_load would keep the last."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))  # an alias is the same node again
        if isinstance(node, yaml.MappingNode):
            _once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            waiting += [value for _, value in node.value]
        else:
            waiting += node.value


def _report(weights: Weights) -> None:
    sizes, card = weights.sizes, weights.card
    head = {
        "segmentation": f"segmentation, {sizes.num_classes} classes, decoder_dim {sizes.decoder_dim}",
        "classification": f"image classifier, {sizes.num_classes} classes",
        "encoder": "encoder without a head",
    }[sizes.kind]
    print(f"source     {weights.source}: {weights.title}")
    print(f"model      {sizes.variant}, {head}, {weights.parameters:,} parameters")
    profile = weights.config().norm_profile
    block, embed = NORM_PROFILES[profile]
    print(f"epsilons   {profile}: {block:g} in blocks, {embed:g} after embedding and reduction")
    if sizes.num_classes:
        print(f"classes    {_few(card.classes) if card.classes else 'not named in the file'}")
    if weights.dropped:
        print(f"left out   {len(weights.dropped)} tensors: {listed(weights.dropped)}")
    for note in weights.notes:
        print(f"note       {note}")


def _report_written(to: str, weights: Weights, out: Path, written: list[Path]) -> None:
    size = sum(path.stat().st_size for path in written) / 1e6
    print(f"wrote      {', '.join(map(str, written))} ({size:.1f} MB)")
    profile = PROFILES.get(to, weights.norm_profile)
    if profile != weights.norm_profile:
        print(
            f"note       {TITLES[to]} runs LayerNorm with the epsilons of profile {profile}, these weights "
            f"are of profile {weights.norm_profile}: outputs differ slightly"
        )
    print(f"use        {_use(to, weights, out)}")


def _use(to: str, weights: Weights, out: Path) -> str:
    """How the target is loaded."""
    sizes = weights.sizes
    if to == "smp" and sizes.kind == "segmentation":
        return (
            f'smp.Segformer("mit_{sizes.variant}", encoder_weights=None, decoder_segmentation_channels='
            f'{sizes.decoder_dim}, classes={sizes.num_classes}).load_state_dict(torch.load("{out}"))'
        )
    if to == "hf":
        name = {"segmentation": "ForSemanticSegmentation", "classification": "ForImageClassification"}
        return f'Segformer{name.get(sizes.kind, "Model")}.from_pretrained("{out}")'
    return {
        "ours": f"model.pretrained={out} in training"
        + (f', SegFormer.from_pretrained("{out}")' if sizes.kind == "segmentation" else "")
        + (f", launch/predict.py checkpoint={out}" if sizes.kind == "segmentation" else ""),
        "nvlabs": f"python tools/test.py <config> {out}"
        if sizes.kind == "segmentation"
        else f"model=dict(pretrained='{out}') in the config",
        "smp": f'model.encoder.load_state_dict(torch.load("{out}"))',
        "mmseg": f"backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='{out}'))",
    }[to]


def _few(names: list[str] | None) -> str:
    if not names:
        return "not named"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(printable, names[:_SHOWN])) + more
