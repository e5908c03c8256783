"""What a Trainer, its data and the model have to agree on, for the command line and for a Trainer of one's own."""

from __future__ import annotations

from collections.abc import Iterable

from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)

from ..config import CLIPConfig
from ..data.module import PairDataModule
from ..data.pairs import Positives
from ..weights.load import preprocess_for

_HALF_WEIGHTS = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")
_REFUSED_CALLBACKS: dict[type[Callback], str] = {
    StochasticWeightAveraging: "it replaces the schedule and averages after the last validation; set model.ema_decay",
    WeightAveraging: "the average would be neither validated nor saved as best/; set model.ema_decay",
    GradientAccumulationScheduler: "the loss contrasts the pairs of one batch; raise data.batch_size instead",
    BatchSizeFinder: "the batch size changes the loss; set data.batch_size, and model.micro_batch_size for the memory",
    LearningRateFinder: "it takes steps before the run, which are not in its log; set model.optimizer.lr",
}


def refuse_half_weights(precision: str) -> None:
    """
    Args:
        precision: trainer.precision.

    Raises:
        ValueError: the weights themselves would be in half precision.
    """
    if precision in _HALF_WEIGHTS:
        mixed = "bf16-mixed" if precision.startswith("bf16") else "16-mixed"
        raise ValueError(
            f"trainer.precision is {precision}, which keeps the weights themselves in half precision, where "
            f"small steps are lost to rounding. {mixed} is as fast and keeps them in float32"
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
