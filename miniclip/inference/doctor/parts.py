"""A part of a data set (train, validation or test), looked at picture by picture.

N pictures of a part, R side of the small copies in pixels.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ...common.storage import read_bytes
from ...data.preflight import message_of, reason_kind
from ...data.reading.pair import Pair, Pairs
from ...data.shards import split_sample_name, tar_names
from ...evaluation.datasets.sets import EvaluationSet, NoImage
from ...images import open_image
from .pictures import SMALL, Seen, see

_PICTURES_AT_ONCE = 64  # pictures between two reports of progress
TRAIN, VAL, TEST = "train", "val", "test"

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


@dataclass(frozen=True)
class Source:
    """What a user named: pairs, or pictures alone where only those are compared (`captions` is None).

    Args:
        names: what `miniclip shards` calls each, where that is neither its key nor its path below the source.
    """

    part: str
    name: str
    keys: Sequence[str]
    open: Callable[[int], Image.Image]
    captions: Callable[[int], tuple[str, ...]] | None = None
    names: Sequence[str] | None = None

    def listed(self, index: int) -> str:
        """A picture as `miniclip shards` calls it where it packs this source."""
        if self.names is not None:
            return self.names[index]
        key, folder = self.keys[index], Path(self.name) if Path(self.name).is_dir() else Path(self.name).parent
        is_below = self.captions is None and folder != Path() and Path(key).is_relative_to(folder)
        return str(Path(key).relative_to(folder)) if is_below else key


def of_pairs(name: str, pairs: Pairs) -> Source:
    def opened(index: int) -> Image.Image:
        pair = pairs[index]
        if pair.problem or pair.image is None:
            raise ValueError(pair.problem or "it has no image")
        return open_image(read_bytes(pair.image), pair.source)

    def captions(index: int) -> tuple[str, ...]:
        pair = pairs[index]
        lines = tuple(line for caption in pair.captions if (line := " ".join(caption.split())))
        if not lines:
            raise ValueError(pair.problem or "it has no caption")
        return lines

    return Source(TRAIN, name, pairs.names, opened, captions)


def of_images(part: str, name: str, images: EvaluationSet) -> Source:
    """Pictures alone; samples of tars have the names by which `miniclip shards` packs them."""
    named = [split_sample_name(images.key(index)) for index in range(len(images))]
    tars = list(dict.fromkeys(tar for tar, _ in named if tar))
    called = dict(zip(tars, tar_names(tars), strict=True))
    keys = [f"{called[tar]}:{key}" if tar else key for tar, key in named]
    return Source(part, name, keys, images.open, names=images.names)


@dataclass(frozen=True)
class Looked:
    """The usable pictures of all sources, one after the other.

    Args:
        sources: as they were named.
        source: (N,) number of the source of each.
        index: (N,) index in its source.
        captions: N times the captions; none of val and test.
        sides: (N, 2) width and height, pixels.
        is_turned, levels, blur: (N,) as those of `Seen`.
        digests: N digests of pixels.
        bits: (N, 8) uint8. small: (N, R, R, 3) uint8.
        problems: how many can't be used, by kind of reason, and the first one's name.
    """

    sources: Sequence[Source]
    source: np.ndarray
    index: np.ndarray
    captions: Sequence[tuple[str, ...]]
    sides: np.ndarray
    is_turned: np.ndarray
    levels: np.ndarray
    blur: np.ndarray
    digests: Sequence[bytes]
    bits: np.ndarray
    small: np.ndarray
    problems: dict[str, tuple[int, str]]

    def __len__(self) -> int:
        return len(self.source)

    def key(self, row: int) -> str:
        return self.sources[self.source[row]].keys[self.index[row]]

    def part(self, row: int) -> str:
        return self.sources[self.source[row]].part

    def open(self, row: int) -> Image.Image:
        return self.sources[self.source[row]].open(int(self.index[row]))

    def rows_of(self, *parts: str) -> np.ndarray:
        """Rows of some parts."""
        named = [number for number, source in enumerate(self.sources) if source.part in parts]
        return np.flatnonzero(np.isin(self.source, named))

    def pictures(self, rows: np.ndarray, turns: int = 0) -> EvaluationSet:
        """Some of the pictures for a model, each turned by so many quarters."""
        return EvaluationSet("the pairs", _Opened(self, rows, turns), keys=[self.key(row) for row in rows.tolist()])


class _Opened(Sequence[Any]):
    """Pictures that are read when they are asked for."""

    def __init__(self, looked: Looked, rows: np.ndarray, turns: int) -> None:
        self.looked, self.rows, self.turns = looked, rows, turns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        try:
            image = self.looked.open(int(self.rows[index]))
        except (OSError, ValueError) as error:  # it could be read a while ago
            return NoImage(str(error))
        return image.rotate(90 * self.turns, expand=True) if self.turns else image


def look_at(
    sources: Sequence[Source],
    image_size: int,
    preprocess: Callable[[Image.Image], Tensor],
    workers: int | None,
    progress: Progress,
) -> Looked:
    """Reads and decodes every picture once, in threads.

    Args:
        image_size: side of the model's input, pixels.
        preprocess: the model's.
        workers: threads; by default one a core.
    """
    found: list[tuple[int, int, tuple[str, ...], Seen]] = []
    problems = Counter[str]()
    first: dict[str, str] = {}
    total, done = sum(len(source.keys) for source in sources), 0
    # Not a list of small pictures that is stacked at its end, which would need twice the memory.
    small = np.empty((total, SMALL, SMALL, 3), dtype=np.uint8)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool, progress("looking at pictures", total) as report:
        for number, source in enumerate(sources):
            for start in range(0, len(source.keys), _PICTURES_AT_ONCE):
                indices = range(start, min(start + _PICTURES_AT_ONCE, len(source.keys)))
                look = partial(_looked_at, source, image_size, preprocess)
                for index, result in zip(indices, pool.map(look, indices), strict=True):
                    if isinstance(result, str):
                        kind = reason_kind(result, Pair(source.keys[index]))
                        problems[kind] += 1
                        first.setdefault(kind, source.keys[index])
                    else:
                        small[len(found)] = result[1].small
                        found.append((number, index, result[0], result[1]._replace(small=_NO_PIXELS)))
                done += len(indices)
                report(done)
    seen = [each for _, _, _, each in found]
    return Looked(
        sources,
        np.array([number for number, _, _, _ in found], dtype=np.int64),
        np.array([index for _, index, _, _ in found], dtype=np.int64),
        [captions for _, _, captions, _ in found],
        np.array([each.size for each in seen], dtype=np.int64).reshape(-1, 2),
        np.array([each.is_turned for each in seen], dtype=bool),
        np.array([each.levels for each in seen], dtype=np.float32),
        np.array([each.blur for each in seen], dtype=np.float32),
        [each.digest for each in seen],
        np.array([each.bits for each in seen], dtype=np.uint8).reshape(-1, 8),
        small[: len(found)],
        {kind: (count, first[kind]) for kind, count in problems.most_common()},
    )


_NO_PIXELS = np.zeros(0, dtype=np.uint8)


def _looked_at(
    source: Source, image_size: int, preprocess: Callable[[Image.Image], Tensor], index: int
) -> tuple[tuple[str, ...], Seen] | str:
    try:
        captions = source.captions(index) if source.captions else ()
        return captions, see(source.open(index), image_size, preprocess)
    except Exception as error:  # libraries of the network, of tables and of pictures raise anything
        return message_of(error)
