"""Training, evaluation and export from Python: the numbers of the commands, in one process."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import cv2
import nano
import nbclient
import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

import segformer
from segformer.checkpoint.reader import newest_state
from segformer.data.shards.format import ShardSet
from segformer.errors import ConfigError, DataError
from segformer.inference.export import open_checkpoint
from segformer.models.variants import VARIANTS
from segformer.training.config import RunConfig, compose

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ["background", "nucleus"]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Keywords of a run of four steps of MiT-nano."""
    monkeypatch.setitem(VARIANTS, *nano.SIZE)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return {
        "model": "nano", "run_dir": tmp_path / "run", "steps": 4, "global_batch": 4, "eval_every": 2,
        "overlays": 0, "augment": {"crop": [64, 64]}, "optim": {"lr": 1e-2, "betas": [0.9, 0.99]},
        "loader": {"workers": 0},
    }  # fmt: skip


class Nuclei(torch.utils.data.Dataset):
    """A set of one's own: some images as paths, some as arrays, the masks alike."""

    def __init__(self, root, split):
        self.images = sorted((root / "images" / split).iterdir())
        self.masks = sorted((root / "masks" / split).iterdir())

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, mask = self.images[index], self.masks[index]
        if index % 2:
            image, mask = (
                cv2.imread(str(image))[..., ::-1],
                torch.from_numpy(cv2.imread(str(mask), -1)).long(),
            )
        return image, mask


