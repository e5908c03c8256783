"""What a run goes by besides its weights: written to each checkpoint, and compared when the run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping, Timer
from pytorch_lightning.trainer.states import TrainerFn

from ..common.processes import all_gather_objects
from ..config import differences
from ..data.module import PairDataModule
from ..fast import matmul
from ..weights.read import read_torch_file
from . import lightning_private
from .optimizer import make_optimizer, parameter_groups
from .start import refuse_other_weights
from .step import CLIPTraining

SETTINGS = "miniclip_settings"  # key in a checkpoint


class Resumption(Callback):
    """A resumed run refuses an optimiser state that is not its own, and prints which other settings differ.

    It goes on with its own rates, decays and patience, where Lightning would silently take the checkpoint's. A limit of
    time counts from each start: Lightning's adds up, so that a start after the limit would train nothing. The epoch is
    counted by the steps, as in a run that was never stopped. (It stays Lightning's count where steps do not tell it,
    with a loader of one's own that has no length or with accumulated batches: an epoch that the run's end cuts short
    is then a whole one, and a run that is resumed after its end begins one more.)

    Args:
        configuration: further settings to compare, by name, as JSON has them.
    """

    def __init__(self, configuration: Mapping[str, Any] = MappingProxyType({})) -> None:
        self._configuration = configuration
        self._checkpoint: dict[str, Any] | None = None  # settings of the checkpoint that the run is resumed from
        self._stoppings: dict[EarlyStopping, tuple[int, bool]] = {}  # their own patience and strictness
        self._until_end = ExitStack()  # products by the run's library

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        stoppings = [each for each in callbacks if isinstance(each, EarlyStopping)]
        self._stoppings = {each: (each.patience, each.strict) for each in stoppings}

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(module, CLIPTraining)
        checkpoint[SETTINGS] = self._settings(trainer, module)
        if trainer.accumulate_grad_batches == 1:  # it may be more with loaders of one's own
            lightning_private.count_epochs_by_steps(checkpoint, trainer.num_training_batches)

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(module, CLIPTraining)
        if trainer.state.fn == TrainerFn.FITTING:
            _refuse_weights_alone(checkpoint, trainer.ckpt_path)
            self._checkpoint = checkpoint.get(SETTINGS)
            sizes = [len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]]
            refuse_another_state(module, self._checkpoint or {}, sizes)
            checkpoint["callbacks"].pop(Timer.__qualname__, None)
            if isinstance(data := trainer.datamodule, PairDataModule):  # type: ignore[attr-defined]
                lightning_private.count_epochs_by_steps(checkpoint, data.steps_per_epoch())  # of an earlier version

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._keep_own_patience()
        if trainer.strategy.root_device.type == "cpu":
            name = library_of_all((self._checkpoint or {"products": None}).get("products", matmul.MKL))
            self._until_end.enter_context(matmul.using(name))
            if trainer.is_global_zero:
                print(f"Matrix products: {matmul.TITLES[name]}", flush=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CLIPTraining)
        self._keep_own_patience()  # again, because a strategy that slices weights reads the checkpoint late
        if self._checkpoint is not None:
            before, now = _of_one_shape(self._checkpoint, self._settings(trainer, pl_module))
            lines = differences(before, now, "", ("the checkpoint has", "this run"))
            if lines and trainer.is_global_zero:
                print("This run goes on under other settings than its checkpoint:\n" + "\n".join(lines), flush=True)
            _set_own_rates(trainer, pl_module)

    def _keep_own_patience(self) -> None:
        for stopping, (patience, _) in self._stoppings.items():
            stopping.patience = patience
            # A run resumed from the validation at an epoch's end ends that epoch, when nothing is logged yet.
            stopping.strict = False

    def _settings(self, trainer: pl.Trainer, module: CLIPTraining) -> dict[str, Any]:
        own = settings(trainer, module)
        parts = tuple(f"{name}." for name in own)
        further = {name: value for name, value in self._configuration.items() if not f"{name}.".startswith(parts)}
        return {**own, **further}

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._until_end.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._until_end.close()

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        for stopping, (_, strict) in self._stoppings.items():
            stopping.strict = strict
        # Lightning counts one too many in a run that had ended and is made longer.
        lightning_private.set_logged_step(trainer, trainer.global_step)


def _of_one_shape(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings as `differences` compares them, which looks at names that both have: one that is a mapping in one (a.b,
    a.c) and null in the other (a) gets one name."""
    both = dict(first), dict(second)
    for one, other in (both, both[::-1]):
        for name in [name for name, value in one.items() if value is None and name not in other]:
            if within := {key: other.pop(key) for key in list(other) if key.startswith(f"{name}.")}:
                other[name] = within
    return both


