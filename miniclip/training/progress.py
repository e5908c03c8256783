"""What a run prints (bar, lines, stalls), and the page that it writes."""

from __future__ import annotations

import datetime
import json
import math
import signal
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ..common.files import write_text
from ..common.storage import without_secrets
from ..common.watch import Watch, where_is
from ..common.wording import counted
from ..fast import matmul
from ..reports.results import versions
from ..reports.run_page import write_page
from ..reports.runs import PAGE_FILE, RUN_FILE
from .checkpoints import scored_data
from .lightning_private import is_logged
from .measuring import RunMetrics
from .stopping import is_out_of_time


class Stalls(Callback):
    """Prints since when a process has finished nothing (no step, no validation batch), and where its code is.

    Every process prints its own stack: the one that differs is the one that the others wait for.
    """

    silence_s = 120.0

    def __init__(self) -> None:
        self._watch = Watch(self._tell, self.silence_s)

    def start(self, trainer: pl.Trainer) -> None:
        """Called before any hook, because processes that do not find each other never reach one."""
        self._trainer, self._thread = trainer, threading.get_ident()
        self._ended("the start")
        self._watch.__enter__()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended("what comes before the first step")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._ended(f"step {trainer.global_step}")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._ended(f"batch {batch_idx + 1} of the validation at step {trainer.global_step}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended(f"the validation at step {trainer.global_step}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._watch.__exit__()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._watch.__exit__()

    def _ended(self, what: str) -> None:
        self._last = what
        self._watch.begin()

    def _tell(self, seconds: float) -> None:
        rank, world_size = self._trainer.global_rank, self._trainer.world_size
        who = f" in process {rank} of {world_size}" if world_size > 1 else ""
        print(
            f"Nothing has ended for {seconds:.0f} s{who} since {self._last}. It is at\n{where_is(self._thread)}\n",
            end="",  # one write, because other processes may print at the same time
            file=sys.stderr,
            flush=True,
        )


class RunProgress(ProgressBar):
    """One bar for the whole run: loss beside its chance level, accuracy, speed, and the share of time without data.

    Without a terminal it prints a line at every fifth logged step. Its numbers are those of the callbacks in
    `measuring.py`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._console = Console()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._total = int(trainer.estimated_stepping_batches)
        if self._console.is_terminal and self.is_enabled:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[summary]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=False)
            self._task = self._bar.add_task("", total=self._total, completed=trainer.global_step, summary="")
            self._bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if is_logged(trainer, step) and self.is_enabled:
            summary = _metrics_line({name: float(value) for name, value in trainer.callback_metrics.items()})
            if self._bar:
                self._bar.update(self._task, summary=summary)
            elif is_logged(trainer, step, of_those=5):
                print(f"step {step}/{self._total}  {summary}", flush=True)
        if self._bar:
            self._bar.update(self._task, completed=step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        scores = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        if scores and not trainer.sanity_checking and self.is_enabled:
            self._console.print(f"step {trainer.global_step}: {scores_line(scores)}", highlight=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    # Lightning switches the bar off on all ranks but 0.
    _is_on = True

    @property
    def is_enabled(self) -> bool:
        return self._is_on

    def enable(self) -> None:
        self._is_on = True

    def disable(self) -> None:
        self._is_on = False


def scores_line(scores: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3f}" for name, value in scores.items())


def _metrics_line(metrics: dict[str, float]) -> str:
    """The important metrics in one line of about 100 characters."""
    names = ("loss", "chance", "accuracy", "images_per_s", "mfu", "data_wait")
    loss, chance, accuracy, images_per_s, mfu, wait = (metrics.get(f"train/{name}", math.nan) for name in names)
    return (
        f"loss {loss:.3f} (chance {chance:.2f})  accuracy {100 * accuracy:.0f} %  {images_per_s:.0f} images/s  "
        f"MFU {100 * mfu:.0f} %  waiting for data {100 * wait:.0f} %"
    )


class RunReport(Callback):
    """Writes a run's page, `report.html` in its folder, at every kind of end.

    `run.json`, written beside the log at the start, holds what the page needs, so that `miniclip report` can make the
    page at any time. Without a log there is no page.

    Args:
        run: the run's folder.
        command: the command line that started it.
        monitor, monitor_mode: the metric that chooses the best checkpoint, and whether "max" or "min" is best.
    """

    def __init__(self, run: Path, command: str, monitor: str, monitor_mode: str) -> None:
        self.run, self.command, self.monitor, self.monitor_mode = run, command, monitor, monitor_mode

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (self._metrics,) = [c for c in trainer.callbacks if isinstance(c, RunMetrics)]  # type: ignore[attr-defined]
        self._began = time.time()
        self._first_step, self._max_steps = trainer.global_step, int(trainer.estimated_stepping_batches)
        self._write(trainer, "running")

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(trainer, "stopped by its limit of time" if is_out_of_time(trainer) else "finished")

    @rank_zero_only
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not hasattr(self, "_began"):
            return  # training has not started
        if isinstance(exception, SystemExit) and isinstance(exception.code, int) and exception.code > 128:
            status = f"stopped by {signal.Signals(exception.code - 128).name}"
        elif isinstance(exception, KeyboardInterrupt):
            status = "stopped"
        else:
            status = without_secrets(f"failed: {exception}")
        if self._end(trainer, status):
            print(f"Report: {self.run / PAGE_FILE}", flush=True)

    def _end(self, trainer: pl.Trainer, status: str) -> bool:
        """Whether the page could be written."""
        try:
            if self._write(trainer, status):
                write_page(self.run / PAGE_FILE, [self.run])
                return True
        except Exception as error:  # the run's own end, or error, matters more than its page
            print(f"warning: no page of the run could be written: {error}", file=sys.stderr)
        return False

    def _write(self, trainer: pl.Trainer, status: str) -> bool:
        """The record beside the log; False if nothing is logged."""
        logs = [Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        if not logs:
            return False
        data: Any = getattr(trainer, "datamodule", None)
        peak, now = self._metrics.peak, time.time()
        record = {
            "status": status,
            "command": self.command,
            "began": datetime.datetime.fromtimestamp(self._began).astimezone().isoformat(timespec="seconds"),
            "seconds": round(now - self._began, 1),
            "first_step": self._first_step,
            "step": trainer.global_step,
            "max_steps": self._max_steps,
            "monitor": self.monitor,
            "monitor_mode": self.monitor_mode,
            "validation_pairs": data.validation_pairs(),
            "labelled_images": scored_data(trainer, self.monitor),
            "batch_size": data.batch_size,
            "epoch_samples": data.epoch_samples(),
            "training_data": data.training_data(),
            "world_size": trainer.world_size,
            "device": _device_name(trainer),
            "precision": str(trainer.precision),
            "peak_tflops": None if peak is None else peak.flops / 1e12,
            "peak_source": None if peak is None else peak.source,
            "rejected": self._metrics.problems,
            "versions": versions() | {"lightning": version("pytorch_lightning")},
        }
        write_text(logs[0] / RUN_FILE, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        return True


def _device_name(trainer: pl.Trainer) -> str:
    where = trainer.strategy.root_device
    threads = counted(torch.get_num_threads(), "thread")
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{where.type.upper()}, {threads}"
    if where.type == "cpu":
        name += f", products by {matmul.TITLES[matmul.library()]}"
    return name if trainer.world_size == 1 else f"{trainer.world_size} × {name}"
