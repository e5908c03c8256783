"""`miniclip eval`: options -> evaluation/suite.py -> tables, files and a page."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.arguments import BF16
from ..common.files import expand_home, locked
from ..common.wording import printable, some
from .output import refuse_closed
from .terminal import (
    add_cache,
    add_encoding,
    add_reading,
    add_upright,
    console,
    lasting_imports,
    new_parser,
    progress_bar,
    refuse_bad_encoding,
)

if TYPE_CHECKING:
    from ..evaluation.datasets.sets import EvaluationSet
    from ..evaluation.encoder import Encoder
    from ..evaluation.suite import Result, Task
    from ..inference.thresholds import ModelThreshold


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "eval",
        "Scores CLIP models without training them: each class becomes prompts, and an image goes to the\n"
        "nearest; images with captions are found by them, and the other way round. Every model is scored on every\n"
        "set.\n\n"
        "MODEL is a folder that training wrote, or another that miniclip loads (ViT-B/32, a checkpoint of OpenAI's,\n"
        "OpenCLIP's or Hugging Face's); or, with its own preprocessing and tokenizer,\n"
        "  openclip:ARCHITECTURE/TAG    a model of open_clip's; the tag may be a file of weights\n"
        "  transformers:owner/name      a model of transformers', by name or folder\n"
        "  python:FILE.py:FUNCTION      your own: what the function returns has encode_image, encode_text, tokenize,\n"
        "                               preprocess, logit_scale. Your code is run.\n\n"
        "DATA is\n"
        "  my_photos                    a folder with one sub-folder of images for each class\n"
        "  my.csv, .tsv, .jsonl, .parquet\n"
        "                               a table with a column of images (paths are relative to the table) and one of\n"
        "                               labels: names, numbers, or lists of several\n"
        "  shards, 'shards/{0..9}.tar'  webdataset's tars with a .cls for each image, here or at a URL; with .npy\n"
        "                               (several labels) or .txt (captions)\n"
        "  hf-hub:owner/name            a set of CLIP_benchmark's (hf-hub:clip-benchmark/wds_…), or of Hugging Face's\n"
        "                               `datasets` with a column of type ClassLabel; or the folder of either\n"
        "  torchvision:CIFAR10          a classification set of torchvision's, in the folder --root\n"
        "  with --task retrieval        any source that training reads: images with captions\n\n"
        "Class names and prompts that lie with the data are used: classnames.txt and templates.txt (or, for prompts\n"
        "by class, templates.json) in the folder, TABLE.classnames.txt and TABLE.templates.txt by the table. What was\n"
        "used is printed, and is in results.json.",
        notes="OUT gets report.html (open it in a browser), results.json (all numbers), results.csv (a row for each\n"
        "score), predictions/*.parquet (a row for each image), clip_benchmark/*.json (for `clip_benchmark build`).",
        examples="""