def settings(trainer: pl.Trainer, module: CLIPTraining) -> dict[str, Any]:
    device = trainer.strategy.root_device.type
    by_group, optimizer = module.positives == "group", asdict(module.optimizer_config)
    options = str(optimizer.pop("options"))  # whose names differ, so they are compared as one
    return {
        **({"data.group": trainer.datamodule.group} if by_group else {}),  # type: ignore[attr-defined]
        "model.optimizer": {**optimizer, "betas": list(optimizer["betas"])},
        "model.optimizer.options": options,
        "model.loss": module.loss,
        "model.positives": module.positives,
        "model.locked": module.locked,
        "model.distillation": 0.0 if module.teacher is None else module.distillation,
        **({} if module.teacher is None else {"weights of model.teacher (digest)": module.teacher.digest}),
        "model.ema_decay": module.ema_decay,
        "model.patch_dropout": module.patch_dropout,
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
        "trainer.precision": str(trainer.precision),
        "steps": int(trainer.estimated_stepping_batches),
        "processes": trainer.world_size,
        "products": matmul.library() if device == "cpu" else device,
    }


def library_of_all(checkpoints: str | None) -> str:
    """The library for matrix products on CPUs, the same in all processes; MKL where their CPUs would differ.

    MINICLIP_PRODUCTS decides, then the checkpoint (other libraries have other last bits), then the CPU.

    Args:
        checkpoints: the checkpoint's library or its kind of device; None for a new run.

    Raises:
        ValueError: MINICLIP_PRODUCTS names a library that is not to be had.
    """
    name = matmul.wanted() or (checkpoints if checkpoints in matmul.available() else matmul.library())
    return name if set(all_gather_objects(name)) == {name} else matmul.MKL


def refuse_another_run(path: Path, module: CLIPTraining) -> None:
    """Before the data are prepared, which may take long: reading the file takes a second for each gigabyte.

    Raises:
        ValueError: it is damaged or no trainer's, holds no run, or one of another architecture or optimiser.
    """
    checkpoint = read_torch_file(path)
    _refuse_weights_alone(checkpoint, path)
    refuse_other_weights(checkpoint, module.clip.config, module.ema_decay)
    refuse_another_state(module, checkpoint.get(SETTINGS) or {}, None)


def _refuse_weights_alone(checkpoint: Mapping[str, Any], path: Any) -> None:
    if not checkpoint.get("optimizer_states"):
        raise ValueError(
            f"{path} holds weights alone, as ModelCheckpoint's save_weights_only leaves them, and no run to resume; "
            f"start one from its weights: --model.start_from {path}"
        )


def refuse_another_state(module: CLIPTraining, checkpoint: dict[str, Any], group_sizes: list[int] | None) -> None:
    """An optimiser's state fits its own kind only, and parameter groups of the same sizes.

    Args:
        checkpoint: the `settings` of the checkpoint's run.
        group_sizes: number of parameters in each of its groups; None before callbacks have frozen what they freeze.

    Raises:
        ValueError: this run's optimiser cannot use the state; names the setting that differs.
    """
    saved, own = checkpoint.get("model.optimizer", {}), asdict(module.optimizer_config)
    names = ["kind", "timm_name"]
    sizes = [len(group["params"]) for group in parameter_groups(module.clip, module.optimizer_config)]
    if group_sizes not in (None, sizes):
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
    first = slice(len(fresh))  # groups that were added during the run have no rates of the settings'
    scheduler.base_lrs[first] = [group["lr"] for group in fresh]
    for group, own, factor in zip(optimizer.param_groups[first], fresh, scheduler.lr_lambdas, strict=True):
        group.update({name: value for name, value in own.items() if name != "params"})
        group["initial_lr"], group["lr"] = own["lr"], own["lr"] * factor(scheduler.last_epoch)
