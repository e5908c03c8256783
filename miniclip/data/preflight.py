"""Pairs -> what training on them would meet, found on a random sample before the first step.

Works on any sequence of pairs: of shards, or of a source that is not packed yet. `findings.py` counts what is seen
here, `advice.py` puts it into sentences."""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..common.pictures import thumbnail
from ..common.storage import is_url, read_bytes, without_secrets
from ..images import Preprocess, open_image, orientation, read_header
from .advice import what_spoils
from .augmentation import Augmentation
from .findings import Contact, Findings, Look, count
from .reading.pair import Pair
from .shards import Shards

if TYPE_CHECKING:
    from .pairs import CaptionChoice

_CONTACTS = 24
_CONTACT_BOX = (256, 128)  # pixels
_CHUNK = 64  # pairs that are read, then decoded
_TIMED_IMAGES, _TIMED_S, _BRIEF_S = 128, 2.0, 1.0


def sample_indices(total: int, samples: int | None, seed: int) -> list[int]:
    """A random sample of the indices below `total`, in order, so that reading stays local; None for all."""
    if samples is None or samples >= total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).choice(total, samples, replace=False).tolist())


def fetch(read: Callable[[int], Pair], index: int) -> tuple[Pair, bytes | str]:
    """A pair with its image's bytes, or with the reason why there are none."""
    pair = Pair(f"sample {index}")
    try:
        pair = read(index)
        if pair.problem or pair.image is None:
            return pair, pair.problem or "no image"
        return pair, read_bytes(pair.image)
    except Exception as error:  # libraries of the network, and of tables, raise anything
        return pair, message_of(error)


