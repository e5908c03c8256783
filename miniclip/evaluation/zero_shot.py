"""Zero-shot classification: prompts in, a classifier out, and scores with their intervals (paper section 3.1).

A model here is whatever encodes images and texts; preprocessing and tokenizer are arguments. Images come as features,
so what has been encoded once is classified by any prompts.

N images, C classes, T texts, E embedding, K guesses kept per image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .datasets.sets import LabelledImages, MultilabelImages
from .features import ImageFeatures, encode_images, encode_texts, own_tokenize
from .measures.classification import (
    Calibration,
    Multilabel,
    PerClass,
    Subgroups,
    calibration,
    confusion_matrix,
    is_among_guesses,
    macro_f1,
    mean_per_class_recall,
    multilabel,
    per_class,
    subgroup_accuracy,
)
from .measures.statistics import bootstrap_interval
from .prompts import Prompts, class_prompts

_NUM_GUESSES = 5
ROWS_AT_ONCE = 4096  # images at once against all classes


def zero_shot_classifier(
    model: Any,
    classnames: Sequence[str],
    templates: Prompts,
    tokenize: Callable[[list[str]], Any] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Tensor:
    """One unit vector for each class: the mean of its prompts' unit features, made unit again (paper section 3.1.4).

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
    if not len(classnames) or not len(templates):
        raise ValueError(f"{len(classnames)} class names and {len(templates)} templates; each needs at least one")
    if isinstance(classnames, str) or isinstance(templates, str):
        raise ValueError("classnames and templates are sequences of texts; a single text was given")
    prompts = [class_prompts(templates, name) for name in classnames]
    texts = [prompt for each in prompts for prompt in each]
    features = encode_texts(model, texts, tokenize or own_tokenize(model), progress)  # (C * T, E)
    means = torch.stack([each.mean(dim=0) for each in features.split([len(each) for each in prompts])])  # (C, E)
    return F.normalize(means, dim=-1).T


# ---------------------------------------------------------------------------------------------------------------------
# Classification: one class for each image


@dataclass(frozen=True)
class Scores:
    """What a model said of each image.

    Args:
        data: what was evaluated.
        numbers: (N,) which of the data's images could be read, in order.
        labels: (N,) true classes.
        ranked: (N, K) classes by falling cosine; of equal ones, as classes of one name have, the first comes first.
        cosines: (N, K) of those.
        probabilities: (N, K) of those, softmax over all classes at the model's logit scale; relative to the list of
            classes, never "is it one of these at all".
        unreadable: why the other images could not be read.
    """

    data: LabelledImages
    numbers: np.ndarray
    labels: np.ndarray
    ranked: np.ndarray
    cosines: np.ndarray
    probabilities: np.ndarray
    unreadable: tuple[str, ...]

    @property
    def is_right(self) -> np.ndarray:
        """(N,) whether the first guess is."""
        return self.ranked[:, 0] == self.labels

    @property
    def groups(self) -> np.ndarray:
        """(N,) of those images."""
        return np.array(self.data.groups)[self.numbers]


