"""The shipped recipes against what their sources say, written out here: every parameter's lr and decay at the
steps where schedules go wrong, and the settings of the official runs as a table."""

import functools
import math
import re
from dataclasses import asdict, replace

import pytest
import torch
import yaml

from segformer.distributed.engine import EngineConfig
from segformer.errors import ConfigError
from segformer.models.segformer import MiTClassifier, build_encoder, build_model
from segformer.slurm.settings import SlurmConfig
from segformer.training.choices import CONF
from segformer.training.config import RunConfig, compose
from segformer.training.optim import build_optimizer, set_learning_rate

RECIPES = sorted(path.stem for path in CONF.glob("experiment/*.yaml"))


def recipe(name: str, *more: str) -> RunConfig:
    weights = ["model.pretrained=exports/ade"] if name == "finetune" else []
    return compose(RunConfig, "config", [f"experiment={name}", *weights, *more])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_states_goal_command_and_source_and_leaves_the_machine_alone(name):
    cfg = recipe(name)
    assert cfg.name == name
    assert bool(cfg.auto) == (name in ("finetune", "scratch"))
    assert (cfg.epochs, cfg.loss.class_weighting) == (None, "")
    assert max(cfg.optim.warmup_steps, cfg.eval_every, cfg.checkpoint.save_every) <= cfg.steps
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert text.startswith("# @package _global_\n# Goal: ")
    assert f"experiment={name}" in text[text.index("# Command: ") :]
    assert name == "sample" or "# Source: " in text
    settings = yaml.safe_load(text)
    assert not {"micro_batch", "run_dir", "loader", "telemetry"} & set(settings)
    assert not {"zero_stage", "precision", "compile", "timeout_s", "extra"} & set(settings.get("engine", {}))
    assert not [choice for choice in settings["defaults"] if "engine" in str(choice)]


@pytest.mark.parametrize(
    ("name", "schema"), [("recipe", RunConfig), ("engine", EngineConfig), ("cluster", SlurmConfig)]
)
def test_a_default_stands_in_the_dataclass_alone(name, schema):
    def leaves(node, prefix=()):
        for key, value in node.items():
            yield from leaves(value, (*prefix, key)) if isinstance(value, dict) else [((*prefix, key), value)]

    default = asdict(schema())
    for path in CONF.glob(f"{name}/*.yaml"):
        for keys, value in leaves(yaml.safe_load(path.read_text())):
            assert functools.reduce(dict.get, keys, default) != value, (path.name, keys)


def test_finetune_without_weights_is_one_clear_line():
    with pytest.raises(ConfigError, match=r"^model\.pretrained must be given.*add model\.pretrained=<file"):
        compose(RunConfig, "config", ["experiment=finetune"])


# Every row from NVlabs' configuration of that name; COCO-Stuff from section 4.1 of the paper.
OFFICIAL = {
    #                  data, variant, classes, steps, batch, crop, long and short side at scale 1
    "ade20k_160k": ("ade20k", "b0", 150, 160_000, 16, [512, 512], [2048, 512]),
    "ade20k_640_b5": ("ade20k", "b5", 150, 160_000, 16, [640, 640], [2048, 640]),
    "cityscapes_160k": ("cityscapes", "b0", 19, 160_000, 8, [1024, 1024], [2048, 1024]),
    "coco_stuff_80k": ("coco_stuff164k", "b0", 171, 80_000, 16, [512, 512], [2048, 512]),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_official_recipes_have_the_official_settings(name):
    cfg = recipe(name)
    found = (cfg.data.name, cfg.model.variant, len(cfg.data.classes), cfg.steps, cfg.global_batch)
    assert (*found, cfg.augment.crop, cfg.augment.resize) == OFFICIAL[name]
    augment = cfg.augment
    assert (augment.scale, augment.cat_max_ratio, augment.hflip) == ([0.5, 2.0], 0.75, 0.5)
    assert (augment.photometric, augment.photometric_strength) == (True, 1)
    absent = ("class_balanced_crop", "vflip", "rot90", "rotate", "mosaic", "copy_paste", "blur")
    assert [key for key in absent if getattr(augment, key)] == []
    assert (augment.mean, augment.std) == ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    loss = cfg.loss
    assert (loss.terms, loss.average, loss.class_weights) == ({"cross_entropy": 1.0}, "all", [])
    assert loss.label_smoothing == 0
    assert (cfg.model.drop_path_rate, cfg.model.dropout, cfg.model.norm_profile) == (0.1, 0.1, "original")
    assert (cfg.optim.betas, cfg.optim.eps, cfg.optim.ema) == ([0.9, 0.999], 1e-8, 0)
    assert (cfg.engine.grad_clip, cfg.engine.sync_batchnorm) == (0, True)
    assert (cfg.train_split, cfg.eval_split, cfg.eval_every) == ("train", "val", 4000)


def rates(model: torch.nn.Module, cfg: RunConfig, step: int) -> dict[str, tuple[float, float]]:
    """(lr, weight decay) of each parameter of `model` in optimiser step `step`, by name."""
    groups = build_optimizer(model, cfg.optim).param_groups
    set_learning_rate(groups, cfg.optim, step, cfg.steps)
    by_id = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(by_id) == sum(len(group["params"]) for group in groups), "a parameter is in two groups"
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters()}


