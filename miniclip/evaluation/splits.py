"""Labelled features split into training, validation and test, and how images of equal features are kept together.

N training images, M test images, E width of the features, C classes, k shots."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ..common.wording import some

ROWS_OF_PROBES = 1024  # test images at a time, against all training images
_SAME = 1e-4  # features that differ by a smaller share of their length are one picture's; batches round differently


# ---------------------------------------------------------------------------------------------------------------------
# Splits


@dataclass(frozen=True)
class Labelled:
    """Features of images and their classes.

    Args:
        features: (N, E).
        labels: (N,) 0 to C - 1.
        groups: (N,) images of one value belong together, as `LabelledImages.groups`; by default every one for itself.
    """

    features: np.ndarray
    labels: np.ndarray
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Lists and tensors become arrays."""
        for name in ("features", "labels", "groups"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name)))

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: np.ndarray) -> Labelled:
        groups = None if self.groups is None else self.groups[rows]
        return Labelled(self.features[rows], self.labels[rows], groups)


@dataclass(frozen=True)
class Splits:
    """Three sets of images of the same classes. `make_splits` also finds what is in two of them.

    Args:
        train: to learn from; it has images of every class.
        validation: to choose by.
        test: to score.
        classnames: C names, for messages.
        num_leaked: test images that are training or validation images as well.

    Raises:
        ValueError: lengths, widths or labels do not fit, features are not finite, a class has nothing to learn from, or
            there is one class only.
    """

    train: Labelled
    validation: Labelled
    test: Labelled
    classnames: tuple[str, ...]
    num_leaked: int = 0

    def __post_init__(self) -> None:
        if len(self.classnames) < 2:
            raise ValueError(f"a probe separates classes, and there is only one: {', '.join(self.classnames) or '–'}")
        width = np.shape(self.train.features)[-1]
        for name in ("train", "validation", "test"):
            _check(name, getattr(self, name), len(self.classnames), width)
        missing = [self.classnames[c] for c in np.flatnonzero(self.num_examples == 0)]
        if missing:
            raise ValueError(f"no training images of {some(missing)}; every class needs at least one")

    @cached_property
    def num_examples(self) -> np.ndarray:
        """(C,) training images of each class."""
        return np.bincount(self.train.labels, minlength=len(self.classnames))

    @cached_property
    def labelled(self) -> Labelled:
        """All images whose labels may be learnt: those of train, then those of validation."""
        groups = None  # no longer needed, and numbers of two sets may mean different things
        features = np.concatenate([self.train.features, self.validation.features])
        return Labelled(features, np.concatenate([self.train.labels, self.validation.labels]), groups)

    def shots(self, k: int, seed: int) -> Splits:
        """The same with `k` training images of each class, drawn by `seed`; more shots contain the fewer.

        Raises:
            ValueError: a class has fewer; names it.
        """
        if k < 1:
            raise ValueError(f"shots are {k}; at least one image of each class is needed")
        few = np.flatnonzero(self.num_examples < k)
        if len(few):
            counts = [f"{self.classnames[c]} ({self.num_examples[c]})" for c in few[np.argsort(self.num_examples[few])]]
            raise ValueError(f"{k} shots are more than the training images of {some(counts)}")
        order = np.random.default_rng(seed).permutation(len(self.train))
        order = order[np.argsort(self.train.labels[order], kind="stable")]  # class by class, shuffled within
        starts = np.cumsum(self.num_examples) - self.num_examples
        rank = np.arange(len(order)) - starts[self.train.labels[order]]  # 0, 1, … within the class
        return replace(self, train=self.train.take(order[rank < k]))


def make_splits(
    train: Labelled,
    test: Labelled,
    classnames: Sequence[str],
    validation: Labelled | None = None,
    *,
    validation_share: float = 0.2,
    seed: int = 0,
) -> Splits:
    """Checked splits. Without `validation`, `draw_validation` takes that share of train.

    Warns of images that are on two sides, by their features.

    Raises:
        ValueError: as `Splits` and `draw_validation`.
    """
    # Before anything is drawn or compared; without a validation set, any that fits.
    Splits(train, test if validation is None else validation, test, tuple(classnames))
    if validation is None:
        drawn = draw_validation(train.labels, train.groups, validation_share, seed)
        train, validation = train.take(~drawn), train.take(drawn)
    splits = Splits(train, validation, test, tuple(classnames))
    _warn_of_shared_images(same_features(validation.features, train.features), "validation", "in train")
    leaked = same_features(test.features, splits.labelled.features)
    _warn_of_shared_images(leaked, "test", "in train or validation")
    return replace(splits, num_leaked=int(leaked.sum()))


