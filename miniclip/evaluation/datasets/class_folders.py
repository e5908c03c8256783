"""A folder of images for each class, as torchvision's ImageFolder reads it, linked folders too.

Every file of the folder is an image of a class, holds names or prompts, or is counted in `left_out` with the reason.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...common.wording import some
from ...data.reading.scan import TABLE_SUFFIXES, LeftOut, Scan, is_skipped_folder, scan, summary
from ...data.reading.splits import choose_split, different_splits, role_of, same_parts
from .name_files import spoken
from .names import settle_names
from .sets import Found

UNREAD_TEXT = "a text, where pictures alone are read"
NONE = "none of these"  # what classify calls a picture below the threshold, and the folder that it sorts those into


def in_split(folder: Path, split: str | None) -> Path:
    """The folder of the part that is asked for; by default of the one to evaluate on, where parts lie above classes, or
    that part alone.

    Raises:
        ValueError: there is no such folder, several may be meant, or the one to evaluate on has other folders than the
            other parts, as those of unknown labels are called.
    """
    there = _folders_in(folder)
    names = [path.name for path in there]
    if split is not None:
        same = [split] if split in names else same_parts(names, split)
        if len(same) != 1:
            raise ValueError(f"{folder} has no folder for the split {split!r}; it has {some(names) or 'none'}")
        return folder / same[0]
    is_one = len(names) == 1 and role_of(names[0]) in ("test", "val")
    parts = names if is_one else different_splits(names)
    if not parts:
        return folder
    inner = {path.name: {each.name for each in _folders_in(path)} for path in there}
    chosen = choose_split(parts, None, str(folder))
    others = {name: inner[name] for name in parts if name != chosen and inner[name]}
    classes = inner[chosen]
    no_parts = [path for path in there if path.name not in parts and not (inner[path.name] or {""}) <= classes]
    if not classes or any(scan(path).images for path in no_parts):  # which may be classes
        return folder
    if others and all(map(classes.isdisjoint, others.values())):
        other = min(others, key=lambda name: role_of(name) == "train")
        raise ValueError(
            f"{folder / chosen} has the folders {some(sorted(classes))}, and {folder / other} has "
            f"{some(sorted(others[other]))}; which are the classes can't be known: choose with --split {other} or "
            f"--split {chosen}"
        )
    return folder / chosen


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_skipped_folder(path.name))


def read_class_folders(source: Path, split: str | None, classnames: str | Path | None = None) -> Found | Path:
    """Or the table that has the labels, if pictures lie beside one as Hugging Face's `imagefolder` has them.

    Args:
        classnames: as in `open_dataset`; names have to be those of the folders, or as many as numbered folders. The
            folder "none of these" is a class if they, or the data's own, have it.

    Raises:
        ValueError: no image of any class, a class without one, or folders that are no classes.
    """
    folder = in_split(source, split)
    below = scan(folder)
    folders = _folders_in(folder)
    if table := _table_of_split(below, folders) or (None if folders else _table_in(below, folder)):
        if table.parent != folder and role_of(table.parent.name) == "train":
            raise ValueError(
                f"{folder} has a table of its pictures, and no folder for each class: name {table} as DATA"
            )
        return table
    beside = beside_folder(folder, source)
    labels = [path.name for path in folders if path.name != NONE]
    settled = settle_names(Found(source.name, (), labels=labels, beside=beside), classnames, str(source))
    names = settled.class_labels or settled.classnames
    is_listed = spoken(NONE) in map(spoken, names or ())
    classes = [path for path in folders if path.name != NONE or is_listed]
    if not classes:
        has = f"it holds {len(below.images)} images directly" if below.images else "it holds neither folders nor images"
        has = f"{folders[0].name!r} is classify's folder of what is none of them" if folders else has
        raise ValueError(
            f"{folder} has no classes: it must hold one folder of images for each class, and {has}. If their labels "
            "are in a table (.csv, .tsv, .jsonl, .json, .parquet), name that"
        )
    images: dict[Path, list[Path]] = {path: [] for path in classes}
    for path in below.images:
        if (top := folder / path.relative_to(folder).parts[0]) in images:
            images[top].append(path)
    left_out = _left_out(below, images, {path for paths in beside.values() for path in paths})
    if split is None and folder != source:
        others = [path.name for path in _folders_in(source) if path != folder]
        left_out = (
            *left_out,
            *(LeftOut(f"{name}/", f"beside {folder.name}/, the split that is read") for name in others),
        )
    if not any(images.values()):
        holds = f": {summary(left_out)}" if left_out else ""
        if tars := [path for path in classes if any(path.glob("*.tar"))]:
            listed = beside["classnames"][0]
            by_list = f", with --classnames {listed}" if listed.is_file() else ""
            holds += f". If the tars are shards, name the folder of one part: {_to_evaluate(tars)}{by_list}"
        raise ValueError(f"{folder} has {len(classes)} class folders and no image in any of them{holds}")
    _refuse_other_level(folder, images)
    _refuse_equal_folders(folder, images, names, beside["classnames"][0])
    if empty := [path.name for path in classes if not images[path]]:
        there = [each for each in left_out if each.source.split("/")[0] in empty]
        raise ValueError(
            f"{folder} has class folders without images: {some(empty)}" + (f"; {summary(there)}" if there else "")
        )
    return Found(
        source.resolve().name,
        tuple(path for each in images.values() for path in each),
        labels=[name for path, each in images.items() for name in [_class_name(path)] * len(each)],
        labels_from="the names of the folders" + (f" in {folder.name}/" if folder != source else ""),
        beside=beside,
        left_out=left_out,
    )


def _table_of_split(below: Scan, folders: Sequence[Path]) -> Path | None:
    """That of the split to evaluate on, where splits' pictures lie right in their folders, each with a table."""
    tables = {path.parent for path in below.others if _is_metadata(path)}
    splits = [path for path in folders if path in tables and role_of(path.name)]
    return _table_in(below, _to_evaluate(splits)) if splits else None


