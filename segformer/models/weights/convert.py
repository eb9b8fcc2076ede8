"""Weights of any format <-> ours: what a file holds, found from its names and shapes.

    read_weights(path) -> Weights
        files.py reads, names.py renames, sizes.py finds the variant, card.py knows what stands beside;
        save.py writes

Formats and the LayerNorm epsilons that they are run with, as norm_profile:

    hf        transformers: 1e-5 everywhere, whatever the config says                              hf
    nvlabs    NVlabs/SegFormer .pth, segmentation or ImageNet encoder                              original
    smp       segmentation_models_pytorch, Segformer with a mit_b* encoder                         original
    mmseg     mmsegmentation, MixVisionTransformer; its decode head is another network             mmseg
    ours      an export: hf names, and a section "segformer" in config.json             as the section says
    run       a checkpoint of a training run: our names                       unknown here; config.yaml has it

Refuses, with CheckpointError, everything that files.py and names.py refuse, sizes that are none of VARIANTS,
the decode head of mmsegmentation (unless the encoder alone is asked for), and an export whose weights have
another sha256 sum than its config.json says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segformer.errors import CheckpointError, ConfigError
from segformer.models.variants import NORM_PROFILES, VARIANTS, ModelConfig
from segformer.models.weights.card import Card, card_of_hf, card_of_meta, card_of_section, check_hf_config
from segformer.models.weights.class_map import map_classes, resolve_class_map
from segformer.models.weights.files import Contents, read_contents, reason_of, sha256_of
from segformer.models.weights.names import TITLES, detect, foreign_head, listed, to_ours
from segformer.models.weights.sizes import Sizes, find_sizes

PROFILES = {"hf": "hf", "hf5": "hf", "nvlabs": "original", "smp": "original", "mmseg": "mmseg"}
_COUNTER = "decode_head.linear_fuse.bn.num_batches_tracked"
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(kw_only=True, slots=True)
class Weights:
    """A model as a file holds it."""

    source: str
    "Where it was read."
    state: dict[str, Tensor]
    "Parameters and buffers under our names, fp32, on the CPU."
    sizes: Sizes
    format: str
    "ours, run, hf, hf5, nvlabs, smp or mmseg."
    norm_profile: str | None
    "LayerNorm epsilons that it is run with; None where the file does not say."
    card: Card = field(default_factory=Card)
    dropout: float | None = None
    "Share of channels dropped in the decode head, in training; None where the file does not say."
    drop_path_rate: float | None = None
    "Stochastic depth of the last block, in training; None where the file does not say."
    section: dict[str, Any] | None = None
    'The section "segformer" of an export.'
    dropped: list[str] = field(default_factory=list)
    "Names in the file that have no place here and compute nothing, or were not asked for."
    notes: list[str] = field(default_factory=list)
    "What else a user should know."

    @property
    def title(self) -> str:
        """The format in words."""
        return {"ours": "export of this project", "run": "checkpoint of a run", **TITLES}[self.format]

    @property
    def parameters(self) -> int:
        """Number of parameters, buffers left out."""
        return sum(t.numel() for name, t in self.state.items() if not name.endswith(_BUFFERS))

    def config(self, norm_profile: str | None = None, ops: str = "fused") -> ModelConfig:
        """How to build the network; CheckpointError where nothing says which epsilons it has."""
        profile = norm_profile or self.norm_profile
        if profile is None:
            raise CheckpointError(
                f"{self.source} does not say its LayerNorm epsilons; give norm_profile (model.norm_profile "
                "in the config.yaml of the run), or export the run and give the export"
            )
        usual = VARIANTS[self.sizes.variant].decoder_dim
        decoder_dim = self.sizes.decoder_dim if self.sizes.decoder_dim != usual else None
        config = ModelConfig(
            variant=self.sizes.variant, norm_profile=profile, decoder_dim=decoder_dim, ops=ops
        )
        rates = {"dropout": self.dropout, "drop_path_rate": self.drop_path_rate}
        return replace(config, **{key: rate for key, rate in rates.items() if rate is not None})  # type: ignore[arg-type]

    def encoder(self) -> "Weights":
        """The encoder alone; the head is added to `dropped`."""
        head = [name for name in self.state if not name.startswith("backbone.")]
        state = {name: tensor for name, tensor in self.state.items() if name not in head}
        sizes = Sizes(variant=self.sizes.variant, kind="encoder", num_classes=None, decoder_dim=None)
        card = replace(self.card, classes=None, palette=None)
        dropped = [*self.dropped, *head]
        return replace(self, state=state, sizes=sizes, card=card, section=None, dropped=dropped)

    def mapped(
        self,
        class_map: Mapping[Any, Any],
        *,
        target_classes: Sequence[str] | None = None,
        generator: torch.Generator | None = None,
    ) -> "Weights":
        """The model with its class layer resized by `class_map` (class_map.py), or ConfigError."""
        if self.sizes.kind != "segmentation" or self.sizes.num_classes is None:
            raise ConfigError(f"class_map: {self.source} has no segmentation head ({self.sizes.kind})")
        sources, names = resolve_class_map(
            class_map,
            num_classes=self.sizes.num_classes,
            source_classes=self.card.classes,
            target_classes=target_classes,
        )
        return replace(
            self,
            state=map_classes(self.state, sources, generator),
            sizes=replace(self.sizes, num_classes=len(sources)),
            card=replace(self.card, classes=names, palette=None),
            section=None,
        )


def read_weights(path: str | Path, *, encoder_only: bool = False) -> Weights:
    """Read any file or directory of weights: format, sizes and epsilons are found, not asked for.

    The tensors are complete and of the right shapes as far as the sizes can be read from them; loading them
    into a network checks the rest. Raises CheckpointError for every reason in the module docstrings.
    """
    contents = read_contents(path)
    try:
        naming = detect(contents.state)
        if (head := foreign_head(contents.state, naming)) and not encoder_only:
            raise CheckpointError(
                f"its decode head ({len(head)} tensors: {listed(head)}) is that of mmsegmentation, another "
                "network (Conv, BatchNorm and ReLU per level), and can't be converted; take its encoder "
                "alone, with launch/convert.py encoder_only=true"
            )
        state, dropped = to_ours(contents.state, naming)
        counted = _add_counter(state)
        sizes = find_sizes(state)
        weights = Weights(
            source=str(path),
            state={name: _fp32(tensor) for name, tensor in state.items()},
            sizes=sizes,
            format="run" if contents.is_run else naming.format,
            norm_profile=None if contents.is_run else PROFILES[naming.format],
            dropped=dropped,
        )
        _read_card(weights, contents)
    except CheckpointError as error:
        raise CheckpointError(f"{contents.file}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{contents.file} can't be read: {reason_of(error)}; copy it again") from None
    if naming.wrapper:
        weights.notes.append(f"the prefix {naming.wrapper!r} was taken off the names")
    if not counted:
        weights.notes.append(f"{_COUNTER} is not in the file; it only counts, and was set to 0")
    kinds = {str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point()}
    if kinds != {"float32"}:
        weights.notes.append(f"tensors of {', '.join(sorted(kinds))} were converted to float32")
    return weights.encoder() if encoder_only else weights


def _add_counter(state: dict[str, Tensor]) -> bool:
    """Add the counter of the head's BatchNorm where only that is missing, as torch does; False if it was."""
    if _COUNTER in state or _COUNTER.replace("num_batches_tracked", "running_mean") not in state:
        return True
    state[_COUNTER] = torch.zeros((), dtype=torch.int64)
    return False


