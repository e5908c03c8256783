"""Training under Lightning: the module around CLIP, one step and the validation between."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import tokenizer, weights
from .config import CLIPConfig, differences
from .data import Batch, PairDataModule
from .evaluate import recall_at_1
from .loss import clip_loss, distillation_loss, gather
from .model import CLIP
from .optim import OptimizerConfig, learning_rate_factor, make_optimizer, warmup_steps
from .teacher import Teacher
from .towers import TimmTower
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
        start_from: a trained model to go on from, anything that `miniclip.load` takes. Its architecture is taken, too,
            so `clip` is left out. The weights are held in float32.
        locked: the tower that stays as it is and costs no memory for gradients: "image" fits a text tower to a trained
            image tower (LiT, Zhai et al. 2022, https://arxiv.org/abs/2111.07991), "text" the reverse. The projection
            behind a tower of timm's learns, as timm's weights have none.
        image_weights: what timm's image tower starts from: "timm" for what timm has under that name (downloaded once),
            or a file of weights with timm's names.
        teacher: a larger CLIP to learn from as well, anything that `miniclip.load` takes.
        distillation: share of the loss that is the distance to the teacher, above 0 to 1; without one it says nothing.
    """

    def __init__(
        self,
        clip: CLIPConfig = CLIPConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        max_rejected: float = 0.01,
        micro_batch_size: int | None = None,
        positives: Literal["pair", "caption"] = "pair",
        start_from: str | None = None,
        locked: Literal["none", "image", "text"] = "none",
        image_weights: str | None = None,
        teacher: str | None = None,
        distillation: float = 0.5,
    ) -> None:
        super().__init__()
        start = None if start_from is None else weights.read_checkpoint(weights.locate(start_from))
        if start is not None and image_weights is not None:
            raise ValueError(
                f"model.start_from is {start_from!r} and model.image_weights {image_weights!r}; the first holds both "
                "towers' weights already, so give one of the two"
            )
        if start is not None:
            if clip not in (CLIPConfig(), start.config):
                refuse_another_architecture(start.config, clip, f"model.start_from {start_from!r}")
            clip = start.config
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"model.micro_batch_size is {micro_batch_size}; it must be at least 1")
        if clip.towers != "both":
            raise ValueError(f"model.clip.towers is {clip.towers!r}; both towers are needed to train them together")
        if (clip.text.vocab_size, clip.text.eot_token) != (tokenizer.VOCAB_SIZE, tokenizer.END_OF_TEXT):
            raise ValueError(
                f"model.clip.text has vocab_size {clip.text.vocab_size} and eot_token {clip.text.eot_token}; the "
                f"tokenizer's ids need {tokenizer.VOCAB_SIZE} and {tokenizer.END_OF_TEXT}"
            )
        self.clip = CLIP(clip) if start is None else weights.build(start, str(start_from))
        if image_weights is not None:
            if not isinstance(self.clip.visual, TimmTower):
                raise ValueError(
                    f"model.image_weights is for towers of timm's, and model.clip.vision.kind is {clip.vision.kind!r}"
                )
            self.clip.visual.load_trunk(clip.vision, clip.embed_dim, None if image_weights == "timm" else image_weights)
        if (locked == "image" and not (start or image_weights)) or (locked == "text" and not start):
            raise ValueError(
                f"model.locked is {locked!r}, and that tower's weights are random; give model.start_from"
                + (", or model.image_weights for an image tower of timm's" if locked == "image" else "")
            )
        if teacher is not None and not 0 < distillation <= 1:
            raise ValueError(f"model.distillation is {distillation}; it is a share of the loss, above 0 to 1")
        self.starts_trained = start is not None
        self.locked = locked
        if locked != "none":
            self._locked_tower().requires_grad_(False).eval()
        self.teacher, self.distillation = None if teacher is None else Teacher(teacher), distillation
        self.optimizer_config = optimizer
        self.max_rejected = max_rejected
        self.micro_batch_size, self.positives = micro_batch_size, positives
        self.num_seen = self.num_rejected = self.num_truncated = 0
        self._validation: list[tuple[Tensor, Tensor]] = []

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit features of images and texts, (b, E) each."""
        size = self.micro_batch_size or len(batch.images)
        if size >= len(batch.images) or not torch.is_grad_enabled():
            return self._encode(batch.images, batch.tokens)
        image_features = self._in_parts(self._encode_images, batch.images, size, self.locked == "image")
        text_features = self._in_parts(self._encode_texts, batch.tokens, size, self.locked == "text")
        return image_features, text_features

    def _in_parts(self, encode: Callable[[Tensor], Tensor], inputs: Tensor, size: int, is_locked: bool) -> Tensor:
        if is_locked:  # it keeps nothing, so there is no memory to win by encoding once more
            return torch.cat([encode(part) for part in inputs.split(size)])
        return torch.cat(
            [checkpoint(encode, part, use_reentrant=False, context_fn=self._contexts) for part in inputs.split(size)]
        )

    def _encode(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self._encode_images(images), self._encode_texts(tokens)

    # A locked tower has no parameter with a gradient and so builds no graph and keeps no activations.
    def _encode_images(self, images: Tensor) -> Tensor:
        vision = self.clip.config.vision
        return self.clip.encode_image(normalize(images, vision.mean, vision.std), normalize=True)

    def _encode_texts(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens, normalize=True)

    def _locked_tower(self) -> nn.Module:
        visual = self.clip.visual
        if self.locked == "image":
            return visual.trunk if isinstance(visual, TimmTower) else visual
        return self.clip.text

    def train(self, mode: bool = True) -> CLIPTraining:
        """A locked tower stays in evaluation mode: batch norm neither counts batches nor normalises by them."""
        super().train(mode)
        if self.locked != "none":
            self._locked_tower().eval()
        return self

    def setup(self, stage: str) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device, self.clip.dtype)

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
        if self.teacher is not None:
            taught = self.teacher.features(batch.images, batch.tokens, self.micro_batch_size)
            distance = distillation_loss(
                image_features, text_features, scale, *taught, self.teacher.logit_scale, chunk_size, mask, is_shared
            )
            self.log("train/distillation", distance.detach(), sync_dist=is_shared)
            loss = (1 - self.distillation) * loss + self.distillation * distance
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
        saved = CLIPConfig.from_json(checkpoint[weights.LIGHTNING_CONFIG_KEY])
        refuse_another_architecture(saved, self.clip.config, "the checkpoint")


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


def refuse_another_architecture(checkpoint: CLIPConfig, run: CLIPConfig, source: str) -> None:
    """
    Raises:
        ValueError: the run's architecture is not the checkpoint's; names what differs.
    """
    lines = differences(checkpoint.to_dict(), run.to_dict(), "model.clip", ("the checkpoint has", "this run"))
    if lines:
        raise ValueError(f"{source} holds another architecture than this run:\n" + "\n".join(lines))


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
