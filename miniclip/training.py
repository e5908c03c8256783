"""Training under Lightning: the module around CLIP, what the run tells and keeps, and the command line.

`train.py` and `miniclip train` both come here: `main` builds everything from a YAML file and flags (LightningCLI).
"""

from __future__ import annotations

import difflib
import logging
import math
import re
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import tokenizer, weights
from .check import brief
from .config import CLIPConfig
from .data import Batch, BatchSampler, PairDataModule, TrainLoader
from .datasets import open_dataset
from .evaluate import recall_at_1, zero_shot_scores
from .files import atomic_write, user_errors
from .loss import clip_loss, gather
from .model import CLIP
from .optim import OptimizerConfig, make_optimizer, warmup_cosine
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
        every = _log_every(self.trainer)
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


def _log_every(trainer: pl.Trainer) -> int:
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


# ---------------------------------------------------------------------------------------------------------------------
# Callbacks


class ZeroShotEvaluation(Callback):
    """Logs `val/zero_shot_acc1` at each validation: the score that a run is about, where labels are at hand.

    Args:
        data: labelled images, as `miniclip eval --data` takes them.
        templates: name of a template set or a file; by default the data's own.
        batch_size: images per step.
    """

    def __init__(self, data: str, templates: str | None = None, batch_size: int = 256) -> None:
        self.data, self.templates, self.batch_size = data, templates, batch_size

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.dataset = open_dataset(self.data, templates=self.templates)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = pl_module.clip
        assert isinstance(model, CLIP)
        preprocess = weights.preprocess_for(model.config)
        scores = zero_shot_scores(model, preprocess, self.dataset, batch_size=self.batch_size)
        accuracy = (scores.ranked[:, 0] == scores.labels).mean()
        pl_module.log("val/zero_shot_acc1", float(accuracy), sync_dist=True)


class LastCheckpoint(Callback):
    """Keeps `last.ckpt` every so many steps, at the end, and when Ctrl-C or SIGTERM asks the run to stop.

    The signal is only noted; the step it came in is finished, saved, and the program exits. An exception thrown
    wherever the signal happens to arrive could leave a half-made optimiser step behind. A second Ctrl-C stops at once.
    """

    def __init__(self, path: Path, every_n_steps: int, resume_command: str) -> None:
        self.path, self.every_n_steps, self.resume_command = path, every_n_steps, resume_command
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        del frame
        if self.received is not None:
            there = "is the last checkpoint" if self.path.is_file() else "was not written yet"
            print(f"Stopped at once; {self.path} {there}.", file=sys.stderr, flush=True)
            raise KeyboardInterrupt
        self.received = number
        print("\nStopping when this step is done; once more stops at once.", file=sys.stderr, flush=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only now, after Lightning has installed its own handler, which on SIGTERM leaves without a checkpoint.
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
        loop = trainer.fit_loop
        # A validation that is due at this step belongs to it: a run resumed from before would not make up for it.
        assert loop._data_fetcher is not None
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._end_of_step(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._end_of_step(trainer)

    def _end_of_step(self, trainer: pl.Trainer) -> None:
        # All processes must stop at the same step, and not all of them need have had the signal by now.
        received = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(received, reduce_op="max"))
        if number or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)
        if number:
            if trainer.is_global_zero:
                print(
                    f"Saved {self.path} at step {trainer.global_step}. To go on:\n  {self.resume_command}", flush=True
                )
            raise SystemExit(128 + number)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        """Deaf to signals meanwhile, so that even the impatient find a checkpoint."""
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in self._previous}
        trainer.save_checkpoint(self.path)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()


