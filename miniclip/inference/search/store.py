"""The table of an index: a row for each picture, in a LanceDB database on a disk or on S3.

A commit is a new version of the table, whole or not there at all, so an index that is killed opens as of its last
commit. The table's key is known to LanceDB: of two writers that commit the same picture at once, one waits for the
other and replaces its row. On a disk a lock lets one writer in at a time.

N pictures, E embedding.
"""

from __future__ import annotations

import json
import os
import re
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from ...common.arguments import FLOAT32
from ...common.files import expand_home, locked
from ...common.storage import is_url, lower_scheme
from .filters import columns_of, what_is_wrong, with_key_for_path

NAMES = ("key", "path", "source")  # `storable`, since a table's texts are UTF-8
OWN_COLUMNS = (*NAMES, "stamp", "content", "features")
_TABLE, _FACTS, _ID = "images", b"miniclip", b"miniclip:id"
_APPROXIMATE, _SOURCES = b"miniclip:approximate", b"miniclip:sources"  # of fields
_FEWEST_OF_PARTITION = 256  # features, which its centre is learnt from
DTYPES = ("float32", "float16")
_LOCK = "writing.lock"
_SPARE = "_row_spare"  # a column while another gets a wider type, and behind a kill; no other has such a name
_PRIMARY_KEY = {"lance-schema:unenforced-primary-key:position": "1"}
_ROWS_OF_BLOCK = 8192
_ESCAPED = re.compile(r"\\((?:u005c)*ud[89a-f][0-9a-f]{2})")  # halves of characters, as a byte's \udc80 is
_MOST_FRAGMENTS = 32  # pieces of the table, which every reader opens
_REMOTE_GRACE = timedelta(hours=1)  # for readers of old versions, where no lock keeps others out


@dataclass(frozen=True)
class Facts:
    """What holds for all rows of an index.

    Args:
        model: as it was named when the index was made; a path is absolute.
        image_fingerprint, text_fingerprint: `Encoder.image_fingerprint` and `text_fingerprint`: of the tower, and of
            preprocessing or tokenizer. None for a model that has nothing to be recognised by.
        library: the model's library and its version.
        image_probe, text_probe: (E,) unit features of a fixed picture and text, for a model whose fingerprint changed
            with its library.
        upright: pictures were turned as EXIF says that viewers show them.
        precision: of the towers' products.
    """

    model: str
    image_fingerprint: str | None
    text_fingerprint: str | None
    library: str
    image_probe: tuple[float, ...] = ()
    text_probe: tuple[float, ...] = ()
    upright: bool = False
    precision: str = FLOAT32
    format: int = 1


@dataclass(frozen=True)
class Approximate:
    """An approximate index, and how it was seen to do.

    Args:
        nprobes: how many of its partitions a search looks into.
        refined: candidates by their codes, for each picture that is wanted, whose cosine is computed exactly.
        recall: the share of the k nearest that it found, by kind of query, on as many queries as `num_queries`.
    """

    nprobes: int
    refined: int
    k: int
    recall: dict[str, float]
    num_queries: dict[str, int]

    def __str__(self) -> str:
        parts = [f"{self.recall[kind]:.3f} for {number} {kind}" for kind, number in self.num_queries.items()]
        return f"recall@{self.k} against exact: {', '.join(parts)} (looking into {self.nprobes} partitions)"


