"""What can be evaluated on: labelled images with the names of their classes and the prompts for them.

    DATA/                      a folder per class: DATA/tabby_cat/1.jpg, DATA/tiger/2.png, …
    DATA.csv or DATA.tsv       a table with columns for the image path and the label (a name, or a number)

Names and prompts that belong to the data lie with it and are used unless others are asked for:
`classnames.txt` (one a line, in label order) and `templates.txt` in the folder, or `DATA.classnames.txt` and
`DATA.templates.txt` beside the table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .prompts import TEMPLATE_SETS, imagenet_classnames, read_lines, template_set
from .sources import IMAGE_COLUMNS, find_column, image_files, read_table
from .transforms import open_image

LABEL_COLUMNS = ("label", "class", "target", "classname", "category")


@dataclass(frozen=True)
class LabelledImages:
    """N images of C classes.

    Args:
        name: for reports.
        paths: N image files.
        labels: N numbers, 0 to C - 1.
        classnames: C names, as they go into the prompts.
        templates: the prompts' wordings.
        groups: N values; images of one value are not independent of each other (views of one scene, scans of one
            hand) and are drawn together when an interval is resampled. By default every image for itself.
    """

    name: str
    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, number: int) -> Image.Image:
        """The decoded image.

        Raises:
            ValueError: it can't be read; names the file.
        """
        path = self.paths[number]
        try:
            return open_image(path.read_bytes(), str(path))
        except OSError as error:
            raise ValueError(f"{path} can't be read: {error}") from error


def open_dataset(
    source: str | Path,
    classnames: str | Path | None = None,
    templates: str | Path | None = None,
    group_column: str | None = None,
) -> LabelledImages:
    """Opens a folder per class, or a labelled table.

    Args:
        classnames: "imagenet" or a file of one name a line, in label order; by default the data's own.
        templates: a built-in set ("simple", "imagenet7", "imagenet80") or a file of one a line; by default the data's
            own, else "simple".
        group_column: the table's column that tells which images belong together.

    Raises:
        ValueError: no such data, nothing in it, or names that do not match the labels.
    """
    source = Path(source)
    if source.is_dir():
        if group_column:
            raise ValueError(f"{source} is a folder and has no columns; a group column needs a table")
        paths, raw = _read_class_folders(source)
        groups = [str(path) for path in paths]
        beside = {kind: source / f"{kind}.txt" for kind in ("classnames", "templates")}
    elif source.is_file() and source.suffix.lower() in (".csv", ".tsv"):
        paths, raw, groups = _read_labelled_table(source, group_column)
        beside = {kind: source.with_suffix(f".{kind}.txt") for kind in ("classnames", "templates")}
    else:
        what = "neither a folder per class nor a .csv or .tsv table" if source.exists() else "not there"
        raise ValueError(f"data {str(source)!r} is {what}")
    if classnames is None and beside["classnames"].is_file():
        classnames = beside["classnames"]
    if templates is None:
        templates = beside["templates"] if beside["templates"].is_file() else "simple"
    labels, names = _number_labels(raw, _names(classnames), source)
    if str(templates) in TEMPLATE_SETS:
        prompts = template_set(str(templates))
    elif Path(templates).is_file():
        prompts = tuple(read_lines(templates))
    else:
        raise ValueError(f"templates {str(templates)!r} is no file and none of the sets {', '.join(TEMPLATE_SETS)}")
    name = source.resolve().name if source.is_dir() else source.stem
    return LabelledImages(name, tuple(paths), labels, names, prompts, tuple(groups))


def _names(classnames: str | Path | None) -> tuple[str, ...] | None:
    if classnames is None:
        return None
    return imagenet_classnames() if str(classnames) == "imagenet" else tuple(read_lines(classnames))


def _read_class_folders(folder: Path) -> tuple[list[Path], list[str]]:
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder} has no classes: it must hold one folder of images for each class")
    paths, labels = [], []
    for class_folder in classes:
        for path in image_files(class_folder):
            paths.append(path)
            labels.append(class_folder.name)
    if not paths:
        raise ValueError(f"{folder} has {len(classes)} class folders and no image in any of them")
    empty = [path.name for path in classes if path.name not in set(labels)]
    if empty:
        raise ValueError(f"{folder} has class folders without images: {', '.join(empty[:10])}")
    return paths, labels


def _read_labelled_table(path: Path, group_column: str | None) -> tuple[list[Path], list[str], list[str]]:
    columns, rows = read_table(path)
    image_column = find_column(columns, IMAGE_COLUMNS, "the image paths", path)
    label_column = find_column(columns, LABEL_COLUMNS, "the labels", path)
    if group_column is not None and group_column not in columns:
        raise ValueError(f"{path} has no column {group_column!r}; its columns are {', '.join(columns)}")
    if not rows:
        raise ValueError(f"{path} has columns and no rows")
    paths = [path.parent / row[image_column] for row in rows]
    labels = [row[label_column].strip() for row in rows]
    for number, label in enumerate(labels):
        if not label:
            raise ValueError(f"{path}: row {number + 1} ({rows[number][image_column]}) has no label")
    return paths, labels, [row[group_column] if group_column else str(number) for number, row in enumerate(rows)]


def _spoken(name: str) -> str:
    """One spelling for folder names and lists of names: tiger_cat, Tiger cat."""
    return name.replace("_", " ").casefold()


def _number_labels(
    raw: Sequence[str], names: tuple[str, ...] | None, source: Path
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Labels as numbers, and the class names in that order.

    Labels are numbers already, or names: of the list if there is one, else sorted. An underscore in a label's name
    is read as the space that folder names often lack.
    """
    spoken_names = None if names is None else tuple(_spoken(name) for name in names)
    are_numbers = all(label.isascii() and label.isdigit() for label in raw)
    if are_numbers and names is not None:
        labels = tuple(int(label) for label in raw)
        if max(labels) >= len(names):
            raise ValueError(f"{source} has labels up to {max(labels)}, but there are {len(names)} class names")
        return labels, names
    found = sorted(set(raw))
    spoken = {label: _spoken(label) for label in found}
    if names is None or spoken_names is None:
        return tuple(found.index(label) for label in raw), tuple(label.replace("_", " ") for label in found)
    unknown = [label for label in found if spoken[label] not in spoken_names]
    if not unknown:
        if len(set(spoken_names)) < len(spoken_names):
            raise ValueError(f"the class names hold duplicates, so {source} must give labels as numbers")
        return tuple(spoken_names.index(spoken[label]) for label in raw), names
    # Keys of their own, such as WordNet's n01440764: the names are in the keys' order.
    if len(unknown) == len(found) == len(names) and all(re.fullmatch(r"[A-Za-z]?\d+", label) for label in found):
        return tuple(found.index(label) for label in raw), names
    raise ValueError(
        f"{source} has {len(found)} classes and there are {len(names)} class names; these labels are none of them: "
        f"{', '.join(map(repr, unknown[:5]))}"
    )
