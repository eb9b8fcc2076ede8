"""A model as a bundle: tensors under our names, the architecture that they belong to, and metadata.

    Weights    .state      parameters and buffers
               .arch       variant, kind, classes, channels, LayerNorm epsilons: all that a network takes
               .metadata   names and colors of the classes, normalization of the images

`find_arch` infers the architecture from names and shapes. Refuses, with CheckpointError, sizes that are none
of VARIANTS and tensors without data, of another kind than floating point or with NaN; with ConfigError,
metadata that no file could hold.
"""

import math
import operator
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from segformer.checkpoint.format import is_finite
from segformer.errors import CheckpointError, ConfigError, listed, reraise_as
from segformer.models.encoders import stem_of
from segformer.models.variants import HEADS, RGB, VARIANTS, ModelConfig
from segformer.models.weights.key_maps import TITLES

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DTYPES = ("", "uint16", "float32")  # of images; "" = uint8
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(kw_only=True, slots=True)
class Arch:
    """A SegFormer, a classifier of its encoder, or the encoder alone."""

    variant: str
    kind: str
    "segmentation, classification or encoder."
    num_classes: int = 0
    "Logits; 0 for an encoder."
    in_channels: int = RGB
    "Channels of the images."
    head: str = "segformer"
    "Decode head, a key of HEADS (variants.py)."
    decoder_dim: int | None = None
    "Channels of the decode head."
    norm_profile: str | None = None
    "LayerNorm epsilons that the weights are run with; None where nothing says so."
    dropout: float = 0.1
    drop_path_rate: float = 0.1
    ops: str = "fused"


@dataclass(kw_only=True, slots=True)
class Metadata:
    """Meaning of a model's input and output; an entry is empty where nothing says it.

    Arrays and tuples become lists. Raises ConfigError naming an entry that is wrong.
    """

    classes: list[str] = field(default_factory=list)
    "Names of the K classes, in the order of the logits."
    palette: list[list[int]] = field(default_factory=list)
    "K colors, RGB of 0 to 255."
    mean: list[float] = field(default_factory=list)
    "Subtracted from each of the C channels of an image, in units of its `dtype`."
    std: list[float] = field(default_factory=list)
    "Divides each channel after that."
    dtype: str = ""
    "Type of the images' values: uint16 or float32; empty = uint8."
    image_range: list[int] = field(default_factory=list)
    "Values of 16-bit images that become 0 and 255; without it their upper 8 bits are taken."
    view: list[int] = field(default_factory=list)
    "A classifier's: [side of the square it sees, short side of the image before that is cut out]."

    long_side: int = 0
    "Most pixels of the long side of the images it was trained and scored on; 0 = they were not reduced."

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            with reraise_as(ConfigError, f"metadata is wrong: {entry.name}", on=(TypeError, ValueError)):
                setattr(self, entry.name, _READERS[entry.name]([] if value is None else value))

    def check(self, num_classes: int, channels: int = RGB) -> None:
        """Raise ConfigError where names or colors are not as many as classes, or mean and std as channels."""
        for what, values in (("names", self.classes), ("colors", self.palette)):
            if values and len(values) != num_classes:
                raise ConfigError(f"{num_classes} classes, but the metadata has {len(values)} {what}")
        for what, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers and len(numbers) != channels:
                raise ConfigError(
                    f"{channels} channels, but the metadata has {len(numbers)} values of {what}"
                )


def _list_of(values: Any, read: Callable[[Any], Any], length: int = 0) -> list[Any]:
    """The values, read one by one; `length` of them, or none."""
    found = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(found, list | tuple) or (found and length and len(found) != length):
        raise ValueError(f"{reprlib.repr(found)} is not a list" + (f" of {length}" if length else ""))
    return [read(value) for value in found]


def _byte(value: Any) -> int:
    if not 0 <= (number := operator.index(value)) <= 255:
        raise ValueError(f"{value!r} is not a whole number from 0 to 255")
    return number


def _side(value: Any) -> int:
    if (number := operator.index(value or 0)) < 0:
        raise ValueError(f"{value!r} is not 0 or more")
    return number


def _dtype(value: Any) -> str:
    if (name := str(value or "").replace("uint8", "")) not in DTYPES:
        raise ValueError(f"{value!r} is none of {', '.join(DTYPES[1:])}")
    return name


def _number(value: Any) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{value!r} is not finite")
    return number


def _positive(value: Any) -> float:
    if (number := _number(value)) <= 0:
        raise ValueError(f"{value!r} is not above 0")
    return number


_READERS: dict[str, Callable[[Any], Any]] = {
    "classes": lambda names: _list_of(names, str),
    "palette": lambda colors: _list_of(colors, lambda color: _list_of(color, _byte, 3)),
    "mean": lambda mean: _list_of(mean, _number),
    "std": lambda std: _list_of(std, _positive),
    "dtype": _dtype,
    "view": lambda view: _list_of(view, int, 2),
    "image_range": lambda values: _list_of(values, int, 2),
    "long_side": _side,
}


