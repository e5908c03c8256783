"""`make house` counts what it says it counts, here and in a package small enough to count by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import house  # noqa: E402

MODULE = '''"""A docstring
of two lines."""

# A comment.
import os  # 1


def _twice(x: int) -> int:  # 2
    """Not code."""
    text = """
    a string that is a value
    """  # 3, 4, 5
    return isinstance(os, RetrievalScores | None)  # 6
'''


def checkout(folder: Path, readme: str = "[step](miniclip/wing/step.py)") -> Path:
    (folder / "miniclip/wing").mkdir(parents=True)
    (folder / "README.md").write_text(f"{house.READING}\n\n{readme}\n\n## Afterwards\n[no](miniclip/model.py)\n")
    (folder / "pyproject.toml").write_text('[project.scripts]\nminiclip = "miniclip.main:main"\n')
    (folder / "miniclip/__init__.py").write_text("")
    (folder / "miniclip/wing/step.py").write_text(MODULE)
    (folder / "miniclip/model.py").write_text("def _twice(): ...\nOnce: int = 1\n")
    (folder / "miniclip/main.py").write_text(
        "PAGES = {'': '    shards  packs\\n    train  trains', 'shards': '  --out X\\n  -q, --quiet\\n  --help',\n"
        "'train fit': '  --model X\\n  --model.lr X\\n  --name X\\n  --trainer.devices X'}\n"
        "def main(argv):\n    print(PAGES[' '.join(argv[:-1])])\n"
    )
    return folder


def test_lines_of_code_are_those_with_a_token_that_is_no_comment_and_no_docstring():
    assert house.code_lines(MODULE) == 6


def test_the_figures_of_a_small_package_are_those_counted_by_hand(tmp_path):
    rows = house.figures(checkout(tmp_path))
    assert rows["files at the door"] == "3"
    assert rows["lines of model.py"] == rows["lines of the book"] == "2"
    assert rows["lines of the evening path"] == "6 in 1 files"
    assert rows["lines in all"] == "12 in 3 files"
    assert rows["median file"] == "4"
    assert rows["largest file 1"] == "wing/step.py 6"
    assert rows["files per folder"] == ". 2, wing 1"
    assert rows["knobs"] == "4 (2 keys, 2 flags)"
    assert rows["names defined twice"] == "1, private 1"
    assert rows["isinstance on kinds of scores"] == "1"


def test_a_reading_list_that_names_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"README\.md of .* not there: gone\.py"):
        house.figures(checkout(tmp_path, "[gone](miniclip/gone.py)"))


def test_checkouts_stand_side_by_side(tmp_path, capsys):
    older, newer = checkout(tmp_path / "older"), checkout(tmp_path / "newer")
    (newer / "miniclip/loss.py").write_text("loss = 0\n")
    house.main([str(older), str(newer)])
    out = capsys.readouterr().out
    assert "| lines of loss.py | – | 1 |" in out
    assert "| lines of the book | 2 | 3 |" in out


@pytest.mark.long
def test_the_house_prints_its_own_figures():
    done = subprocess.run(
        [sys.executable, "benchmarks/house.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = dict(line.strip().split("  ", 1) for line in done.stdout.splitlines())
    assert int(rows["lines of model.py"]) > 100
    assert int(rows["knobs"].split()[0]) > 100
    assert int(rows["files at the door"]) < 15