def _table_in(below: Scan, folder: Path) -> Path | None:
    return next((path for path in below.others if path.parent == folder and _is_metadata(path)), None)


def _is_metadata(path: Path) -> bool:
    return path.stem.lower() == "metadata" and path.suffix.lower() in TABLE_SUFFIXES


def split_folders_of_tars(folder: Path) -> list[str]:
    """The names of the folders of splits that tars lie in, of a folder without tars and pictures of its own."""
    found = [path.name for path in _folders_in(folder) if role_of(path.name) and any(path.glob("*.tar"))]
    is_above = bool(found) and not any(folder.glob("*.tar")) and not scan(folder).images
    return found if is_above else []


def _to_evaluate(folders: Sequence[Path]) -> Path:
    """That of the test split, else the first that is not for training."""
    rank = {"test": 0, "val": 1, "": 2, "train": 3}
    return min(folders, key=lambda path: rank[role_of(path.name)])


def _class_name(folder: Path) -> str:
    """The folder's name as text, though the system's encoding may be ASCII."""
    name = os.fsencode(folder.name)
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the class folder {name!r} in {folder.parent} has a name that is not UTF-8, so the class has no word; "
            "rename it (`convmv` does for many)"
        ) from error


def beside_folder(*folders: Path) -> dict[str, list[Path]]:
    """The files that may hold names and prompts, those that count first."""
    return {
        "classnames": [folder / "classnames.txt" for folder in folders],
        "templates": [folder / f"templates.{suffix}" for folder in folders for suffix in ("txt", "json")],
    }


def left_out_of_bare(below: Scan) -> tuple[LeftOut, ...]:
    """What is left out of a folder of images whose labels don't matter."""
    return (*below.left_out, *_texts(below.texts), *below.unread(below.others))


