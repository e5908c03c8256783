"""The same CLIP in every library, built from one file of random weights in OpenAI's layout.

open_clip and transformers must be installed; OpenAI's own package (`clip`) takes part where it can be imported.
`engines.py` has what only runs models that another library has made.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
import transformers
from contenders import OURS_BF16
from safetensors.torch import load_file, save_file
from torch import Tensor

import miniclip
from miniclip.config import OPENAI_MODELS, CLIPConfig, TextConfig, VisionConfig
from miniclip.evaluation.encoder import from_clip, in_bf16
from miniclip.fast import bfloat16
from miniclip.tokenizer import END_OF_TEXT, START_OF_TEXT, learnt_merges, symbol_ids
from miniclip.weights.layouts import from_openai_keys
from miniclip.weights.load import preprocess_for

try:
    import clip.model as openai_model
except ImportError:  # it is not installed, or setuptools is too new for it
    openai_model = None

# 64-pixel images, 6 + 6 blocks of width 256, as in configs/small.yaml.
SMALL = CLIPConfig(
    256,
    "gelu",
    VisionConfig(image_size=64, patch_size=8, width=256, layers=6),
    TextConfig(width=256, layers=6),
)
_TINY_TEXT = TextConfig(width=64, layers=2)
_TINY = {
    "small": CLIPConfig(32, "gelu", VisionConfig(image_size=32, patch_size=16, width=64, layers=2), _TINY_TEXT),
    "ViT-B/32": CLIPConfig(
        32, "quick_gelu", VisionConfig(image_size=64, patch_size=32, width=64, layers=2), _TINY_TEXT
    ),
    "ViT-B/16": CLIPConfig(
        32, "quick_gelu", VisionConfig(image_size=32, patch_size=16, width=64, layers=2), _TINY_TEXT
    ),
    "RN50": CLIPConfig(
        32,
        "quick_gelu",
        VisionConfig(kind="resnet", image_size=64, width=8, blocks=(1, 1, 1, 1)),
        _TINY_TEXT,
    ),
}


def architecture(name: str, size: str) -> CLIPConfig:
    """The configuration of "small" or of an OpenAI model; at size "tiny" a similar one that takes milliseconds."""
    if size == "tiny":
        return _TINY[name]
    return SMALL if name == "small" else OPENAI_MODELS[name]


def weights(config: CLIPConfig, folder: Path) -> Path:
    """A file of random weights under OpenAI's names; the first call writes it."""
    path = folder / f"{file_name(config)}.safetensors"
    if not path.is_file():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            state = _create(config, folder).state_dict()
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def file_name(config: CLIPConfig) -> str:
    vision = config.vision
    return (
        f"{vision.kind}-{vision.image_size}-{vision.patch_size}-{vision.width}-{config.embed_dim}-{config.activation}"
    )