def _read_card(weights: Weights, contents: Contents) -> None:
    """Fill in card, section and norm_profile from what stands beside the tensors."""
    config, meta, sizes = contents.config, contents.meta, weights.sizes
    if config is not None and weights.format in ("hf", "hf5"):
        check_hf_config(config, sizes.variant)
        weights.card = card_of_hf(config, contents.preprocessor, sizes.num_classes)
    elif config is None:
        weights.card = card_of_meta(meta, sizes.num_classes)
    if config is not None:
        weights.dropout = _rate(config.get("classifier_dropout_prob"))
        weights.drop_path_rate = _rate(config.get("drop_path_rate"))
    profile = meta.get("norm_profile")  # in the header of our safetensors
    if profile in NORM_PROFILES:
        weights.norm_profile = profile
    section = config.get("segformer") if config is not None else meta.get("segformer")
    if section is None:
        return
    if config is not None and "transformers_version" in config:
        weights.notes.append("transformers has saved it since; what its export said is left out")
        weights.norm_profile = "hf"
        return
    if config is not None:
        weights.format = "ours"
        if not isinstance(section, dict) or section.get("weights_sha256") != sha256_of(contents.file):
            raise CheckpointError("is damaged or of another export (sha256); export it again")
    try:
        weights.card = card_of_section(section, sizes.num_classes)
        if (section["variant"], section["norm_profile"] in NORM_PROFILES) != (sizes.variant, True):
            raise ValueError(f"variant {section['variant']}, norm_profile {section['norm_profile']}")
        weights.norm_profile, weights.section = section["norm_profile"], section
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f'the section "segformer" beside it is damaged ({error})') from None


def _rate(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 <= value < 1 else None


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
