"""Tables: a CSV, TSV, JSON Lines, JSON or Parquet file -> the names of its columns and its rows."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import re
import string
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any, Literal, TypeGuard
from urllib.parse import urlsplit

from ...common.files import free_memory
from ...common.storage import expand, is_url
from ...common.wording import columns_in_words, some
from .cells import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    NUMBERED_CAPTION,
    decode_text,
    names_picture,
    picture_in,
    refuse_equal_names,
    stored_picture,
)
from .json_tables import parse_json, read_json
from .parquet import ParquetRows
from .paths import find_file, is_file
from .scan import IMAGE_SUFFIXES, OTHER_SPLIT, TABLE_SUFFIXES, LeftOut, files_below, scan
from .splits import (
    Rows,
    equal_splits,
    has_split_column,
    is_all_of,
    is_named,
    rows_of_split,
    split_among,
    splits_named,
    splits_of_files,
)

_PIECE_BYTES = 2**24
_ROWS_LOOKED_AT = 20  # rows that tell what a column holds
_BOUND_OF_CSV = threading.Lock()
_WITHOUT_HEADER = ("image", "caption")
_SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_OTHER_FILES = {
    ".xlsx": "an Excel file; save it as CSV", ".xls": "an Excel file; save it as CSV", ".ods": "a spreadsheet; save it "
    "as CSV", ".numbers": "a spreadsheet; save it as CSV", ".pkl": "a pickle, which can run programs; write it as "
    "Parquet or CSV", ".pickle": "a pickle, which can run programs; write it as Parquet or CSV", ".feather": "a "
    "Feather file; write it as Parquet", ".arrow": "an Arrow file; write it as Parquet, or name its folder",
    ".h5": "an HDF5 file; write its images into a folder and its texts into a CSV", ".zip": "an archive; unpack it",
    **dict.fromkeys((".tgz", ".tar", ".bz2", ".xz", ".zst", ".7z", ".rar"), "a compressed archive; unpack it"),
    **dict.fromkeys((".db", ".sqlite"), "a data base; export a CSV"),
    ".lmdb": "a data base; write its images into a folder and its texts into a CSV",
    ".xml": "an XML file; write its images' paths and captions into a CSV",
}  # fmt: skip


def read_table(
    path: Path, split: str | None = None, *, is_asked_for: bool = False
) -> tuple[list[str], Sequence[dict[str, Any]]]:
    """Column names and rows of a CSV, TSV, JSON, JSON Lines or Parquet file, perhaps compressed by gzip; or of the
    Parquet files of a folder or a pattern, one after the other.

    Args:
        split: rows of another one are left out of a table whose column `split` names them; None for all rows.
        is_asked_for: as that of `rows_of_split`, unless the name of a file or of the files tells the split.

    Raises:
        ValueError: an empty file, one that is not what its suffix says, a row that does not fit the columns, or no such
            split.
    """
    if is_parquet(path):
        stored = ParquetRows(files := parquet_files(path, split), names=_names_before_rows(path, files))
        return stored.columns, _only_split(path, stored.columns, stored, split, is_asked_for)
    data = _unzipped(path)
    suffix = table_suffix(path)
    what = what_else(path)
    if what is None and suffix not in (*TABLE_SUFFIXES, ".txt", ".json") and b"\0" in data[:1000]:
        what = "no text; save it as CSV"
    if what is not None:
        raise ValueError(f"{path} is {what}")
    text = decode_text(data, path)
    if suffix == ".json" or (suffix in (".jsonl", ".ndjson") and re.match(r"\s*\[\s*\{", text)):
        columns, records, left_out = read_json(path, text)
    elif suffix in (".jsonl", ".ndjson"):
        columns, records, left_out = *_parse_json_lines(path, text), []
    elif suffix == ".txt" and (listed := _listed_labels(text)):
        columns, records, left_out = ["image", "label"], listed, []
    else:
        columns, records, left_out = *_parse_csv(path, text), []
    rows = Rows(records)
    rows.left_out = tuple(left_out)
    return columns, _only_split(path, columns, rows, split, is_asked_for)


def what_else(path: Path) -> str | None:
    """What a file is by its suffix, and what to do with it, if it is no table but of a kind that may hold one."""
    return _OTHER_FILES.get(table_suffix(path))


def _only_split(path: Path, columns: list[str], rows: Any, split: str | None, is_asked_for: bool) -> Any:
    if split is None:
        return rows
    named = names_of_files(path)
    parts = splits_named(named, split)
    if len(parts) > 1:
        rows.split = split_among(parts, split, str(path))
    is_of_files = not {*equal_splits(split)}.isdisjoint(parts)
    is_told = is_of_files or _is_called(path, split)
    is_one_set = not parts and is_all_of(split)
    if named and is_asked_for and not is_told and not is_one_set and not has_split_column(columns):
        split_among(named, split, str(path))  # raises
    chosen = rows_of_split(path, columns, rows, split, is_asked_for and not is_told, is_told)
    if len(named) > 1 and not is_of_files and not chosen.note:
        chosen.note = f", all files: their names are of {some(named, 3)}; --split takes those of one"
    return chosen


def _names_before_rows(path: Path, files: Sequence[Path]) -> list[str]:
    """What the files of a folder or a pattern are called, if it has several; of a folder also those of other splits."""
    num_files = sum(1 for _ in files_below(path, ".parquet")) if path.is_dir() else len(files)
    return [str(file.relative_to(folder_of(path))) for file in files] if num_files > 1 else []


def is_told_by_name(path: Path, split: str) -> bool:
    """Whether the name of a table, of its folder or of a folder's Parquet files says that they are of this split."""
    return _is_called(path, split) or not {*equal_splits(split)}.isdisjoint(parquet_splits(path, split))


