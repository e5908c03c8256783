"""Training under Lightning: the module around CLIP, one step and the validation between."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from . import tokenizer, weights
from .config import CLIPConfig
from .data import Batch, PairDataModule
from .evaluate import recall_at_1
from .loss import clip_loss, gather
from .model import CLIP
from .optim import OptimizerConfig, learning_rate_factor, make_optimizer, warmup_steps
from .transforms import normalize

MAX_LOGIT_SCALE = math.log(100)  # paper section 2.5: more than 100 times the cosine was unstable
_LOSS_CHUNK = 1024  # images whose logits are in memory at once
_ACCURACY_PAIRS = 1024  # in-batch accuracy is measured on at most so many


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
        ema_decay: keeps an exponential moving average of the weights, of which each step leaves this much (0.999, or
            0.99 for a run of some hundred steps). It is what validation scores and what `best/` is; training goes on
            with the weights themselves. Early on, when there is little to average, each step leaves less.
    """

    def __init__(
        self,
        clip: CLIPConfig = CLIPConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        max_rejected: float = 0.01,
        micro_batch_size: int | None = None,
        positives: Literal["pair", "caption"] = "pair",
        ema_decay: float | None = None,
    ) -> None:
        super().__init__()
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"model.ema_decay is {ema_decay}; it must be above 0 and below 1, such as 0.999")
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
        self.ema_decay = ema_decay
        self.average = None if ema_decay is None else copy.deepcopy(self.clip).requires_grad_(False)
        self.optimizer_config = optimizer
        self.max_rejected = max_rejected
        self.micro_batch_size, self.positives = micro_batch_size, positives
        self.num_seen = self.num_rejected = self.num_truncated = 0
        self._validation: list[tuple[Tensor, Tensor]] = []

    @property
    def scored(self) -> CLIP:
        """The model that validation scores and a run leaves: the average, where one is kept."""
        return self.clip if self.average is None else self.average

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
        model = self.clip if self.training else self.scored
        pixels = normalize(images, model.config.vision.mean, model.config.vision.std)
        return model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)

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
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss at step {self.global_step} is {loss.item()}; the weights were not touched. Try a lower "
                f"learning rate, or look at the batch: {', '.join(batch.keys[:8])}, …"
            )
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

    def on_train_start(self) -> None:
        if self.average is not None and self.global_step == 0:  # the weights may have been loaded since
            self.average.load_state_dict(self.clip.state_dict())

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """All that a step changes, changes here: a checkpoint may be written before any later hook of ours."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if self.average is not None:
            assert self.ema_decay is not None
            n = self.global_step  # steps before this one
            move_average(self.average, self.clip, min(self.ema_decay, (1 + n) / (10 + n)))

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
        loss = clip_loss(images, texts, self.scored.logit_scale.exp().float().cpu(), chunk_size=1024)
        recall = (recall_at_1(images, texts) + recall_at_1(texts, images)) / 2
        self.log_dict({"val/loss": loss, "val/retrieval_r1": recall}, sync_dist=True)

    def on_train_end(self) -> None:
        if self.num_truncated:
            length = self.clip.context_length
            print(f"{self.num_truncated} of {self.num_seen} captions were cut to {length} tokens.", file=sys.stderr)

    def configure_optimizers(self) -> Any:
        config, total = self.optimizer_config, int(self.trainer.estimated_stepping_batches)
        warmup = self.warmup_steps(total, self.trainer.datamodule)  # type: ignore[attr-defined]
        optimizer = make_optimizer(self.clip, config)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: learning_rate_factor(step, total, warmup, config.schedule, config.cooldown, config.final_lr),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def warmup_steps(self, total_steps: int, data: PairDataModule) -> int:
        steps_per_epoch = data.order().num_samples // data.batch_size
        return warmup_steps(self.optimizer_config, total_steps, data.batch_size, steps_per_epoch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[weights.LIGHTNING_CONFIG_KEY] = self.clip.config.to_json()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = CLIPConfig.from_json(checkpoint[weights.LIGHTNING_CONFIG_KEY]).to_dict()
        if differences := _differences(saved, self.clip.config.to_dict(), "model.clip"):
            raise ValueError("the checkpoint holds another architecture than this run:\n" + "\n".join(differences))
        is_averaged = any(name.startswith(weights.LIGHTNING_AVERAGE_PREFIX) for name in checkpoint["state_dict"])
        if is_averaged != (self.average is not None):
            raise ValueError(
                f"the checkpoint holds {'an' if is_averaged else 'no'} average of the weights, and model.ema_decay is "
                f"{self.ema_decay}; {'set it as its run did' if is_averaged else 'it can be set for a new run only'}"
            )


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model; batch norm's statistics too, while its counts are copied."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    averaged, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    get_ema_multi_avg_fn(decay)(averaged, current, None)
    for count, now in pairs:
        if not count.is_floating_point():
            count.copy_(now)


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


def _differences(checkpoint: Any, run: Any, name: str) -> list[str]:
    """A line for each value in which two nested configurations differ."""
    if isinstance(checkpoint, dict):
        return [line for key in checkpoint for line in _differences(checkpoint[key], run[key], f"{name}.{key}")]
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
