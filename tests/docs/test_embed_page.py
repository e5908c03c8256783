"""The code of docs/embed.md, run in a folder with what it reads."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import warm
from helpers import tiny_clip, write_pairs

import miniclip
from miniclip.commands import main as cli

PAGE = Path(__file__).parents[2] / "docs/embed.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    miniclip.save(tiny_clip(), tmp_path / "runs/digits/best")
    write_pairs(tmp_path / "photos", 7)
    monkeypatch.chdir(tmp_path)
    cli.main(["embed", "photos", "photo_embeddings", "--model", "runs/digits/best", "--workers", "0"])
    steps = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(steps) == 3
    checks = (
        "\nassert images.shape == embeddings.shape == some.shape == (7, 16)\nassert np.allclose(images, embeddings)\n"
    )
    run = [sys.executable, "-c", "".join(steps) + checks]
    done = warm.run(run)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"photos/\d{4}\.png", done.stdout)) == 5
