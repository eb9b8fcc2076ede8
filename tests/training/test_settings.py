"""Every setting of every command, given what nobody means: refused in one line, or the run starts."""

import contextlib
import dataclasses
import functools
import random
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import nano
import pytest

from data_prep.download import DownloadConfig
from data_prep.shard import ShardConfig
from data_prep.verify import VerifyConfig
from segformer.distributed.world import World, init_world
from segformer.doctor.doctor import DoctorConfig
from segformer.errors import SegformerError, error_line
from segformer.inference.convert import ConvertConfig
from segformer.inference.export import ExportConfig
from segformer.inference.predict import PredictConfig
from segformer.inference.report import ReportConfig
from segformer.inference.score import EvaluateConfig
from segformer.models.variants import VARIANTS
from segformer.slurm.settings import SlurmConfig
from segformer.training import loop
from segformer.training.config import RunConfig, compose
from segformer.training.directory import check_start

Start = Callable[[str], None]
COMMANDS: dict[str, tuple[type[Any], list[str]]] = {
    "config": (RunConfig, []),
    "doctor": (DoctorConfig, []),
    "evaluate": (EvaluateConfig, ["checkpoint=x"]),
    "predict": (PredictConfig, ["checkpoint=x", "input=a", "output=b"]),
    "export": (ExportConfig, ["checkpoint=x"]),
    "report": (ReportConfig, ["checkpoint=x"]),
    "convert": (ConvertConfig, ["checkpoint=x", "output=y"]),
    "slurm": (SlurmConfig, []),
    "shard": (ShardConfig, []),
    "verify": (VerifyConfig, []),
    "download": (DownloadConfig, []),
}
SECRET = "s3cr3t"
VALUES = (
    "nan", "inf", "-inf", "1e18", "1e308", "1e-300", "9223372036854775807", "99999999999999999999", "-1", "0",
    "1", "null", "", "[]", "{}", "true", "0.5", "a (b)", "[nan]", "[null]", "[[1]]", "{a: nan}", "1,2",
    "range(3)", "~", "#", "a=b", "${oc.env:CANARY}", "[${oc.env:CANARY}]", "x${oc.env:CANARY}y",
    "x\x1b[31my", "1" + 400 * "0",
)  # fmt: skip
# What only data, files or another machine can say; and what takes long.
ELSEWHERE = (
    "data", "model.num_classes", "model.in_channels", "model.pretrained", "loss.class_weights", "train_split",
    "eval_split", "run_dir", "loader.workers", "loader.prefetch", "loader.storage.cache_dir",
    "engine.compile", "global_batch", "micro_batch",
)  # fmt: skip


