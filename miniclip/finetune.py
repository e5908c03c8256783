"""After fine-tuning: weights between the start and the end (WiSE-FT, Wortsman et al. 2021,
https://arxiv.org/abs/2109.01903).

A model that was fine-tuned on one task has forgotten some of the others. The straight line between its weights and
those that it started from passes through models that are good at both, often better at the new task than its end. Any
of them costs what one model costs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

from . import weights
from .config import differences
from .datasets import LabelledImages
from .evaluate import zero_shot_scores
from .files import atomic_write, write_text
from .model import CLIP
from .report import percent


def interpolate(start: CLIP, finetuned: CLIP, alpha: float) -> CLIP:
    """A new model of the weights (1 - alpha) * start + alpha * finetuned.

    Args:
        alpha: 0 gives the start, 1 the fine-tuned model, both bit for bit.

    Raises:
        ValueError: two architectures (names what differs), or alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must be from 0, the start, to 1, the fine-tuned model")
    if start.config != finetuned.config:
        lines = differences(
            start.config.to_dict(), finetuned.config.to_dict(), "config", ("the start has", "the fine-tuned model")
        )
        raise ValueError("only models of one architecture can be interpolated, and these differ:\n" + "\n".join(lines))
    model = copy.deepcopy(finetuned)
    ends = start.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():  # batch norm's counts are no weights
                tensor.copy_(torch.lerp(ends[name].to(tensor), tensor, alpha))
    return model


@dataclass(frozen=True)
class Point:
    """One model on the way: its top-1 on each new task, and on each old one, as shares of 1."""

    alpha: float
    new: tuple[float, ...]
    old: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the new tasks' mean and the old tasks' mean."""
        return (sum(self.new) / len(self.new) + sum(self.old) / len(self.old)) / 2


def sweep(
    start: CLIP,
    finetuned: CLIP,
    new: Sequence[LabelledImages],
    old: Sequence[LabelledImages],
    alphas: Sequence[float],
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> list[Point]:
    """Zero-shot scores of the models at `alphas`, in rising order and with both ends.

    Raises:
        ValueError: as `interpolate` and `zero_shot_scores`.
    """
    preprocess = weights.preprocess_for(start.config)
    points: list[Point] = []
    for alpha in sorted({0.0, 1.0, *alphas}):
        model = interpolate(start, finetuned, alpha).eval()
        accuracies = []
        for data in (*new, *old):
            scores = zero_shot_scores(model, preprocess, data, batch_size=batch_size, num_workers=num_workers)
            accuracies.append(float((scores.ranked[:, 0] == scores.labels).mean()))
        points.append(Point(alpha, tuple(accuracies[: len(new)]), tuple(accuracies[len(new) :])))
        if progress:
            progress(len(points))
    return points


def best(points: Sequence[Point], may_lose: float | None = None) -> Point:
    """Of the highest mean of new and old; of equals the one nearest to the start, which changes least.

    Args:
        may_lose: instead, the highest on the new tasks of those whose mean on the old ones is at most this much (a
            share of 1) below the start's.
    """
    if may_lose is None:
        return max(points, key=lambda point: (point.mean, -point.alpha))
    (start,) = (point for point in points if point.alpha == 0)
    # What rounding does to a mean is no loss.
    allowed = [point for point in points if sum(point.old) >= sum(start.old) - len(start.old) * (may_lose + 1e-9)]
    return max(allowed, key=lambda point: (sum(point.new), -point.alpha))


def table(points: Sequence[Point], new: Sequence[str], old: Sequence[str], chosen: float) -> Table:
    out = Table(title="weights between start (alpha 0) and fine-tuned (alpha 1): zero-shot top-1 %")
    for column in ("alpha", *(f"new: {name}" for name in new), *(f"old: {name}" for name in old), "mean", ""):
        out.add_column(column, justify="right")
    for point in points:
        note = "saved" if point.alpha == chosen else ""
        shares = map(percent, (*point.new, *point.old, point.mean))
        out.add_row(f"{point.alpha:g}", *shares, note)
    return out


def write_picture(path: Path, points: Sequence[Point], new: str, old: str, chosen: float) -> None:
    """Accuracy on the new tasks over that on the old ones, a dot for each model (as the paper's figure 1)."""
    figure = Figure(figsize=(5, 4))
    axes = figure.subplots()
    x = [100 * sum(point.old) / len(point.old) for point in points]
    y = [100 * sum(point.new) / len(point.new) for point in points]
    axes.plot(x, y, "-o", color="tab:blue", markersize=4)
    for point, a, b in zip(points, x, y, strict=True):
        is_chosen = point.alpha == chosen
        if is_chosen:
            axes.plot([a], [b], "o", color="tab:orange", markersize=9, label=f"saved, α = {chosen:g}")
        if is_chosen or point.alpha in (0, 1):
            axes.annotate(f"α = {point.alpha:g}", (a, b), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set(xlabel=f"{old}, top-1 %", ylabel=f"{new}, top-1 %")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight")


def write_json(
    path: Path, start: str, finetuned: str, points: Sequence[Point], new: Any, old: Any, alpha: float
) -> None:
    values = {
        "schema": 1,
        "start": start,
        "finetuned": finetuned,
        "saved_alpha": alpha,
        "points": [
            {
                "alpha": point.alpha,
                "new": dict(zip(new, point.new, strict=True)),
                "old": dict(zip(old, point.old, strict=True)),
                "mean": point.mean,
            }
            for point in points
        ],
    }
    write_text(path, json.dumps(values, indent=2) + "\n")
