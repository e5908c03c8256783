"""Retrieval in bounded memory. A tie counts against the model, so equal scores for all pairs find nothing.

I images, T texts, E embedding."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...common.processes import all_gather_objects, rank_and_world_size
from .statistics import as_rows, check_k
from .ties import SAME

# ---------------------------------------------------------------------------------------------------------------------
# Retrieval

_NUM_ROWS, _NUM_COLUMNS = 2048, 4096  # of a block of cosines: 64 MiB


@dataclass(frozen=True)
class Ranking:
    """One direction of retrieval.

    Args:
        num_candidates: how many each query chooses among. Among more it is harder: compare only equal numbers.
        queries: (Q,) indices of the texts or images that ask. An image without a text does not: it has nothing to find.
        ranks: (Q,) the rank, from 1, of the best of its own. `wilson_interval(ranks <= K)` is recall's interval.
        recall: by K, the share of queries that find one of their own among the first K.
        median_rank, mean_rank: of ranks.
        mean_average_precision: by K: of each query, the precision at each of its own among the first K, summed and
            divided by how many could be there (its own, or K if fewer).
    """

    num_candidates: int
    queries: np.ndarray
    ranks: np.ndarray
    recall: dict[int, float]
    median_rank: float
    mean_rank: float
    mean_average_precision: dict[int, float]


@dataclass(frozen=True)
class Retrieval:
    """Both directions, by what is found: `images` by their texts, `texts` by their images.

    `images.recall[K]` is CLIP_benchmark's image_retrieval_recall@K, `texts.recall[K]` its text_retrieval_recall@K. It
    differs for ties alone, and by counting an image without texts as one that finds nothing.
    """

    images: Ranking
    texts: Ranking


def retrieval(
    image_features: Tensor | np.ndarray,
    text_features: Tensor | np.ndarray,
    image_of_text: Tensor | np.ndarray | Sequence[int],
    ks: Sequence[int] = (1, 5, 10),
    captions: Sequence[Hashable] | None = None,
) -> Retrieval:
    """Images by texts and texts by images, exact, over blocks of the matrix of cosines and never the whole.

    Cosines closer than `ties.SAME` are equal, and equal ones count against the model. An image of the same caption is
    a right answer to it, and so is the same caption of another image. Each text asks with its own features: to a model
    that knows "a dog" from "A dog", captions that count as the same may have other ranks.

    Where there are several processes, all call this with the same features, and each takes a part of the images.

    Args:
        image_features: (I, E), of any length but 0. Where they are, all is computed.
        text_features: (T, E), likewise.
        image_of_text: (T,) the image that each text belongs to; images have any number of texts.
        captions: T values, equal for texts that are the same; by default every text is another.

    Raises:
        ValueError: features that have no direction (NaN, infinite or 0), or that do not belong together.
    """
    for k in ks:
        check_k(k)
    images, texts = torch.as_tensor(image_features), torch.as_tensor(text_features)
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        shapes = f"{tuple(images.shape)} and {tuple(texts.shape)}"
        raise ValueError(f"image and text features have shapes {shapes}; they are (I, E) and (T, E) with one E")
    if not len(images) or not len(texts):
        raise ValueError(f"{len(images)} images and {len(texts)} texts; retrieval needs at least one of each")
    owner = np.asarray(image_of_text.cpu() if isinstance(image_of_text, Tensor) else image_of_text)
    if owner.shape != (len(texts),) or owner.dtype.kind not in "iu":
        found = f"shape {owner.shape} and type {owner.dtype}"
        raise ValueError(f"image_of_text is a whole number for each of {len(texts)} texts; it has {found}")
    if owner.min() < 0 or owner.max() >= len(images):
        wrong = owner[(owner < 0) | (owner >= len(images))][0]
        raise ValueError(f"image_of_text says image {wrong}; with {len(images)} images they are 0 to {len(images) - 1}")
    owner = owner.astype(np.int64)
    caption = _numbered(captions, len(texts))
    query = _asking(texts, caption)
    directions = _Directions(images, "image"), _Directions(texts, "text")
    spelt = _Spellings(*directions, query, owner, caption, max(ks, default=1))
    better_images, better_texts = _count_better(*directions, owner, caption, spelt.nearest)
    # Equal texts ask once, and find all images of their caption; an image finds the best spelling of its caption.
    _, pairs = np.unique(np.stack([query, owner]), axis=1, return_index=True)
    pairs = pairs[~np.isin(query[pairs], spelt.query)]
    asking, better = np.append(query[pairs], spelt.query), np.append(better_images[pairs], spelt.better)
    by_text = _ranking(better, asking, len(images), ks, query, spelt.num_images)
    return Retrieval(by_text, _ranking(better_texts, owner, len(texts), ks))


def _numbered(captions: Sequence[Hashable] | None, num_texts: int) -> np.ndarray:
    """(T,) equal numbers for equal captions."""
    if captions is None:
        return np.arange(num_texts)
    if len(captions) != num_texts:
        raise ValueError(f"{len(captions)} captions for {num_texts} text features; there is one for each")
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(caption, len(number)) for caption in captions], dtype=np.int64)


def _asking(texts: Tensor, caption: np.ndarray) -> np.ndarray:
    """(T,) for each text the first of its caption with the same features."""
    query = np.arange(len(caption))
    first: dict[tuple[int, bytes], int] = {}
    shared = np.flatnonzero(np.bincount(caption)[caption] > 1)
    for start in range(0, len(shared), _NUM_ROWS):
        rows = shared[start : start + _NUM_ROWS]
        features = texts[torch.from_numpy(rows).to(texts.device)].cpu().double().numpy()
        for text, row in zip(rows.tolist(), features + 0.0, strict=True):
            query[text] = first.setdefault((int(caption[text]), row.tobytes()), text)
    return query


class _Spellings:
    """What is right for a text that others of its caption differ from: all images of the caption.

    Only as many as `most` of them, the nearest, can be among the first `most`. Cosines are in memory for some of the
    texts at a time, of which each asks once.

    Args:
        query: (T,) as `_asking` has it.
        most: the largest K.

    Attributes:
        query, better: (P,) a text, and how many wrong images are at least as near to it as one of its nearest `most`
            right images.
        num_images: (T,) with the caption of each text.
        nearest: (T,) the cosine of the text's image with the nearest other spelling of its caption, for one of the
            texts that the image has of a caption, and -inf.
    """

    @torch.inference_mode()
    def __init__(
        self,
        images: _Directions,
        texts: _Directions,
        query: np.ndarray,
        owner: np.ndarray,
        caption: np.ndarray,
        most: int,
    ) -> None:
        captions, owners = np.unique(np.stack([caption, owner]), axis=1)  # (2, N), sorted by caption
        firsts, sizes = (np.searchsorted(captions, np.arange(caption.max() + 1), side) for side in ("left", "right"))
        sizes = sizes - firsts
        self.num_images = sizes[caption]
        self.nearest = np.full(len(caption), -np.inf)
        order = np.lexsort((query, owner, caption))
        is_last = np.append(np.diff(caption[order]) | np.diff(owner[order]), 1) != 0
        text_of = order[is_last]  # (N,)
        is_own = np.unique(query * len(images) + owner)

        queries = np.unique(query)
        queries = queries[np.bincount(caption[queries])[caption[queries]] > 1]
        found = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))]
        num_rows = min(_NUM_ROWS, max(1, _NUM_ROWS * _NUM_COLUMNS // len(images)))
        for start in range(0, len(queries), num_rows):
            asking = queries[start : start + num_rows]
            texts_asking = texts[asking].to(images.device)
            wrong = torch.cat(
                [
                    texts_asking @ images[np.arange(top, min(top + _NUM_ROWS, len(images)))].T
                    for top in range(0, len(images), _NUM_ROWS)
                ],
                dim=1,
            ).cpu()  # (n, I)
            each = caption[asking]
            rows, pairs = np.repeat(np.arange(len(asking)), sizes[each]), _ranges(firsts[each], sizes[each])
            place = torch.from_numpy(rows), torch.from_numpy(owners[pairs])
            cosines = wrong[place]
            right = torch.full_like(wrong, -torch.inf)
            right[place], wrong[place] = cosines, -torch.inf
            nearest = right.topk(min(most, len(images))).values  # (n, most)
            better = len(images) - torch.searchsorted(wrong.sort().values, nearest - SAME)
            there = torch.isfinite(nearest).numpy()
            found.append((np.repeat(asking, there.sum(axis=1)), better.numpy()[there]))
            is_other = ~np.isin(asking[rows] * len(images) + owners[pairs], is_own)
            np.maximum.at(self.nearest, text_of[pairs[is_other]], cosines.numpy()[is_other])
        self.query, self.better = (np.concatenate(each) for each in zip(*found, strict=True))


def _ranking(
    better: np.ndarray,
    query: np.ndarray,
    num_candidates: int,
    ks: Sequence[int],
    asked: np.ndarray | None = None,
    num_own: np.ndarray | None = None,
) -> Ranking:
    """
    Args:
        better: (P,) for each pair of a query and one of its own, how many wrong candidates are as good or better.
        query: (P,) which query that is.
        asked: (Q,) the query that each text asks; by default every query is asked once.
        num_own: (Q,) how many own each has, if not all are among the pairs.
    """
    order = np.lexsort((better, query))
    queries, first, sizes = np.unique(query[order], return_index=True, return_counts=True)
    number = np.arange(len(order)) - np.repeat(first, sizes) + 1  # of its own, the best is 1
    ranks_of_own = better[order] + number  # among all
    asking = np.arange(len(queries)) if asked is None else np.searchsorted(queries, asked)
    ranks = ranks_of_own[first][asking]
    sizes = sizes if num_own is None else num_own[queries]
    precision = {}
    for k in ks:
        summed = np.add.reduceat(np.where(ranks_of_own <= k, number / ranks_of_own, 0.0), first)
        precision[k] = float((summed / np.minimum(sizes, k))[asking].mean())
    return Ranking(
        num_candidates,
        queries if asked is None else np.arange(len(asked)),
        ranks,
        {k: float((ranks <= k).mean()) for k in ks},
        float(np.median(ranks)),
        float(ranks.mean()),
        precision,
    )


class _Directions:
    """Some rows of features at a time, in float64 and of length 1, on their device."""

    def __init__(self, features: Tensor, what: str) -> None:
        self.features, self.norms = features, _norms(features, what)
        knows_float64 = features.device.type != "mps"
        self.device = features.device if knows_float64 else torch.device("cpu")

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        chosen = torch.from_numpy(rows)
        taken = self.features[chosen.to(self.features.device)].to(self.device).double()
        return taken / self.norms[chosen, None].to(self.device)


@torch.inference_mode()
def _count_better(
    images: _Directions, texts: _Directions, owner: np.ndarray, caption: np.ndarray, nearest: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each text: wrong images at least as near to it as its own, and wrong texts as near to its image.

    Args:
        nearest: (T,) a cosine that counts for the image instead of that of the text, if it is higher.

    Images are taken by falling number of texts, and texts in the order of their images. So the images that have an
    n-th text are the first rows of a block, and a block's own pairs are neighbours.
    """
    device = images.device
    num_texts = np.bincount(owner, minlength=len(images))
    image_order = np.argsort(-num_texts, kind="stable")
    rows = np.empty_like(image_order)  # of images, in that order
    rows[image_order] = np.arange(len(images))
    text_order = np.argsort(rows[owner], kind="stable")
    ends = np.cumsum(num_texts[image_order])  # of the texts of each row
    starts = ends - num_texts[image_order]

    own = torch.empty(len(texts), dtype=torch.float64, device=device)  # cosines of texts with their images, in order
    for start in range(0, len(texts), _NUM_ROWS):
        chosen = text_order[start : start + _NUM_ROWS]
        pair = images[owner[chosen]], texts[chosen].to(device)
        own[start : start + _NUM_ROWS] = (pair[0] * pair[1]).sum(dim=1) - SAME
    own_of_image = own.maximum(torch.from_numpy(nearest[text_order]).to(device) - SAME)

    others = _SharedCaptions(owner, caption)
    rank, world_size = rank_and_world_size()
    num_rows = min(_NUM_ROWS, -(-len(images) // world_size))
    better = torch.zeros(2, len(texts), dtype=torch.int64, device=device)
    for top in range(rank * num_rows, len(images), world_size * num_rows):
        chosen = image_order[top : top + num_rows]
        block_images = images[chosen]
        first_texts = torch.from_numpy(starts[top : top + num_rows]).to(device)
        own_texts = range(int(starts[top]), int(ends[top + len(chosen) - 1]))
        for left in range(0, len(texts), _NUM_COLUMNS):
            columns = slice(left, min(left + _NUM_COLUMNS, len(texts)))
            cosines = block_images @ texts[text_order[columns]].to(device).T  # (n, m)
            low, high = max(own_texts.start, columns.start), min(own_texts.stop, columns.stop)
            if low < high:
                pairs = rows[owner[text_order[low:high]]] - top, np.arange(low, high) - left
                cosines[torch.from_numpy(pairs[0]).to(device), torch.from_numpy(pairs[1]).to(device)] = -torch.inf
            pairs = others.between(chosen, text_order[columns])
            cosines[torch.from_numpy(pairs[0]).to(device), torch.from_numpy(pairs[1]).to(device)] = -torch.inf
            better[0, columns] += _count(cosines >= own[columns], dim=0)
            for number in range(int(num_texts[chosen[0]])):
                having = int((num_texts[chosen] > number).sum())
                numbered = first_texts[:having] + number
                better[1, numbered] += _count(cosines[:having] >= own_of_image[numbered, None], dim=1)
    counts = np.empty((2, len(texts)), dtype=np.int64)
    counts[:, text_order] = sum(all_gather_objects(better.cpu().numpy()))
    return counts[0], counts[1]


class _SharedCaptions:
    """Which images and texts belong together because another image has the same caption."""

    def __init__(self, owner: np.ndarray, caption: np.ndarray) -> None:
        owners = np.unique(np.stack([caption, owner]), axis=1)  # (2, P), sorted by caption
        is_shared = np.bincount(owners[0])[owners[0]] > 1
        self.captions, images = owners[:, is_shared]
        order = np.argsort(images, kind="stable")
        self.images, self.caption_of_image = images[order], self.captions[order]
        self.caption_of_text = np.where(np.isin(caption, self.captions), caption, -1)

    def between(self, images: np.ndarray, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of `images` and of `texts`, pair by pair."""
        if not len(self.images):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        first = np.searchsorted(self.images, images, side="left")
        sizes = np.searchsorted(self.images, images, side="right") - first
        rows, captions = np.repeat(np.arange(len(images)), sizes), self.caption_of_image[_ranges(first, sizes)]
        order = np.argsort(self.caption_of_text[texts], kind="stable")
        sorted_captions = self.caption_of_text[texts][order]
        first = np.searchsorted(sorted_captions, captions, side="left")
        sizes = np.searchsorted(sorted_captions, captions, side="right") - first
        return np.repeat(rows, sizes), order[_ranges(first, sizes)]


def _ranges(first: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, … (sizes[0] of them), then those from first[1], and so on."""
    ends = np.cumsum(sizes)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(first - (ends - sizes), sizes)


def _count(is_true: Tensor, dim: int) -> Tensor:
    if is_true.device.type == "cpu":  # NumPy counts bytes four times as fast, and counting is most of the work
        return torch.from_numpy(np.asarray(np.count_nonzero(is_true.numpy(), axis=dim)))
    return is_true.sum(dim=dim)


def _norms(features: Tensor, what: str) -> Tensor:
    norms = torch.cat([part.cpu().double().norm(dim=1) for part in features.split(_NUM_ROWS)])
    for is_bad, why in ((~torch.isfinite(norms), "not finite (NaN or infinite)"), (norms == 0, "zero")):
        if is_bad.any():
            raise ValueError(f"{what} features: {as_rows(is_bad.numpy())} {why}; a cosine needs a direction")
    return norms


def recall_at_1(queries: Tensor, keys: Tensor, chunk_size: int = 1024, groups: Tensor | None = None) -> float:
    """Share of queries (N, E) whose nearest key is their own (same row); a tie with another key is a miss.

    Args:
        groups: (N,) equal where pairs have the same caption; then any key of the query's group is its own.

    Raises:
        ValueError: there are none.
    """
    if not len(queries):
        raise ValueError("retrieval needs at least one pair, and there is none")
    parts = range(0, len(queries), chunk_size)
    return sum(int(finds_own(queries, keys, slice(i, i + chunk_size), groups).sum()) for i in parts) / len(queries)


def finds_own(queries: Tensor, keys: Tensor, rows: slice, groups: Tensor | None = None) -> Tensor:
    """Which of some rows of the queries find their own key first, as in `recall_at_1`: (N, E), (N, E) -> (n,) bool."""
    groups = torch.arange(len(keys), device=keys.device) if groups is None else groups
    cosines = queries[rows] @ keys.T  # (n, N)
    is_own = groups[rows, None] == groups
    own = cosines.masked_fill(~is_own, -torch.inf).amax(dim=1)
    return own > cosines.masked_fill(is_own, -torch.inf).amax(dim=1) + SAME
