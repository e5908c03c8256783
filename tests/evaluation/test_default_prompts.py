"""Prompts that nobody chose are worded as the model's captions: in every verb, by one rule; what was chosen stays."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import fails
from helpers import tiny_clip, tiny_config, write_picture

import miniclip
from miniclip.commands import main as cli
from miniclip.data.wordings.kept import Wording, Wordings
from miniclip.evaluation.datasets.open import open_dataset, with_templates
from miniclip.evaluation.encoder import from_clip
from miniclip.evaluation.interpolation import sweep
from miniclip.evaluation.other_libraries import open_model
from miniclip.evaluation.prompts import MINED_FROM
from miniclip.evaluation.suite import Task, evaluate
from miniclip.evaluation.zero_shot import zero_shot_scores
from miniclip.inference.calibration import calibrate
from miniclip.inference.classifier import ZeroShotClassifier
from miniclip.inference.classify import choose_classes, classify_images
from miniclip.weights.convert import convert
from miniclip.weights.load import preprocess_for

OWN = ("a sketch of a {}", "picture: {}")
SIMPLE = ("a photo of a {c}.",)
CAPTIONS = tuple(each.replace("{}", name) for name in ("cat", "dog", "kea") for each in OWN)
WORDINGS = Wordings((Wording("picture: {}", 0.6), Wording("a sketch of a {}", 0.4)), CAPTIONS, 500)
BOTH = {"a sketch of a {}", "picture: {}"}


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for n in range(12):
        write_picture(folder / ("cat", "dog", "kea")[n % 3] / f"{n}.png", n)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    clip = tiny_clip()
    clip.wordings = WORDINGS
    folder = tmp_path_factory.mktemp("models") / "own"
    miniclip.save(clip, folder)
    return folder


def encoder(with_wordings: bool = True):
    clip = tiny_clip()
    clip.wordings = WORDINGS if with_wordings else None
    return from_clip(clip, preprocess_for(clip.config), "tiny")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_a_model_that_knows_its_captions_is_asked_in_their_words_beside_the_default(photos):
    data = open_dataset(photos)
    own, default = evaluate(encoder(), Task(data))
    assert set(own.data.templates) == BOTH
    assert own.data.templates_from == MINED_FROM
    assert default.data.templates == SIMPLE
    long_way = zero_shot_scores(tiny_clip(), encoder().preprocess, replace(data, templates=own.data.templates))
    assert own.scores.metrics.acc1 == long_way.metrics.acc1


def test_a_model_without_wordings_is_asked_as_ever(photos):
    (only,) = evaluate(encoder(with_wordings=False), Task(open_dataset(photos)))
    assert (only.data.templates, only.data.templates_from) == (SIMPLE, "the built-in set 'simple'")


@pytest.mark.parametrize("chosen", ["simple", "imagenet7"])
def test_templates_that_were_chosen_stay(photos, chosen):
    with pytest.warns(UserWarning, match="prompts .*have a wording that is in none of the captions"):
        (only,) = evaluate(encoder(), Task(with_templates(open_dataset(photos), chosen)))
    assert only.data.templates_from == f"the built-in set {chosen!r}"


def test_templates_beside_the_data_stay(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos/templates.txt").write_text("a sketch of {}\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its words are those of the captions
        (only,) = evaluate(encoder(), Task(open_dataset(tmp_path / "photos")))
    assert only.data.templates == ("a sketch of {}",)


def test_the_warning_counts_and_names_what_the_captions_never_had(photos):
    data = replace(open_dataset(photos), templates=("a sketch of a {}", "a photo of a {}.", lambda name: name))
    with pytest.warns(UserWarning, match="prompts") as caught:
        evaluate(encoder(), Task(data))
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "1 of 2 prompts ('a photo of a {}.')" in message
    assert "tiny" in message
    assert "--templates" in message


def test_prompts_by_class_are_compared_without_the_classes(photos):
    by_class = {name: (f"a sketch of a {name}", "with two ears") for name in ("cat", "dog", "kea")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(encoder(), Task(replace(open_dataset(photos), templates=by_class)))


def test_models_between_two_are_asked_alike(photos):
    start, finetuned = tiny_clip(0), tiny_clip(1)
    finetuned.wordings = WORDINGS
    data = open_dataset(photos)
    points = sweep(start, finetuned, [data], [data], [0.0, 1.0])
    own = replace(data, templates=WORDINGS.templates(data.classnames))
    preprocess = preprocess_for(start.config)
    assert points[0].new == (zero_shot_scores(start, preprocess, own).metrics.acc1,)
    assert points[1].old == (zero_shot_scores(finetuned, preprocess, own).metrics.acc1,)


def test_an_interpolated_models_scores_are_those_that_eval_gives_it(photos, tmp_path, capsys, own_cache):
    """The start has wordings of its own, by which it would score otherwise on the old task."""
    start, finetuned = tiny_clip(0), tiny_clip(6)
    start.wordings, finetuned.wordings = Wordings((Wording("a dull {} of 1900", 1.0),), (), 500), WORDINGS
    for name, clip in (("start", start), ("finetuned", finetuned)):
        miniclip.save(clip, tmp_path / name)
    for name, other in (("cat", "kea"), ("dog", "cat"), ("kea", "dog")):  # so that it can be learnt and forgotten
        shutil.copytree(photos / name, tmp_path / "new" / other)
    out, options = tmp_path / "out", ["--device", "cpu", "--workers", "0"]
    sets = ["--data", str(tmp_path / "new"), "--retain", str(photos), "--alphas", "0,0.5,1", "--may-lose", "10"]
    cli.main(["interpolate", str(tmp_path / "start"), str(tmp_path / "finetuned"), *sets, "--out", str(out), *options])
    shown = capsys.readouterr().out
    assert shown.count(f"prompts 'a sketch of a {{}}', 'picture: {{}}' ({MINED_FROM})") == 2
    assert "8.3 points lost with alpha 1, of 12 images" in shown
    points = json.loads((out / "interpolation.json").read_text())["points"]

    def evaluated(model: Path) -> list[float]:
        arguments = ["--model", str(model), "--data", str(tmp_path / "new"), str(photos), "--out", f"{model} report"]
        cli.main(["eval", *arguments, *options])
        found = json.loads(Path(f"{model} report", "results.json").read_text())["results"]
        return [each["metrics"]["acc1"] for each in found if each["templates_from"] == MINED_FROM]

    shutil.copy(out / "wordings.json", tmp_path / "start")
    for model, point in ((tmp_path / "start", points[0]), (out, points[-1])):
        assert evaluated(model) == [*point["new"].values(), *point["old"].values()]
    data = open_dataset(photos)
    unlike = replace(data, templates=start.wordings.templates(data.classnames))
    assert zero_shot_scores(start, preprocess_for(start.config), unlike).metrics.acc1 not in points[0]["old"].values()


# ---------------------------------------------------------------------------------------------------------------------
# What people do with a model


def test_classify_asks_in_the_words_of_the_captions(photos):
    data, classes = open_dataset(photos), choose_classes(["cat", "dog", "kea"])
    guesses = classify_images(encoder(), data, classes)
    assert set(guesses.classes.templates) == BOTH
    chosen = choose_classes(["cat", "dog", "kea"], templates="simple")
    with pytest.warns(UserWarning, match="a photo of a"):
        assert classify_images(encoder(), data, chosen).classes.templates == SIMPLE


def test_a_calibration_keeps_those_prompts_and_classify_takes_them_from_it(photos, tmp_path):
    outside = tmp_path / "outside"
    for n in range(80):
        write_picture(outside / f"{n}.png", 100 + n)
    for n in range(80):
        write_picture(tmp_path / "inside" / ("cat", "dog")[n % 2] / f"{n}.png", n)
    threshold, _ = calibrate(encoder(), open_dataset(tmp_path / "inside"), open_dataset_images(outside))
    assert set(threshold.templates) == BOTH
    assert choose_classes(threshold=threshold).templates == threshold.templates


def open_dataset_images(folder):
    from miniclip.evaluation.datasets.open import open_images

    return open_images(folder)


def test_the_estimator_asks_as_classify_does(model):
    names = ["cat", "dog", "kea"]
    default = ZeroShotClassifier(str(model)).fit(None, names)
    own = ZeroShotClassifier(str(model), templates=sorted(BOTH)).fit(None, names)
    simple = ZeroShotClassifier(str(model), templates="simple").fit(None, names)
    assert default.class_features_ == pytest.approx(own.class_features_, abs=1e-6)
    assert default.class_features_ != pytest.approx(simple.class_features_, abs=1e-6)


def test_the_commands_say_so_in_one_line(model, photos, tmp_path, capsys, own_cache):
    picture = str(photos / "cat/0.png")
    cli.main(["classify", picture, "--labels", "cat,dog", "--model", str(model), "--device", "cpu"])
    said = [line for line in capsys.readouterr().err.splitlines() if "the captions that it was trained on" in line]
    assert len(said) == 1
    assert "'picture: {}'" in said[0]
    assert "--templates" in said[0]
    cli.main(["eval", "--model", str(model), "--data", str(photos), "--out", str(tmp_path / "out"), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert f"({MINED_FROM})" in printed.replace("\n", " ")
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [set(each["templates"]) for each in results] == [BOTH, set(SIMPLE)]
    page = (tmp_path / "out/report.html").read_text()
    assert "captions&#x27; (2)" in page or "captions' (2)" in page
    assert "simple (1)" in page


# ---------------------------------------------------------------------------------------------------------------------
# On the way


@pytest.mark.parametrize("layout", ["native", "openclip", "hf"])
def test_wordings_travel_with_the_model_into_every_layout(model, tmp_path, layout):
    convert(model, tmp_path / "there", layout)
    convert(tmp_path / "there", tmp_path / "back", "native")
    for folder in ("there", "back"):
        assert miniclip.load(tmp_path / folder, device="cpu")[0].wordings == WORDINGS
    prefix = {"openclip": "openclip:local-dir:", "hf": "transformers:"}.get(layout, "")
    assert open_model(f"{prefix}{tmp_path / 'there'}", "cpu").wordings == WORDINGS


def test_a_folder_never_keeps_the_wordings_of_another_model(tmp_path):
    clip = tiny_clip()
    clip.wordings = WORDINGS
    miniclip.save(clip, tmp_path / "model")
    miniclip.save(tiny_clip(1), tmp_path / "model", overwrite=True)
    assert not (tmp_path / "model/wordings.json").exists()
    assert miniclip.load(tmp_path / "model", device="cpu")[0].wordings is None


def test_damaged_wordings_are_refused_by_name(model, photos, tmp_path, capsys):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model/wordings.json").write_text("[]")
    said = fails(capsys, ["classify", str(photos / "cat/0.png"), "--labels", "a,b", "--model", str(tmp_path / "model")])
    assert str(tmp_path / "model/wordings.json") in said
    assert "delete it" in said


def test_the_architecture_of_a_model_is_the_same_with_wordings_and_without(model):
    assert miniclip.load(model, device="cpu")[0].config == tiny_config()