def message_of(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


def _look(fetched: tuple[Pair, bytes | str], with_thumbnail: bool = False) -> Look:
    pair, data = fetched
    try:
        if isinstance(data, str):
            raise ValueError(data)
        lines = [" ".join(caption.split()) for caption in pair.captions]
        captions = tuple(line for line in lines if line)
        if not captions:
            raise ValueError("every caption is empty" if lines else "it has no caption")
        image = open_image(data, "it")
        header = read_header(data)  # its mode before 16 bits became 8
        is_16_bits = header.mode.startswith("I") or (header.format == "PNG" and data[24] == 16)
        mode = header.mode + (", 16 bit" if is_16_bits else "")
        picture = thumbnail(image, _CONTACT_BOX) if with_thumbnail else ""
        digest, blank = hashlib.sha256(data).digest(), len(lines) - len(captions)
        facts = (image.size, header.format or "?", mode, orientation(header) != 1, digest, len(data), picture)
        return Look(without_secrets(pair.source), "", "", captions, blank, *facts)
    except Exception as error:  # a damaged picture can raise anything
        reason = message_of(error)
        return Look(without_secrets(pair.source), reason, reason_kind(reason, pair))


def reason_kind(reason: str, pair: Pair) -> str:
    """The reason without the sample's own names and numbers, so that equal ones can be counted."""
    known = [pair.source, pair.source.rpartition(":")[2], pair.image if isinstance(pair.image, Path | str) else ""]
    names = {part for name in map(str, known) for part in (name, Path(name).name, Path(name).stem + ".")} - {"", "."}
    names |= {without_secrets(name) for name in names}
    for name in sorted(names, key=len, reverse=True):
        rest = r"(\.\w+)" if name[-1] == "." else r"(?!\w)()"  # the suffix of a file that should lie beside it
        reason = re.sub(rf"(?<!\w){re.escape(name.removesuffix('.'))}{rest}", r"…\1", reason)
    return re.sub(r"\w+://\S+|(?<!\w)/\S+|(?<![\w-])(0x[0-9a-f]+|\d+)", "…", reason)


def examine(
    pairs: Sequence[Pair],
    *,
    source: str = "the data",
    samples: int | None = 2000,
    image_size: int = 224,
    context_length: int = 77,
    batch_size: int = 256,
    needed: float | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Findings:
    """Reads a random sample of the pairs, and counts what it holds.

    Args:
        samples: number of pairs to look at, drawn by the seed; None for all.
        needed: images/s that training consumes.
        workers: threads that read and decode; by default one a core.
        progress: called with the number of samples done, now and then.

    Raises:
        ValueError: there are no pairs, or an argument out of its range.
    """
    given = {"samples": (samples, 1), "image_size": (image_size, 1), "context_length": (context_length, 3)}
    for name, (value, least) in (given | {"batch_size": (batch_size, 2), "workers": (workers, 1)}).items():
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if needed is not None and not 0 < needed < math.inf:
        raise ValueError(f"needed is {needed}; it is a number of images a second, above 0")
    if not len(pairs):
        raise ValueError(f"no pairs found in {source}")
    indices = sample_indices(len(pairs), samples, seed)
    # More than are shown, as some may be unreadable.
    candidates = np.random.default_rng([seed, 1]).permutation(len(indices))[: 2 * _CONTACTS].tolist()
    looks: list[Look] = []
    timed: list[bytes] = []
    read_s, read_size = 0.0, 0
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        # Reading and decoding take turns, so that each can be timed.
        for start in range(0, len(indices), _CHUNK):
            begin = time.perf_counter()
            fetched = list(pool.map(lambda i: fetch(pairs.__getitem__, i), indices[start : start + _CHUNK]))
            read_s += time.perf_counter() - begin
            read_size += sum(len(data) for _, data in fetched if isinstance(data, bytes))
            looks += pool.map(_look, fetched, [start + place in candidates for place in range(len(fetched))])
            good = [d for (_, d), look in zip(fetched, looks[start:], strict=True) if not look.problem]
            timed += [data for data in good if isinstance(data, bytes)][: _TIMED_IMAGES - len(timed)]
            if progress:
                progress(len(looks))
    shown = [look for look in (looks[place] for place in candidates) if look.thumbnail][:_CONTACTS]
    return replace(
        count(looks, len(pairs), image_size, context_length, batch_size),
        source=without_secrets(source),
        needed=needed,
        read_bytes_per_s=read_size / read_s,
        decode_images_per_s=_decode_rate(timed, image_size),
        contacts=tuple(Contact(look.source, look.captions[0], look.thumbnail) for look in shown),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with one thread, as in a worker of the loader."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _decode_rate(images: Sequence[bytes], image_size: int) -> float:
    """Images/s that one core decodes and augments."""
    augmentation, random = Augmentation(), np.random.default_rng(0)
    preprocess = Preprocess(image_size, (0, 0, 0), (1, 1, 1))
    with one_thread():
        begin = time.perf_counter()
        for done, data in enumerate(images):
            if done == 1:
                begin = time.perf_counter()  # the first one waits for imports
            augmentation.decode(data, preprocess, random)
            if time.perf_counter() - begin > _TIMED_S:
                break
        return max(1, done) / (time.perf_counter() - begin) if images else 0.0


def brief(
    shards: Shards,
    context_length: int,
    batch_size: int,
    seed: int = 0,
    samples: int = 128,
    image_size: int = 224,
    captions: CaptionChoice | None = None,
    positives: str = "pair",
) -> list[str]:
    """Warnings about what would spoil training, from a glance at some random samples; none if all is well.

    The glance takes about a second at most, fetches nothing remote, and never raises for bad data.

    Args:
        positives: the setting of training; with "caption" and "group" no warning of equal captions is given.
    """

    there: set[str] = set()

    def read(index: int) -> Pair:
        name = shards.name(index)
        record = shards[index]
        texts = captions.texts(record.captions, lambda: shards.info(index)) if captions else {"txt": record.captions}
        there.update(name for name, found in texts.items() if found)
        lines = tuple(line for found in texts.values() for line in found)
        return Pair(name, record.image, lines, None if record.image else "no image")

    end = time.perf_counter() + _BRIEF_S
    indices = np.random.default_rng(seed).permutation(sample_indices(len(shards), samples, seed)).tolist()
    local = [index for index in indices if not is_url(shards.entries[shards.locate(index)[0]].location)]
    looks = [_look(fetch(read, index)) for index in local if time.perf_counter() < end]
    if not looks:
        return []
    wanted = (captions.fields if captions else None) or {}
    absent = [f"no sample looked at has the caption field {name!r}" for name in wanted if name not in there]
    findings = count(looks, len(shards), image_size, context_length, batch_size)
    return absent + what_spoils(findings, are_captions_shared=positives != "pair")
