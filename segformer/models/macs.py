"""Multiply-accumulates and elements moved by SegFormer, layer by layer, in closed form.

Counted are the matrix products: Linear, convolutions, and both products of attention. Norms, activations,
residual sums, softmax and bilinear resizes are left out, as in the published numbers (8.4 G for B0 to 111.5
G for B5 at 512 x 512 with 150 classes), which are those of the head as written. A layer moves what it must:
its inputs once, its output once, its weights once; what is not counted is taken to happen on the way.

A training step is three times the forward, because each product has a gradient to either factor, of the
same size and over the same three tensors; less the gradient of the images, which nobody needs. The folded
head also multiplies its weights in training, once a step (models/head.py).

`training_flops` is the figure behind the model FLOPs utilisation of a run (meter.py): 3 x 2 x the
multiply-accumulates of the form of the network that is trained. The folded head does the same with a third
of the work, so that counting the head as written would call work done that nobody did; nor is the second
forward of activation checkpointing counted.

Shapes: C channels, N tokens of a stage, M reduced tokens, D decoder_dim, K classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from segformer.models.variants import VARIANTS, ModelConfig, Variant


@dataclass(frozen=True, slots=True)
class Layer:
    """One matrix product: of an image (macs, elements in and out), and what all images share."""

    name: str
    macs: int
    moved: int
    weights: int = 0
    shared: int = 0  # macs of a step, whatever its batch
    leads: bool = False  # its input is the image: no gradient


def _linear(name: str, tokens: int, dim: int, out: int, *, bias: bool = True) -> Layer:
    return Layer(name, tokens * dim * out, tokens * (dim + out), dim * out + bias * out)


def _conv(
    name: str, tokens: int, dim: int, out_tokens: int, out: int, kernel: int, leads: bool = False
) -> Layer:
    """A convolution of a map of `tokens` x `dim` to `out_tokens` x `out`."""
    weights = kernel * kernel * dim * out
    return Layer(name, out_tokens * weights, tokens * dim + out_tokens * out, weights + out, leads=leads)


def _block(place: str, size: tuple[int, int], dim: int, ratio: int, mlp: int) -> Iterator[Layer]:
    tokens, reduced = size[0] * size[1], (size[0] // ratio) * (size[1] // ratio)
    if ratio > 1:
        yield _conv(f"{place}.sr", tokens, dim, reduced, dim, ratio)
    yield _linear(f"{place}.q", tokens, dim, dim)
    yield _linear(f"{place}.kv", reduced, dim, 2 * dim)
    yield Layer(f"{place}.attention", 2 * tokens * reduced * dim, 2 * (tokens + reduced) * dim)
    yield _linear(f"{place}.proj", tokens, dim, dim)
    yield _linear(f"{place}.fc1", tokens, dim, mlp * dim)
    yield Layer(f"{place}.dwconv", 9 * tokens * mlp * dim, 2 * tokens * mlp * dim, 10 * mlp * dim)
    yield _linear(f"{place}.fc2", tokens, mlp * dim, dim)


def encoder_layers(variant: Variant, size: tuple[int, int]) -> tuple[list[Layer], list[tuple[int, int]]]:
    """The encoder's layers for one image of `size` (height, width), and (tokens, channels) of its 4 maps."""
    found, maps = [], []
    in_size, in_dim = size, 3
    for stage, dim in enumerate(variant.embed_dims):
        kernel, stride = (7, 4) if stage == 0 else (3, 2)
        out = (-(-in_size[0] // stride), -(-in_size[1] // stride))
        pixels, tokens = in_size[0] * in_size[1], out[0] * out[1]
        found.append(_conv(f"embed{stage + 1}", pixels, in_dim, tokens, dim, kernel, leads=stage == 0))
        for block in range(variant.depths[stage]):
            sizes = (dim, variant.sr_ratios[stage], variant.mlp_ratios[stage])
            found += _block(f"block{stage + 1}.{block}", out, *sizes)
        maps.append((tokens, dim))
        in_size, in_dim = out, dim
    return found, maps


def layers(variant: Variant, size: tuple[int, int], num_classes: int, *, folded: bool) -> list[Layer]:
    """The layers of one image of `size` (height, width), with the head folded or as written."""
    found, maps = encoder_layers(variant, size)
    width, tokens = variant.decoder_dim, maps[0][0]
    found += [_linear(f"head.c{stage + 1}", *maps[stage], width, bias=not folded) for stage in range(4)]
    if folded:
        found.append(Layer("head.fold", 0, 0, shared=width * width * sum(variant.embed_dims)))
    else:
        found.append(_linear("head.fuse", tokens, 4 * width, width, bias=False))
    found.append(_linear("head.predict", tokens, width, num_classes))
    return found


@dataclass(frozen=True, slots=True)
class Work:
    """What one step has to do: multiply-accumulates, and elements between memory and the chip."""

    macs: int
    elements: int


def work(
    name: str, size: tuple[int, int], num_classes: int, *, batch: int = 1, folded: bool, training: bool
) -> Work:
    """The work of one step of VARIANTS[name] on `batch` images.

    Weights are constant in inference, so that folding them costs nothing a step there.
    """
    macs = elements = 0
    for layer in layers(VARIANTS[name], size, num_classes, folded=folded):
        times = (2 if layer.leads else 3) if training else 1
        macs += times * (batch * layer.macs + (layer.shared if training else 0))
        elements += times * (batch * layer.moved + layer.weights)
    return Work(macs, elements)


def macs_per_image(
    model: ModelConfig, size: tuple[int, int], num_classes: int, *, task: str = "segmentation"
) -> int:
    """Multiply-accumulates of one forward of one image of `size` (height, width).

    The network is the one that `model` describes: its variant, decoder_dim, and its head folded
    (ops="fused") or as written. task="classification" is the encoder with one Linear on the mean of its last
    map.
    """
    variant = VARIANTS[model.variant]
    if task == "classification":
        found, maps = encoder_layers(variant, size)
        return sum(layer.macs for layer in found) + maps[-1][1] * num_classes
    if task != "segmentation":
        raise ValueError(f"task={task!r}; segmentation or classification")
    variant = replace(variant, decoder_dim=model.decoder_dim or variant.decoder_dim)
    return sum(layer.macs for layer in layers(variant, size, num_classes, folded=model.ops == "fused"))


def training_flops(
    model: ModelConfig, size: tuple[int, int], num_classes: int, *, task: str = "segmentation"
) -> int:
    """Floating-point operations of training on one image of `size`: 3 x 2 x multiply-accumulates."""
    return 3 * 2 * macs_per_image(model, size, num_classes, task=task)
