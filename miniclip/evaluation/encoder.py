"""Any library's CLIP as evaluation sees it: five things, and what the model can be recognised by.

Ours, open_clip's and transformers' models come with the preprocessing and the tokenizer that they were trained with;
anything else is an object with the same five things. `open_model` reads what a command line names:

| name                                               | what it is                                                |
|----------------------------------------------------|-----------------------------------------------------------|
| openclip:ViT-B-32/laion2b_s34b_b79k                | a model of open_clip's and one of its tags                |
| openclip:ViT-B-32/FILE                             | … and a file of weights; an absolute path has two slashes |
| openclip:hf-hub:owner/name, openclip:local-dir:DIR | a repository or folder with an open_clip_config.json      |
| transformers:owner/name, transformers:DIR          | a model with get_image_features, get_text_features        |
| python:FILE.py:FUNCTION, python:MODULE:FUNCTION    | what your own function returns; runs your code            |
| anything else                                      | a name or path that `miniclip.load` takes                 |

B batch, R resolution, L text tokens, E embedding, D width of an image tower.
"""

from __future__ import annotations

import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .. import tokenizer
from ..common.arguments import BF16, FLOAT32
from ..common.modules import evaluating, evaluation_mode
from ..common.version import __version__
from ..common.wording import cut_short
from ..config import check_logit_scale
from ..data.wordings.kept import Wordings
from ..fast import bfloat16
from ..model import CLIP, MissingTower, TextTransformer, VisionTransformer
from ..resnet import ModifiedResNet
from .fingerprints import PROBE_TEXTS, digest_arrays, digest_module, probe_outputs, probe_pictures, tensors_of

FIVE_THINGS = ("encode_image", "encode_text", "tokenize", "preprocess", "logit_scale")

Preprocessor = Callable[[Image.Image], Tensor]


@dataclass(frozen=True, eq=False)
class Encoder:
    """A model of any library: five things, its name, and what it can be recognised by.

    Args:
        name: as reports call it.
        encode_image: (B, 3, R, R) on the CPU, as `preprocess` gives them, stacked -> (B, E) on the model's device.
            Pinned memory is not to be written to before the features are there.
        encode_text: what `tokenize` gives -> (B, E) on the model's device.
        tokenize: texts to what `encode_text` takes.
        preprocess: an image to (3, R, R); can be pickled, for worker processes.
        logit_scale: the stored logarithm, as OpenAI's. Its device is the model's.
        encode_pooled: as `encode_image`, features before the projection (B, D), where the library gives them.
        library: its name and version, and the precision if that is not float32; for reports.
        image_module, text_module: hold the tensors that encode images, and those that encode texts.
        identity: what an object without such modules calls its state; see `from_object`.
        wordings: of the captions that it was trained on, if they are known.
        precision: of its products, "float32" or "bf16"; features of two precisions are not the same.
        digests: of the image and the text tower as they were in float32, where they are not any more.
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
    wordings: Wordings | None = None
    precision: str = FLOAT32
    digests: tuple[str | None, str | None] = (None, None)

    def image_fingerprint(self) -> str | None:
        """Equal for models that make the same features of the same picture: a digest of the image tower's tensors and
        architecture, of the library's version and precision, and of what `preprocess` makes of a few pictures. Computed
        once.

        None if there is nothing to recognise the model by, or `preprocess` gives something else each time.
        """
        return self._image_fingerprint

    def text_fingerprint(self) -> str | None:
        """Likewise of the text tower, and of what `tokenize` makes of a few texts."""
        return self._text_fingerprint

    @cached_property
    def _image_fingerprint(self) -> str | None:
        return self._fingerprint(self.image_digest(), self.preprocess, probe_pictures())

    @cached_property
    def _text_fingerprint(self) -> str | None:
        return self._fingerprint(self.text_digest(), self.tokenize, [[text] for text in PROBE_TEXTS])

    def image_digest(self) -> str | None:
        return self.digests[0] or self._digest(self.image_module)

    def text_digest(self) -> str | None:
        return self.digests[1] or self._digest(self.text_module)

    def _digest(self, module: nn.Module | None) -> str | None:
        if module is not None and next(tensors_of(module), None) is not None:
            return digest_module(module)
        return self.identity

    def _fingerprint(self, tower: str | None, function: Callable[[Any], Any], probes: Sequence[Any]) -> str | None:
        seen = None if tower is None else probe_outputs(function, probes)
        return None if tower is None or seen is None else digest_arrays(self.library, tower, seen)


def in_bf16(encoder: Encoder) -> Encoder:
    """The same model, whose towers multiply in bfloat16 from now on; features are float32 still.

    This package's own towers are replaced layer by layer (`fast/bfloat16.py`). All others, timm's among them, run under
    PyTorch's autocast, which converts their weights at each call.

    The model that `encoder` was made from is changed with it, and neither is to be used otherwise from then on.

    Raises:
        ValueError: the model is in neither the CPU's memory nor a GPU's that has bfloat16.
    """
    if encoder.precision == BF16:
        return encoder
    device = encoder.logit_scale.device
    if device.type != "cpu" and not _multiplies_bfloat16(device):
        raise ValueError(f"precision bf16 is for CPUs and for GPUs of CUDA that have it; {device} has not: use cpu")
    if device.type == "cpu" and not bfloat16.is_fast():
        warnings.warn(
            "this CPU has neither AVX512-BF16 nor AMX, so bf16 is no faster here than float32, and less exact (towers "
            "of timm's and other libraries', without AVX-512, tens of times slower)",
            stacklevel=3,
        )
    digests = encoder.image_digest(), encoder.text_digest()
    image, text = _lowered(encoder.image_module), _lowered(encoder.text_module)
    pooled = encoder.encode_pooled
    return replace(
        encoder,
        encode_image=_Wide(encoder.encode_image, device.type, not image),
        encode_text=_Wide(encoder.encode_text, device.type, not text),
        encode_pooled=None if pooled is None else _Wide(pooled, device.type, not image),
        library=f"{encoder.library or encoder.name}, {BF16}",
        precision=BF16,
        digests=digests,
    )


def _lowered(tower: nn.Module | None) -> bool:
    """Whether the tower is this package's own, whose layers are replaced then."""
    if not isinstance(tower, VisionTransformer | ModifiedResNet | TextTransformer):
        return False
    bfloat16.lower(tower)
    return True


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


