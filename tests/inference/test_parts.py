"""Files of embeddings: whole or not there, whatever moment a process is killed at. No model: made-up rows."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from miniclip.data.reading.scan import LeftOut
from miniclip.inference.embedding.parts import Plan, Work

ROWS, SIZE = 11, 4
BAD = {2: "it is torn", 9: "it is empty"}


class MadeUpRows:
    def key(self, index):
        return f"row {index}"

    def table(self, indices):
        columns = {"key": [self.key(i) for i in indices], "path": [None] * len(indices)}
        return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def plan(**changes):
    facts = {"kind": "image", "source": "photos", "source_fingerprint": "s1", "rows": ROWS, "model": "m"}
    facts |= {"library": "l 1", "model_fingerprint": "f1", "preprocessing": "p1", "dtype": "float32"}
    return Plan(**(facts | {"layout": "parquet", "rows_per_file": 4} | changes))


def embedding(index):
    return np.arange(SIZE, dtype=np.float32) + 10 * index


def fill(work, batch=3):
    indices = [i for number in work.missing() for i in work.plan.indices(number)]
    for start in range(0, len(indices), batch):
        some = indices[start : start + batch]
        good = np.array([i for i in some if i not in BAD], dtype=np.int64)
        found = np.stack([embedding(i) for i in good]) if len(good) else np.zeros((0, SIZE), np.float32)
        work.add(good, found.astype(work.plan.dtype), {i: BAD[i] for i in some if i in BAD}, MadeUpRows())


def write(out, part=(1, 1), overwrite=False, **changes):
    work = Work(out, plan(**changes), part, overwrite)
    with work.part_lock():
        fill(work)
        return work.finish([LeftOut("notes.txt", "a text", 3)], {"miniclip": "1"})


def rows_of(out):
    if (out / "img_emb").is_dir():
        found = np.concatenate([np.load(path) for path in sorted((out / "img_emb").iterdir())])
        keys = pd.read_parquet(out / "metadata").image_path
        return dict(zip(keys, found.tolist(), strict=True))
    table = pd.read_parquet(out)
    return {key: value.tolist() for key, value in zip(table.key, table.embedding, strict=True)}


EXPECTED = {f"row {i}": embedding(i).tolist() for i in range(ROWS) if i not in BAD}
LAYOUTS = ["parquet", "clip-retrieval"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_kept_unreadable_and_left_out_are_all_that_was_there(tmp_path, layout):
    done = write(tmp_path / "out", layout=layout)
    assert (done.kept, done.unreadable, done.left_out, done.files) == (9, 2, 3, 3)
    assert rows_of(tmp_path / "out") == EXPECTED
    manifest = json.loads((tmp_path / "out/_manifest.json").read_text())
    assert manifest["is_complete"]
    assert (manifest["embedding_size"], manifest["unreadable"], manifest["left_out"]) == (SIZE, 2, {"a text": 3})
    assert list(manifest["files"].values()) == [3, 4, 2]
    listed = pd.read_csv(tmp_path / "out/_left_out.csv").values.tolist()
    assert listed[:2] == [[f"row {i}", "could not be read", BAD[i]] for i in (2, 9)]
    assert listed[2:] == [["notes.txt", "left out", "a text, 3 of them"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # neither locks nor OUT.partial


def _killed_at(folder, layout, step):
    """Writes into `folder`, and is killed before the step-th call that changes what lies on the disk."""
    left = iter(range(step))

    def counted(call):
        def run(*args, **options):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return run

    for name in ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    write(folder / "out", layout=layout, overwrite=(folder / "out").exists())


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("replaces", [False, pytest.param(True, marks=pytest.mark.long)], ids=["new", "replacing"])
def test_a_run_that_is_killed_at_any_step_is_finished_by_the_next(tmp_path, replaces, layout, every):
    for step in range(every - 1, 200, every):
        folder = tmp_path / str(step)
        folder.mkdir()
        if replaces:
            write(folder / "out", model="older", model_fingerprint="f0")
        process = multiprocessing.get_context("fork").Process(target=_killed_at, args=(folder, layout, step))
        process.start()
        process.join()
        if (folder / "out").exists():  # what has the name is whole
            assert json.loads((folder / "out/_manifest.json").read_text())["model"] == "m" or replaces
            assert rows_of(folder / "out") == EXPECTED
        write(folder / "out", layout=layout, overwrite=(folder / "out").exists())
        assert rows_of(folder / "out") == EXPECTED
        assert sorted(path.name for path in folder.iterdir()) == ["out"]
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert step > 15


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_parts_of_a_job_array_are_one_folder_in_whatever_order_they_end(tmp_path, layout, count):
    order = np.random.default_rng(count).permutation(count) + 1
    for number in order:
        assert not (tmp_path / "out").exists() or number > 3  # a fourth and fifth part have no file to write
        done = write(tmp_path / "out", (int(number), count), layout=layout)
    assert (done.kept, done.missing) == (9, 0)
    assert rows_of(tmp_path / "out") == EXPECTED
    assert write(tmp_path / "out", (1, count), layout=layout).was_there


def test_only_one_of_two_processes_that_end_together_is_the_last(tmp_path):
    works = [Work(tmp_path / "out", plan(), (number, 2)) for number in (1, 2)]
    for work in works:
        fill(work)
    ends = [work.finish([], {}) for work in works]
    assert [(each.missing, each.is_last, each.was_there) for each in ends] == [(0, True, False), (0, False, False)]


def test_a_part_that_is_done_says_how_many_files_are_missing(tmp_path):
    done = write(tmp_path / "out", (1, 2))
    assert (done.missing, done.files) == (1, 3)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in (tmp_path / "out.partial").iterdir()) == [
        "_manifest.json",
        "part-00000.parquet",
        "part-00002.parquet",
    ]


def test_rows_may_come_in_any_order(tmp_path):
    work = Work(tmp_path / "out", plan())
    for index in np.random.default_rng(0).permutation(ROWS):
        bad = {int(index): BAD[index]} if index in BAD else {}
        good = np.array([] if bad else [index], dtype=np.int64)
        work.add(good, np.stack([embedding(i) for i in good] or [np.zeros(SIZE)])[: len(good)], bad, MadeUpRows())
    assert work.finish([], {}).kept == 9
    assert list(rows_of(tmp_path / "out")) == list(EXPECTED)
    assert rows_of(tmp_path / "out") == EXPECTED


def test_a_complete_folder_of_the_same_plan_is_left_alone(tmp_path):
    write(tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert write(tmp_path / "out").was_there
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert write(tmp_path / "out", source="/moved/photos", model="moved").was_there
    assert not write(tmp_path / "out", overwrite=True).was_there


CHANGES = {
    "the model was m and is n": {"model": "n", "model_fingerprint": "f2"},
    "the weights of m are others": {"model_fingerprint": "f2"},
    "the preprocessing of m is another": {"model_fingerprint": "f2", "preprocessing": "p2"},
    "library was 'l 1' and is 'l 2'": {"model_fingerprint": "f2", "library": "l 2"},
    "the source was photos and is paintings": {"source": "paintings", "source_fingerprint": "s2"},
    "files, keys or columns of photos have changed; rows was 11 and is 12": {"source_fingerprint": "s2", "rows": 12},
    "dtype was 'float32' and is 'float16'": {"dtype": "float16"},
    "layout was 'parquet' and is 'clip-retrieval'": {"layout": "clip-retrieval"},
    "rows_per_file was 4 and is 5": {"rows_per_file": 5},
    "kind was 'image' and is 'text'": {"kind": "text"},
}


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("says", CHANGES)
def test_what_was_begun_otherwise_is_refused_by_name(tmp_path, says, is_whole):
    write(tmp_path / "out", (1, 1) if is_whole else (1, 2))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"out(\.partial)? .*--overwrite") as caught:
        write(tmp_path / "out", **CHANGES[says])
    assert says in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    rows = CHANGES[says].get("rows", ROWS)
    if rows == ROWS:
        assert write(tmp_path / "out", overwrite=True, **CHANGES[says]).kept == 9
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_model_without_a_fingerprint_is_known_by_its_name(tmp_path):
    unknown = {"model_fingerprint": None, "preprocessing": None}
    write(tmp_path / "out", (1, 2), **unknown)
    with pytest.raises(ValueError, match=r"model was 'm' and is 'n'"):
        write(tmp_path / "out", model="n", **unknown)
    assert write(tmp_path / "out", **unknown).kept == 9


def test_what_others_wrote_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"out exists and was not written by `miniclip embed`.*name another"):
        write(tmp_path / "out", overwrite=True)
    write(tmp_path / "two", model_fingerprint="f0")
    (tmp_path / "two/mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"two holds what `miniclip embed` did not write.*: mine\.txt"):
        write(tmp_path / "two", overwrite=True)
    (tmp_path / "three.partial").mkdir()
    (tmp_path / "three.partial/mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"three\.partial is in the way.*_manifest\.json"):
        write(tmp_path / "three", overwrite=True)
    for name in ("out", "two", "three.partial"):
        assert (tmp_path / name / "mine.txt").read_text() == "x"


def test_a_part_that_another_process_is_at_is_refused(tmp_path):
    work = Work(tmp_path / "out", plan(), (1, 2))
    with work.part_lock():
        with pytest.raises(ValueError, match=r"another process is at part 1/2 of .*out"):
            write(tmp_path / "out", (1, 2))
        with pytest.raises(ValueError, match=r"another process is writing .*out"):
            write(tmp_path / "out", overwrite=True, model_fingerprint="f2")
        assert write(tmp_path / "out", (2, 2)).missing == 2


def test_a_source_without_a_readable_row_is_an_error_and_leaves_nothing(tmp_path):
    work = Work(tmp_path / "out", plan(rows=2))
    work.add(np.zeros(0, np.int64), np.zeros((0, SIZE), np.float32), {0: "row 0 is torn", 1: "x"}, MadeUpRows())
    with pytest.raises(ValueError, match=r"none of the 2 rows of photos can be read; the first: row 0 is torn"):
        work.finish([], {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_part_is_named(tmp_path, layout):
    write(tmp_path / "out", (1, 2), layout=layout)
    part = next((tmp_path / "out.partial").rglob("*0.parquet"))
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{part.name} is damaged .*delete that file and repeat"):
        write(tmp_path / "out", layout=layout)
    part.unlink()
    write(tmp_path / "out", layout=layout)
    assert rows_of(tmp_path / "out") == EXPECTED


@pytest.mark.parametrize(("rows", "first", "last"), [(9, "0", "8"), (10, "00", "09"), (120, "000", "119")])
def test_clip_retrievals_files_sort_by_their_numbers(tmp_path, rows, first, last):
    work = Work(tmp_path / "out", plan(rows=rows, rows_per_file=1, layout="clip-retrieval", dtype="float16"))
    found = np.arange(rows * SIZE, dtype=np.float16).reshape(rows, SIZE)
    work.add(np.arange(rows), found, {}, MadeUpRows())
    work.finish([], {})
    for folder, suffix in (("img_emb", "npy"), ("metadata", "parquet")):
        names = sorted(path.name for path in (tmp_path / "out" / folder).iterdir())
        assert len(names) == rows
        assert (names[0], names[-1]) == (f"{folder}_{first}.{suffix}", f"{folder}_{last}.{suffix}")
    assert np.load(tmp_path / f"out/img_emb/img_emb_{last}.npy").tolist() == found[-1:].tolist()
