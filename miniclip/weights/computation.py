"""Whether a model computes what its configuration says: no tensor shows an activation, a number of heads or a hook.

A model is compared with a fresh one of its configuration, module by module. What differs may not matter: a hook that
looks on, dropout, blocks that are recomputed. So the two then encode noise with the same tensors, in double precision.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..common.modules import plain_attributes
from ..common.wording import cut_short
from ..config import CLIPConfig
from ..model import CLIP
from ..tokenizer import random_ids
from .shapes import Unfilled, unfilled
from .unwrap import without_wrapper_parts

_ROUNDING = 1e-9  # of double precision, through all layers
_OURS = __name__.partition(".")[0]


def refuse_other_computation(model: nn.Module) -> None:
    """
    Args:
        model: a CLIP of ours or of `miniclip.openclip`, with the tensors of its configuration.

    Raises:
        ValueError: it gives other features than a model of its configuration with its tensors, or none.
    """
    if lines := other_computation(model):
        what = "the model computes something else than its config describes, so `load` would give another model back:"
        remedy = "set model.config to what it computes (dataclasses.replace), or keep its state_dict() with torch.save"
        raise ValueError("\n".join([what, *lines, remedy]))


def other_computation(model: nn.Module) -> list[str]:
    """A line for each part that differs from the configuration's, after ten their number; none if features do not."""
    model = getattr(model, "_orig_mod", model)  # torch.compile's
    lines = [f"  {line}" for line in _changes(model, _fresh(model, needs_numbers=False))]
    if not lines or _is_same(model, _fresh(model, needs_numbers=True)):
        return []
    return lines[:10] + ([f"  and {len(lines) - 10} more"] if len(lines) > 10 else [])


def _fresh(model: Any, needs_numbers: bool) -> nn.Module:
    """A model of a model's class and configuration. Of the numbers it has only those that no checkpoint holds."""
    kind: Any = next(each for each in type(model).__mro__ if each.__module__.partition(".")[0] == _OURS)
    if kind is CLIP and not needs_numbers:
        with suppress(ValueError):  # some of timm's can't be made without numbers
            return unfilled(model.config)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), Unfilled():
        return kind(model.config)


def _changes(model: nn.Module, fresh: nn.Module) -> Iterator[str]:
    """What of a model is not as in a fresh one of its configuration, tensors aside."""
    found = {without_wrapper_parts(name): part for name, part in model.named_modules(remove_duplicate=False)}
    expected = dict(fresh.named_modules(remove_duplicate=False))
    for name in {**expected, **found}:
        part, plain = found.get(name), expected.get(name)
        if part is None or plain is None or type(part) is not type(plain):
            yield f"{name or 'the model'} is {_shown(part)}, and {_shown(plain)} by the config"
            continue
        own = f"{name}." if name else ""
        there, wanted = plain_attributes(part), plain_attributes(plain)
        for key, value in wanted.items():
            if key != "training" and there.get(key, ...) != value:
                yield f"{own}{key} is {cut_short(repr(getattr(part, key, None)), 80)}, and {value!r} by the config"
        for key, value in vars(part).items():
            if key[0] != "_" and callable(value) and hasattr(type(part), key) and not _is_ours(value):
                yield f"{own}{key} is {cut_short(repr(value), 80)}, and its class's by the config"
        for hook in chain(part._forward_pre_hooks.values(), part._forward_hooks.values()):
            if not _is_ours(hook):
                yield f"{name or 'the model'} has the hook {cut_short(repr(hook), 80)}, and none by the config"
        for key, buffer in plain.named_buffers(recurse=False):
            if key in plain._non_persistent_buffers_set and not buffer.is_meta and not _is_equal(part, key, buffer):
                yield f"{own}{key} holds other numbers than by the config"


def _shown(part: nn.Module | None) -> str:
    if part is None:
        return "not there"
    return repr(part) if next(part.children(), None) is None else type(part).__name__


def _is_ours(function: Any) -> bool:
    """What training puts on a model from outside changes nothing in evaluation."""
    return str(getattr(function, "__module__", None)).partition(".")[0] == _OURS


def _is_equal(part: nn.Module, name: str, buffer: Tensor) -> bool:
    found = getattr(part, name, None)
    return isinstance(found, Tensor) and torch.equal(found.detach().to(buffer), buffer)


def _is_same(model: Any, fresh: Any) -> bool:
    """Whether both give the same features with the tensors of the first; no, if that can't be found out."""
    tensors = chain(model.parameters(), model.buffers())
    memo: dict[int, Any] = {id(tensor): _in_double(tensor) for tensor in tensors}
    try:
        with torch.random.fork_rng(devices=[]):
            wide = copy.deepcopy(model, memo).eval()
            named = {without_wrapper_parts(name): tensor for name, tensor in wide.state_dict().items()}
            fresh.load_state_dict(named, assign=True)
            pairs = list(zip(embeddings(wide), embeddings(fresh.double().eval()), strict=True))
        return all(relative_difference(*pair) <= _ROUNDING for pair in pairs)
    except Exception:  # of code that somebody put into the model, anything
        return False


def _in_double(tensor: Tensor) -> Tensor:
    found = tensor.detach().to("cpu", torch.float64 if tensor.is_floating_point() else None)
    return nn.Parameter(found, requires_grad=False) if isinstance(tensor, nn.Parameter) else found


# ---------------------------------------------------------------------------------------------------------------------
# Noise


def probe(config: CLIPConfig) -> tuple[Tensor, Tensor]:
    """Two noise images and two texts that fit a model."""
    random = torch.Generator().manual_seed(0)
    R, L = config.vision.image_size, min(config.text.context_length, 12)
    tokens, end = random_ids(config.text, (2, L), random)
    tokens[:, -1] = end
    return torch.randn(2, 3, R, R, generator=random), tokens


@torch.inference_mode()
def embeddings(model: Any) -> list[Tensor]:
    """By each of its towers."""
    images, tokens = probe(model.config)
    model.eval()
    encodings = {"image": (model.encode_image, images), "text": (model.encode_text, tokens)}
    return [encode(inputs) for name, (encode, inputs) in encodings.items() if model.config.towers in (name, "both")]


def relative_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())
