"""Other libraries' names of tensors <-> ours.

One table per layout, read from left to right on the way in and from right to left on the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

_OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size", "attn_mask")

_HF_NAMES = (
    ("text_model.embeddings.token_embedding.", "text.token_embedding."),
    ("text_model.embeddings.position_embedding.weight", "text.positional_embedding"),
    ("text_model.encoder.layers.", "text.transformer.resblocks."),
    ("text_model.final_layer_norm.", "text.ln_final."),
    ("text_projection.weight", "text.text_projection"),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),  # spelt so
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("visual_projection.weight", "visual.proj"),
)
_HF_NAMES_IN_BLOCKS = (
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
_HF_TRANSPOSED = ("text.text_projection", "visual.proj")


def from_openai_keys(tensors: Mapping[str, Tensor]) -> Tensors:
    """OpenAI's names to ours: the text tower's parameters stand at the top level there, under `text.` here."""
    return {
        key if key.startswith("visual.") or key in ("logit_scale", "logit_bias") else f"text.{key}": tensor
        for key, tensor in tensors.items()
        if key not in _OPENAI_EXTRAS
    }


def to_openai_keys(tensors: Mapping[str, Tensor]) -> Tensors:
    return {key.removeprefix("text."): tensor for key, tensor in tensors.items()}


def is_hf(tensors: Mapping[str, Tensor]) -> bool:
    return any(key.startswith(("text_model.", "vision_model.")) for key in tensors)


def from_hf_keys(tensors: Mapping[str, Tensor]) -> Tensors:
    """Hugging Face's names to ours; queries, keys and values become one matrix."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        if key.endswith(".embeddings.position_ids"):
            continue
        name = _rename(key, _HF_NAMES, _HF_NAMES_IN_BLOCKS)
        if ".self_attn." not in name:
            out[name] = tensor.T if name in _HF_TRANSPOSED else tensor
        elif ".self_attn.q_proj." in name:
            parts = [key.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
            missing = [part for part in parts if part not in tensors]
            if missing:
                raise ValueError(f"the checkpoint has {key} and no {missing[0]}")
            stacked = torch.cat([tensors[part] for part in parts])
            out[name.replace(".self_attn.q_proj.", ".attn.in_proj_")] = stacked
        elif not name.replace(".k_proj.", ".v_proj.").endswith((".v_proj.weight", ".v_proj.bias")):
            out[name] = tensor
    return out


def to_hf_keys(tensors: Mapping[str, Tensor]) -> Tensors:
    names, in_blocks = (tuple((b, a) for a, b in table) for table in (_HF_NAMES, _HF_NAMES_IN_BLOCKS))
    out: Tensors = {}
    for key, tensor in tensors.items():
        name = _rename(key, names, in_blocks)
        if ".attn.in_proj_" in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                out[name.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = rows
        else:
            out[name] = tensor.T if key in _HF_TRANSPOSED else tensor
    return out


def _rename(key: str, names: tuple[tuple[str, str], ...], in_blocks: tuple[tuple[str, str], ...]) -> str:
    for before, after in names:
        if key.startswith(before):
            key = after + key.removeprefix(before)
            break
    for before, after in in_blocks:
        key = key.replace(before, after)
    return key


def naming_of(tensors: Mapping[str, Tensor]) -> Callable[[str], str]:
    """What a file of these tensors calls one that has a name of ours, for errors; trainers' prefixes are left out."""
    if is_hf(tensors):
        return _hf_name
    if any(key.startswith("text.") for key in tensors):
        return str
    return lambda name: name.removeprefix("text.")


def _hf_name(name: str) -> str:
    """Of the tensors that became one of ours, all; says where a shape of ours is another than theirs."""
    names, in_blocks = (tuple((b, a) for a, b in table) for table in (_HF_NAMES, _HF_NAMES_IN_BLOCKS))
    theirs = _rename(name, names, in_blocks)
    if ".attn.in_proj_" in theirs:
        return f"{theirs.replace('.attn.in_proj_', '.self_attn.{q,k,v}_proj.')} (stacked)"
    return f"{theirs} (transposed)" if name in _HF_TRANSPOSED else theirs


def to_native_keys(tensors: Mapping[str, Tensor]) -> Tensors:
    """From Hugging Face's names, OpenAI's, or OpenCLIP's of a model with a text tower of its own, which are ours."""
    if is_hf(tensors):
        return from_hf_keys(tensors)
    if any(key.startswith("text.") for key in tensors):
        return {key: tensor for key, tensor in tensors.items() if key != "text.attn_mask"}
    return from_openai_keys(tensors)
