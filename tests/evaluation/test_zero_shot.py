"""Zero-shot classification: every number here is worked out by hand, or by scikit-learn, open_clip or a loop."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_clip, write_picture
from PIL import Image
from torch import Tensor

from miniclip import tokenizer
from miniclip.evaluation.datasets.sets import LabelledImages, MultilabelImages
from miniclip.evaluation.features import ImageFeatures, encode_texts
from miniclip.evaluation.multilabel import score_labels
from miniclip.evaluation.prompts import fill, imagenet_classnames, template_set
from miniclip.evaluation.zero_shot import (
    ClassificationScores,
    classify,
    zero_shot_classifier,
    zero_shot_scores,
)
from miniclip.fast.packed_texts import pack_text, trim_text
from miniclip.weights.load import preprocess_for

NAMES = ("tabby cat", "dog", "a big tiger", "{odd} name%")
TEMPLATES = ("a photo of a {}.", "{c}", "art of the {c}, {c}!")

# ---------------------------------------------------------------------------------------------------------------------
# The classifier


def classifier_the_long_way(model, classnames, templates) -> Tensor:
    columns = []
    with torch.no_grad():
        for name in classnames:
            features = []
            for template in templates:
                prompt = template(name) if callable(template) else template.replace("{c}", "{}").replace("{}", name)
                feature = model.encode_text(tokenizer.tokenize(prompt, context_length=model.context_length))[0]
                features.append(feature / feature.norm())
            mean = torch.stack(features).mean(dim=0)
            columns.append(mean / mean.norm())
    return torch.stack(columns, dim=1)


def test_classifier_equals_prompt_after_prompt_the_long_way():
    model = tiny_clip()
    ours = zero_shot_classifier(model, NAMES, TEMPLATES)
    assert ours.shape == (16, 4)
    torch.testing.assert_close(ours, classifier_the_long_way(model, NAMES, TEMPLATES), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.norm(dim=0), torch.ones(4), rtol=0, atol=1e-6)


def test_classifier_of_more_prompts_than_fit_one_batch_equals_the_long_way():
    model = tiny_clip()
    names = [f"thing {number} {'x' * (number % 9)}" for number in range(150)]
    ours = zero_shot_classifier(model, names, TEMPLATES[:2])
    torch.testing.assert_close(ours, classifier_the_long_way(model, names, TEMPLATES[:2]), rtol=0, atol=1e-6)


def test_classifier_equals_open_clips():
    from open_clip.zero_shot_classifier import build_zero_shot_classifier

    model = tiny_clip()

    def tokenize(texts: list[str]) -> Tensor:
        return tokenizer.tokenize(texts, context_length=16)

    templates = [lambda name: f"a photo of a {name}.", lambda name: f"the {name}"]
    theirs = build_zero_shot_classifier(model, tokenize, NAMES, templates)
    torch.testing.assert_close(zero_shot_classifier(model, NAMES, templates), theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("templates", [["a {} on a {}"], [lambda name: f"a {name} on a {name}"]])
def test_both_placeholders_and_functions_give_the_same(templates):
    model = tiny_clip()
    expected = zero_shot_classifier(model, NAMES, ["a {c} on a {c}"])
    assert torch.equal(zero_shot_classifier(model, NAMES, templates), expected)


@pytest.mark.parametrize("template", ["a {} of {c}", "{odd} {}", "100% {c} {0}"])
@pytest.mark.parametrize("name", ["cat", "{}", "{c}", "50% {x}", "\\d"])
def test_a_name_is_put_in_as_it_is_and_no_other_brace_is_touched(template, name):
    pieces = template.replace("{c}", "{}").split("{}")
    assert fill(template, name) == name.join(pieces)


def test_repeated_names_and_prompts_get_the_same_column_each():
    model = tiny_clip()
    ours = zero_shot_classifier(model, ("crane", "dog", "crane"), ("a {}", "a {}"))
    assert torch.equal(ours[:, 0], ours[:, 2])
    assert not torch.allclose(ours[:, 0], ours[:, 1])
    torch.testing.assert_close(ours, classifier_the_long_way(model, ("crane", "dog", "crane"), ("a {}",)))


def test_encode_texts_keeps_the_order_of_the_texts():
    model = tiny_clip()
    texts = ["a long text about a dog", "cat", "dog", "cat", "a"]
    features = encode_texts(model, texts, lambda batch: tokenizer.tokenize(batch, context_length=16))
    for text, feature in zip(texts, features, strict=True):
        with torch.no_grad():
            alone = model.encode_text(tokenizer.tokenize(text, context_length=16), normalize=True)[0]
        torch.testing.assert_close(feature, alone, rtol=0, atol=1e-6)


def test_texts_of_about_one_length_that_begin_alike_are_encoded_together():
    names, templates = imagenet_classnames()[:60], template_set("imagenet80")[:40]
    texts = [fill(template, name) for name in names for template in templates]
    batches: list[torch.Tensor] = []
    model = SimpleNamespace(encode_text=lambda tokens: batches.append(tokens) or torch.ones(len(tokens), 2))
    encode_texts(model, texts, tokenizer.tokenize)

    def kept(batches: list[torch.Tensor]) -> int:
        return sum(pack_text(batch, tokenizer.END_OF_TEXT)[0].shape[1] for batch in batches)

    by_length = tokenizer.tokenize(sorted(dict.fromkeys(texts), key=len)).split(len(batches[0]))
    assert kept(batches) < kept(by_length)
    padded, least = (
        sum(trim_text(batch, tokenizer.END_OF_TEXT).numel() for batch in each) for each in (batches, by_length)
    )
    assert padded < 1.1 * least


@pytest.mark.parametrize(
    "classnames, templates, says",
    [
        ([], ["a {}"], "0 class names and 1 templates; each needs at least one"),
        (["cat"], [], "1 class names and 0 templates; each needs at least one"),
        ("cat", ["a {}"], "classnames is 'cat'; it must be a list of texts"),
        (["cat"], "a {}", "templates is 'a {}'; it must be a list of texts"),
        (["cat"], ["a photo"], "template 'a photo' has no place for the class name"),
        (["cat"], [len], "template len gives 3 for 'cat'; it must give a text"),
        (["cat"], [lambda name: None], r"template \S*<lambda> gives None for 'cat'; it must give a text"),
    ],
)
def test_what_cannot_be_a_classifier_is_refused(classnames, templates, says):
    with pytest.raises(ValueError, match=says):
        zero_shot_classifier(tiny_clip(), classnames, templates)


def test_a_prompt_longer_than_the_context_is_shown():
    with pytest.raises(ValueError, match=r"context length is 16.*very very"):
        zero_shot_classifier(tiny_clip(), ["very " * 20 + "big cat"], ["a {}"])


# ---------------------------------------------------------------------------------------------------------------------
# Scores, worked out by hand


class ByHand:
    """An adapter as users write it. The features of a picture are its pixels; those of class 3 are the fourth axis."""

    logit_scale = torch.tensor(math.log(10.0))

    def encode_image(self, images: Tensor) -> Tensor:
        return images[:, 0, 0]

    def encode_text(self, tokens: Tensor) -> Tensor:
        return 2.5 * torch.eye(7)[tokens[:, 0]]

    @staticmethod
    def tokenize(texts: list[str]) -> Tensor:
        return torch.tensor([[int(text.removeprefix("class "))] for text in texts])

    @staticmethod
    def preprocess(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image.convert("L").crop((0, 0, 7, 1)))).float().expand(3, 1, -1)


# Label, and pixels whose length is a whole number where cosines are checked.
PICTURES = [
    (0, [4, 3, 0, 0, 0, 0, 0]),  # right; cosines 0.8, 0.6
    (0, [5, 12, 0, 0, 0, 0, 0]),  # class 1 first, then its own; 12/13, 5/13
    (1, [0, 200, 0, 0, 0, 0, 0]),  # right; 1
    (2, [10, 9, 0, 8, 7, 6, 5]),  # five others first: 0, 1, 3, 4, 5
    (3, [1, 2, 4, 60, 5, 6, 7]),  # right; then 6, 5, 4, 2
]


def pictures(folder: Path, rows=PICTURES, groups=None, classes: int = 7) -> LabelledImages:
    paths = []
    for number, (_, pixels) in enumerate(rows):
        path = folder / f"{number}.png"
        Image.fromarray(np.array([pixels], dtype=np.uint8)).save(path)
        paths.append(path)
    labels = tuple(label for label, _ in rows)
    names = tuple(str(number) for number in range(classes))
    return LabelledImages(
        "by hand", tuple(paths), labels, names, ("class {}",), groups or tuple(map(str, range(len(rows))))
    )


def scores_of(data: LabelledImages, **options) -> ClassificationScores:
    model = ByHand()
    return zero_shot_scores(model, model.preprocess, data, tokenize=model.tokenize, **options)


def test_scores_are_cosines_in_falling_order_with_their_softmax(tmp_path):
    scores = scores_of(pictures(tmp_path))
    assert scores.indices.tolist() == [0, 1, 2, 3, 4]
    assert scores.labels.tolist() == [0, 0, 1, 2, 3]
    assert scores.unreadable == ()
    assert scores.ranked.shape == scores.cosines.shape == scores.probabilities.shape == (5, 5)
    assert scores.ranked[0, :2].tolist() == [0, 1]
    assert scores.ranked[1, :2].tolist() == [1, 0]
    assert scores.ranked[3].tolist() == [0, 1, 3, 4, 5]
    assert scores.ranked[4].tolist() == [3, 6, 5, 4, 2]
    np.testing.assert_allclose(scores.cosines[0], [0.8, 0.6, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(scores.cosines[1, :2], [12 / 13, 5 / 13], atol=1e-6)
    weights = [math.exp(10 * cosine) for cosine in (0.8, 0.6, 0, 0, 0, 0, 0)]  # over all seven classes
    np.testing.assert_allclose(scores.probabilities[0], np.array(weights[:5]) / sum(weights), rtol=1e-5)


def test_measures_are_those_worked_out_by_hand(tmp_path):
    metrics = scores_of(pictures(tmp_path)).metrics
    assert metrics.num_images == 5
    assert metrics.acc1 == pytest.approx(3 / 5)
    assert metrics.acc5 == pytest.approx(4 / 5)
    np.testing.assert_array_equal(metrics.per_class.recall, [0.5, 1, 0, 1, np.nan, np.nan, np.nan])
    assert metrics.mean_per_class_recall == pytest.approx((0.5 + 1 + 0 + 1) / 4)
    expected = np.zeros((7, 7), dtype=int)
    expected[0, 0] = expected[0, 1] = expected[1, 1] = expected[2, 0] = expected[3, 3] = 1
    np.testing.assert_array_equal(metrics.confusion.matrix(), expected)
    assert 0 <= metrics.interval[0] <= 0.6 <= metrics.interval[1] <= 1


def test_classes_without_images_raise_no_warning(tmp_path):
    scores = scores_of(pictures(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scores.metrics


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_fewer_than_five_classes_give_as_many_guesses(tmp_path, classes):
    rows = [(0, [3] + [0] * 6), (classes - 1, [1, 2, 3, 4, 5, 6, 7])]

    class Fewer(ByHand):
        def encode_image(self, images: Tensor) -> Tensor:
            return images[:, 0, 0, :classes]

        def encode_text(self, tokens: Tensor) -> Tensor:
            return torch.eye(classes)[tokens[:, 0]]

    model = Fewer()
    data = pictures(tmp_path, rows, classes=classes)
    scores = zero_shot_scores(model, model.preprocess, data, tokenize=model.tokenize)
    assert scores.ranked.shape == (2, classes)
    np.testing.assert_allclose(scores.probabilities.sum(axis=1), 1, rtol=1e-5)
    metrics = scores.metrics
    assert (metrics.acc1, metrics.acc5, metrics.confusion.matrix().shape) == (1.0, 1.0, (classes, classes))


@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 2}, {"batch_size": 2, "num_workers": 2}], ids=str
)
def test_batch_size_and_workers_change_no_score(tmp_path, options):
    data = pictures(tmp_path)
    (tmp_path / "2.png").write_text("no picture")
    expected, found = scores_of(data), scores_of(data, **options)
    for name in ("indices", "labels", "ranked", "unreadable"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("cosines", "probabilities"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_images_are_left_out_and_named(tmp_path, num_workers):
    data = pictures(tmp_path)
    (tmp_path / "0.png").write_text("no picture")
    (tmp_path / "3.png").unlink()
    scores = scores_of(data, batch_size=1, num_workers=num_workers)
    assert scores.indices.tolist() == [1, 2, 4]
    assert scores.labels.tolist() == [0, 1, 3]
    assert len(scores.unreadable) == 2
    assert str(tmp_path / "0.png") in scores.unreadable[0]
    assert str(tmp_path / "3.png") in scores.unreadable[1]
    metrics = scores.metrics
    assert (metrics.num_images, metrics.acc1) == (3, pytest.approx(2 / 3))
    assert np.isnan(metrics.per_class.recall[2])


def test_data_without_one_readable_image_is_an_error_with_the_first_reason(tmp_path):
    data = pictures(tmp_path)
    for path in data.images:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 5 images of by hand can be read; the first: .*0\.png"):
        scores_of(data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tower", ["encode_image", "encode_text"])
def test_features_that_are_not_finite_are_an_error(tmp_path, bad, tower):
    class Broken(ByHand):
        pass

    setattr(Broken, tower, lambda self, x: getattr(ByHand, tower)(self, x) * bad)
    model = Broken()
    with pytest.raises(ValueError, match=r"features that are not finite, for (images|the prompts) of by hand"):
        zero_shot_scores(model, model.preprocess, pictures(tmp_path), tokenize=model.tokenize)


def test_progress_is_told_of_every_image(tmp_path):
    data = pictures(tmp_path)
    (tmp_path / "2.png").write_text("no picture")
    done: list[int] = []
    scores_of(data, batch_size=2, progress=done.append)
    assert done == [2, 4, 5]


def test_a_clip_scores_as_its_own_forward_does(tmp_path):
    model = tiny_clip()
    preprocess = preprocess_for(model.config)
    paths = tuple(write_picture(tmp_path / f"{number}.png", number, (30, 20)) for number in range(6))
    data = LabelledImages("noise", paths, (0, 1, 2, 3, 0, 1), NAMES, ("a {}",), tuple("abcdef"))
    scores = zero_shot_scores(model, preprocess, data, batch_size=4)
    images = torch.stack([preprocess(Image.open(path)) for path in paths])
    tokens = tokenizer.tokenize([f"a {name}" for name in NAMES], context_length=16)
    with torch.no_grad():
        probabilities, ranked = model(images, tokens)[0].softmax(dim=-1).topk(4, dim=-1)
    np.testing.assert_array_equal(scores.ranked, ranked)
    np.testing.assert_allclose(scores.probabilities, probabilities, atol=1e-5)
    cosines = F.cosine_similarity(model.encode_image(images)[:, None], model.encode_text(tokens)[None], dim=-1)
    np.testing.assert_allclose(scores.cosines, cosines.detach().sort(descending=True).values, atol=1e-6)


@pytest.mark.parametrize("num_classes, num_images", [(6, 50), (30, 400), (3, 20)])
def test_measures_agree_with_scikit_learn(num_classes, num_images):
    from sklearn import metrics as theirs

    random = np.random.default_rng(num_classes)
    logits = random.normal(size=(num_images, num_classes))
    labels = random.integers(num_classes - 1, size=num_images)  # the last class has no image
    logits[np.arange(num_images), labels] += 1
    guesses = min(5, num_classes)
    ranked = np.argsort(-logits, axis=1)[:, :guesses]
    everyone = tuple(map(str, range(num_images)))
    names = tuple(map(str, range(num_classes)))
    data = LabelledImages("random", tuple(map(Path, everyone)), tuple(labels.tolist()), names, ("{}",), everyone)
    cosines = np.take_along_axis(logits, ranked, axis=1)
    probabilities = np.take_along_axis(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), ranked, axis=1)
    scores = ClassificationScores(data, np.arange(num_images), labels, ranked, cosines, probabilities, ())
    ours = scores.metrics
    every_class = range(num_classes)
    assert ours.acc1 == pytest.approx(theirs.accuracy_score(labels, ranked[:, 0]))
    if num_classes > 5:
        assert ours.acc5 == pytest.approx(theirs.top_k_accuracy_score(labels, logits, k=5, labels=every_class))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of the class without images
        assert ours.mean_per_class_recall == pytest.approx(theirs.balanced_accuracy_score(labels, ranked[:, 0]))
        recalls = theirs.recall_score(labels, ranked[:, 0], labels=every_class, average=None, zero_division=np.nan)
    np.testing.assert_allclose(ours.per_class.recall, recalls)
    expected = theirs.confusion_matrix(labels, ranked[:, 0], labels=every_class)
    np.testing.assert_array_equal(ours.confusion.matrix(), expected)


def test_groups_of_unreadable_images_do_not_shift_those_of_the_others(tmp_path):
    """Group a is right throughout, group b wrong: four images of each say as much as one."""
    rows = [(1, [9, 0, 0, 0, 0, 0, 0]), *[(0, [9, 0, 0, 0, 0, 0, 0])] * 4, *[(1, [9, 0, 0, 0, 0, 0, 0])] * 4]
    data = pictures(tmp_path, rows, tuple("baaaabbbb"))
    (tmp_path / "0.png").write_text("no picture")
    z = 1.959963984540054
    half = z / (2 * math.sqrt(1 + z**2))  # Wilson's, of one image and a share of 0.5
    assert scores_of(data).metrics.interval == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))


# ---------------------------------------------------------------------------------------------------------------------
# Ties, and features by hand


def features_of(rows: list[list[float]], labels: tuple[int, ...], classes: int) -> ImageFeatures:
    everyone = tuple(map(str, range(len(rows))))
    names = tuple(f"class {c}" for c in range(classes))
    data = LabelledImages("by hand", everyone, labels, names, ("{}",), everyone)
    return ImageFeatures(data, np.arange(len(rows)), torch.tensor(rows), ())


def test_of_equal_cosines_the_first_class_is_guessed_first():
    # Classes 0 and 2 point along x, 1 and 3 along y, 4 between.
    half = 0.5**0.5
    classifier = torch.tensor([[1, 0, 1, 0, half], [0, 1, 0, 1, half]], dtype=torch.float32)
    images = features_of([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [-1.0, -1.0]], (2, 3, 4, 4), 5)
    scores = classify(images, images.data, classifier, 1.0, (1, 2, 3))
    assert scores.ranked.tolist() == [[0, 2, 4, 1, 3], [1, 3, 4, 0, 2], [4, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    np.testing.assert_allclose(scores.cosines[0], [1, 1, half, 0, 0], atol=1e-6)
    assert scores.metrics.top_k == {1: 0.25, 2: 0.75, 3: 0.75, 5: 1.0}


def test_columns_that_are_equal_give_equal_cosines_wherever_they_stand():
    """A product's last bits depend on the place of a column."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        columns = F.normalize(torch.randn(33, 61), dim=0)
        images = features_of(torch.randn(50, 33).tolist(), (0,) * 50, 122)
    scores = classify(images, images.data, torch.cat([columns, columns], dim=1), 10.0, (1, 6))
    assert (scores.ranked[:, ::2] + 61 == scores.ranked[:, 1::2]).all()
    np.testing.assert_array_equal(scores.cosines[:, ::2], scores.cosines[:, 1::2])