miniclip eval --model runs/digits/best --data my_photos --templates simple imagenet7 imagenet80
miniclip eval --model ViT-B/32 openclip:ViT-B-32/laion2b_s34b_b79k --data hf-hub:clip-benchmark/wds_cars
miniclip eval --model ViT-B/32 --data birds.parquet --label-column species --group-column photographer --out birds
miniclip eval --model ViT-B/32 --data photos --train more_photos --outside street_scenes
miniclip eval --model ViT-B/32 --data torchvision:CIFAR10 --root ~/data --download
torchrun --nproc_per_node 8 eval_zeroshot.py --model ViT-L/14 --data imagenet/val --classnames imagenet
miniclip eval --model runs/mine/best --data my_photos --out after
miniclip eval --compare reports/digits-best after""",
    )
    parser.add_argument("--model", nargs="+", default=[], metavar="MODEL", help="one or several models, as above")
    parser.add_argument("--data", nargs="+", default=[], metavar="DATA", help="one or several sets, as above")
    parser.add_argument("--out", help="folder for the results; default: reports/MODEL")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in that folder and their files")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="instead: what changed between two results.json (or their folders), and whether by more than chance",
    )
    add_reading(parser).add_argument(
        "--task", choices=("classification", "multilabel", "retrieval"), help="default: what the data are for"
    )
    ask = parser.add_argument_group("what to ask")
    ask.add_argument("--classnames", help='"imagenet", "mnist", …, or a file with one name a line, in label order')
    ask.add_argument(
        "--templates",
        nargs="+",
        default=[],
        metavar="SET",
        help='"simple", "imagenet7", "imagenet80", "cifar10", …, a file with one a line, or a .json of {class: '
        "[prompts]}; default: those with the data, else worded as the captions that the model was trained on; several "
        "are compared, at the cost of one look at the images",
    )
    ask.add_argument(
        "--topk",
        type=int,
        nargs="+",
        metavar="K",
        help="accuracies among the first K guesses, and of retrieval R@K beside R@1; default: 1 5, of retrieval 1 5 10",
    )
    ask.add_argument(
        "--subgroups", nargs="+", default=[], metavar="COLUMN", help="columns to score by value: for whom is it good?"
    )
    ask.add_argument(
        "--outside", metavar="DATA", help='images of none of the classes, to choose a threshold for "none of these"'
    )
    ask.add_argument(
        "--false-acceptance",
        type=float,
        metavar="SHARE",
        help="of those that may pass, 0 to 1; default: what balances both mistakes",
    )
    ask.add_argument(
        "--save-threshold",
        nargs="?",
        const="",
        metavar="FILE",
        help="keep it for `classify` and `search`, in the model's folder or in FILE; that of the first --templates",
    )
    ask.add_argument(
        "--standard",
        metavar="DATA",
        help="the one of the sets that the others are shifts of: a table of robustness",
    )
    ask.add_argument(
        "--baselines", nargs="+", default=[], metavar="MODEL", help="of the models; their line is what to expect"
    )
    ask.add_argument("--explain", action="store_true", help="maps of why the worst mistakes were made, in report.html")
    learn = parser.add_argument_group("learning from features: linear probe, neighbours, Tip-Adapter, few shots")
    learn.add_argument(
        "--train",
        nargs="+",
        default=[],
        metavar="DATA",
        help="labelled images, for each set of --data; of several parts name one, DATA/train",
    )
    learn.add_argument("--train-split", metavar="NAME", help="instead: this part of the sets of --data")
    learn.add_argument(
        "--validation", nargs="+", default=[], metavar="DATA", help="to choose by; default: from --train"
    )
    learn.add_argument("--shots", type=int, nargs="+", metavar="K", help="images of each class; default: 1 2 4 8 16")
    learn.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="that draw the shots")
    add_encoding(parser)
    add_upright(parser)
    add_cache(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    if options.compare:
        refuse_closed()
    with _joined(options.device) as device:
        if options.compare:
            _print_comparison(*options.compare)
        else:
            _evaluate(options, device)


@contextmanager
def _joined(device: str | None) -> Iterator[str | None]:
    """Joins the processes that torchrun started, if there are several; the first alone prints and writes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    with lasting_imports():
        import torch
        import torch.distributed as dist

    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    is_gpu = device != "cpu" and torch.cuda.is_available()
    if is_gpu:
        torch.cuda.set_device(local_rank)
    # What is exchanged goes through the host's memory; who is done first waits as long as the others need.
    dist.init_process_group("gloo", timeout=timedelta(days=2))
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere if dist.get_rank() else sys.stdout),
        ):
            yield f"cuda:{local_rank}" if is_gpu else device
    finally:
        dist.destroy_process_group()


def _print_comparison(first: str, second: str) -> None:
    with lasting_imports():
        from ..reports.comparison import compare_runs
        from ..reports.tables import comparison_tables

    compared = compare_runs(first, second)
    for table in comparison_tables(compared.changes):
        console().print(table)
    for each in compared.left_out:
        print(f"not compared: {printable(each)}", file=sys.stderr)


