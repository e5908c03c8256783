"""The small names of open_clip: constants, class names and prompts, precisions, settings of pixels and of texts.

`openclip` has them all among its own; what it lacks is an error that says what stands in its place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import make_dataclass
from typing import Any

import torch
from torch import nn

from .common.files import ASSETS
from .config import OPENAI_MEAN, OPENAI_STD

OPENAI_DATASET_MEAN, OPENAI_DATASET_STD = OPENAI_MEAN, OPENAI_STD
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
INCEPTION_MEAN = INCEPTION_STD = (0.5, 0.5, 0.5)

# Its modules whose names `openclip` takes.
MODULES = (
    "coca_model", "constants", "convert", "factory", "hf_configs", "hf_model", "loss", "model", "modified_resnet",
    "openai", "pos_embed", "pretrained", "push_to_hf_hub", "timm_model", "tokenizer", "transform", "transformer",
    "utils", "version", "zero_shot_classifier", "zero_shot_metadata",
)  # fmt: skip

_ELSEWHERE = "`miniclip eval` and other verbs take models that are no CLIP of ours as openclip:NAME/TAG"
_WEIGHTS = "list_pretrained() has the names of weights, and create_model fetches them"
KINDS = (
    "Attention", "AttentionalPooler", "CoCa", "CustomResidualAttentionBlock", "CustomTextCLIP", "CustomTransformer",
    "HFTextEncoder", "MultimodalTransformer", "TextTransformer",
)  # fmt: skip
_INSTEAD = {
    **dict.fromkeys(KINDS, _ELSEWHERE),
    **dict.fromkeys(("HFTokenizer", "SigLipTokenizer"), f"SimpleTokenizer makes CLIP's own ids; {_ELSEWHERE}"),
    **dict.fromkeys(("get_pretrained_cfg", "get_pretrained_url", "download_pretrained", "_PRETRAINED"), _WEIGHTS),
    **dict.fromkeys(("download_pretrained_from_url", "download_pretrained_from_hf"), _WEIGHTS),
    **dict.fromkeys(("push_to_hf_hub", "push_pretrained_to_hf_hub"), "`miniclip push` uploads a model"),
    "CoCaLoss": _ELSEWHERE,
}


def missing(name: str) -> str:
    """That `openclip` lacks a name, and what stands in its place."""
    otherwise = "it has what loads, encodes with and trains a CLIP (docs/openclip.md)"
    return f"miniclip.openclip has no {name}; {_INSTEAD.get(name, otherwise)}"


def _without_instances(name: str) -> type[nn.Module]:
    """A class of open_clip's that programs import to ask what a model is: no model here is one of these."""

    def refuse(*args: Any, **options: Any) -> None:
        raise ValueError(missing(name))

    return type(name, (nn.Module,), {"__new__": refuse, "__module__": __name__, "__doc__": missing(name)})


globals().update({name: _without_instances(name) for name in KINDS})


# ---------------------------------------------------------------------------------------------------------------------
# Classes and prompts


def _read_lines(file: str) -> list[str]:
    return (ASSETS / file).read_text(encoding="utf-8").splitlines()


def _read_templates(file: str) -> tuple[Callable[[str], str], ...]:
    return tuple((lambda name, line=line: line.format(c=name)) for line in _read_lines(file))


IMAGENET_CLASSNAMES = _read_lines("imagenet_classnames.txt")
OPENAI_IMAGENET_TEMPLATES = _read_templates("imagenet_templates_80.txt")
SIMPLE_IMAGENET_TEMPLATES = _read_templates("imagenet_templates_7.txt")

# ---------------------------------------------------------------------------------------------------------------------
# Precisions and settings

_BLOCK_SETTINGS = {"block_type": None, "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False,
                   "scale_attn_inner": False, "scale_attn": False, "scale_fc": False}  # fmt: skip
