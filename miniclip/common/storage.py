"""Files at paths and URLs, and names with braces.

Each request is tried several times and each length is checked, because networks fail. No URL runs a program: schemes
are a closed list.
"""

from __future__ import annotations

import base64
import functools
import http.client
import io
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

SCHEMES = ("file", "http", "https", "s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "oss")
PIECE_BYTES = 16 * 2**20  # of one request; a connection that breaks after so many counts as progress
_BLOCK_BYTES = 2**20
_WAITS_S = (0.25, 0.5, 1.0, 2.0, 4.0)  # between the six tries of a request
_TIMEOUT_S = 30  # of a connection, and between two answers
_WINDOW_S, _LEAST_IN_WINDOW = 60, 60_000  # a server that sends less while it is waited for so long is given up
_MOST_NAMES = 1_000_000
_MOST_BYTES = 2**30  # of a file that is read into memory
_ASKED_AT_ONCE = 16
# What stores other than http call a file's checksum, its generation or its time.
_VERSIONS = {"etag", "generation", "blob_id", "lastmodified", "last_modified", "mtime", "updated"}

# `scheme://`, fsspec's chains (`scheme::`), and the forms that other libraries hand to a shell (`pipe:`, `file+pipe:`).
_URL = re.compile(r"([a-z][\w.+-]*)(?:://|::)|((?:[\w.-]+\+)*(?:pipe|shell|exec|cmd|popen)(?:\+[\w.-]+)*):", re.I)
# A URL within a sentence, a command line or YAML: its scheme, its place and its query.
_URL_IN_TEXT = re.compile(r"""\b([a-z][a-z0-9+.-]{1,15}://)([^\s"<>\\?]*)(\?[^\s"<>\\]*)?""", re.I)
_VALUE = re.compile(r"""([?&](?:amp;)?)([\w.~%+\[\]-]{1,80})=([^\s&"<>\\]*)""")  # behind a blank within a URL
_PASSWORD = re.compile(r"^[^/:\[]*:(?!\d*(?:[/#]|$))[^@]*@")  # of whoever writes / and # into it, and of stores
_PUNCTUATION = "'),.;:]}"  # of the sentence
# Values that give no access: numbers, sizes and names of files. They may be all that tells two pictures apart.
_PLAIN_VALUE = re.compile(r"\d{1,12}|[\w ./%-]{1,100}\.(?:jpe?g|png|webp|gif|bmp|tiff?|tar|txt|json|csv|parquet)", re.I)
_NAMES_OF_SECRETS = re.compile(r"auth|code|credential|key|pass|pin|pwd|secret|sig|token", re.I)
# A generator of its own: retries must not advance the seeded ones, and forked workers must not wait in step.
_jitter = random.SystemRandom()
# Network errors have no common base class. These are the caller's mistakes, or permanent.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError, LookupError,
          AttributeError, ImportError, NotImplementedError)  # fmt: skip
T = TypeVar("T")


class NotKeptError(ValueError):
    """What was read of a file can't be written to this machine's disk, which is full or can only be read; the file may
    be sound."""


class UnreadableError(ValueError):
    """A file can't be read, whatever it holds: it is not there, or its store or the network fails."""


# ---------------------------------------------------------------------------------------------------------------------
# Names


def is_url(location: str) -> bool:
    """Whether this is meant as a URL, allowed or not (`pipe:…` and `a::b` count), rather than as a path."""
    return _URL.match(location) is not None


def lower_scheme(url: str) -> str:
    """The URL for libraries that know schemes in lower case alone."""
    scheme, mark, rest = url.partition("://")
    return scheme.lower() + mark + rest


def without_secrets(text: str) -> str:
    """A URL, or a text that may hold some, as it may be shown, kept and published: without user and password, and with
    `…` for each value of a query, as `?token=…` has, but for numbers and names of files (`?id=7&file=a.png`).

    >>> without_secrets("https://me:secret@host/a.tar?sv=2024&sig=abc%3D")
    'https://host/a.tar?sv=2024&sig=…'
    """
    begin = text.find("://")
    if begin < 0:
        return text
    text, begin = _URL_IN_TEXT.sub(_shown_url, text), max(0, begin - 16)
    return text[:begin] + _VALUE.sub(lambda found: found[1] + _shown_value(found[2], "=", found[3]), text[begin:])


