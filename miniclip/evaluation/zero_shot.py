"""Zero-shot classification: prompts in, a classifier out, and scores with their intervals (paper section 3.1).

`zero_shot_classifier` makes the classifier, `classify` applies it to features of images, `ClassificationScores` says
what came of it. Features are computed once and classified by any number of sets of prompts.

N images, C classes, E embedding, K guesses kept per image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..common.arguments import check_list, check_texts, shown
from ..common.modules import evaluating
from ..common.wording import percent
from .datasets.sets import LabelledImages
from .features import ImageFeatures, encode_images, encode_texts, own_tokenize
from .measures.classification import (
    Calibration,
    Confusion,
    PerClass,
    Subgroups,
    calibration,
    is_among_guesses,
    macro_f1,
    mean_per_class_recall,
    per_class,
    subgroup_accuracy,
)
from .measures.statistics import wilson_interval
from .measures.ties import rank_classes
from .prompts import Prompts, class_prompts
from .scores import Bar, Cell, ClassScores, Example, Gallery, Guess, spread, worst_first

_PROMPTS_AT_ONCE = 65_536  # whose features are in memory
_COSINES_AT_ONCE = 2**22  # likewise: 16 MiB
_MOST_CONFUSION_CLASSES = 200  # of more, JSON keeps the confused pairs alone
_GALLERY = 24  # examples of a kind


def zero_shot_classifier(
    model: Any,
    classnames: Sequence[str],
    templates: Prompts,
    tokenize: Callable[[list[str]], Any] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Tensor:
    """One unit vector for each class: the mean of its prompts' unit features, made unit again (paper section 3.1.4).

    Classes of the same prompts get the same vector, bit for bit. The model encodes in evaluation mode, and then has its
    own mode again.

    Args:
        model: has `encode_text`.
        classnames: C names.
        templates: wordings, with `{}` or `{c}` where the name goes, or functions of the name; or a mapping from each
            name to its own prompts, as many as there are.
        tokenize: texts to token ids; by default CLIP's own.
        progress: called with the number of different prompts done.

    Returns:
        (E, C), columns of unit length. `image_features @ classifier` are cosines.

    Raises:
        ValueError: no classes or no templates, a template without a place for the name, or a class without prompts.
    """
    if not hasattr(model, "encode_text"):
        raise ValueError(f"model is {shown(model)}; it must be a model, as `load` returns it first")
    classnames = check_texts("classnames", classnames)
    if not isinstance(templates, Mapping):
        templates = check_list("templates", templates, "texts with {} for the class name")
    if not classnames or not templates:
        raise ValueError(f"{len(classnames)} class names and {len(templates)} templates; each needs at least one")
    prompts: dict[tuple[str, ...], list[str]] = {}  # of the different classes, in the order of the first
    keys = []
    for name in classnames:
        own = class_prompts(templates, name)
        keys.append(tuple(sorted(own)))
        prompts.setdefault(keys[-1], own)
    means, done = [], 0
    for block in _blocks(list(prompts.values()), _PROMPTS_AT_ONCE):
        texts = [prompt for own in block for prompt in own]
        report = None if progress is None else (lambda count, before=done: progress(before + count))
        features = encode_texts(model, texts, tokenize or own_tokenize(model), report)  # (texts, E)
        means += [each.mean(dim=0) for each in features.split([len(own) for own in block])]
        done += len(set(texts))
    column = {key: position for position, key in enumerate(prompts)}
    return F.normalize(torch.stack(means)[[column[key] for key in keys]], dim=-1).T


def _blocks(prompts: list[list[str]], most: int) -> list[list[list[str]]]:
    """Classes in order, in blocks of about `most` prompts."""
    blocks: list[list[list[str]]] = [[]]
    size = 0
    for own in prompts:
        if size and size + len(own) > most:
            blocks.append([])
            size = 0
        blocks[-1].append(own)
        size += len(own)
    return blocks


def zero_shot_scores(
    model: Any,
    preprocess: Callable[[Image.Image], Tensor],
    data: LabelledImages,
    *,
    tokenize: Callable[[list[str]], Any] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> ClassificationScores:
    """Classifies every image of a data set by its prompts; each process encodes its part of the images.

    Args:
        model: has `encode_image`, `encode_text`, `logit_scale`.
        preprocess: PIL image to (3, R, R).
        tokenize: by default CLIP's own.
        num_workers: processes that decode.
        progress: called with the number of images done, of all processes'.

    Returns:
        The same in every process, for any number of processes and any batch size.

    Raises:
        ValueError: not one image could be read, or the features are not finite.
    """
    classifier = zero_shot_classifier(model, data.classnames, data.templates, tokenize)
    images = encode_images(
        evaluating(model, model.encode_image),
        preprocess,
        data,
        device=model.logit_scale.device,
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress,
    )
    return classify(images, data, classifier, float(model.logit_scale.detach().exp()))


def classify(
    images: ImageFeatures,
    data: LabelledImages,
    classifier: Tensor,
    logit_scale: float,
    ks: Sequence[int] = (1, 5),
) -> ClassificationScores:
    """The nearest classes of each image; of equally near ones, as classes of the same prompts are, the first.

    Args:
        images: of `data`, whose class names and prompts made the classifier.
        classifier: (E, C), unit columns.
        logit_scale: what multiplies cosines for the softmax, not its logarithm.
        ks: for accuracies among the first k guesses; the largest, and at least 5, is the number of guesses kept.

    Raises:
        ValueError: the classifier is not finite, has no direction for a class, or another width than the images.
    """
    check_classifier(images, data, classifier)
    C = len(data.classnames)
    num_guesses = min(max(5, *ks), C)
    # Filled in place: small tensors that are kept between large ones would keep the memory of those from being used.
    ranked = torch.empty(len(images.unit), num_guesses, dtype=torch.int64)
    best_cosines, best_probabilities = (torch.empty(ranked.shape) for _ in range(2))
    for block, cosines in class_cosines(images.unit, classifier):
        ranked[block] = rank_classes(cosines, num_guesses)
        best_cosines[block] = cosines.gather(1, ranked[block])
        best_probabilities[block] = cosines.mul_(logit_scale).softmax(dim=-1).gather(1, ranked[block])
    return ClassificationScores(
        data,
        images.indices,
        np.array(data.labels)[images.indices],
        ranked.numpy(),
        best_cosines.numpy(),
        best_probabilities.numpy(),
        images.unreadable,
        tuple(ks),
        same_names(different_columns(classifier)[1], data.classnames),
    )


def class_cosines(unit: Tensor, classifier: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The cosines (n, C) of images with all classes, block by block, each with the rows (slice of N) that it has.

    Equal columns become one, since the last bits of a product depend on the position of a column.

    Args:
        unit: (N, E) of length 1.
        classifier: (E, C), unit columns.
    """
    columns, column = different_columns(classifier)
    for start in range(0, len(unit), size := rows_at_once(classifier.shape[1])):
        block = slice(start, start + size)
        yield block, (unit[block] @ columns)[:, column]


