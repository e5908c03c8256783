"""What is learnt from frozen features. Oracles: scikit-learn, open_clip, timm, loops, numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
import sys
import warnings

import numpy as np
import open_clip
import pytest
import timm
import torch
from helpers import tiny_clip, tiny_config
from open_clip.modified_resnet import ModifiedResNet as OpenClipResNet
from PIL import Image

from miniclip.config import VisionConfig
from miniclip.evaluation.encoder import pooled_features
from miniclip.evaluation.measures.statistics import wilson_interval
from miniclip.evaluation.probes import (
    METHODS,
    ShotCurve,
    linear_probe,
    nearest_neighbours,
    shot_curve,
    tip_adapter,
    zero_shot,
)
from miniclip.evaluation.splits import Labelled, Splits, draw_validation, make_splits, same_features
from miniclip.model import CLIP
from miniclip.reports.pictures import plot_shots, write_picture

NAMES = ("cat", "dog", "owl", "fox")


def blobs(count: int, seed: int, *, C: int = 4, E: int = 12, noise: float = 1.0) -> Labelled:
    """Images around one centre for each class, as many of each."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(C, E))
    labels = random.permutation(np.arange(count) % C)
    return Labelled((centres[labels] + noise * random.normal(size=(count, E))).astype(np.float32), labels)


def toy(noise: float = 1.5, count: int = 120, **options) -> Splits:
    sets = [blobs(count, seed, noise=noise, **options) for seed in range(3)]
    return Splits(sets[0], sets[1], sets[2], tuple(f"class {c}" for c in range(options.get("C", 4))))


def prompts(C: int = 4, E: int = 12, error: float = 0.8, seed: int = 5) -> np.ndarray:
    """A classifier (E, C) that is right about the centres but for an error."""
    columns = np.random.default_rng(99).normal(size=(C, E)).T
    columns = columns + error * np.random.default_rng(seed).normal(size=(E, C))
    return columns / np.linalg.norm(columns, axis=0)


# ---- features before the projection


def images(number: int, size: int) -> torch.Tensor:
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_features_of_a_vit_equal_open_clips_without_its_projection():
    ours = tiny_clip(activation="gelu").double()
    v = ours.config.vision
    theirs = open_clip.transformer.VisionTransformer(
        v.image_size, v.patch_size, v.width, v.layers, v.heads, v.mlp_ratio, output_dim=ours.config.embed_dim
    ).double()
    theirs.load_state_dict(ours.visual.state_dict())
    theirs.proj = None
    found = pooled_features(ours, images(3, v.image_size))
    torch.testing.assert_close(found, theirs(images(3, v.image_size)), rtol=0, atol=1e-12)
    torch.testing.assert_close(found @ ours.visual.proj, ours.encode_image(images(3, v.image_size)), rtol=0, atol=1e-12)
    assert not found.requires_grad


