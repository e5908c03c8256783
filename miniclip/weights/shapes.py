"""Which tensors an architecture has, known before a model is built: a file may claim any number of blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..config import CLIPConfig
from ..model import CLIP

_BLOCK_KEY = re.compile(r"(.*\.resblocks\.|visual\.layer[1-4]\.)(\d+)(\..*)")


class Unfilled(TorchFunctionMode):
    """Under it, modules are made in no time: no memory is taken, and no random numbers are drawn to be overwritten.

    The device "meta" alone would do the former; but its `normal_` is a reference implementation, for which torch
    imports its compiler: a second, and 200 MB.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def unfilled(config: CLIPConfig) -> CLIP:
    """A model without numbers, on the device "meta".

    Raises:
        ValueError: a size that no tensor can have.
    """
    try:
        with torch.device("meta"), Unfilled():
            return CLIP(config)
    except (RuntimeError, TypeError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"no model has these sizes: {str(error).splitlines()[0][:200]}") from error


class Shapes:
    """The shapes of an architecture's tensors by name, from a model of one block or two a stage."""

    def __init__(self, config: CLIPConfig) -> None:
        vision, text = config.vision, config.text
        self._depths = {"text.transformer.resblocks.": text.layers, "visual.transformer.resblocks.": vision.layers}
        self._depths |= {f"visual.layer{stage + 1}.": depth for stage, depth in enumerate(vision.blocks)}
        # The first block of a ResNet's stage has tensors that the others lack.
        one, two, three, four = (min(2, depth) for depth in vision.blocks)
        few = replace(vision, layers=1, blocks=(one, two, three, four))
        config = replace(config, vision=few, text=replace(text, layers=1))
        try:
            model = unfilled(config)
        except ValueError:
            if vision.kind != "timm":
                raise
            model = CLIP(config)  # some of timm's can't be made without numbers
        self._shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}

    def count(self) -> int:
        return sum(end - first for first, end in map(self._repeats, self._shapes))

    def names(self) -> Iterator[str]:
        for key in self._shapes:
            match = _BLOCK_KEY.fullmatch(key)
            for index in range(*self._repeats(key)):
                yield f"{match[1]}{index}{match[3]}" if match else key

    def get(self, key: str) -> tuple[int, ...] | None:
        """None for a tensor that the architecture does not have."""
        match = _BLOCK_KEY.fullmatch(key)
        if match is None:
            return self._shapes.get(key)
        start, index, rest = match[1], int(match[2][:9]), match[3]
        if str(index) != match[2] or index >= self._depths.get(start, 0):
            return None
        return self._shapes.get(f"{start}{min(index, self._last(start))}{rest}")

    def _last(self, start: str) -> int:
        """The index of the block that stands for those after it, too."""
        return 0 if start.endswith("resblocks.") else 1

    def _repeats(self, key: str) -> tuple[int, int]:
        """The first and the end of the indices that a block's tensor stands for."""
        match = _BLOCK_KEY.fullmatch(key)
        if match is None:
            return 0, 1
        index, is_last = int(match[2]), int(match[2]) == self._last(match[1])
        return index, self._depths[match[1]] if is_last else index + 1


def differences(
    config: CLIPConfig,
    tensors: Mapping[str, Tensor],
    holder: str = "the file",
    called: Callable[[str], str] = str,
) -> list[str]:
    """A line for each tensor whose name or shape is not the architecture's; after ten, their number.

    Args:
        holder: what has the tensors, in these lines.
        called: what it calls a tensor that has a name of ours.

    Raises:
        ValueError: an architecture that can't be built.
    """
    shapes, nothing = Shapes(config), "no such tensor"
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    wrong = [key for key in found if shapes.get(key) != found[key]]
    num_missing = shapes.count() - sum(shapes.get(key) is not None for key in found)
    missing = (key for key in shapes.names() if key not in found)
    keys = sorted([*wrong, *(key for key, _ in zip(missing, range(min(10, num_missing)), strict=False))])
    wanted = {key: nothing if (shape := shapes.get(key)) is None else shape for key in keys}  # () is a shape, too
    lines = [f"  {called(key)}: the architecture has {wanted[key]}, {holder} {found.get(key, nothing)}" for key in keys]
    num_wrong = len(wrong) + num_missing
    return lines[:10] + ([f"  and {num_wrong - 10} more"] if num_wrong > 10 else [])
