"""Modules of torch's: evaluation mode for as long as one encodes, and the plain values that it computes by."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

T = TypeVar("T")


class _Modes:
    """The modes that the modules of a model had, and how many calls are in it now."""

    def __init__(self, model: nn.Module) -> None:
        self.num_calls = 0
        self.modes = [(module, module.training) for module in model.modules()]


_modes_lock = threading.Lock()
_encoding: WeakKeyDictionary[nn.Module, _Modes] = WeakKeyDictionary()


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """A model in evaluation mode; at the end, also after an error, each of its modules has the mode that it had.

    Calls may nest, and those of several threads overlap: the last one gives the modes back. What is no module of
    torch's is left alone.
    """
    held = _hold_modes(model) if isinstance(model, nn.Module) else None
    try:
        yield
    finally:
        if held is not None:
            _give_modes_back(model, held)


def _hold_modes(model: nn.Module) -> _Modes | None:
    """None for a model that is in evaluation mode by itself."""
    with _modes_lock:
        if model not in _encoding:
            if not _has_training_part(model):
                return None
            _encoding[model] = _Modes(model)
            model.eval()
        _encoding[model].num_calls += 1
        return _encoding[model]


def _give_modes_back(model: nn.Module, held: _Modes) -> None:
    with _modes_lock:
        held.num_calls -= 1
        if not held.num_calls:
            del _encoding[model]
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


def _has_training_part(model: nn.Module) -> bool:
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