def test_features_of_the_resnet_equal_open_clips_which_has_no_projection():
    vision = VisionConfig(kind="resnet", image_size=64, width=4, blocks=(1, 1, 1, 1))
    ours = tiny_clip(vision=vision).double()
    theirs = OpenClipResNet(list(vision.blocks), 16, vision.heads, vision.image_size, vision.width).double().eval()
    theirs.load_state_dict(ours.visual.state_dict())
    torch.testing.assert_close(pooled_features(ours, images(2, 64)), theirs(images(2, 64)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name, size, options",
    [
        ("test_vit", 160, {}),
        ("test_vit", 160, {"timm_projection": "mlp"}),
        ("test_vit", 160, {"timm_projection": "classifier"}),
        ("test_vit", 160, {"timm_pool": "map"}),
        ("test_resnet", 64, {}),
        ("mobilenetv4_conv_small_050", 64, {}),
        ("mobilenetv4_conv_small_050", 64, {"timm_projection": "classifier"}),
    ],
)
def test_features_of_timms_models_are_what_they_give_without_a_classifier(name, size, options):
    ours = tiny_clip(vision=VisionConfig(kind="timm", image_size=size, timm_model=name, **options)).double()
    pool = {"global_pool": options["timm_pool"]} if "timm_pool" in options else {}
    theirs = timm.create_model(name, num_classes=0, **pool).double().eval()
    missing = theirs.load_state_dict(ours.visual.trunk.state_dict(), strict=False)
    assert not missing.missing_keys  # at most ours has a classifier more
    torch.testing.assert_close(pooled_features(ours, images(2, size)), theirs(images(2, size)), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "batch, says",
    [
        (torch.zeros(1, 3, 8, 8), r"images have the shape \(1, 3, 8, 8\); this model takes \(N, 3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "images is of torch.uint8; it must be of floats"),
    ],
)
def test_pixels_that_do_not_fit_are_refused_as_encode_image_does(batch, says):
    with pytest.raises(ValueError, match=says):
        pooled_features(tiny_clip(), batch)


def test_a_model_without_image_tower_says_so():
    with pytest.raises(ValueError, match="no image tower"):
        pooled_features(CLIP(tiny_config(towers="text")), torch.zeros(1, 3, 16, 16))


# ---- splits


@pytest.mark.parametrize("seed", range(20))
def test_no_group_is_on_both_sides_and_no_class_loses_its_last_images(seed):
    random = np.random.default_rng(seed)
    N, C = int(random.integers(12, 120)), int(random.integers(2, 6))
    labels = np.concatenate([np.arange(C), random.integers(0, C, N - C)])
    groups = random.integers(0, int(random.integers(6, N)), N)
    drawn = draw_validation(labels, groups, 0.25, seed)
    assert not set(groups[drawn]) & set(groups[~drawn])
    assert set(labels[~drawn]) == set(range(C))
    assert np.array_equal(drawn, draw_validation(labels, groups, 0.25, seed))


def test_without_groups_each_class_gives_its_share_and_the_seed_says_which():
    labels = np.repeat([0, 1, 2, 3], [40, 20, 2, 1])
    drawn = draw_validation(labels, None, 0.2, seed=0)
    assert np.bincount(labels[drawn], minlength=4).tolist() == [8, 4, 1, 0]
    assert not np.array_equal(drawn, draw_validation(labels, None, 0.2, seed=1))


def test_groups_of_several_classes_move_as_one():
    labels, groups = np.array([0, 1, 0, 1, 0, 1]), np.array(["a", "a", "b", "b", "c", "c"])
    drawn = draw_validation(labels, groups, 0.3, seed=0)
    assert drawn.sum() == 2
    assert len(set(groups[drawn])) == 1


def test_of_groups_larger_than_the_share_the_smallest_is_held_out():
    labels, groups = np.zeros(15, dtype=int), np.repeat([7, 8, 9], [6, 4, 5])
    assert set(groups[draw_validation(labels, groups, 0.1, seed=3)]) == {8}


def test_a_class_of_one_group_stays_in_train_where_nothing_can_be_held_out_it_is_said():
    labels, groups = np.array([0, 0, 1, 1]), np.array([1, 1, 2, 2])
    with pytest.raises(ValueError, match="none of 4 training images can be held out: every class has images of one"):
        draw_validation(labels, groups)
    with pytest.raises(ValueError, match=r"share of validation images is 1.0; it must be between 0 and 1"):
        draw_validation(labels, None, 1.0)


def test_splits_hold_every_training_image_once_and_a_given_validation_set_stays():
    train, other, test = (blobs(60, seed) for seed in range(3))
    splits = make_splits(train, test, NAMES)
    assert (len(splits.train), len(splits.validation)) == (48, 12)
    both = np.concatenate([splits.train.features, splits.validation.features])
    assert np.array_equal(np.sort(both, axis=0), np.sort(train.features, axis=0))
    assert splits.num_leaked == 0
    assert make_splits(train, test, NAMES, other).validation is other


def test_lists_and_tensors_are_taken_too():
    split = Labelled(torch.eye(4), [0, 1, 0, 1], ["a", "b", "c", "d"])
    splits = make_splits(split, Labelled([[1, 2, 3, 4]], [1]), ("x", "y"))
    assert splits.num_examples.tolist() == [1, 1]
    assert nearest_neighbours(splits, 4).scores.shape == (1, 2)


def test_images_on_two_sides_are_counted_whatever_rounding_did_to_them():
    train, test = blobs(60, 0), blobs(40, 1)
    features = test.features.copy()
    features[[3, 17]] = train.features[[50, 2]]
    features[8] = train.features[30] * np.float32(1 + 1e-6)
    features[9] = train.features[31] * np.float32(1.01)  # another picture, as far as one can tell
    with pytest.warns(UserWarning, match=r"3 of 40 test images are in train or validation as well.*index 3"):
        splits = make_splits(train, Labelled(features, test.labels), NAMES)
    assert splits.num_leaked == 3
    assert np.flatnonzero(same_features(features, train.features)).tolist() == [3, 8, 17]


def test_images_on_two_sides_are_found_in_large_sets_too():
    train, test = blobs(1300, 0), blobs(1100, 1)
    test.features[[0, 1023, 1024, 1099]] = train.features[[1299, 5, 1024, 0]]
    assert np.flatnonzero(same_features(test.features, train.features)).tolist() == [0, 1023, 1024, 1099]


def test_an_image_of_validation_that_is_in_train_is_warned_of():
    train, test = blobs(60, 0), blobs(40, 1)
    with pytest.warns(UserWarning, match="20 of 20 validation images are in train as well"):
        make_splits(train, test, NAMES, train.take(np.arange(20)))


def test_clean_splits_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_splits(blobs(60, 0), blobs(40, 1), NAMES)


def broken(**changes) -> dict:
    return {"train": blobs(24, 0), "validation": blobs(24, 1), "test": blobs(24, 2), "classnames": NAMES, **changes}


def with_nan(row: int) -> Labelled:
    split = blobs(24, 2)
    split.features[row, 3] = np.nan
    split.features[row + 4, 0] = np.inf
    return split


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"train": blobs(24, 0).take(np.flatnonzero(blobs(24, 0).labels % 2))},
            "no training images of cat, owl; every class needs",
        ),
        ({"classnames": ("cat",)}, "there is only one: cat"),
        ({"classnames": ()}, "there is only one: –"),
        ({"test": with_nan(5)}, "2 test features are not finite, the first is number 5, from 0"),
        (
            {"validation": Labelled(np.ones((3, 12)), np.arange(2))},
            r"validation has 3 features and labels of the shape",
        ),
        (
            {"test": Labelled(np.ones((2, 12)), np.arange(2), ["a"])},
            r"test has 2 features and groups of the shape \(1,",
        ),
        ({"test": Labelled(np.ones((2, 9)), np.arange(2))}, "test features have 9 channels and train features have 12"),
        ({"test": Labelled(np.ones(12), np.arange(12))}, r"test features have the shape \(12,\)"),
        ({"validation": Labelled(np.ones((0, 12)), [])}, r"validation features have the shape \(0, 12\)"),
        ({"train": Labelled(np.ones(12), np.arange(12))}, r"train features have the shape \(12,\)"),
        ({"test": Labelled(np.ones((2, 12)), [0, 4])}, "test labels are from 0 to 4; 4 classes are 0 to 3"),
        ({"test": Labelled(np.ones((2, 12)), [-1, 1])}, "test labels are from -1 to 1"),
        ({"test": Labelled(np.ones((2, 12)), [0.0, 1.0])}, "test labels are float64; they must be integers"),
        ({"test": Labelled(np.ones((2, 12)), ["a", "b"])}, "they must be integers, the indices of 4 class names"),
    ],
)
def test_what_does_not_fit_is_told(changes, says):
    values = broken(**changes)
    with pytest.raises(ValueError, match=says):
        Splits(**values)
    with pytest.raises(ValueError, match=says):
        make_splits(**values)


