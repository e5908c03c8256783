"""What several tests need: a tiny random CLIP, pictures of noise, shards of them, and a server of files."""

from __future__ import annotations

import csv
import functools
import http.server
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from servers import InBackground
from torch.utils._python_dispatch import TorchDispatchMode

from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.data.pack import pack
from miniclip.data.sample_files import Packing
from miniclip.data.shard_index import Packed
from miniclip.data.sources import read_pairs
from miniclip.model import CLIP


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
    """With any argument of `pack` and any field of its `Packing`."""
    fields = {name: options.pop(name) for name in Packing.__dataclass_fields__ if name in options}
    return pack(read_pairs(source), out, source=str(source), packing=Packing(**fields), **options)


def table(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding=encoding, newline="")
    return path


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {member.name: file.extractfile(member).read() for member in file}


def all_members(out: Path) -> dict[str, bytes]:
    return {name: data for tar in sorted(out.glob("*.tar")) for name, data in members(tar).items()}


def rejected_rows(out: Path) -> list[list[str]]:
    """Key, source and reason of each."""
    with open(out / "rejected.csv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["key", "source", "reason"]
    return rows


def rejections(out: Path) -> dict[str, str]:
    return {source: reason for _, source, reason in rejected_rows(out)}


class LargestTensor(TorchDispatchMode):
    """While it lasts, `numel` is the size of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def everything_below(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder with its content, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


class Served(InBackground):
    """A folder at a URL of this machine. Knows no ranges, as python -m http.server; `gets` has the paths asked for."""

    def __init__(self, folder: Path) -> None:
        gets = self.gets = list[str]()

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                gets.append(self.path)
                super().do_GET()

            def log_message(self, *_: Any) -> None:
                pass

        self.listen(functools.partial(Handler, directory=str(folder)))


def trainer_at(step: int, rank: int = 0, world_size: int = 1, max_steps: int = -1) -> SimpleNamespace:
    """All that a data module asks of its trainer."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    return SimpleNamespace(
        global_step=step,
        global_rank=rank,
        world_size=world_size,
        strategy=strategy,
        max_steps=max_steps,
        max_epochs=-1,
        is_global_zero=rank == 0,
    )
