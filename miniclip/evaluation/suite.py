"""Models × data sets × prompts → results: what `miniclip eval` does.

The images of a set are encoded once for each model, and kept; every set of prompts, every column of metadata and every
probe is computed from those features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..common.arguments import FLOAT32
from ..common.processes import all_gather_objects, rank_and_world_size
from .datasets.sets import EvaluationSet, LabelledImages
from .encoder import Encoder
from .features import FeatureCache, ImageFeatures, encode_images, encode_texts
from .measures.classification import Subgroups
from .multilabel import score_labels
from .none_of_these import Outside, none_of_these
from .probes import SHOTS, Probes, linear_probe, nearest_neighbours, shot_curve, tip_adapter
from .prompts import class_prompts, suited, warn_if_unseen
from .retrieval import retrieve
from .scores import Scores
from .splits import Labelled, Splits, make_splits
from .zero_shot import ClassificationScores, classify, zero_shot_classifier

# From what is computed and how many there are, to a bar that is called with the number done.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]


@dataclass(frozen=True)
class Task:
    """A data set, and what goes with it.

    Args:
        data: what is evaluated on. If nobody chose its prompts, a model that knows the wordings of its captions is
            asked in those, and the default prompts become a variant.
        variants: the same images with other prompts, to compare with those of `data`.
        subgroup_columns: of the metadata, each scored by its values.
        outside: images of none of the classes.
        false_acceptance: the largest share of fresh ones to accept; by default the best balance is sought.
        train: images to learn from, of the same classes.
        validation: to choose by; by default drawn from `train`.
        shots: of each class, for the curve; by default 1, 2, 4, 8, 16 as far as there are so many.
        seeds: that draw them.
        coverages: of sets of classes, where there is `outside`; by default 0.9, 0.95 and 0.99 as far as images suffice.
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
    coverages: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        """Refuses, before hours of work, what can't be done with such data."""
        data: Any = self.data
        if data.has_classes and len(data.classnames) < 2:
            raise ValueError(f"{data.name} has one class, {data.classnames[0]!r}; there is nothing to tell apart")
        needs = {"subgroups": self.subgroup_columns, "outside": self.outside, "train": self.train}
        for name, value in needs.items():
            if value and data.task != "classification":
                raise ValueError(f"{name} needs a set of one label for each image, and {data.name} is not one")
        for column in self.subgroup_columns:
            data.column(column)
        for other in (self.train, self.validation):
            if other is not None:
                _with_classes_of(data, other)


@dataclass(frozen=True)
class Result:
    """One model on one data set with one set of prompts.

    Args:
        model, library: names.
        precision: of the model's products.
        scores: of each image, with the data.
        seconds: it took, with the features that others use as well.
    """

    model: str
    scores: Scores
    seconds: float
    library: str = field(default="", kw_only=True)
    precision: str = field(default=FLOAT32, kw_only=True)
    logit_scale: float = field(default=1.0, kw_only=True)
    subgroups: Mapping[str, Subgroups] = field(default_factory=dict, kw_only=True)
    outside: Outside | None = field(default=None, kw_only=True)
    probes: Probes | None = field(default=None, kw_only=True)

    @property
    def data(self) -> Any:
        return self.scores.data

    @property
    def task(self) -> str:
        return self.scores.task


def evaluate(
    model: Encoder,
    task: Task,
    *,
    ks: Sequence[int] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    cache: FeatureCache | None = None,
    progress: Progress | None = None,
) -> list[Result]:
    """Everything that is asked of a model on a data set: a result for each set of prompts.

    Subgroups, images of no class and probes go with the first set of prompts.

    Args:
        ks: of top-k accuracies, by default 1 and 5, and of retrieval's R@k, by default 1, 5 and 10. R@1 is there in
            any case, and sets of several labels have no such score.
        cache: features that are there are not computed again.

    Raises:
        ValueError: as `encode_images`, `zero_shot_classifier`, and the functions of probes.py.
    """
    encoder = CachedEncoder(model, batch_size, num_workers, cache, progress or silent)
    task = _suited(task, model)
    evaluate_task = {"classification": _classify, "multilabel": _score_labels, "retrieval": _retrieve}[task.data.task]
    results, begin = [], time.perf_counter()
    for scores, more in evaluate_task(encoder, task, None if ks is None else tuple(ks)):
        seconds = time.perf_counter() - begin
        shared: dict[str, Any] = {"library": model.library, "precision": model.precision}
        shared["logit_scale"] = encoder.logit_scale
        results.append(Result(model.name, scores, seconds, **shared, **more))
        begin = time.perf_counter()
    return results


def _suited(task: Task, model: Encoder) -> Task:
    """The task as a model is asked, beside the prompts that nobody chose."""
    own = suited(task.data, model.wordings)
    if rank_and_world_size()[0] == 0:
        for each in (own, *task.variants):
            warn_if_unseen(each, model.wordings, model.name)
    return task if own is task.data else replace(task, data=own, variants=(*task.variants, task.data))


# The scores of each set of prompts, and what goes with them. Texts are encoded first: a prompt that is too long is
# reported before the images are read.
_Answers = Iterator[tuple[Scores, dict[str, Any]]]


