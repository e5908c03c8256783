"""The architecture of a checkpoint: from its tensors' shapes, or from another library's configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, get_args

from torch import Tensor

from ..config import (
    SIGLIP_LOGIT_BIAS,
    SIGLIP_LOGIT_SCALE,
    Activation,
    CLIPConfig,
    TextConfig,
    TimmProjection,
    Towers,
    VisionConfig,
)
from ..tokenizer import END_OF_TEXT, VOCAB_SIZE
from .heads import Hints, NotToldError, Tower, head_widths
from .hf_pixels import vision_fields


def infer_config(
    tensors: Mapping[str, Tensor], hints: Hints, source: str, called: Callable[[str], str] = str
) -> CLIPConfig:
    """The architecture that tensors (by our names) belong to.

    Widths and depths are shapes. The width of a head is not: it is one of the hints, or that of the published model
    with the same shapes.

    Args:
        called: what the source calls a tensor that has a name of ours.

    Raises:
        NotToldError: (a ValueError) a hint is missing; says which.
        ValueError: a tensor that shows the architecture is missing; says which.
    """

    def shape(name: str, sides: int) -> tuple[int, ...]:
        if name not in tensors or tensors[name].ndim != sides:
            raise ValueError(
                f"{source} has no tensor {called(name)} of {sides} sides, so it is no CLIP that can be read"
            )
        return tuple(tensors[name].shape)

    def count(pattern: str) -> int:
        return len({match[1] for key in tensors if (match := re.match(pattern, key))})

    def transformer(tower: str, width: int) -> dict[str, Any]:
        layers = count(rf"{tower}\.transformer\.resblocks\.(\d+)\.")
        hidden = shape(f"{tower}.transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
        return {"width": width, "layers": layers, "mlp_ratio": _ratio(hidden, width)}

    _require_both_towers(tensors, source)
    activation = _activation(hints, source)
    context_length, width = shape("text.positional_embedding", 2)
    vocab_size, _ = shape("text.token_embedding.weight", 2)
    eot_token = _PUBLISHED_ENDS.get(vocab_size, _largest_id(vocab_size))
    _, embed_dim = shape("text.text_projection", 2)
    text = transformer("text", width)
    if "visual.proj" in tensors:
        width, _, patch_size, _ = shape("visual.conv1.weight", 4)
        side = round((shape("visual.positional_embedding", 2)[0] - 1) ** 0.5)
        vision = {"image_size": patch_size * side, "patch_size": patch_size, **transformer("visual", width)}
        image = Tower("image", width, _key(vision))
    else:
        side = round((shape("visual.attnpool.positional_embedding", 2)[0] - 1) ** 0.5)
        blocks = tuple(count(rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
        width = shape("visual.layer1.0.conv1.weight", 4)[0]
        vision = {"kind": "resnet", "image_size": 32 * side, "width": width, "blocks": blocks}
        image = Tower("image", 32 * width, (width, blocks))
    towers = image, Tower("text", text["width"], _key(text))
    image_heads, text_heads = head_widths(towers, hints, source)
    config = CLIPConfig(
        embed_dim,
        activation,
        VisionConfig(head_width=image_heads, **vision),
        TextConfig(context_length, vocab_size, eot_token, head_width=text_heads, **text),
    )
    if "logit_bias" not in tensors:
        return config
    # Trained scale and bias do not tell where they began; the paper's, then.
    return replace(config, init_logit_scale=SIGLIP_LOGIT_SCALE, init_logit_bias=SIGLIP_LOGIT_BIAS)


def _largest_id(vocab_size: int) -> int | None:
    """The end of a text for a library that looks for the largest id; which that is, only CLIP's own vocabulary says."""
    return vocab_size - 1 if vocab_size <= VOCAB_SIZE else None


# Where a text ends in vocabularies that are larger than CLIP's, by their sizes: MetaCLIP 2's, XLM-V's and mT5's.
_PUBLISHED_ENDS = {901629: 2, 250100: 1}


