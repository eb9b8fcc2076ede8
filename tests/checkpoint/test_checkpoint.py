"""Checkpoints as files: what is written is what is read, damage is found, the right ones are kept."""

import json
import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from checkpoints import nobody, tensors, write_checkpoint
from safetensors.torch import load_file

from segformer.checkpoint import atomic as commit
from segformer.checkpoint import checkpointer
from segformer.checkpoint import format as snapshot
from segformer.checkpoint.atomic import clean
from segformer.checkpoint.checkpointer import CheckpointConfig
from segformer.checkpoint.format import Checkpoint, TrainState
from segformer.checkpoint.reader import list_steps, load_checkpoint, open_run
from segformer.errors import CheckpointError, ConfigError

ALL_FILES = (*snapshot.FILES, snapshot.EMA, commit.MANIFEST)


def write(folder, step, averaged=True, cfg=None, **state):
    model, optimizer, ema = tensors(step)
    return write_checkpoint(
        model, optimizer, TrainState(step=step, **state), folder, ema if averaged else None, cfg
    )


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in right)


# -- what is written is what is read


@pytest.mark.parametrize("averaged", [False, True])
def test_a_round_trip_returns_every_tensor_bit_for_bit(tmp_path, averaged):
    state = {"order_spec": {"a": 1}, "data_digest": "d", "best_score": 0.5, "best_step": 7, "corrupt": [1, 2],
             "skipped": 3, "skipped_in_a_row": 1, "bad_step": 1, "settings": "steps: 9",
             "pixels": {"dtype": "uint16", "mean": [9.5], "std": [2.0]},
             "long_side": 320, "evaluated": 6, "evaluations": [{"step": 6, "miou": 0.5}]}  # fmt: skip
    assert {f.name for f in fields(TrainState)} == {"step", *state}, "a new field: give it a value here"
    path = write(tmp_path, 7, averaged, **state)
    loaded = load_checkpoint(tmp_path)
    model, optimizer, ema = tensors(7)
    assert same(loaded.model, model)
    assert same(loaded.optimizer, optimizer)
    assert same(loaded.ema, ema if averaged else {})
    assert loaded.state == TrainState(step=7, **state)
    assert same(load_file(path / "model.safetensors"), model), "as any reader of safetensors reads them"
    assert {file.name for file in path.iterdir()} == {*ALL_FILES} - (
        {snapshot.EMA} if not averaged else set()
    )


def test_files_have_the_permissions_of_the_umask(tmp_path):
    modes = {file.stat().st_mode & 0o777 for file in write(tmp_path, 7).iterdir()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_an_empty_folder_is_a_fresh_start_and_a_step_that_does_not_exist_names_those_that_do(tmp_path):
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "missing") is None
    write(tmp_path, 4)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9; it has \[4\]"):
        load_checkpoint(tmp_path, step=9)


@pytest.mark.parametrize(
    ("settings", "do"), [("steps: 9", "the command that began"), ("", "restore it from")]
)
def test_a_damaged_config_yaml_is_written_again_where_the_checkpoint_has_the_settings(tmp_path, settings, do):
    write(tmp_path / "checkpoints", 1, settings=settings)
    (tmp_path / "config.yaml").write_text("steps: [")
    with pytest.raises(CheckpointError, match=f"config.yaml can't be read .*; {do}"):
        open_run(tmp_path)


def test_an_opened_run_has_the_averaged_parameters_where_there_are_any_and_its_own_buffers(tmp_path):
    write(tmp_path / "run/checkpoints", 1)
    model, _, ema = tensors(1)
    opened = open_run(tmp_path / "run")
    assert same(opened.weights, model | ema)
    assert (opened.state.step, opened.config) == (1, {})
    write(tmp_path / "plain/checkpoints", 1, averaged=False)
    assert same(open_run(tmp_path / "plain").weights, model)
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        open_run(tmp_path / "none")


def of_another_version(folder, **state):
    """Step 3 as a version whose state has these fields would have written it."""
    writers = snapshot.writers_of(Checkpoint(*tensors(3), TrainState()))
    text = json.dumps({"step": 3} | state).encode()
    return commit.commit(
        folder, "step-00000003", writers | {"state.json": lambda path: path.write_bytes(text)}
    )


def test_a_state_of_another_version_is_one_clear_line_or_takes_defaults(tmp_path):
    path = of_another_version(tmp_path, skipped=5)
    assert load_checkpoint(tmp_path).state == TrainState(step=3, skipped=5)
    path.rename(tmp_path / "step-00000004")
    with pytest.raises(CheckpointError, match="holds step 3"):
        load_checkpoint(tmp_path)
    of_another_version(tmp_path / "new", best_miou=0.5, loader={"epoch": 1})
    for verify in (True, False):
        with pytest.raises(CheckpointError, match="has best_miou, loader, which this version does not know"):
            load_checkpoint(tmp_path / "new", quarantine=True, warn=nobody, verify=verify)
    assert list_steps(tmp_path / "new") == [3], "it is not damaged"


