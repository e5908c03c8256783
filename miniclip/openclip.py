"""open_clip's names, for scripts written for it: `import miniclip.openclip as open_clip`, or `install()` first.

The functions have open_clip's signatures, and models its conventions: calling one gives unit features and the
exponentiated scale (ours and OpenAI's give logits), a new model is on the CPU and in training mode, weights without a
name are random. Modules have open_clip's names and keys; transformers take (B, N, D). Where open_clip goes on in
silence, this module warns: a text that is cut, an activation that the weights were not trained with.

Architectures and tags are facts of open_clip 3.3.0 (`model_configs`, `pretrained.py`), as far as our towers can build
them. N tokens, B batch, D width, E embedding, R resolution.
"""

from __future__ import annotations

import copy
import difflib
import json
import string
import sys
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import regex
import torch
import torch.nn.functional as F
from torch import Tensor

from . import openai, openclip_images, openclip_loss, openclip_model, openclip_names
from . import tokenizer as clip_tokenizer
from .common.device import find_device
from .common.files import ASSETS
from .common.modules import evaluation_mode
from .config import Activation, CLIPConfig, differences
from .openclip_images import Transform
from .openclip_model import refuse_foreign
from .openclip_names import MODULES, missing
from .timm_tower import TimmTower
from .weights.architecture import config_from_openclip, side_of_square
from .weights.containers import read_json, read_tensors
from .weights.download import HUB_PREFIX, fetch_hub, fetch_openai
from .weights.folders import OPENCLIP_CONFIG_FILE
from .weights.layouts import to_openai_keys
from .weights.load import build, interpolate_places, preprocess_for, resize
from .weights.pickles import is_torchscript, read_torchscript
from .weights.read import Checkpoint, read_checkpoint
from .weights.shapes import Unfilled
from .weights.write import openclip_settings

if TYPE_CHECKING:
    from .openclip_model import CLIP

HF_HUB_PREFIX, LOCAL_DIR_PREFIX = HUB_PREFIX, "local-dir:"
_QUICK = "-quickgelu"

# ---------------------------------------------------------------------------------------------------------------------
# Names of architectures and of weights


@dataclass(frozen=True)
class _Weights:
    """Where a tag's weights are, one of OpenAI's names or a repository of the hub, and how they were trained."""

    source: str
    changes: dict[str, Any]  # activation and pixels, where they are not the architecture's

    @property
    def is_quick(self) -> bool:
        return self.changes.get("activation") == "quick_gelu"

    @property
    def pixels(self) -> dict[str, Any]:
        return {name: value for name, value in self.changes.items() if name != "activation"}

    def applied(self, config: CLIPConfig) -> CLIPConfig:
        activation: Activation = "quick_gelu" if self.is_quick else "gelu"
        return replace(config, activation=activation, vision=replace(config.vision, **self.pixels))


@cache
def _published() -> dict[str, tuple[CLIPConfig, dict[str, _Weights]]]:
    """Name -> architecture, and its tags; names that end in -quickgelu follow from those without."""
    plain = {}
    for name, entry in json.loads((ASSETS / "openclip_models.json").read_text(encoding="utf-8")).items():
        weights = {tag: _Weights(facts.pop("from"), facts) for tag, facts in entry["weights"].items()}
        plain[name] = CLIPConfig.from_dict({"activation": "gelu", **entry["config"]}, name), weights
    quick = {
        name + _QUICK: (replace(config, activation="quick_gelu"), kept)
        for name, (config, weights) in plain.items()
        if (kept := {tag: each for tag, each in weights.items() if each.is_quick})
    }
    return plain | quick


@cache
def _model_configs() -> dict[str, dict[str, Any]]:
    """Name -> settings as open_clip's JSON has them. Programs add architectures here, and change them."""
    return {name: _published_settings(config) for name, (config, _) in _published().items()}


def _published_settings(config: CLIPConfig) -> dict[str, Any]:
    settings = openclip_settings(config)["model_cfg"]
    if config.vision.timm_model.startswith("convnext"):  # these alone are trained with stochastic depth by open_clip
        settings["vision_cfg"]["timm_drop_path"] = 0.1
    return settings


