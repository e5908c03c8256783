"""Zero-shot classification of images that have any number of labels: average precision of each class.

N images, C classes, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..common.files import as_plain
from .datasets.sets import MultilabelImages
from .features import ImageFeatures
from .measures.classification import Multilabel, multilabel
from .scores import Bar, Cell, ClassScores, Example, Gallery, Guess, spread, worst_first
from .zero_shot import check_classifier, different_columns, same_names

_MULTILABEL_GALLERY = 12  # examples of a kind


def score_labels(images: ImageFeatures, data: MultilabelImages, classifier: Tensor) -> MultilabelScores:
    """Cosines of every image with every class; `classifier` (E, C) has unit columns.

    Raises:
        ValueError: as `classify`.
    """
    check_classifier(images, data, classifier)
    columns, column = different_columns(classifier)
    cosines = (images.unit @ columns).numpy()[:, column]
    same = same_names(column, data.classnames)
    return MultilabelScores(data, images.indices, data.labels[images.indices], cosines, images.unreadable, same)


@dataclass(frozen=True)
class MultilabelScores(ClassScores):
    """
    Args:
        labels: (N, C) booleans.
        cosines: (N, C).
    """

    data: MultilabelImages
    indices: np.ndarray
    labels: np.ndarray
    cosines: np.ndarray
    unreadable: tuple[str, ...]
    same_prompts: tuple[tuple[str, ...], ...] = ()

    task = "zeroshot_multilabel"
    main_column = "mAP %"
    headlines: ClassVar = {"mean_average_precision": "mAP"}
    bars_title = "Average precision"
    gallery_note = "Guesses carry their cosine; green ones are labels of the image."

    @cached_property
    def metrics(self) -> Multilabel:
        return multilabel(self.cosines, self.labels)

    @property
    def benchmark_task(self) -> str:
        return "zeroshot_classification"

    def values(self) -> dict[str, float]:
        return {"mean_average_precision": self.metrics.mean_average_precision}

    def rows(self) -> list[dict[str, Cell]]:
        metrics = self.metrics
        return [
            {
                "classes": len(self.classnames),
                "without images": len(metrics.left_out) or None,
                "mAP %": metrics.mean_average_precision,
            }
        ]

    def as_dict(self) -> dict[str, Any]:
        metrics = self.metrics
        per_class = zip(self.classnames, metrics.positives, metrics.per_class, strict=True)
        return super().as_dict() | {
            "per_class": [
                {"class": name, "images": int(positives), "average_precision": as_plain(precision)}
                for name, positives, precision in per_class
            ]
        }

    def columns(self) -> dict[str, Any]:
        names = np.array(self.classnames, dtype=object)
        return self.with_metadata(
            {
                "image": [self.data.shown(index) for index in self.indices],
                "labels": [names[row].tolist() for row in self.labels],
                "cosines": list(self.cosines),
            }
        )

    def bars(self) -> list[Bar]:
        return worst_first(self.classnames, self.metrics.positives, self.metrics.per_class)

    def galleries(self) -> list[Gallery]:
        """The images whose labels come latest among their guesses, and some others."""
        order = np.argsort(-self.cosines, axis=1, kind="stable")
        is_own = np.take_along_axis(self.labels, order, axis=1)
        num_own = is_own.sum(axis=1)
        # The precision at each image's labels; an image without labels has nothing to find.
        ranks = np.arange(1, is_own.shape[1] + 1)
        precision = (is_own * is_own.cumsum(axis=1) / ranks).sum(axis=1) / np.maximum(num_own, 1)
        worst = np.argsort(np.where(num_own > 0, precision, np.inf), kind="stable")
        worst = worst[(num_own > 0)[worst] & (precision < 1)[worst]][:_MULTILABEL_GALLERY]
        others = spread(np.setdiff1d(np.arange(len(precision)), worst), _MULTILABEL_GALLERY)
        return [
            Gallery(kind, title, [self._example(row, order[row], kind == "wrong") for row in rows])
            for kind, title, rows in (("wrong", "Labels found last", worst), ("right", "Others", others))
        ]

    def _example(self, row: int, order: np.ndarray, is_wrong: bool) -> Example:
        own = np.flatnonzero(self.labels[row])
        top = order[: min(6, max(3, len(own)))]
        most = max(float(self.cosines[row, top[0]]), 1e-9)
        guesses = []
        for c in top.tolist():
            cosine = float(self.cosines[row, c])
            share = min(max(cosine / most, 0), 1)
            guesses.append(Guess(self.classnames[c], f"{cosine:.3f}", share, bool(self.labels[row, c])))
        label = ", ".join(self.classnames[c] for c in own) or "none of them"
        return Example(int(self.indices[row]), label, tuple(guesses), is_wrong)
