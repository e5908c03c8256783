"""What a row of a file of embeddings has beside its embedding: its key, where it is, and the source's own columns."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...common.storage import is_url
from ...data.reading.arrow_column import ArrowColumn
from ...data.reading.scan import LeftOut
from ...data.shards import split_sample_name
from ...evaluation.datasets.sets import EvaluationSet, digest_lines
from ...evaluation.features import digest_stored
from ..names import existing, key_without_folder, split_key
from ..sources import Texts


class SourceRows:
    """Key, path (or text) and the source's own columns of each row, as tables of one schema.

    A column of the source that has the name of one of ours is called source_NAME.

    Attributes:
        place: the tar or table that the first row lies in, or its picture's file, as it was named; "" for another kind
            of row.
        begun_at: the same as the rows named it that were written before: keys begin as those do. None of an earlier
            version, whose keys begin with the tar's or table's own name.
    """

    def __init__(self, data: EvaluationSet | Texts) -> None:
        self.data = data
        self.kind = "text" if isinstance(data, Texts) else "image"
        self.begun_at: str | None
        self.place = self.begun_at = self._place_of(self._key(0)) if len(data) else ""
        own = {"key", "embedding", *(("text", "caption") if self.kind == "text" else ("path", "image_path"))}
        self.columns: dict[str, Any] = {}
        for name, values in data.metadata.items():
            if _why_left_out(values):
                continue
            called = name
            while called in own or (called != name and called in data.metadata):
                called = f"source_{called}"
            self.columns[_as_utf8(called)] = values.by_name() if isinstance(values, ArrowColumn) else _as_arrow(values)

    def key(self, index: int) -> str:
        key = self._key(index)
        if self.begun_at is None:
            return key_without_folder(key)
        now, begun = _beginnings(self.place, self.begun_at)
        is_begun_elsewhere = now != begun and key.startswith(now) and (now or not Path(key).is_absolute())
        return begun + key.removeprefix(now) if is_begun_elsewhere else key

    def _key(self, index: int) -> str:
        return self.data.keys[index] if isinstance(self.data, Texts) else self.data.key(index)

    def _place_of(self, key: str) -> str:
        return split_key(key)[0] or (key if self.kind == "image" and not is_url(key) and existing(key) else "")

    def _is_file(self, index: int) -> bool:
        key = self._key(index)
        if isinstance(self.data, Texts):
            return False
        if isinstance(images := self.data.images, tuple):  # else asking for one may read it
            return isinstance(images[index], str | Path) and not is_url(key) and str(images[index]) == key
        return self._place_of(key) == key

    def table(self, indices: Sequence[int]) -> Any:
        import pyarrow as pa

        texts: dict[str, list[str | None]] = {"key": [_as_utf8(self.key(index)) for index in indices]}
        if isinstance(self.data, Texts):
            texts["text"] = [_as_utf8(self.data.texts[index]) for index in indices]
        else:
            texts["path"] = [_place(self._key(index)) for index in indices]
        found = pa.table({name: pa.array(values, pa.string()) for name, values in texts.items()})
        for name, column in self.columns.items():
            found = found.append_column(name, column.take(pa.array(indices, pa.int64())))
        return found

    def digests(self, indices: Iterable[int]) -> list[bytes | None]:
        """What `EncodedBatch.digests` has for some rows of images, which are read for it; none of texts."""
        if isinstance(self.data, Texts):
            return []
        digests: list[bytes | None] = []
        for index in indices:
            try:
                digests.append(digest_stored(self.data.stored(index)))
            except ValueError:
                digests.append(b"")
        return digests

    def fingerprint(self) -> str:
        """Changes with the source's files, their order, keys, and columns; not with where a tar or a table lies, or how
        a file is named, as a source may be named relatively, absolutely, or (a tar, a table) on another machine."""
        return self.fingerprints()[0]

    def fingerprints(self) -> tuple[str, tuple[str, ...]]:
        """That, and those of earlier versions, which had no times of change, and once changed with how a file is named,
        too."""
        now, before, _ = self._every_fingerprint
        return now, before

    @property
    def keys_fingerprint(self) -> str | None:
        """Changes with the keys and columns, and where files lie, not with what is stored. None of texts, tars and
        URLs, which are known by their values, checksums and addresses."""
        return self._every_fingerprint[2]

    @cached_property
    def _every_fingerprint(self) -> tuple[str, tuple[str, ...], str | None]:
        data = self.data
        columns = [
            json.dumps(
                [name, values.identity] if isinstance(values, ArrowColumn) else [name, list(values)], default=str
            )
            for name, values in data.metadata.items()
        ]
        known, named, places = [], [], []
        for index in range(len(data)):
            key, is_file = self._key(index), self._is_file(index)
            named.append(key_without_folder(key))
            # Where a file lies is in the fingerprint of the images.
            known.append(Path(key).name if is_file else named[-1])
            places.append(os.path.abspath(key) if is_file else named[-1])  # noqa: PTH100 (links stay as they are)

        def of(lines: Iterable[str]) -> str:
            return digest_lines([digest_lines(lines), *columns])

        if isinstance(data, Texts):
            return of([*data.texts, *known]), (of([*data.texts, *named]),), None
        now, before = replace(data, upright=False).fingerprints()  # a plan has `upright` as a fact of its own
        has_times = not any(is_url(name) or split_key(name)[0].endswith(".tar") for name in places)
        return of([now, *known]), (of([before, *known]), of([before, *named])), of(places) if has_times else None


def columns_left_out(data: EvaluationSet | Texts) -> list[LeftOut]:
    """The columns of the source that its embeddings go without."""
    reasons = ((name, _why_left_out(values)) for name, values in data.metadata.items())
    return [LeftOut(f"column {name!r}", reason) for name, reason in reasons if reason]


def _why_left_out(values: Sequence[Any]) -> str:
    """Why a column is not copied; empty if it is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not isinstance(values, ArrowColumn):
        return ""
    if values.is_large:
        return "a column of pictures or of texts as large, which is not copied"
    if pa.types.is_string(values.kind):
        return ""
    try:
        pq.write_table(pa.table({"column": values.take([0])}), pa.BufferOutputStream())
    except pa.ArrowException:
        return f"a column of a type that can't be copied, {values.kind}"
    return ""


