"""Results as files: JSON of ours and of CLIP_benchmark's, CSV, Parquet.

Shares are of 1 in all files."""

from __future__ import annotations

import csv
import datetime
import io
import json
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import as_plain, atomic_write, write_text
from ..common.version import __version__
from ..evaluation.measures.classification import Multilabel, Subgroups, most_confused
from ..evaluation.prompts import Prompts
from ..evaluation.retrieval import RetrievalScores
from ..evaluation.robustness import Robustness
from ..evaluation.suite import CLASSIFICATION, Probes, Result
from ..evaluation.zero_shot import Metrics, MultilabelScores, Scores

RESULTS_FILE, TABLE_FILE, PREDICTIONS_FOLDER, BENCHMARK_FOLDER = (
    "results.json",
    "results.csv",
    "predictions",
    "clip_benchmark",
)
SCHEMA = 2
_MOST_CONFUSION_CLASSES = 200  # beyond, JSON keeps the confused pairs alone
_MOST_BYTES = 60  # of each part of a file's name, which has three and may have 255


def metric_values(result: Result) -> dict[str, float]:
    """Every number by its name: CLIP_benchmark's where it has one."""
    metrics = result.metrics
    if isinstance(metrics, Metrics):
        values = {f"acc{k}": share for k, share in metrics.top_k.items()}
        values |= {"mean_per_class_recall": metrics.mean_per_class_recall, "macro_f1": metrics.macro_f1}
        return values | {"calibration_error": metrics.calibration.error}
    if isinstance(metrics, Multilabel):
        return {"mean_average_precision": metrics.mean_average_precision}
    values = {}
    for name, ranking in (("image", metrics.images), ("text", metrics.texts)):
        values |= {f"{name}_retrieval_recall@{k}": share for k, share in ranking.recall.items()}
        values |= {f"{name}_retrieval_map@{k}": share for k, share in ranking.mean_average_precision.items()}
        values[f"{name}_retrieval_median_rank"] = ranking.median_rank
    return values


def intervals(result: Result) -> dict[str, tuple[float, float]]:
    """95 % intervals, of the numbers that have one."""
    if isinstance(result.metrics, Metrics):
        return {"acc1": result.metrics.interval}
    if isinstance(result.scores, RetrievalScores):
        scores = result.scores
        return {"image_retrieval_recall@1": scores.interval_images, "text_retrieval_recall@1": scores.interval_texts}
    return {}


def probe_values(probes: Probes) -> dict[str, dict[str, float]]:
    """By task, as `metric_values`; the linear probe's names are CLIP_benchmark's."""
    linear, tip = probes.linear.outcome, probes.tip_adapter
    return {
        "linear_probe": {
            "lp_acc1": linear.accuracy,
            "lp_mean_per_class_recall": float(np.nanmean(linear.per_class)),
            "C": probes.linear.C,
        },
        "nearest_neighbours": {"acc1": probes.neighbours.accuracy, "neighbours": probes.num_neighbours},
        "tip_adapter": {"acc1": tip.outcome.accuracy, "alpha": tip.alpha, "beta": tip.beta},
    }


def confused_pairs(result: Result, most: int = 10) -> list[tuple[str, str, int]]:
    """(true class, guessed class, images), the most frequent mistakes first."""
    assert isinstance(result.metrics, Metrics)
    names = result.data.classnames
    return [(names[row], names[column], count) for row, column, count in most_confused(result.metrics.confusion, most)]


def prompts_label(result: Result) -> str:
    """What the prompts are called, short: a built-in set's name, or the file's."""
    where = getattr(result.data, "templates_from", "")
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
        "results": [_result_as_dict(result) for result in results],
        "robustness": None if robustness is None else robustness.as_dict(),
    }


def _result_as_dict(result: Result) -> dict[str, Any]:
    data = result.data
    found = {
        "model": result.model,
        "library": result.library,
        "dataset": data.name,
        "task": result.task,
        "num_images": result.num_images,
        "unreadable": list(result.scores.unreadable),
        "metrics": metric_values(result),
        "intervals_95": {name: list(interval) for name, interval in intervals(result).items()},
        "logit_scale": result.logit_scale,
        "seconds": round(result.seconds, 2),
    }
    if isinstance(result.scores, RetrievalScores):
        return found | _retrieval_as_dict(result.scores)
    found |= {
        "classnames": list(data.classnames),
        "classnames_from": data.classnames_from,
        "templates": _plain_prompts(data.templates),
        "templates_from": data.templates_from,
        "same_prompts": [list(names) for names in result.same_prompts],
    }
    if isinstance(result.scores, MultilabelScores):
        return found | _multilabel_as_dict(result)
    return found | _classification_as_dict(result)


