"""Shards read at random: any sample, here or at a URL."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..common.cache import Cache
from ..common.storage import check_scheme, exists, expand, is_url, join, read_bytes
from .reading.cells import captions_in
from .shard_index import INDEX_FILE, SCHEMA_VERSION, tar_locations

_OPEN_SHARDS, _KNOWN_SHARDS = 64, 512  # whose files are open, and whose offsets are in memory


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class ShardEntry:
    """One line of `index.json`.

    Args:
        file: the tar, beside the index or anywhere; may be a URL.
        offsets: the `.npz` with its members' places, beside the index.
        offsets_sha256: of that, so that a copy kept of an older one is not taken for it.
        folder: where the index is.
    """

    file: str
    samples: int
    bytes: int
    sha256: str
    offsets: str
    offsets_sha256: str
    folder: str

    @property
    def name(self) -> str:
        return self.file.rpartition("/")[2]

    @property
    def location(self) -> str:
        if is_url(self.file) or (self.file.startswith("/") and not is_url(self.folder)):
            return self.file
        return join(self.folder, self.file)


@dataclass(frozen=True)
class Record:
    """One sample as it lies in its shard, not decoded."""

    key: str
    image: bytes
    captions: tuple[str, ...]


class Shards:
    """Random access to the samples of some shards, by number, 0 to len - 1.

    Opening reads `index.json` alone; a shard's offsets are read when it is first needed, and the files of the
    64 shards last used are kept open. Remote shards are fetched once for all processes of a machine.

    Args:
        sources: a folder with an index, here or at a URL; a pattern of tars in such a folder,
            "data/{00000..00009}.tar"; or several of either, whose samples are numbered one after the other.
        needs_captions: refuse shards that have none, as those of labelled images; for training they are of no use.

    Raises:
        ValueError: no index, one that this version can't read, or shards without captions.
    """

    def __init__(
        self, sources: str | Path | Sequence[str | Path], cache: Cache | None = None, needs_captions: bool = True
    ) -> None:
        self.cache = cache or Cache()
        self.entries: list[ShardEntry] = []
        self.num_shards: list[int] = []  # of each source
        for source in [sources] if isinstance(sources, str | Path) else sources:
            entries = _open_source(str(source), needs_captions)
            self.entries += entries
            self.num_shards.append(len(entries))
        self.counts = np.array([entry.samples for entry in self.entries], dtype=np.int64)
        self._ends = np.cumsum(self.counts)
        self._offsets: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()  # packing reads in threads
        self._open: OrderedDict[int, tuple[IO[bytes], dict[str, np.ndarray]]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        # File handles stay in their process.
        return {**self.__dict__, "_open": OrderedDict(), "_offsets": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_lock": threading.Lock()}

    def locate(self, number: int) -> tuple[int, int]:
        """The shard of a sample, and its place there."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, number - int(self._ends[shard] - self.counts[shard])

    def __getitem__(self, number: int) -> Record:
        """The sample's bytes and captions.

        Raises:
            ValueError: the tar is shorter than its index says, or has been taken away.
        """
        shard, place = self.locate(number)
        file, offsets = self._shard(shard)
        key = str(offsets["key"][place])
        image, text = (self._read(file, key, *offsets[kind][place]) for kind in ("image", "txt"))
        return Record(key, image, tuple(captions_in(text.decode("utf-8", errors="replace"))))

    def info(self, number: int) -> dict[str, Any]:
        """What the sample's `.json` says, and its `.cls`; empty if it has neither.

        Raises:
            ValueError: as for the sample itself, or it is not JSON.
        """
        found = {kind: self.read(number, kind) for kind in ("json", "cls")}
        values = json.loads(found["json"]) if found["json"] else {}
        facts = values if isinstance(values, dict) else {}
        return {"cls": found["cls"].decode("utf-8", "replace").strip()} | facts if found["cls"] else facts

    def read(self, number: int, kind: str) -> bytes:
        """One member of a sample, by its suffix ("cls", "json", "npy", "txt") or "image"; empty if it has none.

        Raises:
            ValueError: as for the sample itself.
        """
        shard, place = self.locate(number)
        file, offsets = self._shard(shard)
        return self._read(file, str(offsets["key"][place]), *offsets[kind][place]) if kind in offsets else b""

    def keys(self, shard: int) -> list[str]:
        """The keys of a shard's samples, in order; the tar itself is not touched."""
        return [str(key) for key in self._read_offsets(self.entries[shard])["key"]]

    def _shard(self, shard: int) -> tuple[IO[bytes], dict[str, np.ndarray]]:
        with self._lock:
            return self._opened(shard)

    def _opened(self, shard: int) -> tuple[IO[bytes], dict[str, np.ndarray]]:
        if shard not in self._open:
            entry = self.entries[shard]
            if shard not in self._offsets:
                self._offsets[shard] = self._read_offsets(entry)
                if len(self._offsets) > _KNOWN_SHARDS:
                    self._offsets.popitem(last=False)
            self._offsets.move_to_end(shard)
            offsets = self._offsets[shard]
            try:
                if is_url(entry.location):
                    file = self.cache.open(entry.location, entry.bytes, entry.sha256)
                else:
                    file = open(entry.location, "rb")  # noqa: SIM115 (closed when 64 others are in use)
            except OSError as error:
                raise ValueError(f"shard {entry.location} can't be read: {error}") from error
            self._open[shard] = (file, offsets)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)  # closed when no thread reads from it any more
        self._open.move_to_end(shard)
        return self._open[shard]

    def _read_offsets(self, entry: ShardEntry) -> dict[str, np.ndarray]:
        path = join(entry.folder, entry.offsets)
        try:
            with self.cache.open(path, sha256=entry.offsets_sha256) if is_url(path) else open(path, "rb") as file:
                data = file.read()
            if hashlib.sha256(data).hexdigest() != entry.offsets_sha256:
                raise ValueError(f"it is not the one that {INDEX_FILE} was written with")
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                offsets = {name: arrays[name] for name in ("key", "image", "txt", *arrays)}
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged or gone ({error}); pack the shards again") from error
        if any(len(column) != entry.samples for column in offsets.values()):
            raise ValueError(
                f"{path} lists {len(offsets['key'])} samples, {INDEX_FILE} {entry.samples}; pack the shards again"
            )
        return offsets

    @staticmethod
    def _read(file: IO[bytes], key: str, offset: int, size: int) -> bytes:
        if not size:
            return b""
        header = tarfile.BLOCKSIZE
        # No shared position: safe across forked workers.
        data = os.pread(file.fileno(), int(size) + header, int(offset) - header)
        if len(data) != size + header:
            raise ValueError(f"{file.name} is cut short: sample {key} should end at byte {offset + size}")
        told = data[124:136].strip(b"\0 ")  # the size in the member's header, in octal digits
        if set(told) - set(b"01234567") or int(told or b"0", 8) != size:
            raise ValueError(f"{file.name} is another file than when it was indexed: sample {key} is not where it was")
        return data[header:]


