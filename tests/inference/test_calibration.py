"""Calibration: one half chooses, the other tries, and what is promised of fresh images holds."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import picture, tiny_clip

from miniclip.evaluation.datasets.sets import EvaluationSet, LabelledImages
from miniclip.evaluation.encoder import from_clip
from miniclip.evaluation.features import ImageFeatures
from miniclip.evaluation.none_of_these import none_of_these
from miniclip.evaluation.zero_shot import classify
from miniclip.inference.calibration import calibrate
from miniclip.inference.thresholds import FILE, read_threshold, write_threshold
from miniclip.weights.load import preprocess_for

NAMES, E = ("cat", "dog", "owl"), 8
LOGIT_SCALE = 20.0
CLASSIFIER = torch.eye(E)[:, :3]


def features(random, count, spread):
    """Images of the three classes in turn, so far from their class's direction."""
    means = torch.eye(E)[torch.arange(count) % 3]
    return means + torch.from_numpy(random.normal(0, spread, (count, E)).astype(np.float32))


def inside(random, count, groups=None):
    labels = tuple(number % 3 for number in range(count))
    everyone = tuple(map(str, range(count))) if groups is None else groups
    data = LabelledImages("animals", tuple(map(str, range(count))), labels, NAMES, ("a {}",), everyone)
    images = ImageFeatures(data, np.arange(count), features(random, count, 0.4), ())
    return images, classify(images, data, CLASSIFIER, LOGIT_SCALE)


def outside(random, count):
    data = EvaluationSet("streets", tuple(map(str, range(count))))
    rows = torch.from_numpy(random.normal(0.2, 1, (count, E)).astype(np.float32))
    return ImageFeatures(data, np.arange(count), rows, ())


def chosen(images, scores, others, **options):
    groups = tuple(map(str, range(len(others.features))))
    return none_of_these(images, scores, others, groups, CLASSIFIER, LOGIT_SCALE, **options)


