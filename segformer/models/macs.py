"""Multiply-accumulates and elements moved by a network, product by product, in closed form.

Counted are the matrix products: Linear, convolutions, and both products of attention. Norms, activations,
residual sums, softmax and bilinear resizes are left out, as in the published numbers (8.4 G for B0 to 111.5
G for B5 at 512 x 512 with 150 classes), which are those of the reference head. A product moves what it must:
its inputs once, its output once, its weights once; what is not counted is taken to happen on the way.

`training_flops` is the figure behind the model FLOPs utilization of a run (meter.py): 3 x 2 x the
multiply-accumulates of the backend that trains. The folded head does the same with a third of the work, so
that counting the reference head would call work done that nobody did; nor is the second forward of activation
checkpointing counted. Those of an encoder stand beside it (Backbone.products).
"""

from dataclasses import replace

from segformer.models.backbone import Product
from segformer.models.encoders import BACKBONES
from segformer.models.ops.backend import BACKENDS
from segformer.models.variants import VARIANTS, ModelConfig, Variant


def head_products(
    variant: Variant, size: tuple[int, int], num_classes: int, *, folded: bool, kind: str = "segformer"
) -> list[Product]:
    """The products of the decode head `kind` for one image of `size` (height, width)."""
    width, found, two = variant.decoder_dim, [], kind == "mmseg"  # convolutions at each stage: no fold
    for stage, dim in enumerate(variant.embed_dims):
        stride = 4 << stage
        tokens = -(-size[0] // stride) * -(-size[1] // stride)
        found.append(Product.linear(f"head.c{stage + 1}", tokens, dim, width, bias=not (folded or two)))
        if folded and two:
            found.append(Product.linear(f"head.fuse{stage + 1}", tokens, width, width, bias=False))
    tokens = -(-size[0] // 4) * -(-size[1] // 4)
    if folded and not two:
        found.append(Product("head.fold", 0, 0, shared=width * width * sum(variant.embed_dims)))
    elif not folded:
        found.append(Product.linear("head.fuse", tokens, 4 * width, width, bias=False))
    found.append(Product.linear("head.predict", tokens, width, num_classes))
    return found


def macs_per_image(
    model: ModelConfig, size: tuple[int, int], num_classes: int, *, task: str = "segmentation"
) -> int:
    """Multiply-accumulates of one forward of one image of `size` (height, width).

    The network is the one that `model` describes: its variant, head and decoder_dim, folded
    (ops="fused") or not. task="classification" is the encoder with one Linear on the mean of its last map.
    """
    variant = VARIANTS[model.variant]
    macs = sum(
        product.macs for product in BACKBONES[variant.backbone].products(variant, size, model.channels)
    )
    if task == "classification":
        return macs + variant.embed_dims[-1] * num_classes
    if task != "segmentation":
        raise ValueError(f"task={task!r}; segmentation or classification")
    variant, folded = replace(variant, decoder_dim=model.head_dim), BACKENDS[model.ops].fused
    head = head_products(variant, size, num_classes, folded=folded, kind=model.head)
    return macs + sum(product.macs for product in head)


def training_flops(
    model: ModelConfig, size: tuple[int, int], num_classes: int, *, task: str = "segmentation"
) -> int:
    """Floating-point operations of training on one image of `size`: 3 x 2 x multiply-accumulates."""
    return 3 * 2 * macs_per_image(model, size, num_classes, task=task)
