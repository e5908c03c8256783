"""What lies in some sources now, compared with what an index knows of them: new, changed, moved, gone.

A picture is known by its key (the path, the URL, or its place in a table or a tar), and has a stamp that changes
whenever the picture may have: size and times of a file, the identity of the table or the shards that hold it. Pictures
of another stamp are compared by content, so that a copied disk or a renamed folder costs reading and no encoding.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from ...common.files import expand_home
from ...common.storage import is_url, read_bytes
from ...data.reading.huggingface import HUB_PREFIX
from ...data.reading.scan import IMAGE_SUFFIXES, LeftOut
from ...evaluation.datasets.sets import EvaluationSet
from ..names import STANDARD_INPUT, existing, key_without_folder, split_key
from ..sources import TWICE, image_set
from .columns import why_left_out

At = tuple[int, int]  # the number of a listing, and the index of a picture in it
BY_NAME = "-"  # the source of pictures that were named one by one
_RACY_NS = 2 * 10**9  # a file may change twice within the step of a disk's clock
_FILES_AT_ONCE = 4096


# ---------------------------------------------------------------------------------------------------------------------
# What lies in a source


@dataclass(frozen=True)
class Listing:
    """The pictures of a source, without their bytes.

    Args:
        source: the folder, pattern, table, … as an absolute path; `BY_NAME` for pictures that were named one by one.
        data: they can be read from here.
        keys, paths: N of each; a picture in a table or in shards has no path.
        stamps: N; empty for a file that was modified a moment ago, and for one that is not there.
    """

    source: str
    data: EvaluationSet
    keys: list[str]
    paths: list[str | None]
    stamps: list[str]

    @property
    def is_folder(self) -> bool:
        return not is_url(self.source) and Path(self.source).is_dir()

    def content(self, index: int) -> str | None:
        """A digest of the picture's bytes; None if they can't be read, and for a URL, which would be fetched."""
        path = self.paths[index]
        if path is not None and is_url(path):
            return None
        try:
            image = Path(path) if path is not None else self.data.images[index]
            data = image if isinstance(image, bytes) else read_bytes(image)
        except (OSError, ValueError, TypeError):
            return None
        return hashlib.blake2b(data, digest_size=16).hexdigest()

    def contents(self, indices: Sequence[int]) -> list[str | None]:
        if any(self.paths[index] is None for index in indices):  # shards and tables are read by one thread
            return [self.content(index) for index in indices]
        with ThreadPoolExecutor() as threads:
            return list(threads.map(self.content, indices))

    def keys_before(self, index: int) -> list[str]:
        """The keys that earlier versions gave a sample, without the folder of the source that its tar lies in, and a
        row of a folder that was named from within, as "." or "..": its own name was left out."""
        place, rest = split_key(self.keys[index])
        if place == self.source:
            return [_in_folder_of(self.source, f"{name}{rest}") for name in ("", ".", "..")]
        return [_in_folder_of(self.source, key_without_folder(self.keys[index]))] if place else []

    @cached_property
    def _index_of(self) -> dict[str, int]:
        """The first picture of each key."""
        return {key: index for index, key in reversed([*enumerate(self.keys)])}

    @cached_property
    def _indices_before(self) -> dict[str, list[int]]:
        """The pictures by the keys that they may have had before."""
        found: dict[str, list[int]] = defaultdict(list)
        for index in range(len(self.keys)):
            for key in self.keys_before(index):
                found[key].append(index)
        return dict(found)

    def place_of(self, key: str, content: str | None) -> int:
        """The index of a row's picture.

        Raises:
            ValueError: it is not there, or has a key of earlier versions and is not the only one that had that.
        """
        if key in self._index_of:
            return self._index_of[key]
        before = self._indices_before.get(key)
        if before is None:
            raise ValueError(f"{key} is no longer in {self.source}")
        found = [index for index in before if content is not None and self.content(index) == content]
        if not found:
            raise ValueError(
                f"{key} was indexed by an earlier version, and is another picture in {self.source} now; update the "
                "index from there"
            )
        return found[0]

    def has_changed(self, index: int) -> bool:
        """Whether a file has another size, or other times, than when it was listed."""
        path, stamp = self.paths[index], self.stamps[index]
        return bool(path is not None and not is_url(path) and stamp and file_stamp(path, racy_ns=0) != stamp)


def list_sources(
    sources: Sequence[str],
    *,
    image_column: str | None = None,
    stdin: BinaryIO | None = None,
    num_known: Mapping[str, int] | None = None,
    accept_gone: bool = False,
    upright: bool = False,
) -> list[Listing]:
    """The pictures of sources as `image_set` takes them; files that are named one by one are in one listing.

    Args:
        num_known: how many pictures an index has from each source.
        upright: as that of `image_set`.
        accept_gone: a source that is known, and now is not there or holds no pictures, has an empty listing.

    Raises:
        ValueError: a source is not there, or holds no pictures.
    """
    by_name = [source for source in sources if source == STANDARD_INPUT or _is_picture(source)]
    others = [source for source in dict.fromkeys(sources) if source not in set(by_name)]
    named = {absolute(source): [source] for source in others} | ({BY_NAME: by_name} if by_name else {})
    listings = []
    for source, names in named.items():
        known = 0 if num_known is None or source == BY_NAME else num_known.get(source, 0)
        try:
            listings.append(_list_source(source, names, image_column, upright, stdin))
        except ValueError as error:
            if not known:
                raise
            if not accept_gone:
                raise ValueError(f"{error}; {refusal(source, known, known)}") from error
            listings.append(Listing(source, EvaluationSet(source, ()), [], [], []))
    return listings


def absolute(source: str) -> str:
    """A name that means the same in every folder."""
    if source == STANDARD_INPUT or is_url(source) or source.startswith(HUB_PREFIX):
        return source
    return os.path.abspath(existing(source) or expand_home(source))  # noqa: PTH100 (links stay as they are)


def _is_picture(source: str) -> bool:
    return Path(source).suffix.lower() in IMAGE_SUFFIXES and not (is_url(source) or Path(source).is_dir())


def _list_source(
    source: str, named: Sequence[str], image_column: str | None, upright: bool, stdin: BinaryIO | None
) -> Listing:
    data = image_set(named, image_column=image_column, is_each_once=True, upright=upright, stdin=stdin)
    reasons = {name: why for name, values in data.metadata.items() if (why := why_left_out(values))}
    kept = {name: values for name, values in data.metadata.items() if name not in reasons}
    left_out = [LeftOut(source, f"column {name!r}, {why}") for name, why in reasons.items()]
    data = replace(data, metadata=kept, left_out=[*data.left_out, *left_out])
    places = [_location(data, index) for index in range(len(data))]
    keys = [place or _absolute_key(source, data.key(index)) for index, place in enumerate(places)]
    stamps = [data.identity or "" if place is None else file_stamp(place) for place in places]
    return Listing(source, data, keys, places, stamps)


def _absolute_key(source: str, key: str) -> str:
    """Of a picture in a tar by where that lies, of one in a table by the source, which is the table; a set of
    `datasets` has its name."""
    place, rest = split_key(key)
    if place.endswith(".tar"):
        return key if is_url(place) else f"{os.path.abspath(place)}{rest}"  # noqa: PTH100 (links stay as they are)
    is_table = bool(place) and Path(place).name in ("", "..", os.path.basename(source))  # noqa: PTH119
    return f"{source}{rest}" if is_table else _in_folder_of(source, key)


def _in_folder_of(source: str, name: str) -> str:
    return os.path.join(source if is_url(source) else os.path.dirname(source), name)  # noqa: PTH118, PTH120


def _location(data: EvaluationSet, index: int) -> str | None:
    """The absolute path or the URL of a picture that has one."""
    if data.identity is not None:
        return None
    image = data.images[index]
    if isinstance(image, str) and is_url(image):
        return image
    return os.path.abspath(image) if isinstance(image, str | Path) else None  # noqa: PTH100


def file_stamp(path: str, racy_ns: int = _RACY_NS) -> str:
    """Changes whenever a file may have; empty for one that is not there, or was modified within the last `racy_ns`."""
    if is_url(path):
        return "address"  # what lies at an address is taken to stay the same
    try:
        facts = os.stat(path)  # noqa: PTH116 (a million times)
    except OSError:
        return ""
    if time.time_ns() - facts.st_mtime_ns < racy_ns:
        return ""
    # A file that takes another's name keeps its own size and time of modification, and gets a new time of change.
    return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}"


# ---------------------------------------------------------------------------------------------------------------------
# What is different


@dataclass
class Changes:
    """What an update does. Pictures are (listing, index); rows are numbered as in the table of those known.

    Args:
        new, changed: to be encoded; the changed ones replace a row of the same key.
        moved: the row whose picture has the same content, under another name.
        touched: the row of the picture itself, whose time, or what else is known of it, is another.
        gone: keys of rows whose picture is no longer there.
        unreachable: keys of rows whose picture can't be looked at, which stay.
        unchanged: how many rows stay as they are.
        contents: digests that were computed on the way.
        left_out: of all sources, and what is in one of them twice.
    """

    new: list[At] = field(default_factory=list)
    changed: list[At] = field(default_factory=list)
    moved: dict[At, int] = field(default_factory=dict)
    touched: dict[At, int] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)
    unchanged: int = 0
    contents: dict[At, str | None] = field(default_factory=dict)
    left_out: list[LeftOut] = field(default_factory=list)


@dataclass(frozen=True)
class Known:
    """The rows of an index, without features: N of each."""

    keys: list[str]
    paths: list[str | None]
    sources: list[str]
    stamps: list[str]
    contents: list[str | None]


def keys_from_before(listings: Sequence[Listing], known: Known) -> dict[int, At]:
    """Where the pictures are listed of rows that have a key of earlier versions, as `Listing.keys_before` has them."""
    taken = {*known.keys}
    found: dict[int, At] = {}
    for number, listing in enumerate(listings):
        now = {*listing.keys}
        rows = {
            key: row
            for row, key in enumerate(known.keys)
            if known.sources[row] == listing.source and known.paths[row] is None and key not in now
        }
        for index, key in enumerate(listing.keys if rows else ()):
            before = () if key in taken else listing.keys_before(index)
            row = next((rows.pop(each) for each in before if each in rows), None)
            if row is not None:
                found[row] = number, index
    return found


def find_changes(
    listings: Sequence[Listing],
    known: Known,
    other_facts: Set[At] = frozenset(),
    *,
    accept_gone: bool = False,
) -> Changes:
    """
    Args:
        other_facts: pictures whose metadata are not those of their row.
        accept_gone: go on where more than half of a source is gone.

    Raises:
        ValueError: more than half of a source is gone, as where a disk is not mounted.
    """
    changes = Changes(left_out=[each for listing in listings for each in listing.data.left_out])
    row_of = {key: row for row, key in enumerate(known.keys)}
    rows_by_content = {content: row for row, content in enumerate(known.contents) if content}
    sizes = {_size_in(stamp) for stamp in known.stamps} - {""}
    listed: dict[str, At] = {}
    to_compare: list[At] = []
    for number, listing in enumerate(listings):
        for index, key in enumerate(listing.keys):
            if key in listed:  # of another listing it is the same picture
                if listed[key][0] == number:
                    changes.left_out.append(LeftOut(key, TWICE))
                continue
            at = listed[key] = number, index
            row = row_of.get(key)
            if row is not None and listing.stamps[index] and known.stamps[row] == listing.stamps[index]:
                if at in other_facts:
                    changes.touched[at] = row
                else:
                    changes.unchanged += 1
            elif row is not None or _size_of(listing, index) in sizes:
                to_compare.append(at)
            else:
                changes.new.append(at)
    _compare(listings, known, to_compare, row_of, rows_by_content, other_facts, changes)
    _find_gone(listings, known, listed, changes, accept_gone)
    return changes


def _size_in(stamp: str) -> str:
    size, space, _ = stamp.partition(" ")
    return size if space and size.isdigit() else ""


def _size_of(listing: Listing, index: int) -> str:
    """The size by which a picture may be one that is known; of a file that was modified a moment ago, too."""
    path = listing.paths[index]
    return "" if path is None or is_url(path) else _size_in(file_stamp(path, racy_ns=0))


def _compare(
    listings: Sequence[Listing],
    known: Known,
    pictures: Sequence[At],
    row_of: Mapping[str, int],
    rows_by_content: Mapping[str, int],
    other_facts: Set[At],
    changes: Changes,
) -> None:
    """Sorts pictures of another stamp, or of a new name and a known size, by their content."""
    for at, content in _contents_of(listings, pictures):
        number, index = at
        listing = listings[number]
        changes.contents[at] = content
        row = row_of.get(listing.keys[index])
        other = rows_by_content.get(content) if content else None
        if row is not None and content and known.contents[row] == content:
            if listing.stamps[index] != known.stamps[row] or at in other_facts:
                changes.touched[at] = row
            else:
                changes.unchanged += 1
        elif other is not None:
            changes.moved[at] = other
        elif row is not None:
            changes.changed.append(at)
        else:
            changes.new.append(at)
    changes.new.sort()


def _contents_of(listings: Sequence[Listing], pictures: Sequence[At]) -> Iterable[tuple[At, str | None]]:
    for number, listing in enumerate(listings):
        own = [index for each, index in pictures if each == number]
        for start in range(0, len(own), _FILES_AT_ONCE):
            part = own[start : start + _FILES_AT_ONCE]
            yield from zip([(number, index) for index in part], listing.contents(part), strict=True)


def _find_gone(
    listings: Sequence[Listing],
    known: Known,
    listed: Mapping[str, At],
    changes: Changes,
    accept_gone: bool,
) -> None:
    kept_contents = {known.contents[row] for row, key in enumerate(known.keys) if key in listed}
    kept_contents |= {known.contents[row] for row in changes.moved.values()}
    for listing in listings:
        rows = _rows_of(listing, known)
        missing = [row for row in rows if known.keys[row] not in listed]
        states = [_state(known.paths[row]) for row in missing]
        changes.unreachable += [known.keys[r] for r, state in zip(missing, states, strict=True) if state == "unknown"]
        is_list = listing.source == BY_NAME  # it need not be whole
        gone = [
            row
            for row, state in zip(missing, states, strict=True)
            if state == "absent" or (state == "there" and not is_list and known.sources[row] == listing.source)
        ]
        lost = [row for row in gone if not known.contents[row] or known.contents[row] not in kept_contents]
        if 2 * len(lost) > len(rows) and not accept_gone:
            raise ValueError(refusal(listing.source, len(lost), len(rows)))
        changes.gone += [known.keys[row] for row in gone]
    # What was found under another name, and is no longer where it was: of another source, too, as a renamed folder.
    contents = {known.contents[row] for row in changes.moved.values()}
    elsewhere = [row for row, key in enumerate(known.keys) if known.contents[row] in contents and key not in listed]
    changes.gone += [known.keys[row] for row in elsewhere if _state(known.paths[row]) == "absent"]
    changes.gone = list(dict.fromkeys(changes.gone))


def refusal(source: str, num_gone: int, num_known: int) -> str:
    what = "what was named before" if source == BY_NAME else source
    return (
        f"{num_gone:,} of {num_known:,} pictures that the index has from {what} are gone; that may be a disk that is "
        "not mounted, so nothing was changed; --accept-gone removes them"
    )


def _rows_of(listing: Listing, known: Known) -> list[int]:
    """The rows that a source answers for: its own, and those of files below a folder."""
    own = [row for row, source in enumerate(known.sources) if source == listing.source]
    if not listing.is_folder:
        return own
    prefix = listing.source.rstrip("/") + "/"
    below = [row for row, path in enumerate(known.paths) if path and path.startswith(prefix)]
    return sorted({*own, *below})


def _state(path: str | None) -> str:
    """Whether a picture is "there" (or its source alone knows), "absent", or "unknown", as behind a broken disk."""
    if path is None or is_url(path):
        return "there"
    try:
        os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError):
        return "absent"
    except (OSError, ValueError):
        return "unknown"
    return "there"
