"""wandb and TensorBoard, so that neither can hold up a run or end it.

Each is fed through an Outbox. metrics.jsonl doesn't go this way and misses nothing.

wandb goes online only where its server answers a request within PROBE_S seconds, and stays offline otherwise:
its own attempts would hold the start up for longer. Where it answers and then doesn't (a gateway before a
dead server, a key that it refuses), wandb's service is torn down first, because the failed run keeps its id
("run ID is in use", wandb issue 9865). Start and end are bounded by telemetry.wandb_timeout_s. One run id, in
wandb_id.txt, lasts over restarts.

Code, git state, packages and machine are not uploaded, nor are wandb's reports on itself, whose last one
holds up the exit of the interpreter for 20 s where the server is gone. A setting whose name or value is that
of a secret is left out.
"""

from __future__ import annotations

import importlib.util
import os
import re
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from segformer.errors import ConfigError
from segformer.telemetry.queue import Outbox, Tracker, one_line

PROBE_S = 3.0
GRACE_S = 5.0  # for importing wandb and starting its service, here and when it falls back
WANDB_URL = "https://api.wandb.ai"
_SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)
# White to dark blue, of even steps in lightness; grey where a class has no pixels.
_RAMP = np.array(
    [(255, 255, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107)], np.float64
)
_EMPTY = 224


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without entries whose key or value is that of a secret.

    Such is a key that says key, token, secret, password or credential, and a value that an environment
    variable of such a name holds.
    """
    values = {value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= 8}
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if _SECRET.search(key) or (isinstance(value, str) and any(secret in value for secret in values)):
            continue
        kept[key] = without_secrets(value) if isinstance(value, Mapping) else value
    return kept


def answers(url: str, timeout_s: float = PROBE_S) -> str | None:
    """None where a web server answers at `url` within `timeout_s` seconds, whatever it says; or why not.

    Goes through the proxy of the environment, as wandb does.
    """
    outcome = [f"no answer within {timeout_s:g} s"]

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout_s).close()
        except urllib.error.HTTPError as error:
            error.close()  # an answer
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if not isinstance(reason, TimeoutError):
                outcome[0] = one_line(reason if isinstance(reason, Exception) else error)
            return
        outcome.clear()

    asking = threading.Thread(target=ask, name="probe", daemon=True)  # looking a name up has no time limit
    asking.start()
    asking.join(timeout_s)
    return outcome[0] if outcome else None


def confusion_picture(counts: Any) -> np.ndarray:
    """Counts (K, K), rows labels and columns predictions -> uint8 (S, S, 3), S about 600.

    Each row is a share of the label's pixels: white 0, dark blue 1. Rows of classes without pixels are grey.
    """
    counts = np.asarray(counts, np.float64)
    totals = counts.sum(1, keepdims=True)
    share = counts / np.maximum(totals, 1)
    steps = np.linspace(0, 1, len(_RAMP))
    colours = np.stack([np.interp(share, steps, _RAMP[:, channel]) for channel in range(3)], axis=-1)
    colours[totals[:, 0] == 0] = _EMPTY
    cell = max(1, min(60, 600 // len(counts)))
    return colours.round().astype(np.uint8).repeat(cell, 0).repeat(cell, 1)


class Wandb:
    """A wandb run, online or offline."""

    def __init__(
        self,
        run_dir: Path,
        say: Callable[[str], None],
        *,
        mode: str,
        project: str,
        entity: str | None,
        name: str,
        config: dict[str, Any],
        timeout_s: float,
    ) -> None:
        import wandb

        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        self._wandb, self._say, self._timeout_s = wandb, say, timeout_s
        self._run = wandb.init(
            mode=mode,  # type: ignore[arg-type]
            project=project,
            entity=entity,
            name=name,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(run_dir),
            config=without_secrets(config),
            settings=wandb.Settings(
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
            ),
        )
        # wandb's own step only grows; a run that continues from a checkpoint goes back to it.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def begin(self, step: int) -> None:
        """Nothing: the step is logged beside every value."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers."""
        self._run.log({"step": step, **values})

    def pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Log pictures."""
        images = {name: self._wandb.Image(picture) for name, picture in pictures.items()}
        self._run.log({"step": step, **images})

    def close(self) -> None:
        """End the run, and say where its files are when the server doesn't take them."""
        try:
            self._run.finish()
        except TimeoutError:
            self._say(
                f"wandb has not sent everything within {self._timeout_s:g} s; "
                f"`wandb sync {Path(self._run.dir).parent}` sends it"
            )


class Tensorboard:
    """Event files in run_dir/tensorboard. What starts again at an earlier step hides the points after it."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        self._folder = run_dir / "tensorboard"
        self._config = without_secrets(config)
        self._purge: int | None = None
        self._writer: Any = None

    def _open(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge, flush_secs=30)
            rows = [f"| {key} | {value} |" for key, value in self._config.items()]
            self._writer.add_text("config", "\n".join(["| setting | value |", "|---|---|", *rows]))
        return self._writer

    def begin(self, step: int) -> None:
        """Hide the points after `step`: they are about to be made again (a restart, a rollback)."""
        self.close()
        self._purge = step + 1 if step else None
        self._open()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write numbers."""
        for name, value in values.items():
            self._open().add_scalar(name, value, step)

    def pictures(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        """Write pictures."""
        for name, picture in pictures.items():
            self._open().add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def open_wandb(run_dir: Path, *, mode: str, timeout_s: float, **options: Any) -> Outbox:
    """wandb's outbox; waits until it is open, for at most PROBE_S + `timeout_s` + GRACE_S seconds.

    Online, but no answer from the server: it logs offline, and says so.
    """

    def opener(say: Callable[[str], None]) -> Tracker:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        if mode == "online":
            wandb.setup(wandb.Settings(silent=True))
            url = _wandb_url()
            reason = answers(url)
            if reason is None:
                try:
                    return Wandb(run_dir, say, mode="online", timeout_s=timeout_s, **options)
                except Exception as error:
                    reason = one_line(error)
                    wandb.teardown()
            say(
                f"wandb: no run at {url} ({reason}); logging offline, "
                f"`wandb sync {run_dir}/wandb/offline-run-*` sends it later"
            )
        return Wandb(run_dir, say, mode="offline", timeout_s=timeout_s, **options)

    outbox = Outbox("wandb", opener)
    outbox.wait_open(PROBE_S + timeout_s + GRACE_S)
    return outbox


def _wandb_url() -> str:
    """Where wandb's server is, by the environment or by what `wandb login --host` has written down."""
    try:
        from wandb.sdk import wandb_setup

        return str(wandb_setup.singleton().settings.base_url)
    except (ImportError, AttributeError):  # no public name; another version may have another one
        return os.environ.get("WANDB_BASE_URL") or WANDB_URL


def open_tensorboard(run_dir: Path, config: dict[str, Any]) -> Outbox:
    """TensorBoard's outbox. ConfigError where the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "telemetry.tensorboard=true needs the package tensorboard, which is not installed; "
            "run `pip install 'segformer[tensorboard]'` or set it to false"
        )
    return Outbox("TensorBoard", lambda say: Tensorboard(run_dir, config))
