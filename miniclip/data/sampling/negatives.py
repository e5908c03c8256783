"""Batches of samples that are hard to tell apart: neighbours in a model's features, or members of one group.

The exact order is cut into pools of consecutive batches, and the samples of each pool are dealt out anew among its
batches, alike to alike. So an epoch is still every sample once, and batch n a pure function of seed and n.

Choosing among a random pool bounds how hard a batch gets: it holds the nearest of so many random samples, as a random
batch of the pool's size would, duplicates included (the thought of BatchSampler, Yang et al. 2023,
https://arxiv.org/abs/2306.03355). The pool is cut by balanced 2-means, as NGAME composes its batches (Dahiya et al.
2023, https://arxiv.org/abs/2207.04452). All sums are of whole numbers below 2^24, which float32 adds without rounding:
every process and every machine finds the same batches.

n samples of a pool, E embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Literal, Protocol

import numpy as np

from .order import SampleOrder

Negatives = Literal["random", "hard"]

_POOL_BATCHES = 8  # batches that neighbours are dealt out among
_GROUPED_SAMPLES = 100_000  # about so many are grouped at once, to meet most members of a group
_ROUNDS = 5  # of 2-means; few samples change sides later
_ROWS_EXACT = 2**17  # so many int8 add up to less than 2^24


class Likeness(Protocol):
    """What makes samples hard to tell apart."""

    def pool_size(self, batch_size: int) -> int:
        """How many samples are dealt out at once, a multiple of the batch."""

    def fingerprint(self) -> str:
        """Changes with anything that batches depend on, beside the shards."""

    def deal(self, samples: np.ndarray, ends: list[int], random: np.random.Generator) -> np.ndarray:
        """(n,) samples, those up to each end alike: (n,) positions among `samples`.

        Args:
            ends: of the batches within the pool, ascending; the last is n.
        """


class HardOrder:
    """The sequence of a `SampleOrder`, of which every pool is dealt out anew.

    Args:
        likeness: `Neighbours` or `Groups`.

    Raises:
        ValueError: there are fewer than two batches to deal out among.
    """

    def __init__(self, order: SampleOrder, batch_size: int, likeness: Likeness) -> None:
        if order.num_samples < 2 * batch_size:
            raise ValueError(
                f"data.negatives is 'hard', and a batch of {batch_size} takes all or most of the {order.num_samples} "
                f"samples, so there is nothing to choose from; set data.batch_size to {order.num_samples // 2} or less"
            )
        self.order, self.batch_size, self.likeness = order, batch_size, likeness
        self.num_samples, self.pool_size = order.num_samples, likeness.pool_size(batch_size)
        self._pool = lru_cache(maxsize=2)(self._make_pool)

    def slice(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Positions `start` to `stop` of the sequence, as (epoch, sample)."""
        out: list[tuple[int, int]] = []
        while start < stop:
            pool, first = divmod(start, self.pool_size)
            taken = self._pool(pool)[first : first + stop - start]
            out += taken
            start += len(taken)
        return out

    def _make_pool(self, pool: int) -> list[tuple[int, int]]:
        """One pool; what belongs to different epochs is dealt out apart, so that no epoch loses a sample to another."""
        start, stop = pool * self.pool_size, (pool + 1) * self.pool_size
        random = np.random.default_rng([self.order.seed, pool, 0, 2])
        out: list[tuple[int, int]] = []
        while start < stop:
            end = min(stop, (start // self.num_samples + 1) * self.num_samples)
            places = self.order.slice(start, end)
            samples = np.array([sample for _, sample in places])
            out += [places[position] for position in self._dealt(samples, start, random)]
            start = end
        return out

    def _dealt(self, samples: np.ndarray, start: int, random: np.random.Generator) -> np.ndarray:
        """(n,) positions among samples of one epoch, the first at position `start`; whole batches are shuffled."""
        to_first_end = -start % self.batch_size or self.batch_size
        ends = [*range(to_first_end, len(samples), self.batch_size), len(samples)]
        batches = np.split(self.likeness.deal(samples, ends, random), ends[:-1])
        whole = [number for number, batch in enumerate(batches) if len(batch) == self.batch_size]
        shuffled = dict(zip(whole, random.permutation(whole), strict=True))
        return np.concatenate([batches[shuffled.get(number, number)] for number in range(len(batches))])


class Groups:
    """Batches of whole groups, as far as they fit; the largest groups fill batches alone.

    Args:
        group_of: returns the (n,) groups of (n,) samples.
        name: of the groups.
    """

    def __init__(self, group_of: Callable[[np.ndarray], np.ndarray], name: str) -> None:
        self.group_of, self.name = group_of, name

    def fingerprint(self) -> str:
        return f"groups by {self.name!r}"

    def pool_size(self, batch_size: int) -> int:
        return max(_POOL_BATCHES, _GROUPED_SAMPLES // batch_size) * batch_size

    def deal(self, samples: np.ndarray, ends: list[int], random: np.random.Generator) -> np.ndarray:
        _, group = np.unique(self.group_of(samples), return_inverse=True)
        return random.permutation(group.max() + 1)[group].argsort(kind="stable")


class Neighbours:
    """Batches of neighbours in a model's features.

    Args:
        features: (N, E) int8 of all samples, as `quantised` makes them.
    """

    def __init__(self, features: np.ndarray) -> None:
        self.features = features

    def fingerprint(self) -> str:
        return f"neighbours {self._digest}"

    @cached_property  # each checkpoint asks for it
    def _digest(self) -> str:
        return hashlib.sha256(self.features.data).hexdigest()[:16]

    def pool_size(self, batch_size: int) -> int:
        return _POOL_BATCHES * batch_size

    def deal(self, samples: np.ndarray, ends: list[int], random: np.random.Generator) -> np.ndarray:
        return _halved(self.features[samples].astype(np.float32), np.arange(len(samples)), 0, ends, random)


def quantised(features: np.ndarray) -> np.ndarray:
    """(n, E) of unit length -> int8: the same on every machine, and a quarter of the memory.

    A feature of a random direction has the standard deviation 1 / sqrt(E), which becomes 21; outliers are clipped.
    """
    scale = np.float32(127 / 6 * np.sqrt(features.shape[1]))
    return np.rint(np.nan_to_num(features.astype(np.float32)) * scale).clip(-127, 127).astype(np.int8)


def _halved(
    features: np.ndarray, positions: np.ndarray, start: int, ends: list[int], random: np.random.Generator
) -> np.ndarray:
    """Deals `positions` out among the batches that end at `ends`, by cutting them in two until a batch is left.

    Args:
        features: (n, E) float32 of whole numbers, of the positions.
        start: where the first of the batches begins.
    """
    if len(ends) == 1:
        return positions
    middle = len(ends) // 2
    is_left = _two_means(features, ends[middle - 1] - start, random)
    left = _halved(features[is_left], positions[is_left], start, ends[:middle], random)
    return np.concatenate(
        [left, _halved(features[~is_left], positions[~is_left], ends[middle - 1], ends[middle:], random)]
    )


def _two_means(features: np.ndarray, num_left: int, random: np.random.Generator) -> np.ndarray:
    """(n,) bool: `num_left` samples on one side of a plane across the line between the two sides' means."""
    first, second = random.choice(len(features), 2, replace=False)
    direction = (features[first] - features[second]).astype(np.int64)
    is_left = np.zeros(len(features), dtype=bool)
    for _ in range(_ROUNDS):
        before = is_left
        along = features @ _shrunk(direction)  # (n,)
        is_left = np.zeros(len(features), dtype=bool)
        is_left[np.argsort(-along, kind="stable")[:num_left]] = True
        if (is_left == before).all():
            break
        num_right = len(features) - num_left
        weights = np.where(is_left, np.float32(1), np.float32(0))
        of_left, of_all = _column_sums(weights, features), _column_sums(np.ones_like(weights), features)
        direction = of_left * num_right - (of_all - of_left) * num_left
    return is_left


def _shrunk(direction: np.ndarray) -> np.ndarray:
    """(E,) whole numbers, so small that a scalar product with int8 stays below 2^24."""
    most = min(127, 2**24 // (127 * len(direction)) - 1)
    return (direction * most // max(1, int(np.abs(direction).max()))).astype(np.float32)


def _column_sums(weights: np.ndarray, features: np.ndarray) -> np.ndarray:
    """(n,) of 0 and 1, (n, E) -> (E,) int64."""
    rows = range(0, len(features), _ROWS_EXACT)
    parts = [weights[row : row + _ROWS_EXACT] @ features[row : row + _ROWS_EXACT] for row in rows]
    return np.array(parts).sum(axis=0, dtype=np.int64)
