"""The demo's data and its learning."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import digits
import pytest
import torch

from miniclip.commands import train as trainer
from miniclip.data.pack import pack
from miniclip.data.sources import read_pairs

ROOT = Path(__file__).parents[2]


def scans_and_pairs(folder: Path, part: str) -> tuple[set[str], set[tuple[str, str]]]:
    names = [path.stem.split("_") for path in (folder / "runs/digits/data" / part).glob("*.png")]
    return {scan for scan, _, _ in names}, {(digit, ink) for _, digit, ink in names}


def test_no_scan_is_in_two_parts_and_all_are_in_one(folder):
    train, val, test = (scans_and_pairs(folder, part)[0] for part in ("train", "val", "test"))
    assert not train & val
    assert not train & test
    assert not val & test
    assert len(train | val | test) == 1797
    assert len(test) >= 300


def test_sixteen_combinations_never_occur_before_the_test_and_only_they_are_called_unseen(folder):
    every = {(digit, ink) for digit in digits.DIGITS for ink in digits.INKS}
    train, val = (scans_and_pairs(folder, part)[1] for part in ("train", "val"))
    unseen = every - train
    assert len(unseen) == 16
    assert not val & unseen
    assert {digit for digit, _ in unseen} == set(digits.DIGITS)
    assert {ink for _, ink in unseen} == set(digits.INKS)
    with open(folder / "runs/digits/data/unseen.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {tuple(row["label"].split(" in ")) for row in rows} == unseen
    test_scans = scans_and_pairs(folder, "test")[0]
    assert {f"{int(row['scan']):04d}" for row in rows} <= test_scans
    captions = [p.read_text() for part in ("train", "val") for p in (folder / "runs/digits/data" / part).glob("*.txt")]
    for digit, ink in unseen:
        assert not any(re.search(rf"\b{digit}\b", text) and re.search(rf"\b{ink}\b", text) for text in captions)


def test_a_caption_names_digit_and_ink_and_a_picture_is_told_by_its_name(folder):
    for path in sorted((folder / "runs/digits/data/train").glob("*.txt"))[::100]:
        _, digit, ink = path.stem.split("_")
        lines = path.read_text().splitlines()
        assert len(set(lines)) == 3
        assert all(digit in line and ink in line for line in lines)


def test_the_demo_learns_within_36_steps(folder, monkeypatch):
    monkeypatch.chdir(folder)
    steps = ["--trainer.max_steps=36", "--trainer.val_check_interval=36", "--name=short"]
    trainer.main(["fit", "--config", str(ROOT / "configs/digits.yaml"), *steps])
    scores = torch.load("runs/short/checkpoints/best.ckpt", weights_only=True)["callbacks"]
    assert scores["BestCheckpoint"]["monitor"] == "val/loss"
    assert scores["BestCheckpoint"]["score"] < 3  # of 179 pairs, so chance is 5.2
    with open("runs/short/logs/version_0/metrics.csv", newline="") as file:
        accuracies = [float(row["val/zero_shot_acc1"]) for row in csv.DictReader(file) if row["val/zero_shot_acc1"]]
    assert accuracies[-1] > 0.25  # of 80 classes, so chance is 0.0125


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_three_seeds_of_the_demo_reach_its_scores(tmp_path):
    from miniclip.evaluation.datasets.open import open_dataset
    from miniclip.evaluation.zero_shot import zero_shot_scores
    from miniclip.weights import load as weights

    scores = {"digits": [], "unseen": []}
    for seed in range(3):
        work = tmp_path / str(seed)
        digits.make(work / "runs/digits/data", seed)
        for part in ("train", "val"):
            pack(read_pairs(work / "runs/digits/data" / part), work / "runs/digits/shards" / part, source=part)
        command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(ROOT / "configs/digits.yaml")]
        environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
        subprocess.run([*command, f"--seed_everything={seed}"], cwd=work, check=True, env=environment)
        model, preprocess = weights.load(work / "runs/digits/best")
        for name, accuracies in scores.items():
            data = open_dataset(work / f"runs/digits/data/{name}.csv", group_column="scan")
            metrics = zero_shot_scores(model, preprocess, data).metrics
            print(seed, name, metrics.acc1, metrics.interval)
            accuracies.append(metrics.acc1)
    assert min(scores["digits"]) >= 0.93
    assert sum(scores["digits"]) / 3 >= 0.95
    assert sum(scores["unseen"]) / 3 >= 0.80
