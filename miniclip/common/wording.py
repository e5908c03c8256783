"""How numbers and lists read in messages, tables and pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def percent(share: float) -> str:
    """The number alone, for a column or an axis that says %."""
    return f"{100 * share:.1f}"


def portion(share: float) -> str:
    return f"{percent(share)} %" if share == 0 or share >= 0.001 else "less than 0.1 %"


def share_of(are: np.ndarray) -> float:
    return float(are.mean()) if len(are) else 0.0


def cut_short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
