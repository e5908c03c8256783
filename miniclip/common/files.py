"""What every command needs: files that are written whole or not at all, and errors that a person can read."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that appears under its name only once it is complete and on the disk.

    It is written under a temporary name in its own folder (a rename is atomic only within one file system), flushed
    to disk and renamed. If the body raises, nothing is left and what was there before stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, has to survive a power cut
    finally:
        os.close(folder)


def write_text(path: str | Path, text: str) -> None:
    """As UTF-8; of names of files the bytes that are none as \\udc.., which JSON reads back."""
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


@contextmanager
def user_errors(*others: type[Exception]) -> Iterator[None]:
    """Turns what users can cause (a ValueError, an OSError, and `others`) into its message and exit status 2.

    With MINICLIP_TRACEBACK=1 in the environment the traceback is shown.
    """
    shown: tuple[type[Exception], ...] = (ValueError, OSError, *others)
    try:
        yield
    except shown as error:
        if os.environ.get("MINICLIP_TRACEBACK"):
            raise
        print(f"error: {error}\n(MINICLIP_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        print("Stopped.", file=sys.stderr)
        raise SystemExit(130) from error


ASSETS = Path(__file__).parent.parent / "assets"


def as_plain(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)
