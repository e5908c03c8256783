"""What a run tells while it goes: its bar, and its zero-shot score."""

from __future__ import annotations

import math
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from . import weights
from .data import TrainLoader
from .datasets import open_dataset
from .evaluate import zero_shot_scores
from .model import CLIP
from .training import log_every


class ZeroShotEvaluation(Callback):
    """Logs `val/zero_shot_acc1` at each validation: the score that a run is about, where labels are at hand.

    Args:
        data: labelled images, as `miniclip eval --data` takes them.
        templates: name of a template set or a file; by default the data's own.
        batch_size: images per step.
    """

    def __init__(self, data: str, templates: str | None = None, batch_size: int = 256) -> None:
        self.data, self.templates, self.batch_size = data, templates, batch_size

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.dataset = open_dataset(self.data, templates=self.templates)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = pl_module.scored
        assert isinstance(model, CLIP)
        preprocess = weights.preprocess_for(model.config)
        scores = zero_shot_scores(model, preprocess, self.dataset, batch_size=self.batch_size)
        accuracy = (scores.ranked[:, 0] == scores.labels).mean()
        pl_module.log("val/zero_shot_acc1", float(accuracy), sync_dist=True)


class RunProgress(ProgressBar):
    """One bar for the whole run: loss beside its chance level, accuracy, speed, and the share of time without data.

    Where the output is no terminal, a line at every fifth step that is logged.
    """

    def __init__(self) -> None:
        super().__init__()
        self._console = Console()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._restart(trainer)
        self._total = int(trainer.estimated_stepping_batches)
        if self._console.is_terminal and self.is_enabled:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[told]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=False)
            self._task = self._bar.add_task("", total=self._total, completed=trainer.global_step, told="")
            self._bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._images += len(batch.keys) * trainer.world_size
        step = trainer.global_step
        if step % log_every(trainer) == 0:
            seconds = time.perf_counter() - self._mark - self._paused
            waited = self._loader_waited(trainer) - self._waited
            images_per_s, wait = self._images / seconds, waited / seconds
            pl_module.log_dict({"train/images_per_s": images_per_s, "train/data_wait": wait})
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            told = (
                f"loss {metrics['train/loss']:.3f} (chance {metrics['train/chance']:.2f})  "
                f"accuracy {100 * metrics.get('train/accuracy', math.nan):.0f} %  "
                f"{images_per_s:.0f} images/s  waiting for data {100 * wait:.0f} %"
            )
            if self._bar:
                self._bar.update(self._task, told=told)
            elif self.is_enabled and step % (5 * log_every(trainer)) == 0:
                print(f"step {step}/{self._total}  {told}", flush=True)
            self._restart(trainer)
        if self._bar:
            self._bar.update(self._task, completed=step)

    def _restart(self, trainer: pl.Trainer) -> None:
        self._mark, self._images, self._paused, self._waited = time.perf_counter(), 0, 0.0, self._loader_waited(trainer)

    @staticmethod
    def _loader_waited(trainer: pl.Trainer) -> float:
        loader = trainer.train_dataloader
        return loader.waited_s if isinstance(loader, TrainLoader) else 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause_began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._paused += time.perf_counter() - self._pause_began
        scores = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        if scores and not trainer.sanity_checking and self.is_enabled:
            told = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
            self._console.print(f"step {trainer.global_step}: {told}", highlight=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    # Lightning's switches (trainer.enable_progress_bar, quiet ranks) arrive here.
    _is_on = True

    @property
    def is_enabled(self) -> bool:
        return self._is_on

    def enable(self) -> None:
        self._is_on = True

    def disable(self) -> None:
        self._is_on = False
