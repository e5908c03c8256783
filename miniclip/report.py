"""Results -> tables in the terminal, and one HTML page that opens from disk without a network.

C classes; shares are of 1, printed in %.
"""

from __future__ import annotations

import base64
import csv
import datetime
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image
from rich.markup import escape
from rich.table import Table

from .files import write_text
from .prompts import ASSETS, Prompts
from .results import confused_pairs, versions
from .suite import Result

_THUMBNAIL = 112  # pixels
_GALLERY = 24  # images of a kind
_MOST_LABELS = 45  # classes that still have their name on an axis
_MOST_CONFUSION_CLASSES = 200  # beyond, JSON keeps the confused pairs alone


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def table(model: str, results: Sequence[Result]) -> Table:
    """The scores of one model, a row for each data set."""
    columns = ("data", "images", "classes", "prompts", "top-1 %", "95 % interval", "top-5 %", "mean per class %")
    out = Table(title=f"zero-shot classification, {escape(model)}")
    for column in columns:
        out.add_column(column, justify="left" if column == "data" else "right", no_wrap=True)
    for result in results:
        data, metrics = result.scores.data, result.metrics
        low, high = metrics.interval
        out.add_row(
            escape(data.name),
            f"{metrics.num_images} of {len(data)}" if result.scores.unreadable else str(metrics.num_images),
            str(len(data.classnames)),
            _num_prompts(data.templates),
            percent(metrics.acc1),
            f"{percent(low)} – {percent(high)}",
            percent(metrics.acc5) if len(data.classnames) > 5 else "–",
            percent(metrics.mean_per_class_recall),
        )
    return out


def wordings(prompts: Prompts) -> tuple[str, ...]:
    """The templates as texts; of prompts by class those of all classes, one after the other."""
    if isinstance(prompts, Mapping):
        return tuple(prompt for each in prompts.values() for prompt in each)
    return tuple(map(str, prompts))


def _num_prompts(prompts: Prompts) -> str:
    """For each class."""
    counts = sorted({len(each) for each in prompts.values()} if isinstance(prompts, Mapping) else {len(prompts)})
    return " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]]))


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
            buffer, format="svg", bbox_inches="tight" if is_tight else None, metadata={"Date": None, "Creator": None}
        )
    text = buffer.getvalue()
    return text[text.index("<svg") :]


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
        figure = Figure(figsize=(4.6, 3))
        axes = figure.subplots()
        for name in (name for name in names if name in curves):
            steps, values = zip(*curves[name], strict=True)
            axes.plot(steps, [factor * value for value in values], label=names[name])
        if names is losses and "train/chance" in curves:
            chance = curves["train/chance"][-1][1]
            axes.axhline(chance, color="grey", linestyle=":", label=f"chance, ln(batch) = {chance:.2f}")
        axes.set(xlabel="step", ylabel=label, ylim=(0, None if names is losses else 101))
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        pictures.append(svg(figure))
    return pictures


def _plot_confusion(result: Result) -> str:
    """Rows are shares of a true class; classes without images are left out of the rows."""
    confusion, names = result.metrics.confusion, result.scores.data.classnames
    rows = np.flatnonzero(confusion.sum(axis=1))
    shares = confusion[rows] / confusion[rows].sum(axis=1, keepdims=True)
    side = min(9.0, 2.4 + 0.22 * len(names))
    figure = Figure(figsize=(side + 0.8, max(2.0, 0.9 + (side - 0.9) * len(rows) / len(names))))
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    figure.colorbar(picture, ax=axes, label="share of the true class", fraction=0.04)
    axes.set(xlabel="guess", ylabel="true class", xticks=[], yticks=[])
    size = 8 if len(names) <= 20 else 6
    if len(names) <= _MOST_LABELS:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size, parse_math=False)
    if len(rows) <= _MOST_LABELS:
        axes.set_yticks(range(len(rows)), [names[row] for row in rows], fontsize=size, parse_math=False)
    if len(names) <= 12:
        for (i, j), share in np.ndenumerate(shares):
            if share:
                axes.text(
                    j,
                    i,
                    str(confusion[rows[i], j]),
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if share > 0.5 else "black",
                )
    return svg(figure)


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


def _gallery(result: Result, rows: np.ndarray) -> list[dict[str, Any]]:
    scores, data = result.scores, result.scores.data
    return [
        {
            "picture": _thumbnail(data.open(int(scores.numbers[row]))),
            "name": data.key(scores.numbers[row]).rpartition("/")[2],
            "label": data.classnames[scores.labels[row]],
            "guesses": [
                {"name": data.classnames[c], "share": float(p), "is_right": bool(c == scores.labels[row])}
                for c, p in zip(scores.ranked[row, :3], scores.probabilities[row, :3], strict=True)
            ],
        }
        for row in rows
    ]


def _section(result: Result) -> dict[str, Any]:
    scores, metrics, data = result.scores, result.metrics, result.scores.data
    is_right = scores.ranked[:, 0] == scores.labels
    confidence = scores.probabilities[:, 0]
    surest_first = np.argsort(-confidence, kind="stable")
    right = np.flatnonzero(is_right)
    # Right ones spread evenly over the data; wrong ones with the surest first, as they tell most.
    some_right = right[np.unique(np.linspace(0, len(right) - 1, min(_GALLERY, len(right))).astype(int))]
    wrong = surest_first[~is_right[surest_first]]
    counts = metrics.confusion.sum(axis=1)
    return {
        "name": data.name,
        "num_images": metrics.num_images,
        "num_classes": len(data.classnames),
        "metrics": metrics,
        "templates": wordings(data.templates),
        "confusion": _plot_confusion(result),
        "confused": confused_pairs(result),
        "per_class": sorted(
            (
                {"name": name, "images": int(n), "share": float(share)}
                for name, n, share in zip(data.classnames, counts, metrics.per_class.recall, strict=True)
                if n
            ),
            key=lambda entry: entry["share"],
        ),
        "right": _gallery(result, some_right),
        "wrong": _gallery(result, wrong[:_GALLERY]),
        "num_wrong": len(wrong),
        "unreadable": scores.unreadable,
        "seconds": result.seconds,
    }


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


def write_html(path: str | Path, model: str, results: Sequence[Result]) -> None:
    """One self-contained page: scores, training curves, confusion, what was right and wrong, and the prompts."""
    page = page_template("report.html", percent=percent).render(
        model=model,
        created=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        versions=versions(),
        training=_plot_training(read_curves(model)),
        sections=[_section(result) for result in results],
    )
    write_text(path, page)
