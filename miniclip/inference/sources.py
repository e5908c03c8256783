"""What people name on a command line or hand over in Python -> one set of images, or of texts.

| source                                             | images                              | texts                   |
|----------------------------------------------------|-------------------------------------|-------------------------|
| a file: photo.jpg, notes.txt                       | the picture                         | its lines               |
| a folder                                           | the pictures in it, however deep    | the lines of its texts  |
| a quoted pattern: 'photos/**/*.jpg', '{a,b}/*.jpg' | of its matches, in order            | likewise                |
| a table, a folder or pattern of Parquet files      | a column of paths, URLs or pictures | one column or several   |
| shards: a folder, a pattern, a URL                 | their images                        | their captions          |
| Hugging Face's `datasets`: a folder, `hf-hub:`     | the column of images, all splits    | one column or several   |
| a URL                                              | the picture there                   |                         |
| `-`, or a named pipe                               | names, one a line; or one picture   | a text a line           |
| in Python: PIL images, arrays of pixels, bytes     | themselves                          |                         |

A name that is there is never read as a pattern. A URL with a query and no suffix is a picture, as most are; a folder of
shards ends in `/` before the query, or is the only source and has an index. Order is kept; of a folder or pattern it is
that of the paths. What is no image or text of the set is counted in `left_out`, by reason; pictures that can't be read
are noticed where they are opened.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import accumulate, count
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from ..common.arguments import check_list, check_path, shown
from ..common.storage import check_scheme, exists, is_url, join, name_of, read_blocks, split_query
from ..common.wording import columns_in_words, some
from ..data.open_pairs import is_shards
from ..data.reading.arrow_column import ArrowColumn, joined
from ..data.reading.cells import decode_text, lines_in, picture_of_pixels, texts_in_cell
from ..data.reading.huggingface import HUB_PREFIX, DatasetsRows, is_datasets_folder, load_datasets, undecoded
from ..data.reading.rows import caption_columns_of
from ..data.reading.scan import (
    IMAGE_SUFFIXES,
    LEFTOVER,
    TABLE_SUFFIXES,
    LeftOut,
    holds_picture,
    image_files,
    is_leftover,
    scan,
    summary,
    unread_reason,
)
from ..data.reading.tables import is_parquet, is_table_of_pictures, read_table, table_suffix
from ..data.shard_index import INDEX_FILE
from ..evaluation.datasets.bare import bare_datasets, bare_folder, bare_table, bare_tars, open_shards
from ..evaluation.datasets.sets import EvaluationSet, digest_lines
from ..evaluation.datasets.tars import (
    NUM_SHARDS_FILE,
    benchmark_splits,
    captions_of,
    hub_location,
    shard_columns,
)
from .names import STANDARD_INPUT, StandardInput, existing, lines_of, matching

TWICE = "named more than once"


# ---------------------------------------------------------------------------------------------------------------------
# Images


def image_set(
    sources: Any,
    *,
    image_column: str | None = None,
    split: str | None = None,
    is_each_once: bool = False,
    upright: bool = False,
    stdin: BinaryIO | None = None,
) -> EvaluationSet:
    """The images of any sources of the table above, in order.

    Args:
        sources: a sequence of them, or a single one.
        image_column: of tables and `datasets`; by default found by its name or type.
        split: of tables and `datasets` that have several; None for all of them.
        is_each_once: leave out, and count, files and URLs that were named before, as those of a folder and of itself,
            or of a link to it.
        upright: as that of `EvaluationSet`.
        stdin: in place of standard input.

    Raises:
        ValueError: a source that is not there or can't be read, or no image in any of them.
    """
    columns = _ColumnsAskedFor([image_column] if image_column else [])
    named = _as_list(sources)
    reader = _Reader(columns, stdin, split, is_only=len(named) == 1)
    parts = [part for number, source in enumerate(named) for part in reader.parts_of(source, number)]
    columns.refuse_unused(named)
    if is_each_once:
        seen: set[str] = set()
        parts = [_without_known(part, seen) for part in parts]
    found = _as_one(parts)
    if not len(found):
        names = some([str(source) for source in named if isinstance(source, str | Path)], 3) or "the sources"
        why = f": {summary(found.left_out)}" if found.left_out else ""
        raise ValueError(f"no images in {names}{why}" if named else "no images are named")
    return replace(found, upright=True) if upright else found


class _ColumnsAskedFor:
    """The columns that are asked for by name, and whether a source was met that has columns."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self.is_read = list(names), False

    def names(self) -> list[str]:
        """For a source that has columns."""
        self.is_read = True
        return self._names

    def name(self) -> str | None:
        return next(iter(self.names()), None)

    def refuse_unused(self, sources: Sequence[Any]) -> None:
        if self._names and not self.is_read:
            named = some([str(source) for source in sources if isinstance(source, str | Path)], 3) or "what is given"
            raise ValueError(f"the column {self._names[0]!r} is asked for, and {named} has no columns; a table has")


