"""The doctor: typical mistakes are found in one pass, named with their remedy, and decide the exit code."""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from segformer.data.shards.sharding import write_shards
from segformer.data.sources.content import FAIL, OK, WARN, Finding
from segformer.data.sources.dataset import DatasetConfig
from segformer.doctor import doctor as doctor_module
from segformer.doctor.doctor import DoctorConfig, doctor, look
from segformer.doctor.judge import judge_sets
from segformer.doctor.report import Report, as_json, as_text
from segformer.doctor.scan import SplitScan
from segformer.errors import ConfigError
from segformer.training.config import compose

CLASSES = ["sky", "road", "tree"]
pytestmark = pytest.mark.usefixtures("quick")
Masks = Callable[[int], np.ndarray]


def three_classes(number: int) -> np.ndarray:
    """Ids 0, 1, 2 in vertical stripes and a corner of 255; no two alike."""
    mask = np.repeat(np.array([0, 1, 2], np.uint8), 16)[None].repeat(40, 0)
    mask[: 2 + number, :3] = 255
    return mask


def write_set(root: Path, masks: Masks = three_classes, train: int = 5, val: int = 3) -> Path:
    """Random JPEGs of 40 x 48 pixels with the masks of a function of their number."""
    rng = np.random.default_rng(3)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            image = cv2.resize(rng.integers(0, 256, (5, 6, 3), np.uint8), (48, 40))
            cv2.imwrite(str(root / "images" / split / f"{number}.jpg"), image)
            cv2.imwrite(str(root / "masks" / split / f"{number}.png"), masks(number))
    return root


def examined(root: Path | str, *overrides: str, pictures: int = 0) -> Report:
    """What the doctor says of a folder, with settings of a small run."""
    given = ["data=folder", "steps=10", "global_batch=4", "augment.crop=[32,32]", f"root={root}"]
    given += ["augment.resize=[]", "optim.lr=1e-3", "optim.warmup_steps=1", "eval_every=2"]
    given += [] if any("classes=" in o for o in overrides) else [f"data.classes={CLASSES}"]
    return look(compose(DoctorConfig, "doctor", [*given, f"pictures={pictures}", *overrides]))


