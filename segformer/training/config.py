"""Configuration: the schema of a run, and how conf/*.yaml and command-line overrides become it.

Owns hydra and omegaconf. The dataclass is the schema and its defaults, YAML is the choice: a key that is not
a field fails with its name. Nothing is instantiated from a dotted path in a config (hydra's `_target_` runs
any callable). Only hydra's compose API is used: `hydra.main` would give every rank its own time-stamped
folder and drop results.

`cli` is the whole command line of every script in launch/ and data_prep/:

    python launch/train.py experiment=sample steps=100      overrides in hydra's grammar
    python launch/train.py --help                           every key, explained, with its value
    python launch/train.py ... --check                      composes and checks, and does nothing else
    python launch/train.py ... --conf mydir                 with the files of one's own (choices.py)
    --local_rank=N                                          from `deepspeed`; ignored, the environment has it

Values from the environment (`${oc.env:...}`) are refused: saved configurations and wandb would hold them.
"""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from segformer.checkpoint.checkpointer import CheckpointConfig
from segformer.checkpoint.reader import read_config
from segformer.data.loading.classification import ClassificationAugment
from segformer.data.loading.crop import AugmentConfig
from segformer.data.loading.loader import LoaderConfig
from segformer.data.loading.mixture import MixtureConfig
from segformer.data.loading.order import BatchShape
from segformer.data.sources.dataset import DatasetConfig
from segformer.data.sources.division import EVAL_SPLIT
from segformer.distributed.engine import EngineConfig
from segformer.errors import (
    ConfigError,
    as_started,
    at_least,
    ending,
    is_main_rank,
    printable,
    reason_of,
    reraise_as,
    within,
)
from segformer.files import write_atomic
from segformer.models.variants import VARIANTS, ModelConfig
from segformer.telemetry.logger import TelemetryConfig
from segformer.telemetry.profiling import ProfileConfig
from segformer.training.choices import CONF, choices, conf_folders, take_conf
from segformer.training.early_stop import EarlyStopConfig
from segformer.training.help import help_text
from segformer.training.losses import LossConfig
from segformer.training.optim import OptimConfig
from segformer.training.overrides import (
    check_values,
    checked,
    flat,
    give_way,
    quoted_tables,
    refusal,
    renamed,
    unquoted,
    unreadable,
)

