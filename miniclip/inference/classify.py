"""Zero-shot guesses for images without labels: the nearest classes of each, with probability and cosine.

N images, C classes, E embedding, K guesses kept per image.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.arguments import check_count, check_number, check_texts, shown
from ..common.wording import some
from ..data.reading.cells import visible
from ..evaluation.datasets.class_folders import NONE
from ..evaluation.datasets.name_files import names_of
from ..evaluation.datasets.names import settle_names, settle_templates
from ..evaluation.datasets.sets import EvaluationSet, Found
from ..evaluation.encoder import Encoder
from ..evaluation.features import FeatureCache, ImageFeatures
from ..evaluation.measures.ties import rank_classes
from ..evaluation.other_libraries import as_encoder
from ..evaluation.prompts import CLASSNAME_SETS, MINED_FROM, Prompts, class_prompts, suited, warn_if_unseen
from ..evaluation.suite import CachedEncoder, Progress, silent
from ..evaluation.zero_shot import check_classifier, class_cosines, different_columns, same_names, told_of_same_names
from .thresholds import ModelThreshold, refuse_class_called_none

_WORTH_A_CACHE = 64  # images, or prompts: fewer are encoded sooner than a model's weights are hashed


# ---------------------------------------------------------------------------------------------------------------------
# Classes


@dataclass(frozen=True)
class Classes:
    """What an image may be; to evaluation, all that it asks of a data set's classes.

    Args:
        classnames: C names.
        templates: the prompts' wordings, for all classes or by class.
        templates_from: where those came from, in words.
    """

    classnames: tuple[str, ...]
    templates: Prompts
    templates_from: str
    name = "the classes"


def choose_classes(
    labels: str | Sequence[str] | None = None,
    classnames: str | Path | None = None,
    templates: str | Path | None = None,
    threshold: ModelThreshold | None = None,
    *,
    field: str | None = None,
) -> Classes:
    """The classes that are asked for; without any, those that the threshold was calibrated for.

    Args:
        labels: names, or a text of names with commas between them; one that holds a comma stands in double quotes.
        classnames: instead, a built-in set of `CLASSNAME_SETS`, or a file of names.
        templates: a built-in set of `TEMPLATE_SETS`, or a file; by default the threshold's, else "simple", which
            `classify_images` replaces by the wordings of a model's captions.
        threshold: of the model.
        field: of a page, in which the labels stand: errors name it, and none of the command's options.

    Raises:
        ValueError: no class, one without a threshold, an empty name, or a name that comes twice.
    """
    if not isinstance(threshold, ModelThreshold | None):
        raise ValueError(f"threshold is {shown(threshold)}; thresholds.find_threshold makes one of a cosine")
    for name, value in (("classnames", classnames), ("templates", templates)):
        if not isinstance(value, str | Path | None):
            raise ValueError(f"{name} is {shown(value)}; it must be the name of a built-in set, or a file")
    if labels is not None and classnames is not None:
        raise ValueError("--labels and --classnames both name the classes; give one of them")
    nothing = Found("the classes", ())
    labels_from = field or "--labels"
    if labels is not None:
        names = _checked(_names_in(labels, labels_from), labels_from)
    elif classnames is not None:
        found = settle_names(nothing, classnames, "").classnames or ()
        # Two of ImageNet's classes have the names of others.
        names = found if str(classnames) in CLASSNAME_SETS else _checked(found, str(classnames))
    elif threshold is not None and threshold.classnames:
        names = threshold.classnames
    else:
        how = (
            f"write some into {field}: cat, dog" if field else 'name them with --labels "cat,dog", or --classnames FILE'
        )
        raise ValueError(f"no classes are named; {how}")
    if len(names) == 1 and threshold is None:
        how = '(--labels "cat,dog"), or give a cosine that it must reach with --threshold'
        raise ValueError(
            f"there is one class, {names[0]!r}, and its probability would be 1 for any picture; name several "
            f"{'(cat, dog)' if field else how}"
        )
    if threshold is not None:
        refuse_class_called_none(names)
    own = None if threshold is None or templates is not None else threshold.templates_for(names)
    if threshold is not None and own is not None:
        return Classes(names, own, f"those of {threshold.source}")
    return Classes(names, *settle_templates(nothing, templates, names))


def _names_in(labels: str | Sequence[str], source: str) -> tuple[str, ...]:
    if not isinstance(labels, str):
        return tuple(map(visible, check_texts("labels", labels)))
    if (text := labels.strip())[:1] + text[-1:] in ("[]", "{}"):  # a list of JSON's or Python's
        return names_of(text, source)
    try:
        rows = list(csv.reader([re.sub(r"\r\n?|\n", ",", labels)], skipinitialspace=True))
    except csv.Error as error:
        raise ValueError(f'{source} can\'t be read: {error}; write "cat,dog"') from error
    names = tuple(map(visible, rows[0])) if rows else ()
    if len(names) > 1 and all(re.match(r"\d+\s*[:=]", name) for name in names):
        raise ValueError(f'{source} numbers its names ({names[0]!r}); write the names alone: "cat,dog"')
    return names


def _checked(names: Sequence[str], source: str) -> tuple[str, ...]:
    if not any(names):
        raise ValueError(f'{source} holds no name; write "cat,dog"')
    for number, name in enumerate(names, 1):
        if not name:
            raise ValueError(f"name {number} of {source} is empty: {some([repr(each) for each in names])}")
        if name in names[: number - 1]:
            raise ValueError(f"{source} has {name!r} twice (names {names.index(name) + 1} and {number}); once will do")
    return tuple(names)


# ---------------------------------------------------------------------------------------------------------------------
# Guesses


@dataclass(frozen=True)
class Guesses:
    """What came of each image that could be read.

    Args:
        data: the images.
        classes: what they may be.
        indices: (N,) those of the data's images.
        ranked: (N, K) the nearest classes, the nearest first.
        cosines, probabilities: (N, K) of those; the probability is relative to all C classes.
        is_none: (N,) the nearest class is too far for the threshold; None without one.
        sets: N sets of classes, each in the order of the classes, for the coverage that was asked for.
        unreadable: why the other images could not be read.
        same_prompts: groups of classes that no prompt tells apart; all their images go to the first.
    """

    data: EvaluationSet
    classes: Classes
    indices: np.ndarray
    ranked: np.ndarray
    cosines: np.ndarray
    probabilities: np.ndarray
    is_none: np.ndarray | None
    sets: tuple[tuple[int, ...], ...] | None
    unreadable: tuple[str, ...]
    same_prompts: tuple[tuple[str, ...], ...]

    def label(self, row: int) -> str:
        """The class of the image in a row, or NONE."""
        is_none = self.is_none is not None and self.is_none[row]
        return NONE if is_none else self.classes.classnames[self.ranked[row, 0]]

    def notes(self, templates_by: str = "--templates") -> list[str]:
        """What to know of the prompts: whose words they are, if nobody chose them, and what they don't tell apart.

        Args:
            templates_by: where others are given.
        """
        texts = [repr(each) for each in self.classes.templates if isinstance(each, str)]
        mined = (
            f"prompts are in {MINED_FROM}: {some(texts, 3)}; templates of your own ({templates_by}) take their place"
        )
        return [mined] * (self.classes.templates_from == MINED_FROM) + told_of_same_names(self.same_prompts)

    def rows(self) -> Iterator[dict[str, Any]]:
        """A row for each guess, with all columns of `result_columns`."""
        names = self.classes.classnames
        for row, index in enumerate(self.indices):
            verdict = self.label(row)
            for rank, c in enumerate(self.ranked[row]):
                yield {
                    "image": self.data.key(int(index)),
                    "rank": rank + 1,
                    "label": verdict if verdict == NONE else names[c],
                    "nearest": names[c],
                    "probability": self.probabilities[row, rank],
                    "cosine": self.cosines[row, rank],
                    "set": None if self.sets is None else [names[each] for each in self.sets[row]],
                }


def result_columns(num_guesses: int, has_threshold: bool, has_sets: bool) -> dict[str, type]:
    """The columns of `Guesses.rows` that say something, with their types."""
    says_something = {"rank": num_guesses > 1, "nearest": has_threshold, "set": has_sets}
    columns = {"image": str, "rank": int, "label": str, "nearest": str, "probability": float, "cosine": float}
    every = {**columns, "set": list}
    return {name: kind for name, kind in every.items() if says_something.get(name, True)}


def classify_images(
    encoder: Encoder,
    data: EvaluationSet,
    classes: Classes,
    *,
    num_guesses: int = 1,
    threshold: ModelThreshold | None = None,
    coverage: float | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    cache: FeatureCache | None = None,
    progress: Progress | None = None,
) -> Guesses:
    """The nearest classes of each image. Of equally near ones, as those of the same prompts are, the first.

    Prompts that nobody chose are worded as the captions that the model was trained on, if it knows those.

    Args:
        encoder: as `as_encoder` takes it.
        num_guesses: how many to keep; no more than there are classes.
        threshold: images below it are of no class.
        coverage: of sets of classes, one of those that the threshold was calibrated for.
        cache: for features of many images or prompts; for a few, hashing the model takes longer than encoding.

    Raises:
        ValueError: not one image could be read, features that are of no use, or sets that were not calibrated.
    """
    for name, value, kind, how in (
        ("data", data, EvaluationSet, "inference.sources.image_set makes one of paths"),
        ("classes", classes, Classes, "choose_classes makes one of names"),
        ("threshold", threshold, ModelThreshold | None, "thresholds.find_threshold makes one of a cosine"),
    ):
        if not isinstance(value, kind):
            raise ValueError(f"{name} is {shown(value)}; {how}")
    encoder, num_guesses = as_encoder(encoder), check_count("num_guesses", num_guesses)
    if coverage is not None:
        _refuse_uncalibrated(threshold, classes, check_number("coverage", coverage))
    classes = suited(classes, encoder.wordings)
    warn_if_unseen(classes, encoder.wordings, encoder.name)
    num_prompts = sum(len(class_prompts(classes.templates, name)) for name in classes.classnames)
    texts, pictures = (
        CachedEncoder(encoder, batch_size, num_workers, cache if count > _WORTH_A_CACHE else None, progress or silent)
        for count in (num_prompts, len(data))
    )
    classifier = texts.classifier(classes)
    images = pictures.images(data)
    return guess(images, classes, classifier, texts.logit_scale, num_guesses, threshold, coverage)


def guess(
    images: ImageFeatures,
    classes: Classes,
    classifier: Tensor,
    logit_scale: float,
    num_guesses: int = 1,
    threshold: ModelThreshold | None = None,
    coverage: float | None = None,
) -> Guesses:
    """The guesses for features that are there.

    Args:
        classifier: (E, C), unit columns.
        logit_scale: what multiplies cosines for the softmax, not its logarithm.
    """
    check_classifier(images, classes, classifier)
    K = min(num_guesses, len(classes.classnames))
    ranked = torch.empty(len(images.unit), K, dtype=torch.int64)
    best_cosines, probabilities = (torch.empty(ranked.shape) for _ in range(2))
    sets: list[tuple[int, ...]] = []
    for block, cosines in class_cosines(images.unit, classifier):
        ranked[block] = rank_classes(cosines, K)
        best_cosines[block] = cosines.gather(1, ranked[block])
        if threshold is not None and coverage is not None:
            sets += [tuple(np.flatnonzero(each).tolist()) for each in threshold.sets(cosines.numpy(), coverage)]
        probabilities[block] = cosines.mul_(logit_scale).softmax(dim=-1).gather(1, ranked[block])
    return Guesses(
        images.data,
        classes,
        images.indices,
        ranked.numpy(),
        best_cosines.numpy(),
        probabilities.numpy(),
        None if threshold is None else threshold.rejects(best_cosines[:, 0].numpy()),
        None if coverage is None else tuple(sets),
        images.unreadable,
        same_names(different_columns(classifier)[1], classes.classnames),
    )


def _refuse_uncalibrated(threshold: ModelThreshold | None, classes: Classes, coverage: float) -> None:
    if threshold is None:
        raise ValueError(
            f"sets of coverage {coverage:g} need a model that was calibrated: `miniclip calibrate MODEL --data … "
            f"--outside … --coverage {coverage:g}`"
        )
    if threshold.classnames and set(threshold.classnames) != set(classes.classnames):
        known = some([repr(name) for name in threshold.classnames])
        raise ValueError(f"sets of coverage {coverage:g} hold for the classes of {threshold.source} alone: {known}")
    threshold.sets(np.zeros((0, len(classes.classnames))), coverage)
