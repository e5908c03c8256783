"""`miniclip eval` as people call it: models, sets, prompts, several processes, breaks, comparisons, mistakes."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm
from command_line import fails
from helpers import tiny_clip, write_pairs, write_picture

import miniclip
from miniclip.commands import main as cli
from miniclip.common.files import locked
from miniclip.reports.results import files_beside

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MINICLIP_CACHE", str(folder))
    return folder / "features"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        miniclip.save(tiny_clip(seed), folder / name)
    return [str(folder / name) for name in ("one", "two")]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Two sets of the same classes, one with metadata; pictures of none; pairs."""
    folder = tmp_path_factory.mktemp("sets")
    for n in range(18):
        write_picture(folder / "photos" / ("tabby_cat", "Käfer", "dog")[n % 3] / f"bild {n}.png", n)
        write_picture(folder / "sketches" / ("tabby_cat", "Käfer", "dog")[n % 3] / f"{n}.png", 100 + n, mode="L")
    (folder / "photos/Käfer/kaputt.jpg").write_bytes(b"no picture")
    (folder / "photos/Käfer/notes.txt").write_text("no picture either")
    for n in range(8):
        write_picture(folder / "streets" / f"{n}.png", 200 + n)
    write_pairs(folder / "pairs", 9, captions=2)
    rows = [("image", "label", "light", "scene")]
    rows += [
        (f"sketches/{('tabby_cat', 'Käfer', 'dog')[n % 3]}/{n}.png", n % 3, ("day", "night")[n % 2], n // 2)
        for n in range(18)
    ]
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    (folder / "table.classnames.txt").write_text("tabby cat\nKäfer\ndog\n")
    return folder


def results(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text())["results"]


def evaluate(*args: str | Path) -> None:
    cli.main(["eval", *map(str, args), "--device", "cpu"])


def test_every_model_is_scored_on_every_set_with_every_set_of_prompts(models, sets, tmp_path, capsys):
    evaluate(
        "--model",
        *models,
        "--data",
        sets / "photos",
        sets / "sketches",
        "--templates",
        "simple",
        "imagenet7",
        "--out",
        tmp_path,
    )
    found = results(tmp_path)
    told = [(r["model"], r["dataset"], len(r["templates"])) for r in found]
    assert told == [(m, d, t) for m in models for d in ("photos", "sketches") for t in (1, 7)]
    said = capsys.readouterr()
    assert "kaputt.jpg is not an image" in said.err
    assert "notes.txt" not in said.err
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["dataset"], float(row["acc1"])) for row in rows] == [
        (r["model"], r["dataset"], r["metrics"]["acc1"]) for r in found
    ]
    assert len(list((tmp_path / "predictions").glob("*.parquet"))) == 8
    records = [json.loads(path.read_text()) for path in (tmp_path / "clip_benchmark").glob("*.json")]
    assert sorted((r["model"], r["dataset"], r["metrics"]["acc1"]) for r in records) == sorted(
        (r["model"], r["dataset"], r["metrics"]["acc1"]) for r in found
    )
    assert all("acc5" not in r["metrics"] for r in records)  # of three classes


def test_a_second_run_takes_features_from_the_cache_and_says_the_same(models, sets, tmp_path, own_cache):
    for out in ("first", "second"):
        evaluate("--model", models[0], "--data", sets / "photos", "--out", tmp_path / out)
    kept = sorted(own_cache.glob("*.safetensors"))
    assert len(kept) == 2  # of images, and the classifier
    first, second = (results(tmp_path / out)[0] for out in ("first", "second"))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    evaluate(
        "--model", models[0], "--data", sets / "photos", "--out", tmp_path / "third", "--no-cache", "--batch-size", 4
    )
    assert results(tmp_path / "third")[0]["samples"]["guesses"] == first["samples"]["guesses"]
    assert sorted(own_cache.glob("*.safetensors")) == kept
    evaluate(
        "--model", models[0], "--data", sets / "photos", "--out", tmp_path / "fourth", "--cache", tmp_path / "mine"
    )
    assert len(list((tmp_path / "mine").glob("*.safetensors"))) == 2


