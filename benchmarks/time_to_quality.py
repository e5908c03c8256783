"""How long until open_clip's best score: its trainer and recipe, tuned, against ours, on one thread.

    python benchmarks/time_to_quality.py [--sets digits scenes] [--seeds 0 1 2] [--work runs/time-to-quality]
    python benchmarks/time_to_quality.py --tiny    # all of it in seconds, to see that it runs; its numbers say nothing

Two sets: the demo's (examples/digits.py), and drawn scenes in 1,280 classes (benchmarks/scenes.py). Both sides have the
same shards, towers, augmentation and captions, by step the same batches where their batches are of one size, and the
same evaluation. open_clip's side is its CLIP, ClipLoss, training loop (`open_clip_train.train`), AdamW with its groups
and betas, and its cosine schedule with a warm-up. Ours is the recipe of the configuration named in SETS.

Rate and warm-up of open_clip are chosen on seed 0 by validation (the grid stands in SETS), in runs as long
as the one that counts; the best then runs with every seed, and ours after each. Ours has come as far as open_clip's
best score where its validation curve, straight between two evaluations, first does. Test scores are of the best weights
and of those that came that far, and nothing is chosen by them. Time is that of training, without batches and
evaluations on both sides; as a busy machine slows one run more than another, a step's cost is also measured with both
sides taking turns. A run that is there already is not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import open_clip
import torch
import yaml
from open_clip.loss import ClipLoss
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch
from PIL import Image
from torch import Tensor

import miniclip
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.data.augmentation import Augmentation
from miniclip.data.order import SampleOrder
from miniclip.data.pack import pack
from miniclip.data.pairs import Batch, CaptionChoice, PairDataset, collate
from miniclip.data.shards import Shards
from miniclip.data.sources import read_pairs
from miniclip.evaluation.datasets.open import open_dataset
from miniclip.evaluation.measures.ranking import recall_at_1
from miniclip.evaluation.zero_shot import zero_shot_classifier
from miniclip.images import Preprocess, normalize
from miniclip.training.optimizer import OptimizerConfig, learning_rate_factor, make_optimizer, warmup_steps
from miniclip.training.step import MAX_LOGIT_SCALE, CLIPTraining, move_average
from miniclip.weights.layouts import from_openai_keys

ROOT = Path(__file__).resolve().parents[1]
EVALUATIONS = 12  # of a run
CONTEXTS = (32, 77)  # at which a step's cost is measured: that of the towers here, and CLIP's own


@dataclass(frozen=True)
class Set:
    """A data set, the towers and augmentation of both sides, and what is tried on each.

    Args:
        generator: makes the data; takes a folder and `--seed`.
        config: has the towers, the augmentation and our recipe.
        tests: tables of the test split that are classified; those with captions are retrieved from as well.
        grid: of open_clip, each tried on seed 0: (batch size, peak rate, share of the run that is warm-up).
        samples: of each of open_clip's runs.
        our_steps, our_batch: of ours.
        rounds: in which a step's cost is measured.
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
    """Pictures, captions and tables below `folder`/data, and shards of the pairs to train on."""
    if (folder / "shards/index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").is_dir():
        command = [sys.executable, data.generator, folder / "data", "--seed", str(seed), *data.options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    pack(read_pairs(folder / "data/train"), folder / "shards", source=str(folder / "data/train"))


class Batches:
    """The batches of a run from the shards; number n is the same for both sides."""

    def __init__(self, folder: Path, clip: CLIPConfig, augmentation: Augmentation, size: int, seed: int) -> None:
        shards = Shards(folder / "shards")
        self.pairs = PairDataset(
            shards, clip.vision.image_size, clip.text.context_length, augmentation, CaptionChoice(), seed
        )
        self.order, self.size = SampleOrder(shards.counts, seed), size

    def __getitem__(self, n: int) -> Batch:
        return collate([self.pairs[place] for place in self.order.slice(n * self.size, (n + 1) * self.size)])


class Examination:
    """A table of labelled pictures, decoded once; pictures with a caption beside them are retrieved by it as well."""

    def __init__(self, table: Path, preprocess: Any) -> None:
        self.data: Any = open_dataset(str(table))
        with open(table, encoding="utf-8") as file:
            paths = [table.parent / line.split(",")[0] for line in file.read().splitlines()[1:]]
        self.images = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in paths])  # (N, 3, R, R)
        texts = [path.with_suffix(".txt") for path in paths]
        is_captioned = all(path.is_file() for path in texts)
        self.captions = [path.read_text().splitlines()[0] for path in texts] if is_captioned else []

    @torch.no_grad()
    def __call__(self, model: miniclip.CLIP) -> dict[str, float]:
        model.eval()
        features = torch.cat([model.encode_image(part, normalize=True) for part in self.images.split(256)])
        classifier = zero_shot_classifier(model, self.data.classnames, self.data.templates)
        guesses = (features @ classifier).argmax(dim=1)
        found = {"top1": 100 * (guesses == torch.tensor(self.data.labels)).double().mean().item()}
        if self.captions:
            tokens = miniclip.tokenize(self.captions, model.context_length)
            texts = torch.cat([model.encode_text(part, normalize=True) for part in tokens.split(256)])
            found["r1"] = 50 * (recall_at_1(features, texts) + recall_at_1(texts, features))
        return found


