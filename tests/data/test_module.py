"""Shards in, batches out: every sample once an epoch, and the same batches however many processes make them."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import sys
import tarfile
import threading
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import pack_folder, picture, trainer_at, write_pairs, write_picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from miniclip import tokenizer
from miniclip.data.augmentation import Augmentation
from miniclip.data.indexing.index_tars import index_shards
from miniclip.data.module import PairDataModule
from miniclip.data.open_pairs import open_pairs
from miniclip.data.pack import pack
from miniclip.data.pairs import Batch, CaptionChoice, PairDataset
from miniclip.data.sample_files import Packing
from miniclip.data.sampling.order import BatchSampler, Mixture, SampleOrder
from miniclip.data.shards import Shards
from miniclip.data.sources import read_pairs
from miniclip.images import Preprocess
from miniclip.tokenizer import END_OF_TEXT, START_OF_TEXT

LAYOUTS = [
    [7],
    [1],
    [3, 4, 5],
    [10, 10, 10, 10],
    [1, 1, 1, 1, 1, 1],
    [0, 5, 0, 0, 9, 0],
    [25, 1, 1, 30, 2],
    [13, 0],
]
BLOCKS = [1, 10, 10**9]


def epoch_of(order: SampleOrder, epoch: int) -> list[int]:
    places = order.slice(epoch * order.num_samples, (epoch + 1) * order.num_samples)
    assert {number for number, _ in places} == {epoch}
    return [sample for _, sample in places]


# ---------------------------------------------------------------------------------------------------------------------
# The order of samples


@pytest.mark.parametrize("block_samples", BLOCKS)
@pytest.mark.parametrize("counts", LAYOUTS, ids=str)
def test_every_epoch_is_every_sample_once(counts, block_samples):
    order = SampleOrder(np.array(counts), seed=3, block_samples=block_samples)
    assert order.num_samples == sum(counts)
    for epoch in (0, 1, 2, 1000):
        assert sorted(epoch_of(order, epoch)) == list(range(sum(counts)))


shard_counts = st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda counts: sum(counts) > 0)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(shard_counts, st.sampled_from([1, 2, 10, 10**9]), st.integers(0, 5), st.data())
def test_slices_cut_anywhere_are_parts_of_the_one_sequence(counts, block_samples, seed, data):
    total = 3 * sum(counts)
    whole = SampleOrder(np.array(counts), seed, block_samples).slice(0, total)
    cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=6))})
    order = SampleOrder(np.array(counts), seed, block_samples)
    parts = [order.slice(start, stop) for start, stop in pairwise(cuts)]
    assert [len(part) for part in parts] == np.diff(cuts).tolist()
    assert [place for part in parts for place in part] == whole
    for epoch in range(3):
        assert sorted(sample for number, sample in whole if number == epoch) == list(range(sum(counts)))


def test_an_empty_slice_holds_nothing():
    assert SampleOrder(np.array([5]), 0).slice(3, 3) == []


@pytest.mark.parametrize("block_samples", BLOCKS)
def test_the_order_depends_on_seed_and_epoch_alone(block_samples):
    counts = np.array([20, 30, 10, 40])
    order = SampleOrder(counts, 0, block_samples)
    first = epoch_of(order, 5)
    assert epoch_of(SampleOrder(counts, 0, block_samples), 5) == first
    assert epoch_of(order, 5) == first
    assert epoch_of(order, 6) != first
    assert epoch_of(SampleOrder(counts, 1, block_samples), 5) != first


def test_one_block_mixes_the_samples_of_all_shards():
    order = SampleOrder(np.array([100, 100, 100, 100]), 0)
    shards_of_first_quarter = Counter(sample // 100 for sample in epoch_of(order, 0)[:100])
    assert min(shards_of_first_quarter[shard] for shard in range(4)) >= 10  # 25 expected


def test_small_blocks_keep_each_shard_together_but_shuffled():
    order = SampleOrder(np.array([50, 50, 50]), 0, block_samples=1)
    samples = epoch_of(order, 0)
    for start in range(0, 150, 50):
        part = samples[start : start + 50]
        assert len({sample // 50 for sample in part}) == 1
        assert part != sorted(part)


def test_each_sample_is_as_likely_to_come_first_as_any_other():
    order = SampleOrder(np.array([3, 2, 5]), 0)
    firsts = Counter(order.slice(10 * epoch, 10 * epoch + 1)[0][1] for epoch in range(2000))
    assert min(firsts[sample] for sample in range(10)) > 140  # 200 expected, deviation 13
    assert max(firsts.values()) < 260


# ---------------------------------------------------------------------------------------------------------------------
# Batches


class Training:
    """Lightning as the sampler sees it: epochs of the sampler's length, and a step that counts batches."""

    def __init__(self, step: int = 0) -> None:
        self.step = step

    def epochs(self, sampler: BatchSampler, count: int) -> list[list[tuple[int, int]]]:
        batches = []
        for _ in range(count):
            for batch in sampler:
                batches.append(batch)
                self.step += 1
        return batches


def sampler_at(order: SampleOrder, batch_size: int, step: int = 0, rank: int = 0, world_size: int = 1):
    training = Training(step)
    return training, BatchSampler(order, batch_size, lambda: training.step, rank, world_size)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 11, 22, 23])
