"""What several tests need: a tiny random CLIP, pictures of noise, and shards of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.model import CLIP
from miniclip.shards import Packed, pack, read_pairs


def tiny_config(**changes: Any) -> CLIPConfig:
    vision = VisionConfig(image_size=16, patch_size=8, width=16, layers=2, head_width=8)
    text = TextConfig(context_length=16, width=16, layers=2, head_width=8)
    return CLIPConfig(**{"embed_dim": 16, "vision": vision, "text": text, **changes})


def tiny_clip(seed: int = 0, **changes: Any) -> CLIP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(tiny_config(**changes)).eval()


def picture(seed: int = 0, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    """Noise of (width, height) `size`; no two seeds look alike."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def write_picture(
    path: Path, seed: int = 0, size: tuple[int, int] = (24, 20), mode: str = "RGB", **options: Any
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size, mode).save(path, **options)
    return path


def write_pairs(folder: Path, count: int, captions: int = 1, size: tuple[int, int] = (24, 20)) -> Path:
    """`count` PNG pictures, each with a .txt of `captions` lines: "picture 3, caption 0", …"""
    for number in range(count):
        path = write_picture(folder / f"{number:04d}.png", number, size)
        lines = [f"picture {number}, caption {line}" for line in range(captions)]
        path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    return folder


def pack_folder(source: Path, out: Path, **options: Any) -> Packed:
    return pack(read_pairs(source), out, source=str(source), **options)