def test_results_that_replace_others_replace_their_files_and_no_others(models, sets, tmp_path):
    out = tmp_path / "out"

    def files() -> set[str]:
        return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}

    ask = ["--data", sets / "photos", "--out", out]
    evaluate("--model", *models, *ask, "--templates", "simple", "imagenet7")
    before, both = files(), json.loads((out / "results.json").read_text())["files"]
    assert [len(both[name]) for name in ("predictions", "clip_benchmark")] == [4, 4]
    assert {f"{folder}/{name}" for folder, names in both.items() for name in names} < before
    mine = ["predictions/mine.parquet", "clip_benchmark/mine.json", "mine.txt"]
    for name in mine:
        (out / name).write_text("mine")
    evaluate("--model", models[0], *ask, "--templates", "simple", "--overwrite")
    one = json.loads((out / "results.json").read_text())["files"]
    assert [len(names) for names in one.values()] == [1, 1]
    written = {f"{folder}/{name}" for folder, names in one.items() for name in names}
    assert files() == {"results.json", "results.csv", "report.html", *written, *mine}


def test_a_folder_that_another_command_writes_to_is_refused_before_any_work(models, sets, tmp_path, capsys):
    args = ["--model", models[0], "--data", str(sets / "photos"), "--out", str(tmp_path / "out")]
    with locked(tmp_path / "out" / ".lock", "busy"):
        assert f"another process is writing {tmp_path / 'out'}" in fails(capsys, ["eval", *args, "--overwrite"])
    assert not (tmp_path / "out" / "results.json").exists()
    cli.main(["eval", *args])
    assert not (tmp_path / "out" / ".lock").exists()
    assert "already holds results" in fails(capsys, ["eval", *args])


def test_a_list_of_files_that_leaves_its_folders_is_not_followed(tmp_path):
    for text in ('{"files": {"predictions": ["../a", "/a", "b"], "clip_benchmark": []}}', "{}", "[]", "no json"):
        (tmp_path / "results.json").write_text(text)
        assert files_beside(tmp_path / "results.json") == [tmp_path / "predictions/b"] * ("files" in text)
    assert files_beside(tmp_path / "other.json") == []


def test_templates_that_are_asked_for_come_before_bad_ones_beside_the_data(models, sets, tmp_path, capsys):
    for name in ("table.csv", "table.classnames.txt"):
        (tmp_path / name).write_text((sets / name).read_text().replace("sketches/", f"{sets}/sketches/"))
    (tmp_path / "table.templates.json").write_text('{"dog": ["a dog"]}')  # of one class of three
    ask = ["--model", models[0], "--data", tmp_path / "table.csv", "--out", tmp_path / "out"]
    said = fails(capsys, ["eval", *map(str, ask)])
    assert "table.templates.json has prompts for 1 classes and the data have 3" in said
    evaluate(*ask, "--templates", "simple", "imagenet7")
    assert [each["templates_from"] for each in results(tmp_path / "out")] == [
        "the built-in set 'simple'",
        "the built-in set 'imagenet7'",
    ]
    # Of what is learnt from, and of images of no class, nobody asks.
    learn = ["--train", tmp_path / "table.csv", "--shots", 1, "--seeds", 0, "--outside", tmp_path / "table.csv"]
    evaluate("--model", models[0], "--data", sets / "table.csv", "--out", tmp_path / "others", *learn)
    assert results(tmp_path / "others")[0]["templates_from"] == "the built-in set 'simple'"


def test_all_that_can_be_asked_of_a_table(models, sets, tmp_path, capsys):
    ask = [
        "--subgroups",
        "light",
        "--outside",
        sets / "streets",
        "--train",
        sets / "photos",
        "--shots",
        1,
        2,
        "--seeds",
        0,
    ]
    evaluate(
        "--model",
        models[0],
        "--data",
        sets / "table.csv",
        "--group-column",
        "scene",
        "--out",
        tmp_path,
        *ask,
        "--topk",
        2,
    )
    (found,) = results(tmp_path)
    assert {value["value"]: value["images"] for value in found["subgroups"]["light"]["subgroups"]} == {
        "day": 9,
        "night": 9,
    }
    assert found["none_of_these"]["outside"] == "streets"
    assert (
        found["none_of_these"]["chosen_on"]["images_outside"] + found["none_of_these"]["tried_on"]["images_outside"]
        == 8
    )
    assert found["probes"]["train"] == "photos"
    assert set(found["probes"]["shot_curve"]["methods"]) == {"linear probe", "neighbours", "Tip-Adapter"}
    assert {"acc1", "acc2", "acc5"} <= set(found["metrics"])
    assert (tmp_path / "report.html").is_file()


