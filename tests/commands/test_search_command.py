"""`miniclip index` and `miniclip search`, as people run them: results, a page, and their likeliest mistakes."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from browser import WIDTHS
from command_line import fails
from helpers import tiny_clip, write_picture

import miniclip
from miniclip.commands import main as cli
from miniclip.inference.thresholds import CalibratedModel, ModelThreshold, write_threshold


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A table of eight pictures, their index, and its model."""
    folder = tmp_path_factory.mktemp("made")
    for number in range(8):
        write_picture(folder / f"photos/{number}.png", number % 7)  # the last is a copy of the first
        os.utime(folder / f"photos/{number}.png", (10**9, 10**9))  # one of this second would be looked at again
    rows = [{"image": f"photos/{n}.png", "Year": 2000 + n, "camera": "X" if n % 2 else "Y"} for n in range(8)]
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "queries.txt").write_text("a picture\n\na dog\n")
    miniclip.save(tiny_clip(), folder / "model")
    cli.main(["index", str(folder / "table.jsonl"), str(folder / "an.index"), "--model", str(folder / "model")])
    return folder


@pytest.fixture
def world(made, tmp_path, monkeypatch, capsys):
    shutil.copytree(made / "an.index", tmp_path / "an.index")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    return made


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_file_of_queries_is_read_as_other_texts_are(world, capsys, encoding, end):
    """In any encoding that it names, a query a line; U+2028 and other separators are spaces within one."""
    Path("q.txt").write_bytes(end.join(["a café", "", "a\u2028red\x0bcar\x85", ""]).encode(encoding))
    cli.main(["search", "an.index", "--queries", "q.txt", "--topk", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["query"] for row in found] == ["a café", "a red car"]
    for query, row in zip(("a café", "a red car"), found, strict=True):
        cli.main(["search", "an.index", query, "--topk", "1", "--json"])
        assert json.loads(capsys.readouterr().out)[0]["cosine"] == pytest.approx(row["cosine"], abs=1e-6)


@pytest.mark.parametrize("text", [b"un caf\xe9\n", "un café\n".encode("utf-16-le")])
def test_queries_in_an_encoding_that_nothing_names_are_refused(world, capsys, monkeypatch, text):
    Path("q.txt").write_bytes(text)
    assert "q.txt is not UTF-8 text" in fails(capsys, ["search", "an.index", "--queries", "q.txt"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert "standard input is not UTF-8 text" in fails(capsys, ["search", "an.index", "-"])


def test_results_come_as_a_table_json_csv_and_paths(world, capsys):
    cli.main(["search", "an.index", "a picture", "--topk", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["rank"] for row in found] == [1, 2, 3]
    assert set(found[0]) == {"rank", "cosine", "path", "Year", "camera"}
    cli.main(["search", "an.index", "a picture", "--topk", "3", "--paths"])
    assert capsys.readouterr().out.splitlines() == [row["path"] for row in found]
    cli.main(["search", "an.index", "--topk", "3", "a picture"])  # a text may stand behind options
    assert found[2]["path"] in capsys.readouterr().out
    cli.main(["search", "an.index", "--queries", str(world / "queries.txt"), "--topk", "3", "--csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["query"] for row in rows] == ["a picture"] * 3 + ["a dog"] * 3
    assert [row["path"] for row in rows[:3]] == [row["path"] for row in found]


OWN = {"group": 7, "query": "q", "rank": 99, "cosine": "c", "camera.make": "dot", "camera_make": "line", "_rowid": 3}


def test_queries_from_a_closed_standard_input_are_refused(world, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert "- is standard input, and that is closed" in fails(capsys, ["search", "an.index", "-"])


def test_no_column_of_a_table_is_lost_for_its_name(world, capsys):
    rows = [{"image": str(world / f"photos/{n}.png"), **OWN, "key": "k", "a`b": "tick"} for n in range(2)]
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = ["index", "t.jsonl", "t.index"]
    cli.main([*index, "--model", str(world / "model")])
    renamed = capsys.readouterr().err
    assert "column 'rank' of" in renamed
    assert "t.jsonl is given_rank in the index" in renamed
    assert "column 'camera.make'" in renamed
    assert "camera_make_2" in renamed
    assert "'camera_make' of" not in renamed
    expected = {f"given_{name}": value for name, value in OWN.items() if "camera" not in name}
    expected |= {"camera_make": "line", "camera_make_2": "dot", "given_key": "k", "a_b": "tick"}
    cli.main(["search", "t.index", "--queries", str(world / "queries.txt"), "--topk", "1", "--json"])
    for row in json.loads(capsys.readouterr().out):
        assert {name: row.pop(name) for name in expected} == expected
        assert set(row) == {"query", "rank", "cosine", "path"}
        assert (row["query"] in ("a picture", "a dog"), row["rank"], type(row["cosine"])) == (True, 1, float)
    cli.main(["search", "t.index", "--near-duplicates", "-0.99", "--json", "--where", "given_group = 7"])
    assert [(row["group"], row["given_group"]) for row in json.loads(capsys.readouterr().out)] == [(1, 7), (1, 7)]
    cli.main([*index, "--dry-run", "--json"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)[-1] == {"pictures": "unchanged", "count": 2}
    assert "given_rank" in printed.err


def test_an_index_from_before_may_have_columns_with_names_of_results(world, capsys):
    import lancedb
    import pyarrow as pa

    lancedb.connect("an.index").open_table("images").add_columns([pa.field("rank", pa.int64())])
    cli.main(["search", "an.index", "a picture", "--json"])
    printed = capsys.readouterr()
    assert [(row["rank"], row["given_rank"]) for row in json.loads(printed.out)] == [(n, None) for n in range(1, 9)]
    assert "column 'rank' of the index is given_rank in the results" in printed.err


@pytest.mark.long
def test_paths_and_pages_lead_to_a_file_whose_name_is_no_utf_8(world, tmp_path, capsys):
    path = write_picture(tmp_path / "odd" / os.fsdecode(b"caf\xe9.png"))
    cli.main(["index", "odd", "odd.index", "--model", str(world / "model")])
    command = [sys.executable, "-m", "miniclip", "search", "odd.index", "a", "--paths", "--html", "odd.html"]
    assert subprocess.run(command, capture_output=True, check=True).stdout == os.fsencode(path) + b"\n"
    page = Path("odd.html").read_text()
    assert "caf%E9.png" in page
    assert "can't be read" not in page
    capsys.readouterr()
    cli.main(["search", "odd.index", "a", "--json"])
    assert json.loads(capsys.readouterr().out)[0]["path"] == str(path)


def test_a_page_names_what_changed_since_it_was_indexed(world, tmp_path):
    pictures = [write_picture(tmp_path / f"few/{n}.png", seed=n) for n in range(2)]
    cli.main(["index", "few", "few.index", "--model", str(world / "model")])
    write_picture(pictures[1], seed=9)
    cli.main(["search", "few.index", "a", "--html", "few.html"])
    figures = Path("few.html").read_text().split("<figure>")[1:]
    (changed,) = [figure for figure in figures if "changed since it was indexed" in figure]
    assert (len(figures), "few/1.png" in changed) == (2, True)


def test_filters_and_near_duplicates(world, capsys):
    cli.main(["search", "an.index", "a", "--where", "`Year` > 2003 AND camera = 'X'", "--json"])
    assert sorted(row["Year"] for row in json.loads(capsys.readouterr().out)) == [2005, 2007]
    cli.main(["search", "an.index", "--near-duplicates", "0.99999", "--json"])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [(row["group"], row["path"][-5:]) for row in found] == [(1, "0.png"), (1, "7.png")]
    assert "2 pictures in 1 group of near duplicates" in printed.err


def test_a_threshold_in_the_models_folder_is_applied_to_words(world, capsys):
    encoder = miniclip.Index("an.index", device="cpu").encoder
    threshold = ModelThreshold(0.9999, "at most 5 % of outside images accepted", model=CalibratedModel.of(encoder))
    write_threshold(world / "model/threshold.json", threshold)
    try:
        cli.main(["search", "an.index", "a picture", "--json"])
        printed = capsys.readouterr()
        assert json.loads(printed.out) == []
        assert "applied: cosine ≥ 0.9999" in printed.err
        assert "nothing reaches the threshold" in printed.err
        cli.main(["search", "an.index", "a picture", "--threshold", "-1", "--topk", "8", "--json"])
        assert len(json.loads(capsys.readouterr().out)) == 8
        cli.main(["search", "an.index", "--like", str(world / "photos/1.png"), "--topk", "8", "--json"])
        assert len(json.loads(capsys.readouterr().out)) == 8
    finally:
        (world / "model/threshold.json").unlink()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_shows_what_was_found(world, browser, tmp_path, width):
    (world / "photos/3.png").rename(world / "away.png")  # after it was indexed
    try:
        like = str(world / "photos/1.png")
        cli.main(["search", "an.index", "a <b>picture</b>", "--like", like, "--topk", "8", "--html", "page.html"])
    finally:
        (world / "away.png").rename(world / "photos/3.png")
    browser.open(tmp_path / "page.html", width)
    browser.check()
    assert browser.count(".sheet figure") == 8
    assert browser.count(".sheet img") == 7
    assert browser.count(".asked img") == 1
    assert "3.png can't be read" in browser.text(".problem")
    assert browser.text("h2") == "a <b>picture</b>"
    assert "camera: X" in browser.text()


@pytest.mark.parametrize(
    "command, expected",
    [
        (["search", "nowhere", "a"], ["no index at", "nowhere", "miniclip index SRC"]),
        (["search", "an.index"], ["nothing is asked for", "--like IMAGE"]),
        (["search", "an.index", ""], ["a query is empty"]),
        (["search", "an.index", "a", "red", "car"], ["3 texts", "'a red car'", "--queries FILE"]),
        (["search", "an.index", "--like", "nowhere.jpg"], ["no file or folder nowhere.jpg"]),
        (["search", "an.index", "a", "--where", "yeer > 3"], ["'yeer > 3'", "columns are key", "camera"]),
        (["search", "an.index", "a", "--topk", "0"], ["--topk is 0"]),
        (["search", "an.index", "a", "--threshold", "2"], ["threshold 2", "from -1 to 1"]),
        (["search", "an.index", "a", "--queries", "q.txt"], ["'a'", "q.txt", "one of them"]),
        (["search", "an.index", "--queries", "q.txt"], ["q.txt is no file"]),
        (["search", "an.index", "a", "--near-duplicates"], ["without a query"]),
        (["search", "an.index", "--near-duplicates", "3"], ["at least 3", "at most 1"]),
        (["index", "nowhere", "an.index"], ["no file or folder nowhere"]),
        (["index", ".", "new.index"], ["no index at", "--model M"]),
        (["index", ".", "new.index", "--model", "nowhere"], ["no checkpoint at 'nowhere'"]),
        (["index", "an.index", "an.index", "--batch-size", "0"], ["--batch-size is 0"]),
        (["index", "an.index", "an.index", "--workers", "-1"], ["--workers is -1"]),
        (["index", "an.index", "an.index", "--approximate", "95"], ["--approximate is 95", "a share"]),
        (["index", "an.index", "an.index", "--dry-run", "--approximate", "0.9"], ["--dry-run changes nothing"]),
    ],
    ids=lambda value: " ".join(value[:4]),
)
def test_mistakes_are_explained_in_a_sentence(world, capsys, command, expected):
    said = fails(capsys, command)
    assert all(part in said for part in expected), said
    assert "Traceback" not in said


def test_a_closed_pipe_ends_a_search_quietly(world):
    command = f"{sys.executable} -m miniclip search an.index 'a picture' --paths | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout.endswith(".png\n")
    assert "Error" not in done.stderr
