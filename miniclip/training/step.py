"""Training under Lightning: the module around CLIP, one step and the validation between."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .. import tokenizer
from ..common.files import write_text
from ..common.processes import all_gather_objects, gather
from ..config import SIGLIP_LOGIT_BIAS, SIGLIP_LOGIT_SCALE, CLIPConfig, differences
from ..data.module import PairDataModule
from ..data.pairs import Batch
from ..evaluation.measures.ranking import recall_at_1
from ..images import normalize
from ..loss import clip_loss, siglip_chance, siglip_loss
from ..model import CLIP, VisionTransformer
from ..timm_tower import TimmTower
from ..weights.load import build
from ..weights.read import LIGHTNING_AVERAGE_PREFIX, LIGHTNING_CONFIG_KEY, locate, read_checkpoint
from .distillation import Teacher, distillation_loss
from .finite import NON_FINITE, Step
from .fsdp import local, shard, whole
from .measuring import in_batch_accuracy, is_logged
from .optimizer import OptimizerConfig, learning_rate_factor, make_optimizer, parameter_groups, warmup_steps
from .recompute import drop_patches_in_training, recompute_blocks, recomputed
from .resume import SETTINGS, refuse_another_architecture

LossKind = Literal["clip", "siglip"]
MAX_LOGIT_SCALE = math.log(100)  # paper section 2.5: more than 100 times the cosine was unstable
_LOSS_CHUNK = 1024  # images whose logits are in memory at once
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
        loss: "clip", each image picks its text among all and each text its image; or "siglip", each image and text
            fit or do not, for which `clip` has to have a bias.
        ema_decay: keeps an exponential moving average of the weights, of which each step leaves this much (0.999, or
            0.99 for a run of some hundred steps). It is what validation scores and what `best/` is; training goes on
            with the weights themselves. Early on, when there is little to average, each step leaves less.
        start_from: a trained model to go on from, anything that `miniclip.load` takes. Its architecture is taken, too,
            so `clip` is left out. The weights are held in float32.
        locked: the tower that stays as it is and costs no memory for gradients: "image" fits a text tower to a trained
            image tower (LiT, Zhai et al. 2022, https://arxiv.org/abs/2111.07991), "text" the reverse. The projection
            behind a tower of timm's learns, as timm's weights have none.
        image_weights: what timm's image tower starts from: "timm" for what timm has under that name (downloaded once),
            or a file of weights with timm's names.
        teacher: a larger CLIP to learn from as well, anything that `miniclip.load` takes.
        distillation: share of the loss that is the distance to the teacher, above 0 to 1; without one it says nothing.
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
        loss: LossKind = "clip",
        ema_decay: float | None = None,
        start_from: str | None = None,
        locked: Literal["none", "image", "text"] = "none",
        image_weights: str | None = None,
        teacher: str | None = None,
        distillation: float = 0.5,
        checkpoint_activations: bool = False,
        patch_dropout: float = 0.0,
        compile: bool = False,  # noqa: A002 (torch's name)
        seed: int = 0,
    ) -> None:
        super().__init__()
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"model.ema_decay is {ema_decay}; it must be above 0 and below 1, such as 0.999")
        start = None if start_from is None else read_checkpoint(locate(start_from))
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
        refuse_what_contradicts(clip, loss, patch_dropout)
        self.clip = CLIP(clip) if start is None else build(start, str(start_from))
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
        self.ema_decay = ema_decay
        self.average = None if ema_decay is None else copy.deepcopy(self.clip).requires_grad_(False)
        self.optimizer_config = optimizer
        self.max_rejected = max_rejected
        self.micro_batch_size, self.positives, self.loss = micro_batch_size, positives, loss
        self.num_seen = self.num_rejected = self.num_truncated = 0
        self._validation: list[tuple[Tensor, Tensor, Tensor]] = []
        self._step: Step | None = None
        self._resumed_from: dict[str, Any] | None = None
        self.seed = seed
        self._prepare_towers(checkpoint_activations, patch_dropout, compile)
        self._while_validating = ExitStack()

    def _prepare_towers(self, checkpoint_activations: bool, patch_dropout: float, is_compiled: bool) -> None:
        if checkpoint_activations:
            recompute_blocks(self.clip)
        self.patch_dropout = patch_dropout
        if patch_dropout:
            assert isinstance(self.clip.visual, VisionTransformer)
            drop_patches_in_training(self.clip.visual.transformer, patch_dropout)
        if is_compiled:  # in place, so that parameters keep their names
            self.clip.visual.compile()
            self.clip.text.compile()
            self.clip.text_length_multiple = COMPILED_LENGTH_MULTIPLE

    def configure_model(self) -> None:
        # Lightning does so later, too; a checkpoint in double precision would be rounded on its way in by then.
        self.trainer.precision_plugin.convert_module(self)
        if self.teacher is not None:
            self.teacher.to(self.device, self.clip.dtype)
        # Only a strategy that shares the weights out has a mesh. Called once for each of fit, validate, …
        if self.device_mesh is not None and not isinstance(self.clip.logit_scale, DTensor):
            for model in (self.clip, self.average):
                if model is not None:
                    shard(model, self.device_mesh["data_parallel"])

    @property
    def scored(self) -> CLIP:
        """The model that validation scores and a run leaves: the average, where one is kept."""
        return self.clip if self.average is None else self.average

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
        return torch.cat([recomputed(encode, part, within=self.clip) for part in inputs.split(size)])

    def _encode(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self._encode_images(images), self._encode_texts(tokens)

    # A locked tower has no parameter with a gradient and so builds no graph and keeps no activations.
    def _encode_images(self, images: Tensor) -> Tensor:
        vision = self.clip.config.vision
        return self._model().encode_image(normalize(images, vision.mean, vision.std), normalize=True)

    def _encode_texts(self, tokens: Tensor) -> Tensor:
        return self._model().encode_text(tokens, normalize=True)

    def _model(self) -> CLIP:
        return self.clip if self.training else self.scored

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

    @staticmethod
    def contrast(model: CLIP) -> Callable[..., Tensor]:
        """The loss, of features, scale, and what else `clip_loss` takes."""
        bias = model.logit_bias
        return clip_loss if bias is None else partial(siglip_loss, logit_bias=local(bias))

    def _chance(self, num_pairs: int, groups: Tensor | None, mask: Tensor | None) -> float:
        """What the loss is for features that say nothing, of the pairs of all processes."""
        if self.loss == "clip":
            return math.log(num_pairs)
        if groups is None:
            return siglip_chance(num_pairs)
        everyone = gather(groups) if mask is None else gather(groups)[gather(mask)]
        return siglip_chance(len(everyone), everyone)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # The log's step, which Lightning counts one too high in a run that had ended and is made longer.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.global_step

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
        scale = local(self.clip.logit_scale).exp()
        groups = batch.caption_ids if self.positives == "caption" else None
        chunk_size = min(_LOSS_CHUNK, len(image_features))
        loss = self.contrast(self.clip)(
            image_features,
            text_features,
            scale,
            chunk_size=chunk_size,
            mask=mask,
            groups=groups,
            across_processes=is_shared,
        )
        distance = None
        if self.teacher is not None:
            taught = self.teacher.features(batch.images, batch.tokens, self.micro_batch_size)
            distance = distillation_loss(
                image_features, text_features, scale, *taught, self.teacher.logit_scale, chunk_size, mask, is_shared
            )
            loss = (1 - self.distillation) * loss + self.distillation * distance
        self._step = Step(batch, loss.detach(), image_features.detach(), text_features.detach())
        if is_logged(self.trainer, self.global_step + 1):
            images, texts = gather(image_features.detach()), gather(text_features.detach())
            healthy = mask if mask is None else gather(mask)
            of_images, of_texts = in_batch_accuracy(images, texts, healthy)
            values: dict[str, Tensor | float] = {
                "loss": loss.detach(),
                "chance": self._chance(len(image_features) * self.trainer.world_size, groups, mask),
                "accuracy": (of_images + of_texts) / 2,
                "accuracy_image_to_text": of_images,
                "accuracy_text_to_image": of_texts,
                "logit_scale": scale.detach(),
            }
            if self.clip.logit_bias is not None:
                values["logit_bias"] = local(self.clip.logit_bias).detach()
            if distance is not None:
                values["distillation"] = distance.detach()
            # The loss of a process is its share of the whole; their mean is that.
            self.log_dict({f"train/{name}": value for name, value in values.items()}, sync_dist=is_shared)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._refuse_what_is_not_finite(optimizer)
        self._log_gradients_and_rates(optimizer)

    def _log_gradients_and_rates(self, optimizer: torch.optim.Optimizer) -> None:
        """Norms of the gradients: unscaled, the mean over the processes, and not clipped yet."""
        if not is_logged(self.trainer, self.global_step + 1):
            return
        for name, tower in (("image", self.clip.visual), ("text", self.clip.text)):
            gradients = [p.grad for p in tower.parameters() if p.grad is not None]
            if gradients:
                self.log(f"train/grad_norm_{name}", whole(torch.nn.utils.get_total_norm(gradients)))
        rates: dict[str, float] = {}
        for group in optimizer.param_groups:  # groups of one kind share a rate, or the highest is told
            name = "train/lr_muon" if "parts" in group else "train/lr"  # Muon's own
            rates[name] = max(group["lr"], rates.get(name, 0.0))
        self.log_dict(rates)

    def _refuse_what_is_not_finite(self, optimizer: torch.optim.Optimizer) -> None:
        """Stops, in all processes alike, if the loss or the gradient is not finite.

        One question for both, as each answer has to wait for the device.
        """
        assert self._step is not None
        loss, norm = self._step.loss, self._step.loss
        # Gradients that overflow in half precision are its scaler's to deal with: it passes over the step.
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            norm = whole(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))
        is_sick = ~(torch.isfinite(loss) & torch.isfinite(norm))
        if bool(self.trainer.strategy.reduce(is_sick.int(), reduce_op="max")):
            self._stop_as_not_finite(float(norm), optimizer)
        self._step = None

    def _stop_as_not_finite(self, norm: float, optimizer: torch.optim.Optimizer) -> NoReturn:
        """Leaves what is known of the batch in the run's folder."""
        assert self._step is not None
        parts = all_gather_objects((self._step.loss.item(), self._step.describe(self.trainer.global_rank)))
        samples = [sample for _, share in parts for sample in share]
        # A mean over processes, and not finite where any of theirs is not.
        loss, step = sum(loss for loss, _ in parts) / len(parts), self.global_step + 1
        rate, scale = optimizer.param_groups[0]["lr"], local(self.clip.logit_scale).exp().item()
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

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """All that a step changes, changes here: a checkpoint may be written before any later hook of ours."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            if self.loss == "clip":  # SigLIP is trained without a bound
                self.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if self.average is not None:
            assert self.ema_decay is not None
            n = self.global_step  # steps before this one
            move_average(self.average, self.clip, min(self.ema_decay, (1 + n) / (10 + n)))

    def on_validation_start(self) -> None:
        # Other batch sizes, and no gradient: they would be compiled anew, for longer than they take.
        self._while_validating.enter_context(torch.compiler.set_stance("force_eager"))

    def on_validation_end(self) -> None:
        self._while_validating.close()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._count(batch)
        image_features, text_features = self.features(batch)
        healthy = torch.ones(len(batch.keys), dtype=torch.bool) if batch.mask is None else batch.mask
        self._validation.append((image_features.float().cpu(), text_features.float().cpu(), healthy.cpu()))

    def on_validation_epoch_end(self) -> None:
        """Over the whole set at once, so that the numbers depend neither on the batch size nor on the processes."""
        own = [torch.cat(column) for column in zip(*self._validation, strict=True)]
        self._validation.clear()
        count = len(self.trainer.datamodule.held_out())  # type: ignore[attr-defined]
        images, texts, healthy = (torch.cat(column)[:count] for column in zip(*all_gather_objects(own), strict=True))
        images, texts = images[healthy], texts[healthy]
        if not len(images):
            raise ValueError("not one sample of data.val could be read; what was wrong is listed above")
        loss = self.contrast(self.scored)(images, texts, local(self.scored.logit_scale).exp(), chunk_size=_LOSS_CHUNK)
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
        checkpoint[LIGHTNING_CONFIG_KEY] = self.clip.config.to_json()
        checkpoint[SETTINGS] = self._settings()

    def _settings(self) -> dict[str, Any]:
        """What else a run goes by; a checkpoint tells, and a run resumed under others says so."""
        return {
            "model.optimizer": {**asdict(self.optimizer_config), "betas": list(self.optimizer_config.betas)},
            "model.loss": self.loss,
            "model.positives": self.positives,
            "model.locked": self.locked,
            "model.distillation": 0.0 if self.teacher is None else self.distillation,
            "model.ema_decay": self.ema_decay,
            "trainer.precision": str(self.trainer.precision),
            "steps": int(self.trainer.estimated_stepping_batches),
            "processes": self.trainer.world_size,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = CLIPConfig.from_json(checkpoint[LIGHTNING_CONFIG_KEY])
        refuse_another_architecture(saved, self.clip.config, "the checkpoint")
        is_averaged = any(name.startswith(LIGHTNING_AVERAGE_PREFIX) for name in checkpoint["state_dict"])
        if is_averaged != (self.average is not None):
            raise ValueError(
                f"the checkpoint holds {'an' if is_averaged else 'no'} average of the weights, and model.ema_decay is "
                f"{self.ema_decay}; {'set it as its run did' if is_averaged else 'it can be set for a new run only'}"
            )
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._resumed_from = checkpoint.get(SETTINGS)
            self._refuse_state_of_others(checkpoint["optimizer_states"][0]["param_groups"], self._resumed_from or {})

    def _refuse_state_of_others(self, saved_groups: list[dict[str, Any]], before: dict[str, Any]) -> None:
        """What the optimiser remembers is of its kind, and of parameters in groups of one rate each."""
        saved, own = before.get("model.optimizer", {}), asdict(self.optimizer_config)
        values = [(f"model.optimizer.{name}", saved.get(name), own[name]) for name in ("kind", "timm_name")]
        values.append(("model.locked", before.get("model.locked"), self.locked))
        groups = parameter_groups(self.clip, self.optimizer_config)
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
            rates = ("layer_decay", "image_lr_scale", "text_lr_scale")
            values += [(f"model.optimizer.{name}", saved.get(name), own[name]) for name in rates]
        for name, then, now in values:
            if then not in (None, now):
                raise ValueError(
                    f"the checkpoint was trained with {name} {then}, this run has {now}, which can't go on with the "
                    "other's state; go on with the same, or begin a run in another folder"
                )

    def on_train_start(self) -> None:
        if self.average is not None and self.global_step == 0:  # the weights may have been loaded since
            self.average.load_state_dict(self.clip.state_dict())
        if self._resumed_from is not None:
            self._go_on_under_own_settings(self._resumed_from)

    def _go_on_under_own_settings(self, saved: dict[str, Any]) -> None:
        """A resumed run goes by its own rates and decays, where Lightning would silently go by the checkpoint's."""
        lines = differences(saved, self._settings(), "", ("the checkpoint has", "this run"))
        if lines and self.trainer.is_global_zero:
            print("This run goes on under other settings than its checkpoint:\n" + "\n".join(lines), flush=True)
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        fresh = make_optimizer(self.clip, self.optimizer_config).param_groups
        assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
        scheduler.base_lrs = [group["lr"] for group in fresh]
        for group, own, factor in zip(optimizer.param_groups, fresh, scheduler.lr_lambdas, strict=True):
            group.update({name: value for name, value in own.items() if name != "params"})
            group["initial_lr"], group["lr"] = own["lr"], own["lr"] * factor(scheduler.last_epoch)


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model; batch norm's statistics too, while its counts are copied."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    averaged, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    get_ema_multi_avg_fn(decay)(averaged, current, None)
    for count, now in pairs:
        if not count.is_floating_point():
            count.copy_(now)


