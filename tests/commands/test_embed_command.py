"""`miniclip embed` as people run it: what it prints, and its likeliest mistakes."""

from __future__ import annotations

import io
import re
import sys
import tarfile
from types import SimpleNamespace

import pandas as pd
import pytest
from command_line import fails
from helpers import table, tiny_clip, write_picture

import miniclip
from miniclip.commands import main as cli


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, and four pictures beside one that can't be read."""
    folder = tmp_path_factory.mktemp("world")
    miniclip.save(tiny_clip(), folder / "tiny")
    for number in range(4):
        write_picture(folder / f"photos/{number}.png", number)
    (folder / "photos/torn.png").write_bytes(b"torn")
    (folder / "photos/notes.doc").write_text("x")
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    (tmp_path / "photos").symlink_to(world / "photos")
    (tmp_path / "tiny").symlink_to(world / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def embed(*args):
    cli.main(["embed", *map(str, args), "--model", "tiny", "--device", "cpu", "--workers", "0"])


def test_what_was_written_and_what_was_not_is_counted_each_time(here, capsys):
    embed("photos", "out", "--rows-per-file", 3)
    first = capsys.readouterr()
    assert "out: 4 embeddings in 2 files, " in first.out
    assert "1 could not be read, 1 left out, see out/_left_out.csv" in first.out
    assert "photos/notes.doc" in first.err
    embed("photos", "out", "--rows-per-file", 3)
    assert "out: 4 embeddings in 2 files" in (again := capsys.readouterr().out)
    assert "(were there already)" in again


def test_a_part_says_what_is_missing_and_the_last_one_that_all_is_there(here, capsys):
    embed("photos", "out", "--rows-per-file", 1, "--part", "1/2")
    assert capsys.readouterr().out == "part 1 of 2 is done; out comes when 2 of 5 files more are\n"
    embed("photos", "out", "--rows-per-file", 1, "--part", "2/2")
    assert "out: 4 embeddings in 5 files" in capsys.readouterr().out


def test_texts_that_are_cut_are_one_note_of_all_with_the_first_of_the_file(here, capsys):
    (here / "t.txt").write_text("\n".join(["an owl", "zebra " * 40, *(f"owl {n} " * 20 for n in range(3000))]))
    embed("t.txt", "out", "--texts")
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith(
        "note: tiny reads 16 tokens; 3,001 of 3,002 texts are longer and were cut, the first: 'zebra"
    )


def test_names_come_by_standard_input(here, capsys, monkeypatch):
    names = b"photos/2.png\nphotos/0.png\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(names), isatty=lambda: False))
    embed("-", "out")
    assert pd.read_parquet("out").key.tolist() == ["photos/2.png", "photos/0.png"]


def test_texts_of_a_table_come_from_the_columns_that_are_named(here):
    table(here / "t.csv", "title,alt,tag", "a cat,a dog,x", "an owl,,y")
    embed("t.csv", "out", "--texts", "--column", "title", "--column", "alt")
    rows = pd.read_parquet("out")
    assert rows.text.tolist() == ["a cat", "a dog", "an owl"]
    assert rows.tag.tolist() == ["x", "x", "y"]


def test_rows_whose_texts_are_cut_are_counted_in_a_note_without_a_place_in_code(here, capsys):
    (here / "t.txt").write_text("\n".join(["an owl"] * 3 + ["zebra " * 40] * 5))
    embed("t.txt", "out", "--texts")
    notes = [line for line in capsys.readouterr().err.splitlines() if "cut" in line]
    assert len(notes) == 1
    assert re.match("note: tiny reads 16 tokens; 5 of 8 texts are longer and were cut, the first: 'zebra", notes[0])


def test_a_sample_of_shards_without_a_picture_is_said_to_have_none(here):
    with tarfile.open("t.tar", "w") as tar:
        tar.add("photos/0.png", "0.png")
        for key in "01":
            member = tarfile.TarInfo(f"{key}.txt")
            member.size = 3
            tar.addfile(member, io.BytesIO(b"owl"))
    embed("t.tar", "out")
    assert pd.read_parquet("out").key.tolist() == ["t.tar:0"]
    listed = pd.read_csv("out/_left_out.csv")
    assert listed.iloc[0].tolist() == ["t.tar:1", "could not be read", "t.tar:1 has no image"]


MISTAKES = {
    "no file or folder photo; did you mean photos?": ["photo", "out"],
    "no images in empty": ["empty", "out"],
    "no texts in photos": ["photos", "out", "--texts"],
    "photos/out lies in photos": ["photos", "photos/out"],
    "mine exists and was not written by `miniclip embed`": ["photos", "mine", "--overwrite"],
    "s3://bucket/out is a URL; name a folder on a disk": ["photos", "s3://bucket/out"],
    ". is no new folder; give it a name": ["photos", "."],
    "--part is 3/2; it goes from 1/2 to 2/2": ["photos", "out", "--part", "3/2"],
    "'half' is no part; write 1/8": ["photos", "out", "--part", "half"],
    "--rows-per-file is 0; it must be at least 1": ["photos", "out", "--rows-per-file", "0"],
    "--batch-size is 0; it must be at least 1": ["photos", "out", "--batch-size", "0"],
    "--workers is -1; it must be at least 0": ["photos", "out", "--workers", "-1"],
    "the column 'img' is asked for, and photos has no columns": ["photos", "out", "--column", "img"],
    "--column has 2 names; images are in one column": ["photos", "out", "--column", "a", "--column", "b"],
    "none of the 1 rows of": ["photos/torn.png", "out"],
}


@pytest.mark.parametrize("says", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(here, capsys, says):
    (here / "empty").mkdir()
    (here / "mine").mkdir()
    (here / "mine/file").write_text("x")
    before = sorted(here.iterdir())
    err = fails(capsys, ["embed", *MISTAKES[says], "--model", "tiny"])
    assert says in err
    assert "Traceback" not in err
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(("more", "says"), [([], "standard input"), (["--engine", "ray"], "without torchrun")])
def test_what_torchruns_processes_cant_share_is_refused(here, capsys, monkeypatch, more, says):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert says in fails(capsys, ["embed", "photos" if more else "-", "out", "--model", "tiny", *more])
