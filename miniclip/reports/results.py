"""Results as files: JSON of ours and of CLIP_benchmark's, CSV, Parquet.

Shares are of 1 in all files."""

from __future__ import annotations

import datetime
import json
import platform
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.files import atomic_write, csv_line, write_text
from ..common.version import __version__
from ..evaluation.prompts import MINED_FROM
from ..evaluation.robustness import Robustness
from ..evaluation.suite import Result

RESULTS_FILE, TABLE_FILE, PREDICTIONS_FOLDER, BENCHMARK_FOLDER = (
    "results.json",
    "results.csv",
    "predictions",
    "clip_benchmark",
)
SCHEMA = 2
_MOST_NAME_BYTES = 60  # of each part of a file's name, which has three and may have 255


def prompts_label(result: Result) -> str:
    return prompts_of(getattr(result.data, "templates_from", ""))


def prompts_of(where: str) -> str:
    """A short name of prompts by where they came from: the built-in set's, the file's, or "captions'" where they are
    worded as those."""
    if where == MINED_FROM:
        return "captions'"
    built_in = re.fullmatch(r"the built-in set '(.+)'", where)
    return built_in[1] if built_in else Path(where).name


def versions() -> dict[str, str]:
    import torch

    return {"miniclip": __version__, "torch": torch.__version__, "python": platform.python_version()}


# ---------------------------------------------------------------------------------------------------------------------
# Our JSON: all that was measured, with what is needed to measure it again


def as_dict(results: Sequence[Result], robustness: Robustness | None = None) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "files": {
            PREDICTIONS_FOLDER: [f"{name}.parquet" for name in _file_names(results)],
            BENCHMARK_FOLDER: list(benchmark_records(results)),
        },
        "results": [_result_as_dict(result) for result in results],
        "robustness": None if robustness is None else robustness.as_dict(),
    }


def _result_as_dict(result: Result) -> dict[str, Any]:
    scores = result.scores
    left_out: Counter[str] = Counter()
    for each in result.data.left_out:
        left_out[each.reason] += each.count
    return {
        "model": result.model,
        "library": result.library,
        "precision": result.precision,
        "dataset": result.data.name,
        "task": result.task,
        "num_images": scores.num_images,
        "unreadable": list(scores.unreadable),
        "left_out": dict(left_out),
        "upright": result.data.upright,
        "metrics": scores.values(),
        "intervals_95": {name: list(interval) for name, interval in scores.intervals().items()},
        "logit_scale": result.logit_scale,
        "seconds": round(result.seconds, 2),
        **scores.as_dict(),
        "subgroups": {column: found.as_dict() for column, found in result.subgroups.items()},
        "none_of_these": None if result.outside is None else result.outside.as_dict(),
        "probes": None if result.probes is None else result.probes.as_dict(),
    }


def write_json(path: str | Path, results: Sequence[Result], robustness: Robustness | None = None) -> None:
    text = json.dumps(as_dict(results, robustness), ensure_ascii=False, indent=1, allow_nan=False)
    # Numbers of the samples in one line each list, as nobody reads them one by one. No text holds the end of a line.
    write_text(path, re.sub(r"\[\n\s*([^\[\]{}\"]*?)\n\s*\]", _in_one_line, text) + "\n")


def files_beside(path: Path) -> list[Path]:
    """The predictions and records that go with a results.json, as it lists them; none if it can't be read."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        names = [(folder, name) for folder in (PREDICTIONS_FOLDER, BENCHMARK_FOLDER) for name in files[folder]]
        return [path.parent / folder / name for folder, name in names if Path(name).name == name]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _in_one_line(found: re.Match[str]) -> str:
    return "[" + re.sub(r"\s+", " ", found[1]) + "]"


# ---------------------------------------------------------------------------------------------------------------------
# Others' formats


def _file_names(results: Sequence[Result]) -> list[str]:
    """Without an ending; equal names get a number. Long parts, as paths are, keep their end, which differs most."""
    names: list[str] = []
    for result in results:
        parts = [result.data.name, result.model, prompts_label(result)]
        short = [
            re.sub(r"[^\w.@-]+", "-", part).encode()[-_MOST_NAME_BYTES:].decode("utf-8", "ignore") for part in parts
        ]
        name = "_".join(part.strip("-.") for part in short if part)
        same, number = name, 2
        while name in names:
            name, number = f"{same}_{number}", number + 1
        names.append(name)
    return names


def benchmark_records(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """CLIP_benchmark's records by file name, one for each task, as its `build` gathers them."""
    records = {}
    for file_name, result in zip(_file_names(results), results, strict=True):
        shared = {"dataset": result.data.name, "model": result.model, "pretrained": result.library, "language": "en"}
        by_task = {result.scores.benchmark_task: result.scores.benchmark_values()}
        if result.probes is not None:
            by_task["linear_probe"] = result.probes.values()["linear_probe"]
        for task, values in by_task.items():
            records[f"{file_name}_{task}.json"] = {**shared, "task": task, "metrics": values}
    return records


def write_benchmark(folder: str | Path, results: Sequence[Result]) -> None:
    for name, record in benchmark_records(results).items():
        write_text(Path(folder) / name, json.dumps(record, ensure_ascii=False) + "\n")


def write_csv(path: str | Path, results: Sequence[Result]) -> None:
    """A row for each model, data set and set of prompts; columns that do not apply are empty."""
    rows = []
    for result in results:
        row: dict[str, Any] = {
            "model": result.model,
            "library": result.library,
            "precision": result.precision,
            "dataset": result.data.name,
            "task": result.task,
            "prompts": prompts_label(result),
            "images": result.scores.num_images,
            "classes": len(result.scores.classnames) or None,
            **result.scores.values(),
        }
        for name, (low, high) in result.scores.intervals().items():
            row |= {f"{name}_low": low, f"{name}_high": high}
        if result.probes is not None:
            for task, values in result.probes.values().items():
                row |= {f"{task}_{name.removeprefix('lp_')}": value for name, value in values.items()}
        if result.outside is not None:
            row["none_of_these_auroc"] = result.outside.separation.auroc
        rows.append(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines: list[list[object]] = [[*columns], *([row.get(name) for name in columns] for row in rows)]
    write_text(path, "".join(csv_line(line) for line in lines))


def write_predictions(folder: str | Path, results: Sequence[Result]) -> list[Path]:
    """A Parquet file for each result: a row for each image, or for each text of retrieval, with what is known of it.

    Raises:
        ValueError: pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("predictions as Parquet need pyarrow: pip install 'miniclip[eval]'") from error
    paths = []
    for file_name, result in zip(_file_names(results), results, strict=True):
        table = pyarrow.table({name: _arrow(values) for name, values in result.scores.columns().items()})
        path = Path(folder) / f"{file_name}.parquet"
        with atomic_write(path) as file:
            pyarrow.parquet.write_table(table, file)
        paths.append(path)
    return paths


def _arrow(values: Any) -> Any:
    """A column; as texts what has no common type, or one that Parquet does not know."""
    import pyarrow

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):
        texts = [None if value is None else str(value) for value in values]
        # Names of files can hold bytes that are no UTF-8.
        return pyarrow.array(
            [None if text is None else text.encode("utf-8", "backslashreplace").decode() for text in texts]
        )
