"""Work shared out over the processes of a run; with one process, all of it.

Shares are equal, so that all take the same number of steps: processes that hold slices of the weights encode together.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def has_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def share(count: int) -> list[int]:
    """This process's part of the numbers 0 to count - 1, in order; the last one repeated if it doesn't come out even.

    `collect`ed, joined in the order of the processes and cut to `count`, the results are those of one process.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if has_processes() else (0, 1)
    size = -(-count // world_size)
    return [min(number, count - 1) for number in range(rank * size, (rank + 1) * size)]


def collect(value: T) -> list[T]:
    """What every process has, in the order of their ranks. Tensors and arrays go through the host's memory."""
    if not has_processes():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
