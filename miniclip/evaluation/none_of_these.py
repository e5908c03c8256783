""" "None of these": how well a model rejects images of no class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .features import ImageFeatures
from .measures.thresholds import Acceptance, Separation, apply_threshold, calibrate_threshold, separation
from .zero_shot import ClassificationScores, rows_at_once


@dataclass(frozen=True)
class Outside:
    """How well the best cosine separates images of the classes from images of none of them.

    Args:
        name: of the images of none.
        inside, outside: best cosines of the halves that the threshold was not chosen on, those of `separation`.
        acceptance: the threshold, and what it does on those halves.
    """

    name: str
    inside: np.ndarray
    outside: np.ndarray
    separation: Separation
    acceptance: Acceptance

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
        }


def none_of_these(
    scores: ClassificationScores,
    others: ImageFeatures,
    groups: Sequence[str],
    classifier: Tensor,
    *,
    false_acceptance: float | None = None,
    seed: int = 0,
) -> Outside:
    """A threshold on the best cosine, chosen on one half of the images (whole groups) and tried on the other.

    Args:
        scores: of images of the classes.
        others: features of images of none of them.
        groups: a value for each image of the others' data set; those of one value belong together.
        false_acceptance: as in `calibrate_threshold`.

    Raises:
        ValueError: fewer than two groups of either.
    """
    classifier = classifier.cpu().float()
    blocks = others.unit.split(rows_at_once(classifier.shape[1]))
    best = np.concatenate([(rows @ classifier).amax(dim=1).numpy() for rows in blocks])
    inside, outside = scores.cosines[:, 0], best
    groups_inside, groups_outside = scores.groups, np.array(groups)[others.indices]
    chosen_inside = _half(groups_inside, scores.data.name, seed)
    chosen_outside = _half(groups_outside, others.data.name, seed)
    threshold = calibrate_threshold(
        inside[chosen_inside], outside[chosen_outside], split="one half", false_acceptance=false_acceptance
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
    return Outside(others.data.name, rest_inside, rest_outside, separation(rest_inside, rest_outside), acceptance)


def _half(groups: np.ndarray, name: str, seed: int) -> np.ndarray:
    """(N,) True for the images of a random half of the groups."""
    different, group = np.unique(groups, return_inverse=True)
    if len(different) < 2:
        raise ValueError(f"{name} has images of one group only; a threshold is chosen on some and tried on others")
    order = np.random.default_rng(seed).permutation(len(different))
    return order[group] < len(different) // 2
