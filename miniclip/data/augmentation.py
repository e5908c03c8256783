"""What training does to pictures: decoding at the resolution needed, random crops, colours.

H, W are the height and width of a picture, R the side of the model's square input; all in pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..common.pictures import refuse_slow
from ..images import Preprocess, open_image


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(H, W) from the header of a JPEG in RGB or grey, which `decode_rgb` can shrink; None for anything else.

    Raises:
        ValueError: so large a picture that it must be an attack (Pillow's limit on decompression), or one of thousands
            of scans.
    """
    try:
        H, W, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace not in ("RGB", "YCbCr", "Gray"):  # CMYK is Pillow's
        return None
    if Image.MAX_IMAGE_PIXELS is not None and H * W > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"the sample is an unreadable image: {W} x {H} pixels, which could be a decompression bomb")
    try:
        refuse_slow(data, W, H)
    except ValueError as error:
        raise ValueError(f"the sample is an unreadable image: {error}") from error
    return H, W


def decode_rgb(data: bytes, shrink: int = 1) -> Tensor:
    """(3, H, W) uint8, the pixels that Pillow gives; but a JPEG comes from libjpeg-turbo, without Pillow's copies.

    Args:
        shrink: 1, 2 or 4, how many times smaller both sides of a JPEG shall be, rounded up: each block of 8 x 8 pixels
            then goes through a smaller inverse DCT. Other formats, and JPEGs that only Pillow reads, come whole.

    Raises:
        ValueError: no image, only part of one, or so large a one that it must be an attack.
    """
    if size := jpeg_size(data):
        H, W = size
        try:
            pixels = simplejpeg.decode_jpeg(data, min_height=-(-H // shrink), min_width=-(-W // shrink))
            return torch.from_numpy(pixels).permute(2, 0, 1)
        except ValueError:
            pass  # damaged: Pillow forgives more, and its message is the clearer one
    return _planes(open_image(data, "the sample").convert("RGB"))


def _planes(image: Image.Image) -> Tensor:
    """RGB -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class Augmentation:
    """What training does to a picture: a random crop of random size, resized; perhaps mirrored, recoloured, or grey.

    CLIP was trained with random square crops alone (paper section 2.4). The random numbers come from the caller, so
    that the same (seed, epoch, sample) gives the same pixels on any worker. All of it is done on bytes: a quarter of
    the memory of floats.

    Args:
        scale: smallest and largest share of the picture's area that a crop takes.
        ratio: smallest and largest width / height of a crop.
        flip: probability of mirroring left and right; harmful where left, right or writing matter.
        color: the most by which brightness, contrast and saturation are changed, as shares, and hue, in turns of the
            colour circle (0 to 0.5); as in SimCLR (Chen et al. 2020, appendix A). Harmful where captions name colours.
        color_probability: that a picture is recoloured at all.
        grey: probability that a picture loses its colours.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    color: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    color_probability: float = 0.8
    grey: float = 0.0

    def __post_init__(self) -> None:
        for name, value, most in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not isinstance(value, tuple | list) or len(value) != 2:
                raise ValueError(f"Augmentation.{name} is {value!r}; it must be two numbers, low and high")
            low, high = value
            if not 0 < low <= high <= most:
                raise ValueError(
                    f"Augmentation.{name} is {(low, high)}; it must be low, high with 0 < low <= high"
                    + (" <= 1" if most == 1 else "")
                )
        for name in ("flip", "color_probability", "grey"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Augmentation.{name} is {getattr(self, name)}; it is a probability, 0 to 1")
        if not isinstance(self.color, tuple | list) or len(self.color) != 4:
            raise ValueError(f"Augmentation.color is {self.color!r}; it must be four numbers")
        if not all(0 <= most <= limit for most, limit in zip(self.color, (1, 1, 1, 0.5), strict=True)):
            raise ValueError(
                f"Augmentation.color is {tuple(self.color)}; brightness, contrast and saturation go from 0 to 1, "
                "hue from 0 to 0.5"
            )
        if not any(self.color) and self.color_probability != type(self).color_probability:
            raise ValueError(
                f"Augmentation.color_probability is {self.color_probability}, and color is {tuple(self.color)}, so no "
                "picture is recoloured; set color, too, or leave it out"
            )

    def crop_box(self, H: int, W: int, random: np.random.Generator) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random crop; ten tries, then the largest centred one that is allowed."""
        for _ in range(10):
            area = H * W * random.uniform(*self.scale)
            ratio = math.exp(random.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < h <= H and 0 < w <= W:
                return int(random.integers(H - h + 1)), int(random.integers(W - w + 1)), h, w
        ratio = min(max(W / H, self.ratio[0]), self.ratio[1])
        h, w = min(H, max(1, round(W / ratio))), min(W, max(1, round(H * ratio)))
        return (H - h) // 2, (W - w) // 2, h, w

    def __call__(self, image: Tensor, image_size: int, random: np.random.Generator) -> Tensor:
        """(3, H, W) uint8 -> (3, R, R) uint8."""
        _, H, W = image.shape
        return self._resized(image, self.crop_box(H, W, random), image_size, random)

    def decode(self, data: bytes, preprocess: Preprocess, random: np.random.Generator) -> Tensor:
        """An image file's bytes -> (3, R, R) uint8: decoded by `decode_rgb`, or Pillow if no JPEG, then augmented.

        Of a JPEG whose crop has 2 R or 4 R pixels a side or more, a half or a quarter of the resolution is decoded.
        The crop's edges then move to the nearest whole pixels of that, by at most 1 or 2 pixels of the original.

        Args:
            preprocess: inference's, whose colours the crop has (`Preprocess.part`).

        Raises:
            ValueError: from `decode_rgb`.
        """
        size, image_size = jpeg_size(data), preprocess.image_size
        if size is None:
            picture = open_image(data, "the sample")
            top, left, h, w = self.crop_box(picture.height, picture.width, random)
            part = _planes(preprocess.part(picture, (left, top, left + w, top + h)))
            return self._resized(part, (0, 0, *part.shape[1:]), image_size, random)
        top, left, h, w = self.crop_box(*size, random)
        times = min(h, w) // image_size
        shrink = 4 if times >= 4 else 2 if times >= 2 else 1
        image = decode_rgb(data, shrink)
        if image.shape[1:] == size:  # damaged so that only Pillow reads it
            shrink = 1
        top, left, bottom, right = ((edge + shrink // 2) // shrink for edge in (top, left, top + h, left + w))
        return self._resized(image, (top, left, bottom - top, right - left), image_size, random)

    def _resized(
        self, image: Tensor, box: tuple[int, int, int, int], image_size: int, random: np.random.Generator
    ) -> Tensor:
        top, left, h, w = box
        # With a pixel's three bytes side by side, as decoders leave them, resizing takes two thirds of the time.
        crop = image[None, :, top : top + h, left : left + w].contiguous(memory_format=torch.channels_last)
        image = F.interpolate(crop, size=(image_size, image_size), mode="bicubic", antialias=True)[0]
        if random.random() < self.flip:
            image = image.flip(-1)
        if any(self.color) and random.random() < self.color_probability:
            image = self._recolored(image, random)
        if self.grey and random.random() < self.grey:
            from torchvision.transforms.v2 import functional

            image = functional.rgb_to_grayscale(image, num_output_channels=3)
        return image

    def _recolored(self, image: Tensor, random: np.random.Generator) -> Tensor:
        from torchvision.transforms.v2 import functional  # a second to import, for those who ask for it

        brightness, contrast, saturation, hue = self.color
        for change in random.permutation(4):  # in random order, as there
            if change == 0 and brightness:
                image = functional.adjust_brightness(image, random.uniform(1 - brightness, 1 + brightness))
            elif change == 1 and contrast:
                image = functional.adjust_contrast(image, random.uniform(1 - contrast, 1 + contrast))
            elif change == 2 and saturation:
                image = functional.adjust_saturation(image, random.uniform(1 - saturation, 1 + saturation))
            elif change == 3 and hue:
                image = functional.adjust_hue(image, random.uniform(-hue, hue))
        return image
