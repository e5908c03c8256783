"""The contrastive losses, each exact over processes.

- CLIP's: each image picks its text among all and each text its image, cross-entropy over cosines (paper section 2.3,
  figure 3).
- SigLIP's: each image and text fit or do not, whatever the others do (Zhai et al. 2023,
  https://arxiv.org/abs/2303.15343).

B pairs, of which b are this process's own (all of them, where there is but one), E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .processes import gather, log_sum_exp, place


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    across_processes: bool = False,
) -> Tensor:
    """How badly images pick their texts among all, and texts their images; ln B is chance.

    Computed in at least float32 whatever the autocast: near the usual logit of 50, bfloat16's spacing is 0.25.

    Args:
        image_features, text_features: (b, E), of unit length; row i of one belongs to row i of the other.
        logit_scale: inverse temperature, already exponentiated.
        chunk_size: images per slice of the (b, B) logits. Only one slice is held at a time and computed again
            for the gradient, so memory is O(B * chunk_size) instead of O(b * B); the numbers are the same.
        mask: (b,) bool; False takes a pair out altogether, its row and its column.
        groups: (b,) whole numbers; pairs of one number belong to each other as well, and the target is shared evenly
            among them (as in Khosla et al. 2020, eq. 2). By default every pair for itself.
        across_processes: contrast the pairs of all processes, equally many on each. Every process gets its own pairs'
            share times the number of processes; averaged over them, as DDP averages gradients, loss and gradients
            are those of one process with all pairs. Each computes its b rows of logits and no more.

    Returns:
        A scalar, the mean over pairs and both directions.

    Raises:
        ValueError: shapes that do not pair up, no pairs, or a mask that leaves none.
    """
    with torch.autocast(image_features.device.type, enabled=False):
        p = _gathered(image_features, text_features, chunk_size, mask, groups, across_processes)
        scale = p.number(logit_scale)
        over_texts, over_images = _LogSumExps.apply(p.images, p.all_texts, scale, p.mask, p.all_mask, p.chunk_size)
        # Of each text over all images: every process has the sum over its own.
        over_images = (log_sum_exp(over_images) if across_processes else over_images)[p.own]  # (b,)
        targets = p.texts if p.all_groups is None else _group_means(p.all_texts, p.all_groups, p.all_mask)[p.own]
        agreement = scale * (p.images * targets).sum(dim=-1)  # (b,), with its own text, or on average with its group's
        losses = (over_texts + over_images) / 2 - agreement
        if p.mask is None:
            return losses.mean()
        return losses.where(p.mask, 0).sum() / p.num_pairs


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    across_processes: bool = False,
) -> Tensor:
    """How badly images and texts tell whether they fit: -log sigmoid(z * logit), z 1 for a pair and -1 for all else.

    A logit is the scaled cosine plus the bias. Summed over all B * B of them and divided by B (Zhai et al. 2023,
    equation 1 and algorithm 1), in at least float32 whatever the autocast. `siglip_chance` is chance.

    Args:
        image_features, text_features, logit_scale, mask, across_processes: as in `clip_loss`.
        logit_bias: added to the scaled cosines.
        chunk_size: images per slice of the (b, B) logits; one is held at a time, and none is computed twice.
        groups: (b,) whole numbers; pairs of one number fit each other as well. By default every pair for itself.

    Returns:
        A scalar, the sum over images and texts that the mask leaves, per pair.

    Raises:
        ValueError: as `clip_loss`, or no bias.
    """
    if logit_bias is None:  # what a CLIP without one has
        raise ValueError("logit_bias is None; the sigmoid loss needs one: a model has it if its init_logit_bias is set")
    with torch.autocast(image_features.device.type, enabled=False):
        p = _gathered(image_features, text_features, chunk_size, mask, groups, across_processes)
        scale, bias = p.number(logit_scale), p.number(logit_bias)
        return _SigmoidLosses.apply(p.images, p.all_texts, scale, bias, p) / p.num_pairs


def siglip_chance(num_pairs: int, groups: Tensor | None = None) -> float:
    """The least `siglip_loss` of logits that are all the same, so that features say nothing: ln B + 1 for large B.

    Of B * B images and texts a share s fits (1 / B, without groups). The best that one logit for all can do is to give
    each of them the probability s, which costs the entropy of s, B times a pair. Where a model begins
    depends on its bias, and may be above that: how rare pairs are is soon learnt, and tells nothing about images.

    Args:
        num_pairs: B.
        groups: (B,), as in `siglip_loss`.
    """
    num_fitting = num_pairs if groups is None else int(groups.unique(return_counts=True)[1].square().sum())
    share = num_fitting / num_pairs**2
    if share == 1:
        return 0.0
    return num_pairs * -(share * math.log(share) + (1 - share) * math.log1p(-share))


@dataclass(frozen=True)
class _Pairs:
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

    def number(self, value: Tensor | float) -> Tensor:
        return torch.as_tensor(value, dtype=self.images.dtype, device=self.images.device)


def _gathered(
    image_features: Tensor,
    text_features: Tensor,
    chunk_size: int | None,
    mask: Tensor | None,
    groups: Tensor | None,
    across_processes: bool,
) -> _Pairs:
    """The arguments that the losses have in common, checked, and with those of the other processes."""
    if image_features.shape != text_features.shape or image_features.ndim != 2 or not len(image_features):
        raise ValueError(
            f"image features {tuple(image_features.shape)} and text features {tuple(text_features.shape)} "
            "must have the same shape (B, E), with B at least 1"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1, or None for no chunks")
    is_empty = mask is not None and not across_processes and not mask.any()  # of all processes, the number below tells
    for name, value in (("mask", mask), ("groups", groups)):
        if value is not None and (value.shape != image_features.shape[:1] or is_empty):
            kept = f" keeps {int(value.sum())} pairs" if name == "mask" else ""
            raise ValueError(f"{name} of shape {tuple(value.shape)}{kept}; it must be (B,) and keep one")
    rank, world_size = place() if across_processes else (0, 1)
    everywhere = gather if world_size > 1 else (lambda rows: rows)
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    texts, b = text_features.to(dtype), len(text_features)
    all_mask = None if mask is None else everywhere(mask)
    return _Pairs(
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


def _group_means(features: Tensor, groups: Tensor, healthy: Tensor | None) -> Tensor:
    """(B, E): for each row the mean of its group's healthy rows."""
    _, numbers = groups.unique(return_inverse=True)  # (B,)
    weights = torch.ones_like(features[:, 0]) if healthy is None else healthy.to(features.dtype)
    sums = torch.zeros_like(features).index_add(0, numbers, features * weights[:, None])
    counts = torch.zeros_like(weights).index_add(0, numbers, weights).clamp(min=1)
    return (sums / counts[:, None])[numbers]


