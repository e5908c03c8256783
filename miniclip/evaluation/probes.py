"""What can be learnt from a frozen model's features: linear probes, neighbours, Tip-Adapter, and how many labelled
images each needs to overtake the prompts.

All of it takes arrays, so features of any model will do. What has to be chosen (how strong a penalty, how much weight
on the examples) is chosen on validation images; test images are looked at once, for the score.

N training images, M test images, E width of the features, C classes, k shots (training images of each class).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..common.wording import counted
from .measures.statistics import wilson_interval
from .measures.ties import SAME, first_of_best
from .splits import ROWS_OF_PROBES, Labelled, Splits, unit_rows

SHOTS = (1, 2, 4, 8, 16)
_LEAST_C, _MOST_C, _STEPS_PER_DECADE = -6, 6, 8  # powers of ten, and the resolution of the search
_FIRST_STEP = 2 * _STEPS_PER_DECADE
# Tip-Adapter's search. The paper's ranges, α up to 3 and β up to 7, are for OpenAI's models and 16 shots; features of
# small models lie closer together and want a larger β. α = 0 is zero-shot, for examples that do not help.
_ALPHAS = (0.0, *(float(alpha) for alpha in np.geomspace(0.1, 100, 19)))
_BETAS = tuple(float(beta) for beta in np.geomspace(0.1, 100, 19))


# ---------------------------------------------------------------------------------------------------------------------
# What a classifier answers


@dataclass(frozen=True)
class Outcome:
    """A classifier's scores of each test image.

    Args:
        scores: (M, C), the highest is its guess; of scores that are equal but for rounding, the first.
        test: the images.
    """

    scores: np.ndarray
    test: Labelled

    @cached_property
    def is_right(self) -> np.ndarray:
        return first_of_best(self.scores) == self.test.labels

    @property
    def accuracy(self) -> float:
        return float(self.is_right.mean())

    @property
    def per_class(self) -> np.ndarray:
        """(C,) accuracy on the images of each class, NaN without any."""
        C = self.scores.shape[1]
        right = np.bincount(self.test.labels[self.is_right], minlength=C)
        with np.errstate(invalid="ignore"):
            return right / np.bincount(self.test.labels, minlength=C)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the accuracy, `wilson_interval`."""
        groups = np.arange(len(self.test)) if self.test.groups is None else self.test.groups
        return wilson_interval(self.is_right, groups)


def zero_shot(splits: Splits, classifier: np.ndarray) -> Outcome:
    """The prompts alone: cosines with the columns of `classifier` (E, C).

    Raises:
        ValueError: a classifier of another shape, or columns that are not of unit length.
    """
    return Outcome(unit_rows(splits.test.features) @ _checked_classifier(splits, classifier), splits.test)


def _checked_classifier(splits: Splits, classifier: np.ndarray) -> np.ndarray:
    columns = np.asarray(classifier, dtype=np.float32)
    expected = (splits.train.features.shape[1], len(splits.classnames))
    if columns.shape != expected:
        raise ValueError(f"the classifier has the shape {columns.shape}; features and classes need {expected}")
    lengths = np.linalg.norm(columns, axis=0)
    if not (np.abs(lengths - 1) < 0.01).all():
        raise ValueError(
            f"the classifier's columns are from {lengths.min():.3g} to {lengths.max():.3g} long; all must be 1"
        )
    return columns


# ---------------------------------------------------------------------------------------------------------------------
# Linear probe


@dataclass(frozen=True)
class SweepPoint:
    """A probe with one penalty, by the validation images."""

    C: float
    accuracy: float
    log_loss: float
    num_iterations: int
    is_converged: bool


@dataclass(frozen=True)
class LinearProbe:
    """A logistic regression on features.

    Args:
        C: the inverse of the penalty, as scikit-learn has it: the larger, the weaker.
        sweep: all that were tried, by rising C.
        num_iterations, is_converged: of the last fit.
        weight: (E, C), scores are `features @ weight + bias`.
        bias: (C,).
    """

    outcome: Outcome
    C: float
    sweep: tuple[SweepPoint, ...]
    num_iterations: int
    is_converged: bool
    weight: np.ndarray
    bias: np.ndarray


