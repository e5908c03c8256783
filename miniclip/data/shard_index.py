"""The index of shards: where each sample's members lie in its tar.

OUT/00000.npz    the key of each sample, and offset, size and CRC-32 of its members in the tar
OUT/index.json   the shards with their counts, sizes and checksums, and what was left out, by reason
OUT/rejected.csv what was left out, one a line; for tars from elsewhere only where something was"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..common.files import atomic_write, read_at, write_csv, write_text
from .reading.scan import IMAGE_SUFFIXES, TEXT_SUFFIXES, LeftOut

SCHEMA_VERSION = 2
INDEX_FILE, REJECTED_FILE, PLAN_FILE = "index.json", "rejected.csv", "plan.json"

KINDS = ("image", "txt", "json", "cls", "npy")


class Member(NamedTuple):
    """A file in a tar.

    Args:
        offset: where its content begins.
        size: its bytes.
        crc32: of the content; None if that was not read.
        is_text: whether the content is text; True if it was not read.
    """

    name: str
    offset: int
    size: int
    crc32: int | None = None
    is_text: bool = True


Sample = tuple[str, dict[str, Member]]  # its key, and its members by kind
_ABSENT = Member("", 0, 0, 0)
_LAST_BYTES = 1 << 16


@dataclass(frozen=True)
class Packed:
    """The result of `pack`: kept, held out and rejected add up to the pairs it was given, once no chunk is missing.

    Args:
        kept, held_out: samples in the shards; held out are those of `val_fraction`.
        missing: chunks or tars that other parts have not done yet; until then there is no folder, or no index.
        left_out: files, rows and members of the source that belong to no pair.
        turned: samples whose pixels were turned upright, as `Packing.upright` asks.
        damaged: tars that could not be indexed, each with the reason.
        unverified: shards without a checksum, as they were indexed by their headers.
        bytes_read, num_requests: what indexing took, in this call.
    """

    kept: int
    rejected: int
    shards: int
    size_bytes: int
    held_out: int = 0
    missing: int = 0
    left_out: int = 0
    turned: int = 0
    damaged: tuple[str, ...] = ()
    unverified: int = 0
    bytes_read: int = field(default=0, compare=False)
    num_requests: int = field(default=0, compare=False)


def kind_of(suffix: str) -> str | None:
    """The kind of a member by the suffix of its name, without the dot; None for one that is not known."""
    suffix = f".{suffix.lower()}"
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return "txt" if suffix in TEXT_SUFFIXES else suffix[1:] if suffix[1:] in KINDS else None


def check_part(part: tuple[int, int]) -> None:
    """
    Raises:
        ValueError: it is not one of 1/n to n/n.
    """
    number, count = part
    if not 1 <= number <= count:
        raise ValueError(f"part is {number}/{count}; it goes from 1/{count} to {count}/{count}")


def report_progress(progress: Callable[[int], None] | None, before: int, done: int) -> None:
    if progress:
        progress(before + done)


def write_index(folder: Path, entries: list[dict[str, Any]], facts: dict[str, Any], left_out: Counter[str]) -> None:
    """Writes `index.json` from the shards' entries.

    Args:
        facts: further keys of it.
        left_out: how many files, rows or members were left out, by reason.
    """
    samples = sum(entry["samples"] for entry in entries)
    members = Counter[str]()
    for entry in entries:
        members.update(entry.pop("members"))
    reasons = {"left_out": dict(left_out)} if left_out else {}
    index = {**facts, **reasons, "schema": SCHEMA_VERSION, "samples": samples, "members": members, "shards": entries}
    write_text(folder / INDEX_FILE, json.dumps(index, indent=1) + "\n")


def write_rejected(folder: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Writes `rejected.csv`: key, source and reason of each pair that was rejected, and of what belongs to no pair."""
    write_csv(folder / REJECTED_FILE, ("key", "source", "reason"), rows)


def rows_left_out(left_out: Iterable[LeftOut]) -> list[tuple[str, str, str]]:
    """The lines of `rejected.csv` for what belongs to no pair, which has no key."""
    return [
        ("", each.source, each.reason + (f", {each.count:,} of them" if each.count > 1 else "")) for each in left_out
    ]


def zeros_at(file: IO[bytes], size: int) -> int:
    """Where the zeros at a tar's end begin, as far as its last 64 KiB show; a tar is padded by up to 10 KiB."""
    start = max(0, size - _LAST_BYTES)
    return start + len(read_at(file, start, size - start).rstrip(b"\0"))


def index_entry(
    file: str, size: int, samples: Sequence[Sample], offsets: Path, checksum: str | None, zeros: int | None = None
) -> dict[str, Any]:
    """Writes the `.npz` of a tar's samples, and returns the tar's entry for `index.json`.

    Args:
        zeros: what `zeros_at` found: what is appended to a tar may lie there, and leave its size as it was.
    """
    found = Counter(kind for _, members in samples for kind in members)
    columns: dict[str, Any] = {}  # arrays
    for kind in KINDS:
        if kind in found or kind in ("image", "txt"):
            rows = [members.get(kind, _ABSENT) for _, members in samples]
            columns[kind] = np.array([(row.offset, row.size) for row in rows], dtype=np.int64).reshape(-1, 2)
            if all(row.crc32 is not None for row in rows):
                columns[f"{kind}_crc32"] = np.array([row.crc32 for row in rows], dtype=np.uint32)
    with atomic_write(offsets) as stream:
        np.savez(stream, key=np.array([key for key, _ in samples], dtype=np.str_), **columns)
    return {
        "file": file,
        "samples": len(samples),
        "bytes": size,
        "zeros_at": zeros,
        "sha256": checksum,
        "offsets": offsets.name,
        "offsets_sha256": hashlib.sha256(offsets.read_bytes()).hexdigest(),
        "members": dict(found),
    }
