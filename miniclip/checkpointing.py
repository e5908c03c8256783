"""What a run keeps, so that it can be killed anywhere and gone on with."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn

from . import weights
from .files import atomic_write


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints appear whole under their name or not at all, and are read without running code.

    Lightning's own writer goes through the system's temporary folder, from where a move to another file system is
    not atomic.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if not Path(path).is_file():
            raise ValueError(f"no checkpoint {path} to resume from")
        return weights.read_torch_file(Path(path))


class LastCheckpoint(Callback):
    """Keeps `last.ckpt` every so many steps, at the end, and when Ctrl-C or SIGTERM asks the run to stop.

    The signal is only noted; the step it came in is finished, saved, and the program exits. An exception thrown
    wherever the signal happens to arrive could leave a half-made optimiser step behind. A second Ctrl-C stops at once.
    """

    def __init__(self, path: Path, every_n_steps: int, resume_command: str) -> None:
        self.path, self.every_n_steps, self.resume_command = path, every_n_steps, resume_command
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        if self.received is not None:
            there = "is the last checkpoint" if self.path.is_file() else "was not written yet"
            print(f"Stopped at once; {self.path} {there}.", file=sys.stderr, flush=True)
            raise KeyboardInterrupt
        self.received = number
        print("\nStopping when this step is done; once more stops at once.", file=sys.stderr, flush=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only now, after Lightning has installed its own handler, which on SIGTERM leaves without a checkpoint.
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        loop = trainer.fit_loop
        # A validation that is due at this step belongs to it: a run resumed from before would not make up for it.
        assert loop._data_fetcher is not None
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._end_of_step(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._end_of_step(trainer)

    def _end_of_step(self, trainer: pl.Trainer) -> None:
        # All processes must stop at the same step, and not all of them need have had the signal by now.
        received = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(received, reduce_op="max"))
        if number or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)
        if number:
            if trainer.training:
                trainer._logger_connector.update_train_step_metrics()  # the step's row, else written after this hook
            if trainer.is_global_zero:
                print(
                    f"Saved {self.path} at step {trainer.global_step}. To go on:\n  {self.resume_command}", flush=True
                )
            raise SystemExit(128 + number)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        """Deaf to signals meanwhile, so that even the impatient find a checkpoint."""
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in self._previous}
        trainer.save_checkpoint(self.path)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
