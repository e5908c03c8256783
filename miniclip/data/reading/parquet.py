"""Rows of Parquet files, a group of them in memory at a time: images may lie in them."""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import unquote

from .arrow_column import ArrowColumn, as_python, is_large, taken, without_views
from .cells import refuse_equal_names
from .scan import LeftOut

_LONG_TEXT_BYTES = 4096  # longer texts, on the average, are no paths and no captions
_SHORT_TEXT_BYTES = 24  # longer texts, on the average, are no names of parts; pages have headers, too


class ParquetRows(Sequence[dict[str, Any]]):
    """Rows of Parquet files of the same columns, one file after the other.

    Args:
        chosen: the rows to have, by number; None for all.
        names: of the files, where rows are called by them.

    Raises:
        ValueError: pyarrow is missing, a file is damaged, two columns have one name, or those of two files differ.
    """

    left_out: tuple[LeftOut, ...] = ()
    note = ""
    taken_from: tuple[Any, Sequence[str]] | None = None
    split = ""  # of the files, where others beside them are of other parts

    def __init__(self, paths: Sequence[Path], chosen: Sequence[int] | None = None, names: Sequence[str] = ()) -> None:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise ValueError(f"reading {paths[0]} needs pyarrow: pip install 'miniclip[datasets]'") from error
        self.paths, self.errors, self.chosen, self.names = list(paths), ArrowException, chosen, tuple(names)
        self.files = []
        for path in paths:
            try:
                self.files.append(parquet.ParquetFile(path))
            except (ArrowException, OSError) as error:
                raise ValueError(f"{path} is no Parquet file, or a damaged one: {error}") from error
        self.file = self.files[0]
        self.columns = list(self.file.schema_arrow.names)
        for path, file in zip(paths, self.files, strict=True):
            refuse_equal_names(file.schema_arrow.names, path)
            if set(file.schema_arrow.names) != set(self.columns):
                raise ValueError(
                    f"{path} has the columns {', '.join(file.schema_arrow.names)}, and {paths[0]} has "
                    f"{', '.join(self.columns)}; files that are read together must have the same"
                )
        # Columns that Spark and Hive write as names of folders, lang=en/part-0.parquet, and not into the files.
        folders = [_columns_of_path(path) for path in paths]
        shared = set.intersection(*map(set, folders)) - set(self.columns)
        self.of_path = {name: [each[name] for each in folders] for name in sorted(shared)}
        self.columns += self.of_path
        self.groups = [
            (file_index, group, file.metadata.row_group(group).num_rows)
            for file_index, file in enumerate(self.files)
            for group in range(file.num_row_groups)
        ]
        self.ends = list(accumulate(count for _, _, count in self.groups))
        self._ends_of_files = list(accumulate(file.metadata.num_rows for file in self.files))
        self._lock = Lock()
        self._group = lru_cache(maxsize=2)(lambda file_index, group: self.files[file_index].read_row_group(group))
        self._parts: dict[str, tuple[tuple[int, int], Any]] = {}  # the last group of each column

    def __reduce__(self) -> Any:
        return type(self), (self.paths, self.chosen, self.names)  # another process opens the files anew

    def only(self, rows: Sequence[int]) -> ParquetRows:
        """These rows of all."""
        chosen = ParquetRows(self.paths, rows, self.names)
        chosen.split = self.split
        return chosen

    def called(self, number: int) -> str:
        """What a row is called, by its number among all: its file and its number there, from 1, if files have names."""
        if not self.names:
            return f"row {number}"
        file_index = bisect_right(self._ends_of_files, number)
        first = self._ends_of_files[file_index - 1] if file_index else 0
        return f"{self.names[file_index]}: row {number - first + 1}"

    def __len__(self) -> int:
        if self.chosen is not None:
            return len(self.chosen)
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.chosen is not None:
            index = self.chosen[index]
        place = bisect_right(self.ends, index)
        file_index, group, count = self.groups[place]
        try:
            with self._lock:
                table = self._group(file_index, group)
                row = table.slice(index - (self.ends[place] - count), 1)
                row = {name: as_python(values)[0] for name, values in zip(row.column_names, row.columns, strict=True)}
                return row | {name: values[file_index] for name, values in self.of_path.items()}
        except (self.errors, OSError) as error:
            raise ValueError(f"{self.paths[file_index]} is damaged in its row group {group}: {error}") from error

    def first(self, names: Sequence[str], number: int) -> list[dict[str, Any]]:
        """Some columns of the first rows of the first file, whichever are chosen; no other column is read."""
        try:
            batches = self.file.iter_batches(number, columns=[name for name in names if name not in self.of_path])
            return next((batch.to_pylist() for batch in batches), [])
        except (self.errors, OSError) as error:
            raise ValueError(f"{self.paths[0]} is damaged: {error}") from error

    def first_text(self, name: str) -> str:
        """The first value of a column, if it is a short text and no file's name tells the part; else an empty one."""
        if self.split or not self or name in self.of_path:
            return ""
        num_bytes, kind = _bytes_of(self.file, name), str(self.file.schema_arrow.field(name).type)
        is_short = "string" in kind and num_bytes <= _SHORT_TEXT_BYTES * max(self.file.metadata.num_rows, 100)
        begin = self.first([name], 1) if is_short else []
        value = begin[0].get(name) if begin else ""
        return value if isinstance(value, str) else ""

    def whole(self, name: str) -> Sequence[Any]:
        """A column with all of its values: an `ArrowColumn`, or a list where its type is not the same in all files."""
        if name in self.of_path:
            return self.column(name)
        kinds = list(dict.fromkeys(without_views(file.schema_arrow.field(name).type) for file in self.files))
        kinds = [kind for kind in kinds if not _is_null(kind)] or kinds
        pieces = [_GroupColumn(self, name, *group) for group in self.groups]
        large = is_large(sum(_bytes_of(file, name) for file in self.files), sum(map(len, pieces)))
        if len(kinds) > 1 and not large:
            values = [value for each in pieces for value in as_python(self.part(name, each.file_index, each.group))]
            return values if self.chosen is None else [values[row] for row in self.chosen]
        return ArrowColumn(pieces, kinds[0], large, chosen=self.chosen)

    def part(self, name: str, file_index: int, group: int) -> Any:
        """A column of a row group, a `pyarrow.ChunkedArray`.

        Raises:
            ValueError: the file is damaged.
        """
        with self._lock:
            place, values = self._parts.get(name, (None, None))
            if place != (file_index, group):
                self._parts.pop(name, None)
                values = self._read_part(name, file_index, group)
                self._parts[name] = (file_index, group), values
            return values

    def _read_part(self, name: str, file_index: int, group: int) -> Any:
        path = self.paths[file_index]
        try:
            values = self.files[file_index].read_row_group(group, columns=[name])[name]
        except (self.errors, OSError) as error:
            raise ValueError(f"{path} is damaged in its row group {group}: {error}") from error
        kind = without_views(values.type)
        try:
            return values if values.type == kind else values.cast(kind)
        except self.errors as error:
            raise ValueError(f"{path}: column {name!r} of type {values.type} can't be read: {error}") from error

    def column(self, name: str) -> list[Any]:
        """A column's values; None in place of images that lie in it: their bytes, base64 or pixels."""
        if name in self.of_path:
            counts = zip(self.of_path[name], self.files, strict=True)
            values = [value for value, file in counts for _ in range(file.metadata.num_rows)]
        else:
            values = [value for file in self.files for value in self._column_of(file, name)]
        return values if self.chosen is None else [values[row] for row in self.chosen]

    def _column_of(self, file: Any, name: str) -> list[Any]:
        paths, leaves = _leaves_of(file, name)
        kind, depth = file.schema_arrow.field(name).type, 0
        while hasattr(kind, "value_type") and kind.num_fields == 1:
            kind, depth = kind.value_type, depth + 1
        if depth > 1 or any(_holds_pictures(file, leaf) for leaf in leaves):
            return [None] * file.metadata.num_rows
        return as_python(file.read([f"{name}.path" if f"{name}.bytes" in paths else name]).column(0))


