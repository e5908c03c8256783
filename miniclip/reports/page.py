"""Results -> one HTML page that opens from disk without a network."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context

from ..common.files import write_text
from ..common.wording import percent, some
from ..data.reading.scan import summary
from ..evaluation.measures.classification import Confusion
from ..evaluation.prompts import Prompts
from ..evaluation.robustness import Robustness
from ..evaluation.suite import Result
from .galleries import Heat, HeatOf, Thumbnails, galleries, queries
from .page_parts import page_template, svg
from .pictures import (
    MOST_DRAWN,
    MOST_LABELS,
    most_mistaken,
    plot_calibration,
    plot_confusion,
    plot_outside,
    plot_robustness,
    plot_scores,
    plot_shots,
    plot_training,
)
from .results import versions
from .runs import read_curves
from .tables import NO_VALUE, probe_grid, prompts_cell, robustness_grid, score_grids, score_rows, subgroup_grid

_MOST_OPEN = 4  # results; of more, the page opens their sections when asked to


# ---------------------------------------------------------------------------------------------------------------------
# The page


def _section(
    result: Result, heading: str, is_short: bool, thumbnails: Thumbnails, heat_of: HeatOf | None
) -> dict[str, Any]:
    """What the page shows of a result.

    Args:
        is_short: another section shows the same images with other prompts, in full.
        heat_of: see `galleries`.
    """
    scores, data = result.scores, result.data
    confusion, calibration = scores.confusion, scores.calibration
    section: dict[str, Any] = {
        "heading": heading,
        "is_short": is_short,
        "scores": _section_scores(result),
        "num_images": scores.num_images,
        "seconds": result.seconds,
        "unreadable": () if is_short else scores.unreadable,
        "left_out": "" if is_short else summary(data.left_out),
        "classnames": scores.classnames,
        "classnames_from": getattr(data, "classnames_from", ""),
        "templates": _examples(scores.prompts),
        "templates_from": getattr(data, "templates_from", ""),
        "same_prompts": scores.same_prompts,
        "confused": scores.confused_pairs(),
    }
    if is_short:
        return section
    return section | {
        "confusions": [] if confusion is None else _confusions(confusion, scores.classnames),
        "bars_title": scores.bars_title,
        "bars": scores.bars(),
        "galleries": galleries(scores, thumbnails, heat_of),
        "gallery_note": scores.gallery_note,
        "has_heat": heat_of is not None,
        "queries": queries(scores, thumbnails),
        "calibration": calibration
        and {
            "picture": plot_calibration(calibration),
            "error": calibration.error,
            "confidence": _mean(calibration.confidence, calibration.images),
            "accuracy": _mean(calibration.accuracy, calibration.images),
        },
        "subgroups": {column: subgroup_grid(result, column) for column in result.subgroups},
        "outside": result.outside
        and {
            "picture": plot_outside(result.outside, data.name),
            "sentence": str(result.outside.acceptance),
            "separation": result.outside.separation,
            "name": result.outside.name,
        },
        "probes": result.probes
        and {
            "picture": svg(plot_shots(result.probes.curve)),
            "grid": probe_grid([result]),
            "train": result.probes.train,
        },
    }


def _confusions(confusion: Confusion, names: tuple[str, ...]) -> list[tuple[str, str]]:
    """All classes, as long as each has a pixel; of many classes also those that are mistaken most often."""
    found = [("", plot_confusion(confusion, names))] if len(names) <= MOST_DRAWN else []
    if len(names) > MOST_LABELS and len(chosen := most_mistaken(confusion)):
        title = f"Of all, the {len(chosen)} classes most often mistaken for each other:"
        found.append((title, plot_confusion(confusion, names, chosen)))
    return found


def _mean(of_bins: np.ndarray, images: np.ndarray) -> float:
    return float(np.nansum(of_bins * images) / images.sum())


def _section_scores(result: Result) -> str:
    """In words, for the line below the heading."""
    lines = []
    for row in score_rows(result):
        parts: list[str] = []
        for name, cell in row.items():
            if name == "95 % interval":
                parts[-1] += f" ({cell})"
            elif (name.endswith(" %") or name == "median rank") and cell != NO_VALUE:
                parts.append(f"{name.removesuffix(' %')} {cell}")
        lines.append((f"{row['find']}: " if "find" in row else "") + ", ".join(parts))
    return "; ".join(lines)


def _examples(prompts: Prompts) -> tuple[str, ...]:
    """The templates; of prompts by class each with its class."""
    if not isinstance(prompts, Mapping):
        return tuple(map(str, prompts))
    return tuple(f"{name}: {prompt}" for name, each in prompts.items() for prompt in each)


def write_html(
    path: str | Path,
    results: Sequence[Result],
    robustness: Robustness | None = None,
    heat_of: Callable[[str, Any, int, str], Heat] | None = None,
) -> None:
    """One self-contained page: scores, training curves, and for each result what was right and wrong, and why.

    Of further sets of prompts for the same images there are scores alone.

    Args:
        heat_of: from a model's name, a data set, the index of an image and the name of a class to a map, for images
            that were wrong.

    Raises:
        ValueError: an image of a gallery can't be read any more.
    """
    models = list(dict.fromkeys(result.model for result in results))
    sets = list(dict.fromkeys(result.data.name for result in results))
    title = models[0] if len(models) == 1 else f"{len(models)} models on {some(sets, 3)}"
    thumbnails, sections = Thumbnails(), []
    seen: set[tuple[str, str]] = set()
    with rc_context({"text.parse_math": False}):  # a $ in a name is a $
        for result in results:
            asked = result.model, result.data.name
            parts = [result.data.name, *([result.model] if len(models) > 1 else [])]
            if sum(asked == (other.model, other.data.name) for other in results) > 1:
                parts.append(f"prompts {prompts_cell(result)}")
            heat = partial(heat_of, result.model) if heat_of else None
            sections.append(_section(result, ", ".join(parts), asked in seen, thumbnails, heat))
            seen.add(asked)
        page = page_template("report.html", percent=percent).render(
            title=title,
            models=models,
            libraries=dict.fromkeys((result.model, result.library) for result in results if result.library),
            created=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
            seconds=sum(result.seconds for result in results),
            versions=versions(),
            summary=score_grids(results, [f"data-{number}" for number in range(1, len(results) + 1)]),
            comparison=plot_scores(results),
            training=plot_training(read_curves(models[0])) if len(models) == 1 else [],
            sections=sections,
            is_open=len(results) <= _MOST_OPEN,
            robustness=robustness and {"grid": robustness_grid(robustness), "pictures": plot_robustness(robustness)},
        )
    write_text(path, page)