def _evaluate(options: argparse.Namespace, device: str | None) -> None:
    if not options.model or not options.data:
        raise ValueError("--model and --data are needed, at least one of each (or --compare A B)")
    out = _folder_of(options)
    refuse_bad_encoding(options)
    for name in ("topk", "shots"):
        for value in values if isinstance(values := getattr(options, name), list) else [values]:
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")

    with lasting_imports():
        from ..common.processes import rank_and_world_size
        from ..evaluation.features import open_cache
        from ..evaluation.other_libraries import open_model
        from ..evaluation.robustness import robustness
        from ..evaluation.suite import evaluate
        from ..inference.calibration import refuse_too_few, threshold_of
        from ..inference.thresholds import refuse_class_called_none, write_threshold

    _refuse_contradictions(options)
    paths = _threshold_paths(options)
    tasks = _tasks(options)
    if paths:
        refuse_class_called_none(getattr(tasks[0].data, "classnames", ()))
    if paths and options.false_acceptance is not None:
        refuse_too_few(tasks[0].outside, 1 - options.false_acceptance, f"--false-acceptance {options.false_acceptance}")
    cache = open_cache(options.cache, not options.no_cache)
    for name in reversed(options.model):  # all of them, so that none is found wanting after an hour
        model = open_model(name, device, options.precision)
    is_first = rank_and_world_size()[0] == 0
    # Likewise, if it can't be written, or another command writes there.
    with locked(out / ".lock", f"another process is writing {out}", patience_s=0) if is_first else nullcontext():
        _refuse_earlier_results(out, options.overwrite)
        found: list[Result] = []
        thresholds: dict[Path, ModelThreshold] = {}
        for name in options.model:
            model = model if name == options.model[0] else open_model(name, device, options.precision)
            for task in tasks:
                found += evaluate(
                    model,
                    task,
                    ks=options.topk,
                    batch_size=options.batch_size,
                    num_workers=options.workers,
                    cache=cache,
                    progress=progress_bar if is_first else None,
                )
            if name in paths:
                (result,) = [each for each in found if each.model == name and each.outside is not None]
                thresholds[paths[name]] = threshold_of(result, model)
        if not is_first:
            return
        shifts = None
        if options.standard:
            standard = tasks[options.data.index(options.standard)].data.name
            shifts = robustness(found, standard, options.baselines)
        _write(out, found, shifts, partial(open_model, device=device) if options.explain else None)
        print_what_was_read(found)
        if options.precision == BF16:
            changed = f"`miniclip eval --compare OTHER {out}` shows what that changed"
            print(f"in {BF16}: {changed}, OTHER a run without --precision")
        for path, threshold in thresholds.items():
            write_threshold(path, threshold, options.overwrite)
            print(replace(threshold, source=str(path)))
        print(f"report: {out / 'report.html'}")


def _folder_of(options: argparse.Namespace) -> Path:
    called = "-".join(part for part in Path(options.model[0]).parts[-2:] if part not in ("/", "..", "."))
    out = Path(options.out or Path("reports") / (called if len(options.model) == 1 else "comparison"))
    _refuse_earlier_results(out, options.overwrite)
    return out


def _refuse_earlier_results(out: Path, overwrite: bool) -> None:
    if (out / "results.json").exists() and not overwrite:
        raise ValueError(f"{out} already holds results; pass --overwrite to replace them, or --out for another folder")


def _write(out: Path, found: list[Result], shifts: Any, explained_by: Callable[[str], Encoder] | None) -> None:
    """Results as files, as a page and as tables on the terminal.

    Args:
        explained_by: opens a model by its name, to draw what its mistakes rest on; None for no such maps.
    """
    with lasting_imports():
        from ..inference.explanation.guesses import GuessMaps
        from ..reports.page import write_html
        from ..reports.results import (
            BENCHMARK_FOLDER,
            PREDICTIONS_FOLDER,
            RESULTS_FILE,
            TABLE_FILE,
            files_beside,
            write_benchmark,
            write_csv,
            write_json,
            write_predictions,
        )
        from ..reports.tables import tables

    # First of all what is kept: whoever reads what is printed, as `head` does, may go before the end.
    earlier = files_beside(out / RESULTS_FILE)
    write_json(out / RESULTS_FILE, found, shifts)
    write_csv(out / TABLE_FILE, found)
    for path in earlier:  # of a run that is overwritten
        path.unlink(missing_ok=True)
    write_benchmark(out / BENCHMARK_FOLDER, found)
    try:
        write_predictions(out / PREDICTIONS_FOLDER, found)
    except ValueError as error:  # all else is worth having
        print(f"no predictions were written: {error}", file=sys.stderr)
    wrong = sum(len(each.examples) for one in found for each in one.scores.galleries() if each.kind == "wrong")
    with progress_bar("explaining mistakes", wrong) if explained_by else nullcontext() as explained:
        maps = GuessMaps(explained_by, explained) if explained_by and explained else None
        write_html(out / "report.html", found, shifts, maps)
    for table in tables(found, shifts):
        console().print(table)


