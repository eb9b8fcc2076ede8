"""Small data sets of random pictures, as folders and as shards."""

import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from segformer.data.shards.format import ShardSet, content_digest
from segformer.data.shards.sharding import write_shards
from segformer.data.sources.dataset import DatasetConfig
from segformer.training.config import compose

ROOT = Path(__file__).resolve().parents[2]
SIZES = ((40, 56), (56, 40), (48, 48), (40, 56))  # height, width; one size comes twice


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    """Write a data set of smooth random pictures and masks of three classes and ignored pixels."""

    def make(root: Path, counts: dict[str, int], suffix: str = ".jpg") -> Path:
        rng = np.random.default_rng(7)
        for split, count in counts.items():
            for kind in ("images", "masks"):
                (root / kind / split).mkdir(parents=True)
            for number in range(count):
                height, width = SIZES[number % len(SIZES)]
                image = cv2.resize(rng.integers(0, 256, (7, 9, 3), np.uint8), (width, height))
                mask = cv2.resize(
                    rng.choice([0, 1, 2, 255], (5, 6)).astype(np.uint8),
                    (width, height),
                    interpolation=cv2.INTER_NEAREST,
                )
                cv2.imwrite(str(root / "images" / split / f"{number:03d}{suffix}"), image)
                cv2.imwrite(str(root / "masks" / split / f"{number:03d}.png"), mask)
        return root

    return make


@pytest.fixture(scope="session")
def config() -> DatasetConfig:
    """The data set of `folder`."""
    return DatasetConfig(name="random", classes=["sky", "road", "tree"], license="none")


@pytest.fixture(scope="session")
def folder(make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 training and 10 validation pairs. Not to be changed by a test."""
    return make_folder(tmp_path_factory.mktemp("folder"), {"train": 21, "val": 10})


@pytest.fixture(scope="session")
def shard_dir(folder: Path, config: DatasetConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`folder` as shards of at most 8 samples. Not to be changed by a test."""
    out = tmp_path_factory.mktemp("shards") / "random"
    write_shards(config, folder, out, seed=3, samples_per_shard=8, workers=1)
    return out


@pytest.fixture
def copy(shard_dir: Path, tmp_path: Path) -> Path:
    """The shards, to be damaged."""
    return Path(shutil.copytree(shard_dir, tmp_path / "copy"))


@pytest.fixture(scope="session")
def shards(shard_dir: Path) -> ShardSet:
    """The opened shards."""
    return ShardSet.open(shard_dir)


@pytest.fixture(scope="session")
def make_classes() -> Callable[..., Path]:
    """Write a classification set: root/<split>/<class>/<name>.jpg, a few random images a class."""

    def make(root: Path, counts: dict[str, int], classes: Sequence[str] = ("cat", "dog", "owl")) -> Path:
        rng = np.random.default_rng(11)
        for split, count in counts.items():
            for number in range(count):
                folder = root / split / classes[number % len(classes)]
                folder.mkdir(parents=True, exist_ok=True)
                height, width = SIZES[number % len(SIZES)]
                image = cv2.resize(rng.integers(0, 256, (7, 9, 3), np.uint8), (width, height))
                cv2.imwrite(str(folder / f"{number:03d}.jpg"), image)
        return root

    return make


@pytest.fixture(scope="session")
def class_config() -> DatasetConfig:
    """The data set of `make_classes`."""
    return DatasetConfig(name="animals", task="classification", image_dir="{split}", license="none")


@pytest.fixture(scope="session")
def class_shards(
    make_classes: Callable[..., Path], class_config: DatasetConfig, tmp_path_factory: pytest.TempPathFactory
) -> ShardSet:
    """13 training and 6 validation images of three classes as shards. Not to be changed by a test."""
    root = make_classes(tmp_path_factory.mktemp("animals"), {"train": 13, "val": 6})
    out = tmp_path_factory.mktemp("shards") / "animals"
    write_shards(class_config, root, out, seed=3, samples_per_shard=5, workers=1)
    return ShardSet.open(out)


def reseal(folder: Path, content: dict[str, Any] | None = None, *, tars: bool = True) -> None:
    """Give changed shards a dataset.json that fits them: every sum and size, and its own digest."""
    path = folder / "dataset.json"
    content = json.loads(path.read_text()) if content is None else content
    for split in content["splits"].values():
        for entry in (split["index"], *(split["shards"] if tars else [])):
            data = (folder / entry["file"]).read_bytes()
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content["digest"] = content_digest(content)
    path.unlink()
    path.write_text(json.dumps(content))


@pytest.fixture(scope="session", name="reseal")
def _reseal() -> Callable[..., None]:
    return reseal


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """(name, overrides ...) -> the lines that a command of data_prep prints, run in this process."""

    def run(name: str, *overrides: str) -> list[str]:
        spec = importlib.util.spec_from_file_location(f"command_{name}", ROOT / f"data_prep/{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        cfg = compose(getattr(module, f"{name.title()}Config"), name, list(overrides))
        capsys.readouterr()
        getattr(module, name)(cfg)
        return capsys.readouterr().out.splitlines()

    return run