class _LogSumExps(torch.autograd.Function):
    """Log-sum-exp of logits over the texts, for each image, and over the images, for each text; slice by slice.

    With one slice the logits are kept for the gradient, with more they are computed once more. All slices use the same
    memory: what is given back and asked for again many times leaves holes in a heap.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        image_mask: Tensor | None,
        text_mask: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        """(b, E), (B, E) -> (b,), (B,)."""
        ctx.chunk_size, ctx.masks = chunk_size, (image_mask, text_mask)
        over_texts = torch.empty_like(images[:, 0])  # (b,)
        over_images = torch.full_like(texts[:, 0], -torch.inf)  # (B,)
        logits, scratch = _slice_of_logits(images, texts, chunk_size), _slice_of_logits(images, texts, chunk_size)
        for rows in _slices(len(images), chunk_size):
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
        for rows in _slices(len(images), ctx.chunk_size):
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
            torch.mm(gradient, texts, out=image_gradient[rows])
            text_gradient.addmm_(gradient.T, images[rows])
        scale_gradient = torch.linalg.vecdot(image_gradient, images).sum()
        return image_gradient.mul_(scale), text_gradient.mul_(scale), scale_gradient, None, None, None


class _SigmoidLosses(torch.autograd.Function):
    """The sum of -log sigmoid(z * logit), slice by slice.

    No logit's loss depends on another logit, so its gradient is found as soon as it is, and nothing is computed twice.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, p: _Pairs) -> Tensor:
        """(b, E), (B, E) -> a scalar."""
        is_training = any(ctx.needs_input_grad)
        loss, bias_gradient = torch.zeros_like(scale), torch.zeros_like(bias)
        image_gradient, text_gradient = torch.empty_like(images), torch.zeros_like(texts)
        memory = _slice_of_logits(images, texts, p.chunk_size)
        for rows in _slices(len(images), p.chunk_size):
            # -z * logit: how far an image and a text are on the wrong side.
            logits = _logits(images, texts, scale, rows, memory).add_(bias)  # (chunk, B)
            wrong = _with_pairs_turned(logits, rows, p)
            if p.mask is not None and p.all_mask is not None:
                wrong.masked_fill_(~(p.mask[rows, None] & p.all_mask), -torch.inf)
            # -log sigmoid(-x) is softplus(x), which is x to the last bit of float64 from 40 on.
            loss += F.softplus(wrong, threshold=40).sum()
            if is_training:
                gradient = _with_pairs_turned(wrong.sigmoid_(), rows, p)
                bias_gradient += gradient.sum()
                torch.mm(gradient, texts, out=image_gradient[rows])
                text_gradient.addmm_(gradient.T, images[rows])
        if is_training:
            scale_gradient = torch.linalg.vecdot(image_gradient, images).sum()
            ctx.save_for_backward(image_gradient.mul_(scale), text_gradient.mul_(scale), scale_gradient, bias_gradient)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*(gradient * found for found in ctx.saved_tensors), None)


