"""Training under Lightning: the module around CLIP, one step and the validation between."""

from __future__ import annotations

import math
import sys
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from . import tokenizer, weights
from .config import CLIPConfig
from .data import Batch
from .evaluate import recall_at_1
from .loss import clip_loss, gather
from .model import CLIP, Transformer, VisionTransformer
from .optim import OptimizerConfig, make_optimizer, warmup_cosine
from .towers import ModifiedResNet, TimmTower, recomputed
from .transforms import normalize

MAX_LOGIT_SCALE = math.log(100)  # paper section 2.5: more than 100 times the cosine was unstable
_LOSS_CHUNK = 1024  # images whose logits are in memory at once
_ACCURACY_PAIRS = 1024  # in-batch accuracy is measured on at most so many
COMPILED_LENGTH_MULTIPLE = 8  # texts of compiled towers are as long as some multiple of it


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
        checkpoint_activations: the towers' blocks keep their inputs alone and are computed again for the gradient:
            less memory, about a quarter more time, the same gradients.
        patch_dropout: share of each image's patches that a step leaves out, of a ViT: faster, at some price in
            accuracy (Li et al. 2022, https://arxiv.org/abs/2212.00794). Scores are always of all patches.
        compile: torch.compile for the towers in training. Costs minutes at the start; worth it on GPUs.
        seed: of what a step draws at random; set from `seed_everything`.
    """

    def __init__(
        self,
        clip: CLIPConfig = CLIPConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        max_rejected: float = 0.01,
        micro_batch_size: int | None = None,
        positives: Literal["pair", "caption"] = "pair",
        checkpoint_activations: bool = False,
        patch_dropout: float = 0.0,
        compile: bool = False,  # noqa: A002 (torch's name)
        seed: int = 0,
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
        if not 0 <= patch_dropout < 1:
            raise ValueError(f"model.patch_dropout is {patch_dropout}; it is a share, 0 to below 1")
        if patch_dropout and clip.vision.kind != "vit":
            raise ValueError(
                f"model.patch_dropout is {patch_dropout} and model.clip.vision.kind {clip.vision.kind!r}; only a "
                "'vit' can do without some of its patches"
            )
        self.clip = CLIP(clip)
        self.optimizer_config = optimizer
        self.max_rejected = max_rejected
        self.micro_batch_size, self.positives = micro_batch_size, positives
        self.num_seen = self.num_rejected = self.num_truncated = 0
        self._validation: list[tuple[Tensor, Tensor]] = []
        self.seed = seed
        if checkpoint_activations:
            for module in self.clip.modules():
                if isinstance(module, Transformer | ModifiedResNet):
                    module.checkpoint_activations = True
                elif isinstance(module, TimmTower):
                    module.checkpoint_blocks()
        if isinstance(self.clip.visual, VisionTransformer):
            self.clip.visual.patch_dropout = patch_dropout
        if compile:  # in place, so that parameters keep their names
            self.clip.visual.compile()
            self.clip.text.compile()
            self.clip.text_length_multiple = COMPILED_LENGTH_MULTIPLE
        self._while_validating = ExitStack()

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit features of images and texts, (b, E) each."""
        size = self.micro_batch_size or len(batch.images)
        if size >= len(batch.images) or not torch.is_grad_enabled():
            return self._encode(batch.images, batch.tokens)
        parts = [
            recomputed(self._encode, images, tokens, within=self.clip)
            for images, tokens in zip(batch.images.split(size), batch.tokens.split(size), strict=True)
        ]
        image_features, text_features = (torch.cat(features) for features in zip(*parts, strict=True))
        return image_features, text_features

    def _encode(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        vision = self.clip.config.vision
        pixels = normalize(images, vision.mean, vision.std)
        return self.clip.encode_image(pixels, normalize=True), self.clip.encode_text(tokens, normalize=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        # What a step draws depends on the step alone, so a run that is resumed draws what it would have drawn.
        drawn_from = np.random.SeedSequence([self.seed, self.global_step, self.global_rank])
        torch.manual_seed(int(drawn_from.generate_state(1, np.uint64)[0]))
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

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        with torch.no_grad():
            self.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def on_validation_start(self) -> None:
        # Other batch sizes, and no gradient: they would be compiled anew, for longer than they take.
        self._while_validating.enter_context(torch.compiler.set_stance("force_eager"))

    def on_validation_end(self) -> None:
        self._while_validating.close()

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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = CLIPConfig.from_json(checkpoint[weights.LIGHTNING_CONFIG_KEY]).to_dict()
        if differences := _differences(saved, self.clip.config.to_dict(), "model.clip"):
            raise ValueError("the checkpoint holds another architecture than this run:\n" + "\n".join(differences))


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
