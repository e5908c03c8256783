"""A checkpoint in another library's layout: what `convert` writes before it verifies."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.files import atomic_write, write_text
from ..config import CLIPConfig, VisionConfig
from ..tokenizer import CONTEXT_LENGTH, END_OF_TEXT, START_OF_TEXT, learnt_merges, symbol_ids
from .containers import write_safetensors
from .folders import CONFIG_FILE, OPENCLIP_CONFIG_FILE, WEIGHTS_FILE
from .hf_pixels import settings_of
from .layouts import Tensors, to_hf_keys, to_openai_keys
from .read import Checkpoint

# All that the writers below leave in a folder.
FOLDER_FILES = (
    *(CONFIG_FILE, WEIGHTS_FILE),
    *(OPENCLIP_CONFIG_FILE, "open_clip_model.safetensors"),
    *("preprocessor_config.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"),
)


def _plain(tensors: Tensors) -> Tensors:
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _write_native(checkpoint: Checkpoint, out: Path) -> None:
    write_safetensors(out / WEIGHTS_FILE, _plain(checkpoint.tensors))
    write_text(out / CONFIG_FILE, checkpoint.config.to_json())


def _write_openai(checkpoint: Checkpoint, out: Path) -> None:
    config = checkpoint.config
    require(config.vision.kind != "timm", "OpenAI's code has no towers of timm's")
    require(config.init_logit_bias is None, "OpenAI's code has no bias of the logits, which the sigmoid loss needs")
    require(config.activation == "quick_gelu", "OpenAI's code knows QuickGELU alone, and this model has GELU")
    require(_has_heads_of_64(config), "OpenAI's code makes every attention head 64 channels wide")
    end, vocab_size = config.text.eot_token, config.text.vocab_size
    is_largest = end in (None, vocab_size - 1)
    require(is_largest, f"its library reads texts at the largest id, and here {end} of {vocab_size} ids ends a text")
    require(config.vision.mlp_ratio == config.text.mlp_ratio == 4, "OpenAI's code has an mlp_ratio of 4")
    sizes = (config.vision.image_size, config.text.context_length, config.text.vocab_size)
    tensors = to_openai_keys(_plain(checkpoint.tensors))
    names = ("input_resolution", "context_length", "vocab_size")
    tensors |= {name: torch.tensor(size) for name, size in zip(names, sizes, strict=True)}
    with warnings.catch_warnings(), atomic_write(out) as file:
        for category in (DeprecationWarning, FutureWarning):  # torch's; OpenAI's package reads nothing but TorchScript
            warnings.simplefilter("ignore", category)
        torch.jit.save(torch.jit.script(_as_module(tensors)), file)


def _as_module(tensors: Tensors) -> nn.Module:
    """Modules without code that hold tensors under their dotted names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if tensor.is_floating_point() and "running_" not in last:
            module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
        else:
            module.register_buffer(last, tensor)
    return root


def _write_openclip(checkpoint: Checkpoint, out: Path) -> None:
    config, vision = checkpoint.config, checkpoint.config.vision
    is_plain = vision.resize != "none" and vision.resize_size in (None, vision.image_size)
    require(is_plain, f"open_clip resizes pictures to the model's {vision.image_size} pixels, and this model does not")
    is_known = vision.interpolation in ("bicubic", "bilinear")
    require(is_known, f"open_clip resizes bicubic or bilinear, and this model {vision.interpolation}")
    write_safetensors(out / "open_clip_model.safetensors", _plain(to_openai_keys(checkpoint.tensors)))
    write_text(out / OPENCLIP_CONFIG_FILE, json.dumps(openclip_settings(config), indent=2) + "\n")


def openclip_settings(config: CLIPConfig) -> dict[str, Any]:
    """What stands in an `open_clip_config.json`."""
    vision, text = config.vision, config.text
    tower: dict[str, Any] = {"image_size": vision.image_size}
    if vision.kind == "timm":
        projection = "" if vision.timm_projection == "classifier" else vision.timm_projection
        tower |= {"timm_model_name": vision.timm_model, "timm_model_pretrained": False, "timm_pool": vision.timm_pool}
        tower |= {"timm_proj": projection, "timm_proj_bias": vision.timm_projection_bias}
    elif vision.kind == "resnet":
        tower |= {"layers": list(vision.blocks), "width": vision.width, "head_width": vision.head_width}
    else:
        tower |= {"layers": vision.layers, "width": vision.width, "head_width": vision.head_width}
        tower |= {"patch_size": vision.patch_size, "mlp_ratio": vision.mlp_ratio}
    words: dict[str, Any]
    words = {"context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.width,
             "heads": text.heads, "layers": text.layers, "mlp_ratio": text.mlp_ratio}  # fmt: skip
    if text.eot_token not in (None, text.vocab_size - 1):  # else open_clip looks for the largest id
        words |= {"pool_type": "eos", "eos_id": text.eot_token}
    model = {"embed_dim": config.embed_dim, "quick_gelu": config.activation == "quick_gelu", "vision_cfg": tower}
    model |= {"init_logit_scale": config.init_logit_scale}
    if config.init_logit_bias is not None:
        model |= {"init_logit_bias": config.init_logit_bias}
    pixels: dict[str, Any] = {"mean": vision.mean, "std": vision.std}
    pixels |= {"interpolation": vision.interpolation, "resize_mode": vision.resize}
    return {"model_cfg": {**model, "text_cfg": words}, "preprocess_cfg": pixels}