def _is_called(path: Path, split: str) -> bool:
    return is_named(path, split) or is_named(folder_of(path), split)


def table_suffix(path: Path) -> str:
    """The suffix of a table in lower case, without the .gz of a compressed one."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def is_parquet(path: Path) -> bool:
    """Whether this is a Parquet file, or a pattern of some, or a folder that holds such files and no pictures."""
    return path.suffix.lower() == ".parquet" or (path.is_dir() and any(files_below(path, ".parquet")))


def is_table_of_pictures(text: str) -> bool:
    """Whether a text of any suffix is a table of pictures and captions, such as Flickr8k's captions.txt: its first line
    names two such columns, and a row below has a picture's name or URL in its own. Or it has no such line, as
    Flickr8k's token.txt, and each of the first lines is a picture's name, a tab and a text; before a comma it may begin
    a prompt."""
    named, text = named_separator(text)
    lines = [line for line in text[: 2**16].splitlines()[:_ROWS_LOOKED_AT] if line.strip()]
    if not lines:
        return False
    of_tabs = [line.split("\t", 1) for line in lines]
    if all(
        len(cells) == 2 and " " not in cells[0].strip() and names_picture(cells[0].strip(' "')) for cells in of_tabs
    ):
        return True
    first, *rows = csv.reader(lines, delimiter=named or _separator_in(lines[0], ","), skipinitialspace=True)
    names = [name.strip().lower() for name in first]
    if not any(name in CAPTION_COLUMNS or NUMBERED_CAPTION.fullmatch(name) for name in names):
        return False
    places = [place for place, name in enumerate(names) if name in IMAGE_COLUMNS]
    return any(names_picture(row[place]) for row in rows for place in places if place < len(row))


def is_list_of_labels(path: Path) -> bool:
    """Whether a text has an image and the number of its class in each line, as Caffe's lists and those of ImageNet's
    and Places' validation have."""
    try:
        return bool(_listed_labels(decode_text(_unzipped(path), path)))
    except (OSError, ValueError):
        return False


def _listed_labels(text: str) -> list[dict[str, Any]]:
    """The rows of such a list; none of any other text."""
    rows = []
    for line in filter(None, map(str.strip, text.splitlines())):
        begin = line.rstrip(string.digits)
        image = begin.rstrip(" \t,;")
        if line == begin or begin == image or not names_picture(image):
            return []
        rows.append({"image": image, "label": line[len(begin) :]})
    return rows


def is_pattern(source: str) -> bool:
    """Whether a source stands for several files: data/train-*.parquet, data/part-{00..07}.parquet."""
    return not is_url(source) and not Path(source).exists() and any(sign in source for sign in "*?[{")


