"""Files that hold tensors or settings: safetensors, what torch.save wrote, either in shards, JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors

from ..common.files import atomic_write
from .layouts import Tensors
from .pickles import read_pickle
from .unwrap import unwrap

_PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml", b"<!--")


def refuse_stand_ins(path: Path) -> None:
    """Raises a ValueError for what people find in place of a file: nothing, a pointer of Git LFS, a web page."""
    with open(path, "rb") as file:
        start = file.read(512)
    kinds = {".safetensors": "damaged or no safetensors file", ".json": "not JSON"}
    kind = kinds.get(path.suffix, "not a checkpoint")
    if not start:
        raise ValueError(f"{path} is {kind}: the file is empty, so a download or copy was broken off")
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is {kind}: it is a pointer of Git LFS to the file; `git lfs pull` in its repository fetches the "
            "file itself"
        )
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        raise ValueError(
            f"{path} is {kind}: it is a web page (HTML), as servers send in place of a file that needs a login or has "
            "another address"
        )


def read_safetensors(path: Path) -> Tensors:
    """As they are, under the names in the file."""
    refuse_stand_ins(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """Writes tensors, whole or not at all."""
    with atomic_write(path) as file:
        file.write(save_safetensors(tensors, metadata={"format": "pt"}))


def read_tensors(path: Path) -> Tensors:
    """A model's tensors, without what trainers put around them; of a file that is there whole or in shards."""
    index = Path(f"{path}.index.json")
    if path.is_file() or not index.is_file():
        return unwrap(_read_one(path), str(path))
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
        raise ValueError(f"{index} has no weight_map of tensors to files")
    tensors: Tensors = {}
    for part in sorted(set(parts.values())):
        if Path(part).name != part or not (path.parent / part).is_file():
            raise ValueError(f"{index} names the file {part!r}, which is not in {path.parent}")
        values = _read_one(path.parent / part)
        if not isinstance(values, dict):
            raise ValueError(f"{path.parent / part} holds a {type(values).__name__}, not tensors by their names")
        tensors |= values
    return unwrap(tensors, str(path))


def _read_one(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    refuse_stand_ins(path)
    return read_pickle(path)


def read_json(path: Path) -> dict[str, Any]:
    refuse_stand_ins(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; it must be a mapping of names to values")
    return values
