"""Which requests the page does not answer: too large, too many, or for something that it was not given."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_UPLOAD, _FILE, _PROXY = "/gradio_api/upload", "/gradio_api/file=", "/gradio_api/proxy="


class Limits:
    """A layer around the page's server (ASGI, https://asgi.readthedocs.io).

    Args:
        app: the server.
        upload_bytes: of one upload.
        uploads_per_minute: of one client.
        hosts: names that the page is asked for by; others are another site's tricks (DNS rebinding). Any, if empty.
    """

    def __init__(self, app: Any, upload_bytes: int, uploads_per_minute: int = 60, hosts: tuple[str, ...] = ()) -> None:
        self.app, self.upload_bytes, self.uploads_per_minute, self.hosts = app, upload_bytes, uploads_per_minute, hosts
        self._uploads: dict[str, deque[float]] = defaultdict(deque)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            await _answer(send, *refusal)
            return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        path = unquote(unquote(scope["path"]))
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if self.hosts and host.strip("[]") not in self.hosts:
            return 403, f"this page is not served as {host!r}"
        if path.startswith(_PROXY) or (path.startswith(_FILE) and "://" in path):
            return 403, "this page asks no other host"
        if path.startswith(_UPLOAD) and scope["method"] == "POST":
            size = headers.get("content-length", "")
            if not size.isdecimal():
                return 411, "an upload says how large it is"
            if int(size) > self.upload_bytes:
                return 413, f"an upload has at most {self.upload_bytes // 1_000_000} MB"
            if not self._has_room(scope["client"][0] if scope.get("client") else ""):
                return 429, f"at most {self.uploads_per_minute} uploads a minute"
        return None

    def _has_room(self, client: str) -> bool:
        now, uploads = time.monotonic(), self._uploads[client]
        while uploads and now - uploads[0] > 60:
            uploads.popleft()
        if len(uploads) >= self.uploads_per_minute:
            return False
        uploads.append(now)
        return True


async def _answer(send: Send, status: int, sentence: str) -> None:
    body = sentence.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
