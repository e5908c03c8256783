"""What a checkpoint is made of, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..config import CLIPConfig
from ..data.wordings.kept import Wordings
from ..model import CLIP, MissingTower
from .load import build
from .read import locate, read_checkpoint


@dataclass(frozen=True)
class Facts:
    """What `miniclip info` prints.

    Args:
        dtypes: of the file's tensors.
        problems: tensors that are missing, unexpected, or of another shape than the architecture's; empty if it loads.
        image_parameters, text_parameters: of the towers; these and the next are 0 if it does not load.
        image_gflops, text_gflops: 10^9 multiplications and additions for one image, and for a text of full length.
        wordings: of the captions that it was trained on, if they are known.
    """

    format: str
    config: CLIPConfig
    dtypes: tuple[str, ...]
    problems: str
    image_parameters: int = 0
    text_parameters: int = 0
    image_gflops: float = 0.0
    text_gflops: float = 0.0
    wordings: Wordings | None = None


def forward_flops(tower: nn.Module, inputs: Tensor) -> int:
    """Multiplications and additions of the matrix products that a tower takes for some inputs, both on meta."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        if not isinstance(tower, MissingTower):
            tower(inputs)
    return int(counter.get_total_flops())


def inspect(source: str | Path, **options: Any) -> Facts:
    """Everything about a checkpoint that can be known without using it."""
    checkpoint = read_checkpoint(locate(source), **options)
    config = checkpoint.config
    dtypes = tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.tensors.values()}))
    try:
        build(checkpoint, str(source))
    except ValueError as error:  # then it may claim any size, and building that could take for ever
        return Facts(checkpoint.format, config, dtypes, problems=str(error))
    with torch.device("meta"):
        model = CLIP(config).eval()
        images = torch.zeros(1, 3, model.visual.input_resolution, model.visual.input_resolution)
        tokens = torch.zeros(1, config.text.context_length, dtype=torch.long)
    image, text = (forward_flops(*each) / 1e9 for each in ((model.visual, images), (model.text, tokens)))
    sizes = [sum(parameter.numel() for parameter in tower.parameters()) for tower in (model.visual, model.text)]
    return Facts(checkpoint.format, config, dtypes, "", sizes[0], sizes[1], image, text, checkpoint.wordings)
