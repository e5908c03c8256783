"""What is indexed so far, a line for each tar: a call goes on where another stopped, and parts find together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.files import locked, naming
from ...common.storage import Stamp, stamps_of
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
        with self.locked(), naming(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(record)}\n")  # the line before may be torn

    def unchanged(self, tars: Sequence[str]) -> dict[str, Record]:
        """Those of the tars that are indexed, or found to be damaged, and have not been replaced since; by location.

        Each is asked for, and one that can't be is not among them.
        """
        records = [(tar, record) for tar, record in self._records(tars) if record["stamp"] is not None]
        asked = list(dict.fromkeys(tar for tar, _ in records))
        stamps = dict(zip(asked, stamps_of(asked, needs_all=False), strict=True))
        known: dict[str, Record] = {}
        for tar, record in records:
            with suppress(KeyError, TypeError, OSError):  # torn, or its offsets are gone
                if Stamp(*record["stamp"]) == stamps[tar] and self._is_valid(record):
                    known[tar] = record
        return known

    def latest(self, tars: Sequence[str]) -> dict[str, Record]:
        """Those of the tars that are indexed, or found to be damaged, by location; none of them is asked for."""
        known: dict[str, Record] = {}
        for tar, record in self._records(tars):
            with suppress(KeyError, TypeError, OSError):  # torn, or its offsets are gone
                # That a tar could not be asked for says nothing against what was found in it.
                if self._is_valid(record) and (record["stamp"] is not None or tar not in known):
                    known[tar] = record
        return known

    def _records(self, tars: Sequence[str]) -> list[tuple[str, Record]]:
        """The tar and the record of each line about one of the tars."""
        named, records = set(tars), list[tuple[str, Record]]()
        for line in self.path.read_text(encoding="utf-8").split("\n") if self.is_begun else ():
            with suppress(ValueError, KeyError, TypeError):  # empty, or torn
                record = json.loads(line)
                if record["tar"] in named and "stamp" in record:
                    records.append((record["tar"], record))
        return records

    def _is_valid(self, record: Record) -> bool:
        if "damaged" in record:
            return True
        entry = record["entry"]
        if self.needs_checksums and entry["sha256"] is None:
            return False
        offsets = (self.folder / entry["offsets"]).read_bytes()
        return hashlib.sha256(offsets).hexdigest() == entry["offsets_sha256"]
