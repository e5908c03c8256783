"""How a run stops: signals, SLURM's requeue, and the death of one of several processes."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from pytorch_lightning.callbacks import Callback, EarlyStopping, Timer
from pytorch_lightning.callbacks.early_stopping import EarlyStoppingReason

from . import lightning_private


class StopSignals:
    """Notes that Ctrl-C, SIGTERM or, under SLURM, the signal for requeuing asks the run to stop.

    An exception at an arbitrary line could leave half an optimiser step behind. So the current step is finished, and
    `LastCheckpoint` then looks at `received`. A second Ctrl-C stops at once.
    """

    def __init__(self, on_second: Callable[[], str]) -> None:
        self.received = 0
        self.on_second = on_second
        self._previous: dict[int, Any] = {}

    def install(self, trainer: pl.Trainer) -> None:
        # Lightning's handlers exit without a checkpoint on SIGTERM, broadcast at an arbitrary line, and under SLURM
        # save a checkpoint in the middle of a step.
        lightning_private.install_no_signal_handlers(trainer)
        numbers = [signal.SIGINT, signal.SIGTERM]
        if (environment := slurm(trainer)) is not None and environment.requeue_signal is not None:
            numbers.append(environment.requeue_signal)
        for number in numbers:
            self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        if self.received and number == signal.SIGINT:
            print(self.on_second(), file=sys.stderr, flush=True)
            raise KeyboardInterrupt
        if not self.received:
            print("\nStopping when this step is done; another Ctrl-C stops at once.", file=sys.stderr, flush=True)
            self.received = number

    @contextmanager
    def ignored(self) -> Iterator[None]:
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in self._previous}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


def stopped_early_by(trainer: pl.Trainer) -> list[Any] | None:
    """The metric by which an EarlyStopping of Lightning's has asked for the run's end, and its limits if it passed one.

    None if none has, or its patience no longer does.
    """
    if (stopping := _that_stopped(trainer)) is None:
        return None
    limits = [stopping.stopping_threshold, stopping.divergence_threshold, stopping.check_finite]
    return [stopping.monitor, *([] if _is_by_patience(stopping) else limits)]


def why_stopped_early(trainer: pl.Trainer) -> str:
    """In Lightning's words, with the metric and its value; empty if no EarlyStopping has asked for the run's end."""
    stopping = _that_stopped(trainer)
    reason = (stopping and stopping.stopping_reason_message) or ""
    return reason.removesuffix(" Signaling Trainer to stop.")


def _that_stopped(trainer: pl.Trainer) -> EarlyStopping | None:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for each in callbacks:
        if not isinstance(each, EarlyStopping) or each.stopping_reason == EarlyStoppingReason.NOT_STOPPED:
            continue
        if not _is_by_patience(each) or each.wait_count >= each.patience:
            return each
    return None


def _is_by_patience(stopping: EarlyStopping) -> bool:
    return stopping.stopping_reason == EarlyStoppingReason.PATIENCE_EXHAUSTED


def is_out_of_time(trainer: pl.Trainer) -> bool:
    """Whether trainer.max_time, or a callback Timer, ended the run before its last step."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    left = [each.time_remaining() for each in callbacks if isinstance(each, Timer)]
    is_up = any(seconds is not None and seconds <= 0 for seconds in left)
    return is_up and trainer.global_step < trainer.max_steps and stopped_early_by(trainer) is None


def slurm(trainer: pl.Trainer) -> SLURMEnvironment | None:
    """SLURM's environment, if SLURM started this run and requeues it."""
    environment = lightning_private.cluster_environment(trainer)
    return environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None


def requeue() -> str:
    """Asks SLURM to start this job again; returns a sentence about the outcome."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip()
        return f"SLURM was asked to requeue job {job}, which failed: {why}"
    return f"SLURM requeues job {job}, which goes on here if its command has --ckpt_path last."


def what_is_kept(last: Path, resume_command: str, step: int | None = None) -> str:
    """
    Args:
        step: that of the checkpoint, where it is known.
    """
    if not last.is_file():
        return f"{last} was not written yet."
    of_step = "" if step is None else f"Step {step} is kept: "
    return f"{of_step}{last} is the last checkpoint. To go on:\n  {resume_command}"


class LostProcesses(Callback):
    """When one of several processes dies, the others print what happened and end, instead of waiting for it.

    There are three ways to notice: the connection breaks (gloo); Lightning's observer sees a process end that rank 0
    started, and kills the rest (NCCL would wait); and the processes that rank 0 started check that it is still alive.

    Args:
        what_is_kept: returns a sentence about the checkpoint to resume from.
    """

    _OBSERVER = logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script")
    _BROKEN = re.compile(r"connection (was )?(closed|reset|refused)|gloo|nccl|broken pipe", re.IGNORECASE)

    def __init__(self, what_is_kept: Callable[[], str]) -> None:
        self.what_is_kept = what_is_kept
        self._is_over = threading.Event()
        self._handler = logging.Handler()
        self._handler.emit = lambda record: self._report()  # type: ignore[method-assign]
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:  # before the processes connect, which can take a while
            threading.Thread(target=self._watch, args=(os.getppid(),), daemon=True).start()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._OBSERVER.setLevel(logging.INFO)
        self._OBSERVER.addHandler(self._handler)

    def _watch(self, parent: int) -> None:
        while not self._is_over.wait(1.0):
            if os.getppid() != parent:
                self._report()
                os._exit(1)  # nothing gentler interrupts a collective

    def _report(self) -> None:
        if not self._is_over.is_set():
            self._is_over.set()
            print(
                "error: another process of this run is gone: it was killed (by hand, or for its memory), or ended with "
                f"an error that is printed above. {self.what_is_kept()}",
                file=sys.stderr,
                flush=True,
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.world_size > 1 and isinstance(exception, RuntimeError) and self._BROKEN.search(str(exception)):
            self._report()
            raise SystemExit(1) from exception  # skips a tear-down that would wait for the dead process
        self._end()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end()

    def _end(self) -> None:
        self._is_over.set()
        self._OBSERVER.removeHandler(self._handler)
