"""torch.compile on an NVIDIA GPU: the questions that decide for a kernel are traced, and the graph calls it.

On a CPU `use_triton` says no at its first question, so that no other test traces the rest of it.
"""

from typing import NamedTuple

import pytest
import torch
import torch._dynamo

from segformer.models.head import AllMLPHead
from segformer.models.mit import MixTransformer
from segformer.models.ops import dispatch
from segformer.models.ops.backend import BACKENDS
from segformer.models.segformer import SegFormer
from segformer.training.losses import LossConfig, SegmentationLoss


class OnGpu(NamedTuple):
    """What `use_triton` asks of a tensor, for one that is on an NVIDIA GPU."""

    dtype: torch.dtype
    is_cuda: bool = True


class Step(torch.nn.Module):
    """A tiny network and its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        dims, ops = (8, 16, 40, 64), BACKENDS["fused"]
        encoder = MixTransformer(dims, (1, 1, 1, 1), (1, 2, 5, 8), (8, 4, 2, 1), (4, 4, 4, 4), ops=ops)
        self.model = SegFormer(encoder, AllMLPHead(dims, 16, 8, ops=ops, dropout=0.0), 8)
        self.criterion = SegmentationLoss(LossConfig(terms={"cross_entropy": 1.0}), 8)

    def forward(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.criterion(self.model(images), target)[0]


def test_the_graph_of_a_gpu_is_whole_and_has_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton = dispatch.use_triton

    def ask(tensor: torch.Tensor) -> bool:
        # The operations themselves run after tracing, on this CPU.
        return torch.compiler.is_compiling() and use_triton(OnGpu(tensor.dtype))  # type: ignore[arg-type]

    monkeypatch.setattr(dispatch, "use_triton", ask)
    monkeypatch.setattr(dispatch, "_TRITON", True, raising=False)  # whether or not it is installed
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    eager, compiled = Step(), Step()
    torch.manual_seed(1)
    batch = torch.randn(2, 3, 64, 96), torch.randint(0, 8, (2, 64, 96))
    expected = eager(*batch)
    found = torch.compile(compiled, backend=backend, fullgraph=True)(*batch)  # a break is an error
    torch._dynamo.reset()
    assert {"segformer.upsample_sum.default", "segformer.upsampled_cross_entropy.default"} <= set(called)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for loss in (expected, found):
        loss.backward()
    for (name, left), right in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert (left.grad - right.grad).norm() <= 1e-4 * right.grad.norm() + 1e-6, name