def on_meta(cfg: RunConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(replace(cfg.model, pretrained=""), len(cfg.data.classes))


# mmcv's DefaultOptimizerConstructor under paramwise_cfg.custom_keys of NVlabs: (lr_mult, decay_mult) of the
# first key that the name holds, longest keys first and then in alphabetical order.
CUSTOM_KEYS = {"pos_block": (1, 0), "norm": (1, 0), "head": (10, 1)}


def multipliers(name: str) -> tuple[int, int]:
    keys = sorted(sorted(CUSTOM_KEYS), key=len, reverse=True)
    return next((CUSTOM_KEYS[key] for key in keys if key in name), (1, 1))


def mmcv_poly(base: float, step: int, steps: int) -> float:
    """PolyLrUpdaterHook(power=1, min_lr=0) under warmup='linear', warmup_iters=1500, warmup_ratio=1e-6."""
    regular = (base - 0.0) * (1 - step / steps) ** 1.0 + 0.0
    if step < 1500:
        return regular * (1 - (1 - step / 1500) * (1 - 1e-6))
    return regular


@pytest.mark.parametrize(("name", "model"), [*((name, None) for name in OFFICIAL), ("ade20k_160k", "b2")])
def test_every_parameter_has_the_official_lr_and_decay_throughout(name, model):
    cfg = recipe(name, *([f"model={model}"] if model else []))
    network, steps = on_meta(cfg), OFFICIAL[name][3]
    for step in (0, 1, 750, 1499, 1500, 1501, steps // 2, steps - 1):
        found = rates(network, cfg, step)
        for parameter, (lr, decay) in found.items():
            lr_mult, decay_mult = multipliers(parameter)
            expected = mmcv_poly(6e-5 * lr_mult, step, steps)
            assert lr == pytest.approx(expected, rel=1e-12), (parameter, step)
            assert decay == 0.01 * decay_mult, parameter


def test_the_names_that_the_patterns_meet_are_the_published_ones():
    network = on_meta(recipe("ade20k_160k"))
    names = dict(network.named_parameters())
    assert sum(parameter.numel() for parameter in names.values()) == 3_752_694  # NVlabs' B0 with 150 classes
    groups = {name: multipliers(name) for name in names}
    assert groups["backbone.patch_embed1.norm.weight"] == (1, 0)
    assert groups["backbone.block1.0.attn.norm.bias"] == (1, 0)
    assert groups["backbone.norm4.weight"] == (1, 0)
    assert groups["backbone.block3.1.attn.q.bias"] == (1, 1)
    assert groups["decode_head.linear_fuse.bn.weight"] == (10, 1)
    # 2 tensors each: 4 patch embeddings, 2 norms in 8 blocks, the norm after 6 reductions, 4 stages
    assert sum(pair == (1, 0) for pair in groups.values()) == 2 * (4 + 2 * 8 + 6 + 4)
    assert sum(pair == (10, 1) for pair in groups.values()) == 13


STEPS_OF_AN_EPOCH = 1251  # 1,281,167 images in batches of 1024, the rest dropped


def timm_cosine(epoch: float) -> float:
    """CosineLRScheduler(t_initial=300, lr_min=1e-5) at lr 1e-3, after the warm-up."""
    return 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 300))


