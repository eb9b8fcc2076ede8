"""A data set of Hugging Face with a column of images and one of masks: parquet, or images with metadata.

    root=<folder>                       data/train-00000-of-00002.parquet; or images beside a metadata.csv
                                        (file_name, mask_file_name), as `datasets.load_dataset` reads them
    root=hf://datasets/<owner>/<name>   from the hub; @<revision> behind it pins one

`data.labels` is the configuration where there are several; id2label.json gives the classes. The library
`datasets` says which files are of which split. It runs no code of a data set and decodes nothing: the bytes
go through the decoders of files. Rows of parquet are first written as files below the cache of `datasets`
(HF_HOME), in a folder named after the state of their source: what lies there is not written again, and once
the list of the rows does, the source is not read again."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from segformer.data.formats.base import Found, Labeled, inside, key_of, read_labels
from segformer.data.sources.dataset import IMAGE_SUFFIXES, MAX_FILE_BYTES, DatasetConfig
from segformer.data.sources.decode import PNG_MAGIC
from segformer.errors import DataError, listed, reraise_as, say
from segformer.files import read_json, write_atomic

HUB = "hf:/datasets/"  # as a Path writes it
INSTALL = "pip install 'datasets>=5.2'"
MAX_ROW_GROUP = 2**30  # bytes; reading one takes about twice as much memory
BATCH = 8  # rows in memory, beside their row group
MASKS = ("mask", "label", "labels", "annotation", "segmentation_mask", "semantic_mask")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

Pair = tuple[str, str, str]
"""Key, image file, mask file; a file is "" where the row has none."""


def detect(found: Found) -> bool:
    """An address on the hub; or a folder with parquet files or with metadata of images."""
    cfg, root = found.cfg, found.root
    places = [root, root / "data", *(root / cfg.split_dirs.get(split, split) for split in cfg.splits)]
    return str(root).startswith(HUB) or any(
        any(place.glob("*.parquet")) or any((place / name).is_file() for name in _METADATA)
        for place in places
    )


def read(found: Found) -> None:
    """The rows of a split."""
    cfg, root = found.cfg, found.root
    with reraise_as(DataError, "data.format=huggingface needs a package", INSTALL, on=ImportError):
        import datasets
        from datasets.exceptions import DatasetsError
    failed = (OSError, ValueError, RuntimeError, DatasetsError)
    do = "see what datasets.load_dataset says to it"
    pairs: list[Pair] = []
    with reraise_as(DataError, f"the data set {str(root)!r} can't be read", do, on=failed):
        folder = _downloaded(str(root)) if str(root).startswith(HUB) else root
        builder = datasets.load_dataset_builder(str(folder), cfg.labels or None)
        for part in found.parts(builder.config.data_files, f"{str(root)!r} has the splits"):
            files = [Path(file) for file in builder.config.data_files[part]]
            if all(file.suffix == ".parquet" and file.name not in _METADATA for file in files):
                pairs += _written(cfg, part, files)
            else:
                pairs += _listed(cfg, folder, builder.as_streaming_dataset(part))
    found.covers, found.categories = True, _categories(folder)
    lacking = {key for key, *paths in pairs if not all(paths)}
    found.note(f"rows of {str(root)!r} have no image or no mask", "leave them out", lacking)
    gone = {path for _, *paths in pairs for path in paths if path and not os.path.isfile(path)}
    found.note(f"files of {str(root)!r} are not there", "add them, or leave their rows out", gone)
    found.labeled = [Labeled(key, image, mask_file=mask) for key, image, mask in pairs if image and mask]


def _downloaded(address: str) -> Path:
    """The files of a data set on the hub, which are in its cache afterwards."""
    from huggingface_hub import snapshot_download

    name, _, revision = address.removeprefix(HUB).partition("@")
    return Path(snapshot_download(name, repo_type="dataset", revision=revision or None))


def _categories(folder: Path) -> list[str]:
    """The names of the ids 0, 1, 2, ..., where the data set says them."""
    names = read_labels(path) if (path := folder / "id2label.json").is_file() else {}
    if not isinstance(names, dict) or {*names} != {*map(str, range(len(names)))}:
        return []
    return [str(names[str(number)]) for number in range(len(names))]


def _columns(cfg: DatasetConfig, features: Any) -> tuple[str, str]:
    """The columns of images and masks."""
    import datasets

    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image, mask = cfg.columns.get("image", ""), cfg.columns.get("mask", "")
    if not mask and len(left := [name for name in found if name in MASKS and name != image]) == 1:
        mask = left[0]
    if not image and len(left := [name for name in found if name != mask]) == 1:
        image = left[0]
    if image not in found or mask not in found or image == mask:
        do = "say which are meant: 'data.columns={image: <column>, mask: <column>}'"
        raise DataError(f"of its columns ({listed(features)}), {listed(found) or 'none'} hold images; {do}")
    return image, mask


def _listed(cfg: DatasetConfig, folder: Path, rows: Any) -> Iterator[Pair]:
    """The rows of a folder with metadata, whose files are where they are."""
    import datasets

    columns = _columns(cfg, rows.features)
    rows = rows.select_columns(list(columns))
    for column in columns:
        rows = rows.cast_column(column, datasets.Image(decode=False))
    for row in rows:
        names = [(row[column] or {}).get("path") or "" for column in columns]
        image, mask = (inside(str(folder), os.path.relpath(name, folder)) if name else "" for name in names)
        yield key_of(image), f"{folder}/{image}", mask and f"{folder}/{mask}"


def _written(cfg: DatasetConfig, part: str, files: list[Path]) -> Iterator[Pair]:
    """The rows of parquet files, as files of the cache."""
    import datasets
    import pyarrow.parquet as pq

    columns = _columns(cfg, datasets.Features.from_arrow_schema(pq.read_schema(files[0])))
    state = [(os.path.abspath(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = hashlib.sha256(repr((columns, state)).encode()).hexdigest()[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "segformer" / f"{part}-{name}"
    done: list[list[str]] = []
    with suppress(OSError, ValueError):  # there is none
        done = read_json(folder / "rows.json")
    if not done:
        say(f"{part}: the images of {len(files)} parquet files are written to {str(folder)!r}")
        what, do = f"{str(folder)!r} can't be written", "make room, or set HF_HOME to another place"
        for number, cells in enumerate(_rows(files, columns)):
            with reraise_as(DataError, what, do):
                done.append([_file(folder, f"{role}/{part}-{number:07d}", cell) for role, cell in cells])
        write_atomic(folder / "rows.json", json.dumps(done))
    for number, row in enumerate(done):
        image, mask = (name and f"{folder}/{name}" for name in row)
        yield f"{part}-{number:07d}", image, mask


def _rows(files: list[Path], columns: tuple[str, str]) -> Iterator[Iterable[tuple[str, Any]]]:
    """(folder, cell) of the image and the mask of each row."""
    import pyarrow.parquet as pq

    for file in files:
        with pq.ParquetFile(file, buffer_size=2**20) as opened:
            for index in range(opened.num_row_groups):
                if (size := opened.metadata.row_group(index).total_byte_size) > MAX_ROW_GROUP:
                    do = "write it with smaller ones: Dataset.to_parquet(..., batch_size=100)"
                    raise DataError(f"row group {index} of {str(file)!r} has {size} bytes; {do}")
            # On one thread: an iteration that ends early would abort the process at its exit (arrow #45214).
            for batch in opened.iter_batches(BATCH, columns=list(columns), use_threads=False):
                for row in batch.to_pylist():
                    yield zip(("images", "masks"), (row[name] for name in columns), strict=True)


def _file(folder: Path, name: str, cell: Any) -> str:
    """The file of a cell below the folder, written unless it is there; "" of an empty cell."""
    data = (cell or {}).get("bytes")
    if not data:
        return ""
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"{name} has {len(data)} bytes; the limit for one image is {MAX_FILE_BYTES}")
    suffix = os.path.splitext(cell.get("path") or "")[1].lower()
    name += ".png" if data.startswith(PNG_MAGIC) else suffix if suffix in IMAGE_SUFFIXES else ".jpg"
    path = folder / name
    if not (path.is_file() and path.stat().st_size == len(data)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data, durable=False)
    return name