class _Reader:
    """Reads sources as images; standard input once."""

    def __init__(self, columns: _ColumnsAskedFor, stdin: BinaryIO | None, split: str | None, is_only: bool) -> None:
        self.columns, self.stdin, self.split, self.is_only = columns, StandardInput(stdin), split, is_only

    def parts_of(self, source: Any, number: int) -> Iterator[EvaluationSet]:
        if isinstance(source, str | Path):
            yield from self.named(str(source))
        else:
            image, key = in_memory(source, number), f"image {number}"
            yield EvaluationSet(key, (image,), keys=(key,))

    def named(self, source: str) -> Iterator[EvaluationSet]:
        if source == STANDARD_INPUT:
            yield _of_stream(self.stdin.read(), "standard input")
        elif source.startswith(HUB_PREFIX) or is_url(source):
            yield from self.remote(source)
        elif (path := existing(source)) is not None:
            yield from self.local(path)
        else:
            yield from self.pattern(source)

    def remote(self, source: str) -> Iterator[EvaluationSet]:
        if source.startswith(HUB_PREFIX):
            location = hub_location(source)
            try:
                is_tars = bool(benchmark_splits(location, None))
            except ValueError:  # not on the hub; the library below reports why, or has a token for it
                is_tars = False
            yield from [bare_tars(location)] if is_tars else bare_datasets(source, self.columns.name(), self.split)
            return
        check_scheme(source)
        is_set = _is_remote_set(source, self.is_only)
        yield bare_tars(hub_location(source)) if is_set else EvaluationSet(source, (source,))

    def local(self, path: Path) -> Iterator[EvaluationSet]:
        source = str(path)
        if path.is_dir():
            if is_datasets_folder(path):
                yield from bare_datasets(source, self.columns.name(), self.split)
            elif _is_shards_folder(path):
                yield bare_tars(source)
            elif is_parquet(path) and not image_files(path):
                yield bare_table(path, self.columns.name(), self.split)
            else:
                found = bare_folder(path)
                left_out = [replace(each, source=f"{path}/{each.source}") for each in found.left_out]
                if not len(found):
                    left_out.append(LeftOut(source, "a folder without pictures"))
                yield replace(found, left_out=left_out)
        elif path.is_fifo():
            yield _of_stream(path.read_bytes(), source)
        elif path.suffix.lower() == ".tar":
            yield bare_tars(source)
        elif table_suffix(path) in (*TABLE_SUFFIXES, ".json"):
            yield bare_table(path, self.columns.name(), self.split)
        else:
            yield _of_files([path], path.name)

    def pattern(self, source: str) -> Iterator[EvaluationSet]:
        matches = matching(source)
        suffixes = {path.suffix.lower() for path in matches}
        if suffixes == {".tar"}:
            for path in matches:
                yield bare_tars(str(path))
        elif suffixes == {".parquet"}:
            yield bare_table(Path(source), self.columns.name(), self.split)
        else:  # as in a folder, tables beside pictures are not read
            seen: set[str] = set()  # a folder and what is in it may both match
            for path in matches:
                for part in self.local(path) if path.is_dir() else [_of_files([path], path.name)]:
                    once = _without_known(part, seen)
                    yield replace(once, left_out=[each for each in once.left_out if each.reason != TWICE])


