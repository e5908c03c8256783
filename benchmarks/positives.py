"""What groups of positives, several captions of an image, and hard negatives gain on two drawn sets.

    python benchmarks/positives.py WORK [--steps 100] [--seeds 0 1 2] [--arms base group …] [--sets digits scenes]

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
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
import digits  # noqa: E402
import scenes  # noqa: E402

from miniclip import load  # noqa: E402
from miniclip.evaluation.datasets.open import open_dataset  # noqa: E402
from miniclip.evaluation.zero_shot import zero_shot_scores  # noqa: E402

ARMS = {
    "base": [],
    "caption": ["--model.positives=caption"],
    "group": ["--model.positives=group", "--data.group=class"],
    "two captions": ["--data.captions.per_image=2"],
    "hard": ["--data.negatives=hard", "--data.neighbours={embeddings}"],
    "hard, caption": ["--data.negatives=hard", "--data.neighbours={embeddings}", "--model.positives=caption"],
    "hard, group": [
        "--data.negatives=hard",
        "--data.neighbours={embeddings}",
        "--model.positives=group",
        "--data.group=class",
    ],
    "one coarse group": ["--data.negatives=hard", "--data.group=coarse"],
}
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
    (digits if name == "digits" else scenes).make(out, seed)
    for part in ("train", "val"):
        rows = []
        for picture in sorted((out / part).glob("*.png")):
            texts = picture.with_suffix(".txt").read_text().splitlines()
            rows.append([f"{part}/{picture.name}", *classes_of(name, picture.stem), *texts])
        names = ["filepath", "class", "coarse", *(f"caption_{n}" for n in range(len(rows[0]) - 3))]
        with open(out / f"pairs-{part}.csv", "w", newline="") as file:
            csv.writer(file).writerows([names, *rows])


def miniclip(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "miniclip", *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def train(name: str, folder: Path, arm: str, seed: int, steps: int) -> None:
    out = folder / arm.replace(", ", "-").replace(" ", "-")
    embeddings = folder / "embeddings"
    options = [option.format(embeddings=embeddings) for option in ARMS[arm]]
    if any(str(embeddings) in option for option in options) and not embeddings.exists():
        miniclip("embed", str(folder / "train"), str(embeddings), "--model", str(folder / "base/best"))
    begin = time.perf_counter()
    miniclip(
        *("train", "fit", f"--config={CONFIGS[name]}", "--name=null", f"--trainer.default_root_dir={out}"),
        *(f"--data.train={folder / 'train'}", f"--data.val={folder / 'val'}", "--overwrite=true"),
        *("--data.batch_size=256", "--data.num_workers=0", "--trainer.accelerator=cpu", f"--seed_everything={seed}"),
        *(f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1", "--trainer.check_val_every_n_epoch=null"),
        *(
            f"--trainer.val_check_interval={steps}",
            "--trainer.callbacks=[]",
            "--monitor=val/loss",
            "--monitor_mode=min",
        ),
        *("--trainer.enable_progress_bar=false", *options),
    )
    model, preprocess = load(out / "best", device="cpu")
    scores = {
        test: 100 * zero_shot_scores(model, preprocess, open_dataset(folder / f"data/{test}.csv")).metrics.acc1
        for test in TESTS[name]
    }
    (out / "scores.json").write_text(json.dumps({**scores, "seconds": time.perf_counter() - begin}))
    print(name, seed, arm, scores, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--sets", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    options = parser.parse_args()
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for arm, name, seed in itertools.product(options.arms, options.sets, options.seeds):
        folder = options.work.resolve() / f"{name}-{seed}"
        if not (folder / "data").exists():
            make(name, folder / "data", seed)
        for part in ("train", "val"):
            if not (folder / part).exists():
                miniclip("shards", str(folder / f"data/pairs-{part}.csv"), str(folder / part))
        done = folder / arm.replace(", ", "-").replace(" ", "-") / "scores.json"
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
