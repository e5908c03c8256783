"""Plants faults in a set of pairs, 5 % of each kind, and scores what `miniclip doctor` finds of them.

    python examples/digits.py digits            or: python benchmarks/scenes.py scenes --every 2
    python benchmarks/planted_faults.py plant digits planted
    miniclip doctor planted/train --val planted/val --test planted/test --image-size 28 --out planted/doctor
    python benchmarks/planted_faults.py score planted planted/doctor

    OUT/train/    the pairs, each with one fault at most; those without are as drawn
    OUT/val, OUT/test    as drawn
    OUT/truth.csv the fault of each pair that has one

Recall is the share of planted pairs that doctor reports under their kind. Precision is the share of those among the
reported pairs that are planted under that kind or have no fault; pairs with another fault are counted apart, as a
caption in the place of a picture's own may be both.
"""

from __future__ import annotations

import argparse
import csv
import io
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
# What the words of both sets are in other languages; the wordings are of that language, too.
LANGUAGES = {
    "de": ("eine handgeschriebene {digit} in {ink}", "ein Bild von einem {shape}, die Farbe ist {ink}"),
    "fr": ("le chiffre {digit} écrit à l'encre {ink}", "un dessin avec un {shape} de couleur {ink}"),
    "es": ("el número {digit} escrito con tinta {ink}", "un dibujo de un {shape} de color {ink}"),
    "ru": ("цифра {digit} написана, чернила: {ink}", "рисунок, на нём {shape}, цвет {ink}"),
    "zh": ("用{ink}墨水写的数字{digit}", "一个{ink}的{shape}的图画"),
}  # fmt: skip
DIGITS_IN = {
    "de": "Null Eins Zwei Drei Vier Fünf Sechs Sieben Acht Neun".split(),
    "fr": "zéro un deux trois quatre cinq six sept huit neuf".split(),
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve".split(),
    "ru": "ноль один два три четыре пять шесть семь восемь девять".split(),
    "zh": "零 一 二 三 四 五 六 七 八 九".split(),
}
COLOURS_IN = {
    "de": dict(red="Rot", orange="Orange", yellow="Gelb", green="Grün", blue="Blau", purple="Violett", pink="Rosa",
               turquoise="Türkis", brown="Braun", black="Schwarz"),
    "fr": dict(red="rouge", orange="orange", yellow="jaune", green="verte", blue="bleue", purple="violette",
               pink="rose", turquoise="turquoise", brown="brune", black="noire"),
    "es": dict(red="roja", orange="naranja", yellow="amarilla", green="verde", blue="azul", purple="morada",
               pink="rosa", turquoise="turquesa", brown="marrón", black="negra"),
    "ru": dict(red="красный", orange="оранжевый", yellow="жёлтый", green="зелёный", blue="синий",
               purple="фиолетовый", pink="розовый", turquoise="бирюзовый", brown="коричневый", black="чёрный"),
    "zh": dict(red="红色", orange="橙色", yellow="黄色", green="绿色", blue="蓝色", purple="紫色", pink="粉色",
               turquoise="青色", brown="棕色", black="黑色"),
}  # fmt: skip
SHAPES_IN = {
    "de": "Kreis Quadrat Dreieck Stern Kreuz Balken Pfeil Mond".split(),
    "fr": "cercle carré triangle étoile croix trait flèche lune".split(),
    "es": "círculo cuadrado triángulo estrella cruz barra flecha luna".split(),
    "ru": "круг квадрат треугольник звезда крест полоса стрелка луна".split(),
    "zh": "圆形 方形 三角形 星星 十字 横条 箭头 月亮".split(),
}


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
        numeral = DIGITS_IN[language][digits.DIGITS.index(digit)]
        return LANGUAGES[language][0].format(digit=numeral, ink=COLOURS_IN[language][ink])


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
        drawn = SHAPES_IN[language][list(scenes.SHAPES).index(shape)]
        return LANGUAGES[language][1].format(shape=drawn, ink=COLOURS_IN[language][colour])


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
    truth: list[tuple[str, str]] = []
    (out / "train").mkdir()
    for path in chosen:
        fault = fault_of.get(path, "")
        data, texts = path.read_bytes(), path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        if fault in PICTURE_FAULTS:
            data = PICTURE_FAULTS[fault](Image.open(path).convert("RGB"), random)
        elif fault:
            texts = wrong_captions(fault, path, texts, chosen, kind, random)
        write(out / "train" / path.name, data, texts)
        truth += [(path.name, fault)] if fault else []
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
            truth.append((f"{name}{suffix}", fault))
    with open(out / "truth.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("key", "fault"), *truth])
    print(f"{out}: {len(chosen)} pairs, planted {dict(Counter(fault for _, fault in truth))}")


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
    reported: dict[str, set[str]] = defaultdict(set)
    for row in rows_of(found / "findings.csv"):
        if Path(row["source"]).name == "train":
            reported[row["reason"]].add(row["key"])
    kinds = [*dict.fromkeys(truth.values()), *(set(reported) - set(truth.values()))]
    out = []
    for kind in kinds:
        own = {key for key, fault in truth.items() if fault == kind}
        right, clean = len(reported[kind] & own), len([key for key in reported[kind] if key not in truth])
        recall = right / len(own) if own else float("nan")
        precision = right / (right + clean) if right + clean else float("nan")
        out.append((kind, len(own), len(reported[kind]), recall, precision, len(reported[kind]) - right - clean))
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
