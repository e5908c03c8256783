"""`miniclip doctor`: tables, a page and lists, of any source; and what it refuses, with the remedy."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import fails
from helpers import pack_folder, table, write_pairs, write_picture

from miniclip.commands import main as cli
from miniclip.data.reading.listed import rows_about
from miniclip.data.shards import Shards
from miniclip.data.sources import read_pairs


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twelve pairs; of the pictures one is in test, one is there twice, one can't be read."""
    folder = write_pairs(tmp_path / "photos", 12, size=(64, 64))
    write_picture(tmp_path / "test" / "x.png", 3, (64, 64))
    shutil.copy(folder / "0005.png", folder / "copy.png")
    shutil.copy(folder / "0005.txt", folder / "copy.txt")
    (folder / "0007.png").write_bytes(b"no picture")
    (folder / "0009.txt").write_text("IMG_0009.JPG")
    return folder


def doctor(*args: str | Path) -> None:
    cli.main(["doctor", "--image-size", "32", *map(str, args)])


def test_that_nothing_was_found_is_said_of_the_pairs_that_can_be_used(tmp_path, capsys):
    folder = write_pairs(tmp_path / "photos", 2, size=(64, 64))
    (folder / "0001.txt").unlink()
    doctor(folder)
    shown = capsys.readouterr().out
    assert "no captions: there is no ….txt beside it" in shown
    assert "- train: 1 picture.\n- nothing was found in those that can be used.\n" in shown


def test_what_is_certain_is_dropped_by_the_list_and_all_is_accounted_for(photos, tmp_path, capsys):
    out = tmp_path / "out"
    doctor(photos, "--test", tmp_path / "test", "--out", out)
    shown = capsys.readouterr().out
    assert "is not an image that can be read" in shown
    assert rows_of(out / "drop.csv") == [
        {"key": "0003.png", "source": str(photos), "reason": "leak", "score": "1"},
        {"key": "0009.png", "source": str(photos), "reason": "junk-caption", "score": "1"},
        {"key": "copy.png", "source": str(photos), "reason": "copy", "score": "1"},
    ]
    assert {row["key"]: row["group"] for row in rows_of(out / "groups.csv")} == {"0005.png": "0", "copy.png": "0"}
    found = {(row["key"], row["reason"]): row for row in rows_of(out / "findings.csv")}
    assert found["copy.png", "copy"]["like"] == "0005.png"
    assert found["0003.png", "leak"]["like"] == str(tmp_path / "test" / "x.png")
    cli.main(["shards", str(photos), str(tmp_path / "shards"), "--drop", str(out / "drop.csv")])
    assert "9 pairs in 1 shard," in (packed := capsys.readouterr().out)
    assert "1 rejected, 3 dropped (leak 1, junk-caption 1, copy 1)" in packed
    assert len(Shards(tmp_path / "shards")) + 1 + 3 == 13


def test_the_side_that_makes_pictures_tiny_is_named_where_nobody_gave_it(photos, capsys):
    named = "tiny and blurred are for a model of 224 pixels; --image-size names that of yours"
    cli.main(["doctor", str(photos)])
    assert named in capsys.readouterr().out
    cli.main(["doctor", str(photos), "--image-size", "224"])
    assert named not in capsys.readouterr().out


def test_what_is_only_a_suspicion_is_dropped_if_it_is_asked_for(photos, tmp_path):
    doctor(photos, "--out", tmp_path / "out", "--drop-reasons", "tiny", "--image-size", "400")
    assert {row["reason"] for row in rows_of(tmp_path / "out" / "drop.csv")} == {"tiny"}
    doctor(photos, "--out", tmp_path / "out", "--drop-reasons", "none", "--overwrite")
    assert rows_of(tmp_path / "out" / "drop.csv") == []


