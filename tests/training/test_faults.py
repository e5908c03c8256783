# Shards on unreliable servers, and samples that are spoilt in every way: a whole epoch, nothing lost, nothing doubled.

import csv
import io
import random
import struct
import tarfile
import zlib

import numpy as np
import pytest
from helpers import trainer_at, write_pairs
from PIL import Image
from servers import Server

from miniclip.common import storage
from miniclip.data.indexing.index_tars import index_shards
from miniclip.data.module import PairDataModule
from miniclip.data.pack import pack
from miniclip.data.sample_files import Packing
from miniclip.data.shards import Shards
from miniclip.data.sources import read_pairs


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    """Short waits and small pieces, for forked workers too; a cache of its own; and no proxy between here and here."""
    monkeypatch.setattr(storage, "_WAITS_S", (0.001,) * 5)
    monkeypatch.setattr(storage, "PIECE_BYTES", 4000)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))


def trained_keys(source, num_workers, num_batches, **options) -> tuple[list[str], list[str]]:
    """The keys of healthy samples in the order of training, and the problems of the others."""
    settings = {"batch_size": 10, "image_size": 16, "context_length": 16, **options}
    data = PairDataModule(source, num_workers=num_workers, **settings)
    data.trainer = trainer_at(0)
    data.setup("fit")
    keys, problems = [], []
    while data.trainer.global_step < num_batches:
        for batch in data.train_dataloader():
            mask = [True] * len(batch.keys) if batch.mask is None else batch.mask.tolist()
            keys += [key for key, is_healthy in zip(batch.keys, mask, strict=True) if is_healthy]
            problems += batch.problems
            data.trainer.global_step += 1
    return keys, problems


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf")
    pack(
        read_pairs(write_pairs(folder / "pairs", 60)), folder / "out", source="x", packing=Packing(samples_per_shard=12)
    )
    return folder / "out"


def content(shelf) -> dict[str, bytes]:
    return {f"/shards/{path.name}": path.read_bytes() for path in shelf.iterdir()}


def unreliable(seed=0):
    """One request in five fails: a status of the server's, or it hangs up in the middle."""
    chance = random.Random(seed)
    return lambda number: chance.choice((500, 503, 700)) if chance.random() < 0.2 else None


@pytest.mark.parametrize("num_workers", [0, 3])
def test_an_epoch_from_a_server_that_fails_one_time_in_five_is_each_sample_once(shelf, num_workers):
    expected, _ = trained_keys(str(shelf), 0, 6)
    with Server(content(shelf), fault=unreliable()) as server:
        keys, problems = trained_keys(f"{server.url}/shards", num_workers, 6)
        fetched = [path for path, asked in server.gets if path.endswith(".tar") and not asked]
    assert problems == []
    assert keys == expected
    assert len(set(keys)) == len(keys) == 60
    assert len(set(fetched)) == 5


def test_remote_shards_are_fetched_once_for_all_workers_and_epochs(shelf):
    with Server(content(shelf)) as server:
        trained_keys(f"{server.url}/shards", 4, 12)
        fetched = [path for path, _ in server.gets if path.endswith(".tar")]
    assert sorted(fetched) == [f"/shards/0000{n}.tar" for n in range(5)]


def test_an_epoch_through_a_cache_that_holds_two_shards_at_a_time_is_each_sample_once(shelf):
    largest = max(path.stat().st_size for path in shelf.glob("*.tar"))
    with Server(content(shelf)) as server:
        keys, problems = trained_keys(f"{server.url}/shards", 2, 6, cache_gb=2.5 * largest / 1e9)
    assert problems == []
    assert len(set(keys)) == len(keys) == 60


def test_a_shard_that_vanished_from_the_server_leaves_holes_with_its_name(shelf):
    files = content(shelf)
    del files["/shards/00003.tar"]
    with Server(files) as server:
        keys, problems = trained_keys(f"{server.url}/shards", 2, 6)
        assert len(keys) == 48
        assert len(problems) == 12
        assert all("shards/00003.tar" in problem for problem in problems)


