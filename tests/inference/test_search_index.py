"""An index follows its sources, encodes nothing twice, survives a kill, and answers as brute force does."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import lancedb
import libraries
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import warm
from counting import Counting
from helpers import pack_folder, table, tiny_clip, write_pairs, write_picture
from PIL import Image
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

import miniclip
from miniclip.evaluation.encoder import from_object
from miniclip.inference.search.changes import Listing
from miniclip.inference.search.columns import as_columns
from miniclip.inference.search.index import Index, absolute_model
from miniclip.inference.search.nearest import near_duplicates, nearest
from miniclip.inference.search.store import Facts, Store, create_store, open_store, writing

OLD = 1_000_000_000  # a file that changed long ago


def write(folder: Path, names, first_seed: int = 0) -> Path:
    for seed, name in enumerate(names, start=first_seed):
        os.utime(write_picture(folder / name, seed), (OLD, OLD))
    return folder


@pytest.fixture
def photos(tmp_path):
    return write(tmp_path / "photos", [f"{day}/{number}.png" for day in ("mon", "tue") for number in range(6)])


@pytest.fixture
def counting():
    return Counting()


@pytest.fixture
def index(tmp_path, counting):
    return Index(tmp_path / "photos.index", from_object(counting, "counting"))


@pytest.fixture
def years(index, photos, tmp_path):
    """An index of six pictures, by a table with years from 2000 and cameras X, of odd years, and Y."""
    rows = [
        {"image": f"photos/mon/{n}.png", "year": 2000 + n, "camera": "X" if n % 2 else "Y", "fast": n < 3}
        for n in range(6)
    ]
    (tmp_path / "years.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index.update(tmp_path / "years.jsonl")


def test_an_index_among_its_pictures_does_not_report_its_own_files(photos, counting):
    (photos / "notes.pdf").write_bytes(b"%PDF")
    index = Index(photos / "an.index", from_object(counting, "counting"))
    for _ in range(2):
        updated = index.update(photos)
        assert [Path(each.source).name for each in updated.left_out] == ["notes.pdf"]
    assert counts(updated) == {"unchanged": 12}


def counts(updated) -> dict[str, int]:
    names = ("new", "changed", "moved", "touched", "gone", "unchanged")
    return {name: value for name in names if (value := getattr(updated, name))}


def check(index: Index, counting: Counting, folder: Path, pattern: str = "*.png") -> None:
    """The rows are those of the pictures below a folder, and each has the features of its picture."""
    table = index.store.read(["key", "features"])
    found = dict(zip(table["key"].to_pylist(), table["features"].to_pylist(), strict=True))
    assert sorted(found) == sorted(map(str, folder.rglob(pattern)))
    assert len(found) == table.num_rows
    for key, features in found.items():
        np.testing.assert_allclose(features, counting.of(key), atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Updates


def test_new_changed_moved_and_gone_pictures_are_found_and_the_new_and_changed_alone_are_encoded(
    index, photos, counting
):
    assert counts(index.update(photos)) == {"new": 12}
    assert counts(index.update(photos)) == {"unchanged": 12}
    write(photos, ["mon/0.png", "tue/new.png"], first_seed=50)
    os.utime(photos / "mon/0.png", (OLD + 5, OLD + 5))
    (photos / "mon/1.png").rename(photos / "moved.png")
    (photos / "mon/2.png").unlink()
    os.utime(photos / "mon/3.png", (OLD + 9, OLD + 9))
    counting.num_images = 0
    expected = {"new": 1, "changed": 1, "moved": 1, "touched": 1, "gone": 2, "unchanged": 8}
    assert counts(index.update(photos, dry_run=True)) == expected
    assert counting.num_images == 0
    assert counts(index.update(photos)) == expected
    assert counting.num_images == 2
    check(index, counting, photos)
    assert counts(index.update(photos)) == {"unchanged": 12}


def test_where_no_temporary_folder_can_be_made_nothing_is_written_and_the_variable_is_named(
    index, photos, tmp_path, monkeypatch
):
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TMPDIR", str(tmp_path / "away"))
        with pytest.raises(
            ValueError, match=r"photos\.index can't be written: no temporary .* in .*/away; set TMPDIR to"
        ):
            index.update(photos)
    assert counts(index.update(photos)) == {"new": 12}


def test_a_tenth_of_the_files_changed_is_a_tenth_encoded(index, tmp_path, counting):
    photos = write(tmp_path / "many", [f"{number:03d}.png" for number in range(100)])
    index.update(photos)
    for number in random.Random(0).sample(range(100), 10):
        write(photos, [f"{number:03d}.png"], first_seed=1000 + number)
        os.utime(photos / f"{number:03d}.png", (OLD + 1, OLD + 1))
    counting.num_images = 0
    assert counts(index.update(photos)) == {"changed": 10, "unchanged": 90}
    assert counting.num_images == 10
    check(index, counting, photos)


def test_swapped_files_and_a_renamed_folder_are_not_encoded_again(index, photos, counting):
    index.update(photos)
    a, b = photos / "mon/0.png", photos / "mon/1.png"
    a.rename(photos / "x")
    b.rename(a)
    (photos / "x").rename(b)
    os.utime(a, (OLD + 1, OLD + 1))
    os.utime(b, (OLD + 2, OLD + 2))
    (photos / "tue").rename(photos / "dienstag")
    counting.num_images = 0
    assert counts(index.update(photos)) == {"moved": 8, "gone": 6, "unchanged": 4}
    assert counting.num_images == 0
    check(index, counting, photos)


def test_a_source_that_got_another_name_is_known_by_the_new_one_alone(index, tmp_path, counting):
    """Equal pictures are each gone from where they were; of a copy both places stay."""
    photos = write(tmp_path / "before", [f"{number}.png" for number in range(4)])
    shutil.copy2(photos / "0.png", photos / "0 again.png")
    index.update(photos)
    photos.rename(tmp_path / "after")
    counting.num_images = 0
    assert counts(index.update(tmp_path / "after")) == {"moved": 5, "gone": 5}
    assert counting.num_images == 0
    check(index, counting, tmp_path / "after")

    shutil.copytree(tmp_path / "after", tmp_path / "copy")
    assert counts(index.update(tmp_path / "copy")) == {"moved": 5}
    check(index, counting, tmp_path)


def test_frames_of_one_size_and_time_that_were_renumbered_are_told_apart(index, tmp_path, counting):
    frames = write(tmp_path / "frames", [f"{number}.bmp" for number in range(5)])
    assert len({(path.stat().st_size, path.stat().st_mtime_ns) for path in frames.iterdir()}) == 1
    index.update(frames)
    (frames / "0.bmp").unlink()
    for number in range(1, 5):
        (frames / f"{number}.bmp").rename(frames / f"{number - 1}.bmp")
    counting.num_images = 0
    assert counts(index.update(frames)) == {"moved": 4, "gone": 1}
    assert counting.num_images == 0
    check(index, counting, frames, "*.bmp")


def test_a_file_changed_within_the_step_of_the_clock_is_noticed(index, photos):
    path = write_picture(photos / "now.bmp", 1)
    index.update(photos)
    facts = path.stat()
    write_picture(path, 2)  # of the same size
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert path.stat().st_size == facts.st_size
    assert index.update(photos).changed == 1


def test_what_is_not_mounted_does_not_empty_the_index(index, photos, tmp_path):
    index.update(photos)
    photos.rename(tmp_path / "away")
    with pytest.raises(ValueError, match=r"12 of 12 pictures .*photos are gone.*--accept-gone"):
        index.update(photos)
    photos.mkdir()
    with pytest.raises(ValueError, match=r"12 of 12 pictures .*--accept-gone"):
        index.update(photos)
    write(photos, ["mon/0.png"])
    with pytest.raises(ValueError, match=r"11 of 12 pictures .*--accept-gone"):
        index.update(photos)
    assert len(index) == 12
    assert counts(index.update(photos, accept_gone=True)) == {"touched": 1, "gone": 11}
    (photos / "mon/0.png").unlink()
    assert counts(index.update(photos, accept_gone=True)) == {"gone": 1}
    assert len(index) == 0


def test_each_source_answers_for_its_own_pictures(index, photos, tmp_path):
    other = write(tmp_path / "other", ["a.png", "b.png", "c.png"], first_seed=80)
    assert counts(index.update([photos, other])) == {"new": 15}
    (other / "a.png").unlink()
    assert counts(index.update(photos)) == {"unchanged": 12}
    (photos / "mon/5.png").unlink()
    assert counts(index.update(photos / "mon")) == {"gone": 1, "unchanged": 5}  # a folder answers for all below it
    single = write(tmp_path, ["single.png"], first_seed=90) / "single.png"
    assert counts(index.update(single)) == {"new": 1}
    assert counts(index.update(other / "b.png")) == {"unchanged": 1}  # a list of names need not be whole
    single.unlink()
    assert counts(index.update(other / "b.png", accept_gone=True)) == {"gone": 1, "unchanged": 1}
    assert len(index) == 11 + 3


def test_unreadable_pictures_are_named_and_a_picture_that_became_one_leaves_the_index(index, photos):
    (photos / "bad.jpg").write_bytes(b"no picture")
    updated = index.update(photos)
    assert (updated.new, len(updated.problems)) == (12, 1)
    assert "bad.jpg" in updated.problems[0]
    (photos / "mon/0.png").write_bytes(b"no longer")
    updated = index.update(photos)
    assert (updated.gone, len(updated.problems), len(index)) == (1, 2, 11)


def test_a_column_of_before_results_had_its_name_follows_its_table(index, photos, tmp_path, monkeypatch):
    table = tmp_path / "table.jsonl"

    def update(rank: int) -> None:
        table.write_text(json.dumps({"image": "photos/mon/0.png", "rank": rank}))
        index.update(table)

    with monkeypatch.context() as earlier:
        earlier.setattr("miniclip.inference.search.columns._allowed", lambda name: name)
        update(1)
    update(2)
    (hit,) = index.search("a")
    assert hit.metadata == {"rank": 2}


def test_a_table_brings_columns_whose_changes_cost_no_encoding(index, photos, tmp_path, counting):
    table = tmp_path / "table.jsonl"

    def write_table(year):
        rows = [
            {"image": f"photos/mon/{n}.png", "year": year + n, "camera": "X" if n % 2 else "it's", "key": f"k{n}"}
            for n in range(6)
        ]
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))

    write_table(2000)
    index.update(photos)
    counting.num_images = 0
    assert counts(index.update(table)) == {"touched": 6}
    write_table(2010)
    assert counts(index.update(table)) == {"touched": 6}
    assert counts(index.update([photos, table])) == {"unchanged": 12}
    assert counting.num_images == 0
    hits = index.search("a", where="year > 2012 AND camera = 'X'", topk=99)
    assert {(hit.metadata["year"], hit.metadata["given_key"]) for hit in hits} == {(2013, "k3"), (2015, "k5")}
    assert len(index.search("a", where="camera = 'it''s'")) == 3
    assert len(index.search("a", where="year IS NULL", topk=99)) == 6
    with pytest.raises(ValueError, match=r"'yeer > 3'.*yeer.*columns are key, path, .*year, camera"):
        index.search("a", where="yeer > 3")


@pytest.mark.parametrize(
    "rest",
    [
        " year > 2003",
        " banana",
        "; DROP TABLE images",
        ";",
        " ORDER BY year LIMIT 1",
        ") OR (year = 2001",
        " AS BOOLEAN) OR CAST(year = 2001",
        ", year > 2003",
        " AND regexp_match(camera, '^X') year > 2003",
        " -- of all\n year > 2003",
    ],
)
def test_a_filter_that_goes_on_behind_its_condition_is_refused(index, years, rest):
    with pytest.raises(ValueError, match="goes on behind a condition that is complete") as caught:
        index.search("a", where=f"camera = 'X'{rest}")
    assert repr(f"camera = 'X'{rest}") in str(caught.value)
    with pytest.raises(ValueError, match="goes on behind a condition"):
        index.near_duplicates(0.5, where=f"camera = 'X'{rest}")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("camera = 'X' AND year > 2001", {3, 5}),
        ("(camera = 'X') OR (year = 2000)", {0, 1, 3, 5}),
        ("year > 2001 -- and no older; one", {2, 3, 4, 5}),
        ("year /* not ( */ IN (2001, 2004)\n", {1, 4}),
        ("camera = 'it''s -- ) ; ('", set()),
        ("NOT camera = 'X' AND year BETWEEN 2001 AND 2004", {2, 4}),
        ("fast", {0, 1, 2}),
        ("NOT fast", {3, 4, 5}),
        ("regexp_match(camera, '^X') AND NOT regexp_match(camera, 's$')", {1, 3, 5}),
        ("camera", None),
        ("camera = (", None),
    ],
)
def test_a_filter_is_one_condition(index, years, where, expected):
    if expected is None:
        with pytest.raises(ValueError, match="can't be followed"):
            index.search("a", where=where)
    else:
        assert {hit.metadata["year"] - 2000 for hit in index.search("a", where=where, topk=99)} == expected


def test_a_wrong_filter_is_told_what_its_columns_hold_and_how_to_write_it(index, years):
    """The forms that an error proposes can be followed."""
    texts = "camera holds texts (write camera = 'a text', or TRY_CAST(camera AS DOUBLE) > 2020 to compare numbers)"
    truth, numbers = "fast holds true and false (write fast, or NOT fast)", "year holds numbers (write year = 2020)"
    for where, message in {
        "camera=2020": texts,
        "Camera IN (1, 2)": texts,
        "CAST(camera AS INT) = 1": texts,
        "fast = 'yes'": truth,
        "NOT year": numbers,
        "`year` = 'X' AND fast": f"{numbers}, and {truth}",
        "camera = X": "there is no column X; columns are key, path, ",
        "year = ": "it is no whole condition, as year = 2020 AND camera = 'X' is (",
        "year = 'X": "it is no whole condition, as year = 2020 AND camera = 'X' is (Unterminated string",
    }.items():
        with pytest.raises(ValueError, match=r"the filter .* can't be followed") as caught:
            index.search("a", where=where)
        assert repr(where) in str(caught.value)
        assert message in str(caught.value)
    for form in ("camera = 'a text'", "TRY_CAST(camera AS DOUBLE) > 2020", "fast", "NOT fast", "year = 2020"):
        index.search("a", where=form)


def facts_of(index: Index) -> dict[str, dict]:
    return {Path(row.pop("key")).stem: row for row in index.store.read(["key", "year", "a b"]).to_pylist()}


def test_an_equal_file_of_another_source_has_its_own_metadata(index, tmp_path, counting):
    """Features go by content; columns by name, also where a picture replaces another one's."""
    for name, year in (("one", 2001), ("two", 2002), ("three", None)):
        rows = {"a": 5, "b": 6}
        write(tmp_path / name, [f"{name} {each}.png" for each in rows], first_seed=5)
        lines = [
            {"image": f"{name}/{name} {each}.png", "a b": each} | ({"year": year + n} if year else {})
            for n, each in enumerate(rows)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert counts(index.update(tmp_path / "one.jsonl")) == {"new": 2}
    assert counts(index.update(tmp_path / "two.jsonl")) == {"moved": 2}
    assert counts(index.update(tmp_path / "three.jsonl")) == {"moved": 2}
    write(tmp_path / "plain", ["plain.png"], first_seed=5)
    assert counts(index.update(tmp_path / "plain")) == {"moved": 1}
    expected = {f"one {name}": (2001 + n, name) for n, name in enumerate("ab")}
    expected |= {f"two {name}": (2002 + n, name) for n, name in enumerate("ab")}
    expected |= {f"three {name}": (None, name) for name in "ab"} | {"plain": (None, None)}
    assert {key: (row["year"], row["a b"]) for key, row in facts_of(index).items()} == expected
    check(index, counting, tmp_path)


def test_of_a_parquet_file_an_index_has_the_columns_that_json_lines_of_its_rows_have(index, counting, photos, tmp_path):
    """But for bytes and for lists as long as embeddings, which are named."""
    rows = [
        {"image": "mon/0.png", "year": 1, "tags": ["é", "b"], "box": {"x": 1, "at": [0.5]}, "pairs": [["a"], []]},
        {"image": "mon/1.png", "year": None, "tags": [], "box": None, "pairs": None},
        {"image": "mon/2.png", "year": 2, "tags": None, "box": {"x": None, "at": []}, "pairs": [[None]]},
    ]
    (photos / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = pa.Table.from_pylist(rows)
    for name, values in (("digest", [b"\0"] * 3), ("digests", [[b"\0"]] * 3), ("vector", [[0.5] * 512] * 3)):
        columns = columns.append_column(name, [values])
    pq.write_table(columns, photos / "t.parquet")
    of_lines = Index(tmp_path / "lines.index", from_object(counting, "counting"))
    assert of_lines.update(photos / "t.jsonl").left_out == []
    assert [each.reason for each in index.update(photos / "t.parquet").left_out] == [
        "column 'digest', of bytes or of large texts",
        "column 'digests', of bytes or of large texts",
        "column 'vector', of lists of more than 1024 bytes",
    ]
    names = ["key", "year", "tags", "box", "pairs"]
    found, expected = (
        sorted(each.store.read(names).select(names).to_pylist(), key=lambda row: row["key"])
        for each in (index, of_lines)
    )
    assert found == expected
    assert [row["tags"] for row in found] == ['["é", "b"]', "[]", None]
    assert json.loads(found[0]["box"]) == {"x": 1, "at": [0.5]}
    (hit,) = index.search("a", where="tags LIKE '%\"b\"%'")
    assert hit.path == str(photos / "mon/0.png")
    assert counts(index.update(photos / "t.parquet")) == {"unchanged": 3}


def test_many_columns_cost_an_index_no_more_versions_than_few(photos, tmp_path, counting):
    versions = []
    for num_columns in (1, 30):
        row = {"image": "photos/mon/0.png", **{f"column {number}": number for number in range(num_columns)}}
        (tmp_path / "one.jsonl").write_text(json.dumps(row))
        index = Index(tmp_path / f"{num_columns}.index", from_object(counting, "counting"))
        index.update(tmp_path / "one.jsonl")
        assert len(index.store.columns_of(str(tmp_path / "one.jsonl"))) == num_columns
        versions.append(index.store.state[1])
    assert versions[0] == versions[1]


def test_a_column_that_a_table_no_longer_has_is_null_in_its_rows_alone(index, photos, tmp_path, counting):
    def update(name: str, day: str, **columns) -> dict[str, int]:
        rows = [{"image": f"photos/{day}/{n}.png", **columns} for n in range(6)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return counts(index.update(tmp_path / name))

    assert update("mon.jsonl", "mon", year=1, **{"a b": "x"}) == {"new": 6}
    index.update(photos)  # brings tue's
    assert update("tue.jsonl", "tue", year=2, **{"a b": "x"}) == {"touched": 6}
    assert update("marks.jsonl", "tue", mark=9) == {"touched": 6}  # another table about the same pictures
    counting.num_images = 0
    for name, day in (("mon.jsonl", "mon"), ("tue.jsonl", "tue")):
        assert update(name, day, year=3) == {"touched": 6}
        assert update(name, day, year=3) == {"unchanged": 6}
    assert counts(index.update(photos)) == {"unchanged": 12}
    rows = index.store.read(["year", "a b", "mark", "path"]).to_pylist()
    assert {(row["year"], row["a b"], row["mark"], "/tue/" in row["path"]) for row in rows} == {
        (3, None, None, False),
        (3, None, 9, True),
    }
    assert update("tue.jsonl", "tue") == {"touched": 6}
    assert index.search("a", where="year IS NULL AND mark = 9", topk=99)[0].metadata["year"] is None
    assert update("tue.jsonl", "tue", year=4) == {"touched": 6}
    assert len(index.search("a", where="year = 4 AND mark = 9", topk=99)) == 6
    assert counting.num_images == 0


@pytest.mark.parametrize(
    "order", [("photos", "years", "marks"), ("years", "photos", "marks"), ("marks", "years", "photos")]
)
def test_sources_that_share_pictures_each_say_what_they_know(index, photos, tmp_path, counting, order):
    """By the first of them that has a value."""
    years = [{"image": f"photos/mon/{n}.png", "year": 2000 + n if n else None} for n in range(6)]
    marks = [{"image": f"photos/mon/{n}.png", "mark": n, "year": 1} for n in range(3)]

    def update(marks):
        for name, rows in (("years", years), ("marks", marks)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources = {"photos": photos, "years": tmp_path / "years.jsonl", "marks": tmp_path / "marks.jsonl"}
        found = [counts(index.update([sources[each] for each in order])) for _ in range(2)]
        table = index.store.read(["key", "year", "mark"]).to_pylist()
        facts = {row["key"]: (row["year"], row["mark"]) for row in table if row["year"] or row["mark"] is not None}
        return found, {Path(key).relative_to(photos).as_posix(): value for key, value in facts.items()}

    is_first = order.index("marks") < order.index("years")
    found, facts = update(marks)
    assert found == [{"new": 12}, {"unchanged": 12}]
    of_years = {f"mon/{n}.png": (2000 + n, None) for n in range(3, 6)}
    of_both = {f"mon/{n}.png": (1 if is_first or not n else 2000 + n, n) for n in range(3)}
    assert facts == of_years | of_both
    found, facts = update([{"image": row["image"], "mark": row["mark"]} for row in marks])
    changed = 3 if is_first else 1
    assert found == [{"touched": changed, "unchanged": 12 - changed}, {"unchanged": 12}]
    assert facts == of_years | {f"mon/{n}.png": (2000 + n if n else None, n) for n in range(3)}
    check(index, counting, photos)


def test_a_second_table_may_share_no_picture_with_the_first(index, photos, tmp_path):
    for day, first in (("mon", 2000), ("tue", 2010)):
        rows = [{"image": f"photos/{day}/{n}.png", "year": first + n} for n in range(6)]
        (tmp_path / f"{day}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert counts(index.update(tmp_path / f"{day}.jsonl")) == {"new": 6}
    found = {hit.key: hit.metadata["year"] for hit in index.search("a", topk=99)}
    assert found == {
        str(photos / day / f"{n}.png"): y + n for day, y in (("mon", 2000), ("tue", 2010)) for n in range(6)
    }


DAY, NIGHT = date(2024, 1, 1), datetime(2024, 1, 1, 23, 30, 0, 5)
NANOSECOND = pa.array([1_704_110_400_123_456_789], pa.timestamp("ns"))  # 2024-01-01 12:00:00.123456789


@pytest.fixture
def columns_of(index, photos, tmp_path):
    """Updates the index by tables about other pictures each, of one value or a few; returns column n by picture."""

    def update(*tables) -> tuple[dict[str, int], list]:
        paths, first = [], 0
        for number, values in enumerate(tables):
            names = [str(photos / "mon" / f"{first + place}.png") for place in range(len(values))]
            paths.append(tmp_path / f"{number}.parquet")
            pq.write_table(pa.table({"image": names, "n": values}), paths[-1])
            first += len(values)
        found = counts(index.update(paths))
        return found, [
            row["n"] for row in sorted(index.store.read(["key", "n"]).to_pylist(), key=lambda row: row["key"])
        ]

    return update


@pytest.mark.parametrize(
    "before, after, num_touched",
    [
        ([0, 1], [0.75, 1], 1),
        ([0, None], [None, 2.5], 2),
        ([Decimal("1.25"), None], [Decimal("1000.5"), Decimal("0.125")], 2),
        ([1, 2], [Decimal("1.5"), 2], 1),
        ([DAY], [datetime(2024, 1, 2)], 1),
        ([NIGHT], NANOSECOND, 1),
        (["a"], [1.5], 1),
    ],
)
def test_a_tables_new_values_are_those_of_the_index(columns_of, before, after, num_touched):
    columns_of(before)
    found, values = columns_of(after)
    assert found["touched"] == num_touched
    in_index = {datetime(2024, 1, 2): date(2024, 1, 2)} | ({1.5: "1.5"} if before == ["a"] else {})
    of_table = after.to_pylist() if isinstance(after, pa.Array) else after
    assert values == [in_index.get(value, value) for value in of_table]
    assert columns_of(after)[0] == {"unchanged": len(after)}
    assert columns_of([None] * len(after))[1] == [None] * len(after)


@pytest.mark.parametrize(
    "before, after, message",
    [
        ([2**53 + 1, 1], [1.5, 1], "int64.*9007199254740993"),
        ([DAY], [NIGHT], "date32.*2024-01-01 23:30:00.000005 would be 2024-01-01"),
        ([NIGHT], [NIGHT.replace(tzinfo=UTC)], r"timestamp\[us\].*23:30:00.000005\+00:00 would be"),
        ([DAY], [5], "date32.*5 would be 1970-01-06"),
        ([Decimal("0.12345678901234567890")], [0.5], "decimal128.*double"),
    ],
)
def test_values_that_a_column_would_change_are_refused_before_anything_is_done(
    columns_of, index, before, after, message
):
    columns_of(before)
    state = index.store.state
    with pytest.raises(ValueError, match=rf"'n' of the index holds values of type {message}.*make a new index"):
        columns_of(after)
    assert index.store.state == state


@pytest.mark.parametrize("tables", [([1, 2], [0.75]), ([0.75, 1], [2]), ([1], [Decimal("0.5")], [Decimal("10.25")])])
def test_tables_of_one_command_agree_on_a_columns_type(columns_of, tables):
    assert columns_of(*tables) == ({"new": 3}, [value for values in tables for value in values])


def test_tables_of_one_command_that_do_not_agree_are_refused_before_anything_is_made(columns_of, index, counting):
    with pytest.raises(ValueError, match=r"'n' .*int64, and .*1.parquet has others: .*9007199254740993"):
        columns_of([2**53 + 1], [0.5])
    assert counting.num_images == 0
    assert not Path(index.location).exists()


def test_nanoseconds_and_times_among_days_stay_in_a_new_column(columns_of):
    assert [value.nanosecond for value in columns_of(NANOSECOND)[1]] == [789]
    (columns,) = as_columns([("a table", {"at": [DAY, NIGHT]})], None)
    assert columns["at"].to_pylist() == ["2024-01-01", "2024-01-01 23:30:00.000005"]


def test_a_column_that_a_killed_update_was_widening_is_widened_by_the_next(columns_of, index, monkeypatch):
    columns_of([1, 2])
    with monkeypatch.context() as killed:
        calls = iter([lambda *_: None, lambda *_: None])  # the third, behind the change of the type, is the kill
        killed.setattr(Store, "drop_spare", lambda *_: next(calls)())
        with pytest.raises(StopIteration):
            columns_of([0.5, 2])
    assert "_row_spare" in index.store.schema.names
    assert [hit.metadata["n"] for hit in index.search("a", where="n < 2")] == [1]
    assert {*index.search("a")[0].metadata} == {"n"}
    assert columns_of([0.5, 2]) == ({"touched": 1, "unchanged": 1}, [0.5, 2])
    assert "_row_spare" not in index.store.schema.names


def test_a_name_that_is_no_utf_8_is_found_as_it_is(index, tmp_path):
    folder = tmp_path / os.fsdecode(b"cl\xe9s")
    names = [os.fsdecode(b"caf\xe9.png"), r"caf\udce9.png", r"caf\u005cudce9.png", "back\\slash.png", "café.png"]
    write(folder, names)
    assert counts(index.update(folder)) == {"new": 5}
    assert counts(index.update(folder)) == {"unchanged": 5}
    for name in names:
        (hit,) = index.search(like=folder / name, topk=1)
        assert (hit.path, hit.key, hit.source) == (str(folder / name), str(folder / name), str(folder))
        assert index.open(hit).size == (24, 20)
    shutil.copytree(folder, tmp_path / "copy")
    assert counts(index.update(tmp_path / "copy")) == {"moved": 5}  # and what it was copied from is still there
    for name in names[1:]:
        (folder / name).unlink()
    assert counts(index.update(folder, accept_gone=True)) == {"gone": 4, "unchanged": 1}
    left = {hit.path for hit in index.search("a", topk=99)}
    assert left == {str(tmp_path / "copy" / name) for name in names} | {str(folder / names[0])}


def test_pictures_in_shards_are_known_by_their_place_and_compared_by_content(index, tmp_path, counting):
    shards = tmp_path / "shards"
    pack_folder(write_pairs(tmp_path / "pairs", 6), shards)
    assert counts(index.update(shards)) == {"new": 6}
    assert counts(index.update(shards)) == {"unchanged": 6}
    write_pairs(tmp_path / "pairs", 8)
    pack_folder(tmp_path / "pairs", shards, overwrite=True)
    counting.num_images = 0
    updated = index.update(shards)
    assert (updated.new, updated.gone, len(index)) == (2, 0, 8)
    assert counting.num_images == 2
    hit = index.search("a")[0]
    assert hit.path is None
    assert index.open(hit).size == (24, 20)


@pytest.fixture
def parts(tmp_path):
    """Shards of equal names, train and val; the picture of each sample by where it lies."""
    pictures = {}
    for part, count in (("train", 5), ("val", 4)):
        write(tmp_path / part, [f"{n}.png" for n in range(count)], first_seed=100 * count)
        lines = ["image,caption", *(f"{tmp_path / part}/{n}.png,a" for n in range(count))]
        pack_folder(table(tmp_path / f"{part}.csv", *lines), tmp_path / "shards" / part)
        tar = tmp_path / "shards" / part / "00000.tar"
        pictures |= {f"{tar}:{n:09d}": tmp_path / part / f"{n}.png" for n in range(count)}
    return pictures


@pytest.mark.parametrize(
    ("where", "num"),
    [
        ("path = '{}'", 1),
        ("(`path`) IN ('{}', 'path')", 1),
        ("PATH = '{}' -- path is the key", 1),
        ("key = '{}' AND \"path\" LIKE '%/train/%' /* path */", 1),
        ("path <> '{}'", 8),
        ("path IS NULL", 0),
        ("meta.path = 'of a structure' AND path = '{}'", 1),
        ("`Path` = 'mine' AND path = '{}'", 1),
        ("Path = 'mine' AND 'it''s path' = 'it''s path'", 9),
    ],
)
def test_a_filter_finds_a_picture_of_shards_by_the_path_that_results_show(index, parts, tmp_path, where, num):
    for name in ("train", "val"):
        index.update(tmp_path / "shards" / name)
    table = lancedb.connect(str(index.location)).open_table("images")
    table.add_columns({"Path": "'mine'"} if "mine" in where else {"other": "'mine'"})
    table.add_columns({"meta": "named_struct('path', 'of a structure')"})
    key = next(key for key in sorted(parts) if "/train/" in key)
    found = [hit.key for hit in index.search("a", where=where.format(key), topk=99)]
    assert len(found) == num
    assert (key in found) == (num in (1, 9))


def check_parts(index: Index, counting: Counting, pictures: dict[str, Path]) -> None:
    """Each sample has a row, with the features of its picture, and a hit that opens as that picture."""
    rows = index.store.read(["key", "features"]).to_pylist()
    assert sorted(row["key"] for row in rows) == sorted(pictures)
    for row in rows:
        np.testing.assert_allclose(row["features"], counting.of(pictures[row["key"]]), atol=1e-6)
    for hit in index.search("a", topk=99):
        assert np.array_equal(np.asarray(index.open(hit)), np.asarray(Image.open(pictures[hit.key])))
        assert Path(hit.key.partition(".tar:")[0] + ".tar").is_file()


@pytest.mark.parametrize(
    "sources",
    [["shards/train", "shards/val"], ["shards/*/*.tar"], ["shards"], ["shards/val/00000.tar", "shards/train"]],
    ids=str,
)
@pytest.mark.parametrize("is_one_by_one", [True, False])
def test_tars_of_one_name_in_several_folders_are_indexed_each_with_its_own_pictures(
    index, counting, parts, tmp_path, sources, is_one_by_one, monkeypatch
):
    monkeypatch.chdir(tmp_path / "train")
    named = [f"../{source}" for source in sources]
    for several in [[each] for each in named] if is_one_by_one else [named]:
        assert index.update(several).left_out == []
    check_parts(index, counting, parts)
    assert counts(index.update(named)) == {"unchanged": 9}


def rename_rows(index: Index, where: str, **values: str) -> None:
    """Leaves rows as an earlier version wrote them: without the folder of the tar in their keys."""
    lancedb.connect(str(index.location)).open_table("images").update(where=where, values_sql=values)


def test_an_index_that_knows_samples_without_the_folder_of_their_tar_is_opened_and_updated(
    index, counting, parts, tmp_path
):
    shards = tmp_path / "shards"
    index.update(shards / "train")
    rename_rows(index, "true", key="replace(key, '/shards/train/', '/shards/')")
    index = Index(index.location, from_object(counting, "counting"))
    hits = index.search("a", topk=99)
    assert {hit.key for hit in hits} == {f"{shards}/00000.tar:{n:09d}" for n in range(5)}
    for hit in hits:
        picture = tmp_path / "train" / f"{int(hit.key[-9:])}.png"
        assert np.array_equal(np.asarray(index.open(hit)), np.asarray(Image.open(picture)))
        assert not index.has_changed(hit)
    counting.num_images = 0
    renamed = f"5 pictures have another key: {shards}/00000.tar:000000000 is {shards}/train/00000.tar:000000000"
    for is_dry in (True, False):
        updated = index.update([shards / "train", shards / "val"], dry_run=is_dry)
        assert (counts(updated), updated.renamed[-1]) == ({"new": 4, "touched": 5}, renamed)
    assert counting.num_images == 4
    check_parts(index, counting, parts)
    updated = index.update([shards / "train", shards / "val"])
    assert (counts(updated), "another key" in str(updated.renamed)) == ({"unchanged": 9}, False)


def test_rows_that_got_the_pictures_of_another_folder_open_as_none_and_are_encoded_anew(
    index, counting, parts, tmp_path
):
    """Earlier versions kept the source of a row whose tar had the name of another folder's."""
    shards = tmp_path / "shards"
    index.update(shards / "val")
    train = f"'{shards / 'train'}'"
    rename_rows(index, "true", key="replace(key, '/shards/val/', '/shards/')", source=train)
    index = Index(index.location, from_object(counting, "counting"))
    for hit in index.search("a", topk=99):
        with pytest.raises(ValueError, match=r"was indexed by an earlier version, and is another picture in .*train"):
            index.open(hit)
    assert counts(index.update([shards / "train", shards / "val"])) == {"new": 5, "changed": 4}
    check_parts(index, counting, parts)


@pytest.mark.parametrize("before", ["", ".", ".."])
def test_a_folder_of_parquet_files_is_one_source_wherever_it_is_named_from(
    index, counting, photos, tmp_path, monkeypatch, before
):
    """Earlier versions called its rows by how it was named from within: "" is what they took as the name of "."."""
    folder = tmp_path / "tables/pq"
    (folder / "within").mkdir(parents=True)
    pictures = sorted(photos.glob("*/*.png"))
    pq.write_table(pa.table({"image": [path.read_bytes() for path in pictures]}), folder / "t.parquet")
    expected = {f"{folder}: row {n}": path for n, path in enumerate(pictures, 1)}
    monkeypatch.chdir(folder)
    assert counts(index.update(".")) == {"new": 12}
    rename_rows(index, "true", key=f"replace(key, '/pq: row', '/{before}: row')")
    index = Index(index.location, from_object(counting, "counting"))
    calls = []
    keys_before = Listing.keys_before
    monkeypatch.setattr(Listing, "keys_before", lambda *given: calls.append(given) or keys_before(*given))
    for hit in index.search("a", topk=99):
        picture = pictures[int(hit.key.rpartition(" ")[2]) - 1]
        assert np.array_equal(np.asarray(index.open(hit)), np.asarray(Image.open(picture)))
    assert len(calls) == 12  # once for a picture, and not for each hit
    counting.num_images = 0
    updated = index.update(".")
    assert (counts(updated), len(updated.renamed)) == ({"touched": 12}, 1)
    assert {row["key"] for row in index.store.read(["key"]).to_pylist()} == {*expected}
    for here, name in ((tmp_path, "tables/pq"), (folder, "../pq"), (folder / "within", ".."), (folder, str(folder))):
        monkeypatch.chdir(here)
        assert counts(index.update(name)) == {"unchanged": 12}
    assert counting.num_images == 0
    for hit in index.search("a", topk=99):
        assert np.array_equal(np.asarray(index.open(hit)), np.asarray(Image.open(expected[hit.key])))


def test_what_a_source_has_twice_is_one_picture_and_named(index, photos, tmp_path):
    names = ["mon/0.png", "mon/1.png", "mon/0.png"]
    pq.write_table(pa.table({"image": names}), photos / "t.parquet")
    updated = index.update(photos / "t.parquet")
    assert counts(updated) == {"new": 2}
    assert [(each.source, each.reason) for each in updated.left_out] == [
        (str(photos / "mon/0.png"), "named more than once")
    ]


def test_samples_of_one_key_in_a_tar_are_pictures_each(index, counting, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for path in (pictures := [write_picture(tmp_path / f"{n}.png", n) for n in range(2)]):
            tar.add(path, "a.png")
    assert counts(index.update(tmp_path / "0.tar")) == {"new": 2}
    tar = tmp_path / "0.tar"
    check_parts(index, counting, dict(zip([f"{tar}:a", f"{tar}:a (2)"], pictures, strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# Kills, and other processes

UPDATE = """
import sys
sys.path[:0] = [sys.argv[3]]
from contextlib import contextmanager
from counting import Counting
from miniclip.evaluation.encoder import from_object
from miniclip.inference.search.index import Index
@contextmanager
def progress(what, total):
    yield lambda done: print(done, flush=True)
print("ready", flush=True)
Index(sys.argv[1], from_object(Counting(), "counting")).update(
    sys.argv[2], batch_size=4, rows_per_commit=8, progress=progress, accept_gone=True)
"""


def num_files(folder: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(folder))


def killed_update(location: Path, photos: Path, moment: random.Random) -> str:
    """Runs an update in a process, and kills it when it has encoded or written so much, as drawn."""
    command = [sys.executable, "-c", UPDATE, str(location), str(photos), str(Path(__file__).parent)]
    with warm.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        if moment.random() < 0.5:
            for _ in range(wanted := moment.randrange(1, 6)):
                process.stdout.readline()
            what = f"{wanted} batches"
        else:
            wanted = moment.randrange(1, 12)
            before = num_files(location)
            while num_files(location) < before + wanted and process.poll() is None:
                pass
            what = f"{wanted} files"
        process.send_signal(signal.SIGKILL)
        process.stdout.read()
        process.wait()
    return f"{what}, status {process.returncode}"


@pytest.mark.parametrize("num_kills", [2, pytest.param(10, marks=pytest.mark.long)])
def test_an_index_killed_while_it_updates_opens_and_is_right(index, tmp_path, counting, num_kills):
    photos = write(tmp_path / "many", [f"{number:03d}.png" for number in range(60)])
    moment = random.Random(17)
    states = []
    for kill in range(1, num_kills + 1):
        states.append(killed_update(Path(index.location), photos, moment))
        check_rows(index.location, counting)
        for number in moment.sample(range(60), 20):  # changes for the next one
            write(photos, [f"{number:03d}.png"], first_seed=1000 * kill + number)
            os.utime(photos / f"{number:03d}.png", (OLD + kill, OLD + kill))
    assert any("status -9" in state for state in states), states
    index.update(photos)
    check(index, counting, photos)


def check_rows(location: str, counting: Counting) -> None:
    """An index opens, answers, and has the features of each picture that is as it was."""
    opened = Index(location, from_object(Counting(), "counting"))
    if not len(opened):  # killed before its first commit
        return
    table = opened.store.read(["key", "stamp", "features"])
    assert len(set(table["key"].to_pylist())) == table.num_rows
    for key, stamp, features in zip(*(table[name].to_pylist() for name in ("key", "stamp", "features")), strict=True):
        facts = Path(key).stat()
        if stamp == f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns}":
            np.testing.assert_allclose(features, counting.of(key), atol=1e-6)
    assert len(opened.search("a picture", topk=99)) == table.num_rows


def test_of_two_writers_one_is_refused_in_a_sentence(index, photos):
    index.update(photos)
    with writing(index.location), pytest.raises(ValueError, match=r"another process is updating .*photos\.index"):
        index.update(photos)
    assert counts(index.update(photos)) == {"unchanged": 12}


def test_a_reader_goes_on_while_old_versions_are_deleted(index, photos):
    index.update(photos)
    reader = Index(index.location, index.encoder, memory_bytes=0)
    assert len(reader.search("a", topk=99)) == 12
    for number in range(40):
        write(photos, [f"more/{number}.png"], first_seed=200 + number)
        index.update(photos)
    assert len(list(Path(index.location).glob("images.lance/_versions/*.manifest"))) < 40
    assert len(reader.search("a", topk=99)) == 52


def without_id(location: Path) -> None:
    """Makes an index as it was before tables had ids, at the same place and of as many versions."""
    import lancedb

    rows = lancedb.connect(location).open_table("images").to_arrow()
    facts = {name: value for name, value in rows.schema.metadata.items() if name != b"miniclip:id"}
    shutil.rmtree(location)
    table = lancedb.connect(location).create_table("images", schema=rows.schema.with_metadata(facts))
    table.add(rows)


@pytest.mark.sample(1)
@pytest.mark.parametrize("num_updates", [1, 3, 35])  # by which the old tables get cleaned
@pytest.mark.parametrize("num_anew", [1, 2])
def test_an_open_index_follows_one_that_is_made_anew_after_it_was_updated(
    index, tmp_path, counting, num_updates, num_anew
):
    """The new one's versions have lower numbers."""
    first, second = write(tmp_path / "first", ["a.png", "b.png"]), write(tmp_path / "second", ["c.png", "d.png"], 9)
    reader = Index(index.location, index.encoder)
    for number in range(num_updates):
        write(first, [f"{number}.png"], 20 + number)
        index.update(first)
        reader.search("a")
    shutil.rmtree(index.location)
    for each in [second, write(tmp_path / "third", ["e.png"], 30)][:num_anew]:
        Index(index.location, index.encoder).update(each)
        expected = {row["key"] for row in open_store(index.location).read(["key"]).to_pylist()}
        assert {hit.path for hit in reader.search("a", topk=99)} == expected


def test_a_search_looks_at_the_versions_of_an_old_index_once(index, photos, monkeypatch):
    index.update(photos)
    without_id(Path(index.location))
    reader = Index(index.location, index.encoder)
    looks = []
    table = type(reader.store._table)
    monkeypatch.setattr(table, "list_versions", lambda self, look=table.list_versions: looks.append(1) or look(self))
    reader.search("a")
    looks.clear()
    assert len(reader.search("a", topk=99)) == 12
    assert len(looks) == 1


@pytest.mark.parametrize("has_id", [True, False])
def test_an_open_index_follows_one_that_is_made_anew_at_its_place(index, tmp_path, counting, has_id):
    first, second = write(tmp_path / "first", ["a.png", "b.png"]), write(tmp_path / "second", ["c.png", "d.png"], 9)
    location = Path(index.location)

    def made_anew(photos: Path) -> None:
        shutil.rmtree(location, ignore_errors=True)
        Index(location, index.encoder).update(photos)
        if not has_id:
            without_id(location)

    made_anew(first)
    reader = Index(location, index.encoder)
    query = counting.of(first / "a.png")
    assert [Path(hit.path).name for hit in reader.search(like=first / "a.png", topk=1)] == ["a.png"]
    version = reader.store.state[1]
    made_anew(second)
    expected = {str(path): float(query @ counting.of(path)) for path in second.iterdir()}
    found = {hit.path: hit.cosine for hit in reader.search(like=first / "a.png")}
    assert reader.store.state[1] == version
    assert found == pytest.approx(expected, abs=1e-6)
    shutil.rmtree(location)
    with pytest.raises(ValueError, match=r"no index at .*photos\.index"):
        reader.search("a")


def test_an_index_that_is_made_anew_by_another_model_is_searched_with_that_or_refused(tmp_path, photos):
    for name, seed in (("first", 0), ("other", 1)):
        miniclip.save(tiny_clip(seed), tmp_path / name)
    location = tmp_path / "an.index"
    Index(location, str(tmp_path / "first"), device="cpu").update(photos)
    named, open_one = Index(location, str(tmp_path / "first"), device="cpu"), Index(location, device="cpu")
    before = [hit.cosine for hit in open_one.search("a", topk=12)]
    assert [hit.cosine for hit in named.search("a", topk=12)] == before
    shutil.rmtree(location)
    Index(location, str(tmp_path / "other"), device="cpu").update(photos)
    expected = Index(location, str(tmp_path / "other"), device="cpu").search("a", topk=12)
    assert [hit.cosine for hit in expected] != before
    assert open_one.search("a", topk=12) == expected
    for _ in range(2):
        with pytest.raises(ValueError, match="made with another model"):
            named.search("a")
    with pytest.raises(ValueError, match="made with another model"):
        named.update(photos)


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", ["ours", "openclip", "openai", "hf_clip", "hf_siglip"])
def test_answers_are_those_of_brute_force_on_the_librarys_own_features(kind, tmp_path):
    library = getattr(libraries, kind)(tmp_path)
    photos = write(tmp_path / "photos", [f"{number:02d}.png" for number in range(20)])
    paths = sorted(photos.glob("*.png"))
    index = Index(tmp_path / "photos.index", library.name, device="cpu")
    index.update(photos)
    of_images = library.of_images(paths)
    of_texts = library.of_texts(["a picture of a cat", "two dog", "red"])
    queries = [of_texts[0], of_texts[0] + of_images[3] - of_texts[1] - of_images[5], of_images[3] + of_images[4]]
    found = [
        index.search("a picture of a cat", topk=20),
        index.search("a picture of a cat", like=paths[3], minus="two dog", unlike=paths[5], topk=20),
        Index(index.location).search(like=[str(paths[3]), paths[4]], topk=20),
    ]
    for query, hits in zip(queries, found, strict=True):
        cosines = of_images @ (query / np.linalg.norm(query))
        by_path = {str(path): cosine for path, cosine in zip(paths, cosines, strict=True)}
        np.testing.assert_allclose([hit.cosine for hit in hits], np.sort(cosines)[::-1], atol=2e-5)
        np.testing.assert_allclose([hit.cosine for hit in hits], [by_path[hit.path] for hit in hits], atol=2e-5)


def unit(rows: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def blocks(features: np.ndarray, size: int = 333):
    ids = 3 * np.arange(len(features), dtype=np.uint64)
    for start in range(0, len(features), size):
        yield ids[start : start + size], torch.from_numpy(features[start : start + size])


@pytest.mark.parametrize("num_queries, k", [(1, 1), (1, 10), (7, 10), (300, 3), (2, 5000)])
def test_the_nearest_are_those_of_faiss(num_queries, k):
    import faiss

    features, queries = unit(2000), unit(num_queries, seed=1)
    flat = faiss.IndexFlatIP(16)
    flat.add(features)
    cosines, _ = flat.search(queries, min(k, 2000))
    ids, found = nearest(blocks(features), torch.from_numpy(queries), k)
    np.testing.assert_allclose(found, cosines, atol=1e-6)
    by_id = (queries[:, None] * features[ids // 3]).sum(axis=2)
    np.testing.assert_allclose(by_id, cosines, atol=1e-6)


@pytest.mark.parametrize("cosine", [0.6, 0.7, 0.85, 0.99])
def test_near_duplicates_are_the_connected_components(cosine):
    features = unit(5000)
    features[700:720] = features[3]
    products = features @ features.T
    np.fill_diagonal(products, -1)
    _, component = connected_components(csr_matrix(products >= cosine))
    members = np.flatnonzero(products.max(axis=1) >= cosine)
    expected = {frozenset(members[component[members] == number]) for number in set(component[members])}
    found = near_duplicates(lambda: blocks(features), cosine)
    groups = {frozenset(found.ids[found.group == number].astype(int) // 3) for number in set(found.group.tolist())}
    assert groups == expected
    np.testing.assert_allclose(found.cosine, products.max(axis=1)[found.ids.astype(int) // 3], atol=1e-6)


def test_copies_come_in_the_order_of_their_paths(index, tmp_path):
    photos = tmp_path / "copies"
    for name in ("c", "a", "d", "b"):
        write(photos, [f"{name}.png"], first_seed=7)
    index.update(photos)
    assert [Path(hit.path).stem for hit in index.search(like=photos / "d.png", topk=3)] == ["a", "b", "c"]
    assert [[Path(hit.path).stem for hit in group] for group in index.near_duplicates(0.999)] == [["a", "b", "c", "d"]]


@pytest.mark.parametrize("is_approximate", [False, True])
def test_any_number_of_equal_cosines_come_in_the_order_of_their_keys(index, photos, counting, is_approximate):
    """Of 2,000 copies, each with a key that comes before those that were indexed earlier."""
    index.update(photos)
    picture, other = str(photos / "mon/0.png"), str(photos / "tue/5.png")
    keys = [f"/nowhere/{9999 - number}.png" for number in range(2000)]
    columns = dict.fromkeys(("path", "source", "stamp", "content"), ["x"] * len(keys))
    copies = index.store.as_features(np.tile(counting.of(picture), (len(keys), 1)).astype(np.float32))
    index.store.put(pa.table({"key": keys, **columns, "features": copies}, schema=index.store.schema.remove_metadata()))
    if is_approximate:
        index.build_approximate(0.9)
    every = {str(path): counting.of(str(path)) for path in photos.rglob("*.png")} | dict.fromkeys(
        keys, counting.of(picture)
    )
    for like in (picture, other):
        query = counting.of(like)
        order = sorted(every, key=lambda key: (-round(float(every[key] @ query), 5), key))
        for how in ({}, {"where": "key LIKE '%.png'"}, {"exact": True}):
            for topk in (1, 20, 700):
                assert [hit.key for hit in index.search(like=like, topk=topk, **how)] == order[:topk]


def test_features_read_from_the_disk_answer_as_those_in_memory(index, photos, counting):
    index.update(photos)
    small = Index(index.location, index.encoder, memory_bytes=0)
    for options in ({}, {"where": "path LIKE '%/tue/%'"}, {"where": "path LIKE '%nothing%'"}):
        assert small.search("word", topk=5, **options) == index.search("word", topk=5, **options)
        assert small.near_duplicates(0.2, **options) == index.near_duplicates(0.2, **options)


def test_half_precision_takes_half_the_room_and_answers_alike(tmp_path, photos, counting, index):
    index.update(photos)
    half = Index(tmp_path / "half.index", index.encoder)
    half.update(photos, dtype="float16")
    assert half.store.schema.field("features").type.value_type == pa.float16()
    a, b = (each.search("some words", topk=12) for each in (half, index))
    np.testing.assert_allclose([hit.cosine for hit in a], [hit.cosine for hit in b], atol=2e-3)


def test_queries_that_mean_nothing_are_refused(index, photos, tmp_path):
    index.update(photos)
    (tmp_path / "bad.jpg").write_bytes(b"no")
    for options, message in (
        ({}, "nothing is asked for"),
        ({"texts": []}, "nothing is asked for"),
        ({"texts": "  "}, "a query is empty"),
        ({"texts": "a", "minus": "a"}, "cancel each other"),
        ({"texts": "a", "topk": 0}, "topk is 0"),
        ({"texts": "a", "where": " "}, "the filter is empty; columns are key"),
        ({"texts": "a", "where": 'path = "x"'}, "columns are key.*; texts stand in single quotes"),
        ({"like": tmp_path / "nowhere.jpg"}, "nowhere.jpg"),
        ({"like": tmp_path / "bad.jpg"}, "a picture of like can't be read.*bad.jpg"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(**options)
    with pytest.raises(ValueError, match=r"cosine of at least 1\.5.*above -1 and at most 1"):
        index.near_duplicates(1.5)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """An index of three thousand random features, and these; every hundredth picture is red, and all have a number."""
    features, folder = unit(3000, 32), tmp_path_factory.mktemp("many")
    model = tiny_clip(embed_dim=32)
    miniclip.save(model, folder / "model")
    encoder = Index(folder / "an.index", str(folder / "model"), device="cpu").encoder
    facts = Facts(str(folder / "model"), encoder.image_fingerprint(), encoder.text_fingerprint(), "")
    store = create_store(folder / "an.index", facts, 32)
    store.add_columns([pa.field("number", pa.int64()), pa.field("colour", pa.string())])
    keys = [f"/nowhere/{number:05d}.png" for number in range(3000)]
    same = {"path": keys, "source": ["s"] * 3000, "stamp": keys, "content": keys}
    known = {"number": list(range(3000)), "colour": ["red" if n % 100 == 7 else "blue" for n in range(3000)]}
    rows = {"key": keys, **same, "features": store.as_features(features), **known}
    store.put(pa.table(rows, schema=store.schema.remove_metadata()))
    return Index(folder / "an.index", device="cpu"), features


def test_an_approximate_index_reaches_the_recall_that_it_reports(many):
    index, _ = many
    measured = index.build_approximate(0.9)
    assert set(measured.recall) == {"pictures", "texts"}
    assert min(measured.recall.values()) >= 0.9
    assert "recall@10 against exact" in str(index.store.approximate)
    approximate = index.search("a photo of a cat", topk=10)
    exact = index.search("a photo of a cat", topk=10, exact=True)
    shared = {hit.key for hit in approximate} & {hit.key for hit in exact}
    assert len(shared) >= 5
    by_key = {hit.key: hit.cosine for hit in exact}
    found = [(hit.cosine, by_key[hit.key]) for hit in approximate if hit.key in by_key]
    np.testing.assert_allclose(*zip(*found, strict=True), atol=1e-5)


@pytest.mark.parametrize("topk", [10, 1500, 5000])
@pytest.mark.parametrize("where", [None, "colour = 'red'", "number < 5", "number = 777", "colour = 'green'"])
def test_an_approximate_index_leaves_out_nothing_that_was_asked_for(many, where, topk):
    """As many hits as there are, and with a filter those of brute force: the codes' recall was measured without."""
    index, features = many
    if index.store.approximate is None or index.store.approximate.nprobes > 1:
        assert index.build_approximate(0.01).nprobes == 1
    accepts = {None: lambda n: True, "colour = 'red'": lambda n: n % 100 == 7, "number < 5": lambda n: n < 5,
               "number = 777": lambda n: n == 777, "colour = 'green'": lambda n: False}[where]  # fmt: skip
    numbers = [number for number in range(3000) if accepts(number)]
    texts = ["a photo of a cat", "a red circle"]
    for text, hits in zip(texts, index.search(texts, topk=topk, where=where), strict=True):
        cosines = features[numbers] @ index.queries([text], (), (), ())[0].numpy()
        assert len(hits) == min(topk, len(numbers))
        if where is not None or topk >= 3000:
            order = np.argsort(-cosines)[:topk]
            assert {hit.metadata["number"] for hit in hits} == {numbers[place] for place in order}
            np.testing.assert_allclose([hit.cosine for hit in hits], cosines[order], atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Models and places


def test_another_model_is_refused_and_the_same_at_another_place_is_not(tmp_path, photos):
    for name, seed in (("first", 0), ("other", 1), ("copy", 0)):
        miniclip.save(tiny_clip(seed), tmp_path / name)
    Index(tmp_path / "an.index", str(tmp_path / "first"), device="cpu").update(photos)
    with pytest.raises(ValueError, match=r"made with another model \(.*first\): .*other has another image tower"):
        Index(tmp_path / "an.index", str(tmp_path / "other"), device="cpu").search("a")
    write(photos, ["one.png"], first_seed=99)
    with pytest.raises(ValueError, match="made with another model"):
        Index(tmp_path / "an.index", str(tmp_path / "other"), device="cpu").update(photos)
    index = Index(tmp_path / "an.index", str(tmp_path / "copy"), device="cpu")
    updated = replace(index.encoder, library="miniclip of another day")  # another fingerprint, the same features
    assert updated.image_fingerprint() != index.store.facts.image_fingerprint
    assert len(Index(tmp_path / "an.index", updated).search("a", topk=3)) == 3
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"first.*if that lies elsewhere now, name its model"):
        Index(tmp_path / "an.index", device="cpu").search("a")
    assert len(Index(tmp_path / "an.index", str(tmp_path / "copy"), device="cpu").search("a", topk=3)) == 3


def test_a_model_is_remembered_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "own.py").write_text("")
    assert absolute_model("model") == str(tmp_path / "model")
    assert absolute_model("transformers:model") == f"transformers:{tmp_path}/model"
    assert absolute_model("openclip:local-dir:model") == f"openclip:local-dir:{tmp_path}/model"
    assert absolute_model("openclip:ViT-B-32/own.py") == f"openclip:ViT-B-32/{tmp_path}/own.py"
    assert absolute_model("python:own.py:make") == f"python:{tmp_path}/own.py:make"
    assert [absolute_model(name) for name in ("ViT-B/32", "hf-hub:a/b")] == ["ViT-B/32", "hf-hub:a/b"]


def test_what_is_no_index_is_refused_and_left_alone(tmp_path, photos, counting):
    model = from_object(counting, "counting")
    with pytest.raises(ValueError, match=r"no index at .*nowhere"):
        Index(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"photos is there and is no index"):
        Index(photos, model)
    with pytest.raises(ValueError, match="nowhere"):
        Index(tmp_path / "new.index", model).update(tmp_path / "nowhere")
    assert not (tmp_path / "new.index").exists()
    import lancedb

    lancedb.connect(tmp_path / "db").create_table("images", pa.table({"a": [1]}))
    with pytest.raises(ValueError, match="not one that `miniclip index` wrote"):
        open_store(tmp_path / "db")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, path.stat().st_size // 2)])
@pytest.mark.parametrize("folder", ["data", "_versions"])
def test_a_damaged_index_is_named_with_what_helps(index, years, damage, folder):
    opened = Index(index.location, index.encoder)  # features are not read yet
    for path in (Path(index.location) / "images.lance" / folder).iterdir():
        damage(path)
    asks = [
        lambda: Index(index.location, index.encoder).search("a"),
        lambda: Index(index.location, index.encoder).search("a", where="camera = 'X'"),
        lambda: Index(index.location, index.encoder, memory_bytes=0).near_duplicates(0.5),
        lambda: opened.search("a"),
        lambda: opened.search("a", where="year > 2001"),
    ]
    if folder == "data":  # without a version it is no index
        asks.append(lambda: index.update(Path(index.location).parent / "years.jsonl"))
    for ask in asks:
        with pytest.raises(ValueError, match=r"(the|no) index (at )?.*photos\.index") as caught:
            ask()
        assert f"miniclip index SRC {index.location} --model M" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_index_lives_on_s3(photos, counting, s3):
    import boto3

    store = boto3.client("s3")
    store.create_bucket(Bucket="pictures")
    store.put_object(Bucket="pictures", Key="folder/0.png", Body=b"cut")
    index = Index("s3://pictures/photos.index", from_object(counting, "counting"))
    for source, why in (
        ("folder", "it is a folder, which is not listed"),
        ("folder/0.png", r"is not an image .*3 byt"),
    ):
        with pytest.raises(ValueError, match=f"none of the 1 pictures can be read, so there is no index; .*{why}"):
            index.update(f"s3://pictures/{source}")
    assert counts(index.update(photos)) == {"new": 12}
    (photos / "mon/0.png").rename(photos / "moved.png")
    assert counts(index.update(photos)) == {"moved": 1, "gone": 1, "unchanged": 11}
    check(Index("s3://pictures/photos.index", index.encoder), counting, photos)
    assert len(Index("S3://pictures/photos.index/", index.encoder)) == len(index)
    with pytest.raises(ValueError, match="no index at s3://pictures/other"):
        Index("s3://pictures/other")


def test_workers_start_safely_beside_the_databases_threads(index, photos, recwarn):
    import lancedb  # noqa: F401

    assert counts(index.update(photos, batch_size=2, num_workers=2)) == {"new": 12}
    assert not [each for each in recwarn if "fork" in str(each.message)]
