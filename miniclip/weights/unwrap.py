"""The state dict of a CLIP inside what trainers put around it: entries of a checkpoint, prefixes of names.

What is left out (an average of the weights, a head of the trainer's own) is warned of by name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..common.wording import counted, some
from .layouts import Tensors

_Model = tuple[str, str]  # the entry of a checkpoint, and the prefix of the names in it

# Parts of names that DistributedDataParallel, FSDP, DeepSpeed, torch.compile and checkpointing add anywhere.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
# A tensor that every image tower, and one that every text tower of a layout has, below the prefix of the model.
_ANCHORS = (
    ("visual.conv1.weight", "token_embedding.weight"),
    ("visual.conv1.weight", "text.token_embedding.weight"),
    ("visual.head.proj.weight", "text.token_embedding.weight"),
    ("vision_model.embeddings.class_embedding", "text_model.embeddings.token_embedding.weight"),
)
_COMMON = ("state_dict", "model_state_dict", "model", "module", "net", "")
# As words, also of model_ema, modelEMA and EMAModel, not of schema and semantic.
_AVERAGE = re.compile(
    r"(?:(?<![a-z])|(?<=model)|(?<=net)|(?<=weights)|(?<=params))(?:ema|average|swa|shadow|teacher|momentum)"
)
# Parts of names of tensors that are no weights yet: what they are, and what makes weights of them.
_MERGED = "call merge_and_unload() on the model (loralib: eval())"
_NO_WEIGHTS = {
    **dict.fromkeys(
        ("lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector", "base_layer"),
        ("adapters of PEFT's (LoRA) that are not merged into the weights", _MERGED),
    ),
    **dict.fromkeys(
        ("lora_down", "lora_up"),
        ("a LoRA adapter alone", "merge it into the model that it changes (diffusers: fuse_lora())"),
    ),
    **dict.fromkeys(("modules_to_save", "original_module"), ("layers of which PEFT keeps two copies", _MERGED)),
    "parametrizations": ("weights that a parametrization computes", "call parametrize.remove_parametrizations on each"),
    **dict.fromkeys(("weight_g", "weight_v"), ("weights under weight norm", "call remove_weight_norm on each layer")),
    **dict.fromkeys(("weight_orig", "weight_mask"), ("pruned weights beside their masks", "call prune.remove on each")),
    **dict.fromkeys(
        (
            "SCB",
            "quant_state",
            "absmax",
            "_packed_params",
            "qweight",
            "weight_packed",
            "weight_scale",
            "weight_scale_inv",
            "scale_weight",
            "scaled_fp8",
        ),
        ("quantised weights", "dequantise the model or take the one that it was made from"),
    ),
    **dict.fromkeys(
        ("_flat_param", "flat_param"),
        ("FSDP's flattened parts", "gather the whole model (StateDictType.FULL_STATE_DICT)"),
    ),
}
_COUNTERS = ("n_averaged",)  # beside the weights of torch.optim.swa_utils.AveragedModel


def unwrap(values: Any, source: str) -> Tensors:
    """A CLIP's tensors by its own names.

    Raises:
        ValueError: there is none, there are several to choose from, adapters are not merged, or the numbers are in
            parts elsewhere; says what to do.
    """
    entries = {entry: without_wrappers(tensors, source) for entry, tensors in state_dicts(values)}
    if not entries:
        is_mapping = isinstance(values, Mapping) and values
        kind = f"a mapping of {some([str(key) for key in values])}" if is_mapping else f"a {type(values).__name__}"
        raise ValueError(f"{source} is no checkpoint: it holds {kind}, not a CLIP's tensors by their names")
    for tensors in entries.values():
        refuse_no_weights(tensors, source, "save its state_dict()")
    models = [(entry, prefix) for entry, tensors in entries.items() for prefix in _prefixes(tensors)]
    if not models:  # something else; whoever looks for a CLIP's tensors in it says what is missing
        return entries[_chosen([(entry, "") for entry in entries], source)[0]]
    entry, prefix = model = _chosen(models, source)
    others = [_description(other) for other in models if other != model]
    if others:
        warnings.warn(
            f"{source} holds several CLIPs; {_description(model)} is loaded, not {some(others)}", stacklevel=2
        )
    if averages := list(_nameless_averages(values)):
        warnings.warn(
            f"{source}: averages of the weights without their names are left out: {some(averages)}", stacklevel=2
        )
    # Where other models lie below this one's prefix, or beside it, their tensors are theirs.
    theirs = tuple(other for of, other in models if of == entry and other != prefix and not prefix.startswith(other))
    mine = {key: t for key, t in entries[entry].items() if key.startswith(prefix) and not key.startswith(theirs)}
    outside = [key for key in entries[entry] if key not in mine and not key.startswith(theirs)]
    if outside:
        warnings.warn(f"{source}: tensors outside of {prefix!r} are left out: {some(outside)}", stacklevel=2)
    if empty := [key for key, tensor in mine.items() if not tensor.numel()]:
        raise ValueError(
            f"{source} holds tensors without numbers ({some(empty, 2)}), which are in parts elsewhere, as DeepSpeed's "
            "ZeRO-3 and FSDP write them; gather the whole model (DeepSpeed: `python zero_to_fp32.py . OUT` in the "
            "folder above; FSDP: FULL_STATE_DICT)"
        )
    return {key.removeprefix(prefix): tensor for key, tensor in mine.items()}


def state_dicts(values: Any, entry: str = "", depth: int = 0) -> Iterator[tuple[str, Tensors]]:
    """Mappings of names to tensors, by the entries that hold them; not those of optimisers."""
    is_optimiser = re.search("optim(?!al|i[sz]ed)", entry.lower())
    if not isinstance(values, Mapping) or depth > 3 or is_optimiser:
        return
    tensors = {str(key): value for key, value in values.items() if isinstance(value, Tensor)}
    if sum("." in key for key in tensors) > len(values) // 2:
        yield entry, tensors
        return
    for key, value in values.items():
        yield from state_dicts(value, f"{entry}.{key}".lstrip("."), depth + 1)


def _nameless_averages(values: Any, entry: str = "", depth: int = 0) -> Iterator[str]:
    """Entries that hold averages as a list of tensors, as torch_ema's and diffusers' `shadow_params`."""
    if isinstance(values, Mapping) and depth <= 3:
        for key, value in values.items():
            yield from _nameless_averages(value, f"{entry}.{key}".lstrip("."), depth + 1)
    is_average = isinstance(values, list | tuple) and _AVERAGE.search(entry.lower())
    if is_average and (num_tensors := sum(isinstance(value, Tensor) for value in values)):
        yield f"{entry} ({counted(num_tensors, 'tensor')})"


def refuse_no_weights(names: Iterable[str], source: str, then: str) -> None:
    """Raises a ValueError for tensors that are no weights yet.

    Args:
        names: of a state dict.
        source: what holds them, for the error.
        then: what to do once they are weights.
    """
    for key in names:
        for part in key.split("."):
            if part in _NO_WEIGHTS:
                what, remedy = _NO_WEIGHTS[part]
                raise ValueError(f"{source} holds {what} ({key}); {remedy}, and {then}")


def without_wrapper_parts(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def without_wrappers(tensors: Tensors, source: str) -> Tensors:
    """Of the model alone, by its own names; its logits' scale and bias are single numbers, however they are shaped."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        name = without_wrapper_parts(key)
        is_number = name.split(".")[-1] in ("logit_scale", "logit_bias") and tuple(tensor.shape) == (1,)
        if name in out:
            raise ValueError(
                f"{source} holds {name} twice, with a trainer's wrapper and without, once as {key}; save the "
                "state_dict() of one of the two"
            )
        if name not in _COUNTERS:
            out[name] = tensor.reshape(()) if is_number else tensor
    return out


