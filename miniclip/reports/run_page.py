"""A run's folder -> one HTML page of its curves and numbers; of several runs, their curves over each other.

It is made at the end of every run, and by `miniclip report` at any time.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

from ..common.files import write_text
from .page_parts import page_template, svg
from .runs import Run, read_run

_RUN_COLOURS = ("#3b78b5", "#d0672f", "#2f8f6b", "#8a63b5", "#b1882a", "#c2477f", "#5a6673", "#2b9aa8")
_MOST_POINTS = 300  # of a line; with more, a point is the mean of several
_MOST_REASONS = 20


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


class _Chart(NamedTuple):
    """Some metrics in one picture.

    limit: (name of a metric, or a value; what it is), drawn as a dotted line. is_relative: as % of each curve's peak.
    is_smoothed: through many points goes their running mean, and they themselves are pale.
    """

    title: str
    metrics: dict[str, str]
    unit: str = ""
    is_log: bool = False
    limit: tuple[str | float, str] | None = None
    is_relative: bool = False
    is_smoothed: bool = True

    @property
    def factor(self) -> float:
        return 100 if self.unit == "%" else 1

    @property
    def heading(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def of_each_metric(self) -> list[_Chart]:
        several = len(self.metrics) > 1
        return [
            self._replace(
                metrics={name: label},
                title=f"{self.title}: {label}" if several else self.title,
                unit="" if self.is_relative else self.unit,
                limit=None if position else self.limit,
                is_relative=False,
            )
            for position, (name, label) in enumerate(self.metrics.items())
        ]


_CHARTS = (
    _Chart("Contrastive loss", {"train/loss": "training", "val/loss": "held out"}, limit=("train/chance", "chance")),
    _Chart(
        "In-batch accuracy",
        {"train/accuracy_image_to_text": "image to text", "train/accuracy_text_to_image": "text to image"},
        unit="%",
    ),
    _Chart("Logit scale", {"train/logit_scale": "logit scale"}, limit=(100, "highest allowed")),
    _Chart(
        "Gradient norm",
        {"train/grad_norm_image": "image tower", "train/grad_norm_text": "text tower"},
        is_log=True,
        is_smoothed=False,
    ),
    _Chart(
        "Learning rate",
        {"train/lr": "AdamW", "train/lr_muon": "Muon"},
        unit="% of its peak",
        is_relative=True,
        is_smoothed=False,
    ),
    _Chart("Images per second", {"train/images_per_s": "images/s"}),
    _Chart(
        "Use of the device",
        {"train/mfu": "FLOP/s of the peak (MFU)", "train/data_wait": "time waiting for data"},
        unit="%",
    ),
    _Chart("Memory", {"train/memory_gb": "memory"}, unit="GB", is_smoothed=False),
)


_WIDTH, _HEIGHT, _FONT = 3.7, 2.55, 8  # of a chart: inches, and points
_EM = _FONT / 72


def _charts(runs: Sequence[Run]) -> list[_Chart]:
    """Those that have something to show; every validation score is in one."""
    names = {name for run in runs for name in run.curves if name.startswith("val/") and name != "val/loss"}
    labels = {name: _score_name(name) for name in sorted(names)}
    shares = {name for name in names if all(0 <= value <= 1 for run in runs for value in run.values(name))}
    in_percent = {name: label for name, label in labels.items() if name in shares}
    scores = [_Chart("Held-out scores", in_percent, unit="%", is_smoothed=False)]
    scores += [
        _Chart(f"Held out: {labels[name]}", {name: labels[name]}, is_smoothed=False) for name in sorted(names - shares)
    ]
    charts = [_CHARTS[0], _CHARTS[1], *scores, *_CHARTS[2:]]
    if len(runs) > 1:  # a metric each, or the lines could not be distinguished
        charts = [each for chart in charts for each in chart.of_each_metric()]
    return [chart for chart in charts if any(run.values(name) for run in runs for name in chart.metrics)]


def _score_name(metric: str) -> str:
    known = {"val/retrieval_r1": "retrieval R@1", "val/zero_shot_acc1": "zero-shot top-1"}
    return known.get(metric, metric.removeprefix("val/"))


def _plot(chart: _Chart, runs: Sequence[Run]) -> str:
    """Colours stand for metrics, or, with several runs, for runs; the page has their legend."""
    figure = Figure(figsize=(_WIDTH, _HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    metrics = [name for name in chart.metrics if any(run.values(name) for run in runs)]
    for number, run in enumerate(runs):
        for position, name in enumerate(metrics):
            if run.values(name):
                colour = _RUN_COLOURS[(number if len(runs) > 1 else position) % len(_RUN_COLOURS)]
                dashes = (0, (4, 1.5)) if chart.is_relative and position else "solid"  # they may lie upon each other
                _draw(axes, chart, run, name, {"color": colour, "linestyle": dashes})
    _limit(chart, runs, axes)
    _dress(axes, chart, runs)
    has_legend = len(runs) == 1 and len(metrics) > 1
    if has_legend:
        figure.legend(
            loc="upper left", ncols=2, frameon=False, fontsize=_FONT, handlelength=1.8, columnspacing=1.2,
            labelspacing=0.25, labelcolor="#1c2733", borderpad=0.1,
        )  # fmt: skip
    # Margins by hand, in widths of an M: the layout engines of matplotlib draw all twice or more.
    low, high = axes.get_ylim()
    formatter = axes.yaxis.get_major_formatter()
    ticks = formatter.format_ticks([y for y in axes.get_yticks() if low <= y <= high])
    left, bottom = max(3.6, 1.2 + 0.66 * max(map(len, ticks), default=0)), 3.9
    top = (2 * -(-len(metrics) // 2) if has_legend else 0.7) + (1.3 if formatter.get_offset() else 0)  # a scale: 1e7
    x, y = left * _EM / _WIDTH, bottom * _EM / _HEIGHT
    axes.set_position((x, y, 0.98 - x, 1 - y - top * _EM / _HEIGHT))
    return svg(figure, is_tight=False)


def _draw(axes: Any, chart: _Chart, run: Run, name: str, look: dict[str, Any]) -> None:
    steps, values = _plotted_points(run.curves[name])
    x, y, label = _samples_after(run, steps), values * chart.factor, chart.metrics[name]
    if chart.is_relative:
        y, label = 100 * values / (values.max() or 1.0), f"{label}, peak {values.max():.2g}"
    if len(steps) > 60 and chart.is_smoothed:
        axes.plot(x, y, **look, alpha=0.25, linewidth=0.8)
        y = _smooth(y)
    few = {"marker": "o", "markersize": 3} if len(steps) <= 30 else {}
    axes.plot(x, y, **look, **few, linewidth=1.5, label=label)
    if (best := run.best()) and best[0] == name:
        at, score = _samples_after(run, np.array([best[1] - 1])), [best[2] * chart.factor]
        axes.plot(at, score, "o", color=look["color"], markersize=8, markerfacecolor="none", markeredgewidth=1.3)


def _dress(axes: Any, chart: _Chart, runs: Sequence[Run]) -> None:
    """Axes that are quiet, and the same along x in all pictures of a page."""
    furthest = max(_samples_after(run, np.array([points[-1][0]]))[0] for run in runs for points in run.curves.values())
    axes.set_xlim(0, 1.02 * furthest)
    if chart.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    elif axes.dataLim.y0 >= 0:
        top = 1.06 * axes.dataLim.y1
        axes.set_ylim(0, max(2.0, min(102.0, top)) if chart.unit == "%" else top or 1.0)
    for start in runs[0].starts[1:] if len(runs) == 1 else ():  # where it was resumed
        axes.axvline(start["first_step"] * (runs[0].batch_size or 1), color="#9aa4af", linewidth=0.8, linestyle=":")
    axes.set_xlabel("samples seen" if all(run.batch_size for run in runs) else "steps", fontsize=8, color="#66707c")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.locator_params(axis="x", nbins=6)
    axes.tick_params(which="both", labelsize=8, colors="#66707c", length=3)
    axes.grid(axis="y", color="#e8ebef", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c5ccd4")


def _limit(chart: _Chart, runs: Sequence[Run], axes: Any) -> None:
    if chart.limit is None:
        return
    limit, label = chart.limit
    values = {round(v, 6) for run in runs if (v := run.last(limit)) is not None} if isinstance(limit, str) else {limit}
    highest = max((value for run in runs for name in chart.metrics for value in run.values(name)), default=0.0)
    for value in sorted(values):
        if isinstance(limit, str) or highest > 0.6 * value:  # a limit that is far away would flatten the curve
            axes.axhline(value, color="#7d8791", linestyle=":", linewidth=1.2)
            anchor, grey = {"xy": (1, value), "xycoords": ("axes fraction", "data")}, "#66707c"
            axes.annotate(f"{label} {value:.3g}", **anchor, ha="right", va="bottom", fontsize=8, color=grey)


def _plotted_points(curve: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values, with no more points than a picture can show."""
    points = np.array([point for point in curve if math.isfinite(point[1])], dtype=float).reshape(-1, 2)
    if len(points) > _MOST_POINTS:
        points = np.array([part.mean(axis=0) for part in np.array_split(points, _MOST_POINTS)])
    return points[:, 0], points[:, 1]