def without_secrets_in(value: Any) -> Any:
    """A value as JSON has them, each of its texts as `without_secrets` has it."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {without_secrets_in(name): without_secrets_in(each) for name, each in value.items()}
    return [without_secrets_in(each) for each in value] if isinstance(value, list) else value


def _shown_url(found: re.Match[str]) -> str:
    scheme, place, query = found[1], found[2], found[3] or ""
    host = re.split("[/#]", place, maxsplit=1)[0]
    has_user = _is_http(scheme) and "@" in host
    place = place[host.rindex("@") + 1 :] if has_user else _PASSWORD.sub("", place)
    values = (_shown_value(*each.partition("=")) for each in query[1:].split("&"))
    return scheme + place + query[:1] + ("&".join(values) if query else "")


def _shown_value(name: str, equals: str, value: str) -> str:
    value = value if equals else name
    kept = value.rstrip(_PUNCTUATION)
    is_plain = equals and _PLAIN_VALUE.fullmatch(kept) and not _NAMES_OF_SECRETS.search(name)
    shown = kept if is_plain or not value else "…"
    return (name + equals if equals else "") + shown + value[len(kept) :]


def check_scheme(location: str) -> None:
    """Raises:
    ValueError: a URL of a scheme that is not in SCHEMES, such as those that would run a program, or a chain `a::b`.
    """
    found = _URL.match(location)
    if found and "::" in re.sub(r"//\[[0-9a-fA-F:.]+\]", "//host", location):  # an IPv6 address is no chain
        raise ValueError(
            f"{without_secrets(location)!r} chains several schemes with '::', which is refused; give the file's own URL"
        )
    scheme = found and (found[1] or found[2])
    if scheme and scheme.lower() not in SCHEMES:
        raise ValueError(
            f"{without_secrets(location)!r} has the scheme {scheme!r}; allowed are {', '.join(SCHEMES)} (no program is "
            "run)"
        )


def split_query(location: str) -> tuple[str, str]:
    """A location, and the query of an http URL with its `?`, which gives access and is no part of names and patterns.

    >>> split_query("https://host/a/0.tar?sig=b/c")
    ('https://host/a/0.tar', '?sig=b/c')
    """
    path, mark, query = location.partition("?") if _is_http(location) else (location, "", "")
    return path, mark + query


def name_of(location: str) -> str:
    """The last part of a path, or of a URL without its query."""
    return split_query(location)[0].rpartition("/")[2]


def parent_of(location: str) -> str:
    """What a file lies in, as `join` takes it."""
    path, query = split_query(location)
    folder, slash, _ = path.rpartition("/")
    return (folder or slash or ".") + query


def expand(location: str) -> list[str]:
    """The names that a shell expands braces to, in its order: `{000..012}` (zeros kept), `{train,val}`, nested ones.
    The query of a URL stays as it is, at each of them.

    Raises:
        ValueError: an unmatched brace, braces that hold neither a range nor a list, or too many names.
    """
    location, query = split_query(location)
    if query:
        return [name + query for name in expand(location)]
    head, brace, _ = location.partition("{")
    place, depth, cuts = len(head), 0, [len(head)]
    while brace and place < len(location):
        depth += {"{": 1, "}": -1}.get(location[place], 0)
        if not depth:
            break
        if location[place] == "," and depth == 1:
            cuts.append(place)
        place += 1
    if depth or "}" in head:
        raise ValueError(f"{without_secrets(location)!r} has an unmatched brace")
    if not brace:
        return [location]
    parts = [location[start + 1 : end] for start, end in pairwise([*cuts, place])]
    names = [name for part in parts for name in expand(part)] if len(parts) > 1 else _range(parts[0], location)
    tails = expand(location[place + 1 :])
    if len(names) * len(tails) > _MOST_NAMES:
        raise ValueError(f"{without_secrets(location)!r} stands for more than {_MOST_NAMES:,} names")
    return [head + name + tail for name in names for tail in tails]


def _range(text: str, location: str) -> list[str]:
    found = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", text)
    if not found:
        raise ValueError(
            f"{{{text}}} in {without_secrets(location)!r} is neither a range such as {{000..012}} nor a list such as "
            "{a,b}"
        )
    first, last = int(found[1]), int(found[2])
    is_padded = any(len(end) > 1 and end.startswith("0") for end in found.groups())
    width = max(len(found[1]), len(found[2])) if is_padded else 0
    step = 1 if last >= first else -1
    if abs(last - first) >= _MOST_NAMES:
        raise ValueError(f"{{{text}}} in {without_secrets(location)!r} stands for more than {_MOST_NAMES:,} names")
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


def join(folder: str, name: str) -> str:
    """The location of a file in a local or remote folder; an http folder's `?token=…` stays at the end.

    Raises:
        ValueError: the name leads out of the folder (names may come from a file that someone else wrote).
    """
    if name.startswith("/") or ".." in name.split("/") or is_url(name):
        raise ValueError(f"{name!r} can't be a file in {without_secrets(folder)}: it leads out of it")
    if not is_url(folder):
        return str(Path(folder) / name)
    base, query = split_query(folder)
    return f"{base.rstrip('/')}/{name}{query}"


def _is_http(location: str) -> bool:
    return re.match("https?://", location, re.I) is not None


def local_path(location: str) -> Path | None:
    """None for a remote location, after its scheme was checked."""
    check_scheme(location)
    if not is_url(location):
        return Path(location)
    scheme, _, path = location.partition("://")
    return Path(unquote(path)) if scheme.lower() == "file" else None


# ---------------------------------------------------------------------------------------------------------------------
# Requests


def exists(location: str) -> bool:
    """Whether there is a file (or a folder, where the store has them).

    Raises:
        ValueError: the scheme is refused, or the store does not answer that question.
    """
    path = local_path(location)
    if path:
        return path.exists()
    try:
        size_of(location)
    except ValueError as error:
        if _is_absent(error.__cause__):
            return False
        raise
    return True


class Stamp(NamedTuple):
    """What changes when a file is replaced.

    Args:
        size: its bytes; None if its store does not say.
        version: its ETag and time, as its store writes them; empty if it has neither.
    """

    size: int | None = None
    version: str = ""


def stamp_of(location: str) -> Stamp:
    """One request to its store, which sends none of the file.

    Raises:
        ValueError: it is not there, or its store can't be asked.
    """
    if path := local_path(location):
        facts = patiently(location, path.stat)
        return Stamp(facts.st_size, str(facts.st_mtime_ns))
    return patiently(location, lambda: (_web_stamp if _is_http(location) else _store_stamp)(location))


def stamps_of(locations: Sequence[str], needs_all: bool = True) -> list[Stamp | None]:
    """Those of many files, asked for at the same time; None for one that is not there.

    Args:
        needs_all: else None stands for those whose store can't be asked, too.

    Raises:
        ValueError: a store can't be asked, and `needs_all`; the others are not asked then.
    """

    def ask(location: str) -> Stamp | None:
        try:
            return stamp_of(location)
        except ValueError as error:
            if needs_all and not _is_absent(error.__cause__):
                raise
            return None

    pool = ThreadPoolExecutor(_ASKED_AT_ONCE)
    try:
        return list(pool.map(ask, locations))
    finally:
        pool.shutdown(cancel_futures=True)


def _store_stamp(url: str) -> Stamp:
    facts = filesystem(url).info(lower_scheme(url))
    found = [str(facts[name]) for name in sorted(facts) if name.lower() in _VERSIONS and facts[name]]
    return Stamp(facts.get("size"), " ".join(found))


def size_of(url: str) -> int | None:
    """The bytes of a file; None if the store does not say.

    Raises:
        ValueError: it can't be read.
    """
    return stamp_of(url).size


def read_bytes(source: str | Path | bytes) -> bytes:
    """All of a small file at a path or a URL, never cached; bytes are returned as they are.

    Raises:
        ValueError: the scheme of a URL is refused, or the file can't be read.
        OSError: the file of a `Path` can't be read.
    """
    if isinstance(source, bytes):
        return source
    if isinstance(source, Path):
        return source.read_bytes()
    path = local_path(source)
    return patiently(source, path.read_bytes) if path else patiently(source, lambda: _read_whole(source))


def _read_whole(url: str) -> bytes:
    data = bytearray()
    for *_, block in read_blocks(url):
        data += block
        if len(data) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES:,} bytes, too many to hold in memory")
    return bytes(data)


def read_blocks(url: str, start: int = 0, size: int | None = None) -> Iterator[tuple[int, Stamp, bytes]]:
    """A remote file from byte `start` on: (position of the block, what the store says of the file, block).

    The first position is 0 if the server knows no ranges. Errors are the store's own: `patiently` is for the caller.

    Args:
        size: the bytes it should have. One more is asked for, which shows a file that is longer.
    """
    if _is_http(url):
        yield from _web_blocks(url, start, None if size is None else size + 1)
        return
    if size is None:
        facts = filesystem(url).info(lower_scheme(url))
        if facts.get("type") == "directory":  # of 0 bytes
            raise IsADirectoryError("it is a folder, which is not listed; name the files in it, or tars by their range")
        size = int(facts["size"])
    while start < size:
        end = size + 1 if start + PIECE_BYTES >= size else start + PIECE_BYTES
        data: bytes = filesystem(url).cat_file(lower_scheme(url), start=start, end=end)
        if len(data) < min(end, size) - start:
            raise ConnectionError(
                f"{len(data)} bytes came from byte {start} on, {min(end, size) - start} were expected"
            )
        yield start, Stamp(size), data
        start += len(data)


def read_range(source: str, start: int, end: int, size: int) -> bytes | None:
    """The bytes `start` to `end` of a file of `size` bytes; None if its server sends whole files alone.

    Raises:
        ValueError: the file can't be read, or has another size now.
    """
    path = local_path(source)
    if path:
        return patiently(source, lambda: _whole_range(_local_range(path, start, end), start, end))
    return patiently(source, lambda: (_web_range if _is_http(source) else _store_range)(source, start, end, size))


def _local_range(path: Path, start: int, end: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(end - start)


def _web_range(url: str, start: int, end: int, size: int) -> bytes | None:
    with _web_open(url, f"bytes={start}-{end - 1}") as answer:
        if answer.status != 206:
            return None
        total, first, data = _total(answer), _first_byte(answer, start), answer.read(end - start)
    if total is not None and total != size:
        raise ValueError(f"it had {size:,} bytes and has {total:,} now")
    if first != start:
        raise ConnectionError(f"the bytes from {first} on came, those from {start} on were asked for")
    return _whole_range(data, start, end)


def _store_range(url: str, start: int, end: int, size: int) -> bytes:
    return _whole_range(filesystem(url).cat_file(lower_scheme(url), start=start, end=end), start, end)


def _whole_range(data: bytes, start: int, end: int) -> bytes:
    if len(data) != end - start:
        raise ConnectionError(f"{len(data)} bytes came from byte {start} on, {end - start} were expected")
    return data


# ---------------------------------------------------------------------------------------------------------------------
# http, by the standard library: it needs no package, and no repair after a fork


class _Paced(io.RawIOBase):
    """What a server sends, headers too. Seconds are counted while it is waited for, and not while its bytes are used.

    Raises, while it is read:
        TimeoutError: fewer than _LEAST_IN_WINDOW came in _WINDOW_S.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._waited_s, self._num_bytes = 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        begin = time.monotonic()
        num_bytes = self._raw.readinto(buffer)
        self._waited_s += time.monotonic() - begin
        self._num_bytes += num_bytes or 0
        if num_bytes and self._waited_s >= _WINDOW_S:
            if self._num_bytes < _LEAST_IN_WINDOW:
                raise TimeoutError(f"only {self._num_bytes:,} bytes came in {self._waited_s:.0f} s")
            self._waited_s, self._num_bytes = 0.0, 0
        return num_bytes

    def close(self) -> None:
        self._raw.close()
        super().close()


