"""Rows of a table -> pairs: which columns hold images and captions, and which rows are of one image."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from ...common.storage import is_url
from ...common.wording import columns_in_words, counted
from .cells import CAPTION_COLUMNS, NUMBERED_CAPTION, from_base64, is_binary, picture_in, texts_in_cell, why_no_path
from .pair import Pair, Pairs
from .paths import find_file, is_file, is_windows_path
from .scan import LeftOut, same_name
from .splits import numbers_of
from .tables import find_column, find_image_column

_NUMBERED_IMAGE = re.compile(r"(.*\.\w+)#\d+")  # Flickr's 1000268201.jpg#0
_PROBED = 100


def pairs_of_rows(
    source: Path,
    columns: list[str],
    rows: Sequence[dict[str, Any]],
    *,
    folder: Path,
    within: str = "",
    images: str | Path | None = None,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    left_out: Sequence[LeftOut] = (),
) -> Pairs:
    """Rows of one image are one pair with several captions.

    Args:
        source: the table, for messages and the fingerprint.
        folder: the folder that paths are relative to, unless `images` names another.
        within: that folder's path in the one that the user named, which pairs are called by.
        left_out: what is left out already.

    Raises:
        ValueError: columns that are not there, or none of the first images is.
    """
    folder = folder if images is None else Path(images)
    if not folder.is_dir():
        raise ValueError(f"there is no folder of images {folder}")
    column, others = (image_column, []) if image_column else find_image_column(columns, rows, folder, source)
    column, text_columns = choose_columns(source, columns, column, caption_columns)
    cells, keys_of_rows, names_of_rows = name_images(rows, column, within)
    rows_of: dict[str, list[int]] = {}
    for row, key in enumerate(keys_of_rows):
        rows_of.setdefault(key, []).append(row)
    names = [names_of_rows[group[0]] for group in rows_of.values()]
    own_paths = [_path_in(cells[group[0]]) for group in rows_of.values()]
    paths = [path for path in own_paths if path and not is_url(path)]
    numbers, called = numbers_of(rows), getattr(rows, "called", "row {}".format)
    keys, groups = list(rows_of), list(rows_of.values())
    without = _rows_without_caption(rows, groups, text_columns) if len(rows) > len(names) else []
    left_out = [*left_out, *(_row_left_out(called(numbers[row]), rows[row]) for row in without)]
    skipped = set(without)

    def read(index: int) -> Pair:
        chosen = [rows[row] for row in groups[index] if row not in skipped]
        extra = _extra_of_all(chosen, (column, *text_columns))
        try:
            cell = cells[groups[index][0]]
            image = picture_in(chosen[0].get(column) if cell is None or not isinstance(cell, str) else cell)
            texts = [text for row in chosen for each in text_columns for text in texts_in_cell(row.get(each))]
            # Albums have the file's own name for a title, which is no caption.
            own = PurePath(own_paths[index]).name
            captions = tuple(text for text in texts if text != own or not PurePath(text).suffix)
        except ValueError as error:
            return Pair(names[index], problem=str(error), extra=extra)
        if texts and not captions:
            return Pair(names[index], problem=f"its caption is the file's own name, {texts[0]}", extra=extra)
        if isinstance(image, bytes) or is_url(image):
            return Pair(names[index], image, captions, None, extra)
        path = find_file(folder, image)
        if path != folder / image and (other := _row_in_another_case(path, folder, keys[index])) in rows_of:
            return Pair(names[index], problem=f"no image file {image}; {other} is another row's", extra=extra)
        return Pair(names[index], path, captions, _absence(path, image, images), extra)

    probed = [read(index) for index in range(min(_PROBED, len(names)))]
    if len(probed) > 1 and all(pair.problem for pair in probed):
        raise ValueError(
            f"none of the first {len(probed)} images of {source} is there, {names[0][:200]!r} to begin with: "
            f"{probed[0].problem}" + (f"; --image-column may name {' or '.join(map(repr, others))}" if others else "")
        )
    found = f"{counted(len(names), 'image')} from column {column!r}" + (f" in {images}" if images is not None else "")
    found += f", not from {', '.join(map(repr, others))}" if others else ""
    found += f", captions from {', '.join(map(repr, text_columns))}"
    if len(rows) > len(names):
        found += f" ({len(rows)} rows: those of one image are put together)"
    found += getattr(rows, "note", "")
    files = getattr(rows, "paths", [source])
    return Pairs(names, read, found, _FilesFound(files, folder, paths), left_out)


class NamedImages(NamedTuple):
    """N rows: the cell of each, a key that rows of one image share, and the name by which the user knows the image."""

    cells: list[Any]
    keys: list[str]
    names: list[str]


def name_images(rows: Any, column: str, within: str = "") -> NamedImages:
    """The name of each row's image: its path or URL, else its row. Where rows of another part have the path, too, its
    part stands before it, as in `train: a.jpg`, so that a list of pairs tells the two apart.

    Args:
        within: as that of `pairs_of_rows`.
    """
    whole, parts = getattr(rows, "taken_from", None) or (rows, ())
    numbers, called = numbers_of(rows), getattr(rows, "called", "row {}".format)
    cells = whole.column(column) if hasattr(whole, "column") else [row.get(column) for row in whole]
    cells = without_numbers(cells)
    of_others = set(range(len(parts))).difference(numbers)
    elsewhere = {_key_of(path) for row in of_others if (path := _path_in(cells[row]))}
    cells = [cells[number] for number in numbers] if parts else cells
    keys = []
    name_of: dict[str, str] = {}
    for number, cell in zip(numbers, cells, strict=True):
        path = _path_in(cell)
        name = path or called(number)
        keys.append(key := _key_of(name))
        part = parts[number] if key in elsewhere else getattr(rows, "split", "") if path else ""
        name = str(PurePath(within, name)) if within and not is_url(name) else name
        name_of.setdefault(key, f"{part}: {name}" if part else name)
    return NamedImages(cells, keys, [name_of[key] for key in keys])


def without_numbers(cells: list[Any]) -> list[Any]:
    """The cells of a column of images without Flickr's numbers of captions, #0, if all have one."""
    texts = [cell for cell in cells if isinstance(cell, str)]
    if not texts or not all(map(_NUMBERED_IMAGE.fullmatch, texts)):
        return cells
    return [cell.rpartition("#")[0] if isinstance(cell, str) else cell for cell in cells]


