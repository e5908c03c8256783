"""Embeddings in files: parts of consecutive rows of a source, in a folder that gets its name once all are there.

    OUT/part-00000.parquet …  key, path (or text), the source's own columns, and `embedding`, a list of E numbers
    OUT/_manifest.json        what the embeddings were computed from; rows kept, unreadable, left out
    OUT/_left_out.csv         every row that was not kept, with the reason

A name with an underscore is passed over by readers of a data set, so pyarrow and pandas read OUT as one table. With the
layout of clip-retrieval the parts are OUT/img_emb/img_emb_0.npy (or text_emb) and OUT/metadata/metadata_0.parquet.

Until then the folder is called OUT.partial. Each part appears there whole, by one rename, and holds in its footer which
of its rows could not be read: what a run that was killed has finished is exactly the parts that it left.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import log10
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...common.arguments import FLOAT32
from ...common.files import atomic_write, locked, refuse_foreign, swap_in, write_csv, write_text
from ...common.storage import without_secrets
from ...data.reading.scan import LeftOut

MANIFEST_FILE, LEFT_OUT_FILE = "_manifest.json", "_left_out.csv"
LAYOUTS, DTYPES, KINDS = ("parquet", "clip-retrieval"), ("float32", "float16"), ("image", "text")
UNREADABLE = "could not be read"
MANIFEST_SCHEMA = 1
_NOTE = b"miniclip"  # the key under which a part's footer has its unreadable rows
# Of manifests without them.
_BEFORE: dict[str, Any] = {
    "upright": False,
    "precision": FLOAT32,
    "place": None,
    "keys_fingerprint": None,
    "earlier_fingerprints": (),
}
_NAMES = ("source", "model")  # for people: what they stand for is known by its fingerprint


@dataclass(frozen=True)
class Plan:
    """All that the rows depend on; a run goes on only with what was begun by the same plan.

    Args:
        kind: of `KINDS`.
        source_fingerprint: of its files, keys and columns.
        rows: of the source, whether or not they can be read.
        model, library: names; `model_fingerprint` and `preprocessing` are digests, None where there is none.
        rows_per_file: of the source, so a part has fewer where some can't be read.
        upright: images were turned as EXIF says.
        precision: of the towers' products.
        place: the tar or table that the first row lies in, or its picture's file, as it was named where the folder was
            begun; all its keys begin so. None where an earlier version began it.
        keys_fingerprint: of keys and columns alone, of a source whose files are known by their times; else None.
        earlier_fingerprints: what earlier versions had for `source_fingerprint`; they stand in no manifest.
    """

    kind: str
    source: str
    source_fingerprint: str
    rows: int
    model: str
    library: str
    model_fingerprint: str | None
    preprocessing: str | None
    dtype: str
    layout: str
    rows_per_file: int
    upright: bool = False
    precision: str = FLOAT32
    place: str | None = None
    keys_fingerprint: str | None = None
    earlier_fingerprints: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """What a manifest says of the plan."""
        return {name: value for name, value in asdict(self).items() if name != "earlier_fingerprints"}

    @property
    def num_files(self) -> int:
        return -(-self.rows // self.rows_per_file)

    def indices(self, number: int) -> range:
        """The rows of a part."""
        return range(number * self.rows_per_file, min((number + 1) * self.rows_per_file, self.rows))

    def differences(self, begun: dict[str, Any]) -> list[str]:
        """What is not as in the manifest `begun`, in words; empty if a run can go on with it."""
        now, begun = self.facts(), _BEFORE | begun
        other = self._others(begun)
        if {"model_fingerprint", "library"} <= other or {"model_fingerprint", "preprocessing"} <= other:
            other -= {"model_fingerprint"}  # which covers both
        if "precision" in other:
            other -= {"model_fingerprint", "library"}  # which name it, too
        words = {
            "source_fingerprint": f"the source was {begun.get('source')} and is {self.source}"
            if begun.get("source") != self.source
            else f"files, keys or columns of {self.source} have changed",
            "model_fingerprint": f"the model was {begun.get('model')} and is {self.model}"
            if begun.get("model") != self.model
            else f"the weights of {self.model} are others",
            "preprocessing": f"the preprocessing of {self.model} is another than that of {begun.get('model')}",
        }
        return [
            words.get(name) or f"{name} was {begun.get(name)!r} and is {now[name]!r}" for name in now if name in other
        ]

    def has_other_times(self, begun: dict[str, Any]) -> bool:
        """Whether nothing but files' sizes and times is not as in the manifest `begun`: what they hold may be."""
        same = all(begun.get(name) == getattr(self, name) for name in ("source", "keys_fingerprint"))
        return same and self.keys_fingerprint is not None and self._others(_BEFORE | begun) == {"source_fingerprint"}

    def _others(self, begun: dict[str, Any]) -> set[str]:
        """The facts that are not as in a manifest."""
        other = {name for name, value in self.facts().items() if begun.get(name) != value}
        if begun.get("source_fingerprint") in self.earlier_fingerprints:
            other -= {"source_fingerprint"}
        if self.model_fingerprint is not None:  # the same weights may have moved
            other -= {"model"}
        return other - {"source", "place", "keys_fingerprint"}


