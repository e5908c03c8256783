"""`ZeroShotClassifier`: class names, or a few labelled images, as an estimator of scikit-learn's.

>>> classifier = ZeroShotClassifier("runs/digits/best", templates="simple").fit(None, ["three", "seven"])
>>> classifier.predict(["picture.png"])
array(['seven'], dtype='<U5')

N images, C classes, E width of the features.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..common.arguments import check_list, check_number, check_precision, shown
from ..common.storage import is_url
from ..evaluation.datasets.names import key_of_no_words, settle_templates
from ..evaluation.datasets.sets import EvaluationSet, Found
from ..evaluation.encoder import Encoder
from ..evaluation.features import encode_images
from ..evaluation.measures.ties import first_of_best
from ..evaluation.other_libraries import as_encoder, open_model
from ..evaluation.probes import Examples, adapter_scores, fit_probe, linear_probe, tip_adapter
from ..evaluation.prompts import Prompts, suited
from ..evaluation.splits import Labelled, Splits, draw_validation, unit_rows
from ..evaluation.zero_shot import different_columns, same_names, told_of_same_names, zero_shot_classifier
from .classify import Classes
from .sources import in_memory
from .thresholds import ModelThreshold, find_threshold

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data
except ImportError as error:
    raise ImportError(
        f"ZeroShotClassifier needs scikit-learn 1.6 or later: pip install 'miniclip[eval]' ({error})"
    ) from error

METHODS = ("zero_shot", "tip_adapter", "probe")


class ZeroShotClassifier(ClassifierMixin, BaseEstimator):
    """Classifies images by prompts, by prompts and a few labelled images, or by labelled images alone.

    X is a list (or array, or column) of images: paths, URLs, PIL images, arrays of pixels, bytes of files; or a matrix
    of numbers, which are features (N, E) of the model's, as `miniclip.embed` gives them. Who fits more than once on the
    same images, as `cross_val_score` does, saves time by features.

    Args:
        model: a name or path as `miniclip eval` takes it, a `CLIP`, what `miniclip.load` returns, an `Encoder`, or an
            object with the five things.
            None, for "probe" alone, takes X as features of a model unknown.
        method: "zero_shot" learns nothing. "tip_adapter" adds the training images' votes to the prompts (Zhang et al.
            2021). "probe" is a logistic regression, on features before the projection where X are images and the model
            has such, as the paper's linear probe.
        classnames: what the classes are called in prompts: a mapping from each label, or a sequence by labels 0, 1, …
            By default labels are names, with spaces for underscores.
        templates: a built-in set ("imagenet80", …), a file, a sequence of texts with `{}` for the name, or a mapping
            from each name to its prompts. By default those of the threshold, else in the words of the captions that
            the model was trained on, if it knows them, else "simple".
        C: of "probe", the inverse of the penalty. None: chosen on a fifth of the training images, held out by class,
            and then fitted to all.
        alpha, beta: of "tip_adapter", the votes' weight and sharpness. None: chosen likewise, without a last fit.
        none_label: what `predict` answers for an image that is none of the classes by the model's threshold. By default
            the nearest class, always.
        threshold: of `none_label`: a cosine, or a file of `miniclip calibrate`; by default that in the model's folder.
        upright: turn images as EXIF says that viewers show them; by default they are read as they are stored.
        batch_size, num_workers, device, precision: of encoding, as in `miniclip eval`.

    Attributes:
        classes_: (C,) labels in sorted order, which is that of all columns, as everywhere in scikit-learn.
        classnames_, class_features_, logit_scale_: but for "probe", their names, (C, E) the classifier that the prompts
            make, and what multiplies cosines.
        coef_, intercept_: (C, E) and (C,), of "probe".
        C_, alpha_, beta_: as chosen or given.
        threshold_: that `none_label` stands on.
    """

    def __init__(
        self,
        model: Any = None,
        *,
        method: str = "zero_shot",
        classnames: Any = None,
        templates: Any = None,
        C: float | None = None,
        alpha: float | None = None,
        beta: float | None = None,
        none_label: Any = None,
        threshold: str | Path | float | None = None,
        upright: bool = False,
        batch_size: int = 64,
        num_workers: int = 0,
        device: str | None = None,
        precision: str | None = None,
    ) -> None:
        self.model = model
        self.method = method
        self.classnames = classnames
        self.templates = templates
        self.C = C
        self.alpha = alpha
        self.beta = beta
        self.none_label = none_label
        self.threshold = threshold
        self.upright = upright
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.device = device
        self.precision = precision

    def fit(self, X: Any = None, y: Any = None) -> ZeroShotClassifier:
        """Learns the classes, and from labelled images what the method learns from them.

        Args:
            X: labelled images or their features; None, for "zero_shot", to name the classes alone.
            y: (N,) labels of X; without X the classes, each once, or None for those of `classnames`, else of the
                threshold.

        Raises:
            ValueError: a method that needs what is not there, or what X, y and the model's parts raise.
        """
        self._refuse_contradictions(X)
        threshold = None if self.none_label is None else self._found_threshold()
        self._is_of_images = X is not None and _are_images(X)
        if X is None:
            labels, features = self._named_classes(y, threshold), None
        elif self._is_of_images:
            labels, features = _checked_labels(X, y), None
        else:
            features, labels = validate_data(self, X, y, dtype=(np.float64, np.float32))
        check_classification_targets(labels)
        self.classes_, indices = np.unique(labels, return_inverse=True)
        if len(classes := self.classes_.tolist()) < 2:
            found = f"one class, {classes[0]!r}" if classes else "no class"
            raise ValueError(f"y has {found}; there is nothing to tell apart")
        if self.none_label is not None and self.none_label in classes:
            raise ValueError(f"none_label {self.none_label!r} is one of the classes")
        if self.method != "probe":
            self._make_prompts(threshold)
        if features is not None:
            features = self._of_right_width(features)
        if self.method != "zero_shot":
            learn = self._learn_probe if self.method == "probe" else self._learn_votes
            learn(Labelled(self._encoded(X) if features is None else features, indices))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """(N,) labels; of equally near classes the first. With `none_label`, that of images below the threshold."""
        scores, features = self._scores(X)
        guesses = self.classes_[first_of_best(scores / self.logit_scale_ if self.method == "zero_shot" else scores)]
        if self.none_label is None:
            return guesses
        is_none = self.threshold_.rejects(unit_rows(features) @ self.class_features_.T)
        if isinstance(self.none_label, str) != (guesses.dtype.kind in "US"):
            guesses = guesses.astype(object)  # NumPy would turn numbers into texts
        return np.where(is_none, self.none_label, guesses)

    def predict_proba(self, X: Any) -> np.ndarray:
        """(N, C) softmax of the scores: relative to these classes, never "is it one of them at all"."""
        scores = self._scores(X)[0].astype(np.float64)
        scores = np.exp(scores - scores.max(axis=1, keepdims=True))
        return scores / scores.sum(axis=1, keepdims=True)

    def decision_function(self, X: Any) -> np.ndarray:
        """(N, C) the scores that the softmax is of: cosines times the logit scale, for "zero_shot". Of two classes, by
        scikit-learn's convention, (N,) the second's less the first's."""
        scores = self._scores(X)[0]
        return scores[:, 1] - scores[:, 0] if len(self.classes_) == 2 else scores

    # -----------------------------------------------------------------------------------------------------------------
    # Classes

    def _refuse_contradictions(self, X: Any) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r} is none of {', '.join(METHODS)}")
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if value is not None:
                check_number(name, value, 0)
        if self.model is None and self.method != "probe":
            raise ValueError(f"method {self.method!r} makes prompts of class names, which needs a model")
        if X is None and self.method != "zero_shot":
            raise ValueError(f"method {self.method!r} learns from labelled images; give them as X and y")
        if self.none_label is None and self.threshold is not None:
            raise ValueError(
                "threshold= is for images that are none of the classes; none_label= is what they are called"
            )
        if not isinstance(self.none_label, str | int | float | np.generic | None):
            raise ValueError(f"none_label is {shown(self.none_label)}; it must be a text or a number, as labels are")
        if self.none_label is not None and self.method == "probe":
            raise ValueError("none_label needs cosines with prompts, which method 'probe' has none of")

    def _found_threshold(self) -> ModelThreshold:
        name = str(self.model) if isinstance(self.model, str | Path) else ""
        threshold = find_threshold(name, self.threshold)
        if threshold is None:
            raise ValueError(
                f"none_label needs a threshold, and {_called(self.model)} has none; run `miniclip calibrate`, or give "
                "threshold= a cosine or a file"
            )
        return threshold

    def _named_classes(self, y: Any, threshold: ModelThreshold | None) -> np.ndarray:
        if y is None and self.classnames is not None:
            names = self.classnames
            y = list(names) if isinstance(names, Mapping) else range(len(check_list("classnames", names, "names")))
        if y is None and threshold is not None and threshold.classnames:
            y = threshold.classnames
        if y is None or isinstance(y, str):
            raise ValueError("without X, y is a list of class names, of which each image is to get one")
        y = check_list("y", y, "class names")
        for number, label in enumerate(y):
            if not isinstance(label, str | int | float | np.generic):
                raise ValueError(f"y[{number}] is {shown(label)}; a class is called by a text or by a number")
            if isinstance(label, str) != isinstance(y[0], str):
                raise ValueError(f"y mixes texts and numbers: {shown(y[0])} and {shown(label)}")
        labels = column_or_1d(np.asarray(y))
        different, counts = np.unique(labels, return_counts=True)
        if len(different) < len(labels):
            raise ValueError(
                f"class {different.tolist()[counts.argmax()]!r} is named twice; without X, y has each class once"
            )
        return labels

    def _make_prompts(self, threshold: ModelThreshold | None) -> None:
        encoder = self._encoder()
        labels = self.classes_.tolist()
        self.classnames_ = tuple(map(self._name_of, labels))
        for label, name in zip(labels, self.classnames_, strict=True):
            if not name.strip():
                raise ValueError(f"class {label!r} has an empty name, whose prompts would fit any image; leave it out")
        if self.classnames is None and (key := key_of_no_words(labels)):
            warnings.warn(f"classes are called by {key}, as {labels[0]!r}; classnames= gives them words", stacklevel=3)
        templates = self._templates(threshold)
        if threshold is not None:
            threshold.check_model(encoder)
            threshold.warn_if_other(self.classnames_, templates, self.upright)
            self.threshold_ = threshold
        columns = zero_shot_classifier(encoder, self.classnames_, templates, encoder.tokenize)
        if self.method == "zero_shot":  # votes tell them apart
            for sentence in told_of_same_names(same_names(different_columns(columns)[1], self.classnames_)):
                warnings.warn(sentence, stacklevel=3)
        # In float64 a row's scores have the same digits in any batch, as scikit-learn expects them to.
        self.class_features_ = columns.T.cpu().double().numpy()
        self.logit_scale_ = float(encoder.logit_scale.detach().exp())

    def _name_of(self, label: Any) -> str:
        names = self.classnames
        if names is not None and not isinstance(names, Mapping):
            names = check_list("classnames", names, "names")
        if names is None:
            return str(label).replace("_", " ")
        is_known = label in names if isinstance(names, Mapping) else isinstance(label, int) and 0 <= label < len(names)
        if is_known and isinstance(names[label], str | int | float):
            return str(names[label])
        if is_known:
            raise ValueError(f"classnames[{label!r}] is {shown(names[label])}; it must be a text (str)")
        what = "labels" if isinstance(names, Mapping) else f"labels 0 to {len(names) - 1}"
        raise ValueError(f"classnames has names for {len(names)} {what}, and none for {label!r}")

    def _templates(self, threshold: ModelThreshold | None) -> Prompts:
        own = None if threshold is None or self.templates is not None else threshold.templates_for(self.classnames_)
        if own is not None:
            return own
        if self.templates is not None and not isinstance(self.templates, str | Path):
            return self.templates
        chosen = settle_templates(Found("templates", ()), self.templates, self.classnames_)
        return suited(Classes(self.classnames_, *chosen), self._encoder().wordings).templates

    # -----------------------------------------------------------------------------------------------------------------
    # Features and scores

    def _learn_probe(self, examples: Labelled) -> None:
        self.C_ = self.C
        if self.C is None:
            found = linear_probe(self._splits(examples, is_held_out=True))
            self.C_, weight, bias = found.C, found.weight, found.bias
        else:
            weight, bias, _, _ = fit_probe(examples, self.C)
        self.coef_, self.intercept_ = weight.T, bias

    def _learn_votes(self, examples: Labelled) -> None:
        given = {"alphas": self.alpha, "betas": self.beta}
        splits = self._splits(examples, is_held_out=None in given.values())
        ranges = {name: [value] for name, value in given.items() if value is not None}
        chosen = tip_adapter(splits, self.class_features_.T, logit_scale=self.logit_scale_, **ranges)
        self.alpha_, self.beta_ = chosen.alpha, chosen.beta
        kept = Examples.of(splits.train, len(self.classes_))
        self._examples = replace(kept, keys=kept.keys.astype(np.float64))

    def _splits(self, examples: Labelled, is_held_out: bool) -> Splits:
        """A fifth held out to choose by; or all of them, twice, where there is nothing to choose."""
        names, first = tuple(map(str, self.classes_)), examples.take(np.arange(1))
        if not is_held_out:
            return Splits(examples, examples, first, names)
        try:
            drawn = draw_validation(examples.labels, None)
        except ValueError as error:
            raise ValueError(
                f"none of {len(examples)} images can be held out to choose by, as every class has one; give more, or "
                "C= (alpha= and beta= of 'tip_adapter')"
            ) from error
        return Splits(examples.take(~drawn), examples.take(drawn), first, names)

    def _scores(self, X: Any) -> tuple[np.ndarray, np.ndarray]:
        """(N, C), and the features that they are of."""
        check_is_fitted(self)
        are_images = _are_images(X)
        if self.method == "probe" and are_images != self._is_of_images:
            before, now = ("images", "features") if self._is_of_images else ("features", "images")
            raise ValueError(
                f"the probe was fitted to {before}, whose features may differ from those of the {now} given"
            )
        if are_images:
            features = self._encoded(X)
        else:
            features = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        features = self._of_right_width(features)
        if self.method == "probe":
            return features @ self.coef_.T + self.intercept_, features
        if self.method == "zero_shot":
            return self.logit_scale_ * (unit_rows(features) @ self.class_features_.T), features
        weights = {"alpha": self.alpha_, "beta": self.beta_, "logit_scale": self.logit_scale_}
        return adapter_scores(features, self.class_features_.T, self._examples, **weights), features

    def _of_right_width(self, features: np.ndarray) -> np.ndarray:
        if self.method != "probe" and features.shape[1] != (width := self.class_features_.shape[1]):
            raise ValueError(
                f"X has {features.shape[1]} features, and {_called(self.model)} makes {width} of an image and of a text"
            )
        return features

    def _encoded(self, X: Any) -> np.ndarray:
        """(N, E) features of images, all of which must be readable."""
        if self.model is None:
            raise ValueError("X are images, and without a model only features can be classified")
        encoder = self._encoder()
        images = [_image(each, number) for number, each in enumerate(X)]
        encode = encoder.encode_image
        if self.method == "probe" and encoder.encode_pooled is not None:
            encode = encoder.encode_pooled
        found = encode_images(
            encode,
            encoder.preprocess,
            EvaluationSet("X", tuple(images), upright=self.upright),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )
        if found.unreadable:
            raise ValueError(
                f"{len(found.unreadable)} of {len(images)} images can't be read; the first: {found.unreadable[0]}"
            )
        return found.features.numpy()

    def _encoder(self) -> Encoder:
        model = self.model
        if isinstance(model, str | Path):
            precision = None if self.precision is None else check_precision(self.precision)
            return _opened(str(model), self.device, precision, _changed_at(str(model)))
        return as_encoder(model, precision=self.precision)

    # -----------------------------------------------------------------------------------------------------------------
    # scikit-learn's ways

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = self.method == "zero_shot"  # of features that are no model's
        return tags

    def __sklearn_clone__(self) -> ZeroShotClassifier:
        """Copies share the model: it is large, and fitting does not change it."""
        without = copy.copy(self)
        without.model = None
        clone = super(ZeroShotClassifier, without).__sklearn_clone__()
        clone.model = self.model
        return clone