class RunProgress(ProgressBar):
    """One bar for the whole run: loss beside its chance level, accuracy, speed, and the share of time without data.

    Where the output is no terminal, a line at every fifth step that is logged.
    """

    def __init__(self) -> None:
        super().__init__()
        self._console = Console()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._restart(trainer)
        self._total = int(trainer.estimated_stepping_batches)
        if self._console.is_terminal and self.is_enabled:
            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[told]}"),
            )
            self._bar = Progress(*columns, console=self._console, transient=False)
            self._task = self._bar.add_task("", total=self._total, completed=trainer.global_step, told="")
            self._bar.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._images += len(batch.keys) * trainer.world_size
        step = trainer.global_step
        if step % _log_every(trainer) == 0:
            seconds = time.perf_counter() - self._mark - self._paused
            waited = self._loader_waited(trainer) - self._waited
            images_per_s, wait = self._images / seconds, waited / seconds
            pl_module.log_dict({"train/images_per_s": images_per_s, "train/data_wait": wait})
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            told = (
                f"loss {metrics['train/loss']:.3f} (chance {metrics['train/chance']:.2f})  "
                f"accuracy {100 * metrics.get('train/accuracy', math.nan):.0f} %  "
                f"{images_per_s:.0f} images/s  waiting for data {100 * wait:.0f} %"
            )
            if self._bar:
                self._bar.update(self._task, told=told)
            elif self.is_enabled and step % (5 * _log_every(trainer)) == 0:
                print(f"step {step}/{self._total}  {told}", flush=True)
            self._restart(trainer)
        if self._bar:
            self._bar.update(self._task, completed=step)

    def _restart(self, trainer: pl.Trainer) -> None:
        self._mark, self._images, self._paused, self._waited = time.perf_counter(), 0, 0.0, self._loader_waited(trainer)

    @staticmethod
    def _loader_waited(trainer: pl.Trainer) -> float:
        loader = trainer.train_dataloader
        return loader.waited_s if isinstance(loader, TrainLoader) else 0.0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause_began = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._paused += time.perf_counter() - self._pause_began
        scores = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
        if scores and not trainer.sanity_checking and self.is_enabled:
            told = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
            self._console.print(f"step {trainer.global_step}: {told}", highlight=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    # Lightning's switches (trainer.enable_progress_bar, quiet ranks) arrive here.
    _is_on = True

    @property
    def is_enabled(self) -> bool:
        return self._is_on

    def enable(self) -> None:
        self._is_on = True

    def disable(self) -> None:
        self._is_on = False


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints appear whole under their name or not at all, and are read without running code.

    Lightning's own writer goes through the system's temporary folder, from where a move to another file system is
    not atomic.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_write(path) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if not Path(path).is_file():
            raise ValueError(f"no checkpoint {path} to resume from")
        return weights.read_torch_file(Path(path))


# ---------------------------------------------------------------------------------------------------------------------
# The command line


class _Parser(LightningArgumentParser):
    """Says what is wrong and what may have been meant, without a page of usage before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        del ex
        unknown = re.search(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'", message)
        if unknown:
            parsers = [self, *(sub for a in self._actions if isinstance(a.choices, dict) for sub in a.choices.values())]
            valid = [action.dest for parser in parsers for action in parser._actions]
            name = (unknown[1] or unknown[2]).removeprefix("fit.")
            near = difflib.get_close_matches(name, valid, n=1)
            message = f"unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        print(f"error: {message}\n({_program()} fit --help lists every key)", file=sys.stderr)
        raise SystemExit(2)


class TrainingCLI(LightningCLI):
    """Lightning's command line, with the callbacks, logs and checkpoints that every run has.

    The folder `trainer.default_root_dir` is the run: `checkpoints/last.ckpt` and `best.ckpt`, `logs/`, and at the end
    `best/`, which `miniclip.load` reads.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.clip.vision.image_size", "data.image_size")
        parser.link_arguments("model.clip.text.context_length", "data.context_length")
        parser.link_arguments("model.clip.vision.preprocess", "data.preprocess")
        parser.link_arguments("seed_everything", "data.seed")
        parser.add_argument(
            "--monitor",
            type=str,
            default="val/retrieval_r1",
            help="The best checkpoint is the one where this is highest.",
        )
        parser.add_argument("--save_every_n_steps", type=int, default=100, help="How often last.ckpt is written.")
        parser.add_argument(
            "--overwrite",
            nargs="?",
            const=True,
            type=bool,
            default=False,
            help="Begin anew where a run exists already.",
        )
        parser.set_defaults({"trainer.default_root_dir": "runs/run"})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        options = LightningCLI.subcommands()
        return {name: options[name] for name in ("fit", "validate")}

    def _parse_ckpt_path(self) -> None:
        """Lightning looks for hyper-parameters in the checkpoint; ours holds none, the configuration is the YAML."""

    @property
    def run_folder(self) -> Path:
        return Path(self.config[self.subcommand].trainer.default_root_dir)

    def before_instantiate_classes(self) -> None:
        config, run = self.config[self.subcommand], self.run_folder
        if config.ckpt_path == "last":
            config.ckpt_path = str(_checkpoints(run) / "last.ckpt")
        if config.ckpt_path and not Path(config.ckpt_path).is_file():
            raise ValueError(f"no checkpoint {config.ckpt_path} to resume from")
        if self.subcommand == "fit":
            self._refuse_what_would_mislead(config)
            goes_on = bool(config.ckpt_path) and Path(config.ckpt_path).resolve().parent == _checkpoints(run).resolve()
            is_there = any(_checkpoints(run).glob("*.ckpt")) or (run / "best").exists()
            if _is_rank_zero() and is_there and not goes_on and not config.overwrite:
                raise ValueError(
                    f"{run} already holds a run. Go on with it by --ckpt_path last, begin anew by --overwrite true, "
                    "or name another folder by --trainer.default_root_dir"
                )
        elif not config.ckpt_path:
            raise ValueError(
                "validate needs --ckpt_path FILE (or last): without it a model of random weights is scored"
            )

    @staticmethod
    def _refuse_what_would_mislead(config: Any) -> None:
        trainer = config.trainer
        if trainer.max_epochs in (None, -1) and trainer.max_steps == -1:
            raise ValueError("the run has no end: set trainer.max_steps or trainer.max_epochs; the schedule needs it")
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; the loss contrasts pairs of "
                "a batch, which accumulating over batches does not do. Raise data.batch_size instead"
            )
        if trainer.limit_train_batches not in (None, 1.0) or trainer.overfit_batches:
            raise ValueError("epochs are exact, so part of one can't be had; trainer.max_steps makes a run shorter")
        if config.save_every_n_steps < 1:
            raise ValueError(f"save_every_n_steps is {config.save_every_n_steps}; it must be at least 1")
        if config.monitor == "val/loss":
            raise ValueError("monitor is val/loss; the best checkpoint is where the monitor is highest, so not a loss")

    def before_fit(self) -> None:
        """Removes what is to be overwritten, once everything that could still be wrong has been looked at."""
        data = self.datamodule
        data.prepare_data()  # safe in several processes at once: one packs, the others wait
        data.setup("fit")
        BatchSampler(data.order(), data.batch_size, step=lambda: 0)
        if _is_rank_zero():
            print(data.describe(), flush=True)
            for warning in brief(
                data.train_shards,
                data.context_length,
                data.batch_size,
                data.seed,
                image_size=data.image_size,
                captions=data.captions,
            ):
                print(f"warning: {warning}", file=sys.stderr)
        if self.config.fit.overwrite and not self.config.fit.ckpt_path and _is_rank_zero():
            for part in _results(self.run_folder):
                if part.is_dir():
                    shutil.rmtree(part)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        settings = self.config_init[self.subcommand]
        trainer, run = settings.trainer, self.run_folder
        callbacks: list[Callback] = []
        if trainer.enable_progress_bar is not False:
            callbacks.append(RunProgress())
        if self.subcommand == "fit":
            last = _checkpoints(run) / "last.ckpt"
            callbacks.append(LastCheckpoint(last, settings.save_every_n_steps, resume_command(sys.argv, _python())))
            if settings.data.val is not None:
                labelled = any(isinstance(callback, ZeroShotEvaluation) for callback in trainer.callbacks or [])
                if settings.monitor not in ("val/retrieval_r1", "val/zero_shot_acc1") and not trainer.callbacks:
                    raise ValueError(
                        f"monitor is {settings.monitor!r}, which nothing logs; valid are val/retrieval_r1, and "
                        "val/zero_shot_acc1 with the callback miniclip.training.ZeroShotEvaluation"
                    )
                if settings.monitor == "val/zero_shot_acc1" and not labelled:
                    raise ValueError(
                        "monitor is val/zero_shot_acc1, which the callback miniclip.training.ZeroShotEvaluation logs; "
                        "add it to trainer.callbacks, or monitor val/retrieval_r1"
                    )
                callbacks.append(
                    ModelCheckpoint(
                        _checkpoints(run), "best", monitor=settings.monitor, mode="max", enable_version_counter=False
                    )
                )
        logger = CSVLogger(run, name="logs") if trainer.logger in (None, True) else trainer.logger
        return super().instantiate_trainer(
            callbacks=[*(trainer.callbacks or []), *callbacks],
            logger=logger,
            plugins=[*(trainer.plugins or []), AtomicCheckpointIO()],
            enable_model_summary=False,
            num_sanity_val_steps=0,  # a score over part of the held-out pairs would be misread
            use_distributed_sampler=False,  # ours is exact
            **kwargs,
        )

    @rank_zero_only
    def after_fit(self) -> None:
        checkpoints = _checkpoints(self.run_folder)
        source = next(p for name in ("best.ckpt", "last.ckpt") if (p := checkpoints / name).is_file())
        model, _ = weights.load(source, device="cpu")
        weights.save(model, self.run_folder / "best", overwrite=True)
        print(f"Trained model: {self.run_folder / 'best'} (from {source.name}); miniclip.load reads it.")