def _open_source(source: str, needs_captions: bool) -> list[ShardEntry]:
    """The shards of a folder with an index, or those of them that a pattern names."""
    check_scheme(source)
    names: list[str] | None = None
    folder = source
    if source.endswith(".tar"):
        tars = expand(source)
        folder = tars[0].rpartition("/")[0] or "."
        if any((tar.rpartition("/")[0] or ".") != folder for tar in tars):
            raise ValueError(f"{source} names tars of several folders; give a list of patterns, one for each")
        names = [tar.rpartition("/")[2] for tar in tars]
        if not is_url(source) and not exists(join(folder, INDEX_FILE)):
            tar_locations(source)  # tells what is missing
    path = join(folder, INDEX_FILE)
    if not exists(path):
        raise ValueError(_no_index(source, folder))
    try:
        index = json.loads(read_bytes(path))
        version = index["schema"]
        listed = index["shards"] if version == SCHEMA_VERSION else []
        entries = [
            ShardEntry(
                str(entry["file"]),
                int(entry["samples"]),
                int(entry["bytes"]),
                str(entry["sha256"]),
                str(entry["offsets"]),
                str(entry["offsets_sha256"]),
                folder,
            )
            for entry in listed
        ]
        members = Counter[str](index["members"] if version == SCHEMA_VERSION else {"txt": 1})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; write the shards again") from error
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema {version!r}, this version of miniclip reads {SCHEMA_VERSION}; "
            f"`miniclip shards {folder} --index-only --overwrite` writes it anew"
        )
    if not sum(entry.samples for entry in entries):
        raise ValueError(f"the shards in {folder} hold no samples")
    if needs_captions and not members["txt"] and not members["json"]:
        kinds = ", ".join(f".{kind}" for kind in sorted(members) if kind != "image")
        raise ValueError(
            f"the shards in {folder} hold images without captions ({kinds or 'nothing'} beside them, no .txt)"
            + (": they are labelled, for `miniclip eval`. Training needs a text for each" if members["cls"] else "")
        )
    if names is not None:
        by_name = {entry.name: entry for entry in entries}
        if len(by_name) < len(entries):
            raise ValueError(f"{path} lists several shards of one name, so {source} does not tell which are meant")
        if missing := [name for name in names if name not in by_name]:
            raise ValueError(f"{path} lists no {', '.join(missing[:5])}; it has {len(by_name)} shards")
        entries = [by_name[name] for name in names]
    return entries


def _no_index(source: str, folder: str) -> str:
    quoted = f"'{source}'" if "{" in source else source
    if is_url(folder):
        return (
            f"there is no {INDEX_FILE} at {folder}. `miniclip shards {quoted} OUT --index-only` writes one for its "
            "tars into a folder OUT here, which then stands for them"
        )
    path = Path(folder)
    if (path / "train" / INDEX_FILE).is_file():
        return f"{folder} holds the parts train and val; name one of them: {path / 'train'}"
    if path.is_dir() and any(path.glob("*.tar")):
        return f"{folder} holds tars without an {INDEX_FILE}; `miniclip shards {folder} --index-only` writes it"
    what = f"it has no {INDEX_FILE}" if path.is_dir() else "it does not exist"
    return (
        f"{folder} is not a folder of shards: {what}. "
        "`miniclip shards SRC OUT` makes one from a folder of images and texts or from a table"
    )
