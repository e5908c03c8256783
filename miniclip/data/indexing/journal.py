"""What is indexed so far, a line for each tar: a call goes on where another stopped, and parts find together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.files import locked
from ...common.storage import is_url
from ..shard_index import INDEX_FILE

# Of a tar: its location as `tar`, its `stamp`, and either `entry` and `left_out` or the reason as `damaged`.
Record = dict[str, Any]


@dataclass(frozen=True)
class Journal:
    """The file `index.partial.jsonl` of the folder that gets the index.

    Args:
        needs_checksums: tars that were indexed by their headers do not count.
    """

    folder: Path
    source: str
    needs_checksums: bool

    @property
    def path(self) -> Path:
        return self.folder / "index.partial.jsonl"

    @property
    def is_begun(self) -> bool:
        return self.path.is_file()

    def begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    def end(self) -> None:
        self.path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        with locked(self.folder / f".{INDEX_FILE}.lock", f"another process is indexing {self.source}"):
            yield

    def add(self, record: Record) -> None:
        """Opened anew for each line, so that the parts on a shared disk see each other's."""
        with self.locked(), open(self.path, "a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(record)}\n")  # the line before may be torn

    def read(self) -> dict[str, Record]:
        """The tars that are indexed, or found to be damaged, and have not been replaced since; by location."""
        known: dict[str, Record] = {}
        for line in self.path.read_text(encoding="utf-8").split("\n") if self.is_begun else ():
            try:
                record = json.loads(line)
                if self._is_valid(record):
                    known[record["tar"]] = record
            except (ValueError, KeyError, TypeError, OSError):
                continue  # empty, or torn; or the tar or its offsets are gone
        return known

    def _is_valid(self, record: Record) -> bool:
        if stamp_of(record["tar"]) != record["stamp"]:
            return False
        if "damaged" in record:
            return True
        entry = record["entry"]
        if self.needs_checksums and entry["sha256"] is None:
            return False
        offsets = (self.folder / entry["offsets"]).read_bytes()
        return hashlib.sha256(offsets).hexdigest() == entry["offsets_sha256"]


def stamp_of(location: str) -> list[int] | None:
    """Size and time of a local tar, which change when it is replaced."""
    if is_url(location):
        return None
    facts = Path(location).stat()
    return [facts.st_size, facts.st_mtime_ns]
