"""What every kind of scores answers, so that results, tables and pages ask it and never which kind it is.

The kinds are `zero_shot.ClassificationScores` (one label an image), `multilabel.MultilabelScores` and
`retrieval.RetrievalScores`. A new measure is added in `measures/` and to the kind that it belongs to.

N images, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .measures.classification import Calibration, Confusion, most_confused
from .prompts import Prompts

# A cell of a table: a text, a count, a share of 1 (in columns that end in %), its interval, or nothing.
Cell = str | int | float | tuple[float, float] | None


class Scores(ABC):
    """A model's scores on a data set.

    Args:
        data: what was evaluated.
        indices: (N,) which of the data's images could be read, in order.
        unreadable: why the other images could not be read.
        same_prompts: groups of classes that can't be told apart, as their prompts are the same.
        task: as results.json calls it; `benchmark_task` as CLIP_benchmark does.
        main_column: the column of `rows` to look at first.
        headlines: the label of each value that the page draws as a bar.
        bars_title, gallery_note: what `bars` are, and what to know about the guesses in `galleries`.
    """

    data: Any
    indices: np.ndarray
    unreadable: tuple[str, ...]
    same_prompts: tuple[tuple[str, ...], ...] = ()
    task: ClassVar[str]
    main_column: ClassVar[str]
    headlines: ClassVar[Mapping[str, str]]
    bars_title: ClassVar[str] = ""
    gallery_note: ClassVar[str] = ""

    @abstractmethod
    def values(self) -> dict[str, float]:
        """Every measure by its name: CLIP_benchmark's where it has one. Shares are of 1."""

    def intervals(self) -> dict[str, tuple[float, float]]:
        """The 95 % intervals of those that have one."""
        return {}

    @abstractmethod
    def rows(self) -> list[dict[str, Cell]]:
        """The rows of a table of scores, without what all kinds have (data, model, prompts, images)."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """What results.json keeps beside `values` and `intervals`."""

    @abstractmethod
    def columns(self) -> dict[str, Any]:
        """A table of predictions: a row for each image, or for each text."""

    def bars(self) -> list[Bar]:
        """The classes from worst to best."""
        return []

    def galleries(self) -> list[Gallery]:
        """Examples of images with their guesses."""
        return []

    def queries(self) -> list[Queries]:
        """Examples of what was found by what."""
        return []

    @property
    def confusion(self) -> Confusion | None:
        return None

    def confused_pairs(self, most: int = 10) -> list[tuple[str, str, int]]:
        """(true class, guessed class, images), the most frequent mistakes first."""
        pairs = [] if self.confusion is None else most_confused(self.confusion, most)
        return [(self.classnames[true], self.classnames[guess], count) for true, guess, count in pairs]

    @property
    def calibration(self) -> Calibration | None:
        return None

    @property
    def classnames(self) -> tuple[str, ...]:
        return ()

    @property
    def prompts(self) -> Prompts:
        return ()

    @property
    def groups(self) -> np.ndarray:
        """(N,) of those images."""
        return np.array(self.data.groups)[self.indices]

    @property
    def num_images(self) -> int:
        return len(self.data) - len(self.unreadable)

    @property
    def benchmark_task(self) -> str:
        return self.task

    def benchmark_values(self) -> dict[str, float]:
        """`values`, without those that CLIP_benchmark has no number for."""
        return self.values()


class ClassScores(Scores):
    """Scores of images against classes that prompts describe."""

    @property
    def classnames(self) -> tuple[str, ...]:
        return self.data.classnames

    @property
    def prompts(self) -> Prompts:
        return self.data.templates

    def as_dict(self) -> dict[str, Any]:
        data, prompts = self.data, self.prompts
        return {
            "classnames": list(data.classnames),
            "classnames_from": data.classnames_from,
            "templates": {name: list(each) for name, each in prompts.items()}
            if isinstance(prompts, Mapping)
            else [str(template) for template in prompts],
            "templates_from": data.templates_from,
            "same_prompts": [list(names) for names in self.same_prompts],
        }

    def with_metadata(self, columns: dict[str, Any]) -> dict[str, Any]:
        """`columns` of the predictions, followed by those of the data's metadata."""
        for name, values in self.data.metadata.items():
            columns[name if name not in columns else f"metadata_{name}"] = [values[index] for index in self.indices]
        return columns


# ---------------------------------------------------------------------------------------------------------------------
# Examples for a page, which adds the pictures


@dataclass(frozen=True)
class Bar:
    """A class: how many images it has, and its score with the interval, if there is one."""

    name: str
    images: int
    share: float
    interval: tuple[float, float] | None = None


def worst_first(
    names: Sequence[str], images: np.ndarray, shares: np.ndarray, intervals: np.ndarray | None = None
) -> list[Bar]:
    """Bars of the classes that have images."""
    bars = [
        Bar(name, int(images[c]), float(shares[c]), None if intervals is None else tuple(intervals[c]))
        for c, name in enumerate(names)
        if images[c]
    ]
    return sorted(bars, key=lambda bar: bar.share)


@dataclass(frozen=True)
class Guess:
    """One guess: the value as printed, and the length of its bar as a share of 1."""

    name: str
    value: str
    share: float
    is_right: bool


@dataclass(frozen=True)
class Example:
    """An image of the data, by its index, with what it is and what it was taken for."""

    index: int
    label: str
    guesses: tuple[Guess, ...]
    is_wrong: bool


@dataclass(frozen=True)
class Gallery:
    kind: str
    title: str
    examples: list[Example]


@dataclass(frozen=True)
class Found:
    """An image, by its index, or a text."""

    index: int | None
    text: str
    is_own: bool = False


@dataclass(frozen=True)
class Query:
    """What was asked, the rank of its own best, and what was found first; `is_cut` where ranks between are left out."""

    asked: Found
    rank: int
    found: list[Found]
    is_cut: bool


@dataclass(frozen=True)
class Queries:
    kind: str
    title: str
    queries: list[Query]


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of the rows, evenly spaced."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))]