def add_model_config(path: str | Path) -> None:
    """Adds the architecture of a JSON file under the file's name, or those of a folder's files.

    Raises:
        ValueError: there is none: nothing with embed_dim, vision_cfg and text_cfg.
    """
    path = Path(path)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.is_file() else []
    needed = {"embed_dim", "vision_cfg", "text_cfg"}
    found = {file.stem: settings for file in files if needed <= (settings := read_json(file)).keys()}
    if not found:
        raise ValueError(f"{path} has no architecture of open_clip's, which is JSON with {', '.join(sorted(needed))}")
    _model_configs().update(found)


def list_models() -> list[str]:
    return sorted(
        _model_configs(),
        key=lambda name: [
            (not part.isdigit(), int(part) if part.isdigit() else part) for part in regex.split(r"(\d+)", name.lower())
        ],
    )


def list_pretrained(as_str: bool = False) -> list[Any]:
    """(name, tag) of each, or "name:tag"."""
    pairs = [(name, tag) for name, (_, weights) in _published().items() for tag in weights]
    return [":".join(pair) for pair in pairs] if as_str else pairs


def list_pretrained_tags_by_model(model: str) -> list[str]:
    return list(_published()[model][1]) if model in _published() else []


def list_pretrained_models_by_tag(tag: str) -> list[str]:
    return [name for name, (_, weights) in _published().items() if _clean(tag) in weights]


def list_openai_models() -> list[str]:
    return openai.available_models()


def _clean(tag: str) -> str:
    return tag.lower().replace("-", "_")


def _by_name(name: str) -> tuple[str, CLIPConfig, dict[str, _Weights]]:
    name = name if name in _model_configs() else name.replace("/", "-")
    if name not in _model_configs():
        near = difflib.get_close_matches(name, _model_configs(), n=3)
        raise ValueError(
            f"model_name is {name!r}: no folder or file, and none of the architectures that miniclip can build "
            f"({'did you mean ' + ' or '.join(near) + '? ' if near else ''}miniclip.openclip.list_models() has them). "
            "open_clip may have more; `miniclip eval` takes those as openclip:NAME/TAG"
        )
    config, weights = _published().get(name, (None, {}))
    settings = _model_configs()[name]
    if config is None or settings != _published_settings(config):
        config = config_from_openclip({"model_cfg": settings}, name)
        refuse_foreign(config, name)
    return name, config, weights


# ---------------------------------------------------------------------------------------------------------------------
# From a name to a model


def create_model(
    model_name: str,
    pretrained: str | None = None,
    load_weights: bool = True,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    jit: bool = False,
    *,
    force_quick_gelu: bool = False,
    force_patch_dropout: float | None = None,
    force_image_size: int | tuple[int, int] | None = None,
    force_context_length: int | None = None,
    cache_dir: str | None = None,
    output_dict: bool | None = None,
    require_pretrained: bool = False,
    weights_only: bool = True,
    **others: Any,
) -> CLIP:
    """A model in training mode.

    Args:
        model_name: an architecture (`list_models`), whose weights `pretrained` names; or hf-hub:owner/name,
            local-dir:DIR or any checkpoint that `miniclip.load` takes, which bring their own.
        pretrained: a tag (`list_pretrained`), or a file. Without it, weights are random, and a warning says so.
        load_weights: False for random weights whatever the names bring.
        precision: of the weights. "fp16" and "bf16" leave norms and embeddings in float32, "pure_fp16" and "pure_bf16"
            do not; anything with "amp" is float32.
        jit: warned about and ignored.
        force_patch_dropout: share of an image's patches that are left out in training, in place of the configuration's.
        force_image_size: pixels; position embeddings of the image are interpolated (bicubic).
        force_context_length: tokens; position embeddings of the text are interpolated (linear), as open_clip's are, and
            not cut or repeated, as by `miniclip.load`.
        weights_only: no code of a checkpoint is run either way.
        others: `init_logit_scale` and `init_logit_bias` of a new model; weights keep their own, and a bias that they
            have not is 0. open_clip's further arguments are refused unless they ask for nothing.

    Raises:
        ValueError: no such name, tag or file, another architecture, or an argument that is not supported.
    """
    start: dict[str, Any] = {name: float(others.pop(name)) for name in _STARTS if others.get(name) is not None}
    _refuse(others)
    if load_checkpoint is not _OWN_LOAD_CHECKPOINT:
        warnings.warn("what a program put in place of load_checkpoint is not called by create_model", stacklevel=2)
    if jit:
        warnings.warn("jit=True is ignored: no code of a checkpoint is run", stacklevel=2)
    config, found, source, settings = _open(model_name, pretrained if load_weights else None, cache_dir)
    found = found if load_weights else None  # a folder's own weights are not asked for either
    if found is None and (require_pretrained or (load_weights and not pretrained)):
        _report_random(model_name, require_pretrained)
    config = replace(config, activation="quick_gelu" if force_quick_gelu else config.activation, **start)
    side = side_of_square("force_image_size", force_image_size)
    vision_cfg = settings["vision_cfg"]
    if force_patch_dropout is not None:
        vision_cfg = {**vision_cfg, "patch_dropout": force_patch_dropout}
    beside = bool(output_dict or settings.get("output_dict")), vision_cfg
    if found is None:
        model = openclip_model.CLIP.of(_resized(config, side, force_context_length), *beside)
    else:
        found = _with_bias(replace(found, config=config), start.get("init_logit_bias"))
        found = _interpolated(resize(found, side, None), force_context_length)
        with Unfilled():
            model = openclip_model.CLIP.of(found.config, *beside)
        model.load_state_dict(to_openai_keys(build(found, source).state_dict()))
    _set_precision(model, precision)
    return model.to(find_device(device))


