"""What can be evaluated on: images with a label, with several labels, or with captions.

| source                                                | labels, or captions                                     |
|-------------------------------------------------------|---------------------------------------------------------|
| a folder per class: DATA/tabby_cat/1.jpg              | the names of the folders                                |
| `.csv`, `.tsv`, `.jsonl`, `.parquet`                  | a column of names or numbers; of lists: several labels  |
| shards (webdataset's tars): a folder, a pattern, a URL| `.cls`; `.npy`, several labels; `.txt`, captions        |
| CLIP_benchmark's sets: a folder, a URL, `hf-hub:`     | the same; `dataset_type.txt` tells which                |
| Hugging Face's `datasets`: a folder, `hf-hub:`        | a column of type ClassLabel, or the one that is named   |
| `torchvision:CIFAR10`                                 | torchvision's                                           |
| with task="retrieval", whatever can be trained on     | captions, as `miniclip shards` finds them               |

Names and prompts that belong to the data lie with it and are used unless others are asked for: `classnames.txt` (one a
line, in label order) and `templates.txt` or `templates.json` in the folder, or `DATA.classnames.txt` and so on beside
the table. Each set says where its names and prompts came from.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from filelock import FileLock
from PIL import Image

from .images import open_image
from .prompts import CLASSNAME_SETS, TEMPLATE_SETS, Prompts, classname_set, fill, lines_of, read_lines, template_set
from .shards import INDEX_FILE, Shards, index_shards, is_shards, open_pairs, tar_locations
from .sources import (
    HUB_PREFIX,
    IMAGE_COLUMNS,
    TABLE_SUFFIXES,
    captions_in,
    find_column,
    image_files,
    image_in,
    is_datasets_folder,
    load_datasets,
    read_table,
)
from .storage import Cache, check_scheme, exists, is_url, join, read_bytes

LABEL_COLUMNS = ("label", "labels", "class", "target", "classname", "category")
TASKS = ("classification", "multilabel", "retrieval")
TORCHVISION_PREFIX = "torchvision:"
TORCHVISION_SETS = (
    "CIFAR10", "CIFAR100", "Caltech101", "Caltech256", "Country211", "DTD", "EuroSAT", "FER2013", "FGVCAircraft",
    "FashionMNIST", "Flowers102", "Food101", "GTSRB", "ImageNet", "Imagenette", "KMNIST", "MNIST", "OxfordIIITPet",
    "PCAM", "RenderedSST2", "STL10", "SUN397", "SVHN", "StanfordCars", "USPS",
)  # fmt: skip
# What the built-in prompts, and names where torchvision has none in words, are called: those of the paper.
_PAPERS_NAMES = {
    "CIFAR10": "cifar10", "CIFAR100": "cifar100", "Caltech101": "caltech101", "Country211": "country211", "DTD": "dtd",
    "EuroSAT": "eurosat", "FER2013": "fer2013", "FGVCAircraft": "fgvc_aircraft", "Flowers102": "flowers",
    "Food101": "food101", "GTSRB": "gtsrb", "ImageNet": "imagenet", "MNIST": "mnist", "OxfordIIITPet": "pets",
    "PCAM": "pcam", "RenderedSST2": "renderedsst2", "STL10": "stl10", "SUN397": "sun397", "SVHN": "svhn",
    "StanfordCars": "cars",
}  # fmt: skip
_NAMED_BY_TORCHVISION = ("Caltech101", "OxfordIIITPet")  # the first has one class less than the paper's
_SPLITS = ("test", "val", "validation", "valid", "train")  # the one to evaluate on comes first
_SHARDS_FILE = "nshards.txt"  # in each split of CLIP_benchmark's
_UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw")
_NUMBERS = "the labels, which are numbers"


@dataclass(frozen=True)
class EvaluationSet:
    """N images, wherever they are. Safe to read from in other processes.

    Args:
        name: for reports.
        images: N times a path, a URL, bytes, or a picture; may read them only when it is asked for one.
        keys: what the user knows each image by; by default its path.
        metadata: what else is known of the images, N values under each name, for scores of parts of them.
        identity: what these images can be told by from others, or from these after a change, without reading them.
    """

    name: str
    images: Sequence[Any]
    keys: Sequence[str] | None = field(default=None, kw_only=True)
    metadata: Mapping[str, Sequence[Any]] = field(default_factory=dict, kw_only=True)
    identity: str | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.images)

    def key(self, number: int) -> str:
        return str(self.images[number]) if self.keys is None else self.keys[number]

    def open(self, number: int) -> Image.Image:
        """The decoded image.

        Raises:
            ValueError: it can't be read; names its source.
        """
        try:
            image = self.images[number]
            if isinstance(image, Image.Image):
                return image
            if image is None:
                raise ValueError(f"{self.key(number)} has no image")
            if not isinstance(image, bytes):
                image = image.read_bytes() if isinstance(image, Path) else read_bytes(image)
        except OSError as error:
            raise ValueError(f"{self.key(number)} can't be read: {error.strerror or error}") from error
        return open_image(image, self.key(number))

    def column(self, name: str) -> Sequence[Any]:
        """N values of the metadata.

        Raises:
            ValueError: there is no such column; tells those that are there.
        """
        return _column_of(self.metadata, name, self.name)

    def fingerprint(self) -> str:
        """Stands for the images and their order: the same as long as none changes.

        Files are known by path, size and time, URLs by their address, and what is in memory by its bytes.
        """
        if self.identity is not None:
            return _digest([self.identity])
        return _digest(_told(self.images[number], self.key(number)) for number in range(len(self)))


def _column_of(metadata: Mapping[str, Sequence[Any]], name: str, source: str) -> Sequence[Any]:
    if name not in metadata:
        has = f"its columns are {', '.join(metadata)}" if metadata else "it has none"
        raise ValueError(f"{source} has no column {name!r}; {has}")
    return metadata[name]


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _told(image: Any, key: str) -> str:
    """What an image can be told by."""
    if isinstance(image, Image.Image):
        return f"{image.mode} {image.size} {hashlib.sha256(image.tobytes()).hexdigest()}"
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    if image is None or (isinstance(image, str) and is_url(image)):
        return f"{image} {key}"
    try:
        facts = Path(image).stat()
    except OSError:
        return f"{image} is missing"
    return f"{Path(image).resolve()} {facts.st_size} {facts.st_mtime_ns}"


@dataclass(frozen=True)
class LabelledImages(EvaluationSet):
    """N images of C classes, each of one.

    Args:
        labels: N numbers, 0 to C - 1.
        classnames: C names, as they go into the prompts.
        templates: the prompts' wordings, for all classes or by class.
        groups: N values; images of one value are not independent of each other (views of one scene, scans of one
            hand) and are drawn together when an interval is resampled. By default every image for itself.
        classnames_from, templates_from: where those came from, for who reads the scores.
    """

    labels: tuple[int, ...]
    classnames: tuple[str, ...]
    templates: Prompts
    groups: tuple[str, ...]
    classnames_from: str = field(default="", kw_only=True)
    templates_from: str = field(default="", kw_only=True)


@dataclass(frozen=True, eq=False)
class MultilabelImages(EvaluationSet):
    """N images of C classes, each of any number of them.

    Args:
        labels: (N, C) booleans.
        classnames, templates, groups, classnames_from, templates_from: as those of `LabelledImages`.
    """

    labels: np.ndarray
    classnames: tuple[str, ...]
    templates: Prompts
    groups: tuple[str, ...]
    classnames_from: str = field(default="", kw_only=True)
    templates_from: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class CaptionedImages(EvaluationSet):
    """N images, each with at least one caption, to be found by them and the other way round.

    Args:
        captions: N times the texts of an image.
        groups: as those of `LabelledImages`.
    """

    captions: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]


@dataclass(frozen=True)
class _Found:
    """What a source holds, before class names and prompts are settled.

    Args:
        labels: N names or numbers, as texts; lists of them for several labels each.
        labels_from: what the class names are called after if there are no others.
        classnames: the source's own, which numbers are places in.
        beside: files that may hold names and prompts, in the order in which they count.
    """

    name: str
    images: Sequence[Any]
    keys: Sequence[str] | None = None
    metadata: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    labels: Sequence[str] | Sequence[list[str]] = ()
    labels_from: str = ""
    captions: tuple[tuple[str, ...], ...] = ()
    classnames: tuple[str, ...] | None = None
    classnames_from: str = ""
    templates: Prompts | None = None
    templates_from: str = ""
    beside: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    identity: str | None = None

    @property
    def task(self) -> str:
        if self.captions:
            return "retrieval"
        return "multilabel" if isinstance(self.labels[0], list) else "classification"


def open_dataset(
    source: str | Path,
    classnames: str | Path | None = None,
    templates: str | Path | None = None,
    group_column: str | None = None,
    split: str | None = None,
    label_column: str | None = None,
    image_column: str | None = None,
    root: str | Path = "data",
    download: bool = False,
    task: str | None = None,
) -> EvaluationSet:
    """Opens any source of the table above.

    Args:
        classnames: built-in ones ("imagenet", or another of `prompts.CLASSNAME_SETS`), or a file of one name a line, in
            label order; by default the data's own.
        templates: a built-in set (of `prompts.TEMPLATE_SETS`), a file of one a line, or a .json of
            {class name: [its prompts]}; by default the data's own, else "simple".
        group_column: the column (or entry of shards' `.json`) that tells which images belong together.
        split: the part to evaluate on, of data that have several; by default "test", else the one for validation.
        label_column, image_column: of a table or a `datasets` set; by default found by their names and types.
        root: where torchvision's sets are.
        download: let torchvision fetch what is not there.
        task: "classification", "multilabel" or "retrieval"; by default what the data are for. "retrieval" reads what
            could be trained on: pairs in folders and tables.

    Raises:
        ValueError: no such data, nothing in it, or names that do not match the labels.
    """
    source = str(source)
    if task is not None and task not in TASKS:
        raise ValueError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    if download and not source.startswith(TORCHVISION_PREFIX):
        raise ValueError(f"a download is for torchvision's sets (torchvision:CIFAR10), and {source} is none")
    columns = _Columns(label_column, image_column, group_column)
    found = _read(source, split, columns, Path(root), download, task)
    if not len(found.images):
        raise ValueError(f"{source} holds no images")
    if task not in (None, found.task):
        raise ValueError(f"{source} is made for {found.task}, and {task} was asked for")
    groups = _groups(found, group_column, source)
    shared: dict[str, Any] = {"keys": found.keys, "metadata": found.metadata, "identity": found.identity}
    if found.task == "retrieval":
        if classnames or templates:
            raise ValueError(f"{source} has captions, not classes; class names and templates are not for it")
        return CaptionedImages(found.name, found.images, found.captions, groups, **shared)
    found = _settle_names(found, classnames, source)
    if found.task == "multilabel":
        flat, names = _number_labels([x for each in found.labels for x in each], found.classnames, source)
        hot = np.zeros((len(found.labels), len(names)), dtype=bool)
        hot[np.repeat(np.arange(len(hot)), [len(each) for each in found.labels]), flat] = True
        labels: Any = hot
    else:
        labels, names = _number_labels([str(label) for label in found.labels], found.classnames, source)
    if not found.classnames_from:
        are_numbers = all(name.isdigit() for name in names)
        shared["classnames_from"] = _NUMBERS if are_numbers else found.labels_from
    else:
        shared["classnames_from"] = found.classnames_from
    prompts, shared["templates_from"] = _settle_templates(found, templates, names)
    kind = MultilabelImages if found.task == "multilabel" else LabelledImages
    return kind(found.name, found.images, labels, names, prompts, groups, **shared)


def open_images(source: str | Path) -> EvaluationSet:
    """Images whose labels don't matter: a folder of them, however deep, or any source of the table above."""
    path = Path(source)
    is_plain = path.is_dir() and not is_shards(str(source)) and not is_datasets_folder(path)
    if is_plain and not any(path.glob(f"*/{_SHARDS_FILE}")):
        if images := image_files(path):
            return EvaluationSet(path.resolve().name, tuple(images))
        raise ValueError(f"{source} holds no images")
    return open_dataset(source)


def with_templates(data: LabelledImages | MultilabelImages, templates: str | Path) -> Any:
    """The same images with other prompts; `templates` as in `open_dataset`."""
    found = _Found(data.name, data.images)
    prompts, templates_from = _settle_templates(found, templates, data.classnames)
    return replace(data, templates=prompts, templates_from=templates_from)


def labelled(data: EvaluationSet) -> LabelledImages:
    """The same, for who needs one label for each image.

    Raises:
        ValueError: the set is of another kind.
    """
    if isinstance(data, LabelledImages):
        return data
    kind = "captions, for retrieval" if isinstance(data, CaptionedImages) else "several labels for each image"
    raise ValueError(f"{data.name} has {kind}; zero-shot classification needs one label for each image")


@dataclass(frozen=True)
class _Columns:
    """The columns that were asked for."""

    label: str | None
    image: str | None
    group: str | None

    def refuse(self, source: str, what: str, *names: str) -> None:
        """Raises ValueError if one of `names` is asked for, of a source that has no columns."""
        for name in names:
            if getattr(self, name):
                article = "an" if name == "image" else "a"
                raise ValueError(f"{source} is {what} and has no columns; {article} {name} column needs a table")

    def check(self, columns: Sequence[str], source: str) -> None:
        for name in (self.label, self.image, self.group):
            if name is not None and name not in columns:
                raise ValueError(f"{source} has no column {name!r}; its columns are {', '.join(columns)}")


def _read(source: str, split: str | None, columns: _Columns, root: Path, download: bool, task: str | None) -> _Found:
    if source.startswith(TORCHVISION_PREFIX):
        columns.refuse(source, "a set of torchvision's", "label", "image", "group")
        return _read_torchvision(source, root, split, download)
    location, path = _hub_location(source), Path(source)
    if source.startswith(HUB_PREFIX):
        try:
            is_tars = bool(_benchmark_splits(location, split))
        except ValueError:  # the hub tells so, and the library below tells why, or has a token for it
            is_tars = False
    else:
        is_tars = is_url(location) or is_shards(location) or (path.is_dir() and any(path.glob(f"*/{_SHARDS_FILE}")))
    if not is_tars and (source.startswith(HUB_PREFIX) or is_datasets_folder(path)):
        return _read_pairs(source, split, columns) if task == "retrieval" else _read_datasets(source, split, columns)
    if is_tars:
        columns.refuse(source, "a set of shards", "label", "image")
        return _read_tars(location, split, task)
    if task == "retrieval" and path.exists():
        return _read_pairs(source, split, columns)
    if path.is_dir():
        columns.refuse(source, "a folder", "label", "image", "group")
        return _read_class_folders(path, split)
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        if split:
            raise ValueError(f"{source} is a table and has no split {split!r}")
        return _read_labelled_table(path, columns)
    what = f"neither a folder per class, nor shards, nor a table ({', '.join(TABLE_SUFFIXES)})"
    raise ValueError(f"data {source!r} is {what if path.exists() else 'not there'}")


# ---------------------------------------------------------------------------------------------------------------------
# Images that are read when they are asked for, in whatever process


class _OfEachProcess(Sequence[Any]):
    """A sequence that each process opens for itself, as open files and locks do not travel to another one."""

    def __init__(self, open_it: Callable[[], Sequence[Any]], length: int) -> None:
        self.open_it, self.length = open_it, length
        self._opened: tuple[int, Sequence[Any]] | None = None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __getitem__(self, number: Any) -> Any:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), self.open_it())
        return self._opened[1][number]


