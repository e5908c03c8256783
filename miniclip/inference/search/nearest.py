"""Exact answers over unit features, block by block: the nearest rows of queries, and rows that are nearly equal.

Everything is a product of matrices and a choice among its largest values, in as much memory as one block needs.

N rows, Q queries, E embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...evaluation.measures.ties import SAME

_SCORES_AT_ONCE = 1 << 24
_ROWS_OF_PAIRS = 4096
TIES = 64  # rows beyond the last wanted one, among which equal cosines are ordered by meaning

Blocks = Iterable[tuple[np.ndarray, Tensor]]


def nearest(blocks: Blocks, queries: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and cosines of the k rows nearest to each query, the nearest first; fewer if there are fewer rows.

    Args:
        blocks: ids (n,) and unit features (n, E) of all rows, in any number of blocks.
        queries: (Q, E) unit features in float32.

    Returns:
        (Q, K) ids and (Q, K) cosines in float32, K = min(k, N).
    """
    best = torch.empty(0, len(queries))  # (K, Q)
    ids = torch.empty(0, len(queries), dtype=torch.int64)
    # A product with a single column runs on one core; with two it takes 0.4 of the time, on two cores.
    columns = (queries if len(queries) > 1 else queries.repeat(2, 1)).T
    for block_ids, features in blocks:
        for start in range(0, len(features), rows := max(1, _SCORES_AT_ONCE // max(1, len(queries)))):
            part = features[start : start + rows].float()
            scores, places = (part @ columns)[:, : len(queries)].topk(min(k, len(part)), dim=0)  # (k, Q)
            found = torch.from_numpy(block_ids[start : start + rows].astype(np.int64))[places]
            best, order = torch.cat([best, scores]).topk(min(k, len(best) + len(scores)), dim=0)
            ids = torch.cat([ids, found]).gather(0, order)
    return ids.T.numpy(), best.T.numpy()


def levels(cosines: np.ndarray) -> np.ndarray:
    """(K,) a number for each of falling cosines; those that differ by rounding alone have the same."""
    return np.concatenate([[0], np.cumsum(np.diff(cosines) < -SAME)]).astype(np.int64)[: len(cosines)]


def goes_on(cosines: np.ndarray, topk: int, k: int) -> bool:
    """Whether rows behind these nearest k may be equal to the last of the first `topk`."""
    level = levels(cosines)
    return len(level) == k > topk and level[-1] == level[topk - 1]


@dataclass(frozen=True)
class Groups:
    """Rows that are nearly equal to another one.

    Args:
        ids: (M,) of all of them, group by group.
        group: (M,) the number of each one's group, from 0.
        cosine: (M,) the highest to another of the group.
    """

    ids: np.ndarray
    group: np.ndarray
    cosine: np.ndarray


# Ids of pairs of rows (P,), (P,) -> how alike they are (P,), -inf for those that are no duplicates after all.
Confirm = Callable[[np.ndarray, np.ndarray], np.ndarray]


def near_duplicates(
    blocks: Callable[[], Blocks],
    cosine: float,
    progress: Callable[[int], object] | None = None,
    confirm: Confirm | None = None,
) -> Groups:
    """The groups of rows that reach a cosine, directly or by way of others.

    Args:
        blocks: called for each pass over all rows, whose order is always the same.
        progress: called with the number of pairs of rows that were compared.
        confirm: looks closer at pairs that reach the cosine and are in no common group yet; what it returns is then in
            the place of the cosine.
    """
    ids = np.concatenate([block_ids for block_ids, _ in blocks()] or [np.zeros(0, dtype=np.uint64)])
    parent = np.arange(len(ids))
    highest = np.full(len(ids), -np.inf, dtype=np.float32)
    compared = 0
    for start, rows in _cut(blocks()):
        for other_start, others in _cut(blocks()):
            if other_start < start:
                continue
            scores = rows @ others.T
            if other_start == start:
                scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
            first, second = slice(start, start + len(rows)), slice(other_start, other_start + len(others))
            if confirm is None:
                highest[first] = np.maximum(highest[first], scores.amax(dim=1).numpy())
                highest[second] = np.maximum(highest[second], scores.amax(dim=0).numpy())
            a, b = _near_and_apart(parent, scores >= cosine - SAME, start, other_start)
            if confirm is not None and len(a):
                alike = confirm(ids[a], ids[b])
                a, b, alike = a[alike > -np.inf], b[alike > -np.inf], alike[alike > -np.inf]
                np.maximum.at(highest, a, alike)
                np.maximum.at(highest, b, alike)
            _join(parent, a, b)
            compared += scores.numel() if other_start != start else len(rows) * (len(rows) - 1) // 2
            if progress:
                progress(compared)
    members = np.flatnonzero(highest >= (cosine - SAME if confirm is None else -np.finfo(np.float32).max))
    _, group = np.unique(parent[members], return_inverse=True)
    order = np.argsort(group, kind="stable")
    return Groups(ids[members][order], group[order], np.minimum(highest[members][order], 1.0))


def _cut(blocks: Blocks) -> Iterator[tuple[int, Tensor]]:
    """The rows in float32, a few thousand at a time, each time with the place of the first."""
    place = 0
    for _, features in blocks:
        for part in features.split(_ROWS_OF_PAIRS) if len(features) else ():
            yield place, part.float()
            place += len(part)


def _near_and_apart(parent: np.ndarray, are_near: Tensor, start: int, other_start: int) -> tuple[np.ndarray, ...]:
    """The places of near rows (P,), (P,) that are in different groups so far."""
    rows, others = are_near.shape
    first, second = parent[start : start + rows], parent[other_start : other_start + others]
    if not bool(are_near.any()):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    are_near &= torch.from_numpy(first)[:, None] != torch.from_numpy(second)[None]
    a, b = (each.numpy() for each in are_near.nonzero(as_tuple=True))
    return a + start, b + other_start


def _join(parent: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Joins the groups of the rows a and b; `parent` leads from each row straight to the first row of its group."""
    while len(a):
        low, high = np.minimum(parent[a], parent[b]), np.maximum(parent[a], parent[b])
        np.minimum.at(parent, high, low)
        while not np.array_equal(further := parent[parent], parent):
            parent[:] = further
        are_apart = parent[a] != parent[b]
        a, b = a[are_apart], b[are_apart]
