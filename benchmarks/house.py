"""What a visitor of the code sees, in figures: `make house`, or `python benchmarks/house.py [CHECKOUT …]`.

Several checkouts stand side by side, a column each. Figures are of the package `miniclip` alone. Lines of code are
those with a token on them: no blank lines, comments or docstrings. The evening path is what README tells a reader to
open for the architecture, one training step and one evaluation. Knobs are the keys of a run's YAML file (without
Lightning's own `trainer.*`) and the flags of every other verb.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import re
import statistics
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BOOK = ("config.py", "tokenizer.py", "images.py", "model.py", "resnet.py", "timm_tower.py", "loss.py")
READING = "## I want to understand CLIP"  # the section of README whose links are the evening path
NUM_LARGEST = 5
# Classes that say which kind of task a data set, its scores or its measures belong to.
KIND_OF_SCORES = re.compile(
    r"Scores\b|Metrics\b|Multilabel\b|Retrieval\b|Classification\b|(Labell|Multilabel|Caption)\w*Images"
)
LIGHTNINGS = ("trainer", "ckpt_path", "weights_only", "print_config", "config", "help")
_LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """How many lines have code on them."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def top_level_names(source: str) -> Iterator[str]:
    """Functions, classes and variables that a module defines."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (target.id for target in targets if isinstance(target, ast.Name))


def checks_of_kind(source: str) -> int:
    """How many times `isinstance` asks for a kind of scores."""
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and len(node.args) == 2)
    return sum(
        isinstance(call.func, ast.Name)
        and call.func.id == "isinstance"
        and KIND_OF_SCORES.search(ast.unparse(call.args[1])) is not None
        for call in calls
    )


def evening_path(checkout: Path) -> list[str]:
    """The Python files that README's section on reading links to, relative to the package."""
    readme = (checkout / "README.md").read_text()
    section = readme.partition(READING)[2].partition("\n## ")[0]
    linked = set(re.findall(r"\]\(miniclip/([\w/]+\.py)\)", section))
    return sorted(name for name in linked if not name.endswith("__init__.py"))


def _help(checkout: Path, *words: str) -> str:
    """What `miniclip WORDS --help` prints, by the checkout's own code."""
    with open(checkout / "pyproject.toml", "rb") as file:
        module, _, function = tomllib.load(file)["project"]["scripts"]["miniclip"].partition(":")
    command = f"from {module} import {function}; {function}({[*words, '--help']!r})"
    environment = {**os.environ, "PYTHONPATH": str(checkout), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"`miniclip {' '.join(words)} --help` of {checkout} fails: {done.stderr.strip()[-2000:]}")
    return done.stdout


def knobs(checkout: Path) -> tuple[int, int]:
    """How many keys the YAML of a run has, and how many flags the other verbs have."""
    keys = set(re.findall(r"^ +--([\w.]+)", _help(checkout, "train", "fit"), re.MULTILINE))
    keys = {key for key in keys if key.split(".")[0] not in LIGHTNINGS}
    leaves = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    verbs = re.findall(r"^ {4}(\w+)", _help(checkout), re.MULTILINE)
    pages = [_help(checkout, verb) for verb in verbs if verb != "train"]
    flags = [set(re.findall(r"^ +(?:-\w, )?--([\w-]+)", page, re.MULTILINE)) - {"help"} for page in pages]
    return len(leaves), sum(map(len, flags))


def figures(checkout: Path) -> dict[str, str]:
    """What stands in a column, by the words of its row."""
    package = checkout / "miniclip"
    sources = {path.relative_to(package).as_posix(): path.read_text() for path in sorted(package.rglob("*.py"))}
    if not sources:
        raise ValueError(f"{checkout} has no package miniclip")
    lines = {name: code_lines(source) for name, source in sources.items()}
    files = {name: count for name, count in lines.items() if not name.endswith("__init__.py")}
    defined = Counter(name for source in sources.values() for name in {*top_level_names(source)})
    twice = [name for name, count in defined.items() if count > 1 and name != "main"]
    evening = evening_path(checkout)
    if missing := [name for name in evening if name not in sources]:
        raise ValueError(f"README.md of {checkout} links to files that are not there: {', '.join(missing)}")
    keys, flags = knobs(checkout)
    rows = {"files at the door": str(sum("/" not in name for name in sources))}
    rows |= {f"lines of {name}": str(lines.get(name, "–")) for name in BOOK}
    rows |= {
        "lines of the book": str(sum(lines.get(name, 0) for name in BOOK)),
        "lines of the evening path": f"{sum(lines[name] for name in evening)} in {len(evening)} files",
        "lines in all": f"{sum(lines.values())} in {len(files)} files",
        "median file": f"{statistics.median(files.values()):.0f}",
    }
    largest = sorted(files, key=lambda name: -files[name])[:NUM_LARGEST]
    rows |= {f"largest file {i}": f"{name} {files[name]}" for i, name in enumerate(largest, start=1)}
    folders = Counter(name.rpartition("/")[0] or "." for name in files)
    rows["files per folder"] = ", ".join(f"{name} {count}" for name, count in sorted(folders.items()))
    rows |= {
        "knobs": f"{keys + flags} ({keys} keys, {flags} flags)",
        "names defined twice": f"{len(twice)}, private {sum(name.startswith('_') for name in twice)}",
        "isinstance on kinds of scores": str(sum(map(checks_of_kind, sources.values()))),
    }
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, metavar="CHECKOUT", help="folders; default: this one")
    checkouts = [path.resolve() for path in parser.parse_args(argv).checkouts] or [ROOT]
    columns = [figures(checkout) for checkout in checkouts]
    if len(columns) == 1:
        for name, value in columns[0].items():
            print(f"{name:>30}  {value}")
        return
    print("| |", " | ".join(str(checkout) for checkout in checkouts), "|")
    print("|---|" + "---|" * len(columns))
    for name in columns[0]:
        print(f"| {name} |", " | ".join(column[name] for column in columns), "|")


if __name__ == "__main__":
    main()
