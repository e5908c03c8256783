"""After fine-tuning: weights between the start and the end (WiSE-FT, Wortsman et al. 2021,
https://arxiv.org/abs/2109.01903).

A model that was fine-tuned on one task has forgotten some of the others. The straight line between its weights and
those that it started from passes through models that are good at both, often better at the new task than its end. Any
of them costs what one model costs.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from ..config import differences
from ..model import CLIP
from ..weights.load import preprocess_for
from .datasets.sets import LabelledImages
from .measures.statistics import difference_interval
from .prompts import suited
from .zero_shot import ClassificationScores, zero_shot_scores

_PIXELS = ("preprocess", "resize", "resize_size", "interpolation", "mean", "std")  # of `VisionConfig`: no architecture


def interpolate(start: CLIP, finetuned: CLIP, alpha: float) -> CLIP:
    """A new model of the weights (1 - alpha) * start + alpha * finetuned.

    It prepares pictures as the fine-tuned one does; a warning says so where the start does otherwise.

    Args:
        alpha: 0 gives the start, 1 the fine-tuned model, both bit for bit.

    Raises:
        ValueError: two architectures (names what differs), or alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be from 0, the start, to 1, the fine-tuned model")
    end = finetuned.config
    own, others = ({field: getattr(config.vision, field) for field in _PIXELS} for config in (end, start.config))
    prepared = replace(start.config, init_logit_scale=end.init_logit_scale, vision=replace(start.config.vision, **own))
    if prepared != end:
        lines = differences(prepared.to_dict(), end.to_dict(), "config", ("the start has", "the fine-tuned model"))
        raise ValueError("only models of one architecture can be interpolated, and these differ:\n" + "\n".join(lines))
    if own != others:
        lines = differences(others, own, "config.vision", ("the start has", "the fine-tuned model"))
        warnings.warn(
            "pictures are prepared as for the fine-tuned model, and for the start they were not: "
            + "; ".join(map(str.strip, lines)),
            stacklevel=1,  # one place, so that a sweep says it once
        )
    model = copy.deepcopy(finetuned)
    ends = start.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():  # batch norm's counts are no weights
                tensor.copy_(torch.lerp(ends[name].to(tensor), tensor, alpha))
    return model


class Loss(NamedTuple):
    """What a model lost of an old task, against the start.

    Args:
        num_images: that both could read.
        num_lost, num_gained: of them the start alone, and the model alone, got right.
        most: the upper end of the 95 % interval of `share`, `difference_interval`.
    """

    num_images: int
    num_lost: int
    num_gained: int
    most: float

    @property
    def share(self) -> float:
        """The start's accuracy less the model's."""
        return (self.num_lost - self.num_gained) / self.num_images


@dataclass(frozen=True)
class Point:
    """One model on the way: its top-1 on each new task, and on each old one, as shares of 1.

    Args:
        losses: on each old task; none of the start.
    """

    alpha: float
    new: tuple[float, ...]
    old: tuple[float, ...]
    losses: tuple[Loss, ...] = ()

    @property
    def mean(self) -> float:
        """Of the new tasks' mean and the old tasks' mean."""
        return (sum(self.new) / len(self.new) + sum(self.old) / len(self.old)) / 2

    @property
    def most_lost(self) -> float:
        """The upper end of the 95 % interval of the old tasks' mean loss, a share of 1; 0 for the start.

        The tasks' intervals are squared and added.
        """
        if not self.losses:
            return 0.0
        above = math.hypot(*(loss.most - loss.share for loss in self.losses))
        return (sum(loss.share for loss in self.losses) + above) / len(self.losses)


def sweep(
    start: CLIP,
    finetuned: CLIP,
    new: Sequence[LabelledImages],
    old: Sequence[LabelledImages],
    alphas: Sequence[float],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> list[Point]:
    """Zero-shot scores of the models at `alphas`, in rising order and with both ends.

    Pictures are prepared as for `finetuned`, for the start too. Prompts that nobody chose are in its wordings, which
    `interpolate` hands on.

    Raises:
        ValueError: as `interpolate` and `zero_shot_scores`.
    """
    preprocess = preprocess_for(finetuned.config)
    # The same prompts for all models of the way, the start too: what changes is the weights.
    new, old = ([suited(data, finetuned.wordings) for data in sets] for sets in (new, old))
    points: list[Point] = []
    first: list[ClassificationScores] = []  # the start's, on the old tasks
    for alpha in sorted({0.0, 1.0, *alphas}):
        model = interpolate(start, finetuned, alpha).eval()
        found = [
            zero_shot_scores(model, preprocess, data, batch_size=batch_size, num_workers=num_workers)
            for data in (*new, *old)
        ]
        first = first or found[len(new) :]
        shares = [float(scores.is_right.mean()) for scores in found]
        losses = tuple(map(_loss, first, found[len(new) :])) if alpha else ()
        points.append(Point(alpha, tuple(shares[: len(new)]), tuple(shares[len(new) :]), losses))
        if progress:
            progress(len(points))
    return points


def _loss(before: ClassificationScores, after: ClassificationScores) -> Loss:
    # Over a network, an image may be read once and not again.
    _, rows, rows_after = np.intersect1d(before.indices, after.indices, return_indices=True)
    first, second = before.is_right[rows], after.is_right[rows_after]
    lost, gained = first & ~second, second & ~first
    most = -difference_interval(gained, lost, before.groups[rows])[0]
    return Loss(len(rows), int(lost.sum()), int(gained.sum()), most)


def best(points: Sequence[Point], may_lose: float | None = None) -> Point:
    """Of the highest mean of new and old; of equals the one nearest to the start, which changes least.

    Args:
        may_lose: instead, the highest on the new tasks of those whose mean on the old ones is at most this much (a
            share of 1) below the start's.
    """
    if may_lose is None:
        return max(points, key=lambda point: (point.mean, -point.alpha))
    (start,) = (point for point in points if point.alpha == 0)
    # What rounding does to a mean is no loss.
    allowed = [point for point in points if sum(point.old) >= sum(start.old) - len(start.old) * (may_lose + 1e-9)]
    return max(allowed, key=lambda point: (sum(point.new), -point.alpha))
