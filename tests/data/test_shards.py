"""Pairs in, shards out: nothing is lost or changed on the way, and nothing is half written."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from command_line import fails
from helpers import (
    Served,
    all_members,
    everything_below,
    members,
    pack_folder,
    picture,
    rejected_rows,
    rejections,
    table,
    write_pairs,
    write_picture,
)
from PIL import Image
from servers import Server

from miniclip.commands import main as cli
from miniclip.common import storage
from miniclip.common.cache import Cache
from miniclip.data.indexing import index_tars
from miniclip.data.indexing.index_tars import index_shards
from miniclip.data.indexing.one_tar import index_tar
from miniclip.data.pack import pack
from miniclip.data.reading import tables
from miniclip.data.reading.cells import CAPTION_COLUMNS
from miniclip.data.reading.pair import Pair
from miniclip.data.reading.tables import IMAGE_COLUMNS
from miniclip.data.sample_files import Packing
from miniclip.data.shard_index import SCHEMA_VERSION, Packed
from miniclip.data.shards import Shards
from miniclip.data.sources import read_pairs

# ---------------------------------------------------------------------------------------------------------------------
# A folder as source


def test_folder_with_subfolders_spaces_and_umlauts_keeps_every_pair(tmp_path):
    source = tmp_path / "meine Bilder"
    names = ["plain.png", "with space.jpg", "sub folder/Grüße.png", "sub folder/deeper/猫.webp", "dots.in.name.jpg"]
    for seed, name in enumerate(names):
        path = write_picture(source / name, seed)
        path.with_suffix(".txt").write_text(f"Überschrift für {name}\n", encoding="utf-8")
    packed = pack_folder(source, tmp_path / "out")
    assert (packed.kept, packed.rejected, packed.shards) == (5, 0, 1)
    shards = Shards(tmp_path / "out")
    found = {record.captions[0]: record.image for record in map(shards.__getitem__, range(5))}
    assert found == {f"Überschrift für {name}": (source / name).read_bytes() for name in names}


def test_each_non_blank_line_of_a_text_file_is_one_caption(tmp_path):
    path = write_picture(tmp_path / "src" / "a.png")
    path.with_suffix(".txt").write_bytes("\ufeffeins \r\n\r\n  zwei\tund   drei  \nvier".encode())
    pack_folder(tmp_path / "src", tmp_path / "out")
    assert Shards(tmp_path / "out")[0].captions == ("eins", "zwei und drei", "vier")


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.jpg", {"quality": 60}),
        ("a.jpeg", {"progressive": True}),
        ("a.JPG", {}),
        ("a.png", {}),
        ("a.webp", {"lossless": True}),
    ],
)
def test_jpeg_png_and_webp_are_kept_byte_for_byte(tmp_path, name, options):
    path = write_picture(tmp_path / "src" / name, **options)
    path.with_suffix(".txt").write_text("one")
    pack_folder(tmp_path / "src", tmp_path / "out")
    assert Shards(tmp_path / "out")[0].image == path.read_bytes()
    suffix = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}[name.split(".")[1].lower()]
    assert set(all_members(tmp_path / "out")) == {f"000000000.{suffix}", "000000000.txt", "000000000.json"}


@pytest.mark.parametrize("name, mode", [("a.bmp", "RGB"), ("a.gif", "P"), ("a.tif", "RGB"), ("a.tiff", "L")])
def test_other_formats_are_stored_as_png_with_the_same_pixels(tmp_path, name, mode):
    path = write_picture(tmp_path / "src" / name, mode=mode)
    path.with_suffix(".txt").write_text("one")
    pack_folder(tmp_path / "src", tmp_path / "out")
    stored = Image.open(io.BytesIO(all_members(tmp_path / "out")["000000000.png"]))
    assert stored.format == "PNG"
    with Image.open(path) as original:
        assert np.array_equal(np.asarray(stored.convert("RGB")), np.asarray(original.convert("RGB")))


def test_a_png_that_is_called_jpg_is_stored_under_what_it_is(tmp_path):
    path = write_picture(tmp_path / "src" / "wrong.jpg", format="PNG")
    path.with_suffix(".txt").write_text("one")
    pack_folder(tmp_path / "src", tmp_path / "out")
    assert all_members(tmp_path / "out")["000000000.png"] == path.read_bytes()


def test_a_text_belongs_to_the_photograph_and_not_to_a_mask_of_the_same_name(tmp_path):
    write_picture(tmp_path / "src" / "a.png", 1)
    photograph = write_picture(tmp_path / "src" / "a.jpg", 2).read_bytes()
    (tmp_path / "src" / "a.txt").write_text("a red thing")
    packed = pack_folder(tmp_path / "src", tmp_path / "out")
    assert (packed.kept, packed.rejected) == (1, 1)
    assert Shards(tmp_path / "out")[0].image == photograph
    assert "a.jpg has the same name" in rejections(tmp_path / "out")["a.png"]


def test_the_json_of_a_sample_tells_its_source_and_stored_size(tmp_path):
    path = write_picture(tmp_path / "src" / "sub" / "ä.png", size=(31, 17))
    path.with_suffix(".txt").write_text("one")
    pack_folder(tmp_path / "src", tmp_path / "out")
    facts = json.loads(all_members(tmp_path / "out")["000000000.json"])
    assert facts == {"source": "sub/ä.png", "width": 31, "height": 17}


# ---------------------------------------------------------------------------------------------------------------------
# A table as source


@pytest.mark.parametrize(
    "suffix, separator", [(".csv", ","), (".tsv", "\t"), (".csv", ";"), (".CSV", ","), (".tsv", ",")]
)
def test_the_separator_of_a_table_is_found_out(tmp_path, suffix, separator):
    path = write_picture(tmp_path / "pictures" / "a b.png")
    source = table(
        tmp_path / f"pairs{suffix}",
        separator.join(["filepath", "title"]),
        separator.join(["pictures/a b.png", "ein Bild"]),
    )
    pack_folder(source, tmp_path / "out")
    record = Shards(tmp_path / "out")[0]
    assert record.captions == ("ein Bild",)
    assert record.image == path.read_bytes()


@pytest.mark.parametrize("column", [*IMAGE_COLUMNS, "FilePath", " Image "])
def test_the_image_column_is_known_by_any_of_its_names(tmp_path, column):
    write_picture(tmp_path / "a.png")
    (pair,) = read_pairs(table(tmp_path / "pairs.csv", f"id,{column},caption", "7,a.png,words"))
    assert (pair.image, pair.captions, pair.problem, pair.extra) == (tmp_path / "a.png", ("words",), None, {"id": "7"})


@pytest.mark.parametrize("column", [*CAPTION_COLUMNS, "TITLE", " Text "])
def test_the_caption_column_is_known_by_any_of_its_names(tmp_path, column):
    write_picture(tmp_path / "a.png")
    (pair,) = read_pairs(table(tmp_path / "pairs.csv", f"filename,{column}", "a.png,words"))
    assert (pair.image, pair.captions, pair.problem) == (tmp_path / "a.png", ("words",), None)


def test_a_byte_order_mark_before_the_header_does_no_harm(tmp_path):
    write_picture(tmp_path / "a.png")
    (pair,) = read_pairs(table(tmp_path / "pairs.csv", "filepath,title", "a.png,Käse", encoding="utf-8-sig"))
    assert (pair.problem, pair.captions) == (None, ("Käse",))


def test_paths_may_be_absolute_or_relative_to_the_table(tmp_path, monkeypatch):
    elsewhere = write_picture(tmp_path / "elsewhere" / "a.png", 1)
    write_picture(tmp_path / "tables" / "b.png", 2)
    source = table(tmp_path / "tables" / "pairs.csv", "filepath,title", f"{elsewhere},one", "b.png,two")
    monkeypatch.chdir(tmp_path)
    assert pack_folder(source, tmp_path / "out").kept == 2


def test_a_quoted_cell_is_one_caption_with_separators_quotes_and_paragraphs(tmp_path):
    write_picture(tmp_path / "a.png")
    source = table(tmp_path / "pairs.csv", "filepath,title", 'a.png,"a ""red"", round', "", 'ball, or two"')
    pack_folder(source, tmp_path / "out")
    assert Shards(tmp_path / "out")[0].captions == ('a "red", round ball, or two',)


def test_further_columns_end_up_in_the_json(tmp_path):
    write_picture(tmp_path / "a.png")
    source = table(tmp_path / "pairs.csv", "licence,filepath,title,Größe", "CC-BY,a.png,words,groß")
    pack_folder(source, tmp_path / "out")
    facts = json.loads(all_members(tmp_path / "out")["000000000.json"])
    assert facts == {"licence": "CC-BY", "Größe": "groß", "source": "a.png", "width": 24, "height": 20}


def test_a_row_with_too_few_cells_is_rejected_alone(tmp_path):
    write_picture(tmp_path / "a.png")
    write_picture(tmp_path / "b.png")
    source = table(tmp_path / "pairs.csv", "filepath,title", "a.png", "b.png,words")
    packed = pack_folder(source, tmp_path / "out")
    assert (packed.kept, packed.rejected) == (1, 1)
    assert rejections(tmp_path / "out") == {"a.png": "every caption is empty"}


@pytest.mark.parametrize(
    "lines",
    [(",filepath,title", "0,a.png,words"), ("filepath,title,", "a.png,words,")],
    ids=["index column of pandas", "comma at the end of every line"],
)
def test_a_column_without_a_name_does_no_harm(tmp_path, lines):
    write_picture(tmp_path / "a.png")
    (pair,) = read_pairs(table(tmp_path / "pairs.csv", *lines))
    assert (pair.problem, pair.captions) == (None, ("words",))


def test_a_row_with_too_many_cells_is_named_by_its_line(tmp_path):
    source = table(tmp_path / "pairs.csv", "filepath,title", 'a.png,"two', 'lines"', "b.png,red, round")
    with pytest.raises(ValueError, match=r"pairs\.csv, line 4: more cells than the 2 columns \(filepath, title\)"):
        read_pairs(source)


def test_an_unclosed_quote_swallows_no_row_silently(tmp_path):
    write_picture(tmp_path / "a.png")
    source = table(tmp_path / "pairs.tsv", "filepath\ttitle", 'a.png\t"one', "a.png\ttwo", "a.png\tthree")
    try:
        pairs = read_pairs(source)
    except ValueError as error:
        assert "pairs.tsv" in str(error)  # noqa: PT017 (refusing the table or reading all its rows are both fine)
    else:
        assert len(pairs) == 3


def test_a_caption_of_a_hundred_thousand_words_is_no_crash(tmp_path):
    write_picture(tmp_path / "a.png")
    (pair,) = read_pairs(table(tmp_path / "pairs.csv", "filepath,title", "a.png," + "word " * 100_000))
    assert pair.captions[0].split() == ["word"] * 100_000


@pytest.mark.parametrize("is_zipped", [True, False])
def test_a_table_that_memory_has_no_room_for_is_named_before_it_is_unpacked(tmp_path, monkeypatch, is_zipped, capsys):
    text = b"image,caption\n" + bytes(2**27)
    path = tmp_path / f"t.csv{'.gz' if is_zipped else ''}"
    path.write_bytes(gzip.compress(text, 1) if is_zipped else text)
    monkeypatch.setattr(tables, "free_memory", lambda: 2**27)
    tracemalloc.start()
    said = fails(capsys, ["shards", str(path), str(tmp_path / "out")])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"error: {path} has 33,554,432 bytes of text or more, too many for the memory that is free" in said
    assert peak < 2**27


def test_a_table_is_read_where_the_system_does_not_say_what_memory_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "free_memory", lambda: None)
    _, rows = tables.read_table(table(tmp_path / "t.csv", "image,caption", "a.png,b"))
    assert list(rows) == [{"image": "a.png", "caption": "b"}]


def test_a_lack_of_memory_is_a_sentence_and_no_traceback(tmp_path, monkeypatch, capsys):
    def lack(*_):
        raise MemoryError("Unable to allocate 3 TiB")

    monkeypatch.setattr(tables, "_parse_csv", lack)
    said = fails(capsys, ["shards", str(table(tmp_path / "t.csv", "image,caption", "a.png,b")), str(tmp_path / "out")])
    assert (
        "error: the memory of this machine, or what this process may have of it, is not enough. Unable to all" in said
    )
    assert "Traceback" not in said


@pytest.mark.parametrize("missing", ["filepath", "title"])
def test_a_missing_column_names_those_there_are_and_those_wanted(tmp_path, missing):
    columns = [column for column in ("filepath", "title") if column != missing] + ["Höhe"]
    wanted = IMAGE_COLUMNS if missing == "filepath" else CAPTION_COLUMNS
    with pytest.raises(ValueError, match="has no column for") as caught:
        read_pairs(table(tmp_path / "pairs.csv", ",".join(columns), "x,y"))
    for name in (*columns, *wanted, "pairs.csv"):
        assert name in str(caught.value)


def test_an_empty_table_says_what_its_first_line_must_be(tmp_path):
    with pytest.raises(ValueError, match=r"pairs\.csv is empty; its first line must name the columns"):
        read_pairs(table(tmp_path / "pairs.csv"))


def test_a_table_of_columns_alone_is_said_to_have_no_rows(tmp_path):
    source = table(tmp_path / "pairs.csv", "filepath,title")
    with pytest.raises(ValueError, match="no pairs found") as caught:
        pack_folder(source, tmp_path / "out")
    assert ".txt" not in str(caught.value)  # a table's owner has no .txt files to look for


def test_a_table_that_is_not_utf8_is_named(tmp_path):
    source = table(tmp_path / "pairs.csv", "filepath,title", "a.png,Käse", encoding="latin-1")
    with pytest.raises(ValueError, match=r"pairs\.csv is not UTF-8 text"):
        read_pairs(source)


@pytest.mark.parametrize(
    "name, says",
    [
        ("nowhere", "no folder or file .*nowhere"),
        ("notes.xlsx", r"notes\.xlsx is an Excel file; save it as CSV"),
        ("notes.bin", r"notes\.bin is no text"),
    ],
)
def test_a_source_that_is_none_is_named(tmp_path, name, says):
    (tmp_path / "notes.xlsx").write_bytes(b"PK")
    (tmp_path / "notes.bin").write_bytes(b"\0\1\2")
    with pytest.raises(ValueError, match=says):
        read_pairs(tmp_path / name)


def test_a_folder_without_pictures_and_texts_says_what_was_looked_for(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "readme.md").write_text("nothing here")
    before = everything_below(tmp_path)
    with pytest.raises(ValueError, match=r"no pairs found in .*src: it holds no image \(\.jpg.*\) with a \.txt"):
        pack_folder(tmp_path / "src", tmp_path / "out")
    assert everything_below(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------
# What is left out, and why


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil(folder: Path, what: str) -> str:
    """Writes one bad pair, and returns the name that the user knows it by."""
    path = folder / f"bad {what}.png"
    text = path.with_suffix(".txt")
    if what == "no text":
        write_picture(path)
    elif what == "no image":
        text.write_text("alone")
        return text.name
    elif what == "empty captions":
        write_picture(path)
        text.write_text("")
    elif what == "blank captions":
        write_picture(path)
        text.write_text(" \t\n\n\u00a0\n", encoding="utf-8")
    elif what == "text called jpg":
        path = path.with_suffix(".jpg")
        path.write_text("this is no picture")
        text.write_text("words")
    elif what in ("truncated jpg", "truncated png", "truncated webp"):
        path = write_picture(path.with_suffix("." + what.split()[1]), size=(64, 64))
        half(path)
        text.write_text("words")
    elif what == "only a header":
        path = write_picture(path.with_suffix(".jpg"))
        path.write_bytes(path.read_bytes()[:20])
        text.write_text("words")
    elif what == "empty file":
        path.write_bytes(b"")
        text.write_text("words")
    elif what == "not utf8":
        write_picture(path)
        text.write_bytes("Käse".encode("latin-1"))
    return path.name


REASONS = {
    "no text": "no captions: there is no bad no text.txt",
    "no image": "no image",
    "empty captions": "every caption is empty",
    "blank captions": "every caption is empty",
    "text called jpg": "not an image",
    "truncated jpg": "unreadable image",
    "truncated png": "unreadable image",
    "truncated webp": "image",
    "only a header": "image",
    "empty file": "not an image that can be read (0 bytes)",
    "not utf8": "not utf8.txt is not UTF-8 text",
}


@pytest.mark.parametrize("what", REASONS)
def test_a_bad_pair_is_left_out_and_listed_with_its_reason(tmp_path, what):
    source = write_pairs(tmp_path / "src", 3)
    name = spoil(source, what)
    pairs = read_pairs(source)
    packed = pack(pairs, tmp_path / "out", source=str(source))
    assert (packed.kept, packed.rejected, len(pairs)) == (3, 1, 4)
    found = rejections(tmp_path / "out")
    assert list(found) == [name]
    assert REASONS[what] in found[name]


def test_kept_and_rejected_add_up_to_the_pairs(tmp_path):
    source = write_pairs(tmp_path / "src", 4)
    names = {spoil(source, what) for what in REASONS}
    pairs = read_pairs(source)
    packed = pack(pairs, tmp_path / "out", source="here", packing=Packing(samples_per_shard=3))
    assert packed.kept + packed.rejected == len(pairs) == 4 + len(REASONS)
    assert set(rejections(tmp_path / "out")) == names
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["samples"], index["rejected"], index["source"]) == (4, len(REASONS), "here")
    assert sum(shard["samples"] for shard in index["shards"]) == len(Shards(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    "name", ["gone.png", "", ".", "nul\0.png", "long" * 100 + ".png"], ids=["gone", "blank", "folder", "nul", "long"]
)
def test_a_path_in_a_table_that_is_no_file_is_rejected_alone(tmp_path, name):
    write_picture(tmp_path / "a.png")
    source = table(tmp_path / "pairs.csv", "filepath,title", "a.png,words", f"{name},words")
    packed = pack_folder(source, tmp_path / "out")
    assert (packed.kept, packed.rejected) == (1, 1)
    (found,) = rejections(tmp_path / "out").items()
    assert found[0] == (name or "row 1")
    assert ("no image file" if name else "no image in this row") in found[1]


def test_a_picture_that_vanishes_after_listing_is_rejected_alone(tmp_path):
    source = write_pairs(tmp_path / "src", 3)
    pairs = read_pairs(source)
    (source / "0001.png").unlink()
    packed = pack(pairs, tmp_path / "out", source="src")
    assert (packed.kept, packed.rejected) == (2, 1)
    assert list(rejections(tmp_path / "out")) == ["0001.png"]


def test_rejected_csv_of_a_clean_source_holds_its_header_alone(tmp_path):
    pack_folder(write_pairs(tmp_path / "src", 2), tmp_path / "out")
    assert rejections(tmp_path / "out") == {}


def test_a_source_with_nothing_usable_raises_with_reasons_and_leaves_nothing(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    names = [spoil(source, what) for what in ("no text", "no image", "empty file")]
    before = everything_below(tmp_path)
    with pytest.raises(ValueError, match=r"none of the 3 pairs in .*src can be used") as caught:
        pack_folder(source, tmp_path / "out")
    for name, what in zip(names, ("no text", "no image", "empty file"), strict=True):
        assert name in str(caught.value)
        assert REASONS[what] in str(caught.value)
    assert everything_below(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------
# Writing: whole or not at all, and nothing overwritten unasked


def test_an_existing_folder_is_refused_and_stays_as_it_was(tmp_path):
    source = write_pairs(tmp_path / "src", 2)
    pack_folder(source, tmp_path / "out")
    before = everything_below(tmp_path)
    write_picture(source / "new.png").with_suffix(".txt").write_text("new")
    with pytest.raises(ValueError, match=r"out exists already; pass --overwrite"):
        pack_folder(source, tmp_path / "out")
    after = everything_below(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"src/new.png", "src/new.txt"}


def test_overwrite_replaces_all_of_the_old_shards(tmp_path):
    pack_folder(write_pairs(tmp_path / "many", 6), tmp_path / "out", samples_per_shard=1)
    pack_folder(write_pairs(tmp_path / "few", 2), tmp_path / "out", overwrite=True)
    assert len(Shards(tmp_path / "out")) == 2
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "00000.npz",
        "00000.tar",
        "index.json",
        "rejected.csv",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["few", "many", "out"]


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file"])
def test_overwrite_never_replaces_what_is_no_folder_of_shards(tmp_path, kind):
    source = write_pairs(tmp_path / "src", 2)
    if kind == "file":
        (tmp_path / "out").write_text("a year's work")
    else:
        (tmp_path / "out").mkdir()
        if kind == "folder":
            (tmp_path / "out" / "thesis.tex").write_text("a year's work")
    before = everything_below(tmp_path)
    with pytest.raises(ValueError, match=r"out is not a folder of shards \(it has no index\.json\)"):
        pack_folder(source, tmp_path / "out", overwrite=True)
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_in_the_middle_leaves_what_is_done_to_go_on_from_and_all_else_as_it_was(tmp_path, error, overwrite):
    source = write_pairs(tmp_path / "src", 4)
    if overwrite:
        pack_folder(source, tmp_path / "out", samples_per_shard=3)
    before = everything_below(tmp_path)

    def fail(done: int) -> None:
        raise error("stop")

    with pytest.raises(error, match="stop"):
        pack_folder(source, tmp_path / "out", samples_per_shard=2, overwrite=overwrite, progress=fail)
    after = everything_below(tmp_path)
    assert {name: after[name] for name in before} == before
    new = sorted(name for name in after if name not in before)
    assert new[0] == "out.partial"
    assert all(name.startswith("out.partial/") for name in new[1:])
    assert "out.partial/chunk-00000-train-0.tar" in new
    pack_folder(source, tmp_path / "out", samples_per_shard=2, overwrite=overwrite)
    pack_folder(source, tmp_path / "again", samples_per_shard=2)
    assert everything_below(tmp_path / "out") == everything_below(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out", "src"]


def test_progress_is_told_of_all_pairs_in_the_end(tmp_path):
    done: list[int] = []
    pairs = list(read_pairs(write_pairs(tmp_path / "src", 3))) * 100
    pack(pairs, tmp_path / "out", source="src", packing=Packing(samples_per_shard=128), progress=done.append)
    assert done == sorted(done)
    assert done[-1] == 300
    assert len(set(done)) >= 4  # not only when a shard is complete


def test_parent_folders_of_the_output_are_made(tmp_path):
    pack_folder(write_pairs(tmp_path / "src", 2), tmp_path / "a" / "b" / "out")
    assert len(Shards(tmp_path / "a" / "b" / "out")) == 2


@pytest.mark.parametrize(
    "name, value", [("samples_per_shard", 0), ("resize", 0), ("workers", -1), ("quality", 0), ("quality", 96)]
)
def test_an_argument_out_of_its_range_is_named_with_its_value(tmp_path, name, value):
    source = write_pairs(tmp_path / "src", 1)
    with pytest.raises(ValueError, match=f"{name} is {value}; "):
        pack_folder(source, tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "count, per_shard, expected", [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (2, 3, [2]), (3, 1, [1, 1, 1])]
)
def test_every_shard_is_full_but_the_last(tmp_path, count, per_shard, expected):
    packed = pack_folder(write_pairs(tmp_path / "src", count), tmp_path / "out", samples_per_shard=per_shard)
    assert Shards(tmp_path / "out").counts.tolist() == expected
    assert (packed.kept, packed.shards) == (count, len(expected))
    assert packed.size_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))


def test_a_rejected_pair_leaves_its_number_out_and_its_shard_smaller(tmp_path):
    source = write_pairs(tmp_path / "src", 4)
    write_picture(source / "0000a no text.png")
    pack_folder(source, tmp_path / "out", samples_per_shard=2)
    assert Shards(tmp_path / "out").counts.tolist() == [1, 2, 1]
    assert [record.key for record in Shards(tmp_path / "out")] == [f"{n:09d}" for n in (0, 2, 3, 4)]
    ((key, name, _),) = rejected_rows(tmp_path / "out")
    assert (key, name) == ("000000001", "0000a no text.png")


def test_a_chunk_of_rejected_pairs_alone_makes_no_shard(tmp_path):
    source = write_pairs(tmp_path / "src", 4)
    for name in ("0001a.png", "0001b.png"):
        write_picture(source / name)
    packed = pack_folder(source, tmp_path / "out", samples_per_shard=2)
    assert (packed.kept, packed.rejected, packed.shards) == (4, 2, 2)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert Shards(tmp_path / "out").counts.tolist() == [2, 2]


def test_writing_twice_gives_the_same_bytes_whatever_the_threads(tmp_path):
    source = write_pairs(tmp_path / "src", 9, size=(40, 30))
    for name, workers in (("one", 1), ("four", 4)):
        pack_folder(source, tmp_path / name, samples_per_shard=4, resize=16, workers=workers)
    assert everything_below(tmp_path / "one") == everything_below(tmp_path / "four")


# ---------------------------------------------------------------------------------------------------------------------
# Shrinking


def packed_picture(folder: Path, size: tuple[int, int], mode: str = "RGB", **options: int) -> tuple[Image.Image, Path]:
    path = folder / "src" / "a.png"
    path.parent.mkdir()
    gradient = Image.linear_gradient("L").resize(size)
    Image.merge("RGB", (gradient, gradient.transpose(Image.Transpose.FLIP_TOP_BOTTOM), gradient)).convert(mode).save(
        path
    )
    path.with_suffix(".txt").write_text("one")
    pack_folder(path.parent, folder / "out", **options)
    return Image.open(io.BytesIO(Shards(folder / "out")[0].image)), path


@pytest.mark.parametrize(
    "size, expected", [((200, 100), (64, 32)), ((100, 200), (32, 64)), ((100, 100), (32, 32)), ((33, 99), (32, 96))]
)
def test_resize_shrinks_the_short_side_and_keeps_the_aspect(tmp_path, size, expected):
    stored, path = packed_picture(tmp_path, size, resize=32)
    assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", expected)
    with Image.open(path) as original:
        wanted = np.asarray(original.resize(expected, Image.Resampling.LANCZOS), dtype=float)
    assert np.abs(np.asarray(stored, dtype=float) - wanted).mean() < 3
    facts = json.loads(all_members(tmp_path / "out")["000000000.json"])
    assert (facts["width"], facts["height"]) == expected


@pytest.mark.parametrize("size", [(32, 32), (32, 500), (31, 31), (8, 200)])
def test_resize_never_enlarges_nor_touches_what_is_small_enough(tmp_path, size):
    stored, path = packed_picture(tmp_path, size, resize=32)
    assert stored.size == size
    assert Shards(tmp_path / "out")[0].image == path.read_bytes()


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "1"])
def test_resize_takes_pictures_of_any_kind(tmp_path, mode):
    stored, _ = packed_picture(tmp_path, (80, 60), mode, resize=30)
    assert (stored.mode, stored.size) == ("RGB", (40, 30))


def test_a_very_long_strip_keeps_at_least_one_pixel(tmp_path):
    stored, _ = packed_picture(tmp_path, (3000, 2), resize=1)
    assert stored.size == (1500, 1)


def test_a_lower_quality_gives_fewer_bytes(tmp_path):
    sizes = {}
    for quality in (30, 95):
        (tmp_path / str(quality)).mkdir()
        sizes[quality] = pack_folder_of_noise(tmp_path / str(quality), quality)
    assert sizes[30] < 0.7 * sizes[95]


def pack_folder_of_noise(folder: Path, quality: int) -> int:
    pack_folder(write_pairs(folder / "src", 1, size=(100, 80)), folder / "out", resize=60, quality=quality)
    return len(Shards(folder / "out")[0].image)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """11 samples of several formats in shards of 4, not to be changed."""
    folder = tmp_path_factory.mktemp("shelf")
    for number in range(11):
        suffix = ("png", "jpg", "webp", "bmp")[number % 4]
        path = write_picture(folder / "src" / f"{number:02d}.{suffix}", number, size=(20 + number, 30))
        path.with_suffix(".txt").write_text("\n".join(f"Bild {number} – {line}" for line in range(1 + number % 3)))
    pack_folder(folder / "src", folder / "out", samples_per_shard=4)
    return folder / "out"


@pytest.fixture
def copy(shelf, tmp_path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(shelf, tmp_path / "copy"))


STORED = ("jpg", "png", "webp", "txt", "json")


def test_webdataset_reads_the_same_samples_from_the_tars(shelf):
    import webdataset

    urls = [str(path) for path in sorted(shelf.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    ours = Shards(shelf)
    assert len(theirs) == len(ours) == 11
    for number, sample in enumerate(theirs):
        record = ours[number]
        (image,) = (sample[suffix] for suffix in ("jpg", "png", "webp") if suffix in sample)
        assert sample["__key__"] == record.key == f"{number:09d}"
        assert image == record.image
        assert sample["txt"].decode("utf-8") == "\n".join(record.captions)
        assert json.loads(sample["json"])["width"] == 20 + number


def test_a_tar_has_the_bytes_that_webdatasets_writer_gives_for_its_samples(shelf, tmp_path):
    import webdataset

    tars = sorted(shelf.glob("*.tar"))
    assert len(tars) == 3
    for path in tars:
        with webdataset.TarWriter(
            str(tmp_path / path.name), encoder=False, mtime=0, user="", group="", mode=0o644
        ) as writer:
            for sample in webdataset.WebDataset(str(path), shardshuffle=False):
                writer.write({name: value for name, value in sample.items() if name in ("__key__", *STORED)})
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_each_number_reads_what_tarfile_finds_under_its_key_in_any_order(shelf):
    content = all_members(shelf)
    shards = Shards(shelf)
    for number in np.random.default_rng(0).permutation(11).tolist() * 2:
        record = shards[number]
        assert record.key == f"{number:09d}"
        (image,) = (
            content[name] for name in content if name.startswith(record.key) and name[-3:] not in ("txt", "son")
        )
        assert record.image == image
        assert list(record.captions) == content[f"{record.key}.txt"].decode("utf-8").split("\n")


def test_the_index_tells_count_size_and_checksum_of_every_tar(shelf):
    index = json.loads((shelf / "index.json").read_text(encoding="utf-8"))
    assert [shard["file"] for shard in index["shards"]] == [path.name for path in sorted(shelf.glob("*.tar"))]
    for shard in index["shards"]:
        data = (shelf / shard["file"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        assert shard["samples"] == sum(name.endswith(".txt") for name in members(shelf / shard["file"]))


def test_locate_tells_shard_and_place_of_every_number(shelf):
    shards = Shards(shelf)
    assert [shards.locate(n) for n in range(11)] == [(n // 4, n % 4) for n in range(11)]


@pytest.mark.parametrize("number", [11, -1, 10**9])
def test_a_number_out_of_range_is_an_index_error(shelf, number):
    with pytest.raises(IndexError, match=f"sample {number} of 11"):
        Shards(shelf)[number]


def test_shards_can_be_iterated_over(shelf):
    assert [record.key for record in Shards(shelf)] == [f"{n:09d}" for n in range(11)]


def test_shards_travel_to_another_process_without_their_open_files(shelf):
    shards = Shards(shelf)
    first = shards[0]
    twin = pickle.loads(pickle.dumps(shards))
    assert not twin._open
    assert twin[0] == first
    assert [record.key for record in twin] == [record.key for record in shards]


def open_tars(folder: Path) -> int:
    links = (Path("/proc/self/fd") / name for name in Path("/proc/self/fd").iterdir())
    return sum(link.is_symlink() and str(link.readlink()).startswith(str(folder)) for link in links)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files through /proc")
def test_no_more_than_64_shards_are_open_at_once(tmp_path):
    source = write_pairs(tmp_path / "src", 1)
    out = tmp_path / "out"
    pack(list(read_pairs(source)) * 70, out, source="src", packing=Packing(samples_per_shard=1))
    shards = Shards(out)
    wanted = (source / "0000.png").read_bytes()
    for _ in range(2):
        for number in range(70):
            assert shards[number].image == wanted
            assert open_tars(out) <= 64
    assert open_tars(out) == 64


def test_opening_reads_the_index_alone(copy):
    for path in copy.glob("0*"):
        path.unlink()
    assert len(Shards(copy)) == 11


def test_a_tar_from_elsewhere_can_be_indexed(tmp_path):
    """img2dataset's layout, other order of members, keys with a folder."""
    images = {}
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for key in ("part/7", "part/8"):
            buffer = io.BytesIO()
            picture(int(key[-1])).save(buffer, "JPEG")
            images[key] = buffer.getvalue()
            for name, data in ((f"{key}.json", b"{}"), (f"{key}.JPG", images[key]), (f"{key}.txt", b"words")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    found = index_tar(str(tmp_path / "00000.tar"), tmp_path / "offsets.npz", Cache())
    assert not found.left_out
    assert found.entry["members"] == {"json": 2, "image": 2, "txt": 2}
    index_shards(str(tmp_path))
    assert {record.key: record.image for record in Shards(tmp_path)} == images


def test_a_folder_without_an_index_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(ValueError, match=r"not a folder of shards: it has no index\.json\. `miniclip shards SRC OUT`"):
        Shards(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere is not a folder of shards: it does not exist\. `miniclip shards"):
        Shards(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"schema": 2, "shards": [{"file": "000',
        "[]",
        "{}",
        "\x00\xff",
        '{"schema": 2}',
        '{"schema": 2, "shards": 3, "members": {}}',
        '{"schema": 2, "shards": [], "members": 3}',
        '{"schema": 2, "shards": [{"file": "00000.tar"}], "members": {}}',
        '{"schema": 2, "shards": [{"file": "00000.tar", "samples": "many", "bytes": 1, "sha256": "", "offsets": "",'
        ' "offsets_sha256": ""}], "members": {}}',
    ],
)
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is damaged.*write the shards again") as caught:
        Shards(tmp_path)
    assert "Error(" not in str(caught.value)


@pytest.mark.usefixtures("_loopback")
def test_an_index_whose_connection_breaks_is_not_said_to_be_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_WAITS_S", (0.001,) * 5)
    pack_folder(write_pairs(tmp_path / "src", 1), tmp_path / "out")
    index = (tmp_path / "out/index.json").read_bytes()
    with Server({"/index.json": index}) as server:
        server.fault = lambda number: 9 if server.gets else None  # HEAD is answered
        with pytest.raises(ValueError, match="ConnectionError: the connection ended after 9 of") as caught:
            Shards(server.url)
    assert str(caught.value).startswith(f"{server.url}/index.json can't be read (6 tries): ")
    assert "damaged" not in str(caught.value)
    assert "again" not in str(caught.value)


@pytest.mark.parametrize("schema", [1, SCHEMA_VERSION + 1])
def test_an_index_of_another_schema_names_both_versions_and_the_command_that_helps(copy, shelf, schema):
    """Version 1 is what miniclip 1 wrote: the same tars, less told of them."""
    index = json.loads((copy / "index.json").read_text())
    shards = [{name: shard[name] for name in ("file", "samples", "bytes", "sha256")} for shard in index["shards"]]
    (copy / "index.json").write_text(json.dumps({"schema": schema, "shards": shards}))
    with pytest.raises(
        ValueError,
        match=rf"index\.json has schema {schema}, this version of miniclip reads {SCHEMA_VERSION}; "
        rf"`miniclip shards {copy} --index-only --overwrite`",
    ):
        Shards(copy)
    index_shards(str(copy), overwrite=True)
    assert list(Shards(copy)) == list(Shards(shelf))


def test_a_vanished_tar_is_named_and_the_others_still_read(copy):
    (copy / "00001.tar").unlink()
    shards = Shards(copy)
    assert shards[0].key == "000000000"
    with pytest.raises(ValueError, match=r"shard .*00001\.tar can't be read"):
        shards[4]
    assert shards[8].key == "000000008"


def test_a_tar_that_is_cut_short_is_named_with_the_sample(copy):
    with np.load(copy / "00000.npz") as arrays:
        offset, size = arrays["image"][3]
    with open(copy / "00000.tar", "r+b") as file:
        file.truncate(offset + size - 1)
    shards = Shards(copy)
    assert shards[2].key == "000000002"
    with pytest.raises(
        ValueError, match=rf"00000\.tar is cut short: sample 000000003 should end at byte {offset + size}"
    ):
        shards[3]


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "gone", "few samples"])
def test_a_damaged_offset_file_is_a_value_error_that_names_the_shard(copy, damage):
    path = copy / "00000.npz"
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "few samples":
        shutil.copy(copy / "00002.npz", path)
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "garbage": b"garbage" * 50}[damage])
    with pytest.raises(ValueError, match=r"00000\.(tar|npz)"):
        Shards(copy)[3]


def test_a_pair_of_the_api_needs_no_file_on_disk_to_be_rejected(tmp_path):
    good = write_picture(tmp_path / "a.png")
    pairs = [Pair("good", good, ("words",)), Pair("bad", problem="its owner said so")]
    assert pack(pairs, tmp_path / "out", source="a script").rejected == 1
    assert rejections(tmp_path / "out") == {"bad": "its owner said so"}


@pytest.mark.parametrize("name", ["../x.tar", "https://example.org/x.tar::y", "pipe:cat /etc/passwd"])
def test_an_index_that_leads_out_of_its_folder_or_to_a_program_is_refused(copy, name):
    index = json.loads((copy / "index.json").read_text())
    index["shards"][0]["file"] = name
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"leads out of it|is refused|has the scheme"):
        Shards(copy)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Folders, patterns, lists of them


@pytest.mark.parametrize(
    "names, numbers",
    [
        (["{00000..00002}.tar"], range(11)),
        (["00001.tar"], range(4, 8)),
        (["{00002,00000}.tar"], [8, 9, 10, 0, 1, 2, 3]),
        (["00002.tar", "{00000..00001}.tar"], [8, 9, 10, *range(8)]),
        (["", "00001.tar"], [*range(11), *range(4, 8)]),
    ],
)
def test_patterns_and_lists_name_some_of_the_shards_in_their_order(shelf, names, numbers):
    all_of_them = list(Shards(shelf))
    shards = Shards([f"{shelf}/{name}" for name in names])
    assert list(shards) == [all_of_them[number] for number in numbers]
    assert len(shards.num_shards) == len(names)
    assert sum(shards.num_shards) == len(shards.counts) == len(shards.entries)


def test_folders_are_numbered_one_after_the_other(tmp_path, shelf):
    pack_folder(write_pairs(tmp_path / "src", 3), tmp_path / "out")
    shards = Shards([tmp_path / "out", shelf])
    assert list(shards) == [*Shards(tmp_path / "out"), *Shards(shelf)]
    assert shards.num_shards == [1, 3]
    assert shards.counts.tolist() == [3, 4, 4, 3]


def test_a_pattern_that_names_a_shard_which_is_not_there_says_which(shelf):
    with pytest.raises(ValueError, match=r"index\.json lists no 00003\.tar, 00004\.tar; it has 3 shards"):
        Shards(f"{shelf}/{{00000..00004}}.tar")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.tar", ["00000.tar", "00001.tar", "00002.tar"]),
        ("0000[12].tar", ["00001.tar", "00002.tar"]),
        ("{00002,0000?}.tar", ["00002.tar", "00000.tar", "00001.tar", "00002.tar"]),
    ],
)
def test_a_pattern_with_stars_names_the_shards_of_the_index_that_match(shelf, pattern, names):
    assert [entry.name for entry in Shards(f"{shelf}/{pattern}").entries] == names


def test_a_pattern_that_matches_no_shard_is_an_error(shelf):
    with pytest.raises(ValueError, match=r"index\.json lists no 1\*\.tar; it has 3 shards"):
        Shards(f"{shelf}/1*.tar")


def test_a_pattern_over_several_folders_asks_for_a_list(shelf):
    with pytest.raises(ValueError, match="names tars of several folders; give a list of patterns"):
        Shards(f"{shelf.parent}/{{out,other}}/00000.tar")


def test_info_tells_what_the_json_of_each_sample_says(shelf):
    shards = Shards(shelf)
    for number in (10, 0, 4):
        suffix = ("png", "jpg", "webp", "bmp")[number % 4]
        assert shards.info(number) == {"source": f"{number:02d}.{suffix}", "width": 20 + number, "height": 30}


# ---------------------------------------------------------------------------------------------------------------------
# Tars from elsewhere


def encoded(suffix: str, seed: int) -> bytes:
    buffer = io.BytesIO()
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[suffix.lower()]
    picture(seed).save(buffer, kind)
    return buffer.getvalue()


def write_foreign(folder: Path, tars: int = 2, per_tar: int = 3, suffix: str = "jpg", members=("txt", "json")) -> Path:
    """As img2dataset does: by webdataset's writer, keys of nine digits."""
    from webdataset import TarWriter

    folder.mkdir(parents=True)
    for tar in range(tars):
        with TarWriter(str(folder / f"{tar:05d}.tar"), encoder=False) as writer:
            for place in range(per_tar):
                number = tar * per_tar + place
                beside = {
                    "txt": f"Satz {number}".encode(),
                    "json": json.dumps({"url": f"https://example.org/{number}", "width": 24}).encode(),
                    "cls": str(number % 3).encode(),
                }
                image = encoded(suffix, number)
                writer.write({"__key__": f"{number:09d}", suffix: image, **{name: beside[name] for name in members}})
    return folder


def check_foreign(shards: Shards, count: int = 6, suffix: str = "jpg") -> None:
    assert [record.key for record in shards] == [f"{n:09d}" for n in range(count)]
    for number in reversed(range(count)):
        assert shards[number].image == encoded(suffix, number)
        assert shards[number].captions == (f"Satz {number}",)
        assert shards.info(number) == {"url": f"https://example.org/{number}", "width": 24}


def test_tars_without_an_index_name_the_command_that_writes_it_and_it_does(tmp_path):
    folder = write_foreign(tmp_path / "laion")
    tars = everything_below(folder)
    for source in (str(folder), f"{folder}/{{00000..00001}}.tar"):
        with pytest.raises(
            ValueError,
            match=rf"{folder} holds tars without an index\.json; `miniclip shards {folder} --index-only` writes it",
        ):
            Shards(source)
    cli.main(["shards", str(folder), "--index-only"])
    check_foreign(Shards(folder))
    after = everything_below(folder)
    assert {name: after[name] for name in tars} == tars
    assert set(after) - set(tars) == {"index.json", "00000.npz", "00001.npz"}
    assert Packed(6, 0, 2, sum(map(len, tars.values()))) == index_shards(str(folder), overwrite=True)


def test_an_index_that_is_there_is_not_written_anew_unasked(tmp_path):
    folder = write_foreign(tmp_path / "laion")
    index_shards(str(folder))
    before = everything_below(folder)
    with pytest.raises(ValueError, match=r"index\.json exists already; pass --overwrite"):
        index_shards(str(folder))
    assert everything_below(folder) == before


def test_an_index_in_another_folder_stands_for_the_tars(tmp_path, monkeypatch):
    folder = write_foreign(tmp_path / "read only" / "laion")
    before = everything_below(folder)
    monkeypatch.chdir(tmp_path)
    cli.main(["shards", "read only/laion", "index", "--index-only"])
    assert everything_below(folder) == before
    monkeypatch.chdir("/")  # relative paths of the command must not matter any more
    check_foreign(Shards(tmp_path / "index"))
    assert [record.key for record in Shards(tmp_path / "index" / "00001.tar")] == [f"{n:09d}" for n in (3, 4, 5)]


def test_a_pattern_indexes_the_tars_it_names(tmp_path):
    folder = write_foreign(tmp_path / "laion", tars=4, per_tar=1)
    index_shards(f"{folder}/{{00001..00002}}.tar", tmp_path / "index")
    assert [record.key for record in Shards(tmp_path / "index")] == ["000000001", "000000002"]


@pytest.mark.parametrize("suffix", ["jpeg", "PNG", "webp", "JPG"])
def test_images_are_found_under_any_of_their_suffixes(tmp_path, suffix):
    index_shards(str(write_foreign(tmp_path / "laion", suffix=suffix)))
    check_foreign(Shards(tmp_path / "laion"), suffix=suffix)


def test_keys_with_folders_and_dots_in_them_are_read_as_webdataset_reads_them(tmp_path):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar"), encoder=False) as writer:
        for key in ("v1.0/a", "v1.0/b/c", "b/c"):
            writer.write({"__key__": key, "jpg": encoded("jpg", len(key)), "txt": key.encode(), "seg.png": b"other"})
    index_shards(str(tmp_path))
    theirs = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    ours = list(Shards(tmp_path))
    assert [(s["__key__"], s["jpg"], s["txt"].decode()) for s in theirs] == [
        (r.key, r.image, r.captions[0]) for r in ours
    ]


def test_labels_instead_of_captions_are_told_in_one_sentence(tmp_path):
    folder = write_foreign(tmp_path / "imagenet", members=("cls",))
    index_shards(str(folder))
    with pytest.raises(ValueError, match=r"hold images without captions \(\.cls beside them, no \.txt\)") as caught:
        Shards(folder)
    assert "labelled" in str(caught.value)
    assert "\n" not in str(caught.value)


def damaged(folder: Path, how: str) -> None:
    path = folder / "00001.tar"
    with tarfile.open(path) as tar:
        places = [(member.offset, member.offset_data, member.size) for member in tar]
    if how == "gzipped":
        path.write_bytes(gzip.compress(path.read_bytes()))
    elif how == "no tar":
        path.write_bytes(b"<html>404</html>" * 100)
    elif how == "empty file":
        path.write_bytes(b"")
    else:
        header, data, size = places[4]
        ends = {"in an image": data + size // 2, "in a header": header + 200, "after a header": data}
        with open(path, "r+b") as file:
            file.truncate(ends[how])


@pytest.mark.parametrize("how", ["gzipped", "no tar", "empty file", "in an image", "in a header", "after a header"])
def test_a_damaged_tar_is_named_and_the_others_are_indexed(tmp_path, how, monkeypatch, capsys):
    folder = write_foreign(tmp_path / "laion", members=("txt", "json"))
    whole = (folder / "00001.tar").read_bytes()
    damaged(folder, how)
    cli.main(["shards", str(folder), "--index-only"])
    said = capsys.readouterr()
    assert "3 samples in 1 shard," in said.out
    assert re.search(r"1 of 2 tars is damaged[^\n]*\n.*00001\.tar is (cut short|no tar, or a damaged)", said.err)
    assert rejections(folder).keys() == {"00001.tar"}
    assert len(Shards(folder)) == 3
    first = (folder / "00000.npz").stat()
    (folder / "00001.tar").write_bytes(whole)
    indexed = list[Path]()
    index = index_tars.index_tar
    monkeypatch.setattr(index_tars, "index_tar", lambda tar, *rest: indexed.append(Path(tar)) or index(tar, *rest))
    assert index_shards(str(folder)).kept == 6
    assert indexed == [folder / "00001.tar"]  # what was hashed is not hashed again
    assert (folder / "00000.npz").stat() == first
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".tar") == [
        "00000.npz", "00001.npz", "index.json"
    ]  # fmt: skip
    check_foreign(Shards(folder))


def test_where_every_tar_is_damaged_there_is_no_index(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ValueError, match=r"no tar in .* can be indexed: .*a\.tar is no tar.*b\.tar is no tar"):
        index_shards(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_a_tar_without_members_is_a_shard_without_samples(tmp_path):
    folder = write_foreign(tmp_path / "laion")
    with tarfile.open(folder / "00002.tar", "w"):
        pass
    assert index_shards(str(folder)).shards == 3
    check_foreign(Shards(folder))
    assert Shards(folder).counts.tolist() == [3, 3, 0]


def test_a_folder_without_tars_is_said_to_hold_none(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no \.tar"):
        index_shards(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"there is no file .*00000\.tar"):
        index_shards(f"{tmp_path}/empty/{{00000..00001}}.tar")
    with pytest.raises(ValueError, match=r"no file matches .*/empty/\*\.tar"):
        index_shards(f"{tmp_path}/empty/*.tar")
    with pytest.raises(ValueError, match=r"at a URL can't be listed; write the range, as \{00000\.\.00099\}"):
        index_shards("https://host.test/laion/*.tar", tmp_path / "out")
    with pytest.raises(ValueError, match=r"pairs\.tgz is no \.tar; give a folder of them, or a pattern"):
        index_shards(f"{tmp_path}/pairs.tgz")


@pytest.fixture
def _loopback(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_loopback")
def test_remote_shards_with_an_index_are_read_through_the_cache(tmp_path):
    pack_folder(write_pairs(tmp_path / "src", 5, captions=2), tmp_path / "web" / "out", samples_per_shard=2)
    here = list(Shards(tmp_path / "web" / "out"))
    with Served(tmp_path / "web") as server:
        there = Shards(f"{server.url}/out")
        assert list(there) == here
        assert list(Shards(f"{server.url}/out/{{00000..00001}}.tar")) == here[:4]
        asked = server.gets.count("/out/00001.tar")
        assert list(Shards(f"{server.url}/out")) == here
        assert server.gets.count("/out/00001.tar") == asked == 1
    assert list(there) == here  # what is open stays readable without the server
    assert (tmp_path / "cache").is_dir()


@pytest.mark.usefixtures("_loopback")
def test_remote_tars_are_fetched_once_for_their_index_and_for_reading(tmp_path):
    write_foreign(tmp_path / "web" / "laion")
    with Served(tmp_path / "web") as server:
        source = f"{server.url}/laion/{{00000..00001}}.tar"
        cli.main(["shards", source, str(tmp_path / "index"), "--index-only"])
        check_foreign(Shards(tmp_path / "index"))
        assert [path for path in server.gets if path.endswith(".tar")] == ["/laion/00000.tar", "/laion/00001.tar"]


@pytest.mark.usefixtures("_loopback")
def test_remote_tars_without_an_index_name_the_command_with_their_pattern_quoted(tmp_path):
    write_foreign(tmp_path / "web" / "laion")
    with Served(tmp_path / "web") as server:
        source = f"{server.url}/laion/{{00000..00001}}.tar"
        with pytest.raises(ValueError, match=r"no index\.json at") as caught:
            Shards(source)
        assert f"`miniclip shards '{source}' OUT --index-only`" in str(caught.value)
        with pytest.raises(ValueError, match="is remote; name a folder OUT here"):
            index_shards(source)


@pytest.mark.usefixtures("_loopback")
def test_a_remote_tar_that_is_not_what_the_index_says_is_refused(tmp_path):
    out = tmp_path / "web" / "out"
    pack_folder(write_pairs(tmp_path / "src", 4), out, samples_per_shard=2)
    data = bytearray((out / "00001.tar").read_bytes())
    data[600] ^= 1
    (out / "00001.tar").write_bytes(data)
    with Served(tmp_path / "web") as server:
        shards = Shards(f"{server.url}/out")
        assert shards[0].key == "000000000"
        for number in (2, 3, 2):
            with pytest.raises(ValueError, match=r"00001\.tar has the checksum"):
                shards[number]
        assert server.gets.count("/out/00001.tar") == 2


@pytest.mark.parametrize("named", ["file:///etc/hostname", "http://elsewhere.example/00000.tar", "../../00000.tar"])
def test_the_index_of_a_server_names_files_of_that_server_alone(tmp_path, named):
    pack_folder(write_pairs(tmp_path / "pairs", 2), tmp_path / "shards")
    index = json.loads((tmp_path / "shards/index.json").read_text())
    index["shards"][0]["file"] = named
    (tmp_path / "shards/index.json").write_text(json.dumps(index))
    with Served(tmp_path / "shards") as server, pytest.raises(ValueError, match=re.escape(repr(named))):
        Shards(server.url)


def test_samples_are_read_where_the_system_has_no_pread(tmp_path, monkeypatch):
    pack_folder(write_pairs(tmp_path / "pairs", 3), tmp_path / "shards")
    expected = [Shards(str(tmp_path / "shards"))[row].image for row in range(3)]
    monkeypatch.delattr(os, "pread")
    assert [Shards(str(tmp_path / "shards"))[row].image for row in range(3)] == expected


def test_what_a_run_records_of_its_shards_is_of_those_that_it_reads(tmp_path):
    write_pairs(tmp_path / "pictures", 5)
    (tmp_path / "pictures/0000.png").write_bytes(b"none")
    packed = pack_folder(tmp_path / "pictures", tmp_path / "shards", samples_per_shard=2)
    assert (packed.kept, packed.rejected) == (4, 1)
    whole, first = Shards([tmp_path / "shards", f"{tmp_path}/shards/00000.tar"]).facts
    assert whole | {"found": ""} == {
        "source": str(tmp_path / "pictures"), "found": "", "pairs": 4, "rejected": 1
    }  # fmt: skip
    assert whole["found"].startswith("5 images")
    with tarfile.open(tmp_path / "shards/00000.tar") as tar:
        in_first = sum(name.endswith(".txt") for name in tar.getnames())
    assert first == {"source": f"{tmp_path}/shards/00000.tar", "pairs": in_first}
