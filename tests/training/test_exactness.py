"""Exactness with real files and real processes, each under a deadline.

Covers: the same sequence of samples for any number of shards, workers and ranks; going on after SIGKILL to the same
keys and bits, in one process and in two; skipping deep into large sets; the plan of a billion samples; batches
fetched ahead are not trained on.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm
from helpers import pack_folder, trainer_at, write_pairs
from pytorch_lightning import Callback

from miniclip import tokenizer
from miniclip.data.module import PairDataModule
from miniclip.data.pairs import Batch
from miniclip.data.sampling.order import BatchSampler, SampleOrder

ROOT = Path(__file__).parents[2]

# More workers than this machine has cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def module(folder: Path, rank: int = 0, world_size: int = 1, **options: Any) -> PairDataModule:
    """Under what the trainer tells of itself, at step 0."""
    out = PairDataModule(str(folder), **{"image_size": 8, "context_length": 16, **options})
    out.trainer = trainer_at(0, rank, world_size)
    out.setup("fit")
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Shards x workers x ranks

NUM_SAMPLES = 1000
NUM_SHARDS, NUM_WORKERS, NUM_RANKS = (1, 3, 7, 50), (1, 2, 4, 8), (1, 2, 3)


class Cell(NamedTuple):
    shards: int
    workers: int
    batch_size: int  # global
    passes: int  # over the loader

    @property
    def num_steps(self) -> int:
        return self.passes * (NUM_SAMPLES // self.batch_size)


Fingerprint = tuple[int, int, int]  # the sample's number, and sums of its augmented picture and of its text


def fingerprints(batch: Batch) -> list[Fingerprint]:
    assert not batch.problems
    return [
        (int(key.split(":")[1]), zlib.crc32(image.numpy().tobytes()), zlib.crc32(row[row != 0].numpy().tobytes()))
        for key, image, row in zip(batch.keys, batch.images, batch.tokens, strict=True)
    ]


class Shelves(dict[int, Path]):
    """1,000 pictures with their number as caption, in as many shards as the key says; packed when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_pairs(folder / "src", NUM_SAMPLES, size=(8, 8))

    def __missing__(self, shards: int) -> Path:
        self[shards] = out = self.folder / str(shards)
        each = math.ceil(NUM_SAMPLES / shards)
        assert pack_folder(self.folder / "src", out, samples_per_shard=each).shards == shards
        return out


@pytest.fixture(scope="module")
def shelves(tmp_path_factory) -> Shelves:
    return Shelves(tmp_path_factory.mktemp("shelves"))


@cache
def expected_stream(folder: Path) -> list[Fingerprint]:
    """Four epochs as one process without workers makes them."""
    data = module(folder, batch_size=NUM_SAMPLES, num_workers=0)
    out = []
    for _ in range(4):
        for batch in data.train_dataloader():
            captions = [f"picture {int(key.split(':')[1])}, caption 0" for key in batch.keys]
            assert torch.equal(batch.tokens, tokenizer.tokenize(captions, 16)[:, : batch.tokens.shape[1]])
            out += fingerprints(batch)
            data.trainer.global_step += 1
    return out


def train_as_rank(rank: int, world_size: int, shelves: dict[int, Path], cells: list[Cell], out: Path) -> None:
    """Goes through the cells one after the other; rank 0 writes what each rank saw in each step of each cell."""
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as in a process that a shell began
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    meeting = f"file://{out}.meeting"
    dist.init_process_group("gloo", meeting, timedelta(seconds=600), rank=rank, world_size=world_size)
    results = [_train_cell(rank, world_size, shelves[cell.shards], cell) for cell in cells]
    if rank == 0:
        out.write_text(json.dumps(results))
    dist.destroy_process_group()


def _train_cell(rank: int, world_size: int, folder: Path, cell: Cell) -> list[Any]:
    data = module(folder, rank, world_size, batch_size=cell.batch_size, num_workers=cell.workers)
    loader, seen = data.train_dataloader(), []
    for _ in range(cell.passes):
        for batch in loader:
            # Each step is a collective, as training's is: ranks that disagree about their number never get past it.
            steps = [torch.zeros(1, dtype=torch.long) for _ in range(world_size)]
            dist.all_gather(steps, torch.tensor([len(seen)]))
            assert torch.cat(steps).tolist() == [len(seen)] * world_size
            seen.append(fingerprints(batch))
            data.trainer.global_step += 1
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, seen)
    return gathered