_IMAGE_SETTINGS = {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224,
    "ls_init_value": None, "patch_dropout": 0.0, "attentional_pool": False, "attn_pooler_queries": 256,
    "attn_pooler_heads": 8, "no_ln_pre": False, "pos_embed_type": "learnable", "final_ln_after_pool": False,
    "pool_type": "tok", "output_tokens": False, "act_kwargs": None, "norm_kwargs": None, **_BLOCK_SETTINGS,
    "timm_model_name": None, "timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": "linear",
    "timm_proj_bias": False, "timm_drop": 0.0, "timm_drop_path": None,
}  # fmt: skip
_TEXT_SETTINGS = {
    "context_length": 77, "vocab_size": 49408, "hf_tokenizer_name": None, "tokenizer_mode": None,
    "tokenizer_kwargs": None, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0, "ls_init_value": None,
    "embed_cls": False, "pad_id": 0, "eos_id": 2, "no_causal_mask": False, "final_ln_after_pool": False,
    "pool_type": "argmax", "proj_bias": False, "proj_type": "linear", "output_tokens": False, "act_kwargs": None,
    "norm_kwargs": None, **_BLOCK_SETTINGS, "hf_model_name": None, "hf_model_pretrained": True, "hf_proj_type": "mlp",
    "hf_pooler_type": "mean_pooler",
}  # fmt: skip


def _settings(name: str, defaults: dict[str, Any]) -> type:
    """A dataclass of open_clip's settings; `CLIP` refuses those that it can't build."""
    found = make_dataclass(name, [(each, Any, value) for each, value in defaults.items()])
    found.__module__ = __name__
    return found


CLIPVisionCfg, CLIPTextCfg = _settings("CLIPVisionCfg", _IMAGE_SETTINGS), _settings("CLIPTextCfg", _TEXT_SETTINGS)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def get_cast_dtype(precision: str) -> torch.dtype | None:
    """The type of linear layers; None where it is float32, or where all weights have one type."""
    return _DTYPES.get(precision)


def get_input_dtype(precision: str) -> torch.dtype | None:
    """The type of pictures; None where it is float32."""
    return _DTYPES.get(precision.removeprefix("pure_"))


def _settings_of_weights(mean: Any, std: Any, interpolation: str, resize_mode: str) -> Callable[..., dict[str, Any]]:
    """Makes the settings of weights as open_clip lists them, of a family that shares how its pictures are prepared."""
    pixels = {"mean": mean, "std": std, "interpolation": interpolation, "resize_mode": resize_mode}
    return lambda url="", hf_hub="", **more: {"url": url, "hf_hub": hf_hub, **pixels, **more}


# CLIP's, SigLIP's, CLIPA's, MobileCLIP's, MobileCLIP2's and those of Perception Encoder.
_pcfg = _settings_of_weights(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, "bicubic", "shortest")
_slpcfg = _settings_of_weights(INCEPTION_MEAN, INCEPTION_STD, "bicubic", "squash")
_apcfg = _settings_of_weights(IMAGENET_MEAN, IMAGENET_STD, "bilinear", "squash")
_mccfg = _settings_of_weights((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", "shortest")
_mc2cfg = _settings_of_weights(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, "bilinear", "shortest")
_pecfg = _settings_of_weights(INCEPTION_MEAN, INCEPTION_STD, "bilinear", "squash")


def get_model_preprocess_cfg(model: Any) -> dict[str, Any]:
    return getattr(model, "visual", model).preprocess_cfg


def set_model_preprocess_cfg(model: Any, preprocess_cfg: dict[str, Any]) -> None:
    tower = getattr(model, "visual", model)
    tower.image_mean, tower.image_std = preprocess_cfg["mean"], preprocess_cfg["std"]
    tower.preprocess_cfg = copy.deepcopy(preprocess_cfg)


def get_model_tokenize_cfg(model: nn.Module) -> dict[str, Any]:
    return {name: getattr(model, name) for name in ("context_length", "vocab_size")}