def _resized(config: CLIPConfig, image_size: int | None, context_length: int | None) -> CLIPConfig:
    vision = replace(config.vision, image_size=image_size or config.vision.image_size)
    return replace(
        config, vision=vision, text=replace(config.text, context_length=context_length or config.text.context_length)
    )


def _with_bias(found: Checkpoint, initial: float | None) -> Checkpoint:
    """The same weights for a model with a bias, if it is asked for: 0, unless they have one, as open_clip's."""
    if initial is None:
        return found
    config = replace(found.config, init_logit_bias=initial)
    return replace(found, config=config, tensors={"logit_bias": torch.zeros(()), **found.tensors})


def _interpolated(found: Checkpoint, context_length: int | None) -> Checkpoint:
    """The same weights for another context length, by open_clip's rule (`resize_text_pos_embed`)."""
    name = "text.positional_embedding"
    table = found.tensors.get(name)  # what is missing is an error of `build`
    if table is None or context_length is None or context_length == len(table):
        return found
    tensors = found.tensors | {name: _interpolated_rows(table, context_length)}
    return replace(found, config=_resized(found.config, None, context_length), tensors=tensors)


def _interpolated_rows(table: Tensor, count: int, mode: str = "linear", antialias: bool = False) -> Tensor:
    rows = F.interpolate(table.float().T[None], size=count, mode=mode, antialias=antialias, align_corners=False)[0].T
    return rows.to(table.dtype)


def resize_pos_embed(
    state_dict: MutableMapping[str, Tensor], model: CLIP, interpolation: str = "bicubic", antialias: bool = True
) -> None:
    """Interpolates the image's position embeddings of a state dict to the model's places; a ResNet's stay."""
    name, grid = "visual.positional_embedding", getattr(model.visual, "grid_size", None)
    if grid is not None and name in state_dict and len(state_dict[name]) != 1 + grid[0] ** 2:
        state_dict[name] = interpolate_places(state_dict[name], grid[0], interpolation, antialias)


def resize_text_pos_embed(
    state_dict: MutableMapping[str, Tensor], model: CLIP, interpolation: str = "linear", antialias: bool = False
) -> None:
    """Interpolates the text's position embeddings of a state dict to the model's context length."""
    name, length = "positional_embedding", len(model.positional_embedding)
    if name in state_dict and len(state_dict[name]) != length:
        state_dict[name] = _interpolated_rows(state_dict[name], length, interpolation, antialias)


