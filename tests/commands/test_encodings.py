"""Terminals, logs and locales that cannot encode names and captions: they show escapes, and files keep every sign."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_clip, write_picture
from runs import TINY

import miniclip

PROGRAM = """
import sys
from miniclip.commands.main import main

main(["shards", "pairs", "shards", "--workers", "1"])
main(["check", "pairs", "--batch-size", "4", "--image-size", "16", "--workers", "1", "--out", "check.html"])
main(["eval", "--model", "model", "--data", "photos", "--out", "report", "--workers", "0", "--templates", "t.txt"])
main(["train", "fit", *sys.argv[1:], "--config", "run.yaml"])
main(["report", "run", "--out", "curves.html"])
main(["info", "model"])
"""
ENCODINGS = {
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "a Windows code page": {"PYTHONIOENCODING": "cp1252"},
    "the C locale without Python's help": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    miniclip.save(tiny_clip(), folder / "model")
    for number in range(8):
        image = write_picture(folder / "pairs" / f"图{number}.png", number)
        image.with_suffix(".txt").write_text(f"一只猫 {number} – café …", encoding="utf-8")
        write_picture(folder / "photos" / ("猫", "café")[number % 2] / f"画{number}.png", number)
    (folder / "pairs/空.png").write_bytes(b"no picture")
    (folder / "pairs/空.txt").write_text("空", encoding="utf-8")
    (folder / "t.txt").write_text("{} – 照片", encoding="utf-8")
    (folder / "run.yaml").write_text("# 设置 – café\ndata:\n  train: shards\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "encoding",
    [pytest.param(name, marks=[] if name.startswith("the C locale") else pytest.mark.long) for name in ENCODINGS],
)
def test_every_verb_ends_well_and_its_files_hold_every_sign(work, tmp_path, encoding):
    shutil.copytree(work, here := tmp_path / "here")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *TINY, "--trainer.max_steps=1", "--trainer.default_root_dir=run",
         "--data.batch_size=4", "--data.num_workers=0"],
        cwd=here, capture_output=True, check=False,
        env=kept | {"PYTHONPATH": str(Path(miniclip.__file__).parents[1])} | ENCODINGS[encoding],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout.decode("utf-8" if encoding == "ASCII" else "cp1252")
    assert re.search(r"\d (–|-) \d", output)  # the interval
    assert r"\u732b" in output  # 猫
    assert "猫" in (here / "report/results.json").read_text(encoding="utf-8")
    assert "– 照片" in (here / "report/report.html").read_text(encoding="utf-8")
    assert "一只猫" in (here / "check.html").read_text(encoding="utf-8")