# ---- shots


def test_shots_are_of_every_class_drawn_by_the_seed_and_grow():
    splits = toy()
    drawn = {k: splits.shots(k, seed=4) for k in (1, 5, 30)}
    for k, few in drawn.items():
        assert np.bincount(few.train.labels).tolist() == [k] * 4
        assert few.validation is splits.validation
    rows = {k: {bytes(row) for row in few.train.features} for k, few in drawn.items()}
    assert rows[1] < rows[5] < rows[30] == {bytes(row) for row in splits.train.features}
    assert np.array_equal(drawn[5].train.features, splits.shots(5, seed=4).train.features)
    assert not np.array_equal(drawn[5].train.features, splits.shots(5, seed=5).train.features)


def test_more_shots_than_images_name_the_classes_the_smallest_first():
    few = Labelled(np.random.default_rng(0).normal(size=(12, 3)), np.repeat([0, 1, 2, 3], [4, 2, 5, 1]))
    splits = Splits(few, few, few, NAMES)
    with pytest.raises(ValueError, match=r"^3 shots are more than the training images of fox \(1\), dog \(2\)$"):
        splits.shots(3, 0)
    with pytest.raises(ValueError, match="shots are 0; at least one"):
        splits.shots(0, 0)


# ---- linear probe


def sklearn_probe(train: Labelled, C: float, **options):
    from sklearn.linear_model import LogisticRegression

    options = {"max_iter": 1000, "tol": 1e-4 / len(train), **options}
    return LogisticRegression(C=C, **options).fit(train.features.astype(np.float64), train.labels)