def test_all_is_on_the_disk_before_it_gets_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    """No kill shows this: the page cache outlives a process, but not the power."""
    log, sync, replace = [], os.fsync, Path.replace

    def logged_sync(descriptor):
        log.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def logged_replace(path, target):
        log.append((str(path), str(target)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", logged_sync)
    monkeypatch.setattr(Path, "replace", logged_replace)
    folder = tmp_path / "checkpoints"
    final = write(folder, 1)
    moved = next(i for i, entry in enumerate(log) if isinstance(entry, tuple))
    temporary, target = log[moved]
    assert target == str(final)
    assert log[:moved][0] == str(tmp_path), "the folder of the checkpoints is new itself"
    assert log[:moved][-1] == temporary
    assert sorted(log[1 : moved - 1]) == sorted(f"{temporary}/{name}" for name in ALL_FILES)
    assert log[moved - 2] == f"{temporary}/{commit.MANIFEST}"
    assert log[moved + 1 :] == [str(folder)]


# -- damage

DAMAGES = {
    "flip": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "delete": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ALL_FILES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(tmp_path, name, damage):
    write(tmp_path, 1)
    DAMAGES[damage](write(tmp_path, 2) / name)
    warnings = []
    assert load_checkpoint(tmp_path, warn=warnings.append).state.step == 1
    assert list_steps(tmp_path) == [1, 2], "who only reads a run leaves it as it is"
    assert load_checkpoint(tmp_path, warn=warnings.append, quarantine=True).state.step == 1
    assert (tmp_path / "bad-step-00000002").exists()
    assert "trying the one before" in warnings[0]
    assert list_steps(tmp_path) == [1]


def test_every_single_bit_of_the_manifest_counts(tmp_path):
    path = write(tmp_path, 1)
    good = (path / commit.MANIFEST).read_bytes()
    for bit in range(8 * len(good)):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        (path / commit.MANIFEST).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            commit.verify(path, snapshot.FILES)
    (path / commit.MANIFEST).write_bytes(good)
    assert set(commit.verify(path, snapshot.FILES)) == set(ALL_FILES) - {commit.MANIFEST}


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', '{"../state.json": {}}', '{"\\u0000": {}}', "[" * 10**5])
def test_a_manifest_that_is_none_is_damage(tmp_path, text):
    path = write(tmp_path, 1)
    (path / commit.MANIFEST).write_text(text)
    for digests in (True, False):
        with pytest.raises(CheckpointError, match="damaged"):
            commit.verify(path, snapshot.FILES, digests=digests)


def test_a_manifest_without_a_required_file_is_damage(tmp_path):
    path = commit.commit(tmp_path, "step-00000001", {"state.json": lambda path: path.write_text("{}")})
    with pytest.raises(CheckpointError, match=r"does not list model\.safetensors"):
        commit.verify(path, snapshot.FILES)


def test_only_damaged_checkpoints_never_mean_a_silent_fresh_start(tmp_path):
    DAMAGES["truncate"](write(tmp_path, 1) / "model.safetensors")
    with pytest.raises(CheckpointError, match="damaged"):  # sizes count without sums, too
        load_checkpoint(tmp_path, step=1, verify=False)
    for count in (1, 2):
        for _ in range(2):  # also at the next start, when it is already named bad-*
            with pytest.raises(CheckpointError, match="start from scratch"):
                load_checkpoint(tmp_path, warn=lambda text: None, quarantine=True)
        assert len(list(tmp_path.glob("bad-*"))) == count
        DAMAGES["truncate"](write(tmp_path, 1) / "model.safetensors")


# -- what is kept


def test_the_newest_the_best_and_every_so_many_are_kept(tmp_path):
    cfg = CheckpointConfig(save_every=1, keep_last=2, keep_every=4)
    for step in range(1, 12):
        write(tmp_path, step, cfg=cfg, best_score=0.9, best_step=min(step, 3))
    assert list_steps(tmp_path) == [3, 4, 8, 10, 11]
    assert not list(tmp_path.glob(".*"))


def test_a_save_never_deletes_itself_for_later_ones_and_nothing_before_it_is_there(tmp_path, monkeypatch):
    seen, delete = [], checkpointer.delete
    monkeypatch.setattr(
        checkpointer, "delete", lambda path: (seen.append(list_steps(tmp_path)), delete(path))[1]
    )
    for step in (5, 6, 2):
        write(tmp_path, step, cfg=CheckpointConfig(keep_last=1))
    assert seen == [[5, 6]]
    assert list_steps(tmp_path) == [2, 6]


def test_deletion_removes_a_link_and_not_what_it_points_to(tmp_path):
    precious = tmp_path / "elsewhere"
    precious.mkdir()
    (precious / "file").touch()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("step-00000001", ".tmp-step-00000009-ab", ".del-step-00000009-ab"):
        (folder / name).symlink_to(precious)
    write(folder, 2, cfg=CheckpointConfig(keep_last=1))
    clean(folder)
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]
    assert (precious / "file").exists()


def test_names_that_are_no_checkpoints_are_left_alone(tmp_path):
    for name in ("step-7", "step-00000007x", "step-\u00b2\u00b2\u00b2\u00b2\u00b2\u00b2\u00b2\u00b2", "best"):
        (tmp_path / name).mkdir()
    write(tmp_path, 1, cfg=CheckpointConfig(keep_last=1))
    assert list_steps(tmp_path) == [1]
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize(
    "wrong",
    [{"save_every": 0}, {"keep_last": 0}, {"keep_every": -1}, {"max_failures": 0}],
)
def test_a_setting_without_sense_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=rf"checkpoint\.{list(wrong)[-1]}"):
        CheckpointConfig(**wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("group", [0, 1, 2])
def test_no_value_that_is_not_finite_passes(tmp_path, value, group):
    model, optimizer, ema = groups = tensors()
    name = next(iter(groups[group]))
    groups[group][name][2, 3] = value
    with pytest.raises(CheckpointError, match=rf"{name} is not finite"):
        write_checkpoint(model, optimizer, TrainState(step=1), tmp_path, ema)
    assert list(tmp_path.iterdir()) == []


def test_empty_and_extreme_tensors_are_finite(tmp_path):
    model = {"none": torch.empty(0, 3), "extreme": torch.tensor([3.4e38, -3.4e38, 1e-45])}
    write_checkpoint(model, {}, TrainState(step=1), tmp_path)
    loaded = load_checkpoint(tmp_path)
    assert same(loaded.model, model)
    assert loaded.optimizer == {}
