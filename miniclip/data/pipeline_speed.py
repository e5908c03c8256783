"""How fast shards become batches, stage by stage and without training: what `miniclip check --speed` times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..common.waiting import PatientLoader
from ..tokenizer import encode_for_model
from .augmentation import Augmentation
from .findings import Pipeline
from .pairs import Batch, CaptionChoice, PairDataset, collate
from .preflight import one_thread, sample_indices
from .shards import Shards


def time_pipeline(
    shards: Shards, *, image_size: int, context_length: int, workers: int, samples: int = 500, seed: int = 0
) -> Pipeline:
    """Times what feeds training, without any: all of it in one process, each stage, and the loader with workers.

    The first pass is the only one that may meet the disk. The loader's clock starts once there was a batch for each
    worker, so that their start does not count.

    Raises:
        ValueError: no sample can be read, or no workers.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    augmentation, random = Augmentation(), np.random.default_rng(seed)
    dataset = PairDataset(shards, image_size, context_length, augmentation, CaptionChoice(), seed)
    seconds: dict[str, float] = {}

    def clock(stage: str, function: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        begin = time.perf_counter()
        out = [function(item) for item in items]
        seconds[stage] = time.perf_counter() - begin
        return out

    places = [(0, number) for number in sample_indices(len(shards), samples, seed)]
    with one_thread():
        done = clock("", dataset.__getitem__, places[:1])  # imports, and the tokenizer's tables
        done = clock("all", dataset.__getitem__, places)
        good = [number for (_, number), sample in zip(places, done, strict=True) if not sample.problem]
        if not good:
            raise ValueError("none of the samples can be read; there is nothing to time")
        alone_s = seconds.pop("all") + seconds.pop("")
        records = clock("read", shards.__getitem__, good)
        clock(
            "decode and augment",
            lambda record: augmentation.decode(record.image, dataset.recipe.preprocess, random),
            records,
        )
        texts = [record.captions[0] for record in records]
        clock("tokenise", lambda text: encode_for_model(text, context_length, truncate=True), texts)
        step = max(1, min(32, len(places) // (4 * workers)))
        clock("collate", collate, [done[i : i + step] for i in range(0, len(done), step)])
    batches = [places[i : i + step] for i in range(0, len(places), step)]
    loader: PatientLoader[Batch] = PatientLoader(
        dataset, batch_sampler=batches * 2, num_workers=workers, collate_fn=collate
    )
    begin, counted = time.perf_counter(), 0
    for number, batch in enumerate(loader):
        counted += len(batch.keys) if number >= workers else 0
        begin = begin if number >= workers else time.perf_counter()
    loader_rate = counted / (time.perf_counter() - begin)
    return Pipeline(len(good), seconds, len(places) / (alone_s + seconds["collate"]), workers, loader_rate)
