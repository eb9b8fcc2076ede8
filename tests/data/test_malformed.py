"""No malformed data set passes in silence: one line and exit code 2, or exactly what the files hold.

Where the line names settings, they are applied, and the set that comes of it is held against the same count.
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import nano
import numpy as np
import pytest
import torch
from PIL import Image

from segformer.data.shards.format import ShardSet
from segformer.data.shards.reader import ShardReader
from segformer.data.sources.content import override
from segformer.data.sources.decode import decode_mask
from segformer.errors import SegformerError, error_line, reported
from segformer.evaluation.metrics import SegmentationScores
from segformer.inference.predictor import Predictor
from segformer.models.variants import VARIANTS
from segformer.training.config import RunConfig, compose

from .malformed import KINDS, Settings, true_counts

Command = Callable[..., list[str]]
_SETTING = re.compile(r"'(data\.\w+=[^']+)'|(?<![\w'])(data\.\w+=[\w.\[\],-]*[\w\]])")


def given(settings: Settings, overrides: list[str]) -> Settings:
    """The settings of `data` with overrides applied, as hydra reads them."""
    words = [shlex.split(override(f"data.{key}", value))[0] for key, value in settings.items()]
    data = compose(RunConfig, "config", ["data=folder", *words, *overrides]).data
    return {key: getattr(data, key) for key in ("classes", "splits", "label_map", "mask_colours")} | {
        key: getattr(data, key) for key in ("mask_dir", "split_lists", "val_share")
    }


def counts(shards: ShardSet, split: str) -> np.ndarray:
    """`true_counts` from the shards, whose index must agree."""
    total = len(shards.classes)
    found = np.zeros((total, total), np.int64)
    reader = ShardReader(shards.split(split))
    for sample_id in range(reader.split.num_samples):
        mask = decode_mask(reader.read(sample_id).target)
        rows, columns = np.indices(mask.shape)
        np.add.at(found, (mask[mask < 255], ((7 * rows + 3 * columns) % total)[mask < 255]), 1)
    assert shards.content["splits"][split]["class_pixels"] == found.sum(1).tolist()
    return found


def scores(found: np.ndarray) -> float:
    """mIoU by our metric from a confusion matrix."""
    return SegmentationScores.from_counts(torch.tensor(found)).miou


def check(name: str, seed: int, root: Path, command: Command) -> tuple[str, Settings]:
    """Shard a set of this kind; returns how it ended (passes, refused, repaired) and by which settings."""
    settings = KINDS[name].spoil(root / "set", np.random.default_rng([seed, *name.encode()]))
    words = [shlex.split(override(f"data.{key}", value))[0] for key, value in settings.items()]
    base = ["data=folder", f"root={root / 'set'}", f"output={root / 'out'}", "workers=1", *words]
    pasted: list[str] = []
    ended, line = "passes", ""
    for _ in range(4):
        refused: list[SegformerError] = []
        with reported(refused.append):
            command("shard", *base, *pasted)
        if not refused:
            break
        line, ended = error_line(refused[0]), "repaired"
        assert refused[0].exit_code == 2
        assert len(line.splitlines()) == 1, line
        assert not (root / "out").exists()
        named = [quoted or bare for quoted, bare in _SETTING.findall(line)]
        if not (new := [setting for setting in named if setting not in pasted]):
            return "refused", {}
        pasted.append(new[0])
    else:
        raise AssertionError(f"no remedy of {line!r} works: {pasted}")
    shards, told = ShardSet.open(root / "out"), given(settings, pasted)
    ours = {split: counts(shards, split) for split in told["splits"]}
    theirs = {split: true_counts(told, root / "set", split) for split in told["splits"]}
    if told["val_share"]:  # one folder, divided
        ours = {"all": ours["train"] + ours["val"]}
        theirs = {"all": theirs["train"]}
    for split, found in ours.items():
        np.testing.assert_array_equal(found, theirs[split], err_msg=f"{name} {seed} {split}")
        iou = [
            np.nan if (union := t[k].sum() + t[:, k].sum() - t[k, k]) == 0 else t[k, k] / union
            for t in (theirs[split],)
            for k in range(len(t))
        ]
        assert scores(found) == pytest.approx(np.nanmean(iou), abs=1e-12)
    return ended, told


@pytest.mark.parametrize("name", list(KINDS)[::2])  # the others among the two hundred
def test_a_malformed_set_ends_in_one_line_or_in_exactly_what_it_holds(
    name: str, tmp_path: Path, command: Command
) -> None:
    assert check(name, 0, tmp_path, command)[0] == KINDS[name].outcome


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_two_hundred_malformed_sets(seed: int, tmp_path: Path, command: Command) -> None:
    ended = {name: check(name, seed, tmp_path / name, command)[0] for name in KINDS}
    assert ended == {name: kind.outcome for name, kind in KINDS.items()}
    assert len(KINDS) * 5 >= 200


TRAINED = [
    *("palette_masks", "masks_of_16_bits", "suffixes_in_capitals", "nested_folders", "label_map_that_merges"),
    *("binary_0_and_255", "ids_off_by_one", "colored_masks", "class_never_in_training"),
]


@pytest.mark.slow
def test_the_scores_of_runs_are_those_of_the_files(
    tmp_path: Path,
    command: Command,
    tiny: Callable[..., list[str]],
    train_many: Callable[..., object],
    metrics: Callable[..., list[dict]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each set is sharded, trained on and predicted; the count is of predictions at the original files."""
    monkeypatch.setitem(VARIANTS, *nano.SIZE)
    told = {name: check(name, 6, tmp_path / name, command)[1] for name in TRAINED}
    options = [
        "model=nano",
        "steps=4",
        "augment.crop=[32,32]",
        "eval_batch=2",
        "optim.lr=1e-2",
        "data=folder",
    ]
    train_many(1, [tiny(f"run-{n}", *options, f"data.shards={tmp_path / n / 'out'}") for n in TRAINED])
    for name, settings in told.items():
        predictor = Predictor(tmp_path / f"run-{name}", device="cpu")

        def predict(
            mask: Path, files: Path = tmp_path / name / "set", predictor: Predictor = predictor
        ) -> np.ndarray:
            images = files / "images" / mask.parent.relative_to(files / "masks")
            (image,) = (path for path in images.iterdir() if path.stem == mask.stem and path.name[0] != ".")
            return predictor(np.asarray(Image.open(image).convert("RGB"))).mask

        found = true_counts(settings, tmp_path / name / "set", "val", predict)
        (row,) = metrics(tmp_path / f"run-{name}", "final")
        assert row["confusion"] == found.tolist(), name
