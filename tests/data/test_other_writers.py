"""Shards of ours in other programs, and those of other programs here.

Oracles: webdataset, the tested one and the oldest that is supported; GNU tar. What img2dataset and macOS write is
rebuilt from what they document, member for member.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import everything_below, pack_folder, picture, rejections, trainer_at, write_pairs

from miniclip.commands import main as cli
from miniclip.data.indexing.index_tars import index_shards
from miniclip.data.module import PairDataModule
from miniclip.data.shards import Shards

OLDEST = Path(sys.prefix) / "webdataset_oldest"  # `make test` puts it there
NUM_PAIRS = 7

# Reads our shards, writes tars in both ways people use, and packs, with the version of webdataset that it finds.
WITH_ANOTHER = """
import hashlib, importlib.metadata, json, sys
import webdataset
from miniclip.commands.main import main

shards, photos, out = sys.argv[1:]
read = {
    sample["__key__"]: {name: hashlib.sha256(value).hexdigest() for name, value in sample.items() if name[0] != "_"}
    for sample in webdataset.WebDataset(shards, shardshuffle=False)
}
decoded = webdataset.WebDataset(shards, shardshuffle=False).decode("pil").to_tuple("jpg;png;webp", "txt", "json")
read["decoded"] = [[image.size, text, facts["width"]] for image, text, facts in decoded]
for name, options in {"plain": {}, "encoded": {"encoder": True}, "fixed": {"encoder": False, "mtime": 0}}.items():
    with webdataset.TarWriter(f"{out}/{name}.tar", **{"encoder": False, **options}) as writer:
        for sample in webdataset.WebDataset(shards, shardshuffle=False):
            values = {key: value for key, value in sample.items() if key in ("__key__", "jpg", "png", "webp")}
            text, facts = sample["txt"], sample["json"]
            if name == "encoded":
                text, facts = text.decode(), json.loads(facts)
            writer.write({**values, "txt": text, "json": facts})
