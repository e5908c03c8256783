"""metrics.csv, in which a full disk tears no row and loses none."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only

from ..common.files import atomic_write


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
