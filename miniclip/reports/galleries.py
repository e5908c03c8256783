"""The examples of a kind of scores -> what the page's template shows: their pictures, with names and guesses."""

from __future__ import annotations

from typing import Any

from ..common.thumbnail import thumbnail
from ..evaluation.scores import Found, Scores

_BOX = (112, 112)  # pixels of a thumbnail


class Thumbnails:
    """Small pictures of a data set's images, each read once for all models and prompts."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], str] = {}

    def __call__(self, data: Any, index: int) -> str:
        key = id(data.images), index
        if key not in self._made:
            self._made[key] = thumbnail(data.open(index), _BOX)
        return self._made[key]


def galleries(scores: Scores, thumbnails: Thumbnails) -> list[dict[str, Any]]:
    """
    Raises:
        ValueError: an image can't be read any more.
    """
    return [
        {
            "kind": gallery.kind,
            "title": gallery.title,
            "figures": [
                _picture(scores.data, each.index, thumbnails)
                | {"label": each.label, "guesses": each.guesses, "is_wrong": each.is_wrong}
                for each in gallery.examples
            ],
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
    return {"picture": thumbnails(data, index), "name": data.key(index).rpartition("/")[2]}
