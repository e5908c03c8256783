"""`miniclip classify` as people run it: in pipes, on terminals, with files sorted into folders, and with mistakes."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import warm
from command_line import fails
from helpers import everything_below, tiny_clip, write_picture
from PIL import Image

from miniclip.commands import main as cli
from miniclip.inference.thresholds import ModelThreshold, write_threshold
from miniclip.weights.load import save

LABELS = ["--labels", "cat,dog", "--model", "model"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))
    model = tiny_clip()
    model.text.token_embedding.weight.data.mul_(50)
    save(model, "model")
    for number in range(6):
        write_picture(Path(f"photos/{number}.png"), number)
    write_picture(Path("photos/deep/0.png"), 7)
    return tmp_path


def classify(capsys, *arguments: str) -> tuple[str, str]:
    cli.main(["classify", *arguments])
    return capsys.readouterr()


def process(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "miniclip", "classify", *arguments]
    return warm.run(command, **options)


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_all_forms_have_the_same_rows(capsys):
    table, notes = classify(capsys, "photos", *LABELS, "--topk", "2")
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["image", "rank", "label", "probability", "cosine"]
    assert [line[:2] for line in lines[1:3]] == [["photos/0.png", "1"], ["photos/0.png", "2"]]
    assert len(lines) == 15
    assert "probabilities are relative to the 2 classes" in notes
    rows = json.loads(classify(capsys, "photos", *LABELS, "--topk", "2", "--json")[0])
    assert [row["label"] for row in rows] == [line[2] for line in lines[1:]]
    assert rows[0]["probability"] + rows[1]["probability"] == pytest.approx(1)
    from_csv = rows_of(classify(capsys, "photos", *LABELS, "--topk", "2", "--csv")[0])
    assert [{**row, "rank": int(row["rank"]), "probability": float(row["probability"]), "cosine": float(row["cosine"])}
            for row in from_csv] == rows  # fmt: skip
    assert classify(capsys, "photos", *LABELS, "--topk", "2", "--parquet", "rows.parquet")[0] == ""
    assert pyarrow.parquet.read_table("rows.parquet").to_pylist() == rows


def test_what_pillow_says_to_programmers_is_not_shown(capsys):
    picture = Image.new("P", (9, 9))
    picture.putpalette(bytes(range(30)))
    picture.save("palette.png", transparency=bytes([0, 99]))
    assert "Palette" not in classify(capsys, "palette.png", *LABELS)[1]


def test_it_works_in_pipes():
    names = subprocess.run(["find", "photos", "-name", "[1-4].png", "-print0"], capture_output=True, check=True).stdout
    done = process("-", *LABELS, "--json", input=names.decode())
    assert done.returncode == 0, done.stderr
    listed = names.decode().rstrip("\0").split("\0")
    assert len(listed) == 4
    assert [row["image"] for row in json.loads(done.stdout)] == listed
    shell = (
        f"{sys.executable} -m miniclip classify - --labels cat,dog --model model --csv 2>notes < photos/0.png | tail -1"
    )
    out = subprocess.run(shell, shell=True, capture_output=True, text=True, check=True).stdout
    assert out.startswith("standard input,")


@pytest.mark.long
def test_names_and_prompts_come_by_pipes_of_the_shell():
    shell = (
        f"{sys.executable} -m miniclip classify photos --classnames <(printf 'cat\\ndog\\n') "
        "--templates <(printf 'a {}.\\n') --model model --csv"
    )
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(done.stdout)) == 7


@pytest.mark.long
def test_without_a_standard_output_the_files_are_sorted():
    shell = f"{sys.executable} -m miniclip classify photos --labels cat,dog --model model --copy-to out --yes >&-"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert len(list(Path("out").rglob("*.png"))) == 7


def test_without_a_standard_output_a_table_is_refused_where_it_is_all(capsys, monkeypatch):
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        monkeypatch.setattr(sys, "stdout", nowhere)
        assert "standard output is closed" in fails(capsys, ["classify", "photos", *LABELS, "--model", "model"])


@pytest.mark.long
def test_a_reader_that_goes_does_not_stop_the_sorting():
    shell = (
        f"set -o pipefail; {sys.executable} -m miniclip classify photos --labels cat,dog --model "
        "model --copy-to out --yes 2>notes | true"
    )
    subprocess.run(["bash", "-c", shell], check=True)
    assert len(list(Path("out").rglob("*.png"))) == 7
    assert "Traceback" not in Path("notes").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# None of these


def test_a_threshold_that_travels_with_the_model_is_applied_and_another_one_wins(capsys):
    plain = rows_of(classify(capsys, "photos", *LABELS, "--csv")[0])
    cosines = sorted(float(row["cosine"]) for row in plain)
    middle = (cosines[2] + cosines[3]) / 2
    write_threshold("model/threshold.json", ModelThreshold(middle, "by hand"))
    out, notes = classify(capsys, "photos", *LABELS, "--csv")
    rows = rows_of(out)
    assert sum(row["label"] == "none of these" for row in rows) == 3
    assert [row["nearest"] for row in rows] == [row["label"] for row in plain]
    assert f"cosine ≥ {middle:.4f}, by hand" in notes
    assert "relative" not in notes
    rows = rows_of(classify(capsys, "photos", *LABELS, "--csv", "--threshold", "-1")[0])
    assert [row["label"] for row in rows] == [row["label"] for row in plain]
    rows = rows_of(classify(capsys, "photos", "--labels", "cat", "--model", "model", "--csv", "--threshold", "1")[0])
    assert {row["label"] for row in rows} == {"none of these"}


# ---------------------------------------------------------------------------------------------------------------------
# Sorting


@pytest.mark.parametrize("how", ["--copy-to", "--move-to"])
def test_files_are_sorted_and_taken_back(capsys, how):
    before = everything_below(Path("photos"))
    out, notes = classify(capsys, "photos", *LABELS, "--csv", "--threshold", "0.1", how, "my out", "--yes")
    for row in rows_of(out):
        assert list(Path("my out", row["label"]).glob(f"{Path(row['image']).stem}*.png")), row
        assert Path(row["image"]).exists() is (how == "--copy-to")
    assert len(list(Path("my out").rglob("*.png"))) == 7
    assert "miniclip classify --undo 'my out'" in notes
    out, notes = classify(capsys, "--undo", "my out")
    assert "took 7 files back" in notes
    assert everything_below(Path("photos")) == before
    assert not Path("my out").exists()


def on_terminal(answer: bytes) -> tuple[int, str]:
    """Exit status and what stands on the terminal that a move asks on."""
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    command = [sys.executable, "-m", "miniclip", "classify", "photos", *LABELS, "--move-to", "out"]
    status = warm.Popen(command, stdin=theirs, stderr=theirs, stdout=subprocess.DEVNULL).wait()
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 10_000):
            seen += part
    except OSError:  # all is read
        pass
    os.close(ours)
    return status, seen.decode()


def test_it_asks_on_a_terminal_and_takes_anything_but_yes_for_no():
    status, seen = on_terminal(b"\n")
    assert status == 0
    assert "Move 7 files into out (" in seen
    assert "nothing was sorted" in seen
    assert not Path("out").exists()
    status, seen = on_terminal(b"y\n")
    assert status == 0
    assert "moved 7 files into out" in seen
    assert len(list(Path("out").rglob("*.png"))) == 7


def test_files_that_a_table_names_are_sorted_and_rows_without_one_are_named(capsys):
    Path("t.csv").write_text("filepath,id\nphotos/1.png,1\n,2\nphotos/nope.png,3\n")
    _, notes = classify(capsys, "t.csv", *LABELS, "--copy-to", "out", "--yes")
    assert [path.name for path in Path("out").rglob("*.png")] == ["1.png"]
    assert "left out: t.csv: row 2 has no image" in notes
    assert "left out: photos/nope.png can't be read: No such file" in notes
    assert "2 of 3 images can't be read" in notes


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["photso", *LABELS], "no file or folder photso; did you mean photos?"),
        (["empty", *LABELS], "no images in empty"),
        (["notes.txt", *LABELS], "no images in notes.txt: 1 left out"),
        (["photos/*.jpg", *LABELS], "nothing matches 'photos/*.jpg'"),
        (["photos", "--model", "model"], "no classes are named"),
        (["photos", "--labels", "cat", "--model", "model"], "there is one class, 'cat'"),
        (["photos", "--labels", "cat,dog,cat", "--model", "model"], "--labels has 'cat' twice"),
        (["photos", "--labels", "cat,dog", "--model", "modle"], "no checkpoint at 'modle'"),
        (["photos", "--labels", "cat,dog", "--model", "openclip:"], "names nothing after 'openclip'"),
        (LABELS, "no images are named"),
        (["photos", "--labels", "cat", "dog", "--model", "model"], "if it is the name of a class, names have commas"),
        (["--labels", "cat,", "dog,", "owl", "photos", "--model", "model"], '--labels "cat,dog,owl"'),
        (["photos", *LABELS, "--workers", "-1"], "--workers is -1"),
        (["photos", "--labels", "cat,dog", "--model", "python:broken.py:f"], "invalid syntax (broken.py, line 1)"),
        (["photos", *LABELS, "--topk", "0"], "--topk is 0"),
        (["photos", *LABELS, "--batch-size", "0"], "--batch-size is 0"),
        (["photos", *LABELS, "--threshold", "2"], "threshold 2 is no cosine"),
        (["photos", *LABELS, "--threshold", "nothing.json"], "threshold 'nothing.json' is no file and no number"),
        (["photos", *LABELS, "--coverage", "95"], "--coverage is 95; it is a share"),
        (["photos", *LABELS, "--coverage", "0.95"], "miniclip calibrate"),
        (["photos", *LABELS, "--templates", "a photo"], "templates 'a photo' is no file"),
        (["photos", *LABELS, "--parquet", "notes.txt"], "notes.txt is already there"),
        (["photos", *LABELS, "--yes"], "--yes is for --copy-to and --move-to"),
        (["photos", *LABELS, "--move-to", "out"], "there is no terminal to ask on; pass --yes"),
        (["photos", *LABELS, "--move-to", "notes.txt", "--yes"], "notes.txt is a file"),
        (["t.csv", *LABELS, "--copy-to", "out", "--yes"], "only files can be sorted"),
        (["--undo", "photos"], "has no list of files that were sorted into it"),
        (["--undo", "photso"], "no folder"),
        (["photos", "--undo", "out"], "leave out photos"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_with_one_sentence(capsys, monkeypatch, arguments, says):
    Path("empty").mkdir()
    Path("notes.txt").write_text("a cat\n")
    Path("t.csv").write_text("filepath\nhttp://localhost/a.png\n")
    Path("broken.py").write_text("def f(: return 3\n")
    before = everything_below(Path())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    message = fails(capsys, ["classify", *arguments])
    assert says in message
    assert "Traceback" not in message
    assert everything_below(Path()) == before


def test_what_can_not_be_written_is_refused_before_the_model_is_opened(capsys):
    Path("rows.parquet").write_text("mine")
    arguments = ["photos", "--labels", "cat,dog", "--model", "nowhere", "--parquet", "rows.parquet"]
    assert "rows.parquet is already there" in fails(capsys, ["classify", *arguments])
