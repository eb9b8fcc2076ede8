"""A folder of files that is there whole or not at all: written beside its place, synced, renamed; verified.

    <folder>/
      step-00016000/             committed: its files and
        MANIFEST.json            {file: {bytes, sha256}}, written last
      .tmp-step-00016000-<hex>/  being written; another one for every attempt, so that two never mix
      .old-step-00016000/        what is being replaced by files of the same name
      .del-step-00008000-<hex>/  being deleted: first out of sight, then removed
      bad-step-00012000/         found damaged, kept for a look

`commit`: every file is written and synced, then the manifest, then the folder; one rename puts it in its
place and the parent is synced. A crash at any point leaves what was there before, or the new folder, and
hidden leftovers, which `clean` removes; it also puts an .old-* back whose replacement never came. `verify`
reads files in a stream: memory does not depend on their size.

Owns names, bytes and durability; what the files mean is format.py's. Symbolic links are never followed when
something is deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import secrets
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from segformer.errors import CheckpointError, reason_of, reraise_as
from segformer.files import parse_json, read_bytes, regular, remove, sha256_of, staged, sync

MANIFEST = "MANIFEST.json"


def commit(
    folder: Path,
    name: str,
    writers: Mapping[str, Callable[[Path], object]],
    fence: Callable[[], None] = lambda: None,
) -> Path:
    """Write `writers` (file name -> function that writes that file) as folder/name, whole or not at all.

    What has stood there is replaced, and is there again where the writing fails. `fence` is called last,
    before the folder gets its name; what it raises leaves everything as it was.

    Raises:
        CheckpointError: the disk is full or refuses; nothing has changed.
    """
    final, old = folder / name, folder / f".old-{name}"

    def make_room() -> None:
        fence()
        if final.exists():
            delete(old)  # there only where an earlier one could not be deleted
            final.rename(old)
            at_end.callback(_settle, old)

    what, do = f"{final} can't be written", "free space, or make the folder writable"
    with reraise_as(CheckpointError, what, do), contextlib.ExitStack() as at_end:
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            sync(folder.parent)
        with staged(final, fence=make_room) as place:
            place.mkdir()
            for file, write in writers.items():
                write(place / file)
                sync(place / file)
            (place / MANIFEST).write_bytes(_encode({file: _entry(place / file) for file in writers}))
            sync(place / MANIFEST)
    return final


def verify(path: Path, required: Collection[str], *, digests: bool = True) -> list[str]:
    """Names of the files of a committed folder, all of which are as they were written.

    The manifest is made anew from the files and compared byte for byte, so that a flipped bit in the
    manifest itself is found too. Without `digests` only presence and sizes are looked at.

    Raises:
        CheckpointError: a file is missing or differs, or `required` is not all there.
    """
    try:
        written = read_bytes(path / MANIFEST)
        entries = _decode(written)
        found = {name: _entry(path / name) if digests else _size(path / name) for name in entries}
    except (OSError, ValueError) as error:
        file = Path(getattr(error, "filename", None) or MANIFEST).name
        raise CheckpointError(f"{path} is damaged: {file}: {reason_of(error)}") from error
    same = (
        _encode(found) == written if digests else all(found[n].items() <= entries[n].items() for n in found)
    )
    if not same:
        raise CheckpointError(
            f"{path} is damaged: its files do not match the sizes and sha256 sums of {MANIFEST}"
        )
    if missing := [name for name in required if name not in found]:
        raise CheckpointError(f"{path} is damaged: {MANIFEST} does not list {missing[0]}")
    return list(found)


def read_verified(path: Path, name: str) -> bytes:
    """The content of one file of a committed folder; CheckpointError where it is not as it was written."""
    with reraise_as(CheckpointError, f"{path} is damaged", on=(OSError, ValueError)):
        content, written = read_bytes(path / name), _decode(read_bytes(path / MANIFEST))
        if written.get(name, {}).get("sha256") != hashlib.sha256(content).hexdigest():
            raise ValueError(f"{name} does not match its sha256 sum in {MANIFEST}")
    return content


def delete(path: Path) -> bool:
    """Remove a folder, first out of sight: nothing half deleted is ever read. False where it stays."""
    doomed = path.with_name(f".del-{path.name.lstrip('.')}-{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        path.rename(doomed)
    remove(doomed)
    return not path.exists()


def set_aside(path: Path) -> Path:
    """Rename a damaged folder to bad-*, so that nobody takes it for a good one again; its new place."""
    names = (f"bad-{path.name}" + (f".{count}" if count else "") for count in itertools.count())
    target = next(place for name in names if not (place := path.with_name(name)).exists())
    path.rename(target)
    return target


def clean(folder: Path) -> None:
    """Remove what interrupted writes and deletions left behind. Only at a start: it would take a running
    writer's files away."""
    for old in folder.glob(".old-*"):
        _settle(old)
    for path in (*folder.glob(".tmp-*"), *folder.glob(".del-*")):
        remove(path)


def _settle(old: Path) -> None:
    """Delete what has been replaced, or put it back where its replacement never came."""
    place = old.with_name(old.name.removeprefix(".old-"))
    if place.exists():
        delete(old)
    else:
        old.rename(place)


def _size(path: Path) -> dict[str, Any]:
    return {"bytes": regular(path).stat().st_size}


def _entry(path: Path) -> dict[str, Any]:
    return _size(path) | {"sha256": sha256_of(path)}


def _encode(entries: Mapping[str, Mapping[str, Any]]) -> bytes:
    return json.dumps(entries, indent=1).encode()


def _decode(manifest: bytes) -> dict[str, dict[str, Any]]:
    entries = parse_json(manifest)
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ValueError("it is no table of files")
    if strange := [name for name in entries if Path(name).name != name]:
        raise ValueError(f"{strange[0]!r} is no name of a file")
    return entries
