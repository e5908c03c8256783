"""Time to open_clip's best score: its tuned trainer and recipe against ours, on one thread.

    python benchmarks/time_to_quality.py [--sets digits scenes] [--seeds 0 1 2] [--work runs/time-to-quality]
    python benchmarks/time_to_quality.py --tiny    # everything in seconds; its numbers mean nothing

There are two sets: the demo's (examples/digits.py), and drawn scenes in 1,280 classes (benchmarks/scenes.py). Both
sides have the same shards, towers, augmentation, captions and evaluation, and at equal batch sizes the same batches.
open_clip's side is its CLIP, ClipLoss, training loop (`open_clip_train.train`), AdamW with its groups and betas, and
its cosine schedule with a warm-up. Ours is the recipe of the configuration that SETS names.

Validation on seed 0 chooses open_clip's rate and warm-up (SETS has the grid) in runs of full length; the best setting
then runs with every seed, and ours after each. Ours reaches open_clip's best score where its validation curve, linear
between evaluations, first does. Test scores are of the best weights and of those that first reach that score; they
choose nothing. Time is training alone, without batches and evaluations. A busy machine slows one run more than another,
so a step's cost is also measured with both sides taking turns. Finished runs are kept and not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
import yaml
from sides import Batches, Course, Examination, Point, Side, costs_in_turns, open_clip_side, our_side, train

import miniclip
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.data.augmentation import Augmentation
from miniclip.data.pack import pack
from miniclip.data.sources import read_pairs
from miniclip.images import Preprocess

ROOT = Path(__file__).resolve().parents[1]
CONTEXTS = (32, 77)  # context lengths of the measured steps: these towers' and CLIP's own


@dataclass(frozen=True)
class Set:
    """A data set, and both sides' settings for it.

    Args:
        generator: makes the data; takes a folder and `--seed`.
        config: a YAML file with the towers, the augmentation and our recipe.
        tests: tables of the test split; those with captions are tested by retrieval as well.
        grid: open_clip's settings: (batch size, peak rate, share of the run that is warm-up).
        samples: the length of open_clip's runs.
        our_steps, our_batch: the length and batch size of ours.
        rounds: how often a step's cost is measured.
        options: further arguments of the generator.
    """

    generator: Path
    config: Path
    tests: tuple[str, ...]
    grid: tuple[tuple[int, float, float], ...]
    samples: int
    our_steps: int
    our_batch: int = 128
    rounds: int = 9
    options: tuple[str, ...] = ()


SETS = {
    "digits": Set(
        ROOT / "examples/digits.py",
        ROOT / "configs/digits.yaml",
        tests=("digits", "unseen"),
        grid=((64, 1e-3, 0.1), (64, 5e-4, 0.1), (64, 2.5e-4, 0.1), (64, 5e-4, 0.02), (64, 5e-4, 0.3)),
        samples=64_000,
        our_steps=200,
    ),
    "scenes": Set(
        ROOT / "benchmarks/scenes.py",
        ROOT / "benchmarks/scenes.yaml",
        tests=("scenes", "unseen"),
        grid=((64, 1e-3, 0.1), (64, 5e-4, 0.1), (64, 2e-3, 0.1), (64, 1e-3, 0.02), (64, 1e-3, 0.3)),
        samples=64_000,
        our_steps=200,
    ),
}

TINY = {
    name: replace(data, grid=data.grid[:2], samples=128, our_steps=2, rounds=1, options=options)
    for (name, data), options in zip(SETS.items(), ((), ("--every", "20", "--pairs-per-class", "2")), strict=True)
}


def prepare(folder: Path, data: Set, seed: int) -> None:
    """Makes pictures, captions and tables below `folder`/data, and shards of the training pairs."""
    if (folder / "shards/index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").is_dir():
        command = [sys.executable, data.generator, folder / "data", "--seed", str(seed), *data.options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    pack(read_pairs(folder / "data/train"), folder / "shards", source=str(folder / "data/train"))


def best(points: list[Point]) -> Point:
    """The first point with the highest validation score."""
    return max(points, key=lambda point: point.val)


def reached(points: list[Point], score: float) -> Point | None:
    """Where the validation curve, linear between its points, first reaches a score; None if it never does."""
    before = Point(0, 0, 0.0, 0.0, 0.0)
    for point in points:
        if point.val >= score:
            share = (score - before.val) / (point.val - before.val) if point.val > before.val else 1.0
            low, high = vars(before).values(), vars(point).values()
            step, samples, *others = (a + share * (b - a) for a, b in zip(low, high, strict=True))
            return Point(math.ceil(step), math.ceil(samples), *others)
        before = point
    return None


def read_config(path: Path) -> tuple[CLIPConfig, Augmentation, dict[str, Any]]:
    """Towers, augmentation, and the other settings under `model`."""
    settings = yaml.safe_load(path.read_text())
    recipe = settings["model"]
    towers = recipe.pop("clip")
    clip = CLIPConfig(**{**towers, "vision": VisionConfig(**towers["vision"]), "text": TextConfig(**towers["text"])})
    augmentation = Augmentation(**{name: tuple(v) for name, v in settings["data"].get("augmentation", {}).items()})
    return clip, augmentation, recipe


class Run(NamedTuple):
    """points: of validation. tests: moment ("best", "reached") -> table -> measure -> %."""

    points: list[Point]
    tests: dict[str, dict[str, dict[str, float]]]


class Bench:
    """The runs of one set, kept as JSON below `work`."""

    def __init__(self, work: Path, name: str, data: Set) -> None:
        self.work, self.name, self.data = work / name, name, data
        self.clip, self.augmentation, self.recipe = read_config(data.config)

    def _kept(
        self, name: str, seed: int, size: int, steps: int, build: Callable[[Batches], Side], target: float = math.inf
    ) -> Run:
        path = self.work / f"seed{seed}/{name}{'' if target == math.inf else f'_to_{target:.3f}'}.json"
        if not path.is_file():
            folder = path.parent
            prepare(folder, self.data, seed)
            v = self.clip.vision
            preprocess = Preprocess(v.image_size, v.mean, v.std)
            course = Course(Examination(folder / "data/val.csv", preprocess), target)
            train(build(Batches(folder, self.clip, self.augmentation, size, seed)), course, steps, size)
            found: dict[str, Any] = {}
            model = miniclip.CLIP(self.clip)
            for moment, weights in course.kept.items():
                model.load_state_dict(weights)
                found[moment] = {t: Examination(folder / f"data/{t}.csv", preprocess)(model) for t in self.data.tests}
            path.write_text(json.dumps({"points": [vars(point) for point in course.points], "tests": found}))
        kept = json.loads(path.read_text())
        run = Run([Point(**point) for point in kept["points"]], kept["tests"])
        top = best(run.points)
        print(f"{self.name}, seed {seed}, {name}: best val {top.val:.1f} after {top.step} steps, {top.cpu_s:.1f} s of "
              f"processor, {top.wall_s:.1f} s; last {run.points[-1].val:.1f}", file=sys.stderr, flush=True)  # fmt: skip
        return run

    def open_clip(self, setting: tuple[int, float, float], seed: int) -> Run:
        size, rate, warmup = setting
        steps = self.data.samples // size
        return self._kept(
            f"open_clip_{size}_{rate:g}_{warmup:g}_{steps}",
            seed,
            size,
            steps,
            lambda batches: open_clip_side(self.clip, batches, steps, rate, warmup, seed),
        )

    def ours(self, seed: int, target: float = math.inf) -> Run:
        steps, size, recipe = self.data.our_steps, self.data.our_batch, self.recipe
        told = json.dumps(recipe, sort_keys=True).translate(str.maketrans("", "", '{}": ')).replace(",", "_")
        return self._kept(
            f"ours_{size}_{steps}_{told}",
            seed,
            size,
            steps,
            lambda batches: our_side(self.clip, batches, steps, recipe, seed),
            target,
        )

    def costs(self, setting: tuple[int, float, float]) -> dict[int, list[float]]:
        """Context length -> processor seconds a step of open_clip and of ours, measured in turns."""
        size, rate, warmup = setting
        path = self.work / f"costs_{size}_{self.data.our_batch}.json"
        if not path.is_file():
            found = {}
            for length in CONTEXTS:
                clip = replace(self.clip, text=replace(self.clip.text, context_length=length))
                folder = self.work / "seed0"
                theirs, own = (Batches(folder, clip, self.augmentation, n, 0) for n in (size, self.data.our_batch))
                sides = [
                    open_clip_side(clip, theirs, self.data.samples // size, rate, warmup, 0),
                    our_side(clip, own, self.data.our_steps, self.recipe, 0),
                ]
                found[length] = costs_in_turns(sides, self.data.rounds)
            path.write_text(json.dumps(found))
        return {int(length): seconds for length, seconds in json.loads(path.read_text()).items()}

    def compare(self, seeds: list[int]) -> Comparison:
        """Chooses open_clip's best setting of the grid on seed 0, then runs both sides with each seed."""
        grid = {setting: best(self.open_clip(setting, 0).points) for setting in self.data.grid}
        chosen = max(grid, key=lambda setting: grid[setting].val)
        rows = []
        for seed in seeds:
            theirs = self.open_clip(chosen, seed)
            rows.append((seed, theirs, self.ours(seed, best(theirs.points).val)))
        return Comparison(self, grid, chosen, rows, self.costs(chosen))


