"""What a run goes by besides its weights: written to each checkpoint, and compared when the run is resumed."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn

from ..config import differences
from . import lightning_private
from .optimizer import make_optimizer, parameter_groups
from .step import CLIPTraining

SETTINGS = "miniclip_settings"  # key in a checkpoint


class Resumption(Callback):
    """A resumed run refuses an optimiser state that is not its own, and prints which other settings differ.

    It goes on with its own rates and decays, where Lightning would silently take the checkpoint's.
    """

    def __init__(self) -> None:
        self._checkpoint: dict[str, Any] | None = None  # settings of the checkpoint that the run is resumed from

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(module, CLIPTraining)
        checkpoint[SETTINGS] = settings(trainer, module)

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(module, CLIPTraining)
        if trainer.state.fn == TrainerFn.FITTING:
            self._checkpoint = checkpoint.get(SETTINGS)
            sizes = [len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]]
            refuse_another_state(module, self._checkpoint or {}, sizes)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CLIPTraining)
        if self._checkpoint is not None:
            lines = differences(self._checkpoint, settings(trainer, pl_module), "", ("the checkpoint has", "this run"))
            if lines and trainer.is_global_zero:
                print("This run goes on under other settings than its checkpoint:\n" + "\n".join(lines), flush=True)
            _set_own_rates(trainer, pl_module)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        # Lightning counts one too many in a run that had ended and is made longer.
        lightning_private.set_logged_step(trainer, trainer.global_step)


def settings(trainer: pl.Trainer, module: CLIPTraining) -> dict[str, Any]:
    return {
        "model.optimizer": {**asdict(module.optimizer_config), "betas": list(module.optimizer_config.betas)},
        "model.loss": module.loss,
        "model.positives": module.positives,
        "model.locked": module.locked,
        "model.distillation": 0.0 if module.teacher is None else module.distillation,
        "model.ema_decay": module.ema_decay,
        "trainer.precision": str(trainer.precision),
        "steps": int(trainer.estimated_stepping_batches),
        "processes": trainer.world_size,
    }


def refuse_another_state(module: CLIPTraining, checkpoint: dict[str, Any], group_sizes: list[int]) -> None:
    """An optimiser's state fits its own kind only, and parameter groups of the same sizes.

    Args:
        checkpoint: the `settings` of the checkpoint's run.
        group_sizes: number of parameters in each of its groups.

    Raises:
        ValueError: this run's optimiser cannot use the state; names the setting that differs.
    """
    saved, own = checkpoint.get("model.optimizer", {}), asdict(module.optimizer_config)
    names = ["kind", "timm_name"]
    if [len(group["params"]) for group in parameter_groups(module.clip, module.optimizer_config)] != group_sizes:
        names += ["layer_decay", "image_lr_scale", "text_lr_scale"]
    values = [(f"model.optimizer.{name}", saved.get(name), own[name]) for name in names]
    values.insert(2, ("model.locked", checkpoint.get("model.locked"), module.locked))
    for name, then, now in values:
        if then not in (None, now):
            raise ValueError(
                f"the checkpoint was trained with {name} {then}, this run has {now}, which cannot use its optimiser "
                "state; go on with the same, or start a run in another folder"
            )


def _set_own_rates(trainer: pl.Trainer, module: CLIPTraining) -> None:
    optimizer, scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
    fresh = make_optimizer(module.clip, module.optimizer_config).param_groups
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    scheduler.base_lrs = [group["lr"] for group in fresh]
    for group, own, factor in zip(optimizer.param_groups, fresh, scheduler.lr_lambdas, strict=True):
        group.update({name: value for name, value in own.items() if name != "params"})
        group["initial_lr"], group["lr"] = own["lr"], own["lr"] * factor(scheduler.last_epoch)
