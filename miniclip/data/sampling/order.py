"""The order of training: which samples make batch n. A pure function of (seed, n), for any workers and ranks.

Training is one endless sequence of samples, epoch after epoch; batch n is its n-th slice of `batch_size`. So each epoch
is every sample once, and a run resumed at step n goes on with batch n."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Sampler


class Order(Protocol):
    """An endless sequence of samples, of which batch n is the n-th slice."""

    num_samples: int

    def slice(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Positions `start` to `stop` of the sequence, as (epoch, sample)."""


class SampleOrder:
    """The endless sequence of (epoch, sample) that training goes through.

    Shards are shuffled, then the samples within blocks of consecutive shards, so that reading stays local on the
    disk and the plan of an epoch needs one number a shard.

    Args:
        counts: samples of each shard.
        block_samples: about how many samples are shuffled as one block of whole shards.
    """

    def __init__(self, counts: np.ndarray, seed: int, block_samples: int = 100_000) -> None:
        self.counts, self.seed, self.block_samples = np.asarray(counts), seed, block_samples
        self.starts = np.cumsum(self.counts) - self.counts
        self.num_samples = int(self.counts.sum())
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._block = lru_cache(maxsize=2)(self._make_block)

    def _make_plan(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The shards of each block of an epoch, and where the blocks end."""
        shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
        ends = np.cumsum(self.counts[shards])
        block_of_shard = (ends - self.counts[shards]) // self.block_samples
        blocks = np.split(shards, np.flatnonzero(np.diff(block_of_shard)) + 1)
        return blocks, np.cumsum([self.counts[block].sum() for block in blocks])

    def _make_block(self, epoch: int, block: int) -> np.ndarray:
        shards = self._plan(epoch)[0][block]
        samples = np.concatenate([np.arange(self.counts[s]) + self.starts[s] for s in shards])
        np.random.default_rng([self.seed, epoch, block]).shuffle(samples)
        return samples

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleOrder, (self.counts, self.seed, self.block_samples)  # without its caches, for workers

    def blocks_at(self, epoch: int, sample: int, stop: int | None = None) -> tuple[list[int], list[int]]:
        """The shards of a sample's block, and those of the block that comes after it, in no order.

        Args:
            stop: where training ends; no block that begins there or later is named.
        """
        blocks, ends = self._plan(epoch)
        shard = int(np.searchsorted(self.starts + self.counts, sample, side="right"))
        number = next(n for n, block in enumerate(blocks) if shard in block)
        if stop is not None and epoch * self.num_samples + int(ends[number]) >= stop:
            return blocks[number].tolist(), []
        following = blocks[number + 1] if number + 1 < len(blocks) else self._plan(epoch + 1)[0][0]
        return blocks[number].tolist(), following.tolist()

    def slice(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Positions `start` to `stop` of the sequence, as (epoch, sample)."""
        out: list[tuple[int, int]] = []
        while start < stop:
            epoch, place = divmod(start, self.num_samples)
            ends = self._plan(epoch)[1]
            block = int(np.searchsorted(ends, place, side="right"))
            samples = self._block(epoch, block)
            first = place - (int(ends[block]) - len(samples))
            taken = samples[first : first + stop - start]
            out += [(epoch, int(sample)) for sample in taken]
            start += len(taken)
        return out


class Mixture:
    """An endless sequence like `SampleOrder`'s, of several sources in given proportions.

    Each source goes through its own passes, so that one of small weight is seen whole before a sample of it comes
    again. Every `period` positions hold the sources in their proportions, to one sample, in random order.

    Args:
        orders: the order of each source; samples are numbered one source after the other.
        weights: proportions of the sources, above 0, in any unit.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[float], seed: int, period: int = 4096) -> None:
        if len(weights) != len(orders) or not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights are {list(weights)}; {len(orders)} sources need as many numbers above 0")
        self.orders, self.seed, self.period = list(orders), seed, period
        self.shares = np.array(weights, dtype=np.float64) / sum(weights)
        counts = [order.num_samples for order in orders]
        self.starts = np.cumsum(counts) - counts
        self.num_samples = sum(counts)

    def _taken_before(self, period: int) -> np.ndarray:
        """The number of samples of each source before a period; the largest source takes the rounding."""
        taken = np.floor(period * self.period * self.shares).astype(np.int64)
        largest = int(self.shares.argmax())
        taken[largest] = period * self.period - (taken.sum() - taken[largest])
        return taken

    def blocks_at(self, epoch: int, sample: int, stop: int | None = None) -> tuple[list[int], list[int]]:
        """As that of `SampleOrder`, of the sample's source; `stop` is a position of the mixture."""
        source = int(np.searchsorted(self.starts, sample, side="right")) - 1
        last = None if stop is None else int(self._taken_before(-(-stop // self.period))[source])
        parts = self.orders[source].blocks_at(epoch, sample - int(self.starts[source]), last)
        first = sum(len(order.counts) for order in self.orders[:source])
        now, following = ([first + shard for shard in part] for part in parts)
        return now, following

    def slice(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Positions `start` to `stop` of the sequence, as (pass through its source, sample)."""
        out: list[tuple[int, int]] = []
        while start < stop:
            period, first = divmod(start, self.period)
            last = min(self.period, first + stop - start)
            before, after = self._taken_before(period), self._taken_before(period + 1)
            sources = np.repeat(np.arange(len(self.orders)), after - before)
            np.random.default_rng([self.seed, period, 0, 1]).shuffle(sources)
            places: list[tuple[int, int]] = [(0, 0)] * (last - first)
            for source, order in enumerate(self.orders):
                is_here = sources == source
                skipped = int(before[source] + is_here[:first].sum())
                here = np.flatnonzero(is_here[first:last])
                for place, (epoch, sample) in zip(here, order.slice(skipped, skipped + len(here)), strict=True):
                    places[place] = (epoch, sample + int(self.starts[source]))
            out += places
            start += last - first
        return out


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """This rank's part of each global batch, from the current step to the end of the Lightning epoch.

    A Lightning epoch is `len(sampler)` batches, the most that one pass over the data fills. The samples that are left
    over begin the next one, so that no sample is dropped or doubled.

    Args:
        batch_size: global, over all ranks.
        step: returns the number of batches trained on; called at the start of each epoch.
    """

    def __init__(
        self, order: Order, batch_size: int, step: Callable[[], int], rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size > order.num_samples:
            if order.num_samples < 2:
                raise ValueError("the training set has 1 sample; contrastive training needs at least two")
            raise ValueError(
                f"batch_size is {batch_size} and the training set has {order.num_samples} samples; no more fit a "
                f"batch, so set data.batch_size to {order.num_samples} or less"
            )
        if batch_size % world_size:
            raise ValueError(f"batch_size is {batch_size}, which {world_size} ranks can't share evenly")
        self.order, self.batch_size, self.step, self.rank, self.world_size = order, batch_size, step, rank, world_size

    def __len__(self) -> int:
        return self.order.num_samples // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_rank = self.batch_size // self.world_size
        first = self.step()
        for n in range(first, (first // len(self) + 1) * len(self)):
            start = n * self.batch_size + self.rank * per_rank
            yield self.order.slice(start, start + per_rank)
