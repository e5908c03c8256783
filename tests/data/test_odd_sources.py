"""What people really have: tars made by hand, tables of every shape, odd cells, odd paths, odd encodings."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import pickle
import re
import shutil
import subprocess
import tarfile
import unicodedata
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import picture, rejections, table, write_picture
from PIL import Image

from miniclip.commands import main as cli
from miniclip.data.indexing.index_tars import index_shards
from miniclip.data.indexing.tar_members import read_samples
from miniclip.data.module import PairDataModule
from miniclip.data.open_pairs import is_shards, open_pairs
from miniclip.data.pack import pack
from miniclip.data.reading.cells import captions_in, decode_text, picture_in, texts_in, texts_in_cell
from miniclip.data.reading.pair import Pair, fingerprint
from miniclip.data.reading.tables import find_image_column, read_table
from miniclip.data.shards import Shards, record_of
from miniclip.data.sources import read_pairs
from miniclip.evaluation.datasets.open import open_dataset, open_images
from miniclip.inference.doctor.parts import of_pairs
from miniclip.inference.sources import image_set


def image_bytes(seed: int = 0, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, file_format)
    return buffer.getvalue()


RED, GREEN = image_bytes(1, "JPEG"), image_bytes(2, "JPEG")
MASK = image_bytes(3, "PNG")


def write_tar(path: Path, *members: tuple[str, bytes] | tuple[str, bytes, str], mode: str = "w") -> Path:
    """Members are (name, data); a third entry is the target of a hard link, or of a symbolic one after ->."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data, *target in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if target:
                is_symbolic = target[0].startswith("->")
                info.type = tarfile.SYMTYPE if is_symbolic else tarfile.LNKTYPE
                info.linkname = target[0].removeprefix("->")
            tar.addfile(info, io.BytesIO(data))
    return path


def samples_of(folder: Path) -> list[tuple[str, bytes, tuple[str, ...]]]:
    index_shards(str(folder))
    return [(record.key, record.image, record.captions) for record in Shards(folder)]


# ---------------------------------------------------------------------------------------------------------------------
# Tars


@pytest.mark.parametrize("order", [1, -1])
def test_a_mask_beside_a_photograph_is_not_taken_for_it(tmp_path, order):
    write_tar(tmp_path / "a.tar", *[("a.jpg", RED), ("a.png", MASK)][::order], ("a.txt", b"red"))
    assert samples_of(tmp_path) == [("a", RED, ("red",))]
    assert rejections(tmp_path) == {"a.tar:a.png": "another picture of a sample (.png)"}


def test_names_with_dots_of_their_own_are_samples_and_what_belongs_to_another_is_not(tmp_path):
    names = ["img.v2", "IMG_2024.01.01", "IMG_2024.01.02", "3.5mm", "3.7mm"]
    members = [(f"{name}.{suffix}", data) for name in names for suffix, data in (("jpg", RED), ("txt", name.encode()))]
    members += [("a.jpg", GREEN), ("a.txt", b"green"), ("a.seg.png", MASK)]
    write_tar(tmp_path / "a.tar", *members)
    assert samples_of(tmp_path) == [*((name, RED, (name,)) for name in names), ("a", GREEN, ("green",))]
    assert rejections(tmp_path) == {"a.tar:a.seg.png": "another member of a sample (.seg.png)"}


def test_members_that_are_named_are_one_sample(tmp_path):
    write_tar(
        tmp_path / "a.tar", ("1.image.jpg", RED), ("1.text.txt", b"red"), ("2.caption.txt", b"green"),
        ("2.img.jpg", GREEN), ("3.jpg", RED), ("3.caption.txt", b"3"), ("4.input.jpg", RED), ("4.photo.jpg", RED),
        ("4.txt", b"4"), ("b.v1.jpg", RED), ("b.v2.txt", b"another"),
    )  # fmt: skip
    whole = [("1.image", RED, ("red",)), ("2.img", GREEN, ("green",)), ("3", RED, ("3",)), ("4.photo", RED, ("4",))]
    assert samples_of(tmp_path) == [*whole, ("b.v1", RED, ()), ("b.v2", b"", ("another",))]
    assert rejections(tmp_path) == {"a.tar:4.input.jpg": "another member of a sample (.input.jpg)"}


def test_a_picture_and_a_text_of_a_key_whose_words_say_what_they_are_are_one_sample(tmp_path):
    """webdataset groups them by the same key, which is the name up to its first dot."""
    facts = json.dumps({"caption": "facts"}).encode()
    write_tar(
        tmp_path / "a.tar", ("1.img.jpg", RED), ("1.json", facts), ("2.input.jpg", GREEN), ("2.outputs.txt", b"2"),
        ("d/3.rgb.jpg", RED), ("d/3.prompt.txt", b"3"), ("d/3.json", facts), ("5.jpg", RED), ("5.boxes.json", b"[]"),
        ("6.left.jpg", RED), ("6.right.jpg", GREEN), ("6.words.txt", b"6"), ("Dr. Smith.jpg", RED),
        ("Dr. Jones.txt", b"Jones"),
    )  # fmt: skip
    pairs = [("1.img", RED, ("facts",)), ("2.input", GREEN, ("2",)), ("d/3.rgb", RED, ("3",)), ("5", RED, ())]
    assert samples_of(tmp_path) == [*pairs, ("6.left", RED, ()), ("6.right", GREEN, ()), ("Dr. Smith", RED, ())]
    assert rejections(tmp_path) == {
        "a.tar:5.boxes.json": "another member of a sample (.boxes.json)",
        "a.tar:6.words.txt": "a text whose picture can't be known, as its key has pictures of other names",
        "a.tar:Dr. Jones.txt": "a text whose picture can't be known, as its key has pictures of other names",
    }


@pytest.mark.parametrize(
    "members, sample, left_out",
    [
        (["7.jpg", "7.json", "7.labels.txt"], ["7.jpg", "7.json"], ["7.labels.txt"]),
        (["img.v1.jpg", "img.v1.json", "img.json"], ["img.v1.jpg", "img.v1.json"], ["img.json"]),
        (["images/7.jpg", "images/7.en.txt", "texts/7.txt"], ["images/7.jpg", "texts/7.txt"], ["images/7.en.txt"]),
    ],
)
def test_what_a_picture_has_of_its_own_name_is_its_own(tmp_path, members, sample, left_out):
    write_tar(tmp_path / "a.tar", *((name, RED if name.endswith("jpg") else b'{"a": 1}') for name in members))
    with open(tmp_path / "a.tar", "rb") as file:
        ((_, found),), others = read_samples(file, "a.tar")
    assert sorted(member.name for member in found.values()) == sample
    assert [each.source for each in others] == left_out


def test_links_are_followed_and_those_to_nothing_are_named(tmp_path):
    write_tar(
        tmp_path / "a.tar", ("d/a.jpg", RED), ("d/a.txt", b"red"), ("d/b.jpg", b"", "d/a.jpg"), ("d/b.txt", b"hard"),
        ("d/c.jpg", b"", "->a.jpg"), ("d/c.txt", b"", "->./a.txt"), ("d/e.jpg", b"", "->/x/y.jpg"),
    )  # fmt: skip
    assert sorted(samples_of(tmp_path)) == [("d/a", RED, ("red",)), ("d/b", RED, ("hard",)), ("d/c", RED, ("red",))]
    assert rejections(tmp_path) == {"a.tar:d/e.jpg": "a link to nothing"}


def test_links_to_links_are_followed_and_those_in_a_circle_end(tmp_path):
    write_tar(
        tmp_path / "a.tar", ("d/a.jpg", b"", "->b.jpg"), ("d/b.jpg", b"", "->../e/c.jpg"), ("e/c.jpg", b"", "->d.jpg"),
        ("e/d.jpg", RED), ("e/f.jpg", b"", "e/c.jpg"), ("e/x.jpg", b"", "->y.jpg"), ("e/y.jpg", b"", "->x.jpg"),
        *((f"{name}.txt", name.encode()) for name in ("d/a", "d/b", "e/c", "e/d", "e/f", "e/x")),
    )  # fmt: skip
    names = ["d/a", "d/b", "e/c", "e/d", "e/f"]
    assert [each for each in sorted(samples_of(tmp_path)) if each[1]] == [(name, RED, (name,)) for name in names]
    told = {name: reason for name, reason in rejections(tmp_path).items() if name.endswith(".jpg")}
    assert told == dict.fromkeys(("a.tar:e/x.jpg", "a.tar:e/y.jpg"), "a link to nothing")


@pytest.mark.sample(1)
@pytest.mark.parametrize("first", ["0.jpg", "0.jpg.gone", "5.jpg"], ids=["sound", "to nothing", "in a circle"])
def test_a_chain_of_20_000_links_is_followed(tmp_path, first):
    links = [(f"{number}.jpg", b"", f"->{number - 1}.jpg") for number in range(20_000, 1, -1)]
    write_tar(tmp_path / "a.tar", ("0.jpg", RED), ("0.txt", b"red"), *links, ("1.jpg", b"", f"->{first}"))
    samples, left_out = read_samples(io.BytesIO((tmp_path / "a.tar").read_bytes()), "a.tar")
    images = {members["image"][1:3] for _, members in samples}
    assert len(images) == 1
    assert len(samples) == (20_001 if first == "0.jpg" else 1)
    assert [each.source for each in left_out] == (
        [] if len(samples) > 1 else [name for name, *_ in [*links, ("1.jpg",)]]
    )


def test_a_key_that_comes_again_is_another_sample(tmp_path):
    write_tar(
        tmp_path / "a.tar", ("a.jpg", RED), ("a.txt", b"red"), ("b.jpg", RED), ("b.txt", b"b"),
        ("a.jpg", GREEN), ("a.txt", b"green"), ("b.txt", b"again"),
    )  # fmt: skip
    assert samples_of(tmp_path) == [("a", RED, ("red",)), ("b", RED, ("b",)), ("a", GREEN, ("green",))]
    assert rejections(tmp_path) == {"a.tar:b.txt": "a member that comes again without a picture"}


@pytest.mark.parametrize("last", [tarfile.DIRTYPE, tarfile.SYMTYPE])
def test_joined_tars_and_tars_that_end_in_a_folder_or_a_link_are_whole(tmp_path, last):
    for name, data in (("a", RED), ("b", GREEN)):
        write_tar(tmp_path / f"{name}.tar", (f"{name}.jpg", data), (f"{name}.txt", name.encode()))
        with tarfile.open(tmp_path / f"{name}.tar", "a") as tar:
            info = tarfile.TarInfo("last")
            info.type, info.linkname = last, f"{name}.jpg"
            tar.addfile(info)
    (tmp_path / "both").mkdir()
    joined = (tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()
    (tmp_path / "both" / "joined.tar").write_bytes(joined)
    pairs = [sample for sample in samples_of(tmp_path / "both") if sample[2]]
    assert pairs == [("a", RED, ("a",)), ("b", GREEN, ("b",))]


def _headers(kind: bytes, content: bytes, times: int = 1) -> bytes:
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(content)
    return (info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)) * times


@pytest.mark.parametrize(
    "headers",
    [
        _headers(tarfile.GNUTYPE_LONGNAME, b"a.png", 3000),
        _headers(tarfile.XHDTYPE, b"12 path=abc\n", 3000),
        _headers(tarfile.XHDTYPE, b"29 GNU.sparse.map=a,b,c,d,ef\n"),
    ],
    ids=["long names in a row", "PAX headers in a row", "a sparse map that is none"],
)
def test_a_tar_whose_headers_tarfile_fails_on_is_damaged_named_and_the_others_are_indexed(tmp_path, headers):
    write_tar(tmp_path / "good.tar", ("a.jpg", RED), ("a.txt", b"red"), ("b.jpg", GREEN))
    (tmp_path / "bad.tar").write_bytes(headers + (tmp_path / "good.tar").read_bytes())
    write_picture(tmp_path / "below" / "c.jpg")
    assert is_shards(str(tmp_path))  # asks the tars' first members
    shutil.rmtree(tmp_path / "below")
    assert samples_of(tmp_path) == [("a", RED, ("red",)), ("b", GREEN, ())]
    assert rejections(tmp_path).keys() == {"bad.tar"}
    damaged = json.loads((tmp_path / "index.json").read_text())["damaged"]
    assert re.match(f"{tmp_path}/bad.tar is no tar, or a damaged or compressed one: .", damaged[f"{tmp_path}/bad.tar"])


def test_bytes_after_a_tars_end_that_are_no_tar_are_named(tmp_path):
    path = write_tar(tmp_path / "a.tar", ("a.jpg", RED), ("a.txt", b"red"))
    path.write_bytes(path.read_bytes() + b"x" * 2000)
    assert len(samples_of(tmp_path)) == 1
    assert list(rejections(tmp_path).values()) == ["bytes after the tar's end that are no tar"]


def test_a_member_of_negative_size_is_damage_and_no_endless_loop(tmp_path):
    path = write_tar(tmp_path / "a.tar", ("a.jpg", RED), ("a.txt", b"red"))
    header = bytearray(path.read_bytes()[:512])
    header[124:136] = (-512).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + path.read_bytes()[512:])
    with pytest.raises(ValueError, match=r"a\.tar is damaged: a\.jpg has a size of -512 bytes|a\.tar is no tar"):
        index_shards(str(tmp_path))


@pytest.mark.parametrize("suffix", ["caption", "cap", "text", "TXT"])
def test_captions_of_any_suffix_and_pictures_of_none_are_read(tmp_path, suffix):
    write_tar(tmp_path / "a.tar", ("a.img", RED), (f"a.{suffix}", b"red"), ("b.jfif", GREEN), ("b.txt", b"green"))
    assert samples_of(tmp_path) == [("a", RED, ("red",)), ("b", GREEN, ("green",))]


def test_captions_in_the_json_are_used_by_check_packing_and_training(tmp_path, capsys):
    facts = [json.dumps({"caption": f"picture {n}", "url": "u"}).encode() for n in range(4)]
    write_tar(
        tmp_path / "s" / "a.tar", *((f"{n}.{s}", d) for n in range(4) for s, d in (("jpg", RED), ("json", facts[n])))
    )
    assert [captions for _, _, captions in samples_of(tmp_path / "s")] == [(f"picture {n}",) for n in range(4)]
    cli.main(["check", str(tmp_path / "s"), "--batch-size", "2", "--image-size", "16"])
    cli.main(["shards", str(tmp_path / "s"), str(tmp_path / "again")])
    assert "4 pairs in 1 shard," in capsys.readouterr().out
    data = PairDataModule(str(tmp_path / "s"), batch_size=4, num_workers=0, image_size=16)
    data.setup("fit")
    assert "left out" not in data.describe()


