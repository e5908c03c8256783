"""Processes that work together: ranks, the indices each takes, and what is gathered from all.

Every rank takes the same number of items, because ranks that hold slices of the weights have to encode in step.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def warn_once(message: str, stacklevel: int = 1) -> None:
    """A warning of the first process alone, for all of them.

    Args:
        stacklevel: as of `warnings.warn`, counted from the caller.
    """
    if rank_and_world_size()[0] == 0:
        warnings.warn(message, stacklevel=stacklevel + 1)


def own_indices(count: int) -> list[int]:
    """This rank's part of the indices 0 to count - 1, in order; the last index is repeated to make all parts equal.

    Results gathered by `all_gather_objects`, joined in the order of ranks and cut to `count` are those of one process.
    """
    rank, world_size = rank_and_world_size()
    size = -(-count // world_size)
    return [min(index, count - 1) for index in range(rank * size, (rank + 1) * size)]


def all_gather_objects(value: T) -> list[T]:
    """Every rank's value, in the order of ranks. Tensors and arrays go through the host's memory."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    values: list[T] = [value] * world_size
    dist.all_gather_object(values, value)
    return values


def counts_of_all(count: int) -> list[int]:
    """Every rank's count, in the order of ranks, over the host's memory: a tenth of a millisecond on one machine."""
    own = torch.tensor(count)
    counts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, own)
    return [int(each) for each in counts]


def gather(rows: Tensor) -> Tensor:
    """The rows of every rank, in the order of ranks: (b, …) -> (B, …). One process gets its own rows back.

    Differentiable: the gradient of a row is the sum over all ranks.
    """
    return rows if rank_and_world_size()[1] == 1 else _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def log_sum_exp(values: Tensor) -> Tensor:
    """log-sum-exp over the ranks, element by element, of tensors of one shape; every rank gets it. Differentiable.

    Only sums travel, so what each rank sends does not grow with their number.
    """
    return values if rank_and_world_size()[1] == 1 else _LogSumExp.apply(values)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        most = values.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        most.clamp_(min=torch.finfo(most.dtype).min)  # if it is -inf on every rank, -inf - -inf would be NaN
        part = (values - most).exp()
        total = part.clone()
        dist.all_reduce(total)
        ctx.save_for_backward(part / total.clamp(min=torch.finfo(total.dtype).tiny))
        return total.log() + most

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient * ctx.saved_tensors[0]