class Clock:
    """Processor and wall-clock seconds of what runs while it is on; inside of it, `paused` is left out."""

    def __init__(self) -> None:
        self.cpu_s = self.wall_s = 0.0

    def __enter__(self) -> None:
        self.cpu_s -= time.process_time()
        self.wall_s -= time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.cpu_s += time.process_time()
        self.wall_s += time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.__exit__()
        yield
        self.__enter__()


class Stretch:
    """The batches between two evaluations, as open_clip's loop takes them; the clock stands still while one is made."""

    def __init__(self, batches: Batches, first: int, count: int, clip: CLIPConfig, clock: Clock) -> None:
        self.batches, self.first, self.num_batches, self.clip, self.clock = batches, first, count, clip, clock
        self.num_samples = count * batches.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for n in range(self.first, self.first + self.num_batches):
            with self.clock.paused():
                batch = self.batches[n]
                vision = self.clip.vision
                images = normalize(batch.images, vision.mean, vision.std)
                tokens = torch.zeros(len(images), self.clip.text.context_length, dtype=torch.long)
                tokens[:, : batch.tokens.shape[1]] = batch.tokens
            yield images, tokens


@dataclass(frozen=True)
class Point:
    """What an evaluation found; val in %."""

    step: int
    samples: int
    cpu_s: float
    wall_s: float
    val: float


class Course:
    """The validation scores of a run, and the weights of two moments: the best, and the first to reach `target`."""

    def __init__(self, exam: Examination, target: float = math.inf) -> None:
        self.exam, self.target = exam, target
        self.points: list[Point] = []
        self.kept: dict[str, dict[str, Tensor]] = {}

    def note(self, step: int, batch_size: int, clock: Clock, model: miniclip.CLIP) -> None:
        val = self.exam(model)["top1"]
        if val > max((point.val for point in self.points), default=-1.0):
            self.kept["best"] = copy.deepcopy(model.state_dict())
        if val >= self.target and "reached" not in self.kept:
            self.kept["reached"] = copy.deepcopy(model.state_dict())
        self.points.append(Point(step, step * batch_size, clock.cpu_s, clock.wall_s, val))


def stretches(steps: int) -> list[tuple[int, int]]:
    """(first step, number of steps) before each evaluation."""
    ends = sorted({round(steps * (n + 1) / EVALUATIONS) for n in range(EVALUATIONS)} - {0})
    return [(first, last - first) for first, last in zip([0, *ends], ends, strict=False)]


class Side(NamedTuple):
    """A trainer. advance: takes the first step's number and how many. scored: the model so far. clock: of training."""

    advance: Callable[[int, int], None]
    scored: Callable[[], miniclip.CLIP]
    clock: Clock


