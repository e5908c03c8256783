"""`--overwrite true`: the files of the earlier run stay until the new one has begun."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ..common.wording import some
from . import run_settings

_ASIDE = ".overwritten"  # in each folder of a run, so that nothing is moved from one disk to another


class Overwriting(Callback):
    """Takes what a run wrote out of the way of a new one, and removes it at the new one's first batch.

    If that never comes, because of a mistake in a callback's settings or another run's checkpoint, the earlier run is
    as it was. What else lies there stays, and is printed.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._is_aside = False

    def __enter__(self) -> None:
        if kept := run_settings.others(self.run):
            names = some([str(path.relative_to(self.run)) for path in kept])
            print(f"{self.run} also holds what no run wrote, which stays: {names}")
        written = run_settings.results(self.run)
        self._is_aside = True
        try:
            for path in written:
                top, rest = _split(path.relative_to(self.run))
                aside = self.run / top / _ASIDE / rest
                aside.parent.mkdir(parents=True, exist_ok=True)
                path.rename(aside)
        except OSError:
            bring_back(self.run)
            raise
        _remove_emptied({folder for path in written for folder in path.parents if self.run in folder.parents})

    def __exit__(self, *_: Any) -> None:
        bring_back(self.run)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        if self._is_aside:
            self._is_aside = False
            asides = _asides(self.run)
            for aside in asides:
                shutil.rmtree(aside)
            _remove_emptied({aside.parent for aside in asides} - {self.run})


def bring_back(run: Path) -> None:
    """Of a new run that never began, or was killed before it did."""
    for aside in _asides(run):
        for path in sorted(aside.rglob("*")):
            if not path.is_dir():
                place = aside.parent / path.relative_to(aside)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
        shutil.rmtree(aside)


def _split(path: Path) -> tuple[str, Path]:
    """A run's folder, `.` for itself, and the path within."""
    top = path.parts[0] if len(path.parts) > 1 else "."
    return top, path.relative_to(top)


def _asides(run: Path) -> list[Path]:
    return [found for pattern in (_ASIDE, f"*/{_ASIDE}") for found in sorted(run.glob(pattern))]


def _remove_emptied(folders: set[Path]) -> None:
    for folder in sorted(folders, key=lambda path: -len(path.parts)):
        with suppress(OSError):  # not empty, or a link
            folder.rmdir()