def _threshold_paths(options: argparse.Namespace) -> dict[str, Path]:
    """Where each model's threshold is to be saved; none, if that is not asked for."""
    from ..inference.thresholds import refuse_unwritable, threshold_path

    given = options.save_threshold
    if given is None:
        return {}
    if not options.outside:
        raise ValueError("--save-threshold saves what is chosen by the images of --outside, which is missing")
    if len(options.data) > 1:
        raise ValueError(f"--save-threshold saves the threshold of one set, and --data has {len(options.data)}")
    if given and len(options.model) > 1:
        raise ValueError(f"--save-threshold {given} is one file, and --model has {len(options.model)}; name no file")
    paths = {name: expand_home(given) if given else threshold_path(name) for name in options.model}
    for path in paths.values():
        refuse_unwritable(path, options.overwrite)
    return paths


def _refuse_contradictions(options: argparse.Namespace) -> None:
    if options.train and options.train_split:
        raise ValueError("--train names other data, and --train-split a part of the same; give one of them")
    for name in ("train", "validation"):
        if getattr(options, name) and len(getattr(options, name)) != len(options.data):
            raise ValueError(f"--{name} has {len(getattr(options, name))} sets and --data {len(options.data)}")
        pairs = zip(getattr(options, name), options.data, strict=False)
        if same := [given for given, data in pairs if Path(given) == Path(data)]:  # also with a slash at its end
            raise ValueError(
                f"--{name} {same[0]} is that of --data, and would be the same part of it; --train-split names another "
                "part to learn from, and what is chosen by is held out of that"
            )
    if options.validation and not (options.train or options.train_split):
        raise ValueError("--validation is for what is learnt from --train or --train-split")
    if options.false_acceptance is not None and not options.outside:
        raise ValueError("--false-acceptance is a share of the images of --outside, which is missing")
    if options.false_acceptance is not None and not 0 <= options.false_acceptance < 1:
        raise ValueError(f"--false-acceptance is {options.false_acceptance}; it is a share, from 0 to below 1")
    for name in ("model", "data"):
        given = getattr(options, name)
        if twice := [each for number, each in enumerate(given) if each in given[:number]]:
            raise ValueError(f"--{name} has {twice[0]} twice; once will do")
    if options.outside in options.data:
        raise ValueError(f"--outside {options.outside} is one of --data; it must hold images of none of the classes")
    if options.download and not any(source.startswith("torchvision:") for source in options.data):
        raise ValueError(f"a download is for torchvision's sets (torchvision:CIFAR10), and {options.data[0]} is none")
    if options.standard and options.standard not in options.data:
        raise ValueError(f"--standard {options.standard} is none of --data: {', '.join(options.data)}")
    if options.standard and len(options.data) < 2:
        raise ValueError(f"--standard {options.standard} is the only set of --data; robustness needs shifted ones, too")
    if options.baselines and not options.standard:
        raise ValueError("--baselines are for the table of robustness, which needs --standard")
    if unknown := [name for name in options.baselines if name not in options.model]:
        raise ValueError(f"the baseline {unknown[0]} is none of --model: {', '.join(options.model)}")


