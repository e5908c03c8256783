"""A text file or a table's cell -> captions, or a picture."""

from __future__ import annotations

import ast
import base64
import binascii
import codecs
import io
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image

from ...common.storage import is_url
from ...common.wording import cut_short, some
from .scan import IMAGE_SUFFIXES, holds_picture

CAPTION_COLUMNS = (
    "caption", "captions", "title", "text", "texts", "description", "sentences", "sentence", "alt_text", "txt",
    "comment",
)  # fmt: skip
NUMBERED_CAPTION = re.compile(r"((?:caption|title|text|sentence|description|comment)s?)[_ ]?\d+")
IMAGE_COLUMNS = (
    "filepath", "image", "image_path", "path", "file", "filename", "file_name", "image_name", "img", "jpg", "jpeg",
    "png", "webp", "image_url", "url", "images",
)  # fmt: skip
_PICTURES_NAME = re.compile(
    rf"\s*(?:\w+://\S+|[^\n]*(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))})(?:\#\d+)?)\s*", re.I
)
# What data bases, spreadsheets and programs write for a cell that has no value, or an error for one.
_NO_VALUES = {
    "nan", "NaN", "-nan", "<NA>", "#N/A", "#NA", "\\N", "#VALUE!", "#REF!", "#NAME?", "#DIV/0!", "#NULL!", "#NUM!",
}  # fmt: skip
# What they also write for it, and what may be a name: Namibia's NA, a class of none.
_NO_VALUES_OR_NAMES = {"None", "null", "NULL", "NA", "N/A", "n/a"}
_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_WRITTEN_LIST = re.compile(rf"\[\s*{_STRING}(?:\s*(?:,\s*)?{_STRING})*\s*(?:,\s*)?\]", re.S)
_WRITTEN_ARRAY = re.compile(r"(?:(?:np|numpy)\.)?(?:array|Index)\((\[.*\])(?:,\s*dtype=[^()]*)?\)", re.S)
_WRITTEN_WORDS = {"null": None, "None": None, "nan": None, "NaN": None, "true": True, "false": False}
# PostgreSQL quotes an element that is empty or the word NULL, or has spaces, braces, quotes, commas or backslashes.
_ELEMENT = r"""(?:"(?:[^"\\]|\\.)*"|[^ \t\n\r\v\f{}",\\]+)"""
_POSTGRES_ARRAY = re.compile(rf"\{{(?:{_ELEMENT}(?:,{_ELEMENT})*)?\}}", re.S)
_BOXES = re.compile(r"\d+(?:\s+-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?){4,}")  # a class and a box
_MOST_LETTERS = 2**18  # of a word; one of a hundred millions would be tokenized for an hour
_ANSWERING = ("gpt", "assistant", "model", "bot")
_WIDTHLESS = "\ufeff\u200b"  # of byte order, and zero-width spaces
_WRITTEN_PIXELS = re.compile(r"[\[\s]*\d{1,3}(?:[\s,;]+\d{1,3}){63,}[\]\s]*")
_MOST_OF_PATH = 4096
_BASE64 = re.compile(r"(?:data:[\w/+.;=-]*,)?\s*([A-Za-z0-9+/_\s-]{64,}={0,2})\s*")
_FILLING = re.compile(rb"\0{4,}|\0+(?=\r?\n(?!\0)|\Z)")  # the line feed of UTF-16 has a zero of its own
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NO_TEXTS = {  # how a file begins: what it is, whatever its name says
    b"PK\3\4": "a zip archive, as workbooks of Excel and of LibreOffice are: save the sheet as CSV in UTF-8",
    b"\xd0\xcf\x11\xe0": "a document of Microsoft's old kind, as Excel's .xls: save the sheet as CSV in UTF-8",
}


def refuse_equal_names(columns: Sequence[str], path: PurePath) -> None:
    """
    Raises:
        ValueError: two columns of a table have one name.
    """
    if twice := {name for name, count in Counter(columns).items() if name and count > 1}:
        raise ValueError(f"{path} has several columns called {', '.join(map(repr, sorted(twice)))}")