def linear_probe(splits: Splits, *, refit: bool = True, max_iter: int = 1000) -> LinearProbe:
    """The paper's linear probe (section 3.2, appendix A.3): scikit-learn's logistic regression by L-BFGS.

    C is searched on the validation images from 1e-6 to 1e6: seven values two decades apart, then four times the middles
    on both sides of the best, down to eight steps a decade. Of equal accuracies the lower log loss is better. Features
    are taken as they are; their length matters, as it sets what a penalty means.

    Args:
        refit: the last fit is on train and validation together, as in the paper; else on train alone, so that k shots
            stay k.
        max_iter: of each fit.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    found: dict[int, SweepPoint] = {}  # by position on the grid
    labels, features = splits.validation.labels, splits.validation.features
    last, step = (_MOST_C - _LEAST_C) * _STEPS_PER_DECADE, _FIRST_STEP
    positions = set(range(0, last + 1, step))
    while True:
        for position in sorted(positions - found.keys()):
            C = 10.0 ** (_LEAST_C + position / _STEPS_PER_DECADE)
            weight, bias, num_iterations, is_converged = fit_probe(splits.train, C, max_iter)
            scores = features @ weight + bias
            accuracy = float((first_of_best(scores) == labels).mean())
            found[position] = SweepPoint(C, accuracy, _log_loss(scores, labels), num_iterations, is_converged)
        peak = max(found, key=lambda position: (found[position].accuracy, -found[position].log_loss, -position))
        if step == 1:
            break
        step //= 2
        positions = {peak - step, peak + step} & set(range(last + 1))
    C = found[peak].C
    weight, bias, num_iterations, is_converged = fit_probe(splits.labelled if refit else splits.train, C, max_iter)
    outcome = Outcome(splits.test.features @ weight + bias, splits.test)
    sweep = tuple(found[position] for position in sorted(found))
    return LinearProbe(outcome, C, sweep, num_iterations, is_converged, weight, bias)


def fit_probe(train: Labelled, C: float, max_iter: int = 1000) -> tuple[np.ndarray, np.ndarray, int, bool]:
    """Weight (E, C), bias (C,), iterations, and whether they sufficed, of one penalty.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ValueError("a linear probe needs scikit-learn: pip install 'miniclip[eval]'") from error
    # The gradient that counts as none is that of the sum over images, as in the scikit-learn of the paper's time.
    # Today's is of the mean, and for features of unit length 1e-4 of that would end a fit long before it is good. In
    # float32 the gradient is noise before it gets so small.
    model = LogisticRegression(C=C, tol=1e-4 / len(train), max_iter=max_iter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train.features.astype(np.float64), train.labels)
    is_converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    weight, bias = model.coef_.T, model.intercept_
    if len(model.classes_) == 2:  # scikit-learn keeps the second class's score alone
        weight, bias = np.pad(weight, ((0, 0), (1, 0))), np.pad(bias, (1, 0))
    return weight, bias, int(model.n_iter_.max()), is_converged


def _log_loss(scores: np.ndarray, labels: np.ndarray) -> float:
    scores = scores - scores.max(axis=1, keepdims=True)
    own = np.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    return float((np.log(np.exp(scores).sum(axis=1)) - own).mean())


# ---------------------------------------------------------------------------------------------------------------------
# Neighbours and Tip-Adapter: nothing is trained