@dataclass(kw_only=True, slots=True)
class Weights:
    """A model: what every reader gives and every writer takes."""

    state: dict[str, Tensor]
    "Parameters and buffers under our names, fp32."
    arch: Arch
    metadata: Metadata = field(default_factory=Metadata)
    source: str = "the model"
    "Where it was read."
    format: str = "ours"
    "A key of TITLES (key_maps.py)."
    provenance: dict[str, Any] = field(default_factory=dict)
    "How it was trained: shards, digest (of the shards), step, averaged (EMA), scores; an export keeps it."
    dropped: list[str] = field(default_factory=list)
    "Names in the file that have no place here and compute nothing, or were not asked for."
    notes: list[str] = field(default_factory=list)
    "Further lines for the user."
    runtime: str = ""
    "Of an exported file, which has no state: its `to` (inference/exports/runtime.py)."

    @property
    def title(self) -> str:
        """The format in words."""
        return TITLES[self.format]

    @property
    def parameters(self) -> int:
        """Number of parameters, buffers left out."""
        return sum(t.numel() for name, t in self.state.items() if not name.endswith(_BUFFERS))

    def config(self, norm_profile: str | None = None, ops: str | None = None) -> ModelConfig:
        """How to build the network; CheckpointError where nothing says which epsilons it has."""
        arch = self.arch
        profile = norm_profile or arch.norm_profile
        if profile is None:
            raise CheckpointError(
                f"{self.source} does not say its LayerNorm epsilons; give norm_profile= (model.norm_profile "
                "in the config.yaml of the run), or the whole directory of the run"
            )
        usual = ModelConfig(variant=arch.variant, head=arch.head).head_dim
        return ModelConfig(
            variant=arch.variant,
            in_channels=arch.in_channels,
            norm_profile=profile,
            head=arch.head,
            decoder_dim=None if arch.decoder_dim == usual else arch.decoder_dim,
            ops=ops or arch.ops,
            dropout=arch.dropout,
            drop_path_rate=arch.drop_path_rate,
        )

    def encoder(self) -> "Weights":
        """The encoder alone; the head is added to `dropped`."""
        head = [name for name in self.state if not name.startswith("backbone.")]
        return replace(
            self,
            state={name: tensor for name, tensor in self.state.items() if name not in head},
            arch=replace(self.arch, kind="encoder", num_classes=0, head="segformer", decoder_dim=None),
            metadata=Metadata(mean=self.metadata.mean, std=self.metadata.std, dtype=self.metadata.dtype),
            provenance={},
            dropped=[*self.dropped, *head],
        )


def check_tensors(state: Mapping[str, Tensor], source: object, *, wide: bool = True) -> None:
    """Raise CheckpointError naming the tensors that make weights unfit; float64 too unless `wide`."""
    defects: dict[str, list[str]] = {}
    for name, tensor in state.items():
        if defect := _defect(name, tensor, wide):
            defects.setdefault(defect, []).append(f"{name} {tuple(tensor.shape)}")
    for defect, names in defects.items():
        raise CheckpointError(f"{source}: {len(names)} tensors {defect.format(listed(names))}")


def _defect(name: str, tensor: Tensor, wide: bool) -> str:
    """What makes a tensor unfit, with a place for its name, and the remedy; "" of a sound one."""
    counter = name.endswith("num_batches_tracked")
    if tensor.layout != torch.strided or not (tensor.dtype in _FLOATS or counter):
        return "are not in plain floating point: {}; save the model unquantized and dense"
    if tensor.is_meta or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        return (
            "have no data, or less than their shapes say: {}; load or initialize a model on the meta device, "
            "and save tensors with .contiguous()"
        )
    if tensor.dtype == torch.float64 and not wide:
        return "are float64 and would be cut to float32: {}; if that is meant, call model.float() first"
    return "" if is_finite(tensor) else "hold NaN or infinity: {}; use weights from before they diverged"


def find_arch(state: Mapping[str, Tensor]) -> Arch:
    """Variant, kind, classes and decoder_dim of tensors under our names; loading checks all other shapes.

    Raises CheckpointError where widths and depths are those of none of VARIANTS, or a tensor is missing.
    """
    stages = (1, 2, 3, 4)
    embed_dims = tuple(_dim(state, f"backbone.patch_embed{stage}.proj.weight", 0) for stage in stages)
    blocks = [
        {name.split(".")[2] for name in state if name.startswith(f"backbone.block{s}.")} for s in stages
    ]
    depths = tuple(map(len, blocks))
    for name, variant in VARIANTS.items():
        if variant.backbone == "mit" and (variant.embed_dims, variant.depths) == (embed_dims, depths):
            return with_shapes(Arch(variant=name, kind="encoder"), state)
    raise CheckpointError(
        f"its embed_dims {embed_dims} and depths {depths} are those of no known SegFormer; known are "
        f"{', '.join(VARIANTS)}"
    )


def with_shapes(arch: Arch, state: Mapping[str, Tensor]) -> Arch:
    """The architecture with the channels that `state` takes, and the head that it has beside the encoder."""
    arch = replace(arch, in_channels=_dim(state, stem_of(arch.variant), 1))
    if any(name.startswith("decode_head.") for name in state):
        head = "mmseg" if any(name.startswith("decode_head.convs.") for name in state) else "segformer"
        classes, dim = (_dim(state, f"decode_head.{HEADS[head]}.weight", axis) for axis in (0, 1))
        return replace(arch, kind="segmentation", num_classes=classes, head=head, decoder_dim=dim)
    if any(name.startswith("head.") for name in state):
        return replace(arch, kind="classification", num_classes=_dim(state, "head.weight", 0))
    return arch


def _dim(state: Mapping[str, Tensor], name: str, axis: int) -> int:
    if name not in state:
        raise CheckpointError(f"{name} is missing; the file is incomplete")
    if state[name].ndim <= axis:
        raise CheckpointError(f"{name} has the shape {tuple(state[name].shape)}, which no SegFormer has")
    return state[name].shape[axis]
