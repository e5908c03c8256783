"""The `miniclip` command: one function for each verb, which imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .files import user_errors

if TYPE_CHECKING:
    from rich.console import Console

    from . import suite
    from .datasets import EvaluationSet
    from .sources import Pairs


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def main(argv: list[str] | None = None) -> None:
    """Runs `miniclip VERB …`."""
    argv = sys.argv[1:] if argv is None else argv
    share_cores()
    parser = argparse.ArgumentParser(
        prog="miniclip",
        description="CLIP from scratch: pack pairs into shards, train on them, classify with words.",
        epilog="miniclip VERB --help tells more. `train` and `eval` are the scripts train.py and eval_zeroshot.py.",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"miniclip {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs.add_parser("shards", help="a folder or table of images and texts -> shards", add_help=False)
    verbs.add_parser("check", help="what training on some pairs would meet, before it starts", add_help=False)
    verbs.add_parser("train", help="train a CLIP on shards", add_help=False)
    verbs.add_parser("eval", help="zero-shot scores of a model on labelled images, and a report", add_help=False)
    verbs.add_parser("interpolate", help="weights between a model and its fine-tuned self (WiSE-FT)", add_help=False)
    verbs.add_parser(
        "report", help="the curves and numbers of a training run, or of several, as a page", add_help=False
    )
    verbs.add_parser("convert", help="a checkpoint -> another library's layout, verified", add_help=False)
    verbs.add_parser("info", help="what a checkpoint is: format, architecture, sizes, cost", add_help=False)
    verb = parser.parse_known_args(argv[:1])[0].verb
    functions = {"shards": shards, "check": check, "train": train, "eval": evaluate, "report": report}
    functions |= {"interpolate": interpolate, "convert": convert, "info": info}
    functions[verb](argv[1:])


def share_cores() -> None:
    """Has torch's threads sleep while they wait for each other; to be called before torch is imported.

    They would spin, and where cores are shared (with processes that decode, or other people's) take more time from
    them than their work does: encoding beside two decoders took twice the processor's time.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def train(argv: list[str]) -> None:
    """`miniclip train fit --config RUN.yaml [--any.field value]`"""
    from .trainer import main as train_main

    train_main(argv)


def shards(argv: list[str]) -> None:
    """`miniclip shards SRC OUT`"""
    parser = argparse.ArgumentParser(
        prog="miniclip shards",
        formatter_class=_Help,
        description="Packs image-text pairs into shards, which training reads.\n\n"
        "SRC is one of\n"
        "  a folder           images, each with a .txt of the same name beside it, one caption a line\n"
        "  a table            .csv, .tsv, .jsonl or .parquet with a column of image paths and one of captions\n"
        "  captions of COCO's captions_train2017.json and the like; --images names the folder of the images\n"
        "  a data set         of Hugging Face's datasets: its folder, or hf-hub:owner/name\n"
        "  shards             to shard them anew: resize, filter, hold out",
        epilog="OUT gets 00000.tar … (webdataset), an index, and rejected.csv, which says what was left out and why.\n"
        "Until all is done it is called OUT.partial; after a break the same command goes on where it was.\n\n"
        "examples:\n"
        "  miniclip shards photos shards --resize 256 --val-fraction 0.01\n"
        "  miniclip shards pairs.csv shards --caption-column title --images /data/photos\n"
        "  miniclip shards 'laion/{00000..00099}.tar' --index-only",
    )
    parser.add_argument("source", metavar="SRC", help="what to pack")
    parser.add_argument("out", metavar="OUT", nargs="?", help="folder to write; must not exist")
    _add_reading(parser, "reading")
    write = parser.add_argument_group("writing")
    write.add_argument("--resize", type=int, metavar="PIXELS", help="shrink images to this short side")
    write.add_argument("--quality", type=int, default=95, help="JPEG quality of shrunk images, 1 to 95")
    write.add_argument("--min-side", type=int, metavar="PIXELS", help="reject images with a shorter side")
    write.add_argument("--max-aspect", type=float, metavar="RATIO", help="reject images longer than this to 1")
    write.add_argument("--val-fraction", type=float, default=0.0, metavar="SHARE", help="hold out, into OUT/val")
    write.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="pairs in one tar")
    write.add_argument("--max-shard-size", type=_size, default="1GB", metavar="SIZE", help="as 500MB or 1GB")
    write.add_argument("--part", type=_part, default="1/1", metavar="I/N", help="for job arrays: every N-th shard")
    write.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="threads that decode")
    write.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    write.add_argument("--index-only", action="store_true", help="SRC holds tars already; write the index they lack")
    options = parser.parse_args(argv)
    with user_errors():
        if options.index_only:
            _index(options)
        elif options.out is None:
            raise ValueError("OUT is missing: the folder to write")
        else:
            _pack(options)


