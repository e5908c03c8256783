"""Training and encoding on a CUDA GPU beside open_clip: one command for a machine that has one.

    python benchmarks/gpu.py [--compile] [--seconds 450] [--only PART ...] [--tiny]

Agreement comes first: features, loss and gradient of both libraries on the GPU, in several precisions, beside float64
on the CPU. Then come training steps of ViT-B/32 and B/16 in bfloat16 at large batches with captions of real lengths
(images a second, model-FLOP utilisation, peak memory), encoding, GradCache up to 32,768 pairs, the loss alone, the
optimisers, and the largest batch that fits. benchmarks/results/GPU.md and .json are written after each part. Each part
has a time limit; `--seconds` limits the whole, by default to eight minutes with the imports, and skips the parts that
no longer fit. `--tiny` runs every part on the CPU, with models that take milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import harness
import machine
import peers
import samples
import steps
import torch
import torch.nn.functional as F
from agreement import CPU, Way, outcome
from contenders import OURS, THEIRS
from gpu_page import page
from harness import Job, Timing
from open_clip.loss import ClipLoss
from rich.console import Console

import miniclip
from miniclip import tokenizer
from miniclip.common.files import write_text
from miniclip.config import CLIPConfig
from miniclip.training.optimizer import OptimizerConfig, make_optimizer
from miniclip.weights.facts import forward_flops

RESULTS = Path(__file__).parent / "results"
MODELS = ("ViT-B/32", "ViT-B/16")


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How much each part computes.

    Args:
        agreed: model -> pairs on which both libraries have to agree.
        batches: model -> pairs in a training step.
        encoded: pairs that are encoded at once.
        cached: batches of GradCache, encoded `part` pairs at a time.
        contrasted: pairs of the loss alone.
        step, most: the search for the largest batch tries multiples of `step` up to `most`.
    """

    agreed: dict[str, int]
    batches: dict[str, int]
    encoded: int
    cached: tuple[int, ...]
    part: int
    contrasted: int
    step: int
    most: int
    patience: harness.Patience


FULL = Amounts(
    {"ViT-B/32": 8, "RN50": 8, "ViT-B/16": 4},
    {"ViT-B/32": 1024, "ViT-B/16": 512},
    1024,
    (8192, 32_768),
    1024,
    32_768,
    1024,
    65_536,
    harness.Patience(rounds=2, seconds=3),
)
TINY = Amounts(
    dict.fromkeys(("ViT-B/32", "RN50", "ViT-B/16"), 4),
    dict.fromkeys(MODELS, 4),
    4,
    (4, 8),
    2,
    8,
    2,
    4,
    harness.Patience(rounds=1, most_rounds=1),
)


