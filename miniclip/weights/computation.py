"""Whether a model computes what its configuration says: no tensor shows an activation or a number of heads.

It is compared with a fresh one of its configuration, module by module. What differs may not matter (dropout, a forward
that is wrapped), so the two then encode noise with the same tensors. Hooks are not compared: nothing saves them.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..common.modules import evaluation_mode, plain_attributes
from ..common.wording import cut_short
from ..config import CLIPConfig
from ..model import CLIP
from ..tokenizer import random_ids
from .shapes import Unfilled, unfilled
from .unwrap import without_wrapper_parts

_MOST_ROUNDINGS = 64  # of one number, that come together through all layers; measured: 10 for 12 layers on a CPU
_THIS_PACKAGE = __name__.partition(".")[0]
_OF_TRAINING = ("training", "text_length_multiple", "grad_checkpointing")  # attributes that change no feature


def refuse_other_computation(model: nn.Module) -> None:
    """
    Args:
        model: a CLIP of ours or of `miniclip.openclip`, with the tensors of its configuration.

    Raises:
        ValueError: it gives other features than a model of its configuration with its tensors.
    """
    if lines := other_computation(model):
        what = "the model computes something else than its config describes, so `load` would give another model back:"
        remedy = "set model.config to what it computes (dataclasses.replace), or keep its state_dict() with torch.save"
        raise ValueError("\n".join([what, *lines, remedy]))


def other_computation(model: nn.Module) -> list[str]:
    """A line for each part that differs from the configuration's, after ten their number; none if features do not.

    Where parts differ and it can't be found out whether features do, it warns and gives none: the model can't encode,
    or rounding to its half precision may explain what differs.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's
    lines = [f"  {line}" for line in _other_parts(model, _untouched(model, needs_numbers=False))]
    lines = lines[:10] + ([f"  and {len(lines) - 10} more"] if len(lines) > 10 else [])
    if not lines:
        return []
    try:
        return [] if _gives_the_same(model, _untouched(model, needs_numbers=True)) else lines
    except Exception as error:  # of code that somebody put into the model, anything
        what = "whether the model computes what its config describes could not be found out"
        why = f"{type(error).__name__}: {cut_short(' '.join(str(error).split()), 200)}"
        warnings.warn("\n".join([f"{what} ({why}). These parts differ:", *lines]), stacklevel=2)
        return []


def _untouched(model: Any, needs_numbers: bool) -> nn.Module:
    """A model of a model's class and configuration. Of the numbers it has only those that no checkpoint holds."""
    kind: Any = next(each for each in type(model).__mro__ if each.__module__.partition(".")[0] == _THIS_PACKAGE)
    if kind is CLIP and not (needs_numbers and model.config.vision.kind == "timm"):
        with suppress(ValueError):  # some of timm's can't be made without numbers
            return unfilled(model.config)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), Unfilled():
        return getattr(kind, "of", kind)(model.config)  # open_clip's arguments are others


def _other_parts(model: nn.Module, fresh: nn.Module) -> Iterator[str]:
    """What of a model is not as in a fresh one of its configuration, tensors and hooks aside."""
    found = {without_wrapper_parts(name): part for name, part in model.named_modules(remove_duplicate=False)}
    expected = dict(fresh.named_modules(remove_duplicate=False))
    for name in {**expected, **found}:
        part, plain = found.get(name), expected.get(name)
        if part is None or plain is None or type(part) is not type(plain):
            yield f"{name or 'the model'} is {_part_shown(part)}, and {_part_shown(plain)} by the config"
            continue
        own = f"{name}." if name else ""
        there, wanted = plain_attributes(part), plain_attributes(plain)
        for key, value in wanted.items():
            if key not in _OF_TRAINING and there.get(key, ...) != value:
                yield f"{own}{key} is {cut_short(repr(getattr(part, key, None)), 80)}, and {value!r} by the config"
        for key, value in vars(part).items():
            if key[0] != "_" and callable(value) and hasattr(type(part), key) and not _is_of_this_package(value):
                yield f"{own}{key} is {cut_short(repr(value), 80)}, and its class's by the config"
        for key, buffer in plain.named_buffers(recurse=False):
            if (
                key in plain._non_persistent_buffers_set
                and not buffer.is_meta
                and not _is_buffer_equal(part, key, buffer)
            ):
                yield f"{own}{key} holds other numbers than by the config"


