"""What a tower can be recognised by: a digest of its weights and of what it makes of fixed probes."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..common.modules import plain_attributes

_HASHED_AT_ONCE = 1 << 24  # bytes


# ---------------------------------------------------------------------------------------------------------------------
# What a model is recognised by

# Short, long but within every context of 64, capitals, digits, entities, accents, other scripts, a picture.
PROBE_TEXTS = (
    "a",
    "a photo of a cat.",
    "A PHOTO of a Ford-T &amp; its driver's hat, 1908",
    "  two   spaces,\ttabs\nand &lt;lines&gt;  ",
    "crème brûlée, Straße, naïve café — “quoted”…",
    "写真の猫 фото кота صورة قطة",
    "an owl 🦉 at night",
    "a low resolution photo of the large brown dog that runs along the beach while three children in red coats look "
    "on from a small wooden boat and the sun goes down behind them",
    "",
)


def probe_pictures() -> list[Image.Image]:
    """Wide, tall, small, grey, with transparency, with a palette; the same everywhere and for ever."""

    def pattern(width: int, height: int, channels: int) -> np.ndarray:
        y, x, c = np.ogrid[:height, :width, :channels]
        return ((x * (5 + 2 * c) + y * (3 + 4 * c) + x * y // (7 + c)) % 256).astype(np.uint8)

    palette = Image.fromarray(pattern(66, 48, 1)[:, :, 0], "P")
    palette.putpalette(bytes((value * factor) % 256 for value in range(256) for factor in (1, 3, 7)))
    return [
        Image.fromarray(pattern(300, 90, 3)),
        Image.fromarray(pattern(70, 231, 3)),
        Image.fromarray(pattern(7, 5, 3)),
        Image.fromarray(pattern(64, 48, 1)[:, :, 0]),
        Image.fromarray(pattern(61, 53, 4)),
        palette,
    ]


def probe_outputs(function: Callable[[Any], Any], probes: Sequence[Any]) -> str | None:
    """A digest of what `function` makes of each probe; None if that is not the same twice, or nothing of which bytes
    can be taken. A refusal counts as an output."""
    digests = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            parts = []
            for probe in probes:
                try:
                    parts.append(digest_value(function(probe)))
                except Exception as error:
                    parts.append(type(error).__name__)
            digests.append(None if None in parts else digest_arrays(*map(str, parts)))
    return digests[0] if digests[0] == digests[1] else None


def digest_value(value: Any) -> str | None:
    """A text that differs for different values: tensors, arrays, numbers, texts, mappings and sequences of them."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        return digest_arrays(str(value.dtype), str(tuple(value.shape)), hashlib.blake2b(_bytes(value)).hexdigest())
    if isinstance(value, str | int | float | bool | None):
        return repr(value)
    if isinstance(value, Mapping):
        value = [item for key in sorted(value, key=str) for item in (str(key), value[key])]
    if isinstance(value, list | tuple):
        parts = [digest_value(item) for item in value]
        return None if None in parts else digest_arrays(type(value).__name__, *map(str, parts))
    return None


def digest_module(module: nn.Module) -> str:
    """A digest of what a module computes: its tensors (names, shapes, types, bytes), and its parts' classes, numbers,
    words and configurations (heads, strides, the kind of pooling), which no tensor shows."""
    tensors = [(name, tensor, part) for name, tensor in tensors_of(module) for part in _pieces(tensor)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing a large buffer lets other threads run
        digests = list(threads.map(lambda item: hashlib.blake2b(_bytes(item[2]), digest_size=32).hexdigest(), tensors))
    named = [
        f"{name} {tuple(tensor.shape)} {tensor.dtype} {digest}"
        for (name, tensor, _), digest in zip(tensors, digests, strict=True)
    ]
    return digest_arrays(*named, *_architecture(module))


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers too, also those that no checkpoint holds, such as masks and positions."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.detach().reshape(-1).split(max(1, _HASHED_AT_ONCE // tensor.element_size()))


def _bytes(tensor: Tensor) -> Any:  # a buffer
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _architecture(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules(remove_duplicate=False):
        plain = {key: value for key, value in plain_attributes(part).items() if key not in PASSING_STATE}
        yield f"{name} {type(part).__module__}.{type(part).__qualname__} {plain}"
        if hasattr(part, "config") and hasattr(part.config, "to_dict"):  # transformers' parts also act by it
            config = {key: value for key, value in part.config.to_dict().items() if key not in PASSING_STATE}
            yield json.dumps(config, sort_keys=True, default=str)


# Where a model came from, and what it is doing, do not change what it computes.
PASSING_STATE = {
    "training",
    "name_or_path",
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
}


def digest_arrays(*parts: str) -> str:
    """A digest of texts, with their lengths, so that no two lists of texts have the same."""
    whole = hashlib.blake2b(digest_size=32)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        whole.update(len(encoded).to_bytes(8, "big") + encoded)
    return whole.hexdigest()
