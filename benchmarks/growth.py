"""How time and memory grow with the batch, the length of texts, classes, shards and processes; a picture of each.

    python benchmarks/growth.py [--quick] [--only batch text classes shards ranks communication]

Writes docs/pictures/growth-WHAT.png and benchmarks/results/MACHINE-growth.json. Memory is the process's peak above
what it holds once everything is made. Traffic between processes is computed, not measured, for 8 to 1,024 GPUs
(docs/speed.md).
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import peers
import samples
import steps
import torch
import torch.distributed as dist
import torch.nn.functional as F
from machine import forget_peak, resident_mb, this_machine, versions
from rich.progress import Progress
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import miniclip
from miniclip import tokenizer
from miniclip.common.files import write_text
from miniclip.data.pairs import Batch
from miniclip.data.sampling.order import SampleOrder
from miniclip.data.shards import Shards
from miniclip.training.step import CLIPTraining

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the backend is chosen
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

ROOT = Path(__file__).parents[1]
SEARCHED_IMAGES = 64


class Point(NamedTuple):
    x: int
    seconds: float
    memory_mb: float


Curves = dict[str, list[Point]]


def cost(run: Callable[[], Any], rounds: int = 3) -> tuple[float, float]:
    """Median seconds, and peak memory above the start, after one warm-up run."""
    run()
    forget_peak()
    before, times = resident_mb(), []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times), max(0.0, resident_mb(peak=True) - before)


def curve(xs: Sequence[int], make: Callable[[int], Callable[[], Any]]) -> list[Point]:
    return [Point(x, *cost(make(x))) for x in xs]


def batch(size: str, folder: Path) -> Curves:
    """A training step of the small model."""
    config = peers.architecture("small", size)
    xs = {"full": [16, 32, 64, 128, 256], "quick": [16, 32, 64], "tiny": [2, 4]}[size]
    micro = xs[0]
    return {
        "miniclip": curve(xs, lambda x: steps.our_step(config, folder, samples.captions(x)).run),
        f"miniclip, parts of {micro}": curve(
            xs[1:], lambda x: steps.our_step(config, folder, samples.captions(x), micro).run
        ),
        "open_clip": curve(xs, lambda x: steps.their_step(config, folder, samples.captions(x)).run),
    }


def text(size: str, folder: Path) -> Curves:
    """ViT-B/32's text tower encodes 16 texts of one length."""
    config = peers.architecture("ViT-B/32", size)
    xs = {"full": [8, 16, 24, 32, 48, 64, 77], "quick": [8, 32, 77], "tiny": [8, 77]}[size]

    def encode(name: str, length: int) -> Callable[[], Any]:
        model = peers.for_inference(name, config, folder)
        tokens = torch.zeros(16, 77, dtype=torch.int)
        tokens[:, :length] = torch.randint(320, 40_000, (16, length), generator=torch.Generator().manual_seed(0))
        tokens[:, 0], tokens[:, length - 1] = tokenizer.START_OF_TEXT, tokenizer.END_OF_TEXT
        return torch.inference_mode()(lambda: model.encode_text(tokens))

    return {name: curve(xs, functools.partial(encode, name)) for name in ("miniclip", "open_clip")}


def classes(size: str, folder: Path) -> Curves:
    """The small model makes a classifier with one prompt a class, and compares 64 images with all classes."""
    config = peers.architecture("small", size)
    model = peers.for_inference("miniclip", config, folder)
    most = {"full": 10_000, "quick": 1000, "tiny": 20}[size]
    xs = [x for x in (10, 100, 1000, 10_000) if x <= most] if most > 20 else [10, 20]

    def build(count: int) -> Callable[[], Any]:
        names = samples.captions(count, seed=4)
        return lambda: miniclip.zero_shot_classifier(model, names, ["a photo of {}."])

    def score(count: int) -> Callable[[], Any]:
        random = torch.Generator().manual_seed(0)
        classifier = F.normalize(torch.randn(config.embed_dim, count, generator=random), dim=0)
        images = F.normalize(torch.randn(SEARCHED_IMAGES, config.embed_dim, generator=random), dim=-1)
        return lambda: (images @ classifier).topk(5)

    scored = xs if most <= 20 else [*xs, *(x for x in (100_000, 1_000_000) if size == "full")]
    return {"making the classifier": curve(xs, build), f"{SEARCHED_IMAGES} images, top 5": curve(scored, score)}


