"""Results -> tables in the terminal, and one HTML page that opens from disk without a network.

Both are made of the same `Grid`s. Shares are of 1, printed in %.

N images, C classes, K guesses.
"""

from __future__ import annotations

import base64
import csv
import datetime
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

from .evaluate import Metrics, MultilabelScores, Outside, RetrievalScores, Scores
from .files import write_text
from .metrics import Calibration, Multilabel, Ranking, Subgroups, most_confused
from .probes import METHODS, plot_shots
from .prompts import ASSETS, Prompts
from .results import Change, Robustness, confused_pairs, intervals, metric_values, prompts_label, versions
from .suite import CLASSIFICATION, MULTILABEL, Result

_THUMBNAIL = 112  # pixels
_GALLERY = 24  # images of a kind
_QUERIES = 8  # of retrieval, of a kind
_FOUND = 5  # shown of each
_MOST_LABELS = 45  # classes that still have their name on an axis
_MOST_MISTAKEN = 30  # of more classes, those drawn large
_MOST_SUBGROUPS = 30
_MOST_BARS = 120
_MOST_OPEN = 4  # results; of more, the page opens their sections when asked to
_SIGNIFICANT = 0.05
_NONE = "–"
_TEXTS = (
    "data", "model", "prompts", "find", "value", "images of none", "learnt from", "method", "chosen", "remark",
    "metric", "change", "class", "images gained", "images lost",
)  # fmt: skip  # columns of words, which may be broken anywhere


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(ends: tuple[float, float]) -> str:
    return f"{percent(ends[0])} – {percent(ends[1])}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def wordings(prompts: Prompts) -> tuple[str, ...]:
    """The templates as texts; of prompts by class those of all classes, one after the other."""
    if isinstance(prompts, Mapping):
        return tuple(prompt for each in prompts.values() for prompt in each)
    return tuple(map(str, prompts))


def _num_prompts(prompts: Prompts) -> str:
    """For each class."""
    counts = sorted({len(each) for each in prompts.values()} if isinstance(prompts, Mapping) else {len(prompts)})
    return " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]]))


def _prompts(result: Result) -> str:
    """Their name, and how many there are for each class; nothing for retrieval."""
    if isinstance(result.scores, RetrievalScores):
        return ""
    label, count = prompts_label(result), _num_prompts(result.data.templates)
    return f"{label} ({count})" if label else count


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@dataclass(frozen=True)
class Grid:
    """A table of texts, for the terminal and for the page.

    Args:
        rows: a cell for each column.
        main: the column to look at first.
        notes: sentences below it.
        links: a place on the page for each row, or none.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    main: str = ""
    notes: tuple[str, ...] = ()
    links: tuple[str, ...] = ()

    def is_text(self, column: str) -> bool:
        return column in _TEXTS


def _grid(
    title: str,
    rows: Sequence[Mapping[str, str]],
    shared: Sequence[str] = (),
    *,
    main: str = "",
    notes: Sequence[str] = (),
    links: Sequence[str] = (),
) -> Grid:
    """
    Args:
        rows: cells by column. What no row has is left out.
        shared: columns that go into the title if they are the same in all rows.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in shared:
        if name in columns and len(values := {row.get(name, "") for row in rows}) == 1:
            columns.remove(name)
            (value,) = values
            title += f", {name + ' ' if name in ('prompts', 'learnt from') else ''}{value}" if value else ""
    columns = [name for name in columns if any(row.get(name, "") not in ("", _NONE) for row in rows)]
    cells = tuple(tuple(row.get(name, _NONE) for name in columns) for row in rows)
    return Grid(title, tuple(columns), cells, main, tuple(notes), tuple(links))


