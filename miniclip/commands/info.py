"""`miniclip info`: what a checkpoint is."""

from __future__ import annotations

import argparse

from ..common.files import user_errors
from .terminal import CHECKPOINTS, Help, lasting_imports


def main(argv: list[str]) -> None:
    """`miniclip info SRC`"""
    parser = argparse.ArgumentParser(prog="miniclip info", formatter_class=Help, description=CHECKPOINTS)
    parser.add_argument("source", metavar="SRC", help="a checkpoint")
    parser.add_argument("--activation", choices=("gelu", "quick_gelu"), help="for a bare state dict that can't tell")
    options = parser.parse_args(argv)
    with user_errors():
        with lasting_imports():
            from ..weights.convert import inspect

        facts = inspect(options.source, activation=options.activation)
        config = facts.config
        vision, text = config.vision, config.text
        image_tower = {
            "vit": f"patches of {vision.patch_size}, {vision.layers} blocks, width {vision.width}",
            "resnet": f"{'-'.join(map(str, vision.blocks))} bottlenecks, width {vision.width}",
            "timm": f"{vision.timm_model}, pooling {vision.timm_pool or None}, projection {vision.timm_projection}",
        }[vision.kind]
        rows = {
            "format": facts.format,
            "image tower": f"{vision.kind}, {vision.image_size} pixels, {image_tower}",
            "text tower": f"{text.layers} blocks, width {text.width}, {text.context_length} tokens",
        }
        if config.towers != "both":
            rows["text tower" if config.towers == "image" else "image tower"] = "none"
        rows |= {
            "embedding": str(config.embed_dim),
            "activation": config.activation,
            "loss": "softmax (CLIP)" if config.init_logit_bias is None else "sigmoid (SigLIP), logits have a bias",
            "parameters": f"{facts.image_parameters / 1e6:.1f} M image, {facts.text_parameters / 1e6:.1f} M text",
            "cost": f"{facts.image_gflops:.2f} GFLOPs an image, {facts.text_gflops:.2f} a text of full length",
            "preprocessing": f"{vision.preprocess}, mean {vision.mean}, std {vision.std}",
            "dtype": ", ".join(facts.dtypes),
            "loads": facts.problems or "yes",
        }
        for name, value in rows.items():
            print(f"{name:>14}  {value}")