def in_a_thread(function):
    """What a call gives, or raises, where no handlers of signals can be set."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.slow
def test_a_dataset_is_trained_on_twice_in_one_process_and_continued_in_a_thread(tiny_root, small, tmp_path):
    sets = {"train": Nuclei(tiny_root, "train"), "val": Nuclei(tiny_root, "val"), "classes": CLASSES}
    before = signal.getsignal(signal.SIGTERM)
    result = segformer.train("experiment=scratch", **sets, **small)
    assert (result.run, result.export) == (tmp_path / "run", tmp_path / "run/export")
    assert open_checkpoint(result.best).provenance["step"] == result.best_step
    shards = ShardSet.open(str(tmp_path / "run/data"))
    assert [shards.split(name).num_samples for name in ("train", "val")] == [16, 3]
    assert not (tmp_path / "run/.data").exists()
    state = newest_state(tmp_path / "run/checkpoints")
    assert (result.best_step, result.best_score) == (state.best_step, state.best_score)

    again = small | {"run_dir": tmp_path / "again"}
    in_a_thread(lambda: segformer.train("experiment=scratch", **sets, **again, stop_at=2))
    other = in_a_thread(lambda: segformer.train("experiment=scratch", **sets, **again))
    assert other.scores.to_dict() == result.scores.to_dict()
    assert signal.getsignal(signal.SIGTERM) == before
    assert multiprocessing.active_children() == []

    scores = segformer.evaluate(result.run, loader={"workers": 0})
    assert scores.confusion == result.scores.confusion
    out = segformer.export(result.run, output=tmp_path / "exported", step="best")
    masks = [segformer.Predictor(out, device="cpu")(str(path)).mask for path in sets["val"].images]
    assert [mask.shape for mask in masks] == [cv2.imread(str(p)).shape[:2] for p in sets["val"].images]


def test_settings_are_those_of_the_command_line(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr("segformer.api.run_job", lambda cfg: taken.append(cfg))
    monkeypatch.setattr("segformer.api.newest_state", lambda folder: None)
    segformer.train(
        "experiment=sample", run_dir=tmp_path, optim={"lr": 1e-3, "betas": (0.9, 0.95)}, micro_batch=None,
        data={"label_map": {7: 1}, "classes": ["a (b)", "c"]}, augment={"hflip": 0, "photometric": False},
    )  # fmt: skip
    written = [
        "experiment=sample", f"run_dir={tmp_path}", "optim.lr=1e-3", "optim.betas=[0.9,0.95]",
        "micro_batch=null", "data.label_map={7: 1}", 'data.classes=["a (b)","c"]', "augment.hflip=0",
        "augment.photometric=false",
    ]  # fmt: skip
    assert taken == [compose(RunConfig, "config", written)]
    segformer.train(taken[0])
    assert taken[1] == taken[0]
    assert taken[1] is not taken[0]
    for more in (("steps=4",), ()):
        with pytest.raises(ConfigError, match="a RunConfig has all settings"):
            segformer.train(taken[0], *more, **({} if more else {"steps": 4}))
    with pytest.raises(ConfigError, match=r"^stps is not a setting; did you mean steps\?$"):
        segformer.train("experiment=sample", stps=4)
    with pytest.raises(ConfigError, match=r"^stp is not a setting; did you mean step\?$"):
        segformer.evaluate(tmp_path, stp=4)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            (np.zeros((8, 8, 3)), np.zeros((8, 8), int)),
            r"train\[1\]: .*float64 \(8, 8, 3\); of values from 0",
        ),
        ((np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8))), r"train\[1\]: its mask is an array of float64"),
        ((np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 300)), r"train\[1\]: its mask has ids from 300"),
        (np.zeros((8, 8, 3), np.uint8), r"train\[1\]: it is a ndarray; an item is a pair"),
        (("absent.jpg", np.zeros((8, 8), int)), r"train\[1\]: No such file"),
        (("a.gif", np.zeros((8, 8), int)), r"train\[1\]: 'a.gif' is no file of .jpg"),
        (
            (np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 2)),
            r"^mask train\[1\] holds the ids 2, outside 0 to 1",
        ),
        (
            (np.zeros((8, 8, 3), np.uint8), np.eye(9, dtype=int)),
            r"^mask train\[1\] is 9 x 9 pixels, its image 8 x 8",
        ),
    ],
)
def test_an_item_that_cant_be_learnt_from_is_named(tmp_path, item, message):
    good = [(Image.fromarray(np.full((8, 8, 3), k, np.uint8)), np.eye(8, dtype=int)) for k in (1, 2, 3)]
    with pytest.raises(DataError, match=message):
        segformer.train(train=[good[0], item], val=good[1:], classes=CLASSES, run_dir=tmp_path / "run")
    assert not (tmp_path / "run/.data").exists()


def test_a_dataset_needs_names_a_length_and_both_splits(tmp_path):
    pairs = [(np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=int))]
    for given, message in (
        ({"train": pairs, "val": pairs}, "classes is empty"),
        ({"train": pairs, "classes": CLASSES}, "val is no dataset"),
        ({"train": iter(pairs), "val": pairs, "classes": CLASSES}, "train is no dataset"),
        ({"train": [], "val": pairs, "classes": CLASSES}, "train is empty"),
        ({"train": pairs, "val": pairs, "classes": "ab"}, "classes='ab' is one text"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            segformer.train(run_dir=tmp_path / "run", **given)
        assert not (tmp_path / "run").exists()


def test_other_pairs_and_an_error_of_the_dataset_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("segformer.api.run_job", lambda cfg: None)
    monkeypatch.setattr("segformer.api.newest_state", lambda folder: None)
    pairs = [(np.full((8, 8, 3), k, np.uint8), np.eye(8, dtype=int)) for k in range(4)]
    given = {"classes": CLASSES, "run_dir": tmp_path / "run"}
    segformer.train(train=pairs[:2], val=pairs[2:3], **given)
    segformer.train(train=pairs[:2], val=pairs[2:3], **given)  # known again
    with pytest.raises(DataError, match=r"holds other pairs, .*; give these, or another name="):
        segformer.train(train=pairs[1:2], val=pairs[2:3], **given)

    class Broken(list):
        def __getitem__(self, index):
            raise KeyError(index)

    with pytest.raises(KeyError) as raised:
        segformer.train(train=Broken(pairs), val=pairs, **given)
    assert raised.value.__notes__ == ["raised by train[0] of the dataset"]


@pytest.mark.slow
def test_a_script_without_a_guard_ends_with_one_line_that_names_it(tiny_shards, tmp_path):
    (tmp_path / "x.py").write_text(
        f"import segformer\nsegformer.train('experiment=sample', 'data.shards={tiny_shards}', steps=1, "
        f"run_dir={str(tmp_path / 'run')!r}, loader={{'workers': 1}}, global_batch=2, "
        "augment={'crop': [64, 64]}, optim={'warmup_steps': 0})\n"
    )
    line = [sys.executable, str(tmp_path / "x.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert 'put what it does below if __name__ == "__main__":' in done.stderr.splitlines()[-1]
    assert done.stderr.count("Traceback") == 1
    assert "WorkerLost" not in done.stderr


def blocks():
    """The examples of docs/python.md."""
    return re.findall(r"^```py\n(.*?)^```$", (ROOT / "docs/python.md").read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_examples_of_the_document_run(tiny_root, tiny_shards, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, target in (("photos", tiny_root), ("data/mine", tiny_shards)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(target)
    first, second, *_ = sorted((tiny_root / "images/val").iterdir())
    Image.open(first).convert("RGB").save("photo.jpg")
    Image.open(second).convert("L").save("gray.png")
    short = ["model=nano", "steps=2", "global_batch=2", "eval_every=2", "overlays=0", "augment.crop=[64,64]"]

    def shortened(schema, name, overrides):
        more = {"config": [*short, "loader.workers=0"], "evaluate": ["loader.workers=0"]}.get(name, [])
        return compose(schema, name, [*overrides, *more])

    monkeypatch.setattr("segformer.api.compose", shortened)
    predict, more, train, arrays = blocks()
    names = {"names": [path.stem for path in (tiny_root / "images/train").iterdir()]}
    for code in (train, predict, more, arrays):
        exec(code, names)
    assert names["scores"].miou == pytest.approx(names["result"].scores.miou, abs=1)
    assert Path("overlay.jpg").exists()
    assert names["several"][0].probabilities.shape[0] == 2


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tiny_root, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(ROOT / "docs/first_hour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    short = 'steps=2, global_batch=2, overlays=1, augment={"crop": [64, 64]}, loader={"workers": 0}'
    for cell in notebook.cells:
        cell.source = cell.source.replace("../data_prep/sample", str(tiny_root)).replace("steps=100", short)
    done = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": tmp_path}}
    ).execute()
    printed = [out for cell in done.cells for out in cell.get("outputs", [])]
    assert sum("image/png" in out.get("data", {}) for out in printed) == 2  # the curve, the overlay
    text = "".join(out.get("text", "") for out in printed)
    assert "shards: data/sample" in text
    assert (tmp_path / "exports/sample/model.safetensors").is_file()
