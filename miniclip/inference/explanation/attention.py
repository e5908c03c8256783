"""Relevance through attention (Chefer et al. 2021, "Generic Attention-model Explainability for Interpreting Bi-Modal
and Encoder-Decoder Transformers", https://arxiv.org/abs/2103.15679, sections 3.1 and 3.2).

A block mixes tokens by its attention probabilities A (H, N, N). An entry mattered as far as the score grows with it and
it is used, so a block counts as Ā = mean over heads of (∂score/∂A ⊙ A)⁺. Relevance starts as the identity, a token's
own, and each block adds what it mixes in: R ← R + Ā R. The row of the token that is read at the end is the map.

B batch, N tokens, H heads, D width, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model import Transformer


class Attention(NamedTuple):
    """How one picture or text was read: each block's probabilities (H, N, N), the gradient of the cosine by them, and
    the cosine. Of the last block there may be the row of the token that is read alone, (H, 1, N)."""

    probabilities: list[Tensor]
    gradients: list[Tensor]
    cosine: Tensor


def attention_relevance(
    transformer: Transformer, encode: Callable[[], Tensor], target: Tensor, read: int
) -> tuple[Tensor, Tensor]:
    """The relevance of each token of one picture or text to its cosine with `target`.

    Args:
        encode: runs the tower that `transformer` is part of: () -> features (1, E).
        target: (E,), of unit length.
        read: index of the token whose output becomes the features.

    Returns:
        (N,) relevances, none below 0, and the cosine.

    Raises:
        ValueError: a block does not call its attention as this package's do, so that there is nothing to see.
    """
    seen = attention_of(transformer, encode, target)
    return roll_out(seen.probabilities, seen.gradients, read), seen.cosine


def attention_of(transformer: Transformer, encode: Callable[[], Tensor], target: Tensor) -> Attention:
    """
    Args, Raises: as those of `attention_relevance`.
    """
    with torch.enable_grad(), _probabilities(transformer) as kept:
        cosine = F.normalize(encode().float(), dim=-1)[0] @ target.float()
    if len(kept) != len(transformer.resblocks):
        raise ValueError(
            f"{len(kept)} of {len(transformer.resblocks)} blocks showed their attention: others have been replaced"
        )
    gradients = torch.autograd.grad(cosine, kept)
    return Attention([each.detach()[0] for each in kept], [each[0] for each in gradients], cosine.detach())


def roll_out(probabilities: Sequence[Tensor], gradients: Sequence[Tensor], read: int) -> Tensor:
    """The relevances (N,) at token `read`, from each block's (H, N, N); the last may have the row of `read` alone."""
    R = torch.eye(probabilities[0].shape[-1], device=probabilities[0].device)
    for A, gradient in zip(probabilities, gradients, strict=True):
        mixed = (gradient * A).clamp(min=0).mean(dim=0).to(R.dtype)  # Ā, (N or 1, N)
        R = (R if len(mixed) == len(R) else R[read : read + 1]) + mixed @ R
    return R[0] if len(R) == 1 else R[read]


@contextmanager
def _probabilities(transformer: Transformer) -> Iterator[list[Tensor]]:
    """While it lasts, attention is computed as the textbook does, and each block's probabilities are kept.

    The list gets (B, H, N, N) for each block, or (B, H, 1, N) where the block computes the pooled token alone.
    """
    kept: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, pool: Tensor | None = None) -> Tensor:
        """`model.dot_product_attention`, step by step."""
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # (B, H, N, D/H)
        logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, N or 1, N)
        if is_causal:
            tokens = torch.arange(k.shape[2], device=k.device)
            rows = tokens[:, None] if pool is None else pool[:, None, None, None]
            logits = logits.masked_fill(tokens > rows, -math.inf)
        probabilities = logits.softmax(dim=-1)
        if not probabilities.requires_grad:  # all weights are frozen
            probabilities.requires_grad_()
        kept.append(probabilities)
        return (probabilities @ v).transpose(1, 2).flatten(2)

    def swap(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """A block calls attention(x, pool, attend)."""
        return *arguments[:2], attend

    hooks = [block.attn.register_forward_pre_hook(swap) for block in transformer.resblocks]  # type: ignore[union-attr]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
