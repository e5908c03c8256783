"""The index of shards: where each sample's members lie in its tar.

OUT/00000.npz    the key of each sample, and offset, size and CRC-32 of its members in the tar
OUT/index.json   the shards with their counts, sizes and checksums, and what was left out, by reason
OUT/rejected.csv what was left out, one a line; for tars from elsewhere only where something was"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.cache import Cache
from ..common.files import atomic_write, write_text
from ..common.storage import check_scheme, expand, is_url
from .reading.cells import decode_text
from .reading.scan import LeftOut, is_leftover
from .tar_members import KINDS, Member, kind_of, read_samples

SCHEMA_VERSION = 2
INDEX_FILE, REJECTED_FILE, PLAN_FILE = "index.json", "rejected.csv", "plan.json"
_PARTIAL_FILE = "index.partial.jsonl"  # the tars that are indexed so far
_BUFFER_BYTES = 4 << 20


Extents = dict[str, tuple[int, int, int]]  # offset, size and CRC-32 of a sample's members, by kind


@dataclass(frozen=True)
class Packed:
    """The result of `pack`: kept, held out and rejected add up to the pairs it was given, once no chunk is missing.

    Args:
        kept, held_out: samples in the shards; held out are those of `val_fraction`.
        missing: chunks that other parts have not packed yet; until then the folder has not got its name.
        left_out: files, rows and members of the source that belong to no pair.
        damaged: tars that could not be indexed, each with the reason.
    """

    kept: int
    rejected: int
    shards: int
    size_bytes: int
    held_out: int = 0
    missing: int = 0
    left_out: int = 0
    damaged: tuple[str, ...] = ()


def report_progress(progress: Callable[[int], None] | None, before: int, done: int) -> None:
    if progress:
        progress(before + done)


class Tar:
    """A tar that is being written: hashed by a thread on its way to the disk, its members' offsets noted."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed below)
        self.buffer = bytearray()
        self.samples: list[tuple[str, Extents]] = []
        self.digest, self.hashing = hashlib.sha256(), ThreadPoolExecutor(1)
        self.hashed: deque[Future[None]] = deque()

    def write(self, key: str, members: dict[str, bytes]) -> None:
        extents: Extents = {}
        self.samples.append((key, extents))
        for suffix, data in members.items():
            header = tarfile.TarInfo(f"{key}.{suffix}")  # of time 0, so that the same pairs give the same bytes
            header.size = len(data)
            extents[str(kind_of(suffix))] = (self.size + tarfile.BLOCKSIZE, len(data), zlib.crc32(data))
            self._append(header.tobuf(tarfile.USTAR_FORMAT), data, b"\0" * (-len(data) % tarfile.BLOCKSIZE))

    def _append(self, *parts: bytes) -> None:
        for part in parts:
            self.buffer += part
            self.size += len(part)
        if len(self.buffer) >= _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        """In large pieces, so that the threads do not wait for each other at every one."""
        piece, self.buffer = memoryview(self.buffer), bytearray()
        self.hashed.append(self.hashing.submit(self.digest.update, piece))
        while piece:
            piece = piece[self.file.write(piece) :]
        if len(self.hashed) > 4:  # it must not fall behind by more than memory holds
            self.hashed.popleft().result()

    def close(self) -> dict[str, Any]:
        """Its entry for `index.json`."""
        end = 2 * tarfile.BLOCKSIZE
        self._append(b"\0" * (end + -(self.size + end) % tarfile.RECORDSIZE))
        self._flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.hashing.shutdown()
        return _index_entry(self.path, self.samples, self.path.with_suffix(".npz"), self.digest.hexdigest())


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
    with atomic_write(folder / REJECTED_FILE) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        csv.writer(text).writerows([("key", "source", "reason"), *rows])
        text.detach()


