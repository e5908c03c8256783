"""Models of open_clip, of transformers and of your own -> the `Encoder` that evaluation takes."""

from __future__ import annotations

import copy
import difflib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..common.arguments import BF16, FLOAT32, check_precision, shown
from ..common.device import find_device
from ..common.files import expand_home
from ..common.modules import evaluating, is_plain_value
from ..data.wordings.kept import Wordings
from ..model import CLIP
from ..weights.containers import read_json
from ..weights.download import HUB_PREFIX
from ..weights.folders import OPENCLIP_CONFIG_FILE
from ..weights.load import load, preprocess_for
from ..weights.read import read_wordings
from .encoder import Encoder, ModelError, Preprocessor, as_number, errors_named, from_clip, from_object, in_bf16, moved
from .fingerprints import PASSING_STATE

OPENCLIP_PREFIX, TRANSFORMERS_PREFIX, PYTHON_PREFIX = "openclip:", "transformers:", "python:"
_FOLDER_PREFIX = "local-dir:"  # open_clip's own, beside the hub's

# Texts are padded to the context length, and padding is attended to: so SigLIP's towers were trained.
_ATTENDS_TO_PADDING = ("siglip", "siglip2")
_SCALES = ("logit_scale", "logit_bias", "temperature")  # belong to neither tower


def open_model(name: str, device: str | torch.device | None = None, precision: str | None = None) -> Encoder:
    """The model that a command line names, as in the table above.

    Args:
        device: where to; by default a GPU if there is one.
        precision: "bf16" for products in bfloat16 (`in_bf16`); by default float32.

    Raises:
        ValueError: a library that is missing, a name that it does not know, weights that are not there or do not fit,
            an object that lacks one of the five things, or a precision that is none or not to be had.
    """
    if not isinstance(name, str):
        raise ValueError(f"model is {shown(name)}; it must be the name or the path of one")
    if precision is not None:
        found = open_model(name, device)
        if check_precision(precision) == BF16:
            return in_bf16(found)
        return as_encoder(found, precision=precision)
    openers = {OPENCLIP_PREFIX: _open_openclip, TRANSFORMERS_PREFIX: _open_transformers, PYTHON_PREFIX: _open_python}
    before, colon, after = name.partition(":")
    prefix = before + colon
    if prefix in openers:
        if after in ("", HUB_PREFIX, _FOLDER_PREFIX):
            raise ValueError(f"model {name!r} names nothing after {name.rpartition(':')[0]!r}")
        return replace(openers[prefix](name, find_device(device)), wordings=_wordings_beside(after))
    if colon and prefix != HUB_PREFIX and not Path(name).exists():
        near = difflib.get_close_matches(prefix, openers, n=1)
        if near:
            raise ValueError(f"model {name!r} begins with {prefix!r}; did you mean {near[0]!r}?")
    model, preprocess = load(name, device)
    return from_clip(model, preprocess, name)


def _wordings_beside(name: str) -> Wordings | None:
    """Those of a folder in another library's layout, as `miniclip convert` writes it."""
    folder = name.removeprefix(_FOLDER_PREFIX)
    return read_wordings(Path(folder)) if folder and Path(folder).is_dir() else None


def as_encoder(model: Any, device: str | torch.device | None = None, precision: str | None = None) -> Encoder:
    """What Python code may give as a model: a name or path for `open_model`, an `Encoder`, a `CLIP`, what
    `miniclip.load` returns, or an object with the five things.

    Args:
        device, precision: of a model that is named.

    Raises:
        ValueError: as `open_model` and `from_object`; or another precision than that of a model that is open.
    """
    if isinstance(model, str | Path):
        return open_model(str(model), device, precision)
    found = model.precision if isinstance(model, Encoder) else FLOAT32
    if precision is not None and check_precision(precision) != found:
        raise ValueError(f"precision is {precision}, and the given model is open in {found}; name a model by its path")
    if isinstance(model, Encoder):
        return model
    if isinstance(model, CLIP):
        return from_clip(model, preprocess_for(model.config), "the given model")
    if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], CLIP):
        return from_clip(*model, "the given model")
    return from_object(model, "the given model")


# ---------------------------------------------------------------------------------------------------------------------
# open_clip's


