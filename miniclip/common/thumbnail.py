"""Small pictures for pages."""

from __future__ import annotations

import base64
import io

from PIL import Image

_MOST_ASPECT = 4  # of a longer strip, the middle is shown


def as_seen(
    image: Image.Image,
    size: tuple[int, int] | None = None,
    way: Image.Resampling = Image.Resampling.NEAREST,
    box: tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """RGB with the colours that OpenAI's preprocessing leaves when it resizes: multiplied by an alpha channel,
    so that what is wholly transparent is black, and those under any other transparency as they are stored.

    Args:
        size: width and height, by default its own; `way` and `box` as in `Image.resize`.
    """
    multiplied = {"RGBA": "RGBa", "LA": "La"}.get(image.mode)
    resized = image.convert(multiplied or "RGB").resize(size or image.size, way, box)
    return (resized.convert(image.mode) if multiplied else resized).convert("RGB")


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """The picture `as_seen`, with no side longer than so many pixels; a smaller one keeps its size."""
    factor = min(1, side / max(image.size))
    width, height = (max(1, round(factor * each)) for each in image.size)
    return as_seen(image, (width, height), Image.Resampling.BICUBIC)


def thumbnail(image: Image.Image, box: tuple[int, int]) -> str:
    """A `data:` URL of the picture as a model sees it (`as_seen`), not turned by a tag and without transparency.

    Args:
        box: the width and height to fill, pixels. A smaller picture is shown enlarged, pixel by pixel, not blurred
            into something nobody saw.
    """
    short = min(image.size)
    width, height = (min(side, _MOST_ASPECT * short) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    factor = min(box[0] / width, box[1] / height)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    way = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    buffer, kind = io.BytesIO(), "png" if factor > 1 else "jpeg"
    as_seen(image, size, way, (left, top, left + width, top + height)).save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
