"""Class names and templates as people keep them in files -> a list in label order, or by the labels that a file gives
them; else a refusal.

| file                                     | names                                                         |
|------------------------------------------|---------------------------------------------------------------|
| one a line                               | as they stand                                                 |
| a list, in JSON, Python or YAML          | its texts; `classes = [...]` and lines of a list, too          |
| a mapping from labels: `{"0": "tench"}`  | by label, from 0; the second of `["n01440764", "tench"]`      |
| a mapping to labels: `{"tench": 0}`      | likewise; within `id2label`, `label2id`, `names`, `classes`   |
| numbered lines: `0: tench`, `tench: 0`   | by label, from 0                                              |
| WordNet's ids: `n01440764 tench, …`      | the first name of each, by id, or in order if they are sorted |
| with numbers: `n01440764 1 tench`        | by id                                                         |
| a table with a header                    | its column of names, by that of labels: `_label_column`       |
| either, with labels of another kind      | by label, if those of the data are among them                 |

Code is read as data and never run. What could be read in two ways is refused: a line that is not a name would shift the
label of every class after it.
"""

from __future__ import annotations

import ast
import csv
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...common.files import is_readable
from ...data.reading.cells import decode_text, visible
from ...data.reading.json_tables import RepeatedNameError, parse_json
from ...data.reading.scan import same_name
from ...data.reading.tables import named_separator
from ...data.reading.unique_keys import BoundedSafe, RepeatedKeyError, UniqueKeys

_NAME_COLUMNS = (
    "name", "names", "classname", "class_name", "classnames", "class", "classes", "label_name", "category",
    "categories", "text", "title", "description", "template", "templates", "prompt", "prompts",
)  # fmt: skip
_LABEL_COLUMNS = (
    "label", "labels", "id", "index", "idx", "class_id", "class_index", "label_id", "number", "no", "target",
)  # fmt: skip
_LIKE_LABELS = re.compile(
    r"#|(\w+_)?(id|idx|index|label|nr|no|num|number|code)\.?|(class|label|cat|category|train)id|gt|y"
)
_KEY_COLUMNS = ("folder", "directory", "dir", "key", "wnid", "synset")
_MAPPINGS = (
    "id2label", "label2id", "names", "classnames", "class_names", "classes", "labels", "categories", "templates",
)  # fmt: skip
# A line such as `{c} in the snow` is no code.
_CODE = re.compile(r"(?:#[^\n]*\n\s*)*(?:\w+\s*(?::[^=\n]*)?=\s*)?(?!\{c?\}.)[\[({]", re.DOTALL)
_QUOTED = re.compile(r"""(?:lambda\s+\w+\s*:\s*)?[rfu]{0,2}(['"]).*\1(?:\.format\(\w+\))?\s*,?""", re.I)
_NUMBERED = re.compile(r"(?P<label>\d+)\s*(?P<between>[:;)=\t|]|[.,](?!\d)|\s)\s*(?P<name>\S.*)")
_NUMBERED_AFTER = re.compile(r"(?P<name>.*?\S)\s*(?P<between>[:,;=\t|]|\s)\s*(?P<label>\d+)")
_CODE_OF_CLASS = re.compile(r"[A-Za-z]\d+")
_COMMENT = re.compile(r"#+( |$)|//|/\*|<!|;|%( |$)|--")
_TYPOGRAPHIC = re.compile(r"[“”„«‘’‚](?P<name>.+)[”“»’‘]\s*[,;]?")
_REMEDY = "write one name a line, or a JSON list of them"

Entry = str | Callable[[str], str]


def names_of(text: str, source: str, labels: Sequence[str] = ()) -> tuple[str, ...]:
    """The class names of a file's text in label order. The suffix of `source` and the text show the kind.

    Args:
        labels: those of the data; if all are names, the order of a table's rows says nothing.

    Raises:
        ValueError: none of the kinds above, or one that could be read in two ways.
    """
    found = _structure(text, source, "class names")
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], str):  # one class is none to tell apart
        line, found = found[0], re.split(r"[,;|\t]", found[0].rstrip(",;"))
        if any(re.search(r"""[][{}=<>"]|'$""", part.strip()) or part.count("(") != part.count(")") for part in found):
            raise ValueError(f"{source} holds the line {line[:60]!r}, which is code and no name; {_REMEDY}")
    return _valid_names(found, source, "class names", labels)


