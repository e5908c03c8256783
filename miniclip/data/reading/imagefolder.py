"""A folder of pictures whose captions stand in tables beside them, as Hugging Face's `imagefolder` has them -> pairs.

A table `metadata.jsonl` (or .csv, .parquet) names pictures in and below its own folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ...common.wording import some
from .pair import Pairs
from .paths import find_file
from .rows import caption_columns_of, choose_columns, pairs_of_rows
from .scan import OTHER_SPLIT, TABLE_SUFFIXES, LeftOut, Scan
from .splits import (
    Rows,
    different_splits,
    has_split_column,
    is_named,
    parts_in,
    role_of,
    rows_of_split,
    rows_with,
    same_parts,
)
from .tables import read_table


def is_imagefolders(path: Path, needs_captions: bool) -> bool:
    """Whether this is the table of a folder, as Hugging Face's `imagefolder` has it.

    Args:
        needs_captions: one without them, of labels or sizes, does not count: the captions are elsewhere.
    """
    if path.stem.lower() != "metadata" or path.suffix not in TABLE_SUFFIXES:
        return False
    columns = read_table(path)[0]
    if "file_name" not in columns or not needs_captions:
        return "file_name" in columns
    try:
        return bool(caption_columns_of(path, columns))
    except ValueError:
        return False


def read_imagefolder(
    files: Scan, tables: Sequence[Path], split: str, is_asked_for: bool, caption_columns: Sequence[str]
) -> Pairs:
    """A folder of pictures with tables of theirs, as Hugging Face's `imagefolder` has them."""
    tables, is_of_part, others = _tables_of_part(files.folder, tables, split)
    first, base = tables[0], tables[0].parent if len(tables) == 1 else files.folder
    columns, all_rows = read_table(first) if len(tables) == 1 else _rows_of_tables(base, tables, caption_columns)
    is_told = is_of_part or is_named(files.folder, split)
    if not is_of_part and not has_split_column(columns) and (parts := _parts_of_pictures(all_rows)):
        rows = rows_with(all_rows, parts, _same_parts_or_refuse(first, parts, split))
    else:
        rows = rows_of_split(first, columns, all_rows, split, is_asked_for and not is_told)
    place = base.relative_to(files.folder)
    pairs = pairs_of_rows(
        first,
        columns,
        rows,
        folder=base,
        within=str(place) if place.parts else "",
        image_column="file_name",
        caption_columns=caption_columns,
        left_out=rows.left_out,
    )
    named = {find_file(base, str(row["file_name"])) for row in all_rows if row.get("file_name")}
    names = [str(path.relative_to(files.folder)) for path in tables]
    unnamed = f"a file that {first.name} does not name" if len(tables) == 1 else "a file that no table names"
    rest, unread = (*files.images, *files.texts), [path for path in files.others if path not in tables]
    of_others = {path for path in (*rest, *unread) if any(path.is_relative_to(each) for each in others)}
    left_out = [
        LeftOut(str(path.relative_to(files.folder)), OTHER_SPLIT if path in of_others else unnamed)
        for path in (*(path for path in rest if path not in named), *(path for path in unread if path in of_others))
    ]
    left_out += [*files.unread(path for path in unread if path not in of_others), *files.left_out]
    found = f"{pairs.found}, as {first.name} says" if len(tables) == 1 else f"{pairs.found}, as {some(names, 3)} say"
    return Pairs(pairs.names, pairs.read, found, pairs.files, [*pairs.left_out, *left_out])


def splits_of_imagefolder(folder: Path) -> list[str]:
    """The parts that a table right in a folder tells, by its column or by the folders of its pictures; none of another
    folder."""
    table = next((path for path in sorted(folder.iterdir()) if path.is_file() and is_imagefolders(path, True)), None)
    columns, rows = read_table(table) if table else ([], [])
    parts = (not has_split_column(columns) and _parts_of_pictures(rows)) or parts_in(columns, rows)[1]
    return sorted(set(parts) - {""})


