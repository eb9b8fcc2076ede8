"""What every request passes first: the bounds of the server, and the headers of its answers.

    403  the page of another site asks (Origin)             421  the Host is not ours: DNS rebinding
    413  more than `bytes`, by its header or as it is read   503  `queue` uploads are being worked on
    504  read, answered and sent takes more than `timeout` seconds

An answer is sent in parts, so that a client that doesn't read holds one of them, and its place in the queue.
"""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
PART = 2**16  # bytes of an answer that are sent at a time
SECURITY = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


class Door:
    """An ASGI application within bounds; counts what passes."""

    def __init__(
        self, app: App, *, most: int, queue: int, timeout: float, hosts: set[str] | None, policy: str
    ) -> None:
        """hosts: names that the server answers to, None for all. policy: the Content-Security-Policy."""
        self._app, self._most, self._timeout, self._hosts = app, most, timeout, hosts
        self._headers = [
            (key.encode(), value.encode())
            for key, value in (SECURITY | {"content-security-policy": policy}).items()
        ]
        self.queue, self.inside, self.served, self.refused = queue, 0, 0, 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        from starlette.responses import JSONResponse

        post, started = scope["method"] == "POST", False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                self.served += post and message["status"] < 400
                self.refused += message["status"] >= 400
                message["headers"] = [*message["headers"], *self._headers]
            body = message.get("body", b"")
            last = max(0, len(body) - 1) // PART * PART
            for start in range(0, last, PART):
                await send({"type": message["type"], "body": body[start : start + PART], "more_body": True})
            await send({**message, "body": body[last:]} if last else message)

        async def refuse(status: int, text: str) -> None:
            headers = {"Retry-After": "1"} if status == 503 else {}
            await JSONResponse({"detail": text}, status, headers)(scope, receive, sending)

        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        if refusal := self._refusal(headers, post):
            return await refuse(*refusal)
        self.inside += post
        try:
            async with asyncio.timeout(self._timeout):
                await self._app(scope, self._bounded(receive), sending)
        except TimeoutError:
            if not started:
                await refuse(504, f"not answered within timeout={self._timeout:g} seconds; try again later")
        finally:
            self.inside -= post
        return None

    def _refusal(self, headers: dict[str, str], post: bool) -> tuple[int, str] | None:
        host, origin, length = (headers.get(key, "") for key in ("host", "origin", "content-length"))
        if self._hosts is not None and urlsplit(f"//{host}").hostname not in self._hosts:
            return 421, f"the server is not called so; use one of {', '.join(sorted(self._hosts))}"
        if origin and urlsplit(origin).netloc != host:
            return 403, "the page of another site may not ask"
        if length.isdecimal() and int(length[:20]) > self._most:
            return 413, self._too_large()
        if post and self.inside >= self.queue:
            return 503, f"queue={self.queue} uploads are being worked on; try again in a second"
        return None

    def _too_large(self) -> str:
        return f"the limit for one upload is {self._most} bytes; make it smaller"

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` that counts the bytes of the body."""
        from starlette.exceptions import HTTPException

        count = 0

        async def receiving() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self._most:
                raise HTTPException(413, self._too_large())
            return message

        return receiving
