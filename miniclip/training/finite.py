"""What stops a run whose loss or gradient is not finite, and the batch that it leaves behind."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tokenizer
from ..data.pairs import Batch

NON_FINITE = "non_finite.json"  # in the run's folder: the batch that a run stopped at


class Step(NamedTuple):
    """What is held of a step until it is known to be sound."""

    batch: Batch
    loss: Tensor
    image_features: Tensor  # (b, E)
    text_features: Tensor  # (b, E)

    def describe(self, rank: int) -> list[dict[str, Any]]:
        is_finite = torch.isfinite(self.image_features).all(dim=1) & torch.isfinite(self.text_features).all(dim=1)
        rows = zip(self.batch.keys, self.batch.tokens.tolist(), is_finite.tolist(), strict=True)
        return [
            {"key": key, "rank": rank, "caption": _caption(tokens), "is_finite": finite} for key, tokens, finite in rows
        ]


def _caption(tokens: list[int]) -> str:
    return tokenizer.decode([i for i in tokens if i not in (0, tokenizer.START_OF_TEXT, tokenizer.END_OF_TEXT)]).strip()
