"""Training losses on logits at a quarter of the label size, without ever holding the logits at the label
size.

    cross_entropy           pixel-wise cross entropy: class weights, label smoothing, ignore label 255
    ohem_cross_entropy      the same over the hard pixels only (online hard example mining)
    boundary_cross_entropy  the same, the pixels near the boundary of a class weighted up
    focal                   cross entropy times (1 - p_t)^gamma (Lin et al. 2017)
    dice                    1 - soft Dice, mean over the classes present (Milletari et al. 2016)
    lovasz                  Lovasz-softmax, mean over images and the classes present (Berman et al. 2018)

Every loss resizes the logits bilinearly to the target (align_corners=False), as the original does. The cross
entropies do it tile by tile (models/ops/cross_entropy.py; ops=reference: whole), the others hold one image at
a time and recompute it in the backward pass.

Averages: `all` divides by the number of all pixels, ignored ones included (NVlabs and mmsegmentation),
`valid` by the number of the others (transformers), at least 1. Class and boundary weights do not enter the
divisor.

`soft_cross_entropy` is the loss of classification, on targets that mixup and label smoothing made.

Shapes: B batch, K classes, h w logits, H W target.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segformer.data.sources.dataset import IGNORE_INDEX
from segformer.errors import ConfigError, at_least, within
from segformer.models.ops.backend import BACKENDS, Backend
from segformer.models.ops.resize import upsample_to

FUSED = BACKENDS["fused"]
MOST_WEIGHT = 10.0  # of a class that balanced_weights finds


def _effective(share: np.ndarray) -> np.ndarray:
    """1 / effective number of samples, (1 - beta) / (1 - beta^n), with 1 / (1 - beta) samples that differ: as
    many as the median class has pixels. Below it, weights are those of `inverse`; above, they level out."""
    return 1 / -np.expm1(-share / np.median(share))


# Name -> (share of the pixels of each class that occurs -> weights up to a factor).
WEIGHTINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "auto": lambda share: share**-0.5,
    "sqrt": lambda share: share**-0.5,
    "inverse": lambda share: 1 / share,
    "effective": _effective,
}


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """Which losses are added up."""

    terms: dict[str, float] = field(default_factory=dict)
    """Name of a loss -> its weight in the sum; see LOSSES for the names."""
    average: str = "all"
    """Divisor of pixel-wise losses: all pixels (all) or those with a label (valid)."""
    class_weights: list[float] = field(default_factory=list)
    """One weight per class for the cross entropies; empty for equal weights. auto, inverse, sqrt or effective
    is short for class_weighting."""
    class_weighting: str = ""
    """Weights from the pixels of each class in training, in place of class_weights: sqrt (1 / root of the
    share), inverse (1 / share), effective (Cui et al. 2019) or auto, which is sqrt; empty for none."""
    label_smoothing: float = 0.0
    """Share of the target probability spread over all classes in cross_entropy."""
    ohem_threshold: float = 0.7
    """ohem_cross_entropy keeps pixels whose class has a lower probability than this."""
    ohem_min_kept: float = 0.0625
    """Share of the labeled pixels that ohem_cross_entropy keeps at least (the hardest ones)."""
    focal_gamma: float = 2.0
    """Exponent of focal: how strongly easy pixels lose weight."""
    boundary_radius: int = 3
    """boundary_cross_entropy: pixels at most this far from one of another class, along rows and columns, are
    the boundary; pixels of the label map."""
    boundary_weight: float = 1.0
    """boundary_cross_entropy: such a pixel weighs 1 + this, any other 1."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.terms) - set(LOSSES)):
            raise ConfigError(f"loss.terms has unknown losses {', '.join(unknown)}; use {', '.join(LOSSES)}")
        if self.average not in ("all", "valid"):
            raise ConfigError(f"loss.average={self.average} is unknown; use all or valid")
        if self.class_weighting and self.class_weighting not in WEIGHTINGS:
            known = ", ".join(WEIGHTINGS)
            raise ConfigError(f"loss.class_weighting={self.class_weighting} is unknown; use one of {known}")
        if any(weight < 0 for weight in [*self.class_weights, *self.terms.values()]):
            raise ConfigError("loss.terms and loss.class_weights must not hold negative weights")
        within(self, "loss.", label_smoothing=(0, 1), ohem_threshold=(0, 1), ohem_min_kept=(0, 1))
        within(self, "loss.", boundary_radius=(1, 1024))
        at_least(self, "loss.", focal_gamma=0, boundary_weight=0)


