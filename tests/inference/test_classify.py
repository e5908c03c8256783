"""Guesses are the library's own softmax; classes are what was asked for, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import table, tiny_clip, write_picture
from libraries import LIBRARIES
from scipy.special import softmax

from miniclip.evaluation.datasets.class_folders import NONE
from miniclip.evaluation.encoder import from_clip
from miniclip.evaluation.features import FeatureCache, ImageFeatures
from miniclip.evaluation.measures.conformal import Coverage
from miniclip.evaluation.other_libraries import open_model
from miniclip.inference.classify import Classes, choose_classes, classify_images, guess, result_columns
from miniclip.inference.sources import image_set
from miniclip.inference.thresholds import CalibratedModel, ModelThreshold
from miniclip.weights.load import preprocess_for

LABELS = ["cat", "dog", "red dog"]
TEMPLATES = ["a picture of a {}.", "two {}."]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", LIBRARIES)
def test_probabilities_are_the_softmax_of_the_librarys_own_features(tmp_path, name):
    library = LIBRARIES[name](tmp_path)
    paths = [write_picture(tmp_path / f"photos/{n}.png", n, (40 + n, 30)) for n in range(4)]
    templates = table(tmp_path / "templates.txt", *TEMPLATES)
    prompts = library.of_texts([template.replace("{}", label) for label in LABELS for template in TEMPLATES])
    means = prompts.reshape(3, 2, -1).mean(axis=1)
    cosines = library.of_images(paths) @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    expected = softmax(library.scale * cosines, axis=1)
    classes = choose_classes(LABELS, templates=templates)
    found = classify_images(open_model(library.name, "cpu"), image_set(paths), classes, num_guesses=3, batch_size=3)
    np.testing.assert_array_equal(found.ranked, np.argsort(-cosines, axis=1))
    np.testing.assert_allclose(found.cosines, np.take_along_axis(cosines, found.ranked, 1), atol=1e-5)
    np.testing.assert_allclose(found.probabilities, np.take_along_axis(expected, found.ranked, 1), atol=1e-4)
    assert expected.std() > 1e-4


@pytest.fixture
def by_hand() -> ImageFeatures:
    """Three images whose cosines with the classes are 1, 0, 0; 0.6, 0.8, 0; and 0, 0.28, 0.96."""
    images = image_set([np.zeros((2, 2), np.uint8)] * 3)
    features = torch.tensor([[2.0, 0.0, 0.0], [3.0, 4.0, 0.0], [0.0, 7.0, 24.0]])
    return ImageFeatures(images, np.arange(3), features, ())


CLASSES = Classes(("cat", "dog", "owl"), ("a photo of a {}.",), "")
THRESHOLD = ModelThreshold(
    0.9,
    "by hand",
    classnames=("owl", "dog", "cat"),
    coverages=(Coverage(0.9, np.log(2.0), 10, 10, 0.9, (0.8, 1.0), 1.0, 0.0),),
    model=CalibratedModel("m", "", 2.0, (1.0,), (1.0,)),
)


def test_guesses_by_hand(by_hand):
    found = guess(by_hand, CLASSES, torch.eye(3), logit_scale=2.0, num_guesses=2)
    rows = list(found.rows())
    assert [(row["image"], row["rank"], row["label"]) for row in rows] == [
        ("image 0", 1, "cat"), ("image 0", 2, "dog"),
        ("image 1", 1, "dog"), ("image 1", 2, "cat"),
        ("image 2", 1, "owl"), ("image 2", 2, "dog"),
    ]  # fmt: skip
    assert [row["cosine"] for row in rows] == pytest.approx([1, 0, 0.8, 0.6, 0.96, 0.28])
    assert rows[0]["probability"] == pytest.approx(np.e**2 / (np.e**2 + 2))
    assert list(result_columns(2, False, False)) == ["image", "rank", "label", "probability", "cosine"]
    assert list(result_columns(1, True, True)) == ["image", "label", "nearest", "probability", "cosine", "set"]
    assert guess(by_hand, CLASSES, torch.eye(3), 2.0, num_guesses=9).ranked.shape == (3, 3)


def test_an_image_below_the_threshold_is_none_of_these_and_keeps_its_nearest_class(by_hand):
    found = guess(by_hand, CLASSES, torch.eye(3), 2.0, threshold=THRESHOLD)
    assert [(row["label"], row["nearest"]) for row in found.rows()] == [
        ("cat", "cat"), (NONE, "dog"), ("owl", "owl")
    ]  # fmt: skip
    assert [found.label(row) for row in range(3)] == ["cat", NONE, "owl"]


def test_sets_of_classes_are_those_as_likely_as_the_calibrated_cut(by_hand):
    found = guess(by_hand, CLASSES, torch.eye(3), 2.0, threshold=THRESHOLD, coverage=0.9)
    # exp(-cut) is 1/2: cat has 0.79, dog 0.50 (2 / 1.6 and 1.2 apart), owl 0.72.
    probabilities = softmax(2 * np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 0.28, 0.96]]), axis=1)
    names = np.array(CLASSES.classnames)
    assert [row["set"] for row in found.rows()] == [list(names[each >= 0.5]) for each in probabilities]


def test_classes_of_the_same_prompts_are_named(by_hand):
    found = guess(by_hand, CLASSES, torch.eye(3)[:, [0, 0, 2]], 2.0)
    assert found.same_prompts == (("cat", "dog"),)
    assert [found.label(row) for row in range(3)] == ["cat", "cat", "owl"]


# ---------------------------------------------------------------------------------------------------------------------
# What is encoded, and what is hashed


def test_a_handful_of_images_is_not_worth_hashing_a_model_and_a_folder_is_encoded_once(tmp_path):
    encoded: list[int] = []
    model = tiny_clip()
    model.visual.register_forward_hook(lambda _, inputs, output: encoded.append(len(inputs[0])))
    encoder = from_clip(model, preprocess_for(model.config), "tiny")
    paths = [write_picture(tmp_path / f"photos/{n:03}.png", n) for n in range(70)]
    cache, classes = FeatureCache(tmp_path / "cache"), choose_classes("cat,dog")
    few = classify_images(encoder, image_set(paths[:3]), classes, cache=cache)
    fingerprints = {"_image_fingerprint", "_text_fingerprint"}
    assert not fingerprints & vars(encoder).keys()  # none was computed
    assert not cache.folder.exists()
    first = classify_images(encoder, image_set(tmp_path / "photos"), classes, cache=cache)
    assert fingerprints & vars(encoder).keys() == {"_image_fingerprint"}
    assert sum(encoded) == 73
    second = classify_images(encoder, image_set(tmp_path / "photos"), choose_classes("cat,owl"), cache=cache)
    assert sum(encoded) == 73
    np.testing.assert_allclose(few.cosines, first.cosines[:3], atol=1e-6)
    assert second.classes.classnames == ("cat", "owl")


def test_images_that_can_not_be_read_are_named_and_the_order_is_kept(tmp_path):
    model = tiny_clip()
    encoder = from_clip(model, preprocess_for(model.config), "tiny")
    for number in (2, 0):
        write_picture(tmp_path / f"{number}.png", number)
    (tmp_path / "1.png").write_bytes(b"no picture")
    found = classify_images(encoder, image_set([tmp_path / f"{n}.png" for n in (2, 1, 0)]), choose_classes("cat,dog"))
    assert [row["image"] for row in found.rows()] == [str(tmp_path / "2.png"), str(tmp_path / "0.png")]
    assert len(found.unreadable) == 1
    assert "1.png" in found.unreadable[0]


# ---------------------------------------------------------------------------------------------------------------------
# Classes


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ("cat,dog", ("cat", "dog")),
        (" cat , a red dog ", ("cat", "a red dog")),
        ('"Paris, Texas",cat', ("Paris, Texas", "cat")),
        ("cat\ndog", ("cat", "dog")),
        ("cat,Cat", ("cat", "Cat")),
        (["cat", "a, b"], ("cat", "a, b")),
    ],
)
def test_labels_are_names_with_commas_between_them(labels, names):
    assert choose_classes(labels).classnames == names


@pytest.mark.parametrize("labels", ["['cat', 'dog, tame']", '["cat", "dog, tame"]', "{0: 'cat', 1: 'dog, tame'}"])
def test_a_list_of_labels_as_json_and_python_write_it_gives_its_names(labels):
    assert choose_classes(labels).classnames == ("cat", "dog, tame")


def test_class_names_come_from_files_and_built_in_sets(tmp_path):
    assert choose_classes(classnames=table(tmp_path / "names.txt", "cat", "a dog")).classnames == ("cat", "a dog")
    assert len(choose_classes(classnames="imagenet").classnames) == 1000
    assert choose_classes("a,b", templates="imagenet7").templates[1] == "a bad photo of the {c}."


def test_a_threshold_brings_the_classes_and_prompts_it_was_calibrated_with():
    threshold = ModelThreshold(0.2, "", "m/threshold.json", classnames=("cat", "dog"), templates=("the {}",))
    assert choose_classes(threshold=threshold) == Classes(("cat", "dog"), ("the {}",), "those of m/threshold.json")
    assert choose_classes("owl,cow", threshold=threshold).templates == ("the {}",)
    assert choose_classes("owl,cow", templates="simple", threshold=threshold).templates == ("a photo of a {c}.",)
    by_class = ModelThreshold(0.2, "", "f", classnames=("cat", "dog"), templates={"cat": ("a",), "dog": ("b",)})
    assert choose_classes("dog,cat", threshold=by_class).templates == by_class.templates
    assert choose_classes("dog,cow", threshold=by_class).templates == ("a photo of a {c}.",)
    assert choose_classes("cat", threshold=ModelThreshold(0.2, "")).classnames == ("cat",)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "no classes are named.*--labels"),
        ({"labels": "cat"}, r"one class, 'cat'.*--labels \"cat,dog\".*--threshold"),
        ({"labels": ""}, "--labels holds no name"),
        ({"labels": " , "}, "--labels holds no name"),
        ({"labels": "cat,,dog"}, "name 2 of --labels is empty"),
        ({"labels": "cat,dog,"}, "name 3 of --labels is empty"),
        ({"labels": "cat,\u200b"}, "name 2 of --labels is empty"),
        ({"labels": "0: cat,1: dog"}, "--labels numbers its names .'0: cat'.; write the names alone"),
        ({"labels": "['cat' 'dog']"}, "--labels .*no comma stands between 'cat' and 'dog'"),
        ({"labels": "cat,dog, cat"}, r"--labels has 'cat' twice \(names 1 and 3\)"),
        ({"labels": f"cat,{'a' * 140_000}"}, "--labels can't be read: field larger than"),
        ({"labels": "a,b", "classnames": "imagenet"}, "--labels and --classnames"),
        ({"classnames": "names.txt"}, r"names\.txt has 'cat' twice \(names 1 and 3\)"),
        ({"classnames": "imagnet"}, "imagnet"),
        ({"labels": "a,b", "templates": "simpel"}, "simpel.*simple"),
        ({"labels": f"a,{NONE}", "threshold": ModelThreshold(0.2, "")}, f"a class is called '{NONE}'"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_mistakes_about_classes_are_named(tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    table(Path("names.txt"), "cat", "dog", "cat")
    with pytest.raises(ValueError, match=says):
        choose_classes(**options)


@pytest.mark.parametrize(
    ("threshold", "coverage", "says"),
    [
        (None, 0.9, "need a model that was calibrated"),
        (THRESHOLD, 0.8, r"sets of coverage 0\.8 were not calibrated.*has 0\.9"),
        (ModelThreshold(0.2, "", "f", classnames=("x", "y")), 0.9, r"hold for the classes of f alone: 'x', 'y'"),
    ],
)
def test_sets_that_were_not_calibrated_are_refused_before_the_work(tmp_path, threshold, coverage, says):
    data = image_set([write_picture(tmp_path / "a.png")])
    with pytest.raises(ValueError, match=says):
        classify_images(from_clip(tiny_clip(), None, "m"), data, CLASSES, threshold=threshold, coverage=coverage)
