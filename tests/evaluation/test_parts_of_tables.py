"""Which rows of a table are scored, where a column names the part of each."""

from __future__ import annotations

import base64
import json
import shutil
import warnings
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import write_picture
from PIL import Image

from miniclip.data.sources import read_pairs
from miniclip.evaluation.datasets.bare import bare_datasets, bare_table
from miniclip.evaluation.datasets.open import open_dataset, open_images


def write_table(root: Path, kind: str, parts: list[str], column: str = "split") -> Path:
    """A table of a picture for each part."""
    rows = [
        {"image": f"{n}.png", "label": "ab"[n % 2], "caption": f"text {n}", column: part}
        for n, part in enumerate(parts)
    ]
    for number in range(len(rows)):
        write_picture(root / f"{number}.png", number)
    source = root / "table" if kind.startswith("datasets") or kind == "folder" else root / f"t.{kind}"
    if kind == "base64.jsonl":
        for number, row in enumerate(rows):
            row["image"] = base64.b64encode((root / f"{number}.png").read_bytes()).decode()
    if kind == "csv":
        source.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]))
    elif kind.endswith("jsonl"):
        source.write_text("\n".join(map(json.dumps, rows)))
    elif kind in ("parquet", "folder"):
        cells = [{"bytes": (root / f"{n}.png").read_bytes(), "path": None} for n in range(len(rows))]
        source.mkdir() if kind == "folder" else None
        held = pa.Table.from_pylist([{**row, "image": cell} for row, cell in zip(rows, cells, strict=True)])
        pq.write_table(held, source / "a.parquet" if kind == "folder" else source)
    else:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        columns["image"] = [str(root / name) for name in columns["image"]]
        features = datasets.Features({name: datasets.Value("string") for name in columns} | {"image": datasets.Image()})
        saved = datasets.Dataset.from_dict(columns, features=features)
        (saved if kind == "datasets" else datasets.DatasetDict({"all": saved})).save_to_disk(source)
    return source


def rows_read(root: Path, source: Path, num_rows: int, split: str | None, task: str) -> list[int]:
    """The rows whose pictures a set opens, by their pixels."""
    label_column = "label" if task == "classification" else None
    data = open_dataset(source, split=split, task=task, label_column=label_column)
    row_of = {Image.open(root / f"{n}.png").convert("RGB").tobytes(): n for n in range(num_rows)}
    return [row_of[data.open(n).convert("RGB").tobytes()] for n in range(len(data))]


@pytest.mark.sample(12)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "folder", "datasets", "datasets in a mapping"])
@pytest.mark.parametrize("task", ["classification", "retrieval"])
@pytest.mark.parametrize(
    ("parts", "scored", "asked"),
    [
        ("train2017 val2017 train2017 val2017", [1, 3], {"val": [1, 3], "train": [0, 2], "validation": [1, 3]}),
        ("train holdout holdout train", [1, 2], {"Holdout": [1, 2], "train": [0, 3]}),
        ("Training Testing Training Testing", [1, 3], {"test": [1, 3], "Training": [0, 2]}),
        ("train val2014 test2015 test2015", [2, 3], {"val": [1]}),
        ("train dev extra dev", [1, 3], {"extra": [2]}),
        ("train train", [0, 1], {"train": [0, 1]}),
        ("Training PublicTest PrivateTest", "it has privatetest, publictest, training", {"PrivateTest": [2]}),
        ("train test2014 test2015", "it has test2014, test2015, train", {"test2014": [1]}),
        ("train trainval train", "it has train, trainval", {"trainval": [1]}),
        ("train  train", "it has blank cells, train", {"train": [0, 2]}),
        ("tr te tr", None, {"te": [1]}),
        ("0 1 2 1", None, {"1": [1, 3]}),
    ],
)  # fmt: skip
def test_rows_of_train_are_not_scored_where_there_are_others(tmp_path, kind, task, parts, scored, asked):
    parts = parts.split(" ")
    source = write_table(tmp_path, kind, parts)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if isinstance(scored, list):
            assert rows_read(tmp_path, source, len(parts), None, task) == scored
        elif scored is None:  # names that say nothing of what they are for
            assert rows_read(tmp_path, source, len(parts), None, task) == list(range(len(parts)))
            assert any("all rows are read. Its column 'split' has" in str(each.message) for each in caught)
        else:
            with pytest.raises(ValueError, match=f"has no split 'test'; {scored}"):
                open_dataset(source, task=task)
        for split, rows in asked.items():
            assert rows_read(tmp_path, source, len(parts), split, task) == rows
        with pytest.raises(ValueError, match="has no split 'tset'; it has "):
            open_dataset(source, task=task, split="tset")