def from_openclip(model: Any, preprocess: Preprocessor, tokenize: Callable[[list[str]], Tensor], name: str) -> Encoder:
    """A model of open_clip's (CLIP, CustomTextCLIP, CoCa), which encodes in evaluation mode.

    Args:
        preprocess: the one for validation.
        tokenize: what `open_clip.get_tokenizer` gives; it cuts long texts in silence.
    """
    import open_clip

    def images_on_device(images: Tensor) -> Tensor:
        parameter = next(model.visual.parameters())
        return moved(images, parameter).to(parameter.dtype)

    def encode_image(images: Tensor) -> Tensor:
        return model.encode_image(images_on_device(images))

    def encode_text(tokens: Tensor) -> Tensor:
        return model.encode_text(tokens.to(model.logit_scale.device))

    def encode_pooled(images: Tensor) -> Tensor:
        features = pooled(images_on_device(images))
        return features[0] if isinstance(features, tuple) else features  # CoCa's tower gives all tokens, too

    pooled = _without_projection(model.visual)
    # CLIP has the parts of its text tower beside `visual`, CustomTextCLIP and CoCa a tower in `text`. CoCa's decoder
    # writes captions and encodes nothing.
    text_module = model.text if hasattr(model, "text") else _part(model, lambda part: part != "visual")
    return Encoder(
        name=name,
        encode_image=torch.no_grad()(evaluating(model, encode_image)),
        encode_text=torch.no_grad()(evaluating(model, encode_text)),
        tokenize=tokenize,
        preprocess=preprocess,
        logit_scale=as_number(model.logit_scale),
        encode_pooled=torch.no_grad()(evaluating(model, encode_pooled)) if pooled is not None else None,
        library=f"open_clip {open_clip.__version__}",
        image_module=model.visual,
        text_module=text_module,
    )


def _without_projection(visual: Any) -> Any:
    """The same tower, of the same tensors, without the last product; None for a tower that is not known here."""
    from open_clip.modified_resnet import ModifiedResNet as OpenClipResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer

    if isinstance(visual, OpenClipResNet):  # as ours: it ends in its attention pool
        return visual
    if isinstance(visual, TimmModel) and "pool" not in visual.head._modules:
        return visual.trunk
    if isinstance(visual, OpenClipVisionTransformer):
        bare = copy.copy(visual)  # a module's dictionaries of tensors are shared with its copy: this one gets its own
        bare._parameters = {**visual._parameters, "proj": None}
        bare.training = False  # its modules are those of the model, and have the model's mode
        return bare
    return None


def _open_openclip(name: str, device: torch.device) -> Encoder:
    with _library("open_clip", "open_clip_torch"):
        import open_clip
    architecture, pretrained = name.removeprefix(OPENCLIP_PREFIX), None
    options = {}
    if architecture.startswith(_FOLDER_PREFIX):
        _check_folder(name, architecture.removeprefix(_FOLDER_PREFIX), OPENCLIP_CONFIG_FILE)
    elif not architecture.startswith(HUB_PREFIX):
        architecture, _, pretrained = architecture.partition("/")
        options = _openclip_weights(name, architecture, pretrained)
    with _library_errors("open_clip", name), warnings.catch_warnings():
        if "quick_gelu" in options:  # the activation is that of the weights
            warnings.filterwarnings("ignore", "QuickGELU mismatch")
        model, preprocess = open_clip.create_model_from_pretrained(architecture, pretrained, device=device, **options)
        tokenize = open_clip.get_tokenizer(architecture)
    return from_openclip(model.eval(), preprocess, tokenize, name)


