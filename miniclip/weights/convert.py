"""Checkpoints from one library's layout to another's.

A conversion is believed only after it was loaded back and gave the same embeddings: by our own reader, and by the other
library where it is installed. Pictures go through each side's own preprocessing, which is another where the layout has
no place for the model's: that is a warning, with how far their embeddings then differ.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..common.files import refuse_foreign, stand_in, swap_in, write_text
from ..config import CLIPConfig
from ..data.wordings.kept import WORDINGS_FILE
from ..images import Preprocess
from ..model import CLIP
from .computation import embeddings, probe, relative_difference
from .folders import CONFIG_FILE, OPENCLIP_CONFIG_FILE, THRESHOLD_FILE
from .load import build, preprocess_for
from .read import locate, read_checkpoint
from .write import FOLDER_FILES, WRITERS, pixel_changes, require

FORMATS = tuple(WRITERS)
_MOST_APART = 1e-5  # of the largest feature


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

    wordings.json comes along into a folder, and threshold.json where pictures still become the same pixels.

    Args:
        out: a file for "openai" (a state dict, which OpenAI's package loads), a folder for the others.
        to: one of `FORMATS`.
        texts: other files for the folder, such as a model card: names and contents.
        replaceable: files of `out` that may go beside those of a model, as a card that nobody has edited.
        options: `activation` and the like, as `read_checkpoint` takes them.

    Returns:
        What was compared with what, and how far they differ; of pictures that become other pixels, their cosines.

    Raises:
        ValueError: the other library has no such model, `out` exists, holds files that this did not write or is being
            written by another process, or the result is not the same.
        OSError: `out` can't be written.
    """
    out = Path(out)
    if to not in FORMATS:
        raise ValueError(f"there is no format {to!r}; valid are {', '.join(FORMATS)}")
    _refuse_existing(out, overwrite)  # before anything is fetched
    found_at = locate(source)
    _refuse_more_than_a_model(out, found_at, replaceable)
    checkpoint = read_checkpoint(found_at, **options)
    require(to == "native" or checkpoint.config.towers == "both", f"it has the {checkpoint.config.towers} tower alone")
    taken = replace(checkpoint, tensors=dict(checkpoint.tensors))
    expected = _seen(build(taken, str(source)), preprocess_for(checkpoint.config))
    # Under a temporary name until it is verified, so that nothing half-right ever has the name that was asked for.
    with stand_in(out, f"another process is writing {out}") as temporary:
        _refuse_existing(out, overwrite)  # another process may have written it meanwhile
        _refuse_more_than_a_model(out, found_at, replaceable)
        WRITERS[to](checkpoint, temporary)
        for name, content in (texts or {}).items():
            write_text(temporary / name, content)
        is_threshold = temporary.is_dir() and (found_at / THRESHOLD_FILE).is_file()
        changes = pixel_changes(checkpoint.config, to)
        if changes and is_threshold:
            changes.append(f"{THRESHOLD_FILE} is left out, as pictures become other pixels; calibrate the new model")
        for change in changes:
            warnings.warn(change, stacklevel=2)
        if is_threshold and not changes:
            shutil.copyfile(found_at / THRESHOLD_FILE, temporary / THRESHOLD_FILE)
        if temporary.is_dir() and checkpoint.wordings is not None:
            write_text(temporary / WORDINGS_FILE, checkpoint.wordings.to_json())
        written = read_checkpoint(temporary)
        compared = {"miniclip": _seen(build(written, str(temporary)), preprocess_for(written.config))}
        compared |= _seen_by_the_other(to, temporary, checkpoint.config)
        said = [_verdict(name, found, expected) for name, found in compared.items()]
        swap_in(temporary, out)
    return ", ".join(said)


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already; pass --overwrite to replace it, or name another")


def _refuse_more_than_a_model(out: Path, found_at: Path, replaceable: Collection[str]) -> None:
    """Raises a ValueError if a folder that is to be replaced holds what `convert` does not write, or its source."""
    if out.is_dir():
        is_model = any((out / name).is_file() for name in (CONFIG_FILE, OPENCLIP_CONFIG_FILE))
        if not is_model or out.resolve() in found_at.resolve().parents:
            raise ValueError(f"{out} is a folder that holds more than a model, so it is not overwritten")
        names = (*FOLDER_FILES, THRESHOLD_FILE, WORDINGS_FILE, *replaceable)
        refuse_foreign(out, {out / name for name in names}, "`miniclip convert`")


