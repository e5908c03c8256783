"""Devices by name."""

from __future__ import annotations

import torch

from .arguments import shown


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device of a name ("cpu", "cuda:1", …); by default a GPU (CUDA, or Apple's as "mps") if there is one.

    Raises:
        ValueError: it is no device, or a GPU where there is none.
    """
    try:
        device = torch.device(_best() if name is None else name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{shown(name)} is no device; valid are cpu, cuda, cuda:1, mps, …") from error
    if (device.type == "cuda" and not torch.cuda.is_available()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    ):
        raise ValueError(f"device {str(device)!r} was asked for, and torch finds no GPU here")
    return device


def _best() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