def parquet_files(path: Path, split: str | None = None) -> list[Path]:
    """The files that a Parquet file, a folder of them or a pattern stands for, sorted; of a folder those of one split
    where names tell it, as `train-00000-of-00002.parquet` or a folder `train/` does. Beside such a file any other is of
    a split of its own name (`testA-00000-of-00001`, `holdout/`). Where all are, that which is asked for is taken, if
    it is one of them, else all.

    Raises:
        ValueError: none, or none of that split.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        found = sorted(files_below(path, ".parquet"))
    else:
        found = sorted(
            {Path(name) for each in expand(str(path)) for name in (glob.glob(each, recursive=True) or [each])}  # noqa: PTH207
        )
        if missing := [file for file in found if not file.is_file()]:
            raise ValueError(f"there is no file {missing[0]}")
    splits = _splits_of(path) if split else {}
    if split and len(names := splits_named(sorted(set(splits.values())), split)) > 1:
        chosen = split_among(names, split, str(path))
        return [file for file in found if splits[file] == chosen]
    return found


def parquet_splits(path: Path, split: str | None = None) -> list[str]:
    """The splits that the names of a folder's Parquet files tell of; none for a file or a pattern.

    Args:
        split: one that is asked for. Names of which none is known (of train, val and test) tell of splits only if this
            is one of them; else all files are one set.
    """
    return splits_named(names_of_files(path), split)


def names_of_files(path: Path) -> list[str]:
    """What the names of a folder's Parquet files may mean for splits, known or not (testA-00000-of-00001, split=0/)."""
    return sorted(set(_splits_of(path).values()))


def beside_parquet(folder: Path, read: Iterable[Path]) -> list[LeftOut]:
    """What lies in a folder of Parquet files, and is none of those that are read."""
    below = scan(folder)
    others = {*below.texts, *below.others} - set(read)
    tables = [path for path in sorted(others) if path.suffix.lower() == ".parquet"]
    of_splits = [LeftOut(str(path.relative_to(folder)), OTHER_SPLIT) for path in tables]
    return [*below.left_out, *of_splits, *below.unread(others - set(tables))]


def _splits_of(folder: Path) -> dict[Path, str]:
    return splits_of_files(folder, files_below(folder, ".parquet")) if folder.is_dir() else {}


def _unzipped(path: Path) -> bytes:
    """
    Raises:
        ValueError: it is damaged, or too large: reading it takes five times its bytes of memory, at the least.
    """
    whole, num_bytes, free = io.BytesIO(), 0, free_memory()
    try:
        with open(path, "rb") as file:  # once, as a pipe is
            pieces = gzip.GzipFile(fileobj=file) if file.peek(2).startswith(b"\x1f\x8b") else file
            while piece := pieces.read(_PIECE_BYTES):
                num_bytes += len(piece)
                if free is not None and num_bytes > free // 5:
                    raise MemoryError
                whole.write(piece)
        return whole.getvalue()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is compressed by gzip, and damaged: {error}") from error
    except MemoryError as error:
        raise ValueError(
            f"{path} has {num_bytes:,} bytes of text or more, too many for the memory that is free here; write several "
            "tables, or Parquet, which is read in parts"
        ) from error


def named_separator(text: str) -> tuple[str, str]:
    """The separator that Excel's first line `sep=;` names, else an empty one; and the text without that line."""
    named = re.match(r"sep=(.)\r?\n", text)
    return (named[1], text[named.end() :]) if named else ("", text)


def _separator_in(header: str, expected: str) -> str:
    if expected in header and "\t" not in header:
        return expected
    return "\t" if "\t" in header else max(_SEPARATORS, key=header.count)


def _parse_csv(path: Path, text: str) -> tuple[list[str], list[dict[str, Any]]]:
    """A separator other than the suffix's is found out, from Excel's `sep=;` or from the first line."""
    named, text = named_separator(text)
    end = text.find("\n")
    header = (text if end < 0 else text[:end]).strip("\r\n ")
    if not header.strip():
        what = "begins with a blank line" if text.strip() else "is empty"
        raise ValueError(f"{path} {what}; its first line must name the columns")
    expected = "\t" if table_suffix(path) == ".tsv" else ","
    separator = named or _separator_in(header, expected)
    with _cells_as_long_as(text):
        return _parse_cells(path, text, separator, csv.QUOTE_MINIMAL)


@contextmanager
def _cells_as_long_as(text: str) -> Iterator[None]:
    """csv's bound is the process's, so it is put back: what others read by csv does not hang on the tables before."""
    with _BOUND_OF_CSV:
        before = csv.field_size_limit()
        csv.field_size_limit(max(before, len(text)))
        try:
            yield
        finally:
            csv.field_size_limit(before)


