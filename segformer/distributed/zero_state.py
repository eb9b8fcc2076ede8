"""The engine's tensors whole and by name, whatever the ZeRO stage; and back.

What a rank's optimizer holds of a parameter depends on the stage:

    0      all of it
    1, 2   a stretch of a flat fp32 buffer over the parameters of a group, cut at equal sizes over the ranks
    3      one of as many equal parts as there are ranks, the last one padded

`_locate` says which elements those are and where; gathering and restoring are then the same for all stages.
DeepSpeed's own accessors are not enough: before an optimizer's first step its states do not exist, at stages
1 and 2 some of its step functions never link them, and its ZeRO-3 setter fails on a padded parameter.

Reads private attributes of DeepSpeed 0.19 (`_hp_mapping`, `grad_position`, ...), which pyproject.toml pins.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segformer.distributed.engine import Engine
from segformer.distributed.world import World
from segformer.errors import CheckpointError, listed


def gather_model(engine: Engine) -> dict[str, Tensor]:
    """Parameters and buffers by name, fp32 and whole, on the CPU of rank zero; elsewhere {}. All ranks."""
    parameters = ((name, _whole(engine, parameter)) for name, parameter in engine.module.named_parameters())
    values = itertools.chain(parameters, _saved_buffers(engine.module))
    return {name: _to_cpu(value) for name, value in values if engine.global_rank == 0}


def gather_optimizer(engine: Engine, states: Sequence[str], world: World) -> dict[str, Tensor]:
    """Gather the optimizer's state as `<state>.<parameter>`, whole, on the CPU of rank zero; all ranks.

    states: names of its tensors of a parameter's shape; zeros before its first step. {} on other ranks.
    """
    state: dict[str, Tensor] = {}
    per_flat = _torch_optimizer(engine).state
    for kind in states:
        held = {}
        for flat in flat_tensors(engine):
            value = per_flat.get(flat, {}).get(kind)
            held[flat] = torch.zeros_like(flat) if value is None else value
        for name, whole in whole_values(engine, held, world):
            if world.is_main:
                state[f"{kind}.{name}"] = _to_cpu(whole)
    return state


def whole_values(engine: Engine, held: dict[Tensor, Tensor], world: World) -> Iterator[tuple[str, Tensor]]:
    """(name, whole value on the device) of one tensor per trained parameter, one after the other; all ranks.

    held: for each of `flat_tensors`, values of the same shape: a state of the optimizer, or the EMA.
    """
    for name, parameter in _trained(engine):
        part = _locate(engine, parameter)
        whole = torch.zeros(_shape(parameter).numel(), device=world.device)
        if part is not None:
            whole[part.of_parameter].copy_(held[part.flat].flatten()[part.of_flat])
        if engine.zero_optimization_stage() > 0:
            world.sum(whole)
        yield name, whole.view(_shape(parameter))


def keep_own(engine: Engine, values: Mapping[str, Tensor], held: dict[Tensor, Tensor]) -> None:
    """The way back: copy whole values by parameter into what this rank holds; no communication."""
    for name, parameter in _trained(engine):
        part = _locate(engine, parameter)
        if part is not None:
            own = values[name].flatten()[part.of_parameter]
            held[part.flat].view(-1)[part.of_flat].copy_(own)


def write_model(engine: Engine, state: Mapping[str, Tensor]) -> None:
    """Set parameters and saved buffers of the engine, and the optimizer's fp32 weights; all ranks.

    state: whole values by name, the same on all ranks.
    """
    if engine.zero_optimization_stage() > 0:
        keep_own(engine, state, {flat: flat.data for flat in flat_tensors(engine)})
    set_parameters(engine, ((name, state[name]) for name, _ in engine.module.named_parameters()))
    for name, buffer in _saved_buffers(engine.module):
        buffer.copy_(state[name])


@torch.no_grad()
def set_parameters(engine: Engine, values: Iterable[tuple[str, Tensor]]) -> None:
    """Set the parameters that forward uses, and not the optimizer's weights; all ranks, in the same order."""
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


def restore_optimizer(
    engine: Engine, states: Sequence[str], tensors: Mapping[str, Tensor], step: int | None
) -> None:
    """Put what `gather_optimizer` gave back into the engine; every rank keeps its part, no communication.

    step: optimizer steps that were taken, None for an optimizer that does not count them. DeepSpeed's own
    setters need states that an optimizer makes only at its first step, and for ZeRO-3 they fail where a
    parameter is padded; so the states are made here and filled by the partitions' addresses.
    """
    names = [name for name, _ in _trained(engine)]
    if odd := {f"{kind}.{name}" for kind in states for name in names} ^ tensors.keys():
        raise CheckpointError(f"the state does not fit model and optimizer: {listed(sorted(odd), 2)}")
    optimizer, flats = _torch_optimizer(engine), flat_tensors(engine)
    for flat in flats:
        optimizer.state[flat] = {kind: torch.zeros_like(flat) for kind in states}
        if step is not None:
            device = flat.device if optimizer.param_groups[0].get("fused") else "cpu"
            optimizer.state[flat]["step"] = torch.tensor(float(step), device=device)
    for kind in states:
        held = {flat: optimizer.state[flat][kind] for flat in flats}
        keep_own(engine, {name: tensors[f"{kind}.{name}"] for name in names}, held)


class _Part(NamedTuple):
    """Which elements of a parameter this rank's optimizer holds, and where."""

    flat: Tensor
    of_flat: slice
    of_parameter: slice


def _trained(engine: Engine) -> Iterator[tuple[str, Any]]:
    """The parameters that the optimizer has: those that are not frozen."""
    return ((name, one) for name, one in engine.module.named_parameters() if one.requires_grad)


def _torch_optimizer(engine: Engine) -> torch.optim.Optimizer:
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def flat_tensors(engine: Engine) -> list[Tensor]:
    """The tensors that the optimizer steps: parameters, or the flat fp32 partitions of a ZeRO stage."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [parameter for _, parameter in _trained(engine)]
    return list(
        engine.optimizer.fp32_partitioned_groups_flat
        if stage == 3
        else engine.optimizer.single_partition_of_fp32_groups
    )


def _locate(engine: Engine, parameter: Any) -> _Part | None:
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


def _whole(engine: Engine, parameter: Any) -> Tensor:
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
