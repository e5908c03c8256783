"""Counts samples that could not be read, and stops a run that has too many of them."""

from __future__ import annotations

import sys
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from ..data.pairs import Batch
from .step import CLIPTraining


class RejectedSamples(Callback):
    """Prints each sample that could not be read, and stops the run above the share of them that it allows."""

    def __init__(self) -> None:
        self.num_seen = self.num_rejected = self.num_truncated = 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self._count(batch, pl_module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._count(batch, pl_module)

    def _count(self, batch: Batch, module: CLIPTraining) -> None:
        self.num_seen += len(batch.keys)
        self.num_rejected += len(batch.problems)
        self.num_truncated += batch.num_truncated
        for problem in batch.problems:
            print(f"left out: {problem}", file=sys.stderr)
        # At least as many samples as one rejected one is allowed for, else a single one would stop every run.
        seen = max(self.num_seen, 1 / max(module.max_rejected, 1e-9))
        if self.num_rejected > module.max_rejected * seen:
            raise ValueError(
                f"{self.num_rejected} of {self.num_seen} samples could not be read, more than the share "
                f"{module.max_rejected} that model.max_rejected allows; the last: {batch.problems[-1]}"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.num_truncated:
            length = pl_module.clip.context_length
            print(f"{self.num_truncated} of {self.num_seen} captions were cut to {length} tokens.", file=sys.stderr)
