"""`miniclip.ZeroShotClassifier`: an estimator of scikit-learn's whose scores are those of the evaluation."""

import os
import pickle
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
import warm
from helpers import picture, tiny_clip
from PIL import Image
from sklearn.base import clone, is_classifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer
from sklearn.utils.estimator_checks import parametrize_with_checks

import miniclip
from miniclip import ZeroShotClassifier
from miniclip.evaluation.datasets.sets import LabelledImages
from miniclip.evaluation.encoder import from_clip
from miniclip.evaluation.features import encode_images
from miniclip.evaluation.probes import linear_probe, tip_adapter
from miniclip.evaluation.splits import Labelled, Splits, draw_validation
from miniclip.evaluation.suite import Task, evaluate
from miniclip.inference.thresholds import FILE, CalibratedModel, ModelThreshold, read_threshold, write_threshold
from miniclip.weights.load import preprocess_for

NAMES = ("cat", "dog", "owl")
TEMPLATES = ["a photo of a {}.", "a {c}, drawn"]


@cache
def clip():
    return tiny_clip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    miniclip.save(clip(), folder)
    return str(folder)


def encoder():
    return from_clip(clip(), preprocess_for(clip().config), "tiny")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of 30 animals, each class of a brightness of its own, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("photos")
    paths = []
    for n in range(30):
        paths.append(folder / f"{n}.png")
        Image.blend(picture(n), Image.new("RGB", (24, 20), (110 * (n % 3),) * 3), 0.7).save(paths[-1])
    labels = [NAMES[n % 3] for n in range(30)]
    return [str(path) for path in paths], labels


@pytest.fixture(scope="module")
def features(photos):
    data = LabelledImages("photos", tuple(photos[0]), (0,) * 30, NAMES, TEMPLATES, tuple(photos[0]))
    own = encoder()
    encoded = (encode_images(encode, own.preprocess, data) for encode in (own.encode_image, own.encode_pooled))
    projected, pooled = (each.features.double().numpy() for each in encoded)
    return SimpleNamespace(projected=projected, pooled=pooled)


# ---------------------------------------------------------------------------------------------------------------------
# scikit-learn's own checks
#
# They make up matrices of any width, and a probe takes those. For the other methods, which need the model's own width,
# they are cut or padded with zeros: the one exception. All else is the estimator itself.


class AnyWidth(ZeroShotClassifier):
    def _of_right_width(self, features):
        width = self.class_features_.shape[1]
        fitting = features[:, :width]
        return np.pad(fitting, ((0, 0), (0, width - fitting.shape[1])))


@pytest.fixture(autouse=True, scope="module")
def in_folder(tmp_path_factory):
    """The model that the checks name; their estimators are made before any fixture."""
    folder = tmp_path_factory.mktemp("checks")
    miniclip.save(clip(), folder / "tiny")
    before = Path.cwd()
    os.chdir(folder)
    yield
    os.chdir(before)


