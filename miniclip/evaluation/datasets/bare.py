"""Images alone: of a folder, a table, shards or Hugging Face's `datasets`, whether or not they have labels or captions.

Unless a split is named, nothing is chosen: all of a table's and of a data set's are read. Of sets of CLIP_benchmark's
the folder of a split is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...common.storage import check_scheme, exists, is_url, join, name_of, parent_of
from ...data.reading.huggingface import (
    HUB_PREFIX,
    DatasetsRows,
    datasets_rows,
    image_column_of,
    load_datasets,
    undecoded,
)
from ...data.reading.rows import name_images
from ...data.reading.scan import LeftOut, scan
from ...data.reading.splits import numbers_of, role_of
from ...data.reading.tables import find_image_column, folder_of, read_table
from ...data.shard_index import INDEX_FILE
from ...data.shards import Shards
from .class_folders import left_out_of_bare
from .folders_and_tables import FromEach, image_of_row, images_of_rows
from .sets import Columns, EvaluationSet, digest_lines
from .tars import NUM_SHARDS_FILE, benchmark_splits, images_of, indexed, numbered_tars, set_name, shard_columns


def bare_folder(folder: Path) -> EvaluationSet:
    """The pictures below a folder, however deep; perhaps none."""
    below = scan(folder)
    return EvaluationSet(folder.resolve().name, below.images, left_out=left_out_of_bare(below))


def bare_table(path: Path, image_column: str | None = None, split: str | None = None) -> EvaluationSet:
    """The images of a table, or of a folder or pattern of Parquet files.

    Args:
        split: rows of others are left out where a column or the names of files tell the splits; None for all.

    Raises:
        ValueError: no rows, or no column of images.
    """
    rows: Any
    names, rows = read_table(path, split)
    Columns(None, image_column, None).check(names, str(path))
    column = image_column or find_image_column(names, rows, folder_of(path), path)[0]
    there = images_of_rows(path, [column], rows, column, called=str(path))
    metadata = {name: rows.whole(name) for name in names if name != column}
    return EvaluationSet(
        path.name,
        there.images,
        keys=there.keys,
        metadata=metadata,
        identity=there.identity,
        left_out=there.left_out,
        names=name_images(rows, column).names if split else None,
    )


def bare_datasets(source: str, image_column: str | None = None, split: str | None = None) -> list[EvaluationSet]:
    """The images of each split of a set of Hugging Face's `datasets`.

    Args:
        split: the one to read, of sets that have several; None for all.

    Raises:
        ValueError: the library is missing, no column holds images, or there is no such split.
    """
    loaded = load_datasets(source)
    name = source.removeprefix(HUB_PREFIX).rstrip("/").rpartition("/")[2]
    splits = loaded if isinstance(loaded, dict) else {"": loaded}
    parts = {part: DatasetsRows(rows) for part, rows in splits.items()}
    if split is not None:
        if len(splits) == 1 and role_of(next(iter(splits))) != "train":  # a set of test alone may be what validates
            loaded = next(iter(splits.values()))
        parts = {split: datasets_rows(loaded, source, split)}
    found = []
    for part, of_part in parts.items():
        rows = of_part.loaded
        names = list(rows.column_names)
        Columns(None, image_column, None).check(names, source)
        column = image_column or image_column_of(rows, source)
        rows = undecoded(rows)
        metadata: dict[str, Sequence[Any]] = {c: DatasetsRows(rows).whole(c) for c in names if c != column}
        if part:
            metadata.setdefault("split", [part] * len(rows))
        label = f"{name}, {part}" if part else name
        found.append(
            EvaluationSet(
                label,
                FromEach(rows, partial(image_of_row, Path(), column)),
                keys=[f"{label}: row {number + 1}" for number in numbers_of(of_part)],
                metadata=metadata,
                identity=f"datasets {source} {part} {column} {rows._fingerprint}",
                left_out=of_part.left_out,
                names=list(map(of_part.called, numbers_of(of_part))) if split else None,
            )
        )
    return found


def bare_tars(source: str) -> EvaluationSet:
    """The images of webdataset's tars: a folder, a pattern, a URL.

    Raises:
        ValueError: no tars, damaged ones, or a set of several splits.
    """
    shards = open_shards(source)
    metadata, damaged = shard_columns(shards) if len(shards) else ({}, [])
    return EvaluationSet(
        set_name(source),
        images_of(shards),
        keys=shards.names(),
        metadata=metadata,
        identity=digest_lines(shards.checksums) if shards.checksums else None,
        left_out=[*(LeftOut(source, each.reason, each.count) for each in shards.left_out), *damaged],
    )


def open_shards(source: str) -> Shards:
    """Shards of ours, with an index, or tars from elsewhere, which are indexed in the cache.

    Their samples have the place of their tar in their names, as pictures in folders have theirs.
    """
    opened = partial(Shards, needs_captions=False, is_by_place=True)
    check_scheme(source)
    if name_of(source).endswith(".tar"):
        folder = parent_of(source)
        return opened(source) if exists(join(folder, INDEX_FILE)) else indexed(source, is_by_place=True)
    if exists(join(source, INDEX_FILE)):
        return opened(source)
    if splits := benchmark_splits(source, None):
        raise ValueError(f"{source} has the splits {', '.join(splits)}; name one of them: {join(source, splits[0])}")
    if not is_url(source):
        parts = sorted(path.parent for path in Path(source).glob(f"*/{INDEX_FILE}"))
        return opened(parts) if parts else indexed(source, is_by_place=True)
    if exists(join(source, NUM_SHARDS_FILE)):
        return indexed(numbered_tars(source)[0], is_by_place=True)
    raise ValueError(f"{source} holds no shards: there is neither {INDEX_FILE} nor {NUM_SHARDS_FILE}")