def _checked_labels(X: Any, y: Any) -> np.ndarray:
    if y is None:
        raise ValueError(
            "ZeroShotClassifier requires y to be passed, but the target y is None; without images, class "
            'names are y: fit(None, ["cat", "dog"])'
        )
    labels = column_or_1d(y, warn=True)
    check_consistent_length(X, labels)
    return labels


def _are_images(X: Any) -> bool:
    """Whether X are images and not a matrix of features."""
    if hasattr(X, "ndim") and X.ndim != 1:
        return X.ndim > 2
    if isinstance(X, str | bytes | Path | Mapping) or not (hasattr(X, "__len__") or hasattr(X, "__array__")):
        raise ValueError(f"X is a {type(X).__name__}; it must be a list of images, or a matrix of their features")
    first = next(iter(X), None) if hasattr(X, "__len__") else None
    if isinstance(X, list | tuple) and (first is None or (np.isscalar(first) and not isinstance(first, str | bytes))):
        what = f"begins with {shown(first)}" if len(X) else "is an empty list"
        raise ValueError(f"X {what}; it must be a list of images, or a matrix of their features")
    return isinstance(first, str | bytes | Path) or hasattr(first, "getbands") or getattr(first, "ndim", 0) > 1


def _image(value: Any, number: int) -> Any:
    if isinstance(value, str):
        return value if is_url(value) else Path(value)
    return value if isinstance(value, Path) else in_memory(value, number)


def _called(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else f"the {type(model).__name__} given"


@lru_cache(maxsize=1)
def _opened(name: str, device: str | None, precision: str | None, changed_at: int) -> Encoder:
    """Kept for the next fit, as that of a clone or after unpickling."""
    return open_model(name, device, precision)


def _changed_at(name: str) -> int:
    """When the files of a model last changed; 0 for a name of a library's."""
    path = Path(name)
    files = path.iterdir() if path.is_dir() else [path]
    return max((file.stat().st_mtime_ns for file in files if file.is_file()), default=0)
