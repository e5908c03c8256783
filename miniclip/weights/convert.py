"""Checkpoints from one library's layout to another's, and what a checkpoint is made of.

A conversion is believed only after it was loaded back and gave the same embeddings: by our own reader, and by the other
library where it is installed.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..common.files import atomic_write, write_text
from ..config import CLIPConfig, VisionConfig
from ..model import CLIP, MissingTower
from ..tokenizer import CONTEXT_LENGTH, END_OF_TEXT, START_OF_TEXT, learnt_merges, symbol_ids
from .layouts import Tensors, to_hf_keys, to_openai_keys
from .load import build
from .read import (
    CONFIG_FILE,
    OPENCLIP_CONFIG_FILE,
    WEIGHTS_FILE,
    Checkpoint,
    locate,
    read_checkpoint,
    write_safetensors,
)

FORMATS = ("native", "openai", "openclip", "hf")
_PIXELS = {"interpolation": "bicubic", "resize_mode": "shortest"}


def convert(source: str | Path, out: str | Path, to: str, overwrite: bool = False, **options: Any) -> str:
    """Writes a checkpoint in another layout, then loads it back and compares.

    Args:
        out: a file for "openai" (a state dict, which OpenAI's package loads), a folder for the others.
        to: one of `FORMATS`.
        options: `activation` and the like, as `read_checkpoint` takes them.

    Returns:
        What was compared with what, and how far they differ.

    Raises:
        ValueError: the other library has no such model, `out` exists, or the result is not the same.
    """
    out = Path(out)
    if to not in FORMATS:
        raise ValueError(f"there is no format {to!r}; valid are {', '.join(FORMATS)}")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already; pass --overwrite to replace it, or name another")
    found_at = locate(source)
    if out.is_dir():
        is_model = any((out / name).is_file() for name in (CONFIG_FILE, OPENCLIP_CONFIG_FILE))
        if not is_model or out.resolve() in found_at.resolve().parents:
            raise ValueError(f"{out} is a folder that holds more than a model, so it is not overwritten")
    checkpoint = read_checkpoint(found_at, **options)
    _require(to == "native" or checkpoint.config.towers == "both", f"it has the {checkpoint.config.towers} tower alone")
    taken = replace(checkpoint, tensors=dict(checkpoint.tensors))
    expected = _embeddings(build(taken, str(source)))
    write = {"native": _write_native, "openai": _write_openai, "openclip": _write_openclip, "hf": _write_hf}[to]
    # Under a temporary name until it is verified, so that nothing half-right ever has the name that was asked for.
    temporary, old = (out.with_name(f".{out.stem}.{os.getpid()}.{what}{out.suffix}") for what in ("tmp", "old"))
    try:
        write(checkpoint, temporary)
        compared = {"miniclip": _embeddings(build(read_checkpoint(temporary), str(temporary)))}
        compared |= _embeddings_by_the_other(to, temporary, checkpoint.config)
        said = []
        for name, found in compared.items():
            differences = [_difference(a, b) for a, b in zip(found, expected, strict=True)]
            if not all(difference <= 1e-5 for difference in differences):  # a comparison with NaN is False, too
                raise ValueError(f"{name} gives other embeddings from the converted file, by {differences}")
            said.append(f"same embeddings by {name} (to {max(differences):.0e})")
        if out.exists():
            os.rename(out, old)  # kept until the new one has its name
        os.rename(temporary, out)
    finally:
        if old.exists() and not out.exists():
            os.rename(old, out)
        _remove(old)
        _remove(temporary)
    return ", ".join(said)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _probe(config: CLIPConfig) -> tuple[Tensor, Tensor]:
    """Two noise images and two texts that fit a model."""
    random = torch.Generator().manual_seed(0)
    R, L = config.vision.image_size, min(config.text.context_length, 12)
    end, vocab_size = config.text.eot_token, config.text.vocab_size
    tokens = (end + torch.randint(1, vocab_size, (2, L), generator=random)) % vocab_size  # any but the end token
    tokens[:, -1] = end
    return torch.randn(2, 3, R, R, generator=random), tokens


@torch.inference_mode()
def _embeddings(model: CLIP) -> list[Tensor]:
    """By each of its towers."""
    images, tokens = _probe(model.config)
    model.eval()
    encodings = {"image": (model.encode_image, images), "text": (model.encode_text, tokens)}
    return [encode(inputs) for name, (encode, inputs) in encodings.items() if model.config.towers in (name, "both")]


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.inference_mode()
def _embeddings_by_the_other(to: str, out: Path, config: CLIPConfig) -> dict[str, list[Tensor]]:
    """What the library that the layout belongs to makes of it; nothing if it is not installed."""
    images, tokens = _probe(config)
    if to == "openclip":
        try:
            import open_clip
        except ImportError:
            return {}
        model, *_ = open_clip.create_model_and_transforms(f"local-dir:{out.resolve()}")
        padded = torch.zeros(2, config.text.context_length, dtype=torch.long)
        padded[:, : tokens.shape[1]] = tokens
        model.eval()
        return {"open_clip": [model.encode_image(images), model.encode_text(padded)]}
    if to == "hf":
        try:
            from transformers import CLIPModel
        except ImportError:
            return {}
        other = CLIPModel.from_pretrained(out, dtype=torch.float32).eval()
        features = other.get_image_features(pixel_values=images), other.get_text_features(input_ids=tokens)
        # transformers 5 wraps the features; 4 gives them as they are.
        return {"transformers": [getattr(f, "pooler_output", f) for f in features]}
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _plain(tensors: Tensors) -> Tensors:
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _write_native(checkpoint: Checkpoint, out: Path) -> None:
    write_safetensors(out / WEIGHTS_FILE, _plain(checkpoint.tensors))
    write_text(out / CONFIG_FILE, checkpoint.config.to_json())


def _write_openai(checkpoint: Checkpoint, out: Path) -> None:
    config = checkpoint.config
    _require(config.vision.kind != "timm", "OpenAI's code has no towers of timm's")
    _require(config.init_logit_bias is None, "OpenAI's code has no bias of the logits, which the sigmoid loss needs")
    _require(config.activation == "quick_gelu", "OpenAI's code knows QuickGELU alone, and this model has GELU")
    _require(_has_heads_of_64(config), "OpenAI's code makes every attention head 64 channels wide")
    _require(config.vision.mlp_ratio == config.text.mlp_ratio == 4, "OpenAI's code has an mlp_ratio of 4")
    sizes = (config.vision.image_size, config.text.context_length, config.text.vocab_size)
    tensors = to_openai_keys(_plain(checkpoint.tensors))
    names = ("input_resolution", "context_length", "vocab_size")
    tensors |= {name: torch.tensor(size) for name, size in zip(names, sizes, strict=True)}
    with atomic_write(out) as file:
        torch.save(tensors, file)


def _write_openclip(checkpoint: Checkpoint, out: Path) -> None:
    config = checkpoint.config
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
    words = {"context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.width,
             "heads": text.heads, "layers": text.layers, "mlp_ratio": text.mlp_ratio}  # fmt: skip
    model = {"embed_dim": config.embed_dim, "quick_gelu": config.activation == "quick_gelu", "vision_cfg": tower}
    model |= {"init_logit_scale": config.init_logit_scale}
    if config.init_logit_bias is not None:
        model |= {"init_logit_bias": config.init_logit_bias}
    pixels = {"mean": vision.mean, "std": vision.std, **_PIXELS}
    write_safetensors(out / "open_clip_model.safetensors", _plain(to_openai_keys(checkpoint.tensors)))
    settings = {"model_cfg": {**model, "text_cfg": words}, "preprocess_cfg": pixels}
    write_text(out / OPENCLIP_CONFIG_FILE, json.dumps(settings, indent=2) + "\n")


def _write_hf(checkpoint: Checkpoint, out: Path) -> None:
    config = checkpoint.config
    _require(config.vision.kind == "vit", "Hugging Face's CLIPModel has a ViT as its image tower and no other")
    _require(config.init_logit_bias is None, "Hugging Face's CLIPModel has no bias, which the sigmoid loss needs")

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
    ends = {"bos_token_id": START_OF_TEXT, "eos_token_id": text.eot_token, "pad_token_id": text.eot_token}
    words = {**tower(text), "vocab_size": text.vocab_size, "max_position_embeddings": text.context_length, **ends}
    values = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": config.embed_dim,
              "logit_scale_init_value": config.init_logit_scale,
              "text_config": words, "vision_config": images}  # fmt: skip
    write_safetensors(out / WEIGHTS_FILE, _plain(to_hf_keys(checkpoint.tensors)))
    write_text(out / CONFIG_FILE, json.dumps(values, indent=2) + "\n")
    write_text(out / "preprocessor_config.json", json.dumps(_hf_pixels(vision), indent=2) + "\n")
    if text.eot_token == END_OF_TEXT:
        for name, content in vocabulary_files(text.context_length).items():
            write_text(out / name, content)


def _hf_pixels(vision: VisionConfig) -> dict[str, Any]:
    side = vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True, "size": {"shortest_edge": side}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": side, "width": side},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(vision.mean), "image_std": list(vision.std),
        "do_convert_rgb": True,
    }  # fmt: skip


def _has_heads_of_64(config: CLIPConfig) -> bool:
    return config.vision.head_width == config.text.head_width == 64


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(f"this model can't be written in that format: {otherwise}")


# ---------------------------------------------------------------------------------------------------------------------
# What is in a checkpoint


@dataclass(frozen=True)
class Facts:
    """What `miniclip info` tells.

    Args:
        image_parameters, text_parameters: of the towers.
        image_gflops, text_gflops: 10^9 multiplications and additions for one image, and for a text of full length.
        dtypes: of the file's tensors.
        problems: tensors that are missing, unexpected, or of another shape than the architecture's; empty if it loads.
    """

    format: str
    config: CLIPConfig
    image_parameters: int
    text_parameters: int
    image_gflops: float
    text_gflops: float
    dtypes: tuple[str, ...]
    problems: str


def forward_flops(tower: nn.Module, inputs: Tensor) -> int:
    """Multiplications and additions of the matrix products that a tower takes for some inputs, both on meta."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        if not isinstance(tower, MissingTower):
            tower(inputs)
    return int(counter.get_total_flops())


def inspect(source: str | Path, **options: Any) -> Facts:
    """Everything about a checkpoint that can be known without using it."""
    checkpoint = read_checkpoint(locate(source), **options)
    with torch.device("meta"):
        model = CLIP(checkpoint.config).eval()
        images = torch.zeros(1, 3, model.visual.input_resolution, model.visual.input_resolution)
        tokens = torch.zeros(1, checkpoint.config.text.context_length, dtype=torch.long)
    flops = [forward_flops(tower, inputs) / 1e9 for tower, inputs in ((model.visual, images), (model.text, tokens))]
    dtypes = tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.tensors.values()}))
    try:
        build(checkpoint, str(source))
        problems = ""
    except ValueError as error:
        problems = str(error)
    sizes = [sum(parameter.numel() for parameter in tower.parameters()) for tower in (model.visual, model.text)]
    return Facts(checkpoint.format, checkpoint.config, sizes[0], sizes[1], flops[0], flops[1], dtypes, problems)


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