def _open(
    name: str, pretrained: str | None, cache_dir: str | None
) -> tuple[CLIPConfig, Checkpoint | None, str, dict[str, Any]]:
    """The architecture, what there is of weights, where these are from, for an error, and open_clip's settings."""
    path = _own_path(name, cache_dir)
    if path is not None:
        if pretrained:
            warnings.warn(f"pretrained={pretrained!r} is ignored: {name} brings its own weights", stacklevel=4)
        found = read_checkpoint(path)
        refuse_foreign(found.config, name)
        return found.config, found, name, _settings_of(found)
    name, config, weights = _by_name(name)
    settings = _model_configs()[name]
    if not pretrained:
        return config, None, name, settings
    if (tag := weights.get(_clean(pretrained))) is not None:
        wanted = tag.applied(config)
        is_openais = tag.source in openai.available_models()
        path = fetch_openai(tag.source, cache_dir) if is_openais else fetch_hub(HUB_PREFIX + tag.source, cache_dir)
        found = replace(read_checkpoint(path), config=wanted)
    elif Path(pretrained).exists():
        found = _of_file(read_checkpoint(pretrained, config), config, name, pretrained)
        others = [f"{tag}: {each.pixels}" for tag, each in weights.items() if each.pixels]
        if found.config is config and others:
            warnings.warn(
                f"{pretrained} does not say how its pictures are to be prepared, and they are OpenAI's way, as in "
                f"open_clip. Of the weights of {name} some need another ({'; '.join(others)}); if these are such, "
                "name the tag, or pass image_mean, image_std and image_resize_mode",
                stacklevel=4,
            )
    else:
        near = difflib.get_close_matches(_clean(pretrained), weights, n=1)
        raise ValueError(
            f"pretrained is {pretrained!r}: no file or folder, and none of the tags of {name}, "
            f"{', '.join(weights) or 'which has none'}{f'; did you mean {near[0]}?' if near else ''}"
        )
    if found.config.activation != config.activation:
        warnings.warn(
            f"{pretrained} was trained with {found.config.activation} and is used with it, though {name} alone means "
            f"{config.activation}",
            stacklevel=4,
        )
    return found.config, found, f"{pretrained} for {name}", settings


def _settings_of(found: Checkpoint) -> dict[str, Any]:
    """As the checkpoint's own JSON has them, if open_clip's, which may have more than an architecture's."""
    if found.config_file is not None and found.config_file.name == OPENCLIP_CONFIG_FILE:
        return read_json(found.config_file)["model_cfg"]
    return openclip_settings(found.config)["model_cfg"]


def _own_path(name: str, cache_dir: str | None) -> Path | None:
    """Where a name that brings its own weights lies; None for an architecture's."""
    if name.startswith(HUB_PREFIX):
        return fetch_hub(name, cache_dir)
    if name.startswith(LOCAL_DIR_PREFIX) and not Path(name.removeprefix(LOCAL_DIR_PREFIX)).is_dir():
        raise ValueError(f"model_name is {name!r}: there is no folder {name.removeprefix(LOCAL_DIR_PREFIX)!r}")
    path = Path(name.removeprefix(LOCAL_DIR_PREFIX))
    return path if path.exists() else None


def _of_file(found: Checkpoint, config: CLIPConfig, name: str, file: str) -> Checkpoint:
    """Makes sure that a file that tells its architecture has that of the name, whatever its pixels and activation."""
    told = found.config
    pixels = {
        field: getattr(told.vision, field)
        for field in ("mean", "std", "preprocess", "resize", "resize_size", "interpolation")
    }
    same = replace(
        config,
        vision=replace(config.vision, **pixels),
        activation=told.activation,
        init_logit_scale=told.init_logit_scale,
        init_logit_bias=told.init_logit_bias,
    )
    if lines := differences(same.to_dict(), told.to_dict(), "", ("the name's", "the file's")):
        raise ValueError("\n".join([f"{file} holds another architecture than {name}:", *lines]))
    return found


def load_checkpoint(
    model: CLIP, checkpoint_path: str, strict: bool = True, weights_only: bool = True, device: str = "cpu"
) -> Any:
    """Weights of a file or folder into a model of their architecture; position embeddings are interpolated to fit it.

    Raises:
        ValueError: no checkpoint, another architecture, or `strict` is False.
    """
    if not strict:
        raise ValueError("strict is False, but what is missing or left over is refused: take model.load_state_dict")
    config, found = model.config, read_checkpoint(checkpoint_path, model.config)
    side, length = found.config.vision.image_size, found.config.text.context_length
    if (positions := found.tensors.get("text.positional_embedding")) is not None:
        length = len(positions)
    if (places := found.tensors.get("visual.positional_embedding")) is not None:
        side = round((len(places) - 1) ** 0.5) * config.vision.patch_size
    found = _with_bias(replace(found, config=_resized(found.config, side, length)), config.init_logit_bias)
    found = _of_file(found, _resized(config, side, length), "the model", checkpoint_path)
    found = _interpolated(resize(found, config.vision.image_size, None), config.text.context_length)
    return model.load_state_dict(to_openai_keys(build(found, checkpoint_path).state_dict()))