def texts(report: Report, level: str) -> list[str]:
    return [f"{finding.about}: {finding.text}" for finding in report.findings if finding.level == level]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forecast of memory that costs no forward; tests/doctor/test_memory.py is about the real one."""
    monkeypatch.setattr(doctor_module, "forecast", lambda *_: {"parameters": 2**26})


def test_a_sound_folder_passes_with_its_statistics(tmp_path: Path) -> None:
    report = examined(write_set(tmp_path / "set"), pictures=6)
    assert not report.failures
    assert texts(report, WARN) == []
    train = report.source[0]
    assert train.class_images.tolist() == [5, 5, 5]
    assert train.class_pixels.sum() + train.ignored_pixels == 5 * 40 * 48
    assert train.ignored_pixels == sum(3 * (2 + number) for number in range(5))
    assert report.sheets.keys() == {"source"}
    share = f"{100 * (5 * 640 - train.ignored_pixels) / (5 * 1920 - train.ignored_pixels):.3g} %"
    rarest = f"all 3 seen; the rarest is 'sky', {share} of the labelled pixels, in 5 of 5 images"
    assert f"train: classes: {rarest}" in texts(report, OK)
    assert any("10 steps are 8 epochs of 5" in text for text in texts(report, OK))
    assert "forecast" in texts(report, OK)[-1]


def recoded(*ids: int) -> Masks:
    """Masks with these ids in the place of 0, 1, 2 and 255."""
    table = np.zeros(256, np.uint8)
    table[[0, 1, 2, 255]] = ids
    return lambda number: table[three_classes(number)]


@pytest.mark.parametrize(
    ("masks", "override", "message"),
    [
        (recoded(0, 255, 0, 0), "data.classes=[a,b]", r"0 and 255 only.*'data\.label_map=\{0: 0, 255: 1\}"),
        (
            recoded(0, 1, 7, 255),
            "",
            r"ids without a class: 7 in 8 images; .*'data\.label_map=\{0: 0, 1: 1, 7: 2\}'",
        ),
        (recoded(1, 2, 3, 255), "", r"ids start at 1; shift them: 'data\.label_map=\{1: 0, 2: 1, 3: 2\}"),
        (
            recoded(1, 2, 3, 0),
            "",
            r"if 0 means 'no label' .*: 'data\.label_map=\{0: 255, 1: 0, 2: 1, 3: 2\}",
        ),
        (three_classes, "+data.label_map={0: 0, 1: 1}", r"2 in 8 images; add them to data\.label_map"),
        (three_classes, "+data.label_map={0: 255, 1: 255, 2: 255}", r"every pixel of train is ignored"),
        (recoded(0, 0, 0, 0), "", r"only 'sky' is ever seen"),
        (three_classes, "data.classes=[]", r"data\.classes is empty, masks hold 0 to 2, 255"),
    ],
)
def test_a_mistake_with_ids_fails_with_its_remedy(
    masks: Masks, override: str, message: str, tmp_path: Path
) -> None:
    report = examined(write_set(tmp_path / "set", masks), *filter(None, [override]))
    found = texts(report, FAIL)
    assert any(re.search(message, text) for text in found), found


def test_colour_masks_fail_with_their_colours_ready_to_copy(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set")
    colours = np.array([[0, 0, 0], [0, 0, 255], [10, 200, 30]], np.uint8)
    for path in root.glob("masks/*/*.png"):
        Image.fromarray(colours[three_classes(0).clip(max=2)]).save(path)
    found = texts(examined(root), FAIL)
    assert all("label ids" in text or "files" in text for text in found)  # the rest are consequences
    text = found[0]
    assert "5 masks hold colors, not label ids" in text
    for colour in colours.tolist():
        assert str(colour).replace(" ", "") in text
    fixed = examined(root, f"data.mask_colours={colours.tolist()}")
    assert not fixed.failures, texts(fixed, FAIL)


def test_all_defects_of_files_are_found_in_one_pass(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", train=8)
    images, masks = root / "images/train", root / "masks/train"
    (masks / "0.png").unlink()
    (images / "1.jpg").unlink()
    (images / "2.jpg").write_bytes((images / "2.jpg").read_bytes()[:300])
    (masks / "3.png").write_bytes(b"")
    cv2.imwrite(str(masks / "4.png"), np.zeros((40, 50), np.uint8))
    shutil.copy(images / "5.jpg", images / "stray.png")
    cv2.imwrite(str(masks / "6.png"), np.full((40, 48), 9, np.uint8))
    report = examined(root)
    found = "\n".join(texts(report, FAIL))
    for message in (
        r"2 keys have no file .*masks/train/<key>.png (0, stray)",
        r"1 keys have no file .*images/train/<key>.jpg.* (1)",
        r"2 files cannot be used (.*2.jpg.*3.png",
        r"1 masks have another size than their image (.*4.png' is 50 x 40 pixels, its image 48 x 40",
        r"ids without a class: 9 in 1 images",
    ):
        pattern = message.replace("(", r"\(").replace(")", r"\)")
        assert re.search(pattern, found), (message, found)


def test_missing_folders_and_an_empty_look_are_failures(tmp_path: Path) -> None:
    (tmp_path / "set/images/train").mkdir(parents=True)
    found = "\n".join(texts(examined(tmp_path / "set"), FAIL))
    assert "mask folder" in found
    assert "image folder" in found
    assert "is not a folder" in "\n".join(texts(examined(tmp_path / "nowhere"), FAIL))
    assert "nothing to look at" in "\n".join(texts(examined("-"), FAIL))


def test_leaks_and_unseen_classes_are_failures_but_by_name_and_copies_warnings(tmp_path: Path) -> None:
    def masks(number: int) -> np.ndarray:
        return np.minimum(three_classes(number), 1)

    root = write_set(tmp_path / "set", masks)
    cv2.imwrite(str(root / "masks/val/0.png"), three_classes(0))
    shutil.copy(root / "images/train/1.jpg", root / "images/val/2.jpg")
    shutil.copy(root / "images/train/3.jpg", root / "images/train/4.jpg")
    missing, shared = texts(examined(root), FAIL)
    assert "'tree' never seen in train but in val, where it will score 0" in missing
    assert "train and val: 1 images are in train and in val, byte for byte (1 = 2)" in shared
    report = examined(root, "data.allow_unseen=[tree]", "data.allow_duplicates=[val]")
    found = "\n".join(texts(report, WARN))
    assert not report.failures
    assert "1 images are there more than once (4 = 3)" in found


def test_a_map_that_reduces_labels_twice_is_a_warning(tmp_path: Path) -> None:
    report = examined(write_set(tmp_path / "set"), "+data.label_map={0: 255, 1: 0, 2: 1, 3: 2}")
    assert any("they may hold train ids already" in text for text in texts(report, WARN))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The sound set as shards of at most 2 samples."""
    root = write_set(tmp_path / "set")
    cfg = DatasetConfig(name="stripes", classes=CLASSES)
    write_shards(cfg, root, tmp_path / "shards", seed=0, samples_per_shard=2, workers=1)
    return tmp_path / "shards"