def test_captions_are_found_beside_classes_in_one_command(models, sets, tmp_path):
    evaluate("--model", models[0], "--data", sets / "pairs", "--task", "retrieval", "--out", tmp_path)
    (found,) = results(tmp_path)
    assert (found["task"], found["num_images"], found["num_texts"]) == ("zeroshot_retrieval", 9, 18)
    assert {"image_retrieval_recall@1", "text_retrieval_recall@5", "image_retrieval_median_rank"} <= set(
        found["metrics"]
    )


def test_a_family_of_shifted_sets_has_a_table_of_robustness(models, sets, tmp_path, capsys):
    shifted = ["--data", sets / "photos", sets / "sketches", "--standard", sets / "photos"]
    evaluate("--model", *models, *shifted, "--baselines", *models, "--out", tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())["robustness"]
    accuracy = {(r["model"], r["dataset"]): r["metrics"]["acc1"] for r in results(tmp_path)}
    assert (found["standard"], found["shifted"], found["baselines"]) == ("photos", ["sketches"], models)
    for row in found["rows"]:
        assert row["standard_acc1"] == accuracy[row["model"], "photos"]
        assert row["shifted_acc1"] == {"sketches": accuracy[row["model"], "sketches"]}
        assert row["drop"] == pytest.approx(row["standard_acc1"] - row["mean_shifted_acc1"])
    assert "sketches" in capsys.readouterr().out


def test_two_results_are_compared_image_by_image(models, sets, tmp_path, capsys):
    for model, out in zip(models, ("a", "b"), strict=True):
        evaluate("--model", model, "--data", sets / "photos", "--out", tmp_path / out)
    capsys.readouterr()
    cli.main(["eval", "--compare", str(tmp_path / "a"), str(tmp_path / "b/results.json")])
    said = capsys.readouterr().out
    one, two = (np.array(results(tmp_path / out)[0]["samples"]["guesses"]) for out in ("a", "b"))
    labels = np.array(results(tmp_path / "a")[0]["samples"]["labels"])
    gained = int(((two == labels) & (one != labels)).sum())
    assert "photos" in said
    assert re.search(rf"\b{gained}\b", said)
    evaluate("--model", models[0], "--data", sets / "sketches", "--out", tmp_path / "c")
    assert "no results to compare" in fails(capsys, ["eval", "--compare", str(tmp_path / "a"), str(tmp_path / "c")])
    assert "no file" in fails(capsys, ["eval", "--compare", str(tmp_path / "a"), str(tmp_path / "nowhere")])
    merged = json.loads((tmp_path / "a/results.json").read_text())
    merged["results"] += results(tmp_path / "c")
    (tmp_path / "both.json").write_text(json.dumps(merged))
    cli.main(["eval", "--compare", str(tmp_path / "a"), str(tmp_path / "both.json")])
    said = capsys.readouterr()
    assert "photos" in said.out
    assert re.fullmatch(r"not compared: sketches \(.*\), .*: .*a has no such set\n", said.err)


# ---------------------------------------------------------------------------------------------------------------------
# Real processes


def command(*args: str | Path) -> list[str]:
    return [str(ROOT / "eval_zeroshot.py"), *map(str, args), "--device", "cpu"]


