"""Captions in one JSON file, in any of the shapes that they are handed out in -> columns and rows.

| shape                                                      | as in                             |
|------------------------------------------------------------|-----------------------------------|
| images and annotations with image_id and caption           | COCO's captions                   |
| images, each with sentences of raw texts, perhaps a split  | Karpathy's splits                 |
| a list of records; or a mapping that holds one such list   | ALBEF's, BLIP's, LLaVA's files    |
| one record a line                                          | JSON Lines that are called .json  |
| {file: caption}, {file: [captions]}, {file: record}        | own scripts                       |
| {column: [values]}, {column: {index: value}}, split        | pandas' to_json                   |
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cells import CAPTION_COLUMNS, IMAGE_COLUMNS, NUMBERED_CAPTION, names_picture
from .scan import LeftOut

Records = list[dict[str, Any]]
_KARPATHYS_OWN = ("filepath", "filename", "file_name", "sentences", "sentids")  # the rest is facts


class RepeatedNameError(ValueError):
    """A name comes twice in one object of JSON, of which `json.loads` keeps the last without a word."""


def parse_json(text: str | bytes) -> Any:
    """`json.loads`, which loses nothing.

    Raises:
        ValueError: no JSON, one that is nested too deeply, or a `RepeatedNameError`.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for number, name in enumerate(names) if name in names[:number])
        raise RepeatedNameError(f"{repeated[:60]!r} comes twice in one object, which holds one value for each name")
    return found


def read_json(path: Path, text: str) -> tuple[list[str], Records, list[LeftOut]]:
    """Columns, rows, and what is left out.

    Raises:
        ValueError: no JSON, or none of the shapes above.
    """
    try:
        values = _parse_text_or_lines(text)
    except RepeatedNameError as error:
        raise ValueError(f"{path}: {error}; a list of values can hold several") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {_SHAPES}") from error
    left_out: list[LeftOut] = []
    rows: Records | None = None
    if isinstance(values, Mapping):
        images: Any = values.get("images")
        annotations = values.get("annotations")
        if _are_records(images) and any("sentences" in image for image in images):
            rows = _karpathys(images)
        elif _are_records(images) and isinstance(annotations, list):
            rows, left_out = _cocos(path, images, annotations)
        else:
            rows = _of_mapping(values)
    elif _are_records(values):
        rows = [dict(row) for row in values]
    if not rows:
        raise ValueError(f"{path} holds {_what_it_is(values)}; {_SHAPES}")
    return list(dict.fromkeys(name for row in rows for name in row)), rows, left_out


_SHAPES = (
    "captions in JSON are a list of records ([{\"image\": …, \"caption\": …}, …]), a mapping {file: caption}, columns, "
    "COCO's (images with id and file_name, annotations with image_id and caption) or Karpathy's (images with filename "
    "and sentences)"
)  # fmt: skip


def _parse_text_or_lines(text: str) -> Any:
    try:
        return parse_json(text)
    except RepeatedNameError:
        raise
    except ValueError:
        rows = _parse_lines(text)
        if rows is None:
            raise
        return rows


def _parse_lines(text: str) -> Records | None:
    try:
        rows = [parse_json(line) for line in text.split("\n") if line.strip()]
    except RepeatedNameError:
        raise
    except ValueError:
        return None
    return rows if _are_records(rows) else None