class OutOfTimeError(Exception):
    """A part has used up its time."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """
    Raises:
        OutOfTimeError: the block takes longer.
    """

    def stop(*_: Any) -> None:
        raise OutOfTimeError(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def model_flops(config: CLIPConfig, texts: list[str]) -> int:
    """Operations of one forward pass over the texts, each at its own length, and over as many images."""
    lengths = Counter(len(tokenizer.encode_for_model(text)) for text in texts)
    return _image_flops(config) * len(texts) + sum(_text_flops(config, n) * count for n, count in lengths.items())


@cache
def _image_flops(config: CLIPConfig) -> int:
    with torch.device("meta"):
        side = config.vision.image_size
        return forward_flops(miniclip.CLIP(config).eval().visual, torch.zeros(1, 3, side, side))


@cache
def _text_flops(config: CLIPConfig, length: int) -> int:
    with torch.device("meta"):
        tower = miniclip.CLIP(dataclasses.replace(config, towers="text")).eval().text
        return forward_flops(tower, torch.zeros(1, length, dtype=torch.long))


def largest(fits: Callable[[int], bool], step: int, most: int) -> int:
    """The largest multiple of `step` up to `most` that fits, or 0. It doubles until one does not fit, then bisects."""
    low, high, last = 0, 1, most // step  # in steps
    while high <= last and fits(high * step):
        low, high = high, 2 * high
    high = min(high, last + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


class Bench:
    """One device and the rows measured on it; `folder` keeps the models' weights."""

    def __init__(self, where: torch.device, amounts: Amounts, size: str, folder: Path) -> None:
        self.where, self.amounts, self.size, self.folder = where, amounts, size, folder
        self.machine = machine.this_machine(where, "bf16-mixed")
        self.rows: list[dict[str, Any]] = []
        self.known: list[dict[str, Any]] = []  # rows of an earlier run
        self.facts = _facts(where)

    def job(self, who: str, model: str, count: int, parts: int = 1, compiles: bool = False) -> Job:
        """A training step."""
        config, texts = peers.architecture(model, self.size), samples.captions(count)
        how = {"where": self.where, "precision": torch.bfloat16}
        if who == OURS:
            micro = count // parts if parts > 1 else None
            return steps.our_step(config, self.folder, texts, micro, **how, compile=compiles)
        return steps.their_step(config, self.folder, texts, parts, **how, compiles=compiles)

    def agreement(self, model: str) -> bool:
        """Both libraries on both devices in several precisions, beside ours in float64 on the CPU."""
        config, count = peers.architecture(model, self.size), self.amounts.agreed[model]
        models = {OURS: peers.ours(config, self.folder), THEIRS: peers.openclips(config, self.folder)}
        reference = outcome(Way(OURS, CPU, "fp64"), models[OURS], config, count)
        ways = [Way(OURS, CPU, "fp32"), Way(THEIRS, CPU, "fp64")]
        if self.where.type != "cpu":
            ways += [Way(who, self.where, p) for who in (OURS, THEIRS) for p in ("fp64", "fp32", "tf32", "bf16")]
        row: dict[str, Any] = {"case": f"{model}, {count} pairs", "differences": {}}
        self.rows.append(row)
        for way in ways:
            found = outcome(way, models[way.who], config, count)
            row["differences"][str(way)] = {name: harness.difference(found[name], reference[name]) for name in found}
            self._free()
        exact = [parts for name, parts in row["differences"].items() if name.endswith("fp64")]
        return all(value <= harness.MOST_DIFFERENCE for parts in exact for value in parts.values())

    def steps(self, model: str, compiles: bool = False) -> None:
        count = self.amounts.batches[model]
        flops = 3 * model_flops(peers.architecture(model, self.size), samples.captions(count))  # backward counts twice
        case = f"{model} training step, batch {count:,}{', compiled' if compiles else ''}"
        self._race(
            case, {w: partial(self.job, w, model, count, compiles=compiles) for w in (OURS, THEIRS)}, count, flops
        )

    def encoding(self, model: str) -> None:
        config, count = peers.architecture(model, self.size), self.amounts.encoded
        side, texts = config.vision.image_size, samples.captions(count)
        tokens = miniclip.tokenize(texts)
        random = torch.Generator(self.where).manual_seed(0)
        images = torch.randn(count, 3, side, side, generator=random, device=self.where)
        towers = {OURS: peers.ours(config, self.folder), THEIRS: peers.openclips(config, self.folder)}
        for tower in towers.values():
            tower.eval().to(self.where)

        def job(who: str, of_images: bool) -> Job:
            def run() -> None:
                with torch.inference_mode(), torch.autocast(self.where.type, torch.bfloat16):
                    if of_images:
                        towers[who].encode_image(images)
                    else:  # tokens come from the host, where ours looks for the longest
                        towers[who].encode_text(tokens if who == OURS else tokens.to(self.where))
                steps.wait_for(self.where)

            return Job(run)

        of_images = _image_flops(config) * count
        for what, amount in (("images", of_images), ("captions", model_flops(config, texts) - of_images)):
            made = {who: partial(job, who, what == "images") for who in towers}
            self._race(f"{model} encoding, {count:,} {what}", made, count, amount)

    def gradcache(self, count: int) -> None:
        parts = count // self.amounts.part
        flops = 3 * model_flops(peers.architecture(MODELS[0], self.size), samples.captions(count))
        case = f"{MODELS[0]} GradCache, batch {count:,} in parts of {self.amounts.part:,}"
        self._race(case, {OURS: partial(self.job, OURS, MODELS[0], count, parts)}, count, flops)

    def loss(self) -> None:
        """The loss and its gradient; features are float32, and both libraries multiply them in TF32."""
        count, width = self.amounts.contrasted, 512

        def job(who: str) -> Job:
            random = torch.Generator(self.where).manual_seed(0)
            drawn = [torch.randn(count, width, generator=random, device=self.where) for _ in range(2)]
            sides = [F.normalize(side, dim=-1).requires_grad_() for side in drawn]
            scale = torch.tensor(30.0, device=self.where, requires_grad=True)

            def run() -> None:
                for tensor in (*sides, scale):
                    tensor.grad = None
                chunk = min(1024, count)
                loss = miniclip.clip_loss(*sides, scale, chunk_size=chunk) if who == OURS else ClipLoss()(*sides, scale)
                loss.backward()
                steps.wait_for(self.where)

            return Job(run)

        case = f"loss alone, {count:,} pairs"
        self._race(case, {who: partial(job, who) for who in (OURS, THEIRS)}, count, 3 * 2 * count**2 * width)

    def optimizers(self) -> None:
        """A step of each optimiser alone, and its share of the training step that `steps` measured with AdamW."""
        model = MODELS[0]
        config = peers.architecture(model, self.size)
        row: dict[str, Any] = {"case": f"{model} optimiser alone", "optimizers": {}}
        rows = self.known + self.rows
        step_case = f"{model} training step, batch {self.amounts.batches[model]:,}"  # not the compiled one
        whole = next((r[OURS]["seconds"] for r in reversed(rows) if r["case"] == step_case), math.nan)
        for kind in ("adamw", "muon"):
            clip = peers.ours(config, self.folder).to(self.where)
            optimizer = make_optimizer(clip, OptimizerConfig(kind=kind))
            for parameter in clip.parameters():
                parameter.grad = torch.randn_like(parameter) * 1e-3
            step = optimizer.step

            def run(step: Callable[[], Any] = step) -> None:
                step()
                steps.wait_for(self.where)

            row["optimizers"][kind] = {"seconds": self._times({kind: Job(run)})[kind].median}
        plain = row["optimizers"]["adamw"]["seconds"]
        for facts in row["optimizers"].values():
            facts["share"] = facts["seconds"] / (whole - plain + facts["seconds"])
        self.rows.append(row)

    def largest_batch(self, model: str) -> None:
        row: dict[str, Any] = {"case": f"{model} largest batch"}
        self.rows.append(row)
        for who in (OURS, THEIRS):
            row.setdefault(who, {})["largest_batch"] = largest(
                lambda batch, who=who: self._fits(who, model, batch), self.amounts.step, self.amounts.most
            )

    def _race(self, case: str, makers: dict[str, Callable[[], Job]], count: int, flops: int) -> None:
        """Adds a row. Peak memory counts from before a job was made, and is taken before the next job exists."""
        row: dict[str, Any] = {"case": case}
        jobs, peaks = {}, {}
        for who, make in makers.items():
            self._free()
            before = self._memory_mb()
            jobs[who] = make()
            for _ in range(2):  # the first makes the optimiser's state and compiles kernels
                jobs[who].run()
            peaks[who] = self._memory_mb(peak=True) - before
        for who, timing in self._times(jobs).items():
            row[who] = {
                "seconds": timing.median,
                "spread": timing.spread,
                "per_second": count / timing.median,
                "utilisation": flops / timing.median / self.machine.flops,
                "peak_mb": peaks[who],
            }
        self.rows.append(row)

    def _times(self, jobs: dict[str, Job]) -> dict[str, Timing]:
        """As `harness.race`, without counting operations, which compiled towers do not allow."""
        patience, times = self.amounts.patience, {who: Timing() for who in jobs}
        for job in jobs.values():
            job.run()
        begin, turn, names = time.perf_counter(), 0, list(jobs)
        while turn < patience.rounds or (
            turn < patience.most_rounds and time.perf_counter() - begin < patience.seconds
        ):
            for who in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.perf_counter()
                jobs[who].run()
                times[who].wall.append(time.perf_counter() - start)
            turn += 1
        return times

    def _free(self) -> None:
        gc.collect()
        if self.where.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.where)
        else:
            machine.forget_peak()

    def _memory_mb(self, peak: bool = False) -> float:
        if self.where.type == "cuda":
            used = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
            return used(self.where) / 1e6
        return machine.resident_mb(peak)

    def _fits(self, who: str, model: str, count: int) -> bool:
        self._free()
        try:
            job = self.job(who, model, count)
            job.run()
            job.run()  # now the optimiser's state exists from the start
        except torch.OutOfMemoryError:
            return False
        return True

    def write(self, out: Path) -> None:
        facts = {"machine": dataclasses.asdict(self.machine), **self.facts, "size": self.size}
        known = [row for row in self.known if row["case"] not in {row["case"] for row in self.rows}]
        document = {**facts, "date": date.today().isoformat(), "rows": known + self.rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out.with_suffix(".json"), json.dumps(document, indent=1) + "\n")
        write_text(out.with_suffix(".md"), page(document))


