"""Contenders that take turns at the same work: medians with their spread, agreement, memory, and what bounds them.

A case is some work; a contender is a library that does it; a job is the work as one contender has prepared it. All jobs
of a case have the same weights, data and threads, run in turns in one process, and must give the same results, or the
comparison is void. Each contender's peak memory is measured in a process of its own, because memory that one leaves
behind would serve the next.
"""

from __future__ import annotations

import math
import os
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import LIMIT, MOST_DIFFERENCE, OURS, beside, precision
from machine import Machine, forget_peak, resident_mb
from rich.console import Console
from tables import reached, summary, write
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


class Job(NamedTuple):
    """Work that a contender has prepared.

    Args:
        run: the timed part.
        result: returns the output that must agree between contenders; by default the last return value of `run`.
        prepare: runs before each `run`, untimed.
        counted: the same work in this process, for counting operations where `run` starts a process.
    """

    run: Callable[[], Any]
    result: Callable[[], Any] | None = None
    prepare: Callable[[], Any] | None = None
    counted: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Case:
    """Some work, and the contenders for it.

    Args:
        name: its name on the command line.
        title: its name in the table.
        contenders: name -> a function that makes the job. Ours is "miniclip"; "limit" is work that nobody can avoid.
        targets: peer (or "best") -> how many times as fast as it ours should be.
        memory_target: the largest share of open_clip's peak memory that ours should take; measures peak memory.
        measures_memory: measures peak memory without a target.
        bytes_moved: bytes that a run must move besides the operands of matrix products, such as the optimiser's.
        is_slow: there is no warm-up, and there are few rounds.
        may_differ: contenders whose outputs are not expected to be equal; how far they are is reported.
        threads: a number of threads for this case alone.
        note: what a reader has to know beside the figures.
    """

    name: str
    title: str
    contenders: Mapping[str, Callable[[], Job]]
    targets: Mapping[str, float] = field(default_factory=dict)
    memory_target: float | None = None
    measures_memory: bool = False
    bytes_moved: float = 0
    is_slow: bool = False
    may_differ: Sequence[str] = ()
    threads: int | None = None
    note: str = ""


class Patience(NamedTuple):
    """How long to measure: at least `rounds`, then until `seconds` have passed, but no more than `most_rounds`."""

    rounds: int
    seconds: float = 0.0
    most_rounds: int = 50
    slow_rounds: int = 2


@dataclass
class Timing:
    """Seconds of each run, by the wall clock and by the processors; ended child processes count."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)

    @property
    def spread(self) -> float:
        """Half of the range."""
        return (max(self.wall) - min(self.wall)) / 2


def race(
    jobs: Mapping[str, Job], patience: Patience, is_slow: bool = False, tell: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, Timing], dict[str, Any], int]:
    """Runs the jobs in turns, and returns their times and results, and the operations of ours.

    Each round starts with another job. The first round is an untimed warm-up, in which the operations of ours are
    counted. Slow cases have no warm-up; unless there is a "limit", ours runs once more at the end for the count.
    """
    names = list(jobs)
    times = {name: Timing() for name in names}
    outputs: dict[str, Any] = {}
    flops, begin, turn = 0, time.perf_counter(), 0
    least, most = (patience.slow_rounds,) * 2 if is_slow else (patience.rounds, patience.most_rounds)
    while turn < least or (turn < most and time.perf_counter() - begin < patience.seconds):
        is_warm_up = turn == 0 and not is_slow and not outputs
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            tell(f"{name}, {'warming up' if is_warm_up else f'round {turn + 1}'}")
            job = jobs[name]
            if job.prepare is not None:
                job.prepare()
            wall, cpu = time.perf_counter(), _processor_seconds()
            if is_warm_up and name == OURS:
                flops, outputs[name] = count_flops(job.run)
            else:
                outputs[name] = job.run()
            if not is_warm_up:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(_processor_seconds() - cpu)
        if is_warm_up:
            begin = time.perf_counter()
        else:
            turn += 1
    if is_slow and OURS in jobs and LIMIT not in jobs:
        tell(f"{OURS}, counted")
        job = jobs[OURS]
        if job.prepare is not None:
            job.prepare()
        flops, _ = count_flops(job.counted or job.run)
    return times, {name: job.result() if job.result else outputs[name] for name, job in jobs.items()}, flops


def _processor_seconds() -> float:
    """Processor seconds of this process and of its ended children."""
    ended = os.times()
    return time.process_time() + ended.children_user + ended.children_system


def count_flops(run: Callable[[], Any]) -> tuple[int, Any]:
    """Operations of a run's matrix products, including attention on the CPU, and the run's output."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    aten = torch.ops.aten
    on_cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        output = run()
    return int(counter.get_total_flops()), output


