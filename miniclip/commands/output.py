"""Results on standard output: a table, JSON, CSV or Parquet, row by row. Notes go to standard error. No torch here.

JSON is one array with a row a line: every language reads it in one call, `jq '.[]'` takes it apart, and an array
without its end is noticed, while JSON Lines that break off look whole.
"""

from __future__ import annotations

import argparse
import codecs
import json
import math
import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TextIO

from ..common.files import atomic_write, csv_line, naming
from ..common.storage import without_secrets
from ..common.wording import printable

if TYPE_CHECKING:
    from ..data.reading.scan import LeftOut

DEFAULT_MODEL = "ViT-B/32"
MODELS = (
    "MODEL is a folder that training wrote, or another that miniclip loads (ViT-B/32, a checkpoint of OpenAI's,\n"
    "OpenCLIP's or Hugging Face's); or, with its own preprocessing and tokenizer, openclip:ARCHITECTURE/TAG,\n"
    "transformers:owner/name (a folder does, too), or python:FILE.py:FUNCTION, which runs your code."
)
IMAGES = (
    "IMAGES are files, folders, quoted patterns ('photos/**/*.jpg'), tables with a column of images (.csv, .tsv,\n"
    ".jsonl, .json, .parquet), shards, URLs, or - for standard input: names, one a line, or one picture's bytes."
)
Row = Mapping[str, Any]
_ROWS_BEFORE_WIDTHS = 500  # of a table, whose longest cells set the widths for all
_ROWS_AT_ONCE = 10_000  # of a Parquet file
_OUTPUT = "standard output"


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help="as above")


def add_output(parser: argparse.ArgumentParser) -> None:
    """How results are written; `results` reads the options."""
    group = parser.add_argument_group("results, on standard output; without any of these, a table")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--json", action="store_true", help="an array with an object for each row, in UTF-8 or ASCII")
    one.add_argument("--csv", action="store_true", help="comma-separated values, in UTF-8; file names as they are")
    one.add_argument("--parquet", metavar="FILE", help="a new Parquet file; - for standard output")


@contextmanager
def results(
    options: argparse.Namespace, columns: Mapping[str, type], is_all: bool = False
) -> Iterator[Callable[[Row], None]]:
    """A function that writes a row. To be entered before the work: what can't be written is refused here.

    Where the reader of a pipe has gone, as `head` goes, the command ends at its next row, quietly and with status 0.

    Args:
        columns: the names in order, with `str`, `int`, `float`, `bool`, `list` for a list of texts, or
            `list[float]`.
        is_all: nothing else comes of the command.

    Raises:
        ValueError: the Parquet file is there already, or its library is missing; or standard output is closed, and is
            asked for a form of results, or for all that there is.
    """
    if options.json or options.csv or options.parquet == "-" or (is_all and not options.parquet):
        refuse_closed()
    with ExitStack() as stack:
        if options.parquet:
            writer: _Writer = stack.enter_context(_parquet_writer(options.parquet, columns))
        else:
            kind = _Json if options.json else _Csv if options.csv else _Aligned
            writer = kind(columns)
        yield writer.write
        writer.end()


def print_lines(lines: Iterable[str]) -> None:
    """Lines without columns, as other commands read them; names of files keep their bytes.

    Raises:
        ValueError: standard output is closed.
    """
    refuse_closed()
    _set_encoding("utf-8", "miniclip.bytes")
    for line in lines:
        _print(line + "\n")
    _flush()


def note(text: str) -> None:
    print(printable(without_secrets(text)), file=sys.stderr, flush=True)


def note_left_out(left_out: Sequence[LeftOut]) -> None:
    """Counts what of the sources was no image or text, by reason."""
    from ..data.reading.scan import summary

    if left_out:
        note(f"note: {summary(left_out)}")


def note_unreadable(problems: Sequence[str], total: int) -> None:
    """Names every image that could not be read."""
    for problem in problems:
        note(f"left out: {problem}")
    if problems:
        note(f"note: {len(problems):,} of {total:,} images can't be read and are in no result")


# ---------------------------------------------------------------------------------------------------------------------
# Standard output


def _print(text: str) -> None:
    try:
        sys.stdout.write(text)
    except OSError as error:
        _end_or_name(error)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError as error:
        _end_or_name(error)


def _end_or_name(error: OSError) -> NoReturn:
    if isinstance(error, BrokenPipeError):
        _end_quietly()
    error.filename = _OUTPUT
    raise error


def refuse_closed() -> None:
    """For a command of which nothing else comes, before the work.

    Raises:
        ValueError: standard output is closed.
    """
    if sys.stdout is None or getattr(sys.stdout, "name", "") == os.devnull:  # which `print_in_any_encoding` puts there
        raise ValueError("standard output is closed, so results would be lost; name a file or a pipe for it")