def _python() -> str:
    """This interpreter as one would type it: a virtual environment below this folder need not be activated."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "python"


def _program() -> str:
    name = Path(sys.argv[0]).name
    return "miniclip train" if name == "miniclip" else name


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def resume_command(argv: list[str], python: str) -> str:
    """What to type to go on with the run that `argv` began, by the interpreter `python`."""
    command = [argument for argument in argv if not argument.startswith(("--overwrite=", "--ckpt_path="))]
    for flag in ("--ckpt_path", "--overwrite"):
        if flag in command:
            place = command.index(flag)
            has_value = not command[place + 1 : place + 2] or not command[place + 1].startswith("--")
            del command[place : place + 1 + has_value]
    interpreter = [python] if command[0].endswith(".py") else []
    return shlex.join([*interpreter, *command, "--ckpt_path", "last"])


def _checkpoints(run: Path) -> Path:
    return run / "checkpoints"


def _results(run: Path) -> tuple[Path, ...]:
    """What a run leaves in its folder, and what beginning it anew removes."""
    return _checkpoints(run), run / "best", run / "logs"


def main(args: list[str] | None = None) -> None:
    """Trains as the flags and the YAML file of `--config` say."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it; no effect elsewhere
    for name in ("pytorch_lightning", "lightning_fabric"):  # what they would tell, RunProgress tells
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # a run that is resumed
    warnings.filterwarnings("ignore", message=".*could not find the monitored key.*")  # a run without a validation
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning's, of torch's newest
    for message in (".*does not have many workers.*", ".*LightningCLI's args parameter.*"):
        warnings.filterwarnings("ignore", message=message)
    with user_errors(MisconfigurationException):
        TrainingCLI(
            CLIPTraining,
            PairDataModule,
            args=args,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_class=_Parser,
            parser_kwargs={
                "prog": _program(),
                "allow_abbrev": False,
                "description": "Train a CLIP on shards of image-text pairs.",
            },
        )
