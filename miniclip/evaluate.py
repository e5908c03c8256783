"""Zero-shot classification: prompts in, a classifier out, and scores with their intervals (paper section 3.1).

To this file a model is whatever encodes images and texts; preprocessing and tokenizer are arguments. So any CLIP-like
model of any library can be evaluated.

N images, C classes, T templates, E embedding, K guesses kept per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import tokenizer
from .datasets import EvaluationSet, LabelledImages
from .metrics import bootstrap_interval, confusion_matrix, is_among_guesses, mean_per_class_recall, per_class_recall
from .processes import collect, share
from .prompts import Prompts, class_prompts

_PROMPTS_PER_BATCH = 256
_NUM_GUESSES = 5


class Encoder(Protocol):
    """The part of a model that evaluation uses."""

    logit_scale: Tensor

    def encode_image(self, images: Tensor) -> Tensor: ...
    def encode_text(self, tokens: Tensor) -> Tensor: ...


def zero_shot_classifier(
    model: Any,
    classnames: Sequence[str],
    templates: Prompts,
    tokenize: Callable[[list[str]], Tensor] | None = None,
) -> Tensor:
    """One unit vector for each class: the mean of its prompts' unit features, made unit again (paper section 3.1.4).

    Args:
        model: has `encode_text`.
        classnames: C names.
        templates: T wordings, with `{}` or `{c}` where the name goes, or functions of the name; or a mapping from each
            name to its own prompts, as many as there are.
        tokenize: texts to token ids; by default CLIP's own.

    Returns:
        (E, C), columns of unit length. `image_features @ classifier` are cosines.

    Raises:
        ValueError: no classes or no templates, a template without a place for the name, or a class without prompts.
    """
    if not len(classnames) or not len(templates):
        raise ValueError(f"{len(classnames)} class names and {len(templates)} templates; each needs at least one")
    if isinstance(classnames, str) or isinstance(templates, str):
        raise ValueError("classnames and templates are sequences of texts; a single text was given")
    if tokenize is None:
        tokenize = partial(tokenizer.tokenize, context_length=getattr(model, "context_length", 77))
    prompts = [class_prompts(templates, name) for name in classnames]
    features = encode_texts(model, [prompt for each in prompts for prompt in each], tokenize)  # (C * T, E)
    means = torch.stack([each.mean(dim=0) for each in features.split([len(each) for each in prompts])])  # (C, E)
    return F.normalize(means, dim=-1).T


@torch.no_grad()  # what is sliced over processes can't do without autograd's bookkeeping
def encode_texts(model: Any, texts: Sequence[str], tokenize: Callable[[list[str]], Tensor]) -> Tensor:
    """Unit features (N, E) of texts; each text once, and long ones apart from short ones, as they set the cost."""
    unique = list(dict.fromkeys(texts))
    unique.sort(key=len)
    parts = []
    for start in range(0, len(unique), _PROMPTS_PER_BATCH):
        features = model.encode_text(tokenize(unique[start : start + _PROMPTS_PER_BATCH]))
        parts.append(F.normalize(features.float(), dim=-1))
    place = {text: number for number, text in enumerate(unique)}
    return torch.cat(parts)[[place[text] for text in texts]]


@dataclass(frozen=True)
class Scores:
    """What a model said of each image.

    Args:
        data: what was evaluated.
        numbers: (N,) which of the data's images could be read, in order.
        labels: (N,) true classes.
        ranked: (N, K) classes by falling cosine.
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


class _Images(Dataset[Tensor | str]):
    def __init__(self, data: EvaluationSet, preprocess: Callable[[Image.Image], Tensor], numbers: list[int]) -> None:
        self.data, self.preprocess, self.numbers = data, preprocess, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Tensor | str:
        try:
            return self.preprocess(self.data.open(self.numbers[place]))
        except ValueError as error:
            return str(error)


@torch.no_grad()  # as above
def zero_shot_scores(
    model: Any,
    preprocess: Callable[[Image.Image], Tensor],
    data: LabelledImages,
    *,
    tokenize: Callable[[list[str]], Tensor] | None = None,
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
    guesses = min(_NUM_GUESSES, len(data.classnames))
    numbers = share(len(data))
    loader = DataLoader(_Images(data, preprocess, numbers), batch_size, num_workers=num_workers, collate_fn=list)
    device, scale = model.logit_scale.device, float(model.logit_scale.exp())
    blank: Tensor | None = None  # in place of what can't be read, so that all processes take the same steps
    parts: list[list[np.ndarray]] = []
    problems: list[str] = []  # of each image, empty for those that could be read
    for batch in loader:
        if blank is None:
            readable = [image for image in batch if isinstance(image, Tensor)]
            blank = readable[0] if readable else preprocess(Image.new("RGB", (32, 32)))
        images = torch.stack([blank if isinstance(image, str) else image for image in batch]).to(device)
        cosines = F.normalize(model.encode_image(images).float(), dim=-1) @ classifier  # (b, C)
        if not torch.isfinite(cosines).all():
            raise ValueError(f"the model gives features that are not finite, for images of {data.name}")
        probabilities = (scale * cosines).softmax(dim=-1)
        top, ranked = cosines.topk(guesses, dim=-1)
        parts.append([t.cpu().numpy() for t in (ranked, top, probabilities.gather(1, ranked))])
        problems += [image if isinstance(image, str) else "" for image in batch]
        if progress:
            progress(round(len(problems) * len(data) / len(numbers)))
    own = [np.concatenate(column) for column in zip(*parts, strict=True)]
    shares = collect((own, problems))
    problems = [problem for _, each in shares for problem in each][: len(data)]
    healthy = np.flatnonzero([not problem for problem in problems])
    unreadable = tuple(problem for problem in problems if problem)
    if not len(healthy):
        raise ValueError(f"none of the {len(data)} images of {data.name} can be read; the first: {unreadable[0]}")
    guessed = [np.concatenate(column)[healthy] for column in zip(*(arrays for arrays, _ in shares), strict=True)]
    return Scores(data, healthy, np.array(data.labels)[healthy], guessed[0], guessed[1], guessed[2], unreadable)


@dataclass(frozen=True)
class Metrics:
    """Scores of one data set, as shares of 1.

    Args:
        acc1, acc5: share of images whose class is the first guess, or among the first five.
        mean_per_class_recall: the mean over classes that have images, so that rare ones count as much.
        interval: the 95 % interval of acc1, resampled by group.
        per_class: (C,) acc1 of each class, NaN for a class without images.
        confusion: (C, C) images by true class (row) and first guess (column).
    """

    num_images: int
    acc1: float
    acc5: float
    mean_per_class_recall: float
    interval: tuple[float, float]
    per_class: np.ndarray
    confusion: np.ndarray


def measure(scores: Scores) -> Metrics:
    is_first, is_early = (
        is_among_guesses(scores.ranked, scores.labels, k) for k in (1, min(5, scores.ranked.shape[1]))
    )
    confusion = confusion_matrix(scores.labels, scores.ranked[:, 0], len(scores.data.classnames))
    return Metrics(
        num_images=len(is_first),
        acc1=float(is_first.mean()),
        acc5=float(is_early.mean()),
        mean_per_class_recall=mean_per_class_recall(confusion),
        interval=bootstrap_interval(is_first, np.array(scores.data.groups)[scores.numbers]),
        per_class=per_class_recall(confusion),
        confusion=confusion,
    )