def run(python: list[str], *args: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = warm.run([*python, *command(*args)], env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_results_of_one(models, sets, tmp_path, processes):
    args = ["--model", models[0], "--data", sets / "photos", sets / "table.csv", "--no-cache", "--workers", 0]
    evaluate(*args, "--out", tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = run(torchrun, *args, "--batch-size", 5, "--out", tmp_path / "several")
    assert done.stdout.count("report: ") == 1
    assert done.stderr.count("left out: ") == 1
    for one, several in zip(results(tmp_path / "one"), results(tmp_path / "several"), strict=True):
        for name in ("dataset", "num_images", "unreadable", "confusion", "classnames"):
            assert several[name] == one[name]
        assert several["metrics"] == pytest.approx(one["metrics"], abs=1e-5)
        for name in ("keys", "labels", "guesses"):
            assert several["samples"][name] == one["samples"][name]
        for name in ("cosines", "probabilities"):
            np.testing.assert_allclose(several["samples"][name], one["samples"][name], atol=1e-5)


def test_who_reads_the_tables_no_further_gets_all_files(models, sets, tmp_path):
    """As with `| head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    args = ["--model", models[0], "--data", sets / "photos", "--workers", 0, "--out", tmp_path]
    done = subprocess.run(
        [sys.executable, *command(*args)], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert "Traceback" not in done.stderr
    for name in ("results.json", "results.csv", "report.html"):
        assert (tmp_path / name).is_file()
    assert len(list((tmp_path / "predictions").iterdir())) == 1


STOPPED = """
import signal, sys
from miniclip.evaluation import features as embedding
from miniclip.model import CLIP
embedding._SECONDS_BETWEEN_PARTS = 0.0
encode, seen = CLIP.encode_image, 0
def stop(self, images, normalize=False):
    global seen
    if seen >= 8:
        import os
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    seen += len(images)
    return encode(self, images, normalize)
CLIP.encode_image = stop
from miniclip.commands.main import main
main(["eval", *sys.argv[2:]])
"""


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_a_run_that_is_stopped_goes_on_where_it_was(models, sets, tmp_path, monkeypatch, name):
    args = ["--model", models[0], "--data", str(sets / "photos"), "--device", "cpu", "--batch-size", "4"]
    stopped = warm.run([sys.executable, "-c", STOPPED, name, *args, "--out", str(tmp_path / "x")], cwd=ROOT)
    assert stopped.returncode == (130 if name == "SIGINT" else -signal.SIGKILL), stopped.stderr
    assert "Traceback" not in stopped.stderr
    seen = []
    encode = miniclip.CLIP.encode_image
    monkeypatch.setattr(
        miniclip.CLIP, "encode_image", lambda self, x, n=False: seen.append(len(x)) or encode(self, x, n)
    )
    evaluate(*args[:4], "--out", tmp_path / "x")
    assert sum(seen) == 19 - 7  # of the eight that it had seen, one can't be read and is tried again
    evaluate(*args[:4], "--no-cache", "--out", tmp_path / "y")
    assert results(tmp_path / "x")[0]["samples"]["guesses"] == results(tmp_path / "y")[0]["samples"]["guesses"]


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

MISTAKES = [
    ([], "--model and --data are needed"),
    (["--topk", "0"], "--topk is 0; it must be at least 1"),
    (["--train", "a", "b"], "--train has 2 sets and --data 1"),
    (["--train", "a", "--train-split", "b"], "give one of them"),
    (["--train", "PHOTOS/"], "is that of --data, and would be the same part of it; --train-split names another part"),
    (["--train", "a", "--validation", "PHOTOS"], "photos is that of --data"),
    (["--validation", "a"], "--validation is for what is learnt"),
    (["--false-acceptance", "0.1"], "of --outside, which is missing"),
    (["--outside", "streets", "--false-acceptance", "5"], "--false-acceptance is 5.0; it is a share"),
    (["--outside", "PHOTOS"], "is one of --data; it must hold images of none of the classes"),
    (["--data", "PHOTOS", "PHOTOS"], "photos twice; once will do"),
    (["--model", "m", "m"], "--model has m twice"),
    (["--standard", "PHOTOS"], "is the only set of --data; robustness needs shifted ones, too"),
    (["--standard", "other"], "--standard other is none of --data"),
    (["--baselines", "m"], "needs --standard"),
    (["--subgroups", "age"], "has no column 'age'"),
    (["--outside", "nowhere"], "'nowhere' is not there"),
    (["--task", "retrieval"], "photos"),
]


@pytest.mark.parametrize(("more", "message"), MISTAKES, ids=[" ".join(more) for more, _ in MISTAKES])
def test_a_mistake_is_answered_in_words_before_any_work(models, sets, tmp_path, capsys, more, message):
    args = ["--model", models[0], "--data", str(sets / "photos")] if more else []
    more = [each.replace("PHOTOS", str(sets / "photos")) for each in more]
    said = fails(capsys, ["eval", *args, *more, "--out", str(tmp_path / "out")])
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_names_that_would_steer_the_terminal_are_printed_as_escapes(models, tmp_path, capfd):
    for n, name in enumerate(("cat", "dog\x1b[2J\x1b]0;owned\x07")):
        for k in range(2):
            write_picture(tmp_path / "data" / name / f"{n}{k}.png", n)
        (tmp_path / "data" / name / "torn\x1b[1A.png").write_bytes(b"no picture")
    (tmp_path / "data/Thumbs.db").write_bytes(b"x")
    cli.main(["eval", "--model", models[0], "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    out, err = capfd.readouterr()
    assert "\x1b" not in out + err
    assert "\x07" not in out + err
    assert "dog\\x1b[2J" in out
    assert "torn\\x1b[1A.png" in err
    assert "1 left out: left behind by a system" in err
    (found,) = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert found["left_out"] == {"left behind by a system or a program": 1}
