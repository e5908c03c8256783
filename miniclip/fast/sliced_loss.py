"""The losses' logits, slice by slice, so that memory is O(B * chunk) and not O(B²), with the gradients by hand.

B pairs, of which b are this process's own (all of them, with one process), E embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.arguments import check_count, shown
from ..common.processes import counts_of_all, gather, rank_and_world_size
from ..common.tensors import check_tensor
from .matmul import product_into


@dataclass(frozen=True)
class Contrast:
    """This process's pairs, in the precision of the loss, and what they are contrasted with.

    images, texts: (b, E). all_texts: (B, E). mask, groups: (b,); all_mask, all_groups: (B,). own: this process's of B.
    num_pairs: those in the loss, a process, on average; a sum over the own divided by it is a mean over all, once
    processes are averaged. everywhere: `gather`, or nothing.
    """

    images: Tensor
    texts: Tensor
    all_texts: Tensor
    mask: Tensor | None
    all_mask: Tensor | None
    groups: Tensor | None
    all_groups: Tensor | None
    own: slice
    num_pairs: Tensor | int
    chunk_size: int
    everywhere: Callable[[Tensor], Tensor]

    def number(self, name: str, value: Tensor | float) -> Tensor:
        if value.numel() != 1 if isinstance(value, Tensor) else not hasattr(value, "__float__"):
            raise ValueError(f"{name} is {shown(value)}; it must be a number, or a tensor of one")
        return torch.as_tensor(value, dtype=self.images.dtype, device=self.images.device)


def in_full_precision(image_features: Tensor, text_features: Tensor) -> torch.autocast:
    """A context without autocast, for features that are tensors of floats."""
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        check_tensor(name, features, "floats", "features (B, E), as a model encodes them")
    return torch.autocast(image_features.device.type, enabled=False)


def gather_pairs(
    image_features: Tensor,
    text_features: Tensor,
    chunk_size: int | None,
    mask: Tensor | None,
    groups: Tensor | None,
    across_processes: bool,
) -> Contrast:
    """The arguments that the losses have in common, checked, and with those of the other processes."""
    if image_features.shape != text_features.shape or image_features.ndim != 2 or not len(image_features):
        raise ValueError(
            f"image features {tuple(image_features.shape)} and text features {tuple(text_features.shape)} "
            "must have the same shape (B, E), with B at least 1"
        )
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    if mask is not None:
        check_tensor("mask", mask, "booleans", "(B,), False for the pairs to leave out")
    if groups is not None:
        check_tensor("groups", groups, "whole numbers", "(B,), equal for the pairs that fit each other")
    # A compiled graph has no values to look at, and across processes `num_pairs` counts all of them.
    is_alone = not across_processes and not torch.compiler.is_compiling()
    is_empty = mask is not None and is_alone and not mask.any()
    for name, value in (("mask", mask), ("groups", groups)):
        if value is not None and (value.shape != image_features.shape[:1] or is_empty):
            kept = f" keeps {int(value.sum())} pairs" if name == "mask" else ""
            raise ValueError(f"{name} of shape {tuple(value.shape)}{kept}; it must be (B,) and keep one")
    rank, world_size = rank_and_world_size() if across_processes else (0, 1)
    # Gloo ends the process where counts differ. On a GPU, looking at them would have the host wait in each step.
    if world_size > 1 and image_features.is_cpu and not torch.compiler.is_compiling():
        counts = counts_of_all(len(image_features))
        if len(set(counts)) > 1:
            raise ValueError(
                f"the processes hold {', '.join(map(str, counts))} pairs, and across_processes needs as many on each; "
                "fill up with any rows, and leave those out by `mask`"
            )
    everywhere = gather if world_size > 1 else (lambda rows: rows)
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    texts, b = text_features.to(dtype), len(text_features)
    all_mask = None if mask is None else everywhere(mask)
    return Contrast(
        images=image_features.to(dtype),
        texts=texts,
        all_texts=everywhere(texts),
        mask=mask,
        all_mask=all_mask,
        groups=groups,
        all_groups=None if groups is None else everywhere(groups),
        own=slice(rank * b, (rank + 1) * b),
        num_pairs=b if all_mask is None else all_mask.sum().to(dtype) / world_size,
        chunk_size=chunk_size or b,
        everywhere=everywhere,
    )


def group_means(features: Tensor, groups: Tensor, healthy: Tensor | None) -> Tensor:
    """(B, E): for each row the mean of its group's healthy rows.

    Sums run over rows sorted by group and means are looked up as embeddings: both add in one order, whatever the number
    of threads, forwards and backwards. There is a place for as many groups as rows, so a GPU is not asked for their
    number, as `unique` would.
    """
    order = groups.argsort(stable=True)  # (B,)
    in_order = groups[order]
    nth = F.pad(in_order[1:] != in_order[:-1], (1, 0)).cumsum(dim=0)  # (B,) which group a row in order belongs to
    group = torch.empty_like(nth).scatter_(0, order, nth)  # (B,) the same, of each row
    starts = torch.searchsorted(nth, torch.arange(len(nth), device=nth.device))  # (B,); B where there is no such group
    weights = torch.ones_like(features[:, :1]) if healthy is None else healthy[:, None].to(features.dtype)  # (B, 1)
    rows = torch.cat([features * weights, weights], dim=1)
    sums = F.embedding_bag(order, rows, starts, mode="sum")  # (B, E + 1), zeros from the last group on
    return F.embedding(group, sums[:, :-1] / sums[:, -1:].clamp(min=1))


class LogSumExps(torch.autograd.Function):
    """Log-sum-exp of logits over the texts, for each image, and over the images, for each text; slice by slice.

    With one slice the logits are kept for the gradient, with more they are computed once more. All slices use the same
    memory: what is given back and asked for again many times leaves holes in a heap.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, p: Contrast) -> tuple[Tensor, Tensor]:
        """(b, E), (B, E) -> (b,), (B,)."""
        image_mask, text_mask, chunk_size = p.mask, p.all_mask, p.chunk_size
        ctx.chunk_size, ctx.masks = chunk_size, (image_mask, text_mask)
        over_texts = torch.empty_like(images[:, 0])  # (b,)
        over_images = torch.full_like(texts[:, 0], -torch.inf)  # (B,)
        logits, scratch = _slice_of_logits(images, texts, chunk_size), _slice_of_logits(images, texts, chunk_size)
        for rows in slices(len(images), chunk_size):
            part = _logits(images, texts, scale, rows, logits)  # (chunk, B)
            over_texts[rows] = _log_sum_exp(part, text_mask, 1, scratch)
            of_part = _log_sum_exp(part, image_mask if image_mask is None else image_mask[rows], 0, scratch)
            over_images = torch.logaddexp(over_images, of_part)
        kept = [logits] if chunk_size >= len(images) else []
        ctx.save_for_backward(images, texts, scale, over_texts, over_images, *kept)
        return over_texts, over_images

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, row_gradient: Tensor, column_gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, scale, over_texts, over_images, *kept = ctx.saved_tensors
        image_mask, text_mask = ctx.masks
        image_gradient, text_gradient = torch.empty_like(images), torch.zeros_like(texts)
        by_row, by_column = (_slice_of_logits(images, texts, ctx.chunk_size) for _ in range(2))
        for rows in slices(len(images), ctx.chunk_size):
            n = len(images[rows])
            logits = kept[0] if kept else _logits(images, texts, scale, rows, by_column)  # (chunk, B)
            # The gradient of a log-sum-exp is the softmax.
            gradient = torch.sub(logits, over_texts[rows, None], out=by_row[:n]).exp_().mul_(row_gradient[rows, None])
            if text_mask is not None:
                gradient.masked_fill_(~text_mask, 0)
            of_columns = torch.sub(logits, over_images, out=by_column[:n]).exp_().mul_(column_gradient)
            if image_mask is not None:
                of_columns.masked_fill_(~image_mask[rows, None], 0)
            gradient += of_columns
            product_into(image_gradient[rows], gradient, texts)
            product_into(text_gradient, gradient.T, images[rows], adds=True)
        scale_gradient = torch.linalg.vecdot(image_gradient, images).sum()
        return image_gradient.mul_(scale), text_gradient.mul_(scale), scale_gradient, None


