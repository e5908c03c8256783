"""A run's folder read: what it was, and the curves in its logs."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

PAGE_FILE, RUN_FILE = "report.html", "run.json"


@dataclass(frozen=True)
class Run:
    """What a run left behind.

    Args:
        name: its folder.
        curves: (step, value) by the name of the metric; steps count from 0.
        starts: what each start, or resumption, recorded of itself (`run.json`), in order.
        config: its settings, as YAML.
    """

    name: str
    curves: Curves
    starts: tuple[dict[str, Any], ...]
    config: str

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

        Scores from before the first step are ignored: no checkpoint belongs to them.
        """
        name = self.record.get("monitor", "val/retrieval_r1")
        points = [(step, value) for step, value in self.curves.get(name, []) if step >= 0 and math.isfinite(value)]
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
    starts = []
    for log in logs:
        if (log / RUN_FILE).is_file():
            start = json.loads((log / RUN_FILE).read_text(encoding="utf-8"))
            table = log / "metrics.csv"
            if start["status"] == "running" and table.is_file():  # going on, or killed: its last row dates it
                began = datetime.datetime.fromisoformat(start["began"]).timestamp()
                start["seconds"] = max(0.0, table.stat().st_mtime - began)
            starts.append(start)
    config = logs[-1] / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else ""
    return Run(str(folder), run_curves(folder), tuple(starts), text)


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
    """The curves in a run's folder. A step that was trained twice counts as it was the last time."""
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
