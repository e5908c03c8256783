"""`miniclip calibrate`, and `miniclip eval --save-threshold`, as people call them."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import fails
from helpers import tiny_clip, write_picture

import miniclip
from miniclip.commands import main as cli
from miniclip.inference.thresholds import FILE, read_threshold

CLASSES = ("tabby_cat", "dog", "owl")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory) -> None:
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def model(tmp_path) -> Path:
    miniclip.save(tiny_clip(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """24 animals of three classes in a folder and a table, 20 street scenes, of which one is torn, and a table."""
    folder = tmp_path_factory.mktemp("sets")
    rows, other_rows = [("image", "label", "scene")], [("image", "label", "scene")]
    for n in range(24):
        path = write_picture(folder / "animals" / CLASSES[n % 3] / f"{n}.png", n)
        rows.append((path.relative_to(folder), CLASSES[n % 3], n // 2))
    for n in range(19):
        path = write_picture(folder / "streets" / f"{n}.png", 200 + n, mode="L")
        other_rows.append((path.relative_to(folder), "street", n // 2))
    (folder / "streets" / "torn.png").write_bytes(b"no picture")
    sorted_rows = [(image, label.replace("owl", "none of these"), scene) for image, label, scene in rows]
    for name, content in (("animals", rows), ("streets", other_rows), ("sorted", sorted_rows)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(content)
    write_picture(folder / "one" / "only.png")
    return folder


def calibrate(*args: object) -> None:
    cli.main(["calibrate", *map(str, args), "--workers", "0"])


def test_the_threshold_lies_in_the_models_folder_with_all_that_it_was_made_of(model, sets, capsys):
    calibrate(model, "--data", sets / "animals", "--outside", sets / "streets", "--false-acceptance", "0.2")
    found = json.loads((model / FILE).read_text())
    assert found["false_acceptance"] == 0.2
    assert (found["inside"]["name"], found["inside"]["num_chosen"], found["inside"]["num_tried"]) == ("animals", 12, 12)
    assert (found["outside"]["name"], found["outside"]["num_chosen"], found["outside"]["num_tried"]) == (
        "streets",
        9,
        10,
    )
    assert sorted(found["classnames"]) == ["dog", "owl", "tabby cat"]
    assert found["templates"] == ["a photo of a {c}."]
    assert [each["coverage"] for each in found["coverages"]] == [0.9]
    assert found["model"]["name"] == f"{model.parent.name}/model"
    assert str(model.parent) not in (model / FILE).read_text()  # it may be published
    printed = capsys.readouterr()
    assert f"cosine ≥ {found['cosine']:.4f}, at most 20 % of outside images accepted ({model / FILE})" in printed.out
    assert "sets of 90 % coverage: the true class is in" in printed.out
    assert re.search(r"AUROC of the best cosine: [\d.]+ %", printed.out)
    assert "prompts 'a photo of a {c}.'" in printed.out
    assert "left out: " in printed.err
    assert "torn.png" in printed.err
    assert {path.name for path in model.iterdir()} == {"config.json", "model.safetensors", FILE}
    miniclip.load(model)  # the file is not in the way


def test_a_model_that_is_no_folder_needs_a_file(model, sets, tmp_path, capsys):
    args = ["--data", str(sets / "animals"), "--outside", str(sets / "streets"), "--false-acceptance", "0.2"]
    weights = str(model / "model.safetensors")
    said = fails(capsys, ["calibrate", weights, *args])
    assert "is no folder" in said
    assert "--out FILE" in said
    calibrate(weights, *args, "--out", tmp_path / "deep" / "my.json")
    assert f"--threshold {tmp_path / 'deep' / 'my.json'}" in capsys.readouterr().out
    assert read_threshold(tmp_path / "deep" / "my.json").false_acceptance == 0.2


def test_eval_saves_the_same_threshold(model, sets, tmp_path, capsys):
    args = ["--data", sets / "animals", "--outside", sets / "streets", "--false-acceptance", "0.2"]
    calibrate(model, *args, "--out", tmp_path / "calibrated.json")
    evaluated = ["--model", model, *args, "--workers", "0", "--templates", "simple", "imagenet7"]
    cli.main(["eval", *map(str, evaluated), "--out", str(tmp_path / "report"), "--save-threshold"])
    first, second = read_threshold(tmp_path / "calibrated.json"), read_threshold(model / FILE)
    assert second.cosine == pytest.approx(first.cosine, abs=1e-6)
    for name in ("rule", "false_acceptance", "inside", "outside", "classnames"):
        assert getattr(first, name) == getattr(second, name), name
    assert second.templates == ("a photo of a {c}.",)  # the first of --templates
    assert f"cosine ≥ {second.cosine:.4f}" in capsys.readouterr().out
    (simple, _) = json.loads((tmp_path / "report/results.json").read_text())["results"]
    assert simple["none_of_these"]["cosine"] == second.cosine
    assert simple["none_of_these"]["coverages"][0]["coverage"] == 0.9
    # without --false-acceptance: both mistakes weigh the same, and a file of its own
    other = ["--data", sets / "animals", "--outside", sets / "streets", "--save-threshold", tmp_path / "balanced.json"]
    cli.main(["eval", "--model", str(model), *map(str, other), "--workers", "0", "--out", str(tmp_path / "second")])
    balanced = read_threshold(tmp_path / "balanced.json")
    assert (balanced.rule, balanced.false_acceptance) == ("best balanced accuracy", None)


def test_images_of_none_of_the_classes_need_no_labels(model, sets, tmp_path):
    args = ["--data", sets / "animals.csv", "--false-acceptance", "0.3", "--group-column", "scene"]
    calibrate(model, *args, "--outside", sets / "streets.csv", "--out", tmp_path / "labelled.json")
    bare = sets / "bare.csv"
    with open(sets / "streets.csv") as labelled, open(bare, "w", newline="") as file:
        csv.writer(file).writerows((row[0], row[2]) for row in csv.reader(labelled))
    calibrate(model, *args, "--outside", bare, "--out", tmp_path / "bare.json")
    found, expected = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("bare", "labelled"))
    expected["outside"]["name"] = "bare"
    for name in ("outside", "inside", "rule", "false_acceptance", "classnames"):
        assert found[name] == expected[name], name
    assert found["cosine"] == pytest.approx(expected["cosine"], abs=1e-6)


def test_groups_stay_together_on_both_sides(model, sets, tmp_path, capsys):
    args = ["--data", sets / "animals.csv", "--group-column", "scene", "--false-acceptance", "0.25"]
    calibrate(model, *args, "--outside", sets / "streets.csv", "--out", tmp_path / "a.json")
    found = read_threshold(tmp_path / "a.json")
    assert found.inside.num_chosen == 12  # six scenes of two
    assert found.outside.num_chosen in (9, 10)  # five scenes of ten, one of a single image
    # ten scenes are ten independent images, not nineteen
    said = fails(
        capsys,
        ["calibrate", str(model), *map(str, args[:-1]), "0.1", "--outside", str(sets / "streets.csv")],
    )
    assert "needs 18 independent images" in said
    assert "streets has 10 groups of images" in said


MISTAKES = {
    "a misspelt model": (["MODEL/nowhere", "--data", "animals", "--outside", "streets"], "no checkpoint at"),
    "misspelt data": (["MODEL", "--data", "nimals", "--outside", "streets"], "nimals' is not there"),
    "a misspelt outside": (["MODEL", "--data", "animals", "--outside", "treets"], "treets' is not there"),
    "no outside": (["MODEL", "--data", "animals"], "--outside"),
    "data as outside": (["MODEL", "--data", "animals", "--outside", "animals"], "must hold images of none"),
    "percent": (["MODEL", "--data", "animals", "--outside", "streets", "--false-acceptance", "5"], "it is a share"),
    "too few": (["MODEL", "--data", "animals", "--outside", "streets"], "needs 38 independent images"),
    "one image": (["MODEL", "--data", "animals", "--outside", "one"], "one has 1 images"),
    "no classes": (["MODEL", "--data", "streets", "--outside", "animals"], "streets"),
    "too much coverage": (
        ["MODEL", "--data", "animals", "--outside", "streets", "--false-acceptance", "0.2", "--coverage", "0.95"],
        "a coverage of 0.95 needs 38 independent images",
    ),
    "a class of classify's own name": (
        ["MODEL", "--data", "sorted.csv", "--outside", "streets", "--false-acceptance", "0.2"],
        "a class is called 'none of these'",
    ),
    "a folder as file": (["MODEL", "--data", "animals", "--outside", "streets", "--out", "one"], "is a folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_words_before_any_work(model, sets, capsys, monkeypatch, mistake):
    args, message = MISTAKES[mistake]
    monkeypatch.chdir(sets)
    said = fails(capsys, ["calibrate", *(each.replace("MODEL", str(model)) for each in args), "--workers", "0"])
    assert message in said
    assert "Traceback" not in said
    assert not (model / FILE).exists()


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "--outside, which is missing"),
        (["--outside", "streets", "--data", "animals", "animals.csv"], "--data has 2"),
        (["--outside", "streets", "--false-acceptance", "0.05"], "needs 38 independent images"),
        (["--outside", "streets", "--false-acceptance", "0"], "infinitely many images"),
        (["--outside", "streets", "--data", "sorted.csv"], "a class is called 'none of these'"),
    ],
)
def test_eval_refuses_what_it_could_not_save_before_any_work(model, sets, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(sets)
    args = ["--model", str(model), "--data", "animals", *more, "--save-threshold", "--out", str(tmp_path / "out")]
    assert message in fails(capsys, ["eval", *args])
    assert not (tmp_path / "out").exists()
    two = ["--model", str(model), "ViT-B/32", "--data", "animals", "--outside", "streets"]
    assert "is one file, and --model has 2" in fails(capsys, ["eval", *two, "--save-threshold", str(tmp_path / "x")])
    assert "'ViT-B/32' is no folder" in fails(capsys, ["eval", *two, "--save-threshold"])


def test_a_file_that_is_there_is_kept_unless_asked(model, sets, capsys):
    args = [
        str(model),
        "--data",
        str(sets / "animals"),
        "--outside",
        str(sets / "streets"),
        "--false-acceptance",
        "0.2",
    ]
    (model / FILE).write_text("mine")
    assert "is there already; pass --overwrite" in fails(capsys, ["calibrate", *args])
    assert (model / FILE).read_text() == "mine"
    calibrate(*args, "--overwrite")
    assert read_threshold(model / FILE).false_acceptance == 0.2


def test_a_place_that_cannot_be_written_to_is_named(model, sets, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    args = ["--data", str(sets / "animals"), "--outside", str(sets / "streets"), "--false-acceptance", "0.2"]
    said = fails(capsys, ["calibrate", str(model), *args, "--out", str(tmp_path / "file" / "x.json")])
    assert str(tmp_path / "file") in said
    if os.name == "posix" and os.geteuid():  # the administrator may write anywhere
        model.chmod(0o500)
        assert f"{model} can't be written to" in fails(capsys, ["calibrate", str(model), *args])


@pytest.mark.long
def test_a_reader_that_has_gone_costs_no_threshold_and_no_message(model, sets):
    reader, writer = os.pipe()
    os.close(reader)
    args = [model, "--data", sets / "animals", "--outside", sets / "streets", "--false-acceptance", "0.2"]
    command = [sys.executable, "-u", "-m", "miniclip", "calibrate", *map(str, args), "--workers", "0", "--no-cache"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr.replace("torn.png is not an image", "")
    assert read_threshold(model / FILE).false_acceptance == 0.2
