"""How a run stops: signals, SLURM's requeue, and what is reported when a worker process has died."""

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
from pytorch_lightning.callbacks import Callback

from . import lightning_private


class StopSignals:
    """Notes that Ctrl-C, SIGTERM or, under SLURM, the signal for requeuing asks the run to stop.

    An exception thrown wherever a signal happens to arrive could leave a half-made optimiser step behind; so the
    step it came in is finished, and whoever asks for `received` then acts. A second Ctrl-C stops at once.
    """

    def __init__(self, on_second: Callable[[], str]) -> None:
        self.received = 0
        self.on_second = on_second
        self._previous: dict[int, Any] = {}

    def install(self, trainer: pl.Trainer) -> None:
        # Lightning's own handlers leave without a checkpoint on SIGTERM, broadcast in the middle of anything, and
        # under SLURM save a checkpoint wherever the step is.
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


def slurm(trainer: pl.Trainer) -> SLURMEnvironment | None:
    """SLURM, where it has started this run and is to be asked to start it again."""
    environment = lightning_private.cluster_environment(trainer)
    return environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None


def requeue() -> str:
    """Has SLURM start this job again; says what came of it."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip()
        return f"SLURM was asked to requeue job {job}, which failed: {why}"
    return f"SLURM requeues job {job}, which goes on here if its command has --ckpt_path last."


def what_is_kept(last: Path, resume_command: str) -> str:
    if not last.is_file():
        return f"{last} was not written yet."
    return f"{last} is the last checkpoint. To go on:\n  {resume_command}"


class LostProcesses(Callback):
    """Where one of several processes dies, the others end, and say what happened, instead of waiting for it.

    There are three ways to notice: the connection breaks (gloo); Lightning's observer sees a process end that rank 0
    began, and kills the rest (NCCL would wait); and those that rank 0 began look whether it is still there.

    Args:
        what_is_kept: says what there is to go on from.
    """

    _OBSERVER = logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script")
    _BROKEN = re.compile(r"connection (was )?(closed|reset|refused)|gloo|nccl|broken pipe", re.IGNORECASE)

    def __init__(self, what_is_kept: Callable[[], str]) -> None:
        self.what_is_kept = what_is_kept
        self._is_over = threading.Event()
        self._handler = logging.Handler()
        self._handler.emit = lambda record: self._tell()  # type: ignore[method-assign]
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:  # before the processes meet, which can take a while
            threading.Thread(target=self._watch, args=(os.getppid(),), daemon=True).start()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._OBSERVER.setLevel(logging.INFO)
        self._OBSERVER.addHandler(self._handler)

    def _watch(self, parent: int) -> None:
        while not self._is_over.wait(1.0):
            if os.getppid() != parent:
                self._tell()
                os._exit(1)  # from within a collective, nothing gentler gets through

    def _tell(self) -> None:
        if not self._is_over.is_set():
            self._is_over.set()
            print(
                "error: another process of this run is gone: it was killed (by hand, or for its memory), or ended with "
                f"an error that is told above. {self.what_is_kept()}",
                file=sys.stderr,
                flush=True,
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.world_size > 1 and isinstance(exception, RuntimeError) and self._BROKEN.search(str(exception)):
            self._tell()
            raise SystemExit(1) from exception  # past a tear-down that would wait for the one that is gone
        self._let_go()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()

    def _let_go(self) -> None:
        self._is_over.set()
        self._OBSERVER.removeHandler(self._handler)