def _printable(grid: Grid) -> Table:
    out = Table(title=escape(grid.title), caption=escape(" ".join(grid.notes)) or None, caption_justify="left")
    for number, name in enumerate(grid.columns):
        # On a narrow terminal numbers stay whole, and names are broken.
        words = [word for text in (name, *(row[number] for row in grid.rows)) for word in text.split()]
        is_text = grid.is_text(name)
        out.add_column(
            escape(name),
            justify="left" if is_text else "right",
            style="bold" if name == grid.main else "",
            overflow="fold",
            min_width=None if is_text else max(map(cell_len, words), default=None),
        )
    for row in grid.rows:
        out.add_row(*map(escape, row))
    return out


def tables(results: Sequence[Result], robustness: Robustness | None = None) -> list[Table]:
    """Of each task one, then those of subgroups, of images of no class, of probes, and of shifted sets."""
    grids = _score_grids(results)
    for result in results:
        grids += [_subgroup_grid(result, column) for column in result.subgroups]
    if outside := [result for result in results if result.outside is not None]:
        grids.append(_outside_grid(outside))
    if probed := [result for result in results if result.probes is not None]:
        grids.append(_probe_grid(probed))
    if robustness is not None:
        grids.append(_robustness_grid(robustness))
    return [_printable(grid) for grid in grids]


def _score_grids(results: Sequence[Result], links: Sequence[str] = ()) -> list[Grid]:
    """
    Args:
        links: a place on the page for each result.
    """
    sets = [result.data.name for result in results]
    by_task: dict[str, list[int]] = {}
    for number in sorted(range(len(results)), key=lambda number: sets.index(sets[number])):
        by_task.setdefault(results[number].task, []).append(number)
    grids = []
    for task, numbers in by_task.items():
        rows, places = [], []
        for number in numbers:
            own = _score_rows(results[number])
            rows += own
            places += [links[number]] * len(own) if links else []
        title = task.replace("zeroshot_", "zero-shot ")
        main = {CLASSIFICATION: "top-1 %", MULTILABEL: "mAP %"}.get(task, "R@1 %")
        grids.append(_grid(title, rows, ("model", "prompts"), main=main, links=places))
    return grids


def _score_rows(result: Result) -> list[dict[str, str]]:
    """One; of retrieval one for each direction."""
    data, metrics, num_images = result.data, result.metrics, str(result.num_images)
    if result.scores.unreadable:
        num_images += f" of {len(data)}"
    shared = {"data": data.name, "model": result.model}
    if isinstance(metrics, Metrics):
        C = len(data.classnames)
        return [
            {
                **shared,
                "prompts": _prompts(result),
                "images": num_images,
                "classes": str(C),
                "top-1 %": percent(metrics.acc1),
                "95 % interval": _interval(metrics.interval),
                **{f"top-{k} %": percent(v) if k < C else _NONE for k, v in metrics.top_k.items() if k > 1},
                "mean per class %": percent(metrics.mean_per_class_recall),
                "macro F1 %": percent(metrics.macro_f1),
                "ECE %": percent(metrics.calibration.error),
            }
        ]
    if isinstance(metrics, Multilabel):
        return [
            {
                **shared,
                "prompts": _prompts(result),
                "images": num_images,
                "classes": str(len(data.classnames)),
                "without images": str(len(metrics.left_out)) if metrics.left_out else _NONE,
                "mAP %": percent(metrics.mean_average_precision),
            }
        ]
    assert isinstance(result.scores, RetrievalScores)
    num_texts = str(len(result.scores.captions))
    found = {
        "images by text": (metrics.images, result.scores.interval_images),
        "texts by image": (metrics.texts, result.scores.interval_texts),
    }
    return [
        {**shared, "images": num_images, "texts": num_texts, "find": what, **_ranking_cells(ranking, interval)}
        for what, (ranking, interval) in found.items()
    ]


def _ranking_cells(ranking: Ranking, interval: tuple[float, float]) -> dict[str, str]:
    cells = {}
    for k, share in ranking.recall.items():
        cells[f"R@{k} %"] = percent(share)
        if k == 1:
            cells["95 % interval"] = _interval(interval)
    cells["median rank"] = f"{ranking.median_rank:g}"
    most = max(ranking.mean_average_precision)
    return cells | {f"mAP@{most} %": percent(ranking.mean_average_precision[most])}


