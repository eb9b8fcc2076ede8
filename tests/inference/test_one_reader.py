"""One reader of run directories: whichever way a run with an EMA is opened, the weights are the same bits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import make_run
from torch import Tensor

from segformer.errors import CheckpointError
from segformer.inference.convert import ConvertConfig, convert
from segformer.inference.export import ExportConfig, build, export, open_checkpoint
from segformer.models.segformer import SegFormer, build_model
from segformer.models.variants import ModelConfig

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
    with pytest.raises(CheckpointError, match=r"does not say its LayerNorm epsilons; give norm_profile"):
        SegFormer.from_pretrained(run[0])
    SegFormer.from_pretrained(run[0], norm_profile="mmseg")
    pretrained(run[0], run[0])
