"""`miniclip shards SRC OUT`: pairs -> shards, or an index for tars from elsewhere."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.wording import counted, some
from .terminal import new_parser, part_of_array, progress_bar

if TYPE_CHECKING:
    from ..data.reading.listed import Listed
    from ..data.reading.pair import Pairs
    from ..data.shard_index import Packed


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "shards",
        "Packs image-text pairs into shards, which training reads.\n\n"
        "SRC is one of\n"
        "  a folder           images, each with a .txt of the same name beside it, one caption a line\n"
        "  a table            .csv, .tsv, .jsonl, .json or .parquet with a column of images and one of captions;\n"
        "                     a folder or a pattern of Parquet files\n"
        "  COCO's captions    captions_train2017.json and the like; --images names the folder of the images\n"
        "  a datasets set     of Hugging Face: its folder, or hf-hub:owner/name\n"
        "  shards             to pack them again: resize, filter, hold out",
        notes="OUT gets 00000.tar … (webdataset), an index, and rejected.csv, which lists what was left out and why.\n"
        "The folder is called OUT.partial until it is complete; after an interruption the same command resumes.",
        examples="""
miniclip shards photos shards --resize 256 --val-fraction 0.05
miniclip shards pairs.csv titles --caption-column title --images photos
miniclip shards 'laion/{00000..00099}.tar' --index-only
miniclip shards 's3://bucket/laion/{00000..00999}.tar' laion_index --index-only --head 8""",
    )
    parser.add_argument("source", metavar="SRC", help="what to pack")
    parser.add_argument("out", metavar="OUT", nargs="?", help="folder to write; must not exist")
    add_reading_options(parser, "reading")
    write = parser.add_argument_group("writing")
    write.add_argument("--resize", type=int, metavar="PIXELS", help="shrink images to this short side")
    write.add_argument("--quality", type=int, default=95, help="JPEG quality of shrunk images, 1 to 95")
    write.add_argument("--upright", action="store_true", help="store pictures that EXIF turns as viewers show them")
    write.add_argument("--min-side", type=int, metavar="PIXELS", help="reject images with a shorter side")
    write.add_argument("--max-aspect", type=float, metavar="RATIO", help="reject images longer than this to 1")
    write.add_argument("--val-fraction", type=float, default=0.0, metavar="SHARE", help="hold out, into OUT/val")
    write.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="pairs in one tar")
    write.add_argument("--max-shard-size", type=_size, default="1GB", metavar="SIZE", help="as 500MB or 1GB")
    write.add_argument(
        "--part", type=part_of_array, default="1/1", metavar="I/N", help="for job arrays: part I of N, every N-th shard"
    )
    write.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="threads that decode")
    write.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: the actors of a Ray cluster (RAY_ADDRESS), or of this machine, instead of --workers",
    )
    write.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    write.add_argument("--drop", metavar="LIST", help="leave out the pairs of a table with a column key, as doctor's")
    write.add_argument(
        "--groups", metavar="FILE", help="a table with the columns key and group, as doctor's: put it in"
    )
    index = parser.add_argument_group("indexing")
    index.add_argument("--index-only", action="store_true", help="SRC holds tars: write their index")
    index.add_argument(
        "--head",
        type=int,
        metavar="N",
        help="begin with the first N tars, read without their pictures; without it the same command adds the others "
        "and all checksums",
    )
    return parser


def run(options: argparse.Namespace) -> None:
    if options.head is not None and not options.index_only:
        raise ValueError("--head is for --index-only: the first tars, by their headers")
    if options.index_only:
        _refuse_changes(options)
        _index(options)
    elif options.out is None:
        raise ValueError("OUT is missing: the folder to write")
    else:
        _pack(options)


def _refuse_changes(options: argparse.Namespace) -> None:
    for name in ("drop", "groups", "resize", "min_side", "max_aspect", "val_fraction", "upright"):
        if getattr(options, name):
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} is for packing, and --index-only leaves tars as they are; pack them anew: SRC OUT"
            )
    if options.engine != "local":
        raise ValueError("--engine is for packing; several machines index tars with --part")


def add_reading_options(parser: argparse.ArgumentParser, title: str) -> None:
    """The options that `pairs_asked_for` reads."""
    read = parser.add_argument_group(title)
    read.add_argument("--images", metavar="FOLDER", help="the root of a table's paths; default: its own folder")
    read.add_argument("--image-column", metavar="NAME", help="a table's column of images, if its name is unusual")
    read.add_argument(
        "--caption-column",
        metavar="NAME",
        action="append",
        default=[],
        help="a table's column of captions; repeatable",
    )
    read.add_argument("--split", metavar="NAME", help="the part to read; default: train, of a source that has several")


def pairs_asked_for(source: str, options: argparse.Namespace) -> Pairs:
    """The pairs of a source. Prints what was recognised and what is left out."""
    from ..data.open_pairs import open_pairs
    from ..data.reading.scan import summary

    pairs = open_pairs(
        source,
        images=options.images,
        image_column=options.image_column,
        caption_columns=options.caption_column,
        split=options.split,
    )
    print(f"{source}: {pairs.found}", file=sys.stderr)
    if left_out := summary(pairs.left_out):
        print(left_out, file=sys.stderr)
    return pairs


def without_dropped(pairs: Pairs, options: argparse.Namespace) -> tuple[Pairs, Mapping[str, int]]:
    """The pairs that --drop does not name, and how many it does, by reason. Prints which of its rows name none."""
    from ..data.reading.listed import rows_about, without_listed

    if options.drop is None:
        return pairs, {}
    listed = rows_about(pairs, options.drop, options.source)
    _print_unmatched(listed, options.drop, options.source)
    return without_listed(pairs, listed)


def grouped(pairs: Pairs, options: argparse.Namespace) -> Pairs:
    """The pairs with the groups of --groups. Prints how many are in how many."""
    from ..data.reading.cells import has_no_value, words_for_no_value
    from ..data.reading.listed import rows_about, with_groups

    if options.groups is None:
        return pairs
    listed = rows_about(pairs, options.groups, options.source, "group")
    _print_unmatched(listed, options.groups, options.source)
    cells = [row["group"] for row in listed.rows.values()]
    groups = [cell for cell in cells if not has_no_value(cell)]
    words = f"; in no group are those of {told}" if (told := words_for_no_value(cells)) else ""
    in_groups = counted(len(set(groups)), "group")
    print(
        f"{len(groups):,} of {len(pairs):,} pairs are in {in_groups}, by {options.groups}{words}",
        file=sys.stderr,
    )
    return with_groups(pairs, listed, options.groups)


def _print_unmatched(listed: Listed, table: str, source: str) -> None:
    if listed.unmatched:
        named = f"name{'s' * (len(listed.unmatched) == 1)} no pair of {source}: {some(listed.unmatched)}"
        print(f"{len(listed.unmatched):,} of the rows of {table} {named}", file=sys.stderr)
    if listed.elsewhere:
        others = ", ".join(f"{about} ({count:,})" for about, count in listed.elsewhere.items())
        print(f"rows of {table} about other sources: {others}", file=sys.stderr)


def _index(options: argparse.Namespace) -> None:
    from ..data.indexing.index_tars import index_shards, tar_locations
    from ..data.shard_index import REJECTED_FILE

    tars, (part, parts) = tar_locations(options.source), options.part
    own = len(tars[: options.head][part - 1 :: max(1, parts)])
    with progress_bar("indexing", own) as progress:
        done = index_shards(
            options.source, options.out, options.overwrite, progress, part=options.part, head=options.head
        )
    folder = options.out or options.source
    if done.missing:
        print(f"part {part} of {parts} is done; the index comes when {done.missing} tars more are")
        return
    if done.damaged:
        total, are = done.shards + len(done.damaged), "is" if len(done.damaged) == 1 else "are"
        print(
            f"{len(done.damaged)} of {total} tars {are} damaged and not in the index:\n  "
            + "\n  ".join(done.damaged)
            + "\nOnce they are replaced, the same command adds them.",
            file=sys.stderr,
        )
    where = Path(options.out or tars[0])
    where = (where if options.out else where.parent) / REJECTED_FILE
    left_out = f"; {counted(done.left_out, 'member')} left out, see {where}" if done.left_out else ""
    samples = f"{counted(done.kept, 'sample')} in {counted(done.shards, 'shard')}"
    print(f"{folder}: {samples}, {done.size_bytes / 1e6:.1f} MB{left_out}")
    if options.head is not None:
        print(_what_was_read(done, len(tars)))


def _what_was_read(done: Packed, num_tars: int) -> str:
    """How an index by headers came about, and what it lacks."""
    read = f"{done.bytes_read / 1e6:.2f} MB were read in {done.num_requests:,} requests"
    read += f"; the pictures of {done.unverified} shards have no checksums. " if done.unverified else ". "
    indexed = done.shards + len(done.damaged)
    rest = f"the other {num_tars - indexed:,} tars" if num_tars > indexed else "checksums"
    return f"{read}The same command without --head adds {rest}."


def _pack(options: argparse.Namespace) -> None:
    from ..data.pack import pack
    from ..data.sample_files import Packing
    from ..data.shard_index import REJECTED_FILE

    pairs, dropped = without_dropped(grouped(pairs_asked_for(options.source, options), options), options)
    packing = Packing(
        samples_per_shard=options.samples_per_shard,
        max_shard_bytes=options.max_shard_size,
        resize=options.resize,
        quality=options.quality,
        min_side=options.min_side,
        max_aspect=options.max_aspect,
        val_fraction=options.val_fraction,
        upright=options.upright,
    )
    with progress_bar("packing", -(-len(pairs) // max(1, options.part[1]))) as progress:
        packed = pack(
            pairs,
            options.out,
            source=options.source,
            packing=packing,
            part=options.part,
            workers=options.workers,
            overwrite=options.overwrite,
            use_ray=options.engine == "ray",
            progress=progress,
        )
    if packed.missing:
        print(
            f"part {options.part[0]} of {options.part[1]} is done; {options.out} comes when {packed.missing} more are"
        )
        return
    held_out = f" and {packed.held_out} held out" if packed.held_out else ""
    num_dropped = sum(dropped.values())
    reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
    left_out = f", {num_dropped} dropped ({reasons})" if dropped else ""
    left_out += f", {packed.left_out - num_dropped} left out" if packed.left_out > num_dropped else ""
    turned = f"; {packed.turned} turned upright" if options.upright else ""
    listed = f", see {Path(options.out) / REJECTED_FILE}" if packed.rejected or packed.left_out else ""
    print(
        f"{options.out}: {counted(packed.kept, 'pair')}{held_out} in {counted(packed.shards, 'shard')}, "
        f"{packed.size_bytes / 1e6:.1f} MB{turned}; {packed.rejected} rejected{left_out}{listed}"
    )


def _size(text: str) -> int:
    """Bytes from 500MB, 1GB or a plain number."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    unit = text[-2:].upper()
    try:
        return int(float(text[:-2]) * units[unit]) if unit in units else int(text)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB or 1GB") from error
