"""Features of images and texts, each computed once: split over processes, kept in a cache, resumed after a break.

All scores are computed from these, so other prompts, measures and probes need no second look at the images.

N images, T texts, E embedding.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import traceback
import unicodedata
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from .. import tokenizer
from ..common.arguments import check_count
from ..common.cache import make_room
from ..common.files import atomic_write, cache_folder, expand_home
from ..common.modules import evaluation_mode
from ..common.processes import all_gather_objects, own_indices, rank_and_world_size
from ..common.storage import is_url
from ..common.waiting import PatientLoader
from ..common.wording import some
from .datasets.sets import EvaluationSet
from .encoder import ModelError, collecting_cut, report_cut
from .fingerprints import digest_value

_PROMPTS_PER_BATCH = 256
_SAME_LENGTH = 8  # characters by which texts may differ to count as of one length
_SECONDS_BETWEEN_PARTS = 10.0  # as much work as a break may cost
_SCHEMA = "2"  # of the files in the cache; another number leaves the old ones alone


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


class FeatureCache:
    """Tensors by what they were computed from: the facts are the key, so nothing in it is ever out of date.

    A failed write is a warning: no cache is worth failing a run for.

    Args:
        folder: where; by default `cache_folder("features")`.
        limit_bytes: what was not used for longest is deleted so that all together has no more than this.
    """

    def __init__(self, folder: str | Path | None = None, limit_bytes: int = 20 * 10**9) -> None:
        self.folder = cache_folder("features") if folder is None else expand_home(folder)
        self.limit_bytes = limit_bytes

    @staticmethod
    def key(*facts: Any) -> str | None:
        """The key of what is computed from these; None if one is unknown, so that nothing is kept."""
        if None in facts:
            return None
        return hashlib.sha256(json.dumps([_SCHEMA, *facts], ensure_ascii=False).encode()).hexdigest()

    def read(self, key: str) -> dict[str, Tensor] | None:
        """What was written as a whole; None if there is none."""
        path = self._path(key)
        tensors = _read_kept(path)
        if tensors is not None:
            with suppress(OSError):  # someone else's, or on a disk that can only be read
                os.utime(path)
        return tensors

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the parts."""
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        with self._as_far_as_possible():
            make_room(self.folder.glob("[0-9a-f]" * 64 + ".*"), self.limit_bytes - len(data))
            with atomic_write(self._path(key)) as file:
                file.write(data)
            shutil.rmtree(self._parts(key), ignore_errors=True)

    def read_parts(self, key: str) -> Iterator[dict[str, Tensor]]:
        """The parts that interrupted runs left."""
        for path in sorted(self._parts(key).glob("*.safetensors")):
            if (tensors := _read_kept(path)) is not None:
                yield tensors

    def write_part(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        data = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        with self._as_far_as_possible(), atomic_write(self._parts(key) / f"{uuid.uuid4().hex}.safetensors") as file:
            file.write(data)

    @contextmanager
    def _as_far_as_possible(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = error.strerror or error
            warnings.warn(
                f"features can't be kept in {self.folder}: {why}; another run computes them anew", stacklevel=4
            )

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _parts(self, key: str) -> Path:
        return self.folder / f"{key}.parts"


def open_cache(folder: str | None, is_wanted: bool = True) -> FeatureCache | None:
    """The cache of a command; None if none is wanted, or none is named and the user has no home (then with a warning).

    Raises:
        ValueError: the folder is below `~` and there is no home.
    """
    if not is_wanted:
        return None
    try:
        return FeatureCache(folder)
    except ValueError as error:
        if folder is not None:
            raise
        warnings.warn(f"features are not kept: {error}", stacklevel=2)
        return None


def _read_kept(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_file(path)
    except (OSError, SafetensorError):  # not there, another user's, or damaged by what is not ours: computed anew
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Texts


def own_tokenize(model: Any) -> Callable[[list[str]], Tensor]:
    """CLIP's tokenizer for the model's context length."""
    return partial(tokenizer.tokenize, context_length=getattr(model, "context_length", tokenizer.CONTEXT_LENGTH))


@torch.no_grad()  # what is sliced over processes can't do without autograd's bookkeeping
def encode_texts(
    model: Any,
    texts: Sequence[str],
    tokenize: Callable[[list[str]], Any],
    progress: Callable[[int], Any] | None = None,
) -> Tensor:
    """Unit features (T, E) of texts, each text once.

    Texts of equal tokens have equal features, bit for bit. Texts of about one length are together, as the longest of a
    batch sets its cost on a GPU, and of those the ones with a common prefix, which a CPU computes once.

    Where there are several processes, all call this with the same texts, and each encodes its part of the batches.

    Args:
        progress: called with the number of different texts done.
    """
    with collecting_cut() as cut:
        features, stands_for = _encode_unique(model, texts, tokenize, progress)
    rank, world_size = rank_and_world_size()
    if world_size > 1:
        cut = {text: why for of_rank in all_gather_objects(cut) for text, why in of_rank.items()}
    if cut and not rank:
        why = {text: cut[first] for text, first in stands_for.items() if first in cut}
        report_cut([text for text in texts if text in why], len(texts), why)
    return features


def _encode_unique(
    model: Any, texts: Sequence[str], tokenize: Callable[[list[str]], Any], progress: Callable[[int], Any] | None
) -> tuple[Tensor, dict[str, str]]:
    """What `encode_texts` gives, and the text that stands for each."""
    stands_for = _representatives(texts, tokenize)
    unique = sorted(set(stands_for.values()), key=lambda text: (len(text) // _SAME_LENGTH, text))
    batches = [unique[start : start + _PROMPTS_PER_BATCH] for start in range(0, len(unique), _PROMPTS_PER_BATCH)]
    own = own_indices(len(batches))
    parts = []
    for number in own:
        tokens = tokenize(batches[number])
        with evaluation_mode(model):
            features = model.encode_text(tokens)
        _refuse_other_count(features, len(batches[number]), "texts")
        parts.append(F.normalize(features.float(), dim=-1))
        if progress:
            progress(round(len(parts) * len(unique) / len(own)))
    if rank_and_world_size()[1] > 1:
        device = parts[0].device
        of_all = all_gather_objects([part.cpu() for part in parts])
        parts = [part.to(device) for each in of_all for part in each][: len(batches)]
    row = {text: position for position, text in enumerate(unique)}
    return torch.cat(parts)[[row[stands_for[text]] for text in texts]], stands_for


def _representatives(texts: Sequence[str], tokenize: Callable[[list[str]], Any]) -> dict[str, str]:
    """Each text, and the first of those with the same tokens. Only texts that look alike are compared."""
    alike: dict[str, list[str]] = {}
    for text in dict.fromkeys(texts):
        alike.setdefault(" ".join(unicodedata.normalize("NFKC", text).casefold().split()), []).append(text)
    found = {}
    for group in alike.values():
        first: dict[str | None, str] = {}
        for text in group:
            tokens = digest_value(tokenize([text])) if len(group) > 1 else None
            found[text] = text if tokens is None else first.setdefault(tokens, text)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Images


@dataclass(frozen=True)
class ImageFeatures:
    """A model's features of the images of a data set.

    Args:
        indices: (N,) which of the data's images could be read, in order.
        features: (N, E) of those, as the model gives them, in float32 on the CPU.
        unreadable: why the other images could not be read.
    """

    data: EvaluationSet
    indices: np.ndarray
    features: Tensor
    unreadable: tuple[str, ...]

    @cached_property
    def unit(self) -> Tensor:
        """(N, E) of length 1."""
        return F.normalize(self.features, dim=-1)


class _Images(Dataset[tuple[Tensor | str | ModelError, bytes | None]]):
    """Prepared images, or why there is none, and what `digest_stored` gives of each if that is asked for."""

    def __init__(
        self,
        data: EvaluationSet,
        preprocess: Callable[[Image.Image], Tensor],
        indices: list[int],
        needs_digests: bool,
    ) -> None:
        self.data, self.preprocess, self.indices, self.needs_digests = data, preprocess, indices, needs_digests

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor | str | ModelError, bytes | None]:
        index = self.indices[position]
        digest: bytes | None = b""
        try:
            stored = self.data.stored(index)
            digest = digest_stored(stored) if self.needs_digests else None
            return self.preprocess(self.data.decoded(stored, index)), digest
        except ModelError as error:  # no fault of the image's
            if get_worker_info() is not None:  # a cause is lost on the way to the main process
                error.add_note(traceback.format_exc())
            return error, digest
        except ValueError as error:
            return str(error), digest


def digest_stored(stored: Image.Image | bytes) -> bytes | None:
    """Stands for the bytes of an image's file; None of a picture that was opened before."""
    return hashlib.sha256(stored).digest() if isinstance(stored, bytes) else None  # of which CPUs have instructions


class _ImageLoader(PatientLoader[Any]):
    """
    Args:
        opened: the images.
    """

    num_received = 0  # batches

    def __init__(self, opened: _Images, batch_size: int, num_workers: int) -> None:
        super().__init__(opened, batch_size, num_workers=num_workers, collate_fn=list)
        self.opened, self.images_per_batch = opened, batch_size

    def needed(self) -> str:
        begin = self.num_received * self.images_per_batch
        indices = self.opened.indices[begin : begin + self.images_per_batch]
        names = sorted(map(self.opened.data.shown, indices), key=lambda name: not is_url(name))  # the network first
        return some(names) or super().needed()


@dataclass(frozen=True)
class EncodedBatch:
    """Images that went through the model together.

    Args:
        indices: (b,) of those that could be read, as indices of the data, in the order of the pass.
        features: (b, E) of those, as the model gives them, in float32 on the CPU.
        problems: why others could not be read, by index.
        digests: what `digest_stored` gives of all of them, by index, if that was asked for; empty where there was
            nothing to read.
    """

    indices: np.ndarray
    features: Tensor
    problems: Mapping[int, str]
    digests: Mapping[int, bytes | None] = field(default_factory=dict)


def encode_in_batches(
    encode: Callable[[Tensor], Tensor],
    preprocess: Callable[[Image.Image], Tensor],
    data: EvaluationSet,
    indices: Sequence[int] | np.ndarray,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    num_workers: int = 0,
    needs_digests: bool = False,
) -> Iterator[EncodedBatch]:
    """One pass over some images of a data set, in the order of `indices`; only a few batches are in memory.

    Args:
        encode: (B, 3, R, R) on `device` -> (B, E).
        preprocess: PIL image to (3, R, R).
        num_workers: processes that decode; no more than there are batches, and none for a single one.

    Raises:
        ValueError: a batch size or a number of workers that is none; features that are zero or not finite.
    """
    batch_size, num_workers = check_count("batch_size", batch_size), check_count("num_workers", num_workers, 0)
    places = [int(index) for index in indices]
    num_batches = -(-len(places) // batch_size)
    num_workers = min(num_workers, num_batches) if num_batches > 1 else 0
    opened = _Images(data, preprocess, places, needs_digests)
    loader = _ImageLoader(opened, batch_size, num_workers)
    blank: Tensor | None = None  # in place of what can't be read, so that all processes take the same steps
    for number, received in enumerate(loader if places else ()):
        loader.num_received = number + 1
        batch = [image for image, _ in received]
        for image in batch:
            if isinstance(image, ModelError):
                raise image
        if blank is None:
            readable = [image for image in batch if isinstance(image, Tensor)]
            blank = readable[0] if readable else preprocess(Image.new("RGB", (32, 32)))
        images = _stacked([blank if isinstance(image, str) else image for image in batch])
        with torch.no_grad():
            features = encode(images.to(device, non_blocking=images.is_pinned())).float().cpu()  # (b, E)
        _refuse_other_count(features, len(batch), "images")
        is_healthy = torch.tensor([isinstance(image, Tensor) for image in batch])
        if not is_healthy.all():
            features = features[is_healthy]
        _refuse_without_direction(features, data.name)
        own = np.array(places[number * batch_size : number * batch_size + len(batch)], dtype=np.int64)
        problems = {int(i): image for i, image in zip(own, batch, strict=True) if isinstance(image, str)}
        digests = {int(i): digest for i, (_, digest) in zip(own, received, strict=True)} if needs_digests else {}
        yield EncodedBatch(own[is_healthy.numpy()], features, problems, digests)


def _stacked(images: Sequence[Tensor]) -> Tensor:
    if others := [image for image in images if image.shape != images[0].shape]:
        shapes = f"{tuple(images[0].shape)} and {tuple(others[0].shape)}"
        raise ValueError(f"the model's preprocessing gives the shapes {shapes}; those of a batch must be equal")
    if not torch.cuda.is_initialized():
        return torch.stack(list(images))
    # A GPU copies from pages that stay where they are, several times as fast as from others.
    out = images[0].new_empty((len(images), *images[0].shape), pin_memory=images[0].device.type == "cpu")
    return torch.stack(list(images), out=out)


def _refuse_other_count(features: Tensor, count: int, what: str) -> None:
    if len(features) != count:
        raise ValueError(f"the model gives {len(features)} vectors of features for {count} {what}; one each is needed")


@torch.no_grad()  # as above
def encode_images(
    encode: Callable[[Tensor], Tensor],
    preprocess: Callable[[Image.Image], Tensor],
    data: EvaluationSet,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    num_workers: int = 0,
    cache: FeatureCache | None = None,
    key: str | None = None,
    progress: Callable[[int], Any] | None = None,
) -> ImageFeatures:
    """Features of every image that can be read; each process encodes a share, where there are several.

    Args:
        encode, preprocess, num_workers: as in `encode_in_batches`.
        cache: with `key`, which stands for model, preprocessing and images, nothing is computed twice: what a run
            that was stopped has done counts, with any number of processes and any batch size.
        progress: called with the number of images done, of all processes'.

    Returns:
        The same in every process, for any number of processes and any batch size, but for rounding.

    Raises:
        ValueError: not one image could be read, or the features are zero or not finite.
    """
    kept = _Kept(cache, key, data) if cache is not None and key is not None and rank_and_world_size()[0] == 0 else None
    known: np.ndarray = all_gather_objects(kept.indices if kept else np.zeros(0, dtype=np.int64))[0]
    missing = np.setdiff1d(np.arange(len(data)), known)
    if progress and len(known):
        progress(len(known))
    own = missing[np.array(own_indices(len(missing)), dtype=np.int64)]
    batches: list[EncodedBatch] = []
    unsaved, saved_at = 0, time.monotonic()  # the first of `batches` that no file has

    def save_part() -> None:
        if cache is not None and key is not None and batches[unsaved:]:
            cache.write_part(key, _tensors_of(batches[unsaved:]))

    try:
        for batch in encode_in_batches(
            encode, preprocess, data, own, device=device, batch_size=batch_size, num_workers=num_workers
        ):
            batches.append(batch)
            if progress:
                done = min(len(batches) * batch_size, len(own))
                progress(len(known) + round(done * len(missing) / len(own)))
            if time.monotonic() - saved_at > _SECONDS_BETWEEN_PARTS:
                save_part()
                unsaved, saved_at = len(batches), time.monotonic()
    except BaseException:  # Ctrl-C, too
        save_part()
        raise
    shares = all_gather_objects((_tensors_of(batches), _problems_of(batches)))
    problems = {index: problem for _, each in shares for index, problem in each.items()}
    unreadable = tuple(problems[index] for index in sorted(problems))
    parts = [tensors for tensors, _ in shares if tensors["indices"].numel()]
    if len(known):
        parts = [all_gather_objects(kept.tensors if kept else {})[0], *parts]
    if not parts:
        raise ValueError(f"none of the {len(data)} images of {data.name} can be read; the first: {unreadable[0]}")
    found = _merged(parts)
    if kept and not kept.is_whole(len(found["indices"])):
        cache.write(key, found)  # type: ignore[union-attr, arg-type]
    return ImageFeatures(data, found["indices"].numpy(), found["features"], unreadable)


def _tensors_of(batches: Sequence[EncodedBatch]) -> dict[str, Tensor]:
    """What is kept of some batches, and sent to other processes."""
    if not batches:
        return {"indices": torch.zeros(0, dtype=torch.int64)}
    indices = torch.from_numpy(np.concatenate([batch.indices for batch in batches]))
    return {"indices": indices, "features": torch.cat([batch.features for batch in batches])}


def _merged(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """In the order of the indices, each once: the last of all is encoded several times to keep processes in step."""
    indices, first = np.unique(torch.cat([part["indices"] for part in parts]).numpy(), return_index=True)
    rows = torch.cat([part["features"] for part in parts])[torch.from_numpy(first)]
    return {"indices": torch.from_numpy(indices), "features": rows}


def _problems_of(batches: Sequence[EncodedBatch]) -> dict[int, str]:
    return {index: problem for batch in batches for index, problem in batch.problems.items()}


def _refuse_without_direction(features: Tensor, name: str) -> None:
    if not torch.isfinite(features).all():
        raise ValueError(f"the model gives features that are not finite, for images of {name}")
    if not features.any(dim=1).all():
        raise ValueError(f"the model gives features that are zero, for images of {name}; a cosine needs a direction")


class _Kept:
    """What the cache has of a data set: a whole run, the parts of some that were stopped, or nothing."""

    def __init__(self, cache: FeatureCache, key: str, data: EvaluationSet) -> None:
        whole = cache.read(key)
        parts = [part for part in (whole, *cache.read_parts(key)) if part is not None and part["indices"].numel()]
        self._num_whole = 0 if whole is None else len(whole["indices"])
        self.tensors = _merged(parts) if parts else {"indices": torch.zeros(0, dtype=torch.int64)}
        self.indices = self.tensors["indices"].numpy()
        assert not len(self.indices) or self.indices[-1] < len(data)

    def is_whole(self, num_images: int) -> bool:
        """Whether the file of a whole run has so many."""
        return self._num_whole == num_images