def nearest_neighbours(
    splits: Splits, k: int = 20, temperature: float = 0.07, *, refit: bool = True, chunk_size: int = ROWS_OF_PROBES
) -> Outcome:
    """The k training images of the highest cosine vote for their classes, with weights exp(cosine / temperature) (Wu et
    al. 2018, https://arxiv.org/abs/1805.01978, section 3.4). Scores are shares of the votes. Images that are as near as
    the k-th, as copies are, share the votes that are left among them.

    Args:
        refit: validation images are neighbours, too, as nothing is chosen by them.
        chunk_size: test images compared at a time.

    Raises:
        ValueError: `k` is below 1 or above the number of images, or the temperature is not positive.
    """
    memory = splits.labelled if refit else splits.train
    if not 1 <= k <= len(memory):
        raise ValueError(f"{k} neighbours of {len(memory)} images; it must be from 1 to {len(memory)}")
    if not temperature > 0:
        raise ValueError(f"the temperature of the neighbours' votes is {temperature}; it must be above 0")
    keys, queries = unit_rows(memory.features), unit_rows(splits.test.features)
    scores = np.zeros((len(queries), len(splits.classnames)))
    for start in range(0, len(queries), chunk_size):
        cosines = queries[start : start + chunk_size] @ keys.T  # (m, N)
        kth = -np.partition(-cosines, k - 1, axis=1)[:, k - 1, None]  # (m, 1)
        is_nearer, is_near = cosines > kth + SAME, cosines >= kth - SAME
        num_nearer = is_nearer.sum(axis=1)
        left = (k - num_nearer) / (is_near.sum(axis=1) - num_nearer)  # votes for each image that is as near as the k-th
        rows, columns = np.nonzero(is_near)
        votes = np.where(is_nearer[rows, columns], 1.0, left[rows])
        # The largest weight is 1, so that nothing overflows.
        votes *= np.exp((cosines[rows, columns].astype(np.float64) - cosines.max(axis=1)[rows]) / temperature)
        np.add.at(scores, (start + rows, memory.labels[columns]), votes)
    scores /= scores.sum(axis=1, keepdims=True)
    return Outcome(scores, splits.test)


@dataclass(frozen=True)
class TipAdapter:
    """α and β as chosen, and the accuracy on the validation images that they were chosen for."""

    outcome: Outcome
    alpha: float
    beta: float
    validation_accuracy: float


def tip_adapter(
    splits: Splits,
    classifier: np.ndarray,
    *,
    alphas: Sequence[float] = _ALPHAS,
    betas: Sequence[float] = _BETAS,
    logit_scale: float = 100.0,
) -> TipAdapter:
    """Prompts and examples together, without training (Zhang et al. 2021, https://arxiv.org/abs/2111.03930).

    Scores are logit_scale · f·W + α · exp(−β (1 − f·Kᵀ))·V, where K are the training features and V their classes.
    α and β are the best on the validation images; of equals the smallest α, then the smallest β.

    Args:
        classifier: W (E, C), unit columns, in the space of the features.
        logit_scale: what multiplies cosines, not its logarithm; 100 in the paper, as in OpenAI's models.

    Raises:
        ValueError: as `zero_shot`; or no α or β, or one below 0.
    """
    for name, values in (("alphas", alphas), ("betas", betas)):
        if not len(values) or not min(values) >= 0:
            raise ValueError(f"{name} are {tuple(values)}; there must be some, none below 0")
    W = _checked_classifier(splits, classifier)
    alphas, betas = sorted(alphas), sorted(betas)
    examples = Examples.of(splits.train, len(splits.classnames))
    right = np.zeros((len(alphas), len(betas)), dtype=np.int64)
    for start in range(0, len(splits.validation), ROWS_OF_PROBES):
        chunk = slice(start, start + ROWS_OF_PROBES)
        f, labels = unit_rows(splits.validation.features[chunk]), splits.validation.labels[chunk]
        prompts, distances = logit_scale * f @ W, examples.distances(f)
        for j, beta in enumerate(betas):
            votes = examples.votes(distances, beta)
            for i, alpha in enumerate(alphas):
                right[i, j] += (first_of_best(prompts + alpha * votes) == labels).sum()
    i, j = divmod(int(right.argmax()), len(betas))  # the first of equals
    alpha, beta = alphas[i], betas[j]
    scores = adapter_scores(splits.test.features, W, examples, alpha=alpha, beta=beta, logit_scale=logit_scale)
    return TipAdapter(Outcome(scores, splits.test), alpha, beta, float(right[i, j] / len(splits.validation)))