def _left_out(below: Scan, images: Mapping[Path, list[Path]], used: set[Path]) -> tuple[LeftOut, ...]:
    taken = {path for each in images.values() for path in each}
    of_no_class = [path.relative_to(below.folder) for path in below.images if path not in taken]
    direct = [
        LeftOut(str(path), "an image beside the class folders, of no class")
        for path in of_no_class
        if len(path.parts) == 1
    ]
    if count := len(of_no_class) - len(direct):
        direct.append(
            LeftOut(f"{NONE}/", "in classify's folder of what is none of the classes, which --outside reads", count)
        )
    texts = _texts(path for path in below.texts if path not in used)
    return (*below.left_out, *direct, *texts, *below.unread(set(below.others) - used))


def _texts(paths: Iterable[Path]) -> list[LeftOut]:
    """Texts by their suffix: captions beside the images of a class are many, and none of them is missed."""
    counts = Counter(path.suffix.lower() for path in paths)
    return [LeftOut(f"*{suffix}", UNREAD_TEXT, count) for suffix, count in sorted(counts.items())]


def _refuse_other_level(folder: Path, images: Mapping[Path, list[Path]]) -> None:
    """A folder that holds the folder per class, or one for each split, is named instead by mistake."""
    names = [path.name for path in images]
    is_class = any(path.parent in images for each in images.values() for path in each)  # images lie right in it
    splits = different_splits(names) or ([] if is_class or not all(map(role_of, names)) else names)
    if splits:
        raise ValueError(
            f"{folder} holds the splits {', '.join(splits)}, not the classes; choose one with --split, or name "
            f"{folder / splits[0]}"
        )
    if is_class:
        return
    if len(images) == 1:
        (only,) = images
        inner = sorted({path.relative_to(only).parts[0] for path in images[only]})
        raise ValueError(
            f"{folder} has one class folder, {only.name!r}, which holds no image but the folders {some(inner)}. "
            f"If those are the classes, name {only}"
        )


def _refuse_equal_folders(
    folder: Path, images: Mapping[Path, list[Path]], names: Sequence[str] | None, file: Path
) -> None:
    """Folds, cameras or masks that hold the same classes each. Sub-folders of splits, and those that are numbered from
    1 as subjects are, may well be equal in all classes.

    Args:
        names: says that folders called so are the classes; or numbered ones, if they are as many, and the folders
            within may not be called so just as well.
        file: where names may be listed.
    """
    tops = [path.name for path in images]
    are_numbers = all(map(str.isdigit, tops))
    if names is not None and not are_numbers:
        return
    inner = [{path.relative_to(top).parts[0] for path in paths if path.parent != top} for top, paths in images.items()]
    is_class = any(path.parent == top for top, paths in images.items() for path in paths)
    shared = set.intersection(*inner)
    is_usual = all(role_of(name) or (name.isdigit() and int(name)) for name in shared)
    if is_class or is_usual or len(shared) < 2 or 2 * len(shared) < len(set.union(*inner)):
        return
    are_inner_numbers = all(map(str.isdigit, shared))
    may_be_inner = are_inner_numbers and len(set.union(*inner)) == len(tops)
    if names is not None:
        may_be_inner |= set(map(spoken, shared)) <= set(map(spoken, names))
        if len(names) == len(tops) and not may_be_inner:
            return
    listed = f"list them with --classnames or in {file}"
    if are_numbers:
        by_list = f", or list the names of all {len(tops)} with --classnames or in {file}"
        listed = "call the folders by their names" + ("" if may_be_inner else by_list)
    raise ValueError(
        f"{folder} has the folders {some(tops)}, which hold no image, but folders of the same names: "
        f"{some(sorted(shared))}. If those are the classes, choose one of the others with --split {tops[0]}, or name "
        f"{folder / tops[0]}. If {some(tops, 2)} are the classes, {listed}"
    )
