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

    A run that starts from a trained model is scored before its first step, too, and ends with before and after.

    Args:
        data: labelled images, as `miniclip eval --data` takes them.
        templates: name of a template set or a file; by default the data's own.
        batch_size: images per step.
        others: more of them by names of your own, logged as `val/zero_shot_acc1_NAME`: what a fine-tuned model should
            not forget. Their prompts are their own.
    """

    def __init__(
        self, data: str, templates: str | None = None, batch_size: int = 256, others: dict[str, str] | None = None
    ) -> None:
        self.data, self.templates, self.batch_size, self.others = data, templates, batch_size, others or {}
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.datasets = {"val/zero_shot_acc1": open_dataset(self.data, templates=self.templates)}
        for name, data in self.others.items():
            self.datasets[f"val/zero_shot_acc1_{name}"] = open_dataset(data)

    def _score(self, pl_module: pl.LightningModule) -> dict[str, float]:
        model = pl_module.clip
        assert isinstance(model, CLIP)
        preprocess = weights.preprocess_for(model.config)
        accuracies = {}
        for name, dataset in self.datasets.items():
            scores = zero_shot_scores(model, preprocess, dataset, batch_size=self.batch_size)
            accuracies[name] = float((scores.ranked[:, 0] == scores.labels).mean())
        return accuracies

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step or not getattr(pl_module, "starts_trained", False):
            return
        pl_module.eval()
        self.before = self._score(pl_module)
        pl_module.train()
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(self.before, step=0)
            print(f"before training: {_listed(self.before)}", flush=True)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after = self._score(pl_module)
        pl_module.log_dict(dict(self.after), sync_dist=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.before and self.after and trainer.is_global_zero:
            changes = [f"{name} {self.before[name]:.3f} → {self.after[name]:.3f}" for name in self.datasets]
            print(f"from before training to the last validation: {'  '.join(changes)}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "after": self.after}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.after = state_dict["before"], state_dict["after"]


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
            self._console.print(f"step {trainer.global_step}: {_listed(scores)}", highlight=False)

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


def _listed(scores: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