def refuse_what_contradicts(clip: CLIPConfig, loss: LossKind, patch_dropout: float) -> None:
    """
    Raises:
        ValueError: an architecture that can't be trained, or not in the way that is asked for.
    """
    if clip.towers != "both":
        raise ValueError(f"model.clip.towers is {clip.towers!r}; both towers are needed to train them together")
    tokenizer.refuse_other_ids(clip.text, "model.clip.text", "the tokenizer's")
    if not 0 <= patch_dropout < 1:
        raise ValueError(f"model.patch_dropout is {patch_dropout}; it is a share, 0 to below 1")
    if patch_dropout and clip.vision.kind != "vit":
        raise ValueError(
            f"model.patch_dropout is {patch_dropout} and model.clip.vision.kind {clip.vision.kind!r}; only a "
            "'vit' can do without some of its patches"
        )
    if loss not in get_args(LossKind):
        raise ValueError(f"model.loss is {loss!r}; valid are {', '.join(get_args(LossKind))}")
    if loss == "siglip" and clip.init_logit_bias is None:
        raise ValueError(
            "model.loss is 'siglip', which needs a bias: set model.clip.init_logit_bias and init_logit_scale; "
            f"the paper's are {SIGLIP_LOGIT_BIAS:g} and {SIGLIP_LOGIT_SCALE:.4f}, which is ln 10"
        )
    if loss == "clip" and clip.init_logit_bias is not None:
        raise ValueError(
            f"model.clip.init_logit_bias is {clip.init_logit_bias:g}, and a bias changes nothing in the loss "
            "'clip': leave it out, or set model.loss=siglip"
        )
