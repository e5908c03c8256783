"""What people have -> a sequence of pairs, each image with its captions.

| source                               | images                              | captions                    |
|--------------------------------------|-------------------------------------|-----------------------------|
| a folder, sub-folders and all        | its image files                     | the `.txt` of the same name |
| `.csv`, `.tsv`, `.jsonl`, `.parquet` | a column of paths, URLs or bytes    | one column or several       |
| COCO's captions, a `.json`           | `file_name`                         | `annotations`               |
| a set of Hugging Face's `datasets`   | the column of images                | one column or several       |

Nothing is read before it is asked for but names and tables: `pairs[i]` reads, wherever it is called.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from ..common.storage import is_url

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_COLUMNS = (
    "filepath", "image", "image_path", "path", "file", "filename", "file_name", "img", "jpg", "url", "image_url",
)  # fmt: skip
CAPTION_COLUMNS = ("caption", "captions", "title", "text", "texts", "description", "sentences", "alt_text", "txt")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
HUB_PREFIX = "hf-hub:"
_NUMBERED_CAPTION = re.compile(r"(caption|title|text|sentence|description|comment)s?[_ ]?\d+")
_SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
_DATASETS_FILES = ("dataset_dict.json", "dataset_info.json", "state.json")
_NOT_OF = defaultdict[str, tuple[str, ...]](tuple, {".json": ("--image-column", "--caption-column")})
_BINARY = ("binary", "large_binary", "binary_view")  # pyarrow's names
_PROBED = 100


@dataclass(frozen=True)
class Pair:
    """One image with its captions, not yet looked at.

    Args:
        source: how the user knows it, for messages.
        image: the file, its URL, or its bytes.
        captions: texts; blank ones do not count.
        problem: why it can't be used, where that is known already.
        extra: anything else that was known of it; goes into the sample's `.json`.
    """

    source: str
    image: Path | str | bytes | None = None
    captions: tuple[str, ...] = ()
    problem: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Pairs(Sequence[Pair]):
    """Pairs by number, each read when it is asked for.

    Args:
        names: how the user knows each.
        read: the pair of a number; called from several threads at once.
        found: what was recognised in the source, for the user to check.
        files: what it is read from, as far as that is known; a change to one makes it another source.
    """

    def __init__(
        self, names: Sequence[str], read: Callable[[int], Pair], found: str, files: Iterable[Path] = ()
    ) -> None:
        self.names, self.read, self.found, self.files = names, read, found, files

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self.read(n) for n in range(len(self))[number]]
        return self.read(range(len(self))[number])


def fingerprint(pairs: Sequence[Pair]) -> str:
    """Tells whether a source still lists the same pairs in the same order, from files of the same size and time."""
    names: Iterable[str] = pairs.names if isinstance(pairs, Pairs) else (pair.source for pair in pairs)
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode("utf-8", "surrogatepass") + b"\0")
    for path in pairs.files if isinstance(pairs, Pairs) else ():
        try:
            facts = path.stat()
            digest.update(f"{facts.st_size} {facts.st_mtime_ns}\0".encode())
        except (OSError, ValueError):
            digest.update(b"absent\0")
    return digest.hexdigest()[:16]


def read_pairs(
    source: str | Path,
    *,
    images: str | Path | None = None,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    split: str = "train",
) -> Pairs:
    """The pairs of any source in the table above.

    Args:
        images: the folder that a table's paths are relative to; by default the table's own.
        image_column, caption_columns: of a table; by default found by their names.
        split: of a `datasets` set that has several.

    Raises:
        ValueError: no such source, a table without the columns that are needed, or paths that lead nowhere.
    """
    if str(source).startswith(HUB_PREFIX):
        return _read_datasets(str(source), image_column, caption_columns, split)
    path = Path(source)
    rows: Sequence[dict[str, Any]]
    named = {"--images": images, "--image-column": image_column, "--caption-column": caption_columns}
    is_set = is_datasets_folder(path)
    given = [name for name, value in named.items() if value and (path.is_dir() or name in _NOT_OF[path.suffix])]
    if given and not is_set:
        what = "a folder" if path.is_dir() else "no table with columns"
        raise ValueError(f"{', '.join(given)} can't be followed: {source} is {what}")
    if path.is_dir():
        if is_set:
            return _read_datasets(str(source), image_column, caption_columns, split)
        return _read_folder(path)
    suffix = path.suffix.lower()
    if path.is_file() and suffix == ".json":
        columns, rows = _read_coco(path)
        return _pairs_of_rows(path, columns, rows, images, "file_name", ["captions"])
    if path.is_file() and suffix in TABLE_SUFFIXES:
        columns, rows = read_table(path)
        return _pairs_of_rows(path, columns, rows, images, image_column, caption_columns)
    if not path.exists():
        raise ValueError(f"no folder or file {source}")
    raise ValueError(f"{source} is no folder, no table ({', '.join(TABLE_SUFFIXES)}) and no captions of COCO's (.json)")


# ---------------------------------------------------------------------------------------------------------------------
# A folder


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, by their suffix, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _read_folder(folder: Path) -> Pairs:
    images = image_files(folder)
    with_image = {path.with_suffix("") for path in images}
    alone = [text for text in sorted(folder.rglob("*.txt")) if text.with_suffix("") not in with_image]

    def read(number: int) -> Pair:
        name = names[number]
        if number >= len(images):
            stem = alone[number - len(images)].stem
            return Pair(name, problem=f"no image: there is no {stem}.jpg, .png, … beside it")
        path = images[number]
        text = path.with_suffix(".txt")
        try:
            return Pair(name, path, tuple(text.read_text(encoding="utf-8-sig").splitlines()))
        except FileNotFoundError:
            return Pair(name, problem=f"no captions: there is no {text.name} beside it")
        except UnicodeDecodeError as error:
            return Pair(name, problem=f"{text.name} is not UTF-8 text: {error}")
        except OSError as error:
            return Pair(name, problem=f"{text.name} can't be read: {error}")

    names = [str(path.relative_to(folder)) for path in (*images, *alone)]
    files = (file for path in images for file in (path, path.with_suffix(".txt")))
    return Pairs(names, read, f"{len(images)} images, captions from the .txt beside each", [*files, *alone])


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def read_table(path: Path) -> tuple[list[str], Sequence[dict[str, Any]]]:
    """Column names and rows of a CSV, TSV, JSON Lines or Parquet file.

    Raises:
        ValueError: an empty file, one that is not what its suffix says, or a row that does not fit the columns.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        rows = _ParquetRows(path)
        return rows.columns, rows
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    if suffix in (".jsonl", ".ndjson"):
        return _parse_json_lines(path, text)
    return _parse_csv(path, text)


