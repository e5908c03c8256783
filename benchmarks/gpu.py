"""Training and encoding on a CUDA GPU beside open_clip: one command for a machine that has one.

    python benchmarks/gpu.py [--compile] [--tiny]

Steps of ViT-B/32 and B/16 in bfloat16 at large batches with captions of real lengths: images a second, model-FLOP
utilisation, peak memory, and the largest batch that fits; encoding; GradCache up to 32,768 pairs. First, that both
libraries compute the same. Writes benchmarks/results/GPU.md and .json. `--tiny` goes through all of it on
the CPU, with models that take milliseconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import harness
import peers
import samples
import steps
import torch
from harness import OURS, Job
from rich.console import Console

import miniclip
from miniclip import tokenizer
from miniclip.common.files import write_text
from miniclip.config import CLIPConfig
from miniclip.weights.convert import forward_flops

RESULTS = Path(__file__).parent / "results"
MODELS = ("ViT-B/32", "ViT-B/16")
THEIRS = "open_clip"


@dataclasses.dataclass(frozen=True)
class Amounts:
    """batches: of a step, by model. encoded: pairs encoded at once. cached: batches of GradCache, in parts of `part`.
    step, most: the search for the largest batch goes in multiples of `step` and no further than `most`."""

    batches: dict[str, int]
    encoded: int
    cached: tuple[int, ...]
    part: int
    step: int
    most: int
    patience: harness.Patience


FULL = Amounts(
    {"ViT-B/32": 1024, "ViT-B/16": 256},
    1024,
    (2048, 8192, 32_768),
    1024,
    256,
    65_536,
    harness.Patience(rounds=5, seconds=5),
)
TINY = Amounts(dict.fromkeys(MODELS, 4), 4, (4, 8), 2, 2, 4, harness.Patience(rounds=1, most_rounds=1))


def model_flops(config: CLIPConfig, texts: list[str]) -> int:
    """What towers have to compute for one pass forward over as many images and these texts, each of its own length."""
    with torch.device("meta"):
        model = miniclip.CLIP(config).eval()
        side = config.vision.image_size
        images = forward_flops(model.visual, torch.zeros(1, 3, side, side)) * len(texts)
        lengths = Counter(len(tokenizer.encode_for_model(text)) for text in texts)
        each = {length: forward_flops(model.text, torch.zeros(1, length, dtype=torch.long)) for length in lengths}
    return images + sum(each[length] * count for length, count in lengths.items())


def largest(fits: Callable[[int], bool], step: int, most: int) -> int:
    """The largest multiple of `step` up to `most` that fits, by doubling and then halving the gap; 0 if none does."""
    low, high, last = 0, 1, most // step  # in steps
    while high <= last and fits(high * step):
        low, high = high, 2 * high
    high = min(high, last + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


class Bench:
    """The device, what is measured on it, and where models' weights lie."""

    def __init__(self, where: torch.device, amounts: Amounts, size: str, folder: Path, compiles: bool) -> None:
        self.where, self.amounts, self.size, self.folder, self.compiles = where, amounts, size, folder, compiles
        self.machine = harness.this_machine(where, "bf16-mixed")
        self.rows: list[dict[str, Any]] = []

    def job(self, who: str, model: str, count: int, parts: int = 1, half: bool = True) -> Job:
        """A training step."""
        config, texts = peers.architecture(model, self.size), samples.captions(count)
        how = {"where": self.where, "precision": torch.bfloat16 if half else torch.float32}
        compiles = self.compiles and half
        if who == OURS:
            micro = count // parts if parts > 1 else None
            return steps.our_step(config, self.folder, texts, micro, **how, compile=compiles)
        return steps.their_step(config, self.folder, texts, parts, **how, compiles=compiles)

    def agreement(self) -> bool:
        """Loss and gradient of both, in float64."""
        jobs = {who: self.job(who, MODELS[0], min(32, self.amounts.encoded), half=False) for who in (OURS, THEIRS)}
        found, expected = (jobs[who].result() for who in (OURS, THEIRS))  # type: ignore[misc]
        difference = harness.difference(found, expected)
        self.rows.append({"case": "loss and gradient in float64", "difference": difference})
        return difference <= harness.MOST_DIFFERENCE

    def steps(self, model: str) -> None:
        count = self.amounts.batches[model]
        flops = 3 * model_flops(peers.architecture(model, self.size), samples.captions(count))  # twice that backward
        made = {who: self.job(who, model, count) for who in (OURS, THEIRS)}
        self._race(f"{model} training step, batch {count:,}", made, count, flops)
        del made
        for who in (OURS, THEIRS):
            self.rows[-1][who]["peak_mb"] = self._peak_mb(who, model, count)
            self.rows[-1][who]["largest_batch"] = largest(
                lambda batch, who=who: self._fits(who, model, batch), self.amounts.step, self.amounts.most
            )

    def encoding(self, model: str) -> None:
        config, count = peers.architecture(model, self.size), self.amounts.encoded
        side, texts = config.vision.image_size, samples.captions(count)
        tokens = miniclip.tokenize(texts)
        images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0)).to(self.where)
        towers = {OURS: peers.ours(config, self.folder), THEIRS: peers.openclips(config, self.folder)}
        for tower in towers.values():
            tower.eval().to(self.where)

        def job(who: str, of_images: bool) -> Job:
            def run() -> None:
                with torch.inference_mode(), torch.autocast(self.where.type, torch.bfloat16):
                    if of_images:
                        towers[who].encode_image(images)
                    else:  # from the host, where ours looks for the longest
                        towers[who].encode_text(tokens if who == OURS else tokens.to(self.where))
                steps.wait_for(self.where)

            return Job(run)

        flops = model_flops(config, texts)
        with torch.device("meta"):
            pixels = torch.zeros(1, 3, side, side)
            of_images = forward_flops(miniclip.CLIP(config).eval().visual, pixels) * count
        for what, amount in (("images", of_images), ("captions", flops - of_images)):
            made = {who: job(who, what == "images") for who in towers}
            self._race(f"{model} encoding, {count:,} {what}", made, count, amount)

    def gradcache(self, count: int) -> None:
        parts = count // self.amounts.part
        flops = 3 * model_flops(peers.architecture(MODELS[0], self.size), samples.captions(count))
        made = {OURS: self.job(OURS, MODELS[0], count, parts)}
        self._race(f"{MODELS[0]} GradCache, batch {count:,} in parts of {self.amounts.part:,}", made, count, flops)
        del made
        self.rows[-1][OURS]["peak_mb"] = self._peak_mb(OURS, MODELS[0], count, parts)

    def _race(self, case: str, jobs: dict[str, Job], count: int, flops: int) -> None:
        times, _, _ = harness.race({who: Job(job.run) for who, job in jobs.items()}, self.amounts.patience)
        row: dict[str, Any] = {"case": case}
        for who, timing in times.items():
            row[who] = {
                "seconds": timing.median,
                "spread": timing.spread,
                "per_second": count / timing.median,
                "utilisation": flops / timing.median / self.machine.flops,
            }
        self.rows.append(row)

    def _free(self) -> None:
        if self.where.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.where)
        else:
            harness.forget_peak()

    def _peak_mb(self, who: str, model: str, count: int, parts: int = 1) -> float:
        self._free()
        job = self.job(who, model, count, parts)
        job.run()
        job.run()
        if self.where.type == "cuda":
            return torch.cuda.max_memory_allocated(self.where) / 1e6
        return harness.resident_mb(peak=True)

    def _fits(self, who: str, model: str, count: int) -> bool:
        self._free()
        try:
            job = self.job(who, model, count)
            job.run()
            job.run()  # now with the optimiser's state there from the start
        except torch.OutOfMemoryError:
            return False
        return True

    def write(self, out: Path) -> None:
        facts = {"machine": dataclasses.asdict(self.machine), "versions": harness.versions(), "size": self.size}
        document = {**facts, "date": date.today().isoformat(), "compiled": self.compiles, "rows": self.rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out.with_suffix(".json"), json.dumps(document, indent=1) + "\n")
        write_text(out.with_suffix(".md"), page(document))


