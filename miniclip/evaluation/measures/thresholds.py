"""How well a score separates, and thresholds on it. N images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .classification import average_precision
from .statistics import as_column, wilson_interval

# ---------------------------------------------------------------------------------------------------------------------
# "None of these": the softmax over a list of classes can't say it, the best cosine can


@dataclass(frozen=True)
class Separation:
    """How well a score separates images of the listed classes (inside) from others (outside), at any threshold.

    Args:
        auroc: the chance that an inside image scores above an outside one, a tie counting half.
        aupr_inside: average precision of finding the inside images by high scores; by chance, their share.
        aupr_outside: of finding the outside images by low scores.
        fpr_at_95_tpr: the share of outside images accepted where 95 % of the inside ones are.
    """

    auroc: float
    aupr_inside: float
    aupr_outside: float
    fpr_at_95_tpr: float


def separation(inside: np.ndarray, outside: np.ndarray) -> Separation:
    """Of best cosines of inside images (N,) and of outside images (M,).

    Cosines of right and of wrong guesses can be given instead: then it is how well the cosine reveals mistakes.
    """
    inside, outside = _best_cosines(inside, outside)
    below = np.searchsorted(outside, inside, side="left") + np.searchsorted(outside, inside, side="right")
    scores = np.concatenate([inside, outside])
    is_inside = np.arange(len(scores)) < len(inside)
    kept = math.ceil(len(inside) * 95 / 100)
    return Separation(
        auroc=float(below.sum() / (2 * len(inside) * len(outside))),
        aupr_inside=average_precision(scores, is_inside),
        aupr_outside=average_precision(-scores, ~is_inside),
        fpr_at_95_tpr=float((outside >= inside[-kept]).mean()),
    )


def _best_cosines(inside: Any, outside: Any) -> tuple[np.ndarray, np.ndarray]:
    """Sorted."""
    inside, outside = as_column(inside, "cosines of inside images"), as_column(outside, "cosines of outside images")
    return np.sort(inside.astype(np.float64)), np.sort(outside.astype(np.float64))


@dataclass(frozen=True)
class Threshold:
    """An image whose best cosine reaches `cosine` is accepted as one of the classes; any other is none of these.

    Args:
        rule: how it was chosen, in words.
        split: whose images it was chosen on, and how many were inside and outside.
    """

    cosine: float
    rule: str
    split: str
    num_inside: int
    num_outside: int


def calibrate_threshold(
    inside: np.ndarray, outside: np.ndarray, *, split: str, false_acceptance: float | None = None
) -> Threshold:
    """A threshold, halfway between two cosines seen, for `apply_threshold` to try on images that are not of this split.

    Args:
        inside: (N,) best cosines of images of the listed classes.
        outside: (M,) best cosines of images of none.
        split: what these images are called where the threshold is reported.
        false_acceptance: the largest share of outside images to accept, from 0 to below 1; the lowest threshold that
            keeps to it is taken. By default the one of the best balanced accuracy, the highest of equally good ones.
    """
    inside, outside = _best_cosines(inside, outside)
    N, M = len(inside), len(outside)
    seen = np.unique(np.concatenate([inside, outside]))
    if false_acceptance is None:
        rule = "best balanced accuracy"
        rejected_inside, rejected_outside = np.searchsorted(inside, seen), np.searchsorted(outside, seen)
        gain = rejected_outside * N - rejected_inside * M  # whole numbers, so that equally good ones are equal
        first = len(seen) - 1 - int(gain[::-1].argmax())
    else:
        if not 0 <= false_acceptance < 1:
            raise ValueError(f"a false acceptance of {false_acceptance}; it is a share, from 0 to below 1")
        rule = f"at most {100 * false_acceptance:g} % of outside images accepted"
        accepted = min(math.floor(false_acceptance * M + 1e-9), M - 1)  # 0.29 * 100 is 28.999…
        first = int(np.searchsorted(seen, outside[M - 1 - accepted], side="right"))
    if first == 0:
        cosine = seen[0]
    elif first == len(seen):
        cosine = np.nextafter(seen[-1], np.inf)
    else:
        cosine = max((seen[first - 1] + seen[first]) / 2, np.nextafter(seen[first - 1], np.inf))
    return Threshold(float(cosine), rule, split, N, M)


@dataclass(frozen=True)
class Acceptance:
    """What a threshold does on a split.

    Args:
        accepted_inside, accepted_outside: shares of those images; the first is to be high, the second low.
        interval_inside, interval_outside: their 95 % intervals, `wilson_interval`.
        balanced_accuracy: the mean of the shares accepted inside and rejected outside; 0.5 by chance.
    """

    threshold: Threshold
    split: str
    num_inside: int
    num_outside: int
    accepted_inside: float
    accepted_outside: float
    interval_inside: tuple[float, float]
    interval_outside: tuple[float, float]
    balanced_accuracy: float

    def __str__(self) -> str:
        """All of it in words, first of all where the threshold comes from."""
        threshold = self.threshold
        low, high = (100 * end for end in self.interval_outside)
        text = (
            f"cosine ≥ {threshold.cosine:.4f}, chosen on {threshold.split} ({threshold.num_inside} inside, "
            f"{threshold.num_outside} outside images) for {threshold.rule}; on {self.split}, "
            f"{100 * self.accepted_inside:.1f} % of {self.num_inside} inside images are accepted and "
            f"{100 * self.accepted_outside:.1f} % of {self.num_outside} outside ones ({low:.1f} – {high:.1f} %)"
        )
        return text + ("; the same images, so expect worse of others" if threshold.split == self.split else "")


def apply_threshold(
    threshold: Threshold,
    inside: np.ndarray,
    outside: np.ndarray,
    *,
    split: str,
    groups_inside: np.ndarray | None = None,
    groups_outside: np.ndarray | None = None,
) -> Acceptance:
    """A threshold on the best cosines of a split's inside (N,) and outside (M,) images.

    Args:
        split: what these images are called.
        groups_inside, groups_outside: (N,) and (M,) which images belong together; by default each stands alone.
    """
    accepted_inside = as_column(inside, "cosines of inside images").astype(np.float64) >= threshold.cosine
    accepted_outside = as_column(outside, "cosines of outside images").astype(np.float64) >= threshold.cosine
    shares = float(accepted_inside.mean()), float(accepted_outside.mean())
    return Acceptance(
        threshold,
        split,
        len(accepted_inside),
        len(accepted_outside),
        *shares,
        wilson_interval(accepted_inside, groups_inside),
        wilson_interval(accepted_outside, groups_outside),
        (shares[0] + 1 - shares[1]) / 2,
    )
