"""The file that a table's path means: as it is written, else as it lies on the disk under an equal name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ...common.storage import is_url
from .cells import picture_in
from .scan import IMAGE_SUFFIXES, same_name


def find_file(folder: Path, text: str) -> Path:
    """The file of a path in a table, relative to `folder`.

    Tried in this order: the path itself; without spaces around it; with / for \\; with %20 decoded; with ~ as the
    home; without a leading / or ./; without its first folder, where that is `folder`'s own name. Then each of those
    with names that differ in Unicode's normal form, in upper and lower case, or by a picture's suffix, if one file
    alone fits. If none is there, the first.
    """
    if is_file(folder / text):  # an absolute path stays one
        return folder / text
    spellings = [folder / text, *dict.fromkeys(_spellings(folder, text))]
    for path in spellings:
        if is_file(path):
            return path
    for path in spellings:
        if found := _look_up(path):
            return found
    return Path(text.strip()).expanduser() if text.strip().startswith("~/") else spellings[0]


def image_in(cell: Any, folder: Path) -> Path | str | bytes:
    """The picture of a table's cell: its bytes, its URL, or its file, relative to `folder`.

    Raises:
        ValueError: no picture, or several, or a value of another kind.
    """
    image = picture_in(cell)
    return image if isinstance(image, bytes) or is_url(image) else find_file(folder, image)


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is longer than file systems allow, or has other characters
        return False


def is_windows_path(text: str) -> bool:
    return re.match(r"[A-Za-z]:[\\/]|\\\\", text.strip()) is not None


def _spellings(folder: Path, text: str) -> Iterator[Path]:
    text = text.strip()
    slashed = text.replace("\\", "/")
    for each in (text, slashed, unquote(text), unquote(slashed)):
        yield folder / each
        if each.startswith("~"):
            try:
                yield Path(each).expanduser()
            except RuntimeError:  # no home is known
                continue
        relative = each.lstrip("/")
        while relative.startswith("./"):
            relative = relative[2:]
        yield folder / relative
        first, _, rest = relative.partition("/")
        if rest and first == folder.resolve().name:
            yield folder / rest


def _look_up(path: Path) -> Path | None:
    """The one file whose name is equal to the path's but for normal form, case or suffix."""
    here = Path(path.anchor or ".")
    parts = path.parts[1:] if path.anchor else path.parts
    for number, part in enumerate(parts):
        try:
            if part == ".." or (here / part).exists():
                here /= part
                continue
            is_last = number == len(parts) - 1
            listed = _listing(here, here.stat().st_mtime_ns)
        except (OSError, ValueError):
            return None
        names = listed.get(same_name(part).casefold(), ())
        exact = [name for name in names if same_name(name) == same_name(part)]
        if len(exact or names) != 1 and is_last:
            names = tuple(
                name
                for suffix in IMAGE_SUFFIXES
                for name in listed.get(same_name(part + suffix).casefold(), ())
                if same_name(name).startswith(same_name(part) + ".")
            )
            exact = []
        if len(exact or names) != 1:
            return None
        here /= (exact or names)[0]
    return here if is_file(here) else None


@lru_cache(maxsize=256)
def _listing(folder: Path, changed: int) -> dict[str, tuple[str, ...]]:
    """The names in a folder by their normal form in lower case."""
    del changed  # a folder that has changed is listed anew
    found: dict[str, tuple[str, ...]] = {}
    for name in [path.name for path in folder.iterdir()]:
        key = same_name(name).casefold()
        found[key] = (*found.get(key, ()), name)
    return found
