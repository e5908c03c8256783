"""Small pictures for pages."""

from __future__ import annotations

import base64
import io

from PIL import Image

_MOST_ASPECT = 4  # of a longer strip, the middle is shown


def thumbnail(image: Image.Image, box: tuple[int, int]) -> str:
    """A `data:` URL of the picture as the model sees it, not turned by a tag and without transparency.

    Args:
        box: the width and height to fill, pixels. A smaller picture is shown enlarged, pixel by pixel, not blurred
            into something nobody saw.
    """
    image = image.convert("RGB")
    short = min(image.size)
    width, height = (min(side, _MOST_ASPECT * short) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    factor = min(box[0] / width, box[1] / height)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    way = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
    buffer, kind = io.BytesIO(), "png" if factor > 1 else "jpeg"
    image.resize(size, way, box=(left, top, left + width, top + height)).save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