def run_ranks(world_size: int, shelves: dict[int, Path], cells: list[Cell], out: Path, deadline_s: float) -> list[Any]:
    context = warm.start_ranks(train_as_rank, (world_size, shelves, cells, out), world_size)
    end = time.monotonic() + deadline_s
    try:
        while not context.join(timeout=max(0.0, end - time.monotonic())):
            assert time.monotonic() < end, f"{world_size} ranks were not done with {cells} after {deadline_s} s"
    finally:
        for process in context.processes:
            process.kill()
    return json.loads(out.read_text())


def check_cell(cell: Cell, by_rank: list[list[list[list[int]]]], expected: list[Fingerprint]) -> None:
    assert [len(shares) for shares in by_rank] == [cell.num_steps] * len(by_rank), cell
    stream = [tuple(sample) for step in zip(*by_rank, strict=True) for share in step for sample in share]
    assert len(stream) == cell.num_steps * cell.batch_size
    for start in range(0, len(stream), NUM_SAMPLES):
        numbers = sorted(number for number, _, _ in stream[start : start + NUM_SAMPLES])
        is_whole = len(numbers) == NUM_SAMPLES
        assert numbers == list(range(NUM_SAMPLES)) if is_whole else len(set(numbers)) == len(numbers), cell
    assert stream == expected[: len(stream)], cell


def batchings(world_size: int) -> list[tuple[int, int]]:
    """(batch size, passes): one that does not divide the set and comes round after three epochs, within the fourth
    pass; and one that divides it or, where three ranks share it, leaves out one sample in a pass."""
    return [(60, 4), (999 if world_size == 3 else 250, 2)]


def corners_and_a_sample(world_size: int) -> list[Cell]:
    """The same cells in every run of the tests."""
    corner = {1: (50, 1), 2: (1, 2), 3: (50, 8)}[world_size]
    sample = random.Random(world_size).choice(list(product(NUM_SHARDS[1:3], NUM_WORKERS)))
    (small, many), (large, few) = batchings(world_size)
    return [Cell(*corner, small, many), Cell(*sample, large, few)]


def all_cells(world_size: int, shards: int) -> list[Cell]:
    return [Cell(shards, workers, *batching) for workers, batching in product(NUM_WORKERS, batchings(world_size))]


GROUPS = [
    pytest.param(
        ranks,
        corners_and_a_sample(ranks),
        id=f"{ranks} ranks, a sample",
        marks=pytest.mark.long if ranks == max(NUM_RANKS) else (),
    )
    for ranks in NUM_RANKS
] + [
    pytest.param(ranks, all_cells(ranks, shards), id=f"{ranks} ranks, {shards} shards", marks=pytest.mark.long)
    for ranks, shards in product(NUM_RANKS, NUM_SHARDS)
]


@pytest.mark.sample(1)
@pytest.mark.parametrize("world_size, cells", GROUPS)
def test_any_number_of_shards_workers_and_ranks_gives_every_sample_once_an_epoch_in_one_order(
    shelves, tmp_path, world_size, cells
):
    packed = {cell.shards: shelves[cell.shards] for cell in cells}
    results = run_ranks(world_size, packed, cells, tmp_path / "seen.json", deadline_s=900)
    assert len(results) == len(cells)
    for cell, by_rank in zip(cells, results, strict=True):
        assert len(by_rank) == world_size
        check_cell(cell, by_rank, expected_stream(shelves[cell.shards]))


