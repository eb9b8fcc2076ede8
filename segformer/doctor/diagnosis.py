"""Facts of a scan -> verdicts: what is fine, what is suspicious, and what training must not start with.

FAIL   training would refuse the data, or learn nothing that can be meant (masks of 0 and 255, ids without a
       class, everything ignored)
WARN   training may start, and somebody should know
OK     checked and fine

Every WARN and FAIL ends in what to do, in settings that can be copied. All checks run; none hides another."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from segformer.data.sources.dataset import IGNORE_INDEX, DatasetConfig, label_table
from segformer.doctor.scan import SplitScan

OK, WARN, FAIL = "OK", "WARN", "FAIL"
MUCH_IGNORED = 0.5  # share of ignored pixels above which somebody should look
_LISTED = 12  # ids, classes or colours in one message


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judgement. about: what was looked at, such as `train: label ids`."""

    level: str
    about: str
    text: str


def judge_source(cfg: DatasetConfig, scans: Sequence[SplitScan]) -> list[Verdict]:
    """Verdicts on a source folder."""
    verdicts = [verdict for scan in scans for verdict in _files(cfg, scan)]
    if cfg.task == "segmentation":
        verdicts += [_label_ids(cfg, scans)]
        verdicts += [verdict for check in (_never_seen_ids, _reduced_twice) for verdict in check(cfg, scans)]
    return verdicts


def judge_labels(
    classes: Sequence[str], scans: Sequence[SplitScan], *, train: str, evaluation: str
) -> list[Verdict]:
    """Verdicts on the train ids and images of a folder's or of shards' splits."""
    by_name = {scan.name: scan for scan in scans if scan.samples}
    verdicts = [verdict for scan in by_name.values() for verdict in _ignored(scan)]
    if train in by_name:
        verdicts += _classes_of(classes, by_name[train], by_name.get(evaluation))
    verdicts += [verdict for scan in by_name.values() for verdict in _twice(scan)]
    names = sorted(by_name)
    for index, first in enumerate(names):
        verdicts += [_overlap(by_name[first], by_name[second]) for second in names[index + 1 :]]
    return verdicts


def _files(cfg: DatasetConfig, scan: SplitScan) -> list[Verdict]:
    about = f"{scan.name}: files"
    remedies: dict[str, Callable[[], str]] = {
        "listing": lambda: "",
        "unreadable": lambda: "replace or remove them",
        "size": lambda: "an image and its mask must have the same pixels; export the masks again",
        "colour": lambda: _colour_remedy(cfg, scan),
        "painted": lambda: (
            "add the colours to data.mask_colours, and map them in data.label_map (255 = ignore)"
        ),
    }
    names = {
        "unreadable": "files cannot be used",
        "size": "masks have another size than their image",
        "colour": "masks hold colours, not label ids",
        "painted": "masks hold colours that data.mask_colours does not list",
    }
    verdicts = []
    for kind, defect in scan.defects.items():
        if kind == "listing":
            verdicts += [Verdict(FAIL, about, text) for text in defect.examples]
            continue
        more = ", ..." if defect.count > len(defect.examples) else ""
        places = "; ".join(defect.examples)
        verdicts.append(
            Verdict(FAIL, about, f"{defect.count} {names[kind]} ({places}{more}); {remedies[kind]()}")
        )
    return verdicts or [Verdict(OK, about, f"{scan.samples} samples, every file read and decoded")]


def _colour_remedy(cfg: DatasetConfig, scan: SplitScan) -> str:
    found = [list(colour) for colour, _ in scan.colours.most_common(_LISTED)]
    more = ", ..." if len(scan.colours) > _LISTED else ""
    if len(scan.colours) > 4 * max(_LISTED, len(cfg.classes)):
        return (
            f"the masks have {len(scan.colours)} colours or more, as after a lossy format or smooth resize; "
            "export label ids as PNG"
        )
    return (
        f"give their colours in the order of the raw ids: data.mask_colours={found}{more} "
        "(found, most frequent first)"
    )