FROZEN = (
    "seed", "steps", "global_batch", "train_split", "data", "mixture", "augment", "classification", "model",
    "loss", "optim", "engine.grad_clip", "engine.sync_batchnorm",
)  # fmt: skip
SIZED = (
    "steps", "global_batch", "eval_every", "eval_batch", "augment.crop", "augment.resize", "augment.scale",
    "loss.class_weights", "optim.lr", "optim.head_lr_factor", "optim.warmup_steps", "model.drop_path_rate",
    "checkpoint.save_every", "telemetry.log_every",
)  # fmt: skip
"Keys that `auto` may list: those that sizing.py works out."
# Of FROZEN, what decides the learning rate alone; it may change from optim.schedule_start on (directory.py).
SCHEDULE = (
    "steps", "optim.lr", "optim.schedule", "optim.schedule_start", "optim.power", "optim.warmup_steps",
    "optim.warmup_start", "optim.min_lr_factor",
)  # fmt: skip
MOST_STEPS, MOST_IMAGES = 10**9, 2**20  # of a run, of a batch: above them stands a slip of the hand
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_REFERENCE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_.]*\}")
_T = TypeVar("_T")


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """A training run. The fields in FROZEN decide what is learnt; a run directory keeps them for its life."""

    name: str = "run"
    "Name of the run: letters, digits, '.', '_', '-'."
    run_dir: str = "runs/${name}"
    "Where everything of the run goes; an existing one of the same configuration is continued."
    seed: int = 0
    "Seed of initialization, sample order, augmentation and drop-out."
    steps: int = 160_000
    "Optimizer steps of the whole run."
    epochs: float | None = None
    "Passes over the training images instead of steps, into which a start converts them; null takes steps."
    auto: list[str] = field(default_factory=list)
    "Keys that a start works out from data and device (docs/recipes.md), but for those that are given."
    stop_at: int | None = None
    "Step at which this start pauses the run: evaluated, saved, exit code 0; a start without it goes on."
    global_batch: int = 16
    "Images per optimizer step over all ranks; part of the recipe, never changed by the world size."
    micro_batch: int | None = None
    "Images per forward and rank; null takes global_batch / world size. Smaller ones accumulate gradients."
    eval_every: int = 4000
    "Optimizer steps between evaluations; one always follows the last step."
    eval_batch: int = 1
    "Images per evaluation forward and rank, of one size each."
    eval_split: str = EVAL_SPLIT
    "Split that is evaluated."
    train_split: str = "train"
    "Split that is trained on."
    max_skipped: int = 3
    "Steps in a row whose loss or gradient is not finite before the run goes back to a checkpoint, or ends."
    overlays: int = 8
    "Validation pictures of the report (image, target, prediction), drawn at the end of the run."
    data: DatasetConfig = field(default_factory=DatasetConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    classification: ClassificationAugment = field(default_factory=ClassificationAugment)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"name={self.name!r} must be up to 64 letters, digits, '.', '_' or '-'")
        at_least(self, "", eval_every=1, max_skipped=1, overlays=0)
        within(self, "", seed=(0, 2**64 - 1), steps=(1, MOST_STEPS), stop_at=(1, MOST_STEPS))
        if self.epochs is not None and not 0 < self.epochs <= MOST_STEPS:
            raise ConfigError(f"epochs={self.epochs} must be above 0 and at most {MOST_STEPS}")
        if unknown := [key for key in self.auto if key not in SIZED]:
            raise ConfigError(f"auto lists {unknown[0]}, which nothing works out; use {', '.join(SIZED)}")
        within(self, "", **dict.fromkeys(("global_batch", "micro_batch", "eval_batch"), (1, MOST_IMAGES)))
        counted = self.epochs is None and "steps" not in self.auto
        if counted and self.profile.steps and self.profile.steps[0] > self.steps:
            raise ConfigError(
                f"profile.steps={self.profile.steps} begins after the last of {self.steps} steps"
            )
        if counted and (start := self.optim.schedule_start) >= self.steps:
            text = f"optim.schedule_start={start} must be below steps={self.steps}"
            raise ConfigError(f"{text}; give more steps, or leave it out")
        if "checkpoint.save_every" not in self.auto:
            self.checkpoint.check_kept()
        if self.micro_batch is not None and "global_batch" not in self.auto:
            BatchShape(self.global_batch, self.micro_batch, world_size=1)

    def batch_shape(self, world_size: int) -> BatchShape:
        """The global batch over `world_size` ranks; ConfigError where it can't be shared out."""
        micro_batch = self.micro_batch or max(1, self.global_batch // world_size)
        return BatchShape(self.global_batch, micro_batch, world_size)


def frozen(cfg: RunConfig) -> dict[str, Any]:
    """The settings that FROZEN names, in their groups, but for places, what is allowed of the data and how
    images are found: the digest of the shards stands for them."""
    settings = dataclasses.asdict(cfg)
    found: dict[str, Any] = {}
    for key in FROZEN:
        group, _, name = key.partition(".")
        found[group] = found.get(group, {}) | {name: settings[group][name]} if name else settings[group]
    for free in ("root", "shards", "image_suffix", "allow_unseen", "allow_duplicates"):
        del found["data"][free]
    for one in found["mixture"]["sets"].values():
        del one["shards"]
    if not cfg.mixture.sets:  # as runs of one data set have always said it
        del found["mixture"]
    return found


def is_frozen(key: str) -> bool:
    """A run keeps this setting for its life."""
    return key in FROZEN or key.partition(".")[0] in FROZEN


def frozen_difference(saved: RunConfig, now: RunConfig) -> list[str]:
    """`key: saved -> now` for every frozen setting in which two configurations differ."""
    old, new = flat(frozen(saved)), flat(frozen(now))
    keys = sorted(old.keys() | new.keys())
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def as_yaml(settings: dict[str, Any]) -> str:
    """Settings in the form of a config.yaml."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(settings))


def save_config(cfg: RunConfig, path: Path) -> None:
    """Write a configuration as YAML, whole or not at all."""
    text = as_yaml(dataclasses.asdict(cfg))
    if not path.exists() or path.read_bytes() != text.encode():
        write_atomic(path, text)


def load_config(path: Path) -> RunConfig:
    """Read what `save_config` wrote; ConfigError, CheckpointError where it is none of a run."""
    return to_run_config(read_config(path), str(path))


def to_run_config(settings: dict[str, Any], source: str) -> RunConfig:
    """The configuration that `source` holds as plain data; ConfigError where it is none of a run."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    wrong = (OmegaConfBaseException, OverflowError, ConfigError)
    with reraise_as(ConfigError, f"{source} can't be read as a configuration", on=wrong):
        _refuse_resolvers(OmegaConf.create(settings))
        return _whole(RunConfig, OmegaConf.merge(OmegaConf.structured(RunConfig), settings))


def compose(schema: type[_T], config_name: str, overrides: list[str]) -> _T:
    """conf/<config_name>.yaml with `overrides`, checked against `schema`.

    Among the overrides may be --conf=<folder> (choices.py). The YAML's defaults list starts with
    `<config_name>_schema`, so that an unknown key fails.

    Raises:
        ConfigError: unknown key, group option or value; it names the nearest that exists.
    """
    from omegaconf import OmegaConf

    composed = _compose(schema, config_name, overrides)
    if missing := sorted(OmegaConf.missing_keys(composed)):
        raise ConfigError(f"{missing[0]} is missing; give {missing[0]}=...")
    return _whole(schema, composed)


def _given(overrides: list[str]) -> set[str]:
    """The keys that overrides set, also those of a group that is given as a table."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(overrides)
    return {key for one in parsed for key in flat({one.key_or_group: one.value()})}


def _whole(schema: type[_T], composed: Any) -> _T:
    """The dataclass of a configuration each of whose values is what the schema says, and finite."""
    from omegaconf import OmegaConf

    check_values(schema, OmegaConf.to_container(composed))  # type: ignore[arg-type]
    return OmegaConf.to_object(composed)  # type: ignore[return-value]


def _compose(schema: type[Any], config_name: str, overrides: list[str]) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    store = ConfigStore.instance()
    store.store(name=f"{config_name}_schema", node=schema)
    for variant in VARIANTS:
        store.store(group="model", name=variant, node={"variant": variant})
    options, overrides = take_conf(overrides)
    own = conf_folders(options)
    names = choices(config_name, own)
    unquoted(overrides)
    tables, overrides = quoted_tables(schema, overrides)
    taken = [checked(schema, names, override) for override in overrides]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            path = GlobalHydra.instance().config_loader().get_search_path()
            for folder in reversed(own):
                path.prepend("own", f"file://{folder}")
            again = [f"hydra.searchpath={[f'file://{CONF}']}"] if own else []  # hydra looks at the path anew
            composed = hydra_compose(config_name, overrides=taken + again)
        for key, entries in tables:
            OmegaConf.update(composed, key, entries, force_add=True)
        _refuse_resolvers(composed)
        OmegaConf.resolve(composed)
        if issubclass(schema, RunConfig):
            give_way(composed, _given(taken))
        return composed
    except (HydraException, OmegaConfBaseException) as error:
        message = f"{reason_of(error)} {reason_of(error.__cause__) if error.__cause__ else ''}".rstrip()
        key = getattr(error.__cause__, "full_key", None) or getattr(error, "full_key", None) or ""
        if isinstance(error, OverrideParseException):
            given = dict(zip(taken, overrides, strict=True))[error.override]
            message = unreadable(schema, given.partition("=")[0].lstrip("+"), printable(given))
        for given, took in zip(overrides, taken, strict=True):
            name = given.partition("=")[0].lstrip("+")
            if f"override {took} " in message and "." not in key:  # it says where in a list, not in which
                key = name
            if name not in names and re.match(rf"{re.escape(name)}\b", key):
                message = refusal(schema, key, printable(given))
        raise ConfigError(message) from error


def _refuse_resolvers(config: Any) -> None:
    """ConfigError where a value asks for more than another key: `${name}` stays, `${oc.env:X}` doesn't."""
    from omegaconf import OmegaConf

    for key, value in flat(OmegaConf.to_container(config, resolve=False)).items():  # type: ignore[arg-type]
        for text in map(str, value if isinstance(value, list) else [value]):
            if "${" in _REFERENCE.sub("", text):
                raise ConfigError(
                    f"{key}={text!r}: resolvers are refused, because their values would be saved with the run"
                )


def cli(
    schema: type[_T],
    config_name: str,
    function: Callable[[_T], Any],
    check: Callable[[_T], Any] = lambda cfg: None,
) -> None:
    """Compose the configuration from the command line and call `function` with it, or `check` for --check.

    How the process ends where something is wrong: segformer/errors.py.
    """
    given = [argument for argument in sys.argv[1:] if not re.fullmatch(r"--local[_-]rank=\d+", argument)]
    overrides = [renamed(schema, one) for one in given if one not in ("--help", "-h", "--check")]
    with ending():
        if {"--help", "-h"} & set(given):
            from omegaconf import OmegaConf

            values = OmegaConf.to_container(_compose(schema, config_name, overrides))
            usage = inspect.getdoc(sys.modules["__main__"]) or ""
            names = choices(config_name, conf_folders(take_conf(overrides)[0]))
            pydoc.pager(as_started(help_text(schema, values, usage, names)) + "\n")  # type: ignore[arg-type]
            return
        try:
            cfg = compose(schema, config_name, overrides)
        except ConfigError:
            if not is_main_rank():  # the same arguments fail alike on every rank: one line is enough
                sys.exit(ConfigError.exit_code)
            raise
        (check if "--check" in given else function)(cfg)
