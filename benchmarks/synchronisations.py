"""Where the steps of a training run wait for the GPU: each place in the code, and how often a step.

    python benchmarks/synchronisations.py fit --config configs/digits.yaml … (all that train.py takes)

torch reports every wait except explicit ones (`torch.cuda.synchronize`). Logged steps are counted apart; the first step
and validations are not watched.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.table import Table

import miniclip
from miniclip.commands import train as command
from miniclip.training.measuring import is_logged

_WARNING = "called a synchronizing CUDA operation"
_PACKAGE = Path(miniclip.__file__).parent


class Watch(Callback):
    """Counts the waits from the first hook of one step to that of the next, and prints them at the end."""

    def __init__(self) -> None:
        self.waits: dict[bool, Counter[tuple[str, str]]] = {False: Counter(), True: Counter()}  # logged or not
        self.steps: Counter[bool] = Counter()
        self._is_watching = self._is_logged = False

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step < 1:
            return
        self._is_logged = is_logged(trainer, trainer.global_step + 1)
        self.steps[self._is_logged] += 1
        self._watch(True)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._watch(False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._watch(False)
        table = Table("a step", "a logged step", "where", "by", title=f"waits of {sum(self.steps.values())} steps")
        for place in sorted(self.waits[False] | self.waits[True], key=str):
            shares = [self.waits[logged][place] / max(1, self.steps[logged]) for logged in (False, True)]
            table.add_row(*(f"{share:.2f}" for share in shares), *place)
        Console(width=200).print(table)

    def _watch(self, is_on: bool) -> None:
        if is_on == self._is_watching:
            return
        self._is_watching = is_on
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn" if is_on else "default")
        if is_on:
            self._before = warnings.showwarning
            warnings.filterwarnings("always", message=f".*{_WARNING}.*")
            warnings.showwarning = self._note
        else:
            warnings.showwarning = self._before

    def _note(self, message: Any, *more: Any, **options: Any) -> None:
        if _WARNING not in str(message):
            self._before(message, *more, **options)
            return
        frames = [frame for frame in traceback.extract_stack()[:-1] if not frame.filename.endswith("warnings.py")]
        own = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames if _PACKAGE in Path(f.filename).parents]
        last = frames[-1]
        self.waits[self._is_logged][
            " < ".join(own[::-1][:3]) or "outside of miniclip", f"{Path(last.filename).name}:{last.lineno} {last.line}"
        ] += 1


if __name__ == "__main__":
    command.main([*sys.argv[1:], "--trainer.callbacks+=synchronisations.Watch"])