def keyed_names_of(text: str, source: str) -> dict[str, dict[str, str]]:
    """Names by what the file itself calls their classes: by each column of a table beside that of the names, and by
    either side of a mapping, if its values are all different. Numbers may be counts, but in a column that is called as
    one of labels.

    Returns:
        By where the keys stand: the names by key (as `keys_in` has them), sorted by key.

    Raises:
        ValueError: as `names_of`.
    """
    found = {}
    for where, values, names in _beside_names(_structure(text, source, "class names"), source):
        keys = keys_in(values)
        if all(keys) and len(set(keys)) == len(keys):
            named = dict(zip(keys, _valid_names(names, source, "class names"), strict=True))
            order = sorted(keys, key=int) if all(map(str.isdecimal, keys)) else sorted(keys)
            found[where] = {key: named[key] for key in order}
    return found


def keys_in(values: Iterable[Any]) -> list[str]:
    """Labels as texts that are equal for equal ones: 3, 03 and 3.0 are one label, where all are numbers."""
    values = list(values)
    numbers = [_label_in(value) for value in values]
    if None not in numbers:
        return [str(number) for number in numbers]
    return ["" if value is None else same_name(visible(str(value))) for value in values]


def spoken(name: str) -> str:
    """One spelling for folder names and lists of names: tiger_cat, Tiger cat."""
    return same_name(" ".join(name.replace("_", " ").casefold().split()))


def templates_of(text: str, source: str) -> tuple[str, ...] | dict[str, list[str]]:
    """Templates for all classes; or, of a mapping, the prompts of each class.

    Raises:
        ValueError: as `names_of`.
    """
    found = [text] if text.strip() in ("{}", "{c}") else _structure(text, source, "templates")
    if isinstance(found, Mapping):
        inner = next((found[name] for name in ("templates", "prompts") if name in found and len(found) == 1), None)
        if all(_label_in(key) is not None and isinstance(value, str) for key, value in found.items()):  # numbered lines
            inner = list(found.values())
        if not isinstance(inner, Sequence):
            return {str(name): prompts for name, prompts in found.items()}
        found = inner
    return _valid_names(found, source, "templates")


def read_text(path: str | Path) -> str:
    """A file's text.

    Raises:
        ValueError: no such file, or not text.
    """
    path = Path(path)
    if not is_readable(path):
        raise ValueError(f"{path} is a folder, not a file" if path.is_dir() else f"no file {path}")
    return decode_text(path.read_bytes(), path)


# ---------------------------------------------------------------------------------------------------------------------
# What a text holds: a list, a mapping, or rows


def _structure(text: str, source: str, what: str) -> Any:
    """A list of names, a mapping, or a list of records."""
    suffix = Path(source).suffix.lower()
    if not text.strip():
        raise ValueError(f"{source} is empty")
    if suffix in (".json", ".jsonl"):
        return _json(text, source)
    if suffix in (".yaml", ".yml"):
        return _yaml(text, source)
    separator, rest = named_separator(text)
    if separator or suffix in (".csv", ".tsv"):
        return _table(rest, source, separator or ("\t" if suffix == ".tsv" else ","), what)
    if suffix == ".py" or _CODE.match(text.strip()) or _is_program(text):
        return _code(text, source)
    return _known_mapping(text, source) or _lines(text, source, what)


def _json(text: str, source: str) -> Any:
    try:
        return parse_json(text)
    except RepeatedNameError as error:
        raise ValueError(f"{source}: {error}") from error
    except (ValueError, RecursionError) as error:
        try:
            return [parse_json(line) for line in text.split("\n") if line.strip()]
        except (ValueError, RecursionError):
            raise ValueError(f"{source} is not JSON: {error}") from error


def _yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, UniqueKeys)
    except RepeatedKeyError as error:
        raise ValueError(f"{source}: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())[:200]}") from error


def _known_mapping(text: str, source: str) -> Any:
    """The mapping of a text that is YAML and has `names:` or the like; None of plain lines, which may hold colons."""
    try:
        found = yaml.load(text, BoundedSafe) if re.match(r"(---|\w+\s*:)", text) else None
    except yaml.YAMLError:
        return None
    is_known = isinstance(found, Mapping) and any(isinstance(found.get(name), list | Mapping) for name in _MAPPINGS)
    return _yaml(text, source) if is_known else None


