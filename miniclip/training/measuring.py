"""What a run's steps learn, cost and leave out: loss, accuracy, gradients; speed, memory; unreadable samples."""

from __future__ import annotations

import math
import mmap
import re
import sys
import time
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from ..common.processes import gather
from ..common.storage import without_secrets
from ..common.waiting import PatientLoader
from ..data.pairs import Batch
from ..evaluation.measures.ranking import finds_own
from ..fast import matmul
from ..loss import siglip_chance
from ..model import CLIP
from ..timm_tower import TimmTower
from ..weights.facts import forward_flops
from .fsdp import local, whole
from .lightning_private import is_logged
from .recompute import drop_patches_in_training
from .step import CLIPTraining, StepResult

_MOST_KEPT_REASONS = 100  # rejected samples whose reason the run's record keeps


def logged_by_steps(module: CLIPTraining) -> list[str]:
    """The names that `StepMetrics` and `RunMetrics` log."""
    towers = {"image": module.clip.visual, "text": module.clip.text}
    trained = [name for name, tower in towers.items() if any(p.requires_grad for p in tower.parameters())]
    names = ["loss", "chance", "accuracy", "accuracy_image_to_text", "accuracy_text_to_image", "logit_scale", "lr"]
    names += ["images_per_s", "data_wait", "tflops", "mfu", "memory_gb", "samples", "rejected", "truncated"]
    names += [f"grad_norm_{name}" for name in trained]
    names += ["logit_bias"] * (module.clip.logit_bias is not None)
    names += ["distillation"] * (module.teacher is not None)
    names += ["lr_muon"] * (module.optimizer_config.kind == "muon")
    return sorted(f"train/{name}" for name in names)


class StepMetrics(Callback):
    """Logs what each logged step learns: loss beside its chance level, in-batch accuracy, gradient norms, rates.

    At steps that are not logged it computes nothing.
    """

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert isinstance(pl_module, CLIPTraining)
        if is_logged(trainer, trainer.global_step + 1):
            assert pl_module.result is not None
            # The loss of a process is its part of the whole; the mean over the processes is the whole.
            pl_module.log_dict(_learning(pl_module, pl_module.result), sync_dist=trainer.world_size > 1)
            pl_module.log_dict(_gradient_norms(pl_module.clip))
            pl_module.log_dict(_rates(optimizer))


def _learning(module: CLIPTraining, result: StepResult) -> dict[str, Tensor | float]:
    images, texts = gather(result.image_features), gather(result.text_features)
    mask = None if result.mask is None else gather(result.mask)
    of_images, of_texts = in_batch_accuracy(images, texts, mask, gather(module.answers(result.batch)))
    values: dict[str, Tensor | float] = {
        "loss": result.loss,
        "chance": _chance(module, len(images), mask, None if result.groups is None else gather(result.groups)),
        "accuracy": (of_images + of_texts) / 2,
        "accuracy_image_to_text": of_images,
        "accuracy_text_to_image": of_texts,
        "logit_scale": local(module.clip.logit_scale).detach().exp(),
    }
    if module.clip.logit_bias is not None:
        values["logit_bias"] = local(module.clip.logit_bias).detach()
    if result.distillation is not None:
        values["distillation"] = result.distillation
    return {f"train/{name}": value for name, value in values.items()}


def _chance(module: CLIPTraining, num_pairs: int, mask: Tensor | None, groups: Tensor | None) -> float:
    """The loss of features that say nothing, over the pairs of all processes that the mask leaves."""
    if mask is not None:
        num_pairs, groups = int(mask.sum()), None if groups is None else groups[mask]
    return math.log(num_pairs) if module.loss == "clip" else siglip_chance(num_pairs, groups)


def _gradient_norms(clip: CLIP) -> dict[str, Tensor]:
    """Norm of each tower's gradient: unscaled, the mean over the processes, and not clipped yet."""
    norms = {}
    for name, tower in (("image", clip.visual), ("text", clip.text)):
        gradients = [p.grad for p in tower.parameters() if p.grad is not None]
        if gradients:
            norms[f"train/grad_norm_{name}"] = whole(torch.nn.utils.get_total_norm(gradients))
    return norms