def test_batches_over_several_epochs_are_the_one_sequence_without_gap_or_repeat(batch_size):
    counts = [7, 0, 11, 5]
    order = SampleOrder(np.array(counts), 0, block_samples=10)
    training, sampler = sampler_at(order, batch_size)
    batches = training.epochs(sampler, 8)
    assert len(batches) == 8 * len(sampler) == 8 * (23 // batch_size)
    assert {len(batch) for batch in batches} == {batch_size}
    stream = [place for batch in batches for place in batch]
    assert stream == order.slice(0, len(stream))
    for epoch in range(len(stream) // 23):
        assert sorted(sample for number, sample in stream if number == epoch) == list(range(23))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_each_batch_in_order(world_size):
    order = SampleOrder(np.array([30, 17, 20]), 1)
    training, sampler = sampler_at(order, 12)
    whole = training.epochs(sampler, 3)
    shares = []
    for rank in range(world_size):
        training, sampler = sampler_at(order, 12, 0, rank, world_size)
        shares.append(training.epochs(sampler, 3))
        assert len(sampler) == 67 // 12
    for number, batch in enumerate(whole):
        parts = [share[number] for share in shares]
        assert {len(part) for part in parts} == {12 // world_size}
        assert [place for part in parts for place in part] == batch


def test_resuming_at_any_step_gives_the_rest_of_the_same_batches():
    order = SampleOrder(np.array([9, 14]), 0)
    training, sampler = sampler_at(order, 5)
    whole = training.epochs(sampler, 3)
    assert len(whole) == 12
    for step in range(12):
        training, sampler = sampler_at(order, 5, step)
        rest = training.epochs(sampler, 3 - step // 4)
        assert rest == whole[step:]


def test_a_batch_that_the_data_cannot_fill_is_refused_with_both_numbers():
    order = SampleOrder(np.array([9, 14]), 0)
    assert len(BatchSampler(order, 23, lambda: 0)) == 1
    with pytest.raises(ValueError, match=r"batch_size is 24 and the training set has 23 samples"):
        BatchSampler(order, 24, lambda: 0)


def test_a_batch_that_the_ranks_cannot_share_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="batch_size is 10, which 4 ranks can't share evenly"):
        BatchSampler(SampleOrder(np.array([23]), 0), 10, lambda: 0, 0, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Samples


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """22 pictures with 1 to 3 captions each in shards of 8, not to be changed."""
    folder = tmp_path_factory.mktemp("shelf")
    for number in range(22):
        suffix = ("png", "jpg", "webp")[number % 3]
        path = write_picture(folder / "src" / f"{number:02d}.{suffix}", number, size=(20 + number, 30))
        path.with_suffix(".txt").write_text("\n".join(caption(number, line) for line in range(1 + number % 3)))
    pack_folder(folder / "src", folder / "out", samples_per_shard=8)
    return folder / "out"


@pytest.fixture
def copy(tmp_path) -> Path:
    """Six samples in shards of 3, to be damaged."""
    pack_folder(write_pairs(tmp_path / "src", 6), tmp_path / "copy", samples_per_shard=3)
    return tmp_path / "copy"


def caption(number: int, line: int) -> str:
    return " ".join(["red", "green", "blue", "round", "square"][: 1 + (number + line) % 5]) + f" {number} {line}"


def module(folder: Path | list[str], step: int = 0, rank: int = 0, world_size: int = 1, **options) -> PairDataModule:
    options = {"batch_size": 4, "num_workers": 0, "image_size": 16, "context_length": 16, **options}
    out = PairDataModule(folder if isinstance(folder, list) else str(folder), **options)
    out.trainer = trainer_at(step, rank, world_size)
    out.prepare_data()
    out.setup("fit")
    return out


def train_batches(data: PairDataModule, epochs: int = 1) -> list[Batch]:
    """What the trainer would see, stepping after each batch."""
    loader = data.train_dataloader()
    batches = []
    for _ in range(epochs):
        for batch in loader:
            batches.append(batch)
            data.trainer.global_step += 1
    return batches


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.tokens, b.tokens)
        assert a.keys == b.keys
        assert (a.mask is None) == (b.mask is None)
        assert a.mask is None or torch.equal(a.mask, b.mask)
        assert (a.problems, a.num_truncated) == (b.problems, b.num_truncated)


def test_a_batch_is_uint8_pictures_and_texts_no_longer_than_the_longest(shelf):
    for batch in train_batches(module(shelf)):
        assert batch.images.shape == (4, 3, 16, 16)
        assert batch.images.dtype == torch.uint8
        assert batch.tokens.dtype == torch.int64
        lengths = []
        for row in batch.tokens.tolist():
            end = row.index(END_OF_TEXT)
            assert row[0] == START_OF_TEXT
            assert not any(row[end + 1 :])
            lengths.append(end + 1)
        assert batch.tokens.shape == (4, max(lengths))
        assert (batch.mask, batch.problems, batch.num_truncated) == (None, [], 0)


def numbers_of(batch: Batch) -> list[int]:
    """Sample numbers by their keys, "00001.tar:000000009"."""
    return [int(key.split(":")[1]) for key in batch.keys]


def test_tokens_are_those_of_one_of_the_samples_captions(shelf):
    shards = Shards(shelf)
    for batch in train_batches(module(shelf), epochs=2):
        for number, row in zip(numbers_of(batch), batch.tokens, strict=True):
            allowed = tokenizer.tokenize(list(shards[number].captions), context_length=16)
            assert row.tolist() in allowed[:, : len(row)].tolist()


def test_over_many_epochs_every_caption_gets_its_turn_and_first_takes_the_first(shelf):
    def seen(captions: str) -> dict[int, Counter[str]]:
        dataset = PairDataset(Shards(shelf), 16, 16, None, CaptionChoice(captions), 0)
        return {
            number: Counter(tokenizer.decode(dataset[epoch, number].texts[0][1:-1]).strip() for epoch in range(90))
            for number in (2, 5)
        }

    for number, counts in seen("random").items():
        assert set(counts) == {caption(number, line) for line in range(3)}
        assert min(counts.values()) >= 15  # 30 expected
    for number, counts in seen("first").items():
        assert set(counts) == {caption(number, 0)}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("num_workers", [1, 3])
def test_worker_processes_change_no_pixel_and_no_caption(shelf, num_workers):
    options = {"augmentation": Augmentation(scale=(0.3, 1.0), flip=0.5), "seed": 5}
    alone = train_batches(module(shelf, **options), epochs=2)
    assert len(alone) == 10
    assert_same(train_batches(module(shelf, num_workers=num_workers, **options), epochs=2), alone)


def test_ranks_change_no_pixel_and_no_caption(shelf):
    alone = train_batches(module(shelf))
    shares = [train_batches(module(shelf, rank=rank, world_size=2)) for rank in range(2)]
    for number, batch in enumerate(alone):
        parts = [share[number] for share in shares]
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert [key for part in parts for key in part.keys] == batch.keys


def test_a_loader_resumed_in_the_middle_gives_the_rest_of_the_same_batches(shelf):
    whole = train_batches(module(shelf), epochs=2)
    assert_same(train_batches(module(shelf, step=3, num_workers=1), epochs=2), whole[3:])


def test_another_seed_gives_other_batches(shelf):
    first, second = (train_batches(module(shelf, seed=seed)) for seed in (0, 1))
    assert [batch.keys for batch in first] != [batch.keys for batch in second]


def test_augmentation_differs_between_epochs_and_repeats_within_one(shelf):
    dataset = PairDataset(Shards(shelf), 16, 16, Augmentation(scale=(0.3, 1.0)), CaptionChoice("first"), 0)
    for number in range(5):
        assert torch.equal(dataset[0, number].image, dataset[0, number].image)
        assert not torch.equal(dataset[0, number].image, dataset[1, number].image)


def test_a_dataset_travels_to_a_spawned_worker(shelf):
    dataset = PairDataset(Shards(shelf), 16, 16, Augmentation(), CaptionChoice(), 0)
    sample = dataset[0, 3]
    twin = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(twin[0, 3].image, sample.image)
    assert twin[0, 3].texts == sample.texts


# START + n words + END, in a context of 16 tokens
@pytest.mark.parametrize("num_words, is_cut", [(13, False), (14, False), (15, True), (60, True)])
def test_a_text_past_the_context_is_cut_before_its_end_token_and_counted(tmp_path, num_words, is_cut):
    source = write_pairs(tmp_path / "src", 4)
    (source / "0002.txt").write_text("cat " * num_words)
    pack_folder(source, tmp_path / "out")
    (batch,) = train_batches(module(tmp_path / "out"))
    assert batch.num_truncated == int(is_cut)
    row = batch.tokens[numbers_of(batch).index(2)].tolist()
    (cat,) = tokenizer.encode("cat")
    expected = [START_OF_TEXT, *[cat] * min(num_words, 14), END_OF_TEXT]
    assert row == expected + [0] * (len(row) - len(expected))


# ---------------------------------------------------------------------------------------------------------------------
# Holes


def overwrite(folder: Path, number: int, per_shard: int = 3) -> str:
    """Fills the picture of a sample with rubbish, where it lies in its tar; its name in messages."""
    tar = folder / f"{number // per_shard:05d}.tar"
    with np.load(tar.with_suffix(".npz")) as arrays:
        offset, size = arrays["image"][number % per_shard]
    with open(tar, "r+b") as file:
        file.seek(offset)
        file.write(b"rubbish" * (size // 7))
    return f"{tar.name}:{number:09d}"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_picture_leaves_a_hole_and_changes_no_other_sample(copy, num_workers):
    options = {"batch_size": 6, "num_workers": num_workers}
    (before,) = train_batches(module(copy, **options))
    assert before.mask is None
    key = overwrite(copy, 4)
    (after,) = train_batches(module(copy, **options))
    hole = numbers_of(before).index(4)
    assert after.keys == before.keys
    assert after.keys[hole] == key
    assert after.mask.tolist() == [place != hole for place in range(6)]
    assert after.images.shape == before.images.shape
    assert torch.equal(after.images[after.mask], before.images[after.mask])
    assert not after.images[hole].any()
    healthy = after.tokens[after.mask]
    assert torch.equal(healthy, before.tokens[after.mask][:, : healthy.shape[1]])
    assert after.tokens[hole].tolist() == [START_OF_TEXT, END_OF_TEXT] + [0] * (healthy.shape[1] - 2)
    (problem,) = after.problems
    assert problem.startswith(f"{key}: ")


def test_a_batch_of_holes_alone_keeps_its_shape(copy):
    for number in range(6):
        overwrite(copy, number)
    (batch,) = train_batches(module(copy, batch_size=6))
    assert batch.images.shape == (6, 3, 16, 16)
    assert batch.tokens.tolist() == [[START_OF_TEXT, END_OF_TEXT]] * 6
    assert not batch.mask.any()
    assert len(batch.problems) == 6


@pytest.mark.parametrize("damage", ["tar gone", "tar empty", "offsets cut", "offsets gone"])
def test_a_damaged_shard_leaves_holes_and_never_stops_the_loader(copy, damage):
    path = copy / ("00001.tar" if "tar" in damage else "00001.npz")
    if "gone" in damage:
        path.unlink()
    else:
        path.write_bytes(b"" if "empty" in damage else path.read_bytes()[:200])
    (batch,) = train_batches(module(copy, batch_size=6))
    assert int(batch.mask.sum()) == 3
    assert len(batch.problems) == 3
    assert all("00001" in problem for problem in batch.problems)


KINDS = {
    "grey.png": ("L", {}),
    "grey and alpha.png": ("LA", {}),
    "palette.png": ("P", {}),
    "transparent palette.png": ("P", {"transparency": 3}),
    "alpha.png": ("RGBA", {}),
    "two colours.png": ("1", {}),
    "sixteen bits.png": ("I;16", {}),
    "grey.jpg": ("L", {}),
    "progressive.jpg": ("RGB", {"progressive": True}),
    "four inks.jpg": ("CMYK", {}),
    "lossless.webp": ("RGB", {"lossless": True}),
    "alpha.webp": ("RGBA", {}),
    "animated.webp": ("RGB", {"save_all": True, "append_images": [picture(9, (20, 20))]}),
    "animated.gif": ("RGB", {"save_all": True, "append_images": [picture(9, (20, 20))]}),
    "animated.png": ("RGB", {"save_all": True, "append_images": [picture(9, (20, 20))]}),
    "float.tif": ("F", {}),
    "sixteen bits.tif": ("I;16", {}),
    "camera.jpg": ("RGB", {"format": "MPO", "save_all": True, "append_images": [picture(9, (20, 20))]}),
}


def write_kind(path: Path, mode: str, options: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode == "I;16":
        deep = np.asarray(picture(1, (20, 20), "L")).astype(np.uint16) * 257
        Image.fromarray(deep).save(path, **options)
    else:
        write_picture(path, 1, (20, 20), mode, **options)
    path.with_suffix(".txt").write_text("words")


@pytest.mark.parametrize("kind", KINDS)
def test_what_packing_accepts_training_can_decode_beside_other_pictures(tmp_path, kind):
    source = write_pairs(tmp_path / "src", 3)
    write_kind(source / kind, *KINDS[kind])
    assert pack_folder(source, tmp_path / "out").kept == 4
    (batch,) = train_batches(module(tmp_path / "out"))
    assert batch.problems == []
    assert batch.images.dtype == torch.uint8
    brightness = batch.images.float().mean((1, 2, 3))  # of noise, not of black or white, however many bits there were
    assert 60 < float(brightness.min()) < float(brightness.max()) < 200


@pytest.mark.parametrize("kind", KINDS)
def test_training_without_a_crop_and_evaluation_see_the_same_picture(tmp_path, kind):
    """But for rounding. Palettes too: both resize them with nearest neighbours, as OpenAI's models saw it."""
    write_kind(tmp_path / "src" / kind, *KINDS[kind])
    pack_folder(tmp_path / "src", tmp_path / "out")
    shards = Shards(tmp_path / "out")
    training = PairDataset(shards, 16, 16, Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0)), CaptionChoice("first"), 0)[
        0, 0
    ]
    evaluation = PairDataset(shards, 16, 16, None, CaptionChoice("first"), 0)[0, 0]
    assert (training.problem, evaluation.problem) == (None, None)
    assert float((training.image.float() - evaluation.image.float()).abs().mean()) < 2


# ---------------------------------------------------------------------------------------------------------------------
# Held-out data


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("batch_size", [4, 11, 22, 300])
def test_validation_sees_each_held_out_sample_once_in_order_exactly_preprocessed(shelf, batch_size, num_workers):
    data = module(shelf, val=str(shelf), batch_size=batch_size, num_workers=num_workers)
    batches = list(data.val_dataloader())
    assert [number for batch in batches for number in numbers_of(batch)] == list(range(22))
    assert {len(batch.keys) for batch in batches[:-1]} <= {batch_size}
    shards, preprocess = Shards(shelf), Preprocess(16, (0, 0, 0), (1, 1, 1))
    images = torch.cat([batch.images for batch in batches])
    texts = [row[: row.tolist().index(END_OF_TEXT) + 1].tolist() for batch in batches for row in batch.tokens]
    for number, record in enumerate(shards):
        with Image.open(io.BytesIO(record.image)) as image:
            assert torch.equal(images[number], preprocess.crop(image))
        assert texts[number] == tokenizer.encode_for_model(record.captions[0])


def test_validation_is_the_same_every_time(shelf):
    data = module(shelf, val=str(shelf))
    assert_same(list(data.val_dataloader()), list(data.val_dataloader()))


def test_an_unreadable_held_out_sample_is_a_hole_with_its_name(copy):
    key = overwrite(copy, 1)
    (batch,) = module(copy, val=str(copy), batch_size=6).val_dataloader()
    assert batch.mask.tolist() == [True, False, True, True, True, True]
    (problem,) = batch.problems
    assert problem.startswith(f"{key}: ")
    assert "image" in problem


def test_without_held_out_data_there_is_nothing_to_validate(shelf):
    assert module(shelf).val_dataloader() == []


# ---------------------------------------------------------------------------------------------------------------------
# The module


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_folder_that_holds_no_shards_is_named(shelf, tmp_path, part):
    folders = {"train": str(shelf), "val": str(shelf), part: str(tmp_path / "nowhere")}
    with pytest.raises(ValueError, match="nowhere is not a folder of shards"):
        PairDataModule(**folders, batch_size=4).setup("fit")


def test_a_batch_of_one_is_refused(shelf):
    with pytest.raises(ValueError, match=r"data\.batch_size is 1; contrastive training needs at least two"):
        PairDataModule(str(shelf), batch_size=1)


def test_a_single_pair_is_neither_trained_on_nor_validated(shelf, tmp_path):
    pack_folder(write_pairs(tmp_path / "src", 1), tmp_path / "one")
    with pytest.raises(ValueError, match="training set has 1 sample; contrastive training needs at least two"):
        module(tmp_path / "one").train_dataloader()
    with pytest.raises(ValueError, match=r"data\.val has 1 pair; .* at least two"):
        module(shelf, val=str(tmp_path / "one"))


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_empty_name_is_not_the_current_folder(shelf, part):
    with pytest.raises(ValueError, match=rf"data\.{part} is ''; name a folder, file or pattern, as '\.'"):
        PairDataModule(**{"train": str(shelf), part: ["", str(shelf)]})


def test_a_batch_larger_than_the_training_set_is_refused(shelf):
    with pytest.raises(ValueError, match="batch_size is 23 and the training set has 22 samples"):
        module(shelf, batch_size=23).train_dataloader()


def test_a_checkpoint_of_the_same_run_is_taken(shelf):
    state = module(shelf, seed=3).state_dict()
    told = {"order": "exact", "seed": 3, "batch_size": 4, "samples": 22, "weights": None, "step": 0}
    assert {name: state[name] for name in told} == told
    assert set(state) - set(told) == {"shards", "captions", "captions.per_image", "negatives", "augmentation"}
    module(shelf, seed=3).load_state_dict(state)


@pytest.mark.parametrize(
    "name, other", [("seed", 4), ("batch_size", 8), ("samples", 23), ("shards", "other"), ("captions", "x")]
)
def test_a_checkpoint_of_another_sequence_of_batches_is_refused_with_both_values(shelf, name, other):
    data = module(shelf)
    state = data.state_dict()
    with pytest.raises(
        ValueError, match=re.escape(f"trained with {name} {other}, this run has {state[name]}; go on with the same")
    ):
        data.load_state_dict({**state, name: other})


def test_rejected_pairs_leave_pictures_and_texts_together(tmp_path):
    source = write_pairs(tmp_path / "src", 5)
    (source / "0001.png").write_bytes(b"")
    pack(read_pairs(source), tmp_path / "out", source="src", packing=Packing(samples_per_shard=2))
    (batch,) = module(tmp_path / "out", val=str(tmp_path / "out")).val_dataloader()
    preprocess = Preprocess(16, (0, 0, 0), (1, 1, 1))
    assert len(batch.keys) == 4
    for number, image, row in zip((0, 2, 3, 4), batch.images, batch.tokens, strict=True):
        assert torch.equal(image, preprocess.crop(picture(number)))
        assert tokenizer.decode(row).startswith(f"<start_of_text>picture {number} ")


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures of several sources


def mixture(counts: list[list[int]], weights: list[float], seed: int = 0, period: int = 64) -> Mixture:
    orders = [SampleOrder(np.array(of_source), seed + n, block_samples=7) for n, of_source in enumerate(counts)]
    return Mixture(orders, weights, seed, period)


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_slices_of_a_mixture_cut_anywhere_are_parts_of_the_one_sequence(counts, seed, data):
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(counts), max_size=len(counts)))
    mixed = mixture(counts, weights, seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, 400), max_size=6)))
    parts = [mixed.slice(a, b) for a, b in zip([0, *cuts], [*cuts, 400], strict=True)]
    assert list(chain(*parts)) == mixture(counts, weights, seed).slice(0, 400)


