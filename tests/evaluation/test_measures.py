"""Every number is worked out by hand in a comment, by scikit-learn, torchmetrics, scipy, or by a loop the long way."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm

from miniclip.evaluation.measures import ranking as metrics
from miniclip.evaluation.measures.classification import (
    Confusion,
    average_precision,
    calibration,
    is_among_guesses,
    macro_f1,
    mean_per_class_recall,
    most_confused,
    multilabel,
    per_class,
    per_class_f1,
    per_class_precision,
    per_class_recall,
    subgroup_accuracy,
)
from miniclip.evaluation.measures.ranking import recall_at_1, retrieval
from miniclip.evaluation.measures.statistics import (
    compare,
    difference_interval,
    effective_robustness,
    fit_robustness,
    mcnemar,
    sign_flips,
    wilson_interval,
)
from miniclip.evaluation.measures.thresholds import apply_threshold, calibrate_threshold, separation

# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_the_interval_is_the_binomials_for_independent_values(share):
    values = np.arange(1000) < 1000 * share
    low, high = wilson_interval(values, np.arange(1000))
    expected = 2 * 1.96 * math.sqrt(share * (1 - share) / 1000)
    assert high - low == pytest.approx(expected, rel=0.1)
    assert (low + high) / 2 == pytest.approx(share, abs=0.005)


def test_images_that_stand_and_fall_together_widen_the_interval_as_fewer_would():
    values = np.repeat(np.arange(100) < 60, 10)
    alone = wilson_interval(values, np.arange(1000))
    together = wilson_interval(values, np.repeat(np.arange(100), 10))
    assert width(together) / width(alone) == pytest.approx(math.sqrt(10), rel=0.1)


def test_the_names_of_the_groups_do_not_matter():
    values = np.random.default_rng(0).random(60) < 0.4
    numbers = np.arange(60) // 3
    assert wilson_interval(values, numbers) == wilson_interval(values, np.array([f"{n:03d}" for n in numbers]))
    assert wilson_interval(values) == wilson_interval(values, np.arange(60))


def test_wilsons_interval_by_hand_and_by_scipy():
    from scipy.stats import binomtest

    # 0 of 1: the middle is z²/2 / (1 + z²), and half as far again is all of it: 0 to z² / (1 + z²)
    z = 1.959963984540054
    assert wilson_interval(np.array([0])) == (0.0, pytest.approx(z**2 / (1 + z**2)))
    assert wilson_interval(np.array([1])) == (pytest.approx(1 / (1 + z**2)), 1.0)
    for right, count in [(0, 7), (3, 7), (7, 7), (81, 263), (1, 1000)]:
        low, high = wilson_interval(np.arange(count) < right)
        theirs = binomtest(right, count).proportion_ci(method="wilson")
        assert (low, high) == (pytest.approx(theirs.low, abs=1e-12), pytest.approx(theirs.high, abs=1e-12))
        assert low <= right / count <= high


@pytest.mark.parametrize("lost, gained", [(0.02, 0.01), (0.03, 0.0), (0.1, 0.08)])
def test_the_largest_loss_is_larger_than_the_true_one_as_often_as_it_should_be(lost, gained):
    """An end of a 95 % interval leaves 2.5 % out; seldom losses fall on 0, 1, 2, … images, so a few more."""
    random, bounds = np.random.default_rng(0), []
    for _ in range(400):
        draw = random.random(179)
        first, second = draw < 0.5, (draw >= lost) & (draw < 0.5) | (draw >= 1 - gained)
        bounds.append(-difference_interval(second & ~first, first & ~second)[0])
    assert 0.95 <= np.mean(np.array(bounds) >= lost - gained) < 1


def test_wilsons_interval_takes_images_that_are_all_alike_as_one():
    """Ten pictures of each of 100 things, right or wrong together, say what 100 pictures say, but for 99 of 100."""
    groups = np.repeat(np.arange(100), 10)
    together = wilson_interval(np.repeat(np.arange(100) < 60, 10), groups)
    alone = wilson_interval(np.arange(100) < 60)
    np.testing.assert_allclose(together, alone, atol=1e-3)
    assert wilson_interval(np.ones(1000), groups) == wilson_interval(np.ones(100))
    assert wilson_interval(np.ones(10), np.zeros(10)) == wilson_interval(np.ones(1))
    # sizes 1 and 3: (1 + 3)² / (1² + 3²) = 1.6 images
    low, high = wilson_interval(np.ones(4), np.array(["a", "b", "b", "b"]))
    assert (low, high) == (pytest.approx(1 / (1 + 1.959963984540054**2 / 1.6)), 1.0)


def test_groups_that_say_nothing_leave_wilsons_interval_as_it_is():
    """Each group has the share of the whole: no more spread than chance, and never narrower than independent images."""
    values, groups = np.tile([0, 1], 50), np.repeat(np.arange(50), 2)
    assert wilson_interval(values, groups) == wilson_interval(values)
    values[0] = 1
    assert wilson_interval(values, groups) == wilson_interval(values)


def test_wilsons_interval_with_groups_by_hand():
    """Two groups, right 2 of 2 and 1 of 2: 0.5 above and below the 1.5 to expect. The variance of the share is
    (0.25 + 0.25) · 2 / (2 - 1) / 4² = 0.0625, and of one image 0.75 · 0.25 = 0.1875: as much as of 3 images."""
    low, high = wilson_interval([1, 1, 1, 0], [0, 0, 1, 1])
    # Wilson's ends are where the distance from 0.75, squared, is z² p (1 - p) / 3
    z = 1.959963984540054
    for end in (low, high):
        assert (end - 0.75) ** 2 == pytest.approx(z**2 * end * (1 - end) / 3)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_wilsons_interval_holds_the_truth_in_95_of_100_cases_with_groups_or_without(share):
    random = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), 4)
    held = np.zeros(2)
    for _ in range(400):
        each = random.random(60) < share  # one draw for the four of a group, or one for each
        for i, values in enumerate((np.repeat(each, 4), random.random(240) < share)):
            low, high = wilson_interval(values, groups)
            held[i] += low <= share <= high
    assert (held / 400 >= 0.92).all()
    assert (held / 400 <= 0.99).all()


@pytest.mark.parametrize(
    "share, num_groups, size",
    [(0.5, 60, 4), (0.9, 60, 4), (0.98, 60, 4), (0.5, 20, 10), (0.9, 20, 10), (0.98, 20, 10), (0.98, 100, 10)],
)
def test_wilsons_interval_holds_the_truth_however_far_groups_are_alike(share, num_groups, size):
    """All images of a group alike, none, or those of every second group on average."""
    random, held, times = np.random.default_rng(0), np.zeros(3), 500
    groups = np.repeat(np.arange(num_groups), size)
    for _ in range(times):
        alike = np.repeat(random.random(num_groups) < share, size)
        apart = random.random(len(groups)) < share
        mixed = np.where(np.repeat(random.random(num_groups) < 0.5, size), alike, apart)
        for i, values in enumerate((alike, apart, mixed)):
            low, high = wilson_interval(values, groups)
            held[i] += low <= share <= high
    assert (held / times >= 0.92).all(), held / times


def test_wrong_images_never_raise_the_lower_end_above_that_of_none():
    """Seven groups that are all right are seven images, whose lower end is 1 / (1 + z² / 7); the mirror image below."""
    groups, wrong = np.repeat(np.arange(7), 7)[:48], [30, 40, 2, 17, 9, 46, 21, 36]
    all_right = 1 / (1 + 1.959963984540054**2 * float((np.bincount(groups) ** 2).sum()) / 48**2)
    right = np.ones(48, dtype=bool)
    before = wilson_interval(right, groups)
    assert before == (pytest.approx(all_right), 1)
    for image in wrong:
        right[image] = False
        ends = wilson_interval(right, groups)
        assert ends[0] <= all_right + 1e-12
        assert ends[1] <= before[1]
        assert wilson_interval(~right, groups) == pytest.approx((1 - ends[1], 1 - ends[0]))
        before = ends


def test_an_image_more_that_is_lost_does_not_make_a_difference_better():
    groups, gained = np.repeat(np.arange(7), 7)[:48], np.isin(np.arange(48), [0, 7, 14, 15])
    lows = [difference_interval(gained, np.isin(np.arange(48), [30, 40][:lost]), groups)[0] for lost in (0, 1, 2)]
    assert lows == sorted(lows, reverse=True)


def difference_of_one(values, groups):
    return difference_interval(values, np.zeros(len(values)), groups)


@pytest.mark.parametrize("interval", [difference_of_one, wilson_interval])
@pytest.mark.parametrize(
    "values, groups, says",
    [
        ([], None, "there are no (values|images that were gained)"),
        ([0.0, np.nan, 1.0, np.nan], None, r"2 of 4 rows \(numbers 1, 3\) are not finite"),
        ([[0, 1]], None, r"shape \(1, 2\)"),
        ([0, 1], [1, 2, 3], "3 groups for 2 images"),
        ([0, 1], ["a", None], r"groups: 1 of 2 rows \(numbers 1\) are None or NaN"),
        ([0, 1], [np.nan, 1.0], r"groups: 1 of 2 rows \(numbers 0\) are None or NaN"),
        (["yes", "no"], None, "are numbers; these are of type <U3"),
    ],
)
def test_what_has_no_interval_is_refused(interval, values, groups, says):
    with pytest.raises(ValueError, match=says):
        interval(np.array(values), None if groups is None else np.array(groups))


def test_a_share_is_of_yes_and_no():
    with pytest.raises(ValueError, match=r"True or False, or 1 or 0, for each image; one is 0\.5"):
        wilson_interval(np.array([0, 1, 0.5]))


# ---------------------------------------------------------------------------------------------------------------------
# Classification


def test_one_class_or_one_image_is_enough():
    assert is_among_guesses(np.array([[0]]), np.array([0])).tolist() == [True]
    table = per_class([0], [0], 1)
    assert (table.recall.tolist(), table.precision.tolist(), table.f1.tolist()) == ([1], [1], [1])
    assert macro_f1(Confusion.of([0, 0], [0, 0], 1)) == 1


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_equals_scikit_learns_where_nothing_ties(k):
    from sklearn.metrics import top_k_accuracy_score

    random = np.random.default_rng(k)
    cosines = random.normal(size=(200, 9)).astype(np.float32)
    labels = random.integers(9, size=200)
    cosines[np.arange(200), labels] += 1
    ranked = torch.from_numpy(cosines).topk(5).indices.numpy()
    ours = is_among_guesses(ranked, labels, k).mean()
    assert ours == pytest.approx(top_k_accuracy_score(labels, cosines, k=k))


def test_a_k_that_cannot_be_told_is_refused():
    with pytest.raises(ValueError, match="k is 0"):
        is_among_guesses(np.array([[0, 1]]), np.array([0]), 0)
    with pytest.raises(ValueError, match="top-3 can't be told from 2 guesses"):
        is_among_guesses(np.array([[0, 1]]), np.array([2]), 3)


# Class 0: three images, two right, one taken for 2. Class 1: two, one right, one taken for 0. Class 2: none.
# Class 3: one, taken for 0. So 0 was guessed four times, 1 once, 2 once, and 3 never.
TRUE, GUESSED = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 0, 2, 1, 0, 0])


def test_the_table_by_class_by_hand():
    table = per_class(TRUE, GUESSED, 4)
    assert table.images.tolist() == [3, 2, 0, 1]
    assert table.guessed.tolist() == [4, 1, 1, 0]
    np.testing.assert_allclose(table.recall, [2 / 3, 1 / 2, np.nan, 0])
    np.testing.assert_allclose(table.precision, [2 / 4, 1, 0, np.nan])
    np.testing.assert_allclose(table.f1, [4 / 7, 2 / 3, np.nan, 0])  # 2 · right / (images + guessed)
    assert tuple(table.recall_intervals[0]) == wilson_interval([1, 1, 0])
    assert tuple(table.recall_intervals[3]) == wilson_interval([0])
    assert np.isnan(table.recall_intervals[2]).all()
    confusion = Confusion.of(TRUE, GUESSED, 4)
    assert confusion.matrix().tolist() == [[2, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert mean_per_class_recall(confusion) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert macro_f1(confusion) == pytest.approx((4 / 7 + 2 / 3 + 0) / 3)
    assert most_confused(confusion) == [(3, 0, 1), (1, 0, 1), (0, 2, 1)]
    assert most_confused(confusion, most=1) == [(3, 0, 1)]
    assert most_confused(Confusion.of([0, 0, 0, 1, 1], [0, 0, 0, 1, 1], 2)) == []


def test_the_intervals_by_class_know_of_groups():
    groups = np.array(["x", "x", "x", "y", "z", "w"])
    table = per_class(TRUE, GUESSED, 4, groups)
    assert tuple(table.recall_intervals[0]) == wilson_interval([1, 1, 0], ["x", "x", "x"])
    assert tuple(table.recall_intervals[1]) == wilson_interval([1, 0])


@pytest.mark.filterwarnings("ignore")  # scikit-learn's, of classes without images
@pytest.mark.parametrize("num_classes, num_images", [(4, 30), (30, 60), (1, 5)])
def test_measures_by_class_agree_with_scikit_learn(num_classes, num_images):
    from sklearn import metrics as theirs

    random = np.random.default_rng(num_classes)
    labels, guesses = random.integers(num_classes, size=(2, num_images))
    confusion, present = Confusion.of(labels, guesses, num_classes), np.unique(labels)
    every = range(num_classes)
    np.testing.assert_array_equal(confusion.matrix(), theirs.confusion_matrix(labels, guesses, labels=every))
    options = {"labels": every, "average": None, "zero_division": np.nan}
    np.testing.assert_allclose(per_class_recall(confusion), theirs.recall_score(labels, guesses, **options))
    np.testing.assert_allclose(per_class_precision(confusion), theirs.precision_score(labels, guesses, **options))
    f1 = theirs.f1_score(labels, guesses, **options)
    np.testing.assert_allclose(per_class_f1(confusion)[present], f1[present])
    assert mean_per_class_recall(confusion) == pytest.approx(theirs.balanced_accuracy_score(labels, guesses))
    assert macro_f1(confusion) == pytest.approx(theirs.f1_score(labels, guesses, labels=present, average="macro"))


def test_no_measure_by_class_warns():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        per_class(TRUE, GUESSED, 9)


def test_classes_without_any_image_have_no_mean():
    with pytest.raises(ValueError, match="not one of 3 classes has an image"):
        mean_per_class_recall(Confusion(3, *np.zeros((3, 0), dtype=int)))
    with pytest.raises(ValueError, match="there are no labels"):
        Confusion.of([], [], 3)
    with pytest.raises(ValueError, match="1 guesses for 2 images"):
        Confusion.of([0, 1], [0], 3)


# ---------------------------------------------------------------------------------------------------------------------
# Several classes for an image


def test_average_precision_by_hand():
    # by falling score: yes, no, yes, no; precision at the two is 1/1 and 2/3
    assert average_precision([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0]) == pytest.approx((1 + 2 / 3) / 2)
    # all the same score: the precision where both are found is 2 of 4, whatever the order
    assert average_precision([0.5] * 4, [1, 0, 1, 0]) == average_precision([0.5] * 4, [0, 0, 1, 1]) == 0.5
    assert average_precision([0.3], [1]) == 1
    assert math.isnan(average_precision([0.3, 0.2], [0, 0]))


def test_multilabel_mean_agrees_with_scikit_learn_and_leaves_out_classes_without_positives():
    from sklearn.metrics import average_precision_score

    random = np.random.default_rng(0)
    for decimals in (8, 1):  # with one decimal, most scores tie
        cosines = random.normal(size=(50, 6)).round(decimals)
        is_positive = random.random((50, 6)) < 0.2
        is_positive[:, 3] = False
        found = multilabel(cosines, is_positive)
        having = [0, 1, 2, 4, 5]
        expected = [average_precision_score(is_positive[:, c], cosines[:, c]) for c in having]
        np.testing.assert_allclose(found.per_class[having], expected)
        assert np.isnan(found.per_class[3])
        assert found.left_out == (3,)
        assert found.mean_average_precision == pytest.approx(np.mean(expected))
        np.testing.assert_array_equal(found.positives, is_positive.sum(axis=0))


@pytest.mark.parametrize(
    "is_positive, says",
    [
        (np.zeros((4, 3)), "not one of 3 classes has an image"),
        (np.zeros((4, 2)), r"cosines have shape \(4, 3\), positives \(4, 2\)"),
        (np.full((4, 3), 2), "True or False, or 1 or 0"),
    ],
)
def test_multilabel_positives_that_do_not_fit_are_refused(is_positive, says):
    with pytest.raises(ValueError, match=says):
        multilabel(np.full((4, 3), 0.3), is_positive)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


def test_calibration_by_hand():
    # two bins: 0.2 and 0.5 (one right of two, said 0.35), 0.6 and 1.0 and 0.8 (one of three, said 0.8)
    confidence, correct = [0.2, 0.6, 0.5, 1.0, 0.8], [0, 1, 1, 0, 0]
    found = calibration(confidence, correct, num_bins=2)
    assert found.edges.tolist() == [0, 0.5, 1]
    assert found.images.tolist() == [2, 3]
    np.testing.assert_allclose(found.confidence, [0.35, 0.8])
    np.testing.assert_allclose(found.accuracy, [1 / 2, 1 / 3])
    assert found.error == pytest.approx((2 * 0.15 + 3 * (0.8 - 1 / 3)) / 5)
    assert found.largest_error == pytest.approx(0.8 - 1 / 3)


def test_adaptive_bins_by_hand_hold_equally_many_and_keep_equal_confidences_together():
    confidence, correct = [0.9, 0.91, 0.92, 0.93, 0.94, 0.99], [1, 0, 1, 1, 0, 1]
    found = calibration(confidence, correct, num_bins=3, is_adaptive=True)
    assert found.images.tolist() == [2, 2, 2]
    assert found.edges.tolist() == [0, 0.91, 0.93, 1]
    assert found.error == pytest.approx((2 * 0.405 + 2 * (1 - 0.925) + 2 * (0.965 - 0.5)) / 6)
    same = calibration([1.0] * 10, [1] * 7 + [0] * 3, num_bins=5, is_adaptive=True)
    assert same.images.tolist() == [10]
    assert same.error == pytest.approx(0.3)
    alone = calibration([0.25], [1], is_adaptive=True)
    assert (alone.error, alone.images.sum()) == (0.75, 1)


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_calibration_agrees_with_torchmetrics(num_bins):
    from torchmetrics.functional.classification import multiclass_calibration_error

    random = np.random.default_rng(num_bins)
    probabilities = torch.from_numpy(random.normal(size=(300, 4)) * 2).softmax(dim=1)
    labels = torch.from_numpy(random.integers(4, size=300))
    correct = (probabilities.argmax(dim=1) == labels).numpy()
    ours = calibration(probabilities.max(dim=1).values.numpy(), correct, num_bins)
    for norm, value in (("l1", ours.error), ("max", ours.largest_error)):
        theirs = multiclass_calibration_error(probabilities, labels, 4, n_bins=num_bins, norm=norm)
        assert value == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("is_adaptive", [False, True])
def test_what_is_said_with_p_and_right_in_p_of_cases_is_calibrated(is_adaptive):
    random = np.random.default_rng(0)
    confidence = random.random(20_000)
    found = calibration(confidence, random.random(20_000) < confidence, 10, is_adaptive)
    assert found.error < 0.015
    assert calibration(confidence, random.random(20_000) < confidence / 2, 10, is_adaptive).error > 0.2
    assert found.images.sum() == 20_000
    if is_adaptive:
        assert set(found.images.tolist()) == {2000}


def test_bins_without_images_are_undefined_and_weigh_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = calibration([0.0, 1.0], [0, 1], num_bins=4)
    assert found.images.tolist() == [1, 0, 0, 1]
    assert np.isnan(found.accuracy[1:3]).all()
    assert (found.error, found.largest_error) == (0, 0)


@pytest.mark.parametrize(
    "confidence, num_bins, says",
    [
        ([1.5, 0.2], 15, "from 0 to 1; one is 1.5"),
        ([-0.1, 0.2], 15, "one is -0.1"),
        ([np.nan, 0.2], 15, "not finite"),
        ([0.1, 0.2], 0, "0 bins"),
        ([0.1], 15, "2 right and wrong guesses for 1 images"),
        ([], 15, "there are no confidences"),
    ],
)
def test_confidences_that_are_none_are_refused(confidence, num_bins, says):
    with pytest.raises(ValueError, match=says):
        calibration(confidence, [0, 1], num_bins)


# ---------------------------------------------------------------------------------------------------------------------
# Subgroups


def test_subgroups_by_hand():
    # "old" 3 of 4, "new" 1 of 2, "odd" 0 of 1, and two images of which nothing is known
    values = ["old", "new", "old", None, "old", "new", "old", "", "odd"]
    correct = [1, 0, 1, 1, 1, 1, 0, 0, 0]
    found = subgroup_accuracy(correct, values, min_groups=2)
    assert [(s.value, s.num_images, s.accuracy, s.is_too_small) for s in found.subgroups] == [
        ("old", 4, 0.75, False),
        ("new", 2, 0.5, False),
        (None, 2, 0.5, False),
        ("odd", 1, 0.0, True),
    ]
    assert found.subgroups[0].interval == wilson_interval([1, 1, 1, 0])
    assert found.gap == 0.25
    assert (found.best.value, found.worst.value) == ("old", "new")


def test_images_of_one_group_are_too_few_however_many_they_are():
    correct, values = np.ones(80), np.repeat(["a", "b"], 40)
    groups = np.concatenate([np.arange(40), np.zeros(40)])
    a, b = subgroup_accuracy(correct, values, groups).subgroups
    assert (a.num_groups, a.is_too_small, b.num_groups, b.is_too_small) == (40, False, 2 - 1, True)
    assert b.interval == wilson_interval([1])
    assert subgroup_accuracy(correct, values, groups).gap is None
    assert subgroup_accuracy(correct, values).gap == 0


def test_every_nan_is_the_same_missing_value():
    (one,) = subgroup_accuracy([1, 0, 1], np.array([np.nan, np.nan, np.nan])).subgroups
    assert (one.value, one.num_images) == (None, 3)


def test_subgroups_need_a_value_for_each_image():
    with pytest.raises(ValueError, match="1 values of metadata for 2 images"):
        subgroup_accuracy([1, 0], ["a"])
    with pytest.raises(ValueError, match="there are no right and wrong guesses"):
        subgroup_accuracy([], [])


# ---------------------------------------------------------------------------------------------------------------------
# None of these


def test_separation_by_hand():
    # of 2 · 3 pairs, inside is above in 1 + 1 (0.4) and 3 (0.9), and ties once (0.4)
    found = separation([0.4, 0.9], [0.4, 0.1, 0.2])
    assert found.auroc == pytest.approx((2 + 0.5 + 3) / 6)
    # by falling score: 0.9 in (1/1), then 0.4 in and out together (2/3)
    assert found.aupr_inside == pytest.approx((1 + 2 / 3) / 2)
    # by rising score: 0.1 out (1/1), 0.2 out (2/2), then both 0.4 (3/4)
    assert found.aupr_outside == pytest.approx((1 + 1 + 3 / 4) / 3)
    assert found.fpr_at_95_tpr == pytest.approx(1 / 3)  # all inside ones need 0.4, which one of three reaches


@pytest.mark.parametrize("decimals", [8, 1])
@pytest.mark.parametrize("num_inside, num_outside", [(1, 1), (20, 7), (101, 300)])
def test_separation_agrees_with_scikit_learn(num_inside, num_outside, decimals):
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    random = np.random.default_rng(num_inside)
    inside = random.normal(0.3, 0.2, num_inside).round(decimals)
    outside = random.normal(0.1, 0.2, num_outside).round(decimals)
    found = separation(inside, outside)
    scores, is_inside = np.concatenate([inside, outside]), np.repeat([1, 0], [num_inside, num_outside])
    assert found.auroc == pytest.approx(roc_auc_score(is_inside, scores))
    assert found.aupr_inside == pytest.approx(average_precision_score(is_inside, scores))
    assert found.aupr_outside == pytest.approx(average_precision_score(1 - is_inside, -scores))
    fpr, tpr, _ = roc_curve(is_inside, scores, drop_intermediate=False)
    assert found.fpr_at_95_tpr == pytest.approx(fpr[np.argmax(tpr >= 0.95)])


def test_a_threshold_for_a_false_acceptance_by_hand():
    outside, inside = [0.1, 0.2, 0.3, 0.4], [0.25, 0.5]
    # a quarter of four is one, so 0.4 may pass and 0.3 may not; none: all of 0.4 must stay out
    quarter = calibrate_threshold(inside, outside, split="val", false_acceptance=0.25)
    assert quarter.cosine == pytest.approx(0.35)
    assert quarter.rule == "at most 25 % of outside images accepted"
    assert calibrate_threshold(inside, outside, split="val", false_acceptance=0).cosine == pytest.approx(0.45)
    # 0.49 of four is still one; three quarters leave out 0.1 alone
    assert calibrate_threshold(inside, outside, split="val", false_acceptance=0.49).cosine == quarter.cosine
    assert calibrate_threshold(inside, outside, split="val", false_acceptance=0.75).cosine == pytest.approx(0.15)


def test_a_threshold_of_the_best_balanced_accuracy_by_hand():
    # from 0.4 up: 3 of 3 inside, 1 of 4 outside: (1 + 3/4) / 2; from 0.55 up: 2/3 and 4/4, which is less
    inside, outside = [0.4, 0.6, 0.7], [0.1, 0.2, 0.3, 0.5]
    threshold = calibrate_threshold(inside, outside, split="val")
    assert threshold.cosine == pytest.approx(0.35)
    found = apply_threshold(threshold, inside, outside, split="val")
    assert (found.accepted_inside, found.accepted_outside) == (1, 0.25)
    assert found.balanced_accuracy == pytest.approx(0.875)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_threshold_is_better(seed):
    random = np.random.default_rng(seed)
    inside = random.normal(0.3, 0.2, random.integers(1, 30)).round(1 + seed % 2)
    outside = random.normal(0.1, 0.2, random.integers(1, 30)).round(1 + seed % 2)
    tried = np.unique(np.concatenate([inside, outside, inside + 1e-6, outside + 1e-6]))
    accepted_inside = np.array([(inside >= cosine).mean() for cosine in tried])
    accepted_outside = np.array([(outside >= cosine).mean() for cosine in tried])
    best = apply_threshold(calibrate_threshold(inside, outside, split="a"), inside, outside, split="a")
    assert best.balanced_accuracy == pytest.approx(((accepted_inside + 1 - accepted_outside) / 2).max())
    for most in (0, 0.05, 0.29, 0.5, 0.99):
        threshold = calibrate_threshold(inside, outside, split="a", false_acceptance=most)
        found = apply_threshold(threshold, inside, outside, split="a")
        assert found.accepted_outside <= most + 1e-12
        assert found.accepted_inside == accepted_inside[accepted_outside <= most + 1e-12].max()


def test_0_29_of_100_is_29():
    outside = np.arange(100) / 100
    threshold = calibrate_threshold(outside, outside, split="val", false_acceptance=0.29)
    assert apply_threshold(threshold, outside, outside, split="val").accepted_outside == 0.29


def test_a_threshold_that_lets_nothing_in_is_above_all_that_was_seen():
    threshold = calibrate_threshold([0.1], [0.5, 0.5], split="val", false_acceptance=0.4)
    assert threshold.cosine > 0.5
    assert apply_threshold(threshold, [0.1], [0.5], split="test").accepted_outside == 0


def test_neighbouring_numbers_are_told_apart():
    low = 0.3
    for _ in range(4):  # halfway rounds up to one and down to the next
        high = np.nextafter(low, 1)
        assert low < calibrate_threshold([high], [low], split="val").cosine <= high
        low = high


def test_a_threshold_says_where_it_comes_from_and_what_it_was_tried_on():
    threshold = calibrate_threshold([0.4, 0.6], [0.1, 0.2], split="flowers/val", false_acceptance=0.05)
    assert (threshold.split, threshold.num_inside, threshold.num_outside) == ("flowers/val", 2, 2)
    found = apply_threshold(threshold, [0.2, 0.5, 0.6, 0.7], [0.35, 0.1], split="flowers/test")
    assert (found.accepted_inside, found.accepted_outside) == (0.75, 0.5)
    assert found.interval_inside == wilson_interval([0, 1, 1, 1])
    assert found.interval_outside == wilson_interval([1, 0])
    low, high = (100 * end for end in wilson_interval([1, 0]))
    assert str(found) == (
        "cosine ≥ 0.3000, chosen on flowers/val (2 inside, 2 outside images) for at most 5 % of outside images "
        "accepted; on flowers/test, 75.0 % of 4 inside images are accepted and 50.0 % of 2 outside ones "
        f"({low:.1f} – {high:.1f} %)"
    )
    again = apply_threshold(threshold, [0.4, 0.6], [0.1, 0.2], split="flowers/val")
    assert str(again).endswith("; the same images, so expect worse of others")


def test_intervals_of_acceptance_know_of_groups():
    threshold = calibrate_threshold([0.4], [0.1], split="val")
    found = apply_threshold(
        threshold, [0.5] * 3, [0.1] * 4, split="test", groups_inside=[0] * 3, groups_outside=[0] * 4
    )
    assert found.interval_inside == wilson_interval([1])
    assert found.interval_outside == wilson_interval([0])


@pytest.mark.parametrize(
    "inside, outside, most, says",
    [
        ([], [0.1], None, "there are no cosines of inside images"),
        ([0.1], [], 0.1, "there are no cosines of outside images"),
        ([0.1, np.nan], [0.1], None, r"inside images: 1 of 2 rows \(numbers 1\) are not finite"),
        ([0.1], [0.1], 1, "a false acceptance of 1; it is a share, from 0 to below 1"),
        ([0.1], [0.1], 5, "a false acceptance of 5"),
        ([0.1], [0.1], -0.1, "a false acceptance of -0.1"),
    ],
)
def test_cosines_without_a_threshold_are_refused(inside, outside, most, says):
    with pytest.raises(ValueError, match=says):
        calibrate_threshold(inside, outside, split="val", false_acceptance=most)


# ---------------------------------------------------------------------------------------------------------------------
# Two models


def test_comparison_by_hand():
    first, second = [1, 1, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1]
    found = compare(first, second)
    assert found.difference == pytest.approx(2 / 6)
    assert (found.gained.tolist(), found.lost.tolist()) == ([2, 3, 5], [1])
    # of four flips, one or none the one way: (1 + 4) / 16, and as many the other way
    assert found.p_value == 10 / 16
    assert found.interval[0] <= 2 / 6 <= found.interval[1]


def test_mcnemars_p_value_is_exact():
    from scipy.stats import binomtest

    assert mcnemar(0, 0) == mcnemar(4, 4) == 1
    assert mcnemar(0, 1) == 1
    assert mcnemar(0, 5) == mcnemar(5, 0) == 2 / 32
    for gained, lost in [(3, 9), (30, 51), (700, 500), (0, 60)]:
        assert mcnemar(gained, lost) == pytest.approx(binomtest(gained, gained + lost).pvalue, rel=1e-9)
    assert mcnemar(10, 1990) == float(Fraction(2 * sum(math.comb(2000, k) for k in range(11)), 2**2000))
    assert mcnemar(0, 20_000) == 0.0


def test_groups_are_compared_by_the_signs_of_their_sums():
    """Every choice of signs, one after the other. Groups of one image, or of one size, are McNemar's."""
    random = np.random.default_rng(0)
    for G in (1, 2, 5, 11):
        for _ in range(20):
            differences = random.integers(-4, 5, G)
            totals = [abs(sum(signs * differences)) for signs in itertools.product((-1, 1), repeat=G)]
            share = np.mean(np.array(totals) >= abs(differences.sum()))
            assert sign_flips(differences) == pytest.approx(share, rel=1e-12)
    assert sign_flips(np.array([1, -1, 1, 0, 1, 1])) == mcnemar(4, 1)
    assert sign_flips(np.array([10, 10, -10, 10])) == mcnemar(3, 1)
    assert sign_flips(np.zeros(3, dtype=int)) == 1
    # 2 ** 1500 choices, of which two have no sum that is smaller; and a normal distribution is near for many.
    assert sign_flips(np.repeat([2, 3], 750)) == 0.0
    many = random.integers(-5, 6, 3000) + (random.random(3000) < 0.04)
    z = (abs(many.sum()) - 1) / math.sqrt((many**2).sum())
    assert sign_flips(many) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)