@pytest.mark.parametrize("C", [2, 4])
def test_every_point_of_the_sweep_and_the_last_fit_are_scikit_learns(C):
    from sklearn.metrics import log_loss

    splits = toy(noise=2.5, C=C)
    probe = linear_probe(splits)
    for point in probe.sweep:
        theirs = sklearn_probe(splits.train, point.C)
        assert point.accuracy == theirs.score(splits.validation.features, splits.validation.labels)
        expected = log_loss(splits.validation.labels, theirs.predict_proba(splits.validation.features))
        assert point.log_loss == pytest.approx(expected, abs=1e-6)
        assert point.num_iterations == theirs.n_iter_.max()
    theirs = sklearn_probe(splits.labelled, probe.C)
    guesses = theirs.predict(splits.test.features)
    assert np.array_equal(probe.outcome.scores.argmax(axis=1), guesses)
    assert probe.outcome.accuracy == (guesses == splits.test.labels).mean()
    assert 0.5 < probe.outcome.accuracy < 1
    exact = np.exp(probe.outcome.scores)
    exact /= exact.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(exact, theirs.predict_proba(splits.test.features), atol=1e-5)


@pytest.mark.parametrize("noise", [0.1, 1.5, 3.0, 30.0])
def test_the_sweep_halves_its_way_to_an_eighth_of_a_decade(noise):
    probe = linear_probe(toy(noise=noise, count=60))
    places = [8 * (math.log10(point.C) + 6) for point in probe.sweep]
    assert places == pytest.approx([round(place) for place in places])
    places = [round(place) for place in places]
    assert places == sorted(set(places))
    assert set(range(0, 97, 16)) <= set(places) <= set(range(97))
    best = places[[point.C for point in probe.sweep].index(probe.C)]
    assert {best - 1, best + 1} & set(range(97)) <= set(places)
    assert len(places) <= 7 + 2 * 4
    key = [(point.accuracy, -point.log_loss) for point in probe.sweep]
    assert probe.sweep[key.index(max(key))].C == probe.C


def test_the_best_of_the_search_is_the_best_of_all_97_where_there_is_one_peak():
    splits = toy(noise=2.5, count=80)
    accuracies = {}
    for C in (10 ** (place / 8 - 6) for place in range(97)):
        theirs = sklearn_probe(splits.train, C)
        accuracies[C] = theirs.score(splits.validation.features, splits.validation.labels)
    probe = linear_probe(splits)
    (found,) = (point for point in probe.sweep if point.C == probe.C)
    assert found.accuracy == max(accuracies.values()) > min(accuracies.values())


