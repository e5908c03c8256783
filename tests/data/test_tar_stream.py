"""Training straight from tars: what a pass holds, what is fetched for it, and where it goes on."""

import contextlib
import io
import json
import math
import os
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import pack_folder, trainer_at, write_pairs
from servers import Server
from webdataset import autodecode

from miniclip import tokenizer
from miniclip.common import storage
from miniclip.data.augmentation import Augmentation
from miniclip.data.indexing.index_tars import index_shards
from miniclip.data.module import PairDataModule
from miniclip.data.pairs import Batch
from miniclip.data.sampling.stream import Streaming
from miniclip.data.shards import Shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
NUM_SAMPLES = 96


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "_WAITS_S", (0.001,) * 5)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def shelves(tmp_path_factory) -> dict[int, Path]:
    """96 pictures in as many tars as the key says, with an index beside them."""
    folder = tmp_path_factory.mktemp("shelves")
    write_pairs(folder / "src", NUM_SAMPLES, size=(8, 8))
    return {n: pack(folder / "src", folder / str(n), n) for n in (1, 2, 3, 8, 48)}


def pack(source: Path, out: Path, num_tars: int) -> Path:
    assert pack_folder(source, out, samples_per_shard=math.ceil(NUM_SAMPLES / num_tars)).shards == num_tars
    return out


def pattern(folder: Path | str, num_tars: int) -> str:
    return f"{folder}/{{00000..{num_tars - 1:05d}}}.tar"


def module(source, step: int = 0, rank: int = 0, world_size: int = 1, max_steps: int = 1000, **options):
    settings = {"batch_size": 8, "num_workers": 0, "image_size": 8, "context_length": 16, "order": "stream", **options}
    out = PairDataModule(source if isinstance(source, list) else str(source), **settings)
    out.trainer = trainer_at(step, rank, world_size, max_steps)
    out.setup("fit")
    return out


def training(data: PairDataModule) -> Iterator[Batch]:
    """What the trainer would see, stepping after each batch, epoch after epoch."""
    loader = data.train_dataloader()
    while True:
        for batch in loader:
            data.trainer.global_step += 1
            yield batch


def batches(data: PairDataModule, steps: int) -> list[Batch]:
    return list(islice(training(data), steps))


def keys(found: list[Batch]) -> list[str]:
    assert [problem for batch in found for problem in batch.problems] == []
    return [key.rpartition(":")[2] for batch in found for key in batch.keys]


# ---------------------------------------------------------------------------------------------------------------------
# Tars x workers x ranks


def content(folder: Path) -> dict[str, bytes]:
    return {f"/b/{path.name}": path.read_bytes() for path in folder.glob("*.tar")}


CELLS = [(tars, workers, ranks) for tars in (1, 3, 48) for workers in (1, 2, 4) for ranks in (1, 2)]
CORNERS = {(1, 1, 1), (3, 1, 2), (48, 4, 2)}


def check_cell(source: str, num_tars: int, num_workers: int, world_size: int) -> list[Iterator[Batch]]:
    """Two passes, where the readers can share the tars. Ranks need each other only to save.

    Returns the ranks' training, which may read ahead still. When it is thrown away, PyTorch gives its workers five
    seconds and kills them then, perhaps amid a tar that another rank has to fetch again.
    """
    passes, steps = 2, 2 * NUM_SAMPLES // 8
    data = [
        module(pattern(source, num_tars), rank=rank, world_size=world_size, num_workers=num_workers)
        for rank in range(world_size)
    ]
    readers = num_workers * world_size
    if num_tars < readers:
        for each in data:
            with pytest.raises(ValueError, match=f"{num_tars} tars? can't serve {readers} readers"):
                each.train_dataloader()
        return []
    running = [training(each) for each in data]
    by_rank = [list(islice(each, steps)) for each in running]
    stream = [key for step in zip(*by_rank, strict=True) for key in keys(list(step))]
    assert len(stream) == passes * NUM_SAMPLES
    times = Counter(stream)
    if num_tars % readers:  # a reader may be a tar ahead
        assert set(times.values()) <= {passes - 1, passes, passes + 1}
        assert len(times) == NUM_SAMPLES
    else:
        for start in range(0, len(stream), NUM_SAMPLES):
            assert len(set(stream[start : start + NUM_SAMPLES])) == NUM_SAMPLES
    return running


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, marks=[] if cell in CORNERS else pytest.mark.long) for cell in CELLS], ids=str
)
def test_a_pass_over_http_is_each_sample_once_or_refused_before_the_first_step(shelves, cell):
    with Server(content(shelves[cell[0]])) as server:
        running = check_cell(f"{server.url}/b", *cell)
        fetched = Counter(path for path, _ in server.gets)
        del running
    # With what was asked for: a range means that a connection broke, and none that somebody began anew.
    assert [each for each in server.gets if fetched[each[0]] > 1] == []


