"""Shards read at random: any sample, here or at a URL."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import os
import re
import tarfile
import threading
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import numpy as np

from ..common.cache import Cache
from ..common.files import read_at
from ..common.storage import (
    check_scheme,
    exists,
    expand,
    is_url,
    join,
    name_of,
    parent_of,
    read_bytes,
    split_query,
    without_secrets,
)
from ..common.wording import reason_of
from .indexing.index_tars import tar_locations
from .reading.cells import captions_in, captions_of_facts, decode_text
from .reading.json_tables import RepeatedNameError, parse_json
from .reading.scan import OTHER_SPLIT, LeftOut
from .reading.splits import equal_splits, role_of, same_parts, splits_of_files
from .shard_index import INDEX_FILE, SCHEMA_VERSION, zeros_at

_PICKLED = ("pkl", "pickle", "pyd", "pth", "pt")  # suffixes that webdataset, or torch for it, unpickles
_OPEN_SHARDS, _KNOWN_SHARDS = 64, 512  # whose files are open, and whose offsets are in memory


@dataclass(frozen=True)
class ShardEntry:
    """One line of `index.json`.

    Args:
        file: the tar, beside the index or anywhere; may be a URL.
        sha256: of the tar; None if it was indexed by its headers.
        offsets: the `.npz` with its members' places, beside the index.
        offsets_sha256: of that, so that a copy kept of an older one is not taken for it.
        folder: where the index is.
        zeros_at: where the zeros at the tar's end begin; None if that is not known.
        version: of the tar when it was indexed, as that of `storage.Stamp`.
    """

    file: str
    samples: int
    bytes: int
    sha256: str | None
    offsets: str
    offsets_sha256: str
    folder: str
    zeros_at: int | None = None
    version: str = ""

    @property
    def name(self) -> str:
        return name_of(self.file)

    @property
    def location(self) -> str:
        if is_url(self.file) or (self.file.startswith("/") and not is_url(self.folder)):
            return self.file
        return join(self.folder, self.file)

    @property
    def remote_bytes(self) -> int:
        """What it takes in the cache; 0 for one that lies here."""
        return self.bytes if is_url(self.location) else 0


@dataclass(frozen=True)
class Record:
    """One sample as it lies in its shard, not decoded."""

    key: str
    image: bytes
    captions: tuple[str, ...]


def record_of(key: str, read: Callable[[str], bytes]) -> Record:
    """A sample from its members: the lines of its text, or without one, a caption field of its `.json`.

    Args:
        read: returns a member by its kind, empty if there is none.

    Raises:
        ValueError: the text is not UTF-8, or no caption.
    """
    image, text = read("image"), read("txt")
    captions = captions_in(decode_text(text, f"the text of {key}"))
    if not captions:
        try:
            captions = captions_of_facts(parse_json(read("json") or b"{}"))
        except RepeatedNameError as error:
            raise ValueError(f"the .json of {key}: {error}") from error
        except ValueError:  # it is damaged, or has no captions
            pass
    return Record(key, image, tuple(captions))


def tar_names(locations: Sequence[str]) -> list[str]:
    """What tars are called where their folder is known: each by its own name, or by its whole location where several
    have one name.

    >>> tar_names(["a/0.tar", "b/0.tar", "b/1.tar"])
    ['a/0.tar', 'b/0.tar', '1.tar']
    """
    times = Counter(map(name_of, locations))
    return [name if times[name := name_of(each)] == 1 else _place_of(each) for each in locations]


def _place_of(location: str) -> str:
    """A tar's location as it may be shown; a query gives access and is no part of its name."""
    return without_secrets(split_query(location)[0])


def tars_of_split(names: Sequence[str], split: str | None, source: str) -> set[str]:
    """Of the names of a folder's tars those of a split, if any tells that it is of train, val or test; else all.

    A tar that tells nothing is for training where others are (cc3m-train-0 and cc12m-0), or if it has a number alone
    (00000 and val). Where all are of one split, that is taken.

    Raises:
        ValueError: none is of that split.
    """
    there = splits_of_files(Path(), map(Path, names))
    part_of = {name: there.get(Path(name), "") for name in names}
    role = {part: role_of(part) for part in part_of.values()}
    if split is None or not any(role.values()):
        return set(names)
    if split in equal_splits(asked := role_of(split)):
        own = {part for part in role if role[part] == asked}
        if asked == "train":
            own |= {part for part in role if not role[part] and (own or not re.search("[^0-9_-]", part))}
    else:
        own = set(same_parts(role, split))
    if not own and len(set(role.values())) > 1:
        raise ValueError(
            f"{source} has no split {split!r}; valid are {', '.join(sorted(role))}, as the names of its tars say; "
            f"{join(source, '*.tar')} is all of them"
        )
    return {name for name, part in part_of.items() if part in own} if own else set(names)


