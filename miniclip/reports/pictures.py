"""The pictures of the evaluation's page: plots as SVG, thumbnails and galleries.

N images, C classes, K guesses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..common.files import atomic_write
from ..common.thumbnail import thumbnail
from ..common.wording import percent
from ..evaluation.measures.classification import Calibration, most_confused
from ..evaluation.none_of_these import Outside
from ..evaluation.probes import ShotCurve
from ..evaluation.retrieval import RetrievalScores
from ..evaluation.robustness import Robustness
from ..evaluation.suite import CLASSIFICATION, MULTILABEL, Result
from ..evaluation.zero_shot import MultilabelScores, Scores
from .page_parts import bare_axes, short_label, svg
from .results import intervals, metric_values
from .runs import Curves
from .tables import prompts_cell

_COLOURS = ("tab:blue", "tab:green", "tab:orange")


def plot_shots(curve: ShotCurve, title: str = "") -> Figure:
    """Accuracy over the images of each class, on a logarithmic axis; zero-shot is a star one step before the first."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
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
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_picture(path: str | Path, curve: ShotCurve, title: str = "") -> None:
    """As PNG, or as SVG if the name ends so."""
    kind = "svg" if Path(path).suffix == ".svg" else "png"
    with atomic_write(path) as file:
        plot_shots(curve, title).savefig(file, format=kind, dpi=150, bbox_inches="tight")


_THUMBNAIL_BOX = (112, 112)  # pixels
_GALLERY = 24  # images of a kind
_QUERIES = 8  # of retrieval, of a kind
_FOUND = 5  # shown of each
MOST_LABELS = 45  # classes that still have their name on an axis
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
    headlines = {
        CLASSIFICATION: {"acc1": "top-1"},
        MULTILABEL: {"mean_average_precision": "mAP"},
    }
    retrieval = {f"{name}_retrieval_recall@1": f"{name}s, R@1" for name in ("image", "text")}
    bars: dict[str, dict[str, tuple[float, tuple[float, float] | None]]] = {}
    are_models_many = len({result.model for result in results}) > 1
    prompts = {(prompts_cell(result)) for result in results} - {""}
    for result in results:
        parts = [result.model] if are_models_many or not prompts_cell(result) else []
        parts += [prompts_cell(result)] if len(prompts) > 1 and prompts_cell(result) else []
        for name, label in headlines.get(result.task, retrieval).items():
            group = bars.setdefault(f"{short_label(result.data.name)}\n{label}", {})
            group[", ".join(parts)] = metric_values(result)[name], intervals(result).get(name)
    num_bars = sum(map(len, bars.values()))
    if max(map(len, bars.values())) < 2 or num_bars > _MOST_BARS:
        return ""
    series = list(dict.fromkeys(name for group in bars.values() for name in group))
    figure, axes = bare_axes(6.5, 0.9 + 0.2 * num_bars + 0.15 * len(bars))
    place, ticks = 0.0, []
    for group in bars.values():
        ticks.append(place + (len(group) - 1) / 2)
        for name, (share, interval) in group.items():
            colour = f"C{series.index(name) % 10}"
            axes.barh(place, 100 * share, height=0.85, color=colour)
            if interval is not None:
                axes.plot([100 * end for end in interval], [place, place], color="black", linewidth=1.2)
            place += 1
        place += 0.8
    for name in series:
        axes.barh(0, 0, color=f"C{series.index(name) % 10}", label=short_label(name, 60))
    axes.set_yticks(ticks, bars)
    axes.invert_yaxis()
    axes.set(xlabel="%, with 95 % intervals", xlim=(0, 100))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.5 / figure.get_figheight()))
    return svg(figure)


def plot_confusion(confusion: np.ndarray, names: Sequence[str], chosen: np.ndarray | None = None) -> str:
    """Rows are shares of a true class; classes without images are left out of the rows.

    Args:
        chosen: the classes to draw; by default all.
    """
    totals = confusion.sum(axis=1)
    columns = np.arange(len(names)) if chosen is None else chosen
    rows = columns[totals[columns] > 0]
    counts = confusion[np.ix_(rows, columns)]
    shares = counts / totals[rows, None]
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


def most_mistaken(confusion: np.ndarray) -> np.ndarray:
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
    edges = np.histogram_bin_edges(np.concatenate([outside.inside, outside.outside]), 40)
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


# ---------------------------------------------------------------------------------------------------------------------
# Galleries