def _label_ids(cfg: DatasetConfig, scans: Sequence[SplitScan]) -> Verdict:
    """One verdict on the raw ids of all splits together: a data set has one label map."""
    about = "label ids"
    raw: Counter[int] = Counter()
    images: Counter[int] = Counter()
    for scan in scans:
        raw.update(scan.raw_pixels)
        images.update(scan.raw_images)
    if not cfg.classes:
        return Verdict(
            FAIL, about, f"data.classes is empty, masks hold {_some(sorted(raw))}; name the classes"
        )
    if not raw:
        return Verdict(FAIL, about, "no mask could be read; see the verdicts on files")
    table, count = label_table(cfg), len(cfg.classes)
    found = set(raw)
    if (
        found <= {0, IGNORE_INDEX}
        and IGNORE_INDEX in found
        and table[IGNORE_INDEX] == IGNORE_INDEX
        and count > 1
    ):
        return Verdict(
            FAIL,
            about,
            "masks hold 0 and 255 only; 255 means ignored, so one class would be left; if 255 is class 1: "
            "'+data.label_map={0: 0, 255: 1}'",
        )
    unknown = sorted(value for value in found if table[value] < 0)
    if not unknown:
        known = _some(sorted(found))
        return Verdict(
            OK, about, f"{known}: all known ({'label map' if cfg.label_map else 'ids are train ids'})"
        )
    where = ", ".join(f"{value} in {images[value]} images" for value in unknown[:_LISTED])
    more = ", ..." if len(unknown) > _LISTED else ""
    return Verdict(FAIL, about, f"ids without a class: {where}{more}; {_id_remedy(cfg, found, unknown)}")


def _id_remedy(cfg: DatasetConfig, found: set[int], unknown: list[int]) -> str:
    count = len(cfg.classes)
    if cfg.label_map:
        return "add them to data.label_map (id: train id, or 255 to ignore)"
    if unknown == [count]:
        shifted = f"'+data.label_map={_shift_text(count, 0 in found)}'"
        if 0 not in found:
            return f"ids start at 1; shift them: {shifted}"
        return (
            f"{count} classes have ids 0 to {count - 1}; if 0 means 'no label' (reduce_zero_label): "
            f"{shifted}; if every id is a class, data.classes lacks one name"
        )
    return (
        f"{count} classes have ids 0 to {count - 1}; add the missing names to data.classes, or map every id "
        "in data.label_map (255 = ignore)"
    )


def _shift_text(count: int, zero: bool) -> str:
    pairs = (["0: 255"] if zero else []) + [f"{raw}: {raw - 1}" for raw in range(1, count + 1)]
    shown = pairs if len(pairs) <= 6 else [*pairs[:3], "...", pairs[-1]]
    return "{" + ", ".join(shown) + "}"


def _never_seen_ids(cfg: DatasetConfig, scans: Sequence[SplitScan]) -> list[Verdict]:
    seen = {raw for scan in scans for raw in scan.raw_pixels}
    missing = sorted(raw for raw, train in cfg.label_map.items() if raw not in seen and train != IGNORE_INDEX)
    if not missing or not seen:
        return []
    return [
        Verdict(
            WARN,
            "label map",
            f"{len(missing)} of {len(cfg.label_map)} mapped ids are in no mask ({_some(missing)}); "
            "check that the map is that of these masks",
        )
    ]


def _reduced_twice(cfg: DatasetConfig, scans: Sequence[SplitScan]) -> list[Verdict]:
    """A map 0 -> 255, i -> i - 1 on masks that hold train ids already drops a class and shifts the rest."""
    count = len(cfg.classes)
    reduces = cfg.label_map.get(0) == IGNORE_INDEX and all(
        cfg.label_map.get(raw) == raw - 1 for raw in range(1, count + 1)
    )
    seen = {raw for scan in scans for raw in scan.raw_pixels} - {IGNORE_INDEX}
    if not (reduces and seen and max(seen) == count - 1):
        return []
    return [
        Verdict(
            WARN,
            "label map",
            f"it maps 0 to ignored and {count} to the last class, but no mask holds {count}: they may hold "
            "train ids already; then leave data.label_map empty",
        )
    ]


