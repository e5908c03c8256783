"""Sets in webdataset's tars: CLIP_benchmark's, and shards of ours."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ...common.files import cache_folder, locked
from ...common.processes import warn_once
from ...common.storage import (
    Stamp,
    check_scheme,
    exists,
    is_url,
    join,
    name_of,
    parent_of,
    read_bytes,
    split_query,
    stamps_of,
    without_secrets,
)
from ...common.wording import some
from ...data.indexing.index_tars import index_shards, tar_locations
from ...data.reading.arrow_column import ArrowColumn
from ...data.reading.cells import captions_in, captions_of_facts, decode_text
from ...data.reading.huggingface import HUB_PREFIX
from ...data.reading.json_tables import parse_json
from ...data.reading.scan import OTHER_SPLIT, LeftOut, summary
from ...data.reading.splits import choose_split, role_of, splits_named, splits_of_files
from ...data.shard_index import INDEX_FILE
from ...data.shards import Shards, facts_of
from .class_folders import in_split
from .folders_and_tables import FromEach, alike, label_in, warn_of_unknown
from .name_files import names_of, templates_of
from .sets import TASKS, Found, digest_lines

NUM_SHARDS_FILE = "nshards.txt"  # in each split of CLIP_benchmark's
_DAMAGED_CAPTIONS = "a .json that can't be read, and no captions elsewhere"
_SPLIT_NAMES = ("test", "val", "validation", "valid", "dev", "train")


# ---------------------------------------------------------------------------------------------------------------------
# Shards, and CLIP_benchmark's way to lay them out


def hub_location(source: str) -> str:
    """The address that a data set on Hugging Face's hub has its files at; any other source as it is."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if source.startswith(HUB_PREFIX):
        return f"{hub}/datasets/{source.removeprefix(HUB_PREFIX)}/resolve/main"
    page = re.fullmatch(f"(?i:{re.escape(hub)})" + r"/datasets/([\w.-]+/[\w.-]+)(/tree/main)?/?", source)
    path, query = split_query(source)
    return f"{hub}/datasets/{page[1]}/resolve/main" if page else path.rstrip("/") + query


def benchmark_splits(location: str, split: str | None) -> list[str]:
    """The splits of a set of CLIP_benchmark's, none if it is no such set."""
    names = dict.fromkeys([*([split] if split else []), *_SPLIT_NAMES])
    return [name for name in names if exists(join(location, f"{name}/{NUM_SHARDS_FILE}"))]


def read_tars(source: str, split: str | None, task: str | None) -> Found:
    """Shards with labels or captions, and what lies beside them."""
    check_scheme(source)
    name = set_name(source)
    if name_of(source).endswith(".tar"):
        return _read_pattern(source, split, task)
    splits = benchmark_splits(source, split)
    if not splits:
        if (tars_of := _tars_of_split(source, split)) is not None:
            tars, others = tars_of
            pattern = _pattern_of(source, tars)
            found = _read_shards(_open_shards(pattern, source), name, source, task, [source])
            left_out = [LeftOut(tar, OTHER_SPLIT) for tar in others]
            return replace(found, left_out=[*found.left_out, *left_out])
        part = join(source, split) if split else source
        if is_url(source) and not exists(join(part, INDEX_FILE)):
            raise ValueError(
                f"{source} is no set to evaluate on: there is neither {INDEX_FILE} (shards) nor "
                f"{split or 'test'}/{NUM_SHARDS_FILE} (CLIP_benchmark's sets). Name a pattern of tars as "
                f"{join(source, '{0..9}.tar')}, or look whether the address is right"
            )
        if not is_url(source):
            in_folder = in_split(Path(source), split)
            part = str(in_folder) if split else source
        is_indexed = exists(join(part, INDEX_FILE)) or not any(Path(part).glob("*.tar"))
        shards = Shards(part, needs_captions=False) if is_indexed else indexed(part)
        return _read_shards(shards, name, source, task, [part, source])
    chosen = choose_split(splits, split, source)
    pattern, beyond = numbered_tars(join(source, chosen))
    kind = (_text_at(source, "dataset_type.txt") or "classification").strip()
    if kind not in TASKS:
        raise ValueError(f"{source}/dataset_type.txt holds {kind[:50]!r}; known are {', '.join(TASKS)}")
    found = _read_shards(
        indexed(pattern), name, source, task or kind, [source], "zeroshot_classification_templates.txt"
    )
    return replace(found, left_out=[*found.left_out, *beyond])