class _Each(Sequence[Any]):
    """`function` of each entry, when it is asked for; the function has to be one of a module."""

    def __init__(self, entries: Any, function: Callable[[Any], Any]) -> None:
        self.entries, self.function = entries, function

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: Any) -> Any:
        return self.function(self.entries[number])


def _image_of_record(record: Any) -> bytes:
    return record.image


def _image_of_item(item: Any) -> Any:
    return item[0]


def _image_of_row(folder: Path, column: str, row: Mapping[str, Any]) -> Any:
    cell = row.get(column)
    return None if _is_blank(cell) else image_in(cell, folder)


def _image_of_pair(pair: Any) -> Any:
    if pair.problem:
        raise ValueError(f"{pair.source}: {pair.problem}")
    return pair.image


def _parquet_images(path: Path, column: str) -> Sequence[Any]:
    return _Each(read_table(path)[1], partial(_image_of_row, path.parent, column))


def _pair_images(source: str, image_column: str | None, split: str) -> Sequence[Any]:
    return _Each(open_pairs(source, image_column=image_column, split=split), _image_of_pair)


def _choose_split(there: Sequence[str], split: str | None, source: str) -> str:
    """The one that is asked for; else the one for testing, or validation, or the only one."""
    usual = [name for name in _SPLITS[:-1] if name in there] or (there if len(there) == 1 else [])
    chosen = split or next(iter(usual), "")
    if chosen not in there:
        raise ValueError(f"{source} has no split {split or 'test'!r}; it has {', '.join(there)}")
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# A folder per class


