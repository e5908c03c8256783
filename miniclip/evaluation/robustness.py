"""How much accuracy shifts cost: a standard set beside its shifted versions (Taori et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.files import as_plain
from .measures.statistics import RobustnessFit, effective_robustness, fit_robustness
from .suite import Result

# ---------------------------------------------------------------------------------------------------------------------
# Robustness: a family of shifted sets


@dataclass(frozen=True)
class RobustnessRow:
    """Top-1 of a model on the standard set and on each shifted one, and how far those exceed the baselines' line."""

    model: str
    is_baseline: bool
    standard: float
    shifted: tuple[float, ...]
    effective: tuple[float | None, ...]

    @property
    def mean_shifted(self) -> float:
        return float(np.mean(self.shifted))


@dataclass(frozen=True)
class Robustness:
    """
    Args:
        shifted: names of the shifted sets.
        fits: the baselines' line for each; None without at least two baselines of different accuracy.
    """

    standard: str
    shifted: tuple[str, ...]
    rows: tuple[RobustnessRow, ...]
    fits: tuple[RobustnessFit | None, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "standard": self.standard,
            "shifted": list(self.shifted),
            "baselines": [row.model for row in self.rows if row.is_baseline],
            "lines": {  # logit(shifted) = slope · logit(standard) + intercept
                name: None if fit is None else {"slope": fit.slope, "intercept": fit.intercept, "r2": as_plain(fit.r2)}
                for name, fit in zip(self.shifted, self.fits, strict=True)
            },
            "rows": [
                {
                    "model": row.model,
                    "standard_acc1": row.standard,
                    "shifted_acc1": dict(zip(self.shifted, row.shifted, strict=True)),
                    "mean_shifted_acc1": row.mean_shifted,
                    "drop": row.standard - row.mean_shifted,
                    "effective_robustness": dict(zip(self.shifted, row.effective, strict=True)),
                }
                for row in self.rows
            ],
        }


def robustness(results: Sequence[Result], standard: str, baselines: Sequence[str] = ()) -> Robustness:
    """One model after another on a standard set and its shifted relatives (Taori et al. 2020).

    Args:
        results: of classification; the first of several sets of prompts counts.
        standard: name of the data set that the others are shifts of.
        baselines: names of the models whose line gives the accuracy to expect under a shift.

    Raises:
        ValueError: the standard set or a baseline is not among the results, or nothing else is.
    """
    accuracy: dict[tuple[str, str], float] = {}
    for result in results:
        if (acc1 := result.scores.values().get("acc1")) is not None:
            accuracy.setdefault((result.model, result.data.name), acc1)
    models = list(dict.fromkeys(model for model, _ in accuracy))
    sets = list(dict.fromkeys(name for _, name in accuracy))
    if standard not in sets:
        raise ValueError(f"the standard set {standard!r} was not evaluated; there are {', '.join(sets)}")
    shifted = tuple(name for name in sets if name != standard)
    if not shifted:
        raise ValueError(f"{standard!r} is the only set; robustness needs shifted ones beside it")
    if unknown := [name for name in baselines if name not in models]:
        raise ValueError(f"the baseline {unknown[0]!r} was not evaluated; there are {', '.join(models)}")
    fits: list[RobustnessFit | None] = []
    for name in shifted:
        x = np.array([accuracy[model, standard] for model in baselines])
        y = np.array([accuracy[model, name] for model in baselines])
        is_line = len(np.unique(x)) > 1 and x.min() > 0 and x.max() < 1 and y.min() > 0 and y.max() < 1
        fits.append(fit_robustness(x, y) if is_line else None)
    rows = []
    for model in models:
        at_standard, at_shifted = accuracy[model, standard], tuple(accuracy[model, name] for name in shifted)
        effective = tuple(
            None
            if fit is None or not 0 < at_standard < 1
            else float(effective_robustness(fit, np.array([at_standard]), np.array([share]))[0])
            for fit, share in zip(fits, at_shifted, strict=True)
        )
        rows.append(RobustnessRow(model, model in baselines, at_standard, at_shifted, effective))
    return Robustness(standard, shifted, tuple(rows), tuple(fits))
