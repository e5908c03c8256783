"""Random captions, prompts and photographs like those that people have; every run draws the same."""

from __future__ import annotations

import io
import re
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from miniclip import tokenizer
from miniclip.data.pack import pack
from miniclip.data.sample_files import Packing
from miniclip.data.sources import read_pairs
from miniclip.evaluation import prompts

# Conceptual Captions' have 10.3 tokens on average with a standard deviation of 4.5 and a median of 9 (Sharma et al.
# 2018, table 2); a log-normal distribution of that mean and deviation has the median 9.4. Here the mean is 11 words.
MEAN_WORDS, DEVIATION_WORDS = 11.0, 4.7


@cache
def _vocabulary() -> tuple[np.ndarray, np.ndarray]:
    """English words and their frequencies: Zipf's law, in the order in which CLIP's merges were learnt."""
    found = (tokenizer.decode([number]) for number in range(512, tokenizer.START_OF_TEXT))
    words = ["a", *(word[:-1] for word in found if re.fullmatch(r"[a-z]{2,} ", word))]
    shares = 1 / (np.arange(len(words)) + 2.7)
    return np.array(words), shares / shares.sum()


def captions(count: int, seed: int = 0) -> list[str]:
    """Captions as long as Conceptual Captions'; one word in a hundred is new, two words joined, like a name."""
    random = np.random.default_rng(seed)
    words, shares = _vocabulary()
    variance = np.log1p((DEVIATION_WORDS / MEAN_WORDS) ** 2)
    lengths = random.lognormal(np.log(MEAN_WORDS) - variance / 2, variance**0.5, count).round().clip(3, 45).astype(int)
    drawn, joined = random.choice(words, lengths.sum(), p=shares), random.choice(words, lengths.sum())
    drawn = np.where(random.random(len(drawn)) < 0.01, np.char.add(drawn, joined), drawn)
    return [" ".join(part) for part in np.split(drawn, lengths.cumsum()[:-1])]


def web_texts(count: int) -> list[str]:
    """Captions with capitals, digits, punctuation and HTML's entities, as the web has them, in ASCII."""
    random = np.random.default_rng(1)
    ends = ["!", ".", "...", " - 1920x1080", " (2016)", " &amp; more", " | No. 42", "?", " #art", " 50% off", "'s"]
    return [f"{text.title()}{random.choice(ends)}" for text in captions(count, seed=1)]


def unicode_texts(count: int) -> list[str]:
    """Captions with accents, other scripts, emoji, and bytes that were decoded wrongly."""
    random = np.random.default_rng(2)
    pieces = ["Zürich", "café", "naïve", "東京の夜景", "Москва", "παραλία", "شاطئ", "🌅", "“quoted”", "don’t"]
    pieces += ["schÃ¶n", "â€œmarkedâ€", "–", "5 €", "ﬁne", "हिमालय"]
    texts = []
    for text in captions(count, seed=2):
        words = text.split()
        for place in random.integers(0, len(words), 2):
            words[place] = random.choice(pieces)
        texts.append(" ".join(words))
    return texts


def template_prompts(count: int) -> list[str]:
    """Prompts of 6 to 18 tokens: ImageNet's names in OpenAI's 80 templates, shuffled."""
    random = np.random.default_rng(3)
    names, templates, texts = prompts.imagenet_classnames(), prompts.template_set("imagenet80"), []
    while len(texts) < count:
        text = prompts.fill(templates[random.integers(len(templates))], names[random.integers(len(names))])
        if 6 <= len(tokenizer.encode_for_model(text)) <= 18:
            texts.append(text)
    return texts


def prompts_of_length(count: int, num_tokens: int = 13) -> list[str]:
    """Template prompts that all have the same number of tokens."""
    wanted: list[str] = []
    for name in prompts.imagenet_classnames():
        for template in prompts.template_set("imagenet80"):
            text = prompts.fill(template, name)
            if len(tokenizer.encode_for_model(text)) == num_tokens:
                wanted.append(text)
                break
        if len(wanted) == count:
            break
    return wanted


def photograph(side: int, random: np.random.Generator) -> Image.Image:
    """Noise that costs a decoder as much as a photograph: its spectrum falls like 1 / f, and its colours are pale.

    With this slope a JPEG of quality 90 has 2 to 3 bits a pixel, like photographs of that size.
    """
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)).clip(1 / side)
    y, x = np.mgrid[:side, :side] / side

    def field() -> np.ndarray:
        spectrum = random.standard_normal(frequency.shape) + 1j * random.standard_normal(frequency.shape)
        noise = np.fft.irfft2(spectrum / frequency**1.4, (side, side))
        return noise / noise.std() + sum(np.sin(a * x + b * y + c) for a, b, c in random.uniform(-12, 12, (6, 3))) / 2

    light, red, blue = 118 + 42 * field(), 16 * field(), 16 * field()
    pixels = np.stack([light + red, light - (red + blue) / 3, light + blue], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def photographs(folder: Path, count: int, side: int) -> Path:
    """A folder of one class with `count` JPEG photographs; the first call makes it."""
    out = folder / f"photographs-{count}-{side}" / "all"
    if not out.is_dir():
        out.mkdir(parents=True)
        random, data = np.random.default_rng(side), []
        for number in range(count):
            if number < 64:  # drawing one takes longer than decoding it
                buffer = io.BytesIO()
                photograph(side, random).save(buffer, "JPEG", quality=90, subsampling="4:2:0")
                data.append(buffer.getvalue())
            (out / f"{number:05d}.jpg").write_bytes(data[number % len(data)])
    return out


def shards(folder: Path, count: int, side: int) -> Path:
    """`count` JPEG photographs with captions in four tars; the first call makes them."""
    out = folder / f"shards-{count}-{side}"
    if not out.is_dir():
        random, source = np.random.default_rng(side), folder / f"pairs-{count}-{side}"
        source.mkdir()
        distinct = [photograph(side, random) for _ in range(min(count, 64))]  # drawing one takes longer than packing it
        for number, text in enumerate(captions(count)):
            image = distinct[number % len(distinct)]
            buffer = io.BytesIO()
            image.rotate(90 * (number // len(distinct))).save(buffer, "JPEG", quality=90, subsampling="4:2:0")
            (source / f"{number:05d}.jpg").write_bytes(buffer.getvalue())
            (source / f"{number:05d}.txt").write_text(text)
        pack(read_pairs(source), out, source="synthetic", packing=Packing(samples_per_shard=count // 4))
    return out
