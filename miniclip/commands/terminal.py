"""What the verbs have in common: a parser, options of encoding, tables and bars in the terminal. No torch here."""

from __future__ import annotations

import argparse
import codecs
import gc
import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..common.arguments import PRECISIONS
from ..common.storage import without_secrets
from ..common.wording import printable

if TYPE_CHECKING:
    from rich.console import Console


CHECKPOINTS = (
    "A checkpoint is OpenAI's archive or name (ViT-B/32), a state dict (.pt, .bin, .safetensors), a folder of Hugging\n"
    "Face's or OpenCLIP's, hf-hub:owner/name, a folder that miniclip wrote, or a .ckpt of its trainer."
)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are told where they say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def new_parser(verb: str, description: str, *, examples: str, notes: str = "") -> argparse.ArgumentParser:
    """The parser of `miniclip VERB`; its help ends with notes and with commands to copy, one a line."""
    lines = "".join(f"\n  {line}" for line in examples.strip().splitlines())
    parser = argparse.ArgumentParser(
        prog=f"miniclip {verb}",
        formatter_class=Help,
        description=description,
        epilog=f"{notes}\n\nexamples:{lines}".strip(),
    )
    parser.parse_args = parser.parse_intermixed_args  # type: ignore[method-assign] # names may stand behind options
    return parser


# What is printed for characters of ours that an encoding lacks.
_PLAIN_SIGNS = {"–": "-", "−": "-", "—": "-", "·": "-", "•": "*", "…": "...", "×": "x", "→": "->", "≥": ">="}


def print_in_any_encoding() -> None:
    """Standard output and error replace what their encoding lacks (ASCII in a container, a code page), and never raise.

    Signs of typography become plain ones, all else an escape such as \\u732b.
    """
    codecs.register_error("miniclip.plain", _in_plain_signs)
    for name in ("stdout", "stderr"):  # None where it was closed, as >&- does
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook's is not
            stream.reconfigure(errors="miniclip.plain")


def _in_plain_signs(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end]
    return "".join(_PLAIN_SIGNS.get(each, ascii(each)[1:-1]) for each in text), error.end


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Imports within it take a fifth less, and the process ends up to a second sooner.

    What is imported stays, so the collector of garbage is not to look through it: not while it grows, not at the end,
    and not in workers, where looking copies the pages that they share (https://docs.python.org/3/library/gc.html
    recommends freezing before a fork). It leaves everything alone that is there by then: this is for commands.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings meant for users come as a line of words, without the place in the code that gave them."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if category is UserWarning:
            print(f"note: {printable(without_secrets(str(message)))}", file=sys.stderr)
        else:
            shown(message, category, *place, **more)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # to programmers, of a picture that they do not name
        shown, warnings.showwarning = warnings.showwarning, show
        yield


def utf8_text(text: str) -> str:
    """The type of an argument that is read as words, in UTF-8 as files of them are. Paths may be any bytes.

    Raises:
        argparse.ArgumentTypeError: it has other bytes.
    """
    if not any("\ud800" <= sign <= "\udfff" for sign in text):
        return text
    try:
        return os.fsencode(text).decode()  # in a locale of ASCII, Python holds all other bytes as halves of characters
    except UnicodeError as error:
        raise argparse.ArgumentTypeError(f"{text!a} is not UTF-8 text: {error}. Give it as UTF-8") from error


def add_reading(parser: argparse.ArgumentParser) -> Any:
    """Which parts and columns of a labelled set; the group of options, for more."""
    read = parser.add_argument_group("reading the data")
    read.add_argument("--split", metavar="NAME", help="part of sets that have several; default: test, else validation")
    read.add_argument("--label-column", metavar="NAME", help="column of labels; default: found by name and type")
    read.add_argument("--image-column", metavar="NAME", help="column of images; default: found by name and type")
    read.add_argument("--group-column", metavar="NAME", help="images of one value are not independent")
    read.add_argument("--root", default="data", metavar="DIR", help="where torchvision's sets are")
    read.add_argument("--download", action="store_true", help="let torchvision fetch what is not there")
    return read


def add_encoding(parser: argparse.ArgumentParser, precision: bool = True) -> None:
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at once")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="processes that decode")
    add_device(parser, precision)


def add_device(parser: Any, precision: bool = True) -> None:
    """To a parser or a group of options; with `precision` also that."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; default: a GPU if there is one")
    if not precision:
        return
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the towers' products; bf16 takes half the time on CPUs with AVX512-BF16 or AMX and moves cosines by "
        "some 0.001. Default: float32, or what an index was made in",
    )


def add_upright(parser: argparse.ArgumentParser) -> None:
    """Its value is for `EvaluationSet.upright`."""
    parser.add_argument(
        "--upright",
        action="store_true",
        help="turn pictures as EXIF says that viewers show them; default: as they are stored, as CLIP is evaluated",
    )


def refuse_bad_encoding(options: argparse.Namespace) -> None:
    """Raises a ValueError for a number of `add_encoding` that is too small."""
    for name, least in (("batch_size", 1), ("workers", 0)):
        if (value := getattr(options, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")


def add_threshold(options: Any) -> None:
    """To a parser or a group of options; its value is for `inference.thresholds.find_threshold`."""
    options.add_argument(
        "--threshold",
        metavar="COSINE",
        help="below it a picture is none of these; or a file of calibrate's. Default: that in the model's folder",
    )


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache", metavar="DIR", help="where features are kept; default: ~/.cache/miniclip/features")
    parser.add_argument("--no-cache", action="store_true", help="keep no features")


def part_of_array(text: str) -> tuple[int, int]:
    """Type of an option for job arrays: 1/8 is the first of eight."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; write 1/8 for the first of eight")
    return int(number), int(count)


def console() -> Console:
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with status 1; `user_errors` ends the command quietly

    return Quiet(width=None if sys.stdout.isatty() else 160)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and remaining time if standard error is a terminal; give it the number done.

    Standard output is for results: it goes through the bar's console only where both are terminals, so that lines
    appear above the bar.
    """
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),
    )
    with bar:
        task = bar.add_task(printable(without_secrets(what)), total=total, rate="")
        begin = time.perf_counter()
        yield lambda done: bar.update(task, completed=done, rate=f"{done / (time.perf_counter() - begin):.0f}/s")
