"""A map of relevance laid over its picture: warm where something speaks for the text, cold where it speaks against."""

from __future__ import annotations

import numpy as np
from PIL import Image

from ..common.pictures import as_seen

_WARM, _COLD = (np.array(each, dtype=np.float32) for each in ((214, 39, 40), (31, 90, 200)))
_STRONGEST = 0.995  # quantile of the sizes of relevance that gets the full colour
_MOST_COVERED = 0.85  # of the picture by the full colour
_LEAST_SIDE = 448  # pixels; smaller pictures are enlarged
_BAND_ROWS = 256  # so that pictures of many millions of pixels need little memory
_STRIPE = 1 / 50  # width of the stripes over what is not seen, in units of the long side


def overlay(picture: Image.Image, relevance: np.ndarray) -> Image.Image:
    """The picture in grey with its relevance in colour, and stripes over what the model does not see.

    Pictures with less than 448 pixels on the long side are enlarged by a whole factor.

    Args:
        relevance: (height, width) of the picture, NaN where the model does not look.
    """
    factor = max(1, _LEAST_SIDE // max(picture.size))
    size = (factor * picture.width, factor * picture.height)
    grey = np.asarray(as_seen(picture, size).convert("L"))
    is_seen = _enlarged(np.isfinite(relevance).astype(np.uint8), size, Image.Resampling.NEAREST)
    strength = _enlarged(_strength(relevance), size, Image.Resampling.BILINEAR)
    width = max(2, round(_STRIPE * max(size)))
    bands = []
    for start in range(0, size[1], _BAND_ROWS):
        rows = slice(start, start + _BAND_ROWS)
        stripes = np.add.outer(np.arange(size[1])[rows], np.arange(size[0])) // width % 2
        bands.append(_band(grey[rows], strength[rows], is_seen[rows], stripes))
    return Image.fromarray(np.concatenate(bands))


def _band(grey: np.ndarray, strength: np.ndarray, is_seen: np.ndarray, stripes: np.ndarray) -> np.ndarray:
    """Some rows of an overlay: (rows, width) each -> (rows, width, 3) uint8."""
    light = (70 + np.float32(0.72) * grey)[..., None]  # so that colours show on black, too
    colour = np.where(strength[..., None] > 0, _WARM, _COLD)
    shown = light + (colour - light) * _MOST_COVERED * np.abs(strength[..., None])
    unseen = 0.5 * light + np.where(stripes, 110, 90)[..., None]
    return np.where(is_seen[..., None] > 0, shown, unseen).clip(0, 255).astype(np.uint8)


def _strength(relevance: np.ndarray) -> np.ndarray:
    """From -1 to 1, in float32."""
    filled = np.nan_to_num(relevance).astype(np.float32)
    strongest = np.quantile(np.abs(relevance[np.isfinite(relevance)]), _STRONGEST) if filled.any() else 0.0
    return (filled / strongest).clip(-1, 1) if strongest > 0 else np.sign(filled)


def _enlarged(values: np.ndarray, size: tuple[int, int], way: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(values).resize(size, way))
