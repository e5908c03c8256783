"""Arguments from Python code: each is what it must be, or a ValueError names it, its value and what is allowed."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, KeysView, Mapping, Set
from pathlib import Path
from typing import Any

from .wording import cut_short

FLOAT32, BF16 = PRECISIONS = ("float32", "bf16")  # of the products in a model's towers


def shown(value: Any) -> str:
    """A value in a message: short ones as Python writes them, others by their type."""
    if isinstance(value, str | bytes | int | float | complex | Path | None):
        return cut_short(repr(value), 80)
    return f"a {type(value).__name__}"


def check_count(name: str, value: Any, least: int = 1) -> int:
    """A whole number, Python's or NumPy's, of at least `least`; True is none."""
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or count < least:
        raise ValueError(f"{name} is {shown(value)}; it must be a whole number of at least {least}")
    return count


def check_number(name: str, value: Any, least: float = -math.inf) -> float:
    """A finite number, Python's or NumPy's, of at least `least`; a text is none."""
    try:
        number = math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not (math.isfinite(number) and number >= least):
        which = "a number" if least == -math.inf else f"a number of at least {least:g}"
        raise ValueError(f"{name} is {shown(value)}; it must be {which}")
    return number


def check_precision(value: Any) -> str:
    """One of `PRECISIONS`."""
    if value not in PRECISIONS:
        raise ValueError(f"precision is {shown(value)}; it must be {' or '.join(PRECISIONS)}")
    return str(value)


def check_path(name: str, value: Any) -> str:
    """A path as text; bytes are none."""
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path:
        raise ValueError(f"{name} is {shown(value)}; it must be a path, a str or a pathlib.Path")
    return path


def check_list(name: str, values: Any, of: str = "values") -> list[Any]:
    """Any iterable as a list, but for what has no order (a set), keeps what is meant behind keys or in columns (a
    DataFrame, whose names would be taken), or is one text."""
    is_unordered = isinstance(values, Set) and not isinstance(values, KeysView)
    if not isinstance(values, Iterable) or is_unordered or isinstance(values, str | bytes | bytearray | Mapping):
        raise ValueError(f"{name} is {shown(values)}; it must be a list of {of}")
    if hasattr(values, "columns"):
        raise ValueError(f"{name} is {shown(values)}; it must be a list of {of}, as one of its columns is")
    try:
        return list(values)
    except TypeError as error:  # NumPy's arrays of no dimension
        raise ValueError(f"{name} is {shown(values)} of one value; it must be a list of {of}") from error


def check_texts(name: str, values: Any) -> list[str]:
    """A list of texts."""
    texts = check_list(name, values, "texts")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{number}] is {shown(text)}; it must be a text (str)")
    return texts
