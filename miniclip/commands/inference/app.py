"""`miniclip app MODEL [INDEX]`: a local page to try a model on."""

from __future__ import annotations

import argparse
import signal
import threading
import webbrowser
from pathlib import Path

from ..output import MODELS, note
from ..terminal import add_device, add_upright, lasting_imports, new_parser


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "app",
        "Serves a page on this machine to try a model: drop or take a picture, write labels, see bars, compare\n"
        "prompts, see which part of the picture speaks for a word, search an index by words. A threshold in the\n"
        'model\'s folder makes "none of these". Nothing leaves the machine; other machines reach the page only with\n'
        "--host.\n\n"
        f"{MODELS}",
        notes="Pictures have at most 20 MB and are deleted with the page. Ctrl-C ends it.",
        examples="""
miniclip app runs/digits/best
miniclip app runs/digits/best photos.index --port 8000
miniclip app ViT-B/32 --open""",
    )
    parser.add_argument("model", metavar="MODEL", help="as above")
    parser.add_argument("index", metavar="INDEX", nargs="?", help="what `miniclip index` wrote with this model")
    parser.add_argument("--port", type=int, metavar="N", help="default: the first free one from 7860")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0 lets other machines in")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    add_device(parser)
    add_upright(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    if options.port is not None and not 0 < options.port < 65536:
        raise ValueError(f"--port is {options.port}; it must be from 1 to 65535")
    with lasting_imports():
        from ...evaluation.other_libraries import open_model
        from ...inference.app.answers import Answers
        from ...inference.app.page import served
        from ...inference.thresholds import find_threshold

    precision = options.precision
    if options.index is not None and precision is None:
        from ...inference.search.store import open_store

        precision = open_store(options.index).facts.precision
    encoder = open_model(options.model, options.device, precision)
    threshold = find_threshold(options.model)
    if threshold is not None:
        threshold.check_model(encoder)
    index = None
    if options.index is not None:
        from ...inference.search.index import Index, check_model

        index = Index(options.index, encoder, upright=options.upright or None)
        check_model(encoder, index.store)  # what is wrong with either is known before there is a page
    answers = Answers(encoder, threshold, index, _reports(Path(options.model)), options.upright)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    name = "/".join(Path(options.model).parts[-3:])
    with served(answers, f"miniclip · {name}", options.host, options.port) as address:
        if options.host not in ("127.0.0.1", "localhost", "::1"):
            note(f"note: everyone who reaches {options.host} can use this page; it has no password")
        print(f"{address} (Ctrl-C ends it)", flush=True)
        if options.open:
            webbrowser.open(address)
        try:
            ended.wait()
        except KeyboardInterrupt:
            note("ended")


def _reports(model: Path) -> tuple[tuple[str, Path], ...]:
    run = model.resolve().parent
    pages = (("Training", run / "report.html"), ("Scores", run / "report" / "report.html"))
    return tuple((title, page) for title, page in pages if model.is_dir() and page.is_file())