def _openclip_weights(name: str, architecture: str, pretrained: str) -> dict[str, Any]:
    """The options of open_clip beside the names of a model and its weights.

    A tag may know whether its weights were trained with QuickGELU. open_clip takes the activation from the
    architecture's name, so OpenAI's weights in "ViT-B-32" lose points with a mere warning; here the tag decides. For a
    file it also takes OpenAI's pixels, whatever the architecture; here those of the configuration beside the file
    decide, or those that all tags agree on.
    """
    import open_clip

    if architecture not in open_clip.list_models():
        near = difflib.get_close_matches(architecture, open_clip.list_models(), n=3)
        raise ValueError(
            f"model {name!r}: open_clip {open_clip.__version__} has no {architecture!r}"
            + (f"; did you mean {' or '.join(near)}?" if near else "; open_clip.list_models() gives its names")
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not pretrained:
        raise ValueError(
            f"model {name!r} would be open_clip's {architecture} with random weights; name some after a slash: a file, "
            f"or {', '.join(tags) or 'nothing else, as open_clip has no weights for it'}"
        )
    tag, options = open_clip.pretrained.get_pretrained_cfg(architecture, pretrained), {}
    quick_gelu = tag.get("quick_gelu")
    if not tag:
        if not Path(pretrained).is_file():
            near = difflib.get_close_matches(pretrained, tags, n=1)
            raise ValueError(
                f"model {name!r}: {pretrained!r} is no file, and none of open_clip's tags for {architecture}: "
                f"{', '.join(tags) or 'there are none'}" + (f"; did you mean {near[0]}?" if near else "")
            )
        beside = _openclip_config_beside(Path(pretrained), architecture)
        quick_gelu = beside.get("model_cfg", {}).get("quick_gelu", False) if beside else None
        pixels, why = _openclip_preprocessing(architecture, beside)
        if why:
            warnings.warn(f"{name}: {why}", stacklevel=4)
        options = {f"image_{field}": value for field, value in pixels.items()}
    if quick_gelu not in (None, open_clip.get_model_config(architecture).get("quick_gelu", False)):
        activation = "QuickGELU" if quick_gelu else "GELU"
        warnings.warn(f"{name}: these weights were trained with {activation}, so {activation} is used", stacklevel=4)
        options["quick_gelu"] = quick_gelu
    return options


def _openclip_config_beside(file: Path, architecture: str) -> dict[str, Any] | None:
    """The `open_clip_config.json` in a file's folder, unless it is another architecture's."""
    import open_clip

    path = file.parent / OPENCLIP_CONFIG_FILE
    if not path.is_file():
        return None
    found = read_json(path)
    for within, name in ((found, "model_cfg"), (found.get("model_cfg", {}), "vision_cfg"), (found, "preprocess_cfg")):
        if name in within and not isinstance(within[name], dict):
            raise ValueError(f"{path}: {name} is {str(within[name])[:50]!r}; it must be a mapping of settings")
    model, own = found.get("model_cfg", {}), open_clip.get_model_config(architecture)
    theirs, ours = ({"embed_dim": each.get("embed_dim"), **each.get("vision_cfg", {})} for each in (model, own))
    is_same = all((theirs[key] or None) == (ours[key] or None) for key in theirs.keys() & ours.keys())
    return found if is_same else None


def _openclip_preprocessing(architecture: str, beside: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """How pictures are prepared for a file of weights, where not OpenAI's way, and what is to be said about it."""
    import open_clip
    from open_clip.transform import PreprocessCfg

    usual = vars(PreprocessCfg())

    def unusual(settings: dict[str, Any]) -> dict[str, Any]:
        found = {name: settings.get(name) or usual[name] for name in ("mean", "std", "interpolation", "resize_mode")}
        plain = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
        return {name: value for name, value in plain.items() if value != usual[name]}

    def in_words(pixels: dict[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in pixels.items())

    if beside is not None:
        pixels = unusual(beside.get("preprocess_cfg", {}))
        why = f"pictures are prepared as the {OPENCLIP_CONFIG_FILE} beside it says: {in_words(pixels)}"
        return pixels, why if pixels else ""
    told = {
        tag: unusual(open_clip.get_pretrained_cfg(architecture, tag))
        for tag in open_clip.list_pretrained_tags_by_model(architecture)
    }
    others = {tag: pixels for tag, pixels in told.items() if pixels}
    if not others:
        return {}, ""
    pixels = next(iter(others.values()))
    unsaid = "a file does not say how its pictures are to be prepared"
    if all(each == pixels for each in told.values()):
        return pixels, f"{unsaid}; they are, as for all of open_clip's weights for {architecture}: {in_words(pixels)}"
    named = "; ".join(f"{tag}: {in_words(each)}" for tag, each in others.items())
    return {}, (
        f"{unsaid}, and they are prepared OpenAI's way. Of open_clip's weights for {architecture}, some need another "
        f"({named}); if these are such, name the tag, or put their {OPENCLIP_CONFIG_FILE} beside the file"
    )


# ---------------------------------------------------------------------------------------------------------------------
# transformers'


def from_transformers(model: Any, processor: Any, name: str) -> Encoder:
    """A model of transformers' that has get_image_features and get_text_features; it encodes in evaluation mode.

    Args:
        processor: has its image_processor and its tokenizer. Texts are padded and cut as the processor says, else
            padded to the longest (SigLIP's to the context length) and cut to the context length.

    Raises:
        ValueError: the model or the processor lacks something.
    """
    import transformers

    for owner, needed in ((model, ("get_image_features", "get_text_features")), (processor, ("image_processor",))):
        for attribute in needed:
            if getattr(owner, attribute, None) is None:
                raise ValueError(f"{name} is a {type(owner).__name__} and has no {attribute}; a CLIP-like one has")
    tokenize = _HuggingFaceTokenize(model.config, processor, name)

    def encode_image(images: Tensor) -> Tensor:
        return _features(model.get_image_features(**_image_inputs(images.to(model.device), model.dtype)), name)

    def encode_text(tokens: Any) -> Tensor:
        return _features(model.get_text_features(**tokens.to(model.device)), name)

    def encode_pooled(images: Tensor) -> Tensor:
        return _features(model.vision_model(**_image_inputs(images.to(model.device), model.dtype)), name)

    return Encoder(
        name=name,
        encode_image=torch.no_grad()(evaluating(model, encode_image)),
        encode_text=torch.no_grad()(evaluating(model, encode_text)),
        tokenize=tokenize,
        preprocess=_HuggingFacePreprocess(processor.image_processor),
        logit_scale=_logit_scale(model, name),
        encode_pooled=torch.no_grad()(evaluating(model, encode_pooled)) if hasattr(model, "vision_model") else None,
        library=f"transformers {transformers.__version__}",
        image_module=_part(model, lambda part: not part.startswith("text")),
        text_module=_part(model, lambda part: part.startswith("text")),
    )


class _HuggingFacePreprocess:
    """A processor's tensor of one image.

    SigLIP 2's models of any aspect ratio take patches, their mask and the grid's two sides. These are packed into one
    tensor (patches, values + 3), which `_image_inputs` takes apart, so that it can be stacked as a picture can.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def __call__(self, image: Image.Image) -> Tensor:
        if not getattr(self.image_processor, "do_convert_rgb", False):
            image = image.convert("RGB")
        found = self.image_processor(images=image, return_tensors="pt")
        pixels = found["pixel_values"][0]
        if "spatial_shapes" not in found:
            return pixels
        mask, grid = found["pixel_attention_mask"][0], found["spatial_shapes"][0]
        return torch.cat([pixels, mask[:, None].to(pixels), grid.to(pixels).expand(len(pixels), 2)], dim=1)


def _image_inputs(images: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The batch as a transformers model takes it."""
    if images.ndim == 4:
        return {"pixel_values": images.to(dtype)}
    mask, grid = images[..., -3].int(), images[:, 0, -2:].long()
    return {"pixel_values": images[..., :-3].to(dtype), "pixel_attention_mask": mask, "spatial_shapes": grid}


class _HuggingFaceTokenize:
    def __init__(self, config: Any, processor: Any, name: str) -> None:
        tokenize = getattr(processor, "tokenizer", None)
        if tokenize is None:
            raise ValueError(f"{name} has a {type(processor).__name__} without a tokenizer; texts need one")
        longest = getattr(getattr(config, "text_config", config), "max_position_embeddings", tokenize.model_max_length)
        self.tokenizer, self.attends_to_padding = tokenize, config.model_type in _ATTENDS_TO_PADDING
        self.options = {"padding": "max_length" if self.attends_to_padding else True}
        self.options |= getattr(type(processor), "text_kwargs", {})
        lengths = (longest, tokenize.model_max_length, self.options.get("max_length", longest))
        self.options |= {"truncation": True, "max_length": min(lengths), "return_tensors": "pt"}

    def __call__(self, texts: list[str]) -> Any:
        found = self.tokenizer(texts, **self.options)
        if self.attends_to_padding:
            found.pop("attention_mask", None)
        return found


def _features(output: Any, name: str) -> Tensor:
    """(B, E): since version 5 an output of several tensors holds them."""
    features = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = f" of shape {tuple(features.shape)}" if isinstance(features, Tensor) else ""
        raise ValueError(f"{name} gives {type(output).__name__}{shape} for a batch; one vector for each is needed")
    return features


def _logit_scale(model: Any, name: str) -> Tensor:
    if isinstance(getattr(model, "logit_scale", None), Tensor):
        return as_number(model.logit_scale)
    if isinstance(getattr(model, "temperature", None), Tensor):  # ALIGN divides by it
        return -as_number(model.temperature).detach().log()
    raise ValueError(f"{name} is a {type(model).__name__} and has no logit_scale; a CLIP-like one has")


def _open_transformers(name: str, device: torch.device) -> Encoder:
    with _library("transformers", "transformers"):
        from transformers import AutoModel, AutoProcessor
    where = name.removeprefix(TRANSFORMERS_PREFIX)
    folder = expand_home(where)
    if folder.is_dir():
        where = str(folder)
    if folder.is_dir() or where.count("/") != 1 or where.startswith(("/", ".", "~")):
        _check_folder(name, where, "config.json")
    with _library_errors("transformers", name):
        # Whatever the file's precision, the same on every device; and never code from the repository.
        model, loaded = AutoModel.from_pretrained(
            where, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(where, trust_remote_code=False)
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ValueError(f"the weights of {name} lack {', '.join(missing[:5])}: they would be random")
    return from_transformers(model.to(device), processor, name)


def _open_python(name: str, device: torch.device) -> Encoder:
    module_name, _, attribute = name.removeprefix(PYTHON_PREFIX).rpartition(":")
    if not module_name or not attribute:
        raise ValueError(f"model {name!r} is not python:FILE.py:FUNCTION or python:MODULE:FUNCTION")
    is_file = module_name.endswith(".py")
    module = _import_file(name, expand_home(module_name)) if is_file else _import_module(name, module_name)
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        what = "has no" if function is None else f"has {function!r}, which is no function, as"
        raise ValueError(
            f"model {name!r}: {module_name} {what} {attribute}" + (f"; did you mean {near[0]}?" if near else "")
        )
    takes_device = "device" in inspect.signature(function).parameters
    with errors_named(f"{attribute} of {name}", (Exception, SystemExit)):
        model = function(device=device) if takes_device else function()
    return replace(model, name=name) if isinstance(model, Encoder) else from_object(model, name)


def _import_file(name: str, path: Path) -> Any:
    """A file as the module of its name, found by worker processes too: its folder is added to where Python looks."""
    if not path.is_file():
        raise ValueError(f"model {name!r}: there is no file {path}")
    path, stem = path.resolve(), path.stem
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()
    try:
        found = importlib.util.find_spec(stem)
    except (ImportError, ValueError):  # a name with a dot, or a module that was made by hand
        found = None
    if found is None or found.origin is None or Path(found.origin).resolve() != path:
        other = f", which is {found.origin or 'built in'}" if found else ""
        raise ValueError(f"model {name!r}: Python can't import {path} as {stem!r}{other}; rename the file")
    return _imported(name, stem)


def _imported(name: str, module: str) -> Any:
    try:
        with errors_named(f"model {name!r}: its module", (Exception, SystemExit)):
            return importlib.import_module(module)
    except ModelError as error:
        if isinstance(error.__cause__, SyntaxError):
            raise ValueError(f"model {name!r}: {error.__cause__}") from error
        raise


def _import_module(name: str, place: str) -> Any:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # where `python -m` looks, and an installed command does not
    try:
        return _imported(name, place)
    except ModelError as error:
        absent = getattr(error.__cause__, "name", None)
        if not isinstance(error.__cause__, ModuleNotFoundError) or not f"{place}.".startswith(f"{absent}."):
            raise  # something that the module itself imports
        raise ValueError(f"model {name!r}: there is no module {absent!r}; a file ends in .py") from error


# ---------------------------------------------------------------------------------------------------------------------
# Small things


@contextmanager
def _library(module: str, package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(f"needs {module}: pip install {package} ({error})") from error


@contextmanager
def _library_errors(library: str, name: str) -> Iterator[None]:
    """A library's own error, whichever of many kinds, as one that names what was given."""
    try:
        yield
    except Exception as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{library} can't load {name!r}: {message[:600]}") from error


def _check_folder(name: str, folder: str, needed: str) -> None:
    if not Path(folder).is_dir():
        raise ValueError(f"model {name!r}: there is no folder {folder}")
    if not (Path(folder) / needed).is_file():
        raise ValueError(f"model {name!r}: {folder} holds no {needed}")


def _part(model: nn.Module, belongs: Callable[[str], bool]) -> nn.Module:
    """The direct parts and tensors of a model whose names belong together, but for scale and bias of its logits."""
    part = nn.Module()
    for kind in ("_modules", "_parameters", "_buffers"):
        mine = {name: each for name, each in getattr(model, kind).items() if name not in _SCALES and belongs(name)}
        getattr(part, kind).update(mine)
    part.__dict__.update(
        {key: value for key, value in vars(model).items() if key not in PASSING_STATE and is_plain_value(value)}
    )
    return part