def _part_shown(part: nn.Module | None) -> str:
    if part is None:
        return "not there"
    return repr(part) if next(part.children(), None) is None else type(part).__name__


def _is_of_this_package(method: Any) -> bool:
    """What recomputes a method in training; a function's own `__module__` may be that of the one that it wraps."""
    return type(method).__module__.partition(".")[0] == _THIS_PACKAGE


def _is_buffer_equal(part: nn.Module, name: str, buffer: Tensor) -> bool:
    found = getattr(part, name, None)
    return isinstance(found, Tensor) and torch.equal(found.detach().to(buffer), buffer)


def _gives_the_same(model: Any, fresh: Any) -> bool:
    """Whether both give the same features, up to rounding, with the tensors of the first, on its device.

    Raises:
        Exception: one of them can't encode.
        ValueError: their features are not finite, or half precision hides whether they are the same.
    """
    named = {without_wrapper_parts(name): tensor for name, tensor in model.state_dict().items()}
    try:
        fresh.load_state_dict(named, assign=True)  # takes no memory
    except RuntimeError:
        return False
    buffers = {without_wrapper_parts(name): buffer for name, buffer in model.named_buffers()}
    for name, buffer in fresh.named_buffers():
        if name not in named and name in buffers:
            buffer.data = buffer.to(buffers[name])
    device = model.logit_scale.device
    with torch.random.fork_rng(devices=[]), torch.autocast(device.type, enabled=False), _without_hooks(model):
        pairs = list(zip(embeddings(model), embeddings(fresh), strict=True))
    if not all(expected.isfinite().all() for _, expected in pairs):
        raise ValueError("features of noise are not finite")
    if any(found.shape != expected.shape for found, expected in pairs):
        return False
    apart = max(relative_difference(found.to(expected), expected) for found, expected in pairs)
    dtype = max({tensor.dtype for tensor in model.parameters()}, key=lambda dtype: torch.finfo(dtype).eps)
    if _MOST_ROUNDINGS * torch.finfo(torch.float32).eps < apart <= _MOST_ROUNDINGS * torch.finfo(dtype).eps:
        raise ValueError(f"features of noise differ by {apart:.0e}, which rounding to {dtype} may explain")
    return apart <= _MOST_ROUNDINGS * torch.finfo(torch.float32).eps


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """A model whose forward hooks do not see what it encodes."""
    names = ("_forward_pre_hooks", "_forward_hooks")
    aside = [(part, name, hooks) for part in model.modules() for name in names if (hooks := getattr(part, name))]
    try:
        for part, name, _ in aside:
            setattr(part, name, OrderedDict())
        yield
    finally:
        for part, name, hooks in aside:
            setattr(part, name, hooks)


# ---------------------------------------------------------------------------------------------------------------------
# Noise


def probe(config: CLIPConfig) -> tuple[Tensor, Tensor]:
    """Two noise images and two texts that fit a model."""
    random = torch.Generator().manual_seed(0)
    R, L = config.vision.image_size, min(config.text.context_length, 12)
    tokens, end = random_ids(config.text, (2, L), random)
    tokens[:, -1] = end
    return torch.randn(2, 3, R, R, generator=random), tokens


@torch.no_grad()  # not in inference mode: what a model keeps of it is of use in training
def embeddings(model: Any) -> list[Tensor]:
    """By each of its towers, in evaluation mode, on the model's device."""
    device = model.logit_scale.device
    images, tokens = (inputs.to(device) for inputs in probe(model.config))
    encodings = {"image": (model.encode_image, images), "text": (model.encode_text, tokens)}
    with evaluation_mode(model):
        return [encode(inputs) for name, (encode, inputs) in encodings.items() if model.config.towers in (name, "both")]


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
