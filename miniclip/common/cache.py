"""A bounded cache of remote files on the local disk. A file has its name there only once it is whole."""

from __future__ import annotations

import atexit
import functools
import glob
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from .files import cache_folder, locked, remove, sync, write_text
from .storage import PIECE_BYTES, NotKeptError, local_path, patiently, read_blocks, size_of, without_secrets

_REFUSED_S = 60  # a server that gives wrong bytes may be mended, and each try costs two whole files


class Cache:
    """Remote files kept on the local disk, each fetched once per machine, however many processes want it.

    A file that came twice and is not what was expected is refused without a request for a minute, here and in the
    processes with a copy of this cache, as a loader's workers have one. Another `Cache` fetches it again.

    Args:
        folder: where; by default `cache_folder("shards")`.
        limit_bytes: the files least recently opened are deleted so that all together have no more than this. Files
            still on their way come on top.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = 50 * 10**9) -> None:
        self._folder, self.limit_bytes = folder, limit_bytes
        self._name = secrets.token_hex(8)  # of this cache and its copies

    @property
    def folder(self) -> Path:
        return self._folder or cache_folder("shards")  # asked for late: who reads local files needs no home folder

    def open(self, url: str, size: int | None = None, sha256: str | None = None, version: str = "") -> IO[bytes]:
        """The file, open for reading, so that its deletion by another process does no harm. Local files are opened
        where they lie.

        The cached file is taken to be what the URL has, unless `size`, or `sha256` or `version`, differ.

        Args:
            version: that of `stamp_of`, for who knows no checksum.

        Raises:
            ValueError: the scheme is refused, the file can't be had, is not what was expected, or exceeds the bound.
            NotKeptError: it can't be written to the cache.
        """
        local = local_path(url)
        if local:
            return patiently(url, lambda: open(local, "rb"))
        with _keeping(url, self.folder):
            return self._opened(url, size, sha256, version)

    def prefetch(self, url: str, size: int | None = None, sha256: str | None = None, version: str = "") -> int:
        """Fetches a file for who opens it later. It stays where it is if that fails, or another process is at it: who
        opens it will wait for that process, or ask the server anew. Returns the bytes that it takes here."""
        if local_path(url) is None:
            with suppress(ValueError, OSError), self._opened(url, size, sha256, version, is_ahead=True) as file:
                return os.fstat(file.fileno()).st_size
        return 0

    def _opened(
        self, url: str, size: int | None, sha256: str | None, version: str, is_ahead: bool = False
    ) -> IO[bytes]:
        path = self._path(url, sha256 or version)
        if file := self._reopen(path, size):
            return file
        self.folder.mkdir(parents=True, exist_ok=True)
        busy, patience_s = f"another process is fetching {without_secrets(url)}", 0 if is_ahead else -1
        with locked(_beside(path, ".lock"), busy, patience_s):
            if file := self._reopen(path, size):
                return file
            note = _beside(path, f".{size}.{self._name}.refused")
            if _is_recent(note):
                raise ValueError(note.read_text(encoding="utf-8"))
            return self._fetch(url, path, size, sha256, None if is_ahead else note)

    def verified(self, url: str, sha256: str, version: str = "") -> None:
        """Records the checksum of a file that was fetched without one, so that who knows it finds the file."""
        with suppress(FileNotFoundError):
            os.replace(self._path(url, version), self._path(url, sha256))

    def _path(self, url: str, version: str) -> Path:
        # Checksum or version are part of the name: a file that was replaced under the same URL is another file.
        digest = hashlib.sha256(f"{url}\n{version}".encode()).hexdigest()[:32]
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
            os.utime(path)
        return file

    def _fetch(self, url: str, path: Path, size: int | None, sha256: str | None, note: Path | None) -> IO[bytes]:
        """
        Args:
            note: where a finding against the file is kept for others who want it; None keeps none.
        """
        size = size_of(url) if size is None else size
        partial = _beside(path, ".part")
        folder_lock = self.folder / "folder.lock", f"another process makes room in {self.folder}"
        if size is not None:
            with locked(*folder_lock):
                self._make_room(url, path, size)
        if sha256 is None:  # without a checksum, what a broken process left may belong to another file
            partial.unlink(missing_ok=True)

        def refuse_more(num_bytes: int, _: int | None) -> None:  # of a file whose size the store does not say
            if num_bytes > self.limit_bytes:
                self._make_room(url, path, num_bytes)

        fetch = functools.partial(download, url, partial, size, sha256, refuse_more)
        problem = fetch() and fetch()
        for other in self.folder.glob(f"{path.name}.*.refused"):
            if not (problem and _is_recent(other)):
                other.unlink(missing_ok=True)
        if problem:
            problem = (
                f"{without_secrets(url)} has {problem}; it was fetched twice and thrown away, and is asked for again "
                f"after {_REFUSED_S} seconds"
            )
            if note:
                write_text(note, problem)
                os.utime(note, ns=(time.time_ns(),) * 2)  # our own clock; a network disk may have another
            raise ValueError(problem)
        with locked(*folder_lock):
            self._make_room(url, path, partial.stat().st_size)  # others may have come meanwhile
            os.replace(partial, path)
            return open(path, "rb")

    def _make_room(self, url: str, path: Path, size: int) -> None:
        """Deletes what was not used for longest; the folder's lock has to be held."""
        partial = _beside(path, ".part")
        if size > self.limit_bytes:
            partial.unlink(missing_ok=True)
            raise ValueError(
                f"{without_secrets(url)} has {size:,} bytes; the cache holds at most limit_bytes={self.limit_bytes:,}"
            )
        # By a pattern of its own, as the folder may hold other people's files.
        names = "*-" + "[0-9a-f]" * 32 + ".cached*"
        others = (other for other in self.folder.glob(names) if other not in (path, partial))
        make_room((other for other in others if ".lock" not in other.name), self.limit_bytes - size, _delete)


