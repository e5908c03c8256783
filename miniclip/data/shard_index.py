"""The index of a shard: where each sample's members lie in its tar.

OUT/00000.npz    the key of each sample, and offset and size of its members in the tar
OUT/index.json   the shards with their counts, sizes and checksums"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.cache import Cache
from ..common.files import atomic_write, write_text
from ..common.storage import check_scheme, expand, is_url
from .reading.scan import IMAGE_SUFFIXES

SCHEMA_VERSION = 2
INDEX_FILE, REJECTED_FILE, PLAN_FILE = "index.json", "rejected.csv", "plan.json"
_MEMBERS = ("image", "txt", "json", "cls", "npy")
_BUFFER_BYTES = 4 << 20


@dataclass(frozen=True)
class Packed:
    """What `pack` did: kept, held out and rejected add up to the pairs it was given, once no chunk is missing.

    Args:
        kept, held_out: samples in the shards; held out are those of `val_fraction`.
        missing: chunks that other parts have not packed yet; until then the folder has not got its name.
    """

    kept: int
    rejected: int
    shards: int
    size_bytes: int
    held_out: int = 0
    missing: int = 0


def report_progress(progress: Callable[[int], None] | None, before: int, done: int) -> None:
    if progress:
        progress(before + done)


class Tar:
    """A tar that is being written: hashed by a thread on its way to the disk, its members' places noted."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed below)
        self.buffer = bytearray()
        self.places: dict[str, dict[str, tuple[int, int]]] = {}
        self.digest, self.hashing = hashlib.sha256(), ThreadPoolExecutor(1)
        self.hashed: deque[Future[None]] = deque()

    def write(self, key: str, members: dict[str, bytes]) -> None:
        self.places[key] = {}
        for suffix, data in members.items():
            header = tarfile.TarInfo(f"{key}.{suffix}")  # of time 0, so that the same pairs give the same bytes
            header.size = len(data)
            self.places[key][_kind(suffix)] = (self.size + tarfile.BLOCKSIZE, len(data))
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
        return _index_entry(self.path, self.places, self.path.with_suffix(".npz"), self.digest.hexdigest())


def write_index(folder: Path, entries: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    samples = sum(entry["samples"] for entry in entries)
    members = Counter[str]()
    for entry in entries:
        members.update(entry.pop("members"))
    index = {**facts, "schema": SCHEMA_VERSION, "samples": samples, "members": members, "shards": entries}
    write_text(folder / INDEX_FILE, json.dumps(index, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Indexing


def index_shard(path: Path, offsets: Path) -> dict[str, Any]:
    """Writes the `.npz` that belongs to a tar, and returns the tar's entry for `index.json`.

    Raises:
        ValueError: it is no tar, or one that is cut short.
    """
    places: dict[str, dict[str, tuple[int, int]]] = {}
    size = path.stat().st_size
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                end = member.offset_data + member.size
                if end > size:
                    raise ValueError(f"{path} is cut short: {member.name} should end at byte {end}")
                folder, slash, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")  # as webdataset does: up to the name's first dot
                places.setdefault(folder + slash + key, {})[_kind(suffix)] = (member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is no tar, or a damaged or compressed one: {error}") from error
    with open(path, "rb") as tar_file:
        tar_file.seek(end + -end % tarfile.BLOCKSIZE)
        if tar_file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise ValueError(f"{path} is cut short: it lacks the zeros at its end")
        tar_file.seek(0)
        checksum = hashlib.file_digest(tar_file, "sha256").hexdigest()
    return _index_entry(path, places, offsets, checksum)


def _kind(suffix: str) -> str:
    """What a member is, by its suffix."""
    return "image" if f".{suffix.lower()}" in IMAGE_SUFFIXES else suffix.lower()


def _index_entry(
    path: Path, places: dict[str, dict[str, tuple[int, int]]], offsets: Path, checksum: str
) -> dict[str, Any]:
    """Writes the `.npz`; `places` has offset and size of each member, by key and kind."""
    # A tar from elsewhere may hold notes, or a Mac's ._files; a sample has an image or a text.
    places = {
        key: members
        for key, members in places.items()
        if key.rpartition("/")[2] and ("image" in members or "txt" in members)
    }
    found = Counter(kind for members in places.values() for kind in members)
    columns = {
        kind: np.array([members.get(kind, (0, 0)) for members in places.values()], dtype=np.int64).reshape(-1, 2)
        for kind in _MEMBERS
        if kind in found or kind in ("image", "txt")
    }
    with atomic_write(offsets) as file:
        np.savez(file, allow_pickle=False, key=np.array(list(places), dtype=np.str_), **columns)
    return {
        "file": path.name,
        "samples": len(places),
        "bytes": path.stat().st_size,
        "sha256": checksum,
        "offsets": offsets.name,
        "offsets_sha256": hashlib.sha256(offsets.read_bytes()).hexdigest(),
        "members": dict(found),
    }


def index_shards(
    source: str, out: str | Path | None = None, overwrite: bool = False, progress: Callable[[int], None] | None = None
) -> Packed:
    """Writes the index that shards from elsewhere (img2dataset's, say) lack.

    Args:
        source: a folder of tars, or tars themselves: "data/{00000..00099}.tar", "https://…/{0..9}.tar". Remote ones are
            fetched into the cache, where training finds them again.
        out: the folder for the index, which then stands for the shards; by default theirs.

    Raises:
        ValueError: no tars there, one that is damaged, an index that is there already, or remote tars and no `out`.
    """
    tars = tar_locations(source)
    if out is None and is_url(tars[0]):
        raise ValueError(f"{source} is remote; name a folder OUT here for its index, which then stands for the shards")
    folder = Path(tars[0]).parent if out is None else Path(out)
    for name in (INDEX_FILE, *(f"{number:05d}.npz" for number in range(len(tars)))):
        if (folder / name).exists() and not overwrite:
            raise ValueError(f"{folder / name} exists already; pass --overwrite to write it anew")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX_FILE).unlink(missing_ok=True)  # an old one must not be taken for that of the new offsets
    cache = Cache()
    entries = []
    for number, location in enumerate(tars):
        offsets = folder / f"{number:05d}.npz"
        if is_url(location):
            with cache.open(location) as file:
                entry = index_shard(Path(file.name), offsets)
            cache.verified(location, entry["sha256"])
        else:
            entry = index_shard(Path(location), offsets)
        is_beside = out is None or Path(location).parent.resolve() == folder.resolve()
        here = location if is_url(location) else str(Path(location).resolve())
        entries.append({**entry, "file": Path(location).name if is_beside and not is_url(location) else here})
        report_progress(progress, number + 1, 0)
    write_index(folder, entries, {"source": source})
    return Packed(sum(e["samples"] for e in entries), 0, len(entries), sum(e["bytes"] for e in entries))


def tar_locations(source: str) -> list[str]:
    """The tars that a folder or a pattern stands for.

    Raises:
        ValueError: none.
    """
    if not is_url(source) and Path(source).is_dir():
        found = [str(path) for path in sorted(Path(source).glob("*.tar"))]
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
