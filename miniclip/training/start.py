"""The model that a run starts from: random weights, a trained CLIP, or weights of timm's; and what contradicts it.

The trainer and its data have to agree with the model, under the command line and under a Trainer of one's own.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import pytorch_lightning as pl
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DistributedSampler

from .. import tokenizer
from ..common.wording import some
from ..config import SIGLIP_LOGIT_BIAS, SIGLIP_LOGIT_SCALE, CLIPConfig, differences
from ..data.module import PairDataModule
from ..data.pairs import Positives
from ..fast import bfloat16
from ..model import CLIP
from ..timm_tower import TimmTower
from ..weights.load import build, preprocess_for
from ..weights.pickles import read_pickle
from ..weights.read import LIGHTNING_AVERAGE_PREFIX, LIGHTNING_CONFIG_KEY, locate, read_checkpoint
from ..weights.unwrap import state_dicts

LossKind = Literal["clip", "siglip"]
Locked = Literal["none", "image", "text"]

_TIMMS_ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")  # of a checkpoint; it loads the first there is


def starting_model(
    clip: CLIPConfig, start_from: str | None, image_weights: str | None, locked: Locked, loss: LossKind, dropout: float
) -> CLIP:
    """The arguments are those of `CLIPTraining`.

    Raises:
        ValueError: two sources for the same weights, another architecture than the weights', a locked tower of random
            weights, or `refuse_what_contradicts`.
    """
    if start_from is not None and image_weights is not None:
        raise ValueError(
            f"model.start_from is {start_from!r} and model.image_weights {image_weights!r}; the first holds both "
            "towers' weights already, so give one of the two"
        )
    start = None if start_from is None else read_checkpoint(locate(start_from))
    if start is not None:
        if loss == "siglip" and start.config.init_logit_bias is None:
            raise ValueError(
                f"model.loss is 'siglip', which needs a bias, and the model of model.start_from {start_from!r} has "
                "none: leave model.loss out, or start from one that was trained with this loss, or from random weights"
            )
        if clip not in (CLIPConfig(), start.config):
            refuse_another_architecture(start.config, clip, f"model.start_from {start_from!r}")
        clip = start.config
    refuse_what_contradicts(clip, loss, dropout)
    if (locked == "image" and not (start or image_weights)) or (locked == "text" and not start):
        raise ValueError(
            f"model.locked is {locked!r}, and that tower's weights are random; give model.start_from"
            + (", or model.image_weights for an image tower of timm's" if locked == "image" else "")
        )
    model = CLIP(clip) if start is None else build(start, str(start_from))
    if image_weights is not None:
        if not isinstance(model.visual, TimmTower):
            raise ValueError(
                f"model.image_weights is for towers of timm's, and model.clip.vision.kind is {clip.vision.kind!r}"
            )
        file = None if image_weights == "timm" else image_weights
        model.visual.load_trunk(clip.vision, clip.embed_dim, file)
        if file:
            _warn_of_other_entries(file)
    return model


def _warn_of_other_entries(file: str) -> None:
    """Of several models in a file (timm's trainer keeps an average beside the last weights), timm chose by itself."""
    with suppress(ValueError):  # no pickle, so it has one alone
        entries = [entry for entry, _ in state_dicts(read_pickle(Path(file)))]
        taken = next((entry for entry in _TIMMS_ENTRIES if entry in entries), None)
        if taken and (others := [repr(entry) for entry in entries if entry != taken]):
            warnings.warn(
                f"{file} holds several models; the entry {taken!r} is loaded, as timm does, not {some(others)}",
                stacklevel=2,
            )


def locked_part(model: CLIP, locked: Locked) -> nn.Module | None:
    """What is not trained: a tower, or timm's trunk without the projection behind it."""
    if locked == "none":
        return None
    if locked == "text":
        return model.text
    return model.visual.trunk if isinstance(model.visual, TimmTower) else model.visual


def refuse_settings_of_a_locked_tower(
    model: CLIP, locked: Locked, patch_dropout: float, image_lr_scale: float, text_lr_scale: float
) -> None:
    """
    Raises:
        ValueError: one that has no effect, because the tower that it is of is locked as a whole.
    """
    part, settings = locked_part(model, locked), dict[str, tuple[float, float]]()
    if part is model.visual:
        settings = {"patch_dropout": (patch_dropout, 0.0), "optimizer.image_lr_scale": (image_lr_scale, 1.0)}
    elif part is model.text:
        settings = {"optimizer.text_lr_scale": (text_lr_scale, 1.0)}
    for name, (value, default) in settings.items():
        if value != default:
            raise ValueError(
                f"model.{name} is {value}, which has no effect: model.locked is {locked!r}, so that tower is not "
                "trained; leave one of the two out"
            )


def refuse_another_architecture(checkpoint: CLIPConfig, run: CLIPConfig, source: str) -> None:
    """
    Raises:
        ValueError: the run's architecture is not the checkpoint's; names what differs.
    """
    lines = differences(checkpoint.to_dict(), run.to_dict(), "model.clip", ("the checkpoint has", "this run"))
    if lines:
        old, new = [(each.vision.image_size, each.text.context_length) for each in (checkpoint, run)]
        sizes = [f"{name}={b}" for name, a, b in zip(("image_size", "context_length"), old, new, strict=True) if a != b]
        if len(sizes) == len(lines):
            lines.append(
                "To start at another size, save the resized model and start from that: "
                f"miniclip.save(miniclip.load(CHECKPOINT, {', '.join(sizes)})[0], FOLDER)"
            )
        raise ValueError(f"{source} holds another architecture than this run:\n" + "\n".join(lines))


def refuse_other_weights(checkpoint: dict[str, Any], clip: CLIPConfig, ema_decay: float | None) -> None:
    """
    Raises:
        ValueError: a run's own checkpoint holds another architecture, or an average of the weights where the run has
            none, or none where it has one.
    """
    refuse_another_architecture(CLIPConfig.from_json(checkpoint[LIGHTNING_CONFIG_KEY]), clip, "the checkpoint")
    is_averaged = any(name.startswith(LIGHTNING_AVERAGE_PREFIX) for name in checkpoint["state_dict"])
    if is_averaged != (ema_decay is not None):
        raise ValueError(
            f"the checkpoint holds {'an' if is_averaged else 'no'} average of the weights, and model.ema_decay is "
            f"{ema_decay}; {'set it as its run did' if is_averaged else 'it can be set for a new run only'}"
        )


def refuse_what_contradicts(clip: CLIPConfig, loss: LossKind, patch_dropout: float) -> None:
    """
    Raises:
        ValueError: the architecture cannot be trained, or not with this loss or patch dropout.
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


# ---------------------------------------------------------------------------------------------------------------------
# The trainer and its data

HALF_WEIGHTS = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")
_REFUSED_CALLBACKS: dict[type[Callback], str] = {
    StochasticWeightAveraging: "it replaces the schedule and averages after the last validation; set model.ema_decay",
    WeightAveraging: "the average would be neither validated nor saved as best/; set model.ema_decay",
    GradientAccumulationScheduler: "the loss contrasts the pairs of one batch; raise data.batch_size instead",
    BatchSizeFinder: "the batch size changes the loss; set data.batch_size, and model.micro_batch_size for the memory",
    LearningRateFinder: "it takes steps before the run, which are not in its log; set model.optimizer.lr",
    BackboneFinetuning: "a CLIP has no backbone; set model.locked",
    ModelPruning: "it prunes after validations, so that what is saved was never validated",
}


def refuse_half_weights(precision: str) -> None:
    """
    Args:
        precision: trainer.precision.

    Raises:
        ValueError: the weights themselves would be in half precision.
    """
    if precision in HALF_WEIGHTS:
        mixed = "bf16-mixed" if precision.startswith("bf16") else "16-mixed"
        raise ValueError(
            f"trainer.precision is {precision}, which keeps the weights themselves in half precision, where "
            f"small steps are lost to rounding. {mixed} is as fast and keeps them in float32"
        )


def warn_of_slow_precision(precision: str) -> None:
    """Of one whose products are in bfloat16, where the CPU has no instructions for them."""
    if not bfloat16.is_fast():
        warnings.warn(
            f"trainer.precision is {precision}, and this CPU has neither AVX512-BF16 nor AMX: steps are slower than in "
            "float32, without AVX-512 tens of times. Leave it out",
            stacklevel=3,
        )


def refuse_callbacks(callbacks: Iterable[Callback]) -> None:
    """
    Raises:
        ValueError: a callback of Lightning's that changes what a step or a run is.
    """
    for callback in callbacks:
        for kind, why in _REFUSED_CALLBACKS.items():
            if isinstance(callback, kind):
                raise ValueError(f"trainer.callbacks has {type(callback).__name__}, which is not supported: {why}")


def refuse_other_data(config: CLIPConfig, positives: Positives, data: PairDataModule) -> None:
    """The command line sets these of the data from the model.

    Raises:
        ValueError: pictures would be prepared otherwise than the model's, or texts be cut or paired otherwise.
    """
    ours, theirs = preprocess_for(config), data.preprocess
    pairs = {
        "image_size": (ours.image_size, data.image_size),
        "context_length": (config.text.context_length, data.context_length),
        "preprocess": (ours.style, theirs.style),
        "resize": (ours.resize, theirs.resize),
        "resize_size": (ours.resize_size, theirs.resize_size),
        "interpolation": (ours.interpolation, theirs.interpolation),
        "positives": (positives, data.positives),
    }
    wrong = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if wrong:
        lines = [f"  {name}: the model has {own!r}, the data {other!r}" for name, (own, other) in wrong.items()]
        options = ", ".join(f"{name}={own!r}" for name, (own, _) in wrong.items())
        what = "the data module prepares other pairs than the model takes:"
        raise ValueError("\n".join([what, *lines, f"give it what the model has: PairDataModule(…, {options})"]))


# ---------------------------------------------------------------------------------------------------------------------
# What a validation under a loader of one's own scores: each sample once, and all of them or a part that is named


def part_of_validation(trainer: pl.Trainer) -> str | None:
    """What the current validation is a part of, and by which setting; None if it is all of its loader."""
    scored, whole = trainer.num_val_batches[0], _length(_loader(trainer))
    if math.isinf(scored) or (whole is not None and scored >= whole):
        return None
    names = ("fast_dev_run", "overfit_batches", "limit_val_batches")
    name = next(name for name in names if getattr(trainer, name))
    value = getattr(trainer, name)
    return f"the first {scored:g} of {'all' if whole is None else f'{whole:g}'} batches (trainer.{name} is {value})"


def _loader(trainer: pl.Trainer) -> Any:
    return tree_leaves(trainer.val_dataloaders)[0]  # CLIPTraining takes one


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # an iterable data set's
        return None


def num_distinct(trainer: pl.Trainer, sizes: Sequence[int], keys: Sequence[Sequence[str]]) -> int:
    """How many of this process's samples count; those behind them repeat samples of other processes.

    torch's DistributedSampler, which Lightning gives a loader, repeats the first samples until all processes have
    equally many.

    Args:
        sizes: samples of each of this process's batches.
        keys: names of each process's samples.

    Raises:
        ValueError: without such a sampler, several processes have the same samples.
    """
    loader = _loader(trainer)
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
    if isinstance(sampler, DistributedSampler):
        num_items = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
        return sum(sizes[:num_items]) if loader.batch_sampler is None else min(num_items, sum(sizes))
    are_names = all(len(set(each)) == len(each) for each in keys)
    counts = Counter(key for each in keys for key in each)
    if are_names and (repeated := [key for key, count in counts.items() if count > 1]):
        raise ValueError(
            f"{len(repeated)} of the {len(counts)} samples of the validation come in several of the {len(keys)} "
            f"processes ({some(repeated, 3)}), so scores would count them several times; give the loader a "
            "torch.utils.data.DistributedSampler, or leave the Trainer's use_distributed_sampler true"
        )
    return sum(sizes)
