"""Remote shards are fetched while those before them are trained on.

The samples of a block are shuffled, so its first batch needs all of its shards at once. Without this, training would
wait there for as many tars as a block has.
"""

from __future__ import annotations

import queue
import threading
import weakref
from typing import Any

from torch.utils.data import get_worker_info

from ..shards import Shards
from .order import Mixture, SampleOrder


class Ahead:
    """Called with each sample that is read. A thread of the first worker fetches what its block lacks, then the next
    block, so which samples come, and when, does not depend on it. A fetch that fails is left to who reads the shard.

    Two blocks have to fit into the cache beside what is reserved there; of a larger next one the first shards are
    fetched.

    Args:
        reserved_bytes: for other shards in the cache, as those of validation.
        stop: the position of the order where training ends, if that is known.
    """

    def __init__(
        self, shards: Shards, order: SampleOrder | Mixture, reserved_bytes: int = 0, stop: int | None = None
    ) -> None:
        self._shards, self._order, self._reserved_bytes, self._stop = shards, order, reserved_bytes, stop
        self._epoch_of: dict[int, int] = {}  # of the shards of blocks that were met
        self._blocks: _Blocks | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Ahead, (self._shards, self._order, self._reserved_bytes, self._stop)  # a thread stays in its process

    def __call__(self, epoch: int, sample: int) -> None:
        worker = get_worker_info()
        if worker is not None and worker.id:
            return
        shard, _ = self._shards.locate(sample)
        if self._epoch_of.get(shard) == epoch:
            return
        block, following = self._order.blocks_at(epoch, sample, self._stop)
        self._epoch_of |= dict.fromkeys(block, epoch)
        if self._blocks is None:
            self._blocks = queue.SimpleQueue()
            what = (self._blocks, self._shards, self._reserved_bytes)  # not self, which could never go then
            threading.Thread(target=_fetch, args=what, name="shards ahead", daemon=True).start()
            weakref.finalize(self, self._blocks.put, None)
        self._blocks.put((block, following))


_Blocks = queue.SimpleQueue[tuple[list[int], list[int]] | None]


def _fetch(blocks: _Blocks, shards: Shards, reserved_bytes: int) -> None:
    """What a thread does until it gets None."""
    while (wanted := blocks.get()) is not None:
        block, following = wanted
        room = shards.cache.limit_bytes - reserved_bytes
        for shard in dict.fromkeys([*block, *following]):
            room -= shards.prefetch(shard, room)
            if room < 0:  # more would push out what is trained on
                break