def _classify(encoder: CachedEncoder, task: Task, ks: tuple[int, ...] | None) -> _Answers:
    variants = (task.data, *task.variants)
    classifiers = [encoder.classifier(variant) for variant in variants]
    images = encoder.images(task.data)
    for variant, classifier in zip(variants, classifiers, strict=True):
        scores = classify(images, variant, classifier, encoder.logit_scale, ks or (1, 5))
        more: dict[str, Any] = {}
        if variant is task.data:
            more["subgroups"] = {column: scores.subgroups(column) for column in task.subgroup_columns}
            more["outside"] = _outside(encoder, task, images, scores, classifier)
            more["probes"] = None if task.train is None else _probe_images(encoder, task, images, classifier)
        yield scores, more


def _score_labels(encoder: CachedEncoder, task: Task, ks: tuple[int, ...] | None) -> _Answers:
    variants = (task.data, *task.variants)
    classifiers = [encoder.classifier(variant) for variant in variants]
    images = encoder.images(task.data)
    for variant, classifier in zip(variants, classifiers, strict=True):
        yield score_labels(images, variant, classifier), {}


def _retrieve(encoder: CachedEncoder, task: Task, ks: tuple[int, ...] | None) -> _Answers:
    data: Any = task.data
    texts = encoder.texts([text for each in data.captions for text in each], f"{data.name}, captions")
    yield retrieve(encoder.images(data), data, texts, sorted({1, *(ks or (5, 10))})), {}


def silent(what: str, total: int) -> AbstractContextManager[Callable[[int], Any]]:
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class CachedEncoder:
    """A model whose features are kept in a cache; a bar shows the progress of those that are computed."""

    model: Encoder
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


def _outside(
    encoder: CachedEncoder, task: Task, images: ImageFeatures, scores: ClassificationScores, classifier: Tensor
) -> Outside | None:
    if task.outside is None:
        return None
    others = encoder.images(task.outside)
    groups = getattr(task.outside, "groups", tuple(map(str, range(len(task.outside)))))
    return none_of_these(
        images,
        scores,
        others,
        groups,
        classifier,
        encoder.logit_scale,
        false_acceptance=task.false_acceptance,
        coverages=task.coverages,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Probes


def _with_classes_of(data: Any, other: Any) -> LabelledImages:
    """`other`, with labels that are indices of the class names of `data`.

    Raises:
        ValueError: the classes are others.
    """
    index = {name.casefold(): c for c, name in enumerate(data.classnames)}
    names = [name.casefold() for name in other.classnames]
    if other.classnames == data.classnames:
        return other
    if len(index) < len(data.classnames) or set(names) != set(index):
        own, theirs = set(index) - set(names), set(names) - set(index)
        only = "; ".join(
            f"only {where} has {', '.join(map(repr, sorted(some)[:5]))}"
            for where, some in ((data.name, own), (other.name, theirs))
            if some
        )
        raise ValueError(
            f"{other.name} has {len(other.classnames)} classes and {data.name} {len(data.classnames)}, and they must "
            f"be the same{': ' + only if only else ''}"
        )
    labels = tuple(index[names[label]] for label in other.labels)
    return replace(other, labels=labels, classnames=data.classnames)


def _labelled(images: ImageFeatures, data: LabelledImages) -> Labelled:
    labels = np.array(_with_classes_of(data, images.data).labels)
    groups = np.array(images.data.groups)  # type: ignore[attr-defined]
    return Labelled(images.features.numpy(), labels[images.indices], groups[images.indices])


def _splits(encoder: CachedEncoder, task: Task, is_pooled: bool, test: ImageFeatures | None) -> Splits:
    data: Any = task.data
    assert task.train is not None
    test = test or encoder.images(data, is_pooled)
    train = _labelled(encoder.images(task.train, is_pooled), data)
    validation = None if task.validation is None else _labelled(encoder.images(task.validation, is_pooled), data)
    return make_splits(train, _labelled(test, data), data.classnames, validation)


def _probe_images(encoder: CachedEncoder, task: Task, images: ImageFeatures, classifier: Tensor) -> Probes:
    assert task.train is not None
    splits = _splits(encoder, task, False, images)
    is_pooled = encoder.model.encode_pooled is not None
    pooled = _splits(encoder, task, True, None) if is_pooled else None
    columns = classifier.numpy()
    num_neighbours = min(20, len(splits.labelled))
    shots = [k for k in (task.shots or SHOTS) if task.shots or k <= splits.num_examples.min()]
    with encoder.progress(f"{task.data.name}, probes", 3 + len(shots) * len(task.seeds)) as progress:
        linear = linear_probe(splits if pooled is None else pooled)
        progress(1)
        neighbours = nearest_neighbours(splits, num_neighbours)
        progress(2)
        adapter = tip_adapter(splits, columns, logit_scale=encoder.logit_scale)
        progress(3)
        curve = shot_curve(
            splits,
            columns,
            pooled=pooled,
            shots=task.shots,
            seeds=task.seeds,
            logit_scale=encoder.logit_scale,
            progress=lambda done: progress(3 + done),
        )
    return Probes(task.train.name, splits, is_pooled, linear, neighbours, num_neighbours, adapter, curve)