class _PacedResponse(http.client.HTTPResponse):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.fp = io.BufferedReader(_Paced(self.fp.detach()))


class _PacedHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def do_open(self, http_class: Any, req: urllib.request.Request, **http_conn_args: Any) -> http.client.HTTPResponse:
        def connection(*args: Any, **options: Any) -> http.client.HTTPConnection:
            made: http.client.HTTPConnection = http_class(*args, **options)
            made.response_class = _PacedResponse
            return made

        return super().do_open(connection, req, **http_conn_args)


class _ShortRedirects(urllib.request.HTTPRedirectHandler):
    """What an answer holds beside the place that it leads to is not read: it may have no end."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        fp.close()
        return super().http_error_302(req, fp, code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@functools.cache
def _web() -> urllib.request.OpenerDirector:
    """Opens http and https alone, after a redirect as well, through the environment's proxies."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        _PacedHandler,
        _ShortRedirects,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _web_open(url: str, bytes_range: str | None = None, method: str = "GET") -> Any:
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    path, query = (quote(part, safe="/%:@!$&'()*+,;=~?-._") for part in (parts.path, parts.query))
    request = urllib.request.Request(urlunsplit((parts.scheme, host, path or "/", query, "")), method=method)
    if bytes_range:
        request.add_header("Range", bytes_range)
    if user:  # never sent on to where a redirect leads
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return _web().open(request, timeout=_TIMEOUT_S)


