"""A forecast of the memory that training takes on one GPU, made without a GPU.

    parameters   4 P bytes; ZeRO-3: 4 P / R and what it gathers ahead
    gradients    4 P; ZeRO-2 and 3: 4 P / R
    optimizer    M state tensors (AdamW 2, sgd and lion 1), 4 M P; ZeRO-1 to 3: (4 M + 4) P / R, with
                 DeepSpeed's copy of the weights; nothing where the optimizer is offloaded to the host
    average      the EMA of the weights (optim.ema), 4 P; ZeRO-1 to 3: 4 P / R; nothing where offloaded
    buckets      DeepSpeed's buffers for reducing gradients (engine.bucket_elements)
    activations  what autograd keeps between forward and backward, counted on a forward of fake tensors
    loss         the gradient of the logits and the blocks of enlarged logits (models/ops/cross_entropy.py)

P parameters, R ranks. Weights are fp32 at any precision here (engine.py), bf16 halves most activations. Not
counted: the CUDA context and library workspaces (0.5 to 1.5 GiB), the allocator's fragmentation, and what
torch.compile saves. Gradients and activations are added, as with accumulation, although activations shrink
while gradients grow.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from segformer.distributed.engine import bucket_elements
from segformer.models.ops.dispatch import GPU_BLOCK_BYTES
from segformer.models.segformer import build_classifier, build_model
from segformer.models.variants import ModelConfig

PREFETCH = 50_000_000  # DeepSpeed's default stage3_prefetch_bucket_size, elements
LOSS_BLOCKS = 4  # blocks of enlarged logits alive at once: logits, softmax, log-softmax, one product


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Bytes on one GPU by purpose, and the number of parameters of the whole model."""

    num_parameters: int
    parameters: int
    gradients: int
    optimizer: int
    average: int
    buckets: int
    activations: int
    loss: int

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by purpose."""
        return {name: size for name, size in asdict(self).items() if name != "num_parameters"}

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


def forecast(
    model: ModelConfig,
    num_classes: int,
    *,
    crop: tuple[int, int],
    micro_batch: int,
    world_size: int,
    zero_stage: int,
    precision: str,
    loss_terms: int = 1,
    bucket: int | None = None,
    offload: bool = False,
    ema: bool = False,
    moments: int = 2,
    task: str = "segmentation",
) -> Forecast:
    """Memory of one rank; crop in pixels, precision fp32 or bf16, bucket in elements (null: the engine's)."""
    skeleton = _skeleton(model, num_classes, task)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    states = state_bytes(parameters, world_size=world_size, zero_stage=zero_stage, moments=moments)
    share = 4 * (-(-parameters // world_size) if zero_stage else parameters)
    bucket = bucket_elements(parameters) if bucket is None else bucket
    logits = num_classes * -(-crop[0] // 4) * -(-crop[1] // 4)
    enlarged = 4 * num_classes * crop[0] * crop[1]
    loss = 4 * micro_batch * logits * loss_terms + LOSS_BLOCKS * min(enlarged, GPU_BLOCK_BYTES)
    if task == "classification":  # a row of logits an image
        loss = 0
    return Forecast(
        num_parameters=parameters,
        parameters=states["parameters"],
        gradients=states["gradients"],
        optimizer=0 if offload else states["optimizer"],
        average=share if ema and not offload else 0,
        buckets=_bucket_bytes(parameters, zero_stage, precision, bucket),
        activations=activation_bytes(
            model, num_classes, crop=crop, micro_batch=micro_batch, bf16=precision == "bf16", task=task
        ),
        loss=loss,
    )


def state_bytes(parameters: int, *, world_size: int, zero_stage: int, moments: int = 2) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer states on one rank, by the formulas above."""
    whole, share = 4 * parameters, 4 * -(-parameters // world_size)
    return {
        "parameters": share if zero_stage == 3 else whole,
        "gradients": share if zero_stage >= 2 else whole,
        "optimizer": (moments + 1) * share if zero_stage else moments * whole,
    }


def _bucket_bytes(parameters: int, zero_stage: int, precision: str, bucket: int) -> int:
    """DeepSpeed 0.19: at stage 1 and 2 two buffers (overlap_comm) per type of gradients that is sent."""
    if zero_stage == 0:
        return 0
    if zero_stage == 3:
        return (6 if precision == "bf16" else 4) * bucket + 4 * min(parameters, PREFETCH)
    return 2 * 4 * bucket * (2 if precision == "bf16" else 1)


def _skeleton(model: ModelConfig, num_classes: int, task: str) -> nn.Module:
    build = build_classifier if task == "classification" else build_model
    with torch.device("meta"):
        return build(replace(model, pretrained="", num_classes=None), num_classes).train()


def activation_bytes(
    model: ModelConfig,
    num_classes: int,
    *,
    crop: tuple[int, int],
    micro_batch: int,
    bf16: bool,
    norms_in_fp32: bool = True,
    task: str = "segmentation",
) -> int:
    """Bytes that autograd keeps of one forward, the input among them; every storage counts once.

    norms_in_fp32: LayerNorm gives fp32 under bf16 autocast, as it does on a GPU but not on a CPU.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    skeleton = _skeleton(model, num_classes, task)
    if bf16 and norms_in_fp32:
        for module in skeleton.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    with FakeTensorMode():
        state = {name: _fake(tensor) for name, tensor in _tensors(skeleton)}
        images = torch.empty(micro_batch, 3, *crop)
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}
        kept: dict[int, torch.UntypedStorage] = {}  # holds the storages: a freed one's address is used again

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            logits = torch.func.functional_call(skeleton, state, (images,))
        keep(logits)
        return sum(storage.nbytes() for storage in kept.values())


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=isinstance(tensor, nn.Parameter))
