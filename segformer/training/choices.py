"""The files of choices: conf/ of this system, and folders of a user's own beside it.

    --conf mydir      mydir/data/mine.yaml is data=mine, mydir/experiment/night.yaml experiment=night

Own folders hold groups, as conf/ does; a name that both have is the user's. May be given several times, the
first one wins. Only what is named is read: a folder conf/ that happens to lie here changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from segformer.errors import ConfigError
from segformer.files import HOME
from segformer.models.variants import VARIANTS

CONF = HOME / "conf"
_OPTION = "--conf"


def take_conf(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(--conf=<folder> ..., all other arguments); ConfigError where an option has no folder."""
    options: list[str] = []
    others: list[str] = []
    left = iter(arguments)
    for argument in left:
        if argument == _OPTION:
            argument = f"{_OPTION}={next(left, '')}"
        (options if argument.startswith(f"{_OPTION}=") else others).append(argument)
    return options, others


def conf_folders(options: Sequence[str]) -> list[Path]:
    """The folders of `take_conf`'s options, absolute.

    Raises:
        ConfigError: one is no folder, or would replace a command's own file.
    """
    found = []
    for option in options:
        given = option.partition("=")[2]
        folder = Path(given).expanduser().absolute()
        if not given or not folder.is_dir():
            raise ConfigError(
                f"{option} is no folder; give one that holds groups, such as {option}/data/mine.yaml"
            )
        for path in sorted(folder.glob("*.yaml")):
            if (CONF / path.name).is_file():
                raise ConfigError(
                    f"{option}: {path.name} belongs to this system; own files lie in groups, such as "
                    f"{given}/experiment/{path.name}"
                )
        found.append(folder)
    return found


def choices(config_name: str, own: Sequence[Path] = ()) -> dict[str, list[str]]:
    """Names that each group of a command can be set to: files of <folder>/<group>, variants of the model."""
    from omegaconf import OmegaConf

    defaults = OmegaConf.load(CONF / f"{config_name}.yaml").defaults
    groups = [key.split()[-1] for entry in defaults if not isinstance(entry, str) for key in entry]
    found = {
        group: sorted({path.stem for folder in (*own, CONF) for path in folder.glob(f"{group}/*.yaml")})
        for group in groups
    }
    return {group: [*VARIANTS, *names] if group == "model" else names for group, names in found.items()}
