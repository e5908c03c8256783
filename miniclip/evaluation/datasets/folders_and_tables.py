"""Images with labels from tables and Hugging Face's `datasets`, and with captions from any source of pairs."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...common.processes import warn_once
from ...common.storage import is_url
from ...common.wording import columns_in_words, some
from ...data.open_pairs import open_pairs
from ...data.preflight import reason_kind
from ...data.reading.cells import PostgresArray, has_no_value, one_line, postgres_array, texts_in, visible
from ...data.reading.folders import pair_splits
from ...data.reading.huggingface import (
    HUB_PREFIX,
    DatasetsRows,
    image_column_of,
    is_datasets_folder,
    load_datasets,
    undecoded,
)
from ...data.reading.imagefolder import splits_of_imagefolder
from ...data.reading.pair import Pair, Pairs
from ...data.reading.parquet import ParquetRows
from ...data.reading.paths import image_in
from ...data.reading.rows import without_numbers
from ...data.reading.scan import IMAGE_SUFFIXES, LeftOut, image_files, summary
from ...data.reading.splits import (
    choose_split,
    has_split_column,
    is_all_of,
    not_for_training,
    numbers_of,
    parts_in,
    role_of,
    rows_of_parts,
    rows_of_split,
    same_parts,
    splits_of_files,
    unfollowed_column,
)
from ...data.reading.tables import (
    beside_parquet,
    find_column,
    find_image_column,
    folder_of,
    is_parquet,
    is_pattern,
    is_told_by_name,
    names_of_files,
    parquet_files,
    parquet_splits,
    read_table,
)
from .class_folders import beside_folder
from .name_files import spoken
from .sets import Columns, Found, NoImage, digest_lines, file_identity

LABEL_COLUMNS = ("label", "labels", "class", "target", "classname", "category")


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


def image_of_row(folder: Path, column: str, row: Mapping[str, Any]) -> Any:
    return _image_of_cell(folder, row.get(column))


def _image_of_cell(folder: Path, cell: Any) -> Any:
    """The image of a table's cell; what is no image is a reason, so that one cell does not stop the others."""
    if has_no_value(cell, may_be_name=True):
        return None
    try:
        return image_in(cell, folder)
    except ValueError as error:
        return NoImage(str(error))


def _image_of_pair(pair: Any) -> Any:
    if pair.problem:
        raise ValueError(f"{pair.source}: {pair.problem}")
    return pair.image


def _parquet_images(files: Sequence[Path], chosen: Sequence[int] | None, folder: Path, column: str) -> Sequence[Any]:
    return FromEach(ParquetRows(files, chosen), partial(image_of_row, folder, column))


def _pairs_of_split(source: str, image_column: str | None, split: str | None) -> Pairs:
    return open_pairs(source, image_column=image_column, split=split, default_split="test")


def _pair_images(source: str, image_column: str | None, split: str | None) -> Sequence[Any]:
    return FromEach(_pairs_of_split(source, image_column, split), _image_of_pair)


