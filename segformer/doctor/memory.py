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

from dataclasses import replace

import torch
from torch import Tensor, nn

from segformer.data.loading.order import BatchShape
from segformer.distributed.engine import bucket_elements, resolve_stage
from segformer.models.ops.dispatch import GPU_BLOCK_BYTES
from segformer.models.segformer import build_classifier, build_model
from segformer.models.variants import ModelConfig
from segformer.training.config import RunConfig
from segformer.training.optim import OPTIMIZERS
from segformer.training.task import training_crop

PREFETCH = 50_000_000  # DeepSpeed's default stage3_prefetch_bucket_size, elements
LOSS_BLOCKS = 4  # blocks of enlarged logits alive at once: logits, softmax, log-softmax, one product


def forecast(cfg: RunConfig, num_classes: int, batch: BatchShape) -> dict[str, int]:
    """Bytes by purpose on each GPU of a run."""
    crop, task, stage = training_crop(cfg), cfg.data.task, resolve_stage(cfg.engine, torch.device("cuda"))
    bf16 = cfg.engine.precision != "fp32"
    parameters = sum(parameter.numel() for parameter in _skeleton(cfg.model, num_classes, task).parameters())
    ranks, moments = batch.world_size, len(OPTIMIZERS[cfg.optim.name].states)
    states = state_bytes(parameters, world_size=ranks, zero_stage=stage, moments=moments)
    average = 4 * (-(-parameters // ranks) if stage else parameters) if cfg.optim.ema else 0
    if cfg.engine.offload_optimizer:
        states["optimizer"] = average = 0
    logits = batch.micro_batch * num_classes * -(-crop[0] // 4) * -(-crop[1] // 4)
    block = min(4 * num_classes * crop[0] * crop[1], GPU_BLOCK_BYTES)
    loss = 4 * logits * max(1, len(cfg.loss.terms)) + LOSS_BLOCKS * block
    bucket = cfg.engine.extra.get("zero_optimization", {}).get("reduce_bucket_size")
    micro_batch = batch.micro_batch
    return states | {
        "average": average,
        "buckets": _bucket_bytes(parameters, stage, bf16, bucket or bucket_elements(parameters)),
        "activations": activation_bytes(
            cfg.model, num_classes, crop=crop, micro_batch=micro_batch, bf16=bf16, task=task
        ),
        "loss": 0 if task == "classification" else loss,  # there a row of logits an image
    }


def state_bytes(parameters: int, *, world_size: int, zero_stage: int, moments: int = 2) -> dict[str, int]:
    """Bytes of parameters, gradients and optimizer states on one rank, by the formulas above."""
    whole, share = 4 * parameters, 4 * -(-parameters // world_size)
    return {
        "parameters": share if zero_stage == 3 else whole,
        "gradients": share if zero_stage >= 2 else whole,
        "optimizer": (moments + 1) * share if zero_stage else moments * whole,
    }


def _bucket_bytes(parameters: int, zero_stage: int, bf16: bool, bucket: int) -> int:
    """DeepSpeed 0.19: at stage 1 and 2 two buffers (overlap_comm) per type of gradients that is sent."""
    if zero_stage == 3:
        return (6 if bf16 else 4) * bucket + 4 * min(parameters, PREFETCH)
    return 2 * 4 * bucket * (2 if bf16 else 1) if zero_stage else 0


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

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=isinstance(tensor, nn.Parameter))

    skeleton = _skeleton(model, num_classes, task)
    if bf16 and norms_in_fp32:
        for module in skeleton.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    with FakeTensorMode():
        tensors = dict(skeleton.named_parameters()) | dict(skeleton.named_buffers())
        state = {name: fake(tensor) for name, tensor in tensors.items()}
        images = torch.empty(micro_batch, model.channels, *crop)
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
