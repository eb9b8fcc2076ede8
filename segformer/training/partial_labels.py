"""Losses of images whose labels name a part of the classes, or several of them at once.

A pixel of label l of set s, whose map (data/loading/mixture.py) says that it may be one of the classes g(l):

    loss = -log sum_{c in g(l)} p_c        p: softmax over the annotated classes of s, those of all its labels

A class that a set does not annotate is neither right nor wrong there: the logits of such classes become OUT,
a constant, which bilinear enlargement keeps and whose softmax is exactly 0. A label of several classes
becomes one class, the first of them, with the log of the sum of their exponentials. What enters the losses of
losses.py then is one class a label, so that each of them has its meaning among the labels of the set. Where
every label is one class and all classes are annotated, logits are as they came.

The sum of exponentials is that of enlarged logits, so where a map has such a label all logits of a batch are
held at the size of the crop (fp32), about as ops=reference does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segformer.data.loading.mixture import LabelMap
from segformer.errors import ConfigError
from segformer.models.ops.resize import upsample_to
from segformer.training.losses import LossConfig

OUT = -1e4  # exp(OUT - z) is 0 in float64, too, for any logit above -9000; every float type holds it


class PartialLabels(nn.Module):
    """Logits of the common classes -> those in which each image knows the labels of its set alone."""

    known: Tensor

    def __init__(self, maps: Sequence[LabelMap], num_classes: int) -> None:
        super().__init__()
        known = torch.zeros(len(maps), num_classes, dtype=torch.bool)
        for index, one in enumerate(maps):
            known[index, [group[0] for group in one.groups if group]] = True
        self.register_buffer("known", known, persistent=False)
        self._joint = [(index, g) for index, one in enumerate(maps) for g in one.groups if len(g) > 1]
        self._whole = bool(known.all())

    def forward(self, logits: Tensor, sets: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits (B, K, h, w) of images of `sets` (B,) -> the same, or of `size`; floats of 32 bits then."""
        if self._whole:
            return logits
        if self._joint:
            with torch.autocast(logits.device.type, enabled=False):
                enlarged = upsample_to(logits.to(torch.promote_types(logits.dtype, torch.float32)), size)
                logits = self._joined(enlarged, sets)
        return logits.masked_fill(~self.known[sets][:, :, None, None], OUT)

    def _joined(self, logits: Tensor, sets: Tensor) -> Tensor:
        """The first class of each label of several has the logit of them all, in the images of its set."""
        classes = logits.unbind(1)
        joined = list(classes)
        for index, group in self._joint:
            total = torch.stack([classes[k] for k in group]).logsumexp(0)
            joined[group[0]] = torch.where((sets == index)[:, None, None], total, joined[group[0]])
        return torch.stack(joined, 1)


def check_partial(cfg: LossConfig, maps: Sequence[LabelMap], num_classes: int) -> None:
    """ConfigError for a setting of the losses that has no meaning for these maps."""
    joint = any(len(group) > 1 for one in maps for group in one.groups)
    if cfg.class_weights and joint:
        raise ConfigError(
            "loss.class_weights are of single classes, and a class of mixture.sets may be several; give "
            "loss.class_weights=[]"
        )
    if cfg.label_smoothing and (joint or any(len(one.annotated) < num_classes for one in maps)):
        raise ConfigError(
            "loss.label_smoothing gives a share to every class, and a set of the mixture does not annotate "
            "each of them; give loss.label_smoothing=0"
        )
