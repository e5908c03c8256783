"""Fine-tuning on a small shifted set: what the model gains on it, and what it forgets.

    python benchmarks/finetune.py [--work runs/finetune-benchmark] [--model runs/digits/best] [--data runs/digits/data]

The demo's model knows handwritten digits in coloured ink on white paper (`make demo` first). The new task is the same
digits pencilled on wrapping paper: brown on brown, slanted, smeared, and captioned in words of their own. Every scan
stays in the split that the demo gave it: fine-tuning sees 300 scans that pre-training saw (in ink), the demo's
validation scans choose models and alphas, and scores are on its test scans, which no training and no choice has seen.

The model is fine-tuned twice: by the preset of configs/finetune.yaml, and naively, by AdamW at 5e-4, CLIP's own
pre-training rate. The preset's rate, 1e-5, is meant for OpenAI's towers of width 768. The effect of an AdamW step on a
layer's output grows with the width, so the demo's width of 128 takes 768 / 128 = 6 times that rate, 6e-5.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from digits import DIGITS, SIZE  # noqa: E402

WORDINGS = (
    "{digit} pencilled on wrapping paper",
    "a slanted {digit} on a brown parcel",
    "a smeared {digit}, brown on brown",
    "the parcel says {digit}",
)
TEMPLATES = ("{c} pencilled on wrapping paper", "a slanted {c} on a brown parcel", "the parcel says {c}")
NUM_TRAIN = 300
LR, NAIVE_LR = 6e-5, 5e-4
EPOCHS, BATCH = 30, 100


def pencil(scan: np.ndarray, random: np.random.Generator) -> Image.Image:
    """A scan (8 x 8, values 0 to 16) as a number pencilled on a parcel."""
    side = int(random.integers(18, 25))
    small = Image.fromarray((scan / 16 * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (SIZE, SIZE))
    canvas.paste(small, tuple(int(n) for n in random.integers(SIZE - side + 1, size=2)))
    slanted = canvas.rotate(float(random.uniform(15, 35)), Image.Resampling.BICUBIC)
    strokes = np.asarray(slanted.filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float32)[..., None] / 255
    paper = np.array((190, 150, 105)) + random.uniform(-15, 15, size=3)
    lead = np.array((80, 45, 20)) + random.uniform(-15, 15, size=3)
    picture = paper * (1 - strokes) + lead * strokes + random.normal(0, 14, size=(SIZE, SIZE, 3))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def make(data: Path, out: Path, seed: int = 0) -> None:
    """Writes out/train (pairs), out/val (pairs), val.csv and test.csv; the scans keep the demo's splits."""
    scans, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    for part in ("train", "val", "test"):
        numbers = sorted({int(path.name.split("_")[0]) for path in (data / part).glob("*.png")})
        if part == "train":
            numbers = sorted(random.permutation(numbers)[:NUM_TRAIN].tolist())
        (out / part).mkdir(parents=True)
        rows = [("filepath", "label", "scan")]
        for number in numbers:
            digit = DIGITS[int(labels[number])]
            path = out / part / f"{number:04d}.png"
            pencil(scans[number].reshape(8, 8), random).save(path)
            texts = random.permutation([wording.format(digit=digit) for wording in WORDINGS])
            path.with_suffix(".txt").write_text("\n".join(texts) + "\n")
            rows.append((f"{part}/{path.name}", digit, str(number)))
        name = f"parcel-{part}"
        with open(out / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
        (out / f"{name}.classnames.txt").write_text("\n".join(DIGITS) + "\n")
        (out / f"{name}.templates.txt").write_text("\n".join(TEMPLATES) + "\n")


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)


def finetune(model: Path, data: Path, new: Path, out: Path, *settings: str) -> None:
    callback = {
        "class_path": "miniclip.training.zero_shot.ZeroShotEvaluation",
        "init_args": {"data": str(new / "parcel-val.csv"), "others": {"old": str(data / "val.csv")}},
    }
    command = [
        str(ROOT / "train.py"),
        "fit",
        f"--config={ROOT / 'configs/finetune.yaml'}",
        f"--model.start_from={model}",
        f"--data.train={new / 'train'}",
        f"--data.val={new / 'val'}",
        f"--data.batch_size={BATCH}",
        "--data.num_workers=1",
        "--monitor=val/zero_shot_acc1",
        f"--trainer.max_epochs={EPOCHS}",
        "--trainer.check_val_every_n_epoch=5",
        "--trainer.log_every_n_steps=1",
        f"--trainer.callbacks=[{json.dumps(callback)}]",
        "--name=null",  # the file's
        f"--trainer.default_root_dir={out}",
        "--trainer.accelerator=cpu",
        *settings,
    ]
    run(*command)


def score(model: Path, tables: dict[str, Path]) -> dict[str, float]:
    from miniclip import load
    from miniclip.evaluation.datasets.open import open_dataset
    from miniclip.evaluation.zero_shot import zero_shot_scores

    loaded, preprocess = load(model, device="cpu")
    return {
        name: zero_shot_scores(loaded, preprocess, open_dataset(table)).metrics.acc1 for name, table in tables.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/finetune-benchmark"))
    parser.add_argument("--model", type=Path, default=Path("runs/digits/best"))
    parser.add_argument("--data", type=Path, default=Path("runs/digits/data"))
    parser.add_argument("--lr", type=float, default=LR, help="of the preset")
    parser.add_argument("--seed", type=int, default=0, help="of pictures and training")
    options = parser.parse_args()
    work, model, data = options.work.resolve(), options.model.resolve(), options.data.resolve()
    if not (model / "config.json").is_file() or not data.is_dir():
        raise SystemExit(f"{model} and {data} are needed: `make demo` makes them")
    shutil.rmtree(work, ignore_errors=True)
    new = work / "data"
    make(data, new, options.seed)
    seed = f"--seed_everything={options.seed}"
    finetune(model, data, new, work / "preset", seed, f"--model.optimizer.lr={options.lr}")
    naive = [
        f"--model.optimizer.lr={NAIVE_LR}",
        "--model.optimizer.weight_decay=0.2",
        "--model.optimizer.layer_decay=1",
    ]
    finetune(model, data, new, work / "naive", seed, *naive)
    for name in ("preset", "naive"):
        sources = [str(model), str(work / name / "best"), "--out", str(work / f"{name}-wise")]
        sets = ["--data", str(new / "parcel-val.csv"), "--retain", str(data / "val.csv"), "--may-lose", "1"]
        run("-m", "miniclip", "interpolate", *sources, *sets)
    tables = {"parcel (new)": new / "parcel-test.csv"}
    tables |= {f"{name} (old)": data / f"{name}.csv" for name in ("digits", "inks", "unseen")}
    print(f"\n| held-out zero-shot top-1, % | {' | '.join(tables)} |\n|---{'|---' * len(tables)}|")
    scores = {}
    for name, folder in {
        "before": model,
        "preset": work / "preset/best",
        "preset, interpolated": work / "preset-wise",
        "naive": work / "naive/best",
        "naive, interpolated": work / "naive-wise",
    }.items():
        told = name
        if name.endswith("interpolated"):
            alpha = json.loads((folder / "interpolation.json").read_text())["saved_alpha"]
            told += f" (α = {alpha:g} by validation)"
        scores[name] = score(folder, tables)
        row = " | ".join(f"{100 * value:.1f}" for value in scores[name].values())
        print(f"| {told} | {row} |", flush=True)
    (work / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")


if __name__ == "__main__":
    main()
