"""Processes that work together: what each has of all, and what they have between them. With one process, everything.

Shares are equal, so that all take the same number of steps: processes that hold slices of the weights encode together.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def place() -> tuple[int, int]:
    """This process's rank, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(count: int) -> list[int]:
    """This process's part of the numbers 0 to count - 1, in order; the last one repeated if it doesn't come out even.

    `collect`ed, joined in the order of the processes and cut to `count`, the results are those of one process.
    """
    rank, world_size = place()
    size = -(-count // world_size)
    return [min(number, count - 1) for number in range(rank * size, (rank + 1) * size)]


def collect(value: T) -> list[T]:
    """What every process has, in the order of their ranks. Tensors and arrays go through the host's memory."""
    _, world_size = place()
    if world_size == 1:
        return [value]
    values: list[T] = [value] * world_size
    dist.all_gather_object(values, value)
    return values


def gather(rows: Tensor) -> Tensor:
    """The rows of every process, in the order of their ranks: (b, …) -> (B, …). As they are, with one process.

    Differentiable: the gradient of a row is the sum over all processes.
    """
    return rows if place()[1] == 1 else _Gather.apply(rows)


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
    """Over the processes, element by element, of tensors of one shape: every process has it. Differentiable.

    Only sums travel, so what each process sends does not grow with their number.
    """
    return values if place()[1] == 1 else _LogSumExp.apply(values)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        most = values.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        most.clamp_(min=torch.finfo(most.dtype).min)  # where no process has any, -inf less -inf would be no number
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