class SigmoidLosses(torch.autograd.Function):
    """The sum of -log sigmoid(z * logit), slice by slice.

    No logit's loss depends on another logit, so its gradient is found as soon as it is, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, p: Contrast) -> Tensor:
        """(b, E), (B, E) -> a scalar."""
        is_training = any(ctx.needs_input_grad)
        loss, bias_gradient = torch.zeros_like(scale), torch.zeros_like(bias)
        image_gradient, text_gradient = torch.empty_like(images), torch.zeros_like(texts)
        memory = _slice_of_logits(images, texts, p.chunk_size)
        for rows in slices(len(images), p.chunk_size):
            # -z * logit: how far an image and a text are on the wrong side.
            logits = _logits(images, texts, scale, rows, memory).add_(bias)  # (chunk, B)
            wrong = _negate_pairs(logits, rows, p)
            if p.mask is not None and p.all_mask is not None:
                wrong.masked_fill_(~(p.mask[rows, None] & p.all_mask), -torch.inf)
            # -log sigmoid(-x) is softplus(x), which is x to the last bit of float64 from 40 on.
            loss = loss + F.softplus(wrong, threshold=40).sum()  # `+=` loses the gradient where PyTorch 2.11 compiles
            if is_training:
                gradient = _negate_pairs(wrong.sigmoid_(), rows, p)
                bias_gradient += gradient.sum()
                product_into(image_gradient[rows], gradient, texts)
                product_into(text_gradient, gradient.T, images[rows], adds=True)
        if is_training:
            scale_gradient = torch.linalg.vecdot(image_gradient, images).sum()
            ctx.save_for_backward(image_gradient.mul_(scale), text_gradient.mul_(scale), scale_gradient, bias_gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradient * found for found in ctx.saved_tensors), None)


def _negate_pairs(matrix: Tensor, rows: slice, p: Contrast) -> Tensor:
    """Some rows of a (b, B) matrix, in place, with the other sign where image and text fit."""
    if p.groups is None or p.all_groups is None:
        matrix.diagonal(p.own.start + rows.start).neg_()
        return matrix
    return matrix.mul_(torch.where(p.groups[rows, None] == p.all_groups, -1.0, 1.0))


def slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _slice_of_logits(images: Tensor, texts: Tensor, chunk_size: int) -> Tensor:
    return images.new_empty(min(chunk_size, len(images)), len(texts))


def _logits(images: Tensor, texts: Tensor, scale: Tensor, rows: slice, out: Tensor) -> Tensor:
    """(chunk, B), in the memory of `out`."""
    some = scale * images[rows]
    product_into(out[: len(some)], some, texts.T)
    return out[: len(some)]


def _log_sum_exp(logits: Tensor, mask: Tensor | None, side: int, scratch: Tensor) -> Tensor:
    """Along a side of (n, B), of what the mask says yes to there; computed in the memory of `scratch`."""
    scratch = scratch[: len(logits)]
    if mask is not None:  # the least number, not -inf, as inf - inf is no number
        logits = scratch.copy_(logits).masked_fill_(~mask.unsqueeze(1 - side), torch.finfo(logits.dtype).min)
    most = logits.amax(dim=side, keepdim=True)
    return torch.sub(logits, most, out=scratch).exp_().sum(dim=side).log_() + most.squeeze(side)
