"""Packing shards: against plain re-encoding with Pillow on the same threads, and against writing to the disk.

    python benchmarks/packing.py [--images 2000] [--repeats 3]

With `--resize`, packing is compared with a loop that opens, shrinks and encodes the same files with Pillow on as many
threads and writes nothing. Without it, packing is compared with reading the same files one after the other, from the
disk and not from memory, and writing their bytes to one file that is flushed to the disk. The sides take turns.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from miniclip.data.pack import pack
from miniclip.data.sample_files import Packing
from miniclip.data.sources import read_pairs

SIDE, SMALL = 512, 256


def make(folder: Path, count: int) -> None:
    """Photo-like JPEGs of 512 x 512 pixels: smooth colours with detail."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(chance.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((SIDE, SIDE), 3)
        fine = chance.normal(0, 12, (SIDE, SIDE, 1))
        pixels = (np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.jpg", quality=90)
        (folder / f"{number:06d}.txt").write_text(f"smooth colours with detail, number {number}\n")


def reencode(folder: Path, threads: int) -> None:
    def one(path: Path) -> int:
        image = Image.open(path).convert("RGB").resize((SMALL, SMALL), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        return len(buffer.getvalue())

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, sorted(folder.glob("*.jpg"))))


def write(folder: Path, out: Path) -> None:
    """Reads the files one after the other and writes the same bytes to the disk."""
    with open(out, "wb") as file:
        for path in sorted(folder.iterdir()):
            file.write(path.read_bytes())
        file.flush()
        os.fsync(file.fileno())


def forget(folder: Path) -> None:
    """Drops the files from the page cache, so that they are read from the disk."""
    os.sync()
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds, after one that is not")
    options = parser.parse_args()
    threads = os.cpu_count() or 1
    seen: dict[str, list[float]] = {name: [] for name in ("resize", "pillow", "keep", "disk")}
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder, out = Path(place, "images"), Path(place, "out")
        make(folder, options.images)
        pairs = read_pairs(folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
        for turn in range(options.repeats + 1):
            for name, action in (
                ("resize", lambda: pack(pairs, out, source="images", packing=Packing(resize=SMALL))),
                ("pillow", lambda: reencode(folder, threads)),
                ("keep", lambda: pack(pairs, out, source="images")),
                ("disk", lambda: write(folder, out)),
            ):
                forget(folder)
                seconds = timed(action)
                if turn:
                    seen[name].append(seconds)
                if out.is_dir():
                    shutil.rmtree(out)
                out.unlink(missing_ok=True)
    middle = {name: statistics.median(values) for name, values in seen.items()}
    print(f"{options.images} images of {SIDE} x {SIDE}, {size / 1e6:.0f} MB, {threads} threads\n")
    print("| | packing | measure | share |\n|---|---|---|---|")
    rate = {name: options.images / seconds for name, seconds in middle.items()}
    print(f"| shrinking to {SMALL}, images/s | {rate['resize']:.0f} | {rate['pillow']:.0f} (Pillow alone) | ", end="")
    print(f"{rate['resize'] / rate['pillow']:.0%} |")
    speed = {name: size / 1e6 / seconds for name, seconds in middle.items()}
    print(f"| as they are, MB/s | {speed['keep']:.0f} | {speed['disk']:.0f} (reading and writing the bytes) | ", end="")
    print(f"{speed['keep'] / speed['disk']:.0%} |")


if __name__ == "__main__":
    main()
