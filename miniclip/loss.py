"""The loss that makes CLIP, and the sigmoid one that SigLIP puts in its place; each exact across processes.

CLIP's loss is six lines (paper section 2.3, figure 3). Each image picks its text among all texts of the batch, and each
text its image; row i of the logits is image i's choice, column i text i's, and the diagonal is right:

>>> import torch
>>> from torch.nn.functional import cross_entropy, normalize
>>> B, E, logit_scale = 8, 16, 1 / 0.07
>>> image_features, text_features = normalize(torch.randn(2, B, E), dim=2)

>>> logits_per_image = logit_scale * image_features @ text_features.T  # (B, B)
>>> logits_per_text = logits_per_image.T
>>> labels = torch.arange(B)
>>> image_loss = cross_entropy(logits_per_image, labels)
>>> text_loss = cross_entropy(logits_per_text, labels)
>>> loss = (image_loss + text_loss) / 2

`clip_loss` computes the same number, for batches whose (B, B) logits do not fit into memory and for pairs that lie on
several processes:

>>> torch.testing.assert_close(clip_loss(image_features, text_features, logit_scale), loss)

B pairs, of which b are this process's own (all of them, with one process), E embedding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .common.processes import log_sum_exp
from .fast.sliced_loss import LogSumExps, SigmoidLosses, gather_pairs, group_means


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
        p = gather_pairs(image_features, text_features, chunk_size, mask, groups, across_processes)
        scale = p.number(logit_scale)
        over_texts, over_images = LogSumExps.apply(p.images, p.all_texts, scale, p)
        # Of each text over all images: every process has the sum over its own.
        over_images = (log_sum_exp(over_images) if across_processes else over_images)[p.own]  # (b,)
        targets = p.texts if p.all_groups is None else group_means(p.all_texts, p.all_groups, p.all_mask)[p.own]
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
        p = gather_pairs(image_features, text_features, chunk_size, mask, groups, across_processes)
        scale, bias = p.number(logit_scale), p.number(logit_bias)
        return SigmoidLosses.apply(p.images, p.all_texts, scale, bias, p) / p.num_pairs


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