def _subgroup_grid(result: Result, column: str) -> Grid:
    found = result.subgroups[column]
    rows = [
        {
            "value": "(none)" if each.value is None else str(each.value),
            "images": str(each.num_images),
            "top-1 %": percent(each.accuracy),
            "95 % interval": _interval(each.interval),
            "remark": "too few" if each.is_too_small else "",
        }
        for each in found.subgroups[:_MOST_SUBGROUPS]
    ]
    notes = [_gap(found)]
    if more := found.subgroups[_MOST_SUBGROUPS:]:
        notes.append(f"And {len(more)} values of fewer images, in results.json.")
    parts = (result.data.name, result.model, f"prompts {_prompts(result)}")
    return _grid(f"top-1 by {column}, " + ", ".join(parts), rows, main="top-1 %", notes=notes)


def _gap(found: Subgroups) -> str:
    if found.gap is None or found.best is None or found.worst is None:
        return "No gap is told: fewer than two values have enough independent images."
    low, high = found.best.interval[0], found.worst.interval[1]
    overlap = "do not overlap" if low > high else "overlap, so chance may have made it"
    return (
        f"Gap {percent(found.gap)} points, from {found.worst.value} to {found.best.value}; their intervals {overlap}."
    )


def _outside_grid(results: Sequence[Result]) -> Grid:
    rows, notes = [], []
    for result in results:
        outside = result.outside
        assert outside is not None
        acceptance, separation = outside.acceptance, outside.separation
        rows.append(
            {
                "data": result.data.name,
                "model": result.model,
                "images of none": outside.name,
                "accepted from cosine": f"{acceptance.threshold.cosine:.4f}",
                "accepts of the classes %": percent(acceptance.accepted_inside),
                "accepts of none %": percent(acceptance.accepted_outside),
                "95 % interval": _interval(acceptance.interval_outside),
                "AUROC %": percent(separation.auroc),
                "FPR at 95 % TPR %": percent(separation.fpr_at_95_tpr),
            }
        )
        notes.append(f"{result.data.name}: {acceptance}.")
    shared = ("data", "model", "images of none")
    return _grid("none of these", rows, shared, main="AUROC %", notes=notes if len(notes) == 1 else ())


def _probe_grid(results: Sequence[Result]) -> Grid:
    rows, notes = [], []
    for result in results:
        probes, metrics = result.probes, result.metrics
        assert probes is not None
        assert isinstance(metrics, Metrics)
        linear, tip = probes.linear, probes.tip_adapter
        chosen = (f"C {linear.C:.3g}", f"k {probes.num_neighbours}", f"α {tip.alpha:.3g}, β {tip.beta:.3g}")
        outcomes = (linear.outcome, probes.neighbours, tip.outcome)
        found = [("zero-shot", "", metrics.acc1, metrics.interval, "")]
        found += [
            (method, choice, outcome.accuracy, outcome.interval, probes.curve.verdict(method))
            for method, choice, outcome in zip(METHODS, chosen, outcomes, strict=True)
        ]
        rows += [
            {
                "data": result.data.name,
                "model": result.model,
                "learnt from": f"{probes.train} ({len(probes.splits.labelled)})",
                "method": method,
                "chosen": choice,
                "top-1 %": percent(accuracy),
                "95 % interval": _interval(interval),
                "remark": remark,
            }
            for method, choice, accuracy, interval, remark in found
        ]
        where = f"{result.data.name}: " if len(results) > 1 else ""
        if not linear.is_converged:
            notes.append(f"{where}The linear probe's fit did not come to its end.")
        if num_leaked := probes.splits.num_leaked:
            notes.append(f"{where}{num_leaked} test images are training images as well, so probes score too high.")
    if all(result.probes and result.probes.is_pooled for result in results):
        notes.append("The linear probe has the features before their projection.")
    return _grid("learnt from features", rows, ("data", "model", "learnt from"), main="top-1 %", notes=notes)


