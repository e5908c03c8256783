"""What `data.order: stream` trains on: tars that nobody has indexed, an epoch of a given length, a resumable position.

Its order is inexact and declared so: `describe` says how."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from ..common.cache import Cache
from ..common.processes import all_gather_objects
from ..common.storage import exists, is_url, join, name_of, without_secrets
from ..common.waiting import PatientLoader
from ..common.wording import counted, some
from .indexing.index_tars import tar_locations
from .pairs import Batch, Recipe, Sample
from .reading.scan import OTHER_SPLIT, LeftOut
from .sampling.stream import Mark, Progress, Streaming, TarOrder, refuse_idle_readers
from .sampling.tar_reader import Part, Tar, TarStream
from .shard_index import INDEX_FILE
from .shards import Shards, tars_of_split


class Found(NamedTuple):
    """The tars of a source. num_samples: None where no index has it. facts: as those of `Shards`. others: names of
    those of other splits."""

    tars: list[Tar]
    num_samples: int | None
    facts: dict[str, Any]
    others: list[str]


def find_tars(source: str, split: str | None = None) -> Found:
    """A folder's tars, by its index if it has one; or tars by name, "https://host/{00000..00099}.tar", as they are.

    Args:
        split: that of `Shards`.

    Raises:
        ValueError: no tars there, none of the split, or a folder at a URL without an index, whose tars can't be listed.
    """
    if name_of(source).endswith(".tar"):
        tars = [Tar(location) for location in tar_locations(source)]
        return Found(tars, None, {"source": without_secrets(source)}, [])
    if exists(join(source, INDEX_FILE)):
        shards = Shards(source, split=split)
        tars = [Tar(entry.location, entry.bytes, entry.sha256, entry.version) for entry in shards.entries]
        others = [each.source for each in shards.left_out if each.reason == OTHER_SPLIT]
        return Found(tars, len(shards), shards.facts[0], others)
    if is_url(source):
        raise ValueError(
            f"there is no {INDEX_FILE} at {source}, and the tars of a folder at a URL can't be listed; name them, as "
            f"{join(source, '{00000..00099}.tar')}"
        )
    locations = {name_of(location): location for location in tar_locations(source)}
    own = tars_of_split(list(locations), split, source)
    tars = [Tar(location) for name, location in locations.items() if name in own]
    return Found(tars, None, {"source": source}, [name for name in locations if name not in own])


class StreamLoader(PatientLoader[Part]):
    """A stream as the trainer's epochs: batches by number, and the progress of those that were trained on.

    Lightning sees it as resumable: its position is the trainer's step.

    Args:
        steps_per_epoch: an epoch ends at each multiple of so many steps.
    """

    def __init__(self, stream: TarStream, steps_per_epoch: int, **options: Any) -> None:
        super().__init__(stream, batch_size=None, collate_fn=_as_it_is, **options)
        self.stream, self.steps_per_epoch = stream, steps_per_epoch
        self.left_out = Counter[str]()
        self._step = stream.first_step  # that the last batch was for
        self._ahead: deque[tuple[int, Mark]] = deque()  # batches that were not trained on when someone asked last
        self._trained: dict[int, Mark] = {}
        self._parts: Iterator[Part] | None = None

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        if self._parts is None:  # one stream for all epochs
            self._parts = super().__iter__()
        while True:
            part = next(self._parts)
            self._step += 1
            self._ahead.append((self._step, part.mark))
            self._report(part.left_out)
            yield part.batch
            if self._step % self.steps_per_epoch == 0:
                return

    def trained(self, step: int) -> list[Mark]:
        """Where the readers of this process were after a step."""
        while self._ahead and self._ahead[0][0] <= step:
            mark = self._ahead.popleft()[1]
            self._trained[mark.reader] = mark
        return list(self._trained.values())

    def needed(self) -> str:
        return f"a tar of {some([without_secrets(tar.location) for tar in self.stream.tars], 2)}"

    def _report(self, left_out: list[LeftOut]) -> None:
        for each in left_out:
            if each.reason not in self.left_out:
                print(f"left out of the stream: {without_secrets(each.source)} ({each.reason})", file=sys.stderr)
            self.left_out[each.reason] += each.count

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


def _as_it_is(part: Part) -> Part:
    return part


class TrainingStream:
    """The tars of a run, and how far the run has come in them.

    Args:
        split: that of `Shards`.

    Raises:
        ValueError: as `find_tars`.
    """

    def __init__(self, sources: Sequence[str], settings: Streaming, seed: int, split: str | None = None) -> None:
        found = [find_tars(source, split) for source in sources]
        self.others = [name for each in found for name in each.others]
        self.tars = [tar for each in found for tar in each.tars]
        self.facts = [each.facts for each in found]
        counts = [each.num_samples for each in found]
        indexed = None if None in counts else sum(count or 0 for count in counts)
        self.settings, self.seed = settings, seed
        self.epoch_samples = settings.epoch_samples or indexed
        self.progress: Progress | None = None  # of the checkpoint that the run goes on from
        self._loader: StreamLoader | None = None

    def steps_per_epoch(self, batch_size: int, max_steps: int) -> int:
        """Without a number of samples the whole run, of `max_steps`, is one epoch.

        Raises:
            ValueError: neither is known, or an epoch is shorter than a batch.
        """
        if self.epoch_samples is None:
            if max_steps > 0:
                return max_steps
            raise ValueError(
                "data.order is stream, and no index has the number of samples in data.train, so an epoch has no "
                "length: set trainer.max_steps or max_samples instead of trainer.max_epochs, or "
                "data.stream.epoch_samples"
            )
        if batch_size > self.epoch_samples:
            raise ValueError(
                f"data.batch_size is {batch_size} and an epoch of the stream {self.epoch_samples} samples, less than "
                "one batch; lower data.batch_size or raise data.stream.epoch_samples"
            )
        return self.epoch_samples // batch_size

    def loader(
        self,
        recipe: Recipe,
        collate: Callable[[list[Sample]], Batch],
        cache: Cache,
        *,
        batch_size: int,
        steps_per_epoch: int,
        first_step: int,
        rank: int,
        world_size: int,
        **options: Any,
    ) -> StreamLoader:
        """
        Args:
            batch_size: over all ranks.
            options: of the `DataLoader`.

        Raises:
            ValueError: the ranks can't share a batch evenly, or there are too few tars for the readers.
        """
        if batch_size % world_size:
            raise ValueError(f"batch_size is {batch_size}, which {world_size} ranks can't share evenly")
        self.refuse_idle_readers(options["num_workers"], world_size)
        num_readers = max(1, options["num_workers"]) * world_size
        self.progress = (self.progress or Progress.start(num_readers)).shared_by(num_readers)
        stream = TarStream(
            self.tars,
            TarOrder(len(self.tars), self.seed, self.settings.resampled),
            self.progress,
            recipe,
            collate,
            cache,
            shuffle=self.settings.shuffle,
            batch_size=batch_size // world_size,
            first_step=first_step,
            rank=rank,
            world_size=world_size,
        )
        self._loader = StreamLoader(stream, steps_per_epoch, **options)
        return self._loader

    def refuse_idle_readers(self, num_workers: int, world_size: int) -> None:
        """
        Raises:
            ValueError: there are more readers than tars.
        """
        if not self.settings.resampled:
            refuse_idle_readers(len(self.tars), num_workers, world_size)

    def describe(self, num_workers: int, world_size: int, steps_per_epoch: int) -> str:
        """What is inexact about this run's order, for the log."""
        if self.epoch_samples is None:
            epoch = f"the whole run of {steps_per_epoch:,} steps, as no index has the number of samples"
        else:
            epoch = f"{steps_per_epoch:,} steps, about {self.epoch_samples:,} samples, wherever in a pass it ends"
        readers = (
            f"{max(1, num_workers) * world_size} readers ({max(1, num_workers)} for each of {world_size} processes)"
        )
        if self.settings.resampled:
            how = f"draw tars from {len(self.tars):,} with replacement, so samples do not come equally often"
        else:
            how = f"share {len(self.tars):,} tars, each once a pass, and do not wait for each other between passes"
        others = f"{counted(len(self.others), 'tar')} of another split left out: {some(self.others, 3)}. "
        return (
            f"{others if self.others else ''}data.order is stream, which is inexact: {readers} {how}. "
            f"An epoch is {epoch}. A run that goes on with "
            "another number of readers takes again what each has taken from its block, whole tars of "
            f"{self.settings.shuffle:,} samples or more"
        )

    def sequence(self) -> dict[str, Any]:
        """All that the order depends on, besides the number of readers."""
        names = "\n".join(name_of(tar.location) for tar in self.tars)
        tars = f"{len(self.tars)} tars, {hashlib.sha256(names.encode()).hexdigest()[:16]}"
        return {"tars": tars, "stream.shuffle": self.settings.shuffle, "stream.resampled": self.settings.resampled}

    def state(self, step: int) -> dict[str, Any] | None:
        """How far all ranks have come after a step; called by all of them."""
        if self.progress is None:
            return None
        own = [tuple(mark) for mark in self._loader.trained(step)] if self._loader else []
        marks = [Mark(*mark) for part in all_gather_objects(own) for mark in part]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self.progress.after(marks)).items()
        }

    def resume(self, state: dict[str, Any], num_readers: int) -> str:
        """Goes on from a `state`. Returns what of it comes again, for the log; empty if nothing does."""
        progress = Progress(tuple(state["tars"]), tuple(state["taken"]), state["first"], tuple(state["done"]))
        self.progress = progress.shared_by(num_readers)
        if self.progress == progress:
            return ""
        return (
            f"The stream goes on with {num_readers} instead of {len(progress.tars)} readers, so "
            f"{sum(progress.taken):,} samples of blocks that were begun come again."
        )

    def summary(self) -> str:
        """What was left out of the tars that were read, by reason; empty if nothing was."""
        left_out = self._loader.left_out if self._loader else Counter[str]()
        reasons = "; ".join(f"{reason}: {number:,}" for reason, number in left_out.most_common())
        return f"{left_out.total():,} left out of the stream by this process: {reasons}" if left_out else ""