@pytest.mark.long
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_pass_from_s3_is_each_sample_once_or_refused_before_the_first_step(shelves, s3, cell):
    filesystem = storage.filesystem("s3://pairs")
    filesystem.mkdir("pairs")
    for name, data in content(shelves[cell[0]]).items():
        filesystem.pipe_file(f"pairs{name}", data)
    check_cell("s3://pairs/b", *cell)


def test_the_first_batch_needs_no_more_tars_than_hold_it_and_what_the_buffer_reads_ahead(shelves):
    """Eight samples, the eight that webdataset's buffer begins with, and one more with each that it hands out."""
    tars = content(shelves[48])  # of two samples each
    with Server(tars) as server:
        data = module(pattern(f"{server.url}/b", 48), batch_size=8)
        next(iter(data.train_dataloader()))
        fetched = [path for path, _ in server.gets]
    assert len(fetched) == len(set(fetched)) <= (8 + 2 * 8) / 2 + 1
    assert set(fetched) < set(tars)


def test_without_a_buffer_the_first_batch_needs_the_tars_that_hold_it(shelves):
    with Server(content(shelves[48])) as server:
        next(iter(module(pattern(f"{server.url}/b", 48), stream=Streaming(shuffle=1)).train_dataloader()))
        assert len(server.gets) == 4


def test_a_tar_that_was_replaced_by_another_is_fetched_again(shelves):
    with Server(content(shelves[2])) as server:
        keys(batches(module(pattern(f"{server.url}/b", 2)), 12))
        server.files = {path: data + tarfile.NUL * 10240 for path, data in server.files.items()}
        assert len(set(keys(batches(module(pattern(f"{server.url}/b", 2)), 12)))) == NUM_SAMPLES
        assert Counter(path for path, _ in server.gets) == dict.fromkeys(server.files, 2)


def test_a_tar_of_the_same_size_and_another_version_is_fetched_again_without_one_more_request(shelves):
    """Another caption of the same length: a tar is padded, so its size often tells nothing."""
    with Server(content(shelves[2])) as server:
        for version, word in enumerate((b"picture", b"drawing")):
            server.files = {path: data.replace(b"picture", word) for path, data in server.files.items()}
            server.etags = dict.fromkeys(server.files, f'"{version}"')
            data = module(pattern(f"{server.url}/b", 2), augmentation=None)
            expected = [tokenizer.tokenize(f"{word.decode()} {n}, caption 0", 16) for n in range(NUM_SAMPLES)]
            found = {key: row for batch in batches(data, 24) for key, row in zip(batch.keys, batch.tokens, strict=True)}
            rows = [found[f"0000{n * 2 // NUM_SAMPLES}.tar:{n:09d}"] for n in range(NUM_SAMPLES)]
            assert all(torch.equal(a[a != 0], b[b != 0]) for a, b in zip(rows, expected, strict=True))
        assert Counter(path for path, _ in server.gets) == dict.fromkeys(server.files, 2)
        assert Counter(server.heads) == dict.fromkeys(server.files, 4)  # one for each tar and pass


def test_tars_with_a_query_are_read_with_it_and_another_signature_is_no_other_run(shelves):
    expected = batches(module(pattern(shelves[8], 8)), 12)
    sequences = []
    with Server(content(shelves[8])) as server:
        for query in ("?sv=1&sig=a%2Fb/c", "?sv=1&sig=other"):
            data = module(f"{pattern(f'{server.url}/b', 8)}{query}")
            assert [batch.keys for batch in batches(data, 12)] == [batch.keys for batch in expected]
            assert {path.partition("?")[2] for path in server.heads} == {query[1:]}
            sequences.append(data.train_stream.sequence())
            server.heads.clear()
    assert sequences[0] == sequences[1] == module(pattern(shelves[8], 8)).train_stream.sequence()