def _robustness_grid(found: Robustness) -> Grid:
    rows = []
    for row in found.rows:
        cells = {
            "model": row.model + (" (baseline)" if row.is_baseline else ""),
            f"{found.standard} top-1 %": percent(row.standard),
        }
        for name, share, effective in zip(found.shifted, row.shifted, row.effective, strict=True):
            cells |= {f"{name} %": percent(share), f"{name}, beyond the line": _NONE}
            if effective is not None:
                cells[f"{name}, beyond the line"] = _points(effective)
        rows.append(cells | {"mean %": percent(row.mean_shifted), "drop": percent(row.standard - row.mean_shifted)})
    notes = []
    if any(found.fits):
        notes.append("Beyond the line: points above what the baselines' accuracies lead one to expect.")
    elif any(row.is_baseline for row in found.rows):
        notes.append("The baselines give no line: it needs two of different accuracy, none of 0 or 100 %.")
    return _grid("under shifts, zero-shot top-1", rows, main="mean %", notes=notes)


_METRICS = {
    "acc1": "top-1",
    "image_retrieval_recall@1": "images by text, R@1",
    "text_retrieval_recall@1": "texts by image, R@1",
}


def comparison_tables(changes: Sequence[Change]) -> list[Table]:
    """What became better and worse, of which classes, and some of the images that did."""
    grids = [_change_grid(changes)]
    for change in changes:
        found, title = change.comparison, f"{change.dataset}, {_METRICS[change.metric]}, {_before_after(change.models)}"
        changed = [row for row in change.by_class if row[2] != row[3]]
        rows = [
            {
                "class": name,
                "images": str(count),
                "before %": percent(before),
                "after %": percent(after),
                "difference": _points(after - before),
            }
            for name, count, before, after in changed[:10]
        ]
        if rows:
            notes = [f"And {len(changed) - 10} more classes."] if changed[10:] else []
            grids.append(_grid(f"classes that changed most: {title}", rows, main="difference", notes=notes))
        pairs = list(zip_longest(change.gained[:10], change.lost[:10], fillvalue=""))
        if pairs:
            counts = f"the first of {len(found.gained)} gained and {len(found.lost)} lost"
            grids.append(_grid(f"{counts}: {title}", [{"images gained": a, "images lost": b} for a, b in pairs]))
    return [_printable(grid) for grid in grids]


def _change_grid(changes: Sequence[Change]) -> Grid:
    rows = [
        {
            "data": change.dataset,
            "metric": _METRICS[change.metric],
            "model": _before_after(change.models),
            "prompts": _before_after(change.prompts),
            "images": str(change.num_images),
            "before %": percent(change.shares[0]),
            "after %": percent(change.shares[1]),
            "difference": _points(change.comparison.difference),
            "95 % interval": " – ".join(_points(end) for end in change.comparison.interval),
            "McNemar p": "<0.001" if change.comparison.p_value < 0.001 else f"{change.comparison.p_value:.3f}",
            "gained": str(len(change.comparison.gained)),
            "lost": str(len(change.comparison.lost)),
            "change": verdict(change),
        }
        for change in changes
    ]
    N = len(changes)
    notes = [f"One comparison, told by p < {_SIGNIFICANT}."]
    if N > 1:
        notes = [
            f"{N} comparisons, each told by p < {_SIGNIFICANT}: were nothing different, about {_SIGNIFICANT * N:.2g} "
            "of so many would seem to be."
        ]
    return _grid("what changed", rows, ("model", "prompts"), main="difference", notes=notes)


def verdict(change: Change) -> str:
    """In words, by McNemar's test."""
    if change.comparison.p_value >= _SIGNIFICANT:
        return "no difference beyond chance"
    return "better" if change.comparison.difference > 0 else "worse"


