"""A model, images of its classes and images of none of them -> the threshold that travels with the model."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from ..common.version import __version__
from ..evaluation.datasets.sets import EvaluationSet, LabelledImages
from ..evaluation.encoder import Encoder
from ..evaluation.features import FeatureCache
from ..evaluation.measures.conformal import least_groups
from ..evaluation.prompts import suited
from ..evaluation.suite import Progress, Result, Task, evaluate
from .thresholds import CalibratedModel, ModelThreshold, Tried, plain_templates, refuse_class_called_none


def calibrate(
    model: Encoder,
    data: LabelledImages,
    outside: EvaluationSet,
    *,
    false_acceptance: float = 0.05,
    coverages: Sequence[float] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    cache: FeatureCache | None = None,
    progress: Progress | None = None,
) -> tuple[ModelThreshold, Result]:
    """A threshold chosen on one half of the images and tried on the other, with all scores of the model on `data`.

    Args:
        data: images of the classes, with the names and prompts that the model will be used with.
        outside: images of none of them, of the kind that will be met.
        false_acceptance: the share of fresh images of that kind to accept at most.
        coverages: of sets of classes; by default 0.9, 0.95 and 0.99 as far as there are enough images.

    Raises:
        ValueError: a class called "none of these", or too few independent images for a promise, before any is read; or
            as `evaluate`.
    """
    if not 0 < false_acceptance < 1:
        raise ValueError(f"a false acceptance of {false_acceptance:g}; it is a share between 0 and 1, such as 0.05")
    refuse_class_called_none(data.classnames)
    refuse_too_few(outside, 1 - false_acceptance, f"a false acceptance of {false_acceptance:g}")
    for coverage in coverages or ():
        refuse_too_few(data, coverage, f"a coverage of {coverage:g}")
    (result,) = evaluate(
        model,
        Task(
            suited(data, model.wordings),
            outside=outside,
            false_acceptance=false_acceptance,
            coverages=None if coverages is None else tuple(sorted(set(coverages))),
        ),
        batch_size=batch_size,
        num_workers=num_workers,
        cache=cache,
        progress=progress,
    )
    return threshold_of(result, model), result


def refuse_too_few(data: Any, coverage: float, what: str) -> None:
    """Raises ValueError if half of a data set is too small for a promise that holds with a chance of `coverage`."""
    if coverage == 1:
        raise ValueError(f"{what} would need infinitely many images; a small share above 0 can be promised")
    groups = getattr(data, "groups", None)
    count = len(data) if groups is None else len(set(groups))
    if count // 2 < (needed := least_groups(coverage)):
        kind = "images" if count == len(data) else "groups of images"
        raise ValueError(
            f"{what} needs {2 * needed} independent images, half to choose by and half to try on; {data.name} has "
            f"{count} {kind}"
        )


def threshold_of(result: Result, model: Encoder) -> ModelThreshold:
    """What is to travel with `model`, of its result on images of the classes and of none.

    Raises:
        ValueError: too few images of none could be read for the false acceptance that was asked for.
    """
    outside = result.outside
    assert outside is not None
    if not outside.is_promised:
        raise ValueError(
            f"{outside.name} has too few independent images ({len(outside.unreadable)} can't be read) for a false "
            f"acceptance of {outside.false_acceptance:g}; no threshold is saved"
        )
    data, found = result.data, outside.acceptance
    chosen = found.threshold
    return ModelThreshold(
        chosen.cosine,
        chosen.rule,
        false_acceptance=outside.false_acceptance,
        inside=Tried(data.name, chosen.num_inside, found.num_inside, found.accepted_inside, found.interval_inside),
        outside=Tried(
            outside.name, chosen.num_outside, found.num_outside, found.accepted_outside, found.interval_outside
        ),
        classnames=tuple(data.classnames),
        templates=plain_templates(data.classnames, data.templates),
        coverages=outside.coverages,
        model=CalibratedModel.of(model),
        upright=data.upright,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by miniclip {__version__}",
    )
