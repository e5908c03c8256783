"""A forward pass as a table: which modules run, what each gives, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..config import CLIPConfig
from ..model import CLIP


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
