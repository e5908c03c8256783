import csv
import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import fails, run
from PIL import Image

import miniclip
from miniclip.commands import main as cli
from miniclip.commands.terminal import lasting_imports

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path) -> Path:
    torch.manual_seed(0)
    vision = miniclip.VisionConfig(image_size=16, patch_size=8, width=16, layers=2, head_width=8)
    text = miniclip.TextConfig(width=16, layers=2, head_width=8, context_length=20)
    miniclip.save(miniclip.CLIP(miniclip.CLIPConfig(16, "gelu", vision, text)), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "my photos"
    random = np.random.default_rng(0)
    for name, count in (("tabby_cat", 3), ("Käfer", 2)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, size=(20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"bild {number}.png")
    return folder


@pytest.mark.parametrize("verb", ["", *cli.VERBS])
def test_help_shows_examples_without_waiting_for_torch(verb):
    code = f"import sys; from miniclip.commands.main import main\ntry: main({[*verb.split(), '--help']})\n"
    done = run(sys.executable, "-c", code + "except SystemExit as ended: print(ended.code, 'torch' in sys.modules)")
    assert done.stdout.endswith("0 False\n")
    assert "examples:\n  miniclip " in done.stdout
    expected = {"shards": "rejected.csv", "eval": "TABLE.classnames.txt", "train": "fit --help", "": "VERB --help"}
    assert expected.get(verb, f"miniclip {verb}") in done.stdout


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "train"])
def test_a_mistake_ends_every_verb_with_code_2_and_one_line(verb, tmp_path, capsys):
    arguments = {
        "shards": ["nowhere", "out"],
        "check": ["nowhere"],
        "doctor": ["nowhere", "--out", str(tmp_path / "out")],
        "eval": ["--model", "nowhere", "--data", "nowhere"],
        "classify": ["nowhere", "--labels", "cat,dog"],
        "calibrate": ["model", "--data", "nowhere", "--outside", "elsewhere"],
        "embed": ["nowhere", str(tmp_path / "out")],
        "index": ["nowhere", str(tmp_path / "new.index"), "--model", "nowhere"],
        "search": ["nowhere", "a red car"],
        "interpolate": ["nowhere", "nowhere", "--alpha", "0.5", "--out", str(tmp_path / "out")],
        "report": ["nowhere"],
        "convert": ["nowhere", str(tmp_path / "out"), "--to", "native"],
        "explain": ["nowhere", "a red car"],
        "app": ["nowhere"],
        "export": ["nowhere", str(tmp_path / "out"), "--to", "onnx"],
        "push": ["nowhere", "owner/name"],
        "info": ["nowhere"],
    }[verb]
    said = fails(capsys, [verb, *arguments])
    assert "nowhere" in said
    assert "Traceback" not in said
    said = fails(capsys, [verb, *("" if each == "nowhere" else each for each in arguments)])  # an empty variable's
    assert "is ''; leave it out or give it a value: the current folder is '.'" in said


@pytest.mark.long
def test_python_dash_m_miniclip_is_the_command(tmp_path):
    done = run(sys.executable, "-m", "miniclip", "--version", cwd=tmp_path)
    assert done.stdout == f"miniclip {miniclip.__version__}\n"
    assert (
        "error: no checkpoint at 'nowhere'"
        in run(sys.executable, "-m", "miniclip", "info", "nowhere", cwd=tmp_path, code=2).stderr
    )


def test_a_mistake_in_training_names_the_command_as_it_was_called(monkeypatch, capsys):
    for program, command in (("miniclip", "miniclip train"), ("miniclip/__main__.py", "python -m miniclip train")):
        monkeypatch.setattr(sys, "argv", [program])
        assert f"({command} fit --help lists every key)" in fails(capsys, ["train", "fit", "--nope=1"])


