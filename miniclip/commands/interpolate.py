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
    if bool(options.data) != bool(options.retain) or not (options.data or options.alpha is not None):
        raise ValueError("give --data and --retain to score the models between, or --alpha alone to save one unscored")
    refuse_bad_encoding(options)
    if options.may_lose is not None and (options.alpha is not None or not 0 <= options.may_lose <= 100):
        raise ValueError(f"--may-lose is {options.may_lose}; it is 0 to 100 points of top-1, and goes without --alpha")

    with lasting_imports():
        from ..evaluation.datasets.open import open_dataset
        from ..evaluation.datasets.sets import labelled
        from ..evaluation.interpolation import best, interpolate, sweep
        from ..evaluation.prompts import suited
        from ..reports.interpolation import (
            PICTURE_FILE,
            RECORD_FILE,
            table,
            told_of_losses,
            write_json,
            write_picture,
        )
        from ..weights.load import load, save

    for option, sources in (("--data", options.data), ("--retain", options.retain)):
        if twice := [source for source in sources if sources.count(source) > 1]:
            raise ValueError(f"{option} names {twice[0]} twice")
    new, old = (
        [replace(labelled(open_dataset(source)), upright=options.upright) for source in sources]
        for sources in (options.data, options.retain)
    )
    start, _ = load(options.start, device=options.device)
    finetuned, _ = load(options.finetuned, device=options.device)
    model = None if options.alpha is None else interpolate(start, finetuned, options.alpha)
    alpha = options.alpha
    if new:
        alphas = sorted({0.0, 1.0, *options.alphas, *([] if alpha is None else [alpha])})
        with progress_bar("scoring", len(alphas)) as progress:
            points = sweep(
                start,
                finetuned,
                new,
                old,
                alphas,
                batch_size=options.batch_size,
                num_workers=options.workers,
                progress=progress,
            )
        may_lose = None if options.may_lose is None else options.may_lose / 100
        if alpha is None:
            alpha = best(points, may_lose).alpha
            model = interpolate(start, finetuned, alpha)
        names = _told_apart(options.data, new), _told_apart(options.retain, old)
        for data in (*new, *old):
            print(told_of_prompts(suited(data, finetuned.wordings), data.classnames))
        console().print(table(points, *names, alpha))
        (chosen,) = (point for point in points if point.alpha == alpha)
        for line in told_of_losses(chosen, names[1], may_lose):
            print(line)
        if options.alpha is None:
            print(
                f"alpha {alpha:g} was chosen on the images that it is scored on here, so its score is a little too "
                "high; report scores on other images."
            )
    assert model is not None
    record, picture = out / RECORD_FILE, out / PICTURE_FILE
    save(model, out, overwrite=options.overwrite)
    for path in (record, picture):  # of the mixture that was replaced; they stay with it if that fails
        path.unlink(missing_ok=True)
    if new:
        write_json(record, options.start, options.finetuned, points, *names, alpha)
        write_picture(picture, points, " and ".join(names[0]), " and ".join(names[1]), alpha)
        print(f"picture: {picture}")
    print(f"model of alpha {alpha:g}: {out}; miniclip.load reads it")


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
