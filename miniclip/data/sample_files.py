"""One pair -> the files of its sample in a shard: image checked and perhaps resized, captions, metadata."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, JpegImagePlugin

from ..common.storage import read_bytes, without_secrets
from ..images import open_image, orientation, read_header, upright
from .augmentation import jpeg_size
from .reading.cells import captions_in, one_line
from .reading.pair import Pair, Pairs

# Formats, by Pillow's names, that are stored unchanged; pictures of others are stored as PNG.
_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # Pillow's, in which a PNG keeps a picture as it is

# ---------------------------------------------------------------------------------------------------------------------
# Writing


@dataclass(frozen=True)
class Packing:
    """The settings of packing. A packing that was interrupted continues only with the same ones.

    Args:
        samples_per_shard: pairs that go into one tar. Rejected ones leave it smaller.
        max_shard_bytes: a tar that would be larger is continued in another.
        resize: shrink images whose short side is longer than this many pixels; keeps the aspect.
        quality: JPEG quality of shrunk images, 1 to 95.
        min_side: reject images whose short side is shorter, pixels.
        max_aspect: reject images whose long side is more times their short side.
        val_fraction: share of the pairs to hold out. The image's bytes decide, so copies stay on one side.
        upright: store the pixels of pictures that an EXIF tag turns or mirrors as viewers show them.
    """

    samples_per_shard: int = 10_000
    max_shard_bytes: int = 10**9
    resize: int | None = None
    quality: int = 95
    min_side: int | None = None
    max_aspect: float | None = None
    val_fraction: float = 0.0
    upright: bool = False

    def __post_init__(self) -> None:
        for name in ("samples_per_shard", "max_shard_bytes", "resize", "min_side", "max_aspect"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if not 1 <= self.quality <= 95:
            raise ValueError(f"quality is {self.quality}; JPEG quality goes from 1 to 95")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; it is a share, from 0 to less than 1")


@dataclass(frozen=True)
class Prepared:
    members: dict[str, bytes]  # by suffix
    is_held_out: bool
    is_turned: bool

    @property
    def size(self) -> int:
        return sum(map(len, self.members.values())) + 3 * 1024


@dataclass(frozen=True)
class Rejection:
    """
    Args:
        is_of_machine: another machine may find what this one did not.
    """

    source: str
    reason: str
    is_of_machine: bool = False


def prepare(pairs: Sequence[Pair], index: int, packing: Packing) -> Prepared | Rejection:
    """The files of one sample, or the reason why there are none."""
    name, problem = pairs.names[index] if isinstance(pairs, Pairs) else f"pair {index}", None
    try:
        pair = pairs[index]
        name, problem = pair.source, pair.problem
        return _members(pair, packing)
    except (OSError, ValueError) as error:
        return Rejection(without_secrets(name), str(error), bool(problem) or isinstance(error, OSError))


def _members(pair: Pair, packing: Packing) -> Prepared:
    if pair.problem:
        raise ValueError(pair.problem)
    captions = [text for caption in pair.captions if (text := one_line(caption))]
    if not captions:
        raise ValueError("every caption is empty")
    if broken := next((caption for caption in captions if "\0" in caption), None):
        raise ValueError(f"its caption holds a zero byte: {broken[:60]!r}")
    text = "\n".join(captions)
    if captions_in(text) != captions:  # which raises its own reason for most
        raise ValueError(f"its caption would not be read back as it is: {text[:60]!r}")
    assert pair.image is not None
    original = read_bytes(pair.image)
    name = pair.image.name if isinstance(pair.image, Path) else pair.source
    is_turned = packing.upright and _is_turned(original)
    suffix, data, (width, height) = _stored_image(original, name, packing, is_turned)
    facts = {"source": without_secrets(pair.source), **pair.extra, "width": width, "height": height}
    members = {
        suffix: data,
        "txt": text.encode("utf-8"),
        # Bytes of a file name that are not UTF-8 become escapes, which JSON reads back.
        "json": json.dumps(facts, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace"),
    }
    place = int.from_bytes(hashlib.sha256(original).digest()[:8]) / 2**64 if packing.val_fraction else 1.0
    return Prepared(members, place < packing.val_fraction, is_turned)


def _stored_image(original: bytes, name: str, packing: Packing, is_turned: bool) -> tuple[str, bytes, tuple[int, int]]:
    """An image's suffix, bytes and (W, H) as they go into the tar.

    It is decoded completely only where needed, as decoding takes most of the time of packing.
    """
    is_kept = packing.resize is None and not is_turned and _is_whole(original)
    if is_kept and (size := jpeg_size(original)):
        _filter((size[1], size[0]), packing)
        return "jpg", original, (size[1], size[0])
    stored = open_image(original, name, is_whole=is_kept)
    image = upright(stored) if is_turned else stored
    _filter(image.size, packing)
    scale = packing.resize / min(image.size) if packing.resize else 1.0
    is_animated = getattr(stored, "is_animated", False) and stored.format == "WEBP"  # not every decoder reads those
    suffix = None if is_animated else _KEPT_FORMATS.get(stored.format or "")
    has_alpha = image.mode in ("RGBA", "LA")
    is_transparent = image.has_transparency_data and not (has_alpha and image.getextrema()[-1] == (255, 255))
    # Models differ in what they see where a picture is transparent. A JPEG has no alpha channel, and what is
    # transparent by its colour can't be shrunk so that all go on seeing the same.
    if scale < 1 and (has_alpha or not is_transparent):
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        if is_transparent:
            return "png", _encode(image.resize(size, Image.Resampling.BICUBIC), "PNG"), size
        image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        return "jpg", _encode(image, "JPEG", quality=packing.quality), size
    if suffix is None:
        return "png", _encode(image if image.mode in _PNG_MODES else image.convert("RGB"), "PNG"), image.size
    if is_turned and suffix == "jpg":
        return "jpg", _encode_like(stored, image, packing.quality), image.size
    if is_turned:
        return "png", _encode(image, "PNG"), image.size
    return suffix, original, image.size


def _is_turned(data: bytes) -> bool:
    try:
        return orientation(read_header(data)) != 1
    except Exception:  # no picture, which reading it will say
        return False


def _encode_like(stored: Image.Image, turned: Image.Image, quality: int) -> bytes:
    """A turned JPEG by its own quantisation: where its sides are multiples of its blocks, little but rounding is lost.

    Args:
        quality: of one in CMYK, which becomes RGB.
    """
    if turned.mode not in ("RGB", "L"):
        return _encode(turned.convert("RGB"), "JPEG", quality=quality)
    tables: list[list[int]] = list(stored.quantization.values())  # type: ignore[attr-defined]
    if orientation(stored) > 4:  # lying: the frequencies of rows are those of columns now
        tables = [[table[8 * column + row] for row in range(8) for column in range(8)] for table in tables]
    is_halved = JpegImagePlugin.get_sampling(stored) == 2  # its colours, both ways
    return _encode(turned, "JPEG", qtables=tables, subsampling=2 if is_halved else 0)


def _filter(size: tuple[int, int], packing: Packing) -> None:
    short, long = min(size), max(size)
    if packing.min_side and short < packing.min_side:
        raise ValueError(f"its short side is {short} pixels, less than {packing.min_side}")
    if packing.max_aspect and long > packing.max_aspect * short:
        raise ValueError(f"its sides are {size[0]} x {size[1]}, more than {packing.max_aspect:g} to 1")


def _is_whole(data: bytes) -> bool:
    """Whether a JPEG has its end marker, which one that is cut short has not; and a PNG the right checksums."""
    if data.startswith(b"\xff\xd8"):
        return data.rstrip(b"\0").endswith(b"\xff\xd9")
    if not data.startswith(b"\x89PNG"):
        return False
    try:
        read_header(data).verify()
    except Exception:  # a damaged file can raise anything; decoding it will raise the reason
        return False
    return True


def _encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()
