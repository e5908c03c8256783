"""Embeddings of images and texts. Oracles: each library's own features, and one uninterrupted run."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import tarfile
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
import warm
from helpers import Served, pack_folder, picture, table, tiny_clip, write_pairs, write_picture
from libraries import LIBRARIES
from PIL import Image

import miniclip
from miniclip.data.reading.parquet import ParquetRows
from miniclip.data.shards import Shards
from miniclip.evaluation.datasets.sets import digest_lines
from miniclip.evaluation.other_libraries import open_model
from miniclip.inference.embedding.embed import embed_source
from miniclip.inference.embedding.source_rows import SourceRows, columns_left_out
from miniclip.inference.sources import image_set, text_set

TEXTS = ["a picture of a cat.", "two dogs", "red", "a picture of two red dogs ."]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return miniclip.save(tiny_clip(), folder := tmp_path_factory.mktemp("model") / "tiny") or str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten pictures, an eleventh that can't be read, and a text."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(10):
        write_picture(folder / f"{number}.png", number)
    (folder / "7a.jpg").write_bytes(b"\xff\xd8\xff no more")
    (folder / "notes.doc").write_text("x")
    return folder


def embeddings(out):
    found = pd.read_parquet(out)
    return found.drop(columns="embedding"), np.stack(found.embedding)


def write(source, out, model, texts=False, **options):
    data = (text_set if texts else image_set)(source)
    encoder = open_model(model, "cpu") if isinstance(model, str) else model
    return embed_source(data, encoder, out, source=str(source), **options)


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers as the libraries'


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", LIBRARIES)
def test_embeddings_are_the_librarys_own_features(tmp_path, name):
    library = LIBRARIES[name](tmp_path)
    paths = [write_picture(tmp_path / f"photos/{n}.png", n, (40 + n, 30)) for n in range(5)]
    texts = table(tmp_path / "texts.txt", *TEXTS)
    of_images, of_texts = library.of_images(paths), library.of_texts(TEXTS)
    assert of_images.std(axis=0).max() > 1e-3
    assert of_texts.std(axis=0).max() > 1e-3
    write(tmp_path / "photos", tmp_path / "images", library.name, rows_per_file=2)
    write(texts, tmp_path / "texts", library.name, texts=True, rows_per_file=3)
    rows, found = embeddings(tmp_path / "images")
    assert rows.key.tolist() == rows.path.tolist() == [str(path) for path in paths]
    np.testing.assert_allclose(found, of_images, atol=1e-5)
    rows, found = embeddings(tmp_path / "texts")
    assert rows.text.tolist() == TEXTS
    assert rows.key.tolist() == [f"{texts}:{line}" for line in range(1, 5)]
    np.testing.assert_allclose(found, of_texts, atol=1e-5)
    np.testing.assert_allclose(miniclip.embed(paths, model=library.name), of_images, atol=1e-5)
    np.testing.assert_allclose(miniclip.embed(TEXTS, model=library.name), of_texts, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_folder_is_read_as_one_table(tmp_path, photos, model):
    done = write(photos, tmp_path / "out", model, rows_per_file=4)
    assert (done.kept, done.unreadable, done.left_out, done.files) == (10, 1, 1, 3)
    found = ds.dataset(tmp_path / "out").to_table()
    assert found.schema.field("embedding").type == pa.list_(pa.field("element", pa.float32()), 16)
    assert found.column_names == ["key", "path", "embedding"]
    assert found["key"].to_pylist() == [str(photos / f"{n}.png") for n in range(10)]
    lengths = np.linalg.norm(embeddings(tmp_path / "out")[1], axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)
    listed = pd.read_csv(tmp_path / "out/_left_out.csv")
    assert listed.name.tolist() == [str(photos / "7a.jpg"), str(photos / "notes.doc")]
    assert listed.what.tolist() == ["could not be read", "left out"]


def test_clip_retrievals_layout_is_the_same_rows_in_half_precision(tmp_path, photos, model):
    write(photos, tmp_path / "out", model)
    write(photos, tmp_path / "arrays", model, layout="clip-retrieval", rows_per_file=4)
    assert sorted(p.name for p in (tmp_path / "arrays").iterdir()) == [
        "_left_out.csv",
        "_manifest.json",
        "img_emb",
        "metadata",
    ]
    parts = [np.load(path) for path in sorted((tmp_path / "arrays/img_emb").glob("img_emb_[012].npy"))]
    assert [part.shape for part in parts] == [(4, 16), (4, 16), (2, 16)]
    assert {part.dtype for part in parts} == {np.dtype("float16")}
    rows, expected = embeddings(tmp_path / "out")
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-3)
    for number, part in enumerate(parts):
        metadata = pd.read_parquet(tmp_path / f"arrays/metadata/metadata_{number}.parquet")
        assert metadata.image_path.tolist() == rows.path.tolist()[4 * number :][: len(part)]


def test_clip_retrievals_layout_of_texts_has_captions(tmp_path, model):
    write(
        table(tmp_path / "t.csv", "caption,tag", "a cat,x", "two dogs,y"),
        tmp_path / "out",
        model,
        texts=True,
        layout="clip-retrieval",
    )
    metadata = pd.read_parquet(tmp_path / "out/metadata/metadata_0.parquet")
    assert metadata.to_dict("list") == {"caption": ["a cat", "two dogs"], "tag": ["x", "y"]}
    assert np.load(tmp_path / "out/text_emb/text_emb_0.npy").shape == (2, 16)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_numbers_are_of_the_type_that_was_asked_for(tmp_path, photos, model, dtype):
    write(photos, tmp_path / "out", model, dtype=dtype)
    found = embeddings(tmp_path / "out")[1]
    assert found.dtype == dtype
    expected = miniclip.embed([photos / f"{n}.png" for n in range(10)], model=model)
    np.testing.assert_allclose(found, expected, atol={"float32": 1e-6, "float16": 1e-3}[dtype])


def test_columns_of_the_source_come_along_with_their_types(tmp_path, model):
    lines = [
        "image,year,score,note,embedding",
        *(f"{n}.png,{1990 + n},{n / 2},{'late' * (n > 1)},{n}" for n in range(4)),
    ]
    for n in range(4):
        write_picture(tmp_path / f"{n}.png", n)
    write(table(tmp_path / "t.csv", *lines), tmp_path / "out", model, rows_per_file=2)
    rows = embeddings(tmp_path / "out")[0]
    assert rows.columns.tolist() == ["key", "path", "year", "score", "note", "source_embedding"]
    assert rows.path.tolist() == [str(tmp_path / f"{n}.png") for n in range(4)]
    assert rows.year.tolist() == ["1990", "1991", "1992", "1993"]  # a CSV has no types
    values = [{"mixed": mixed, "none": None, "ok": n > 1} for n, mixed in enumerate([1, None, 2.5, "x"])]
    facts = [{"image": f"{n}.png", "year": 1990 + n, "score": n / 2, **values[n]} for n in range(4)]
    jsonl = [json.dumps(each) for each in facts]
    write(table(tmp_path / "t.jsonl", *jsonl), tmp_path / "typed", model, rows_per_file=1)
    found = ds.dataset(tmp_path / "typed").to_table().to_pydict()
    assert found["year"] == [1990, 1991, 1992, 1993]
    assert found["score"] == [0, 0.5, 1, 1.5]
    assert found["mixed"] == ["1", None, "2.5", "x"]
    assert found["none"] == [None] * 4
    assert found["ok"] == [False, False, True, True]


def typed_table(folder):
    """Eight pictures, the fourth of which is not there, and a column of each kind."""
    for n in range(8):
        if n != 3:
            write_picture(folder / f"{n}.png", n)
    columns = {
        "image": [f"{n}.png" for n in range(8)],
        "caption": [f"caption {n}" for n in range(8)],
        "i8": pa.array(range(8), pa.int8()),
        "u64": pa.array([2**63 + n for n in range(8)], pa.uint64()),
        "f16": pa.array(np.full(8, 0.1, "float16")),
        "f32": pa.array([float("nan"), None, 0.1, 1, 2, 3, 4, 5], pa.float32()),
        "time": pa.array([1700000000123456789 + n for n in range(8)], pa.timestamp("ns")),
        "price": pa.array([Decimal("1.10")] * 8, pa.decimal128(10, 2)),
        "kind": pa.array(list("abacbcab")).dictionary_encode(),
        "tags": [["a", str(n)] for n in range(8)],
        "box": pa.array([{"x": n, "y": [n / 2]} for n in range(8)]),
        "vector": pa.array([[n, 0.5] for n in range(8)], pa.list_(pa.float32(), 2)),
        "digest": pa.array([bytes([n, 255]) for n in range(8)]),
        "marks": pa.array([[("a", n)] for n in range(8)], pa.map_(pa.string(), pa.int16())),
        "nothing": pa.nulls(8),
    }
    pq.write_table(found := pa.table(columns), folder / "t.parquet", row_group_size=3)
    return found


@pytest.mark.parametrize("layout", ["parquet", "clip-retrieval"])
def test_columns_of_parquet_come_along_as_they_are(tmp_path, model, layout):
    source = typed_table(tmp_path)
    write(tmp_path / "t.parquet", tmp_path / "images", model, layout=layout, rows_per_file=2)
    write(tmp_path / "t.parquet", tmp_path / "texts", model, texts=True, layout=layout, rows_per_file=5)
    within = "" if layout == "parquet" else "metadata"
    for out, own, rows in (("images", "image", [0, 1, 2, 4, 5, 6, 7]), ("texts", "caption", range(8))):
        found = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / out / within).glob("*.parquet")))
        expected = source.take(list(rows)).drop_columns([own])
        for name in expected.column_names:
            assert found.schema.field(name).type == expected.schema.field(name).type
            as_text = [repr(column.to_pylist()) for column in (found[name], expected[name])]  # NaN is no NaN's equal
            assert as_text[0] == as_text[1]


def test_views_of_texts_and_bytes_in_parquet_are_read_and_come_along(tmp_path, model):
    view = pa.string_view()
    long = "longer than the twelve bytes of a short view"
    rows = {
        "caption": pa.array(["a", None, long, "b"], view),
        "text": pa.array(["x", None, long, ""], view),
        "bytes": pa.array([b"x", None, b"\xff", b""], pa.binary_view()),
        "list": pa.array([["x"], None, [long, None], []], pa.list_(view)),
        "large": pa.array([["x"], None, [long, None], []], pa.large_list(view)),
        "two": pa.array([["x", "y"], None, [long, None], ["", ""]], pa.list_(view, 2)),
        "struct": pa.array([{"in": "x"}, None, {"in": None}, {"in": long}], pa.struct([("in", view)])),
        "map": pa.array([[("k", "x")], None, [], [(long, None)]], pa.map_(view, view)),
    }
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    write(tmp_path / "t.parquet", tmp_path / "out", model, texts=True)
    found = ds.dataset(tmp_path / "out").to_table()
    assert found["source_text"].to_pylist() == ["x", long, ""]
    for name in ("bytes", "list", "large", "two", "struct", "map"):
        expected = rows[name].to_pylist()
        assert found[name].to_pylist() == [expected[0], *expected[2:]]


def tar_of(path, samples):
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def test_a_damaged_json_of_a_sample_costs_its_columns_alone_and_is_told(tmp_path, model):
    picture_bytes = write_picture(tmp_path / "a.png").read_bytes()
    facts = [b'{"id": 0}', b'{"id": 1,', b'{"id": 2}']
    members = [{"png": picture_bytes, "txt": b"c", "cls": b"%d" % n, "json": facts[n]} for n in range(3)]
    tar_of(tmp_path / "t.tar", {str(n): each for n, each in enumerate(members)})
    for texts in (False, True):
        done = write(tmp_path / "t.tar", out := tmp_path / f"out{texts}", model, texts=texts)
        found = ds.dataset(out).to_table()
        assert found["id"].to_pylist() == [0, None, 2]
        assert found["cls"].to_pylist() == ["0", "1", "2"]
        assert done.left_out == 1
        listed = pd.read_csv(out / "_left_out.csv")
        assert listed.name[0] == f"{tmp_path / 't.tar'}:1"
        assert listed.reason[0].startswith("a .json that can't be read")


def test_labels_of_shards_that_are_no_utf_8_stay_two(tmp_path):
    picture_bytes = write_picture(tmp_path / "a.png").read_bytes()
    labels = ["café".encode("latin-1"), "cafè".encode("latin-1"), "café".encode("utf-8-sig")]
    tar_of(tmp_path / "t.tar", {f"{n}": {"png": picture_bytes, "cls": label} for n, label in enumerate(labels)})
    rows = SourceRows(image_set(str(tmp_path / "t.tar")))
    assert rows.table([0, 1, 2])["cls"].to_pylist() == ["caf\\xe9", "caf\\xe8", "café"]


def test_labels_of_shards_are_read_of_the_rows_that_are_asked_for(tmp_path, monkeypatch):
    picture_bytes = write_picture(tmp_path / "a.png").read_bytes()
    for shard in range(3):
        tar_of(tmp_path / f"{shard}.tar", {f"{shard}": {"png": picture_bytes, "cls": b"%d" % shard}})
    asked, read = [], Shards.read
    monkeypatch.setattr(
        Shards, "read", lambda self, index, kind: (asked.append(self.name(index)), read(self, index, kind))[1]
    )
    rows = SourceRows(image_set(str(tmp_path / "{0..2}.tar")))
    rows.fingerprint()
    assert not asked
    assert rows.table([1, 2])["cls"].to_pylist() == ["1", "2"]
    assert {*asked} == {f"{tmp_path / '1.tar'}:1", f"{tmp_path / '2.tar'}:2"}


def test_sources_that_are_joined_keep_classes_by_name_and_go_without_pictures(tmp_path):
    datasets = pytest.importorskip("datasets")
    noise = [Image.fromarray(np.random.default_rng(n).integers(0, 255, (90, 90, 3), np.uint8)) for n in range(3)]
    columns = {"image": noise, "mask": noise, "label": [1, 0, -1]}
    features = {"image": datasets.Image(), "mask": datasets.Image()}
    sets = [
        datasets.Dataset.from_dict(columns, datasets.Features(features | {"label": datasets.ClassLabel(names=names)}))
        for names in (["cat", "dog"], ["owl", "fox", "bat"])
    ]
    sets.append(sets[0].remove_columns(["mask", "label"]))
    for name, chosen, expected in (
        ("missing", [0, 2], ["dog", "cat", None, None, None, None]),
        ("other", [0, 1], ["dog", "cat", None, "fox", "owl", None]),
        ("all", [2, 1, 0], [None, None, None, "fox", "owl", None, "dog", "cat", None]),
    ):
        parts = {f"part{n}": sets[n] for n in chosen}
        datasets.DatasetDict(parts).save_to_disk(tmp_path / name)
        data = image_set(tmp_path / name)
        assert SourceRows(data).table(range(len(data)))["label"].to_pylist() == expected
        assert [each.source for each in columns_left_out(data)] == ["column 'mask'"]


def test_pictures_stay_out_beside_a_table_that_has_a_text_in_their_column(tmp_path):
    pictures = {"caption": ["a", "b"], "pixels": [b"x" * 50_000] * 2, "thumb": [b"y"] * 2, "n": pa.array([1, 2])}
    pq.write_table(pa.table(pictures), tmp_path / "a.parquet")
    table(tmp_path / "b.csv", "caption,pixels,thumb,n", "c,path,path,x")
    data = text_set([tmp_path / "a.parquet", tmp_path / "b.csv"])
    assert {each.source for each in columns_left_out(data)} == {"column 'pixels'", "column 'thumb'"}
    assert SourceRows(data).table([0, 2])["n"].to_pylist() == ["1", "x"]


def test_a_run_goes_on_with_a_parquet_file_that_was_copied_and_not_with_other_values(tmp_path):
    def fingerprint(labels):
        pq.write_table(pa.table({"caption": list("abcd"), "label": labels}), tmp_path / "t.parquet", row_group_size=2)
        return SourceRows(text_set(tmp_path / "t.parquet")).fingerprint()

    first = fingerprint([0, 1, 1, 0])
    os.utime(tmp_path / "t.parquet", (1, 1))
    assert SourceRows(text_set(tmp_path / "t.parquet")).fingerprint() == first == fingerprint([0, 1, 1, 0])
    assert fingerprint([1, 0, 1, 0]) != first  # of the same size, and with the same statistics


def test_of_a_column_of_parquet_one_group_is_kept(tmp_path):
    columns = {"value": np.arange(1_000_000), **{f"c{n}": np.zeros(1_000_000, np.int8) for n in range(9)}}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=100_000)
    del columns
    rows = ParquetRows([tmp_path / "t.parquet"])
    before = pa.total_allocated_bytes()
    assert sum(rows.whole("value")) == 499_999_500_000
    assert pa.total_allocated_bytes() - before < 2_000_000  # a group has 800 kB


def test_several_files_of_parquet_with_other_types_of_a_column_keep_its_values(tmp_path, model):
    for n, year in enumerate([[1990, 1991], [None, 1992.5]]):
        columns = {"caption": ["a", "b"], "year": year, "tags": [["x"], None] if n else pa.nulls(2)}
        columns |= {"of": pa.array([[1], [2]], pa.list_([pa.int8(), pa.int32()][n]))}
        pq.write_table(pa.table(columns), tmp_path / f"{n}.parquet")
    write(str(tmp_path / "*.parquet"), tmp_path / "out", model, texts=True)
    found = ds.dataset(tmp_path / "out").to_table().to_pydict()
    assert found["year"] == [1990, 1991, None, 1992.5]
    assert found["tags"] == [None, None, ["x"], None]
    assert found["of"] == ["[1]", "[2]", "[1]", "[2]"]


def test_lists_and_mappings_of_json_come_along_as_json_for_images_and_for_texts(tmp_path, model):
    write_pairs(tmp_path / "pairs", 3)
    facts = [{"id": n, "tags": ["a", n], "box": {"x": n}, "mixed": [n, "x", None][n]} for n in range(3)]
    lines = [json.dumps({"image": f"pairs/{n:04d}.png", "caption": [f"c {n}", "d"], **facts[n]}) for n in range(3)]
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for n in range(3):
            picture_bytes = (tmp_path / f"pairs/{n:04d}.png").read_bytes()
            files = {"png": picture_bytes, "txt": f"c {n}\nd".encode(), "json": json.dumps(facts[n]).encode()}
            for suffix, data in (files | {"cls": str(n).encode()}).items():
                member = tarfile.TarInfo(f"{n}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    expected = {
        "id": [0, 1, 2],
        "tags": ['["a", 0]', '["a", 1]', '["a", 2]'],
        "box": ['{"x": 0}', '{"x": 1}', '{"x": 2}'],
        "mixed": ["0", "x", None],
    }
    for source in (table(tmp_path / "t.jsonl", *lines), tmp_path / "t.tar"):
        of_shards = {"cls": ["0", "1", "2"]} if source.suffix == ".tar" else {}
        for texts in (False, True):
            write(source, out := tmp_path / f"{source.suffix}{texts}", model, texts=texts)
            found = ds.dataset(out).to_table().to_pydict()
            for name, values in (expected | of_shards).items():
                assert found[name] == ([each for each in values for _ in range(2)] if texts else values)


def test_columns_of_datasets_come_along_as_they_are_and_classes_by_their_names(tmp_path, model):
    datasets = pytest.importorskip("datasets")
    features = {
        "image": datasets.Image(),
        "mask": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "tags": datasets.Sequence(datasets.Value("string")),
        "small": datasets.Value("int8"),
        "caption": datasets.Value("string"),
    }
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 255, (90, 90, 3), dtype=np.uint8)) for _ in range(4)]
    rows = {
        "image": noise,
        "mask": noise,
        "label": [1, 0, -1, 1],
        "tags": [[str(n)] * n for n in range(4)],
        "small": list(range(4)),
        "caption": list("abcd"),
    }
    every = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    datasets.DatasetDict({"test": every.select([3, 0]), "train": every}).save_to_disk(tmp_path / "data")
    chosen = [3, 0, 0, 1, 2, 3]
    for texts, missing in ((False, ["mask"]), (True, ["image", "mask"])):
        done = write(tmp_path / "data", out := tmp_path / f"out{texts}", model, texts=texts, rows_per_file=4)
        found = ds.dataset(out).to_table()
        assert found["label"].to_pylist() == [["dog", "cat", None, "dog"][n] for n in chosen]
        assert found["tags"].to_pylist() == [[str(n)] * n for n in chosen]
        assert found.schema.field("small").type == pa.int8()
        assert found["small"].to_pylist() == chosen
        assert not {*missing} & {*found.column_names}
        assert done.left_out == len(missing)
        listed = pd.read_csv(out / "_left_out.csv")
        assert listed.name.tolist() == [f"column {name!r}" for name in missing]
        assert json.loads((out / "_manifest.json").read_text())["left_out"] == {
            "a column of pictures or of texts as large, which is not copied": len(missing)
        }


def test_samples_of_tars_of_one_name_have_keys_of_their_own(tmp_path, model, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    for part in "ab":
        write_pairs(tmp_path / part, 2 + (part == "b"))
        pack_folder(tmp_path / part, tmp_path / "s" / part)
    with Served(tmp_path / "s") as served:
        places = [str(tmp_path / "s/a"), f"{served.url}/b"]
        expected = [f"{places[0]}/00000.tar:{n:09d}" for n in range(2)]
        expected += [f"{places[1]}/00000.tar:{n:09d}" for n in range(3)]
        for texts in (False, True):
            data = (text_set if texts else image_set)(places)
            done = embed_source(data, open_model(model, "cpu"), out := tmp_path / f"out{texts}", source="s")
            assert (done.kept, done.unreadable) == (5, 0)
            rows, found = embeddings(out)
            assert rows.key.tolist() == expected
            pictures = [tmp_path / part / f"{n:04d}" for part, count in (("a", 2), ("b", 3)) for n in range(count)]
            own = [f.with_suffix(".txt").read_text().strip() if texts else f.with_suffix(".png") for f in pictures]
            np.testing.assert_allclose(found, miniclip.embed(own, model=model), atol=1e-5)
            assert texts or rows.path.isna().all()
    expected = [
        f"{tmp_path}/s/{part}/00000.tar:{n:09d}" for part, n in ("a0", "a1", "b0", "b1", "b2") for n in [int(n)]
    ]
    for source in ("s", "s/*/*.tar"):
        data = image_set(str(tmp_path / source))
        assert [data.key(index) for index in range(len(data))] == expected


@pytest.fixture
def of_places(tmp_path, monkeypatch):
    """Shards, a table that holds its pictures, its folder, a table of texts, a folder and a table of files; the keys of
    the four rows of each."""
    monkeypatch.chdir(tmp_path)
    write_pairs(Path("pairs"), 4)
    pack_folder(Path("pairs"), Path("s/shards"))
    cells = [path.read_bytes() for path in sorted(Path("pairs").glob("*.png"))]
    Path("s/pq").mkdir()
    pq.write_table(pa.table({"image": cells}), "s/pq/t.parquet")
    table(Path("s/t.csv"), "caption", *TEXTS)
    rows = ["s/shards/00000.tar:{:09d}", "s/pq: row {}", "s/pq/t.parquet: row {}", "s/t.csv: row {}"]
    keys = [[row.format(n + ("row" in row)) for n in range(4)] for row in rows]
    shutil.copytree("pairs", "s/photos")
    files = [f"s/photos/{n:04d}.png" for n in range(4)]
    table(Path("s/files.csv"), "image", *(name.removeprefix("s/") for name in files))
    of_files = {"s/photos": files, "s/files.csv": files}
    return dict(zip(["s/shards", "s/pq", "s/pq/t.parquet", "s/t.csv"], keys, strict=True)) | of_files


@pytest.mark.parametrize("source", ["s/photos", "s/files.csv"])
def test_embeddings_that_were_begun_by_an_absolute_name_go_on_by_a_relative_one(of_places, source, model, tmp_path):
    write(tmp_path / source, "out", model, rows_per_file=1, part=(1, 2))
    assert write(source, "out", model, rows_per_file=1).is_last
    assert embeddings("out")[0].key.tolist() == [str(tmp_path / key) for key in of_places[source]]
    shutil.copytree("s", "other")
    write(source, "again", model, rows_per_file=1, part=(1, 2))
    with pytest.raises(ValueError, match="the source was"):
        write(Path("other") / Path(source).name, "again", model, rows_per_file=1)


@pytest.mark.parametrize("source", ["s/shards", "s/pq", "s/pq/t.parquet", "s/t.csv", "s/photos", "s/files.csv"])
def test_embeddings_go_on_wherever_their_source_is_named_from_with_the_keys_that_were_begun(
    of_places, source, model, tmp_path, monkeypatch
):
    texts = source.endswith("t.csv")
    for number, name in enumerate([f"../{tmp_path.name}/{source}", str(tmp_path / source)], 1):
        write(source, f"out{number}", model, texts, rows_per_file=1, part=(1, 2))
        assert write(name, f"out{number}", model, texts, rows_per_file=1).is_last
        assert embeddings(f"out{number}")[0].key.tolist() == of_places[source]
    monkeypatch.chdir("s")
    assert write(Path(source).relative_to("s"), tmp_path / "out1", model, texts, rows_per_file=1).was_there


@pytest.mark.parametrize("source", ["s/shards", "s/pq", "s/pq/t.parquet", "s/t.csv"])
def test_embeddings_that_an_earlier_version_began_go_on_with_its_keys(of_places, source, model):
    """It left the folder of a tar or a table out, of keys and of what the manifest says of the source."""
    texts = source.endswith(".csv")
    data = (text_set if texts else image_set)(source)
    keys = [key.removeprefix(f"{Path(source).parent}/").removeprefix("shards/") for key in of_places[source]]
    columns = [json.dumps([name, list(values)]) for name, values in data.metadata.items()]
    first = TEXTS if texts else [digest_lines([data.identity])]
    write(source, "out", model, texts, rows_per_file=2, part=(1, 2))
    manifest = json.loads((path := Path("out.partial/_manifest.json")).read_text())
    del manifest["place"]
    path.write_text(
        json.dumps(manifest | {"source_fingerprint": digest_lines([digest_lines([*first, *keys]), *columns])})
    )
    assert write(source, "out", model, texts, rows_per_file=2).is_last
    assert pq.read_table("out/part-00001.parquet")["key"].to_pylist() == keys[2:]


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize("source", ["s/photos", "s/files.csv"])
def test_embeddings_of_files_that_an_earlier_version_wrote_are_known(of_places, source, is_complete, model):
    """In its manifest the keys of files stood as they were named, and its place was only a tar's or a table's."""
    data = image_set(source)
    write(source, "out", model, rows_per_file=2, part=(1, 1 if is_complete else 2))
    path = Path("out" if is_complete else "out.partial", "_manifest.json")
    keys = of_places[source]
    columns = [json.dumps([name, list(values)]) for name, values in data.metadata.items()]
    earlier = digest_lines([digest_lines([data.fingerprints()[1], *keys]), *columns])
    path.write_text(json.dumps(json.loads(path.read_text()) | {"source_fingerprint": earlier, "place": ""}))
    again = write(source, "out", model, rows_per_file=2)
    assert again.was_there if is_complete else again.is_last
    assert embeddings("out")[0].key.tolist() == keys
    write_picture(Path("s/photos/0001.png"), 99)
    with pytest.raises(ValueError, match="have changed"):
        write(source, "out", model, rows_per_file=2)


@pytest.mark.parametrize("is_complete", [True, False])
@pytest.mark.parametrize("source", ["s/photos", "s/pq/t.parquet"])
def test_files_of_other_times_are_compared_by_content(of_places, source, is_complete, model):
    write(source, "out", model, rows_per_file=2, part=(1, 1 if is_complete else 2))
    first = Path(source, "0001.png") if Path(source).is_dir() else Path(source)
    shutil.copytree(model, "moved")
    for name in ("moved", model):  # of the second look the times are known
        os.utime(first, (5, 5))
        again = write(source, "out", name, rows_per_file=2, part=(1, 1 if is_complete else 2))
        assert again.was_there == is_complete
    edited = bytearray(first.read_bytes())
    edited[300] ^= 1
    first.write_bytes(edited)
    os.utime(first, (5, 5))
    if first.suffix == ".parquet":  # whose own time of change is not asked for
        os.utime(first, (6, 6))
    with pytest.raises(ValueError, match="have changed"):
        write(source, "out", model, rows_per_file=2)


def test_keys_of_files_are_told_from_others_without_a_look_at_the_disk(of_places, monkeypatch):
    """Each look takes its time where the disk is on a network."""
    rows = SourceRows(image_set("s/photos"))
    looks = []
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: looks.append(path) or exists(path))
    rows.fingerprint()
    assert looks == []


def test_shards_are_embedded_under_their_keys(tmp_path, model):
    write_pairs(tmp_path / "pairs", 5, captions=2)
    pack_folder(tmp_path / "pairs", tmp_path / "shards")
    write(tmp_path / "shards", tmp_path / "out", model)
    rows, found = embeddings(tmp_path / "out")
    assert rows.key.tolist() == [f"{tmp_path / 'shards'}/00000.tar:{n:09d}" for n in range(5)]
    assert rows.path.isna().all()
    np.testing.assert_allclose(
        found, miniclip.embed(sorted((tmp_path / "pairs").glob("*.png")), model=model), atol=1e-6
    )
    write(tmp_path / "shards", tmp_path / "texts", model, texts=True)
    rows, found = embeddings(tmp_path / "texts")
    assert rows.text.tolist()[:3] == ["picture 0, caption 0", "picture 0, caption 1", "picture 1, caption 0"]
    np.testing.assert_allclose(found, miniclip.embed(rows.text.tolist(), model=model), atol=1e-6)


def test_names_that_are_no_utf8_are_written_as_what_they_are(tmp_path, model):
    folder = tmp_path / "photos"
    picture_file = write_picture(folder / "a.png")
    os.rename(picture_file, os.fsencode(folder) + b"/\xff.png")
    write(folder, tmp_path / "out", model)
    assert embeddings(tmp_path / "out")[0].key.tolist() == [f"{folder}/\\udcff.png"]


def test_texts_that_are_cut_are_reported_once_and_counted(tmp_path, model):
    texts = ["an owl", "zebra " * 40, *(f"owl {number} " * 20 for number in range(3000)), "an owl"]
    with pytest.warns(UserWarning, match="cut") as caught:
        write(table(tmp_path / "t.txt", *texts), tmp_path / "out", model, texts=True)
    (note,) = [str(each.message) for each in caught if each.category is UserWarning]
    assert "reads 16 tokens; 3,001 of 3,003 texts are longer and were cut, the first: 'zebra zebra" in note


def test_a_run_goes_on_only_with_the_same_columns_of_a_parquet_file(tmp_path, model):
    source = typed_table(tmp_path)
    write(tmp_path / "t.parquet", tmp_path / "out", model, rows_per_file=2, part=(1, 2))
    pq.write_table(source.set_column(2, "i8", source["i8"].cast(pa.int16())), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"out\.partial was begun otherwise: files, keys or columns of .*--overwrite"):
        write(tmp_path / "t.parquet", tmp_path / "out", model, rows_per_file=2)


@pytest.mark.parametrize(("change", "says"), [("source", "files, keys or columns of"), ("model", "the model was")])
def test_a_run_goes_on_only_with_the_same_source_and_model(tmp_path, model, change, says):
    photos = write_pairs(tmp_path / "photos", 6)
    write(photos, tmp_path / "out", model, rows_per_file=2, part=(1, 2))
    if change == "source":
        write_picture(photos / "0005.png", 99)  # which is embedded
    else:
        miniclip.save(tiny_clip(seed=1), tmp_path / "other")
        model = str(tmp_path / "other")
    with pytest.raises(ValueError, match=rf"out\.partial was begun otherwise: {says}.*--overwrite"):
        write(photos, tmp_path / "out", model, rows_per_file=2)
    assert write(photos, tmp_path / "out", model, rows_per_file=2, overwrite=True).kept == 6


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, and a kill

MORTAL = """
import os, signal
from miniclip.evaluation.other_libraries import open_model
import miniclip

