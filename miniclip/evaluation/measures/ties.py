"""Which of nearly equal scores comes first: never the one that rounding favours.

Equal features, encoded in different batches or by different machines, have cosines that differ in their last bits. All
comparisons of scores here therefore treat what is closer than `SAME` as equal, and say what equal scores mean.

N images, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SAME = 4e-7  # cosines of equal unit features in float32 differ by less, whatever the batch, threads or machine


def first_of_best(scores: np.ndarray) -> np.ndarray:
    """(N,) the class of the highest score (N, C); of equal scores the first class."""
    best = scores.max(axis=1, keepdims=True)
    return (scores >= best - SAME * np.maximum(1, np.abs(best))).argmax(axis=1)


def rank_classes(cosines: Tensor, k: int) -> Tensor:
    """(N, k) classes by falling cosine (N, C); equal ones by their index."""
    top, ranked = cosines.topk(min(k + 1, cosines.shape[1]), dim=-1)
    is_tied = (top.diff(dim=-1) >= -SAME).any(dim=-1)  # the k-th may tie with a class that is not among the top k + 1
    if is_tied.any():
        falling, order = cosines[is_tied].sort(dim=-1, descending=True)
        # Equal scores share a level, counted from the highest; sorting by index first and by level then is stable.
        level = torch.cat([torch.zeros_like(order[:, :1]), (falling.diff(dim=-1) < -SAME).cumsum(dim=-1)], dim=-1)
        by_index = torch.empty_like(level).scatter_(1, order, level)  # the level of each class
        ranked[is_tied] = by_index.argsort(dim=-1, stable=True)[:, : ranked.shape[1]]
    return ranked[:, :k]
