"""The addresses of the server.

    GET  /              the page: page.html, which loads nothing from elsewhere
    POST /predict       an image, as the body or as the file of a form -> JSON, or the mask as PNG
    GET  /model         what the model is, and the bounds
    GET  /health        what waits, is answered and refused
    GET  /openapi.json  all of this for programs; FastAPI's page of it loads from a CDN and is left out

Errors are {"detail": "one line"}.
"""

import asyncio
import base64
import hashlib
import io
import re
import time
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segformer.errors import DataError, SegformerError, printable, reraise_as
from segformer.inference.predictor import Prediction
from segformer.inference.serving.batching import Batcher
from segformer.inference.serving.door import Door

if TYPE_CHECKING:
    from fastapi import Request
    from PIL import Image

PAGE = Path(__file__).with_name("page.html")
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORM = {"type": "object", "required": ["file"], "properties": {"file": _BINARY["schema"]}}
BODY = {"required": True, "content": {"multipart/form-data": {"schema": _FORM}, "image/*": _BINARY}}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {}}, "description": "JSON; the mask alone where PNG is accepted"},
    **{
        status: {"description": text}
        for status, text in (
            (413, "More bytes than are taken"),
            (422, "Not one whole image of a format that is read, or of more pixels than are taken"),
            (503, "The queue is full; Retry-After says when to try again"),
            (504, "Not answered in time"),
        )
    },
}


def policy(page: str) -> str:
    """The Content-Security-Policy under which the page's own script and style run, and nothing else."""
    allowed = {
        f"{tag}-src": f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL)
    }
    allowed |= {"img-src": "'self' blob: data:", "connect-src": "'self' blob: data:"}
    none = ("default-src", "base-uri", "form-action", "frame-ancestors")
    return "; ".join(f"{key} {value}" for key, value in (dict.fromkeys(none, "'none'") | allowed).items())


def png(picture: "Image.Image") -> bytes:
    """A picture as the bytes of a PNG."""
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=4)
    return out.getvalue()


def listing(predictor: Any) -> list[dict[str, Any]]:
    """The classes: id, name, color."""
    colors = predictor.palette.tolist()
    return [
        {"id": k, "name": name, "color": color}
        for k, (name, color) in enumerate(zip(predictor.classes, colors, strict=True))
    ]


def answer(found: Prediction) -> dict[str, Any]:
    """A prediction as JSON."""
    from PIL import Image

    height, width = found.mask.shape
    counts = np.bincount(found.mask.ravel(), minlength=len(found.classes)) / found.mask.size
    pictures = {"mask": found.indexed()}
    if found.confidence is not None:
        pictures["confidence"] = Image.fromarray(found.confidence)
    return {
        "width": width,
        "height": height,
        "classes": [one | {"share": float(counts[one["id"]])} for one in listing(found)],
        **{
            name: f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"
            for name, picture in pictures.items()
        },
    }


async def uploaded(request: "Request", most: int) -> bytes:
    """The file of a form, or the body as it is; it never leaves memory."""
    from starlette.formparsers import MultiPartException, MultiPartParser

    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        return await request.body()

    async def stream() -> AsyncGenerator[bytes, None]:
        async for part in request.stream():
            yield part

    parser = MultiPartParser(request.headers, stream(), max_files=1, max_fields=8)
    parser.spool_max_size = most + 1  # no temporary file
    wrong = (MultiPartException, ValueError, LookupError)
    with reraise_as(DataError, "the form can't be read", "send one file", on=wrong):
        form = await parser.parse()
    for value in form.values():
        if not isinstance(value, str):
            with value.file as file:
                return file.read()
    raise DataError("the form holds no file; send one as `file`, or the image as the body")


def build_app(
    batcher: Batcher, about: dict[str, Any], *, most: int, queue: int, timeout: float, hosts: set[str] | None
) -> Door:
    """The application; about: what GET /model says beside the classes. The rest: see Door."""
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import HTMLResponse, JSONResponse, Response
    from starlette.requests import ClientDisconnect

    page, name = PAGE.read_text("utf-8"), "SegFormer"
    app: FastAPI = FastAPI(title=name, docs_url=None, redoc_url=None, openapi_url="/openapi.json")

    @app.get("/", include_in_schema=False)
    async def show() -> HTMLResponse:
        return HTMLResponse(page)

    @app.post("/predict", openapi_extra={"requestBody": BODY}, responses=ANSWERS)
    async def predict(request: Request, confidence: bool = False) -> Response:
        """The class of every pixel: shares, and the mask as an indexed PNG whose values are class ids.

        confidence: also the probability of each pixel's class, as a gray PNG, 255 = certain.
        """
        data, start = await uploaded(request, most), time.monotonic()
        found = await asyncio.wrap_future(batcher.submit(data, confidence))
        seconds = round(time.monotonic() - start, 4)
        if request.headers.get("accept", "") == "image/png":
            return Response(await run_in_threadpool(lambda: png(found.indexed())), media_type="image/png")
        return JSONResponse({"seconds": seconds} | await run_in_threadpool(partial(answer, found)))

    @app.get("/model")
    async def model() -> dict[str, Any]:
        """What the model is, and the bounds of an upload."""
        return about | {"classes": listing(batcher.predictor)}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Uploads that are being worked on, most of them, and how many were answered and refused."""
        return {"status": "ok", "waiting": door.inside} | {
            key: getattr(door, key) for key in ("queue", "served", "refused")
        }

    @app.exception_handler(SegformerError)
    async def refuse(request: Request, error: SegformerError) -> JSONResponse:
        return JSONResponse({"detail": printable(str(error))}, 422)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)

    door = Door(app, most=most, queue=queue, timeout=timeout, hosts=hosts, policy=policy(page))
    return door
