"""Files wherever they lie: paths and URLs, and names with braces.

Requests are tried several times and every length is checked, because the network is what breaks. Nothing here runs a
program: the schemes are a closed list."""

from __future__ import annotations

import functools
import os
import random
import re
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

SCHEMES = ("file", "http", "https", "s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "oss")
PIECE_BYTES = 16 * 2**20
_WAITS_S = (0.25, 0.5, 1.0, 2.0, 4.0)  # between the tries of one request, of which there is one more
_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 15, 30
_MOST_NAMES = 1_000_000

# `scheme://`, fsspec's chains (`scheme::`), and the forms that other libraries hand to a shell (`pipe:`, `file+pipe:`).
_URL = re.compile(r"([a-z][\w.+-]*)(?:://|::)|((?:[\w.-]+\+)*(?:pipe|shell|exec|cmd|popen)(?:\+[\w.-]+)*):", re.I)
# Waiting times must not move the generators that augmentation draws from, and not be equal in forked workers.
_jitter = random.SystemRandom()
# What libraries of the network raise has no common base; these are mistakes of the caller's, or won't change. (A
# certificate that isn't trusted is a ValueError.)
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError, LookupError,
          AttributeError, ImportError, NotImplementedError)  # fmt: skip
T = TypeVar("T")


# ---------------------------------------------------------------------------------------------------------------------
# Names


def is_url(location: str) -> bool:
    """Whether this is meant as a URL, allowed or not (`pipe:…` and `a::b` count), rather than as a path."""
    return _URL.match(location) is not None


def check_scheme(location: str) -> None:
    """Raises:
    ValueError: a URL of a scheme that is not in SCHEMES, such as those that would run a program, or a chain `a::b`.
    """
    found = _URL.match(location)
    if found and "::" in re.sub(r"//\[[0-9a-fA-F:.]+\]", "//host", location):  # an IPv6 address is no chain
        raise ValueError(f"{location!r} chains several schemes with '::', which is refused; give the file's own URL")
    scheme = found and (found[1] or found[2])
    if scheme and scheme not in SCHEMES:
        raise ValueError(
            f"{location!r} has the scheme {scheme!r}; allowed are {', '.join(SCHEMES)} (no program is run)"
        )


def expand(location: str) -> list[str]:
    """The names that braces stand for, in a shell's order: `{000..012}` (zeros kept), `{train,val}`, also nested.

    Raises:
        ValueError: a brace without its partner, braces that hold neither a range nor a list, or too many names.
    """
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
        raise ValueError(f"{location!r} has a brace without its partner")
    if not brace:
        return [location]
    parts = [location[start + 1 : end] for start, end in pairwise([*cuts, place])]
    names = [name for part in parts for name in expand(part)] if len(parts) > 1 else _range(parts[0], location)
    tails = expand(location[place + 1 :])
    if len(names) * len(tails) > _MOST_NAMES:
        raise ValueError(f"{location!r} stands for more than {_MOST_NAMES:,} names")
    return [head + name + tail for name in names for tail in tails]


def _range(text: str, location: str) -> list[str]:
    found = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", text)
    if not found:
        raise ValueError(
            f"{{{text}}} in {location!r} is neither a range such as {{000..012}} nor a list such as {{a,b}}"
        )
    first, last = int(found[1]), int(found[2])
    is_padded = any(len(end) > 1 and end.startswith("0") for end in found.groups())
    width = max(len(found[1]), len(found[2])) if is_padded else 0
    step = 1 if last >= first else -1
    if abs(last - first) >= _MOST_NAMES:
        raise ValueError(f"{{{text}}} in {location!r} stands for more than {_MOST_NAMES:,} names")
    return [f"{number:0{width}d}" for number in range(first, last + step, step)]


