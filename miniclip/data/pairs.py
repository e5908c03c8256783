"""A data set of pairs -> batches: pictures augmented, captions chosen and tokenized.

B batch, L text tokens, R side of an image in pixels."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..images import Preprocess, open_image
from ..tokenizer import END_OF_TEXT, START_OF_TEXT, encode_for_model
from .augmentation import Augmentation
from .reading.cells import texts_in
from .shards import Record, Shards


class Batch(NamedTuple):
    """A batch of training or validation.

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


class Sample(NamedTuple):
    image: Tensor  # (3, R, R) uint8
    ids: list[int]
    key: str
    problem: str | None = None
    is_truncated: bool = False


@dataclass(frozen=True)
class CaptionChoice:
    """The choice of a text for a sample's image.

    Args:
        order: "random", or "first" for the first text.
        fields: sources of texts and their weights: "txt", or fields of the sample's `.json`. With "random" a field is
            drawn by weight, then one of its lines. By default "txt" alone.
        line_weights: weights of the first, second, … line; the last holds for all further lines. By default equal.
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
            lines: the captions of the sample's `.txt`.
            info: returns the sample's `.json`; called only if a field of it is wanted.

        Raises:
            ValueError: the sample has no caption.
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


class Recipe:
    """What turns a sample's bytes into tensors: decoded, augmented, its caption chosen and tokenised.

    Args:
        augmentation: None for the exact preprocessing of inference.
        captions: the choice among several captions.
        preprocess: that of inference; by default OpenAI's.
    """

    def __init__(
        self,
        image_size: int,
        context_length: int,
        augmentation: Augmentation | None,
        captions: CaptionChoice,
        preprocess: Preprocess | None = None,
    ) -> None:
        self.image_size, self.context_length = image_size, context_length
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
        caption = self.captions.choose(record.captions, info, random)
        if self.augmentation:
            image = self.augmentation.decode(record.image, self.image_size, random)
        else:
            image = self.preprocess.crop(open_image(record.image, key))
        ids = encode_for_model(caption, self.context_length + 1, truncate=True)
        is_truncated = len(ids) > self.context_length
        if is_truncated:
            ids = [*ids[: self.context_length - 1], END_OF_TEXT]
        return Sample(image, ids, key, None, is_truncated)

    def hole(self, key: str, error: Exception) -> Sample:
        """What stands for an unreadable sample; the mask takes it out of the loss."""
        blank = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
        return Sample(blank, [START_OF_TEXT, END_OF_TEXT], key, f"{type(error).__name__}: {error}")


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
    ) -> None:
        self.shards, self.seed, self.ahead = shards, seed, ahead
        self.recipe = Recipe(image_size, context_length, augmentation, captions, preprocess)

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


def collate(samples: list[Sample], length_multiple: int = 1, context_length: int = 77) -> Batch:
    """Stacks samples. Texts are padded to the longest of the batch, as the tower's work grows with the columns.

    With a `length_multiple` they are padded to its next multiple, at most to the context length.
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
    """A hash that is equal in every process, unlike Python's own."""
    return int.from_bytes(hashlib.blake2b(np.array(ids, dtype=np.int32).tobytes(), digest_size=8).digest(), signed=True)
