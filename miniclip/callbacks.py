"""What a run tells: its bar and its measurements while it goes, its zero-shot score, and a page at the end."""

from __future__ import annotations

import datetime
import json
import math
import signal
import sys
import threading
import time
from collections import Counter
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from . import device, weights
from .convert import forward_flops
from .curves import PAGE_FILE, RUN_FILE, write_page
from .data import Batch, PairLoader
from .datasets import labelled, open_dataset
from .evaluate import zero_shot_scores
from .files import write_text
from .model import CLIP, VisionTransformer
from .recompute import drop_patches_in_training
from .results import versions
from .terminal import Watch, where_is
from .timm_tower import TimmTower
from .training import CLIPTraining, is_logged

_MOST_REASONS = 100  # rejected samples of which a run's record keeps the reason


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
        self.datasets = {"val/zero_shot_acc1": labelled(open_dataset(self.data, templates=self.templates))}
        for name, data in self.others.items():
            self.datasets[f"val/zero_shot_acc1_{name}"] = labelled(open_dataset(data))

    def _score(self, pl_module: pl.LightningModule) -> dict[str, float]:
        model = pl_module.scored
        assert isinstance(model, CLIP)
        preprocess = weights.preprocess_for(model.config)
        accuracies = {}
        for name, dataset in self.datasets.items():
            with torch.compiler.set_stance("force_eager"):  # as in all of validation, before the first step as well
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
                logger.log_metrics(self.before, step=-1)  # that of the first step is 0
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