_OWN_LOAD_CHECKPOINT = load_checkpoint


def load_state_dict(
    checkpoint_path: str | Path, device: str | torch.device = "cpu", weights_only: bool = True
) -> dict[str, Tensor]:
    """Tensors by their names in a file, without what trainers put around them. No code of it is run."""
    path = Path(checkpoint_path)
    tensors = read_torchscript(path) if is_torchscript(path) else read_tensors(path)
    return {name: tensor.to(device) for name, tensor in tensors.items() if name not in openai.SIZES}


def get_model_config(model_name: str) -> dict[str, Any] | None:
    """An architecture as open_clip's JSON has it, or None for a name that is none of `list_models`'."""
    if model_name.startswith((HUB_PREFIX, LOCAL_DIR_PREFIX)):
        return _open(model_name, None, None)[3]
    return copy.deepcopy(_model_configs().get(model_name))


def is_pretrained_cfg(model: str, tag: str) -> bool:
    return _clean(tag) in list_pretrained_tags_by_model(model)


def _report_random(name: str, is_error: bool) -> None:
    tags = list_pretrained_tags_by_model(name.replace("/", "-"))
    known = f"tags are {', '.join(tags)}" if tags else "there are no tags for it"
    if is_error:
        raise ValueError(f"{name} needs weights: pretrained names a tag or a file; {known}")
    warnings.warn(f"the weights of {name} are random: pretrained names a tag or a file; {known}", stacklevel=3)


def _set_precision(model: CLIP, precision: str) -> None:
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    if "amp" in precision or precision in ("fp32", "pure_fp32"):
        return
    dtype = dtypes.get(precision.removeprefix("pure_"))
    if dtype is None:
        raise ValueError(f"precision is {precision!r}; valid are fp32, fp16, bf16, pure_fp16, pure_bf16 and amp…")
    if precision.startswith("pure_"):
        model.to(dtype)
    elif isinstance(model.visual, TimmTower):
        raise ValueError(f"precision is {precision!r}; for a tower of timm's, use 'pure_{precision}' or 'fp32'")
    else:
        convert_weights_to_lp(model, dtype)


_STARTS = ("init_logit_scale", "init_logit_bias")
_NOTHING = ("pretrained_hf", "pretrained_text", "pretrained_image")  # towers' own weights, where all come together


