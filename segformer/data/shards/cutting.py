"""Large images -> tiles, in bounded memory: which there are, and their pixels, once for all shards.

    plan    the header of every image, and of training images the mask, where tiles must be labeled: samples
            with a window in the place of each image that is larger than a tile
    cut     image by image, in processes: from top to bottom, its tiles as PNG (or .npy) and their raw ids as
            PNG of 16 bits into the work folder, where any shard finds them; then a note with the sums of its
            files

A process holds the rows of one row of tiles (large.py), of JPEG, WebP and BMP the whole image. What was cut
is kept until the set is there: as much space as its shards take, and no image is decoded for each shard."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np

from segformer.data.shards.pool import run
from segformer.data.shards.tiling import Tiling, Whole, tile_key
from segformer.data.shards.trimming import SCAN, Listing
from segformer.data.shards.workfolder import WorkFolder
from segformer.data.sources.dataset import IGNORE_INDEX, RGB, DatasetConfig, label_table
from segformer.data.sources.decode import decode_stored, encode_array
from segformer.data.sources.division import is_training
from segformer.data.sources.large import image_rows, image_size, label_rows
from segformer.data.sources.sample import LoadedSample, Sample, count_ids, map_ids
from segformer.data.sources.shapes import packed
from segformer.errors import DataError, reraise_as
from segformer.files import read_json, remove, sha256_of, write_atomic

_FAST = [cv2.IMWRITE_PNG_COMPRESSION, 1]


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of a data set."""

    samples: Listing
    "Training splits without those that are too little labeled."
    wholes: dict[str, list[Whole]]
    "The images of every split that is scored."


def plan_tiles(cfg: DatasetConfig, tiling: Tiling, listing: Listing, workers: int) -> Tiles:
    """The tiles of every image; prints how many are left out. DataError where a split has none left."""
    found = Tiles({}, {})
    for split, samples in listing.items():
        labeled = tiling.labeled if is_training(split) else 0.0
        tasks = [
            (cfg, replace(tiling, labeled=labeled), samples[start : start + SCAN])
            for start in range(0, len(samples), SCAN)
        ]
        images = [len(part) for _, _, part in tasks]
        parts = run(_plan, tasks, images=images, workers=workers, desc="planning")
        planned = [one for part in parts for one in part]
        kept = [tile for _, tiles in planned for tile in tiles if tile is not None]
        if not is_training(split):
            firsts = np.cumsum([0, *(len(tiles) for _, tiles in planned)]).tolist()
            found.wholes[split] = [
                Whole(sample.key, *size, first)
                for sample, (size, _), first in zip(samples, planned, firsts, strict=False)
            ]
        if (left := sum(len(tiles) for _, tiles in planned) - len(kept)) and kept:
            print(
                f"{split}: {left} of {left + len(kept)} tiles are left out (less than "
                f"{100 * tiling.labeled:g} % of their pixels are labeled)"
            )
        elif left:
            raise DataError(f"tile_labeled={tiling.labeled} leaves no tile of {split}; lower it")
        found.samples[split] = kept
    return found


def _plan(
    task: tuple[DatasetConfig, Tiling, list[Sample]],
) -> list[tuple[tuple[int, int], list[Sample | None]]]:
    """(size, tiles in the grid's order, None for one that is left out) of each image."""
    cfg, tiling, samples = task
    ignored = label_table(cfg) == IGNORE_INDEX  # by raw id
    found = []
    for sample in samples:
        size = image_size(sample.image)
        grid = tiling.windows(size)
        tiles: list[Sample | None] = []
        ids = label_rows(cfg, sample, size) if tiling.labeled else None
        for rows, columns in grid:
            window = (rows.start, columns.start, rows.stop, columns.stop) if len(grid) > 1 else None
            tile = replace(sample, key=tile_key(sample.key, rows, columns), window=window)
            without = 0.0 if ids is None else ignored[ids(rows.start, rows.stop)[:, columns]].mean()
            tiles.append(tile if 1 - without >= tiling.labeled else None)
        found.append((size, tiles))
    return found


