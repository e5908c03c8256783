"""The LightningDataModule: shards in, exact loaders for training and validation out."""

from __future__ import annotations

import hashlib
import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, GradientAccumulationScheduler
from pytorch_lightning.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Sampler

from ..common.cache import Cache
from ..common.processes import own_indices
from ..common.storage import is_url, without_secrets
from ..common.waiting import PatientLoader
from ..common.wording import counted, some
from ..config import Interpolation, Preprocessing, Resize
from ..images import Preprocess
from .augmentation import Augmentation
from .open_pairs import pack_into_cache
from .pairs import Batch, CaptionChoice, PairDataset, Positives, Recipe, Sample, collate
from .reading.scan import OTHER_SPLIT, summary
from .sampling.ahead import Ahead
from .sampling.contradictions import refuse_contradictions
from .sampling.likeness import check_groups, groups_in, neighbours_in
from .sampling.negatives import HardOrder, Likeness, Negatives
from .sampling.order import BatchSampler, Mixture, Order, SampleOrder
from .sampling.stream import Streaming
from .shard_index import REJECTED_FILE
from .shards import Shards
from .tar_stream import StreamLoader, TrainingStream


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


class PairLoader(PatientLoader[Sample]):
    """Batches of samples, and the names of the shards that a late batch needs.

    Lightning sees it as resumable: its position is the trainer's step, which the sampler asks for.

    Args:
        batches: the samples of each batch, as (epoch, sample).
    """

    def __init__(
        self,
        dataset: PairDataset,
        batches: Sampler[list[tuple[int, int]]] | Sequence[list[tuple[int, int]]],
        **options: Any,
    ) -> None:
        self._asked = _Pending(batches)
        super().__init__(dataset, batch_sampler=self._asked, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            self._asked.pending.popleft()
            yield batch

    def needed(self) -> str:
        assert isinstance(self.dataset, PairDataset)
        shards, pending = self.dataset.shards, list(self._asked.pending)  # a copy, because the thread adds to it
        next_batch = pending[0] if pending else []
        names = {shards.entries[shards.locate(sample)[0]].location for _, sample in next_batch}
        return some(sorted(names, key=lambda name: (not is_url(name), name))) or super().needed()  # the network first

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def _whereabouts(locations: Sequence[str]) -> list[str]:
    """Equal for one file, however its folder is written; a folder, which may be on a slow disk, is asked for once."""
    paths = {each: Path(each) for each in locations if not is_url(each)}
    real = {folder: folder.resolve() for folder in {path.parent for path in paths.values()}}
    return [str(real[paths[each].parent] / paths[each].name) if each in paths else each for each in locations]


def _refuse_other_batches(trainer: pl.Trainer) -> None:
    """Batch n is that of the trainer's step n, so each step has to take one batch, and each epoch all of its own.

    Raises:
        ValueError: they do not.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    schedules = [each.scheduling for each in callbacks if isinstance(each, GradientAccumulationScheduler)]
    accumulated = max([trainer.accumulate_grad_batches, *(most for each in schedules for most in each.values())])
    if accumulated != 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches is {accumulated}; the loss contrasts the pairs of one batch, and "
            "accumulating over batches does not do that. Raise data.batch_size instead"
        )
    limit = trainer.limit_train_batches  # 1.0 is all batches and 1 is one; overfit_batches sets it, too
    is_trial: Any = trainer.fast_dev_run  # type: ignore[attr-defined]
    if not is_trial and (isinstance(limit, int) or limit != 1):
        raise ValueError(
            f"trainer.limit_train_batches is {limit}; an epoch is every sample once, so use trainer.max_steps for a "
            "shorter run (overfit_batches sets it, too)"
        )


def _refuse_a_part_of_validation(trainer: pl.Trainer) -> None:
    """
    Raises:
        ValueError: scores would be of a part of the held-out pairs, and not of none (0) or in a trial.
    """
    limit = trainer.limit_val_batches  # 1.0 is all batches and 1 is one
    is_trial: Any = trainer.fast_dev_run  # type: ignore[attr-defined]
    if not is_trial and limit != 0 and (isinstance(limit, int) or limit != 1):
        raise ValueError(
            f"trainer.limit_val_batches is {limit}; a validation scores all held-out pairs, or data.val_pairs of them "
            "(overfit_batches sets it, too)"
        )


class PairDataModule(pl.LightningDataModule):
    """Image-text pairs for Lightning's trainer.

    Args:
        train: shards: a folder (`miniclip shards SRC OUT` makes one), here or at a URL, or a pattern of tars in one; or
            a list of them. A folder of images and texts, or a table, is packed into the cache first; of a table whose
            rows name their split, those of train.
        val: the same, never trained on; or none. Of a table whose rows name their split, those of val.
        weights: proportions in which the sources of `train` are mixed; by default each sample of each source comes
            once an epoch.
        batch_size: pairs that are contrasted with each other, over all ranks.
        num_workers: processes that decode, on each rank.
        augmentation: random changes of training images.
        captions: the choice among several texts in training; validation takes the first.
        group: field of the samples' `.json` (or "cls") whose equal values, in any source, make a group. It is read
            where `model.positives` is "group", and for hard negatives without `neighbours`.
        negatives: "random", or "hard" to make batches of samples that are hard to tell apart.
        neighbours: what makes negatives hard: a folder that `miniclip embed` wrote for the shards of `train`, or one
            for each source. By default the members of a group are put together.
        positives: that of `CLIPTraining`, as the next four: the command line sets them from the model, and
            `CLIPTraining` refuses others.
        image_size: side of the model's input, pixels.
        context_length: most tokens of a text; longer ones are cut and counted.
        preprocess, resize, resize_size, interpolation: how held-out images are made square (`VisionConfig`).
        seed: of order, augmentation and captions. The command line sets it from `seed_everything`; in Python,
            Lightning's function of that name does not reach it.
        cache_gb: the most that remote shards, and that sources packed into the cache, may take each on this machine's
            disk, 10^9 bytes. What is used stays.
        val_pairs: the most held-out pairs that a validation takes: the same random ones in every validation of every
            run. None takes all.
        text_length_multiple: texts of a batch are padded to a multiple of so many tokens; the command line sets it from
            `model.compile`.
        order: "exact", every sample once an epoch in an order that workers and ranks can't change; or "stream",
            straight from tars without an index, inexact. Validation is exact always.
        stream: the settings of "stream".
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        weights: list[float] | None = None,
        batch_size: int = 256,
        num_workers: int = 2,
        augmentation: Augmentation = Augmentation(),  # noqa: B008 (frozen)
        captions: CaptionChoice = CaptionChoice(),  # noqa: B008 (frozen)
        group: str = "group",
        negatives: Negatives = "random",
        neighbours: str | list[str] | None = None,
        positives: Positives = "pair",
        image_size: int = 224,
        context_length: int = 77,
        preprocess: Preprocessing = "openai",
        resize: Resize = "shortest",
        resize_size: int | None = None,
        interpolation: Interpolation = "bicubic",
        seed: int = 0,
        cache_gb: float = 50.0,
        val_pairs: int | None = 5000,
        text_length_multiple: int = 1,
        order: Literal["exact", "stream"] = "exact",
        stream: Streaming = Streaming(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"data.batch_size is {batch_size}; contrastive training needs at least two pairs")
        self.train = [train] if isinstance(train, str) else list(train)
        self.val = [val] if isinstance(val, str) else list(val or [])
        if not self.train:
            raise ValueError("data.train is empty; it needs shards to train on")
        for name, named in (("train", self.train), ("val", self.val)):
            if "" in named:  # of a variable of the shell's that is not set, say; Path("") is the current folder
                raise ValueError(f"data.{name} is ''; name a folder, file or pattern, as '.' for the current folder")
        if weights is not None and len(weights) != len(self.train):
            raise ValueError(f"data.weights has {len(weights)} numbers and data.train {len(self.train)} sources")
        if not all(weight > 0 and math.isfinite(weight) for weight in weights or ()):
            raise ValueError(f"data.weights is {weights}; they must be numbers above 0")
        if val_pairs is not None and val_pairs < 2:
            raise ValueError(f"data.val_pairs is {val_pairs}; contrastive training needs at least two pairs")
        if num_workers < 0:
            raise ValueError(f"data.num_workers is {num_workers}; it must be at least 0, which decodes in this process")
        if not cache_gb >= 0:
            raise ValueError(f"data.cache_gb is {cache_gb}; it must be at least 0")
        self.val_pairs = val_pairs
        if text_length_multiple < 1:
            raise ValueError(f"data.text_length_multiple is {text_length_multiple}; it must be at least 1")
        if order not in ("exact", "stream"):
            raise ValueError(f"data.order is {order!r}; valid are exact, stream")
        self.is_streamed, self.stream_settings = order == "stream", stream
        if self.is_streamed and weights is not None:
            raise ValueError(
                f"data.weights is {weights}, and data.order stream takes each tar as often as any other; leave it out, "
                "or index the shards and set data.order to exact"
            )
        if not self.is_streamed and stream != Streaming():
            raise ValueError(f"data.stream is {stream}, which data.order exact does not use; set data.order to stream")
        self.group, self.negatives, self.positives, self.captions = group, negatives, positives, captions
        self.neighbours = [neighbours] if isinstance(neighbours, str) else neighbours
        refuse_contradictions(
            positives, negatives, self.neighbours, group, self.captions.per_image, len(self.train), weights, order
        )
        self._likeness: Likeness | None = None
        self._locations: dict[tuple[str, str], str] = {}  # of a source's part
        self.weights, self.batch_size, self.num_workers = weights, batch_size, num_workers
        self.cache = Cache(limit_bytes=int(cache_gb * 1e9))
        self.augmentation, self.seed = augmentation, seed
        self.image_size, self.context_length = image_size, context_length
        no_mean, no_std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # only its crop is used: pixels stay uint8
        self.preprocess = Preprocess(image_size, no_mean, no_std, preprocess, resize, resize_size, interpolation)
        self.text_length_multiple = text_length_multiple
        self.train_shards: Shards | None = None  # for the exact order
        self.train_stream: TrainingStream | None = None  # for the other
        self.val_shards: Shards | None = None
        self._resumed_step = 0
        self.while_waiting: Callable[[float], None] | None = None  # `PatientLoader`'s, of every loader

    def prepare_data(self) -> None:
        """Called once on each machine, before `setup` everywhere.

        Raises:
            ValueError: the trainer's steps are not one batch each, or its epochs not whole.
        """
        if isinstance(self.trainer, pl.Trainer) and self.trainer.state.fn in (None, TrainerFn.FITTING):
            _refuse_other_batches(self.trainer)  # before anything is packed
        for split, sources in (("train", self.train), ("val", self.val)):
            for source in sources:
                if (source, split) not in self._locations:
                    self._locations[source, split] = pack_into_cache(source, self.cache.limit_bytes, split)

    def _places(self, split: str) -> list[str]:
        """Where the shards of `train` or `val` are, once they are prepared."""
        return [self._locations[source, split] for source in (self.train if split == "train" else self.val)]

    def setup(self, stage: str) -> None:
        """
        Raises:
            ValueError: as `prepare_data`, which other processes did not call; or shards are unusable.
        """
        if stage == "fit" and isinstance(self.trainer, pl.Trainer):
            _refuse_other_batches(self.trainer)
        if stage == "fit" and self.train_shards is None and self.train_stream is None:
            self.prepare_data()  # tells this process where; one of them packs, if need be
            sources = self._places("train")
            if self.is_streamed:
                self.train_stream = TrainingStream(sources, self.stream_settings, self.seed, split="train")
            else:
                self.train_shards = Shards(sources, self.cache, split="train")
                if self.reads_groups():
                    check_groups(self.train_shards, self.group)
        if self.val and isinstance(self.trainer, pl.Trainer):
            _refuse_a_part_of_validation(self.trainer)
        if self.val and self.val_shards is None:
            self.prepare_data()
            self.val_shards = Shards(self._places("val"), self.cache, split="val")
            if len(self.val_shards) < 2:
                raise ValueError(
                    f"data.val has {counted(len(self.val_shards), 'pair')}; its scores are of each among the others, "
                    "so it needs at least two"
                )
            if self._group_field():
                check_groups(self.val_shards, self.group, " of data.val")

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self.train_stream is not None and (left_out := self.train_stream.summary()):
            print(without_secrets(left_out), file=sys.stderr)

    def trained_on(self) -> list[str]:
        """The shards of `val` that are trained on, too."""
        if self.val_shards is None:
            return []
        held_out = [shard.location for shard in self.val_shards.entries]
        places = set(_whereabouts(self._train_locations()))
        return [shard for shard, place in zip(held_out, _whereabouts(held_out), strict=True) if place in places]

    def trained_on_twice(self) -> list[str]:
        """The shards that `train` names more than once."""
        trained = self._train_locations()
        places = _whereabouts(trained)
        times = Counter(places)
        return list({place: shard for shard, place in zip(trained, places, strict=True) if times[place] > 1}.values())

    def _train_locations(self) -> list[str]:
        if self.train_stream is not None:
            return [tar.location for tar in self.train_stream.tars]
        return [] if self.train_shards is None else [shard.location for shard in self.train_shards.entries]

    def steps_per_epoch(self) -> int:
        """Those of Lightning's epoch, after which validations come: the batches that an epoch fills.

        Raises:
            ValueError: the training set does not fill a batch, or nobody knows how long an epoch is.
        """
        if self.train_stream is not None:
            max_steps = -1 if self.trainer is None else self.trainer.max_steps
            return self.train_stream.steps_per_epoch(self.batch_size, max_steps)
        return len(BatchSampler(self.sample_order(), self.batch_size, step=lambda: 0))

    def epoch_samples(self) -> int:
        """The samples of an epoch; of a stream those of its steps."""
        if self.train_stream is not None:
            return self.steps_per_epoch() * self.batch_size
        return self.sample_order().num_samples

    def training_data(self) -> list[dict[str, Any]]:
        """Of each source what `Shards.facts` has; of tars without an index the `source` alone."""
        if self.train_stream is not None:
            return self.train_stream.facts
        assert self.train_shards is not None
        return self.train_shards.facts

    def validation_pairs(self) -> str | None:
        """A digest of which pairs validation is on and of what fits them: other scores are not compared.

        None without any.
        """
        if self.val_shards is None:
            return None
        names = self.val_shards.checksums or [shard.name for shard in self.val_shards.entries]
        fitting = {"pair": [], "caption": ["caption"], "group": ["group", self.group]}[self.positives]
        return hashlib.sha256(" ".join([*names, str(self.val_pairs), *fitting]).encode()).hexdigest()

    def sample_order(self) -> Order:
        """The sequence that exact training goes through."""
        assert self.train_shards is not None
        counts, sizes = self.train_shards.counts, self.train_shards.num_shards
        if self.negatives == "hard":
            return HardOrder(SampleOrder(counts, self.seed), self.batch_size, self.likeness())
        if self.weights is None:
            return SampleOrder(counts, self.seed)
        parts = np.split(counts, np.cumsum(sizes)[:-1])
        return Mixture([SampleOrder(part, self.seed + n) for n, part in enumerate(parts)], self.weights, self.seed)

    def likeness(self) -> Likeness:
        """What hard negatives are composed by, read once."""
        assert self.train_shards is not None
        if self._likeness is None and self.neighbours:
            self._likeness = neighbours_in(self.neighbours, self.train_shards, self._places("train"))
        elif self._likeness is None:
            self._likeness = groups_in(self.train_shards, self.group)
        return self._likeness

    def reads_groups(self) -> bool:
        return self.positives == "group" or (self.negatives == "hard" and not self.neighbours)

    def describe(self) -> str:
        """The size of an epoch and its sources, for the log."""
        if self.train_stream is not None:
            world_size = 1 if self.trainer is None else self.trainer.world_size
            return self.train_stream.describe(self.num_workers, world_size, self.steps_per_epoch())
        assert self.train_shards is not None
        order = self.sample_order()
        steps, rest = divmod(order.num_samples, self.batch_size)
        whole = f"{steps:,}" if not rest else f"{order.num_samples / self.batch_size:,.1f}"
        epoch = f"an epoch is {order.num_samples:,} samples in {whole} steps"
        of_index = [each for each in self.train_shards.left_out if each.reason != OTHER_SPLIT]
        if left_out := summary(of_index):
            epoch = f"{left_out}, as {REJECTED_FILE} beside the shards lists; {epoch}"
        if left_out := summary(each for each in self.train_shards.left_out if each.reason == OTHER_SPLIT):
            epoch = f"{left_out}; {epoch}"
        if self.val_shards is not None and len(held_out := self.held_out()) < len(self.val_shards):
            epoch = f"validation is on {len(held_out):,} of {len(self.val_shards):,} held-out pairs; {epoch}"
        if isinstance(order, HardOrder):
            what = f"neighbours in {', '.join(self.neighbours)}" if self.neighbours else f"groups by {self.group!r}"
            return f"{epoch}: each once, in batches of {what}"
        if isinstance(order, SampleOrder):
            return f"{epoch}: each once"
        assert isinstance(order, Mixture)
        parts = [
            f"{source} {share:.1%} ({share * order.num_samples / part.num_samples:.2f} times each of its "
            f"{part.num_samples:,})"
            for source, share, part in zip(self.train, order.shares, order.orders, strict=True)
        ]
        return f"{epoch}: {', '.join(parts)}"

    def train_dataloader(self) -> DataLoader[Any]:
        """
        Raises:
            ValueError: no trainer has this module; its step is the place in the sequence of batches.
        """
        if self.trainer is None:
            raise ValueError(
                "this PairDataModule belongs to no Trainer, whose step tells which batch comes next; give both to "
                "Trainer.fit. For a loop of your own, `webdataset` reads the same shards"
            )
        trainer = self.trainer

        def step() -> int:
            # Lightning may ask for the first batches before it has restored its own count.
            return max(self._resumed_step, trainer.global_step)

        if self.train_stream is not None:
            return self._stream_loader(self.train_stream, step())
        assert self.train_shards is not None
        order = self.sample_order()
        sampler = BatchSampler(order, self.batch_size, step, trainer.global_rank, trainer.world_size)
        dataset = self._dataset(
            self.train_shards, self.augmentation, self.captions, self._ahead(order), self._group_field()
        )
        return self._loader(dataset, sampler)

    def _group_field(self) -> str | None:
        return self.group if self.positives == "group" else None

    def _ahead(self, order: Order) -> Ahead | None:
        """What fetches remote shards before they are needed."""
        assert self.train_shards is not None
        assert self.trainer is not None
        if not self.train_shards.remote_bytes:
            return None
        held_out = 0 if self.val_shards is None else self.val_shards.remote_bytes
        ends = [self.trainer.max_steps, (self.trainer.max_epochs or -1) * (order.num_samples // self.batch_size)]
        stop = min((self.batch_size * steps for steps in ends if steps >= 0), default=None)
        blocks = order.order if isinstance(order, HardOrder) else order
        assert isinstance(blocks, SampleOrder | Mixture)
        return Ahead(self.train_shards, blocks, held_out, stop)

    def val_dataloader(self) -> DataLoader[Sample] | list[DataLoader[Sample]]:
        if self.val_shards is None:
            return []
        held_out = self.held_out()
        samples = [held_out[index] for index in own_indices(len(held_out))]
        step = min(self.batch_size, 256)
        batches = [[(0, n) for n in samples[i : i + step]] for i in range(0, len(samples), step)]
        first = replace(self.captions, order="first", per_image=1)
        return self._loader(self._dataset(self.val_shards, None, first, group=self._group_field()), batches)

    def held_out(self) -> list[int]:
        """The held-out pairs of a validation: a random sample, as sets often lie sorted."""
        assert self.val_shards is not None
        count, most = len(self.val_shards), self.val_pairs
        if most is None or count <= most:
            return list(range(count))
        return sorted(np.random.default_rng(0).choice(count, most, replace=False).tolist())

    def _dataset(
        self,
        shards: Shards,
        augmentation: Augmentation | None,
        captions: CaptionChoice,
        ahead: Ahead | None = None,
        group: str | None = None,
    ) -> PairDataset:
        return PairDataset(
            shards,
            self.image_size,
            self.context_length,
            augmentation,
            captions,
            self.seed,
            self.preprocess,
            ahead,
            group,
        )

    def _loader(self, dataset: PairDataset, batches: Sampler[Any] | Sequence[Any]) -> PairLoader:
        loader = PairLoader(
            dataset, batches, collate_fn=self._collate(dataset.recipe.captions), **self._loader_options()
        )
        loader.while_waiting = self._while_waiting
        return loader

    def _stream_loader(self, stream: TrainingStream, step: int) -> StreamLoader:
        assert self.trainer is not None
        loader = stream.loader(
            Recipe(
                self.image_size,
                self.context_length,
                self.augmentation,
                self.captions,
                self.preprocess,
                self._group_field(),
            ),
            self._collate(self.captions),
            self.cache,
            batch_size=self.batch_size,
            steps_per_epoch=self.steps_per_epoch(),
            first_step=step,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            **self._loader_options(),
        )
        loader.while_waiting = self._while_waiting
        return loader

    def _collate(self, captions: CaptionChoice) -> Callable[[list[Sample]], Batch]:
        return partial(
            collate,
            length_multiple=self.text_length_multiple,
            context_length=self.context_length,
            texts_per_image=captions.per_image,
        )

    def _loader_options(self) -> dict[str, Any]:
        return {
            "num_workers": self.num_workers,
            "pin_memory": self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            "persistent_workers": self.num_workers > 0,
            # A loader that begins leaves torch's own state alone.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _while_waiting(self, seconds: float) -> None:
        if self.while_waiting is not None:
            self.while_waiting(seconds)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """
        Raises:
            ValueError: always. A checkpoint holds no settings of the data, and Lightning's reads a pickle.
        """
        raise ValueError(
            f"PairDataModule.load_from_checkpoint cannot read {str(checkpoint_path)!r}, which holds no settings of the "
            "data: build it as the run's logs/version_0/config.yaml says; `miniclip train fit … --ckpt_path FILE` "
            "resumes a run"
        )

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        step = self.trainer.global_step
        stream = {} if self.train_stream is None else {"stream": self.train_stream.state(step)}
        return {**self._sequence(), **stream, "step": step}

    def _sequence(self) -> dict[str, Any]:
        """All that the sequence of batches depends on."""
        if self.train_stream is not None:
            samples = self.train_stream.sequence()
        else:
            assert self.train_shards is not None
            tars = (entry.sha256 or entry.offsets_sha256 for entry in self.train_shards.entries)
            shards = hashlib.sha256("".join(tars).encode())
            samples = {
                "samples": len(self.train_shards),
                "weights": self.weights,
                "shards": shards.hexdigest()[:16],
            }
        return {
            "order": "stream" if self.is_streamed else "exact",
            "seed": self.seed,
            "batch_size": self.batch_size,
            **samples,
            "captions": str(self.captions),
            "captions.per_image": self.captions.per_image if self.captions.per_image > 1 else None,
            "negatives": self._negatives(),
            "augmentation": str(self.augmentation),
        }

    def _negatives(self) -> str | None:
        if self.negatives == "random":
            return None
        return f"hard, {self.likeness().fingerprint()}"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint of another sequence of batches, in which its step means another position."""
        if self.train_shards is None and self.train_stream is None:
            return
        for name, value in self._sequence().items():
            known = state_dict.get(name, "exact" if name == "order" else None)  # the only order there was
            if known != value:
                raise ValueError(
                    f"the checkpoint was trained with {name} {known}, this run has {value}; go on with "
                    "the same, or begin a run in another folder"
                )
        self._resumed_step = state_dict["step"]
        if self.train_stream is not None and state_dict["stream"] is not None:
            assert self.trainer is not None
            readers = max(1, self.num_workers) * self.trainer.world_size
            message = self.train_stream.resume(state_dict["stream"], readers)
            if message and self.trainer.is_global_zero:
                print(message, flush=True)
