"""Which split an image belongs to, and what is in two: scores on images that were trained on are no scores.

One folder becomes two splits by `data.val_share`: the second of data.splits gets the images for which
sha256(seed, key) falls below the share. More images move no other. Images that a split which is trained on
shares with one which is not, as files or byte for byte, are refused but for the splits that
`data.allow_duplicates` names."""

import functools
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from segformer.data.sources.content import override
from segformer.data.sources.dataset import DatasetConfig
from segformer.errors import DataError, listed

_SHARES = (0.2, 0.1, 0.3, 0.5)  # what is proposed: the first that leaves no split empty
_SHOWN = 3  # images in a message


def divided(cfg: DatasetConfig, split: str, keys: set[str]) -> set[str]:
    """The keys of one folder that belong to `split`; DataError where none does."""
    if not cfg.val_share:
        return keys
    chosen = _below(cfg, keys, cfg.val_share)
    own = chosen if split == cfg.splits[1] else keys - chosen
    if keys and not own:
        share = working_share(cfg, keys)
        do = f"set {override('data.val_share', share)}" if share else "name the images in data.split_lists"
        raise DataError(f"data.val_share={cfg.val_share} leaves no image for {split} of {len(keys)}; {do}")
    return own


def _below(cfg: DatasetConfig, keys: set[str], share: float) -> set[str]:
    def draw(key: str) -> float:
        drawn = hashlib.sha256(f"{cfg.val_seed}\0{key}".encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(drawn[:8], "big") / 2**64

    return {key for key in keys if draw(key) < share}


def working_share(cfg: DatasetConfig, keys: set[str]) -> float:
    """A usual share that leaves no split empty; 0 where none does."""
    return next((share for share in _SHARES if 0 < len(_below(cfg, keys, share)) < len(keys)), 0)


def same_files(cfg: DatasetConfig, images: Mapping[str, Sequence[tuple[str, str]]]) -> Iterator[str]:
    """A message for each two splits that have files in common; images: (key, file) of each, by split."""
    real = functools.cache(os.path.realpath)
    folders = {split: {real(os.path.dirname(file)) for _, file in found} for split, found in images.items()}
    for first, second in pairs(images, cfg.allow_duplicates):
        if folders[first].isdisjoint(folders[second]):
            continue
        places = {split: _places(images[split], real) for split in (first, second)}
        if not (shared := places[first].keys() & places[second].keys()):
            continue
        do = "give each split a folder of its own (data.image_dir, data.split_dirs)"
        if first in cfg.split_lists or second in cfg.split_lists:
            do = "name each image in one list of data.split_lists only"
        elif len(shared) == len(places[first]) == len(places[second]):
            do = "divide the folder by lists (data.split_lists)"
            if len(cfg.splits) == 2 and (share := working_share(cfg, {places[first][f] for f in shared})):
                do = f"divide the folder: {override('data.val_share', share)}, or by lists (data.split_lists)"
        yield _in_both(first, second, "", [places[first][place] for place in sorted(shared)], do)


def _places(found: Sequence[tuple[str, str]], real: Callable[[str], str]) -> dict[str, str]:
    return {f"{real(os.path.dirname(file))}/{os.path.basename(file)}": key for key, file in found}


@dataclass(frozen=True, slots=True)
class Shared:
    """Images that two splits share. whole: all of the second."""

    first: str
    second: str
    whole: bool
    text: str


def same_bytes(
    allowed: Collection[str], images: Mapping[str, Mapping[Any, str]], train: Collection[str] | None = None
) -> Iterator[Shared]:
    """For each of the `pairs` that share images; images: what stands for its bytes -> key, by split."""
    for first, second in pairs(images, allowed, train):
        if shared := images[first].keys() & images[second].keys():
            named = sorted(f"{images[first][one]} = {images[second][one]}" for one in shared)
            text = _in_both(first, second, ", byte for byte", named, "remove them from one")
            yield Shared(first, second, len(shared) == len(images[second]), text)


EVAL_SPLIT = "val"  # that a run scores where it names no other


def is_training(split: str) -> bool:
    """True for a split that is shuffled and trimmed, by its name."""
    return not split.startswith(("val", "test"))


def pairs(
    splits: Collection[str], allowed: Collection[str], train: Collection[str] | None = None
) -> Iterator[tuple[str, str]]:
    """Every two splits that may not share images: one is trained on, the other scored.

    train: those that are trained on; None: those whose name says so.
    """
    trained = {split for split in splits if is_training(split)} if train is None else set(train)
    for a, b in combinations(splits, 2):
        if (a in trained) != (b in trained) and a not in allowed and b not in allowed:
            yield a, b


def _in_both(first: str, second: str, how: str, names: Sequence[str], do: str) -> str:
    return (
        f"{len(names)} images are in {first} and in {second}{how} ({listed(names, _SHOWN)}): scores would be "
        f"too good; {do}; if that is meant: {override('data.allow_duplicates', [second])}"
    )
