"""Models × data sets × prompts → results: what `miniclip eval` does.

The images of a set are encoded once for each model, and kept; every set of prompts, every column of metadata and every
probe is computed from those features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..common.processes import all_gather_objects, rank_and_world_size
from .datasets.sets import CaptionedImages, EvaluationSet, LabelledImages, MultilabelImages
from .encoder import Model
from .features import FeatureCache, ImageFeatures, encode_images, encode_texts
from .measures.classification import Multilabel, Subgroups
from .measures.ranking import Retrieval
from .none_of_these import Outside, none_of_these
from .probes import (
    SHOTS,
    LinearProbe,
    Outcome,
    ShotCurve,
    TipAdapter,
    linear_probe,
    nearest_neighbours,
    shot_curve,
    tip_adapter,
)
from .prompts import class_prompts
from .retrieval import RetrievalScores, retrieve
from .splits import Labelled, Splits, make_splits
from .zero_shot import (
    Metrics,
    MultilabelScores,
    Scores,
    classify,
    measure,
    score_labels,
    subgroups,
    zero_shot_classifier,
)

# What is being done and how often, to a bar that is told how often it was done.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]

CLASSIFICATION, MULTILABEL, RETRIEVAL = "zeroshot_classification", "zeroshot_multilabel", "zeroshot_retrieval"


@dataclass(frozen=True)
class Trial:
    """A data set, and what goes with it.

    Args:
        data: what is evaluated on.
        variants: the same images with other prompts, to compare with those of `data`.
        subgroup_columns: of the metadata, each scored by its values.
        outside: images of none of the classes.
        false_acceptance: the largest share of those to accept; by default the best balance is sought.
        train: images to learn from, of the same classes.
        validation: to choose by; by default drawn from `train`.
        shots: of each class, for the curve; by default 1, 2, 4, 8, 16 as far as there are so many.
        seeds: that draw them.
    """

    data: EvaluationSet
    variants: tuple[Any, ...] = ()
    subgroup_columns: tuple[str, ...] = ()
    outside: EvaluationSet | None = None
    false_acceptance: float | None = None
    train: LabelledImages | None = None
    validation: LabelledImages | None = None
    shots: tuple[int, ...] | None = None
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        """Refuses, before hours of work, what can't be done with such data."""
        data = self.data
        if isinstance(data, LabelledImages | MultilabelImages) and len(data.classnames) < 2:
            raise ValueError(f"{data.name} has one class, {data.classnames[0]!r}; there is nothing to tell apart")
        needs = {"subgroups": self.subgroup_columns, "outside": self.outside, "train": self.train}
        for name, value in needs.items():
            if value and not isinstance(data, LabelledImages):
                raise ValueError(f"{name} needs a set of one label for each image, and {data.name} is not one")
        for column in self.subgroup_columns:
            data.column(column)
        for other in (self.train, self.validation):
            if other is not None:
                _number_alike(other, data)


@dataclass(frozen=True)
class Probes:
    """What was learnt from labelled images, scored on the same images as the prompts.

    Args:
        train: name of the set that was learnt from.
        splits: the features, in the space of the texts.
        is_pooled: the linear probe had the features before their projection, as the paper's.
    """

    train: str
    splits: Splits
    is_pooled: bool
    linear: LinearProbe
    neighbours: Outcome
    num_neighbours: int
    tip_adapter: TipAdapter
    curve: ShotCurve


@dataclass(frozen=True)
class Result:
    """One model on one data set with one set of prompts.

    Args:
        model, library: names.
        scores: of each image, with the data.
        metrics: what they come to.
        seconds: it took, with the features that others use as well.
        same_prompts: classes that can't be told apart, as their prompts are the same; the first gets the guess.
    """

    model: str
    scores: Scores | MultilabelScores | RetrievalScores
    metrics: Metrics | Multilabel | Retrieval
    seconds: float
    library: str = field(default="", kw_only=True)
    logit_scale: float = field(default=1.0, kw_only=True)
    subgroups: Mapping[str, Subgroups] = field(default_factory=dict, kw_only=True)
    outside: Outside | None = field(default=None, kw_only=True)
    probes: Probes | None = field(default=None, kw_only=True)
    same_prompts: tuple[tuple[str, ...], ...] = field(default=(), kw_only=True)

    @property
    def data(self) -> Any:
        return self.scores.data

    @property
    def task(self) -> str:
        if isinstance(self.scores, Scores):
            return CLASSIFICATION
        return MULTILABEL if isinstance(self.scores, MultilabelScores) else RETRIEVAL

    @property
    def num_images(self) -> int:
        return len(self.data) - len(self.scores.unreadable)


