"""`miniclip doctor PAIRS…`: what is wrong with pairs, each finding counted, priced, shown and listed."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.wording import printable
from .shards import add_reading_options, pairs_asked_for
from .terminal import add_cache, add_device, console, lasting_imports, new_parser, progress_bar

if TYPE_CHECKING:
    from ..data.reading.pair import Pairs
    from ..inference.doctor.examine import Diagnosis
    from ..inference.doctor.parts import Source

_USUAL_IMAGE_SIZE = 224  # CLIP's, pixels


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "doctor",
        "Looks at every pair and reports what would harm training or make its scores untrue: pictures of validation\n"
        "and test in train, near duplicates, captions that say nothing or are of many pictures, that name each other,\n"
        "or are of another language; pictures that are blank, tiny, blurred or turned. With --model also captions\n"
        "that do not fit their picture, and pictures that fit when they are turned.\n\n"
        "PAIRS is whatever `miniclip shards` packs: a folder, a table, a data set of Hugging Face's, shards.",
        notes="OUT gets doctor.html, findings.csv (all), drop.csv (the pairs to drop), groups.csv (the pairs that\n"
        "should share a target) and sources.csv. Only what is certain is in drop.csv: leak, copy, blank,\n"
        "junk-caption. All else is a suspicion, and there if --drop-reasons names it. Nothing is changed or\n"
        "deleted: `miniclip shards PAIRS SHARDS --drop OUT/drop.csv` packs the rest.",
        examples="""
miniclip doctor photos --out doctored
miniclip doctor photos --val my_photos --test street_scenes --out checked --drop-reasons certain,near-leak
miniclip doctor pairs.csv --images photos --model runs/digits/best --image-size 28""",
    )
    parser.add_argument("pairs", nargs="+", metavar="PAIRS", help="what is trained on")
    parser.add_argument("--val", action="append", default=[], metavar="IMAGES", help="the validation set; repeatable")
    parser.add_argument("--test", action="append", default=[], metavar="IMAGES", help="a test set; repeatable")
    parser.add_argument("--out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace the files of doctor's in OUT")
    parser.add_argument(
        "--drop-reasons", default="certain", metavar="A,B", help="what enters drop.csv: reasons, certain, all or none"
    )
    look = parser.add_argument_group("looking")
    look.add_argument("--model", metavar="MODEL", help="judges how captions fit: a trained one, or any that eval takes")
    look.add_argument(
        "--near", type=float, default=0.985, metavar="LIKENESS", help="from which pictures are near duplicates, to 1"
    )
    look.add_argument("--batch-size", type=int, default=256, metavar="B", help="of the training that is planned")
    look.add_argument(
        "--image-size", type=int, metavar="PIXELS", help="side of its input; default: the model's, or 224"
    )
    look.add_argument("--seed", type=int, default=0, help="draws the pairs that others are compared with")
    look.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="threads, or processes, that decode"
    )
    add_device(look)
    add_cache(parser)
    add_reading_options(parser, "reading PAIRS")
    return parser


def run(options: argparse.Namespace) -> None:
    _make_out(options)
    with lasting_imports():
        from ..evaluation.features import open_cache
        from ..evaluation.other_libraries import open_model
        from ..inference.doctor.examine import examine
        from ..inference.doctor.findings import chosen_reasons

    given = {"--val": options.val, "--test": options.test, "--model": options.model}
    reasons = chosen_reasons(options.drop_reasons, [name for name, value in given.items() if value])
    pairs = {source: pairs_asked_for(source, options) for source in dict.fromkeys(options.pairs)}
    sources = _parts_named(pairs, options)
    model = open_model(options.model, options.device, options.precision) if options.model else None
    found = examine(
        sources,
        model=model,
        image_size=options.image_size or getattr(getattr(model, "preprocess", None), "image_size", _USUAL_IMAGE_SIZE),
        batch_size=options.batch_size,
        near=options.near,
        seed=options.seed,
        workers=options.workers,
        cache=open_cache(options.cache, not options.no_cache) if model else None,
        fingerprint=_fingerprint(pairs),
        progress=progress_bar,
    )
    _show(found, reasons, options)


def _make_out(options: argparse.Namespace) -> None:
    """Makes OUT, so that what can't be written is refused before the work."""
    if options.out is None:
        return
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if out.exists() and any(out.iterdir()) and not options.overwrite:
        raise ValueError(
            f"{out} exists already; pass --overwrite to replace doctor's files in it, or name another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"nothing can be written into {out}")


def _parts_named(pairs: dict[str, Pairs], options: argparse.Namespace) -> list[Source]:
    from ..inference.doctor.parts import TEST, VAL, of_images, of_pairs
    from ..inference.sources import image_set

    found = [of_pairs(name, each) for name, each in pairs.items()]
    for part, named in ((VAL, options.val), (TEST, options.test)):
        for name in dict.fromkeys(named):
            images = image_set(name, split=part)
            if name in pairs and len(pairs[name]) + len(images) > len(image_set(name)):
                raise ValueError(f"{name} is named as PAIRS and as --{part}; every picture would be a leak")
            found.append(of_images(part, name, images))
    return found


def _fingerprint(pairs: dict[str, Pairs]) -> str:
    from ..data.reading.pair import fingerprint

    return " ".join(fingerprint(each, is_of_disk=True) for each in pairs.values())


def _show(found: Diagnosis, reasons: tuple[str, ...], options: argparse.Namespace) -> None:
    from rich.markup import escape
    from rich.table import Table

    from ..inference.doctor import lists
    from ..inference.doctor.page import notes_of, tables_of, write_page

    tables = tables_of(found, reasons, options.batch_size)
    if options.out:
        out = Path(options.out)
        lists.write_sources(out, found)
        lists.write_findings(out, found)
        dropped = lists.write_drop(out, found, reasons)
        groups = lists.write_groups(out, found)
        with progress_bar("writing the page", 1) as report:
            write_page(out / lists.PAGE_FILE, found, tables)
            report(1)
    for title, (header, *rows) in tables.items():
        table = Table(title=title, title_justify="left")
        for name in header:
            table.add_column(escape(name))
        for row in rows:
            table.add_row(*(escape(printable(cell)) for cell in row))
        console().print(table)
    for sentence in notes_of(found):
        print(f"- {sentence}.")
    if options.model is None and options.image_size is None and {"tiny", "blurred"} & set(found.counts()):
        print(f"- tiny and blurred are for a model of {_USUAL_IMAGE_SIZE} pixels; --image-size names that of yours.")
    if not found.findings:
        print("- nothing was found" + (" in those that can be used." if found.looked.problems else "."))
    if options.out:
        print(f"{out / lists.DROP_FILE}: {dropped:,} pairs to drop ({', '.join(reasons) or 'no reason was named'})")
        print(f"{out / lists.GROUPS_FILE}: {groups:,} groups; {out / lists.FINDINGS_FILE}: all findings")
        print(f"page: {out / lists.PAGE_FILE}")
    elif found.dropped(reasons):
        print("With --out FOLDER all findings, the pairs to drop and a page are written.", file=sys.stderr)
