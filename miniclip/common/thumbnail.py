"""Small JPEGs for pages."""

from __future__ import annotations

import base64
import io

from PIL import Image

_THUMBNAIL = 128  # pixels, short side


def jpeg_thumbnail(image: Image.Image) -> str:
    """As the model sees it: not turned by a tag, without transparency. Of a long strip, the middle."""
    image = image.convert("RGB")
    short = min(image.size)
    width, height = (min(side, 2 * short) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    size = (round(width * _THUMBNAIL / short), round(height * _THUMBNAIL / short))
    # A small picture is shown with its pixels, not blurred into something nobody saw.
    way = Image.Resampling.NEAREST if short < _THUMBNAIL else Image.Resampling.LANCZOS
    buffer = io.BytesIO()
    image.resize(size, way, box=(left, top, left + width, top + height)).save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
