"""Files that appear whole or not at all, locks, the user's folders, and errors that a person can read."""

from __future__ import annotations

import csv
import errno
import io
import math
import os
import re
import secrets
import select
import shutil
import sys
import tempfile
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from .storage import without_secrets
from .wording import cut_short, printable, some

if TYPE_CHECKING:
    import filelock

# What network disks, FUSE and old NFS answer where they have no such call.
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}

_MOST_LETTERS_SHOWN = 2**16  # of an error
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # which reading does not answer

# ---------------------------------------------------------------------------------------------------------------------
# Whole or not at all


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that appears under its name only once it is complete and on the disk.

    It is written under a temporary name in its own folder (a rename is atomic only within one file system), flushed
    to disk and renamed. If the body raises, nothing is left and what was there before stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process's id, which is the same in two containers.
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    try:
        with naming(path, temporary):
            with open(temporary, "xb") as file:
                yield file
                sync(file)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def naming(path: str | Path, stands_in: Path | None = None) -> Iterator[None]:
    """Errors of writing name `path`: those of a full disk, which name nothing, and those of what stands in for it until
    it is complete, and of paths that begin with its."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in _FULL:
            raise OSError(error.errno, error.strerror, str(path)) from error
        found = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | Path) else None
        if stands_in is None or found is None or not str(found).startswith(str(stands_in)):
            raise
        if found in Path(path).parents and found.is_file():  # "File exists" is what making a folder there gives
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8. Bytes of file names that are not UTF-8 become \\udc.., which JSON reads back."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a table in UTF-8, with escapes as `write_text` has them."""
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        csv.writer(text).writerows([header, *rows])
        text.detach()


def csv_line(cells: Iterable[object]) -> str:
    """A line of a table, with its end.

    >>> csv_line(["a,b", 1, None, "c\\rd"])
    '"a,b",1,,"c\\rd"\\n'
    """
    text = io.StringIO(newline="")
    csv.writer(text).writerow(cells)  # until Python 3.13 it quotes a lone \r only where its own lines end with one
    return text.getvalue().removesuffix("\r\n") + "\n"


def sync(file: IO[bytes]) -> None:
    """Flushes a file to the disk; on a file system that knows no fsync, as far as it goes."""
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def sync_folder(folder: Path) -> None:
    """Makes new names survive a power cut, where the system can open a folder and the disk can sync one."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove(path: Path) -> None:
    """Deletes a file, or a folder with all that it holds; absent ones are fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_foreign(folder: Path, ours: Collection[Path], writer: str) -> None:
    """Raises a ValueError if a folder that is to be replaced holds files that its writer did not write; links, too.

    Args:
        ours: the paths of those that it may have written.
        writer: the command, for the error.
    """
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    others = sorted((path.relative_to(folder) for path in found if path not in ours), key=lambda p: (len(p.parts), p))
    if others:
        names = some([str(path) for path in others])
        raise ValueError(
            f"{folder} holds what {writer} did not write, so it is not overwritten: {names}; move that away, or name "
            "another folder"
        )


def swap_in(new: Path, path: Path) -> None:
    """Gives a complete file or folder its name. What had it is kept until then, and comes back if that fails."""
    old = _set_aside(path)
    try:
        if path.exists():
            remove(old)
            os.rename(path, old)
        os.rename(new, path)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
    remove(old)
    sync_folder(path.parent)


def _set_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


# ---------------------------------------------------------------------------------------------------------------------
# Locks


@contextmanager
def locked(path: Path, busy: str, patience_s: float = -1) -> Iterator[None]:
    """Holds a lock file, which is removed afterwards.

    The lock is the system's own where the disk has one, and ends with its process. Where a disk has none, the file's
    existence is the lock, and the file that a process killed on another machine left has to be deleted by hand.

    Args:
        busy: the beginning of the error if another process holds the lock.
        patience_s: how long to wait for it; -1 is for ever, and says so after a minute.

    Raises:
        ValueError: it is held, and `patience_s` is over.
        OSError: nothing can be written there.
    """
    import filelock  # longer than all of a verb's help takes

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:  # a lock would be waited for as if it were held
        error.filename = str(path.parent)
        raise
    try:
        lock = _acquired(filelock.FileLock(path), busy, patience_s)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _UNSUPPORTED:
            raise
        path.unlink(missing_ok=True)  # an empty file that nobody holds
        lock = _acquired(filelock.SoftFileLock(path.with_name(f"{path.name}.held")), busy, patience_s)
    try:
        yield
    finally:
        if isinstance(lock, filelock.UnixFileLock):
            path.unlink(missing_ok=True)  # while it is held; one who waits for it sees that it is gone and begins anew
        lock.release()


@contextmanager
def stand_in(path: Path, busy: str) -> Iterator[Path]:
    """A temporary path beside another, for a file or folder that `swap_in` gives its name once it is complete.

    It is removed at the end, and so are those that killed processes left before. Whoever has it is the only one at work
    on `path`, so what is there is looked at within.

    Args:
        busy: the beginning of the error if another process is at work on it.

    Raises:
        ValueError: another process is.
        OSError: nothing can be written there, or the disk is full; names `path`.
    """
    before, after = f".{path.stem[:200]}.", f".tmp{path.suffix[:20]}"
    temporary = path.with_name(f"{before}{secrets.token_hex(8)}{after}")
    with ExitStack() as stack:
        with naming(path, path.parent):
            stack.enter_context(locked(path.with_name(f".{path.name[:200]}.lock"), busy, patience_s=0))
        if path.exists() or not _set_aside(path).exists():  # else one was killed in `swap_in`, and it is complete
            left = re.compile(rf"{re.escape(before)}[0-9a-f]{{16}}{re.escape(after)}")
            for leftover in [each for each in path.parent.iterdir() if left.fullmatch(each.name)]:
                remove(leftover)
        stack.callback(remove, temporary)
        with naming(path, temporary):
            yield temporary