class Store:
    """An index that is there. `open_store` and `create_store` make one.

    Every reading method sees the version that was the last one at opening, or at this object's own commit.
    """

    def __init__(self, location: str, table: Any) -> None:
        self.location, self._table = location, table
        written = (table.schema.metadata or {}).get(_FACTS)
        if written is None:
            raise ValueError(f"{location} is a LanceDB database, and not one that `miniclip index` wrote")
        facts = json.loads(written)
        if facts.get("format") != Facts.format:
            raise ValueError(f"{location} has the format {facts.get('format')} of a newer miniclip; install that")
        self.facts = Facts(**facts)
        self._times: dict[int, str] = {}

    def __len__(self) -> int:
        return self._table.count_rows()

    @property
    def id(self) -> str:
        """Of this table, and of no other that is made at the same place."""
        if (written := self.schema.metadata.get(_ID)) is not None:
            return written.decode()
        # Tables from before there were ids: one for each version, which takes a look at all of them.
        version = self._table.version
        if version not in self._times:
            times = [each["timestamp"] for each in self._table.list_versions() if each["version"] == version]
            self._times = {version: str(times)}
        return self._times[version]

    @property
    def state(self) -> tuple[str, int]:
        """What is read: the table's id, and its version."""
        return self.id, self._table.version

    @property
    def schema(self) -> Any:
        return self._table.schema

    @property
    def dim(self) -> int:
        """E"""
        return self.schema.field("features").type.list_size

    @property
    def feature_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.schema.field("features").type.value_type.to_pandas_dtype())

    @property
    def metadata_columns(self) -> list[str]:
        return [name for name in self.schema.names if name not in (*OWN_COLUMNS, _SPARE)]

    def newest(self) -> Store:
        """The index at its newest version, or the one that was made anew at its place; this one, if nothing changed.

        Raises:
            ValueError: there is none any more.
        """
        # Opened anew: an open table's `checkout_latest` stays with what it knows where the newest has a lower number.
        found = open_store(self.location)
        return self if found.state == self.state else found

    # -----------------------------------------------------------------------------------------------------------------
    # Reading

    def read(self, columns: Sequence[str], where: str | None = None) -> Any:
        """An Arrow table of the columns of all rows, or of those that a filter in SQL accepts; `_rowid` is their id.

        Raises:
            ValueError: the filter can't be followed, or a file of the index can't be read.
        """
        with self._read_errors(where):
            return self._scan(columns, where).limit(None).to_arrow()

    def check_filter(self, where: str) -> None:
        """Raises ValueError if a filter can't be followed, before anything is read."""
        if not where.strip():
            raise ValueError(f"the filter is empty; {columns_of(self.schema)}")
        with self._read_errors(where):
            self._scan(["key"], where).limit(1).to_arrow()
        # LanceDB's parser stops behind a condition and ignores the rest. A text that is whole both in parentheses and
        # in a CAST is one condition: what closes the one from within leaves the other open. A comment ends at its line.
        for whole in (f"({where}\n)", f"CAST({where}\n AS BOOLEAN)"):
            try:
                self._scan(["key"], whole).explain_plan()
            except (ValueError, RuntimeError) as error:
                if "Error parsing" in str(error):  # else only its type, as regexp_match's is a list in a CAST
                    raise ValueError(
                        f"the filter {where!r} goes on behind a condition that is complete; it must be one condition, "
                        "whose parts AND or OR joins, without ORDER BY, LIMIT or a semicolon"
                    ) from error

    def num_by_source(self) -> dict[str, int]:
        return dict(Counter(map(restored, self.read(["source"])["source"].to_pylist())))

    def blocks(self, where: str | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Row ids (n,) and their features (n, E), float16 or float32, block by block."""
        with self._read_errors(where):
            for batch in self._scan(["features"], where).to_batches(_ROWS_OF_BLOCK):
                features = batch.column("features").flatten().to_numpy(zero_copy_only=False)
                yield batch.column("_rowid").to_numpy(), features.reshape(batch.num_rows, self.dim)

    def take(self, row_ids: Sequence[int] | np.ndarray, columns: Sequence[str]) -> Any:
        """An Arrow table of some rows, in the order of their ids as given."""
        ids = [int(row_id) for row_id in row_ids]
        if not ids:
            return self.schema.empty_table().select(list(columns))
        with self._read_errors():
            found = self._table.take_row_ids(list(dict.fromkeys(ids))).with_row_id().select(list(columns)).to_arrow()
        place = {row_id: number for number, row_id in enumerate(found["_rowid"].to_pylist())}
        return found.select(list(columns)).take([place[row_id] for row_id in ids])

    def features(self, row_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n, E) of some rows, in the order of their ids as given."""
        column = self.take(row_ids, ["features"])["features"].combine_chunks()
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(row_ids), self.dim)

    def as_features(self, features: np.ndarray) -> Any:
        """An Arrow array for the table's column of features (n, E)."""
        import pyarrow as pa

        kind = self.schema.field("features").type
        flat = features.astype(kind.value_type.to_pandas_dtype(), copy=False).reshape(-1)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind)

    def _scan(self, columns: Sequence[str], where: str | None) -> Any:
        scan = self._table.search().with_row_id(True).select(list(columns))
        return scan if where is None else scan.where(with_key_for_path(where, self.schema))

    @contextmanager
    def _read_errors(self, where: str | None = None) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError, OSError) as error:
            # A filter fails when it is read or, as 1 / 0, when it is computed; all else is the index.
            if where is None or not (isinstance(error, ValueError) or "Query Execution error" in str(error)):
                raise _unreadable(self.location, "read", error) from error
            wrong = what_is_wrong(where, _reason_of(error), self.schema)
            raise ValueError(f"the filter {where!r} can't be followed: {wrong}") from error

    # -----------------------------------------------------------------------------------------------------------------
    # The approximate index

    @property
    def approximate(self) -> Approximate | None:
        """The approximate index, if there is one that was measured."""
        written = (self.schema.field("features").metadata or {}).get(_APPROXIMATE)
        if written is None or not any(index.columns == ["features"] for index in self._table.list_indices()):
            return None
        return Approximate(**json.loads(written))

    def build_approximate(self) -> int:
        """Partitions all features, and keeps a short code of each (IVF-PQ); returns the number of partitions.

        Until it is measured, and `approximate` is set, no search uses it.
        """
        from lancedb.index import IvfPq

        num_partitions = max(1, min(round(len(self) ** 0.5 / 4), len(self) // _FEWEST_OF_PARTITION))
        self._set_approximate(None)
        with self._write_errors():
            config = IvfPq(distance_type="dot", num_partitions=num_partitions, max_iterations=20)
            self._table.create_index("features", config=config, replace=True)
        return num_partitions

    def set_approximate(self, measured: Approximate) -> None:
        self._set_approximate(json.dumps(asdict(measured)))

    def _set_approximate(self, written: str | None) -> None:
        self._set_of_fields(_APPROXIMATE, {"features": written})

    def search_approximate(
        self, queries: np.ndarray, k: int, nprobes: int, refined: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and cosines of about the k rows nearest to each query (Q, E), as `nearest` gives them."""
        for query in queries:
            search = self._table.search(query, vector_column_name="features").distance_type("dot")
            search = search.minimum_nprobes(nprobes).maximum_nprobes(nprobes).refine_factor(refined).limit(k)
            search = search.with_row_id(True).select(["_distance"])
            with self._read_errors():
                found = search.to_arrow()
            yield found["_rowid"].to_numpy(), 1 - found["_distance"].to_numpy()

    # -----------------------------------------------------------------------------------------------------------------
    # Writing

    def add_columns(self, fields: Sequence[Any]) -> None:
        """Adds columns of Arrow's types, which are null so far."""
        if not fields:
            return
        with self._write_errors():
            self._table.add_columns(list(fields))

    def widen_column(self, name: str, kind: Any) -> None:
        """Gives a column a type of Arrow's for which `can_widen` holds. One version has both, so that a kill leaves the
        column in one of them, and perhaps the spare one, which nobody reads."""
        with self._write_errors():
            self.drop_spare()
            # Lance itself widens no whole numbers to floats.
            self._table.add_columns({_SPARE: f"arrow_cast(`{name}`, '{_sql_type(kind)}')"})
            self._set_of_fields(_SOURCES, {_SPARE: json.dumps(sorted(self._sources_of_columns()[name]))})
            self._table.alter_columns({"path": f"`{name}`", "rename": _SPARE}, {"path": _SPARE, "rename": name})
            self.drop_spare()

    def drop_spare(self) -> None:
        """Deletes what a killed `widen_column` left."""
        if _SPARE in self.schema.names:
            with self._write_errors():
                self._table.drop_columns([_SPARE])

    def columns_of(self, source: str) -> set[str]:
        """The columns that a source brought at its last update."""
        return {name for name, sources in self._sources_of_columns().items() if source in sources}

    def set_columns_of(self, source: str, columns: Set[str]) -> None:
        sources = self._sources_of_columns()
        changed = sorted(name for name, names in sources.items() if (source in names) != (name in columns))
        self._set_of_fields(_SOURCES, {name: json.dumps(sorted(sources[name] ^ {source})) for name in changed})

    def _sources_of_columns(self) -> dict[str, set[str]]:
        """Of each column of metadata, the sources that have it."""
        schema = self.schema
        fields = {name: schema.field(name).metadata or {} for name in self.metadata_columns}
        return {name: {*json.loads(metadata.get(_SOURCES, "[]"))} for name, metadata in fields.items()}

    def _set_of_fields(self, name: bytes, values: Mapping[str, str | None]) -> None:
        """One version: an entry of several columns' metadata."""
        updates = [{"path": f"`{column}`", "metadata": {name.decode(): value}} for column, value in values.items()]
        if updates:
            with self._write_errors():
                self._table.update_field_metadata(*updates)

    def put(self, rows: Any) -> None:
        """One version: the rows of an Arrow table of this schema replace those of the same keys, or are added."""
        with self._write_errors():
            self._table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def delete(self, keys: Sequence[str]) -> None:
        """One version without the rows of these keys."""
        with self._write_errors():
            self._table.delete(f"key IN ({', '.join(quoted(storable(key)) for key in keys)})")

    def clean(self) -> None:
        """Joins small pieces of the table once there are many, adds new rows to the approximate index, and deletes old
        versions, also what a killed writer left."""
        is_alone = not is_url(self.location)
        small = self._table.stats()["fragment_stats"]["num_small_fragments"]
        is_due = small >= _MOST_FRAGMENTS or len(self._table.list_versions()) >= _MOST_FRAGMENTS
        if not is_due:
            return
        with self._write_errors(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*cleanup_older_than.*")
            grace = timedelta(0) if is_alone else _REMOTE_GRACE
            self._table.optimize(cleanup_older_than=grace, delete_unverified=is_alone)

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"the index {self.location} can't be written: {_reason_of(error)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Opening


def open_store(location: str | Path) -> Store:
    """
    Raises:
        ValueError: there is no index.
    """
    location = settled(location)
    if (table := _table_at(location)) is None:
        raise ValueError(f"there is no index at {location}; `miniclip index SRC {location} --model M` makes one")
    return Store(location, table)


def find_store(location: str | Path) -> Store | None:
    """The index, or None if there is nothing yet.

    Raises:
        ValueError: something else is there.
    """
    location = settled(location)
    if (table := _table_at(location)) is not None:
        return Store(location, table)
    path = Path(location)
    if not is_url(location) and path.exists() and not (path.is_dir() and _is_empty(path)):
        raise ValueError(f"{location} is there and is no index; choose a new name for the index, or an empty folder")
    return None


def create_store(location: str | Path, facts: Facts, dim: int, dtype: str = "float32") -> Store:
    """A new index without rows.

    Args:
        dtype: "float32", or "float16", which takes half the room and changes cosines by less than 0.001.
    """
    import pyarrow as pa

    location = settled(location)
    schema = pa.schema(
        [
            pa.field("key", pa.string(), nullable=False, metadata=_PRIMARY_KEY),
            pa.field("path", pa.string()),
            pa.field("source", pa.string()),
            pa.field("stamp", pa.string()),
            pa.field("content", pa.string()),
            pa.field("features", pa.list_({"float32": pa.float32(), "float16": pa.float16()}[dtype], dim)),
        ],
        metadata={_FACTS: json.dumps(asdict(facts)), _ID: uuid.uuid4().hex},
    )
    if not is_url(location):
        Path(location).mkdir(parents=True, exist_ok=True)
    try:
        return Store(location, _connect(location).create_table(_TABLE, schema=schema))
    except (RuntimeError, ValueError, OSError) as error:
        if (store := find_store(location)) is not None:  # another process was faster
            return store
        raise ValueError(f"the index {location} can't be made: {_reason_of(error)}") from error


@contextmanager
def writing(location: str | Path) -> Iterator[None]:
    """Keeps other processes from writing to an index; on S3, LanceDB alone keeps their commits apart.

    Raises:
        ValueError: another process writes, or nobody can.
    """
    location = settled(location)
    if is_url(location):
        yield
        return
    is_new = not Path(location).exists()
    try:
        with ExitStack() as stack:
            try:
                busy = f"another process is updating {location}; run the command again when that is done"
                stack.enter_context(locked(Path(location) / _LOCK, busy, patience_s=0))
            except OSError as error:
                raise ValueError(f"the index {location} can't be written: {error.strerror or error}") from error
            yield
    finally:
        if is_new:
            with suppress(OSError):
                Path(location).rmdir()  # nothing came of it


def settled(location: str | Path) -> str:
    if is_url(str(location)):
        return lower_scheme(str(location)).rstrip("/")
    return str(Path(os.path.abspath(expand_home(location))))  # noqa: PTH100


def can_widen(kind: Any) -> bool:
    """Whether a column that has values can be given a wider type."""
    from pyarrow import types

    return types.is_float64(kind) or types.is_decimal128(kind) or types.is_timestamp(kind)


def _sql_type(kind: Any) -> str:
    """A type of Arrow's for which `can_widen` holds, as DataFusion's `arrow_cast` has it."""
    from pyarrow import types

    if types.is_timestamp(kind):
        unit = {"s": "Second", "ms": "Millisecond", "us": "Microsecond", "ns": "Nanosecond"}[kind.unit]
        zone = "None" if kind.tz is None else f'Some("{kind.tz}")'
        return f"Timestamp({unit}, {zone})"
    return f"Decimal128({kind.precision}, {kind.scale})" if types.is_decimal128(kind) else "Float64"


def _is_empty(path: Path) -> bool:
    # A table without a version, and a lock, are what a process that was killed while it made the index left.
    return not any(each.name not in (f"{_TABLE}.lance", _LOCK) for each in path.iterdir())


def _table_at(location: str) -> Any:
    if not is_url(location) and not any(Path(location).glob(f"{_TABLE}.lance/_versions/*.manifest")):
        return None
    try:
        return _connect(location).open_table(_TABLE)
    except ValueError as error:
        if "not found" in str(error):
            return None
        raise _unreadable(location, "opened", error) from error
    except (RuntimeError, OSError) as error:
        raise _unreadable(location, "opened", error) from error


def _unreadable(location: str, what: str, error: Exception) -> ValueError:
    return ValueError(
        f"the index {location} can't be {what}: {_reason_of(error)}; if a file of it is damaged or missing, delete the "
        f"folder and make it anew: miniclip index SRC {location} --model M"
    )


def _connect(location: str) -> Any:
    os.environ.setdefault("LANCEDB_LOG", "error")  # what it warns of is for programmers
    try:
        import lancedb
    except ImportError as error:
        raise ValueError(f"an index needs LanceDB ({error}); pip install 'miniclip[search]' brings it") from error
    return lancedb.connect(location, storage_options=_storage_options(location))


def _storage_options(location: str) -> dict[str, str] | None:
    """What LanceDB needs beside the variables of AWS that it reads itself: permission for a server without TLS."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if not location.startswith("s3://") or not endpoint:
        return None
    return {"endpoint": endpoint, "allow_http": str(endpoint.lower().startswith("http://")).lower()}


def storable(name: str) -> str:
    """A name with its bytes that are no UTF-8 as \\udc..; one that reads so itself gets another escape.

    >>> storable("caf\\udce9"), storable(r"caf\\udce9")
    ('caf\\\\udce9', 'caf\\\\u005cudce9')
    """
    return _ESCAPED.sub(r"\\u005c\1", name).encode("utf-8", "backslashreplace").decode()


def restored(name: str) -> str:
    """The name of which `storable` made this one."""
    return _ESCAPED.sub(lambda found: _unescaped(found[1]), name)


def _unescaped(escape: str) -> str:
    return "\\" + escape.removeprefix("u005c") if escape.startswith("u005c") else chr(int(escape[1:], 16))


def quoted(text: str) -> str:
    """A text as SQL writes it."""
    return "'" + text.replace("'", "''") + "'"


def _reason_of(error: Exception) -> str:
    """LanceDB's message without the places in its own code."""
    text = re.sub(r"(,|;)?\s*/\S+\.rs:\d+(:\d+)?", "", str(error))
    text = re.sub(r"\. Valid fields are .*", "", text)
    if "temp dir" in text:  # for what a commit sorts; Rust takes the variable, else this folder, and looks no further
        temporary = os.environ.get("TMPDIR") or "/tmp"
        return f"no temporary folder can be made in {temporary}; set TMPDIR to a folder that can be written"
    text = re.sub(
        r"^(Invalid input, |lance error: |LanceError\(IO\): |Schema error: |RuntimeError: )+", "", text.strip()
    )
    return text.splitlines()[0].rstrip(". ,") if text else type(error).__name__
