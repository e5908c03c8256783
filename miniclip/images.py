"""From a file's bytes to a model's input: decoding, and the exact preprocessing of inference.

data/augmentation.py has the augmentation of training. Batches of both travel to the device as uint8, a quarter of
float32's bytes, and `normalize` runs there.
H, W are the height and width of a picture, R the side of the model's square input; all in pixels.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from .common.arguments import shown
from .common.pictures import BoundedFile, as_seen, refuse_exif, refuse_slow
from .config import Interpolation, Preprocessing, Resize
from .fast import kept_memory


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 pixels (..., 3, H, W) -> float32 of the same shape: (pixel / 255 - mean) / std in each channel."""
    out = kept_memory.to_float32(images).div_(255)
    # Python's numbers travel with the kernels; tensors of them would be copied to the device, which a GPU waits for.
    for channel, channel_mean, channel_std in zip(range(out.shape[-3]), mean, std, strict=True):
        out[..., channel, :, :].sub_(channel_mean).div_(channel_std)
    return out


class Preprocess:
    """OpenAI's preprocessing, pixel for pixel (`_transform` in its clip/clip.py), or Hugging Face's.

    Bicubic resize of the short side to R, centre crop, and only then RGB: a palette image is therefore resized with
    nearest neighbours, as OpenAI's models saw it. Hugging Face's `CLIPImageProcessor` makes it RGB first, and rounds
    the crop's offset down. Other models resize otherwise (see `VisionConfig`). Calling gives the normalised float
    image (3, R, R), `crop` the uint8 one before that. Where the resized picture is smaller than R, the crop is black.

    A strip that would have more than MOST_PIXELS once it is resized is first cut to its centre, eight times as long as
    wide. Everything else is as in the original, and docs/weights.md describes what goes wrong there.
    """

    MOST_PIXELS = 1 << 26

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        style: Preprocessing = "openai",
        resize: Resize = "shortest",
        resize_size: int | None = None,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        self.image_size, self.mean, self.std, self.style = image_size, tuple(mean), tuple(std), style
        self.resize, self.resize_size, self.interpolation = resize, resize_size or image_size, interpolation

    def crop(self, image: Image.Image) -> Tensor:
        """(3, R, R) uint8.

        Raises:
            ValueError: no picture of Pillow's, or one without a pixel.
        """
        if not isinstance(image, Image.Image):
            raise ValueError(f"image is {shown(image)}; it must be a picture of Pillow's, as PIL.Image.open gives")
        is_hf = self.style == "hf"
        image = self._resized(_on_white(image) if is_hf else image)
        R = self.image_size
        W, H = image.size
        left, top = ((W - R) // 2, (H - R) // 2) if is_hf else (round((W - R) / 2), round((H - R) / 2))
        image = image.crop((left, top, left + R, top + R)).convert("RGB")
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def part(self, image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        """A part of a picture in RGB, with the colours that `crop` gives the whole one: for training's random crops.

        Where `crop` resizes a palette, an alpha channel or inks before they become RGB, the part is resized so, to
        (R, R). Any other keeps the box's size, because the order makes no difference.

        Args:
            box: left, top, right and bottom, pixels.
        """
        if self.style == "hf":
            return _on_white(image).crop(box)
        if image.mode in ("RGB", "L") or self._new_size(image) == image.size:
            return image.convert("RGB").crop(box)
        size, part = (self.image_size, self.image_size), image.crop(box)
        if image.mode in ("RGBA", "LA"):  # also where the part has the size already
            return as_seen(part, size, Image.Resampling.BICUBIC)
        return part.resize(size, Image.Resampling.BICUBIC).convert("RGB")

    def _resized(self, image: Image.Image) -> Image.Image:
        side, (W, H) = self.resize_size, image.size
        short, long = min(W, H), max(W, H)
        if not short:
            raise ValueError(f"a picture of {W} x {H} pixels has nothing to see")
        if self.resize == "none":
            return image
        if self.resize == "shortest" and side * side * long > self.MOST_PIXELS * short:
            cut = (long - 8 * short) // 2
            image = image.crop((cut, 0, W - cut, H) if W > H else (0, cut, W, H - cut))
        size = self._new_size(image)
        return image if image.size == size else image.resize(size, Image.Resampling[self.interpolation.upper()])

    def _new_size(self, image: Image.Image) -> tuple[int, int]:
        """Width and height after resizing and before the crop."""
        side, (W, H) = self.resize_size, image.size
        if self.resize == "none":
            return W, H
        if self.resize != "shortest":
            return side, side
        return (side, int(side * H / W)) if W <= H else (int(side * W / H), side)

    def __call__(self, image: Image.Image) -> Tensor:
        return normalize(self.crop(image), self.mean, self.std)

    def __repr__(self) -> str:
        return f"Preprocess(image_size={self.image_size}, mean={self.mean}, std={self.std})"


def rgb_as_seen(image: Image.Image, preprocess: Callable[[Image.Image], Tensor]) -> Image.Image:
    """The whole picture in RGB, with the colours that a model sees where it is transparent.

    Args:
        preprocess: the model's, of any library. It is asked, so that it need not be known from the inside: of a picture
            multiplied by its alpha channel, on white, and with the colours that are stored, the one is taken that it
            makes most alike to the picture itself.
    """
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = preprocess(image).float()
    ways = (as_seen(image), _on_white(image), image.convert("RGB"))
    return min(ways, key=lambda way: float((preprocess(way).float() - seen).abs().sum()))


def _on_white(image: Image.Image) -> Image.Image:
    """RGB as Hugging Face's processors make it: what is transparent turns white."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


# The formats that are read, with Pillow's plugins. The list is closed, because other plugins run programs (Ghostscript
# for PostScript, whatever the file's name is) or parse in Python what nobody trains on.
FORMATS = {
    "JPEG": "Jpeg", "PNG": "Png", "WEBP": "WebP", "GIF": "Gif", "BMP": "Bmp", "DIB": "Bmp", "TIFF": "Tiff",
    "PPM": "Ppm", "AVIF": "Avif", "JPEG2000": "Jpeg2K",
}  # fmt: skip


_NEW_SUBFILE_TYPE, _SUB_IFDS, _DNG_VERSION = 254, 330, 50706  # tags of TIFF


@functools.cache
def _formats() -> tuple[str, ...]:
    """FORMATS as far as this Pillow has them; no other plugin is imported."""
    for plugin in dict.fromkeys(FORMATS.values()):
        with suppress(ImportError):
            importlib.import_module(f"PIL.{plugin}ImagePlugin")
    return tuple(name for name in FORMATS if name in Image.OPEN)


def read_header(data: bytes) -> Image.Image:
    """A picture of one of FORMATS, not decoded yet. Errors are Pillow's, which can be of any kind.

    Raises:
        ValueError: a camera's raw file, a TIFF whose first picture is a small preview.
    """
    file = BoundedFile(data)
    image = Image.open(file, formats=_formats())
    refuse_slow(data, *image.size)
    if _is_raw(image, data):
        raise ValueError("a camera's raw file, whose first picture is a preview; save it as .jpg or .png")
    file.begin_pixels()
    return image


def _is_raw(image: Image.Image, data: bytes) -> bool:
    """DNG and Canon's CR2 say what they are; in others (TIFF/EP) the first picture is a smaller copy of another one."""
    if not (tags := getattr(image, "tag_v2", {})):
        return False
    is_canons = data[4:12] == b"\x10\0\0\0CR\2\0"  # where the first directory is, and the mark before it
    is_copy = tags.get(_NEW_SUBFILE_TYPE) == 1
    return is_canons or _DNG_VERSION in tags or (is_copy and (_SUB_IFDS in tags or not _is_largest_page(image)))


def _is_largest_page(image: Image.Image) -> bool:
    size = image.width * image.height
    with suppress(EOFError):
        for page in itertools.count(1):
            image.seek(page)
            if image.width * image.height >= size:
                return False
    image.seek(0)
    return True


def run_no_program() -> None:
    """Keeps Pillow from starting Ghostscript in this process, for libraries that open pictures by themselves."""
    from PIL import EpsImagePlugin  # a plugin that reading by FORMATS never imports

    EpsImagePlugin.gs_binary = False


def open_image(data: bytes, source: str, is_whole: bool = False) -> Image.Image:
    """Decodes a picture completely, so that a truncated one is noticed here.

    Args:
        source: where the bytes came from, for the error.
        is_whole: the caller knows that nothing is missing; only the header is read, and the rest when it is needed.

    Raises:
        ValueError: the bytes are no picture of one of FORMATS, or only part of one, or so large a one that it must be
            an attack (Pillow's limit on decompression).
    """
    try:
        image = read_header(data)
        if not is_whole or image.mode.startswith(("I", "F")):
            image.load()
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{source} is not an image that can be read ({len(data)} bytes); allowed are {', '.join(_formats())}"
        ) from error
    except Exception as error:  # a damaged picture can raise anything
        raise ValueError(f"{source} is an unreadable image: {error}") from error
    return to_8_bits(image, source)


def to_8_bits(image: Image.Image, source: str) -> Image.Image:
    """A picture of 16 bits (Pillow's modes I;16 and I) or floats (F) as 8-bit, any other as it is. Pillow's conversion
    would make all above 255 white, and floats from 0 to 1 black.

    Raises:
        ValueError: floats whose black and white can't be known.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        low, high = float(values.min(initial=0)), float(values.max(initial=0))
        if not (low >= 0 and high <= 255):
            raise ValueError(
                f"{source} has floats from {low:g} to {high:g} for pixels, whose black and white can't be known; scale "
                "them to 0 to 1, or to 0 to 255"
            )
        values = values * 255 if high <= 1 else values
    else:
        values = values.astype(np.int64)
        is_16_bits = image.mode.startswith("I;16") or values.max(initial=0) > 255  # mode I does not say
        values = values >> 8 if is_16_bits else values
    converted = Image.fromarray(np.round(values).clip(0, 255).astype(np.uint8))
    converted.info |= {name: image.info[name] for name in _ORIENTED_BY if name in image.info}
    return converted


# What the orientation of a picture asks a viewer to do (EXIF 2.32, tag 0x0112); 1 is as stored.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_ORIENTED_BY = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Pillow keeps the tag


def orientation(picture: Image.Image) -> int:
    """1 to 8: how the camera was held, by the picture's EXIF. Viewers turn a picture by it, and CLIP's preprocessing
    reads it as it is stored. A damaged tag turns nothing, and Pillow turns TIFF by itself: both are 1."""
    try:
        if picture.format == "TIFF":
            return 1
        refuse_exif(picture)
        found = picture.getexif().get(ExifTags.Base.Orientation, 1)
        return int(found) if found in _TURNS else 1
    except Exception:  # damaged EXIF can raise anything
        return 1


def turned(picture: Image.Image, orientation: int) -> Image.Image:
    """The picture as viewers show one of that orientation; itself if the orientation is 1."""
    return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture


def upright(picture: Image.Image) -> Image.Image:
    """The picture as viewers show it, without the tag; itself if it is stored so."""
    found = turned(picture, orientation(picture))
    if found is not picture:
        found.info = {name: value for name, value in found.info.items() if name not in _ORIENTED_BY}
    return found