def _web_stamp(url: str) -> Stamp:
    try:
        with _web_open(url, method="HEAD") as answer:
            return _stamp_in(answer)
    except urllib.error.HTTPError as error:
        if error.code not in (403, 405, 501):  # signed URLs and small servers know GET alone
            raise
    try:
        with _web_open(url, "bytes=0-0") as answer:
            return _stamp_in(answer)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # it has no first byte
            return Stamp(0)
        raise


def _stamp_in(answer: Any) -> Stamp:
    found = [answer.headers[name] for name in ("ETag", "Last-Modified")]
    return Stamp(_total(answer), " ".join(filter(None, found)))


def _web_blocks(url: str, start: int, end: int | None) -> Iterator[tuple[int, Stamp, bytes]]:
    try:
        answer = _web_open(url, f"bytes={start}-" if start else None)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # nothing is missing
            return
        raise
    with answer:
        stamp = _stamp_in(answer)
        position = _first_byte(answer, start)
        if position > start:
            raise ConnectionError(f"the bytes from {position} on came, those from {start} on were asked for")
        block = b""
        while True:
            yield position, stamp, block
            position += len(block)
            most = _BLOCK_BYTES if end is None else min(_BLOCK_BYTES, end - position)
            if most <= 0 or not (block := answer.read1(most)):  # what has come
                break
    total = stamp.size
    if total is not None and position < (total if end is None else min(total, end)):
        raise ConnectionError(f"the connection ended after {position} of {total} bytes")