def _read_pattern(source: str, split: str | None, task: str | None) -> Found:
    """The tars of a pattern; where some are of the split for training, or one is asked for, those of one split."""
    tars = tar_locations(source)
    above = parent_of(tars[0])
    while not all(tar.startswith(f"{above}/") for tar in tars) and parent_of(above) != above:
        above = parent_of(above)
    inside = [tar.removeprefix(f"{above}/") for tar in tars]
    has_query = bool(split_query(tars[0])[1])
    split_of = splits_of_files(Path(), map(Path, inside)) if tars[1:] and not has_query else {}
    parts = sorted(set(split_of.values()))
    pattern, left_out = source, []
    if splits_named(parts, split) and parts[1:] and (split or "train" in map(role_of, parts)):
        chosen = choose_split(parts, split, source)
        left_out = [LeftOut(name, OTHER_SPLIT) for name in inside if split_of[Path(name)] != chosen]
        pattern = _pattern_of(above, [name for name in inside if split_of[Path(name)] == chosen])
    elif split:
        raise ValueError(f"{source} names tars, so --split {split} can't be followed")
    folder = parent_of(pattern)
    above = folder if has_query else above
    found = _read_shards(_open_shards(pattern, folder), set_name(join(above, "0.tar")), source, task, [folder, above])
    return replace(found, left_out=[*found.left_out, *left_out])


def _open_shards(source: str, folder: str) -> Shards:
    """Shards by the index that lies in the folder, else by one in the cache."""
    return Shards(source, needs_captions=False) if exists(join(folder, INDEX_FILE)) else indexed(source)


def _pattern_of(folder: str, tars: Sequence[str]) -> str:
    """What names these tars of a folder, and no others."""
    stems = [tar.removesuffix(".tar") for tar in tars]
    return join(folder, f"{{{','.join(stems)}}}.tar" if len(tars) > 1 else tars[0])


def read_tars_of_split(source: Path, parts: Sequence[str], split: str | None, task: str | None) -> Found:
    """The tars of one split, of a folder whose folders `parts` are called so and hold them."""
    chosen = choose_split(parts, split, str(source))
    folder = str(source / chosen)
    found = _read_shards(_open_shards(folder, folder), set_name(str(source)), str(source), task, [folder, str(source)])
    others = [LeftOut(f"{part}/", f"beside {chosen}/, the split that is read") for part in parts if part != chosen]
    return replace(found, left_out=[*found.left_out, *others])


def numbered_tars(folder: str) -> tuple[str, list[LeftOut]]:
    """The pattern of the tars that CLIP_benchmark reads in a folder, as many as its `nshards.txt` says; and the others,
    of a folder here.

    Raises:
        ValueError: the file holds no number.
    """
    count = join(folder, NUM_SHARDS_FILE)
    text = read_bytes(count).decode("utf-8", "replace").strip()
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(f"{count} holds {text[:50]!r}; it must be the number of shards")
    own = {f"{number}.tar" for number in range(int(text))}
    others = [] if is_url(folder) else sorted(path.name for path in Path(folder).glob("*.tar") if path.name not in own)
    reason = f"a tar beyond the number in {NUM_SHARDS_FILE} ({int(text)})"
    return join(folder, f"{{0..{int(text) - 1}}}.tar"), [LeftOut(name, reason) for name in others]


def _tars_of_split(source: str, split: str | None) -> tuple[list[str], list[str]] | None:
    """The names of the tars of a split and of the others, of a folder or a URL whose tars tell of splits by their names
    as Parquet files do; None of any other, and where a folder of this split lies beside them.

    Raises:
        ValueError: no tar is of that split, or several may be meant.
    """
    if split and not is_url(source) and (Path(source) / split).is_dir():
        return None
    if exists(join(source, INDEX_FILE)):
        names = [entry.name for entry in Shards(source, needs_captions=False).entries]
    elif is_url(source) or not any(Path(source).glob("*.tar")):
        return None
    else:
        names = list(map(name_of, tar_locations(source)))
    split_of = {str(tar): part for tar, part in splits_of_files(Path(), map(Path, names)).items()}
    parts = sorted(set(split_of.values()))
    if not splits_named(parts, split):
        if not split:
            warn_of_unknown(source, parts)
        return None
    chosen = choose_split(parts, split, source)
    return [tar for tar in names if split_of[tar] == chosen], [tar for tar in names if split_of[tar] != chosen]


def set_name(source: str) -> str:
    if not is_url(source):
        path = Path(source)
        return (path.resolve().parent if source.endswith(".tar") else path.resolve()).name
    parts = [part for part in urlsplit(source).path.split("/") if part and not part.endswith(".tar")]
    while parts and parts[-1] in ("main", "resolve"):
        parts.pop()
    return parts[-1] if parts else urlsplit(without_secrets(source)).netloc


