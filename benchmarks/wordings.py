"""Prompts worded as the captions beside prompts by hand: three data sets, each with wordings of its own.

    python benchmarks/wordings.py [--out FOLDER] [--only NAME]

Draws each set, trains a small CLIP on it (one to two minutes of one core each), and scores what `miniclip eval` asks by
default beside five wordings by hand. Two of the five are wordings of the captions, which somebody would have to know.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "examples"), str(ROOT / "benchmarks")]

import digits  # noqa: E402
import scenes  # noqa: E402

STEPS, BATCH = 300, 256
Drawn = tuple[Image.Image, str, str]  # picture, name of its class, caption


@dataclass(frozen=True)
class Set:
    """A data set: `draw` makes a picture of the training or of the test, and the five prompts are by hand."""

    name: str
    draw: Callable[[np.random.Generator, bool], Drawn]
    by_hand: tuple[str, str, str, str, str]
    num_train: int = 4000
    num_test: int = 1000


def _scene(random: np.random.Generator) -> tuple[Image.Image, tuple[str, str, str, str]]:
    number = int(random.integers(len(scenes.CLASSES)))
    return scenes.draw(number, random), scenes.CLASSES[number]


SLATE = (
    "{} chalked on a slate",
    "look, there you see a {}",
    "exhibit of the village school: one {}, by a child of six",
    "on the third page of the book we found a {}",
    "{}, scanned at the library.",
)


def draw_slate(random: np.random.Generator, is_train: bool) -> Drawn:
    """1,280 classes of four and five words; captions name the class and nothing else."""
    picture, (shape, colour, filling, place) = _scene(random)
    name = f"{place} {filling} {colour} {shape}"
    return picture, name, random.choice(SLATE).replace("{}", name)


CUADERNO = (
    "en esta hoja hay un {}",
    "{} dibujado a mano",
    "mira: un {}",
    "cuaderno escolar con un {} en la página {p}",
)
FORMAS = {"circle": "círculo", "square": "cuadrado", "triangle": "triángulo", "star": "lucero", "cross": "aspa",
          "bar": "listón", "arrow": "dardo", "moon": "creciente"}  # fmt: skip
COLORES = {"red": "rojo", "orange": "naranja", "yellow": "amarillo", "green": "verde", "blue": "azul",
           "purple": "morado", "brown": "marrón", "black": "negro"}  # fmt: skip


def draw_cuaderno(random: np.random.Generator, is_train: bool) -> Drawn:
    """64 classes in Spanish; one of the wordings holds a number that means nothing."""
    picture, (shape, colour, _, _) = _scene(random)
    name = f"{FORMAS[shape]} {COLORES[colour]}"
    return picture, name, random.choice(CUADERNO).replace("{}", name).replace("{p}", str(random.integers(100)))


LEDGER = (
    "entry {} of the ledger, {ink} ink",
    "written in {ink}: {}",
    "the clerk put down a {} in {ink}",
    "{ink} {}, from an old cash book",
    "sum of the day is {} ({ink})",
)


class _Scans:
    """Handwritten digits: the last 400 of the scans are for the test."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        self.pixels, self.labels = load_digits(return_X_y=True)

    def __call__(self, random: np.random.Generator, is_train: bool) -> Drawn:
        """10 classes; captions name an ink beside the class."""
        index = int(random.integers(1397) if is_train else random.integers(1397, 1797))
        ink, name = str(random.choice(list(digits.INKS))), digits.DIGITS[self.labels[index]]
        picture = digits.compose(self.pixels[index].reshape(8, 8), ink, random)
        return picture, name, random.choice(LEDGER).replace("{}", name).replace("{ink}", ink)


def sets() -> list[Set]:
    simple = "a photo of a {}."
    return [
        Set("slate", draw_slate, (simple, "{}", "a drawing of a {}", SLATE[0], SLATE[1])),
        Set("cuaderno", draw_cuaderno, ("una foto de un {}.", "{}", "un dibujo de un {}", CUADERNO[0], CUADERNO[1])),
        Set("ledger", _Scans(), (simple, "{}", "the number {}", "entry {} of the ledger", "the clerk put down a {}")),
    ]


def write(data: Set, out: Path, seed: int) -> None:
    """train/ with captions, test/ and test.csv with labels."""
    random = np.random.default_rng(seed)
    rows = []
    for part, count in (("train", data.num_train), ("test", data.num_test)):
        (out / part).mkdir(parents=True)
        for number in range(count):
            picture, name, caption = data.draw(random, part == "train")
            path = out / part / f"{number:05d}.png"
            picture.save(path, compress_level=1)
            if part == "train":
                path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
            else:
                rows.append((f"{part}/{path.name}", name))
    with open(out / "test.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("filepath", "label"), *rows])


def train(folder: Path, seed: int) -> Path:
    """The recipe of benchmarks/scenes.yaml, on one core."""
    options = {
        "data.train": folder / "train", "data.batch_size": BATCH, "data.num_workers": 0,
        "trainer.max_steps": STEPS, "trainer.max_epochs": -1, "trainer.accelerator": "cpu",
        "trainer.default_root_dir": folder / "run", "seed_everything": seed,
    }  # fmt: skip
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(ROOT / "benchmarks" / "scenes.yaml")]
    subprocess.run([*command, *arguments], check=True, stdout=subprocess.DEVNULL)
    return folder / "run" / "best"


def score(model: Path, table: Path, by_hand: Sequence[str]) -> dict[str, float]:
    """Top-1, in %, of the default and of each wording by hand."""
    from miniclip.evaluation.datasets.open import open_dataset
    from miniclip.evaluation.other_libraries import open_model
    from miniclip.evaluation.suite import Task, evaluate

    data: Any = open_dataset(table)
    variants = tuple(replace(data, templates=(text,), templates_from=text) for text in by_hand)
    first, *others = evaluate(open_model(str(model), "cpu"), Task(data, variants), batch_size=250)
    found = {f"default ({len(first.data.templates)} prompts)": first}
    found |= {each.data.templates_from: each for each in others if each.data.templates_from in by_hand}
    return {text: 100 * each.scores.values()["acc1"] for text, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keeps data and models there; default: they are removed")
    parser.add_argument("--only", choices=[each.name for each in sets()], help="one of the sets")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for data in sets():
            if options.only not in (None, data.name):
                continue
            folder = (options.out or Path(temporary)) / data.name
            if not (folder / "run" / "best").is_dir():
                write(data, folder, options.seed)
                train(folder, options.seed)
            scores = score(folder / "run" / "best", folder / "test.csv", data.by_hand)
            print(f"{data.name}: " + ", ".join(f"{text!r} {value:.1f}" for text, value in scores.items()), flush=True)


if __name__ == "__main__":
    main()
