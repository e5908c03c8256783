"""A model whose reasons are known: pictures match "red" as far as one corner of them is red."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from miniclip.evaluation.encoder import Encoder, from_object
from miniclip.images import Preprocess

SIDE = 28


class Planted:
    """The cosine with "red" grows with the redness of the upper left quarter of the model's input, and falls with that
    of the lower right quarter; all else is ignored. Texts match as far as they have the words "red" and "not"."""

    logit_scale = torch.tensor(1.0)

    def __init__(self, preprocess: Any = None, has_gradients: bool = True) -> None:
        self.preprocess = preprocess or Preprocess(SIDE, (0, 0, 0), (1, 1, 1))
        self.has_gradients = has_gradients

    def encode_image(self, images: torch.Tensor) -> Any:
        redness = images[:, 0] - images[:, 1:].mean(dim=1)
        half = redness.shape[1] // 2
        score = redness[:, :half, :half].mean(dim=(1, 2)) - redness[:, half:, half:].mean(dim=(1, 2))
        features = torch.stack([torch.full_like(score, 0.5), score], dim=1)
        return features if self.has_gradients else features.detach().numpy()

    def tokenize(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[text.split().count(word) for word in ("red", "not")] for text in texts])

    def encode_text(self, counts: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.full((len(counts),), 0.3), (counts[:, 0] - 2 * counts[:, 1]).float()], dim=1)


def planted(**options: Any) -> Encoder:
    return from_object(Planted(**options), "planted")


def grey_with_patch(size: tuple[int, int], patch: tuple[int, int, int, int], mode: str = "RGB") -> Image.Image:
    """Grey, with a red rectangle from (left, top) to (right, bottom)."""
    pixels = np.full((size[1], size[0], 3), 120, dtype=np.uint8)
    left, top, right, bottom = patch
    pixels[top:bottom, left:right] = (230, 20, 20)
    return Image.fromarray(pixels).convert(mode)
