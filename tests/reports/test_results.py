"""Results as files that others read: JSON, CSV, Parquet, CLIP_benchmark's records; and two runs compared."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from sample_results import GUESSES, NAMES, classified, everything, multilabelled, retrieved

import miniclip
from miniclip.evaluation.features import ImageFeatures
from miniclip.evaluation.retrieval import retrieve
from miniclip.evaluation.robustness import robustness
from miniclip.evaluation.suite import Result
from miniclip.reports.comparison import compare_runs, read
from miniclip.reports.page import write_html
from miniclip.reports.results import (
    as_dict,
    benchmark_records,
    write_benchmark,
    write_csv,
    write_json,
    write_predictions,
)


def written(path: Path, *results: Result) -> dict[str, Any]:
    """What the file says, read by a strict reader."""
    write_json(path, results)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def test_the_dictionary_holds_every_number_and_what_it_takes_to_measure_it_again(tmp_path):
    one = classified(
        tmp_path,
        GUESSES,
        unreadable=("gone.png can't be read",),
        templates_from="the built-in set 'simple'",
        logit_scale=42.5,
        same_prompts=(("owl", "tench"),),
    )
    found = as_dict([one])
    assert set(found) == {"schema", "created", "versions", "files", "results", "robustness"}
    name = "pets_runs-x-best_simple"
    records = [f"{name}_zeroshot_classification.json"]
    assert found["files"] == {"predictions": [f"{name}.parquet"], "clip_benchmark": records}
    assert (found["schema"], found["robustness"]) == (2, None)
    assert found["versions"]["miniclip"] == miniclip.__version__
    assert set(found["versions"]) == {"miniclip", "torch", "python"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["created"])
    (told,) = found["results"]
    assert (told["model"], told["library"]) == ("runs/x/best", "miniclip 0")
    assert (told["dataset"], told["task"], told["num_images"]) == ("pets", "zeroshot_classification", 6)
    assert told["unreadable"] == ["gone.png can't be read"]
    assert told["metrics"] == {
        "acc1": pytest.approx(3 / 6),
        "acc5": pytest.approx(5 / 6),  # of six classes the one before the first guess is missing: cat, after dog
        "mean_per_class_recall": pytest.approx((2 / 3 + 0 + 1) / 3),
        "macro_f1": pytest.approx((2 * 2 / (3 + 4) + 0 + 1) / 3),
        "calibration_error": pytest.approx(one.scores.metrics.calibration.error),
    }
    low, high = told["intervals_95"]["acc1"]
    assert 0 <= low < 0.5 < high <= 1
    assert (told["classnames"], told["classnames_from"]) == (list(NAMES), "a list")
    assert (told["templates"], told["templates_from"]) == (["a photo of a {c}."], "the built-in set 'simple'")
    assert (told["logit_scale"], told["seconds"]) == (42.5, 1.25)
    assert told["same_prompts"] == [["owl", "tench"]]
    rows = [[row[name] for name in ("class", "images", "guessed", "recall")] for row in told["per_class"]]
    assert rows[:3] == [["cat", 3, 4, pytest.approx(2 / 3)], ["dog", 2, 1, 0.0], ["kea", 1, 1, 1.0]]
    assert rows[3:] == [[name, 0, 0, None] for name in NAMES[3:]]
    assert told["confused_pairs"] == [
        {"class": "dog", "guess": "cat", "images": 2},
        {"class": "cat", "guess": "dog", "images": 1},
    ]
    assert np.array(told["confusion"])[:3, :3].tolist() == [[2, 1, 0], [2, 0, 0], [0, 0, 1]]
    assert sum(told["calibration"]["images"]) == 6


def test_each_image_can_be_told_from_the_samples(tmp_path):
    (told,) = as_dict([classified(tmp_path, GUESSES)])["results"]
    samples = told["samples"]
    assert samples["keys"] == [str(tmp_path / f"{number}.png") for number in range(6)]
    assert samples["labels"] == [label for label, _ in GUESSES]
    assert samples["guesses"] == [guess for _, guess in GUESSES]
    assert samples["cosines"] == [0.3] * 6
    assert samples["probabilities"] == pytest.approx([0.9, 0.82, 0.74, 0.66, 0.58, 0.5])
    assert samples["groups"] == list("012345")


def test_the_json_file_is_strict_json_that_keeps_names_as_they_are(tmp_path):
    names = ("Käse", "<b>", '"x" [ 1 ]', "[\n2\n]")
    one = classified(tmp_path, [(0, 0), (2, 1)], names, picture_name="bild [ {} ].png")
    results = [one, everything(tmp_path), multilabelled(tmp_path), retrieved(tmp_path)]
    found = written(tmp_path / "results.json", *results)
    assert "Käse" in (tmp_path / "results.json").read_text(encoding="utf-8")
    assert {**found, "created": None} == {**as_dict(results), "created": None}
    assert found["results"][0]["samples"]["keys"][0].endswith("bild [ 0 ].png")


@pytest.mark.skipif(os.sep != "/", reason="names of files are bytes on POSIX alone")
def test_a_file_whose_name_is_no_utf8_breaks_no_file_of_results(tmp_path):
    one = classified(tmp_path, GUESSES, picture_name="{}-f\udcfcr.png")
    keys = written(tmp_path / "results.json", one)["results"][0]["samples"]["keys"]
    assert keys[0] == str(tmp_path / "0-f\udcfcr.png")
    write_csv(tmp_path / "results.csv", [one])
    (path,) = write_predictions(tmp_path / "predictions", [one])
    assert pyarrow.parquet.read_table(path)["image"][0].as_py().endswith(r"0-f\udcfcr.png")


def test_subgroups_threshold_and_probes_are_told(tmp_path):
    told = written(tmp_path / "results.json", everything(tmp_path))["results"][0]
    light = told["subgroups"]["light"]
    assert (light["gap"], light["best"]) == (None, None)  # all are too small
    rows = {row["value"]: (row["images"], row["acc1"], row["is_too_small"]) for row in light["subgroups"]}
    assert rows == {"day": (3, 1.0, True), "night": (2, 0.0, True), None: (1, 0.0, True)}
    none = told["none_of_these"]
    assert (none["outside"], none["cosine"]) == ("street scenes", pytest.approx(0.25))
    assert (none["accepted_inside"], none["accepted_outside"]) == (0.75, 0.5)
    assert none["auroc"] == pytest.approx((3 + 0.5) / 8)  # of 4 x 2 pairs, 3 the right way round, one tied
    probes = told["probes"]
    assert (probes["train"], probes["num_train"], probes["num_validation"]) == ("more pets", 12, 6)
    assert probes["linear_probe_features"] == "before the projection"
    assert probes["linear_probe"]["lp_acc1"] == probes["nearest_neighbours"]["acc1"] == 1.0
    assert probes["shot_curve"]["zero_shot"] == 0.0


def test_multilabel_and_retrieval_have_their_own_numbers(tmp_path):
    many, scenes = written(tmp_path / "r.json", multilabelled(tmp_path), retrieved(tmp_path))["results"]
    assert many["task"] == "zeroshot_multilabel"
    assert many["metrics"] == {"mean_average_precision": pytest.approx((3 / 4 + 1 + 1 / 3) / 3)}
    assert [row["average_precision"] for row in many["per_class"]] == pytest.approx([3 / 4, 1, 1 / 3])
    assert scenes["task"] == "zeroshot_retrieval"
    assert scenes["metrics"]["image_retrieval_recall@1"] == 0.5
    assert scenes["metrics"]["text_retrieval_recall@1"] == pytest.approx(2 / 3)
    assert scenes["metrics"]["image_retrieval_median_rank"] == 1.5
    assert scenes["samples"]["ranks_of_images"] == [1, 2, 1, 3]
    assert scenes["samples"]["ranks_of_texts"] == [1, 2, 1]
    assert scenes["samples"]["image_of_text"] == [0, 1, 2, 2]


def test_prompts_by_class_stay_by_class(tmp_path):
    prompts = {name: (f"a {name}", f"the {name}") for name in NAMES}
    (told,) = as_dict([classified(tmp_path, GUESSES, templates=prompts)])["results"]
    assert told["templates"] == {name: [f"a {name}", f"the {name}"] for name in NAMES}


def test_very_many_classes_keep_the_confused_pairs_and_drop_the_matrix(tmp_path):
    names = tuple(f"class {number}" for number in range(201))
    (told,) = as_dict([classified(tmp_path, [(200, 0), (1, 1)], names)])["results"]
    assert told["confusion"] is None
    assert told["confused_pairs"] == [{"class": "class 200", "guess": "class 0", "images": 1}]


def test_the_most_frequent_mistakes_come_first_and_right_guesses_are_none(tmp_path):
    guesses = [(0, 0)] * 9 + [(0, 1)] * 2 + [(2, 3)] * 5 + [(1, 0)] + [(4, 5)] * 3
    assert classified(tmp_path, guesses).scores.confused_pairs() == [
        ("kea", "owl", 5),
        ("tench", "zebra", 3),
        ("cat", "dog", 2),
        ("dog", "cat", 1),
    ]
    assert classified(tmp_path, guesses).scores.confused_pairs(most=1) == [("kea", "owl", 5)]
    assert classified(tmp_path, [(0, 0), (1, 1)]).scores.confused_pairs() == []


# ---------------------------------------------------------------------------------------------------------------------
# Others' formats


def test_csv_has_a_row_for_each_result_and_every_number_of_any(tmp_path):
    results = [everything(tmp_path), multilabelled(tmp_path), retrieved(tmp_path)]
    write_csv(tmp_path / "results.csv", results)
    with open(tmp_path / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["dataset"], row["task"]) for row in rows] == [(each.data.name, each.task) for each in results]
    for row, result in zip(rows, results, strict=True):
        for name, value in result.scores.values().items():
            assert float(row[name]) == value
    assert [row["classes"] for row in rows] == ["6", "3", ""]
    assert rows[1]["acc1"] == rows[2]["acc1"] == ""
    assert float(rows[0]["linear_probe_acc1"]) == 1.0
    assert float(rows[0]["none_of_these_auroc"]) == pytest.approx(3.5 / 8)
    assert float(rows[0]["acc1_low"]) < 0.5 < float(rows[0]["acc1_high"])


def test_benchmark_records_have_the_keys_that_its_build_reads(tmp_path):
    write_benchmark(tmp_path / "out", [everything(tmp_path), multilabelled(tmp_path), retrieved(tmp_path)])
    records = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").iterdir()}
    assert set(records) == {
        "pets_runs-x-best_zeroshot_classification.json",
        "pets_runs-x-best_linear_probe.json",
        "many_runs-x-best_zeroshot_classification.json",
        "scenes_runs-x-best_zeroshot_retrieval.json",
    }
    for record in records.values():
        assert set(record) == {"dataset", "model", "pretrained", "task", "metrics", "language"}
    pets = records["pets_runs-x-best_zeroshot_classification.json"]
    assert pets["metrics"]["acc1"] == 0.5
    assert records["pets_runs-x-best_linear_probe.json"]["metrics"]["lp_acc1"] == 1.0
    assert records["scenes_runs-x-best_zeroshot_retrieval.json"]["metrics"]["image_retrieval_recall@5"] == 1.0


def test_a_top_5_of_fewer_than_five_classes_is_not_told_to_others(tmp_path):
    (record,) = benchmark_records([classified(tmp_path, [(0, 0), (1, 0)], NAMES[:2])]).values()
    assert record["metrics"]["acc1"] == 0.5
    assert "acc5" not in record["metrics"]


def test_results_of_one_name_get_files_of_their_own(tmp_path):
    results = [classified(tmp_path, GUESSES, templates_from=each) for each in ("a/set.txt", "b/set.txt")]
    assert len(benchmark_records(results)) == 2
    assert len(set(write_predictions(tmp_path / "out", results))) == 2


def test_long_names_are_cut_to_what_a_file_may_be_called(tmp_path):
    """As paths are, of models and of data that are told apart by their source; the ends tell them apart."""
    folder = "/data/" + "ä" * 200
    results = [
        classified(
            tmp_path, GUESSES, name=f"{folder}/{name}", model=f"{folder}/{model}", templates_from=f"{folder}.txt"
        )
        for name in ("val", "test")
        for model in ("one", "two")
    ]
    write_benchmark(tmp_path / "records", results)
    assert len(list((tmp_path / "records").iterdir())) == 4
    paths = write_predictions(tmp_path / "out", results)
    assert [["val" in path.name, "two" in path.name] for path in paths] == [
        [name, model] for name in (True, False) for model in (False, True)
    ]


def test_predictions_have_a_row_for_each_image_with_its_metadata(tmp_path):
    metadata = {
        "age": [1, "two", None, 4, 5, 6, 0],  # of several types
        "size": [0.5, 1, 2, 3, 4, 5, 0],
        "huge": [2**80, 1, 1, 1, 1, 1, 0],
        "guess": list("uvwxyz."),  # a name that is taken
    }
    one = classified(tmp_path, GUESSES, unreadable=("gone",), metadata=metadata)
    (path,) = write_predictions(tmp_path / "out", [one])
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert len(rows) == 6
    third = rows[2]
    assert (third["image"], third["label"], third["guess"]) == (str(tmp_path / "2.png"), "cat", "dog")
    assert (third["is_right"], third["group"]) == (False, "2")
    assert third["probability"] == pytest.approx(0.74)
    assert third["guesses"] == ["dog", "kea", "owl", "tench", "zebra"]
    assert third["cosines"] == pytest.approx(one.scores.cosines[2])
    assert [row["age"] for row in rows] == ["1", "two", None, "4", "5", "6"]
    assert [row["size"] for row in rows] == [0.5, 1, 2, 3, 4, 5]
    assert (rows[0]["huge"], rows[0]["metadata_guess"]) == (str(2**80), "u")


def test_predictions_of_several_labels_and_of_captions(tmp_path):
    paths = write_predictions(tmp_path / "out", [multilabelled(tmp_path), retrieved(tmp_path)])
    many, scenes = (pyarrow.parquet.read_table(path).to_pylist() for path in paths)
    assert [row["labels"] for row in many] == [["cat"], ["dog", "kea"], [], ["cat"]]
    assert many[0]["cosines"] == pytest.approx([0.3, 0.2, 0.1])
    assert [row["caption"] for row in scenes] == ["a sea", "a hill & <b>", "a town", "a village"]
    assert [row["rank_of_image"] for row in scenes] == [1, 2, 1, 3]
    assert [row["rank_of_texts"] for row in scenes] == [1, 2, 1, 1]
    assert scenes[3]["image"] == str(tmp_path / "2.png")


# ---------------------------------------------------------------------------------------------------------------------
# Robustness


def scored(folder: Path, model: str, name: str, right: int, of: int = 4) -> Result:
    return classified(folder, [(0, 0)] * right + [(0, 1)] * (of - right), model=model, name=name)


def test_effective_robustness_is_what_exceeds_the_baselines_line(tmp_path):
    results = [
        scored(tmp_path, model, name, right)
        for model, shares in {"a": (2, 1), "b": (3, 2), "c": (2, 2)}.items()
        for name, right in zip(("standard", "sketch"), shares, strict=True)
    ]
    found = robustness(results, "standard", ["a", "b"])
    (fit,) = found.fits
    # logit(1/2) = 0 and logit(3/4) = ln 3 go to logit(1/4) = -ln 3 and logit(1/2) = 0.
    assert (fit.slope, fit.intercept) == (pytest.approx(1), pytest.approx(-math.log(3)))
    assert found.shifted == ("sketch",)
    assert [row.is_baseline for row in found.rows] == [True, True, False]
    assert [row.effective[0] for row in found.rows] == pytest.approx([0, 0, 1 / 4])
    told = as_dict(results, found)["robustness"]
    assert told["baselines"] == ["a", "b"]
    assert told["lines"]["sketch"] == {"slope": fit.slope, "intercept": fit.intercept, "r2": pytest.approx(1)}
    assert told["rows"][2]["effective_robustness"]["sketch"] == pytest.approx(1 / 4)
    assert (told["rows"][1]["mean_shifted_acc1"], told["rows"][1]["drop"]) == (0.5, 0.25)


def test_without_two_different_baselines_there_is_no_line(tmp_path):
    results = [scored(tmp_path, "a", "standard", 2), scored(tmp_path, "a", "sketch", 1)]
    for baselines in ([], ["a"]):
        found = robustness(results, "standard", baselines)
        assert (found.fits, found.rows[0].effective) == ((None,), (None,))
    with pytest.raises(ValueError, match="the standard set 'x' was not evaluated; there are standard, sketch"):
        robustness(results, "x")
    with pytest.raises(ValueError, match="the baseline 'b' was not evaluated; there are a"):
        robustness(results, "standard", ["b"])
    with pytest.raises(ValueError, match="the only set"):
        robustness(results[:1], "standard")


# ---------------------------------------------------------------------------------------------------------------------
# Two runs compared


@pytest.fixture
def compare(tmp_path):
    def compare(first: list[Result], second: list[Result]):
        for name, results in (("a", first), ("b", second)):
            write_json(tmp_path / name / "results.json", results)
        return compare_runs(tmp_path / "a", tmp_path / "b" / "results.json").changes

    return compare


def test_what_changed_is_told_image_by_image(compare, tmp_path):
    before = classified(tmp_path, [(0, 0), (0, 1), (1, 1), (1, 0), (1, 0), (1, 0)])
    after = classified(tmp_path, [(0, 1), (0, 1), (1, 1), (1, 1), (1, 1), (1, 1)], model="new")
    (change,) = compare([before], [after])
    assert (change.dataset, change.metric, change.unit, change.count) == ("pets", "acc1", "image", 6)
    assert change.models == ("runs/x/best", "new")
    assert change.shares == (pytest.approx(2 / 6), pytest.approx(4 / 6))
    assert change.comparison.difference == pytest.approx(2 / 6)
    assert change.comparison.p_value == pytest.approx(2 * (1 + 4) / 2**4)  # one lost of four that differ
    assert change.gained == tuple(str(tmp_path / f"{number}.png") for number in (3, 4, 5))
    assert change.lost == (str(tmp_path / "0.png"),)
    assert change.by_class == (("dog", 4, 0.25, 1.0), ("cat", 2, 0.5, 0.0))


def test_only_sets_of_both_runs_are_compared(compare, tmp_path):
    one, other, third = (classified(tmp_path, GUESSES, name=name) for name in ("one", "other", "third"))
    assert [change.dataset for change in compare([one, other], [third, other])] == ["other"]
    with pytest.raises(ValueError, match=r"no results to compare.*one \(zeroshot_classification\)"):
        compare([one], [other])


def test_what_is_not_compared_is_listed_with_the_reason(tmp_path):
    def run(name: str, *results: Result) -> Path:
        write_json(tmp_path / name / "results.json", results)
        return tmp_path / name

    pets, other = classified(tmp_path, GUESSES), classified(tmp_path, GUESSES, name="other")
    x, y, z = (classified(tmp_path, GUESSES, model=name, name="zoo", templates_from="a") for name in "xyz")
    first = run("first", pets, multilabelled(tmp_path), x, y)
    second = run("second", multilabelled(tmp_path), y, z, retrieved(tmp_path), pets, other)
    found = compare_runs(first, second)
    assert [(each.dataset, each.models) for each in found.changes] == [
        ("pets", ("runs/x/best", "runs/x/best")),
        ("zoo", ("y", "y")),
    ]
    task = "zeroshot_classification"
    assert found.left_out == (
        "many (zeroshot_multilabel), runs/x/best: images of several labels each are not right or wrong",
        f"zoo ({task}), x, a: {second} has 2 of that set, and not one that matches it by model and prompts",
        f"zoo ({task}), z, a: {first} has 2 of that set, and not one that matches it by model and prompts",
        f"scenes (zeroshot_retrieval), runs/x/best: {first} has no such set",
        f"other ({task}), runs/x/best: {first} has no such set",
    )
    assert compare_runs(first, first).left_out == found.left_out[:1]


def test_other_images_or_labels_are_refused(compare, tmp_path):
    one = classified(tmp_path / "1", GUESSES)
    with pytest.raises(ValueError, match=r"6 images in .* and 6 in .*, 0 of them the same"):
        compare([one], [classified(tmp_path / "2", GUESSES)])
    with pytest.raises(ValueError, match=r"6 images in .* and 5 in .*, 5 of them the same"):
        compare([one], [classified(tmp_path / "1", GUESSES[:5])])


def test_other_classes_are_told_and_other_captions_refused(compare, tmp_path):
    def changed(name: str, change: Callable[[dict[str, Any]], None]) -> Path:
        found = json.loads((tmp_path / "b/results.json").read_text())
        change(found["results"][0])
        (tmp_path / name).write_text(json.dumps(found))
        return tmp_path / name

    one = classified(tmp_path, GUESSES)
    (same,) = compare([one], [one])
    more = changed("more.json", lambda result: result["classnames"].append("a kea"))
    (change,) = compare_runs(tmp_path / "a", more).changes
    first, second = (prompts.removeprefix(same.prompts[0]) for prompts in change.prompts)
    count = len(one.scores.data.classnames)
    assert re.fullmatch(rf", {count} classes \(cat, dog\b.*\)", first)
    assert second == f", {count + 1} classes (a kea)"

    compare([retrieved(tmp_path)], [retrieved(tmp_path)])
    for digest, is_refused in (("0", True), (None, False)):  # of other captions; as earlier versions wrote it
        other = changed("captions.json", lambda result, digest=digest: result["samples"].update(captions=digest))
        if is_refused:
            with pytest.raises(ValueError, match="has other captions in"):
                compare_runs(tmp_path / "a", other)
        else:
            assert len(compare_runs(tmp_path / "a", other).changes) == 2


def test_models_and_prompts_are_matched_where_a_run_has_several(compare, tmp_path):
    def run(*models: str) -> list[Result]:
        return [
            classified(tmp_path, GUESSES, model=model, templates=(wording,), templates_from=wording)
            for model in models
            for wording in ("a {}", "the {}")
        ]

    changes = compare(run("x", "y"), run("y", "x"))
    assert [(change.models, change.prompts) for change in changes] == [
        ((model, model), (wording, wording)) for model in "xy" for wording in ("a {}", "the {}")
    ]
    assert all(change.comparison.p_value == 1 for change in changes)
    # One model each: prompts alone tell which belong together.
    changes = compare(run("x"), run("y"))
    assert [(change.models, change.prompts) for change in changes] == [
        (("x", "y"), (wording, wording)) for wording in ("a {}", "the {}")
    ]
    # One of each in the first run, and its like among several of the second.
    assert [change.models for change in compare(run("x")[:1], run("x", "y"))] == [("x", "x")]


def test_retrieval_is_compared_in_both_directions(compare, tmp_path):
    images, texts = compare([retrieved(tmp_path)], [retrieved(tmp_path, flip=True)])
    assert (images.metric, images.shares) == ("image_retrieval_recall@1", (0.5, 0.75))
    assert (images.unit, images.count, texts.unit, texts.count) == ("caption", 4, "image", 3)
    assert images.gained == (str(tmp_path / "1.png"),)
    assert texts.metric == "text_retrieval_recall@1"
    assert texts.shares == (pytest.approx(2 / 3), 1.0)
    assert (texts.gained, texts.lost) == ((str(tmp_path / "1.png"),), ())


def test_images_of_one_group_count_as_few_in_a_comparison_of_retrieval(compare, tmp_path):
    before, after = retrieved(tmp_path), retrieved(tmp_path, flip=True)
    grouped = [
        replace(each, scores=replace(each.scores, data=replace(each.data, groups=("0", "0", "0"))))
        for each in (before, after)
    ]
    alone, together = compare([before], [after])[0], compare([grouped[0]], [grouped[1]])[0]
    (low, high), (lower, higher) = alone.comparison.interval, together.comparison.interval
    assert lower < low < 0.25 < high < higher


def test_captions_of_an_image_are_named_by_it_and_by_their_number_and_judged_together(compare, tmp_path):
    """Two of three images are found by all of their ten captions, and were by none: p is 2 / 4, not 2 / 2 ** 20."""
    sample = retrieved(tmp_path)
    captions = tuple(tuple(f"{image}, {number}" for number in range(10)) for image in range(3))
    data = replace(sample.data, captions=captions)
    features = ImageFeatures(data, np.arange(3), torch.eye(3), ())

    def found(shown: list[int]) -> Result:
        return replace(sample, scores=retrieve(features, data, torch.eye(3)[shown].repeat_interleave(10, 0)))

    images, texts = compare([found([0, 2, 1])], [found([0, 1, 2])])
    assert (images.unit, images.count, len(images.gained), len(set(images.gained))) == ("caption", 30, 20, 20)
    assert images.gained[:2] == tuple(f"{tmp_path / '1.png'}, caption {number}" for number in (1, 2))
    assert (images.comparison.p_value, texts.comparison.p_value) == (0.5, 0.5)
    assert (texts.unit, texts.count, texts.gained) == ("image", 3, (str(tmp_path / "1.png"), str(tmp_path / "2.png")))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param("no json", "is not JSON", id="no JSON"),
        pytest.param("[]", "schema None, not 2", id="a list"),
        pytest.param('{"schema": 1}', "schema 1, not 2", id="an old one"),
        pytest.param("\ufffd", "is not JSON", id="one odd character"),
    ],
)
def test_a_file_that_is_no_results_is_refused(tmp_path, text, told):
    (tmp_path / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=told):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"no file .*other"):
        read(tmp_path / "other")


@pytest.mark.long
def test_twenty_thousand_classes_are_scored_and_written_in_little_memory(tmp_path):
    """A matrix of all classes by all classes would take 3.5 GB, and several of them were made."""
    C, random = 21_000, np.random.default_rng(0)
    guesses = [(int(a), int(b)) for a, b in random.integers(0, C, (60, 2))] + [(5, 5)] * 3 + [(7, 9)] * 2
    result = classified(tmp_path, guesses, tuple(f"class {c}" for c in range(C)))
    tracemalloc.start()
    write_json(tmp_path / "results.json", [result])
    write_html(tmp_path / "report.html", [result])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    (saved,) = read(tmp_path / "results.json")["results"]
    assert saved["confused_pairs"][0] == {"class": "class 7", "guess": "class 9", "images": 2}
    assert saved["confusion"] is None
    assert saved["per_class"][5]["images"] >= 3
    assert "classes most often mistaken" in (tmp_path / "report.html").read_text(encoding="utf-8")