def _add_reading(parser: argparse.ArgumentParser, title: str) -> None:
    """The options that `_open_pairs` reads."""
    read = parser.add_argument_group(title)
    read.add_argument("--images", metavar="FOLDER", help="what a table's paths are relative to, if not its own folder")
    read.add_argument("--image-column", metavar="NAME", help="a table's column of images, if it is not found by name")
    read.add_argument(
        "--caption-column", metavar="NAME", action="append", default=[], help="of captions; may be repeated"
    )
    read.add_argument("--split", default="train", help="of a data set of Hugging Face's")


def _open_pairs(source: str, options: argparse.Namespace) -> Pairs:
    """Tells what was recognised, too."""
    from .shards import open_pairs

    pairs = open_pairs(
        source,
        images=options.images,
        image_column=options.image_column,
        caption_columns=options.caption_column,
        split=options.split,
    )
    print(f"{source}: {pairs.found}", file=sys.stderr)
    return pairs


def _index(options: argparse.Namespace) -> None:
    from .shards import index_shards, tar_locations

    with _progress("indexing", len(tar_locations(options.source))) as progress:
        done = index_shards(options.source, options.out, options.overwrite, progress)
    print(
        f"{options.out or options.source}: {done.kept} samples in {done.shards} shards, {done.size_bytes / 1e6:.1f} MB"
    )


