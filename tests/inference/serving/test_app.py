"""The server in this process: answers, batches, bounds, and what is refused."""

import asyncio
import base64
import io
import re
import struct
import threading
import zipfile
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image

from segformer.errors import ConfigError
from segformer.inference.serving.app import PAGE, build_app
from segformer.inference.serving.batching import UPLOAD
from segformer.inference.serving.serve import bound


def encoded(height=40, width=48, seed=0, kind="PNG", **options):
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, kind, **options)
    return out.getvalue()


def ask(door, *requests):
    """The answers to (method, path, options), which are sent at once."""

    async def all_of_them():
        transport = httpx.ASGITransport(door)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:80") as client:
            return await asyncio.gather(*(client.request(m, path, **more) for m, path, more in requests))

    return asyncio.run(all_of_them())


def post(door, data, path="/predict", **options):
    return ask(door, ("POST", path, {"content": data, **options}))[0]


def decoded(url):
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_form_body_and_png_have_the_prediction_of_the_same_file(door, predictor, tmp_path):
    data = encoded()
    (tmp_path / "a.png").write_bytes(data)
    expected = predictor(tmp_path / "a.png", probabilities=True)
    files = {"file": ("../../etc/passwd", data, "text/html")}
    answers = ask(
        door,
        ("POST", "/predict?confidence=true", {"content": data}),
        ("POST", "/predict?confidence=true", {"files": files}),
        ("POST", "/predict", {"content": data, "headers": {"accept": "image/png"}}),
    )
    for answer in answers[:2]:
        found = answer.json()
        assert (found["width"], found["height"]) == (48, 40)
        np.testing.assert_array_equal(decoded(found["mask"]), expected.mask)
        sure = np.rint(255 * expected.probabilities.max(0))
        np.testing.assert_allclose(decoded(found["confidence"]).astype(float), sure, atol=1)
        shares = {one["name"]: one["share"] for one in found["classes"]}
        assert {k: v for k, v in shares.items() if v} == pytest.approx(expected.shares)
        assert [one["color"] for one in found["classes"]] == predictor.palette.tolist()
    assert answers[2].headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(answers[2].content)) as picture:
        np.testing.assert_array_equal(np.array(picture), expected.mask)
        assert picture.getpalette()[:9] == predictor.palette.ravel().tolist()


def test_what_waits_and_has_one_size_goes_together_and_the_rest_in_its_order(batcher, predictor, monkeypatch):
    sizes, goes, begun = [], threading.Event(), threading.Event()

    def slow(images, keep=()):
        begun.set()
        assert goes.wait(10)
        sizes.append((len(images), images[0].shape[:2]))
        return type(predictor).of_one_size(predictor, images, keep)

    monkeypatch.setattr(predictor, "of_one_size", slow)
    first = batcher.submit(encoded(33, 33))
    assert begun.wait(10)
    waiting = [batcher.submit(encoded(40, 48, seed)) for seed in range(4)]
    other, damaged = batcher.submit(encoded(34, 34)), batcher.submit(encoded(40, 48)[:-20])
    left = batcher.submit(encoded(35, 35))
    assert left.cancel()
    goes.set()
    masks = [future.result(20).mask for future in (first, *waiting, other)]
    assert damaged.exception(20) is not None
    assert sizes == [(1, (33, 33)), (3, (40, 48)), (1, (40, 48)), (1, (34, 34))]
    for seed, mask in enumerate(masks[1:5]):
        alone = predictor(Image.open(io.BytesIO(encoded(40, 48, seed))))
        assert (mask == alone.mask).mean() > 0.999


