"""The two encoders as exporters take them: one input, one output in float32, an example, and which sides vary.

Names of inputs, outputs and files are those that transformers.js looks for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...model import CLIP
from ...tokenizer import random_ids

_LONGEST_EXAMPLE = 7  # tokens


class ImageTower(nn.Module):
    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.visual, self.dtype = clip.visual, clip.dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, R, R) float32 -> (B, E) float32."""
        return self.visual(pixel_values.to(self.dtype)).float()


class TextTower(nn.Module):
    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.text = clip.text

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, L) int64 -> (B, E) float32."""
        return self.text(input_ids).float()


@dataclass(frozen=True)
class Tower:
    """
    Args:
        name: "image" or "text".
        module: takes `example` (2, …), and any other number of rows; texts of any length up to the context's.
        dynamic: the sides that vary, as `torch.export` takes them.
        file: the name that files have in front of their ending.
    """

    name: str
    module: nn.Module
    example: Tensor
    input: str
    output: str
    dynamic: dict[int, Any]
    file: str


def towers(clip: CLIP) -> list[Tower]:
    """Those that the model has, on the CPU, in evaluation mode."""
    clip = clip.cpu().eval()
    batch = torch.export.Dim("batch")
    found = []
    if clip.config.towers != "text":
        images = torch.zeros(2, 3, clip.visual.input_resolution, clip.visual.input_resolution)
        sides = {0: batch}
        found.append(Tower("image", ImageTower(clip), images, "pixel_values", "image_embeds", sides, "vision_model"))
    if clip.config.towers != "image":
        tokens = random_tokens(clip, 2, _LONGEST_EXAMPLE, seed=0)
        sides = {0: batch, 1: torch.export.Dim("length", max=clip.context_length)}
        found.append(Tower("text", TextTower(clip), tokens, "input_ids", "text_embeds", sides, "text_model"))
    for tower in found:
        tower.module.eval()
    return found


def random_tokens(clip: CLIP, count: int, length: int, seed: int) -> Tensor:
    """(count, length) int64, or as long as the model can read; texts of different lengths, the longest first."""
    text = clip.config.text
    L = min(length, text.context_length)
    random = torch.Generator().manual_seed(seed)
    tokens, end = random_ids(text, (count, L), random)
    for row, last in enumerate(range(L - 1, L - 1 - count, -1)):
        tokens[row, max(last % L, min(1, L - 1)) :] = end
    return tokens
