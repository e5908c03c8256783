"""A column as Arrow has it: its type and its values, of which those are read that are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, Protocol

import numpy as np

_VALUES_AT_ONCE = 1024
_LARGE_BYTES = 1 << 14  # pictures, also as base64, are larger on the average; articles and thumbnails smaller


class Piece(Protocol):
    """Some consecutive rows of a column. Safe to send to other processes."""

    def __len__(self) -> int: ...

    def identity(self) -> str:
        """Changes whenever a value does."""

    def take(self, indices: Sequence[int]) -> Any:
        """The values of these rows, a `pyarrow.ChunkedArray`."""


class ArrowColumn(Sequence[Any]):
    """N values, which an index or a loop gives as Python has them.

    Args:
        pieces: one after the other.
        kind: the type of the values, Arrow's.
        is_large: as `is_large` says it of a column.
        names: what the values stand for, if they are numbers of classes.
        chosen: the rows to have, by number, in any order; None for all.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        kind: Any,
        is_large: bool = False,
        names: Sequence[str] = (),
        chosen: Any = None,
    ) -> None:
        self.pieces, self.kind = list(pieces), kind
        self.is_large, self.names = is_large, tuple(names)
        self.chosen = None if chosen is None else np.asarray(chosen, dtype=np.int64)
        self._ends = list(accumulate(map(len, self.pieces)))

    @property
    def identity(self) -> str:
        """Changes with the type, and whenever a value does, unless they are large, which are not read for it."""
        of_values = [] if self.is_large else [piece.identity() for piece in self.pieces]
        return "\n".join([str(self.kind), str(len(self)), *of_values])

    @property
    def has_bytes(self) -> bool:
        """Whether values are bytes, or have some within."""
        return _has_bytes(self.kind)

    def __len__(self) -> int:
        if self.chosen is not None:
            return len(self.chosen)
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return as_python(self.take([index]))[0]

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), _VALUES_AT_ONCE):
            yield from as_python(self.take(range(start, min(start + _VALUES_AT_ONCE, len(self)))))

    def only(self, rows: Sequence[int]) -> ArrowColumn:
        """These rows of all, in this order; one may come several times."""
        chosen = np.asarray(rows, dtype=np.int64) if self.chosen is None else self.chosen[rows]
        return ArrowColumn(self.pieces, self.kind, self.is_large, self.names, chosen)

    def by_name(self) -> ArrowColumn:
        """Classes as their names, null for a number without one; itself if it is not of classes."""
        import pyarrow as pa

        if not self.names:
            return self
        pieces = [_NamesOfClasses(piece, self.names) for piece in self.pieces]
        return ArrowColumn(pieces, pa.string(), self.is_large, chosen=self.chosen)

    def take(self, indices: Sequence[int]) -> Any:
        """A `pyarrow.ChunkedArray` of these rows, in this order. Pieces are read one at a time.

        Raises:
            ValueError: a file is damaged, or holds values of another type.
        """
        import pyarrow as pa

        rows = np.asarray(indices, dtype=np.int64) if self.chosen is None else self.chosen[indices]
        places = np.searchsorted(self._ends, rows, side="right").tolist()
        chunks: list[Any] = []
        done = 0
        for place, run in groupby(places):
            count = sum(1 for _ in run)
            start = self._ends[place] - len(self.pieces[place])
            chunks += self.pieces[place].take((rows[done : done + count] - start).tolist()).chunks
            done += count
        try:
            chunks = [chunk.cast(self.kind) if chunk.type != self.kind else chunk for chunk in chunks]
        except pa.ArrowException as error:
            raise ValueError(f"a column of type {self.kind} has values of another type: {error}") from error
        return pa.chunked_array(chunks, self.kind)