def test_fits_of_unit_features_reach_the_optimum_which_scikit_learns_own_tolerance_does_not():
    unit = [Labelled(s.features / np.linalg.norm(s.features, axis=1, keepdims=True), s.labels) for s in
            (blobs(200, seed, E=32, noise=4) for seed in range(3))]  # fmt: skip
    splits = Splits(*unit, NAMES)
    for point in linear_probe(splits, refit=False).sweep:
        if point.C > 1e4:  # only the start of the search goes there
            continue
        exact = sklearn_probe(splits.train, point.C, solver="newton-cg", tol=1e-12)
        loss = -np.log(exact.predict_proba(unit[1].features)[np.arange(200), unit[1].labels]).mean()
        assert point.log_loss == pytest.approx(loss, rel=2e-3)
    sloppy = sklearn_probe(splits.train, 100.0, tol=1e-4).coef_
    exact = sklearn_probe(splits.train, 100.0, solver="newton-cg", tol=1e-12).coef_
    ours = sklearn_probe(splits.train, 100.0).coef_
    assert np.abs(ours - exact).max() < 0.1 * np.abs(sloppy - exact).max()


def test_separable_classes_are_all_right_and_per_class_says_so():
    probe = linear_probe(toy(noise=0.05, count=40))
    assert probe.outcome.accuracy == 1
    assert probe.outcome.per_class.tolist() == [1, 1, 1, 1]
    assert probe.outcome.interval == wilson_interval(np.ones(len(probe.outcome.test)))
    assert probe.is_converged


def test_with_too_few_iterations_it_says_that_it_did_not_converge():
    splits = toy(noise=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is in the result, not on the screen
        probe = linear_probe(splits, max_iter=1)
    assert not probe.is_converged
    assert probe.num_iterations == 1
    assert not all(point.is_converged for point in probe.sweep)
    assert linear_probe(splits).is_converged


def test_without_refit_validation_images_choose_and_nothing_else():
    splits = toy(noise=2.5)
    probe = linear_probe(splits, refit=False)
    np.testing.assert_allclose(probe.weight, sklearn_probe(splits.train, probe.C).coef_.T, atol=1e-12)
    assert probe.C == linear_probe(splits).C


def test_test_labels_choose_nothing_and_a_second_run_is_the_same():
    splits = toy(noise=2.5)
    wrong = Labelled(splits.test.features, (splits.test.labels + 1) % 4)
    first, second = (
        linear_probe(splits),
        linear_probe(Splits(splits.train, splits.validation, wrong, splits.classnames)),
    )
    assert first.sweep == second.sweep
    assert np.array_equal(first.outcome.scores, second.outcome.scores)
    one, two = (tip_adapter(s, prompts()) for s in (splits, Splits(splits.train, splits.validation, wrong, NAMES)))
    assert (one.alpha, one.beta) == (two.alpha, two.beta)


def test_of_equal_accuracies_the_lower_log_loss_wins():
    probe = linear_probe(toy(noise=0.05, count=40))  # all are right with any penalty
    assert {point.accuracy for point in probe.sweep} == {1.0}
    assert probe.C == min(probe.sweep, key=lambda point: point.log_loss).C > 1


def test_without_scikit_learn_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ValueError, match=r"a linear probe needs scikit-learn: pip install 'miniclip\[eval\]'"):
        linear_probe(toy())


def test_outcome_counts_by_class_and_its_interval_goes_by_group():
    test = Labelled(np.zeros((4, 2)), [0, 0, 2, 2], ["a", "a", "b", "c"])
    splits = Splits(Labelled(np.eye(3, 2), range(3)), test, test, NAMES[:3])
    outcome = zero_shot(splits, np.array([[1.0, 0, 0.6], [0, 1, 0.8]]))  # zeros: all equal, so the first class
    assert outcome.accuracy == 0.5
    np.testing.assert_equal(outcome.per_class, [1, np.nan, 0])
    assert outcome.interval == wilson_interval(np.array([1, 1, 0, 0]), np.array(["a", "a", "b", "c"]))