def _rows_of_part(
    source: str,
    columns: Sequence[str],
    rows: Any,
    split: str | None,
    is_told: bool = False,
    may_be_several: bool = False,
) -> tuple[Any, str | None]:
    """The rows of one part of those that a column `split` names, and the part; all, with a warning, where none of their
    names is known and none is asked for. Without such a column all rows are train.

    Args:
        is_told: the source's name says that it is of the split that is asked for, so that a column of other values
            means something else.
        may_be_several: where several parts may be meant, all that are not for training are taken, with a warning; all
            rows where there are none.

    Raises:
        ValueError: there is no such part, or no such column.
    """
    column, parts = parts_in(columns, rows, split)
    files = [] if column else names_of_files(Path(source))
    if not column and split and not is_told and not (Path(source).is_dir() and is_all_of(split)):
        of_files = f"its files are of {some(files)}" if files else "a column 'split' would name the part of each row"
        raise ValueError(f"{source} is a table and has no split {split!r}; {of_files}")
    if not column:
        warn_of_unknown(source, files)
        if not is_told and (other := unfollowed_column(columns, rows)):
            warn_once(
                f"{source}: all rows are read. Its column {other!r} is not followed; one 'split' with the names of the "
                "parts, train and test, would be",
                stacklevel=5,
            )
        return rows, None
    if is_told and split and not any(map(role_of, parts)) and not same_parts(parts, split):
        split = None
    there = some([part or "blank" for part in parts], 3)
    if split is None and not any(map(role_of, parts)):
        remedy = "" if may_be_several else "; --split takes the rows of one"
        if len(parts) > 1:
            warn_once(
                f"{source}: all rows are read. Its column {column!r} has {there}, of which none is known to be for "
                f"testing{remedy}",
                stacklevel=5,
            )
        return rows, None
    try:
        chosen = choose_split(parts, split, source)
    except ValueError:
        if not may_be_several:
            raise
        taken = not_for_training(parts)
        which = f"the rows of {some([part or 'blank' for part in taken], 3)} are" if taken else "all rows are"
        warn_once(f"{source}: {which} read, as its column {column!r} has {there}", stacklevel=5)
        return rows_of_parts(columns, rows, taken or parts), None
    return rows_of_split(source, columns, rows, chosen, is_asked_for=True), chosen


