"""`miniclip report RUN …`: the page of a run, or of several."""

from __future__ import annotations

import argparse
from pathlib import Path

from .terminal import new_parser


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "report",
        "Makes the page of a training run: curves of loss, accuracy, scores, rates, gradients, speed and memory over\n"
        "the samples seen, the numbers that they come to, what stands out, and the settings.\n\n"
        "Training makes it by itself when it ends; this makes it while a run is going on, or of one that was killed.\n"
        "Several runs are drawn over each other, with the settings in which they differ.",
        notes="RUN is the folder that training was given as trainer.default_root_dir.",
        examples="""
miniclip report runs/digits
miniclip report runs/adamw runs/muon --out compare.html""",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder")
    parser.add_argument("--out", metavar="HTML", help="the page; of one run RUN/report.html unless you name another")
    parser.add_argument("--overwrite", action="store_true", help="replace the page that --out names")
    return parser


def run(options: argparse.Namespace) -> None:
    if options.out is None and len(options.runs) > 1:
        raise ValueError("of several runs the page needs a name: --out HTML")
    if options.out and Path(options.out).exists() and not options.overwrite:
        raise ValueError(f"{options.out} exists already; pass --overwrite to replace it, or name another --out")

    from ..reports.run_page import write_page
    from ..reports.runs import PAGE_FILE

    out = options.out or Path(options.runs[0]) / PAGE_FILE
    write_page(out, options.runs)
    print(f"page: {out}")