# ---- neighbours


def neighbours_the_long_way(memory: Labelled, test: Labelled, C: int, k: int, temperature: float) -> np.ndarray:
    votes = np.zeros((len(test), C))
    for i, query in enumerate(test.features.astype(np.float64)):
        cosines = [query @ key / np.linalg.norm(query) / np.linalg.norm(key) for key in memory.features.astype(float)]
        for j in sorted(range(len(cosines)), key=lambda j: -cosines[j])[:k]:
            votes[i, memory.labels[j]] += math.exp(cosines[j] / temperature)
    return votes / votes.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 1.0), (60, 0.3)])
def test_neighbours_equal_a_loop(k, temperature, refit):
    splits = toy(count=60)
    found = nearest_neighbours(splits, k, temperature, refit=refit, chunk_size=7)
    memory = splits.labelled if refit else splits.train
    np.testing.assert_allclose(found.scores, neighbours_the_long_way(memory, splits.test, 4, k, temperature), atol=1e-5)


def test_one_neighbour_is_scikit_learns():
    from sklearn.neighbors import KNeighborsClassifier

    splits = toy()
    theirs = KNeighborsClassifier(1, metric="cosine").fit(splits.train.features, splits.train.labels)
    found = nearest_neighbours(splits, 1, refit=False)
    assert found.accuracy == theirs.score(splits.test.features, splits.test.labels)


def test_a_low_temperature_does_not_overflow_and_listens_to_the_nearest_alone():
    splits = toy()
    with np.errstate(over="raise", invalid="raise"):
        cold = nearest_neighbours(splits, 20, 1e-4)
    assert np.array_equal(cold.scores.argmax(axis=1), nearest_neighbours(splits, 1).scores.argmax(axis=1))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"k": 0}, "0 neighbours of 240 images; it must be from 1 to 240"),
        ({"k": 121, "refit": False}, "121 neighbours of 120 images; it must be from 1 to 120"),
        ({"temperature": 0.0}, "temperature of the neighbours' votes is 0.0; it must be above 0"),
        ({"temperature": math.nan}, "is nan; it must be above 0"),
    ],
)
def test_impossible_votes_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        nearest_neighbours(toy(), **options)


# ---- Tip-Adapter


def test_tip_adapter_by_hand():
    # Training: (1, 0) is of class 0, (0, 1) and (0.6, 0.8) of class 1. The prompts are (0, 1) and (1, 0): wrong.
    train = Labelled([[2.0, 0], [0, 3.0], [0.6, 0.8]], [0, 1, 1])
    test = Labelled([[0.8, 0.6]], [0])
    splits = Splits(train, test, test, ("left", "right"))
    found = tip_adapter(splits, np.array([[0.0, 1], [1, 0]]), alphas=[3.0], betas=[2.0], logit_scale=10.0)
    # f·W = (0.6, 0.8); 1 − f·Kᵀ = (0.2, 0.4, 0.04)
    expected = [10 * 0.6 + 3 * math.exp(-0.4), 10 * 0.8 + 3 * (math.exp(-0.8) + math.exp(-0.08))]
    np.testing.assert_allclose(found.outcome.scores, [expected], rtol=1e-6)
    assert (found.alpha, found.beta, found.validation_accuracy) == (3.0, 2.0, 0.0)


@pytest.mark.parametrize("count", [120, 1100])  # in one piece, and in two
def test_alpha_and_beta_are_the_best_of_a_loop_over_the_validation_images(count):
    splits, W = toy(noise=1.5, count=count), prompts()
    alphas, betas = (0.0, 1.0, 10.0, 40.0), (0.5, 5.0, 30.0)

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def scores(split, alpha, beta):
        f, K, V = unit(split.features), unit(splits.train.features), np.eye(4)[splits.train.labels]
        return 100 * f @ W + alpha * np.exp(-beta * (1 - f @ K.T)) @ V

    right = {
        (a, b): (scores(splits.validation, a, b).argmax(axis=1) == splits.validation.labels).mean()
        for a, b in itertools.product(alphas, betas)
    }
    best = min(right, key=lambda pair: (-right[pair], pair))
    found = tip_adapter(splits, W, alphas=alphas[::-1], betas=betas)  # in any order
    assert (found.alpha, found.beta) == best
    assert found.validation_accuracy == right[best] > right[0.0, 0.5]
    np.testing.assert_allclose(found.outcome.scores, scores(splits.test, *best), rtol=1e-4, atol=1e-3)


