"""A run's folder read: what it was, and the curves in its logs."""

from __future__ import annotations

import csv
import datetime
import json
import math
import warnings
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from ..common.arguments import shown
from ..common.storage import without_secrets, without_secrets_in
from ..data.reading.unique_keys import BoundedSafe

PAGE_FILE, RUN_FILE, METRICS_FILE = "report.html", "run.json", "metrics.csv"
_NUMBER, _TEXT_OR_NONE = (int, float), (str, type(None))
# What every record has, and what those of later versions have, too.
_RECORDED: dict[str, Any] = {
    **dict.fromkeys(("status", "command", "device", "precision"), str),
    **{"seconds": _NUMBER, "step": int, "max_steps": int, "peak_source": _TEXT_OR_NONE, "versions": dict},
}
_OF_LATER: dict[str, Any] = {
    **dict.fromkeys(("first_step", "batch_size", "world_size"), int),
    **{"monitor": str, "rejected": list, "epoch_samples": int, "peak_tflops": (*_NUMBER, type(None))},
}


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Args:
        name: its folder.
        curves: (step, value) by the name of the metric; steps count from 0.
        starts: what each start, or resumption, recorded of itself (`run.json`), in order.
        config: its settings, as YAML, without the secrets of URLs.
        settings: what that YAML holds; empty where it is damaged.
        problems: what of its files is damaged and was left out.
    """

    name: str
    curves: Curves
    starts: tuple[dict[str, Any], ...]
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def record(self) -> dict[str, Any]:
        return self.starts[-1] if self.starts else {}

    @property
    def batch_size(self) -> int | None:
        return self.record.get("batch_size")

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.curves.get(name, []) if math.isfinite(value)]

    def last(self, name: str) -> float | None:
        return values[-1] if (values := self.values(name)) else None

    def middle(self, name: str) -> float | None:
        return median(values) if (values := self.values(name)) else None

    def best(self) -> tuple[str, int, float] | None:
        """The metric that chooses the best checkpoint, its best value, and how many steps were done by then.

        Values count at validations, which write that checkpoint.

        Scores from before the first step are ignored: no checkpoint belongs to them. So are those of earlier starts on
        other data (labelled images where the metric is of those, else validation pairs), or by another metric, which
        are not compared with those of the last.
        """
        name = self.record.get("monitor", "val/retrieval_r1")
        first, known = 0, dict[str, Any]()  # of the last start, and of those before it where that recorded nothing
        for start in reversed(self.starts):
            # A start of before labelled images were recorded is compared with others of that kind, by its pairs.
            pairs = ("validation_pairs",) if start.get("labelled_images") is None else ()
            facts = {key: start[key] for key in ("monitor", "monitor_mode", "labelled_images", *pairs) if key in start}
            if any(known.get(key, value) != value for key, value in facts.items()):
                break
            known = facts | known
            first = start.get("first_step", 0)
        logged = [(step, value) for step, value in self.curves.get(name, []) if step >= first]
        validations = {step for each in self.curves if each.startswith("val/") for step, _ in self.curves[each]}
        points = []
        for step in sorted(validations):  # a metric of steps has the value of the last logged one
            before = bisect_right(logged, step, key=lambda point: point[0])
            if before and math.isfinite(value := logged[before - 1][1]):
                points.append((step, value))
        if not points:
            return None
        choose = min if self.record.get("monitor_mode") == "min" else max
        step, value = choose(points, key=lambda point: point[1])
        return name, step + 1, value


def read_run(folder: str | Path) -> Run:
    """Reads a run that is going on, has ended, or was killed.

    Raises:
        ValueError: there is no log in the folder.
    """
    folder = Path(folder)
    logs = logs_of(folder)
    if not logs:
        raise ValueError(f"{folder} is not the folder of a run: it has no logs/version_0 (trainer.default_root_dir)")
    starts, problems = [], []
    for log in logs:
        try:
            start = _read_start(log)
        except ValueError as error:
            problems.append(str(error))
        else:
            starts += [] if start is None else [start]
    config = logs[-1] / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    settings: dict[str, Any] = {}
    try:
        settings, tags = read_settings(text)
    except ValueError as error:
        problems.append(f"{config} is damaged and was left out: {error}")
    else:
        if tags:
            problems.append(
                f"{config} has the tag {', '.join(tags)}, which no settings of a run have; nothing was built or run "
                "from it"
            )
    curves, damages = _read_logs(folder)
    for problem in problems:
        warnings.warn(problem, stacklevel=2)
    settings = without_secrets_in(settings)
    return Run(str(folder), curves, tuple(starts), without_secrets(text), settings, (*problems, *damages))


def _read_start(log: Path) -> dict[str, Any] | None:
    """What a start of the run recorded; None if it recorded nothing.

    Raises:
        ValueError: the record is damaged.
    """
    path = log / RUN_FILE
    if not path.is_file():
        return None
    try:
        start = without_secrets_in(json.loads(path.read_text(encoding="utf-8")))
        began = datetime.datetime.fromisoformat(start["began"]).timestamp()
        if missing := [name for name in _RECORDED if name not in start]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        kinds = _RECORDED | _OF_LATER
        if wrong := [name for name in start if name in kinds and not isinstance(start[name], kinds[name])]:
            raise ValueError(f"its {wrong[0]} is {shown(start[wrong[0]])}")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged and was left out: {error}") from error
    table = log / METRICS_FILE
    if start["status"] == "running" and table.is_file():  # going on, or killed: its last row dates it
        start["seconds"] = max(0.0, table.stat().st_mtime - began)
    return start


# ---------------------------------------------------------------------------------------------------------------------
# Settings of a run


class _AnyTag(BoundedSafe):
    """Reads a value whose tag YAML itself does not have, as Python's are, as the tag's name, and builds nothing."""

    tags: list[str]


def _tag_alone(loader: _AnyTag, tag: str, node: yaml.Node) -> str:
    loader.tags.append(tag.replace("tag:yaml.org,2002:", "!!"))
    return loader.tags[-1]


_AnyTag.add_multi_constructor("", _tag_alone)


def read_settings(text: str) -> tuple[dict[str, Any], list[str]]:
    """The settings that a YAML holds, and the foreign tags in it, whose values are their names.

    Raises:
        ValueError: it is no YAML, or it or one of its sections is no mapping.
    """
    try:
        loader = _AnyTag(text)
        loader.tags = []
        settings = loader.get_single_data()
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error
    settings = {} if settings is None else settings
    sections = {"it": settings}
    if isinstance(settings, dict):
        sections |= {name: settings[name] for name in ("data", "model", "trainer") if settings.get(name) is not None}
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ValueError(f"{name} is a {type(section).__name__}, and must be names with values")
    return settings, list(dict.fromkeys(loader.tags))


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
    """The folders of a run's log, one for each time that it was started or resumed, in order.

    Of folders of which some hold a start's record, those without one are left out: `validate` logs there, too.
    """
    folders = {folder.name.removeprefix("version_"): folder for folder in run.glob("logs/version_*")}
    logs = [folders[str(number)] for number in sorted(int(name) for name in folders if name.isdigit())]
    return [log for log in logs if (log / RUN_FILE).is_file()] or logs


def run_curves(run: Path) -> Curves:
    """The curves in a run's folder. A step that was trained twice counts as it was the last time."""
    return _read_logs(run)[0]