@dataclass(frozen=True)
class Embedded:
    """The result of a run; kept and unreadable add up to the source's rows, once no part is missing.

    Args:
        left_out: files and rows of the source that are none of its rows, and columns that are not copied.
        missing: parts that other processes have not written yet; until then the folder has not got its name.
        was_there: the folder was complete before this run.
        is_last: this process gave the folder its name.
    """

    out: Path
    kept: int = 0
    unreadable: int = 0
    left_out: int = 0
    files: int = 0
    size_bytes: int = 0
    missing: int = 0
    was_there: bool = False
    is_last: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


class Layout(Protocol):
    """Where the parts of a folder lie, and what they are."""

    def path(self, number: int) -> Path:
        """The file that is written last: where it is, the part is."""

    def write(self, number: int, table: Any, embeddings: np.ndarray, note: bytes) -> None: ...

    def files(self) -> list[Path]:
        """All that there may be, of all parts."""


class ParquetLayout:
    """One Parquet file a part, the embedding a column of fixed-size lists."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.num_files = folder, plan.num_files
        self._digits = max(5, len(str(plan.num_files - 1)))

    def path(self, number: int) -> Path:
        return self.folder / f"part-{number:0{self._digits}d}.parquet"

    def files(self) -> list[Path]:
        return [self.path(number) for number in range(self.num_files)]

    def write(self, number: int, table: Any, embeddings: np.ndarray, note: bytes) -> None:
        import pyarrow as pa

        values = pa.array(np.ascontiguousarray(embeddings).ravel())
        column = pa.FixedSizeListArray.from_arrays(values, embeddings.shape[1])
        _write_parquet(self.path(number), table.append_column("embedding", column), note)


class ClipRetrievalLayout:
    """The folders that clip-retrieval's index, back end and autofaiss read (github.com/rom1504/clip-retrieval)."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.num_files = folder, plan.num_files
        self._what = "img_emb" if plan.kind == "image" else "text_emb"
        self._digits = int(log10(plan.num_files)) + 1  # they are read in the order of their names

    def path(self, number: int) -> Path:
        return self.folder / "metadata" / f"metadata_{number:0{self._digits}d}.parquet"

    def embeddings(self, number: int) -> Path:
        return self.folder / self._what / f"{self._what}_{number:0{self._digits}d}.npy"

    def files(self) -> list[Path]:
        return [path(number) for number in range(self.num_files) for path in (self.embeddings, self.path)]

    def write(self, number: int, table: Any, embeddings: np.ndarray, note: bytes) -> None:
        with atomic_write(self.embeddings(number)) as file:
            np.save(file, embeddings)
        names = {"text": "caption", "path": "image_path"}
        if "path" in table.column_names:  # where there is none, the key is what an image is known by
            table = table.set_column(1, "path", _first_known(table["path"], table["key"]))
        table = table.drop_columns(["key"])
        _write_parquet(self.path(number), table.rename_columns([names.get(n, n) for n in table.column_names]), note)


def _first_known(values: Any, otherwise: Any) -> Any:
    import pyarrow.compute as pc

    return pc.coalesce(values, otherwise)


def _write_parquet(path: Path, table: Any, note: bytes) -> None:
    import pyarrow.parquet as pq

    leaves = {leaf: field.name for field in table.schema for leaf in _leaves(field.name, field.type)}
    others = [leaf for leaf, name in leaves.items() if name != "embedding"]
    with atomic_write(path) as file:
        pq.write_table(
            table.replace_schema_metadata({_NOTE: note}),
            file,
            use_dictionary=others,  # numbers of an embedding neither repeat nor shrink
            write_statistics=others,
            compression={leaf: "none" if name == "embedding" else "zstd" for leaf, name in leaves.items()},
        )


