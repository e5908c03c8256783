"""One update of an index: what is to be done, and its commits, in an order in which a kill at any moment does no harm.

Rows whose features are known come first, while the rows that they take them from are there; then what is encoded, batch
by batch; rows that are gone are deleted last. Each commit leaves an index that is right about the pictures it names.

n pictures of a commit, E embedding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch.nn.functional as F

from ...data.reading.scan import LeftOut
from ...evaluation.encoder import Encoder
from ...evaluation.features import encode_in_batches
from .changes import At, Changes, Known, Listing, find_changes, keys_from_before
from .columns import as_columns, column_names
from .store import NAMES, Store, restored, storable

T = TypeVar("T")
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]  # for something, of a total number

_SECONDS_BETWEEN_COMMITS = 10.0  # as much work as a kill may cost
_ROWS_OF_COMMIT = 4096


@dataclass(frozen=True)
class Updated:
    """What an update did or would do, in numbers of pictures.

    Args:
        new, changed: were encoded.
        moved: have the content of a picture that was known under another name, and got its features.
        touched: the same picture with another time or other metadata.
        gone: were removed.
        unchanged: stayed as they are.
        problems: why pictures could not be read, or were left for the next update.
        unreachable: keys of pictures that can't be looked at, and stay in the index.
        left_out: what of the sources is no picture.
        renamed: which columns of the sources have another name in the index, and which pictures got another key.
    """

    new: int
    changed: int
    moved: int
    touched: int
    gone: int
    unchanged: int
    problems: Sequence[str] = ()
    unreachable: Sequence[str] = ()
    left_out: Sequence[LeftOut] = ()
    renamed: Sequence[str] = ()


@dataclass
class Plan:
    """What is to be done with the pictures of some sources.

    Args:
        table: the rows that the index has, without features, as `changes` numbers them; None for a new index.
        row_of: the rows by the keys that their pictures have now.
        renamed: those keys, by the ones that an earlier version gave.
    """

    listings: Sequence[Listing]
    changes: Changes
    table: Any = None
    row_of: dict[str, int] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)

    def updated(self) -> Updated:
        """What it would do."""
        changes, there = self.changes, [] if self.table is None else self.table.column_names
        first = next(iter(self.renamed.items()), None)
        return Updated(
            len(changes.new),
            len(changes.changed),
            len(changes.moved),
            len(changes.touched),
            len(changes.gone),
            changes.unchanged,
            unreachable=changes.unreachable,
            left_out=changes.left_out,
            renamed=[
                *(
                    f"column {name!r} of {listing.source} is {column} in the index"
                    for listing in self.listings
                    for name, column in column_names(listing.data.metadata, there).items()
                    if name != column
                ),
                *([f"{len(self.renamed):,} pictures have another key: {first[0]} is {first[1]}"] if first else []),
            ],
        )


def make_plan(listings: Sequence[Listing], store: Store | None, accept_gone: bool = False) -> Plan:
    """
    Raises:
        ValueError: as `find_changes` and `as_columns`.
    """
    if store is None:
        _columns_of(listings, None)  # refuses values before anything is encoded
        return Plan(listings, find_changes(listings, Known([], [], [], [], [])))
    table = store.read([name for name in store.schema.names if name != "features"])
    names = ([name and restored(name) for name in table[column].to_pylist()] for column in NAMES)
    known = Known(*names, *(table[name].to_pylist() for name in ("stamp", "content")))
    listed = keys_from_before(listings, known)
    renamed = {known.keys[row]: listings[number].keys[index] for row, (number, index) in listed.items()}
    known = replace(known, keys=[renamed.get(key, key) for key in known.keys])
    row_of = {key: row for row, key in enumerate(known.keys)}
    other_facts = _other_facts(listings, row_of, table, store) | {*listed.values()}
    changes = find_changes(listings, known, other_facts, accept_gone=accept_gone)
    return Plan(listings, changes, table, row_of, renamed)


def _other_facts(listings: Sequence[Listing], row_of: dict[str, int], table: Any, store: Store) -> set[At]:
    """The pictures whose metadata are not those of their row."""
    found: set[At] = set()
    every = _columns_of(listings, store)
    from_later = _from_later(listings, every)
    for number, (listing, columns) in enumerate(zip(listings, every, strict=True)):
        pairs = [(index, row_of[key]) for index, key in enumerate(listing.keys) if columns and key in row_of]
        for name, values in columns.items():
            now = _taken(values, [index for index, _ in pairs]).to_pylist()
            is_known = name in table.column_names
            before = _taken(table[name], [row for _, row in pairs]).to_pylist() if is_known else [None] * len(now)
            others = {(number, index) for (index, _), a, b in zip(pairs, now, before, strict=True) if a != b}
            found |= others - from_later.get(name, {}).keys()
    for name, values in from_later.items():
        for at, value in values.items():
            row = row_of.get(listings[at[0]].keys[at[1]])
            if row is not None and value != (table[name][row].as_py() if name in table.column_names else None):
                found.add(at)
    return found


def _columns_of(listings: Sequence[Listing], store: Store | None) -> list[dict[str, Any]]:
    """The metadata of each listing as `as_columns` has them, null in the columns that its source no longer has."""
    import pyarrow as pa

    every = as_columns([(listing.source, listing.data.metadata) for listing in listings], store)
    if store is not None:
        kinds = {name: values.type for columns in every for name, values in columns.items()}
        for listing, columns in zip(listings, every, strict=True):
            for name in store.columns_of(listing.source) - set(columns):
                columns[name] = pa.nulls(len(listing.keys), kinds.get(name, store.schema.field(name).type))
    return every


def _from_later(listings: Sequence[Listing], columns: Sequence[Mapping[str, Any]]) -> dict[str, dict[At, Any]]:
    """By column, what listings say of pictures that an earlier one has as well, where those before say nothing."""
    found: dict[str, dict[At, Any]] = {}
    first: dict[str, At] = {}
    for number, listing in enumerate(listings if len(listings) > 1 else ()):
        ats = [first.setdefault(key, (number, index)) for index, key in enumerate(listing.keys)]
        shared = [(index, at) for index, at in enumerate(ats) if at[0] != number]
        for name, values in columns[number].items():
            known = found.setdefault(name, {})
            for (_, at), value in zip(shared, _taken(values, [index for index, _ in shared]).to_pylist(), strict=True):
                own = columns[at[0]].get(name)
                if (own is None or not own[at[1]].is_valid) and known.get(at) is None:
                    known[at] = value
    return found


class Update:
    """Carries a plan out.

    Args:
        store: None for a new index, which `create` makes once it is known how wide features are.
    """

    def __init__(self, plan: Plan, store: Store | None, create: Callable[[int], Store]) -> None:
        self.plan, self._known_store, self._create = plan, store, create
        self.problems: list[str] = []
        self._num_new = self._num_changed = 0
        self._columns: list[dict[str, Any]] = []  # of each listing
        self._from_later: dict[str, dict[At, Any]] = {}

    @property
    def store(self) -> Store:
        assert self._known_store is not None
        return self._known_store

    def updated(self) -> Updated:
        return replace(self.plan.updated(), new=self._num_new, changed=self._num_changed, problems=tuple(self.problems))

    # -----------------------------------------------------------------------------------------------------------------
    # Stations

    def take_over(self) -> None:
        """Commits the pictures whose features are known."""
        plan, moved = self.plan, self.plan.changes.moved
        if not moved and not plan.changes.touched:
            return
        names = {at: plan.listings[at[0]].keys[at[1]] for at in moved}
        added = [at for at in moved if names[at] not in plan.row_of]
        replacing = [at for at in moved if names[at] in plan.row_of]
        features = self._features_of([moved[at] for at in replacing])  # before any of these rows is replaced
        for part in _parts(added):
            self._commit(part, self._features_of([moved[at] for at in part]))
        for places in _parts(range(len(replacing))):
            self._commit([replacing[place] for place in places], features[places])
        for part in _parts(list(plan.changes.touched)):
            self._commit(part, self._features_of([plan.changes.touched[at] for at in part]))

    def encode(
        self,
        encoder: Encoder,
        *,
        batch_size: int,
        num_workers: int,
        rows_per_commit: int,
        progress: Progress | None,
    ) -> None:
        """Encodes and commits the new and the changed pictures.

        Raises:
            ValueError: none can be read, and the index is a new one.
        """
        total = len(self.plan.changes.new) + len(self.plan.changes.changed)
        waiting: list[tuple[list[At], np.ndarray]] = []
        committed_at, done = time.monotonic(), 0
        with progress("encoding", total) if progress else nullcontext() as show:
            for pictures, features, problems in self._encoded(encoder, batch_size, num_workers):
                waiting.append((pictures, features))
                self.problems += problems
                done += len(pictures) + len(problems)
                is_due = sum(len(each) for each, _ in waiting) >= rows_per_commit
                if is_due or time.monotonic() - committed_at > _SECONDS_BETWEEN_COMMITS:
                    self._commit_encoded(waiting)
                    waiting, committed_at = [], time.monotonic()
                if show:
                    show(done)
        self._commit_encoded(waiting)
        if self._known_store is None:
            raise ValueError(f"none of the {total:,} pictures can be read, so there is no index; {self.problems[0]}")

    def remove(self) -> None:
        """Deletes what is gone, and tidies up."""
        if self._known_store is None:
            return
        for listing in self.plan.listings:
            columns = {*column_names(listing.data.metadata, self.store.schema.names).values()}
            self.store.set_columns_of(listing.source, columns & {*self.store.metadata_columns})
        for part in _parts([*self.plan.changes.gone, *self.plan.renamed]):
            self.store.delete(part)
        self.store.clean()

    # -----------------------------------------------------------------------------------------------------------------
    # Steps

    def _encoded(
        self, encoder: Encoder, batch_size: int, num_workers: int
    ) -> Iterator[tuple[list[At], np.ndarray, list[str]]]:
        """Pictures with their unit features (n, E), and why others have none; changed ones of those are gone."""
        changes = self.plan.changes
        changed = set(changes.changed)
        for number, listing in enumerate(self.plan.listings):
            indices = sorted(index for each, index in [*changes.new, *changes.changed] if each == number)
            for batch in encode_in_batches(
                encoder.encode_image,
                encoder.preprocess,
                listing.data,
                indices,
                batch_size=batch_size,
                num_workers=num_workers,
            ):
                changes.gone += [listing.keys[index] for index in batch.problems if (number, index) in changed]
                pictures = [(number, int(index)) for index in batch.indices]
                yield pictures, F.normalize(batch.features, dim=-1).numpy(), list(batch.problems.values())

    def _commit_encoded(self, waiting: Sequence[tuple[list[At], np.ndarray]]) -> None:
        pictures = [at for each, _ in waiting for at in each]
        if not pictures:
            return
        features = np.concatenate([rows for _, rows in waiting])
        if self._known_store is None:
            self._known_store = self._create(features.shape[1])
        kept = [place for place, (number, index) in enumerate(pictures) if self._is_as_listed(number, index)]
        self._commit([pictures[place] for place in kept], features[kept])
        changed = set(self.plan.changes.changed)
        num_changed = sum(pictures[place] in changed for place in kept)
        self._num_changed += num_changed
        self._num_new += len(kept) - num_changed

    def _is_as_listed(self, number: int, index: int) -> bool:
        listing = self.plan.listings[number]
        if not listing.has_changed(index):
            return True
        self.problems.append(f"{listing.keys[index]} changed while it was read; the next update takes it")
        return False

    def _features_of(self, rows: Sequence[int]) -> np.ndarray:
        ids = self.plan.table["_rowid"].to_numpy() if self.plan.table is not None else np.zeros(0, dtype=np.uint64)
        return self.store.features(ids[list(rows)])

    def _commit(self, pictures: Sequence[At], features: np.ndarray) -> None:
        """One version with the rows of pictures (n) with unit features (n, E)."""
        import pyarrow as pa

        if not pictures:
            return
        if not self._columns:
            self._columns = self._made_columns()
            self._from_later = _from_later(self.plan.listings, self._columns)
        parts = []
        for number in sorted({each for each, _ in pictures}):
            places = [place for place, (each, _) in enumerate(pictures) if each == number]
            parts.append(self._rows(number, [pictures[place][1] for place in places], features[places]))
        self.store.put(pa.concat_tables(parts))

    def _made_columns(self) -> list[dict[str, Any]]:
        """The metadata of each listing, after the index got the columns that it lacked, and the types."""
        import pyarrow as pa

        store = self.store
        store.drop_spare()
        found = _columns_of(self.plan.listings, store)
        kinds = {name: values.type for columns in found for name, values in columns.items()}
        there = {field.name: field.type for field in store.schema}
        store.add_columns([pa.field(name, kind) for name, kind in kinds.items() if name not in there])
        for name, kind in kinds.items():
            if there.get(name, kind) != kind:
                store.widen_column(name, kind)
        for listing, columns in zip(self.plan.listings, found, strict=True):
            # Noted before there are rows with them, and forgotten when none is left: a killed update forgets none.
            store.set_columns_of(listing.source, {*columns})
        return found

    def _rows(self, number: int, indices: Sequence[int], features: np.ndarray) -> Any:
        import pyarrow as pa

        plan, listing, schema = self.plan, self.plan.listings[number], self.store.schema
        # Features go by content; all else that is known of a picture goes by its name.
        known_rows = [plan.row_of.get(listing.keys[index]) for index in indices]
        computed = plan.changes.contents
        missing = [index for index in indices if (number, index) not in computed]
        contents = dict(zip(missing, listing.contents(missing), strict=True))
        columns: dict[str, Any] = {
            "key": [storable(listing.keys[index]) for index in indices],
            "path": [None if (path := listing.paths[index]) is None else storable(path) for index in indices],
            # A picture belongs to the source that brought it first.
            "source": [
                storable(listing.source) if row is None else plan.table["source"][row].as_py() for row in known_rows
            ],
            "stamp": [listing.stamps[index] for index in indices],
            "content": [computed.get((number, index), contents.get(index)) for index in indices],
            "features": self.store.as_features(features),
        }
        for name in self.store.metadata_columns:
            if name in self._columns[number]:
                columns[name] = _taken(self._columns[number][name], indices)
            elif plan.table is not None and name in plan.table.column_names:
                columns[name] = _taken(plan.table[name], known_rows).combine_chunks().cast(schema.field(name).type)
            else:
                columns[name] = pa.nulls(len(indices), schema.field(name).type)
            if later := self._from_later.get(name):
                pairs = zip(indices, columns[name].to_pylist(), strict=True)
                columns[name] = [later.get((number, index), value) for index, value in pairs]
        arrays = [
            pa.array(columns[name], schema.field(name).type) if isinstance(columns[name], list) else columns[name]
            for name in schema.names
        ]
        return pa.table(arrays, schema=schema.remove_metadata())


def _taken(values: Any, places: Sequence[int | None]) -> Any:
    """Arrow's values at some places, null at None; of none, too, where a plain list would have no type."""
    import pyarrow as pa

    return values.take(pa.array(places, pa.int64()))


def _parts(values: Sequence[T]) -> Iterable[list[T]]:
    for start in range(0, len(values), _ROWS_OF_COMMIT):
        yield list(values[start : start + _ROWS_OF_COMMIT])
