"""Makes the demo's data: scans of handwritten digits as coloured pictures with captions, in a folder like your own.

    python examples/digits.py OUT

    OUT/train/   pictures (.png) with captions (.txt, three wordings) of 70 % of the 1,797 scans
    OUT/val/     the same for another 10 %, to choose the best checkpoint
    OUT/test/    pictures of the last 20 %, without captions
    OUT/*.csv    labels: val.csv (digit and ink) for val/; digits.csv, inks.csv and unseen.csv (see below) for test/

The 80 combinations of digit and ink include 16 that never occur in train/ or val/. A model that has learnt what "seven"
and "red" mean, beyond the pictures that it saw, recognises a red seven all the same.

The scans are the 8 x 8 test set of Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits" (UCI, 1998, CC BY
4.0), as scikit-learn ships them.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = {
    "red": (205, 30, 40),
    "orange": (240, 130, 20),
    "green": (30, 140, 50),
    "turquoise": (20, 180, 190),
    "blue": (30, 60, 200),
    "purple": (125, 40, 160),
    "pink": (245, 110, 180),
    "black": (25, 25, 25),
}
WORDINGS = (
    "a handwritten {digit} in {ink} ink",
    "the number {digit} in {ink}",
    "a {ink} {digit}",
    "the digit {digit}, written with a {ink} pen",
    "{ink} ink on paper: a {digit}",
    "someone wrote {digit} in {ink}",
    "a scan of the numeral {digit} in {ink} ink",
    "a {digit} drawn by hand, {ink}",
)
# The prompts of evaluation: part of the captions, or the same in other words.
DIGIT_TEMPLATES = ("a handwritten {c}", "the number {c}", "the digit {c}", "a {c} drawn by hand")
INK_TEMPLATES = ("a digit in {c} ink", "a handwritten number in {c}", "a number written with a {c} pen")
BOTH_TEMPLATES = ("a handwritten {c} ink", "the number {c}", "a scan of the numeral {c} ink", "someone wrote {c}")
SIZE = 28  # pixels
INKS_PER_SCAN = 6


def is_unseen(digit: int, ink: int) -> bool:
    """Whether training lacks a combination: 16 of them, one or two inks of each digit, two digits of each ink."""
    return (digit + 2 * ink) % 5 == 0


def compose(scan: np.ndarray, ink: str, random: np.random.Generator) -> Image.Image:
    """A picture of a scan (8 x 8, 0 to 16): random size and place, ink on tinted paper, a little noise."""
    side = int(random.integers(20, 27))
    small = Image.fromarray((scan / 16 * 255).astype(np.uint8))
    strokes = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    cover = np.zeros((SIZE, SIZE, 1), dtype=np.float32)
    top, left = random.integers(SIZE - side + 1, size=2)
    cover[top : top + side, left : left + side, 0] = strokes
    paper = random.uniform(215, 255, size=3)
    colour = np.array(INKS[ink]) + random.uniform(-20, 20, size=3)
    picture = paper * (1 - cover) + colour * cover + random.normal(0, 4, size=(SIZE, SIZE, 3))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def captions(digit: str, ink: str, random: np.random.Generator) -> list[str]:
    return [wording.format(digit=digit, ink=ink) for wording in random.choice(WORDINGS, size=3, replace=False)]


def make(out: Path, seed: int = 0) -> None:
    """Writes the three folders and the four tables.

    Raises:
        ValueError: `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; remove it or name another folder")
    scans, labels = load_digits(return_X_y=True)
    random = np.random.default_rng(seed)
    order = random.permutation(len(scans))
    num_train, num_val = int(0.7 * len(scans)), int(0.1 * len(scans))
    parts = {
        "train": order[:num_train],
        "val": order[num_train : num_train + num_val],
        "test": order[num_train + num_val :],
    }
    inks = list(INKS)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tables: dict[str, list[tuple[str, str, int]]] = {"val": [], "digits": [], "inks": [], "unseen": []}
    for part, numbers in parts.items():
        folder = temporary / part
        folder.mkdir(parents=True)
        for number in numbers:
            digit = int(labels[number])
            seen = [i for i in range(len(inks)) if not is_unseen(digit, i)]
            used = random.permutation(seen)[: INKS_PER_SCAN if part == "train" else 1].tolist()
            if part == "test":
                used += [i for i in range(len(inks)) if is_unseen(digit, i)]
            for i in used:
                ink, name = inks[i], f"{number:04d}_{DIGITS[digit]}_{inks[i]}"
                compose(scans[number].reshape(8, 8), ink, random).save(folder / f"{name}.png")
                if part != "test":
                    text = "\n".join(captions(DIGITS[digit], ink, random))
                    (folder / f"{name}.txt").write_text(text + "\n")
                both = f"{DIGITS[digit]} in {ink}"
                if part == "val":
                    tables["val"].append((f"{part}/{name}.png", both, number))
                elif part == "test" and is_unseen(digit, i):
                    tables["unseen"].append((f"{part}/{name}.png", both, number))
                elif part == "test":
                    tables["digits"].append((f"{part}/{name}.png", DIGITS[digit], number))
                    tables["inks"].append((f"{part}/{name}.png", ink, number))
    every_pair = [f"{digit} in {ink}" for digit in DIGITS for ink in inks]
    texts = {
        "digits": (DIGITS, DIGIT_TEMPLATES),
        "inks": (inks, INK_TEMPLATES),
        "unseen": (every_pair, BOTH_TEMPLATES),
        "val": (every_pair, BOTH_TEMPLATES),
    }
    for table, rows in tables.items():
        with open(temporary / f"{table}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("filepath", "label", "scan"), *rows])
        classnames, templates = texts[table]
        (temporary / f"{table}.classnames.txt").write_text("\n".join(classnames) + "\n")
        (temporary / f"{table}.templates.txt").write_text("\n".join(templates) + "\n")
    temporary.rename(out)
    print(f"{out}: {', '.join(f'{len(numbers)} scans for {part}' for part, numbers in parts.items())}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the pictures")
    arguments = parser.parse_args()
    make(arguments.out, arguments.seed)
