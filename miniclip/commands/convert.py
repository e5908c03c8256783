"""`miniclip convert`: a checkpoint -> another library's layout, verified."""

from __future__ import annotations

import argparse

from ..common.files import user_errors
from .terminal import CHECKPOINTS, Help, lasting_imports


def main(argv: list[str]) -> None:
    """`miniclip convert SRC DST --to FORMAT`"""
    parser = argparse.ArgumentParser(
        prog="miniclip convert",
        formatter_class=Help,
        description="Writes a checkpoint as another library loads it, then loads it back (with that library, too,\n"
        "where it is installed) and compares embeddings before it says done.\n\n" + CHECKPOINTS,
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint")
    parser.add_argument("out", metavar="DST", help="a file for openai, a folder for the others")
    parser.add_argument("--to", required=True, choices=("native", "openai", "openclip", "hf"), help="the layout")
    parser.add_argument("--activation", choices=("gelu", "quick_gelu"), help="for a bare state dict that can't tell")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is there")
    options = parser.parse_args(argv)
    with user_errors():
        with lasting_imports():
            from ..weights.convert import convert

        said = convert(
            options.source, options.out, options.to, overwrite=options.overwrite, activation=options.activation
        )
        print(f"{options.out}: {said}")
