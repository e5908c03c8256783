"""Whether an export gives what the model gives: its runner beside the model, on noise and on the user's pictures.

N images or texts, C classes, E embedding.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...common.wording import counted, some
from ...evaluation.datasets.sets import EvaluationSet, LabelledImages
from ...evaluation.encoder import Encoder
from ...evaluation.features import ImageFeatures, encode_images
from ...evaluation.measures.statistics import Comparison, compare
from ...evaluation.zero_shot import zero_shot_classifier
from ...model import CLIP
from .runner import Clip, open_picture
from .towers import random_tokens

BATCHES, LENGTHS = (1, 7, 32), (5, 77)
# How far a coordinate of a unit feature may lie from the model's. Weights of 16 bits are rounded by up to 2**-11 and
# 2**-8 of themselves; 8 bits are another model, of which only noise must not be left.
_MOST_DIFFERENCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 3e-2}
_LEAST_COSINE = 0.9
_MOST_LOST = 0.01  # of accuracy
_TIMED_BATCHES = (1, 32)
_MOST_RUNS, _LEAST_RUNS, _ENOUGH_S = 20, 3, 2.0  # of each that is timed, and when more than the least is too many

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]


@dataclass(frozen=True)
class Agreement:
    """How close the export's unit features are to the model's.

    Args:
        what: they are of, and how many.
        cosine_min, cosine_mean: of the export's feature and the model's.
        difference: the largest of any coordinate.
    """

    what: str
    count: int
    cosine_min: float
    cosine_mean: float
    difference: float

    @classmethod
    def of(cls, what: str, found: np.ndarray, expected: np.ndarray) -> Agreement:
        """Both (N, E) and of unit length."""
        cosines = (found.astype(np.float64) * expected).sum(axis=1)
        difference = float(np.abs(found.astype(np.float64) - expected).max())
        return cls(what, len(found), float(cosines.min()), float(cosines.mean()), difference)

    def problem(self, precision: str) -> str:
        """What is wrong with it, in words; empty if nothing."""
        most = _MOST_DIFFERENCE.get(precision)
        if most is None:
            is_close, limit = self.cosine_min >= _LEAST_COSINE, f"cosines of at least {_LEAST_COSINE}"
        else:
            is_close, limit = self.difference <= most, f"differences of at most {most:g}"
        if is_close:  # a comparison with NaN is False, too
            return ""
        return (
            f"features of {self.what} differ by up to {self.difference:.1e}, with a least cosine of "
            f"{self.cosine_min:.4f}; {precision} is to have {limit}"
        )


@dataclass(frozen=True)
class Guesses:
    """First guesses of the two, on images with labels.

    Args:
        changed: images whose guess is another one.
        before, after: accuracies of the model and of its export.
        comparison: of these, with McNemar's p.
    """

    num_images: int
    num_classes: int
    changed: int
    before: float
    after: float
    comparison: Comparison


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a tower's batch; `float32` is the export in float32, where this one has another precision."""

    what: str
    model: float
    export: float
    float32: float | None = None


@dataclass(frozen=True)
class Proof:
    precision: str
    agreements: tuple[Agreement, ...]
    timings: tuple[Timing, ...] = ()
    bytes: dict[str, int] = field(default_factory=dict)
    guesses: Guesses | None = None
    unreadable: tuple[str, ...] = ()

    def problems(self) -> list[str]:
        """Why it is not called done; empty if it is."""
        found = [problem for each in self.agreements if (problem := each.problem(self.precision))]
        if self.guesses is not None and self.guesses.after < self.guesses.before - _MOST_LOST:
            found.append(
                f"accuracy falls from {100 * self.guesses.before:.2f} to {100 * self.guesses.after:.2f} %, by more "
                f"than {100 * _MOST_LOST:g} point"
            )
        return found

    def is_slower(self) -> bool:
        """Whether the export takes longer than in float32, by more than a tenth, for most of what was timed."""
        compared = [each.export > 1.1 * each.float32 for each in self.timings if each.float32 is not None]
        return sum(compared) > len(compared) / 2

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        if self.guesses is not None:
            of_both = self.guesses.comparison
            values["guesses"]["comparison"] = {
                "difference": of_both.difference,
                "interval_95": list(of_both.interval),
                "mcnemar_p": of_both.p_value,
                "gained": len(of_both.gained),
                "lost": len(of_both.lost),
            }
        return values | {"problems": self.problems()}


# ---------------------------------------------------------------------------------------------------------------------
# On noise


@torch.no_grad()
def prove_on_noise(clip: CLIP, runner: Clip) -> list[Agreement]:
    """Random images in batches of 1, 7 and 32; random texts in the same, of 5 and 77 tokens."""
    found, R = [], clip.visual.input_resolution
    for batch in BATCHES if "image" in runner.facts["files"] else ():
        images = torch.randn(batch, 3, R, R, generator=torch.Generator().manual_seed(batch))
        what = f"random images in batches of {batch}"
        found.append(Agreement.of(what, *_both(clip.encode_image, runner, "image", images)))
    for length in LENGTHS if "text" in runner.facts["files"] else ():
        for batch in BATCHES:
            tokens = random_tokens(clip, batch, length, seed=batch)
            what = f"random texts of {tokens.shape[1]} tokens in batches of {batch}"
            found.append(Agreement.of(what, *_both(clip.encode_text, runner, "text", tokens)))
    return found