def _are_records(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(isinstance(value, dict) for value in values)


def _what_it_is(values: Any) -> str:
    if isinstance(values, Mapping):
        keys = ", ".join(repr(str(key)[:40]) for key in list(values)[:6])
        return f"a mapping of {keys}{', …' if len(values) > 6 else ''}" if values else "an empty mapping"
    if isinstance(values, list):
        kinds = ", ".join(sorted({type(value).__name__ for value in values[:100]}))
        return f"a list of {kinds}" if values else "an empty list"
    return f"a value of type {type(values).__name__}"


def _of_mapping(values: Mapping[str, Any]) -> Records | None:
    lists = {name: value for name, value in values.items() if isinstance(value, list)}
    columns, data = values.get("columns"), values.get("data")  # pandas' split
    if _are_texts(columns) and isinstance(data, list) and all(isinstance(row, list) for row in data):
        return [dict(zip(columns or (), row, strict=False)) for row in data]
    if values and len(lists) == len(values) and _are_columns(lists):
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    records = [value for value in lists.values() if _are_records(value)]
    if len(records) == 1:
        return [dict(row) for row in records[0]]
    mappings = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    if mappings and len(mappings) == len(values):
        by_name = _by_index(mappings) if _are_columns_of_indices(mappings) else mappings
        return [{"file": name, **record} for name, record in by_name.items()]
    if any(values.values()) and all(_are_captions(value) for value in values.values()):
        return [{"file": name, "captions": value} for name, value in values.items()]
    return None


def _by_index(columns: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    indices = dict.fromkeys(index for column in columns.values() for index in column)
    return {index: {name: column.get(index) for name, column in columns.items()} for index in indices}


def _are_columns_of_indices(mappings: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether this is {column: {index: value}}, by the names of columns or by indices; {file: record} has mappings as
    well."""
    are_indices = all(_is_number(name) or names_picture(name) for each in mappings.values() for name in each)
    return any(map(_is_column, mappings)) or (are_indices and not any(map(names_picture, mappings)))


def _are_columns(lists: Mapping[str, list[Any]]) -> bool:
    """Lists of one length are columns if one is called so; {file: [captions]} has lists as well."""
    return len({len(each) for each in lists.values()}) == 1 and any(map(_is_column, lists))


def _is_column(name: str) -> bool:
    known = name.strip().lower()
    return known in (*IMAGE_COLUMNS, *CAPTION_COLUMNS) or NUMBERED_CAPTION.fullmatch(known) is not None


def _is_number(name: str) -> bool:
    return re.fullmatch(r"0|[1-9]\d*", name) is not None


def _are_captions(value: Any) -> bool:
    """A text, or a list of texts; none of a picture whose caption is missing."""
    return all(text is None or isinstance(text, str) for text in (value if isinstance(value, list) else [value]))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _cocos(path: Path, images: Records, annotations: list[Any]) -> tuple[Records, list[LeftOut]]:
    """COCO's captions as rows of file name and captions.

    Raises:
        ValueError: entries are missing, or two images have one id, as in files that were put together.
    """
    captions: dict[str, list[Any]] = {_coco_id(image.get("id")): [] for image in images}
    left_out = []
    try:
        _refuse_shared_ids(path, images)
        for annotation in annotations:
            image_id = _coco_id(annotation["image_id"])
            name = f"annotation {annotation.get('id', '')} of image {image_id}: {annotation['caption']!s:.80}"
            if image_id not in captions:
                left_out.append(LeftOut(name, "a caption of an image that is not listed"))
            elif isinstance(annotation["caption"], str | None) and not (annotation["caption"] or "").strip():
                left_out.append(LeftOut(name, "a caption without text"))
            else:
                captions[image_id].append(annotation["caption"])
        rows = [
            {"file_name": image["file_name"], "captions": captions[_coco_id(image.get("id"))], "id": image.get("id")}
            for image in images
        ]
    except (KeyError, TypeError, AttributeError) as error:
        held = ", ".join(map(str, annotations[0])) if _are_records(annotations) else "nothing"
        raise ValueError(
            f"{path} holds no captions as COCO's do (images with id and file_name, annotations with image_id and "
            f"caption): its annotations hold {held}, and {error} is missing"
        ) from error
    return rows, left_out


def _coco_id(value: Any) -> str:
    """Equal for ids that programs write as 7, 7.0 and "7"."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _refuse_shared_ids(path: Path, images: Records) -> None:
    names: dict[str, str] = {}
    for image in images:
        first = names.setdefault(_coco_id(image.get("id")), image["file_name"])
        if first != image["file_name"]:
            raise ValueError(
                f"{path}: the images {first!r} and {image['file_name']!r} have one id, {image.get('id')!r}, so whose "
                "a caption is can't be known; give each image an id of its own, or read the files one by one"
            )


def _karpathys(images: Records) -> Records:
    """Karpathy's splits of Flickr8k, Flickr30k and COCO; the column `split` is among the facts of each image."""
    rows = []
    for image in images:
        folder, name = image.get("filepath", ""), image.get("filename", image.get("file_name", ""))
        captions = [text.get("raw", text.get("caption")) if isinstance(text, Mapping) else text
                    for text in image.get("sentences", [])]  # fmt: skip
        others = {key: value for key, value in image.items() if key not in _KARPATHYS_OWN}
        rows.append({"file_name": f"{folder}/{name}" if folder else name, "captions": captions, **others})
    return rows