def _before_after(names: tuple[str, str]) -> str:
    return names[0] if names[0] == names[1] else " → ".join(names)


# ---------------------------------------------------------------------------------------------------------------------
# Curves of a run


Curves = dict[str, list[tuple[int, float]]]
_COUNTS = ("train/rejected", "train/truncated")  # each start of a run counts from 0


def read_curves(model: str | Path) -> Curves:
    """The curves of the run that a model came from, (step, value) by name; empty for a model without a run."""
    path = Path(model)
    is_checkpoint = path.parent.name == "checkpoints"
    return run_curves(path.parent.parent if is_checkpoint else path.parent)  # of RUN/checkpoints/last.ckpt or RUN/best


def logs_of(run: Path) -> list[Path]:
    """The folders of a run's log, one for each time that it was started or resumed, in order."""
    folders = {folder.name.removeprefix("version_"): folder for folder in run.glob("logs/version_*")}
    return [folders[str(number)] for number in sorted(int(name) for name in folders if name.isdigit())]


def run_curves(run: Path) -> Curves:
    """The curves in a run's folder. What was trained once more after a resumption counts as it was the last time."""
    curves: dict[str, dict[int, float]] = {}
    for log in logs_of(run):
        rows = _rows(log / "metrics.csv")
        if not rows:
            continue
        first = min(int(row["step"]) for row in rows)
        curves = {name: {step: y for step, y in points.items() if step < first} for name, points in curves.items()}
        before = {name: max(curves.get(name, {}).values(), default=0.0) for name in _COUNTS}
        for row in rows:
            for name, value in row.items():
                if name not in ("step", "epoch") and value:
                    curves.setdefault(name, {})[int(row["step"])] = float(value) + before.get(name, 0.0)
    return {name: sorted(points.items()) for name, points in curves.items() if points}


def _rows(table: Path) -> list[dict[str, str]]:
    if not table.is_file():
        return []
    text = table.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # a run that is going on, or was killed, may be amid a line
    return [row for row in csv.DictReader(io.StringIO(whole)) if row["step"]]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def svg(figure: Figure, is_tight: bool = True) -> str:
    """The picture as an element of a page; `is_tight` cuts its margins off."""
    buffer = io.StringIO()
    # Text stays text, for the browser's fonts, which know more scripts than matplotlib's.
    with rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing from font.*")
        figure.savefig(
            buffer,
            format="svg",
            dpi=216,  # of what is made of pixels
            transparent=True,  # the paper is the page's
            bbox_inches="tight" if is_tight else None,
            metadata={"Date": None, "Creator": None},
        )
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _short(name: str, most: int = 32) -> str:
    return name if len(name) <= most else name[: most // 2] + "…" + name[-(most // 2 - 1) :]


def _plot_training(curves: Curves) -> list[str]:
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
        figure, axes = _axes(4.6, 3)
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


def _plot_scores(results: Sequence[Result]) -> str:
    """Bars of several models or sets of prompts, by data set; nothing for one of each, or for too many."""
    headlines = {
        CLASSIFICATION: {"acc1": "top-1"},
        MULTILABEL: {"mean_average_precision": "mAP"},
    }
    retrieval = {f"{name}_retrieval_recall@1": f"{name}s, R@1" for name in ("image", "text")}
    bars: dict[str, dict[str, tuple[float, tuple[float, float] | None]]] = {}
    are_models_many = len({result.model for result in results}) > 1
    prompts = {(_prompts(result)) for result in results} - {""}
    for result in results:
        parts = [result.model] if are_models_many or not _prompts(result) else []
        parts += [_prompts(result)] if len(prompts) > 1 and _prompts(result) else []
        for name, label in headlines.get(result.task, retrieval).items():
            group = bars.setdefault(f"{_short(result.data.name)}\n{label}", {})
            group[", ".join(parts)] = metric_values(result)[name], intervals(result).get(name)
    num_bars = sum(map(len, bars.values()))
    if max(map(len, bars.values())) < 2 or num_bars > _MOST_BARS:
        return ""
    series = list(dict.fromkeys(name for group in bars.values() for name in group))
    figure, axes = _axes(6.5, 0.9 + 0.2 * num_bars + 0.15 * len(bars))
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
        axes.barh(0, 0, color=f"C{series.index(name) % 10}", label=_short(name, 60))
    axes.set_yticks(ticks, bars)
    axes.invert_yaxis()
    axes.set(xlabel="%, with 95 % intervals", xlim=(0, 100))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.5 / figure.get_figheight()))
    return svg(figure)


