"""The folder of somebody who reads the help and the pages: models, pictures and tables by the names that stand there.

Models are tiny and untrained, OpenAI's too: those lie in the cache, where they are kept once they are downloaded.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import torch
import warm
from helpers import pack_folder, write_pairs, write_picture

import miniclip

ROOT = Path(__file__).parents[1]
CLASSES = ("cat", "dog", "bird")


def write_world() -> None:
    """Into the working directory; the models of OpenAI's into cache/."""
    save_models()
    write_folders()
    write_tables()
    write_runs_and_shards()


def save_models() -> None:
    vision = miniclip.VisionConfig(image_size=16, patch_size=8, width=64, layers=1)
    config = miniclip.CLIPConfig(64, "quick_gelu", vision, miniclip.TextConfig(width=64, layers=1))
    models = {}
    for seed, name in enumerate(("openai", "runs/digits/best", "runs/mine/best", "runs/pets/best")):
        torch.manual_seed(seed)
        models[name] = miniclip.CLIP(config)
        if seed:
            miniclip.save(models[name], name)
    tensors = {key.removeprefix("text."): value for key, value in models["openai"].state_dict().items()}
    torch.save(tensors, "epoch_32.pt")
    sizes = {"input_resolution": 16, "context_length": 77, "vocab_size": 49408}
    Path("cache/clip").mkdir(parents=True)  # where OpenAI's files are kept once they are downloaded
    for name in ("ViT-B-32", "ViT-L-14"):
        torch.save(tensors | {name: torch.tensor(size) for name, size in sizes.items()}, f"cache/clip/{name}.pt")


def write_folders() -> None:
    """Folders of a folder a class, in which every image has a caption; some have enough images for a threshold."""
    for index, (folder, count) in enumerate(
        {"photos": 40, "my_photos": 6, "more_photos": 6, "street_scenes": 90, "other": 90, "more": 2}.items()
    ):
        for label, name in enumerate(CLASSES):
            for number in range(count):
                seed = 1000 * index + 100 * label + number
                path = write_picture(
                    Path(folder) / name / f"{number}{'.jpg' if name == 'bird' else '.png'}", seed, (12, 10)
                )
                path.with_suffix(".txt").write_text(f"a photo of a {name}, the {number}th")
    for seed, name in enumerate(("seven.png", "one.png", "picture.jpg", "cat.jpg", "car.jpg", "a.jpg", "b.jpg")):
        write_picture(Path(name), seed)
    Path("yesterday").touch()
    os.utime("yesterday", (0, 0))
    Path("queries.txt").write_text("a red car\na cat\n")
    Path("best").mkdir()


def write_tables() -> None:
    import pyarrow
    import pyarrow.parquet

    found = [(str(path), path.parent.name) for path in sorted(Path("photos").rglob("*.png"))][::4]
    titles = [(path.removeprefix("photos/"), f"a {name}") for path, name in found]
    for name in ("pairs.csv", "captions.csv"):
        write_table(name, ["filepath", "title"], titles)
    for name in ("new.csv", "old.csv"):
        write_table(name, ["filepath", "label"], found)
    people = [f"p{number % 4}" for number in range(len(found))]
    birds = [(path, label, person) for (path, label), person in zip(found, people, strict=True)]
    write_table("birds.csv", ["filepath", "label", "photographer"], birds)
    columns = dict(zip(("filepath", "species", "photographer"), zip(*birds, strict=True), strict=True))
    pyarrow.parquet.write_table(pyarrow.table({name: [*values] for name, values in columns.items()}), "birds.parquet")


def write_table(path: str, header: list[str], rows: list[tuple]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_runs_and_shards() -> None:
    for name in ("digits", "adamw", "muon"):
        log = Path("runs", name, "logs/version_0")
        log.mkdir(parents=True)
        write_table(str(log / "metrics.csv"), ["step", "train/loss"], [(step, 2 / (step + 1)) for step in range(3)])
    pack_folder(write_pairs(Path("few"), 2), Path("packed"))
    Path("laion").mkdir()
    for number in range(100):
        os.link(next(Path("packed").glob("*.tar")), f"laion/{number:05d}.tar")
    for name in ("configs", "eval_zeroshot.py"):
        Path(name).symlink_to(ROOT / name)


# ---- commands


def commands_of(line: str) -> list[list[str]]:
    """The words of each command in a line of the shell, which a pipe, a redirection or the like parts."""
    commands: list[list[str]] = [[]]
    words = shlex.shlex(line, posix=True, punctuation_chars="|<>")
    words.whitespace_split = True
    for word in words:
        if set(word) <= set("|<>"):
            commands.append([])
        else:
            commands[-1].append(word)
    return commands


RUN = """
import json, shlex, sys
from miniclip.commands.main import main
for line in json.loads(sys.argv[1]):
    print("$", line, flush=True)
    try:
        main(shlex.split(line)[1:])
    except SystemExit as ended:
        if ended.code:
            raise
"""


def run_here(lines: list[str], folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    plain = [line for line in lines if len(commands_of(line)) == 1]
    output = ""
    if plain:
        script = folder.with_name("run.py")
        script.write_text(RUN)
        output = run_in_terminal(warm.Popen, [sys.executable, script, json.dumps(plain)], folder, environment)
    for line in lines:
        if line not in plain:
            output += run_in_terminal(subprocess.Popen, ["bash", "-o", "pipefail", "-c", line], folder, environment)
    return output


def run_in_terminal(popen: type[subprocess.Popen], command: list, folder: Path, environment: dict[str, str]) -> str:
    """Standard output; a person at the terminal says yes to whatever is asked."""
    master, terminal = pty.openpty()
    shown: list[bytes] = []

    def watch() -> None:
        with contextlib.suppress(OSError):  # nobody holds the other end any more
            while piece := os.read(master, 4096):
                shown.append(piece)

    streams = {"stdin": terminal, "stdout": subprocess.PIPE, "stderr": terminal}
    with popen(command, cwd=folder, env=environment, text=True, **streams) as process:
        os.close(terminal)
        watcher = threading.Thread(target=watch)
        watcher.start()
        os.write(master, b"y\n" * 20)
        output = process.communicate()[0]
        watcher.join()
    os.close(master)
    assert process.returncode == 0, output + b"".join(shown).decode()
    return output