def _rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The learning rate, and Muon's own; the highest where groups differ."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        name = "train/lr_muon" if "parts" in group else "train/lr"
        rates[name] = max(group["lr"], rates.get(name, 0.0))
    return rates


_ACCURACY_PAIRS = 1024  # the most pairs that in-batch accuracy is measured on


@torch.no_grad()
def in_batch_accuracy(
    image_features: Tensor, text_features: Tensor, mask: Tensor | None, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Share of images whose nearest text in the batch is of their group, and of texts whose nearest image is.

    A tie with another group is a miss, so rounding decides nothing.

    Args:
        groups: (B,) equal for pairs that fit each other, as those of equal captions; by default all differ.
    """
    if mask is not None:
        image_features, text_features = image_features[mask], text_features[mask]
        groups = None if groups is None else groups[mask]
    some = slice(0, _ACCURACY_PAIRS)
    by_image = finds_own(image_features, text_features, some, groups)
    by_text = finds_own(text_features, image_features, some, groups)
    return by_image.float().mean(), by_text.float().mean()


class RunMetrics(Callback):
    """Logs at each logged step the speed, memory and rejected samples of the steps since the one before.

    At the other steps it only adds up numbers that the host knows, without waiting for a GPU.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, CLIPTraining)
        self._cost = StepCost(pl_module.clip, pl_module.patch_dropout)
        self.peak: Peak | None = None
        if trainer.is_global_zero:  # now, because nothing else uses the device yet
            self.peak = peak(trainer.strategy.root_device, str(trainer.precision))
            _forget_memory(trainer.strategy.root_device)
        self._samples = self._rejected = self._truncated = 0
        self._loader: PatientLoader[Any] | None = None
        self._waited_before_s = 0.0  # for the loaders before this one
        self.problems: list[str] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        waited_s = self._loader_waited(trainer)
        num_texts, num_tokens = batch.tokens.shape
        self._num_texts[num_tokens] += num_texts
        self._num_images += len(batch.keys)
        self._rejected += len(batch.problems)
        self._truncated += batch.num_truncated
        self.problems += batch.problems[: _MOST_KEPT_REASONS - len(self.problems)]
        if not is_logged(trainer, trainer.global_step):
            return
        seconds = time.perf_counter() - self._mark - self._paused
        waited = waited_s - self._waited
        flops = self._cost.flops(self._num_texts, self._num_images) / seconds * trainer.world_size
        measured = {
            "images_per_s": self._num_images * trainer.world_size / seconds,
            "data_wait": waited / seconds,
            "tflops": flops / 1e12,
            "memory_gb": memory_gb(trainer.strategy.root_device),
            "samples": trainer.global_step * len(batch.keys) * trainer.world_size,
        }
        if self.peak is not None:
            measured["mfu"] = flops / (self.peak.flops * trainer.world_size)
        pl_module.log_dict({f"train/{name}": value for name, value in measured.items()})
        counts = {"train/rejected": float(self._rejected), "train/truncated": float(self._truncated)}
        pl_module.log_dict(counts, sync_dist=trainer.world_size > 1, reduce_fx="sum")
        self._restart(trainer)

    def _restart(self, trainer: pl.Trainer) -> None:
        self._mark, self._paused, self._waited = time.perf_counter(), 0.0, self._loader_waited(trainer)
        self._num_texts: Counter[int] = Counter()  # by length in tokens
        self._num_images = 0

    def _loader_waited(self, trainer: pl.Trainer) -> float:
        """Seconds in all; a trainer may make a new loader for each epoch."""
        loader = trainer.train_dataloader
        if isinstance(loader, PatientLoader) and loader is not self._loader:
            self._waited_before_s += 0.0 if self._loader is None else self._loader.waited_s
            self._loader = loader
        return self._waited_before_s + (0.0 if self._loader is None else self._loader.waited_s)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause_began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._paused += time.perf_counter() - self._pause_began


