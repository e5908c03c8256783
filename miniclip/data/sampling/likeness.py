"""What hard negatives are composed by: embeddings that `miniclip embed` wrote, or the groups that samples name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np

from ...common.arguments import FLOAT32
from ...common.processes import warn_once
from ...common.storage import is_url, name_of
from ...common.wording import reason_of
from ..pairs import group_id, hash64
from ..reading.cells import words_for_no_value
from ..shards import ShardEntry, Shards, sample_names, split_sample_name, tar_names
from .negatives import Groups, Neighbours, quantised

_MANIFEST = "_manifest.json"


def groups_in(shards: Shards, name: str) -> Groups:
    """Groups by a field of the samples' `.json`, or "cls"; read shard by shard, when a pool first needs them.

    Raises:
        ValueError: when a sample is asked for whose `.json` has no such field.
    """
    starts = np.cumsum(shards.counts) - shards.counts
    known: dict[int, np.ndarray] = {}

    def group_of(samples: np.ndarray) -> np.ndarray:
        shard_of = np.searchsorted(starts, samples, side="right") - 1
        groups = np.empty(len(samples), dtype=np.int64)
        for shard in np.unique(shard_of):
            if shard not in known:
                known[shard] = np.array(
                    [_group(shards, n, name) for n in range(starts[shard], starts[shard] + shards.counts[shard])]
                )
            here = shard_of == shard
            groups[here] = known[shard][samples[here] - starts[shard]]
        return groups

    return Groups(group_of, name)


def check_groups(shards: Shards, name: str, whose: str = "") -> None:
    """Looks at some samples of each shard, of 64 at most, before the first step; remote shards are not fetched for it.
    Warns of texts that are taken for no value.

    Args:
        whose: what the shards are, for messages, as " of data.val".

    Raises:
        ValueError: the `.json` of a shard's first sample has no such field.
    """
    starts = np.cumsum(shards.counts) - shards.counts
    local = [n for n, entry in enumerate(shards.entries) if entry.samples and not is_url(entry.location)]
    values = []
    for number in np.linspace(0, len(local) - 1, min(len(local), 64)).astype(int):
        count = shards.entries[local[number]].samples
        for place in np.linspace(0, count - 1, min(count, 16)).astype(int).tolist():
            index = int(starts[local[number]]) + place
            try:
                facts = shards.info(index)
            except ValueError:  # damaged JSON makes a hole
                continue
            if name not in facts and not place:
                raise ValueError(
                    f"data.group is {name!r}, and {shards.name(index)}{whose} has no such field: its .json has "
                    f"{', '.join(facts) or 'none'}. Each column of a table that is packed becomes one, and `miniclip "
                    "shards SRC OUT --groups FILE` adds one that is called group"
                )
            values.append(facts.get(name))
    if words := words_for_no_value(values):
        warn_once(
            f"data.group is {name!r}, and of {len(values):,} samples{whose} that were looked at, {words} are taken for "
            "no value: each of those samples is a group of its own",
            stacklevel=2,
        )


def _group(shards: Shards, index: int, name: str) -> int:
    try:
        return group_id(shards.info(index), name, shards.name(index))
    except ValueError as error:
        raise ValueError(f"data.negatives is 'hard' by data.group, and of {shards.name(index)}: {error}") from error


def neighbours_in(folders: Sequence[str], shards: Shards, sources: Sequence[str]) -> Neighbours:
    """The embeddings of all samples, from a folder of `miniclip embed` for each source.

    A sample that could not be read when the source was embedded has no direction: it fills batches up.

    Args:
        sources: where the shards lie, for messages.

    Raises:
        ValueError: a folder is missing, holds something else, was made from other shards, or by another model than the
            first.
    """
    numbers = np.split(np.arange(len(shards.entries)), np.cumsum(shards.num_shards)[:-1])
    manifests = [
        _manifest(folder, [shards.entries[n] for n in own], source)
        for folder, own, source in zip(folders, numbers, sources, strict=True)
    ]
    _refuse_other_models(folders, manifests)
    features = np.zeros((len(shards), manifests[0]["embedding_size"]), dtype=np.int8)
    start = 0
    for folder, manifest, own in zip(folders, manifests, numbers, strict=True):
        count = int(shards.counts[own].sum())
        _fill(features[start : start + count], shards, own.tolist(), folder, manifest)
        start += count
    return Neighbours(features)


def _refuse_other_models(folders: Sequence[str], manifests: Sequence[dict[str, Any]]) -> None:
    for folder, manifest in zip(folders, manifests, strict=True):
        precisions = [each.get("precision", FLOAT32) for each in (manifest, manifests[0])]
        if precisions[0] != precisions[1]:
            raise ValueError(
                f"{folder} was written in {precisions[0]}, and {folders[0]} in {precisions[1]}; data.neighbours needs "
                "one precision for all sources"
            )
        for key in ("model_fingerprint", "embedding_size", "preprocessing"):
            if manifest[key] != manifests[0][key]:
                raise ValueError(
                    f"{folder} was written by another model ({manifest['model']}) than {folders[0]} "
                    f"({manifests[0]['model']}); data.neighbours needs one for all sources"
                )


def _hashed(keys: Iterable[str]) -> np.ndarray:
    return np.array([hash64(key.encode("utf-8", "backslashreplace")) for key in keys], dtype=np.int64)


def _fill(features: np.ndarray, shards: Shards, own: Sequence[int], folder: str, manifest: dict[str, Any]) -> None:
    """Puts each row's embedding in the place of its sample, of the shards of the numbers `own`.

    Tars of one name are known by where they lie. If that is not how the rows have them, as of tars that have moved and
    of earlier versions, which wrote no folder, rows of one name are those of its samples in their order.
    """
    locations = [shards.entries[n].location for n in own]
    found = doubtful = 0
    for tars in (tar_names(locations), [name_of(each) for each in locations]):
        features[:] = 0
        keys = _hashed(name for n, tar in zip(own, tars, strict=True) for name in sample_names(tar, shards.keys(n)))
        found, doubtful = max((found, doubtful), _matched(features, keys, {*tars}, folder, manifest))
        if found + manifest["unreadable"] == len(keys) and not doubtful:
            return
    why = f"has embeddings of {found:,} of the {len(keys):,} samples and lists {manifest['unreadable']:,}"
    if found + manifest["unreadable"] == len(keys):
        why = f"has fewer rows than samples of {doubtful:,} names that come several times, and does not tell those"
    raise ValueError(f"{folder} {why} that could not be read; write it anew, with `miniclip embed … --overwrite`")


def _matched(
    features: np.ndarray, keys: np.ndarray, tars: Set[str], folder: str, manifest: dict[str, Any]
) -> tuple[int, int]:
    """How many rows have a sample, and how many names that come several times have fewer rows than samples.

    Args:
        keys: (N,) the samples' names; the k-th row of a name is the k-th sample of it.
        tars: as those names have them; a row that has another names its tar within its folder.
    """
    order = keys.argsort(kind="stable")
    ordered = keys[order]
    num_rows = np.zeros(len(keys) + 1, dtype=np.int64)  # of each name, where that begins in the order
    found = 0
    for names, embeddings in _embedded_rows(folder, manifest):
        rows = _hashed(_as_called(name, tars) for name in names)
        by_key = rows.argsort(kind="stable")
        repetition = np.empty(len(rows), dtype=np.int64)
        repetition[by_key] = np.arange(len(rows)) - np.searchsorted(rows[by_key], rows[by_key])
        first = np.searchsorted(ordered, rows)
        at = first + num_rows[first] + repetition
        is_known = at < len(keys)
        is_known[is_known] = ordered[at[is_known]] == rows[is_known]
        features[order[at[is_known]]] = quantised(embeddings[is_known])
        np.add.at(num_rows, first[is_known], 1)
        found += int(is_known.sum())
    _, first, times = np.unique(ordered, return_index=True, return_counts=True)
    return found, int(((times > 1) & (num_rows[first] < times)).sum())


def _as_called(name: str, tars: Set[str]) -> str:
    tar, key = split_sample_name(name)
    return f"{name_of(tar)}:{key}" if tar and tar not in tars else name


def _embedded_rows(folder: str, manifest: dict[str, Any]) -> Iterator[tuple[list[str], np.ndarray]]:
    """Keys (n) and embeddings (n, E), part by part."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError("data.neighbours needs pyarrow: pip install 'miniclip[eval]'") from error
    for name in manifest["files"]:
        path = Path(folder) / name
        try:
            table = pq.read_table(path, columns=["key", "embedding"])
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged or gone ({error}); repeat `miniclip embed … --overwrite`") from error
        flat = table["embedding"].combine_chunks().flatten().to_numpy()
        yield table["key"].to_pylist(), flat.reshape(-1, manifest["embedding_size"])