class Comparison(NamedTuple):
    """The results on a set. rows: (seed, open_clip's run, ours). costs: see `Bench.costs`."""

    bench: Bench
    grid: dict[tuple[int, float, float], Point]
    chosen: tuple[int, float, float]
    rows: list[tuple[int, Run, Run]]
    costs: dict[int, list[float]]

    def markdown(self) -> str:
        data, name = self.bench.data, self.bench.name
        size, rate, warmup = self.chosen
        lines = [
            f"## {name}",
            "",
            f"open_clip's grid, seed 0, {data.samples:,} samples each, by validation:",
            "",
            "| batch | rate | warm-up | best val, % | processor, s |",
            "|---|---|---|---|---|",
            *(
                f"| {b} | {r:g} | {w:g} | {point.val:.1f} | {point.cpu_s:.0f} |"
                for (b, r, w), point in sorted(self.grid.items())
            ),
            "",
            f"open_clip: batch {size}, rate {rate:g}, warm-up {warmup:g}, {data.samples // size} steps. Ours: batch "
            f"{data.our_batch}, {data.our_steps} steps, `{data.config.relative_to(ROOT)}`.",
            "",
            "| seed | side | val, % | steps | samples | processor, s | wall-clock, s | test there |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for seed, theirs, ours in self.rows:
            goal = best(theirs.points)
            lines.append(_row(seed, "open_clip's best", goal, goal.val, theirs.tests["best"]))
            there = reached(ours.points, goal.val)
            if there is None:
                lines.append(f"| {seed} | ours | never {goal.val:.1f}, at most {best(ours.points).val:.1f} | | | | | |")
            else:
                lines.append(_row(seed, "ours, as good", there, there.val, ours.tests["reached"]))
            lines.append(_row(seed, "ours, best", best(ours.points), best(ours.points).val, ours.tests["best"]))
        lines += ["", *self._ratios(), "", *self._spread()]
        return "\n".join(lines)

    def ratios(self) -> dict[str, list[float]]:
        """Cost of open_clip's best score, open_clip's divided by ours, for each seed; 0 where ours never reaches it."""
        out: dict[str, list[float]] = {name: [] for name in ("steps", "samples", "processor", "wall-clock")}
        for _, theirs, ours in self.rows:
            goal = best(theirs.points)
            there = reached(ours.points, goal.val)
            for column, field in zip(out, ("step", "samples", "cpu_s", "wall_s"), strict=True):
                out[column].append(getattr(goal, field) / getattr(there, field) if there else 0.0)
        return out

    def _ratios(self) -> list[str]:
        lines = ["| open_clip's to ours, by seed (0: never) | " + " | ".join(str(row[0]) for row in self.rows) + " |"]
        lines.append("|---" * (len(self.rows) + 1) + "|")
        found = self.ratios()
        own = self.bench.clip.text.context_length
        for length, (theirs, ours) in self.costs.items():
            told = f"{1000 * theirs:.0f} and {1000 * ours:.0f} ms a step, taken in turns"
            where = "" if length == own else f", were the context {length} tokens"
            found[f"**processor, by steps**{where}: {told}"] = [r * theirs / ours for r in found["steps"]]
        return [*lines, *(f"| {name} | {' | '.join(f'{r:.1f}' for r in rs)} |" for name, rs in found.items())]

    def _spread(self) -> list[str]:
        sides = {"open_clip's best": [theirs.tests["best"] for _, theirs, _ in self.rows]}
        sides["ours, as good"] = [ours.tests["reached"] for _, _, ours in self.rows if "reached" in ours.tests]
        sides["ours, best"] = [ours.tests["best"] for _, _, ours in self.rows]
        measures = [(table, measure) for table, found in self.rows[0][1].tests["best"].items() for measure in found]
        lines = ["| test, mean (lowest to highest) of the seeds | " + " | ".join(" ".join(m) for m in measures) + " |"]
        lines.append("|---" * (len(measures) + 1) + "|")
        for side, tests in sides.items():
            columns = [[test[table][measure] for test in tests] for table, measure in measures if tests]
            told = (f"{statistics.mean(c):.1f} ({min(c):.1f} to {max(c):.1f})" for c in columns)
            lines.append(f"| {side} | {' | '.join(told)} |")
        return lines


def _row(seed: int, side: str, point: Point, val: float, tests: dict[str, dict[str, float]]) -> str:
    told = ", ".join(f"{table} {name} {value:.1f}" for table, found in tests.items() for name, value in found.items())
    return (
        f"| {seed} | {side} | {val:.1f} | {point.step} | {point.samples} | {point.cpu_s:.1f} | {point.wall_s:.1f} "
        f"| {told} |"
    )


def draw_curves(comparisons: list[Comparison], path: Path) -> None:
    """Validation over processor seconds (steps times a step's cost): a panel for each set, a line for each seed."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(comparisons), figsize=(5.5 * len(comparisons), 4), squeeze=False)
    for axis, comparison in zip(axes[0], comparisons, strict=True):
        costs = comparison.costs[comparison.bench.clip.text.context_length]
        for number, (_, *runs) in enumerate(comparison.rows):
            for run, cost, colour, name in zip(runs, costs, ("C1", "C0"), ("open_clip", "miniclip"), strict=True):
                seconds, scores = [cost * point.step for point in run.points], [point.val for point in run.points]
                label = None if number else name
                axis.plot(seconds, scores, color=colour, label=label, linewidth=1.5, marker=".")
        axis.set(xscale="log", xlabel="processor seconds of training, one thread", ylim=(0, 100))
        axis.set(ylabel="validation, top-1 in %", title=comparison.bench.name)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of data, weights and batches")
    parser.add_argument("--work", type=Path, default=Path("runs/time-to-quality"), help="data and finished runs")
    parser.add_argument("--out", type=Path, help="the report, as Markdown; by default WORK/time-to-quality.md")
    parser.add_argument("--picture", type=Path, help="the curves, as PNG; by default WORK/time-to-quality.png")
    parser.add_argument("--tiny", action="store_true", help="a few steps on few pictures, to see that all of it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.WARNING)
    sets = TINY if options.tiny else SETS
    work = options.work / "tiny" if options.tiny else options.work
    comparisons = [Bench(work, name, sets[name]).compare(options.seeds) for name in options.sets]
    picture = options.picture or work / "time-to-quality.png"
    draw_curves(comparisons, picture)
    versions = f"torch {torch.__version__}, open_clip {open_clip.__version__}, {platform.machine()}, one thread, fp32"
    text = "\n\n".join([f"`python benchmarks/time_to_quality.py`: {versions}", *(c.markdown() for c in comparisons)])
    out = options.out or work / "time-to-quality.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