def test_a_mixture_holds_its_proportions_and_each_source_its_own_passes():
    mixed = mixture([[30], [20, 20], [7]], [6, 3, 1], period=100)
    places = mixed.slice(0, 1000)
    source = np.searchsorted([30, 70], [sample for _, sample in places], side="right")
    assert np.bincount(source).tolist() == [600, 300, 100]
    for start in range(0, 1000, 100):
        assert np.abs(np.bincount(source[start : start + 100], minlength=3) - [60, 30, 10]).max() <= 1
    for number, (first, size) in enumerate([(0, 30), (30, 40), (70, 7)]):
        own = [place for place, which in zip(places, source, strict=True) if which == number]
        for epoch in range(len(own) // size):
            seen = own[epoch * size : (epoch + 1) * size]
            assert {e for e, _ in seen} == {epoch}
            assert sorted(sample for _, sample in seen) == list(range(first, first + size))


def test_a_mixture_is_shuffled_anew_in_each_period():
    places = mixture([[1000], [1000]], [1, 1], period=50).slice(0, 100)
    patterns = ["".join(str(int(sample >= 1000)) for _, sample in places[at : at + 50]) for at in (0, 50)]
    assert patterns[0] != patterns[1]
    assert "01" * 10 not in patterns[0]


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -2], [1, float("nan")], [1, float("inf")]])
def test_weights_that_are_no_proportions_are_refused(weights):
    with pytest.raises(ValueError, match=r"weights are .*; 2 sources need as many numbers above 0"):
        mixture([[3], [3]], weights)