def _both(encode: Callable[[Tensor], Tensor], runner: Clip, tower: str, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    found = torch.from_numpy(np.array(runner.run(tower, x.numpy())))
    return tuple(F.normalize(each.double(), dim=-1).numpy() for each in (found, encode(x)))  # type: ignore[return-value]


@torch.no_grad()
def time_towers(clip: CLIP, runner: Clip, in_float32: Clip | None) -> list[Timing]:
    """The fastest of runs in turn, with as many threads each: what else the machine does only ever adds."""
    found = []
    for tower in runner.facts["files"]:
        for batch in _TIMED_BATCHES:
            R = clip.visual.input_resolution
            x = torch.randn(batch, 3, R, R) if tower == "image" else random_tokens(clip, batch, 16, seed=0)
            encode = clip.encode_image if tower == "image" else clip.encode_text
            runs: list[Callable[[], Any]] = [partial(encode, x)]
            runs += [partial(each.run, tower, x.numpy()) for each in (runner, in_float32) if each is not None]
            what = counted(batch, tower)
            found.append(Timing(what, *_fastest_ms(runs)))
    return found


def _fastest_ms(runs: Sequence[Callable[[], Any]]) -> list[float]:
    for run in runs:  # the first time prepares
        run()
    fastest, begin = [float("inf")] * len(runs), time.perf_counter()
    for done in range(_MOST_RUNS):
        if done >= _LEAST_RUNS and time.perf_counter() - begin > _ENOUGH_S:
            break
        for index, run in enumerate(runs):
            start = time.perf_counter()
            run()
            fastest[index] = min(fastest[index], 1000 * (time.perf_counter() - start))
    return fastest


# ---------------------------------------------------------------------------------------------------------------------
# On pictures


class _OpenedByRunner(EvaluationSet):
    """Pictures from their files on, as the runner reads them."""

    def decoded(self, stored: Image.Image | bytes, index: int) -> Image.Image:
        try:
            return stored if isinstance(stored, Image.Image) else open_picture(io.BytesIO(stored))
        except ValueError as error:
            raise ValueError(f"{self.key(index)}: {error}") from error


class RunnerPixels:
    """The runner's preprocessing, for processes that decode."""

    def __init__(self, folder: Path) -> None:
        self.runner = Clip(folder)

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(self.runner.pixels(image))


def runner_features(runner: Clip) -> Callable[[Tensor], Tensor]:
    """(B, 3, R, R) -> (B, E), by the runner."""
    return lambda images: torch.from_numpy(np.array(runner.run("image", images.numpy())))


def prove_on_pictures(
    model: Encoder,
    clip: CLIP,
    runner: Clip,
    data: EvaluationSet,
    *,
    batch_size: int,
    num_workers: int,
    progress: Progress,
) -> tuple[list[Agreement], Guesses | None, tuple[str, ...]]:
    """Both from the files on: each with its own preprocessing and, for images with labels, its own tokenizer.

    Returns:
        Agreements, first guesses if the images have a label each and the model reads texts, and what can't be read.
    """
    options: Any = {"batch_size": batch_size, "num_workers": num_workers}
    with progress(f"{data.name}: miniclip", len(data)) as advance:
        ours = encode_images(model.encode_image, model.preprocess, data, progress=advance, **options)
    with progress(f"{data.name}: export", len(data)) as advance:
        theirs = encode_images(
            runner_features(runner),
            RunnerPixels(runner.folder),
            _OpenedByRunner(data.name, data.images, keys=data.keys),
            progress=advance,
            **options,
        )
    if not np.array_equal(ours.indices, theirs.indices):
        raise ValueError(
            f"{data.name}: the export reads {len(theirs.indices)} pictures, and miniclip {len(ours.indices)}; of one "
            f"of them are: {some(sorted({*theirs.unreadable} ^ {*ours.unreadable}), 3)}"
        )
    found = [Agreement.of(f"the pictures of {data.name}", theirs.unit.numpy(), ours.unit.numpy())]
    if not (isinstance(data, LabelledImages) and runner.facts["text"]):
        return found, None, ours.unreadable
    expected = zero_shot_classifier(clip, data.classnames, data.templates, model.tokenize).numpy().T  # (C, E)
    templates: Any = data.templates
    classes = runner.class_features(data.classnames, templates)
    found.append(Agreement.of(f"the classes of {data.name}", classes, expected))
    return found, _guesses(data, ours, theirs, expected, classes), ours.unreadable


def _guesses(
    data: LabelledImages, ours: ImageFeatures, theirs: ImageFeatures, expected: np.ndarray, classes: np.ndarray
) -> Guesses:
    first = (ours.unit.numpy() @ expected.T).argmax(axis=1)
    second = (theirs.unit.numpy() @ classes.T).argmax(axis=1)
    labels, groups = np.array(data.labels)[ours.indices], np.array(data.groups)[ours.indices]
    comparison = compare(first == labels, second == labels, groups)
    accuracies = float((first == labels).mean()), float((second == labels).mean())
    return Guesses(len(labels), len(data.classnames), int((first != second).sum()), *accuracies, comparison)
