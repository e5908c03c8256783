"""Modules of torch's: evaluation mode for as long as one encodes, plain values that they compute by, what they load."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


class _Held:
    """The mode that a module had, and how many calls have it in evaluation mode now."""

    def __init__(self, was_training: bool) -> None:
        self.was_training, self.num_calls = was_training, 0


_modes_lock = threading.Lock()
_modes_held: dict[int, _Held] = {}  # by a module's id, which is its own as long as calls hold it


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """A model in evaluation mode; at the end, also after an error, each of its modules has the mode that it had.

    Calls may nest, and those of several threads overlap, also for a model and a part of it: the last one that has a
    module gives its mode back. What is no module of torch's is left alone.
    """
    held = _hold_modes(model) if isinstance(model, nn.Module) else []
    try:
        yield
    finally:
        _give_modes_back(held)


def _hold_modes(model: nn.Module) -> list[nn.Module]:
    """Its modules; none of a model that is in evaluation mode by itself."""
    with _modes_lock:
        if not _has_held_or_training_part(model):
            return []
        modules = list(model.modules())
        modes = [_is_training(module) for module in modules]
        if any(modes):
            model.eval()
        for module, mode in zip(modules, modes, strict=True):
            _modes_held.setdefault(id(module), _Held(mode)).num_calls += 1
        return modules


def _give_modes_back(modules: list[nn.Module]) -> None:
    with _modes_lock:
        modes = [_mode_to_give_back(module) for module in modules]
        for module, mode in zip(modules, modes, strict=True):  # a module comes before those in it
            if _is_training(module) == mode:
                continue
            if type(module).train is nn.Module.train:
                module.training = mode  # and not that of the modules in it, which others may hold
            else:
                module.train(mode)  # loralib's layers merge their weights


def _mode_to_give_back(module: nn.Module) -> bool:
    held = _modes_held[id(module)]
    held.num_calls -= 1
    if held.num_calls:
        return False
    del _modes_held[id(module)]
    return held.was_training


def _is_training(module: nn.Module) -> bool:
    return getattr(module, "training", False)  # a frozen module of TorchScript's has no mode


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Numbers, words and truth values among a module's public attributes (heads, strides, pooling), by name."""
    return {key: value for key, value in sorted(vars(module).items()) if key[0] != "_" and is_plain_value(value)}


def is_plain_value(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(is_plain_value(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _has_held_or_training_part(model: nn.Module) -> bool:
    """Whether one of its modules is either; four times as fast as `model.modules()`."""
    modules: list[nn.Module | None] = [model]
    while modules:
        module = modules.pop()
        if module is not None:
            if id(module) in _modes_held or _is_training(module):
                return True
            modules += module._modules.values()
    return False


def evaluating(model: Any, function: Callable[[Any], T]) -> Callable[[Any], T]:
    """The function, which has the model in evaluation mode while it runs."""

    def call(argument: Any) -> T:
        with evaluation_mode(model):
            return function(argument)

    return call


@contextmanager
def loads_recorded() -> Iterator[list[Any]]:
    """What each `load_state_dict` meanwhile returns, the names of tensors that are missing and of those left over, for
    libraries that keep it to themselves."""
    load, found = nn.Module.load_state_dict, list[Any]()

    def recorded(*args: Any, **options: Any) -> Any:
        found.append(load(*args, **options))
        return found[-1]

    nn.Module.load_state_dict = recorded  # type: ignore[method-assign]
    try:
        yield found
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]