def _table(text: str, source: str, separator: str, what: str) -> Any:
    first_line = text.split("\n", 1)[0]
    if separator not in first_line:
        separator = next((each for each in "\t;|," if each in first_line), separator)
    try:
        rows = list(csv.reader(io.StringIO(text.strip("\r\n"), newline=""), delimiter=separator, strict=True))
    except csv.Error as error:
        raise ValueError(f"{source} is no table: {error}") from error
    rows = [row for row in rows if row or len(rows[0]) == 1]
    while not any(map(str.strip, rows[-1])):  # as Excel ends a table
        del rows[-1]
    if blank := next((number for number, row in enumerate(rows, 1) if not any(map(str.strip, row))), None):
        raise ValueError(f"{source} is blank in row {blank}; {_why_not_blank('rows', what)}")
    used = [n for n in range(len(rows[0])) if any(n < len(row) and row[n].strip() for row in rows)]  # Excel's id;name;;
    rows = [[row[n] for n in used if n < len(row)] + row[len(rows[0]) :] for row in rows]
    header = [cell.strip() for cell in rows[0]]
    if not any(_column_name(cell) in (*_NAME_COLUMNS, *_LABEL_COLUMNS) for cell in header if cell):
        if len(header) == 1:
            raise ValueError(
                f"{source} begins with {header[0][:60]!r}, which may be a header or the name of class 0; call the "
                "header 'name', or without one the file .txt"
            )
        raise ValueError(
            f"{source} has no column of names that is known by its header: {', '.join(map(repr, header))[:200]}; call "
            "it 'name', and that of the labels 'label'"
        )
    if bad := next((number for number, row in enumerate(rows, 1) if len(row) != len(header)), None):
        raise ValueError(f"{source}, row {bad} has {len(rows[bad - 1])} cells and the header {len(header)}")
    columns = ([_label_in(cell.strip()) for cell in column] for column in zip(*rows, strict=True))
    if len(rows) > 1 and any(None not in column and (_counts(column, 0) or _counts(column, 1)) for column in columns):
        raise ValueError(
            f"{source} begins with {separator.join(rows[0])[:60]!r}, whose number the rows below count on from, so "
            "it may be a row and no header; name the columns in a first line, label and name"
        )
    return [dict(zip(header, (cell.strip() for cell in row), strict=True)) for row in rows[1:]]


def _column_name(cell: Any) -> str:
    """Equal for Class Name, ClassName, class-name and class_name."""
    return re.sub(r"[\s_-]+|(?<=[a-z])(?=[A-Z])", "_", str(cell).strip()).lower()


def _is_called_as_labels(column: Any) -> bool:
    """Whether a column's header says that it holds labels or keys; pandas' index has none."""
    name = _column_name(column)
    return not name or name in (*_LABEL_COLUMNS, *_KEY_COLUMNS) or _LIKE_LABELS.fullmatch(name) is not None


def _is_program(text: str) -> bool:
    """Whether a text is Python that does more than to name things, as words in lines seem to do."""
    try:
        body = ast.parse(text.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    doing = ast.Import | ast.ImportFrom | ast.Assign | ast.ClassDef | ast.FunctionDef
    is_call = [isinstance(each, ast.Expr) and isinstance(each.value, ast.Call) and each.value.keywords for each in body]
    return any(isinstance(each, doing) or call for each, call in zip(body, is_call, strict=True))


def _code(text: str, source: str) -> Any:
    """A list or mapping in JSON or Python, perhaps assigned to a name. It is parsed, not run."""
    try:
        return parse_json(text)
    except RepeatedNameError as error:
        raise ValueError(f"{source}: {error}") from error
    except (ValueError, RecursionError):
        pass
    try:
        body = [each for each in ast.parse(text.strip()).body if not isinstance(each, ast.Import | ast.ImportFrom)]
        if len(body) > 1 and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            del body[0]  # a docstring
        if len(body) != 1 or not isinstance(body[0], ast.Expr | ast.Assign | ast.AnnAssign) or body[0].value is None:
            raise ValueError("it holds more than one list or mapping")
        _refuse_joined_texts(text.strip())
        return _literal(body[0].value)
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{source} begins with {text.strip()[:20]!r} as code does, and is no list or mapping of texts "
            f"({' '.join(str(error).split())[:150]}); {_REMEDY}"
        ) from error


def _refuse_joined_texts(code: str) -> None:
    """Python makes one text of two without a comma between them, which somebody forgot or NumPy does not print."""
    before = None
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.STRING and before:
            raise ValueError(f"no comma stands between {before[:30]} and {token.string[:30]}")
        if token.type not in (tokenize.NL, tokenize.COMMENT):
            before = token.string if token.type == tokenize.STRING else None