def _first_byte(answer: Any, asked: int) -> int:
    """Which byte of the file an answer begins with; the one that was asked for where the server does not say."""
    found = re.match(r"bytes (\d{1,18})-", answer.headers["Content-Range"] or "")
    return 0 if answer.status != 206 else int(found[1]) if found else asked


def _total(answer: Any) -> int | None:
    """The bytes of the file that an answer is all or part of."""
    of_all = (answer.headers["Content-Range"] or "").rpartition("/")[2]
    text = of_all if answer.status == 206 else answer.headers["Content-Length"]
    return int(text) if text and text.isdecimal() else None


# ---------------------------------------------------------------------------------------------------------------------
# Other stores


def filesystem(url: str) -> Any:
    return _filesystem_of(urlsplit(url).scheme, os.getpid())


@functools.cache
def _filesystem_of(scheme: str, pid: int) -> Any:
    """fsspec's file system, one for each process, and kept for good.

    A forked child must not use its parent's, whose event loop runs in a thread that the child doesn't have; nor may it
    drop it (as fsspec does in the child with those that it shares): that closes the connections, which takes them out
    of the epoll set that the parent still waits on.
    """
    try:
        import fsspec

        _mend_fork()
        # A file system of this process alone. A listing kept in memory would hide what has been written since.
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if scheme in ("s3", "s3a"):
            # botocore tries five times and s3fs five times that, a minute each: with the tries made here, hours. Both
            # are set to one.
            options["config_kwargs"] = {
                "connect_timeout": _TIMEOUT_S,
                "read_timeout": _TIMEOUT_S,
                "retries": {"total_max_attempts": 1},
            }
        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise ValueError(
            f"{scheme}:// needs a package that is missing ({error}); pip install 'miniclip[remote]' brings those "
            "of s3 and hf"
        ) from error
    if scheme in ("s3", "s3a"):
        filesystem.retries = 1  # s3fs's own
    return filesystem