def _tasks(options: argparse.Namespace) -> list[Task]:
    """The data sets, each with what is asked of it."""
    from ..evaluation.datasets.open import open_dataset, open_images, with_templates
    from ..evaluation.datasets.sets import labelled
    from ..evaluation.suite import Task

    def opened(source: str, split: str | None = options.split, beside: str | None = None) -> EvaluationSet:
        """The columns asked for are those of --data; what goes `beside` one of them may be of another kind, and nobody
        asks about its classes."""
        is_alike = beside is None or Path(source).suffix.lower() == Path(beside).suffix.lower()
        columns = (options.group_column, options.label_column, options.image_column) if is_alike else (None,) * 3
        found = open_dataset(
            source,
            options.classnames,
            () if options.templates or beside else None,
            columns[0],
            split,
            columns[1],
            columns[2],
            expand_home(options.root),
            options.download and source.startswith("torchvision:"),
            options.task,
        )
        return replace(found, upright=options.upright)

    outside = None
    if options.outside:
        outside = replace(open_images(options.outside, options.group_column), upright=options.upright)
    tasks = []
    for number, source in enumerate(options.data):
        data = opened(source)
        train = options.train[number] if options.train else source if options.train_split else None
        variants: tuple[EvaluationSet, ...] = (data,)
        if options.templates and data.has_classes:
            variants = tuple(with_templates(data, each) for each in dict.fromkeys(options.templates))
        tasks.append(
            Task(
                variants[0],
                variants[1:],
                tuple(options.subgroups),
                outside,
                options.false_acceptance,
                None if train is None else labelled(opened(train, options.train_split or options.split, source)),
                labelled(opened(options.validation[number], beside=source)) if options.validation else None,
                tuple(sorted(set(options.shots))) if options.shots else None,
                tuple(options.seeds),
            )
        )
    if options.templates and not any(task.data.has_classes for task in tasks):
        raise ValueError("--templates are for classes, and all sets of --data have captions instead")
    if options.topk and all(task.data.task == "multilabel" for task in tasks):
        raise ValueError("--topk is for one label an image, or captions, and all sets of --data have several labels")
    if options.explain and not any(task.data.has_classes for task in tasks):
        raise ValueError("--explain maps mistaken classes, and all sets of --data have captions instead")
    if options.standard:
        labelled(tasks[options.data.index(options.standard)].data)
    return [_renamed(task, tasks, source) for task, source in zip(tasks, options.data, strict=True)]


def _renamed(task: Task, tasks: list[Task], source: str) -> Task:
    """Called by its source if another set has its name, since results are distinguished by it."""
    if sum(other.data.name == task.data.name for other in tasks) == 1:
        return task
    variants = tuple(replace(each, name=source) for each in task.variants)
    return replace(task, data=replace(task.data, name=source), variants=variants)


def told_of_prompts(data: Any, classnames: Sequence[str]) -> str:
    """The classes and prompts of a set, and where they came from."""
    from ..reports.tables import wordings

    classes, prompts = (some([repr(each) for each in texts], 10) for texts in (classnames, wordings(data.templates)))
    origins = f"(from {data.classnames_from})", f"({data.templates_from})"
    return printable(f"{data.name}: classes {classes} {origins[0]}; prompts {prompts} {origins[1]}")


def print_what_was_read(found: list[Result]) -> None:
    """What was left out, and what was asked, of each set once."""
    from ..evaluation.datasets.names import key_of_no_words
    from ..evaluation.zero_shot import told_of_same_names
    from ..reports.tables import wordings

    seen: set[Any] = set()
    for result in found:
        data, scores, shown_name = result.data, result.scores, printable(result.data.name)
        if data.name not in seen:
            _print_left_out(scores.unreadable)
        if result.outside is not None and result.outside.name not in seen:
            _print_left_out(result.outside.unreadable)
            seen.add(result.outside.name)
        names = scores.classnames
        if names and (asked := (data.name, data.templates_from, wordings(data.templates))) not in seen:
            print(told_of_prompts(data, names))
            seen.add(asked)
            if data.name not in seen and (key := key_of_no_words(names)):
                print(f"{shown_name}: its classes are called by {key}; --classnames gives them words", file=sys.stderr)
            for sentence in told_of_same_names(scores.same_prompts):
                print(f"{shown_name}: {sentence}", file=sys.stderr)
        seen.add(data.name)


def _print_left_out(problems: Sequence[str]) -> None:
    for problem in problems[:10]:
        print(f"left out: {printable(problem)}", file=sys.stderr)
    if problems[10:]:
        print(f"left out: {len(problems) - 10} more", file=sys.stderr)