@dataclass(frozen=True)
class Examples:
    """Tip-Adapter's cache of training images.

    Args:
        keys: (N, E) unit features, class by class, so that the product with V is a sum over neighbours.
        starts: (C,) the first of each class.
    """

    keys: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, train: Labelled, num_classes: int) -> Examples:
        """Every class has at least one image."""
        counts = np.bincount(train.labels, minlength=num_classes)
        order = np.argsort(train.labels, kind="stable")
        return cls(unit_rows(train.features[order]), np.cumsum(counts) - counts)

    def distances(self, f: np.ndarray) -> np.ndarray:
        """(m, N) of unit features (m, E)."""
        return 1 - f @ self.keys.T

    def votes(self, distances: np.ndarray, beta: float) -> np.ndarray:
        """(m, C)."""
        return np.add.reduceat(np.exp(-beta * distances), self.starts, axis=1)


def adapter_scores(
    features: np.ndarray, classifier: np.ndarray, examples: Examples, *, alpha: float, beta: float, logit_scale: float
) -> np.ndarray:
    """(M, C) scores of features (M, E), as in `tip_adapter`."""
    scores = []
    for start in range(0, len(features), ROWS_OF_PROBES):
        f = unit_rows(features[start : start + ROWS_OF_PROBES])
        scores.append(logit_scale * f @ classifier + alpha * examples.votes(examples.distances(f), beta))
    return np.concatenate(scores)


# ---------------------------------------------------------------------------------------------------------------------
# How many examples prompts are worth

METHODS = ("linear probe", "neighbours", "Tip-Adapter")


@dataclass(frozen=True)
class ShotCurve:
    """Accuracies with 1, 2, 4, … training images of each class, against none at all.

    Args:
        zero_shot: of the prompts alone.
        shots: K numbers, rising.
        left_out: those asked for by default of which the smallest class has fewer images.
        accuracies: (K, seeds) of each method.
    """

    zero_shot: float
    shots: tuple[int, ...]
    left_out: tuple[int, ...]
    seeds: tuple[int, ...]
    accuracies: dict[str, np.ndarray]

    def mean(self, method: str) -> np.ndarray:
        """(K,)."""
        return self.accuracies[method].mean(axis=1)

    def spread(self, method: str) -> np.ndarray:
        """(K,) standard deviations over the seeds, as estimated from them; NaN of one seed."""
        values = self.accuracies[method]
        if values.shape[1] < 2:
            return np.full(len(values), np.nan)
        return values.std(axis=1, ddof=1)

    def shots_to_match(self, method: str) -> float | None:
        """Where the mean first reaches zero-shot, straight between shots over their logarithm (as paper, figure 7).

        Never below the fewest shots that were tried; None beyond the most.
        """
        means = self.mean(method)
        reached = np.flatnonzero(means >= self.zero_shot)
        if not len(reached):
            return None
        i = int(reached[0])
        if i == 0:
            return float(self.shots[0])
        share = (self.zero_shot - means[i - 1]) / (means[i] - means[i - 1])
        return float(self.shots[i - 1] * (self.shots[i] / self.shots[i - 1]) ** share)

    def verdict(self, method: str) -> str:
        """`shots_to_match` in words."""
        shots, fewest = self.shots_to_match(method), self.shots[0]
        if shots is None:
            return f"more than {counted(self.shots[-1], 'image')} a class to match zero-shot"
        if self.mean(method)[0] >= self.zero_shot:
            return f"at least as good as zero-shot with {counted(fewest, 'image')} a class"
        return f"{shots:.1f} images a class to match zero-shot"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "zero_shot": self.zero_shot,
            "shots": list(self.shots),
            "left_out": list(self.left_out),
            "seeds": list(self.seeds),
            "methods": {
                method: {
                    "accuracies": values.tolist(),
                    "mean": self.mean(method).tolist(),
                    "spread": [None if math.isnan(spread) else float(spread) for spread in self.spread(method)],
                    "shots_to_match_zero_shot": self.shots_to_match(method),
                }
                for method, values in self.accuracies.items()
            },
        }