def _end_quietly() -> NoReturn:
    """Ends the command whose reader has gone; what is still in the buffer would raise once more at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def _set_encoding(encoding: str | None, errors: str) -> None:
    if hasattr(sys.stdout, "reconfigure"):  # not what stands in its place in a notebook
        sys.stdout.reconfigure(encoding=encoding, errors=errors)


def _bytes_or_escapes(error: UnicodeError) -> tuple[bytes, int]:
    """Bytes of file names as they are; other lone halves of a character, which JSON may hold, as \\ud83d."""
    assert isinstance(error, UnicodeEncodeError)
    codes = map(ord, error.object[error.start : error.end])
    parts = [bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}".encode() for code in codes]
    return b"".join(parts), error.end


codecs.register_error("miniclip.bytes", _bytes_or_escapes)


class _Writer(Protocol):
    def write(self, row: Row) -> None: ...

    def end(self) -> None: ...


class _Json:
    def __init__(self, columns: Mapping[str, type]) -> None:
        # A terminal or a reader of the pipe in another encoding would show UTF-8 as other signs.
        self.is_ascii = codecs.lookup(sys.stdout.encoding or "utf-8").name != "utf-8"
        # Bytes of file names that are no UTF-8 become \udc.., which JSON reads back.
        _set_encoding("utf-8", "backslashreplace")
        self.columns, self.before = list(columns), "[\n"

    def write(self, row: Row) -> None:
        values = {name: plain(row.get(name)) for name in self.columns}
        _print(self.before + json.dumps(values, ensure_ascii=self.is_ascii, allow_nan=False))
        self.before = ",\n"

    def end(self) -> None:
        _print("\n]\n" if self.before == ",\n" else "[]\n")
        _flush()


class _Csv:
    def __init__(self, columns: Mapping[str, type]) -> None:
        _set_encoding("utf-8", "miniclip.bytes")
        self.columns, self.is_begun = list(columns), False

    def _begin(self) -> None:
        if not self.is_begun:  # not before there is a result: the work may fail
            _print(csv_line(self.columns))
            self.is_begun = True

    def write(self, row: Row) -> None:
        self._begin()
        _print(csv_line(_csv_cell(row.get(name)) for name in self.columns))

    def end(self) -> None:
        self._begin()
        _flush()


def _csv_cell(value: Any) -> Any:
    value = plain(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


class _Aligned:
    """Columns of equal width, without lines around them; what the terminal can't show is a question mark."""

    def __init__(self, columns: Mapping[str, type]) -> None:
        _set_encoding(None, "replace")
        self.columns = columns
        self.waiting: list[list[str]] = [list(columns)]
        self.widths: list[int] | None = None

    def write(self, row: Row) -> None:
        cells = [_cell_of(row.get(name)) for name in self.columns]
        if self.widths is not None:
            self._print(cells)
            return
        self.waiting.append(cells)
        if len(self.waiting) > _ROWS_BEFORE_WIDTHS:
            self._print_waiting()

    def _print_waiting(self) -> None:
        self.widths = [max(map(_width, column)) for column in zip(*self.waiting, strict=True)]
        for cells in self.waiting:
            self._print(cells)

    def _print(self, cells: Sequence[str]) -> None:
        assert self.widths is not None
        parts = []
        for cell, width, kind in zip(cells, self.widths, self.columns.values(), strict=True):
            space = " " * (width - _width(cell))
            parts.append(space + cell if kind in (int, float) else cell + space)
        _print("  ".join(parts).rstrip() + "\n")

    def end(self) -> None:
        if self.widths is None:
            self._print_waiting()
        _flush()


def _cell_of(value: Any) -> str:
    value = plain(value)
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return printable(text).replace("\n", "\\n")


def _width(text: str) -> int:
    """The columns of a terminal that a text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(bool(unicodedata.combining(character)) for character in text)


def plain(value: Any) -> Any:
    """A value as JSON has it: NumPy's numbers as Python's, and None for a number that is not finite."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Parquet


class _ParquetRows:
    def __init__(self, file: Any, columns: Mapping[str, type], name: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        types = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), list: pa.list_(pa.string())}
        types[list[float]] = pa.list_(pa.float64())
        self.schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
        with naming(name):
            self.writer = pyarrow.parquet.ParquetWriter(file, self.schema)
        self.rows: list[dict[str, Any]] = []
        self.table, self.name = pa.Table, name

    def write(self, row: Row) -> None:
        self.rows.append({name: _utf8(plain(row.get(name))) for name in self.schema.names})
        if len(self.rows) >= _ROWS_AT_ONCE:
            self._write_rows()

    def _write_rows(self) -> None:
        with naming(self.name):
            self.writer.write_table(self.table.from_pylist(self.rows, self.schema))
        self.rows = []

    def end(self) -> None:
        if self.rows:
            self._write_rows()
        with naming(self.name):
            self.writer.close()


def _utf8(value: Any) -> Any:
    """Bytes of a file name that are no UTF-8 are written as \\udc.., since Parquet's texts are UTF-8."""
    if isinstance(value, list):
        return [_utf8(each) for each in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


@contextmanager
def _parquet_writer(name: str, columns: Mapping[str, type]) -> Iterator[_ParquetRows]:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ValueError("--parquet needs pyarrow: pip install 'miniclip[eval]'") from error
    if name == "-":
        stdout: TextIO = sys.stdout
        if stdout.isatty():
            raise ValueError("--parquet - writes bytes, and standard output is a terminal; name a file")
        try:
            yield _ParquetRows(stdout.buffer, columns, _OUTPUT)
        except BrokenPipeError:
            _end_quietly()
        _flush()
        return
    if Path(name).exists():
        raise ValueError(f"{name} is already there; name another file for --parquet, or delete that one")
    with atomic_write(name) as file:
        yield _ParquetRows(file, columns, name)