def _leaves(path: str, kind: Any) -> list[str]:
    """The columns that Parquet keeps for one of this type, by their paths."""
    from pyarrow import types

    if hasattr(kind, "storage_type"):  # an extension
        return _leaves(path, kind.storage_type)
    if types.is_map(kind):
        return [*_leaves(f"{path}.key_value.key", kind.key_type), *_leaves(f"{path}.key_value.value", kind.item_type)]
    if types.is_struct(kind):
        return [leaf for field in kind for leaf in _leaves(f"{path}.{field.name}", field.type)]
    if types.is_nested(kind):
        return _leaves(f"{path}.list.element", kind.value_type)
    return [path]


def layout_of(folder: Path, plan: Plan) -> Layout:
    return (ParquetLayout if plan.layout == "parquet" else ClipRetrievalLayout)(folder, plan)


# ---------------------------------------------------------------------------------------------------------------------
# A folder in the making


class Work:
    """OUT.partial, from where it is begun until it is complete and called OUT.

    Args:
        part: (i, n): which of the parts are this process's, every n-th from the i-th on.
        overwrite: replace an `out` that is there, and what another plan has begun.
        digests: what `add` takes, of some rows as they are now; parts of files with other times are compared by it.

    Raises:
        ValueError: `out` exists, belongs to something else, or was begun by another plan.
    """

    def __init__(
        self,
        out: Path,
        plan: Plan,
        part: tuple[int, int] = (1, 1),
        overwrite: bool = False,
        digests: Callable[[Sequence[int]], Sequence[bytes | None]] = lambda indices: [],
    ) -> None:
        self.out, self.plan, self.part, self._digests = out, plan, part, digests
        self.folder = out.with_name(f"{out.name}.partial")
        self.layout = layout_of(self.folder, plan)
        self._busy = f"another process is writing {out}"
        self._pending: dict[int, _Unfinished] = {}
        with self._locked():
            self.is_complete = (part[1] > 1 or not overwrite) and not self._differences(out)
            if not self.is_complete:
                _refuse_other_embeddings(out, plan, overwrite)
                self._begin(overwrite)

    def _locked(self) -> Any:
        return locked(self.out.with_name(f".{self.out.name}.lock"), self._busy, patience_s=600)

    def part_lock(self) -> Any:
        """Held while the process works, so that the same one is not started twice."""
        number, count = self.part
        path = self.out.with_name(f".{self.out.name}.{number}-of-{count}.lock")
        return locked(path, f"another process is at part {number}/{count} of {self.out}", patience_s=0)

    def own(self) -> list[int]:
        """The parts that are this process's."""
        return list(range(self.part[0] - 1, self.plan.num_files, self.part[1]))

    def missing(self) -> list[int]:
        """Those of them that are still to be written."""
        return [] if self.is_complete else [number for number in self.own() if not self.layout.path(number).exists()]

    def _begin(self, overwrite: bool) -> None:
        manifest = self.folder / MANIFEST_FILE
        if manifest.is_file():
            begun = _read_json(manifest)
            if not (other := self._differences(self.folder)):
                self.plan = replace(self.plan, place=begun.get("place"))
                return
            if not overwrite:
                raise ValueError(
                    f"{self.folder} was begun otherwise: {'; '.join(other)}. Repeat that command to go on with it, "
                    "or pass --overwrite to begin anew"
                )
            with ExitStack() as stack:
                for path in self.out.parent.glob(f".{glob.escape(self.out.name)}.*-of-*.lock"):
                    stack.enter_context(locked(path, self._busy, patience_s=0))
            shutil.rmtree(self.folder)
        elif self.folder.exists() and any(not path.match(".*") for path in self.folder.iterdir()):
            raise ValueError(f"{self.folder} is in the way: it was not begun by `miniclip embed` (no {MANIFEST_FILE})")
        write_text(manifest, _indented({"schema": MANIFEST_SCHEMA, "is_complete": False, **self.plan.facts()}))

    def _differences(self, folder: Path) -> list[str]:
        """Those of the plan to a folder's manifest, or that it has none. Where only files' times differ, what they hold
        is compared, and if it is the same the manifest gets the new times."""
        if not (folder / MANIFEST_FILE).is_file():
            return [f"it has no {MANIFEST_FILE}"]
        begun = _read_json(folder / MANIFEST_FILE)
        differences = self.plan.differences(begun)
        if not self.plan.has_other_times(begun):
            return differences
        layout = layout_of(folder, self.plan)
        for number in range(self.plan.num_files):
            if layout.path(number).exists():
                digest = _read_part(layout, number).digest
                if digest is None or digest != _digest_of_part(self._digests(self.plan.indices(number))):
                    return differences
        manifest = begun | {"source_fingerprint": self.plan.source_fingerprint}
        write_text(folder / MANIFEST_FILE, _indented(manifest))
        return []

    # -- writing

    def add(
        self,
        indices: np.ndarray,
        embeddings: np.ndarray,
        problems: Mapping[int, str],
        rows: Rows,
        digests: Mapping[int, bytes | None] | None = None,
    ) -> None:
        """Takes some rows, in any order, and writes each part once it has all of its own.

        Args:
            indices: (B,) of the source's rows that could be read.
            embeddings: (B, E) of those, in the plan's type.
            problems: why others could not be read, by index.
            digests: what `digest_stored` gives of all of them, by index; None if it is not known.
        """
        files = indices // self.plan.rows_per_file
        for number in sorted({*files.tolist(), *(index // self.plan.rows_per_file for index in problems)}):
            pending = self._pending.setdefault(number, _Unfinished())
            pending.indices.append(indices[files == number])
            pending.embeddings.append(embeddings[files == number])
            own = self.plan.indices(number)
            pending.problems |= {index: problem for index, problem in problems.items() if index in own}
            pending.digests |= {index: digest for index, digest in (digests or {}).items() if index in own}
            if sum(map(len, pending.indices)) + len(pending.problems) == len(own):
                self._write(number, self._pending.pop(number), rows)

    def _write(self, number: int, pending: _Unfinished, rows: Rows) -> None:
        indices, embeddings = np.concatenate(pending.indices), np.concatenate(pending.embeddings)
        order = np.argsort(indices)
        unreadable = [[rows.key(index), problem] for index, problem in sorted(pending.problems.items())]
        digest = _digest_of_part([pending.digests.get(index) for index in self.plan.indices(number)])
        note = json.dumps({"unreadable": unreadable, "digest": digest}).encode()
        self.layout.write(number, rows.table(indices[order].tolist()), embeddings[order], note)

    # -- the end

    def finish(self, left_out: Sequence[LeftOut], versions: dict[str, str], identity: str | None = None) -> Embedded:
        """Gives the folder its name, if all parts are there.

        Args:
            identity: of the source's images, by which training knows that embeddings belong to its shards.

        Raises:
            ValueError: not one row could be read.
        """
        with self._locked():
            if self.is_complete or not (self.folder / MANIFEST_FILE).is_file():  # or another part has finished
                return replace(_read_embedded(self.out), was_there=self.is_complete)
            missing = sum(not self.layout.path(number).exists() for number in range(self.plan.num_files))
            if missing:
                return Embedded(self.out, missing=missing, files=self.plan.num_files)
            self._complete(left_out, versions, identity)
            return replace(_read_embedded(self.out), is_last=True)

    def _complete(self, left_out: Sequence[LeftOut], versions: dict[str, str], identity: str | None) -> None:
        """Each step can be done again by a process that comes after one that was killed here."""
        parts = [_read_part(self.layout, number) for number in range(self.plan.num_files)]
        unreadable = [row for part in parts for row in part.unreadable]
        kept = sum(part.rows for part in parts)
        assert kept + len(unreadable) == self.plan.rows
        if not kept:
            shutil.rmtree(self.folder)
            first = ": ".join(unreadable[0]) if unreadable[0][0] not in unreadable[0][1] else unreadable[0][1]
            raise ValueError(f"none of the {self.plan.rows} rows of {self.plan.source} can be read; the first: {first}")
        reasons = Counter[str]()
        for each in left_out:
            reasons[each.reason] += each.count
        rows = [
            *((key, UNREADABLE, why) for key, why in unreadable),
            *((x.source, "left out", _reason_and_count(x)) for x in left_out),
        ]
        if rows:
            shown = [(without_secrets(name), what, reason) for name, what, reason in rows]
            write_csv(self.folder / LEFT_OUT_FILE, ("name", "what", "reason"), shown)
        manifest = {"schema": MANIFEST_SCHEMA, "is_complete": True, **self.plan.facts()}
        manifest |= {
            "embedding_size": parts[0].embedding_size,
            "unit_length": True,
            "kept": kept,
            "unreadable": len(unreadable),
        }
        manifest |= {
            "identity": identity,
            "left_out": dict(reasons),
            "listed_in": LEFT_OUT_FILE if rows else None,
            "versions": versions,
        }
        manifest["files"] = {str(p.path.relative_to(self.folder)): p.rows for p in parts}
        write_text(self.folder / MANIFEST_FILE, _indented(manifest))
        for path in self.folder.rglob(".*.tmp"):  # of processes that were killed
            path.unlink(missing_ok=True)
        swap_in(self.folder, self.out)


class Rows(Protocol):
    """What is known of each row beside its embedding."""

    def key(self, index: int) -> str: ...

    def table(self, indices: Sequence[int]) -> Any:
        """A pyarrow.Table of these rows, of one schema for all of them; its first column is the key."""


class _Unfinished:
    """The rows of a part that is not whole yet."""

    def __init__(self) -> None:
        self.indices: list[np.ndarray] = []
        self.embeddings: list[np.ndarray] = []
        self.problems: dict[int, str] = {}
        self.digests: dict[int, bytes | None] = {}


def _digest_of_part(digests: Sequence[bytes | None]) -> str | None:
    """Stands for what `digest_stored` gives of a part's rows; None if it is not known of all."""
    known = [each.hex() for each in digests if each is not None]
    return hashlib.sha256(" ".join(known).encode()).hexdigest() if len(known) == len(digests) else None


@dataclass(frozen=True)
class _Part:
    path: Path
    rows: int
    embedding_size: int
    unreadable: list[tuple[str, str]]
    digest: str | None


def _read_part(layout: Layout, number: int) -> _Part:
    import pyarrow.parquet as pq

    path = layout.path(number)
    try:
        footer = pq.read_metadata(path)
        schema = footer.schema.to_arrow_schema()
        note = json.loads(footer.metadata[_NOTE])
        unreadable = [(str(key), str(why)) for key, why in note["unreadable"]]
        if isinstance(layout, ClipRetrievalLayout):
            path = layout.embeddings(number)
            size, rows = np.load(path, mmap_mode="r").shape[::-1]
        else:
            size, rows = schema.field("embedding").type.list_size, footer.num_rows
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete that file and repeat the command") from error
    if rows != footer.num_rows:
        raise ValueError(f"{path} has {rows} rows, its metadata {footer.num_rows}; delete both and repeat the command")
    return _Part(path, rows, size, unreadable, note.get("digest"))


def _refuse_other_embeddings(out: Path, plan: Plan, overwrite: bool) -> None:
    if not out.exists():
        return
    if not (out / MANIFEST_FILE).is_file():
        raise ValueError(
            f"{out} exists and was not written by `miniclip embed`: it has no {MANIFEST_FILE}; name another"
        )
    manifest = _read_json(out / MANIFEST_FILE)
    if not overwrite:
        raise ValueError(
            f"{out} holds other embeddings: {'; '.join(plan.differences(manifest))}. Pass --overwrite to replace them, "
            "or name another folder"
        )
    ours = {out / MANIFEST_FILE, out / LEFT_OUT_FILE, *layout_of(out, _plan_of(manifest)).files()}
    refuse_foreign(out, ours, "`miniclip embed`")


def _plan_of(manifest: dict[str, Any]) -> Plan:
    try:
        return Plan(**{name: (_BEFORE | manifest)[name] for name in Plan.__dataclass_fields__})
    except KeyError as error:
        raise ValueError(f"{MANIFEST_FILE} has no {error}; it was not written by this version of miniclip") from error


def _read_embedded(out: Path) -> Embedded:
    manifest = _read_json(out / MANIFEST_FILE)
    paths = [path for path in layout_of(out, _plan_of(manifest)).files() if path.is_file()]
    return Embedded(
        out,
        manifest["kept"],
        manifest["unreadable"],
        sum(manifest["left_out"].values()),
        len(manifest["files"]),
        sum(path.stat().st_size for path in paths),
    )


def _reason_and_count(each: LeftOut) -> str:
    return each.reason + (f", {each.count:,} of them" if each.count > 1 else "")


def _indented(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder, or name another OUT") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no manifest of `miniclip embed`")
    return found