@pytest.mark.parametrize("kind", ["table", "shards", "tar", "twice"])
def test_any_source_and_several_are_looked_at(photos, tmp_path, kind):
    if kind == "table":
        names = [path.name for path in sorted(photos.glob("*.png"))]
        lines = [
            f"{name},{(photos / name).with_suffix('.txt').read_text().strip().replace(',', ' ')}" for name in names
        ]
        sources = [table(photos / "pairs.csv", "image,caption", *lines)]
    elif kind == "twice":
        shutil.copytree(photos, tmp_path / "others")
        sources = [photos, tmp_path / "others"]
    else:
        pack_folder(photos, tmp_path / "shards")
        sources = [tmp_path / "shards" if kind == "shards" else tmp_path / "shards" / "00000.tar"]
    doctor(*sources, "--test", tmp_path / "test", "--out", tmp_path / "out")
    dropped = rows_of(tmp_path / "out" / "drop.csv")
    assert sorted(row["reason"] for row in dropped if row["source"] == str(sources[0])) == [
        "copy",
        "junk-caption",
        "leak",
    ]
    groups = rows_of(tmp_path / "out" / "groups.csv")
    assert ("source" in groups[0]) == (kind == "twice")
    if kind == "twice":
        assert len(dropped) == 3 + 12  # all that can be read in the second are copies
        assert {row["source"] for row in groups} == {str(each) for each in sources}


def test_parts_of_one_table_are_compared_with_each_other_and_not_with_themselves(tmp_path, capsys):
    for number in range(4):
        write_picture(tmp_path / f"{number}.png", number, (64, 64))
    rows = [f"{n}.png,a word{n} in a field,{part}" for n, part in enumerate(("train", "val", "train", "test"))]
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("\n".join(["image,caption,split", *rows]))
    doctor(tmp_path / "a.csv", "--val", tmp_path / "b.csv", "--test", tmp_path / "b.csv", "--out", tmp_path / "out")
    assert "leak" not in {row["reason"] for row in rows_of(tmp_path / "out/findings.csv")}
    (tmp_path / "a.csv").write_text("\n".join(["image,caption", *(row.rpartition(",")[0] for row in rows)]))
    doctor(tmp_path / "a.csv", "--val", tmp_path / "b.csv", "--out", tmp_path / "leaks")
    leaks = [row["key"] for row in rows_of(tmp_path / "leaks/findings.csv") if row["reason"] == "leak"]
    assert leaks == ["1.png"]
    arguments = ["shards", str(tmp_path / "b.csv"), str(tmp_path / "packed"), "--split", "holdout"]
    assert "is 'holdout'; valid for --split are test, train, val" in fails(capsys, arguments)


def test_what_of_val_is_in_test_counts_against_val_and_is_dropped_from_it_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, numbers in (("train", range(4)), ("val", range(10, 16))):
        for number in numbers:
            write_picture(Path(name, "deep", f"{number}.png"), number, (64, 64))
            Path(name, "deep", f"{number}.txt").write_text(f"a word{number} in a field")
    shutil.copytree("val/deep", "test", ignore=shutil.ignore_patterns("15.*", "*.txt"))
    doctor("train", "--val", "val", "--test", "test", "--out", "out")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "leak" in line and "val or test" in line]
    assert [cell.strip() for cell in line.split("│")[1:-1]][:4] == ["leak, val", "5", "83.3 %", "5"]
    assert [(row["key"], row["source"]) for row in rows_of(Path("out/drop.csv"))] == [
        (f"deep/{number}.png", "val") for number in range(10, 15)
    ]
    cli.main(["shards", "train", "train_shards", "--drop", "out/drop.csv"])
    assert "rows of out/drop.csv about other sources: val (5)" in capsys.readouterr().err
    cli.main(["shards", "./val/", "val_shards", "--drop", "out/drop.csv"])
    assert "5 dropped (leak 5)" in capsys.readouterr().out
    assert (len(Shards("train_shards")), len(Shards("val_shards"))) == (4, 1)
    # What doctor did not see may be another's list.
    shutil.copytree("train", "other")
    assert "out/drop.csv is about val, not about other" in fails(
        capsys, ["shards", "other", "x", "--drop", "out/drop.csv"]
    )
    shutil.copy("out/drop.csv", "drop.csv")
    assert "is about val, not about train" in fails(capsys, ["shards", "train", "x", "--drop", "drop.csv"])


