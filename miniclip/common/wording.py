"""How numbers and lists read in messages, tables and pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# ---------------------------------------------------------------------------------------------------------------------
# Saying it


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share == 0 or share >= 0.001 else "less than 0.1 %"


def share_of(are: np.ndarray) -> float:
    return float(are.mean()) if len(are) else 0.0


def cut_short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def some(values: Sequence[str], most: int = 10) -> str:
    return ", ".join(map(repr, values[:most])) + (f" and {len(values) - most} more" if values[most:] else "")


def some_names(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
