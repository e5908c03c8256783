"""Two runs of an evaluation, compared result by result, with the significance of each change."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..common.arguments import FLOAT32
from ..common.storage import without_secrets
from ..common.wording import some
from ..evaluation.measures.statistics import Comparison, compare
from ..evaluation.zero_shot import ClassificationScores
from .results import RESULTS_FILE, SCHEMA

# ---------------------------------------------------------------------------------------------------------------------
# Two runs compared


@dataclass(frozen=True)
class Change:
    """One number of two runs on the same images.

    Args:
        metric: what was right or wrong of each: top-1, or rank 1 of a retrieval.
        unit, count: of what, "image" or "caption", and how many there are.
        comparison: the second less the first, with its interval and p-value.
        gained, lost: keys of those that only the second, and only the first, has right; a caption is known by its
            image, and by its number if that has several.
        by_class: (class, images, share first, share second), the largest changes first.
    """

    dataset: str
    task: str
    prompts: tuple[str, str]
    models: tuple[str, str]
    metric: str
    unit: str
    count: int
    shares: tuple[float, float]
    comparison: Comparison
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    by_class: tuple[tuple[str, int, float, float], ...] = ()


@dataclass(frozen=True)
class Compared:
    """Two runs.

    Args:
        changes: of the results that both have.
        left_out: a sentence for each result that is not compared, with the reason.
    """

    changes: tuple[Change, ...]
    left_out: tuple[str, ...]


def read(path: str | Path) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        ValueError: no such file, or not one of ours.
    """
    path = Path(path)
    path = path / RESULTS_FILE if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no file {path}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} is not a results.json that this version wrote (schema {schema!r}, not {SCHEMA})")
    return found


def compare_runs(first: str | Path, second: str | Path) -> Compared:
    """What changed from one results.json to another, on data sets that both have.

    Results are matched by data set and task; if a file has several of those (models, prompts), by model and prompts
    as well.

    Raises:
        ValueError: nothing in common, or the same data set with other images.
    """
    one, two = (read(path)["results"] for path in (first, second))
    changes: list[Change] = []
    left_out, matched = [], []
    for a in one:
        if (b := _counterpart(a, one, two)) is None:
            left_out.append(f"{_title(a)}: {second} has {_others(a, two)}")
            continue
        matched.append(b)
        found = _changes(a, b, str(first), str(second))
        changes += found
        if not found:
            left_out.append(f"{_title(a)}: images of several labels each are not right or wrong")
    unmatched = [b for b in two if not any(b is each for each in matched)]
    left_out += [f"{_title(b)}: {first} has {_others(b, one)}" for b in unmatched]
    if not changes:
        sets = [", ".join(dict.fromkeys(f"{r['dataset']} ({r['task']})" for r in each)) for each in (one, two)]
        raise ValueError(
            f"{first} and {second} have no results to compare: the first has {sets[0]}, the second {sets[1]}; images "
            "of several labels each are not right or wrong, so there is nothing to compare of them"
        )
    return Compared(tuple(changes), tuple(left_out))


def _title(result: dict[str, Any]) -> str:
    return ", ".join(filter(None, [f"{result['dataset']} ({result['task']})", _model(result), _label(result)]))


