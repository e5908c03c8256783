"""The `miniclip` command: one function for each verb, which imports what it needs when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .files import user_errors
from .terminal import Help, add_encoding, console, lasting_imports, progress_bar

if TYPE_CHECKING:
    from .sources import Pairs


def main(argv: list[str] | None = None) -> None:
    """Runs `miniclip VERB …`."""
    argv = sys.argv[1:] if argv is None else argv
    share_cores()
    parser = argparse.ArgumentParser(
        prog="miniclip",
        description="CLIP from scratch: pack pairs into shards, train on them, classify with words.",
        epilog="miniclip VERB --help tells more. `train` and `eval` are the scripts train.py and eval_zeroshot.py.",
        formatter_class=Help,
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
    with lasting_imports():
        from .trainer import main as train_main
    train_main(argv)


def shards(argv: list[str]) -> None:
    """`miniclip shards SRC OUT`"""
    parser = argparse.ArgumentParser(
        prog="miniclip shards",
        formatter_class=Help,
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

    with progress_bar("indexing", len(tar_locations(options.source))) as progress:
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
    with progress_bar("packing", -(-len(pairs) // max(1, options.part[1]))) as progress:
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
        formatter_class=Help,
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
    with lasting_imports():
        from .check import advice, examine, tables, time_pipeline, write_html
        from .shards import Shards, is_shards

    packed = is_shards(options.data)
    if options.speed and not packed:
        raise ValueError(f"--speed times how shards are read, and {options.data} is not packed yet (`miniclip shards`)")
    pairs = _open_pairs(options.data, options)
    samples = None if options.all else options.samples
    with progress_bar("looking", min(len(pairs), samples or len(pairs))) as progress:
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
        console().print(table)
    for sentence in advice(findings):
        print(f"- {sentence}.")
    if options.out:
        write_html(options.out, findings, pipeline)
        print(f"page: {options.out}")
    if not findings.num_usable:
        raise SystemExit(1)


def evaluate(argv: list[str]) -> None:
    """`miniclip eval --model M … --data D …`"""
    from .cli_eval import main as eval_main

    eval_main(argv)


def report(argv: list[str]) -> None:
    """`miniclip report RUN …`"""
    parser = argparse.ArgumentParser(
        prog="miniclip report",
        formatter_class=Help,
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
        formatter_class=Help,
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
    add_encoding(parser)
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

    with lasting_imports():
        from . import finetune, weights
        from .datasets import labelled, open_dataset

    new, old = ([labelled(open_dataset(source)) for source in sources] for sources in (options.data, options.retain))
    start, _ = weights.load(options.start, device=options.device)
    finetuned, _ = weights.load(options.finetuned, device=options.device)
    model = None if options.alpha is None else finetune.interpolate(start, finetuned, options.alpha)
    alpha = options.alpha
    if new:
        alphas = sorted({0.0, 1.0, *options.alphas, *([] if alpha is None else [alpha])})
        with progress_bar("scoring", len(alphas)) as progress:
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
        console().print(finetune.table(points, *names, alpha))
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
        formatter_class=Help,
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
        with lasting_imports():
            from .convert import convert as convert_checkpoint

        said = convert_checkpoint(
            options.source, options.out, options.to, overwrite=options.overwrite, activation=options.activation
        )
        print(f"{options.out}: {said}")


def info(argv: list[str]) -> None:
    """`miniclip info SRC`"""
    parser = argparse.ArgumentParser(prog="miniclip info", formatter_class=Help, description=_CHECKPOINTS)
    parser.add_argument("source", metavar="SRC", help="a checkpoint")
    parser.add_argument("--activation", choices=("gelu", "quick_gelu"), help="for a bare state dict that can't tell")
    options = parser.parse_args(argv)
    with user_errors():
        with lasting_imports():
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


if __name__ == "__main__":
    main()