def test_images_of_a_group_are_no_evidence_of_their_own():
    """Ten captions of each of two images were gained: two coins fell alike, which they do one time in two."""
    first, second = np.zeros(120), np.repeat([1, 1, *[0] * 10], 10)
    groups = np.repeat(np.arange(12), 10)
    alone, together = compare(first, second), compare(first, second, groups)
    assert alone.p_value == mcnemar(20, 0) < 1e-5
    assert together.p_value == 0.5
    assert together.interval[0] < 0
    assert compare(first, second, np.arange(120)).p_value == alone.p_value
    # 4 gained and 1 lost of the first, 1 gained of the second: ±3 ± 1 is as far from 0 as 4 in two of four cases.
    first = np.array([0, 0, 0, 0, 1, 0, 1])
    assert compare(first, 1 - first * [1, 1, 1, 1, 1, 1, 0], np.array([0, 0, 0, 0, 0, 1, 1])).p_value == 0.5


def test_pairing_narrows_the_interval_and_groups_widen_it():
    random = np.random.default_rng(0)
    first = random.random(600) < 0.5
    second = first.copy()
    second[:30] = True  # nearly the same model
    paired = compare(first, second)
    flipped = paired.difference  # all of them gained: the variance is that of a share
    assert width(paired.interval) == pytest.approx(2 * 1.96 * math.sqrt(flipped * (1 - flipped) / 600), rel=0.1)
    unpaired = 2 * 1.96 * math.sqrt((first.var() + second.var()) / 600)
    assert width(paired.interval) < unpaired / 3
    assert paired.interval[0] > 0
    assert paired.p_value < 0.001
    grouped = compare(first, second, np.repeat(np.arange(20), 30))
    assert grouped.interval[0] < 0 < paired.interval[0]  # all of the gain is in one group of twenty
    assert grouped.difference == paired.difference


