"""COCO's panoptic labels: one JSON file, and a PNG of segments for each image.

    annotations   image_id, file_name (of the PNG), segments_info: id, category_id

The color of a pixel says its segment: R + 256 G + 65536 B; 0 is unlabelled, which is ignored. The PNGs lie in
the folder that has the name of the JSON file, without its suffix, beside it or below root."""

import os
from collections import Counter
from typing import Any

from segformer.data.formats.base import IGNORE, Found, inside, need
from segformer.data.formats.coco import Id, contents, id_of, located
from segformer.data.sources.folder import files_below
from segformer.errors import DataError

USUAL = tuple(f"annotations/panoptic_{{split}}{year}.json" for year in ("", "2017"))


def detect(found: Found) -> bool:
    """A file of the usual name is there."""
    names = (Found(found.cfg, found.root, split).label_name(*USUAL) for split in found.cfg.splits)
    return any(name.endswith(".json") and "panoptic" in name for name in names)


def read(found: Found) -> None:
    """The images of a split with their masks of segments."""
    path = found.labels(*USUAL)
    content = contents(path, _segments)
    labeled = located(found, path, content)
    places = (path.with_suffix(""), found.root / path.stem)
    folder = str(next((place for place in places if place.is_dir()), places[0]))
    if not os.path.isdir(folder):
        raise DataError(f"the PNGs of {str(path)!r} are not there: {folder!r} is not a folder; unpack them")
    there = set(files_below(folder))
    unknown: set[str] = set()
    missing: set[str] = set()
    bare: set[str] = set()
    for number, one in labeled.items():
        annotations = content.annotations.get(number, [])
        if len(annotations) != 1:
            bare.add(one.key)
            continue
        file, segments = annotations[0]
        if (name := inside(folder, file)) not in there:
            missing.add(name)
            continue
        one.mask_file, one.segments = f"{folder}/{name}", {0: IGNORE}
        for value, category in segments.items():
            one.segments[value] = content.categories.get(category, "")
            if category not in content.categories:
                unknown.add(str(category))
    found.labeled = [one for one in found.labeled if one.mask_file]
    do = "export it again"
    found.note(f"images of {str(path)!r} have not one annotation", do, bare)
    found.note(f"masks are not in {folder!r}", "add them, or remove their annotations", missing)
    what = f"category ids of segments are not in the categories of {str(path)!r}"
    found.note(what, f"{do}, with its categories", unknown)
    found.covers = True


def _segments(entry: Any, where: str) -> tuple[str, dict[int, Id]]:
    """The name of the PNG, and segment -> category."""
    infos = need(entry, "segments_info", list, where)
    segments: dict[int, Id] = {}
    for info in infos:
        segments[need(info, "id", int, where)] = id_of(info, "category_id", where)
    if twice := [value for value, count in Counter(info["id"] for info in infos).items() if count > 1]:
        raise DataError(f"{where}: the segment {twice[0]} comes more than once; export it again")
    return need(entry, "file_name", str, where), segments