def in_memory(value: Any, number: int) -> Image.Image | bytes:
    """A picture that Python holds: PIL's, a file's bytes, or pixels as `picture_of_pixels` takes them.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if hasattr(value, "detach"):  # a tensor
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        return picture_of_pixels(value)
    raise ValueError(
        f"image {number} is {shown(value)}; it must be a path, a URL, a PIL image, an array of pixels or the "
        "bytes of a file"
    )


def _as_list(sources: Any) -> list[Any]:
    """A single source is a list of one; an array of four dimensions holds several."""
    is_one = isinstance(sources, str | Path | bytes | bytearray | memoryview | Image.Image)
    if is_one or getattr(sources, "ndim", 1) in (2, 3):
        return [sources]
    return check_list("images", sources, "images or of their paths, or one of them")


def _is_shards_folder(folder: Path) -> bool:
    """Whether a folder holds shards, or an index of them or CLIP_benchmark's splits below."""
    return is_shards(str(folder)) or any(any(folder.glob(f"*/{name}")) for name in (INDEX_FILE, NUM_SHARDS_FILE))


def _is_remote_set(url: str, is_only: bool) -> bool:
    """Whether a URL stands for shards. One whose path ends without a suffix may be a folder, or a picture.

    Args:
        is_only: else it is one of many: with a query most likely a picture of a server that resizes or signs, which is
            not to be asked for each of them what else it has.
    """
    path, query = split_query(url)
    name = name_of(urlsplit(path).path)
    if split_query(hub_location(url))[0] != path.rstrip("/") or name.endswith(".tar") or "{" in path:
        return True
    if "." in name:
        return False
    if query and not path.endswith("/"):
        return is_only and _begins_as_json(join(url, INDEX_FILE))
    try:
        return any(exists(join(url, file)) for file in (INDEX_FILE, NUM_SHARDS_FILE)) or bool(
            benchmark_splits(url, None)
        )
    except ValueError:
        if query:  # a signature may be for one picture alone, and anything else is refused with it
            return False
        raise


def _begins_as_json(url: str) -> bool:
    """By one request, which is not repeated: a server may send its picture, or an error, whatever is asked of it."""
    try:
        return next((block for *_, block in read_blocks(url) if block), b"").lstrip().startswith(b"{")
    except Exception:  # network errors have no common base class
        return False


def _of_files(locations: Sequence[Path | str], name: str) -> EvaluationSet:
    """Files and URLs that were named one by one: files of another kind than pictures are left out."""
    reasons = ["" if isinstance(each, str) else _reason_against(each) for each in locations]
    named = list(zip(locations, reasons, strict=True))
    left_out = [LeftOut(str(each), reason) for each, reason in named if reason]
    return EvaluationSet(name, tuple(each for each, reason in named if not reason), left_out=left_out)


def _of_stream(data: bytes, name: str) -> EvaluationSet:
    """A picture's own bytes, or names of pictures: one a line, or each before a NUL, as `find -print0` writes them."""
    if holds_picture(data[:32]):
        return EvaluationSet(name, (data,), keys=(name,))
    names = lines_of(data, name)
    if not names:
        raise ValueError(f"{name} is empty: it holds neither names of pictures nor a picture")
    if any("\0" in each for each in names):
        raise ValueError(f"{name} holds neither names of pictures nor a picture that can be read ({len(data)} bytes)")
    for each in names:
        check_scheme(each)
    return _of_files([each if is_url(each) else Path(each) for each in names], name)