def _facts(where: torch.device) -> dict[str, Any]:
    """Versions, and the operations a second of a large product of random bfloat16 matrices."""
    versions = machine.versions()
    if where.type == "cuda":
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            versions["driver"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        versions["CUDA"] = str(torch.version.cuda)
    side, best = (8192 if where.type == "cuda" else 256), math.inf
    a, b = (torch.randn(side, side, device=where, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        steps.wait_for(where)
        begin = time.perf_counter()
        for _ in range(4):
            a @ b
        steps.wait_for(where)
        best = min(best, (time.perf_counter() - begin) / 4)
    return {"versions": versions, "product": 2 * side**3 / best}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="all of it on the CPU, at tiny size")
    parser.add_argument("--compile", action="store_true", help="steps with torch.compile for both sides' towers, too")
    parser.add_argument("--seconds", type=float, default=450, help="at most, for all parts together")
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts whose names begin so; other rows stay")
    parser.add_argument("--out", type=Path, help="where to write, without suffix; by default by the GPU's name")
    options = parser.parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU on this machine; --tiny goes through all of it on the CPU")
    where = torch.device("cpu" if options.tiny else "cuda")
    console, begin, is_well = Console(file=sys.stdout, width=200), time.perf_counter(), True
    before = torch.get_float32_matmul_precision()
    with tempfile.TemporaryDirectory() as place:
        amounts, size = (TINY, "tiny") if options.tiny else (FULL, "full")
        bench = Bench(where, amounts, size, Path(place))
        out = options.out or (Path(place) if options.tiny else RESULTS) / bench.machine.name
        if options.only and out.with_suffix(".json").is_file():
            bench.known = json.loads(out.with_suffix(".json").read_text())["rows"]
        try:
            torch.set_float32_matmul_precision("high")  # both trainers set it
            for name, seconds, part in _parts(bench, options.compile):
                left = options.seconds - (time.perf_counter() - begin)
                if not name.startswith(tuple(options.only or [""])) or left < 5:
                    continue
                started = time.perf_counter()
                try:
                    with at_most(min(seconds, left)):
                        agrees = part()
                except Exception as error:  # the other parts are still worth measuring
                    is_well = False
                    console.print(f"[red]{name} failed[/red]: {type(error).__name__}: {error}", highlight=False)
                    if not isinstance(error, OutOfTimeError):
                        console.print_exception(max_frames=6)
                    continue
                finally:
                    bench.write(out)
                took = time.perf_counter() - started
                console.print(f"{name}, {took:.0f} s: {json.dumps(bench.rows[-1])}", highlight=False)
                if agrees is False:
                    console.print("[red]outputs differ[/red]; the comparison would be void")
                    return 1
        finally:
            torch.set_float32_matmul_precision(before)
    return 0 if is_well else 1


def _parts(bench: Bench, compiles: bool) -> list[tuple[str, float, Callable[[], Any]]]:
    """(name, time limit in seconds, part), the most valuable first."""
    amounts = bench.amounts
    parts: list[tuple[str, float, Callable[[], Any]]] = []
    parts += [(f"agreement {model}", 60, partial(bench.agreement, model)) for model in amounts.agreed]
    parts += [(f"steps {model}", 45, partial(bench.steps, model)) for model in MODELS]
    parts += [("optimizers", 20, bench.optimizers)]
    parts += [(f"encoding {model}", 30, partial(bench.encoding, model)) for model in MODELS]
    parts += [(f"gradcache {count}", 45, partial(bench.gradcache, count)) for count in amounts.cached]
    parts += [("loss", 20, bench.loss)]
    if compiles:
        parts += [(f"compiled {model}", 150, partial(bench.steps, model, compiles=True)) for model in MODELS]
    parts += [(f"largest {model}", 120, partial(bench.largest_batch, model)) for model in MODELS]
    return parts


if __name__ == "__main__":
    sys.exit(main())
