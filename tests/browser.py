"""A page in a real browser: headless Chromium, driven by the DevTools protocol through its pipe.

open_page(path)            what Chromium complains of while it shows a file
with browsing() as page:
    page.open(url)
    page.drop("#file", path); page.click("#all"); page.press("ArrowLeft"); page.read("document.title")
"""

import base64
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ("--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
KEYS = {"Tab": 9, " ": 32, "Enter": 13, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
KEYS |= {"Home": 36, "End": 35}
SHIFT = 8


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


class Page:
    """A page that is open, as a user has it: mouse, keyboard, files, and what it shows."""

    def __init__(self, session: _Session) -> None:
        self._session = session
        target = session.call("Target.createTarget", url="about:blank")["targetId"]
        session.session = session.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            session.call(f"{domain}.enable")

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        """Show an address at so many CSS pixels, and wait for it to be loaded; a phone has 390."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._session.call("Emulation.setDeviceMetricsOverride", **screen)
        self._session.events.clear()
        self._session.call("Page.navigate", url=url)
        self._session.wait("Page.loadEventFired")

    def scheme(self, name: str) -> None:
        """What the system prefers: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self._session.call("Emulation.setEmulatedMedia", features=features)

    def read(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        asked = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        found = self._session.call("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 20) -> None:
        """Wait for an expression to be true."""
        end = time.monotonic() + seconds
        while not self.read(expression):
            assert time.monotonic() < end, (
                f"not within {seconds} s: {expression}; {self.read('document.body.innerText')}"
            )
            time.sleep(0.02)

    def drop(self, selector: str, path: Path) -> None:
        """Give a file to an input, as a drop on it or a choice does."""
        root = self._session.call("DOM.getDocument")["root"]["nodeId"]
        node = self._session.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._session.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def place(self, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
        """Where a share of an element's width and height is on the screen, after scrolling to it."""
        box = self.read(
            f"(e => (e.scrollIntoView({{block: 'nearest'}}), (b => [b.left, b.top, b.width, b.height])"
            f"(e.getBoundingClientRect())))(document.querySelector({json.dumps(selector)}))"
        )
        return box[0] + x * box[2], box[1] + y * box[3]

    def move(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Move the mouse over a share of an element's width and height."""
        at = self.place(selector, x, y)
        self._session.call("Input.dispatchMouseEvent", type="mouseMoved", x=at[0], y=at[1])

    def click(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Press and release the left button there."""
        self.move(selector, x, y)
        at = self.place(selector, x, y)
        for kind in ("mousePressed", "mouseReleased"):
            button = {"button": "left", "clickCount": 1}
            self._session.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], **button)

    def press(self, key: str, times: int = 1, modifiers: int = 0) -> None:
        """Press and release a key of KEYS."""
        code = {"key": key, "windowsVirtualKeyCode": KEYS[key], "code": "Space" if key == " " else key}
        typed = {"text": {" ": " ", "Enter": "\r"}[key]} if key in (" ", "Enter") else {}
        for _ in range(times):
            for kind, more in (("keyDown", typed), ("keyUp", {})):
                self._session.call("Input.dispatchKeyEvent", type=kind, modifiers=modifiers, **code, **more)

    def downloads(self, folder: Path) -> None:
        """Where the page's downloads go."""
        self._session.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(folder))

    def picture(self, png: Path | None = None, whole: bool = True) -> None:
        """Draw the page, and write it where a path is given."""
        shot = self._session.call("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        if png is not None:
            png.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """Messages on the console, exceptions, and what can't be fetched, since it was opened."""
        self.read("0")  # what has happened before
        complaints = []
        for event in self._session.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.consoleAPICalled":
                complaints.append(" ".join(str(arg.get("value")) for arg in params["args"]))
            elif event.get("method") == "Runtime.exceptionThrown":
                complaints.append(params["exceptionDetails"]["exception"]["description"])
            elif event.get("method") == "Log.entryAdded":
                complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}".strip())
        return complaints


@contextmanager
def browsing() -> Iterator[Page]:
    """A Chromium of its own with an empty page; skips the test where there is none."""
    if BROWSER is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium) or Google Chrome")
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [BROWSER, *OPTIONS, f"--user-data-dir={profile}"]
        moved = ["sh", "-c", 'exec "$@" 3<&0 4>&1 </dev/null >&2', "sh", *command]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(moved, **pipes) as process:
            try:
                yield Page(_Session(process))
            finally:
                process.kill()


def open_page(path: Path, png: Path | None = None, width: int = 1280) -> list[str]:
    """What Chromium complains of while it shows a file: messages on the console, and what can't be fetched.

    png: where to write a picture of the whole page, `width` CSS pixels wide; a phone has 390.
    """
    with browsing() as page:
        page.open(path.resolve().as_uri(), width)
        page.picture(png)
        return page.complaints()
