"""The DeepSpeed engine: its configuration as a pure function, and how to build it on GPUs and on CPUs.

Owns deepspeed (beside zero_state.py, which reads the optimizer's partitions). There is no DeepSpeed JSON
file: `deepspeed_config` derives every key from the run's own settings, and `engine.extra` may add keys but
not change derived ones.

Choices, each for a reason:
- The optimizer is a plain one of torch, given to DeepSpeed: its own FusedAdam compiles a C++ extension at
  first use.
- bf16 is DeepSpeed's `torch_autocast`: parameters, gradients, optimizer state and batch-norm buffers stay
  fp32. Its `bf16` mode casts BatchNorm's parameters but not its buffers, which fails, and at stage 0 it is
  not AdamW (its first update was measured at 0.744 x lr).
- Offloading leaves the optimizer what it is, on the CPU: DeepSpeed's own one compiles an extension, too.
- DeepSpeed's buckets are given the size of the model, at most 2^25 elements (128 MiB): its default of 5e8
  elements takes 4 to 8 GB whatever the model is.
- Gradients are averaged in one type, fp32 or engine.grad_dtype. Left to itself, DeepSpeed's autocast sends
  those of modules whose class is exactly torch's Linear or Conv2d in bf16 and all others in fp32.
- Its throughput timer, which makes the host wait for the device twice a micro batch, is off, unless
  engine.extra has `timers`.
- A step whose gradients are not finite is not taken, on any rank (`take_step`): ZeRO's optimizers look at the
  norm themselves, at stage 0 it is done here.
- torch.compile goes through `engine.compile()`; a module that was compiled before ZeRO-3 fails in its hooks.
  The loss stays outside the compiled function: losses other than cross entropy ask the data for its classes.
- No scheduler is given: optim.py sets the lr before each step.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from segformer.data.loading.order import BatchShape
from segformer.distributed.world import World
from segformer.errors import SIGNALS, ConfigError, at_least, reason_of, reraise_as, within

OWN_ZERO = {"stage", "offload_optimizer", "offload_param"}
BUCKET = 2**25
"Largest bucket of gradients or parameters that is sent at once, elements."
_PRODUCTS = ["torch.nn.Linear", "torch.nn.Conv2d", "segformer.models.layers.Linear"]
"""Classes whose gradients are averaged in bf16 where that is asked for: those that autocast computes in bf16.
At stage 0 DeepSpeed doesn't ask for the class, and averages all of them in bf16."""
OWN = {"fp16", "bf16", "amp", "optimizer", "scheduler"}  # DeepSpeed's ways to do what this system does itself
FREE = {"zero_optimization", "timers"}  # derived, and engine.extra may add to them
# What the run logs itself, with rank and samples, and a remark on every optimizer that is not Adam.
_SILENT = re.compile("OVERFLOW!|untested optimizer")


class Engine(Protocol):
    """The part of deepspeed.DeepSpeedEngine that is used here."""

    module: nn.Module
    optimizer: Any
    "At ZeRO-0 the optimizer that it was given, else DeepSpeed's own around that one (`.optimizer`)."
    global_rank: int

    def __call__(self, images: Tensor) -> Tensor: ...
    def train(self) -> Any: ...
    def backward(self, loss: Tensor) -> Any: ...
    def step(self) -> None: ...
    def is_gradient_accumulation_boundary(self) -> bool: ...
    def zero_optimization_stage(self) -> int: ...
    def get_global_grad_norm(self) -> float | None: ...
    def was_step_applied(self) -> bool: ...