def evaluate(
    model: Model,
    trial: Trial,
    *,
    ks: Sequence[int] = (1, 5),
    batch_size: int = 64,
    num_workers: int = 0,
    cache: FeatureCache | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Everything that is asked of a model on a data set: a result for each set of prompts.

    Subgroups, images of no class and probes go with the first set of prompts.

    Args:
        ks: top-k accuracies of classification.
        cache: features that are there are not computed again.

    Raises:
        ValueError: as `encode_images`, `zero_shot_classifier`, and the functions of probes.py.
    """
    begin = time.perf_counter()
    work = _Work(model, batch_size, num_workers, cache, progress or _silent)
    data = trial.data
    shared: dict[str, Any] = {"library": model.library, "logit_scale": work.logit_scale}
    # Texts first: a prompt that is too long is told before the images are read.
    if isinstance(data, CaptionedImages):
        texts = work.texts([text for each in data.captions for text in each], f"{data.name}, captions")
        found = retrieve(work.images(data), data, texts)
        return [Result(model.name, found, found.metrics, time.perf_counter() - begin, **shared)]
    variants = (data, *trial.variants)
    classifiers = [work.classifier(variant) for variant in variants]
    images = work.images(data)
    results = []
    for variant, classifier in zip(variants, classifiers, strict=True):
        more: dict[str, Any] = {"same_prompts": _same_columns(classifier, variant.classnames)}
        scores: Scores | MultilabelScores
        if isinstance(variant, MultilabelImages):
            scores = score_labels(images, variant, classifier)
            metrics: Metrics | Multilabel = scores.metrics
        else:
            scores = classify(images, variant, classifier, work.logit_scale, max(5, *ks))
            metrics = measure(scores, ks)
            if variant is data:
                more["subgroups"] = {column: subgroups(scores, column) for column in trial.subgroup_columns}
                more["outside"] = _outside(work, trial, scores, classifier)
                more["probes"] = None if trial.train is None else _probe(work, trial, images, classifier)
        results.append(Result(model.name, scores, metrics, time.perf_counter() - begin, **shared, **more))
        begin = time.perf_counter()
    return results


def _silent(what: str, total: int) -> AbstractContextManager[Callable[[int], Any]]:
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class _Work:
    """A model at work: features that are kept, and bars for those that are not."""

    model: Model
    batch_size: int
    num_workers: int
    cache: FeatureCache | None
    progress: Progress

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().exp())

    def images(self, data: EvaluationSet, is_pooled: bool = False) -> ImageFeatures:
        """Features in the space of the texts, or those before the projection."""
        key = None
        if self.cache is not None:
            key = FeatureCache.key("images", is_pooled, self.model.image_fingerprint(), data.fingerprint())
        encode = self.model.encode_pooled if is_pooled else self.model.encode_image
        assert encode is not None
        with self.progress(data.name, len(data)) as progress:
            return encode_images(
                encode,
                self.model.preprocess,
                data,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                cache=self.cache,
                key=key,
                progress=progress,
            )

    def texts(self, texts: Sequence[str], what: str) -> Tensor:
        """Unit features (T, E)."""
        return self._kept("texts", list(texts), lambda: self._encode(texts, what))

    def classifier(self, data: Any) -> Tensor:
        """(E, C), unit columns."""
        prompts = [class_prompts(data.templates, name) for name in data.classnames]
        num_texts = len({text for each in prompts for text in each})

        def build() -> Tensor:
            with self.progress(f"{data.name}, prompts", num_texts) as progress:
                model = self.model
                return zero_shot_classifier(model, data.classnames, data.templates, model.tokenize, progress)

        return self._kept("classifier", prompts, build)

    def _encode(self, texts: Sequence[str], what: str) -> Tensor:
        with self.progress(what, len(set(texts))) as progress:
            return encode_texts(self.model, texts, self.model.tokenize, progress)

    def _kept(self, what: str, texts: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Of the cache, or computed by all processes and written by the first."""
        key = None if self.cache is None else FeatureCache.key(what, self.model.text_fingerprint(), texts)
        if self.cache is None or key is None:
            return compute().cpu()
        is_first = rank_and_world_size()[0] == 0
        tensors = all_gather_objects(self.cache.read(key) if is_first else None)[0]
        if tensors is not None:
            return tensors["features"]
        features = compute().cpu()
        if is_first:
            self.cache.write(key, {"features": features})
        return features


def _same_columns(classifier: Tensor, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Names of the classes that have one and the same column."""
    _, column = classifier.cpu().unique(dim=1, return_inverse=True)
    alike: dict[int, list[str]] = {}
    for name, number in zip(names, column.tolist(), strict=True):
        alike.setdefault(number, []).append(name)
    return tuple(tuple(each) for each in alike.values() if len(each) > 1)


def _outside(work: _Work, trial: Trial, scores: Scores, classifier: Tensor) -> Outside | None:
    if trial.outside is None:
        return None
    others = work.images(trial.outside)
    groups = getattr(trial.outside, "groups", tuple(map(str, range(len(trial.outside)))))
    return none_of_these(scores, others, groups, classifier, false_acceptance=trial.false_acceptance)


# ---------------------------------------------------------------------------------------------------------------------
# Probes


def _number_alike(other: Any, data: Any) -> LabelledImages:
    """With labels that are places among the names of `data`.

    Raises:
        ValueError: the classes are others.
    """
    place = {name.casefold(): number for number, name in enumerate(data.classnames)}
    names = [name.casefold() for name in other.classnames]
    if other.classnames == data.classnames:
        return other
    if len(place) < len(data.classnames) or set(names) != set(place):
        own, theirs = set(place) - set(names), set(names) - set(place)
        only = "; ".join(
            f"only {where} has {', '.join(map(repr, sorted(some)[:5]))}"
            for where, some in ((data.name, own), (other.name, theirs))
            if some
        )
        raise ValueError(
            f"{other.name} has {len(other.classnames)} classes and {data.name} {len(data.classnames)}, and they must "
            f"be the same{': ' + only if only else ''}"
        )
    labels = tuple(place[names[label]] for label in other.labels)
    return replace(other, labels=labels, classnames=data.classnames)


def _labelled(images: ImageFeatures, data: LabelledImages) -> Labelled:
    labels = np.array(_number_alike(images.data, data).labels)
    groups = np.array(images.data.groups)  # type: ignore[attr-defined]
    return Labelled(images.features.numpy(), labels[images.numbers], groups[images.numbers])


def _splits(work: _Work, trial: Trial, is_pooled: bool, test: ImageFeatures | None) -> Splits:
    data = trial.data
    assert isinstance(data, LabelledImages)
    assert trial.train is not None
    test = test or work.images(data, is_pooled)
    train = _labelled(work.images(trial.train, is_pooled), data)
    validation = None if trial.validation is None else _labelled(work.images(trial.validation, is_pooled), data)
    return make_splits(train, _labelled(test, data), data.classnames, validation)


def _probe(work: _Work, trial: Trial, images: ImageFeatures, classifier: Tensor) -> Probes:
    assert trial.train is not None
    splits = _splits(work, trial, False, images)
    is_pooled = work.model.encode_pooled is not None
    pooled = _splits(work, trial, True, None) if is_pooled else None
    columns = classifier.numpy()
    num_neighbours = min(20, len(splits.labelled))
    shots = [k for k in (trial.shots or SHOTS) if trial.shots or k <= splits.num_examples.min()]
    with work.progress(f"{trial.data.name}, probes", 3 + len(shots) * len(trial.seeds)) as progress:
        linear = linear_probe(splits if pooled is None else pooled)
        progress(1)
        neighbours = nearest_neighbours(splits, num_neighbours)
        progress(2)
        adapter = tip_adapter(splits, columns, logit_scale=work.logit_scale)
        progress(3)
        curve = shot_curve(
            splits,
            columns,
            pooled=pooled,
            shots=trial.shots,
            seeds=trial.seeds,
            logit_scale=work.logit_scale,
            progress=lambda done: progress(3 + done),
        )
    return Probes(trial.train.name, splits, is_pooled, linear, neighbours, num_neighbours, adapter, curve)
