"""`miniclip embed` beside the pass of `miniclip eval`, and its memory at two sizes of the source.

    python benchmarks/embedding.py speed --images 2000 --repeats 5
    python benchmarks/embedding.py memory --images 2000 20000

Speed alternates the two in one process: features of a folder of JPEGs by `encode_images`, as eval has them, and files
of them by `embed_source`. Printed are the medians of the wall and of the processor's time, and their ratios.
Memory runs each size in a process of its own, without workers, and prints the peak of its resident set.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.evaluation.encoder import Encoder, from_clip
from miniclip.evaluation.features import encode_images
from miniclip.inference.embedding.embed import embed_source
from miniclip.inference.sources import image_set
from miniclip.model import CLIP
from miniclip.weights.load import preprocess_for

MODELS = {  # resolution, patch, width, layers
    "tiny": (32, 16, 64, 2),
    "small": (64, 8, 256, 6),
    "ViT-B/32": (224, 32, 768, 12),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "peak"))
    parser.add_argument("--images", type=int, nargs="+", default=[1000])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--side", type=int, default=256, help="of a picture, in pixels")
    options = parser.parse_args()
    if options.what == "memory":
        for count in options.images:
            peak = [sys.executable, __file__, "peak", "--images", str(count), "--model", "tiny", "--side", "16"]
            print(
                f"{count:>9,} images: {subprocess.run(peak, capture_output=True, text=True, check=True).stdout}", end=""
            )
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_pictures(folder / "photos", options.images[0], options.side)
        model = _model(options.model)
        if options.what == "peak":
            _print_peak(folder, model)
        else:
            _compare(folder, model, options.repeats, options.workers)


def _write_pictures(folder: Path, count: int, side: int) -> None:
    """A hundred different pictures, under as many names as are wanted."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(min(count, 100)):
        rough = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(rough).resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:07d}.jpg")
    for number in range(100, count):
        os.link(folder / f"{number % 100:07d}.jpg", folder / f"{number:07d}.jpg")


def _model(name: str) -> Encoder:
    resolution, patch, width, layers = MODELS[name]
    torch.manual_seed(0)
    vision = VisionConfig(image_size=resolution, patch_size=patch, width=width, layers=layers)
    config = CLIPConfig(512, vision=vision, text=TextConfig(width=64, layers=1))
    return from_clip(CLIP(config), preprocess_for(config), name)


def _print_peak(folder: Path, model: Encoder) -> None:
    data = image_set(folder / "photos")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    embed_source(data, model, folder / "out", source=str(folder / "photos"), rows_per_file=1000)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak {after / 1024:.0f} MB, before the first image {before / 1024:.0f} MB")


def _compare(folder: Path, model: Encoder, repeats: int, workers: int) -> None:
    data = image_set(folder / "photos")

    def by_eval() -> None:
        encode_images(model.encode_image, model.preprocess, data, num_workers=workers)

    def by_embed() -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        embed_source(data, model, folder / "out", source=str(folder / "photos"), num_workers=workers)

    ways = {"eval": by_eval, "embed": by_embed}
    for run in ways.values():  # once, so that files and code are in memory
        run()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(repeats):
        for name in sorted(ways, reverse=bool(number % 2)):
            times[name].append(_timed(ways[name]))
    medians = {name: np.median(found, axis=0) for name, found in times.items()}
    for name, (wall, processor) in medians.items():
        print(
            f"{name:6} {len(data) / wall:8.1f} images/s, {1000 * processor / len(data):7.2f} ms of processor an image"
        )
    ratio = medians["embed"] / medians["eval"]
    spread = [np.ptp([wall for wall, _ in found]) / np.median([wall for wall, _ in found]) for found in times.values()]
    print(f"embed / eval: {ratio[0]:.3f} of wall, {ratio[1]:.3f} of processor; spread of wall {max(spread):.0%}")


def _timed(run: Callable[[], None]) -> tuple[float, float]:
    """Wall and processor's seconds, workers included."""
    begin, used = time.perf_counter(), sum(os.times()[:4])
    run()
    return time.perf_counter() - begin, sum(os.times()[:4]) - used


if __name__ == "__main__":
    main()
