"""An index of pictures that follows what lies in its sources, and answers by words and by pictures.

    index = miniclip.Index("photos.index", model="ViT-B/32")
    index.update("photos")
    index.search("a red car", topk=5)

Q queries, K hits of each, E embedding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...common.arguments import (
    FLOAT32,
    check_count,
    check_list,
    check_number,
    check_path,
    check_precision,
    check_texts,
    shown,
)
from ...common.files import expand_home, free_memory
from ...common.storage import is_url
from ...evaluation.datasets.sets import EvaluationSet
from ...evaluation.encoder import Encoder
from ...evaluation.features import encode_in_batches, encode_texts
from ...evaluation.measures.ties import SAME
from ...evaluation.other_libraries import OPENCLIP_PREFIX, PYTHON_PREFIX, TRANSFORMERS_PREFIX, as_encoder, open_model
from ...evaluation.prompts import classname_set
from ..sources import image_set
from ..thresholds import CalibratedModel
from .changes import Listing, file_stamp, list_sources
from .nearest import TIES, Blocks, goes_on, levels, near_duplicates, nearest
from .store import DTYPES, NAMES, Approximate, Facts, Store, create_store, find_store, open_store, restored, writing
from .updating import Progress, Update, Updated, make_plan

T = TypeVar("T")

CHANGED = "changed since it was indexed"
_SAME_FEATURE = 0.005  # between unit features of one picture by one model on two machines, at most
_SMALLEST_SUM = 1e-3  # of unit vectors that do not cancel each other
_FILTERED_AT_ONCE = 1 << 16
_FEWEST_APPROXIMATE = 1000
_SAMPLED_QUERIES = 100  # of each kind
_MORE_TIES = 16  # times as many rows are looked at where ties go on behind the last


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    Args:
        key: the path, the URL, or the place in a table or in shards.
        path: the path or the URL, where there is one.
        source: where it was found: a folder, a pattern, a table, …
        metadata: what else the index knows of it.
        stamp, content: by which `has_changed` knows the picture again.
    """

    key: str
    path: str | None
    source: str
    cosine: float
    metadata: Mapping[str, Any]
    stamp: str = field(default="", repr=False)
    content: str | None = field(default=None, repr=False)


