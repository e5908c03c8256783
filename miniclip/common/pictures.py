"""Files of pictures that Pillow would be busy with for minutes, which are refused; and small pictures for pages."""

from __future__ import annotations

import base64
import io
import math
import re
import struct
from contextlib import suppress

from PIL import Image

# What no real picture's file reaches, and what Pillow, which parses in Python, gets through in about a second.
_MOST_HEADER_READS, _MOST_READS, _BYTES_OF_A_READ = 10_000, 100_000, 64
_MOST_COPIES_BYTES, _MOST_COPIES = 2**27, 8
_MOST_COMMENTS, _MOST_SCANNED_PIXELS = 1000, 2**32
_EXIF = b"Exif\0\0"
_ONE_SCAN, _SCAN, _END, _SCAN_BYTES = b"\xc0\xc1\xc3\xc9\xcb", 0xDA, 0xD9, 10  # frames that are not progressive
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a segment, or of the end; pixels have none
_MOST_ASPECT = 4  # of a longer strip, the middle is shown


class BoundedFile(io.BytesIO):
    """A picture's file for Pillow, whose parsers take time and memory that are out of proportion to some files' bytes:
    headers of single bytes, of very many parts, and of tags that each name the same bytes.

    Raises, while it is read:
        ValueError: it is such a file.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads_left, self._exif = _MOST_HEADER_READS, bytearray()
        self._bytes_left: float = _MOST_COPIES_BYTES + _MOST_COPIES * len(data)

    def begin_pixels(self) -> None:
        """The header was read: what follows is as long as the file."""
        self._reads_left, self._bytes_left = _MOST_READS + len(self.getbuffer()) // _BYTES_OF_A_READ, math.inf

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self._reads_left, self._bytes_left = self._reads_left - 1, self._bytes_left - len(found)
        if found.startswith(_EXIF):
            self._exif += found[len(_EXIF) :]
            _refuse_copies(self._exif)
        if self._reads_left < 0 or self._bytes_left < 0:
            raise ValueError("it has more parts than any real picture has")
        return found


def refuse_slow(data: bytes, width: int, height: int) -> None:
    """Raises a ValueError if a picture's file takes far longer than any real picture of the size: a plain PPM of many
    comments, each of which Pillow copies the rest for, or a JPEG of thousands of scans, each of which passes over all
    of its pixels.
    """
    if data[:2] in (b"P1", b"P2", b"P3") and (num_comments := data.count(b"#")) > _MOST_COMMENTS:
        raise ValueError(f"it has {num_comments:,} comments")
    most_scans = _MOST_SCANNED_PIXELS // max(1, width * height)
    if data[:2] != b"\xff\xd8" or len(data) <= most_scans * _SCAN_BYTES:
        return
    num_scans = place = num_channels = 0
    while (found := _MARKER.search(data, place)) and (marker := found[0][1]) != _END:  # another picture may follow
        content = data[found.end() : found.end() + 8].ljust(8, b"\0")
        place = found.end() + int.from_bytes(content[:2], "big")
        if marker in _ONE_SCAN:
            num_channels = content[-1]
        elif marker == _SCAN:
            num_scans += 1
            if num_channels == content[2]:  # they come in one scan, and no other one is read
                return
            if num_scans > most_scans:
                raise ValueError(f"its {width} x {height} pixels are stored in more than {most_scans:,} scans")


def refuse_exif(picture: Image.Image) -> None:
    """Raises a ValueError if EXIF that no read of the file has shown, as ImageMagick's in hexadecimal, is as bad."""
    found = picture.info.get("exif") or bytes.fromhex(
        "".join(picture.info.get("Raw profile type exif", "").split("\n")[3:])
    )
    _refuse_copies(bytes(found).removeprefix(_EXIF))


def _refuse_copies(exif: bytes | bytearray) -> None:
    """Raises a ValueError if EXIF has many tags of many bytes, of which Pillow makes copies."""
    order = "<" if exif[:2] == b"II" else ">"
    with suppress(struct.error):
        (start,) = struct.unpack_from(f"{order}L", exif, 4)
        (num_tags,) = struct.unpack_from(f"{order}H", exif, start)
        if num_tags * len(exif) > _MOST_COPIES_BYTES:
            raise ValueError(f"its EXIF names {num_tags:,} tags in {len(exif):,} bytes")


# ---------------------------------------------------------------------------------------------------------------------
# Small pictures


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