def two_shelves(tmp_path, **options) -> PairDataModule:
    for name, count in (("a", 6), ("b", 10)):
        pack_folder(write_pairs(tmp_path / f"{name}-pairs", count), tmp_path / name, samples_per_shard=4)
    return module([str(tmp_path / "a"), str(tmp_path / "b")], **options)


def test_several_sources_without_weights_are_one_set_of_which_each_sample_comes_once(tmp_path):
    data = two_shelves(tmp_path)
    assert len(data.train_shards) == 16
    assert sorted(sample for _, sample in data.sample_order().slice(0, 16)) == list(range(16))
    assert data.describe() == "an epoch is 16 samples in 4 steps: each once"


def test_weights_mix_the_sources_and_the_log_says_how_often_each_sample_comes(tmp_path):
    data = two_shelves(tmp_path, weights=[3.0, 1.0])
    numbers = [sample for _, sample in data.sample_order().slice(0, 4096)]
    assert sum(number < 6 for number in numbers) == 3072
    assert f"{tmp_path / 'a'} 75.0% (2.00 times each of its 6)" in data.describe()
    assert f"{tmp_path / 'b'} 25.0% (0.40 times each of its 10)" in data.describe()
    assert len(train_batches(data)) == 4


def test_as_many_weights_as_sources_are_needed(shelf):
    with pytest.raises(ValueError, match=r"data\.weights has 2 numbers and data\.train 1 sources"):
        module(shelf, weights=[1.0, 2.0])


