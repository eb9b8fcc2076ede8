"""A network in ONNX operators, stated here one by one: batch, height and width stay open.

    images float32 (B, C, H, W), normalized           -> logits (B, K, ceil(H/4), ceil(W/4)), scores (B, K)
    preprocess: uint8 (B, H, W, C), as it was decoded -> the same, normalized in the graph
    argmax: of a segmentation                         -> classes uint8 (B, H, W), at the size of the image

The head is folded (models/ops/decode.py): every stage is projected at its own resolution and enlarged, and
what transformers' graph computes on the concatenation of all of them is a sum here. The scale of attention
and the BatchNorm are in the weights. The Mix-FFN works on maps: its three layers are convolutions with a bias
each, so that narrow tokens change their layout and wide ones never do.

torch.onnx.export would trace the same; it takes minutes for B0, and specializes what is not said right.

Shapes: B batch, C channels, K classes, H W image or map, N = H * W tokens.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from segformer.errors import ConfigError
from segformer.models.head import AllMLPHead, MMSegHead
from segformer.models.layers import affine
from segformer.models.mit import Block, MixTransformer
from segformer.models.ops.decode import fold_projections
from segformer.models.segformer import MiTClassifier, SegFormer

OPSET = 20  # the first with Gelu; LayerNormalization is of 17
IR_VERSION = 10  # what runtimes of that age read
MOST_BYTES = 2**31 - 2**20  # of a protobuf; weights beside the file are not written
OPERATORS = {
    *("Add", "ArgMax", "Cast", "Concat", "Conv", "DequantizeLinear", "Div", "Gelu", "Gemm", "MatMul"),
    *("LayerNormalization", "QuantizeLinear", "ReduceMean", "Relu", "Reshape", "Resize", "Shape", "Softmax"),
    *("Sub", "Transpose"),
}
"Those of the graphs written here, and of their quantized form."

Name = str  # of a value in the graph


class Graph:
    """Nodes and constants as they come; a node is named after its operator and its number."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[Name, np.ndarray] = {}

    def constant(self, value: Tensor | list[int]) -> Name:
        """The name of a tensor or of whole numbers."""
        array = np.asarray(value, np.int64) if isinstance(value, list) else value.detach().cpu().numpy()
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.ascontiguousarray(array)
        return name

    def __call__(self, operator: str, *inputs: Name | Tensor | list[int], **attributes: Any) -> Name:
        """Add a node; the name of its result."""
        from onnx import helper

        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        out = f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, names, [out], name=out, **attributes))
        return out

    def linear(self, values: Name, weight: Tensor, bias: Tensor) -> Name:
        """values (..., C), weight (D, C), bias (D,) -> (..., D)."""
        return self("Add", self("MatMul", values, weight.t()), bias)

    def norm(self, tokens: Name, layer: nn.LayerNorm) -> Name:
        """LayerNorm of tokens."""
        return self("LayerNormalization", tokens, layer.weight, layer.bias, axis=-1, epsilon=layer.eps)

    def tokens(self, maps: Name) -> Name:
        """Maps (B, C, H, W) -> tokens (B, N, C)."""
        return self("Transpose", self("Reshape", maps, [0, 0, -1]), perm=[0, 2, 1])

    def maps(self, tokens: Name, shape: Name) -> Name:
        """Tokens (B, N, C) -> maps (B, C, H, W); shape: (0, 0, H, W)."""
        return self("Reshape", self("Transpose", tokens, perm=[0, 2, 1]), shape)

    def resize(self, maps: Name, size: Name) -> Name:
        """Maps (B, C, h, w) bilinearly to `size` (2,), align_corners=False."""
        whole = self("Concat", self("Shape", maps, start=0, end=2), size, axis=0)
        return self("Resize", maps, "", "", whole, mode="linear", coordinate_transformation_mode="half_pixel")


