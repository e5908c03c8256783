"""`miniclip push MODEL owner/name`: a model and its card -> Hugging Face's hub."""

from __future__ import annotations

import argparse

from ..convert import add_hints, hints
from ..output import refuse_closed
from ..terminal import CHECKPOINTS, lasting_imports, new_parser


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "push",
        "Uploads a model to Hugging Face's hub in one commit, with a model card made from its run: data and\n"
        "counts, recipe, scores with intervals, threshold, limits. The files are verified before they are sent. A\n"
        "push that breaks off is repeated by the same command. `hf auth login` (or HF_TOKEN) says who you are.\n\n"
        + CHECKPOINTS,
        notes='The model comes back by miniclip.from_pretrained("owner/name"), or anywhere as hf-hub:owner/name.',
        examples="""
miniclip push runs/digits/best owner/digits --dry-run
miniclip push runs/digits/best owner/digits --license mit --thumbnails seven.png one.png
miniclip push runs/digits/best owner/digits-hf --to hf --private""",
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint")
    parser.add_argument("repository", metavar="owner/name", help="made if it is not there")
    parser.add_argument(
        "--to", default="native", choices=("native", "openclip", "hf"), help="whose library reads the files"
    )
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="DIR",
        help="what `miniclip eval --out` wrote, for the card; default: RUN/report of a model in RUN/best",
    )
    parser.add_argument("--license", metavar="ID", help="such as mit or cc-by-4.0; the card says if none is stated")
    parser.add_argument(
        "--thumbnails", nargs="+", default=[], metavar="IMAGE", help="pictures to publish, small and without metadata"
    )
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--overwrite", action="store_true", help="replace other files that the repository has")
    parser.add_argument("--dry-run", action="store_true", help="print the card and send nothing")
    add_hints(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    if options.dry_run:
        refuse_closed()
    with lasting_imports():
        from ...inference.card import card_for
        from ...inference.push import check_repository, push, thumbnail_names

    check_repository(options.repository)
    about = {"to": options.to, "results": options.results, "license": options.license, **hints(options)}
    if options.dry_run:
        print(
            card_for(options.model, options.repository, thumbnails=thumbnail_names(options.thumbnails), **about), end=""
        )
        return
    pushed = push(
        options.model,
        options.repository,
        thumbnails=options.thumbnails,
        private=options.private,
        overwrite=options.overwrite,
        **about,
    )
    size = sum(pushed.files.values()) / 1e6
    state = f"{len(pushed.files)} files, {size:.1f} MB" if pushed.is_new_commit else "it had all of them already"
    print(f"{pushed.url}: {state}. It loads as hf-hub:{options.repository}")
