"""The plan of a sweep: which runs, with which settings, and which of them go on at each rung.

    optim.lr=1e-4,3e-4           these values; of several such keys every combination (grid search)
    optim.lr=log(1e-5,1e-3)      with sweep.random=20: log-uniform between the two
    model.dropout=0.0..0.3       with sweep.random=20: uniform; between whole numbers whole numbers
    seed=0,1,2                   every setting with each of these seeds, in a random search as well
    augment.crop=[64,64]         a list in brackets, or a text in quotes, is one value

Successive halving (Jamieson and Talwalkar 2016) by a factor f: all settings are trained to a share f^-k of
the steps, the best 1/f of them to f^-(k-1), and so on to the end; k is the largest number that leaves one.

    runs/<name>/sweep.json       the plan, written before the first run; another one is refused there
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import random
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from segformer.errors import ConfigError, at_least, listed, reraise_as
from segformer.files import read_json, write_atomic

FILE = "sweep.json"
MOST_RUNS = 1000
_NUMBER = r"\s*([+-]?(?:\d+(?:\.(?!\.)\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*"
_RANGE = re.compile(rf"\s*(log)\({_NUMBER},{_NUMBER}\)\s*|{_NUMBER}\.\.{_NUMBER}", re.IGNORECASE)
_MEANT = re.compile(r"\s*log\(|\s*[+-]?[\d.]+(?:e[+-]?\d+)?\s*\.\.(?![./])", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    """How the settings are searched, and how many runs work at a time."""

    random: int = 0
    "Number of settings drawn at random from lists and ranges; 0 takes every combination of the lists."
    seed: int = 0
    "Seed of the random draws; the seeds of the runs themselves are seed=0,1,2."
    halving: int = 0
    "One in so many settings goes on at each rung (successive halving); 0 trains every run to its end."
    jobs: int | None = None
    "Runs that work at a time; null takes one for each GPU, and one on a CPU."

    def __post_init__(self) -> None:
        at_least(self, "sweep.", random=0, seed=0, jobs=1)
        if self.halving < 0 or self.halving == 1:
            raise ConfigError(f"sweep.halving={self.halving} must be 2 or more, or 0 for none")


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """A sweep: its name, and what is done beside its runs."""

    name: str = "???"
    "Name of the sweep; its runs are runs/<name>/<settings>."
    dry_run: bool = False
    "Print the commands of the runs and start none of them."
    images: int = 6
    "Validation images in the comparison at the end; 0 compares without predictions, which is quick."
    sweep: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) and self.name != "???":
            raise ConfigError(f"name={self.name!r} must be up to 64 letters, digits, '.', '_' or '-'")
        at_least(self, "", images=0)


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep."""

    name: str
    "Its folder below that of the sweep."
    setting: str
    "What was varied but for the seed; runs that share it are one setting."
    overrides: list[str]
    "The overrides of launch/train.py, those that all runs have first."


@dataclass(frozen=True, slots=True)
class Rung:
    """A stage of successive halving."""

    share: float
    "Share of its steps that a run has done at the end of the rung."
    settings: int
    "Settings that are trained to it."


def trials(overrides: list[str], cfg: SearchConfig) -> list[Trial]:
    """The runs of a sweep, in their order.

    Raises:
        ConfigError: nothing varies, a list or range can't be read, or there are too many runs.
    """
    axes: dict[str, list[str]] = {}
    fixed: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+")
        values = _values(override, value)
        if key in axes or (len(values) > 1 and any(one.lstrip("+").startswith(f"{key}=") for one in fixed)):
            raise ConfigError(f"{key} is given twice; give one list: {key}=a,b,c")
        if len(values) > 1 or _RANGE.fullmatch(value):
            axes[key] = values
        else:
            fixed.append(override)
    seeds = axes.pop("seed", [])
    axes = dict(sorted(axes.items()))  # so that runs have the same names whatever the order of the command
    if not axes and not seeds:
        raise ConfigError("nothing varies; give a list such as optim.lr=1e-4,3e-4 or seed=0,1,2")
    settings = _drawn(axes, cfg) if cfg.random and axes else _combined(axes)
    runs = [setting | ({"seed": seed} if seed else {}) for setting in settings for seed in seeds or [""]]
    if len(runs) > MOST_RUNS:
        raise ConfigError(f"the lists make {len(runs)} runs, the limit is {MOST_RUNS}; try sweep.random=50")
    return [
        Trial(
            name,
            " ".join(f"{key}={value}" for key, value in run.items() if key != "seed"),
            [*fixed, *(f"{key}={value}" for key, value in run.items())],
        )
        for name, run in zip(_names(runs), runs, strict=True)
    ]


