"""`miniclip interpolate START FINETUNED`: models between a fine-tuned one and its start, with their scores."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..weights.folders import refuse_to_save
from .evaluate import told_of_prompts
from .terminal import add_encoding, add_upright, console, lasting_imports, new_parser, progress_bar, refuse_bad_encoding

if TYPE_CHECKING:
    from ..evaluation.datasets.sets import LabelledImages
    from ..evaluation.interpolation import Point
    from ..model import CLIP


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "interpolate",
        "Saves (1 - alpha) * START + alpha * FINETUNED (WiSE-FT, Wortsman et al. 2021): it forgets less than\n"
        "FINETUNED does, and often loses nothing of the new task. The scores of the two models and of those between\n"
        "them, on the new task and on what should be retained, are printed and drawn.",
        notes="OUT gets the model (config.json, model.safetensors), interpolation.json and interpolation.png.",
        examples="""
miniclip interpolate ViT-B/32 runs/mine/best --data new.csv --retain old.csv --may-lose 1 --out wise
miniclip interpolate ViT-B/32 runs/mine/best --alpha 0.5 --out half""",
    )
    parser.add_argument("start", metavar="START", help="the model that fine-tuning began with")
    parser.add_argument("finetuned", metavar="FINETUNED", help="the fine-tuned model")
    parser.add_argument("--data", nargs="+", default=[], metavar="NEW", help="labelled images of the new task")
    parser.add_argument("--retain", nargs="+", default=[], metavar="OLD", help="labelled images of what START could do")
    parser.add_argument(
        "--alphas",
        type=_mixing_shares,
        default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
        metavar="LIST",
        help="the values of alpha to score",
    )
    parser.add_argument("--alpha", type=float, help="the one to save; default: the highest mean of new and old")
    parser.add_argument(
        "--may-lose",
        type=float,
        metavar="POINTS",
        help="save instead the best on NEW that loses at most so many points on OLD's images, the mean of all OLD",
    )
    parser.add_argument("--out", required=True, metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in that folder")
    add_encoding(parser, precision=False)
    add_upright(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    out = Path(options.out)
    refuse_to_save(out, options.overwrite, "--overwrite")  # before hours of scoring
    _refuse_options(options)

    with lasting_imports():
        from ..evaluation.interpolation import interpolate
        from ..reports.interpolation import PICTURE_FILE, RECORD_FILE, write_json, write_picture
        from ..weights.load import load, save

    new, old = (_sets_of(sources, options.upright) for sources in (options.data, options.retain))
    names = _told_apart(options.data, new), _told_apart(options.retain, old)
    start, _ = load(options.start, device=options.device)
    finetuned, _ = load(options.finetuned, device=options.device)
    model = None if options.alpha is None else interpolate(start, finetuned, options.alpha)
    points = _mixtures_scored(options, start, finetuned, new, old) if new else []
    alpha = _told_choice(options, points, names) if new else options.alpha
    if model is None:
        model = interpolate(start, finetuned, alpha)
    record, picture = out / RECORD_FILE, out / PICTURE_FILE
    save(model, out, overwrite=options.overwrite)
    for path in (record, picture):  # of the mixture that was replaced; they stay with it if that fails
        path.unlink(missing_ok=True)
    if new:
        write_json(record, options.start, options.finetuned, points, *names, alpha)
        write_picture(picture, points, " and ".join(names[0]), " and ".join(names[1]), alpha)
        print(f"picture: {picture}")
    print(f"model of alpha {alpha:g}: {out}; miniclip.load reads it")


def _refuse_options(options: argparse.Namespace) -> None:
    if bool(options.data) != bool(options.retain) or not (options.data or options.alpha is not None):
        raise ValueError("give --data and --retain to score the models between, or --alpha alone to save one unscored")
    refuse_bad_encoding(options)
    if options.may_lose is not None and (options.alpha is not None or not 0 <= options.may_lose <= 100):
        raise ValueError(f"--may-lose is {options.may_lose}; it is 0 to 100 points of top-1, and goes without --alpha")
    for option, sources in (("--data", options.data), ("--retain", options.retain)):
        if twice := [source for source in sources if sources.count(source) > 1]:
            raise ValueError(f"{option} names {twice[0]} twice")


def _sets_of(sources: list[str], upright: bool) -> list[LabelledImages]:
    from ..evaluation.datasets.open import open_dataset
    from ..evaluation.datasets.sets import labelled

    return [replace(labelled(open_dataset(source)), upright=upright) for source in sources]


def _mixtures_scored(
    options: argparse.Namespace,
    start: CLIP,
    finetuned: CLIP,
    new: list[LabelledImages],
    old: list[LabelledImages],
) -> list[Point]:
    """The scores of each mixture; the prompts that were asked are told."""
    from ..evaluation.interpolation import sweep
    from ..evaluation.prompts import suited

    alphas = sorted({0.0, 1.0, *options.alphas, *([] if options.alpha is None else [options.alpha])})
    ways = {"batch_size": options.batch_size, "num_workers": options.workers}
    with progress_bar("scoring", len(alphas)) as progress:
        points = sweep(start, finetuned, new, old, alphas, progress=progress, **ways)
    for data in (*new, *old):
        print(told_of_prompts(suited(data, finetuned.wordings), data.classnames))
    return points


def _told_choice(options: argparse.Namespace, points: list[Point], names: tuple[list[str], list[str]]) -> float:
    """The alpha that was asked for, or the best; it is told what it gains and loses."""
    from ..evaluation.interpolation import best
    from ..reports.interpolation import table, told_of_losses

    may_lose = None if options.may_lose is None else options.may_lose / 100
    (chosen,) = (
        [best(points, may_lose)] if options.alpha is None else [each for each in points if each.alpha == options.alpha]
    )
    console().print(table(points, *names, chosen.alpha))
    for line in told_of_losses(chosen, names[1], may_lose):
        print(line)
    if options.alpha is None:
        print(
            f"alpha {chosen.alpha:g} was chosen on the images that it is scored on here, so its score is a little too "
            "high; report scores on other images."
        )
    return chosen.alpha


def _told_apart(sources: list[str], sets: list[LabelledImages]) -> list[str]:
    """What the sets are called; those of one name as they were given."""
    names = [data.name for data in sets]
    return [name if names.count(name) == 1 else source for name, source in zip(names, sources, strict=True)]


def _mixing_shares(text: str) -> list[float]:
    """Numbers from 0 to 1, separated by commas."""
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers; write 0,0.25,0.5,1") from error
    if not all(0 <= number <= 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} are not all from 0, the start, to 1, the fine-tuned model")
    return numbers
