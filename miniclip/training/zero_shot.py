"""The callback that scores a run by zero-shot classification of labelled images, at each validation."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ..evaluation.datasets.open import open_dataset
from ..evaluation.datasets.sets import labelled
from ..evaluation.zero_shot import zero_shot_scores
from ..model import CLIP
from ..weights.load import preprocess_for
from .progress import scores_line


class ZeroShotEvaluation(Callback):
    """Logs the zero-shot accuracy on labelled images, `val/zero_shot_acc1`, at each validation.

    A run that starts from a trained model is scored before its first step, too, and prints both scores at its end.

    Args:
        data: labelled images, as `miniclip eval --data` takes them.
        templates: name of a template set, or a file; by default the data's own.
        batch_size: images per step.
        others: NAME -> more labelled images with their own prompts, logged as `val/zero_shot_acc1_NAME`: what a
            fine-tuned model should not forget.
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
        preprocess = preprocess_for(model.config)
        accuracies = {}
        for name, dataset in self.datasets.items():
            with torch.compiler.set_stance("force_eager"):  # as in validation, also before the first step
                scores = zero_shot_scores(model, preprocess, dataset, batch_size=self.batch_size)
            accuracies[name] = float(scores.is_right.mean())
        return accuracies

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step or not getattr(pl_module, "starts_trained", False):
            return
        pl_module.eval()
        self.before = self._score(pl_module)
        pl_module.train()
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(self.before, step=-1)  # the first step is 0
            print(f"before training: {scores_line(self.before)}", flush=True)

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