def test_batches_fetched_ahead_are_not_counted_as_trained(shelves, monkeypatch):
    handed_out = []
    slice_of = SampleOrder.slice

    def watched_slice(order: SampleOrder, start: int, stop: int) -> list[tuple[int, int]]:
        handed_out.append(start // 10)
        return slice_of(order, start, stop)

    monkeypatch.setattr(SampleOrder, "slice", watched_slice)
    options = {"batch_size": 10, "num_workers": 4}
    data = module(shelves[7], **options)
    expected = [sample for sample, _, _ in expected_stream(shelves[7])]
    batches = iter(data.train_dataloader())
    for step in range(1, 4):
        next(batches)
        data.trainer.global_step = step
        assert data.state_dict()["step"] == step
    assert max(handed_out) >= 3 + 4  # at least one batch a worker is on its way
    resumed = module(shelves[7], **options)
    resumed.load_state_dict(data.state_dict())
    after = [number for number, _, _ in fingerprints(next(iter(resumed.train_dataloader())))]
    assert after == expected[30:40]


# ---------------------------------------------------------------------------------------------------------------------
# Killed and resumed

NUM_PAIRS, BATCH_SIZE = 100, 8  # 12 steps a pass, of which 4 samples are left over
STEPS, SAVE_EVERY = 45, 5
TWENTY = {  # rare ones first, as each takes a step of its own
    "between epochs": 1,
    "while validating": 2,
    "while saving": 4,
    "before saving": 3,
    "before the optimizer": 5,
    "before the step": 5,
}


class Recorder(Callback):
    """Notes the keys of every batch trained on, and ends one process without a word at one moment of one step."""

    def __init__(self, path: str, last_step: int = 0, moment: str = "", rank: int = 0) -> None:
        self.path, self.last_step, self.moment, self.rank = path, last_step, moment, rank

    def setup(self, trainer, pl_module, stage) -> None:
        self.is_the_one = trainer.global_rank == self.rank
        self.path = record_of(Path(self.path), trainer.global_rank)

    def _end_if(self, moment: str, step: int) -> None:
        if self.is_the_one and (moment, step) == (self.moment, self.last_step):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer, *args) -> None:
        self._end_if("before the step", trainer.global_step + 1)

    def on_before_optimizer_step(self, trainer, *args) -> None:
        self._end_if("before the optimizer", trainer.global_step + 1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps([trainer.global_step, batch.keys]) + "\n")
        self._end_if("before saving", trainer.global_step)

    def on_validation_batch_end(self, trainer, *args) -> None:
        self._end_if("while validating", trainer.global_step)

    def on_train_epoch_end(self, trainer, *args) -> None:
        self._end_if("between epochs", trainer.global_step)

    def on_save_checkpoint(self, trainer, *args) -> None:
        if self.is_the_one and (self.moment, self.last_step) == ("while saving", trainer.global_step):
            # The kernel ends the process in the write that passes a megabyte, a tenth of the checkpoint.
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def record_of(record: Path, rank: int) -> Path:
    return record.with_suffix(f".{rank}")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for part, count in (("train", NUM_PAIRS), ("val", 8)):
        write_pairs(folder / "src" / part, count, captions=2, size=(20, 16))
        pack_folder(folder / "src" / part, folder / part, samples_per_shard=15)
    return folder


