"""A page in a real browser: headless Chromium, driven by the DevTools protocol through its pipe."""

import base64
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")


class _Session:
    """Calls and events as JSON between null bytes: Chromium reads file descriptor 3 and writes 4."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process, self._last, self.session = process, 0, ""
        self.events: list[dict[str, Any]] = []

    def _next(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        message = bytearray()
        while (byte := self._process.stdout.read(1)) != b"\0":
            assert byte, "Chromium ended; run it by hand to see why"
            message += byte
        return json.loads(message)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while (answer := self._next()).get("id") != self._last:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer}"
        return answer["result"]

    def wait(self, method: str) -> None:
        while all(event.get("method") != method for event in self.events):
            self.events.append(self._next())


def open_page(path: Path, png: Path | None = None, width: int = 1280) -> list[str]:
    """What Chromium complains of while it shows a file: messages on the console, and what can't be fetched.

    png: where to write a picture of the whole page, `width` CSS pixels wide; a phone has 390.
    """
    if BROWSER is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium) or Google Chrome")
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [BROWSER, *OPTIONS, f"--user-data-dir={profile}"]
        moved = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >&2', "sh", *command]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(moved, **pipes) as process:
            try:
                return _visit(_Session(process), path, png, width)
            finally:
                process.kill()


def _visit(session: _Session, path: Path, png: Path | None, width: int) -> list[str]:
    target = session.call("Target.createTarget", url="about:blank")["targetId"]
    session.session = session.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log"):
        session.call(f"{domain}.enable")
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    session.call("Emulation.setDeviceMetricsOverride", **screen)
    session.events.clear()
    session.call("Page.navigate", url=path.resolve().as_uri())
    session.wait("Page.loadEventFired")
    shot = session.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")  # draws the page
    if png is not None:
        png.write_bytes(base64.b64decode(shot["data"]))
    complaints = []
    for event in session.events:
        params = event.get("params", {})
        if event.get("method") == "Runtime.consoleAPICalled":
            complaints.append(" ".join(str(arg.get("value")) for arg in params["args"]))
        elif event.get("method") == "Runtime.exceptionThrown":
            complaints.append(params["exceptionDetails"]["exception"]["description"])
        elif event.get("method") == "Log.entryAdded":
            complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}".strip())
    return complaints