def model_name(config: CLIPConfig, folder: Path) -> str:
    """open_clip's name for the architecture, which a configuration file registers."""
    name, vision, text = file_name(config), config.vision, config.text
    path = folder / "open_clip" / f"{name}.json"
    if name not in open_clip.list_models():
        layers = {"layers": vision.layers, "patch_size": vision.patch_size}
        if vision.kind == "resnet":
            layers = {"layers": list(vision.blocks)}
        facts = {
            "embed_dim": config.embed_dim,
            "quick_gelu": config.activation == "quick_gelu",
            "vision_cfg": {
                "image_size": vision.image_size,
                "width": vision.width,
                "head_width": vision.head_width,
                **layers,
            },
            "text_cfg": {"width": text.width, "heads": text.width // text.head_width, "layers": text.layers},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(facts))
        open_clip.add_model_config(path.parent)
    return name


def ours(config: CLIPConfig, folder: Path) -> miniclip.CLIP:
    model = miniclip.CLIP(config)
    model.load_state_dict(state(config, folder))
    return model


def state(config: CLIPConfig, folder: Path) -> dict[str, Tensor]:
    """The weights under our names."""
    return from_openai_keys(load_file(weights(config, folder)))


def openclips(config: CLIPConfig, folder: Path, **options: Any) -> Any:
    path = weights(config, folder)
    model = _create(config, folder, **options)
    model.load_state_dict(load_file(path))
    return model


def _create(config: CLIPConfig, folder: Path, **options: Any) -> Any:
    with no_log():  # it warns of random weights
        return open_clip.create_model(model_name(config, folder), **options)


@contextlib.contextmanager
def no_log() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def transformers_config(config: CLIPConfig) -> transformers.CLIPConfig:
    def tower(section: VisionConfig | TextConfig) -> dict[str, Any]:
        return {
            "hidden_size": section.width,
            "intermediate_size": int(section.width * section.mlp_ratio),
            "num_hidden_layers": section.layers,
            "num_attention_heads": section.width // section.head_width,
            "hidden_act": config.activation,
        }

    vision = {"image_size": config.vision.image_size, "patch_size": config.vision.patch_size}
    return transformers.CLIPConfig(
        text_config={**tower(config.text), "eos_token_id": 49407, "bos_token_id": 49406},
        vision_config={**tower(config.vision), **vision},
        projection_dim=config.embed_dim,
    )


def transformers_model(config: CLIPConfig, folder: Path) -> Any:
    model = transformers.CLIPModel(transformers_config(config)).eval()
    model.load_state_dict(_transformers_state(ours(config, folder)))
    return model


def _transformers_state(model: Any) -> dict[str, Tensor]:
    state = {"logit_scale": model.logit_scale, "text_projection.weight": model.text.text_projection.T}
    state["visual_projection.weight"] = model.visual.proj.T
    for theirs, tower, norms in (
        ("text_model", model.text, {"final_layer_norm": model.text.ln_final}),
        ("vision_model", model.visual, {"pre_layrnorm": model.visual.ln_pre, "post_layernorm": model.visual.ln_post}),
    ):
        for name, norm in norms.items():
            state |= {f"{theirs}.{name}.weight": norm.weight, f"{theirs}.{name}.bias": norm.bias}
        for i, block in enumerate(tower.transformer.resblocks):
            layer = f"{theirs}.encoder.layers.{i}"
            for part, weight, bias in zip(
                "qkv", block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3), strict=True
            ):
                state |= {f"{layer}.self_attn.{part}_proj.weight": weight, f"{layer}.self_attn.{part}_proj.bias": bias}
            for name, module in (
                ("self_attn.out_proj", block.attn.out_proj),
                ("layer_norm1", block.ln_1),
                ("layer_norm2", block.ln_2),
                ("mlp.fc1", block.mlp.c_fc),
                ("mlp.fc2", block.mlp.c_proj),
            ):
                state |= {f"{layer}.{name}.weight": module.weight, f"{layer}.{name}.bias": module.bias}
    state["text_model.embeddings.token_embedding.weight"] = model.text.token_embedding.weight
    state["text_model.embeddings.position_embedding.weight"] = model.text.positional_embedding
    state["vision_model.embeddings.class_embedding"] = model.visual.class_embedding
    state["vision_model.embeddings.patch_embedding.weight"] = model.visual.conv1.weight
    state["vision_model.embeddings.position_embedding.weight"] = model.visual.positional_embedding
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def transformers_tokenizer() -> Any:
    """Hugging Face's `tokenizers` as CLIPTokenizer sets it up: rows of 77, padded with 0 as OpenAI's are."""
    names = {**symbol_ids(), "<|startoftext|>": START_OF_TEXT, "<|endoftext|>": END_OF_TEXT}
    by_id = {index: symbol for symbol, index in names.items()}
    merges = [(by_id[left], by_id[right]) for left, right in learnt_merges()]
    found = transformers.CLIPTokenizer(vocab=names, merges=merges).backend_tokenizer
    found.enable_truncation(77)
    found.enable_padding(length=77, pad_id=0)
    return found


def openais(config: CLIPConfig, folder: Path) -> Any:
    tensors = load_file(weights(config, folder))
    model = openai_model.build_model(dict(tensors)).float()
    model.load_state_dict(tensors)  # once more, as it was made in half precision
    return model


def takes_part(name: str, config: CLIPConfig) -> bool:
    """Whether a peer has the architecture: transformers has ViTs alone, OpenAI's package QuickGELU alone.

    Ours in bf16 takes part where the CPU is fast at it.
    """
    if name == OURS_BF16:
        return bfloat16.is_fast()
    if name == "transformers":
        return config.vision.kind == "vit"
    return name != "OpenAI" or (openai_model is not None and config.activation == "quick_gelu")


@lru_cache(maxsize=5)  # of one architecture, one of each library
def for_inference(name: str, config: CLIPConfig, folder: Path) -> Any:
    if name == OURS_BF16:
        return in_bf16(from_clip(ours(config, folder), preprocess_for(config), name))
    make = {"miniclip": ours, "open_clip": openclips, "transformers": transformers_model, "OpenAI": openais}[name]
    return make(config, folder).eval()
