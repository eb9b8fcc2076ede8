"""The engine's tensors whole and by name, whatever the ZeRO stage; and back.

What a rank's optimiser holds of a parameter depends on the stage:

    0      all of it
    1, 2   a stretch of a flat fp32 buffer over the parameters of a group, cut at equal sizes over the ranks
    3      one of as many equal parts as there are ranks, the last one padded

`_locate` says which elements those are and where; gathering and restoring are then the same for all stages.
DeepSpeed's own accessors are not enough: before AdamW's first step its states do not exist, at stages 1 and
2 some of its step functions never link them, and its ZeRO-3 setter fails on a padded parameter.

Reads private attributes of DeepSpeed 0.19 (`_hp_mapping`, `grad_position`, ...), which pyproject.toml pins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from segformer.distributed.world import World
from segformer.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_model(engine: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name, fp32 and whole, on the CPU of rank zero; elsewhere {}. All ranks."""
    state: dict[str, Tensor] = {}
    keep = engine.global_rank == 0
    for name, parameter in engine.module.named_parameters():
        value = _whole(engine, parameter)
        if keep:
            state[name] = _to_cpu(value)
    if keep:
        state.update({name: _to_cpu(buffer) for name, buffer in _saved_buffers(engine.module)})
    return state


def gather_optimizer(engine: Any, world: World) -> dict[str, Tensor]:
    """AdamW's moments as `exp_avg.<parameter>`, whole, on the CPU of rank zero; elsewhere {}. All ranks."""
    state: dict[str, Tensor] = {}
    for moment in MOMENTS:
        states = _adamw(engine).state
        held = {  # zeros before the first step that was taken
            flat: states[flat][moment] if flat in states else torch.zeros_like(flat)
            for flat in flat_tensors(engine)
        }
        for name, whole in whole_values(engine, held, world):
            if world.is_main:
                state[f"{moment}.{name}"] = _to_cpu(whole)
    return state


def whole_values(engine: Any, held: dict[Tensor, Tensor], world: World) -> Iterator[tuple[str, Tensor]]:
    """(name, whole value on the device) of one tensor per trained parameter, one after the other; all ranks.

    held: for each of `flat_tensors`, values of the same shape: a moment, or an average of the weights.
    """
    for name, parameter in _trained(engine):
        part = _locate(engine, parameter)
        whole = torch.zeros(_shape(parameter).numel(), device=world.device)
        if part is not None:
            whole[part.of_parameter].copy_(held[part.flat].flatten()[part.of_flat])
        if engine.zero_optimization_stage() > 0:
            world.sum(whole)
        yield name, whole.view(_shape(parameter))


def keep_own(engine: Any, values: Mapping[str, Tensor], held: dict[Tensor, Tensor]) -> None:
    """The way back: copy whole values by parameter into what this rank holds; no communication."""
    for name, parameter in _trained(engine):
        part = _locate(engine, parameter)
        if part is not None:
            own = values[name].flatten()[part.of_parameter]
            held[part.flat].view(-1)[part.of_flat].copy_(own)


def write_model(engine: Any, state: Mapping[str, Tensor]) -> None:
    """Set parameters and saved buffers of the engine, and the optimiser's fp32 weights; all ranks.

    state: whole values by name, the same on all ranks.
    """
    if engine.zero_optimization_stage() > 0:
        keep_own(engine, state, {flat: flat.data for flat in flat_tensors(engine)})
    show_model(engine, ((name, state[name]) for name, _ in engine.module.named_parameters()))
    for name, buffer in _saved_buffers(engine.module):
        buffer.copy_(state[name])


@torch.no_grad()
def show_model(engine: Any, values: Iterable[tuple[str, Tensor]]) -> None:
    """Set the parameters that forward uses, and not the optimiser's weights; all ranks, in the same order."""
    parameters = dict(engine.module.named_parameters())
    for name, value in values:
        parameter = parameters[name]
        if engine.zero_optimization_stage() < 3:
            parameter.data.copy_(value)
            continue
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if engine.global_rank == 0:
                parameter.data.copy_(value)


def restore_optimizer(engine: Any, state: Mapping[str, Tensor], step: int) -> None:
    """Put whole moments back into the engine's partitions; every rank keeps its own part, no communication.

    DeepSpeed's own setters need states that AdamW makes only at its first step, and for ZeRO-3 they fail
    where a parameter is padded; so the states are made here and filled by the partitions' addresses.
    """
    names = dict(_trained(engine))
    wanted = {f"{moment}.{name}" for moment in MOMENTS for name in names}
    if wanted != set(state):
        raise CheckpointError(
            f"the optimiser state does not fit the model: {_difference(wanted, set(state))}"
        )
    optimizer = _adamw(engine)
    for flat in flat_tensors(engine):
        counter = torch.tensor(
            float(step), device=flat.device if optimizer.param_groups[0].get("fused") else "cpu"
        )
        optimizer.state[flat] = {"step": counter, **{moment: torch.zeros_like(flat) for moment in MOMENTS}}
    for moment in MOMENTS:
        held = {flat: optimizer.state[flat][moment] for flat in flat_tensors(engine)}
        keep_own(engine, {name: state[f"{moment}.{name}"] for name in names}, held)


@dataclass(frozen=True, slots=True)
class _Part:
    """Which elements of a parameter this rank's optimiser holds, and where."""

    flat: Tensor
    of_flat: slice
    of_parameter: slice


def _trained(engine: Any) -> Iterator[tuple[str, Any]]:
    """The parameters that the optimiser has: those that are not frozen."""
    return ((name, one) for name, one in engine.module.named_parameters() if one.requires_grad)


def _adamw(engine: Any) -> torch.optim.Optimizer:
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def flat_tensors(engine: Any) -> list[Tensor]:
    """What AdamW steps: the parameters, or the flat fp32 partitions of a ZeRO stage."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [parameter for _, parameter in _trained(engine)]
    return list(
        engine.optimizer.fp32_partitioned_groups_flat
        if stage == 3
        else engine.optimizer.single_partition_of_fp32_groups
    )


def _locate(engine: Any, parameter: Any) -> _Part | None:
    """This rank's part of `parameter`; None where other ranks hold all of it."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return _Part(parameter, slice(None), slice(None))
    if stage == 3:  # every parameter is cut into as many equal parts as ranks, the last one padded
        group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
        start = parameter.ds_tensor.numel() * engine.global_rank
        held = max(0, min(numel, parameter.ds_numel - start))
        part = _Part(
            zero.fp32_partitioned_groups_flat[group], slice(offset, offset + held), slice(start, start + held)
        )
        return part if held else None
    mapping = parameter._hp_mapping  # stages 1 and 2: a flat buffer over all parameters of a group is cut
    if mapping is None:
        return None
    of_flat, of_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
    return _Part(
        zero.single_partition_of_fp32_groups[mapping.param_group_index],
        slice(of_flat.start, of_flat.start + of_flat.numel),
        slice(of_parameter.start, of_parameter.start + of_parameter.numel),
    )


def _whole(engine: Any, parameter: Any) -> Tensor:
    if engine.zero_optimization_stage() < 3:
        return parameter.data
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.clone()


def _shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _to_cpu(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


def _saved_buffers(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    saved = set(module.state_dict(keep_vars=True))
    return ((name, buffer) for name, buffer in module.named_buffers() if name in saved)


def _difference(wanted: set[str], found: set[str]) -> str:
    missing, unused = sorted(wanted - found), sorted(found - wanted)
    parts = [
        f"{len(names)} {kind} ({names[0]})"
        for kind, names in (("missing", missing), ("unused", unused))
        if names
    ]
    return ", ".join(parts)
