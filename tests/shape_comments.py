"""Shape comments, as `x = f(y)  # (B, N, D)`, compared with the tensors that the code beside them makes when it runs.

`Source` finds the comments of a file, `recording` notes the shapes while code runs, and `Judge` compares the two. The
letters of a comment are bound for one call of a function: to what the test knows (`known`), to a local number or a
number of `self` of that name, or else to the first shape that they stand for. A comment may have several shapes, one
for each name that is assigned; one shape is that of all of them. What it may say:

    x = f(y)  # (B, N, D); anything else
    a, b = f(y)  # (B,), (N, 2 * D)
    def f(x):  # (B, 3, R, R) -> (B, E)
    # x is (B, N, 1 or D), y and z are (…, D)        a line of its own: names as they are before the next statement
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import Any

Dims = tuple[tuple[ast.expr, ...], ...]  # of a shape each dimension's alternatives
Sizes = tuple[int, ...]

_SHAPE = r"\(([^()]*,[^()]*)\)"
_GROUP = re.compile(rf"(?<![\w\])]){_SHAPE}")
_NAMED = re.compile(rf"((?:[\w.]+(?:, | and ))*[\w.]+) (?:is|are) {_SHAPE}")


# ---------------------------------------------------------------------------------------------------------------------
# What comments say


@dataclass(frozen=True)
class Comment:
    """One comment; `before` are the shapes of a signature's arguments, `names` those of a line of its own."""

    path: str
    line: int
    text: str
    shapes: tuple[Dims, ...] = field(compare=False)
    names: tuple[str, ...] = ()
    before: tuple[Dims, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


def dims_of(text: str, is_first: bool = True) -> Dims | None:
    """The dimensions of "B, H * W, 1 or N", or None if that is prose."""
    dims = []
    for dim in text.removesuffix(",").split(","):
        plain = dim.replace("·", "*").replace("²", "**2").replace("^", "**").replace("…", "...")
        try:
            dims.append(tuple(ast.parse(each.strip(), mode="eval").body for each in plain.split(" or ")))
        except SyntaxError:
            return None
    nodes = [node for each in dims for alternative in each for node in ast.walk(alternative)]
    allowed = (ast.BinOp, ast.operator, ast.Name, ast.Load, ast.Constant)
    is_shape = all(isinstance(node, allowed) for node in nodes)
    # Behind other words, two ordinary words in brackets are no shape.
    is_shape &= is_first or any(isinstance(n, ast.Constant) or len(getattr(n, "id", "")) == 1 for n in nodes)
    return tuple(dims) if is_shape and not any(re.fullmatch(r"[q-z]", getattr(n, "id", "")) for n in nodes) else None


def _shapes(text: str) -> tuple[Dims, ...]:
    """The first shape, and those that follow it directly."""
    shapes, end = list[Dims](), 0
    for match in _GROUP.finditer(text):
        if shapes and not re.fullmatch(r",? (?:and )?", text[end : match.start()]):
            break
        if dims := dims_of(match[1], is_first=bool(shapes) or not match.start()):
            shapes.append(dims)
            end = match.end()
    return tuple(shapes)


@dataclass
class Source:
    """A file's code, its comments, and the statement that each line belongs to."""

    path: str
    text: str
    trailing: dict[int, Comment] = field(default_factory=dict)  # by the first line of their statement
    leading: dict[int, list[Comment]] = field(default_factory=dict)  # by the first line of the next statement
    fields: dict[str, list[tuple[str, Comment]]] = field(default_factory=dict)  # of a class
    statements: dict[int, ast.stmt] = field(default_factory=dict)
    signatures: dict[int, int] = field(default_factory=dict)  # from a function's first decorator to its def

    @classmethod
    def of(cls, path: Path, text: str | None = None) -> Source:
        source = cls(str(path), path.read_text(encoding="utf-8") if text is None else text)
        owners: dict[int, str] = {}
        for node in ast.walk(ast.parse(source.text)):  # parents before children
            if isinstance(node, ast.stmt):
                source.statements |= dict.fromkeys(range(node.lineno, (node.end_lineno or 0) + 1), node)
            if isinstance(node, ast.FunctionDef):
                source.signatures[min(each.lineno for each in [*node.decorator_list, node])] = node.lineno
            if isinstance(node, ast.ClassDef):
                owners |= {each.lineno: node.name for each in node.body if isinstance(each, ast.AnnAssign)}
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            if token.type == tokenize.COMMENT:
                source._add(token.start[0], token.string.lstrip("#: "), token.line.lstrip().startswith("#"), owners)
        return source

    def _add(self, line: int, text: str, is_alone: bool, owners: dict[int, str]) -> None:
        if is_alone:
            for names, shape in _NAMED.findall(text):
                if dims := dims_of(shape):
                    comment = Comment(self.path, line, text, (dims,), tuple(re.split(r", | and ", names)))
                    following = next(n for n in itertools.count(line + 1) if n in self._first_lines())
                    self.leading.setdefault(following, []).append(comment)
            return
        left, _, right = text.rpartition("->")
        comment = Comment(self.path, line, text, _shapes(right.strip()), before=_shapes(left.strip()))
        if not comment.shapes:
            return
        statement = self.statements[line]
        if statement.lineno in owners:
            self.fields.setdefault(owners[line], []).append((statement.target.id, comment))  # type: ignore[attr-defined]
        else:
            self.trailing[statement.lineno] = comment

    def _first_lines(self) -> set[int]:
        return {statement.lineno for statement in self.statements.values()}

    def comments(self) -> list[Comment]:
        leading, of_classes = itertools.chain(*self.leading.values()), itertools.chain(*self.fields.values())
        return [*self.trailing.values(), *leading, *(comment for _, comment in of_classes)]


def padded(text: str, pattern: str) -> str:
    """The code that the pattern's first group finds in a text, at the lines where it stands there."""
    lines = [""] * (text.count("\n") + 1)
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        first = text[: match.start(1)].count("\n")
        code = match[1].removesuffix("\n").split("\n")
        lines[first : first + len(code)] = code
    return "\n".join(lines) + "\n"


def cells(page: Path, are_built: bool = False) -> Source:
    """The Python of a Markdown page, or what of it the site's build runs."""
    pattern = r"^```(?:\{code-cell\} )" + ("" if are_built else "?") + r"python\n(?::[^\n]*\n)*(.*?)^```"
    return Source.of(page, padded(page.read_text(encoding="utf-8"), pattern))


def examples(module: Path) -> Source:
    """The examples in the docstring that opens a file."""
    text = module.read_text(encoding="utf-8")
    lines = [line[4:] if line.startswith((">>> ", "... ")) else "" for line in text.splitlines()]
    return Source.of(module, "\n".join(lines) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# What was seen


@dataclass
class Call:
    """A call of a function: numbers by name, and what each comment in it stood beside."""

    numbers: dict[str, int] = field(default_factory=dict)
    seen: list[tuple[Comment, tuple[Dims, ...], list[list[Sizes]]]] = field(default_factory=list)


class _Recorder:
    def __init__(self, sources: Iterable[Source]) -> None:
        self.sources = {source.path: source for source in sources}
        self.calls: dict[str, Call] = {}  # equal ones once

    def enter(self, frame: FrameType, event: str, _: Any) -> Any:
        source = self.sources.get(frame.f_code.co_filename)
        if source is None or re.match("<(?!module)", frame.f_code.co_name):
            return None
        call, last = Call(), None
        if signature := source.trailing.get(source.signatures.get(frame.f_code.co_firstlineno, 0)):
            _note(call, frame, signature, signature.before, _arguments(frame))

        def follow(frame: FrameType, event: str, value: Any) -> Any:
            nonlocal last
            if event == "exception":
                last = None
            elif event in ("line", "return"):
                here = source.statements.get(frame.f_lineno) if event == "line" else None
                if last is not None and last is not here:
                    self.leave(source, call, frame, last, value)
                for comment in source.leading.get(frame.f_lineno, []) if event == "line" else []:
                    _note(call, frame, comment, comment.shapes, [_value(frame, name) for name in comment.names])
                last = here
            if event == "return":
                if signature and value is not None:
                    _note(call, frame, signature, signature.shapes, [value])
                self.end(source, call, value)
            return follow

        return follow

    def leave(self, source: Source, call: Call, frame: FrameType, statement: ast.stmt, value: Any) -> None:
        comment = source.trailing.get(statement.lineno)
        if comment is None or isinstance(statement, ast.FunctionDef):
            return
        if isinstance(statement, ast.Return):
            _note(call, frame, comment, comment.shapes, [value])
        else:
            _note(call, frame, comment, comment.shapes, [_value(frame, name) for name in _targets(statement)])

    def end(self, source: Source, call: Call, value: Any) -> None:
        if call.seen:
            self.calls.setdefault(repr((call.numbers, [(str(c), s) for c, _, s in call.seen])), call)
        for name, comment in source.fields.get(type(value).__name__, []):
            of_fields = self.calls.setdefault(f"{id(value)}", Call())
            of_fields.seen.append((comment, comment.shapes, [_sizes(getattr(value, name))]))


def _arguments(frame: FrameType) -> list[Any]:
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
    return [value for name in names if hasattr(value := frame.f_locals[name], "shape")]


def _targets(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare):
        return [ast.unparse(statement.test.left).removesuffix(".shape")]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    assert targets[-1] is not None, f"a shape comment beside {ast.unparse(statement)}, which assigns nothing"
    names = targets[-1].elts if isinstance(targets[-1], ast.Tuple) else [targets[-1]]
    return [name for name in map(ast.unparse, names) if name != "_"]


def _value(frame: FrameType, name: str) -> Any:
    try:
        return eval(name, frame.f_globals, frame.f_locals)
    except (AttributeError, KeyError, NameError):  # an exception came before it
        return None


def _sizes(value: Any) -> list[Sizes]:
    """Of an array, or of each array of a sequence."""
    if isinstance(value, list | tuple) and not hasattr(value, "shape"):
        return [sizes for each in value for sizes in _sizes(each)]
    shape = getattr(value, "shape", None)
    return [] if shape is None else [tuple(int(size) for size in shape)]


def _note(call: Call, frame: FrameType, comment: Comment, shapes: tuple[Dims, ...], values: list[Any]) -> None:
    if comment.before and len(shapes) < len(values):
        values = values[: len(shapes)]
    if len(values) == 1 and len(shapes) > 1 and isinstance(values[0], tuple):
        values = list(values[0])
    call.seen.append((comment, shapes, [_sizes(value) for value in values]))
    own = getattr(frame.f_locals.get("self"), "__dict__", {})
    for name in {node.id for dims in shapes for dim in dims for each in dim for node in ast.walk(each)
                 if isinstance(node, ast.Name)}:  # fmt: skip
        number = frame.f_locals.get(name, own.get(name))
        if isinstance(number, int) and not isinstance(number, bool):
            call.numbers[name] = number


@contextmanager
def recording(sources: Iterable[Source]) -> Iterator[dict[str, Call]]:
    """Notes what the comments of these files stand beside, in this thread, while the code in the block runs."""
    recorder, before = _Recorder(sources), sys.gettrace()
    sys.settrace(recorder.enter)
    try:
        yield recorder.calls
    finally:
        sys.settrace(before)


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


class WrongError(Exception):
    """What a comment says is not what was seen."""


def judge(calls: Iterable[Call], known: dict[str, int]) -> tuple[set[Comment], list[str]]:
    """The comments that were reached, and a line for each that is wrong."""
    reached, wrong = set[Comment](), list[str]()
    for call in calls:
        letters, open_ones = {**call.numbers, **known}, []
        for name in call.numbers.keys() & known.keys():
            if call.numbers[name] != known[name]:
                wrong.append(f"{call.seen[0][0]}: {name} is {call.numbers[name]} there, and {known[name]} elsewhere")
        for comment, shapes, values in call.seen:
            pairs = list(zip(itertools.cycle(shapes) if len(shapes) == 1 else shapes, values, strict=False))
            if len(shapes) not in (1, len(values)):
                wrong.append(f"{comment}: {len(shapes)} shapes for {len(values)} values")
            for dims, sizes in ((dims, each) for dims, several in pairs for each in several):
                open_ones.append((comment, dims, sizes))
                reached.add(comment)
        wrong += _solve(open_ones, letters)
    return reached, list(dict.fromkeys(wrong))


def _solve(open_ones: list[tuple[Comment, Dims, Sizes]], letters: dict[str, int]) -> list[str]:
    """Compares, and binds letters on the way; what has two unknown letters waits for the others."""
    wrong, waiting = [], open_ones
    for _ in range(3):
        later = []
        for comment, dims, sizes in waiting:
            try:
                if not match(dims, sizes, letters):
                    later.append((comment, dims, sizes))
            except WrongError as error:
                wrong.append(f"{comment} is {sizes}: {error}")
        if not later:
            return wrong
        waiting = later
    return wrong + [f"{comment}: two letters of it are unknown" for comment, _, _ in waiting]


def match(dims: Dims, sizes: Sizes, letters: dict[str, int]) -> bool:
    """Whether all of the shape could be compared.

    Raises:
        WrongError: it is another shape.
    """
    dots = [number for number, (first, *_) in enumerate(dims) if getattr(first, "value", None) is ...]
    if dots:
        after = len(dims) - dots[0] - 1
        if len(sizes) < len(dims) - 1:
            raise WrongError(f"it has {len(sizes)} dimensions")
        dims, sizes = dims[: dots[0]] + dims[dots[0] + 1 :], sizes[: dots[0]] + sizes[len(sizes) - after :]
    if len(dims) != len(sizes):
        raise WrongError(f"it has {len(sizes)} dimensions")
    done = True
    for alternatives, size in sorted(zip(dims, sizes, strict=True), key=lambda pair: len(ast.dump(pair[0][0]))):
        answers = [_fits(each, Fraction(size), letters, len(alternatives) == 1) for each in alternatives]
        if not any(answers) and None in answers:
            done = False
        elif not any(answers):
            words = " or ".join(ast.unparse(each) for each in alternatives)
            raise WrongError(f"{words} is not {size}, with {letters}")
    return done


def _fits(node: ast.expr, size: Fraction, letters: dict[str, int], may_bind: bool) -> bool | None:
    """None where too little is known."""
    value = _number(node, letters)
    if value is not None:
        return value == size
    if isinstance(node, ast.Name):
        if may_bind and size.denominator == 1:
            letters[node.id] = int(size)
        return True if may_bind and size.denominator == 1 else None
    assert isinstance(node, ast.BinOp)
    left, right = _number(node.left, letters), _number(node.right, letters)
    match node.op, left, right:
        case ast.Add(), None, Fraction():
            return _fits(node.left, size - right, letters, may_bind)
        case ast.Add(), Fraction(), None:
            return _fits(node.right, size - left, letters, may_bind)
        case ast.Sub(), None, Fraction():
            return _fits(node.left, size + right, letters, may_bind)
        case ast.Mult(), None, Fraction():
            return _fits(node.left, size / right, letters, may_bind)
        case ast.Mult(), Fraction(), None:
            return _fits(node.right, size / left, letters, may_bind)
        case ast.Div(), None, Fraction():
            return _fits(node.left, size * right, letters, may_bind)
        case ast.Div(), Fraction(), None:
            return _fits(node.right, left / size, letters, may_bind) if size else False
    return None


def _number(node: ast.expr, letters: dict[str, int]) -> Fraction | None:
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.Name):
        return Fraction(letters[node.id]) if node.id in letters else None
    assert isinstance(node, ast.BinOp)
    left, right = _number(node.left, letters), _number(node.right, letters)
    if left is None or right is None:
        return None
    operations = {ast.Add: left.__add__, ast.Sub: left.__sub__, ast.Mult: left.__mul__, ast.Pow: left.__pow__}
    return left / right if isinstance(node.op, ast.Div) else operations[type(node.op)](right)