def _samples_after(run: Run, steps: np.ndarray) -> np.ndarray:
    """How many samples were seen when these steps, which count from 0, were done."""
    return (steps + 1) * (run.batch_size or 1)


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a fifteenth of the curve around each point."""
    width = max(3, len(values) // 15) | 1
    weights = np.ones(width)
    return np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


class Number(NamedTuple):
    """One of the page's large numbers: what it is, its value, and what to know with it."""

    label: str
    value: str
    note: str = ""


def numbers(run: Run) -> list[Number]:
    """The numbers of a run, the most important first."""
    record, found = run.record, []
    if best := run.best():
        name, step, value = best
        found.append(Number("best score", _score(value), f"{_score_name(name)}, step {step:,}"))
    if (loss := run.last("train/loss")) is not None:
        chance = run.last("train/chance")
        found.append(Number("loss at the end", f"{loss:.3f}", f"chance {chance:.2f}" if chance else ""))
    if run.values("val/loss"):
        found.append(
            Number("held-out loss", f"{run.last('val/loss'):.3f}", f"lowest {min(run.values('val/loss')):.3f}")
        )
    if (accuracy := run.last("train/accuracy")) is not None:
        found.append(Number("in-batch accuracy", f"{100 * accuracy:.1f} %", "at the end"))
    if (samples := _samples_seen(run)) is not None:
        epochs = f"{samples / record['epoch_samples']:.3g} epochs" if record.get("epoch_samples") else ""
        found.append(Number("samples seen", _in_millions(samples), epochs))
    if record:
        resumed = f"in {len(run.starts)} parts" if len(run.starts) > 1 else ""
        found.append(Number("duration", _duration(sum(start["seconds"] for start in run.starts)), resumed))
    if (speed := run.middle("train/images_per_s")) is not None:
        found.append(Number("images/s", _in_millions(speed), "median"))
    if (mfu := run.middle("train/mfu")) is not None:
        tflops = run.middle("train/tflops") or 0.0
        found.append(
            Number("utilisation (MFU)", f"{100 * mfu:.1f} %", f"{_flops(tflops)} of {_flops(record_peak(run))}")
        )
    if (wait := run.middle("train/data_wait")) is not None:
        found.append(Number("waiting for data", f"{100 * wait:.1f} %", "median"))
    if memory := run.values("train/memory_gb"):
        found.append(Number("memory", f"{max(memory):.3g} GB", "at most"))
    if (rejected := run.last("train/rejected")) is not None:
        found.append(Number("rejected", _in_millions(rejected), "samples left out"))
    if (cut := run.last("train/truncated")) is not None:
        found.append(Number("captions cut", _in_millions(cut), "to the context length"))
    return found


