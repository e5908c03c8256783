"""`miniclip classify`: options -> inference/classify.py -> rows, and files in folders by class."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.wording import printable, some
from ..output import IMAGES, MODELS, add_model, add_output, note, note_left_out, note_unreadable, results
from ..terminal import (
    add_cache,
    add_encoding,
    add_threshold,
    add_upright,
    lasting_imports,
    new_parser,
    progress_bar,
    refuse_bad_encoding,
    utf8_text,
)

if TYPE_CHECKING:
    from ...evaluation.datasets.sets import EvaluationSet
    from ...inference.classify import Guesses
    from ...inference.thresholds import ModelThreshold


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "classify",
        "Guesses which of some classes each picture shows: a class becomes prompts (a photo of a cat.), and a picture\n"
        "goes to the nearest. Each guess has a row: class, probability among the classes, cosine.\n\n"
        f"{IMAGES}\n\n{MODELS}",
        notes="Probabilities are relative to the classes: they add up to 1, even for a picture of something else. A\n"
        'threshold for the cosine makes those "none of these": the one that `miniclip calibrate` wrote into the\n'
        "model's folder is used, and --threshold sets one by hand.",
        examples="""
miniclip classify cat.jpg --labels "cat,dog"
miniclip classify photos 'more/**/*.png' --labels "cat,dog,a red car" --model runs/pets/best --topk 3
miniclip classify photos --classnames imagenet --templates imagenet7 --json | jq '.[] | select(.probability > 0.9)'
find photos -name '*.jpg' -print0 | miniclip classify - --labels "cat,dog" --csv > guesses.csv
miniclip classify photos --labels "cat,dog" --threshold 0.22 --move-to sorted
miniclip classify --undo sorted""",
    )
    parser.add_argument("images", nargs="*", metavar="IMAGES", help="as above")
    add_model(parser)
    classes = parser.add_argument_group("classes")
    classes.add_argument(
        "--labels",
        type=utf8_text,
        metavar="NAMES",
        help='with commas between them: "cat,dog"; one with a comma in double quotes',
    )
    classes.add_argument("--classnames", metavar="FILE", help='instead: a file with one a line, or "imagenet", …')
    classes.add_argument(
        "--templates",
        metavar="SET",
        help='"simple", "imagenet7", "imagenet80", …, a file with one a line, or a .json of {class: [prompts]}; '
        "default: those of the threshold, else worded as the captions that the model was trained on, else simple",
    )
    classes.add_argument("--topk", type=int, default=1, metavar="K", help="guesses for each picture")
    add_threshold(classes)
    classes.add_argument(
        "--coverage",
        type=float,
        metavar="SHARE",
        help="the set of classes that holds the true one so often (0.95), as far as it was calibrated",
    )
    sort = parser.add_argument_group("sorting files into folders by class; asks first")
    where = sort.add_mutually_exclusive_group()
    where.add_argument("--copy-to", metavar="DIR", help="copy them into DIR/CLASS")
    where.add_argument("--move-to", metavar="DIR", help="move them there")
    where.add_argument("--undo", metavar="DIR", help="instead of all else: take the last sorting into DIR back")
    sort.add_argument("--yes", action="store_true", help="do not ask")
    add_output(parser)
    add_encoding(parser)
    add_upright(parser)
    parser.add_argument("--image-column", metavar="NAME", help="of tables; default: found by name")
    add_cache(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    if options.undo:
        _take_back(options)
        return
    _refuse_mistakes(options)
    with lasting_imports():
        from ...evaluation.features import FeatureCache
        from ...evaluation.other_libraries import open_model
        from ...evaluation.prompts import suited
        from ...inference.classify import choose_classes, classify_images, result_columns
        from ...inference.sources import image_set
        from ...inference.thresholds import find_threshold

    threshold = find_threshold(options.model, options.threshold)
    classes = choose_classes(options.labels, options.classnames, options.templates, threshold)
    data = image_set(options.images, image_column=options.image_column, is_each_once=True, upright=options.upright)
    note_left_out(data.left_out)
    folder = options.copy_to or options.move_to
    if folder:
        _refuse_unsortable(data, Path(folder), options.yes)
    num_guesses = min(options.topk, len(classes.classnames))
    columns = result_columns(num_guesses, threshold is not None, options.coverage is not None)
    with results(options, columns, is_all=not folder) as write:
        model = open_model(options.model, options.device, options.precision)
        classes = suited(classes, model.wordings)
        if threshold is not None:
            threshold.check_model(model)
            threshold.warn_if_other(classes.classnames, classes.templates, options.upright)
        guesses = classify_images(
            model,
            data,
            classes,
            num_guesses=num_guesses,
            threshold=threshold,
            coverage=options.coverage,
            batch_size=options.batch_size,
            num_workers=options.workers,
            cache=None if options.no_cache else FeatureCache(options.cache),
            progress=progress_bar,
        )
        _note_terms(guesses, threshold)
        if folder and options.yes:  # before what is printed, as its reader may go
            _sort_guesses(guesses, folder, options)
        for row in guesses.rows():
            write(row)
    if folder and not options.yes:
        _sort_guesses(guesses, folder, options)


def _refuse_mistakes(options: argparse.Namespace) -> None:
    if not options.images:
        raise ValueError('no images are named: miniclip classify IMAGES --labels "cat,dog"')
    refuse_bad_encoding(options)
    _refuse_labels_apart(options)
    if options.topk < 1:
        raise ValueError(f"--topk is {options.topk}; it must be at least 1")
    if options.coverage is not None and not 0 < options.coverage < 1:
        raise ValueError(f"--coverage is {options.coverage:g}; it is a share, above 0 and below 1, as 0.95")
    if options.yes and not (options.copy_to or options.move_to):
        raise ValueError("--yes is for --copy-to and --move-to, and neither is given")


def _refuse_labels_apart(options: argparse.Namespace) -> None:
    """Of `--labels cat dog` the second word became an image."""
    from ...inference.names import existing

    labels = [name for each in (options.labels or "").split(",") if (name := each.strip())]
    if len(labels) != 1:
        return
    names = [each.strip(",") for each in options.images if existing(each) is None]
    apart = [name for name in names if name.isalnum()]
    if apart:
        raise ValueError(
            f"no file or folder {apart[0]}; if it is the name of a class, names have commas between them, in one text: "
            f'--labels "{",".join([*labels, *apart])}"'
        )


def _note_terms(guesses: Guesses, threshold: ModelThreshold | None) -> None:
    """What the guesses leave out, and what they are relative to."""
    from ...evaluation.datasets.class_folders import NONE

    note_unreadable(guesses.unreadable, len(guesses.data))
    for sentence in guesses.notes():
        note(f"note: {sentence}")
    if threshold is None:
        note(
            f"note: probabilities are relative to the {len(guesses.classes.classnames)} classes; without a threshold, "
            "a picture of something else goes to one of them, too"
        )
    else:
        note(f"note: {NONE!r} is a picture below the threshold: {threshold}")


# ---------------------------------------------------------------------------------------------------------------------
# Files into folders


def _refuse_unsortable(data: EvaluationSet, folder: Path, is_agreed: bool) -> None:
    """Refuses, before the work, what can't be sorted, asked about or written."""
    if not isinstance(data.images, tuple):  # they lie in shards or tables
        raise ValueError(f"only files can be sorted into folders, and the images of {data.name} are none")
    others = [data.key(index) for index, image in enumerate(data.images) if isinstance(image, str | bytes)]
    if others:
        raise ValueError(f"only files can be sorted into folders, and {len(others)} images are none: {some(others, 2)}")
    if not (is_agreed or _can_ask()):
        raise ValueError(f"sorting into {folder} asks first, and there is no terminal to ask on; pass --yes")
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file; {folder} must be a folder, or not be there")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{there} can't be written to, so no file can be sorted into {folder}")


