"""Checkpoints from one library's layout to another's.

A conversion is believed only after it was loaded back and gave the same embeddings: by our own reader, and by the other
library where it is installed.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.files import refuse_foreign, remove, swap_in, write_text
from ..config import CLIPConfig
from ..data.wordings.kept import WORDINGS_FILE
from ..model import CLIP
from ..tokenizer import random_ids
from .folders import CONFIG_FILE, OPENCLIP_CONFIG_FILE, THRESHOLD_FILE
from .load import build
from .read import locate, read_checkpoint
from .write import FOLDER_FILES, WRITERS, require

FORMATS = tuple(WRITERS)


def convert(
    source: str | Path,
    out: str | Path,
    to: str,
    overwrite: bool = False,
    texts: Mapping[str, str] | None = None,
    replaceable: Collection[str] = (),
    **options: Any,
) -> str:
    """Writes a checkpoint in another layout, then loads it back and compares.

    threshold.json and wordings.json come along into a folder, where they still hold.

    Args:
        out: a file for "openai" (a state dict, which OpenAI's package loads), a folder for the others.
        to: one of `FORMATS`.
        texts: other files for the folder, such as a model card: names and contents.
        replaceable: files of `out` that may go beside those of a model, as a card that nobody has edited.
        options: `activation` and the like, as `read_checkpoint` takes them.

    Returns:
        What was compared with what, and how far they differ.

    Raises:
        ValueError: the other library has no such model, `out` exists or holds files that this did not write, or the
            result is not the same.
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
        names = (*FOLDER_FILES, THRESHOLD_FILE, WORDINGS_FILE, *replaceable)
        refuse_foreign(out, {out / name for name in names}, "`miniclip convert`")
    checkpoint = read_checkpoint(found_at, **options)
    require(to == "native" or checkpoint.config.towers == "both", f"it has the {checkpoint.config.towers} tower alone")
    taken = replace(checkpoint, tensors=dict(checkpoint.tensors))
    expected = _embeddings(build(taken, str(source)))
    # Under a temporary name until it is verified, so that nothing half-right ever has the name that was asked for.
    temporary = out.with_name(f".{out.stem}.{secrets.token_hex(8)}.tmp{out.suffix}")
    try:
        WRITERS[to](checkpoint, temporary)
        for name, content in (texts or {}).items():
            write_text(temporary / name, content)
        if temporary.is_dir() and (found_at / THRESHOLD_FILE).is_file():
            shutil.copyfile(found_at / THRESHOLD_FILE, temporary / THRESHOLD_FILE)
        if temporary.is_dir() and checkpoint.wordings is not None:
            write_text(temporary / WORDINGS_FILE, checkpoint.wordings.to_json())
        compared = {"miniclip": _embeddings(build(read_checkpoint(temporary), str(temporary)))}
        compared |= _embeddings_by_the_other(to, temporary, checkpoint.config)
        said = []
        for name, found in compared.items():
            differences = [_difference(a, b) for a, b in zip(found, expected, strict=True)]
            if not all(difference <= 1e-5 for difference in differences):  # a comparison with NaN is False, too
                raise ValueError(f"{name} gives other embeddings from the converted file, by {differences}")
            said.append(f"same embeddings by {name} (to {max(differences):.0e})")
        swap_in(temporary, out)
    finally:
        remove(temporary)
    return ", ".join(said)


def _probe(config: CLIPConfig) -> tuple[Tensor, Tensor]:
    """Two noise images and two texts that fit a model."""
    random = torch.Generator().manual_seed(0)
    R, L = config.vision.image_size, min(config.text.context_length, 12)
    tokens, end = random_ids(config.text, (2, L), random)
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