def _in_split(folder: Path, split: str | None) -> Path:
    if split is None:
        return folder
    found = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
    if split not in found:
        raise ValueError(f"{folder} has no folder for the split {split!r}; it has {_some(found)}")
    return folder / split


def _read_class_folders(source: Path, split: str | None) -> _Found:
    folder = _in_split(source, split)
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
        raise ValueError(f"{folder} has class folders without images: {_some(empty)}")
    return _Found(
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
    splits = [path.name for path in images if path.name.lower() in _SPLITS]
    if len(splits) == len(images):
        raise ValueError(
            f"{folder} holds the splits {', '.join(splits)}, not the classes; choose one with --split, or name "
            f"{folder / splits[0]}"
        )
    if len(images) == 1:
        (only,) = images
        inner = sorted({path.relative_to(only).parts[0] for path in images[only]})
        raise ValueError(
            f"{folder} has one class folder, {only.name!r}, which holds no image but the folders {_some(inner)}. "
            f"If those are the classes, name {only}"
        )


def _beside_folder(*folders: Path) -> dict[str, list[Path]]:
    return {
        "classnames": [folder / "classnames.txt" for folder in folders],
        "templates": [folder / f"templates.{suffix}" for folder in folders for suffix in ("txt", "json")],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tables and Hugging Face's data sets


def _read_labelled_table(path: Path, columns: _Columns) -> _Found:
    names, rows = read_table(path)
    columns.check(names, str(path))
    image_column = columns.image or find_column(names, IMAGE_COLUMNS, "the image paths", path)
    label_column = columns.label or find_column(names, LABEL_COLUMNS, "the labels", path)
    if not len(rows):
        raise ValueError(f"{path} has columns and no rows")
    values = {
        name: _column(rows, name) for name in names if name in (image_column, label_column) or _is_flat(rows, name)
    }
    images: Sequence[Any] = [None if _is_blank(cell) else image_in(cell, path.parent) for cell in values[image_column]]
    keys = [f"{path.name}: row {n}" if image is None else str(image) for n, image in enumerate(images, start=1)]
    if path.suffix.lower() == ".parquet":  # whose images may lie in it
        images = _OfEachProcess(partial(_parquet_images, path, image_column), len(rows))
    labels = []
    for number, (label, image) in enumerate(zip(values[label_column], values[image_column], strict=True), start=1):
        which = f"row {number}" + (f" ({image})" if isinstance(image, str) else "")
        labels.append(_label_in(label, f"{path}: {which}"))
    class_names = _schema_names(rows, label_column)
    outside = [image for image in images if image is not None and not isinstance(image, bytes)]
    # A table that holds its images, perhaps several columns of them.
    identity = None if outside else f"{image_column} {_told(path, '')}"
    return _Found(
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
        return _readable(feature["names"]) if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _read_datasets(source: str, split: str | None, columns: _Columns) -> _Found:
    loaded = load_datasets(source)
    if isinstance(loaded, dict):
        loaded = loaded[_choose_split(list(loaded), split, source)]
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
    labels = [_label_in(label, f"{source}: row {number}") for number, label in enumerate(raw, start=1)]
    name = source.removeprefix(HUB_PREFIX).rstrip("/").rpartition("/")[2]
    return _Found(
        name,
        _Each(loaded, partial(_image_of_row, Path(), image_column)),
        [f"{name}: row {number}" for number in range(1, len(loaded) + 1)],
        {c: list(loaded[c]) for c in scalar if c not in (image_column, label_column)},
        _alike(labels, source),
        f"column {label_column!r}",
        classnames=_readable(label_feature.names) if label_feature else None,
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


def _is_blank(cell: Any) -> bool:
    return cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell))


def _label_in(cell: Any, where: str) -> str | list[str]:
    if isinstance(cell, Mapping | bytes):
        raise ValueError(f"{where} has {str(cell)[:50]} for a label; it must be a name, a number, or a list of those")
    if isinstance(cell, list | tuple | np.ndarray):
        return [str(_label_in(each, where)) for each in cell]
    text = "" if _is_blank(cell) else str(cell).strip()
    if not text:
        raise ValueError(f"{where} has no label")
    return text


def _alike(labels: list[Any], source: str) -> list[Any]:
    if len({isinstance(label, list) for label in labels}) > 1:
        raise ValueError(f"{source} has lists of labels in some rows and single labels in others")
    if all(isinstance(label, str) and re.fullmatch(r"\d+(\.0)?", label) for label in labels):
        return [label.removesuffix(".0") for label in labels]  # as tables with a gap in them write whole numbers
    return labels


def _readable(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in names)


def _read_pairs(source: str, split: str | None, columns: _Columns) -> _Found:
    """Images with captions, from whatever can be trained on."""
    columns.refuse(source, "a source of pairs", "label", "group")
    if split and not (source.startswith(HUB_PREFIX) or is_datasets_folder(Path(source))):
        raise ValueError(f"{source} has no splits, so --split {split} can't be followed")
    split = split or "test"
    pairs = open_pairs(source, image_column=columns.image, split=split)
    captions = tuple(tuple(line for text in pair.captions for line in captions_in(text)) for pair in pairs)
    images = _OfEachProcess(partial(_pair_images, source, columns.image, split), len(pairs))
    name = Path(source).stem if Path(source).is_file() else source.rstrip("/").rpartition("/")[2]
    return _Found(name, images, list(pairs.names), captions=_all_captioned(captions, list(pairs.names), source))


def _all_captioned(
    captions: tuple[tuple[str, ...], ...], keys: Sequence[str], source: str
) -> tuple[tuple[str, ...], ...]:
    if not captions:
        raise ValueError(f"{source} holds no images with captions")
    bare = [key for key, texts in zip(keys, captions, strict=True) if not texts]
    if bare:
        raise ValueError(f"{source}: {len(bare)} of {len(captions)} images have no caption: {_some(bare)}")
    return captions


# ---------------------------------------------------------------------------------------------------------------------
# Shards, and CLIP_benchmark's way to lay them out


def _hub_location(source: str) -> str:
    """The address that a data set on Hugging Face's hub has its files at; any other source as it is."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if source.startswith(HUB_PREFIX):
        return f"{hub}/datasets/{source.removeprefix(HUB_PREFIX)}/resolve/main"
    page = re.fullmatch(re.escape(hub) + r"/datasets/([\w.-]+/[\w.-]+)(/tree/main)?/?", source)
    return f"{hub}/datasets/{page[1]}/resolve/main" if page else source.rstrip("/")


def _benchmark_splits(location: str, split: str | None) -> list[str]:
    """The splits of a set of CLIP_benchmark's, none if it is no such set."""
    names = dict.fromkeys([*([split] if split else []), *_SPLITS])
    return [name for name in names if exists(join(location, f"{name}/{_SHARDS_FILE}"))]


def _read_tars(source: str, split: str | None, task: str | None) -> _Found:
    """Shards with labels or captions, and what lies beside them."""
    check_scheme(source)
    name = _name_of(source)
    if source.endswith(".tar"):
        if split:
            raise ValueError(f"{source} names tars, so --split {split} can't be followed")
        folder = source.rpartition("/")[0] or "."
        shards = Shards(source, needs_captions=False) if exists(join(folder, INDEX_FILE)) else _indexed(source)
        return _read_shards(shards, name, source, task, [folder])
    splits = _benchmark_splits(source, split)
    if not splits:
        part = join(source, split) if split else source
        if is_url(source) and not exists(join(part, INDEX_FILE)):
            raise ValueError(
                f"{source} is no set to evaluate on: there is neither {INDEX_FILE} (shards) nor "
                f"{split or 'test'}/{_SHARDS_FILE} (CLIP_benchmark's sets). Name a pattern of tars as "
                f"{source}/{{0..9}}.tar, or look whether the address is right"
            )
        if not is_url(source):
            _in_split(Path(source), split)
        is_indexed = exists(join(part, INDEX_FILE)) or not any(Path(part).glob("*.tar"))
        shards = Shards(part, needs_captions=False) if is_indexed else _indexed(part)
        return _read_shards(shards, name, source, task, [part, source])
    chosen = _choose_split(splits, split, source)
    text = read_bytes(join(source, f"{chosen}/{_SHARDS_FILE}")).decode("utf-8", "replace").strip()
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(f"{source}/{chosen}/{_SHARDS_FILE} holds {text[:50]!r}; it must be the number of shards")
    kind = (_text_at(source, "dataset_type.txt") or "classification").strip()
    if kind not in TASKS:
        raise ValueError(f"{source}/dataset_type.txt holds {kind[:50]!r}; known are {', '.join(TASKS)}")
    shards = _indexed(f"{join(source, chosen)}/{{0..{int(text) - 1}}}.tar")
    return _read_shards(shards, name, source, task or kind, [source], "zeroshot_classification_templates.txt")


def _name_of(source: str) -> str:
    if not is_url(source):
        path = Path(source)
        return (path.resolve().parent if source.endswith(".tar") else path.resolve()).name
    parts = [part for part in urlsplit(source).path.split("/") if part and not part.endswith(".tar")]
    while parts and parts[-1] in ("main", "resolve"):
        parts.pop()
    return parts[-1] if parts else urlsplit(source).netloc


def _text_at(folder: str, name: str) -> str | None:
    """A text that may lie in a folder, here or remote."""
    location = join(folder, name)
    return read_bytes(location).decode("utf-8-sig", "replace") if exists(location) else None


def _indexed(source: str) -> Shards:
    """Shards that have no index: one is made in the cache, anew when they have changed. What is theirs stays as it is.

    Raises:
        ValueError: a tar is not there, or damaged.
    """
    digest = hashlib.sha256()
    for tar in tar_locations(source):
        digest.update(tar.encode() if is_url(tar) else str(Path(tar).resolve()).encode())
        if not is_url(tar):
            facts = Path(tar).stat()
            digest.update(f" {facts.st_size} {facts.st_mtime_ns}\0".encode())
    out = Cache().folder.with_name("indexes") / digest.hexdigest()[:32]
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_name(f"{out.name}.lock")):
        if not (out / INDEX_FILE).is_file():
            index_shards(source, out, overwrite=True)  # the rest of one that was interrupted may be there
    return Shards(out, needs_captions=False)


def _read_shards(
    shards: Shards, name: str, source: str, task: str | None, folders: Sequence[str], templates: str = "templates.txt"
) -> _Found:
    keys = [f"{entry.name}:{key}" for number, entry in enumerate(shards.entries) for key in shards.keys(number)]
    members = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
    present = [kind for kind, member in members.items() if any(shards.read(n, member) for n in _probes(len(shards)))]
    if not present:
        raise ValueError(f"{source} has neither labels (.cls, .npy) nor captions (.txt) beside its images")
    task = task or present[0]
    if task not in present:
        raise ValueError(f"{source} has no .{members[task]} beside its images, as {task} needs; it is for {present[0]}")
    identity = _digest(entry.sha256 for entry in shards.entries)
    found = _Found(name, _Each(shards, _image_of_record), keys, _shard_metadata(shards), identity=identity)
    if task == "retrieval":
        texts = (shards.read(n, "txt").decode("utf-8", "replace") for n in range(len(shards)))
        return replace(found, captions=_all_captioned(tuple(tuple(captions_in(t)) for t in texts), keys, source))
    names = next((text for folder in folders if (text := _text_at(folder, "classnames.txt")) is not None), None)
    classnames = None if names is None else tuple(lines_of(names, f"{source}/classnames.txt"))
    wordings = next((text for folder in folders if (text := _text_at(folder, templates)) is not None), None)
    labels: list[Any]
    if task == "classification":
        labels = [_label_in(shards.read(n, "cls").decode("utf-8", "replace"), key) for n, key in enumerate(keys)]
    else:
        labels = [_hot_labels(shards.read(n, "npy"), classnames, key) for n, key in enumerate(keys)]
    return replace(
        found,
        labels=labels,
        labels_from=f".{members[task]} of the shards",
        classnames=classnames,
        classnames_from="" if classnames is None else "classnames.txt of the data",
        templates=None if wordings is None else tuple(lines_of(wordings, f"{source}/{templates}")),
        templates_from=f"{templates} of the data",
    )


def _probes(count: int) -> list[int]:
    """Some numbers below `count`, spread evenly."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, 10))})


def _shard_metadata(shards: Shards) -> dict[str, list[Any]]:
    """What the samples' `.json` say, where they have one."""
    if not any(shards.read(n, "json") for n in _probes(len(shards))):
        return {}
    facts = [shards.info(number) for number in range(len(shards))]
    names = dict.fromkeys(
        name
        for each in facts
        for name, value in each.items()
        if value is None or isinstance(value, str | int | float | bool)
    )
    names.pop("cls", None)
    return {name: [each.get(name) for each in facts] for name in names}


def _hot_labels(data: bytes, classnames: tuple[str, ...] | None, key: str) -> list[str]:
    """The numbers of the classes that an array of zeros and ones has ones for."""
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{key}: its .npy can't be read: {error or 'it is empty'}") from error
    if classnames is None:
        raise ValueError(f"{key} has several labels; a set of those needs a classnames.txt")
    is_number = values.dtype.kind in "biuf"
    if not is_number or values.shape != (len(classnames),) or not np.isin(values, (0, 1)).all():
        raise ValueError(
            f"{key}: its .npy has the shape {values.shape} and begins with {values.ravel()[:5].tolist()}; it must hold "
            f"a 0 or a 1 for each of the {len(classnames)} class names"
        )
    return [str(number) for number in np.flatnonzero(values)]


# ---------------------------------------------------------------------------------------------------------------------
# torchvision's


def _read_torchvision(source: str, root: Path, split: str | None, download: bool) -> _Found:
    """A classification set of torchvision's.

    Some of those files are pickles (CIFAR's); torchvision compares them with its checksums before it opens them.
    """
    name = source.removeprefix(TORCHVISION_PREFIX)
    if name not in TORCHVISION_SETS:
        near = difflib.get_close_matches(name.lower(), [known.lower() for known in TORCHVISION_SETS], n=1)
        meant = [f" (is {known} meant?)" for known in TORCHVISION_SETS if [known.lower()] == near]
        raise ValueError(
            f"torchvision has no classification set {name!r}{''.join(meant)}; there are {', '.join(TORCHVISION_SETS)}"
        )
    from torchvision import datasets

    kind = getattr(datasets, name)
    parameters = inspect.signature(kind).parameters
    options: dict[str, Any] = {}
    if "split" in parameters:
        split = split or ("val" if name in ("ImageNet", "Imagenette") else "test")
        options["split"] = split
    elif "train" in parameters:
        split = split or "test"
        if split not in ("train", "test"):
            raise ValueError(f"torchvision's {name} has no split {split!r}; valid are train, test")
        options["train"] = split == "train"
    elif split:
        raise ValueError(f"torchvision's {name} comes in one piece, so --split {split} can't be followed")
    if "download" in parameters:
        options["download"] = download
    elif download:
        raise ValueError(f"torchvision can't download {name}; put its files into {root}")
    try:
        data = kind(root, **options)
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        hint = "" if download or "download" not in parameters else "; --download lets torchvision fetch it there"
        raise ValueError(
            f"torchvision's {name} can't be had from {root} ({' '.join(str(error).split())}). --root names the folder "
            f"that it is in{hint}"
        ) from error
    own = next((found for a in ("classes", "categories") if (found := getattr(data, a, None)) is not None), None)
    classnames, names_from = None, "torchvision"
    built_in = _PAPERS_NAMES.get(name)
    if built_in in CLASSNAME_SETS and name not in _NAMED_BY_TORCHVISION:
        classnames, names_from = classname_set(built_in), f"the built-in {built_in!r}"
    elif own is not None:  # of several names for a class, the first
        classnames = _readable(each if isinstance(each, str) else each[0] for each in own)
    place = f"{name}/{split}" if split else name
    wordings = "imagenet80" if name == "ImageNet" else built_in
    return _Found(
        name,
        _Each(data, _image_of_item),
        [f"{place}/{number}" for number in range(len(data))],
        labels=[str(label) for label in _torchvision_labels(data)],
        labels_from="torchvision",
        classnames=classnames,
        classnames_from="" if classnames is None else names_from,
        templates=template_set(wordings) if wordings else None,
        templates_from=f"the built-in set {wordings!r}" if wordings else "",
        identity=f"{place} of {len(data)} in {root.resolve()}",  # its sets never change
    )


def _torchvision_labels(data: Any) -> list[int]:
    """Its names for them differ; where it has none, each image is opened to learn its label."""
    for attribute in ("targets", "labels", "_labels", "y"):
        if (labels := getattr(data, attribute, None)) is not None:
            return [int(label) for label in labels]
    if (samples := getattr(data, "_samples", None)) is not None:
        return [int(label) for _, label in samples]
    return [int(data[number][1]) for number in range(len(data))]


# ---------------------------------------------------------------------------------------------------------------------
# Class names, prompts and groups


def _settle_names(found: _Found, classnames: str | Path | None, source: str) -> _Found:
    """The class names that count: those asked for, those beside the data, or the data's own."""
    names, names_from = found.classnames, found.classnames_from
    if classnames is not None:
        is_built_in = str(classnames) in CLASSNAME_SETS
        names = classname_set(str(classnames)) if is_built_in else tuple(read_lines(classnames))
        names_from = f"the built-in {str(classnames)!r}" if is_built_in else str(classnames)
    elif beside := next((path for path in found.beside.get("classnames", ()) if path.is_file()), None):
        names, names_from = tuple(read_lines(beside)), str(beside)
    if names is not None and found.classnames is not None and len(names) != len(found.classnames):
        raise ValueError(
            f"{source} has {len(found.classnames)} classes ({found.classnames_from}), and there are {len(names)} "
            f"class names in {names_from}"
        )
    return replace(found, classnames=names, classnames_from=names_from)


def _settle_templates(found: _Found, templates: str | Path | None, names: tuple[str, ...]) -> tuple[Prompts, str]:
    """The wordings that count, and where they came from."""
    if templates is None:
        templates = next((path for path in found.beside.get("templates", ()) if path.is_file()), None)
    if templates is None and found.templates is not None:
        return _checked(found.templates, found.templates_from), found.templates_from
    templates = "simple" if templates is None else templates
    if str(templates) in TEMPLATE_SETS:
        return template_set(str(templates)), f"the built-in set {str(templates)!r}"
    path = Path(templates)
    if not path.is_file():
        raise ValueError(f"templates {str(templates)!r} is no file and none of the sets {', '.join(TEMPLATE_SETS)}")
    if path.suffix.lower() != ".json":
        return _checked(tuple(read_lines(path)), str(path)), str(path)
    return _prompts_by_class(path, names), str(path)


def _checked(templates: Any, where: str) -> Any:
    for template in templates:
        try:
            fill(template, "")
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    return templates


def _prompts_by_class(path: Path, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """A .json of {class name: [its prompts]}, as CuPL's (Pratt et al. 2023), for the classes of the data."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; it must map each class name to a list of its prompts")
    by_spoken = {}
    for name, prompts in values.items():
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise ValueError(f"{path}: {name!r} must have a list of prompts, texts that are not empty")
        by_spoken[_spoken(name)] = tuple(prompts)
    missing = [name for name in names if _spoken(name) not in by_spoken]
    if missing:
        raise ValueError(
            f"{path} has prompts for {len(values)} classes and the data have {len(names)}; without any are "
            f"{_with_near(missing, list(values))}"
        )
    return {name: by_spoken[_spoken(name)] for name in names}


def _groups(found: _Found, group_column: str | None, source: str) -> tuple[str, ...]:
    if group_column is None:
        return tuple(map(str, range(len(found.images))))
    values = _column_of(found.metadata, group_column, source)
    # An image without a value stands alone: those of unknown scenes are not of one scene.
    return tuple(f"none, {number}" if _is_blank(value) else str(value) for number, value in enumerate(values))


def _some(values: Sequence[str], most: int = 10) -> str:
    return ", ".join(values[:most]) + (f" and {len(values) - most} more" if values[most:] else "")


def _with_near(names: Sequence[str], known: Sequence[str]) -> str:
    """The first few names, each with the known ones that look like it."""
    spoken = {_spoken(name): name for name in known}
    parts = []
    for name in names[:5]:
        near = [spoken[each] for each in difflib.get_close_matches(_spoken(name), spoken, n=2)]
        parts.append(repr(name) + (f" (near {' and '.join(map(repr, near))})" if near else ""))
    return ", ".join(parts) + (f" and {len(names) - 5} more" if names[5:] else "")


def _spoken(name: str) -> str:
    """One spelling for folder names and lists of names: tiger_cat, Tiger cat."""
    return name.replace("_", " ").casefold()


def _number_labels(
    raw: Sequence[str], names: tuple[str, ...] | None, source: str
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Labels as numbers, and the class names in that order.

    Labels are numbers already, or names: of the list if there is one, else sorted. An underscore in a label's name
    is read as the space that folder names often lack.
    """
    spoken_names = None if names is None else tuple(_spoken(name) for name in names)
    are_numbers = all(label.isascii() and label.isdigit() for label in raw)
    if are_numbers and names is not None:
        labels = tuple(int(label) for label in raw)
        if max(labels, default=0) >= len(names):
            raise ValueError(f"{source} has labels up to {max(labels)}, but there are {len(names)} class names")
        return labels, names
    found = sorted(set(raw), key=lambda label: (int(label), label)) if are_numbers else sorted(set(raw))
    if not found:
        raise ValueError(f"{source} has no label for any image")
    spoken = {label: _spoken(label) for label in found}
    if names is None or spoken_names is None:
        place = {label: number for number, label in enumerate(found)}
        return tuple(place[label] for label in raw), tuple(label.replace("_", " ") for label in found)
    unknown = [label for label in found if spoken[label] not in spoken_names]
    if not unknown:
        if len(set(spoken_names)) < len(spoken_names):
            raise ValueError(f"the class names hold duplicates, so {source} must give labels as numbers")
        place = {name: number for number, name in enumerate(spoken_names)}
        return tuple(place[spoken[label]] for label in raw), names
    # Keys of their own, such as WordNet's n01440764: the names are in the keys' order.
    if len(unknown) == len(found) == len(names) and all(re.fullmatch(r"[A-Za-z]?\d+", label) for label in found):
        place = {label: number for number, label in enumerate(found)}
        return tuple(place[label] for label in raw), names
    hint = ". -1 marks images without a label: choose another split" if "-1" in unknown else ""
    raise ValueError(
        f"{source} has {len(found)} classes and there are {len(names)} class names; these labels are none of them: "
        f"{_with_near(unknown, names)}{hint}"
    )
