"""Where shards lie and how their bytes are fetched: a local folder, or http(s), s3 and gs through fsspec.

    local    os.pread on open descriptors
    remote   one ranged request a call, given up after `timeout` seconds without a byte, repeated with
             exponential backoff and jitter for up to `retry_seconds`

Every read returns exactly the bytes that were asked for, or raises. Failures that may pass (no connection,
reset, stall, 5xx, 429, short body, EIO or ESTALE of a network file system) are repeated; others (404, 403,
no such file) are an error at once. Storage never substitutes or skips: that would change the sample order.

Refused: every other scheme, `pipe:`, `::`, control characters, user names, queries and fragments. Credentials
come from the environment or the files of the cloud's own client, never from a configuration, which is saved
with the run. AWS_ENDPOINT_URL chooses another S3 server."""

import asyncio
import errno
import hashlib
import os
import random
import re
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from segformer.errors import ConfigError, DataError

REMOTE = ("http", "https", "s3", "gs")
OPEN_FILES = 64  # per process; 1,000 shards must not meet the usual limit of 1,024 descriptors
PIECE = 16 * 2**20  # a whole remote file is fetched in ranges of this many bytes
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between two tries, before jitter

_NEEDED = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET)
_T = TypeVar("_T")


@dataclass(kw_only=True, slots=True)
class StorageConfig:
    """How shards on http(s), s3 and gs are read. Nothing here changes what is read."""

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
        for name, least in (("timeout", 0.1), ("retry_seconds", 0), ("cache_gb", 0), ("memory_mb", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"loader.storage.{name}={getattr(self, name)}; use {least} or more")

    @property
    def cache(self) -> Path:
        """The cache folder."""
        if self.cache_dir:
            return Path(self.cache_dir)
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segformer"


class _ShortReadError(OSError):
    """A source gave fewer bytes than it should have."""


class Storage:
    """The files below one root. Pickles as its root and settings; descriptors and connections stay behind."""

    def __init__(self, root: str, config: StorageConfig) -> None:
        self.root = root
        self.config = config
        scheme = root.partition("://")[0] if "://" in root else ""
        self.is_local = not scheme
        self._scheme = scheme
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
        self.close()

    def close(self) -> None:
        """Close the descriptors; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def where(self, name: str) -> str:
        """Path or URL of a file, for messages."""
        if self.is_local:
            return str(Path(self.root) / name)
        return f"{self.root.rstrip('/')}/{name}"

    def size(self, name: str) -> int:
        """Bytes of a file; DataError when it is missing or cannot be reached."""
        if self.is_local:
            return self._retry(name, lambda: Path(self.root, name).stat().st_size)
        size = self._retry(name, lambda: self._fs().info(self._path(name))["size"])
        if size is None:
            raise DataError(f"{self.where(name)!r}: the server does not tell sizes; use another one")
        return int(size)

    def read(self, name: str, *, limit: int = 2**32) -> bytes:
        """A whole file of at most `limit` bytes."""
        size = self.size(name)
        if size > limit:
            raise DataError(f"{self.where(name)!r} has {size} bytes; at most {limit} are expected")
        ranges = [(start, min(PIECE, size - start)) for start in range(0, size, PIECE)]
        return b"".join(self.read_range(name, start, length) for start, length in ranges)

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`; DataError when there are fewer or they cannot be fetched."""
        if self.is_local:
            return self._retry(name, lambda: self._pread(name, start, length))
        return self._retry(name, lambda: self._request(name, start, length))

    def local(self, name: str, *, size: int, sha256: str, verify: bool = True) -> Path:
        """A local path of the file: itself, or the cached copy of a remote one.

        A copy is verified when it is made and, with `verify`, when it is found; a damaged one is made again.
        """
        if self.is_local:
            return Path(self.root, name)
        if not re.fullmatch("[0-9a-f]{64}", sha256):  # it becomes a file name
            raise DataError(f"{self.where('dataset.json')!r} has no sha256 for {name}; shard the data again")
        path = self.config.cache / "files" / sha256
        if not _is_whole(path, size, sha256 if verify else None):
            data = self.read(name, limit=size)
            if hashlib.sha256(data).hexdigest() != sha256:
                raise DataError(
                    f"{self.where(name)!r} is damaged (its sha256 differs from dataset.json); "
                    "copy it again or shard the data again"
                )
            write_atomic(path, data)
        return path

    def _pread(self, name: str, start: int, length: int) -> bytes:
        parts = []
        while length:
            part = os.pread(self._descriptor(name), length, start)
            if not part:  # the end of a file that is too short does not pass
                raise DataError(
                    f"{self.where(name)!r} ends {length} bytes early (at byte {start}); copy it again"
                )
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return b"".join(parts)

    def _descriptor(self, name: str) -> int:
        if name not in self._files:
            self._files[name] = os.open(Path(self.root, name), os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(name)
        return self._files[name]

    def _request(self, name: str, start: int, length: int) -> bytes:
        data: bytes = self._fs().cat_file(self._path(name), start=start, end=start + length)
        if len(data) > length:
            raise DataError(
                f"{self.where(name)!r}: the server ignored the Range header; "
                "serve the shards from one that supports it"
            )
        if len(data) < length:
            raise _ShortReadError(f"{len(data)} of {length} bytes at byte {start}")
        return data

    def _path(self, name: str) -> str:
        url = self.where(name)
        return url if self._scheme in ("http", "https") else url.split("://", 1)[1]

    def _fs(self) -> Any:
        """The fsspec file system of this process, made when first needed."""
        if self._remote is None:
            self._remote = _file_system(self._scheme, self.config.timeout)
        return self._remote

    def _retry(self, name: str, call: Callable[[], _T]) -> _T:
        began, wait, tries = time.monotonic(), FIRST_WAIT, 0
        while True:
            tries += 1
            try:
                return call()
            except Exception as raised:
                error = _origin(raised)
                reason = _reason(error)
                if reason is None:
                    raise
                passing = _may_pass(error)
                spent = time.monotonic() - began
                if not passing or spent + wait > self.config.retry_seconds:
                    often = f" ({tries} tries in {spent:.0f} s)" if tries > 1 else ""
                    raise DataError(
                        f"{self.where(name)!r} cannot be read: {reason}{often}; "
                        "check the address, the permissions and the network, or copy the shards again"
                    ) from raised
                self._forget(name)
                time.sleep(wait * random.uniform(0.5, 1.0))  # ranks that fail together come back apart
                wait = min(2 * wait, LONGEST_WAIT)

    def _forget(self, name: str) -> None:
        """Open the file anew at the next try: the handle of a network file system can be stale."""
        if name in self._files:
            os.close(self._files.pop(name))


def _is_whole(path: Path, size: int, sha256: str | None) -> bool:
    """Whether a file has its size and, if given, its sha256."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    if sha256 is None:
        return True
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == sha256


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


def _file_system(scheme: str, timeout: float) -> Any:
    import fsspec  # with aiohttp, s3fs or gcsfs: only remote shards need them

    try:
        if scheme in ("http", "https"):
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)
            return fsspec.filesystem("http", client_kwargs={"timeout": limits})
        if scheme == "s3":
            config = {"connect_timeout": timeout, "read_timeout": timeout, "retries": {"max_attempts": 1}}
            return fsspec.filesystem("s3", config_kwargs=config, use_listings_cache=False)
        return fsspec.filesystem("gs", requests_timeout=timeout, use_listings_cache=False)
    except ImportError as error:
        raise ConfigError(
            f"reading {scheme}:// needs the package {_NEEDED[scheme]}: pip install 'segformer[remote]'"
        ) from error


def _origin(error: Exception) -> Exception:
    """What made fsspec say over http that a file is not found: a 404, or any other failure of its request."""
    cause = error.__cause__
    request = isinstance(cause, TimeoutError | ConnectionError) or _library(cause) == "aiohttp"
    return (
        cause if isinstance(error, FileNotFoundError) and isinstance(cause, Exception) and request else error
    )


def _library(error: BaseException | None) -> str:
    """The package that an exception's type comes from."""
    return type(error).__module__.split(".")[0]


def _reason(error: Exception) -> str | None:
    """What went wrong in a read, for the message; None for what is not a failure of reading."""
    if isinstance(error, DataError | ConfigError):
        return None
    clients = ("aiohttp", "botocore", "gcsfs", "google", "requests")
    if isinstance(error, OSError | asyncio.TimeoutError) or _library(error) in clients:
        status = getattr(error, "status", None)
        text = getattr(error, "strerror", None) or (f"HTTP {status}" if status else str(error))
        return f"{type(error).__name__} {text}".strip()
    return None


def _may_pass(error: Exception) -> bool:
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 425, 429)
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if type(error).__name__ in ("NoCredentialsError", "RefreshError"):
        return False
    number = getattr(error, "errno", None)
    plain = type(error) is OSError and number is not None
    return number in _PASSING if plain else True


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file of a cache: whole or not at all, readable by its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