# ---------------------------------------------------------------------------------------------------------------------
# The choice of a caption

LINES = ("one", "two", "three")
FACTS = {"title": "named", "tags": ["red", "blue"], "blank": "", "number": 7}


def choices(choice: CaptionChoice, lines=LINES, facts=FACTS, draws: int = 600) -> Counter[str]:
    random = np.random.default_rng(0)
    return Counter(choice.choose(lines, lambda: facts, random) for _ in range(draws))


def test_a_caption_is_any_line_alike_or_the_first():
    assert all(150 <= count <= 250 for count in choices(CaptionChoice()).values())
    assert choices(CaptionChoice("first")) == {"one": 600}


def test_line_weights_draw_lines_by_weight_and_the_last_holds_for_further_lines():
    assert set(choices(CaptionChoice(line_weights=[1, 0]))) == {"one"}
    counts = choices(CaptionChoice(line_weights=[4, 1]))
    assert 350 <= counts["one"] <= 450
    assert 60 <= counts["two"] <= 140
    assert 60 <= counts["three"] <= 140
    assert choices(CaptionChoice(line_weights=[0, 1]), lines=("only",)) == {"only": 600}


def test_fields_of_the_json_are_drawn_by_weight_then_one_of_their_lines():
    counts = choices(CaptionChoice(fields={"txt": 1, "tags": 3}))
    assert 110 <= sum(counts[line] for line in LINES) <= 190
    assert 180 <= counts["red"] <= 270
    assert 180 <= counts["blue"] <= 270
    assert choices(CaptionChoice(fields={"number": 1})) == {"7": 600}


