"""What a finding does to the loss: the least that any model's can be because of it, in nats.

Each is alone; together they cost at least as much as the greatest of them. N pictures, B pairs of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...data.findings import expected_log, false_negatives


@dataclass(frozen=True)
class Cost:
    """
    Args:
        what: the finding.
        others: expected number of the B - 1 others in a batch that fit a pair, too.
        lowest_loss: nats, or None where there is no such bound.
    """

    what: str
    others: float
    lowest_loss: float | None


def of_equal(what: str, labels: Sequence[Sequence[object]], batch_size: int) -> Cost:
    """Equal captions, or pictures that are equal but for little: of N pictures the labels, one of which is drawn.

    Rows of equal features have equal logits, so k + 1 of them share what each wants for itself: ln(k + 1), with k
    binomial; see `miniclip.data.findings.false_negatives`. The argument is the same for pictures as for captions.
    """
    share, loss = false_negatives([[str(label) for label in each] for each in labels], batch_size)
    return Cost(what, share * (batch_size - 1), loss)


def of_naming(mean: np.ndarray, batch_size: int) -> Cost:
    """Captions that name other pictures, too.

    Args:
        mean: (N,) how many others the drawn caption of each names. No bound follows: the texts differ, and a model may
            tell the pictures apart by what only one of the captions says.
    """
    N = len(mean)
    return Cost("captions that name other pictures", float(mean.mean()) / max(1, N - 1) * (batch_size - 1), None)


def of_chance(share: float, batch_size: int) -> Cost:
    """Pairs that were put together by chance, as many as this share of all.

    K of the B - 1 others are such pairs, too. Whoever knows all that fits still has K + 1 captions for K + 1 pictures,
    any of which may be any one's: at least ln(K + 1) for each of those rows, unless the pairs are learnt by heart.
    """
    return Cost("captions that do not fit", 0.0, share * expected_log(batch_size - 1, share))


def chance(batch_size: int) -> float:
    """The loss of guessing, nats."""
    return math.log(batch_size)
