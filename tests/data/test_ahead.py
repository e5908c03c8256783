"""Remote shards come before they are needed, within the cache's bound, and change no sample."""

from __future__ import annotations

import contextlib
import gc
import pickle
import threading
import time
import weakref
from collections import Counter
from itertools import groupby, pairwise

import numpy as np
import pytest
from helpers import pack_folder, trainer_at, write_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Server
from torch.utils.data import DataLoader

from miniclip.common import storage
from miniclip.common.cache import Cache
from miniclip.data.module import PairDataModule
from miniclip.data.pairs import CaptionChoice, PairDataset
from miniclip.data.sampling.ahead import Ahead
from miniclip.data.sampling.order import Mixture, SampleOrder
from miniclip.data.shards import Shards

COUNT, PER_SHARD, PER_BLOCK = 48, 4, 12  # 12 shards in 4 blocks


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(storage, "_WAITS_S", (0.001,) * 5)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ahead")
    pack_folder(write_pairs(folder / "pairs", COUNT), folder / "shards", samples_per_shard=PER_SHARD)
    return {f"/{path.name}": path.read_bytes() for path in (folder / "shards").iterdir()}


@pytest.fixture
def serve(files):
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(Server(files, **options))


def order_of(shards):
    return SampleOrder(shards.counts, 0, PER_BLOCK)


def dataset_of(server, tmp_path, is_ahead=True, limit_bytes=10**9, stop=None, reserved_bytes=0):
    shards = Shards(server.url, Cache(tmp_path / "cache", limit_bytes))
    ahead = Ahead(shards, order_of(shards), reserved_bytes, stop) if is_ahead else None
    return PairDataset(shards, 8, 16, None, CaptionChoice(order="first"), 0, None, ahead)


def tars_asked_for(server):
    return Counter(path for path, _ in list(server.gets) if path.endswith(".tar"))


def until(condition, what):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------------
# What comes next