def test_fields_that_a_sample_lacks_are_passed_over_and_first_takes_the_first_there_is():
    assert choices(CaptionChoice(fields={"absent": 5, "blank": 5, "title": 1})) == {"named": 600}
    assert choices(CaptionChoice("first", fields={"blank": 1, "tags": 1, "title": 9})) == {"red": 600}
    with pytest.raises(ValueError, match="it has no caption: nothing in absent, blank"):
        choices(CaptionChoice(fields={"absent": 1, "blank": 1}))


def test_the_json_is_read_only_if_a_field_of_it_is_wanted():
    choice = CaptionChoice(fields={"txt": 1})
    assert choice.choose(LINES, lambda: pytest.fail("read"), np.random.default_rng(0)) in LINES


@pytest.mark.parametrize(
    "options",
    [{"order": "last"}, {"fields": {}}, {"fields": {"a": -1}}, {"line_weights": [0]}, {"line_weights": [float("nan")]}],
)
def test_a_choice_that_is_none_is_refused_naming_the_field(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"CaptionChoice.{name} is "):
        CaptionChoice(**options)


def test_captions_come_from_a_field_of_a_tables_row(tmp_path):
    write_picture(tmp_path / "a.png")
    (tmp_path / "pairs.csv").write_text("filepath,title,alt_text\na.png,shown,hidden\n")
    pack_folder(tmp_path / "pairs.csv", tmp_path / "out")
    dataset = PairDataset(Shards(tmp_path / "out"), 16, 16, None, CaptionChoice(fields={"alt_text": 1}), 0)
    assert dataset[0, 0].texts == [tokenizer.encode_for_model("hidden")]


# ---------------------------------------------------------------------------------------------------------------------
# Training on what is not packed yet; and on what does not come


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_what_is_not_packed_is_packed_into_the_cache_once_and_again_when_it_changes(
    tmp_path, monkeypatch, capsys, kind
):
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))
    source = folder = write_pairs(tmp_path / "pairs", 5)
    if kind == "table":
        source = folder / "pairs.csv"
        source.write_text("".join(["image,caption\n", *(f"{n:04d}.png,picture {n}\n" for n in range(5))]))

    def train() -> int:
        data = module(source)
        return len(data.train_shards)

    assert train() == 5
    assert f"Packing {source}" in capsys.readouterr().out
    assert train() == 5
    told = capsys.readouterr().out
    assert "Packing" not in told
    assert f"{source}: 5 pairs packed in {tmp_path / 'cache'}" in told
    if kind == "table":
        source.write_text("".join(["image,caption\n", *(f"{n:04d}.png,picture {n}\n" for n in range(4))]))
    else:
        (folder / "0004.png").unlink()
        (folder / "0004.txt").unlink()
    assert train() == 4
    assert f"Packing {source}" in capsys.readouterr().out


SPLITS = ("train", "val", "test", "train", "validation", "test", "train", "val")


def table_of_splits(kind: str, folder: Path) -> Path:
    """Pictures 0 to 7 with the splits above, of which the names of Parquet files tell as well."""
    rows = [{"image": f"{n:04d}.png", "caption": f"picture {n}", "split": split} for n, split in enumerate(SPLITS)]
    if kind == "csv":
        (folder / "a.csv").write_text("\n".join(["image,caption,split", *(",".join(row.values()) for row in rows)]))
        return folder / "a.csv"
    if kind == "karpathy":
        images = [
            {"filename": row["image"], "sentences": [{"raw": row["caption"]}], "split": row["split"]} for row in rows
        ]
        (folder / "a.json").write_text(json.dumps({"images": images}))
        return folder / "a.json"
    (folder / "parquet").mkdir()
    for name in ("train", "test", "validation"):
        meant = [row for row in rows if row["split"] == name or (name, row["split"]) == ("validation", "val")]
        pictures = [(folder / row["image"]).read_bytes() for row in meant]
        table = pa.table({"image": pictures, "caption": [row["caption"] for row in meant]})
        pq.write_table(table, folder / "parquet" / f"{name}-00000-of-00001.parquet")
    return folder / "parquet"


@pytest.mark.parametrize("kind", ["csv", "karpathy", "parquet"])
def test_a_table_that_names_its_splits_is_trained_on_and_validated_by_them(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))
    source = str(table_of_splits(kind, write_pairs(tmp_path / "pairs", len(SPLITS))))
    data = module(source, val=source, batch_size=2)
    found = [{shards[n].captions for n in range(len(shards))} for shards in (data.train_shards, data.val_shards)]
    assert found == [{(f"picture {n}",) for n in numbers} for numbers in ((0, 3, 6), (1, 4, 7))]
    assert data.trained_on() == []