class RunMetrics(Callback):
    """Logs, at every step that is logged, what the steps since the last one took and went through.

    Between those steps it only adds up numbers that the host has at hand; no GPU is waited for.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CLIPTraining)
        self._cost = StepCost(pl_module.clip, pl_module.patch_dropout)
        self.peak: device.Peak | None = None
        if trainer.is_global_zero:  # now, as nothing else uses the device yet
            self.peak = device.peak(trainer.strategy.root_device, str(trainer.precision))
        self._samples = self._rejected = self._truncated = 0
        self.problems: list[str] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        num_texts, num_tokens = batch.tokens.shape
        self._num_texts[num_tokens] += num_texts
        self._rejected += len(batch.problems)
        self._truncated += batch.num_truncated
        self.problems += batch.problems[: _MOST_REASONS - len(self.problems)]
        if not is_logged(trainer, trainer.global_step):
            return
        seconds = time.perf_counter() - self._mark - self._paused
        waited = self._loader_waited(trainer) - self._waited
        num_images = sum(self._num_texts.values()) * trainer.world_size
        flops = self._cost.flops(self._num_texts) / seconds * trainer.world_size
        measured = {
            "images_per_s": num_images / seconds,
            "data_wait": waited / seconds,
            "tflops": flops / 1e12,
            "memory_gb": device.memory_gb(trainer.strategy.root_device),
            "samples": trainer.global_step * num_texts * trainer.world_size,
        }
        if self.peak is not None:
            measured["mfu"] = flops / (self.peak.flops * trainer.world_size)
        pl_module.log_dict({f"train/{name}": value for name, value in measured.items()})
        counts = {"train/rejected": float(self._rejected), "train/truncated": float(self._truncated)}
        pl_module.log_dict(counts, sync_dist=trainer.world_size > 1, reduce_fx="sum")
        self._restart(trainer)

    def _restart(self, trainer: pl.Trainer) -> None:
        self._mark, self._paused, self._waited = time.perf_counter(), 0.0, self._loader_waited(trainer)
        self._num_texts: Counter[int] = Counter()  # by their length in tokens

    @staticmethod
    def _loader_waited(trainer: pl.Trainer) -> float:
        loader = trainer.train_dataloader
        return loader.waited_s if isinstance(loader, PairLoader) else 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause_began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._paused += time.perf_counter() - self._pause_began


class Stalls(Callback):
    """Where a process ends nothing for long - no step, no batch of a validation - it says since when, and where it is.

    Of several processes each speaks for itself: the one whose place differs is the one that the others wait for.
    """

    silence_s = 120.0

    def __init__(self) -> None:
        self._watch = Watch(self._tell, self.silence_s)

    def start(self, trainer: pl.Trainer) -> None:
        """From here on: a hook would be too late, as processes that do not find each other come to none."""
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
            end="",  # in one piece, as others may speak at the same time
            file=sys.stderr,
            flush=True,
        )


class StepCost:
    """Floating-point operations that the towers take, forward and backward, as the architecture alone decides.

    A backward pass counts twice the forward one, and is left out for a tower that is not trained. Encoding once more,
    as micro-batches do, does not count: it is a price of memory, and no part of the model.
    """

    def __init__(self, clip: CLIP, patch_dropout: float = 0.0) -> None:
        image = clip.visual.trunk if isinstance(clip.visual, TimmTower) else clip.visual  # beside which a head is small
        self._passes = {
            name: 3 if any(p.requires_grad for p in tower.parameters()) else 1
            for name, tower in (("image", image), ("text", clip.text))
        }
        with torch.device("meta"):
            self._clip = CLIP(clip.config).eval()
            side = self._clip.visual.input_resolution
            if patch_dropout and isinstance(self._clip.visual, VisionTransformer):
                drop_patches_in_training(self._clip.visual.transformer, patch_dropout)
                self._clip.visual.train()
            self._image = self._passes["image"] * forward_flops(self._clip.visual, torch.zeros(1, 3, side, side))
        # Products grow with the length of the text and attention with its square, so three lengths tell all others.
        counts = []
        for length in range(1, min(3, clip.context_length) + 1):
            tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
            counts.append(self._passes["text"] * forward_flops(self._clip.text, tokens))
        self._text = [counts[0]]  # at length 1, and its differences (Newton's forward interpolation)
        while len(counts) > 1:
            counts = [after - before for before, after in pairwise(counts)]
            self._text.append(counts[0])

    def flops(self, num_texts: dict[int, int]) -> int:
        """Of so many texts of each length in tokens, padding included, with an image each."""
        total = 0
        for length, number in num_texts.items():
            text = sum(math.comb(length - 1, order) * difference for order, difference in enumerate(self._text))
            total += number * (self._image + text)
        return total


class RunProgress(ProgressBar):
    """One bar for the whole run: loss beside its chance level, accuracy, speed, and the share of time without data.

    Where the output is no terminal, a line at every fifth step that is logged. What it tells comes from `RunMetrics`.
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
                TextColumn("{task.fields[told]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=False)
            self._task = self._bar.add_task("", total=self._total, completed=trainer.global_step, told="")
            self._bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if is_logged(trainer, step) and self.is_enabled:
            told = _told({name: float(value) for name, value in trainer.callback_metrics.items()})
            if self._bar:
                self._bar.update(self._task, told=told)
            elif is_logged(trainer, step, of_those=5):
                print(f"step {step}/{self._total}  {told}", flush=True)
        if self._bar:
            self._bar.update(self._task, completed=step)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
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


def _told(metrics: dict[str, float]) -> str:
    """The important ones as one line, about 100 characters."""
    names = ("loss", "chance", "accuracy", "images_per_s", "mfu", "data_wait")
    loss, chance, accuracy, images_per_s, mfu, wait = (metrics.get(f"train/{name}", math.nan) for name in names)
    return (
        f"loss {loss:.3f} (chance {chance:.2f})  accuracy {100 * accuracy:.0f} %  {images_per_s:.0f} images/s  "
        f"MFU {100 * mfu:.0f} %  waiting for data {100 * wait:.0f} %"
    )


class RunReport(Callback):
    """Writes the page of a run, `report.html` in its folder, however the run ends.

    Beside the log stands what the page needs to know, `run.json`, from the start on, so that `miniclip report` can make
    it at any time. Without a log there is no page.

    Args:
        run: the run's folder.
        command: what was typed to start it.
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
        self._end(trainer, "finished")

    @rank_zero_only
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if not hasattr(self, "_began"):
            return  # there is nothing to tell
        if isinstance(exception, SystemExit) and isinstance(exception.code, int) and exception.code > 128:
            status = f"stopped by {signal.Signals(exception.code - 128).name}"
        elif isinstance(exception, KeyboardInterrupt):
            status = "stopped"
        else:
            status = f"failed: {exception}"
        self._end(trainer, status)

    def _end(self, trainer: pl.Trainer, status: str) -> None:
        try:
            if self._write(trainer, status):
                write_page(self.run / PAGE_FILE, [self.run])
                if status != "finished":  # then the trained model is told with it
                    print(f"Report: {self.run / PAGE_FILE}", flush=True)
        except Exception as error:  # the run's own end, or error, matters more than a page of it
            print(f"warning: no page of the run could be written: {error}", file=sys.stderr)

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
            "batch_size": data.batch_size,
            "epoch_samples": data.order().num_samples,
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
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{where.type.upper()}, {_threads()}"
    return name if trainer.world_size == 1 else f"{trainer.world_size} × {name}"


def _threads() -> str:
    number = torch.get_num_threads()
    return f"{number} thread{'s' if number > 1 else ''}"