def sample_names(tar: str, keys: Sequence[str]) -> list[str]:
    """The samples of a tar: its name and their keys, of which one that comes again gets the number of its repetition.

    >>> sample_names("a.tar", ["7", "7"])
    ['a.tar:7', 'a.tar:7 (2)']
    """
    there, times = set(keys), Counter[str]()
    names = []
    for key in keys:
        times[key] += 1
        unique = key
        while times[key] > 1 and (unique := f"{key} ({times[key]})") in there:
            times[key] += 1
        there.add(unique)
        names.append(f"{tar}:{unique}")
    return names


def split_sample_name(name: str) -> tuple[str, str]:
    """The tar of a sample's name, and the rest; "" and the name of anything else.

    >>> split_sample_name("a/0.tar:7"), split_sample_name("a/7.jpg")
    (('a/0.tar', '7'), ('', 'a/7.jpg'))
    """
    tar, colon, key = name.partition(".tar:")
    return (f"{tar}.tar", key) if colon else ("", name)


def facts_of(read: Callable[[str], bytes]) -> dict[str, Any]:
    """The facts of a sample's `.json` and its `.cls`; empty if it has neither. Bytes of a `.cls` that are no UTF-8 are
    escaped, \\xe9, so that two labels stay two.

    Raises:
        ValueError: it is not JSON.
    """
    found = {kind: read(kind) for kind in ("json", "cls")}
    values = parse_json(found["json"]) if found["json"] else {}
    facts = values if isinstance(values, dict) else {}
    return {"cls": found["cls"].decode("utf-8-sig", "backslashreplace").strip()} | facts if found["cls"] else facts


