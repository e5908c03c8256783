"""Images with labels or captions from folders, tables, Hugging Face's `datasets`, and pairs."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...common.wording import some
from ...data.open_pairs import open_pairs
from ...data.reading.cells import captions_in
from ...data.reading.huggingface import HUB_PREFIX, is_datasets_folder, load_datasets
from ...data.reading.paths import image_in
from ...data.reading.scan import image_files
from ...data.reading.tables import IMAGE_COLUMNS, find_column, read_table
from .sets import Columns, Found, image_identity

LABEL_COLUMNS = ("label", "labels", "class", "target", "classname", "category")
SPLIT_NAMES = ("test", "val", "validation", "valid", "train")  # the one to evaluate on comes first
_UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw")


# ---------------------------------------------------------------------------------------------------------------------
# Images that are read when they are asked for, in any process


class _OfEachProcess(Sequence[Any]):
    """A sequence that each process opens for itself, as open files and locks do not travel to another one."""

    def __init__(self, open_it: Callable[[], Sequence[Any]], length: int) -> None:
        self.open_it, self.length = open_it, length
        self._opened: tuple[int, Sequence[Any]] | None = None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __getitem__(self, index: Any) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self.open_it())
        return self._opened[1][index]


class FromEach(Sequence[Any]):
    """`function` of each entry, when it is asked for; the function has to be one of a module."""

    def __init__(self, entries: Any, function: Callable[[Any], Any]) -> None:
        self.entries, self.function = entries, function

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        return self.function(self.entries[index])


def image_of_record(record: Any) -> bytes:
    return record.image


def _image_of_row(folder: Path, column: str, row: Mapping[str, Any]) -> Any:
    cell = row.get(column)
    return None if is_blank(cell) else image_in(cell, folder)


def _image_of_pair(pair: Any) -> Any:
    if pair.problem:
        raise ValueError(f"{pair.source}: {pair.problem}")
    return pair.image


def _parquet_images(path: Path, column: str) -> Sequence[Any]:
    return FromEach(read_table(path)[1], partial(_image_of_row, path.parent, column))


def _pair_images(source: str, image_column: str | None, split: str) -> Sequence[Any]:
    return FromEach(open_pairs(source, image_column=image_column, split=split), _image_of_pair)


def choose_split(there: Sequence[str], split: str | None, source: str) -> str:
    """The one that is asked for; else the one for testing, or validation, or the only one."""
    usual = [name for name in SPLIT_NAMES[:-1] if name in there] or (there if len(there) == 1 else [])
    chosen = split or next(iter(usual), "")
    if chosen not in there:
        raise ValueError(f"{source} has no split {split or 'test'!r}; it has {', '.join(there)}")
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# A folder per class


def in_split(folder: Path, split: str | None) -> Path:
    if split is None:
        return folder
    found = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    if split not in found:
        raise ValueError(f"{folder} has no folder for the split {split!r}; it has {some(found)}")
    return folder / split


def read_class_folders(source: Path, split: str | None) -> Found:
    folder = in_split(source, split)
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        direct = len(image_files(folder))
        has = f"it holds {direct} images directly" if direct else "it holds neither folders nor images"
        raise ValueError(
            f"{folder} has no classes: it must hold one folder of images for each class, and {has}. If their labels "
            "are in a table (.csv, .tsv, .jsonl, .parquet), name that"
        )
    images = {path: image_files(path) for path in classes}
    _warn_of_unread(folder)
    if not any(images.values()):
        raise ValueError(f"{folder} has {len(classes)} class folders and no image in any of them")
    _refuse_other_level(folder, images)
    empty = [path.name for path in classes if not images[path]]
    if empty:
        raise ValueError(f"{folder} has class folders without images: {some(empty)}")
    return Found(
        source.resolve().name,
        tuple(path for each in images.values() for path in each),
        labels=[path.name for path, each in images.items() for _ in each],
        labels_from="the names of the folders",
        beside=_beside_folder(folder, source),
    )


def _warn_of_unread(folder: Path) -> None:
    """Telephones' pictures would be missing from the scores without a word."""
    unread = [path for path in folder.rglob("*") if path.suffix.lower() in _UNREAD_SUFFIXES]
    if unread:
        kinds = ", ".join(sorted({path.suffix.lower() for path in unread}))
        warnings.warn(
            f"{folder} has {len(unread)} pictures of kinds that are not read ({kinds}), the first of them "
            f"{min(unread).relative_to(folder)}; they are left out. As .jpg or .png they would count",
            stacklevel=2,
        )