def test_equal_models_and_single_images_compare():
    """Of 3 images none was gained, so as many as z² / (3 + z²) may be (`wilson_interval`); none lost, the same."""
    z = 1.959963984540054
    end = pytest.approx(z**2 / (3 + z**2))
    same = compare([1, 0, 1], [1, 0, 1])
    assert (same.difference, same.p_value, len(same.gained)) == (0, 1, 0)
    assert (-same.interval[0], same.interval[1]) == (end, end)
    one = compare([0], [1])
    low = 1 - math.sqrt(2) * z**2 / (1 + z**2)
    assert (one.difference, one.interval, one.p_value) == (1, (pytest.approx(low), 1), 1)


def test_the_interval_of_a_difference_by_hand():
    """Gained 2 and lost 1 of 4. Their shares vary together by -0.5 · 0.25 / 4, and alone by the roots of 0.25 / 4 and
    0.1875 / 4: a correlation of -0.577. Groups of one image each say the same."""
    gained, lost = np.array([1, 1, 0, 0]), np.array([0, 0, 1, 0])
    (low1, high1), (low2, high2) = wilson_interval(gained), wilson_interval(lost)
    correlation = -0.5 * 0.25 / math.sqrt(0.25 * 0.1875)
    below, above = (0.5 - low1, high2 - 0.25), (high1 - 0.5, 0.25 - low2)
    low, high = (math.sqrt(a * a + b * b - 2 * correlation * a * b) for a, b in (below, above))
    for groups in (None, np.arange(4)):
        assert difference_interval(gained, lost, groups) == (pytest.approx(0.25 - low), pytest.approx(0.25 + high))