def difference(found: Any, reference: Any) -> float:
    """The largest difference of tensors, or of dicts of them, as a share of the reference's largest number.

    For token ids it is the share of rows that differ. For anything else it is 0 if the two are equal, and infinite if
    not.
    """
    if isinstance(reference, Mapping):
        if not isinstance(found, Mapping) or found.keys() != reference.keys():
            return math.inf
        return max((difference(found[name], value) for name, value in reference.items()), default=0.0)
    if not isinstance(reference, torch.Tensor):
        return 0.0 if found == reference else math.inf
    if found.shape != reference.shape:
        return math.inf
    if not reference.is_floating_point():
        return (found.long() != reference.long()).reshape(len(reference), -1).any(dim=1).double().mean().item()
    share = ((found - reference).abs().max() / reference.abs().max()).item()
    return share if math.isfinite(share) else math.inf


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def memory_alone(case: Case, contender: str) -> float:
    """A contender's peak memory in MB, with weights and optimiser, above what imports take.

    The process must have imported everything and done nothing else.
    """
    forget_peak()
    before = resident_mb()
    job = case.contenders[contender]()
    for _ in range(1 if case.is_slow else 2):
        if job.prepare is not None:
            job.prepare()
        forget_peak()  # the peak is the last run's, without making the model and first allocations
        job.run()
    return resident_mb(peak=True) - before


def _memory(case: Case, alone: Sequence[str]) -> dict[str, float]:
    """Each contender's peak memory, from a command that prints what `memory_alone` returns."""
    names = [name for name in case.contenders if name != LIMIT]
    return {name: float(process(*alone, case.name, name).split()[-1]) for name in names}


def process(*command: str | Path) -> str:
    """The output of a process with as many threads as this one.

    Raises:
        RuntimeError: the process fails; the message ends with its last output.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(map(str, command))[-200:]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# A case, measured


def measure(
    case: Case,
    machine: Machine,
    patience: Patience,
    alone: Sequence[str] | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """A row of the results. `alone` is the command that measures a contender's memory, without case and contender."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(case.threads or threads)
        tell("made ready")
        jobs = {name: make() for name, make in case.contenders.items()}
        times, results, flops = race(jobs, patience, case.is_slow, tell)
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)
    compared = {name: difference(results[OURS], results[name]) for name in jobs if name not in (OURS, LIMIT)}
    ours = {name: beside(name, times) for name in compared}
    row: dict[str, Any] = {
        "title": case.title,
        "seconds": {name: t.median for name, t in times.items()},
        "spread": {name: t.spread for name, t in times.items()},
        "cpu_seconds": {name: t.cpu_median for name, t in times.items()},
        "rounds": len(times[OURS].wall),
        "beside": ours,
        "times_as_fast": {name: times[name].median / times[ours[name]].median for name in compared},
        "times_as_fast_cpu": {name: times[name].cpu_median / times[ours[name]].cpu_median for name in compared},
        "difference": compared if results[OURS] is not None else {},
        "agrees": all(
            value <= MOST_DIFFERENCE
            for name, value in compared.items()
            if not precision(name) and name not in case.may_differ
        ),
        "flops": flops,
        "limit_seconds": _limit(case, times, flops, machine),
        "targets": dict(case.targets),
        "memory_target": case.memory_target,
        "memory_mb": {},
        "note": case.note,
        "threads": used,
        "date": date.today().isoformat(),
    }
    if alone is not None and (case.measures_memory or case.memory_target):
        tell("memory")
        row["memory_mb"] = _memory(case, alone)
    row["reached"] = reached(row)
    return row


def _limit(case: Case, times: Mapping[str, Timing], flops: int, machine: Machine) -> float | None:
    """The least seconds that the machine needs: measured as "limit", or computed from operations and bytes."""
    if LIMIT in times:
        return times[LIMIT].median
    seconds = flops / machine.flops + case.bytes_moved / machine.bandwidth
    return seconds or None


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def run(
    cases: Sequence[Case],
    machine: Machine,
    patience: Patience,
    out: Path | None,
    size: str,
    alone: Sequence[str] | None = None,
    console: Console | None = None,
) -> bool:
    """Measures the cases, writes each row at once, and returns whether all cases worked and agreed."""
    console = console or Console()
    all_well = True
    for number, case in enumerate(cases, start=1):
        head = f"[{number}/{len(cases)}] {case.name}"
        with console.status(head) as status:
            begin = time.perf_counter()
            try:
                row = measure(case, machine, patience, alone, partial(_tell, status, head))
            except Exception:  # the other cases are still worth measuring
                console.print(f"{head}: [red]failed[/red]")
                console.print_exception(max_frames=4)
                all_well = False
                continue
        console.print(f"{head}, {time.perf_counter() - begin:.0f} s: {summary(row)}", highlight=False)
        if not row["agrees"]:
            apart = ", ".join(f"{name} by {value:.1e}" for name, value in row["difference"].items() if value)
            console.print(f"  [red]outputs differ[/red] from {apart}; at most {MOST_DIFFERENCE:g} is allowed")
            all_well = False
        if out is not None:
            write(out, machine, size, {case.name: row})
    return all_well


def _tell(status: Any, head: str, doing: str) -> None:
    status.update(f"{head}: {doing}")
