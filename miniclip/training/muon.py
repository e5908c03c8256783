"""Muon: momentum whose matrices are made orthogonal before each step (Jordan et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fsdp import share_out


class Muon(torch.optim.AdamW):
    """AdamW, but groups with a `momentum` take orthogonalised steps (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/).

    The momentum of a matrix is replaced by the nearest matrix whose singular values are all about 1, so that rare
    directions move as much as frequent ones. Queries, keys and values share one parameter and are orthogonalised
    separately. Matrices of one shape go through the iteration together; where processes hold slices of them, each
    process orthogonalises a share of the matrices. On a CPU the iteration runs in float32:
    bfloat16, which torch's and timm's Muon use everywhere, is several times slower there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # torch's fused AdamW would unscale only its own gradients in mixed precision, and Muon's would stay scaled.
        # Without this flag the gradient scaler unscales all of them and looks for overflows before it calls `step`.
        self._step_supports_amp_scaling = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A group moves as AdamW's unless it has a `momentum`. One that has no `weight_decay` either, as of parameters
        that are unfrozen during a run, becomes two, because gains and biases do not decay."""
        group = {"momentum": None, **param_group}
        if "weight_decay" in group:
            super().add_param_group(group)
            return
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        for own, more in (
            ([p for p in params if p.ndim >= 2], {}),
            ([p for p in params if p.ndim < 2], {"weight_decay": 0.0}),
        ):
            if own:
                super().add_param_group({**group, "params": own, **more})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held: list[tuple[Tensor, Tensor]] = []
        moves: list[Move] = []
        for group in self.param_groups:
            if group["momentum"] is not None:
                held += [(p, p.grad) for p in group["params"] if p.grad is not None]
                moves += self._moves(group)
        for move, step in zip(moves, share_out([move.momentum for move in moves], partial(_steps, moves)), strict=True):
            move.parameter.sub_(step.to(move.parameter.dtype), alpha=move.rate)
        for parameter, _ in held:
            parameter.grad = None  # AdamW skips parameters without a gradient
        super().step()
        for parameter, gradient in held:
            parameter.grad = gradient
        return loss

    def _moves(self, group: dict[str, Any]) -> Iterator[Move]:
        """Averages the gradients of a group and decays its weights."""
        momentum, decay, parts = group["momentum"], group["lr"] * group["weight_decay"], group["parts"]
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())  # AdamW expects it in every state that it loads
                state["momentum_buffer"] = torch.zeros_like(p)
            state["step"] += 1
            average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            update = p.grad.lerp(average, momentum)  # Nesterov
            p.mul_(1 - decay)
            rate = group["lr"] * math.sqrt(max(1, p.shape[0] // parts / p.shape[1]))
            yield Move(p, update.to(_precision(p)), parts, rate)


class Move(NamedTuple):
    """A parameter, the momentum that becomes its step, the number of matrices stacked in both, and the step's size."""

    parameter: Tensor
    momentum: Tensor
    parts: int
    rate: float


def _steps(moves: Sequence[Move], momenta: list[Tensor], indices: Sequence[int]) -> list[Tensor]:
    """The orthogonalised momenta of the moves at these indices; matrices of one shape together."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for n, (momentum, index) in enumerate(zip(momenta, indices, strict=True)):
        by_shape.setdefault((momentum.shape[0] // moves[index].parts, momentum.shape[1]), []).append(n)
    steps = list(momenta)
    for shape, places in by_shape.items():
        stacks = [momenta[n].view(-1, *shape) for n in places]
        together = orthogonalize(torch.cat(stacks)).split([len(stack) for stack in stacks])
        for n, step in zip(places, together, strict=True):
            steps[n] = step.flatten(0, 1)
    return steps


def _precision(tensor: Tensor) -> torch.dtype:
    """That of the iteration. bfloat16 is several times slower on a CPU."""
    return torch.float32 if tensor.device.type == "cpu" else torch.bfloat16


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest matrices of orthonormal rows or columns: singular values end between about 0.7 and 1.2.

    A quintic Newton-Schulz iteration with coefficients chosen for a steep start rather than for convergence (Jordan et
    al. 2024).

    Args:
        matrices: (n, rows, columns).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    dtype = _precision(matrices)
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # the largest singular value is now at most 1
    # Every step multiplies x from the left by a polynomial of x @ x.mT. For a wide x it is cheaper to multiply the
    # polynomials first, and x once by their product; bfloat16 is too coarse for that.
    if dtype == torch.float32 and 2 * x.shape[1] <= x.shape[2]:
        gram, product = x @ x.mT, None
        for step in range(steps):
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=1, dim2=2).add_(a)
            product = factor if product is None else factor @ product
            gram = factor @ gram @ factor if step + 1 < steps else gram
        x = x if product is None else product @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
