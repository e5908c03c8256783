"""`miniclip index SRC INDEX`: pictures -> an index that `miniclip search` asks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..output import MODELS, add_output, note, note_left_out, note_unreadable, results
from ..terminal import add_encoding, add_upright, lasting_imports, new_parser, progress_bar, refuse_bad_encoding

if TYPE_CHECKING:
    from ...inference.search.updating import Updated

_MOST_NAMED = 5


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "index",
        "Makes an index of pictures, or brings it up to date: run it again, and pictures that are new, changed, moved\n"
        "or gone are found; the new and the changed ones alone are encoded. Killed at any moment, the index is right,\n"
        "and the next run goes on.\n\n"
        "SRC is a folder, a quoted pattern ('photos/**/*.jpg'), a table with a column of images (.csv, .jsonl,\n"
        ".parquet; its other columns can be searched with --where), shards, URLs, or - for names by standard input.\n"
        "Several make one index, and each is brought up to date by itself.\n"
        "INDEX is a folder, or s3://bucket/name with AWS's variables; it remembers its model and --upright.\n\n"
        + MODELS,
        notes="Pictures are gone when SRC no longer has them. If more than half of them are, the command changes\n"
        "nothing and asks for --accept-gone, because a disk that is not mounted looks the same.",
        examples="""
miniclip index photos photos.index --model ViT-B/32
miniclip index photos photos.index
miniclip index photos photos.index --dry-run
miniclip index birds.parquet birds.index --model ViT-B/32 --dtype float16
find photos -name '1*.png' | miniclip index - photos.index
miniclip index 'laion/{00000..00099}.tar' laion.index --model openclip:ViT-B-32/laion2b_s34b_b79k --approximate 0.95""",
    )
    parser.add_argument("sources", metavar="SRC", nargs="+", help="pictures, as above")
    parser.add_argument("index", metavar="INDEX", help="a folder or an s3:// URL")
    parser.add_argument("--model", metavar="MODEL", help="as above; needed once, to make the index")
    parser.add_argument("--dry-run", action="store_true", help="print what an update would do, and change nothing")
    parser.add_argument("--accept-gone", action="store_true", help="let go of more than half of SRC's pictures")
    parser.add_argument("--column", metavar="NAME", help="a table's column of images; default: found by name")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="of a new index's features")
    parser.add_argument(
        "--approximate",
        type=float,
        metavar="RECALL",
        help="build an approximate index of at least this recall (0.95, say), measure it, and search with it from then "
        "on; it pays from some 100,000 pictures",
    )
    add_encoding(parser)
    add_upright(parser)
    add_output(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    refuse_bad_encoding(options)
    if options.approximate is not None and not 0 < options.approximate <= 1:
        raise ValueError(f"--approximate is {options.approximate:g}; it is a share, above 0 and at most 1, as 0.95")
    if options.approximate is not None and options.dry_run:
        raise ValueError("--dry-run changes nothing, and --approximate builds an index; give one of them")
    with lasting_imports():
        from ...inference.search.index import Index
    with results(options, {"pictures": str, "count": int}, is_all=options.dry_run) as write:
        opened = {"device": options.device, "precision": options.precision, "upright": options.upright or None}
        index = Index(options.index, options.model, **opened)
        updated = index.update(
            options.sources,
            dry_run=options.dry_run,
            accept_gone=options.accept_gone,
            dtype=options.dtype,
            image_column=options.column,
            batch_size=options.batch_size,
            num_workers=options.workers,
            progress=progress_bar,
        )
        for name in ("new", "changed", "moved", "touched", "gone", "unchanged"):
            write({"pictures": name, "count": getattr(updated, name)})
    _note(updated, options.dry_run)
    if options.approximate is not None:
        note(str(index.build_approximate(options.approximate)))


def _note(updated: Updated, is_dry: bool) -> None:
    note_left_out(updated.left_out)
    for sentence in updated.renamed:
        note(f"note: {sentence}")
    note_unreadable(updated.problems, updated.new + updated.changed + len(updated.problems))
    for key in updated.unreachable[:_MOST_NAMED]:
        note(f"stays in the index, and can't be looked at now: {key}")
    if len(updated.unreachable) > _MOST_NAMED:
        note(f"and {len(updated.unreachable) - _MOST_NAMED:,} more that can't be looked at now")
    if is_dry:
        note("nothing was changed (--dry-run)")