def test_imagenet_has_the_lr_of_deit_at_every_epoch_and_decays_no_norm_and_no_bias():
    cfg = recipe("imagenet_300ep")
    assert cfg.steps == 300 * STEPS_OF_AN_EPOCH
    with torch.device("meta"):
        network = MiTClassifier(build_encoder(cfg.model), 1000)
    warm = 5 * STEPS_OF_AN_EPOCH
    for step in (0, 1, warm - 1, warm, warm + 1, cfg.steps // 2, cfg.steps - 1):
        expected = timm_cosine(step / STEPS_OF_AN_EPOCH)
        if step < warm:  # from 1e-6, in a straight line, of the curve below it
            expected *= 1e-3 + (1 - 1e-3) * step / warm
        for parameter, (lr, decay) in rates(network, cfg, step).items():
            assert lr == pytest.approx(expected, rel=1e-12), (parameter, step)
            spared = re.search(r"norm|\.bias$", parameter)
            assert decay == (0 if spared else 0.05), parameter
    first, last = (next(iter(rates(network, cfg, step).values()))[0] for step in (0, cfg.steps - 1))
    assert first == pytest.approx(1e-6)
    assert last == pytest.approx(1e-5, rel=1e-5)


def test_imagenet_has_the_augmentation_of_deit():
    cfg = recipe("imagenet_300ep")
    augment = cfg.classification
    assert (cfg.data.name, cfg.data.task, cfg.global_batch) == ("imagenet", "classification", 1024)
    assert (augment.size, augment.eval_resize, augment.scale, augment.hflip) == (224, 256, [0.08, 1], 0.5)
    assert augment.ratio == pytest.approx([3 / 4, 4 / 3])
    assert (augment.ops, augment.magnitude) == (2, 9)
    assert (augment.mixup, augment.cutmix, augment.mix_prob, augment.label_smoothing) == (0.8, 1, 1, 0.1)
    assert (cfg.model.drop_path_rate, cfg.engine.grad_clip, cfg.optim.ema) == (0.1, 0, 0)
    assert (cfg.optim.betas, cfg.optim.eps) == ([0.9, 0.999], 1e-8)


def test_finetune_lowers_the_lr_towards_the_image():
    given = ["steps=10000", "optim.lr=3e-5", "optim.head_lr_factor=10", "optim.warmup_steps=500"]
    cfg = recipe("finetune", "data=ade20k", "model=b2", *given)
    network = on_meta(cfg)
    found = rates(network, cfg, 5000)
    half = 0.5 * 3e-5
    assert found["decode_head.linear_pred.weight"][0] == pytest.approx(10 * half)
    # the norm is with the last of 3 + 4 + 6 + 3 blocks
    assert found["backbone.norm4.weight"][0] == pytest.approx(half * 0.95)
    assert found["backbone.block4.2.mlp.fc1.weight"][0] == pytest.approx(half * 0.95)
    assert found["backbone.block1.0.mlp.fc1.weight"][0] == pytest.approx(half * 0.95**16)
    assert found["backbone.patch_embed1.proj.weight"][0] == pytest.approx(half * 0.95**17)


DOCUMENT = CONF.parent / "docs/recipes.md"


def test_the_table_of_the_documentation_has_the_settings_of_the_recipes():
    text = DOCUMENT.read_text()
    text = text[: text.index("\n## ")]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)
    table = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    assert sorted(table) == RECIPES
    for name, (data, model, steps, batch, crop, lr, *_) in table.items():
        cfg = recipe(name)
        side = [cfg.classification.size] * 2 if cfg.data.task == "classification" else cfg.augment.crop
        yours = name in ("finetune", "scratch")
        assert data == ("yours" if yours else cfg.data.name), name
        assert model == ("yours" if yours else cfg.model.variant), name
        head = f", head x {cfg.optim.head_lr_factor:g}" if cfg.optim.head_lr_factor != 1 else ""
        found = {
            "steps": (steps.replace(",", ""), str(cfg.steps)),
            "global_batch": (batch, str(cfg.global_batch)),
            "augment.crop": (crop, " x ".join(map(str, side))),
            "optim.lr": (lr, f"{cfg.optim.lr:g}".replace("e-0", "e-") + head),
        }
        for key, (said, is_so) in found.items():
            assert said == ("sized" if key in cfg.auto else is_so), (name, key)
