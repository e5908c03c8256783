"""What a name on a command line stands for: a file or folder, a pattern's matches, or what comes by standard input."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from ..common.files import expand_home, standard_input
from ..common.storage import expand
from ..data.reading.cells import decode_text
from ..data.reading.scan import is_skipped_folder
from ..data.shards import split_sample_name

STANDARD_INPUT = "-"
_SIGNS = "*?[{"


def existing(source: str) -> Path | None:
    """The file or folder of this name, a home's `~` too; None if there is none."""
    for path in (Path(source), *([expand_home(source)] if source.startswith("~") else [])):
        try:
            if path.exists():
                return path
        except (OSError, ValueError):  # longer than names can be
            continue
    return None


def matching(source: str) -> list[Path]:
    """The files and folders that a pattern stands for, in order, those of each name in braces after each other.

    Raises:
        ValueError: none, or no pattern either.
    """
    if not any(sign in source for sign in _SIGNS):
        raise ValueError(_absence_of(source))
    found: dict[Path, None] = {}
    for name in expand(str(expand_home(source)) if source.startswith("~") else source):
        path = Path(name)
        start = Path(path.anchor)
        matches = sorted(set(_below(start, path.parts[1:] if path.anchor else path.parts)))
        if not matches and not glob.has_magic(name):
            raise ValueError(_absence_of(name))
        found |= dict.fromkeys(matches)
    if not found:
        raise ValueError(f"nothing matches {source!r}")
    return list(found)


def split_key(key: str) -> tuple[str, str]:
    """The tar or the table that a key begins with, and the rest; "" and the key of anything else.

    >>> split_key("a/0.tar:7"), split_key("b/t.csv: row 3, text 2"), split_key("a/7.jpg")
    (('a/0.tar', ':7'), ('b/t.csv', ': row 3, text 2'), ('', 'a/7.jpg'))
    """
    tar, sample = split_sample_name(key)
    if tar:
        return tar, f":{sample}"
    row = re.search(r": row \d+(, text \d+)?$", key)
    return (key[: row.start()], row[0]) if row else ("", key)


def key_without_folder(key: str) -> str:
    """The key that earlier versions gave a sample or a row, which did not say where its tar or its table lies.

    >>> key_without_folder("a/0.tar:7"), key_without_folder(".: row 3"), key_without_folder("a/7.jpg")
    ('0.tar:7', ': row 3', 'a/7.jpg')
    """
    place, rest = split_key(key)
    return Path(place).name + rest if place else key


def _below(folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
    """What matches below a folder, part by part: what is there by its name is taken, with all signs in it."""
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        for each in folders_below(folder):
            yield from _below(each, rest or ("*",))
    elif os.path.lexists(folder / part):
        yield from _below(folder / part, rest)
    elif glob.has_magic(part) and folder.is_dir():
        for name in glob.glob(part, root_dir=folder):  # noqa: PTH207
            yield from _below(folder / name, rest)


def folders_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """A folder and those in it, however deep; hidden ones, leftovers and links back to a folder above are passed."""
    here = folder.resolve()
    if here in above:
        return
    yield folder
    with suppress(OSError):
        for each in sorted(folder.iterdir()):
            if each.is_dir() and not is_skipped_folder(each.name):
                yield from folders_below(each, (*above, here))


def _absence_of(source: str) -> str:
    """A sentence for a name that is not there, with one that is like it."""
    path = Path(source)
    near: list[str] = []
    if path.parent.is_dir():
        near = difflib.get_close_matches(path.name, [each.name for each in path.parent.iterdir()], n=1)
    return f"no file or folder {source}" + (f"; did you mean {path.parent / near[0]}?" if near else "")


class StandardInput:
    """Standard input, or another stream in its place, which can be read once."""

    def __init__(self, stream: BinaryIO | None) -> None:
        self.stream, self.is_read = stream, False

    def read(self) -> bytes:
        """Raises ValueError if it is read already, is a terminal, or is closed."""
        if self.is_read:
            raise ValueError(f"{STANDARD_INPUT} (standard input) is named twice; it can be read once")
        self.is_read = True
        stream = self.stream or standard_input()
        if stream.isatty():
            raise ValueError("standard input is a terminal; pipe names into it, as `find photos -name '*.jpg' |` does")
        return stream.read()


def lines_of(data: bytes, name: str) -> list[str]:
    """Lines, or what stands before each NUL, as `find -print0` writes names; blank ones are none. Bytes that are no
    UTF-8 are kept as Python keeps those of file names; a byte order mark says what else a text is in.
    """
    is_marked = data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"))
    text = decode_text(data, name) if is_marked else os.fsdecode(data)
    lines = text.split("\0" if "\0" in text else "\n")
    return [line for each in lines if (line := each.rstrip("\r\n")).strip()]