def _parse_csv(path: Path, text: str) -> tuple[list[str], list[dict[str, Any]]]:
    """A separator other than the suffix's is found out."""
    header = text.split("\n", 1)[0].strip()
    if not header:
        what = "begins with a blank line" if text.strip() else "is empty"
        raise ValueError(f"{path} {what}; its first line must name the columns")
    expected = "\t" if path.suffix.lower() == ".tsv" else ","
    separator = expected if expected in header else max(_SEPARATORS, key=header.count)
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
                    f"{path}, line {reader.reader.line_num}: more cells than the {len(columns)} columns "
                    f"({', '.join(columns)}); texts that hold {separator!r} must stand in double quotes"
                )
            rows.append({name: value or "" for name, value in row.items() if name})
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: {error}; is a double quote not closed?") from error
    return columns, rows


def _parse_json_lines(path: Path, text: str) -> tuple[list[str], list[dict[str, Any]]]:
    rows, columns = [], dict[str, None]()
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold the other ends of lines
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} holds {type(row).__name__}; each must be a mapping: {{…}}")
        rows.append(row)
        columns |= dict.fromkeys(row)
    if not columns:
        raise ValueError(f"{path} is empty; each line must be a mapping of column names to values: {{…}}")
    return list(columns), rows


class _ParquetRows(Sequence[dict[str, Any]]):
    """Rows of a Parquet file, a group of them in memory at a time: images may lie in them."""

    def __init__(self, path: Path) -> None:
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise ValueError(f"reading {path} needs pyarrow: pip install 'miniclip[datasets]'") from error
        self.path, self.errors = path, ArrowException
        try:
            self.file = parquet.ParquetFile(path)
        except (ArrowException, OSError) as error:
            raise ValueError(f"{path} is no Parquet file, or a damaged one: {error}") from error
        self.columns = list(self.file.schema_arrow.names)
        self.groups = [n for g in range(self.file.num_row_groups) for n in [self.file.metadata.row_group(g).num_rows]]
        self._lock = Lock()
        self._group = lru_cache(maxsize=2)(lambda group: self.file.read_row_group(group))

    def __len__(self) -> int:
        return sum(self.groups)

    def __getitem__(self, number: Any) -> Any:
        for group, count in enumerate(self.groups):
            if number < count:
                try:
                    with self._lock:
                        return self._group(group).slice(number, 1).to_pylist()[0]
                except (self.errors, OSError) as error:
                    raise ValueError(f"{self.path} is damaged in its row group {group}: {error}") from error
            number -= count
        raise IndexError(number)

    def column(self, name: str) -> list[Any]:
        """Its values, but nothing of images that lie in it."""
        leaves = (
            {self.file.metadata.row_group(0).column(n).path_in_schema: n for n in range(self.file.metadata.num_columns)}
            if self.groups
            else {}
        )
        image = leaves.get(
            f"{name}.bytes", leaves.get(name) if str(self.file.schema_arrow.field(name).type) in _BINARY else None
        )
        if image is not None and not all(self._is_empty(group, image) for group in range(len(self.groups))):
            return [None] * len(self)
        return self.file.read([f"{name}.path" if f"{name}.bytes" in leaves else name]).column(0).to_pylist()

    def _is_empty(self, group: int, leaf: int) -> bool:
        facts = self.file.metadata.row_group(group).column(leaf).statistics
        return facts is not None and facts.has_null_count and facts.null_count == self.groups[group]