def open_clip_side(clip: CLIPConfig, batches: Batches, steps: int, rate: float, warmup: float, seed: int) -> Side:
    torch.manual_seed(seed)
    vision, text = clip.vision, clip.text
    model = open_clip.model.CLIP(
        clip.embed_dim,
        open_clip.model.CLIPVisionCfg(
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            width=vision.width,
            layers=vision.layers,
            head_width=vision.head_width,
        ),
        open_clip.model.CLIPTextCfg(
            context_length=text.context_length,
            width=text.width,
            layers=text.layers,
            heads=text.width // text.head_width,
        ),
        output_dict=True,
    )
    # As in its main.py: gains, biases and the logit scale do not decay.
    spared = [p.ndim < 2 or any(part in n for part in ("bn", "ln", "bias")) for n, p in model.named_parameters()]
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p, is_spared in zip(parameters, spared, strict=True) if is_spared], "weight_decay": 0.0},
        {"params": [p for p, is_spared in zip(parameters, spared, strict=True) if not is_spared], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-6)
    schedule = cosine_lr(optimizer, rate, round(warmup * steps), steps)
    settings = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=False, grad_clip_norm=None,
        rank=0, world_size=1, log_every_n_steps=10**9, batch_size=batches.size, wandb=False,
    )  # fmt: skip
    same = miniclip.CLIP(clip)  # for the evaluation
    clock = Clock()

    def advance(first: int, count: int) -> None:
        stretch = Stretch(batches, first, count, clip, clock)
        data = {"train": SimpleNamespace(dataloader=stretch, set_epoch=lambda epoch: None)}
        with clock:
            # An epoch of its loop is a stretch, so its steps start anew each time.
            train_one_epoch(
                model, data, ClipLoss(), 0, optimizer, None, lambda step: schedule(first + step), None, settings
            )

    def scored() -> miniclip.CLIP:
        same.load_state_dict(from_openai_keys(model.state_dict()))
        return same

    return Side(advance, scored, clock)


def our_side(clip: CLIPConfig, batches: Batches, steps: int, recipe: dict[str, Any], seed: int) -> Side:
    """Args: recipe: what CLIPTraining takes, `optimizer` among it, as in a configuration."""
    torch.manual_seed(seed)
    config = OptimizerConfig(**recipe.get("optimizer", {}))
    module = CLIPTraining(clip, config, **{name: value for name, value in recipe.items() if name != "optimizer"})
    optimizer = make_optimizer(module.clip, config)
    warmup = warmup_steps(config, steps, batches.size, max(1, batches.order.num_samples // batches.size))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, steps, warmup, config.schedule, config.cooldown, config.final_lr),
    )
    clock = Clock()

    def advance(first: int, count: int) -> None:
        module.train()
        for n in range(first, first + count):
            batch = batches[n]
            with clock:
                groups = batch.caption_ids if module.positives == "caption" else None
                loss = miniclip.clip_loss(*module.features(batch), module.clip.logit_scale.exp(), groups=groups)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    module.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
                if module.average is not None and module.ema_decay is not None:
                    move_average(module.average, module.clip, min(module.ema_decay, (1 + n) / (10 + n)))

    return Side(advance, lambda: module.scored, clock)


def train(side: Side, course: Course, steps: int, batch_size: int) -> None:
    for first, count in stretches(steps):
        side.advance(first, count)
        course.note(first + count, batch_size, side.clock, side.scored())


def costs_in_turns(sides: list[Side], rounds: int) -> list[float]:
    """Processor seconds a step of each, the median; a busy machine slows those that take turns alike."""
    times: list[list[float]] = [[] for _ in sides]
    for n in range(rounds + 1):
        for side, seconds in zip(sides, times, strict=True):
            before = side.clock.cpu_s
            side.advance(n, 1)
            seconds.append(side.clock.cpu_s - before)
    return [statistics.median(seconds[1:]) for seconds in times]  # the first has what happens once


def best(points: list[Point]) -> Point:
    """Where the validation score is highest; of equal ones the first."""
    return max(points, key=lambda point: point.val)


def reached(points: list[Point], score: float) -> Point | None:
    """Where the validation curve, straight between its points, first comes to a score; None if it never does."""
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
    """Towers, augmentation, and what else stands under `model`."""
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
        """Context length -> processor seconds a step, open_clip's and ours, taken in turns."""
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
        """open_clip's best setting of the grid, chosen on seed 0; then each seed, one side after the other."""
        grid = {setting: best(self.open_clip(setting, 0).points) for setting in self.data.grid}
        chosen = max(grid, key=lambda setting: grid[setting].val)
        rows = []
        for seed in seeds:
            theirs = self.open_clip(chosen, seed)
            rows.append((seed, theirs, self.ours(seed, best(theirs.points).val)))
        return Comparison(self, grid, chosen, rows, self.costs(chosen))


class Comparison(NamedTuple):
    """What came out for a set. rows: seed, open_clip's run, ours. costs: see `Bench.costs`."""

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
        """open_clip's to ours, a seed each, of what it takes to open_clip's best; infinite where ours never does."""
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
    """Validation over processor seconds, as steps times a step's cost; a panel for each set, every seed a line."""
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