def _key_of(name: str) -> str:
    return name if is_url(name) else os.path.normpath(same_name(name.strip()))


class _FilesFound:
    """The table's files, and those that its paths mean, which are looked for when they are asked for."""

    def __init__(self, files: Sequence[Path], folder: Path, paths: Sequence[str]) -> None:
        self.files, self.folder, self.paths = files, folder, paths

    def __iter__(self) -> Iterator[Path]:
        yield from self.files
        yield from (find_file(self.folder, path) for path in sorted(self.paths))


def choose_columns(
    source: str | Path, columns: list[str], image: str, captions: Sequence[str]
) -> tuple[str, list[str]]:
    """The column of images and those of captions, which are as named or known by their names.

    Raises:
        ValueError: a column that was named is not there, or none is known.
    """
    by_name = {column.strip(): column for column in columns}
    for name in (image, *captions):
        if name.strip() not in by_name:
            raise ValueError(f"{source} has no column {name!r}; its columns are {columns_in_words(columns)}")
    return by_name[image.strip()], [by_name[name.strip()] for name in captions] or caption_columns_of(source, columns)


def caption_columns_of(source: str | Path, columns: list[str]) -> list[str]:
    """The columns of one name that is known to hold captions: one, or several that are numbered, caption_1.

    Numbered captions, texts and sentences come before a single column of any name. Titles, descriptions and comments
    are numbered where a picture has several beside its caption, so those come after `text`.

    Raises:
        ValueError: no name is known.
    """
    names = {column: column.strip().lower() for column in columns}
    numbered = {column: found[1] for column, name in names.items() if (found := NUMBERED_CAPTION.fullmatch(name))}
    stems = {column: stem if stem in CAPTION_COLUMNS else stem.removesuffix("s") for column, stem in numbered.items()}

    def place(name: str) -> int:
        place = CAPTION_COLUMNS.index(name)
        if name not in stems.values():
            return place
        is_caption = name.startswith(("caption", "text", "sentence"))
        return place - len(CAPTION_COLUMNS) if is_caption else max(place, CAPTION_COLUMNS.index("description"))

    known = [name for name in CAPTION_COLUMNS if name in (*names.values(), *stems.values())]
    if not known:
        return [find_column(columns, CAPTION_COLUMNS, "the captions", source)]
    first = min(known, key=place)
    chosen = [column for column, name in names.items() if stems.get(column, name) == first]
    return chosen if first in stems.values() else chosen[:1]


