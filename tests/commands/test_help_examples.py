"""The examples in every verb's help work as they stand: each is parsed, and run unless it needs another machine.

A new verb is tested without a line here, as long as its examples name what `world` has. One process runs the examples
of a verb in their order, in a world of its own; the names of their results differ, so that all can be copied.
"""

import contextlib
import importlib
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
from command_line import run
from reader import commands_of, run_here, write_world

from miniclip.commands import main as cli

# What names something that is not on this machine, or would take minutes; such an example is parsed alone.
ELSEWHERE = re.compile(
    r"^torchrun|^miniclip train|^miniclip push(?!.*--dry-run)|hf-hub:|openclip:|transformers:|torchvision:|\w+://"
    r"|birds\.index|^miniclip app" + ("" if shutil.which("jq") else r"|\| jq ")
)
AFTER = {"check": "shards", "search": "index"}  # a verb whose examples take what another's have made, in one test


@cache
def examples(verb: str) -> list[str]:
    text = run(sys.executable, "-m", "miniclip", *verb.split(), "--help", is_warm=True).stdout.replace("\\\n", " ")
    return [line.strip() for line in text.partition("\nexamples:\n")[2].splitlines() if line.strip()]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untouched")
    with contextlib.chdir(folder):
        write_world()
    return folder


@pytest.fixture
def world(untouched, tmp_path, monkeypatch) -> Path:
    folder = shutil.copytree(untouched, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    return folder


ARE_SLOW = "export", "search"  # with those of `index`


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "verb",
    [
        pytest.param(verb, marks=pytest.mark.long if verb in ARE_SLOW else ())
        for verb in ("", *cli.VERBS)
        if verb not in AFTER.values()
    ],
)
def test_every_example_of_the_help_runs(verb, world):
    for each in [AFTER[verb], verb] if verb in AFTER else [verb]:
        here = [line for line in examples(each) if not ELSEWHERE.search(line)]
        assert here or each in ("train", "app"), f"no example of {each} runs on one machine"
        run_here(here, world)


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "train"])
def test_every_example_of_the_help_is_parsed(verb):
    parser = importlib.import_module(f"miniclip.commands.{cli.VERBS[verb][0]}").parser()
    for line in examples(verb):
        for program, *words in commands_of(line):
            if program == "miniclip":
                assert words[0] == verb
                parser.parse_args(words[1:])


def test_every_example_of_training_is_read_by_lightning(world):
    lines = [f"{line} --print_config" for line in examples("train")]
    assert run_here(lines, world).count("optimizer:") == len(lines)
