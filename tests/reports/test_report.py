"""Results as people get them: tables in the terminal, and a page that is opened in a real browser from disk."""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import WIDTHS, Browser, log
from helpers import write_picture
from rich.console import Console
from rich.table import Table
from sample_results import GUESSES, NAMES, classified, everything, multilabelled, outside, retrieved

from miniclip.evaluation.datasets.sets import CaptionedImages
from miniclip.evaluation.features import ImageFeatures
from miniclip.evaluation.retrieval import retrieve
from miniclip.evaluation.robustness import robustness
from miniclip.evaluation.suite import Result
from miniclip.reports.comparison import compare_runs
from miniclip.reports.page import write_html
from miniclip.reports.pictures import plot_outside
from miniclip.reports.results import write_json
from miniclip.reports.run_page import differences, write_page
from miniclip.reports.runs import read_curves, read_run
from miniclip.reports.tables import comparison_tables, tables

# What training logs: a row of its own for validation.
FULL_LOG = (
    "epoch,step,train/loss,train/accuracy,train/chance,val/loss,val/retrieval_r1,val/zero_shot_acc1",
    "0,10,5.0,0.1,5.5,,,",
    "0,10,,,,4.0,0.2,0.3",
    "0,20,4.0,0.2,5.5,,,",
)

# ---------------------------------------------------------------------------------------------------------------------
# The tables in the terminal


def printed(*shown: Table, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO())
    for table in shown:
        console.print(table)
    return console.file.getvalue()


def cells(table: Table) -> list[list[str]]:
    """The headings, then the rows, as they are printed."""
    lines = printed(table, width=300).splitlines()
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if re.search("[│┃]", line)]


def test_the_table_has_a_row_of_numbers_for_each_data_set(tmp_path):
    first = classified(tmp_path, GUESSES, unreadable=("gone",), templates_from="the built-in set 'simple'")
    second = classified(tmp_path, [(0, 0)] * 4, name="easy", templates_from="the built-in set 'simple'")
    (table,) = tables([first, second])
    assert table.title == "zero-shot classification, runs/x/best, prompts simple (1)"
    low, high = (f"{100 * bound:.1f}" for bound in first.scores.metrics.interval)
    # Of 4 images that are all right, Wilson's interval starts at 4 / (4 + 1.96²).
    # Said with 0.9, 0.82, 0.74, 0.66, 0.58 and 0.5, of which the first two and the last are right: off by 2.76 in all
    assert cells(table)[1:] == [
        ["pets", "6 of 7", "6", "50.0", f"{low} – {high}", "83.3", "55.6", "52.4", "46.0"],
        ["easy", "4", "6", "100.0", "51.0 – 100.0", "100.0", "100.0", "100.0", "30.0"],
    ]


def test_models_and_prompts_have_columns_where_they_differ_and_sets_stay_together(tmp_path):
    results = [
        classified(tmp_path, GUESSES, model=model, name=name, templates=wordings)
        for model in ("m1", "m2")
        for name in ("pets", "birds")
        for wordings in (("a {}",), dict.fromkeys(NAMES, ("x", "y")))
    ]
    (table,) = tables(results)
    assert table.title == "zero-shot classification"
    assert [row[:3] for row in cells(table)] == [
        ["data", "model", "prompts"],
        *([name, model, count] for name in ("pets", "birds") for model in ("m1", "m2") for count in "12"),
    ]


def test_retrieval_and_several_labels_have_tables_of_their_own(tmp_path):
    scenes, many = tables([retrieved(tmp_path), multilabelled(tmp_path), retrieved(tmp_path, name="more")])
    assert scenes.title == "zero-shot retrieval, runs/x/best"
    heading, images, texts, *others = cells(scenes)
    assert heading[:5] == ["data", "images", "texts", "find", "R@1 %"]
    assert images[:5] == ["scenes", "3", "4", "images by text", "50.0"]
    assert texts[:5] == ["scenes", "3", "4", "texts by image", "66.7"]
    assert heading[6:] == ["R@5 %", "R@10 %", "median rank", "mAP@10 %"]
    # Of the captions' own images, at places 1, 2, 1 and 3, and of the images' own captions: 1; 2; 1 and 2 of 2
    assert images[6:9] == ["100.0", "100.0", "1.5"]
    assert images[9] == f"{100 * (1 + 1 / 2 + 1 + 1 / 3) / 4:.1f}"
    assert len(others) == 2
    assert cells(many)[1] == ["many", "4", "3", f"{100 * (3 / 4 + 1 + 1 / 3) / 3:.1f}"]


