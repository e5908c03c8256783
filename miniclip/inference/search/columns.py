"""What else is known of pictures -> columns of an index: names that can be filtered by, and types of Arrow's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime, time
from itertools import chain, count
from typing import Any

from ...data.reading.arrow_column import ArrowColumn
from .store import OWN_COLUMNS, Store, can_widen

RESULT_COLUMNS = ("group", "query", "rank", "cosine")  # beside the path, in what a search prints
_LOOKED_AT, _LONG_BYTES = 64, 1024  # values of a column, and what one takes at most on the average


def column_names(names: Iterable[str], there: Iterable[str] = ()) -> dict[str, str]:
    """The column of an index for each name: another where LanceDB, the index or its results have that name themselves,
    where SQL would read a part of it, and where it is another name's already.

    >>> column_names(["camera.make", "camera_make", "key", "year"])
    {'camera.make': 'camera_make_2', 'camera_make': 'camera_make', 'key': 'given_key', 'year': 'year'}

    Args:
        there: the index's columns; one from before may have a name of results, and keeps it.
    """
    kept = {*RESULT_COLUMNS} & {*there}
    wanted = {name: name if name in kept else _allowed(name) for name in names}
    taken = {name for name, column in wanted.items() if name == column}
    found = {}
    for name, column in wanted.items():
        if column != name:
            numbered = (f"{column}_{number}" for number in count(2))
            column = next(each for each in chain([column], numbered) if each not in taken)
            taken.add(column)
        found[name] = column
    return found


def _allowed(name: str) -> str:
    name = _escaped(name).replace(".", "_").replace("`", "_").strip() or "unnamed"
    is_other = name in (*OWN_COLUMNS, *RESULT_COLUMNS) or name.startswith("_row")  # LanceDB's _rowid, _rowaddr, …
    return f"given_{name}" if is_other else name


def why_left_out(values: Sequence[Any]) -> str:
    """Why a column of a source is not one of an index, which a filter is to compare; empty if it is.

    Lists, structures and mappings become JSON, but for those as long as the numbers of an embedding.
    """
    from pyarrow import types

    if not isinstance(values, ArrowColumn):
        return ""
    if values.is_large or values.has_bytes:
        return "of bytes or of large texts"
    if types.is_nested(values.kind) and len(values):
        first = values.take(range(min(len(values), _LOOKED_AT)))
        if first.nbytes > _LONG_BYTES * len(first):
            return f"of lists of more than {_LONG_BYTES} bytes"
    return ""


def as_columns(sources: Iterable[tuple[str, Mapping[str, Sequence[Any]]]], store: Store | None) -> list[dict[str, Any]]:
    """Arrow's arrays by column name, for each source and what it knows of its pictures. A column without any value is
    left out, unless the index has it.

    All sources have a column in one type: the index's, or a wider one that has each value of all as it is. One that is
    new gets the type of its values, or texts for values of several types.

    Raises:
        ValueError: values for which there is no such type.
    """
    fields = [] if store is None else store.schema
    kinds = {field.name: field.type for field in fields}
    every: list[dict[str, Any]] = []
    for source, metadata in sources:
        every.append({})
        for name, column in column_names(metadata, [field.name for field in fields]).items():
            values = [_plain_cell(value) for value in metadata[name]]
            if column not in kinds:
                array = _own_array(values)
                if array.null_count == len(array):
                    continue
            else:
                before = [each[column] for each in every if column in each]
                try:
                    array = _array_beside(values, kinds[column], before, store, column)
                except _unfit() as error:
                    raise ValueError(
                        f"column {column!r} of the index holds values of type {kinds[column]}, and {source} has "
                        f"others: {error}. Give that column another name, or make a new index"
                    ) from error
            every[-1][column], kinds[column] = array, array.type
    return [
        {
            column: array if array.type == kinds[column] else _exact_array(array.to_pylist(), kinds[column])
            for column, array in columns.items()
        }
        for columns in every
    ]


def _array_beside(values: list[Any], kind: Any, before: list[Any], store: Store | None, column: str) -> Any:
    """In the type of those before, or in a wider one that holds these and those."""
    import pyarrow as pa

    if pa.types.is_string(kind):
        return _text_array(values)
    try:
        return _exact_array(values, kind)
    except _unfit():
        wider = _wider(kind, _own_array(values).type)
        has_values = store is not None and column in store.schema.names
        if wider is None or (has_values and not can_widen(wider)):
            raise
    if store is not None and has_values:
        before = [*before, store.read([column])[column]]
    for each in before:
        _exact_array(each.to_pylist(), wider)
    return _exact_array(values, wider)


def _wider(kind: Any, other: Any) -> Any:
    """The type that holds the values of both; None if there is none."""
    import pyarrow as pa

    schemas = [pa.schema([("column", each)]) for each in (kind, other)]
    try:
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except pa.ArrowTypeError:
        return None


def _own_array(values: list[Any]) -> Any:
    """In the type of the values; texts for values of several types, and for lists and mappings."""
    import pyarrow as pa
    from pyarrow import types

    try:
        kind = pa.array(values).type
    except _unfit():
        return _text_array(values)
    kinds = [] if types.is_nested(kind) or types.is_binary(kind) else [kind]
    if types.is_timestamp(kind):
        kinds.append(pa.timestamp("ns", kind.tz))
    if types.is_duration(kind):
        kinds.append(pa.duration("ns"))
    for each in kinds:
        with suppress(*_unfit()):
            return _exact_array(values, each)
    return _text_array(values)


def _exact_array(values: list[Any], kind: Any) -> Any:
    """
    Raises:
        pa.ArrowInvalid, pa.ArrowTypeError, OverflowError: a value would be another in this type, where Arrow may cut
            decimals, times and zones off.
    """
    import pyarrow as pa

    array = pa.array(values, kind)
    for value, kept in zip(values, array.to_pylist(), strict=True):
        if value != kept and _moment(value) != _moment(kept):
            raise pa.ArrowInvalid(f"{value} would be {kept}")
    return array


def _moment(value: Any) -> Any:
    """A day as its first moment."""
    is_day = isinstance(value, date) and not isinstance(value, datetime)
    return datetime.combine(value, time()) if is_day else value


def _text_array(values: list[Any]) -> Any:
    import pyarrow as pa

    return pa.array([_cell_as_text(value) for value in values], pa.string())


def _unfit() -> tuple[type[Exception], ...]:
    """What Arrow raises for values that a type can't hold."""
    import pyarrow as pa

    return pa.ArrowInvalid, pa.ArrowTypeError, OverflowError


def _plain_cell(value: Any) -> Any:
    """A value as Arrow takes it: NumPy's numbers as Python's, and None for a number that is missing."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, float) and math.isnan(value):
        return None
    return _escaped(value) if isinstance(value, str) else value


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _cell_as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)
