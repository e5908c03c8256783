"""Split conformal prediction: quantiles that keep a promise about fresh images, and sets of classes by them.

The promise: if fresh images come from where the chosen ones did, at least the stated share of fresh sets holds the true
class (Angelopoulos and Bates 2021, https://arxiv.org/abs/2107.07511, section 1). It is about the mean over fresh images
and over draws of the chosen ones, not about each class or each draw.

N images, C classes, G groups of images that are not independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .statistics import as_column, group_sizes, wilson_interval
from .ties import SAME

COVERAGES = (0.9, 0.95, 0.99)  # those of sets that are worth a look, where nobody asks for others
_ROUNDING = 1e-9  # 0.95 * 20 and sums of thirds are whole numbers but for this share


def conformal_quantile(scores: Any, coverage: float, groups: np.ndarray | None = None) -> float:
    """The smallest of the scores (N,) that a fresh one does not exceed with a chance of at least `coverage`.

    Of N independent images it is the ⌈(N + 1) · coverage⌉-th smallest, infinite if that is beyond the N-th. Images of a
    group share the weight of one independent image, and the fresh one belongs to a fresh group (Lee, Barber and Willett
    2023, https://arxiv.org/abs/2306.06342, section 3).

    Args:
        groups: (N,) which images belong together; by default each stands alone.

    Raises:
        ValueError: a coverage outside (0, 1), or scores that are not finite.
    """
    check_coverage(coverage)
    scores = as_column(scores, "scores of a conformal quantile").astype(np.float64)
    group, sizes = group_sizes(groups, len(scores))
    order = np.argsort(scores, kind="stable")
    is_enough = np.cumsum(1 / sizes[group[order]]) >= coverage * (len(sizes) + 1) * (1 - _ROUNDING)
    return float(scores[order[is_enough.argmax()]]) if is_enough.any() else math.inf


def least_groups(coverage: float) -> int:
    """How many independent images a promise of so much coverage needs: 19 for 0.95."""
    check_coverage(coverage)
    return math.ceil((1 / (1 - coverage)) * (1 - _ROUNDING)) - 1


def check_coverage(coverage: float) -> None:
    if not 0 < coverage < 1:
        raise ValueError(f"a coverage of {coverage:g}; it is a share between 0 and 1, such as 0.95")


@dataclass(frozen=True)
class Coverage:
    """Sets of all classes whose probability is at least exp(-cut), and what they do on images they were not chosen on.

    The score of an image is the surprisal of its true class, -log of its softmax probability. Sadinle, Lei and
    Wasserman 2019 (https://arxiv.org/abs/1609.00451) take one minus the probability, which orders classes alike; the
    logarithm keeps apart what rounds to 1. For their coverage these sets are the smallest in the mean, and they need no
    random numbers. A set may be empty: no class is as likely as the true one usually is.

    Args:
        coverage: the share of sets that hold the true class, as asked for.
        cut: the largest surprisal that is in a set.
        num_chosen, num_tried: images that the cut was chosen and tried on.
        covered: the share of sets of the latter that hold the true class.
        interval: its 95 % interval, `wilson_interval`.
        mean_size: classes in a set.
        share_empty: of sets without any class.
    """

    coverage: float
    cut: float
    num_chosen: int
    num_tried: int
    covered: float
    interval: tuple[float, float]
    mean_size: float
    share_empty: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "coverage": self.coverage,
            "cut": self.cut,
            "chosen_on": self.num_chosen,
            "tried_on": self.num_tried,
            "covered": self.covered,
            "interval_95": list(self.interval),
            "mean_size": self.mean_size,
            "empty": self.share_empty,
        }

    def __str__(self) -> str:
        low, high = (100 * end for end in self.interval)
        return (
            f"sets of {100 * self.coverage:g} % coverage: the true class is in {100 * self.covered:.1f} % of "
            f"{self.num_tried} ({low:.1f} – {high:.1f} %), {self.mean_size:.2f} classes in the mean, "
            f"{100 * self.share_empty:.1f} % empty"
        )


def is_in_set(surprisals: np.ndarray, cut: float, logit_scale: float) -> np.ndarray:
    """Whether each class belongs to its image's set, of any shape; what rounding may have moved out of it does."""
    return surprisals <= cut + SAME * logit_scale


def surprisals(cosines: Any, logit_scale: float) -> np.ndarray:
    """(N, C) -log of the softmax over the classes of cosines (N, C) times `logit_scale`, in float64."""
    logits = np.asarray(cosines, dtype=np.float64) * logit_scale
    logits -= logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits).sum(axis=1, keepdims=True)) - logits


def tried_coverage(
    coverage: float,
    cut: float,
    num_chosen: int,
    is_covered: np.ndarray,
    sizes: np.ndarray,
    groups: np.ndarray | None = None,
) -> Coverage:
    """A cut by its sets of images (N,) that it was not chosen on: whether each holds the true class, and its size."""
    interval = wilson_interval(is_covered, groups)
    shares = float(is_covered.mean()), interval, float(sizes.mean()), float((sizes == 0).mean())
    return Coverage(coverage, cut, num_chosen, len(sizes), *shares)