def test_a_server_that_fails_one_time_in_five_changes_nothing(shelves):
    expected = keys(batches(module(pattern(shelves[8], 8)), 12))
    with Server(content(shelves[8]), fault=lambda number: 503 if number % 5 == 1 else None) as server:
        assert keys(batches(module(pattern(f"{server.url}/b", 8)), 12)) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def test_samples_are_those_that_exact_training_reads(shelves):
    streamed = {key: (image, row[row != 0]) for key, image, row in plain(module(shelves[3], augmentation=None))}
    exact = {key: (image, row[row != 0]) for key, image, row in plain(module(shelves[3], order="exact"))}
    assert streamed.keys() == exact.keys()
    assert all(torch.equal(streamed[key][1], exact[key][1]) for key in exact)


def plain(data: PairDataModule):
    data.augmentation = Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    for batch in batches(data, 12):
        yield from zip(batch.keys, batch.images, batch.tokens, strict=True)


@pytest.mark.long
def test_a_larger_buffer_mixes_tars_and_none_keeps_their_order(shelves):
    in_order = keys(batches(module(shelves[8], stream=Streaming(shuffle=1)), 12))
    for n in range(0, NUM_SAMPLES, 12):
        first = int(in_order[n])
        assert [int(key) for key in in_order[n : n + 12]] == list(range(first, first + 12))
    mixed = keys(batches(module(shelves[8], stream=Streaming(shuffle=96)), 12))
    assert sorted(mixed) == sorted(in_order)
    assert len({int(key) // 12 for key in mixed[:24]}) > 2
    assert mixed != keys(batches(module(shelves[8], stream=Streaming(shuffle=96), seed=1), 12))


def test_every_pass_draws_other_pixels_and_captions(tmp_path):
    pack_folder(write_pairs(tmp_path / "src", 8, captions=9), tmp_path / "out")
    first, second = batches(module(tmp_path / "out", augmentation=Augmentation(scale=(0.2, 1.0))), 2)
    place = [first.keys.index(key) for key in second.keys]
    assert sorted(first.keys) == sorted(second.keys)
    assert not torch.equal(first.images[place], second.images)
    assert not torch.equal(first.caption_ids[place], second.caption_ids)


@pytest.mark.long
def test_resampled_readers_need_no_tar_of_their_own_and_draw_different_ones(shelves):
    data = module(shelves[3], num_workers=4, stream=Streaming(resampled=True, shuffle=1))
    found = batches(data, 12)
    assert len({tuple(batch.keys) for batch in found}) > 4
    assert set(keys(found)) <= {f"{n:09d}" for n in range(NUM_SAMPLES)}


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with a tar


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def png(tmp_path_factory) -> bytes:
    return (write_pairs(tmp_path_factory.mktemp("png"), 1) / "0000.png").read_bytes()


def test_a_bad_sample_leaves_a_hole_that_the_mask_takes_out(tmp_path, png):
    members = {"a.png": png, "a.txt": b"good", "b.png": png[:50], "b.txt": b"cut", "c.txt": b"alone", "d.png": png}
    write_tar(tmp_path / "0.tar", members)
    (batch,) = batches(module(tmp_path / "0.tar", batch_size=4), 1)
    problems = dict(problem.split(": ", 1) for problem in batch.problems)
    assert set(problems) == {"0.tar:b", "0.tar:c", "0.tar:d"}
    assert "no image" in problems["0.tar:c"]
    assert "no caption" in problems["0.tar:d"]
    assert [key for key, good in zip(batch.keys, batch.mask.tolist(), strict=True) if good] == ["0.tar:a"]
    assert batch.images.shape == (4, 3, 8, 8)


def test_a_tar_that_is_damaged_gone_or_empty_is_one_hole_with_its_name_and_the_others_go_on(shelves, tmp_path):
    files = content(shelves[8])
    files["/b/00001.tar"] = files["/b/00001.tar"][:3000]
    files["/b/00002.tar"] = b"<html>no tar</html>" * 100
    del files["/b/00003.tar"]
    files["/b/00004.tar"] = write_tar(tmp_path / "empty.tar", {}).read_bytes()
    with Server(files) as server:
        found = batches(module(pattern(f"{server.url}/b", 8), batch_size=4), 13)
    problems = dict(problem.split(":*: ") for batch in found for problem in batch.problems)
    assert sorted(problems) == [f"0000{n}.tar" for n in (1, 2, 3, 4)]
    assert "damaged" in problems["00001.tar"]
    assert "no tar" in problems["00002.tar"]
    assert "404" in problems["00003.tar"]
    assert "no samples" in problems["00004.tar"]
    healthy = {key for batch in found for key in batch.keys if not key.endswith("*")}
    assert len(healthy) == 48


def test_a_tar_whose_headers_tarfile_fails_on_is_one_hole_with_its_name(tmp_path, png):
    good = write_tar(tmp_path / "good.tar", {"a.png": png, "a.txt": b"a"}).read_bytes()
    named = tarfile.TarInfo("a.png")
    named.pax_headers = {"GNU.sparse.map": "0,many"}
    sparse = named.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "bad.tar").write_bytes(sparse + good)
    (batch,) = batches(module(tmp_path / "*.tar", batch_size=2), 1)
    assert sorted(zip(batch.keys, batch.mask.tolist(), strict=True)) == [("bad.tar:*", False), ("good.tar:a", True)]
    assert f"{tmp_path}/bad.tar is no tar, or a damaged or compressed one: " in batch.problems[0]


def test_members_that_belong_to_no_pair_are_counted_by_reason(tmp_path, png, capfd):
    samples = {"a.png": png, "a.txt": b"a", "b.png": png, "b.txt": b"b"}
    write_tar(tmp_path / "0.tar", {"._a.png": b"x", **samples, "notes.md": b"x", "m.md": b"x"})
    data = module(tmp_path / "0.tar", batch_size=2)
    batches(data, 1)
    data.teardown("fit")
    err = capfd.readouterr().err
    assert "left out of the stream: 0.tar:._a.png (left behind by a system or a program)" in err
    assert "3 left out of the stream by this process" in err


def test_a_tar_of_tars_joined_is_read_to_the_end(tmp_path, png):
    parts = [write_tar(tmp_path / f"{n}.part", {f"{n}.png": png, f"{n}.txt": b"x"}).read_bytes() for n in range(2)]
    (tmp_path / "joined.tar").write_bytes(b"".join(parts))
    assert sorted(keys(batches(module(tmp_path / "joined.tar", batch_size=2), 1))) == ["0", "1"]


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_nothing_in_a_tar_is_unpickled_by_training_or_by_webdatasets_own_decoders(tmp_path, png, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suffixes = [*autodecode.decoders, "PYD", "pyd.gz", "pickle", "pt"]
    bombs = {f"a.{suffix}": pickle.dumps(Bomb()) for suffix in suffixes if suffix not in ("txt", "json")}
    write_tar(tmp_path / "s/0.tar", {"a.png": png, "a.txt": b"a", **bombs, "b.png": png, "b.txt": b"b"})
    assert len(keys(batches(module(tmp_path / "s/0.tar", batch_size=2), 1))) == 2
    index_shards(str(tmp_path / "s"))
    for sample in Shards(tmp_path / "s").webdataset():
        assert not {"pyd", "pyd.gz", "pkl", "pickle", "pth"} & set(sample)
        for suffix, data in sample.items():
            with contextlib.suppress(Exception):
                autodecode.Decoder([])({"__key__": "x", suffix: data})
    assert not (tmp_path / "exploded").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Going on


@pytest.mark.sample(2)
@pytest.mark.parametrize("num_workers, stopped", [(0, 1), (0, 12), (2, 7)])
def test_the_same_readers_go_on_with_the_very_next_batch(shelves, num_workers, stopped):
    options = {"num_workers": num_workers, "stream": Streaming(shuffle=20)}
    whole = batches(module(shelves[8], **options), 26)
    before = module(shelves[8], **options)
    batches(before, stopped)
    state = before.state_dict()
    after = module(shelves[8], step=stopped, **options)
    after.load_state_dict(state)
    rest = batches(after, 26 - stopped)
    assert [batch.keys for batch in rest] == [batch.keys for batch in whole[stopped:]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[stopped:], strict=True))


@pytest.mark.parametrize("readers", [(1, 2), (2, 1), (2, 4), (4, 2)], ids=str)
def test_another_number_of_readers_loses_no_sample_and_repeats_those_it_announces(shelves, capsys, readers):
    stopped, settings = 5, Streaming(shuffle=10)
    before = module(shelves[8], num_workers=readers[0], stream=settings)
    seen = keys(batches(before, stopped))
    after = module(shelves[8], step=stopped, num_workers=readers[1], stream=settings)
    after.load_state_dict(before.state_dict())
    announced = int(capsys.readouterr().out.split("so ")[1].split(" samples")[0])
    assert announced <= readers[0] * 12  # each has a block of one tar
    seen += keys(batches(after, (NUM_SAMPLES - len(seen) + announced) // 8))
    times = Counter(seen)
    repeated = sum(count - 1 for count in times.values())
    assert repeated <= announced + 8 * readers[1]  # and the next pass of a reader that is ahead
    if 8 % readers[1] == 0 and announced == 0:
        assert len(times) == NUM_SAMPLES


def test_a_stream_travels_to_a_spawned_worker(shelves):
    data = module(shelves[8])
    expected = batches(data, 1)[0].keys
    stream = pickle.loads(pickle.dumps(module(shelves[8]).train_dataloader().stream))
    assert next(iter(stream)).batch.keys == expected


def test_batches_fetched_ahead_are_not_counted_as_trained(shelves):
    data = module(shelves[8])
    loader = iter(data.train_dataloader())
    for _ in range(3):
        next(loader)
    data.trainer.global_step = 1
    assert data.state_dict()["stream"]["taken"] == [8]


@pytest.mark.parametrize(
    "name, options",
    [
        ("seed", {"seed": 9}),
        ("batch_size", {"batch_size": 4}),
        ("stream.shuffle", {"stream": Streaming(shuffle=7)}),
        ("stream.resampled", {"stream": Streaming(resampled=True)}),
        ("order", {"order": "exact"}),
    ],
)
def test_a_checkpoint_of_another_stream_is_refused_with_the_name(shelves, name, options):
    data = module(shelves[8])
    batches(data, 1)
    with pytest.raises(ValueError, match=rf"trained with {name} .*, this run has"):
        module(shelves[8], **options).load_state_dict(data.state_dict())


def test_a_checkpoint_of_other_tars_or_of_the_exact_order_is_refused(shelves):
    data = module(shelves[8])
    batches(data, 1)
    with pytest.raises(ValueError, match=r"trained with tars 8 tars.*, this run has 3 tars"):
        module(shelves[3]).load_state_dict(data.state_dict())
    exact = module(shelves[8], order="exact").state_dict()
    del exact["order"]  # as earlier versions wrote it
    with pytest.raises(ValueError, match="trained with order exact, this run has stream"):
        module(shelves[8]).load_state_dict(exact)


# ---------------------------------------------------------------------------------------------------------------------
# Epochs, and what can't be


def test_an_index_gives_the_epoch_its_length_a_setting_another_and_else_the_run_is_one(shelves):
    assert module(shelves[8]).steps_per_epoch() == 12
    assert module(shelves[8], stream=Streaming(epoch_samples=40)).steps_per_epoch() == 5
    assert module(pattern(shelves[8], 8), max_steps=77).steps_per_epoch() == 77
    assert "the whole run of 77 steps" in module(pattern(shelves[8], 8), max_steps=77).describe()


def test_epochs_follow_each_other_without_a_gap(shelves):
    data = module(shelves[8], stream=Streaming(epoch_samples=40))
    loader, epochs = data.train_dataloader(), []
    for _ in range(3):
        epochs.append([batch.keys for batch in loader])
        data.trainer.global_step += len(epochs[-1])
    assert [len(epoch) for epoch in epochs] == [5, 5, 5]
    assert [k for e in epochs for k in e] == [batch.keys for batch in batches(module(shelves[8]), 15)]


def test_an_epoch_that_nobody_can_count_is_refused_with_the_settings_that_help(shelves):
    with pytest.raises(ValueError, match=r"no index.*trainer\.max_steps.*data\.stream\.epoch_samples"):
        module(pattern(shelves[8], 8), max_steps=-1).steps_per_epoch()
    with pytest.raises(ValueError, match=r"batch_size is 8.*7 samples"):
        module(shelves[8], stream=Streaming(epoch_samples=7)).steps_per_epoch()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"weights": [1.0]}, r"data\.weights is \[1\.0\].*data\.order stream"),
        ({"order": "exact", "stream": Streaming(resampled=True)}, r"data\.stream.*resampled=True.*data\.order exact"),
        ({"order": "steam"}, r"data\.order is 'steam'; valid are exact, stream"),
    ],
)
def test_settings_that_cannot_hold_are_refused_by_name(shelves, options, words):
    with pytest.raises(ValueError, match=words):
        module(shelves[8], **options)


