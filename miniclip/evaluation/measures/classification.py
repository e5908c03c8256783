"""Measures of classification and of its subgroups.

Pure functions of arrays, without models, files or names: a class is its index, so two classes of one name stay two.
A value that is undefined is NaN and left out of means, never 0.

N images, C classes, K guesses, G groups of images that are right or wrong together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...common.files import as_plain
from ...data.reading.cells import has_no_value
from .statistics import as_classes, as_column, as_matrix, as_truths, check_k, group_sizes, wilson_interval

# ---------------------------------------------------------------------------------------------------------------------
# Classification: one true class each


def is_among_guesses(ranked: np.ndarray, labels: np.ndarray, k: int = 1) -> np.ndarray:
    """(N,) whether the own class is among the first k of K ranked guesses (N, K), where the cosines are not kept."""
    check_k(k)
    ranked = as_matrix(ranked, "ranked guesses")
    if k > ranked.shape[1]:
        raise ValueError(f"top-{k} can't be told from {ranked.shape[1]} guesses for each image")
    return (ranked[:, :k] == as_column(labels, "labels", len(ranked))[:, None]).any(axis=1)


@dataclass(frozen=True)
class Confusion:
    """How often each class is taken for each: only pairs that occur, so it grows with the images, not with C².

    Args:
        labels, guesses, counts: (P,) true class, first guess, and the number of images with both; sorted by class.
    """

    num_classes: int
    labels: np.ndarray
    guesses: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray, guesses: np.ndarray, num_classes: int) -> Confusion:
        """Of true classes (N,) and first guesses (N,)."""
        labels = as_classes(labels, "labels", num_classes)
        guesses = as_classes(guesses, "guesses", num_classes, len(labels))
        pairs, counts = np.unique(labels.astype(np.int64) * num_classes + guesses, return_counts=True)
        return cls(num_classes, pairs // num_classes, pairs % num_classes, counts)

    @cached_property
    def images(self) -> np.ndarray:
        """(C,) images of each class."""
        return self._per_class(self.labels, self.counts)

    @cached_property
    def guessed(self) -> np.ndarray:
        """(C,) images guessed to be of each class."""
        return self._per_class(self.guesses, self.counts)

    @cached_property
    def right(self) -> np.ndarray:
        """(C,) images of each class that were guessed to be of it."""
        return self._per_class(self.labels, self.counts * (self.labels == self.guesses))

    def _per_class(self, classes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        found = np.zeros(self.num_classes, dtype=np.int64)
        np.add.at(found, classes, counts)
        return found

    def matrix(self, classes: np.ndarray | None = None) -> np.ndarray:
        """(n, n) images by true class (row) and first guess (column), of some classes or of all."""
        classes = np.arange(self.num_classes) if classes is None else np.asarray(classes)
        position = np.full(self.num_classes, -1)
        position[classes] = np.arange(len(classes))
        rows, columns = position[self.labels], position[self.guesses]
        is_inside = (rows >= 0) & (columns >= 0)
        dense = np.zeros((len(classes), len(classes)), dtype=np.int64)
        dense[rows[is_inside], columns[is_inside]] = self.counts[is_inside]
        return dense


def most_confused(confusion: Confusion, most: int = 10) -> list[tuple[int, int, int]]:
    """(true class, guessed class, images), the most frequent mistakes first; of equally many, the later class first."""
    mistakes = np.flatnonzero(confusion.labels != confusion.guesses)
    order = mistakes[np.argsort(confusion.counts[mistakes], kind="stable")[::-1][:most]]
    return [(int(confusion.labels[i]), int(confusion.guesses[i]), int(confusion.counts[i])) for i in order]


def per_class_recall(confusion: Confusion) -> np.ndarray:
    """(C,) share of a class's images that got it; NaN for a class without images."""
    return _shares(confusion.right, confusion.images)


def per_class_precision(confusion: Confusion) -> np.ndarray:
    """(C,) share of the images guessed to be of a class that are; NaN for a class that nothing was guessed to be."""
    return _shares(confusion.right, confusion.guessed)


