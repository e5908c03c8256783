"""`miniclip embed SRC OUT`: images or texts -> files of embeddings."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING

from ...common.files import expand_home
from ...common.storage import is_url
from ...common.wording import counted, printable
from ..output import MODELS, add_model, note_left_out
from ..terminal import (
    add_encoding,
    add_upright,
    lasting_imports,
    new_parser,
    part_of_array,
    progress_bar,
    refuse_bad_encoding,
)

if TYPE_CHECKING:
    from ...inference.embedding.parts import Embedded


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "embed",
        "Writes a model's embeddings of images or texts into files, for search, clustering and training on them.\n\n"
        "SRC is a folder of images, a table, shards, a data set of Hugging Face's, a quoted pattern, a URL, or - for\n"
        "names by standard input; with --texts, a file with one text a line, a table, or the captions of shards.\n\n"
        + MODELS,
        notes="OUT gets part-00000.parquet … with the columns key, path (or text), those of the source, and embedding\n"
        "(of length 1); pyarrow, pandas and DuckDB read the folder as one table. _manifest.json says what the\n"
        "embeddings were computed from, _left_out.csv what could not be read. Until all is done it is called\n"
        "OUT.partial; after a break the same command goes on where it was.",
        examples="""
miniclip embed photos photo_embeddings --model ViT-B/32
miniclip embed captions.csv text_embeddings --model runs/digits/best --texts --column title
find photos -name '*.jpg' | miniclip embed - some --model openclip:ViT-B-32/laion2b_s34b_b79k --dtype float16
miniclip embed 'laion/{00000..00099}.tar' laion_embeddings --model ViT-L/14 --layout clip-retrieval
miniclip embed photos photo_embeddings --model ViT-B/32 --part 3/8
torchrun --nproc_per_node 8 -m miniclip embed photos photo_embeddings --model ViT-L/14""",
    )
    parser.add_argument("source", metavar="SRC", help="images or texts, as above")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    add_model(parser)
    parser.add_argument("--texts", action="store_true", help="embed texts instead of images")
    parser.add_argument(
        "--column",
        metavar="NAME",
        action="append",
        default=[],
        help="a table's column of images or texts, if it is not found by name; of texts, several may be given",
    )
    write = parser.add_argument_group("writing")
    write.add_argument(
        "--layout", choices=("parquet", "clip-retrieval"), default="parquet", help="how files are laid out"
    )
    write.add_argument("--dtype", choices=("float32", "float16"), help="default: float32; clip-retrieval's: float16")
    write.add_argument(
        "--rows-per-file",
        type=int,
        default=10_000,
        metavar="N",
        help="rows of SRC in a file; a break costs at most one",
    )
    write.add_argument(
        "--part",
        type=part_of_array,
        default="1/1",
        metavar="I/N",
        help="for job arrays: every N-th file, from the I-th on",
    )
    write.add_argument("--overwrite", action="store_true", help="replace embeddings of other data or another model")
    add_encoding(parser)
    add_upright(parser)
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: the actors of a Ray cluster (RAY_ADDRESS), or of this machine, instead of --workers and --device",
    )
    return parser


def run(options: argparse.Namespace) -> None:
    rank, num_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    _refuse_bad_options(options, num_processes)
    with lasting_imports():
        from ...evaluation.other_libraries import open_model
        from ...inference.embedding.embed import embed_source
        from ...inference.embedding.source_rows import columns_left_out
        from ...inference.sources import image_set, text_set

    column, columns = next(iter(options.column), None), options.column
    data = (
        text_set(options.source, text_columns=columns)
        if options.texts
        else image_set(options.source, image_column=column, upright=options.upright)
    )
    if rank == 0:
        note_left_out([*data.left_out, *columns_left_out(data)])
    part, parts = options.part
    device = "cpu" if options.engine == "ray" else _own_gpu(options.device) if num_processes > 1 else options.device
    encoder = open_model(options.model, device, options.precision)
    own = len(range(0, len(data), max(1, parts * num_processes)))
    with progress_bar("embedding", own) if rank == 0 else nullcontext() as progress:
        done = embed_source(
            data,
            encoder,
            options.out if is_url(options.out) else expand_home(options.out),
            source=options.source,
            layout=options.layout,
            dtype=options.dtype,
            rows_per_file=options.rows_per_file,
            part=((part - 1) * num_processes + rank + 1, parts * num_processes),
            overwrite=options.overwrite,
            batch_size=options.batch_size,
            num_workers=options.workers,
            use_ray=options.engine == "ray",
            progress=progress,
        )
    if done.is_last or (not done.missing and (num_processes == 1 or (done.was_there and rank == 0))):
        print(_sentence(done))
    elif num_processes == 1:
        print(f"part {part} of {parts} is done; {done.out} comes when {done.missing} of {done.files} files more are")


def _refuse_bad_options(options: argparse.Namespace, num_processes: int) -> None:
    refuse_bad_encoding(options)
    if options.rows_per_file < 1:
        raise ValueError(f"--rows-per-file is {options.rows_per_file}; it must be at least 1")
    part, parts = options.part
    if not 1 <= part <= parts:
        raise ValueError(f"--part is {part}/{parts}; it goes from 1/{parts} to {parts}/{parts}")
    if options.texts and options.upright:
        raise ValueError("--upright turns images, and --texts embeds texts")
    if options.column[1:] and not options.texts:
        raise ValueError(f"--column has {len(options.column)} names; images are in one column (--texts reads several)")
    if num_processes > 1 and options.engine == "ray":
        raise ValueError("--engine ray starts its own processes; run it without torchrun")
    if num_processes > 1 and options.source == "-":
        raise ValueError("several processes can't share standard input; write the names into a file, one a line")


def _own_gpu(device: str | None) -> str | None:
    """The GPU of this one of torchrun's processes."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device != "cpu" and torch.cuda.is_available() else device


def _sentence(done: Embedded) -> str:
    from ...inference.embedding.parts import LEFT_OUT_FILE

    size = f"{done.size_bytes / 1e6:.1f} MB" if done.size_bytes >= 50_000 else f"{done.size_bytes / 1e3:.0f} kB"
    counts = f"{counted(done.kept, 'embedding')} in {counted(done.files, 'file')}, {size}"
    out_of = {"could not be read": done.unreadable, "left out": done.left_out}
    missed = ", ".join(f"{count:,} {what}" for what, count in out_of.items() if count)
    listed = f"; {missed}, see {done.out / LEFT_OUT_FILE}" if missed else ""
    return printable(f"{done.out}: {counts}{listed}{' (were there already)' if done.was_there else ''}")
