"""One tar -> the places of its samples' members: from the whole of it, or from its headers alone."""

from __future__ import annotations

import hashlib
import io
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from ...common.cache import Cache
from ...common.ranges import RangeFile, ReadWholeError
from ...common.storage import NotKeptError, Stamp, is_url, name_of, stamp_of, without_secrets
from ..reading.scan import LeftOut
from ..shard_index import Member, Sample, index_entry, zeros_at
from .tar_members import read_samples, with_content


@dataclass(frozen=True)
class IndexedTar:
    """
    Args:
        entry: for `index.json`; its `sha256` is None if the tar was not read as a whole.
        left_out: members that belong to no sample.
        bytes_read: of the tar.
        num_requests: in how many pieces they were read.
    """

    entry: dict[str, Any]
    left_out: list[LeftOut]
    bytes_read: int
    num_requests: int


def index_tar(
    location: str,
    offsets: Path,
    cache: Cache,
    by_headers: bool = False,
    is_over: threading.Event | None = None,
    stamp: Stamp | None = None,
) -> IndexedTar:
    """Writes the `.npz` of a tar. A remote one is fetched into the cache, unless its headers are enough.

    Args:
        by_headers: read all but the pictures, so that the index has no checksums of them and of the tar. A tar is read
            as a whole all the same where its server sends nothing else, or its pictures are so small that little is
            saved.
        is_over: once it is set, reading headers ends with an InterruptedError.
        stamp: the tar's, for who has asked for it.

    Raises:
        ValueError: it is no tar, or one that is damaged or cut short, or can't be read.
        NotKeptError: it can't be written to the cache, or its `.npz` can't be written.
    """
    stamp = stamp or stamp_of(location)
    pieces = RangeFile(location, (stamp.size or 0) if by_headers else 0, is_over, max_share=0.5)
    if pieces.size:
        with suppress(ReadWholeError):
            samples, left_out = _samples_of(cast(IO[bytes], pieces), location, skips_pictures=True)
            entry = _written_entry(location, pieces.size, samples, offsets, None)
            return IndexedTar(entry, left_out, pieces.bytes_read, pieces.num_requests)
    with cache.open(location, stamp.size, version=stamp.version) as file:
        samples, left_out = _samples_of(file, location, skips_pictures=False)
        file.seek(0)
        checksum = hashlib.file_digest(cast(io.BufferedIOBase, file), "sha256").hexdigest()
        size = file.tell()
        entry = _written_entry(location, size, samples, offsets, checksum, zeros_at(file, size))
    if is_url(location):
        cache.verified(location, checksum, stamp.version)
    return IndexedTar(entry, left_out, pieces.bytes_read + entry["bytes"], pieces.num_requests + 1)


def _written_entry(
    location: str, size: int, samples: list[Sample], offsets: Path, checksum: str | None, zeros: int | None = None
) -> dict[str, Any]:
    try:
        return index_entry(name_of(location), size, samples, offsets, checksum, zeros)
    except OSError as error:
        raise NotKeptError(
            f"the index of {without_secrets(location)} can't be written to {offsets}: {error}"
        ) from error


def _samples_of(file: IO[bytes], location: str, skips_pictures: bool) -> tuple[list[Sample], list[LeftOut]]:
    """The samples of a tar, their members read but for those that are skipped; and the members that are left out."""
    samples, left_out = read_samples(file, location, skips_pictures)
    kept = list(_without_bad_texts(samples, left_out))
    if not skips_pictures:  # a picture without a suffix is known as one by now
        for _, sample in kept:
            sample |= {kind: with_content(each, file) for kind, each in sample.items() if each.crc32 is None}
    return kept, left_out


def _without_bad_texts(samples: list[Sample], left_out: list[LeftOut]) -> Iterator[Sample]:
    """The samples whose text can be read; of one that has a label its text alone is left out."""
    for key, sample in samples:
        text: Member | None = sample.get("txt")
        if text is not None and not text.is_text:
            left_out.append(LeftOut(text.name, "a text that is not UTF-8"))
            del sample["txt"]
            if not {"cls", "npy"} & sample.keys():
                left_out += [LeftOut(member.name, "a member whose text is not UTF-8") for member in sample.values()]
                continue
        yield key, sample
