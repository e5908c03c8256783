"""Every private member of Lightning that training uses, each behind a name of its own.

A new release of Lightning may break these lines and no others of training.
"""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from pytorch_lightning.trainer.connectors.accelerator_connector import _AcceleratorConnector


def set_logged_step(trainer: pl.Trainer, step: int) -> None:
    """The step under which the next batch's metrics are written."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def count_epochs_by_steps(checkpoint: dict[str, Any], steps_per_epoch: float) -> None:
    """Sets the epoch of a checkpoint, and the batches of it that are done, to what its number of steps makes them.

    Lightning counts an epoch that is cut short by the run's end as a whole one, and one more in a run that is resumed
    after its end. An epoch whose end is still to come, because the checkpoint was saved in the validation of its last
    batch or after it, keeps that end.

    Args:
        checkpoint: changed in place; left as it is if steps_per_epoch is infinite, which is unknown.
    """
    if math.isinf(steps_per_epoch):
        return
    step, loop = checkpoint["global_step"], checkpoint["loops"]["fit_loop"]
    progress, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    epoch, batch = divmod(step, int(steps_per_epoch))
    is_open = progress["current"]["processed"] < progress["current"]["started"]
    is_batch_done = batches["current"]["ready"] > 0 and batches["total"]["completed"] == batches["total"]["processed"]
    if is_open and is_batch_done and step and batch == 0:
        epoch, batch = epoch - 1, int(steps_per_epoch)
    begun = epoch + (batch > 0)
    for counts in (progress["total"], progress["current"]):
        counts.update(ready=begun, started=begun, processed=epoch, completed=epoch)
    for counts, number in ((batches["total"], step), (batches["current"], batch)):
        counts.update(dict.fromkeys(counts, number))
    batches["is_last_batch"] = batch == steps_per_epoch
    checkpoint["epoch"] = epoch


def is_validation_due(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the training batch that has just ended."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def keep_validation_interval(trainer: pl.Trainer, interval: Any) -> float | None:
    """Sets trainer.val_check_interval where Lightning leaves it out, though its callbacks ask for it: if it is a time.

    Returns:
        The time in seconds.
    """
    seconds: float | None = trainer._val_check_time_interval  # type: ignore[attr-defined]
    if seconds is not None:
        trainer.val_check_interval = interval
    return seconds


def stops_early(trainer: pl.Trainer) -> bool:
    """Whether something asked the run to stop (early stopping, max_time) and min_epochs and min_steps let it."""
    return trainer.should_stop and trainer.fit_loop._can_stop_early


def end_with_validation(trainer: pl.Trainer) -> None:
    """Makes the current step the last one, and a validation due at it, at any step of any epoch."""
    trainer.should_stop, trainer.check_val_every_n_epoch = True, None
    trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None


def write_step_metrics(trainer: pl.Trainer) -> None:
    """Writes the step's row now, which Lightning writes only after the callbacks' hooks."""
    trainer._logger_connector.update_train_step_metrics()


def logged_every(trainer: pl.Trainer) -> int:
    """How many steps there are from one logged step to the next; 0 if none is logged."""
    return int(getattr(trainer, "log_every_n_steps"))  # noqa: B009 (Lightning sets it without declaring it)


def is_logged(trainer: pl.Trainer, steps: int, of_those: int = 1) -> bool:
    """Whether the step that completes `steps` steps is logged, and is the last or every `of_those`-th of those."""
    every = logged_every(trainer)
    return every > 0 and (steps % (every * of_those) == 0 or steps == trainer.estimated_stepping_batches)


def leave_samplers(trainer: pl.Trainer) -> None:
    """Sets use_distributed_sampler to false: each process's loader has its own part already."""
    trainer._accelerator_connector.use_distributed_sampler = False


def install_no_signal_handlers(trainer: pl.Trainer) -> None:
    setattr(trainer._signal_connector, "register_signal_handlers", lambda: None)  # noqa: B010


def forks_or_spawns(trainer: pl.Trainer) -> bool:
    """Whether the strategy starts its processes by fork or spawn, as ddp_spawn and ddp_notebook do."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def accelerator(name: str) -> str:
    """The kind of device that trainer.accelerator "auto" or "gpu" is here; another name as it is.

    Raises:
        MisconfigurationException: there is no GPU.
    """
    if name == "auto":
        return _AcceleratorConnector._choose_auto_accelerator()
    return _AcceleratorConnector._choose_gpu_accelerator_backend() if name == "gpu" else name


def cluster_environment(trainer: pl.Trainer) -> Any:
    """Where Lightning takes the run to be started: SLURM, torchrun, …"""
    return trainer._accelerator_connector.cluster_environment