def test_without_weight_on_the_examples_it_is_zero_shot_and_the_search_may_choose_that():
    splits = toy(noise=0.5)
    perfect = prompts(error=0)
    found = tip_adapter(splits, perfect)
    assert (found.alpha, found.validation_accuracy) == (0, 1)
    of_equals = tip_adapter(splits, perfect, alphas=(0.2, 0.1), betas=(2.0, 1.0))
    assert (of_equals.alpha, of_equals.beta, of_equals.validation_accuracy) == (0.1, 1.0, 1)
    np.testing.assert_allclose(found.outcome.scores, 100 * zero_shot(splits, perfect).scores, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "classifier, options, says",
    [
        (prompts().T, {}, r"the classifier has the shape \(4, 12\); features and classes need \(12, 4\)"),
        (2 * prompts(), {}, "the classifier's columns are from 2 to 2 long; all must be 1"),
        (np.nan * prompts(), {}, "the classifier's columns are from nan to nan long"),
        (prompts(), {"alphas": ()}, "alphas are .*; there must be some, none below 0"),
        (prompts(), {"betas": (1.0, -2.0)}, r"betas are \(1.0, -2.0\); there must be some, none below 0"),
    ],
)
def test_what_tip_adapter_cannot_use_is_told(classifier, options, says):
    with pytest.raises(ValueError, match=says):
        tip_adapter(toy(), classifier, **options)


# ---- the curve


def curve(zero: float, means: list[float], shots: tuple[int, ...] = (1, 2, 4, 8, 16)) -> ShotCurve:
    return ShotCurve(zero, shots, (), (0,), {"linear probe": np.array(means)[:, None]})


@pytest.mark.parametrize(
    "zero, means, expected, words",
    [
        (0.5, [0.1, 0.3, 0.5, 0.7, 0.8], 4.0, "4.0 images a class to match zero-shot"),
        (0.4, [0.1, 0.3, 0.5, 0.7, 0.8], 2 * 2**0.5, "2.8 images a class"),  # half way from 2 to 4
        (0.6, [0.1, 0.7, 0.5, 0.7, 0.8], 2 ** (5 / 6), "1.8 images a class"),  # the first time counts
        (0.1, [0.1, 0.3, 0.5, 0.7, 0.8], 1.0, "at least as good as zero-shot with 1 image a class"),
        (0.9, [0.1, 0.3, 0.5, 0.7, 0.8], None, "more than 16 images a class to match zero-shot"),
    ],
)
def test_shots_to_match_zero_shot_by_hand(zero, means, expected, words):
    found = curve(zero, means)
    assert found.shots_to_match("linear probe") == (None if expected is None else pytest.approx(expected))
    assert found.verdict("linear probe").startswith(words)


def test_one_image_is_no_images():
    assert curve(0.9, [0.1], (1,)).verdict("linear probe") == "more than 1 image a class to match zero-shot"


@pytest.fixture(scope="module")
def toy_curve() -> ShotCurve:
    return shot_curve(toy(noise=1.5, count=60), prompts(), seeds=(3, 4), num_neighbours=5)


