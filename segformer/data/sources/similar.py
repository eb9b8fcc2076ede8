"""Images of two splits that look alike: frames of a film, copies that are resized, saved again, brightened.

A perceptual hash has 64 bits: the lowest 8 x 8 cosine coefficients of the image in grey but the mean, each
above their median or not (pHash: Zauner, Implementation and benchmarking of perceptual image hash functions,
2010). Two images are near copies where at most NEAR bits differ. Frames of CamVid and images of the sample as
JPEG of quality 30, at half and 1.37 times the size, 40 levels brighter, 1.3 times brighter or of gamma 0.6
stay within NEAR of their original in 97.9 to 100 %. Of the 69,006 pairs of the sample, which holds no copy,
none is within NEAR, and of CamVid 1,452 pairs of one film and one of two.

Not all pairs are compared: two hashes within 8 bits differ in at most 2 bits of one of their four quarters,
so those are looked up (Norouzi et al., Fast search in Hamming space with multi-index hashing, CVPR 2012).
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from segformer.data.sources.content import override
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.division import grouped, pairs, proposed_groups
from segformer.errors import listed

NEAR = 8  # bits that near copies differ in at most
_FLAT = 0.001  # of the mean: an image of weaker waves has no shape
_QUARTER = 16  # bits
_FLIPS = [
    sum(1 << bit for bit in bits) for n in range(NEAR // 4 + 1) for bits in combinations(range(_QUARTER), n)
]
_AT_ONCE = 2**22  # pairs that are compared in one step
_CHECKED = 5000  # images that a remedy is tried on
_SHOWN = 3  # pairs in a message


def perceptual_hash(pixels: np.ndarray) -> int:
    """The hash of an image (H, W, C) of any dtype, below 2^64; 0 of one that is flat."""
    step = max(1, min(pixels.shape[:2]) // 64)  # 0.1 ms an image, whatever its size
    part = pixels[::step, ::step].astype(np.float32)
    grey = part @ np.full(part.shape[2], 1 / part.shape[2], np.float32)
    low = (_cosines(grey.shape[0]) @ grey @ _cosines(grey.shape[1]).T).reshape(-1)
    if not np.abs(low[1:]).max() > _FLAT * low[0]:
        return 0
    bits = low > np.sort(low[1:])[31]
    bits[0] = False
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@functools.cache
def _cosines(length: int) -> np.ndarray:
    """The first 8 rows of the cosine transform of a line, as means: float32 (8, length)."""
    angles = np.pi / length * np.outer(np.arange(8), np.arange(length) + 0.5)
    return (np.cos(angles) / length).astype(np.float32)


def nearest(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The place in `first` of the nearest within NEAR bits for each of `second`, -1 without one.

    first, second: uint64 (N, 2) and (M, 2), hash and group; those of one group are not compared.
    """
    best, found = np.full(len(second), NEAR + 1), np.full(len(second), -1)
    for shift in range(0, 64, _QUARTER):
        quarter = (first[:, 0] >> np.uint64(shift)).astype(np.int64) & (2**_QUARTER - 1)
        asked = (second[:, 0] >> np.uint64(shift)).astype(np.int64) & (2**_QUARTER - 1)
        order = np.argsort(quarter, kind="stable")
        starts = np.searchsorted(quarter[order], np.arange(2**_QUARTER + 1))
        for flip in _FLIPS:
            begin = starts[asked ^ flip]
            counts = starts[(asked ^ flip) + 1] - begin
            ends = np.cumsum(counts)
            steps = np.searchsorted(ends, np.arange(_AT_ONCE, ends[-1] if len(ends) else 0, _AT_ONCE))
            for part in np.split(np.arange(len(second)), steps):
                many = counts[part]
                at = np.repeat(part, many)
                hit = order[np.repeat(begin[part] + many - np.cumsum(many), many) + np.arange(len(at))]
                differ = np.bitwise_count(first[hit, 0] ^ second[at, 0])
                differ[first[hit, 1] == second[at, 1]] = 255
                better = np.flatnonzero(differ < best[at])
                better = better[
                    np.argsort(differ[better], kind="stable")[::-1]
                ]  # the nearest is written last
                best[at[better]], found[at[better]] = differ[better], hit[better]
    return found


