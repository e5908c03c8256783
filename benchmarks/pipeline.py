"""The training image pipeline beside open_clip's, on one core: from shards on disk to batches of 64 pictures of 224².

    python benchmarks/pipeline.py [--repeats 7] [--size 512 256]

Both read the same shards of synthetic photographs, draw the same augmentation (open_clip's default: a crop of 90 to
100% of the area, resized bicubically) and tokenise the same captions, in this process, with one thread, in turns.
Quoted is the median of processor time, so that other work on the machine counts little. open_clip's trainer is fed
normalised floats; miniclip's is fed uint8, which it normalises on the device: "normalised here" adds that on the
processor.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import open_clip_train.data
import torch
from open_clip.transform import image_transform
from PIL import Image
from webdataset.tariterators import tar_file_expander

from miniclip.config import OPENAI_MEAN, OPENAI_STD
from miniclip.data import PairDataModule, collate
from miniclip.prompts import imagenet_classnames
from miniclip.shards import pack
from miniclip.sources import read_pairs
from miniclip.tokenizer import encode_for_model
from miniclip.transforms import decode_rgb, normalize

NUM_SAMPLES, BATCH_SIZE, IMAGE_SIZE = 256, 64, 224


def photograph(size: int, random: np.random.Generator) -> Image.Image:
    """What matters of a photograph to a decoder: the spectrum, which falls like 1 / f, and pale colours.

    With this slope a JPEG of quality 90 has 2 to 3 bits a pixel, as photographs of that size have.
    """
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)).clip(1 / size)
    y, x = np.mgrid[:size, :size] / size

    def field() -> np.ndarray:
        spectrum = random.standard_normal(frequency.shape) + 1j * random.standard_normal(frequency.shape)
        noise = np.fft.irfft2(spectrum / frequency**1.4, (size, size))
        return noise / noise.std() + sum(np.sin(a * x + b * y + c) for a, b, c in random.uniform(-12, 12, (6, 3))) / 2

    light, red, blue = 118 + 42 * field(), 16 * field(), 16 * field()
    pixels = np.stack([light + red, light - (red + blue) / 3, light + blue], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def caption(random: np.random.Generator) -> str:
    """About eleven words."""
    first, second = random.choice(imagenet_classnames(), 2)
    colours = random.choice(["red", "small", "old", "wooden", "bright", "young", "wet", "striped"], 2)
    place = random.choice(["in the morning light", "on a sunny day", "beside the quiet road", "in a large garden"])
    return f"a {colours[0]} {first} near a {colours[1]} {second} {place}"


def make_shards(folder: Path, size: int) -> Path:
    random = np.random.default_rng(size)
    for number in range(NUM_SAMPLES):
        buffer = io.BytesIO()
        photograph(size, random).save(buffer, "JPEG", quality=90, subsampling="4:2:0")
        (folder / f"{number:04d}.jpg").write_bytes(buffer.getvalue())
        (folder / f"{number:04d}.txt").write_text(caption(random))
    pack(read_pairs(folder), folder / "shards", source="synthetic")
    return folder / "shards"


def open_clips_loader(shards: Path) -> Any:
    args = SimpleNamespace(
        train_data=str(shards / "00000.tar"),
        train_num_samples=NUM_SAMPLES,
        train_data_upsampling_factors=None,
        batch_size=BATCH_SIZE,
        workers=0,
        world_size=1,
        seed=0,
    )
    # webdataset from 0.2.100 on marks the end of each tar, which open_clip, written for 0.2.86, does not expect.
    open_clip_train.data.tar_file_expander = partial(tar_file_expander, eof_value=None)
    transform = image_transform(IMAGE_SIZE, is_train=True)
    return open_clip_train.data.get_wds_dataset(
        args, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-32")
    ).dataloader


def miniclips_loader(shards: Path) -> Any:
    data = PairDataModule(str(shards), batch_size=BATCH_SIZE, num_workers=0, image_size=IMAGE_SIZE)
    data.trainer = SimpleNamespace(global_step=0, global_rank=0, world_size=1)  # all of the trainer that it asks for
    data.setup("fit")
    return data.train_dataloader()


def consume(loader: Any) -> None:
    count = sum(len(images) for images, *_ in loader)
    assert count == NUM_SAMPLES


def consume_normalised(loader: Any) -> None:
    count = sum(len(normalize(images, OPENAI_MEAN, OPENAI_STD)) for images, *_ in loader)
    assert count == NUM_SAMPLES


def stages(dataset: Any, size: int) -> dict[str, Callable[[], Any]]:
    """The parts of miniclip's work on one epoch, each by itself."""
    augmentation, numbers = dataset.augmentation, range(NUM_SAMPLES)
    records, samples = [dataset.shards[n] for n in numbers], [dataset[0, n] for n in numbers]
    boxes = [augmentation.crop_box(size, size, np.random.default_rng(n)) for n in numbers]
    shrinks = [next(s for s in (4, 2, 1) if min(h, w) >= s * IMAGE_SIZE or s == 1) for _, _, h, w in boxes]
    return {
        "read": lambda: [dataset.shards[n] for n in numbers],
        "decode": lambda: [decode_rgb(r.image, s) for r, s in zip(records, shrinks, strict=True)],
        "decode, crop and resize": lambda: [
            augmentation.decode(r.image, IMAGE_SIZE, np.random.default_rng(n)) for n, r in enumerate(records)
        ],
        "tokenise": lambda: [encode_for_model(r.captions[0]) for r in records],
        "collate": lambda: [collate(samples[i : i + BATCH_SIZE]) for i in range(0, NUM_SAMPLES, BATCH_SIZE)],
    }