def balanced_weights(class_pixels: Sequence[int], weighting: str) -> list[float]:
    """One weight per class, larger for the rarer, whose mean over the labeled pixels is 1.

    None is above MOST_WEIGHT, so that a class of a few pixels does not outshout the rest. A class without
    any pixel weighs 1: it has no loss to be weighted.

    Args:
        class_pixels: pixels of each class in the training split (K,).
        weighting: a name of WEIGHTINGS.
    """
    pixels = np.asarray(class_pixels, np.float64)
    weights, present = np.ones(len(pixels)), pixels > 0
    if present.any():
        share = pixels[present] / pixels.sum()
        rarity = WEIGHTINGS[weighting](share)
        capped = np.zeros(len(share), bool)
        while True:  # what the capped ones lack of their weight is given to the others
            factor = (1 - MOST_WEIGHT * share[capped].sum()) / (share * rarity)[~capped].sum()
            found = np.where(capped, MOST_WEIGHT, factor * rarity)
            if not (over := ~capped & (found > MOST_WEIGHT)).any():
                break
            capped |= over
        weights[present] = found
    return [round(float(weight), 4) for weight in weights]


def num_pixels(target: Tensor, average: str) -> Tensor | int:
    """The divisor of a pixel-wise loss: all pixels, or those with a label, at least 1."""
    if average == "all":
        return target.numel()
    return (target != IGNORE_INDEX).sum().clamp(min=1)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    average: str = "all",
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    ops: Backend = FUSED,
) -> Tensor:
    """Mean cross entropy of logits (B, K, h, w) against target (B, H, W)."""
    total, _ = ops.upsampled_cross_entropy(
        logits, target, IGNORE_INDEX, class_weights=class_weights, label_smoothing=label_smoothing
    )
    return total / num_pixels(target, average)


@torch.no_grad()
def near_boundary(target: Tensor, radius: int) -> Tensor:
    """Which pixels of target (B, H, W) have one of another class at most `radius` rows and columns away.

    Ignored pixels are not near a boundary, and what lies beside them is not near one because of them. Bool.
    """
    valid = target != IGNORE_INDEX
    label = target.to(torch.float32)  # whole numbers up to 255 are exact, and every device pools it
    highest = _window_max(label.masked_fill(~valid, -1.0), radius)
    lowest = -_window_max(-label, radius)  # 255 is above every class
    return valid & (highest != lowest)


def _window_max(values: Tensor, radius: int) -> Tensor:
    """Largest of the (2 radius + 1)^2 values around each of (B, H, W): by columns, then by rows."""
    side = 2 * radius + 1
    by_column = F.max_pool2d(values[:, None], (side, 1), stride=1, padding=(radius, 0))
    return F.max_pool2d(by_column, (1, side), stride=1, padding=(0, radius))[:, 0]


def boundary_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    boundary_radius: int,
    boundary_weight: float,
    average: str = "all",
    class_weights: Tensor | None = None,
    ops: Backend = FUSED,
) -> Tensor:
    """Cross entropy in which a pixel that is `near_boundary` counts 1 + boundary_weight times."""
    pixel_weights = 1 + boundary_weight * near_boundary(target, boundary_radius).to(torch.float32)
    total, _ = ops.upsampled_cross_entropy(
        logits, target, IGNORE_INDEX, pixel_weights=pixel_weights, class_weights=class_weights
    )
    return total / num_pixels(target, average)


def ohem_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ohem_threshold: float,
    ohem_min_kept: float,
    class_weights: Tensor | None = None,
    ops: Backend = FUSED,
) -> Tensor:
    """Mean cross entropy over the pixels with p_t < ohem_threshold, at least the hardest ohem_min_kept."""
    with torch.no_grad():
        _, losses = ops.upsampled_cross_entropy(logits, target, IGNORE_INDEX)
        valid = target != IGNORE_INDEX
        hardest = losses[valid].sort(descending=True).values
        bound = -math.log(max(ohem_threshold, 1e-30))
        if len(hardest):
            count = max(1, math.ceil(ohem_min_kept * len(hardest)))
            bound = min(bound, float(hardest[count - 1]))
        kept = (valid & (losses >= bound)).to(losses.dtype)
    total, _ = ops.upsampled_cross_entropy(
        logits, target, IGNORE_INDEX, pixel_weights=kept, class_weights=class_weights
    )
    return total / kept.sum().clamp(min=1)


