"""The wheel that people install: every module and asset is in it, and it trains and evaluates far from a checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import write_pairs, write_picture

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, because building leaves folders beside the source."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "miniclip", source / "miniclip", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", out, source]
    subprocess.run(command, check=True, cwd=out)
    (path,) = out.glob("miniclip-*.whl")
    return path


def test_the_wheel_has_every_module_and_asset_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "miniclip").rglob("*") if path.is_file()}
    assert {name for name in names if name.startswith("miniclip/")} == {
        name for name in files if "__pycache__" not in name
    }
    assert {name.split("/")[0].split("-")[0] for name in names} == {"miniclip"}, "nothing but the package is installed"
    assert "miniclip = miniclip.commands.main:main" in entry_points


@pytest.mark.long
def test_a_model_is_trained_and_evaluated_from_the_installed_wheel(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", site, wheel], check=True
    )
    environment = {**os.environ, "PYTHONPATH": str(site), "MINICLIP_CACHE": str(tmp_path / "cache")}

    def run(*arguments: str, program: tuple[str, ...] = ("-m", "miniclip")) -> str:
        done = subprocess.run(
            [sys.executable, *program, *arguments],
            capture_output=True,
            text=True,
            cwd=work,
            env=environment,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = run("import miniclip; print(miniclip.__file__)", program=("-c",))
    assert Path(where.strip()).is_relative_to(site)
    write_pairs(work / "pairs", 12)
    for number, label in enumerate(["cat", "cat", "dog", "dog"]):
        write_picture(work / "photos" / label / f"{number}.png", number)
    run("shards", "pairs", "shards")
    settings = {
        "name": "tiny",
        "model": {
            "clip": {
                "embed_dim": 16,
                "vision": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
                "text": {"width": 16, "layers": 1, "head_width": 8, "context_length": 32},
            }
        },
        "data": {"train": "shards", "val": "shards", "batch_size": 4, "num_workers": 0},
        "trainer": {"accelerator": "cpu", "max_steps": 3, "max_epochs": -1},
    }
    (work / "tiny.yaml").write_text(json.dumps(settings))  # JSON is YAML
    run("train", "fit", "--config", "tiny.yaml")
    run("eval", "--model", "runs/tiny/best", "--data", "photos", "--out", "report", "--device", "cpu")
    of_captions, of_the_set = json.loads((work / "report/results.json").read_text())["results"]
    assert of_captions["templates"] == ["picture {}, caption 0"]
    assert of_the_set["templates"] == ["a photo of a {c}."]
    assert of_captions["classnames"] == of_the_set["classnames"] == ["cat", "dog"]
    assert (work / "report/report.html").is_file()