def _reason_against(path: Path) -> str:
    """Why a file that was named is not taken; empty if it is, as one is that is not there and is missed by name."""
    if is_leftover(path.name):
        return LEFTOVER
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ""
    if path.is_dir():
        return "a folder, where names of files are read"
    try:
        with open(path, "rb") as file:
            return "" if holds_picture(file.read(32), path.name) else unread_reason(path.name)
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------------------------------------
# Several sources as one


def _without_known(part: EvaluationSet, seen: set[str]) -> EvaluationSet:
    if not isinstance(part.images, tuple):
        return part
    kept, left_out = [], list(part.left_out)
    real_folder = cache(Path.resolve)  # a linked one has the files of the other
    for index, image in enumerate(part.images):
        name = ""
        if isinstance(image, str) and is_url(image):
            name = image
        elif isinstance(image, str | Path):
            path = Path(image).absolute()
            name = str(real_folder(path.parent) / path.name)
        if name and name in seen:
            left_out.append(LeftOut(part.key(index), TWICE))
        else:
            kept.append(index)
        seen.add(name)
    if len(kept) == len(part):
        return part
    keys = None if part.keys is None else [part.keys[index] for index in kept]
    names = None if part.names is None else [part.names[index] for index in kept]
    metadata = {name: _only(values, kept) for name, values in part.metadata.items()}
    identity = None if part.identity is None else digest_lines([part.identity, *map(str, kept)])
    return replace(
        part,
        images=tuple(part.images[index] for index in kept),
        keys=keys,
        metadata=metadata,
        identity=identity,
        left_out=left_out,
        names=names,
    )


class _Chain(Sequence[Any]):
    """Sequences, one after the other, whose values are read when they are asked for."""

    def __init__(self, parts: Sequence[Sequence[Any]]) -> None:
        self.parts, self.ends = list(parts), list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> Any:
        place = bisect_right(self.ends, index)
        return self.parts[place][index - (self.ends[place] - len(self.parts[place]))]


def _as_one(parts: Sequence[EvaluationSet]) -> EvaluationSet:
    if len(parts) == 1:
        return parts[0]
    left_out = [each for part in parts for each in part.left_out]
    parts = [part for part in parts if len(part)]
    if not parts:
        return EvaluationSet("no images", (), left_out=left_out)
    name = parts[0].name if len(parts) == 1 else f"{parts[0].name} and {len(parts) - 1} more"
    images: Sequence[Any] = _Chain([part.images for part in parts])
    if all(isinstance(part.images, tuple) for part in parts):
        images = tuple(image for part in parts for image in part.images)
    has_keys = any(part.keys is not None for part in parts)
    is_known = any(part.identity is not None for part in parts)
    return EvaluationSet(
        name,
        images,
        keys=[part.key(index) for part in parts for index in range(len(part))] if has_keys else None,
        metadata=_columns_as_one(parts),
        identity=digest_lines(part.fingerprint() for part in parts) if is_known else None,
        left_out=left_out,
    )


def _columns_as_one(parts: Sequence[Any]) -> dict[str, Sequence[Any]]:
    """The columns of all parts; None where a part has no such column."""
    found: dict[str, Sequence[Any]] = {}
    for name in dict.fromkeys(name for part in parts for name in part.metadata):
        found[name] = joined([part.metadata.get(name, [None] * len(part)) for part in parts if len(part)])
    return found