def find_column(columns: Iterable[str], known: tuple[str, ...], what: str, source: str | Path) -> str:
    """The first of the columns whose name, in lower case, is known to hold `what`.

    Raises:
        ValueError: none is.
    """
    columns = list(columns)
    for name in known:
        for column in columns:
            if column.strip().lower() == name:
                return column
    hint = ""
    if len(columns) == 1:
        separators = ", ".join(_SEPARATORS.values())
        hint = f". If that is several columns in one: they may be separated by {separators}"
    raise ValueError(
        f"{source} has no column for {what}: its columns are {', '.join(map(repr, columns))}; "
        f"one must be called {', '.join(known[:-1])} or {known[-1]}, or be named to the command{hint}"
    )


def _choose_columns(
    source: str | Path, columns: list[str], image: str | None, captions: Sequence[str]
) -> tuple[str, list[str]]:
    for column in (*([image] if image else []), *captions):
        if column not in columns:
            raise ValueError(f"{source} has no column {column!r}; its columns are {', '.join(map(repr, columns))}")
    image = image or find_column(columns, IMAGE_COLUMNS, "the image paths", source)
    if captions:
        return image, list(captions)
    numbered = [column for column in columns if _NUMBERED_CAPTION.fullmatch(column.strip().lower())]
    return image, numbered or [find_column(columns, CAPTION_COLUMNS, "the captions", source)]


def texts_in(value: Any) -> list[str]:
    """The captions in a cell: one a line, or a list of them. Blank ones are none, and runs of spaces one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, list | tuple):
        return [text for part in value for text in texts_in(part)]
    if isinstance(value, Mapping):  # COCO's, and the hub's copies of it: {"raw": …}
        return [text for name in ("raw", "caption", "text") if name in value for text in texts_in(value[name])]
    return captions_in(str(value))


def captions_in(text: str) -> list[str]:
    """The captions of a text, one a line."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line for line in lines if line]


def _pairs_of_rows(
    path: Path,
    columns: list[str],
    rows: Sequence[dict[str, Any]],
    images: str | Path | None,
    image_column: str | None,
    caption_columns: Sequence[str],
) -> Pairs:
    """Rows of one image are one pair with several captions."""
    column, texts = _choose_columns(path, columns, image_column, caption_columns)
    folder = path.parent if images is None else Path(images)
    if not folder.is_dir():
        raise ValueError(f"there is no folder of images {folder}")
    cells = rows.column(column) if isinstance(rows, _ParquetRows) else [row.get(column) for row in rows]
    rows_of: dict[str, list[int]] = {}
    for number, cell in enumerate(cells):
        rows_of.setdefault(_name_of(cell, number), []).append(number)
    names = list(rows_of)

    def read(number: int) -> Pair:
        name = names[number]
        these = [rows[n] for n in rows_of[name]]
        image = image_in(these[0].get(column), folder)
        captions = tuple(text for row in these for caption in texts for text in texts_in(row.get(caption)))
        problem = None
        if isinstance(image, Path) and not _is_file(image):
            problem = f"no image file {image} ({_remedy(images)})"
        return Pair(name, image, captions, problem, _extra(these[0], (column, *texts)))

    probed = [read(n) for n in range(min(_PROBED, len(names)))]
    if len(probed) > 1 and all(pair.problem for pair in probed):
        raise ValueError(
            f"none of the first {len(probed)} images of {path} is there, {names[0]!r} to begin with: "
            f"{probed[0].problem}"
        )
    found = f"{len(names)} images from column {column!r}" + (f" in {images}" if images is not None else "")
    found += f", captions from {', '.join(map(repr, texts))}"
    if len(rows) > len(names):
        found += f" ({len(rows)} rows: those of one image are put together)"
    return Pairs(names, read, found, [path, *(folder / name for name in names if not is_url(name))])