def _can_ask() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def _sort_guesses(guesses: Guesses, folder: str, options: argparse.Namespace) -> None:
    from ...evaluation.datasets.class_folders import NONE
    from ...inference.sorting import plan_sorting, sort_files

    is_move = bool(options.move_to)
    files = [guesses.data.images[index] for index in guesses.indices]
    labels = [guesses.label(row) for row in range(len(files))]
    plan = plan_sorting(files, labels, [NONE, *guesses.classes.classnames], folder, is_move=is_move)
    for reason in plan.left:
        note(f"left as it is: {reason}")
    if plan.num_there:
        note(f"{plan.num_there:,} files are in {folder} already, with equal content")
    counts = some([f"{name} {count:,}" for name, count in plan.counts().most_common()], 20)
    if not plan.steps:
        note("no file is left to be sorted")
        return
    what = f"{len(plan.steps):,} files into {folder} ({counts})"
    if not (options.yes or _agrees(f"{'Move' if is_move else 'Copy'} {what}?")):
        note("nothing was sorted")
        return
    remedy = f"to take it back: miniclip classify --undo {shlex.quote(folder)}"
    try:
        with progress_bar(folder, len(plan.steps)) as progress:
            done = sort_files(plan, progress)
    except (OSError, KeyboardInterrupt):
        note(remedy)
        raise
    for problem in done.problems:
        note(f"not sorted: {problem}")
    into = f"{folder} ({counts})" if not done.problems else folder
    note(f"{'moved' if is_move else 'copied'} {done.num_files:,} files into {into}")
    note(remedy)
    if done.problems:
        raise ValueError(
            f"{len(done.problems):,} of {len(plan.steps):,} files could not be sorted; they are named above"
        )


def _agrees(question: str) -> bool:
    print(printable(question), "[y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _take_back(options: argparse.Namespace) -> None:
    from ...inference.sorting import undo_sorting

    if options.images:
        raise ValueError(f"--undo {options.undo} classifies nothing; leave out {options.images[0]}")
    done = undo_sorting(options.undo)
    for problem in done.problems:
        note(f"not taken back: {problem}")
    note(f"took {done.num_files:,} files back out of {options.undo}")
    if done.problems:
        raise ValueError(f"{len(done.problems):,} files were not taken back; they are named above")
