"""Untuned Muon against tuned AdamW at several numbers of steps, on the demo's data and towers.

    python benchmarks/muon.py [--seeds 0 1 2] [--work runs/muon]

The validation pairs of seed 0 choose AdamW's rate and decay: every rate in short runs, the best two in runs of full
length, and the better one with the other decay, too. The best setting then runs with every seed. Muon is
`--model.optimizer.kind muon` and nothing else, in a quarter of the steps (with seed 0 in two fifths, too). All else is
configs/digits.yaml: batches of 256, and a schedule that ends with the run. Both start from the same weights.
Scores are top-1 in % of the last step's weights: on the validation pairs (which choose), the test scans' digits, and
pairs of digit and ink that training never sees. Finished runs are kept and not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RATES, DECAYS = (5e-4, 1e-3, 2e-3, 4e-3), (0.1, 0.2)
TABLES = ("val", "digits", "unseen")


def make_data(folder: Path, seed: int) -> None:
    if not (folder / "shards/train/index.json").is_file():
        subprocess.run([sys.executable, ROOT / "examples/digits.py", folder / "data", "--seed", str(seed)], check=True)
        command = [sys.executable, "-c", "from miniclip.commands.main import main; main()", "shards"]
        subprocess.run([*command, folder / "data/train", folder / "shards/train"], check=True)


def train(work: Path, seed: int, steps: int, **optimizer: str | float) -> dict[str, float]:
    """Scores after a run; `optimizer` overrides OptimizerConfig's defaults, not the demo's settings."""
    data = work / f"seed{seed}"
    make_data(data, seed)
    run = work / "_".join(["run", str(seed), str(steps), *(f"{name}={value}" for name, value in optimizer.items())])
    scores = run / "scores.json"
    if not scores.is_file():
        config = run / "config.yaml"
        run.mkdir(parents=True, exist_ok=True)
        lines = (ROOT / "configs/digits.yaml").read_text().splitlines(keepends=True)
        config.write_text("".join(line for line in lines if not line.startswith(("  optimizer:", "monitor", "name:"))))
        overrides = {
            "seed_everything": seed,
            "data.train": data / "shards/train",
            "data.val": "null",
            "trainer.callbacks": "null",
            "trainer.max_steps": steps,
            "trainer.val_check_interval": "null",
            "trainer.enable_progress_bar": "false",
            "trainer.default_root_dir": run,
            "overwrite": "true",
            **{f"model.optimizer.{name}": value for name, value in optimizer.items()},
        }
        flags = [f"--{name}={value}" for name, value in overrides.items()]
        subprocess.run([sys.executable, ROOT / "train.py", "fit", f"--config={config}", *flags], check=True)
        scores.write_text(json.dumps(score(run / "best", data / "data")))
    return json.loads(scores.read_text())


def score(model_folder: Path, data: Path) -> dict[str, float]:
    import miniclip
    from miniclip.evaluation.datasets.open import open_dataset
    from miniclip.evaluation.zero_shot import zero_shot_scores

    model, preprocess = miniclip.load(model_folder, device="cpu")
    results = {}
    for table in TABLES:
        found = zero_shot_scores(model, preprocess, open_dataset(str(data / f"{table}.csv")), batch_size=256)
        results[table] = 100 * float((found.ranked[:, 0] == found.labels).mean())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of AdamW; Muon has a quarter")
    parser.add_argument("--work", type=Path, default=Path("runs/muon"))
    options = parser.parse_args()
    work, steps, short = options.work.resolve(), options.steps, options.steps // 4

    print("| seed | steps | optimiser | val | digits | unseen pairs |\n|---|---|---|---|---|---|")

    def row(seed: int, steps: int, **optimizer: str | float) -> dict[str, float]:
        scores = train(work, seed, steps, **optimizer)
        told = ", ".join(str(value) if name == "kind" else f"{name} {value}" for name, value in optimizer.items())
        print(f"| {seed} | {steps} | {told} | {' | '.join(f'{scores[table]:.1f}' for table in TABLES)} |", flush=True)
        return scores

    row(0, short, kind="muon")
    row(0, 2 * steps // 5, kind="muon")
    by_rate = {lr: row(0, short, kind="adamw", lr=lr, weight_decay=DECAYS[0]) for lr in RATES}
    best_rates = sorted(RATES, key=lambda lr: by_rate[lr]["val"])[-2:]
    tried = {(lr, DECAYS[0]): row(0, steps, kind="adamw", lr=lr, weight_decay=DECAYS[0]) for lr in best_rates[::-1]}
    best_rate = max(tried, key=lambda each: tried[each]["val"])[0]
    tried[best_rate, DECAYS[1]] = row(0, steps, kind="adamw", lr=best_rate, weight_decay=DECAYS[1])
    lr, decay = max(tried, key=lambda each: tried[each]["val"])
    for seed in options.seeds:
        if seed != 0:
            row(seed, short, kind="muon")
            row(seed, steps, kind="adamw", lr=lr, weight_decay=decay)


if __name__ == "__main__":
    main()
