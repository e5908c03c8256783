"""What a run keeps, so that it can be killed anywhere and resumed.

When one of several processes has something to decide (a signal came, it is time to save, the disk is full), all of
them decide the same.
"""

from __future__ import annotations

import math
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_only

from ..common.files import atomic_write
from ..common.processes import all_gather_objects
from ..common.waiting import StalledDataError
from ..data.module import PairDataModule
from ..weights.read import read_torch_file
from . import lightning_private
from .finite import StopIfNotFinite
from .stopping import StopSignals, requeue, slurm, stopped_early_by, what_is_kept, why_stopped_early

_EVERY, _MOST_TIME = 100, 0.05  # steps between checkpoints, and the share of the time that they may take
_MAY, _DUE = 1, 2  # of a checkpoint: written at a step of its own, or at any step
_TO_TRAIN_ON = "To train on, give it more patience or another threshold, or leave it out"
_GRACE_S = 3.0  # the time that a batch has to come after a signal; a run with data stops at the end of its step


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints appear whole under their name or not at all, and are read without running code.

    Lightning's own writer goes through the system's temporary folder, and a move from there to another file system is
    not atomic. A full disk raises nothing here: `failure` is the reason why the last checkpoint was not written. `save`
    returns it; for any other caller, such as Lightning's ModelCheckpoint, it is a warning.
    """

    failure: OSError | None = None
    is_returned = False  # by `save`, to a caller that reports the failure

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.failure = None
        try:
            with atomic_write(path) as file:
                torch.save(checkpoint, file)
        except OSError as error:
            self.failure = error
        except RuntimeError as error:  # what torch makes of an OSError
            if not isinstance(error.__context__, OSError):
                raise
            self.failure = error.__context__
        if self.failure and not self.is_returned:
            print(
                f"warning: {path} could not be written ({self.failure}). Training goes on, and the checkpoint that it "
                "was to replace is kept; make room",
                file=sys.stderr,
                flush=True,
            )

    def remove_checkpoint(self, path: Any) -> None:
        """Removes nothing after a checkpoint that was not written: callers write the new one, then remove the old."""
        if self.failure is None:
            super().remove_checkpoint(path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if not Path(path).is_file():
            raise ValueError(f"no checkpoint {path} to resume from")
        return read_torch_file(Path(path))


def save(trainer: pl.Trainer, path: Path) -> str | None:
    """Writes a checkpoint; called by all processes. Returns to all of them why it failed, or None."""
    writer = trainer.strategy.checkpoint_io
    own = writer if isinstance(writer, AtomicCheckpointIO) else AtomicCheckpointIO()  # in a trainer of one's own
    own.is_returned = True
    try:
        trainer.save_checkpoint(path)
    finally:
        own.is_returned = False
    return trainer.strategy.broadcast(str(own.failure) if own.failure else None)


class RandomStates(Checkpoint):
    """Keeps every process's random states in the checkpoint, for code that draws from them outside of a step.

    Order, augmentation and captions do not need them: they are functions of the seed and the step.
    """

    KEY = "random_states"

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] = []

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[self.KEY] = all_gather_objects(_random_state(trainer.strategy.root_device))

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(self.KEY, [])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # As late as possible, because the set-up may have drawn numbers. Another number of processes draws anew.
        if len(self._loaded) == trainer.world_size:
            _set_random_state(self._loaded[trainer.global_rank], trainer.strategy.root_device)
        self._loaded = []


def _random_state(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (libraries draw from it)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [str(name), torch.tensor(np.asarray(keys, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def scored_data(trainer: pl.Trainer, metric: str) -> str | None:
    """A digest of the data that a callback scores the model on by a metric; None for one of the validation pairs.

    A callback tells it by an attribute of this name, {metric: digest}, from its `setup` on.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    digests = (getattr(each, "scored_data", {}).get(metric) for each in callbacks)
    return next((digest for digest in digests if digest is not None), None)


class UnloggedMonitorError(ValueError):
    """Nothing logs the metric that is to choose the best checkpoint."""