@dataclass(frozen=True)
class _Wide:
    """A function whose features become float32, under autocast or not."""

    function: Callable[[Any], Any]
    device: str
    is_autocast: bool

    def __call__(self, argument: Any) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.is_autocast):
            return torch.as_tensor(self.function(argument)).float()


# ---------------------------------------------------------------------------------------------------------------------
# Ours


def moved(images: Tensor, to: Tensor) -> Tensor:
    """The images on the device of `to`; a GPU of CUDA copies from pinned memory while the host goes on."""
    return images.to(to.device, non_blocking=to.device.type == "cuda")


def from_clip(model: CLIP, preprocess: Preprocessor, name: str) -> Encoder:
    """One of miniclip's models, which encodes in evaluation mode and then has its own mode again.

    Longer texts than it can read are cut, and a warning says how many. A model that reads other token ids than CLIP's
    refuses texts.
    """

    def encode_image(images: Tensor) -> Tensor:
        return model.encode_image(moved(images, model.logit_scale))

    def encode_pooled(images: Tensor) -> Tensor:
        return pooled_features(model, moved(images, model.logit_scale))

    return Encoder(
        name=name,
        encode_image=torch.no_grad()(evaluating(model, encode_image)),
        encode_text=torch.no_grad()(evaluating(model, model.encode_text)),
        tokenize=_OurTokenize(model, name),
        preprocess=preprocess,
        logit_scale=model.logit_scale,
        encode_pooled=evaluating(model, encode_pooled),
        library=f"miniclip {__version__}",
        image_module=model.visual,
        text_module=model.text,
        wordings=model.wordings,
    )


_CUT: ContextVar[dict[str, str] | None] = ContextVar("cut", default=None)  # what `collecting_cut` collects


@contextmanager
def collecting_cut() -> Iterator[dict[str, str]]:
    """The texts that `report_cut` is told of within it, in this thread, each with what cut it; there is no warning.
    It is for what gives a model its texts in parts, and reports all of them at its end."""
    cut: dict[str, str] = {}
    around = _CUT.set(cut)
    try:
        yield cut
    finally:
        _CUT.reset(around)


