"""What a data set contains, judged: whether it can be learnt from, for doctor, sharding and training alike.

FAIL   nothing, or not what is meant, would be learnt; sharding and training refuse the set with this line
       fewer than two classes; no labelled pixel to learn from, or to score; one class only, or a class that
       training never sees (but for those that data.allow_unseen names, or [*]); ids without a class
WARN   training may start, and somebody should know
OK     checked and fine

Histograms are of train ids (in classification of images), raw ids are those in the masks. A remedy is an
override that can be pasted into a shell; a label map is only proposed where it gives each class its id."""

import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from segformer.data.sources.dataset import ANY, IGNORE_INDEX, DatasetConfig
from segformer.errors import DataError, listed, printable

OK, WARN, FAIL = "OK", "WARN", "FAIL"
LEAST_LEVELS = 128  # of 256 that images of 16 bits must keep without data.image_range
LISTED = 12  # ids, classes or colors in one message
SMOOTH = "as after a smooth resize or a lossy format; export them again as PNG, resized to the nearest pixel"
_PLAIN = re.compile(r"(?!(?:true|false|null|nan|inf|yes|no|on|off)$)[A-Za-z_][A-Za-z0-9_-]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Finding:
    """One judgement. about: what was looked at, such as `train: classes`."""

    level: str
    about: str
    text: str


@dataclass(slots=True)
class Depth:
    """Images of 16 bits, and what is known of those that are crushed: few of their levels would be left."""

    images: int = 0
    crushed: int = 0
    kept: int = 0
    """Levels of 256, the most of a crushed image."""
    low: int = 2**16 - 1
    high: int = 0

    def look(self, image_range: Sequence[int], levels: tuple[int, int] | None) -> None:
        """Count an image by its lowest and highest value; one of 8 bits has None."""
        if levels is None:
            return
        self.images += 1
        low, high = levels
        first, last = image_range or (0, 2**16 - 1)
        kept = max(0, min(high, last) - max(low, first)) * 256 // (last - first + 1) + 1
        if low < high and kept < (2 if image_range else LEAST_LEVELS):  # 12 bits in 16 become 16 levels
            self.add(Depth(0, 1, kept, low, high))

    def add(self, other: "Depth") -> None:
        """Count the images of `other`, too."""
        self.images, self.crushed = self.images + other.images, self.crushed + other.crushed
        self.kept = max(self.kept, other.kept)
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


@dataclass(frozen=True, slots=True)
class Histogram:
    """What a split of K classes holds."""

    samples: int
    class_pixels: np.ndarray
    """int64 (K,); images in classification."""
    raw_pixels: Mapping[int, int] = field(default_factory=dict)
    """Raw id -> pixels, before the label map; empty where it is not known."""
    depth: Depth = field(default_factory=Depth)

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Histogram":
        """That of a split's entry in dataset.json."""
        raw = {int(raw): pixels for raw, pixels in entry.get("raw_ids", {}).items()}
        return cls(
            sum(s["samples"] for s in entry["shards"]),
            np.array(entry["class_pixels"], np.int64),
            raw,
            Depth(**entry.get("depth", {})),
        )


@dataclass(frozen=True, slots=True)
class Labels:
    """What the labels of a set mean. allow_unseen: class names, or [*]."""

    task: str
    classes: Sequence[str]
    label_map: Mapping[int, int] = field(default_factory=dict)
    allow_unseen: Collection[str] = ()
    allow_duplicates: Collection[str] = ()
    image_range: Sequence[int] = ()
    sharded: bool = False
    """A remedy needs other shards."""

    @property
    def again(self) -> str:
        return ", and shard again with it" * self.sharded

    @classmethod
    def of(cls, content: Mapping[str, Any], cfg: DatasetConfig) -> "Labels":
        """Those of dataset.json; `cfg` may allow more than sharding was told."""
        label_map = {int(raw): train for raw, train in content.get("label_map", {}).items()}
        unseen = {*cfg.allow_unseen, *content.get("allow_unseen", ())}
        duplicates = {*cfg.allow_duplicates, *content.get("allow_duplicates", ())}
        image_range = content.get("image_range", ())
        return cls(
            content["task"], content["classes"], label_map, unseen, duplicates, image_range, sharded=True
        )

    @classmethod
    def configured(cls, cfg: DatasetConfig, classes: Sequence[str]) -> "Labels":
        """Those of a set that is not sharded yet."""
        return cls(cfg.task, classes, cfg.label_map, cfg.allow_unseen, cfg.allow_duplicates, cfg.image_range)


def judge_content(
    labels: Labels, splits: Mapping[str, Histogram], train: Collection[str], scored: str = ""
) -> Iterator[Finding]:
    """Findings on classes and histograms. train: the splits that are trained on; scored: the eval_split."""
    found = {raw for split in splits.values() for raw in split.raw_pixels}
    if len(labels.classes) == 1:  # without any, others say so
        yield Finding(FAIL, "classes", _one_class(labels, found))
    depth = Depth()
    for split in splits.values():
        depth.add(split.depth)
    yield from _depth(labels.image_range, depth)
    empty = [name for name, split in splits.items() if not split.class_pixels.any()]
    if labels.task == "segmentation":
        for name in empty:
            if splits[name].samples:
                level = FAIL if name in train or name == scored else WARN  # test may have dummy labels
                text = _ignored(labels, name, splits[name])
                if name == scored:
                    leave = "" if labels.sharded else "leave it out of data.splits and "
                    text += f"; or {leave}score another split: eval_split=<split>"
                yield Finding(level, f"{name}: ignored pixels", text)
    trained = [splits[name].class_pixels for name in train if name in splits]
    if trained and len(labels.classes) > 1 and (seen := np.sum(trained, axis=0) > 0).any():
        others = {name: split for name, split in splits.items() if name not in train and name not in empty}
        yield from _unseen(labels, " and ".join(train), seen, others, found)


def _depth(image_range: Sequence[int], depth: Depth) -> Iterator[Finding]:
    """A crush of most images of 16 bits; one hot pixel hides that of its own image only."""
    if 2 * depth.crushed > depth.images:
        low, high, kept = depth.low, depth.high, depth.kept
        whole = 2 ** high.bit_length() - 1
        proposed = [0, whole] if high - low >= whole // 2 else [low, high]
        give, same = override("data.image_range", proposed), override("data.image_range", [0, 2**16 - 1])
        text = f"most 16-bit images hold values of {low} to {high}, of which {kept} of 256 levels would stay"
        yield Finding(
            FAIL, "depth", f"{text}; say what becomes black and white: {give} (as they are: {same})"
        )


def check_depth(image_range: Sequence[int], depth: Depth) -> None:
    """DataError where most images are crushed: sharding ends with its first shard, not after its last."""
    for finding in _depth(image_range, depth):
        raise DataError(finding.text)


def check_content(
    labels: Labels, splits: Mapping[str, Histogram], train: Collection[str], scored: str = ""
) -> None:
    """DataError for the first FAIL of `judge_content`."""
    for finding in judge_content(labels, splits, train, scored):
        if finding.level == FAIL:
            raise DataError(finding.text)


def _one_class(labels: Labels, found: Collection[int]) -> str:
    if labels.task == "classification":
        return f"{_names(labels.classes)} is the only class: there is nothing to tell apart; add another one"
    (name,) = labels.classes
    rest = "background" if name != "background" else "object"
    text = (
        f"data.classes has one name, {name!r}: a softmax over one class learns nothing; name the "
        f"rest, too: {override('data.classes', [rest, name])}"
    )
    swap, keep = ({0: a, IGNORE_INDEX: 1 - a} for a in (1, 0))
    first, second = override("data.label_map", swap), override("data.label_map", keep)
    both = f"if 0 is {name!r}: {first}; if 255 is: {second}"
    if not found:
        return f"{text} (masks of 0 and 255: also, {both})"
    return (f"{text} and, {both}" if set(found) == {0, IGNORE_INDEX} else text) + labels.again


def _ignored(labels: Labels, name: str, split: Histogram) -> str:
    ids = set(split.raw_pixels)
    text = f"every pixel of {name} is ignored: nothing can be learnt or scored; "
    if ids <= {IGNORE_INDEX}:
        text += "its masks hold 255 only: export them again"
    else:
        text += f"its masks hold {runs(ids)}: map these ids to classes in data.label_map"
    return text + labels.again


def _unseen(
    labels: Labels, train: str, seen: np.ndarray, others: Mapping[str, Histogram], found: set[int]
) -> Iterator[Finding]:
    about, classes = f"{train}: classes", np.array(labels.classes, object)
    allowed = np.array([ANY in labels.allow_unseen or name in labels.allow_unseen for name in classes])
    if seen.sum() == 1:
        text = f"only {_names(classes[seen])} is ever seen in {train}: there is nothing to tell apart; "
        text += _map_remedy(labels, found) or "check the masks and data.label_map"
        text += labels.again
        yield Finding(FAIL, about, text)
    elif (lost := ~seen & ~allowed).any():
        where = [name for name, split in others.items() if (split.class_pixels[lost] > 0).any()]
        scored = f" but in {listed(where)}, where it will score 0" if where else ""
        text = f"{_names(classes[lost])} never seen in {train}{scored}; "
        if remedy := _map_remedy(labels, found):
            text += f"{remedy}{labels.again}; "
        elif found and not labels.label_map and found.isdisjoint(np.flatnonzero(lost).tolist()):
            text += f"masks hold {runs(found)} only: leave the name out of data.classes; "
        yield Finding(FAIL, about, f"{text}if that is meant: {_allowing(classes[lost])}")
    for name, split in others.items():
        if (missing := seen & (split.class_pixels == 0)).any():
            text = (
                f"{_names(classes[missing])} never seen in {name}: no score will tell how well it is learnt"
            )
            yield Finding(WARN, f"{name}: classes", text)


def _allowing(names: Sequence[str]) -> str:
    short = len(names) <= LISTED and all(name.isprintable() for name in names)
    return override("data.allow_unseen", names if short else [ANY])


def _map_remedy(labels: Labels, found: set[int]) -> str:
    """A label map that gives each class its id, where the ids suggest one."""
    if labels.task == "classification" or labels.label_map or not found:
        return ""
    proposed = _proposed_map(len(labels.classes), found)
    if not proposed:
        return ""
    if found == {0, IGNORE_INDEX}:
        text = "masks hold 0 and 255 only, and 255 means ignored: "
        return f"{text}if it is {labels.classes[1]!r}, set {override('data.label_map', proposed)}"
    return f"masks hold {runs(found)}: if these are the classes, set {override('data.label_map', proposed)}"


def _proposed_map(count: int, found: set[int]) -> dict[int, int]:
    """Ids of a whole set -> 0 to count - 1 in their order; empty where nothing suggests itself."""
    inner = sorted(found - {IGNORE_INDEX})
    if inner == list(range(count)):
        return {}
    if inner == list(range(count + 1)):  # "reduce zero label"
        return {0: IGNORE_INDEX} | {raw: raw - 1 for raw in inner[1:]}
    ids = inner if len(inner) == count else sorted(found)
    return {raw: train for train, raw in enumerate(ids)} if len(ids) == count else {}


def id_remedy(labels: Labels, found: set[int]) -> str:
    """What to do about raw ids without a class, in view of all that were found; "" where none is known."""
    count = len(labels.classes)
    if labels.label_map:
        return "add them to data.label_map (id: train id, or 255 to ignore)"
    if len(found) > 4 * max(LISTED, count):
        return f"masks of {count} classes hold {len(found)} ids, {SMOOTH}"
    if not (proposed := _proposed_map(count, found)):
        return ""
    shown = override("data.label_map", proposed)
    if 0 not in found and min(found) == 1:
        return f"ids start at 1; shift them: {shown}"
    if proposed.get(0) == IGNORE_INDEX:
        return f"if 0 means 'no label' (reduce_zero_label): {shown}; if it is one, data.classes lacks a name"
    return f"masks hold {runs(found)}; if these are the {count} classes: {shown}"


def no_classes(found: set[int]) -> str:
    """What to say where no class has a name; found: the raw ids in the masks, as far as they are known."""
    last = max(found - {IGNORE_INDEX}, default=1)
    names = ["background", *(f"class{k}" for k in range(1, max(1, last) + 1))]
    hold = f", masks hold {runs(found)}" if found else ""
    example = override("data.classes", names if len(names) <= LISTED else ["background", "leaf"])
    return f"data.classes is empty{hold}; name the classes in the order of their ids, such as {example}"


def other_classes(wanted: Sequence[str], found: Sequence[str], where: str) -> str:
    """What to say where data.classes is not what `where`, shards, were written with."""
    has, had = ", ".join(map(printable, wanted[:4])), ", ".join(map(printable, found[:4]))
    text = f"data.classes has {len(wanted)} classes ({has}{', ...' * (len(wanted) > 4)}), but {where} was "
    text += f"sharded with {len(found)} ({had}{', ...' * (len(found) > 4)})"
    if len(wanted) == len(found):
        differ = [(k, a, b) for k, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b]
        pairs = [f"class {k} is {a!r} here, {b!r} there" for k, a, b in differ]
        text = f"data.classes differs from {where}: {'; '.join(pairs[:3])}" + ("; ..." if pairs[3:] else "")
        text += " (the same names in another order)" if sorted(wanted) == sorted(found) else ""
    take = f"data=folder {override('data.shards', where)} and no data.classes"
    if len(wanted) == len(found) <= LISTED:
        take = override("data.classes", found)
    return f"{text}; to train with the names of the shards: {take}; else shard again"


def turned_text(task: str, count: int, total: int, file: str, orientation: int) -> str:
    """What to say of images that are stored in another way than they are shown; `file` is the first."""
    remedy = "training sees the stored pixels; to train on them upright, turn the files"
    if task == "segmentation":
        remedy = "their masks must fit the stored pixels; where they fit the upright picture, turn the files"
    return (
        f"{count} of {total} images are stored rotated (EXIF orientation {orientation}, first {file!r}), "
        f"which is not applied: {remedy} (mogrify -auto-orient) and shard again"
    )


def override(key: str, value: Any) -> str:
    """`key=value` as a command of ours takes it, quoted for a shell."""
    return shlex.quote(f"{key}={_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        if not all(_PLAIN.fullmatch(name) for name in value if isinstance(name, str)):
            return json.dumps(value, ensure_ascii=False)
        return f"{{{', '.join(f'{key}: {_text(entry)}' for key, entry in value.items())}}}"
    if not isinstance(value, str):
        is_list = isinstance(value, Sequence | np.ndarray)
        return f"[{','.join(map(_text, value))}]" if is_list else str(value)
    if _PLAIN.fullmatch(value) or value == ANY:
        return value
    # In hydra's quotes a backslash counts before a quote only.
    return '"' + re.sub(r'(\\*)("|$)', lambda f: f[1] * 2 + f[2].replace('"', '\\"'), value) + '"'


def runs(values: Collection[int]) -> str:
    """Numbers with runs shortened: 0 to 10, 255."""
    found: list[list[int]] = []
    for value in sorted(values):
        if found and value == found[-1][1] + 1:
            found[-1][1] = value
        else:
            found.append([value, value])
    return listed([str(low) if low == high else f"{low} to {high}" for low, high in found], LISTED)


def _names(names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"{names[0]!r}"
    return f"{len(names)} classes ({listed(names, LISTED)})"