def rows_at_once(num_classes: int) -> int:
    """How many images to compare with all classes at a time, so that memory does not grow with either."""
    return max(1, _COSINES_AT_ONCE // num_classes)


def check_classifier(images: ImageFeatures, data: Any, classifier: Tensor) -> None:
    """Raises ValueError if the classifier (E, C) is of no use for these images."""
    if not torch.isfinite(classifier).all():
        raise ValueError(f"the model gives features that are not finite, for the prompts of {data.name}")
    is_zero = ~classifier.any(dim=0).cpu().numpy()
    if is_zero.any():
        name = data.classnames[int(is_zero.argmax())]
        raise ValueError(
            f"the model gives features that are zero, for the prompts of {name!r} in {data.name}; "
            "a cosine needs a direction"
        )
    widths = images.features.shape[1], classifier.shape[0]
    if widths[0] != widths[1]:
        raise ValueError(
            f"the model gives {widths[0]} numbers for an image and {widths[1]} for a text; they must be equal"
        )


def different_columns(classifier: Tensor) -> tuple[Tensor, np.ndarray]:
    """The columns (E, D) that differ from each other, and which of them each class (C,) has."""
    columns = classifier.cpu().float().T.contiguous()
    number: dict[bytes, int] = {}
    column = np.array([number.setdefault(each.tobytes(), len(number)) for each in columns.numpy()])
    _, first = np.unique(column, return_index=True)
    return columns[torch.from_numpy(first)].T, column


def same_names(column: np.ndarray, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Groups of names of the classes that have one and the same column."""
    alike: dict[int, list[str]] = {}
    for name, number in zip(names, column.tolist(), strict=True):
        alike.setdefault(number, []).append(name)
    return tuple(tuple(each) for each in alike.values() if len(each) > 1)


def told_of_same_names(groups: Sequence[Sequence[str]]) -> list[str]:
    """A sentence for each of the first groups of `same_names`."""
    return [f"{len(same)} classes have the prompts of {same[0]!r}; all go to the first" for same in groups[:5]]


# ---------------------------------------------------------------------------------------------------------------------
# What it comes to


@dataclass(frozen=True)
class Metrics:
    """Measures of a classification, as shares of 1.

    Args:
        acc1, acc5: share of images whose class is the first guess, or among the first five.
        top_k: the same by k, for every k that was asked for.
        mean_per_class_recall: the mean over classes that have images, so that rare ones count as much.
        macro_f1: the mean over them of the harmonic mean of recall and precision.
        interval: the 95 % interval of acc1, `wilson_interval`.
        calibration: of the first guess's probability.
        per_class: a row for each class; recall is its acc1, NaN for a class without images.
        confusion: images by true class and first guess.
    """

    num_images: int
    acc1: float
    acc5: float
    top_k: Mapping[int, float]
    mean_per_class_recall: float
    macro_f1: float
    interval: tuple[float, float]
    calibration: Calibration
    per_class: PerClass
    confusion: Confusion


@dataclass(frozen=True)
class ClassificationScores(ClassScores):
    """
    Args:
        labels: (N,) true classes.
        ranked: (N, K) classes by falling cosine.
        cosines: (N, K) of those.
        probabilities: (N, K) of those, softmax over all classes at the model's logit scale; relative to the list of
            classes, never "is it one of these at all".
        ks: the accuracies to measure; k beyond the number of classes is one of all of them.
    """

    data: LabelledImages
    indices: np.ndarray
    labels: np.ndarray
    ranked: np.ndarray
    cosines: np.ndarray
    probabilities: np.ndarray
    unreadable: tuple[str, ...]
    ks: tuple[int, ...] = (1, 5)
    same_prompts: tuple[tuple[str, ...], ...] = ()

    task = "zeroshot_classification"
    main_column = "top-1 %"
    headlines: ClassVar = {"acc1": "top-1"}
    bars_title = "Recall"
    gallery_note = (
        "Guesses carry the softmax over this list of classes, in %: which of them fits best, never whether any does."
    )

    @property
    def is_right(self) -> np.ndarray:
        """(N,) whether the first guess is."""
        return self.ranked[:, 0] == self.labels

    @cached_property
    def metrics(self) -> Metrics:
        num_guesses, C = self.ranked.shape[1], len(self.classnames)
        if most := [k for k in self.ks if num_guesses < min(k, C)]:
            raise ValueError(f"top-{most[0]} can't be told from {num_guesses} guesses for each image")
        top_k = {
            k: float(is_among_guesses(self.ranked, self.labels, min(k, num_guesses)).mean())
            for k in sorted({1, 5, *self.ks})
        }
        guesses = self.ranked[:, 0]
        confusion = Confusion.of(self.labels, guesses, C)
        return Metrics(
            num_images=len(self.labels),
            acc1=top_k[1],
            acc5=top_k[5],
            top_k=top_k,
            mean_per_class_recall=mean_per_class_recall(confusion),
            macro_f1=macro_f1(confusion),
            interval=wilson_interval(self.is_right, self.groups),
            calibration=calibration(np.minimum(self.probabilities[:, 0], 1), self.is_right),
            per_class=per_class(self.labels, guesses, C, self.groups),
            confusion=confusion,
        )

    def subgroups(self, column: str) -> Subgroups:
        """Accuracy for each value of a column of the data's metadata.

        Raises:
            ValueError: there is no such column.
        """
        values = self.data.column(column)
        return subgroup_accuracy(self.is_right, [values[index] for index in self.indices], self.groups)

    def values(self) -> dict[str, float]:
        metrics = self.metrics
        values = {f"acc{k}": share for k, share in metrics.top_k.items()}
        values |= {"mean_per_class_recall": metrics.mean_per_class_recall, "macro_f1": metrics.macro_f1}
        return values | {"calibration_error": metrics.calibration.error}

    def benchmark_values(self) -> dict[str, float]:
        few = [f"acc{k}" for k in self.metrics.top_k if k > len(self.classnames)]  # NaN to CLIP_benchmark
        return {name: value for name, value in self.values().items() if name not in few}

    def intervals(self) -> dict[str, tuple[float, float]]:
        return {"acc1": self.metrics.interval}

    def rows(self) -> list[dict[str, Cell]]:
        metrics, C = self.metrics, len(self.classnames)
        cells: dict[str, Cell] = {"classes": C, "top-1 %": metrics.acc1, "95 % interval": metrics.interval}
        cells |= {f"top-{k} %": share if k < C else None for k, share in metrics.top_k.items() if k > 1}
        cells |= {"mean per class %": metrics.mean_per_class_recall, "macro F1 %": metrics.macro_f1}
        return [cells | {"ECE %": metrics.calibration.error}]

    def as_dict(self) -> dict[str, Any]:
        metrics, names = self.metrics, self.classnames
        return super().as_dict() | {
            "per_class": metrics.per_class.as_dicts(names),
            "confused_pairs": [
                {"class": true, "guess": guess, "images": count} for true, guess, count in self.confused_pairs()
            ],
            "confusion": metrics.confusion.matrix().tolist() if len(names) <= _MOST_CONFUSION_CLASSES else None,
            "calibration": metrics.calibration.as_dict(),
            "samples": {
                "keys": self.data.shown_keys(self.indices),
                "labels": self.labels.tolist(),
                "guesses": self.ranked[:, 0].tolist(),
                "cosines": [round(float(value), 6) for value in self.cosines[:, 0]],
                "probabilities": [round(float(value), 6) for value in self.probabilities[:, 0]],
                "groups": self.groups.tolist(),
            },
        }

    def columns(self) -> dict[str, Any]:
        names = np.array(self.classnames, dtype=object)
        return self.with_metadata(
            {
                "image": [self.data.shown(index) for index in self.indices],
                "label": names[self.labels].tolist(),
                "guess": names[self.ranked[:, 0]].tolist(),
                "is_right": self.is_right,
                "cosine": self.cosines[:, 0],
                "probability": self.probabilities[:, 0],
                "guesses": [names[row].tolist() for row in self.ranked],
                "cosines": list(self.cosines),
                "probabilities": list(self.probabilities),
                "group": self.groups.tolist(),
            }
        )

    @property
    def confusion(self) -> Confusion:
        return self.metrics.confusion

    @property
    def calibration(self) -> Calibration:
        return self.metrics.calibration

    def bars(self) -> list[Bar]:
        table = self.metrics.per_class
        return worst_first(self.classnames, table.images, table.recall, table.recall_intervals)

    def galleries(self) -> list[Gallery]:
        """Images that were wrong (the surest first, as they tell most), unsure, and right."""
        is_right = self.is_right
        surest_first = np.argsort(-self.probabilities[:, 0], kind="stable")
        wrong, right = surest_first[~is_right[surest_first]], np.flatnonzero(is_right)
        unsure = np.zeros(0, dtype=np.int64)
        if self.ranked.shape[1] > 1:
            margins = self.cosines[:, 0] - self.cosines[:, 1]
            unsure = np.argsort(margins, kind="stable")[: max(1, len(margins) // 4)]
        titles = {
            "wrong": f"Wrong, surest first ({min(_GALLERY, len(wrong))} of {len(wrong)})",
            "unsure": "Unsure: first and second guess closest together",
            "right": f"Right ({min(_GALLERY, len(right))} of {len(right)})",
        }
        rows = {"wrong": wrong[:_GALLERY], "unsure": unsure[:_GALLERY], "right": spread(right, _GALLERY)}
        return [Gallery(kind, title, [self._example(row) for row in rows[kind]]) for kind, title in titles.items()]

    def _example(self, row: int) -> Example:
        label = int(self.labels[row])
        guesses = [
            Guess(self.classnames[c], percent(share), float(share), c == label)
            for c, share in zip(self.ranked[row, :3].tolist(), self.probabilities[row, :3], strict=True)
        ]
        return Example(int(self.indices[row]), self.classnames[label], tuple(guesses), not self.is_right[row])
