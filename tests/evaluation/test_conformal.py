"""Conformal quantiles and sets by hand, and the coverage that they promise, measured on fresh draws."""

import math

import numpy as np
import pytest
from scipy.special import log_softmax
from scipy.stats import beta

from miniclip.evaluation.measures.conformal import (
    Coverage,
    conformal_quantile,
    is_in_set,
    least_groups,
    surprisals,
    tried_coverage,
)
from miniclip.evaluation.measures.statistics import wilson_interval


def test_the_quantile_by_hand():
    scores = [0.5, 0.1, 0.4, 0.2, 0.3]
    # of five, ⌈6 · 1/2⌉ = the third, ⌈6 · 0.6⌉ = the fourth, ⌈6 · 0.83⌉ = the fifth, ⌈6 · 0.84⌉ = none
    assert conformal_quantile(scores, 0.5) == 0.3
    assert conformal_quantile(scores, 0.51) == 0.4
    assert conformal_quantile(scores, 0.6) == 0.4
    assert conformal_quantile(scores, 0.83) == 0.5
    assert conformal_quantile(scores, 0.84) == math.inf


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9, 0.95, 0.975, 0.99])
@pytest.mark.parametrize("N", [1, 18, 19, 20, 99, 199, 250])
def test_the_quantile_is_the_formula_of_the_papers(N, coverage):
    scores = np.random.default_rng(N).permutation(N) / N
    # whole numbers of thousandths, so that 0.95 * 20 is 19
    rank = -(-(N + 1) * round(1000 * coverage) // 1000)
    expected = np.sort(scores)[rank - 1] if rank <= N else math.inf
    assert conformal_quantile(scores, coverage) == expected
    assert (expected == math.inf) == (least_groups(coverage) > N)


def test_images_of_a_group_share_the_weight_of_one():
    # groups a (0.1, 0.2), b (0.3, 0.4, 0.5) and c (0.6), and a fresh one: weights 1/2, 1/2, 1/3, 1/3, 1/3, 1 of 4
    scores, groups = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.array(list("aabbbc"))
    assert conformal_quantile(scores, 1 / 8, groups) == 0.1
    assert conformal_quantile(scores, 1 / 4, groups) == 0.2
    assert conformal_quantile(scores, 1 / 4 + 1 / 12, groups) == 0.3
    assert conformal_quantile(scores, 1 / 2, groups) == 0.5
    assert conformal_quantile(scores, 3 / 4, groups) == 0.6
    assert conformal_quantile(scores, 0.76, groups) == math.inf
    assert conformal_quantile(scores, 0.5, np.arange(6)) == conformal_quantile(scores, 0.5)


def test_the_fewest_images_for_a_promise():
    assert [least_groups(coverage) for coverage in (0.5, 0.8, 0.9, 0.95, 0.99)] == [1, 4, 9, 19, 99]


@pytest.mark.parametrize("coverage", [0, 1, -0.1, 5, math.nan])
def test_a_coverage_is_a_share(coverage):
    for function in (least_groups, lambda c: conformal_quantile([1.0], c)):
        with pytest.raises(ValueError, match=r"a coverage of .*between 0 and 1"):
            function(coverage)


def test_surprisals_are_those_of_scipy_and_far_apart_classes_do_not_overflow():
    cosines = np.random.default_rng(0).uniform(-1, 1, (7, 5)).astype(np.float32)
    np.testing.assert_allclose(
        surprisals(cosines, 100), -log_softmax(cosines.astype(np.float64) * 100, axis=1), atol=1e-9
    )
    assert surprisals([[1.0, -1.0]], 1e4).tolist() == [[0, 2e4]]


def test_a_set_has_what_is_likely_enough_and_what_rounding_moved():
    values = np.array([[0.1, 2.0, 3.0], [1.0, 1.0 + 1e-6, 1.1]])
    assert is_in_set(values, 1.0, 100.0).tolist() == [[True, False, False], [True, True, False]]


def test_a_coverage_reports_what_its_sets_did():
    is_covered, sizes = np.array([True, True, False, True]), np.array([1, 2, 0, 2])
    found = tried_coverage(0.9, 1.5, 9, is_covered, sizes)
    assert found == Coverage(0.9, 1.5, 9, 4, 0.75, wilson_interval(is_covered), 1.25, 0.25)
    grouped = tried_coverage(0.9, 1.5, 9, is_covered, sizes, np.zeros(4))
    assert grouped.interval == wilson_interval(is_covered, np.zeros(4))
    assert str(found).startswith("sets of 90 % coverage: the true class is in 75.0 % of 4 (")
    assert str(found).endswith("1.25 classes in the mean, 25.0 % empty")


@pytest.mark.parametrize("N, coverage", [(19, 0.95), (100, 0.9), (250, 0.8)])
def test_fresh_images_are_covered_as_often_as_promised(N, coverage):
    """The share of fresh scores below the k-th of N has the distribution Beta(k, N + 1 - k), whatever the scores are
    (Angelopoulos and Bates 2021, section 3.2)."""
    random = np.random.default_rng(N)
    covered = np.array([conformal_quantile(random.uniform(size=N), coverage) for _ in range(4000)])  # of uniform scores
    k = math.ceil((N + 1) * coverage - 1e-9)
    expected = beta(k, N + 1 - k)
    assert abs(covered.mean() - expected.mean()) < 4 * expected.std() / math.sqrt(len(covered))
    assert expected.mean() >= coverage - 1e-9


def test_groups_that_are_alike_are_covered_as_often_as_promised():
    """Images of a group nearly coincide: as many independent images as there are would promise too much."""
    random = np.random.default_rng(0)
    covered, taken_for_single = [], []
    for _ in range(2000):
        sizes = random.integers(1, 9, 30)
        of_group = np.repeat(random.normal(size=31), [*sizes, 1]) + random.normal(0, 0.01, sizes.sum() + 1)
        scores, fresh, groups = of_group[:-1], of_group[-1], np.repeat(np.arange(30), sizes)
        covered.append(fresh <= conformal_quantile(scores, 0.95, groups))
        taken_for_single.append(fresh <= conformal_quantile(scores, 0.95))
    slack = 4 * math.sqrt(0.95 * 0.05 / 2000)
    assert np.mean(covered) >= 0.95 - slack
    assert np.mean(covered) > np.mean(taken_for_single)
