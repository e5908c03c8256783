"""Zero-shot retrieval: captions find images and images find captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .datasets.sets import CaptionedImages
from .features import ImageFeatures
from .measures.ranking import Retrieval, retrieval
from .measures.statistics import bootstrap_interval

# ---------------------------------------------------------------------------------------------------------------------
# Retrieval


@dataclass(frozen=True)
class RetrievalScores:
    """
    Args:
        images: features of the images that could be read.
        texts: (T, E) unit features of their captions.
        captions: T of them.
        image_of_text: (T,) rows of `images`.
        metrics: both directions; the bootstrap's intervals of R@1 draw whole groups of images.
        interval_images, interval_texts: of finding images by texts, and texts by images.
    """

    data: CaptionedImages
    images: ImageFeatures
    texts: Tensor
    captions: tuple[str, ...]
    image_of_text: np.ndarray
    metrics: Retrieval
    interval_images: tuple[float, float]
    interval_texts: tuple[float, float]

    @property
    def unreadable(self) -> tuple[str, ...]:
        return self.images.unreadable


def retrieve(
    images: ImageFeatures, data: CaptionedImages, texts: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> RetrievalScores:
    """
    Args:
        images: of `data`.
        texts: features (T, E) of all of its captions, image after image. Those of unreadable images don't count.
    """
    counts = np.array([len(each) for each in data.captions])
    is_readable = np.isin(np.arange(len(counts)), images.numbers)
    texts = texts[torch.from_numpy(np.repeat(is_readable, counts))]
    captions = tuple(text for number in images.numbers for text in data.captions[number])
    owner = np.repeat(np.arange(len(images.numbers)), counts[images.numbers])
    found = retrieval(images.features.to(texts.device), texts, owner, ks)
    groups = np.array(data.groups)[images.numbers]
    return RetrievalScores(
        data,
        images,
        texts.cpu(),
        captions,
        owner,
        found,
        bootstrap_interval(found.images.ranks == 1, groups[owner]),
        bootstrap_interval(found.texts.ranks == 1, groups[found.texts.queries]),
    )
