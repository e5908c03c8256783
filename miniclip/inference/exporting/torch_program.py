"""A program of torch.export's: `torch.export.load(FILE).module()` runs it, and needs PyTorch alone."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path

import torch

from ...common.files import atomic_write
from .towers import ImageTower, Tower


def write_program(tower: Tower, path: Path, precision: str) -> None:
    """Computes in "float32", "float16" or "bfloat16"; what goes in and comes out is float32.

    Raises:
        ValueError: PyTorch can't export it.
    """
    module = copy.deepcopy(tower.module).to(getattr(torch, precision))
    if isinstance(module, ImageTower):
        module.dtype = getattr(torch, precision)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (tower.example,), dynamic_shapes=(tower.dynamic,))
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # quotes the code, and names the folders that it lay in
        content = io.BytesIO()
        torch.export.save(program, content)  # on a full disk its own writer would end the process
    with atomic_write(path) as file:
        file.write(content.getbuffer())
