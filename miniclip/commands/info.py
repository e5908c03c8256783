"""`miniclip info SRC`: what a checkpoint is."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .convert import add_hints, hints
from .terminal import CHECKPOINTS, lasting_imports, new_parser

if TYPE_CHECKING:
    from ..weights.facts import Facts


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "info",
        "Prints a checkpoint's format, architecture, sizes, cost and preprocessing, and whether it loads.\n\n"
        + CHECKPOINTS,
        examples="""
miniclip info ViT-B/32
miniclip info runs/digits/best
miniclip info epoch_32.pt --activation gelu""",
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint")
    add_hints(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    with lasting_imports():
        from ..weights.facts import inspect

    for name, value in rows(inspect(options.source, **hints(options))).items():
        print(f"{name:>14}  {value}")


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
    return rows | {
        "preprocessing": f"{vision.preprocess}, {resized}, mean {vision.mean}, std {vision.std}",
        "dtype": ", ".join(facts.dtypes),
        "loads": facts.problems or "yes",
    }
