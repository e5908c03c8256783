"""The plots of the evaluation's page, as SVG.

N images, C classes, K guesses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..common.files import atomic_write
from ..evaluation.measures.classification import Calibration, Confusion, most_confused
from ..evaluation.none_of_these import Outside
from ..evaluation.probes import ShotCurve
from ..evaluation.robustness import Robustness
from ..evaluation.suite import Result
from .page_parts import bare_axes, short_label, svg
from .runs import Curves
from .tables import prompts_cell

_COLOURS = ("tab:blue", "tab:green", "tab:orange")


def plot_shots(curve: ShotCurve, title: str = "") -> Figure:
    """Accuracy over the images of each class, on a logarithmic axis; zero-shot is a star one step before the first."""
    figure, axes = bare_axes(6, 4)
    x = np.log2(curve.shots)
    zero = x[0] - 1
    axes.axhline(100 * curve.zero_shot, color="grey", linestyle=":", linewidth=1)
    axes.plot([zero], [100 * curve.zero_shot], "*", color="black", markersize=14, label="zero-shot", zorder=3)
    for method, colour in zip(curve.accuracies, _COLOURS, strict=True):
        mean, spread = 100 * curve.mean(method), 100 * np.nan_to_num(curve.spread(method))
        axes.plot(x, mean, "-o", color=colour, markersize=4, label=f"{method}: {curve.verdict(method)}")
        axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
    axes.set_xticks([zero, *x], ["0", *map(str, curve.shots)])
    axes.set(xlabel="training images of each class", ylabel="test top-1 %")
    if title:
        axes.set_title(title, fontsize=10, parse_math=False)
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def write_picture(path: str | Path, curve: ShotCurve, title: str = "") -> None:
    """As PNG, or as SVG if the name ends so."""
    kind = "svg" if Path(path).suffix == ".svg" else "png"
    with atomic_write(path) as file:
        plot_shots(curve, title).savefig(file, format=kind, dpi=150, bbox_inches="tight")


MOST_LABELS = 45  # classes that still have their name on an axis
MOST_DRAWN = 1000  # classes that still have a pixel each in a picture of all
_MOST_MISTAKEN = 30  # of more classes, those drawn large
_MOST_BARS = 120


def plot_training(curves: Curves) -> list[str]:
    """Two pictures, the losses and the shares; none for a model without a run."""
    if "train/loss" not in curves:
        return []
    losses = {"train/loss": "training", "val/loss": "held-out pairs, all at once"}
    shares = {
        "train/accuracy": "in-batch accuracy",
        "val/retrieval_r1": "held-out retrieval, R@1",
        "val/zero_shot_acc1": "held-out zero-shot, top-1",
    }
    pictures = []
    for names, factor, label in ((losses, 1, "contrastive loss"), (shares, 100, "%")):
        if not names.keys() & curves.keys():
            continue
        figure, axes = bare_axes(4.6, 3)
        for name in (name for name in names if name in curves):
            steps, values = zip(*curves[name], strict=True)
            axes.plot(steps, [factor * value for value in values], label=names[name])
        if names is losses and "train/chance" in curves:
            chance = curves["train/chance"][-1][1]
            axes.axhline(chance, color="grey", linestyle=":", label=f"chance, ln(batch) = {chance:.2f}")
        axes.set(xlabel="step", ylabel=label, ylim=(0, None if names is losses else 101))
        axes.legend(frameon=False, fontsize=8)
        pictures.append(svg(figure))
    return pictures


def plot_scores(results: Sequence[Result]) -> str:
    """Bars of several models or sets of prompts, by data set; nothing for one of each, or for too many."""
    bars: dict[str, dict[str, tuple[float, tuple[float, float] | None]]] = {}
    are_models_many = len({result.model for result in results}) > 1
    prompts = {(prompts_cell(result)) for result in results} - {""}
    for result in results:
        parts = [result.model] if are_models_many or not prompts_cell(result) else []
        parts += [prompts_cell(result)] if len(prompts) > 1 and prompts_cell(result) else []
        values, intervals = result.scores.values(), result.scores.intervals()
        for name, label in result.scores.headlines.items():
            group = bars.setdefault(f"{short_label(result.data.name)}\n{label}", {})
            group[", ".join(parts)] = values[name], intervals.get(name)
    num_bars = sum(map(len, bars.values()))
    if max(map(len, bars.values())) < 2 or num_bars > _MOST_BARS:
        return ""
    series = list(dict.fromkeys(name for group in bars.values() for name in group))
    figure, axes = bare_axes(6.5, 0.9 + 0.2 * num_bars + 0.15 * len(bars))
    y, ticks = 0.0, []
    for group in bars.values():
        ticks.append(y + (len(group) - 1) / 2)
        for name, (share, interval) in group.items():
            colour = f"C{series.index(name) % 10}"
            axes.barh(y, 100 * share, height=0.85, color=colour)
            if interval is not None:
                axes.plot([100 * end for end in interval], [y, y], color="black", linewidth=1.2)
            y += 1
        y += 0.8
    for name in series:
        axes.barh(0, 0, color=f"C{series.index(name) % 10}", label=short_label(name, 60))
    axes.set_yticks(ticks, bars)
    axes.invert_yaxis()
    axes.set(xlabel="%, with 95 % intervals", xlim=(0, 100))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.5 / figure.get_figheight()))
    return svg(figure)


def plot_confusion(confusion: Confusion, names: Sequence[str], chosen: np.ndarray | None = None) -> str:
    """Rows are shares of a true class; classes without images are left out of the rows.

    Args:
        chosen: the classes to draw; by default all.
    """
    columns = np.arange(len(names)) if chosen is None else chosen
    has_images = confusion.images[columns] > 0
    rows, counts = columns[has_images], confusion.matrix(columns)[has_images]
    shares = counts / confusion.images[rows, None]
    side = min(9.0, 2.4 + 0.22 * len(columns))
    figure = Figure(figsize=(side + 0.8, max(2.0, 0.9 + (side - 0.9) * len(rows) / len(columns))))
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="share of the true class", fraction=0.04)
    axes.set(xlabel="guess", ylabel="true class", xticks=[], yticks=[])
    size = 8 if len(columns) <= 20 else 6
    if len(columns) <= MOST_LABELS:
        axes.set_xticks(
            range(len(columns)), [short_label(names[c]) for c in columns.tolist()], rotation=90, fontsize=size
        )
    if len(rows) <= MOST_LABELS:
        axes.set_yticks(range(len(rows)), [short_label(names[c]) for c in rows.tolist()], fontsize=size)
    if len(columns) <= _MOST_MISTAKEN:
        for (i, j), share in np.ndenumerate(shares):
            if share:
                colour, text_size = "white" if share > 0.5 else "black", 7 if len(columns) <= 20 else 5
                axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=text_size, color=colour)
    return svg(figure)


def most_mistaken(confusion: Confusion) -> np.ndarray:
    """Some classes, in their order: those of the most frequent mistakes."""
    chosen: dict[int, None] = {}
    for row, column, _ in most_confused(confusion, _MOST_MISTAKEN**2):
        if len(chosen.keys() | {row, column}) > _MOST_MISTAKEN:
            break
        chosen |= {row: None, column: None}
    return np.array(sorted(chosen), dtype=np.int64)


def plot_calibration(found: Calibration) -> str:
    figure = Figure(figsize=(4.6, 4.2))
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    left, widths = 100 * found.edges[:-1], 100 * np.diff(found.edges)
    has = found.images > 0
    axes.bar(left[has], 100 * found.accuracy[has], widths[has], align="edge", edgecolor="white", color="tab:blue")
    axes.plot(
        100 * found.confidence[has], 100 * found.accuracy[has], "o", color="black", markersize=3, label="means of bins"
    )
    axes.plot([0, 100], [0, 100], color="grey", linestyle=":", label="as it should be")
    axes.set(ylabel="right, %", xlim=(0, 100), ylim=(0, 100))
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    below.bar(left, found.images, widths, align="edge", edgecolor="white", color="tab:grey")
    below.set(xlabel="probability of the first guess, %", ylabel="images")
    for each in (axes, below):
        each.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def plot_outside(outside: Outside, name: str) -> str:
    figure, axes = bare_axes(4.6, 3)
    both = np.concatenate([outside.inside, outside.outside]).astype(float)
    edges = np.linspace(both.min() - 1e-6, both.max() + 1e-6, 41)  # they may all be the same
    for cosines, label in ((outside.inside, name), (outside.outside, f"{outside.name}, none of the classes")):
        weights = np.full(len(cosines), 100 / len(cosines))
        axes.hist(cosines, edges, weights=weights, alpha=0.55, label=f"{short_label(label, 44)} ({len(cosines)})")
    cosine = outside.acceptance.threshold.cosine
    axes.axvline(cosine, color="black", linestyle="--", linewidth=1, label=f"accepted from {cosine:.3f}")
    axes.set(xlabel="best cosine of an image with any class", ylabel="% of the images")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return svg(figure)


def plot_robustness(found: Robustness) -> list[str]:
    """For each shifted set, its top-1 against the standard set's, with the line of the baselines."""
    pictures = []
    for number, (name, fit) in enumerate(zip(found.shifted, found.fits, strict=True)):
        figure, axes = bare_axes(3.6, 3.4)
        axes.plot([0, 100], [0, 100], color="grey", linestyle=":", linewidth=1, label="no loss")
        if fit is not None:
            x = np.linspace(0.001, 0.999, 200)
            axes.plot(100 * x, 100 * fit.expected(x), color="tab:grey", linewidth=1, label="baselines' line")
        for row in found.rows:
            point = 100 * row.standard, 100 * row.shifted[number]
            axes.plot(*point, "o", color="tab:grey" if row.is_baseline else "tab:blue", markersize=5)
            if len(found.rows) <= 12:
                axes.annotate(short_label(row.model, 24), point, (4, -8), textcoords="offset points", fontsize=7)
        axes.set(xlabel=f"{short_label(found.standard)}, top-1 %", ylabel=f"{short_label(name)}, top-1 %")
        shares = [share for row in found.rows for share in (row.standard, row.shifted[number])]
        limits = max(0, 100 * min(shares) - 10), min(100, 100 * max(shares) + 10)
        axes.set(xlim=limits, ylim=limits)
        axes.legend(frameon=False, fontsize=7, loc="upper left")
        pictures.append(svg(figure))
    return pictures
