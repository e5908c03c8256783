"""The order of a stream: which tars each reader takes, and where a resumed run goes on. Nobody counts the samples.

Training goes through one endless sequence of tars, pass after pass. Of R readers, each worker of each process one,
reader r takes the tars at positions r, r + R, r + 2R, … So the readers share each pass, whether R divides the tars or
not. A reader shuffles whole tars together as a block and then begins the next block with an empty buffer, which is why
a resumed reader needs no more than the number of its tars that are done and of samples that it took since."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from typing import NamedTuple

import numpy as np

from ...common.wording import counted


@dataclass(frozen=True)
class Streaming:
    """How `data.order: stream` takes its tars.

    Args:
        shuffle: samples that each worker holds in memory, undecoded, and draws from at random. It reads whole tars of
            at least so many samples before it begins with an empty buffer again.
        resampled: each reader draws its tars at random from all, with replacement. So any number of readers is served,
            and a sample may come several times before another one comes once.
        epoch_samples: what the trainer calls an epoch (validations, `max_epochs`, a warm-up in epochs). By default the
            number of samples where every source has an index, else the whole run is one epoch.
    """

    shuffle: int = 2000
    resampled: bool = False
    epoch_samples: int | None = None

    def __post_init__(self) -> None:
        if self.shuffle < 1:
            raise ValueError(f"data.stream.shuffle is {self.shuffle}; it must be at least 1, which does not shuffle")
        if self.epoch_samples is not None and self.epoch_samples < 1:
            raise ValueError(f"data.stream.epoch_samples is {self.epoch_samples}; it must be at least 1")


@dataclass(frozen=True)
class TarOrder:
    """The endless sequence of tars. A pure function of seed and position.

    Args:
        resampled: each position is a draw of its own; else every `num_tars` positions are each tar once.
    """

    num_tars: int
    seed: int
    resampled: bool = False

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(pass, tar) of a position; draws belong to no pass, and have 0."""
        if self.resampled:
            return 0, int(np.random.default_rng([self.seed, position]).integers(self.num_tars))
        number, place = divmod(position, self.num_tars)
        return number, int(_permutation(self.num_tars, self.seed, number)[place])


@lru_cache(maxsize=4)
def _permutation(num_tars: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).permutation(num_tars)


class Mark(NamedTuple):
    """Where a reader is: how many of its tars were done before its current block, and samples taken of that."""

    reader: int
    tars: int
    taken: int


@dataclass(frozen=True)
class Progress:
    """How far a stream has come.

    Args:
        tars: of each reader, how many of its tars are done.
        taken: of each reader, how many samples were taken of the block that follows them.
        first: the positions below were done before these readers began.
        done: further positions, above `first`, that were done by then.
    """

    tars: tuple[int, ...]
    taken: tuple[int, ...]
    first: int = 0
    done: tuple[int, ...] = ()

    @classmethod
    def start(cls, num_readers: int) -> Progress:
        return cls((0,) * num_readers, (0,) * num_readers)

    def positions(self) -> Iterator[int]:
        """All that these readers share, in order."""
        done = frozenset(self.done)
        return (position for position in count(self.first) if position not in done)

    def after(self, marks: Sequence[Mark]) -> Progress:
        """With the latest marks of some readers."""
        tars, taken = list(self.tars), list(self.taken)
        for mark in marks:
            tars[mark.reader], taken[mark.reader] = mark.tars, mark.taken
        return Progress(tuple(tars), tuple(taken), self.first, self.done)

    def shared_by(self, num_readers: int) -> Progress:
        """For another number of readers, which take the tars that are not done, and so read current blocks again."""
        if num_readers == len(self.tars):
            return self
        shared = islice(self.positions(), len(self.tars) * max(self.tars))
        own = {position for n, position in enumerate(shared) if n // len(self.tars) < self.tars[n % len(self.tars)]}
        done = own.union(self.done)
        first = next(position for position in count(self.first) if position not in done)
        above = tuple(sorted(position for position in done if position > first))
        return Progress((0,) * num_readers, (0,) * num_readers, first, above)


def refuse_idle_readers(num_tars: int, num_workers: int, world_size: int) -> None:
    """
    Raises:
        ValueError: there are more readers than tars. Readers that share a tar would put a sample twice into a batch.
    """
    num_readers = max(1, num_workers) * world_size
    if num_readers <= num_tars:
        return
    workers = num_tars // world_size
    remedy = f"set data.num_workers to {workers}" if workers else f"train on {num_tars} processes at most"
    each = f"{max(1, num_workers)} for each of {world_size} processes" if world_size > 1 else "data.num_workers"
    raise ValueError(
        f"data.order is stream, and {counted(num_tars, 'tar')} can't serve {num_readers} readers "
        f"({each}), of which each needs a tar of its own: {remedy}, write more and smaller shards, or set "
        "data.stream.resampled to true, with which readers draw from all tars"
    )
