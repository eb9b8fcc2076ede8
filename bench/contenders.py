"""The contenders of peers.py: the same weights and the same inputs behind the same two functions.

    fused                 ours, model.ops=fused, with the loss that never holds the enlarged logits
    reference             ours, model.ops=reference, and the loss of original.py
    original              original.py
    transformers          SegformerForSemanticSegmentation of the installed transformers, with its own loss
    smp                   segmentation_models_pytorch's Segformer without its last enlargement, if importable
    <name>+compile        the function of <name> through torch.compile

LayerNorm epsilons are 1e-5 everywhere, the only ones that transformers knows. Stochastic depth and drop-out
are off: their draws differ, and what is timed is what was compared.

Shapes: B batch, H W image, K classes, h w = H / 4, W / 4 rounded up.
"""

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.original import IGNORED, Original, plain_loss
from segformer.errors import ConfigError
from segformer.models.segformer import build_model
from segformer.models.variants import NORM_PROFILES, VARIANTS, ModelConfig
from segformer.models.weights.key_maps import from_ours
from segformer.training.losses import cross_entropy

EAGER = ("fused", "reference", "transformers", "original", "smp")
COMPILED = ("fused+compile", "transformers+compile")
NAMES = (*EAGER, *(f"{name}+compile" for name in EAGER))
MODES = ("inference", "training")
PROFILE = "hf"
STATE = "weights.safetensors"
SEED = 7


class UnavailableError(Exception):
    """A contender cannot run here; the message says why."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured: mode, variant, (height, width) of the images, their number (None: most that fit)."""

    mode: str
    variant: str
    size: tuple[int, int]
    batch: int | None

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """Read training/b2/512x512/1 or training/b5/512x512/max; ConfigError says what is wrong."""
        found = re.fullmatch(r"(\w+)/(\w+)/(\d+)x(\d+)/(\d+|max)", text)
        if not found:
            raise ConfigError(f"peers.cells has {text!r}; write mode/variant/HxW/batch: training/b2/64x64/1")
        mode, variant, height, width, batch = found.groups()
        if mode not in MODES or variant not in VARIANTS:
            known = f"modes {', '.join(MODES)}, variants {', '.join(VARIANTS)}"
            raise ConfigError(f"peers.cells has {text!r}, which is unknown; use {known}")
        if min(int(height), int(width)) < 32 or batch == "0":
            raise ConfigError(f"peers.cells has {text!r}; use sides of 32 pixels or more and batches above 0")
        return cls(mode, variant, (int(height), int(width)), None if batch == "max" else int(batch))

    def __str__(self) -> str:
        return f"{self.mode}/{self.variant}/{self.size[0]}x{self.size[1]}/{self.batch or 'max'}"