def warn_of_unknown(source: str, names: Sequence[str]) -> None:
    """Where several `names` of files may be splits', and none is known."""
    if len(names) > 1:
        warn_once(
            f"{source}: all files are read. Their names are of {some(names, 3)}, of which none is known to be for "
            "testing; --split takes those of one",
            stacklevel=6,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Tables and Hugging Face's data sets


def _rows_of_one_split(
    path: Path, split: str | None, may_be_several: bool = False
) -> tuple[list[str], Any, str | None]:
    """The columns and rows of a table, or of a folder or pattern of Parquet files, and the split that is read.

    Where the names of files tell of several splits, files of the others are not opened.

    Args:
        may_be_several: as that of `_rows_of_part`.
    """
    splits = parquet_splits(path, split)
    if len(splits) > 1:
        split = choose_split(splits, split, str(path))
        return *read_table(path, split), split
    names, rows = read_table(path)
    if splits and not has_split_column(names):
        return names, rows, choose_split(splits, split, str(path))
    if is_pattern(str(path)) and not path.exists() and not has_split_column(names):
        _refuse_files_of_training(path)
    is_told = split is not None and is_told_by_name(path, split)
    return names, *_rows_of_part(str(path), names, rows, split, is_told, may_be_several)


def _refuse_files_of_training(pattern: Path) -> None:
    files = parquet_files(pattern)
    above = os.path.commonpath([file.absolute().parent for file in files])
    parts = sorted(set(splits_of_files(Path(above), [file.absolute() for file in files]).values()))
    if len(parts) > 1 and "train" in map(role_of, parts):
        raise ValueError(
            f"{pattern} names files of the splits {some(parts)}, and none for training may be scored along; name those "
            "of one split, or their folder"
        )


def read_unlabelled_table(path: Path, group_column: str | None = None) -> Found:
    """The images of the split that `read_labelled_table` would read, or of all that it could be, whether or not they
    have labels.

    A file or URL that several rows name, as where each caption has a row, is one image; the other rows are left out.

    Args:
        group_column: whose values rows of one image have to agree in, if there is such a column.

    Raises:
        ValueError: they do not.
    """
    names, rows, _ = _rows_of_one_split(path, None, may_be_several=True)
    image_column = find_image_column(names, rows, folder_of(path), path)[0]
    there = images_of_rows(path, names, rows, image_column)
    metadata: dict[str, Any] = {name: column for name, column in there.values.items() if name != image_column}
    rows_of: dict[str, list[int]] = {}  # by what says which file it is; an image within the table has its own row's
    for row, key in enumerate(there.keys):
        rows_of.setdefault(key if is_url(key) else os.path.realpath(key), []).append(row)
    first = [same[0] for same in rows_of.values()]
    images, keys, left_out = there.images, there.keys, there.left_out
    if count := len(keys) - len(first):
        if group_column in metadata:
            _refuse_several_groups(path, keys, rows_of.values(), metadata[group_column], group_column)
        metadata = {
            name: [_first_value(column, same) for same in rows_of.values()] for name, column in metadata.items()
        }
        repeated = next(same[1] for same in rows_of.values() if len(same) > 1)
        left_out = [*left_out, LeftOut(keys[repeated], "a further row of an image", count)]
        images = FromEach(first, images.__getitem__)
        keys = [keys[row] for row in first]
    return Found(path.stem, images, keys, metadata, identity=there.identity, left_out=left_out)


def _first_value(column: Sequence[Any], rows: Sequence[int]) -> Any:
    return next((column[row] for row in rows if not has_no_value(column[row])), None)


def _refuse_several_groups(
    path: Path, keys: Sequence[str], images: Iterable[Sequence[int]], column: Sequence[Any], name: str
) -> None:
    for rows in images:
        groups = list(dict.fromkeys(str(column[row]) for row in rows if not has_no_value(column[row])))
        if len(groups) > 1:
            raise ValueError(
                f"{path}: {keys[rows[0]]} has the {name} {groups[0]!r} in one row and {groups[1]!r} in another; an "
                "image may be of one group"
            )


def read_labelled_table(path: Path, columns: Columns, split: str | None = None) -> Found:
    """A table, or a folder or pattern of Parquet files, of which one split is read."""
    names, rows, _ = _rows_of_one_split(path, split)
    columns.check(names, str(path))
    image_column = columns.image or find_image_column(names, rows, folder_of(path), path)[0]
    # {file: label} is read as a file and its captions.
    known = (*LABEL_COLUMNS, *(("captions",) if list(names) == ["file", "captions"] else ()))
    label_column = columns.label or find_column(names, known, "the labels", path)
    kind = _type_in_parquet(rows, label_column)
    if re.match(r"(large_|fixed_size_)?binary", str(kind)):
        raise ValueError(
            f"{path}: column {label_column!r} has bytes for labels ({kind}); they must be names or numbers: write the "
            "column as texts"
        )
    there = images_of_rows(path, names, rows, image_column, label_column)
    values = there.values
    labels = []
    for number, label, image in zip(numbers_of(rows), values[label_column], values[image_column], strict=True):
        which = f"row {number + 1}" + (f" ({image[:100]})" if isinstance(image, str) else "")
        labels.append(label_in(label, f"{path}: {which}"))
    _look_at_rows(numbers_of(rows), there.images, labels, path)
    class_names = _schema_names(rows, label_column)
    return Found(
        path.stem,
        there.images,
        there.keys,
        {name: column for name, column in values.items() if name not in (image_column, label_column)},
        alike(labels, str(path)),
        f"column {label_column!r}",
        are_cells=True,
        classnames=class_names,
        classnames_from=f"column {label_column!r}, a ClassLabel" if class_names else "",
        identity=there.identity,
        left_out=there.left_out,
        beside=beside_folder(path)
        if not path.is_file()
        else {
            "classnames": [path.with_suffix(".classnames.txt")],
            "templates": [path.with_suffix(".templates.txt"), path.with_suffix(".templates.json")],
        },
    )


def read_table_in(table: Path, source: Path, columns: Columns) -> Found:
    """A table beside its pictures, in the folder `source` or in one of those of its splits, as part of that folder."""
    found, folder = read_labelled_table(table, columns), table.parent
    beside = beside_folder(*dict.fromkeys([folder, source]))
    others = [path.name for path in sorted(source.iterdir()) if folder != source and path.is_dir() and path != folder]
    return replace(
        found,
        name=source.resolve().name,
        labels_from=f"{found.labels_from} of {table.relative_to(source)}",
        beside={kind: [*found.beside[kind], *paths] for kind, paths in beside.items()},
        left_out=[
            *found.left_out,
            *(LeftOut(f"{name}/", f"beside {folder.name}/, the split that is read") for name in others),
        ],
    )


@dataclass(frozen=True)
class TableImages:
    """The images of a table, and all else that one value a row says of them.

    Args:
        values: the columns that hold one value a row, the images' own among them, and those that were asked for.
        identity: as that of an `EvaluationSet`.
    """

    images: Sequence[Any]
    keys: list[str]
    values: dict[str, list[Any]]
    identity: str | None
    left_out: list[LeftOut]


def images_of_rows(
    path: Path, names: Sequence[str], rows: Any, image_column: str, *also: str, called: str = ""
) -> TableImages:
    """The images of what `read_table` gave, of a table or of a folder or pattern of Parquet files.

    Args:
        also: columns to have the values of, even if they are lists.
        called: the table, in the keys of images that lie in it, before the number of their row in it, from 1; by
            default its own name.

    Raises:
        ValueError: there are no rows.
    """
    if not len(rows):
        raise ValueError(f"{path} has columns and no rows")
    values = {name: _column(rows, name) for name in names if name in (image_column, *also) or _is_flat(rows, name)}
    if not hasattr(rows, "files"):
        values[image_column] = without_numbers(values[image_column])
    folder = folder_of(path)
    images: Sequence[Any] = tuple(_image_of_cell(folder, cell) for cell in values[image_column])
    is_path = [isinstance(image, str | Path) for image in images]
    row_of = f"{called or path.name}: row"
    keys = [
        str(image) if at else f"{row_of} {number + 1}"
        for number, image, at in zip(numbers_of(rows), images, is_path, strict=True)
    ]
    if hasattr(rows, "files"):  # Parquet, whose images may lie in it
        images = _OfEachProcess(partial(_parquet_images, rows.paths, rows.chosen, folder, image_column), len(rows))
    # A table that holds its images, perhaps several columns of them.
    files = getattr(rows, "paths", [path])
    identity = None if any(is_path) else " ".join([image_column, *(file_identity(file)[0] for file in files)])
    if identity and getattr(rows, "chosen", None) is not None:  # other rows of the same files are other images
        identity += f" {digest_lines(map(str, numbers_of(rows)))}"
    left_out = list(getattr(rows, "left_out", ()))
    if path.is_dir():
        left_out += beside_parquet(path, files)
    return TableImages(images, keys, values, identity, left_out)


def _column(rows: Any, name: str) -> list[Any]:
    return rows.column(name) if hasattr(rows, "column") else [row.get(name) for row in rows]


def _is_flat(rows: Any, name: str) -> bool:
    """Whether a column holds one value a row; lists and structures in Parquet may be embeddings, or other images."""
    kind = _type_in_parquet(rows, name)
    return kind is None or kind.num_fields == 0


def _type_in_parquet(rows: Any, name: str) -> Any:
    """The type of a column of Parquet files; None for one of their folders' names, and for other tables."""
    return rows.file.schema_arrow.field(name).type if hasattr(rows, "file") and name not in rows.of_path else None


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
    rows, split = _chosen_of_datasets(load_datasets(source), split, source)
    import datasets

    loaded = rows.loaded
    names, features = list(loaded.column_names), loaded.features
    columns.check(names, source)
    image_column = columns.image or image_column_of(loaded, source)
    of_classes = {c: getattr(features[c], "feature", features[c]) for c in names}
    of_classes = {c: feature for c, feature in of_classes.items() if isinstance(feature, datasets.ClassLabel)}
    label_column = columns.label or _only_class_label(list(of_classes), names, source)
    loaded = undecoded(loaded)
    label_feature = of_classes.get(label_column)
    scalar = [c for c in names if isinstance(features[c], datasets.Value | datasets.ClassLabel)]
    raw = loaded.select_columns([label_column])[:][label_column]
    numbers = [number + 1 for number in numbers_of(rows)]
    labels = [label_in(label, f"{source}: row {number}") for number, label in zip(numbers, raw, strict=True)]
    name = source.removeprefix(HUB_PREFIX).rstrip("/").rpartition("/")[2]
    return Found(
        name,
        FromEach(loaded, partial(image_of_row, Path(), image_column)),
        [f"{name}: row {number}" for number in numbers],
        {c: list(loaded[c]) for c in scalar if c not in (image_column, label_column)},
        alike(labels, source),
        f"column {label_column!r}",
        are_cells=True,
        classnames=readable_sources(label_feature.names) if label_feature else None,
        classnames_from=f"column {label_column!r}, a ClassLabel" if label_feature else "",
        beside={} if source.startswith(HUB_PREFIX) else beside_folder(Path(source)),
        # The library's own fingerprint is of how the data were made.
        identity=f"datasets {source} {split} {image_column} {loaded._fingerprint}",
        left_out=rows.left_out,
    )


def _chosen_of_datasets(loaded: Any, split: str | None, source: str) -> tuple[DatasetsRows, str | None]:
    """The rows of one split, by the names of sets or by a set's column `split`; and the split."""
    only = loaded if not isinstance(loaded, dict) else next(iter(loaded.values())) if len(loaded) == 1 else None
    parts = [] if only is None else parts_in(only.column_names, DatasetsRows(only), split)[1]
    is_of_set = isinstance(loaded, dict) and split and not same_parts(parts, split)  # by the name of the only set
    if only is not None and parts and not is_of_set:
        rows, chosen = _rows_of_part(source, only.column_names, DatasetsRows(only), split)
        if isinstance(loaded, dict):
            chosen = chosen or next(iter(loaded))
        return rows, chosen
    if isinstance(loaded, dict):
        chosen = choose_split(list(loaded), split, source)
        return DatasetsRows(loaded[chosen]), chosen
    if split:
        raise ValueError(f"{source} is one data set without splits, so --split {split} can't be followed")
    return DatasetsRows(loaded), split


def _only_class_label(found: list[str], columns: list[str], source: str) -> str:
    if len(found) == 1:
        return found[0]
    if found:
        if known := [column for column in found if column.lower() in LABEL_COLUMNS]:
            return known[0]
        raise ValueError(f"{source} has several columns of classes, {', '.join(found)}; choose one with --label-column")
    raise ValueError(
        f"{source} has no column of type ClassLabel; its columns are {columns_in_words(columns)}. If one of them holds "
        "the labels, name it with --label-column"
    )


_BOXED = re.compile(r"(?=.*[^\d\s-])\S+(\s+-?\d+(\.\d+)?){4}(\s.*)?")  # n01440764 85 1 499 272, as ImageNet's
_MAY_BE = 'it must be a name, a number, or a list of those, as ["cat", "dog"]'


def label_in(cell: Any, where: str, is_element: bool = False) -> str | list[str]:
    """A label, or those of a list, also of one that is written as a text, as it goes through a CSV.

    Args:
        is_element: of a list, which PostgreSQL did not write.
    """
    if isinstance(cell, Mapping | bytes):
        raise ValueError(f"{where} has {str(cell)[:50]} for a label; {_MAY_BE}")
    if isinstance(cell, list | tuple | np.ndarray):
        return [str(label_in(each, where, is_element=True)) for each in cell]
    if has_no_value(cell, may_be_name=True):
        shown = f" ({cell!r}, as programs write a cell without a value)" if isinstance(cell, str) and cell else ""
        raise ValueError(f"{where} has no label{shown}")
    text = visible(str(cell))
    if _BOXED.fullmatch(text):
        raise ValueError(f"{where} has the label {text[:50]!r}, a class with the sides of a box; write the class alone")
    return text if not isinstance(cell, str) else _written_labels(text, where, is_element)


def _written_labels(text: str, where: str, is_element: bool) -> str | list[str]:
    """The labels of a list that was written as a text; a text that is none.

    Raises:
        ValueError: code of another kind.
    """
    if re.fullmatch(r"\[\s*(\d+(\.0*)?([\s,]+\d+(\.0*)?)*)?[\s,]*\]", text):
        return re.findall(r"(\d+)(?:\.0*)?", text)
    with suppress(ValueError):  # a mapping, which is code
        if text[:1] + text[-1:] in ("[]", "()", "{}") and (texts := texts_in(text)) != [text]:
            return texts
    array = None if is_element else postgres_array(text)
    labels = None if array is None else _labels_of(array)
    if labels is not None:
        return labels
    if array or re.fullmatch(r"[\w.]+\([\[\d].*\)|\{.*:.*\}|\[.*\d.*\]", text):
        raise ValueError(f"{where} has the code {text[:50]!r} for a label; {_MAY_BE}")
    return text


def _labels_of(array: PostgresArray) -> list[str] | None:
    """None for numbers that are not whole, and for fields and their values."""
    texts = [visible(value) for value in array.values if value is not None]
    if array.has_numbers:
        numbers = [re.fullmatch(r"(\d+)(?:\.0*)?", text) for text in texts]
        return [number[1] for number in numbers if number] if all(numbers) else None
    return None if array.has_fields else [text for text in texts if text]


def _look_at_rows(numbers: Sequence[int], images: Sequence[Any], labels: Sequence[Any], path: Path) -> None:
    """Refuses pictures among the labels, and warns of images with several of them: tables of boxes have a row for each
    box, and an image would be right in one of its rows at most."""
    labels_of: dict[str, Any] = {}
    contradicted: list[str] = []
    for number, image, label in zip(numbers, images, labels, strict=True):
        for each in [label] if isinstance(label, str) else label:
            if Path(each).suffix.lower() in IMAGE_SUFFIXES:
                raise ValueError(
                    f"{path}: row {number + 1} has the picture {each[:60]!r} for a label; name the right column"
                )
        if isinstance(image, str | Path) and labels_of.setdefault(str(image), label) != label:
            contradicted.append(str(image))
    if contradicted:
        warn_once(
            f"{path}: {some(list(dict.fromkeys(contradicted)), 3)} have other labels in other rows, and each row "
            "counts by itself; for one image with several labels, write one row with a list of them",
            stacklevel=4,
        )


def alike(labels: list[Any], source: str) -> list[Any]:
    """Labels that are all single, or all lists.

    Raises:
        ValueError: some are lists, or what they hold can't be the labels of one image.
    """
    if len({isinstance(label, list) for label in labels}) > 1:
        raise ValueError(f"{source} has lists of labels in some rows and single labels in others")
    if labels and isinstance(labels[0], list):
        _refuse_zeros_and_ones(labels, source)
        return labels
    labels = _whole_numbers(labels)
    if "-1" in labels and all(label.isdigit() for label in {*labels} - {"-1"}):
        raise ValueError(
            f"{source} has the label '-1'. -1 marks images without a label: choose another split or leave them out"
        )
    return labels


def _whole_numbers(labels: list[str]) -> list[str]:
    """Whole numbers without the ".0" that a table with a gap in it writes them with, if all are such and no two become
    one; 1.000 and 1,000 are names, as thousands are written so."""
    are_thousands = not any(re.fullmatch(r"0+[.,]000", label) for label in labels)  # 0.000 is none
    end = re.compile(r"[.,](?!000$)0+$" if are_thousands else r"[.,]0+$")
    whole = {label: end.sub("", label) for label in labels}
    is_whole = all(re.fullmatch(r"-?\d+", number) for number in whole.values())
    return [whole[label] for label in labels] if is_whole and len(set(whole.values())) == len(whole) else labels


def _refuse_zeros_and_ones(labels: Sequence[Sequence[str]], source: str) -> None:
    """A list holds the labels that an image has, and not a number for each class."""
    remedy = "a list holds an image's own labels, [1] for [0, 1, 0]"
    if twice := next((each for each in labels if len(set(each)) < len(each)), None):
        raise ValueError(f"{source} has a label twice in one list, {', '.join(twice)[:60]!r}; {remedy}")
    if len(labels) > 1 and len(labels[0]) > 1 and all(set(each) == set(labels[0]) for each in labels):
        raise ValueError(f"{source} gives every image all of the labels {', '.join(labels[0])[:60]!r}; {remedy}")


def refuse_joined(labels: Sequence[str], source: str) -> None:
    """Several labels in one cell would be a class of their own.

    Raises:
        ValueError: a label surely is several. Where it may be, a warning names it.
    """
    there = set(labels)
    are_thousands = all(re.fullmatch(r"(0|[1-9]\d{0,2})(,\d{3})*", label) for label in there)
    if are_thousands and any(",0" in label for label in there):  # 1,000 is no list of 1 and 000
        return
    are_numbers = all(re.fullmatch(r"\d+([\s,;|]+\d+)*", label) for label in there)
    spoken_there = set(map(spoken, there))
    for label, parts in _parts_of_labels(there, r"[\s,;|]+" if are_numbers else r"[,;|+/，、،；]").items():
        if len(parts) > 1 and (are_numbers or spoken_there.issuperset(map(spoken, parts))):
            raise ValueError(f"{source} has the label {label!r}, which is several in one cell; {_how_to_list(parts)}")
    _refuse_parts_in_common(there, source)


def _how_to_list(parts: Sequence[str]) -> str:
    return (
        f"write them as a list, {json.dumps(parts, ensure_ascii=False)}. If it is one class, call it otherwise, such "
        "as by spaces or underscores for the marks between, or list the names of all classes with --classnames"
    )


def _refuse_parts_in_common(there: set[str], source: str) -> None:
    """Several labels in one cell that no cell has alone, by parts that they share.

    A part that is the first of one label and a later one of another is of no taxonomy (Corn|Rust, church/indoor), whose
    levels stand in order. With bars and semicolons, which class names hardly have, that tells labels in one cell.
    Commas and slashes also stand between synonyms, places and pairs in order (en/de): there every part has to be in
    another label as well, and no two labels may be of the same parts. Short of that there is a warning.
    """
    for separators, are_usual in ((r"[|;]", False), (r"[,+/]", True)):
        parts_of = _parts_of_labels(there, separators)
        joined = {label: parts for label, parts in parts_of.items() if len(set(parts)) == len(parts) > 1 and all(parts)}
        num_labels = Counter(part for parts in parts_of.values() for part in set(parts))
        moved = {parts[0] for parts in parts_of.values()} & {part for parts in joined.values() for part in parts[1:]}
        shared = [label for label, parts in joined.items() if any(num_labels[part] > 1 for part in parts)]
        is_sure = bool(moved)
        if are_usual:
            if 2 * len(shared) < len(joined) or any(part.isdigit() for parts in joined.values() for part in parts):
                continue
            whole = [label for label in shared if all(num_labels[part] > 1 for part in joined[label])]
            is_sure = len(whole) == len(joined) == len(set(map(frozenset, joined.values())))
            shared = [label for label in whole if not moved.isdisjoint(joined[label])]
        if not shared:
            continue
        label = next((label for label in shared if not moved.isdisjoint(joined[label])), shared[0])
        parts = joined[label]
        common = next(part for part in parts if num_labels[part] > 1 and (part in moved or not moved))
        told = f"{source} has the label {label!r}, and {common!r} is in others, too"
        if is_sure:
            raise ValueError(f"{told}: they seem to be several in one cell; {_how_to_list(parts)}")
        warn_once(
            f"{told}: each is a class of its own. If it is several in one cell, {_how_to_list(parts)}", stacklevel=4
        )


def _parts_of_labels(labels: Iterable[str], separators: str) -> dict[str, list[str]]:
    """Each label with what stands between the separators in it, [brackets] around all aside."""
    listed = {label: label[1:-1] if label[:1] + label[-1:] == "[]" else label for label in sorted(labels)}
    return {label: [part.strip() for part in re.split(separators, text)] for label, text in listed.items()}


def readable_sources(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(name.replace("_", " ") for name in names)


def _group_of_pair(pair: Pair, name: str) -> Any:
    """The value of a column, which several rows of one image have to agree in; None for none.

    Raises:
        ValueError: they do not.
    """
    found = pair.extra.get(name)
    values = [value for value in (found if isinstance(found, list) else [found]) if not has_no_value(value)]
    if len(groups := list(dict.fromkeys(map(str, values)))) > 1:
        raise ValueError(
            f"{pair.source} has the {name} {groups[0]!r} in one row and {groups[1]!r} in another; an image may be of "
            "one group"
        )
    return next(iter(values), None)


def read_pairs(source: str, split: str | None, columns: Columns) -> Found:
    """Images with captions, from any source that training reads. Pairs without a caption are left out.

    Raises:
        ValueError: no pair has one.
    """
    if columns.label:
        raise ValueError(f"{source} is read for its captions, so --label-column {columns.label} can't be followed")
    path = Path(source)
    name = path.stem if path.is_file() else source.rstrip("/").rpartition("/")[2]
    source, split, within, left_out = _part_of_split(source, split)
    pairs = _pairs_of_split(source, columns.image, split)
    captions: dict[int, tuple[str, ...]] = {}
    groups, others = [], dict[str, None]()
    left_out += pairs.left_out
    for index, name_of_pair in enumerate(pairs.names):
        if within and not any((path / name_of_pair).is_relative_to(place) for place in within):
            continue
        pair = pairs[index]  # one at a time: some hold their image's bytes
        if texts := tuple(text for caption in pair.captions if (text := one_line(caption))):
            captions[index] = texts
            others |= dict.fromkeys(pair.extra)
            groups.append(_group_of_pair(pair, columns.group) if columns.group else None)
        else:
            left_out.append(LeftOut(pair.source, reason_kind(pair.problem or "it has no caption", pair)))
    if not captions:
        raise ValueError(f"{source} holds no images with captions" + (f": {summary(left_out)}" if left_out else ""))
    if columns.group and columns.group not in others:
        raise ValueError(
            f"{source} has no column {columns.group!r} beside its images and captions; "
            + (f"it has {', '.join(others)}" if others else "there is none")
        )
    images = _OfEachProcess(partial(_pair_images, source, columns.image, split), len(pairs))
    return Found(
        name,
        FromEach(list(captions), images.__getitem__),
        [pairs.names[index] for index in captions],
        {columns.group: groups} if columns.group else {},
        captions=tuple(captions.values()),
        left_out=left_out,
    )


def _part_of_split(source: str, split: str | None) -> tuple[str, str | None, list[Path], list[LeftOut]]:
    """Of pairs in splits, the one that is read: the source that holds it, the split to choose there, the folders within
    the source that are read, if not all, and what is left out for it."""
    path = Path(source)
    has_pictures = path.is_dir() and bool(image_files(path))
    if source.startswith(HUB_PREFIX) or is_datasets_folder(path):
        return source, _chosen_of_datasets(load_datasets(source), split, source)[1], [], []
    if has_pictures and (parts := pair_splits(path)):
        chosen = choose_split(list(parts), split, source)
        left_out = [
            LeftOut(f"{place.relative_to(path)}/", f"beside the folders of {chosen}, the split that is read")
            for part, others in parts.items()
            for place in others
            if part != chosen
        ]
        if parts[chosen] == [path / chosen]:
            return str(path / chosen), chosen, [], left_out
        return source, None, parts[chosen], left_out  # the texts may lie apart, in captions/val of images/val
    if (path.is_file() and not source.endswith(".tar")) or (is_parquet(path) and not has_pictures):
        split = _rows_of_one_split(path, split)[2]
        return str(path / split) if split and (path / split).is_dir() else source, split, [], []
    if has_pictures and (own := splits_of_imagefolder(path)) and (split or any(map(role_of, own))):
        return source, choose_split(own, split, source), [], []
    if split:
        raise ValueError(f"{source} has no splits, so --split {split} can't be followed")
    return source, None, [], []