def encoding_of(data: bytes) -> str:
    """What a text's byte order mark says of its encoding; UTF-8 without one."""
    return next((encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")


def decode_text(data: bytes, name: object) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises:
        ValueError: another encoding, which nothing in the file names; or no text, whatever the file's name says.
    """
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if what := next((what for start, what in _NO_TEXTS.items() if data.startswith(start)), None):
            raise ValueError(f"{name} is no text but {what}") from error
        raise ValueError(f"{name} is not UTF-8 text: {error}. Save it as UTF-8") from error
    if encoding == "utf-8" and b"\0" in data and _is_every_other_byte_0(data):
        raise ValueError(
            f"{name} is not UTF-8 text: every other byte is 0, as in UTF-16, which lacks its byte order mark here. "
            "Save it as UTF-8"
        )
    return text.lstrip("\ufeff")  # tools that put a mark before another


def _is_every_other_byte_0(data: bytes) -> bool:
    """Or half of these at least, as other scripts than the Latin have characters between. Zeros that fill fields of
    fixed width up do not count, however many there are: long runs, and those before the end of a line."""
    data = _FILLING.sub(lambda run: b" " * (len(run[0]) % 2), data)  # the others stay on even or odd places
    return len(data) > 1 and max(data[::2].count(0), data[1::2].count(0)) * 4 > len(data)


def lines_in(text: str) -> list[str]:
    """The lines of a text file, blank ones too. Only line feeds and carriage returns end one: U+2028, form feeds and
    others are spaces within a caption."""
    lines = re.split(r"\r\n|\r|\n", text)
    return [one_line(line) for line in (lines if lines[-1] else lines[:-1])]


def captions_in(text: str) -> list[str]:
    """The captions of a text file, one a line that is not blank.

    Raises:
        ValueError: as `caption_lines`.
    """
    return [line for line in caption_lines(text) if line]


class NoCaptionsError(ValueError):
    """A file that was meant to hold something else than captions."""


def caption_lines(text: str) -> list[str]:
    """The lines of a text file as captions, blank ones too; what programs write for a missing one is blank. A list or
    a mapping that a program wrote holds captions as a table's cell does.

    Raises:
        ValueError: a text that stands beside pictures and is no caption, or a word of more letters than any has; a
            `NoCaptionsError` for a detector's boxes.
    """
    stripped = text.lstrip("\ufeff").strip()
    if reason := _no_captions(stripped):
        raise ValueError(f"its text is no caption but {reason}")
    lines = stripped.split("\n") if stripped[:1].isdigit() and "." in stripped else []  # boxes are shares of the sides
    if lines and all(_BOXES.fullmatch(line.strip()) for line in lines):
        raise NoCaptionsError(
            f"its text is no caption but numbers, as detectors label boxes ({lines[0].strip()[:40]}); put words there, "
            "or another folder beside"
        )
    if (value := _written_value(text.strip())) is not None:
        return texts_in(value)
    lines = lines_in(text)
    if any(line[:1] in ("[", "{") for line in lines):
        return [each for line in lines for each in (texts_in(line) or [""])]
    return ["" if _is_no_value(line) else _bounded(line) for line in lines]


def _no_captions(text: str) -> str:
    """What a text is that other programs put beside a picture; empty for captions."""
    if text.startswith("version https://git-lfs"):
        return "a pointer of Git LFS; `git lfs pull` fetches the text itself"
    if text.startswith("{\\rtf"):
        return "a document in RTF; save it as plain text"
    if re.match(r"<(!doctype|html|\?xml)\b", text[:20], re.I):
        return "a page or record in HTML or XML; write the caption alone"
    return ""


def one_line(text: str) -> str:
    """A caption without line breaks, with single spaces, and without the zeros that fill a field of fixed width up;
    nothing if no character of it can be seen."""
    text = " ".join(text.split()).rstrip("\0 ")
    return text if text.isprintable() or any(map(_is_visible, text)) else ""


def visible(text: str) -> str:
    """A name or label as `one_line` has it, without controls and the marks that have no width and no meaning."""
    seen = (c for c in one_line(text) if c not in _WIDTHLESS and unicodedata.category(c) != "Cc")
    return "".join(seen)


def has_no_value(cell: Any, may_be_name: bool = False) -> bool:
    """Whether a cell is empty, NaN, a text in which nothing can be seen, or what programs write for one of those.

    Args:
        may_be_name: None, null and NA are names, as a class may have them.
    """
    if isinstance(cell, str):
        return _is_no_value(cell.strip() if cell.isprintable() else visible(cell), may_be_name)
    return cell is None or (isinstance(cell, Number) and cell != cell)


def words_for_no_value(cells: Iterable[Any]) -> str:
    """The texts among cells that are taken for no value, and how often each comes, for a message; empty if none is."""
    words = Counter(cell.strip() for cell in cells if isinstance(cell, str) and has_no_value(cell) and cell.strip())
    return some([f"{text!r} ({count} times)" for text, count in words.items()]) if words else ""


def _is_no_value(text: str, may_be_name: bool = False) -> bool:
    """Of a text as `one_line` or `visible` has it."""
    return not text or text in _NO_VALUES or (not may_be_name and text in _NO_VALUES_OR_NAMES)


def text_of_cell(cell: Any) -> str | None:
    """A cell of any type as a text, equal for equal ones; None for one without a value."""
    if has_no_value(cell):
        return None
    if isinstance(cell, list | tuple | Mapping):
        return json.dumps(cell, ensure_ascii=False, default=str)
    return str(cell)


def _is_visible(character: str) -> bool:
    """False for spaces, controls (NUL) and formats (zero-width spaces, marks of byte order)."""
    return unicodedata.category(character) not in ("Zs", "Zl", "Zp", "Cc", "Cf")


def texts_in(value: Any) -> list[str]:
    """The captions of a cell: a text is one, paragraphs and all; a list holds several. Blank ones, and what
    programs write for a missing value ("nan", "None"), are none.

    Raises:
        ValueError: a mapping without a known field, of which nothing says which part is the caption; bytes that are
            no text; or a word of more letters than any has.
    """
    if not isinstance(value, str) and has_no_value(value):
        return []
    if isinstance(value, bytes | bytearray):
        return texts_in(decode_text(bytes(value), "its caption"))
    if isinstance(value, list) and value and all(isinstance(each, tuple) and len(each) == 2 for each in value):
        value = dict(value)  # as pyarrow has a map
    if isinstance(value, list | tuple | np.ndarray):
        return [text for part in _without_questions(value) for text in texts_in(part)]
    if isinstance(value, Mapping):  # COCO's, and the hub's copies of it: {"raw": …}
        known = [name for name in ("raw", *CAPTION_COLUMNS) if name in value]
        if known or not value:
            return [text for name in known[:1] for text in texts_in(value[name])]
        fields = ", ".join(map(repr, value))
        raise ValueError(f"its caption is a mapping of {fields}; which of them is the caption can't be known")
    text = str(value)
    if (found := _written_value(text.strip())) is not None:
        return texts_in(found)
    text = one_line(text)
    return [] if _is_no_value(text) else [_bounded(text)]


def _without_questions(parts: Sequence[Any] | np.ndarray) -> Sequence[Any] | np.ndarray:
    """The answer of a conversation, [{"from": "human", …}, {"from": "gpt", "value": …}] as LLaVA's; another list whole.

    Raises:
        ValueError: it has several answers, or none.
    """
    for speaker, words in (("from", "value"), ("role", "content")):
        if len(parts) and all(isinstance(part, Mapping) and speaker in part and words in part for part in parts):
            answers = [part[words] for part in parts if str(part[speaker]).lower() in _ANSWERING]
            if len(answers) != 1:
                raise ValueError(
                    f"its caption is a conversation with {len(answers)} answers; which describes the picture can't be "
                    "known"
                )
            return answers
    return parts


def _bounded(text: str) -> str:
    if len(text) > _MOST_LETTERS and len(word := max(text.split(), key=len)) > _MOST_LETTERS:
        begin = cut_short(word, 40)
        raise ValueError(
            f"its caption has a word of {len(word):,} letters ({begin}), and at most {_MOST_LETTERS:,} are read"
        )
    return text


def texts_in_cell(cell: Any) -> list[str]:
    """The captions of a table's cell: as `texts_in`, or those of an array that PostgreSQL wrote there.

    Raises:
        ValueError: as `texts_in`; or braces around one bare word, which a caption may have, or around fields and their
            values.
    """
    if isinstance(cell, bytes | bytearray):
        cell = decode_text(bytes(cell), "its caption")
    text = cell.strip() if isinstance(cell, str) else ""
    array = postgres_array(text)
    if array is None or array.has_numbers or _written_value(text) is not None:
        return texts_in(cell)
    if len(array.values) == len(array.bare) == 1 or array.has_fields:
        ways = (cut_short(json.dumps(values, ensure_ascii=False)) for values in (array.values, [text]))
        raise ValueError(
            f"its caption is {cut_short(text)}, which may be a list of PostgreSQL's or a text in braces; write as JSON "
            f"the list, {next(ways)}, or the text alone in a list, {next(ways)}"
        )
    return [caption for value in array.values for caption in texts_in(value)]


def _written_value(text: str) -> list[Any] | dict[str, Any] | None:
    """The list or mapping of texts that a cell's text was before it went through a CSV, as JSON, Python and NumPy write
    it, or the list of Python's b'bytes'; None for any other text, such as [a plate of food]."""
    if array := _WRITTEN_ARRAY.fullmatch(text):
        text = array[1]
    ends = text[:1] + text[-1:]
    if ends not in ("[]", "()", "{}") and not re.fullmatch(f"b{_STRING}", text, re.S):
        return None
    if _WRITTEN_LIST.fullmatch(text):  # with NumPy's spaces or Python's commas
        return [_unquoted(part) for part in re.findall(_STRING, text, re.S)]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = _value_in(ast.parse(text, mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
    if isinstance(value, bytes):
        return [value]
    return value if isinstance(value, list | dict) and _holds_texts(value) else None


@dataclass
class PostgresArray:
    """An array of one dimension as PostgreSQL writes it, of texts or numbers.

    Args:
        values: its elements; None for NULL.
        bare: those that stand without quotes.
    """

    values: list[str | None]
    bare: list[str]

    @property
    def has_numbers(self) -> bool:
        """Whether each of its elements is a number, as within [1, 2]."""
        return bool(self.bare) and all(value is None or _is_float(value) for value in self.values)

    @property
    def has_fields(self) -> bool:
        """Whether an element may be a field and its value."""
        return any(re.search("[:=]", each) for each in self.bare)


def postgres_array(text: str) -> PostgresArray | None:
    """None for any other text: one of an array's has no space outside of quotes."""
    if not _POSTGRES_ARRAY.fullmatch(text):
        return None
    values: list[str | None] = []
    bare: list[str] = []
    for each in re.findall(_ELEMENT, text[1:-1], re.S):
        is_bare = each[0] != '"' and each != "NULL"
        values.append(None if each == "NULL" else re.sub(r"\\(.)", r"\1", each if is_bare else each[1:-1], flags=re.S))
        bare += [each] if is_bare else []
    return PostgresArray(values, bare)


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _value_in(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name) and node.id in _WRITTEN_WORDS:
        return _WRITTEN_WORDS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value_in(node.operand)
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_value_in(each) for each in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {str(_value_in(k)): _value_in(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    raise ValueError(f"{ast.unparse(node)} is no value")


def _holds_texts(value: Any) -> bool:
    """Whether a list or mapping may hold captions: texts, missing ones, or mappings."""
    if isinstance(value, dict):
        return bool(value)  # `texts_in` refuses one without a known field
    if isinstance(value, list):
        return all(_holds_texts(each) for each in value)
    return value is None or isinstance(value, str | bytes) or value != value


def captions_of_facts(facts: Any, image: str = "") -> list[str]:
    """The captions in a sample's `.json`: in the first field of a known name that holds any; or a text, or a list of
    texts alone.

    Args:
        image: the name of the picture's file. A text that ends as it does, .jpg, is the name of a file and no caption:
            Google's albums have it for a title, before it was cut or numbered.
    """
    suffix = PurePath(image).suffix.lower()
    if isinstance(facts, str) or (isinstance(facts, list) and all(isinstance(each, str) for each in facts)):
        return texts_in(facts)
    if isinstance(facts, Mapping):
        for name in CAPTION_COLUMNS:
            texts = texts_in(facts.get(name))
            if texts := [text for text in texts if text != image and not (suffix and text.lower().endswith(suffix))]:
                return texts
    return []


def _unquoted(text: str) -> str:
    try:
        return str(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return text[1:-1]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def names_picture(text: str) -> bool:
    """Whether a text is written as the name of a picture: a URL, or a path with a picture's suffix (perhaps Flickr's
    number of a caption, #0)."""
    return _PICTURES_NAME.fullmatch(text) is not None


def picture_in(cell: Any) -> bytes | str:
    """The picture of a cell: its bytes (stored, in base64, or made from an array of pixels), else its path or URL.

    Raises:
        ValueError: no picture, or several, or a value of another kind.
    """
    if isinstance(cell, Mapping):  # as Hugging Face's data sets store images
        if cell.get("bytes"):
            return picture_in(cell["bytes"])
        if "path" not in cell and "bytes" not in cell:
            raise ValueError(f"a mapping of {', '.join(map(repr, cell))} is in the place of an image")
        cell = cell.get("path")
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        raise ValueError("no image in this row")
    if isinstance(cell, bytes | bytearray | memoryview):
        return bytes(cell) if holds_picture(bytes(cell[:32])) else from_base64(bytes(cell)) or bytes(cell)
    if isinstance(cell, list | tuple | np.ndarray):
        return _picture_of_list(cell)
    if not isinstance(cell, str | int | np.integer) or isinstance(cell, bool):
        raise ValueError(f"a value of type {type(cell).__name__} is in the place of an image")
    text = str(cell).strip()
    if not text:
        raise ValueError("no image in this row")
    if not is_url(text) and (data := from_base64(text)):
        return data
    if reason := why_no_path(text):
        raise ValueError(reason)
    return text


def why_no_path(text: str) -> str:
    """Why a cell's text is neither a path nor a URL, if it looks like none: pixels, as FER2013's, or a long text."""
    if _WRITTEN_PIXELS.fullmatch(text):
        count = len(re.findall(r"\d+", text))
        return f"a text of {count:,} numbers is in the place of an image; write the pixels into files"
    if len(text) > _MOST_OF_PATH and not is_url(text):
        return f"a text of {len(text):,} letters is in the place of an image ({cut_short(text, 40)})"
    return ""


def stored_picture(cell: str) -> Any:
    """The bytes of a picture, or Hugging Face's mapping of bytes and path, that a cell was before it went through a
    CSV; any other cell as it is."""
    if not cell.startswith(("{'bytes': ", "{'path': ", "b'", 'b"')):
        return cell
    value = _written_value(cell)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], bytes) and holds_picture(value[0][:32]):
        return value[0]
    return value if isinstance(value, dict) and value.keys() <= {"bytes", "path"} else cell


def from_base64(text: str | bytes) -> bytes | None:
    """The picture that a text holds in base64, as Chinese-CLIP's and LLaVA's tables do; None if it holds none."""
    if len(text) < 64:
        return None
    try:
        written = text.decode("ascii") if isinstance(text, bytes) else text
        # A picture's first bytes are looked at before all of a long text.
        head = re.sub(r"\s", "", written[: written.find(",") + 65 if written.startswith("data:") else 64])
        head = head[head.find(",") + 1 :].translate(str.maketrans("-_", "+/"))
        if not holds_picture(base64.b64decode(head[: len(head) // 4 * 4])[:32]):
            return None
        found = _BASE64.fullmatch(written)
        letters = re.sub(r"\s", "", found[1]).translate(str.maketrans("-_", "+/")) if found else ""
        return base64.b64decode(letters + "=" * (-len(letters) % 4)) if found else None
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None


def _picture_of_list(cell: Sequence[Any] | np.ndarray) -> bytes | str:
    is_pixels = isinstance(cell, np.ndarray) and cell.ndim > 1
    if not is_pixels and len(cell) and isinstance(cell[0], list | tuple | np.ndarray):
        is_pixels = True
    if is_pixels:
        return _png(cell)
    if len(cell) == 1:
        return picture_in(cell[0])
    if not len(cell):
        raise ValueError("no image in this row: an empty list")
    kind = type(cell[0]).__name__
    if isinstance(cell[0], int | float | np.number):
        raise ValueError(f"a list of {len(cell)} numbers is in the place of an image; pixels need rows and columns")
    raise ValueError(f"a list of {len(cell)} images ({kind}) is in one row; which one the caption means can't be known")


def _png(cell: Any) -> bytes:
    buffer = io.BytesIO()
    picture_of_pixels(cell).save(buffer, "PNG")
    return buffer.getvalue()


def picture_of_pixels(cell: Any) -> Image.Image:
    """The picture of H x W, H x W x C or C x H x W whole numbers from 0 to 255, or of booleans, which are black and
    white; C is 1, 3 or 4.

    Raises:
        ValueError: another shape, or other numbers.
    """
    try:
        if not isinstance(cell, np.ndarray):
            pixels = np.array([list(row) for row in cell])
        else:
            pixels = np.array(cell.tolist()) if cell.dtype == object else cell
    except (ValueError, TypeError) as error:
        raise ValueError("a list of lists of unequal lengths is in the place of an image") from error
    shape = " x ".join(map(str, pixels.shape))
    if pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    is_shape = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[-1] in (3, 4))
    if not is_shape or pixels.dtype.kind not in "iub" or not pixels.size or pixels.min() < 0 or pixels.max() > 255:
        raise ValueError(
            f"an array of {shape} values ({pixels.dtype}) is in the place of an image; pixels are whole numbers from 0 "
            "to 255 in H x W, H x W x 3 or 3 x H x W"
        )
    white = 255 if pixels.dtype.kind == "b" else 1
    return Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8) * np.uint8(white)))


def is_binary(value: Any) -> bool:
    """Whether a cell holds bytes, perhaps within a mapping or a list."""
    parts: Iterable[Any] = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return isinstance(value, bytes) or any(is_binary(part) for part in parts)