def _refuse_other_level(folder: Path, images: Mapping[Path, list[Path]]) -> None:
    """A folder that holds the folder per class, or one for each split, is named instead by mistake."""
    if any(path.parent in images for each in images.values() for path in each):
        return  # an image lies right in its class folder
    splits = [path.name for path in images if path.name.lower() in SPLIT_NAMES]
    if len(splits) == len(images):
        raise ValueError(
            f"{folder} holds the splits {', '.join(splits)}, not the classes; choose one with --split, or name "
            f"{folder / splits[0]}"
        )
    if len(images) == 1:
        (only,) = images
        inner = sorted({path.relative_to(only).parts[0] for path in images[only]})
        raise ValueError(
            f"{folder} has one class folder, {only.name!r}, which holds no image but the folders {some(inner)}. "
            f"If those are the classes, name {only}"
        )


def _beside_folder(*folders: Path) -> dict[str, list[Path]]:
    return {
        "classnames": [folder / "classnames.txt" for folder in folders],
        "templates": [folder / f"templates.{suffix}" for folder in folders for suffix in ("txt", "json")],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tables and Hugging Face's data sets


def read_labelled_table(path: Path, columns: Columns) -> Found:
    names, rows = read_table(path)
    columns.check(names, str(path))
    image_column = columns.image or find_column(names, IMAGE_COLUMNS, "the image paths", path)
    label_column = columns.label or find_column(names, LABEL_COLUMNS, "the labels", path)
    if not len(rows):
        raise ValueError(f"{path} has columns and no rows")
    values = {
        name: _column(rows, name) for name in names if name in (image_column, label_column) or _is_flat(rows, name)
    }
    images: Sequence[Any] = [None if is_blank(cell) else image_in(cell, path.parent) for cell in values[image_column]]
    keys = [f"{path.name}: row {n}" if image is None else str(image) for n, image in enumerate(images, start=1)]
    if path.suffix.lower() == ".parquet":  # whose images may lie in it
        images = _OfEachProcess(partial(_parquet_images, path, image_column), len(rows))
    labels = []
    for number, (label, image) in enumerate(zip(values[label_column], values[image_column], strict=True), start=1):
        which = f"row {number}" + (f" ({image})" if isinstance(image, str) else "")
        labels.append(label_in(label, f"{path}: {which}"))
    class_names = _schema_names(rows, label_column)
    outside = [image for image in images if image is not None and not isinstance(image, bytes)]
    # A table that holds its images, perhaps several columns of them.
    identity = None if outside else f"{image_column} {image_identity(path, '')}"
    return Found(
        path.stem,
        images if isinstance(images, _OfEachProcess) else tuple(images),
        keys,
        {name: column for name, column in values.items() if name not in (image_column, label_column)},
        _alike(labels, str(path)),
        f"column {label_column!r}",
        classnames=class_names,
        classnames_from=f"column {label_column!r}, a ClassLabel" if class_names else "",
        identity=identity,
        beside={
            "classnames": [path.with_suffix(".classnames.txt")],
            "templates": [path.with_suffix(".templates.txt"), path.with_suffix(".templates.json")],
        },
    )


def _column(rows: Any, name: str) -> list[Any]:
    return rows.column(name) if hasattr(rows, "column") else [row.get(name) for row in rows]


def _is_flat(rows: Any, name: str) -> bool:
    """Whether a column holds one value a row; lists and structures in Parquet may be embeddings, or other images."""
    return not hasattr(rows, "file") or rows.file.schema_arrow.field(name).type.num_fields == 0


def _schema_names(rows: Any, column: str) -> tuple[str, ...] | None:
    """The names of a ClassLabel, which Hugging Face's `datasets` keeps in the Parquet files that it writes."""
    metadata = rows.file.schema_arrow.metadata if hasattr(rows, "file") else None
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        feature = feature.get("feature", feature)  # of a list of them
        return readable_sources(feature["names"]) if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def read_datasets(source: str, split: str | None, columns: Columns) -> Found:
    loaded = load_datasets(source)
    if isinstance(loaded, dict):
        loaded = loaded[choose_split(list(loaded), split, source)]
    elif split:
        raise ValueError(f"{source} is one data set without splits, so --split {split} can't be followed")
    import datasets

    names, features = list(loaded.column_names), loaded.features
    columns.check(names, source)
    image_column = columns.image or next((c for c in names if isinstance(features[c], datasets.Image)), None)
    image_column = image_column or find_column(names, IMAGE_COLUMNS, "the images", source)
    of_classes = {c: getattr(features[c], "feature", features[c]) for c in names}
    of_classes = {c: feature for c, feature in of_classes.items() if isinstance(feature, datasets.ClassLabel)}
    label_column = columns.label or _only_class_label(list(of_classes), names, source)
    if isinstance(features[image_column], datasets.Image):
        loaded = loaded.cast_column(image_column, datasets.Image(decode=False))  # the bytes as they are
    label_feature = of_classes.get(label_column)
    scalar = [c for c in names if isinstance(features[c], datasets.Value | datasets.ClassLabel)]
    raw = loaded.select_columns([label_column])[:][label_column]
    labels = [label_in(label, f"{source}: row {number}") for number, label in enumerate(raw, start=1)]
    name = source.removeprefix(HUB_PREFIX).rstrip("/").rpartition("/")[2]
    return Found(
        name,
        FromEach(loaded, partial(_image_of_row, Path(), image_column)),
        [f"{name}: row {number}" for number in range(1, len(loaded) + 1)],
        {c: list(loaded[c]) for c in scalar if c not in (image_column, label_column)},
        _alike(labels, source),
        f"column {label_column!r}",
        classnames=readable_sources(label_feature.names) if label_feature else None,
        classnames_from=f"column {label_column!r}, a ClassLabel" if label_feature else "",
        beside={} if source.startswith(HUB_PREFIX) else _beside_folder(Path(source)),
        # The library's own fingerprint is of how the data were made.
        identity=f"datasets {source} {split} {image_column} {loaded._fingerprint}",
    )


def _only_class_label(found: list[str], columns: list[str], source: str) -> str:
    if len(found) == 1:
        return found[0]
    if found:
        if known := [column for column in found if column.lower() in LABEL_COLUMNS]:
            return known[0]
        raise ValueError(f"{source} has several columns of classes, {', '.join(found)}; choose one with --label-column")
    raise ValueError(
        f"{source} has no column of type ClassLabel; its columns are {', '.join(columns)}. If one of them holds the "
        "labels, name it with --label-column"
    )


def is_blank(cell: Any) -> bool:
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def label_in(cell: Any, where: str) -> str | list[str]:
    if isinstance(cell, Mapping | bytes):
        raise ValueError(f"{where} has {str(cell)[:50]} for a label; it must be a name, a number, or a list of those")
    if isinstance(cell, list | tuple | np.ndarray):
        return [str(label_in(each, where)) for each in cell]
    text = "" if is_blank(cell) else str(cell).strip()
    if not text:
        raise ValueError(f"{where} has no label")
    return text


def _alike(labels: list[Any], source: str) -> list[Any]:
    if len({isinstance(label, list) for label in labels}) > 1:
        raise ValueError(f"{source} has lists of labels in some rows and single labels in others")
    if all(isinstance(label, str) and re.fullmatch(r"\d+(\.0)?", label) for label in labels):
        return [label.removesuffix(".0") for label in labels]  # as tables with a gap in them write whole numbers
    return labels


def readable_sources(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in names)


def read_pairs(source: str, split: str | None, columns: Columns) -> Found:
    """Images with captions, from any source that training reads."""
    columns.refuse(source, "a source of pairs", "label", "group")
    if split and not (source.startswith(HUB_PREFIX) or is_datasets_folder(Path(source))):
        raise ValueError(f"{source} has no splits, so --split {split} can't be followed")
    split = split or "test"
    pairs = open_pairs(source, image_column=columns.image, split=split)
    captions = tuple(tuple(line for text in pair.captions for line in captions_in(text)) for pair in pairs)
    images = _OfEachProcess(partial(_pair_images, source, columns.image, split), len(pairs))
    name = Path(source).stem if Path(source).is_file() else source.rstrip("/").rpartition("/")[2]
    return Found(name, images, list(pairs.names), captions=all_captioned(captions, list(pairs.names), source))


def all_captioned(
    captions: tuple[tuple[str, ...], ...], keys: Sequence[str], source: str
) -> tuple[tuple[str, ...], ...]:
    if not captions:
        raise ValueError(f"{source} holds no images with captions")
    bare = [key for key, texts in zip(keys, captions, strict=True) if not texts]
    if bare:
        raise ValueError(f"{source}: {len(bare)} of {len(captions)} images have no caption: {some(bare)}")
    return captions