class Index:
    """An index on a disk or on S3 (`s3://bucket/photos.index`).

    Args:
        location: of an index, or where the first `update` makes one.
        model: the name or path of one, as `open_model` takes it, or an `Encoder`; by default the index's own, which is
            opened when it is needed.
        device: of the model; by default a GPU if there is one.
        precision: of the model's products, "float32" or "bf16". By default as the index does that is there, and a new
            one has float32.
        upright: turn pictures as EXIF says that viewers show them, those of queries too. By default as the index does
            that is there, and a new one does not.
        memory_bytes: features stay in memory up to this size, and are read for each search beyond it; by default half
            of what is free.

    Raises:
        ValueError: there is no index, and no model to make one with; something else is there; or an index that is not
            as `upright` asks.
    """

    def __init__(
        self,
        location: str | Path,
        model: str | Path | Encoder | None = None,
        *,
        device: str | None = None,
        precision: str | None = None,
        upright: bool | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        self.location = check_path("location", location)
        if model is not None and not isinstance(model, str | Path | Encoder):
            raise ValueError(
                f"model is {shown(model)}; it must be a name or path, by which the index opens it again, or an Encoder"
            )
        if memory_bytes is not None:
            memory_bytes = check_count("memory_bytes", memory_bytes, 0)
        self._known_store = open_store(location) if model is None else find_store(location)
        self._model, self._device, self._precision, self._upright = model, device, precision, upright
        _ = self.upright, self.precision
        self._memory_bytes = _memory_for_features() if memory_bytes is None else memory_bytes
        self._encoder: Encoder | None = None
        self._checked: Facts | None = None  # of the index whose model the encoder was found to be
        # By source, those that hold pictures without a path, with the source's stamp.
        self._listings: dict[str, tuple[str, Listing]] = {}
        self._held: tuple[tuple[str, int], np.ndarray, Tensor] | None = None  # the state, ids and features of all rows

    def __len__(self) -> int:
        return 0 if self._known_store is None else len(self._known_store)

    @property
    def store(self) -> Store:
        """
        Raises:
            ValueError: nothing was indexed so far.
        """
        if self._known_store is None:
            self._known_store = open_store(self.location)
        return self._known_store

    @property
    def upright(self) -> bool:
        """Whether pictures are turned as EXIF says."""
        if self._known_store is None:
            return bool(self._upright)
        found = self._known_store.facts.upright
        if self._upright not in (None, found):
            raise ValueError(
                f"the index {self.location} was made with{'' if found else 'out'} --upright, and all of its pictures "
                f"are {'turned upright' if found else 'read as they are stored'}; make a new index for the other way"
            )
        return found

    @property
    def precision(self) -> str:
        """Of the model's products."""
        asked = None if self._precision is None else check_precision(self._precision)
        if isinstance(self._model, Encoder):
            asked = as_encoder(self._model, precision=asked).precision
        if self._known_store is None:
            return FLOAT32 if asked is None else asked
        found = self._known_store.facts.precision
        if asked not in (None, found):
            raise ValueError(
                f"the index {self.location} was made in {found}, and {asked} is asked for, whose features are others; "
                f"leave the precision out, open the model in {found}, or make a new index"
            )
        return found

    @property
    def encoder(self) -> Encoder:
        """The model, opened and found to be the one that the index was made with.

        Raises:
            ValueError: it can't be opened, or is another one.
        """
        if self._encoder is None:
            self._encoder = self._opened()
        if self._known_store is not None and self._checked != self._known_store.facts:
            check_model(self._encoder, self._known_store)
            self._checked = self._known_store.facts
        return self._encoder

    def _opened(self) -> Encoder:
        if isinstance(self._model, Encoder):
            return self._model
        if self._model is not None:
            return open_model(str(self._model), self._device, self.precision)
        name = self.store.facts.model
        try:
            return open_model(name, self._device, self.precision)
        except ValueError as error:
            raise ValueError(
                f"{error} (the index {self.location} was made with {name}; if that lies elsewhere now, name its model)"
            ) from error

    def _follow(self, store: Store | None) -> None:
        """Goes on with the index as it is now; nothing of another one, which was at its place before, is kept."""
        before, self._known_store = self._known_store, store
        if before is not None and store is not before:
            self._listings = {}
            if store is None or store.facts != before.facts:
                self._encoder = None  # of another model, or in another precision
        _ = self.upright, self.precision

    # -----------------------------------------------------------------------------------------------------------------
    # Update

    def update(
        self,
        sources: str | Path | Sequence[str | Path],
        *,
        dry_run: bool = False,
        accept_gone: bool = False,
        dtype: str = "float32",
        image_column: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        rows_per_commit: int = 4096,
        progress: Progress | None = None,
        stdin: BinaryIO | None = None,
    ) -> Updated:
        """Finds the pictures of the sources that are new, changed, moved or gone, and encodes the new and changed ones.

        What is done is committed every ten seconds, or after `rows_per_commit` pictures. An update that is killed loses
        what came after its last commit, and the next one goes on from there.

        Args:
            sources: paths, folders, patterns, tables, shards, URLs, `-`, as `image_set` takes them. A source answers
                for the pictures that it brought and, if it is a folder, for all below it: those that it no longer has
                are gone. Pictures named one by one are gone when their file is.
            dry_run: change nothing.
            accept_gone: go on where more than half of a source is gone, also where it is not there at all.
            dtype: of the features that a new index keeps, "float32" or "float16".
            progress: as `commands.terminal.progress_bar`.

        Raises:
            ValueError: a source that is not there, another model than the index's, another process that writes, or
                more than half of a source gone without `accept_gone`.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; it must be {' or '.join(DTYPES)}")
        rows_per_commit = check_count("rows_per_commit", rows_per_commit)
        one_or_more = [sources] if isinstance(sources, str | Path) else check_list("sources", sources, "paths and URLs")
        named = [check_path(f"sources[{number}]", each) for number, each in enumerate(one_or_more)]
        if not dry_run and (self._known_store is None or self._model is not None):
            _ = self.encoder  # what is wrong with it is found before anything is made
        with nullcontext() if dry_run else writing(self.location):
            self._follow(find_store(self.location))
            if self._encoder is not None or (self._model is not None and not dry_run):
                _ = self.encoder  # another process may have made the index since
            listings = list_sources(
                named,
                image_column=image_column,
                stdin=stdin,
                num_known=self._known_store.num_by_source() if self._known_store is not None else {},
                accept_gone=accept_gone,
                upright=self.upright,
            )
            plan = make_plan(listings, self._known_store, accept_gone)
            plan.changes.left_out = [each for each in plan.changes.left_out if not self._holds(each.source)]
            if dry_run:
                return plan.updated()
            update = Update(plan, self._known_store, lambda dim: self._create(dim, dtype))
            update.take_over()
            if plan.changes.new or plan.changes.changed:
                update.encode(
                    self.encoder,
                    batch_size=batch_size,
                    num_workers=num_workers,
                    rows_per_commit=rows_per_commit,
                    progress=progress,
                )
            update.remove()
            return update.updated()

    def _holds(self, source: str) -> bool:
        """Whether a file is one of the index's own, where that lies among the pictures."""
        return Path(source).absolute().is_relative_to(Path(self.location).absolute())

    def _create(self, dim: int, dtype: str) -> Store:
        encoder = self.encoder
        probe = CalibratedModel.of(encoder)
        facts = Facts(
            absolute_model(encoder.name),
            encoder.image_fingerprint(),
            encoder.text_fingerprint(),
            encoder.library,
            probe.image_probe,
            probe.text_probe,
            self.upright,
            self.precision,
        )
        self._follow(create_store(self.location, facts, dim, dtype))
        _ = self.encoder  # on S3 another process may have been faster
        return self.store

    # -----------------------------------------------------------------------------------------------------------------
    # Search

    def search(
        self,
        texts: str | Sequence[str] | None = None,
        *,
        like: Any = (),
        minus: str | Sequence[str] = (),
        unlike: Any = (),
        topk: int = 10,
        where: str | None = None,
        threshold: float | None = None,
        exact: bool = False,
    ) -> Any:
        """The pictures nearest to a query: the sum of the unit vectors of a text, of the pictures `like`, and of the
        negatives of the texts `minus` and of the pictures `unlike`, brought to length 1.

        Args:
            texts: one text, or several for a query each, to which all else is added.
            like, unlike: pictures, as `image_set` takes them.
            topk: how many at most.
            where: a filter in LanceDB's SQL on the index's columns: "year > 2010 AND camera = 'X'".
            threshold: hits of a lower cosine are none.
            exact: do not use the approximate index, where there is one. Nor is it used with a filter, or where it finds
                fewer than `topk`.

        Returns:
            Hits, the nearest first, those of equal cosines in the order of their keys; a list of such lists for
            several texts.

        Raises:
            ValueError: nothing is asked for, a picture can't be read, a filter can't be followed, the parts of a query
                cancel each other, or the model is not the index's.
        """
        topk = check_count("topk", topk)
        if threshold is not None:
            threshold = check_number("threshold", threshold)
        if not isinstance(where, str | None):
            raise ValueError(f'where is {shown(where)}; it must be a filter in SQL, as "year > 2010"')
        is_single = texts is None or isinstance(texts, str)
        several = [texts] if is_single else check_texts("texts", texts)
        removed = check_texts("minus", _several(minus))

        def search() -> list[list[Hit]]:
            queries = self.queries(several, like, removed, unlike)  # type: ignore[arg-type]
            return self._search(queries, topk, where, exact)

        found = self._consistently(search)
        hits = [[hit for hit in each if threshold is None or hit.cosine >= threshold - SAME] for each in found]
        return hits[0] if is_single else hits

    def queries(self, texts: Sequence[str | None], like: Any, minus: Sequence[str], unlike: Any) -> Tensor:
        """(Q, E) unit vectors; see `search`."""
        words = [text for text in texts if text is not None]
        for text in [*words, *minus]:
            if not text.strip():
                raise ValueError("a query is empty; it must be a text")
        encoder, E = self.encoder, self.store.dim
        added, removed = self._pictures(like, "like"), self._pictures(unlike, "unlike")
        if not len(texts) or (not words and not len(added) and not len(removed) and not minus):
            raise ValueError("nothing is asked for: give a text, or a picture")
        of_texts = (
            encode_texts(encoder, [*words, *minus], encoder.tokenize).cpu() if words or minus else torch.zeros(0, E)
        )
        others = added.sum(dim=0) - removed.sum(dim=0) - of_texts[len(words) :].sum(dim=0)
        sums = (of_texts[: len(words)] if words else torch.zeros(1, E)) + others
        lengths = sums.norm(dim=-1)
        if (lengths < _SMALLEST_SUM).any():
            which = f"of {texts[int(lengths.argmin())]!r} " if words else ""
            raise ValueError(f"the parts of the query {which}cancel each other, and nothing is left to search for")
        return sums / lengths[:, None]

    def _pictures(self, pictures: Any, what: str) -> Tensor:
        """(n, E) unit features of pictures that are named or handed over."""
        if isinstance(pictures, Sequence) and not len(pictures):
            return torch.zeros(0, self.store.dim)
        data = image_set(pictures, upright=self.upright)
        encoder = self.encoder
        rows = []
        for batch in encode_in_batches(encoder.encode_image, encoder.preprocess, data, range(len(data))):
            if batch.problems:
                raise ValueError(f"a picture of {what} can't be read: {next(iter(batch.problems.values()))}")
            rows.append(batch.features)
        return F.normalize(torch.cat(rows), dim=-1)

    def _search(self, queries: Tensor, topk: int, where: str | None, exact: bool) -> list[list[Hit]]:
        if where is not None:
            self.store.check_filter(where)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        k = topk + TIES
        # Its recall was measured among all pictures: of those that a filter accepts it may look at none.
        if not exact and where is None and (approximate := self.store.approximate) is not None:
            effort = approximate.nprobes, approximate.refined
            found = list(self.store.search_approximate(queries.numpy(), k, *effort))
        if not found or min(len(row_ids) for row_ids, _ in found) < min(topk, len(self.store)):
            found = list(zip(*nearest(self._blocks(where), queries, k), strict=True))
        while tied := [query for query, (_, cosines) in enumerate(found) if goes_on(cosines, topk, k)]:
            k *= _MORE_TIES
            more = zip(*nearest(self._blocks(where), queries[tied], k), strict=True)
            for query, answer in zip(tied, more, strict=True):
                found[query] = answer
        return [self._hits(row_ids, cosines, topk) for row_ids, cosines in found]

    def _hits(self, row_ids: np.ndarray, cosines: np.ndarray, topk: int) -> list[Hit]:
        """The first K of candidates by falling cosine, equal ones by their keys."""
        level = levels(cosines)
        places = np.flatnonzero(level <= level[min(topk, len(level)) - 1]) if len(level) else np.zeros(0, dtype=int)
        if len(places) > topk:  # what else is known is read of hits alone
            keys = [restored(key) for key in self.store.take(row_ids[places], ["key"])["key"].to_pylist()]
            places = np.array(sorted(places, key=lambda place: (level[place], keys[place]))[:topk])
        hits = self._as_hits(row_ids[places], np.clip(cosines[places], -1, 1))
        by_level = sorted(zip(level[places], hits, strict=True), key=lambda each: (each[0], each[1].key))
        return [hit for _, hit in by_level]

    def _as_hits(self, row_ids: np.ndarray, cosines: np.ndarray) -> list[Hit]:
        rows = self.store.take(row_ids, [*NAMES, "stamp", "content", *self.store.metadata_columns]).to_pylist()
        hits = []
        for row, cosine in zip(rows, cosines, strict=True):
            key, path, source = (row.pop(name) for name in NAMES)
            facts = row.pop("stamp"), row.pop("content")
            hits.append(Hit(restored(key), path and restored(path), restored(source), float(cosine), row, *facts))
        return hits

    def open(self, hit: Hit) -> Image.Image:
        """The picture of a hit, as it was indexed: turned, or as it is stored.

        Raises:
            ValueError: it can't be read any more.
        """
        listing, number = self._listed(hit)
        return listing.data.open(number)

    def has_changed(self, hit: Hit) -> bool:
        """Whether another picture is now in the place of a hit than when it was indexed, by its bytes. What lies at a
        URL is taken to stay the same, and of what can't be read any more `open` says so."""
        try:
            listing, number = self._listed(hit)
        except ValueError:
            return False
        if hit.content is None or (hit.stamp and hit.stamp == listing.stamps[number]):
            return False
        return listing.content(number) not in (None, hit.content)

    def _listed(self, hit: Hit) -> tuple[Listing, int]:
        """Where the picture of a hit can be read, and its index there."""
        if not isinstance(hit, Hit):
            raise ValueError(f"hit is {shown(hit)}; it must be one that a search found")
        if hit.path is not None:
            path = hit.path if is_url(hit.path) else Path(hit.path)
            data = EvaluationSet(hit.key, (path,), upright=self.upright)
            return Listing(hit.source, data, [hit.key], [hit.path], [file_stamp(hit.path, racy_ns=0)]), 0
        stamp = file_stamp(hit.source, racy_ns=0)  # an open index outlives the tables that it was made from
        known = self._listings.get(hit.source)
        if known is None or known[0] != stamp:
            known = self._listings[hit.source] = stamp, list_sources([hit.source], upright=self.upright)[0]
        return known[1], known[1].place_of(hit.key, hit.content)

    def near_duplicates(
        self,
        cosine: float,
        *,
        where: str | None = None,
        progress: Progress | None = None,
    ) -> list[list[Hit]]:
        """Groups of pictures that reach a cosine, directly or by way of others; exact, over all pairs.

        A hit's cosine is the highest to another picture of its group. Larger groups come first.

        Args:
            progress: as `commands.terminal.progress_bar`, for pairs.

        Raises:
            ValueError: the cosine is none, or a filter can't be followed.
        """
        if not -1 < cosine <= 1:
            raise ValueError(f"near duplicates have a cosine of at least {cosine}; that must be above -1 and at most 1")
        return self._consistently(lambda: self._near_duplicates(cosine, where, progress))

    def _near_duplicates(self, cosine: float, where: str | None, progress: Progress | None) -> list[list[Hit]]:
        if where is not None:
            self.store.check_filter(where)
        num_rows = len(self.store) if where is None else self.store.read(["key"], where).num_rows
        with progress("pairs", num_rows * (num_rows - 1) // 2) if progress else nullcontext() as show:
            found = near_duplicates(lambda: self._blocks(where), cosine, show)
        groups: list[list[Hit]] = [[] for _ in range(len(set(found.group.tolist())))]
        for number, hit in zip(found.group, self._as_hits(found.ids, found.cosine), strict=True):
            groups[number].append(hit)
        groups = [sorted(group, key=lambda hit: hit.key) for group in groups]
        return sorted(groups, key=lambda group: (-len(group), group[0].key))

    def build_approximate(self, recall: float = 0.95, k: int = 10) -> Approximate:
        """Builds, or builds anew, an approximate index, and measures what it finds of the k nearest.

        A search looks into as few partitions as reach the recall: on pictures of the index, and on texts
        ("a photo of a …" for a sample of ImageNet's classes), whose features lie elsewhere. From then on `search` uses
        it, unless told to be exact; pictures that are added later are found exactly until they are many.

        Raises:
            ValueError: fewer than a thousand pictures, or the recall is no share.
        """
        if not 0 < recall <= 1:
            raise ValueError(f"the recall is {recall}; it must be a share, above 0 and at most 1")
        if len(self.store) < _FEWEST_APPROXIMATE:
            raise ValueError(
                f"{self.location} has {len(self.store):,} pictures; an approximate index needs at least "
                f"{_FEWEST_APPROXIMATE:,}, and pays from about 100,000"
            )
        with writing(self.location):
            self._follow(self.store.newest())
            queries = self._sampled_queries()
            num_partitions = self.store.build_approximate()
            wanted = {kind: nearest(self._blocks(None), rows, k)[1][:, -1] for kind, rows in queries.items()}
            for nprobes, refined in _efforts(num_partitions):
                found = {kind: self._recall(rows, wanted[kind], k, nprobes, refined) for kind, rows in queries.items()}
                if min(found.values()) >= recall:
                    break
            measured = Approximate(nprobes, refined, k, found, {kind: len(rows) for kind, rows in queries.items()})
            self.store.set_approximate(measured)
        return measured

    def _sampled_queries(self) -> dict[str, Tensor]:
        generator = np.random.default_rng(0)
        ids = self.store.read(["key"])["_rowid"].to_numpy()
        chosen = generator.choice(ids, min(_SAMPLED_QUERIES, len(ids)), replace=False)
        pictures = F.normalize(torch.tensor(self.store.features(chosen)).float(), dim=-1)
        names = generator.choice(np.array(classname_set("imagenet")), _SAMPLED_QUERIES, replace=False)
        return {"pictures": pictures, "texts": self.queries([f"a photo of a {name}." for name in names], (), (), ())}

    def _recall(self, queries: Tensor, least: np.ndarray, k: int, nprobes: int, refined: int) -> float:
        """The mean share of the k nearest found; `least` (Q,) is the lowest cosine that is one of them."""
        found = self.store.search_approximate(queries.numpy(), k + TIES, nprobes, refined)
        shares = [
            min(k, int((cosines >= low - SAME).sum())) / k for (_, cosines), low in zip(found, least, strict=True)
        ]
        return float(np.mean(shares))

    def _consistently(self, read: Callable[[], T]) -> T:
        """What is read of one version; again of the next, if another process deleted that one meanwhile."""
        self._follow(self.store.newest())
        while True:
            state = self.store.state
            try:
                return read()
            except (RuntimeError, OSError, ValueError):
                self._follow(self.store.newest())
                if self.store.state == state:
                    raise

    def _blocks(self, where: str | None) -> Blocks:
        """Ids and features of all rows, or of those that a filter accepts."""
        if not self._hold():
            for block_ids, block in self.store.blocks(where):
                yield block_ids, torch.from_numpy(block.copy())  # Arrow's own can't be written to
            return
        assert self._held is not None
        _, ids, features = self._held
        if where is None:
            yield ids, features
            return
        is_wanted = np.isin(ids, self.store.read(["key"], where)["_rowid"].to_numpy())
        for start in range(0, len(ids), _FILTERED_AT_ONCE):
            places = np.flatnonzero(is_wanted[start : start + _FILTERED_AT_ONCE]) + start
            yield ids[places], features[torch.from_numpy(places)]

    def _hold(self) -> bool:
        """Reads the features into memory, if they fit."""
        store = self.store
        if self._held is not None and self._held[0] == store.state:
            return True
        self._held = None
        num_rows = len(store)
        dtype = store.feature_dtype
        if num_rows * store.dim * dtype.itemsize > self._memory_bytes:
            return False
        ids, features = np.empty(num_rows, dtype=np.uint64), np.empty((num_rows, store.dim), dtype=dtype)
        place = 0
        for block_ids, block in store.blocks():
            there = slice(place, place + len(block))
            ids[there], features[there] = block_ids, block
            place += len(block)
        self._held = store.state, ids, torch.from_numpy(features)
        return True


# ---------------------------------------------------------------------------------------------------------------------
# Models


def check_model(encoder: Encoder, store: Store) -> None:
    """By the fingerprints of both towers; where one is another, as after an update of the library, by what the model
    makes of a fixed picture and text.

    Raises:
        ValueError: it is not the model that the index was made with.
    """
    facts = store.facts
    if encoder.precision != facts.precision:
        raise ValueError(
            f"the index {store.location} was made in {facts.precision}, and {encoder.name} is open in "
            f"{encoder.precision}, whose features are others; open it in {facts.precision}, or make a new index"
        )
    fingerprints = encoder.image_fingerprint(), encoder.text_fingerprint()
    if None not in fingerprints and fingerprints == (facts.image_fingerprint, facts.text_fingerprint):
        return
    probe = CalibratedModel.of(encoder)
    pairs = {
        "image tower or preprocessing": (facts.image_probe, probe.image_probe),
        "text tower or tokenizer": (facts.text_probe, probe.text_probe),
    }
    others = [
        what
        for what, (before, now) in pairs.items()
        if len(before) != len(now) or not math.dist(before, now) <= _SAME_FEATURE
    ]
    if others:
        raise ValueError(
            f"the index {store.location} was made with another model ({facts.model}): {encoder.name} has another "
            f"{' and another '.join(others)}. Search with that model, or make a new index"
        )


def absolute_model(name: str) -> str:
    """A model's name that means the same in every folder.

    >>> absolute_model("ViT-B/32"), absolute_model("openclip:ViT-B-32/openai")
    ('ViT-B/32', 'openclip:ViT-B-32/openai')
    """

    def settled(text: str) -> str:
        path = expand_home(text)
        return str(path.absolute()) if text and path.exists() else text

    if name.startswith(PYTHON_PREFIX):
        file, colon, function = name.removeprefix(PYTHON_PREFIX).rpartition(":")
        return f"{PYTHON_PREFIX}{settled(file)}{colon}{function}"
    if name.startswith(TRANSFORMERS_PREFIX):
        return TRANSFORMERS_PREFIX + settled(name.removeprefix(TRANSFORMERS_PREFIX))
    if name.startswith(OPENCLIP_PREFIX):
        before, separator, after = name.partition("local-dir:" if "local-dir:" in name else "/")
        return f"{before}{separator}{settled(after)}"
    return settled(name)


def _memory_for_features() -> int:
    """Half of what is free; where that is unknown, of half of the machine's memory or of 4 GiB."""
    free = free_memory()
    if free is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 4 << 30
    return free // 2


def _several(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


def _efforts(num_partitions: int) -> Iterator[tuple[int, int]]:
    """More and more partitions to look into and candidates to refine, up to all of the former."""
    nprobes = 1
    while nprobes < num_partitions:
        yield nprobes, 4
        nprobes *= 2
    for refined in (4, 16, 64):
        yield num_partitions, refined
