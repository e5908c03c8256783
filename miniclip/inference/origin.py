"""What lies with a model besides its weights: the run that trained it, its scores, its threshold."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ..common.wording import some
from ..reports.results import RESULTS_FILE, SCHEMA
from ..reports.runs import Run, read_run
from .thresholds import FILE as THRESHOLD_FILE
from .thresholds import ModelThreshold, read_threshold


@dataclass(frozen=True)
class Origin:
    """What is known of a model besides its weights.

    Args:
        name: of the model, as the heading has it.
        run: the run that trained it.
        settings: of that run.
        results: of results.json, those of this model.
        threshold: of its threshold.json.
    """

    name: str
    run: Run | None = None
    settings: Mapping[str, Any] | None = None
    results: tuple[Mapping[str, Any], ...] = ()
    threshold: ModelThreshold | None = None


def read_origin(model: str | Path, results: Sequence[str | Path] = ()) -> Origin:
    """What lies with a model: RUN/best and RUN/checkpoints/*.ckpt have the run and its report/results.json beside them.

    Args:
        model: as `miniclip.load` takes it.
        results: files, or folders, that `miniclip eval --out` wrote; by default the run's report.

    Raises:
        ValueError: `results` are not results of this model, or are older than its weights.
    """
    path = Path(model)
    folder = path if path.is_dir() else path.parent
    found_run = _run_of(path)
    threshold_file = folder / THRESHOLD_FILE
    threshold = read_threshold(threshold_file) if path.is_dir() and threshold_file.is_file() else None
    origin = Origin(_model_name(path), threshold=threshold)
    if found_run is not None:
        origin = replace(origin, run=found_run, settings=found_run.settings)
    if results:
        return replace(origin, results=tuple(each for file in results for each in _results_of(Path(file), path)))
    report = folder.parent / "report" / RESULTS_FILE
    if found_run is None or not report.is_file():
        return origin
    try:
        return replace(origin, results=tuple(_results_of(report, path)))
    except ValueError as error:
        warnings.warn(f"the card has no scores: {error}", stacklevel=2)
        return origin


def _model_name(path: Path) -> str:
    unnamed = ("/", ".", "..", "runs", "best", "checkpoints", Path.home().name)
    parts = [part for part in path.parts if part not in unnamed]
    return parts[-1] if parts else "CLIP"


def _run_of(model: Path) -> Run | None:
    if not model.exists():
        return None
    model = model.resolve()
    folder = model.parent.parent if model.parent.name == "checkpoints" else model.parent
    return read_run(folder) if (folder / "logs").is_dir() else None


def _results_of(file: Path, model: Path) -> list[Mapping[str, Any]]:
    file = file / RESULTS_FILE if file.is_dir() else file
    try:
        content = json.loads(file.read_bytes())
        schema, created, results = content["schema"], datetime.fromisoformat(content["created"]), content["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a results.json that miniclip eval wrote: {error}") from error
    if schema != SCHEMA:
        raise ValueError(f"{file} has schema {schema!r}, and this version reads {SCHEMA}; run `miniclip eval` again")
    own = [each for each in results if _is_same(each["model"], model)]
    if not own:
        names = some(sorted({each["model"] for each in results}))
        raise ValueError(f"{file} has no scores of {model}; it has those of {names}")
    weights = model if model.is_file() else model / "model.safetensors"
    if weights.is_file() and weights.stat().st_mtime > created.timestamp() + 1:
        raise ValueError(
            f"{file} is older than {weights}, so its scores are of other weights; run `miniclip eval` again"
        )
    return own


def _is_same(name: str, model: Path) -> bool:
    """A result's model is named as the command line of `eval` had it, so its path counts from where that ran."""
    if name == str(model):
        return True
    named, resolved = Path(name), model.resolve()
    if named.is_absolute():
        return named.resolve() == resolved
    return resolved.parts[-len(named.parts) :] == named.parts