def _only(values: Sequence[Any], rows: Sequence[int]) -> Sequence[Any]:
    return values.only(rows) if isinstance(values, ArrowColumn) else [values[row] for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Texts


@dataclass(frozen=True)
class Texts:
    """T texts.

    Args:
        keys: T names by which a user knows them: file and line, table and row, a sample's key.
        metadata: what else is known of them, T values under each name: a list of them, or an `ArrowColumn`.
        left_out: what of the sources is no text of the set, with the reason.
    """

    texts: Sequence[str]
    keys: Sequence[str]
    metadata: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    left_out: Sequence[LeftOut] = ()

    def __len__(self) -> int:
        return len(self.texts)


def text_set(sources: Any, *, text_columns: Sequence[str] = (), stdin: BinaryIO | None = None) -> Texts:
    """The texts of any sources of the table above, in order. Names are those of files: a text itself is no source.

    Args:
        sources: a sequence of them, or a single one.
        text_columns: of tables and `datasets`; by default those that are called caption, text, …
        stdin: in place of standard input.

    Raises:
        ValueError: a source that is not there or can't be read, or no text in any of them.
    """
    standard_input, columns = StandardInput(stdin), _ColumnsAskedFor(text_columns)
    named = [sources] if isinstance(sources, str | Path) else check_list("sources", sources, "names of files")
    for number, source in enumerate(named):
        check_path(f"sources[{number}]", source)
    parts = [part for source in named for part in _texts_of(str(source), columns, standard_input)]
    columns.refuse_unused(named)
    found = Texts(
        tuple(text for part in parts for text in part.texts),
        tuple(key for part in parts for key in part.keys),
        _columns_as_one(parts),
        [each for part in parts for each in part.left_out],
    )
    if not len(found):
        why = f": {summary(found.left_out)}" if found.left_out else ""
        raise ValueError(f"no texts in {some([str(source) for source in named], 3)}{why}")
    return found


def _texts_of(source: str, columns: _ColumnsAskedFor, stdin: StandardInput) -> Iterator[Texts]:
    if source == STANDARD_INPUT:
        if is_table_of_pictures(decode_text(data := stdin.read(), "standard input")):
            raise ValueError(
                "standard input is a table of pictures and captions; name its file, or give its texts alone"
            )
        yield _texts_in(data, "standard input", "line ")
    elif source.startswith(HUB_PREFIX):
        yield from _texts_of_datasets(source, columns)
    elif is_url(source):
        yield _texts_of_shards(hub_location(source))
    elif (path := existing(source)) is None:
        matches = matching(source)
        if {match.suffix.lower() for match in matches} == {".parquet"}:
            yield _texts_of_table(Path(source), columns)
        else:
            for match in matches:
                yield from _texts_of(str(match), columns, stdin)
    elif path.is_dir():
        if is_datasets_folder(path):
            yield from _texts_of_datasets(source, columns)
        elif _is_shards_folder(path):
            yield _texts_of_shards(source)
        elif is_parquet(path) and not image_files(path):
            yield _texts_of_table(path, columns)
        else:
            yield from _texts_of_folder(path, columns)
    elif path.suffix.lower() == ".tar":
        yield _texts_of_shards(source)
    elif table_suffix(path) in (*TABLE_SUFFIXES, ".json"):
        yield _texts_of_table(path, columns)
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        yield Texts((), (), left_out=[LeftOut(source, "a picture, where texts are read")])
    else:
        yield _texts_of_file(path, columns)


def _texts_of_file(path: Path, columns: _ColumnsAskedFor) -> Texts:
    """The lines of a text, or the captions of a table, whatever its suffix."""
    try:
        data = path.read_bytes()
        if is_table_of_pictures(decode_text(data, path)):
            return _texts_of_table(path, columns)
        return _texts_in(data, str(path), f"{path}:")
    except OSError as error:
        return Texts((), (), left_out=[LeftOut(str(path), f"a text that can't be read ({error.strerror or error})")])
    except ValueError as error:
        return Texts((), (), left_out=[LeftOut(str(path), str(error).removeprefix(f"{path} is "))])


def _texts_in(data: bytes, name: str, prefix: str) -> Texts:
    """The lines of a text that are not blank, each with its number."""
    lines = lines_in(decode_text(data, name))
    texts = [(f"{prefix}{number}", line) for number, line in enumerate(lines, 1) if line]
    left_out = [LeftOut(name, "a blank line", len(lines) - len(texts))] if len(texts) < len(lines) else []
    left_out += [] if lines else [LeftOut(name, "an empty text")]
    return Texts([text for _, text in texts], [key for key, _ in texts], left_out=left_out)


def _texts_of_folder(folder: Path, columns: _ColumnsAskedFor) -> Iterator[Texts]:
    below = scan(folder)
    pictures = [LeftOut(str(folder), "a picture, where texts are read", len(below.images))] if below.images else []
    others = [replace(each, source=f"{folder}/{each.source}") for each in below.unread(below.others)]
    left_out = [replace(each, source=f"{folder}/{each.source}") for each in below.left_out]
    yield Texts((), (), left_out=[*pictures, *left_out, *others])
    for path in below.texts:
        yield _texts_of_file(path, columns)


def _texts_of_table(path: Path, columns: _ColumnsAskedFor) -> Texts:
    names, rows = read_table(path)
    chosen = _text_columns(names, columns.names(), str(path))
    return _texts_of_rows(rows, names, chosen, str(path), list(getattr(rows, "left_out", ())))


def _texts_of_datasets(source: str, columns: _ColumnsAskedFor) -> Iterator[Texts]:
    loaded = load_datasets(source)
    name = source.removeprefix(HUB_PREFIX).rstrip("/").rpartition("/")[2]
    for split, rows in (loaded if isinstance(loaded, dict) else {"": loaded}).items():
        names = list(rows.column_names)
        chosen = _text_columns(names, columns.names(), source)
        yield _texts_of_rows(DatasetsRows(undecoded(rows)), names, chosen, f"{name}, {split}" if split else name, [])


def _text_columns(names: list[str], columns: Sequence[str], source: str) -> list[str]:
    if absent := [name for name in columns if name not in names]:
        raise ValueError(f"{source} has no column {absent[0]!r}; its columns are {columns_in_words(names)}")
    return list(columns) or caption_columns_of(source, names)


def _texts_of_rows(rows: Any, names: Sequence[str], chosen: list[str], table: str, left_out: list[LeftOut]) -> Texts:
    found = (partial(_texts_in_cells, cells) for cells in zip(*map(rows.whole, chosen), strict=True))
    metadata = {name: rows.whole(name) for name in names if name not in chosen}
    return _as_texts(found, (f"{table}: row {n}" for n in count(1)), metadata, left_out, "a row without a text")


def _texts_in_cells(cells: Sequence[Any]) -> list[str]:
    return [text for cell in cells for text in texts_in_cell(cell)]


def _as_texts(
    found: Iterable[Callable[[], Sequence[str]]],
    names: Iterable[str],
    metadata: Mapping[str, Sequence[Any]],
    left_out: list[LeftOut],
    without: str,
) -> Texts:
    """The texts of rows or samples, of which each may have several.

    Args:
        found: what reads the texts of each; its ValueError is why they are left out.
        metadata: a value for each row under each name.
        without: why a row that has none is left out.
    """
    texts: list[str] = []
    keys: list[str] = []
    rows: list[int] = []  # of each text
    for row, (read, name) in enumerate(zip(found, names, strict=False)):
        try:
            own, reason = read(), without
        except ValueError as error:
            own, reason = (), str(error).removeprefix(f"{name}: ")
        if not own:
            left_out.append(LeftOut(name, reason))
        texts += own
        keys += [name + (f", text {n}" if n > 1 else "") for n in range(1, len(own) + 1)]
        rows += [row] * len(own)
    return Texts(texts, keys, {name: _only(values, rows) for name, values in metadata.items()}, left_out)


def _texts_of_shards(source: str) -> Texts:
    shards = open_shards(source)
    metadata, damaged = shard_columns(shards)
    left_out = [*(LeftOut(source, each.reason, each.count) for each in shards.left_out), *damaged]
    found = (partial(captions_of, shards, number) for number in range(len(shards)))
    return _as_texts(found, shards.names(), metadata, left_out, "a sample without a text")