class BestCheckpoint(Checkpoint):
    """Keeps `best.ckpt`: the checkpoint of the validation whose logged metric was best.

    The last step is validated, too, so that the final weights are among the candidates. Scores on other data (the
    validation pairs, or what `scored_data` is of) are not compared.

    Args:
        monitor: name of any metric that is logged by the time a validation ends. Validations before the first logged
            step choose nothing by a metric of steps.
        mode: whether "max" or "min" is best.
    """

    def __init__(self, path: Path, monitor: str, mode: Literal["max", "min"]) -> None:
        self.path, self.monitor, self.mode = path, monitor, mode
        self.score: float | None = None
        self.pairs: str | None = None  # which pairs it is of,
        self.labelled: str | None = None  # or which labelled images
        self._validated_step = -1
        self._is_next_last = False
        self._has_logged_step = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, PairDataModule):
            self.pairs = data.validation_pairs()
        self.labelled = scored_data(trainer, self.monitor)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        self._has_logged_step |= lightning_private.is_logged(trainer, trainer.global_step)
        is_end = trainer.global_step >= trainer.estimated_stepping_batches
        if is_end or self._is_next_last or lightning_private.stops_early(trainer):
            lightning_private.end_with_validation(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Another callback stopped the run after the epoch's last batch: one more step follows, with a validation.
        stops = trainer.enable_validation and lightning_private.stops_early(trainer)
        if stops and self._validated_step != trainer.global_step:
            trainer.should_stop, self._is_next_last = False, True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated_step = trainer.global_step
        if self.monitor not in trainer.callback_metrics:
            self._refuse_unlogged(trainer)
            return
        score = float(trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor])))
        if math.isnan(score) or (self.score is not None and not self._is_better(score, self.score)):
            return
        before, self.score = self.score, score  # before saving, because the checkpoint holds the score
        if failure := save(trainer, self.path):
            self.score = before
            if trainer.is_global_zero:
                print(
                    f"warning: {self.path} could not be written ({failure}), though {self.monitor} is best at step "
                    f"{trainer.global_step}. The earlier one is kept",
                    file=sys.stderr,
                    flush=True,
                )

    def _refuse_unlogged(self, trainer: pl.Trainer) -> None:
        """
        Raises:
            UnloggedMonitorError: a step was logged, and the metric was not among what it logs.
        """
        every = lightning_private.logged_every(trainer)
        logged = ", ".join(sorted(trainer.callback_metrics))
        if self._has_logged_step or not every:
            raise UnloggedMonitorError(f"monitor is {self.monitor!r}, which nothing logs; logged are {logged}")
        if trainer.is_global_zero:
            print(
                f"The validation at step {trainer.global_step} chooses no {self.path.name}: {self.monitor} is not "
                f"among what is logged by now ({logged}), and steps are logged at every {every}th "
                "(trainer.log_every_n_steps)",
                flush=True,
            )

    def _is_better(self, score: float, than: float) -> bool:
        return score > than if self.mode == "max" else score < than

    def state_dict(self) -> dict[str, Any]:
        data = {"pairs": self.pairs, "labelled": self.labelled}
        return {"monitor": self.monitor, "mode": self.mode, "score": self.score, **data}

    @rank_zero_only
    def _tell(self, what: str) -> None:
        print(f"{self.path} was the best {what}, so the next validation replaces it whatever its score", flush=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Another metric's or other data's score, or one without its checkpoint (a run resumed in a new folder), means
        # nothing here.
        if not self.path.is_file() or state_dict["score"] is None:
            return
        if (state_dict["monitor"], state_dict["mode"]) != (self.monitor, self.mode):
            self._tell(
                f"by {state_dict['monitor']} ({state_dict['mode']}), and {self.monitor} ({self.mode}) is asked for"
            )
            return
        name, what = ("pairs", "validation pairs") if self.labelled is None else ("labelled", "labelled images")
        if state_dict.get(name, getattr(self, name)) != getattr(self, name):  # of earlier versions it is unknown
            self._tell(f"by {self.monitor} on other {what} ({state_dict['score']:.4f})")
        else:
            self.score = state_dict["score"]


def score_in(path: Path) -> tuple[str, int, float] | None:
    """The metric that a checkpoint was the best by, the steps done by then, and the score."""
    found = read_torch_file(path)
    states = [state for name, state in found["callbacks"].items() if name.startswith(BestCheckpoint.__name__)]
    return (states[0]["monitor"], found["global_step"], states[0]["score"]) if states else None


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`: written every so many steps or minutes, at the end, and when a signal asks the run to stop.

    On a full disk the earlier checkpoint is kept. The run prints a warning and tries again at the next time to save;
    at the end and at a signal there is no next time, so the failure is an error.

    Args:
        every_n_steps, every_minutes: whichever comes first. None is every 100 steps, or fewer times where writing would
            take more than a twentieth of the run's time.
        resume_command: what the user types to resume the run.
    """

    def __init__(self, path: Path, every_n_steps: int | None, every_minutes: float, resume_command: str) -> None:
        self.path, self.resume_command = path, resume_command
        self.every_n_steps, self.every_s = every_n_steps, 60 * every_minutes
        self.signals = StopSignals(self._what_is_kept)
        self._resumed_step = 0
        self._kept_step: int | None = None  # of the file; of another run's it is not known
        self._stopped_by: list[Any] | None = None  # `stopped_early_by`, of a run that EarlyStopping ended
        self._last_took_s = 0.0
        self._question: StopIfNotFinite | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.signals.install(trainer)
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            self._question = next((each for each in callbacks if isinstance(each, StopIfNotFinite)), None)
            if self._question is not None and trainer.world_size > 1:
                self._question.others = partial(self._own, trainer)
            if isinstance(data := trainer.datamodule, PairDataModule):  # type: ignore[attr-defined]
                data.while_waiting = partial(self._while_waiting, trainer)

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resumed_step = int(checkpoint["global_step"])

    def state_dict(self) -> dict[str, Any]:
        return {"stopped_by": self._stopped_by}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stopped_by = state_dict.get("stopped_by")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._is_late = trainer.strategy.restore_checkpoint_after_setup
        if not self._is_late:
            self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        step, total, run = self._resumed_step, int(trainer.estimated_stepping_batches), trainer.default_root_dir
        if step > total:
            raise ValueError(f"the checkpoint is of step {step}, past the end of this run of {total} steps")
        state = f"new, {total} steps"
        if step:
            state = f"goes on from step {step} of {total}" if step < total else f"is finished: step {step} of {total}"
        if self._stopped_by != stopped_early_by(trainer):  # under its settings of now
            self._stopped_by = None
        if step < total and self._stopped_by is not None:
            trainer.should_stop = True  # before the first step
            by = self._stopped_by[0]
            state = f"is finished: EarlyStopping ended it by {by} at step {step} of {total}. {_TO_TRAIN_ON}"
        if trainer.is_global_zero:
            print(f"Run {run}: {state}", flush=True)
            for left_over in self.path.parent.glob(".*.ckpt.*.tmp"):  # of a process that was killed while it saved
                left_over.unlink(missing_ok=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_late:  # the checkpoint is read after on_fit_start
            self._begin(trainer)
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        # A validation that is due at this step comes first: a run resumed from before it would not make up for it.
        if not lightning_private.is_validation_due(trainer):
            self._end_of_step(trainer, self._question.most if self._question else [])

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._end_of_step(trainer, [])

    def _end_of_step(self, trainer: pl.Trainer, agreed: list[int]) -> None:
        """agreed: `_own` of all processes, as the step's own question found them; if empty, they are asked now."""
        number, clock = agreed or self._agreed(trainer)
        if number:
            if trainer.training:
                lightning_private.write_step_metrics(trainer)
            self._stop(trainer, number)
        elif clock == _DUE or (clock == _MAY and trainer.global_step % (self.every_n_steps or _EVERY) == 0):
            failure = self._save(trainer)
            if failure and trainer.is_global_zero:
                print(
                    f"warning: {failure}. Training goes on and tries again later; make room",
                    file=sys.stderr,
                    flush=True,
                )

    def _own(self, trainer: pl.Trainer) -> tuple[int, int]:
        """The signal that this process has received, and whether to save, by rank 0's clock."""
        if not trainer.is_global_zero:
            return self.signals.received, 0
        seconds = time.monotonic() - self._saved_at
        is_cheap = self.every_n_steps is not None or _MOST_TIME * seconds >= self._last_took_s
        return self.signals.received, _DUE if seconds >= self.every_s else _MAY * is_cheap

    def _agreed(self, trainer: pl.Trainer) -> list[int]:
        """The largest of each of those numbers over the processes."""
        own = list(self._own(trainer))
        if trainer.world_size == 1:
            return own
        on_device = torch.tensor(own, device=trainer.strategy.root_device)
        return trainer.strategy.reduce(on_device, reduce_op="max").tolist()

    def _while_waiting(self, trainer: pl.Trainer, seconds: float) -> None:
        """Heeds a signal while data are waited for; the weights are those of the last whole step."""
        number = self.signals.received
        if number and seconds >= _GRACE_S:
            if self._can_save_between_steps(trainer):
                self._stop(trainer, number)
            print(self._what_is_kept(), file=sys.stderr, flush=True)
            raise SystemExit(128 + number)

    def _can_save_between_steps(self, trainer: pl.Trainer) -> bool:
        """Other processes are somewhere else, and a run that is resumed past its last step validates no more."""
        is_last = trainer.validating and trainer.global_step >= trainer.estimated_stepping_batches
        return trainer.world_size == 1 and not is_last

    def _stop(self, trainer: pl.Trainer, number: int) -> None:
        if failure := self._save(trainer):
            raise ValueError(f"{failure}. {self._what_is_kept()}")
        if trainer.is_global_zero:
            print(f"Saved {self.path} at step {trainer.global_step}. To go on:\n  {self.resume_command}", flush=True)
            environment = slurm(trainer)
            if environment is not None and number == environment.requeue_signal:
                print(requeue(), flush=True)
        trainer.strategy.barrier()
        # Lightning kills the remaining processes if one ends with another status than 0; only rank 0's is looked at.
        raise SystemExit(128 + number if trainer.is_global_zero else 0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        is_early = trainer.global_step < trainer.estimated_stepping_batches
        self._stopped_by = stopped_early_by(trainer) if is_early else None
        if failure := self._save(trainer):
            raise ValueError(f"{failure}. {self._what_is_kept()}")
        if self._stopped_by is not None and trainer.is_global_zero:
            print(
                f"EarlyStopping ended the run at step {trainer.global_step} of {trainer.estimated_stepping_batches} "
                f"by {self._stopped_by[0]}. {why_stopped_early(trainer)} {_TO_TRAIN_ON}:\n  {self.resume_command}",
                flush=True,
            )

    def _save(self, trainer: pl.Trainer) -> str | None:
        """Ignores signals meanwhile, so that an impatient Ctrl-C cannot cost the checkpoint. Returns why it failed."""
        began = time.monotonic()
        with self.signals.ignored():
            failure = save(trainer, self.path)
        self._kept_step = self._kept_step if failure else trainer.global_step
        self._saved_at = time.monotonic()
        self._last_took_s = self._saved_at - began
        return f"{self.path} of step {trainer.global_step} could not be written ({failure})" if failure else None

    def _what_is_kept(self) -> str:
        return what_is_kept(self.path, self.resume_command, self._kept_step)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.signals.restore()
        if isinstance(exception, UnloggedMonitorError):  # in all processes
            print(
                self._save(trainer)
                or f"{self.path} is of step {trainer.global_step}: the same command with --ckpt_path last and another "
                "--monitor goes on",
                file=sys.stderr,
                flush=True,
            )
        if isinstance(exception, StalledDataError):
            failure = self._save(trainer) if self._can_save_between_steps(trainer) else None
            print(f"{failure}\n" if failure else "", self._what_is_kept(), sep="", file=sys.stderr, flush=True)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.signals.restore()