def test_shards_have_the_statistics_of_their_source(sharded: Path, tmp_path: Path) -> None:
    report = examined(tmp_path / "set", f"data.shards={sharded}", "loader.workers=2", pictures=4)
    assert not report.failures, texts(report, FAIL)
    for source, shards in zip(report.source, report.shards, strict=True):
        assert source.class_pixels.tolist() == shards.class_pixels.tolist()
        assert source.class_images.tolist() == shards.class_images.tolist()
        assert source.ignored_pixels == shards.ignored_pixels
        assert sorted(source.heights) == sorted(shards.heights)
    assert report.sheets.keys() == {"source", "shards"}
    assert any("1 ranks x 2 workers = 2 readers of 3 chunks, 3 shards" in text for text in texts(report, OK))


def test_more_readers_than_chunks_and_a_batch_above_the_set_are_warnings(
    sharded: Path, tmp_path: Path
) -> None:
    overrides = ["global_batch=8", "ranks=8", "loader.workers=4", f"data.shards={sharded}"]
    found = "\n".join(texts(examined("-", *overrides), WARN))
    assert "8 ranks x 4 workers = 32 readers of 3 chunks, 3 shards: several" in found
    assert "one step holds images more than once" in found


def test_a_damaged_shard_and_other_classes_are_failures(sharded: Path, tmp_path: Path) -> None:
    tar = next(sharded.glob("train-*.tar"))
    data = bytearray(tar.read_bytes())
    data[600:620] = bytes(20)
    tar.write_bytes(data)
    overrides = [f"data.shards={sharded}", "data.classes=[a,b]"]
    found = "\n".join(texts(examined("-", *overrides), FAIL))
    assert "1 unreadable" in found
    assert "data.classes has 2 classes (a, b), but" in found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ranks=3", "global_batch=4 is not divisible by micro_batch x world_size = 1 x 3"),
        ("eval_split=test", "eval_split=test is not there, only train, val"),
        ("gpu_gib=0.001", "lower micro_batch"),
        ("model.num_classes=7", "model.num_classes=7, the data has 3 classes"),
        ("model.in_channels=5", "model.in_channels=5, the images have 3"),
    ],
)
def test_what_does_not_fit_the_run_is_the_one_failure(override: str, message: str, sharded: Path) -> None:
    report = examined("-", f"data.shards={sharded}", override)
    (text,) = texts(report, FAIL)
    assert report.failures
    assert message in text


def test_the_command_fails_in_one_line_after_the_whole_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path / "set", lambda number: np.full((40, 48), 9, np.uint8))
    command = ["launch/doctor.py", "data=folder", f"root={tmp_path / 'set'}"]
    command += [f"output={tmp_path / 'out'}", f"data.classes={CLASSES}", "augment.crop=[32,32]"]
    command.append("global_batch=4")
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(command[0], run_name="__main__")
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert printed.err.startswith("DataError: training should not start:")
    assert printed.err.count("\n") == 1
    assert "ids without a class: 9 in 8 images" in printed.out
    written = json.loads((tmp_path / "out/doctor.json").read_text())
    assert written["may_start"] is False
    assert {verdict["level"] for verdict in written["verdicts"]} == {OK, FAIL}


def test_a_good_look_ends_quietly_and_leaves_numbers_for_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_set(tmp_path / "set")
    given = ["data=folder", f"root={root}", f"output={tmp_path / 'out'}", f"data.classes={CLASSES}"]
    doctor(compose(DoctorConfig, "doctor", [*given, "augment.crop=[32,32]", "global_batch=4", "pictures=0"]))
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "FAIL" not in printed.out
    assert "warnings, nothing that stops training" in printed.out
    written = json.loads((tmp_path / "out/doctor.json").read_text())
    assert written["may_start"] is True
    assert written["source"]["train"]["class_images"] == [5, 5, 5]
    assert written["memory_bytes"]["total"] == sum(
        size for name, size in written["memory_bytes"].items() if name != "total"
    )