def record_peak(run: Run) -> float:
    """10^12 operations a second, of all devices."""
    return float(run.record.get("peak_tflops") or math.nan) * run.record.get("world_size", 1)


def _samples_seen(run: Run) -> float | None:
    if run.record.get("status") not in (None, "running") and run.batch_size:
        return float(run.record["step"] * run.batch_size)
    return run.last("train/samples")


def observations(run: Run) -> list[str]:
    """What stands out, and what may be done about it; empty if all is well."""
    lines = list(run.problems)
    loss, chance, best = run.last("train/loss"), run.last("train/chance"), run.best()
    if loss is not None and chance and loss > 0.97 * chance:
        lines.append(
            f"The loss ended at its chance level, {chance:.2f}: nothing was learnt. The rate is far too high or low, "
            "or captions do not belong to their images"
        )
    if best and (last := run.last(best[0])) is not None and last < 0.9 * best[2]:
        lines.append(
            f"{_score_name(best[0])} was best at step {best[1]:,}, {_score(best[2])}, and fell to {_score(last)}: "
            "later training fitted the training pairs alone. The best model is the one that is kept; a shorter run "
            "would do, more data would do better"
        )
    if (run.last("train/logit_scale") or 0) > 99.5:
        lines.append("The logit scale reached the highest that is allowed, 100: the model is as sure as it may be")
    if (wait := run.middle("train/data_wait") or 0) > 0.1:
        lines.append(
            f"Training waited for data {100 * wait:.0f} % of the time: raise data.num_workers, or shrink the images in "
            "the shards"
        )
    samples = run.last("train/samples") or math.inf
    if rejected := run.last("train/rejected"):
        lines.append(f"{rejected:,.0f} samples ({100 * rejected / samples:.2g} %) could not be read and were left out")
    captions = (samples - (rejected or 0)) * _captions_per_image(run)
    if (cut := run.last("train/truncated") or 0) > 0.01 * captions:
        lines.append(f"{100 * cut / captions:.2g} % of the captions were cut: model.clip.text.context_length is short")
    norms = [value for name in run.curves if "grad_norm" in name for _, value in run.curves[name]]
    if infinite := sum(not math.isfinite(value) for value in norms):
        lines.append(f"{infinite} of {len(norms)} logged gradient norms are not finite: overflows of half precision")
    return lines


