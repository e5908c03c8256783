"""What keeps a run's folder whole: one run in it at a time, and metrics.csv without torn or lost rows."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only

from ..common.files import atomic_write, locked, write_text

_HOLDER = "running.json"  # in the run's folder, while a run holds it: process, host, start
_ORPHANS_S = 20.0  # the data workers of a process that was killed end within this time, and hold its lock until then


@contextmanager
def hold(run: Path) -> Iterator[None]:
    """Keeps every other run out of a run's folder.

    Raises:
        ValueError: another run holds it; names its process, host and start.
    """
    holder = run / _HOLDER
    before = _describe(holder)
    busy = (
        f"{run} is in use by another run{f', {before}' if before else ''}; wait for it, or name another folder by "
        "--name. If that run is gone, delete the lock"
    )
    is_new = not run.exists()
    try:
        with locked(run / ".lock", busy, patience_s=0.0 if _may_be_alive(holder) else _ORPHANS_S):
            if before:
                print(f"{run}: an earlier run, {before}, was cut off; this run takes the folder over.", flush=True)
            now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
            facts = {"process": os.getpid(), "host": socket.gethostname(), "start": now}
            write_text(holder, json.dumps(facts) + "\n")
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
    finally:
        if is_new:
            with suppress(OSError):  # not empty
                run.rmdir()


def _read(holder: Path) -> dict[str, object]:
    try:
        return dict(json.loads(holder.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _describe(holder: Path) -> str:
    facts = _read(holder)
    return f"process {facts.get('process')} on {facts.get('host')}, started {facts.get('start')}" if facts else ""


def _may_be_alive(holder: Path) -> bool:
    facts = _read(holder)
    process = facts.get("process")
    if facts.get("host") != socket.gethostname() or not isinstance(process, int):
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


# ---------------------------------------------------------------------------------------------------------------------
# metrics.csv


class TableLogger(CSVLogger):
    """Lightning's CSV logger, for which a full disk is a warning: the rows are kept, and written when there is room."""

    @property
    @rank_zero_experiment
    def experiment(self) -> _Table:
        if not isinstance(self._experiment, _Table):
            self._experiment = _Table(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def save(self) -> None:
        try:
            super().save()
        except OSError as error:
            print(f"warning: the log could not be written ({error})", file=sys.stderr)


class _Table(ExperimentWriter):
    """Lightning's own appends rows that a full disk may tear, and empties the file to write it with a new column."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self._columns: list[str] = []  # of the file

    def save(self) -> None:
        if not self.metrics:
            return
        self._record_new_keys()
        path = Path(self.metrics_file_path)
        if self.metrics_keys == self._columns:
            _append(path, _csv(self.metrics, self._columns))
        else:
            rows = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))) if path.is_file() else ()
            header = {name: name for name in self.metrics_keys}
            with atomic_write(path) as file:
                file.write(_csv([header, *rows, *self.metrics], self.metrics_keys))
            self._columns = list(self.metrics_keys)
        self.metrics = []


def _csv(rows: Sequence[Mapping[str, Any]], columns: list[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue().encode()


def _append(path: Path, data: bytes) -> None:
    """Writes all of the data, or raises the OSError and leaves the file as it was."""
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, io.SEEK_END)
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(end)
            raise