def cut_tiles(cfg: DatasetConfig, samples: list[Sample], work: WorkFolder, workers: int) -> dict[str, str]:
    """Cut what is not there yet, an image at a time; the sum of the files of each, by the image's path."""
    tiles = sorted((s for s in samples if s.window), key=lambda s: (s.image_file, s.window))
    tasks = [(cfg, list(own), work) for _, own in groupby(tiles, key=lambda s: s.image_file)]
    sums = run(_cut, tasks, images=[len(own) for _, own, _ in tasks], workers=workers, desc="cutting")
    return {own[0].image_file: found for (_, own, _), found in zip(tasks, sums, strict=True)}


def _cut(task: tuple[DatasetConfig, list[Sample], WorkFolder]) -> str:
    """Cut the tiles of one image; returns the sum of its files."""
    cfg, tiles, work = task
    cv2.setNumThreads(1)
    sample, folder = tiles[0], _folder(work, tiles[0])
    note, stat = folder / "note.json", facts_sum(sample, file_stat)
    with suppress(OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
        if (there := read_json(note))["stat"] == stat:
            return str(there["sum"])
    remove(folder)
    folder.mkdir(parents=True)
    pixels, ids = image_rows(cfg, sample.image), label_rows(cfg, sample, image_size(sample.image))
    for tile in tiles:
        assert tile.window is not None
        top, left, bottom, right = tile.window
        path = _place(work, tile)
        path.write_bytes(_encoded(cfg, pixels(top, bottom)[:, left:right]))
        own = np.ascontiguousarray(ids(top, bottom)[:, left:right])
        path.with_suffix(".ids").write_bytes(cv2.imencode(".png", own, _FAST)[1].tobytes())
    content = content_sum(sample)
    write_atomic(note, json.dumps({"stat": stat, "sum": content}))
    return content


def _encoded(cfg: DatasetConfig, pixels: np.ndarray) -> bytes:
    if cfg.pixels != RGB:
        return encode_array(pixels)
    return cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), _FAST)[1].tobytes()


def _folder(work: WorkFolder, tile: Sample) -> Path:
    return work.tiles / hashlib.sha256(tile.image_file.encode()).hexdigest()[:24]


def _place(work: WorkFolder, tile: Sample) -> Path:
    assert tile.window is not None
    return _folder(work, tile) / "{}_{}_{}_{}.image".format(*tile.window)


def file_stat(path: Path) -> bytes:
    """Size and time of a file."""
    found = path.stat()
    return f"\0{found.st_size}\0{found.st_mtime_ns}\0".encode()


def sample_facts(sample: Sample, facts: Callable[[Path], bytes]) -> Iterator[bytes]:
    """The shapes of a sample, and the facts of its files."""
    if sample.shapes is not None or sample.segments is not None:
        yield repr((sample.uncovered, sample.size, sample.segments)).encode()
    yield from packed(sample.shapes or ())
    for path in sample.files:
        with reraise_as(DataError, f"{str(path)!r} cannot be read", "check its permissions"):
            found = facts(path)
        yield found


def facts_sum(sample: Sample, facts: Callable[[Path], bytes]) -> str:
    """sha256 over `sample_facts`."""
    return hashlib.sha256(b"".join(sample_facts(sample, facts))).hexdigest()


def content_sum(sample: Sample) -> str:
    """sha256 over shapes and contents of the files of an image of any size."""
    return facts_sum(sample, lambda path: sha256_of(path).encode())


def load_tile(cfg: DatasetConfig, tile: Sample, work: WorkFolder) -> LoadedSample:
    """One tile that was cut, as `load_sample` gives a whole image."""
    path = _place(work, tile)
    image, stored = path.read_bytes(), np.fromfile(path.with_suffix(".ids"), np.uint8)
    ids = np.asarray(cv2.imdecode(stored, cv2.IMREAD_UNCHANGED))
    height, width = ids.shape
    pixels = decode_stored(image, cfg.pixels)
    loaded = LoadedSample(image, height, width, pixels, ids=ids, raw_ids=count_ids(ids))
    map_ids(cfg, tile, loaded)
    return loaded
