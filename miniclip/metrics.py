"""Scores in, numbers with their meaning out: classification, subgroups, "none of these", comparisons, retrieval.

Pure functions of arrays; they know no model, no file and no name of a class: a class is its number, so that two classes
of one name stay two. What is undefined is NaN and left out of means, never 0. In retrieval a tie counts against the
model, so that one that gives every pair the same score finds nothing.

N images, C classes, K guesses, G groups of images that stand and fall together, I images and T texts of retrieval,
E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .processes import collect, place

_NUM_RESAMPLES = 2000
_Z = 1.959963984540054  # 95 % of a normal distribution lie within as many standard deviations

# ---------------------------------------------------------------------------------------------------------------------
# What may come in


def _column(values: Any, what: str, length: int | None = None) -> np.ndarray:
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
        raise ValueError(f"{what}: {_rows(~np.isfinite(array))} not finite (NaN or infinite)")
    return array


def _matrix(values: Any, what: str) -> np.ndarray:
    """(N, C), not empty, and finite."""
    array = np.asarray(values)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{what} have shape (N, C) with at least one row and column; these have {array.shape}")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{what} are numbers; these are of type {array.dtype}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{what}: {_rows(~np.isfinite(array).all(axis=1))} not finite (NaN or infinite)")
    return array


def _rows(is_bad: np.ndarray) -> str:
    numbers = np.flatnonzero(is_bad)
    first = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
    return f"{len(numbers)} of {len(is_bad)} rows (numbers {first}) are"


def _classes(values: Any, what: str, num_classes: int, length: int | None = None) -> np.ndarray:
    """(N,) numbers of classes."""
    array = _column(values, what, length)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{what} are whole numbers, the places of classes; these are of type {array.dtype}")
    if array.min() < 0 or array.max() >= num_classes:
        wrong = array[(array < 0) | (array >= num_classes)][0]
        raise ValueError(f"{what} are from 0 to {num_classes - 1}, as there are {num_classes} classes; one is {wrong}")
    return array


def _truths(values: Any, what: str, length: int | None = None) -> np.ndarray:
    """(N,) yes or no."""
    array = _column(values, what, length)
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        wrong = array[~np.isin(array, (0, 1))][0]
        raise ValueError(f"{what} are True or False, or 1 or 0, for each image; one is {wrong}")
    return array.astype(bool)


def _group_sizes(groups: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The number of each image's group (N,), and the sizes of groups (G,); without groups, every image is its own."""
    if groups is None:
        return np.arange(length), np.ones(length, dtype=np.int64)
    if len(groups) != length:
        raise ValueError(f"{len(groups)} groups for {length} images; there is one for each")
    groups = np.asarray(groups)
    is_missing = np.array([group is None or group != group for group in groups])
    if is_missing.any():
        raise ValueError(f"groups: {_rows(is_missing)} None or NaN; an image that stands alone is a group of its own")
    _, group = np.unique(groups, return_inverse=True)
    return group, np.bincount(group)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def bootstrap_interval(values: np.ndarray, groups: np.ndarray | None = None, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean, drawing whole groups with replacement (Efron's percentile bootstrap).

    With few groups, or with values that are all the same, it is too narrow: `wilson_interval` is for those.

    Args:
        values: (N,) any number of each image.
        groups: (N,) which values belong together; by default each stands alone.

    Raises:
        ValueError: there are no values, some are not finite, or groups are fewer or more.
    """
    values = _column(values, "values").astype(np.float64)
    group, sizes = _group_sizes(groups, len(values))
    sums = np.bincount(group, weights=values)
    random = np.random.default_rng(seed)
    means = np.empty(_NUM_RESAMPLES)
    for i in range(_NUM_RESAMPLES):
        drawn = random.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def wilson_interval(correct: np.ndarray, groups: np.ndarray | None = None) -> tuple[float, float]:
    """The 95 % interval of a share, sound for few images and for shares of 0 and 1 (Wilson 1927).

    Images of a group are not so many independent ones: they count as the number of images that, if independent, would
    spread as much as the groups do (Kish's design effect, as Dean and Pagano 2015 put it into Wilson's interval). Where
    nothing spreads, as all are right or all wrong, a group counts as one image.

    Args:
        correct: (N,) of true and false.
        groups: (N,) which images belong together; by default each stands alone.
    """
    correct = _truths(correct, "values of a share")
    group, sizes = _group_sizes(groups, len(correct))
    N, G = len(correct), len(sizes)
    share = float(correct.mean())
    effective: float = N
    if G < N:
        spread = ((np.bincount(group, weights=correct) - share * sizes) ** 2).sum() * G / max(G - 1, 1) / N**2
        if G == 1 or share in (0, 1):
            effective = N**2 / float((sizes.astype(np.float64) ** 2).sum())
        elif spread > 0:
            effective = min(N, share * (1 - share) / spread)
    wide = 1 + _Z**2 / effective
    middle = (share + _Z**2 / (2 * effective)) / wide
    half = _Z / wide * math.sqrt(share * (1 - share) / effective + _Z**2 / (4 * effective**2))
    # At 0 and 1 the interval ends there, which rounding misses by a hair.
    return min(max(0.0, middle - half), share), max(min(1.0, middle + half), share)


# ---------------------------------------------------------------------------------------------------------------------
# Classification: one true class each


def is_among_guesses(ranked: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """(N,) whether the own class is among the first k of K ranked guesses (N, K), where the cosines are not kept."""
    _check_k(k)
    ranked = _matrix(ranked, "ranked guesses")
    if k > ranked.shape[1]:
        raise ValueError(f"top-{k} can't be told from {ranked.shape[1]} guesses for each image")
    return (ranked[:, :k] == _column(labels, "labels", len(ranked))[:, None]).any(axis=1)


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; top-k needs at least 1")


def confusion_matrix(labels: np.ndarray, guesses: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) images by true class (row) and first guess (column)."""
    labels = _classes(labels, "labels", num_classes)
    guesses = _classes(guesses, "guesses", num_classes, len(labels))
    places = labels.astype(np.int64) * num_classes + guesses
    return np.bincount(places, minlength=num_classes**2).reshape(num_classes, num_classes)


def most_confused(confusion: np.ndarray, most: int = 10) -> list[tuple[int, int, int]]:
    """(true class, guessed class, images), the most frequent mistakes first; of equally many, the later class first."""
    mistakes = confusion.copy()
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(mistakes, axis=None, kind="stable")[::-1][:most]
    pairs = [divmod(int(place), len(mistakes)) for place in order]
    return [(row, column, int(mistakes[row, column])) for row, column in pairs if mistakes[row, column]]


def per_class_recall(confusion: np.ndarray) -> np.ndarray:
    """(C,) share of a class's images that got it; NaN for a class without images."""
    return _shares(confusion.diagonal(), confusion.sum(axis=1))


def per_class_precision(confusion: np.ndarray) -> np.ndarray:
    """(C,) share of the images guessed to be of a class that are; NaN for a class that nothing was guessed to be."""
    return _shares(confusion.diagonal(), confusion.sum(axis=0))


def per_class_f1(confusion: np.ndarray) -> np.ndarray:
    """(C,) harmonic mean of recall and precision, 0 if nothing was right; NaN for a class without images."""
    images, guessed = confusion.sum(axis=1), confusion.sum(axis=0)
    return np.where(images > 0, _shares(2 * confusion.diagonal(), images + guessed), np.nan)


def mean_per_class_recall(confusion: np.ndarray) -> float:
    """The mean of recall over classes that have images, rare ones as much as common: also called balanced accuracy.

    As scikit-learn's `balanced_accuracy_score`, which CLIP_benchmark reports under our name.
    """
    return _mean_of_classes(per_class_recall(confusion))


def macro_f1(confusion: np.ndarray) -> float:
    """The mean of F1 over classes that have images.

    scikit-learn's `f1_score(average="macro")` counts a class without images as 0 if it was ever guessed, and gives
    the same as this for `labels=` those with images.
    """
    return _mean_of_classes(per_class_f1(confusion))


def _shares(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return part / whole


def _mean_of_classes(values: np.ndarray) -> float:
    if np.isnan(values).all():
        raise ValueError(f"not one of {len(values)} classes has an image to measure")
    return float(np.nanmean(values))


@dataclass(frozen=True)
class PerClass:
    """A row for each class.

    Args:
        images: (C,) how many are of it.
        guessed: (C,) how many were guessed to be.
        recall, precision, f1: (C,) NaN where undefined.
        recall_intervals: (C, 2) 95 % intervals of recall, `wilson_interval`; NaN for a class without images.
    """

    images: np.ndarray
    guessed: np.ndarray
    recall: np.ndarray
    precision: np.ndarray
    f1: np.ndarray
    recall_intervals: np.ndarray


def per_class(labels: np.ndarray, guesses: np.ndarray, num_classes: int, groups: np.ndarray | None = None) -> PerClass:
    """The table by class of true classes (N,) and first guesses (N,); `groups` (N,) as in `wilson_interval`."""
    labels, guesses = np.asarray(labels), np.asarray(guesses)
    confusion = confusion_matrix(labels, guesses, num_classes)
    group, _ = _group_sizes(groups, len(labels))
    intervals = np.full((num_classes, 2), np.nan)
    order = np.argsort(labels, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        c = labels[rows[0]]
        intervals[c] = wilson_interval(guesses[rows] == c, group[rows])
    return PerClass(
        confusion.sum(axis=1),
        confusion.sum(axis=0),
        per_class_recall(confusion),
        per_class_precision(confusion),
        per_class_f1(confusion),
        intervals,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Classification: any number of true classes each


def average_precision(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """The precision at each score that a positive has, weighed by how many have it; NaN without positives.

    Equal scores are taken together, as in scikit-learn's `average_precision_score`.

    Args:
        scores: (N,), more is surer.
        is_positive: (N,).
    """
    scores = _column(scores, "scores")
    is_positive = _truths(is_positive, "positives", len(scores))
    if not is_positive.any():
        return math.nan
    order = np.argsort(-scores.astype(np.float64), kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of equal scores
    found = np.cumsum(is_positive[order])[last]
    precision = found / (np.flatnonzero(last) + 1)
    return float((precision * np.diff(found, prepend=0)).sum() / found[-1])


@dataclass(frozen=True)
class Multilabel:
    """Mean average precision.

    Args:
        mean_average_precision: over the classes that have a positive.
        per_class: (C,) average precision, NaN for a class without positives.
        positives: (C,) how many images are of each class.
        left_out: classes without positives, whose average precision is undefined.
    """

    mean_average_precision: float
    per_class: np.ndarray
    positives: np.ndarray
    left_out: tuple[int, ...]


def multilabel(cosines: np.ndarray, is_positive: np.ndarray) -> Multilabel:
    """Average precision of each class, and its mean.

    CLIP_benchmark reports the same mean, but takes a class without positives as 0.

    Args:
        cosines: (N, C), or logits.
        is_positive: (N, C) whether an image is of a class.

    Raises:
        ValueError: not one class has a positive.
    """
    cosines, is_positive = _matrix(cosines, "cosines"), _matrix(is_positive, "positives")
    if cosines.shape != is_positive.shape:
        raise ValueError(f"cosines have shape {cosines.shape}, positives {is_positive.shape}; they are the same")
    found = np.array([average_precision(*column) for column in zip(cosines.T, is_positive.T, strict=True)])
    left_out = tuple(np.flatnonzero(np.isnan(found)).tolist())
    return Multilabel(_mean_of_classes(found), found, is_positive.astype(bool).sum(axis=0), left_out)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration: is what is said with 80 % right in 80 % of cases?


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy: the error, and the bins of the reliability curve.

    Args:
        error: the expected calibration error: the mean distance of confidence from accuracy, bins weighed by images.
        largest_error: of any bin that has images.
        edges: (B + 1,); bin b holds the confidences in (edges[b], edges[b + 1]], the first its lower edge, too.
        images: (B,) in each bin.
        confidence, accuracy: (B,) means of each bin, NaN where it has no images.
    """

    error: float
    largest_error: float
    edges: np.ndarray
    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def calibration(
    confidence: np.ndarray, correct: np.ndarray, num_bins: int = 15, is_adaptive: bool = False
) -> Calibration:
    """Expected calibration error (Naeini et al. 2015; Guo et al. 2017) and the reliability curve.

    Args:
        confidence: (N,) from 0 to 1: the probability of the first guess.
        correct: (N,) whether that was right.
        is_adaptive: bins of about equally many images rather than equal width (Nixon et al. 2019). Equal confidences
            stay in one bin, so there may be fewer bins.
    """
    confidence = _column(confidence, "confidences").astype(np.float64)
    correct = _truths(correct, "right and wrong guesses", len(confidence))
    if confidence.min() < 0 or confidence.max() > 1:
        wrong = confidence[(confidence < 0) | (confidence > 1)][0]
        raise ValueError(f"confidences are probabilities, from 0 to 1; one is {wrong}")
    if num_bins < 1:
        raise ValueError(f"{num_bins} bins; calibration needs at least 1")
    edges = np.linspace(0, 1, num_bins + 1)
    if is_adaptive:
        last = np.arange(1, num_bins + 1) * len(confidence) // num_bins - 1  # image of each bin, by confidence
        inner = np.sort(confidence)[last[last >= 0]][:-1]
        edges = np.unique(np.concatenate([[0.0], inner, [1.0]]))
    bins = np.maximum(np.searchsorted(edges, confidence, side="left") - 1, 0)
    images = np.bincount(bins, minlength=len(edges) - 1)
    means = _shares(np.bincount(bins, weights=confidence, minlength=len(images)), images)
    right = _shares(np.bincount(bins, weights=correct, minlength=len(images)), images)
    gaps = np.nan_to_num(np.abs(means - right))
    error = float((gaps * images).sum() / len(confidence))
    return Calibration(error, float(gaps.max()), edges, images, means, right)


# ---------------------------------------------------------------------------------------------------------------------
# Subgroups: for whom is it good?


@dataclass(frozen=True)
class Subgroup:
    """The images that have one value of a column.

    Args:
        value: as given; None for images without one (None, NaN, or an empty text).
        interval: the 95 % interval, `wilson_interval`.
        is_too_small: there are so few independent images that the accuracy says little.
    """

    value: Any
    num_images: int
    num_groups: int
    accuracy: float
    interval: tuple[float, float]
    is_too_small: bool


@dataclass(frozen=True)
class Subgroups:
    """All of a column's values, those of most images first.

    Args:
        gap: the best accuracy less the worst, of subgroups that have a value and are not too small; None if fewer than
            two are left. The extremes of many are far apart by chance alone: see whether their intervals overlap.
        best, worst: whose it is.
    """

    subgroups: tuple[Subgroup, ...]
    gap: float | None
    best: Subgroup | None
    worst: Subgroup | None


def subgroup_accuracy(
    correct: np.ndarray, values: Sequence[Any], groups: np.ndarray | None = None, min_groups: int = 30
) -> Subgroups:
    """Accuracy for each value of a column of metadata.

    Args:
        correct: (N,) whether the guess was right.
        values: (N,) of the column: texts, numbers, or None.
        groups: (N,) which images belong together; by default each stands alone.
        min_groups: a subgroup of fewer groups is too small. At 30, an accuracy of 50 % has an interval of 33 to 67 %.
    """
    correct = _truths(correct, "right and wrong guesses")
    if len(values) != len(correct):
        raise ValueError(f"{len(values)} values of metadata for {len(correct)} images; there is one for each")
    group, _ = _group_sizes(groups, len(correct))
    rows: dict[Any, list[int]] = {}
    for row, value in enumerate(values):
        rows.setdefault(None if value is None or value == "" or value != value else value, []).append(row)
    found = []
    for value, own in rows.items():
        num_groups = len(np.unique(group[own]))
        interval = wilson_interval(correct[own], group[own])
        is_too_small = num_groups < min_groups
        found.append(Subgroup(value, len(own), num_groups, float(correct[own].mean()), interval, is_too_small))
    found.sort(key=lambda subgroup: -subgroup.num_images)
    telling = [subgroup for subgroup in found if subgroup.value is not None and not subgroup.is_too_small]
    if len(telling) < 2:
        return Subgroups(tuple(found), None, None, None)
    best = max(telling, key=lambda subgroup: subgroup.accuracy)
    worst = min(telling, key=lambda subgroup: subgroup.accuracy)
    return Subgroups(tuple(found), best.accuracy - worst.accuracy, best, worst)


# ---------------------------------------------------------------------------------------------------------------------
# "None of these": the softmax over a list of classes can't say it, the best cosine can


@dataclass(frozen=True)
class Separation:
    """How well a score tells images of the listed classes (inside) from others (outside), whatever the threshold.

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

    Cosines of right and of wrong guesses do as well: then it is how well the cosine tells mistakes.
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
    inside, outside = _column(inside, "cosines of inside images"), _column(outside, "cosines of outside images")
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
        split: what these images are called where the threshold is told of.
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
    accepted_inside = _column(inside, "cosines of inside images").astype(np.float64) >= threshold.cosine
    accepted_outside = _column(outside, "cosines of outside images").astype(np.float64) >= threshold.cosine
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


# ---------------------------------------------------------------------------------------------------------------------
# Two models, and one model on two sets


@dataclass(frozen=True)
class Comparison:
    """The second model against the first, on the same images.

    Args:
        difference: the second's accuracy less the first's.
        interval: its 95 % interval, groups of images resampled for both models at once.
        p_value: McNemar's, exact: how likely a split of the images on which they differ would be that is as uneven as
            this one, were they equally good. Takes images as independent; where groups are large, trust the interval.
        gained, lost: numbers of the images that only the second, and only the first, has right.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    gained: np.ndarray
    lost: np.ndarray


def compare(first: np.ndarray, second: np.ndarray, groups: np.ndarray | None = None) -> Comparison:
    """Two models by whether each image was right (N,), in the same order; `groups` (N,) as in `bootstrap_interval`."""
    first = _truths(first, "right and wrong guesses of the first model")
    second = _truths(second, "right and wrong guesses of the second model", len(first))
    differences = second.astype(np.int64) - first
    gained, lost = np.flatnonzero(differences > 0), np.flatnonzero(differences < 0)
    return Comparison(
        float(differences.mean()),
        bootstrap_interval(differences, groups),
        mcnemar(len(gained), len(lost)),
        gained,
        lost,
    )


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


@dataclass(frozen=True)
class RobustnessFit:
    """What accuracy on a shifted set comes, in other models, with an accuracy on the standard set.

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


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval

_NUM_ROWS, _NUM_COLUMNS = 2048, 4096  # of a block of cosines: 64 MiB
# Cosines of equal features differ in float64 by some 1e-16 with their place in a block; those of different ones, as
# models give them, hardly ever by as little as this.
_SAME = 1e-11


@dataclass(frozen=True)
class Ranking:
    """One direction of retrieval.

    Args:
        num_candidates: how many each query chooses among. Among more it is harder: compare only equal numbers.
        queries: (Q,) numbers of the texts or images that ask. An image without a text does not: it has nothing to find.
        ranks: (Q,) the place, from 1, of the best of its own. `bootstrap_interval(ranks <= K)` is recall's interval.
        recall: by K, the share of queries that find one of their own among the first K.
        median_rank, mean_rank: of ranks.
        mean_average_precision: by K: of each query, the precision at each of its own among the first K, summed and
            divided by how many could be there (its own, or K if fewer).
    """

    num_candidates: int
    queries: np.ndarray
    ranks: np.ndarray
    recall: dict[int, float]
    median_rank: float
    mean_rank: float
    mean_average_precision: dict[int, float]


@dataclass(frozen=True)
class Retrieval:
    """Both directions, by what is found: `images` by their texts, `texts` by their images.

    `images.recall[K]` is CLIP_benchmark's image_retrieval_recall@K, `texts.recall[K]` its text_retrieval_recall@K. It
    differs for ties alone, and by counting an image without texts as one that finds nothing.
    """

    images: Ranking
    texts: Ranking


def retrieval(
    image_features: Tensor | np.ndarray,
    text_features: Tensor | np.ndarray,
    image_of_text: Tensor | np.ndarray | Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
) -> Retrieval:
    """Images by texts and texts by images, exact, over blocks of the matrix of cosines and never the whole.

    The cosines are taken in float64, so that ties are ties in every block, process and device. A text that is equal to
    one of another image ties with it, and finds nothing at rank 1.

    Where there are several processes, all call this with the same features, and each takes a part of the images.

    Args:
        image_features: (I, E), of any length but 0. Where they are, all is computed.
        text_features: (T, E), likewise.
        image_of_text: (T,) the image that each text belongs to; images have any number of texts.

    Raises:
        ValueError: features that have no direction (NaN, infinite or 0), or that do not belong together.
    """
    for k in ks:
        _check_k(k)
    images, texts = torch.as_tensor(image_features), torch.as_tensor(text_features)
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        shapes = f"{tuple(images.shape)} and {tuple(texts.shape)}"
        raise ValueError(f"image and text features have shapes {shapes}; they are (I, E) and (T, E) with one E")
    if not len(images) or not len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} texts; retrieval needs at least one of each")
    owner = np.asarray(image_of_text.cpu() if isinstance(image_of_text, Tensor) else image_of_text)
    if owner.shape != (len(texts),) or owner.dtype.kind not in "iu":
        found = f"shape {owner.shape} and type {owner.dtype}"
        raise ValueError(f"image_of_text is a whole number for each of {len(texts)} texts; it has {found}")
    if owner.min() < 0 or owner.max() >= len(images):
        wrong = owner[(owner < 0) | (owner >= len(images))][0]
        raise ValueError(f"image_of_text says image {wrong}; with {len(images)} images they are 0 to {len(images) - 1}")
    better_images, better_texts = _count_better(images, texts, owner.astype(np.int64))
    return Retrieval(
        _ranking(better_images, np.arange(len(texts)), len(images), ks), _ranking(better_texts, owner, len(texts), ks)
    )


def _ranking(better: np.ndarray, query: np.ndarray, num_candidates: int, ks: Sequence[int]) -> Ranking:
    """Of each pair of a query and its own (T,): how many of others are as good or better, and which query it is."""
    order = np.lexsort((better, query))
    queries, first, sizes = np.unique(query[order], return_index=True, return_counts=True)
    number = np.arange(len(order)) - np.repeat(first, sizes) + 1  # of its own, the best is 1
    places = better[order] + number  # among all
    ranks = places[first]
    precision = {}
    for k in ks:
        summed = np.add.reduceat(np.where(places <= k, number / places, 0.0), first)
        precision[k] = float((summed / np.minimum(sizes, k)).mean())
    return Ranking(
        num_candidates,
        queries,
        ranks,
        {k: float((ranks <= k).mean()) for k in ks},
        float(np.median(ranks)),
        float(ranks.mean()),
        precision,
    )


@torch.inference_mode()
def _count_better(images: Tensor, texts: Tensor, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each text: other images at least as near to it as its own, and other images' texts as near to its image.

    Images are taken by falling number of texts, and texts in the order of their images. So the images that have an
    n-th text are the first rows of a block, and a block's own pairs are neighbours.
    """
    device = torch.device("cpu") if images.device.type == "mps" else images.device  # which knows no float64
    image_norms, text_norms = _norms(images, "image"), _norms(texts, "text")

    def unit(features: Tensor, norms: Tensor, rows: np.ndarray) -> Tensor:
        chosen = torch.from_numpy(rows)
        return features[chosen.to(features.device)].to(device).double() / norms[chosen, None].to(device)

    num_texts = np.bincount(owner, minlength=len(images))
    image_order = np.argsort(-num_texts, kind="stable")
    rows = np.empty_like(image_order)  # of images, in that order
    rows[image_order] = np.arange(len(images))
    text_order = np.argsort(rows[owner], kind="stable")
    ends = np.cumsum(num_texts[image_order])  # of the texts of each row
    starts = ends - num_texts[image_order]

    own = torch.empty(len(texts), dtype=torch.float64, device=device)  # cosines of texts with their images, in order
    for start in range(0, len(texts), _NUM_ROWS):
        chosen = text_order[start : start + _NUM_ROWS]
        pair = unit(images, image_norms, owner[chosen]), unit(texts, text_norms, chosen)
        own[start : start + _NUM_ROWS] = (pair[0] * pair[1]).sum(dim=1) - _SAME

    rank, world_size = place()
    num_rows = min(_NUM_ROWS, -(-len(images) // world_size))
    better = torch.zeros(2, len(texts), dtype=torch.int64, device=device)
    for top in range(rank * num_rows, len(images), world_size * num_rows):
        chosen = image_order[top : top + num_rows]
        block_images = unit(images, image_norms, chosen)
        first_texts = torch.from_numpy(starts[top : top + num_rows]).to(device)
        own_texts = range(int(starts[top]), int(ends[top + len(chosen) - 1]))
        for left in range(0, len(texts), _NUM_COLUMNS):
            columns = slice(left, min(left + _NUM_COLUMNS, len(texts)))
            cosines = block_images @ unit(texts, text_norms, text_order[columns]).T  # (n, m)
            low, high = max(own_texts.start, columns.start), min(own_texts.stop, columns.stop)
            if low < high:
                pairs = rows[owner[text_order[low:high]]] - top, np.arange(low, high) - left
                cosines[torch.from_numpy(pairs[0]).to(device), torch.from_numpy(pairs[1]).to(device)] = -torch.inf
            better[0, columns] += _count(cosines >= own[columns], dim=0)
            for number in range(int(num_texts[chosen[0]])):
                having = int((num_texts[chosen] > number).sum())
                numbered = first_texts[:having] + number
                better[1, numbered] += _count(cosines[:having] >= own[numbered, None], dim=1)
    counts = np.empty((2, len(texts)), dtype=np.int64)
    counts[:, text_order] = sum(collect(better.cpu().numpy()))
    return counts[0], counts[1]


def _count(is_true: Tensor, dim: int) -> Tensor:
    if is_true.device.type == "cpu":  # NumPy counts bytes four times as fast, and counting is most of the work
        return torch.from_numpy(np.asarray(np.count_nonzero(is_true.numpy(), axis=dim)))
    return is_true.sum(dim=dim)


def _norms(features: Tensor, what: str) -> Tensor:
    norms = torch.cat([part.cpu().double().norm(dim=1) for part in features.split(_NUM_ROWS)])
    for is_bad, why in ((~torch.isfinite(norms), "not finite (NaN or infinite)"), (norms == 0, "zero")):
        if is_bad.any():
            raise ValueError(f"{what} features: {_rows(is_bad.numpy())} {why}; a cosine needs a direction")
    return norms


def recall_at_1(queries: Tensor, keys: Tensor, chunk_size: int = 1024) -> float:
    """Share of queries (N, E) that are nearer to their own key (same row) than to any other; a tie is a miss.

    Raises:
        ValueError: there are none.
    """
    if not len(queries):
        raise ValueError("retrieval needs at least one pair, and there is none")
    hits = 0
    for start in range(0, len(queries), chunk_size):
        cosines = queries[start : start + chunk_size] @ keys.T  # (n, N)
        rows = torch.arange(len(cosines), device=cosines.device)
        own = cosines[rows, start + rows].clone()
        cosines[rows, start + rows] = -torch.inf
        hits += int((own > cosines.max(dim=1).values).sum())
    return hits / len(queries)
