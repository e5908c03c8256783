"""A bounded cache of remote files on the local disk. A file has its name there only once it is whole."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from .storage import PIECE_BYTES, filesystem, local_path, patiently, read_range

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
        local = local_path(url)
        if local:
            return patiently(url, lambda: open(local, "rb"))
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
            size = patiently(url, lambda: filesystem(url).info(url)).get("size")
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
            file.write(read_range(url))
        while size is not None and start < size:
            is_last = start + PIECE_BYTES >= size
            # One byte more than there should be shows a file that is longer.
            end = size + 1 if is_last else start + PIECE_BYTES
            data = read_range(url, start, end, least_bytes=min(end, size) - start)
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