def _write_hf(checkpoint: Checkpoint, out: Path) -> None:
    config = checkpoint.config
    require(config.vision.kind == "vit", "Hugging Face's CLIPModel has a ViT as its image tower and no other")
    require(config.init_logit_bias is None, "Hugging Face's CLIPModel has no bias, which the sigmoid loss needs")
    is_told = config.text.eot_token != 2 or config.text.vocab_size == 3
    require(is_told, "Hugging Face's CLIPModel takes an end of 2 to mean the largest id, and here 2 itself ends a text")

    def tower(section: Any) -> dict[str, Any]:
        return {
            "hidden_size": section.width,
            "num_hidden_layers": section.layers,
            "num_attention_heads": section.heads,
            "intermediate_size": int(section.width * section.mlp_ratio),
            "hidden_act": config.activation,
            "layer_norm_eps": 1e-5,
            "projection_dim": config.embed_dim,
        }

    vision, text = config.vision, config.text
    images = {**tower(vision), "image_size": vision.image_size, "patch_size": vision.patch_size}
    end = 2 if text.eot_token is None else text.eot_token  # transformers takes 2 to mean the largest id
    ends = {"bos_token_id": START_OF_TEXT, "eos_token_id": end, "pad_token_id": end}
    words = {**tower(text), "vocab_size": text.vocab_size, "max_position_embeddings": text.context_length, **ends}
    values = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config.embed_dim,
              "logit_scale_init_value": config.init_logit_scale,
              "text_config": words, "vision_config": images}  # fmt: skip
    write_safetensors(out / WEIGHTS_FILE, _plain(to_hf_keys(checkpoint.tensors)))
    write_text(out / CONFIG_FILE, json.dumps(values, indent=2) + "\n")
    write_text(out / "preprocessor_config.json", json.dumps(settings_of(vision), indent=2) + "\n")
    if text.eot_token == END_OF_TEXT:
        for name, content in vocabulary_files(text.context_length).items():
            write_text(out / name, content)


def _has_heads_of_64(config: CLIPConfig) -> bool:
    return config.vision.head_width == config.text.head_width == 64


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"this model can't be written in that format: {otherwise}")


def vocabulary_files(context_length: int = CONTEXT_LENGTH) -> dict[str, str]:
    """This tokenizer as the files that Hugging Face's `CLIPTokenizer` reads: their names and contents."""
    symbols = symbol_ids()
    names = {index: symbol for symbol, index in symbols.items()}
    merges = [f"{names[left]} {names[right]}" for (left, right) in learnt_merges()]
    special = {"<|startoftext|>": START_OF_TEXT, "<|endoftext|>": END_OF_TEXT}
    vocabulary = dict(sorted((symbols | special).items(), key=lambda item: item[1]))
    start, end = special
    roles = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True, **roles}
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False) + "\n",
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(roles, indent=2) + "\n",
    }


WRITERS = {"native": _write_native, "openai": _write_openai, "openclip": _write_openclip, "hf": _write_hf}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

_LIBRARIES = {"openai": "OpenAI's package", "openclip": "open_clip", "hf": "transformers"}
_STYLES = {
    "openai": "OpenAI's way (the colour under transparency, RGB after the crop, its offset rounded)",
    "hf": "Hugging Face's way (transparency laid on white, RGB before resizing, the crop's offset rounded down)",
}


def pixel_changes(config: CLIPConfig, to: str) -> list[str]:
    """What the library of a layout does otherwise than the model's own preprocessing, each in a sentence; empty if it
    makes the same pixels. The layouts have no place to say it.
    """
    if to == "native" or config.towers == "text":
        return []
    vision, plain, library = config.vision, VisionConfig(), _LIBRARIES[to]
    style = "hf" if to == "hf" else "openai"
    changes = []
    if vision.preprocess != style:
        ways = f"in {_STYLES[style]}, this model in {_STYLES[vision.preprocess]}"
        changes.append(f"{library} prepares pictures {ways}")
    for field in ("mean", "std", "resize", "resize_size", "interpolation") if to == "openai" else ():
        found = getattr(vision, field)
        if found not in (getattr(plain, field), vision.image_size):
            changes.append(f"{library} prepares pictures without this model's {field}, {found}")
    return changes
