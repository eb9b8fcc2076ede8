"""torch.compile: no graph breaks, no surprise recompilations, and the gradients of the eager network."""

import re
import signal
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
from small import cross_entropy, small
from torch._dynamo import callback

from segformer.distributed.engine import deafen_compilers
from segformer.errors import SIGNALS
from segformer.models.layers import DropPath
from segformer.models.ops import dispatch


class Step(torch.nn.Module):
    """Encoder, head and loss as one module; with modules for stochastic depth that drop nothing."""

    def __init__(self, ops: str) -> None:
        super().__init__()
        self.model = small(ops, drop_path_rate=0.1)
        for module in self.model.modules():
            if isinstance(module, DropPath):
                module.rate = 0.0
        self.criterion = cross_entropy(self.model)

    def forward(self, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.criterion(self.model(images), target)[0]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(height: int = 64, width: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 3, height, width), torch.randint(0, 8, (2, height, width))


def compare_gradients(compiled: Step, eager: Step, bf16: bool) -> None:
    """Every parameter's gradient is the same up to rounding, except those that are zero.

    Inductor orders its sums otherwise: 2e-5 was the most in fp32, 0.10 in bf16 (bias of the first norm).

    A constant before the batch norm has no effect: norm4 and the projections of the head have such a bias.
    """
    zero = re.compile(r"model\.(backbone\.norm4|decode_head\.linear_c\d\.proj)\.bias")
    for (name, left), right in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert left.grad.isfinite().all(), name
        if not zero.fullmatch(name):
            distance = (left.grad - right.grad).norm() / right.grad.norm()
            assert distance < (0.15 if bf16 else 1e-4), (name, distance)


def compare_steps(graph: torch.nn.Module, compiled: Step, eager: Step, bf16: bool = False) -> None:
    """Loss and gradients of `graph`, a compilation of `compiled`, are those of `eager`."""
    losses = []
    for step in (eager, graph):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = step(*batch())
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-2 if bf16 else 1e-5)
    compare_gradients(compiled, eager, bf16)


@pytest.mark.parametrize(
    ("ops", "bf16"),
    [("fused", False), ("fused", True), pytest.param("reference", False, marks=pytest.mark.slow)],
)
def test_encoder_head_and_loss_are_one_graph_with_the_eager_gradients(ops, bf16):
    eager, compiled = Step(ops), Step(ops)
    graph = torch.compile(compiled, backend="aot_eager", fullgraph=True)  # fullgraph: a break is an error
    compare_steps(graph, compiled, eager, bf16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # Inductor's
def test_inductor_gives_the_loss_and_gradients_of_the_eager_step():
    """With the loss inside the graph: Inductor once returned zero gradients there, with a right loss."""
    eager, compiled = Step("fused"), Step("fused")
    compare_steps(torch.compile(compiled, fullgraph=True), compiled, eager)


class OnGpu(NamedTuple):
    """What `use_triton` asks of a tensor, for one that is on an NVIDIA GPU."""

    dtype: torch.dtype
    is_cuda: bool = True
    device: str = "cuda:0"
    major: int = 8


@pytest.mark.parametrize(("major", "kernels"), [(7, False), (8, True), (12, True)])
def test_triton_is_for_gpus_from_capability_8_on(monkeypatch, major, kernels):
    monkeypatch.setattr(dispatch, "_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: OnGpu(torch.float32, major=major))
    assert dispatch.use_triton(OnGpu(torch.bfloat16)) is kernels
    assert not dispatch.use_triton(OnGpu(torch.float64))


def test_the_graph_of_a_gpu_is_whole_and_has_its_operations(monkeypatch):
    """On a CPU `use_triton` says no at its first question, so that no other test traces the rest of it."""
    use_triton = dispatch.use_triton

    def ask(tensor: torch.Tensor) -> bool:
        # The operations themselves run after tracing, on this CPU.
        return torch.compiler.is_compiling() and use_triton(OnGpu(tensor.dtype))

    monkeypatch.setattr(dispatch, "use_triton", ask)
    monkeypatch.setattr(dispatch, "_TRITON", True)  # whether or not it is installed
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: OnGpu(torch.float32))
    called: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    eager, compiled = Step("fused"), Step("fused")
    compare_steps(torch.compile(compiled, backend=backend, fullgraph=True), compiled, eager)
    assert {"segformer.upsample_sum.default", "segformer.upsampled_cross_entropy.default"} <= set(called)


def test_batches_of_one_shape_compile_once():
    model = Step("fused").model.eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        for _ in range(3):
            compiled(torch.randn(2, 3, 64, 96))
    assert counter.frame_count == 1


def test_what_is_started_to_compile_is_born_deaf_to_the_signals_of_the_job():
    masks = []

    def backend(graph, inputs):
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))
        return graph.forward

    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    handler = callback.callback_handler
    start, end = list(handler.start_callbacks), list(handler.end_callbacks)
    deafen_compilers.cache_clear()
    for _ in range(2):  # a second engine in one process
        deafen_compilers()
    try:
        assert torch.compile(lambda x: x * 2, backend=backend)(torch.ones(1)) == 2
    finally:
        handler.start_callbacks[:], handler.end_callbacks[:] = start, end
    assert masks == [before | set(SIGNALS)]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.slow
def test_torch_export_keeps_batch_height_and_width_open() -> None:
    """Of the reference operations, which need nothing of ours where the program runs; sides from 64."""
    model = small("reference").eval()
    side = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (torch.zeros(2, 3, 96, 128),), dynamic_shapes=({0: side, 2: side, 3: side},)
    )
    assert not [node for node in program.graph.nodes if str(node.target).startswith("segformer")]
    for size in ((1, 64, 64), (3, 101, 77), (5, 64, 97)):
        images = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            assert torch.equal(program.module()(images), model(images))
