"""Any library's CLIP as evaluation sees it: the five things of a model, and what it can be recognised by.

Ours, open_clip's and transformers' models come with the preprocessing and the tokenizer that they were trained with;
anything else is an object with the same five things. `open_model` reads what a command line names:

| name                                               | what it is                                                |
|----------------------------------------------------|-----------------------------------------------------------|
| openclip:ViT-B-32/laion2b_s34b_b79k                | a model of open_clip's and one of its tags                |
| openclip:ViT-B-32/FILE                             | … and a file of weights; an absolute path has two slashes |
| openclip:hf-hub:owner/name, openclip:local-dir:DIR | a repository or folder with an open_clip_config.json      |
| transformers:owner/name, transformers:DIR          | a model with get_image_features, get_text_features        |
| python:FILE.py:FUNCTION, python:MODULE:FUNCTION    | what your own function returns; runs your code            |
| anything else                                      | whatever `miniclip.load` takes                            |

B batch, R resolution, L text tokens, E embedding, D width of an image tower.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from . import __version__, tokenizer, weights
from .device import find_device
from .fetch import HUB_PREFIX
from .model import CLIP, MissingTower, VisionTransformer
from .resnet import ModifiedResNet

OPENCLIP_PREFIX, TRANSFORMERS_PREFIX, PYTHON_PREFIX = "openclip:", "transformers:", "python:"
_FOLDER_PREFIX = "local-dir:"  # open_clip's own, beside the hub's
FIVE_THINGS = ("encode_image", "encode_text", "tokenize", "preprocess", "logit_scale")

# Texts are padded to the context length, and padding is attended to: so SigLIP's towers were trained.
_ATTENDS_TO_PADDING = ("siglip", "siglip2")
_SCALES = ("logit_scale", "logit_bias", "temperature")  # belong to neither tower
_HASHED_AT_ONCE = 1 << 24  # bytes

Preprocessor = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, eq=False)
class Model:
    """What evaluation knows of a model: five things, its name, and what it can be recognised by.

    Args:
        name: as reports call it.
        encode_image: (B, 3, R, R) on the CPU, as `preprocess` gives them, stacked -> (B, E) on the model's device.
        encode_text: what `tokenize` gives -> (B, E) on the model's device.
        tokenize: texts to whatever `encode_text` takes.
        preprocess: an image to (3, R, R); can be pickled, for worker processes.
        logit_scale: the stored logarithm, as OpenAI's. Its device is the model's.
        encode_pooled: as `encode_image`, features before the projection (B, D), where the library gives them.
        library: its name and version, for reports.
        image_module, text_module: hold the tensors that encode images, and those that encode texts.
        identity: what an object without such modules calls its state; see `from_object`.
    """

    name: str
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[Any], Tensor]
    tokenize: Callable[[list[str]], Any]
    preprocess: Preprocessor
    logit_scale: Tensor
    encode_pooled: Callable[[Tensor], Tensor] | None = None
    library: str = ""
    image_module: nn.Module | None = None
    text_module: nn.Module | None = None
    identity: str | None = None

    def image_fingerprint(self) -> str | None:
        """Equal for models that make the same features of the same picture: a digest of the image tower's tensors and
        architecture, of the library's version, and of what `preprocess` makes of a few pictures. Computed once.

        None if there is nothing to recognise the model by, or `preprocess` gives something else each time.
        """
        return self._image_fingerprint

    def text_fingerprint(self) -> str | None:
        """Likewise of the text tower, and of what `tokenize` makes of a few texts."""
        return self._text_fingerprint

    @cached_property
    def _image_fingerprint(self) -> str | None:
        return self._fingerprint(self.image_module, self.preprocess, _pictures())

    @cached_property
    def _text_fingerprint(self) -> str | None:
        return self._fingerprint(self.text_module, self.tokenize, [[text] for text in _TEXTS])

    def _fingerprint(
        self, module: nn.Module | None, function: Callable[[Any], Any], probes: Sequence[Any]
    ) -> str | None:
        if module is not None and next(_tensors(module), None) is not None:
            tower = digest_module(module)
        elif self.identity is not None:
            tower = self.identity
        else:
            return None
        seen = _probe(function, probes)
        return None if seen is None else _digest(self.library, tower, seen)


def open_model(name: str, device: str | torch.device | None = None) -> Model:
    """The model that a command line names, as in the table above.

    Args:
        device: where to; by default a GPU if there is one.

    Raises:
        ValueError: a library that is missing, a name that it does not know, weights that are not there or do not fit,
            or an object that lacks one of the five things.
    """
    openers = {OPENCLIP_PREFIX: _open_openclip, TRANSFORMERS_PREFIX: _open_transformers, PYTHON_PREFIX: _open_python}
    before, colon, after = name.partition(":")
    prefix = before + colon
    if prefix in openers:
        if after in ("", HUB_PREFIX, _FOLDER_PREFIX):
            raise ValueError(f"model {name!r} names nothing after {name.rpartition(':')[0]!r}")
        return openers[prefix](name, find_device(device))
    if colon and prefix != HUB_PREFIX and not Path(name).exists():
        near = difflib.get_close_matches(prefix, openers, n=1)
        if near:
            raise ValueError(f"model {name!r} begins with {prefix!r}; did you mean {near[0]!r}?")
    model, preprocess = weights.load(name, device)
    return from_clip(model, preprocess, name)


# ---------------------------------------------------------------------------------------------------------------------
# Ours


def from_clip(model: CLIP, preprocess: Preprocessor, name: str) -> Model:
    """A model of ours; it is put into evaluation mode.

    Longer texts than it can read are cut, and a warning says how many. A model that reads other token ids than CLIP's
    refuses texts.
    """
    model.eval()
    return Model(
        name=name,
        encode_image=torch.no_grad()(lambda images: model.encode_image(images.to(model.logit_scale.device))),
        encode_text=torch.no_grad()(model.encode_text),
        tokenize=_OurTokenize(model, name),
        preprocess=preprocess,
        logit_scale=model.logit_scale,
        encode_pooled=lambda images: pooled_features(model, images.to(model.logit_scale.device)),
        library=f"miniclip {__version__}",
        image_module=model.visual,
        text_module=model.text,
    )


class _OurTokenize:
    def __init__(self, model: CLIP, name: str) -> None:
        self.text, self.name = model.config.text, name

    def __call__(self, texts: list[str]) -> Tensor:
        tokenizer.refuse_other_ids(self.text, self.name, "CLIP's")
        length = self.text.context_length
        tokens = tokenizer.tokenize(texts, length, truncate=True)
        full = [text for text, last in zip(texts, tokens[:, -1].tolist(), strict=True) if last]
        cut = [text for text in full if len(tokenizer.encode(text)) + 2 > length]
        if cut:
            warnings.warn(
                f"{self.name} reads {length} tokens; {len(cut)} of {len(texts)} texts are longer and were cut, "
                f"the first: {cut[0][:200]!r}",
                stacklevel=2,
            )
        return tokens


@torch.no_grad()
def pooled_features(model: CLIP, images: Tensor) -> Tensor:
    """What the image tower gives before it is projected to the space of texts, as the paper's probes take it
    (appendix A.3): normalised images (B, 3, R, R) -> (B, D).

    Of a vision transformer the normed class token, of timm's models what their pooling gives. CLIP's ResNet has no
    projection but the last layer of its attention pool, so its features are those of `encode_image`, also in the paper.

    Raises:
        ValueError: as `encode_image`.
    """
    model.check_images(images)
    tower, images = model.visual, images.to(model.dtype)
    if isinstance(tower, VisionTransformer):
        return tower(images, all_tokens=True)[:, 0]
    if isinstance(tower, ModifiedResNet | MissingTower):
        return tower(images)
    return tower.trunk.forward_head(tower.trunk.forward_features(images), pre_logits=True)


# ---------------------------------------------------------------------------------------------------------------------
# open_clip's


def from_openclip(model: Any, preprocess: Preprocessor, tokenize: Callable[[list[str]], Tensor], name: str) -> Model:
    """A model of open_clip's (CLIP, CustomTextCLIP, CoCa), which is put into evaluation mode.

    Args:
        preprocess: the one for validation.
        tokenize: what `open_clip.get_tokenizer` gives; it cuts long texts in silence.
    """
    import open_clip

    model.eval()

    def images_on_device(images: Tensor) -> Tensor:
        parameter = next(model.visual.parameters())
        return images.to(parameter.device, parameter.dtype)

    def encode_pooled(images: Tensor) -> Tensor:
        features = pooled(images_on_device(images))
        return features[0] if isinstance(features, tuple) else features  # CoCa's tower gives all tokens, too

    pooled = _without_projection(model.visual)
    # CLIP has the parts of its text tower beside `visual`, CustomTextCLIP and CoCa a tower in `text`. CoCa's decoder
    # writes captions and encodes nothing.
    text_module = model.text if hasattr(model, "text") else _part(model, lambda part: part != "visual")
    return Model(
        name=name,
        encode_image=torch.no_grad()(lambda images: model.encode_image(images_on_device(images))),
        encode_text=torch.no_grad()(lambda tokens: model.encode_text(tokens.to(model.logit_scale.device))),
        tokenize=tokenize,
        preprocess=preprocess,
        logit_scale=_scalar(model.logit_scale),
        encode_pooled=torch.no_grad()(encode_pooled) if pooled is not None else None,
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
        return bare
    return None


def _open_openclip(name: str, device: torch.device) -> Model:
    with _library("open_clip", "open_clip_torch"):
        import open_clip
    architecture, pretrained = name.removeprefix(OPENCLIP_PREFIX), None
    options = {}
    if architecture.startswith(_FOLDER_PREFIX):
        _check_folder(name, architecture.removeprefix(_FOLDER_PREFIX), "open_clip_config.json")
    elif not architecture.startswith(HUB_PREFIX):
        architecture, _, pretrained = architecture.partition("/")
        options = _openclip_weights(name, architecture, pretrained)
    with _told("open_clip", name), warnings.catch_warnings():
        if options:  # the activation is the tag's
            warnings.filterwarnings("ignore", "QuickGELU mismatch")
        model, preprocess = open_clip.create_model_from_pretrained(architecture, pretrained, device=device, **options)
        tokenize = open_clip.get_tokenizer(architecture)
    return from_openclip(model, preprocess, tokenize, name)


def _openclip_weights(name: str, architecture: str, pretrained: str) -> dict[str, bool]:
    """What open_clip must be told beside the names of a model and its weights.

    A tag may know whether its weights were trained with QuickGELU. open_clip goes by the architecture's name, so that
    OpenAI's weights in "ViT-B-32" lose points for nothing but a warning; here the tag decides.
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
    tag = open_clip.pretrained.get_pretrained_cfg(architecture, pretrained)
    if not tag and not Path(pretrained).is_file():
        near = difflib.get_close_matches(pretrained, tags, n=1)
        raise ValueError(
            f"model {name!r}: {pretrained!r} is no file, and none of open_clip's tags for {architecture}: "
            f"{', '.join(tags) or 'there are none'}" + (f"; did you mean {near[0]}?" if near else "")
        )
    quick_gelu = tag.get("quick_gelu")
    if quick_gelu in (None, open_clip.get_model_config(architecture).get("quick_gelu", False)):
        return {}
    activation = "QuickGELU" if quick_gelu else "GELU"
    warnings.warn(f"{name}: these weights were trained with {activation}, so {activation} is used", stacklevel=4)
    return {"quick_gelu": quick_gelu}


