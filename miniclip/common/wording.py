"""How numbers and lists read in messages, tables and pages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Control characters but the ends of lines, and those that reverse the direction of writing.
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def percent(share: float) -> str:
    """The number alone, for a column or an axis that says %."""
    return f"{100 * share:.1f}"


def portion(share: float) -> str:
    return f"{percent(share)} %" if share == 0 or share >= 0.001 else "less than 0.1 %"


def counted(number: int, noun: str) -> str:
    """1 shard, 2,000 shards: of nouns that take an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def share_of(are: np.ndarray) -> float:
    return float(are.mean()) if len(are) else 0.0


def printable(text: str) -> str:
    """The text with control characters as \\x1b and the like, so that no name can steer the terminal."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def cut_short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def reason_of(error: BaseException) -> str:
    """What an error says in a sentence, which of a name that is missing is the bare name.

    >>> reason_of(KeyError("shards"))
    "'shards' is missing"
    """
    if isinstance(error, KeyError) and error.args:
        return f"{error.args[0]!r} is missing"
    return str(error) or type(error).__name__


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def columns_in_words(names: Iterable[str]) -> str:
    """A table's columns, in quotes; it may have thousands."""
    return some([repr(name) for name in names], 30)
