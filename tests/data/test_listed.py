"""A list of pairs to leave out: each is dropped by its reason and counted, and what it names in vain is reported."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from command_line import fails
from helpers import pack_folder, rejected_rows, table, write_pairs, write_picture

from miniclip.commands import main as cli
from miniclip.data.indexing.index_tars import index_shards
from miniclip.data.open_pairs import shard_pairs
from miniclip.data.reading.listed import rows_about, without_listed
from miniclip.data.reading.pair import Pair, Pairs
from miniclip.data.shards import Shards
from miniclip.data.sources import read_pairs


def captions(shards: Path) -> list[str]:
    records = Shards(shards)
    return [records[index].captions[0].partition(",")[0] for index in range(len(records))]


def test_kept_held_out_rejected_dropped_and_left_out_are_all_that_lies_there(tmp_path, capsys):
    folder = write_pairs(tmp_path / "photos", 40)
    (folder / "0007.png").write_bytes(b"no picture")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    drop = table(
        tmp_path / "drop.csv",
        "key,source,reason,score",
        f"0001.png,{folder},copy,1",
        f"0002.png,{folder}/,leak,0.99",
        f"0003.png,{folder},copy,",
        f"0003.png,{folder},leak,",  # a pair is dropped once
        f"gone.png,{folder},leak,",
        "0004.png,elsewhere,leak,",
    )
    cli.main(["shards", str(folder), str(tmp_path / "out"), "--drop", str(drop), "--val-fraction", "0.3"])
    out, err = capsys.readouterr()
    assert f"1 of the rows of {drop} names no pair of {folder}: gone.png" in err
    assert "about other sources: elsewhere (1)" in err
    kept, held_out = (len(Shards(tmp_path / "out" / side)) for side in ("train", "val"))
    assert f"{kept} pairs and {held_out} held out in" in out
    assert "; 1 rejected, 3 dropped (copy 2, leak 1), 1 left out, see" in out
    assert kept + held_out + 1 + 3 == 40
    assert {row[1]: row[2] for row in rejected_rows(tmp_path / "out") if "dropped" in row[2]} == {
        "0001.png": "dropped: copy",
        "0002.png": "dropped: leak",
        "0003.png": "dropped: copy",
    }
    index = json.loads((tmp_path / "out" / "train" / "index.json").read_text())
    assert (index["left_out"]["dropped: copy"], index["left_out"]["dropped: leak"]) == (2, 1)


@pytest.mark.parametrize("kind", ["folder", "table", "shards"])
def test_pairs_of_any_source_are_dropped_by_the_names_that_reading_gives_them(tmp_path, kind):
    folder = write_pairs(tmp_path / "photos", 5)
    if kind == "table":
        lines = [f"{n:04d}.png,picture {n}" for n in range(5)]
        pairs = read_pairs(table(folder / "t.csv", "image,caption", *lines))
    elif kind == "shards":
        pack_folder(folder, tmp_path / "out")
        pairs = shard_pairs(str(tmp_path / "out"))
    else:
        pairs = read_pairs(folder)
    listed = rows_about(pairs, table(tmp_path / "drop.csv", "key", pairs.names[1], pairs.names[4]), "x")
    kept, reasons = without_listed(pairs, listed)
    assert reasons == {"listed": 2}
    assert [pair.captions[0].partition(",")[0] for pair in kept] == ["picture 0", "picture 2", "picture 3"]
    assert [(each.source, each.count) for each in kept.left_out] == [(pairs.names[1], 1), (pairs.names[4], 1)]


def test_a_key_of_shards_that_comes_again_is_another_pair_to_a_list(tmp_path):
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w") as tar:
        for number, key in enumerate(("a", "b", "a", "a (2)", "a")):
            write_picture(tmp_path / "x.png", number)
            for suffix, data in (("png", (tmp_path / "x.png").read_bytes()), ("txt", f"text {number}".encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    index_shards(str(tmp_path / "tars"))
    pairs = shard_pairs(str(tmp_path / "tars"))
    assert list(pairs.names) == ["0.tar:a", "0.tar:b", "0.tar:a (3)", "0.tar:a (2)", "0.tar:a (4)"]
    kept, _ = without_listed(pairs, rows_about(pairs, table(tmp_path / "d.csv", "key", "0.tar:a (3)"), "x"))
    assert [pair.captions for pair in kept] == [(f"text {n}",) for n in (0, 1, 3, 4)]


def test_a_row_has_the_tables_own_number_whichever_split_is_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_picture(tmp_path / "x.png", 1)
    data = (tmp_path / "x.png").read_bytes()
    rows = [{"image": data, "caption": f"text {n}", "split": ("val", "train")[n % 2]} for n in range(4)]
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), tmp_path / "t.parquet")
    drop = table(tmp_path / "drop.csv", "key", "row 1")
    pairs = read_pairs(tmp_path / "t.parquet")
    assert list(pairs.names) == ["row 1", "row 3"]
    kept, _ = without_listed(pairs, rows_about(pairs, drop, "x"))
    assert [pair.captions for pair in kept] == [("text 3",)]
    with pytest.raises(ValueError, match=r"no row of .* names a pair of x: row 1"):
        rows_about(read_pairs(tmp_path / "t.parquet", split="val"), drop, "x")


@pytest.mark.parametrize("kind", ["column", "files"])
def test_a_path_in_two_parts_of_one_source_is_a_pair_of_each_and_a_list_tells_them_apart(tmp_path, kind):
    for n in range(3):
        write_picture(tmp_path / f"{n}.png", n)
    lines = {"train": ("0.png,in train", "1.png,one"), "test": ("0.png,in test", "./0.png,again", "2.png,two")}
    if kind == "column":
        rows = (f"{line},{part}" for part, own in lines.items() for line in own)
        source = table(tmp_path / "t.csv", "image,caption,split", *rows)
    else:
        parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        (source := tmp_path / "set").mkdir()
        for part, own in lines.items():
            images, captions = zip(*(line.split(",") for line in own), strict=True)
            parquet.write_table(pa.table({"image": images, "caption": captions}), source / f"{part}.parquet")
    train, test = (read_pairs(source, split=part, images=tmp_path) for part in lines)
    assert (train.names[0], test.names[0], len(test)) == ("train: 0.png", "test: 0.png", 2)
    assert train.names[1] == ("1.png" if kind == "column" else "train: 1.png")  # other files are not opened
    drop = table(tmp_path / "drop.csv", "key", "train: 0.png")
    kept, _ = without_listed(train, rows_about(train, drop, "x"))
    assert [pair.captions for pair in kept] == [("one",)]
    with pytest.raises(ValueError, match=r"no row of .*drop\.csv names a pair of x: train: 0\.png; .*'test: 0\.png'"):
        rows_about(test, drop, "x")
    with pytest.raises(ValueError, match=r"d\.csv, row 1: '0\.png' is in several parts of x.* 'test: 0\.png'"):
        rows_about(test, table(tmp_path / "d.csv", "key", "0.png"), "x")


def rows_of(tmp_path, count):
    write_picture(tmp_path / "x.png", 1)
    return [{"image": (tmp_path / "x.png").read_bytes(), "caption": f"text {n}"} for n in range(count)]


def write_parts(tmp_path, kind):
    """Two pairs of train in the first place and one in a second, if the kind has several of a part; and two of val."""
    root = tmp_path / "set"
    if kind == "imagefolder":
        for part in ("train", "val"):
            for n in range(2):
                write_picture(root / part / f"{n}.png", n)
            lines = "".join(f"{n}.png,{part} {n}\n" for n in range(2))
            (root / part / "metadata.csv").write_text(f"file_name,text\n{lines}")
    elif kind == "datasets":
        datasets = pytest.importorskip("datasets")
        parts = {
            part: datasets.Dataset.from_list(
                [row | {"caption": f"{part} {n}"} for n, row in enumerate(rows_of(tmp_path, 2))]
            )
            for part in ("train", "val")
        }
        datasets.DatasetDict(parts).save_to_disk(root)
    else:
        parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        root.mkdir()
        for stem, count in (("train-00000-of-00002", 2), ("train-00001-of-00002", 1), ("val-00000-of-00001", 2)):
            rows = [row | {"caption": f"{stem[:-9]} {n}"} for n, row in enumerate(rows_of(tmp_path, count))]
            parquet.write_table(pa.Table.from_pylist(rows), root / f"{stem}.parquet")
    return root


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("imagefolder", {"train": ["train/0.png", "train/1.png"], "val": ["val/0.png", "val/1.png"]}),
        ("datasets", {"train": ["train: row 1", "train: row 2"], "val": ["val: row 1", "val: row 2"]}),
        (
            "parquet",
            {
                "train": [
                    "train-00000-of-00002.parquet: row 1",
                    "train-00000-of-00002.parquet: row 2",
                    "train-00001-of-00002.parquet: row 1",
                ],
                "val": ["val-00000-of-00001.parquet: row 1", "val-00000-of-00001.parquet: row 2"],
            },
        ),
    ],
)
@pytest.mark.parametrize("dropped", ["train", "val"])
def test_a_key_of_one_part_names_no_pair_of_another(tmp_path, kind, names, dropped):
    root = write_parts(tmp_path, kind)
    drop = table(tmp_path / "drop.csv", "key,source", f"{names[dropped][-1]},{root}")
    for part in ("train", "val"):
        pairs = read_pairs(root, split=part)
        assert list(pairs.names) == names[part] == [pair.source for pair in pairs]
        if part == dropped:
            kept, _ = without_listed(pairs, rows_about(pairs, drop, str(root)))
            assert [pair.captions for pair in kept] == [pair.captions for pair in pairs][:-1]
        else:
            with pytest.raises(ValueError, match=r"no row of .* names a pair"):
                rows_about(pairs, drop, str(root))
        old = "0.png" if kind == "imagefolder" else "row 0"  # as lists of earlier versions have it
        with pytest.raises(ValueError, match=r"no row of .* names a pair of .*a pair of it is called "):
            rows_about(pairs, table(tmp_path / "old.csv", "key,source", f"{old},{root}"), str(root))


def test_a_key_of_several_pairs_is_refused(tmp_path):
    pairs = Pairs(["a", "b", "a"], Pair, "three")
    with pytest.raises(ValueError, match=r"d\.csv, row 2: 2 pairs of x are called 'a', so which of them is meant"):
        rows_about(pairs, table(tmp_path / "d.csv", "key", "b", "a"), "x")


def test_a_list_without_rows_drops_nothing(tmp_path):
    folder = write_pairs(tmp_path / "photos", 3)
    cli.main(["shards", str(folder), str(tmp_path / "out"), "--drop", str(table(tmp_path / "d.csv", "key,reason"))])
    assert captions(tmp_path / "out") == ["picture 0", "picture 1", "picture 2"]


@pytest.mark.parametrize(
    "lines, words",
    [
        (["name", "a"], ["no column 'key'", "'name'"]),
        (["key,reason", ",leak"], ["row 1", "no key"]),
        (["key", "a.png"], ["no row of", "a.png", "a pair of it is called '0000.png'"]),
        (["key,source", "0000.png,other"], ["is about other", "take the column 'source' out"]),
        (["key", *[f"{n:04d}.png" for n in range(3)]], ["all of the 3 pairs"]),
    ],
)
def test_a_list_of_no_use_is_refused_with_a_remedy(tmp_path, capsys, lines, words):
    folder, drop = write_pairs(tmp_path / "photos", 3), table(tmp_path / "drop.csv", *lines)
    message = fails(capsys, ["shards", str(folder), str(tmp_path / "out"), "--drop", str(drop)])
    assert all(word in message for word in words), message
    assert not list(tmp_path.glob("out*"))


def test_where_the_rest_of_a_list_is_of_no_use_the_number_that_it_drops_is_reported(tmp_path, capsys):
    folder = write_pairs(tmp_path / "photos", 3)
    (folder / "0002.png").write_bytes(b"no picture")
    drop = table(tmp_path / "drop.csv", "key,reason", "0000.png,tiny", "0001.png,tiny")
    message = fails(capsys, ["shards", str(folder), str(tmp_path / "out"), "--drop", str(drop)])
    assert "can be used, beside 2 that a list drops (tiny 2)" in message


def test_a_folder_of_doctors_in_place_of_its_table_is_refused_and_the_table_named(tmp_path, capsys):
    folder, checked = write_pairs(tmp_path / "photos", 1), tmp_path / "checked"
    checked.mkdir()
    assert "checked is a folder, and no table" in fails(capsys, ["shards", str(folder), "out", "--drop", str(checked)])
    table(checked / "drop.csv", "key")
    message = fails(capsys, ["shards", str(folder), "out", "--drop", str(checked)])
    assert f"is a folder; name one of its tables: {checked / 'drop.csv'}" in message


def test_a_list_that_is_not_there_or_is_for_an_index_is_refused(tmp_path, capsys):
    folder = write_pairs(tmp_path / "photos", 1)
    assert "no file nothing.csv" in fails(capsys, ["shards", str(folder), "out", "--drop", "nothing.csv"])
    assert "--drop is for packing" in fails(capsys, ["shards", str(folder), "--index-only", "--drop", "x"])


def test_groups_that_were_looked_for_in_train_alone_are_not_those_of_val(tmp_path):
    groups = table(tmp_path / "groups.csv", "key,group,source", "0000.png,0,one", "0001.png,0,one")
    table(tmp_path / "sources.csv", "part,source", "train,one", "train,two", "val,held_out")
    pairs = read_pairs(write_pairs(tmp_path / "photos", 3))
    assert rows_about(pairs, groups, "two", "group").rows == {}
    with pytest.raises(ValueError, match=r"groups\.csv is about one, not about held_out"):
        rows_about(pairs, groups, "held_out", "group")
    drop = table(tmp_path / "drop.csv", "key,source", "0000.png,one")
    assert rows_about(pairs, drop, "held_out").rows == {}  # of which there might have been rows
