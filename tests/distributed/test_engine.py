"""The DeepSpeed configuration as a pure function, and its batch arithmetic."""

import os
from types import SimpleNamespace

import pytest
import torch

from segformer.data.loading.order import BatchShape
from segformer.distributed.engine import (
    EngineConfig,
    bucket_elements,
    check_extra,
    deepspeed_config,
    determinism,
    resolve_precision,
    resolve_stage,
)
from segformer.errors import ConfigError


def config(cfg=None, global_batch=16, micro_batch=2, world_size=4, precision="fp32"):
    return deepspeed_config(
        cfg or EngineConfig(zero_stage=1),
        BatchShape(global_batch, micro_batch, world_size),
        stage=1 if cfg is None else cfg.zero_stage,
        precision=precision,
        num_parameters=3_700_000,
    )


def test_bf16_is_autocast_and_never_a_whole_model_cast():
    made = config(precision="bf16")
    assert made["torch_autocast"] == {
        "enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []
    }  # fmt: skip
    assert "bf16" not in made
    assert "fp16" not in made


def test_extra_adds_keys_also_inside_zero_optimization():
    made = config(
        EngineConfig(zero_stage=3, extra={"zero_optimization": {"reduce_bucket_size": 7}, "dump_state": True})
    )
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["reduce_bucket_size"] == 7
    assert made["dump_state"] is True
    timed = config(EngineConfig(extra={"timers": {"throughput": {"enabled": True}}}))
    assert timed["timers"]["throughput"]["enabled"] is True


def test_what_deepspeed_is_told_of_this_machine_does_not_reach_jobs_on_others(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    check_extra(EngineConfig(extra={"dump_state": True}))
    assert "DS_ACCELERATOR" not in os.environ


@pytest.mark.parametrize(
    "extra",
    [{"train_batch_size": 3}, {"bf16": {}}, {"scheduler": {}}, {"optimizer": {}},
     {"communication_data_type": "bf16"}, {"zero_optimization": {"stage": 2}}, {"zero_optimization": 3}],
)  # fmt: skip
def test_extra_may_not_change_a_derived_key(extra):
    with pytest.raises(ConfigError, match=r"engine\.extra( sets|\.zero_optimization=3 must be a mapping)"):
        config(EngineConfig(zero_stage=1, extra=extra))


@pytest.mark.parametrize(
    "bad",
    [
        {"zero_stage": 4},
        {"precision": "fp8"},
        {"grad_dtype": "fp16"},
        {"grad_dtype": "bf16", "precision": "fp32"},
        {"grad_clip": -1.0},
        {"compile": True, "zero_stage": 3},
        {"offload_optimizer": True, "zero_stage": 0},
        {"offload_parameters": True, "zero_stage": 2},
    ],
)
def test_settings_without_sense_are_refused_by_name(bad):
    with pytest.raises(ConfigError, match=rf"engine\.{next(iter(bad))}"):
        EngineConfig(**bad)


def test_stage_and_precision_follow_the_device_unless_they_are_given():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolve_precision(EngineConfig(), cpu) == "fp32"
    assert [resolve_stage(EngineConfig(), device) for device in (cpu, gpu)] == [0, 1]
    assert resolve_stage(EngineConfig(offload_optimizer=True), cpu) == 1
    assert resolve_stage(EngineConfig(zero_stage=2), cpu) == 2


def test_a_gpu_that_emulates_bf16_trains_in_fp32(monkeypatch):
    """What torch asks on a T4, whose capability is 7.5."""
    for name, answer in {
        "is_available": True, "current_device": 0, "get_device_name": "Tesla T4",
        "get_device_properties": SimpleNamespace(major=7), "_check_bf16_tensor_supported": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    gpu = torch.device("cuda")
    assert resolve_precision(EngineConfig(), gpu) == "fp32"
    with pytest.raises(ConfigError, match="bf16 is not supported by Tesla T4; use fp32"):
        resolve_precision(EngineConfig(precision="bf16"), gpu)


def test_deterministic_holds_inside_its_block_only(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    for wanted in (False, True):
        with determinism(EngineConfig(deterministic=wanted)):
            assert torch.are_deterministic_algorithms_enabled() is wanted
        assert not torch.are_deterministic_algorithms_enabled()
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is wanted, "or torch refuses every product on a GPU"


def test_an_operation_that_adds_in_any_order_is_one_line_where_runs_must_repeat():
    said = r"^engine\.deterministic=true: put_ does not have a deterministic implementation$"
    with pytest.raises(ConfigError, match=said), determinism(EngineConfig(deterministic=True)):
        torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2))


def test_buckets_have_the_size_of_the_model_and_no_more_than_128_mib():
    assert config(EngineConfig(zero_stage=1))["zero_optimization"]["reduce_bucket_size"] == 3_700_000
    assert bucket_elements(10**9) * 4 == 128 * 2**20
    assert bucket_elements(3_320_163) == 3_320_164, "ZeRO-1 and 2 assert an even number"
    assert "reduce_bucket_size" not in config(EngineConfig(zero_stage=0))["zero_optimization"]


def test_offloading_is_asked_of_deepspeed_with_our_own_adamw():
    made = config(EngineConfig(zero_stage=3, offload_optimizer=True, offload_parameters=True))
    assert made["zero_force_ds_cpu_optimizer"] is False
    for key in ("offload_optimizer", "offload_param"):
        assert made["zero_optimization"][key]["device"] == "cpu"
