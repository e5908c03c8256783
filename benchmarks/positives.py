"""What groups of positives, several captions of an image, and hard negatives gain on two drawn sets.

    python benchmarks/positives.py WORK [--steps 50] [--seeds 0 1 2] [--arms base group …] [--sets digits scenes]

The demo's digits (with its recipe) and the scenes of `scenes.py`, packed from tables whose columns name groups: `class`
(digit and ink; shape, colour, filling and place), within which every caption fits every picture, and `coarse` (ink;
shape), whose members are easily confused. Each arm trains from scratch on as many pictures; WORK keeps what is done, so
that the same command goes on. Scores are held-out zero-shot top-1 in %; a seed decides data and training.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
import digits  # noqa: E402
import scenes  # noqa: E402

from miniclip import load, save  # noqa: E402
from miniclip.commands import main as cli  # noqa: E402
from miniclip.config import CLIPConfig, TextConfig, VisionConfig  # noqa: E402
from miniclip.data.augmentation import Augmentation  # noqa: E402
from miniclip.data.module import PairDataModule  # noqa: E402
from miniclip.data.pack import pack  # noqa: E402
from miniclip.data.pairs import CaptionChoice  # noqa: E402
from miniclip.data.sources import read_pairs  # noqa: E402
from miniclip.evaluation.datasets.open import open_dataset  # noqa: E402
from miniclip.evaluation.zero_shot import zero_shot_scores  # noqa: E402
from miniclip.training.optimizer import OptimizerConfig, learning_rate_factor, make_optimizer  # noqa: E402
from miniclip.training.step import MAX_LOGIT_SCALE, CLIPTraining, move_average  # noqa: E402

ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "caption": {"positives": "caption"},
    "group": {"positives": "group", "group": "class"},
    "two captions": {"captions": CaptionChoice(per_image=2)},
    "hard": {"negatives": "hard", "neighbours": ""},
    "hard, caption": {"negatives": "hard", "neighbours": "", "positives": "caption"},
    "hard, group": {"negatives": "hard", "neighbours": "", "positives": "group", "group": "class"},
    "one coarse group": {"negatives": "hard", "group": "coarse"},
}
BATCH, EMA = 128, 0.96
EVERY = 4  # of the classes of the scenes, so that hundreds of steps are minutes
CONFIGS = {"digits": ROOT / "configs/digits.yaml", "scenes": ROOT / "benchmarks/scenes.yaml"}
TESTS = {"digits": ("digits", "unseen"), "scenes": ("scenes", "unseen")}


def classes_of(name: str, stem: str) -> tuple[str, str]:
    """The fine class of a picture, and the coarse one, by its file's name."""
    if name == "digits":
        _, digit, ink = stem.split("_")
        return f"{digit} {ink}", ink
    number = int(stem.split("_")[0])
    return scenes.class_name(number), scenes.CLASSES[number][0]


def make(name: str, out: Path, seed: int) -> None:
    """Draws a set, and writes beside each folder the table that it is packed from."""
    if name == "digits":
        digits.make(out, seed)
    else:
        scenes.make(out, seed, every=EVERY)
    rows = []
    for picture in sorted((out / "train").glob("*.png")):
        texts = picture.with_suffix(".txt").read_text().splitlines()
        rows.append([f"train/{picture.name}", *classes_of(name, picture.stem), *texts])
    names = ["filepath", "class", "coarse", *(f"caption_{n}" for n in range(len(rows[0]) - 3))]
    with open(out / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


def train(name: str, folder: Path, arm: str, seed: int, steps: int) -> None:
    """Trains by the recipe of the set's configuration, in a plain loop, and writes the scores."""
    settings = yaml.safe_load(CONFIGS[name].read_text())
    clip, options = settings["model"]["clip"], dict(ARMS[arm])
    config = CLIPConfig(**{**clip, "vision": VisionConfig(**clip["vision"]), "text": TextConfig(**clip["text"])})
    torch.manual_seed(seed)
    optimizer_config = OptimizerConfig(**settings["model"]["optimizer"])
    module = CLIPTraining(
        config, optimizer_config, positives=options.get("positives", "pair"), ema_decay=EMA, seed=seed
    )
    if "neighbours" in options:
        options["neighbours"] = str(folder / "embeddings")
        if not Path(options["neighbours"]).exists():
            cli.main(["embed", str(folder / "train"), options["neighbours"], "--model", str(folder / "base")])
    sizes = {"image_size": config.vision.image_size, "context_length": config.text.context_length}
    crops = Augmentation(**settings["data"]["augmentation"])
    data = PairDataModule(
        str(folder / "train"), batch_size=BATCH, num_workers=0, augmentation=crops, seed=seed, **sizes, **options
    )
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    alone = SimpleNamespace(
        global_step=0, global_rank=0, world_size=1, strategy=strategy, max_steps=steps, max_epochs=-1
    )
    data.trainer = module.trainer = alone
    data.setup("fit")
    optimizer = make_optimizer(module.clip, optimizer_config)
    rates = [group["lr"] for group in optimizer.param_groups]
    while alone.global_step < steps:
        for batch in data.train_dataloader():
            factor = learning_rate_factor(alone.global_step, steps, max(1, steps // 50), "cosine", 0.0, 0.0)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            optimizer.zero_grad()
            module.training_step(batch, 0).backward()
            optimizer.step()
            with torch.no_grad():
                module.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            alone.global_step += 1
            move_average(module.average, module.clip, min(EMA, (1 + alone.global_step) / (10 + alone.global_step)))
            if alone.global_step == steps:
                break
    out = folder / file_name(arm)
    save(module.average.eval(), out)
    model, preprocess = load(out, device="cpu")
    scores = {
        test: 100 * zero_shot_scores(model, preprocess, open_dataset(folder / f"data/{test}.csv")).metrics.acc1
        for test in TESTS[name]
    }
    (out / "scores.json").write_text(json.dumps(scores))
    print(name, seed, arm, scores, flush=True)


def file_name(arm: str) -> str:
    return arm.replace(", ", "-").replace(" ", "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--sets", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    options = parser.parse_args()
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for arm, name, seed in itertools.product(options.arms, options.sets, options.seeds):
        folder = options.work.resolve() / f"{name}-{seed}"
        if not (folder / "data").exists():
            make(name, folder / "data", seed)
        if not (folder / "train").exists():
            table = folder / "data/pairs.csv"
            pack(read_pairs(table), folder / "train", source=str(table))
        done = folder / file_name(arm) / "scores.json"
        if not done.exists():
            train(name, folder, arm, seed, options.steps)
        found.setdefault((name, arm), []).append(json.loads(done.read_text()))
    for name in options.sets:
        print(f"\n| {name}, {options.steps} steps | {' | '.join(TESTS[name])} |\n|---|---|---|")
        for arm in options.arms:
            cells = []
            for test in TESTS[name]:
                scores = [each[test] for each in found[name, arm]]
                of_seeds = ", ".join(f"{score:.1f}" for score in scores)
                gains = [
                    each[test] - base[test] for each, base in zip(found[name, arm], found[name, "base"], strict=True)
                ]
                cells.append(f"{statistics.mean(scores):.1f} ({of_seeds}; {statistics.mean(gains):+.1f})")
            print(f"| {arm} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