class Shards:
    """Random access to the samples of some shards, by number, 0 to len - 1.

    Opening reads `index.json` alone; a shard's offsets are read when it is first needed, and the files of the
    64 shards last used are kept open. Remote shards are fetched once for all processes of a machine.

    Args:
        sources: a folder with an index, here or at a URL; a pattern of tars in such a folder,
            "data/{00000..00009}.tar"; or several of either, whose samples are numbered one after the other.
        split: of a folder whose tars are named by split (train-0.tar, val-0.tar), those of this one; None for all.
        needs_captions: refuse shards that have none, as those of labelled images; for training they are of no use.
        locations: of the tars as the user names them, where an index that lies elsewhere has them otherwise.
        is_by_place: the names of samples have the whole location of their tar, whatever else is in the sources.

    Attributes:
        tars: what the names of samples call each tar.
        left_out: what was left out when the shards were packed or indexed, by reason.
        facts: of each source, for a run's record: its `pairs`, and where they came from (`source`), what was `found`
            there and how many were `rejected`, as far as its index says so of these shards.

    Raises:
        ValueError: no index, one that this version can't read, or shards without captions.
    """

    def __init__(
        self,
        sources: str | Path | Sequence[str | Path],
        cache: Cache | None = None,
        needs_captions: bool = True,
        *,
        split: str | None = None,
        locations: Sequence[str] = (),
        is_by_place: bool = False,
    ) -> None:
        self.cache = cache or Cache()
        self.entries: list[ShardEntry] = []
        self.num_shards: list[int] = []  # of each source
        self.left_out: list[LeftOut] = []
        self.facts: list[dict[str, Any]] = []
        for source in [sources] if isinstance(sources, str | Path) else sources:
            entries, left_out, facts = _open_source(str(source), needs_captions, split)
            self.entries += entries
            self.facts.append(facts)
            self.left_out += left_out
            self.num_shards.append(len(entries))
        locations = locations or [entry.location for entry in self.entries]
        # The names of tars alone do not tell those of several sources apart.
        is_by_place = is_by_place or len(self.num_shards) > 1
        self.tars = list(map(_place_of, locations)) if is_by_place else tar_names(locations)
        self.counts = np.array([entry.samples for entry in self.entries], dtype=np.int64)
        self._ends = np.cumsum(self.counts)
        self._offsets: OrderedDict[int, dict[str, np.ndarray]] = OrderedDict()
        self._lock = threading.Lock()  # packing reads in threads
        self._open: OrderedDict[int, tuple[IO[bytes], dict[str, np.ndarray]]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def remote_bytes(self) -> int:
        """What all of them take in the cache."""
        return sum(entry.remote_bytes for entry in self.entries)

    def __getstate__(self) -> dict[str, Any]:
        # File handles stay in their process.
        return {**self.__dict__, "_open": OrderedDict(), "_offsets": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = {**state, "_lock": threading.Lock()}

    @property
    def checksums(self) -> list[str] | None:
        """Those of the tars; None if one has none."""
        found = [entry.sha256 for entry in self.entries if entry.sha256 is not None]
        return found if len(found) == len(self.entries) else None

    def locate(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - int(self._ends[shard] - self.counts[shard])

    def __getitem__(self, index: int) -> Record:
        """The sample's bytes and captions: the lines of its text, or without one, a caption field of its `.json`.

        Raises:
            ValueError: the tar is not what was indexed, or has been taken away; or the text is not UTF-8.
        """
        shard, row = self.locate(index)
        file, offsets = self._shard(shard)
        return record_of(str(offsets["key"][row]), partial(self._member, file, offsets, row))

    def name(self, index: int) -> str:
        """The name by which the user knows a sample: its tar and its key, as "00000.tar:000000012".

        Raises:
            ValueError: the shard can't be opened.
        """
        shard, row = self.locate(index)
        return f"{self.tars[shard]}:{self._shard(shard)[1]['key'][row]}"

    def names(self) -> list[str]:
        """Those of all samples, in order, none of them twice; the tars themselves are not touched."""
        return [name for shard, tar in enumerate(self.tars) for name in sample_names(tar, self.keys(shard))]

    def info(self, index: int) -> dict[str, Any]:
        """The facts of the sample's `.json` and its `.cls`; empty if it has neither.

        Raises:
            ValueError: as for the sample itself, or it is not JSON.
        """
        return facts_of(partial(self.read, index))

    def read(self, index: int, kind: str) -> bytes:
        """One member of a sample, by its suffix ("cls", "json", "npy", "txt") or "image"; empty if it has none.

        Raises:
            ValueError: as for the sample itself.
        """
        shard, row = self.locate(index)
        file, offsets = self._shard(shard)
        return self._member(file, offsets, row, kind)

    def keys(self, shard: int) -> list[str]:
        """The keys of a shard's samples, in order; the tar itself is not touched."""
        return [str(key) for key in self._read_offsets(self.entries[shard])["key"]]

    def holds(self, kind: str) -> bool:
        """Whether any sample has a member of this suffix; the tars themselves are not touched."""
        offsets = (self._read_offsets(entry) for entry in self.entries)
        return any(kind in each and bool(each[kind][:, 1].any()) for each in offsets)

    def webdataset(self, resampled: bool = False) -> Any:
        """These shards as a pipeline of webdataset's own, to go on from: `.shuffle(1000).decode("pil").batched(64)`.

        It yields webdataset's samples, dicts of bytes by suffix, split over the nodes and workers that webdataset finds
        in the environment; an iteration is each of them once. Remote tars come through the cache, whole and verified.
        Members that webdataset would unpickle (`.pyd`, `.pth` …) are left out.

        Args:
            resampled: draw shards at random, with replacement and without an end, in every worker.
        """
        import webdataset as wds

        locations = [entry.location for entry in self.entries]
        if resampled:
            return wds.FluidWrapper(wds.ResampledShards(locations)).compose(self._expand)
        shards = wds.FluidWrapper(wds.SimpleShardList(locations))
        return shards.compose(wds.split_by_node, wds.split_by_worker, self._expand)

    def _expand(self, sources: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        entries = {entry.location: entry for entry in self.entries}
        for source in sources:
            with self._open_tar(entries[source["url"]]) as file:
                # One tar at a time: of two, the last and the first sample may have one key.
                files = tar_file_expander([{**source, "stream": file}], select_files=_is_harmless)
                yield from group_by_keys(files)

    def _open_tar(self, entry: ShardEntry) -> IO[bytes]:
        """
        Raises:
            ValueError: it can't be had, or has grown since it was indexed.
        """
        try:
            if is_url(entry.location):
                return self.cache.open(entry.location, entry.bytes, entry.sha256, entry.version)
            file = open(entry.location, "rb")  # noqa: SIM115 (handed over)
        except OSError as error:
            raise ValueError(f"shard {entry.location} can't be read: {error}") from error
        _refuse_longer(file, entry)
        return file

    def prefetch(self, shard: int, room: int) -> int:
        """Brings a remote shard into the cache if it takes at most `room` bytes there, and returns what it takes. What
        goes wrong is left to who reads from it."""
        entry = self.entries[shard]
        taken = entry.remote_bytes
        if taken > room:
            return taken
        with suppress(ValueError):  # a name that leads out of its folder
            taken += self.cache.prefetch(join(entry.folder, entry.offsets), sha256=entry.offsets_sha256)
            if taken <= room:
                self.cache.prefetch(entry.location, entry.bytes, entry.sha256, entry.version)
        return taken

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
            self._open[shard] = (self._open_tar(entry), offsets)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)  # closed when no thread reads from it any more
        self._open.move_to_end(shard)
        return self._open[shard]

    def _read_offsets(self, entry: ShardEntry) -> dict[str, np.ndarray]:
        path = join(entry.folder, entry.offsets)
        # The cache's own errors tell a network that fails and a full disk from a file that is not what it was.
        cached = self.cache.open(path, sha256=entry.offsets_sha256) if is_url(path) else None
        try:
            with cached or open(path, "rb") as file:
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
    def _member(file: IO[bytes], offsets: dict[str, np.ndarray], row: int, kind: str) -> bytes:
        """One member; empty if there is none. It is checked against the index, as files are edited and replaced."""
        offset, size = (int(each) for each in offsets[kind][row]) if kind in offsets else (0, 0)
        if not size:
            return b""
        key, header = offsets["key"][row], tarfile.BLOCKSIZE
        data = read_at(file, offset - header, size + header)
        if len(data) != size + header:
            raise ValueError(f"{file.name} is cut short: sample {key} should end at byte {offset + size}")
        digits = data[124:136].strip(b"\0 ")  # the size in the member's header, octal
        if set(digits) - set(b"01234567") or int(digits or b"0", 8) != size:
            raise ValueError(f"{file.name} is another file than when it was indexed: sample {key} is not where it was")
        checksums = offsets.get(f"{kind}_crc32")
        if checksums is not None and zlib.crc32(memoryview(data)[header:]) != checksums[row]:
            raise ValueError(
                f"{file.name} is another file than when it was indexed: the {kind} of sample {key} has another "
                "checksum; index the shards anew"
            )
        return data[header:]


def _is_harmless(name: str) -> bool:
    """Whether webdataset's decoders read a member of this name without unpickling it."""
    return name.lower().removesuffix(".gz").rpartition(".")[2] not in _PICKLED


def _refuse_other_hosts(index: str, names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: the index of a server names files of this machine, of another server, or above its own folder.
    """
    if not is_url(index):
        return
    own = urlsplit(index)
    for name in names:
        there = urlsplit(name if is_url(name) else join(parent_of(index), name))
        if (there.scheme, there.netloc) != (own.scheme, own.netloc) or ".." in there.path.split("/"):
            raise ValueError(
                f"{index} names {name!r}; the index of a server may name only files of {own.scheme}://{own.netloc}"
            )


def _refuse_longer(file: IO[bytes], entry: ShardEntry) -> None:
    """What was appended to a tar would be lost; one that was cut short tells so by its samples."""
    size = os.fstat(file.fileno()).st_size
    if size > entry.bytes:
        what = f"has {size:,} bytes, and had {entry.bytes:,} when it was indexed"
    elif size == entry.bytes and entry.zeros_at is not None and zeros_at(file, size) > entry.zeros_at:
        what = f"goes on after byte {entry.zeros_at:,}, where it ended when it was indexed"
    else:
        return
    file.close()
    raise ValueError(
        f"{entry.location} {what}: something was added to it, or it was replaced. `miniclip shards "
        f"{entry.folder} --index-only --overwrite` indexes it anew"
    )


def _open_source(
    source: str, needs_captions: bool, split: str | None
) -> tuple[list[ShardEntry], list[LeftOut], dict[str, Any]]:
    """The shards of a folder with an index, or those of them that a pattern names; what was left out; the facts."""
    check_scheme(source)
    folder, names = _folder_and_names(source)
    path = join(folder, INDEX_FILE)
    if not exists(path):
        raise ValueError(_no_index(source, folder))
    entries, members, left_out, own_facts = _read_index(path, folder)
    if needs_captions and not members["txt"] and not members["json"]:
        kinds = ", ".join(f".{kind}" for kind in sorted(members) if kind != "image")
        raise ValueError(
            f"the shards in {folder} hold images without captions ({kinds or 'nothing'} beside them, no .txt)"
            + (": they are labelled, for `miniclip eval`. Training needs a text for each" if members["cls"] else "")
        )
    facts: dict[str, Any] = {"source": source}
    if names is None:
        facts |= own_facts
        own = tars_of_split([entry.name for entry in entries], split, source)
        left_out += [LeftOut(entry.name, OTHER_SPLIT) for entry in entries if entry.name not in own]
        entries = [entry for entry in entries if entry.name in own]
    else:
        entries = _entries_of(names, entries, path, source)
    facts["source"] = without_secrets(str(facts["source"]))
    return entries, left_out, {**facts, "pairs": sum(entry.samples for entry in entries)}


def _folder_and_names(source: str) -> tuple[str, list[str] | None]:
    """The folder that should have an index, and which of its tars are meant: a pattern's, or None for all."""
    if not name_of(source).endswith(".tar"):
        return source, None
    tars = expand(source)
    folder = parent_of(tars[0])
    if any(parent_of(tar) != folder for tar in tars):
        raise ValueError(f"{source} names tars of several folders; give a list of patterns, one for each")
    if not is_url(source) and not exists(join(folder, INDEX_FILE)):
        tar_locations(source)  # raises for a tar that is missing
    return folder, [name_of(tar) for tar in tars]


def _read_index(path: str, folder: str) -> tuple[list[ShardEntry], Counter[str], list[LeftOut], dict[str, Any]]:
    """The shards that an index lists, how many members of each kind they hold, what was left out when it was written,
    and the facts about where its pairs came from."""
    content = read_bytes(path)  # its error is the network's, or the disk's
    try:
        index = json.loads(content)
        version = index["schema"]
        listed = index["shards"] if version == SCHEMA_VERSION else []
        entries = [
            ShardEntry(
                str(entry["file"]),
                int(entry["samples"]),
                int(entry["bytes"]),
                None if entry["sha256"] is None else str(entry["sha256"]),
                str(entry["offsets"]),
                str(entry["offsets_sha256"]),
                folder,
                entry.get("zeros_at"),
                str(entry["stamp"][1]) if entry.get("stamp") else "",
            )
            for entry in listed
        ]
        members = Counter[str](index["members"] if version == SCHEMA_VERSION else {"txt": 1})
        left_out = [LeftOut(folder, reason, int(count)) for reason, count in index.get("left_out", {}).items()]
        left_out += [LeftOut(name, "a damaged tar") for name in index.get("damaged", {})]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {reason_of(error)}; write the shards again") from error
    _refuse_other_hosts(path, [name for entry in entries for name in (entry.file, entry.offsets)])
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema {version!r}, this version of miniclip reads {SCHEMA_VERSION}; "
            f"`miniclip shards {folder} --index-only --overwrite` writes it anew"
        )
    if not sum(entry.samples for entry in entries):
        raise ValueError(f"the shards in {folder} hold no samples")
    return entries, members, left_out, {name: index[name] for name in ("source", "found", "rejected") if name in index}


def _entries_of(names: list[str], entries: list[ShardEntry], path: str, source: str) -> list[ShardEntry]:
    """The shards of these names, each of which may be a pattern; `path` is the index that lists them."""
    by_name = {entry.name: entry for entry in entries}
    if len(by_name) < len(entries):
        raise ValueError(f"{path} lists several shards of one name, so {source} does not tell which are meant")
    matches = [[name] if name in by_name else fnmatch.filter(by_name, name) for name in names]
    if missing := [name for name, found in zip(names, matches, strict=True) if not found]:
        raise ValueError(f"{path} lists no {', '.join(missing[:5])}; it has {len(by_name)} shards")
    return [by_name[name] for found in matches for name in found]


def _no_index(source: str, folder: str) -> str:
    quoted = f"'{source}'" if set("{*") & set(source) else source
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
