"""`miniclip convert SRC DST --to FORMAT`: a checkpoint -> another library's layout, verified."""

from __future__ import annotations

import argparse

from .terminal import CHECKPOINTS, lasting_imports, new_parser


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "convert",
        "Writes a checkpoint in another library's layout, then loads it back (with that library, too, where it is\n"
        "installed) and compares embeddings before it reports success.\n\n" + CHECKPOINTS,
        examples="""
miniclip convert ViT-B/32 clip --to hf
miniclip convert runs/digits/best digits.pt --to openai
miniclip convert epoch_32.pt clip --to native --activation gelu""",
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint")
    parser.add_argument("out", metavar="DST", help="a file for openai, a folder for the others")
    parser.add_argument("--to", required=True, choices=("native", "openai", "openclip", "hf"), help="the layout")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    add_unknowns(parser)
    return parser


def add_unknowns(parser: argparse.ArgumentParser) -> None:
    """What a bare state dict may leave open."""
    parser.add_argument("--activation", choices=("gelu", "quick_gelu"), help="of a state dict without a configuration")


def run(options: argparse.Namespace) -> None:
    with lasting_imports():
        from ..weights.convert import convert

    report = convert(
        options.source, options.out, options.to, overwrite=options.overwrite, activation=options.activation
    )
    print(f"{options.out}: {report}")
