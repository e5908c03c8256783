"""A student learns from a teacher's choices among the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .fast.sliced_loss import gather_pairs, slices


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
        s = gather_pairs(image_features, text_features, chunk_size, mask, None, across_processes)
        taught_images = teacher_image_features.detach().to(s.images.dtype)
        taught_texts = teacher_text_features.detach().to(s.images.dtype)
        t = gather_pairs(taught_images, taught_texts, chunk_size, mask, None, across_processes)
        scales = s.number(logit_scale), s.number(teacher_logit_scale).detach()
        losses = torch.zeros_like(s.images[:, 0])  # (b,)
        for mine, others, taught, taught_others in (
            (s.images, s.all_texts, t.images, t.all_texts),
            (s.texts, s.everywhere(s.images), t.texts, s.everywhere(t.images)),
        ):
            parts = []
            for rows in slices(len(losses), s.chunk_size):
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


def _masked(logits: Tensor, mask: Tensor | None, side: int) -> Tensor:
    """The least number where the mask says no along a side; not -inf, as inf - inf is no number."""
    if mask is None:
        return logits
    return logits.masked_fill(~mask.unsqueeze(1 - side), torch.finfo(logits.dtype).min)
