"""Shards -> batches, exactly: each epoch is every sample once, in an order that depends on seed and epoch alone.

Training is one endless sequence of samples, epoch after epoch; batch number `n` is its n-th slice of `batch_size`.
So a batch is a pure function of (seed, n), whatever the number of workers and ranks, and a run resumed at step n goes
on with batch n. Augmentation and the choice of a caption draw from (seed, epoch, sample).

B batch, L text tokens, R side of an image in pixels.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .config import Preprocessing
from .images import Augmentation, Preprocess, open_image
from .processes import share
from .shards import Shards, pack_into_cache
from .sources import texts_in
from .storage import Cache, is_url
from .terminal import Watch
from .tokenizer import END_OF_TEXT, START_OF_TEXT, encode_for_model


class Batch(NamedTuple):
    """What training and validation see.

    images: (B, 3, R, R) uint8. tokens: (B, L) int64, zero padded to the longest text. mask: (B,) bool, False where a
    sample could not be read, or None if all could. keys: names of the samples. problems: why, for those that could not.
    num_truncated: texts that were cut to the context length. caption_ids: (B,) int64, equal for equal texts.
    """

    images: Tensor
    tokens: Tensor
    mask: Tensor | None
    keys: list[str]
    problems: list[str]
    num_truncated: int
    caption_ids: Tensor


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


class Mixture:
    """An endless sequence like `SampleOrder`'s, of several sources in given proportions.

    Each source goes through its own passes, so that one of small weight is seen whole before anything in it is seen
    again. Every so many places hold the sources in their proportions, to one sample, in random order.

    Args:
        orders: of each source; their samples are numbered one source after the other.
        weights: positive numbers, in any unit.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[float], seed: int, period: int = 4096) -> None:
        if len(weights) != len(orders) or not all(weight > 0 and math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights are {list(weights)}; {len(orders)} sources need as many numbers above 0")
        self.orders, self.seed, self.period = list(orders), seed, period
        self.shares = np.array(weights, dtype=np.float64) / sum(weights)
        counts = [order.num_samples for order in orders]
        self.starts = np.cumsum(counts) - counts
        self.num_samples = sum(counts)

    def _taken_before(self, period: int) -> np.ndarray:
        """How many samples of each source come before a period; the largest takes what rounding leaves."""
        taken = np.floor(period * self.period * self.shares).astype(np.int64)
        largest = int(self.shares.argmax())
        taken[largest] = period * self.period - (taken.sum() - taken[largest])
        return taken

    def slice(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Places `start` to `stop` of the sequence, as (pass through its source, sample)."""
        out: list[tuple[int, int]] = []
        while start < stop:
            period, first = divmod(start, self.period)
            last = min(self.period, first + stop - start)
            before, after = self._taken_before(period), self._taken_before(period + 1)
            sources = np.repeat(np.arange(len(self.orders)), after - before)
            np.random.default_rng([self.seed, period, 0, 1]).shuffle(sources)
            places: list[tuple[int, int]] = [(0, 0)] * (last - first)
            for source, order in enumerate(self.orders):
                is_here = sources == source
                skipped = int(before[source] + is_here[:first].sum())
                here = np.flatnonzero(is_here[first:last])
                for place, (epoch, sample) in zip(here, order.slice(skipped, skipped + len(here)), strict=True):
                    places[place] = (epoch, sample + int(self.starts[source]))
            out += places
            start += last - first
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
        self, order: SampleOrder | Mixture, batch_size: int, step: Callable[[], int], rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size > order.num_samples:
            raise ValueError(
                f"batch_size is {batch_size} and the training set has {order.num_samples} samples; no more fit a "
                f"batch, so set data.batch_size to {order.num_samples} or less"
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


@dataclass(frozen=True)
class CaptionChoice:
    """Which text of a sample goes with its image.

    Args:
        order: "random", or "first" for the first there is.
        fields: where texts are taken from: "txt", or fields of the sample's `.json`, each with a weight. With "random"
            one of those that are there is drawn by weight, then one of its lines. By default "txt" alone.
        line_weights: of the first, second, … line of a text; the last holds for all further lines. By default equal.
    """

    order: Literal["random", "first"] = "random"
    fields: dict[str, float] | None = None
    line_weights: list[float] | None = None

    def __post_init__(self) -> None:
        if self.order not in ("random", "first"):
            raise ValueError(f"CaptionChoice.order is {self.order!r}; valid are random, first")
        for name in ("fields", "line_weights"):
            value = getattr(self, name)
            if value is None:
                continue
            weights = list(value.values()) if isinstance(value, dict) else list(value)
            if not weights or not all(weight >= 0 and math.isfinite(weight) for weight in weights) or not sum(weights):
                raise ValueError(f"CaptionChoice.{name} is {value}; it needs weights from 0 on, not all of them 0")

    def choose(self, lines: Sequence[str], info: Callable[[], dict[str, Any]], random: np.random.Generator) -> str:
        """One caption.

        Args:
            lines: of the sample's `.txt`.
            info: gives the sample's `.json`; called only if a field of it is wanted.

        Raises:
            ValueError: there is none.
        """
        if self.fields:
            texts = self.texts(lines, info)
            there = [name for name, found in texts.items() if found]
            if not there:
                raise ValueError(f"it has no caption: nothing in {', '.join(self.fields)}")
            lines = texts[there[self._draw([self.fields[name] for name in there], random)]]
        if not lines:
            raise ValueError("it has no caption")
        weights = self.line_weights
        if weights is None:
            return lines[int(random.integers(len(lines))) if self.order == "random" else 0]
        return lines[self._draw((weights + weights[-1:] * len(lines))[: len(lines)], random)]

    def texts(self, lines: Sequence[str], info: Callable[[], dict[str, Any]]) -> dict[str, Sequence[str]]:
        """The lines of each field."""
        fields = self.fields or {"txt": 1.0}
        facts = {} if set(fields) == {"txt"} else info()
        return {name: lines if name == "txt" else texts_in(facts.get(name)) for name in fields}

    def _draw(self, weights: Sequence[float], random: np.random.Generator) -> int:
        if self.order == "first" or not sum(weights):
            return 0
        return int(random.choice(len(weights), p=np.array(weights) / sum(weights)))


class PairDataset(Dataset[_Sample]):
    """Samples decoded, augmented and tokenised. An unreadable one becomes a hole and never an exception.

    Args:
        augmentation: None for the exact preprocessing of inference.
        captions: how a caption is chosen.
    """

    def __init__(
        self,
        shards: Shards,
        image_size: int,
        context_length: int,
        augmentation: Augmentation | None,
        captions: CaptionChoice,
        seed: int,
        preprocess: Preprocessing = "openai",
    ) -> None:
        self.shards, self.image_size, self.context_length = shards, image_size, context_length
        self.is_one_source = len(shards.num_shards) == 1  # else the names of shards do not tell them apart
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
            entry = self.shards.entries[self.shards.locate(number)[0]]
            key = f"{entry.name if self.is_one_source else entry.location}:{record.key}"
            if not record.image:
                raise ValueError("it has no image")
            caption = self.captions.choose(record.captions, lambda: self.shards.info(number), random)
            if self.augmentation:
                image = self.augmentation.decode(record.image, self.image_size, random)
            else:
                image = self.preprocess.crop(open_image(record.image, key))
        except Exception as error:  # a damaged sample can raise anything
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


def collate(samples: list[_Sample], length_multiple: int = 1, context_length: int = 77) -> Batch:
    """Texts are padded to the longest of the batch and no further: the tower's work grows with the columns.

    With a `length_multiple`, to that of it which comes next, but no further than the context.
    """
    longest = max(len(sample.ids) for sample in samples)
    length = max(longest, min(math.ceil(longest / length_multiple) * length_multiple, context_length))
    tokens = np.zeros((len(samples), length), dtype=np.int64)
    for row, sample in zip(tokens, samples, strict=True):
        row[: len(sample.ids)] = sample.ids
    # Images lie pixel by pixel; NumPy brings them into planes in half of torch.stack's time.
    images = np.empty((len(samples), *samples[0].image.shape), dtype=np.uint8)
    np.stack([sample.image.numpy() for sample in samples], out=images)
    problems = [f"{sample.key}: {sample.problem}" for sample in samples if sample.problem]
    mask = torch.tensor([sample.problem is None for sample in samples]) if problems else None
    return Batch(
        torch.from_numpy(images),
        torch.from_numpy(tokens),
        mask,
        [sample.key for sample in samples],
        problems,
        sum(sample.is_truncated for sample in samples),
        torch.tensor([_hash(sample.ids) for sample in samples]),
    )


def _hash(ids: list[int]) -> int:
    """The same in every process, unlike Python's own."""
    return int.from_bytes(hashlib.blake2b(np.array(ids, dtype=np.int32).tobytes(), digest_size=8).digest(), signed=True)


class _Pending(Sampler[list[tuple[int, int]]]):
    """Batches, and which of them were asked for and have not come yet."""

    def __init__(self, batches: Sampler[list[tuple[int, int]]] | Sequence[list[tuple[int, int]]]) -> None:
        self.batches = batches
        self.pending: deque[list[tuple[int, int]]] = deque()

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        self.pending.clear()
        for batch in self.batches:
            self.pending.append(batch)
            yield batch


class PairLoader(DataLoader[_Sample]):
    """A loader that measures how long it is waited for, and says what it waits for itself if that is long.

    It also tells Lightning that it can be resumed: its position is the trainer's step, which the sampler asks for.

    Args:
        batches: of each the samples, as (epoch, sample).
    """

    waited_s = 0.0
    silence_s = 60.0  # without a batch, after which the shards that are waited for are named

    def __init__(
        self,
        dataset: PairDataset,
        batches: Sampler[list[tuple[int, int]]] | Sequence[list[tuple[int, int]]],
        **options: Any,
    ) -> None:
        self._asked = _Pending(batches)
        super().__init__(dataset, batch_sampler=self._asked, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        with Watch(self._name_the_silent, self.silence_s) as watch:
            watch.begin()
            batches = super().__iter__()
            while True:
                begin = time.perf_counter()
                watch.begin()
                batch = next(batches, None)
                watch.end()
                self.waited_s += time.perf_counter() - begin
                if batch is None:
                    return
                self._asked.pending.popleft()
                yield batch

    def _name_the_silent(self, seconds: float) -> None:
        assert isinstance(self.dataset, PairDataset)
        shards, pending = self.dataset.shards, list(self._asked.pending)  # which changes meanwhile
        next_batch = pending[0] if pending else []
        names = {shards.entries[shards.locate(sample)[0]].location for _, sample in next_batch}
        likely = sorted(names, key=lambda name: (not is_url(name), name))  # the network first
        what = ", ".join(likely[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        print(f"No batch has come for {seconds:.0f} s. The next one needs {what or 'no shard'}.", file=sys.stderr)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal's group, and SLURM's signals every one of the job; the trainer alone
    decides what they mean.

    In a group of their own the workers do not hear Ctrl-C. They end with the trainer, which they look after, or by a
    SIGTERM of the trainer's own.
    """
    del worker
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # tells who sent it; not on macOS, which has no SLURM either
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(os.getppid(),), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class PairDataModule(pl.LightningDataModule):
    """Image-text pairs for Lightning's trainer.

    Args:
        train: shards: a folder (`miniclip shards SRC OUT` makes one), here or at a URL, or a pattern of tars in one; or
            a list of them. A folder of images and texts, or a table, is packed into the cache first.
        val: the same, never trained on; or none.
        weights: of the sources in `train`, which are then mixed in these proportions; by default each sample of each
            source comes once an epoch.
        batch_size: pairs that are contrasted with each other, over all ranks.
        num_workers: processes that decode, on each rank.
        augmentation: what is done to training images.
        captions: which text of several is taken in training; validation takes the first.
        image_size: side of the model's input, pixels; set from the model.
        context_length: most tokens of a text; longer ones are cut and counted; set from the model.
        preprocess: how held-out images are made square; set from the model.
        seed: of order, augmentation and captions; set from `seed_everything`.
        cache_gb: the most that remote shards may take on this machine's disk, 10^9 bytes.
        val_pairs: the most held-out pairs that a validation takes, so that it does not grow with them: the same ones,
            drawn once, in every validation of every run. None takes all.
        text_length_multiple: texts of a batch are padded to a multiple of so many tokens; set from `model.compile`.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        weights: list[float] | None = None,
        batch_size: int = 256,
        num_workers: int = 2,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 (frozen)
        captions: CaptionChoice = CaptionChoice(),
        image_size: int = 224,
        context_length: int = 77,
        preprocess: Preprocessing = "openai",
        seed: int = 0,
        cache_gb: float = 50.0,
        val_pairs: int | None = 5000,
        text_length_multiple: int = 1,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"data.batch_size is {batch_size}; a pair needs at least one other to be told from")
        self.train = [train] if isinstance(train, str) else list(train)
        self.val = [val] if isinstance(val, str) else list(val or [])
        if not self.train:
            raise ValueError("data.train is empty; it needs shards to train on")
        if weights is not None and len(weights) != len(self.train):
            raise ValueError(f"data.weights has {len(weights)} numbers and data.train {len(self.train)} sources")
        if not all(weight > 0 and math.isfinite(weight) for weight in weights or ()):
            raise ValueError(f"data.weights is {weights}; they must be numbers above 0")
        if val_pairs is not None and val_pairs < 2:
            raise ValueError(f"data.val_pairs is {val_pairs}; a pair needs at least one other to be told from")
        self.val_pairs = val_pairs
        if text_length_multiple < 1:
            raise ValueError(f"data.text_length_multiple is {text_length_multiple}; it must be at least 1")
        self._locations: dict[str, str] = {}
        self.weights, self.batch_size, self.num_workers = weights, batch_size, num_workers
        self.cache = Cache(limit_bytes=int(cache_gb * 1e9))
        self.augmentation, self.captions, self.seed = augmentation, captions, seed
        self.image_size, self.context_length = image_size, context_length
        self.preprocess, self.text_length_multiple = preprocess, text_length_multiple
        self.train_shards: Shards | None = None
        self.val_shards: Shards | None = None
        self._resumed_step = 0

    def prepare_data(self) -> None:
        """Called once on each machine, before `setup` everywhere."""
        for source in (*self.train, *self.val):
            if source not in self._locations:
                self._locations[source] = pack_into_cache(source)

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.train_shards is None:
            self.prepare_data()  # tells this process where; one of them packs, if need be
            self.train_shards = Shards([self._locations[source] for source in self.train], self.cache)
        if self.val and self.val_shards is None:
            self.prepare_data()
            self.val_shards = Shards([self._locations[source] for source in self.val], self.cache)

    def order(self) -> SampleOrder | Mixture:
        """The sequence that training goes through."""
        assert self.train_shards is not None
        counts, sizes = self.train_shards.counts, self.train_shards.num_shards
        if self.weights is None:
            return SampleOrder(counts, self.seed)
        parts = np.split(counts, np.cumsum(sizes)[:-1])
        return Mixture([SampleOrder(part, self.seed + n) for n, part in enumerate(parts)], self.weights, self.seed)

    def describe(self) -> str:
        """What an epoch is, for the log."""
        assert self.train_shards is not None
        order = self.order()
        epoch = f"an epoch is {order.num_samples:,} samples in {order.num_samples // self.batch_size:,} steps"
        if self.val_shards is not None and len(held_out := self.held_out()) < len(self.val_shards):
            epoch = f"validation is on {len(held_out):,} of {len(self.val_shards):,} held-out pairs; {epoch}"
        if isinstance(order, SampleOrder):
            return f"{epoch}: each once"
        parts = [
            f"{source} {share:.1%} ({share * order.num_samples / part.num_samples:.2f} times each of its "
            f"{part.num_samples:,})"
            for source, share, part in zip(self.train, order.shares, order.orders, strict=True)
        ]
        return f"{epoch}: {', '.join(parts)}"

    def train_dataloader(self) -> DataLoader[_Sample]:
        assert self.trainer is not None
        assert self.train_shards is not None
        trainer = self.trainer
        order = self.order()

        def step() -> int:
            # Lightning may ask for the first batches before it has restored its own count.
            return max(self._resumed_step, trainer.global_step)

        sampler = BatchSampler(order, self.batch_size, step, trainer.global_rank, trainer.world_size)
        return PairLoader(
            self._dataset(self.train_shards, self.augmentation, self.captions), sampler, **self._options()
        )

    def val_dataloader(self) -> DataLoader[_Sample] | list[DataLoader[_Sample]]:
        if self.val_shards is None:
            return []
        held_out = self.held_out()
        numbers = [held_out[place] for place in share(len(held_out))]
        step = min(self.batch_size, 256)
        batches = [[(0, n) for n in numbers[i : i + step]] for i in range(0, len(numbers), step)]
        first = replace(self.captions, order="first")
        return PairLoader(self._dataset(self.val_shards, None, first), batches, **self._options())

    def held_out(self) -> list[int]:
        """Which of the held-out pairs a validation takes. Not the first ones: sets often lie sorted."""
        assert self.val_shards is not None
        count, most = len(self.val_shards), self.val_pairs
        if most is None or count <= most:
            return list(range(count))
        return sorted(np.random.default_rng(0).choice(count, most, replace=False).tolist())

    def _dataset(self, shards: Shards, augmentation: Augmentation | None, captions: CaptionChoice) -> PairDataset:
        return PairDataset(
            shards, self.image_size, self.context_length, augmentation, captions, self.seed, self.preprocess
        )

    def _options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "collate_fn": partial(
                collate, length_multiple=self.text_length_multiple, context_length=self.context_length
            ),
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
            "worker_init_fn": _leave_signals_to_the_trainer,
            "generator": torch.Generator().manual_seed(
                self.seed
            ),  # a loader that begins leaves torch's own state alone
        }

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {**self._sequence(), "step": self.trainer.global_step}

    def _sequence(self) -> dict[str, Any]:
        """What the sequence of batches depends on."""
        assert self.train_shards is not None
        shards = hashlib.sha256("".join(entry.sha256 for entry in self.train_shards.entries).encode())
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "samples": len(self.train_shards),
            "weights": self.weights,
            "shards": shards.hexdigest()[:16],
            "captions": str(self.captions),
            "augmentation": str(self.augmentation),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint whose step would be another place in another sequence of batches."""
        if self.train_shards is None:
            return
        for name, value in self._sequence().items():
            if state_dict.get(name) != value:
                raise ValueError(
                    f"the checkpoint was trained with {name} {state_dict.get(name)}, this run has {value}; go on with "
                    "the same, or begin a run in another folder"
                )
        self._resumed_step = state_dict["step"]
