"""The names of those who take part, and how much their outputs may differ."""

from __future__ import annotations

from collections.abc import Iterable

MOST_DIFFERENCE = 1e-5  # between outputs that should be equal, as a share of the largest number
# Less precise arithmetic is reported, not failed: what to expect of embeddings, likewise.
USUAL_DIFFERENCE = {"bf16": 0.03, "int8": 0.1}
OURS, OURS_BF16, THEIRS, LIMIT = "miniclip", "miniclip bf16", "open_clip", "limit"
PEERS = (THEIRS, "transformers", "OpenAI")
# What does a part of the work without PyTorch: engines run models that another library has made.
RIVALS = (
    *("OpenVINO", "OpenVINO bf16", "OpenVINO int8", "ONNX Runtime", "ONNX Runtime int8"),
    *("instant_clip_tokenizer", "tokenizers"),
)


def precision(contender: str) -> str:
    """ "bf16" or "int8"; "" is float32."""
    last = contender.split()[-1]
    return last if last in USUAL_DIFFERENCE else ""


def beside(contender: str, names: Iterable[str]) -> str:
    """Which of ours a contender is compared with: that of its own precision, if there is one."""
    return OURS_BF16 if precision(contender) and contender != OURS_BF16 and OURS_BF16 in names else OURS
