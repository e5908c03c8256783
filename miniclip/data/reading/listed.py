"""A table that names pairs by their keys, put to the pairs of a source: what is known of each, or which to leave out.

`miniclip doctor` writes such tables. Their column `key` has the names of pairs; where a `source` stands beside it, a
row is about the pairs of that source alone. `sources.csv` beside them has the sources that were looked at."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...common.wording import columns_in_words, some
from .cells import has_no_value
from .pair import Pair, Pairs
from .scan import LeftOut, same_name
from .tables import read_table

SOURCES_FILE = "sources.csv"


@dataclass(frozen=True)
class Listed:
    """The rows of a table that are about the pairs of a source.

    Args:
        rows: by the index of the pair; of several rows about one pair, the first.
        unmatched: keys of this source that name no pair of it.
        elsewhere: how many rows are about pairs of other sources, by source.
    """

    rows: Mapping[int, Mapping[str, Any]]
    unmatched: tuple[str, ...]
    elsewhere: Mapping[str, int]


def rows_about(pairs: Pairs, table: str | Path, source: str, value: str | None = None) -> Listed:
    """
    Args:
        source: the pairs' own, as the user names it.
        value: a column that the table must have, in which rows about one pair must agree.

    Raises:
        ValueError: no table, one without its columns, a row without a key, rows that contradict each other, a key that
            several pairs or pairs of several parts have, or no row that is about a pair of these, unless doctor looked
            at them and found nothing (it looks for groups in train alone).
    """
    if Path(table).is_dir():
        tables = [path for path in (Path(table) / f"{name}.csv" for name in ("drop", "groups")) if path.is_file()]
        there = f"; name one of its tables: {' or '.join(map(str, tables))}" if tables else ", and no table"
        raise ValueError(f"{table} is a folder{there}")
    if not Path(table).is_file():
        raise ValueError(f"there is no file {table}; it should be a table with a column 'key', as doctor writes")
    columns, rows = read_table(Path(table))
    for name in ("key", *([value] if value else [])):
        if name not in columns:
            raise ValueError(f"{table} has no column {name!r}; its columns are {columns_in_words(columns)}")
    index_of: dict[str, list[int]] = defaultdict(list)
    in_parts: dict[str, str] = {}  # names by what follows their part
    for index, name in enumerate(pairs.names):
        index_of[_written(name)].append(index)
        in_parts[_written(name).partition(": ")[2]] = name
    found: dict[int, Mapping[str, Any]] = {}
    unmatched: list[str] = []
    elsewhere = Counter[str]()
    for number, row in enumerate(rows, start=1):
        key, about = str(row.get("key") or ""), str(row.get("source") or "")
        if not key:
            raise ValueError(f"{table}, row {number} has no key; each must name a pair of {source}")
        if about and not _is_same_place(about, source):
            elsewhere[about] += 1
        elif indices := index_of.get(_written(key)):
            if len(indices) > 1:
                raise ValueError(
                    f"{table}, row {number}: {len(indices)} pairs of {source} are called {key!r}, so which of them is "
                    "meant can't be known; give each a name of its own"
                )
            first = found.setdefault(indices[0], row)
            if value and first.get(value) != row.get(value):
                raise ValueError(
                    f"{table}, row {number}: {key} has the {value} {row.get(value)!r} and in a row before "
                    f"{first.get(value)!r}; it may have one"
                )
        elif _written(key) in in_parts:
            raise ValueError(
                f"{table}, row {number}: {key!r} is in several parts of {source}, so which pair is meant can't be "
                f"known; the one that is read here is called {in_parts[_written(key)]!r}"
            )
        else:
            unmatched.append(key)
    looked = _sources_beside(Path(table), "train" if value == "group" else None)
    _refuse_other_table(pairs, table, source, Listed(found, tuple(unmatched), elsewhere), looked)
    return Listed(found, tuple(dict.fromkeys(unmatched)), elsewhere)


def _written(name: str) -> str:
    """A name as it stands in a file of UTF-8, where bytes that are none are escapes."""
    return same_name(name).encode("utf-8", "backslashreplace").decode()


def _is_same_place(one: str, other: str) -> bool:
    with suppress(OSError, ValueError):  # what is no path
        return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())
    return False


def _refuse_other_table(pairs: Pairs, table: str | Path, source: str, listed: Listed, looked: Sequence[str]) -> None:
    if listed.rows or not (listed.unmatched or listed.elsewhere):
        return
    if not listed.unmatched and any(_is_same_place(each, source) for each in looked):
        return
    if listed.unmatched:
        own = f"; a pair of it is called {pairs.names[0]!r}" if len(pairs) else ""
        raise ValueError(f"no row of {table} names a pair of {source}: {some(listed.unmatched, 3)}{own}")
    raise ValueError(
        f"{table} is about {some(list(listed.elsewhere), 3)}, not about {source}. If that is the same under another "
        "name, take the column 'source' out of the table: keys alone are compared then"
    )


def _sources_beside(table: Path, part: str | None) -> list[str]:
    """The sources, of one part or of all, that doctor looked at for a table; none of a table that it did not write."""
    path = table.with_name(SOURCES_FILE)
    rows = read_table(path)[1] if path.is_file() else []
    return [str(row.get("source") or "") for row in rows if part in (None, row.get("part"))]


# ---------------------------------------------------------------------------------------------------------------------
# Leaving out


def without_listed(pairs: Pairs, listed: Listed) -> tuple[Pairs, Mapping[str, int]]:
    """The pairs that no row names, and the number of the others by their rows' column `reason`.

    Those are in the `left_out` of the pairs, so that packing lists them.

    Raises:
        ValueError: every pair is named.
    """
    reasons = {index: str(row.get("reason") or "listed") for index, row in listed.rows.items()}
    kept = [index for index in range(len(pairs)) if index not in reasons]
    if not kept and reasons:
        raise ValueError(f"the list names all of the {len(pairs)} pairs; none would be left")
    left_out = [LeftOut(pairs.names[index], f"dropped: {reasons[index]}") for index in sorted(reasons)]
    names = [pairs.names[index] for index in kept]

    def read(index: int) -> Pair:
        return pairs.read(kept[index])

    remaining = Pairs(names, read, pairs.found, pairs.files, [*pairs.left_out, *left_out])
    return remaining, dict(Counter(reasons.values()).most_common())


# ---------------------------------------------------------------------------------------------------------------------
# Groups


def with_groups(pairs: Pairs, listed: Listed, table: str | Path) -> Pairs:
    """The pairs, each with the `group` that its row gives it, and with an empty one if none does.

    Args:
        table: of the rows; a change to it makes the pairs others.
    """

    def read(index: int) -> Pair:
        pair, group = pairs.read(index), listed.rows.get(index, {}).get("group")
        return replace(pair, extra={**pair.extra, "group": None if has_no_value(group) else group})

    return Pairs(pairs.names, read, pairs.found, [*pairs.files, Path(table)], pairs.left_out)