def _literal(node: ast.expr) -> Any:
    """The value of texts, numbers, lists and mappings; `lambda c: f"a photo of a {c}."` becomes a template."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_literal(each) for each in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        pairs = [(_literal(key), _literal(value)) for key, value in zip(node.keys, node.values, strict=True) if key]
        if len({str(key) for key, _ in pairs}) < len(pairs):
            raise ValueError(f"line {node.lineno}: a mapping has a key twice")
        return dict(pairs)
    if isinstance(node, ast.Lambda) and len(node.args.args) == 1:
        return _template(node.body, node.args.args[0].arg)
    if isinstance(node, ast.JoinedStr):
        return _template(node, None)
    raise ValueError(f"line {node.lineno}: {ast.unparse(node)[:60]}")


def _template(body: ast.expr, name: str | None) -> str:
    """The template that a function of the class name, or an f-string, makes."""
    if isinstance(body, ast.Constant) and isinstance(body.value, str):
        return body.value
    if isinstance(body, ast.JoinedStr):
        parts = []
        for part in body.values:
            if isinstance(part, ast.Constant):
                parts.append(str(part.value))
            elif isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name) and not part.format_spec:
                name = name or part.value.id
                parts.append("{}" if part.value.id == name else "")
            else:
                parts.append("")
        if "" not in parts:
            return "".join(parts)
    is_format = isinstance(body, ast.Call) and isinstance(body.func, ast.Attribute) and body.func.attr == "format"
    if is_format and isinstance(body.func.value, ast.Constant) and isinstance(body.func.value.value, str):  # type: ignore[attr-defined]
        return body.func.value.value  # type: ignore[attr-defined]
    raise ValueError(f"line {body.lineno}: {ast.unparse(body)[:60]}")


# ---------------------------------------------------------------------------------------------------------------------
# Lines


def _why_not_blank(parts: str, what: str) -> str:
    return f"the {parts} are the labels, so none may be blank" if what == "class names" else "take it out"


def _lines(text: str, source: str, what: str) -> Any:
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text.rstrip())]
    for number, line in enumerate(lines, 1):
        if not line:
            raise ValueError(f"{source} is blank in line {number}; {_why_not_blank('lines', what)}")
    if all(_QUOTED.fullmatch(line) for line in lines):  # copied from between the brackets of a list
        return _code("[" + ",\n".join(line.rstrip(", ") for line in lines) + "]", source)
    _refuse_comments(lines, source, what)
    _refuse_what_names_no_class(lines, source)
    lines = [_unquoted_line(line) for line in lines]
    if all(_TYPOGRAPHIC.fullmatch(line) for line in lines):
        lines = [_TYPOGRAPHIC.sub(r"\g<name>", line) for line in lines]
    if (listed := _listed_lines(lines)) is not None:
        return listed
    _refuse_header(lines, source)
    if separator := _separator_of_table(lines):
        return _table(text, source, separator, what)
    if all(re.match(r"n\d{8}\b", line) for line in lines):
        return _wordnet(lines, source)
    for kind in (_NUMBERED, _NUMBERED_AFTER):
        if len(lines) > 1 and all(kind.fullmatch(line) for line in lines):
            if (found := _numbered_lines(lines, kind, source)) is not None:
                return found
            break
    _refuse_code(lines, source)
    return lines


def _listed_lines(lines: list[str]) -> list[str] | None:
    """Lines that a comma, a semicolon or a bullet makes a list, without it."""
    if len(lines) == 1:
        return None
    for mark in ",;":
        if all(line.endswith(mark) for line in lines[:-1]) and not any(mark in line.rstrip(mark) for line in lines):
            return [line.rstrip(f"{mark} ") for line in lines]
    if all(re.match(r"[-*•] +\S", line) for line in lines):
        return [line[1:].strip() for line in lines]
    return None


def _separator_of_table(lines: list[str]) -> str | None:
    """What parts the columns of lines whose first one is a header."""
    for separator in (",", "\t", ";", "|", " "):
        are_known = [_column_name(cell) in (*_NAME_COLUMNS, *_LABEL_COLUMNS) for cell in lines[0].split(separator)]
        is_numbered = (
            separator != " " and _are_numbered(lines[1:], separator) and not _are_numbered(lines[:1], separator)
        )
        if len(are_known) > 1 and (all(are_known) or (any(are_known) and is_numbered)):
            return separator
    return None


def _refuse_comments(lines: list[str], source: str, what: str) -> None:
    if comment := next((n for n, line in enumerate(lines, 1) if _COMMENT.match(line)), None):
        would = f"the name of class {comment - 1}" if what == "class names" else "a template"
        raise ValueError(
            f"{source}, line {comment} looks like a comment ({lines[comment - 1][:60]!r}), and would be {would}; "
            + (_REMEDY if what == "class names" else "take it out")
        )


def _refuse_header(lines: list[str], source: str) -> None:
    first = _column_name(lines[0].rstrip(":"))
    is_header = first in (*_NAME_COLUMNS, "label", "labels", "species") and first not in ("text", "title")
    if len(lines) > 1 and (is_header or [line for line in lines if line.endswith(":")] == lines[:1]):
        raise ValueError(
            f"{source} begins with {lines[0]!r}, which may be a header or the name of class 0; call the file .csv if "
            "it is a header"
        )


def _refuse_code(lines: list[str], source: str) -> None:
    """Brackets, quotes and tabs, which no name has at its ends, or in it."""
    if tabbed := next((number for number, line in enumerate(lines, 1) if "\t" in line), None):
        raise ValueError(
            f"{source}, line {tabbed} has a tab ({lines[tabbed - 1][:60]!r}), which separates columns; name them in a "
            f"first line, label and name, or {_REMEDY}"
        )
    is_markup = all(re.fullmatch(r"<.+>", line) for line in lines)
    for number, line in enumerate(lines, 1):
        if is_markup or re.fullmatch(r"""(\w+\s*=\s*)?[\[\](){}],?|(['"]).*\2,""", line):
            raise ValueError(f"{source}, line {number} is {line[:60]!r}, which is code and no name; {_REMEDY}")


def _refuse_what_names_no_class(lines: Sequence[str], source: str) -> None:
    """Lines that a printout or another kind of list has between its names, or instead of them."""
    numbers = [re.fullmatch(r"(?:class|label|id)?\s*[#(\[]?(\d+)[)\]]?\s*[:=]?\s+\D.*", line, re.I) for line in lines]
    is_counting = [int(found[1]) for found in numbers if found] in (
        list(range(len(lines))),
        list(range(1, len(lines) + 1)),
    )
    for number, line in enumerate(lines, 1):
        what = ""
        if line in ("...", "…"):
            what = "stands where a printout leaves names out"
        elif line[0] == line[-1] == "|" and len(line) > 1:
            what = "is a row of a table in Markdown"
        elif line.startswith("/") or (line.endswith("/") and all(each.endswith("/") for each in lines)):
            what = "is a path"
        elif re.fullmatch(r"(Name: .*, )?(Length: \d+, )?dtype: [\w\[\]<>]+", line):
            what = "is the end of a printout of pandas"
        elif re.match(r"[d-][r-][w-][x-]", line):
            what = "is a row of a listing of files"
        elif len(lines) > 1 and is_counting and not _NUMBERED.fullmatch(line):
            what = f"holds a number that counts the lines: write '{number - 1}: NAME' for a label"
        if what:
            raise ValueError(f"{source}, line {number} ({line[:60]!r}) {what}; {_REMEDY}")


def _unquoted_line(line: str) -> str:
    """A name that a spreadsheet put in double quotes, as it does with one that holds a comma."""
    found = re.fullmatch(r'"((?:[^"]|"")*)"', line)
    return found[1].replace('""', '"') if found and re.search(r'[,;\t]|""', found[1]) else line


def _are_numbered(lines: Sequence[str], separator: str) -> bool:
    """Whether each line has a whole number in one of its cells."""
    cells = [[_label_in(cell.strip()) for cell in line.split(separator)] for line in lines]
    return bool(cells) and all(any(number is not None for number in each) for each in cells)


def _shortened(labels: list[int]) -> str:
    return ", ".join(map(str, labels[:8])) + (" …" if len(labels) > 8 else "")


def _wordnet(lines: list[str], source: str) -> list[dict[str, str]]:
    ids, names = [line[:9] for line in lines], [line[9:].strip(" \t:,;|=") for line in lines]
    if not all(names):
        raise ValueError(f"{source} holds WordNet's ids ({ids[0]}), which are no words to compare with; {_REMEDY}")
    refusal = ""
    if all(parts := [_NUMBERED.fullmatch(name) for name in names]):
        refusal = (
            f"{source} has WordNet's ids and numbers ({lines[0][:40]!r}); which of them are the labels can't be known: "
            f"{_REMEDY}, in label order"
        )
        numbers = [int(part["label"]) for part in parts if part]
        if not (_counts(numbers, 0) or _counts(numbers, 1)):  # which may be of the names
            raise ValueError(refusal)
        names = [part["name"].replace("_", " ") for part in parts if part]
    rows = [{"wnid": key, "name": name.split(",")[0].strip()} for key, name in zip(ids, names, strict=True)]
    return _Unordered(rows, refusal) if refusal else rows


class _Unordered(list[dict[str, str]]):
    """Records whose names can be known by their keys alone.

    Args:
        refusal: why they are in no order.
    """

    def __init__(self, rows: Iterable[dict[str, str]], refusal: str) -> None:
        super().__init__(rows)
        self.refusal = refusal


def _refuse_unsorted(
    rows: Sequence[Mapping[str, Any]], columns: Iterable[str], source: str, labels: Sequence[str]
) -> None:
    """Rows without labels are in label order, but for those with keys of their own (n01440764) in another order. Other
    codes are keys where the column is called so, or the data have such labels (A4 may be a road beside a name).
    """
    have_codes = bool(labels) and all(map(_CODE_OF_CLASS.fullmatch, labels))
    for column in columns:
        keys = [str(row.get(column)) for row in rows]
        are_wordnets = all(re.fullmatch(r"n\d{8}", key) for key in keys)
        are_codes = len(set(keys)) == len(keys) and all(map(_CODE_OF_CLASS.fullmatch, keys))
        are_keys = are_wordnets or (are_codes and (have_codes or _is_called_as_labels(column)))
        if are_keys and keys != sorted(set(keys)):
            what = "WordNet's ids" if are_wordnets else f"keys ({keys[0]!r} and others in column {column!r})"
            raise ValueError(
                f"{source} lists {what} in another order than the sorted one, or twice; whether labels follow the "
                f"lines or the keys can't be known: {_REMEDY}, in label order"
            )


def _numbered_lines(lines: list[str], kind: re.Pattern[str], source: str) -> dict[str, str] | None:
    """The names by their labels; None if the numbers belong to the names: 3 doors and 5 doors, level 0 and level 1."""
    parts = [found for line in lines if (found := kind.fullmatch(line))]
    labels = [int(part["label"]) for part in parts]
    names = [part["name"].strip().rstrip(",").strip("'\"") for part in parts]
    is_counting = sorted(labels) in (list(range(len(lines))), list(range(1, len(lines) + 1)))
    is_list = kind is _NUMBERED and min(labels) in (0, 1) and len(set(names)) == len(lines)
    is_marked = all(part["between"] != " " for part in parts)
    if is_list and not is_counting and not is_marked:
        raise ValueError(
            f"{source}: each line has a number ({lines[0][:40]!r}), and they are not 0, 1, 2 …: {_shortened(labels)}. "
            "Labels have no gaps; a JSON list keeps numbers in names"
        )
    if not (is_counting or is_list) or (kind is _NUMBERED_AFTER and len(set(names)) < len(names)):
        return None
    if not is_marked:
        raise ValueError(
            f"{source}: each line has a number ({lines[0][:40]!r}); whether it is the label or part of the name can't "
            f"be known. Write '0: {names[0][:30]}' for a label; a JSON list keeps numbers in names"
        )
    return dict(zip(map(str, labels), names, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# From what was found to names in order


def _valid_names(found: Any, source: str, what: str, labels: Sequence[str] = ()) -> tuple[str, ...]:
    values = _in_order(found, source, what, labels)
    texts = []
    for position, value in enumerate(values):
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{source}: entry {position} of the {what} is {str(value)[:60]!r}; each must be a text, and not empty"
            )
        if not (text := visible(value)):
            raise ValueError(f"{source}: entry {position} of the {what} has no character that can be seen ({value!r})")
        texts.append(same_name(text))
    if not texts:
        raise ValueError(f"{source} holds no {what}")
    return tuple(texts)


def _in_order(found: Any, source: str, what: str, data_labels: Sequence[str] = ()) -> Sequence[Any]:
    """The names of a list, a mapping or records, in the order of their labels."""
    if isinstance(found, _Unordered):
        raise ValueError(found.refusal)
    if isinstance(found, list | tuple):
        if found and all(isinstance(each, Mapping) for each in found):
            return _of_records(found, source, what, data_labels)
        return found
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{source} holds {type(found).__name__}; {_REMEDY}")
    if inner := _inner(found):
        names = _in_order(found[inner], source, what, data_labels)
        if (count := _label_in(found.get("nc"))) not in (None, len(names)):
            raise ValueError(f"{source} has {len(names)} {inner}, and its nc, the number of classes, is {count}")
        return names
    for labels, named in ((found.keys(), found.values()), (found.values(), found.keys())):
        if None in (numbers := [_label_in(label) for label in labels]):
            continue
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{source} gives one label to several names; {_REMEDY}")
        by_label = zip(numbers, named, strict=True)
        return _by_label({n: _name_in(name) for n, name in by_label if n is not None}, source)
    keys = ", ".join(repr(str(key)[:30]) for key in list(found)[:5])
    raise ValueError(
        f"{source} holds a mapping of {keys}; labels from 0, or those of the data, must be "
        f"its keys or its values, or {_REMEDY}"
    )


def _inner(found: Mapping[str, Any]) -> str:
    """The entry of a mapping that holds the names, as YOLO's `names`; empty if it is the mapping itself."""
    return next((name for name in _MAPPINGS if isinstance(found.get(name), list | tuple | Mapping)), "")


def _beside_names(found: Any, source: str) -> Iterator[tuple[str, Sequence[Any], Sequence[Any]]]:
    """What stands beside the names of a mapping or records, each with where that is, and the names.

    Of a mapping's two sides, numbers and codes beside words are no names.
    """
    if isinstance(found, list) and found and all(isinstance(each, Mapping) for each in found):
        name, known_labels, columns, numbers = _columns_of_records(found, source)
        names = [row.get(name) for row in found]
        for column in columns.values():
            is_count = column in numbers and column not in known_labels and not _is_called_as_labels(column)
            if column != name and not is_count:
                yield f"column {column!r}", [row.get(column) for row in found], names
    elif isinstance(found, Mapping) and (inner := _inner(found)):
        yield from _beside_names(found[inner], source)
    elif isinstance(found, Mapping):
        keys, values = list(found), list(found.values())
        names = [_name_in(value) for value in values]
        if all(isinstance(value, list | tuple) and len(value) == 2 for value in values):
            yield from (("its keys", keys, names), ("its ids", [value[0] for value in values], names))
        elif all(isinstance(value, str | int) for value in values):
            of_keys, of_values = (max(map(_likeness_to_words, side)) for side in (keys, values))
            if of_values and of_values >= of_keys:
                yield "its keys", keys, values
            if of_keys and of_keys >= of_values:
                yield "its values", values, keys


def _likeness_to_words(value: Any) -> int:
    """0 of a number, 1 of a code such as n01440764, 2 of what may be a word."""
    return 0 if _label_in(value) is not None else 1 if _CODE_OF_CLASS.fullmatch(str(value)) else 2


def _columns_of_records(
    rows: Sequence[Mapping[str, Any]], source: str
) -> tuple[str, list[str], dict[str, str], dict[str, list[int]]]:
    """Of records: the column of names, those known by their headers to hold labels, all by their plain names, and the
    numbers of those that hold whole numbers."""
    columns = {_column_name(name): name for row in rows for name in row}
    cells = {name: [_label_in(row.get(name)) for row in rows] for name in columns.values()}
    numbers = {name: [n for n in each if n is not None] for name, each in cells.items() if None not in each}
    known_names = [columns[known] for known in _NAME_COLUMNS if known in columns]
    known_labels = [columns[known] for known in _LABEL_COLUMNS if known in columns]
    # A column `class` of numbers beside one of names has the labels.
    name = next((each for each in known_names if each not in numbers), next(iter(known_names), None))
    if name is None and known_labels and known_labels[0] not in numbers:
        name = known_labels.pop(0)
    if name is None:
        raise ValueError(f"{source} has the columns {', '.join(columns)}; the one of names must be called 'name'")
    known_labels += [each for each in known_names if each in numbers and each != name]
    return name, known_labels, columns, numbers


def _of_records(rows: Sequence[Mapping[str, Any]], source: str, what: str, data_labels: Sequence[str]) -> Sequence[Any]:
    name, known_labels, columns, numbers = _columns_of_records(rows, source)
    if what == "templates":  # which are in no order
        label = next((each for each in (*known_labels, "") if each in numbers), None)
    else:
        label = _label_column({each: numbers[each] for each in numbers if each != name}, known_labels, source)
    if label is None:
        if unread := [each for each in (*known_labels, columns.get("", name)) if each != name]:
            raise ValueError(f"{source}: column {unread[0]!r} must hold the labels 0, 1, 2 …, or those of the data")
        names = {spoken(str(row.get(name))) for row in rows}
        if what == "class names" and not (data_labels and names >= set(map(spoken, data_labels))):
            _refuse_unsorted(rows, (each for each in columns.values() if each != name), source, data_labels)
        return [row.get(name) for row in rows]
    labels = numbers[label]
    if len(set(labels)) < len(labels):
        raise ValueError(f"{source}: column {label!r} has a label twice")
    if what == "templates":  # which are in no order
        return [row.get(name) for row in rows]
    return _by_label(dict(zip(labels, (row.get(name) for row in rows), strict=True)), source, f" in column {label!r}")


def _label_column(numbers: Mapping[str, list[int]], known: Sequence[str], source: str) -> str | None:
    """The column of labels, None if there is none. It counts the rows from 0, in whatever order, and is known by its
    header; else any column that does so, if its header is like one of labels (`category_id`, `#`) or the rows are more
    than two, as a column of 0 and 1 may say yes and no. If none counts from 0, one with such a header is taken, for its
    numbers to be refused, or pandas' index, which has no header.

    Args:
        numbers: the columns of whole numbers, without that of names.
        known: columns that are known by their headers, some of which may hold no numbers.

    Raises:
        ValueError: several may be meant, and order the rows differently. A column `label` is meant before all others.
    """
    found = [name for name in known if name in numbers]
    if found and _column_name(found[0]) in ("label", "labels"):
        return found[0]
    from_0, from_1 = ([name for name in numbers if _counts(numbers[name], first)] for first in (0, 1))
    others = [name for name in numbers if _column_name(name) and name not in known and len(numbers[name]) > 1]
    like_labels = [name for name in others if _LIKE_LABELS.fullmatch(_column_name(name))]
    counting = [name for name in others if name in from_0 and (name in like_labels or len(numbers[name]) > 2)]
    if fitting := [name for name in found if name in from_0]:
        candidates = fitting + [name for name in counting if name in like_labels]
    else:
        is_told = any(name in like_labels for name in counting)
        candidates = found + counting + [name for name in like_labels if name in from_1 and not is_told]
    candidates = candidates or [name for name in numbers if not _column_name(name)]
    order = {name: sorted(range(len(numbers[name])), key=numbers[name].__getitem__) for name in candidates}
    if other := [name for name in candidates if order[name] != order[candidates[0]]]:
        raise ValueError(
            f"{source} has numbers in the columns {candidates[0]!r} and {other[0]!r}, which differ; which of them are "
            "the labels can't be known: call that column 'label'"
        )
    return next((name for name in candidates if name in from_0), next(iter(candidates), None))


def _counts(numbers: Sequence[int | None], first: int) -> bool:
    """Whether the numbers are those from `first` on, in whatever order."""
    return set(numbers) == set(range(first, first + len(numbers)))


def _by_label(names: dict[int, Any], source: str, where: str = "") -> list[Any]:
    labels = sorted(names)
    if labels != list(range(len(names))):
        missing = next(n for n in range(len(names) + 1) if n not in names)
        what = f"label {missing} has no name" if labels[0] == 0 else f"they begin with {labels[0]}"
        raise ValueError(
            f"{source} has {len(names)} names with labels from {labels[0]} to {labels[-1]}{where}, which are not 0, 1, "
            f"2 …: {_shortened(labels)}; labels are 0, 1, 2 … with no gaps, or those of the data, and {what}"
        )
    return [names[label] for label in labels]


def _label_in(value: Any) -> int | None:
    """A label, also one that a program made a decimal number of (3.0; 3,0); None for what is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    found = re.fullmatch(r"(\d+)([.,](?!000$)0+)?", value, re.ASCII) if isinstance(value, str) else None
    return int(found[1]) if found else None


def _name_in(value: Any) -> Any:
    """A name, or the one in ImageNet's pairs of WordNet's id and name."""
    if isinstance(value, list | tuple) and len(value) == 2 and re.fullmatch(r"n\d{8}", str(value[0])):
        return str(value[1]).replace("_", " ")
    return value
