"""The contrastive loss: symmetric cross-entropy over cosines (paper section 2.3, figure 3), exact over processes.

B pairs, of which b are this process's own (all of them, where there is but one), E embedding.
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
    if image_features.shape != text_features.shape or image_features.ndim != 2 or not len(image_features):
        raise ValueError(
            f"image features {tuple(image_features.shape)} and text features {tuple(text_features.shape)} "
            "must have the same shape (B, E), with B at least 1"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1, or None for no chunks")
    is_empty = mask is not None and not across_processes and not mask.any()  # of all processes, the sum below tells
    for name, value in (("mask", mask), ("groups", groups)):
        if value is not None and (value.shape != image_features.shape[:1] or is_empty):
            kept = f" keeps {int(value.sum())} pairs" if name == "mask" else ""
            raise ValueError(f"{name} of shape {tuple(value.shape)}{kept}; it must be (B,) and keep one")
    with torch.autocast(image_features.device.type, enabled=False):
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        images, texts = image_features.to(dtype), text_features.to(dtype)
        scale = torch.as_tensor(logit_scale, dtype=dtype, device=images.device)
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if across_processes and _has_processes() else (0, 1)
        b = len(images)
        own = slice(rank * b, (rank + 1) * b)
        everywhere = gather if world_size > 1 else (lambda rows: rows)

        all_texts = everywhere(texts)  # (B, E)
        all_healthy = None if mask is None else everywhere(mask)  # (B,)
        over_texts, over_images = _LogSumExps.apply(images, all_texts, scale, mask, all_healthy, chunk_size or b)
        # Of each text over all images: every process has the sum over its own.
        over_images = everywhere(over_images[None]).logsumexp(dim=0)[own]  # (b,)
        targets = texts if groups is None else _group_means(all_texts, everywhere(groups), all_healthy)[own]
        agreement = scale * (images * targets).sum(dim=-1)  # (b,), with its own text, or on average with its group's
        losses = (over_texts + over_images) / 2 - agreement
        if mask is None or all_healthy is None:
            return losses.mean()
        return losses.where(mask, 0).sum() * world_size / all_healthy.sum()


def _group_means(features: Tensor, groups: Tensor, healthy: Tensor | None) -> Tensor:
    """(B, E): for each row the mean of its group's healthy rows."""
    _, numbers = groups.unique(return_inverse=True)  # (B,)
    weights = torch.ones_like(features[:, 0]) if healthy is None else healthy.to(features.dtype)
    sums = torch.zeros_like(features).index_add(0, numbers, features * weights[:, None])
    counts = torch.zeros_like(weights).index_add(0, numbers, weights).clamp(min=1)
    return (sums / counts[:, None])[numbers]