def test_training_reports_what_the_index_left_out(tmp_path):
    write_tar(tmp_path / "a.tar", ("a.jpg", RED), ("a.txt", b"red"), ("a.png", MASK), ("b.jpg", RED), ("b.txt", b"b"))
    index_shards(str(tmp_path))
    data = PairDataModule(str(tmp_path), batch_size=2, num_workers=0, image_size=16)
    data.setup("fit")
    assert data.describe().startswith("1 left out: another picture of a sample (.png): 1")


@pytest.mark.parametrize("encoding, captions", [("utf-8-sig", ("café",)), ("utf-16", ("café",)), ("latin-1", None)])
def test_a_text_of_another_encoding_is_read_by_its_mark_or_rejected(tmp_path, encoding, captions):
    text = "café".encode(encoding)
    write_tar(tmp_path / "t" / "a.tar", ("a.jpg", RED), ("a.txt", text), ("b.jpg", GREEN), ("b.txt", b"b"))
    found = {key: texts for key, _, texts in samples_of(tmp_path / "t")}
    assert found == {"b": ("b",)} | ({"a": captions} if captions else {})
    if not captions:
        assert rejections(tmp_path / "t")["a.tar:a.txt"] == "a text that is not UTF-8"
    folder = tmp_path / "folder"
    write_picture(folder / "a.png").with_suffix(".txt").write_bytes(text)
    (pair,) = read_pairs(folder)
    assert (pair.captions if captions else None) == captions
    assert bool(pair.problem) == (captions is None)


def test_what_is_appended_to_a_tar_or_edited_in_it_is_an_error_and_not_lost(tmp_path):
    path = write_tar(tmp_path / "a.tar", ("a.jpg", RED), ("a.txt", b"a red thing"))
    index_shards(str(tmp_path))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"a red thing", b"a bad thing"))
    with pytest.raises(ValueError, match=r"the txt of sample a has another checksum; index the shards anew"):
        Shards(tmp_path)[0]
    path.write_bytes(whole)
    Shards(tmp_path)[0]
    # Where a tar's zeros were there may be room for a whole sample.
    for size, what in ((20_000, r"has \d+,\d+ bytes, and had 10,240"), (200, r"goes on after byte \d,\d+, where it")):
        path.write_bytes(whole)
        write_tar(path, ("b.jpg", GREEN), ("b.txt", b"x" * size), mode="a")
        assert (path.stat().st_size > len(whole)) == (size > 10_240)
        says = (
            rf"{what}.*: something was added to it, or it was replaced. `miniclip shards .* --index-only --overwrite`"
        )
        with pytest.raises(ValueError, match=says):
            Shards(tmp_path)[0]


# ---------------------------------------------------------------------------------------------------------------------
# Cells


@pytest.mark.parametrize(
    "cell, texts",
    [
        ("a b", ["a b"]),
        ("one\n\ntwo\r\nthree\u2028four\x85five\x0csix\x0bseven\x1ceight", ["one two three four five six seven eight"]),
        (["a", " ", "b\nc"], ["a", "b c"]),
        ("['a child', \"a kid's\"]", ["a child", "a kid's"]),
        ("['a child' 'a kid']", ["a child", "a kid"]),  # as NumPy writes it
        ('["a child", "caf\\u00e9"]', ["a child", "café"]),
        ("[laughter]", ["[laughter]"]),
        ({"raw": "a"}, ["a"]),
        (None, []),
        (float("nan"), []),
        ("nan", []),  # as a program wrote it
        (["None", "a null result", "<NA>"], ["a null result"]),
        (7, ["7"]),
        (["\u200b", "\x00", "\ufeff \u2060", "a\u200bb"], ["a\u200bb"]),  # nothing of the first three can be seen
    ],
)
def test_a_cell_is_one_caption_or_a_list_of_them(cell, texts):
    assert texts_in(cell) == texts


def test_a_mapping_without_a_caption_is_refused_with_its_fields():
    with pytest.raises(ValueError, match="its caption is a mapping of 'en', 'de'"):
        texts_in({"en": "a cat", "de": "eine Katze"})


def test_only_line_feeds_and_carriage_returns_end_a_caption():
    assert captions_in("a\nb\r\nc\rd\u2028e\x85f\x0cg\x1ch\n\n") == ["a", "b", "c", "d e f g h"]


@pytest.mark.parametrize("write", [lambda data: data, lambda data: b"data:image/png;base64," + data])
@pytest.mark.parametrize("alphabet", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
def test_a_picture_in_base64_is_read(write, alphabet):
    assert picture_in(write(alphabet(MASK)).decode()) == MASK
    assert picture_in(write(alphabet(RED)).decode().strip()) == RED


@pytest.mark.parametrize(
    "pixels", [np.arange(48).reshape(4, 4, 3), np.arange(60).reshape(3, 4, 5), np.arange(16).reshape(4, 4)]
)
@pytest.mark.parametrize("as_list", [True, False])
def test_an_array_of_pixels_is_a_picture(pixels, as_list):
    found = Image.open(io.BytesIO(picture_in(pixels.tolist() if as_list else pixels)))
    expected = pixels.transpose(1, 2, 0) if pixels.shape[0] == 3 else pixels
    assert np.array(found).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "cell, says",
    [
        (None, "no image in this row"), ("", "no image in this row"), ([], "an empty list"),
        ([b"a" * 9, b"b"], "a list of 2 images"), ([0.1, 0.2, 0.3], "3 numbers"), ({"en": 1}, "a mapping of 'en'"),
        ([[0.5, 0.1]], "whole numbers from 0 to 255"), (1.5, "a value of type float"),
    ],
)  # fmt: skip
def test_a_cell_that_is_no_picture_says_what_it_holds_in_a_short_line(cell, says):
    with pytest.raises(ValueError, match=says) as caught:
        picture_in(cell)
    assert len(str(caught.value)) < 200


# ---------------------------------------------------------------------------------------------------------------------
# Tables


RECORDS = [{"image": f"{n}.png", "caption": f"picture {n}"} for n in range(3)]
JSON_SHAPES = {
    "records": RECORDS,
    "records in a mapping": {"version": 1, "annotations": RECORDS},
    "file: caption": {f"{n}.png": f"picture {n}" for n in range(3)},
    "file: captions": {f"{n}.png": [f"picture {n}"] for n in range(3)},
    "file: record": {f"{n}.png": {"caption": f"picture {n}", "id": n} for n in range(3)},
    "columns": {"image": [f"{n}.png" for n in range(3)], "caption": [f"picture {n}" for n in range(3)]},
    "pandas": {"image": {str(n): f"{n}.png" for n in range(3)}, "caption": {str(n): f"picture {n}" for n in range(3)}},
    "pandas' split": {"columns": ["image", "caption"], "data": [[f"{n}.png", f"picture {n}"] for n in range(3)]},
    "COCO": {
        "images": [{"id": n, "file_name": f"{n}.png"} for n in range(3)],
        "annotations": [{"image_id": str(n), "id": n, "caption": f"picture {n}"} for n in range(3)],
    },
    "Karpathy": {
        "images": [
            {"filepath": "", "filename": f"{n}.png", "split": ("train", "restval", "train")[n], "cocoid": n,
             "sentences": [{"raw": f"picture {n}"}]}
            for n in range(3)
        ]
    },
}  # fmt: skip


@pytest.fixture
def three(tmp_path) -> Path:
    for number in range(3):
        write_picture(tmp_path / f"{number}.png", number)
    return tmp_path