def test_subgroups_tell_who_is_served_worse_and_what_is_too_small_to_say(tmp_path):
    guesses = [(0, 0)] * 30 + [(0, 1)] * 40 + [(1, 1)] * 2
    one = classified(tmp_path, guesses, metadata={"skin": ["light"] * 30 + ["dark"] * 40 + [None, "other"]})
    _, table = tables([one])
    assert table.title == "top-1 by skin, pets, runs/x/best, prompts 1"
    assert [[row[i] for i in (0, 1, 2, 4)] for row in cells(table)[1:]] == [
        ["dark", "40", "0.0", ""],
        ["light", "30", "100.0", ""],
        ["(none)", "1", "100.0", "too few"],
        ["other", "1", "100.0", "too few"],
    ]
    assert table.caption == "Gap 100.0 points, from dark to light; their intervals do not overlap."


def test_the_threshold_and_what_was_learnt_are_printed(tmp_path):
    _, _, none, learned = tables([everything(tmp_path)])
    assert none.title == "none of these, pets, runs/x/best, street scenes"
    row = dict(zip(*cells(none), strict=True))
    assert (row["accepted from cosine"], row["accepts of the classes %"], row["accepts of none %"]) == (
        "0.2500",
        "75.0",
        "50.0",
    )
    assert (row["AUROC %"], row["FPR at 95 % TPR %"]) == ("43.8", "100.0")
    assert learned.title == "learnt from features, pets, runs/x/best, learnt from more pets (18)"
    rows = {row[0]: row[1:] for row in cells(learned)[1:]}
    assert list(rows) == ["zero-shot", "linear probe", "neighbours", "Tip-Adapter"]
    assert rows["zero-shot"][1] == "50.0"
    assert [rows[method][1] for method in list(rows)[1:]] == ["100.0"] * 3
    assert rows["neighbours"][0] == "k 3"
    assert rows["linear probe"][3] == "at least as good as zero-shot with 1 image a class"


def shifted(folder: Path, model: str, standard: int, sketch: int) -> list[Result]:
    """Of four images each, so many right."""
    return [
        classified(folder, [(0, 0)] * right + [(0, 1)] * (4 - right), model=model, name=name)
        for name, right in (("photos", standard), ("sketches", sketch))
    ]


def test_robustness_is_printed_with_what_exceeds_the_line(tmp_path):
    results = [*shifted(tmp_path, "a", 2, 1), *shifted(tmp_path, "b", 3, 2), *shifted(tmp_path, "c", 2, 2)]
    table = tables(results, robustness(results, "photos", ["a", "b"]))[-1]
    assert cells(table) == [
        ["model", "photos top-1 %", "sketches %", "sketches, beyond the line", "mean %", "drop"],
        ["a (baseline)", "50.0", "25.0", "+0.0", "25.0", "25.0"],
        ["b (baseline)", "75.0", "50.0", "+0.0", "50.0", "25.0"],
        ["c", "50.0", "50.0", "+25.0", "50.0", "0.0"],
    ]
    without = tables(results, robustness(results, "photos"))[-1]
    assert cells(without)[0] == ["model", "photos top-1 %", "sketches %", "mean %", "drop"]


def changes(folder: Path, before: list[Result], after: list[Result]) -> list[Any]:
    for name, results in (("before", before), ("after", after)):
        write_json(folder / name / "results.json", results)
    return list(compare_runs(folder / "before", folder / "after").changes)


def test_a_comparison_says_better_worse_or_chance_and_how_many_were_made(tmp_path):
    def run(**right: int) -> list[Result]:
        return [
            classified(tmp_path / name, [(0, 0)] * count + [(0, 1)] * (12 - count), name=name)
            for name, count in right.items()
        ]

    found = changes(tmp_path, run(up=4, down=12, same=5, little=5), run(up=12, down=3, same=5, little=6))
    what, *others = comparison_tables(found)
    heading, *rows = cells(what)
    assert {row[0]: row[-1] for row in rows} == {
        "up": "better",
        "down": "worse",
        "same": "no difference beyond chance",
        "little": "no difference beyond chance",
    }
    up = dict(zip(heading, rows[0], strict=True))
    assert up["of"] == "12 images"
    assert (up["before %"], up["after %"], up["difference"]) == ("33.3", "100.0", "+66.7")
    assert (up["p"], up["gained"], up["lost"]) == (f"{2 / 2**8:.3f}", "8", "0")
    assert what.caption == (
        "4 comparisons, each judged by p < 0.05: were nothing different, about 0.2 of so many would seem to be. "
        "p is of McNemar's exact test; where images or captions belong together, of its like for groups, an exact test "
        "of sign flips."
    )
    assert what.title == "what changed, runs/x/best"
    titles = [table.title for table in others]
    assert titles[0] == "classes that changed most: up, top-1, runs/x/best"
    assert cells(others[0])[1] == ["cat", "12", "33.3", "100.0", "+66.7"]
    assert titles[1] == "the first of 8 gained and 0 lost: up, top-1, runs/x/best"
    assert cells(others[1])[1:] == [[str(tmp_path / "up" / f"{number}.png")] for number in range(4, 12)]
    assert not any("same" in title for title in titles)