def _per_image(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Tensor:
    """Stack function(probabilities (K, n), target (n,)) of the labeled pixels of each image.

    The probabilities of an image are recomputed in the backward pass, so one image is held at a time.
    """

    def one(image: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            image = image.to(torch.promote_types(image.dtype, torch.float32))
            enlarged = upsample_to(image[None], (labels.shape[0], labels.shape[1]))[0]
            valid = labels != IGNORE_INDEX
            return function(enlarged[:, valid].log_softmax(dim=0), labels[valid].long())

    return torch.stack(
        [
            checkpoint(one, image, labels, use_reentrant=False, preserve_rng_state=False)
            for image, labels in zip(logits, target, strict=True)
        ]
    )


def focal(logits: Tensor, target: Tensor, *, focal_gamma: float, average: str = "all") -> Tensor:
    """Mean over pixels of -(1 - p_t)^focal_gamma log p_t."""

    def total(log_probability: Tensor, label: Tensor) -> Tensor:
        hit = log_probability.gather(0, label[None])
        # Above 0, because the slope of x^gamma is infinite at 0 for gamma < 1.
        missed = (-hit.expm1()).clamp(min=torch.finfo(hit.dtype).tiny)
        return -(missed**focal_gamma * hit).sum()

    return _per_image(total, logits, target).sum() / num_pixels(target, average)


def dice(logits: Tensor, target: Tensor) -> Tensor:
    """1 - 2 sum p y / (sum p + sum y) over the batch, mean over the classes present; 0 if there is none."""

    def sums(log_probability: Tensor, label: Tensor) -> Tensor:
        probability = log_probability.exp()
        onehot = F.one_hot(label, len(probability)).t().to(probability.dtype)
        return torch.stack([(probability * onehot).sum(1), probability.sum(1), onehot.sum(1)])

    overlap, predicted, labeled = _per_image(sums, logits, target).sum(0)
    present = (labeled > 0).to(overlap.dtype)
    per_class = 1 - 2 * overlap / (predicted + labeled).clamp(min=1)
    return (per_class * present).sum() / present.sum().clamp(min=1)


def lovasz(logits: Tensor, target: Tensor) -> Tensor:
    """Lovasz-softmax, the convex extension of 1 - IoU: mean over images and the classes present in each."""

    def one(log_probability: Tensor, label: Tensor) -> Tensor:
        losses = [log_probability.sum() * 0]
        for index in label.unique().tolist():
            foreground = (label == index).to(log_probability.dtype)
            error, order = (foreground - log_probability[index].exp()).abs().sort(descending=True)
            hits = foreground[order]
            jaccard = 1 - (hits.sum() - hits.cumsum(0)) / (hits.sum() + (1 - hits).cumsum(0))
            losses.append(error @ jaccard.diff(prepend=jaccard.new_zeros(1)))
        return torch.stack(losses).sum() / max(1, len(losses) - 1)

    return _per_image(one, logits, target).mean()


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the batch of -sum_k t_k log softmax(z)_k: logits (B, K), targets (B, K) whose rows sum to 1.

    A float32 scalar (float64 for float64), whatever autocast says.
    """
    with torch.autocast(logits.device.type, enabled=False):
        log_probability = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=1)
        return -(targets * log_probability).sum(dim=1).mean()


# Name -> (function of logits and target, its further arguments: fields of LossConfig, and ops).
LOSSES: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "cross_entropy": (cross_entropy, ("average", "class_weights", "label_smoothing", "ops")),
    "ohem_cross_entropy": (ohem_cross_entropy, ("ohem_threshold", "ohem_min_kept", "class_weights", "ops")),
    "boundary_cross_entropy": (
        boundary_cross_entropy,
        ("boundary_radius", "boundary_weight", "average", "class_weights", "ops"),
    ),
    "focal": (focal, ("focal_gamma", "average")),
    "dice": (dice, ()),
    "lovasz": (lovasz, ()),
}


def check_terms(cfg: LossConfig) -> None:
    """ConfigError where no loss has a weight."""
    if not any(cfg.terms.values()):
        names = ", ".join(LOSSES)
        raise ConfigError(f"loss.terms={cfg.terms} has no loss; give one of {names}, as loss.terms.dice=1")


class SegmentationLoss(nn.Module):
    """The weighted sum of the configured losses."""

    class_weights: Tensor | None

    def __init__(self, cfg: LossConfig, num_classes: int, ops: Backend = FUSED) -> None:
        """`ops`: the backend of the cross entropies; the other losses have one."""
        super().__init__()
        check_terms(cfg)
        if cfg.class_weights and len(cfg.class_weights) != num_classes:
            raise ConfigError(
                f"loss.class_weights has {len(cfg.class_weights)} numbers for {num_classes} classes"
            )
        self.cfg, self.ops = cfg, ops
        weights = torch.tensor(cfg.class_weights) if cfg.class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, K, h, w), target (B, H, W) of class numbers or 255 -> (loss, unweighted terms without
        gradient).

        Float32 scalars. A batch without any label gives 0, with gradients of 0.
        """
        given = {"class_weights": self.class_weights, "ops": self.ops}
        parts: dict[str, Tensor] = {}
        for name in self.cfg.terms:
            function, arguments = LOSSES[name]
            options = {key: given[key] if key in given else getattr(self.cfg, key) for key in arguments}
            parts[name] = function(logits, target, **options)
        loss = torch.stack([self.cfg.terms[name] * part for name, part in parts.items()]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}