@pytest.mark.parametrize("gained, lost, size", [(0.02, 0.02, 1), (0.0, 0.03, 1), (0.3, 0.3, 1), (0.1, 0.05, 12)])
def test_the_interval_of_a_difference_holds_the_truth_in_95_of_100_cases(gained, lost, size):
    random, held = np.random.default_rng(0), 0
    groups = np.repeat(np.arange(240 // size), size)
    for _ in range(400):
        draw = np.repeat(random.random(240 // size), size)
        low, high = difference_interval(draw < gained, draw > 1 - lost, groups)
        held += low <= gained - lost <= high
    assert 0.93 <= held / 400 <= 1


def test_models_on_other_images_are_not_compared():
    with pytest.raises(ValueError, match="-1 images gained and 3 lost"):
        mcnemar(-1, 3)
    with pytest.raises(ValueError, match="2 right and wrong guesses of the second model for 3 images"):
        compare([1, 0, 1], [1, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Effective robustness


def test_effective_robustness_by_hand():
    # logits: 0.5 is 0, 0.8 is ln 4, 0.9 is ln 9, 0.2 is -ln 4. The line through (0, -ln 4) and (ln 4, 0): x - ln 4
    fit = fit_robustness([0.5, 0.8], [0.2, 0.5])
    assert (fit.slope, fit.intercept, fit.num_models) == (pytest.approx(1), pytest.approx(-math.log(4)), 2)
    assert fit.r2 == pytest.approx(1)
    # 0.9 comes with ln 9 - ln 4, which is 9/4 : 1, or 9/13
    assert fit.expected(0.9) == pytest.approx(9 / 13)
    np.testing.assert_allclose(effective_robustness(fit, [0.9, 0.5], [0.8, 0.2]), [0.8 - 9 / 13, 0], atol=1e-12)


def test_the_line_is_the_one_of_least_squares():
    from scipy.special import expit
    from scipy.stats import linregress

    random = np.random.default_rng(0)
    x = random.normal(size=30)
    y = 0.8 * x - 0.5 + 0.3 * random.normal(size=30)
    ours, theirs = fit_robustness(expit(x), expit(y)), linregress(x, y)
    assert (ours.slope, ours.intercept) == (pytest.approx(theirs.slope), pytest.approx(theirs.intercept))
    assert ours.r2 == pytest.approx(theirs.rvalue**2)
    assert math.isnan(fit_robustness([0.3, 0.4], [0.2, 0.2]).r2)


@pytest.mark.parametrize(
    "standard, shifted, says",
    [
        ([0.5], [0.4], "1 baselines of 1 different"),
        ([0.5, 0.5], [0.4, 0.3], "2 baselines of 1 different standard accuracies; a line needs two"),
        ([], [], "0 baselines"),
        ([0.5, 1.0], [0.4, 0.3], "a standard accuracy of 1.0"),
        ([0.5, 0.6], [0.0, 0.3], "a shifted accuracy of 0.0"),
        ([50, 60], [40, 30], "a standard accuracy of 50.0; shares between 0 and 1"),
        ([0.5, np.nan], [0.4, 0.3], "a standard accuracy of nan"),
        ([0.5, 0.6], [0.4], r"shapes \(2,\) and \(1,\)"),
    ],
)
def test_accuracies_without_a_line_are_refused(standard, shifted, says):
    with pytest.raises(ValueError, match=says):
        fit_robustness(standard, shifted)


def test_a_shifted_accuracy_may_be_0_and_never_a_percentage():
    fit = fit_robustness([0.5, 0.8], [0.2, 0.5])
    assert effective_robustness(fit, 0.5, 0.0) == pytest.approx(-0.2)
    with pytest.raises(ValueError, match=r"a shifted accuracy of 65\.0; it is a share"):
        effective_robustness(fit, 0.5, 65)


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval


def test_recall_at_1_by_hand():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0]])
    keys = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
    # query 0: its own, 1, before 0.6; query 1: key 2 is nearer; query 2: key 1 is nearer; query 3: its own is farthest
    assert recall_at_1(queries, keys) == 0.25
    assert recall_at_1(keys, keys) == 1.0
    assert recall_at_1(queries, keys.flip(0)) == 0.75  # now 1, 2 and 3 own what equals them


def test_a_tie_is_a_miss_so_that_a_collapsed_model_scores_nothing():
    collapsed = F.normalize(torch.ones(50, 8), dim=-1)
    assert recall_at_1(collapsed, collapsed) == 0.0
    twice = torch.eye(4)[[0, 0, 1, 2]]
    assert recall_at_1(twice, twice) == 0.5


def test_any_key_of_the_same_caption_is_right_and_another_captions_is_not():
    queries = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.6, 0.8]])
    # Keys 0 and 1 have one caption and tie with key 2, which has another. Nearest to queries 2 and 3 is key 3.
    assert recall_at_1(queries, keys, groups=torch.tensor([0, 0, 1, 2])) == 0.25
    assert recall_at_1(queries, keys, groups=torch.tensor([0, 0, 0, 2])) == 0.75
    assert recall_at_1(queries, keys, groups=torch.tensor([5, 5, 5, 5])) == 1.0


