"""Arguments of a wrong type or size: a ValueError names the argument, its value and what is allowed."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import tiny_clip, write_picture

import miniclip
from miniclip.inference.classify import choose_classes, classify_images
from miniclip.inference.sources import image_set, text_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wrong_arguments")
    miniclip.save(tiny_clip(), folder / "model")
    write_picture(folder / "photos/a.png", 0)
    write_picture(folder / "photos/b.png", 1)
    miniclip.Index(folder / "index", folder / "model").update(folder / "photos")
    return folder


@pytest.mark.parametrize(
    ("inputs", "options", "says"),
    [
        (5, {}, "inputs is 5; it must be a list"),
        (None, {}, "inputs is None; it must be a list"),
        ([5], {}, "image 0 is 5; it must be a path"),
        ({"a": 1}, {}, "inputs is a dict; it must be a list"),
        ({"a", "b"}, {}, "inputs is a set; it must be a list"),  # whose row would be whose?
        (np.array(5), {}, "inputs is a ndarray of one value; it must be a list"),
        (["a"], {"kind": "texts"}, "kind is 'texts'; it must be image or text"),
        (["a"], {"model": 5}, "the given model is a int without encode_image"),
        (["a"], {"model": ["model"]}, "the given model is a list without encode_image"),
        (["a"], {"device": 5.5}, "5.5 is no device; valid are cpu"),
        (["a"], {"device": []}, "a list is no device; valid are cpu"),
        ("PHOTOS", {"batch_size": 0}, "batch_size is 0; it must be a whole number of at least 1"),
        ("PHOTOS", {"batch_size": "4"}, "batch_size is '4'; it must be a whole number"),
        ("PHOTOS", {"batch_size": 2.5}, "batch_size is 2.5; it must be a whole number"),
        ("PHOTOS", {"batch_size": True}, "batch_size is True; it must be a whole number"),
        ("PHOTOS", {"num_workers": -1}, "num_workers is -1; it must be a whole number of at least 0"),
        ("PHOTOS", {"num_workers": None}, "num_workers is None; it must be a whole number"),
    ],
)
def test_embed(folder, inputs, options, says):
    inputs = sorted((folder / "photos").iterdir()) if isinstance(inputs, str) else inputs
    with pytest.raises(ValueError, match=says):
        miniclip.embed(inputs, **{"model": folder / "model", **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"location": 5}, "location is 5; it must be a path"),
        ({"location": b"index"}, "location is b'index'; it must be a path"),
        ({"model": 5}, "model is 5; it must be a name or path"),
        ({"model": ("model", "preprocess")}, "model is a tuple; it must be a name or path"),
        ({"memory_bytes": "5"}, "memory_bytes is '5'; it must be a whole number of at least 0"),
        ({"memory_bytes": -5}, "memory_bytes is -5; it must be a whole number of at least 0"),
    ],
)
def test_an_index(folder, options, says):
    with pytest.raises(ValueError, match=says):
        miniclip.Index(**{"location": folder / "index", **options})


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"texts": 5}, "texts is 5; it must be a list of texts"),
        ({"texts": b"car"}, "texts is b'car'; it must be a list of texts"),
        ({"texts": Path("a.png")}, r"texts is .*Path\('a.png'\); it must be a list of texts"),
        ({"texts": ["a", None]}, r"texts\[1\] is None; it must be a text"),
        ({"texts": {"a": 1}}, "texts is a dict; it must be a list of texts"),
        ({"minus": 5}, "minus is 5; it must be a list of texts"),
        ({"minus": [5]}, r"minus\[0\] is 5; it must be a text"),
        ({"like": [None]}, "image 0 is None; it must be a path"),
        ({"topk": "5"}, "topk is '5'; it must be a whole number of at least 1"),
        ({"topk": 2.5}, "topk is 2.5; it must be a whole number"),
        ({"topk": None}, "topk is None; it must be a whole number"),
        ({"topk": 0}, "topk is 0; it must be a whole number of at least 1"),
        ({"where": {"year": 5}}, "where is a dict; it must be a filter in SQL"),
        ({"threshold": "0.2"}, "threshold is '0.2'; it must be a number"),
        ({"threshold": float("nan")}, "threshold is nan; it must be a number"),
    ],
)
def test_a_search(folder, query, says):
    with pytest.raises(ValueError, match=says):
        miniclip.Index(folder / "index").search(**{"texts": "a car", **query})


def test_a_number_of_numpys_is_one(folder):
    assert len(miniclip.Index(folder / "index").search("a car", topk=np.int64(1), threshold=np.float32(-1))) == 1


@pytest.mark.parametrize(
    ("sources", "options", "says"),
    [
        (5, {}, "sources is 5; it must be a list of paths and URLs"),
        ([None], {}, r"sources\[0\] is None; it must be a path"),
        ("photos", {"rows_per_commit": "5"}, "rows_per_commit is '5'; it must be a whole number of at least 1"),
        ("photos", {"batch_size": 0}, "batch_size is 0; it must be a whole number of at least 1"),
    ],
)
def test_an_update(folder, tmp_path, sources, options, says):
    sources = str(folder / sources) if isinstance(sources, str) else sources
    with pytest.raises(ValueError, match=says):
        miniclip.Index(tmp_path / "new", folder / "model").update(sources, **options)


def test_what_is_no_hit_is_not_opened(folder):
    with pytest.raises(ValueError, match="hit is 5; it must be one that a search found"):
        miniclip.Index(folder / "index").open(5)


@pytest.mark.parametrize(
    ("options", "y", "says"),
    [
        ({}, 5, "y is 5; it must be a list of class names"),
        ({}, ["a", None], r"y\[1\] is None; a class is called by a text or by a number"),
        ({}, [["a"], ["b"]], r"y\[0\] is a list; a class is called by"),
        ({}, {"a": 0, "b": 1}, "y is a dict; it must be a list of class names"),
        ({}, pd.DataFrame({"a": [0], "b": [1]}), "y is a DataFrame; it must be a list of class names, as one of its"),
        ({}, ["a", 5], "y mixes texts and numbers: 'a' and 5"),
        ({"classnames": 5}, [0, 1], "classnames is 5; it must be a list of names"),
        ({"classnames": ["a", None]}, [0, 1], r"classnames\[1\] is None; it must be a text"),
        ({"classnames": 5}, None, "classnames is 5; it must be a list of names"),
        ({"templates": 5}, ["a", "b"], "templates is 5; it must be a list of texts"),
        ({"templates": [5]}, ["a", "b"], "a template is 5; it must be a text"),
        ({"templates": {"a": "one a", "b": "one b"}}, ["a", "b"], "prompts of 'a' is 'one a'; it must be a list of"),
        ({"alpha": "x"}, ["a", "b"], "alpha is 'x'; it must be a number of at least 0"),
        ({"beta": [1.0]}, ["a", "b"], "beta is a list; it must be a number of at least 0"),
        ({"none_label": ["no"], "threshold": 0.2}, ["a", "b"], "none_label is a list; it must be a text or a number"),
        ({"device": 5.5}, ["a", "b"], "5.5 is no device"),
    ],
)
def test_a_classifier(folder, options, y, says):
    with pytest.raises(ValueError, match=says):
        miniclip.ZeroShotClassifier(folder / "model", **options).fit(None, y)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ([], "X is an empty list; it must be a list of images"),
        ([None], "X begins with None; it must be a list of images"),
        ([5], "X begins with 5; it must be a list of images"),
        (5, "X is a int; it must be a list of images"),
        ({"a": 1}, "X is a dict; it must be a list of images"),
    ],
)
def test_images_to_classify(folder, images, says):
    classifier = miniclip.ZeroShotClassifier(folder / "model").fit(None, ["a", "b"])
    with pytest.raises(ValueError, match=says):
        classifier.predict(images)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"data": ["a.png"]}, "data is a list; .*image_set makes one"),
        ({"classes": ["a", "b"]}, "classes is a list; choose_classes makes one"),
        ({"encoder": 5}, "the given model is a int without encode_image"),
        ({"num_guesses": 0}, "num_guesses is 0; it must be a whole number of at least 1"),
        ({"threshold": 0.2}, "threshold is 0.2; .*find_threshold makes one"),
        ({"coverage": "most"}, "coverage is 'most'; it must be a number"),
        ({"batch_size": "4"}, "batch_size is '4'; it must be a whole number"),
    ],
)
def test_classify(folder, options, says):
    right = {"encoder": folder / "model", "data": image_set(folder / "photos"), "classes": choose_classes("a,b")}
    with pytest.raises(ValueError, match=says):
        classify_images(**{**right, **options})


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: choose_classes(5), "labels is 5; it must be a list of texts"),
        (lambda: choose_classes(["a", None]), r"labels\[1\] is None; it must be a text"),
        (
            lambda: choose_classes(["a", "b"], templates=["a {}"]),
            "templates is a list; it must be the name of a built-in",
        ),
        (lambda: choose_classes(classnames=5), "classnames is 5; it must be the name of"),
        (lambda: text_set(5), "sources is 5; it must be a list"),
        (lambda: text_set([5]), r"sources\[0\] is 5; it must be a path"),
        (lambda: image_set(None), "images is None; it must be a list"),
        (lambda: miniclip.load(5), "name is 5; it must be a path"),
        (lambda: miniclip.save("folder", 5), "model is 'folder'; it must be a CLIP"),
        (lambda: miniclip.zero_shot_classifier(tiny_clip(), "cat", ["{}"]), "classnames is 'cat'; it must be a list"),
        (lambda: miniclip.zero_shot_classifier(tiny_clip(), [5], ["{}"]), r"classnames\[0\] is 5; it must be a text"),
    ],
)
def test_names_and_sources(call, says):
    with pytest.raises(ValueError, match=says):
        call()
