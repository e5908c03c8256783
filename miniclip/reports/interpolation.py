"""Scores of the models between a fine-tuned one and its start: a table, a picture, JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..common.files import atomic_write, write_text
from ..common.wording import percent, printable
from ..evaluation.interpolation import Point
from .page_parts import bare_axes

RECORD_FILE, PICTURE_FILE = "interpolation.json", "interpolation.png"


def table(points: Sequence[Point], new: Sequence[str], old: Sequence[str], chosen: float) -> Table:
    out = Table(title="weights between start (alpha 0) and fine-tuned (alpha 1): zero-shot top-1 %")
    for column in ("alpha", *(f"new: {name}" for name in new), *(f"old: {name}" for name in old), "mean", ""):
        out.add_column(escape(printable(column)), justify="right")
    for point in points:
        note = "saved" if point.alpha == chosen else ""
        shares = map(percent, (*point.new, *point.old, point.mean))
        out.add_row(f"{point.alpha:g}", *shares, note)
    return out


def told_of_losses(point: Point, old: Sequence[str], may_lose: float | None) -> list[str]:
    """A line for each old task, and one if its images do not show that at most `may_lose`, a share, is lost."""
    if not point.losses:
        return []
    lines = [
        f"{printable(name)}: {100 * loss.share:.1f} points lost with alpha {point.alpha:g}, of {loss.num_images:,} "
        f"images (now wrong: {loss.num_lost:,}, now right: {loss.num_gained:,}); up to {100 * loss.most:.1f} on others "
        "like them (95 %)"
        for name, loss in zip(old, point.losses, strict=True)
    ]
    if may_lose is not None and point.most_lost > may_lose:
        lines.append(
            f"that at most {100 * may_lose:g} may be lost holds on these images and is not shown for others: up to "
            f"{100 * point.most_lost:.1f} may be; retain more images, which have chosen nothing before"
        )
    return lines


def write_picture(path: Path, points: Sequence[Point], new: str, old: str, chosen: float) -> None:
    """Accuracy on the new tasks over that on the old ones, a dot for each model (as the paper's figure 1)."""
    figure, axes = bare_axes(5, 4)
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
                "losses": dict(zip(old, (loss._asdict() for loss in point.losses), strict=True)) if point.alpha else {},
            }
            for point in points
        ],
    }
    write_text(path, json.dumps(values, indent=2) + "\n")