def joined(columns: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """Columns as one, one after the other: an `ArrowColumn` where they have a type in common, or only some have values.

    Else a list of their values, of classes the names. One with bytes or large texts stays an `ArrowColumn` that is
    large, since neither is to be read as other values.
    """
    of_arrow = [each for each in columns if isinstance(each, ArrowColumn)]
    has_others = any(any(value is not None for value in each) for each in columns if not isinstance(each, ArrowColumn))
    if has_others or len({each.names for each in of_arrow}) > 1:
        columns = [each.by_name() if isinstance(each, ArrowColumn) else each for each in columns]
        of_arrow = [each for each in columns if isinstance(each, ArrowColumn)]
    kind = None if has_others or not of_arrow else _common_kind([each.kind for each in of_arrow])
    is_large = any(each.is_large for each in of_arrow)
    if kind is None and (is_large or any(_has_bytes(each.kind) for each in of_arrow)):
        kind, is_large = of_arrow[0].kind, True
    if kind is None:
        return [value for values in columns for value in values]
    pieces: list[Piece] = []
    chosen, start = [], 0
    for each in columns:
        own = each.pieces if isinstance(each, ArrowColumn) else [_Values(each)]
        length = sum(map(len, own))
        rows = each.chosen if isinstance(each, ArrowColumn) else None
        chosen.append(start + (np.arange(length) if rows is None else rows))
        pieces, start = [*pieces, *own], start + length
    is_whole = all(each.chosen is None for each in of_arrow)
    return ArrowColumn(pieces, kind, is_large, of_arrow[0].names, None if is_whole else np.concatenate(chosen))


@dataclass(frozen=True)
class _Values:
    """Values as Python has them."""

    values: Sequence[Any]

    def __len__(self) -> int:
        return len(self.values)

    def identity(self) -> str:
        return json.dumps(list(self.values), default=str)

    def take(self, indices: Sequence[int]) -> Any:
        import pyarrow as pa

        return pa.chunked_array([pa.array([self.values[index] for index in indices])])


@dataclass(frozen=True)
class _NamesOfClasses:
    """Numbers of classes as their names; a number without one, as -1 is for no class, is null."""

    piece: Piece
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.piece)

    def identity(self) -> str:
        return json.dumps([self.names, self.piece.identity()])

    def take(self, indices: Sequence[int]) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        numbers = self.piece.take(indices).cast(pa.int64())  # of a part without values it is null
        is_class = pc.and_(pc.greater_equal(numbers, 0), pc.less(numbers, len(self.names)))
        return pa.chunked_array([pa.array(self.names, pa.string())]).take(pc.if_else(is_class, numbers, None))


def _common_kind(kinds: Sequence[Any]) -> Any:
    """The type that holds the values of all; None if there is none but that of their texts."""
    import pyarrow as pa
    from pyarrow import types

    kinds = list(dict.fromkeys(kind for kind in kinds if not types.is_null(kind))) or [kinds[0]]
    if len(kinds) == 1:
        return kinds[0]
    alike = (types.is_signed_integer, types.is_unsigned_integer, types.is_floating, _is_text, _is_binary)
    if not any(all(map(is_alike, kinds)) for is_alike in alike):
        return None
    schemas = [pa.schema([("column", kind)]) for kind in kinds]
    return pa.unify_schemas(schemas, promote_options="permissive").field(0).type


def _has_bytes(kind: Any) -> bool:
    within = (kind.field(number).type for number in range(kind.num_fields))
    return _is_binary(kind) or any(map(_has_bytes, within))


def is_large(num_bytes: int, num_rows: int) -> bool:
    """Whether a column is of pictures or other files, by how many bytes its values of bytes or texts take."""
    return num_bytes > _LARGE_BYTES * max(1, num_rows)


def holds_bytes(kind: Any) -> bool:
    """Whether a type of Arrow's is of bytes or of texts, or has some within."""
    within = (kind.field(number).type for number in range(kind.num_fields))
    return _is_text(kind) or _is_binary(kind) or any(holds_bytes(each) for each in within)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def without_views(kind: Any) -> Any:
    """A type of Arrow's with large texts and bytes where it has views of them, of which Arrow can't take rows."""
    import pyarrow as pa
    from pyarrow import types

    if types.is_string_view(kind):
        return pa.large_string()
    if types.is_binary_view(kind):
        return pa.large_binary()
    if types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, without_views(kind.value_type), kind.ordered)
    within = [field.with_type(without_views(field.type)) for field in map(kind.field, range(kind.num_fields))]
    if types.is_struct(kind):
        return pa.struct(within)
    if types.is_map(kind):
        return pa.map_(*(field.with_type(without_views(field.type)) for field in (kind.key_field, kind.item_field)))
    if types.is_fixed_size_list(kind):
        return pa.list_(*within, kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(*within)
    return pa.list_(*within) if types.is_list(kind) else kind


def as_python(values: Any) -> list[Any]:
    """The values of a column of Arrow's as Python has them. One in nanoseconds that Python would round is a text: a
    time of day, and without pandas, which has types for them, any other."""
    import pyarrow as pa
    from pyarrow import types

    kind = values.type
    if types.is_time64(kind):
        try:
            values.cast(pa.time64("us"))
        except pa.ArrowInvalid:
            return list(values.cast(pa.string()).to_pylist())
    try:
        return list(values.to_pylist())
    except ValueError:
        if getattr(kind, "unit", "") != "ns":
            raise
        texts, unit = values.cast(pa.string()).to_pylist(), " ns" if types.is_duration(kind) else ""
        return [text if text is None else f"{text}{unit}" for text in texts]


def taken(values: Any, indices: Sequence[int]) -> Any:
    """Rows of a `pyarrow.ChunkedArray`, as one; row by row where Arrow can't take several of its type."""
    import pyarrow as pa

    try:
        return values.take(pa.array(indices, pa.int64()))
    except NotImplementedError:
        return pa.chunked_array([part for row in indices for part in values.slice(row, 1).chunks], values.type)


def _is_binary(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