def race(contestants: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of processor time for one image, in turns, after one unmeasured round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        for name, work in contestants.items():
            begin = time.process_time()
            work()
            if turn:
                times[name].append((time.process_time() - begin) / NUM_SAMPLES * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds, after one that is not")
    parser.add_argument("--size", type=int, nargs="+", default=[512, 256], help="sides of the pictures, in pixels")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)

    speeds, parts = [], []
    for size in options.size:
        with tempfile.TemporaryDirectory() as folder:
            shards = make_shards(Path(folder), size)
            theirs, ours = open_clips_loader(shards), miniclips_loader(shards)
            dataset = ours.dataset
            total = race(
                {
                    "theirs": lambda theirs=theirs: consume(theirs),
                    "ours": lambda ours=ours: consume(ours),
                    "normalised": lambda ours=ours: consume_normalised(ours),
                },
                options.repeats,
            )
            part = race(stages(dataset, size), options.repeats)
            bits = 8 * sum(len(dataset.shards[n].image) for n in range(NUM_SAMPLES)) / NUM_SAMPLES / size**2
        their, our, normalised = (total[name] for name in ("theirs", "ours", "normalised"))
        speeds.append(
            f"| {size}², {bits:.1f} bits a pixel | {1000 / their:.0f} | {1000 / our:.0f} | {their / our:.2f} "
            f"| {1000 / normalised:.0f} | {their / normalised:.2f} |"
        )
        resize = part["decode, crop and resize"] - part["decode"]
        known = part["read"] + part["decode, crop and resize"] + part["tokenise"] + part["collate"]
        shown = (part["read"], part["decode"], resize, part["tokenise"], part["collate"], our - known)
        parts.append(f"| {size}² | " + " | ".join(f"{value * 1000:.0f}" for value in shown) + " |")

    print("| JPEG, images/s | open_clip | miniclip | ratio | miniclip, normalised here | ratio |\n" + "|---" * 6 + "|")
    print(*speeds, sep="\n")
    print(
        "\n| miniclip, µs an image | read | decode | crop, resize | tokenise | collate | other |\n" + "|---" * 7 + "|"
    )
    print(*parts, sep="\n")


if __name__ == "__main__":
    main()
