"""What only a GPU shows: the same function on it, bf16, torch.compile, and a run of several steps."""

import copy
import os

import pytest
import torch

from segformer.data.loading.crop import AugmentConfig
from segformer.data.loading.photometric import Normalize, draw_distortion
from segformer.data.loading.samples import sample_rng
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig
from segformer.training.losses import LossConfig, SegmentationLoss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch sees none"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),  # fp32 is meant as it is
]


@pytest.fixture
def pair():
    """MiT-B0 on the CPU and the same on the GPU."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(variant="b0", drop_path_rate=0, dropout=0), 19)
    return model, copy.deepcopy(model).cuda()


def test_logits_and_gradients_equal_the_cpu_s(pair, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images = torch.randn(2, 3, 96, 128)
    target = torch.randint(0, 19, (2, 96, 128), dtype=torch.uint8)
    target[:, :9] = 255
    criterion = SegmentationLoss(LossConfig(terms={"cross_entropy": 1.0, "dice": 0.5}), 19)
    losses = []
    for model, device in zip(pair, ("cpu", "cuda"), strict=True):
        logits = model(images.to(device))
        loss, _ = criterion(logits, target.to(device))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for (name, left), right in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        difference = (left.grad - right.grad.cpu()).norm()
        assert difference < 1e-3 * left.grad.norm() + 1e-6, name


def test_device_augmentation_equals_the_cpu_s_within_a_grey_level():
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    cfg = AugmentConfig()
    drawn = torch.tensor([draw_distortion(1.0, sample_rng(0, 0, i)) for i in range(4)])
    normalize = Normalize(cfg.mean, cfg.std)
    left = normalize(images, drawn)
    right = normalize.cuda()(images.cuda(), drawn.cuda()).cpu()
    close = (left - right).abs() <= 2 / 57  # two grey levels in units of the standard deviation
    assert close.float().mean() > 0.99


def test_bf16_autocast_stays_near_fp32_and_compiled_equals_eager(pair):
    model = pair[1].eval()
    images = torch.randn(2, 3, 128, 128, device="cuda")
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            eager = model(images).float()
            compiled = torch.compile(model, fullgraph=True)(images).float()
    scale = exact.abs().max()
    assert (eager - exact).abs().max() < 0.05 * scale
    assert (compiled - eager).abs().max() < 0.05 * scale


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_in_bf16_and_compiled_learns_and_continues(tiny, tmp_path, run_ranks, metrics, stage):
    options = [
        f"engine.zero_stage={stage}",
        "engine.precision=bf16",
        f"engine.compile={str(stage < 3).lower()}",
        "loader.workers=2",
    ]
    environment = {
        "DS_ACCELERATOR": "cuda",
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0"),
    }
    run_ranks(1, "launch/train.py", *tiny("gpu", *options), env=environment)
    losses = [line["loss"] for line in metrics(tmp_path / "gpu")]
    assert sum(losses[-5:]) < sum(losses[:5])
    output = run_ranks(1, "launch/train.py", *tiny("gpu", *options), env=environment)[0]
    assert "continuing from step 20" in output
