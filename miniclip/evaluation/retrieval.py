"""Zero-shot retrieval: captions find images and images find captions.

N images, T texts, E embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..data.wordings.equal_captions import same_caption
from .datasets.sets import CaptionedImages, digest_lines
from .features import ImageFeatures
from .measures.ranking import Ranking, Retrieval, retrieval
from .measures.statistics import wilson_interval
from .scores import Cell, Found, Queries, Query, Scores, spread

_QUERIES = 8  # examples of a kind
_FOUND = 5  # shown of each


def retrieve(
    images: ImageFeatures, data: CaptionedImages, texts: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> RetrievalScores:
    """Ranks of images by texts, and of texts by images. Images of one caption are all right answers to it.

    Args:
        images: of `data`.
        texts: features (T, E) of all of its captions, image after image. Those of unreadable images don't count.
    """
    counts = np.array([len(each) for each in data.captions])
    is_readable = np.isin(np.arange(len(counts)), images.indices)
    texts = texts[torch.from_numpy(np.repeat(is_readable, counts))]
    captions = tuple(text for index in images.indices for text in data.captions[index])
    owner = np.repeat(np.arange(len(images.indices)), counts[images.indices])
    same = [same_caption(text) for text in captions]
    found = retrieval(images.features.to(texts.device), texts, owner, ks, same)
    groups = np.array(data.groups)[images.indices]
    return RetrievalScores(
        data,
        images.indices,
        images.unit,
        texts.cpu(),
        captions,
        owner,
        found,
        wilson_interval(found.images.ranks == 1, groups[owner]),
        wilson_interval(found.texts.ranks == 1, groups[found.texts.queries]),
        images.unreadable,
    )


@dataclass(frozen=True)
class RetrievalScores(Scores):
    """
    Args:
        images: (N, E) unit features of the images that could be read.
        texts: (T, E) unit features of their captions.
        captions: T of them.
        image_of_text: (T,) rows of `images`.
        metrics: both directions, with the intervals of R@1.
        interval_images, interval_texts: of finding images by texts, and texts by images.
    """

    data: CaptionedImages
    indices: np.ndarray
    images: Tensor
    texts: Tensor
    captions: tuple[str, ...]
    image_of_text: np.ndarray
    metrics: Retrieval
    interval_images: tuple[float, float]
    interval_texts: tuple[float, float]
    unreadable: tuple[str, ...]

    task = "zeroshot_retrieval"
    main_column = "R@1 %"
    headlines: ClassVar = {f"{name}_retrieval_recall@1": f"{name}s, R@1" for name in ("image", "text")}

    def values(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, ranking in (("image", self.metrics.images), ("text", self.metrics.texts)):
            values |= {f"{name}_retrieval_recall@{k}": share for k, share in ranking.recall.items()}
            values |= {f"{name}_retrieval_map@{k}": share for k, share in ranking.mean_average_precision.items()}
            values[f"{name}_retrieval_median_rank"] = ranking.median_rank
        return values

    def intervals(self) -> dict[str, tuple[float, float]]:
        return {"image_retrieval_recall@1": self.interval_images, "text_retrieval_recall@1": self.interval_texts}

    def rows(self) -> list[dict[str, Cell]]:
        """One for each direction."""
        found = {
            "images by text": (self.metrics.images, self.interval_images),
            "texts by image": (self.metrics.texts, self.interval_texts),
        }
        return [
            {"texts": len(self.captions), "find": what, **_ranking_cells(ranking, interval)}
            for what, (ranking, interval) in found.items()
        ]

    def as_dict(self) -> dict[str, Any]:
        return {
            "num_texts": len(self.captions),
            "samples": {
                "keys": self.data.shown_keys(self.indices),
                "image_of_text": self.image_of_text.tolist(),
                "captions": digest_lines(self.captions),
                "ranks_of_images": self.metrics.images.ranks.tolist(),  # of each text
                "ranks_of_texts": self.metrics.texts.ranks.tolist(),  # of each image
                "groups": self.groups.tolist(),
            },
        }

    def columns(self) -> dict[str, Any]:
        texts = self.metrics.texts
        rank_of_texts = dict(zip(texts.queries.tolist(), texts.ranks.tolist(), strict=True))
        return {
            "image": [self.data.shown(self.indices[row]) for row in self.image_of_text],
            "caption": list(self.captions),
            "rank_of_image": self.metrics.images.ranks,
            "rank_of_texts": [rank_of_texts[row] for row in self.image_of_text.tolist()],
        }

    def queries(self) -> list[Queries]:
        """Captions with the images found first, and images with the captions: where it failed most, then where not."""
        same = [same_caption(text) for text in self.captions]
        own_texts: dict[int, set[str]] = {}
        for row, text in zip(self.image_of_text.tolist(), same, strict=True):
            own_texts.setdefault(row, set()).add(text)

        def images_of(text: int, rank: int) -> Query:
            similar = (self.images @ self.texts[text]).numpy()
            is_own = np.array([same[text] in own_texts.get(row, ()) for row in range(len(similar))])
            found = [Found(int(self.indices[row]), "", bool(is_own[row])) for row in _first(similar, is_own)]
            return Query(Found(None, self.captions[text]), rank, found, len(found) > _FOUND)

        def texts_of(image: int, rank: int) -> Query:
            similar = (self.texts @ self.images[image]).numpy()
            is_own = np.array([each in own_texts[image] for each in same])
            found = [Found(None, self.captions[row], bool(is_own[row])) for row in _first(similar, is_own)]
            return Query(Found(int(self.indices[image]), ""), rank, found, len(found) > _FOUND)

        parts = []
        for kind, title, ranking, ask in (
            ("image", "Images found by captions", self.metrics.images, images_of),
            ("text", "Captions found by images", self.metrics.texts, texts_of),
        ):
            worst = np.argsort(-ranking.ranks, kind="stable")
            worst = worst[ranking.ranks[worst] > 1][:_QUERIES]
            best = spread(np.flatnonzero(ranking.ranks == 1), _QUERIES // 2)
            queries = [ask(int(ranking.queries[i]), int(ranking.ranks[i])) for i in (*worst, *best)]
            parts.append(Queries(kind, f"{title}, worst first", queries))
        return parts


def _ranking_cells(ranking: Ranking, interval: tuple[float, float]) -> dict[str, Cell]:
    cells: dict[str, Cell] = {}
    for k, share in ranking.recall.items():
        cells[f"R@{k} %"] = share
        if k == 1:
            cells["95 % interval"] = interval
    most = max(ranking.mean_average_precision)
    return cells | {"median rank": f"{ranking.median_rank:g}", f"mAP@{most} %": ranking.mean_average_precision[most]}


def _first(similar: np.ndarray, is_own: np.ndarray) -> np.ndarray:
    """The most similar rows, a tie counting against its own; and the best of its own, if it is not among them."""
    order = np.lexsort((is_own, -similar))
    first = order[:_FOUND]
    return first if is_own[first].any() else np.append(first, order[is_own[order]][0])
