"""A trained model behind an address: a page to look at its masks, and REST for programs (app.py).

On loopback unless `host` says otherwise, and without authentication. Ctrl-C and SIGTERM end it: requests in
flight are answered first, and the exit code is 0.
"""

import math
import signal
import socket
import sys
from dataclasses import dataclass, fields
from typing import Any

from segformer.data.sources.dataset import MAX_FILE_BYTES, MAX_PIXELS
from segformer.errors import ConfigError, listed, reraise_as, say, within
from segformer.evaluation.inference_mode import InferenceModeConfig
from segformer.inference.predictor import Predictor
from segformer.inference.serving.app import build_app
from segformer.inference.serving.batching import Batcher

LOOPBACK = {"127.0.0.1", "localhost", "::1"}


@dataclass(kw_only=True, slots=True)
class ServeConfig(InferenceModeConfig):
    """A model, where it is to be reached, and the bounds of what it takes."""

    checkpoint: str = "???"
    "Directory of a run, of one of its checkpoints, or of an export."
    step: str = "newest"
    "Checkpoint of a run: newest, best (by its validation score) or the number of its step."
    device: str = "auto"
    "cpu, cuda, cuda:1, or auto: the first GPU where there is one."
    long_side: int | None = 1024
    """Larger images are reduced to so many pixels of their long side for the network, and the mask has their
    size; 0 = no limit; null = as in training, or no limit with short_side."""
    host: str = "127.0.0.1"
    "Address to listen on; others than loopback are open to whoever reaches them: there is no password."
    port: int = 8000
    "Port to listen on; 0 takes a free one, which is printed."
    batch: int = 0
    "Waiting images of one size that go through the network together; 0 = 8 on a GPU, 1 on a CPU."
    queue: int = 16
    "Uploads that may be read, wait and be answered at a time; more are told to come again (503)."
    bytes: int = 16 * 2**20
    "Most bytes of an upload (413)."
    pixels: int = 16_000_000
    "Most pixels of an image, by its header (422), and of a batch."
    timeout: float = 60.0
    "Seconds in which a request is read, answered and sent (504)."

    def __post_init__(self) -> None:
        InferenceModeConfig.__post_init__(self)
        within(self, "", port=(0, 65535), batch=(0, math.inf), queue=(1, 10_000), timeout=(0.01, 86_400))
        within(self, "", bytes=(1, MAX_FILE_BYTES), pixels=(1, MAX_PIXELS))


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address; it doesn't listen yet."""
    do = "give port=0 for a free one, or another host"
    with reraise_as(ConfigError, f"host={host} port={port} can't be listened on", do):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    return listening


def serve(cfg: ServeConfig) -> None:
    """Answer until a signal comes.

    Raises:
        ConfigError: the address is taken, a package is missing, or a setting is wrong.
        CheckpointError: there is no such model.
    """
    what, do = "serve needs fastapi, uvicorn and python-multipart", "pip install 'segformer[serve]'"
    with reraise_as(ConfigError, what, do, on=ImportError):
        import fastapi  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    with bound(cfg.host, cfg.port) as listening:
        mode = {key.name: getattr(cfg, key.name) for key in fields(InferenceModeConfig)}
        predictor = Predictor(cfg.checkpoint, step=cfg.step, device=cfg.device, **mode)
        listening.listen(2048)
        host, port = (f"[{cfg.host}]" if ":" in cfg.host else cfg.host), listening.getsockname()[1]
        names = f"{len(predictor.classes)} classes: {listed(predictor.classes)}"
        say(f"serve: http://{host}:{port}/ ({cfg.checkpoint} on {predictor.device}, {names}); Ctrl-C ends it")
        local = cfg.host in LOOPBACK
        if not local:
            say(f"WARN: host={cfg.host}: whoever reaches it may use it: no authentication", file=sys.stderr)
        about = {
            "checkpoint": cfg.checkpoint,
            "device": str(predictor.device),
            "channels": predictor.pixels.channels,
            "dtype": predictor.pixels.dtype,
            "long_side": predictor.mode.long_side,
            "limits": {key: getattr(cfg, key) for key in ("bytes", "pixels", "timeout", "queue")},
        }
        batcher = Batcher(predictor, cfg.batch or (8 if predictor.device.type == "cuda" else 1), cfg.pixels)
        hosts = LOOPBACK if local else None
        app = build_app(batcher, about, most=cfg.bytes, queue=cfg.queue, timeout=cfg.timeout, hosts=hosts)
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn sends what has stopped it once more
            signal.signal(number, lambda *_: None)
        settings: dict[str, Any] = {"log_config": None, "access_log": False, "proxy_headers": False}
        settings |= {"server_header": False, "lifespan": "off", "ws": "none", "http": _protocol(cfg.timeout)}
        settings |= {"timeout_graceful_shutdown": math.ceil(cfg.timeout)}
        uvicorn.Server(uvicorn.Config(app, **settings)).run(sockets=[listening])
        batcher.close()
        say(f"serve: stopped; {app.served} answered, {app.refused} refused")


def _protocol(seconds: float) -> type:
    """HTTP where a connection without a request for so many seconds, or with half of a header, is closed."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(seconds, self._look, None)

        def _look(self, before: Any) -> None:
            if self.cycle is before and (before is None or before.response_complete):
                self.transport.close()
            elif not self.transport.is_closing():
                self.loop.call_later(seconds, self._look, self.cycle)

    return Protocol
