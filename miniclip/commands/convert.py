"""`miniclip convert SRC DST --to FORMAT`: a checkpoint -> another library's layout, verified."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .terminal import CHECKPOINTS, lasting_imports, new_parser


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "convert",
        "Writes a checkpoint in another library's layout, then loads it back (with that library, too, where it is\n"
        "installed) and compares embeddings before it reports success. hf gets a model card, too.\n\n" + CHECKPOINTS,
        examples="""
miniclip convert ViT-B/32 clip --to hf
miniclip convert runs/digits/best digits.pt --to openai
miniclip convert epoch_32.pt epoch_32 --to native --activation gelu""",
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint")
    parser.add_argument("out", metavar="DST", help="a file for openai, a folder for the others")
    parser.add_argument("--to", required=True, choices=("native", "openai", "openclip", "hf"), help="the layout")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace DST if it exists, and holds nothing else than a model"
    )
    add_hints(parser)
    return parser


def add_hints(parser: argparse.ArgumentParser) -> None:
    """What a bare state dict may leave open."""
    bare = parser.add_argument_group("of a state dict without a configuration")
    bare.add_argument("--activation", choices=("gelu", "quick_gelu"), help="of its hidden layers")
    bare.add_argument(
        "--head-width", type=_widths, metavar="N[,N]", help="channels of an attention head; of image and text tower"
    )


def hints(options: argparse.Namespace) -> dict[str, Any]:
    """Those options as `load` and `read_checkpoint` take them."""
    return {"activation": options.activation, "head_width": options.head_width}


def _widths(text: str) -> int | tuple[int, int]:
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split(",")]
    if len(numbers) > 2 or not all(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no width of heads; write 80, or 80,64 for image and text tower")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def run(options: argparse.Namespace) -> None:
    with lasting_imports():
        from ..inference.card import CARD_FILE, card_for, is_untouched
        from ..weights.convert import convert

    texts = {CARD_FILE: card_for(options.source, to=options.to, **hints(options))} if options.to == "hf" else None
    card = Path(options.out, CARD_FILE)
    is_own_card = card.is_file() and is_untouched(card.read_text(encoding="utf-8", errors="replace"))
    replaceable = [CARD_FILE] if is_own_card else []
    report = convert(options.source, options.out, options.to, options.overwrite, texts, replaceable, **hints(options))
    print(f"{options.out}: {report}")
