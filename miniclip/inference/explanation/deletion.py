"""Whether to believe a relevance: take away first what it calls important, or add that first (RISE's deletion and
insertion, Petsiuk et al. 2018, https://arxiv.org/abs/1806.07421, section 4.2).

Deletion is the mean cosine while parts (pixels, words) are taken away in the order of their relevance: lower is better.
Insertion is the mean while they are added in that order, from nothing on: higher is better. In a random order both have
the same expectation, because an order takes away what its reverse has not yet added.

P parts, S steps, K random relevances, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_RANDOM = 8
_T = 2.3646  # 95 % of Student's distribution with NUM_RANDOM - 1 degrees of freedom lie within -_T and _T
_MOST_STEPS = 10

# Which of P parts are there, (M, P) booleans -> unit features of what they make, (M, E).
Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Deletion:
    """The mean cosines of a relevance, and those of random ones.

    Args:
        deletion, insertion: of the relevance.
        random: the mean of `NUM_RANDOM` random ones.
        interval: where another random one would lie, with a probability of 95 %.
    """

    deletion: float
    insertion: float
    random: float
    interval: tuple[float, float]

    @property
    def is_better(self) -> bool:
        """Whether insertion exceeds deletion by more than it does for random relevances, but for some 3 of 100.

        Of a random one that difference has the mean 0, and at most twice the standard deviation of either, so it lies
        within the width of the interval.
        """
        low, high = self.interval
        return self.insertion - self.deletion > high - low

    def __str__(self) -> str:
        random = f"random {self.interval[0]:.2f} to {self.interval[1]:.2f}"
        verdict = "" if self.is_better else "; can't be told from random"
        return f"deletion {self.deletion:.2f}, insertion {self.insertion:.2f}, {random}{verdict}"


class Removal:
    """Parts of a picture or a text, and what is left of it where they go in random orders: encoded once for all
    relevances that are scored.

    Args:
        random: (K, P) relevances of no meaning, as smooth as those that are scored.
    """

    def __init__(self, encode: Encode, random: Tensor) -> None:
        P = random.shape[1]
        num_steps = min(P, _MOST_STEPS)
        self._encode = encode
        self._counts = [round(P * step / num_steps) for step in range(1, num_steps)]  # parts that are there
        self._nothing, self._all = encode(torch.tensor([[False], [True]], device=random.device).expand(2, P))  # (E,)
        self._random = self._insertion(random)  # (K, S + 1, E)

    def score(self, relevance: Tensor, target: Tensor) -> Deletion:
        """
        Args:
            relevance: (P,).
            target: (E,), of unit length.
        """
        least_first, most_first = self._insertion(torch.stack([-relevance, relevance])) @ target  # (S + 1,) each
        random = _trapezoid(self._random @ target)  # (K,)
        half = _T * float(random.std()) * math.sqrt(1 + 1 / len(random))
        interval = float(random.mean()) - half, float(random.mean()) + half
        # To delete the most relevant parts first is to add the least relevant ones first, backwards.
        return Deletion(float(_trapezoid(least_first)), float(_trapezoid(most_first)), float(random.mean()), interval)

    def _insertion(self, relevances: Tensor) -> Tensor:
        """Features while parts are added, the most relevant first: (K, P) -> (K, S + 1, E)."""
        ends = [each.expand(len(relevances), 1, -1) for each in (self._nothing, self._all)]
        if not self._counts:
            return torch.cat(ends, dim=1)
        ranks = relevances.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (K, P), 0 is the first
        counts = torch.tensor(self._counts, device=ranks.device)
        kept = ranks[:, None] < counts[:, None]  # (K, S - 1, P)
        between = self._encode(kept.flatten(0, 1)).unflatten(0, (len(relevances), -1))
        return torch.cat([ends[0], between, ends[1]], dim=1)


def _trapezoid(cosines: Tensor) -> Tensor:
    """Over equal steps, by the trapezoidal rule: (..., S + 1) -> (...)."""
    return (cosines[..., 1:] + cosines[..., :-1]).mean(dim=-1) / 2
