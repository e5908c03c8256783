"""The examples of a kind of scores -> what the page's template shows: their pictures, with names and guesses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..common.pictures import thumbnail
from ..evaluation.scores import Example, Found, Scores

BOX = (112, 112)  # pixels of a thumbnail


class Heat(NamedTuple):
    """A picture with a map of what spoke for a guess: its `data:` URL, and how the map was checked, in words."""

    picture: str
    guess: str
    check: str


# A data set, the index of an image, the name of a class -> the map.
HeatOf = Callable[[Any, int, str], Heat]


class Thumbnails:
    """Small pictures of a data set's images, each read once for all models and prompts."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], str] = {}

    def __call__(self, data: Any, index: int) -> str:
        key = id(data.images), index
        if key not in self._made:
            self._made[key] = thumbnail(data.open(index), BOX)
        return self._made[key]


def galleries(scores: Scores, thumbnails: Thumbnails, heat_of: HeatOf | None = None) -> list[dict[str, Any]]:
    """
    Args:
        heat_of: makes maps of the first guesses of images that were taken for something else.

    Raises:
        ValueError: an image can't be read any more.
    """

    def figure(each: Example, kind: str) -> dict[str, Any]:
        heat = heat_of(scores.data, each.index, each.guesses[0].name) if heat_of and kind == "wrong" else None
        shown = {"label": each.label, "guesses": each.guesses, "is_wrong": each.is_wrong, "heat": heat}
        return _picture(scores.data, each.index, thumbnails) | shown

    return [
        {
            "kind": gallery.kind,
            "title": gallery.title,
            "figures": [figure(each, gallery.kind) for each in gallery.examples],
        }
        for gallery in scores.galleries()
    ]


def queries(scores: Scores, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """
    Raises:
        ValueError: an image can't be read any more.
    """

    def shown(found: Found) -> dict[str, Any]:
        if found.index is None:
            return {"text": found.text, "is_own": found.is_own}
        return _picture(scores.data, found.index, thumbnails) | {"is_own": found.is_own}

    return [
        {
            "kind": part.kind,
            "title": part.title,
            "queries": [
                shown(each.asked)
                | {"rank": each.rank, "found": [shown(found) for found in each.found], "is_cut": each.is_cut}
                for each in part.queries
            ],
        }
        for part in scores.queries()
    ]


def _picture(data: Any, index: int, thumbnails: Thumbnails) -> dict[str, Any]:
    return {"picture": thumbnails(data, index), "name": data.shown(index).rpartition("/")[2]}