def _captions_per_image(run: Run) -> int:
    captions = (run.settings.get("data") or {}).get("captions") or {}
    return int(captions.get("per_image") or 1)


def _score(value: float) -> str:
    return f"{100 * value:.1f} %" if 0 <= value <= 1 else f"{value:.4g}"


def _in_millions(number: float) -> str:
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:.3g} M"


def _flops(tflops: float) -> str:
    return f"{tflops:.3g} TFLOP/s" if tflops >= 1 else f"{1000 * tflops:.3g} GFLOP/s"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"


# ---------------------------------------------------------------------------------------------------------------------
# The page


@dataclass(frozen=True)
class _Shown:
    """A run as the template needs it."""

    label: str
    run: Run
    colour: str
    numbers: list[Number] = field(default_factory=list)


def write_page(out: str | Path, folders: Sequence[str | Path]) -> None:
    """Writes the page of one run, or of several in comparison.

    Raises:
        ValueError: a folder is not a run's.
    """
    runs = [read_run(folder) for folder in folders]
    labels = _labels([run.name for run in runs])
    shown = [
        _Shown(label, run, _RUN_COLOURS[number % len(_RUN_COLOURS)], numbers(run))
        for number, (label, run) in enumerate(zip(labels, runs, strict=True))
    ]
    page = page_template("training.html").render(
        title=runs[0].name if len(runs) == 1 else " · ".join(labels),
        created=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
        runs=shown,
        columns=list(dict.fromkeys(number.label for each in shown for number in each.numbers)),
        observations=observations(runs[0]) if len(runs) == 1 else [],
        charts=[(chart.heading, _plot(chart, runs)) for chart in _charts(runs)],
        rejected=runs[0].record.get("rejected", [])[:_MOST_REASONS] if len(runs) == 1 else [],
        facts=_facts(runs[0]) if len(runs) == 1 else {},
        differences=differences(runs) if len(runs) > 1 else [],
    )
    write_text(out, page)


def _labels(names: Sequence[str]) -> list[str]:
    """The last part of each path, or the whole path where two end alike."""
    last = [Path(name).name for name in names]
    return last if len(set(last)) == len(last) else list(names)


def _facts(run: Run) -> dict[str, str]:
    record = run.record
    if not record:
        return {}
    facts = {
        "status": f"{record['status']}, {record['step']:,} of {record['max_steps']:,} steps",
        "began": datetime.datetime.fromisoformat(run.starts[0]["began"]).strftime("%Y-%m-%d %H:%M %Z"),
        "command": record["command"],
        "device": f"{record['device']}, {record['precision']}",
    }
    if record["status"] == "running":
        facts["status"] = "no end is recorded: it is going on, or was killed"
    if record["peak_source"]:
        peak = _flops(record["peak_tflops"])
        facts["peak"] = (
            f"{peak} ({record['peak_source']}); MFU is the share of it that the towers' own arithmetic takes"
        )
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return facts


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ, with each one's value."""
    flat = [_flat(run.settings) for run in runs]
    names = list(dict.fromkeys(name for each in flat for name in each))
    rows = [(name, [each.get(name, "–") for each in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flat(settings: Any, name: str = "") -> dict[str, str]:
    if isinstance(settings, dict):
        return {
            k: v for key in settings for k, v in _flat(settings[key], f"{name}.{key}" if name else str(key)).items()
        }
    return {name: str(settings)}