@pytest.mark.sample(40)
@parametrize_with_checks(
    [
        ZeroShotClassifier(method="probe"),
        ZeroShotClassifier(method="probe", C=1.0),
        AnyWidth("tiny", method="tip_adapter"),
        AnyWidth("tiny", method="tip_adapter", alpha=1.0, beta=5.0),
        AnyWidth("tiny"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*called by number")
def test_scikit_learn_checks(estimator, check):
    check(estimator)


# ---------------------------------------------------------------------------------------------------------------------
# The same scores as the evaluation's


def test_class_names_alone_score_as_eval_does(folder, photos):
    paths, labels = photos
    data = LabelledImages("photos", tuple(paths), tuple(map(NAMES.index, labels)), NAMES, TEMPLATES, tuple(paths))
    (result,) = evaluate(encoder(), Task(data))
    classifier = ZeroShotClassifier(folder, templates=TEMPLATES).fit(None, NAMES)
    assert classifier.predict(paths).tolist() == [NAMES[guess] for guess in result.scores.ranked[:, 0]]
    assert classifier.score(paths, labels) == result.scores.metrics.acc1
    proba = classifier.predict_proba(paths)
    np.testing.assert_allclose(proba.max(axis=1), result.scores.probabilities[:, 0], rtol=1e-4)
    best = classifier.decision_function(paths).max(axis=1) / classifier.logit_scale_
    np.testing.assert_allclose(best, result.scores.cosines[:, 0], atol=1e-6)


def test_fitting_to_labelled_images_teaches_zero_shot_nothing_but_their_classes(folder, photos):
    paths, labels = photos
    named = ZeroShotClassifier(folder, templates=TEMPLATES).fit(None, NAMES)
    fitted = ZeroShotClassifier(folder, templates=TEMPLATES).fit(paths, labels)
    np.testing.assert_array_equal(named.predict_proba(paths), fitted.predict_proba(paths))


@pytest.mark.parametrize("C", [0.1, 10.0])
def test_a_probe_is_scikit_learns_logistic_regression_on_features_before_the_projection(folder, photos, features, C):
    paths, labels = photos
    tol = 1e-4 / 20  # of the mean over images, where the evaluation's is of the sum
    oracle = LogisticRegression(C=C, tol=tol, max_iter=1000).fit(features.pooled[:20], labels[:20])
    probe = ZeroShotClassifier(folder, method="probe", C=C).fit(paths[:20], labels[:20])
    np.testing.assert_allclose(probe.predict_proba(paths), oracle.predict_proba(features.pooled), atol=1e-4)
    assert probe.predict(paths).tolist() == oracle.predict(features.pooled).tolist()
    two = [n for n in range(30) if labels[n] != "owl"]
    X, y = features.pooled[two], np.array(labels)[two]
    of_two, own = LogisticRegression(C=C, tol=tol, max_iter=1000).fit(X, y), ZeroShotClassifier(method="probe", C=C)
    np.testing.assert_allclose(own.fit(X, y).predict_proba(features.pooled), of_two.predict_proba(features.pooled))
    np.testing.assert_allclose(own.decision_function(features.pooled), of_two.decision_function(features.pooled))


def chosen_splits(rows, labels):
    """A fifth held out as evaluation does it, of labelled features; all of them are tests."""
    numbers = np.array([NAMES.index(label) for label in labels])
    drawn = draw_validation(numbers, None)
    everyone = Labelled(rows, numbers)
    return Splits(everyone.take(~drawn), everyone.take(drawn), everyone, NAMES)


def test_what_is_not_given_is_chosen_as_the_evaluation_chooses_it(folder, photos, features):
    paths, labels = photos
    expected = linear_probe(chosen_splits(features.pooled, labels))
    probe = ZeroShotClassifier(folder, method="probe", device="cpu").fit(paths, labels)
    assert probe.C_ == expected.C
    np.testing.assert_allclose(probe.coef_, expected.weight.T, atol=1e-6)
    adapter = ZeroShotClassifier(folder, method="tip_adapter", templates=TEMPLATES).fit(paths, labels)
    columns = adapter.class_features_.T
    chosen = tip_adapter(
        chosen_splits(features.projected, labels), columns.astype(np.float32), logit_scale=adapter.logit_scale_
    )
    assert (adapter.alpha_, adapter.beta_) == (chosen.alpha, chosen.beta)
    np.testing.assert_allclose(adapter.decision_function(paths), chosen.outcome.scores, atol=1e-4)


def test_tip_adapter_is_the_formula_of_its_paper(folder, photos, features):
    paths, labels = photos
    adapter = ZeroShotClassifier(folder, method="tip_adapter", alpha=2.0, beta=5.5).fit(paths[:12], labels[:12])
    f = features.projected / np.linalg.norm(features.projected, axis=1, keepdims=True)
    V = np.array([[label == name for name in NAMES] for label in labels[:12]], dtype=float)
    votes = np.exp(-5.5 * (1 - f @ f[:12].T)) @ V
    expected = adapter.logit_scale_ * f @ adapter.class_features_.T + 2.0 * votes
    np.testing.assert_allclose(adapter.decision_function(paths), expected, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What X and y may be


def test_an_image_is_the_same_in_every_form(folder, photos, features):
    paths, _ = photos
    classifier = ZeroShotClassifier(folder).fit(None, NAMES)
    expected = classifier.predict_proba(paths)
    pictures = [Image.open(path) for path in paths]
    forms = {
        "paths": [Path(path) for path in paths],
        "a tuple": tuple(paths),
        "an array of names": np.array(paths),
        "a column": pandas.Series(paths),
        "PIL": pictures,
        "pixels": [np.array(each) for each in pictures],
        "an array": np.stack([np.array(each) for each in pictures]),
        "bytes": [Path(path).read_bytes() for path in paths],
        "features": features.projected,
        "a tensor of features": torch.from_numpy(features.projected),
        "lists of numbers": features.projected.tolist(),
        "a frame of features": pandas.DataFrame(features.projected),
    }
    for name, X in forms.items():
        np.testing.assert_allclose(classifier.predict_proba(X), expected, atol=1e-6, err_msg=name)


def test_any_model_will_do(folder, photos):
    paths, _ = photos
    by_name = ZeroShotClassifier(folder).fit(None, NAMES).predict_proba(paths)
    own = encoder()
    five_things = SimpleNamespace(
        encode_image=own.encode_image,
        encode_text=own.encode_text,
        tokenize=own.tokenize,
        preprocess=own.preprocess,
        logit_scale=own.logit_scale,
    )
    for model in (Path(folder), clip(), miniclip.load(folder, "cpu"), own, five_things):
        np.testing.assert_allclose(ZeroShotClassifier(model).fit(None, NAMES).predict_proba(paths), by_name, atol=1e-6)


def test_classes_are_sorted_and_columns_follow_them(folder, photos):
    paths, _ = photos
    forth, back = (ZeroShotClassifier(folder).fit(None, names) for names in (NAMES, NAMES[::-1]))
    assert forth.classes_.tolist() == back.classes_.tolist() == ["cat", "dog", "owl"]
    np.testing.assert_array_equal(forth.predict_proba(paths), back.predict_proba(paths))


def test_labels_have_names_in_the_prompts(folder, photos):
    paths, _ = photos
    words = ZeroShotClassifier(folder).fit(None, ["tabby cat", "dog", "owl"])
    for classnames, labels in (
        (["dog", "owl", "tabby cat"], [0, 1, 2]),
        ({7: "dog", 8: "owl", 9: "tabby cat"}, [7, 8, 9]),
        ({7: "dog", 8: "owl", 9: "tabby cat"}, None),
        (("dog", "owl", "tabby cat"), None),
        (None, ["dog", "owl", "tabby_cat"]),
    ):
        found = ZeroShotClassifier(folder, classnames=classnames).fit(None, labels)
        assert found.classnames_ == ("dog", "owl", "tabby cat")
        np.testing.assert_array_equal(found.predict_proba(paths), words.predict_proba(paths))
    with pytest.warns(UserWarning, match="classes are called by number, as 3; classnames= gives them words"):
        ZeroShotClassifier(folder).fit(None, [3, 4])
    with pytest.warns(UserWarning, match="classes are called by WordNet id, as 'n01440764'; classnames= gives") as told:
        ZeroShotClassifier(folder).fit(None, [f"n0144{n}" for n in range(1000, 1004)] + ["n01440764"])
    assert len(told) == 1


def test_templates_come_from_a_set_a_file_or_code(folder, photos, tmp_path):
    paths, _ = photos
    (tmp_path / "templates.txt").write_text("\n".join(TEMPLATES))
    expected = ZeroShotClassifier(folder, templates=TEMPLATES).fit(None, NAMES).predict_proba(paths)
    by_class = {name: [template.replace("{c}", "{}").format(name) for template in TEMPLATES] for name in NAMES}
    for templates in (str(tmp_path / "templates.txt"), tmp_path / "templates.txt", by_class):
        found = ZeroShotClassifier(folder, templates=templates).fit(None, NAMES).predict_proba(paths)
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="'imagenet70' is no file and none of the sets"):
        ZeroShotClassifier(folder, templates="imagenet70").fit(None, NAMES)


def test_images_that_cannot_be_read_are_named_not_dropped(folder, photos, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"no picture")
    classifier = ZeroShotClassifier(folder).fit(None, NAMES)
    with pytest.raises(ValueError, match=r"1 of 2 images can't be read; the first: .*torn\.png"):
        classifier.predict([photos[0][0], tmp_path / "torn.png"])


MISTAKES = {
    "an unknown method": ({"method": "knn"}, (None, NAMES), "'knn' is none of zero_shot, tip_adapter, probe"),
    "no model": ({"model": None}, (None, NAMES), "which needs a model"),
    "a misspelt model": ({"model": "nowhere"}, (None, NAMES), "no checkpoint at 'nowhere'"),
    "nothing to learn from": ({"method": "probe"}, (None, NAMES), "learns from labelled images"),
    "no classes": ({}, (None, None), "y is a list of class names"),
    "a text for a list": ({}, (None, "cat,dog"), "y is a list of class names"),
    "one class": ({}, (None, ["cat"]), "y has one class, 'cat';"),
    "no class": ({}, (None, []), "y has no class"),
    "a class twice": ({}, (None, ["cat", "dog", "cat"]), "class 'cat' is named twice"),
    "a class without a name": ({}, (None, ["cat", " ", "dog"]), "class ' ' has an empty name"),
    "names in the place of images": ({}, (NAMES, None), r"names are y: fit\(None"),
    "labels without a name": ({"classnames": ["a", "b"]}, (None, [0, 1, 2]), r"labels 0 to 1, and none for 2"),
    "names of others": ({"classnames": {"x": "y"}}, (None, NAMES), "none for 'cat'"),
    "a path for a list": ({}, ("photos", NAMES), "X is a str; it must be a list of images"),
    "images without labels": ({}, (["a.png"], None), "requires y to be passed"),
    "too few labels": ({}, (["a.png", "b.png"], ["cat"]), "inconsistent numbers of samples"),
    "another width": ({}, (np.ones((3, 5)), NAMES), "X has 5 features, and .* makes 16"),
    "a threshold for nothing": ({"threshold": 0.3}, (None, NAMES), "none_label= is what they are called"),
    "none of them as one": ({"none_label": "cat", "threshold": 0.3}, (None, NAMES), "'cat' is one of the classes"),
    "no threshold": ({"none_label": "none"}, (None, NAMES), "needs a threshold, and .* has none"),
    "a probe has no cosine": (
        {"none_label": "none", "threshold": 0.3, "method": "probe"},
        (np.eye(3), NAMES),
        "'probe' has none of",
    ),
    "none to hold out": ({"method": "probe"}, (np.eye(3), NAMES), "none of 3 images can be held out .*C="),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_when_it_is_fitted(folder, mistake):
    options, (X, y), message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        ZeroShotClassifier(**({"model": folder} | options)).fit(X, y)


@pytest.mark.parametrize("names", [{"a": "cat", "b": "owl", "c": "Cat"}, ["cat", "owl", "Cat"]])
def test_classes_of_one_name_are_told_because_the_first_gets_all_guesses(folder, photos, names):
    y = ["a", "b", "c"] if isinstance(names, dict) else [0, 1, 2]
    with pytest.warns(UserWarning, match="2 classes have the prompts of 'cat'; all go to the first") as told:
        classifier = ZeroShotClassifier(folder, classnames=names, templates=["a {c}"]).fit(None, y)
    assert told[0].filename == __file__
    assert y[2] not in classifier.predict(photos[0])


def test_a_probe_of_images_takes_images_and_one_of_features_those(folder, photos, features):
    with pytest.raises(ValueError, match="without a model only features can be classified"):
        ZeroShotClassifier(method="probe").fit(*photos)
    with pytest.raises(ValueError, match="was fitted to images, whose features may differ from those of the features"):
        ZeroShotClassifier(folder, method="probe", C=1.0).fit(*photos).predict(features.projected)
    probe = ZeroShotClassifier(method="probe", C=1.0).fit(features.pooled, photos[1])
    with pytest.raises(ValueError, match="the probe was fitted to features, whose features may differ"):
        probe.predict(photos[0])
    with pytest.raises(ValueError, match="expecting 16 features"):
        probe.predict(np.ones((2, 5)))


# ---------------------------------------------------------------------------------------------------------------------
# None of these


@pytest.fixture
def calibrated(tmp_path, photos, features):
    """The model with a threshold that half of the photos reach."""
    folder = tmp_path / "calibrated"
    miniclip.save(clip(), folder)
    cosines = ZeroShotClassifier(str(folder)).fit(None, NAMES)
    best = cosines.decision_function(photos[0]).max(axis=1) / cosines.logit_scale_
    middle = float(np.median(best))
    own = ModelThreshold(middle, "by hand", classnames=NAMES, templates=("a photo of a {c}.",))
    write_threshold(folder / FILE, replace(own, model=CalibratedModel.of(encoder())))
    return SimpleNamespace(folder=str(folder), cosine=middle, is_none=best < middle)


def test_images_below_the_threshold_in_the_models_folder_are_none_of_these(calibrated, photos, recwarn):
    paths, _ = photos
    plain = ZeroShotClassifier(calibrated.folder).fit(None, NAMES)
    own = ZeroShotClassifier(calibrated.folder, none_label="none of these").fit(None, NAMES)
    expected = np.where(calibrated.is_none, "none of these", plain.predict(paths))
    assert 0 < calibrated.is_none.sum() < 30
    assert own.predict(paths).tolist() == expected.tolist()
    assert own.threshold_.cosine == calibrated.cosine
    np.testing.assert_array_equal(own.predict_proba(paths), plain.predict_proba(paths))
    assert not recwarn.list


def test_classes_and_prompts_are_the_thresholds_unless_others_are_given(calibrated, photos, recwarn):
    path = Path(calibrated.folder, FILE)
    own = read_threshold(path)
    write_threshold(path, replace(own, templates=tuple(TEMPLATES)), overwrite=True)
    given = ZeroShotClassifier(calibrated.folder, templates=TEMPLATES).fit(None, NAMES)
    for fitted in (
        ZeroShotClassifier(calibrated.folder, none_label="none").fit(),
        ZeroShotClassifier(calibrated.folder, none_label="none").fit(*photos),
    ):
        np.testing.assert_array_equal(fitted.predict_proba(photos[0]), given.predict_proba(photos[0]))
    assert not recwarn.list


def test_a_threshold_may_be_given_and_labels_keep_their_type(calibrated, photos, folder):
    paths, _ = photos
    cosine = calibrated.cosine
    numbers = ZeroShotClassifier(clip(), classnames=NAMES, none_label=-1, threshold=cosine).fit()
    assert set(numbers.predict(paths).tolist()) <= {-1, 0, 1, 2}
    assert ((numbers.predict(paths) == -1) == calibrated.is_none).all()
    mixed = ZeroShotClassifier(folder, classnames=NAMES, none_label="none", threshold=cosine).fit().predict(paths)
    assert {type(each) for each in mixed} == {str, int}
    adapter = ZeroShotClassifier(folder, method="tip_adapter", none_label="none", threshold=cosine, alpha=1.0, beta=1.0)
    assert ((adapter.fit(*photos).predict(paths) == "none") == calibrated.is_none).all()


def test_a_threshold_of_another_model_is_refused_and_of_other_classes_warned_of(calibrated, folder, tmp_path):
    with pytest.warns(UserWarning, match="was calibrated with 3 classes"):
        ZeroShotClassifier(calibrated.folder, none_label="none").fit(None, NAMES[:2])
    with pytest.warns(UserWarning, match="other prompts"):
        ZeroShotClassifier(calibrated.folder, none_label="none", templates=TEMPLATES).fit(None, NAMES)
    miniclip.save(tiny_clip(1), tmp_path / "other")
    moved = ZeroShotClassifier(str(tmp_path / "other"), none_label="none", threshold=f"{calibrated.folder}/{FILE}")
    with pytest.raises(ValueError, match="calibrated with other weights"):
        moved.fit(None, NAMES)


# ---------------------------------------------------------------------------------------------------------------------
# Among scikit-learn's own


def test_copies_share_the_model_and_have_the_same_settings():
    model = clip()
    classifier = ZeroShotClassifier(model, method="tip_adapter", classnames=list(NAMES), alpha=3.0)
    copied = clone(classifier)
    assert copied.model is model
    assert copied.classnames == list(NAMES)
    assert copied.get_params() == classifier.get_params()
    assert not hasattr(clone(classifier.set_params(alpha=4.0)), "classes_")
    assert clone(classifier).alpha == 4.0
    assert is_classifier(classifier)


@pytest.mark.parametrize("method", ["zero_shot", "tip_adapter", "probe"])
def test_a_pickle_answers_as_before(folder, photos, method):
    paths, labels = photos
    for model in (folder, clip()):
        fitted = ZeroShotClassifier(model, method=method).fit(paths, labels)
        again = pickle.loads(pickle.dumps(fitted))
        np.testing.assert_array_equal(again.predict_proba(paths), fitted.predict_proba(paths))
    assert len(pickle.dumps(ZeroShotClassifier(folder, method=method).fit(paths, labels))) < 20_000  # without the model


def test_a_model_that_changed_on_disk_is_read_again(tmp_path, photos):
    miniclip.save(tiny_clip(2), tmp_path / "model")
    before = ZeroShotClassifier(str(tmp_path / "model")).fit(None, NAMES).predict_proba(photos[0])
    miniclip.save(tiny_clip(3), tmp_path / "model", overwrite=True)
    after = ZeroShotClassifier(str(tmp_path / "model")).fit(None, NAMES).predict_proba(photos[0])
    assert np.abs(after - before).max() > 0.001


def test_pipelines_cross_validation_and_grid_search_work(folder, photos, features):
    paths, labels = photos
    probe = ZeroShotClassifier(method="probe", C=10.0)
    oracle = LogisticRegression(C=10.0, tol=1e-6, max_iter=1000)
    own, expected = (cross_val_score(each, features.pooled, labels, cv=3) for each in (probe, oracle))
    np.testing.assert_allclose(own, expected)
    images = cross_val_score(ZeroShotClassifier(folder), paths, labels, cv=3)
    whole = ZeroShotClassifier(folder).fit(None, NAMES)
    assert images.mean() == pytest.approx(whole.score(paths, labels))  # nothing is learnt, so folds do not matter
    piped = make_pipeline(FunctionTransformer(np.asarray), Normalizer(), ZeroShotClassifier(folder))
    np.testing.assert_allclose(
        piped.fit(features.projected, labels).predict_proba(features.projected), whole.predict_proba(paths), atol=1e-6
    )
    search = GridSearchCV(
        ZeroShotClassifier(folder, method="tip_adapter"), {"alpha": [0.0, 10.0], "beta": [1.0, 10.0]}, cv=2
    ).fit(features.projected, labels)
    assert search.best_score_ >= cross_val_score(ZeroShotClassifier(folder), features.projected, labels, cv=2).mean()
    assert 0 <= roc_auc_score(labels, whole.predict_proba(paths), multi_class="ovr") <= 1


def test_without_scikit_learn_all_else_works_and_the_remedy_is_named():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import miniclip; print(miniclip.tokenize('a').shape); miniclip.ZeroShotClassifier"
    )
    done = warm.run([sys.executable, "-c", code])
    assert "torch.Size([1, 77])" in done.stdout
    assert "ZeroShotClassifier" not in miniclip.__all__  # as `from miniclip import *` is for everyone
    assert "ZeroShotClassifier" in dir(miniclip)
    assert "ImportError: ZeroShotClassifier needs scikit-learn" in done.stderr
    assert "pip install 'miniclip[eval]'" in done.stderr
