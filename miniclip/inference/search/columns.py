"""What else is known of pictures -> columns of an index: names that can be filtered by, and types of Arrow's."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from typing import Any

from ...data.reading.arrow_column import ArrowColumn
from .store import OWN_COLUMNS

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


def as_columns(metadata: Mapping[str, Sequence[Any]], schema: Any, source: str) -> dict[str, Any]:
    """Arrow's arrays by column name, in the types that the index has; a column without any value is left out.

    Args:
        schema: the index's; columns that it lacks get the type of their values, texts for those of several types.

    Raises:
        ValueError: values that a column of the index can't hold.
    """
    found = {}
    columns = column_names(metadata, () if schema is None else schema.names)
    for name, values in metadata.items():
        column = columns[name]
        known = schema.field(column).type if schema is not None and column in schema.names else None
        array = _array([_plain_cell(value) for value in values], known, column, source)
        if known is not None or array.null_count < len(array):
            found[column] = array
    return found


def _array(values: list[Any], known: Any, column: str, source: str) -> Any:
    import pyarrow as pa

    if known is not None:
        try:
            return pa.array([_cell_as_text(value) for value in values] if pa.types.is_string(known) else values, known)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise ValueError(
                f"column {column!r} of the index holds values of type {known}, and {source} has others: {error}"
            ) from error
    try:
        array = pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([_cell_as_text(value) for value in values], pa.string())
    is_flat = not pa.types.is_nested(array.type) and not pa.types.is_binary(array.type)
    return array if is_flat else pa.array([_cell_as_text(value) for value in values], pa.string())


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