@pytest.mark.parametrize("shape", JSON_SHAPES)
@pytest.mark.parametrize("name", ["t.json", "t.json.gz"])
def test_captions_in_json_are_read_in_every_usual_shape(three, shape, name):
    data = json.dumps(JSON_SHAPES[shape]).encode()
    (three / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    pairs = read_pairs(three / name)
    assert [(pair.image, pair.captions, pair.problem) for pair in pairs] == [
        (three / f"{n}.png", (f"picture {n}",), None) for n in range(3)
    ]
    assert not pairs.left_out


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_file_that_json_names_twice_is_not_lost(three, suffix):
    (three / f"table{suffix}").write_text('{"0.png": "one", "1.png": "two", "0.png": "three"}')
    with pytest.raises(ValueError, match=r"'0\.png' comes twice in one object"):
        read_pairs(three / f"table{suffix}")


def test_a_value_that_json_names_twice_is_lost_in_no_line_and_beside_no_picture(three):
    lines = three / "lines.json"
    lines.write_text('{"image": "0.png", "caption": "a"}\n{"image": "1.png", "caption": "b", "caption": "c"}')
    with pytest.raises(ValueError, match=r"'caption' comes twice in one object"):
        read_pairs(lines)
    lines.unlink()
    for n in range(3):
        (three / f"{n}.json").write_text('{"caption": "one", "caption": "two"}')
    problems = [pair.problem for pair in read_pairs(three)]
    assert len(problems) == 3
    assert all("'caption' comes twice in one object" in problem for problem in problems)
    read = {"image": b"", "txt": b"", "json": b'{"caption": "one", "caption": "two"}'}
    with pytest.raises(ValueError, match=r"the .json of 7: 'caption' comes twice in one object"):
        record_of("7", read.__getitem__)


def test_json_lines_may_be_called_json(three):
    (three / "t.json").write_text("\n".join(map(json.dumps, RECORDS)))
    assert [pair.captions for pair in read_pairs(three / "t.json")] == [(f"picture {n}",) for n in range(3)]


def test_captions_of_images_that_are_not_listed_and_images_of_another_split_are_left_out(three):
    coco = {**JSON_SHAPES["COCO"]}
    coco["annotations"] = [*coco["annotations"], {"image_id": 99, "id": 7, "caption": "lost"}]
    (three / "c.json").write_text(json.dumps(coco))
    (left_out,) = read_pairs(three / "c.json").left_out
    assert "image 99" in left_out.source
    karpathy = json.loads(json.dumps(JSON_SHAPES["Karpathy"]))
    karpathy["images"][2]["split"] = "test"
    (three / "k.json").write_text(json.dumps(karpathy))
    pairs = read_pairs(three / "k.json")
    assert len(pairs) == 2
    assert [(each.source, each.reason) for each in pairs.left_out] == [("row 2", "a row of another split (test)")]
    assert list(read_pairs(three / "k.json", split="test").names) == ["2.png"]
    for split in ("val", "tset"):
        with pytest.raises(
            ValueError, match=f"no row whose column 'split' is '{split}'; valid for --split are restval, test, train"
        ):
            read_pairs(three / "k.json", split=split)


@pytest.mark.parametrize(
    "text, name",
    [
        ("image,caption\n0.png,picture 0\n1.png,picture 1\n2.png,picture 2\n", "captions.txt"),
        ("sep=;\nimage;caption\n0.png;picture 0\n1.png;picture 1\n2.png;picture 2\n", "t.csv"),
        ("image| number| comment\n0.png| 0| picture 0\n1.png| 0| picture 1\n2.png| 0| picture 2\n", "results.csv"),
        ("0.png#0\tpicture 0\n1.png#0\tpicture 1\n2.png#0\tpicture 2\n", "Flickr8k.token.txt"),
        ("picture 0\t0.png\npicture 1\t1.png\npicture 2\t2.png\n", "gcc.tsv"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_tables_that_courses_hand_out_are_read(three, text, name, encoding):
    (three / name).write_bytes(text.encode(encoding))
    assert [pair.captions for pair in read_pairs(three / name)] == [(f"picture {n}",) for n in range(3)]


def test_a_column_and_its_numbered_ones_are_all_captions(three):
    (three / "t.csv").write_text("image,caption,caption_2\n0.png,one,two\n")
    assert read_pairs(three / "t.csv")[0].captions == ("one", "two")


@pytest.mark.parametrize(
    "path",
    [
        " a.png ",
        "./a.png",
        "sub\\..\\a.png",
        "A.PNG",
        "a",
        "/a.png",
        "%61.png",
        "images/a.png",
        "ä b.png",
        "a%CC%88 b.png",
    ],
)
def test_a_path_is_found_as_people_write_it(tmp_path, path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    write_picture(folder / "a.png")
    write_picture(folder / unicodedata.normalize("NFD", "ä b.png"))
    (folder / "t.csv").write_text(f"image,caption\n{path},words\n", encoding="utf-8")
    (pair,) = read_pairs(folder / "t.csv")
    assert pair.problem is None
    assert pair.image.is_file()


def test_a_file_that_a_row_names_exactly_is_no_other_rows_in_another_case(tmp_path):
    write_picture(tmp_path / "img_1.jpg", 1)
    (tmp_path / "t.csv").write_text("image,caption\nIMG_1.JPG,a dog\nimg_1.jpg,a cat\n")
    one, other = read_pairs(tmp_path / "t.csv")
    assert one.problem == "no image file IMG_1.JPG; img_1.jpg is another row's"
    assert (other.problem, other.captions) == (None, ("a cat",))


def test_what_else_the_rows_of_one_image_say_is_kept_of_all(three):
    (three / "t.csv").write_text("image,caption,alt,year\n0.png,a cat,a tabby,1999\n0.png,a pet,a tom,1999\n")
    (pair,) = read_pairs(three / "t.csv")
    assert (pair.captions, pair.extra) == (("a cat", "a pet"), {"alt": ["a tabby", "a tom"], "year": "1999"})


def test_a_path_that_fits_two_files_is_not_guessed(tmp_path):
    write_picture(tmp_path / "a.png")
    write_picture(tmp_path / "a.jpg")
    (tmp_path / "t.csv").write_text("image,caption\na,words\n")
    assert "no image file" in read_pairs(tmp_path / "t.csv")[0].problem


def test_folders_and_patterns_of_parquet_files_are_one_table(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for number, split in enumerate(("train", "train", "test")):
        cells = [{"bytes": image_bytes(2 * number + n), "path": None} for n in range(2)]
        path = tmp_path / "hub" / "data" / f"{split}-{number:05d}-of-00003.parquet"
        parquet.write_table(pa.table({"image": cells, "caption": [f"{number}", f"{number}, too"]}), path)
    (tmp_path / "hub" / "README.md").write_text("words")
    pairs = read_pairs(tmp_path / "hub")
    assert [pair.captions for pair in pairs] == [("0",), ("0, too",), ("1",), ("1, too",)]
    assert [pair.image for pair in pairs] == [image_bytes(n) for n in range(4)]
    assert {each.source for each in pairs.left_out} == {"README.md", "data/test-00002-of-00003.parquet"}
    assert len(read_pairs(tmp_path / "hub", split="test")) == 2
    for pattern in ("train-*.parquet", "train-{00000..00001}-of-00003.parquet"):
        assert len(read_pairs(f"{tmp_path}/hub/data/{pattern}")) == 4


def write_parquet(folder: Path, *names: str) -> Path:
    """Files of one picture each, whose caption and label are the file's path."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cells = [{"bytes": image_bytes(number), "path": None}]
        pq.write_table(pa.table({"image": cells, "caption": [name], "label": [name]}), folder / name)
    return folder


def captions_of(source: Path | str, **options: Any) -> list[str]:
    return [caption for pair in read_pairs(source, **options) for caption in pair.captions]


@pytest.mark.parametrize(
    "form",
    [
        "data/{}-00000-of-00001.parquet",
        "{}-00000-of-00001-0a1b2c3d4e5f6071.parquet",
        "{}-0.parquet",
        "{}.parquet",
        "{}/0.parquet",
        "default/{}/part-0000.parquet",
        "split={}/lang=de/part-0.parquet",
        "Set={}/0.parquet",
    ],
)
@pytest.mark.parametrize("splits", [["train", "validation", "testA"], ["trainval", "test"], ["train", "minival2014"]])
def test_parquet_files_of_a_split_that_nobody_knows_are_in_no_other_split(tmp_path, form, splits):
    file_of = {split: form.format(split) for split in splits}
    folder = write_parquet(tmp_path / "set", *file_of.values())
    for split, name in file_of.items():
        pairs = read_pairs(folder, split=split)
        assert [pair.captions for pair in pairs] == [(name,)]
        reason = "a file of another split"
        assert {each.source: each.reason for each in pairs.left_out} == dict.fromkeys(
            {*file_of.values()} - {name}, reason
        )
        with warnings.catch_warnings(action="ignore"):  # of what is left out
            data = open_dataset(folder, split=split)
            captions = open_dataset(folder, split=split, task="retrieval").captions
        assert (data.classnames, set(data.left_out), captions) == ((name,), set(pairs.left_out), ((name,),))
    valid = ", ".join(sorted(splits))
    for asked in ("val", "train", "testB"):
        same = {"val": "validation"}.get(asked, asked)
        if same in splits:
            assert captions_of(folder, default_split=asked) == [file_of[same]]
            continue
        for options in ({"split": asked}, {"default_split": asked}):
            with pytest.raises(ValueError, match=f"has no split '{asked}'; valid are {valid}$"):
                read_pairs(folder, **options)


@pytest.mark.parametrize(
    "splits", [["train", "test_dev", "test_std"], ["train", "train_ood"], ["val_a", "val_b", "val"]]
)
def test_before_a_shards_number_in_a_folder_data_all_is_the_splits_name(tmp_path, splits):
    """As `datasets` reads such a folder, where `test_dev-…` beside it is of test."""
    names = {split: [f"data/{split}-{n:05d}-of-00002.parquet" for n in (0, 1)] for split in splits}
    folder = write_parquet(tmp_path, *(name for each in names.values() for name in each))
    assert {split: captions_of(folder, split=split) for split in splits} == names


def test_a_parquet_file_of_no_split_beside_those_of_splits_is_left_out_and_named(tmp_path):
    names = ("train-0.parquet", "train-1.parquet", "val-0.parquet", "sizes.parquet", "0001.parquet")
    pairs = read_pairs(write_parquet(tmp_path, *names))
    assert [pair.captions for pair in pairs] == [("train-0.parquet",), ("train-1.parquet",)]
    assert {each.source for each in pairs.left_out} == {*names[2:]}
    assert len(read_pairs(f"{tmp_path}/*.parquet")) == 5


def test_parquet_files_whose_names_tell_no_known_split_are_one_set_or_asked_for_by_name(tmp_path):
    plain = write_parquet(tmp_path / "plain", "00000.parquet", "part-1-abc.parquet", "lang=de/0.parquet")
    assert len(read_pairs(plain)) == len(read_pairs(plain, split="train")) == 3
    assert "all files" not in read_pairs(plain).found
    one = write_parquet(tmp_path / "one", *(f"data-{n:05d}-of-00002.parquet" for n in range(2)))
    assert len(read_pairs(one)) == len(open_dataset(one).images) == 2
    names = [f"test{letter}-{n:05d}-of-00002.parquet" for letter in "AB" for n in range(2)]
    two = write_parquet(tmp_path / "two", *names)
    assert captions_of(two, split="testA") == names[:2]
    assert read_pairs(two).found.endswith(", all files: their names are of testA, testB; --split takes those of one")
    for folder, valid in ((one, "data"), (two, "testA, testB")):
        files = sorted(path.name for path in folder.iterdir())
        assert captions_of(folder, split="train") == list(open_dataset(folder, split="train").classnames) == files
        with pytest.raises(ValueError, match=f"has no split 'val'; valid are {valid}$"):
            read_pairs(folder, split="val")
        for task in (None, "retrieval"):
            with pytest.raises(ValueError, match=f"has no split 'val'; its files are of {valid}$"):
                open_dataset(folder, split="val", task=task)
    for data in (open_dataset, open_images, partial(open_dataset, task="retrieval")):
        with pytest.warns(
            UserWarning, match="all files are read. Their names are of testA, testB, of which none"
        ) as told:
            assert (len(data(two).images), len(told)) == (4, 1)
    assert open_dataset(two, split="testB").classnames == tuple(names[2:])
    folders = write_parquet(tmp_path / "folders", "split=testA/0.parquet", "split=testB/0.parquet")
    assert captions_of(folders, split="testB") == ["split=testB/0.parquet"]
    assert captions_of(folders / "split=testB", split="testB") == ["split=testB/0.parquet"]
    assert captions_of(two / names[0], split="testA") == names[:1]


@pytest.mark.parametrize("place", ["partition={}/part-0.parquet", "partition={}-00000-of-00001.parquet"])
def test_partitions_of_numbers_are_one_set_which_is_said_once(tmp_path, place):
    folder = write_parquet(tmp_path / "set", place.format(0), place.format(1))
    pairs = read_pairs(folder)
    assert (len(pairs), pairs.found.count("--split takes those of one")) == (2, 1)
    with pytest.warns(UserWarning, match="of which none is known to be for testing; --split takes") as told:
        assert (len(open_dataset(folder).images), len(told)) == (2, 1)


def test_a_column_tells_the_splits_of_files_whose_names_tell_none(tmp_path):
    for name in ("en-00000-of-00001", "de-00000-of-00001"):
        cells = [{"bytes": image_bytes(number), "path": None} for number in range(2)]
        table = {"image": cells, "caption": [f"{name} train", f"{name} test"], "split": ["train", "test"]}
        pq.write_table(pa.table({**table, "label": table["caption"]}), tmp_path / f"{name}.parquet")
    for split in ("train", "test"):
        assert captions_of(tmp_path, split=split) == [f"{name}-00000-of-00001 {split}" for name in ("de", "en")]
        with warnings.catch_warnings(action="ignore"):  # of what is left out
            assert [name.split()[1] for name in open_dataset(tmp_path, split=split).classnames] == [split] * 2


def test_words_that_are_joined_to_a_split_tell_it(tmp_path):
    folder = write_parquet(tmp_path, "trainset.parquet", "coco_valset-0.parquet", "testdata.parquet")
    assert captions_of(folder) == ["trainset.parquet"]
    assert captions_of(folder, split="val") == ["coco_valset-0.parquet"]


def test_an_imagefolder_with_metadata_is_read_and_what_it_does_not_name_is_left_out(three):
    lines = [json.dumps({"file_name": f"{n}.png", "text": f"picture {n}"}) for n in range(2)]
    (three / "metadata.jsonl").write_text("\n".join(lines))
    pairs = read_pairs(three)
    assert [pair.captions for pair in pairs] == [("picture 0",), ("picture 1",)]
    assert [(each.source, each.reason) for each in pairs.left_out] == [
        ("2.png", "a file that metadata.jsonl does not name")
    ]


def write_imagefolder(folder, *places, column="text", suffix="csv"):
    """Two pictures in each place, and a table there that names them and says of each where it is."""
    for number, place in enumerate(places):
        rows = [{"file_name": f"{n}.png", column: f"{n} of {place}"} for n in range(2)]
        for n in range(2):
            write_picture(folder / place / f"{n}.png", 2 * number + n)
        of_csv = [f"file_name,{column}", *(",".join(row.values()) for row in rows)]
        table(folder / place / f"metadata.{suffix}", *(map(json.dumps, rows) if suffix == "jsonl" else of_csv))
    return folder


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_an_imagefolder_with_a_table_in_each_folder_is_read_whole(tmp_path, suffix):
    places = ["cat", "dog/small", "train"]  # the last is a class here
    write_imagefolder(tmp_path, *places, suffix=suffix)
    write_picture(tmp_path / "cat/extra.png", 9)
    table(tmp_path / "notes.txt", "Pictures of 2006.")
    pairs = read_pairs(tmp_path)
    assert {pair.source: pair.captions for pair in pairs} == {
        f"{place}/{n}.png": (f"{n} of {place}",) for place in places for n in range(2)
    }
    assert [(each.source, each.reason) for each in pairs.left_out] == [
        (name, "a file that no table names") for name in ("cat/extra.png", "notes.txt")
    ]
    assert f"as cat/metadata.{suffix}, dog/small/metadata.{suffix}, train/metadata.{suffix} say" in pairs.found
    write_imagefolder(tmp_path, "bird", column="caption", suffix=suffix)
    with pytest.raises(
        ValueError, match=rf"cat/metadata\.{suffix} has its captions in 'text', and .*bird.* in 'caption'"
    ):
        read_pairs(tmp_path)


def test_rows_of_several_tables_are_called_by_their_table_and_found_as_people_write_their_paths(tmp_path):
    write_imagefolder(tmp_path, "cat", "dog")
    rows = ("cat/0.png,with its folder,train", "1.PNG,in capitals,train", ",of no picture,train", "2.png,of test,test")
    table(tmp_path / "cat/metadata.csv", "file_name,text,split", *rows)
    table(tmp_path / "dog/metadata.csv", "file_name,text,split", "0.png,x,test", f"{tmp_path}/dog/1.png,whole,train")
    pairs = read_pairs(tmp_path, split="train")
    assert {pair.source: pair.captions or pair.problem for pair in pairs} == {
        "cat/0.png": ("with its folder",),
        "cat/1.PNG": ("in capitals",),
        "cat/metadata.csv: row 3": "no image in this row",
        "dog/1.png": ("whole",),
    }
    left_out = [each.source for each in pairs.left_out if each.reason == "a row of another split (test)"]
    assert left_out == ["cat/metadata.csv: row 4", "dog/metadata.csv: row 1"]


@pytest.mark.parametrize("above", ["", "data/"])
def test_tables_in_folders_of_splits_are_read_by_split_and_a_split_that_is_not_there_is_answered(tmp_path, above):
    write_imagefolder(tmp_path, *(f"{above}{part}/{name}" for part in ("train", "test") for name in ("cat", "dog")))
    pairs = read_pairs(tmp_path)
    assert list(pairs.names) == [f"{above}train/{name}/{n}.png" for name in ("cat", "dog") for n in range(2)]
    assert Counter(each.reason for each in pairs.left_out) == {"a file of another split": 6}
    assert read_pairs(tmp_path, split="test").names[0] == f"{above}test/cat/0.png"
    parts = ", ".join(str(tmp_path / f"{above}{part}") for part in ("test", "train"))
    for options in ({"split": "val"}, {"default_split": "val"}):  # as --split and data.val have it
        with pytest.raises(
            ValueError, match=re.escape(f"{tmp_path} has no split 'val'; name one of its parts: {parts}")
        ):
            read_pairs(tmp_path, **options)


def test_a_table_above_the_folders_of_splits_is_read_by_the_split_that_they_tell(tmp_path):
    write_imagefolder(tmp_path, "train", "test")
    for name in ("train", "test"):
        (tmp_path / name / "metadata.csv").unlink()
    lines = [f"./{part}/{n}.png,{n} of {part}" for part in ("train", "test") for n in range(2)]
    table(tmp_path / "metadata.csv", "file_name,text", *lines)
    assert [pair.captions for pair in read_pairs(tmp_path)] == [("0 of train",), ("1 of train",)]
    pairs = read_pairs(tmp_path, split="test")
    assert [pair.captions for pair in pairs] == [("0 of test",), ("1 of test",)]
    assert [each.reason for each in pairs.left_out] == ["a row of another split (train)"] * 2
    with pytest.raises(
        ValueError, match=r"metadata\.csv names no picture of a split 'val', but those of test, train; --"
    ):
        read_pairs(tmp_path, default_split="val")


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_the_column_of_an_imagefolders_captions_is_named(three, suffix):
    rows = [{"file_name": f"{n}.png", "prompt": f"picture {n}"} for n in range(3)]
    table = {"jsonl": map(json.dumps, rows), "csv": ["file_name,prompt", *(",".join(row.values()) for row in rows)]}
    (three / f"metadata.{suffix}").write_text("\n".join(table[suffix]))
    with pytest.raises(
        ValueError, match=rf"metadata\.{suffix} has no column for the captions: its columns are .*prompt"
    ):
        read_pairs(three)
    pairs = read_pairs(three, caption_columns=["prompt"])
    assert [pair.captions for pair in pairs] == [(f"picture {n}",) for n in range(3)]
    (three / f"metadata.{suffix}").unlink()
    with pytest.raises(
        ValueError, match=r"--caption-column can't be followed: .* is a folder, without a metadata\.jsonl"
    ):
        read_pairs(three, caption_columns=["prompt"])


def test_a_table_under_a_suffix_that_is_not_read_is_no_hint(three):
    (three / "metadata.json1").write_text('{"file_name": "0.png", "text": "words"}\n')
    pairs = read_pairs(three)
    assert [pair.problem for pair in pairs] == [f"no captions: there is no {n}.txt beside it" for n in range(3)]
    assert [each.source for each in pairs.left_out] == ["metadata.json1"]


def test_a_folder_of_images_beside_a_table_asks_for_the_table(three):
    (three / "captions.csv").write_text("image,caption\n0.png,words\n")
    with pytest.raises(ValueError, match=r"miniclip shards .*captions\.csv OUT --images"):
        read_pairs(three)


@pytest.mark.parametrize(
    ("name", "text", "pictures"),
    [
        ("captions.txt", "image,caption\n0.png,a dog\n1.png,a cat\n", "Images"),  # Flickr8k's as Kaggle has it
        ("Flickr8k.token.txt", "0.png#0\ta dog\n0.png#1\tone\n1.png#0\ta cat\n", "Flicker8k_Dataset"),
        ("results.token", "0.png#0\ta dog\n", "flickr30k-images"),
        ("list.txt", "photos/1.png\ta cat\nphotos/0.png\ta dog\n", "."),
        ("captions.csv", "image,caption\n0.png,words\n", "images"),
    ],
)
def test_a_text_or_table_that_names_the_pictures_of_a_folder_is_named_as_the_source(three, name, text, pictures):
    (three / pictures).mkdir(exist_ok=True)
    for path in three.glob("*.png"):
        path.rename(three / pictures / path.name)
    (three / name).write_text(text)
    (three / "readme.txt").write_text("Pictures of dogs, 2006.")
    with pytest.raises(
        ValueError, match=rf"beside them, and {re.escape(name)}\. If that has their captions, name it: "
    ):
        read_pairs(three)


@pytest.mark.parametrize(
    ("pictures", "tables", "advised", "where"),
    [
        (["a/1.png", "a/2.png"], {"a/t.csv": "image,caption\n1.png,x\n2.png,y\n"}, "a/t.csv", "a"),  # Flickr30k's
        (["tr/1.png", "te/2.png"], {"test.csv": "image\n2.png\n", "train.csv": "image\n1.png\n"}, "train.csv", "tr"),
        (["i/pie/1.png", "i/tea/2.png"], {"m/train.json": '{"pie": ["pie/1"]}'}, "m/train.json", "i"),  # Food-101's
        (["val/1.png", "train/2.png"], {"d.json": '[{"filename": "1.png"}, {"filename": "2.png"}]'}, "d.json", "."),
    ],
)
def test_the_table_of_train_is_advised_with_the_folder_that_its_paths_are_in(
    tmp_path, pictures, tables, advised, where
):
    for number, name in enumerate(pictures):
        write_picture(tmp_path / name, number)
    for name, text in tables.items():
        table(tmp_path / name, text)
    command = f"miniclip shards {tmp_path / advised} OUT --images {tmp_path / where}"
    with pytest.raises(ValueError, match=rf"name it: {re.escape(command)}$"):
        read_pairs(tmp_path)


def test_what_holds_captions_but_is_no_table_is_not_advised_as_one(three):
    text = '<annotations><image name="0.png"><tag label="cat"/></image></annotations>'  # CVAT's
    (three / "annotations.xml").write_text(text)
    with pytest.raises(ValueError, match=r"beside them, and annotations\.xml, which is an XML file; write .* a CSV$"):
        read_pairs(three)
    with pytest.raises(ValueError, match=r"annotations\.xml is an XML file; write its images' paths and captions into"):
        read_pairs(three / "annotations.xml")
    table(three / "captions.csv", "image,caption\n0.png,words\n")
    with pytest.raises(
        ValueError, match=r"and captions\.csv, annotations\.xml\. If that has .* shards \S+captions\.csv "
    ):
        read_pairs(three)


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"PK\3\4\x14\0\6\0\x8a", "a zip archive, as workbooks of Excel .* save the sheet as CSV"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1", r"a document of .* as Excel's \.xls: save the sheet as CSV"),
    ],
)
def test_a_table_that_is_no_text_is_told_as_what_it_is(tmp_path, start, what):
    (tmp_path / "table.csv").write_bytes(start)
    with pytest.raises(ValueError, match=rf"table\.csv is no text but {what}"):
        read_pairs(tmp_path / "table.csv")


def test_absolute_paths_are_not_told_as_relative_to_a_folder(tmp_path):
    table(tmp_path / "table.csv", "image,caption\n/of/another/1.png,a dog\n/of/another/2.png,a cat\n")
    with pytest.raises(ValueError, match=r"no image file /of/another/1\.png \(an absolute path, of another machine\?"):
        read_pairs(tmp_path / "table.csv", images=tmp_path)


def test_the_nearest_text_of_a_pictures_name_is_named_and_no_other_picture(tmp_path):
    for part in ("train", "valid"):
        write_picture(tmp_path / part / "images" / "1.png")
        table(tmp_path / part / "labels" / "1.txt", "0 0.5 0.5 0.1 0.1")
    assert [pair.problem.partition("; ")[2] for pair in read_pairs(tmp_path)[:2]] == [
        f"1.txt lies in {tmp_path / part / 'labels'}" for part in ("train", "valid")
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1"])
def test_a_list_of_pictures_is_named_as_the_source_whatever_its_encoding(tmp_path, encoding):
    write_picture(tmp_path / "images/0é.png")
    table(tmp_path / "list.txt", "0é.png;a dog", encoding=encoding)
    with pytest.raises(ValueError, match=r"without a text beside them, and list\.txt"):
        read_pairs(tmp_path)
    if encoding == "latin-1":
        with pytest.raises(ValueError, match=r"list\.txt is not UTF-8 text: .*Save it as UTF-8"):
            read_pairs(tmp_path / "list.txt", images=tmp_path / "images")
    else:
        assert [pair.captions for pair in read_pairs(tmp_path / "list.txt", images=tmp_path / "images")] == [("a dog",)]


@pytest.mark.parametrize("text", ["file_name,label\n0.png,cat\n", "name,caption\n0.png,words\n"])
def test_a_table_of_a_folder_without_captions_leaves_them_to_the_texts(three, text):
    (three / "metadata.csv").write_text(text)
    for number in range(3):
        (three / f"{number}.txt").write_text(f"picture {number}")
    pairs = read_pairs(three)
    assert [pair.captions for pair in pairs] == [("picture 0",), ("picture 1",), ("picture 2",)]
    assert [each.source for each in pairs.left_out] == ["metadata.csv"]


def test_a_table_of_a_folder_without_captions_is_refused_by_its_columns_where_there_are_no_texts(three):
    (three / "metadata.csv").write_text("file_name,label\n0.png,cat\n")
    with pytest.raises(ValueError, match=r"metadata\.csv has no column for the captions: .*'file_name', 'label'"):
        read_pairs(three)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize(
    "image, text",
    [
        ("a.jpg", "a.jpg.txt"), ("A.JPG", "A.TXT"), ("a.jpg", "a.caption"), ("a.v1.jpg", "a.v1.txt"),
        ("images/a.jpg", "text/a.txt"), ("train/images/x/a.jpg", "train/captions/x/a.txt"), ("a", "a.txt"),
        ("a.jfif", "a.txt"), ("a.jpg_large", "a.txt"), ("a.img.jpg", "a.caption.txt"), ("a.jpg", "a.Caption.txt"),
        (unicodedata.normalize("NFD", "é.jpg"), unicodedata.normalize("NFC", "é.txt")),
    ],
)  # fmt: skip
def test_a_picture_finds_its_text_in_every_usual_place(tmp_path, image, text):
    for name, data in ((image, RED), (text, b"words")):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(data)
    (pair,) = pairs = read_pairs(tmp_path / "d")
    assert (pair.captions, pair.problem) == (("words",), None)
    is_beside = Path(image).parent == Path(text).parent
    assert ("beside each" if is_beside else "in folders of their own") in pairs.found


def test_roles_in_names_join_one_picture_and_one_text_alone(tmp_path):
    for name in ("a.img.jpg", "a.photo.jpg", "a.caption.txt", "b.v1.jpg", "b.v2.txt", "c.image.jpg", "c.text.txt"):
        (tmp_path / name).write_bytes(RED if name.endswith(".jpg") else b"words")
    pairs = read_pairs(tmp_path)
    assert [pair.source for pair in pairs if not pair.problem] == ["c.image.jpg"]
    assert len(pairs) == 6


def test_a_caption_of_several_lines_is_one_for_the_api_too(tmp_path):
    pack([Pair("a", RED, ("one\ntwo",))], tmp_path / "out", source="here")
    assert Shards(tmp_path / "out")[0].captions == ("one two",)


# ---------------------------------------------------------------------------------------------------------------------
# Texts that programs wrote


WRITTEN = [
    ("[{'caption': 'a dog'}, {'caption': 'a cat'}]", ["a dog", "a cat"]),  # pandas, of a list of mappings
    ('["a dog", null]', ["a dog"]),
    ("['a dog', nan]", ["a dog"]),
    ("('a dog', 'a cat')", ["a dog", "a cat"]),
    ("array(['a dog', 'a cat'], dtype=object)", ["a dog", "a cat"]),
    ('{"a dog","a cat"}', ["a dog", "a cat"]),  # PostgreSQL's array
    ('{"caption": "a dog", "lang": "en"}', ["a dog"]),
    ('{"raw": "A dog.", "tokens": ["a", "dog"]}', ["A dog."]),
    ("b'caf\\xc3\\xa9'", ["café"]),  # Python's bytes
    ("[b'a dog', b'a cat']", ["a dog", "a cat"]),
    ("NA", []),
    ("b'a' b'b'", ["b'a' b'b'"]),
    ("[]", []),
    ("[a plate of food]", ["[a plate of food]"]),
    ("(left) a dog (right)", ["(left) a dog (right)"]),
    ("[1, 2]", ["[1, 2]"]),
    ("{x: a dog}", ["{x: a dog}"]),
    ("('a dog')", ["('a dog')"]),
]


@pytest.mark.parametrize("text, captions", WRITTEN, ids=[text[:16] for text, _ in WRITTEN])
def test_lists_and_mappings_that_were_written_as_text_give_their_captions_in_cells_files_and_tars(
    tmp_path, text, captions
):
    write_picture(tmp_path / "a.jpg", 1)
    (tmp_path / "a.txt").write_text(text)
    (pair,) = read_pairs(tmp_path)
    assert [text for text in pair.captions if text] == texts_in(text) == captions_in(text) == captions
    assert list(record_of("a", {"image": RED, "txt": text.encode()}.get).captions) == captions


def test_a_mapping_of_unknown_fields_is_no_caption_in_cells_files_and_tars(tmp_path):
    write_picture(tmp_path / "a.jpg", 1)
    (tmp_path / "a.txt").write_text("{'x': 'a dog'}")
    reason = "its caption is a mapping of 'x'; which of them is the caption can't be known"
    assert [pair.problem for pair in read_pairs(tmp_path)] == [reason]
    for read in (texts_in, captions_in, lambda text: record_of("a", {"image": RED, "txt": text.encode()}.get)):
        with pytest.raises(ValueError, match=reason):
            read("{'x': 'a dog'}")


def csv_of_cells(path, *cells):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"{n}.png", cell) for n, cell in enumerate(cells))])
    for n, _ in enumerate(cells):
        write_picture(path.parent / f"{n}.png", n)
    return path


POSTGRES = [
    ('{dog,"a red dog"}', ["dog", "a red dog"]),  # which quotes an element only where it has to
    ('{"a red dog",NULL}', ["a red dog"]),
    ('{dog,wet,"NULL"}', ["dog", "wet"]),
    ("{NULL}", []),
    ('{"a \\"big\\" dog, {wet}",o\'clock,""}', ['a "big" dog, {wet}', "o'clock"]),
    ('{"a \\"dog\\"","\\\\o\\\\",x}', ['a "dog"', "\\o\\", "x"]),
    ('{"one\ntwo",cat}', ["one two", "cat"]),
    ('{3,"a dog"}', ["3", "a dog"]),
    ("{犬,猫}", ["犬", "猫"]),
    ("{1,2}", ["{1,2}"]),  # as [1, 2]
    ("{a red dog}", ["{a red dog}"]),
    ("{dog, cat}", ["{dog, cat}"]),
    ('{a man, "the boss"}', ['{a man, "the boss"}']),
    ("{dog} and {cat}", ["{dog} and {cat}"]),
    ("{dog},{cat}", ["{dog},{cat}"]),
    ("{{dog}}", ["{{dog}}"]),
    ("{}", []),
    ("{1}", ["{1}"]),
    ("{1e5,2}", ["{1e5,2}"]),
    ("{0.1,NaN}", ["{0.1,NaN}"]),
    ("{-Infinity,NULL}", ["{-Infinity,NULL}"]),
    ("{a,1}", ["a", "1"]),
    ('{"{dog}",cat}', ["{dog}", "cat"]),
]


def test_arrays_that_postgresql_wrote_into_a_table_give_their_captions(tmp_path):
    pairs = list(read_pairs(csv_of_cells(tmp_path / "a.csv", *(text for text, _ in POSTGRES))))
    assert [[" ".join(each.split()) for each in pair.captions] for pair in pairs] == [texts for _, texts in POSTGRES]
    for text, texts in POSTGRES:
        assert texts_in_cell(text) == texts_in_cell(text.encode()) == texts


@pytest.mark.parametrize("text", ["{dog}", "{?}", "{red|blue}", "{caption:dog,id:3}", '{note=wet,"a red dog"}'])
def test_braces_that_may_be_a_list_or_a_text_are_refused_with_how_to_write_either(tmp_path, text):
    (pair,) = read_pairs(csv_of_cells(tmp_path / "a.csv", text))
    assert pair.problem.startswith(f"its caption is {text}, which may be a list of PostgreSQL's or a text in braces")
    ways = re.fullmatch(".*write as JSON the list, (.*), or the text alone in a list, (.*)", pair.problem)
    (of_list, of_text) = read_pairs(csv_of_cells(tmp_path / "b.csv", *ways.groups()))
    assert list(of_list.captions) == text[1:-1].replace('"', "").split(",")
    assert of_text.captions == (text,)


@pytest.mark.parametrize("text", ["{name}", "{red|blue}", "{?}", "{cat,dog}", "{}"])
def test_a_caption_in_braces_stays_one_wherever_postgresql_did_not_write_it(tmp_path, text):
    mapping = json.dumps([{"caption": text}])
    pairs = list(read_pairs(csv_of_cells(tmp_path / "table" / "a.csv", json.dumps([text, "a dog"]), mapping)))
    assert [pair.captions for pair in pairs] == [(text, "a dog"), (text,)]
    pack(pairs, tmp_path / "shards", source="here")
    assert [record.captions for record in map(Shards(tmp_path / "shards").__getitem__, range(2))] == [
        (text, "a dog"),
        (text,),
    ]
    for name, facts in (("0", None), ("1", {"caption": text}), ("2", [text]), ("3", text)):
        write_picture(tmp_path / "folder" / f"{name}.jpg", int(name))
        beside = tmp_path / "folder" / f"{name}.{'txt' if facts is None else 'json'}"
        beside.write_text(text if facts is None else json.dumps(facts))
    assert [pair.captions for pair in read_pairs(tmp_path / "folder")] == [(text,)] * 4
    assert list(record_of("a", {"image": RED, "txt": f"{text}\na dog".encode()}.get).captions) == [text, "a dog"]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("0 0.512 0.433 0.21 0.33\n1 0.2 0.3 0.1 0.1\n", "detectors label boxes .0 0.512"),
        ("12 " + "0.5 0.25 " * 6, "detectors label boxes"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", "a pointer of Git LFS.*git lfs pull"),
        ("{\\rtf1\\ansi a dog\\par}", "in RTF; save it as plain text"),
        ("<!DOCTYPE html><html>404</html>", "HTML or XML"),
        ("<annotation><folder>x</folder></annotation>", None),  # a caption may begin so
        ("7 cats and 3 dogs", None),
        ("1 2 3", None),
        ("3 1 4 1 5 9", None),  # what a picture of digits says
    ],
)
def test_what_stands_beside_a_picture_and_is_no_caption_is_rejected_by_its_kind(tmp_path, text, reason):
    write_picture(tmp_path / "a.jpg", 1)
    (tmp_path / "a.txt").write_text(text)
    (pair,) = read_pairs(tmp_path)
    if reason is None:
        assert pair.captions == (" ".join(text.split()),)
        return
    assert re.search(reason, pair.problem)
    with pytest.raises(ValueError, match=reason):
        record_of("a", {"image": RED, "txt": text.encode()}.get)


def test_a_text_in_utf16_without_its_mark_is_refused_and_does_not_train_with_a_nul_after_each_letter(tmp_path):
    write_picture(tmp_path / "a.jpg", 1)
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
        (tmp_path / "a.txt").write_bytes("a red bird\nin a tree".encode(encoding))
        assert re.search("a.txt is not UTF-8.*UTF-16.*Save it as UTF-8", read_pairs(tmp_path)[0].problem)
        (tmp_path / "t.csv").write_bytes("image,caption\na.jpg,red\n".encode(encoding))
        with pytest.raises(ValueError, match=r"t\.csv is not UTF-8.*UTF-16.*Save it as UTF-8"):
            read_pairs(tmp_path / "t.csv")


@pytest.mark.parametrize("width", [6, 7, 8, 9, 32, 64, 1001])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_zeros_that_fill_lines_up_are_not_utf16(width, end):
    for count in (1, 2, 5):
        for field in ("a cat", "a"):
            data = (field.ljust(width, "\0") + end).encode() * count
            assert captions_in(decode_text(data, "a.txt")) == [field] * count
            assert captions_in(decode_text(data.rstrip(end.encode()), "a.txt")) == [field] * count
    assert captions_in(decode_text(b"a\0\nb\0\n", "a.txt")) == ["a", "b"]
    table = ("name".ljust(width, "\0") + "," + "a cat".ljust(width, "\0") + end) * 3
    assert decode_text(table.encode(), "a.csv") == table


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_utf16_is_known_in_lines_that_zeros_fill_up(encoding, end):
    for text in (
        f"a cat{end}",
        f"a{end}b{end}",
        f"a cat{end}\0\0",
        ("a cat".ljust(16, "\0") + end) * 3,
        f"chat ĀĂ 一{end}",
    ):
        with pytest.raises(ValueError, match=r"every other byte is 0, as in UTF-16"):
            decode_text(text.encode(encoding), "a.txt")


PADDED = ["a\0", "cat\0", "é\0", "a cat on a mat" + "\0" * 60, "a cat" + "\0" * 200, "a cat \0\0\n"]


@pytest.mark.parametrize("source", ["jsonl", "parquet", "txt"])
def test_zeros_that_fill_a_field_up_are_no_caption_and_others_are_rejected(tmp_path, source):
    captions = [*PADDED, "a\0cat on a mat, which is long", "\0\0", "cat"]
    for number, caption in enumerate(captions):
        path = write_picture(tmp_path / f"src/{number}.png", number)
        if source == "txt":
            path.with_suffix(".txt").write_bytes(caption.encode())
    rows = [{"image": f"{number}.png", "caption": caption} for number, caption in enumerate(captions)]
    if source == "jsonl":
        (tmp_path / "src/t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif source == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "src/t.parquet")
    pack(
        read_pairs(tmp_path / "src" if source == "txt" else tmp_path / f"src/t.{source}"), tmp_path / "out", source="s"
    )
    assert [record.captions for record in Shards(tmp_path / "out")] == [
        (caption.rstrip("\0 \n"),) for caption in (*PADDED, "cat")
    ]
    assert set(rejections(tmp_path / "out").values()) == {
        "its caption holds a zero byte: 'a\\x00cat on a mat, which is long'",
        "every caption is empty",
    }


@pytest.mark.parametrize("caption", ["<html>a cat</html>", "{\\rtf1 a cat}", "0 0.5 0.5 0.1 0.1"])
def test_a_cell_that_could_not_be_read_back_from_shards_is_rejected(tmp_path, caption):
    for number in range(2):
        write_picture(tmp_path / f"{number}.png", number)
    rows = [{"image": f"{number}.png", "caption": text} for number, text in enumerate([caption, "a cat"])]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pack(read_pairs(tmp_path / "t.jsonl"), tmp_path / "out", source="t")
    assert [record.captions for record in Shards(tmp_path / "out")] == [("a cat",)]
    assert "its text is no caption but" in rejections(tmp_path / "out")["0.png"]


def test_a_caption_with_a_word_of_more_letters_than_any_is_rejected(tmp_path):
    endless, letters = "x" * 300_000, r"its caption has a word of 300,000 letters \(x+…\), and at most 262,144 are read"
    for number in range(2):
        write_picture(tmp_path / f"{number}.png", number)
    (tmp_path / "t.csv").write_text(f"image,caption\n0.png,{endless}\n1.png,{'long ' * 60_000}\n")
    pack(read_pairs(tmp_path / "t.csv"), tmp_path / "out", source="t")
    assert [len(record.captions[0]) for record in Shards(tmp_path / "out")] == [299_999]
    assert re.search(letters, rejections(tmp_path / "out")["0.png"])
    with pytest.raises(ValueError, match=letters):
        record_of("a", {"image": RED, "txt": f"red\n{endless}".encode()}.get)


def test_a_blank_text_in_a_tar_leaves_the_caption_to_the_facts():
    assert record_of("a", {"image": RED, "txt": b" \n", "json": b'{"caption": "red"}'}.get).captions == ("red",)
    assert record_of("a", {"image": RED, "txt": b"nan", "json": b"{}"}.get).captions == ()


# ---------------------------------------------------------------------------------------------------------------------
# Splits, and captions of one image that another has


def write_table_of_splits(folder: Path, kind: str) -> Path:
    for number in range(5):
        write_picture(folder / f"{number}.jpg", number)
    parts = ["train", "val", "Train ", "test", ""]
    rows = [{"file_name": f"{n}.jpg", "text": f"text {n}", "split": part} for n, part in enumerate(parts)]
    path = folder / f"metadata.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    elif kind == "csv":
        lines = ["file_name,text,split", *(",".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines))
    else:
        path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("kind", ["csv", "json", "parquet", "a folder"])
def test_rows_of_another_split_do_not_train_and_are_told(tmp_path, kind):
    table = write_table_of_splits(tmp_path, "csv" if kind == "a folder" else kind)
    source = tmp_path if kind == "a folder" else table
    pairs = read_pairs(source)
    assert [pair.captions for pair in pairs] == [("text 0",), ("text 2",)]
    assert sorted((each.source, each.reason) for each in pairs.left_out) == [
        ("row 1", "a row of another split (val)"), ("row 3", "a row of another split (test)"),
        ("row 4", "a row of another split (blank)"),
    ]  # fmt: skip
    assert [row["text"] for row in pickle.loads(pickle.dumps(read_table(table, "test")[1]))] == ["text 3"]
    (validation,) = read_pairs(source, split="validation")
    assert validation.captions == ("text 1",)
    with pytest.raises(ValueError, match="column 'split' is 'extra'; valid for --split are test, train, val"):
        read_pairs(source, split="extra")


@pytest.mark.parametrize(
    "column, values, kept",
    [
        ("split", ("banana", "train", "apple"), 3),
        ("split", ("test", "test", "test"), 3),
        ("split", ("0", "1", "2"), 3),
        ("split", ("train", "unlabelled", "test"), 1),
        ("Subset", ("train", "val", "val"), 1),
        ("set", ("training", "train", "testing"), 2),
        ("set", ("chess", "tea", "train"), 3),
        ("data set", ("train", "valid", "test"), 1),
        ("phase", ("TRAIN", "VAL", "TRAIN"), 2),
        ("Usage", ("Training", "PublicTest", "PrivateTest"), 1),  # FER2013's
        ("stage", ("TRAIN", "VALIDATE", "tst"), 1),
        ("phase", ("train", "", "test"), 3),
        ("kind", ("train", "test tube", "test"), 3),
        ("place", ("train2014", "val2014", "train2014"), 3),
    ],
)
def test_a_column_that_names_two_parts_is_followed_and_another_leaves_all_rows(tmp_path, column, values, kept):
    lines = [f"image,caption,{column}"]
    for number, value in enumerate(values):
        write_picture(tmp_path / f"{number}.jpg", number)
        lines.append(f"{number}.jpg,red,{value}")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    pairs = read_pairs(tmp_path / "t.csv")
    assert (len(pairs), len(pairs.left_out)) == (kept, len(values) - kept)


@pytest.mark.parametrize("kind", ["csv", "parquet", "datasets", "datasets in a mapping", "a folder"])
def test_a_split_that_is_asked_for_is_read_by_its_name_or_refused_with_those_that_there_are(tmp_path, kind):
    for number in range(3):
        write_picture(tmp_path / f"{number}.jpg", number)
    parts = ["train", "Holdout", "train"]
    rows = [{"file_name": f"{n}.jpg", "text": f"text {n}", "split": part} for n, part in enumerate(parts)]
    source = tmp_path / ("metadata.csv" if kind in ("csv", "a folder") else "set")
    if kind in ("csv", "a folder"):
        source.write_text("\n".join(["file_name,text,split", *(",".join(row.values()) for row in rows)]))
    elif kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        source = source.with_suffix(".parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), source)
    else:
        saved = saved_set({"text": [row["text"] for row in rows], "split": parts})
        (saved if kind == "datasets" else datasets_of({"test": saved})).save_to_disk(source)
    source = tmp_path if kind == "a folder" else source

    def captions(**split: str) -> list[str]:
        return [caption for pair in read_pairs(source, **split) for caption in pair.captions]

    assert captions(split="holdout") == ["text 1"]
    assert captions(split="train") == ["text 0", "text 2"]
    with pytest.raises(ValueError, match="column 'split' is 'nonsense'; valid for --split are holdout, train"):
        captions(split="nonsense")
    with pytest.raises(ValueError, match="'val'; valid for --split are holdout, train"):
        captions(default_split="val")  # rows of train validate nothing
    if kind == "datasets in a mapping":  # of a name that is not the default's
        assert captions() == ["text 0", "text 2"]
    else:
        assert captions() == ["text 0", "text 1", "text 2"]
        assert "all rows: column 'split' has holdout, train; --split takes those of one" in read_pairs(source).found


def saved_set(columns: dict[str, list[str]]):
    """A set of Hugging Face's `datasets` with a picture in each row."""
    datasets = pytest.importorskip("datasets")
    features = {name: datasets.Value("string") for name in columns} | {"image": datasets.Image()}
    count = len(next(iter(columns.values())))
    pictures = [{"bytes": image_bytes(number), "path": None} for number in range(count)]
    return datasets.Dataset.from_dict({**columns, "image": pictures}, features=datasets.Features(features))


def datasets_of(parts: dict[str, object]):
    return pytest.importorskip("datasets").DatasetDict(parts)


def test_a_split_of_what_has_none_is_refused_but_for_one_that_the_name_tells(tmp_path):
    write_picture(tmp_path / "0.jpg", 0)
    (tmp_path / "0.txt").write_text("red")
    for name in ("t.csv", "val.csv"):
        (tmp_path / name).write_text("image,caption\n0.jpg,red\n")
    assert len(read_pairs(tmp_path / "val.csv", split="validation")) == 1
    for name in ("t.csv", "val.csv"):
        with pytest.raises(ValueError, match=f"{name} has no split 'test'; a column 'split' would name the part"):
            read_pairs(tmp_path / name, split="test")
    with pytest.raises(ValueError, match=r"is a folder of pairs, so --split test can't be followed$"):
        read_pairs(tmp_path, split="test")
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match=r"can't be followed; name one of its parts: .*test, .*train$"):
        read_pairs(tmp_path, split="test")


def test_what_tells_of_no_parts_is_for_training_and_a_name_tells_a_part(tmp_path):
    """`--split train` holds for any source without parts; folders are named as COCO's, or val_images."""
    for name in ("plain", "val2017", "val_images", "train"):
        (tmp_path / name).mkdir()
        write_picture(tmp_path / name / "0.jpg", 0)
        (tmp_path / name / "0.txt").write_text("red")
        pack(read_pairs(tmp_path / name), tmp_path / "shards" / name, source=name)
        (tmp_path / "tables" / name).mkdir(parents=True)
        (tmp_path / "tables" / name / "t.csv").write_text(f"image,caption\n{tmp_path / name / '0.jpg'},red\n")
        for source in (tmp_path / name, tmp_path / "shards" / name, tmp_path / "tables" / name / "t.csv"):
            splits = ("val", "validation", *(["val2017"] if name == "val2017" else [])) if "val" in name else ("train",)
            for split in splits:
                assert len(open_pairs(str(source), split=split)) == 1
            with pytest.raises(ValueError, match="test"):
                open_pairs(str(source), split="test")


def test_a_column_that_was_left_over_does_not_stand_against_the_name_of_its_file(tmp_path):
    """As of a train table that was divided anew into train.csv and val.csv."""
    write_picture(tmp_path / "0.jpg", 0)
    for name in ("val.csv", "t.csv"):
        (tmp_path / name).write_text("image,caption,split\n0.jpg,red,train\n")
    assert len(read_pairs(tmp_path / "val.csv", default_split="val")) == 1
    with pytest.raises(ValueError, match="column 'split' is 'val'; valid for --split are train"):
        read_pairs(tmp_path / "t.csv", default_split="val")


def test_a_saved_set_of_one_name_is_read_by_its_column_of_splits(tmp_path):
    """As Flickr30k is handed out: all of it is called test, and a column names the parts."""
    columns = {"caption": list("abcd"), "split": ["train", "val", "train", "test"], "label": list("xyxy")}
    datasets_of({"test": saved_set(columns).class_encode_column("label")}).save_to_disk(tmp_path / "set")
    pairs = read_pairs(tmp_path / "set")
    assert [(pair.source, pair.captions) for pair in pairs] == [("row 0", ("a",)), ("row 2", ("c",))]
    assert [(each.source, each.reason) for each in pairs.left_out] == [
        ("row 1", "a row of another split (val)"), ("row 3", "a row of another split (test)"),
    ]  # fmt: skip
    assert [pair.image for pair in read_pairs(tmp_path / "set", split="val")] == [image_bytes(1)]
    with pytest.warns(UserWarning, match="a row of another split"):
        assert open_dataset(tmp_path / "set", task="retrieval").captions == (("d",),)
    with pytest.warns(UserWarning, match="a row of another split"):
        assert len(open_dataset(tmp_path / "set", split="train")) == 2


@pytest.mark.parametrize("form", ["torch", "pandas", "arrow"])
def test_a_set_that_was_saved_with_a_format_for_training_is_read_as_without_it(tmp_path, form):
    """Its values came as tensors or series, of the format's columns alone; captions and labels were told from those."""
    columns = {"caption": ["a", "b"], "year": ["1", "2"], "label": ["x", "y"]}
    plain = saved_set(columns).class_encode_column("label")
    plain = plain.cast_column("year", pytest.importorskip("datasets").Value("int64"))
    plain.with_format(form, columns=["image", "label"]).save_to_disk(tmp_path / "set")
    datasets_of({"train": plain.with_format(form)}).save_to_disk(tmp_path / "sets")
    for source in (tmp_path / "set", tmp_path / "sets"):
        assert [(pair.image, pair.captions, pair.extra) for pair in read_pairs(source)] == [
            (image_bytes(0), ("a",), {"year": 1, "label": 0}), (image_bytes(1), ("b",), {"year": 2, "label": 1}),
        ]  # fmt: skip
        assert open_dataset(source).labels == (0, 1)


@pytest.mark.parametrize("writer", ["pandas", "pandas, bytes", "datasets"])
def test_pictures_that_a_csv_holds_as_python_writes_them_are_read(tmp_path, monkeypatch, writer):
    """{'bytes': b'\\x89PNG…', 'path': None}, {'bytes': None, 'path': 'a.jpg'} or b'\\x89PNG…' in a cell."""
    monkeypatch.chdir(tmp_path)
    write_picture(Path("0.jpg"), 0)
    if writer == "datasets":
        datasets = pytest.importorskip("datasets")
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = {"image": ["0.jpg", {"bytes": image_bytes(1), "path": None}], "text": ["a", "b"]}
        datasets.Dataset.from_dict(rows, features=features).to_csv("t.csv")
    else:
        cells = [{"bytes": None, "path": "0.jpg"}, {"bytes": image_bytes(1), "path": None}]
        cells = [image_bytes(0), image_bytes(1)] if "," in writer else cells
        pytest.importorskip("pandas").DataFrame({"image": cells, "text": ["a", "b"]}).to_csv("t.csv")
    pairs = list(read_pairs(tmp_path / "t.csv"))
    assert [pair.captions for pair in pairs] == [("a",), ("b",)]
    assert pairs[0].image == (image_bytes(0) if "," in writer else tmp_path / "0.jpg")
    assert (pairs[1].image, pairs[1].source) == (image_bytes(1), "row 1")


@pytest.mark.parametrize("separator", [" ", ", "])
def test_pixels_and_long_texts_in_the_place_of_images_are_named_in_a_sentence(tmp_path, separator):
    """FER2013 has its pictures as numbers in a column `pixels`, and each was quoted whole, as a path."""
    pixels = separator.join(str(number % 256) for number in range(48 * 48))
    write_picture(tmp_path / "0.jpg", 0)
    cells = [pixels, pixels, "x/" * 3000, "0.jpg"]
    (tmp_path / "t.csv").write_text("pixels,label\n" + "".join(f'"{cell}",{n % 2}\n' for n, cell in enumerate(cells)))
    reason = "a text of 2,304 numbers is in the place of an image; write the pixels into files"
    pairs = read_pairs(tmp_path / "t.csv", image_column="pixels", caption_columns=["label"])
    assert [(pair.source, pair.problem) for pair in pairs][:2] == [("row 0", reason), ("row 1", reason)]
    assert pairs[2].problem == f"a text of 6,000 letters is in the place of an image ({'x/' * 19}x…)"
    data = open_dataset(tmp_path / "t.csv", image_column="pixels", label_column="label")
    assert (data.keys[0], data.images[0].reason) == ("t.csv: row 1", reason)


TURNS = {"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "a red wall"}
CHAT = tuple(
    {"role": role, "content": [{"type": "text", "text": text}]}
    for role, text in (("user", "?"), ("assistant", "a red wall"))
)


@pytest.mark.parametrize("turns", [TURNS, CHAT], ids=["LLaVA", "chat"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_the_caption_of_a_conversation_is_its_one_answer(tmp_path, turns, suffix):
    """And never the question; of several answers none is known to describe the picture."""
    for number in range(2):
        write_picture(tmp_path / f"{number}.jpg", number)
    rows = [{"image": "0.jpg", "talk": list(turns)}, {"image": "1.jpg", "talk": [*turns, *turns]}]
    if suffix == "jsonl":
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        frame = pytest.importorskip("pandas").DataFrame(rows)
        getattr(frame, f"to_{suffix}")(tmp_path / f"t.{suffix}")
    first, second = read_pairs(tmp_path / f"t.{suffix}", caption_columns=["talk"])
    assert first.captions == ("a red wall",)
    assert "a conversation with 2 answers" in second.problem


def test_imagefolder_is_read_by_file_name_alone(tmp_path):
    for number in range(3):
        write_picture(tmp_path / f"{number}.jpg", number)
    for other in ({"filename": "2.jpg"}, {"path": "/content/drive/0.jpg"}, {"image": "http://127.0.0.1:9/0.jpg"}):
        rows = [{"file_name": f"{n}.jpg", "text": f"text {n}", **other} for n in range(3)]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        found = [(pair.image, pair.captions, pair.problem) for pair in read_pairs(tmp_path)]
        assert found == [(tmp_path / f"{n}.jpg", (f"text {n}",), None) for n in range(3)]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_pictures_in_a_table_come_before_the_addresses_that_they_are_from(tmp_path, suffix):
    """As img2dataset writes Parquet: in its column `url` stands where a picture was; some could not be had."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pictures = [None, image_bytes(1), image_bytes(2)]
    rows = [
        {"url": "http://127.0.0.1:9/a.png", suffix: data, "caption": f"text {n}", "label": "a"}
        for n, data in enumerate(pictures)
    ]
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path / "a.parquet")
    assert [pair.image for pair in pairs] == pictures
    assert f"from column '{suffix}', not from 'url', captions" in pairs.found
    assert image_set(tmp_path / "a.parquet").open(1).getpixel((0, 0)) == picture(1).getpixel((0, 0))
    assert open_dataset(tmp_path / "a.parquet").open(2).getpixel((0, 0)) == picture(2).getpixel((0, 0))


def test_of_several_columns_that_is_taken_whose_cells_are_files(tmp_path):
    write_picture(tmp_path / "photos" / "0.jpg", 0)
    (tmp_path / "a.csv").write_text("image,url,image_path,caption\n17,http://127.0.0.1:9/0.jpg,photos/0.jpg,red\n")
    (pair,) = pairs = read_pairs(tmp_path / "a.csv")
    assert pair.image == tmp_path / "photos/0.jpg"
    assert "1 image from column 'image_path', not from 'image', 'url', captions" in pairs.found
    (tmp_path / "a.csv").write_text("url,file_name,caption\nhttp://127.0.0.1:9/0.jpg,gone.jpg,red\n")
    assert "gone.jpg" in read_pairs(tmp_path / "a.csv")[0].problem  # the web is not read in place of a missing file


NAMES = sorted(f"{n}.jpg" for n in range(12))  # 0, 1, 10, 11, 2: a row's number is another picture's name


@pytest.fixture
def twelve(tmp_path) -> Path:
    for name in NAMES:
        write_picture(tmp_path / name, int(name.removesuffix(".jpg")))
    return tmp_path


def check_names_are_captions(source: Path, folder: Path, **options: Any) -> None:
    pairs = read_pairs(source, **options)
    assert [(pair.image, pair.captions, pair.problem) for pair in pairs] == [
        (folder / name, (name.removesuffix(".jpg"),), None) for name in NAMES
    ]


@pytest.mark.parametrize("orient", ["index", "columns", "split", "records", "table"])
@pytest.mark.parametrize("column", ["filename", "file_name", "image_name", "img", "file", "bild"])
def test_a_row_number_of_pandas_is_not_taken_for_the_picture(twelve, orient, column):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({column: NAMES, "caption": [name.removesuffix(".jpg") for name in NAMES]})
    frame.to_json(twelve / "t.json", orient=orient)
    if column == "bild":
        with pytest.raises(ValueError, match=r"no column for the image paths: its columns are .*'bild', 'caption'"):
            read_pairs(twelve / "t.json")
        check_names_are_captions(twelve / "t.json", twelve, image_column="bild")
        return
    check_names_are_captions(twelve / "t.json", twelve)
    frame.rename(columns={"caption": "label"}).to_json(twelve / "t.json", orient=orient)
    data = open_dataset(twelve / "t.json")
    labels = {Path(key).name: data.classnames[label] for key, label in zip(data.keys, data.labels, strict=True)}
    assert labels == {name: name.removesuffix(".jpg") for name in NAMES}


@pytest.mark.parametrize("orient", ["index", "columns"])
def test_an_index_of_file_names_is_the_pictures(twelve, orient):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"caption": [name.removesuffix(".jpg") for name in NAMES]}, index=NAMES)
    frame.to_json(twelve / "t.json", orient=orient)
    check_names_are_captions(twelve / "t.json", twelve)
    frame.rename(columns={"caption": "label"}).to_json(twelve / "t.json", orient=orient)
    assert [Path(key).name for key in open_dataset(twelve / "t.json").keys] == NAMES


@pytest.mark.parametrize("kind", ["csv", "parquet", "json"])
@pytest.mark.parametrize("number", ["{}", "{:06d}"])
def test_a_number_is_not_taken_for_the_picture_where_another_column_names_it(twelve, kind, number):
    """An id and a file's name side by side: the number of each row is the next picture's name."""
    pandas = pytest.importorskip("pandas")
    for n in range(13):
        shutil.copy(twelve / "0.jpg", twelve / f"{n:06d}.jpg")
    columns = {"image": range(1, 13), "file_name": NAMES, "caption": [name.removesuffix(".jpg") for name in NAMES]}
    frame = pandas.DataFrame(columns)
    if number != "{}":
        frame["image"] = frame["image"].map(number.format)
    write = {"csv": lambda path: frame.to_csv(path, index=False), "parquet": frame.to_parquet, "json": frame.to_json}
    path = twelve / f"t.{kind}"
    write[kind](path)
    check_names_are_captions(path, twelve)
    assert "from column 'file_name', not from 'image'" in read_pairs(path).found
    for name in NAMES:  # the numbers alone fit files now, all of them others than are named
        (twelve / name).rename(twelve / f"gone{name}")
    with pytest.raises(
        ValueError, match=r"none of the first 12 .* no image file .*0\.jpg.*; --image-column may name 'image'"
    ):
        read_pairs(path)


def test_a_name_without_a_suffix_is_the_picture_where_another_column_has_it_of_another_place(twelve):
    rows = [f"{name.removesuffix('.jpg')},/home/me/{name},{name.removesuffix('.jpg')}" for name in NAMES]
    (twelve / "t.csv").write_text("\n".join(["image,filepath,caption", *rows]))
    check_names_are_captions(twelve / "t.csv", twelve, image_column="image")
    pairs = read_pairs(twelve / "t.csv")
    assert "from column 'image', not from 'filepath'" in pairs.found
    assert [pair.image for pair in pairs] == [twelve / name for name in NAMES]


@pytest.mark.parametrize(
    ("columns", "cells", "column"),
    [
        ("image,filename", "isic_{0},DSC_{1}.JPG", "image"),
        ("file,path", "{0:05d},raw/IMG_{1}.png", "file"),
        ("image,thumbnail", "isic_{0},thumbnails/{0}_small.png", "image"),
        ("image,thumbnail", "{0:05d},thumbnails/{0}.png", "image"),
        ("file,page", "{0:05d},https://example.org/{1}.jpg", "file"),
        ("file,url", "{0:05d},https://example.org/{1}.jpg", "file"),
        ("image,url", "7{0},https://example.org/{1}.jpg", "url"),  # a number that is no file's name
    ],
)
def test_an_id_is_the_picture_where_the_names_beside_it_are_of_no_files(tmp_path, columns, cells, column):
    """The original's name, which the camera gave, and addresses say nothing of the files that there are."""
    for n in range(4):
        for name in (f"isic_{n}.jpg", f"{n:05d}.jpg", f"thumbnails/{n}_small.png", f"thumbnails/{n}.png"):
            write_picture(tmp_path / name, n)
    rows = [cells.format(n, 3 - n) for n in range(4)]
    (tmp_path / "t.csv").write_text("\n".join([f"{columns},caption", *(f"{row},a mole" for row in rows)]))
    assert find_image_column(*read_table(tmp_path / "t.csv"), tmp_path, "t")[0] == column
    if column != "url":
        stem = "isic_{}" if rows[0].startswith("isic") else "{:05d}"
        pairs = read_pairs(tmp_path / "t.csv")
        assert [pair.image for pair in pairs] == [tmp_path / f"{stem.format(n)}.jpg" for n in range(4)]


@pytest.mark.parametrize("shape", ["records", "columns"])
@pytest.mark.parametrize(
    "fact",
    [
        {"license": "https://creativecommons.org/licenses/by/4.0/"},
        {"url": "https://flickr.com/p/{}"},
        {"flickr_url": "http://example.org/{}_z.jpg"},
        {"thumb": "t/{}.png"},
        {"filename": "orig_{}.jpg"},
    ],
)
def test_numbers_as_keys_of_json_are_the_files_that_are_there_whatever_else_the_records_name(tmp_path, shape, fact):
    for n in range(4):
        write_picture(tmp_path / f"{n}.jpg", n)
    records = {
        str(n): {"caption": f"a cat {n}", **{name: text.format(3 - n) for name, text in fact.items()}} for n in range(4)
    }
    columns = {name: {key: record[name] for key, record in records.items()} for name in records["0"]}
    (tmp_path / "t.json").write_text(json.dumps(records if shape == "records" else columns))
    pairs = read_pairs(tmp_path / "t.json")
    assert [(pair.image, pair.captions) for pair in pairs] == [
        (tmp_path / f"{n}.jpg", (f"a cat {n}",)) for n in range(4)
    ]


def test_numbers_as_keys_of_json_are_no_files_where_there_are_none(tmp_path):
    (tmp_path / "t.json").write_text('{"0": {"url": "http://127.0.0.1:9/a.jpg", "caption": "red"}}')
    assert read_pairs(tmp_path / "t.json")[0].source == "http://127.0.0.1:9/a.jpg"


def test_a_table_whose_numbers_are_those_of_others_files_is_refused(twelve):
    rows = [f"{n},{name},{name.removesuffix('.jpg')}" for n, name in enumerate(NAMES)]
    (twelve / "t.csv").write_text("\n".join(["image,bild,caption", *rows]))
    with pytest.raises(
        ValueError, match=r"'image' holds numbers and 'bild' names files that are there; name the right"
    ):
        read_pairs(twelve / "t.csv")
    check_names_are_captions(twelve / "t.csv", twelve, image_column="bild")


@pytest.mark.parametrize("write", [lambda columns: columns, lambda columns: {
    name: {str(2 * n): value for n, value in enumerate(values)} for name, values in columns.items()
}], ids=["lists", "indices"])  # fmt: skip
def test_columns_in_json_are_known_by_any_name_that_columns_have(three, write):
    names = ["0.png", "1.png", "2.png"]
    columns = {"filename": names, "caption_0": ["a", "b", "c"], "caption_1": ["d", "e", "f"]}
    for each in (columns, {"bild": names, **{name: columns[name] for name in ("caption_0", "caption_1")}}):
        (three / "t.json").write_text(json.dumps(write(each)))
        pairs = read_pairs(three / "t.json", image_column=next(iter(each)))
        assert [pair.captions for pair in pairs] == [("a", "d"), ("b", "e"), ("c", "f")]
    (three / "t.json").write_text(json.dumps(write({"filename": names, "label": ["cat", "dog", "cat"]})))
    data = open_dataset(three / "t.json")
    assert (data.classnames, data.labels, data.keys) == (("cat", "dog"), (0, 1, 0), [str(three / n) for n in names])


@pytest.mark.parametrize(
    ("columns", "cells", "column"),
    [
        ("url,image_url", "http://127.0.0.1:9/product/{0},http://127.0.0.1:9/{0}.jpg?w=4", "image_url"),
        ("url,image_url", "http://127.0.0.1:9/product/{0},http://127.0.0.1:9/photo?id={0}", "image_url"),
        ("image_url,url", "http://127.0.0.1:9/product/{0},http://127.0.0.1:9/{0}.JPG", "url"),
        ("url,images", "http://127.0.0.1:9/product/{0},http://127.0.0.1:9/{0}.webp", "images"),
        ("url,image", "http://127.0.0.1:9/{0}.jpg,gone{0}", "image"),  # the web is not read in place of missing files
    ],
)
def test_of_several_addresses_the_pictures_are_taken(tmp_path, columns, cells, column):
    rows = [f"{cells.format(n)},red" for n in range(2)]
    (tmp_path / "a.csv").write_text("\n".join([f"{columns},caption", *rows]))
    assert find_image_column(*read_table(tmp_path / "a.csv"), tmp_path, "a")[0] == column


@pytest.mark.parametrize("written", ["photos\\0.jpg", "photos/0", "photos/0.JPG", "./photos/0.jpg"])
def test_a_picture_that_is_replaced_makes_another_source_however_its_path_is_written(tmp_path, written):
    path = tmp_path / "photos" / "0.jpg"
    write_picture(path, 0)
    (tmp_path / "a.csv").write_text(f"image,caption\n{written},red\n")
    before = fingerprint(read_pairs(tmp_path / "a.csv"))
    assert fingerprint(read_pairs(tmp_path / "a.csv")) == before
    path.write_bytes(path.read_bytes() + b"\0")
    assert fingerprint(read_pairs(tmp_path / "a.csv")) != before


def test_a_set_of_datasets_is_read_by_the_column_whose_cells_are_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    write_picture(tmp_path / "0.jpg", 0)
    columns = {"image": ["17"], "image_path": [str(tmp_path / "0.jpg")], "caption": ["red"]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "set")
    assert [pair.image for pair in read_pairs(tmp_path / "set")] == [tmp_path / "0.jpg"]


def test_only_known_columns_of_the_first_rows_tell_which_holds_images(tmp_path, monkeypatch):
    """Not whole row groups, in which pictures and all else of thousands of rows lie."""
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"jpg": image_bytes(0), "url": "http://127.0.0.1:9/0", "caption": "red", "wide": "x"}] * 40
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), tmp_path / "a.parquet")
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", None)
    assert find_image_column(*read_table(tmp_path / "a.parquet"), tmp_path, "a") == ("jpg", ["url"])


def test_a_folder_of_splits_says_that_all_of_them_are_taken(tmp_path):
    for part in ("train", "test"):
        write_picture(tmp_path / part / "a.jpg", 1)
        (tmp_path / part / "a.txt").write_text(part)
    assert "all of the folders test, train: name one" in read_pairs(tmp_path).found
    assert "name one" not in read_pairs(tmp_path / "train").found
    (tmp_path / "set").mkdir()
    for part in ("train", "test"):
        (tmp_path / part).rename(tmp_path / "set" / part)
    assert "all of the folders set/test, set/train: name one" in read_pairs(tmp_path).found
    for part in ("train", "test"):
        (tmp_path / "captions" / part).mkdir(parents=True)
        (tmp_path / "set" / part / "a.txt").rename(tmp_path / "captions" / part / "a.txt")
    (tmp_path / "set").rename(tmp_path / "images")
    assert read_pairs(tmp_path).found.endswith("all of the folders images/test, images/train")


def test_images_of_cocos_that_share_an_id_are_refused_and_ids_are_equal_however_they_are_written(tmp_path):
    for name in "ab":
        write_picture(tmp_path / f"{name}.jpg", ord(name))
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2.0, "file_name": "b.jpg"}]
    annotations = [
        {"id": 7, "image_id": "1", "caption": "of a"}, {"id": 8, "image_id": 2, "caption": "of b"},
        {"id": 9, "image_id": 2, "caption": " "},
    ]  # fmt: skip
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    pairs = read_pairs(path)
    assert [pair.captions for pair in pairs] == [("of a",), ("of b",)]
    assert [each.reason for each in pairs.left_out] == ["a caption without text"]
    path.write_text(json.dumps({"images": [images[0], {"id": 1, "file_name": "b.jpg"}], "annotations": annotations}))
    with pytest.raises(
        ValueError, match=r"captions\.json: the images 'a.jpg' and 'b.jpg' have one id, 1.* id of its own"
    ):
        read_pairs(path)


def test_a_compressed_tar_is_an_archive_to_unpack_and_no_text(tmp_path):
    write_tar(tmp_path / "a.tar.gz", ("a.jpg", RED), ("a.txt", b"red"), mode="w:gz")
    with pytest.raises(ValueError, match=r"a\.tar\.gz is a compressed archive; unpack it"):
        read_pairs(tmp_path / "a.tar.gz")


def test_captions_in_bytes_and_in_a_map_of_parquet_are_texts_or_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_picture(tmp_path / "a.jpg", 1)
    languages = pyarrow.map_(pyarrow.string(), pyarrow.string())
    for kind, cell, expected in (
        (pyarrow.binary(), "café".encode(), ("café",)),
        (languages, [("caption", "red"), ("lang", "en")], ("red",)),
        (languages, [("en", "red"), ("de", "rot")], "a mapping of 'en', 'de'"),
        (pyarrow.binary(), "café".encode("latin-1"), "its caption is not UTF-8"),
    ):
        columns = {"image": ["a.jpg"], "caption": pyarrow.array([cell], kind)}
        parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
        (pair,) = read_pairs(tmp_path / "t.parquet")
        assert pair.captions == expected or expected in (pair.problem or "")


def test_a_list_in_a_file_of_json_lines_and_two_marks_of_byte_order_are_no_obstacle(tmp_path):
    write_picture(tmp_path / "a.jpg", 1)
    (tmp_path / "t.jsonl").write_text('[{"image": "a.jpg",\n "caption": "red"}]')
    (tmp_path / "t.csv").write_text("\ufeff\ufeffimage,caption\na.jpg,red\n")
    for name in ("t.jsonl", "t.csv"):
        assert read_pairs(tmp_path / name)[0].captions == ("red",)


def test_doctor_and_retrieval_name_the_reason_why_a_pair_has_no_caption(tmp_path):
    for name, text in (("a", "red"), ("b", "0 0.5 0.5 0.1 0.1"), ("c", None)):
        write_picture(tmp_path / f"{name}.jpg", ord(name))
        if text:
            (tmp_path / f"{name}.txt").write_text(text)
    source = of_pairs("it", read_pairs(tmp_path))
    for index, reason in ((1, "detectors label boxes"), (2, "there is no c.txt beside it")):
        with pytest.raises(ValueError, match=reason):
            source.captions(index)
    reasons = r"2 left out: .*boxes .*: 1 \(b.jpg\); no captions: there is no ….* beside it: 1 \(c.jpg\)"
    with pytest.warns(UserWarning, match=reasons):
        open_dataset(tmp_path, task="retrieval")
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"no images with captions: 3 left out: .*a.jpg.*b.jpg.*c.jpg"):
        open_dataset(tmp_path, task="retrieval")
    tars = write_tar(tmp_path / "tars" / "0.tar", ("a.jpg", RED), ("a.txt", b"0 0.5 0.5 0.1 0.1")).parent
    with pytest.raises(ValueError, match=r"0.tar:a: its text is no caption but .*boxes"):
        open_dataset(tars, task="retrieval")


def test_what_lies_beside_tars_and_may_hold_samples_is_told(tmp_path):
    write_tar(tmp_path / "0.tar", ("a.jpg", RED), ("a.txt", b"red"))
    for name, mode in (("1.tar.gz", "w:gz"), ("2.tgz", "w:gz"), ("3.TAR", "w")):
        write_tar(tmp_path / name, ("b.jpg", GREEN), ("b.txt", b"green"), mode=mode)
    write_picture(tmp_path / "c.jpg", 1)
    write_tar(tmp_path / "more" / "4.tar", ("d.jpg", GREEN), ("d.txt", b"green"))
    for name in ("00000_stats.json", "00000.parquet", "classnames.txt"):  # img2dataset's, CLIP_benchmark's
        (tmp_path / name).write_text("{}")
    packed = index_shards(str(tmp_path))
    assert (packed.kept, packed.left_out) == (1, 5)
    assert rejections(tmp_path) == {
        "1.tar.gz": "a compressed tar; unpack it to .tar", "2.tgz": "a compressed tar; unpack it to .tar",
        "3.TAR": "a tar of another suffix; call it .tar", "c.jpg": "a picture beside the tars",
        "more/": "in a folder below, which is to be named itself",
    }  # fmt: skip
    assert sum(each.count for each in Shards(tmp_path).left_out) == 5


def test_pictures_below_a_tar_and_archives_beside_it_are_told(tmp_path):
    write_tar(tmp_path / "old.tar", ("a.jpg", RED), ("a.txt", b"red"))
    for name in ("cat", "dog"):
        write_picture(tmp_path / name / "0.jpg", 1)
    (tmp_path / "x.zip").write_bytes(b"PK")
    assert index_shards(str(tmp_path)).left_out == 3
    picture = "in a folder below, a picture beside the tars"
    assert rejections(tmp_path) == {"cat/": picture, "dog/": picture, "x.zip": "an archive; unpack it"}


def test_a_title_that_is_the_files_own_name_is_no_caption(tmp_path):
    write_picture(tmp_path / "IMG_1.jpg", 1)
    facts = {"title": "IMG_1.jpg", "description": "a cat on the sofa"}  # as Google's albums are downloaded
    (tmp_path / "IMG_1.jpg.json").write_text(json.dumps(facts))
    assert read_pairs(tmp_path)[0].captions == ("a cat on the sofa",)
    (tmp_path / "t.csv").write_text("filename,title\nIMG_1.jpg,IMG_1.jpg\n")
    assert read_pairs(tmp_path / "t.csv")[0].captions == ()
    (tmp_path / "t.csv").write_text("filename,title\nIMG_1.jpg,IMG_1\n")
    assert read_pairs(tmp_path / "t.csv")[0].captions == ("IMG_1",)


def test_a_text_comes_before_json_wherever_it_lies_and_a_shorter_name_before_the_whole_one(tmp_path):
    """gallery-dl's and Takeout's metadata, a.jpg.json, and a.jpg.txt of another program beside one's own a.txt."""
    facts = json.dumps({"category": "flickr", "description": "Buy prints at my shop!"})
    files: dict[str, str | int] = {
        "a.jpg": 1, "a.jpg.json": facts, "a.txt": "a red bicycle",
        "b.jpg": 2, "b.jpg.json": json.dumps({"title": "b.jpg", "description": ""}), "b.txt": "a blue car",
        "c.jpg": 3, "c.jpg.txt": "another's", "c.txt": "a green tree", "c.cap": "a third",
        "d.jpg": 4, "d.json": facts, "d.jpg.txt": "a dog",
        "images/e.jpg": 5, "images/e.jpg.json": facts, "captions/e.txt": "an elk",
        "f.jpg": 6, "f.json": json.dumps({"caption": "a fox"}), "f.jpg.json": facts,
        "g.jpg": 7, "g.jpg.txt": "a goose", "g.png": 8, "g.png.txt": "its mask", "g.txt": "both",
    }  # fmt: skip
    for name, held in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_picture(tmp_path / name, held) if isinstance(held, int) else (tmp_path / name).write_text(held)
    pairs = read_pairs(tmp_path)
    assert {pair.source: pair.captions for pair in pairs} == {
        "a.jpg": ("a red bicycle",), "b.jpg": ("a blue car",), "c.jpg": ("a green tree",), "d.jpg": ("a dog",),
        "images/e.jpg": ("an elk",), "f.jpg": ("a fox",), "g.jpg": ("a goose",), "g.png": ("its mask",),
    }  # fmt: skip
    spare = {each.source for each in pairs.left_out if each.reason == "another text for a picture that has one"}
    assert spare == {"c.jpg.txt", "c.cap", "g.txt"}
    assert len(pairs) + len(pairs.left_out) + sum(pair.problem is None for pair in pairs) == len(files)


@pytest.mark.parametrize("number", [1, 3, 250])
@pytest.mark.parametrize(
    ("first", "bare", "second", "held"),
    [
        (".txt", "0 0.51 0.43 0.2 0.3\n1 0.1 0.2 0.3 0.4\n", ".jpg.txt", "a cat {}"),
        (".txt", "", ".jpg.txt", "a cat {}"),
        (".txt", " \n", ".caption", "a cat {}"),
        (".txt", "", ".json", '{{"caption": "a cat {}"}}'),
        (".json", '{"boxes": []}', ".jpg.json", '{{"caption": "a cat {}"}}'),
    ],
)
def test_texts_without_captions_give_way_to_others_of_their_pictures(tmp_path, number, first, bare, second, held):
    for n in range(number):
        write_picture(tmp_path / f"{n}.jpg", 1)
        (tmp_path / f"{n}{first}").write_text(bare)
        (tmp_path / f"{n}{second}").write_text(held.format(n))
    pairs = read_pairs(tmp_path)
    assert {pair.source: pair.captions for pair in pairs} == {f"{n}.jpg": (f"a cat {n}",) for n in range(number)}
    assert {each.source for each in pairs.left_out} == {f"{n}{first}" for n in range(number)}


@pytest.mark.parametrize("suffix", [".jpg.txt", ".json"])
def test_one_good_text_among_empty_ones_keeps_no_other_text_from_being_read(tmp_path, suffix):
    for n in range(150):
        write_picture(tmp_path / f"{n}.jpg", 1)
        (tmp_path / f"{n}.txt").write_text("by hand" if n == 7 else ("" if n % 2 else "0 0.51 0.43 0.2 0.3"))
        held = f"a cat {n}"
        (tmp_path / f"{n}{suffix}").write_text(json.dumps({"caption": held}) if suffix == ".json" else held)
    pairs = read_pairs(tmp_path)
    expected = {f"{n}.jpg": (f"a cat {n}",) for n in range(150)} | {"7.jpg": ("by hand",)}
    assert {pair.source: pair.captions for pair in pairs} == expected
    assert {each.source for each in pairs.left_out} == {f"{n}.txt" for n in range(150) if n != 7} | {f"7{suffix}"}


def test_a_text_that_can_not_be_read_or_is_empty_now_and_then_does_not_give_way(tmp_path):
    for name, held in {"a": "a bär".encode("cp1252"), "b": b"version https://git-lfs.github.com/spec/v1"}.items():
        write_picture(tmp_path / name / "1.jpg", 1)
        (tmp_path / name / "1.txt").write_bytes(held)
        (tmp_path / name / "1.jpg.json").write_text('{"description": "Buy prints!"}')
        (pair,) = read_pairs(tmp_path / name)
        assert pair.problem
        assert not pair.captions
    for n in range(3):
        write_picture(tmp_path / f"c/{n}.jpg", 1)
        (tmp_path / f"c/{n}.txt").write_text("a cat" if n else "")
        (tmp_path / f"c/{n}.json").write_text('{"description": "Buy prints!"}')
    assert [pair.captions for pair in read_pairs(tmp_path / "c")][1:] == [("a cat",)] * 2
    assert "Buy" not in str(read_pairs(tmp_path / "c")[0])


@pytest.mark.parametrize(
    ("image", "metadata"),
    [
        ("b.jpg", "b.jpg.supplemental-metadata.json"),
        ("IMG_20200101_123456789.jpg", "IMG_20200101_123456789.jpg.supplemental-metada.json"),
        ("b.jpg", "b.jpg.s.json"),
        ("b.jpg", "b.jpg..json"),
        ("IMG(1).jpg", "IMG.jpg.supplemental-metadata(1).json"),
        ("IMG(12).JPG", "IMG.JPG.suppl(12).json"),
        ("IMG(1).jpg", "IMG.jpg(1).json"),
        ("IMG(1).jpg", "IMG(1).jpg.json"),
        ("IMG(1).jpg", "IMG(1).json"),
        (f"{'n' * 43}.jpg", f"{'n' * 43}.jp.json"),
        (f"{'n' * 46}.jpg", f"{'n' * 46}.json"),
        (f"{'n' * 47}.jpg", f"{'n' * 46}.json"),
        (f"{'n' * 47}(1).jpg", f"{'n' * 46}(1).json"),
    ],
)
def test_the_names_that_googles_takeout_gives_the_json_of_a_picture(tmp_path, image, metadata):
    """Its title is the name that the picture had before it was numbered, or cut."""
    write_picture(tmp_path / image, 1)
    title = "a very long name & more" + Path(image).suffix.lower()
    (tmp_path / metadata).write_text(json.dumps({"title": title, "description": "a cat on the sofa"}))
    write_picture(tmp_path / "IMG.png", 2)  # not of this number, nor of this kind
    pairs = read_pairs(tmp_path)
    assert {pair.source: pair.captions for pair in pairs} == {image: ("a cat on the sofa",), "IMG.png": ()}


def test_json_that_is_nested_too_deeply_rejects_its_picture_alone(tmp_path):
    for name in "ab":
        write_picture(tmp_path / f"{name}.jpg", 1)
        (tmp_path / f"{name}.json").write_text('{"caption": "a cat"}')
    (tmp_path / "b.json").write_text('{"caption": "a cat", "z": ' + "[" * 100_000)
    assert [pair.captions for pair in read_pairs(tmp_path)] == [("a cat",), ()]
    sample = {"image": b"a picture", "txt": b"", "json": (tmp_path / "b.json").read_bytes()}
    assert record_of("b", sample.__getitem__).captions == ()


def test_json_of_another_word_or_without_a_description_is_not_taken_for_a_picture(tmp_path):
    for name in ("a", "z"):
        write_picture(tmp_path / f"{name}.jpg", ord(name))
    (tmp_path / "z.txt").write_text("a zebra")
    for name in ("a.jpg.exif.json", "a.s.json", "a.jpg.supplemental-metadata(1).json"):
        (tmp_path / name).write_text('{"description": "of another"}')
    assert "there is no a.txt beside it" in str(read_pairs(tmp_path)[0].problem)
    (tmp_path / "a.jpg.json").write_text('{"title": "a.jpg"}')
    assert read_pairs(tmp_path)[0].problem == "no captions: there is no a.txt beside it, and a.jpg.json has no caption"


def test_of_two_pictures_whose_names_begin_alike_json_under_the_beginning_tells_neither(tmp_path):
    for name in ("z", f"{'n' * 46}1", f"{'n' * 46}2"):
        write_picture(tmp_path / f"{name}.jpg", 1)
    (tmp_path / f"{'n' * 46}.json").write_text('{"description": "of one of them"}')
    (tmp_path / "z.txt").write_text("a zebra")
    assert [pair.captions for pair in read_pairs(tmp_path)] == [(), (), ("a zebra",)]


def test_raw_files_of_cameras_are_named_as_a_kind_that_is_not_read_wherever_they_lie(tmp_path):
    """They begin as TIFF does, and the first picture of such a file is a preview."""
    raw = image_bytes(1, "TIFF")
    reason = "a picture of a kind that is not read ({}; as .jpg or .png it would be)".format
    for name, data in {
        "cat/1.NEF": raw, "cat/1.jpg": RED, "cat/1.txt": b"a cat", "dog/2.dng": raw, "dog/2.txt": b"a dog",
        "dog/3.jpg": GREEN, "dog/scan": raw, "dog/scan.txt": b"a scan", "dog/4.heic": GREEN, "dog/4.txt": b"by content",
    }.items():  # fmt: skip
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(data)
    pairs = read_pairs(tmp_path / "d")
    good = ["cat/1.jpg", "dog/4.heic", "dog/scan"]
    assert sorted(pair.source for pair in pairs if not pair.problem) == good
    unread = {"cat/1.NEF": reason(".nef"), "dog/2.dng": reason(".dng")}
    assert {each.source: each.reason for each in pairs.left_out} == unread
    with pytest.warns(UserWarning, match=r"\.nef; .*: 1 \(cat/1\.NEF\)"):
        data = open_dataset(tmp_path / "d")
    assert [Path(data.key(index)).name for index in range(len(data))] == ["1.jpg", "3.jpg", "4.heic", "scan"]
    named = image_set([str(tmp_path / "d/cat/1.NEF"), str(tmp_path / "d/dog/scan")])
    assert ([each.reason for each in named.left_out], len(named)) == ([reason(".nef")], 1)
    tar = [("1.nef", raw), ("1.txt", b"a cat"), ("2.dng", raw), ("2.jpg", RED), ("2.txt", b"a dog"), ("3.x", raw)]
    write_tar(tmp_path / "tars" / "0.tar", *tar)
    kept = samples_of(tmp_path / "tars")
    assert [(key, image) for key, image, _ in kept if image] == [("2", RED), ("3", raw)]
    assert rejections(tmp_path / "tars") == {
        "0.tar:1.nef": "a member of a kind that is not read (.nef)",
        "0.tar:2.dng": "a member of a kind that is not read (.dng)",
    }


def test_columns_that_are_names_of_folders_are_kept(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for number, language in enumerate(("lang=de", "lang=pt%20BR", "lang=__HIVE_DEFAULT_PARTITION__")):
        (tmp_path / language).mkdir()
        write_picture(tmp_path / f"{number}.jpg", number)
        table = pyarrow.table({"image": [str(tmp_path / f"{number}.jpg")], "caption": [f"text {number}"]})
        parquet.write_table(table, tmp_path / language / "0.parquet")
    pairs = read_pairs(f"{tmp_path}/*/*.parquet")
    found = {pair.captions[0]: pair.extra["lang"] for pair in pairs}
    assert found == {"text 0": "de", "text 1": "pt BR", "text 2": None}
    rows = read_table(Path(f"{tmp_path}/*/*.parquet"))[1]
    assert pickle.loads(pickle.dumps(rows)).column("lang") == [row["lang"] for row in rows]


def test_quotes_of_a_tsv_that_enclose_no_cells_are_part_of_captions(three):
    """As in CC12M, whose lines are written as they are."""
    texts = ["a dog", '"Quoted" title of film', '"open only']
    (three / "t.tsv").write_text("".join(f"{n}.png\t{text}\n" for n, text in enumerate(texts)))
    assert [pair.captions for pair in read_pairs(three / "t.tsv")] == [(text,) for text in texts]
    # One line that is not quoted well leaves those that are.
    (three / "t.tsv").write_text('"image"\tcaption\n0.png\t"a red, ""big"" dog"\n1.png\t"a "bad" one"\n2.png\t"fine"\n')
    assert [pair.captions[0] for pair in read_pairs(three / "t.tsv")] == ['a red, "big" dog', '"a "bad" one"', "fine"]
    (three / "t.tsv").write_text('image\tcaption\n0.png\t"Quoted" title\n1.png\ta\tdog\n')
    with pytest.raises(ValueError, match=r"t\.tsv, line 2: .*; is a double quote not closed"):
        read_pairs(three / "t.tsv")
    (three / "t.csv").write_text('image,caption\n0.png,"Quoted" title\n')
    with pytest.raises(ValueError, match=r"t\.csv, line 2: .*; is a double quote not closed"):
        read_pairs(three / "t.csv")


@pytest.mark.parametrize("missing", [None, [None]])
def test_a_picture_without_a_caption_in_a_mapping_of_files_is_rejected_alone(three, missing):
    captions = {"0.png": ["a dog"], "1.png": missing, "2.png": "a cat"}
    (three / "t.json").write_text(json.dumps(captions))
    assert [pair.captions for pair in read_pairs(three / "t.json")] == [("a dog",), (), ("a cat",)]


@pytest.mark.parametrize("cell", ['{"en": "dog", "de": "Hund"}', "{'en': 'dog', 'de': 'Hund'}", '[{"en": 1, "de": 2}]'])
def test_a_mapping_of_unknown_fields_in_a_cell_is_no_caption(three, cell):
    (three / "t.csv").write_text(f'image,caption\n0.png,"{cell.replace(chr(34), chr(34) * 2)}"\n1.png,a cat\n')
    first, second = read_pairs(three / "t.csv")
    assert first.problem == "its caption is a mapping of 'en', 'de'; which of them is the caption can't be known"
    assert second.captions == ("a cat",)


def test_a_caption_that_is_the_files_own_name_is_rejected_as_such(three):
    (three / "t.csv").write_text("image,caption\n0.png,0.png\n1.png,a cat\n2.png,\n")
    pack(read_pairs(three / "t.csv"), three / "out", source="t.csv")
    found = rejections(three / "out")
    assert found == {"0.png": "its caption is the file's own name, 0.png", "2.png": "every caption is empty"}


def test_a_quote_that_swallows_rows_of_a_tsv_is_refused(three):
    (three / "t.tsv").write_text('image\tcaption\n0.png\t"We\n1.png\ta dog"\n2.png\ta cat\n')
    with pytest.raises(ValueError, match=r"t\.tsv, line 3: a cell holds tabs and the ends of lines; is a double quote"):
        read_pairs(three / "t.tsv")


def test_a_sparse_member_is_told_and_the_others_are_read(tmp_path):
    gnu_tar = shutil.which("tar")
    if gnu_tar is None or b"GNU" not in subprocess.run([gnu_tar, "--version"], capture_output=True, check=True).stdout:
        pytest.skip("needs GNU tar")
    (tmp_path / "a.jpg").write_bytes(RED)
    (tmp_path / "a.txt").write_text("red")
    with open(tmp_path / "hole.jpg", "wb") as file:
        file.write(GREEN)
        file.truncate(1 << 20)
    subprocess.run(
        [gnu_tar, "-C", tmp_path, "--sparse", "-cf", "0.tar", "hole.jpg", "a.jpg", "a.txt"], check=True, cwd=tmp_path
    )
    for path in tmp_path.glob("*.jpg"):
        path.unlink()
    assert samples_of(tmp_path) == [("a", RED, ("red",))]
    assert rejections(tmp_path) == {"0.tar:hole.jpg": "no regular file"}


def test_a_json_of_a_text_or_of_texts_alone_holds_captions(tmp_path):
    for facts, captions in ((["red", "a red one"], ("red", "a red one")), ("red", ("red",)), ([1, 2], ()), ({}, ())):
        data = json.dumps(facts).encode()
        assert record_of("a", {"image": RED, "txt": b"", "json": data}.get).captions == captions
        write_picture(tmp_path / "a.jpg", 1)
        (tmp_path / "a.json").write_bytes(data)
        assert read_pairs(tmp_path)[0].captions == captions
    write_tar(tmp_path / "tars" / "0.tar", ("a.jpg", RED), ("a.json", b'["red", "a red one"]'))
    assert open_dataset(tmp_path / "tars", task="retrieval").captions == (("red", "a red one"),)


def test_texts_that_are_almost_lists_or_boxes_take_no_longer_than_others():
    for text in ("0 " + "1234 " * 40 + "and so on", "[" + "'a'     " * 40 + "and so on]", "[" + "'a' , " * 40 + "x]"):
        assert texts_in(text) == captions_in(text) == [" ".join(text.split())]
