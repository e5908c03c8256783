"""Data sets of Hugging Face's `datasets`: a folder that the library saved, or one of the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from ...common.storage import is_url
from ...common.wording import counted
from .arrow_column import ArrowColumn, holds_bytes, is_large
from .cells import IMAGE_COLUMNS, picture_in, texts_in_cell
from .pair import Pair, Pairs
from .paths import is_file
from .rows import choose_columns, extra_of
from .scan import LeftOut
from .splits import equal_splits, numbers_of, parts_in, rows_of_split, split_among
from .tables import find_image_column

HUB_PREFIX = "hf-hub:"
_DATASETS_FILES = ("dataset_dict.json", "dataset_info.json", "state.json")


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
        return _without_format(datasets.load_from_disk(source))
    except Exception as error:  # the library raises whatever its many parts raise
        raise ValueError(f"{source} can't be read as a data set: {type(error).__name__}: {error}") from error


def _without_format(loaded: Any) -> Any:
    """With values as Python has them: a set that was saved with a format for training (`set_format("torch", columns)`)
    gives tensors, of some of its columns alone."""
    if isinstance(loaded, dict):
        return {name: _without_format(each) for name, each in loaded.items()}
    form = loaded.format
    return loaded if form["type"] is None and form["columns"] == loaded.column_names else loaded.with_format(None)


def undecoded(loaded: Any) -> Any:
    """The set with its images as the bytes that are stored, those in lists too."""
    import datasets

    for column, feature in loaded.features.items():
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(column, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            loaded = loaded.cast_column(column, type(feature)(datasets.Image(decode=False)))
    return loaded


def image_column_of(loaded: Any, source: str) -> str:
    """The column of images: the one of that type, or of several the one that is known by its name, as masks lie beside
    pictures.

    Raises:
        ValueError: none, or several of which none is known.
    """
    import datasets

    columns = list(loaded.column_names)
    found = [column for column in columns if isinstance(loaded.features[column], datasets.Image)]
    known = [column for name in IMAGE_COLUMNS for column in found if column.strip().lower() == name]
    if len(found) > 1 and not known:
        raise ValueError(f"{source} has several columns of images, {', '.join(found)}; choose one with --image-column")
    return (known or found)[0] if found else find_image_column(columns, loaded, Path(), source)[0]


class _OwnLock:
    """A lock for the threads of one process; another process gets one of its own."""

    def __init__(self) -> None:
        self.held = Lock()

    def __reduce__(self) -> Any:
        return type(self), ()


class DatasetsRows:
    """The rows of a set, as `rows_of_split` takes them.

    Args:
        chosen: the numbers that the rows have in the set; None for all of it.
        part: the set's name among several, where rows are called by it.
    """

    left_out: tuple[LeftOut, ...] = ()
    note = ""
    taken_from: tuple[Any, Sequence[str]] | None = None

    def __init__(self, loaded: Any, chosen: Sequence[int] | None = None, part: str = "") -> None:
        self.loaded, self.chosen, self.part = loaded, chosen, part

    def __len__(self) -> int:
        return len(self.loaded)

    def only(self, rows: Sequence[int]) -> DatasetsRows:
        return DatasetsRows(self.loaded.select(rows), rows, self.part)

    def called(self, number: int) -> str:
        """What a row is called, by its number in the set, from 1 after the set's name."""
        return f"{self.part}: row {number + 1}" if self.part else f"row {number}"

    def first_text(self, name: str) -> str:
        """The first value of a column, if it is a text and no set's name tells the part; else an empty one."""
        is_text = not self.part and len(self) and getattr(self.loaded.features[name], "dtype", "") == "string"
        return (self.loaded.select_columns([name])[0][name] or "") if is_text else ""

    def column(self, name: str) -> list[Any]:
        return list(self.loaded.select_columns([name])[:][name])

    def whole(self, name: str) -> ArrowColumn:
        """A column with all of its values."""
        kind = self.loaded.features.arrow_schema.field(name).type
        num_bytes = self.loaded.data.column(name).nbytes if holds_bytes(kind) else 0
        large, names = is_large(num_bytes, len(self.loaded.data)), getattr(self.loaded.features[name], "names", ())
        return ArrowColumn([_SetColumn(self.loaded, name)], kind, large, names)


class _SetColumn:
    """A column of a set."""

    def __init__(self, loaded: Any, name: str) -> None:
        self.loaded, self.name = loaded.select_columns([name]).with_format("arrow"), name
        self.of_set = loaded._fingerprint

    def __len__(self) -> int:
        return len(self.loaded)

    def identity(self) -> str:
        return f"{self.name} {self.of_set}"

    def take(self, indices: Sequence[int]) -> Any:
        return self.loaded[list(indices)][self.name]


def datasets_rows(loaded: Any, source: str, split: str, is_asked_for: bool = False) -> DatasetsRows:
    """The rows of a part, by the names of the sets in a mapping, and by a column `split` where a set has one.

    Raises:
        ValueError: there is no such part.
    """
    part = ""
    if isinstance(loaded, dict):
        is_told = not {*equal_splits(split)}.isdisjoint(loaded)
        only = next(iter(loaded.values())) if len(loaded) == 1 else None
        if only is not None and not is_told and parts_in(only.column_names, DatasetsRows(only))[1]:
            try:
                return rows_of_split(source, only.column_names, DatasetsRows(only), split, is_asked_for=True)
            except ValueError as error:
                raise ValueError(f"{error}; or all of its one set, {next(iter(loaded))}") from error
        chosen = split_among(list(loaded), split, source)
        part = chosen if len(loaded) > 1 else ""
        loaded, is_asked_for = loaded[chosen], False
    return rows_of_split(source, loaded.column_names, DatasetsRows(loaded, part=part), split, is_asked_for)


def read_datasets(
    source: str, image_column: str | None, caption_columns: Sequence[str], split: str, is_asked_for: bool = False
) -> Pairs:
    """The pairs of a data set, one a row.

    Raises:
        ValueError: it can't be read, or has no such split or columns.
    """
    rows = datasets_rows(load_datasets(source), source, split, is_asked_for)
    loaded = rows.loaded
    columns = list(loaded.column_names)
    column = image_column or image_column_of(loaded, source)
    column, texts = choose_columns(source, columns, column, caption_columns)
    loaded = undecoded(loaded)
    names = [rows.called(number) for number in numbers_of(rows)]
    lock = _OwnLock()  # its formatting is not made for threads

    def read(index: int) -> Pair:
        with lock.held:
            row = loaded[index]
        extra = extra_of(row, (column, *texts))
        try:
            image = picture_in(row[column])
            captions = tuple(text for caption in texts for text in texts_in_cell(row[caption]))
        except ValueError as error:
            return Pair(names[index], problem=str(error), extra=extra)
        if isinstance(image, bytes) or is_url(image):
            return Pair(names[index], image, captions, None, extra)
        problem = None if is_file(Path(image)) else f"no image file {image}"
        return Pair(names[index], Path(image), captions, problem, extra)

    found = f"{counted(len(names), 'image')} from column {column!r}, captions from {', '.join(map(repr, texts))}"
    return Pairs(names, read, found + rows.note, left_out=rows.left_out)