def _others(result: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """What a run has in place of a result's counterpart."""
    of_set = [each for each in results if all(each[name] == result[name] for name in ("dataset", "task"))]
    return f"{len(of_set)} of that set, and not one that matches it by model and prompts" if of_set else "no such set"


def _counterpart(a: dict[str, Any], one: list[dict[str, Any]], two: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The second run's result that corresponds to one of the first's."""

    def alike(results: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
        return [each for each in results if all(each.get(name) == a.get(name) for name in names)]

    same = ["dataset", "task"]
    if len(alike(one, *same)) > 1 or len(alike(two, *same)) > 1:
        for more in (["model", "templates"], ["templates"], ["model"]):
            if len(alike(one, *same, *more)) == 1 and len(alike(two, *same, *more)) == 1:
                return alike(two, *same, *more)[0]
        return None
    return next(iter(alike(two, *same)), None)


def _changes(a: dict[str, Any], b: dict[str, Any], first: str, second: str) -> list[Change]:
    if "samples" not in a or "samples" not in b:
        return []
    prompts = (_label(a) + _other_classes(a, b), _label(b) + _other_classes(b, a))
    which = (a["dataset"], a["task"], prompts, tuple(_model(each) for each in (a, b)))
    # Earlier versions wrote keys whole.
    x, y = ({**each["samples"], "keys": list(map(without_secrets, each["samples"]["keys"]))} for each in (a, b))
    if a["task"] != ClassificationScores.task:
        _refuse_others(x["keys"], y["keys"], a["dataset"], first, second)
        digests = [each.get("captions") for each in (x, y)]  # earlier versions wrote none
        if x["image_of_text"] != y["image_of_text"] or (all(digests) and digests[0] != digests[1]):
            raise ValueError(f"{a['dataset']} has other captions in {second} than in {first}")
        found, groups = [], np.array(x["groups"])
        captions, images = x["image_of_text"], sorted(set(x["image_of_text"]))
        image_keys = [x["keys"][row] for row in images]
        for name, unit, rows, keys in (
            ("image", "caption", captions, _caption_keys(x)),
            ("text", "image", images, image_keys),
        ):
            right = [np.array(each[f"ranks_of_{name}s"]) == 1 for each in (x, y)]
            found.append(_change(which, f"{name}_retrieval_recall@1", unit, right, keys, groups[rows]))
        return found
    _refuse_others(x["keys"], y["keys"], a["dataset"], first, second)
    names = [[each["classnames"][label] for label in each["samples"]["labels"]] for each in (a, b)]
    if x["labels"] != y["labels"] and names[0] != names[1]:
        raise ValueError(f"{a['dataset']} has other labels in {second} than in {first}")
    right = [np.array(each["labels"]) == np.array(each["guesses"]) for each in (x, y)]
    labels = np.array(x["labels"])
    by_class = [
        (a["classnames"][c], int((labels == c).sum()), *(float(each[labels == c].mean()) for each in right))
        for c in np.unique(labels)
    ]
    by_class.sort(key=lambda row: -abs(row[3] - row[2]) * row[1])
    return [_change(which, "acc1", "image", right, x["keys"], np.array(x["groups"]), tuple(by_class))]


def _caption_keys(samples: dict[str, Any]) -> list[str]:
    """What to call each caption of a retrieval, as results have no texts."""
    keys, num_captions, num_before = [], Counter(samples["image_of_text"]), Counter[int]()
    for image in samples["image_of_text"]:
        num_before[image] += 1
        keys.append(samples["keys"][image] + (f", caption {num_before[image]}" if num_captions[image] > 1 else ""))
    return keys


def _label(result: dict[str, Any]) -> str:
    return str(result.get("templates_from", ""))


def _other_classes(result: dict[str, Any], other: dict[str, Any]) -> str:
    """The classes that a result chose among, if the other's are not the same."""
    names = result.get("classnames", ())
    if names == (others := other.get("classnames", ())):
        return ""
    return f", {len(names)} classes ({some([name for name in names if name not in others] or list(names), 3)})"


def _model(result: dict[str, Any]) -> str:
    precision = result.get("precision", FLOAT32)  # earlier versions knew no other
    return str(result["model"]) + ("" if precision == FLOAT32 else f" in {precision}")


def _refuse_others(first_keys: list[str], second_keys: list[str], dataset: str, first: str, second: str) -> None:
    if first_keys != second_keys:
        common = len(set(first_keys) & set(second_keys))
        raise ValueError(
            f"{dataset} has {len(first_keys)} images in {first} and {len(second_keys)} in {second}, {common} of them "
            "the same; only the same images in the same order can be compared"
        )


def _change(
    which: tuple[Any, ...],
    metric: str,
    unit: str,
    right: list[np.ndarray],
    keys: list[str],
    groups: np.ndarray,
    by_class: tuple[Any, ...] = (),
) -> Change:
    found = compare(right[0], right[1], groups)
    dataset, task, prompts, models = which
    return Change(
        dataset,
        task,
        prompts,
        models,
        metric,
        unit,
        len(groups),
        (float(right[0].mean()), float(right[1].mean())),
        found,
        tuple(keys[row] for row in found.gained),
        tuple(keys[row] for row in found.lost),
        by_class,
    )
