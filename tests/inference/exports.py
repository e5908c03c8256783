"""Models to export, texts of every kind, and a process in which neither PyTorch nor miniclip can be imported."""

from __future__ import annotations

import html.entities
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from command_line import run
from helpers import tiny_clip

import miniclip
from miniclip.config import TextConfig, VisionConfig
from miniclip.model import CLIP

TEXT = TextConfig(context_length=77, width=16, layers=2, head_width=8)
VISIONS = {
    "vit": VisionConfig(image_size=16, patch_size=8, width=16, layers=2, head_width=8),
    "resnet": VisionConfig(kind="resnet", image_size=64, width=4, blocks=(1, 2, 1, 1), head_width=16),
    "timm": VisionConfig(kind="timm", image_size=32, timm_model="resnet10t"),
}


def small_clip(kind: str = "vit", width: int | None = None, **changes) -> CLIP:
    """Every weight and statistic is other than at the start of training, so that none can be left out unnoticed."""
    vision = replace(VISIONS[kind], width=width) if width else VISIONS[kind]
    clip = tiny_clip(vision=vision, text=TEXT, activation="quick_gelu", **changes)
    random = torch.Generator().manual_seed(1)
    for name, tensor in clip.state_dict().items():
        if tensor.is_floating_point() and "logit" not in name:
            noise = torch.rand(tensor.shape, generator=random)
            tensor.add_(noise if "running_var" in name else 0.2 * (noise - 0.5))
    return clip


def saved(folder: Path, clip: CLIP) -> str:
    miniclip.save(clip, folder)
    return str(folder)


_ALONE = """
import importlib.abc, runpy, sys
class Refusal(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "miniclip", "ftfy", "regex", "onnx", "transformers"):
            raise ImportError(f"{name} is not to be had here")
sys.meta_path.insert(0, Refusal())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(folder: Path, *arguments: str, code: int = 0) -> str:
    """What an export's run.py prints where only its own four packages are."""
    done = run(sys.executable, "-c", _ALONE, str(folder / "run.py"), *arguments, code=code)
    return done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Texts

_BLOCKS = [
    *[(0x20, 0x7E)] * 6,
    (0xA0, 0x17F), (0x180, 0x24F), (0x2B0, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x6FF), (0x900, 0x97F),
    (0xE00, 0xE7F), (0x1E00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x218F), (0x2190, 0x27BF), (0x2C00, 0x2DFF),
    (0x3000, 0x30FF), (0x4E00, 0x5000), (0xAC00, 0xAC80), (0xFB00, 0xFB4F), (0xFE00, 0xFFEF), (0x1F300, 0x1FAFF),
    (0x10000, 0x10FFF), (0x1D400, 0x1D7FF), (0, 0x1F), (0x7F, 0x9F),
]  # fmt: skip
_CAPTION = (
    "a photo of the dog cat's I'm they'll WE'VE naïve café Straße 1908 3.5 don't “quoted” it’s & &amp; &lt; &eacute; "
    "&Eacute; &EACUTE; &#233; &#x41; &#128; &notit; &not &amp;amp; ﬁne ｆｕｌｌ e\u0301 İstanbul ΣΑΣ ὈΔΥΣΣΕΎΣ "
    "<b>bold</b> Привет Чёрный кот 写真 مرحبا 한국어 🦉 👩‍👩‍👧 \u200b x² ½ ① Ⅷ ſ 'ſ \u212a Ω Å … – — \t \n \r\n "
    "\x1b[31m \x85 \u2028 \ufeff \xad"
)
_WORDS = _CAPTION.split(" ")


def texts(count: int, seed: int = 0) -> list[str]:
    """Captions, entities, scripts and symbols, in every mixture; most are nothing that a person would write."""
    chance = random.Random(seed)
    characters = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x110000))]
    entities = list(html.entities.html5)

    def some(choose, least: int, most: int) -> list[str]:
        return [choose() for _ in range(chance.randint(least, most))]

    def of_any_block() -> str:
        return chr(chance.randint(*chance.choice(_BLOCKS)))

    def word() -> str:
        return chance.choice(_WORDS)

    def one() -> str:
        kind = chance.random()
        if kind < 0.4:
            return " ".join(some(word, 1, 14))
        if kind < 0.6:
            return "".join(some(of_any_block, 1, 30))
        if kind < 0.75:
            block = chance.choice(_BLOCKS)
            return "".join(some(lambda: chr(chance.randint(*block)) if chance.random() < 0.8 else " ", 1, 40))
        if kind < 0.8:
            return "".join(some(lambda: chance.choice(characters), 1, 10))
        if kind < 0.9:
            return " ".join(some(lambda: f"&{chance.choice(entities)}{chance.choice(['', ';', 'x'])}", 1, 6))
        return "".join(some(word, 1, 10))

    return [one() for _ in range(count)]
