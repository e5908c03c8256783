"""Which requests the page does not answer: too large, too many, of another site, or for what it was not given."""

from __future__ import annotations

import os
import re
import stat
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

UPLOAD_MB = 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Pages of the first may send any header to the second: Gradio answers CORS's preflights so, before `Limits` is asked.
_LOCAL_PAGES, _LOCAL_HOSTS = ("127.0.0.1", "localhost", "0.0.0.0"), ("127.0.0.1", "localhost")
_PORTS = {"http": 80, "https": 443}
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
        if _is_foreign(headers, scope):
            return 403, f"this page answers no page of {headers['origin']!r}"
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


def _is_foreign(headers: Mapping[str, str], scope: Scope) -> bool:
    """Whether a page of another origin asks. Browsers name it with every POST; other programs name none.

    A proxy on this machine may say which host it was asked for, as Gradio makes its addresses of it. That is believed
    only where no foreign page could have sent the header itself. Browsers name the port in Host, unless it is the
    scheme's own; where it lacks, a proxy has left it out, and the hosts are compared without ports.
    """
    if "origin" not in headers:
        return False
    asking = _origin_of(headers["origin"])
    is_https = headers.get("x-forwarded-proto", "").partition(",")[0].strip() == "https"
    scheme = "https" if is_https else scope.get("scheme", "http")
    own = [_origin_of(f"{scheme}://{headers.get('host', '')}")]
    forwarded = headers.get("x-forwarded-host", "").partition(",")[0].strip()
    if forwarded and own[0] and asking and own[0][1] in _LOCAL_HOSTS and asking[1] not in _LOCAL_PAGES:
        own.append(_origin_of(f"{scheme}://{forwarded}"))
    _, port = scope.get("server") or ("", None)
    if asking and not re.search(r":\d+$", headers.get("host", "")) and port not in (None, *_PORTS.values()):
        return asking[1] not in [each[1] for each in own if each]
    return asking is None or asking not in own


def _origin_of(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port (RFC 6454); None for what has none, as "null"."""
    try:
        parts = urlsplit(url)
        port = parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return None
    return (parts.scheme, parts.hostname, port) if parts.hostname and port else None


def own_upload(path: str, folder: str | Path) -> Path:
    """The place of an upload, which may be deleted by now.

    Raises:
        ValueError: it is not below the folder of uploads, itself or by a link.
    """
    try:
        found = Path(path).resolve()
    except (OSError, RuntimeError, ValueError):
        found = None
    if found is None or Path(folder).resolve() not in found.parents:
        raise ValueError("a picture is uploaded, and this is no upload of the page")
    return found


def read_upload(path: Path) -> bytes:
    """
    Raises:
        ValueError: no regular file, or one of more than `UPLOAD_MB`.
        OSError: it can't be read, or is a link.
    """
    careful = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # nor wait for a pipe's writer
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | careful)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("the picture is no file")
        data = file.read(UPLOAD_MB * 1_000_000 + 1)
    if len(data) > UPLOAD_MB * 1_000_000:
        raise ValueError(f"the picture has more than {UPLOAD_MB} MB")
    return data


async def _answer(send: Send, status: int, sentence: str) -> None:
    body = sentence.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
