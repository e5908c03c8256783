"""The `miniclip` command: one function for each verb, which imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from . import __version__
from .files import user_errors


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def main(argv: list[str] | None = None) -> None:
    """Runs `miniclip VERB …`."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="miniclip",
        description="CLIP from scratch: pack pairs into shards, train on them, classify with words.",
        epilog="miniclip VERB --help tells more. `train` and `eval` are the scripts train.py and eval_zeroshot.py.",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"miniclip {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    verbs.add_parser("shards", help="a folder or table of images and texts -> shards", add_help=False)
    verbs.add_parser("train", help="train a CLIP on shards", add_help=False)
    verbs.add_parser("eval", help="zero-shot scores of a model on labelled images, and a report", add_help=False)
    verbs.add_parser("convert", help="a checkpoint -> another library's layout, verified", add_help=False)
    verbs.add_parser("info", help="what a checkpoint is: format, architecture, sizes, cost", add_help=False)
    verb = parser.parse_known_args(argv[:1])[0].verb
    {"shards": shards, "train": train, "eval": evaluate, "convert": convert, "info": info}[verb](argv[1:])


def train(argv: list[str]) -> None:
    """`miniclip train fit --config RUN.yaml [--any.field value]`"""
    from .training import main as train_main

    train_main(argv)


def shards(argv: list[str]) -> None:
    """`miniclip shards SRC OUT`"""
    parser = argparse.ArgumentParser(
        prog="miniclip shards",
        formatter_class=_Help,
        description="Packs image-text pairs into shards, which training reads.\n\n"
        "SRC is a folder with a .txt beside each image (one caption a line; sub-folders are fine), or a .csv or\n"
        ".tsv table with a column of image paths, relative to the table, and a column of captions.",
        epilog="OUT gets 00000.tar … (webdataset), an index, and rejected.csv, which says what was left out and why.",
    )
    parser.add_argument("source", metavar="SRC", help="folder, .csv or .tsv")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="pairs in one tar")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="shrink images to this short side")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality of shrunk images, 1 to 95")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="threads that decode")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    options = parser.parse_args(argv)
    with user_errors():
        from .shards import REJECTED_FILE, pack, read_pairs

        pairs = read_pairs(options.source)
        with _progress("packing", len(pairs)) as progress:
            packed = pack(
                pairs,
                options.out,
                source=options.source,
                samples_per_shard=options.samples_per_shard,
                resize=options.resize,
                quality=options.quality,
                workers=options.workers,
                overwrite=options.overwrite,
                progress=progress,
            )
        print(
            f"{options.out}: {packed.kept} pairs in {packed.shards} shards, {packed.size_bytes / 1e6:.1f} MB; "
            f"{packed.rejected} rejected" + (f", see {Path(options.out) / REJECTED_FILE}" if packed.rejected else "")
        )


def evaluate(argv: list[str]) -> None:
    """`miniclip eval --model M --data D …`"""
    parser = argparse.ArgumentParser(
        prog="miniclip eval",
        formatter_class=_Help,
        description="Zero-shot classification: each class becomes prompts, an image goes to the nearest.\n\n"
        "DATA is a folder with one sub-folder of images for each class, or a .csv or .tsv table with a column of\n"
        "image paths (relative to the table) and a column `label`. Class names and prompts beside it are used:\n"
        "classnames.txt and templates.txt in the folder, TABLE.classnames.txt and TABLE.templates.txt by the table.",
        epilog="example: miniclip eval --model runs/digits/best --data my_photos --templates imagenet7",
    )
    parser.add_argument("--model", required=True, help="a trained model's folder, or a .ckpt of the trainer")
    parser.add_argument("--data", required=True, nargs="+", help="one or several sets of labelled images")
    parser.add_argument("--classnames", help='"imagenet", or a file with one name a line, in label order')
    parser.add_argument("--templates", help='"simple", "imagenet7", "imagenet80", or a file with one a line')
    parser.add_argument("--group-column", metavar="NAME", help="column that tells which images are not independent")
    parser.add_argument("--out", default="reports/{model}", help="folder for results.json and report.html")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in that folder")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that decode")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; default: a GPU if there is one")
    options = parser.parse_args(argv)
    with user_errors():
        _evaluate(options)


def _evaluate(options: argparse.Namespace) -> None:
    model_name = "-".join(part for part in Path(options.model).parts[-2:] if part not in ("/", "..", "."))
    out = Path(options.out.replace("{model}", model_name))
    if (out / "results.json").exists() and not options.overwrite:
        raise ValueError(f"{out} already holds results; pass --overwrite to replace them, or --out for another folder")
    if options.batch_size < 1:
        raise ValueError(f"--batch-size is {options.batch_size}; it must be at least 1")

    from rich.console import Console

    from . import report, weights
    from .datasets import open_dataset
    from .evaluate import measure, zero_shot_scores

    datasets = [
        open_dataset(source, options.classnames, options.templates, options.group_column) for source in options.data
    ]
    model, preprocess = weights.load(options.model, device=options.device)
    for data in datasets:
        if len(data.classnames) < 2:
            raise ValueError(f"{data.name} has one class, {data.classnames[0]!r}; there is nothing to tell apart")
    out.mkdir(parents=True, exist_ok=True)  # found out now, and not after an hour, if it can't be written
    results = []
    for data in datasets:
        begin = time.perf_counter()
        with _progress(data.name, len(data)) as progress:
            scores = zero_shot_scores(
                model,
                preprocess,
                data,
                batch_size=options.batch_size,
                num_workers=options.workers,
                progress=progress,
            )
        results.append(report.Result(scores, measure(scores), time.perf_counter() - begin))
        for problem in scores.unreadable[:10]:
            print(f"left out: {problem}", file=sys.stderr)
        if scores.unreadable[10:]:
            print(f"left out: {len(scores.unreadable) - 10} more, see results.json", file=sys.stderr)
    Console(width=None if sys.stdout.isatty() else 120).print(report.table(options.model, results))
    for data in datasets:
        print(f"{data.name}: classes {_some(data.classnames)}; prompts {_some(data.templates)}")
    report.write_json(out / "results.json", options.model, results)
    report.write_html(out / "report.html", options.model, results)
    print(f"report: {out / 'report.html'}")


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
