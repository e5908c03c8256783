"""Pairs prepared for packing in their order: ahead by threads of this process, or by Ray's actors.

With Ray, actors on one machine or a cluster read, decode and encode; the process that calls writes what they send, so
that the shards are those of the plain command, to the bit. An actor that dies is started again, and repeats its batch.
Every machine needs miniclip and the pictures under the same names (a shared disk, or URLs).
"""

from __future__ import annotations

import pickle
import platform
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import PIL
from PIL import features

from ..common.ray_cluster import Surroundings, by_actors, fetched, ray_cluster
from ..common.version import __version__
from .reading.pair import Pair
from .sample_files import Packing, Prepared, Rejection, prepare

_AT_A_TIME, _AT_A_TIME_ON_RAY = 8, 64  # pairs that a thread or an actor prepares in a row

Results = Generator[tuple[int, Prepared | Rejection], None, None]


def prepared_by_threads(pairs: Sequence[Pair], indices: range, packing: Packing, workers: int) -> Results:
    """Each index with its result, in order.

    Threads, as reading, decoding and encoding images let go of the interpreter's lock.
    """
    is_over = threading.Event()

    def compute(some: range) -> list[Any]:
        return [prepare(pairs, index, packing) for index in some if not is_over.is_set()]

    waiting: deque[tuple[range, Future[list[Any]]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for some in _runs_of([indices], _AT_A_TIME):
            waiting.append((some, pool.submit(compute, some)))
            if len(waiting) > 3 * workers:
                done, future = waiting.popleft()
                yield from zip(done, future.result(), strict=True)
        for done, future in waiting:
            yield from zip(done, future.result(), strict=True)
    finally:
        is_over.set()  # Ctrl-C waits for one image of each thread, and not for all that they have been given
        pool.shutdown(cancel_futures=True)


def prepared_on_ray(pairs: Sequence[Pair], ranges: Iterable[range], packing: Packing) -> Results:
    """Each index of the ranges with its result, in order.

    Raises:
        ValueError: Ray is not installed or gives up, or a machine has other libraries, or does not find a picture that
            is there.
    """
    pieces = [np.array(piece) for piece in _runs_of(ranges, _AT_A_TIME_ON_RAY)]
    if not pieces:
        return
    with ray_cluster() as ray:
        cpus = int(ray.cluster_resources().get("CPU", 1))
        facts = ray.put(pairs), packing, Surroundings.here(), _libraries()
        resources = {"num_cpus": 1 if cpus > 1 else 0.5}
        batches = by_actors(ray, ray.data.from_numpy(pieces), _Prepare, facts, max(1, cpus), **resources)
        for batch in batches.iter_batches(batch_size=None):
            if error := batch["error"][0]:
                raise ValueError(error)
            for index, result in pickle.loads(batch["results"][0]):
                yield index, _seen_from_here(pairs, index, packing, result, batch["node"][0])


def _runs_of(ranges: Iterable[range], size: int) -> Iterator[range]:
    for whole in ranges:
        for start in range(0, len(whole), size):
            yield whole[start : start + size]


def _seen_from_here(
    pairs: Sequence[Pair], index: int, packing: Packing, result: Prepared | Rejection, node: str
) -> Prepared | Rejection:
    """What an actor found, or did not find on its machine and this process does not find either.

    Raises:
        ValueError: this process finds it.
    """
    if not isinstance(result, Rejection) or not result.is_of_machine:
        return result
    own = prepare(pairs, index, packing)
    if not isinstance(own, Rejection):
        raise ValueError(
            f"{result.source} can't be read on {node} ({result.reason}), and can be on {platform.node()}; every "
            "machine needs the pictures under the same names: a shared disk, or URLs"
        )
    return own


def _libraries() -> str:
    """What the bytes of a picture that is encoded anew depend on."""
    codecs = (f"{name} {features.version(name)}" for name in ("jpg", "zlib", "webp"))
    return f"miniclip {__version__}, Pillow {PIL.__version__}, {', '.join(codecs)}"


class _Prepare:
    """Indices (`data`) -> their results, pickled, in one row."""

    def __init__(self, pairs: Any, packing: Packing, here: Surroundings, libraries: str) -> None:
        here.enter()
        self.pairs, self.packing = fetched(pairs), packing
        own = _libraries()
        self.error = "" if own == libraries else f"{platform.node()} has {own}, and {libraries} is needed as here"

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        indices = [] if self.error else [int(index) for index in batch["data"]]
        results = [(index, prepare(self.pairs, index, self.packing)) for index in indices]
        row = {"results": pickle.dumps(results), "error": self.error, "node": platform.node()}
        return {name: np.array([value], dtype=object) for name, value in row.items()}
