"""`miniclip search INDEX "a red car"`: pictures of an index by words, by pictures, and by what is known of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...common.files import is_readable, standard_input
from ...common.wording import counted
from ..output import add_output, note, print_lines, results
from ..terminal import add_device, add_threshold, add_upright, lasting_imports, new_parser, progress_bar, utf8_text

if TYPE_CHECKING:
    from ...inference.search.index import Hit, Index

_NEAR = 0.95


def parser() -> argparse.ArgumentParser:
    parser = new_parser(
        "search",
        "Finds the pictures of an index (`miniclip index`) that are nearest to a query.\n\n"
        "A query is a text, or pictures (--like), or both: the unit vectors of the text and of the pictures are\n"
        "added, those of --minus and --unlike subtracted, and the sum is brought to length 1. Pictures are ordered by\n"
        "their cosine to it. `miniclip search INDEX red --like car.jpg` is: like this car, but red.",
        notes="A filter is a condition in SQL on the index's columns: those of the table that it was made from, and\n"
        "key, path, source. Texts stand in single quotes, names with capitals in `backquotes`.",
        examples="""
miniclip search photos.index "a red car"
miniclip search photos.index "in red" --like cat.jpg --minus "a street" --html red.html
miniclip search photos.index --like cat.jpg --like picture.jpg --topk 3 --json
miniclip search birds.index "a bird in flight" --where "species = 'bird' AND photographer LIKE 'p%'"
miniclip search photos.index "a red car" --paths | head -3 | xargs ls -l
ls photos | miniclip search photos.index - --csv
miniclip search photos.index --near-duplicates 0.97""",
    )
    parser.add_argument("index", metavar="INDEX", help="that `miniclip index` made: a folder or an s3:// URL")
    parser.add_argument(
        "text", nargs="*", type=utf8_text, metavar="TEXT", help="what is looked for; - reads a query a line"
    )
    ask = parser.add_argument_group("the query")
    ask.add_argument(
        "--like", action="append", default=[], metavar="IMAGE", help="add a picture; repeat it for several"
    )
    ask.add_argument("--minus", action="append", type=utf8_text, default=[], metavar="TEXT", help="subtract a text")
    ask.add_argument("--unlike", action="append", default=[], metavar="IMAGE", help="subtract a picture")
    ask.add_argument("--queries", metavar="FILE", help="a file with a text a line, each a query; - for standard input")
    ask.add_argument("--where", type=utf8_text, metavar="SQL", help="among pictures of which this holds, as below")
    ask.add_argument("--topk", type=int, default=10, metavar="K", help="pictures at most, for each query")
    ask.add_argument(
        "--near-duplicates",
        type=float,
        nargs="?",
        const=_NEAR,
        metavar="COSINE",
        help=f"instead: groups of pictures of which each has another at least as near as this ({_NEAR} by default); "
        "exact, over all pairs",
    )
    ask.add_argument("--exact", action="store_true", help="do not use the approximate index, where there is one")
    add_threshold(ask)
    parser.add_argument("--model", metavar="MODEL", help="where the index's model is, if it was moved")
    add_device(parser)
    add_upright(parser)
    add_output(parser)
    parser.add_argument("--paths", action="store_true", help="instead of a table: the paths alone, one a line")
    parser.add_argument("--html", metavar="FILE", help="write a page with thumbnails, too")
    return parser


def run(options: argparse.Namespace) -> None:
    _refuse_bad_query(options)
    texts = _asked_texts(options)
    with lasting_imports():
        from ...inference.search.index import Index
    opened = {"device": options.device, "precision": options.precision, "upright": options.upright or None}
    index = Index(options.index, **opened)
    if options.model:
        index = Index(options.index, options.model, **opened)
    first = "group" if options.near_duplicates is not None else "query" if len(texts) > 1 else None
    facts = {} if options.paths else _names_in_results(index)
    with nullcontext() if options.paths else results(options, _columns(index, first, facts), not options.html) as write:
        if options.near_duplicates is not None:
            found = index.near_duplicates(options.near_duplicates, where=options.where, progress=progress_bar)
            titles: Sequence[Any] = range(1, len(found) + 1)
            note(f"{sum(map(len, found)):,} pictures in {counted(len(found), 'group')} of near duplicates")
        else:
            found, titles = _search(index, options, texts), texts
        if options.html:  # before what is printed: whoever reads that, as `head` does, may go before the end
            _write_sheet(options, index, [str(each or "") for each in titles], found)
        if write is None:
            print_lines(hit.path or hit.key for hits in found for hit in hits)
            return
        for title, hits in zip(titles, found, strict=True):
            for rank, hit in enumerate(hits, start=1):
                shown = {"rank": rank, "cosine": hit.cosine, "path": hit.path or hit.key}
                others = {column: hit.metadata.get(name) for name, column in facts.items()}
                write({"group": title, "query": title, **shown, **others})


def _refuse_bad_query(options: argparse.Namespace) -> None:
    if len(options.text) > 1:
        together = " ".join(options.text)
        raise ValueError(
            f"{len(options.text)} texts are given; one query stands in quotes ({together!r}), and several come from "
            "--queries FILE"
        )
    if options.text and options.queries:
        raise ValueError(f"the text {options.text[0]!r} and --queries {options.queries} are given; give one of them")
    asked = [
        *options.text,
        *options.like,
        *options.minus,
        *options.unlike,
        *([options.queries] * bool(options.queries)),
    ]
    if options.near_duplicates is not None and (asked or options.threshold):
        raise ValueError("--near-duplicates compares the pictures with each other, without a query or a threshold")
    if options.near_duplicates is None and not asked:
        raise ValueError('nothing is asked for: give a text ("a red car"), --like IMAGE, or --near-duplicates')
    if options.topk < 1:
        raise ValueError(f"--topk is {options.topk}; it must be at least 1")
    if options.paths and (options.json or options.csv or options.parquet):
        raise ValueError("--paths and another form of results are given; give one of them")
    if options.html and Path(options.html).exists():
        raise ValueError(f"{options.html} is already there; name another file for --html, or delete that one")


def _asked_texts(options: argparse.Namespace) -> list[str | None]:
    """The query, or the several of a file; None for one of pictures alone."""
    from ...data.reading.cells import decode_text, lines_in

    source = options.queries or ("-" if options.text == ["-"] else None)
    if source is None:
        return options.text or [None]
    if source == "-" and standard_input().isatty():
        raise ValueError("standard input is a terminal; pipe queries into it, one a line")
    if source != "-" and not is_readable(Path(source)):
        raise ValueError(f"--queries {source} is no file; it has a query a line")
    name = "standard input" if source == "-" else source
    data = standard_input().read() if source == "-" else Path(source).read_bytes()
    lines: list[str | None] = [line for line in lines_in(decode_text(data, name)) if line]
    if not lines:
        raise ValueError(f"{name} holds no query; each is a line")
    return lines


def _names_in_results(index: Index) -> dict[str, str]:
    """What the index's columns are called in results; those of an index from before may have names of results."""
    from ...inference.search.columns import column_names

    facts = column_names(index.store.metadata_columns)
    for name, shown in facts.items():
        if name != shown:
            note(f"note: column {name!r} of the index is {shown} in the results")
    return facts


