"""Training under Lightning: the module around CLIP, one step, and the validation between steps."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..common.arguments import shown
from ..common.processes import all_gather_objects, warn_once
from ..common.wording import some
from ..config import CLIPConfig
from ..data.module import PairDataModule
from ..data.pairs import Batch, Positives
from ..data.wordings.kept import Wordings
from ..evaluation.measures.ranking import recall_at_1
from ..images import normalize
from ..loss import clip_loss, siglip_loss
from ..model import CLIP
from ..weights.computation import other_computation
from ..weights.read import LIGHTNING_CONFIG_KEY, LIGHTNING_WORDINGS_KEY
from .distillation import Teacher, distillation_loss
from .fsdp import local, shard
from .lightning_private import leave_samplers
from .optimizer import CommonSchedule, OptimizerConfig, learning_rate_factor, make_optimizer, warmup_steps
from .recompute import drop_patches_in_training, encode_in_parts, recompute_blocks
from .start import (
    Locked,
    LossKind,
    locked_part,
    num_distinct,
    part_of_validation,
    refuse_callbacks,
    refuse_half_weights,
    refuse_other_data,
    refuse_other_weights,
    refuse_settings_of_a_locked_tower,
    starting_model,
    warn_of_slow_precision,
)

MAX_LOGIT_SCALE = math.log(100)  # paper section 2.5: more than 100 times the cosine was unstable
_LOSS_CHUNK = 1024  # images whose logits are in memory at once
_UNFROZEN_KEY = "miniclip_unfrozen"  # of a checkpoint: parameters that were frozen first and are trained now
VALIDATED = ("val/loss", "val/retrieval_r1")  # what a validation logs
COMPILED_LENGTH_MULTIPLE = 8  # compiled towers see text lengths that are multiples of this


class StepResult(NamedTuple):
    """The current step, detached, for the callbacks that check and measure it before the weights move."""

    batch: Batch
    mask: Tensor | None  # (b,) bool, the pairs that count; None if all do
    groups: Tensor | None  # (b,) equal where pairs share their target
    image_features: Tensor  # (b, E)
    text_features: Tensor  # (b, E)
    loss: Tensor  # this process's part; its mean over the processes is the loss of the whole batch
    distillation: Tensor | None


class CLIPTraining(pl.LightningModule):
    """One step of contrastive training, and the validation between steps.

    What else a run needs are callbacks: `finite.StopIfNotFinite`, `resume.Resumption`, `StepMetrics`,
    `RunMetrics` and `RejectedSamples` of `measuring`. The command line adds them; a trainer of one's own has to.

    Args:
        clip: the architecture.
        optimizer: the optimiser and its schedule.
        max_rejected: share of the samples seen so far that may be unreadable before the run stops.
        micro_batch_size: pairs that a process encodes at once. Memory then grows with this and not with the batch that
            is contrasted, at the price of encoding twice: the towers' activations are computed again for the gradient
            (as in GradCache, Gao et al. 2021; the gradients are exact). By default all at once.
        positives: which texts and images of a batch fit each other: those of a "pair" alone; of the very same
            "caption"; or of a "group" that the data name (`data.group`). What fits shares a target. "caption" is for
            the "siglip" loss; it changes nothing of the "clip" loss, whose softmax treats equal captions alike anyway.
        loss: "clip": each image picks its text among all and each text its image. "siglip": each image and text
            match or do not, which needs a bias in `clip`.
        ema_decay: decay of an exponential moving average of the weights (0.999; 0.99 for a few hundred steps).
            Validation scores the average and `best/` is the average; the steps use the weights themselves. The decay
            starts lower and rises to this value.
        start_from: a trained model to start from, anything that `miniclip.load` takes. It sets the architecture, so
            `clip` is left out. The weights are held in float32.
        locked: the tower that is not trained and keeps no activations: "image" fits a text tower to a trained
            image tower (LiT, Zhai et al. 2022, https://arxiv.org/abs/2111.07991), "text" the reverse. The projection
            behind a locked timm tower is trained, because timm's weights have none.
        image_weights: weights for timm's image tower: "timm" for timm's own under that name (downloaded once),
            or a file of weights with timm's names.
        teacher: a larger CLIP to distil, anything that `miniclip.load` takes.
        distillation: weight of the teacher's loss, above 0 to 1; unused without a teacher.
        checkpoint_activations: the towers' blocks keep only their inputs and recompute the rest for the gradient:
            less memory, about a quarter more time, the same gradients.
        patch_dropout: share of each image's patches that a step leaves out (ViT only): faster, at some price in
            accuracy (Li et al. 2022, https://arxiv.org/abs/2212.00794). Validation always sees all patches.
        compile: torch.compile for the towers in training. Costs minutes at the start; worth it on GPUs.
        seed: seed of the steps' random numbers. The command line sets it from `seed_everything`; in Python Lightning's
            function of that name does not reach it, so give it here and to `PairDataModule`.

    Raises (at the start of a run):
        ValueError: a `PairDataModule` prepares other pairs than the model takes; weights in half precision; a callback
            of Lightning's that changes what a step or a run is.
    """

    def __init__(
        self,
        clip: CLIPConfig = CLIPConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (frozen)
        max_rejected: float = 0.01,
        micro_batch_size: int | None = None,
        positives: Positives = "pair",
        loss: LossKind = "clip",
        ema_decay: float | None = None,
        start_from: str | None = None,
        locked: Locked = "none",
        image_weights: str | None = None,
        teacher: str | None = None,
        distillation: float = 0.5,
        checkpoint_activations: bool = False,
        patch_dropout: float = 0.0,
        compile: bool = False,  # noqa: A002 (torch's name)
        seed: int = 0,
    ) -> None:
        super().__init__()
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"model.micro_batch_size is {micro_batch_size}; it must be at least 1")
        if ema_decay is not None and not 0 < ema_decay < 1:
            raise ValueError(f"model.ema_decay is {ema_decay}; it must be above 0 and below 1, such as 0.999")
        if not 0 <= max_rejected <= 1:
            raise ValueError(f"model.max_rejected is {max_rejected}; it is a share of the samples, 0 to 1")
        if teacher is not None and not 0 < distillation <= 1:
            raise ValueError(f"model.distillation is {distillation}; it is a share of the loss, above 0 to 1")
        self.clip = starting_model(clip, start_from, image_weights, locked, loss, patch_dropout)
        refuse_settings_of_a_locked_tower(
            self.clip, locked, patch_dropout, optimizer.image_lr_scale, optimizer.text_lr_scale
        )
        self.starts_trained = start_from is not None
        self.locked = locked
        if (part := locked_part(self.clip, locked)) is not None:
            part.requires_grad_(False).eval()
        self.teacher, self.distillation = None if teacher is None else Teacher(teacher), distillation
        self.ema_decay = ema_decay
        self.average = None if ema_decay is None else copy.deepcopy(self.clip).requires_grad_(False)
        self.optimizer_config, self.max_rejected, self.seed = optimizer, max_rejected, seed
        self.micro_batch_size, self.positives, self.loss = micro_batch_size, positives, loss
        if checkpoint_activations:
            recompute_blocks(self.clip)
        self.patch_dropout = patch_dropout
        if patch_dropout:
            drop_patches_in_training(self.clip, patch_dropout)
        if compile:  # in place, so that parameters keep their names
            self.clip.visual.compile()
            self.clip.text.compile()
            self.clip.text_length_multiple = COMPILED_LENGTH_MULTIPLE
        self._frozen: dict[str, nn.Parameter] = {}  # when the optimizer was made, and still
        self._unfrozen: set[str] = set()  # since
        self.result: StepResult | None = None  # of the current step, until the weights have moved
        self._validation: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._validated_keys: list[str] = []
        self._shares_targets = False  # the pairs of the validation

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        _check_batch(batch)
        self._seed_step()
        image_features, text_features = self.features(batch)
        is_shared = self.trainer.world_size > 1
        mask = batch.mask
        if is_shared and mask is None:  # another process may have a hole where this one has none
            mask = torch.ones(len(batch.tokens), dtype=torch.bool, device=self.device)
        groups = self.groups(batch)
        scale = local(self.clip.logit_scale).exp()
        chunk_size = min(_LOSS_CHUNK, len(image_features))
        loss = self.contrast(self.clip)(
            image_features, text_features, scale, chunk_size=chunk_size, mask=mask, groups=groups,
            across_processes=is_shared,
        )  # fmt: skip
        distance = None
        if self.teacher is not None:
            taught = self.teacher.features(batch.images, batch.tokens, self.micro_batch_size)
            taught = as_pairs(*taught)
            distance = distillation_loss(
                image_features, text_features, scale, *taught, self.teacher.logit_scale, chunk_size, mask, is_shared
            )
            loss = (1 - self.distillation) * loss + self.distillation * distance
            distance = distance.detach()
        self.result = StepResult(
            batch, mask, groups, image_features.detach(), text_features.detach(), loss.detach(), distance
        )
        return loss

    def _seed_step(self) -> None:
        """A step's random numbers depend on the seed, the step and the rank alone, so a resumed run draws the same."""
        sequence = np.random.SeedSequence([self.seed, self.global_step, self.global_rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def groups(self, batch: Batch) -> Tensor | None:
        """(b,), equal for pairs that share their targets; None if no two do.

        Raises:
            ValueError: positives are groups, and the batch has none.
        """
        if self.positives == "caption":
            return batch.caption_ids
        if self.positives == "group" and batch.groups is None:
            raise ValueError("model.positives is 'group', and the batches have none: set data.positives to 'group'")
        return batch.groups

    def answers(self, batch: Batch) -> Tensor:
        """(b,), equal for pairs that are right answers to each other: those of a group, by default equal captions."""
        groups = self.groups(batch)
        return batch.caption_ids if groups is None else groups

    def features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Unit features of images and texts, (b, E) each; an image with several texts is encoded once."""
        return as_pairs(
            self._encode(self.encode_images, batch.images, is_locked=self.locked == "image"),
            self._encode(self.encode_texts, batch.tokens, is_locked=self.locked == "text"),
        )

    def _encode(self, encode: Callable[[Tensor], Tensor], inputs: Tensor, is_locked: bool) -> Tensor:
        size = self.micro_batch_size
        if size is None or size >= len(inputs) or not torch.is_grad_enabled():
            return encode(inputs)
        return encode_in_parts(encode, inputs, size, within=None if is_locked else self.clip)

    # A locked tower has no parameter with a gradient, so it builds no graph and keeps no activations.
    def encode_images(self, images: Tensor) -> Tensor:
        vision = self.clip.config.vision
        return self._encoder().encode_image(normalize(images, vision.mean, vision.std), normalize=True)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        return self._encoder().encode_text(tokens, normalize=True)

    def _encoder(self) -> CLIP:
        return self.clip if self.training else self.scored

    @staticmethod
    def contrast(model: CLIP) -> Callable[..., Tensor]:
        """The loss, a function of features, scale, and the other arguments of `clip_loss`."""
        bias = model.logit_bias
        return clip_loss if bias is None else partial(siglip_loss, logit_bias=local(bias))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Everything that a step changes is changed here, because the next hook may already write a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        self.result = None
        with torch.no_grad():
            if self.loss == "clip":  # SigLIP is trained without a bound
                self.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        if self.average is not None:
            assert self.ema_decay is not None
            n = self.global_step  # steps before this one
            move_average(self.average, self.clip, min(self.ema_decay, (1 + n) / (10 + n)))

    # -----------------------------------------------------------------------------------------------------------------
    # Validation

    @property
    def scored(self) -> CLIP:
        """The model that validation scores and a run leaves: the average, if there is one."""
        return self.clip if self.average is None else self.average

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        _check_batch(batch)
        # Validation has other batch sizes and no gradient: compiling for it takes longer than it does.
        with torch.compiler.set_stance("force_eager"):
            image_features, text_features = self.features(batch)
        healthy = torch.ones(len(batch.keys), dtype=torch.bool) if batch.mask is None else batch.mask
        features = image_features.float().cpu(), text_features.float().cpu()
        self._shares_targets = self.groups(batch) is not None
        self._validation.append((*features, self.answers(batch).cpu(), healthy.cpu()))
        self._validated_keys += batch.keys

    def on_validation_epoch_end(self) -> None:
        """Scores the whole set at once, so that batch size and number of processes do not change the scores."""
        own = [torch.cat(column) for column in zip(*self._validation, strict=True)]
        sizes, keys = [len(batch[0]) for batch in self._validation], self._validated_keys
        self._validation, self._validated_keys = [], []
        count = None if (data := self._data()) is None else len(data.held_out())  # the last is there several times
        if data is None and self.trainer.world_size > 1:
            num_own = num_distinct(self.trainer, sizes, all_gather_objects(keys))
            own = [column[:num_own] for column in own]
        if not self.trainer.sanity_checking and (part := part_of_validation(self.trainer)):
            warn_once(f"{' and '.join(VALIDATED)} are of a part of the validation, {part}, and no scores of all of it")
        *columns, healthy = (torch.cat(column)[:count] for column in zip(*all_gather_objects(own), strict=True))
        images, texts, answers = (column[healthy] for column in columns)
        if not len(images):
            raise ValueError("not one sample of data.val could be read; what was wrong is listed above")
        loss = self.contrast(self.scored)(
            images, texts, local(self.scored.logit_scale).exp(), chunk_size=_LOSS_CHUNK,
            groups=answers if self._shares_targets else None,
        )  # fmt: skip
        recall = (recall_at_1(images, texts, groups=answers) + recall_at_1(texts, images, groups=answers)) / 2
        # As numbers, which Lightning moves to the device: NCCL takes no tensor on the host.
        self.log_dict(dict(zip(VALIDATED, (float(loss), recall), strict=True)), sync_dist=True)

    # -----------------------------------------------------------------------------------------------------------------
    # Setting up

    def setup(self, stage: str) -> None:
        """
        Raises:
            ValueError: the trainer, its data and the model do not agree (`start.py`).
        """
        if (data := self._data()) is not None:
            refuse_other_data(self.clip.config, self.positives, data)
            leave_samplers(self.trainer)
        if stage != "fit":
            return
        refuse_half_weights(str(self.trainer.precision))
        refuse_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]
        on_cpu = self.trainer.strategy.root_device.type == "cpu"
        if on_cpu and self.trainer.is_global_zero and _autocast(str(self.trainer.precision)):
            warn_of_slow_precision(str(self.trainer.precision))
        if self.trainer.is_global_zero and (lines := other_computation(self.clip)):
            what = "the model computes something else than its config describes, so `miniclip.load` gives another model"
            warnings.warn("\n".join([f"{what} of this run's checkpoints:", *lines]), stacklevel=2)

    def _data(self) -> PairDataModule | None:
        """None for loaders of one's own."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return data if isinstance(data, PairDataModule) else None

    def configure_model(self) -> None:
        # Lightning converts later, too, but a checkpoint in double precision would have been rounded by then.
        self.trainer.precision_plugin.convert_module(self)
        if self.teacher is not None:
            self.teacher.to(self.device, self.clip.dtype)
        # Only a strategy that slices the weights has a mesh. This hook runs once for each of fit, validate, …
        if self.device_mesh is not None and not isinstance(self.clip.logit_scale, DTensor):
            for model in (self.clip, self.average):
                if model is not None:
                    # Gradients of micro-batches would be summed in the precision that weights are gathered in.
                    autocast = _autocast(str(self.trainer.precision)) if self.micro_batch_size is None else None
                    shard(model, self.device_mesh["data_parallel"], autocast)

    def configure_optimizers(self) -> Any:
        config, steps = self.optimizer_config, self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError("the run has no end, which its schedule needs: set the Trainer's max_steps or max_epochs")
        total = int(steps)
        warmup = self.warmup_steps(total, self._data())
        optimizer = make_optimizer(self.clip, config)
        self._frozen = {name: p for name, p in self.clip.named_parameters() if not p.requires_grad}
        schedule = CommonSchedule(
            optimizer,
            lambda step: learning_rate_factor(step, total, warmup, config.schedule, config.cooldown, config.final_lr),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def warmup_steps(self, total_steps: int, data: PairDataModule | None) -> int:
        """
        Args:
            data: None for loaders of one's own, whose samples and epochs are not known.

        Raises:
            ValueError: as `optimizer.warmup_steps`; or samples or epochs count the steps, and they are not known.
        """
        config = self.optimizer_config
        if data is not None:
            return warmup_steps(config, total_steps, data.batch_size, data.epoch_samples() / data.batch_size)
        if config.warmup_unit in ("samples", "epochs"):
            raise ValueError(
                f"OptimizerConfig.warmup_unit is {config.warmup_unit!r}, which needs a PairDataModule; with a loader "
                "of your own give steps or a share of the run"
            )
        return warmup_steps(config, total_steps, 1, 1)

    def on_train_start(self) -> None:
        if self.average is not None and self.global_step == 0:  # the weights may have been loaded since
            self.average.load_state_dict(self.clip.state_dict())
        for name in self._unfrozen:  # before the checkpoint of a resumed run
            self.clip.get_parameter(name).requires_grad_(True)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if unfrozen := [name for name, parameter in self._frozen.items() if parameter.requires_grad]:
            self._refuse_untrained(unfrozen)
            self._unfrozen.update(unfrozen)
            self._frozen = {name: p for name, p in self._frozen.items() if not p.requires_grad}

    def _refuse_untrained(self, unfrozen: list[str]) -> None:
        """
        Args:
            unfrozen: parameters of the model that were frozen when the optimizer was made.

        Raises:
            ValueError: they would not move, or the processes' would move apart.
        """
        trained = {id(p) for each in self.trainer.optimizers for group in each.param_groups for p in group["params"]}
        if missing := [name for name in unfrozen if id(self._frozen[name]) not in trained]:
            raise ValueError(
                f"{some(missing)} were frozen when the optimizer was made and are not now, and the optimizer has them "
                "in no group, so they would not move. Add them to it, as Lightning's "
                "BaseFinetuning.unfreeze_and_add_param_group does; or freeze them at on_train_start, not before"
            )
        if isinstance(self.trainer.strategy, DDPStrategy) and self.trainer.world_size > 1:
            raise ValueError(
                f"{some(unfrozen)} were frozen when DDP was set up and are not now, and DDP would not exchange their "
                "gradients; train in one process"
            )

    def train(self, mode: bool = True) -> CLIPTraining:
        """A locked tower stays in evaluation mode: its batch norms keep their running statistics."""
        super().train(mode)
        if (part := locked_part(self.clip, self.locked)) is not None:
            part.eval()
        return self

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """
        Raises:
            ValueError: always. Lightning's reads a pickle and builds the default architecture.
        """
        raise ValueError(
            f"CLIPTraining.load_from_checkpoint cannot read {str(checkpoint_path)!r}: miniclip.load reads its model, "
            "and `miniclip train fit … --ckpt_path FILE` resumes its run; neither runs code from the file"
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[LIGHTNING_CONFIG_KEY] = self.clip.config.to_json()
        if self.clip.wordings is not None:
            checkpoint[LIGHTNING_WORDINGS_KEY] = self.clip.wordings.to_json()
        if self._unfrozen:
            checkpoint[_UNFROZEN_KEY] = sorted(self._unfrozen)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        refuse_other_weights(checkpoint, self.clip.config, self.ema_decay)
        if LIGHTNING_WORDINGS_KEY in checkpoint:
            self.keep_wordings(Wordings.from_json(checkpoint[LIGHTNING_WORDINGS_KEY], "the checkpoint"))
        self._unfrozen = set(checkpoint.get(_UNFROZEN_KEY, ()))

    def keep_wordings(self, wordings: Wordings | None) -> None:
        """The wordings of the captions; every copy of the model knows them."""
        for model in (self.clip, self.average):
            if model is not None:
                model.wordings = wordings


def _check_batch(batch: Any) -> None:
    if not isinstance(batch, Batch):
        raise ValueError(
            f"the loader gives {shown(batch)} for a batch; CLIPTraining takes a miniclip.data.pairs.Batch, as "
            "PairDataModule's loaders and `pairs.collate` give it"
        )
    if batch.images.dtype != torch.uint8:
        raise ValueError(
            f"the batch's images are {str(batch.images.dtype).removeprefix('torch.')}; CLIPTraining normalises them "
            "itself and takes uint8, 0 to 255, as `miniclip.images.Preprocess.crop` gives them"
        )


def _autocast(precision: str) -> torch.dtype | None:
    """The dtype of products in one of Lightning's precisions, if it is another than the weights'."""
    return {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)


def as_pairs(image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
    """(b / K, E) of images and (b, E) of their K texts each -> (b, E) of both."""
    per_image = len(text_features) // len(image_features)
    return image_features if per_image == 1 else image_features.repeat_interleave(per_image, dim=0), text_features


@torch.no_grad()
def move_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * model; includes batch norm's statistics, whose counts are copied."""
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    averaged, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    get_ema_multi_avg_fn(decay)(averaged, current, None)
    for count, now in pairs:
        if not count.is_floating_point():
            count.copy_(now)
