"""The `miniclip` command: which verb is asked for, and the file that runs it."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from ..common.version import __version__
from .terminal import Help, lasting_imports

# verb: the file here that has its `main`, and what it does
VERBS = {
    "shards": ("shards", "a folder or table of images and texts -> shards"),
    "check": ("check", "what training on some pairs would meet, before it starts"),
    "train": ("train", "train a CLIP on shards"),
    "eval": ("evaluate", "zero-shot scores of a model on labelled images, and a report"),
    "interpolate": ("interpolate", "weights between a model and its fine-tuned self (WiSE-FT)"),
    "report": ("report", "the curves and numbers of a training run, or of several, as a page"),
    "convert": ("convert", "a checkpoint -> another library's layout, verified"),
    "info": ("info", "what a checkpoint is: format, architecture, sizes, cost"),
}


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
    for verb, (_, purpose) in VERBS.items():
        verbs.add_parser(verb, help=purpose, add_help=False)
    file, _ = VERBS[parser.parse_known_args(argv[:1])[0].verb]
    with lasting_imports():
        run = importlib.import_module(f".{file}", __package__).main
    run(argv[1:])


def share_cores() -> None:
    """Has torch's threads sleep while they wait for each other; to be called before torch is imported.

    They would spin, and where cores are shared (with processes that decode, or other people's) take more time from
    them than their work does: encoding beside two decoders took twice the processor's time.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


if __name__ == "__main__":
    main()
