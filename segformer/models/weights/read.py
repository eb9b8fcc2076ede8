"""Weights of any format, read: what a file, a directory or a run holds is found, not asked for.

    run     a run directory, or the folder of one of its checkpoints (checkpoint/reader.py)
    other   files (tensor_files.py) -> names (key_maps.py) -> architecture (bundle.py) -> metadata beside it

The names tell the format, and with it the LayerNorm epsilons that it is run with:

    hf        transformers: 1e-5 everywhere, whatever the config says                              hf
    nvlabs    NVlabs/SegFormer .pth, segmentation or ImageNet encoder                              original
    smp       segmentation_models_pytorch, Segformer with a mit_b* encoder                         original
    mmseg     mmsegmentation, MixVisionTransformer with its own decode head                        mmseg
    ours      an export: a section "segformer" in config.json, hf names or our own      as the section says
    run       our names                                                     as config.yaml of the run says

Refuses, with CheckpointError, everything that those modules refuse, a config.json of another network, and an
export whose weights have another sha256 sum than its config.json says.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segformer.checkpoint.reader import Run, is_run, open_run
from segformer.errors import CheckpointError, ConfigError, is_main_rank, listed, reraise_as, say
from segformer.files import sha256_of
from segformer.models.variants import NORM_PROFILES, VARIANTS, ModelConfig
from segformer.models.weights.bundle import Arch, Metadata, Weights, check_tensors, find_arch, with_shapes
from segformer.models.weights.key_maps import ALIGNED, detect, to_ours
from segformer.models.weights.tensor_files import ModelFiles, read_files

PROFILES = {"hf": "hf", "hf5": "hf", "nvlabs": "original", "smp": "original", "mmseg": "mmseg"}


def read_weights(path: str | Path, *, step: str = "newest", encoder_only: bool = False) -> Weights:
    """Read any file or directory of weights: format, sizes and epsilons are found, not asked for.

    `step` chooses the checkpoint of a run: newest, best or a number. The tensors are complete and of the
    right shapes as far as the sizes can be read from them; loading them into a network checks the rest.

    Raises:
        CheckpointError: for every reason in the module docstring.
        ConfigError: `step` is unknown, or given for a file that holds one model.
    """
    source = Path(path)
    do = "give a file or directory of weights that you may read"
    # names that are too long, places closed to us
    with reraise_as(CheckpointError, f"{source} can't be read", do, on=(OSError, ValueError, RecursionError)):
        if is_run(source):
            weights = _read_run(source, step)
        elif step != "newest":
            raise ConfigError(
                f"step={step} asks for a checkpoint of a run, but {source} holds one model; leave step out, "
                "or give the directory of the run"
            )
        else:
            weights = _read_model(source, encoder_only)
    weights.source = str(path)
    return weights.encoder() if encoder_only else weights


def _read_run(path: Path, step: str) -> Weights:
    run = open_run(path, step, warn=say if is_main_rank() else lambda line: None)
    provenance = {"digest": run.state.data_digest, "step": run.state.step, "averaged": run.averaged}
    if not run.config:
        return Weights(state=run.weights, arch=find_arch(run.weights), format="run", provenance=provenance)
    damaged = (KeyError, TypeError, ValueError, AttributeError, ConfigError)
    with reraise_as(CheckpointError, f"{run.folder}/config.yaml is damaged", on=damaged):
        return _described_run(run, provenance)


def _described_run(run: Run, provenance: dict[str, Any]) -> Weights:
    """The weights of a run, and what its configuration says of them."""
    model, data = run.config["model"], run.config["data"]
    keys = model.keys() & {"norm_profile", "dropout", "drop_path_rate", "ops"}  # an older version has fewer
    said = {"norm_profile": ModelConfig().norm_profile} | {key: model[key] for key in keys}
    arch = with_shapes(Arch(variant=model["variant"], kind="encoder", **said), run.weights)
    pixels = run.state.pixels or {}
    classifies = arch.kind == "classification"
    settings = run.config.get("classification" if classifies else "augment", {})
    metadata = Metadata(
        classes=data.get("classes") or data.get("class_dirs"),
        palette=data.get("palette"),
        mean=pixels.get("mean") or settings.get("mean"),
        std=pixels.get("std") or settings.get("std"),
        dtype=pixels.get("dtype", ""),
        image_range=data.get("image_range"),
        view=[settings["size"], settings["eval_resize"]] if classifies else [],
        long_side=run.state.long_side or 0,
    )
    metadata.check(arch.num_classes, arch.in_channels)
    sets = run.config.get("mixture", {}).get("sets")
    weights = Weights(
        state=run.weights,
        arch=arch,
        metadata=metadata,
        format="run",
        provenance={"shards": data.get("shards", ""), **provenance} | ({"sets": sets} if sets else {}),
    )
    weights.config()  # refuses what no network has
    return weights


def _read_model(source: Path, encoder_only: bool) -> Weights:
    files = read_files(source)
    with reraise_as(CheckpointError, str(files.file), on=CheckpointError):
        check_tensors(files.state, "its tensors can't be used")
        if own := _own_names(files.config):
            arch = with_shapes(Arch(variant=own, kind="encoder"), files.state)
            weights = Weights(state=files.state, arch=arch)
        else:
            weights = _renamed(files.state, encoder_only)
        _describe(weights, files)
    return weights


def _renamed(theirs: Mapping[str, Tensor], encoder_only: bool) -> Weights:
    """Tensors of any format under our names, with the architecture that they have."""
    keys = detect(theirs)
    state, dropped = to_ours(theirs, keys, encoder_only=encoder_only)
    notes = [f"the prefix {keys.wrapper!r} was taken off the names"] if keys.wrapper else []
    means = [name for name in state if name.endswith(".running_mean")]
    counters = {name.replace("running_mean", "num_batches_tracked") for name in means}
    if missing := sorted(counters - state.keys()):
        state |= {name: torch.zeros((), dtype=torch.int64) for name in missing}  # as torch does
        notes.append(f"{listed(missing)} is not in the file; it only counts, and was set to 0")
    kinds = {str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point()}
    if kinds != {"float32"}:
        notes.append(f"tensors of {', '.join(sorted(kinds))} were converted to float32")
    arch = replace(find_arch(state), norm_profile=PROFILES[keys.format])
    if (keys.format, arch.kind) == ("smp", "segmentation"):
        notes.append(ALIGNED)
    return Weights(
        state={name: to_fp32(tensor) for name, tensor in state.items()},
        arch=arch,
        format=keys.format,
        dropped=dropped,
        notes=notes,
    )


def _own_names(config: Mapping[str, Any] | None) -> str:
    """The variant of an export that transformers has no network for, with our names; "" of others."""
    section = (config or {}).get("segformer")
    section = section if isinstance(section, dict) else {}
    name = section.get("variant")
    if not (isinstance(name, str) and name in VARIANTS):
        return ""
    return name if VARIANTS[name].backbone != "mit" or "head" in section else ""


def to_fp32(tensor: Tensor) -> Tensor:
    """The tensor as float32 where it counts nothing."""
    return tensor.float() if tensor.is_floating_point() else tensor


def _describe(weights: Weights, files: ModelFiles) -> None:
    """Fill in what stands beside the tensors."""
    arch, config = weights.arch, files.config
    if (profile := str(files.meta.get("norm_profile"))) in NORM_PROFILES:  # in the header of our safetensors
        arch.norm_profile = profile
    if config is None:
        section = files.meta.get("segformer")
        weights.metadata = _metadata_of_meta(files.meta, arch.num_classes)
    else:
        section = config.get("segformer")
        if weights.format in ("hf", "hf5"):
            _check_hf_config(config, arch)
            weights.metadata = _metadata_of_hf(config, files.preprocessor, arch)
        arch.dropout = _rate(config.get("classifier_dropout_prob"), arch.dropout)
        arch.drop_path_rate = _rate(config.get("drop_path_rate"), arch.drop_path_rate)
        if section is not None and "transformers_version" in config:
            weights.notes.append("transformers has saved it since; what its export said is left out")
            arch.norm_profile, section = "hf", None
        elif section is not None:
            weights.format = "ours"
            if not isinstance(section, dict) or section.get("weights_sha256") != sha256_of(files.file):
                raise CheckpointError("is damaged or of another export (sha256); export it again")
    if section is not None:
        describe_as(weights, section)


def describe_as(weights: Weights, section: dict[str, Any]) -> None:
    """Take over the section "segformer" that we wrote beside the tensors."""
    arch, damaged = weights.arch, (KeyError, TypeError, ValueError, ConfigError)
    with reraise_as(CheckpointError, 'the section "segformer" beside it is damaged', on=damaged):
        entries = {key: section[key] for key in ("classes", "palette", "mean", "std")}
        entries |= {key: section.get(key) for key in ("view", "dtype", "image_range", "long_side")}  # newer
        if arch.kind == "encoder":  # perhaps of a model whose head is left out
            entries |= {"classes": None, "palette": None}
        weights.metadata = Metadata(**entries)
        weights.metadata.check(arch.num_classes, arch.in_channels)
        if (section["variant"], section["norm_profile"] in NORM_PROFILES) != (arch.variant, True):
            raise ValueError(f"variant {section['variant']}, norm_profile {section['norm_profile']}")
        arch.norm_profile = section["norm_profile"]
        known = ("shards", "sets", "digest", "step", "averaged", "scores")
        weights.provenance = {key: section[key] for key in known if key in section}


def _rate(value: Any, usual: float) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 <= value < 1 else usual


def hf_sizes(arch: Arch) -> dict[str, Any]:
    """The sizes of a network as keys of transformers' SegformerConfig."""
    variant = VARIANTS[arch.variant]
    return {
        "num_channels": arch.in_channels,
        "num_encoder_blocks": len(variant.depths),
        "hidden_sizes": list(variant.embed_dims),
        "depths": list(variant.depths),
        "num_attention_heads": list(variant.num_heads),
        "sr_ratios": list(variant.sr_ratios),
        "mlp_ratios": list(variant.mlp_ratios),
        "patch_sizes": [7, 3, 3, 3],
        "strides": [4, 2, 2, 2],
        "hidden_act": "gelu",
        "reshape_last_stage": True,
    }