def test_a_single_comparison_of_two_models_names_both(tmp_path):
    found = changes(tmp_path, [retrieved(tmp_path)], [retrieved(tmp_path, model="new", flip=True)])
    text = printed(*comparison_tables(found[:1]), width=200)
    assert "what changed, runs/x/best → new" in text
    assert "images by text, R@1" in text
    assert "One comparison, judged by p < 0.05." in text
    assert "4 captions" in text
    assert "captions gained" in text


@pytest.mark.parametrize("width", [160, 100, 80])
def test_on_a_narrow_terminal_no_number_is_cut_or_broken(tmp_path, width):
    results = [
        classified(tmp_path, GUESSES, name="photographs of one's own", model="openclip:ViT-B-32/laion2b_s34b_b79k"),
        classified(tmp_path, GUESSES[:5], name="photographs of one's own", model="runs/x/best"),
    ]
    text = printed(*tables(results), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for number in ("50.0", "83.3", "55.6", "52.4"):
        assert number in text


@pytest.mark.parametrize("name", ["photos [old]", "photos [/old]", "[bold]x", "a\\[b]"])
def test_square_brackets_in_names_are_printed_as_they_are(tmp_path, name):
    assert name in printed(*tables([classified(tmp_path, GUESSES, name=name)]))
    assert f"runs/{name}/best" in printed(*tables([classified(tmp_path, GUESSES, model=f"runs/{name}/best")]))


def test_control_characters_in_names_do_not_reach_the_terminal(tmp_path):
    name = "cat\x1b[2J\x1b]0;x\x07 \u202egnp"
    result = classified(tmp_path, GUESSES, ("cat", name, *NAMES[2:]), name=name)
    text = printed(*tables([result]))
    assert "\\x1b[2J" in text
    assert not set("\x1b\x07\u202e") & set(text)
    write_json(tmp_path / "results.json", [result])
    assert json.loads((tmp_path / "results.json").read_text())["results"][0]["classnames"][1] == name


def test_curves_of_a_resumed_run_are_one_and_the_later_log_counts(tmp_path):
    log(tmp_path, "version_0", "epoch,step,train/loss,val/loss", "0,10,5.0,", "0,10,,4.5", "0,20,4.0,", "0,30,9.0,")
    log(tmp_path, "version_2", "step,val/loss,train/loss", "20,,3.5", "30,3.0,3.25")
    log(tmp_path, "version_10", "epoch,step,train/loss", "1,30,2.5", "1,40,2.0")
    for model in (tmp_path / "best", tmp_path / "checkpoints" / "last.ckpt", str(tmp_path / "best")):
        assert read_curves(model) == {
            "train/loss": [(10, 5.0), (20, 3.5), (30, 2.5), (40, 2.0)],
            "val/loss": [(10, 4.5)],  # that of step 30 came before step 30 was trained once more
        }


def test_a_model_without_a_run_has_no_curves(tmp_path):
    assert read_curves(tmp_path / "models" / "best") == {}


def test_a_log_that_a_killed_run_left_unfinished_is_read_as_far_as_it_goes(tmp_path):
    log(tmp_path, "version_0", "epoch,step,train/loss", "0,10,5.0", "0,20,")
    log(tmp_path, "version_1", "")
    assert read_curves(tmp_path / "best") == {"train/loss": [(10, 5.0)]}


@pytest.mark.parametrize(
    "torn",
    [
        "0,15,4.",  # a row that a full disk cut off, and a new line
        "0,15,4.0,20,3.9,0.5",  # … and the next row behind it
        "0,15,4.04.0,0.5",  # two numbers grown together
        "\0\0\0\0",  # blocks that were never written
        "epoch,step,train/loss,val/loss",  # the header once more
        "0,fifteen,4.0,0.5",
        '"0,15,4.0,0.5',
    ],
)
def test_a_torn_row_is_left_out_and_counted_and_the_others_are_drawn(tmp_path, torn):
    log(tmp_path, "version_0", "epoch,step,train/loss,val/loss", "0,10,5.0,0.4", torn, "0,20,3.0,0.2")
    with pytest.warns(UserWarning, match=r"1 of 3 rows of .*version_0/metrics\.csv are damaged"):
        curves = read_curves(tmp_path / "best")
    assert curves == {"train/loss": [(10, 5.0), (20, 3.0)], "val/loss": [(10, 0.4), (20, 0.2)]}


def test_the_page_of_a_run_with_damaged_files_goes_on_and_names_them(tmp_path):
    log(tmp_path, "version_0", "epoch,step,train/loss", "0,10,5.0", "0,1", "0,20,3.0")
    (tmp_path / "logs/version_0/run.json").write_text('{"status": "run')
    with pytest.warns(UserWarning, match="damaged and") as caught:
        write_page(tmp_path / "report.html", [tmp_path])
    assert len(caught) == 2
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1 of 3 rows of" in text
    assert "run.json is damaged and was left out" in text
    assert "Contrastive loss" in text


RECORD: dict[str, Any] = {
    **dict.fromkeys(("status", "command", "device", "precision", "monitor"), "a"),
    **dict.fromkeys(("seconds", "step", "max_steps", "batch_size", "first_step"), 1),
    **{"began": "2026-01-02T03:04:05+00:00", "peak_source": None, "versions": {}, "rejected": []},
}


@pytest.mark.parametrize("name", sorted(RECORD.keys() - {"began", "rejected"}))
def test_a_record_of_a_start_with_a_value_of_another_kind_is_named_and_left_out(tmp_path, name):
    log(tmp_path, "version_0", "epoch,step,train/loss", "0,10,5.0")
    (tmp_path / "logs/version_0/run.json").write_text(json.dumps(RECORD))
    assert read_run(tmp_path).starts == (RECORD,)
    (tmp_path / "logs/version_0/run.json").write_text(json.dumps({**RECORD, name: [True]}))
    with pytest.warns(UserWarning, match=rf"run\.json is damaged and was left out: its {name} is a list"):
        assert read_run(tmp_path).starts == ()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!other"])
def test_a_tag_in_a_runs_settings_is_named_and_nothing_is_built_from_it(tmp_path, tag):
    log(tmp_path, "version_0", "epoch,step,train/loss", "0,10,5.0")
    (tmp_path / "logs/version_0/config.yaml").write_text(f"a: {tag} [{tmp_path / 'made'}]\nb: 1\n")
    with pytest.warns(UserWarning, match=rf"version_0/config\.yaml has the tag {tag}, .* nothing was built"):
        write_page(tmp_path / "report.html", [tmp_path])
    assert not (tmp_path / "made").exists()
    assert f"has the tag {tag}" in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.warns(UserWarning, match="has the tag"):
        run = read_run(tmp_path)
    assert run.settings == {"a": tag, "b": 1}
    assert differences([run, replace(run, settings={"a": tag, "b": 2})]) == [("b", ["1", "2"])]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: [", "while parsing"),
        ("- a\n", "it is a list"),
        ("data: !!python/tuple [1]\n", "data is a str"),
        ("a: \x01\n", "not allowed"),
        ("[" * 5000, "nested more than 100 deep"),
    ],
)
def test_settings_that_are_none_are_left_out_and_named(tmp_path, text, what):
    log(tmp_path, "version_0", "epoch,step,train/loss", "0,10,5.0")
    (tmp_path / "logs/version_0/config.yaml").write_text(text)
    with pytest.warns(UserWarning, match=rf"config\.yaml is damaged and was left out: .*{what}"):
        run = read_run(tmp_path)
    assert run.settings == {}


