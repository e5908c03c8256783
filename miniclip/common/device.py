"""Devices by name."""

from __future__ import annotations

import torch


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device of a name ("cpu", "cuda:1", …); by default a GPU if there is one.

    Raises:
        ValueError: it is no device, or a GPU where there is none.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device; valid are cpu, cuda, cuda:1, …") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, and torch finds no GPU here")
    return device