class Thumbnails:
    """Small pictures of images, each read once for all models and prompts."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], str] = {}

    def __call__(self, data: Any, number: int) -> str:
        key = id(data.images), int(number)
        if key not in self._made:
            self._made[key] = thumbnail(data.open(int(number)), _THUMBNAIL_BOX)
        return self._made[key]


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Some of them, evenly."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))]


def _picture(data: Any, number: int, thumbnail: Thumbnails) -> dict[str, Any]:
    return {"picture": thumbnail(data, number), "name": data.key(number).rpartition("/")[2]}


def classified(scores: Scores, thumbnail: Thumbnails) -> list[dict[str, Any]]:
    """Galleries of images that were wrong (the surest first, as they tell most), unsure, and right."""
    is_right, data = scores.is_right, scores.data
    surest_first = np.argsort(-scores.probabilities[:, 0], kind="stable")
    wrong = surest_first[~is_right[surest_first]]
    right = np.flatnonzero(is_right)
    unsure = np.zeros(0, dtype=np.int64)
    if scores.ranked.shape[1] > 1:
        margins = scores.cosines[:, 0] - scores.cosines[:, 1]
        unsure = np.argsort(margins, kind="stable")[: max(1, len(margins) // 4)]
    kinds = {
        "wrong": (f"Wrong, surest first ({min(_GALLERY, len(wrong))} of {len(wrong)})", wrong[:_GALLERY]),
        "unsure": ("Unsure: first and second guess closest together", unsure[:_GALLERY]),
        "right": (f"Right ({min(_GALLERY, len(right))} of {len(right)})", _spread(right, _GALLERY)),
    }
    galleries = []
    for kind, (title, rows) in kinds.items():
        figures = []
        for row in rows:
            guesses = [
                {
                    "name": data.classnames[c],
                    "value": percent(p),
                    "share": float(p),
                    "is_right": c == scores.labels[row],
                }
                for c, p in zip(scores.ranked[row, :3], scores.probabilities[row, :3], strict=True)
            ]
            label = data.classnames[scores.labels[row]]
            is_wrong = not is_right[row]
            figures.append(
                _picture(data, scores.numbers[row], thumbnail)
                | {"label": label, "guesses": guesses, "is_wrong": is_wrong}
            )
        galleries.append({"kind": kind, "title": title, "figures": figures})
    return galleries


def multilabelled(scores: MultilabelScores, thumbnail: Thumbnails) -> list[dict[str, Any]]:
    """Galleries of the images whose labels come latest among their guesses, and of some others."""
    data = scores.data
    order = np.argsort(-scores.cosines, axis=1, kind="stable")
    is_own = np.take_along_axis(scores.labels, order, axis=1)
    places = np.arange(1, is_own.shape[1] + 1)
    num_own = is_own.sum(axis=1)
    # Of each image, the precision at its labels; without labels there is nothing to find.
    precision = (is_own * is_own.cumsum(axis=1) / places).sum(axis=1) / np.maximum(num_own, 1)
    worst = np.argsort(np.where(num_own > 0, precision, np.inf), kind="stable")
    worst = worst[(num_own > 0)[worst] & (precision < 1)[worst]][: _GALLERY // 2]
    others = _spread(np.setdiff1d(np.arange(len(precision)), worst), _GALLERY // 2)
    galleries = []
    for kind, title, rows in (("wrong", "Labels found last", worst), ("right", "Others", others)):
        figures = []
        for row in rows:
            top = order[row, : min(6, max(3, num_own[row]))]
            most = max(float(scores.cosines[row, top[0]]), 1e-9)
            guesses = [
                {
                    "name": data.classnames[c],
                    "value": f"{cosine:.3f}",
                    "share": min(max(float(cosine) / most, 0), 1),
                    "is_right": scores.labels[row, c],
                }
                for c, cosine in ((c, scores.cosines[row, c]) for c in top)
            ]
            own = [data.classnames[c] for c in np.flatnonzero(scores.labels[row])]
            figures.append(
                _picture(data, scores.numbers[row], thumbnail)
                | {"label": ", ".join(own) or "none of them", "guesses": guesses, "is_wrong": kind == "wrong"}
            )
        galleries.append({"kind": kind, "title": title, "figures": figures})
    return galleries


def retrieved(scores: RetrievalScores, thumbnail: Thumbnails) -> list[dict[str, Any]]:
    """For captions the images found first, and for images the captions: where it failed most, then where it did not."""
    data, owner, numbers = scores.data, scores.image_of_text, scores.images.numbers
    images, texts = scores.images.unit, scores.texts

    def found(similar: np.ndarray, is_own: np.ndarray) -> np.ndarray:
        """The first, a tie counting against its own; and its own best, if it is not among them."""
        order = np.lexsort((is_own, -similar))
        first = order[:_FOUND]
        return first if is_own[first].any() else np.append(first, order[is_own[order]][0])

    parts = []
    for what, ranking in (("image", scores.metrics.images), ("text", scores.metrics.texts)):
        worst = np.argsort(-ranking.ranks, kind="stable")
        worst = worst[ranking.ranks[worst] > 1][:_QUERIES]
        best = _spread(np.flatnonzero(ranking.ranks == 1), _QUERIES // 2)
        queries = []
        for place in (*worst, *best):
            query = int(ranking.queries[place])
            if what == "image":
                similar, is_own = (images @ texts[query]).numpy(), np.arange(len(images)) == owner[query]
                candidates = [
                    _picture(data, numbers[row], thumbnail) | {"is_own": bool(is_own[row])}
                    for row in found(similar, is_own)
                ]
                asked: dict[str, Any] = {"text": scores.captions[query]}
            else:
                similar, is_own = (texts @ images[query]).numpy(), owner == query
                candidates = [
                    {"text": scores.captions[row], "is_own": bool(is_own[row])} for row in found(similar, is_own)
                ]
                asked = _picture(data, numbers[query], thumbnail)
            rank = int(ranking.ranks[place])
            queries.append(asked | {"rank": rank, "found": candidates, "is_cut": len(candidates) > _FOUND})
        title = "Images found by captions" if what == "image" else "Captions found by images"
        parts.append({"kind": what, "title": f"{title}, worst first", "queries": queries})
    return parts
