"""What can be evaluated on: images with a label, with several labels, or with captions.

| source                                                | labels, or captions                                     |
|-------------------------------------------------------|---------------------------------------------------------|
| a folder per class: DATA/tabby_cat/1.jpg              | the names of the folders                                |
| `.csv`, `.tsv`, `.jsonl`, `.json`, `.parquet`         | a column of names or numbers; of lists: several labels  |
| a folder or a pattern of Parquet files                | the same, of one split                                  |
| shards (webdataset's tars): a folder, a pattern, a URL| `.cls`; `.npy`, several labels; `.txt`, captions        |
| CLIP_benchmark's sets: a folder, a URL, `hf-hub:`     | the same; `dataset_type.txt` says which                 |
| Hugging Face's `datasets`: a folder, `hf-hub:`        | a column of type ClassLabel, or the one that is named   |
| `torchvision:CIFAR10`                                 | torchvision's                                           |
| with task="retrieval", any source of training         | captions, as `miniclip shards` finds them               |

Names and prompts that belong to the data lie with it and are used unless others are asked for: `classnames.txt` (one a
line, in label order) and `templates.txt` or `templates.json` in the folder, or `DATA.classnames.txt` and so on beside
the table. Each set says where its names and prompts came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...common.processes import warn_once
from ...common.storage import is_url
from ...data.open_pairs import is_shards
from ...data.reading.huggingface import HUB_PREFIX, is_datasets_folder
from ...data.reading.scan import TABLE_SUFFIXES, LeftOut, image_files, scan, summary
from ...data.reading.tables import is_list_of_labels, is_parquet, is_pattern, parquet_files, table_suffix
from ...data.shard_index import INDEX_FILE
from .class_folders import UNREAD_TEXT, left_out_of_bare, read_class_folders, split_folders_of_tars
from .folders_and_tables import (
    read_datasets,
    read_labelled_table,
    read_pairs,
    read_table_in,
    read_unlabelled_table,
    refuse_joined,
)
from .name_files import spoken
from .names import (
    NUMBER_WORDS,
    number_labels,
    seem_numbered_from_1,
    settle_names,
    settle_templates,
    without_keys,
)
from .sets import (
    TASKS,
    CaptionedImages,
    Columns,
    EvaluationSet,
    Found,
    GroupedImages,
    LabelledImages,
    MultilabelImages,
    column_of,
)
from .tars import NUM_SHARDS_FILE, benchmark_splits, hub_location, read_tars, read_tars_of_split
from .torchvision_sets import TORCHVISION_PREFIX, read_torchvision


def open_dataset(
    source: str | Path,
    classnames: str | Path | None = None,
    templates: str | Path | tuple[()] | None = None,
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
            {class name: [its prompts]}; by default the data's own, else "simple". () for none, of a set that nobody is
            asked about, or that gets them by `with_templates`: files beside the data are not read.
        group_column: the column (or entry of shards' `.json`) whose equal values mark images that belong together.
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
    columns = Columns(label_column, image_column, group_column)
    found = _read_source(source, split, columns, Path(root), download, task, classnames)
    if not len(found.images):
        raise ValueError(f"{source} holds no images")
    if task not in (None, found.task):
        raise ValueError(f"{source} is made for {found.task}, and {task} was asked for")
    groups = _groups(found, group_column, source)
    _warn_of(found.left_out, source)
    shared: dict[str, Any] = {"keys": found.keys, "metadata": found.metadata}
    shared |= {"identity": found.identity, "left_out": tuple(found.left_out)}
    if found.task == "retrieval":
        if classnames or templates:
            raise ValueError(f"{source} has captions, not classes; class names and templates are not for it")
        return CaptionedImages(found.name, found.images, found.captions, groups, **shared)
    are_indices = found.classnames is not None
    found = settle_names(found, classnames, source)
    if found.task == "multilabel":
        raw = [label for each in found.labels for label in each]
        flat, names = number_labels(raw, found.classnames, source, are_indices, found.class_labels)
        hot = np.zeros((len(found.labels), len(names)), dtype=bool)
        hot[np.repeat(np.arange(len(hot)), [len(each) for each in found.labels]), flat] = True
        labels: Any = hot
    else:
        raw = [str(label) for label in found.labels]
        listed = set(map(spoken, found.class_labels or found.classnames or ()))
        if found.are_cells and not listed.issuperset(map(spoken, raw)):
            refuse_joined(raw, source)
        labels, names = number_labels(raw, found.classnames, source, are_indices, found.class_labels)
    is_by_order = not are_indices and found.class_labels is None
    if is_by_order and seem_numbered_from_1(raw, found.classnames):
        warn_once(
            f"{source}: no image has the label 0 ({names[0]!r}), and all from 1 to {len(set(raw))} occur. Labels count "
            f"from 0, so 1 is {names[1]!r}; if these are numbered from 1, each is off by one",
            stacklevel=2,
        )
    if not found.classnames_from:
        are_numbers = all(name.isdigit() for name in names)
        have_keys = without_keys(there := sorted(set(raw))) != there
        shared["classnames_from"] = NUMBER_WORDS if are_numbers else found.labels_from
        shared["classnames_from"] += ", without the keys before them" * have_keys
    else:
        shared["classnames_from"] = found.classnames_from
    prompts, shared["templates_from"] = settle_templates(found, templates, names)
    kind = MultilabelImages if found.task == "multilabel" else LabelledImages
    return kind(found.name, found.images, labels, names, prompts, groups, **shared)


def open_images(source: str | Path, group_column: str | None = None) -> EvaluationSet:
    """Images whose labels don't matter: a folder of them, however deep, or any source of the table above. Tables need
    have none, and an image that several of their rows name counts once.

    Args:
        group_column: as in `open_dataset`, if the source has such a column; a warning says if it has not.
    """
    path = Path(source)
    is_plain = path.is_dir() and not is_shards(str(source)) and not is_datasets_folder(path)
    if is_plain and not _is_table(str(source)) and not any(path.glob(f"*/{NUM_SHARDS_FILE}")):
        below = scan(path)
        left_out = left_out_of_bare(below)
        if not below.images:
            raise ValueError(f"{source} holds no images" + (f": {summary(left_out)}" if left_out else ""))
        _warn_of(left_out, str(source))
        return EvaluationSet(path.resolve().name, below.images, left_out=left_out)
    data: Any
    if not is_shards(str(source)) and not is_datasets_folder(path) and _is_table(str(source)):
        found = read_unlabelled_table(path, group_column)
        _warn_of(found.left_out, str(source))
        shared: dict[str, Any] = {"keys": found.keys, "metadata": found.metadata, "identity": found.identity}
        groups = _groups(found, None, str(source))
        data = GroupedImages(found.name, found.images, groups, left_out=tuple(found.left_out), **shared)
    else:
        data = open_dataset(source, templates=())
    if group_column is not None and group_column in data.metadata:
        return replace(data, groups=_groups(data, group_column, str(source)))
    if group_column is not None:
        warn_once(f"{source} has no column {group_column!r}; each of its images counts as independent", stacklevel=2)
    return data


def _warn_of(left_out: Sequence[LeftOut], source: str) -> None:
    """Once for all processes. Texts alone are no loss: captions lie beside images that were trained on."""
    if any(each.reason != UNREAD_TEXT for each in left_out):
        warn_once(f"{source}: {summary(left_out)}", stacklevel=3)


def with_templates(data: Any, templates: str | Path) -> Any:
    """The same images (labelled, or with several labels) with other prompts; `templates` as in `open_dataset`."""
    found = Found(data.name, data.images)
    prompts, templates_from = settle_templates(found, templates, data.classnames)
    return replace(data, templates=prompts, templates_from=templates_from)


def _read_source(
    source: str,
    split: str | None,
    columns: Columns,
    root: Path,
    download: bool,
    task: str | None,
    classnames: str | Path | None,
) -> Found:
    if source.startswith(TORCHVISION_PREFIX):
        columns.refuse(source, "a set of torchvision's", "label", "image", "group")
        return read_torchvision(source, root, split, download)
    location, path = hub_location(source), Path(source)
    if source.startswith(HUB_PREFIX):
        try:
            is_tars = bool(benchmark_splits(location, split))
        except ValueError:  # not on the hub; the library below reports why, or has a token for it
            is_tars = False
    else:
        is_tars = is_url(location) or is_shards(location) or (path.is_dir() and any(path.glob(f"*/{NUM_SHARDS_FILE}")))
    if not is_tars and (source.startswith(HUB_PREFIX) or is_datasets_folder(path)):
        return read_pairs(source, split, columns) if task == "retrieval" else read_datasets(source, split, columns)
    is_other = (path / INDEX_FILE).is_file() or any(path.glob(f"*/{NUM_SHARDS_FILE}"))
    parts = split_folders_of_tars(path) if path.is_dir() and not is_other else []
    if is_tars or parts:
        columns.refuse(source, "a set of shards", "label", "image")
        return read_tars_of_split(path, parts, split, task) if parts else read_tars(location, split, task)
    if task == "retrieval" and (path.exists() or is_pattern(source)):
        return read_pairs(source, split, columns)
    if _is_table(source):
        return read_labelled_table(path, columns, split)
    if path.is_dir():
        folders = read_class_folders(path, split, classnames)
        if isinstance(folders, Path):
            return read_table_in(folders, path, columns)
        columns.refuse(source, "a folder", "label", "image", "group")
        return folders
    if is_pattern(source):
        raise ValueError(f"data {source!r} is a pattern; patterns are for tars and Parquet files")
    tables = f"{', '.join(TABLE_SUFFIXES)}, .json, or .txt with an image and a number in each line"
    what = f"neither a folder per class, nor shards, nor a table ({tables})"
    raise ValueError(f"data {source!r} is {what if path.exists() else 'not there'}")


def _is_table(source: str) -> bool:
    """Whether a source is a table, or a folder or pattern of Parquet files."""
    path = Path(source)
    if path.is_dir():
        return is_parquet(path) and not image_files(path)
    if is_pattern(source):
        return source.endswith(".parquet") and bool(parquet_files(path))
    return path.is_file() and (
        table_suffix(path) in (*TABLE_SUFFIXES, ".json") or (table_suffix(path) == ".txt" and is_list_of_labels(path))
    )


def _groups(found: Found | EvaluationSet, group_column: str | None, source: str) -> tuple[str, ...]:
    if group_column is None:
        return tuple(map(str, range(len(found.images))))
    values = column_of(found.metadata, group_column, source)
    # An image without a value stands alone: those of unknown scenes are not of one scene.
    return tuple(f"none, {number}" if value is None else value for number, value in enumerate(values))
