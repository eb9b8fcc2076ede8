"""What `input=` names -> pictures in order, and the name that the outputs of each begin with.

    photo.jpg                a file, whatever its name ends in
    photos                   the pictures of a folder; with recursive=true also those of the folders in it
    'photos/**/*_left.jpg'   the pictures that a pattern matches; ** stands for any folders
    pictures.txt             a list: a file a line, from where the command runs or from the folder of the list
    [day, night/7.png]       several of these

Outputs mirror what lies below the folder that all inputs have in common: photos/day/7.jpg of input=photos
becomes <output>/day/7.png. Refused: two inputs with one output name, an output that would overwrite an input,
and the folder of the inputs, or with recursive=true one in it, as output.
"""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from segformer.data.sources.folder import LeftOut, files_below, is_hidden, left_out, left_out_text
from segformer.errors import ConfigError, DataError, reraise_as
from segformer.files import parse_yaml, read_text
from segformer.inference.photograph import SUFFIXES

MAX_LIST = 64 * 2**20  # bytes of a list, about a million names


def find(text: str, recursive: bool = False) -> tuple[list[Path], Path, LeftOut]:
    """(the pictures, the folder that all inputs have in common, what else the folders hold).

    Raises:
        DataError: an input is not there, can't be listed, or holds no picture.
    """
    inputs = [text]
    if text.startswith("[") and not os.path.exists(text):
        with reraise_as(ConfigError, f"input={text} is no list", "write input=[a.jpg,photos]", on=ValueError):
            inputs = parse_yaml(text)
        if not inputs or not all(isinstance(one, str) for one in inputs):
            raise ConfigError(f"input={text} is no list of names; write input=[a.jpg,photos]")
    pictures: list[Path] = []
    bases: list[str] = []
    unused: list[str] = []
    for one in inputs:
        found, base, others = _one(one, recursive)
        pictures += found
        bases.append(os.path.abspath(base))
        unused += others
    return list(dict.fromkeys(pictures)), Path(os.path.commonpath(bases)), left_out(unused)


def _one(text: str, recursive: bool) -> tuple[list[Path], str | Path, list[str]]:
    """(pictures, folder that their names are below, other files) of one input."""
    source = Path(text)
    if source.is_file() and source.suffix.lower() == ".txt":
        return _listed(source)
    if source.is_file():
        return [source], source.parent, []
    if source.is_dir():
        names = files_below(str(source)) if recursive else _names(source)
    elif glob.has_magic(text):
        fixed = Path(text)
        while glob.has_magic(str(fixed)):
            fixed = fixed.parent
        names = [os.path.relpath(name, fixed) for name in glob.iglob(text, recursive=True)]
        names = [name for name in names if not (fixed / name).is_dir()]
        source = fixed
    else:
        raise DataError(f"input={text} is no file or folder; give a picture or a folder of pictures")
    used = [name for name in sorted(names) if _is_picture(name) and (source / name).is_file()]
    unused = set(names).difference(used)
    if not used:
        there = f", but {left_out_text(left_out(unused))}" if unused else ""
        below = [f"input={path} ({count} picture{'s' * (count > 1)})" for path, count in _below(source)]
        do = f"give {' or '.join(below)}" if below else "give a folder of pictures"
        do += ", or recursive=true" if below and not glob.has_magic(text) else ""
        raise DataError(f"input={text} holds no picture ({', '.join(SUFFIXES)}){there}; {do}")
    return [source / name for name in used], source, sorted(unused)


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in SUFFIXES and not is_hidden(name)


def _names(folder: Path) -> list[str]:
    with reraise_as(DataError, f"input={folder} cannot be listed", "check its permissions"):
        return [f"{entry.name}/" if entry.is_dir() else entry.name for entry in os.scandir(folder)]


def _listed(source: Path) -> tuple[list[Path], str, list[str]]:
    """The files of a list; one that is not there is found out when it is its turn."""
    with reraise_as(
        DataError, f"input={source} can't be read", "give a file a line", on=(OSError, ValueError)
    ):
        lines = [line for line in read_text(source, most=MAX_LIST).splitlines() if line.strip()]
    if not lines:
        raise DataError(f"input={source} names no picture; give a file a line")
    paths = [path if (path := Path(line)).exists() else source.parent / path for line in lines]
    return paths, os.path.commonpath([os.path.abspath(path.parent) for path in paths]), []


def _below(source: Path) -> list[tuple[Path, int]]:
    """The first folders below one that hold pictures, and how many."""
    found = []
    for path, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        used = sum(map(_is_picture, names))
        found += [(Path(path), used)] if used else []
        if len(found) == 2:
            break
    return found


def plan(pictures: list[Path], base: Path, output: Path, endings: Iterable[str]) -> list[tuple[Path, Path]]:
    """(picture, path of its outputs without their ending) for each; `endings`: of what is written for it."""
    inputs = {path.resolve(): path for path in pictures}
    owners: dict[Path, Path] = {}
    found = []
    for path in pictures:
        target = output / os.path.relpath(os.path.abspath(path.parent), base) / path.stem
        for ending in endings:
            written = target.with_name(target.name + ending)
            owner = owners.setdefault(written, path)
            if owner != path:
                raise DataError(f"{owner} and {path} would both become {written}; rename one")
            if overwritten := inputs.get(written.resolve()):
                what = f"output={output} would overwrite the input {overwritten}"
                raise ConfigError(f"{what}; choose another folder")
        found.append((path, target))
    return found


def check_folder(base: Path, output: Path, folder: bool, recursive: bool) -> None:
    """ConfigError where the outputs would lie among the inputs. folder: `base` is given as one."""
    place, source = output.resolve(), base.resolve()
    if folder and (place == source or (recursive and source in place.parents)):
        where = "is the input folder" if place == source else "lies in the input folder"
        raise ConfigError(f"output={output} {where}: masks would lie among the images; choose another folder")
