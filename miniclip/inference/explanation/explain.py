"""A picture, a text, a model -> which pixels and which words their cosine hangs on, and whether to believe it.

H, W height and width of the model's input, E embedding.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...common.arguments import FLOAT32
from ...evaluation.encoder import Encoder
from ...images import rgb_as_seen
from ...model import VisionTransformer
from .attention import attention_relevance
from .deletion import NUM_RANDOM, Deletion, Removal
from .pixels import blurred, encode_masked, integrated_gradients, occlusion, spread_out
from .placing import Box, find_box, laid_on
from .words import Text, Words

Method = Literal["attention", "gradients", "occlusion"]
METHODS: tuple[Method, ...] = get_args(Method)

_MOST_PIXELS = 512


@dataclass(frozen=True)
class Map:
    """What in a picture matched a text, or another direction.

    Args:
        relevance: (H, W) of the model's input; above 0 what speaks for it, below 0 what speaks against it.
        box: where in the picture the model's input lies.
        size: width and height of the picture, as it is stored.
        cosine: of picture and text.
        deletion: whether to believe the map.
        method: how it was made.
    """

    relevance: np.ndarray
    box: Box
    size: tuple[int, int]
    cosine: float
    deletion: Deletion
    method: Method

    def on_picture(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """float32, one number for each of the picture's pixels; NaN where the model does not look.

        Args:
            size: width and height of the picture, where it is shown in another than its own.
        """
        size = size or self.size
        across, down = size[0] / self.size[0], size[1] / self.size[1]
        left, top, right, bottom = self.box
        return laid_on(self.relevance, Box(across * left, down * top, across * right, down * bottom), size)


@dataclass(frozen=True)
class Explanation:
    text: str
    map: Map
    words: Words


class Explainer:
    """Explains a model's cosines.

    Args:
        method: "attention", relevance through attention, for this package's vision transformers; "gradients",
            integrated gradients, for every image tower of torch's; or "occlusion", for any. By default the first of
            them that the model allows.

    Raises:
        ValueError: the model does not allow the method, or is open in bf16, which gradients need more bits than.
    """

    def __init__(self, encoder: Encoder, method: Method | None = None) -> None:
        if method not in (None, *METHODS):
            raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
        if encoder.precision != FLOAT32:
            raise ValueError(
                f"{encoder.name} is open in {encoder.precision}, and explanations are gradients, which need {FLOAT32}; "
                "open it without a precision"
            )
        if method == "attention" and not isinstance(encoder.image_module, VisionTransformer):
            raise ValueError(
                f"relevance through attention is for miniclip's vision transformers, and the image tower of "
                f"{encoder.name} is none; use {' or '.join(METHODS[1:])}"
            )
        self.encoder, self.method = encoder, method
        self._texts: dict[str, Text] = {}

    def __call__(self, image: Image.Image, texts: Sequence[str]) -> list[Explanation]:
        """What of the picture, and of each text, mattered to their cosine.

        Raises:
            ValueError: an empty text, one that the model can't read to its end, or a picture that can't be mapped.
        """
        read = [self.text(text) for text in texts]
        picture = Picture(self.encoder, image, self.method)
        return [Explanation(t.text, picture.map(t.features), t.explain(picture.features)) for t in read]

    def text(self, text: str) -> Text:
        """The text as the model reads it, encoded once.

        Raises:
            ValueError: as above.
        """
        if text not in self._texts:
            self._texts[text] = Text(self.encoder, text)
        return self._texts[text]


class Picture:
    """A picture as a model sees it.

    Parts are taken from the model's input. Where that is no picture (SigLIP 2's patches of any aspect ratio), or shows
    it turned or mirrored, they are taken from the picture itself.

    Args:
        method: as that of `Explainer`.
        base: what is left of the model's input (3, H, W) when all of its pixels are taken away.
        features: (E,), of unit length.

    Raises:
        ValueError: the model's features of it are not finite.
    """

    def __init__(
        self,
        encoder: Encoder,
        image: Image.Image,
        method: Method | None = None,
        base: Callable[[Tensor], Tensor] = blurred,
    ) -> None:
        self._encoder, self._method, self._size = encoder, method, image.size
        self._prepare: Callable[[Tensor], Tensor] = lambda images: images
        pixels = encoder.preprocess(image)
        try:
            self._box = find_box(encoder.preprocess, image)
        except ValueError:  # parts are taken from the picture itself, before it is preprocessed
            self._box = Box(0, 0, *image.size)
            self._prepare = partial(_preprocessed, encoder, image.info.get("exif"))
            pixels = _reduced(rgb_as_seen(image, encoder.preprocess))
        self._pixels = pixels.float().to(encoder.logit_scale.device)
        self._base = base(self._pixels)
        self._removals: dict[torch.Size, Removal] = {}
        with torch.no_grad():
            self.features = self._encode(self._pixels[None])[0]
        if not torch.isfinite(self.features).all():
            raise ValueError(f"{encoder.name} gives features of the picture that are not finite")

    def map(self, target: Tensor) -> Map:
        """
        Args:
            target: (E,), of unit length: a text's features, or those that a class's prompts have together.
        """
        target = target.float()
        cells, method = self.cells(target)
        relevance, deletion = self.judge(cells, target)
        return Map(relevance, self._box, self._size, float(self.features @ target), deletion, method)

    def judge(self, cells: Tensor, target: Tensor) -> tuple[np.ndarray, Deletion]:
        """Any grid of relevances (G, G or H, W) as a map of pixels, (H, W), and its score."""
        relevance = spread_out(cells[None].float(), self._pixels.shape[1:])[0]
        return relevance.cpu().numpy(), self._removal(cells.shape).score(relevance.flatten(), target)

    def cells(self, target: Tensor) -> tuple[Tensor, Method]:
        """Relevances toward a target, (G, G) or (H, W), by the method asked for, or by the first that works."""
        tower = self._encoder.image_module
        if self._method == "attention" or (self._method is None and isinstance(tower, VisionTransformer)):
            try:
                return self._through_attention(tower, target), "attention"
            except ValueError:  # somebody has replaced its attention
                if self._method:
                    raise
        if self._method != "occlusion":
            found = integrated_gradients(self._encode, self._pixels, self._base, target)
            if found is not None:
                return found, "gradients"
            if self._method:
                raise ValueError(f"the image tower of {self._encoder.name} gives no gradients; use occlusion")
        return occlusion(self._encode, self._pixels, self._base, target), "occlusion"

    def _through_attention(self, tower: Any, target: Tensor) -> Tensor:
        found, _ = attention_relevance(tower.transformer, lambda: self._encode(self._pixels[None]), target, read=0)
        side = math.isqrt(len(found) - 1)
        return found[1:].view(side, side)

    def _encode(self, images: Tensor) -> Tensor:
        """Unit features (B, E), with gradients if they are enabled and the tower has any."""
        encode = inspect.unwrap(self._encoder.encode_image)  # within torch.no_grad()
        return F.normalize(encode(self._prepare(images)).float(), dim=-1)

    def _removal(self, grid: torch.Size) -> Removal:
        """Of pixels, for maps of a grid."""
        if grid not in self._removals:
            size, device = self._pixels.shape[1:], self._pixels.device
            random = torch.rand(NUM_RANDOM, *grid, generator=torch.Generator().manual_seed(0)).to(device)

            def encode(is_there: Tensor) -> Tensor:
                return encode_masked(self._encode, self._pixels, self._base, is_there.unflatten(1, size))

            self._removals[grid] = Removal(encode, spread_out(random, size).flatten(1))
        return self._removals[grid]


def _reduced(image: Image.Image) -> Tensor:
    """The picture, which is RGB, with at most `_MOST_PIXELS` on its long side: (3, H, W), from 0 to 255."""
    share = min(1, _MOST_PIXELS / max(image.size))
    small = image.resize([max(1, round(share * side)) for side in image.size], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def _preprocessed(encoder: Encoder, exif: bytes | None, images: Tensor) -> Tensor:
    """What the model takes of pictures (B, 3, H, W)."""
    pictures = [Image.fromarray(each) for each in images.detach().round().byte().permute(0, 2, 3, 1).cpu().numpy()]
    for picture in pictures:
        picture.info |= {"exif": exif} if exif else {}
    return torch.stack([encoder.preprocess(picture) for picture in pictures])
