"""A remote file of which only the blocks around what is read are fetched."""

from __future__ import annotations

import io
import math
import threading

from .storage import read_range

# Of a request. Headers, text and facts between two pictures, as webdataset's writer leaves them, fit into the smallest.
_SMALLEST_BYTES, _LARGEST_BYTES = 2**13, 2**20
_TRIAL_BYTES = 2**18


class ReadWholeError(Exception):
    """The file had better be read as a whole: its server sends nothing else, or ranges save too little."""


class RangeFile(io.RawIOBase):
    """A remote file to seek and read in. A read that goes on where the last block ended fetches twice as much.

    Args:
        size: its bytes.
        is_over: once it is set, a read that needs the file raises InterruptedError.
        max_share: of the bytes up to where it is read; to fetch more than that is not worth the requests.

    Attributes:
        bytes_read: what was fetched of it, in `num_requests` requests.
    """

    def __init__(
        self, url: str, size: int, is_over: threading.Event | None = None, max_share: float = math.inf
    ) -> None:
        self.url, self.size, self.max_share = url, size, max_share
        self.is_over = is_over or threading.Event()
        self.bytes_read = self.num_requests = 0
        self._position = self._start = 0
        self._block = b""

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        """
        Raises:
            ReadWholeError: the server sends whole files alone, or `max_share` is exceeded.
            ValueError: the file can't be read.
        """
        end = self.size if size < 0 else min(self.size, self._position + size)
        data = bytearray()
        while self._position < end:
            if not 0 <= self._position - self._start < len(self._block):
                self._fetch(end)
            part = self._block[self._position - self._start :][: end - self._position]
            data += part
            self._position += len(part)
        return bytes(data)

    def _fetch(self, end: int) -> None:
        """The block that begins at the position, and reaches to `end` if that is not too far."""
        follows = self._position == self._start + len(self._block)
        wanted = max(2 * len(self._block) if follows else 0, end - self._position, _SMALLEST_BYTES)
        stop = min(self.size, self._position + min(wanted, _LARGEST_BYTES))
        if self.is_over.is_set():
            raise InterruptedError(self.url)
        block = read_range(self.url, self._position, stop, self.size)
        if block is None:
            raise ReadWholeError(self.url)
        self._start, self._block = self._position, block
        self.bytes_read += len(block)
        self.num_requests += 1
        if stop > _TRIAL_BYTES and self.bytes_read > self.max_share * stop:
            raise ReadWholeError(self.url)
