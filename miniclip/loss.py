"""The contrastive loss, a pure function: symmetric cross-entropy over cosines (paper section 2.3, figure 3).

B batch, E embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """How badly images pick their texts among all, and texts their images; ln B is chance.

    Computed in at least float32 whatever the autocast: near the usual logit of 50, bfloat16's spacing is 0.25.

    Args:
        image_features, text_features: (B, E), of unit length; row i of one belongs to row i of the other.
        logit_scale: inverse temperature, already exponentiated.
        chunk_size: images per slice of the (B, B) logits. Only one slice is held at a time and computed again
            for the gradient, so memory is O(B * chunk_size) instead of O(B^2); the numbers are the same.
        mask: (B,) bool; False takes a pair out altogether, its row and its column.

    Returns:
        A scalar, the mean over pairs and both directions.

    Raises:
        ValueError: shapes that do not pair up, no pairs, or a mask that leaves none.
    """
    if image_features.shape != text_features.shape or image_features.ndim != 2 or not len(image_features):
        raise ValueError(
            f"image features {tuple(image_features.shape)} and text features {tuple(text_features.shape)} "
            "must have the same shape (B, E), with B at least 1"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1, or None for no chunks")
    if mask is not None and (mask.shape != image_features.shape[:1] or not mask.any()):
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} keeps {int(mask.sum())} pairs; it must be (B,) and keep one"
        )
    with torch.autocast(image_features.device.type, enabled=False):
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        images, texts = image_features.to(dtype), text_features.to(dtype)
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=images.device)

        B = len(images)
        rows = torch.arange(B, device=images.device).split(chunk_size or B)
        if len(rows) == 1:
            parts = [_log_sum_exps(images, texts, scale, mask)]
        else:
            chunk_mask = [None if mask is None else mask[r] for r in rows]
            parts = [
                checkpoint(_log_sum_exps, images[r], texts, scale, mask, m, use_reentrant=False)
                for r, m in zip(rows, chunk_mask, strict=True)
            ]
        over_texts = torch.cat([part[0] for part in parts])  # (B,)
        over_images = torch.stack([part[1] for part in parts]).logsumexp(dim=0)  # (B,)
        own = scale * (images * texts).sum(dim=-1)  # (B,)
        losses = (over_texts + over_images) / 2 - own
        if mask is None:
            return losses.mean()
        return losses.where(mask, 0).sum() / mask.sum()


def _log_sum_exps(
    images: Tensor, texts: Tensor, scale: Tensor, mask: Tensor | None, image_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the logits of b of the B images, over the texts (b,) and over the b images (B,)."""
    logits = scale * images @ texts.T  # (b, B)
    if mask is None:
        return logits.logsumexp(dim=1), logits.logsumexp(dim=0)
    # The least number and not -inf: a slice without any healthy image must not give inf - inf in the gradient.
    nothing = torch.finfo(logits.dtype).min
    image_mask = mask if image_mask is None else image_mask
    over_texts = logits.masked_fill(~mask, nothing).logsumexp(dim=1)
    over_images = logits.masked_fill(~image_mask[:, None], nothing).logsumexp(dim=0)
    return over_texts, over_images


def gather(features: Tensor) -> Tensor:
    """The rows of every process, in the order of their ranks: (B / world, E) -> (B, E). As they are, without processes.

    Differentiable: the gradient of a row is the sum over all processes. Where each of them computes the loss of the
    whole batch from the gathered rows and gradients are then averaged over processes, as DDP does, every parameter
    gets the gradient of one process with the whole batch.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    return _Gather.apply(features)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        features = features.contiguous()
        parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, features)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