def _tables_of_part(folder: Path, tables: Sequence[Path], split: str) -> tuple[list[Path], bool, list[Path]]:
    """The tables that name the pictures of a part, one of each folder; whether a folder's name tells that they do; and
    the folders of the other parts. Tables above the folders of parts are of all.

    Raises:
        ValueError: there is no such part.
    """
    tables = list({path.parent: path for path in reversed(tables)}.values())[::-1]
    places = {path: path.parent.relative_to(folder).parts for path in tables}
    for level in range(max(map(len, places.values()))):
        part_of = {path: place[level] for path, place in places.items() if len(place) > level}
        if not different_splits(part_of.values()) and not all(map(role_of, part_of.values())):
            continue
        wanted = same_parts(set(part_of.values()), split)
        above, chosen = [path for path in tables if path not in part_of], [p for p in part_of if part_of[p] in wanted]
        if not above and not chosen:
            parts = sorted({str(folder.joinpath(*places[path][: level + 1])) for path in part_of})
            raise ValueError(f"{folder} has no split {split!r}; name one of its parts: {', '.join(parts)}")
        if above:
            return above, False, []
        others = {folder.joinpath(*places[path][: level + 1]) for path in part_of if path not in chosen}
        return chosen, True, sorted(others)
    return tables, False, []


def _parts_of_pictures(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The folder of each row's picture that tells its part, "" for none; empty where no folders tell two parts, as
    train and test do."""
    places = [PurePath(str(row.get("file_name") or "").replace("\\", "/")).parts[:-1] for row in rows]
    for level in range(max(map(len, places), default=0)):
        names = [place[level] if len(place) > level else "" for place in places]
        if different_splits(names):
            return names
    return []


def _same_parts_or_refuse(table: Path, parts: Iterable[str], split: str) -> list[str]:
    there = sorted(set(parts))
    if not (wanted := same_parts(there, split)):
        raise ValueError(
            f"{table} names no picture of a split {split!r}, but those of {some([each or 'none' for each in there])}; "
            "--split takes those of one"
        )
    return wanted


class _RowsOfTables(Rows):
    """Rows of several tables.

    Args:
        names: what each row is called, by its number.
        paths: the tables.
    """

    def __init__(
        self,
        rows: Iterable[dict[str, Any]],
        names: Sequence[str],
        paths: Sequence[Path],
        chosen: Sequence[int] | None = None,
    ) -> None:
        super().__init__(rows, chosen)
        self.names, self.paths = names, paths

    def only(self, rows: Sequence[int]) -> _RowsOfTables:
        return _RowsOfTables((self[row] for row in rows), self.names, self.paths, rows)

    def called(self, number: int) -> str:
        return self.names[number]


def _rows_of_tables(
    folder: Path, tables: Sequence[Path], caption_columns: Sequence[str]
) -> tuple[list[str], _RowsOfTables]:
    """The columns and rows of several tables, whose pictures are called by their paths below the folder.

    Raises:
        ValueError: their captions stand in columns of different names.
    """
    columns: dict[str, None] = {}
    texts_of: dict[Path, list[str]] = {}
    rows, names = [], []
    for table in tables:
        own, records = read_table(table)
        columns |= dict.fromkeys(own)
        texts_of[table] = choose_columns(table, own, "file_name", caption_columns)[1]
        if texts_of[table] != texts_of[tables[0]]:
            first, other = (", ".join(map(repr, texts_of[path])) for path in (tables[0], table))
            raise ValueError(
                f"{table} has its captions in {other}, and {tables[0]} in {first}; tables of one folder must have the "
                "same columns, or --caption-column names one that all have"
            )
        for number, row in enumerate(records, start=1):
            rows.append({**row, "file_name": _path_below(folder, table.parent, row.get("file_name"))})
            names.append(f"{table.relative_to(folder)}: row {number}")
    return list(columns), _RowsOfTables(rows, names, tables)


def _path_below(folder: Path, place: Path, name: Any) -> Any:
    """A file that is named in a folder below another, as that one has it; what names none stays as it is."""
    if not isinstance(name, str) or not name.strip():
        return name
    written, found = place / name, find_file(place, name)
    if str(found).casefold() == str(written).casefold():  # whose row it is where they differ is found out later
        found = written
    return str(found.relative_to(folder)) if found.is_relative_to(folder) else str(found)
