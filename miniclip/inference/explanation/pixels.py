"""Relevance of pixels for any image tower: integrated gradients, and occlusion where there are no gradients.

Both compare a picture with a blurred copy of itself, in which colours are left and nothing can be recognised. An order
of pixels is scored with the same copy (`deletion.py`).

B batch, M masks, H, W height and width of the model's input in pixels, G cells on each side of a grid, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...evaluation.encoder import ModelError

# Pictures as the model takes them, (B, 3, H, W) -> unit features (B, E).
Encode = Callable[[Tensor], Tensor]

_BATCH = 32
_STEPS = 32
_CELLS = 7
_BLUR = 1 / 4  # standard deviation of the blurred copy, in units of the input's sides
_SMOOTHING = 1 / 40  # likewise of a map of pixels


def blurred(image: Tensor) -> Tensor:
    """What is left of a picture when all of its pixels are taken away: (3, H, W) -> (3, H, W)."""
    return _smoothed(image, _BLUR)


def integrated_gradients(encode: Encode, image: Tensor, base: Tensor, target: Tensor) -> Tensor | None:
    """Relevance of each pixel (Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365, equation 1).

    A pixel's relevance is its part of the cosine's rise from `base` to `image`: they add up to that rise, but for the
    error of taking `_STEPS` steps on the way.

    Args:
        encode: keeps its gradients.
        image, base: (3, H, W).
        target: (E,), of unit length.

    Returns:
        (H, W), or None if the tower gives no gradients.
    """
    ways = (torch.arange(_STEPS, device=image.device) + 0.5) / _STEPS
    total = torch.zeros_like(image)
    for shares in ways.split(_BATCH):
        with torch.enable_grad():
            images = (base + shares[:, None, None, None] * (image - base)).requires_grad_()
            try:
                cosines = encode(images) @ target
            except (RuntimeError, ModelError) as error:
                cause = error.__cause__ if isinstance(error, ModelError) else error
                if isinstance(cause, torch.OutOfMemoryError) or not isinstance(cause, RuntimeError):
                    raise
                return None  # something calls .numpy() on the way
            if not cosines.requires_grad:
                return None
            (gradients,) = torch.autograd.grad(cosines.sum(), images, allow_unused=True)
        if gradients is None:  # they end before the pixels
            return None
        total += gradients.sum(dim=0)
    return (total / _STEPS * (image - base)).sum(dim=0)


@torch.no_grad()
def occlusion(encode: Encode, image: Tensor, base: Tensor, target: Tensor) -> Tensor:
    """How much the cosine falls when a cell of a grid is taken away (Zeiler and Fergus 2013, section 4.2).

    Args: as those of `integrated_gradients`.

    Returns:
        (G, G).
    """
    rows, columns = (torch.arange(side, device=image.device) * _CELLS // side for side in image.shape[1:])
    cells = rows[:, None] * _CELLS + columns  # (H, W), the cell that each pixel is in
    is_there = torch.arange(_CELLS**2, device=image.device)[:, None, None] != cells  # (G * G, H, W)
    cosines = encode_masked(encode, image, base, is_there) @ target
    return (encode(image[None])[0] @ target - cosines).view(_CELLS, _CELLS)


@torch.no_grad()
def encode_masked(encode: Encode, image: Tensor, base: Tensor, is_there: Tensor) -> Tensor:
    """Features of the picture where only some pixels are there: masks (M, H, W) -> (M, E)."""
    return torch.cat([encode(torch.where(masks[:, None], image, base)) for masks in is_there.split(_BATCH)])


def spread_out(grids: Tensor, size: torch.Size) -> Tensor:
    """Maps of cells as maps of pixels, smooth enough to be looked at: (B, G, G) or (B, H, W) -> (B, H, W)."""
    if grids.shape[1:] == size:
        return _smoothed(grids, _SMOOTHING)
    return F.interpolate(grids[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def _smoothed(images: Tensor, share: float) -> Tensor:
    """Gaussian blur with a standard deviation in units of the sides; beyond the edges there is nothing: (..., H, W)."""
    down, across = (_weights(side, share).to(images) for side in images.shape[-2:])
    return down @ images @ across.T


def _weights(side: int, share: float) -> Tensor:
    """(side, side), each row the weights of one blurred pixel."""
    places = torch.arange(side, dtype=torch.float32)
    weights = torch.exp(-((places[:, None] - places) ** 2) / (2 * (share * side) ** 2))
    return weights / weights.sum(dim=1, keepdim=True)
