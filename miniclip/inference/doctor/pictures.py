"""One picture -> the few numbers by which it is compared with others, and by which it is blank or blurred.

R side of the small copy, in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from ...images import orientation, rgb_as_seen

SMALL = 32  # R
COARSE = 8
BLANK_LEVELS = 10.0  # of 255, from the darkest to the brightest of 8 x 8 fields of a colour
_BLUR_TAPS = 9  # pixels of the blur that a picture is compared with


class Seen(NamedTuple):
    """What is kept of a picture.

    Args:
        size: width and height, pixels.
        is_turned: an EXIF tag turns or mirrors it.
        levels: what its coarse fields span in the colour that varies most, of 255; a blank picture has about none.
        blur: from 0 for a sharp picture to 1; see `blur_of`.
        digest: equal for equal pixels.
        bits: (8,) uint8, the 64 bits of a perceptual hash.
        small: (R, R, 3) uint8.
    """

    size: tuple[int, int]
    is_turned: bool
    levels: float
    blur: float
    digest: bytes
    bits: np.ndarray
    small: np.ndarray


def see(image: Image.Image, image_size: int, preprocess: Callable[[Image.Image], Tensor]) -> Seen:
    """
    Args:
        image_size: side of the model's input, pixels. A picture is blurred if the model sees it so.
        preprocess: the model's; what is transparent has the colours that it sees.
    """
    is_turned = orientation(image) != 1
    rgb = rgb_as_seen(image, preprocess)
    small = np.asarray(_of_size(rgb, (SMALL, SMALL)))
    fields = small.reshape(COARSE, SMALL // COARSE, COARSE, SMALL // COARSE, 3).mean(axis=(1, 3))
    levels = float((fields.max(axis=(0, 1)) - fields.min(axis=(0, 1))).max())
    digest = hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).digest()
    return Seen(image.size, is_turned, levels, blur_of(rgb, image_size), digest, _bits_of(rgb), small)


def _bits_of(image: Image.Image) -> np.ndarray:
    import imagehash  # an extra; `examine` asks for it first

    return np.packbits(imagehash.phash(image).hash.ravel())


def _of_size(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Means of fields where it shrinks, interpolated where it grows."""
    return image.resize(size, Image.Resampling.BOX if min(image.size) >= min(size) else Image.Resampling.BICUBIC)


def blur_of(image: Image.Image, image_size: int) -> float:
    """How little a further blur takes from a picture at the size that a model sees: Crété-Roffet et al., "The blur
    effect", 2007 (https://doi.org/10.1117/12.702790). From 0, sharp, to 1.

    The differences between neighbouring pixels are compared before and after a mean over 9 pixels, along both axes;
    the blurrier axis counts, as in the paper.
    """
    short = min(image.size)
    if short > image_size:
        scale = image_size / short
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    return max(_blur_along(grey), _blur_along(grey.T))


def _blur_along(grey: np.ndarray) -> float:
    """Of differences along the rows of (H, W)."""
    taps = min(_BLUR_TAPS, grey.shape[1] // 2 * 2 - 1)
    if taps < 3:
        return 0.0
    sums = np.cumsum(np.pad(grey, ((0, 0), (taps // 2 + 1, taps // 2)), mode="edge"), axis=1, dtype=np.float64)
    blurred = (sums[:, taps:] - sums[:, :-taps]) / taps  # (H, W)
    before, after = np.abs(np.diff(grey, axis=1)), np.abs(np.diff(blurred, axis=1))
    total = float(before.sum())
    return 1 - float(np.maximum(before - after, 0).sum()) / total if total else 0.0
