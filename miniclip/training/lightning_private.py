"""Every private member of Lightning that training uses, each behind a name of its own.

A new release of Lightning may break these lines and no others; `tests/training/test_lightning_private.py` notices.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


def set_logged_step(trainer: pl.Trainer, step: int) -> None:
    """The step under which the next batch's metrics are written."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = step


def is_validation_due(trainer: pl.Trainer) -> bool:
    """Whether a validation follows the training batch that has just ended."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def write_step_metrics(trainer: pl.Trainer) -> None:
    """Writes the step's row now, which Lightning writes only after the callbacks' hooks."""
    trainer._logger_connector.update_train_step_metrics()


def install_no_signal_handlers(trainer: pl.Trainer) -> None:
    setattr(trainer._signal_connector, "register_signal_handlers", lambda: None)  # noqa: B010


def cluster_environment(trainer: pl.Trainer) -> Any:
    """Where Lightning takes the run to be started: SLURM, torchrun, …"""
    return trainer._accelerator_connector.cluster_environment