@dataclass(kw_only=True, slots=True)
class EngineConfig:
    """Training on the devices at hand. A key that changes the result beyond rounding says so."""

    zero_stage: int | None = None
    """DeepSpeed ZeRO: 0 none, 1 optimizer state, 2 and gradients, 3 and parameters partitioned over the
    ranks; null means 1 on GPUs and 0 on a CPU, where ZeRO's copies cost more than they save."""
    offload_optimizer: bool = False
    "Keep gradients' averages, optimizer state and fp32 weights in the host's memory; ZeRO-1 to 3. Slow."
    offload_parameters: bool = False
    "Keep the partitioned parameters in the host's memory, too; ZeRO-3 only."
    precision: str = "auto"
    "fp32, bf16 (autocast, fp32 parameters) or auto: bf16 where the GPU has it, fp32 on a CPU."
    grad_dtype: str = "fp32"
    """Type in which gradients are averaged over the ranks: fp32, or, with precision=bf16, bf16, which sends
    half the bytes and rounds each of them (above stage 0 but those of norms)."""
    compile: bool | None = None
    "torch.compile the model for training steps; null means on GPUs, below ZeRO-3."
    deterministic: bool = False
    """Repeat a run bit for bit on the same GPUs, too: torch's operations that add in one order, and its error
    where it has none. Slower; on a CPU runs are repeated in any case."""
    sync_batchnorm: bool = True
    "Batch norm over the micro batches of all ranks; false changes what is learned with the number of ranks."
    grad_clip: float = 0.0
    "Largest gradient norm; 0 for no clipping (as in the official recipe). Changes what is learned."
    timeout_s: float = 1800.0
    "Seconds after which a collective that not every rank has joined ends the run."
    extra: dict[str, Any] = field(default_factory=dict)
    "Further keys of the DeepSpeed configuration; keys that are derived from other settings are refused."

    def __post_init__(self) -> None:
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise ConfigError(f"engine.zero_stage={self.zero_stage} is unknown; use 0, 1, 2, 3 or null")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ConfigError(f"engine.precision={self.precision!r} is unknown; use auto, fp32 or bf16")
        if self.grad_dtype not in ("fp32", "bf16"):
            raise ConfigError(f"engine.grad_dtype={self.grad_dtype!r} is unknown; use fp32 or bf16")
        if self.grad_dtype == "bf16" and self.precision == "fp32":
            raise ConfigError(
                "engine.grad_dtype=bf16 needs engine.precision=bf16; with fp32 leave it at fp32"
            )
        if self.compile and self.zero_stage == 3:
            raise ConfigError(
                "engine.compile=true needs engine.zero_stage=2 or below: at 3 parameters are not there when "
                "the model is traced; use engine.compile=false"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ConfigError("engine.offload_optimizer=true needs engine.zero_stage=1, 2 or 3")
        if self.offload_parameters and self.zero_stage != 3:
            raise ConfigError("engine.offload_parameters=true needs engine.zero_stage=3")
        at_least(self, "engine.", grad_clip=0)
        within(self, "engine.", timeout_s=(1, 10**7))
        _stand_in(self)


def resolve_stage(cfg: EngineConfig, device: torch.device) -> int:
    """The ZeRO stage on a kind of device."""
    if cfg.zero_stage is None:
        return 0 if device.type == "cpu" and not cfg.offload_optimizer else 1
    return cfg.zero_stage


def resolve_precision(cfg: EngineConfig, device: torch.device) -> str:
    """fp32 or bf16; ConfigError where bf16 is asked of a GPU that lacks it (and would emulate it, slowly)."""
    supported = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if cfg.precision == "auto":
        return "bf16" if device.type == "cuda" and supported else "fp32"
    if cfg.precision == "bf16" and not supported:
        gpu = torch.cuda.get_device_name()
        raise ConfigError(f"engine.precision=bf16 is not supported by {gpu}; use fp32")
    return cfg.precision


def _zero_config(cfg: EngineConfig, stage: int, num_parameters: int) -> dict[str, Any]:
    if not stage:
        return {"stage": 0}
    bucket, gpu = bucket_elements(num_parameters), torch.cuda.is_available()
    # On gloo there is no stream to overlap with, and the stage 2 hooks of CPU tensors warn.
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": gpu, "reduce_bucket_size": bucket}
    if stage < 3:
        zero["allgather_bucket_size"] = bucket
    for key, moved in (("optimizer", cfg.offload_optimizer), ("param", cfg.offload_parameters)):
        if moved:
            zero[f"offload_{key}"] = {"device": "cpu", "pin_memory": gpu}
    return zero


def bucket_elements(num_parameters: int) -> int:
    """Elements of DeepSpeed's buckets for a model of so many parameters; even, as ZeRO-1 and 2 demand."""
    return min(num_parameters + num_parameters % 2, BUCKET)


def deepspeed_config(
    cfg: EngineConfig, batch: BatchShape, *, stage: int, precision: str, num_parameters: int
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run: a pure function of its arguments.

    Raises:
        ConfigError: engine.extra sets a key that other settings decide.
    """
    grad_dtype = cfg.grad_dtype if precision == "bf16" else "fp32"
    derived: dict[str, Any] = {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": cfg.grad_clip if stage else 0.0,  # at stage 0: take_step
        "steps_per_print": 10**9,
        "zero_optimization": _zero_config(cfg, stage, num_parameters),
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {
            "enabled": precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": _PRODUCTS if grad_dtype == "bf16" else [],
        },
        "communication_data_type": grad_dtype,
        "timers": {"throughput": {"enabled": False}},
    }
    zero = cfg.extra.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"engine.extra.zero_optimization={zero!r} must be a mapping")
    taken = cfg.extra.keys() & (derived.keys() - FREE | OWN) | zero.keys() & OWN_ZERO
    if taken:
        names = ", ".join(sorted(taken))
        do = "; give engine.grad_dtype" if "communication_data_type" in taken else ""
        raise ConfigError(f"engine.extra sets {names}, which other settings decide; remove it there{do}")
    return derived | cfg.extra | {"zero_optimization": derived["zero_optimization"] | zero}


@contextlib.contextmanager
def determinism(cfg: EngineConfig) -> Iterator[None]:
    """Operations of torch that add in one order inside the block, if `cfg.deterministic`.

    The kernels of models/ops always do. cuBLAS reads its setting at the first matrix product. ConfigError for
    an operation that torch has in no such form.
    """
    before = torch.are_deterministic_algorithms_enabled()
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if not cfg.deterministic or "does not have a deterministic" not in str(error):
            raise
        raise ConfigError(f"engine.deterministic=true: {reason_of(error).partition(', but')[0]}") from error
    finally:
        torch.use_deterministic_algorithms(before)


def _stand_in(cfg: EngineConfig) -> dict[str, Any]:
    """The DeepSpeed configuration before model and ranks are known; ConfigError as `deepspeed_config`."""
    stage = 1 if cfg.zero_stage is None else cfg.zero_stage
    return deepspeed_config(cfg, BatchShape(1, 1, 1), stage=stage, precision="fp32", num_parameters=1)


def check_extra(cfg: EngineConfig) -> None:
    """ConfigError where DeepSpeed refuses engine.extra, as far as it can say so without a model."""
    if not cfg.extra:
        return
    _import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    said = (ValueError, TypeError, AttributeError, KeyError, AssertionError, DeepSpeedConfigError)
    with reraise_as(ConfigError, "DeepSpeed refuses engine.extra", "correct it or leave it out", on=said):
        DeepSpeedConfig(_stand_in(cfg))


def _import_deepspeed() -> Any:
    """The package, which warns that it found no GPU unless it is told so as it is imported.

    Only then: the environment goes on to jobs that run elsewhere.
    """
    told = {} if torch.cuda.is_available() or "DS_ACCELERATOR" in os.environ else {"DS_ACCELERATOR": "cpu"}
    os.environ.update(told)
    try:
        import deepspeed.ops
    finally:
        for name in told:
            del os.environ[name]
    return deepspeed


def build_engine(
    model: nn.Module, optimizer: torch.optim.Optimizer, cfg: EngineConfig, world: World, batch: BatchShape
) -> Engine:
    """Wrap `model`, which already holds its weights, in a deepspeed.DeepSpeedEngine; all ranks."""
    stage, precision = resolve_stage(cfg, world.device), resolve_precision(cfg, world.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    config = deepspeed_config(cfg, batch, stage=stage, precision=precision, num_parameters=size)
    deepspeed = _import_deepspeed()
    from deepspeed.utils import groups, logger

    groups._WORLD_GROUP = None  # where the process trains again, that of a group which is closed by now
    logger.setLevel(os.environ.get("DS_LOG_LEVEL", "WARNING").upper())
    logger.addFilter(_is_news)
    if world.device.type == "cpu":
        # On a CPU every start would compile a shared-memory extension (30-55 s, needs ninja and a compiler)
        # that gloo does without. The table of extensions is private: deepspeed is pinned below 0.20.
        deepspeed.ops.__compatible_ops__ = {}
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renamed; a user can do nothing about it.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    # Of Inductor: fp32 products are exact here, unless a user's own code says otherwise.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if cfg.compile or (cfg.compile is None and stage < 3 and torch.cuda.is_available()):
        deafen_compilers()
        engine.compile()
    return engine


@functools.cache  # callbacks are kept for good, and each would nest
def deafen_compilers() -> None:
    """Have compilers be born deaf to the signals of the job: one that dies of them ends the run."""
    from torch._dynamo import callback

    masks: list[set[Any]] = []

    @callback.on_compile_start
    def block(_: Any) -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))

    @callback.on_compile_end
    def unblock(_: Any) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, masks.pop())


def _is_news(record: logging.LogRecord) -> bool:
    return not _SILENT.search(record.getMessage())


def take_step(engine: Engine, grad_clip: float) -> tuple[float | None, bool]:
    """Step the engine after a backward: (norm of the averaged gradients, whether the weights moved).

    They move after the last of the accumulated micro batches, unless a gradient is not finite; all ranks
    decide alike, because the norm is that of the averages. It is the norm before clipping, None where
    DeepSpeed does not give it.
    """
    last, partitioned = engine.is_gradient_accumulation_boundary(), engine.zero_optimization_stage() > 0
    norm, finite = (None, True) if partitioned or not last else _clip(engine, grad_clip)
    engine.step()
    if not partitioned or not last:
        return norm, last and finite
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm), bool(engine.was_step_applied())


def _clip(engine: Engine, grad_clip: float) -> tuple[float, bool]:
    """Clip the gradients as ZeRO's optimizers do, or drop them where one is not finite: (norm, finite)."""
    parameters = [parameter for parameter in engine.module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])  # type: ignore[misc]
    total = float(norm)
    finite = math.isfinite(total)
    if not finite:  # optimizers pass over parameters without a gradient
        engine.optimizer.zero_grad(set_to_none=True)
    elif grad_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
    return total, finite