def _refuse(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value not in (None, False, {}) and name not in _NOTHING:
            raise ValueError(
                f"{name}={value!r} is not supported by miniclip.openclip; the config of a model is data, "
                "see miniclip.CLIPConfig"
            )


def create_model_and_transforms(
    model_name: str,
    pretrained: str | None = None,
    load_weights: bool = True,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    jit: bool = False,
    *,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
    aug_cfg: Any = None,
    **options: Any,
) -> tuple[CLIP, Transform, Transform]:
    """The model, and two functions from a PIL image to (3, R, R): the one for training crops at random.

    The arguments are those of `create_model` and of `image_transform`; what is None is as the weights were trained.
    """
    model = create_model(model_name, pretrained, load_weights, precision, device, jit, **options)
    given = {
        "mean": image_mean,
        "std": image_std,
        "interpolation": image_interpolation,
        "resize_mode": image_resize_mode,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    model.visual.preprocess_cfg |= changes
    settings = openclip_images.PreprocessCfg(**model.visual.preprocess_cfg)
    transform = openclip_images.image_transform_v2  # or what a program has put there
    train = transform(settings, is_train=True, aug_cfg=aug_cfg)
    vision = model.config.vision
    if not changes and (vision.preprocess, vision.resize_size) not in (("openai", None), ("openai", vision.image_size)):
        return model, train, preprocess_for(model.config)
    return model, train, transform(settings, is_train=False)


def create_model_from_pretrained(
    model_name: str,
    pretrained: str | None = None,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    jit: bool = False,
    *,
    return_transform: bool = True,
    **options: Any,
) -> Any:
    """As `create_model_and_transforms`, with weights that are not random: the model, and the transform of inference."""
    options["require_pretrained"] = True
    model, _, transform = create_model_and_transforms(model_name, pretrained, True, precision, device, jit, **options)
    return (model, transform) if return_transform else model


def load_openai_model(
    name: str, precision: str | None = None, device: str | torch.device | None = None, cache_dir: str | None = None
) -> CLIP:
    """One of OpenAI's names, or a file of its; float32 on a CPU and float16 elsewhere, unless `precision` says."""
    on = find_device(device)
    where = name if Path(name).is_file() else str(fetch_openai(name, cache_dir))
    return create_model(where, None, True, precision or ("fp32" if on.type == "cpu" else "fp16"), on)


# ---------------------------------------------------------------------------------------------------------------------
# Words


def canonicalize_text(text: str, *, keep_punctuation_exact_string: str | None = None) -> str:
    """Lower case, single spaces, no ASCII punctuation but that of the string to keep; "_" is a space."""
    kept = keep_punctuation_exact_string
    parts = text.replace("_", " ").split(kept) if kept else [text.replace("_", " ")]
    without = [part.translate(str.maketrans("", "", string.punctuation)) for part in parts]
    return " ".join((kept or "").join(without).lower().split())


basic_clean, whitespace_clean = openai.basic_clean, openai.whitespace_clean


def _clean_lower(text: str) -> str:
    return whitespace_clean(basic_clean(text)).lower()


def _clean_whitespace(text: str) -> str:
    return whitespace_clean(basic_clean(text))


def _clean_canonicalize(text: str) -> str:
    return canonicalize_text(basic_clean(text))


_CLEANINGS: dict[str, Callable[[str], str]] = {
    "lower": _clean_lower,
    "whitespace": _clean_whitespace,
    "canonicalize": _clean_canonicalize,
}


def get_clean_fn(type: str) -> Callable[[str], str]:  # noqa: A002
    if type not in _CLEANINGS:
        raise ValueError(f"clean is {type!r}; valid are {', '.join(_CLEANINGS)}")
    return _CLEANINGS[type]


class SimpleTokenizer(openai.SimpleTokenizer):
    """Text to ids and back, and texts to a tensor. The special tokens are spelt <start_of_text> and <end_of_text>.

    Args:
        additional_special_tokens: words that are not split; their ids follow those of the vocabulary.
        clean: "lower", or "whitespace" (case stays), or "canonicalize" (punctuation goes, too).

    Raises:
        ValueError: another vocabulary, another cleaning, or a `reduction_mask`.
    """

    special: Mapping[str, int] = {
        "<start_of_text>": clip_tokenizer.START_OF_TEXT,
        "<end_of_text>": clip_tokenizer.END_OF_TEXT,
    }
    pat = openai.pieces_pattern(special)
    vocab_size, sot_token_id, eot_token_id = (
        clip_tokenizer.VOCAB_SIZE,
        clip_tokenizer.START_OF_TEXT,
        clip_tokenizer.END_OF_TEXT,
    )
    all_special_ids: Sequence[int] = (sot_token_id, eot_token_id)
    clean_fn: Callable[[str], str] = staticmethod(_clean_lower)
    reduction_fn: Callable[..., Tensor] | None = None

    def __init__(
        self,
        bpe_path: str | None = None,
        additional_special_tokens: Sequence[str] | None = None,
        context_length: int | None = clip_tokenizer.CONTEXT_LENGTH,
        clean: str = "lower",
        reduction_mask: str = "",
    ) -> None:
        super().__init__(bpe_path)
        self.context_length = context_length
        if reduction_mask:
            raise ValueError(f"reduction_mask is {reduction_mask!r}; texts are cut at their end here, with ''")
        if clean != "lower":
            self.clean_fn = get_clean_fn(clean)
        if additional_special_tokens:
            added = {name: clip_tokenizer.VOCAB_SIZE + i for i, name in enumerate(additional_special_tokens)}
            self.special = {**self.special, **added}
            self.pat = openai.pieces_pattern(self.special)
            self.vocab_size, self.all_special_ids = len(self.encoder), [*self.special.values()]

    def _is_plain(self) -> bool:
        """Whether ids are `clip_tokenizer`'s: nobody changed a table, put anything in or overrode a method."""
        return openai.has_own_tables(self) and _makers_of_ids(type(self)) == _OWN_MAKERS

    def encode(self, text: str) -> list[int]:
        return clip_tokenizer.encode(text) if self._is_plain() else self.encode_cleaned(self.clean_fn(text))

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """(B, context_length) int64: start, text, end, zeros. Longer texts are cut, and a warning counts them."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = context_length or self.context_length
        if not length:
            raise ValueError(f"context_length is {length}; give the number of tokens, {clip_tokenizer.CONTEXT_LENGTH}")
        if self.reduction_fn is not None:
            special = {"sot_token_id": self.sot_token_id, "eot_token_id": self.eot_token_id}
            return self.reduction_fn(texts, context_length=length, **special, encode_fn=self.encode)
        if self._is_plain():
            tokens = clip_tokenizer.tokenize(texts, length, truncate=True).long()
            full = [text for text, last in zip(texts, tokens[:, -1].tolist(), strict=True) if last]
            cut = [text for text in full if len(self.encode(text)) + 2 > length]
        else:
            rows = [[self.sot_token_id, *self.encode(text), self.eot_token_id] for text in texts]
            cut = [text for text, row in zip(texts, rows, strict=True) if len(row) > length]
            rows = [row if len(row) <= length else [*row[: length - 1], self.eot_token_id] for row in rows]
            tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.long)
            tokens = tokens.reshape(-1, length)
        if cut:
            what = f"{len(cut)} of {len(texts)} texts have more than {length} tokens and were cut"
            warnings.warn(f"{what}, the first: {cut[0][:200]!r}", stacklevel=2)
        return tokens


def _makers_of_ids(tokenizer_class: type[SimpleTokenizer]) -> list[Any]:
    """What makes ids of texts, of the class or a subclass and of this module, as it is now."""
    names = (
        "__call__", "bpe", "bpe_ranks", "byte_encoder", "cache", "clean_fn", "encode", "encode_cleaned", "encoder",
        "eot_token_id", "pat", "reduction_fn", "sot_token_id", "special",
    )  # fmt: skip
    return [basic_clean, whitespace_clean, *(getattr(tokenizer_class, name) for name in names)]


_OWN_MAKERS = _makers_of_ids(SimpleTokenizer)
_module_tokenizer = SimpleTokenizer()
_OPTIONS = {"additional_special_tokens", "bpe_path", "clean", "reduction_mask"}


def get_tokenizer(
    model_name: str = "", context_length: int | None = None, cache_dir: str | None = None, **options: Any
) -> SimpleTokenizer:
    """A model's tokenizer; the name is any that `create_model` takes, and options are those of `SimpleTokenizer`.

    Raises:
        ValueError: no such model, one that reads other ids than CLIP's, or another option.
    """
    own = {name: options.pop(name) for name in _OPTIONS & options.keys()}
    _refuse(options)
    if not model_name:
        return SimpleTokenizer(context_length=context_length or clip_tokenizer.CONTEXT_LENGTH, **own)
    config, *_ = _open(model_name, None, cache_dir)
    added, text = own.get("additional_special_tokens") or (), config.text
    if not added or text.eot_token is not None or text.vocab_size < clip_tokenizer.VOCAB_SIZE + len(added):
        clip_tokenizer.refuse_other_ids(text, model_name, "CLIP's")
    return SimpleTokenizer(context_length=context_length or text.context_length, **own)


def tokenize(texts: str | Sequence[str], context_length: int = clip_tokenizer.CONTEXT_LENGTH) -> Tensor:
    return tokenizer._tokenizer(texts, context_length)  # an attribute of this module, which programs replace


def decode(output_ids: Tensor) -> str:
    return tokenizer._tokenizer.decode(output_ids.tolist())


@torch.no_grad()
def build_zero_shot_classifier(
    model: CLIP,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Callable[[str], str] | str],
    num_classes_per_batch: int | None = 10,
    device: str | torch.device = "cpu",
    use_tqdm: bool = False,
) -> Tensor:
    """(E, C), a unit column for each class: the mean of its prompts' unit features."""
    columns = []
    for name in classnames:
        texts = [template.format(name) if isinstance(template, str) else template(name) for template in templates]
        columns.append(model.encode_text(tokenizer(texts).to(device), normalize=True).mean(dim=0))
    return F.normalize(torch.stack(columns), dim=1).T


def build_zero_shot_classifier_legacy(
    model: CLIP,
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[Callable[[str], str] | str],
    device: str | torch.device = "cpu",
    use_tqdm: bool = False,
) -> Tensor:
    """As `build_zero_shot_classifier`, whose classes come one by one here, too."""
    return build_zero_shot_classifier(model, tokenizer, classnames, templates, None, device, use_tqdm)


def trace_model(model: CLIP, batch_size: int = 256, device: str | torch.device = "cpu") -> Any:
    """`torch.jit.trace_module` of the call and both towers, in evaluation mode."""
    vision, text = model.config.vision, model.config.text
    images = torch.ones(batch_size, 3, vision.image_size, vision.image_size, device=device)
    tokens = torch.zeros(batch_size, text.context_length, dtype=torch.int, device=device)
    inputs = {"forward": (images, tokens), "encode_text": (tokens,), "encode_image": (images,)}
    with evaluation_mode(model):
        traced = torch.jit.trace_module(model, inputs, check_trace=False)
    traced.visual.image_size = model.visual.image_size
    return traced


# ---------------------------------------------------------------------------------------------------------------------


# Names of open_clip's that are written elsewhere.
_HOMES = {
    openai: ("bytes_to_unicode", "default_bpe", "get_pairs"),
    openclip_model: ("AttentionPool2d", "Bottleneck", "CLIP", "LayerNorm", "LayerScale", "ModifiedResNet",
                     "PatchDropout", "QuickGELU", "ResidualAttentionBlock", "TimmModel", "Transformer",
                     "VisionTransformer", "_expand_token", "freeze_batch_norm_2d", "text_global_pool"),
    openclip_images: ("AugmentationCfg", "PreprocessCfg", "image_transform", "image_transform_v2",
                      "merge_preprocess_dict", "merge_preprocess_kwargs"),
    openclip_loss: ("ClipLoss", "DistillClipLoss", "SigLipLoss", "create_loss", "gather_features"),
    openclip_names: (
        *openclip_names.KINDS, "CLIPTextCfg", "CLIPVisionCfg", "IMAGENET_CLASSNAMES", "IMAGENET_MEAN", "IMAGENET_STD",
        "INCEPTION_MEAN", "INCEPTION_STD", "OPENAI_DATASET_MEAN", "OPENAI_DATASET_STD", "OPENAI_IMAGENET_TEMPLATES",
        "SIMPLE_IMAGENET_TEMPLATES", "_apcfg", "_mc2cfg", "_mccfg", "_pcfg", "_pecfg", "_slpcfg", "get_cast_dtype",
        "get_input_dtype", "get_model_preprocess_cfg", "get_model_tokenize_cfg", "set_model_preprocess_cfg",
    ),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_AS_WRITTEN = {name: getattr(home, name) for name, home in _HOME_OF.items()}
__version__ = "3.3.0"  # open_clip's, whose names these are
convert_weights_to_lp = convert_weights_to_fp16 = openai.convert_weights
LayerNormFp32 = openai.LayerNorm


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "_tokenizer":
        return _module_tokenizer
    if name == "_MODEL_CONFIGS":
        return _model_configs()
    if name not in _HOME_OF:
        raise openai.missing_name(__name__, missing(name))
    return getattr(_HOME_OF[name], name)


class _Module(ModuleType):
    """What a program puts in place of a name, it puts where the name is written, and so it acts; deleted, it is undone.

    Not in `openai`, which is a package of its own for those who import it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        home = _HOME_OF.get(name, openai)
        super().__setattr__(name, value) if home is openai else setattr(home, name, value)

    def __delattr__(self, name: str) -> None:
        home = _HOME_OF.get(name, openai)
        super().__delattr__(name) if home is openai else setattr(home, name, _AS_WRITTEN[name])


sys.modules[__name__].__class__ = _Module


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})


def install() -> None:
    """Gives this module the names `open_clip`, `open_clip.factory`, … in this process.

    Raises:
        ValueError: another `open_clip` is imported already.
    """
    openai.install_as(sys.modules[__name__], "open_clip", *(f"open_clip.{name}" for name in MODULES))


constants = factory = loss = model = modified_resnet = pretrained = timm_model = sys.modules[__name__]
tokenizer = transform = transformer = utils = zero_shot_classifier = zero_shot_metadata = version = constants
