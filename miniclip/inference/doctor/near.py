"""Near duplicates: pictures that were cut, scaled, lit or compressed otherwise, within a part and across parts.

Two looks. The first compares all with all, by a vector in which 8 x 8 coloured fields stand beside 64 bits of a
perceptual hash (the pHash of `imagehash`): a product of matrices. The second looks at the pairs that it finds, 16 x 16
fields of each, and cuts up to 6 % off either picture's edges until they fit best. Sets in which all pictures look alike
(digits, plates, cells) need the second look: there a hash alone takes hundreds of different ones for copies.

N pictures, R side of the small copies, D width of the vectors.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..search.nearest import Groups, near_duplicates
from .parts import Looked, Progress
from .pictures import BLANK_LEVELS, COARSE, SMALL

NEAR = 0.985  # likeness of the second look; see docs/doctor.md for what it finds and mistakes
_FIRST_LOOK = 0.90
_HASH_WEIGHT = 0.03  # of the first look's cosine
_FINE = 16
_CUTS = (0.0, 0.03, 0.06)  # of a side
_KNOWN = 400  # pictures whose cuts are in memory, 250 kB each


@dataclass(frozen=True)
class Likeness:
    """Groups of pictures that are the same but for little.

    Args:
        group: (N,) the number of each one's group, from 0; -1 for those that are like no other.
        likeness: (N,) the highest to another of the group; 1 for equal pixels.
    """

    group: np.ndarray
    likeness: np.ndarray

    def groups(self) -> Iterator[np.ndarray]:
        """The rows of each."""
        order = np.argsort(self.group, kind="stable")[np.count_nonzero(self.group < 0) :]
        yield from np.split(order, np.flatnonzero(np.diff(self.group[order])) + 1) if len(order) else ()


def find_alike(looked: Looked, near: float, progress: Progress) -> Likeness:
    """Blank pictures are compared with none: each would be like all others.

    Args:
        near: the least likeness of the second look, to 1.

    Raises:
        ValueError: `near` is out of its range.
    """
    if not 0.5 <= near <= 1:
        raise ValueError(f"near is {near}; it is a likeness from 0.5 to 1, where 1 is equal but for light")
    by_digest: dict[bytes, list[int]] = defaultdict(list)
    for row in np.flatnonzero(looked.levels > BLANK_LEVELS).tolist():
        by_digest[looked.digests[row]].append(row)
    firsts = np.array([rows[0] for rows in by_digest.values()], dtype=np.int64)
    vectors = torch.from_numpy(vectors_of(looked.small[firsts], looked.bits[firsts]))
    closer = _CloserLook(looked.small, near)
    with progress("comparing pictures", len(firsts) * (len(firsts) - 1) // 2) as report:
        found = near_duplicates(lambda: [(firsts, vectors)], _FIRST_LOOK, report, closer)
    return _with_equal_ones(found, list(by_digest.values()), len(looked))


def _with_equal_ones(found: Groups, equal: list[list[int]], N: int) -> Likeness:
    group, likeness = np.full(N, -1, dtype=np.int64), np.zeros(N, dtype=np.float32)
    group[found.ids] = found.group
    likeness[found.ids] = found.cosine
    after = int(found.group.max(initial=-1)) + 1
    for first, *others in equal:
        if others:
            if group[first] < 0:
                group[first], after = after, after + 1
            group[others] = group[first]
            likeness[[first, *others]] = 1.0
    return Likeness(group, likeness)


def vectors_of(small: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """(N, D) unit vectors of the first look, from (N, R, R, 3) and (N, 8) uint8."""
    N, size = len(small), SMALL // COARSE
    fields = np.empty((N, COARSE * COARSE * 3), dtype=np.float32)
    for start in range(0, N, 4096):
        part = small[start : start + 4096].reshape(-1, COARSE, size, COARSE, size, 3)
        fields[start : start + 4096] = part.mean(axis=(2, 4), dtype=np.float32).reshape(len(part), -1)
    signs = 2 * np.unpackbits(bits.reshape(N, 8), axis=1).astype(np.float32) - 1
    weights = (1 - _HASH_WEIGHT) ** 0.5, _HASH_WEIGHT**0.5
    return np.concatenate([weights[0] * _centred(fields), weights[1] * signs / signs.shape[1] ** 0.5], axis=1)


def _centred(fields: np.ndarray) -> np.ndarray:
    """Without their mean, and of length 1, so that neither light nor contrast counts."""
    fields = fields - fields.mean(axis=1, keepdims=True)
    return fields / np.maximum(np.linalg.norm(fields, axis=1, keepdims=True), 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# The second look


def _cutting(before: float, after: float) -> np.ndarray:
    """(16, R) takes a side of R pixels, less these shares at its ends, to the means of 16 fields."""
    places = ((np.arange(SMALL) + 0.5) / SMALL * (1 - before - after) + before) * SMALL - 0.5
    places = places.clip(0, SMALL - 1)
    low = np.floor(places).astype(int).clip(0, SMALL - 2)
    matrix = np.zeros((SMALL, SMALL), dtype=np.float32)
    matrix[np.arange(SMALL), low] = 1 - (places - low)
    matrix[np.arange(SMALL), low + 1] += (places - low).astype(np.float32)
    return matrix.reshape(_FINE, SMALL // _FINE, SMALL).mean(axis=1)


_CUTTINGS = np.stack(
    [_cutting(*ends) for ends in itertools.product(_CUTS, repeat=2)]
)  # (9, 16, R); the first cuts none


class _CloserLook:
    """The second look at pairs of rows, for `near_duplicates`."""

    def __init__(self, small: np.ndarray, near: float) -> None:
        self.small, self.near = small, near
        self._known = OrderedDict[int, np.ndarray]()

    def __call__(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        found = np.empty(len(first), dtype=np.float32)
        for number, (a, b) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            cuts_a, cuts_b = self._cuts(a), self._cuts(b)
            found[number] = max((cuts_a @ cuts_b[0]).max(), (cuts_b @ cuts_a[0]).max())
        return np.where(found >= self.near, np.minimum(found, 1), -np.inf).astype(np.float32)

    def _cuts(self, row: int) -> np.ndarray:
        """(81, 16 · 16 · 3) unit vectors of the picture with its edges cut; the first is whole."""
        if row in self._known:
            self._known.move_to_end(row)
            return self._known[row]
        picture, count = self.small[row].astype(np.float32), len(_CUTTINGS)
        rows = _CUTTINGS.reshape(-1, SMALL) @ picture.reshape(SMALL, -1)  # (9 · 16, R · 3)
        columns = rows.reshape(count, _FINE, SMALL, 3).transpose(2, 0, 1, 3).reshape(SMALL, -1)  # (R, 9 · 16 · 3)
        both = _CUTTINGS.reshape(-1, SMALL) @ columns  # (9 · 16, 9 · 16 · 3)
        fields = both.reshape(count, _FINE, count, _FINE, 3).transpose(2, 0, 3, 1, 4)
        self._known[row] = _centred(fields.reshape(count * count, -1))
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        return self._known[row]