def test_every_point_of_the_curve_is_the_method_on_those_shots(toy_curve):
    splits, W = toy(noise=1.5, count=60), prompts()
    assert toy_curve.zero_shot == zero_shot(splits, W).accuracy
    assert (toy_curve.shots, toy_curve.left_out, toy_curve.seeds) == ((1, 2, 4, 8), (16,), (3, 4))  # 15 of each class
    assert tuple(toy_curve.accuracies) == METHODS
    for (i, k), (j, seed) in itertools.product(enumerate((1, 2, 4, 8)), enumerate((3, 4))):
        few = splits.shots(k, seed)
        by_hand = (
            linear_probe(few, refit=False).outcome.accuracy,
            nearest_neighbours(few, min(5, 4 * k), refit=False).accuracy,
            tip_adapter(few, W).outcome.accuracy,
        )
        assert tuple(toy_curve.accuracies[method][i, j] for method in METHODS) == by_hand
    values = toy_curve.accuracies["linear probe"]
    np.testing.assert_allclose(toy_curve.mean("linear probe"), (values[:, 0] + values[:, 1]) / 2)
    np.testing.assert_allclose(toy_curve.spread("linear probe"), np.abs(values[:, 0] - values[:, 1]) / math.sqrt(2))
    assert values[-1].mean() > values[0].mean()  # there is something to learn


def test_the_curves_values_go_into_json(toy_curve):
    import json

    values = json.loads(json.dumps(toy_curve.as_dict(), allow_nan=False))
    assert values["shots"] == [1, 2, 4, 8]
    assert np.array_equal(values["methods"]["Tip-Adapter"]["accuracies"], toy_curve.accuracies["Tip-Adapter"])
    json.dumps(curve(0.9, [0.1] * 5).as_dict(), allow_nan=False)  # one seed has no spread


def test_features_before_the_projection_are_for_the_linear_probe_alone():
    splits, W = toy(noise=1.5, count=40), prompts()
    turned = [Labelled(split.features[:, :5], split.labels) for split in (splits.train, splits.validation, splits.test)]
    pooled = Splits(*turned, splits.classnames)
    plain, found = (shot_curve(splits, W, pooled=p, shots=[4], seeds=[0]) for p in (None, pooled))
    assert found.accuracies["linear probe"] == linear_probe(pooled.shots(4, 0), refit=False).outcome.accuracy
    assert found.accuracies["linear probe"] != plain.accuracies["linear probe"]
    for method in METHODS[1:]:
        assert found.accuracies[method] == plain.accuracies[method]
    other = Splits(turned[0], turned[1], blobs(40, 8, E=5), splits.classnames)
    with pytest.raises(ValueError, match="before the projection are of other test images: the labels differ"):
        shot_curve(splits, W, pooled=other)


def test_a_curve_counts_its_progress_and_refuses_what_it_cannot_do():
    splits, W, done = toy(noise=1.5, count=40), prompts(), []
    shot_curve(splits, W, shots=(2, 1), seeds=(0, 1), progress=done.append)
    assert done == [1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"16 shots are more than the training images of class 0 \(10\), class 1"):
        shot_curve(splits, W, shots=(1, 16), progress=lambda _: pytest.fail("the work had begun"))
    with pytest.raises(ValueError, match="a curve of 5 numbers of shots and 0 seeds"):
        shot_curve(toy(), W, shots=(1, 2, 3, 4, 5), seeds=())
    with pytest.raises(ValueError, match="a curve of 0 numbers of shots and 3 seeds"):
        shot_curve(toy(), W, shots=())


def test_the_picture_shows_all_methods_and_the_star_and_is_written_as_its_name_says(toy_curve, tmp_path):
    axes = plot_shots(toy_curve, "notes in $ signs$").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2", "4", "8"]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["zero-shot", *(f"{method}: {toy_curve.verdict(method)}" for method in METHODS)]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["zero-shot"].get_ydata() == [100 * toy_curve.zero_shot]
    np.testing.assert_allclose(lines[labels[1]].get_ydata(), 100 * toy_curve.mean("linear probe"))
    write_picture(tmp_path / "curve.png", toy_curve)
    assert Image.open(tmp_path / "curve.png").width > 600
    write_picture(tmp_path / "curve.svg", toy_curve)
    assert b"<svg" in (tmp_path / "curve.svg").read_bytes()