def test_a_single_pair_is_always_found():
    assert recall_at_1(torch.eye(3)[:1], torch.eye(3)[1:2]) == 1.0


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 59, 60, 61, 1024])
def test_recall_at_1_is_the_same_in_chunks_of_any_size(chunk_size):
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(60, 8, generator=generator), dim=-1)
    keys = F.normalize(queries + 0.4 * torch.randn(60, 8, generator=generator), dim=-1)
    cosines = (queries.double() @ keys.double().T).numpy()
    expected = np.mean(cosines.argmax(axis=1) == np.arange(60))
    assert 0.2 < expected < 0.9
    assert recall_at_1(queries, keys, chunk_size) == pytest.approx(expected)


def test_recall_at_1_does_not_write_into_its_arguments():
    queries, keys = torch.eye(5), torch.eye(5).flip(0)
    recall_at_1(queries, keys)
    assert torch.equal(queries, torch.eye(5))
    assert torch.equal(keys, torch.eye(5).flip(0))


def test_both_directions_of_retrieval_by_hand():
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])  # their lengths don't count
    texts = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.6, 0.8], [0.0, -1.0]])
    owner = [0, 0, 1, 1]  # image 2 has none
    #            text 0  1    2    3
    #   image 0:    0.8  1.0  0.6  0.0   own 0 and 1: ranks 2 and 1
    #   image 1:    0.6  0.0  0.8 -1.0   own 2 and 3: ranks 1 and 4
    #   image 2:   -0.8 -1.0 -0.6  0.0
    # Texts: 0 finds its image first, 1 too, 2 too; 3 finds 0 at 0.0, 2 at 0.0, then its own at -1.0: rank 3.
    found = retrieval(images, texts, owner, ks=(1, 2, 4))
    assert found.images.num_candidates == 3
    assert found.images.queries.tolist() == [0, 1, 2, 3]
    assert found.images.ranks.tolist() == [1, 1, 1, 3]
    assert found.images.recall == {1: 0.75, 2: 0.75, 4: 1.0}
    assert (found.images.median_rank, found.images.mean_rank) == (1, 1.5)
    assert found.images.mean_average_precision == {1: 0.75, 2: 0.75, 4: pytest.approx((3 + 1 / 3) / 4)}
    assert found.texts.num_candidates == 4
    assert found.texts.queries.tolist() == [0, 1]
    assert found.texts.ranks.tolist() == [1, 1]
    assert found.texts.recall == {1: 1.0, 2: 1.0, 4: 1.0}
    # of image 0 the first two are its own, 1; of image 1, 1/1 alone of two among two, and (1/1 + 2/4) / 2 among four
    assert found.texts.mean_average_precision == {1: 1.0, 2: pytest.approx(0.75), 4: pytest.approx((1 + 0.75) / 2)}