def _acquired(lock: filelock.BaseFileLock, busy: str, patience_s: float) -> filelock.BaseFileLock:
    import filelock

    notice_s = 60.0
    try:
        if patience_s >= 0:
            lock.acquire(timeout=patience_s, poll_interval=0.05)
            return lock
        with suppress(filelock.Timeout):
            lock.acquire(timeout=notice_s, poll_interval=0.05)
            return lock
        print(f"Waiting: {busy} (it holds {lock.lock_file})", file=sys.stderr, flush=True)
        lock.acquire(poll_interval=0.5)
    except filelock.Timeout as error:
        raise ValueError(f"{busy} (it holds {lock.lock_file})") from error
    return lock


# ---------------------------------------------------------------------------------------------------------------------
# The user's folders


def expand_home(path: str | Path) -> Path:
    """A path whose `~` is the user's home.

    Raises:
        ValueError: there is none, as where HOME is not set and the user has no name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{path} needs a home folder, and there is none (HOME is not set, and the user has no entry in the "
            "system's list); set HOME, or MINICLIP_CACHE for what is kept between runs"
        ) from error


def is_readable(path: Path) -> bool:
    """Whether a path is a file, or a pipe as a shell's <(…) makes them, which can be read once."""
    return path.is_file() or path.is_fifo()


def standard_input() -> BinaryIO:
    """
    Raises:
        ValueError: the process was started with it closed, as <&- does.
    """
    if sys.stdin is None:
        raise ValueError("- is standard input, and that is closed")
    return sys.stdin.buffer


def user_cache() -> Path:
    """The folder in which each program keeps what it can fetch or compute again: XDG_CACHE_HOME, else ~/.cache."""
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")


def cache_folder(name: str) -> Path:
    """Where one kind of thing is kept between runs: below MINICLIP_CACHE, else below `miniclip` in the user's cache."""
    named = os.environ.get("MINICLIP_CACHE")
    return (expand_home(named) if named else user_cache() / "miniclip") / name


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@contextmanager
def user_errors(*others: type[Exception]) -> Iterator[None]:
    """Turns what users can cause (a ValueError, an OSError, a lack of memory, and `others`) into its message and exit
    status 2.

    Where the reader of standard output has gone, as `head` goes, the command ends quietly with status 0. With
    MINICLIP_TRACEBACK=1 in the environment the traceback is shown.
    """
    shown: tuple[type[Exception], ...] = (ValueError, OSError, MemoryError, *others)
    try:
        yield
    except shown as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
            raise SystemExit(0) from None
        if os.environ.get("MINICLIP_TRACEBACK"):
            raise
        message = str(error)
        if isinstance(error, MemoryError):
            message = (
                f"the memory of this machine, or what this process may have of it, is not enough. {message}".strip()
            )
        message = cut_short(message, _MOST_LETTERS_SHOWN)  # a name in a table may have megabytes
        print(f"error: {printable(without_secrets(message))}\n(MINICLIP_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        with suppress(KeyboardInterrupt):  # of somebody who presses twice
            print("Stopped.", file=sys.stderr)
        raise SystemExit(130) from error


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe that nobody reads; False where the system can't say."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):
        return False


ASSETS = Path(__file__).parent.parent / "assets"


def as_plain(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)


_reading = threading.Lock()


def read_at(file: IO[bytes], offset: int, size: int) -> bytes:
    """Bytes of an open file. Forked workers share its position, so it is left alone where the system can do that."""
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    with _reading:  # systems without pread do not fork either
        file.seek(offset)
        return file.read(size)


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that are free, or can be freed, within the limits of this process's container; None where the system says
    nothing of either.

    Args:
        root: of Linux' own files.
    """
    found = list(_left_in_groups(root))
    if available := _numbers_in(root / "proc/meminfo").get("MemAvailable:"):
        found.append(available * 1024)
    return min(found, default=None)


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each memory limit of this process's control groups, of version 1 or 2, leaves. Files' pages count as used
    there, and can be freed."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        controllers, group = line.split(":", 2)[1:]
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        most, used = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        prefix = "total_" if controllers else ""
        path = PurePosixPath(group)
        for each in (path, *path.parents):  # up to the top, which a container's own group may be under another name
            folder = top / str(each).lstrip("/")
            with suppress(OSError, ValueError):  # no group, or no limit: "max"
                limit, taken = (int((folder / f"memory.{name}").read_text()) for name in (most, used))
                facts = _numbers_in(folder / "memory.stat")
                freed = sum(facts.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
                yield max(limit - taken + freed, 0)


def _numbers_in(path: Path) -> dict[str, int]:
    """The number of each line, by the word before it; none of a file that is not there."""
    try:
        cells = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
        return {line[0]: int(line[1]) for line in cells}
    except (OSError, IndexError, ValueError):
        return {}
