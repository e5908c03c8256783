"""A column as Arrow has it: its type and its values, of which those are read that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any, Protocol

import numpy as np

_VALUES_AT_ONCE = 1024
_LARGE_BYTES = 1 << 14  # pictures, also as base64, are larger on the average; articles and thumbnails smaller


class Piece(Protocol):
    """Some consecutive rows of a column. Safe to send to other processes."""

    def __len__(self) -> int: ...

    def take(self, indices: Sequence[int]) -> Any:
        """The values of these rows, a `pyarrow.ChunkedArray`."""


class ArrowColumn(Sequence[Any]):
    """N values, which an index or a loop gives as Python has them.

    Args:
        pieces: one after the other.
        kind: the type of the values, Arrow's.
        identity: changes whenever a value does, and can be computed without reading them.
        is_large: as `is_large` says it of a column.
        names: what the values stand for, if they are numbers of classes.
        chosen: the rows to have, by number, in any order; None for all.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        kind: Any,
        identity: str,
        is_large: bool = False,
        names: Sequence[str] = (),
        chosen: Any = None,
    ) -> None:
        self.pieces, self.kind, self.identity = list(pieces), kind, identity
        self.is_large, self.names = is_large, tuple(names)
        self.chosen = None if chosen is None else np.asarray(chosen, dtype=np.int64)
        self._ends = list(accumulate(map(len, self.pieces)))

    @property
    def is_plain(self) -> bool:
        """Whether a value is a number, a text or a time: neither several values nor bytes."""
        from pyarrow import types

        return not (self.is_large or types.is_nested(self.kind) or _is_binary(self.kind))

    def __len__(self) -> int:
        if self.chosen is not None:
            return len(self.chosen)
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.take([index])[0].as_py()

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), _VALUES_AT_ONCE):
            yield from self.take(range(start, min(start + _VALUES_AT_ONCE, len(self)))).to_pylist()

    def only(self, rows: Sequence[int]) -> ArrowColumn:
        """These rows of all, in this order; one may come several times."""
        chosen = np.asarray(rows, dtype=np.int64) if self.chosen is None else self.chosen[rows]
        return ArrowColumn(self.pieces, self.kind, self.identity, self.is_large, self.names, chosen)

    def take(self, indices: Sequence[int]) -> Any:
        """A `pyarrow.ChunkedArray` of these rows, in this order. Pieces are read one at a time.

        Raises:
            ValueError: a file is damaged.
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
        return pa.chunked_array(
            [chunk.cast(self.kind) if chunk.type != self.kind else chunk for chunk in chunks], self.kind
        )


def joined(columns: Sequence[ArrowColumn]) -> ArrowColumn | None:
    """Columns of one type as one, one after the other; None where they are of several types or classes."""
    first, *others = columns
    if any((each.kind, each.names) != (first.kind, first.names) for each in others):
        return None
    pieces = [piece for each in columns for piece in each.pieces]
    identity, is_large = "\n".join(each.identity for each in columns), any(each.is_large for each in columns)
    if all(each.chosen is None for each in columns):
        return ArrowColumn(pieces, first.kind, identity, is_large, first.names)
    chosen, start = [], 0
    for each in columns:
        length = sum(map(len, each.pieces))
        chosen.append(start + (np.arange(length) if each.chosen is None else each.chosen))
        start += length
    return ArrowColumn(pieces, first.kind, identity, is_large, first.names, np.concatenate(chosen))


def is_large(num_bytes: int, num_rows: int) -> bool:
    """Whether a column is of pictures or other files, by how many bytes its values of bytes or texts take."""
    return num_bytes > _LARGE_BYTES * max(1, num_rows)


def holds_bytes(kind: Any) -> bool:
    """Whether a type of Arrow's is of bytes or of texts, or has some within."""
    from pyarrow import types

    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    within = (kind.field(number).type for number in range(kind.num_fields))
    return is_text or _is_binary(kind) or any(holds_bytes(each) for each in within)


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