@pytest.mark.parametrize("count, false_acceptance", [(38, 0.05), (200, 0.05), (80, 0.25)])
def test_fresh_images_of_no_class_are_accepted_as_often_as_promised(count, false_acceptance):
    accepted, is_in_interval = [], []
    fresh = (outside(np.random.default_rng(999), 20_000).unit @ CLASSIFIER).amax(dim=1).numpy()
    for seed in range(200):
        random = np.random.default_rng(seed)
        found = chosen(*inside(random, 12), outside(random, count), false_acceptance=false_acceptance)
        assert found.is_promised
        accepted.append((fresh >= found.acceptance.threshold.cosine).mean())
        low, high = found.acceptance.interval_outside
        is_in_interval.append(low <= accepted[-1] <= high)
    mean, error = np.mean(accepted), np.std(accepted) / math.sqrt(len(accepted))
    assert mean <= false_acceptance + 3 * error
    promised = math.floor(false_acceptance * (count // 2 + 1) + 1e-9) / (count // 2 + 1)
    assert (
        mean >= promised - 1 / (count // 2 + 1) - 3 * error
    )  # as no more than the threshold's place between two costs
    assert np.mean(is_in_interval) >= 0.9  # intervals of 95 %


def test_fresh_images_of_the_classes_are_covered_as_often_as_promised():
    fresh, labels = features(np.random.default_rng(999), 9000, 0.4), np.arange(9000) % 3
    unit = torch.nn.functional.normalize(fresh, dim=-1)
    surprisal = -(LOGIT_SCALE * unit @ CLASSIFIER).double().log_softmax(dim=1).numpy()[np.arange(9000), labels]
    covered = {0.5: [], 0.8: [], 0.9: []}
    for seed in range(100):
        random = np.random.default_rng(seed)
        found = chosen(*inside(random, 60), outside(random, 10), coverages=tuple(covered))
        for each in found.coverages:
            covered[each.coverage].append((surprisal <= each.cut).mean())
    for coverage, shares in covered.items():
        error = np.std(shares) / math.sqrt(len(shares))
        assert coverage - 3 * error <= np.mean(shares) <= coverage + 1 / 31 + 3 * error  # of 30 that a cut is chosen on


def test_coverages_are_measured_on_the_half_that_they_were_not_chosen_on():
    images, scores = inside(np.random.default_rng(1), 60)
    found = chosen(images, scores, outside(np.random.default_rng(2), 10), coverages=(0.8,))
    (coverage,) = found.coverages
    values = -(LOGIT_SCALE * images.unit @ CLASSIFIER).double().log_softmax(dim=1).numpy()
    own = values[np.arange(60), scores.labels]
    # the 25th of 30, ⌈31 · 0.8⌉, is some image's, and the other thirty are those that the best cosines are of
    assert np.abs(own - coverage.cut).min() < 1e-5
    is_tried = np.isin(scores.cosines[:, 0], found.inside)
    assert (is_tried.sum(), coverage.num_chosen, coverage.num_tried) == (30, 30, 30)
    assert coverage.cut == pytest.approx(np.sort(own[~is_tried])[24], abs=1e-5)
    in_set = values[is_tried] <= coverage.cut + 1e-5
    assert coverage.covered == in_set[np.arange(30), scores.labels[is_tried]].mean()
    assert coverage.mean_size == pytest.approx(in_set.sum(axis=1).mean())
    assert coverage.share_empty == (in_set.sum(axis=1) == 0).mean()


def test_by_default_coverages_are_those_that_there_are_enough_images_for():
    others = outside(np.random.default_rng(0), 10)
    for count, expected in ((12, ()), (18, (0.9,)), (38, (0.9, 0.95)), (198, (0.9, 0.95, 0.99))):
        found = chosen(*inside(np.random.default_rng(0), count), others)
        assert tuple(each.coverage for each in found.coverages) == expected
    with pytest.raises(ValueError, match=r"coverage 0\.95 need 19 independent images .*half of animals has 18"):
        chosen(*inside(np.random.default_rng(0), 36), others, coverages=(0.95,))
    pairs = tuple(str(number // 2) for number in range(38))  # 19 groups of two
    with pytest.raises(ValueError, match="half of animals has 9"):
        chosen(*inside(np.random.default_rng(0), 38, pairs), others, coverages=(0.95,))


def test_too_few_images_promise_nothing_and_say_so():
    few = chosen(*inside(np.random.default_rng(0), 12), outside(np.random.default_rng(1), 36), false_acceptance=0.05)
    assert not few.is_promised
    assert "of 18 none; fresh ones need more images" in few.acceptance.threshold.rule
    never = chosen(*inside(np.random.default_rng(0), 12), outside(np.random.default_rng(1), 999), false_acceptance=0)
    assert not never.is_promised


def test_an_image_that_is_inside_and_outside_is_named():
    images, scores = inside(np.random.default_rng(0), 12)
    others = outside(np.random.default_rng(1), 10)
    rows = others.features.clone()
    rows[4] = images.features[7]
    with pytest.warns(UserWarning, match=r"1 of 10 images of streets are in animals as well.*the first is 4"):
        chosen(images, scores, replace(others, features=rows))


# ---------------------------------------------------------------------------------------------------------------------
# With a model


def pictures(name, first, count, **options):
    return EvaluationSet(name, tuple(picture(seed, **options) for seed in range(first, first + count)))


def labelled(count):
    images = pictures("animals", 0, count).images
    everyone = tuple(map(str, range(count)))
    return LabelledImages("animals", images, tuple(n % 3 for n in range(count)), NAMES, ("a {}", "the {}"), everyone)


@pytest.fixture(scope="module")
def model():
    clip = tiny_clip()
    return from_clip(clip, preprocess_for(clip.config), "tiny")


def test_what_travels_is_what_was_measured(model, tmp_path):
    data, others = labelled(36), pictures("streets", 100, 20, mode="L")
    threshold, result = calibrate(model, data, others, false_acceptance=0.2, coverages=(0.8, 0.5, 0.8))
    found = result.outside.acceptance
    assert (threshold.cosine, threshold.rule) == (found.threshold.cosine, "at most 20 % of outside images accepted")
    assert threshold.inside.accepted == found.accepted_inside
    assert (threshold.outside.accepted, threshold.outside.interval) == (found.accepted_outside, found.interval_outside)
    assert (threshold.outside.name, threshold.outside.num_chosen, threshold.outside.num_tried) == ("streets", 10, 10)
    assert (threshold.classnames, threshold.templates) == (NAMES, ("a {}", "the {}"))
    assert threshold.coverages == result.outside.coverages
    assert [each.coverage for each in threshold.coverages] == [0.5, 0.8]
    write_threshold(tmp_path / FILE, threshold)
    read = read_threshold(tmp_path / FILE)
    assert read == replace(threshold, source=str(tmp_path / FILE))
    read.check_model(model)
    # applied to the images that it was tried on, it rejects and covers what the file has
    rejected = read.rejects(result.outside.outside)
    assert 1 - rejected.mean() == read.outside.accepted


@pytest.mark.parametrize(
    "options, says",
    [
        ({"false_acceptance": 0}, "a false acceptance of 0; it is a share between 0 and 1"),
        ({"false_acceptance": 5}, "a false acceptance of 5; it is a share"),
        ({"false_acceptance": math.nan}, "a false acceptance of nan; it is a share"),
        ({}, r"0\.05 needs 38 independent images, .*; streets has 20 images"),
        ({"false_acceptance": 0.2, "coverages": (0.9, 0.99)}, r"0\.99 needs 198 independent .*animals has 36 images"),
        ({"false_acceptance": 0.2, "coverages": (95,)}, "a coverage of 95; it is a share"),
    ],
)
def test_what_so_few_images_cannot_promise_is_refused_before_any_is_read(model, options, says):
    data, others = labelled(36), EvaluationSet("streets", ("nowhere.png",) * 20)
    with pytest.raises(ValueError, match=says):
        calibrate(model, data, others, **options)


def test_too_few_that_can_be_read_are_refused(model):
    images = (*pictures("", 100, 7).images, b"no picture", b"none either", None)
    with pytest.raises(ValueError, match=r"streets has too few independent images \(3 can't be read\)"):
        calibrate(model, labelled(12), EvaluationSet("streets", images), false_acceptance=0.2)
