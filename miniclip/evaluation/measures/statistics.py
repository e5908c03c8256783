"""Intervals and tests: Wilson, Newcombe, McNemar, sign flips, robustness fits; and arrays checked on their way in.

N images, C classes, K guesses, G groups of images that are right or wrong together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

_Z = 1.959963984540054  # 95 % of a normal distribution lie within as many standard deviations

# ---------------------------------------------------------------------------------------------------------------------
# What may come in


def as_column(values: Any, what: str, length: int | None = None) -> np.ndarray:
    """(N,), of the given length, not empty, and finite."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{what} are one number each, of shape (N,); these have shape {array.shape}")
    if not len(array):
        raise ValueError(f"there are no {what}, and a measure needs at least one")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what} are numbers; these are of type {array.dtype}")
    if length is not None and len(array) != length:
        raise ValueError(f"{len(array)} {what} for {length} images; there is one for each")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{what}: {as_rows(~np.isfinite(array))} not finite (NaN or infinite)")
    return array


def as_matrix(values: Any, what: str) -> np.ndarray:
    """(N, C), not empty, and finite."""
    array = np.asarray(values)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{what} have shape (N, C) with at least one row and column; these have {array.shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what} are numbers; these are of type {array.dtype}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{what}: {as_rows(~np.isfinite(array).all(axis=1))} not finite (NaN or infinite)")
    return array


def as_rows(is_bad: np.ndarray) -> str:
    numbers = np.flatnonzero(is_bad)
    first = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
    return f"{len(numbers)} of {len(is_bad)} rows (numbers {first}) are"


def as_classes(values: Any, what: str, num_classes: int, length: int | None = None) -> np.ndarray:
    """(N,) indices of classes."""
    array = as_column(values, what, length)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} are whole numbers, the indices of classes; these are of type {array.dtype}")
    if array.min() < 0 or array.max() >= num_classes:
        wrong = array[(array < 0) | (array >= num_classes)][0]
        raise ValueError(f"{what} are from 0 to {num_classes - 1}, as there are {num_classes} classes; one is {wrong}")
    return array


def as_truths(values: Any, what: str, length: int | None = None) -> np.ndarray:
    """(N,) yes or no."""
    array = as_column(values, what, length)
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        wrong = array[~np.isin(array, (0, 1))][0]
        raise ValueError(f"{what} are True or False, or 1 or 0, for each image; one is {wrong}")
    return array.astype(bool)