class RejectedSamples(Callback):
    """Prints each sample that could not be read, and stops the run above the share of them that it allows."""

    def __init__(self) -> None:
        self.num_seen = self.num_rejected = self.num_truncated = 0
        self._num_captions: int | torch.Tensor = 0  # of those that could be read; on the device, so that none waits

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self._count(batch, pl_module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._count(batch, pl_module)

    def _count(self, batch: Batch, module: CLIPTraining) -> None:
        self.num_seen += len(batch.keys)
        self.num_rejected += len(batch.problems)
        self.num_truncated += batch.num_truncated
        self._num_captions = self._num_captions + (len(batch.tokens) if batch.mask is None else batch.mask.sum())
        for problem in batch.problems:
            print(f"left out: {without_secrets(problem)}", file=sys.stderr)
        # At least as many samples as one rejected one is allowed for, else a single one would stop every run.
        seen = max(self.num_seen, 1 / max(module.max_rejected, 1e-9))
        if self.num_rejected > module.max_rejected * seen:
            raise ValueError(
                f"{self.num_rejected} of {self.num_seen} samples could not be read, more than the share "
                f"{module.max_rejected} that model.max_rejected allows; the last: {batch.problems[-1]}"
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.num_truncated:
            length = pl_module.clip.context_length
            total = int(self._num_captions)
            print(f"{self.num_truncated} of {total} captions were cut to {length} tokens.", file=sys.stderr)


class StepCost:
    """Floating-point operations of the towers, forward and backward, computed from the architecture.

    A backward pass counts as two forward ones, and as none for a tower that is not trained. Recomputation, such as that
    of micro-batches, does not count: it saves memory and is not part of the model.
    """

    def __init__(self, clip: CLIP, patch_dropout: float = 0.0) -> None:
        image = clip.visual.trunk if isinstance(clip.visual, TimmTower) else clip.visual  # the head is small
        self._passes = {
            name: 3 if any(p.requires_grad for p in tower.parameters()) else 1
            for name, tower in (("image", image), ("text", clip.text))
        }
        with torch.device("meta"):
            self._clip = CLIP(clip.config).eval()
            side = self._clip.visual.input_resolution
            if patch_dropout:
                drop_patches_in_training(self._clip, patch_dropout)
                self._clip.visual.train()
            self._image = self._passes["image"] * forward_flops(self._clip.visual, torch.zeros(1, 3, side, side))
        # The count is a quadratic of the text's length (attention is the square), so three lengths give all others.
        counts = []
        for length in range(1, min(3, clip.context_length) + 1):
            tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
            counts.append(self._passes["text"] * forward_flops(self._clip.text, tokens))
        self._text = [counts[0]]  # at length 1, then its differences (Newton's forward interpolation)
        while len(counts) > 1:
            counts = [after - before for before, after in pairwise(counts)]
            self._text.append(counts[0])

    def flops(self, num_texts: dict[int, int], num_images: int | None = None) -> int:
        """num_texts: how many have each length in tokens, padding included. num_images: by default as many as texts."""
        total = self._image * (sum(num_texts.values()) if num_images is None else num_images)
        for length, count in num_texts.items():
            text = sum(math.comb(length - 1, order) * difference for order, difference in enumerate(self._text))
            total += count * text
        return total


# 10^12 operations a second by NVIDIA's data sheets and architecture papers: dense (without the sparsity that doubles
# most printed figures), accumulated in fp32. Of several names that match, the longest counts.
_DATA_SHEETS: dict[str, dict[str, float]] = {
    "V100": {"fp32": 15.7, "fp16": 125},
    "V100 PCIE": {"fp32": 14, "fp16": 112},
    "T4": {"fp32": 8.1, "fp16": 65},
    "A10": {"fp32": 31.2, "tf32": 62.5, "fp16": 125, "bf16": 125},
    "A30": {"fp32": 10.3, "tf32": 82, "fp16": 165, "bf16": 165},
    "A40": {"fp32": 37.4, "tf32": 74.8, "fp16": 149.7, "bf16": 149.7},
    "A100": {"fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312},
    "L4": {"fp32": 30.3, "tf32": 60, "fp16": 121, "bf16": 121},
    "L40S": {"fp32": 91.6, "tf32": 183, "fp16": 362, "bf16": 362},
    "H100": {"fp32": 66.9, "tf32": 494.7, "fp16": 989.4, "bf16": 989.4},
    "H100 PCIE": {"fp32": 51.2, "tf32": 378, "fp16": 756, "bf16": 756},
    "H100 NVL": {"fp32": 60, "tf32": 417.5, "fp16": 835.5, "bf16": 835.5},
    "H200": {"fp32": 66.9, "tf32": 494.7, "fp16": 989.4, "bf16": 989.4},
    "H200 NVL": {"fp32": 60, "tf32": 417.5, "fp16": 835.5, "bf16": 835.5},
    "RTX 3090": {"fp32": 35.6, "tf32": 35.6, "fp16": 71, "bf16": 71},
    "RTX 4090": {"fp32": 82.6, "tf32": 82.6, "fp16": 165.2, "bf16": 165.2},
}
_OTHER_CHIPS = {"LAPTOP", "MAX", "TI", "D", "SUPER", "MIG"}  # other chips, or a part of one
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
DTYPES["bf16"] = torch.bfloat16


class Peak(NamedTuple):
    """The most floating-point operations a second, and the source of that number."""

    flops: float
    source: str


def peak(device: torch.device, precision: str) -> Peak:
    """The device's peak in one of Lightning's precisions ("bf16-mixed", "32-true", …)."""
    arithmetic = _arithmetic(device, precision)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    printed = data_sheet_flops(name, arithmetic)
    if printed is not None:
        return Peak(printed, f"{name}, {arithmetic}, dense, by its data sheet")
    return Peak(
        _measure(device, DTYPES[arithmetic], torch.get_num_threads()),
        f"{name}, {arithmetic}, measured by a matrix product",
    )


def _arithmetic(device: torch.device, precision: str) -> str:
    bits = {"16": "fp16", "bf16": "bf16", "transformer": "bf16", "64": "fp64"}.get(precision.split("-")[0], "fp32")
    is_tf32 = bits == "fp32" and torch.get_float32_matmul_precision() != "highest" and device.type == "cuda"
    return "tf32" if is_tf32 and torch.cuda.get_device_capability(device) >= (8, 0) else bits


def data_sheet_flops(name: str, arithmetic: str) -> float | None:
    """The peak of an NVIDIA GPU by its driver's name; None if it is not in the table."""
    words = re.split(r"[\s\-_]+", name.upper())
    matches = [known for known in _DATA_SHEETS if set(known.split()) <= set(words)]
    if not matches or _OTHER_CHIPS & set(words):
        return None
    printed = _DATA_SHEETS[max(matches, key=lambda known: len(known.split()))].get(arithmetic)
    return None if printed is None else printed * 1e12


@cache
def _measure(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    """The best rate over square products, by the best library, of growing size until one takes 0.01 s."""
    best, side, seconds = 0.0, 256, 0.0
    while seconds < 0.01 and side <= 16384:
        a = torch.ones(side, side, device=device, dtype=dtype)
        for library in 3 * matmul.available():
            with matmul.using(library):
                _wait_for(device)
                begin = time.perf_counter()
                matmul.linear(a, a)
                _wait_for(device)
            seconds = time.perf_counter() - begin
            best = max(best, 2 * side**3 / seconds)
        side *= 2
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _forget_memory(device: torch.device) -> None:
    """The product that measures a peak is not a part of the run's memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def memory_gb(device: torch.device) -> float:
    """In 10^9 bytes: the peak of tensors on a GPU so far, else this process's share of the machine's memory.

    NaN on a system that reports neither way, such as Windows.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * mmap.PAGESIZE / 1e9
    try:
        import resource
    except ImportError:
        return math.nan
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac, 1024 of them elsewhere
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9