@pytest.mark.parametrize("kind", ["csv", "base64.jsonl", "parquet", "folder", "datasets", "datasets in a mapping"])
def test_a_column_of_any_name_tells_the_parts_where_its_cells_hold_nothing_else(tmp_path, kind):
    source = write_table(tmp_path, kind, ["train", "valid", "train", "test"], column="data set")
    with pytest.warns(UserWarning, match=r"a row of another split \(train\): 2"):
        assert rows_read(tmp_path, source, 4, None, "classification") == [3]
    with pytest.warns(UserWarning, match="a row of another split"):
        assert rows_read(tmp_path, source, 4, "train", "retrieval") == [0, 2]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    "column, values",
    [
        ("is_train", ["True", "False", "True"]),
        ("is_valid", ["True", "False", "True"]),
        ("Is Test Image", ["True", "False", "True"]),
        ("phase", ["train", "", "test"]),
        ("phase", ["train", "test_seen", "test_unseen"]),
    ],
)
def test_a_column_that_may_tell_the_parts_and_is_not_followed_is_named(tmp_path, kind, column, values):
    source = write_table(tmp_path, kind, values, column=column)
    for task in ("classification", "retrieval"):
        with pytest.warns(UserWarning, match=f"all rows are read. Its column '{column}' is not followed"):
            assert rows_read(tmp_path, source, 3, None, task) == [0, 1, 2]
    assert f"all rows: column '{column}' is not followed" in read_pairs(source).found


def test_both_parts_for_testing_of_kaggles_competitions_are_asked_for_by_their_names(tmp_path):
    source = write_table(tmp_path, "csv", ["Training", "PublicTest", "PrivateTest"], column="Usage")
    with pytest.raises(ValueError, match="it has privatetest, publictest, training"):
        open_dataset(source)
    with pytest.warns(UserWarning, match="a row of another split"):
        assert rows_read(tmp_path, source, 3, "PrivateTest", "classification") == [2]
    assert [pair.captions for pair in read_pairs(source, split="test")] == [("text 1",), ("text 2",)]


@pytest.mark.parametrize("kind", ["datasets", "parquet"])
def test_where_names_tell_the_parts_a_column_may_say_where_rows_came_from(tmp_path, kind):
    source = write_table(tmp_path, "parquet", ["train", "val"], column="source")
    if kind == "datasets":
        rows = datasets.Dataset.from_parquet(str(source), cache_dir=str(tmp_path / "cache"))
        datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        for part in ("train", "test"):
            shutil.copy(source, tmp_path / "set" / f"{part}-00000-of-00001.parquet")
    for split in ("train", "test"):
        assert len(read_pairs(tmp_path / "set", split=split)) == 2
        assert len(open_dataset(tmp_path / "set", split=split, label_column="label")) == 2


@pytest.mark.parametrize("kind", ["csv", "base64.jsonl", "parquet", "folder", "datasets", "datasets in a mapping"])
@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_the_fingerprint_is_another_where_other_rows_are_read(tmp_path, kind, task):
    source = write_table(tmp_path, kind, ["train", "val", "train", "test", "val"])
    label_column = "label" if task == "classification" else None

    def fingerprint(split: str | None) -> str:
        return open_dataset(source, split=split, task=task, label_column=label_column).fingerprint()

    known = {split: fingerprint(split) for split in ("train", "val", "test")}
    assert len(set(known.values())) == 3
    assert [fingerprint(split) for split in known] == list(known.values())
    assert fingerprint(None) == known["test"] or kind.startswith("datasets")


def named_row(key: str) -> int:
    """The row that a key names, from 0; those of tables count from 1 as people do, those of pairs from 0."""
    table, _, number = key.rpartition("row ")
    return int(number) - bool(table)


