"""A started server: hostile clients, and its page in Chromium by mouse and keyboard."""

import concurrent.futures
import io
import re
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from browser import SHIFT, browsing
from PIL import Image

from segformer.inference.predictor import Predictor

pytestmark = pytest.mark.slow  # a process that imports torch, and Chromium
MEMORY = 1.5e9


def peak(process):
    """The most memory of the process so far, bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def photograph(height=90, width=120, kind="JPEG"):
    small = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def raw(address, data, seconds):
    """What comes back, until the server closes or the time is up, of bytes that are sent as they are."""
    found, until = b"", time.monotonic() + seconds
    with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port)) as client:
        client.sendall(data)
        while (left := until - time.monotonic()) > 0:
            client.settimeout(left)
            try:
                part = client.recv(65536)
            except TimeoutError:
                return found, False
            if not part:
                return found, True
            found += part
    return found, False


def test_the_server_outlives_hostile_clients_below_its_memory(started):
    address, process = started
    url, large = f"{address}/predict?confidence=true", photograph(4000, 4000)
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n"
    with concurrent.futures.ThreadPoolExecutor(40) as pool, httpx.Client(timeout=30) as client:
        slow = [pool.submit(raw, address, data, 35) for data in
                (b"GET / HT", head + b"Content-Length: 100\r\n\r\nx", head + b"X-A: ")]  # fmt: skip
        codes = list(pool.map(lambda _: client.post(url, content=photograph()).status_code, range(200)))
        assert {200, 503} <= set(codes) <= {200, 503, 504}
        biggest = list(pool.map(lambda _: client.post(url, content=large, timeout=60).status_code, range(4)))
        assert set(biggest) <= {200, 503, 504}
        fifty = raw(address, head + b"Content-Length: 52428800\r\n\r\n" + bytes(2**16), 5)
        assert b"413" in fifty[0].splitlines()[0]
        body = (b"100000\r\n" + bytes(2**20) + b"\r\n") * 18
        chunked = raw(address, head + b"Transfer-Encoding: chunked\r\n\r\n" + body, 5)
        assert b"413" in chunked[0].splitlines()[0]
        with pytest.raises(httpx.ReadTimeout):  # it asks and goes
            client.post(url, content=large, timeout=0.05)
        for name in ("../../../etc/passwd", "a\x00b.png", "x" * 10_000, "http://169.254.169.254/"):
            answer = client.post(url, files={"file": (name, b"junk")})
            assert answer.status_code == 422, answer.text
        answers = [future.result() for future in slow]
        assert all(closed for _, closed in answers)
        assert b" 504 " in answers[1][0].splitlines()[0]
        while client.get(f"{address}/health").json()["waiting"]:  # it can't be taken from the network
            time.sleep(0.1)
        assert client.post(url, content=photograph()).status_code == 200
        assert client.get(f"{address}/health").json()["waiting"] == 0
    assert process.poll() is None
    assert peak(process) < MEMORY, peak(process)


def test_the_page_by_mouse_and_by_keyboard(started, checkpoint, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(photograph())
    expected = Predictor(checkpoint, device="cpu")(path, probabilities=True)
    with browsing() as page:
        page.downloads(tmp_path)
        page.open(started[0])
        page.until("document.querySelector('#limits').textContent.includes('MB')")
        page.drop("#file", path)
        page.until("!document.querySelector('#stage').hidden")
        names = page.read("[...document.querySelectorAll('#legend span')].map(e => e.textContent)")
        assert [name.partition(" (")[0] for name in names] == list(expected.shares)
        assert page.read("[...now.ids]") == expected.mask.ravel().tolist()

        page.move("#stage", 30.5 / 120, 40.5 / 90)  # by mouse
        told, k = page.read("document.querySelector('#tip').innerText"), expected.mask[40, 30]
        sure = expected.probabilities[k, 40, 30]
        assert told.splitlines()[0] == expected.classes[k]
        assert abs(int(re.search(r"(\d+) % probable", told)[1]) - 100 * sure) <= 1
        assert told.endswith("30, 40")
        visible = (
            "document.querySelector('#mask').getContext('2d').getImageData(0, 0, 9999, 9999).data"
            ".filter((v, i) => i % 4 == 3 && v).length"
        )
        full = page.read(visible)
        page.click("#none")
        page.until(f"{visible} == 0")
        page.click("#all")
        page.until(f"{visible} == {full}")
        for button, ending in (("#savemask", "mask"), ("#saveoverlay", "overlay")):
            page.click(button)
            page.until(f"document.querySelector('#status').textContent == 'Saved as photo_{ending}.png.'")
        saved = tmp_path / "photo_mask.png"
        while not ((tmp_path / "photo_overlay.png").exists() and saved.exists()):
            time.sleep(0.02)
        with Image.open(saved) as mask, Image.open(tmp_path / "photo_overlay.png") as overlay:
            np.testing.assert_array_equal(np.array(mask), expected.mask)
            assert mask.getpalette()[3:6] == expected.palette[1].tolist()
            assert overlay.size == (120, 90)

        page.read("document.querySelector('#stage').focus()")  # by keyboard
        page.press("ArrowRight")
        page.press("ArrowRight", 3)
        page.press("ArrowUp", 1, SHIFT)
        assert page.read("[point.x, point.y]") == [63, 35]
        page.press("Tab", 3)
        assert page.read("document.activeElement.type") == "checkbox"
        page.press(" ")
        assert page.read("now.on.filter(on => !on).length") == 1
        page.read("document.querySelector('#compare').focus()")
        page.press("ArrowRight", 5)
        assert page.read("document.querySelector('#mask').style.clipPath") == "inset(0px 0px 0px 5%)"
        reached = set()
        page.read("document.activeElement.blur()")
        for _ in range(14):
            page.press("Tab")
            reached.add(page.read("document.activeElement.id"))
        assert {"stage", "all", "none", "opacity", "compare", "patterns", "savemask", "again"} <= reached
        assert [c for c in page.complaints() if "getImageData" not in c] == []  # which is this test's

        (tmp_path / "bad.png").write_bytes(b"junk")  # in words, at the width of a phone
        page.open(started[0], width=390, height=844)
        page.until("document.querySelector('#limits').textContent.includes('MB')")
        page.drop("#file", tmp_path / "bad.png")
        page.until("document.querySelector('#error').textContent.includes('not a whole picture')")
        page.drop("#file", path)
        page.until("!document.querySelector('#stage').hidden")
        assert page.read("document.querySelector('#error').hidden")
        assert page.read("document.documentElement.scrollWidth") == 390
        page.click("#stage", 0.5, 0.5)
        assert page.read("document.querySelector('#tip').innerText.split('\\n')[0]") in expected.classes
        assert [c for c in page.complaints() if "422" not in c] == []