def extra_of(row: Mapping[str, Any], used: Sequence[str]) -> dict[str, Any]:
    """The other values of a row, as far as JSON has them."""
    others = {key: value for key, value in row.items() if key not in used and not is_binary(value)}
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in others.items()}


def _extra_of_all(rows: Sequence[Mapping[str, Any]], used: Sequence[str]) -> dict[str, Any]:
    """The other values of the rows of one image; a list of each row's where they differ."""
    each = [extra_of(row, used) for row in rows]
    values_of = {name: [extra.get(name) for extra in each] for name in dict.fromkeys(name for e in each for name in e)}
    return {name: values[0] if values.count(values[0]) == len(values) else values for name, values in values_of.items()}


def _rows_without_caption(
    rows: Sequence[dict[str, Any]], groups: list[list[int]], text_columns: list[str]
) -> list[int]:
    """Rows without a caption of images that have one in another row: nothing else would tell of them."""
    by_column = {each: rows.column(each) if hasattr(rows, "column") else None for each in text_columns}

    def has_caption(row: int) -> bool:
        for each, values in by_column.items():
            cell = values[row] if values is not None else rows[row].get(each)
            if isinstance(cell, str) and cell.strip():
                return True
            try:
                if texts_in_cell(cell):
                    return True
            except ValueError:
                return True
        return False

    return [
        row
        for group in groups
        if len(group) > 1
        for bare in [[row for row in group if not has_caption(row)]]
        if len(bare) < len(group)
        for row in bare
    ]


def _row_left_out(name: str, values: Mapping[str, Any]) -> LeftOut:
    held = ", ".join(str(value) for value in values.values() if value not in (None, "") and not is_binary(value))
    return LeftOut(f"{name} ({held[:100]})", "a row without a caption, of an image that has others")


def _row_in_another_case(path: Path, folder: Path, key: str) -> str:
    """The key of a row that names this file as it is written, where another row's `key` differs from it in upper and
    lower case; else empty."""
    found = os.path.normpath(same_name(str(path.relative_to(folder)))) if path.is_relative_to(folder) else ""
    return found if found != key and found.casefold() == key.casefold() else ""


def _path_in(cell: Any) -> str:
    """The path or the URL of a row's image, by which the user knows it; empty if it lies in the table."""
    if isinstance(cell, Mapping):
        cell = cell.get("path") if not cell.get("bytes") else None
    if isinstance(cell, int | np.integer) and not isinstance(cell, bool):
        return str(cell)
    is_name = isinstance(cell, str) and cell.strip() and not from_base64(cell) and not why_no_path(cell.strip())
    return cell if is_name else ""


def _absence(path: Path, text: str, images: str | Path | None) -> str | None:
    if is_file(path):
        return None
    remedy = "paths are relative to the table's folder; --images names another"
    if images is not None:
        remedy = f"paths are relative to {images}, as --images says"
    if Path(text).is_absolute():
        remedy = "an absolute path, of another machine? Relative ones go below the table's folder, or --images"
    if is_windows_path(text):
        return f"no image file {text}, which is a path of Windows ({remedy})"
    try:
        what = "a folder and no image file" if path.is_dir() else "no image file"
    except (OSError, ValueError):
        what = "no image file"
    return f"{path} is {what} ({remedy})" if what.startswith("a ") else f"{what} {path} ({remedy})"