@pytest.mark.parametrize("kind", ["base64.jsonl", "parquet", "folder", "datasets"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_key_names_the_row_that_is_read(tmp_path, kind, split):
    parts = ["train", "val", "train", "test", "val"]
    source = write_table(tmp_path, kind, parts)
    rows = [row for row, part in enumerate(parts) if part == split]
    sets = [
        open_dataset(source, split=split, label_column="label"),
        open_dataset(source, split=split, task="retrieval"),
    ]
    sets += bare_datasets(str(source), split=split) if kind == "datasets" else [bare_table(source, split=split)]
    for data in sets:
        assert [named_row(data.key(index)) for index in range(len(data))] == rows
    if kind != "datasets":
        assert [Path(data.key(0)).name for data in sets[::2]] == [f"{source.name}: row {rows[0] + 1}"] * 2


@pytest.mark.parametrize("kind", ["csv", "base64.jsonl"])
def test_a_row_without_a_label_is_named_as_the_table_has_it(tmp_path, kind):
    source = write_table(tmp_path, kind, ["train", "val", "train", "val"])
    source.write_text(
        source.read_text().replace(",b,text 3", ",,text 3").replace('"b", "caption": "text 3', '"", "caption": "text 3')
    )
    with pytest.raises(ValueError, match=r": row 4 .*has no label"):
        open_dataset(source, split="val")


def test_a_set_is_asked_for_by_its_name_beside_a_column_that_names_no_part(tmp_path):
    source = write_table(tmp_path, "csv", ["winter", "summer"])
    rows = {"image": [str(tmp_path / "0.png"), str(tmp_path / "1.png")], "label": ["a", "b"], "set": ["chess", "tea"]}
    features = datasets.Features({name: datasets.Value("string") for name in rows} | {"image": datasets.Image()})
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "set")
    assert len(open_dataset(tmp_path / "set", split="train", label_column="label")) == 2
    with pytest.raises(ValueError, match="has no split 'test'; it has summer, winter"):
        open_dataset(source, split="test")


def parquet_files(root: Path, **columns_of: dict[str, list[str]]) -> Path:
    root.mkdir(exist_ok=True)
    for stem, columns in columns_of.items():
        count = len(next(iter(columns.values())))
        images = [str(write_picture(root.parent / "pictures" / f"{stem}{n}.png", n)) for n in range(count)]
        pq.write_table(pa.table({"image": images, **columns}), root / f"{stem}.parquet")
    return root


def test_parquet_files_of_other_splits_are_not_opened(tmp_path):
    source = parquet_files(
        tmp_path / "set", test={"label": ["a", "b"], "note": ["x", "y"]}, train={"label": ["a"], "split": ["train"]}
    )
    for split in (None, "test", "testing"):
        assert [Path(image).name for image in open_dataset(source, split=split).images] == ["test0.png", "test1.png"]
    (source / "train.parquet").write_bytes(b"PAR1 and then nothing")
    assert len(open_dataset(source)) == len(open_images(source)) == 2
    with pytest.raises(ValueError, match=r"train\.parquet is no Parquet file, or a damaged one"):
        open_dataset(source, split="train")


@pytest.mark.parametrize("name", ["set/test-00000-of-00001.parquet", "set", "test.csv", "test/labels.csv"])
@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_a_column_of_other_things_does_not_hide_the_split_that_the_name_tells(tmp_path, name, task):
    columns = {"label": ["a", "b"], "caption": ["an a", "a b"], "set": ["chess", "tea"]}
    parquet_files(tmp_path / "set", **{"test-00000-of-00001": columns})
    source = tmp_path / name
    if source.suffix == ".csv":
        source.parent.mkdir(exist_ok=True)
        rows = zip(sorted(map(str, (tmp_path / "pictures").iterdir())), *columns.values(), strict=True)
        source.write_text("\n".join(["image,label,caption,set", *map(",".join, rows)]))
    with pytest.warns(UserWarning, match="all rows are read. Its column 'set' has chess, tea"):
        assert len(open_dataset(source, split="test", task=task)) == 2
    with pytest.warns(UserWarning, match="a row of another split"):
        assert len(open_dataset(source, split="tea", task=task)) == 1
    with pytest.raises(ValueError, match="no split 'val'; it has"):
        open_dataset(source, split="val", task=task)


def test_a_name_does_not_overrule_a_column_of_parts(tmp_path):
    source = write_table(tmp_path, "csv", ["train", "val"]).rename(tmp_path / "test.csv")
    with pytest.raises(ValueError, match="has no split 'test'; it has train, val"):
        open_dataset(source, split="test", label_column="label")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize(
    ("parts", "rows", "says"),
    [
        ("train  train", [1], "rows of blank are read, as its column 'split' has blank, train"),
        ("train test2014 test2015", [1, 2], "rows of test2014, test2015 are read"),
        ("train trainval", [0, 1], "all rows are read, as its column 'split' has train, trainval"),
        ("tr te", [0, 1], "all rows are read. .*none is known to be for testing$"),
    ],
)
def test_images_of_no_class_may_be_of_several_parts(tmp_path, kind, parts, rows, says):
    parts = parts.split(" ")
    source = write_table(tmp_path, kind, parts)
    with pytest.warns(UserWarning, match=says):
        data = open_images(source)
    row_of = {Image.open(tmp_path / f"{n}.png").convert("RGB").tobytes(): n for n in range(len(parts))}
    assert [row_of[data.open(n).convert("RGB").tobytes()] for n in range(len(data))] == rows
