"""Files of shards, read by range from a local folder, or from http(s), s3 and gs through fsspec.

    local    os.pread on open descriptors
    remote   one ranged request a call, given up after `timeout` seconds without a byte; over http also where
             it is slower than SLOWEST, and where the server answers what sources/web.py refuses

Every read returns exactly the bytes that were asked for, or raises DataError with the address and the reason.
One that fails is repeated with exponential backoff and jitter for up to `retry_seconds`; a file that is not
there or not to be read (404, 403 and their like) is an error at once. Storage never substitutes or skips:
that would change the sample order.

Refused: every other scheme, `pipe:`, `::`, control characters, user names, queries and fragments. Credentials
come from the environment or the files of the cloud's own client, never from a configuration, which is saved
with the run. AWS_ENDPOINT_URL chooses another S3 server."""

import hashlib
import os
import random
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from segformer.data.sources.web import MAX_REDIRECTS, AnswerRefusedError, check_answer, check_redirect
from segformer.errors import ConfigError, DataError, at_least, reraise_as
from segformer.files import NotAFileError, read_bytes, regular, write_atomic

REMOTE = ("http", "https", "s3", "gs")
OPEN_FILES = 64  # per process; 1,000 shards must not meet the usual limit of 1,024 descriptors
PIECE = 16 * 2**20  # a whole remote file is fetched in ranges of this many bytes
SLOWEST = 100_000  # bytes a second, after `timeout` seconds
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between two tries, before jitter

_NEEDED = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotAFileError)
_T = TypeVar("_T")


@dataclass(kw_only=True, slots=True)
class StorageConfig:
    """Reading of shards on http(s), s3 and gs. Nothing here changes what is read."""

    timeout: float = 30
    """Seconds without a byte after which a request is given up and repeated."""
    retry_seconds: float = 120
    """Seconds over which a failing read is repeated before the run ends."""
    cache_dir: str = ""
    """Folder for the indices and cached parts of remote shards; empty = ~/.cache/segformer."""
    cache_gb: float = 0
    """Size limit of the cached parts of remote shards on disk, GB; 0 = none are kept."""
    memory_mb: int = 256
    """MB of remote shards that each worker process keeps in memory."""

    def __post_init__(self) -> None:
        at_least(self, "loader.storage.", timeout=0.1, retry_seconds=0, cache_gb=0, memory_mb=0)

    @property
    def cache(self) -> Path:
        """The cache folder."""
        if self.cache_dir:
            return Path(self.cache_dir)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segformer"


