""" "None of these": how well a model rejects images of no class, and sets of classes with a stated coverage.

N images, C classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from .features import ImageFeatures
from .measures.conformal import (
    COVERAGES,
    Coverage,
    conformal_quantile,
    is_in_set,
    least_groups,
    surprisals,
    tried_coverage,
)
from .measures.thresholds import (
    Acceptance,
    Separation,
    Threshold,
    apply_threshold,
    calibrate_threshold,
    separation,
)
from .splits import same_features
from .zero_shot import ClassificationScores, rows_at_once


@dataclass(frozen=True)
class Outside:
    """How well the best cosine separates images of the classes from images of none of them.

    Args:
        name: of the images of none.
        inside, outside: best cosines of the halves that the threshold was not chosen on, those of `separation`.
        acceptance: the threshold, and what it does on those halves.
        coverages: sets of classes, chosen and tried on the same halves of the images of the classes.
        unreadable: why the other images of none could not be read.
        false_acceptance: that was asked for; None for the best balance.
        is_promised: whether there were enough images to promise it of fresh ones.
    """

    name: str
    inside: np.ndarray
    outside: np.ndarray
    separation: Separation
    acceptance: Acceptance
    coverages: tuple[Coverage, ...] = ()
    unreadable: tuple[str, ...] = ()
    false_acceptance: float | None = None
    is_promised: bool = True

    def as_dict(self) -> dict[str, Any]:
        separation, acceptance, threshold = self.separation, self.acceptance, self.acceptance.threshold
        return {
            "outside": self.name,
            "cosine": threshold.cosine,
            "rule": threshold.rule,
            "chosen_on": {"images_inside": threshold.num_inside, "images_outside": threshold.num_outside},
            "tried_on": {"images_inside": acceptance.num_inside, "images_outside": acceptance.num_outside},
            "accepted_inside": acceptance.accepted_inside,
            "accepted_outside": acceptance.accepted_outside,
            "interval_95_inside": list(acceptance.interval_inside),
            "interval_95_outside": list(acceptance.interval_outside),
            "balanced_accuracy": acceptance.balanced_accuracy,
            "auroc": separation.auroc,
            "aupr_inside": separation.aupr_inside,
            "aupr_outside": separation.aupr_outside,
            "fpr_at_95_tpr": separation.fpr_at_95_tpr,
            "coverages": [each.as_dict() for each in self.coverages],
            "unreadable": list(self.unreadable),
        }


def none_of_these(
    images: ImageFeatures,
    scores: ClassificationScores,
    others: ImageFeatures,
    groups: Sequence[str],
    classifier: Tensor,
    logit_scale: float,
    *,
    false_acceptance: float | None = None,
    coverages: Sequence[float] | None = None,
    seed: int = 0,
) -> Outside:
    """A threshold on the best cosine, chosen on one half of the images (whole groups) and tried on the other.

    Args:
        images: features of images of the classes.
        scores: of those.
        others: features of images of none of them.
        groups: a value for each image of the others' data set; those of one value belong together.
        classifier: (E, C), unit columns.
        logit_scale: what multiplies cosines for the softmax, not its logarithm.
        false_acceptance: the share of fresh images of no class to accept at most; by default the threshold of the best
            balanced accuracy is sought.
        coverages: of sets of classes; by default those of `COVERAGES` for which there are enough images.

    Raises:
        ValueError: fewer than two groups of either, or too few for a coverage that was asked for.
    """
    _warn_of_shared(images, others)
    classifier = classifier.cpu().float()
    blocks = others.unit.split(rows_at_once(classifier.shape[1]))
    best = np.concatenate([(rows @ classifier).amax(dim=1).numpy() for rows in blocks])
    inside, outside = scores.cosines[:, 0], best
    groups_inside, groups_outside = scores.groups, np.array(groups)[others.indices]
    chosen_inside = _half(groups_inside, scores.data.name, seed)
    chosen_outside = _half(groups_outside, others.data.name, seed)
    threshold, is_promised = _chosen_threshold(
        inside[chosen_inside], outside[chosen_outside], groups_outside[chosen_outside], false_acceptance
    )
    rest_inside, rest_outside = inside[~chosen_inside], outside[~chosen_outside]
    acceptance = apply_threshold(
        threshold,
        rest_inside,
        rest_outside,
        split="the other half",
        groups_inside=groups_inside[~chosen_inside],
        groups_outside=groups_outside[~chosen_outside],
    )
    return Outside(
        others.data.name,
        rest_inside,
        rest_outside,
        separation(rest_inside, rest_outside),
        acceptance,
        _coverages(images, scores, classifier, logit_scale, chosen_inside, coverages),
        others.unreadable,
        false_acceptance,
        is_promised,
    )


def _chosen_threshold(
    inside: np.ndarray, outside: np.ndarray, groups_outside: np.ndarray, false_acceptance: float | None
) -> tuple[Threshold, bool]:
    """As `calibrate_threshold`, but for fresh images, for which the share that is accepted of those seen has to be a
    little smaller; and whether there are enough of them to promise it."""
    if false_acceptance is None:
        return calibrate_threshold(inside, outside, split="one half"), True
    largest_rejected = np.inf
    if false_acceptance > 0:
        largest_rejected = conformal_quantile(outside, 1 - false_acceptance, groups_outside)
    share = float((outside > largest_rejected).mean())
    threshold = calibrate_threshold(inside, outside, split="one half", false_acceptance=share)
    is_promised = bool(np.isfinite(largest_rejected))
    rule = f"at most {100 * false_acceptance:g} % of outside images accepted"
    if not is_promised:
        rule += f" (of {len(outside)} none; fresh ones need more images to be promised)"
    return replace(threshold, rule=rule), is_promised


def _coverages(
    images: ImageFeatures,
    scores: ClassificationScores,
    classifier: Tensor,
    logit_scale: float,
    is_chosen: np.ndarray,
    coverages: Sequence[float] | None,
) -> tuple[Coverage, ...]:
    groups = scores.groups
    num_groups = len(np.unique(groups[is_chosen]))
    asked = [each for each in COVERAGES if least_groups(each) <= num_groups] if coverages is None else coverages
    own = np.empty(len(scores.labels))
    sizes = np.zeros((len(asked), len(own)), dtype=np.int64)

    def blocks() -> Any:
        for start in range(0, len(own), size := rows_at_once(classifier.shape[1])):
            rows = slice(start, start + size)
            yield rows, surprisals((images.unit[rows] @ classifier).numpy(), logit_scale)

    for rows, values in blocks():
        own[rows] = np.take_along_axis(values, scores.labels[rows, None], axis=1)[:, 0]
    cuts = [conformal_quantile(own[is_chosen], each, groups[is_chosen]) for each in asked]
    for coverage, cut in zip(asked, cuts, strict=True):
        if np.isinf(cut):
            raise ValueError(
                f"sets of coverage {coverage:g} need {least_groups(coverage)} independent images to be chosen on, and "
                f"half of {scores.data.name} has {num_groups}"
            )
    for rows, values in blocks() if asked else ():
        for row, cut in zip(sizes, cuts, strict=True):
            row[rows] = is_in_set(values, cut, logit_scale).sum(axis=1)
    rest = ~is_chosen
    return tuple(
        tried_coverage(
            coverage, cut, int(is_chosen.sum()), is_in_set(own[rest], cut, logit_scale), row[rest], groups[rest]
        )
        for coverage, cut, row in zip(asked, cuts, sizes, strict=True)
    )


def _warn_of_shared(images: ImageFeatures, others: ImageFeatures) -> None:
    is_shared = same_features(others.features.numpy(), images.features.numpy())
    if is_shared.any():
        first = others.data.key(int(others.indices[is_shared.argmax()]))
        warnings.warn(
            f"{is_shared.sum()} of {len(is_shared)} images of {others.data.name} are in {images.data.name} as well, by "
            f"their features (the first is {first}); those outside must be of none of the classes",
            stacklevel=3,
        )


def _half(groups: np.ndarray, name: str, seed: int) -> np.ndarray:
    """(N,) True for the images of a random half of the groups."""
    different, group = np.unique(groups, return_inverse=True)
    if len(different) < 2:
        raise ValueError(f"{name} has images of one group only; a threshold is chosen on some and tried on others")
    order = np.random.default_rng(seed).permutation(len(different))
    return order[group] < len(different) // 2