def _ignored(scan: SplitScan) -> list[Verdict]:
    about = f"{scan.name}: ignored pixels"
    labelled = int(scan.class_pixels.sum())
    share = scan.ignored_pixels / max(1, labelled + scan.ignored_pixels)
    if not labelled:
        if not scan.raw_pixels and not scan.ignored_pixels:
            return []  # no mask was understood, which other verdicts say
        return [
            Verdict(
                FAIL, about, "every pixel is ignored, nothing can be learnt; check data.label_map and 255"
            )
        ]
    empty = f", {scan.ignored_images} images without any label" if scan.ignored_images else ""
    if share > MUCH_IGNORED or scan.ignored_images:
        return [
            Verdict(
                WARN, about, f"{100 * share:.1f} %{empty}; look at the contact sheet whether this is meant"
            )
        ]
    return [Verdict(OK, about, f"{100 * share:.1f} %")]


def _classes_of(classes: Sequence[str], train: SplitScan, evaluation: SplitScan | None) -> list[Verdict]:
    about = f"{train.name}: classes"
    seen = train.class_images > 0
    if not seen.any():
        return []
    verdicts = []
    if len(classes) > 1 and seen.sum() == 1:
        name = classes[int(np.flatnonzero(seen)[0])]
        verdicts.append(
            Verdict(FAIL, about, f"only {name!r} is ever seen; check the masks and data.label_map")
        )
    lost = [] if evaluation is None else np.flatnonzero(~seen & (evaluation.class_images > 0)).tolist()
    if evaluation is not None and lost:
        verdicts.append(
            Verdict(
                WARN,
                about,
                f"{_names(classes, lost)} never seen in {train.name} but in {evaluation.name}: "
                "its IoU will be 0; move images between the splits, or map the class to 255",
            )
        )
    never = [int(k) for k in np.flatnonzero(~seen) if k not in set(lost)]
    if never:
        verdicts.append(
            Verdict(
                WARN, about, f"{_names(classes, never)} never seen; remove the class or check data.label_map"
            )
        )
    if not verdicts:
        rarest = int(np.argmin(train.class_pixels))
        share = 100 * train.class_pixels[rarest] / train.class_pixels.sum()
        of = "images" if np.array_equal(train.class_pixels, train.class_images) else "labelled pixels"
        verdicts.append(
            Verdict(
                OK,
                about,
                f"all {len(classes)} seen; the rarest is {classes[rarest]!r}, {share:.3g} % of the {of}, in "
                f"{int(train.class_images[rarest])} of {train.samples} images",
            )
        )
    return verdicts


def _twice(scan: SplitScan) -> list[Verdict]:
    if not scan.twice.count:
        return []
    return [
        Verdict(
            WARN,
            f"{scan.name}: copies",
            f"{scan.twice.count} images are there more than once ({'; '.join(scan.twice.examples)}); "
            "remove the copies",
        )
    ]


def _overlap(first: SplitScan, second: SplitScan) -> Verdict:
    about = f"{first.name} and {second.name}"
    shared = first.digests.keys() & second.digests.keys()
    if not shared:
        return Verdict(OK, about, "no image is in both")
    pairs = sorted((first.digests[digest], second.digests[digest]) for digest in shared)
    shown = "; ".join(f"{one} = {other}" for one, other in pairs[:3])
    return Verdict(
        WARN,
        about,
        f"{len(shared)} images are in both, byte for byte ({shown}{'; ...' if len(pairs) > 3 else ''}): "
        "scores would be too good; remove them from one",
    )


def _some(values: Sequence[int]) -> str:
    """Sorted numbers with runs shortened: 0 to 10, 255."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    parts = [str(low) if low == high else f"{low} to {high}" for low, high in runs]
    return ", ".join(parts[:_LISTED]) + (", ..." if len(parts) > _LISTED else "")


def _names(classes: Sequence[str], places: Sequence[int] | np.ndarray) -> str:
    names = [classes[int(place)] for place in places]
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} classes ({', '.join(names[:_LISTED])}{more})" if len(names) > 1 else f"{names[0]!r}"