@pytest.mark.parametrize(
    ("classifier", "says"),
    [
        ([[1.0, 0.0], [0.0, 0.0]], "features that are zero, for the prompts of 'class 1' in by hand"),
        ([[1.0, math.nan], [0.0, 1.0]], "features that are not finite, for the prompts of by hand"),
        ([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], "2 numbers for an image and 3 for a text"),
    ],
)
def test_a_classifier_that_gives_no_cosines_is_refused(classifier, says):
    images = features_of([[1.0, 0.0], [0.0, 2.0]], (0, 1), 2)
    with pytest.raises(ValueError, match=says):
        classify(images, images.data, torch.tensor(classifier), 1.0)
    data = images.data
    several = MultilabelImages("by hand", data.images, np.eye(2, dtype=bool), data.classnames, ("{}",), data.groups)
    with pytest.raises(ValueError, match=says):
        score_labels(images, several, torch.tensor(classifier))


def test_more_guesses_than_were_kept_cannot_be_told():
    images = features_of([[1.0, 0.0]], (0,), 8)
    scores = classify(images, images.data, F.normalize(torch.ones(2, 8), dim=0), 1.0)
    with pytest.raises(ValueError, match="top-6 can't be told from 5 guesses"):
        assert replace(scores, ks=(6,)).metrics