def report_cut(longer: Sequence[str], num_texts: int, why: Mapping[str, str]) -> None:
    """A warning that says how many texts are longer than a model reads, and which is the first.

    Args:
        longer: those that are, in the order of whoever gave them.
        num_texts: these and the others.
        why: what cut each, "NAME reads N tokens".
    """
    if not longer:
        return
    if (collected := _CUT.get()) is not None:
        collected |= {text: why[text] for text in longer}
        return
    first = longer[0]
    warnings.warn(
        f"{why[first]}; {len(longer):,} of {num_texts:,} texts are longer and were cut, the first: {first[:200]!r}",
        stacklevel=3,
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
        report_cut(cut, len(texts), dict.fromkeys(cut, f"{self.name} reads {length} tokens"))
        return tokens


@torch.no_grad()
def pooled_features(model: CLIP, images: Tensor) -> Tensor:
    """Image features before the projection to the space of texts, as the paper's probes use them (appendix A.3):
    normalised images (B, 3, R, R) -> (B, D).

    A vision transformer gives the normed class token, timm's models their pooled features. CLIP's ResNet has no
    projection but the last layer of its attention pool, so its features are those of `encode_image`, as in the paper.

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
# Anything else


class ModelError(ValueError):
    """Code of a user's own model raised something; the message names both, and the cause has the traceback."""


@contextmanager
def errors_named(what: str, kinds: tuple[type[BaseException], ...] = (Exception,)) -> Iterator[None]:
    """What a user's code raises, of some kinds, as a ModelError: "encode_image of NAME raised …"."""
    try:
        yield
    except ModelError:
        raise
    except kinds as error:
        kind, message = type(error).__name__, cut_short(" ".join(str(error).split()), 300)
        raise ModelError(f"{what} raised {kind}{': ' if message else ''}{message}{_raised_at(error)}") from error


def _raised_at(error: BaseException) -> str:
    """The file and line of a user's code that an error came from."""
    libraries = [sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")]
    others = (*libraries, str(Path(__file__).parents[1]), "<")
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(others)]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


class _Named:
    """A function of a user's model whose errors name the model; can be pickled as far as the function can."""

    def __init__(self, function: Callable[[Any], Any], what: str) -> None:
        self.function, self.what = function, what

    def __call__(self, argument: Any) -> Any:
        with errors_named(self.what):
            return self.function(argument)


class _NamedPreprocess(_Named):
    def __call__(self, argument: Image.Image) -> Tensor:
        pixels = super().__call__(argument)
        if not isinstance(pixels, Tensor) or pixels.ndim == 0:
            raise ModelError(f"{self.what} gives a {type(pixels).__name__}; a tensor (3, R, R) is needed")
        return pixels


def from_object(obj: Any, name: str) -> Encoder:
    """Any object with the five things: encode_image, encode_text, tokenize, preprocess, logit_scale.

    A module of torch's encodes in evaluation mode and then has its own mode again. Images, and tokens that are tensors,
    come to its functions on the device of its `logit_scale`, which may also be a number. Features may be NumPy's. Its
    code can't be recognised, so neither can the object, unless it has a `fingerprint`: a text that changes whenever
    what it makes of images or texts does.

    Raises:
        ValueError: one of the five is missing or of no use; it is named. What its functions raise later is a
            `ModelError`.
    """
    missing = [attribute for attribute in FIVE_THINGS if getattr(obj, attribute, None) is None]
    if missing:
        raise ValueError(f"{name} is a {type(obj).__name__} without {', '.join(missing)}; needed are {_listed()}")
    for attribute in FIVE_THINGS[:-1]:
        if not callable(getattr(obj, attribute)):
            raise ValueError(f"{attribute} of {name} is {getattr(obj, attribute)!r}; it must be a function")
    try:
        scale = as_number(torch.as_tensor(obj.logit_scale)).detach()
        float(scale)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"logit_scale of {name} is {obj.logit_scale!r}; it must be one number, a logarithm") from error
    check_logit_scale(f"logit_scale of {name}", float(scale))
    identity = getattr(obj, "fingerprint", None)
    if identity is not None and not isinstance(identity, str):
        raise ValueError(f"fingerprint of {name} is {identity!r}; it must be a text")
    pooled = getattr(obj, "encode_pooled", None)

    def checked(function: Callable[[Any], Any], what: str) -> Callable[[Any], Tensor]:
        encode = _Named(function, f"{what} of {name}")

        @torch.no_grad()
        def encode_on_device(batch: Any) -> Tensor:
            with evaluation_mode(obj):
                features = encode(batch.to(scale.device) if isinstance(batch, Tensor) else batch)
            if isinstance(features, np.ndarray):
                features = torch.from_numpy(features)
            if not isinstance(features, Tensor) or features.ndim != 2:
                shape = f" of shape {tuple(features.shape)}" if isinstance(features, Tensor) else ""
                raise ValueError(f"{what} of {name} gives a {type(features).__name__}{shape}; (B, E) is needed")
            return features.to(scale.device)

        return encode_on_device

    return Encoder(
        name=name,
        encode_image=checked(obj.encode_image, "encode_image"),
        encode_text=checked(obj.encode_text, "encode_text"),
        tokenize=_Named(obj.tokenize, f"tokenize of {name}"),
        preprocess=_NamedPreprocess(obj.preprocess, f"preprocess of {name}"),
        logit_scale=scale,
        encode_pooled=checked(pooled, "encode_pooled") if pooled is not None else None,
        library=str(getattr(obj, "library", "")),
        identity=identity,
    )


def as_number(scale: Tensor) -> Tensor:
    return scale if scale.ndim == 0 else scale.reshape(())  # some are kept as one number in a list


def _listed() -> str:
    return f"{', '.join(FIVE_THINGS[:-1])} and {FIVE_THINGS[-1]}"
