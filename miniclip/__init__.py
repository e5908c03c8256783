"""miniclip: CLIP from scratch in PyTorch. Train small models on your own pairs, or classify with trained ones.

>>> import miniclip
>>> model, preprocess = miniclip.load("runs/digits/best")
>>> tokens = miniclip.tokenize(["a handwritten seven", "a handwritten one"])

Names are imported when first used, so that `miniclip --help` need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .common.version import __version__ as __version__
    from .config import CLIPConfig as CLIPConfig
    from .config import TextConfig as TextConfig
    from .config import VisionConfig as VisionConfig
    from .evaluation.zero_shot import zero_shot_classifier as zero_shot_classifier
    from .inference.classifier import ZeroShotClassifier as ZeroShotClassifier
    from .inference.embedding.embed import embed as embed
    from .inference.search.index import Index as Index
    from .inference.text_states import text_states as text_states
    from .loss import clip_loss as clip_loss
    from .loss import siglip_loss as siglip_loss
    from .model import CLIP as CLIP
    from .openclip import create_model_and_transforms as create_model_and_transforms
    from .openclip import get_tokenizer as get_tokenizer
    from .openclip import list_pretrained as list_pretrained
    from .tokenizer import tokenize as tokenize
    from .weights.load import from_pretrained as from_pretrained
    from .weights.load import load as load
    from .weights.load import save as save
    from .weights.read import available_models as available_models

_HOME = {
    "__version__": "common.version",
    "CLIP": "model",
    "CLIPConfig": "config",
    "TextConfig": "config",
    "VisionConfig": "config",
    "Index": "inference.search.index",
    "ZeroShotClassifier": "inference.classifier",
    "available_models": "weights.read",
    "clip_loss": "loss",
    "create_model_and_transforms": "openclip",
    "embed": "inference.embedding.embed",
    "from_pretrained": "weights.load",
    "get_tokenizer": "openclip",
    "list_pretrained": "openclip",
    "load": "weights.load",
    "save": "weights.load",
    "siglip_loss": "loss",
    "text_states": "inference.text_states",
    "tokenize": "tokenizer",
    "zero_shot_classifier": "evaluation.zero_shot",
}
__all__ = [name for name in _HOME if name != "ZeroShotClassifier"]  # `import *` needs no scikit-learn


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