def _text_at(folder: str, name: str) -> str | None:
    """A text that may lie in a folder, here or remote."""
    location = join(folder, name)
    return decode_text(read_bytes(location), location) if exists(location) else None


def indexed(source: str, is_by_place: bool = False) -> Shards:
    """Shards that have no index: one is made in the cache, anew when they have changed. What is theirs stays as it is.

    Whether remote ones have changed is asked of their server, by one request for each. Where it can't be asked, or does
    not say, a warning says that the index that is kept is taken.

    Args:
        is_by_place: as that of `Shards`.

    Raises:
        ValueError: a tar is not there, or damaged; or no index is kept, and the server can't be asked.
    """
    tars, folder = tar_locations(source), cache_folder("indexes")
    of_names = digest_lines(tar if is_url(tar) else str(Path(tar).resolve()) for tar in tars)[:16]
    try:
        stamps = stamps_of(tars)
    except ValueError:
        kept = sorted(folder.glob(f"{of_names}-*/{INDEX_FILE}"), key=lambda path: path.stat().st_mtime_ns)
        if not kept:
            raise
        _warn_of_kept(source, kept[-1].parent, "the server can't be asked whether they have changed")
        return Shards(kept[-1].parent, needs_captions=False, locations=tars, is_by_place=is_by_place)
    out = folder / f"{of_names}-{digest_lines(map(repr, stamps))[:16]}"
    with locked(out.with_name(f"{out.name}.lock"), f"another process is indexing {without_secrets(source)}"):
        is_kept = (out / INDEX_FILE).is_file()
        if not is_kept:
            index_shards(source, out, overwrite=True, needs_all=True)  # replaces an interrupted one
    if is_kept and Stamp() in stamps:
        _warn_of_kept(source, out, "the server says neither the size nor the version of one")
    return Shards(out, needs_captions=False, locations=tars, is_by_place=is_by_place)


def _warn_of_kept(source: str, folder: Path, why: str) -> None:
    warn_once(
        f"{without_secrets(source)}: {why}, so the index that was made of these tars before is used; to make it anew, "
        f"delete {folder}",
        stacklevel=4,
    )


def _read_shards(
    shards: Shards, name: str, source: str, task: str | None, folders: Sequence[str], templates: str = "templates.txt"
) -> Found:
    keys = shards.names()
    members = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
    probed = _probes(len(shards))
    present = [kind for kind, member in members.items() if any(shards.read(n, member) for n in probed)]
    if "retrieval" not in present and any(captions_of(shards, n) for n in probed):
        present.append("retrieval")
    if not present:
        beside = f"; {told}" if (told := summary(shards.left_out)) else ""
        raise ValueError(
            f"{source} has neither labels (.cls, .npy) nor captions (.txt, .json) beside its images{beside}"
        )
    task = task or present[0]
    if task not in present:
        raise ValueError(f"{source} has no .{members[task]} beside its images, as {task} needs; it is for {present[0]}")
    identity = digest_lines(shards.checksums) if shards.checksums else None
    metadata, damaged = _groups_of(shards)
    left_out = [*shards.left_out, *damaged]
    found = Found(name, images_of(shards), keys, metadata, identity=identity, left_out=left_out)
    if task == "retrieval":
        captions = tuple(captions_of(shards, n) for n in range(len(shards)))
        return _without_damaged(replace(found, captions=captions), {each.source for each in damaged}, source)
    names = next((text for folder in folders if (text := _text_at(folder, "classnames.txt")) is not None), None)
    classnames = None if names is None else names_of(names, f"{source}/classnames.txt")
    wordings = next((text for folder in folders if (text := _text_at(folder, templates)) is not None), None)
    labels: list[Any]
    if task == "classification":
        labels = [
            label_in(decode_text(shards.read(n, "cls"), f"the label of {key}"), key) for n, key in enumerate(keys)
        ]
        if any(isinstance(label, list) for label in labels):
            raise ValueError(f"{source} has lists in its .cls; several labels of an image are zeros and ones in a .npy")
        labels = alike(labels, source)
    else:
        labels = [_hot_labels(shards.read(n, "npy"), classnames, key) for n, key in enumerate(keys)]
    return replace(
        found,
        labels=labels,
        labels_from=f".{members[task]} of the shards",
        are_cells=True,
        classnames=classnames,
        classnames_from="" if classnames is None else "classnames.txt of the data",
        templates=None if wordings is None else partial(templates_of, wordings, f"{source}/{templates}"),
        templates_from=f"{templates} of the data",
    )