def join(folder: str, name: str) -> str:
    """The location of a file in a local or remote folder; an http folder's `?token=…` stays at the end.

    Raises:
        ValueError: the name leads out of the folder (names may come from a file that someone else wrote).
    """
    if name.startswith("/") or ".." in name.split("/") or is_url(name):
        raise ValueError(f"{name!r} can't be a file in {folder}: it leads out of it")
    if not is_url(folder):
        return str(Path(folder) / name)
    base, mark, query = folder.partition("?") if _is_http(folder) else (folder, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def _is_http(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def local_path(location: str) -> Path | None:
    """None for a remote location, after its scheme was checked."""
    check_scheme(location)
    if not is_url(location):
        return Path(location)
    return Path(unquote(location.removeprefix("file://"))) if location.startswith("file://") else None


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
        patiently(location, lambda: filesystem(location).info(location))
    except ValueError as error:
        if _is_absent(error.__cause__):
            return False
        raise
    return True


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
    return patiently(source, path.read_bytes) if path else read_range(source)


def list_folder(location: str) -> list[str]:
    """The names of the files directly in a folder, sorted. Over http, those that the server's page links to.

    Raises:
        ValueError: the scheme is refused, or the folder can't be listed.
    """
    path = local_path(location)
    if path:
        return patiently(location, lambda: sorted(entry.name for entry in path.iterdir() if entry.is_file()))
    entries = patiently(location, lambda: filesystem(location).ls(location, detail=True))
    files = [entry["name"].rpartition("/") for entry in entries if entry["type"] == "file"]
    if _is_http(location):  # all that a page links to: other folders too, and itself in other orders (`?C=M;O=A`)
        files = [parts for parts in files if parts[0] == location.rstrip("/") and not re.search("[?#]", parts[2])]
    return sorted({name for _, _, name in files if name})


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
        # Ours alone, not the one fsspec shares; and a listing kept in memory would hide what has been written since.
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if scheme in ("http", "https"):
            import aiohttp

            options["client_kwargs"] = {
                "timeout": aiohttp.ClientTimeout(None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_READ_TIMEOUT_S),
                # A server that compresses on the way would make ranges and lengths those of something else.
                "headers": {"Accept-Encoding": "identity"},
                "trust_env": True,  # proxies
            }
        if scheme in ("s3", "s3a"):
            # botocore tries five times, s3fs five times that, and each may wait for a minute: with the tries made here
            # that would be hours. Only those here are left.
            options["config_kwargs"] = {
                "connect_timeout": _CONNECT_TIMEOUT_S,
                "read_timeout": _READ_TIMEOUT_S,
                "retries": {"total_max_attempts": 1},
            }
        filesystem = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise ValueError(
            f"{scheme}:// needs a package that is missing ({error}); pip install 'miniclip[remote]' brings those "
            "of http, s3 and hf"
        ) from error
    if scheme in ("s3", "s3a"):
        filesystem.retries = 1  # s3fs's own
    return filesystem


@functools.cache
def _mend_fork() -> None:
    """fsspec gives a forked child a new loop but (2026.9) forgets its lock, which may have been held at the fork."""
    from fsspec.asyn import reset_lock

    os.register_at_fork(after_in_child=reset_lock)


def read_range(url: str, start: int | None = None, end: int | None = None, least_bytes: int = 0) -> bytes:
    """The bytes that the store gives for a range, which are too many if it knows no ranges or the file is longer."""

    def once() -> bytes:
        data: bytes = filesystem(url).cat_file(url, start=start, end=end)
        if len(data) < least_bytes:
            raise ConnectionError(f"{len(data)} bytes came from byte {start} on, {least_bytes} were expected")
        return data

    return patiently(url, once)


def patiently(url: str, action: Callable[[], T]) -> T:
    """Tries again, after longer and longer waits, whatever may go better the next time; else a ValueError."""
    for tries, wait in enumerate((*_WAITS_S, None), start=1):
        try:
            return action()
        except Exception as error:
            if wait is None or not _is_worth_a_retry(error):
                told = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
                reason = f"{type(told).__name__}: {told}"
                raise ValueError(f"{url} can't be read ({tries} tr{'y' if tries == 1 else 'ies'}): {reason}") from error
            time.sleep(wait * _jitter.uniform(0.5, 1.0))
    raise AssertionError("the last try returns or raises")


def _is_worth_a_retry(error: BaseException) -> bool:
    if isinstance(error, TimeoutError):  # S3's own comes with status 400
        return True
    status = _status(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, FileNotFoundError) and error.__cause__:  # fsspec's http calls every failure that
        error = error.__cause__
    return not isinstance(error, _FINAL) and "Credential" not in type(error).__name__  # botocore's, for one


def _is_absent(error: BaseException | None) -> bool:
    status = _status(error)
    return status in (404, 410) if status else isinstance(error, FileNotFoundError) and error.__cause__ is None


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error of aiohttp, botocore or httpx."""
    for each in (error, getattr(error, "__cause__", None)):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(each, "status", None) or getattr(answer, "status_code", None)
        if isinstance(status, int):
            return status
    return None