def _plot_confusion(confusion: np.ndarray, names: Sequence[str], chosen: np.ndarray | None = None) -> str:
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
    if len(columns) <= _MOST_LABELS:
        axes.set_xticks(range(len(columns)), [_short(names[c]) for c in columns.tolist()], rotation=90, fontsize=size)
    if len(rows) <= _MOST_LABELS:
        axes.set_yticks(range(len(rows)), [_short(names[c]) for c in rows.tolist()], fontsize=size)
    if len(columns) <= _MOST_MISTAKEN:
        for (i, j), share in np.ndenumerate(shares):
            if share:
                colour, text_size = "white" if share > 0.5 else "black", 7 if len(columns) <= 20 else 5
                axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=text_size, color=colour)
    return svg(figure)


def _most_mistaken(confusion: np.ndarray) -> np.ndarray:
    """Some classes, in their order: those of the most frequent mistakes."""
    chosen: dict[int, None] = {}
    for row, column, _ in most_confused(confusion, _MOST_MISTAKEN**2):
        if len(chosen.keys() | {row, column}) > _MOST_MISTAKEN:
            break
        chosen |= {row: None, column: None}
    return np.array(sorted(chosen), dtype=np.int64)


def _plot_calibration(found: Calibration) -> str:
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


def _plot_outside(outside: Outside, name: str) -> str:
    figure, axes = _axes(4.6, 3)
    edges = np.histogram_bin_edges(np.concatenate([outside.inside, outside.outside]), 40)
    for cosines, label in ((outside.inside, name), (outside.outside, f"{outside.name}, none of the classes")):
        weights = np.full(len(cosines), 100 / len(cosines))
        axes.hist(cosines, edges, weights=weights, alpha=0.55, label=f"{_short(label, 44)} ({len(cosines)})")
    cosine = outside.acceptance.threshold.cosine
    axes.axvline(cosine, color="black", linestyle="--", linewidth=1, label=f"accepted from {cosine:.3f}")
    axes.set(xlabel="best cosine of an image with any class", ylabel="% of the images")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return svg(figure)


def _plot_robustness(found: Robustness) -> list[str]:
    """For each shifted set, its top-1 against the standard set's, with the line of the baselines."""
    pictures = []
    for number, (name, fit) in enumerate(zip(found.shifted, found.fits, strict=True)):
        figure, axes = _axes(3.6, 3.4)
        axes.plot([0, 100], [0, 100], color="grey", linestyle=":", linewidth=1, label="no loss")
        if fit is not None:
            x = np.linspace(0.001, 0.999, 200)
            axes.plot(100 * x, 100 * fit.expected(x), color="tab:grey", linewidth=1, label="baselines' line")
        for row in found.rows:
            point = 100 * row.standard, 100 * row.shifted[number]
            axes.plot(*point, "o", color="tab:grey" if row.is_baseline else "tab:blue", markersize=5)
            if len(found.rows) <= 12:
                axes.annotate(_short(row.model, 24), point, (4, -8), textcoords="offset points", fontsize=7)
        axes.set(xlabel=f"{_short(found.standard)}, top-1 %", ylabel=f"{_short(name)}, top-1 %")
        shares = [share for row in found.rows for share in (row.standard, row.shifted[number])]
        limits = max(0, 100 * min(shares) - 10), min(100, 100 * max(shares) + 10)
        axes.set(xlim=limits, ylim=limits)
        axes.legend(frameon=False, fontsize=7, loc="upper left")
        pictures.append(svg(figure))
    return pictures


