"""When a fast path may act: on modules that nobody has touched, and only while PyTorch runs them eagerly."""

from __future__ import annotations

from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its class says and nothing else: no other class, no hooks on it."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks)
