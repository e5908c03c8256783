"""Kept + held out + rejected + left out = what lies there: for random folders, tables and tars with every oddity."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import tarfile
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import pytest
from helpers import pack_folder, picture, rejected_rows

from miniclip.data.indexing.index_tars import index_shards
from miniclip.data.pack import pack
from miniclip.data.reading.scan import LeftOut, scan, summary
from miniclip.data.shards import Shards
from miniclip.data.sources import read_pairs

SEEDS = [*range(8), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(8, 60))]


def encoded(seed: int, file_format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    picture(seed, (12, 10)).save(buffer, file_format)
    return buffer.getvalue()


PICTURES = [
    (".jpg", "JPEG"), (".JPG", "JPEG"), (".jpeg", "JPEG"), (".jfif", "JPEG"), (".jpe", "JPEG"), (".png", "PNG"),
    (".webp", "WEBP"), (".bmp", "BMP"), (".ppm", "PPM"), (".jpg_large", "JPEG"), ("", "JPEG"), (".orig", "PNG"),
    (".heic", "JPEG"),
]  # fmt: skip
TEXTS = [".txt", ".TXT", ".caption", ".cap", ".text"]
STEMS = ["a", "b", "café", "with space", "photo.v2", "IMG_2024.01.02", "3.5mm", "图片"]


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def random_tree(folder: Path, draw: random.Random) -> None:
    """Sub-folders, links to folders, to files and to nothing, leftovers, texts without pictures, and so on."""
    homes = [folder, folder / "images", folder / "sub" / "deeper", folder / "texts", folder / ".hidden"]
    homes += [folder / name for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir", "$RECYCLE.BIN", "lost+found")]
    for number in range(draw.randint(3, 30)):
        home = draw.choice(homes[:3] * 4 + homes)
        home.mkdir(parents=True, exist_ok=True)
        stem = draw.choice(STEMS) + str(draw.randint(0, 3))
        stem = unicodedata.normalize(draw.choice(["NFC", "NFD"]), stem)
        suffix, file_format = draw.choice(PICTURES)
        (home / f"{stem}{suffix}").write_bytes(encoded(number, file_format) if draw.random() < 0.9 else b"no picture")
        if draw.random() < 0.8:
            text_home = folder / "texts" if home.name == "images" and draw.random() < 0.5 else home
            text_home.mkdir(exist_ok=True)
            text_stem = unicodedata.normalize(draw.choice(["NFC", "NFD"]), stem)
            name = draw.choice([text_stem, text_stem, f"{stem}{suffix}"]) + draw.choice(TEXTS)
            words = draw.choice([f"picture {number}", "one\ntwo\u2028three", "", "\ufeffwith a mark"])
            data = words.encode(draw.choice(["utf-8", "utf-8", "utf-16"]))
            (text_home / name).write_bytes(data if draw.random() < 0.95 else b"caf\xe9")
    for name in ("Thumbs.db", "._a0.jpg", "notes.pdf", "README.txt", "a0.json", "list.csv", ".DS_Store"):
        if draw.random() < 0.4:
            (draw.choice([folder, folder / "images"]) / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b'{"caption": "words"}')
    outside = folder.with_name(f"{folder.name} outside")
    outside.mkdir()
    (outside / "linked.jpg").write_bytes(encoded(99))
    (outside / "linked.txt").write_text("linked words")
    for name, target in (
        ("disk", outside), ("back", folder), ("gone.jpg", folder / "nowhere"), ("link.jpg", outside / "linked.jpg"),
        ("round", Path("round")),
    ):  # fmt: skip
        if draw.random() < 0.5:
            (folder / name).symlink_to(target)
    if draw.random() < 0.3:
        os.link(outside / "linked.jpg", folder / "hard.jpg")
    if draw.random() < 0.2:
        os.mkfifo(folder / "pipe.txt")


def files_below(folder: Path, above: tuple[str, ...] = ()) -> Counter[str]:
    """Every entry that is no folder, by its path; a link that leads back up counts as one."""
    found = Counter[str]()
    above = (*above, os.path.realpath(folder))
    for name in os.listdir(folder):  # noqa: PTH208
        path = folder / name
        if path.is_dir() and os.path.realpath(path) not in above:
            found.update(files_below(path, above))
        else:
            found[str(path)] += 1
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_every_file_of_a_folder_is_in_a_pair_or_rejected_or_left_out_by_its_reason(tmp_path, seed, capsys):
    folder = tmp_path / "tree"
    folder.mkdir()
    random_tree(folder, random.Random(seed))
    total = files_below(folder).total()
    found = scan(folder)
    assert found.num_files == total
    try:
        pairs = read_pairs(folder)
        packed = pack(pairs, tmp_path / "out", source=str(folder))
    except ValueError as error:
        print(error)
        if not re.search("no pairs found|can be used|without a text", str(error)):
            raise
        return
    assert packed.kept + packed.rejected == len(pairs)
    rows = rejected_rows(tmp_path / "out")
    assert sum(1 for key, _, _ in rows if key) == packed.rejected
    assert sum(1 for key, _, _ in rows if not key) == len(pairs.left_out)
    assert packed.left_out == sum(each.count for each in pairs.left_out)
    # A pair has a picture, a text, or both; both of those that are kept.
    in_pairs = {str(folder / name) for name in pairs.names}
    texts = {str(path) for path in (*found.texts, *found.others)} & {str(path) for path in pairs.files}
    assert not texts & {str(folder / each.source) for each in pairs.left_out}
    assert len(in_pairs | texts) + packed.left_out == total
    assert all(reason for _, _, reason in rows)
    if packed.left_out:
        assert summary(pairs.left_out).startswith(f"{packed.left_out} left out: ")


@pytest.mark.parametrize("seed", SEEDS)
def test_torchvision_sees_every_picture_that_a_scan_takes(tmp_path, seed):
    torchvision = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "tree"
    (folder / "class").mkdir(parents=True)
    random_tree(folder / "class", random.Random(seed))
    for link in [path for path in folder.rglob("*") if path.is_symlink() and path.name in ("back", "round")]:
        link.unlink()  # torchvision follows them till the path is too long
    taken = {str(path) for path in scan(folder).images}
    seen = torchvision.ImageFolder(str(folder), is_valid_file=lambda path: path in taken, allow_empty=True)
    assert sorted(path for path, _ in seen.samples) == sorted(taken)


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
@pytest.mark.parametrize("seed", SEEDS[:4])
def test_every_row_of_a_table_is_in_a_pair_or_rejected_or_left_out_by_its_reason(tmp_path, kind, seed):
    draw = random.Random(seed)
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(encoded(number))
    (tmp_path / unicodedata.normalize("NFD", "é.jpg")).write_bytes(encoded(9))
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    images = ["0.jpg", "1.jpg", "./1.jpg", "2", " 3.jpg ", "É.jpg".lower(), "bad.jpg", "gone.jpg", "", "C:\\x\\0.jpg"]
    texts = ["words", "a\nb", "a\u2028b", "", "['one', 'two']", " "]
    rows = [(draw.choice(images), f"{draw.choice(texts)}") for _ in range(draw.randint(4, 25))]
    rows.append(("0.jpg", "sure"))
    path = tmp_path / f"table.{kind}"
    if kind in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter="," if kind == "csv" else "\t").writerows([("image", "caption"), *rows])
    elif kind == "parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        columns = {"image": [image for image, _ in rows], "caption": [text for _, text in rows]}
        parquet.write_table(pa.table(columns), path, row_group_size=3)
    else:
        records = [{"image": image, "caption": text} for image, text in rows]
        lines = "\n".join(map(json.dumps, records)) if kind == "jsonl" else json.dumps(records)
        path.write_text(lines, encoding="utf-8")
    pairs = read_pairs(path)
    packed = pack(pairs, tmp_path / "out", source=str(path))
    assert packed.kept + packed.rejected == len(pairs)
    # Each row without a caption is the reason of a rejection, or is left out beside others of its image.
    by_image: dict[str, list[str]] = {}
    for number, (image, text) in enumerate(rows):
        name = image.strip().removeprefix("./") or f"row {number}"
        by_image.setdefault(name, []).append(text)
    assert len(pairs) == len(by_image)
    blank = sum(
        sum(not text.strip() for text in each)
        for each in by_image.values()
        if any(text.strip() for text in each)
    )  # fmt: skip
    assert len(pairs.left_out) == packed.left_out == blank
    usable = {"0.jpg", "1.jpg", "2", "3.jpg", "é.jpg"}
    kept = [name for name, each in by_image.items() if name in usable and any(text.strip() for text in each)]
    assert packed.kept == len(kept)
    captions = sorted(text for record in Shards(tmp_path / "out") for text in record.captions)
    whole = {
        "words": ["words"],
        "a\nb": ["a b"],
        "a\u2028b": ["a b"],
        "['one', 'two']": ["one", "two"],
        "sure": ["sure"],
    }
    assert captions == sorted(part for name in kept for text in by_image[name] for part in whole.get(text, []))


# ---------------------------------------------------------------------------------------------------------------------
# Tars


def random_tar(path: Path, draw: random.Random, is_plain: bool) -> int:
    """A tar of pairs, with every oddity unless `is_plain`; returns its number of members that are no folders."""
    count = 0

    def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields: object) -> None:
        nonlocal count
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(data))
        count += info.type != tarfile.DIRTYPE

    def fill(tar: tarfile.TarFile, prefix: str) -> None:
        names = []
        for number in range(draw.randint(1, 8)):
            stem = f"{prefix}{number:03d}" if is_plain else f"{prefix}{draw.choice(STEMS)}{draw.randint(0, 2)}"
            suffix, file_format = draw.choice(PICTURES[:1] + PICTURES[5:6] if is_plain else PICTURES)
            add(tar, f"{stem}{suffix}", encoded(number, file_format))
            text = f"words {number}".encode(draw.choice(["utf-8", "utf-16"]) if not is_plain else "utf-8")
            if is_plain or draw.random() < 0.8:
                add(tar, stem + (".txt" if is_plain else draw.choice(TEXTS)), text)
            names.append(f"{stem}{suffix}")
            if is_plain:
                continue
            if draw.random() < 0.3:
                add(tar, f"{stem}.png", encoded(50 + number, "PNG"))
            if draw.random() < 0.2:
                add(tar, f"{stem}.seg.png", encoded(60 + number, "PNG"))
            if draw.random() < 0.2:
                add(tar, f"{stem}.url", b"http://x")
            if draw.random() < 0.2:
                add(tar, f"{stem}.json", b'{"caption": "from json"}')
        if is_plain:
            return
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
            if draw.random() < 0.5:
                target = draw.choice([*names, "nowhere.jpg"])
                add(tar, f"link{kind[0]}.jpg", type=kind, linkname=target)
                add(tar, f"link{kind[0]}.txt", b"linked")
        for name in ("__MACOSX/._a.jpg", "._b.jpg", "README.md", "images/own.jpg", "texts/own.txt", "lost.txt"):
            if draw.random() < 0.4:
                add(tar, name, encoded(7) if name.endswith("jpg") else b"words")
        if draw.random() < 0.3:
            add(tar, names[0], encoded(70))  # the same name again
        if draw.random() < 0.3:
            add(tar, "pipe", type=tarfile.FIFOTYPE)
        add(tar, "folder", type=tarfile.DIRTYPE)  # a tar may end in a folder

    data = b""
    for part in range(1 if is_plain else draw.choice([1, 1, 2])):
        buffer = io.BytesIO()
        with tarfile.open(
            fileobj=buffer, mode="w", format=draw.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
        ) as tar:
            fill(tar, f"{part}/")
        data += buffer.getvalue()
    path.write_bytes(data)
    return count


@pytest.mark.parametrize("seed", SEEDS)
def test_every_member_of_a_tar_is_in_a_sample_or_left_out_by_its_reason(tmp_path, seed):
    draw = random.Random(seed)
    (tmp_path / "tars").mkdir()
    total = sum(random_tar(tmp_path / "tars" / f"{n}.tar", draw, is_plain=False) for n in range(2))
    indexed = index_shards(str(tmp_path / "tars"))
    index = json.loads((tmp_path / "tars" / "index.json").read_text())
    assert sum(index["members"].values()) + indexed.left_out == total
    assert sum(index.get("left_out", {}).values()) == indexed.left_out
    shards = Shards(tmp_path / "tars")
    assert len(shards) == indexed.kept
    for index_of_sample in range(len(shards)):
        record = shards[index_of_sample]
        assert record.image or record.captions
    packed = pack_folder_of_shards(tmp_path)
    assert packed.kept + packed.rejected == indexed.kept
    assert packed.left_out == indexed.left_out


@pytest.mark.parametrize("seed", SEEDS)
def test_headers_alone_give_the_samples_and_the_left_out_members_of_the_whole_tar(tmp_path, seed):
    (tmp_path / "tars").mkdir()
    random_tar(tmp_path / "tars" / "a.tar", random.Random(seed), is_plain=False)
    head = index_shards(str(tmp_path / "tars"), tmp_path / "head", head=1)
    whole = index_shards(str(tmp_path / "tars"), tmp_path / "whole")
    assert (head.kept, head.left_out, head.unverified, whole.unverified) == (whole.kept, whole.left_out, 1, 0)
    assert not head.left_out or rejected_rows(tmp_path / "head") == rejected_rows(tmp_path / "whole")
    ours, theirs = (Shards(tmp_path / name, needs_captions=False) for name in ("head", "whole"))
    for number in range(max(len(ours), len(theirs))):
        assert (ours[number], ours.info(number), ours.name(number)) == (
            theirs[number], theirs.info(number), theirs.name(number)
        )  # fmt: skip


def pack_folder_of_shards(folder: Path):
    from miniclip.data.open_pairs import shard_pairs

    return pack(shard_pairs(str(folder / "tars")), folder / "out", source=str(folder / "tars"))


@pytest.mark.parametrize("seed", SEEDS)
def test_webdataset_sees_the_samples_of_a_plain_tar(tmp_path, seed):
    import webdataset

    random_tar(tmp_path / "a.tar", random.Random(seed), is_plain=True)
    index_shards(str(tmp_path))
    shards = Shards(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False, empty_check=False))
    assert [(record.key, record.image, list(record.captions)) for record in shards] == [
        (sample["__key__"], sample.get("jpg") or sample.get("png"), [sample["txt"].decode()]) for sample in samples
    ]


def test_reasons_are_counted_and_named_in_one_sentence():
    left_out = [LeftOut("a/", "left behind", 3), LeftOut("x.pdf", "no picture"), LeftOut("b", "left behind")]
    assert summary(left_out) == "5 left out: left behind: 4 (a/, b); no picture: 1 (x.pdf)"
    assert summary([]) == ""


def test_a_clean_folder_leaves_nothing_out(tmp_path):
    from helpers import write_pairs

    packed = pack_folder(write_pairs(tmp_path / "src", 3), tmp_path / "out")
    assert (packed.kept, packed.rejected, packed.left_out) == (3, 0, 0)
