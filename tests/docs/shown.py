"""What the pages show: lines of the shell and Python, page by page, in the order in which they stand there."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    if not {"_build", "reference"} & set(page.parts)  # made when the site is built
)
_PROGRAMS = r"miniclip|python3?|torchrun|make|pip|srun|img2dataset|find|source|git|hf"
_COMMAND = re.compile(rf"(?:\$ )?((?:[A-Z]\w*=\S+ )*(?:{_PROGRAMS}) .*)")
_SPAN = re.compile(r"(?<!`)`((?:miniclip|python|torchrun) [^`]+)`(?!`)")


@dataclass(frozen=True)
class Step:
    """A line of the shell (its continuation lines joined to it), or a block of Python."""

    page: str
    line: int
    text: str
    block: int = 0  # the line where its block begins
    is_python: bool = False

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str) -> list[tuple[int, str, str]]:
    """Of a page: first line, language ("" if it is indented or has none) and code of each block."""
    found, lines, number = list[tuple[int, str, str]](), text.splitlines(), 0
    while number < len(lines):
        start, fence = number, re.match(r"( *)```(.*)", lines[number])
        if fence:
            number += 1
            while number < len(lines) and lines[number].strip() != "```":
                number += 1
            found.append((start + 2, fence[2], textwrap.dedent("\n".join(lines[start + 1 : number]))))
        elif lines[number].startswith("    ") and not (number and lines[number - 1].strip()):
            while number + 1 < len(lines) and (lines[number + 1].startswith("    ") or not lines[number + 1]):
                number += 1
            found.append((start + 1, "", textwrap.dedent("\n".join(lines[start : number + 1]))))
        number += 1
    return found


def steps(page: Path) -> list[Step]:
    """Pages with cells run when the site is built, so their Python is left out here."""
    text, found = page.read_text(encoding="utf-8"), []
    for first, language, code in blocks(text):
        is_python = language == "python" or (not language and code.startswith(("import ", "from ")))
        if is_python:
            found.append(Step(name(page), first, code, first, is_python=True))
        elif language in ("", "bash", "text"):
            found += _commands(page, first, code)
    return found


def _commands(page: Path, first: int, code: str) -> list[Step]:
    lines = re.sub(r"\\\n *", lambda _: "\0", code).splitlines()
    found, number = [], first
    for line in lines:
        if match := _COMMAND.fullmatch(re.sub(r"  +#.*", "", line.replace("\0", "")).strip()):
            found.append(Step(name(page), number, match[1].strip(), first))
        number += 1 + line.count("\0")
    return found


def spans(page: Path) -> list[Step]:
    """Commands within sentences."""
    text = page.read_text(encoding="utf-8")
    return [
        Step(name(page), text[: match.start()].count("\n") + 1, " ".join(match[1].split()))
        for match in _SPAN.finditer(text)
    ]