def _with_pairs_turned(matrix: Tensor, rows: slice, p: _Pairs) -> Tensor:
    """Some rows of a (b, B) matrix, in place, with the other sign where image and text fit."""
    if p.groups is None or p.all_groups is None:
        matrix.diagonal(p.own.start + rows.start).neg_()
        return matrix
    return matrix.mul_(torch.where(p.groups[rows, None] == p.all_groups, -1.0, 1.0))


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _slice_of_logits(images: Tensor, texts: Tensor, chunk_size: int) -> Tensor:
    return images.new_empty(min(chunk_size, len(images)), len(texts))


def _logits(images: Tensor, texts: Tensor, scale: Tensor, rows: slice, out: Tensor) -> Tensor:
    """(chunk, B), in the memory of `out`."""
    some = scale * images[rows]
    return torch.mm(some, texts.T, out=out[: len(some)])


def _log_sum_exp(logits: Tensor, mask: Tensor | None, side: int, scratch: Tensor) -> Tensor:
    """Along a side of (n, B), of what the mask says yes to there; computed in the memory of `scratch`."""
    x = scratch[: len(logits)].copy_(logits)
    if mask is not None:  # the least number, not -inf, as inf - inf is no number
        x.masked_fill_(~mask.unsqueeze(1 - side), torch.finfo(x.dtype).min)
    most = x.amax(dim=side, keepdim=True)
    return x.sub_(most).exp_().sum(dim=side).log_() + most.squeeze(side)


def _masked(logits: Tensor, mask: Tensor | None, side: int) -> Tensor:
    """The least number where the mask says no along a side; not -inf, as inf - inf is no number."""
    if mask is None:
        return logits
    return logits.masked_fill(~mask.unsqueeze(1 - side), torch.finfo(logits.dtype).min)


def distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    across_processes: bool = False,
) -> Tensor:
    """How far a student's choices among the batch are from a teacher's: cross-entropy of one softmax to the other.

    For each image the teacher says how likely each text of the batch is, for each text each image; the student is to
    say the same ("affinity mimicking" of TinyCLIP, Wu et al. 2023, section 3.1, https://arxiv.org/abs/2309.12314;
    "contrastive relational distillation" of CLIP-KD, Yang et al. 2024, https://arxiv.org/abs/2307.12732). The least
    value is the teacher's own entropy, and there the gradient is zero. Computed in at least float32.

    Args:
        image_features, text_features: (b, E), of unit length, the student's.
        teacher_image_features, teacher_text_features: (b, F), of unit length, of the same pairs; they get no gradient.
        logit_scale, teacher_logit_scale: inverse temperatures, already exponentiated.
        chunk_size: rows of the (b, B) logits that are in memory at a time, by default all.
        mask, across_processes: as in `clip_loss`.

    Returns:
        A scalar, the mean over pairs and both directions.

    Raises:
        ValueError: shapes that do not pair up, or a mask that leaves no pair.
    """
    if len(teacher_image_features) != len(image_features):
        raise ValueError(
            f"the teacher's features are of {len(teacher_image_features)} pairs, not {len(image_features)}"
        )
    with torch.autocast(image_features.device.type, enabled=False):
        s = _gathered(image_features, text_features, chunk_size, mask, None, across_processes)
        taught_images = teacher_image_features.detach().to(s.images.dtype)
        taught_texts = teacher_text_features.detach().to(s.images.dtype)
        t = _gathered(taught_images, taught_texts, chunk_size, mask, None, across_processes)
        scales = s.number(logit_scale), s.number(teacher_logit_scale).detach()
        losses = torch.zeros_like(s.images[:, 0])  # (b,)
        for mine, others, taught, taught_others in (
            (s.images, s.all_texts, t.images, t.all_texts),
            (s.texts, s.everywhere(s.images), t.texts, s.everywhere(t.images)),
        ):
            parts = []
            for rows in _slices(len(losses), s.chunk_size):
                inputs = (mine[rows], others, taught[rows], taught_others, *scales, s.all_mask)
                if s.chunk_size >= len(losses):
                    parts.append(_cross_entropy(*inputs))
                else:  # logits are computed again for the gradient
                    parts.append(checkpoint(_cross_entropy, *inputs, use_reentrant=False, preserve_rng_state=False))
            losses = losses + torch.cat(parts) / 2
        return losses.mean() if s.mask is None else losses.where(s.mask, 0).sum() / s.num_pairs


def _cross_entropy(
    own: Tensor,
    others: Tensor,
    teachers_own: Tensor,
    teachers_others: Tensor,
    scale: Tensor,
    teacher_scale: Tensor,
    healthy: Tensor | None,
) -> Tensor:
    """(n, E), (B, E) of the student and (n, F), (B, F) of the teacher -> (n,)."""
    wanted = _masked((teacher_scale * teachers_own) @ teachers_others.T, healthy, 1).softmax(dim=1)  # (n, B)
    found = _masked((scale * own) @ others.T, healthy, 1).log_softmax(dim=1)
    return -torch.linalg.vecdot(wanted, found)