def _parse_cells(
    path: Path, text: str, separator: str, quoting: Literal[0, 3]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Tab-separated lines whose quotes enclose no cells (CC12M: "Quoted" title of film) are read as they are, if each
    has as many cells as the first."""
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        strict=True,
        skipinitialspace=separator == "|",
        quoting=quoting,
    )
    rows = []
    try:
        first = next(reader)
        first = [_without_quotes(cell) for cell in first] if quoting == csv.QUOTE_NONE else first
        is_row = any(map(names_picture, first))
        columns = _columns_without_header(path, first) if is_row else [name.strip() for name in first]
        refuse_equal_names(columns, path)
        rows += [dict(zip(columns, first, strict=True))] if is_row else []
        for cells in reader:
            if not cells:
                continue
            if len(cells) > len(columns):
                raise ValueError(
                    f"{path}, line {reader.line_num}: more cells than the {len(columns)} columns "
                    f"({', '.join(columns)}); texts that hold {separator!r} must stand in double quotes"
                )
            if separator == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
                raise ValueError(
                    f"{path}, line {reader.line_num}: a cell holds tabs and the ends of lines; is a double quote not "
                    "closed?"
                )
            cells = [_without_quotes(cell) if quoting == csv.QUOTE_NONE else cell for cell in cells]
            cells += [""] * (len(columns) - len(cells))
            rows.append({name: stored_picture(cell) for name, cell in zip(columns, cells, strict=True) if name})
    except csv.Error as error:
        tabs = {line.count("\t") for line in text.split("\n") if line.strip("\r")}
        is_open = "end of data" in str(error)  # up to there a quote may enclose what it should not
        if separator == "\t" and len(tabs) == 1 and not is_open and quoting != csv.QUOTE_NONE:
            return _parse_cells(path, text, separator, csv.QUOTE_NONE)
        raise ValueError(f"{path}, line {reader.line_num}: {error}; is a double quote not closed?") from error
    if is_row and all(row["caption"].strip().isdecimal() for row in rows):  # the numbers of classes
        columns = ["label" if name == "caption" else name for name in columns]
        rows = [{"image": row["image"], "label": row["caption"]} for row in rows]
    return columns, rows


def _without_quotes(cell: str) -> str:
    """A cell as CSV has it, where quotes enclose it whole and others within it are doubled."""
    return cell[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*"', cell) else cell


def _columns_without_header(path: Path, first: list[str]) -> list[str]:
    """Flickr8k's and Conceptual Captions' tables name no columns: an image and a caption, in either order."""
    if len(first) == 2:
        return list(_WITHOUT_HEADER if names_picture(first[0]) else reversed(_WITHOUT_HEADER))
    raise ValueError(
        f"{path} has no header: its first line holds an image ({', '.join(first)[:100]}); put a line above it that "
        "names the columns, such as image,caption"
    )


def _parse_json_lines(path: Path, text: str) -> tuple[list[str], list[dict[str, Any]]]:
    rows, columns = [], dict[str, None]()
    for number, line in enumerate(text.split("\n"), start=1):  # a text in JSON may hold the other ends of lines
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON that can be read: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} holds {type(row).__name__}; each must be a mapping: {{…}}")
        rows.append(row)
        columns |= dict.fromkeys(row)
    if not columns:
        raise ValueError(f"{path} is empty; each line must be a mapping of column names to values: {{…}}")
    return list(columns), rows


def folder_of(path: Path) -> Path:
    """The folder that the paths of a table, or of a folder or pattern of Parquet files, are relative to."""
    folder = path if path.is_dir() else path.parent
    while not folder.is_dir():  # a pattern may hold folders
        folder = folder.parent
    return folder


def find_image_column(
    columns: Iterable[str], rows: Sequence[Mapping[str, Any]], folder: Path, source: str | Path
) -> tuple[str, list[str]]:
    """The column of images, and the others that are called so: of several that which holds pictures, else that which
    names files that are there, else the first known name.

    Raises:
        ValueError: none is known, or what is known holds other numbers than the files that an unknown column names.
    """
    columns = list(columns)
    known = [column for name in IMAGE_COLUMNS for column in columns if column.strip().lower() == name]
    if not known:
        return find_column(columns, IMAGE_COLUMNS, "the image paths", source), []
    in_memory = isinstance(rows, list)  # elsewhere other columns would have to be read
    if len(known) == 1 and not in_memory:
        return known[0], []
    number = min(_ROWS_LOOKED_AT, len(rows))
    probed: Sequence[Mapping[str, Any]]
    probed = rows.first(known, number) if isinstance(rows, ParquetRows) else [rows[row] for row in range(number)]
    unknown = [name for name in columns if name not in known] if in_memory else []
    others = [name for name in unknown if _names_files(probed, name, folder)]
    kinds = [
        _kinds_of_images([row.get(name) for name in known], [row.get(name) for name in others], folder)
        for row in probed
    ]
    usual = {name: _most_of([each[place] for each in kinds]) for place, name in enumerate(known)}
    best = min(known, key=usual.__getitem__)
    if others and usual[best] is _Image.NUMBER:
        raise ValueError(
            f"{source} has no column for the image paths: its columns are {columns_in_words(columns)}, of which "
            f"{best!r} holds numbers and {others[0]!r} names files that are there; name the right one to the command"
        )
    return best, [name for name in known if name != best]


class _Image(IntEnum):
    """What a cell of a column of images is; the best comes first."""

    PICTURE = 0
    NAMED_FILE = 1
    FILE = 2  # by a name without a suffix
    NAME = 3  # of a picture that is not there
    OTHER = 4
    URL_OF_PICTURE = 5
    URL = 6
    NUMBER = 7  # of a row or an image, and no file
    NONE = 8


def _most_of(kinds: Sequence[_Image | None]) -> _Image:
    there = [kind for kind in kinds if kind is not None]
    return max(sorted(set(there)), key=there.count, default=_Image.NONE)


def _kinds_of_images(row: Sequence[Any], others: Sequence[Any], folder: Path) -> list[_Image | None]:
    """What the cells of a row are; None for those without a value.

    A number fits another row's file where it is an id, or counts the rows. So it is no file if the picture that another
    cell of the row names has another number.

    Args:
        others: cells of columns that are not called as images are, and name files.
    """
    images: list[Any] = []
    for cell in row:
        try:
            images.append("" if cell is None or cell != cell or cell == "" else picture_in(cell))
        except ValueError:
            images.append(None)
    stems = [PureWindowsPath(name.strip()).stem for name in filter(_is_picture_path, [*images, *others])]
    numbers = {stem.lstrip("0") for stem in stems if stem.isdecimal()}

    def kind(image: Any) -> _Image | None:
        if not isinstance(image, str):
            return _Image.NONE if image is None else _Image.PICTURE
        if not image:
            return None
        if is_url(image):
            is_picture = PurePath(urlsplit(image).path).suffix.lower() in IMAGE_SUFFIXES
            return _Image.URL_OF_PICTURE if is_picture else _Image.URL
        is_there = is_file(find_file(folder, image))
        if names_picture(image):
            return _Image.NAMED_FILE if is_there else _Image.NAME
        if image.isdecimal():
            return _Image.FILE if is_there and numbers <= {image.lstrip("0")} else _Image.NUMBER
        return _Image.FILE if is_there else _Image.OTHER

    return list(map(kind, images))


def _names_files(rows: Iterable[Mapping[str, Any]], name: str, folder: Path) -> bool:
    """Whether a column has the name of a picture that is there."""
    return any(is_file(find_file(folder, cell)) for row in rows if _is_picture_path(cell := row.get(name)))


def _is_picture_path(cell: Any) -> TypeGuard[str]:
    return isinstance(cell, str) and names_picture(cell) and not is_url(cell)


def find_column(columns: Iterable[str], known: tuple[str, ...], what: str, source: str | Path) -> str:
    """The first of the columns whose name, in lower case, is known to hold `what`.

    Raises:
        ValueError: none is.
    """
    columns = list(columns)
    for name in known:
        for column in columns:
            if column.strip().lower() == name:
                return column
    hint = ""
    if len(columns) == 1:
        separators = ", ".join(_SEPARATORS.values())
        hint = f". If that is several columns in one: they may be separated by {separators}"
    elif {*columns} == {*_WITHOUT_HEADER}:
        hint = ". If it has no header, they are only taken for such: put one above its lines, as image,label"
    raise ValueError(
        f"{source} has no column for {what}: its columns are {columns_in_words(columns)}; "
        f"one must be called {', '.join(known[:-1])} or {known[-1]}, or be named to the command{hint}"
    )
