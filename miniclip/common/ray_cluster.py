"""Ray: a cluster or the cores of this machine, and work that its actors do in order.

An actor that dies is started again, and does its batch again.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any


@contextmanager
def ray_cluster() -> Iterator[Any]:
    """Ray with its library of data sets, connected to a cluster; one that is started here is ended here.

    RAY_ADDRESS in the environment names a cluster; without it, and without one on this machine, one of this machine is
    started.

    Raises:
        ValueError: Ray is not installed, or it gives up.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"Ray is not installed: pip install 'miniclip[ray]' ({error})") from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        with _in_a_sentence(ray):
            yield ray
        return
    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with _in_a_sentence(ray):
            yield ray
    finally:
        ray.shutdown()


@contextmanager
def _in_a_sentence(ray: Any) -> Iterator[None]:
    """What Ray gives up at, by the end of its report, which is long."""
    try:
        yield
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"Ray gave up: {lines[-1] if lines else type(error).__name__}") from error


def by_actors(ray: Any, batches: Any, actor: type, facts: tuple[Any, ...], most: int, **resources: float) -> Any:
    """Batches after `actor(*facts)` was called with each, by at most so many of its kind."""
    compute = ray.data.ActorPoolStrategy(min_size=1, max_size=most)
    return batches.map_batches(actor, batch_size=None, fn_constructor_args=facts, compute=compute, **resources)


def fetched(data: Any) -> Any:
    """What `ray.put` has shared, or the data itself."""
    import ray

    return ray.get(data) if isinstance(data, ray.ObjectRef) else data


@dataclass(frozen=True)
class Surroundings:
    """The folder that relative paths begin at, and where modules are found, of the process that calls."""

    folder: str
    path: tuple[str, ...]

    @classmethod
    def here(cls) -> Surroundings:
        return cls(os.getcwd(), tuple(sys.path))  # noqa: PTH109

    def enter(self) -> None:
        with suppress(OSError):  # where it is not there, paths are absolute
            os.chdir(self.folder)
        sys.path += [place for place in self.path if place not in sys.path]
