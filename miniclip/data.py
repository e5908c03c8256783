"""Shards -> batches, exactly: each epoch is every sample once, in an order that depends on seed and epoch alone.

Training is one endless sequence of samples, epoch after epoch; batch number `n` is its n-th slice of `batch_size`.
So a batch is a pure function of (seed, n), whatever the number of workers and ranks, and a run resumed at step n goes
on with batch n. Augmentation and the choice of a caption draw from (seed, epoch, sample).

B batch, L text tokens, R side of an image in pixels.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import Preprocessing
from .shards import Shards
from .tokenizer import END_OF_TEXT, START_OF_TEXT, encode_for_model
from .transforms import Augmentation, Preprocess, decode_rgb, open_image


class Batch(NamedTuple):
    """What training and validation see.

    images: (B, 3, R, R) uint8. tokens: (B, L) int64, zero padded to the longest text. mask: (B,) bool, False where a
    sample could not be read, or None if all could. keys: names of the samples. problems: why, for those that could not.
    num_truncated: texts that were cut to the context length.
    """

    images: Tensor
    tokens: Tensor
    mask: Tensor | None
    keys: list[str]
    problems: list[str]
    num_truncated: int


class _Sample(NamedTuple):
    image: Tensor  # (3, R, R) uint8
    ids: list[int]
    key: str
    problem: str | None = None
    is_truncated: bool = False


class SampleOrder:
    """The endless sequence of (epoch, sample) that training goes through.

    Shards are shuffled, then the samples within blocks of consecutive shards, so that reading stays local on the
    disk and the plan of an epoch needs one number a shard.

    Args:
        counts: samples of each shard.
        block_samples: about how many are shuffled as one; whole shards, so more or less of them.
    """

    def __init__(self, counts: np.ndarray, seed: int, block_samples: int = 100_000) -> None:
        self.counts, self.seed, self.block_samples = np.asarray(counts), seed, block_samples
        self.starts = np.cumsum(self.counts) - self.counts
        self.num_samples = int(self.counts.sum())
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._block = lru_cache(maxsize=2)(self._make_block)

    def _make_plan(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The shards of each block of an epoch, and where the blocks end."""
        shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
        ends = np.cumsum(self.counts[shards])
        block_of_shard = (ends - self.counts[shards]) // self.block_samples
        blocks = np.split(shards, np.flatnonzero(np.diff(block_of_shard)) + 1)
        return blocks, np.cumsum([self.counts[block].sum() for block in blocks])

    def _make_block(self, epoch: int, block: int) -> np.ndarray:
        shards = self._plan(epoch)[0][block]
        samples = np.concatenate([np.arange(self.counts[s]) + self.starts[s] for s in shards])
        np.random.default_rng([self.seed, epoch, block]).shuffle(samples)
        return samples

    def slice(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Places `start` to `stop` of the sequence, as (epoch, sample)."""
        out: list[tuple[int, int]] = []
        while start < stop:
            epoch, place = divmod(start, self.num_samples)
            ends = self._plan(epoch)[1]
            block = int(np.searchsorted(ends, place, side="right"))
            samples = self._block(epoch, block)
            first = place - (int(ends[block]) - len(samples))
            taken = samples[first : first + stop - start]
            out += [(epoch, int(sample)) for sample in taken]
            start += len(taken)
        return out


class BatchSampler(Sampler[list[tuple[int, int]]]):
    """This rank's share of each global batch, from wherever training stands to the end of the Lightning epoch.

    A Lightning epoch is `len(sampler)` batches, the most that one pass over the data fills; what is left over begins
    the next one, so that no sample is dropped and none doubled.

    Args:
        batch_size: global, over all ranks.
        step: tells how many batches have been trained on; asked at the start of each epoch.
    """

    def __init__(
        self, order: SampleOrder, batch_size: int, step: Callable[[], int], rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size > order.num_samples:
            raise ValueError(
                f"batch_size is {batch_size} and the training set has {order.num_samples} samples; no more fit a batch"
            )
        if batch_size % world_size:
            raise ValueError(f"batch_size is {batch_size}, which {world_size} ranks can't share evenly")
        self.order, self.batch_size, self.step, self.rank, self.world_size = order, batch_size, step, rank, world_size

    def __len__(self) -> int:
        return self.order.num_samples // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.world_size
        first = self.step()
        for n in range(first, (first // len(self) + 1) * len(self)):
            start = n * self.batch_size + self.rank * share
            yield self.order.slice(start, start + share)


class PairDataset(Dataset[_Sample]):
    """Samples decoded, augmented and tokenised. An unreadable one becomes a hole and never an exception.

    Args:
        augmentation: None for the exact preprocessing of inference.
        captions: which caption of several, "random" or "first".
    """

    def __init__(
        self,
        shards: Shards,
        image_size: int,
        context_length: int,
        augmentation: Augmentation | None,
        captions: Literal["random", "first"],
        seed: int,
        preprocess: Preprocessing = "openai",
    ) -> None:
        self.shards, self.image_size, self.context_length = shards, image_size, context_length
        self.augmentation, self.captions, self.seed = augmentation, captions, seed
        # Only its crop is used: pixels stay uint8.
        self.preprocess = Preprocess(image_size, (0, 0, 0), (1, 1, 1), preprocess)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, place: tuple[int, int]) -> _Sample:
        """place: (epoch, sample)."""
        epoch, number = place
        random = np.random.default_rng([self.seed, epoch, number])
        key = f"sample {number}"
        try:
            record = self.shards[number]
            shard = self.shards.entries[self.shards.locate(number)[0]].file
            key = f"{shard}:{record.key}"
            if not record.captions:
                raise ValueError("it has no caption")
            caption = record.captions[int(random.integers(len(record.captions))) if self.captions == "random" else 0]
            if self.augmentation:
                image = self.augmentation(decode_rgb(record.image), self.image_size, random)
            else:
                image = self.preprocess.crop(open_image(record.image, key))
        except (ValueError, RuntimeError, OSError) as error:
            return _Sample(
                torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8),
                [START_OF_TEXT, END_OF_TEXT],
                key,
                f"{type(error).__name__}: {error}",
            )
        ids = encode_for_model(caption, self.context_length + 1, truncate=True)
        is_truncated = len(ids) > self.context_length
        if is_truncated:
            ids = [*ids[: self.context_length - 1], END_OF_TEXT]
        return _Sample(image, ids, key, None, is_truncated)


def collate(samples: list[_Sample]) -> Batch:
    """Texts are padded to the longest of the batch and no further: the tower's work grows with the columns."""
    tokens = torch.zeros(len(samples), max(len(sample.ids) for sample in samples), dtype=torch.long)
    for row, sample in zip(tokens, samples, strict=True):
        row[: len(sample.ids)] = torch.tensor(sample.ids)
    problems = [f"{sample.key}: {sample.problem}" for sample in samples if sample.problem]
    mask = torch.tensor([sample.problem is None for sample in samples]) if problems else None
    return Batch(
        torch.stack([sample.image for sample in samples]),
        tokens,
        mask,
        [sample.key for sample in samples],
        problems,
        sum(sample.is_truncated for sample in samples),
    )


class TrainLoader(DataLoader[_Sample]):
    """A loader that measures how long training waits for it.

    It also tells Lightning that it can be resumed: its position is the trainer's step, which the sampler asks for.
    """

    waited_s = 0.0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            self.waited_s += time.perf_counter() - begin
            if batch is None:
                return
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal's group; the trainer alone decides what it means.

    In a group of their own the workers do not hear it. They end with the trainer, which they look after.
    """
    del worker
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class PairDataModule(pl.LightningDataModule):
    """Image-text pairs for Lightning's trainer.

    Args:
        train: folder of shards (`miniclip shards SRC OUT` makes one).
        val: folder of shards that is never trained on, or none.
        batch_size: pairs that are contrasted with each other, over all ranks.
        num_workers: processes that decode, on each rank.
        augmentation: what is done to training images.
        captions: which caption of several is taken in training: a random one, or the first.
        image_size: side of the model's input, pixels; set from the model.
        context_length: most tokens of a text; longer ones are cut and counted; set from the model.
        preprocess: how held-out images are made square; set from the model.
        seed: of order, augmentation and captions; set from `seed_everything`.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        batch_size: int = 256,
        num_workers: int = 2,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 (frozen)
        captions: Literal["random", "first"] = "random",
        image_size: int = 224,
        context_length: int = 77,
        preprocess: Preprocessing = "openai",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"data.batch_size is {batch_size}; a pair needs at least one other to be told from")
        self.train, self.val, self.batch_size, self.num_workers = train, val, batch_size, num_workers
        self.augmentation, self.captions, self.seed = augmentation, captions, seed
        self.image_size, self.context_length = image_size, context_length
        self.preprocess = preprocess
        self.train_shards: Shards | None = None
        self.val_shards: Shards | None = None
        self._resumed_step = 0

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.train_shards is None:
            self.train_shards = Shards(Path(self.train))
        if self.val is not None and self.val_shards is None:
            self.val_shards = Shards(Path(self.val))

    def train_dataloader(self) -> DataLoader[_Sample]:
        assert self.trainer is not None
        assert self.train_shards is not None
        trainer = self.trainer
        order = SampleOrder(self.train_shards.counts, self.seed)

        def step() -> int:
            # Lightning may ask for the first batches before it has restored its own count.
            return max(self._resumed_step, trainer.global_step)

        sampler = BatchSampler(order, self.batch_size, step, trainer.global_rank, trainer.world_size)
        return TrainLoader(
            self._dataset(self.train_shards, self.augmentation, self.captions), batch_sampler=sampler, **self._options()
        )

    def val_dataloader(self) -> DataLoader[_Sample] | list[DataLoader[_Sample]]:
        if self.val_shards is None:
            return []
        numbers = range(len(self.val_shards))
        step = min(self.batch_size, 256)
        batches = [[(0, n) for n in numbers[i : i + step]] for i in numbers[::step]]
        return DataLoader(self._dataset(self.val_shards, None, "first"), batch_sampler=batches, **self._options())

    def _dataset(
        self, shards: Shards, augmentation: Augmentation | None, captions: Literal["random", "first"]
    ) -> PairDataset:
        return PairDataset(
            shards, self.image_size, self.context_length, augmentation, captions, self.seed, self.preprocess
        )

    def _options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "collate_fn": collate,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": _leave_signals_to_the_trainer,
        }

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {**self._sequence(), "step": self.trainer.global_step}

    def _sequence(self) -> dict[str, int]:
        """What the sequence of batches depends on."""
        assert self.train_shards is not None
        return {"seed": self.seed, "batch_size": self.batch_size, "samples": len(self.train_shards)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint whose step would be another place in another sequence of batches."""
        if self.train_shards is None:
            return
        for name, value in self._sequence().items():
            if state_dict[name] != value:
                raise ValueError(
                    f"the checkpoint was trained with {name} {state_dict[name]}, this run has {value}; go on with the "
                    "same, or begin a run in another folder"
                )
        self._resumed_step = state_dict["step"]