def rungs(settings: int, factor: int) -> list[Rung]:
    """The stages through which so many settings go; one, to the end, where `factor` is 0.

    Raises:
        ConfigError: there are too few settings to leave any out.
    """
    if not factor:
        return [Rung(1.0, settings)]
    depth = next(k for k in itertools.count() if factor ** (k + 1) > settings)
    if not depth:
        raise ConfigError(
            f"sweep.halving={factor} needs {factor} settings or more, there are {settings} (seeds are not "
            "settings); leave it out, or vary more"
        )
    # Every rung keeps the whole part of what it has, so that the last one has at least one.
    return [Rung(float(factor) ** -(depth - k), settings // factor**k) for k in range(depth + 1)]


def best(scores: dict[str, float | None], count: int) -> list[str]:
    """The `count` settings of the highest scores, best first; of equal ones the first. None is no score."""
    known = [(name, score) for name, score in scores.items() if score is not None and math.isfinite(score)]
    return [name for name, _ in sorted(known, key=lambda pair: -pair[1])[:count]]


def keep_plan(
    folder: Path, overrides: list[str], cfg: SearchConfig, planned: list[Trial], steps: list[int]
) -> list[int]:
    """Write the plan into the folder of the sweep, or find the same one there; the steps of each run.

    steps: as they are worked out here; a sweep that goes on elsewhere has those of its first start.

    Raises:
        ConfigError: another plan is there; it names what differs.
    """
    path = folder / FILE
    settings = {key: value for key, value in asdict(cfg).items() if key != "jobs"}
    plan = {"overrides": overrides, "sweep": settings, "steps": steps}
    plan |= {"runs": [asdict(trial) for trial in planned]}
    if not path.exists():
        write_atomic(path, json.dumps(plan, indent=1))
        return steps
    damaged = (OSError, ValueError, KeyError, TypeError, AttributeError)
    with reraise_as(ConfigError, f"{path} can't be read", "choose another name=...", on=damaged):
        found = read_json(path)
        old, new = _described(found), _described(plan)
        before = [int(count) for count in found.get("steps", steps)]
    if old != new:
        gone, come = listed(sorted(old - new)) or "nothing more", listed(sorted(new - old)) or "nothing more"
        raise ConfigError(
            f"{folder} is another sweep: it has {gone}, and this command has {come}; give what it has to go "
            "on with it, or choose another name=..."
        )
    return before


def _described(plan: dict[str, Any]) -> set[str]:
    return {*plan["overrides"], *(f"sweep.{key}={value}" for key, value in plan["sweep"].items())}


def _values(override: str, value: str) -> list[str]:
    """The values between the commas of `value` that are in no brackets and no quotes."""
    if _RANGE.fullmatch(value):
        return [value]
    if _MEANT.match(value):
        raise ConfigError(f"{override} is no range; write log(1e-5,1e-2), or 0.0..0.3, between two numbers")
    parts, depth, quote = [""], 0, ""
    for sign in value:
        if sign in "'\"" and quote in ("", sign):
            quote = "" if quote else sign
        depth += 0 if quote else (sign in "[{(") - (sign in "]})")
        if sign == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    values = [part.strip() for part in parts]
    if len(values) > 1 and ("" in values or len(set(map(_same, values))) < len(values)):
        raise ConfigError(f"{override} has an empty value or the same one twice; write values as a,b,c")
    return values


def _same(value: str) -> float | str:
    """What values that mean the same have in common: 1e-3 and 0.001 are one number."""
    with contextlib.suppress(ValueError):
        return float(value)
    return value


def _combined(axes: dict[str, list[str]]) -> list[dict[str, str]]:
    for key, values in axes.items():
        if _RANGE.fullmatch(values[0]):
            raise ConfigError(f"{key}={values[0]} is a range; add sweep.random=20, or list values: {key}=a,b")
    if (count := math.prod(map(len, axes.values()))) > MOST_RUNS:
        raise ConfigError(f"the lists make {count} runs, the limit is {MOST_RUNS}; try sweep.random=50")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _drawn(axes: dict[str, list[str]], cfg: SearchConfig) -> list[dict[str, str]]:
    """Settings drawn at random; one that was drawn before is drawn again, so that lists can run out."""
    draw = random.Random(cfg.seed)
    found: list[dict[str, str]] = []
    for _ in range(100 * cfg.random):
        setting = {key: _draw(draw, key, values) for key, values in axes.items()}
        if setting not in found:
            found.append(setting)
        if len(found) == cfg.random:
            return found
    raise ConfigError(
        f"sweep.random={cfg.random}, but the lists have only {len(found)} settings; leave it out to try all"
    )


def _draw(draw: random.Random, key: str, values: list[str]) -> str:
    if not (bounds := _RANGE.fullmatch(values[0])):
        return draw.choice(values)
    log = bounds[1]
    ends = (bounds[2], bounds[3]) if log else (bounds[4], bounds[5])
    low, high = map(float, ends)
    if low >= high or (log and low <= 0):
        limits = "the first above 0 and below the second" if log else "the first below the second"
        raise ConfigError(f"{key}={values[0]}: a range needs two numbers, {limits}")
    whole = all(re.fullmatch(r"-?\d+", end) for end in ends)
    if whole and not log:
        return str(draw.randint(int(low), int(high)))
    value = math.exp(draw.uniform(math.log(low), math.log(high))) if log else draw.uniform(low, high)
    return str(round(value)) if whole else f"{value:.3g}"


def _names(runs: list[dict[str, str]]) -> list[str]:
    """Short names that say what was varied: lr1e-4_seed0; numbers where they would be long or not unique."""
    last = [key.rpartition(".")[2] for key in runs[0]]
    short = {key: name if last.count(name) == 1 else key for key, name in zip(runs[0], last, strict=True)}
    names = [
        "_".join(f"{short[key]}{'' if value[:1].isdigit() else '-'}{value}" for key, value in run.items())
        for run in runs
    ]
    names = [re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_-.") for name in names]
    folded = {name.casefold() for name in names}  # some file systems don't tell A from a
    plain = len(folded) == len(names) and all(_NAME.fullmatch(name) for name in names)
    return names if plain else [f"run{index:03d}" for index in range(len(names))]