def _warn_of_shared_images(leaked: np.ndarray, name: str, where: str) -> None:
    if leaked.any():
        warnings.warn(
            f"{leaked.sum()} of {len(leaked)} {name} images are {where} as well, by their features (the first has "
            f"the index {leaked.argmax()}): scores of what was learnt will be too high",
            stacklevel=3,
        )


def draw_validation(labels: np.ndarray, groups: np.ndarray | None, share: float = 0.2, seed: int = 0) -> np.ndarray:
    """(N,) True for the images to hold out: `share` of each class as nearly as whole groups allow, and at least one
    where that leaves the class another to learn from.

    Raises:
        ValueError: a share outside (0, 1), or every class has images of one group only.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of validation images is {share}; it must be between 0 and 1")
    _, group = np.unique(np.arange(len(labels)) if groups is None else groups, return_inverse=True)
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    classes = [np.unique(labels[rows], return_counts=True) for rows in members]
    remaining = np.bincount(labels)
    quota = np.maximum(1, np.round(share * remaining)).astype(np.int64)
    drawn = np.zeros(len(labels), dtype=bool)

    def draw(index: int) -> bool:
        """Unless a class would lose its last images."""
        present, counts = classes[index]
        if (remaining[present] == counts).any():
            return False
        remaining[present] -= counts
        quota[present] -= counts
        drawn[members[index]] = True
        return True

    order = np.random.default_rng(seed).permutation(len(members))
    for index in order:
        present, counts = classes[index]
        if (counts <= quota[present]).all():
            draw(index)
    # Where all of a class's groups are larger than its share, the smallest that can be spared.
    smallest_first = sorted(order, key=lambda index: len(members[index]))
    without = set(labels) - set(labels[drawn])
    for index in smallest_first if without else ():
        if without.intersection(classes[index][0]) and draw(index):
            without.difference_update(classes[index][0])
    if not drawn.any():
        raise ValueError(
            f"none of {len(labels)} training images can be held out: every class has images of one group only; give a "
            "validation set"
        )
    return drawn


def same_features(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(N,) True for rows of `features` that are also in `others`, up to a ten-thousandth of their length."""
    keys, found = unit_rows(others), np.zeros(len(features), dtype=bool)
    for start in range(0, len(features), ROWS_OF_PROBES):
        chunk = features[start : start + ROWS_OF_PROBES].astype(np.float32)
        nearest = others[(unit_rows(chunk) @ keys.T).argmax(axis=1)].astype(np.float32)
        found[start : start + ROWS_OF_PROBES] = np.linalg.norm(chunk - nearest, axis=1) <= _SAME * np.linalg.norm(
            chunk, axis=1
        )
    return found


def _check(name: str, split: Labelled, C: int, width: int) -> None:
    features, labels = split.features, split.labels
    if np.ndim(features) != 2 or not len(features):
        raise ValueError(f"{name} features have the shape {np.shape(features)}; they must be (N, E), N at least 1")
    if features.shape[1] != width:
        raise ValueError(f"{name} features have {features.shape[1]} channels and train features have {width}")
    for what, values in (("labels", labels), ("groups", split.groups)):
        if values is not None and np.shape(values) != (len(features),):
            raise ValueError(f"{name} has {len(features)} features and {what} of the shape {np.shape(values)}")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{name} labels are {labels.dtype}; they must be integers, the indices of {C} class names")
    if labels.min() < 0 or labels.max() >= C:
        raise ValueError(f"{name} labels are from {labels.min()} to {labels.max()}; {C} classes are 0 to {C - 1}")
    broken = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(broken):
        raise ValueError(f"{len(broken)} {name} features are not finite, the first is number {broken[0]}, from 0")


def unit_rows(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float32)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
