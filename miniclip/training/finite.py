"""Stops a run whose loss or gradient is not finite, before the weights are touched."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from .. import tokenizer
from ..common.files import write_text
from ..common.processes import all_gather_objects
from .fsdp import local, whole
from .step import CLIPTraining, StepResult

NON_FINITE = "non_finite.json"  # in the run's folder: the batch at which the run stopped


class StopIfNotFinite(Callback):
    """Stops all processes alike if the loss or the gradient is not finite, and writes the batch to the run's folder.

    The answer is the one number of a step whose computation the host waits for. Processes that have to agree on more
    send them along: `others` returns this process's, and `most` is the largest of each over all processes.
    """

    def __init__(self) -> None:
        self.others: Callable[[], Sequence[int]] = tuple
        self.most: list[int] = []

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Loss and gradient are one question, because each answer has to wait for the device."""
        assert isinstance(pl_module, CLIPTraining)
        assert pl_module.result is not None
        loss = norm = pl_module.result.loss
        # A gradient that overflows in half precision is for the gradient scaler, which skips the step.
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norm = whole(torch.nn.utils.get_total_norm(gradients))
        is_not_finite = ~(torch.isfinite(loss) & torch.isfinite(norm))
        stops, *self.most = int(is_not_finite), *self.others()  # once the device is done: a signal may come meanwhile
        if trainer.world_size > 1:
            own = torch.tensor([stops, *self.most], device=loss.device)
            stops, *self.most = trainer.strategy.reduce(own, reduce_op="max").tolist()
        if stops:
            _stop(trainer, pl_module, pl_module.result, float(norm), optimizer.param_groups[0]["lr"])


def _stop(trainer: pl.Trainer, module: CLIPTraining, result: StepResult, norm: float, lr: float) -> NoReturn:
    parts = all_gather_objects((result.loss.item(), _samples(result, trainer.global_rank)))
    samples = [sample for _, part in parts for sample in part]
    loss, step = sum(loss for loss, _ in parts) / len(parts), trainer.global_step + 1
    scale = local(module.clip.logit_scale).exp().item()
    facts = {"step": step, "loss": str(loss), "gradient_norm": str(norm), "lr": lr, "logit_scale": str(scale)}
    path = Path(trainer.default_root_dir) / NON_FINITE
    if trainer.is_global_zero:
        write_text(path, json.dumps({**facts, "samples": samples}, indent=1, ensure_ascii=False))
    trainer.strategy.barrier()
    bad = list(dict.fromkeys(sample["key"] for sample in samples if not sample["is_finite"]))
    if not bad:
        where = "The features are finite"
    elif not any(sample["is_finite"] for sample in samples):
        where = "No features are finite, so the weights are probably at fault"
    else:
        where = f"Only the features of {', '.join(bad[:8])}{', …' if len(bad) > 8 else ''} are not finite: look at them"
    raise ValueError(
        f"the loss at step {step} is {loss} (norm of the gradient: {norm}); the weights were not touched, and the last "
        f"checkpoint is as it was. {where}. {path} lists the batch. Resume from the last checkpoint with a lower rate "
        f"(this step's was {lr:.3g}), a longer model.optimizer.warmup, --trainer.gradient_clip_val 1, or in bf16-mixed "
        "or 32-true precision if it is 16-mixed"
    )


def _samples(result: StepResult, rank: int) -> list[dict[str, Any]]:
    is_finite = torch.isfinite(result.image_features).all(dim=1) & torch.isfinite(result.text_features).all(dim=1)
    per_image = len(is_finite) // len(result.batch.keys)
    keys = [key for key in result.batch.keys for _ in range(per_image)]
    rows = zip(keys, result.batch.tokens.tolist(), is_finite.tolist(), strict=True)
    return [
        {"key": key, "rank": rank, "caption": _caption(tokens), "is_finite": finite} for key, tokens, finite in rows
    ]


def _caption(tokens: list[int]) -> str:
    return tokenizer.decode([i for i in tokens if i not in (0, tokenizer.START_OF_TEXT, tokenizer.END_OF_TEXT)]).strip()