def per_class_f1(confusion: Confusion) -> np.ndarray:
    """(C,) harmonic mean of recall and precision, 0 if nothing was right; NaN for a class without images."""
    f1 = _shares(2 * confusion.right, confusion.images + confusion.guessed)
    return np.where(confusion.images > 0, f1, np.nan)


def mean_per_class_recall(confusion: Confusion) -> float:
    """The mean of recall over classes that have images, rare ones as much as common: also called balanced accuracy.

    As scikit-learn's `balanced_accuracy_score`, which CLIP_benchmark reports under our name.
    """
    return _mean_of_classes(per_class_recall(confusion))


def macro_f1(confusion: Confusion) -> float:
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

    def as_dicts(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """A row for each class, for JSON."""
        return [
            {
                "class": name,
                "images": int(self.images[c]),
                "guessed": int(self.guessed[c]),
                "recall": as_plain(self.recall[c]),
                "precision": as_plain(self.precision[c]),
                "f1": as_plain(self.f1[c]),
                "recall_interval_95": [as_plain(end) for end in self.recall_intervals[c]],
            }
            for c, name in enumerate(names)
        ]


def per_class(labels: np.ndarray, guesses: np.ndarray, num_classes: int, groups: np.ndarray | None = None) -> PerClass:
    """The table by class of true classes (N,) and first guesses (N,); `groups` (N,) as in `wilson_interval`."""
    labels, guesses = np.asarray(labels), np.asarray(guesses)
    confusion = Confusion.of(labels, guesses, num_classes)
    group, _ = group_sizes(groups, len(labels))
    intervals = np.full((num_classes, 2), np.nan)
    order = np.argsort(labels, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        c = labels[rows[0]]
        intervals[c] = wilson_interval(guesses[rows] == c, group[rows])
    return PerClass(
        confusion.images,
        confusion.guessed,
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
    scores = as_column(scores, "scores")
    is_positive = as_truths(is_positive, "positives", len(scores))
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
    cosines, is_positive = as_matrix(cosines, "cosines"), as_matrix(is_positive, "positives")
    if cosines.shape != is_positive.shape:
        raise ValueError(f"cosines have shape {cosines.shape}, positives {is_positive.shape}; they are the same")
    found = np.array([average_precision(*column) for column in zip(cosines.T, is_positive.T, strict=True)])
    left_out = tuple(np.flatnonzero(np.isnan(found)).tolist())
    return Multilabel(_mean_of_classes(found), found, is_positive.astype(bool).sum(axis=0), left_out)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration: are guesses of probability 80 % right in 80 % of cases?


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

    def as_dict(self) -> dict[str, Any]:
        return {
            "error": self.error,
            "largest_error": self.largest_error,
            "edges": self.edges.tolist(),
            "images": self.images.tolist(),
            "confidence": [as_plain(value) for value in self.confidence],
            "accuracy": [as_plain(value) for value in self.accuracy],
        }


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
    confidence = as_column(confidence, "confidences").astype(np.float64)
    correct = as_truths(correct, "right and wrong guesses", len(confidence))
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
        value: as given; None for images without one (`has_no_value`).
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

    def as_dict(self) -> dict[str, Any]:
        return {
            "gap": self.gap,
            "best": None if self.best is None else self.best.value,
            "worst": None if self.worst is None else self.worst.value,
            "subgroups": [
                {
                    "value": None if each.value is None else str(each.value),
                    "images": each.num_images,
                    "groups": each.num_groups,
                    "acc1": each.accuracy,
                    "interval_95": list(each.interval),
                    "is_too_small": each.is_too_small,
                }
                for each in self.subgroups
            ],
        }


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
    correct = as_truths(correct, "right and wrong guesses")
    if len(values) != len(correct):
        raise ValueError(f"{len(values)} values of metadata for {len(correct)} images; there is one for each")
    group, _ = group_sizes(groups, len(correct))
    rows: dict[Any, list[int]] = {}
    for row, value in enumerate(values):
        rows.setdefault(None if has_no_value(value) else value, []).append(row)
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