def page(document: dict[str, Any]) -> str:
    machine = document["machine"]
    head = ["case", "a second", THEIRS, "ratio", "utilisation", THEIRS, "peak MB", THEIRS, "largest batch", THEIRS]
    lines = [head, ["---"] * len(head)]
    agreement = ""
    for row in document["rows"]:
        if "difference" in row:
            agreement = f"{row['case']} differ by {row['difference']:.0e} of the largest number."
            continue
        ours, theirs = row[OURS], row.get(THEIRS, {})
        cells = [row["case"]]
        for name, form in (
            ("per_second", "{:,.0f}"),
            ("utilisation", "{:.1%}"),
            ("peak_mb", "{:,.0f}"),
            ("largest_batch", "{:,}"),
        ):
            cells += [form.format(side[name]) if name in side else "–" for side in (ours, theirs)]
        cells.insert(3, f"{theirs['seconds'] / ours['seconds']:.2f}" if theirs else "–")
        lines.append(cells)
    parts = [
        f"# {machine['processor']}",
        f"`python benchmarks/gpu.py{' --compile' if document['compiled'] else ''}`, {document['date']}; "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        + ".",
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
        f"bfloat16 under autocast, AdamW in one kernel on both sides. Utilisation is of {machine['flops'] / 1e12:.0f} "
        f"TFLOP/s ({machine['source']}), of what the towers have to compute: each text at its own length, backward "
        f"twice forward, nothing that is computed again. {agreement[:1].upper()}{agreement[1:]}",
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="all of it on the CPU, at tiny size")
    parser.add_argument("--compile", action="store_true", help="torch.compile for both sides' towers")
    parser.add_argument("--out", type=Path, help="where to write, without suffix; by default by the GPU's name")
    options = parser.parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU on this machine; --tiny goes through all of it on the CPU")
    where = torch.device("cpu" if options.tiny else "cuda")
    console = Console(file=sys.stdout)
    with tempfile.TemporaryDirectory() as place:
        amounts, size = (TINY, "tiny") if options.tiny else (FULL, "full")
        bench = Bench(where, amounts, size, Path(place), options.compile)
        out = options.out or (Path(place) if options.tiny else RESULTS) / bench.machine.name
        parts: list[tuple[str, Callable[[], Any]]] = [("agreement", bench.agreement)]
        for model in MODELS:
            parts.append((f"{model} steps", lambda model=model: bench.steps(model)))
            parts.append((f"{model} encoding", lambda model=model: bench.encoding(model)))
        parts += [(f"GradCache {count:,}", lambda count=count: bench.gradcache(count)) for count in amounts.cached]
        for name, part in parts:
            with console.status(name):
                is_well = part()
            console.print(f"{name}: {json.dumps(bench.rows[-1])}", highlight=False)
            bench.write(out)
            if is_well is False:
                console.print("[red]outputs differ[/red]; the comparison would be void")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