class _Seen(NamedTuple):
    """What a library makes of a model.

    Args:
        features: of each tower, of the same tensors for every library.
        pictures: (3, E) of two opaque ones and a partly transparent one, each prepared by the library itself.
    """

    features: list[Tensor]
    pictures: Tensor | None


def _verdict(name: str, found: _Seen, expected: _Seen) -> str:
    """
    Raises:
        ValueError: the features of the same tensors differ.
    """
    differences = [relative_difference(a, b) for a, b in zip(found.features, expected.features, strict=True)]
    if not all(difference <= _MOST_APART for difference in differences):  # a comparison with NaN is False, too
        raise ValueError(f"{name} gives other embeddings from the converted file, by {differences}")
    if found.pictures is None or expected.pictures is None:
        return f"same embeddings by {name} (to {max(differences):.0e})"
    of_pictures = relative_difference(found.pictures, expected.pictures)
    if of_pictures <= _MOST_APART:
        return f"same embeddings by {name} (to {max(*differences, of_pictures):.0e})"
    *opaque, transparent = torch.cosine_similarity(found.pictures, expected.pictures).tolist()
    return (
        f"same embeddings of the same pixels by {name} (to {max(differences):.0e}), but of pictures cosine "
        f"{min(opaque):.4f} (opaque) and {transparent:.4f} (partly transparent)"
    )


def _probe_pictures(config: CLIPConfig) -> list[Image.Image]:
    """Wide, tall, and partly transparent, of sides whose crop begins between two pixels."""
    R = config.vision.image_size
    noise = torch.randint(256, (8, 8, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    transparent = Image.fromarray(noise.numpy()).resize((2 * R + 6, 2 * R), Image.Resampling.BICUBIC)
    wide = transparent.convert("RGB")
    return [wide, wide.transpose(Image.Transpose.ROTATE_90), transparent]


@torch.inference_mode()
def _seen(model: CLIP, preprocess: Preprocess) -> _Seen:
    model.eval()
    features = embeddings(model)
    if model.config.towers == "text":
        return _Seen(features, None)
    pixels = torch.stack([preprocess(each) for each in _probe_pictures(model.config)])
    return _Seen(features, model.encode_image(pixels))


@torch.inference_mode()
def _seen_by_the_other(to: str, out: Path, config: CLIPConfig) -> dict[str, _Seen]:
    """What the library that the layout belongs to makes of it; nothing if it is not installed."""
    images, tokens = probe(config)
    pictures = _probe_pictures(config)
    if to == "openclip":
        try:
            import open_clip
        except ImportError:
            return {}
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out.resolve()}")
        padded = torch.zeros(2, config.text.context_length, dtype=torch.long)
        padded[:, : tokens.shape[1]] = tokens
        model.eval()
        features = [model.encode_image(images), model.encode_text(padded)]
        return {"open_clip": _Seen(features, model.encode_image(torch.stack([preprocess(each) for each in pictures])))}
    if to == "hf":
        try:
            import transformers
        except ImportError:
            return {}
        with _without_bars(transformers.utils.logging):
            other = transformers.CLIPModel.from_pretrained(out, dtype=torch.float32).eval()
        # transformers 5 has two image processors; its older one, which reads with Pillow, is the only one of 4.
        processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor).from_pretrained(out)
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        by_image = other.get_image_features(pixel_values=images), other.get_image_features(pixel_values=pixels)
        # transformers 5 wraps the features; 4 gives them as they are.
        found = [getattr(f, "pooler_output", f) for f in (*by_image, other.get_text_features(input_ids=tokens))]
        return {"transformers": _Seen([found[0], found[2]], found[1])}
    return {}


@contextmanager
def _without_bars(transformers_logging: Any) -> Iterator[None]:
    were_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            transformers_logging.enable_progress_bar()
