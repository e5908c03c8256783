"""`miniclip info SRC`: what a checkpoint is."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..common.wording import printable
from .convert import add_hints, hints
from .output import refuse_closed
from .terminal import CHECKPOINTS, lasting_imports, new_parser

if TYPE_CHECKING:
    from ..weights.facts import Call, Facts


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "info",
        "Prints a checkpoint's format, architecture, sizes, cost and preprocessing, and whether it loads. --trace\n"
        "adds the forward pass, module by module.\n\n" + CHECKPOINTS,
        examples="""
miniclip info ViT-B/32
miniclip info runs/digits/best
miniclip info epoch_32.pt --activation gelu
miniclip info ViT-B/32 --trace --batch 64 --text-length 12""",
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint")
    parser.add_argument("--trace", action="store_true", help="list the modules that run: shapes, parameters, cost")
    parser.add_argument("--batch", type=int, metavar="N", help="images and texts of --trace; default: 1")
    parser.add_argument(
        "--text-length", type=int, metavar="L", help="tokens of each text of --trace; default: the context length"
    )
    add_hints(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    refuse_closed()
    for name in ("batch", "text_length"):
        if getattr(options, name) is not None and not options.trace:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(options, name)} is for --trace; add it, or leave both out"
            )
    with lasting_imports():
        from ..weights.facts import fold, inspect, trace

    facts = inspect(options.source, **hints(options))
    batch_size = 1 if options.batch is None else options.batch
    calls = trace(facts.config, batch_size, options.text_length) if options.trace else []
    for name, value in rows(facts).items():
        print(f"{name:>14}  {value}")
    for tower in fold(calls):
        print()
        print_table(tower)


def rows(facts: Facts) -> dict[str, str]:
    """Name and value of each line."""
    config = facts.config
    vision, text = config.vision, config.text
    image_tower = {
        "vit": f"patches of {vision.patch_size}, {vision.layers} blocks, width {vision.width}, {vision.heads} heads",
        "resnet": f"{'-'.join(map(str, vision.blocks))} bottlenecks, width {vision.width}",
        "timm": f"{vision.timm_model}, pooling {vision.timm_pool or None}, projection {vision.timm_projection}",
    }[vision.kind]
    rows = {
        "format": facts.format,
        "image tower": f"{vision.kind}, {vision.image_size} pixels, {image_tower}",
        "text tower": f"{text.layers} blocks, width {text.width}, {text.heads} heads, {text.context_length} tokens",
    }
    if config.towers != "both":
        rows["text tower" if config.towers == "image" else "image tower"] = "none"
    rows |= {
        "embedding": str(config.embed_dim),
        "activation": config.activation,
        "loss": "softmax (CLIP)" if config.init_logit_bias is None else "sigmoid (SigLIP), logits have a bias",
    }
    if not facts.problems:
        rows |= {
            "parameters": f"{facts.image_parameters / 1e6:.1f} M image, {facts.text_parameters / 1e6:.1f} M text",
            "cost": f"{facts.image_gflops:.2f} GFLOPs an image, {facts.text_gflops:.2f} a text of full length",
        }
    size = vision.resize_size or vision.image_size
    resized = "no resizing" if vision.resize == "none" else f"{vision.interpolation} to {size} ({vision.resize})"
    if facts.wordings is not None:
        rows["wordings"] = printable(str(facts.wordings))
    return rows | {
        "preprocessing": f"{vision.preprocess}, {resized}, mean {vision.mean}, std {vision.std}",
        "dtype": ", ".join(facts.dtypes),
        "loads": facts.problems or "yes",
    }


def print_table(tower: Call) -> None:
    """A line for each module; its parameters and FLOPs hold those of the modules inside it, indented below."""
    lines = [("module", "class", "output", "parameters", "MFLOPs", "output's bytes"), *table(tower)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for name, kind, *figures in lines:
        line = [name.ljust(widths[0]), kind.ljust(widths[1])]
        print("  ".join(line + [figure.rjust(width) for figure, width in zip(figures, widths[2:], strict=True)]))


def table(call: Call, depth: int = 0) -> list[tuple[str, ...]]:
    """The cells of `print_table`, of a call and of those inside it."""
    name = call.name if not depth else call.name.rsplit(".", 1)[-1]
    if call.last:
        name += "–" + call.last.rsplit(".", 1)[-1]
    shape = "(" + ", ".join(map(str, call.shape)) + ")" if call.shape else ""
    cells = (
        "  " * depth + name,
        call.kind,
        shape,
        f"{call.parameters:,}",
        f"{call.flops / 1e6:,.1f}",
        f"{call.bytes:,}",
    )
    return [cells, *(row for each in call.inside for row in table(each, depth + 1))]