def start_training(
    pairs: Path, run: Path, record: Path, *more: str, processes: int = 1, **until: Any
) -> subprocess.Popen[bytes]:
    recorder = {"class_path": f"{Recorder.__module__}.Recorder", "init_args": {"path": str(record), **until}}
    tower = {"width": 16, "layers": 1, "head_width": 8}
    settings = {
        "seed_everything": 3,
        "save_every_n_steps": SAVE_EVERY,
        "model": {
            "clip": {
                "embed_dim": 16,
                "vision": {**tower, "image_size": 16, "patch_size": 8},
                "text": {**tower, "context_length": 16},
            },
            "optimizer": {"lr": 0.01},
        },
        # Eight batches are fetched ahead, more than are trained on between checkpoints.
        "data": {
            "train": str(pairs / "train"),
            "val": str(pairs / "val"),
            "batch_size": BATCH_SIZE,
            "num_workers": 4 // processes,
            "augmentation": {"flip": 0.5},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": processes,
            "strategy": "auto" if processes == 1 else "ddp",
            "default_root_dir": str(run),
            "max_steps": STEPS,
            "log_every_n_steps": 1,
            "callbacks": [recorder],
        },
    }
    config = record.with_suffix(".json")  # JSON is YAML
    config.write_text(json.dumps(settings))
    path = os.pathsep.join(sys.path)
    with open(record.with_suffix(".log"), "wb") as log:
        return warm.Popen(
            [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(config), *more],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def ended(process: subprocess.Popen[bytes], record: Path, deadline_s: float = 900) -> int:
    try:
        return process.wait(deadline_s)
    finally:
        process.kill()
        with contextlib.suppress(FileNotFoundError):
            print(record.with_suffix(".log").read_text())


def trained(record: Path, rank: int = 0) -> list[tuple[int, list[str]]]:
    return [tuple(json.loads(line)) for line in record_of(record, rank).read_text().splitlines()]


def last_checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


@contextlib.contextmanager
def straight(pairs: Path, folder: Path, processes: int) -> Iterator[tuple[Path, Path, subprocess.Popen[bytes]]]:
    """A run that nobody stops: its folder, what it trains on, and its process, which need not be done yet."""
    run, record = folder / "straight", folder / "straight.jsonl"
    process = start_training(pairs, run, record, processes=processes)
    try:
        yield run, record, process
    finally:
        process.kill()
        process.wait()


def points(seed: int, moments: dict[str, int]) -> list[tuple[int, str]]:
    """So many steps for each moment, in order, at which it comes; none before the first checkpoint."""
    draw = random.Random(seed)
    epoch = NUM_PAIRS // BATCH_SIZE
    every = {"while saving": SAVE_EVERY, "while validating": epoch, "between epochs": epoch}
    out: dict[int, str] = {}
    for moment, count in moments.items():
        steps = [n for n in range(SAVE_EVERY + 1, STEPS) if n % every.get(moment, 1) == 0 and n not in out]
        out |= dict.fromkeys(draw.sample(steps, count), moment)
    return sorted(out.items())


FEW = {"while saving": 1, "before the optimizer": 1}


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    "processes, kills",
    [
        (1, points(7, FEW)),
        pytest.param(2, points(5, {"before the optimizer": 1}), marks=pytest.mark.long),
        pytest.param(1, points(1, TWENTY), marks=pytest.mark.long),
        pytest.param(2, points(2, TWENTY), marks=pytest.mark.long),
    ],
    ids=["twice", "two processes, once", "twenty times", "two processes, twenty times"],
)
def test_a_killed_run_goes_on_with_the_same_samples_to_the_same_bits(pairs, tmp_path, processes, kills):
    with straight(pairs, tmp_path, processes) as (whole_run, whole_record, whole):
        killed_and_resumed(pairs, tmp_path, processes, kills)
        assert ended(whole, whole_record) == 0
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]

    records = [tmp_path / f"{number}.jsonl" for number in range(len(kills) + 1)]
    expected = [dict(trained(whole_record, rank)) for rank in range(processes)]
    assert [list(keys) for keys in expected] == [list(range(1, STEPS + 1))] * processes
    samples = [key for step in range(1, STEPS + 1) for keys in expected for key in keys[step]]
    for epoch in range(len(samples) // NUM_PAIRS):
        assert len(set(samples[epoch * NUM_PAIRS : (epoch + 1) * NUM_PAIRS])) == NUM_PAIRS
    start = 0
    for (step, moment), record in zip([*kills, (STEPS, "")], records, strict=True):
        for rank in range(processes):
            found = trained(record, rank) if record_of(record, rank).exists() else []
            is_done = not moment.startswith("before the")
            steps = list(range(start + 1, step + is_done))
            if processes > 1 and moment:  # the one that was not killed ends wherever it notices
                assert [n for n, _ in found] == list(range(start + 1, start + 1 + len(found)))
                assert len(found) <= len(steps) + 1
            else:
                assert [n for n, _ in found] == steps, (step, moment)
            assert found == [(n, expected[rank][n]) for n, _ in found], (step, moment)
        start = (step - 1) // SAVE_EVERY * SAVE_EVERY

    left, right = last_checkpoint(whole_run), last_checkpoint(tmp_path / "run")
    assert left["global_step"] == right["global_step"] == STEPS
    assert left["state_dict"].keys() == right["state_dict"].keys()
    for name, tensor in left["state_dict"].items():
        assert torch.equal(tensor, right["state_dict"][name]), name


def killed_and_resumed(pairs: Path, folder: Path, processes: int, kills: list[tuple[int, str]]) -> None:
    """Until the run is done. No checkpoint is ever found that can't be read."""
    run = folder / "run"
    for number, (step, moment) in enumerate([*kills, (STEPS, "")]):
        record = folder / f"{number}.jsonl"
        rank = 0 if moment == "while saving" else number % processes  # the one that writes
        more = ["--ckpt_path", "last"] if number else []
        options = {"processes": processes, "last_step": step, "moment": moment, "rank": rank}
        process = start_training(pairs, run, record, *more, **options)
        status = ended(process, record)
        if rank == 0 or not moment:
            assert status == (0 if not moment else -signal.SIGXFSZ if moment == "while saving" else -signal.SIGKILL)
        else:
            assert status != 0
        for checkpoint in (run / "checkpoints").glob("*.ckpt"):
            assert torch.load(checkpoint, weights_only=True)["state_dict"], checkpoint
        # Of the trained step: every moment comes before that step's own checkpoint is in place.
        saved = (step - 1) // SAVE_EVERY * SAVE_EVERY if moment else STEPS
        assert last_checkpoint(run)["global_step"] == saved, (step, moment)


# ---------------------------------------------------------------------------------------------------------------------
# Large sets, by their counts alone


class WatchedOrder(SampleOrder):
    """Counts the blocks that are shuffled."""

    def __init__(self, counts: np.ndarray, seed: int) -> None:
        self.blocks_made: list[tuple[int, int]] = []
        super().__init__(counts, seed)

    def _make_block(self, epoch: int, block: int) -> np.ndarray:
        self.blocks_made.append((epoch, block))
        return super()._make_block(epoch, block)


MILLION = np.full(100, 10_000)


@pytest.mark.parametrize("step", [400, 4_000 + 400, 400_000 + 400], ids=["epoch 0", "epoch 1", "epoch 100"])
def test_skipping_100_000_samples_makes_one_block_and_takes_under_3_s_of_a_processor(step):
    order = WatchedOrder(MILLION, seed=0)
    sampler = BatchSampler(order, 250, lambda: step)
    begin = time.process_time()
    first = next(iter(sampler))
    seconds = time.process_time() - begin
    assert len(first) == 250
    assert {epoch for epoch, _ in first} == {step // 4000}
    assert order.blocks_made == [(step // 4000, 1)]  # blocks are of 100,000 samples: the second of the epoch
    assert seconds < 3


@pytest.mark.parametrize("world_size", [1, 2, 5, 10])
def test_another_number_of_ranks_goes_on_from_the_same_place(world_size):
    walked = iter(BatchSampler(SampleOrder(MILLION, seed=0), 250, lambda: 0, rank=0, world_size=1))
    whole = [next(walked) for _ in range(403)]
    assert len({place for batch in whole for place in batch}) == 403 * 250
    ranks = [
        iter(BatchSampler(SampleOrder(MILLION, seed=0), 250, lambda: 400, rank, world_size))
        for rank in range(world_size)
    ]
    for batch in whole[400:]:
        shares = [next(rank) for rank in ranks]
        assert {len(share) for share in shares} == {250 // world_size}
        assert [place for share in shares for place in share] == batch


BILLION = np.random.default_rng(0).integers(9_000, 11_001, 100_000)


def test_the_plan_of_a_billion_samples_takes_seconds_and_under_100_mb():
    places = [0, 123_456_789, 999_000_000, 10**9 + 5, 37 * 10**9]  # four epochs
    begin = time.process_time()
    SampleOrder(BILLION, seed=0).slice(0, 4096)
    assert time.process_time() - begin < 5
    tracemalloc.start()
    try:
        order = SampleOrder(BILLION, seed=0)
        for place in places:
            assert len(order.slice(place, place + 4096)) == 4096
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6


@pytest.mark.parametrize("start", [0, 1, 123_456_789, 500_000_001, 999_000_000])
def test_a_slice_of_a_billion_samples_is_whole_blocks_without_a_repeat(start):
    """Three blocks' length: shards come whole, close together and mixed, from wherever the slice begins."""
    order = SampleOrder(BILLION, seed=0)
    assert order.num_samples == BILLION.sum() > 999e6
    window = order.slice(start, start + 330_000)
    assert {epoch for epoch, _ in window} == {0}
    samples = np.array([sample for _, sample in window])
    assert len(np.unique(samples)) == 330_000
    assert 0 <= samples.min() <= samples.max() < order.num_samples
    shards = np.searchsorted(np.cumsum(BILLION), samples, side="right")
    num_whole = 0
    for shard in np.unique(shards):
        (places,) = np.nonzero(shards == shard)
        assert places[-1] - places[0] < 100_000 + BILLION.max()  # a block, which the last of its shards overhangs
        if len(places) == BILLION[shard]:
            num_whole += 1
            assert places[-1] - places[0] > 50_000
    assert num_whole >= 18  # two blocks at least lie within the window
    for cut in (1, 777, 111_111, 329_990):
        assert SampleOrder(BILLION, seed=0).slice(start + cut, start + cut + 10) == window[cut : cut + 10]


def test_a_slice_across_the_end_of_an_epoch_of_a_billion_ends_one_and_begins_the_next():
    order = SampleOrder(BILLION, seed=0)
    end = order.num_samples
    window = order.slice(end - 1000, end + 1000)
    assert [epoch for epoch, _ in window] == [0] * 1000 + [1] * 1000
    assert window[1000:] == order.slice(end, end + 1000)
    assert len({sample for _, sample in window[:1000]}) == len({sample for _, sample in window[1000:]}) == 1000