counts_of_shards = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def blocks_in(order, counts, epochs):
    """(epoch, shards) of each block, from the sequence of samples itself."""
    ends = np.cumsum(counts)
    block_of = {}
    for epoch in range(epochs):
        for n, block in enumerate(order._plan(epoch)[0]):
            block_of |= {(epoch, int(shard)): n for shard in block}
    found = [(e, int(np.searchsorted(ends, s, side="right"))) for e, s in order.slice(0, epochs * int(ends[-1]))]
    return [
        (key[0], sorted({shard for _, shard in group}))
        for key, group in groupby(found, key=lambda each: (each[0], block_of[each]))
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(counts_of_shards, st.sampled_from([1, 5, 12, 10**9]), st.integers(0, 3))
def test_the_next_block_is_the_one_that_the_sequence_goes_on_with(counts, block_samples, seed):
    order = SampleOrder(np.array(counts), seed, block_samples)
    blocks = blocks_in(order, counts, 3)
    starts = np.cumsum(counts) - counts
    position = 0
    for (epoch, shards), (_, following) in pairwise(blocks):
        position += sum(counts[shard] for shard in shards)
        sample = int(starts[shards[0]])
        now, then = order.blocks_at(epoch, sample)
        assert (sorted(now), sorted(then)) == (shards, following)
        assert order.blocks_at(epoch, sample, position) == (now, [])
        assert order.blocks_at(epoch, sample, position + 1) == (now, then)


def test_of_a_mixture_it_is_that_of_the_samples_source():
    orders = [SampleOrder(np.array(counts), seed, 4) for seed, counts in enumerate(([3, 3, 3], [2, 5, 4, 1]))]
    mixture = Mixture(orders, [1, 2], 0)
    for source, order in enumerate(orders):
        first_sample, first_shard = (0, 9)[source], (0, 3)[source]
        for sample in range(order.num_samples):
            expected = [[shard + first_shard for shard in part] for part in order.blocks_at(1, sample)]
            assert list(mixture.blocks_at(1, sample + first_sample)) == expected
    assert mixture.blocks_at(5000, 9, stop=10)[1] == []


# ---------------------------------------------------------------------------------------------------------------------
# Shards that come


def block_of(dataset, number):
    return order_of(dataset.shards).slice(number * PER_BLOCK, (number + 1) * PER_BLOCK)


def read(dataset, places, num_workers):
    return list(DataLoader(dataset, sampler=places, batch_size=None, num_workers=num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_next_block_is_here_before_it_is_asked_for(serve, tmp_path, num_workers):
    """The server has nothing any more after the first block: who had to fetch a tar then would get holes."""
    found = {}
    for is_ahead in (True, False):
        server = serve()
        dataset = dataset_of(server, tmp_path / str(is_ahead), is_ahead)

        def places(server=server, dataset=dataset, is_ahead=is_ahead):
            yield from block_of(dataset, 0)
            until(lambda: len(tars_asked_for(server)) >= (6 if is_ahead else 3), "the tars of the next block")
            folder = dataset.shards.cache.folder
            until(lambda: not [*folder.glob("*.part"), *folder.glob("*.lock")], "the ends of the fetches")
            server.files = {}
            yield from block_of(dataset, 1)

        samples = read(dataset, Sequenced(places, 2 * PER_BLOCK), num_workers)
        found[is_ahead] = [sample.problem for sample in samples]
    assert found[True] == [None] * 2 * PER_BLOCK
    assert all(found[False][PER_BLOCK:])


class Sequenced:
    """A sampler whose next samples depend on what happened meanwhile."""

    def __init__(self, places, length):
        self.places, self.length = places, length

    def __iter__(self):
        return iter(self.places())

    def __len__(self):
        return self.length


@pytest.mark.parametrize("num_workers", [0, 1, pytest.param(3, marks=pytest.mark.long)])
def test_samples_are_those_that_come_without_it_and_each_tar_comes_once(serve, tmp_path, num_workers):
    server = serve()
    dataset = dataset_of(server, tmp_path)
    places = order_of(dataset.shards).slice(0, 2 * COUNT)
    samples = read(dataset, places, num_workers)
    expected = read(dataset_of(serve(), tmp_path / "other", is_ahead=False), places, 0)
    assert [(s.key, s.texts, s.problem) for s in samples] == [(s.key, s.texts, s.problem) for s in expected]
    assert all((a.image == b.image).all() for a, b in zip(samples, expected, strict=True))
    assert set(tars_asked_for(server).values()) == {1}


def test_a_tar_that_cannot_be_had_is_met_where_it_is_read(serve, tmp_path, files):
    problems = {}
    for is_ahead in (True, False):
        server = serve()
        server.files = {path: data for path, data in files.items() if path != "/00005.tar"}
        dataset = dataset_of(server, tmp_path / str(is_ahead), is_ahead)
        samples = read(dataset, order_of(dataset.shards).slice(0, COUNT), 0)
        problems[is_ahead] = [(sample.problem or "").replace(server.url, "") for sample in samples]
    assert problems[True] == problems[False]
    assert sum("00005.tar can't be read" in problem for problem in problems[True]) == PER_SHARD


def test_nothing_is_fetched_for_after_the_end_of_training(serve, tmp_path):
    server = serve()
    dataset = dataset_of(server, tmp_path, stop=2 * PER_BLOCK)
    places = order_of(dataset.shards).slice(0, 2 * PER_BLOCK)
    read(dataset, places, 0)
    ends = np.cumsum(dataset.shards.counts)
    needed = {f"/{int(np.searchsorted(ends, sample, side='right')):05d}.tar" for _, sample in places}
    assert set(tars_asked_for(server)) == needed
    assert len(needed) == 2 * PER_BLOCK // PER_SHARD


@pytest.mark.parametrize("reserved", [False, True])
def test_the_cache_keeps_its_bound_and_what_is_trained_on(serve, tmp_path, reserved, files):
    """Of a next block that does not fit beside the current one, only the shards that do are fetched."""
    largest = max(len(data) + len(files[f"{path[:-4]}.npz"]) for path, data in files.items() if path.endswith(".tar"))
    server = serve()
    room = {"limit_bytes": 6 * largest, "reserved_bytes": 2 * largest} if reserved else {"limit_bytes": 4 * largest}
    dataset = dataset_of(server, tmp_path, **room)
    read(dataset, block_of(dataset, 0), 0)
    until(lambda: len(tars_asked_for(server)) >= 4, "the first tar of the next block")
    until(lambda: dataset.ahead._blocks.empty(), "the thread")
    read(dataset, block_of(dataset, 0), 0)
    assert len(tars_asked_for(server)) == 4
    assert set(tars_asked_for(server).values()) == {1}
    held = sum(path.stat().st_size for path in dataset.shards.cache.folder.glob("*.tar-*"))
    assert held <= room["limit_bytes"]


def test_a_slow_server_is_waited_for_at_the_first_block_alone(serve, tmp_path):
    """Samples that have to wait for a tar, counted: with it those of the first block alone."""
    waits = {}
    for is_ahead in (True, False):
        server = serve()
        dataset = dataset_of(server, tmp_path / str(is_ahead), is_ahead)
        here = dataset.shards.cache.folder
        waits[is_ahead] = 0
        for number in range(COUNT // PER_BLOCK):
            places = block_of(dataset, number)
            for place in places:
                shard, _ = dataset.shards.locate(place[1])
                waits[is_ahead] += not list(here.glob(f"{dataset.shards.entries[shard].name}-*.cached"))
                assert dataset[place].problem is None
            if is_ahead:  # the rest of the block's steps takes as long as the server
                wanted = min((number + 2) * PER_BLOCK // PER_SHARD, COUNT // PER_SHARD)
                until(lambda: len(list(here.glob("*.tar-*.cached"))) >= wanted, "the next block")  # noqa: B023
    assert waits[False] == COUNT // PER_SHARD
    assert waits[True] <= PER_BLOCK // PER_SHARD


def test_it_travels_to_workers_that_are_not_forked(serve, tmp_path):
    dataset = dataset_of(serve(), tmp_path)
    assert dataset[0, 0].problem is None
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[0, 0].key == dataset[0, 0].key


def test_its_thread_ends_when_nothing_reads_any_more(serve, tmp_path):
    before = set(threading.enumerate())
    dataset = dataset_of(serve(), tmp_path)
    read(dataset, block_of(dataset, 0), 0)
    (thread,) = [each for each in set(threading.enumerate()) - before if each.name == "shards ahead"]
    shards = weakref.ref(dataset.shards)
    del dataset
    gc.collect()
    thread.join(300)
    assert not thread.is_alive()
    assert shards() is None


def test_training_has_it_for_remote_shards_alone(serve, tmp_path, files):
    (tmp_path / "here").mkdir()
    for name, data in files.items():
        (tmp_path / "here" / name[1:]).write_bytes(data)
    for location, is_ahead in ((serve().url, True), (str(tmp_path / "here"), False)):
        module = PairDataModule(location, batch_size=12, num_workers=0, image_size=8, context_length=16)
        module.cache = Cache(tmp_path / "cache")
        module.setup("fit")
        module.trainer = trainer_at(0)
        assert (module.train_dataloader().dataset.ahead is not None) == is_ahead