def _plain_prompts(prompts: Prompts) -> Any:
    if isinstance(prompts, Mapping):
        return {name: list(each) for name, each in prompts.items()}
    return [str(template) for template in prompts]


def _classification_as_dict(result: Result) -> dict[str, Any]:
    scores, metrics = result.scores, result.metrics
    assert isinstance(scores, Scores)
    assert isinstance(metrics, Metrics)
    names, table, calibration = scores.data.classnames, metrics.per_class, metrics.calibration
    return {
        "per_class": [
            {
                "class": name,
                "images": int(table.images[c]),
                "guessed": int(table.guessed[c]),
                "recall": as_plain(table.recall[c]),
                "precision": as_plain(table.precision[c]),
                "f1": as_plain(table.f1[c]),
                "recall_interval_95": [as_plain(end) for end in table.recall_intervals[c]],
            }
            for c, name in enumerate(names)
        ],
        "confused_pairs": [
            {"class": true, "guess": guess, "images": count} for true, guess, count in confused_pairs(result)
        ],
        "confusion": metrics.confusion.tolist() if len(names) <= _MOST_CONFUSION_CLASSES else None,
        "calibration": {
            "error": calibration.error,
            "largest_error": calibration.largest_error,
            "edges": calibration.edges.tolist(),
            "images": calibration.images.tolist(),
            "confidence": [as_plain(value) for value in calibration.confidence],
            "accuracy": [as_plain(value) for value in calibration.accuracy],
        },
        "subgroups": {column: _subgroups_as_dict(found) for column, found in result.subgroups.items()},
        "none_of_these": None if result.outside is None else _outside_as_dict(result),
        "probes": None if result.probes is None else _probes_as_dict(result.probes),
        "samples": {
            "keys": [scores.data.key(number) for number in scores.numbers],
            "labels": scores.labels.tolist(),
            "guesses": scores.ranked[:, 0].tolist(),
            "cosines": [round(float(value), 6) for value in scores.cosines[:, 0]],
            "probabilities": [round(float(value), 6) for value in scores.probabilities[:, 0]],
            "groups": scores.groups.tolist(),
        },
    }


def _subgroups_as_dict(found: Subgroups) -> dict[str, Any]:
    return {
        "gap": found.gap,
        "best": None if found.best is None else found.best.value,
        "worst": None if found.worst is None else found.worst.value,
        "subgroups": [
            {
                "value": None if each.value is None else str(each.value),
                "images": each.num_images,
                "groups": each.num_groups,
                "acc1": each.accuracy,
                "interval_95": list(each.interval),
                "is_too_small": each.is_too_small,
            }
            for each in found.subgroups
        ],
    }


def _outside_as_dict(result: Result) -> dict[str, Any]:
    outside = result.outside
    assert outside is not None
    separation, acceptance, threshold = outside.separation, outside.acceptance, outside.acceptance.threshold
    return {
        "outside": outside.name,
        "cosine": threshold.cosine,
        "rule": threshold.rule,
        "chosen_on": {"images_inside": threshold.num_inside, "images_outside": threshold.num_outside},
        "tried_on": {"images_inside": acceptance.num_inside, "images_outside": acceptance.num_outside},
        "accepted_inside": acceptance.accepted_inside,
        "accepted_outside": acceptance.accepted_outside,
        "interval_95_inside": list(acceptance.interval_inside),
        "interval_95_outside": list(acceptance.interval_outside),
        "balanced_accuracy": acceptance.balanced_accuracy,
        "auroc": separation.auroc,
        "aupr_inside": separation.aupr_inside,
        "aupr_outside": separation.aupr_outside,
        "fpr_at_95_tpr": separation.fpr_at_95_tpr,
    }


def _probes_as_dict(probes: Probes) -> dict[str, Any]:
    outcomes = {
        "linear_probe": probes.linear.outcome,
        "nearest_neighbours": probes.neighbours,
        "tip_adapter": probes.tip_adapter.outcome,
    }
    return {
        "train": probes.train,
        "num_train": len(probes.splits.train),
        "num_validation": len(probes.splits.validation),
        "num_leaked": probes.splits.num_leaked,
        "linear_probe_features": "before the projection" if probes.is_pooled else "after the projection",
        **{
            task: {**values, "interval_95": list(outcomes[task].interval)}
            for task, values in probe_values(probes).items()
        },
        "shot_curve": probes.curve.as_dict(),
    }


