"""How the parameters move: groups, Muon, and the schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .model import CLIP, Attention, Transformer

OptimizerKind = Literal["adamw", "muon"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

    The defaults of AdamW are the paper's for ViT (tables 18 and 19).

    Args:
        kind: "adamw", or "muon", which learns far faster on small models from scratch.
        lr: peak learning rate of AdamW.
        betas, eps: of AdamW.
        weight_decay: of AdamW; applied to weights, never to gains, biases, and the logit scale.
        muon_lr: peak learning rate of Muon: the size of an update's singular values.
        muon_weight_decay: of Muon.
        muon_momentum: of Muon (Nesterov).
        warmup: share of the run in which the rates rise from 0; afterwards they fall to 0 along a cosine.
    """

    kind: OptimizerKind = "adamw"
    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.2
    muon_lr: float = 0.02
    muon_weight_decay: float = 0.1
    muon_momentum: float = 0.95
    warmup: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in get_args(OptimizerKind):
            raise ValueError(f"OptimizerConfig.kind is {self.kind!r}; valid are {', '.join(get_args(OptimizerKind))}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"OptimizerConfig.warmup is {self.warmup}; it is a share of the run, 0 to below 1")
        for name in ("lr", "muon_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"OptimizerConfig.{name} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.muon_momentum < 1:
            raise ValueError(f"OptimizerConfig.muon_momentum is {self.muon_momentum}; it must be from 0 to below 1")
        object.__setattr__(self, "betas", tuple(self.betas))


def parameter_groups(model: CLIP, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group, each with its own rate and decay.

    Gains, biases and the logit scale (all that has fewer than two dimensions) do not decay (paper section 2.5).
    """
    matrices = {id(p) for p in block_matrices(model)} if config.kind == "muon" else set()
    trainable = [p for p in model.parameters() if p.requires_grad]
    muon = [p for p in trainable if id(p) in matrices]
    rest = [p for p in trainable if id(p) not in matrices]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [{"lr": config.lr, "momentum": None, **group} for group in groups]
    stacked = {id(module.in_proj_weight) for module in model.modules() if isinstance(module, Attention)}
    settings = {"lr": config.muon_lr, "weight_decay": config.muon_weight_decay, "momentum": config.muon_momentum}
    # `parts`: matrices that lie one below the other in a parameter; queries, keys and values do.
    groups.append({"params": [p for p in muon if id(p) in stacked], "parts": 3, **settings})
    groups.append({"params": [p for p in muon if id(p) not in stacked], "parts": 1, **settings})
    return [group for group in groups if group["params"]]


def block_matrices(model: CLIP) -> Iterator[Tensor]:
    """The two-dimensional parameters inside the transformers' blocks."""
    for module in model.modules():
        if isinstance(module, Transformer):
            yield from (p for p in module.parameters() if p.ndim == 2)


class Muon(torch.optim.AdamW):
    """AdamW, but groups with a `momentum` take orthogonalised steps (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon/).

    Momentum over a matrix's gradient is replaced by the nearest matrix whose singular values are all about 1, so that
    rare directions move as much as frequent ones. Queries, keys and values share one parameter and are orthogonalised
    each on its own. Matrices of one shape go through the iteration together. On a CPU it runs in float32:
    bfloat16, which torch's and timm's Muon use everywhere, is several times slower there.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # torch's fused AdamW would undo the gradients' scale of mixed precision by itself, and leave Muon's gradients
        # scaled and overflows unnoticed. Without this flag the scaler does both before it calls `step`.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = []
        for group in self.param_groups:
            if group["momentum"] is not None:
                held += [(p, p.grad) for p in group["params"] if p.grad is not None]
                self._muon_step(group)
        for parameter, _ in held:
            parameter.grad = None  # AdamW passes over parameters without a gradient
        super().step()
        for parameter, gradient in held:
            parameter.grad = gradient
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        momentum, decay = group["momentum"], group["lr"] * group["weight_decay"]
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())  # AdamW expects every state that it reads back to have one
                state["momentum_buffer"] = torch.zeros_like(p)
            state["step"] += 1
            average = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            update = p.grad.lerp(average, momentum)  # Nesterov
            p.mul_(1 - decay)
            for weight, direction in zip(p.chunk(group["parts"]), update.chunk(group["parts"]), strict=True):
                by_shape.setdefault((weight.shape[0], weight.shape[1]), []).append((weight, direction))
        for (rows, columns), pairs in by_shape.items():
            steps = orthogonalize(torch.stack([direction for _, direction in pairs]))
            rate = group["lr"] * math.sqrt(max(1, rows / columns))
            for (weight, _), step in zip(pairs, steps, strict=True):
                weight.sub_(step.to(weight.dtype), alpha=rate)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices of orthonormal rows or columns, roughly: singular values end between about 0.7 and 1.2.

    A quintic Newton-Schulz iteration whose coefficients are chosen for a steep start rather than for convergence
    (Jordan et al. 2024).

    Args:
        matrices: (n, rows, columns).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    dtype = torch.float32 if matrices.device.type == "cpu" else torch.bfloat16
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.to(dtype)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # the largest singular value is now at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimizer(model: CLIP, config: OptimizerConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config)
    # One kernel for all parameters, which torch has for these devices; of another it refuses to step.
    is_fused = all(p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return Muon(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=is_fused or None)


def warmup_cosine(step: int, total_steps: int, warmup: float) -> float:
    """Factor on the learning rate at a step: up linearly over the first share of the run, down along a cosine to 0."""
    warmup_steps = round(warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))))