def _attention(graph: Graph, tokens: Name, block: Block, shape: Name) -> Name:
    """The branch of a block that attends, of tokens of maps of `shape`."""
    attn, values = block.attn, graph.norm(tokens, block.norm1)
    weight, bias = affine(attn.q)
    channels, heads = len(weight), attn.num_heads
    scale = (channels // heads) ** -0.5
    query = graph.linear(values, weight * scale, bias * scale)
    if attn.sr_ratio > 1:
        reduced = graph("Conv", graph.maps(values, shape), *affine(attn.sr), strides=[attn.sr_ratio] * 2)
        values = graph.norm(graph.tokens(reduced), attn.norm)
    (key_weight, value_weight), (key_bias, value_bias) = (part.chunk(2) for part in affine(attn.kv))
    key, value = graph.linear(values, key_weight, key_bias), graph.linear(values, value_weight, value_bias)
    split = [0, 0, heads, channels // heads]
    query, key, value = (
        graph("Transpose", graph("Reshape", part, split), perm=perm)
        for part, perm in ((query, [0, 2, 1, 3]), (key, [0, 2, 3, 1]), (value, [0, 2, 1, 3]))
    )
    mixed = graph("MatMul", graph("Softmax", graph("MatMul", query, key), axis=-1), value)
    mixed = graph("Reshape", graph("Transpose", mixed, perm=[0, 2, 1, 3]), [0, 0, channels])
    return graph.linear(mixed, *affine(attn.proj))


def _ffn(graph: Graph, tokens: Name, block: Block, shape: Name) -> Name:
    """The Mix-FFN branch of a block."""
    fc1, dwconv, fc2 = (affine(layer) for layer in (block.mlp.fc1, block.mlp.dwconv.dwconv, block.mlp.fc2))
    maps = graph.maps(graph.norm(tokens, block.norm2), shape)
    hidden = graph("Conv", maps, fc1[0][:, :, None, None], fc1[1])
    hidden = graph("Gelu", graph("Conv", hidden, *dwconv, group=len(dwconv[0]), pads=[1, 1, 1, 1]))
    return graph.tokens(graph("Conv", hidden, fc2[0][:, :, None, None], fc2[1]))


def _encoder(graph: Graph, images: Name, backbone: MixTransformer) -> tuple[list[Name], list[Name]]:
    """The maps (B, C_i, H_i, W_i) of the four stages, and their sizes (2,)."""
    found, sizes, maps = [], [], images
    for embed, blocks, norm in backbone.stages():
        proj: Any = embed.proj
        maps = graph("Conv", maps, *affine(proj), strides=[*proj.stride], pads=[*proj.padding, *proj.padding])
        sizes.append(graph("Shape", maps, start=2, end=4))
        shape = graph("Concat", [0, 0], sizes[-1], axis=0)
        tokens = graph.norm(graph.tokens(maps), embed.norm)  # type: ignore[arg-type]
        for block in blocks:
            assert isinstance(block, Block)
            tokens = graph("Add", tokens, _attention(graph, tokens, block, shape))
            tokens = graph("Add", tokens, _ffn(graph, tokens, block, shape))
        maps = graph.maps(graph.norm(tokens, norm), shape)  # type: ignore[arg-type]
        found.append(maps)
    return found, sizes


def _head(graph: Graph, maps: list[Name], size: Name, head: AllMLPHead | MMSegHead) -> Name:
    """The folded head: logits of the four maps."""
    if isinstance(head, MMSegHead):
        fused, prediction, maps = head.fusion_conv, head.conv_seg, list(maps)
        for stage, layer in enumerate(head.convs):
            scale, shift = layer.bn.scale_shift()
            kernel = layer.conv.weight * scale[:, None, None, None]
            maps[stage] = graph("Relu", graph("Conv", maps[stage], kernel, shift))
        weights, offset = (
            list(fused.conv.weight.flatten(1).chunk(4, dim=1)),
            torch.zeros(len(fused.bn.weight)),
        )
    else:
        fused, prediction = head.linear_fuse, head.linear_pred
        stages = (head.linear_c4, head.linear_c3, head.linear_c2, head.linear_c1)
        weights, offset = fold_projections([affine(x.proj) for x in stages], fused.conv.weight.flatten(1))
        weights.reverse()
    scale, shift = fused.bn.scale_shift()
    kernels = [(weight * scale[:, None])[:, :, None, None] for weight in weights]
    hidden = graph("Conv", maps[0], kernels[0], offset * scale + shift)
    for smaller, weight in zip(maps[:0:-1], kernels[:0:-1], strict=True):
        hidden = graph("Add", hidden, graph.resize(graph("Conv", smaller, weight), size))
    return graph("Conv", graph("Relu", hidden), *affine(prediction))


@torch.no_grad()
def to_onnx(
    model: SegFormer | MiTClassifier,
    *,
    normalization: tuple[list[float], list[float]] | None = None,
    argmax: bool = False,
) -> bytes:
    """The network in evaluation mode as an ONNX file.

    normalization: mean and std of uint8 images (B, H, W, C), which the graph then takes. argmax: it gives
    classes uint8 (B, H, W).

    Raises:
        ConfigError: the network is none that is stated here, or too large for one file.
    """
    from onnx import TensorProto, checker, helper, numpy_helper

    backbone: Any = model.backbone
    if type(backbone) is not MixTransformer:
        raise ConfigError(f"the encoder of the model ({backbone.title}) is not stated in ONNX; use to=hf")
    graph, channels = Graph(), backbone.config.channels
    given, images = (TensorProto.FLOAT, ["batch", channels, "height", "width"]), "images"
    if normalization:
        mean, std = (torch.tensor(values)[:, None, None] for values in normalization)
        given = TensorProto.UINT8, ["batch", "height", "width", channels]
        pixels = graph("Cast", graph("Transpose", images, perm=[0, 3, 1, 2]), to=TensorProto.FLOAT)
        images = graph("Div", graph("Sub", pixels, mean), std)
    size = graph("Shape", images, start=2, end=4)
    maps, sizes = _encoder(graph, images, backbone)
    name, result = "logits", (TensorProto.FLOAT, ["batch", model.num_classes])
    if isinstance(model, SegFormer):
        out = _head(graph, maps, sizes[0], model.decode_head)
        result[1].extend(["rows", "columns"])
    else:
        pooled = graph("ReduceMean", graph.tokens(maps[-1]), [1], keepdims=0)
        out = graph("Gemm", pooled, *affine(model.head), transB=1)
    if argmax:
        out = graph("ArgMax", graph.resize(out, size), axis=1, keepdims=0)
        graph("Cast", out, to=TensorProto.UINT8)
        name, result = "classes", (TensorProto.UINT8, ["batch", "height", "width"])
    graph.nodes[-1].output[0] = name
    if sum(array.nbytes for array in graph.constants.values()) > MOST_BYTES:
        raise ConfigError("the weights take more than the 2 GB of an ONNX file; use to=hf or a smaller model")
    values = [numpy_helper.from_array(array, name) for name, array in graph.constants.items()]
    ends = [[helper.make_tensor_value_info(*end)] for end in (("images", *given), (name, *result))]
    whole = helper.make_graph(graph.nodes, "segformer", *ends, values)
    file = helper.make_model(
        whole,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="segformer",
    )
    checker.check_model(file, full_check=True)
    return file.SerializeToString()