# ---------------------------------------------------------------------------------------------------------------------
# Galleries


class _Thumbnails:
    """Small pictures of images, each read once for all models and prompts."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], str] = {}

    def __call__(self, data: Any, number: int) -> str:
        key = id(data.images), int(number)
        if key not in self._made:
            self._made[key] = _thumbnail(data.open(int(number)))
        return self._made[key]


def _thumbnail(image: Image.Image) -> str:
    image = image.convert("RGB")
    factor = _THUMBNAIL / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    # A small picture is shown with its pixels, not blurred into something nobody saw.
    image = image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if factor > 1 else "JPEG")
    kind = "png" if factor > 1 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Some of them, evenly."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))]


def _picture(data: Any, number: int, thumbnail: _Thumbnails) -> dict[str, Any]:
    return {"picture": thumbnail(data, number), "name": data.key(number).rpartition("/")[2]}


def _classified(scores: Scores, thumbnail: _Thumbnails) -> list[dict[str, Any]]:
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


def _multilabelled(scores: MultilabelScores, thumbnail: _Thumbnails) -> list[dict[str, Any]]:
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


def _retrieved(scores: RetrievalScores, thumbnail: _Thumbnails) -> list[dict[str, Any]]:
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


# ---------------------------------------------------------------------------------------------------------------------
# The page


def _section(result: Result, heading: str, is_short: bool, thumbnail: _Thumbnails) -> dict[str, Any]:
    """What the page shows of a result.

    Args:
        is_short: another section shows the same images with other prompts, in full.
    """
    data = result.data
    section: dict[str, Any] = {
        "heading": heading,
        "task": result.task,
        "is_short": is_short,
        "scores": _section_scores(result),
        "num_images": result.num_images,
        "seconds": result.seconds,
        "unreadable": () if is_short else result.scores.unreadable,
        "classnames": getattr(data, "classnames", ()),
        "classnames_from": getattr(data, "classnames_from", ""),
        "templates": _examples(data.templates) if hasattr(data, "templates") else (),
        "templates_from": getattr(data, "templates_from", ""),
        "same_prompts": result.same_prompts,
        "confused": confused_pairs(result) if isinstance(result.metrics, Metrics) else (),
        "galleries": (),
        "queries": (),
        "per_class": (),
        "confusions": (),
        "subgroups": {},
    }
    if is_short:
        return section
    if isinstance(result.scores, RetrievalScores):
        return section | {"queries": _retrieved(result.scores, thumbnail)}
    if isinstance(result.scores, MultilabelScores):
        return section | {"galleries": _multilabelled(result.scores, thumbnail), "per_class": _bars(result)}
    metrics = result.metrics
    assert isinstance(metrics, Metrics)
    confusion, calibration = metrics.confusion, metrics.calibration
    confusions = [("", _plot_confusion(confusion, data.classnames))]
    if len(data.classnames) > _MOST_LABELS and len(chosen := _most_mistaken(confusion)):
        title = f"Of these the {len(chosen)} classes most often mistaken for each other:"
        confusions.append((title, _plot_confusion(confusion, data.classnames, chosen)))
    confidence = float(np.nansum(calibration.confidence * calibration.images) / calibration.images.sum())
    return section | {
        "confusions": confusions,
        "per_class": _bars(result),
        "galleries": _classified(result.scores, thumbnail),
        "calibration": {
            "picture": _plot_calibration(calibration),
            "error": calibration.error,
            "confidence": confidence,
            "accuracy": metrics.acc1,
        },
        "subgroups": {column: _subgroup_grid(result, column) for column in result.subgroups},
        "outside": result.outside
        and {
            "picture": _plot_outside(result.outside, data.name),
            "sentence": str(result.outside.acceptance),
            "separation": result.outside.separation,
            "name": result.outside.name,
        },
        "probes": result.probes
        and {
            "picture": svg(plot_shots(result.probes.curve)),
            "grid": _probe_grid([result]),
            "train": result.probes.train,
        },
    }


def _section_scores(result: Result) -> str:
    """In words, for the line below the heading."""
    lines = []
    for row in _score_rows(result):
        parts: list[str] = []
        for name, cell in row.items():
            if name == "95 % interval":
                parts[-1] += f" ({cell})"
            elif (name.endswith(" %") or name == "median rank") and cell != _NONE:
                parts.append(f"{name.removesuffix(' %')} {cell}")
        lines.append((f"{row['find']}: " if "find" in row else "") + ", ".join(parts))
    return "; ".join(lines)


def _examples(prompts: Prompts) -> tuple[str, ...]:
    """The templates; of prompts by class each with its class."""
    if not isinstance(prompts, Mapping):
        return tuple(map(str, prompts))
    return tuple(f"{name}: {prompt}" for name, each in prompts.items() for prompt in each)


def _bars(result: Result) -> list[dict[str, Any]]:
    """Of each class that has images its recall, or its average precision; the worst first."""
    metrics, names = result.metrics, result.data.classnames
    if isinstance(metrics, Metrics):
        table = metrics.per_class
        images, shares, ends = table.images, table.recall, table.recall_intervals
    else:
        assert isinstance(metrics, Multilabel)
        images, shares, ends = metrics.positives, metrics.per_class, np.full((len(names), 2), np.nan)
    bars = [
        {"name": name, "images": int(n), "share": float(share), "interval": None if np.isnan(end).any() else end}
        for name, n, share, end in zip(names, images, shares, ends, strict=True)
        if n
    ]
    return sorted(bars, key=lambda bar: bar["share"])


def page_template(name: str, **filters: Callable[..., str]) -> jinja2.Template:
    """One of assets/*.html; what goes into it is escaped, and what is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name)


def write_html(path: str | Path, results: Sequence[Result], robustness: Robustness | None = None) -> None:
    """One self-contained page: scores, training curves, and for each result what was right and wrong, and why.

    Of further sets of prompts for the same images there are scores alone.

    Raises:
        ValueError: an image of a gallery can't be read any more.
    """
    models = list(dict.fromkeys(result.model for result in results))
    sets = list(dict.fromkeys(result.data.name for result in results))
    title = models[0] if len(models) == 1 else f"{len(models)} models on {', '.join(sets[:3])}"
    if len(models) > 1 and sets[3:]:
        title += f" and {len(sets) - 3} more"
    thumbnail, sections = _Thumbnails(), []
    seen: set[tuple[str, str]] = set()
    with rc_context({"text.parse_math": False}):  # a $ in a name is a $
        for result in results:
            asked = result.model, result.data.name
            parts = [result.data.name, *([result.model] if len(models) > 1 else [])]
            if sum(asked == (other.model, other.data.name) for other in results) > 1:
                parts.append(f"prompts {_prompts(result)}")
            sections.append(_section(result, ", ".join(parts), asked in seen, thumbnail))
            seen.add(asked)
        page = page_template("report.html", percent=percent).render(
            title=title,
            models=models,
            libraries=dict.fromkeys((result.model, result.library) for result in results if result.library),
            created=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
            seconds=sum(result.seconds for result in results),
            versions=versions(),
            summary=_score_grids(results, [f"data-{number}" for number in range(1, len(results) + 1)]),
            comparison=_plot_scores(results),
            training=_plot_training(read_curves(models[0])) if len(models) == 1 else [],
            sections=sections,
            is_open=len(results) <= _MOST_OPEN,
            robustness=robustness and {"grid": _robustness_grid(robustness), "pictures": _plot_robustness(robustness)},
        )
    write_text(path, page)
