"""Results of evaluation whose every number can be worked out by hand, for tests of what is made of them."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import write_picture

from miniclip.evaluation import probes
from miniclip.evaluation.datasets.sets import CaptionedImages, LabelledImages, MultilabelImages
from miniclip.evaluation.features import ImageFeatures
from miniclip.evaluation.measures.thresholds import apply_threshold, calibrate_threshold, separation
from miniclip.evaluation.multilabel import MultilabelScores
from miniclip.evaluation.none_of_these import Outside
from miniclip.evaluation.retrieval import retrieve
from miniclip.evaluation.splits import Labelled, make_splits
from miniclip.evaluation.suite import Result
from miniclip.evaluation.zero_shot import ClassificationScores

NAMES = ("cat", "dog", "kea", "owl", "tench", "zebra")
# cat: 2 of 3 right, dog: 0 of 2, kea: right; owl, tench and zebra have no images
GUESSES = [(0, 0), (0, 0), (0, 1), (1, 0), (1, 0), (2, 2)]


def classified(
    folder: Path,
    guesses: list[tuple[int, int]],
    names: tuple[str, ...] = NAMES,
    *,
    model: str = "runs/x/best",
    name: str = "pets",
    unreadable: tuple[str, ...] = (),
    templates: Any = ("a photo of a {c}.",),
    templates_from: str = "",
    size: tuple[int, int] = (24, 20),
    picture_name: str = "{}.png",
    metadata: dict[str, list[Any]] | None = None,
    same_prompts: tuple[tuple[str, ...], ...] = (),
    **options: Any,
) -> Result:
    """Of given (label, first guess); the other guesses follow in turn."""
    N, C = len(guesses), len(names)
    K = min(5, C)
    paths = tuple(write_picture(folder / picture_name.format(number), number, size) for number in range(N))
    missing = tuple(folder / f"missing{number}.png" for number in range(len(unreadable)))
    everything = paths + missing
    labels = [label for label, _ in guesses]
    data = LabelledImages(
        name,
        everything,
        (*labels, *[0] * len(missing)),
        names,
        templates,
        tuple(map(str, range(len(everything)))),
        classnames_from="a list",
        templates_from=templates_from,
        metadata=metadata or {},
    )
    ranked = np.array([[(guess + k) % C for k in range(K)] for _, guess in guesses])
    cosines = np.tile(np.linspace(0.3, 0.1, K), (N, 1))
    if K > 1:
        cosines[:, 1] += np.linspace(0, 0.04, N)  # first and second come together from image to image
    first = np.linspace(0.9, 0.5, N)  # how sure it is falls
    probabilities = np.column_stack([first, *[(1 - first) / 8] * (K - 1)])
    scores = ClassificationScores(
        data, np.arange(N), np.array(labels), ranked, cosines, probabilities, unreadable, same_prompts=same_prompts
    )
    options = {
        "library": "miniclip 0",
        "subgroups": {each: scores.subgroups(each) for each in data.metadata},
    } | options
    return Result(model, scores, 1.25, **options)


def retrieved(folder: Path, *, model: str = "runs/x/best", name: str = "scenes", flip: bool = False) -> Result:
    """Three images, with one, one and two captions. Images by text have ranks 1, 2, 1, 3, texts by image 1, 2, 1;
    with `flip` the second caption finds its image first."""
    paths = tuple(write_picture(folder / f"{number}.png", number) for number in range(3))
    captions = (("a sea",), ("a hill & <b>",), ("a town", "a village"))
    data = CaptionedImages(name, paths, captions, ("0", "1", "2"))
    images = ImageFeatures(data, np.arange(3), torch.eye(3), ())
    second = [0.6, 0.8, 0.0] if flip else [0.8, 0.6, 0.0]
    texts = torch.tensor([[1.0, 0.0, 0.0], second, [0.0, 0.0, 1.0], [0.6, 0.64, 0.48]])
    found = retrieve(images, data, texts)
    return Result(model, found, 0.5, library="miniclip 0")


def multilabelled(folder: Path, *, name: str = "many") -> Result:
    """Average precision 3/4 of cats, 1 of dogs, 1/3 of keas. The last image's label comes last among its guesses."""
    paths = tuple(write_picture(folder / f"{number}.png", number) for number in range(4))
    labels = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 0, 0]], dtype=bool)
    cosines = np.array([[0.3, 0.2, 0.1], [0.1, 0.3, 0.2], [0.2, 0.1, 0.3], [0.1, 0.2, 0.3]])
    data = MultilabelImages(name, paths, labels, NAMES[:3], ("a {}",), ("0", "1", "2", "3"))
    scores = MultilabelScores(data, np.arange(4), labels, cosines, ())
    return Result("runs/x/best", scores, 0.5)


def outside() -> Outside:
    """The threshold is 0.25; it accepts three of four inside images, and one of two outside ones."""
    inside, others = np.array([0.3, 0.3, 0.3, 0.1]), np.array([0.1, 0.4])
    threshold = calibrate_threshold(np.array([0.3]), np.array([0.2]), split="one half")
    acceptance = apply_threshold(threshold, inside, others, split="the other half")
    return Outside("street scenes", inside, others, separation(inside, others), acceptance)


@functools.cache
def learnt(num_classes: int = 3) -> probes.Probes:
    """Of features that lie along one axis for each class, so that all that is learnt is right."""
    random = np.random.default_rng(0)

    def some(count: int) -> Labelled:
        labels = np.repeat(np.arange(num_classes), count)
        noise = random.normal(0, 0.01, (len(labels), num_classes))
        return Labelled((np.eye(num_classes)[labels] + noise).astype(np.float32), labels)

    splits = make_splits(some(4), some(2), NAMES[:num_classes], some(2))
    columns = np.roll(np.eye(num_classes, dtype=np.float32), 1, axis=1)  # prompts that are always wrong
    linear = probes.linear_probe(splits)
    neighbours = probes.nearest_neighbours(splits, 3)
    tip_adapter = probes.tip_adapter(splits, columns)
    curve = probes.shot_curve(splits, columns, shots=(1, 2), seeds=(0, 1))
    return probes.Probes("more pets", splits, True, linear, neighbours, 3, tip_adapter, curve)


def everything(folder: Path) -> Result:
    """A result of classification that has all that one can have."""
    one = classified(folder, GUESSES, metadata={"light": ["day", "day", "night", "night", None, "day"]})
    return replace(one, outside=outside(), probes=learnt())
