"""The forecast of memory: closed forms by hand, and autograd's saved bytes of a real forward on the CPU."""

from typing import Any

import pytest
import torch

from segformer.data.loading.classification import ClassificationAugment
from segformer.data.loading.crop import AugmentConfig
from segformer.data.loading.order import BatchShape
from segformer.data.sources.dataset import DatasetConfig
from segformer.distributed.engine import EngineConfig, bucket_elements
from segformer.doctor.memory import activation_bytes, forecast, state_bytes
from segformer.models.segformer import build_classifier, build_model
from segformer.models.variants import ModelConfig
from segformer.training.config import RunConfig
from segformer.training.losses import LossConfig, SegmentationLoss
from segformer.training.optim import OptimConfig, build_optimizer

MODEL = ModelConfig(variant="b0")
CLASSES = 19


def saved_by_a_real_step(crop: tuple[int, int], batch: int, bf16: bool) -> tuple[int, int]:
    """(bytes kept after the model, after the loss) of a real forward on the CPU, by storage address."""
    model = build_model(MODEL, CLASSES).train()
    criterion = SegmentationLoss(LossConfig(terms={"cross_entropy": 1.0}), CLASSES)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(torch.rand(batch, 3, *crop))
        after_model = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        criterion(logits, torch.randint(0, CLASSES, (batch, *crop)))
        after_loss = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return after_model, after_loss


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("crop", "batch"), [((64, 64), 2), ((96, 128), 1)])
def test_activations_are_what_a_real_forward_keeps(crop: tuple[int, int], batch: int, bf16: bool) -> None:
    real, with_loss = saved_by_a_real_step(crop, batch, bf16)
    ours = activation_bytes(MODEL, CLASSES, crop=crop, micro_batch=batch, bf16=bf16, norms_in_fp32=False)
    assert ours == pytest.approx(real, rel=0.02)
    # The loss keeps the gradient of the logits, in fp32.
    gradient = 4 * batch * CLASSES * (crop[0] // 4) * (crop[1] // 4)
    assert with_loss - real == pytest.approx(gradient, rel=0.01)


def test_norms_in_fp32_keep_a_part_of_bf16_activations_in_fp32() -> None:
    fp32, bf16, plain = (
        activation_bytes(MODEL, CLASSES, crop=(128, 128), micro_batch=4, bf16=bf16, norms_in_fp32=norms)
        for bf16, norms in ((False, True), (True, True), (True, False))
    )
    assert plain < bf16 < 0.9 * fp32


@pytest.mark.parametrize(
    ("stage", "ranks", "parameters", "gradients", "optimizer"),
    [
        (0, 4, 4000, 4000, 8000),
        (1, 4, 4000, 4000, 3000),
        (2, 4, 4000, 1000, 3000),
        (3, 4, 1000, 1000, 3000),
        (2, 3, 4000, 1336, 4008),  # 334 of 1000 parameters on the fullest rank
    ],
)
def test_states_follow_the_formulas_of_zero(
    stage: int, ranks: int, parameters: int, gradients: int, optimizer: int
) -> None:
    expected = {"parameters": parameters, "gradients": gradients, "optimizer": optimizer}
    assert state_bytes(1000, world_size=ranks, zero_stage=stage) == expected


def test_states_of_one_rank_are_those_of_a_real_optimiser() -> None:
    model = build_model(MODEL, CLASSES)
    optimizer = build_optimizer(model, OptimConfig())
    loss = model(torch.rand(1, 3, 32, 32)).sum()
    loss.backward()
    optimizer.step()
    count = sum(parameter.numel() for parameter in model.parameters())
    moments = sum(
        tensor.nbytes
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if name != "step"
    )
    gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
    expected = state_bytes(count, world_size=1, zero_stage=0)
    assert (4 * count, gradients, moments) == tuple(expected.values())


def whole(stage: int, micro: int = 2, ranks: int = 8, **changes: Any) -> dict[str, int]:
    engine = EngineConfig(
        zero_stage=stage,
        precision=changes.pop("precision", "fp32"),
        offload_optimizer=changes.pop("offload", False),
        extra={"zero_optimization": changes.pop("zero", {})},
    )
    augment = AugmentConfig(crop=[64, 64])
    cfg = RunConfig(model=MODEL, engine=engine, augment=augment, **changes)
    return forecast(cfg, CLASSES, BatchShape(micro * ranks, micro, ranks))


def test_a_forecast_counts_what_deepspeed_allocates() -> None:
    count = sum(p.numel() for p in build_model(MODEL, CLASSES).parameters())
    found, average, total = whole(1), OptimConfig(ema=0.9), sum(whole(1).values())
    assert found["parameters"] == 4 * count
    assert whole(0)["buckets"] == 0
    assert found["buckets"] == 2 * 4 * bucket_elements(count), "a small model has small buckets"
    assert sum(whole(1, optim=average).values()) - total == 4 * -(-count // 8)
    assert sum(whole(1, offload=True, optim=average).values()) == total - found["optimizer"]
    bucket = {"reduce_bucket_size": 1000}
    assert whole(1, precision="bf16", zero=bucket)["buckets"] == 2 * 2 * 4 * 1000
    assert whole(3, zero=bucket)["buckets"] == 4 * 1000 + 4 * count


def test_a_classifier_keeps_less_than_the_segmentation_model() -> None:
    data, view = DatasetConfig(task="classification"), ClassificationAugment(size=64)
    found = whole(0, ranks=1, data=data, classification=view)
    network = build_classifier(MODEL, CLASSES)
    assert found["parameters"] == 4 * sum(parameter.numel() for parameter in network.parameters())
    assert found["loss"] == 0
    assert found["activations"] < whole(0, ranks=1)["activations"]