class _LogSumExps(torch.autograd.Function):
    """Log-sum-exp of logits over the texts, for each image, and over the images, for each text; slice by slice.

    With one slice the logits are kept for the gradient, with more they are computed once more.
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
        over_texts, parts = [], []
        kept = None
        for rows in _slices(len(images), chunk_size):
            logits = _logits(images, texts, scale, rows)  # (chunk, B)
            kept = logits if chunk_size >= len(images) else None
            over_texts.append(_masked(logits, text_mask, 1).logsumexp(dim=1))
            parts.append(_masked(logits, image_mask if image_mask is None else image_mask[rows], 0).logsumexp(dim=0))
            del logits
        out = torch.cat(over_texts), torch.stack(parts).logsumexp(dim=0)
        ctx.save_for_backward(images, texts, scale, *out, *([] if kept is None else [kept]))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, row_gradient: Tensor, column_gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, texts, scale, over_texts, over_images, *kept = ctx.saved_tensors
        image_mask, text_mask = ctx.masks
        image_gradient, text_gradient = torch.empty_like(images), torch.zeros_like(texts)
        scale_gradient = torch.zeros_like(scale)
        for rows in _slices(len(images), ctx.chunk_size):
            logits = kept[0] if kept else _logits(images, texts, scale, rows)  # (chunk, B)
            # The gradient of a log-sum-exp is the softmax.
            gradient = (logits - over_texts[rows, None]).exp_().mul_(row_gradient[rows, None])
            if text_mask is not None:
                gradient.masked_fill_(~text_mask, 0)
            by_column = (logits - over_images).exp_().mul_(column_gradient)
            if image_mask is not None:
                by_column.masked_fill_(~image_mask[rows, None], 0)
            gradient += by_column
            scale_gradient += torch.linalg.vecdot(gradient, logits).sum() / scale
            torch.mm(gradient, texts, out=image_gradient[rows])
            text_gradient.addmm_(gradient.T, images[rows])
        return image_gradient.mul_(scale), text_gradient.mul_(scale), scale_gradient, None, None, None


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _logits(images: Tensor, texts: Tensor, scale: Tensor, rows: slice) -> Tensor:
    return (scale * images[rows]) @ texts.T


def _masked(logits: Tensor, mask: Tensor | None, side: int) -> Tensor:
    """The least number where the mask says no along a side; not -inf, as inf - inf is no number."""
    if mask is None:
        return logits
    return logits.masked_fill(~mask.unsqueeze(1 - side), torch.finfo(logits.dtype).min)


def _has_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather(rows: Tensor) -> Tensor:
    """The rows of every process, in the order of their ranks: (b, …) -> (B, …). As they are, without processes.

    Differentiable: the gradient of a row is the sum over all processes.
    """
    return _Gather.apply(rows) if _has_processes() else rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


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
    student, teacher = (image_features, text_features), (teacher_image_features, teacher_text_features)
    for whose, (images, texts) in (("student", student), ("teacher", teacher)):
        if images.shape != texts.shape or images.ndim != 2 or len(images) != len(image_features) or not len(images):
            raise ValueError(
                f"the {whose}'s image features {tuple(images.shape)} and text features {tuple(texts.shape)} must have "
                f"the same shape, with as many rows as there are pairs, {len(image_features)}, and at least 1"
            )
    if mask is not None and (mask.shape != image_features.shape[:1] or (not across_processes and not mask.any())):
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} keeps {int(mask.sum())} pairs; it must be (B,) and keep one"
        )
    with torch.autocast(image_features.device.type, enabled=False):
        dtype = torch.promote_types(image_features.dtype, torch.float32)
        is_shared = across_processes and _has_processes()
        everywhere = gather if is_shared else (lambda rows: rows)
        b = len(image_features)
        own = [features.to(dtype) for features in (*student, *(t.detach() for t in teacher))]
        images, texts, teacher_images, teacher_texts = own
        all_images, all_texts, all_teacher_images, all_teacher_texts = map(everywhere, own)
        healthy = None if mask is None else everywhere(mask)  # (B,)
        scales = [
            torch.as_tensor(scale, dtype=dtype, device=images.device)
            for scale in (logit_scale, torch.as_tensor(teacher_logit_scale).detach())
        ]
        losses = images.new_zeros(b)
        for mine, others, teachers, teachers_others in (
            (images, all_texts, teacher_images, all_teacher_texts),
            (texts, all_images, teacher_texts, all_teacher_images),
        ):
            parts = []
            for rows in _slices(b, chunk_size or b):
                inputs = (mine[rows], others, teachers[rows], teachers_others, *scales, healthy)
                if chunk_size is None or chunk_size >= b:
                    parts.append(_cross_entropy(*inputs))
                else:  # logits are computed again for the gradient
                    parts.append(checkpoint(_cross_entropy, *inputs, use_reentrant=False, preserve_rng_state=False))
            losses = losses + torch.cat(parts) / 2
        if mask is None or healthy is None:
            return losses.mean()
        world_size = dist.get_world_size() if is_shared else 1
        return losses.where(mask, 0).sum() * world_size / healthy.sum()


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