def _columns(index: Index, first: str | None, facts: Mapping[str, str]) -> dict[str, type]:
    import pyarrow as pa

    def kind(name: str) -> type:
        column = index.store.schema.field(name).type
        numbers = {int: pa.types.is_integer, float: pa.types.is_floating, bool: pa.types.is_boolean}
        return next((each for each, holds in numbers.items() if holds(column)), str)

    leading: dict[str, type] = {first: int if first == "group" else str} if first else {}
    return {**leading, "rank": int, "cosine": float, "path": str, **{facts[name]: kind(name) for name in facts}}


def _search(index: Index, options: argparse.Namespace, texts: Sequence[str | None]) -> list[list[Hit]]:
    from ...inference.thresholds import find_threshold

    is_by_words = texts[0] is not None and not options.like and not options.unlike and not options.minus
    threshold = None
    if is_by_words or options.threshold is not None:  # what it was calibrated for are cosines to words
        threshold = find_threshold(options.model or index.store.facts.model, options.threshold)
    if threshold is not None:
        threshold.check_model(index.encoder)
        note(f"applied: {threshold}")
    if index.store.approximate is not None and not options.exact and not options.where:
        note(f"approximate, {index.store.approximate}; --exact compares all")
    found = index.search(
        None if texts[0] is None else [text for text in texts if text is not None],
        like=options.like,
        minus=options.minus,
        unlike=options.unlike,
        topk=options.topk,
        where=options.where,
        threshold=None if threshold is None else threshold.cosine,
        exact=options.exact,
    )
    found = [found] if texts[0] is None else found
    for text, hits in zip(texts, found, strict=True):
        if not hits:
            why = (
                "reaches the threshold"
                if threshold is not None
                else "is in the index" + " that fits" * bool(options.where)
            )
            note(f"nothing {why}" + (f": {text}" if len(texts) > 1 else ""))
    return found


def _write_sheet(
    options: argparse.Namespace, index: Index, titles: Sequence[str], found: Sequence[Sequence[Hit]]
) -> None:
    from ...common.storage import is_url
    from ...inference.search.index import CHANGED
    from ...inference.sources import image_set
    from ...reports.sheet import Entry, Section, write_sheet

    def link(hit: Hit) -> str | None:
        if hit.path is None or is_url(hit.path):
            return hit.path
        return Path(hit.path).as_uri()

    asked = []
    for sources, sign in ((options.like, "+"), (options.unlike, "−")):
        data = image_set(sources, upright=index.upright) if sources else ()
        asked += [Entry(partial(data.open, i), f"{sign} {data.key(i)}") for i in range(len(data))]  # type: ignore[union-attr]
    minus = "".join(f" − {text}" for text in options.minus)
    sections = []
    for title, hits in zip(titles, found, strict=True):
        entries = [
            Entry(
                partial(index.open, hit),
                hit.path or hit.key,
                hit.cosine,
                link(hit),
                {name: str(value) for name, value in hit.metadata.items() if value is not None},
                CHANGED if index.has_changed(hit) else "",
            )
            for hit in hits
        ]
        name = f"group {title}" if options.near_duplicates is not None else f"{title}{minus}" or "like these pictures"
        sections.append(Section(name, entries, asked))
    notes = [f"{len(index):,} pictures of {options.index}, model {index.store.facts.model}"]
    notes += [f"where {options.where}"] * bool(options.where)
    write_sheet(options.html, "Near duplicates" if options.near_duplicates is not None else "Search", notes, sections)
    note(f"page: {options.html}")