def test_classification_folders_are_counted_by_class(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, counts in (("train", {"cat": 3, "dog": 2}), ("val", {"cat": 1, "dog": 1})):
        for name, count in counts.items():
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for number in range(count):
                image = rng.integers(0, 256, (32, 32, 3), np.uint8)
                cv2.imwrite(str(tmp_path / "set" / split / name / f"{number}.jpg"), image)
    overrides = ["data.task=classification", "data.image_dir='{split}'", "data.classes=[]"]
    report = examined(tmp_path / "set", *overrides)
    assert not report.failures, texts(report, FAIL)
    assert report.source[0].class_images.tolist() == [3, 2]
    rarest = "train: classes: all 2 seen; the rarest is 'dog', 40 % of the images, in 2 of 5 images"
    assert rarest in texts(report, OK)
    assert report.classes == ["cat", "dog"]


def test_the_sheet_shows_rare_classes_first() -> None:
    scan = SplitScan("train", 3, load=lambda sample: ("", None))
    scan.class_images = np.array([10, 1, 3])
    scan.holders.update({-1: [*range(10)], 0: [0, 1], 1: [7], 2: [0, 9, 7]})
    chosen = scan.choose(5)
    assert chosen[:3] == [7, 9, 1]
    assert len(chosen) == len(set(chosen)) == 5


def test_settings_of_the_doctor_are_checked() -> None:
    for key in ("ranks", "gpu_gib", "steps"):
        with pytest.raises(ConfigError, match=f"{key}=0 must be"):
            DoctorConfig(**{key: 0})


def test_the_text_lists_failures_last() -> None:
    report = Report(findings=[Finding(FAIL, "a", "x"), Finding(OK, "b", "y"), Finding(WARN, "c", "z")])
    assert [line[:4].strip() for line in as_text(report).splitlines()] == [OK, WARN, FAIL]
    assert as_json(report)["may_start"] is False


def mixed(shards: Path, *more: str) -> Report:
    """What the doctor says of a run on the same shards under two meanings."""
    given = [
        "data=folder",
        "steps=8",
        "global_batch=4",
        "augment.crop=[64,64]",
        "augment.resize=[]",
        "read=2",
    ]
    given += [f"mixture.sets.{name}.shards={shards}" for name in ("one", "two")]
    given += ["mixture.sets.one.classes.background=[paper, glass]", "mixture.sets.one.weight=3"]
    given += ["mixture.sets.two.classes.background=[glass]"]
    return look(compose(DoctorConfig, "doctor", [*given, *more]))


def test_each_set_of_a_mixture_is_looked_at_and_the_run_on_all_of_them(tiny_shards: Path) -> None:
    report = mixed(tiny_shards, "pictures=2")
    assert not report.failures
    assert (report.classes, list(report.sets)) == (["paper", "glass", "nucleus"], ["one", "two"])
    assert report.sheets.keys() == {"shards-one", "shards-two"}
    fine = texts(report, OK)
    assert any(text.startswith("two: train: classes: all 2 seen") for text in fine)
    assert any("75.0 % of the samples = 1.5 epochs, annotates 3 of the classes" in text for text in fine)
    assert any("8 steps are 1 epochs of 32" in text for text in fine)
    assert not any("class_weighting" in text for text in texts(report, WARN)), (
        "refused where a class may be two"
    )
    told = as_text(report)
    assert "one shards train: 16 samples" in told
    assert told.count("background") == 2
    assert as_json(report)["sets"]["two"]["shards"]["val"]["samples"] == 3


def test_what_a_run_on_a_mixture_would_refuse_is_a_failure(tiny_shards: Path) -> None:
    for wrong, said in {
        "mixture.sets.two.classes={background: [nucleus]}": "mixture: mixture.sets.two.classes: background",
        "mixture.sets.three.weight=1": "mixture: mixture.sets.three.shards is empty",
        "loss.label_smoothing=0.1": "mixture: loss.label_smoothing gives a share to every class",
        "data.shards=elsewhere": "mixture: data.shards=elsewhere and mixture.sets both say",
    }.items():
        found = texts(mixed(tiny_shards, wrong, "pictures=0"), FAIL)
        assert len(found) == 1
        assert found[0].startswith(said)


def test_images_that_one_set_of_a_mixture_learns_and_another_is_scored_on_are_a_warning() -> None:
    def scans(**splits: list[str]) -> list[SplitScan]:
        found = [SplitScan(name, 2, lambda sample: ("", None)) for name in splits]
        for scan in found:
            scan.digests = {key.encode(): key for key in splits[scan.name]}
        return found

    sets = {"a": scans(train=["1", "2"], val=["3"]), "b": scans(train=["3", "4"], val=["5", "2", "1"])}
    found = [(one.level, one.about, one.text[:42]) for one in judge_sets(sets, "train", "val")]
    assert found == [
        (WARN, "a", "1 images of its val (3) are trained on in "),
        (WARN, "b", "2 images of its val (1, 2) are trained on "),
    ]


@pytest.mark.slow
def test_a_run_on_a_mixture_is_measured(tiny_shards: Path) -> None:
    measured = mixed(tiny_shards, "pictures=0", "measure=true", "loader.workers=0").measured
    assert measured is not None
    assert measured.evaluate_h > 0
