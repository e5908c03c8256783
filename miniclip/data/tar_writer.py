"""A shard that is being written: by webdataset's writer, hashed on its way to the disk."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from ..common.files import naming
from .shard_index import Member, Sample, index_entry, kind_of, zeros_at

_BUFFER_BYTES = 4 << 20


class Tar:
    """A tar and the places of its members. The same samples give the same bytes."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, _HashedFile(path)
        self.writer = TarWriter(self.file, encoder=False, mtime=0, user="", group="", mode=0o644)
        self.samples: list[Sample] = []

    @property
    def size(self) -> int:
        """Bytes so far, without the tar's end."""
        return self.writer.tarstream.offset

    def write(self, key: str, members: dict[str, bytes]) -> None:
        """Adds a sample, from its members by suffix, in the order that webdataset gives them."""
        places: dict[str, Member] = {}
        self.samples.append((key, places))
        for suffix, data in sorted(members.items()):
            with naming(self.path, self.path):
                self.writer.write({"__key__": key, suffix: data})
            offset = self.size - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            places[str(kind_of(suffix))] = Member(f"{key}.{suffix}", offset, len(data), zlib.crc32(data))

    def close(self) -> dict[str, Any]:
        """Its entry for `index.json`."""
        with naming(self.path, self.path):
            self.writer.close()
            checksum = self.file.close()
        size, offsets = self.path.stat().st_size, self.path.with_suffix(".npz")
        with open(self.path, "rb") as file:
            zeros = zeros_at(file, size)
        return index_entry(self.path.name, size, self.samples, offsets, checksum, zeros)


class _HashedFile:
    """A file to append to, in large pieces, each hashed by a thread while it is written."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115 (closed below)
        self.buffer = bytearray()
        self.digest, self.hashing = hashlib.sha256(), ThreadPoolExecutor(1)
        self.hashed: deque[Future[None]] = deque()

    def write(self, data: bytes) -> None:
        self.buffer += data
        if len(self.buffer) >= _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        piece, self.buffer = memoryview(self.buffer), bytearray()
        self.hashed.append(self.hashing.submit(self.digest.update, piece))
        while piece:
            piece = piece[self.file.write(piece) :]
        if len(self.hashed) > 4:  # it must not fall behind by more than memory holds
            self.hashed.popleft().result()

    def close(self) -> str:
        """The SHA-256 of all, which is on the disk then."""
        self._flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self.hashing.shutdown()
        return self.digest.hexdigest()
