"""Training as one would write it without this system: one process, whole batches, no DeepSpeed, no fusion.

Only the sample stream is the system's own (it has its tests); the model is its reference form, and groups,
schedule, loss and step are restated from the official recipe.
"""

import contextlib

import torch
import torch.nn.functional as F

from segformer.data.loading.loader import train_batches
from segformer.data.loading.order import BatchShape, SampleOrder, make_order_spec
from segformer.data.loading.photometric import Normalize
from segformer.data.shards.format import ShardSet
from segformer.distributed.world import derive_seed
from segformer.models.segformer import build_model
from segformer.training.config import RunConfig, compose


def train_plainly(
    overrides: list[str], *, bf16: bool = False, skip: frozenset[int] | set[int] = frozenset()
) -> tuple[dict, dict, list[float]]:
    """(weights before, weights after, losses) of cfg.steps steps; those in `skip` change nothing."""
    cfg = compose(RunConfig, "config", [*overrides, "model.ops=reference"])
    shards = ShardSet.open(cfg.data.shards)
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    model = build_model(cfg.model, len(shards.classes)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    norms, rest, head = _groups(model, cfg.optim.frozen_stages)
    base = cfg.optim.lr
    optimizer = torch.optim.AdamW(
        [
            {"params": rest, "lr": base},
            {"params": norms, "lr": base, "weight_decay": 0.0},
            {"params": head, "lr": base * 10},
        ],
        weight_decay=0.01,
        eps=cfg.optim.eps,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    split = shards.split("train")
    spec = make_order_spec(split.shard_sizes, seed=cfg.seed, global_batch=cfg.global_batch)
    batches = iter(
        train_batches(
            split,
            SampleOrder(spec),
            cfg.augment,
            cfg.loader,
            seed=cfg.seed,
            rank=0,
            batch=BatchShape(cfg.global_batch, cfg.global_batch, 1),
            start_step=0,
        )
    )
    normalize, losses = Normalize(cfg.augment.mean, cfg.augment.std), []
    for step in range(cfg.steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / cfg.steps)
        batch = next(batches)
        if step in skip:
            continue
        images = normalize(batch.images, batch.photometric, batch.valid)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
            logits = model(images)
        enlarged = F.interpolate(logits.float(), size=batch.targets.shape[1:], mode="bilinear")
        total = F.cross_entropy(enlarged, batch.targets.long(), ignore_index=255, reduction="sum")
        loss = total / batch.targets.numel()
        optimizer.zero_grad()
        loss.backward()
        if cfg.engine.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.engine.grad_clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return before, {name: value.clone() for name, value in model.state_dict().items()}, losses


def _groups(model: torch.nn.Module, frozen_stages: int) -> tuple[list, list, list]:
    """Norms of the encoder, the rest of it, and the head, without the first stages."""
    parts = [f"backbone.{part}" for part in ("patch_embed", "block", "norm")]
    frozen = tuple(f"{part}{stage}." for part in parts for stage in range(1, frozen_stages + 1))
    norms, rest, head = [], [], []
    for name, parameter in model.named_parameters():
        if not name.startswith(frozen):
            kind = head if "decode_head" in name else norms if "norm" in name else rest
            kind.append(parameter)
    return norms, rest, head