def zero_shot_scores(
    model: Any,
    preprocess: Callable[[Image.Image], Tensor],
    data: LabelledImages,
    *,
    tokenize: Callable[[list[str]], Any] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> Scores:
    """Classifies every image of a data set by its prompts; each process a share of the images, where there are several.

    Args:
        model: has `encode_image`, `encode_text`, `logit_scale`.
        preprocess: PIL image to (3, R, R).
        tokenize: by default CLIP's own.
        num_workers: processes that decode.
        progress: called with the number of images done, of all processes'.

    Returns:
        The same in every process, and the same whatever their number and the batch size.

    Raises:
        ValueError: not one image could be read, or the features are not finite.
    """
    classifier = zero_shot_classifier(model, data.classnames, data.templates, tokenize)
    images = encode_images(
        model.encode_image,
        preprocess,
        data,
        device=model.logit_scale.device,
        batch_size=batch_size,
        num_workers=num_workers,
        progress=progress,
    )
    return classify(images, data, classifier, float(model.logit_scale.detach().exp()))


def classify(
    images: ImageFeatures, data: LabelledImages, classifier: Tensor, logit_scale: float, num_guesses: int = _NUM_GUESSES
) -> Scores:
    """The nearest classes of each image.

    Args:
        images: of `data`, whose class names and prompts made the classifier.
        classifier: (E, C), unit columns.
        logit_scale: what multiplies cosines for the softmax, not its logarithm.
        num_guesses: K, or C if there are fewer classes.

    Raises:
        ValueError: the classifier is not finite, has no direction for a class, or another width than the images.
    """
    _check_classifier(images, data, classifier)
    guesses = min(num_guesses, len(data.classnames))
    # One column for all that are equal, so that their cosines are, to the last bit.
    columns, column = classifier.cpu().float().unique(dim=1, return_inverse=True)
    parts: list[list[np.ndarray]] = []
    for rows in images.unit.split(ROWS_AT_ONCE):
        cosines = (rows @ columns)[:, column]  # (n, C)
        top, ranked = cosines.topk(min(guesses + 1, cosines.shape[1]), dim=-1)
        is_tied = (top.diff(dim=-1) == 0).any(dim=-1)
        ranked[is_tied] = cosines[is_tied].argsort(dim=-1, descending=True, stable=True)[:, : ranked.shape[1]]
        ranked = ranked[:, :guesses]
        probabilities = (logit_scale * cosines).softmax(dim=-1)
        parts.append([t.numpy() for t in (ranked, cosines.gather(1, ranked), probabilities.gather(1, ranked))])
    ranked, cosines, probabilities = (np.concatenate(column) for column in zip(*parts, strict=True))
    labels = np.array(data.labels)[images.numbers]
    return Scores(data, images.numbers, labels, ranked, cosines, probabilities, images.unreadable)


def _check_classifier(images: ImageFeatures, data: LabelledImages | MultilabelImages, classifier: Tensor) -> None:
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


@dataclass(frozen=True)
class Metrics:
    """Scores of one data set, as shares of 1.

    Args:
        acc1, acc5: share of images whose class is the first guess, or among the first five.
        top_k: the same by k, for every k that was asked for.
        mean_per_class_recall: the mean over classes that have images, so that rare ones count as much.
        macro_f1: the mean over them of the harmonic mean of recall and precision.
        interval: the 95 % interval of acc1, resampled by group.
        calibration: of the first guess's probability.
        per_class: a row for each class; recall is its acc1, NaN for a class without images.
        confusion: (C, C) images by true class (row) and first guess (column).
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
    confusion: np.ndarray


def measure(scores: Scores, ks: Sequence[int] = (1, 5)) -> Metrics:
    """
    Args:
        ks: for accuracies among the first k guesses; k beyond those kept is one of all of them.
    """
    num_guesses, num_classes = scores.ranked.shape[1], len(scores.data.classnames)
    if most := [k for k in ks if num_guesses < min(k, num_classes)]:
        raise ValueError(f"top-{most[0]} can't be told from {num_guesses} guesses for each image")
    top_k = {
        k: float(is_among_guesses(scores.ranked, scores.labels, min(k, num_guesses)).mean())
        for k in sorted({1, 5, *ks})
    }
    confusion = confusion_matrix(scores.labels, scores.ranked[:, 0], num_classes)
    return Metrics(
        num_images=len(scores.labels),
        acc1=top_k[1],
        acc5=top_k[5],
        top_k=top_k,
        mean_per_class_recall=mean_per_class_recall(confusion),
        macro_f1=macro_f1(confusion),
        interval=bootstrap_interval(scores.is_right, scores.groups),
        calibration=calibration(np.minimum(scores.probabilities[:, 0], 1), scores.is_right),
        per_class=per_class(scores.labels, scores.ranked[:, 0], num_classes, scores.groups),
        confusion=confusion,
    )


def subgroups(scores: Scores, column: str) -> Subgroups:
    """Accuracy for each value of a column of the data's metadata.

    Raises:
        ValueError: there is no such column.
    """
    values = scores.data.column(column)
    return subgroup_accuracy(scores.is_right, [values[number] for number in scores.numbers], scores.groups)


# ---------------------------------------------------------------------------------------------------------------------
# Classification: any number of classes for each image


@dataclass(frozen=True)
class MultilabelScores:
    """
    Args:
        numbers: (N,) which of the data's images could be read.
        labels: (N, C) booleans.
        cosines: (N, C).
        unreadable: why the others could not be read.
    """

    data: MultilabelImages
    numbers: np.ndarray
    labels: np.ndarray
    cosines: np.ndarray
    unreadable: tuple[str, ...]

    @property
    def metrics(self) -> Multilabel:
        return multilabel(self.cosines, self.labels)


def score_labels(images: ImageFeatures, data: MultilabelImages, classifier: Tensor) -> MultilabelScores:
    """Cosines of every image with every class; `classifier` (E, C) has unit columns.

    Raises:
        ValueError: as `classify`.
    """
    _check_classifier(images, data, classifier)
    cosines = (images.unit @ classifier.cpu().float()).numpy()
    return MultilabelScores(data, images.numbers, data.labels[images.numbers], cosines, images.unreadable)