def test_rows_about_val_as_a_table_have_the_keys_of_its_pairs(tmp_path):
    for number in range(4):
        write_picture(tmp_path / "data/deep" / f"{number}.png", number, (64, 64))
    for name, numbers in (("train", (0, 1)), ("val", (2, 3)), ("test", (3,))):
        lines = [f"deep/{number}.png,a word{number} in a field" for number in numbers]
        table(tmp_path / "data" / f"{name}.csv", "image,caption", *lines)
    train, val, test = (tmp_path / "data" / f"{name}.csv" for name in ("train", "val", "test"))
    pictures = [(tmp_path / "data/deep" / f"{number}.png").read_bytes() for number in (2, 3)]
    pq.write_table(pa.table({"image": pictures, "caption": ["two", "three"]}), tmp_path / "cells.parquet")
    written = table(tmp_path / "data" / "written.csv", "image,caption", "./deep/3.png,as people write it")
    named = [option for name in (val, tmp_path / "cells.parquet", written) for option in ("--val", name)]
    doctor(train, *named, "--test", test, "--out", tmp_path / "out")
    assert [row["key"] for row in rows_of(tmp_path / "out/drop.csv")] == ["deep/3.png", "row 1", "./deep/3.png"]
    cli.main(["shards", str(val), str(tmp_path / "packed"), "--drop", str(tmp_path / "out/drop.csv")])
    assert [Shards(tmp_path / "packed")[0].captions] == [("a word2 in a field",)]
    for source, row in ((tmp_path / "cells.parquet", 1), (written, 0)):
        assert list(rows_about(read_pairs(source), tmp_path / "out/drop.csv", str(source)).rows) == [row]


def test_the_page_has_tables_and_pictures(photos, tmp_path, browser):
    (photos / "0001.txt").write_text("<script>document.title='x'</script> of a\u202ename")
    doctor(photos, "--test", tmp_path / "test", "--out", tmp_path / "out")
    for width in (390, 1280):
        browser.open(tmp_path / "out" / "doctor.html", width)
        browser.check()
    assert browser.js("return document.title") == "Doctor"
    assert "leak: 1" in browser.text()
    assert browser.count("figure img") >= 5


@pytest.mark.parametrize("kind", ["table", "parquet"])
def test_the_parts_of_one_source_are_compared(tmp_path, capsys, kind):
    """Pictures 0 to 3 are train's, and 3 is in test again."""
    rows = [(part, number) for part, numbers in (("train", range(4)), ("test", (4, 3))) for number in numbers]
    for number in range(5):
        write_picture(tmp_path / f"{number}.png", number + 1, (64, 64))
    if kind == "table":
        source = tmp_path / "all.csv"
        source.write_text("image,caption,split\n" + "".join(f"{n}.png,picture {n},{part}\n" for part, n in rows))
    else:
        source = tmp_path / "set"
        source.mkdir()
        for part in ("train", "test"):
            pictures = [(tmp_path / f"{n}.png").read_bytes() for of, n in rows if of == part]
            captions = [f"picture {n}" for of, n in rows if of == part]
            table = pa.table({"image": pictures, "caption": captions})
            pq.write_table(table, source / f"{part}-00000-of-00001.parquet")
    doctor(source, "--test", source, "--out", tmp_path / "out")
    (dropped,) = rows_of(tmp_path / "out" / "drop.csv")
    key = "train: 3.png" if kind == "table" else "train-00000-of-00001.parquet: row 4"
    assert (dropped["key"], dropped["reason"]) == (key, "leak")


def test_what_cannot_be_done_is_refused_with_a_remedy(photos, tmp_path, capsys):
    def refused(*args: str | Path) -> str:
        return fails(capsys, ["doctor", *map(str, args)])

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    assert "pass --overwrite" in refused(photos, "--out", tmp_path / "full")
    assert "is a file; name a folder" in refused(photos, "--out", photos / "0001.txt")
    assert "'leek' is no reason to drop" in refused(photos, "--drop-reasons", "leek")
    assert "names mismatch, which is looked for only with --model" in refused(photos, "--drop-reasons", "mismatch")
    assert "every picture would be a leak" in refused(photos, "--val", photos)
    assert "no folder or file" in refused(tmp_path / "nothing")
    assert "no pairs found" in refused(tmp_path / "empty")
    assert "nothing" in refused(photos, "--test", tmp_path / "nothing")
    assert "near is 0.2" in refused(photos, "--near", "0.2")
    assert "--batch-size" in refused(photos, "--batch-size", "few")
    for path in photos.glob("*.png"):
        path.write_bytes(b"x")
    assert "not one of the pairs can be used" in refused(photos)