def _without_damaged(found: Found, damaged: set[str], source: str) -> Found:
    """Without the images that have captions in a damaged `.json` at most.

    Args:
        damaged: the keys of the samples with such a `.json`.

    Raises:
        ValueError: another image has no caption, or none is left.
    """
    keys = found.keys or ()
    bare = {index for index, texts in enumerate(found.captions) if not texts}
    lost = {index for index in bare if keys[index] in damaged}
    if named := [keys[index] for index in sorted(bare - lost)]:
        raise ValueError(f"{source}: {len(named)} of {len(keys)} images have no caption: {some(named)}")
    kept = [index for index in range(len(keys)) if index not in lost]
    if not kept:
        raise ValueError(f"{source} holds no images with captions" + (f": {_DAMAGED_CAPTIONS}" if lost else ""))
    if not lost:
        return found
    without = {keys[index] for index in lost}
    return replace(
        found,
        images=FromEach(kept, found.images.__getitem__),
        keys=[keys[index] for index in kept],
        metadata={name: [values[index] for index in kept] for name, values in found.metadata.items()},
        captions=tuple(found.captions[index] for index in kept),
        identity=None if found.identity is None else digest_lines([found.identity, *map(str, kept)]),
        left_out=[
            replace(each, reason=_DAMAGED_CAPTIONS) if each.source in without else each for each in found.left_out
        ],
    )


def images_of(shards: Shards) -> Sequence[bytes | None]:
    """The images of shards, read when they are asked for, None of a sample without one; a sample's text and facts,
    damaged or not, are not read."""
    return FromEach(range(len(shards)), partial(_image_of, shards))


def _image_of(shards: Shards, index: int) -> bytes | None:
    return shards.read(index, "image") or None


def captions_of(shards: Shards, index: int) -> tuple[str, ...]:
    """The captions of a sample, from its text or its `.json`, without reading its image.

    Raises:
        ValueError: the text is not UTF-8, or no caption.
    """
    try:
        if captions := captions_in(decode_text(shards.read(index, "txt"), "its text")):
            return tuple(captions)
    except ValueError as error:
        raise ValueError(f"{shards.name(index)}: {error}") from error
    try:
        return tuple(captions_of_facts(parse_json(shards.read(index, "json") or b"{}")))
    except ValueError:  # JSON that is damaged, or has no captions
        return ()


def _probes(count: int) -> list[int]:
    """Some indices below `count`, spread evenly."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, 10))})


def shard_columns(shards: Shards) -> tuple[dict[str, Sequence[Any]], list[LeftOut]]:
    """The entries of the samples' `.json`, and their `.cls`, N values under each name: None where a sample has no such
    entry, or a `.json` that can't be read, which is told. Without any `.json`, tars are read when values are asked for.
    """
    if not shards.holds("json"):
        return ({"cls": _cls_column(shards)} if shards.holds("cls") else {}), []
    facts, damaged = [], []
    for number in range(len(shards)):
        own = {kind: shards.read(number, kind) for kind in ("json", "cls")}
        try:
            facts.append(facts_of(own.__getitem__))
        except ValueError:
            facts.append(facts_of((own | {"json": b""}).__getitem__))
            damaged.append(LeftOut(shards.name(number), "a .json that can't be read, so its columns have no value"))
    names = dict.fromkeys(name for each in facts for name in each)
    return {name: [each.get(name) for each in facts] for name in names}, damaged


def _cls_column(shards: Shards) -> ArrowColumn:
    import pyarrow as pa

    return ArrowColumn([_ClsColumn(shards)], pa.string())


@dataclass(frozen=True)
class _ClsColumn:
    """The `.cls` of shards without any `.json`, as texts."""

    shards: Shards

    def __len__(self) -> int:
        return len(self.shards)

    def identity(self) -> str:
        return digest_lines(self.shards.checksums or map(str, self.take(range(len(self)))))

    def take(self, indices: Sequence[int]) -> Any:
        import pyarrow as pa

        facts = [facts_of(partial(self.shards.read, index)) for index in indices]
        return pa.chunked_array([pa.array([each.get("cls") for each in facts], pa.string())])


def _groups_of(shards: Shards) -> tuple[dict[str, Sequence[Any]], list[LeftOut]]:
    """What groups images: entries of their `.json` of one value, which lists and mappings aren't; not the labels. And
    what `shard_columns` tells."""
    if not shards.holds("json"):
        return {}, []
    metadata, damaged = shard_columns(shards)
    kept = {name for name, values in metadata.items() if any(isinstance(v, str | int | float) for v in values)}
    return {name: values for name, values in metadata.items() if name in kept - {"cls"}}, damaged


def _hot_labels(data: bytes, classnames: tuple[str, ...] | None, key: str) -> list[str]:
    """The indices of the classes that an array of zeros and ones has ones for."""
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:  # its header may name any shape
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