def shards(size: str, folder: Path) -> Curves:
    """Opens a data set of shards of 16 samples, and reads 64 samples in the order of training."""
    xs = {"full": [1, 10, 100, 1000], "quick": [1, 10, 100], "tiny": [1, 4]}[size]
    packed = samples.shards(folder, 64, 64)
    places = []
    for number in range(-(-xs[-1] // 4)):  # four tars in each
        places.append(folder / f"copy{number}")
        shutil.copytree(packed, places[-1])

    def some(count: int) -> list[str]:
        # One shard alone is a pattern of one tar.
        return [f"{packed}/00000.tar"] if count == 1 else [str(place) for place in places[: -(-count // 4)]]

    def read(count: int) -> Callable[[], Any]:
        opened = Shards(some(count))
        order = SampleOrder(opened.counts, seed=0)

        def run() -> None:
            for _, number in order.slice(0, min(64, len(opened))):
                opened[number]

        return run

    return {
        "opening": curve(xs, lambda count: lambda: Shards(some(count))),
        "the first 64 samples": curve(xs, read),
    }


class _Step(nn.Module):
    """A whole step as one forward pass, because DistributedDataParallel wraps forward passes."""

    def __init__(self, module: CLIPTraining) -> None:
        super().__init__()
        self.module = module

    def forward(self, data: Batch) -> torch.Tensor:
        scale = self.module.clip.logit_scale.exp()
        return miniclip.clip_loss(*self.module.features(data), scale, across_processes=dist.get_world_size() > 1)


def _rank(rank: int, world_size: int, global_batch: int, size: str, threads: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store{world_size}", rank=rank, world_size=world_size)
    torch.set_num_threads(max(1, threads // world_size))
    config = peers.architecture("small", size)
    module = CLIPTraining(config, steps.ADAMW).train()
    wrapped = DistributedDataParallel(_Step(module)) if world_size > 1 else _Step(module)
    optimizer = steps.make_optimizer(module.clip, steps.ADAMW)
    data = steps.our_batch(config, samples.captions(global_batch)[rank::world_size])

    def run() -> None:
        optimizer.zero_grad()
        wrapped(data).backward()
        optimizer.step()

    seconds, memory = cost(run)
    if rank == 0:
        Path(folder, f"ranks{world_size}.json").write_text(json.dumps([world_size, seconds, memory]))
    dist.destroy_process_group()


def ranks(size: str, folder: Path) -> Curves:
    """A training step of the small model; the machine's processes share the batch and the cores."""
    count = {"full": 64, "quick": 32, "tiny": 4}[size]
    points = []
    for world_size in (1, 2):
        passed = (world_size, count, size, torch.get_num_threads(), str(folder))
        torch.multiprocessing.spawn(_rank, passed, nprocs=world_size)
        points.append(Point(*json.loads((folder / f"ranks{world_size}.json").read_text())))
    return {f"a step of {count} pairs": points}


def communication(num_ranks: int, batch_size: int, width: int, num_parameters: int) -> dict[str, dict[str, float]]:
    """Bytes that one rank sends, and as many that it receives, for a step in float32; and its logits' operations.

    Collectives are rings, like NCCL's: gathering n bytes from each of W ranks sends (W - 1) n, reducing n bytes sends
    2 (W - 1) / W n. batch_size counts all ranks; width is the embedding's. open_clip runs with its default flags, and
    with --local-loss and --gather-with-grad, the only ones that give exact gradients.
    """
    W, B, E, b = num_ranks, batch_size, width, batch_size / num_ranks
    reduced = 2 * (W - 1) / W
    one_side = (W - 1) * b * E * 4  # the features of images, or of texts
    weights = reduced * num_parameters * 4
    # Texts alone are gathered, and their gradients reduced. Of each text's sum over images, the largest summand, the
    # sum and its gradient are reduced.
    sums = 3 * reduced * B * 4
    return {
        "miniclip": {
            "features": one_side + reduced * B * E * 4,
            "sums": sums,
            "weights": weights,
            "logits": 3 * 2 * b * B * E,  # forward, and for both sides' gradients
        },
        "open_clip": {"features": 2 * one_side, "sums": 0.0, "weights": weights, "logits": 3 * 2 * B * B * E},
        "open_clip, exact": {
            "features": 4 * one_side,
            "sums": 0.0,
            "weights": weights,
            "logits": 2 * 3 * 2 * b * B * E,  # both directions, each a product of its own
        },
    }


MEASURED: dict[str, tuple[Callable[[str, Path], Curves], str]] = {
    "batch": (batch, "pairs in a batch"),
    "text": (text, "tokens of each text"),
    "classes": (classes, "classes"),
    "shards": (shards, "shards"),
    "ranks": (ranks, "processes"),
}


def draw(curves: Curves, label: str, title: str, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    ticks = sorted({point.x for points in curves.values() for point in points})
    shown = ((left, "seconds", "seconds", 0.0), (right, "memory_mb", "peak memory, MB", 0.1))
    for axes, field, what, floor in shown:
        values = []
        for name, points in curves.items():
            ys = [max(getattr(point, field), floor) for point in points]
            axes.plot([point.x for point in points], ys, "o-", label=name)
            values += ys
        axes.set_xscale("log", base=2 if max(ticks) < 1000 else 10)
        if max(values) > 5 * min(values):
            axes.set_yscale("log")
            is_short = max(values) < 500 * min(values)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_short else (1,), numticks=20))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(0, 1.15 * max(values))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
        if max(ticks) < 1000:
            axes.set_xticks(ticks)
            axes.set_xticks([], minor=True)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.set_xlabel(label)
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(title.removesuffix("."), fontsize=10)
    save(figure, path)


def draw_communication(path: Path) -> None:
    """ViT-B/32 in float32 with 64 pairs on each rank."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in miniclip.CLIP(peers.architecture("ViT-B/32", "full")).parameters())
    xs = [8, 16, 32, 64, 128, 256, 512, 1024]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    found = [communication(x, 64 * x, 512, parameters) for x in xs]
    for name in found[0]:
        left.plot(xs, [(one[name]["features"] + one[name]["sums"]) / 1e6 for one in found], "o-", label=name)
        right.plot(xs, [one[name]["logits"] / 1e12 for one in found], "o-", label=name)
    left.plot(xs, [one["miniclip"]["weights"] / 1e6 for one in found], "k--", label="the weights' gradients, all")
    for axes, what in ((left, "MB that a rank sends for the loss"), (right, "TFLOP of logits on a rank")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.minorticks_off()
        axes.set_xlabel("GPUs, 64 pairs each")
        axes.set_ylabel(what)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle("What a step sends and computes for the loss, on paper (ViT-B/32)", fontsize=10)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", default="full")
    size.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="to try that all works")
    parser.add_argument("--only", nargs="+", choices=[*MEASURED, "communication"], default=[*MEASURED, "communication"])
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs/pictures")
    parser.add_argument("--out", type=Path, help="the JSON; by default benchmarks/results/MACHINE-growth.json")
    options = parser.parse_args(argv)
    machine = this_machine()
    out = options.out or ROOT / f"benchmarks/results/{machine.name}-growth.json"
    found: dict[str, Any] = {}
    with Progress() as bar, tempfile.TemporaryDirectory() as place:
        task = bar.add_task("growth", total=len(options.only))
        for what in options.only:
            bar.update(task, description=what)
            path = options.pictures / f"growth-{what}.png"
            if what == "communication":
                draw_communication(path)
            else:
                measured, label = MEASURED[what]
                curves = measured(options.size, Path(place))
                found[what] = {name: [point._asdict() for point in points] for name, points in curves.items()}
                draw(curves, label, (measured.__doc__ or "").strip().split("\n")[0], path)
            bar.advance(task)
    known = json.loads(out.read_text()) if out.is_file() else {}
    facts = {"size": options.size, "threads": torch.get_num_threads(), "versions": versions()}
    write_text(out, json.dumps({**known, **facts, **found}, indent=1) + "\n")
    print(f"written: {out} and {options.pictures}/growth-*.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
