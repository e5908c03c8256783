"""Tensors from Python code: each is of the kind that a function takes, or a ValueError names it and what is allowed."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .arguments import shown

Kind = Literal["floats", "whole numbers", "booleans"]


def check_tensor(name: str, value: Any, kind: Kind, what: str) -> None:
    """Raises a ValueError unless `value` is a tensor of that kind. It may run in traces, exports and compiled graphs.

    Args:
        what: the meaning of such a tensor, for the error ("token ids, as …").
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {shown(value)}; it must be a tensor, {what}")
    if kind != _kind(value):
        raise ValueError(f"{name} is of {value.dtype}; it must be of {kind}, {what}")


def _kind(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floats"
    if tensor.dtype == torch.bool:
        return "booleans"
    return "complex numbers" if tensor.is_complex() else "whole numbers"
