"""What a row of a file of embeddings has beside its embedding: its key, where it is, and the source's own columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from ...common.storage import is_url
from ...data.reading.arrow_column import ArrowColumn
from ...data.reading.scan import LeftOut
from ...data.shards import split_sample_name
from ...evaluation.datasets.sets import EvaluationSet, digest_lines
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

    def _known_as(self, index: int) -> str:
        """The key of a row without where its tar or table lies; of a file only its name, as where it lies is in the
        fingerprint of the images."""
        key = self._key(index)
        if isinstance(self.data, Texts):
            is_file = False
        elif isinstance(images := self.data.images, tuple):  # else asking for one may read it
            is_file = isinstance(images[index], str | Path) and not is_url(key) and str(images[index]) == key
        else:
            is_file = self._place_of(key) == key
        return Path(key).name if is_file else key_without_folder(key)

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

    def fingerprint(self) -> str:
        """Changes with the source's files, their order, keys, and columns; not with where a tar or a table lies, or how
        a file is named, as a source may be named relatively, absolutely, or (a tar, a table) on another machine."""
        return self.fingerprints()[0]

    def fingerprints(self) -> tuple[str, str]:
        """That, and the one of earlier versions, which changes with how a file is named, too."""
        data = self.data
        rows = range(len(data))
        known, named = map(self._known_as, rows), (key_without_folder(self._key(index)) for index in rows)
        # A plan has `upright` as a fact of its own.
        of_all = data.texts if isinstance(data, Texts) else [replace(data, upright=False).fingerprint()]
        columns = [
            json.dumps(
                [name, values.identity] if isinstance(values, ArrowColumn) else [name, list(values)], default=str
            )
            for name, values in data.metadata.items()
        ]
        now, before = (digest_lines([digest_lines(chain(of_all, keys)), *columns]) for keys in (known, named))
        return now, before


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
