"""Pairs as people have them -> shards: webdataset tars of image and text, each with an index of where its samples lie.

    OUT/00000.tar    000000000.jpg  000000000.txt  000000000.json   000000001.jpg …   (img2dataset's layout)
    OUT/00000.npz    the key of each sample, and offset and size of its image and its text in the tar
    OUT/index.json   the shards with their counts, sizes and checksums
    OUT/rejected.csv what was left out, and why

`.txt` holds the captions, one a line. `pack` writes this, `Shards` reads any sample of it at random.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from .files import atomic_write, write_text
from .transforms import open_image

SCHEMA_VERSION = 1
INDEX_FILE, REJECTED_FILE = "index.json", "rejected.csv"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_COLUMNS = ("filepath", "image", "image_path", "path", "file", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "captions", "title", "text", "description")

# What a tar holds unchanged; anything else is stored as PNG. By the name Pillow gives the format.
_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_OPEN_SHARDS = 64
_WINDOW = 256


@dataclass(frozen=True)
class Pair:
    """One image with its captions, not yet looked at.

    Args:
        source: how the user knows it, for messages.
        path: the image file.
        captions: texts; blank ones do not count.
        problem: why it can't be used, where that is known already.
        extra: anything else that was known of it; goes into the sample's `.json`.
    """

    source: str
    path: Path | None = None
    captions: tuple[str, ...] = ()
    problem: str | None = None
    extra: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def read_pairs(source: str | Path) -> list[Pair]:
    """The pairs of a folder (image files with a `.txt` of the same name beside them) or of a CSV or TSV table.

    Raises:
        ValueError: no such source, or a table without the columns that are needed.
    """
    source = Path(source)
    if source.is_dir():
        return _read_folder(source)
    if source.is_file() and source.suffix.lower() in (".csv", ".tsv"):
        return _read_table_pairs(source)
    if source.is_file():
        raise ValueError(f"{source} is neither a folder nor a .csv or .tsv table of image paths and captions")
    raise ValueError(f"no folder or file {source}")


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, by their suffix, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _read_folder(folder: Path) -> list[Pair]:
    pairs = []
    images = image_files(folder)
    for path in images:
        name = str(path.relative_to(folder))
        text = path.with_suffix(".txt")
        if not text.is_file():
            pairs.append(Pair(name, problem=f"no captions: there is no {text.name} beside it"))
            continue
        try:
            pairs.append(Pair(name, path, tuple(text.read_text(encoding="utf-8-sig").splitlines())))
        except UnicodeDecodeError as error:
            pairs.append(Pair(name, problem=f"{text.name} is not UTF-8 text: {error}"))
        except OSError as error:
            pairs.append(Pair(name, problem=f"{text.name} can't be read: {error}"))
    with_image = {path.with_suffix("") for path in images}
    for text in sorted(folder.rglob("*.txt")):
        if text.with_suffix("") not in with_image:
            name = str(text.relative_to(folder))
            pairs.append(Pair(name, problem=f"no image: there is no {text.stem}.jpg, .png, … beside it"))
    return pairs


def read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows of a CSV or TSV file; a separator other than the suffix's is found out.

    Raises:
        ValueError: an empty file, one that is not text, or a row with more cells than the header.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    header = text.split("\n", 1)[0].strip()
    if not header:
        what = "begins with a blank line" if text.strip() else "is empty"
        raise ValueError(f"{path} {what}; its first line must name the columns")
    expected = "\t" if path.suffix.lower() == ".tsv" else ","
    separator = expected if expected in header else max(",\t;|", key=header.count)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows = []
    try:
        columns = list(reader.fieldnames or [])
        if twice := {name for name in columns if name and columns.count(name) > 1}:
            raise ValueError(f"{path} has several columns called {', '.join(map(repr, sorted(twice)))}")
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{path}, line {reader.line_num}: more cells than the {len(columns)} columns "
                    f"({', '.join(columns)}); texts that hold {separator!r} must stand in double quotes"
                )
            rows.append({name: value or "" for name, value in row.items() if name})
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; is a double quote not closed?") from error
    return columns, rows


def find_column(columns: Iterable[str], known: tuple[str, ...], what: str, path: Path) -> str:
    """The first of the columns whose name, in lower case, is known to hold `what`.

    Raises:
        ValueError: none is.
    """
    for name in known:
        for column in columns:
            if column.strip().lower() == name:
                return column
    raise ValueError(
        f"{path} has no column for {what}: its columns are {', '.join(map(repr, columns))}; "
        f"one must be called {', '.join(known[:-1])} or {known[-1]}"
    )


def _read_table_pairs(path: Path) -> list[Pair]:
    columns, rows = read_table(path)
    image_column = find_column(columns, IMAGE_COLUMNS, "the image paths", path)
    caption_column = find_column(columns, CAPTION_COLUMNS, "the captions", path)
    pairs = []
    for row in rows:
        name = row.pop(image_column)
        captions = tuple(row.pop(caption_column).splitlines())
        image = path.parent / name  # an absolute path stays one
        problem = None if _is_file(image) else f"no image file {image} (paths are relative to the table's folder)"
        pairs.append(Pair(name, image, captions, problem, row))
    return pairs


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the file system allows
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@dataclass(frozen=True)
class Packed:
    """What `pack` did: kept and rejected add up to the pairs it was given."""

    kept: int
    rejected: int
    shards: int
    size_bytes: int


def pack(
    pairs: list[Pair],
    out: str | Path,
    *,
    source: str,
    samples_per_shard: int = 10_000,
    resize: int | None = None,
    quality: int = 95,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Any = None,
) -> Packed:
    """Writes pairs as shards. The folder appears under its name only when it is complete.

    Args:
        pairs: of `read_pairs`. Every image is decoded once here, so that a broken one is found now.
        out: the folder to write.
        source: where the pairs came from, for messages and the index.
        samples_per_shard: the last shard may hold fewer.
        resize: shrink images whose short side is longer than this many pixels; keeps the aspect.
        quality: JPEG quality of shrunk images, 1 to 95.
        workers: threads that decode; by default one a core.
        overwrite: replace `out` if it is there.
        progress: called with the number of pairs done, now and then.

    Raises:
        ValueError: `out` exists, no pair can be used, or an argument out of its range.
    """
    out = Path(out)
    for name, value in (("samples_per_shard", samples_per_shard), ("resize", resize), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 1 <= quality <= 95:
        raise ValueError(f"quality is {quality}; JPEG quality goes from 1 to 95")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already; pass --overwrite to replace it, or name another folder")
    if out.exists() and not (out / INDEX_FILE).is_file():
        raise ValueError(f"{out} is not a folder of shards (it has no {INDEX_FILE}), so it is not overwritten")
    if not pairs:
        is_folder = Path(source).is_dir()
        what = f"no image ({', '.join(IMAGE_SUFFIXES)}) with a .txt of the same name beside it"
        raise ValueError(f"no pairs found in {source}: it holds {what if is_folder else 'no rows'}")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("tmp", "old"))
    temporary.mkdir()
    try:
        packed = _write_shards(pairs, temporary, source, samples_per_shard, resize, quality, workers, progress)
        if out.exists():
            os.rename(out, old)  # kept until the new ones have its name
        os.rename(temporary, out)
        return packed
    finally:
        if old.exists() and not out.exists():
            os.rename(old, out)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(
    pairs: list[Pair],
    folder: Path,
    source: str,
    samples_per_shard: int,
    resize: int | None,
    quality: int,
    workers: int | None,
    progress: Any,
) -> Packed:
    from webdataset import TarWriter  # imports torch, which `miniclip --help` must not wait for

    rejected: list[tuple[str, str]] = []
    healthy = _healthy(pairs, resize, quality, workers or os.cpu_count() or 1, rejected, progress)
    shards: list[dict[str, Any]] = []
    kept = 0
    while samples := islice(healthy, samples_per_shard):
        first = next(samples, None)
        if first is None:
            break
        name = f"{len(shards):05d}"
        with atomic_write(folder / f"{name}.tar") as file, TarWriter(file, encoder=False, mtime=0) as tar:
            for sample in (first, *samples):
                tar.write({"__key__": f"{kept:09d}", **sample})
                kept += 1
        shards.append(index_shard(folder / f"{name}.tar"))
    with atomic_write(folder / REJECTED_FILE) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        csv.writer(text).writerows([("source", "reason"), *rejected])
        text.detach()
    if not kept:
        examples = "".join(f"\n  {name}: {reason}" for name, reason in rejected[:5])
        raise ValueError(f"none of the {len(pairs)} pairs in {source} can be used:{examples}")
    assert kept + len(rejected) == len(pairs)
    index = {"schema": SCHEMA_VERSION, "source": source, "samples": kept, "rejected": len(rejected), "shards": shards}
    write_text(folder / INDEX_FILE, json.dumps(index, indent=1) + "\n")
    return Packed(kept, len(rejected), len(shards), sum(shard["bytes"] for shard in shards))


def _healthy(
    pairs: list[Pair], resize: int | None, quality: int, workers: int, rejected: list[tuple[str, str]], progress: Any
) -> Iterator[dict[str, bytes]]:
    """The members of each usable sample, in the order of the pairs; the others go to `rejected`.

    Threads, as reading, decoding and encoding images let go of the interpreter's lock.
    """
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(pairs), _WINDOW):
            window = pairs[start : start + _WINDOW]
            for pair, result in zip(window, pool.map(lambda p: _members(p, resize, quality), window), strict=True):
                if isinstance(result, str):
                    rejected.append((pair.source, result))
                else:
                    yield result
            if progress:
                progress(start + len(window))


def _members(pair: Pair, resize: int | None, quality: int) -> dict[str, bytes] | str:
    """The files of one sample by their suffix, or why there are none."""
    if pair.problem:
        return pair.problem
    assert pair.path is not None
    captions = [" ".join(caption.split()) for caption in pair.captions]
    captions = [caption for caption in captions if caption]
    if not captions:
        return "every caption is empty"
    try:
        data = pair.path.read_bytes()
        image = open_image(data, pair.path.name)
    except (OSError, ValueError) as error:
        return str(error)
    width, height = image.size
    scale = resize / min(width, height) if resize else 1.0
    is_animated = getattr(image, "is_animated", False) and image.format == "WEBP"  # not every decoder reads those
    suffix = None if is_animated else _KEPT_FORMATS.get(image.format or "")
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        suffix, data = "jpg", _encode(image, "JPEG", quality=quality)
    elif suffix is None:
        suffix, data = "png", _encode(image.convert("RGB"), "PNG")
    facts = {**pair.extra, "source": pair.source, "width": image.width, "height": image.height}
    return {
        suffix: data,
        "txt": "\n".join(captions).encode("utf-8"),
        "json": json.dumps(facts, ensure_ascii=False).encode("utf-8"),
    }


def _encode(image: Image.Image, file_format: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def index_shard(path: Path) -> dict[str, Any]:
    """Writes the `.npz` that belongs to a tar, and returns the tar's entry for `index.json`."""
    keys: OrderedDict[str, dict[str, tuple[int, int]]] = OrderedDict()
    with tarfile.open(path) as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")  # as webdataset does: up to the name's first dot
            key = folder + slash + key
            kind = "image" if f".{suffix.lower()}" in IMAGE_SUFFIXES else suffix.lower()
            keys.setdefault(key, {})[kind] = (member.offset_data, member.size)
    image, text = (
        np.array([members.get(kind, (0, 0)) for members in keys.values()], dtype=np.int64).reshape(-1, 2)
        for kind in ("image", "txt")
    )
    with atomic_write(path.with_suffix(".npz")) as file:
        np.savez(file, key=np.array(list(keys), dtype=np.str_), image=image, txt=text)
    with open(path, "rb") as tar_file:
        checksum = hashlib.file_digest(tar_file, "sha256").hexdigest()
    return asdict(ShardEntry(path.name, len(keys), path.stat().st_size, checksum))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass(frozen=True)
