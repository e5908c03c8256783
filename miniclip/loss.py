"""The loss that makes CLIP, and the sigmoid one that SigLIP puts in its place; each exact across processes.

CLIP's loss is six lines (paper section 2.3, figure 3). Each image picks its text among all texts of the batch, and each
text its image. Row i of the logits scores all texts for image i, column i all images for text i; i is the right one:

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

from torch import Tensor

from .common.processes import log_sum_exp
from .fast.sliced_loss import LogSumExps, SigmoidLosses, gather_pairs, group_means, in_full_precision


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    chunk_size: int | None = None,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    across_processes: bool = False,
) -> Tensor:
    """Cross-entropy of each image's choice among all texts and each text's among all images; ln B is chance.

    It is computed in at least float32 whatever the autocast: near the usual logit of 50, bfloat16's spacing is 0.25.

    Args:
        image_features, text_features: (b, E), of unit length; row i of one belongs to row i of the other.
        logit_scale: inverse temperature, already exponentiated.
        chunk_size: images per slice of the (b, B) logits. Only one slice is held at a time and computed again
            for the gradient, so memory is O(B * chunk_size) instead of O(b * B); the numbers are the same.
        mask: (b,) bool; False takes a pair out altogether, its row and its column.
        groups: (b,) whole numbers; each image of a group fits each of its texts, and the target is shared evenly
            among them (as in Khosla et al. 2020, eq. 2). By default every pair is a group of its own. A group whose
            texts are all equal, or whose images are, changes nothing: the softmax gives equal ones equal shares.
        across_processes: contrast the pairs of all processes, b on each. Every process returns its own pairs' share
            times the number of processes, so the average over processes, which DDP takes of gradients, is that of one
            process with all pairs. Each process computes its b rows of logits and no more. One with fewer pairs fills
            up with any rows and leaves them out by `mask`: unequal numbers are refused on CPUs, and on GPUs, where a
            look at them would stop the host in each step, what NCCL does is not defined.

    Returns:
        A scalar, the mean over pairs and both directions.

    Raises:
        ValueError: features that are no floats or do not pair up, no pairs, a mask that leaves none, or (on CPUs)
            unequal numbers of pairs on the processes.
    """
    with in_full_precision(image_features, text_features):
        p = gather_pairs(image_features, text_features, chunk_size, mask, groups, across_processes)
        scale = p.number("logit_scale", logit_scale)
        over_texts, over_images = LogSumExps.apply(p.images, p.all_texts, scale, p)
        # over_texts is (b,), over_images is (B,): a process has each text's sum over its own images only. p.own are its
        # b of the B pairs; p.images and p.texts are (b, E), p.all_texts is (B, E).
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
    """The sum of -log sigmoid(z * logit) over all B * B logits, divided by B; z is 1 for a pair and -1 for all else.

    A logit is the scaled cosine plus the bias (Zhai et al. 2023, equation 1 and algorithm 1). The loss is computed in
    at least float32 whatever the autocast. `siglip_chance` gives its value at chance.

    Args:
        image_features, text_features, logit_scale, mask, across_processes: as in `clip_loss`.
        logit_bias: added to the scaled cosines.
        chunk_size: images per slice of the (b, B) logits; one is held at a time, and none is computed twice.
        groups: (b,) whole numbers; each image of a group fits each of its texts (z = 1). By default a pair is alone,
            and pairs of equal texts are pushed apart (z = -1).

    Returns:
        A scalar, the sum over the images and texts that the mask leaves, divided by the number of those pairs.

    Raises:
        ValueError: as `clip_loss`, or no bias.
    """
    if logit_bias is None:  # what a CLIP without one has
        raise ValueError("logit_bias is None; the sigmoid loss needs one: a model has it if its init_logit_bias is set")
    with in_full_precision(image_features, text_features):
        p = gather_pairs(image_features, text_features, chunk_size, mask, groups, across_processes)
        scale, bias = p.number("logit_scale", logit_scale), p.number("logit_bias", logit_bias)
        return SigmoidLosses.apply(p.images, p.all_texts, scale, bias, p) / p.num_pairs


def siglip_chance(num_pairs: int, groups: Tensor | None = None) -> float:
    """The least `siglip_loss` if all logits are equal and features have no influence: about ln B + 1 for large B.

    A share s of the B * B combinations of an image and a text fits (1 / B, without groups). The best common logit gives
    each combination the probability s, at a cost of the entropy of s; there are B combinations a pair. A new model may
    be above that, as its bias decides: how rare pairs are is soon learnt, without anything about images.

    Args:
        num_pairs: B.
        groups: (B,), as in `siglip_loss`.
    """
    num_fitting = num_pairs if groups is None else int(groups.unique(return_counts=True)[1].square().sum())
    share = num_fitting / num_pairs**2
    if share == 1:
        return 0.0
    return num_pairs * -(share * math.log(share) + (1 - share) * math.log1p(-share))
