"""Modules of torch's: evaluation mode for as long as one encodes, and the plain values that it computes by."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

T = TypeVar("T")


class _Held:
    """The modes that the modules of a model had, and how many calls are in it now."""

    def __init__(self, model: nn.Module) -> None:
        self.num_calls = 0
        self.modes = [(module, module.training) for module in model.modules()]


_lock = threading.Lock()
_held: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """A model in evaluation mode; at the end, also after an error, each of its modules has the mode that it had.

    Calls may nest, and those of several threads overlap: the last one gives the modes back. What is no module of
    torch's is left alone.
    """
    held = _enter(model) if isinstance(model, nn.Module) else None
    try:
        yield
    finally:
        if held is not None:
            _leave(model, held)


def _enter(model: nn.Module) -> _Held | None:
    """None for a model that is in evaluation mode by itself."""
    with _lock:
        if model not in _held:
            if not _is_training(model):
                return None
            _held[model] = _Held(model)
            model.eval()
        _held[model].num_calls += 1
        return _held[model]


def _leave(model: nn.Module, held: _Held) -> None:
    with _lock:
        held.num_calls -= 1
        if not held.num_calls:
            del _held[model]
            for module, mode in held.modes:  # a module comes before those in it, whose modes its own sets, too
                if module.training != mode:
                    module.train(mode)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Numbers, words and truth values among a module's public attributes (heads, strides, pooling), by name."""
    return {key: value for key, value in sorted(vars(module).items()) if key[0] != "_" and is_plain_value(value)}


def is_plain_value(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(is_plain_value(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_training(model: nn.Module) -> bool:
    """Whether one of its modules is; four times as fast as `model.modules()`."""
    modules: list[nn.Module | None] = [model]
    while modules:
        module = modules.pop()
        if module is not None:
            if module.training:
                return True
            modules += module._modules.values()
    return False


def evaluating(model: Any, function: Callable[[Any], T]) -> Callable[[Any], T]:
    """The function, which has the model in evaluation mode while it runs."""

    def call(argument: Any) -> T:
        with evaluation_mode(model):
            return function(argument)

    return call