def test_a_table_without_held_out_rows_is_no_validation(tmp_path, monkeypatch):
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))
    folder = write_pairs(tmp_path / "pairs", 4)
    rows = [f"{n:04d}.png,picture {n},{'test' if n == 3 else 'train'}" for n in range(4)]
    (folder / "a.csv").write_text("\n".join(["image,caption,split", *rows]))
    with pytest.raises(ValueError, match=r"no row whose column 'split' is 'val'; valid for --split are test, train"):
        module(str(folder / "a.csv"), val=str(folder / "a.csv"), batch_size=2)


@pytest.mark.parametrize("order", ["exact", "stream"])
def test_shards_that_are_trained_on_and_held_out_are_named(shelf, tmp_path, order):
    first = sorted(str(path) for path in shelf.glob("*.tar"))[0]
    shutil.copytree(shelf, tmp_path / "copy")
    data = module(shelf, val=[f"{shelf}/../{shelf.name}", str(tmp_path / "copy")], order=order)
    assert [Path(place).resolve() for place in data.trained_on()][:1] == [Path(first).resolve()]
    assert len(data.trained_on()) == len(list(shelf.glob("*.tar")))
    assert module(shelf, val=str(tmp_path / "copy"), order=order).trained_on() == []
    assert data.trained_on_twice() == []
    twice = module([str(shelf), first, str(tmp_path / "copy")], order=order).trained_on_twice()
    assert [Path(place).resolve() for place in twice] == [Path(first).resolve()]


@pytest.mark.parametrize(("part", "num_batches"), [("train", 5), ("val", 6)])  # a validation has the rest, too
def test_a_source_that_delivers_nothing_is_named(shelf, tmp_path, monkeypatch, part, num_batches):
    """Its tars are pipes, which can't be opened until somebody opens the other end."""
    folder = tmp_path / "shards"
    shutil.copytree(shelf, folder)
    for path in folder.glob("*.tar"):
        path.unlink()
        os.mkfifo(path)
    data = module(folder)
    data.val_shards = data.train_shards
    loader = getattr(data, f"{part}_dataloader")()
    loader.silence_s = 0.05
    is_told_twice = threading.Event()

    class Said(io.StringIO):
        def write(self, text: str) -> int:
            written = super().write(text)
            if self.getvalue().count("No batch has come for") >= 2:
                is_told_twice.set()
            return written

    said = Said()
    monkeypatch.setattr(sys, "stderr", said)

    def open_once_it_was_told_twice() -> None:
        is_told_twice.wait()
        for path in folder.glob("*.tar"):
            threading.Thread(target=path.write_bytes, args=[b""], daemon=True).start()

    threading.Thread(target=open_once_it_was_told_twice, daemon=True).start()
    assert len(list(loader)) == num_batches
    first = said.getvalue().splitlines()[0]
    assert re.match(r"No batch has come for \d+ s\. The next one needs ", first)
    assert str(folder / "0000") in first


def test_blank_lines_are_no_captions_and_runs_of_spaces_one(tmp_path):
    tar_of(tmp_path / "a.tar", {"1.jpg": jpeg(), "1.txt": b" \n\n two   words \n", "2.jpg": jpeg(), "2.txt": b"  \n"})
    index_shards(str(tmp_path))
    shards = Shards(tmp_path)
    assert [record.captions for record in shards] == [("two words",), ()]
    problem = PairDataset(shards, 16, 16, Augmentation(), CaptionChoice(), 0)[0, 1].problem
    assert "it has no caption" in problem


def test_a_sample_of_several_sources_is_named_with_its_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tar_of(tmp_path / name / "00000.tar", {"1.jpg": jpeg(), "1.txt": b"words", "2.jpg": b"", "2.txt": b"words"})
        index_shards(str(tmp_path / name))
    dataset = PairDataset(Shards([tmp_path / "a", tmp_path / "b"]), 16, 16, Augmentation(), CaptionChoice(), 0)
    assert [dataset[0, n].key for n in (1, 3)] == [f"{tmp_path / name / '00000.tar'}:2" for name in ("a", "b")]


def test_a_tar_that_was_replaced_after_indexing_gives_holes_and_not_other_bytes(tmp_path):
    tar_of(tmp_path / "a.tar", {"1.jpg": jpeg(), "1.txt": b"words"})
    index_shards(str(tmp_path))
    tar_of(tmp_path / "a.tar", {"0.txt": b"x" * 3000, "1.jpg": jpeg(), "1.txt": b"words"})
    with pytest.raises(ValueError, match="or it was replaced"):
        Shards(tmp_path)[0]


def test_offsets_that_were_replaced_are_refused(tmp_path):
    tar_of(tmp_path / "a.tar", {"1.jpg": jpeg(), "1.txt": b"words"})
    index_shards(str(tmp_path))
    index = (tmp_path / "index.json").read_bytes()
    tar_of(tmp_path / "a.tar", {"0.txt": b"x" * 3000, "1.jpg": jpeg(), "1.txt": b"words"})
    index_shards(str(tmp_path), overwrite=True)
    (tmp_path / "index.json").write_bytes(index)
    with pytest.raises(ValueError, match=r"a\.npz is damaged or gone \(it is not the one that index\.json"):
        Shards(tmp_path)[0]


def test_what_is_no_sample_in_a_tar_is_left_out_of_its_index(tmp_path):
    notes = {"README": b"hello", "info.json": b"{}", "._1.jpg": b"mac"}
    tar_of(tmp_path / "a.tar", {**notes, "1.jpg": jpeg(), "1.txt": b"words", "2.txt": b"no image"})
    index_shards(str(tmp_path))
    assert [record.key for record in Shards(tmp_path)] == ["1", "2"]


