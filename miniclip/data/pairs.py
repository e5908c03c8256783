"""A data set of pairs -> batches: pictures augmented, captions chosen and tokenized.

B images of a batch, K texts of each (1 unless several are asked for), L text tokens, R side of an image in pixels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..images import Preprocess, open_image
from ..tokenizer import END_OF_TEXT, START_OF_TEXT, encode_for_model
from .augmentation import Augmentation
from .reading.cells import has_no_value, texts_in
from .shards import Record, Shards

Positives = Literal["pair", "caption", "group"]  # what makes an image and a text of a batch fit each other


class Batch(NamedTuple):
    """A batch of training or validation.

    images: (B, 3, R, R) uint8. tokens: (B * K, L) int64, zero padded to the longest text; texts n * K to n * K + K - 1
    belong to image n. mask: (B * K,) bool, False where a sample could not be read or has fewer texts, or None if there
    is no such place. keys: names of the B samples. problems: why, for those that could not be read. num_truncated:
    texts that were cut to the context length. caption_ids: (B * K,) int64, equal for equal texts. groups: (B * K,)
    int64, equal for texts and images that fit each other; None if only a text's own image does.
    """

    images: Tensor
    tokens: Tensor
    mask: Tensor | None
    keys: list[str]
    problems: list[str]
    num_truncated: int
    caption_ids: Tensor
    groups: Tensor | None = None


class Sample(NamedTuple):
    image: Tensor  # (3, R, R) uint8
    texts: list[list[int]]  # token ids of each
    key: str
    problem: str | None = None
    num_truncated: int = 0
    group: int | None = None


_HOLE = [START_OF_TEXT, END_OF_TEXT]  # stands where a text is missing


@dataclass(frozen=True)
class CaptionChoice:
    """The choice of a text for a sample's image.

    Args:
        order: "random", or "first" for the first text.
        fields: sources of texts and their weights: "txt", or fields of the sample's `.json`. With "random" a field is
            drawn by weight, then one of its lines. By default "txt" alone.
        line_weights: weights of the first, second, … line; the last holds for all further lines. By default equal.
        per_image: texts that an image brings into a batch, all of which fit it; an image with fewer brings those.
    """

    order: Literal["random", "first"] = "random"
    fields: dict[str, float] | None = None
    line_weights: list[float] | None = None
    per_image: int = field(default=1, repr=False)  # checkpoints hold the representation of the others

    def __post_init__(self) -> None:
        if self.order not in ("random", "first"):
            raise ValueError(f"CaptionChoice.order is {self.order!r}; valid are random, first")
        if self.per_image < 1:
            raise ValueError(f"CaptionChoice.per_image is {self.per_image}; it must be at least 1")
        for name in ("fields", "line_weights"):
            value = getattr(self, name)
            if value is None:
                continue
            weights = list(value.values()) if isinstance(value, dict) else list(value)
            if not weights or not all(weight >= 0 and math.isfinite(weight) for weight in weights) or not sum(weights):
                raise ValueError(f"CaptionChoice.{name} is {value}; it needs weights from 0 on, not all of them 0")

    def choose(self, lines: Sequence[str], info: Callable[[], dict[str, Any]], random: np.random.Generator) -> str:
        """One caption; the arguments and the error are those of `choose_several`."""
        return replace(self, per_image=1).choose_several(lines, info, random)[0]

    def choose_several(
        self, lines: Sequence[str], info: Callable[[], dict[str, Any]], random: np.random.Generator
    ) -> list[str]:
        """`per_image` captions of different lines, or all of them if they are fewer.

        Args:
            lines: the captions of the sample's `.txt`.
            info: returns the sample's `.json`; called only if a field of it is wanted.

        Raises:
            ValueError: the sample has no caption.
        """
        left = {name: self._weighted(found) for name, found in self.texts(lines, info).items() if found}
        if not left:
            raise ValueError("it has no caption" + (f": nothing in {', '.join(self.fields)}" if self.fields else ""))
        chosen: list[str] = []
        while left and len(chosen) < self.per_image:
            name = next(iter(left))
            if self.fields:
                weights = [self.fields[name] for name in left]
                if chosen and not sum(weights):
                    break
                name = list(left)[self._draw(weights, random)]
            weights = [weight for _, weight in left[name]]
            if chosen and not sum(weights):
                del left[name]
                continue
            place = (
                self._draw_equally(len(weights), random) if self.line_weights is None else self._draw(weights, random)
            )
            chosen.append(left[name].pop(place)[0])
            if not left[name]:
                del left[name]
        return chosen

    def _weighted(self, lines: Sequence[str]) -> list[tuple[str, float]]:
        weights = self.line_weights or [1.0]
        return list(zip(lines, weights + weights[-1:] * len(lines), strict=False))

    def texts(self, lines: Sequence[str], info: Callable[[], dict[str, Any]]) -> dict[str, Sequence[str]]:
        """The lines of each field."""
        fields = self.fields or {"txt": 1.0}
        facts = {} if set(fields) == {"txt"} else info()
        return {name: lines if name == "txt" else texts_in(facts.get(name)) for name in fields}

    def _draw_equally(self, count: int, random: np.random.Generator) -> int:
        return int(random.integers(count)) if self.order == "random" else 0

    def _draw(self, weights: Sequence[float], random: np.random.Generator) -> int:
        if self.order == "first" or not sum(weights):
            return 0
        return int(random.choice(len(weights), p=np.array(weights) / sum(weights)))


class Recipe:
    """What turns a sample's bytes into tensors: decoded, augmented, its caption chosen and tokenised.

    Args:
        augmentation: None for the exact preprocessing of inference.
        captions: the choice among several captions.
        preprocess: that of inference; by default OpenAI's.
        group: field of the samples' `.json` (or "cls") whose equal values make a group. Without one, and with several
            texts of an image, a sample is a group.
    """

    def __init__(
        self,
        image_size: int,
        context_length: int,
        augmentation: Augmentation | None,
        captions: CaptionChoice,
        preprocess: Preprocess | None = None,
        group: str | None = None,
    ) -> None:
        self.image_size, self.context_length, self.group = image_size, context_length, group
        self.augmentation, self.captions = augmentation, captions
        # Only its crop is used: pixels stay uint8.
        self.preprocess = preprocess or Preprocess(image_size, (0, 0, 0), (1, 1, 1))

    def sample(
        self, key: str, record: Record, info: Callable[[], dict[str, Any]], random: np.random.Generator
    ) -> Sample:
        """Raises whatever a damaged sample makes libraries raise; `hole` then takes its place.

        Args:
            info: returns the sample's facts; called only if a field of them is wanted.
        """
        if not record.image:
            raise ValueError("it has no image")
        captions = self.captions.choose_several(record.captions, info, random)
        group = self._own_group(key) if self.group is None else group_id(info(), self.group, key)
        if self.augmentation:
            image = self.augmentation.decode(record.image, self.preprocess, random)
        else:
            image = self.preprocess.crop(open_image(record.image, key))
        texts = [encode_for_model(caption, self.context_length + 1, truncate=True) for caption in captions]
        is_long = [len(ids) > self.context_length for ids in texts]
        cut = [
            [*ids[: self.context_length - 1], END_OF_TEXT] if long else ids
            for ids, long in zip(texts, is_long, strict=True)
        ]
        return Sample(image, cut, key, None, sum(is_long), group)

    def hole(self, key: str, error: Exception) -> Sample:
        """What stands for an unreadable sample; the mask takes it out of the loss."""
        blank = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
        return Sample(blank, [_HOLE], key, f"{type(error).__name__}: {error}", 0, self._own_group(key))

    def _own_group(self, key: str) -> int | None:
        return own_group(key) if self.group is not None or self.captions.per_image > 1 else None


class PairDataset(Dataset[Sample]):
    """The samples of shards as tensors, by `Recipe`. An unreadable one becomes a hole, never an exception.

    Args:
        ahead: called with epoch and index of each sample, before it is read.
    """

    def __init__(
        self,
        shards: Shards,
        image_size: int,
        context_length: int,
        augmentation: Augmentation | None,
        captions: CaptionChoice,
        seed: int,
        preprocess: Preprocess | None = None,
        ahead: Callable[[int, int], None] | None = None,
        group: str | None = None,
    ) -> None:
        self.shards, self.seed, self.ahead = shards, seed, ahead
        self.recipe = Recipe(image_size, context_length, augmentation, captions, preprocess, group)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        """place: (epoch, index of the sample)."""
        epoch, index = place
        random = np.random.default_rng([self.seed, epoch, index])
        key = f"sample {index}"
        if self.ahead is not None:
            self.ahead(epoch, index)
        try:
            key = self.shards.name(index)
            return self.recipe.sample(key, self.shards[index], lambda: self.shards.info(index), random)
        except Exception as error:  # a damaged sample can raise anything
            return self.recipe.hole(key, error)


def group_id(facts: Mapping[str, Any], name: str, key: str) -> int:
    """The group that a sample names, as a number of 64 bits, equal for equal values in all shards.

    A sample without a value (null, a blank text, or what programs write for one: `has_no_value`) is a group of its own.

    Args:
        facts: of the sample's `.json`, as `Shards.info` returns them.
        name: of the field.
        key: the sample's.

    Raises:
        ValueError: there is no such field, or it is no text, number or boolean.
    """
    if name not in facts:
        raise ValueError(f"its .json has no field {name!r} for its group; it has {', '.join(facts) or 'none'}")
    value = facts[name]
    if isinstance(value, dict | list):
        raise ValueError(f"its field {name!r} is {str(value)[:50]!r}; a group is one text or number")
    if has_no_value(value):
        return own_group(key)
    is_whole = isinstance(value, float) and value.is_integer()  # tables with gaps make 7.0 of 7
    text = str(int(value) if is_whole else value).strip()
    return hash64(b"group " + text.encode("utf-8", "surrogatepass"))


def own_group(key: str) -> int:
    """The group of a sample that shares its own with no other."""
    return hash64(b"sample " + key.encode("utf-8", "surrogatepass"))


def collate(
    samples: list[Sample], length_multiple: int = 1, context_length: int = 77, texts_per_image: int = 1
) -> Batch:
    """Stacks samples. Texts are padded to the longest of the batch, as the tower's work grows with the columns.

    With a `length_multiple` they are padded to its next multiple, at most to the context length. Every image gets
    `texts_per_image` rows of tokens, so that all processes have as many.
    """
    texts = [ids for sample in samples for ids in sample.texts + [_HOLE] * (texts_per_image - len(sample.texts))]
    longest = max(map(len, texts))
    length = max(longest, min(math.ceil(longest / length_multiple) * length_multiple, context_length))
    tokens = np.zeros((len(texts), length), dtype=np.int64)
    for row, ids in zip(tokens, texts, strict=True):
        row[: len(ids)] = ids
    # Images lie pixel by pixel; NumPy brings them into planes in half of torch.stack's time.
    images = np.empty((len(samples), *samples[0].image.shape), dtype=np.uint8)
    np.stack([sample.image.numpy() for sample in samples], out=images)
    there = [sample.problem is None and n < len(sample.texts) for sample in samples for n in range(texts_per_image)]
    groups = [sample.group for sample in samples for _ in range(texts_per_image) if sample.group is not None]
    return Batch(
        torch.from_numpy(images),
        torch.from_numpy(tokens),
        None if all(there) else torch.tensor(there),
        [sample.key for sample in samples],
        [f"{sample.key}: {sample.problem}" for sample in samples if sample.problem],
        sum(sample.num_truncated for sample in samples),
        torch.tensor([hash64(np.array(ids, dtype=np.int32).tobytes()) for ids in texts]),
        torch.tensor(groups) if groups else None,
    )


def hash64(data: bytes) -> int:
    """A hash that is equal in every process, unlike Python's own."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), signed=True)