def _check_hf_config(config: Mapping[str, Any], arch: Arch) -> None:
    """Raise CheckpointError where a config.json describes another network than `arch`.

    Heads and strides leave no trace in the shapes of the tensors, so nothing else would notice.
    """
    for key, ours in {"model_type": "segformer", **hf_sizes(arch)}.items():
        if (theirs := config.get(key, ours)) != ours:
            raise CheckpointError(
                f"config.json says {key}={theirs}, but {arch.variant}, which the weights are, has {ours}; "
                "it is another network, or the config of other weights"
            )


def default_labels(num_classes: int) -> list[str]:
    """The names that transformers gives to classes without one."""
    return [f"LABEL_{k}" for k in range(num_classes)]


def _metadata_of_hf(config: Mapping[str, Any], preprocessor: Mapping[str, Any], arch: Arch) -> Metadata:
    """Metadata in the files of transformers; names that transformers made up (LABEL_0) are left out."""
    scale = preprocessor.get("rescale_factor", 1 / 255) if preprocessor.get("do_rescale", True) else 1.0
    found = Metadata()
    with contextlib.suppress(KeyError, TypeError, ValueError, ZeroDivisionError, ConfigError):
        mean, std = ([round(v / scale, 6) for v in preprocessor[key]] for key in ("image_mean", "image_std"))
        read = Metadata(mean=mean, std=std)
        read.check(arch.num_classes, arch.in_channels)
        found = read
    labels, num_classes = config.get("id2label"), arch.num_classes
    if isinstance(labels, dict) and {str(k) for k in range(num_classes)} == set(labels):
        names = [str(labels[str(k)]) for k in range(num_classes)]
        found.classes = [] if names == default_labels(num_classes) else names
    return found


def _metadata_of_meta(meta: Mapping[str, Any], num_classes: int) -> Metadata:
    """Class names and colors in the "meta" of a .pth file, where it has as many as classes."""
    described = meta.get("dataset_meta")
    described = described if isinstance(described, dict) else {}
    found: dict[str, Any] = {}
    for key in ("classes", "palette"):
        values = meta.get(key.upper()) or described.get(key)
        if isinstance(values, list | tuple) and len(values) == num_classes:
            found[key] = values
    with contextlib.suppress(ConfigError):  # colors that are none
        return Metadata(**found)
    return Metadata(classes=found.get("classes", []))
