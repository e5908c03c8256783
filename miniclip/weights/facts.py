"""What a checkpoint is made of and what it costs, and its forward pass: which modules run, and what each gives."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    # Not inference_mode, in which the counter would have to take apart in Python what else comes to it in products.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
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


# ---------------------------------------------------------------------------------------------------------------------
# The forward pass, module by module


@dataclass
class Call:
    """A module's call, with all that ran inside.

    Args:
        name: as in the state dict, `visual.transformer.resblocks.0.attn`.
        shape: of its output; empty if that is no tensor. The last block's is that of one token: a tower's output is
            one token, so the block computes no other (model.py).
        parameters: numbers that it and the modules inside hold.
        flops: multiplications and additions of its matrix products.
        bytes: of its output.
        last: the name of the last of several calls in a row that look alike, of which this is the first (blocks of a
            transformer); by default it stands for itself alone.
        inside: the calls that it made, in their order.
    """

    name: str
    kind: str
    parameters: int
    shape: tuple[int, ...] = ()
    flops: int = 0
    bytes: int = 0
    last: str = ""
    inside: list[Call] = field(default_factory=list)

    def looks_like(self, other: Call) -> bool:
        """Whether another call does the same with other weights."""
        mine, others = ((call.kind, call.shape, call.parameters, call.flops) for call in (self, other))
        same_number = len(self.inside) == len(other.inside)
        return mine == others and same_number and all(map(Call.looks_like, self.inside, other.inside))


def trace(config: CLIPConfig, batch_size: int = 1, text_length: int | None = None) -> list[Call]:
    """The calls of a forward pass of `CLIP(config)`, a list with one tree a tower; the meta device computes no number.

    Args:
        batch_size: images and texts.
        text_length: tokens of each text, start and end included; default: the context length.

    Raises:
        ValueError: a batch or a length that the model can't take.
    """
    longest = config.text.context_length
    text_length = longest if text_length is None else text_length
    if batch_size < 1:
        raise ValueError(f"the batch has {batch_size} images and texts; it must have at least 1")
    if not 2 <= text_length <= longest:
        raise ValueError(f"texts of {text_length} tokens; this model takes 2 (start and end) to {longest}")
    with torch.device("meta"):
        model = CLIP(config).eval()
        R = model.visual.input_resolution
        inputs = {
            "visual": torch.zeros(batch_size, 3, R, R),
            "text": torch.zeros(batch_size, text_length, dtype=torch.long),
        }
    missing = {"image": "text", "text": "visual", "both": ""}[config.towers]
    return [_trace_tower(name, getattr(model, name), x) for name, x in inputs.items() if name != missing]


def _trace_tower(name: str, tower: nn.Module, x: Tensor) -> Call:
    root = Call("", "", 0)
    running = [root]
    hooks = []
    counter = FlopCounterMode(display=False)

    def begin(call: Call) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            call.flops = -counter.get_total_flops()
            running[-1].inside.append(call)
            running.append(call)

        return hook

    def end(module: nn.Module, args: Any, output: Any) -> None:
        call = running.pop()
        call.flops += counter.get_total_flops()
        if isinstance(output, Tensor):
            call.shape, call.bytes = tuple(output.shape), output.numel() * output.element_size()

    for path, module in tower.named_modules(prefix=name):
        call = Call(path, type(module).__name__, sum(p.numel() for p in module.parameters()))
        hooks += [module.register_forward_pre_hook(begin(call)), module.register_forward_hook(end)]
    with torch.inference_mode(), counter:
        tower(x)
    return root.inside[0]


def fold(calls: list[Call]) -> list[Call]:
    """Numbered calls in a row that look alike become one, whose `last` names the last of them; likewise inside."""
    folded: list[Call] = []
    for call in calls:
        is_numbered = call.name.rsplit(".", 1)[-1].isdecimal()
        if folded and is_numbered and call.looks_like(folded[-1]):
            folded[-1].last = call.name
        else:
            folded.append(call)
    for call in folded:
        call.inside = fold(call.inside)
    return folded
