"""Do the maps of `miniclip explain` know anything? Their deletion and insertion beside random maps', over pictures.

    python benchmarks/explain.py runs/digits/best --data runs/digits/data/unseen.csv --group-column scan

prints a row for each method that the model allows, and for what it is compared with: variants of attention, Grad-CAM
(captum's, on the last maps of features), and words by attention. A row has by how much the mean cosine lies below that
of random maps while the important pixels are taken away, and above it while they are added, with 95 % intervals over
the pictures (bootstrap); and how many of the maps are better than random by themselves. docs/explain.md has results.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from miniclip.evaluation.datasets.open import open_dataset
from miniclip.evaluation.datasets.sets import labelled
from miniclip.evaluation.encoder import Encoder
from miniclip.evaluation.measures.statistics import bootstrap_interval
from miniclip.evaluation.other_libraries import open_model
from miniclip.evaluation.prompts import class_prompts
from miniclip.inference.explanation.attention import Attention, attention_of, roll_out
from miniclip.inference.explanation.deletion import Deletion
from miniclip.inference.explanation.explain import METHODS, Explainer, Picture
from miniclip.inference.explanation.pixels import blurred
from miniclip.inference.explanation.words import Text, Words
from miniclip.model import VisionTransformer
from miniclip.resnet import ModifiedResNet
from miniclip.timm_tower import TimmTower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", required=True, help="labelled images; a picture's text is its class's first prompt")
    parser.add_argument("--group-column", help="pictures of one value are not independent; one of each is taken")
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--grey", action="store_true", help="pixels that are taken away turn grey, and are not blurred")
    options = parser.parse_args()
    data = labelled(open_dataset(options.data, group_column=options.group_column))
    rows = np.random.default_rng(0).permutation(len(data))
    first = {data.groups[row]: int(row) for row in rows[::-1]}  # one of each group
    chosen = [row for row in rows.tolist() if first[data.groups[row]] == row][: options.pictures]
    prompts = [class_prompts(data.templates, data.classnames[data.labels[row]])[0] for row in chosen]
    print(f"{len(chosen)} pictures of {data.name}, the first {prompts[0]!r}\n")
    print("| model | relevance | random − deletion | insertion − random | better alone |")
    print("|---|---|---|---|---|")
    for name in options.models:
        encoder = open_model(name)
        found: dict[str, list[Deletion]] = defaultdict(list)
        for row, prompt in zip(chosen, prompts, strict=True):
            for method, deletion in scores(encoder, data.open(row), prompt, options.grey):
                found[method].append(deletion)
        for method, deletions in found.items():
            below = [each.random - each.deletion for each in deletions]
            above = [each.insertion - each.random for each in deletions]
            alone = sum(each.is_better for each in deletions)
            print(
                f"| {name} | {method} | {interval(below)} | {interval(above)} | {alone} of {len(deletions)} |",
                flush=True,
            )


def scores(encoder: Encoder, image: Any, prompt: str, is_grey: bool) -> Iterator[tuple[str, Deletion]]:
    text, tower, base = Text(encoder, prompt), encoder.image_module, torch.zeros_like if is_grey else blurred
    target, judge = text.features, Picture(encoder, image, base=base)
    for method in METHODS:
        try:
            Explainer(encoder, method)
        except ValueError:  # a tower without attention
            continue
        # Integrated gradients start at the blurred copy, whatever the score is made with.
        yield method, judge.judge(Picture(encoder, image, method).cells(target)[0], target)[1]
    pixels = encoder.preprocess(image)
    if isinstance(tower, VisionTransformer):
        seen = attention_of(tower.transformer, lambda: tower(pixels[None]), target)
        for name, cells in attention_variants(seen).items():
            yield name, judge.judge(cells, target)[1]
    if (layer := last_features(tower)) is not None:
        yield "Grad-CAM", judge.judge(grad_cam(encoder, layer, pixels, target), target)[1]
    words = text.explain(judge.features)
    yield "words, left out", words.deletion
    if words.tokens:
        yield "words, attention", text.judge(merged(words), judge.features)


def attention_variants(seen: Attention) -> dict[str, Tensor]:
    """The last block alone, and rollout (Abnar and Zuidema 2020), which knows no gradients and no text."""
    ones = [torch.ones_like(each) for each in seen.probabilities]
    found = {
        "attention, last block": roll_out(seen.probabilities[-1:], seen.gradients[-1:], 0),
        "attention, no gradients": roll_out(seen.probabilities, ones, 0),
    }
    return {name: relevance[1:].view(2 * (math.isqrt(len(relevance)),)) for name, relevance in found.items()}


def merged(words: Words) -> Tensor:
    """The tokens' relevances, added up for each word."""
    found = torch.zeros(len(words.words))
    for number, relevance in enumerate(words.token_relevances):
        found["".join(words.tokens[:number]).count(" ")] += relevance
    return found


def last_features(tower: Any) -> nn.Module | None:
    """The last module whose output is a map of features."""
    if isinstance(tower, ModifiedResNet):
        return tower.layer4
    if isinstance(tower, TimmTower) and hasattr(tower.trunk, "stages"):
        return tower.trunk.stages[-1]
    return None


def grad_cam(encoder: Encoder, layer: nn.Module, pixels: Tensor, target: Tensor) -> Tensor:
    from captum.attr import LayerGradCam

    tower: Any = encoder.image_module

    def cosine(images: Tensor) -> Tensor:
        return torch.nn.functional.normalize(tower(images), dim=-1) @ target

    return LayerGradCam(cosine, layer).attribute(pixels[None], relu_attributions=True)[0, 0].detach()


def interval(values: list[float]) -> str:
    low, high = bootstrap_interval(np.array(values))
    return f"{np.mean(values):+.3f} ({low:+.3f} to {high:+.3f})"


if __name__ == "__main__":
    main()
