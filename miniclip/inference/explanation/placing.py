"""Where in a picture the model looks: the square of its input, found by preprocessing pictures of known ramps.

So no preprocessing, of any library, has to be known from the inside.

R side of the model's input; W, H width and height of a picture; all in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

Preprocess = Callable[[Image.Image], Tensor]

_LOOKS = 3  # each spreads the ramp over what the one before has seen of it
_LEVELS = 255  # of a ramp
_TOO_MUCH = (
    "the model's preprocessing does more to a picture than to resize, cut and pad it, so it is not known where in the "
    "picture a map of its input belongs"
)


class Box(NamedTuple):
    """The edges of the model's square, from the picture's upper left corner; outside of the picture where the square
    has a border."""

    left: float
    top: float
    right: float
    bottom: float


def find_box(preprocess: Preprocess, image: Image.Image) -> Box:
    """The part of a picture that the model's input shows.

    Raises:
        ValueError: `preprocess` does more to a picture than to resize, cut and pad, or makes something else of it.
    """

    def look(greys: np.ndarray) -> np.ndarray:
        """The model's input (R, R) if the picture had these values, (H or 1, W or 1)."""
        pixels = np.broadcast_to(np.rint(greys * _LEVELS).astype(np.uint8), image.size[::-1])
        probe = Image.fromarray(pixels).convert("RGB")
        probe.info |= {name: image.info[name] for name in ("exif",) if name in image.info}
        seen = preprocess(probe)
        if seen.ndim != 3 or len(seen) != 3:
            raise ValueError(f"the model's input has the shape {tuple(seen.shape)}; a picture has (3, H, W)")
        return seen.double().mean(dim=0).cpu().numpy()

    black, white = look(np.zeros((1, 1))), look(np.ones((1, 1)))
    contrast = np.abs(white - black)
    is_picture = contrast > contrast.max() / 2  # the rest is a border
    rows, columns = (np.flatnonzero(is_picture.any(axis=axis)) for axis in (1, 0))
    if not is_picture.any() or not is_picture[np.ix_(rows, columns)].all():
        raise ValueError(_TOO_MUCH)
    inner = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)

    def edges(length: int, axis: int) -> tuple[float, float]:
        start, end = 0.0, float(length)
        for _ in range(_LOOKS):
            ramp = ((np.arange(length) + 0.5 - start) / (end - start)).clip(0, 1)
            seen = (look(np.expand_dims(ramp, 1 - axis)) - black)[inner] / (white - black)[inner]
            places = start + seen * (end - start)  # in the picture, of each pixel of the input
            step = (end - start) / _LEVELS
            start, end = places.min() - 1.5 * step, places.max() + 1.5 * step
        slope, offset = _line(places, axis, length, step)
        first = offset - slope * (inner[axis].start + 0.5)  # `offset` is the first pixel's centre
        return float(first), float(first + slope * black.shape[axis])

    (left, right), (top, bottom) = edges(image.width, 1), edges(image.height, 0)
    return Box(left, top, right, bottom)


def _line(places: np.ndarray, axis: int, length: int, step: float) -> tuple[float, float]:
    """Slope and offset of the straight line on which places in the picture lie along an axis of the input.

    Args:
        length: of the picture along that axis.
        step: the places' precision.

    Raises:
        ValueError: they do not lie on a line that goes up.
    """
    if length == 1:
        return 1 / places.shape[axis], 0.5 / places.shape[axis]
    line = places.mean(axis=1 - axis)
    edge = min(2.0, length / 4)  # within it, resizing bends the line
    is_inner = (line > edge) & (line < length - edge)
    is_enough = is_inner.any() and np.ptp(line[is_inner]) > np.ptp(line) / 2
    chosen = np.flatnonzero(is_inner) if is_enough else np.arange(len(line))
    slope, offset = np.polyfit(chosen, line[chosen], 1)
    errors = np.abs(places.take(chosen, axis) - np.expand_dims(slope * chosen + offset, 1 - axis))
    if slope <= 0 or errors.max() > 3 * step + 2:
        raise ValueError(_TOO_MUCH)
    return slope, offset


def laid_on(values: np.ndarray, box: Box, size: tuple[int, int]) -> np.ndarray:
    """A map of the model's input as one of the picture, linearly between its pixels: NaN outside of the box.

    Args:
        values: (R, R).
        size: width and height of the picture.
    """
    laid = np.full(size[::-1], np.nan, dtype=np.float32)
    rows, top = _positions(len(values), box.top, box.bottom, size[1])
    columns, left = _positions(values.shape[1], box.left, box.right, size[0])
    found = _between(_between(values.astype(np.float32), rows).T, columns).T
    laid[top : top + len(rows), left : left + len(columns)] = found
    return laid


def _positions(R: int, start: float, end: float, length: int) -> tuple[np.ndarray, int]:
    """Of each of the picture's pixels with its centre in the box, the place in the input; and the first such pixel."""
    centres = np.arange(length) + 0.5
    is_in = (centres >= start) & (centres <= end)
    if not is_in.any():  # a box within a single pixel
        is_in[min(length - 1, max(0, int((start + end) / 2)))] = True
    return (centres[is_in] - start) / (end - start) * R - 0.5, int(np.argmax(is_in))


def _between(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Rows (N, ...) between those of `values`."""
    places = places.clip(0, len(values) - 1)
    before = np.minimum(places.astype(int), max(0, len(values) - 2))
    share = (places - before).astype(np.float32)[:, None]
    return values[before] * (1 - share) + values[np.minimum(before + 1, len(values) - 1)] * share