@functools.cache
def _mend_fork() -> None:
    """fsspec 2026.9 gives a forked child a new loop, and leaves its lock as it was at the fork: perhaps held."""
    from fsspec.asyn import reset_lock

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=reset_lock)


# ---------------------------------------------------------------------------------------------------------------------
# Patience


def patiently(url: str, action: Callable[[], T]) -> T:
    """The action's value. A failure that may pass is tried again, six times in all, with longer and longer waits.

    Raises:
        UnreadableError: it failed for good; names the URL, the number of tries and the last error.
        NotKeptError: as the action does.
    """
    for tries, wait in enumerate((*_WAITS_S, None), start=1):
        try:
            return action()
        except NotKeptError:
            raise
        except Exception as error:
            if wait is None or not _is_worth_a_retry(error):
                reason = f"{type(error).__name__}: {_without_secrets_of(url, str(error))}"
                shown = f"{without_secrets(url)} can't be read ({tries} tr{'y' if tries == 1 else 'ies'})"
                raise UnreadableError(f"{shown}: {reason}") from error
            time.sleep(wait * _jitter.uniform(0.5, 1.0))
    raise AssertionError("the last try returns or raises")


def _without_secrets_of(url: str, reason: str) -> str:
    """A store's own words, which may quote a part of the URL."""
    if is_url(url):
        parts = [part.partition("=") for part in url.partition("?")[2].split("&")]
        cut = [value or name for name, equals, value in parts if "…" in _shown_value(name, equals, value)]
        password = url.partition("://")[2].rpartition("@")[0].partition(":")[2]
        for secret in sorted({password, *cut, *map(unquote, (password, *cut))}, key=len, reverse=True):
            reason = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "…", reason) if secret else reason
    return without_secrets(reason)


def _is_worth_a_retry(error: BaseException) -> bool:
    if isinstance(error, TimeoutError):  # S3's own comes with status 400
        return True
    status = _status(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    reason = getattr(error, "reason", None)  # urllib wraps the socket's errors; a certificate's is a ValueError
    if isinstance(reason, Exception):
        error = reason
    return not isinstance(error, _FINAL) and "Credential" not in type(error).__name__  # botocore's, for one


def _is_absent(error: BaseException | None) -> bool:
    status = _status(error)
    return status in (404, 410) if status else isinstance(error, FileNotFoundError | NotADirectoryError)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error of urllib, botocore, aiohttp or httpx."""
    for each in (error, getattr(error, "__cause__", None)):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(each, "status", None) or getattr(answer, "status_code", None)
        if isinstance(status, int):
            return status
    return None