def image_in(cell: Any, folder: Path) -> Path | str | bytes:
    """What a table's cell says of an image: its bytes, its URL, or its path, relative to `folder`."""
    if isinstance(cell, Mapping):  # as Hugging Face's data sets store images
        if cell.get("bytes"):
            return bytes(cell["bytes"])
        cell = cell.get("path")
    if isinstance(cell, bytes) or (isinstance(cell, str) and is_url(cell)):
        return cell
    return folder / str(cell or "")  # an absolute path stays one


def _extra(row: Mapping[str, Any], used: tuple[str, ...]) -> dict[str, Any]:
    """What else a row says, as far as JSON can."""
    others = {key: value for key, value in row.items() if key not in used and not _is_binary(value)}
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in others.items()}


def _is_binary(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return isinstance(value, bytes) or any(isinstance(part, bytes) for part in parts)


def _remedy(images: str | Path | None) -> str:
    if images is None:
        return "paths are relative to the table's folder; --images names another"
    return f"paths are relative to {images}, as --images says"


def _name_of(cell: Any, row: int) -> str:
    """How the user knows a row's image: its path, its URL, or its row if it lies in the table itself."""
    if isinstance(cell, Mapping):
        cell = cell.get("path") if not cell.get("bytes") else None
    return cell if isinstance(cell, str) and cell else f"row {row}"


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is longer, or other, than file systems allow
        return False


def _read_coco(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """COCO's captions (`captions_train2017.json`) as rows of file name and captions."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        captions: dict[Any, list[str]] = {}
        for annotation in values["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        rows = [
            {"file_name": image["file_name"], "captions": captions.get(image["id"], []), "id": image["id"]}
            for image in values["images"]
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no captions as COCO's do (images with id and file_name, annotations with image_id and "
            f"caption): {error!r}"
        ) from error
    return ["file_name", "captions", "id"], rows


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's data sets


def is_datasets_folder(path: Path) -> bool:
    """Whether Hugging Face's `datasets` wrote this folder."""
    return any((path / name).is_file() for name in _DATASETS_FILES)


def load_datasets(source: str) -> Any:
    """A set of Hugging Face's `datasets`, or a mapping from splits to sets: of the hub, or a folder it was saved to.

    Raises:
        ValueError: it can't be read, or the library is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"reading {source} needs Hugging Face's datasets: pip install 'miniclip[datasets]'") from error
    try:
        if source.startswith(HUB_PREFIX):
            return datasets.load_dataset(source.removeprefix(HUB_PREFIX))
        return datasets.load_from_disk(source)
    except Exception as error:  # the library raises whatever its many parts raise
        raise ValueError(f"{source} can't be read as a data set: {type(error).__name__}: {error}") from error


def _read_datasets(source: str, image_column: str | None, caption_columns: Sequence[str], split: str) -> Pairs:
    loaded = load_datasets(source)
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{source} has no split {split!r}; valid are {', '.join(loaded)}")
        loaded = loaded[split]
    columns = list(loaded.column_names)
    if image_column is None:
        image_column = next((c for c in columns if isinstance(loaded.features[c], datasets.Image)), None)
    column, texts = _choose_columns(source, columns, image_column, caption_columns)
    if isinstance(loaded.features[column], datasets.Image):
        loaded = loaded.cast_column(column, datasets.Image(decode=False))  # the bytes as they are
    names = [f"row {number}" for number in range(len(loaded))]
    lock = Lock()  # its formatting is not made for threads

    def read(number: int) -> Pair:
        with lock:
            row = loaded[number]
        cell = row[column]
        image = (cell.get("bytes") or cell.get("path")) if isinstance(cell, Mapping) else cell
        captions = tuple(text for caption in texts for text in texts_in(row[caption]))
        extra = _extra(row, (column, *texts))
        if isinstance(image, str) and not is_url(image):
            return Pair(names[number], Path(image), captions, None, extra)
        return Pair(names[number], image, captions, None if image else "no image in this row", extra)

    return Pairs(
        names, read, f"{len(names)} images from column {column!r}, captions from {', '.join(map(repr, texts))}"
    )