def long_way(images, texts, owner, ks):
    """The whole matrix, sorted with others before own at a tie, and read from the top."""
    images = images / np.linalg.norm(images, axis=1, keepdims=True)
    texts = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    cosines = (images @ texts.T).round(12)
    is_own = owner[None] == np.arange(len(images))[:, None]
    directions = []
    for scores, own in ((cosines.T, is_own.T), (cosines, is_own)):
        ranks, precisions = [], []
        for row, mine in zip(scores, own, strict=True):
            if mine.any():
                hits = mine[sorted(range(len(row)), key=lambda i: (-row[i], mine[i]))]
                ranks.append(int(np.flatnonzero(hits)[0]) + 1)
                precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
                precisions.append([(precision * hits)[:k].sum() / min(k, hits.sum()) for k in ks])
        recall = {k: np.mean(np.array(ranks) <= k) for k in ks}
        directions.append((ranks, recall, dict(zip(ks, np.mean(precisions, axis=0), strict=True))))
    return directions


def assert_is_long_way(found, images, texts, owner, ks=(1, 5, 10)):
    for ours, (ranks, recall, precision) in zip(
        (found.images, found.texts), long_way(images, texts, owner, ks), strict=True
    ):
        assert ours.ranks.tolist() == ranks
        assert ours.recall == pytest.approx(recall)
        assert ours.mean_average_precision == pytest.approx(precision)
        assert (ours.median_rank, ours.mean_rank) == (np.median(ranks), pytest.approx(np.mean(ranks)))


