"""Training under Lightning: the module around CLIP, one step and the validation between."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import tokenizer, weights
from .config import CLIPConfig
from .data import Batch
from .evaluate import recall_at_1
from .files import write_text
from .loss import clip_loss, gather
from .model import CLIP
from .optim import OptimizerConfig, make_optimizer, warmup_cosine
from .transforms import normalize

MAX_LOGIT_SCALE = math.log(100)  # paper section 2.5: more than 100 times the cosine was unstable
_LOSS_CHUNK = 1024  # images whose logits are in memory at once
_ACCURACY_PAIRS = 1024  # in-batch accuracy is measured on at most so many
NON_FINITE = "non_finite.json"  # in the run's folder: the batch that a run stopped at
_SETTINGS = "miniclip_settings"


class _Step(NamedTuple):
    """What is held of a step until it is known to be sound."""

    batch: Batch
    loss: Tensor
    image_features: Tensor  # (b, E)
    text_features: Tensor  # (b, E)

    def describe(self, rank: int) -> list[dict[str, Any]]:
        is_finite = torch.isfinite(self.image_features).all(dim=1) & torch.isfinite(self.text_features).all(dim=1)
        rows = zip(self.batch.keys, self.batch.tokens.tolist(), is_finite.tolist(), strict=True)
        return [
            {"key": key, "rank": rank, "caption": _caption(tokens), "is_finite": finite} for key, tokens, finite in rows
        ]


def _caption(tokens: list[int]) -> str:
    return tokenizer.decode([i for i in tokens if i not in (0, tokenizer.START_OF_TEXT, tokenizer.END_OF_TEXT)]).strip()


class CLIPTraining(pl.LightningModule):
    """One step of contrastive training, and the validation between.

    Args:
        clip: the architecture.
        optimizer: how it learns.
        max_rejected: share of unreadable samples, of those seen, past which the run stops.
        micro_batch_size: pairs that a process encodes at once. Memory then grows with this and not with the batch that
            is contrasted, at the price of encoding twice: the towers' activations are computed again for the gradient
            (as in GradCache, Gao et al. 2021; the gradients are exact). By default all at once.
        positives: "pair", or "caption" to let pairs of the very same caption share their targets, which are
            otherwise told to be different.
    """

    def __init__(
        self,
        clip: CLIPConfig = CLIPConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        max_rejected: float = 0.01,
        micro_batch_size: int | None = None,
        positives: Literal["pair", "caption"] = "pair",
    ) -> None:
        super().__init__()
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"model.micro_batch_size is {micro_batch_size}; it must be at least 1")
        if clip.towers != "both":
            raise ValueError(f"model.clip.towers is {clip.towers!r}; both towers are needed to train them together")
        if (clip.text.vocab_size, clip.text.eot_token) != (tokenizer.VOCAB_SIZE, tokenizer.END_OF_TEXT):
            raise ValueError(
                f"model.clip.text has vocab_size {clip.text.vocab_size} and eot_token {clip.text.eot_token}; the "
                f"tokenizer's ids need {tokenizer.VOCAB_SIZE} and {tokenizer.END_OF_TEXT}"
            )
        self.clip = CLIP(clip)
        self.optimizer_config = optimizer
        self.max_rejected = max_rejected
        self.micro_batch_size, self.positives = micro_batch_size, positives
        self.num_seen = self.num_rejected = self.num_truncated = 0
        self._validation: list[tuple[Tensor, Tensor]] = []
        self._step: _Step | None = None
        self._resumed_from: dict[str, Any] | None = None

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit features of images and texts, (b, E) each."""
        size = self.micro_batch_size or len(batch.images)
        if size >= len(batch.images) or not torch.is_grad_enabled():
            return self._encode(batch.images, batch.tokens)
        parts = [
            checkpoint(self._encode, images, tokens, use_reentrant=False, context_fn=self._contexts)
            for images, tokens in zip(batch.images.split(size), batch.tokens.split(size), strict=True)
        ]
        image_features, text_features = (torch.cat(features) for features in zip(*parts, strict=True))
        return image_features, text_features

    def _encode(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        vision = self.clip.config.vision
        pixels = normalize(images, vision.mean, vision.std)
        return self.clip.encode_image(pixels, normalize=True), self.clip.encode_text(tokens, normalize=True)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For encoding, and for encoding once more: batch norm has seen the batch by then."""
        return nullcontext(), _running_statistics_held(self.clip)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._count(batch)
        image_features, text_features = self.features(batch)
        mask = batch.mask
        is_shared = self.trainer.world_size > 1
        if is_shared and mask is None:  # another process may have a hole where this one has none
            mask = torch.ones(len(batch.keys), dtype=torch.bool, device=self.device)
        scale = self.clip.logit_scale.exp()
        groups = batch.caption_ids if self.positives == "caption" else None
        chunk_size = min(_LOSS_CHUNK, len(image_features))
        loss = clip_loss(image_features, text_features, scale, chunk_size, mask, groups, across_processes=is_shared)
        self._step = _Step(batch, loss.detach(), image_features.detach(), text_features.detach())
        values: dict[str, Tensor | float] = {
            "loss": loss.detach(),
            "chance": math.log(len(image_features) * self.trainer.world_size),
            "logit_scale": scale.detach(),
        }
        # The loss of a process is its share of the whole; their mean is that.
        self.log_dict({f"train/{name}": value for name, value in values.items()}, sync_dist=is_shared)
        every = log_every(self.trainer)
        # Lightning writes the log at steps 9, 19, … of ten, and the progress bar reads at 10, 20, …
        if self.global_step % every == 0 or (self.global_step + 1) % every == 0:
            images, texts = gather(image_features.detach()), gather(text_features.detach())
            healthy = mask if mask is None else gather(mask)
            self.log("train/accuracy", in_batch_accuracy(images, texts, healthy))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stops before the weights are touched, in all processes alike, if the loss or the gradient is not finite.

        One question for both, as each answer has to wait for the device.
        """
        assert self._step is not None
        loss, norm = self._step.loss, self._step.loss
        # Gradients that overflow in half precision are its scaler's to deal with: it passes over the step.
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        is_sick = ~(torch.isfinite(loss) & torch.isfinite(norm))
        if bool(self.trainer.strategy.reduce(is_sick.int(), reduce_op="max")):
            self._stop_as_not_finite(float(norm), optimizer)
        self._step = None

    def _stop_as_not_finite(self, norm: float, optimizer: torch.optim.Optimizer) -> NoReturn:
        """Leaves what is known of the batch in the run's folder."""
        assert self._step is not None
        parts: list[Any] = [(self._step.loss.item(), self._step.describe(self.trainer.global_rank))]
        if self.trainer.world_size > 1:
            (own,), parts = parts, [None] * self.trainer.world_size
            dist.all_gather_object(parts, own)
        samples = [sample for _, share in parts for sample in share]
        # A mean over processes, and not finite where any of theirs is not.
        loss, step = sum(loss for loss, _ in parts) / len(parts), self.global_step + 1
        rate, scale = optimizer.param_groups[0]["lr"], self.clip.logit_scale.exp().item()
        facts = {"step": step, "loss": str(loss), "gradient_norm": str(norm), "lr": rate, "logit_scale": str(scale)}
        path = Path(self.trainer.default_root_dir) / NON_FINITE
        if self.trainer.is_global_zero:
            write_text(path, json.dumps({**facts, "samples": samples}, indent=1, ensure_ascii=False))
        self.trainer.strategy.barrier()
        sick = [sample["key"] for sample in samples if not sample["is_finite"]]
        if not sick:
            where = "The features are finite"
        elif len(sick) == len(samples):
            where = "No features are finite, so the weights are probably at fault"
        else:
            where = (
                f"Features are not finite for {', '.join(sick[:8])}{', …' if len(sick) > 8 else ''} alone: look at them"
            )
        raise ValueError(
            f"the loss at step {step} is {loss} (norm of the gradient: {norm}); the weights were not touched, and "
            f"the last checkpoint is as it was. {where}. {path} lists the batch. Go on from the last checkpoint with a "
            f"lower rate (this step's was {rate:.3g}), a longer model.optimizer.warmup, --trainer.gradient_clip_val 1, "
            "or in bf16-mixed or 32-true precision if it is 16-mixed"
        )

    def _count(self, batch: Batch) -> None:
        """Lists samples that could not be read, and stops past the share of them that is allowed."""
        self.num_seen += len(batch.keys)
        self.num_rejected += len(batch.problems)
        self.num_truncated += batch.num_truncated
        for problem in batch.problems:
            print(f"left out: {problem}", file=sys.stderr)
        # With fewer samples than one share stands for, a single bad one would stop every run.
        if self.num_rejected > self.max_rejected * max(self.num_seen, 1 / max(self.max_rejected, 1e-9)):
            raise ValueError(
                f"{self.num_rejected} of {self.num_seen} samples could not be read, more than the share "
                f"{self.max_rejected} that model.max_rejected allows; the last: {batch.problems[-1]}"
            )

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        with torch.no_grad():
            self.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._count(batch)
        image_features, text_features = self.features(batch)
        healthy = slice(None) if batch.mask is None else batch.mask
        self._validation.append((image_features[healthy].float().cpu(), text_features[healthy].float().cpu()))

    def on_validation_epoch_end(self) -> None:
        """Over the whole set at once, so that the numbers do not depend on the batch size."""
        images, texts = (torch.cat(features) for features in zip(*self._validation, strict=True))
        self._validation.clear()
        if not len(images):
            raise ValueError("not one sample of data.val could be read; what was wrong is listed above")
        loss = clip_loss(images, texts, self.clip.logit_scale.exp().float().cpu(), chunk_size=1024)
        recall = (recall_at_1(images, texts) + recall_at_1(texts, images)) / 2
        self.log_dict({"val/loss": loss, "val/retrieval_r1": recall}, sync_dist=True)

    def on_train_end(self) -> None:
        if self.num_truncated:
            length = self.clip.context_length
            print(f"{self.num_truncated} of {self.num_seen} captions were cut to {length} tokens.", file=sys.stderr)

    def configure_optimizers(self) -> Any:
        optimizer = make_optimizer(self.clip, self.optimizer_config)
        total, warmup = int(self.trainer.estimated_stepping_batches), self.optimizer_config.warmup
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, total, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[weights.LIGHTNING_CONFIG_KEY] = self.clip.config.to_json()
        checkpoint[_SETTINGS] = self._settings()

    def _settings(self) -> dict[str, Any]:
        """What else a run goes by; a checkpoint tells, and a run resumed under others says so."""
        return {
            "model.optimizer": {**asdict(self.optimizer_config), "betas": list(self.optimizer_config.betas)},
            "model.positives": self.positives,
            "trainer.precision": str(self.trainer.precision),
            "steps": int(self.trainer.estimated_stepping_batches),
            "processes": self.trainer.world_size,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = CLIPConfig.from_json(checkpoint[weights.LIGHTNING_CONFIG_KEY]).to_dict()
        if differences := _differences(saved, self.clip.config.to_dict(), "model.clip"):
            raise ValueError("the checkpoint holds another architecture than this run:\n" + "\n".join(differences))
        self._resumed_from = checkpoint.get(_SETTINGS)
        kind = (self._resumed_from or {}).get("model.optimizer", {}).get("kind", self.optimizer_config.kind)
        if kind != self.optimizer_config.kind:
            raise ValueError(
                f"the checkpoint was trained with model.optimizer.kind {kind}, this run has "
                f"{self.optimizer_config.kind}, which can't go on with the other's state; go on with the same, or "
                "begin a run in another folder"
            )

    def on_train_start(self) -> None:
        """A resumed run goes by its own rates and decays, where Lightning would silently go by the checkpoint's."""
        if self._resumed_from is None:
            return
        lines = _differences(self._resumed_from, self._settings())
        if lines and self.trainer.is_global_zero:
            print("This run goes on under other settings than its checkpoint:\n" + "\n".join(lines), flush=True)
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        fresh = make_optimizer(self.clip, self.optimizer_config).param_groups
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        scheduler.base_lrs = [group["lr"] for group in fresh]
        for group, own, factor in zip(optimizer.param_groups, fresh, scheduler.lr_lambdas, strict=True):
            group.update({name: value for name, value in own.items() if name != "params"})
            group["initial_lr"], group["lr"] = own["lr"], own["lr"] * factor(scheduler.last_epoch)


@contextmanager
def _running_statistics_held(model: nn.Module) -> Iterator[None]:
    """Batch norm normalises by the batch, as in training, and does not count it."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = (
            0.0,
            None,
        )  # it moves by nothing; taking it away would change the graph
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _differences(checkpoint: Any, run: Any, name: str = "") -> list[str]:
    """A line for each value in which two nested configurations differ."""
    if isinstance(checkpoint, dict):
        both = [key for key in checkpoint if key in run]
        return [line for key in both for line in _differences(checkpoint[key], run[key], f"{name}.{key}".lstrip("."))]
    return [] if checkpoint == run else [f"  {name}: the checkpoint has {checkpoint}, this run {run}"]


def log_every(trainer: pl.Trainer) -> int:
    return int(getattr(trainer, "log_every_n_steps"))  # noqa: B009 (Lightning sets it without declaring it)


@torch.no_grad()
def in_batch_accuracy(image_features: Tensor, text_features: Tensor, mask: Tensor | None) -> Tensor:
    """Share of images whose own text is the nearest in the batch, and of texts their image; the mean of the two."""
    if mask is not None:
        image_features, text_features = image_features[mask], text_features[mask]
    some = slice(0, _ACCURACY_PAIRS)
    rows = torch.arange(len(image_features[some]), device=image_features.device)
    by_image = (image_features[some] @ text_features.T).argmax(dim=1) == rows
    by_text = (text_features[some] @ image_features.T).argmax(dim=1) == rows
    return (by_image.float().mean() + by_text.float().mean()) / 2
