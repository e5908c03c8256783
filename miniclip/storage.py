"""Files wherever they lie: paths and URLs, names with braces, and a bounded cache of remote files on the local disk.

What can break is the network, so every request is tried several times, every length is checked, and a file of the
cache has its name only once it is whole. Nothing here runs a program: the schemes are a closed list.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

SCHEMES = ("file", "http", "https", "s3", "s3a", "gs", "gcs", "hf", "az", "abfs", "oss")
_PIECE_BYTES = 16 * 2**20
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


def _local_path(location: str) -> Path | None:
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
    path = _local_path(location)
    if path:
        return path.exists()
    try:
        _patiently(location, lambda: _filesystem(location).info(location))
    except ValueError as error:
        if _is_absent(error.__cause__):
            return False
        raise
    return True


def read_bytes(location: str) -> bytes:
    """All of a small file, local or remote; never cached.

    Raises:
        ValueError: the scheme is refused, or the file can't be read.
    """
    path = _local_path(location)
    return _patiently(location, path.read_bytes) if path else _read(location)


def list_folder(location: str) -> list[str]:
    """The names of the files directly in a folder, sorted. Over http, those that the server's page links to.

    Raises:
        ValueError: the scheme is refused, or the folder can't be listed.
    """
    path = _local_path(location)
    if path:
        return _patiently(location, lambda: sorted(entry.name for entry in path.iterdir() if entry.is_file()))
    entries = _patiently(location, lambda: _filesystem(location).ls(location, detail=True))
    files = [entry["name"].rpartition("/") for entry in entries if entry["type"] == "file"]
    if _is_http(location):  # all that a page links to: other folders too, and itself in other orders (`?C=M;O=A`)
        files = [parts for parts in files if parts[0] == location.rstrip("/") and not re.search("[?#]", parts[2])]
    return sorted({name for _, _, name in files if name})


def _filesystem(url: str) -> Any:
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


def _read(url: str, start: int | None = None, end: int | None = None, least_bytes: int = 0) -> bytes:
    """The bytes that the store gives for a range, which are too many if it knows no ranges or the file is longer."""

    def once() -> bytes:
        data: bytes = _filesystem(url).cat_file(url, start=start, end=end)
        if len(data) < least_bytes:
            raise ConnectionError(f"{len(data)} bytes came from byte {start} on, {least_bytes} were expected")
        return data

    return _patiently(url, once)


def _patiently(url: str, action: Callable[[], T]) -> T:
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


# ---------------------------------------------------------------------------------------------------------------------
# The cache


class Cache:
    """Remote files kept on the local disk, each fetched once per machine whatever the number of processes.

    Args:
        folder: where; else `shards` below MINICLIP_CACHE, or below `miniclip` in XDG_CACHE_HOME or ~/.cache.
        limit_bytes: the files least recently opened are deleted so that all together have no more than this. Those
            still on their way come on top.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = 50 * 10**9) -> None:
        if folder is None:
            user_cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "miniclip"
            folder = Path(os.environ.get("MINICLIP_CACHE") or user_cache).expanduser() / "shards"
        self.folder, self.limit_bytes = folder, limit_bytes

    def open(self, url: str, size: int | None = None, sha256: str | None = None) -> IO[bytes]:
        """The file, open for reading, so that its deletion by another process does no harm. Local ones as they are.

        What the cache has is taken to be what the URL has, unless `size` or `sha256` say otherwise.

        Raises:
            ValueError: the scheme is refused, the file can't be had, is not what was expected, or exceeds the bound.
        """
        local = _local_path(url)
        if local:
            return _patiently(url, lambda: open(local, "rb"))
        path = self._path(url, sha256)
        try:
            if file := self._reopen(path, size):
                return file
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(_beside(path, ".lock")):  # another process may be faster
                return self._reopen(path, size) or self._fetch(url, path, size, sha256)
        except OSError as error:
            raise ValueError(f"{url} can't be kept in {self.folder}: {error}") from error

    def verified(self, url: str, sha256: str) -> None:
        """Tells the checksum of a file that was fetched without one, so that who knows it finds the file."""
        with suppress(FileNotFoundError):
            os.replace(self._path(url, None), self._path(url, sha256))

    def _path(self, url: str, sha256: str | None) -> Path:
        # The checksum is part of the name: a file that was replaced under the same URL is another file.
        digest = hashlib.sha256(f"{url}\n{sha256 or ''}".encode()).hexdigest()[:32]
        basename = re.sub(r"[^A-Za-z0-9_.-]", "_", urlsplit(url).path.rpartition("/")[2])[-100:]
        return self.folder / f"{basename}-{digest}.cached"

    @staticmethod
    def _reopen(path: Path, size: int | None) -> IO[bytes] | None:
        try:
            file = open(path, "rb")  # noqa: SIM115 (handed over)
        except FileNotFoundError:
            return None
        if size is not None and os.fstat(file.fileno()).st_size != size:
            file.close()
            return None
        with suppress(OSError):  # someone else's, or on a disk that can only be read
            os.utime(file.fileno())
        return file

    def _fetch(self, url: str, path: Path, size: int | None, sha256: str | None) -> IO[bytes]:
        if size is None:
            size = _patiently(url, lambda: _filesystem(url).info(url)).get("size")
        partial, folder_lock = _beside(path, ".part"), self.folder / "folder.lock"
        if size is not None:
            with FileLock(folder_lock):
                self._make_room(url, path, size)
        if sha256 is None:  # only a checksum can tell that what a broken process left belongs to the rest
            partial.unlink(missing_ok=True)
        problem = _download(url, partial, size, sha256) and _download(url, partial, size, sha256)
        if problem:
            raise ValueError(f"{url} has {problem}; it was fetched twice and thrown away")
        with FileLock(folder_lock):
            self._make_room(url, path, partial.stat().st_size)  # others may have come meanwhile
            os.replace(partial, path)
            return open(path, "rb")

    def _make_room(self, url: str, path: Path, size: int) -> None:
        """Deletes what was not used for longest until `size` bytes more fit; the folder's lock has to be held."""
        if size > self.limit_bytes:
            _beside(path, ".part").unlink(missing_ok=True)
            raise ValueError(f"{url} has {size:,} bytes; the cache holds at most limit_bytes={self.limit_bytes:,}")
        others: list[tuple[int, int, Path]] = []
        # By our own pattern, as the folder may hold what isn't ours.
        for other in self.folder.glob("*-" + "[0-9a-f]" * 32 + ".cached*"):
            if other.suffix != ".lock" and other not in (path, _beside(path, ".part")):
                with suppress(FileNotFoundError):  # a partial that was just thrown away
                    facts = other.stat()
                    others.append((facts.st_mtime_ns, facts.st_size, other))
        held = sum(bytes_there for _, bytes_there, _ in others)
        for _, bytes_there, other in sorted(others):
            if held + size <= self.limit_bytes:
                break
            if other.suffix == ".part":
                try:
                    with FileLock(_beside(other.with_suffix(""), ".lock"), blocking=False):
                        other.unlink(missing_ok=True)  # its process is gone
                except Timeout:
                    continue
            else:
                other.unlink()
            held -= bytes_there


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _download(url: str, partial: Path, size: int | None, sha256: str | None) -> str | None:
    """Appends what the file lacks. Returns what is wrong with the result, which is then deleted."""
    with open(partial, "ab") as file:
        start = file.tell()
        if size is None:
            file.truncate(0)
            file.write(_read(url))
        while size is not None and start < size:
            is_last = start + _PIECE_BYTES >= size
            # One byte more than there should be shows a file that is longer.
            end = size + 1 if is_last else start + _PIECE_BYTES
            data = _read(url, start, end, least_bytes=min(end, size) - start)
            if len(data) > end - start:  # the server knows no ranges: this is all of the file
                file.truncate(0)
                file.write(data)
                break
            file.write(data)
            file.flush()  # for one who goes on after us; and a process forked here must not inherit what isn't written
            start += len(data)
        file.flush()
        os.fsync(file.fileno())
    problem = None
    found_bytes = partial.stat().st_size
    if size is not None and found_bytes != size:
        problem = f"{'at least ' if found_bytes > size else ''}{found_bytes:,} bytes, {size:,} are expected"
    elif sha256 is not None:
        with open(partial, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        problem = None if found == sha256.lower() else f"the checksum {found}, {sha256} is expected"
    if problem:
        partial.unlink()
    return problem