def test_version_and_unknown_verbs(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"miniclip {miniclip.__version__}\n"
    assert "invalid choice: 'trian'" in fails(capsys, ["trian"])
    assert "VERB" in fails(capsys, [])


def test_shards_packs_a_folder_and_says_what_it_left_out(tmp_path, capsys):
    source = tmp_path / "pairs"
    source.mkdir()
    for number in range(4):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(f"number {number}" if number else " ")
    cli.main(["shards", str(source), str(tmp_path / "out"), "--samples-per-shard", "2"])
    said = capsys.readouterr().out
    assert "3 pairs in 2 shards" in said
    assert "1 rejected, see" in said
    assert "0.png,every caption is empty" in (tmp_path / "out/rejected.csv").read_text()
    assert "exists already; pass --overwrite" in fails(capsys, ["shards", str(source), str(tmp_path / "out")])
    cli.main(["shards", str(source), str(tmp_path / "out"), "--overwrite"])
    assert "3 pairs in 1 shard," in capsys.readouterr().out


def test_shards_names_what_is_missing(tmp_path, capsys):
    assert "no folder or file nowhere" in fails(capsys, ["shards", "nowhere", str(tmp_path / "out")])
    (tmp_path / "empty").mkdir()
    said = fails(capsys, ["shards", str(tmp_path / "empty"), str(tmp_path / "out")])
    assert "no pairs found in" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_eval_scores_a_folder_per_class_and_writes_json_and_page(model, photos, tmp_path):
    (photos / "Käfer/kaputt.jpg").write_bytes(b"not a picture")
    out = tmp_path / "out"
    command = [
        sys.executable,
        str(ROOT / "eval_zeroshot.py"),
        "--model",
        str(model),
        "--data",
        str(photos),
        "--out",
        str(out),
    ]
    done = run(*command, "--templates", "imagenet7", cwd=tmp_path)
    assert "5 of 6" in done.stdout
    assert "kaputt.jpg is not an image" in done.stderr
    results = json.loads((out / "results.json").read_text())
    (result,) = results["results"]
    assert result["classnames"] == ["Käfer", "tabby cat"]
    assert len(result["templates"]) == 7
    labels, guesses = (result["samples"][name] for name in ("labels", "guesses"))
    assert len(labels) == 5
    assert sum(map(int.__eq__, labels, guesses)) / 5 == result["metrics"]["acc1"]
    assert "tabby cat" in (out / "report.html").read_text()
    assert "already holds results" in run(*command, code=2, cwd=tmp_path).stderr


def test_eval_of_several_sets_makes_one_table(model, photos, tmp_path, capsys):
    table = tmp_path / "few.csv"
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows(
            [("filepath", "label"), (photos / "Käfer/bild 0.png", "beetle"), (photos / "tabby_cat/bild 0.png", "cat")]
        )
    cli.main(
        [
            "eval",
            "--model",
            str(model),
            "--data",
            str(photos),
            str(table),
            "--out",
            str(tmp_path / "out"),
            "--device",
            "cpu",
        ]
    )
    said = capsys.readouterr().out
    assert "my photos" in said
    assert "few" in said
    assert [r["dataset"] for r in json.loads((tmp_path / "out/results.json").read_text())["results"]] == [
        "my photos",
        "few",
    ]


EVAL_MISTAKES = [
    (["--data", "nowhere"], "data 'nowhere' is not there"),
    (["--model", "nowhere"], "no checkpoint at 'nowhere'"),
    (["--templates", "nowhere.txt"], "templates 'nowhere.txt' is no file and none of the sets simple, imagenet80"),
    (["--model", "ViT-B-32"], "did you mean ViT-B/32?"),
    (["--templates", "simpel"], "did you mean simple?"),
    (["--templates", "the shape {}"], "a template of your own stands in a file, one a line"),
    (["--batch-size", "0"], "--batch-size is 0"),
    (["--group-column", "scene"], "a group column needs a table"),
    (["--classnames", "imagenet"], "has 2 classes and there are 1000 class names"),
    (["--device", "gpu7"], "gpu7"),
]


@pytest.mark.parametrize("more, message", EVAL_MISTAKES, ids=[" ".join(more) for more, _ in EVAL_MISTAKES])
def test_a_mistake_in_evaluation_is_answered_in_words(model, photos, tmp_path, capsys, more, message):
    args = ["eval", "--model", str(model), "--data", str(photos), "--out", str(tmp_path / "out")]
    said = fails(capsys, [*args, *more])
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_the_installed_command_is_the_same(tmp_path):
    installed = Path(sys.executable).with_name("miniclip")
    assert run(str(installed), "--version").stdout == f"miniclip {miniclip.__version__}\n"
    assert "usage: miniclip train" in run(str(installed), "train", "fit", "--help", cwd=tmp_path).stdout


def test_the_collector_leaves_imports_alone_and_goes_on_after_them(monkeypatch):
    spared = []
    monkeypatch.setattr(gc, "freeze", lambda: spared.append(gc.isenabled()))

    def broken() -> None:
        with lasting_imports():
            assert not gc.isenabled()
            import miniclip.nothing  # noqa: F401

    with pytest.raises(ModuleNotFoundError):
        broken()
    assert gc.isenabled()
    assert spared == [False]
    gc.disable()
    try:
        with lasting_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "command", ["train fit --help", "info nothing", "check nothing", "eval --model nothing --data nothing"]
)
def test_commands_import_without_the_collector(command):
    program = f"""
import gc
from miniclip.commands import main as cli
try:
    cli.main({command.split()})
except SystemExit:
    print(gc.get_freeze_count(), gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    count, is_enabled = done.stdout.split()[-2:]
    assert int(count) > 50_000
    assert is_enabled == "True"


@pytest.mark.parametrize(
    "before",
    [
        ["classify", "x.png", "--model", "nowhere", "--labels"],
        ["search", "nowhere.index"],
        ["search", "nowhere.index", "red", "--minus"],
        ["search", "nowhere.index", "red", "--where"],
        ["explain", "--model", "nowhere", "x.png"],
    ],
    ids=" ".join,
)
def test_words_on_the_command_line_that_are_not_utf8_are_refused_and_paths_are_not(before, capsys):
    latin_1 = os.fsdecode("grün".encode("latin-1"))
    assert r"'gr\udcfcn' is not UTF-8 text: 'utf-8' codec can't decode byte 0xfc in position 2" in fails(
        capsys, [*before, latin_1]
    )
    before = [part.replace("nowhere", latin_1) for part in before]
    assert "is not UTF-8" not in fails(capsys, [*before, "green"])


def test_words_in_utf8_are_read_in_a_locale_that_does_not_know_them():
    options = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    program = "import sys; from miniclip.commands.terminal import utf8_text; print(ascii(utf8_text(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", program, "grün".encode()], env={**os.environ, **options}, capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == r"'gr\xfcn'"


@pytest.mark.parametrize("verb", ["info", "train"])
def test_a_working_folder_that_was_deleted_is_said_to_be_gone(tmp_path, verb):
    (tmp_path / "gone").mkdir()
    program = "import os; from miniclip.commands.main import main; os.rmdir(os.getcwd()); main(%r)"
    command = sys.executable, "-c", program % [verb, "fit" if verb == "train" else "ViT-B/32"]
    assert run(*command, code=2, cwd=tmp_path / "gone").stderr.startswith(
        "error: the working folder is gone; change to"
    )


def test_ctrl_c_while_a_verb_is_imported_is_no_traceback():
    program = """
