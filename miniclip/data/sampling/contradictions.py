"""Settings of positives and negatives that contradict each other, or that nothing would use, are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from ..pairs import Positives
from .negatives import Negatives

DEFAULT_GROUP = "group"  # the field that `miniclip shards --groups` writes


def refuse_contradictions(
    positives: str,
    negatives: str,
    neighbours: Sequence[str] | None,
    group: str,
    texts_per_image: int,
    num_sources: int,
    weights: Sequence[float] | None,
    order: str,
) -> None:
    """
    Raises:
        ValueError: two of them contradict each other, or one would not be used; names both, and what to set.
    """
    for name, value, valid in (("data.negatives", negatives, Negatives), ("model.positives", positives, Positives)):
        if value not in get_args(valid):
            raise ValueError(f"{name} is {value!r}; valid are {', '.join(get_args(valid))}")
    if texts_per_image > 1 and positives == "caption":
        raise ValueError(
            f"data.captions.per_image is {texts_per_image}, so the texts of an image belong together, and "
            "model.positives is 'caption', by which only equal texts do: set model.positives to pair or group"
        )
    is_hard = negatives == "hard"
    if neighbours is not None and not is_hard:
        raise ValueError(f"data.neighbours is {', '.join(neighbours)}, which nothing uses: set data.negatives to hard")
    if group != DEFAULT_GROUP and positives != "group" and (neighbours or not is_hard):
        raise ValueError(
            f"data.group is {group!r}, which nothing uses: set model.positives to group, or data.negatives to hard "
            "without data.neighbours"
        )
    if is_hard and order == "stream":
        raise ValueError(
            "data.negatives is 'hard', which needs all samples known, and data.order is 'stream', in which none is "
            "known before it comes: index the shards (`miniclip shards SRC --index-only`) and set data.order to exact"
        )
    if is_hard and weights is not None:
        raise ValueError(
            "data.negatives is 'hard' and data.weights is set: in a mixture a sample may come again before others have "
            "come once, and would meet itself in a batch. Leave one of them out"
        )
    if is_hard and neighbours is not None and len(neighbours) != num_sources:
        raise ValueError(
            f"data.neighbours names {len(neighbours)} folders and data.train {num_sources} sources; each needs its own"
        )
    if is_hard and not neighbours and positives == "group":
        raise ValueError(
            f"model.positives is 'group' and data.negatives is 'hard' by the same groups ({group!r}): a batch of one "
            "group has nothing to tell apart. Set data.neighbours to what `miniclip embed` wrote for the shards"
        )
