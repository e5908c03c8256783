"""Runs the steps of a page in this process, in the working directory: `run_page.py PAGE STEPS`, STEPS being JSON.

Each block of the page finds `photos` as it was, though the one before may have moved them away, and no reports.
A command that the shell has to read (pipes, variables, patterns), or that changes its process, gets one of its own.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from shape_comments import Source, judge, recording

import miniclip
from miniclip.commands.main import main

ANOTHER = re.compile(r"^(?!miniclip )|^miniclip train|[|<>$*?]")


def run_command(line: str) -> None:
    print("$", line, flush=True)
    if ANOTHER.search(re.sub(r"'[^']*'", "", line)):
        subprocess.run(["bash", "-o", "pipefail", "-c", line], check=True)
        return
    try:
        main(shlex.split(line)[1:])
    except SystemExit as ended:
        if ended.code:
            raise


def run_python(code: str, page: str, line: int, names: dict[str, Any]) -> None:
    if file := re.match(r"# (\w+[.]py)\n", code):
        Path(file[1]).write_text(code)
    source = Source.of(Path(page), "\n" * (line - 1) + code + "\n")
    with recording([source]) as calls:
        exec(compile(source.text, page, "exec"), names)
    reached, wrong = judge(calls.values(), {})
    unreached = set(source.comments()) - reached
    assert not wrong + [str(comment) for comment in unreached], [*wrong, *map(str, unreached)]


if __name__ == "__main__":
    names: dict[str, Any] = {"miniclip": miniclip}
    last = None
    for line, text, block, is_python in json.loads(sys.argv[2]):
        if block != last:
            reports = [path for path in Path("reports").glob("*") if path.name not in ("before", "after")]
            for folder in ("photos", "sorted", "OUT", "folder", *reports):
                shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(".photos", "photos", copy_function=shutil.copy2)
        last = block
        if is_python:
            run_python(text, sys.argv[1], line, names)
        else:
            run_command(text)