def test_a_batch_that_ranks_cannot_share_is_refused(shelves):
    with pytest.raises(ValueError, match="batch_size is 8, which 3 ranks"):
        module(shelves[8], world_size=3).train_dataloader()


@pytest.mark.parametrize(
    "source, words",
    [
        ("pipe:cat /etc/passwd.tar", "pipe"),
        ("nowhere/{0..3}.tar", "nowhere/0.tar"),
        ("nowhere", "nowhere"),
    ],
)
def test_a_source_without_tars_is_refused_by_name(tmp_path, monkeypatch, source, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        module(source)


def test_a_folder_at_a_url_without_an_index_asks_for_the_tars_names(shelves):
    with Server(content(shelves[3])) as server, pytest.raises(ValueError, match=r"name them, as .*00099\}\.tar"):
        module(f"{server.url}/b")


# ---------------------------------------------------------------------------------------------------------------------
# webdataset's own


def test_people_get_a_pipeline_of_webdatasets_with_each_sample_once(shelves):
    shards = Shards(shelves[3])
    samples = list(shards.webdataset().shuffle(10).decode("pil").to_tuple("__key__", "png", "txt"))
    assert sorted(key for key, _, _ in samples) == [f"{n:09d}" for n in range(NUM_SAMPLES)]
    key, image, text = samples[0]
    assert image.size == (8, 8)
    assert text.strip() == f"picture {int(key)}, caption 0"


def test_workers_of_a_loader_share_the_pipelines_tars(shelves):
    with Server({f"/b/{path.name}": path.read_bytes() for path in shelves[8].iterdir()}) as server:
        pipeline = Shards(f"{server.url}/b").webdataset().to_tuple("__key__")
        loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=2)
        assert sorted(key for (key,) in loader) == [f"{n:09d}" for n in range(NUM_SAMPLES)]
        assert len([path for path, _ in server.gets if path.endswith(".tar")]) == 8


def test_a_resampled_pipeline_has_no_end(shelves):
    pipeline = iter(Shards(shelves[3]).webdataset(resampled=True))
    assert len([next(pipeline) for _ in range(3 * NUM_SAMPLES)]) == 3 * NUM_SAMPLES


WITH_ANOTHER = """
import json, sys
import webdataset
from helpers import trainer_at
from miniclip.data.module import PairDataModule
data = PairDataModule(sys.argv[1], order="stream", batch_size=8, num_workers=0, image_size=8, context_length=16)
data.trainer = trainer_at(0, max_steps=12)
data.setup("fit")
print(json.dumps([webdataset.__file__, [batch.keys for batch in data.train_dataloader()]]))
"""


@pytest.mark.long
def test_the_oldest_version_of_webdataset_gives_the_same_batches(shelves):
    """`make test` puts it there."""
    oldest = str(Path(sys.prefix) / "webdataset_oldest")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([oldest, *sys.path])}
    command = [sys.executable, "-c", WITH_ANOTHER, str(shelves[8])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    file, found = json.loads(done.stdout.splitlines()[-1])
    assert file.startswith(oldest)
    assert found == [batch.keys for batch in batches(module(shelves[8]), 12)]
