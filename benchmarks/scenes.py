"""Draws a data set of scenes: 10,080 pairs in 1,280 classes, as a folder of pictures and captions.

    python benchmarks/scenes.py OUT

    OUT/train/   pictures (.png) of one shape each, with captions (.txt, two wordings)
    OUT/val/     one of each class of training, for choices
    OUT/test/    one of each class, with one caption, for retrieval
    OUT/*.csv    labels: val.csv; of test/, scenes.csv (classes of training) and unseen.csv (the others)

A class is a shape, a colour, a filling and a place: 8 x 8 x 4 x 5. Every eighth class is in neither train/ nor val/.
Size, tilt, shade, paper and light differ from picture to picture, and no caption names them. With `--pairs-per-class 1`
and `--every 20` the set is small enough for trials.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (200, 35, 40),
    "orange": (240, 135, 25),
    "yellow": (225, 205, 40),
    "green": (40, 140, 55),
    "blue": (40, 70, 200),
    "purple": (125, 45, 160),
    "brown": (120, 75, 40),
    "black": (30, 30, 30),
}
_TEN = [(math.sin(n * math.pi / 5), math.cos(n * math.pi / 5)) for n in range(10)]
_ROUND = [(math.sin(n * math.pi / 12), math.cos(n * math.pi / 12)) for n in range(24)]
_CROSS = [(-0.33, -1), (0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33)]
# Corners around the middle, at most 1 from it.
SHAPES = {
    "circle": _ROUND,
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "triangle": [(0, -1), (0.95, 0.75), (-0.95, 0.75)],
    "star": [((1, 0.42)[n % 2] * x, -(1, 0.42)[n % 2] * y) for n, (x, y) in enumerate(_TEN)],
    "cross": [(turn * x, turn * y) for turn in (1, -1) for x, y in _CROSS],
    "bar": [(-1, -0.35), (1, -0.35), (1, 0.35), (-1, 0.35)],
    "arrow": [(0, -1), (0.9, 0), (0.35, 0), (0.35, 1), (-0.35, 1), (-0.35, 0), (-0.9, 0)],
    "moon": [*_ROUND[1:12], *[(0.55 * x - 0.1, y) for x, y in _ROUND[11:0:-1]]],
}
FILLINGS = {"plain": "no pattern", "striped": "stripes", "dotted": "dots", "hollow": "nothing inside"}
PLACES = {"top left": (-1, -1), "top right": (1, -1), "bottom left": (-1, 1), "bottom right": (1, 1), "middle": (0, 0)}
CLASSES = list(itertools.product(SHAPES, COLOURS, FILLINGS, PLACES))
WORDINGS = (
    "a {filling} {colour} {shape} in the {place}",
    "in the {place}, a {colour} {shape}, {filling}",
    "{place}: a {shape} in {colour} with {pattern}",
    "there is a {shape} in the {place} of the picture; it is {colour} and {filling}",
    "a drawing of a {colour} {shape} with {pattern}, {place}",
    "someone drew a {filling} {shape} in {colour} at the {place}",
)
TEMPLATES = ("a {c}",)
SIZE = 32  # pixels
_FINE = 4  # drawn so many times larger


def is_unseen(number: int) -> bool:
    """True for every eighth class, spread evenly over shapes, colours, fillings and places."""
    shape, colour, filling, place = np.unravel_index(number, (len(SHAPES), len(COLOURS), len(FILLINGS), len(PLACES)))
    return int(shape + 3 * colour + 2 * filling + place) % 8 == 0


def class_name(number: int) -> str:
    shape, colour, filling, place = CLASSES[number]
    return f"{filling} {colour} {shape} in the {place}"


def draw(number: int, random: np.random.Generator) -> Image.Image:
    """One shape: its own size, tilt and shade on tinted paper, lit from one side, with a little noise."""
    shape, colour, filling, place = CLASSES[number]
    side = SIZE * _FINE
    radius = random.uniform(5.0, 7.0) * _FINE
    shift = 7.5 * np.array(PLACES[place]) + random.uniform(-1.5, 1.5, size=2)
    tilt = random.uniform(-0.25, 0.25)
    turn = np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
    corners = (np.array(SHAPES[shape]) @ turn.T) * radius + side / 2 + shift * _FINE  # (corners, 2)
    cover = Image.new("L", (side, side))
    pen = ImageDraw.Draw(cover)
    outline = [tuple(corner) for corner in corners]
    pen.polygon(outline, fill=255)
    inside = np.asarray(cover, dtype=np.float32) / 255  # (H, W)
    rows, columns = np.mgrid[:side, :side] / _FINE
    if filling == "striped":
        inside = inside * (0.25 + 0.75 * ((rows + columns + random.uniform(0, 4)) % 4 < 2))
    elif filling == "dotted":
        inside = inside * (0.25 + 0.75 * (((rows % 3) < 1.6) & ((columns % 3) < 1.6)))
    elif filling == "hollow":
        rim = Image.new("L", (side, side))
        ImageDraw.Draw(rim).line([*outline, outline[0]], fill=255, width=int(1.6 * _FINE), joint="curve")
        inside = inside * np.asarray(rim, dtype=np.float32) / 255
    inside = inside.reshape(SIZE, _FINE, SIZE, _FINE).mean(axis=(1, 3))[..., None]  # (R, R, 1)
    paper = random.uniform(190, 255, size=3)
    ink = np.array(COLOURS[colour]) + random.uniform(-18, 18, size=3)
    slope = random.uniform(-0.6, 0.6, size=2)
    light = ((np.arange(SIZE) - SIZE / 2)[:, None] * slope[0] + (np.arange(SIZE) - SIZE / 2) * slope[1])[..., None]
    picture = paper * (1 - inside) + ink * inside + light + random.normal(0, 5, size=(SIZE, SIZE, 3))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def captions(number: int, count: int, random: np.random.Generator) -> list[str]:
    shape, colour, filling, place = CLASSES[number]
    words = {"shape": shape, "colour": colour, "filling": filling, "place": place, "pattern": FILLINGS[filling]}
    return [wording.format(**words) for wording in random.choice(WORDINGS, size=count, replace=False)]


def make(out: Path, seed: int = 0, pairs_per_class: int = 9, every: int = 1) -> None:
    """Writes the three folders and the three tables.

    Args:
        every: keeps every `every`-th class alone.

    Raises:
        ValueError: `out` exists.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; remove it or name another folder")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    random = np.random.default_rng(seed)
    classes = list(range(0, len(CLASSES), every))
    tables: dict[str, list[tuple[str, str]]] = {"val": [], "scenes": [], "unseen": []}
    for part, copies, lines in (("train", pairs_per_class, 2), ("val", 1, 2), ("test", 1, 1)):
        (temporary / part).mkdir(parents=True)
        for number, copy in itertools.product(classes, range(copies)):
            if part != "test" and is_unseen(number):
                continue
            path = temporary / part / f"{number:04d}_{copy}.png"
            draw(number, random).save(path, compress_level=1)
            path.with_suffix(".txt").write_text("\n".join(captions(number, lines, random)) + "\n")
            if part != "train":
                table = part if part == "val" else "unseen" if is_unseen(number) else "scenes"
                tables[table].append((f"{part}/{path.name}", class_name(number)))
    for table, rows in tables.items():
        with open(temporary / f"{table}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("filepath", "label"), *rows])
        (temporary / f"{table}.classnames.txt").write_text("".join(f"{class_name(number)}\n" for number in classes))
        (temporary / f"{table}.templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    temporary.rename(out)
    print(f"{out}: {len(classes)} classes, {len(list((out / 'train').glob('*.png')))} pairs to train on")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures and their captions")
    parser.add_argument("--pairs-per-class", type=int, default=9, help="in train/")
    parser.add_argument("--every", type=int, default=1, help="takes every so many-th class alone")
    options = parser.parse_args()
    make(options.out, options.seed, options.pairs_per_class, options.every)