def test_a_folder_of_another_name_among_the_logs_is_no_crash(tmp_path):
    log(tmp_path, "version_0", "epoch,step,train/loss", "0,10,5.0")
    log(tmp_path, "version_old", "epoch,step,train/loss", "0,10,6.0")
    assert read_curves(tmp_path / "best")["train/loss"][0][0] == 10


# ---------------------------------------------------------------------------------------------------------------------
# The page, without a browser


def page_text(path: Path, *results: Result) -> str:
    write_html(path, results)
    return path.read_text(encoding="utf-8")


def test_the_page_refers_to_nothing_outside_itself(tmp_path):
    log(tmp_path, "version_0", *FULL_LOG)
    text = page_text(tmp_path / "report.html", classified(tmp_path, GUESSES, model=str(tmp_path / "best")))
    without_namespaces = re.sub(r'xmlns(:\w+)?="https?://[^"]*"', "", text)
    metadata = re.sub(r"<metadata>.*?</metadata>", "", without_namespaces, flags=re.S)
    assert "http://" not in metadata
    assert "https://" not in metadata
    assert not re.search(r"<(script|link|iframe|object|embed)\b", text)
    references = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(references) > 6
    assert [reference for reference in references if not reference.startswith(("#", "data:image/"))] == []


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("costs $5", "costs $6 to $7"), id="dollars"),
        pytest.param(("$\\frac$", "$x_$"), id="broken formula"),
        pytest.param(("100 %", "a--b"), id="per cent"),
        pytest.param(("猫", "🐈"), id="not in the font of the chart"),
    ],
)
def test_class_names_of_any_characters_make_a_page_without_a_warning(tmp_path, names):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = page_text(tmp_path / "report.html", classified(tmp_path, [(0, 0), (1, 0)], names))
    assert all(name in text for name in names)


