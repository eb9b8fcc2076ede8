"""A CSV with an image and its mask in each line (RFC 4180; UTF-8, with or without the mark of an editor).

    image,mask,split,group
    photos/a.jpg,masks/a.png,train,plot 7

Paths are given from the folder of the CSV on, or whole, and lie in that folder. Without a `split`, or where
it is empty throughout, all lines are one pool. `data.columns` names the columns that are called otherwise;
any column may be the `data.group` of a division."""

import csv
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

from segformer.data.formats.base import Found, Labeled, inside, key_of, label_text
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.masks import Defect
from segformer.errors import DataError, listed, reraise_as

USUAL = ("{split}.csv", "pairs.csv", "dataset.csv", "data.csv")


def detect(found: Found) -> bool:
    """One of the usual files is there and has both columns."""
    cfg, name = found.cfg, found.label_name(*USUAL)
    if not name.lower().endswith(".csv") or not (found.root / name).is_file():
        return False
    with open(found.root / name, encoding="utf-8-sig", errors="replace") as stream:
        header = {title.strip(' "\r\n') for title in re.split("[,;\t]", stream.readline(2**16))}
    return {cfg.column("image"), cfg.column("mask")} <= header


def read(found: Found) -> None:
    """The lines of a split."""
    path, cfg = found.labels(*USUAL), found.cfg
    place, found.covers = os.path.abspath(path.parent), True
    rows = dict(_rows(cfg, path))
    if named := {row.get(cfg.column("split"), "") for row in rows.values()} - {""}:
        parts = found.parts(named, f"{str(path)!r} has the splits")
        rows = {line: row for line, row in rows.items() if row[cfg.column("split")] in parts}
    missing: dict[str, set[str]] = {"image": set(), "mask": set()}
    for line, row in rows.items():
        files = {}
        for role in missing:
            name = row[cfg.column(role)]
            try:
                if not name:
                    raise DataError(f"{cfg.column(role)} is empty; give a path")
                files[role] = inside(place, os.path.relpath(name, place) if os.path.isabs(name) else name)
            except DataError as error:
                found.defects.append(Defect("listing", f"line {line} of {str(path)!r}: {error}"))
        if len(files) < len(missing):
            continue
        gone = {role for role, name in files.items() if not os.path.isfile(path.parent / name)}
        for role in gone:
            missing[role].add(files[role])
        if not gone:
            key = key_of(files["image"])
            image, mask = (f"{path.parent}/{name}" for name in files.values())
            found.labeled.append(Labeled(key, image, mask_file=mask))
            for column, value in row.items():
                found.columns.setdefault(column, {})[key] = value
    for role, names in missing.items():
        what = f"{role}s of {str(path)!r} are not below {str(path.parent)!r}"
        found.note(what, "add them, or take their lines out", names)


def _rows(cfg: DatasetConfig, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of the line, column -> value) of each; blank lines are none."""
    lines = csv.reader(io.StringIO(label_text(path), newline=""), strict=True)
    with reraise_as(DataError, f"{str(path)!r} is no CSV", "save it as one (RFC 4180)", on=csv.Error):
        header = [title.strip() for title in next(lines, [])]
        for role in ("image", "mask"):
            if (name := cfg.column(role)) not in header:
                do = f"set 'data.columns={{{role}: <column>}}'"
                if len(header) == 1 and set(header[0]) & {";", "\t"}:
                    do = "save it with commas between the columns"
                raise DataError(f"{str(path)!r} has no column {name!r}, but {listed(header, 8)}; {do}")
        for row in lines:
            if len(row) not in (0, len(header)):
                what = (
                    f"line {lines.line_num} of {str(path)!r} has {len(row)} values for {len(header)} columns"
                )
                raise DataError(f'{what}; put values that hold a comma into "..."')
            if row:
                yield lines.line_num, dict(zip(header, row, strict=True))