def _delete(path: Path) -> None:
    if path.suffix != ".part":
        path.unlink()
        return
    with locked(_beside(path.with_suffix(""), ".lock"), "another process is fetching it", patience_s=0):
        path.unlink(missing_ok=True)  # its process is gone


def _is_recent(note: Path) -> bool:
    """Whether what a note says of a file still holds; one from a later time is of a clock that was set back."""
    try:
        return 0 <= time.time_ns() - note.stat().st_mtime_ns < _REFUSED_S * 10**9
    except FileNotFoundError:
        return False


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def make_room(paths: Iterable[Path], limit_bytes: int, delete: Callable[[Path], None] = remove) -> None:
    """Deletes files and folders, those not used for longest first, until the rest has at most `limit_bytes`.

    What `delete` refuses with a ValueError or an OSError stays.
    """
    held: list[tuple[int, int, Path]] = []
    for path in paths:
        with suppress(OSError):  # another process was faster
            files = list(path.iterdir()) if path.is_dir() else [path]
            held.append((path.stat().st_mtime_ns, sum(file.stat().st_size for file in files), path))
    total = sum(size for _, size, _ in held)
    for _, size, path in sorted(held):
        if total <= limit_bytes:
            break
        with suppress(ValueError, OSError):
            delete(path)
            total -= size


# ---------------------------------------------------------------------------------------------------------------------
# Folders that are used for as long as a process lives

_used: dict[Path, ExitStack] = {}


def use(folder: Path) -> None:
    """Keeps `remove_unused` from a folder, which may come later, until this process ends, however it does."""
    if folder not in _used:
        held = _used[folder] = ExitStack()
        mark = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.used")
        held.enter_context(locked(mark, f"{mark} is held"))
        atexit.register(_leave, held, os.getpid())


def _leave(held: ExitStack, pid: int) -> None:
    if os.getpid() == pid:  # a forked child shares its parent's lock
        held.close()


def remove_unused(folder: Path, used_as: Path) -> None:
    """Deletes a folder, which is gone at once: half of it can't be taken for the whole.

    Args:
        used_as: what processes that need it have called `use` with.

    Raises:
        ValueError: one of them lives.
    """
    for mark in used_as.parent.glob(f"{glob.escape(used_as.name)}.*.used*"):
        with locked(mark.with_name(mark.name.removesuffix(".held")), f"another process uses {folder}", patience_s=0):
            pass  # its process was killed
    gone = folder.with_name(f".{folder.name}.old")
    remove(gone)
    os.rename(folder, gone)
    remove(gone)


# ---------------------------------------------------------------------------------------------------------------------
# One file


@contextmanager
def _keeping(url: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotKeptError(f"{without_secrets(url)} can't be kept in {folder}: {error}") from error


def download(
    url: str,
    partial: Path,
    size: int | None = None,
    sha256: str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> str | None:
    """Appends to a file what it lacks of a remote one. A connection that breaks goes on where it broke, and begins anew
    where the file was replaced meanwhile; with a checksum, that alone tells.

    Args:
        progress: called with the bytes that are there, and those of the whole file where the store says so.

    Returns:
        What is wrong with the result, which is then deleted: its size, or its checksum. None if it is sound.

    Raises:
        ValueError: it can't be had. What has come is kept.
        NotKeptError: it can't be written here.
    """
    version: str | None = None  # of the file that the bytes are of

    def go_on() -> bool:
        """Whether the file is complete now; False if the connection broke, but had brought a good piece."""
        nonlocal version
        begin = file.tell()
        try:
            for position, stamp, block in read_blocks(url, begin, size):
                if position and sha256 is None and version not in (None, stamp.version):
                    file.seek(file.truncate(0))
                    raise ConnectionError("it was replaced while it was read")
                with _keeping(url, partial.parent):
                    if position != file.tell():
                        file.truncate(position)  # the server knows no ranges
                    file.write(block)
                    file.flush()  # for who goes on after us; a process forked now must not inherit what isn't written
                version = stamp.version
                if progress:
                    progress(file.tell(), stamp.size)
        except ValueError:
            raise
        except Exception:
            if file.tell() - begin < PIECE_BYTES:
                raise
            return False
        return True

    with _keeping(url, partial.parent), open(partial, "ab") as file:
        while not patiently(url, go_on):
            pass
        sync(file)
    problem = None
    found_bytes = partial.stat().st_size
    if size is not None and found_bytes != size:
        problem = f"{'at least ' if found_bytes > size else ''}{found_bytes:,} bytes, {size:,} are expected"
    elif sha256 is not None:
        with open(partial, "rb") as whole:
            found = hashlib.file_digest(whole, "sha256").hexdigest()
        problem = None if found == sha256.lower() else f"the checksum {found}, {sha256} is expected"
    if problem:
        partial.unlink()
    return problem
