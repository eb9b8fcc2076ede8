"""Configuration: the schema of a run, and how conf/*.yaml and command-line overrides become it.

Owns hydra and omegaconf. The dataclass is the schema and its defaults, YAML is the choice: a key that is not
a field fails with its name. Nothing is instantiated from a dotted path in a config (hydra's `_target_` runs
any callable). Only hydra's compose API is used: `hydra.main` would give every rank its own time-stamped
folder and drop results.

`cli` is the whole command line of every script in launch/ and data_prep/:

    python launch/train.py experiment=sample steps=100      overrides in hydra's grammar
    python launch/train.py --help                           every key with its value
    --local_rank=N                                          from `deepspeed`; ignored, the environment has it

Values from the environment (`${oc.env:...}`) are refused: they would end up in saved configurations and in
wandb.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from segformer.checkpoint import CheckpointConfig
from segformer.data.classification import ClassificationAugment
from segformer.data.dataset import DatasetConfig
from segformer.data.loader import LoaderConfig
from segformer.data.transforms import AugmentConfig
from segformer.engine import EngineConfig, check_batch
from segformer.errors import ConfigError, Preempted, SegformerError
from segformer.losses import LossConfig
from segformer.models.variants import ModelConfig
from segformer.optim import OptimConfig
from segformer.profiling import ProfileConfig
from segformer.telemetry import TelemetryConfig

CONF = Path(__file__).resolve().parents[1] / "conf"
FROZEN = (
    *("seed", "steps", "global_batch", "train_split", "data", "augment", "model", "loss", "optim"),
    "classification",
    *("engine.grad_clip", "engine.sync_batchnorm"),
)
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
    "Seed of initialisation, sample order, augmentation and drop-out."
    steps: int = 160_000
    "Optimiser steps of the whole run."
    global_batch: int = 16
    "Images per optimiser step over all ranks; part of the recipe, never changed by the world size."
    micro_batch: int | None = None
    "Images per forward and rank; null takes global_batch / world size. Smaller ones accumulate gradients."
    eval_every: int = 4000
    "Optimiser steps between evaluations; one always follows the last step."
    eval_batch: int = 1
    "Images per evaluation forward and rank, of one size each."
    eval_split: str = "val"
    "Split that is evaluated."
    train_split: str = "train"
    "Split that is trained on."
    max_skipped: int = 3
    "Steps in a row whose loss or gradient is not finite before the run goes back to a checkpoint, or ends."
    overlays: int = 8
    "Validation images drawn with target and prediction at the end of the run."
    data: DatasetConfig = field(default_factory=DatasetConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    classification: ClassificationAugment = field(default_factory=ClassificationAugment)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"name={self.name!r} must be up to 64 letters, digits, '.', '_' or '-'")
        for key in ("steps", "global_batch", "eval_every", "eval_batch", "max_skipped"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)} must be 1 or more")
        if self.profile.steps and self.profile.steps[0] > self.steps:
            raise ConfigError(
                f"profile.steps={self.profile.steps} begins after the last of {self.steps} steps"
            )
        if self.micro_batch is not None:
            if self.micro_batch < 1:
                raise ConfigError(f"micro_batch={self.micro_batch} must be 1 or more, or null")
            check_batch(global_batch=self.global_batch, micro_batch=self.micro_batch, world_size=1)

    def micro_batch_for(self, world_size: int) -> int:
        """Images per forward and rank; ConfigError where the global batch can't be shared out."""
        micro_batch = self.micro_batch or max(1, self.global_batch // world_size)
        check_batch(global_batch=self.global_batch, micro_batch=micro_batch, world_size=world_size)
        return micro_batch


def frozen_difference(saved: RunConfig, now: RunConfig) -> list[str]:
    """`key: saved -> now` for every frozen setting in which two configurations differ."""
    old, new = _flat(dataclasses.asdict(saved)), _flat(dataclasses.asdict(now))
    keys = [
        key for key in sorted(old.keys() | new.keys()) if f"{key}.".startswith(tuple(f"{f}." for f in FROZEN))
    ]
    free = ("data.root", "data.shards")  # places; the digest of the shards is compared instead
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in keys
        if old.get(key) != new.get(key) and key not in free
    ]


def save_config(cfg: Any, path: Path) -> None:
    """Write a configuration dataclass as YAML, whole or not at all."""
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(cfg)))
    if path.exists() and path.read_text() == text:
        return
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    temporary.replace(path)  # a full disk or a crash leaves the old one