# ---------------------------------------------------------------------------------------------------------------------
# transformers'


def from_transformers(model: Any, processor: Any, name: str) -> Model:
    """A model of transformers' that has get_image_features and get_text_features; it is put into evaluation mode.

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
    model.eval()

    def encode_image(images: Tensor) -> Tensor:
        return _features(model.get_image_features(**_image_inputs(images.to(model.device), model.dtype)), name)

    def encode_text(tokens: Any) -> Tensor:
        return _features(model.get_text_features(**tokens.to(model.device)), name)

    def encode_pooled(images: Tensor) -> Tensor:
        return _features(model.vision_model(**_image_inputs(images.to(model.device), model.dtype)), name)

    return Model(
        name=name,
        encode_image=torch.no_grad()(encode_image),
        encode_text=torch.no_grad()(encode_text),
        tokenize=tokenize,
        preprocess=_HuggingFacePreprocess(processor.image_processor),
        logit_scale=_logit_scale(model, name),
        encode_pooled=torch.no_grad()(encode_pooled) if hasattr(model, "vision_model") else None,
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
        self.options |= {"truncation": True, "max_length": min(lengths)}

    def __call__(self, texts: list[str]) -> Any:
        found = self.tokenizer(texts, return_tensors="pt", **self.options)
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
        return _scalar(model.logit_scale)
    if isinstance(getattr(model, "temperature", None), Tensor):  # ALIGN divides by it
        return -_scalar(model.temperature).detach().log()
    raise ValueError(f"{name} is a {type(model).__name__} and has no logit_scale; a CLIP-like one has")


def _open_transformers(name: str, device: torch.device) -> Model:
    with _library("transformers", "transformers"):
        from transformers import AutoModel, AutoProcessor
    where = name.removeprefix(TRANSFORMERS_PREFIX)
    folder = Path(where).expanduser()
    if folder.is_dir():
        where = str(folder)
    if folder.is_dir() or where.count("/") != 1 or where.startswith(("/", ".", "~")):
        _check_folder(name, where, "config.json")
    with _told("transformers", name):
        # Whatever the file's precision, the same on every device; and never code from the repository.
        model, loaded = AutoModel.from_pretrained(
            where, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
        processor = AutoProcessor.from_pretrained(where, trust_remote_code=False)
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ValueError(f"the weights of {name} lack {', '.join(missing[:5])}: they would be random")
    return from_transformers(model.to(device), processor, name)


# ---------------------------------------------------------------------------------------------------------------------
# Anything else


def from_object(obj: Any, name: str) -> Model:
    """Any object with the five things: encode_image, encode_text, tokenize, preprocess, logit_scale.

    A module of torch's is put into evaluation mode. Images, and tokens that are tensors, come to its functions on the
    device of its `logit_scale`, which may also be a number. Features may be NumPy's. Its code can't be recognised, so
    neither can the object, unless it has a `fingerprint`: a text that changes whenever what it makes of images or texts
    does.

    Raises:
        ValueError: one of the five is missing or of no use; it is named.
    """
    missing = [attribute for attribute in FIVE_THINGS if getattr(obj, attribute, None) is None]
    if missing:
        raise ValueError(f"{name} is a {type(obj).__name__} without {', '.join(missing)}; needed are {_listed()}")
    for attribute in FIVE_THINGS[:-1]:
        if not callable(getattr(obj, attribute)):
            raise ValueError(f"{attribute} of {name} is {getattr(obj, attribute)!r}; it must be a function")
    try:
        scale = _scalar(torch.as_tensor(obj.logit_scale))
        float(scale)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"logit_scale of {name} is {obj.logit_scale!r}; it must be one number, a logarithm") from error
    identity = getattr(obj, "fingerprint", None)
    if identity is not None and not isinstance(identity, str):
        raise ValueError(f"fingerprint of {name} is {identity!r}; it must be a text")
    pooled = getattr(obj, "encode_pooled", None)
    if isinstance(obj, nn.Module):
        obj.eval()

    def checked(encode: Callable[[Any], Any], what: str) -> Callable[[Any], Tensor]:
        @torch.no_grad()
        def encode_on_device(batch: Any) -> Tensor:
            features = encode(batch.to(scale.device) if isinstance(batch, Tensor) else batch)
            if isinstance(features, np.ndarray):
                features = torch.from_numpy(features)
            if not isinstance(features, Tensor) or features.ndim != 2:
                shape = f" of shape {tuple(features.shape)}" if isinstance(features, Tensor) else ""
                raise ValueError(f"{what} of {name} gives a {type(features).__name__}{shape}; (B, E) is needed")
            return features.to(scale.device)

        return encode_on_device

    return Model(
        name=name,
        encode_image=checked(obj.encode_image, "encode_image"),
        encode_text=checked(obj.encode_text, "encode_text"),
        tokenize=obj.tokenize,
        preprocess=obj.preprocess,
        logit_scale=scale,
        encode_pooled=checked(pooled, "encode_pooled") if pooled is not None else None,
        library=str(getattr(obj, "library", "")),
        identity=identity,
    )


def _open_python(name: str, device: torch.device) -> Model:
    place, _, attribute = name.removeprefix(PYTHON_PREFIX).rpartition(":")
    if not place or not attribute:
        raise ValueError(f"model {name!r} is not python:FILE.py:FUNCTION or python:MODULE:FUNCTION")
    module = _import_file(name, Path(place).expanduser()) if place.endswith(".py") else _import_module(name, place)
    function = getattr(module, attribute, None)
    if not callable(function):
        near = difflib.get_close_matches(attribute, dir(module), n=1)
        what = "has no" if function is None else f"has {function!r}, which is no function, as"
        raise ValueError(f"model {name!r}: {place} {what} {attribute}" + (f"; did you mean {near[0]}?" if near else ""))
    takes_device = "device" in inspect.signature(function).parameters
    return from_object(function(device=device) if takes_device else function(), name)


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
    return importlib.import_module(stem)


def _import_module(name: str, place: str) -> Any:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # where `python -m` looks, and an installed command does not
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise ValueError(f"model {name!r}: there is no module {error.name!r}; a file ends in .py") from error


# ---------------------------------------------------------------------------------------------------------------------
# Small things


@contextmanager
def _library(module: str, package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ValueError(f"needs {module}: pip install {package} ({error})") from error


@contextmanager
def _told(library: str, name: str) -> Iterator[None]:
    """A library's own error, whichever of many kinds, as one that names what was given."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{library} can't load {name!r}: {said[:600]}") from error