def test_overwriting_never_deletes_what_packing_did_not_write(tmp_path):
    tar_of(tmp_path / "raw" / "a.tar", {"1.jpg": jpeg(), "1.txt": b"words"})
    index_shards(str(tmp_path / "raw"))
    source = write_pairs(tmp_path / "pairs", 2)
    with pytest.raises(ValueError, match=r"raw holds what packing did not write, .*: a\.npz, a\.tar"):
        pack_folder(source, tmp_path / "raw", overwrite=True)
    pack_folder(source, tmp_path / "out")
    (tmp_path / "out" / "notes.md").write_text("a year's work")
    with pytest.raises(ValueError, match=r"it is not overwritten: notes\.md"):
        pack_folder(source, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "notes.md").unlink()
    assert pack_folder(source, tmp_path / "out", overwrite=True).kept == 2


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def jpeg() -> bytes:
    buffer = io.BytesIO()
    picture(0).save(buffer, "JPEG")
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Tars that are named by split


def write_named_tars(folder: Path, names: dict[str, int]) -> Path:
    """Tars of so many pairs, whose captions begin with the tar's name; without an index."""
    data = write_picture(folder / "x.png", 1).read_bytes()
    (folder / "x.png").unlink()
    for name, count in names.items():
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for number in range(count):
                for suffix, content in (("png", data), ("txt", f"{name} {number}".encode())):
                    info = tarfile.TarInfo(f"{name}_{number}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


TARS = {"cc-train-0000": 4, "cc-train-0001": 4, "cc-validation-0000": 3, "cc-test-0000": 2}


@pytest.mark.parametrize("order", ["exact", "stream"])
@pytest.mark.parametrize("is_indexed", [True, False])
def test_of_tars_that_are_named_by_split_training_takes_those_of_train(tmp_path, order, is_indexed):
    if order == "exact" and not is_indexed:
        return
    folder = write_named_tars(tmp_path / "cc", TARS)
    if is_indexed:
        index_shards(str(folder))
    validates = {"val": str(folder)} if is_indexed else {}
    data = PairDataModule(str(folder), batch_size=2, num_workers=0, image_size=16, order=order, **validates)
    data.trainer = trainer_at(0)
    data.trainer.max_steps = 4
    data.setup("fit")
    tars = data.train_stream.tars if data.train_stream else data.train_shards.entries
    assert [Path(tar.location).name for tar in tars] == ["cc-train-0000.tar", "cc-train-0001.tar"]
    assert "cc-validation-0000.tar" in data.describe()
    assert "cc-test-0000.tar" in data.describe()
    if is_indexed:
        assert data.epoch_samples() == 8
        assert [record.captions[0] for record in data.val_shards] == [f"cc-validation-0000 {n}" for n in range(3)]
        assert data.trained_on() == []


@pytest.mark.parametrize(
    ("names", "split", "taken"),
    [
        (TARS, None, ["cc-train-0000", "cc-train-0001"]),
        (TARS, "val", ["cc-validation-0000"]),
        (TARS, "test", ["cc-test-0000"]),
        ({"val-0": 2, "val-1": 2}, None, ["val-0", "val-1"]),  # one part is not several
        ({"val-0": 2, "val-1": 2}, "val", ["val-0", "val-1"]),
        ({"00000": 2, "00001": 2}, "train", ["00000", "00001"]),
        ({"laion-a-0": 2, "laion-b-0": 2}, None, ["laion-a-0", "laion-b-0"]),
        ({"cc3m-train-0": 2, "cc12m-0": 2, "yfcc-0": 2}, None, ["cc12m-0", "cc3m-train-0", "yfcc-0"]),
        ({"cc3m-train-0": 2, "cc12m-0": 2, "cc3m-val-0": 2}, None, ["cc12m-0", "cc3m-train-0"]),
        ({"00000": 2, "00001": 2, "val": 2}, None, ["00000", "00001"]),
        ({"00000": 2, "00001": 2, "val": 2}, "val", ["val"]),
        ({"training-0": 2, "train-1": 2}, None, ["train-1", "training-0"]),
    ],
)
def test_of_tars_that_are_named_by_split_one_is_packed(tmp_path, names, split, taken):
    index_shards(str(folder := write_named_tars(tmp_path / "cc", names)))
    pairs = open_pairs(str(folder), split=split)
    assert [pair.captions[0] for pair in pairs] == [f"{tar} {n}" for tar in taken for n in range(names[tar])]
    others = {each.source for each in pairs.left_out if each.reason == "a file of another split"}
    assert others == {f"{tar}.tar" for tar in names if tar not in taken}


def test_tars_of_no_such_split_are_refused_and_a_pattern_takes_what_it_names(tmp_path):
    index_shards(str(folder := write_named_tars(tmp_path / "cc", {"val-0": 2, "test-0": 2, "testA-0": 1})))
    with pytest.raises(ValueError, match=r"cc has no split 'train'; valid are .*val, .*/cc/\*\.tar is all"):
        open_pairs(str(folder))
    index_shards(str(words := write_named_tars(tmp_path / "words", {"dogs-0": 2, "dev-0": 2})))
    with pytest.raises(ValueError, match=r"words has no split 'train'; valid are dev, dogs"):
        open_pairs(str(words))
    with pytest.raises(ValueError, match=r"--split val can't be followed"):
        open_pairs(str(write_and_index(tmp_path / "numbered")), split="val")
    assert len(open_pairs(str(folder / "*.tar"))) == 5
    assert len(open_pairs(str(folder / "{val,test}-0.tar"))) == 4


def write_and_index(folder: Path) -> Path:
    index_shards(str(write_named_tars(folder, {"00000": 2, "00001": 1})))
    return folder