def load_config(path: Path, schema: type[_T] = RunConfig) -> _T:  # type: ignore[assignment]
    """Read what `save_config` wrote; ConfigError where it isn't a configuration of this schema."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        loaded = OmegaConf.load(path)
        _refuse_resolvers(loaded)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), loaded))  # type: ignore[return-value]
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} can't be read as a configuration: {_first_line(error)}") from error


def compose(schema: type[_T], config_name: str, overrides: list[str]) -> _T:
    """conf/<config_name>.yaml with `overrides`, checked against `schema`.

    The YAML's defaults list starts with `<config_name>_schema`, so that an unknown key fails.

    Raises:
        ConfigError: unknown key, group option or value; it names the nearest that exists.
    """
    return _to_object(schema, _compose(schema, config_name, overrides))


def _compose(schema: type[Any], config_name: str, overrides: list[str]) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    bad = [override for override in overrides if "=" not in override and not override.startswith("~")]
    if bad:
        raise ConfigError(f"{bad[0]!r} is not an override; write key=value (all keys: --help)")
    hydra = [override for override in overrides if override.lstrip("+~").startswith("hydra")]
    if hydra:
        raise ConfigError(f"{hydra[0]!r} is refused: hydra's own settings are fixed")
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            composed = hydra_compose(config_name, overrides=[_whole(text) for text in overrides])
            _refuse_resolvers(composed)
            OmegaConf.resolve(composed)
            return composed
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, schema)) from error


def _whole(override: str) -> str:
    """`key={...}` as hydra's `++key={...}`: a dictionary takes new keys, an unknown `key` still fails."""
    return f"++{override}" if re.match(r"[A-Za-z_.]+=\{", override) else override


def _refuse_resolvers(config: Any) -> None:
    """ConfigError where a value asks for more than another key: `${name}` stays, `${oc.env:X}` doesn't."""
    from omegaconf import OmegaConf

    for key, value in _flat(OmegaConf.to_container(config, resolve=False)).items():  # type: ignore[arg-type]
        for text in map(str, value if isinstance(value, list) else [value]):
            if "${" in _REFERENCE.sub("", text):
                raise ConfigError(
                    f"{key}={text!r}: resolvers are refused, because their values would be saved with the run"
                )


def _to_object(schema: type[_T], composed: Any) -> _T:
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    try:
        config = OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{_first_line(error)}; give it on the command line") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error
    except AttributeError as error:  # +key=value added a key that the dataclass doesn't have
        name = str(error).rpartition("attribute ")[2].strip("'")
        raise ConfigError(f"{name} is not a setting; --help lists all keys") from error
    assert isinstance(config, schema)
    return config


def _explain(error: BaseException, schema: type[Any]) -> str:
    """One line that says what was wrong and, for a misspelt key, what was probably meant."""
    text = str(error)
    cause = str(error.__cause__ or "")
    key = re.search(r"full_key: (\S+)", text + "\n" + cause)
    unknown = re.search(r"(?:Key '([^']+)' (?:is )?not in|Could not override '([^']+)')", text + "\n" + cause)
    if unknown and key:
        known = sorted(_flat(_skeleton(schema)))
        near = difflib.get_close_matches(key.group(1), known, n=1, cutoff=0.6)
        meant = f"; did you mean {near[0]}?" if near else "; --help lists all keys"
        return f"{key.group(1)} is not a setting{meant}"
    missing = re.search(
        r"Could not find '([^']+)/([^']+)'\s+Available options in '[^']+':((?:\s+[\w.-]+)*)", text
    )
    if missing:
        group, option = missing.group(1, 2)
        known = missing.group(3).split("Config search path")[0].split()
        return f"{group}={option} does not exist; use one of {', '.join(known)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    more = cause.splitlines()[:1] if cause and cause.splitlines()[0] not in text else []
    return " ".join(lines + more)


def _first_line(error: BaseException) -> str:
    where = re.search(r"full_key: (\S+)", str(error))
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{where.group(1)}: {first}" if where and where.group(1) not in first else first


def _skeleton(schema: type[Any]) -> dict[str, Any]:
    return dataclasses.asdict(schema())


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def cli(schema: type[_T], config_name: str, function: Callable[[_T], Any]) -> None:
    """Compose the configuration from the command line and call `function` with it.

    --help prints the keys and their values; --check composes and checks them, and does nothing else.

    A SegformerError is printed as one line and ends the process with its exit code (2; 75 after a signal);
    Ctrl-C ends it with 130 and one line (training sees to the first one itself, see dist.StopFlag); any other
    exception keeps its traceback.
    """
    arguments = [argument for argument in sys.argv[1:] if not re.fullmatch(r"--local[_-]rank=\d+", argument)]
    main_rank = int(os.environ.get("RANK", "0")) == 0
    try:
        if {"--help", "-h"} & set(arguments):
            from omegaconf import OmegaConf

            composed = _compose(schema, config_name, [a for a in arguments if a not in ("--help", "-h")])
            print(f"{sys.argv[0]} key=value ...\n\nkeys and values:\n{OmegaConf.to_yaml(composed)}")
            return
        try:
            cfg = compose(schema, config_name, [a for a in arguments if a != "--check"])
        except ConfigError:
            if not main_rank:  # the same arguments fail alike on every rank: one line is enough
                sys.exit(ConfigError.exit_code)
            raise
        if "--check" not in arguments:
            function(cfg)
    except SegformerError as error:
        if isinstance(error, Preempted) and not main_rank:
            sys.exit(error.exit_code)  # all ranks stop together, and rank zero says so
        rank = "" if main_rank else f"[rank {os.environ['RANK']}] "
        print(f"{rank}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        if main_rank:
            print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)  # 128 + SIGINT, as shells count
