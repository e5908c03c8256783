"""Weights that no zero hides."""

from __future__ import annotations

import torch


def randomise(module, seed):
    """Draws every parameter: matrices that keep the scale of their input, biases and gains far from 0 and 1."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            parameter.normal_(generator=random)
            if name.endswith(("proj", "projection")):
                parameter.mul_(parameter.shape[0] ** -0.5)
            elif parameter.ndim >= 2 and "embedding" not in name:
                parameter.mul_((parameter.numel() // parameter.shape[0]) ** -0.5)
            elif parameter.ndim == 1 and name.endswith("weight"):
                parameter.mul_(0.3).add_(1)
            elif parameter.ndim <= 1:
                parameter.mul_(0.2)
    return module