def group_sizes(groups: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The number of each image's group (N,), and the sizes of groups (G,); without groups, every image is its own."""
    if groups is None:
        return np.arange(length), np.ones(length, dtype=np.int64)
    if len(groups) != length:
        raise ValueError(f"{len(groups)} groups for {length} images; there is one for each")
    groups = np.asarray(groups)
    is_missing = np.array([group is None or group != group for group in groups])
    if is_missing.any():
        raise ValueError(f"groups: {as_rows(is_missing)} None or NaN; an image that stands alone is a group of its own")
    _, group = np.unique(groups, return_inverse=True)
    return group, np.bincount(group)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def wilson_interval(correct: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """The 95 % interval of a share, sound for few images and for shares of 0 and 1 (Wilson 1927).

    Images of a group are not so many independent ones: they count as the number of images that, if independent, would
    spread as much as the groups do (Kish's design effect, as Dean and Pagano 2015 put it into Wilson's interval). Few
    wrong images, or few right ones, can't show how far groups are alike. So the lower end is never above the one where
    all are right and a group counts as one image, nor the upper end below its mirror image (after the monotony that
    Blyth and Still 1983 ask of intervals, Journal of the American Statistical Association 78, 108).

    Args:
        correct: (N,) of true and false.
        groups: (N,) which images belong together; by default each stands alone.
    """
    correct = as_truths(correct, "values of a share")
    group, sizes = group_sizes(groups, len(correct))
    N, G = len(correct), len(sizes)
    share = float(correct.mean())
    groups_as_images = N**2 / float((sizes.astype(np.float64) ** 2).sum())
    effective: float = N if G > 1 else groups_as_images
    spread = ((np.bincount(group, weights=correct) - share * sizes) ** 2).sum() * G / max(G - 1, 1) / N**2
    if 1 < G < N and spread > 0:
        effective = min(N, share * (1 - share) / spread)
    low, high = _wilson(share, effective)
    return min(low, _wilson(1, groups_as_images)[0]), max(high, _wilson(0, groups_as_images)[1])


def _wilson(share: float, count: float) -> tuple[float, float]:
    """Of so many independent images."""
    wide = 1 + _Z**2 / count
    middle = (share + _Z**2 / (2 * count)) / wide
    half = _Z / wide * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    # At 0 and 1 the interval ends there, which rounding misses by a hair.
    return min(max(0.0, middle - half), share), max(min(1.0, middle + half), share)


def check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; top-k needs at least 1")


# ---------------------------------------------------------------------------------------------------------------------
# Two models, and one model on two sets


@dataclass(frozen=True)
class Comparison:
    """The second model against the first, on the same images.

    Args:
        difference: the second's accuracy less the first's.
        interval: its 95 % interval, `difference_interval`.
        p_value: of `sign_flips` of the groups' differences, exact: how likely a difference as large as this one would
            be, were either model as likely to be the better one in each group. Where no images belong together, it is
            McNemar's.
        gained, lost: indices of the images that only the second, and only the first, has right.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    gained: np.ndarray
    lost: np.ndarray


def compare(first: np.ndarray, second: np.ndarray, groups: np.ndarray | None = None) -> Comparison:
    """Two models by whether each image was right (N,), in the same order; `groups` (N,) as in `wilson_interval`."""
    first = as_truths(first, "right and wrong guesses of the first model")
    second = as_truths(second, "right and wrong guesses of the second model", len(first))
    differences = second.astype(np.int64) - first
    group, _ = group_sizes(groups, len(first))
    gained, lost = np.flatnonzero(differences > 0), np.flatnonzero(differences < 0)
    return Comparison(
        float(differences.mean()),
        difference_interval(differences > 0, differences < 0, groups),
        sign_flips(np.bincount(group, weights=differences).astype(np.int64)),
        gained,
        lost,
    )


def difference_interval(gained: np.ndarray, lost: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """The 95 % interval of a model's accuracy less another's on the same images.

    Sound where few or no images differ: from Wilson's intervals of the shares that were gained and that were lost, by
    the method of variance estimates recovery (Newcombe 1998, Statistics in Medicine 17, 873, squares their distances
    and adds; Zou and Donner 2008, 27, 1693, section 2.2, go on to shares that are correlated, as these are: an image
    can't be both).

    Args:
        gained, lost: (N,) whether the model alone, and the other alone, has an image right.
        groups: (N,) as in `wilson_interval`.
    """
    gained = as_truths(gained, "images that were gained")
    lost = as_truths(lost, "images that were lost", len(gained))
    group, sizes = group_sizes(groups, len(gained))
    shares = np.array([gained.mean(), lost.mean()])
    ends = np.array([wilson_interval(gained, groups), wilson_interval(lost, groups)])
    below, above = shares - ends[:, 0], ends[:, 1] - shares
    sums = np.stack([np.bincount(group, weights=each) for each in (gained, lost)]) - shares[:, None] * sizes
    spread = math.sqrt(float((sums[0] ** 2).sum() * (sums[1] ** 2).sum()))
    correlation = float((sums[0] * sums[1]).sum()) / spread if spread else 0.0
    difference = float(shares[0] - shares[1])
    low = _distance(below[0], above[1], correlation)
    high = _distance(above[0], below[1], correlation)
    return max(-1.0, difference - low), min(1.0, difference + high)


def _distance(first: float, second: float, correlation: float) -> float:
    return math.sqrt(max(0.0, first**2 + second**2 - 2 * correlation * first * second))


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided p-value that a fair coin falls as unevenly as `gained` against `lost` (McNemar 1947)."""
    if gained < 0 or lost < 0:
        raise ValueError(f"{gained} images gained and {lost} lost; there are at least 0 of each")
    flips = gained + lost
    term = total = 1  # ways for the rarer side to come up never
    for k in range(min(gained, lost)):
        term = term * (flips - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2**flips)  # whole numbers of any size, so nothing is rounded before the division


def sign_flips(differences: np.ndarray) -> float:
    """The exact two-sided p-value of a sum of whole numbers, were each as likely to have the opposite sign.

    Fisher's test of matched pairs (1935, The Design of Experiments, section 21), here of groups: `differences` (G,) are
    the images of a group that were gained, less those that were lost. Where all are of one size, it is McNemar's test
    of the groups.
    """
    differences = as_column(differences, "differences of groups")
    sizes = np.abs(differences[differences != 0])
    gained, lost = differences[differences > 0], -differences[differences < 0]
    if len(np.unique(sizes)) < 2:
        return mcnemar(len(gained), len(lost))
    chances = np.zeros(min(gained.sum(), lost.sum()) + 1)  # of each sum on the rarer side, which may be as large
    chances[0] = 1
    for size in sizes:
        chances[size:] += chances[:-size]
        chances /= 2
    return min(1.0, 2 * float(chances.sum()))


@dataclass(frozen=True)
class RobustnessFit:
    """The accuracy on a shifted set that goes with an accuracy on the standard set, in the baseline models.

    logit(shifted) = slope · logit(standard) + intercept.

    Args:
        r2: the share of the variance of logit(shifted) that the line explains; NaN if they are all the same.
    """

    slope: float
    intercept: float
    num_models: int
    r2: float

    def expected(self, standard: Any) -> np.ndarray:
        """The shifted accuracy to expect of accuracies on the standard set, of any shape."""
        return 1 / (1 + np.exp(-(self.slope * _logit(standard, "standard") + self.intercept)))


def fit_robustness(standard: np.ndarray, shifted: np.ndarray) -> RobustnessFit:
    """The line of baseline models' accuracies (M,) on a standard and a shifted set (Taori et al. 2020, section 2).

    Raises:
        ValueError: fewer than two different models, or an accuracy that is not between 0 and 1.
    """
    x, y = _logit(standard, "standard"), _logit(shifted, "shifted")
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"accuracies of baselines have shapes {x.shape} and {y.shape}; both are (models,)")
    if len(np.unique(x)) < 2:
        raise ValueError(f"{len(x)} baselines of {len(np.unique(x))} different standard accuracies; a line needs two")
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    intercept = float(y.mean() - slope * x.mean())
    spread = float(((y - y.mean()) ** 2).sum())
    r2 = 1 - float(((y - slope * x - intercept) ** 2).sum()) / spread if spread else math.nan
    return RobustnessFit(slope, intercept, len(x), r2)


def effective_robustness(fit: RobustnessFit, standard: Any, shifted: Any) -> np.ndarray:
    """Shifted accuracy beyond what the baselines' line gives for the standard accuracy (Taori et al. 2020).

    Shares of 1, of any shape; above 0, the model loses less than its accuracy would lead one to expect.
    """
    shifted = np.asarray(shifted, dtype=np.float64)
    is_share = (shifted >= 0) & (shifted <= 1)
    if not is_share.all():
        raise ValueError(f"a shifted accuracy of {shifted[~is_share].flat[0]}; it is a share, from 0 to 1")
    return shifted - fit.expected(standard)


def _logit(accuracy: Any, what: str) -> np.ndarray:
    accuracy = np.asarray(accuracy, dtype=np.float64)
    is_good = (accuracy > 0) & (accuracy < 1)
    if not is_good.all():
        raise ValueError(f"a {what} accuracy of {accuracy[~is_good].flat[0]}; shares between 0 and 1 have a logit")
    return np.log(accuracy / (1 - accuracy))
