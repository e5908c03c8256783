"""The `miniclip` command: which verb is asked for, and the file that runs it."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common.files import user_errors
from .terminal import Help, lasting_imports, new_parser, plain_warnings, print_in_any_encoding, utf8_text

# verb: its file, here or in inference/, and what it does. A file has `parser()`, and `run(options)` for what that
# parser reads; the file of `train`, whose parser is Lightning's and needs torch, has `main(argv)`.
VERBS = {
    "shards": ("shards", "a folder or table of images and texts -> shards"),
    "check": ("check", "what training on some pairs would meet, before it starts"),
    "doctor": ("doctor", "what is wrong with pairs: leaks, duplicates, captions that do not fit; lists to drop by"),
    "train": ("train", "train a CLIP on shards"),
    "eval": ("evaluate", "zero-shot scores of a model on labelled images, and a report"),
    "classify": ("inference.classify", "what pictures show, of classes named in words; sorts files by it"),
    "calibrate": ("inference.calibrate", 'the threshold for "none of these" that travels with a model'),
    "embed": ("inference.embed", "images or texts -> files of embeddings"),
    "index": ("inference.index", "pictures -> an index to search, brought up to date by running it again"),
    "search": ("inference.search", "pictures of an index by words, by pictures, and by what is known of them"),
    "explain": (
        "inference.explain",
        "what in a picture, and which words, a score hangs on: heat maps with their check",
    ),
    "app": ("inference.app", "a local page to try a model on"),
    "interpolate": ("interpolate", "weights between a model and its fine-tuned self (WiSE-FT)"),
    "report": ("report", "the curves and numbers of a training run, or of several, as a page"),
    "convert": ("convert", "a checkpoint -> another library's layout, verified"),
    "export": ("inference.export", "a model -> ONNX, torch.export or OpenVINO, proven on your pictures"),
    "push": ("inference.push", "a model and its card -> the hub"),
    "info": ("info", "what a checkpoint is: format, architecture, sizes, cost"),
}


def main(argv: list[str] | None = None, ends_process: bool = False) -> None:
    """Runs `miniclip VERB …`, by default with this process's arguments, and as its last act (`ends_process`)."""
    if argv is None:
        argv, ends_process = sys.argv[1:], True
    share_cores()
    print_in_any_encoding()
    parser = argparse.ArgumentParser(
        prog="miniclip",
        description="CLIP from scratch: pack pairs into shards, train on them, classify with words.",
        epilog="`miniclip VERB --help` explains a verb. train.py and eval_zeroshot.py run `train` and `eval`.\n"
        "\n"
        "examples:\n"
        "  miniclip shards photos shards\n"
        "  miniclip train fit --config configs/digits.yaml\n"
        "  miniclip eval --model runs/digits/best --data my_photos",
        formatter_class=Help,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, (_, purpose) in VERBS.items():
        verbs.add_parser(verb, help=purpose, add_help=False)
    verb = parser.parse_known_args(argv[:1])[0].verb
    if verb == "train" and argv[1:2] in ([], ["-h"], ["--help"]):
        _train_parser().parse_args(["--help"])
    with user_errors():
        _refuse_gone_folder()
        with lasting_imports(), _ending_at_once():
            module = importlib.import_module(f".{VERBS[verb][0]}", __package__)
    try:
        if verb == "train":
            module.main(argv[1:])
            return
        parser = module.parser()
        options = parser.parse_args(argv[1:])
        with user_errors(), plain_warnings():
            _refuse_empty(parser, options)
            module.run(options)
    finally:
        if ends_process and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # no tracebacks of libraries that are cleaning up


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """Ctrl-C ends the process without an exception, which libraries swallow while they are imported, and break."""

    def end(*_: object) -> None:
        os.write(2, b"Stopped.\n")
        os._exit(130)

    is_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _refuse_empty(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: an argument is empty, as of a variable of the shell's that is not set; as a path it would be the
            current folder. Texts are looked at where they are read.
    """
    for action in parser._actions:
        value = getattr(options, action.dest, None)
        may_be_empty = action.type is utf8_text or action.const == ""  # that of --save-threshold without a file
        if not may_be_empty and "" in (value if isinstance(value, list) else [value]):
            name = action.option_strings[-1] if action.option_strings else action.metavar
            raise ValueError(f"{name} is ''; leave it out or give it a value: the current folder is '.'")


def _refuse_gone_folder() -> None:
    """
    Raises:
        ValueError: the working folder was deleted, which libraries report as anything but that.
    """
    try:
        Path.cwd()
    except FileNotFoundError as error:
        raise ValueError("the working folder is gone; change to one that is there (cd)") from error


class _Version(argparse.Action):
    """As argparse's own, for a version that is looked up when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from ..common.version import __version__

        print(f"miniclip {__version__}")
        parser.exit()


def _train_parser() -> argparse.ArgumentParser:
    """For `miniclip train --help` alone, which need not wait for torch."""
    parser = new_parser(
        "train",
        "Trains a CLIP on shards of image-text pairs. Settings come from YAML files (--config) and from flags of the\n"
        "same names, which win. `miniclip train fit --help` lists them all.",
        notes="The run's folder, runs/NAME, gets checkpoints, logs, a page, and best/, which miniclip.load reads.",
        examples="""
miniclip train fit --config configs/digits.yaml
miniclip train fit --config configs/digits.yaml --name other --data.batch_size 512 --model.optimizer.lr 5e-4
miniclip train fit --config configs/digits.yaml --name other --ckpt_path last
miniclip train fit --config configs/digits.yaml --print_config""",
    )
    parser.add_argument("command", metavar="fit | validate", help="train, or score a checkpoint on the validation set")
    return parser


def share_cores() -> None:
    """Has torch's threads wait for each other for a moment, and then sleep; to be called before torch is imported.

    They would spin for milliseconds, and where cores are shared (with processes that decode, or other people's) take
    more time from them than their work does: encoding beside two decoders took twice the processor's time. If they
    slept at once, they would have to be woken for each layer: a single image in ViT-B/32 took 37.5 ms for 32.7.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # turns of GNU's OpenMP, some microseconds


if __name__ == "__main__":
    main()