def shot_curve(
    splits: Splits,
    classifier: np.ndarray,
    *,
    pooled: Splits | None = None,
    shots: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    num_neighbours: int = 20,
    logit_scale: float = 100.0,
    progress: Callable[[int], Any] | None = None,
) -> ShotCurve:
    """The paper's figure 6 for one's own data: linear probe, neighbours and Tip-Adapter from k images of each class.

    What has to be chosen is chosen on all validation images, as is usual; whoever truly has k labelled images of each
    class has to choose by fewer, and does a little worse.

    Args:
        splits: features in the space of the texts.
        classifier: (E, C), unit columns; it alone is the zero-shot score.
        pooled: the same images' features before the projection, for the linear probe.
        shots: by default 1, 2, 4, 8 and 16, as far as the smallest class has so many.
        num_neighbours: or all there are, where there are fewer.
        progress: called with the number of probes done, of `len(shots) * len(seeds)`.

    Raises:
        ValueError: a class has fewer images than shots, no shots or seeds, `pooled` of other images, or as the methods.
    """
    if pooled is not None:
        for name in ("train", "validation", "test"):
            if not np.array_equal(getattr(pooled, name).labels, getattr(splits, name).labels):
                raise ValueError(f"the features before the projection are of other {name} images: the labels differ")
    fewest = int(splits.num_examples.min())
    wanted = sorted(set(SHOTS if shots is None else shots))
    left_out = tuple(k for k in wanted if k > fewest) if shots is None else ()
    chosen = tuple(k for k in wanted if k not in left_out)
    if not chosen or not len(seeds):
        raise ValueError(f"a curve of {len(chosen)} numbers of shots and {len(seeds)} seeds; it needs one of each")
    splits.shots(chosen[-1], seeds[0])  # refuses too many before the work
    zero = zero_shot(splits, classifier).accuracy
    accuracies = {method: np.empty((len(chosen), len(seeds))) for method in METHODS}
    done = 0
    for i, k in enumerate(chosen):
        for j, seed in enumerate(seeds):
            drawn = splits.shots(k, seed)
            probed = drawn if pooled is None else pooled.shots(k, seed)
            neighbours = min(num_neighbours, len(drawn.train))
            outcomes = (
                linear_probe(probed, refit=False).outcome,
                nearest_neighbours(drawn, neighbours, refit=False),
                tip_adapter(drawn, classifier, logit_scale=logit_scale).outcome,
            )
            for method, outcome in zip(METHODS, outcomes, strict=True):
                accuracies[method][i, j] = outcome.accuracy
            done += 1
            if progress:
                progress(done)
    return ShotCurve(zero, chosen, left_out, tuple(seeds), accuracies)


# ---------------------------------------------------------------------------------------------------------------------
# All of them


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

    def values(self) -> dict[str, dict[str, float]]:
        """The numbers of each task; the linear probe's names are CLIP_benchmark's."""
        linear, tip = self.linear.outcome, self.tip_adapter
        return {
            "linear_probe": {
                "lp_acc1": linear.accuracy,
                "lp_mean_per_class_recall": float(np.nanmean(linear.per_class)),
                "C": self.linear.C,
            },
            "nearest_neighbours": {"acc1": self.neighbours.accuracy, "neighbours": self.num_neighbours},
            "tip_adapter": {"acc1": tip.outcome.accuracy, "alpha": tip.alpha, "beta": tip.beta},
        }

    def outcomes(self) -> dict[str, Outcome]:
        """By the same tasks."""
        return {
            "linear_probe": self.linear.outcome,
            "nearest_neighbours": self.neighbours,
            "tip_adapter": self.tip_adapter.outcome,
        }

    def as_dict(self) -> dict[str, Any]:
        outcomes = self.outcomes()
        return {
            "train": self.train,
            "num_train": len(self.splits.train),
            "num_validation": len(self.splits.validation),
            "num_leaked": self.splits.num_leaked,
            "linear_probe_features": "before the projection" if self.is_pooled else "after the projection",
            **{
                task: {**values, "interval_95": list(outcomes[task].interval)} for task, values in self.values().items()
            },
            "shot_curve": self.curve.as_dict(),
        }
