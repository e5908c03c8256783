"""Where everything lives: what holds for every folder and every name of the package."""

import ast
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import miniclip

ROOT = Path(miniclip.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES} - {ROOT})
MOST_FILES = 16


def top_level_names(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        for target in node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name)) if target else ()


def test_a_private_name_means_one_thing_in_the_whole_package():
    homes = defaultdict(list)
    for path in FILES:
        for name in set(top_level_names(path)):
            if name.startswith("_") and not name.startswith("__"):
                homes[name].append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_folder_has_a_door_sign_and_passes_nothing_on(folder):
    module = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    sign = ast.get_docstring(module)
    assert sign
    assert len(module.body) == 1
    files = re.findall(r"`(\w+\.py)`", sign)
    assert files, "a sign says what to read first"
    for name in files:
        assert (folder / name).is_file() or (folder.parent / name).is_file(), name


@pytest.mark.parametrize("folder", [ROOT, *FOLDERS], ids=lambda path: path.relative_to(ROOT.parent).as_posix())
def test_a_folder_can_be_taken_in_at_a_glance(folder):
    assert len([path for path in folder.glob("*.py") if not path.name.startswith("__")]) <= MOST_FILES


def test_imports_go_downward():
    command = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([command], capture_output=True, text=True, cwd=ROOT.parent)
    assert run.returncode == 0, run.stdout


def test_the_folders_that_a_demo_leaves_change_no_lint(tmp_path):
    (tmp_path / "runs").mkdir()
    shutil.copy(ROOT.parent / "pyproject.toml", tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import numpy\nimport runs\n\nimport miniclip\n\nprint(numpy, runs, miniclip)\n"
    )
    command = [Path(sys.executable).with_name("ruff"), "check", "--no-cache", "."]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout
