"""Tars without an index -> one reader's batches, through a pipeline of webdataset's, in the order of `stream.py`.

A tar is fetched when its turn comes, and read from its first member to its last."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import IO, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ...common.cache import Cache
from ...common.files import read_at
from ...common.storage import Stamp, is_url, stamp_of
from ..indexing.tar_members import read_samples
from ..pairs import Batch, Recipe, Sample
from ..reading.scan import LeftOut
from ..shards import facts_of, record_of, tar_names
from .stream import Mark, Progress, TarOrder


class Tar(NamedTuple):
    """A tar, and where an index has them its size in bytes, its checksum and its version."""

    location: str
    bytes: int | None = None
    sha256: str | None = None
    version: str = ""


class _Raw(NamedTuple):
    """A sample's bytes by kind, as it waits in the buffer; or the reason why there are none."""

    tar: Tar
    position: int  # of the tar in the sequence
    row: int
    key: str
    members: dict[str, bytes]
    problem: ValueError | None = None


class Part(NamedTuple):
    """A batch of one reader, where that reader then is, and what it left out of tars meanwhile."""

    batch: Batch
    mark: Mark
    left_out: list[LeftOut]


class TarStream(IterableDataset[Part]):
    """The batches of one process, without an end.

    Args:
        batch_size: of this process.
        first_step: the step that the first batch is for. Worker n then reads as worker n + first_step did, so that a
            resumed run's batches come in the same order.
    """

    def __init__(
        self,
        tars: list[Tar],
        order: TarOrder,
        progress: Progress,
        recipe: Recipe,
        collate: Callable[[list[Sample]], Batch],
        cache: Cache,
        *,
        shuffle: int,
        batch_size: int,
        first_step: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.tars, self.order, self.progress, self.recipe, self.collate = tars, order, progress, recipe, collate
        self.cache, self.shuffle, self.batch_size = cache, shuffle, batch_size
        self.first_step, self.rank, self.world_size = first_step, rank, world_size
        self.names = dict(zip(tars, tar_names([tar.location for tar in tars]), strict=True))

    def reader(self) -> int:
        """The number of this process and worker among all, as webdataset's split_by_node and split_by_worker have it.

        Those ask the environment for the rank, which is not there in the workers of every launcher.
        """
        info = get_worker_info()
        worker = 0 if info is None else (info.id + self.first_step) % info.num_workers
        return self.rank + self.world_size * worker

    def __iter__(self) -> Iterator[Part]:
        import webdataset as wds

        reader = _TarReader(self, self.reader())
        samples = wds.FluidWrapper(self.progress.positions).slice(reader.first, None, reader.step)
        samples = iter(samples.compose(reader.shuffled_blocks).map(reader.decoded))
        while batch := list(islice(samples, self.batch_size)):
            left_out, reader.left_out = reader.left_out, []
            yield Part(self.collate([sample for sample, _ in batch]), batch[-1][1], left_out)


class _TarReader:
    """The stages of one reader's pipeline."""

    def __init__(self, stream: TarStream, number: int) -> None:
        self.stream, self.number = stream, number
        self.step = len(stream.progress.tars)
        self.opened = stream.progress.tars[number]
        self.first = number + self.step * self.opened
        self.left_out: list[LeftOut] = []

    def shuffled_blocks(self, positions: Iterator[int]) -> Iterator[tuple[_Raw, Mark]]:
        """Whole tars shuffled together, block after block."""
        import webdataset as wds

        self.positions = iter(positions)
        self.next = next(self.positions)
        skipped = self.stream.progress.taken[self.number]
        while True:
            tars, draw = self.opened, random.Random(f"{self.stream.order.seed} {self.next}")
            shuffled = wds.shuffle(self.stream.shuffle, initial=self.stream.batch_size, rng=draw)(self.block())
            for taken, (raw, is_last) in enumerate(_with_last(shuffled), start=1):
                if taken > skipped:
                    yield raw, Mark(self.number, self.opened, 0) if is_last else Mark(self.number, tars, taken)
            skipped = 0

    def block(self) -> Iterator[_Raw]:
        """The samples of whole tars until they are enough. A block ends with its pass, and has no tar twice."""
        order, known, samples = self.stream.order, set[int](), 0
        number, tar = order[self.next]
        while samples < self.stream.shuffle and order[self.next][0] == number and tar not in known:
            position, self.next = self.next, next(self.positions)
            self.opened += 1
            known.add(tar)
            for raw in self.read(self.stream.tars[tar], position):
                samples += 1
                yield raw
            tar = order[self.next][1]

    def read(self, tar: Tar, position: int) -> Iterator[_Raw]:
        """A tar's samples in their order; one hole for a tar that can't be read."""
        row = 0
        try:
            with closing(_open_tar(tar, self.stream.cache)) as file:
                samples, left_out = read_samples(file, tar.location, skips_pictures=True)
                self.left_out += [replace(each, source=f"{self.stream.names[tar]}:{each.source}") for each in left_out]
                if not samples:
                    raise ValueError("it holds no samples")
                for row, (key, members) in enumerate(samples):
                    data = {kind: read_at(file, member.offset, member.size) for kind, member in members.items()}
                    yield _Raw(tar, position, row, key, data)
        except (OSError, ValueError) as error:
            problem = ValueError(f"the tar can't be read: {error}")
            yield _Raw(tar, position, row, "*", {}, problem)

    def decoded(self, item: tuple[_Raw, Mark]) -> tuple[Sample, Mark]:
        raw, mark = item
        recipe, key = self.stream.recipe, f"{self.stream.names[raw.tar]}:{raw.key}"
        draw = np.random.default_rng([self.stream.order.seed, raw.position, raw.row])

        def member(kind: str) -> bytes:
            return raw.members.get(kind, b"")

        try:
            if raw.problem:
                raise raw.problem
            return recipe.sample(key, record_of(raw.key, member), partial(facts_of, member), draw), mark
        except Exception as error:  # a damaged sample can raise anything
            return recipe.hole(key, error), mark


def _with_last(items: Iterable[_Raw]) -> Iterator[tuple[_Raw, bool]]:
    """Each item, and whether it is the last."""
    items = iter(items)
    item = next(items)
    for following in items:
        yield item, False
        item = following
    yield item, True


def _open_tar(tar: Tar, cache: Cache) -> IO[bytes]:
    """Remote tars come from the cache; one that has another size or version there by now is fetched again."""
    if not is_url(tar.location):
        return open(tar.location, "rb")
    stamp = stamp_of(tar.location) if tar.bytes is None else Stamp(tar.bytes, tar.version)
    return cache.open(tar.location, stamp.size, tar.sha256, stamp.version)
