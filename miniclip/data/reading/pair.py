"""A pair, a sequence of pairs, and what was left out on the way to them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .scan import LeftOut


@dataclass(frozen=True)
class Pair:
    """One image with its captions, not yet looked at.

    Args:
        source: the name by which the user knows it, for messages.
        image: the file, its URL, or its bytes.
        captions: texts of one caption each; blank ones do not count.
        problem: the reason why it can't be used, where that is known already.
        extra: other facts about it; they go into the sample's `.json`.
    """

    source: str
    image: Path | str | bytes | None = None
    captions: tuple[str, ...] = ()
    problem: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Pairs(Sequence[Pair]):
    """Pairs by index, each read when it is asked for.

    Args:
        names: the name by which the user knows each.
        read: returns the pair of an index; called from several threads at once.
        found: what was recognised in the source, for the user to check.
        files: the files it is read from, as far as they are known; a change to one makes it another source.
        left_out: files, rows and members of the source that belong to no pair.
    """

    def __init__(
        self,
        names: Sequence[str],
        read: Callable[[int], Pair],
        found: str,
        files: Iterable[Path] = (),
        left_out: Sequence[LeftOut] = (),
    ) -> None:
        self.names, self.read, self.found, self.files, self.left_out = names, read, found, files, tuple(left_out)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.read(i) for i in range(len(self))[index]]
        return self.read(range(len(self))[index])


def fingerprint(pairs: Sequence[Pair], *, is_of_disk: bool = False) -> str:
    """Equal for a source that lists the same pairs in the same order, from files of the same size and time.

    Args:
        is_of_disk: files have the same times of change, too, which no program can set: not so on a copy.
    """
    names: Iterable[str] = pairs.names if isinstance(pairs, Pairs) else (pair.source for pair in pairs)
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
    for path in pairs.files if isinstance(pairs, Pairs) else ():
        try:
            facts = path.stat()
            changed = f" {facts.st_ctime_ns}" if is_of_disk else ""
            digest.update(f"{facts.st_size} {facts.st_mtime_ns}{changed}\0".encode())
        except (OSError, ValueError):
            digest.update(b"absent\0")
    for each in pairs.left_out if isinstance(pairs, Pairs) else ():
        digest.update(f"{each.source}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
