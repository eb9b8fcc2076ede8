"""The files of a checkpoint: committed whole or not at all, verified when read, pruned but for the best."""

import os

import pytest
import torch

from segformer import checkpoint
from segformer.checkpoint import (
    CheckpointConfig,
    TrainState,
    clean,
    list_steps,
    load_checkpoint,
    write_checkpoint,
)
from segformer.errors import CheckpointError


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    model = {"a.weight": torch.randn(5, 7, generator=generator), "bn.num_batches_tracked": torch.tensor(3)}
    return model, {"exp_avg.a.weight": torch.randn(5, 7, generator=generator)}


def write(folder, step, keep_last=3, **state):
    return write_checkpoint(
        *tensors(step), TrainState(step=step, **state), CheckpointConfig(keep_last=keep_last), folder
    )


def test_a_round_trip_returns_every_tensor_bit_for_bit(tmp_path):
    write(tmp_path, 7, order_spec={"seed": 3}, data_digest="d", best_miou=0.5, best_step=7)
    model, optimizer, state = load_checkpoint(tmp_path)
    for got, expected in zip((model, optimizer), tensors(7), strict=True):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert state == TrainState(step=7, order_spec={"seed": 3}, data_digest="d", best_miou=0.5, best_step=7)


def test_an_empty_folder_is_a_fresh_start(tmp_path):
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "missing") is None


DAMAGES = {
    "flip": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "flip the last bit": lambda path: path.write_bytes(
        path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])
    ),
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "delete": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.MANIFEST])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, name, damage):
    write(tmp_path, 1)
    DAMAGES[damage](write(tmp_path, 2) / name)
    warnings = []
    _, _, state = load_checkpoint(tmp_path, warn=warnings.append, quarantine=True)
    assert state.step == 1
    assert (tmp_path / "bad-step-00000002").exists()
    assert "trying the one before" in warnings[0]


def test_only_damaged_checkpoints_never_mean_a_silent_fresh_start(tmp_path):
    DAMAGES["truncate"](write(tmp_path, 1) / "model.safetensors")
    for _ in range(2):  # also at the next start, when it is already named bad-*
        with pytest.raises(CheckpointError, match="start from scratch"):
            load_checkpoint(tmp_path, warn=lambda text: None, quarantine=True)


def test_every_single_bit_of_the_manifest_counts(tmp_path):
    path = write(tmp_path, 1)
    good = (path / checkpoint.MANIFEST).read_bytes()
    for bit in range(8 * len(good)):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        (path / checkpoint.MANIFEST).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.read_checkpoint(path)
    (path / checkpoint.MANIFEST).write_bytes(good)
    checkpoint.read_checkpoint(path)


def test_who_only_reads_a_run_leaves_its_damaged_checkpoint_in_place(tmp_path):
    write(tmp_path, 1)
    DAMAGES["truncate"](write(tmp_path, 2) / "model.safetensors")
    assert load_checkpoint(tmp_path, warn=lambda text: None)[2].step == 1
    assert list_steps(tmp_path) == [1, 2]


def test_the_same_step_can_be_damaged_twice(tmp_path):
    write(tmp_path, 1)
    for count in (1, 2):
        DAMAGES["flip"](write(tmp_path, 2) / "state.json")
        assert load_checkpoint(tmp_path, warn=lambda text: None, quarantine=True)[2].step == 1
        assert len(list(tmp_path.glob("bad-*"))) == count


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step, keep_last=2, best_miou=0.9, best_step=min(step, 3))
    assert list_steps(tmp_path) == [3, 5, 6]


def test_a_tensor_that_is_not_finite_is_never_saved(tmp_path):
    model, optimizer = tensors()
    model["a.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"a\.weight is not finite"):
        write_checkpoint(model, optimizer, TrainState(step=1), CheckpointConfig(), tmp_path)
    assert list(tmp_path.iterdir()) == []


class Crash(BaseException):
    """Power goes at this call."""


@pytest.mark.parametrize("at", range(40))
def test_a_crash_at_any_call_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch, at):
    write(tmp_path, 1)
    count = -1

    def crashing(real):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                raise Crash
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "fsync", crashing(os.fsync))
    monkeypatch.setattr(os, "open", crashing(os.open))
    monkeypatch.setattr(type(tmp_path), "open", crashing(type(tmp_path).open))
    monkeypatch.setattr(type(tmp_path), "rename", crashing(type(tmp_path).rename))
    monkeypatch.setattr(type(tmp_path), "mkdir", crashing(type(tmp_path).mkdir))
    crashed = False
    try:
        write(tmp_path, 2, keep_last=1)
    except Crash:
        crashed = True
    monkeypatch.undo()
    if not crashed:
        assert count < at, "every crash point before this one was tried"
        assert list_steps(tmp_path) == [2]
        return
    _, _, state = load_checkpoint(tmp_path, warn=lambda text: pytest.fail(text))
    assert state.step in (1, 2)
    clean(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_full_disk_is_one_error_and_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert list_steps(tmp_path) == [1]
    assert load_checkpoint(tmp_path)[2].step == 1


def test_a_step_that_does_not_exist_names_those_that_do(tmp_path):
    write(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9; it has \[4\]"):
        load_checkpoint(tmp_path, step=9)
