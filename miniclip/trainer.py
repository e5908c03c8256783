"""The command line of training: a YAML file and flags -> a run (LightningCLI).

`train.py` and `miniclip train` both come here.
"""

from __future__ import annotations

import difflib
import logging
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger

from . import weights
from .callbacks import RunProgress, ZeroShotEvaluation
from .check import brief
from .checkpointing import AtomicCheckpointIO, LastCheckpoint
from .data import BatchSampler, PairDataModule
from .files import user_errors
from .training import COMPILED_LENGTH_MULTIPLE, CLIPTraining

_WITHOUT_MASTERS = ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16")


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
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("model.compile", "data.text_length_multiple", compute_fn=_text_length_multiple)
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
        if str(trainer.precision) in _WITHOUT_MASTERS:
            mixed = "bf16-mixed" if str(trainer.precision).startswith("bf16") else "16-mixed"
            raise ValueError(
                f"trainer.precision is {trainer.precision}, which keeps the weights themselves in half precision, "
                f"where small steps are lost to rounding. {mixed} is as fast and keeps them in float32"
            )
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
                        "val/zero_shot_acc1 with the callback miniclip.callbacks.ZeroShotEvaluation"
                    )
                if settings.monitor == "val/zero_shot_acc1" and not labelled:
                    raise ValueError(
                        "monitor is val/zero_shot_acc1, which the callback miniclip.callbacks.ZeroShotEvaluation logs; "
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


def _text_length_multiple(is_compiled: bool) -> int:
    return COMPILED_LENGTH_MULTIPLE if is_compiled else 1


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