class ShardEntry:
    """One line of `index.json`."""

    file: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """One sample as it lies in its shard, not decoded."""

    key: str
    image: bytes
    captions: tuple[str, ...]


class Shards:
    """Random access to the samples of a folder of shards, by number, 0 to len - 1.

    Opening reads `index.json` alone; a shard's offsets are read when it is first needed, and the files of the
    64 shards last used are kept open.

    Raises:
        ValueError: no index, or one that this version can't read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX_FILE
        if not path.is_file():
            what = "it has no index.json" if self.folder.is_dir() else "it does not exist"
            raise ValueError(
                f"{self.folder} is not a folder of shards: {what}. "
                "`miniclip shards SRC OUT` makes one from a folder of images and texts or from a table"
            )
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            version = index["schema"]
            entries = [ShardEntry(**entry) for entry in index["shards"]] if version == SCHEMA_VERSION else []
            self.counts = np.array([int(entry.samples) for entry in entries], dtype=np.int64)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error!r}; write the shards again") from error
        if version != SCHEMA_VERSION:
            raise ValueError(f"{path} has schema {version!r}, this version of miniclip reads {SCHEMA_VERSION}")
        self.entries = entries
        self._ends = np.cumsum(self.counts)
        self._open: OrderedDict[int, tuple[IO[bytes], dict[str, np.ndarray]]] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # file handles stay in their process

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
        return Record(key, image, tuple(text.decode("utf-8", errors="replace").splitlines()))

    def _shard(self, shard: int) -> tuple[IO[bytes], dict[str, np.ndarray]]:
        if shard not in self._open:
            path = self.folder / self.entries[shard].file
            offsets = self._read_offsets(path.with_suffix(".npz"), self.entries[shard].samples)
            try:
                file = open(path, "rb")  # noqa: SIM115 (closed when 64 others are in use)
            except OSError as error:
                raise ValueError(f"shard {path} can't be read: {error}") from error
            self._open[shard] = (file, offsets)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)[1][0].close()
        self._open.move_to_end(shard)
        return self._open[shard]

    @staticmethod
    def _read_offsets(path: Path, samples: int) -> dict[str, np.ndarray]:
        try:
            with np.load(path, allow_pickle=False) as arrays:
                offsets = {name: arrays[name] for name in ("key", "image", "txt")}
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged or gone ({error}); pack the shards again") from error
        if any(len(column) != samples for column in offsets.values()):
            raise ValueError(
                f"{path} lists {len(offsets['key'])} samples, {INDEX_FILE} {samples}; pack the shards again"
            )
        return offsets

    @staticmethod
    def _read(file: IO[bytes], key: str, offset: int, size: int) -> bytes:
        data = os.pread(file.fileno(), int(size), int(offset))  # no shared position: safe across forked workers
        if len(data) != size:
            raise ValueError(f"{file.name} is cut short: sample {key} should end at byte {offset + size}")
        return data
