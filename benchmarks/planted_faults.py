"""Plants faults in a set of pairs, 5 % of each kind, and scores what `miniclip doctor` finds of them.

    python examples/digits.py digits            or: python benchmarks/scenes.py scenes --every 2
    python benchmarks/planted_faults.py plant digits planted
    miniclip doctor planted/train --val planted/val --test planted/test --image-size 28 --out planted/doctor
    python benchmarks/planted_faults.py score planted planted/doctor

    OUT/train/    the pairs, each with one fault at most; those without are as drawn
    OUT/val, OUT/test    as drawn
    OUT/truth.csv the fault of each pair that has one

Recall is the share of planted pairs that doctor reports under their kind (near-leak counts as leak, says-little as
junk-caption). Precision is the share of those among the reported pairs that are planted under that kind or have no
fault; pairs with another fault are counted apart, as a caption in the place of a picture's own may be both.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))

import digits
import scenes

SHARE = 0.05
SENTENCES = (
    "welcome to our collection of pictures for home and office",
    "discover more in the shop, new items every week",
    "this item ships within two working days",
)
JUNK = (
    "https://example.com/media/{n}.jpg", "www.example.com", "IMG_{n}.JPG", "DSC0{n}", "image{n}.png", "image of",
    "a photo of", "untitled", "picture", "alt text", "{n}", "no description available", "screenshot 2021-03-04 {n}",
    "click to enlarge", "<img src='{n}'>", "a3f5e1{n}d9c7b2",
)  # fmt: skip
# What the words of both sets are in other languages, with a sentence of each.
LANGUAGES = json.loads(Path(__file__).with_name("other_languages.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# What a pair of either set shows


class Digits:
    def words(self, path: Path) -> tuple[str, str]:
        _, digit, ink = path.stem.split("_")[:3]
        return digit, ink

    def class_of(self, path: Path) -> object:
        return self.words(path)

    def short(self, path: Path) -> str:
        digit, ink = self.words(path)
        return f"a {ink} {digit}" if len(digit) % 2 else f"the number {digit}"

    def foreign(self, path: Path, language: str) -> str:
        digit, ink = self.words(path)
        words = LANGUAGES[language]
        numeral = words["digits"][digits.DIGITS.index(digit)]
        return words["of a digit"].format(digit=numeral, ink=words["colours"][ink])


class Scenes:
    def words(self, path: Path) -> tuple[str, str]:
        shape, colour, _, _ = scenes.CLASSES[int(path.stem.split("_")[0])]
        return shape, colour

    def class_of(self, path: Path) -> object:
        return scenes.CLASSES[int(path.stem.split("_")[0])]

    def short(self, path: Path) -> str:
        shape, colour = self.words(path)
        return f"a {colour} {shape}"

    def foreign(self, path: Path, language: str) -> str:
        shape, colour = self.words(path)
        words = LANGUAGES[language]
        drawn = words["shapes"][list(scenes.SHAPES).index(shape)]
        return words["of a shape"].format(shape=drawn, ink=words["colours"][colour])


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def slightly_changed(image: Image.Image, random: np.random.Generator) -> tuple[bytes, str]:
    """The picture as another site has it: cut at the edges, resized, lit otherwise, and through JPEG."""
    W, H = image.size
    cut = random.uniform(0, 0.04, size=4)
    image = image.crop((round(cut[0] * W), round(cut[1] * H), round((1 - cut[2]) * W), round((1 - cut[3]) * H)))
    scale = random.uniform(0.8, 2.0)
    image = image.resize((max(8, round(W * scale)), max(8, round(H * scale))), Image.Resampling.BICUBIC)
    image = ImageEnhance.Brightness(image).enhance(random.uniform(0.92, 1.08))
    return encoded(image, "JPEG", quality=int(random.integers(60, 95))), ".jpg"


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def turned_by_tag(image: Image.Image, random: np.random.Generator) -> bytes:
    tag, back = [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)][
        int(random.integers(3))
    ]
    exif = Image.Exif()
    exif[0x0112] = tag
    return encoded(image.transpose(back), exif=exif)


def turned(image: Image.Image, random: np.random.Generator) -> bytes:
    ways = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return encoded(image.transpose(ways[int(random.integers(3))]))


def blank(image: Image.Image, random: np.random.Generator) -> bytes:
    colour = random.choice([0, 255, *random.integers(0, 256, 3)], size=3) if random.random() < 0.5 else [255] * 3
    noise = random.normal(0, random.uniform(0, 3), size=(*image.size[::-1], 3))
    return encoded(Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)))


def tiny(image: Image.Image, random: np.random.Generator) -> bytes:
    side = int(random.integers(8, 13))
    return encoded(image.resize((side, side), Image.Resampling.LANCZOS))


def blurred(image: Image.Image, random: np.random.Generator) -> bytes:
    return encoded(image.filter(ImageFilter.GaussianBlur(random.uniform(0.06, 0.12) * min(image.size))))


PICTURE_FAULTS: dict[str, Callable[[Image.Image, np.random.Generator], bytes]] = {
    "blank": blank, "tiny": tiny, "blurred": blurred, "turned": turned_by_tag, "turned-pixels": turned,
}  # fmt: skip
ADDED = ("copy", "near-duplicate", "leak")  # pairs beside the others
CAPTION_FAULTS = ("mismatch", "names-others", "boilerplate", "junk-caption", "language")


def plant(base: Path, out: Path, most: int = 2000, seed: int = 0, kinds: list[str] | None = None) -> None:
    """Writes the set.

    Args:
        most: pairs of train/ at most, before copies are added.
        kinds: faults to plant; by default all.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; remove it or name another folder")
    random = np.random.default_rng(seed)
    kind = Digits() if (base / "digits.csv").exists() else Scenes()
    for part in ("val", "test"):
        shutil.copytree(base / part, out / part)
    for table in base.glob("*.*"):
        shutil.copy(table, out)
    pictures = sorted((base / "train").glob("*.png"))
    chosen = [pictures[i] for i in sorted(random.permutation(len(pictures))[:most])]
    held_out = sorted([*(base / "val").glob("*.png"), *(base / "test").glob("*.png")])
    wanted = kinds or [*ADDED, *CAPTION_FAULTS, *PICTURE_FAULTS]
    count = round(SHARE * len(chosen))
    order = iter([chosen[i] for i in random.permutation(len(chosen))])
    fault_of = {next(order): fault for fault in wanted if fault not in ADDED for _ in range(count)}
    clean = list(order)
    truth: list[tuple[str, str, str]] = []
    (out / "train").mkdir()
    for path in chosen:
        fault = fault_of.get(path, "")
        data, texts = path.read_bytes(), path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        if fault in PICTURE_FAULTS:
            data = PICTURE_FAULTS[fault](Image.open(path).convert("RGB"), random)
        elif fault:
            texts = wrong_captions(fault, path, texts, chosen, kind, random)
        write(out / "train" / path.name, data, texts)
        truth += [(path.name, fault, "")] if fault else []
    for fault in (each for each in ADDED if each in wanted):
        originals = held_out if fault == "leak" else clean
        for i in random.permutation(len(originals))[:count]:
            original = originals[i]
            name = f"{original.stem}_{fault}"
            data, suffix = original.read_bytes(), ".png"
            if fault == "near-duplicate" or (fault == "leak" and random.random() < 0.7):
                data, suffix = slightly_changed(Image.open(original).convert("RGB"), random)
            text = original.with_suffix(".txt")
            texts = text.read_text(encoding="utf-8").splitlines() if text.exists() else [kind.short(original)]
            write(out / "train" / f"{name}{suffix}", data, texts)
            truth.append((f"{name}{suffix}", fault, original.name))
    with open(out / "truth.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("key", "fault", "original"), *truth])
    print(f"{out}: {len(chosen)} pairs, planted {dict(Counter(fault for _, fault, _ in truth))}")


def wrong_captions(
    fault: str, path: Path, texts: list[str], others: list[Path], kind: Digits | Scenes, random: np.random.Generator
) -> list[str]:
    if fault == "mismatch":
        while True:
            other = others[int(random.integers(len(others)))]
            if kind.class_of(other) != kind.class_of(path):
                return other.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    if fault == "names-others":
        return [kind.short(path)]
    if fault == "boilerplate":
        return [str(random.choice(SENTENCES))]
    if fault == "junk-caption":
        return [str(random.choice(JUNK)).format(n=int(random.integers(1000, 10_000)))]
    return [kind.foreign(path, str(random.choice(list(LANGUAGES))))]


def write(path: Path, data: bytes, texts: list[str]) -> None:
    path.write_bytes(data)
    path.with_suffix(".txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score(planted: Path, found: Path) -> list[tuple[str, int, int, float, float, int]]:
    """(kind, planted, reported, recall, precision, reported with another fault) of each kind."""
    truth = {row["key"]: row["fault"] for row in rows_of(planted / "truth.csv")}
    originals = {row["original"] for row in rows_of(planted / "truth.csv")}  # either of two may be reported
    reported: dict[str, set[str]] = defaultdict(set)
    hit: dict[str, set[str]] = defaultdict(set)
    for row in rows_of(found / "findings.csv"):
        if Path(row["source"]).name == "train":
            kind = {"near-leak": "leak", "says-little": "junk-caption"}.get(row["reason"], row["reason"])
            reported[kind].add(row["key"])
            hit[kind] |= {row["key"], row["like"]}
    out = []
    for kind in [*dict.fromkeys(truth.values()), *sorted(set(reported) - set(truth.values()))]:
        own = {key for key, fault in truth.items() if fault == kind}
        right = own & hit[kind]
        wrong = {key for key in reported[kind] if key not in truth and key not in originals}
        elsewhere = {key for key in reported[kind] if truth.get(key, kind) != kind}
        recall = len(right) / len(own) if own else float("nan")
        precision = len(right) / (len(right) + len(wrong)) if right or wrong else float("nan")
        out.append((kind, len(own), len(reported[kind]), recall, precision, len(elsewhere)))
    return out


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    planting = verbs.add_parser("plant")
    planting.add_argument("base", type=Path, help="what examples/digits.py or benchmarks/scenes.py wrote")
    planting.add_argument("out", type=Path)
    planting.add_argument("--most", type=int, default=2000, help="pairs at most")
    planting.add_argument("--seed", type=int, default=0)
    planting.add_argument("--kinds", nargs="*", help="faults to plant; by default all")
    scoring = verbs.add_parser("score")
    scoring.add_argument("planted", type=Path)
    scoring.add_argument("found", type=Path, help="doctor's --out")
    options = parser.parse_args()
    if options.verb == "plant":
        plant(options.base, options.out, options.most, options.seed, options.kinds)
    else:
        print(f"{'kind':<16}{'planted':>8}{'reported':>9}{'recall':>8}{'precision':>10}{'other faults':>13}")
        for kind, own, all_, recall, precision, others in score(options.planted, options.found):
            print(f"{kind:<16}{own:>8}{all_:>9}{recall:>8.2f}{precision:>10.2f}{others:>13}")
