"""wandb and TensorBoard, which can neither hold a run up nor end it.

wandb sends from a process of its own and TensorBoard writes in a thread of its own, so that no step waits for
a server. wandb's start and end wait for it for telemetry.wandb_timeout_s at most: where no run can be opened
online, it is logged offline. One run id, in wandb_id.txt, lasts over restarts.

Code, git state, packages and machine are not uploaded, nor are wandb's reports on itself, whose last one
holds up the exit of the interpreter for 20 s where the server is gone. A setting whose name or value is that
of a secret is left out.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segformer.errors import reason_of, reported

_SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without entries whose key or value is that of a secret.

    Such is a key that contains key, token, secret, password or credential, and a value that an environment
    variable of such a name holds.
    """
    values = {value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= 8}
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if _SECRET.search(key) or (isinstance(value, str) and any(secret in value for secret in values)):
            continue
        kept[key] = without_secrets(value) if isinstance(value, Mapping) else value
    return kept


class Wandb:
    """A wandb run, online or offline."""

    def __init__(
        self, run_dir: Path, log: Callable[[str], None], mode: str, timeout_s: float, **options: Any
    ) -> None:
        """Open a run; `options` are those of wandb.init. Where none opens online, log that and go offline."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb, self._log = wandb, log
        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(f"{uuid.uuid4().hex[:8]} {time.time():.3f}")
        identifier, *begun = id_file.read_text().split()
        self._begun = float(begun[0]) if begun else 0.0  # older versions wrote the id alone
        self._row = -1
        options |= {"dir": str(run_dir), "id": identifier, "resume": "allow"}
        settings = wandb.Settings(
            init_timeout=timeout_s,
            finish_timeout=timeout_s,
            finish_timeout_raises=True,
            program="segformer",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_save_requirements=False,
            x_disable_machine_info=True,
            console="off",
            silent=True,
        )
        url = wandb.setup(wandb.Settings(silent=True, login_timeout=timeout_s)).settings.base_url
        try:
            self._run = wandb.init(mode=mode, settings=settings, **options)  # type: ignore[arg-type]
        except Exception as error:
            log(
                f"wandb: no run at {url} ({reason_of(error)}); logging offline, "
                f"`wandb sync {run_dir}/wandb/offline-run-*` sends it later"
            )
            wandb.teardown()  # the failed run holds its id: "run ID is in use", wandb issue 9865
            self._run = wandb.init(mode="offline", settings=settings, **options)
        # wandb's own step must only grow, and would begin at 0 again in a run that goes on offline; ours goes
        # back to that of the checkpoint.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def begin(self, step: int) -> None:
        """Nothing: the step is logged beside every value."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers by name."""
        self._log_row({"step": step, **values})

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Log pictures by name, uint8 (H, W, 3)."""
        images = {name: self._wandb.Image(picture) for name, picture in pictures.items()}
        self._log_row({"step": step, **images})

    def _log_row(self, row: dict[str, Any]) -> None:
        """A row of the history; wandb's own step are the milliseconds since the run has begun, or more."""
        self._row = max(self._row + 1, int(1000 * (time.time() - self._begun)))
        self._run.log(row, step=self._row)

    def close(self) -> None:
        """End the run, and log where its files are when the server doesn't take them."""
        text = f"wandb: not everything was sent; `wandb sync {Path(self._run.dir).parent}` sends it"
        with reported(lambda error: self._log(text), on=TimeoutError):
            self._run.finish()


class Tensorboard:
    """Event files in run_dir/tensorboard. What starts again at an earlier step hides the points after it."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        rows = [f"| {key} | {value} |" for key, value in config.items()]
        self._folder = run_dir / "tensorboard"
        self._config = "\n".join(["| setting | value |", "|---|---|", *rows])
        self._open()

    def _open(self, **options: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), flush_secs=30, **options)
        self._writer.add_text("config", self._config)

    def begin(self, step: int) -> None:
        """Hide the points after `step`: they are about to be made again (a restart, a rollback)."""
        if step:
            self.close()
            self._open(purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Log pictures by name, uint8 (H, W, 3)."""
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