import importlib, os, signal
from miniclip.commands.main import main
importlib.import_module = lambda *_: os.kill(os.getpid(), signal.SIGINT)
main(["train", "fit"])
"""
    assert run(sys.executable, "-c", program, code=130).stderr == "Stopped.\n"


def test_ctrl_c_ends_the_import_of_a_library_that_swallows_it():
    """NumPy 2 catches it while it imports its parts, and then asks for one until the stack is full."""
    program = """
import importlib, os, signal
from miniclip.commands.main import main
def swallowing(*_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        raise RecursionError
importlib.import_module = swallowing
main(["train", "fit"])
"""
    assert run(sys.executable, "-c", program, code=130).stderr == "Stopped.\n"


@pytest.mark.parametrize("ends_process", [True, False])
def test_a_second_ctrl_c_while_libraries_clean_up_is_no_traceback(ends_process):
    program = f"""
import atexit, os, signal
from miniclip.commands import info
from miniclip.commands.main import main
press = lambda *_: os.kill(os.getpid(), signal.SIGINT)
atexit.register(press)
info.run = press
main(["info", "x"], ends_process={ends_process})
"""
    code = -signal.SIGINT if ends_process else 130
    said = run(sys.executable, "-c", program, code=code).stderr
    assert said.startswith("Stopped.\n")
    assert ("KeyboardInterrupt" in said) != ends_process  # a program that goes on may want it


@pytest.mark.parametrize("script", ["train.py", "eval_zeroshot.py", "miniclip/__main__.py"])
def test_ctrl_c_in_the_first_instants_of_a_script_is_no_traceback(tmp_path, monkeypatch, script):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys, importlib.abc\n"
        "class Interrupting(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'miniclip.commands.main':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
    )
    what = ["-m", "miniclip"] if script.startswith("miniclip") else [str(ROOT / script)]
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    assert run(sys.executable, *what, code=130).stderr == ""