def _beginnings(now: str, begun: str) -> tuple[str, str]:
    """What two names of one thing begin with, before the folders that they share.

    >>> _beginnings("/data/sh/0.tar", "sh/0.tar"), _beginnings("/mnt/a1/0.tar", "../b1/0.tar")
    (('/data/', ''), ('/mnt/a1/', '../b1/'))
    """
    parts, others = now.split("/"), begun.split("/")
    while parts and others and parts[-1] == others[-1]:
        parts, others = parts[:-1], others[:-1]
    return "".join(f"{part}/" for part in parts), "".join(f"{part}/" for part in others)


def _place(key: str) -> str | None:
    """The absolute path, or URL, of an image that has one; a key may also be a table's row, or a tar's member."""
    if is_url(key):
        return None if split_sample_name(key)[0] else _as_utf8(key)
    return _as_utf8(str(Path(key).absolute())) if existing(key) else None


def _as_utf8(text: str) -> str:
    """Bytes of a file's name that are not UTF-8 become \\udc.., as in all that miniclip writes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _as_arrow(values: Sequence[Any]) -> Any:
    """A column as it is, if it is of numbers, of booleans or of texts; of mixed or other values, as texts."""
    import pyarrow as pa

    try:
        found = pa.array(values)
        if not (pa.types.is_null(found.type) or pa.types.is_nested(found.type)):
            return found
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        pass
    return pa.array([None if value is None else _as_utf8(_as_text(value)) for value in values], pa.string())


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