def _manifest(folder: str, entries: Sequence[ShardEntry], source: str) -> dict[str, Any]:
    remedy = f"`miniclip embed {source} {folder} --model MODEL` writes one"
    if is_url(folder):
        raise ValueError(f"data.neighbours is {folder}; it must be a folder on a disk")
    path = Path(folder) / _MANIFEST
    if not path.is_file():
        what = "is not a folder of embeddings" if Path(folder).exists() else "does not exist"
        raise ValueError(f"data.neighbours {folder} {what} (it has no {_MANIFEST}); {remedy}")
    try:
        manifest = dict(json.loads(path.read_text(encoding="utf-8")))
        kind, layout, identity = manifest["kind"], manifest["layout"], manifest.get("identity")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({reason_of(error)}); {remedy}") from error
    if not manifest.get("is_complete"):
        raise ValueError(f"{folder} is not complete: repeat the `miniclip embed` that began it, until it has its name")
    if (kind, layout) != ("image", "parquet"):
        raise ValueError(
            f"{folder} holds embeddings of {kind}s in the layout {layout}; data.neighbours needs images in the layout "
            f"parquet: {remedy}"
        )
    if any(entry.sha256 is None for entry in entries):
        raise ValueError(
            f"{source} was indexed by its headers alone, so nothing shows that {folder} was made from it: index it "
            "whole (without --head), or pack it"
        )
    tars = hashlib.sha256("".join(f"{entry.sha256}\0" for entry in entries).encode()).hexdigest()
    if identity != tars:
        raise ValueError(
            f"{folder} was not made from {source} as it is now (but from {manifest.get('source')}); {remedy}"
        )
    return manifest