def _read_logs(run: Path) -> tuple[Curves, list[str]]:
    """The curves, and what of the logs is damaged, of which a warning is given, too."""
    curves: dict[str, dict[int, float]] = {}
    damages = []
    for log in logs_of(run):
        rows, num_damaged = _rows(log / METRICS_FILE)
        if num_damaged:
            what = f"{num_damaged} of {num_damaged + len(rows)} rows of {log / METRICS_FILE} are"
            damages.append(f"{what} damaged, as by a full disk, and were left out")
            warnings.warn(damages[-1], stacklevel=3)
        if not rows:
            continue
        first = min(step for step, _ in rows)
        curves = {name: {step: y for step, y in points.items() if step < first} for name, points in curves.items()}
        before = {name: max(curves.get(name, {}).values(), default=0.0) for name in _COUNTS}
        for step, values in rows:
            for name, value in values.items():
                curves.setdefault(name, {})[step] = value + before.get(name, 0.0)
    return {name: sorted(points.items()) for name, points in curves.items() if points}, damages


def _rows(table: Path) -> tuple[list[tuple[int, dict[str, float]]], int]:
    """Each whole row's step and numbers, and how many rows are damaged."""
    if not table.is_file():
        return [], 0
    text = table.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # a run that is going on, or was killed, may be amid a line
    header, *lines = [line for line in whole.splitlines() if line] or [""]
    names = next(csv.reader([header]), [])
    rows, num_damaged = [], 0
    for line in lines:
        try:
            cells = next(csv.reader([line]))
            cell_of = dict(zip(names, cells, strict=False))
            if len(cells) != len(names):
                raise ValueError
            step = cell_of.pop("step")
            values = {name: float(cell) for name, cell in cell_of.items() if cell and name != "epoch"}
            if step:
                rows.append((int(step), values))
        except (ValueError, KeyError, csv.Error):  # torn, joined with the next, or overwritten
            num_damaged += 1
    return rows, num_damaged
