"""Real servers on loopback: HTTP with ranges and faults, or bytes of any kind, S3 (moto) and Google Cloud
Storage (an emulator)."""

import os
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch
from urllib.parse import quote
from urllib.request import Request, urlopen

FAULTS = ("503", "short", "reset", "stall")
STALL_SECONDS = 3.0


class FileServer(ThreadingHTTPServer):
    """Serves a folder with byte ranges. A share `fail` of the requests goes wrong, in every way of FAULTS."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, *, fail: float = 0.0, ranges: bool = True, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.fail = fail
        self.ranges = ranges
        self.cut: int | None = None  # bytes of a body after which the connection ends
        self.done: Counter[str] = Counter()  # faults by name, and "ok"
        self.requests: list[tuple[str, str, str]] = []  # method, file name, Range
        self._random, self._lock = Random(seed), threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self, request: tuple[str, str, str]) -> str:
        """What happens to this request."""
        with self._lock:
            self.requests.append(request)
            fault = self._random.choice(FAULTS) if self._random.random() < self.fail else "ok"
            self.done[fault] += 1
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no error of the server."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        name, asked = self.path.lstrip("/"), self.headers.get("Range", "")
        fault = self.server.draw((self.command, name, asked))
        path = self.server.folder / name
        if fault == "503":
            return self._empty(503)
        if not path.is_file():
            return self._empty(404)
        data = path.read_bytes()
        code, first, last = 200, 0, len(data) - 1
        if asked and self.server.ranges:
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            code, first, last = 206, int(begin), min(int(end) if end else last, last)
            if first >= len(data):
                return self._empty(416)
        part = data[first : last + 1]
        if fault == "stall":
            time.sleep(STALL_SECONDS)
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)  # closing then sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            return self.connection.close()
        self.send_response(code)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes" if self.server.ranges else "none")
        if code == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(part[: len(part) // 2] if fault == "short" else part[: self.server.cut])
        if fault == "short" or self.server.cut is not None:
            self.close_connection = True
        return None

    def _empty(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[FileServer]:
    """A running FileServer."""
    server = FileServer(folder, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Raw(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        asked = b""
        while b"\r\n\r\n" not in asked and (part := self.request.recv(2**16)):
            asked += part
        with suppress(OSError):  # the client has had enough
            for part in self.server.answer(asked.decode("latin-1")):  # type: ignore[attr-defined]
                self.request.sendall(part)


@contextmanager
def answering(answer: Callable[[str], Iterable[bytes]]) -> Iterator[str]:
    """The URL of a server that answers with bytes of any kind: `answer` gets the head of the request."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Raw) as server:
        server.daemon_threads, server.answer = True, answer  # type: ignore[attr-defined]
        server.block_on_close = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def s3_with(folder: Path) -> Iterator[str]:
    """The URL of the files of a folder in an S3 bucket; the environment leads boto and s3fs to it."""
    import boto3
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    try:
        with patch.dict(os.environ, environment):
            client = boto3.client("s3")
            client.create_bucket(Bucket="bucket")
            for path in folder.iterdir():
                client.put_object(Bucket="bucket", Key=f"sets/one/{path.name}", Body=path.read_bytes())
            yield "s3://bucket/sets/one"
    finally:
        server.stop()
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # the next server has another port


@contextmanager
def gs_with(folder: Path) -> Iterator[str]:
    """The URL of the files of a folder in a bucket of Google Cloud Storage, likewise."""
    import fsspec
    from gcp_storage_emulator.server import create_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    base = f"http://127.0.0.1:{port}"
    try:
        with patch.dict(os.environ, {"STORAGE_EMULATOR_HOST": base}):
            for path in folder.iterdir():
                where = f"{base}/upload/storage/v1/b/bucket/o?uploadType=media&name="
                request = Request(where + quote(f"sets/one/{path.name}", safe=""), data=path.read_bytes())
                request.add_header("Content-Type", "application/octet-stream")
                urlopen(request, timeout=10).close()
            yield "gs://bucket/sets/one"
    finally:
        server.stop()
        fsspec.get_filesystem_class("gs").clear_instance_cache()