@dataclass(frozen=True)
class _GroupColumn:
    """A column of a row group."""

    rows: ParquetRows
    name: str
    file_index: int
    group: int
    count: int

    def __len__(self) -> int:
        return self.count

    def identity(self) -> str:
        """A digest of the column as the file has it, compressed; when it was written does not matter."""
        file, path, digest = self.rows.files[self.file_index], self.rows.paths[self.file_index], hashlib.blake2b()
        digest.update(f"{self.name} {self.count}".encode())
        for leaf in _leaves_of(file, self.name)[1]:
            facts = file.metadata.row_group(self.group).column(leaf)
            starts = [facts.data_page_offset, *([facts.dictionary_page_offset] if facts.has_dictionary_page else [])]
            try:
                with open(path, "rb") as data:
                    data.seek(min(starts))
                    digest.update(data.read(facts.total_compressed_size))
            except OSError as error:
                raise ValueError(f"{path} can't be read: {error.strerror or error}") from error
        return digest.hexdigest()

    def take(self, indices: Sequence[int]) -> Any:
        values = self.rows.part(self.name, self.file_index, self.group)
        try:
            return taken(values, indices)
        except self.rows.errors as error:
            path = self.rows.paths[self.file_index]
            raise ValueError(f"{path}: column {self.name!r} of type {values.type} can't be read: {error}") from error


def _is_null(kind: Any) -> bool:
    from pyarrow import types

    return types.is_null(kind)


def _columns_of_path(path: Path) -> dict[str, str | None]:
    parts = (part.partition("=") for part in path.parts[:-1] if re.fullmatch(r"[^=]+=.*", part))
    return {name: None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value) for name, _, value in parts}


def _leaves_of(file: Any, name: str) -> tuple[list[str], list[int]]:
    """The paths of all of a file's columns without parts, and which of them are a column, or in it."""
    paths = [file.schema.column(leaf).path for leaf in range(len(file.schema))]
    return paths, [leaf for leaf, path in enumerate(paths) if path == name or path.startswith(f"{name}.")]


def _bytes_of(file: Any, name: str) -> int:
    """The bytes that a column's values of bytes or texts take, before they are compressed."""
    leaves = [leaf for leaf in _leaves_of(file, name)[1] if file.schema.column(leaf).physical_type == "BYTE_ARRAY"]
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    return sum(group.column(leaf).total_uncompressed_size for group in groups for leaf in leaves)


def _holds_pictures(file: Any, leaf: int) -> bool:
    """Whether a column of bytes has any, or one of texts has such long ones that they are pictures in base64."""
    schema = file.schema.column(leaf)
    if schema.physical_type != "BYTE_ARRAY":
        return False
    is_binary = schema.logical_type.type == "NONE"
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number).column(leaf)
        facts = group.statistics
        if is_binary and (facts is None or not facts.has_null_count or facts.null_count < group.num_values):
            return True
        if group.total_uncompressed_size > _LONG_TEXT_BYTES * max(1, group.num_values):
            return True
    return False