def _multilabel_as_dict(result: Result) -> dict[str, Any]:
    metrics = result.metrics
    assert isinstance(metrics, Multilabel)
    return {
        "per_class": [
            {"class": name, "images": int(positives), "average_precision": as_plain(precision)}
            for name, positives, precision in zip(
                result.data.classnames, metrics.positives, metrics.per_class, strict=True
            )
        ]
    }


def _retrieval_as_dict(scores: RetrievalScores) -> dict[str, Any]:
    images, texts = scores.metrics.images, scores.metrics.texts
    keys = [scores.data.key(number) for number in scores.images.numbers]
    return {
        "num_texts": len(scores.captions),
        "samples": {
            "keys": keys,
            "image_of_text": scores.image_of_text.tolist(),
            "ranks_of_images": images.ranks.tolist(),  # of each text
            "ranks_of_texts": texts.ranks.tolist(),  # of each image
            "groups": [scores.data.groups[number] for number in scores.images.numbers],
        },
    }


def write_json(path: str | Path, results: Sequence[Result], robustness: Robustness | None = None) -> None:
    text = json.dumps(as_dict(results, robustness), ensure_ascii=False, indent=1, allow_nan=False)
    # Numbers of the samples in one line each list, as nobody reads them one by one. No text holds the end of a line.
    write_text(path, re.sub(r"\[\n\s*([^\[\]{}\"]*?)\n\s*\]", _in_one_line, text) + "\n")


def _in_one_line(found: re.Match[str]) -> str:
    return "[" + re.sub(r"\s+", " ", found[1]) + "]"


# ---------------------------------------------------------------------------------------------------------------------
# Others' formats


def _file_names(results: Sequence[Result]) -> list[str]:
    """Without an ending; those that would be the same get a number. Of long parts, as paths are, the end tells most."""
    names: list[str] = []
    for result in results:
        parts = [result.data.name, result.model, prompts_label(result)]
        short = [re.sub(r"[^\w.@-]+", "-", part).encode()[-_MOST_BYTES:].decode("utf-8", "ignore") for part in parts]
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
        values = metric_values(result)
        few = [f"acc{k}" for k in getattr(result.metrics, "top_k", ()) if k > len(result.data.classnames)]
        by_task = {result.task: {name: value for name, value in values.items() if name not in few}}  # NaN to it
        if result.probes is not None:
            by_task["linear_probe"] = probe_values(result.probes)["linear_probe"]
        for task, values in by_task.items():
            task = CLASSIFICATION if task == "zeroshot_multilabel" else task
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
            "dataset": result.data.name,
            "task": result.task,
            "prompts": prompts_label(result),
            "images": result.num_images,
            "classes": len(getattr(result.data, "classnames", ())) or None,
            **metric_values(result),
        }
        for name, (low, high) in intervals(result).items():
            row |= {f"{name}_low": low, f"{name}_high": high}
        if result.probes is not None:
            for task, values in probe_values(result.probes).items():
                row |= {f"{task}_{name.removeprefix('lp_')}": value for name, value in values.items()}
        if result.outside is not None:
            row["none_of_these_auroc"] = result.outside.separation.auroc
        rows.append(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


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
        columns = _prediction_columns(result)
        table = pyarrow.table({name: _arrow(values) for name, values in columns.items()})
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


def _prediction_columns(result: Result) -> dict[str, Any]:
    scores, data = result.scores, result.data
    if isinstance(scores, RetrievalScores):
        places = dict(zip(scores.metrics.texts.queries.tolist(), scores.metrics.texts.ranks.tolist(), strict=True))
        return {
            "image": [data.key(scores.images.numbers[row]) for row in scores.image_of_text],
            "caption": list(scores.captions),
            "rank_of_image": scores.metrics.images.ranks,
            "rank_of_texts": [places[row] for row in scores.image_of_text.tolist()],
        }
    names = np.array(data.classnames, dtype=object)
    columns: dict[str, Any] = {"image": [data.key(number) for number in scores.numbers]}
    if isinstance(scores, MultilabelScores):
        columns["labels"] = [names[row].tolist() for row in scores.labels]
        columns["cosines"] = list(scores.cosines)
    else:
        columns |= {
            "label": names[scores.labels].tolist(),
            "guess": names[scores.ranked[:, 0]].tolist(),
            "is_right": scores.is_right,
            "cosine": scores.cosines[:, 0],
            "probability": scores.probabilities[:, 0],
            "guesses": [names[row].tolist() for row in scores.ranked],
            "cosines": list(scores.cosines),
            "probabilities": list(scores.probabilities),
            "group": scores.groups.tolist(),
        }
    for name, values in data.metadata.items():
        columns[name if name not in columns else f"metadata_{name}"] = [values[number] for number in scores.numbers]
    return columns