def _check_folder(name: str, folder: str, needed: str) -> None:
    if not Path(folder).is_dir():
        raise ValueError(f"model {name!r}: there is no folder {folder}")
    if not (Path(folder) / needed).is_file():
        raise ValueError(f"model {name!r}: {folder} holds no {needed}")


def _scalar(scale: Tensor) -> Tensor:
    return scale if scale.ndim == 0 else scale.reshape(())  # some are kept as one number in a list


def _listed() -> str:
    return f"{', '.join(FIVE_THINGS[:-1])} and {FIVE_THINGS[-1]}"


# ---------------------------------------------------------------------------------------------------------------------
# What a model is recognised by

# Short, long but within every context of 64, capitals, digits, entities, accents, other scripts, a picture.
_TEXTS = (
    "a",
    "a photo of a cat.",
    "A PHOTO of a Ford-T &amp; its driver's hat, 1908",
    "  two   spaces,\ttabs\nand &lt;lines&gt;  ",
    "crème brûlée, Straße, naïve café — “quoted”…",
    "写真の猫 фото кота صورة قطة",
    "an owl 🦉 at night",
    "a low resolution photo of the large brown dog that runs along the beach while three children in red coats look "
    "on from a small wooden boat and the sun goes down behind them",
    "",
)


def _pictures() -> list[Image.Image]:
    """Wide, tall, small, grey, with transparency, with a palette; the same everywhere and for ever."""

    def pattern(width: int, height: int, channels: int) -> np.ndarray:
        y, x, c = np.ogrid[:height, :width, :channels]
        return ((x * (5 + 2 * c) + y * (3 + 4 * c) + x * y // (7 + c)) % 256).astype(np.uint8)

    palette = Image.fromarray(pattern(66, 48, 1)[:, :, 0], "P")
    palette.putpalette(bytes((value * factor) % 256 for value in range(256) for factor in (1, 3, 7)))
    return [
        Image.fromarray(pattern(300, 90, 3)),
        Image.fromarray(pattern(70, 231, 3)),
        Image.fromarray(pattern(7, 5, 3)),
        Image.fromarray(pattern(64, 48, 1)[:, :, 0]),
        Image.fromarray(pattern(61, 53, 4)),
        palette,
    ]


def _probe(function: Callable[[Any], Any], probes: Sequence[Any]) -> str | None:
    """A digest of what `function` makes of each probe; None if that is not the same twice, or nothing of which bytes
    can be taken. What it refuses, it refuses alike each time."""
    digests = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            parts = []
            for probe in probes:
                try:
                    parts.append(_value(function(probe)))
                except Exception as error:
                    parts.append(type(error).__name__)
            digests.append(None if None in parts else _digest(*map(str, parts)))
    return digests[0] if digests[0] == digests[1] else None


def _value(value: Any) -> str | None:
    """A text that tells a value from others: tensors, arrays, numbers, texts, and mappings and sequences of them."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor):
        return _digest(str(value.dtype), str(tuple(value.shape)), hashlib.blake2b(_bytes(value)).hexdigest())
    if isinstance(value, str | int | float | bool | None):
        return repr(value)
    if isinstance(value, Mapping):
        value = [item for key in sorted(value, key=str) for item in (str(key), value[key])]
    if isinstance(value, list | tuple):
        parts = [_value(item) for item in value]
        return None if None in parts else _digest(type(value).__name__, *map(str, parts))
    return None


def digest_module(module: nn.Module) -> str:
    """Of what a module computes: its tensors (names, shapes, types, bytes), and of its parts the classes and whatever
    numbers, words and configurations they keep (heads, strides, the kind of pooling), which no tensor tells."""
    tensors = [(name, tensor, part) for name, tensor in _tensors(module) for part in _pieces(tensor)]
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing a large buffer lets other threads run
        digests = list(threads.map(lambda item: hashlib.blake2b(_bytes(item[2]), digest_size=32).hexdigest(), tensors))
    named = [
        f"{name} {tuple(tensor.shape)} {tensor.dtype} {digest}"
        for (name, tensor, _), digest in zip(tensors, digests, strict=True)
    ]
    return _digest(*named, *_architecture(module))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers too, also those that no checkpoint holds, such as masks and positions."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.detach().reshape(-1).split(max(1, _HASHED_AT_ONCE // tensor.element_size()))


def _bytes(tensor: Tensor) -> Any:  # a buffer
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _architecture(module: nn.Module) -> Iterator[str]:
    for name, part in module.named_modules(remove_duplicate=False):
        kept = {key: value for key, value in sorted(vars(part).items()) if key not in _PASSING and key[0] != "_"}
        plain = {key: value for key, value in kept.items() if _is_plain(value)}
        yield f"{name} {type(part).__module__}.{type(part).__qualname__} {plain}"
        if hasattr(part, "config") and hasattr(part.config, "to_dict"):  # transformers' parts also act by it
            config = {key: value for key, value in part.config.to_dict().items() if key not in _PASSING}
            yield json.dumps(config, sort_keys=True, default=str)


# Where a model came from, and what it is doing, do not change what it computes.
_PASSING = {
    "training",
    "name_or_path",
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _part(model: nn.Module, belongs: Callable[[str], bool]) -> nn.Module:
    """The direct parts and tensors of a model whose names belong together, but for scale and bias of its logits."""
    part = nn.Module()
    for kind in ("_modules", "_parameters", "_buffers"):
        mine = {name: each for name, each in getattr(model, kind).items() if name not in _SCALES and belongs(name)}
        getattr(part, kind).update(mine)
    part.__dict__.update({key: value for key, value in vars(model).items() if key not in _PASSING and _is_plain(value)})
    return part


def _digest(*parts: str) -> str:
    """Of texts, told apart by their lengths."""
    whole = hashlib.blake2b(digest_size=32)
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        whole.update(len(encoded).to_bytes(8, "big") + encoded)
    return whole.hexdigest()
