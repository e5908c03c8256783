"""A program of torch.export's: `torch.export.load(FILE).module()` runs it, and needs PyTorch alone."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from .towers import Tower


def write_program(tower: Tower, path: Path) -> None:
    """In the precision of the model's weights; what goes in and comes out is float32.

    Raises:
        ValueError: PyTorch can't export it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(tower.module, (tower.example,), dynamic_shapes=(tower.dynamic,))
        torch.export.save(program, path)