def png_of(width, height, data=b"x"):
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [head, b"IDAT" + zlib.compress(data), b"IEND"]
    chunks = (struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def zipped():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../a.png", b"\0" * 1_000_000)
    return out.getvalue()


def animated():
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    return out.getvalue()


HOSTILE = {
    "zero bytes": (b"", "empty file"),
    "truncated png": (encoded()[:-30], "truncated or damaged"),
    "truncated jpeg": (encoded(kind="JPEG")[:400], "not a whole"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>', "not a whole picture"),
    "pdf": (b"%PDF-1.7\n1 0 obj", "not a whole picture"),
    "zip bomb": (zipped(), "not a whole picture"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "not a whole picture"),
    "script": (b"#!/bin/sh\nrm -rf /\n", "not a whole picture"),
    "huge declared": (png_of(2**31 - 1, 2**31 - 1), "pixels"),
    "wide declared": (png_of(2**20, 1), "the limit is 300000"),
    "bomb": (png_of(500, 500, b"\0" * 5_000_000), "more pixels than its header|not a whole"),
    "over the limit": (
        encoded(700, 700, kind="JPEG"),
        "700 x 700 pixels, the limit is 300000; make it",
    ),
    "animated gif": (animated(), "several pictures"),
    "polyglot": (b"GIF89a/*\xff\xff*/=1;<script>alert(1)</script>", "not a whole picture|pixels"),
    "tiff of nothing": (b"II*\0\x08\0\0\0\xff\xff" + b"\0" * 40, "not a whole"),
    "webp of nothing": (b"RIFF\x24\0\0\0WEBPVP8X" + b"\xff" * 20, "pixels|not a whole"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_upload_is_refused_in_one_line(door, name):
    data, words = HOSTILE[name]
    answer = post(door, data, headers={"content-type": "image/png"})
    assert answer.status_code == 422
    detail = answer.json()["detail"]
    assert re.search(words, detail), detail
    assert detail.isprintable()
    assert str(UPLOAD) in detail
    assert door.inside == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": {"a": "b"}, "files": None}, "image cannot be|not a whole|empty"),
        ({"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}}, "form can't be read"),
        ({"content": b"junk", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "form"),
        ({"files": [("file", ("a", b"1")), ("file", ("b", b"2"))]}, "form can't be read: Too many files"),
    ],
)
def test_a_form_without_one_file_is_refused(door, options, words):
    answer = ask(door, ("POST", "/predict", options))[0]
    assert (answer.status_code, bool(re.search(words, answer.json()["detail"]))) == (422, True), answer.text


def test_bytes_are_counted_as_they_are_read(door):
    taken = []

    async def endless():
        for part in range(1000):
            taken.append(part)
            yield bytes(10_000)

    answer = post(door, endless())
    assert (answer.status_code, len(taken) < 30) == (413, True)
    assert "limit for one upload is 200000 bytes" in answer.json()["detail"]
    assert post(door, bytes(200_001)).status_code == 413
    assert door.inside == 0


def test_beyond_the_queue_uploads_are_told_to_come_again(door):
    answers = ask(door, *[("POST", "/predict", {"content": encoded(seed=seed)}) for seed in range(9)])
    codes = [answer.status_code for answer in answers]
    assert sorted(codes) == [200] * 4 + [503] * 5
    assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 503)
    health = ask(door, ("GET", "/health", {}))[0].json()
    assert health == {"status": "ok", "waiting": 0, "queue": 4, "served": 4, "refused": 5}


def test_what_takes_too_long_is_ended(batcher, predictor, monkeypatch):
    goes = threading.Event()
    monkeypatch.setattr(predictor, "of_one_size", lambda *_: goes.wait(10) and [])
    door = build_app(batcher, {}, most=200_000, queue=4, timeout=0.1, hosts=None)

    async def trickle():
        while True:
            yield b"x"
            await asyncio.sleep(0.01)

    for data in (encoded(), trickle()):
        answer = post(door, data)
        assert (answer.status_code, door.inside) == (504, 0)
    goes.set()


def test_other_names_and_the_pages_of_other_sites_are_turned_away(door):
    data = {"content": encoded()}
    for headers, code in (
        ({"host": "evil.example:80"}, 421),
        ({"host": "localhost.evil.example"}, 421),
        ({"host": "[::1]:80"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:80", "host": "localhost:80"}, 200),
    ):
        answer = ask(door, ("POST", "/predict", {**data, "headers": headers}))[0]
        assert answer.status_code == code, (headers, answer.text)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in answer.headers


def test_the_page_runs_its_own_script_alone(door):
    answer = ask(door, ("GET", "/", {}))[0]
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert not re.search(r"https?://(?!www\.w3\.org)", answer.text)
    assert len(PAGE.read_text().splitlines()) <= 450


def test_the_interface_is_described_and_its_errors_are_json(door):
    described, model, docs = ask(door, *(("GET", p, {}) for p in ("/openapi.json", "/model", "/docs")))
    assert set(described.json()["paths"]) == {"/predict", "/model", "/health"}
    operation = described.json()["paths"]["/predict"]["post"]
    assert set(operation["requestBody"]["content"]) == {"multipart/form-data", "image/*"}
    assert {"200", "413", "422", "503", "504"} <= set(operation["responses"])
    assert [one["name"] for one in model.json()["classes"]] == ["road", "tree", "sky"]
    assert docs.status_code == 404


def test_a_port_that_is_taken_is_one_line():
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port={port} can't be listened on: .*; give port=0"):
            bound("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"host=nowhere\.invalid"):
        bound("nowhere.invalid", 0)


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_contrast_is_that_of_wcag_aa_in_light_and_in_dark():
    schemes = re.findall(r":root \{(.*?)\}", PAGE.read_text(), re.DOTALL)
    assert len(schemes) == 2
    text = [("ink", "page"), ("ink", "card"), ("soft", "page"), ("soft", "card"), ("on", "accent")]
    text += [("error", "alert"), ("accent", "card")]
    for scheme in schemes:
        colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))
        shapes = [("edge", "card"), ("edge", "page"), ("accent", "card"), ("accent", "page")]
        for pairs, least in ((text, 4.5), (shapes, 3.0)):
            for pair in pairs:
                low, high = sorted(luminance(colors[name]) for name in pair)
                assert (high + 0.05) / (low + 0.05) >= least, pair