@dataclass(frozen=True, slots=True)
class Alike:
    """Images of `second` that look like images of `first`."""

    first: str
    second: str
    text: str


def near_copies(
    cfg: DatasetConfig, hashes: Mapping[str, Mapping[str, int]], again: str = ""
) -> Iterator[Alike]:
    """What splits that may share no image have alike; hashes: of each image by its key, by split."""
    known = {split: {key: of[key] for key in sorted(of) if of[key]} for split, of in hashes.items()}
    for first, second in pairs(known, cfg.allow_duplicates):
        own, other = known[first], known[second]
        one = {value: key for key, value in own.items()}  # a thousand equal ones would be a million pairs
        asked = {value: key for key, value in other.items()}
        places = nearest(_array(list(one), [0] * len(one)), _array(list(asked), [1] * len(asked))).tolist()
        known_as = list(one.values())
        partner = {value: known_as[place] for value, place in zip(asked, places, strict=True) if place >= 0}
        if found := sorted((key, partner[value]) for key, value in other.items() if value in partner):
            named = listed([f"{key} ~ {like}" for key, like in found], _SHOWN)
            text = f"{len(found)} images of {second} look like images of {first} ({named}): scores would be "
            do = _regrouped(cfg, known, [(second, key, first, like) for key, like in found])
            do = f"keep together what belongs together: {do}{again}" if do else "remove them from one"
            text += f"too good; {do}; if that is meant: {override('data.allow_duplicates', [second])}"
            yield Alike(first, second, text)


def _array(hashes: Sequence[int], groups: Sequence[int]) -> np.ndarray:
    return np.array([hashes, groups], np.uint64).T


def _regrouped(
    cfg: DatasetConfig, hashes: Mapping[str, Mapping[str, int]], alike: list[tuple[str, str, str, str]]
) -> str:
    """Settings of a division that parts no two images which look alike; "" where none is seen."""
    inside = not cfg.is_divided
    if inside and not (settings := _one_folder(cfg, {split: len(of) for split, of in hashes.items()})):
        return ""

    def key_of(split: str, key: str) -> str:
        return f"{split}/{key}" if inside else key

    every = {key_of(split, key): value for split, of in hashes.items() for key, value in of.items()}
    together = [(key_of(a, b), key_of(c, d)) for a, b, c, d in alike]
    for grouping in proposed_groups(cfg, every, together):
        number: dict[str, int] = {}
        groups = [number.setdefault(str(grouped(grouping, key)), len(number)) for key in every]
        table = np.unique(_array(list(every.values()), groups), axis=0)
        if (nearest(table, table[:: -(-len(table) // _CHECKED)]) < 0).all():
            values = {"group": grouping} | (settings if inside else {})
            return " ".join(override(f"data.{key}", value) for key, value in values.items())
    return ""


def _one_folder(cfg: DatasetConfig, images: Mapping[str, int]) -> dict[str, Any]:
    """Settings that make the folders of two or three splits one, divided anew; none where they can't."""
    kinds = ("image", "mask") if cfg.task == "segmentation" else ("image",)
    dirs = {f"{kind}_dir": getattr(cfg, f"{kind}_dir") for kind in kinds}
    above = {key: name.removesuffix("/{split}") for key, name in dirs.items()}
    if (
        cfg.split_lists
        or cfg.split_dirs
        or not 2 <= len(images) <= 3
        or any(above[k] == dirs[k] for k in dirs)
    ):
        return {}
    shares = zip(("val_share", "test_share"), [*images.values()][1:], strict=False)
    return above | {key: max(0.01, round(count / sum(images.values()), 2)) for key, count in shares}