def has_sizes_of(values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a configuration of two towers, ours or another library's, has the sizes that tensors (by our names) show.

    Nothing else of it is looked at, so it need not be one that can be followed.
    """
    model = values.get("model_cfg", values)
    text, vision = (_tower_section(model, name) for name in ("text", "vision"))
    if text is None or vision is None:
        return False
    for section, names, default, tensor, side in (  # the libraries' defaults are the same
        (model, ("embed_dim", "projection_dim"), 512, "text.text_projection", 1),
        (text, ("vocab_size",), 49408, "text.token_embedding.weight", 0),
        (text, ("context_length", "max_position_embeddings"), 77, "text.positional_embedding", 0),
        (text, ("width", "hidden_size"), 512, "text.positional_embedding", 1),
        (vision, ("width", "hidden_size"), 768, "visual.class_embedding", 0),
        (vision, ("patch_size",), None, "visual.conv1.weight", 3),
    ):
        told = next((section[name] for name in names if name in section), default)
        told = told[-1] if isinstance(told, list) and told else told  # a pair of sides
        if told is not None and tensor in tensors and tensors[tensor].shape[side : side + 1] != (told,):
            return False
    return True


def _tower_section(model: Any, name: str) -> Mapping[str, Any] | None:
    """A tower's settings in a configuration of whichever library."""
    names = [name + ending for ending in ("_cfg", "_config_dict", "_config", "")]
    sections = [model[name] for name in names if name in model] if isinstance(model, Mapping) else []
    return next((section for section in sections if isinstance(section, Mapping)), None)


def _key(transformer: Mapping[str, Any]) -> tuple[int, int, int]:
    width, layers, ratio = (transformer[name] for name in ("width", "layers", "mlp_ratio"))
    return width, layers, int(width * ratio)


def _ratio(hidden: int, width: int) -> float:
    """hidden / width, so that a model, which takes the whole part of width * ratio, has that hidden layer again."""
    ratio = hidden / width
    while int(width * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


# A part of a tensor's name that other models with an image tower have, and what they are.
_OTHER_KINDS = {
    "text_decoder.": "a CoCa, which writes captions, too",
    "vision_model.head.": "a SigLIP, whose image tower pools by attention",
    "vision_model.pre_layernorm.": "an OWL-ViT, which finds objects",
    "positional_embedding_res": "a Long-CLIP, which has two tables of positions",
    ".encoder.layer.": "a model with a text tower of BERT's kind, as Chinese-CLIP, AltCLIP or roberta-ViT-B-32",
}


def _require_both_towers(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raises a ValueError that says what the tensors are, if they are no CLIP's."""
    there = ", ".join(sorted(key.removeprefix("text.") for key in tensors)[:4])
    if any(key.startswith("visual.trunk.") for key in tensors):
        raise ValueError(
            f"{source} has an image tower of timm's, and its tensors don't show which; put its open_clip_config.json "
            "beside it"
        )
    has_image, has_text = (
        any(key.startswith(tower) for key in tensors) for tower in ("visual.", "text.token_embedding.")
    )
    if not has_image:
        also = (
            " (they may be an image tower's alone, without the text tower)" if "text.class_embedding" in tensors else ""
        )
        raise ValueError(f"{source} is no CLIP: it has no image tower. Its tensors are {there}, …{also}")
    for sign, kind in _OTHER_KINDS.items():
        if key := next((key for key in tensors if sign in key), None):
            raise ValueError(
                f"{source} is no CLIP but {kind} ({key}); the verbs take such models as openclip:NAME/TAG or "
                "transformers:owner/name"
            )
    if not has_text:
        raise ValueError(f"{source} is no CLIP: it has an image tower and no text tower. Its tensors are {there}, …")


def _activation(hints: Hints, source: str) -> Activation:
    if hints.activation is None:
        raise NotToldError(
            f"{source} does not tell its activation. Pass activation='quick_gelu' if the weights come from OpenAI's "
            "(also fine-tuned ones), 'gelu' if they are OpenCLIP's own; with the wrong one the model runs, and is "
            "worse (nothing to pass it to? once: miniclip convert FILE FOLDER --to native --activation quick_gelu)"
        )
    return hints.activation


def _head_width(width: int, heads: int, source: str) -> int:
    if type(heads) is not int or heads < 1:
        raise ValueError(f"{source} has {heads!r} attention heads in a tower; it must be a whole number greater than 0")
    if width % heads:
        raise ValueError(f"{source} has {heads} attention heads in a tower {width} wide: head_width is no whole number")
    return width // heads


def _refuse_unknown(values: Mapping[str, Any], supported: Mapping[str, Any], source: str) -> None:
    """A setting that is neither read nor at the one value that our towers have must not be passed over."""
    for key, value in values.items():
        if key not in supported:
            raise ValueError(f"{source} has the setting {key!r}: {value!r}, which is not supported")
        expected = supported[key]
        valid = expected if isinstance(expected, tuple) else (expected,)
        if expected is not _ANY and value not in valid:
            raise ValueError(f"{source} has {key!r}: {value!r}; only {' or '.join(map(repr, valid))} is supported")


_ANY = object()
_OPENCLIP_MODEL = dict.fromkeys(("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text"), _ANY) | {
    "multimodal_cfg": None, "output_dict": _ANY, "init_logit_scale": _ANY, "init_logit_bias": _ANY,
    "cast_dtype": _ANY, "nonscalar_logit_scale": False,
}  # fmt: skip
_OPENCLIP_BLOCK = {"block_type": (None, "default"), "qk_norm": False, "scaled_cosine_attn": False, "scale_heads": False,
                   "scale_attn_inner": False, "scale_attn": False, "scale_fc": False}  # fmt: skip
_OPENCLIP_VISION = dict.fromkeys(("layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"), _ANY) | {
    **_OPENCLIP_BLOCK,
    "ls_init_value": None, "patch_dropout": _ANY, "attentional_pool": False, "no_ln_pre": False,
    "pos_embed_type": "learnable", "final_ln_after_pool": False, "pool_type": "tok", "output_tokens": _ANY,
    "act_kwargs": None, "norm_kwargs": None, "global_average_pool": False, "input_patchnorm": False,
    "timm_model_name": _ANY, "timm_model_pretrained": _ANY, "timm_pool": _ANY, "timm_proj": _ANY,
    "timm_proj_bias": _ANY, "timm_drop": _ANY, "timm_drop_path": _ANY,
    "attn_pooler_queries": _ANY, "attn_pooler_heads": _ANY,
}  # fmt: skip
_OPENCLIP_TEXT = dict.fromkeys(("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"), _ANY) | {
    **_OPENCLIP_BLOCK,
    "hf_model_name": None, "hf_tokenizer_name": None, "ls_init_value": None, "embed_cls": False, "pad_id": _ANY,
    "no_causal_mask": False, "final_ln_after_pool": False, "pool_type": ("argmax", "eos"), "eos_id": _ANY,
    "proj_bias": False, "output_tokens": _ANY, "act_kwargs": None, "norm_kwargs": None, "tokenizer_kwargs": None,
    "proj_type": "linear", "tokenizer_mode": None, "hf_model_pretrained": _ANY, "hf_proj_type": _ANY,
    "hf_pooler_type": _ANY,
}  # fmt: skip
_OTHER_TOKENIZER = {"hf_tokenizer_name": _ANY, "tokenizer_kwargs": _ANY}
_OPENCLIP_PREPROCESS = {"mean": _ANY, "std": _ANY, "size": _ANY, "mode": "RGB", "interpolation": _ANY,
                        "resize_mode": _ANY, "fill_color": _ANY}  # fmt: skip


def config_from_openclip(values: Mapping[str, Any], source: str) -> CLIPConfig:
    """The architecture of an `open_clip_config.json`.

    Raises:
        ValueError: a setting that our towers do not have.
    """
    model = values.get("model_cfg")
    if not isinstance(model, dict) or not isinstance(model.get("vision_cfg"), dict):
        raise ValueError(f"{source} has no model_cfg with a vision_cfg")
    vision, text, pixels = model["vision_cfg"], model.get("text_cfg", {}), values.get("preprocess_cfg", {})
    vocab_size, has_end = text.get("vocab_size", 49408), text.get("pool_type") == "eos"
    # Another tokenizer's ids may go in where they can't be taken for CLIP's.
    other_tokenizer = _OTHER_TOKENIZER if has_end and vocab_size != VOCAB_SIZE else {}
    for section, supported, name in (
        (model, _OPENCLIP_MODEL, "model_cfg"),
        (vision, _OPENCLIP_VISION, "vision_cfg"),
        (text, _OPENCLIP_TEXT | other_tokenizer, "text_cfg"),
        (pixels, _OPENCLIP_PREPROCESS, "preprocess_cfg"),
    ):
        _refuse_unknown(section, supported, f"{source}, {name}")
    image_size, patch_size = (
        side_of_square(f"{source}, vision_cfg: {name}", vision.get(name, usual))
        for name, usual in (("image_size", 224), ("patch_size", 16))
    )
    shared = _openclip_pixels(pixels, source) | {"image_size": image_size}
    layers, width = vision.get("layers", 12), vision.get("width", 768)
    if vision.get("timm_model_name"):
        tower = _timm_from_openclip(vision, shared, source)
    elif isinstance(layers, list | tuple):
        shared |= {"head_width": vision.get("head_width", 64)}
        tower = VisionConfig(kind="resnet", blocks=tuple(layers), width=width, **shared)
    else:
        shared |= {"head_width": vision.get("head_width", 64)}
        shared |= {"patch_size": patch_size, "mlp_ratio": vision.get("mlp_ratio", 4.0)}
        tower = VisionConfig(layers=layers, width=width, **shared)
    width = text.get("width", 512)
    words = TextConfig(
        context_length=text.get("context_length", 77),
        vocab_size=vocab_size,
        eot_token=text.get("eos_id", 2) if has_end else _largest_id(vocab_size),
        width=width,
        layers=text.get("layers", 12),
        head_width=_head_width(width, text.get("heads", 8), source),
        mlp_ratio=text.get("mlp_ratio", 4.0),
    )
    start = {name: model[name] for name in ("init_logit_scale", "init_logit_bias") if name in model}
    return CLIPConfig(model["embed_dim"], "quick_gelu" if model.get("quick_gelu") else "gelu", tower, words, **start)


def side_of_square(name: str, size: Any) -> Any:
    """The one side where a size is given by two; what is no pair stays as it is.

    Raises:
        ValueError: two that differ.
    """
    if not isinstance(size, list | tuple):
        return size
    if len(size) != 2 or size[0] != size[1]:
        raise ValueError(f"{name} is {size}; images and patches are square here")
    return size[0]


def _openclip_pixels(pixels: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The fields of `VisionConfig` that say how pictures become pixels; None is open_clip's default there."""
    known = {"interpolation": ("bicubic", "bilinear"), "resize_mode": ("shortest", "squash")}
    fields: dict[str, Any] = {}
    for name, valid in known.items():
        value = pixels.get(name) or valid[0]
        value = "bicubic" if value == "random" else value  # open_clip's choice in training; bicubic in evaluation
        if value not in valid:
            raise ValueError(f"{source}, preprocess_cfg has {name!r}: {value!r}; supported are {', '.join(valid)}")
        fields["resize" if name == "resize_mode" else name] = value
    for name in ("mean", "std"):
        if pixels.get(name):
            value = pixels[name]
            fields[name] = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    return fields


_TIMM_PROJECTIONS: dict[str, TimmProjection] = {"linear": "linear", "mlp": "mlp", "none": "none"}


def _timm_from_openclip(vision: Mapping[str, Any], shared: dict[str, Any], source: str) -> VisionConfig:
    pool, projection = vision.get("timm_pool", "avg"), vision.get("timm_proj", "linear")
    if pool in ("abs_attn", "rot_attn"):
        raise ValueError(f"{source} has 'timm_pool': {pool!r}; only pools that timm's models have are supported")
    if projection and projection not in _TIMM_PROJECTIONS:
        valid = ", ".join(map(repr, _TIMM_PROJECTIONS))
        raise ValueError(f"{source} has 'timm_proj': {projection!r}; supported are {valid} and null or ''")
    return VisionConfig(
        kind="timm",
        timm_model=vision["timm_model_name"],
        timm_pool=pool,
        timm_projection=_TIMM_PROJECTIONS[projection] if projection else "classifier",
        timm_projection_bias=vision.get("timm_proj_bias", False),
        **shared,
    )


# CLIP's towers, tensors and settings, with another tokenizer, and its end token as it is told.
_METACLIP_2 = "metaclip_2"
_HF_TOWERS: dict[str, Towers] = {
    "clip": "both", "clip_vision_model": "image", "clip_text_model": "text", _METACLIP_2: "both"
}  # fmt: skip


def config_from_hf(
    values: Mapping[str, Any], source: str, pixels: Mapping[str, Any] | None = None, pixels_source: str = ""
) -> CLIPConfig:
    """The architecture of a Hugging Face CLIP's `config.json`; what it leaves out is as in transformers.

    Args:
        pixels: the settings of its image processor, if it has any, and where they come from.

    Raises:
        ValueError: another kind of model, or a setting that our towers do not have.
    """
    if values.get("model_type") not in _HF_TOWERS:
        raise ValueError(
            f"{source} is of a model of type {values.get('model_type')!r}; valid are {', '.join(_HF_TOWERS)}"
        )
    if "CLIPForImageClassification" in (values.get("architectures") or ()):
        raise ValueError(
            f"{source} is of a CLIPForImageClassification: an image tower and a classifier, without the text tower and "
            "the projection to its space"
        )
    towers = _HF_TOWERS[values["model_type"]]
    if towers != "both":  # the file of one tower is what stands in a section in the file of both
        values = {f"{'vision' if towers == 'image' else 'text'}_config": values} | dict(values)
    # Old files hold the towers' settings twice; transformers lets `*_config_dict` win, with defaults for the rest.
    vision, text = (
        values[f"{name}_config_dict"]
        if values.get(f"{name}_config_dict") is not None
        else values.get(f"{name}_config") or {}
        for name in ("vision", "text")
    )
    there = [section for section, absent in ((vision, "text"), (text, "image")) if towers != absent]
    activations = {section.get("hidden_act", "quick_gelu") for section in there}
    if len(activations) > 1 or not activations <= set(get_args(Activation)):
        raise ValueError(f"{source} has the activations {sorted(activations)}; one of quick_gelu and gelu for both")
    for section in (vision, text):
        if section.get("layer_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"{source} has layer_norm_eps {section['layer_norm_eps']}; only 1e-05 is supported")

    def tower(section: Mapping[str, Any], width: int, heads: int) -> dict[str, Any]:
        width, hidden = section.get("hidden_size", width), 4 * width
        return {
            "width": width,
            "layers": section.get("num_hidden_layers", 12),
            "head_width": _head_width(width, section.get("num_attention_heads", heads), source),
            "mlp_ratio": _ratio(section.get("intermediate_size", hidden), width),
        }

    vocab_size = text.get("vocab_size", 49408)
    end = text.get("eos_token_id", END_OF_TEXT)
    if end is None:
        raise ValueError(f"{source} has 'eos_token_id': None; it must be the id of the token that ends a text")
    is_metaclip = values["model_type"] == _METACLIP_2
    if is_metaclip and vocab_size == VOCAB_SIZE:
        raise ValueError(
            f"{source} is of a model of type {_METACLIP_2!r} with as many tokens as CLIP's, {vocab_size:,}: the ids of "
            "its own tokenizer would be taken for CLIP's. Those that are published have 901,629 or 250,100"
        )
    words = TextConfig(
        context_length=text.get("max_position_embeddings", 77),
        vocab_size=vocab_size,
        # Files from before 2023 say 2, which transformers itself takes to mean "the largest id".
        eot_token=_largest_id(vocab_size) if end == 2 and not is_metaclip else end,
        **tower(text, 512, 8),
    )
    image_size, patch_size = vision.get("image_size", 224), vision.get("patch_size", 32)
    if towers == "text":
        pixels = None  # of the model that the tower was taken from
    images = {} if pixels is None else vision_fields(pixels, image_size, pixels_source)
    seen = VisionConfig(image_size=image_size, patch_size=patch_size, **tower(vision, 768, 12), **images)
    return CLIPConfig(values.get("projection_dim", 512), activations.pop(), seen, words, towers)
