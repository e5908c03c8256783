"""Speed and memory of miniclip beside open_clip, transformers and OpenAI's own package.

    python benchmarks/run.py [CASE …] [--quick]

Beside them stand OpenVINO, ONNX Runtime and two tokenizers in Rust. Writes benchmarks/results/MACHINE.md and .json,
case by case; the cases that run replace their rows there. CASE is a name, the beginning of several ("image"), or words
of some ("tokenizer-warm"). `--quick` has smaller batches and fewer rounds, takes about five minutes, and writes to
MACHINE-quick. The exit status is not 0 if outputs disagree or a case fails.

cases:
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences its warning about forked processes
if "OMP_WAIT_POLICY" not in os.environ:  # our commands set both; here they hold for all contenders
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import harness
import inference
import steps
import tables
import torch
import transformers
from machine import this_machine
from rich.console import Console

RESULTS = Path(__file__).parent / "results"
PATIENCE = {
    "full": harness.Patience(rounds=5, seconds=10),
    "quick": harness.Patience(rounds=2, seconds=1, most_rounds=10),
    "tiny": harness.Patience(rounds=1, slow_rounds=1, most_rounds=1),
}


def cases(size: str, folder: Path) -> list[harness.Case]:
    return [*inference.cases(size, folder), *steps.cases(size, folder)]


def chosen(every: list[harness.Case], names: list[str]) -> list[harness.Case]:
    """The cases that `names` mean, in the order in which they stand; all of them without names.

    Raises:
        ValueError: no case has such a name.
    """
    meant = set[str]()
    for name in names:
        found = _meant(name, [case.name for case in every])
        if not found:
            raise ValueError(
                f"no case is, begins with or has the words of {name!r}; "
                f"there are {', '.join(case.name for case in every)}"
            )
        meant |= set(found)
    return [case for case in every if not names or case.name in meant]


def _meant(name: str, every: list[str]) -> list[str]:
    """The case of that name; else those that begin with it; else those that have all of its words."""
    words = set(name.split("-"))
    return (
        [one for one in every if one == name]
        or [one for one in every if one.startswith(name)]
        or [one for one in every if words <= set(one.split("-"))]
    )


def main(argv: list[str] | None = None) -> int:
    with tempfile.TemporaryDirectory() as nothing:
        described = "\n".join(f"  {case.name:26}{case.title}" for case in cases("full", Path(nothing)))
    parser = argparse.ArgumentParser(
        description=__doc__ + described, formatter_class=argparse.RawDescriptionHelpFormatter, prog="run.py"
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="all, if none is named")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="size", action="store_const", const="quick", default="full")
    size.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="to try that all works")
    parser.add_argument("--threads", type=int, help="of each contender; by default what torch takes")
    parser.add_argument("--out", type=Path, help="where to write, without suffix; by default by machine and size")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--alone", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.threads is not None:
        if options.threads < 1:
            parser.error(f"--threads is {options.threads}; it must be at least 1")
        torch.set_num_threads(options.threads)
    if options.alone:
        name, contender = options.alone
        (case,) = [case for case in cases(options.size, options.folder) if case.name == name]
        print(harness.memory_alone(case, contender))
        return 0
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder or Path(place)
        try:
            wanted = chosen(cases(options.size, folder), options.cases)
        except ValueError as error:
            parser.error(str(error))
        machine = this_machine()
        out = options.out
        if out is None and options.size != "tiny":
            out = RESULTS / (machine.name + ("" if options.size == "full" else f"-{options.size}"))
        if out is not None and (other := tables.other_processor(out, machine)):
            parser.error(f"{out}.json has figures of {other!r}, and this is {machine.processor!r}; name another --out")
        alone = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--folder", str(folder)]
        alone += [*([] if options.size == "full" else [f"--{options.size}"]), "--alone"]
        console = Console(file=sys.stdout)
        is_well = harness.run(wanted, machine, PATIENCE[options.size], out, options.size, alone, console)
        if out is not None:
            console.print(f"written: {out.with_suffix('.md')} and {out.with_suffix('.json')}", highlight=False)
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