def features_of(num_images, num_texts, seed=0):
    """Of texts that resemble their image; some are equal to others, and some images have many or none."""
    random = np.random.default_rng(seed)
    images = random.normal(size=(num_images, 6))
    owner = np.minimum(random.integers(num_images, size=num_texts), random.integers(num_images, size=num_texts))
    texts = images[owner] + 0.7 * random.normal(size=(num_texts, 6))
    texts[num_texts // 2 :: 3] = texts[0]
    images[num_images // 2] = images[-1]
    return images, texts, owner


@pytest.mark.parametrize("blocks", [(1, 1), (3, 7), (40, 61), (2048, 4096)], ids=str)
@pytest.mark.parametrize("num_images, num_texts", [(40, 61), (7, 30), (30, 7), (1, 5), (5, 1), (1, 1)])
def test_retrieval_in_blocks_of_any_size_equals_the_long_way(monkeypatch, blocks, num_images, num_texts):
    monkeypatch.setattr(metrics, "_NUM_ROWS", blocks[0])
    monkeypatch.setattr(metrics, "_NUM_COLUMNS", blocks[1])
    images, texts, owner = features_of(num_images, num_texts)
    assert_is_long_way(retrieval(images, texts, owner), images, texts, owner)


@pytest.mark.parametrize("blocks", [(2048, 4096), (3, 4)])
def test_each_text_asks_with_its_own_features_whatever_counts_as_the_same_caption(monkeypatch, blocks):
    """A model that knows "a dog" from "A dog": both captions have the same images, and each its own ranks."""
    monkeypatch.setattr(metrics, "_NUM_ROWS", blocks[0])
    monkeypatch.setattr(metrics, "_NUM_COLUMNS", blocks[1])
    random = np.random.default_rng(3)
    captions, spellings = random.integers(0, 7, size=40), random.integers(0, 3, size=40)
    features_of_spelling = random.normal(size=(7, 3, 4))
    texts = features_of_spelling[captions, spellings]
    images, owner = random.normal(size=(12, 4)), random.integers(0, 12, size=40)
    found = retrieval(images, texts, owner, ks=(1, 3), captions=captions.tolist())

    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (images, texts)]
    cosines = unit[0] @ unit[1].T  # (I, T)
    image_has = np.array([[c in captions[owner == i] for c in captions] for i in range(12)])  # that text's caption
    by_text, precision = [], []
    for t in range(40):
        right, wrong = cosines[image_has[:, t], t], cosines[~image_has[:, t], t]
        by_text.append(1 + (wrong >= right.max()).sum())
        places = sorted(n + 1 + (wrong >= each).sum() for n, each in enumerate(sorted(right)[::-1]))
        precision.append(sum((n + 1) / place for n, place in enumerate(places) if place <= 3) / min(3, len(places)))
    assert found.images.ranks.tolist() == by_text
    assert found.images.mean_average_precision[3] == pytest.approx(np.mean(precision))
    asking = sorted(set(owner.tolist()))
    by_image = [1 + (cosines[i, ~image_has[i]] >= cosines[i, image_has[i]].max()).sum() for i in asking]
    assert found.texts.ranks.tolist() == by_image
    assert (found.images.num_candidates, found.texts.num_candidates) == (12, 40)


def test_texts_of_one_caption_are_ranked_in_bounded_memory_though_their_features_differ_in_the_last_bits():
    """The pairs of these texts and all images that are right for them were 8 million, counted one by one."""
    random = np.random.default_rng(0)
    features, images = random.normal(size=(2, 16)), random.normal(size=(2000, 16))
    caption, owner = np.arange(4000) % 2, random.integers(0, 1000, size=4000)  # images from 1000 on are wrong for all
    exact = features[caption]
    exact[:, 3] = np.where(random.random(4000) < 0.5, 0.0, -0.0)
    texts = exact + 1e-12 * random.normal(size=exact.shape)
    started = time.process_time()
    noisy = retrieval(images, texts, owner, captions=caption.tolist())
    assert time.process_time() - started < 20
    plain = retrieval(images, exact, owner, captions=caption.tolist())
    for found, expected in ((noisy.images, plain.images), (noisy.texts, plain.texts)):
        assert found.ranks.tolist() == expected.ranks.tolist()
        assert found.mean_average_precision == pytest.approx(expected.mean_average_precision)
    assert len(set(metrics._asking(torch.from_numpy(exact), caption))) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_of_any_precision_are_compared_as_they_are(dtype):
    images, texts, owner = features_of(40, 90)
    images, texts = torch.from_numpy(images).to(dtype), torch.from_numpy(texts).to(dtype)
    found = retrieval(images, texts, torch.from_numpy(owner))
    assert_is_long_way(found, images.double().numpy(), texts.double().numpy(), owner)


def test_average_precision_of_all_places_agrees_with_scikit_learn():
    from sklearn.metrics import average_precision_score

    random = np.random.default_rng(0)
    images, texts, owner = random.normal(size=(12, 5)), random.normal(size=(40, 5)), np.arange(40) % 12
    texts += images[owner]
    cosines = F.normalize(torch.from_numpy(images), dim=1) @ F.normalize(torch.from_numpy(texts), dim=1).T
    found = retrieval(images, texts, owner, ks=(40,))
    expected = [average_precision_score(owner == i, cosines[i]) for i in range(12)]
    assert found.texts.mean_average_precision[40] == pytest.approx(np.mean(expected))
    by_text = [average_precision_score(np.arange(12) == owner[t], cosines[:, t]) for t in range(40)]
    assert found.images.mean_average_precision[40] == pytest.approx(np.mean(by_text))


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_is_what_topk_of_the_whole_matrix_gives_where_nothing_ties(k):
    """CLIP_benchmark's definition: any of its own among the first k."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(50, 8, generator=generator), dim=1)
    owner = torch.arange(50).repeat_interleave(5)
    texts = F.normalize(images[owner] + 0.7 * torch.randn(250, 8, generator=generator), dim=1)
    found = retrieval(images, texts, owner)
    nearest_images = (texts @ images.T).topk(k).indices
    nearest_texts = (images @ texts.T).topk(k).indices
    assert found.images.recall[k] == pytest.approx(float((nearest_images == owner[:, None]).any(1).float().mean()))
    expected = (owner[nearest_texts] == torch.arange(50)[:, None]).any(1).float().mean()
    assert found.texts.recall[k] == pytest.approx(float(expected))
    assert 0.1 < found.images.recall[1] < 0.9


def test_with_one_text_each_it_is_recall_at_1_both_ways():
    generator = torch.Generator().manual_seed(1)
    images = F.normalize(torch.randn(60, 8, generator=generator), dim=1)
    texts = F.normalize(images + 0.5 * torch.randn(60, 8, generator=generator), dim=1)
    found = retrieval(images, texts, range(60))
    assert found.images.recall[1] == pytest.approx(recall_at_1(texts, images))
    assert found.texts.recall[1] == pytest.approx(recall_at_1(images, texts))


def test_a_collapsed_model_finds_everything_last_and_a_sixth_digit_is_no_tie():
    collapsed = torch.full((300, 96), 0.1)  # sizes at which products are rounded otherwise at a block's edges
    scales = torch.linspace(0.3, 3, 300)[:, None]
    found = retrieval(collapsed * scales, collapsed, range(300))
    assert set(found.images.ranks.tolist()) == set(found.texts.ranks.tolist()) == {300}
    near = torch.tensor([[1.0, 0.0], [1.0, 1e-3]])  # cosines 1 and 1 - 5e-7
    assert retrieval(near, near, [0, 1]).images.recall[1] == 1


def test_texts_of_one_image_do_not_stand_in_each_others_way():
    images = torch.eye(3)
    found = retrieval(images, images[[0, 0, 0, 1, 2, 2]], [0, 0, 0, 1, 2, 2])
    assert found.texts.ranks.tolist() == [1, 1, 1]
    assert found.texts.mean_average_precision == {1: 1, 5: 1, 10: 1}
    assert found.images.ranks.tolist() == [1] * 6


@pytest.mark.parametrize(
    "bad, why", [(float("nan"), "not finite"), (float("inf"), "not finite"), (0.0, "zero; a cosine needs a direction")]
)
@pytest.mark.parametrize("which", ["image", "text"])
def test_features_without_a_direction_are_an_error_that_names_them(which, bad, why):
    features = {"image": torch.ones(4, 3), "text": torch.ones(9, 3)}
    features[which][[1, 3]] = bad
    with pytest.raises(ValueError, match=rf"{which} features: 2 of [49] rows \(numbers 1, 3\) are {why}"):
        retrieval(features["image"], features["text"], [0] * 9)


def test_of_many_bad_rows_the_first_are_named():
    with pytest.raises(ValueError, match=r"image features: 20 of 20 rows \(numbers 0, 1, 2, 3, 4, …\) are zero"):
        retrieval(torch.zeros(20, 3), torch.ones(1, 3), [0])


@pytest.mark.parametrize(
    "images, texts, owner, says",
    [
        (torch.ones(2, 3), torch.ones(2, 4), [0, 1], r"shapes \(2, 3\) and \(2, 4\)"),
        (torch.ones(3), torch.ones(2, 3), [0, 1], r"shapes \(3,\) and"),
        (torch.ones(0, 3), torch.ones(2, 3), [0, 1], "0 images and 2 texts"),
        (torch.ones(2, 3), torch.ones(0, 3), [], "2 images and 0 texts"),
        (torch.ones(2, 3), torch.ones(2, 3), [0], r"each of 2 texts; it has shape \(1,\)"),
        (torch.ones(2, 3), torch.ones(2, 3), [0.0, 1.0], "type float64"),
        (torch.ones(2, 3), torch.ones(2, 3), [0, 2], "says image 2; with 2 images they are 0 to 1"),
        (torch.ones(2, 3), torch.ones(2, 3), [-1, 0], "says image -1"),
    ],
)
def test_features_that_do_not_belong_together_are_refused(images, texts, owner, says):
    with pytest.raises(ValueError, match=says):
        retrieval(images, texts, owner)


def test_a_k_below_1_is_refused_and_nothing_is_written_into():
    images, texts, owner = features_of(10, 20)
    before = images.copy(), texts.copy(), owner.copy()
    with pytest.raises(ValueError, match="k is 0"):
        retrieval(images, texts, owner, ks=(0,))
    retrieval(images, texts, owner)
    for array, kept in zip((images, texts, owner), before, strict=True):
        np.testing.assert_array_equal(array, kept)


def work(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    for number, shape in enumerate(SHAPES):
        found = retrieval(*features_of(*shape))
        torch.save([found.images.ranks.tolist(), found.texts.ranks.tolist()], f"{folder}/{rank}-{number}.pt")
    dist.destroy_process_group()


SHAPES = [(40, 61), (7, 30), (1, 5)]


def test_any_number_of_processes_finds_the_ranks_of_one():
    with tempfile.TemporaryDirectory() as folder:
        warm.spawn(work, (2, folder), 2)
        for number, shape in enumerate(SHAPES):
            expected = retrieval(*features_of(*shape))
            for rank in range(2):
                found = torch.load(Path(folder, f"{rank}-{number}.pt"))
                assert found == [expected.images.ranks.tolist(), expected.texts.ranks.tolist()]