main(["shards", photos, f"{out}/packed", "--samples-per-shard", "4"])
print(json.dumps({"version": importlib.metadata.version("webdataset"), "read": read}))
"""


@pytest.fixture(scope="module", params=["tested", "oldest"])
def elsewhere(request, tmp_path_factory) -> dict[str, object]:
    """What one version of webdataset read of our shards, and the folder that it wrote into."""
    root = tmp_path_factory.mktemp(request.param)
    photos = write_pairs(root / "photos", NUM_PAIRS, captions=2)
    (photos / "0003.txt").write_text("Grüße, 猫\nzwei", encoding="utf-8")
    pack_folder(photos, root / "ours", samples_per_shard=4)
    (root / "theirs").mkdir()
    path = os.environ.get("PYTHONPATH", "")
    if request.param == "oldest":
        if not OLDEST.is_dir():
            pytest.fail(f"webdataset's oldest version is not in {OLDEST}; `make test` puts it there")
        path = f"{OLDEST}{os.pathsep}{path}"
    command = [sys.executable, "-c", WITH_ANOTHER, str(root / "ours/{00000..00001}.tar"), photos, root / "theirs"]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["version"] == "0.2.86") == (request.param == "oldest")
    return {**facts, "root": root}


@pytest.mark.sample(1)
def test_each_version_of_webdataset_reads_what_we_pack(elsewhere):
    read, shards = dict(elsewhere["read"]), Shards(elsewhere["root"] / "ours")
    decoded = read.pop("decoded")
    assert list(read) == [record.key for record in shards]
    for (key, members), (size, text, width), number in zip(read.items(), decoded, range(NUM_PAIRS), strict=True):
        record = shards[number]
        assert members["png"] == hashlib.sha256(record.image).hexdigest(), key
        assert tuple(text.split("\n")) == record.captions
        assert members["json"] == hashlib.sha256(shards.read(number, "json")).hexdigest()
        assert size[0] == width == shards.info(number)["width"]


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["plain", "encoded", "fixed"])
@pytest.mark.parametrize("head", [None, 1])
def test_we_read_what_each_version_of_webdataset_writes(elsewhere, tmp_path, name, head):
    ours = Shards(elsewhere["root"] / "ours")
    index_shards(str(elsewhere["root"] / "theirs" / f"{name}.tar"), tmp_path / "index", head=head)
    theirs = Shards(tmp_path / "index")
    assert list(theirs) == list(ours)
    assert [theirs.info(number) for number in range(NUM_PAIRS)] == [ours.info(number) for number in range(NUM_PAIRS)]


def test_packing_with_each_version_of_webdataset_gives_the_same_bytes(elsewhere):
    packed, ours = (everything_below(elsewhere["root"] / name) for name in ("theirs/packed", "ours"))
    assert packed == ours


# ---------------------------------------------------------------------------------------------------------------------
# img2dataset


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def downloads() -> list[dict[str, object]]:
    """The rows of a URL list after img2dataset was there: one in four could not be had."""
    rows = []
    for number in range(8):
        facts = {"url": f"https://example.org/{number}.jpg", "caption": f"Satz {number}", "license": "CC"}
        facts |= {"key": f"{number:09d}", "status": "success", "error_message": None, "width": 24, "height": 20}
        facts |= {"original_width": 640, "original_height": 480, "exif": "{}", "sha256": "0" * 64}
        if number % 4 == 3:
            facts |= {"status": "failed_to_download", "error_message": "HTTP Error 404: Not Found"}
            facts |= {"width": None, "height": None}
        rows.append(facts)
    return rows


def as_img2dataset(folder: Path, output_format: str) -> Path:
    """Its three output formats, each with a table of facts and of counts beside the shards."""
    import pyarrow
    from pyarrow import parquet
    from webdataset import TarWriter

    folder.mkdir()
    rows = downloads()
    for shard, part in ((0, rows[:5]), (1, rows[5:])):
        name = folder / f"{shard:05d}"
        kept = [row for row in part if row["status"] == "success"]
        if output_format == "webdataset":
            with TarWriter(str(name.with_suffix(".tar"))) as writer:
                for row in kept:
                    facts = json.dumps(row, indent=4)
                    sample = {"jpg": jpeg(int(row["key"])), "txt": row["caption"], "json": facts}
                    writer.write({"__key__": row["key"], **sample})
        if output_format == "files":
            name.mkdir()
            for row in kept:
                (name / f"{row['key']}.jpg").write_bytes(jpeg(int(row["key"])))
                (name / f"{row['key']}.txt").write_text(str(row["caption"]))
                (name / f"{row['key']}.json").write_text(json.dumps(row, indent=4))
        if output_format == "parquet":
            part = [{**row, "jpg": jpeg(int(row["key"])) if row in kept else None} for row in part]
        parquet.write_table(pyarrow.Table.from_pylist(part), name.with_suffix(".parquet"))
        Path(f"{name}_stats.json").write_text(json.dumps({"count": len(part), "successes": len(kept)}))
    return folder


@pytest.mark.parametrize("output_format", ["webdataset", "files", "parquet"])
def test_what_img2dataset_writes_is_packed_and_trained_on(tmp_path, output_format):
    source, out = as_img2dataset(tmp_path / "laion", output_format), tmp_path / "out"
    if output_format == "webdataset":
        cli.main(["shards", str(source), "--index-only"])
        out = source
    else:
        cli.main(["shards", str(source), str(out)])
    shards = Shards(out)
    kept = [number for number in range(8) if number % 4 != 3]
    assert [record.captions for record in shards] == [(f"Satz {number}",) for number in kept]
    assert [record.image for record in shards] == [jpeg(number) for number in kept]
    if output_format == "files":  # the .json beside a .txt is of no pair, and is counted
        assert sum("json" in reason for reason in rejections(out).values()) == 8
    else:
        assert [shards.info(number)["url"] for number in range(6)] == [f"https://example.org/{n}.jpg" for n in kept]
        assert {shards.info(number)["license"] for number in range(6)} == {"CC"}
    if output_format == "parquet":
        assert {name for name, reason in rejections(out).items() if reason == "no image in this row"} == {
            "00000.parquet: row 4",
            "00001.parquet: row 3",
        }
    data = PairDataModule(str(out), batch_size=3, num_workers=0, image_size=16)
    data.trainer = trainer_at(0)
    data.setup("fit")
    batches = [batch for _, batch in zip(range(2), data.train_dataloader(), strict=False)]
    assert [batch.images.shape for batch in batches] == [(3, 3, 16, 16)] * 2


# ---------------------------------------------------------------------------------------------------------------------
# Other programs


def members_in(folder: Path) -> dict[str, bytes]:
    """Pairs whose names need more than a plain header: long, with folders and umlauts, composed and decomposed."""
    files = {}
    for seed, stem in enumerate(("a", "sub/" + "long" * 40, "Grüße/猫", "u\u0308ber")):
        files |= {f"{stem}.jpg": jpeg(seed), f"{stem}.txt": f"words of {stem}".encode()}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return files


def check_read(tar: Path, files: dict[str, bytes], tmp_path: Path, left_out: int = 0) -> None:
    for head in (None, 1):
        index = tmp_path / f"index of {tar.stem} by {head}"
        assert index_shards(str(tar), index, head=head).left_out == left_out
        found = {record.captions[0]: record.image for record in Shards(index)}
        assert found == {files[name].decode(): files[name[:-4] + ".jpg"] for name in files if name.endswith(".txt")}


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar")
@pytest.mark.parametrize("how", ["gnu", "oldgnu", "pax", "posix"])
def test_what_gnu_tar_writes_is_read(tmp_path, how):
    files = members_in(tmp_path / "photos")
    tar = tmp_path / "made.tar"
    subprocess.run(["tar", f"--format={how}", "-cf", tar, "-C", tmp_path / "photos", "."], check=True)
    check_read(tar, files, tmp_path)


def test_what_the_tar_of_macos_writes_is_read(tmp_path):
    """Before each file one of its attributes (`._name`), and PAX headers with attributes and times."""
    files = members_in(tmp_path / "photos")
    with tarfile.open(tmp_path / "made.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            folder, slash, last = f"./{name}".rpartition("/")
            for member, content in (
                (f"{folder}{slash}._{last}", b"\0\5\26\7\0\2\0\0Mac OS X" + b"\0" * 147),
                (f"./{name}", data),
            ):
                info = tarfile.TarInfo(member)
                info.size, info.mtime, info.uname, info.gname = len(content), 1.7e9 + 0.25, "me", "staff"
                info.pax_headers = {
                    "LIBARCHIVE.xattr.com.apple.quarantine": "MDA4MTs2",
                    "SCHILY.xattr.com.apple.quarantine": "0081;6",
                    "LIBARCHIVE.creationtime": "1700000000.5",
                }
                tar.addfile(info, io.BytesIO(content))
    check_read(tmp_path / "made.tar", files, tmp_path, left_out=len(files))
