"""The arithmetic of a run before it starts: classes, crop, batch, readers against chunks, memory of a GPU."""

import math
from collections.abc import Mapping, Sequence

import torch

from segformer.data.loading.loader import worker_count
from segformer.data.loading.order import BatchShape, make_order_spec
from segformer.distributed.engine import resolve_stage
from segformer.doctor.diagnosis import FAIL, OK, WARN, Verdict
from segformer.doctor.memory import Forecast, forecast
from segformer.errors import ConfigError
from segformer.training.config import RunConfig
from segformer.training.task import training_crop

LEAST_SIDE = 32  # pixels of a crop that the encoder takes
TIGHT = 0.85  # share of a GPU's memory above which the forecast is a warning: context and fragmentation


def judge_run(
    cfg: RunConfig,
    *,
    num_classes: int,
    samples: Mapping[str, int],
    shard_sizes: Mapping[str, Sequence[int]] | None,
    ranks: int,
    gpu_gib: float | None,
) -> tuple[list[Verdict], Forecast | None]:
    """Verdicts on a run over `ranks` GPUs, and the forecast of its memory where there can be one.

    samples, shard_sizes: by split; shard_sizes None = not sharded yet. gpu_gib: None = ask the GPU here.
    """
    verdicts = _settings(cfg, num_classes, samples)
    try:
        batch = cfg.batch_shape(ranks)
    except ConfigError as error:
        return [*verdicts, Verdict(FAIL, "batch", str(error))], None
    if cfg.train_split in samples:
        verdicts.append(_batch(cfg, batch, samples[cfg.train_split]))
    if shard_sizes is not None and cfg.train_split in shard_sizes:
        verdicts.append(_readers(cfg, ranks, shard_sizes[cfg.train_split]))
    if samples.get(cfg.eval_split, ranks) < ranks:
        text = f"{samples[cfg.eval_split]} images for {ranks} ranks: some ranks will wait for the others"
        verdicts.append(Verdict(WARN, "evaluation", f"{text}; nothing needs to change"))
    if min(training_crop(cfg)) < LEAST_SIDE:
        return verdicts, None
    found = _forecast(cfg, num_classes, batch)
    return [*verdicts, _memory(found, gpu_gib)], found


def _settings(cfg: RunConfig, num_classes: int, samples: Mapping[str, int]) -> list[Verdict]:
    verdicts = []
    if cfg.model.num_classes not in (None, num_classes):
        text = f"model.num_classes={cfg.model.num_classes}, the data has {num_classes} classes; leave it null"
        verdicts.append(Verdict(FAIL, "model", text))
    if min(training_crop(cfg)) < LEAST_SIDE:
        key = "classification.size" if cfg.data.task == "classification" else "augment.crop"
        text = f"{key}: crops of {training_crop(cfg)}; the encoder needs {LEAST_SIDE} pixels a side"
        verdicts.append(Verdict(FAIL, "crop", text))
    for key in ("train_split", "eval_split"):
        name = getattr(cfg, key)
        if name not in samples:
            text = (
                f"{key}={name} is not there, only {', '.join(samples)}; choose one of these or add the split"
            )
            verdicts.append(Verdict(FAIL, "splits", text))
    return verdicts


def _batch(cfg: RunConfig, batch: BatchShape, samples: int) -> Verdict:
    epochs = cfg.steps * cfg.global_batch / max(1, samples)
    text = f"{batch}; {cfg.steps} steps are {epochs:.1f} epochs of {samples}"
    if samples < cfg.global_batch:
        return Verdict(WARN, "batch", f"{text}: one step holds images more than once; lower global_batch")
    return Verdict(OK, "batch", text)


def _readers(cfg: RunConfig, ranks: int, shard_sizes: Sequence[int]) -> Verdict:
    """Processes that read against the chunks that there are to read."""
    workers = max(1, worker_count(cfg.loader, ranks))
    spec = make_order_spec(shard_sizes, seed=cfg.seed, global_batch=cfg.global_batch)
    chunks = sum(math.ceil(size / spec.chunk) for size in shard_sizes)
    readers = ranks * workers
    text = (
        f"{ranks} ranks x {workers} workers = {readers} readers of {chunks} chunks, {len(shard_sizes)} shards"
    )
    if chunks < readers:
        return Verdict(
            WARN,
            "readers",
            f"{text}: several will read the same chunk (nothing is lost or repeated); "
            f"loader.workers={max(1, chunks // ranks)} is enough",
        )
    return Verdict(OK, "readers", text)


def _forecast(cfg: RunConfig, num_classes: int, batch: BatchShape) -> Forecast:
    precision = "fp32" if cfg.engine.precision == "fp32" else "bf16"
    zero = cfg.engine.extra.get("zero_optimization", {})
    height, width = training_crop(cfg)
    return forecast(
        cfg.model,
        num_classes,
        crop=(height, width),
        micro_batch=batch.micro_batch,
        world_size=batch.world_size,
        zero_stage=resolve_stage(cfg.engine, torch.device("cuda")),
        precision=precision,
        loss_terms=max(1, len(cfg.loss.terms)),
        bucket=zero.get("reduce_bucket_size"),
        offload=cfg.engine.offload_optimizer,
        ema=cfg.optim.ema > 0,
        task=cfg.data.task,
    )


def _memory(found: Forecast, gib: float | None) -> Verdict:
    if gib is None and torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in found.parts.items() if size)
    text = f"forecast {_gib(found.total)} a GPU ({parts})"
    if gib is None:
        return Verdict(OK, "memory", f"{text}; gpu_gib=<GiB of a GPU> compares it")
    share = found.total / 2**30 / gib
    if share <= TIGHT:
        return Verdict(OK, "memory", f"{text}, {100 * share:.0f} % of {gib:.0f} GiB")
    remedy = "lower micro_batch (the global batch stays), or use engine.precision=bf16"
    return Verdict(
        FAIL if share > 1 else WARN, "memory", f"{text}, {100 * share:.0f} % of {gib:.0f} GiB; {remedy}"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