def test_a_run_that_logged_its_loss_alone_makes_a_page_without_a_warning(tmp_path):
    log(tmp_path, "version_0", "epoch,step,train/loss", "0,10,5.0", "0,20,nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = page_text(tmp_path / "report.html", classified(tmp_path, GUESSES, model=str(tmp_path / "best")))
    assert 'id="curves"' in text


def test_a_page_that_cannot_be_made_leaves_the_old_one(tmp_path):
    write_html(tmp_path / "report.html", [classified(tmp_path, GUESSES)])
    before = (tmp_path / "report.html").read_bytes()
    broken = classified(tmp_path / "other", GUESSES)
    (tmp_path / "other" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"0\.png"):
        write_html(tmp_path / "report.html", [broken])
    assert (tmp_path / "report.html").read_bytes() == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.fixture
def show(browser, tmp_path) -> Callable[..., Browser]:
    """Writes the page of some results and opens it, after the checks that hold for every page in every width."""

    def write_and_open(*results: Result, width: int = 1200, **options: Any) -> Browser:
        path = tmp_path / "report.html"
        write_html(path, results, **options)
        for each in sorted(WIDTHS, key=lambda w: w == width):
            browser.open(path, each)
            browser.check()
        return browser

    return write_and_open


@pytest.mark.parametrize("width", WIDTHS)
def test_the_summary_shows_the_measured_numbers(show, tmp_path, width):
    first = classified(tmp_path / "1", GUESSES)
    page = show(first, classified(tmp_path / "2", [(0, 0)] * 3, name="easy"), width=width)
    low, high = (f"{100 * bound:.1f}" for bound in first.scores.metrics.interval)
    columns = ["data", "images", "classes", "top-1 %", "95 % interval", "top-5 %"]
    assert page.cells() == [
        [*columns, "mean per class %", "macro F1 %", "ECE %"],
        ["pets", "6", "6", "50.0", f"{low} – {high}", "83.3", "55.6", "52.4", "46.0"],
        ["easy", "3", "6", "100.0", "43.9 – 100.0", "100.0", "100.0", "100.0", "30.0"],
    ]
    assert page.text("h1") == "runs/x/best"
    assert page.js("return document.title") == "runs/x/best – zero-shot report"
    for number, name in ((1, "pets"), (2, "easy")):
        assert page.text(f"#data-{number}") == name
        assert page.count(f'a[href="#data-{number}"]') == 1


def test_galleries_show_wrong_ones_surest_first_and_right_ones(show, tmp_path):
    page = show(classified(tmp_path, GUESSES))
    wrong = page.js("return [...document.querySelectorAll('.gallery.wrong figure')].map(f => f.innerText.split('\\n'))")
    assert [figure[:3] for figure in wrong] == [
        ["is cat", "dog", "74.0"],
        ["is dog", "cat", "66.0"],
        ["is dog", "cat", "58.0"],
    ]
    assert page.count(".gallery.right figure") == 3
    assert page.count(".gallery.right .guess.is-right") == 3
    assert page.count(".gallery.wrong img, .gallery.right img") == 6
    text = page.text()
    assert "Wrong, surest first (3 of 3)" in text
    assert "dog for cat (2), cat for dog (1)" in text


def test_classes_are_listed_worst_first_without_those_that_have_no_images(show, tmp_path):
    page = show(classified(tmp_path, GUESSES))
    bars = page.js(
        "return [...document.querySelectorAll('.bar')].map(b => b.innerText.split('\\n').map(t => t.trim()))"
    )
    assert [(bar[0], bar[-1]) for bar in bars] == [("dog (2)", "0.0"), ("cat (3)", "66.7"), ("kea (1)", "100.0")]
    assert page.count(".confusion svg") == 1


def test_a_data_set_where_all_is_right_has_no_gallery_of_wrong_ones(show, tmp_path):
    page = show(classified(tmp_path, [(0, 0), (1, 1), (2, 2)]))
    assert page.count(".gallery.wrong") == 0
    assert page.count(".gallery.right figure") == 3
    assert "Wrong" not in page.text()
    assert "Most often mistaken" not in page.text()


def test_a_data_set_where_all_is_wrong_has_no_gallery_of_right_ones(show, tmp_path):
    page = show(classified(tmp_path, [(0, 1)] * 30))
    assert page.count(".gallery.right") == 0
    assert page.count(".gallery.wrong figure") == 24
    assert "Wrong, surest first (24 of 30)" in page.text()


def test_names_with_markup_quotes_and_umlauts_are_shown_as_they_are(show, tmp_path):
    evil = "<script>x()</script>"
    names = (evil, "\"quoted\" & 'single'", "Käse–Brötchen", "<img src=x onerror=x()>")
    one = classified(
        tmp_path,
        [(0, 0), (1, 0), (2, 3), (3, 1)],
        names,
        name=f"data {evil}",
        templates=(f"a {{}} {evil}",),
        unreadable=(f"{evil}.png can't be read",),
        picture_name='{}"><b>x.png',
        model=f'model {evil} "best"',
    )
    page = show(one)
    text = page.text()
    assert page.js("return document.title") == f'model {evil} "best" – zero-shot report'
    assert page.count("script") == 0
    for shown in (*names, f"data {evil}", f"a {{}} {evil}", f"{evil}.png can't be read", f'model {evil} "best"'):
        assert shown in text
    assert page.js("return document.images[0].alt").endswith('"><b>x.png')


def test_unreadable_images_are_listed(show, tmp_path):
    problems = tuple(f"photo {number}.png is not an image" for number in range(13))
    page = show(classified(tmp_path, GUESSES, unreadable=problems))
    text = page.text()
    assert "13 images could not be read and do not count" in text
    assert sum(problem in text for problem in problems) == 10
    assert "and 3 more, in results.json" in text


@pytest.mark.sample(2)
@pytest.mark.parametrize("where", ["path", "class name", "data name", "template", "model"])
def test_a_very_long_word_does_not_widen_the_page(show, tmp_path, where):
    word = "Donaudampfschiffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2
    options = {
        "path": {"unreadable": (f"/home/{word}/a.png can't be read",)},
        "class name": {"names": (word, "b")},
        "data name": {"name": word},
        "template": {"templates": (f"{word}: {{}}",)},
        "model": {"model": word},
    }[where]
    page = show(classified(tmp_path, [(0, 0), (1, 0)], **options))
    assert word in page.text()


def test_a_page_of_a_run_shows_its_curves_and_one_without_has_no_such_section(show, tmp_path):
    one = classified(tmp_path, GUESSES, model=str(tmp_path / "best"))
    page = show(one)
    assert page.count("#training") == 0
    assert page.count("#curves") == 0
    log(tmp_path, "version_0", *FULL_LOG)
    page = show(one)
    assert page.count("#training") == 1
    assert page.count("#curves svg") == 2
    sizes = page.js(
        "return [...document.querySelectorAll('#curves svg')].map(s => s.getBoundingClientRect())"
        ".map(r => Math.min(r.width, r.height))"
    )
    assert min(sizes) > 100


@pytest.mark.sample(2)
@pytest.mark.parametrize("size", [(1, 1), (3, 400), (400, 3), (8, 1), (2000, 1500)])
def test_pictures_of_any_size_are_shown(show, tmp_path, size):
    page = show(classified(tmp_path, [(0, 0), (1, 0)], size=size))
    assert page.count(".gallery.wrong img, .gallery.right img") == 2


@pytest.mark.sample(2)
@pytest.mark.parametrize("num_classes", [1, 2, 13, 46, 300])
def test_any_number_of_classes_makes_a_page(show, tmp_path, num_classes):
    names = tuple(f"class number {number}" for number in range(num_classes))
    guesses = [(number, number if number % 3 else 0) for number in range(num_classes)]
    page = show(classified(tmp_path, guesses, names))
    assert page.cells()[1][2] == str(num_classes)
    assert page.count(".bar") == min(60, num_classes)
    assert ("and 240 better ones, in results.json" in page.text()) == (num_classes == 300)
    assert page.count(".confusion svg") == (1 if num_classes <= 45 else 2)  # all, and those most mistaken


def test_many_data_sets_stand_below_each_other(show, tmp_path):
    page = show(*(classified(tmp_path / str(number), GUESSES, name=f"set {number}") for number in range(4)))
    assert page.count("h2") == 4
    assert [row[0] for row in page.cells()[1:]] == [f"set {number}" for number in range(4)]
    identifiers = page.js("return [...document.querySelectorAll('h2[id]')].map(h => h.id)")
    assert identifiers == [f"data-{number}" for number in range(1, 5)]


# ---------------------------------------------------------------------------------------------------------------------
# What only some results have


@pytest.mark.parametrize("spread", [0, 3e-8])
def test_cosines_that_are_all_the_same_or_nearly_are_drawn(spread):
    inside, others = (np.array([0.3, 0.3 + spread], np.float32) for _ in range(2))
    assert "street scenes" in plot_outside(replace(outside(), inside=inside, outside=others), "birds")


def test_everything_that_one_can_ask_is_on_the_page(show, tmp_path):
    page = show(everything(tmp_path))
    text = page.text()
    assert page.count(".calibration svg") == page.count(".outside svg") == page.count(".probes svg") == 1
    assert "The first guess has 70.0 % on average and is right in 50.0 %: too sure on the whole" in text
    assert "cosine ≥ 0.2500, chosen on one half (1 inside, 1 outside images)" in text
    assert "75.0 % of 4 inside images are accepted and 50.0 % of 2 outside ones" in text
    assert "AUROC 43.8 %" in text
    assert "Top-1 by light" in text
    subgroups = page.js("return [...document.querySelectorAll('.subgroups tr')].map(r => r.innerText.split('\t'))")
    assert [row[:3] for row in subgroups[1:]] == [["day", "3", "100.0"], ["night", "2", "0.0"], ["(none)", "1", "0.0"]]
    assert "Learnt from more pets" in text
    assert "linear probe: at least as good as zero-shot with 1 image a class" in text  # in the curve's legend
    assert "names from a list" in text
    assert "runs/x/best: miniclip 0" in page.text("footer")


def test_unsure_images_are_those_whose_first_two_guesses_are_closest(show, tmp_path):
    page = show(classified(tmp_path, [(0, 0)] * 7 + [(1, 0)]))
    unsure = page.js("return [...document.querySelectorAll('.gallery.unsure img')].map(i => i.alt)")
    assert unsure == ["7.png", "6.png"]  # a quarter of them
    assert page.count(".gallery.unsure .is-wrong") == 1


def test_intervals_of_classes_are_drawn(show, tmp_path):
    one = classified(tmp_path, GUESSES)
    page = show(one)
    low, high = (f"{100 * end:.1f}" for end in one.scores.metrics.per_class.recall_intervals[1])  # dog, the worst
    assert page.js("return document.querySelector('.bar i').title") == f"95 % interval {low} – {high}"


def test_the_classes_most_mistaken_are_drawn_large_where_all_are_too_many(show, tmp_path):
    names = tuple(f"class number {number}" for number in range(100))
    page = show(classified(tmp_path, [(number, number) for number in range(100)] + [(70, 71), (71, 70), (3, 4)], names))
    shown = page.js("return document.querySelectorAll('.confusion svg')[1].textContent")
    assert re.findall(r"class number \d+", shown) == [f"class number {n}" for n in (3, 4, 70, 71)] * 2
    assert "the 4 classes most often mistaken" in page.text()


def test_retrieval_shows_what_was_found_worst_first(show, tmp_path):
    page = show(retrieved(tmp_path))
    captions = page.js("return [...document.querySelectorAll('.image .query')].map(q => q.innerText.trim())")
    assert [caption.splitlines()[0].strip('“”"') for caption in captions] == [
        "a village",
        "a hill & <b>",
        "a sea",
        "a town",
    ]
    assert ["place 3" in captions[0], "place 2" in captions[1], "place 1" in captions[2]] == [True] * 3
    found = page.js(
        "return [...document.querySelectorAll('.image .found')].map(f => [...f.querySelectorAll('img')]"
        ".map(i => i.alt + (i.classList.contains('is-own') ? '!' : '')))"
    )
    # Cosines of "a village": 0.6, 0.64, 0.48. Images that are equally far stand in their order, the own one last.
    assert found[0] == ["1.png", "0.png", "2.png!"]
    assert found[1] == ["0.png", "1.png!", "2.png"]
    assert [row[0] for row in found[2:]] == ["0.png!", "2.png!"]
    texts = page.js(
        "return [...document.querySelectorAll('.text .found')].map(f => [...f.querySelectorAll('div')]"
        ".map(d => d.innerText + (d.classList.contains('is-own') ? '!' : '')))"
    )
    assert texts[0][:2] == ["a village", "a hill & <b>!"]
    assert texts[1][0] == "a sea!"


def test_the_own_image_is_shown_however_late_it_was_found(show, tmp_path):
    angles = torch.linspace(0, 1.5, 8)
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    paths = tuple(write_picture(tmp_path / f"{number}.png", number) for number in range(8))
    data = CaptionedImages("scenes", paths, tuple((f"text {n}",) for n in range(8)), tuple("01234567"))
    texts = features.clone()
    texts[7] = features[0]  # the last one's caption is nearest to the first image
    scores = retrieve(ImageFeatures(data, np.arange(8), features, ()), data, texts)
    page = show(Result("m", scores, 1.0))
    worst = page.js("return [...document.querySelector('.image .found').querySelectorAll('img')].map(i => i.alt)")
    assert worst == ["0.png", "1.png", "2.png", "3.png", "4.png", "7.png"]
    assert "its own at place 8" in page.text(".image .query")
    assert page.js("return document.querySelector('.image .found').innerText.trim()") == "…"


def test_images_of_several_labels_have_a_gallery_and_average_precisions(show, tmp_path):
    page = show(multilabelled(tmp_path))
    assert page.cells()[1] == ["many", "4", "3", "69.4"]
    bars = page.js("return [...document.querySelectorAll('.bar')].map(b => b.innerText.split('\\n')[0].trim())")
    assert bars == ["kea (1)", "cat (2)", "dog (1)"]
    worst = page.js("return [...document.querySelectorAll('.gallery.wrong figure')].map(f => f.innerText.split('\\n'))")
    assert worst == [["is cat", "kea", "0.300", "dog", "0.200", "cat", "0.100"]]
    assert "is none of them" in page.text(".gallery.right")
    assert page.count(".gallery.right .is-right") == 3


def test_several_models_and_prompts_are_compared_and_their_sections_open_on_demand(show, tmp_path):
    results = [
        classified(tmp_path / name, GUESSES, model=model, name=name, templates=(wording,), templates_from=wording)
        for model in ("m1", "m2")
        for name in ("pets", "birds")
        for wording in ("a {}", "costs $5 or $6: {}")
    ]
    page = show(*results)
    assert page.text("h1") == "2 models on pets, birds"
    assert page.count("#comparison svg") == 1
    assert "m1, costs $5 or $6: {} (1)" in page.js("return document.querySelector('#comparison').textContent")
    assert page.count("details.section") == 8
    assert page.count("details.section[open]") == 0
    headings = page.js("return [...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert headings[:2] == ["pets, m1, prompts a {} (1)", "pets, m1, prompts costs $5 or $6: {} (1)"]
    # Galleries are with the first prompts of each model and set.
    assert (
        page.js(
            "return [...document.querySelectorAll('details.section')].map(d => d.querySelectorAll('.gallery').length)"
        )
        == [3, 0] * 4
    )
    page.js("document.querySelectorAll('#summary a')[2].click()")  # the second model's on the first set
    opened = page.js("return [...document.querySelectorAll('details.section')].map(d => d.open)")
    assert [number for number, is_open in enumerate(opened) if is_open] == [4]
    page.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.check()


def test_a_summary_has_a_table_for_each_task(show, tmp_path):
    page = show(classified(tmp_path, GUESSES), retrieved(tmp_path), multilabelled(tmp_path))
    titles = page.js("return [...document.querySelectorAll('#summary h3')].map(h => h.innerText.split(',')[0])")
    assert titles == ["zero-shot classification", "zero-shot retrieval", "zero-shot multilabel"]
    assert page.count("#comparison") == 0  # nothing to compare


def test_robustness_is_drawn_for_each_shifted_set(show, tmp_path):
    results = [*shifted(tmp_path, "a", 2, 1), *shifted(tmp_path, "b", 3, 2), *shifted(tmp_path, "c", 2, 2)]
    page = show(*results, robustness=robustness(results, "photos", ["a", "b"]))
    assert page.count("#robustness") == page.count(".pictures svg") == 1
    assert "baselines' line" in page.js("return document.querySelector('.pictures').textContent")
    assert "+25.0" in page.text()


def test_prompts_by_class_and_classes_of_the_same_prompts_are_told(show, tmp_path):
    prompts = {name: (f"some {name}", f"this {name}") for name in NAMES}
    page = show(classified(tmp_path, GUESSES, templates=prompts, same_prompts=(("cat", "dog"),)))
    codes = page.js("return [...document.querySelectorAll('code')].map(c => c.textContent)")
    assert codes[:3] == ["cat: some cat", "cat: this cat", "dog: some dog"]
    assert len(codes) == 12
    assert "2 classes have the same prompts, and the first gets all guesses: cat, dog" in page.text()


def test_pictures_are_readable_in_the_dark(show, tmp_path):
    page = show(everything(tmp_path))
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    try:
        paper, ink, filtered = page.js(
            "const s = getComputedStyle(document.body), p = getComputedStyle(document.querySelector('svg'));"
            "return [s.backgroundColor, s.color, p.filter]"
        )
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (paper, ink)]
    assert brightness[0] < 100 < 600 < brightness[1]
    assert "invert" in filtered  # black lines become white ones
