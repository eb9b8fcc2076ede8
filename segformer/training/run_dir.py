"""The directory of a run: taken by one job, and only by one of the same configuration.

runs/<name>/config.yaml      the configuration; later starts agree in the frozen part (config.FROZEN)
runs/<name>/lease.json       who works in it (lease.py)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from segformer.checkpoint.atomic import clean
from segformer.checkpoint.lease import Lease
from segformer.distributed.world import World
from segformer.errors import ConfigError
from segformer.training.config import RunConfig, frozen_difference, load_config, save_config


@contextlib.contextmanager
def leased(cfg: RunConfig, world: World) -> Iterator[Lease | None]:
    """The run directory, made or taken by rank zero, which alone holds the lease; all ranks."""
    with contextlib.ExitStack() as held:
        leases: list[Lease] = []
        world.on_main(lambda: leases.append(_take(cfg, held)))
        yield leases[0] if leases else None


def _take(cfg: RunConfig, held: contextlib.ExitStack) -> Lease:
    """Make the run directory, or take the one that exists and belongs to this configuration; rank zero."""
    cfg.telemetry.check_trackers()
    run_dir = Path(cfg.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        lease = Lease.take(run_dir)
        held.callback(lease.release)
        _check_run_dir(cfg, run_dir)
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} can't be used: {error.strerror}; choose another one") from error
    return lease


def _check_run_dir(cfg: RunConfig, run_dir: Path) -> None:
    """Remove what a writer left behind, compare the configuration and write it down."""
    saved = run_dir / "config.yaml"
    clean(run_dir / "checkpoints")
    trained = any(run_dir.glob("checkpoints/step-*")) or any(run_dir.glob("checkpoints/bad-*"))
    if trained and saved.exists():  # before its first checkpoint a run may still be corrected
        changed = frozen_difference(load_config(saved), cfg)
        if changed:
            raise ConfigError(
                f"{run_dir} belongs to a run of another configuration ({'; '.join(changed)}); "
                "choose another name=..., or delete the directory"
            )
    elif trained:
        raise ConfigError(f"{run_dir} has checkpoints but no config.yaml; choose another name=...")
    save_config(cfg, saved)