def _pack(options: argparse.Namespace) -> None:
    from .shards import REJECTED_FILE, Packing, pack

    pairs = _open_pairs(options.source, options)
    packing = Packing(
        samples_per_shard=options.samples_per_shard,
        max_shard_bytes=options.max_shard_size,
        resize=options.resize,
        quality=options.quality,
        min_side=options.min_side,
        max_aspect=options.max_aspect,
        val_fraction=options.val_fraction,
    )
    with _progress("packing", -(-len(pairs) // max(1, options.part[1]))) as progress:
        packed = pack(
            pairs,
            options.out,
            source=options.source,
            packing=packing,
            part=options.part,
            workers=options.workers,
            overwrite=options.overwrite,
            progress=progress,
        )
    if packed.missing:
        print(
            f"part {options.part[0]} of {options.part[1]} is done; {options.out} comes when {packed.missing} more are"
        )
        return
    held_out = f" and {packed.held_out} held out" if packed.held_out else ""
    print(
        f"{options.out}: {packed.kept} pairs{held_out} in {packed.shards} shards, {packed.size_bytes / 1e6:.1f} MB; "
        f"{packed.rejected} rejected" + (f", see {Path(options.out) / REJECTED_FILE}" if packed.rejected else "")
    )


def _size(text: str) -> int:
    """Bytes from 500MB, 1GB or a plain number."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    unit = text[-2:].upper()
    try:
        return int(float(text[:-2]) * units[unit]) if unit in units else int(text)
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 500MB or 1GB") from error


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; write 1/8 for the first of eight")
    return int(number), int(count)


def check(argv: list[str]) -> None:
    """`miniclip check DATA`"""
    parser = argparse.ArgumentParser(
        prog="miniclip check",
        formatter_class=_Help,
        description="Looks at a random sample of image-text pairs and tells what training on them would meet: what\n"
        "can't be read, sizes of images, lengths of captions, captions and images that occur twice and what that\n"
        "does to the loss, and how many images/s a worker can feed.\n\n"
        "DATA is shards (a folder, a pattern as 'data/{00000..00009}.tar', a URL), or anything that `miniclip shards`\n"
        "packs: a folder, a table, captions of COCO's, a data set of Hugging Face's.",
        epilog="Nothing is written but the page of --out. The exit status is 1 if no sample can be used.\n\n"
        "examples:\n"
        "  miniclip check photos --out check.html\n"
        "  miniclip check shards --all --batch-size 1024 --needed 900\n"
        "  miniclip check shards --speed --workers 4",
    )
    parser.add_argument("data", metavar="DATA", help="shards, or what can be packed into them")
    parser.add_argument("--out", metavar="HTML", help="a page of all that is found, with some samples to look at")
    parser.add_argument("--overwrite", action="store_true", help="replace that page")
    parser.add_argument("--samples", type=int, default=2000, metavar="N", help="how many to look at")
    parser.add_argument("--all", action="store_true", help="look at every pair")
    parser.add_argument("--seed", type=int, default=0, help="decides which are looked at")
    plan = parser.add_argument_group("the training that is planned")
    plan.add_argument("--batch-size", type=int, default=256, metavar="B", help="pairs contrasted with each other")
    plan.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="side of the model's input")
    plan.add_argument("--context-length", type=int, default=77, metavar="TOKENS", help="most tokens of a text")
    plan.add_argument("--needed", type=float, metavar="IMAGES_PER_S", help="what the model consumes; tells the workers")
    speed = parser.add_argument_group("speed")
    speed.add_argument(
        "--speed", action="store_true", help="time the input pipeline by itself, stage by stage (shards)"
    )
    speed.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="threads that look; processes for --speed"
    )
    _add_reading(parser, "reading what is not packed yet")
    options = parser.parse_args(argv)
    with user_errors():
        if options.out and Path(options.out).exists() and not options.overwrite:
            raise ValueError(f"{options.out} exists already; pass --overwrite to replace it, or name another --out")
        _check(options)


def _check(options: argparse.Namespace) -> None:
    from .check import advice, examine, tables, time_pipeline, write_html
    from .shards import Shards, is_shards

    packed = is_shards(options.data)
    if options.speed and not packed:
        raise ValueError(f"--speed times how shards are read, and {options.data} is not packed yet (`miniclip shards`)")
    pairs = _open_pairs(options.data, options)
    samples = None if options.all else options.samples
    with _progress("looking", min(len(pairs), samples or len(pairs))) as progress:
        findings = examine(
            pairs,
            source=options.data,
            samples=samples,
            image_size=options.image_size,
            context_length=options.context_length,
            batch_size=options.batch_size,
            needed=options.needed,
            seed=options.seed,
            workers=options.workers,
            progress=progress,
        )
    pipeline = None
    if options.speed:
        pipeline = time_pipeline(
            Shards(options.data),
            image_size=options.image_size,
            context_length=options.context_length,
            workers=options.workers,
            seed=options.seed,
        )
    for table in tables(findings, pipeline):
        _console().print(table)
    for sentence in advice(findings):
        print(f"- {sentence}.")
    if options.out:
        write_html(options.out, findings, pipeline)
        print(f"page: {options.out}")
    if not findings.num_usable:
        raise SystemExit(1)


def evaluate(argv: list[str]) -> None:
    """`miniclip eval --model M … --data D …`"""
    parser = argparse.ArgumentParser(
        prog="miniclip eval",
        formatter_class=_Help,
        description="Scores CLIP models without training them: each class becomes prompts, and an image goes to the\n"
        "nearest; images with captions are found by them, and the other way round. Every model is scored on every\n"
        "set.\n\n"
        "MODEL is a folder that training wrote, or whatever else miniclip loads (ViT-B/32, a checkpoint of OpenAI's,\n"
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
        "  with --task retrieval        whatever can be trained on: images with captions\n\n"
        "Class names and prompts that lie with the data are used: classnames.txt and templates.txt (or, for prompts\n"
        "by class, templates.json) in the folder, TABLE.classnames.txt and TABLE.templates.txt by the table. What was\n"
        "used is printed, and is in results.json.",
        epilog="OUT gets report.html (open it in a browser), results.json (all numbers), results.csv (a row for each\n"
        "score), predictions/*.parquet (a row for each image), clip_benchmark/*.json (for `clip_benchmark build`).\n\n"
        "examples:\n"
        "  miniclip eval --model runs/digits/best --data my_photos --templates simple imagenet7 imagenet80\n"
        "  miniclip eval --model ViT-B/32 openclip:ViT-B-32/laion2b_s34b_b79k --data hf-hub:clip-benchmark/wds_cars\n"
        "  miniclip eval --model ViT-B/32 --data birds.parquet --label-column species --group-column photographer\n"
        "  miniclip eval --model ViT-B/32 --data photos --train more_photos --outside street_scenes\n"
        "  miniclip eval --model ViT-B/32 --data torchvision:CIFAR10 --root ~/data --download\n"
        "  torchrun --nproc_per_node 8 eval_zeroshot.py --model ViT-L/14 --data imagenet/val --classnames imagenet\n"
        "  miniclip eval --compare reports/before reports/after",
    )
    parser.add_argument("--model", nargs="+", default=[], metavar="MODEL", help="one or several models, as above")
    parser.add_argument("--data", nargs="+", default=[], metavar="DATA", help="one or several sets, as above")
    parser.add_argument("--out", help="folder for the results; default: reports/MODEL")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in that folder")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="instead: what changed between two results.json (or their folders), and whether by more than chance",
    )
    read = parser.add_argument_group("reading the data")
    read.add_argument(
        "--task", choices=("classification", "multilabel", "retrieval"), help="default: what the data are for"
    )
    read.add_argument("--split", metavar="NAME", help="part of sets that have several; default: test, else validation")
    read.add_argument("--label-column", metavar="NAME", help="column of labels; default: found by name and type")
    read.add_argument("--image-column", metavar="NAME", help="column of images; default: found by name and type")
    read.add_argument("--group-column", metavar="NAME", help="column that tells which images are not independent")
    read.add_argument("--root", default="data", metavar="DIR", help="where torchvision's sets are")
    read.add_argument("--download", action="store_true", help="let torchvision fetch what is not there")
    ask = parser.add_argument_group("what to ask")
    ask.add_argument("--classnames", help='"imagenet", or a file with one name a line, in label order')
    ask.add_argument(
        "--templates",
        nargs="+",
        default=[],
        metavar="SET",
        help='"simple", "imagenet7", "imagenet80", a file with one a line, or a .json of {class: [prompts]}; several '
        "are compared, at the cost of one look at the images",
    )
    ask.add_argument(
        "--topk", type=int, nargs="+", default=[1, 5], metavar="K", help="accuracies among the first K guesses"
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
        "--standard",
        metavar="DATA",
        help="the one of the sets that the others are shifts of: a table of robustness",
    )
    ask.add_argument(
        "--baselines", nargs="+", default=[], metavar="MODEL", help="of the models; their line is what to expect"
    )
    learn = parser.add_argument_group("learning from features: linear probe, neighbours, Tip-Adapter, few shots")
    learn.add_argument("--train", nargs="+", default=[], metavar="DATA", help="labelled images, for each set of --data")
    learn.add_argument("--train-split", metavar="NAME", help="instead: this part of the sets of --data")
    learn.add_argument(
        "--validation", nargs="+", default=[], metavar="DATA", help="to choose by; default: from --train"
    )
    learn.add_argument("--shots", type=int, nargs="+", metavar="K", help="images of each class; default: 1 2 4 8 16")
    learn.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="that draw the shots")
    _add_encoding(parser)
    parser.add_argument("--cache", metavar="DIR", help="where features are kept; default: ~/.cache/miniclip/features")
    parser.add_argument("--no-cache", action="store_true", help="keep no features")
    options = parser.parse_args(argv)
    with user_errors(), _processes(options.device) as device:
        if options.compare:
            _compare(*options.compare)
        else:
            _evaluate(options, device)


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that decode")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; default: a GPU if there is one")


@contextmanager
def _processes(device: str | None) -> Iterator[str | None]:
    """Joins the processes that torchrun or SLURM started, if there are several; the first alone prints and writes."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    import torch
    import torch.distributed as dist

    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    is_gpu = device != "cpu" and torch.cuda.is_available()
    if is_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("gloo")  # what is exchanged goes through the host's memory
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if dist.get_rank() else sys.stdout):
            yield f"cuda:{local_rank}" if is_gpu else device
    finally:
        dist.destroy_process_group()


def _compare(first: str, second: str) -> None:
    from .report import comparison_tables
    from .results import compare_runs

    for table in comparison_tables(compare_runs(first, second)):
        _console().print(table)


def _evaluate(options: argparse.Namespace, device: str | None) -> None:
    if not options.model or not options.data:
        raise ValueError("--model and --data are needed, at least one of each (or --compare A B)")
    called = "-".join(part for part in Path(options.model[0]).parts[-2:] if part not in ("/", "..", "."))
    out = Path(options.out or Path("reports") / (called if len(options.model) == 1 else "comparison"))
    if (out / "results.json").exists() and not options.overwrite:
        raise ValueError(f"{out} already holds results; pass --overwrite to replace them, or --out for another folder")
    for name in ("batch_size", "topk", "shots"):
        for value in values if isinstance(values := getattr(options, name), list) else [values]:
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")

    from . import report, results, suite
    from .embedding import FeatureCache
    from .models import open_model
    from .processes import place

    trials = _trials(options)
    cache = None if options.no_cache else FeatureCache(options.cache)
    for name in reversed(options.model):  # all of them, so that none is found wanting after an hour
        model = open_model(name, device)
    is_first = place()[0] == 0
    if is_first:
        out.mkdir(parents=True, exist_ok=True)  # likewise, if it can't be written
    found: list[suite.Result] = []
    for name in options.model:
        model = model if name == options.model[0] else open_model(name, device)
        for trial in trials:
            found += suite.evaluate(
                model,
                trial,
                ks=options.topk,
                batch_size=options.batch_size,
                num_workers=options.workers,
                cache=cache,
                progress=_progress if is_first else None,
            )
    if not is_first:
        return
    robustness = None
    if options.standard:
        standard = trials[options.data.index(options.standard)].data.name
        robustness = results.robustness(found, standard, options.baselines)
    for table in report.tables(found, robustness):
        _console().print(table)
    _tell(found)
    results.write_json(out / results.RESULTS_FILE, found, robustness)
    results.write_csv(out / results.TABLE_FILE, found)
    results.write_benchmark(out / results.BENCHMARK_FOLDER, found)
    try:
        results.write_predictions(out / results.PREDICTIONS_FOLDER, found)
    except ValueError as error:  # all else is worth having
        print(f"no predictions were written: {error}", file=sys.stderr)
    report.write_html(out / "report.html", found, robustness)
    print(f"report: {out / 'report.html'}")


def _trials(options: argparse.Namespace) -> list[suite.Trial]:
    """The data sets, each with what is asked of it."""
    from .datasets import LabelledImages, MultilabelImages, labelled, open_dataset, with_templates
    from .suite import Trial

    if options.train and options.train_split:
        raise ValueError("--train names other data, and --train-split a part of the same; give one of them")
    for name in ("train", "validation"):
        if getattr(options, name) and len(getattr(options, name)) != len(options.data):
            raise ValueError(f"--{name} has {len(getattr(options, name))} sets and --data {len(options.data)}")
    if options.validation and not (options.train or options.train_split):
        raise ValueError("--validation is for what is learnt from --train or --train-split")
    if options.false_acceptance is not None and not options.outside:
        raise ValueError("--false-acceptance is a share of the images of --outside, which is missing")
    if options.standard and options.standard not in options.data:
        raise ValueError(f"--standard {options.standard} is none of --data: {', '.join(options.data)}")
    if options.baselines and not options.standard:
        raise ValueError("--baselines are for the table of robustness, which needs --standard")
    if unknown := [name for name in options.baselines if name not in options.model]:
        raise ValueError(f"the baseline {unknown[0]} is none of --model: {', '.join(options.model)}")

    def opened(source: str, split: str | None = options.split, task: str | None = options.task) -> EvaluationSet:
        wordings = options.templates[0] if options.templates else None
        return open_dataset(
            source,
            None if task == "retrieval" else options.classnames,
            None if task == "retrieval" else wordings,
            options.group_column,
            split,
            options.label_column,
            options.image_column,
            Path(options.root).expanduser(),
            options.download and source.startswith("torchvision:"),
            task,
        )

    outside = open_dataset(options.outside) if options.outside else None
    trials = []
    for number, source in enumerate(options.data):
        data = opened(source)
        train = options.train[number] if options.train else source if options.train_split else None
        variants = ()
        if isinstance(data, LabelledImages | MultilabelImages):
            variants = tuple(with_templates(data, each) for each in options.templates[1:])
        trials.append(
            Trial(
                data,
                variants,
                tuple(options.subgroups),
                outside,
                options.false_acceptance,
                None if train is None else labelled(opened(train, options.train_split or options.split)),
                labelled(opened(options.validation[number])) if options.validation else None,
                tuple(sorted(set(options.shots))) if options.shots else None,
                tuple(options.seeds),
            )
        )
    names = [trial.data.name for trial in trials]
    if same := [name for name in names if names.count(name) > 1]:  # results are told apart by it
        for number, trial in enumerate(trials):
            if trial.data.name in same:
                renamed = replace(trial.data, name=options.data[number])
                variants = tuple(replace(each, name=options.data[number]) for each in trial.variants)
                trials[number] = replace(trial, data=renamed, variants=variants)
    return trials


def _tell(found: list[suite.Result]) -> None:
    """What was left out, and what was asked, of each set once."""
    from .report import wordings

    seen = set()
    for result in found:
        data, problems = result.data, result.scores.unreadable
        if data.name not in seen:
            for problem in problems[:10]:
                print(f"left out: {problem}", file=sys.stderr)
            if problems[10:]:
                print(f"left out: {len(problems) - 10} more, see results.json", file=sys.stderr)
        names = getattr(data, "classnames", ())
        if names and (data.name, data.templates_from) not in seen:
            prompts = f"{_some(wordings(data.templates))} ({data.templates_from})"
            print(f"{data.name}: classes {_some(names)} (from {data.classnames_from}); prompts {prompts}")
            seen.add((data.name, data.templates_from))
            if data.name not in seen and all(name.isdigit() for name in names):
                print(f"{data.name}: its classes are called by number; --classnames gives them words", file=sys.stderr)
            for same in result.same_prompts[:5]:
                print(
                    f"{data.name}: {len(same)} classes have the prompts of {same[0]!r}; all go to the first",
                    file=sys.stderr,
                )
        seen.add(data.name)
        if result.probes is not None and result.probes.splits.num_leaked:
            print(
                f"{data.name}: {result.probes.splits.num_leaked} of its images are training images as well, so "
                "scores of probes are too high",
                file=sys.stderr,
            )


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def report(argv: list[str]) -> None:
    """`miniclip report RUN …`"""
    parser = argparse.ArgumentParser(
        prog="miniclip report",
        formatter_class=_Help,
        description="Makes the page of a training run: curves of loss, accuracy, scores, rates, gradients, speed and\n"
        "memory over the samples seen, the numbers that they come to, what stands out, and the settings.\n\n"
        "Training makes it by itself when it ends; this makes it while a run is going on, or of one that was killed.\n"
        "Several runs are drawn over each other, with the settings in which they differ.",
        epilog="RUN is the folder that training was given as trainer.default_root_dir.\n\n"
        "examples:\n"
        "  miniclip report runs/digits\n"
        "  miniclip report runs/adamw runs/muon --out compare.html",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder")
    parser.add_argument("--out", metavar="HTML", help="the page; of one run RUN/report.html unless you name another")
    parser.add_argument("--overwrite", action="store_true", help="replace the page that --out names")
    options = parser.parse_args(argv)
    with user_errors():
        if options.out is None and len(options.runs) > 1:
            raise ValueError("of several runs the page needs a name: --out HTML")
        if options.out and Path(options.out).exists() and not options.overwrite:
            raise ValueError(f"{options.out} exists already; pass --overwrite to replace it, or name another --out")

        from .curves import PAGE_FILE, write_page

        out = options.out or Path(options.runs[0]) / PAGE_FILE
        write_page(out, options.runs)
        print(f"page: {out}")


def interpolate(argv: list[str]) -> None:
    """`miniclip interpolate START FINETUNED --data NEW --retain OLD --out DIR`"""
    parser = argparse.ArgumentParser(
        prog="miniclip interpolate",
        formatter_class=_Help,
        description="Saves (1 - alpha) * START + alpha * FINETUNED (WiSE-FT, Wortsman et al. 2021): less is forgotten\n"
        "than at the end of fine-tuning, and often nothing of the new task is lost. Scores of the start, the end and\n"
        "the models between on the new task and on what is to be retained are printed and drawn.",
        epilog="OUT gets the model (config.json, model.safetensors), interpolation.json and interpolation.png.\n\n"
        "examples:\n"
        "  miniclip interpolate ViT-B/32 runs/mine/best --data new.csv --retain old.csv --may-lose 1 --out wise\n"
        "  miniclip interpolate ViT-B/32 runs/mine/best --alpha 0.5 --out half",
    )
    parser.add_argument("start", metavar="START", help="the model that fine-tuning began with")
    parser.add_argument("finetuned", metavar="FINETUNED", help="the model that it ended with")
    parser.add_argument("--data", nargs="+", default=[], metavar="NEW", help="labelled images of the new task")
    parser.add_argument("--retain", nargs="+", default=[], metavar="OLD", help="labelled images of what it knew before")
    parser.add_argument(
        "--alphas", type=_shares, default="0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1", metavar="LIST", help="are scored"
    )
    parser.add_argument("--alpha", type=float, help="is saved; default: where the mean of new and old is highest")
    parser.add_argument(
        "--may-lose",
        type=float,
        metavar="POINTS",
        help="instead: highest on new, old losing at most so many points",
    )
    parser.add_argument("--out", required=True, metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in that folder")
    _add_encoding(parser)
    options = parser.parse_args(argv)
    with user_errors():
        _interpolate(options)


def _interpolate(options: argparse.Namespace) -> None:
    out = Path(options.out)
    if (out / "config.json").exists() and not options.overwrite:
        raise ValueError(f"{out} already holds a model; pass --overwrite to replace it, or name another --out")
    if bool(options.data) != bool(options.retain) or not (options.data or options.alpha is not None):
        raise ValueError("give --data and --retain to score the models between, or --alpha alone to save one unscored")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}; it must be at least 1")
    if options.may_lose is not None and (options.alpha is not None or not 0 <= options.may_lose <= 100):
        raise ValueError(f"--may-lose is {options.may_lose}; it is 0 to 100 points of top-1, and goes without --alpha")

    from . import finetune, weights
    from .datasets import labelled, open_dataset

    new, old = ([labelled(open_dataset(source)) for source in sources] for sources in (options.data, options.retain))
    start, _ = weights.load(options.start, device=options.device)
    finetuned, _ = weights.load(options.finetuned, device=options.device)
    model = None if options.alpha is None else finetune.interpolate(start, finetuned, options.alpha)
    alpha = options.alpha
    if new:
        alphas = sorted({0.0, 1.0, *options.alphas, *([] if alpha is None else [alpha])})
        with _progress("scoring", len(alphas)) as progress:
            points = finetune.sweep(
                start,
                finetuned,
                new,
                old,
                alphas,
                batch_size=options.batch_size,
                num_workers=options.workers,
                progress=progress,
            )
        if alpha is None:
            alpha = finetune.best(points, None if options.may_lose is None else options.may_lose / 100).alpha
            model = finetune.interpolate(start, finetuned, alpha)
        names = [data.name for data in new], [data.name for data in old]
        _console().print(finetune.table(points, *names, alpha))
        if options.alpha is None:
            print(
                f"alpha {alpha:g} was chosen on the very images that it is scored on here, so its score is a bit too "
                "good; choose it on others than those that you report."
            )
        finetune.write_json(out / "interpolation.json", options.start, options.finetuned, points, *names, alpha)
        picture = out / "interpolation.png"
        finetune.write_picture(picture, points, " and ".join(names[0]), " and ".join(names[1]), alpha)
        print(f"picture: {picture}")
    assert model is not None
    weights.save(model, out, overwrite=options.overwrite)
    print(f"model of alpha {alpha:g}: {out}; miniclip.load reads it")


def _shares(text: str) -> list[float]:
    """Numbers from 0 to 1, parted by commas."""
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers; write 0,0.25,0.5,1") from error
    if not all(0 <= number <= 1 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} are not all from 0, the start, to 1, the fine-tuned model")
    return numbers


_CHECKPOINTS = (
    "A checkpoint is OpenAI's archive or name (ViT-B/32), a state dict (.pt, .bin, .safetensors), a folder of Hugging\n"
    "Face's or OpenCLIP's, hf-hub:owner/name, a folder that miniclip wrote, or a .ckpt of its trainer."
)


def convert(argv: list[str]) -> None:
    """`miniclip convert SRC DST --to FORMAT`"""
    parser = argparse.ArgumentParser(
        prog="miniclip convert",
        formatter_class=_Help,
        description="Writes a checkpoint as another library loads it, then loads it back (with that library, too,\n"
        "where it is installed) and compares embeddings before it says done.\n\n" + _CHECKPOINTS,
    )
    parser.add_argument("source", metavar="SRC", help="a checkpoint")
    parser.add_argument("out", metavar="DST", help="a file for openai, a folder for the others")
    parser.add_argument("--to", required=True, choices=("native", "openai", "openclip", "hf"), help="the layout")
    parser.add_argument("--activation", choices=("gelu", "quick_gelu"), help="for a bare state dict that can't tell")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is there")
    options = parser.parse_args(argv)
    with user_errors():
        from .convert import convert as convert_checkpoint

        said = convert_checkpoint(
            options.source, options.out, options.to, overwrite=options.overwrite, activation=options.activation
        )
        print(f"{options.out}: {said}")


def info(argv: list[str]) -> None:
    """`miniclip info SRC`"""
    parser = argparse.ArgumentParser(prog="miniclip info", formatter_class=_Help, description=_CHECKPOINTS)
    parser.add_argument("source", metavar="SRC", help="a checkpoint")
    parser.add_argument("--activation", choices=("gelu", "quick_gelu"), help="for a bare state dict that can't tell")
    options = parser.parse_args(argv)
    with user_errors():
        from .convert import inspect

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


def _some(values: tuple[str, ...], most: int = 10) -> str:
    return ", ".join(map(repr, values[:most])) + (f" and {len(values) - most} more" if values[most:] else "")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and remaining time on a terminal, nothing elsewhere; give it the number done."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(what, total=total, rate="")
        begin = time.perf_counter()
        yield lambda done: bar.update(task, completed=done, rate=f"{done / (time.perf_counter() - begin):.0f}/s")


if __name__ == "__main__":
    main()
