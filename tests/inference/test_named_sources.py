"""Whatever is named becomes one set: in order, each image once, and what is left out is counted and named."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from helpers import Served, pack_folder, picture, table, write_pairs, write_picture
from servers import Server

from miniclip.data.reading.scan import summary
from miniclip.inference.search.changes import list_sources
from miniclip.inference.sources import Texts, image_set, text_set


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))
    for number in range(3):
        write_picture(Path(f"photos/{number}.png"), number)
    write_picture(Path("photos/deep/er.jpg"), 3)
    return tmp_path


def keys(*arguments, **options) -> list[str]:
    found = image_set(*arguments, **options)
    return [found.key(index) for index in range(len(found))]


def piped(data: bytes | str) -> dict[str, io.BytesIO]:
    return {"stdin": io.BytesIO(data.encode() if isinstance(data, str) else data)}


@pytest.mark.parametrize("read", [image_set, text_set])
def test_a_closed_standard_input_is_refused(read, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after <&-
    with pytest.raises(ValueError, match=r"^- is standard input, and that is closed$"):
        read("-")


ALL = ["photos/0.png", "photos/1.png", "photos/2.png", "photos/deep/er.jpg"]


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["photos"], ALL),
        ("photos/1.png", ALL[1:2]),
        (Path("photos/1.png"), ALL[1:2]),
        (["photos/2.png", "photos/0.png"], [ALL[2], ALL[0]]),
        (["photos/*.png"], ALL[:3]),
        (["photos/[12].png"], ALL[1:3]),
        (["photos/{2,0}.png"], [ALL[2], ALL[0]]),
        (["photos/**/*.jpg"], ALL[3:]),
        (["**/*.png"], ALL[:3]),
        (["p*"], ALL),
        (["photos/**"], ALL),
        (["photos/**/*"], ALL),
    ],
    ids=str,
)
def test_files_folders_and_patterns_in_their_order(sources, expected):
    assert keys(sources) == expected


def test_a_name_that_is_there_is_no_pattern():
    for name in ("a[1].png", "a1.png", "b [2]/{x}.png", "b 2/{x}.png", "star*.png", "star1.png"):
        write_picture(Path(name))
    assert keys("a[1].png") == ["a[1].png"]
    assert keys("b [2]/*.png") == keys("b [2]") == ["b [2]/{x}.png"]
    assert keys("b [2]/{x}.png") == ["b [2]/{x}.png"]
    assert keys("star*.png") == ["star*.png"]
    assert keys("a[0-9].png") == ["a1.png"]


def test_a_pattern_follows_links_and_comes_to_an_end_where_they_lead_back():
    Path("photos/deep/back").symlink_to(Path("photos").resolve())
    Path("elsewhere").symlink_to(Path("photos").resolve())
    assert keys("photos/**/*.jpg") == ["photos/deep/er.jpg"]
    assert keys("elsewhere/**/*.jpg") == ["elsewhere/deep/er.jpg"]


def test_what_is_left_out_is_counted_and_named():
    for name in ("photos/.DS_Store", "photos/._0.png", "photos/notes.txt", "photos/raw.heic", "photos/.git/x.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"x")
    Path("empty").mkdir()
    found = image_set(["photos", "photos/0.png", "empty", "photos/notes.txt"], is_each_once=True)
    assert [found.key(index) for index in range(len(found))] == ALL
    left_out = {each.source: each.reason for each in found.left_out}
    assert left_out["photos/0.png"] == "named more than once"
    assert left_out["empty"] == "a folder without pictures"
    assert left_out["photos/notes.txt"] == "neither a picture nor a caption (.txt)"
    assert "hidden" in left_out["photos/.git/"]
    assert ".heic" in left_out["photos/raw.heic"]
    assert {"photos/.DS_Store", "photos/._0.png"} <= set(left_out)
    assert len(left_out) == 8  # with the texts of the folder


def test_a_file_is_known_again_through_a_link_to_its_folder():
    Path("photos/again").symlink_to("deep")
    Path("linked").symlink_to("photos")
    Path("photos/0 as well.png").symlink_to("0.png")  # a link to a file is one by itself
    found = image_set(["linked", "photos"], is_each_once=True)
    names = ["0 as well.png", "0.png", "1.png", "2.png", "again/er.jpg"]
    assert [found.key(index) for index in range(len(found))] == [f"linked/{name}" for name in names]
    twice = [each.source for each in found.left_out if each.reason == "named more than once"]
    assert twice == ["linked/deep/er.jpg", *(f"photos/{name}" for name in names), "photos/deep/er.jpg"]


def test_several_mentions_are_several_images_where_that_is_wanted():
    assert keys(["photos/0.png", "photos/0.png"]) == ["photos/0.png", "photos/0.png"]


# ---------------------------------------------------------------------------------------------------------------------
# Standard input


@pytest.mark.parametrize(
    "data",
    [
        "photos/2.png\nphotos/0.png\n",
        "photos/2.png\r\nphotos/0.png",
        "\nphotos/2.png\n\nphotos/0.png\n",
        "photos/2.png\0photos/0.png\0",
        "photos/2.png\r\nphotos/0.png\r\n".encode("utf-16"),
        "\ufeffphotos/2.png\nphotos/0.png\n".encode(),
    ],
    ids=["lines", "windows", "blank lines", "print0", "utf-16", "byte order mark"],
)
def test_names_come_by_standard_input(data):
    assert keys("-", **piped(data)) == ["photos/2.png", "photos/0.png"]


def test_names_keep_spaces_line_breaks_and_bytes_that_are_no_utf_8():
    odd = [" a .png", "two\nlines.png", os.fsdecode(b"caf\xe9.png")]
    for name in odd:
        write_picture(Path(name))
    data = b"".join(os.fsencode(name) + b"\0" for name in odd)
    found = image_set("-", **piped(data))
    assert [found.key(index) for index in range(3)] == odd
    assert all(found.open(index).size == (24, 20) for index in range(3))


def test_a_name_that_is_not_there_is_missed_where_it_is_opened_and_a_folder_is_left_out():
    found = image_set("-", **piped("photos\nphotos/0.png\nphotos/9.png\nphotos/.DS_Store\n"))
    assert [found.key(index) for index in range(len(found))] == ["photos/0.png", "photos/9.png"]
    with pytest.raises(ValueError, match=r"photos/9\.png can't be read: No such file"):
        found.open(1)
    assert [each.source for each in found.left_out] == ["photos", "photos/.DS_Store"]


def test_a_pictures_bytes_come_by_standard_input_or_a_named_pipe():
    data = Path("photos/0.png").read_bytes()
    found = image_set("-", **piped(data))
    assert np.array_equal(np.asarray(found.open(0)), np.asarray(picture(0)))
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    found = image_set(f"/dev/fd/{read}")
    os.close(read)
    assert np.array_equal(np.asarray(found.open(0)), np.asarray(picture(0)))


# ---------------------------------------------------------------------------------------------------------------------
# Tables, shards, data sets, URLs, and what Python holds


def test_tables_have_other_columns_as_metadata():
    table(Path("t.csv"), "filepath,place", "photos/1.png,here", "photos/0.png,there")
    found = image_set(["t.csv", "photos/2.png"])
    assert [found.key(index) for index in range(3)] == ["photos/1.png", "photos/0.png", "photos/2.png"]
    assert found.metadata == {"place": ["here", "there", None]}
    table(Path("u.jsonl"), '{"a": "photos/1.png", "b": "photos/0.png"}')
    assert keys("u.jsonl", image_column="b") == ["photos/0.png"]
    assert keys(table(Path("v.csv"), "image,caption", "photos/1.png#0,one", "photos/1.png#1,1")) == ["photos/1.png"] * 2
    with pytest.raises(ValueError, match=r"u\.jsonl has no column 'c'; its columns are 'a', 'b'"):
        image_set("u.jsonl", image_column="c")


def test_images_that_lie_in_parquet_shards_and_datasets_need_neither_labels_nor_captions():
    data = [Path(name).read_bytes() for name in ALL[:3]]
    Path("p").mkdir()
    for part in range(2):
        pa.parquet.write_table(pa.table({"image": data[part : part + 1]}), f"p/train-{part}.parquet")
    DatasetDict(
        {"train": Dataset.from_dict({"image": data[:2]}), "test": Dataset.from_dict({"image": data[2:]})}
    ).save_to_disk("d")
    write_pairs(Path("pairs"), 3)
    pack_folder(Path("pairs"), Path("shards"))
    for source, count in (("p", 2), ("p/*.parquet", 2), ("d", 3), ("shards", 3), ("shards/*.tar", 3)):
        found = image_set(source)
        assert len(found) == count, source
        for index in range(count):
            assert np.array_equal(np.asarray(found.open(index)), np.asarray(picture(index))), (source, index)
    mixed = image_set(["photos/2.png", "shards", "d"])
    assert [np.asarray(mixed.open(index)).sum() for index in range(7)] == [
        np.asarray(picture(number)).sum() for number in (2, 0, 1, 2, 0, 1, 2)
    ]
    assert mixed.metadata["split"] == [None] * 4 + ["train", "train", "test"]
    assert mixed.fingerprint() == image_set(["photos/2.png", "shards", "d"]).fingerprint()
    assert mixed.fingerprint() != image_set(["photos/1.png", "shards", "d"]).fingerprint()


def test_a_folder_of_pictures_with_a_tar_in_it_is_a_folder_of_pictures():
    Path("photos/0.png").rename("photos/deep/0.png")
    for number in (1, 2):
        Path(f"photos/{number}.png").unlink()
    Path("photos/backup.tar").write_bytes(b"")
    found = image_set("photos")
    assert [found.key(index) for index in range(len(found))] == ["photos/deep/0.png", "photos/deep/er.jpg"]
    assert [each.source for each in found.left_out] == ["photos/backup.tar"]


def test_urls_are_pictures_or_shards():
    write_pairs(Path("pairs"), 2)
    pack_folder(Path("pairs"), Path("shards"))
    with Served(Path.cwd()) as served:
        found = image_set([f"{served.url}/photos/1.png", f"{served.url}/shards"])
        assert np.array_equal(np.asarray(found.open(0)), np.asarray(picture(1)))
        assert np.array_equal(np.asarray(found.open(2)), np.asarray(picture(1)))
        assert keys("-", **piped(f"{served.url}/photos/1.png\n")) == [f"{served.url}/photos/1.png"]


def test_rows_of_tables_of_one_name_have_keys_of_their_own():
    for folder, count in (("a", 1), ("b/c", 2)):
        Path(folder).mkdir(parents=True)
        cells = [write_picture(Path(f"{folder}/{n}.png"), n).read_bytes() for n in range(count)]
        columns = pa.table({"image": cells, "caption": ["a dog"] * count})
        pyarrow.parquet.write_table(columns, f"{folder}/t.parquet")
    named = ["a/t.parquet", "b/c/t.parquet"]
    expected = ["a/t.parquet: row 1", "b/c/t.parquet: row 1", "b/c/t.parquet: row 2"]
    assert keys(named) == list(text_set(named).keys) == expected
    places = [key for listing in list_sources(named) for key in listing.keys]
    assert places == [str(Path(key).absolute()) for key in expected]


@pytest.mark.parametrize("answer", [404, 403])
def test_a_url_with_a_query_is_a_picture_unless_shards_are_there(answer, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    write_pairs(Path("pairs"), 3)
    pack_folder(Path("pairs"), Path("shards"))
    files = {f"/{path}": path.read_bytes() for path in Path("shards").iterdir()}
    query = "?token=a/b.c"
    with Server({**files, "/pictures/1": Path("photos/1.png").read_bytes()}) as server:
        for source in (f"{server.url}/shards{query}", f"{server.url}/shards/{{00000..00000}}.tar{query}"):
            assert keys(source) == [f"{server.url}/shards/00000.tar:{n:09d}" for n in range(3)]
            assert len(text_set(source)) == 3
        server.refusal = answer
        found = image_set(f"{server.url}/pictures/1{query}")
        assert np.array_equal(np.asarray(found.open(0)), np.asarray(picture(1)))


@pytest.mark.parametrize("query", ["/photo-1?w=400", "/uc?export=download&id=7", "?format=jpg"])
def test_pictures_with_a_query_and_no_suffix_are_not_searched_for_shards(query, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    path = query.partition("?")[0] or "/"
    with Server({path: Path("photos/1.png").read_bytes()}) as server:
        server.refusal = 503
        url = server.url + query
        assert image_set([url] * 3 + ["photos/1.png"]).images[:3] == (url,) * 3
        assert server.heads == server.gets == []
        found = image_set(url)
        assert [each.partition("?")[0] for each, _ in server.gets] == [path.rstrip("/") + "/index.json"]
        assert server.heads == []
        assert np.array_equal(np.asarray(found.open(0)), np.asarray(picture(1)))
        server.files |= {f"{path.rstrip('/')}/index.json": server.files[path]}  # whatever is asked, the picture comes
        assert np.array_equal(np.asarray(image_set(url).open(0)), np.asarray(picture(1)))


def test_a_folder_of_shards_with_a_query_ends_in_a_slash_where_it_is_one_of_several(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    write_pairs(Path("pairs"), 3)
    pack_folder(Path("pairs"), Path("shards"))
    with Server({f"/{path}": path.read_bytes() for path in Path("shards").iterdir()}) as server:
        of_shards = [f"{server.url}/shards/00000.tar:{n:09d}" for n in range(3)]
        assert keys([f"{server.url}/shards/?w=4", "photos/1.png"]) == [*of_shards, "photos/1.png"]
        assert keys([f"{server.url}/shards?w=4", "photos/1.png"]) == [f"{server.url}/shards?w=4", "photos/1.png"]
        assert keys(f"{server.url}/shards?w=4") == keys(f"{server.url}/shards/?w=4") == of_shards


def test_pictures_in_memory():
    pixels = np.asarray(picture(1))
    held = [picture(1), pixels, pixels.transpose(2, 0, 1), Path("photos/1.png").read_bytes(), "photos/1.png"]
    found = image_set(held)
    for index in range(len(held)):
        assert np.array_equal(np.asarray(found.open(index)), pixels), index
    assert len(image_set(np.stack([pixels, pixels]))) == 2
    assert len(image_set(pixels)) == len(image_set(picture())) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("sources", "says"),
    [
        ("photso", r"no file or folder photso; did you mean photos\?"),
        (["photos/0.png", "photos/O.png"], r"no file or folder photos/O\.png; did you mean photos/\d\.png"),
        ("photos/*.gif", r"nothing matches 'photos/\*\.gif'"),
        ("photos/{0,7}.png", r"no file or folder photos/7\.png"),
        ("notes.txt", r"no images in notes\.txt: 1 left out: neither a picture nor a caption \(\.txt\)"),
        ("empty", r"no images in empty: 1 left out: a folder without pictures"),
        ("pipe:ls", "scheme 'pipe'"),
        ([], "no images are named"),
        ([3], r"image 0 is 3; it must be a path, a URL"),
        (3, "images is 3; it must be a list of images or of their paths"),
        ([np.zeros((4, 4, 3))], "float64.*whole numbers"),
        ("sets", r"sets has the splits test, train; name one of them: sets/test"),
    ],
    ids=str,
)
def test_mistakes_are_named(sources, says):
    Path("notes.txt").write_text("a dog\n")
    Path("empty").mkdir()
    for split in ("test", "train"):
        Path(f"sets/{split}").mkdir(parents=True)
        Path(f"sets/{split}/nshards.txt").write_text("1")
    with pytest.raises(ValueError, match=says):
        image_set(sources)


@pytest.mark.parametrize(
    ("sources", "data", "says"),
    [
        (["-"], b"", "standard input is empty"),
        (["-", "-"], b"photos/0.png", "named twice"),
        (["-"], b"pipe:ls\n", "scheme 'pipe'"),
        (["-"], b"photos\n", r"no images in -: 1 left out: a folder, where names of files are read: 1 \(photos\)"),
    ],
)
def test_mistakes_of_standard_input_are_named(sources, data, says):
    with pytest.raises(ValueError, match=says):
        image_set(sources, **piped(data))


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def shown(found: Texts) -> list[tuple[str, str]]:
    assert len(found) == len(found.keys)
    return list(zip(found.keys, found.texts, strict=True))


def test_texts_of_files_folders_tables_shards_and_standard_input():
    table(Path("t.txt"), "a dog", "", "ein Bär")
    table(Path("u.csv"), "id,caption", "7,a cat", "8,")
    write_pairs(Path("pairs"), 2, captions=2)
    pack_folder(Path("pairs"), Path("shards"))
    found = text_set(["t.txt", "u.csv"])
    assert shown(found) == [("t.txt:1", "a dog"), ("t.txt:3", "ein Bär"), ("u.csv: row 1", "a cat")]
    assert found.metadata == {"id": [None, None, "7"]}
    assert {each.reason: each.count for each in found.left_out} == {"a blank line": 1, "a row without a text": 1}
    assert [text for _, text in shown(text_set("shards"))] == [
        f"picture {n}, caption {m}" for n in (0, 1) for m in (0, 1)
    ]
    assert [text for _, text in shown(text_set("pairs"))] == [
        f"picture {n}, caption {m}" for n in (0, 1) for m in (0, 1)
    ]
    assert "a picture, where texts are read: 2" in summary(text_set("pairs").left_out)
    assert shown(text_set("-", **piped("a dog\n\na cat"))) == [("line 1", "a dog"), ("line 3", "a cat")]
    assert shown(text_set("u.csv", text_columns=["id"]))[1] == ("u.csv: row 2", "8")


LATIN = "ein Bär".encode("latin-1")


def test_texts_of_a_folder_that_are_empty_or_of_another_encoding_are_counted():
    files = {
        "a": b"a cat\n",
        "b": b"",
        "c": b"\xef\xbb\xbf",
        "d": b" \n",
        "e": LATIN,
        "f": b"a dog",
        "g": b"\xef\xbb\xbf\n\n",
    }
    Path("texts").mkdir()
    for name, data in files.items():
        Path(f"texts/{name}.txt").write_bytes(data)
    found = text_set("texts")
    assert shown(found) == [("texts/a.txt:1", "a cat"), ("texts/f.txt:1", "a dog")]
    reasons = {each.source[6]: (each.reason, each.count) for each in found.left_out}
    assert reasons.pop("e")[0].startswith("not UTF-8 text: 'utf-8' codec can't decode byte 0xe4")
    empty, blank = "an empty text", "a blank line"
    assert reasons == {"b": (empty, 1), "c": (empty, 1), "d": (blank, 1), "g": (blank, 2)}
    with pytest.raises(ValueError, match=r"no texts in texts/e\.txt: 1 left out: not UTF-8 text"):
        text_set("texts/e.txt")


def test_a_text_that_cannot_be_read_is_one_left_out_in_shards_and_tables_too():
    with tarfile.open("0.tar", "w") as tar:
        for name, data in (("a.txt", b"<html>a dog</html>"), ("b.txt", b"a cat"), ("a.png", b"1"), ("b.png", b"2")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rows = [{"caption": {"what": "a dog"}}, {"caption": "a cat"}]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for source, key, reason in (
        ("0.tar", "0.tar:b", "its text is no caption but a page"),
        ("t.jsonl", "t.jsonl: row 2", "its caption is a mapping of 'what'"),
    ):
        found = text_set(source)
        assert shown(found) == [(key, "a cat")]
        assert [each.reason[: len(reason)] for each in found.left_out] == [reason]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("a red car", "no file or folder a red car"),
        ("photos/0.png", "no texts in photos/0.png.*a picture, where texts are read"),
        ("u.csv", r"u\.csv has no column for the captions.*'id'"),
    ],
)
def test_mistakes_of_texts_are_named(source, says):
    table(Path("u.csv"), "id,number", "7,8")
    with pytest.raises(ValueError, match=says):
        text_set(source)


def test_a_column_is_asked_for_of_what_has_none(tmp_path):
    write_picture(tmp_path / "a.png")
    (tmp_path / "t.txt").write_text("a cat")
    with pytest.raises(ValueError, match=rf"the column 'img' is asked for, and {tmp_path} has no columns; a table has"):
        image_set(tmp_path, image_column="img")
    with pytest.raises(ValueError, match=r"the column 'title' is asked for, and .*t\.txt has no columns"):
        text_set(tmp_path / "t.txt", text_columns=["title"])
    (tmp_path / "t.csv").write_text("img\na.png\n")
    assert len(image_set([tmp_path / "a.png", tmp_path / "t.csv"], image_column="img")) == 2
