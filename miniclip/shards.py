"""Pairs -> shards: webdataset tars of image and text, each with an index of where its samples lie; and back.

    OUT/00000.tar    000000000.jpg  000000000.txt  000000000.json   000000001.jpg …   (img2dataset's layout)
    OUT/00000.npz    the key of each sample, and offset and size of its members in the tar
    OUT/index.json   the shards with their counts, sizes and checksums
    OUT/rejected.csv what was left out, and why

`.txt` holds the captions, one a line. `pack` writes this, `index_shards` gives an index to tars from elsewhere, and
`Shards` reads any sample of either at random, here or at a URL.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
import time
import zipfile
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from .files import atomic_write, write_text
from .images import jpeg_size, open_image
from .sources import HUB_PREFIX, IMAGE_SUFFIXES, Pair, Pairs, captions_in, fingerprint, image_files, read_pairs
from .storage import Cache, check_scheme, exists, expand, is_url, join, read_bytes

SCHEMA_VERSION = 2
INDEX_FILE, REJECTED_FILE, PLAN_FILE = "index.json", "rejected.csv", "plan.json"

# What a tar holds unchanged; anything else is stored as PNG. By the name Pillow gives the format.
_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_MEMBERS = ("image", "txt", "json", "cls", "npy")
_OPEN_SHARDS, _KNOWN_SHARDS = 64, 512  # whose files are open, and whose offsets are in memory
_BUFFER_BYTES = 4 << 20
_END_BYTES = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE  # the most that a tar's end takes
_AT_A_TIME = 8  # pairs that a thread prepares in a row

# ---------------------------------------------------------------------------------------------------------------------
# Writing


@dataclass(frozen=True)
class Packing:
    """How pairs become shards. A packing that was interrupted goes on only as it was begun.

    Args:
        samples_per_shard: pairs that go into one tar. Rejected ones leave it smaller.
        max_shard_bytes: a tar that would be larger is continued in another.
        resize: shrink images whose short side is longer than this many pixels; keeps the aspect.
        quality: JPEG quality of shrunk images, 1 to 95.
        min_side: reject images whose short side is shorter, pixels.
        max_aspect: reject images whose long side is more times their short side.
        val_fraction: share of the pairs to hold out. The image's bytes decide, so copies stay on one side.
    """

    samples_per_shard: int = 10_000
    max_shard_bytes: int = 10**9
    resize: int | None = None
    quality: int = 95
    min_side: int | None = None
    max_aspect: float | None = None
    val_fraction: float = 0.0

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "max_shard_bytes", "resize", "min_side", "max_aspect"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality is {self.quality}; JPEG quality goes from 1 to 95")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; it is a share, from 0 to less than 1")


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


def pack(
    pairs: Sequence[Pair],
    out: str | Path,
    *,
    source: str,
    packing: Packing = Packing(),
    part: tuple[int, int] = (1, 1),
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Packed:
    """Writes pairs as shards. The folder appears under its name only when it is complete.

    Until then it is OUT.partial. Every `samples_per_shard` pairs are a chunk, which is packed on its own, so that a
    repeated call leaves finished chunks as they are, and the parts of a job array can pack different ones.

    Args:
        pairs: of `sources.read_pairs`.
        out: the folder to write; with a `val_fraction` it gets the folders train and val.
        source: where the pairs came from, for messages and the index.
        part: (i, n) packs every n-th chunk, from the i-th on; the last part to end puts all together.
        workers: threads that read, decode and encode; by default one a core.
        overwrite: replace `out` if it is there, and what another packing began.
        progress: called with the number of pairs done, now and then.

    Raises:
        ValueError: `out` exists, no pair can be used, another process is at it, or an argument out of its range.
    """
    out = Path(out)
    number, count = part
    if not 1 <= number <= count:
        raise ValueError(f"part is {number}/{count}; it goes from 1/{count} to {count}/{count}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    if not len(pairs):
        what = f"no image ({', '.join(IMAGE_SUFFIXES)}) with a .txt of the same name beside it"
        raise ValueError(f"no pairs found in {source}: it holds {what if Path(source).is_dir() else 'no rows'}")
    here = str(Path(source).resolve()) if Path(source).exists() else source  # photos is photos/
    plan = {"schema": SCHEMA_VERSION, "source": here, "pairs": len(pairs), "fingerprint": fingerprint(pairs)}
    plan |= {"found": pairs.found if isinstance(pairs, Pairs) else ""} | asdict(packing)
    work = out.with_name(f"{out.name}.partial")
    lock = out.with_name(f".{out.name}.lock")
    busy = f"another process is packing {out}"
    with _locked(lock, busy, patience_s=600):
        if count > 1 and _is_of(out, plan):
            return _read_packed(out)  # another part has finished
        _refuse_to_replace(out, overwrite)
        if _is_of(work, plan):  # only its name was missing
            _publish(out, work)
            return _read_packed(out)
        _begin(out, work, plan, overwrite, busy)
    chunks = [
        _Chunk(work, n, range(start, min(start + packing.samples_per_shard, len(pairs))))
        for n, start in enumerate(range(0, len(pairs), packing.samples_per_shard))
    ]
    done = 0
    for chunk in chunks[number - 1 :: count]:
        with _locked(chunk.lock, busy):
            if not chunk.is_done:
                chunk.write(pairs, packing, workers or os.cpu_count() or 1, partial(_tell, progress, done))
        done += len(chunk.numbers)
        _tell(progress, done, 0)
    with _locked(lock, busy, patience_s=600):
        if (work / PLAN_FILE).is_file():
            if missing := sum(not chunk.is_done for chunk in chunks):
                return Packed(0, 0, 0, 0, 0, missing)
            _finish(out, work, plan, chunks)
        elif not out.exists():
            raise ValueError(f"none of the {len(pairs)} pairs in {source} can be used, as another part has found")
        return _read_packed(out)


def _tell(progress: Callable[[int], None] | None, before: int, done: int) -> None:
    if progress:
        progress(before + done)


@contextmanager
def _locked(path: Path, otherwise: str, patience_s: float = 0) -> Iterator[None]:
    """Holds a lock file, which is removed afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + patience_s
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it may have removed it meanwhile; what is locked then is no longer the file of that name.
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(file)):
                    break
        except BlockingIOError as error:
            if time.monotonic() >= end:
                os.close(file)
                raise ValueError(f"{otherwise} (it holds {path})") from error
            time.sleep(0.05)
        os.close(file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


def _is_of(out: Path, plan: dict[str, Any]) -> bool:
    """Whether a folder is what a plan makes."""
    for path in (out / INDEX_FILE, out / "train" / INDEX_FILE):
        if path.is_file():
            index = json.loads(path.read_text(encoding="utf-8"))
            return all(index.get(key) == value for key, value in plan.items())
    return False


def _refuse_to_replace(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already; pass --overwrite to replace it, or name another folder")
    if out.exists() and not any((out / name / INDEX_FILE).is_file() for name in (".", "train")):
        raise ValueError(f"{out} is not a folder of shards (it has no {INDEX_FILE}), so it is not overwritten")
    if others := _not_ours(out):
        raise ValueError(f"{out} holds what packing did not write, so it is not overwritten: {', '.join(others[:5])}")


def _not_ours(out: Path) -> list[str]:
    """The files of a folder that `pack` did not make."""
    ours = {out / REJECTED_FILE}
    for folder in (out, out / "train", out / "val"):
        if (folder / INDEX_FILE).is_file():
            index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
            if isinstance(index, dict) and "fingerprint" in index:  # an index alone was made for others' shards
                shards = index.get("shards", [])
                ours |= {folder / INDEX_FILE} | {folder / str(s.get(k)) for s in shards for k in ("file", "offsets")}
    found = [path for path in sorted(out.rglob("*")) if not path.is_dir()] if out.exists() else []
    return [str(path.relative_to(out)) for path in found if path not in ours]


def _begin(out: Path, work: Path, plan: dict[str, Any], overwrite: bool, busy: str) -> None:
    """Makes the folder to work in, or finds the one that the same packing has begun."""
    path = work / PLAN_FILE
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        different = [
            f"{key} was {begun.get(key)!r} and is {plan[key]!r}" for key in plan if begun.get(key) != plan[key]
        ]
        if not different:
            return
        for chunk_lock in work.glob("*.lock"):
            with _locked(chunk_lock, busy):
                pass
        if not overwrite:
            raise ValueError(
                f"{work} holds the beginning of another packing: {', '.join(different)}. Repeat that one to go on with "
                "it, or pass --overwrite to begin anew"
            )
        shutil.rmtree(work)
    elif work.exists() and any(not path.match(".*.tmp") for path in work.iterdir()):
        raise ValueError(f"{work} is in the way: it is no packing that was begun (it has no {PLAN_FILE})")
    write_text(path, json.dumps(plan, indent=1) + "\n")


class _Chunk:
    """Some consecutive pairs, which become one shard, or more if they are large, and as many held out.

    Args:
        numbers: of the pairs; they are also the samples' keys.
    """

    def __init__(self, work: Path, number: int, numbers: range) -> None:
        self.work, self.number, self.numbers = work, number, numbers
        self.result = work / f"chunk-{number:05d}.json"  # written last: a chunk without it is not done
        self.lock = work / f"chunk-{number:05d}.lock"

    @property
    def is_done(self) -> bool:
        return self.result.is_file()

    def read(self) -> dict[str, Any]:
        return json.loads(self.result.read_text(encoding="utf-8"))

    def write(self, pairs: Sequence[Pair], packing: Packing, workers: int, progress: Callable[[int], None]) -> None:
        rejected: list[tuple[str, str, str]] = []
        shards: dict[str, list[dict[str, Any]]] = {"train": [], "val": []}
        tars: dict[str, _Tar] = {}

        def close(side: str) -> None:
            shards[side].append(tars.pop(side).close())

        for number, result in _in_order(self.numbers, lambda n: _prepare(pairs, n, packing), workers):
            if isinstance(result, _Rejection):
                rejected.append((f"{number:09d}", result.source, result.reason))
            else:
                side = "val" if result.is_held_out else "train"
                if side in tars and tars[side].size + result.size + _END_BYTES > packing.max_shard_bytes:
                    close(side)
                if side not in tars:
                    tars[side] = _Tar(self.work / f"chunk-{self.number:05d}-{side}-{len(shards[side])}.tar")
                tars[side].write(f"{number:09d}", result.members)
            if (number + 1) % 64 == 0:
                progress(number + 1 - self.numbers.start)
        for side in list(tars):
            close(side)
        write_text(self.result, json.dumps({"shards": shards, "rejected": rejected}))


def _in_order(numbers: range, function: Callable[[int], Any], workers: int) -> Iterator[tuple[int, Any]]:
    """The function's value for each number, in order, computed ahead by threads, a few numbers at a time.

    Threads, as reading, decoding and encoding images let go of the interpreter's lock.
    """

    is_over = threading.Event()

    def compute(some: range) -> list[Any]:
        return [function(number) for number in some if not is_over.is_set()]

    waiting: deque[tuple[range, Future[list[Any]]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for start in range(0, len(numbers), _AT_A_TIME):
            some = numbers[start : start + _AT_A_TIME]
            waiting.append((some, pool.submit(compute, some)))
            if len(waiting) > 3 * workers:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in waiting:
            yield from zip(done, future.result(), strict=True)
    finally:
        is_over.set()  # Ctrl-C waits for one image of each thread, and not for all that they have been given
        pool.shutdown(cancel_futures=True)


class _Tar:
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


@dataclass(frozen=True)
class _Prepared:
    members: dict[str, bytes]  # by suffix
    is_held_out: bool

    @property
    def size(self) -> int:
        return sum(map(len, self.members.values())) + 3 * 1024


@dataclass(frozen=True)
class _Rejection:
    source: str
    reason: str


def _prepare(pairs: Sequence[Pair], number: int, packing: Packing) -> _Prepared | _Rejection:
    """The files of one sample, or why there are none."""
    name = pairs.names[number] if isinstance(pairs, Pairs) else f"pair {number}"
    try:
        pair = pairs[number]
        name = pair.source
        return _members(pair, packing)
    except (OSError, ValueError) as error:
        return _Rejection(name, str(error))


def _members(pair: Pair, packing: Packing) -> _Prepared:
    if pair.problem:
        raise ValueError(pair.problem)
    captions = [line for caption in pair.captions for line in captions_in(caption)]
    if not captions:
        raise ValueError("every caption is empty")
    original = _read_image(pair)
    name = pair.image.name if isinstance(pair.image, Path) else pair.source
    suffix, data, (width, height) = _stored_image(original, name, packing)
    facts = {"source": pair.source, **pair.extra, "width": width, "height": height}
    members = {
        suffix: data,
        "txt": "\n".join(captions).encode("utf-8"),
        # A file name need not be UTF-8; what is not becomes an escape, which JSON reads back.
        "json": json.dumps(facts, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace"),
    }
    place = int.from_bytes(hashlib.sha256(original).digest()[:8]) / 2**64 if packing.val_fraction else 1.0
    return _Prepared(members, place < packing.val_fraction)


def _stored_image(original: bytes, name: str, packing: Packing) -> tuple[str, bytes, tuple[int, int]]:
    """An image's suffix, bytes and (W, H) as they go into the tar.

    All of it is decoded only where it must be: else packing would be no faster than that.
    """
    is_kept = packing.resize is None and _is_whole(original)
    if is_kept and (size := jpeg_size(original)):
        _filter((size[1], size[0]), packing)
        return "jpg", original, (size[1], size[0])
    image = open_image(original, name, is_whole=is_kept)
    _filter(image.size, packing)
    scale = packing.resize / min(image.size) if packing.resize else 1.0
    is_animated = getattr(image, "is_animated", False) and image.format == "WEBP"  # not every decoder reads those
    suffix = None if is_animated else _KEPT_FORMATS.get(image.format or "")
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        return "jpg", _encode(image, "JPEG", quality=packing.quality), size
    if suffix is None:
        return "png", _encode(open_image(original, name).convert("RGB"), "PNG"), image.size
    return suffix, original, image.size


def _filter(size: tuple[int, int], packing: Packing) -> None:
    short, long = min(size), max(size)
    if packing.min_side and short < packing.min_side:
        raise ValueError(f"its short side is {short} pixels, less than {packing.min_side}")
    if packing.max_aspect and long > packing.max_aspect * short:
        raise ValueError(f"its sides are {size[0]} x {size[1]}, more than {packing.max_aspect:g} to 1")


def _read_image(pair: Pair) -> bytes:
    assert pair.image is not None
    if isinstance(pair.image, bytes):
        return pair.image
    return pair.image.read_bytes() if isinstance(pair.image, Path) else read_bytes(pair.image)


def _is_whole(data: bytes) -> bool:
    """Whether a JPEG has its end marker, which one that is cut short has not; and a PNG the right checksums."""
    if data.startswith(b"\xff\xd8"):
        return data.rstrip(b"\0").endswith(b"\xff\xd9")
    if not data.startswith(b"\x89PNG"):
        return False
    try:
        Image.open(io.BytesIO(data)).verify()
    except Exception:  # a damaged file can raise anything; decoding it will tell what is wrong
        return False
    return True


def _encode(image: Image.Image, file_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _finish(out: Path, work: Path, plan: dict[str, Any], chunks: list[_Chunk]) -> None:
    """Gives the chunks' shards their numbers, writes the index, and the folder gets its name.

    Each step can be done again by a process that comes after one that was killed here.
    """
    results = [chunk.read() for chunk in chunks]
    rejected = [tuple(row) for result in results for row in result["rejected"]]
    shards = {side: [entry for result in results for entry in result["shards"][side]] for side in ("train", "val")}
    counts = {side: sum(entry["samples"] for entry in entries) for side, entries in shards.items()}
    if not sum(counts.values()):
        shutil.rmtree(work)
        examples = "".join(f"\n  {name}: {reason}" for _, name, reason in rejected[:5])
        raise ValueError(f"none of the {plan['pairs']} pairs in {plan['source']} can be used:{examples}")
    assert sum(counts.values()) + len(rejected) == plan["pairs"]
    if plan["val_fraction"] and not all(counts.values()):
        empty = min(counts, key=lambda side: counts[side])
        shutil.rmtree(work)
        raise ValueError(
            f"of {sum(counts.values())} pairs none fell to the side {empty!r} with val_fraction "
            f"{plan['val_fraction']}; another fraction, or more pairs, would help"
        )
    with atomic_write(work / REJECTED_FILE) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        csv.writer(text).writerows([("key", "source", "reason"), *rejected])
        text.detach()
    for side in ("val", "train") if plan["val_fraction"] else ("train",):  # train's index tells that all is there
        folder = work / side if plan["val_fraction"] else work
        folder.mkdir(exist_ok=True)
        entries = []
        for number, entry in enumerate(shards[side]):
            for suffix in (".tar", ".npz"):
                before = (work / entry["file"]).with_suffix(suffix)
                if before.exists():
                    os.replace(before, folder / f"{number:05d}{suffix}")
            entries.append({**entry, "file": f"{number:05d}.tar", "offsets": f"{number:05d}.npz"})
        _write_index(folder, entries, {**plan, "rejected": len(rejected)})
    _publish(out, work)


def _publish(out: Path, work: Path) -> None:
    """Removes from a complete folder what only the packing needed, and gives it its name."""
    for pattern in ("chunk-*", ".*.tmp", "*/.*.tmp", PLAN_FILE):
        for path in work.glob(pattern):
            path.unlink(missing_ok=True)
    old = out.with_name(f".{out.name}.old")
    if out.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)  # kept until the new one has its name
    os.rename(work, out)
    shutil.rmtree(old, ignore_errors=True)


def _read_packed(out: Path) -> Packed:
    folders = [out / "train", out / "val"] if (out / "train").is_dir() else [out]
    indexes = [json.loads((folder / INDEX_FILE).read_text(encoding="utf-8")) for folder in folders]
    entries = [entry for index in indexes for entry in index["shards"]]
    kept, held_out = [index["samples"] for index in indexes] + [0] * (2 - len(indexes))
    return Packed(kept, indexes[0]["rejected"], len(entries), sum(entry["bytes"] for entry in entries), held_out)


def _write_index(folder: Path, entries: list[dict[str, Any]], facts: dict[str, Any]) -> None:
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
        _tell(progress, number + 1, 0)
    _write_index(folder, entries, {"source": source})
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


def shard_pairs(source: str) -> Pairs:
    """The samples of shards as pairs, to be sharded anew."""
    shards = Shards(source)
    names = [f"{entry.name}:{key}" for s, entry in enumerate(shards.entries) for key in shards.keys(s)]

    def read(number: int) -> Pair:
        try:
            record, extra = shards[number], shards.info(number)
        except ValueError as error:
            return Pair(names[number], problem=str(error))
        facts = {name: value for name, value in extra.items() if name not in ("width", "height")}
        return Pair(names[number], record.image, record.captions, None if record.image else "no image", facts)

    return Pairs(names, read, f"{len(names)} samples of {len(shards.entries)} shards")


# ---------------------------------------------------------------------------------------------------------------------
# Training on what is not packed yet


def is_shards(source: str) -> bool:
    """Whether this is a folder, pattern or URL of shards, rather than a source for `read_pairs`."""
    path = Path(source)
    if source.startswith(HUB_PREFIX) or path.is_file():
        return source.endswith(".tar")
    if (
        source.endswith(".tar")
        or is_url(source)
        or any((path / name / INDEX_FILE).is_file() for name in (".", "train"))
    ):
        return True
    return any(path.glob("*.tar")) and not any(image.suffix.lower() in IMAGE_SUFFIXES for image in path.iterdir())


def open_pairs(
    source: str,
    *,
    images: str | None = None,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    split: str = "train",
) -> Pairs:
    """The pairs of shards, or of anything that `read_pairs` reads.

    Raises:
        ValueError: as `Shards` and `read_pairs`.
    """
    if not is_shards(source):
        return read_pairs(
            source, images=images, image_column=image_column, caption_columns=caption_columns, split=split
        )
    if images or image_column or caption_columns:
        raise ValueError(f"--images, --image-column and --caption-column are for tables; {source} is shards")
    return shard_pairs(source)


def pack_into_cache(source: str) -> str:
    """Where the shards of a source are. What is not packed yet is, into the cache, once and when it has changed.

    Raises:
        ValueError: as `read_pairs` and `pack`.
    """
    path = Path(source)
    if is_shards(source) or not (path.is_file() or (path.is_dir() and image_files(path))):
        return source  # or nothing, which `Shards` tells
    try:
        pairs = read_pairs(source)
        name = hashlib.sha256(f"{path.resolve()} {fingerprint(pairs)}".encode()).hexdigest()[:16]
        out = Cache().folder.with_name("packed") / f"{path.stem}-{name}"
        with _locked(Path(f"{out}.lock"), f"another process is packing {out}", patience_s=24 * 3600):
            if not out.exists():
                print(f"Packing {source} into {out}, once: {pairs.found}", flush=True)
                pack(pairs, out, source=source)
    except ValueError as error:
        raise ValueError(f"{error} (to pack it otherwise: `miniclip shards {source} OUT`)") from error
    packed = _read_packed(out)
    listed = f", listed in {out / REJECTED_FILE}" if packed.rejected else ""
    print(f"{source}: {packed.kept} pairs packed in {out}; {packed.rejected} rejected{listed}", flush=True)
    return str(out)