class Storage:
    """The files below one root. Pickles as its root and settings; descriptors and connections stay behind."""

    def __init__(self, root: str, config: StorageConfig) -> None:
        self.root = root
        self.config = config
        self._scheme = root.partition("://")[0] if "://" in root else ""
        self.is_local = not self._scheme
        self._remote: Any = None
        self._files: OrderedDict[str, int] = OrderedDict()  # name -> descriptor, least recently used first

    @classmethod
    def at(cls, root: "str | Path | Storage", config: StorageConfig | None = None) -> "Storage":
        """The storage at a path or URL; ConfigError for a URL that is not allowed."""
        if isinstance(root, Storage):
            return root
        return cls(_checked(str(root)), replace(config) if config is not None else StorageConfig())

    def __reduce__(self) -> tuple[type["Storage"], tuple[str, StorageConfig]]:
        return Storage, (self.root, self.config)

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def where(self, name: str) -> str:
        """Path or URL of a file, for messages."""
        return str(Path(self.root) / name) if self.is_local else f"{self.root.rstrip('/')}/{name}"

    def size(self, name: str) -> int:
        """Bytes of a file; DataError when it is missing or cannot be reached."""
        if self.is_local:
            return self._retry(name, lambda: regular(Path(self.root, name)).stat().st_size)
        client, path = self._client(), self.where(name)
        size = self._retry(name, lambda: client.info(path)["size"])
        if size is None:
            raise DataError(f"{self.where(name)!r}: the server does not tell sizes; use another one")
        return int(size)

    def read(self, name: str, *, limit: int = 2**32) -> bytes:
        """A whole file of at most `limit` bytes."""
        return b"".join(self.pieces(name, limit=limit))

    def pieces(self, name: str, *, limit: int) -> Iterator[bytes]:
        """A whole file of at most `limit` bytes, PIECE by PIECE."""
        size = self.size(name)
        if size > limit:
            raise DataError(f"{self.where(name)!r} has {size} bytes; at most {limit} are expected")
        for start in range(0, size, PIECE):
            yield self.read_range(name, start, min(PIECE, size - start))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`; DataError when there are fewer or they cannot be fetched."""
        if self.is_local:
            data = self._retry(name, lambda: self._pread(name, start, length))
            if len(data) < length:
                missing, end = length - len(data), start + len(data)
                raise DataError(
                    f"{self.where(name)!r} ends {missing} bytes early (at byte {end}); copy it again"
                )
            return data
        client, path = self._client(), self.where(name)
        over_http = self._scheme in ("http", "https")
        fetch = partial(_http_range, client, self.config.timeout) if over_http else client.cat_file

        def request() -> bytes:
            data: bytes = fetch(path, start=start, end=start + length)
            if len(data) < length:
                raise OSError(f"{len(data)} of {length} bytes at byte {start}")
            return data

        data = self._retry(name, request)
        if len(data) > length:
            raise DataError(
                f"{self.where(name)!r}: the server ignored the Range header; "
                "serve the shards from one that supports it"
            )
        return data

    def whole(self, name: str, *, size: int, sha256: str, verify: bool = True) -> bytes:
        """A whole file, of a remote one its copy in the cache, which is made where there is none.

        With `verify` its bytes are checked, else its size only; a damaged copy is made again.
        """

        def fits(data: bytes) -> bool:
            return len(data) == size and (not verify or hashlib.sha256(data).hexdigest() == sha256)

        copy = self.config.cache / "files" / sha256
        if not self.is_local:
            if not re.fullmatch("[0-9a-f]{64}", sha256):  # it becomes a file name
                text = f"{self.where('dataset.json')!r} has no sha256 for {name}"
                raise DataError(f"{text}; shard the data again")
            with suppress(OSError):
                if fits(data := read_bytes(copy, most=size)):
                    return data
            verify = True
        if not fits(data := self.read(name, limit=size)):
            raise DataError(
                f"{self.where(name)!r} is damaged (size or sha256 differs from dataset.json); "
                "copy it again or shard the data again"
            )
        if not self.is_local:
            copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomic(copy, data, mode=0o600, durable=False)
        return data

    def _pread(self, name: str, start: int, length: int) -> bytes:
        """Up to `length` bytes from `start`, fewer at the end of the file only."""
        parts = []
        while length and (part := os.pread(self._descriptor(name), length, start)):
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return b"".join(parts)

    def _descriptor(self, name: str) -> int:
        if name not in self._files:
            self._files[name] = os.open(regular(Path(self.root, name)), os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(name)
        return self._files[name]

    def _client(self) -> Any:
        """The fsspec file system of this process, made when first needed."""
        if self._remote is None:
            self._remote = _file_system(self._scheme, self.config.timeout)
        return self._remote

    def _retry(self, name: str, call: Callable[[], _T]) -> _T:
        """The result of a read, repeated while that may help. The clients' own errors have no common type."""
        errors = OSError if self.is_local else Exception
        began, wait, tries = time.monotonic(), FIRST_WAIT, 0
        while True:
            tries += 1
            try:
                return call()
            except errors as error:
                http = self._scheme in ("http", "https") and isinstance(error, FileNotFoundError)
                # Over http fsspec says "not found" of whatever goes wrong in `info`.
                reason, lasting = _judged(error.__cause__ or error if http else error)
                spent = time.monotonic() - began
                if lasting or spent + wait > self.config.retry_seconds:
                    often = f" ({tries} tries in {spent:.0f} s)" if tries > 1 else ""
                    raise DataError(
                        f"{self.where(name)!r} cannot be read: {reason}{often}; "
                        "check the address, the permissions and the network, or copy the shards again"
                    ) from error
            if name in self._files:  # the handle of a network file system can be stale
                os.close(self._files.pop(name))
            time.sleep(wait * random.uniform(0.5, 1.0))  # ranks that fail together come back apart
            wait = min(2 * wait, LONGEST_WAIT)


def _judged(error: BaseException) -> tuple[str, bool]:
    """(what went wrong, whether it would again)."""
    status = getattr(error, "status", None) or getattr(error, "code", None)  # of aiohttp, of gcsfs
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    text = getattr(error, "strerror", None) or (f"HTTP {status}" if status else str(error))
    lasting = refused or isinstance(error, _LASTING) or "Credentials" in type(error).__name__
    return f"{type(error).__name__} {text}".strip(), lasting


def _checked(root: str) -> str:
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(?=//|(?![\\/]))", root)
    bad = re.search(r"[\x00-\x1f]|::", root)
    if bad or (scheme and scheme.group()[:-1] not in REMOTE):
        raise ConfigError(f"the address {root!r} is not allowed; use a folder or {', '.join(REMOTE)}://...")
    if scheme:
        parts = urlsplit(root)
        if "@" in parts.netloc:
            raise ConfigError(f"the address of {parts.hostname} holds a user name; keep it out of settings")
        if parts.query or parts.fragment or not parts.netloc or ".." in parts.path.split("/"):
            raise ConfigError(f"the address {root!r} must be <scheme>://<host or bucket>/<folder>, no more")
    return root


def _http_range(client: Any, timeout: float, url: str, *, start: int, end: int) -> bytes:
    """The bytes from `start` to `end`, one more where the server sends more."""
    from fsspec.asyn import sync

    async def fetch() -> bytes:
        session = await client.set_session()
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        limits = _limits(timeout, timeout + (end - start) / SLOWEST)
        async with session.get(client.encode_url(url), headers=headers, timeout=limits) as answer:
            if answer.status == 404:
                raise FileNotFoundError(url)
            answer.raise_for_status()
            if start and answer.status != 206:
                raise AnswerRefusedError("the server ignored the Range header")
            check_answer(answer.headers, *((start, end - 1) if answer.status == 206 else ()))
            data = bytearray()
            async for part in answer.content.iter_any():
                data += part
                if len(data) > end - start:
                    break
            return bytes(data[: end - start + 1])

    data: bytes = sync(client.loop, fetch)
    return data


def _limits(timeout: float, total: float) -> Any:
    import aiohttp

    return aiohttp.ClientTimeout(total=total, sock_connect=timeout, sock_read=timeout)


@cache
def _guard() -> Any:
    """What aiohttp asks before it follows a redirect; one object, so that fsspec keeps one session."""
    import aiohttp

    async def redirected(_: Any, context: Any, asked: Any) -> None:
        context.redirects = getattr(context, "redirects", 0) + 1
        if context.redirects > MAX_REDIRECTS:
            raise AnswerRefusedError(f"it is redirected more than {MAX_REDIRECTS} times")
        check_redirect(str(asked.url), asked.response.headers.get("Location", ""))

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(redirected)
    return trace


def _file_system(scheme: str, timeout: float) -> Any:
    import fsspec  # with aiohttp, s3fs or gcsfs: only remote shards need them

    what, do = f"{scheme}:// needs a package", f"pip install fsspec {_NEEDED[scheme]}"
    with reraise_as(ConfigError, what, do, on=ImportError):
        if scheme in ("http", "https"):
            options = {"timeout": _limits(timeout, 2 * timeout), "trace_configs": [_guard()]}
            return fsspec.filesystem("http", client_kwargs=options | {"auto_decompress": False})
        if scheme == "s3":
            config = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 1}}
            return fsspec.filesystem("s3", config_kwargs=config, use_listings_cache=False)
        return fsspec.filesystem("gs", requests_timeout=timeout, use_listings_cache=False)
