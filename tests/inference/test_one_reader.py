"""One reader of run directories: whichever way a run with an EMA is opened, the weights are the same bits."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nano
import pytest
import torch
from checkpoints import make_run, write_checkpoint
from torch import Tensor

from segformer.checkpoint.format import TrainState
from segformer.errors import CheckpointError, ConfigError, SegformerError, reported
from segformer.inference.convert import ConvertConfig, convert
from segformer.inference.export import ExportConfig, build, export, open_checkpoint
from segformer.models.segformer import SegFormer, build_model
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.models.weights.read import read_weights
from segformer.training.config import RunConfig, compose
from segformer.training.directory import keep_config

State = dict[str, Tensor]
STEP = "checkpoints/step-00000020"


def state_of(seed: int) -> State:
    torch.manual_seed(seed)
    return build_model(ModelConfig(norm_profile="mmseg", decoder_dim=64), 2).state_dict()


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, dict[int, State]]:
    """A run with optim.ema and two checkpoints, and the weights that each stands for."""
    raw = {step: state_of(step) for step in (10, 20)}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    ema = {
        step: {name: tensor for name, tensor in state_of(step + 1).items() if not name.endswith(buffers)}
        for step in raw
    }
    overrides = ("data=sample", "model.norm_profile=mmseg", "model.decoder_dim=64")
    return make_run(tmp_path / "run", raw, *overrides, ema=ema), {step: raw[step] | ema[step] for step in raw}


def pretrained(path: Path, out: Path) -> State:
    config = ModelConfig(norm_profile="mmseg", decoder_dim=64, pretrained=str(path))
    return build_model(config, 2).state_dict()


def converted(path: Path, out: Path) -> State:
    convert(ConvertConfig(checkpoint=str(path), output=str(out)))
    return SegFormer.from_pretrained(out).state_dict()


def exported(path: Path, out: Path) -> State:
    return SegFormer.from_pretrained(export(ExportConfig(checkpoint=str(path), output=str(out)))).state_dict()


READINGS: dict[str, Callable[[Path, Path], State]] = {
    "from_pretrained": lambda path, out: SegFormer.from_pretrained(path).state_dict(),
    "model.pretrained": pretrained,
    "convert": converted,
    "export": exported,
    "evaluate, predict and report": lambda path, out: build(open_checkpoint(path)).state_dict(),
}


@pytest.mark.parametrize("place", ["", STEP, f"{STEP}/model.safetensors"])
@pytest.mark.parametrize("reading", READINGS)
def test_every_reading_gives_the_ema_of_the_weights(
    run: tuple[Path, dict[int, State]], tmp_path: Path, reading: str, place: str
) -> None:
    folder, expected = run
    found = READINGS[reading](folder / place, tmp_path / "out")
    assert found.keys() == expected[20].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected[20].items())


def damage(folder: Path) -> None:
    file = folder / f"{STEP}/ema.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("reading", READINGS)
def test_with_the_newest_step_damaged_every_reading_falls_back_and_says_so(
    run: tuple[Path, dict[int, State]], tmp_path: Path, reading: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, expected = run
    damage(folder)
    found = READINGS[reading](folder, tmp_path / "out")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected[10].items())
    assert "step-00000020 is damaged" in (said := capsys.readouterr().out)
    assert "trying the one before it" in said


@pytest.mark.parametrize("reading", READINGS)
def test_a_damaged_step_that_is_asked_for_is_refused(
    run: tuple[Path, dict[int, State]], tmp_path: Path, reading: str
) -> None:
    damage(run[0])
    with pytest.raises(CheckpointError, match="step-00000020 is damaged"):
        READINGS[reading](run[0] / STEP, tmp_path / "out")


def test_a_run_says_its_epsilons_and_classes(run: tuple[Path, dict[int, State]]) -> None:
    model = SegFormer.from_pretrained(run[0])
    assert {model.backbone.norm1.eps, model.backbone.patch_embed1.norm.eps} == {1e-6}
    assert model.metadata.classes == ["background", "nucleus"]


def test_a_checkpoint_without_its_run_needs_its_epsilons(run: tuple[Path, dict[int, State]]) -> None:
    (run[0] / "config.yaml").unlink()
    SegFormer.from_pretrained(run[0])  # its checkpoints have them
    for step in (10, 20):
        write_checkpoint(run[1][step], {}, TrainState(step=step), run[0] / "checkpoints")
    with pytest.raises(CheckpointError, match=r"does not say its LayerNorm epsilons; give norm_profile"):
        SegFormer.from_pretrained(run[0])
    SegFormer.from_pretrained(run[0], norm_profile="mmseg")
    pretrained(run[0], run[0])


def cut_or_flipped(text: bytes, rng: random.Random) -> bytes:
    """The text without some of its lines, cut off, or with one to three bits flipped."""
    kind = rng.randrange(3)
    if kind == 0:
        lines = text.splitlines(keepends=True)
        start = rng.randrange(len(lines))
        del lines[start : start + rng.choice((1, 2, 8, 40))]
        return b"".join(lines)
    if kind == 1:
        return text[: rng.randrange(len(text))]
    damaged = bytearray(text)
    for _ in range(rng.randint(1, 3)):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def described(folder: Path) -> tuple[Any, ...]:
    """All that decides a score: weights, network, normalization and classes."""
    weights = read_weights(folder)
    total = sum(float(tensor.double().sum()) for tensor in weights.state.values())
    return total, weights.arch, weights.config(), weights.metadata


@pytest.mark.parametrize(("old", "count"), [(False, 200), (True, 60)])
def test_a_damaged_config_yaml_changes_no_score(
    old: bool, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, or what the checkpoint was trained with; of an older version one line, or what it says."""
    monkeypatch.setitem(VARIANTS, *nano.SIZE)
    settings = ("model.variant=nano", "model.norm_profile=hf", "augment.mean=[1,2,3]", "augment.std=[4,5,6]")
    model = build_model(ModelConfig(variant="nano"), 2).state_dict()
    folder = make_run(tmp_path / "run", {3: model}, "data=sample", *settings, old=old)
    file, rng, same, refused = folder / "config.yaml", random.Random(0), 0, 0
    text, wanted = file.read_bytes(), described(folder)
    for _ in range(count):
        file.write_bytes(cut_or_flipped(text, rng))
        errors: list[SegformerError] = []
        with reported(errors.append):
            same += described(folder) == wanted
        refused += [str(error).count("\n") for error in errors if "config.yaml" in str(error)] == [0]
    assert same + refused == count or old
    assert same > count // 4


def test_a_run_with_a_damaged_config_yaml_goes_on_and_mends_it(tmp_path: Path) -> None:
    """What the run must agree with stands in its checkpoints."""
    folder = make_run(tmp_path / "run", {3: {}}, "data=sample")
    file, given = folder / "config.yaml", ["data=sample", f"run_dir={folder}"]
    whole = file.read_bytes()
    cfg = compose(RunConfig, "config", given)
    other = replace(cfg, optim=replace(cfg.optim, lr=0.1))
    for damaged in (b"\xff", b"steps: 5", whole[:700]):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"another configuration \(optim.lr: 6e-05 -> 0.1\)"):
            keep_config(other, folder)
        assert file.read_bytes() == damaged
        keep_config(cfg, folder)
        assert file.read_bytes() == whole
