"""Training runs on small pictures: arguments, real runs, and what they leave."""

from __future__ import annotations

import csv
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback

import miniclip
from miniclip.commands import train as trainer
from miniclip.data.pairs import Batch

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "grey": (120, 120, 120)}
TINY = [
    "--model.clip.embed_dim=16",
    "--model.clip.vision.image_size=16",
    "--model.clip.vision.patch_size=8",
    "--model.clip.vision.width=16",
    "--model.clip.vision.layers=2",
    "--model.clip.vision.head_width=8",
    "--model.clip.text.width=16",
    "--model.clip.text.layers=2",
    "--model.clip.text.head_width=8",
    "--model.clip.text.context_length=16",
    "--model.optimizer.lr=0.01",
    "--data.batch_size=12",
    "--data.num_workers=1",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=1",
]


def arguments(data: Path, run: Path, *more: str, steps: int = 10) -> list[str]:
    return [
        "fit",
        *TINY,
        f"--data.train={data / 'shards/train'}",
        f"--data.val={data / 'shards/val'}",
        f"--trainer.default_root_dir={run}",
        f"--trainer.max_steps={steps}",
        *more,
    ]


def command(data: Path, run: Path, *more: str, steps: int = 10) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *arguments(data, run, *more, steps=steps)]


def state(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


def metrics(run: Path, version: int = 0) -> list[dict[str, str]]:
    with open(run / f"logs/version_{version}/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def fails(capsys, args: list[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        trainer.main(args)
    assert stopped.value.code == 2
    return capsys.readouterr().err


class StopAt(Callback):
    """Sends this process the signal that Ctrl-C sends, while the given step is trained."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


def validations(run: Path) -> dict[int, str]:
    rows = [row for log in sorted(run.glob("logs/*/metrics.csv")) for row in metrics(run, int(log.parent.name[8:]))]
    return {int(row["step"]): row["val/loss"] for row in rows if row.get("val/loss")}


# ---------------------------------------------------------------------------------------------------------------------
# Micro-batches


def random_batch(number: int, resolution: int, seed: int = 0) -> Batch:
    random = torch.Generator().manual_seed(seed)
    texts = [" ".join(["red", "round", "thing"][: 1 + n % 3]) + f" {n}" for n in range(number)]
    images = torch.randint(0, 256, (number, 3, resolution, resolution), dtype=torch.uint8, generator=random)
    return Batch(images, miniclip.tokenize(texts).long(), None, texts, [], 0, torch.arange(number))