@dataclass(frozen=True, slots=True)
class Functions:
    """Images (B, 3, H, W) -> logits (B, K, h, w); images, target (B, H, W) -> mean loss of valid pixels."""

    logits: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Contender:
    """A model and its functions; `run` is what is measured, `eager` the same without torch.compile."""

    name: str
    model: nn.Module
    run: Functions
    eager: Functions

    @property
    def compiled(self) -> bool:
        """Whether `run` goes through torch.compile."""
        return self.name.endswith("+compile")

    @property
    def weights_mib(self) -> float:
        """Parameters and buffers, MiB."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def write_weights(variant: str, num_classes: int, folder: Path) -> None:
    """Write random weights of order one, with biases and statistics, under our names and for transformers."""
    with torch.device("meta"):
        model = Original(VARIANTS[variant], num_classes)
    generator = torch.Generator().manual_seed(SEED)
    state = {}
    for name, meta in model.state_dict().items():
        tensor = torch.zeros(meta.shape, dtype=meta.dtype)
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
        elif tensor.is_floating_point():  # only norms have vectors called weight
            tensor.normal_(float(name.endswith("weight")), 0.2, generator=generator)
        state[name] = tensor
    (folder / "hf").mkdir(parents=True)
    save_file(state, folder / STATE)
    save_file(from_ours(state, "hf"), folder / "hf/model.safetensors", metadata={"format": "pt"})


def build(name: str, variant: str, num_classes: int, folder: Path, *, mode: str = "default") -> Contender:
    """A contender with the weights of `folder`, on the CPU; UnavailableError where it can't run here.

    `mode` is that of torch.compile.
    """
    plain, _, compiled = name.partition("+")
    builders = {"original": _original, "transformers": _transformers, "smp": _smp}
    model, eager = builders.get(plain, _ours)(plain, variant, num_classes, folder)
    run = eager
    if compiled:
        run = Functions(torch.compile(eager.logits, mode=mode), torch.compile(eager.loss, mode=mode))
    return Contender(name, model, run, eager)


def _ours(ops: str, variant: str, num_classes: int, folder: Path) -> tuple[nn.Module, Functions]:
    cfg = ModelConfig(variant=variant, ops=ops, norm_profile=PROFILE, drop_path_rate=0, dropout=0)
    with torch.device("meta"):
        model = build_model(cfg, num_classes)
    model = model.to_empty(device="cpu")
    model.load_state_dict(load_file(folder / STATE))
    if ops == "reference":
        return model, _with_plain_loss(model)
    return model, Functions(
        lambda images: model(images),
        lambda images, target: cross_entropy(model(images), target, average="valid"),
    )


def _original(_: str, variant: str, num_classes: int, folder: Path) -> tuple[nn.Module, Functions]:
    model = Original(VARIANTS[variant], num_classes, eps=NORM_PROFILES[PROFILE])
    model.load_state_dict(load_file(folder / STATE))
    return model, _with_plain_loss(model)


def _with_plain_loss(model: nn.Module) -> Functions:
    return Functions(lambda images: model(images), lambda images, target: plain_loss(model(images), target))


def _transformers(_: str, variant: str, num_classes: int, folder: Path) -> tuple[nn.Module, Functions]:
    try:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation
        from transformers.utils import logging
    except ImportError as error:
        raise UnavailableError(f"transformers cannot be imported: {error}") from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sizes = VARIANTS[variant]
    SegformerConfig(
        depths=list(sizes.depths),
        hidden_sizes=list(sizes.embed_dims),
        num_attention_heads=list(sizes.num_heads),
        sr_ratios=list(sizes.sr_ratios),
        mlp_ratios=list(sizes.mlp_ratios),
        decoder_hidden_size=sizes.decoder_dim,
        num_labels=num_classes,
        drop_path_rate=0.0,
        classifier_dropout_prob=0.0,
        semantic_loss_ignore_index=IGNORED,
    ).save_pretrained(folder / "hf")
    model, info = SegformerForSemanticSegmentation.from_pretrained(
        folder / "hf", dtype=torch.float32, output_loading_info=True
    )
    if unfit := {kind: names for kind, names in info.items() if names}:
        raise RuntimeError(f"transformers did not take all weights: {unfit}")
    return model, Functions(
        lambda images: model(pixel_values=images).logits,
        lambda images, target: model(pixel_values=images, labels=target).loss,
    )


def _smp(_: str, variant: str, num_classes: int, folder: Path) -> tuple[nn.Module, Functions]:
    try:
        smp = importlib.import_module("segmentation_models_pytorch")
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that doesn't fit torch
        raise UnavailableError(f"segmentation_models_pytorch cannot be imported: {error}") from error
    if variant not in ("b0", "b1", "b2", "b3", "b4", "b5"):
        raise UnavailableError(f"segmentation_models_pytorch has no {variant}")
    model = smp.Segformer(
        f"mit_{variant}",
        encoder_weights=None,
        decoder_segmentation_channels=VARIANTS[variant].decoder_dim,
        classes=num_classes,
        upsampling=1,
    )
    model.load_state_dict(from_ours(load_file(folder / STATE), "smp"))
    model.encoder.reset_drop_path(0.0)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = NORM_PROFILES[PROFILE][0]
    return model, _with_plain_loss(model)


def batch_of(cell: Cell, batch: int, num_classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random images (B, 3, H, W) and labels (B, H, W), a band of which is ignored."""
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randn(batch, 3, *cell.size, generator=generator)
    target = torch.randint(num_classes, (batch, *cell.size), generator=generator)
    target[:, : max(1, cell.size[0] // 16)] = IGNORED
    return images.to(device), target.to(device)


def step_of(
    model: nn.Module, functions: Functions, mode: str, data: tuple[Tensor, Tensor], precision: str
) -> Callable[[], Tensor]:
    """One step: logits without gradients, or the gradients of all parameters and the loss."""
    images, target = data
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")

    def inference() -> Tensor:
        with torch.inference_mode(), autocast:
            return functions.logits(images)

    def training() -> Tensor:
        model.zero_grad(set_to_none=True)
        with autocast:
            loss = functions.loss(images, target)
        loss.backward()
        return loss.detach()

    model.train(mode == "training")
    return training if mode == "training" else inference


def gradient_norm(model: nn.Module) -> float:
    """The norm of all gradients."""
    return float(nn.utils.get_total_norm([p.grad.double() for p in model.parameters() if p.grad is not None]))
