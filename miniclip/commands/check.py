"""`miniclip check DATA`: a quick look at pairs before training."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .shards import add_reading_options, pairs_asked_for
from .terminal import console, lasting_imports, new_parser, progress_bar


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "check",
        "Examines a random sample of image-text pairs and reports what training on them would meet: unreadable files,\n"
        "sizes of images, lengths of captions, repeated captions and images with their effect on the loss, and how\n"
        "many images/s a worker can feed.\n\n"
        "DATA is shards (a folder, a pattern as 'data/{00000..00009}.tar', a URL), or anything that `miniclip shards`\n"
        "packs: a folder, a table, COCO's captions, a Hugging Face data set.",
        notes="Only the page of --out is written. The exit status is 1 if no sample can be used.",
        examples="""
miniclip check photos --out check.html
miniclip check shards/train --all --batch-size 1024 --needed 900
miniclip check shards/train --speed --workers 4""",
    )
    parser.add_argument("data", metavar="DATA", help="shards, or what can be packed into them")
    parser.add_argument("--out", metavar="HTML", help="write a page with all findings and some samples")
    parser.add_argument("--overwrite", action="store_true", help="replace that page")
    parser.add_argument("--samples", type=int, default=2000, metavar="N", help="pairs to examine")
    parser.add_argument("--all", action="store_true", help="examine every pair")
    parser.add_argument("--seed", type=int, default=0, help="chooses the pairs that are examined")
    plan = parser.add_argument_group("the training that is planned")
    plan.add_argument("--batch-size", type=int, default=256, metavar="B", help="pairs contrasted with each other")
    plan.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="side of the model's input")
    plan.add_argument("--context-length", type=int, default=77, metavar="TOKENS", help="most tokens of a text")
    plan.add_argument(
        "--needed",
        type=float,
        metavar="IMAGES_PER_S",
        help="images/s that the model consumes",
    )
    speed = parser.add_argument_group("speed")
    speed.add_argument("--speed", action="store_true", help="time the input pipeline alone, stage by stage (shards)")
    speed.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="threads that examine; processes for --speed"
    )
    add_reading_options(parser, "reading pairs that are not packed")
    return parser


def run(options: argparse.Namespace) -> None:
    if options.out and Path(options.out).exists() and not options.overwrite:
        raise ValueError(f"{options.out} exists already; pass --overwrite to replace it, or name another --out")
    with lasting_imports():
        from ..data.advice import advice
        from ..data.open_pairs import is_shards
        from ..data.pipeline_speed import time_pipeline
        from ..data.preflight import examine
        from ..data.shards import Shards
        from ..reports.preflight_page import tables, write_html

    packed = is_shards(options.data)
    if options.speed and not packed:
        raise ValueError(f"--speed times how shards are read, and {options.data} is not packed; use `miniclip shards`")
    pairs = pairs_asked_for(options.data, options)
    samples = None if options.all else options.samples
    with progress_bar("examining", min(len(pairs), samples or len(pairs))) as progress:
        findings = examine(
            pairs,
            source=options.data,
            samples=samples,
            image_size=options.image_size,
            context_length=options.context_length,
            batch_size=options.batch_size,
            needed=options.needed,
            seed=options.seed,
            workers=options.workers,
            progress=progress,
        )
    pipeline = None
    if options.speed:
        pipeline = time_pipeline(
            Shards(options.data, split=options.split or "train"),
            image_size=options.image_size,
            context_length=options.context_length,
            workers=options.workers,
            seed=options.seed,
        )
    for table in tables(findings, pipeline):
        console().print(table)
    for sentence in advice(findings):
        print(f"- {sentence}.")
    if options.out:
        write_html(options.out, findings, pipeline)
        print(f"page: {options.out}")
    if not findings.num_usable:
        raise SystemExit(1)