def _prefixes(tensors: Tensors) -> list[str]:
    """The prefixes below which both towers of a CLIP stand."""
    found = {}
    for image, text in _ANCHORS:
        for key in tensors:
            prefix = key.removesuffix(image)
            if prefix != key and prefix[-1:] in ("", ".") and prefix + text in tensors:
                found[prefix] = True
    return list(found)


def _chosen(models: list[_Model], source: str) -> _Model:
    """The one that is no average of another, under the commonest name; an average where there is nothing else."""
    plain = [model for model in models if not _AVERAGE.search(".".join(model).lower())] or models
    ranks = [[_commonness(name) for name in _last_names(model)] for model in plain]
    best = [model for model, rank in zip(plain, ranks, strict=True) if rank == min(ranks)]
    if len(best) > 1:
        named = some([_description(model) for model in best])
        raise ValueError(f"{source} holds several models, {named}; save the one that is meant alone, and load that")
    return best[0]


def _commonness(name: str) -> int:
    return _COMMON.index(name) if name in _COMMON else len(_COMMON)


def _last_names(model: _Model) -> tuple[str, str]:
    """The end of its prefix, else of its entry; and of its entry, where several hold a model under the same prefix."""
    entry, prefix = model
    return (prefix.rstrip(".") or entry).split(".")[-1], entry.split(".")[-1]


def _description(model: _Model) -> str:
    entry, prefix = model
    under = f" under {prefix!r}" if prefix else ""
    return f"the entry {entry!r}{under}" if entry else f"the tensors{under or ' without a prefix'}"
