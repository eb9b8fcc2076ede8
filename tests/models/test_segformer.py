"""SegFormer as a whole: the same function as transformers' port, the published sizes, any image size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_files import hf_config
from transformers import SegformerForSemanticSegmentation

from segformer.errors import ConfigError, DataError
from segformer.models.segformer import MiTClassifier, SegFormer, build_encoder, build_model
from segformer.models.variants import VARIANTS, ModelConfig

# Encoder, ADE20K (150 classes), Cityscapes (19), ImageNet classifier: of b0 to b5 those of the official
# checkpoints.
PARAMETERS = json.loads((Path(__file__).parent / "parameters.json").read_text())


def hf_model(name: str, num_classes: int) -> SegformerForSemanticSegmentation:
    """A transformers SegFormer; weights, biases and running statistics are random and of order one."""
    with torch.device("meta"):
        model = SegformerForSemanticSegmentation(hf_config(name, num_classes))
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and tensor.ndim > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.2)
                is_scale = name.endswith("weight")  # of a norm, the only vectors called weight
                tensor.add_(1.0 if is_scale else 0.0)
            else:
                tensor.zero_()
    return model


@pytest.mark.parametrize(
    ("variant", "size"),
    [("b0", (512, 512)), ("b1", (333, 497)), ("b2", (333, 497))]
    + [pytest.param(variant, (512, 512), marks=pytest.mark.slow) for variant in ("b3", "b4", "b5")],
)
def test_logits_equal_transformers_within_1e_4(variant, size, tmp_path):
    torch.manual_seed(0)
    theirs = hf_model(variant, 150)
    theirs.save_pretrained(tmp_path)
    ours = SegFormer.from_pretrained(tmp_path)
    images = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected, logits = theirs(images).logits, ours(images)
    assert expected.std() > 0.1, "logits too small for an absolute tolerance"
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_of_the_golden_file_and_the_sum_over_the_layers(variant):
    """The sum is counted from the sizes alone, layer by layer."""
    cfg = ModelConfig(variant=variant)
    with torch.device("meta"):
        models = [build_model(cfg, 150), build_model(cfg, 19), MiTClassifier(build_encoder(cfg))]
    counts = [sum(p.numel() for p in model.parameters()) for model in (models[0].backbone, *models)]
    sizes, total, inputs = VARIANTS[variant], 0, 3
    for stage, dim in enumerate(sizes.embed_dims):
        kernel, ratio, hidden = (7, 3, 3, 3)[stage], sizes.sr_ratios[stage], 4 * dim
        norm, square = 2 * dim, dim * dim + dim
        block = 2 * norm + 4 * square + (ratio * ratio * dim * dim + dim + norm if ratio > 1 else 0)
        block += dim * hidden + hidden + 9 * hidden + hidden + hidden * dim + dim
        total += kernel * kernel * inputs * dim + dim + norm + sizes.depths[stage] * block + norm
        inputs = dim
    width = sizes.decoder_dim
    head = sum(dim * width + width for dim in sizes.embed_dims) + 4 * width * width + 2 * width
    heads = [head + classes * (width + 1) for classes in (150, 19)]
    expected = [total, total + heads[0], total + heads[1], total + 1000 * (sizes.embed_dims[-1] + 1)]
    assert counts == PARAMETERS[variant] == expected


def test_a_model_of_1_3_billion_parameters_is_built_on_the_meta_device_without_memory():
    program = """
import torch
from segformer.models.segformer import build_model
from segformer.models.variants import ModelConfig
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
with torch.device("meta"):
    build_model(ModelConfig(variant="b0"), 2)
    before = resident()
    model = build_model(ModelConfig(variant="b5_w4"), 150)
print(sum(p.numel() for p in model.parameters()), resident() - before)
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    parameters, grown = map(int, answer.stdout.split())
    assert parameters == PARAMETERS["b5_w4"][1]
    assert grown < 50 << 20


@pytest.mark.parametrize("folded", [True, False])
def test_gradients_reach_every_parameter(folded):
    torch.manual_seed(0)
    model = build_model(ModelConfig(ops="fused" if folded else "reference", drop_path_rate=0.0), 3)
    # 64 x 64: with a single reduced token, as at 32 x 32, softmax is constant and q and k have no gradient
    logits = model(torch.randn(2, 3, 64, 64))
    logits.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # softmax does not see a constant added to all keys of a query
    assert [name for name in without if not name.endswith("kv.bias")] == []


def test_images_too_small_for_the_first_reduction_are_refused_with_their_size():
    with pytest.raises(DataError, match="28 x 64 pixels are too small"):
        build_model(ModelConfig(), 2)(torch.zeros(1, 3, 28, 64))


def test_classifier_scores_are_the_linear_map_of_the_mean_token():
    torch.manual_seed(0)
    model = MiTClassifier(build_encoder(ModelConfig()), num_classes=10).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        tokens = model.backbone(images)[-1].flatten(2)
        expected = tokens.sum(2) / tokens.shape[2] @ model.head.weight.t() + model.head.bias
        torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize(
    ("profile", "block", "embed"), [("original", 1e-6, 1e-5), ("hf", 1e-5, 1e-5), ("mmseg", 1e-6, 1e-6)]
)
def test_norm_profile_sets_every_layer_norm(profile, block, embed):
    backbone = build_encoder(ModelConfig(norm_profile=profile))
    norms = {name: m.eps for name, m in backbone.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    inner = {name for name in norms if "patch_embed" in name or ".attn." in name}
    assert inner
    assert {norms[name] for name in inner} == {embed}
    assert {eps for name, eps in norms.items() if name not in inner} == {block}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"variant": "b9"}, "model.variant=b9 is unknown; use one of b0, b1, b2, b3, b4, b5"),
        ({"norm_profile": "torch"}, "use one of original, hf, mmseg"),
        ({"drop_path_rate": 1.0}, "model.drop_path_rate=1.0 must be"),
        ({"dropout": -0.1}, "model.dropout=-0.1 must be"),
        ({"num_classes": 0}, "model.num_classes=0 must be"),
        ({"ops": "fast"}, "model.ops=fast is unknown; use one of fused, reference"),
        ({"checkpointing": [0, 1, 5]}, r"model.checkpointing has \[0, 5\]; give stages from 1 to 4"),
    ],
)
def test_wrong_settings_are_refused_by_name(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**wrong)


def test_class_count_that_differs_from_the_data_is_refused():
    with pytest.raises(ConfigError, match=r"model.num_classes=19, but the data set has 3"):
        build_model(ModelConfig(num_classes=19), 3)
