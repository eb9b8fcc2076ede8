"""The forecast of memory: closed forms by hand, and autograd's saved bytes of a real forward on the CPU."""

import pytest
import torch

from segformer.distributed.engine import bucket_elements
from segformer.doctor.memory import Forecast, activation_bytes, forecast, state_bytes
from segformer.models.segformer import build_classifier, build_model
from segformer.models.variants import ModelConfig
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


def test_activations_grow_with_batch_and_area_and_shrink_in_bf16() -> None:
    def measured(crop: tuple[int, int], batch: int, bf16: bool = False) -> int:
        return activation_bytes(MODEL, CLASSES, crop=crop, micro_batch=batch, bf16=bf16)

    # What does not depend on the batch (folded weights, weights in bf16) cancels in the differences.
    batches = [measured((128, 128), batch) for batch in (1, 2, 4)]
    assert batches[2] - batches[1] == pytest.approx(2 * (batches[1] - batches[0]), rel=1e-3)
    assert measured((256, 256), 1) - batches[0] == pytest.approx(3 * (batches[1] - batches[0]), rel=0.05)
    assert (
        0.5 * batches[2] < measured((128, 128), 4, bf16=True) < 0.9 * batches[2]
    )  # the residual stream stays fp32


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


def whole(stage: int, **changes: int | str) -> Forecast:
    options = {"micro_batch": 2, "world_size": 8, "precision": "fp32"} | changes
    return forecast(MODEL, CLASSES, crop=(64, 64), zero_stage=stage, **options)  # type: ignore[arg-type]


def test_a_forecast_adds_up_and_counts_what_deepspeed_allocates() -> None:
    found = whole(1)
    assert found.num_parameters == sum(p.numel() for p in build_model(MODEL, CLASSES).parameters())
    assert found.total == sum(found.parts.values())
    assert whole(0).buckets == 0
    assert found.buckets == 2 * 4 * bucket_elements(found.num_parameters), "a small model has small buckets"
    assert whole(1, ema=True).total - found.total == 4 * -(-found.num_parameters // 8)
    assert whole(1, offload=True, ema=True).total == found.total - found.optimizer
    assert whole(1, precision="bf16", bucket=1000).buckets == 2 * 2 * 4 * 1000
    assert whole(3, bucket=1000).buckets == 4 * 1000 + 4 * found.num_parameters


def test_a_classifier_keeps_less_than_the_segmentation_model() -> None:
    options = {"crop": (64, 64), "micro_batch": 2, "world_size": 1, "zero_stage": 0, "precision": "fp32"}
    found = forecast(MODEL, CLASSES, task="classification", **options)  # type: ignore[arg-type]
    network = build_classifier(MODEL, CLASSES)
    assert found.num_parameters == sum(parameter.numel() for parameter in network.parameters())
    assert found.loss == 0
    assert found.activations < forecast(MODEL, CLASSES, **options).activations  # type: ignore[arg-type]