def test_an_epoch_from_s3_is_each_sample_once(shelf, s3, tmp_path):
    filesystem = storage.filesystem("s3://pairs")
    filesystem.mkdir("pairs")
    for name, data in content(shelf).items():
        filesystem.pipe_file(f"pairs{name}", data)
    keys, problems = trained_keys("s3://pairs/shards", 2, 6)
    assert problems == []
    assert keys == trained_keys(str(shelf), 0, 6)[0]
    some, _ = trained_keys("s3://pairs/shards/{00001..00003}.tar", 0, 3, batch_size=12)
    assert sorted(some) == sorted(key for key in keys if key[4] in "123")


# ---- Spoilt samples


def jpeg(seed: int, size=(32, 24)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG whose header says 60,000 x 60,000 pixels."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


SPOILT = {
    "cut in half": lambda data: {"jpg": data[: len(data) // 2], "txt": b"words"},
    "a page of the web": lambda data: {"jpg": b"<html>404</html>" * 30, "txt": b"words"},
    "no bytes": lambda data: {"jpg": b"", "txt": b"words"},
    "no image": lambda data: {"txt": b"words"},
    "no caption": lambda data: {"jpg": data},
    "an empty caption": lambda data: {"jpg": data, "txt": b""},
    "a bomb": lambda data: {"png": bomb(), "txt": b"words"},
    "another kind of file": lambda data: {"webp": b"PK\x03\x04" + data, "txt": b"words"},
}


def test_of_samples_spoilt_in_eight_ways_each_is_listed_and_every_healthy_one_trained_on(tmp_path):
    """Shards from elsewhere, as packing our own leaves such samples out. One in ten is spoilt."""
    (tmp_path / "shards").mkdir()
    spoilt = {}
    for shard in range(4):
        with tarfile.open(tmp_path / "shards" / f"{shard:05d}.tar", "w") as tar:
            for number in range(40):
                key, members = f"{shard}{number:03d}", {"jpg": jpeg(40 * shard + number), "txt": b"a picture"}
                if number % 10 == 3:
                    what = list(SPOILT)[(4 * shard + number // 10) % len(SPOILT)]
                    spoilt[f"{shard:05d}.tar:{key}"] = what
                    members = SPOILT[what](members["jpg"])
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    index_shards(str(tmp_path / "shards"))
    everything = {f"{s:05d}.tar:{s}{n:03d}" for s in range(4) for n in range(40)}
    keys, problems = trained_keys(str(tmp_path / "shards"), 2, 16)
    assert set(spoilt.values()) == set(SPOILT)
    assert len(Shards(str(tmp_path / "shards"))) == 160 == len(keys) + len(problems)
    assert sorted(keys) == sorted(everything - set(spoilt))
    reasons = dict(problem.split(": ", 1) for problem in problems)
    assert set(reasons) == set(spoilt)
    for key, what in spoilt.items():
        wanted = {
            "no caption": "no caption",
            "an empty caption": "no caption",
            "a bomb": "bomb",
            "no image": "no image",
        }
        assert wanted.get(what, "image") in reasons[key], (what, reasons[key])


def test_packing_leaves_the_same_out_and_lists_it(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number, (what, spoil) in enumerate(SPOILT.items()):
        for suffix, data in spoil(jpeg(number)).items():
            (folder / f"{what}.{suffix}").write_bytes(data)
    (folder / "good.jpg").write_bytes(jpeg(99))
    (folder / "good.txt").write_text("words")
    packed = pack(read_pairs(folder), tmp_path / "out", source="x")
    assert (packed.kept, packed.rejected) == (1, len(SPOILT))
    with open(tmp_path / "out" / "rejected.csv", newline="") as file:
        listed = {row["source"].rpartition(".")[0]: row["reason"] for row in csv.DictReader(file)}
    assert set(listed) == set(SPOILT)
    assert all(listed.values())
