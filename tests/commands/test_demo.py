"""The demo's data, its learning, and that every command and configuration that the documents show works."""

import csv
import os
import re
import shutil
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What `make demo` makes, up to training, as runs/digits below a working directory."""
    folder = tmp_path_factory.mktemp("demo")
    digits.make(folder / "runs/digits/data")
    for part in ("train", "val"):
        source = folder / "runs/digits/data" / part
        pack(read_pairs(source), folder / "runs/digits/shards" / part, source=part)
    return folder


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


def test_the_demo_learns_within_60_steps(folder, monkeypatch):
    monkeypatch.chdir(folder)
    steps = ["--trainer.max_steps=60", "--trainer.val_check_interval=60", "--name=short"]
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
    from miniclip.evaluation.zero_shot import measure, zero_shot_scores
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
            metrics = measure(zero_shot_scores(model, preprocess, data))
            print(seed, name, metrics.acc1, metrics.interval)
            accuracies.append(metrics.acc1)
    assert min(scores["digits"]) >= 0.93
    assert sum(scores["digits"]) / 3 >= 0.95
    assert sum(scores["unseen"]) / 3 >= 0.80


# ---------------------------------------------------------------------------------------------------------------------
# Documents and configurations


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


SECTIONS = [
    "--model.clip.embed_dim=32",
    "--model.optimizer.lr=0.002",
    "--data.num_workers=0",
    "--trainer.log_every_n_steps=1",
]


# What makes a step of the large ones a matter of a second, and gives what they start or learn from.
SMALL_TEXT = ["--model.clip.text.width=64", "--model.clip.text.layers=1"]
SMALL = {
    "vit-b32.yaml": ["--model.clip.vision={image_size: 32, width: 64, layers: 1}", *SMALL_TEXT],
    "rn50.yaml": ["--model.clip.vision={image_size: 32, width: 8, blocks: [1, 1, 1, 1]}", *SMALL_TEXT],
    "timm.yaml": ["--model.clip.vision.image_size=32", *SMALL_TEXT],
    "lit.yaml": [
        "--model.clip.vision={timm_model: test_resnet, image_size: 32}",
        "--model.image_weights=test_resnet.pth",
        *SMALL_TEXT,
    ],
    "siglip-b16.yaml": [
        "--model.clip.vision={image_size: 32, patch_size: 16, width: 64, layers: 1}",
        "--model.micro_batch_size=8",
        *SMALL_TEXT,
    ],
    "finetune.yaml": ["--model.start_from=start"],
    "distill.yaml": [
        "--model.clip.vision={image_size: 32, width: 64, layers: 1}",
        "--model.teacher=start",
        *SMALL_TEXT,
    ],
}


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_configuration_trains_with_a_field_of_each_section_overridden(folder, monkeypatch, config):
    monkeypatch.chdir(folder)
    shards = [f"--data.{part}=runs/digits/shards/{part}" for part in ("train", "val")]
    short = [
        "--trainer.max_steps=2",
        "--data.val_pairs=16",
        "--data.batch_size=16",
        f"--name={config}",
    ]
    import timm
    from helpers import tiny_clip

    from miniclip import load, save

    save(tiny_clip(embed_dim=32), "start", overwrite=True)
    torch.save(timm.create_model("test_resnet").state_dict(), "test_resnet.pth")
    more = ["--trainer.accelerator=cpu", *SMALL.get(config, [])]
    trainer.main(["fit", "--config", str(ROOT / "configs" / config), *shards, *short, *SECTIONS, *more])
    model, _ = load(f"runs/{config}/best")
    assert model.config.embed_dim == 32


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_configuration_opens_with_its_command(config):
    head = (ROOT / "configs" / config).read_text().split("\nseed_everything")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert f"configs/{config}" in head


def test_every_command_of_the_readme_runs(folder, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(folder, work)
    for name in ("configs", "train.py", "eval_zeroshot.py"):
        (work / name).symlink_to(ROOT / name)
    source = work / "runs/digits/data"
    shutil.copytree(source / "val", work / "my_pairs")
    for digit in ("three", "seven"):
        (work / "my_photos" / digit).mkdir(parents=True)
        for path in sorted((source / "test").glob(f"*_{digit}_*.png"))[:3]:
            shutil.copy(path, work / "my_photos" / digit)
    shutil.copy(path, work / "picture.png")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def shell(command: str) -> None:
        done = subprocess.run(
            command, shell=True, cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, command + done.stdout + done.stderr

    shell("python train.py fit --config configs/digits.yaml --trainer.max_steps 2 --trainer.val_check_interval 2")
    commands = [line for block in blocks("README.md", "bash") for line in block.splitlines()]
    commands = [line.split("  #")[0] for line in commands if line]
    ran = 0
    for command in commands:
        if command.startswith(("make ", "pip install")):  # the environment that runs these tests is what they make
            continue
        shell(command + (" --trainer.max_steps 2 --data.batch_size 16" if " fit " in command else ""))
        ran += 1
    assert ran == 6
    (example,) = blocks("README.md", "python")
    (work / "example.py").write_text(example)
    shell("python example.py")
    assert (work / "runs/photos/report.html").is_file()
    assert (work / "runs/mine/best/config.json").is_file()


def test_the_walk_through_the_architecture_is_true():
    names: dict[str, object] = {}
    steps = blocks("docs/architecture.md", "python")
    assert len(steps) == 9
    for step in steps:
        exec(compile(step, "docs/architecture.md", "exec"), names)


def test_every_file_that_a_document_links_to_is_there():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"