class Mortal:
    fingerprint = "the tiny model"
    def __init__(self):
        model = open_model(os.environ["MORTAL_MODEL"], "cpu")
        self.encode_text, self.tokenize = model.encode_text, model.tokenize
        self.preprocess, self.logit_scale, self.encode = model.preprocess, model.logit_scale, model.encode_image
        self.left = int(os.environ.get("MORTAL_BATCHES", 1000))
    def encode_image(self, images):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        return self.encode(images)
"""


@pytest.fixture
def mortal(tmp_path, model, monkeypatch):
    (tmp_path / "mortal.py").write_text(MORTAL)
    monkeypatch.setenv("MORTAL_MODEL", model)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield f"python:{tmp_path / 'mortal.py'}:Mortal"
    sys.modules.pop("mortal", None)


def command(*args, **environment):
    return warm.run([sys.executable, "-m", "miniclip", "embed", *map(str, args)], env={**os.environ, **environment})


def test_three_parts_with_a_kill_in_the_middle_hold_the_rows_of_one_uninterrupted_process(tmp_path, mortal):
    photos = write_pairs(tmp_path / "photos", 40)
    (photos / "0017.png").write_bytes(b"torn")
    options = ["--model", mortal, "--rows-per-file", 5, "--batch-size", 2, "--workers", 0]
    write(photos, tmp_path / "parts", mortal, rows_per_file=5, part=(3, 3))
    stopped = command(photos, tmp_path / "parts", *options, "--part", "2/3", MORTAL_BATCHES="4")
    assert stopped.returncode == -signal.SIGKILL, stopped.stderr
    assert len(list((tmp_path / "parts.partial").glob("*.parquet"))) == 2 + 1  # of its three files
    write(photos, tmp_path / "parts", mortal, rows_per_file=5, part=(1, 3))
    assert write(photos, tmp_path / "parts", mortal, rows_per_file=5, part=(2, 3)).kept == 39
    write(photos, tmp_path / "one", mortal, batch_size=7, rows_per_file=5)
    rows, found = embeddings(tmp_path / "parts")
    expected_rows, expected = embeddings(tmp_path / "one")
    pd.testing.assert_frame_equal(rows, expected_rows)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    manifests = [(tmp_path / out / "_manifest.json").read_text() for out in ("parts", "one")]
    assert manifests[0] == manifests[1]


def test_torchruns_processes_write_the_rows_of_one(tmp_path, photos, model):
    write(photos, tmp_path / "one", model, rows_per_file=2)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "miniclip",
        "embed",
    ]
    args = [photos, tmp_path / "two", "--model", model, "--rows-per-file", 2, "--device", "cpu", "--workers", 0]
    done = warm.run([*torchrun, *map(str, args)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("10 embeddings in 6 files") == 1, done.stdout
    assert done.stderr.count("notes.doc") == 1
    rows, found = embeddings(tmp_path / "two")
    expected_rows, expected = embeddings(tmp_path / "one")
    pd.testing.assert_frame_equal(rows, expected_rows)
    np.testing.assert_allclose(found, expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# miniclip.embed


def test_all_that_holds_a_picture_gives_the_same_row(tmp_path, model):
    path = write_picture(tmp_path / "a.png", 3)
    pixels = np.asarray(picture(3))
    expected = miniclip.embed([path], model=model)
    assert expected.shape == (1, 16)
    assert expected.dtype == np.float32
    kinds = [picture(3), pixels, torch.from_numpy(pixels.copy()), path.read_bytes(), path]
    for each in kinds:
        np.testing.assert_allclose(miniclip.embed(each, model=model), expected, atol=1e-6)
    np.testing.assert_allclose(miniclip.embed(kinds, model=model), expected.repeat(5, 0), atol=1e-6)
    np.testing.assert_allclose(miniclip.embed(np.stack([pixels] * 2), model=model), expected.repeat(2, 0), atol=1e-6)
    np.testing.assert_allclose(miniclip.embed(str(path), model=model, kind="image"), expected, atol=1e-6)


def test_booleans_are_black_and_white_and_floats_in_memory_those_of_a_file(tmp_path, model):
    levels = np.asarray(picture(3, mode="L"))
    is_white = levels > levels.mean()
    expected = miniclip.embed(Image.fromarray(np.where(is_white, 255, 0).astype(np.uint8)), model=model)
    for each in (is_white, torch.from_numpy(is_white), is_white[..., None]):
        np.testing.assert_allclose(miniclip.embed(each, model=model), expected, atol=1e-6)
    expected = miniclip.embed(Image.fromarray(levels), model=model)
    floats = Image.fromarray(levels.astype(np.float32) / 255)
    np.testing.assert_allclose(miniclip.embed(floats, model=model), expected, atol=1e-6)


def test_all_that_is_a_model_gives_the_same_rows(model):
    expected = miniclip.embed(["a cat"], model=model, device="cpu")
    assert np.array_equal(miniclip.embed("a cat", model=miniclip.load(model, "cpu")), expected)
    assert np.array_equal(miniclip.embed("a cat", model=open_model(model, "cpu")), expected)
    assert np.array_equal(miniclip.embed("a cat", model=Path(model), device="cpu"), expected)


@pytest.mark.parametrize("text", ["cat.jpg", "https://host/cat", "there"])
def test_a_string_that_may_be_a_place_is_asked_about(tmp_path, monkeypatch, model, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match=rf"'{text}' may be meant .*kind='text' or kind='image'"):
        miniclip.embed(["a cat", text], model=model)
    assert miniclip.embed(["a cat", text], model=model, kind="text").shape == (2, 16)


BAD = {
    "there is no file nowhere.png": {"inputs": [Path("nowhere.png")]},
    "there is no file a cat": {"inputs": ["a cat"], "kind": "image"},
    "is a folder; name its pictures": {"inputs": [Path()]},
    "nothing to embed": {"inputs": []},
    "images and texts are mixed": {"inputs": ["a cat", picture()]},
    "among the texts is a value of type Image": {"inputs": ["a cat", picture()], "kind": "text"},
    "inputs is 3; it must be a list of images or of texts": {"inputs": 3},
    "image 0 is 0.5; it must be": {"inputs": [0.5]},
    "kind is 'picture'; it must be image or text": {"inputs": ["a cat"], "kind": "picture"},
    "without encode_image": {"inputs": ["a cat"], "model": object()},
}


@pytest.mark.parametrize("says", BAD)
def test_what_is_no_image_or_text_or_model_is_named(model, says):
    with pytest.raises(ValueError, match=says):
        miniclip.embed(**({"model": model} | BAD[says]))


def test_a_picture_that_cant_be_read_is_an_error_as_rows_are_those_of_the_list(photos, model):
    with pytest.raises(ValueError, match=r"7a\.jpg .*can.* be read"):
        miniclip.embed([photos / "0.png", photos / "7a.jpg"], model=model)
    with pytest.raises(ValueError, match=r"notes\.doc"):
        miniclip.embed([photos / "0.png", photos / "notes.doc"], model=model)


def test_a_column_called_as_one_of_ours_is_renamed_until_it_is_another(tmp_path, model):
    source = table(tmp_path / "t.csv", "text,key,source_key", "a cat,1,2")
    rows = SourceRows(text_set(source)).table([0]).to_pydict()
    assert rows == {"key": [f"{source}: row 1"], "text": ["a cat"], "source_source_key": ["1"], "source_key": ["2"]}


@pytest.mark.parametrize("source", ["captions.txt", "texts", "piped"])
@pytest.mark.parametrize(
    "text",
    [
        'image,caption\n1.jpg,A child climbs .\n1.jpg,"A girl, running ."\n',
        "image_name| comment_number| comment\n1.jpg| 0| A child climbs .\n1.jpg| 1| A girl, running .\n",
        "1.jpg#0\tA child climbs .\n1.jpg#1\tA girl, running .\n",
    ],
)
def test_a_text_that_is_a_table_of_pictures_and_captions_gives_its_captions(tmp_path, text, source, monkeypatch):
    """Flickr8k's and Flickr30k's files as they are handed on, whose suffix is .txt."""
    (tmp_path / "texts").mkdir()
    for path in (tmp_path / "captions.txt", tmp_path / "texts/captions.txt"):
        path.write_text(text)
    if source == "piped":
        with pytest.raises(ValueError, match="standard input is a table of pictures and captions; name its file"):
            text_set("-", stdin=io.BytesIO(text.encode()))
    else:
        assert list(text_set(tmp_path / source).texts) == ["A child climbs .", "A girl, running ."]


@pytest.mark.parametrize(
    "lines",
    [
        ["image", "caption"],
        ["a dog, a cat", "text, image"],
        ["IMG_1.jpg", "a dog"],
        ["see https://a.b/c.jpg, it is"],
        ["image.png, 4k, photo of a dog", "dog.jpg, high quality"],
        ["dog.jpg, high quality"],
        ["a.jpg|a dog", "b.jpg|a cat"],
        ["image, text"],
        ["image, text, 4k", "a photo, a sign, sharp"],
    ],
)
def test_a_text_that_is_no_such_table_gives_its_lines(tmp_path, lines):
    path = table(tmp_path / "t.txt", *lines)
    assert list(text_set(path).texts) == lines
    assert list(text_set("-", stdin=io.BytesIO(path.read_bytes())).texts) == lines