def leaves(schema: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in get_type_hints(schema).items():
        yield f"{prefix}{name}", hint
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")


def draws(count: int, seed: int) -> list[tuple[str, str]]:
    """(command, override), seeded; half of them of a training run. A list gets as many values as it has."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        command = rng.choice(["config"] * 10 + [*COMMANDS])
        key, hint = rng.choice(list(leaves(COMMANDS[command][0])))
        value = rng.choice(VALUES)
        if get_origin(hint) is list and value[:1] not in ("[", "{", "") and rng.random() < 0.7:
            default = functools.reduce(getattr, key.split("."), COMMANDS[command][0]())
            value = f"[{','.join([value] * (len(default) or 2))}]"
        found.append((command, f"{key}={value}"))
    return found


def composed(command: str, override: str) -> Any:
    """The configuration; None where it is refused, in one line that names what was given."""
    schema, base = COMMANDS[command]
    key = override.partition("=")[0]
    given = [*(one for one in base if not one.startswith(f"{key}=")), override]
    try:
        cfg = compose(schema, command, given)
        if command == "config":
            check_start(cfg)
    except SegformerError as error:
        line = error_line(error)
        named = any(part in line for part in (key, key.rpartition(".")[2], *key.split(".")[:1]))
        bad = (
            not named or not line.isprintable() or SECRET in line or "multirun" in line or "full_key" in line
        )
        assert not bad, (override, line)
        return None
    assert SECRET not in repr(cfg), override
    return cfg


class Enough(Exception):  # noqa: N818
    """The first step is done."""


@pytest.fixture
def started(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """(override): train a run with it, to its end where it has one step, or through the first one."""
    monkeypatch.setitem(VARIANTS, *nano.SIZE)
    step, world = loop.train_step, init_world()

    def first(cfg: RunConfig, world: World, *rest: Any) -> Any:
        outcome = step(cfg, world, *rest)
        if cfg.steps > 1 or not outcome.taken:
            raise Enough
        return outcome

    monkeypatch.setattr(loop, "train_step", first)
    numbers = iter(range(10**6))

    def start(override: str) -> None:
        small = ["experiment=sample", "augment.crop=[32,32]", "optim.warmup_steps=0", "overlays=0"]
        run = ["steps=1", "global_batch=2", "eval_batch=1", "loader.workers=0", "model.variant=nano"]
        places = [f"data.shards={tiny_shards}", f"run_dir={tmp_path / str(next(numbers))}"]
        cfg = compose(RunConfig, "config", [*small, *run, *places, override])
        check_start(cfg)
        with contextlib.suppress(Enough):
            loop.train(cfg, world)

    yield start
    world.close()


def starts(override: str) -> bool:
    return not override.startswith(ELSEWHERE) and max(map(len, override.split(","))) < 60


def test_what_is_given_is_refused_in_one_line_or_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", SECRET)
    outcomes = [composed(*draw) is None for draw in draws(16, seed=0)]
    assert any(outcomes)
    assert not all(outcomes)


@pytest.mark.slow
def test_every_setting_is_refused_in_one_line_or_its_run_starts(
    started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", SECRET)
    accepted = [
        override
        for command, override in draws(320, seed=1)
        if composed(command, override) is not None and command == "config"
    ]
    chosen = [override for override in accepted if starts(override)]
    assert len(chosen) > 5
    most = ["augment.scale=[1000,1000]", "optim.lr=1e30", "engine.timeout_s=1e7", f"seed={2**64 - 1}"]
    for override in [*chosen[:60], *most]:
        try:
            started(override)
        except SegformerError as error:
            pytest.fail(f"{override} is accepted, and refused later: {error}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment=null", ""),
        ("+experiment=sample", ""),
        ("data=null", "data=null does not exist; use one of "),
        ("~optim", "leave optim out instead"),
        ("seed=0,1,2", "seed=0,1,2 must be a whole number"),
        ("seed=range(3)", "seed=range(3) must be a whole number"),
        ("data.name=${nokey}", "nokey"),
        ("a\nb=1", "'a\\nb=1' is not an override"),
        ("data.shards=", "data.shards is empty; give data.shards="),
        ("augment.crop=[31,64]", "the encoder needs 32 pixels a side"),
        ("~loss.terms.cross_entropy", "has no loss; give one of "),
        ("engine.extra={optimizer: {type: Adam}}", "engine.extra sets optimizer"),
        ("engine.extra={train_batch_size: 3}", "engine.extra sets train_batch_size"),
        (
            "engine.extra={zero_optimization: {nonsense: 1}}",
            "DeepSpeed refuses engine.extra: 1 validation error",
        ),
        ("engine.extra={flops_profiler: {enabled: x}}", "DeepSpeed refuses engine.extra"),
    ],
)
def test_the_check_says_what_a_start_would(override: str, message: str) -> None:
    try:
        check_start(compose(RunConfig, "config", [override]))
        found = ""
    except SegformerError as error:
        found = error_line(error)
    assert (message in found) if message else not found, found


def test_the_remedy_for_signs_in_a_list_works_as_it_is_pasted() -> None:
    with pytest.raises(SegformerError) as caught:
        compose(RunConfig, "config", ["data.classes=[back ground,leaf (young)]"])
    (remedy,) = shlex.split(str(caught.value).partition("; write ")[2])
    cfg = compose(RunConfig, "config", [remedy, "data.palette=[]"])
    assert cfg.data.classes == ["back ground", "leaf (young)"]
