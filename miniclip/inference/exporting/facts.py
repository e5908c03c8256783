"""What a runner has to know beside the towers: export.json, and the files of Hugging Face's libraries."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.files import write_text
from ...common.version import __version__
from ...config import CLIPConfig
from ...evaluation.prompts import Prompts, class_prompts
from ...images import Preprocess
from ...model import CLIP
from ...tokenizer import END_OF_TEXT, VOCAB_SIZE
from ...weights.hf_pixels import settings_of
from ...weights.write import vocabulary_files
from .cleaning import cleaning_tables
from .tokenizer_file import tokenizer_json

FACTS_FILE = "export.json"
_BESIDE = ("config.json", "preprocessor_config.json", "tokenizer.json", "cleaning.json", "tokenizer_config.json")
FACTS_FILES = (FACTS_FILE, *_BESIDE)  # what `write_facts` writes


@dataclass(frozen=True)
class Classes:
    """Classes that an export knows by itself.

    Args:
        classnames, templates: as those of `LabelledImages`.
        threshold: the cosine below which a picture is none of them; None for no such limit.
        upright: it was calibrated with pictures that were turned as EXIF says.
    """

    classnames: Sequence[str] = ()
    templates: Prompts = ()
    threshold: float | None = None
    upright: bool = False


def export_facts(
    clip: CLIP, preprocess: Preprocess, name: str, files: Mapping[str, str], precision: str, classes: Classes
) -> dict[str, Any]:
    """The contents of export.json.

    Args:
        name: the model's.
        files: the file of each tower, relative to the folder.
    """
    p, text = preprocess, clip.config.text
    templates: Any = classes.templates
    if not isinstance(templates, Mapping) and not all(isinstance(each, str) for each in templates):
        templates = {each: class_prompts(templates, each) for each in classes.classnames}
    return {
        "model": name,
        "miniclip": __version__,
        "precision": precision,
        "files": dict(files),
        "embed_dim": clip.config.embed_dim,
        "logit_scale": math.exp(clip.logit_scale.item()),
        "logit_bias": None if clip.logit_bias is None else clip.logit_bias.item(),
        "pixels": {
            "size": p.image_size,
            "mean": p.mean,
            "std": p.std,
            "style": p.style,
            "resize": p.resize,
            "resize_size": p.resize_size,
            "interpolation": p.interpolation,
            "most_pixels": p.MOST_PIXELS,
        },
        "text": {"context_length": text.context_length} if has_own_ids(clip.config) else None,
        "classnames": list(classes.classnames),
        "templates": dict(templates) if isinstance(templates, Mapping) else list(templates),
        "threshold": classes.threshold,
        "upright": classes.upright,
    }


def has_own_ids(config: CLIPConfig) -> bool:
    """Whether there is a text tower, and it reads the ids of CLIP's tokenizer."""
    return config.towers != "image" and (config.text.vocab_size, config.text.eot_token) == (VOCAB_SIZE, END_OF_TEXT)


def write_facts(folder: Path, facts: Mapping[str, Any], config: CLIPConfig) -> None:
    """export.json, the tokenizer, and the settings that transformers.js looks for."""
    _write_json(folder / FACTS_FILE, facts)
    kind = {"float32": "fp32", "float16": "fp16", "int8": "q8"}.get(facts["precision"], "fp32")
    projection = {"projection_dim": config.embed_dim}
    settings = {"model_type": "clip", **projection, "transformers.js_config": {"dtype": kind}}
    _write_json(folder / "config.json", settings)
    _write_json(folder / "preprocessor_config.json", settings_of(config.vision))
    if facts["text"]:
        _write_json(folder / "tokenizer.json", tokenizer_json(config.text.context_length))
        _write_json(folder / "cleaning.json", cleaning_tables())
        own = vocabulary_files(config.text.context_length)
        write_text(folder / "tokenizer_config.json", own["tokenizer_config.json"])


def _write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=1 if len(str(values)) < 100_000 else None, ensure_ascii=False) + "\n")