def rows_left_out(left_out: Iterable[LeftOut]) -> list[tuple[str, str, str]]:
    """The lines of `rejected.csv` for what belongs to no pair, which has no key."""
    return [
        ("", each.source, each.reason + (f", {each.count:,} of them" if each.count > 1 else "")) for each in left_out
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Tars from elsewhere


def index_shard(path: Path, offsets: Path) -> tuple[dict[str, Any], list[LeftOut]]:
    """Writes the `.npz` of a tar; returns the tar's entry for `index.json`, and the members that are left out.

    Raises:
        ValueError: it is no tar, or one that is damaged or cut short.
    """
    samples, left_out = read_samples(path)
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()

        def extent(kind: str, member: Member) -> tuple[int, int, int]:
            file.seek(member.offset)
            data = file.read(member.size)
            if kind == "txt":
                decode_text(data, member.name)
            return member.offset, member.size, zlib.crc32(data)

        found: list[tuple[str, Extents]] = []
        for key, sample in samples:
            try:
                found.append((key, {kind: extent(kind, member) for kind, member in sample.items()}))
            except ValueError:
                text = sample.pop("txt")
                left_out.append(LeftOut(text.name, "a text that is not UTF-8"))
                if "cls" in sample or "npy" in sample:  # labelled
                    found.append((key, {kind: extent(kind, member) for kind, member in sample.items()}))
                else:
                    left_out += [LeftOut(member.name, "a member whose text is not UTF-8") for member in sample.values()]
    return _index_entry(path, found, offsets, checksum), left_out


def _index_entry(path: Path, samples: list[tuple[str, Extents]], offsets: Path, checksum: str) -> dict[str, Any]:
    """Writes the `.npz` of a tar's samples, and returns the tar's entry for `index.json`."""
    found = Counter(kind for _, extents in samples for kind in extents)
    columns: dict[str, np.ndarray] = {}
    for kind in KINDS:
        if kind in found or kind in ("image", "txt"):
            rows = [extents.get(kind, (0, 0, 0)) for _, extents in samples]
            columns[kind] = np.array([row[:2] for row in rows], dtype=np.int64).reshape(-1, 2)
            columns[f"{kind}_crc32"] = np.array([row[2] for row in rows], dtype=np.uint32)
    with atomic_write(offsets) as file:
        np.savez(file, allow_pickle=False, key=np.array([key for key, _ in samples], dtype=np.str_), **columns)
    return {
        "file": path.name,
        "samples": len(samples),
        "bytes": path.stat().st_size,
        "sha256": checksum,
        "offsets": offsets.name,
        "offsets_sha256": hashlib.sha256(offsets.read_bytes()).hexdigest(),
        "members": dict(found),
    }


def index_shards(
    source: str,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    needs_all: bool = False,
) -> Packed:
    """Writes the index that shards from elsewhere (img2dataset's, say) lack.

    Damaged tars are left out and named. A repeated call goes on where one was interrupted, and adds the damaged tars
    of an earlier one that have been replaced.

    Args:
        source: a folder of tars, or tars themselves: "data/{00000..00099}.tar", "https://…/{0..9}.tar". Remote ones are
            fetched into the cache, where training finds them again.
        out: the folder for the index, which then stands for the shards; by default theirs.
        needs_all: raise if a tar is damaged, and write no index.

    Raises:
        ValueError: no tars there, none that is whole, an index that is there already, or remote tars and no `out`.
    """
    tars = tar_locations(source)
    if out is None and is_url(tars[0]):
        raise ValueError(f"{source} is remote; name a folder OUT here for its index, which then stands for the shards")
    folder = Path(tars[0]).parent if out is None else Path(out)
    known = {} if overwrite else _known_entries(folder)
    names = _offset_names(tars)
    for name in (*([] if known else [INDEX_FILE]), *(names[tar] for tar in tars if tar not in known)):
        if (folder / name).exists() and not overwrite:
            raise ValueError(f"{folder / name} exists already; pass --overwrite to write it anew")
    folder.mkdir(parents=True, exist_ok=True)
    if not known:
        for name in (INDEX_FILE, _PARTIAL_FILE):  # an old index must not be taken for that of the new offsets
            (folder / name).unlink(missing_ok=True)
    cache, damaged = Cache(), dict[str, str]()
    found: dict[str, dict[str, Any]] = {}
    with open(folder / _PARTIAL_FILE, "a", encoding="utf-8") as partial:
        for number, location in enumerate(tars):
            stamp = _stamp(location)
            if location in known and known[location]["stamp"] == stamp:
                found[location] = known[location]
            else:
                try:
                    found[location] = {**_index_location(location, folder / names[location], cache), "stamp": stamp}
                except (ValueError, OSError) as error:
                    damaged[location] = str(error)
                else:
                    partial.write(json.dumps({"tar": location, **found[location]}) + "\n")
                    partial.flush()
            report_progress(progress, number + 1, 0)
    if not found or (damaged and needs_all):
        (folder / _PARTIAL_FILE).unlink()
        how_many = f"{len(damaged)} of the {len(tars)} tars in {source} can't be indexed"
        raise ValueError(
            f"{how_many if found else f'no tar in {source} can be indexed'}: {'; '.join(damaged.values())}"
        )
    return _write_found(folder, source, found, damaged, is_beside=out is None)


def _index_location(location: str, offsets: Path, cache: Cache) -> dict[str, Any]:
    if not is_url(location):
        entry, left_out = index_shard(Path(location), offsets)
    else:
        with cache.open(location) as file:
            entry, left_out = index_shard(Path(file.name), offsets)
        cache.verified(location, entry["sha256"])
    name = location.rpartition("/")[2]
    return {"entry": entry, "left_out": [(f"{name}:{each.source}", each.reason, each.count) for each in left_out]}


def _write_found(
    folder: Path, source: str, found: dict[str, dict[str, Any]], damaged: dict[str, str], is_beside: bool
) -> Packed:
    entries, left_out = [], []
    for location, indexed in found.items():
        beside = is_beside or Path(location).parent.resolve() == folder.resolve()
        here = location if is_url(location) else str(Path(location).resolve())
        file = Path(location).name if beside and not is_url(location) else here
        entries.append({**indexed["entry"], "file": file, "stamp": indexed["stamp"]})
        left_out += [LeftOut(*each) for each in indexed["left_out"]]
    counts = Counter[str]()
    for each in left_out:
        counts[each.reason] += each.count
    if damaged or left_out:
        rows = [("", location.rpartition("/")[2], reason) for location, reason in damaged.items()]
        write_rejected(folder, rows + rows_left_out(left_out))
    else:
        (folder / REJECTED_FILE).unlink(missing_ok=True)
    facts = {"source": source} | ({"damaged": damaged} if damaged else {})
    samples, size = sum(entry["samples"] for entry in entries), sum(entry["bytes"] for entry in entries)
    write_index(folder, entries, facts, counts)
    if not damaged:  # else the next call reads from it what is indexed
        (folder / _PARTIAL_FILE).unlink()
    return Packed(samples, 0, len(entries), size, left_out=counts.total(), damaged=tuple(damaged.values()))


def _known_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What an earlier call has indexed that was interrupted, or that met damaged tars, by the tars' locations."""
    known: dict[str, dict[str, Any]] = {}
    try:
        lines = (folder / _PARTIAL_FILE).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            indexed = json.loads(line)
            entry = indexed["entry"]
            offsets = (folder / entry["offsets"]).read_bytes()
            if hashlib.sha256(offsets).hexdigest() == entry["offsets_sha256"]:
                known[indexed.pop("tar")] = indexed
        except (ValueError, KeyError, TypeError, OSError):
            continue  # the last line of a call that was killed, or offsets that are gone
    return known


def _stamp(location: str) -> list[int] | None:
    """Size and time of a local tar, which change when it is replaced."""
    if is_url(location):
        return None
    facts = Path(location).stat()
    return [facts.st_size, facts.st_mtime_ns]


def _offset_names(tars: list[str]) -> dict[str, str]:
    """The `.npz` of each tar: of its name, or of its number where several have one name."""
    stems = Counter(Path(tar).stem for tar in tars)
    return {
        tar: f"{Path(tar).stem}.npz" if stems[Path(tar).stem] == 1 else f"{number:05d}-{Path(tar).stem}.npz"
        for number, tar in enumerate(tars)
    }


def tar_locations(source: str) -> list[str]:
    """The tars that a folder or a pattern stands for, sorted.

    Raises:
        ValueError: none.
    """
    if not is_url(source) and Path(source).is_dir():
        found = [str(path) for path in sorted(Path(source).glob("*.tar")) if not is_leftover(path.name)]
        if not found:
            raise ValueError(f"{source} holds no .tar")
        return found
    found = expand(source)
    for location in found:
        check_scheme(location)
        if not location.endswith(".tar"):
            raise ValueError(f"{location} is no .tar; give a folder of them, or a pattern as data/{{00000..00099}}.tar")
        if not is_url(location) and not Path(location).is_file():
            raise ValueError(f"there is no file {location}")
    return found
