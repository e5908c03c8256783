"""The command line of training: a YAML file and flags -> a run (LightningCLI).

`train.py` and `miniclip train` both come here.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytorch_lightning as pl
import torch
from jsonargparse.typing import PositiveInt
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from ..common.files import user_errors
from ..config import CLIPConfig
from ..data.module import PairDataModule
from ..data.order import BatchSampler
from ..data.preflight import brief
from ..reports.runs import PAGE_FILE, read_run
from ..training.checkpoints import AtomicCheckpointIO, BestCheckpoint, ForgivingCSVLogger, LastCheckpoint, RandomStates
from ..training.finite import NON_FINITE, StopIfNotFinite
from ..training.measuring import RunMetrics, StepMetrics
from ..training.progress import RunProgress, RunReport, Stalls
from ..training.rejected import RejectedSamples
from ..training.resume import Resumption
from ..training.start import refuse_another_architecture
from ..training.step import COMPILED_LENGTH_MULTIPLE, CLIPTraining
from ..training.stopping import LostProcesses, what_is_kept
from ..training.zero_shot import ZeroShotEvaluation
from ..weights.load import load, save
from ..weights.read import locate, read_checkpoint

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

    A run is a folder, `runs/NAME` or `trainer.default_root_dir`: `checkpoints/last.ckpt` and `best.ckpt`, `logs/`, and
    at the end `best/`, which `miniclip.load` reads.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.clip.vision.image_size", "data.image_size")
        parser.link_arguments("model.clip.text.context_length", "data.context_length")
        parser.link_arguments("model.clip.vision.preprocess", "data.preprocess")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("model.compile", "data.text_length_multiple", compute_fn=_text_length_multiple)
        parser.add_argument(
            "--name", type=str | None, default=None, help="The run's folder is runs/NAME; by default runs/run."
        )
        parser.add_argument(
            "--monitor",
            type=str | None,
            default=None,
            help="The best checkpoint is where this logged metric is best; by default val/zero_shot_acc1 if labelled "
            "images are given, else val/retrieval_r1.",
        )
        parser.add_argument(
            "--monitor_mode", type=Literal["max", "min"], default="max", help="Whether high or low is best."
        )
        parser.add_argument("--save_every_n_steps", type=int, default=100, help="How often last.ckpt is written,")
        parser.add_argument("--save_every_minutes", type=float, default=10.0, help="or so often, if that is sooner.")
        parser.add_argument(
            "--overwrite",
            nargs="?",
            const=True,
            type=bool,
            default=False,
            help="Begin anew where a run exists already.",
        )
        parser.add_argument(
            "--max_samples",
            type=PositiveInt | None,
            default=None,
            help="The run's length in samples, in place of trainer.max_steps: as many batches as hold them.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """A run that starts from a trained model has its architecture, and so have the data.

        What that is becomes the default of model.clip and all is parsed once more, so that links follow, and what then
        differs was asked for.
        """
        super().parse_arguments(parser, args)
        settings = self.config[self.config.subcommand]
        model = settings.model
        if model.start_from is None and model.image_weights is None:
            return
        resumed = _resumed(settings)
        source = model.start_from if resumed is None else str(resumed)
        if source is None or (resumed is not None and not resumed.is_file()):
            return
        start = read_checkpoint(locate(source)).config
        self._parser(self.config.subcommand).set_defaults(_dotted_settings(start.to_dict(), "model.clip"))
        super().parse_arguments(parser, args)
        settings = self.config[self.config.subcommand]
        asked = CLIPConfig.from_dict(settings.model.clip.as_dict(), "model.clip")
        refuse_another_architecture(start, asked, f"model.start_from {source!r}" if resumed is None else source)
        if resumed is not None:  # the checkpoint has all that the run started with
            settings.model.start_from, settings.model.image_weights = source, None

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
        config = self.config[self.subcommand]
        run = _folder(config)
        # The configuration that the run keeps has the folder alone.
        config.trainer.default_root_dir, config.name = str(run), None
        holds_a_run = any(_checkpoints(run).glob("*.ckpt")) or (run / "best").exists()
        if config.ckpt_path == "last":
            last = _checkpoints(run) / "last.ckpt"
            # One command for the first time and for every time after (a job that SLURM requeues).
            begins = self.subcommand == "fit" and not last.is_file() and (config.overwrite or not holds_a_run)
            config.ckpt_path = None if begins else str(last)
        if config.ckpt_path and not Path(config.ckpt_path).is_file():
            also = f", though {run} holds a run; begin anew by --overwrite true" if holds_a_run else ""
            raise ValueError(f"no checkpoint {config.ckpt_path} to resume from{also}")
        if self.subcommand == "fit":
            self._refuse_what_would_mislead(config)
            if _is_rank_zero() and holds_a_run and not self._goes_on() and not config.overwrite:
                raise ValueError(
                    f"{run} already holds a run. Go on with it by --ckpt_path last, begin anew by --overwrite true, "
                    "or name another by --name"
                )
        elif not config.ckpt_path and not config.model.start_from:
            raise ValueError(
                "validate needs --ckpt_path FILE (or last) or --model.start_from MODEL: without it a model of random "
                "weights is scored"
            )
        elif config.data.val is None:
            raise ValueError("validate has nothing to score on: set data.val")

    def _goes_on(self) -> bool:
        """Whether the run is resumed in its own folder."""
        checkpoint = self.config[self.subcommand].ckpt_path
        return bool(checkpoint) and Path(checkpoint).resolve().is_relative_to(_checkpoints(self.run_folder).resolve())

    @staticmethod
    def _refuse_what_would_mislead(config: Any) -> None:
        trainer = config.trainer
        if trainer.max_epochs in (None, -1) and trainer.max_steps == -1 and config.max_samples is None:
            raise ValueError(
                "the run has no end: set trainer.max_steps, trainer.max_epochs or max_samples; the schedule needs it"
            )
        if trainer.max_steps != -1 and config.max_samples is not None:
            raise ValueError(
                f"max_samples is {config.max_samples} and trainer.max_steps {trainer.max_steps}; the run's length is "
                "one of the two (--trainer.max_steps=-1 takes the latter back)"
            )
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; the loss contrasts pairs of "
                "a batch, which accumulating over batches does not do. Raise data.batch_size instead"
            )
        # Any value: of 1, one batch to Lightning, and 1.0, all of them, either may arrive as the other.
        if trainer.limit_train_batches is not None or trainer.overfit_batches:
            raise ValueError(
                "epochs are exact, so part of one can't be had; trainer.max_steps makes a run shorter, and "
                "trainer.limit_train_batches is left out"
            )
        if trainer.limit_val_batches is not None:
            raise ValueError(
                f"trainer.limit_val_batches is {trainer.limit_val_batches}; scores are over all held-out pairs, of "
                "which data.val_pairs sets the number, so leave it out. Without data.val there is no validation"
            )
        if str(trainer.precision) in _WITHOUT_MASTERS:
            mixed = "bf16-mixed" if str(trainer.precision).startswith("bf16") else "16-mixed"
            raise ValueError(
                f"trainer.precision is {trainer.precision}, which keeps the weights themselves in half precision, "
                f"where small steps are lost to rounding. {mixed} is as fast and keeps them in float32"
            )
        if config.save_every_n_steps < 1:
            raise ValueError(f"save_every_n_steps is {config.save_every_n_steps}; it must be at least 1")
        if not config.save_every_minutes > 0:
            raise ValueError(f"save_every_minutes is {config.save_every_minutes}; it must be above 0")
        if config.monitor == "val/loss" and config.monitor_mode == "max":
            raise ValueError("monitor is val/loss, of which the lowest is best; add --monitor_mode min")
        if config.monitor and config.data.val is None:
            raise ValueError(f"monitor is {config.monitor!r}, which is looked at in validations; set data.val for them")

    def before_fit(self) -> None:
        """Removes what is to be overwritten, once everything that could still be wrong has been looked at."""
        data = self.datamodule
        data.prepare_data()  # safe in several processes at once: one packs, the others wait
        data.setup("fit")
        steps_per_epoch = len(BatchSampler(data.order(), data.batch_size, step=lambda: 0))
        ends = self.trainer.max_steps, (self.trainer.max_epochs or -1) * steps_per_epoch
        self.model.warmup_steps(min(end for end in ends if end >= 0), data)
        if _is_rank_zero():
            print(data.describe(), flush=True)
            for warning in brief(
                data.train_shards,
                data.context_length,
                data.batch_size,
                data.seed,
                image_size=data.image_size,
                captions=data.captions,
                positives=self.model.positives,
            ):
                print(f"warning: {warning}", file=sys.stderr)
        if self.config.fit.overwrite and not self._goes_on() and _is_rank_zero():
            for part in _results(self.run_folder):
                if part.is_dir():
                    shutil.rmtree(part)
                part.unlink(missing_ok=True)
        self._stalls.start(self.trainer)

    def before_validate(self) -> None:
        self._stalls.start(self.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        settings = self.config_init[self.subcommand]
        trainer, run = settings.trainer, self.run_folder
        self._stalls = Stalls()
        callbacks: list[Callback] = [self._stalls, RejectedSamples()]
        if self.subcommand == "fit":
            callbacks += [Resumption(), StopIfNotFinite(), StepMetrics(), RunMetrics()]
        if trainer.enable_progress_bar is not False:
            callbacks.append(RunProgress())
        if self.subcommand == "fit":
            if settings.max_samples is not None:
                trainer.max_steps = math.ceil(settings.max_samples / settings.data.batch_size)
            last, best = (_checkpoints(run) / f"{name}.ckpt" for name in ("last", "best"))
            go_on = resume_command(sys.argv, _python())
            callbacks.append(LostProcesses(lambda: what_is_kept(last, go_on)))
            typed = command_line(sys.argv, _python())
            callbacks.append(RunReport(run, typed, self._monitor(settings), settings.monitor_mode))
            # The last checkpoint of a step comes after all else that the step leaves, and knows of it.
            callbacks.append(RandomStates())
            callbacks.append(BestCheckpoint(best, self._monitor(settings), settings.monitor_mode))
            callbacks.append(LastCheckpoint(last, settings.save_every_n_steps, settings.save_every_minutes, go_on))
        logger = trainer.logger
        if logger is not False:  # the report is made from the table, whatever other logs there are
            others = [] if logger in (None, True) else logger if isinstance(logger, list) else [logger]
            logger = [ForgivingCSVLogger(run, name="logs"), *others]
        return super().instantiate_trainer(
            callbacks=[*(trainer.callbacks or []), *callbacks],
            logger=logger,
            plugins=[*(trainer.plugins or []), AtomicCheckpointIO()],
            enable_model_summary=False,
            num_sanity_val_steps=0,  # a score over part of the held-out pairs would be misread
            use_distributed_sampler=False,  # ours is exact
            inference_mode=False,  # sliced weights can't be gathered in it, and the next step would meet what it left
            **kwargs,
        )

    @staticmethod
    def _monitor(settings: Any) -> str:
        zero_shot = "val/zero_shot_acc1"
        labelled = any(isinstance(callback, ZeroShotEvaluation) for callback in settings.trainer.callbacks or [])
        if settings.monitor == zero_shot and not labelled:
            raise ValueError(
                f"monitor is {zero_shot}, which the callback miniclip.training.zero_shot.ZeroShotEvaluation logs; "
                "add it to trainer.callbacks, or monitor val/retrieval_r1"
            )
        return settings.monitor or (zero_shot if labelled else "val/retrieval_r1")

    @rank_zero_only
    def after_fit(self) -> None:
        checkpoints = _checkpoints(self.run_folder)
        found = [path for name in ("best.ckpt", "last.ckpt") if (path := checkpoints / name).is_file()]
        if not found:  # a finished run of another folder was resumed: this one has nothing of its own
            return
        source = found[0]
        model, _ = load(source, device="cpu")
        save(model, self.run_folder / "best", overwrite=True)
        said = f"Trained model: {self.run_folder / 'best'} (from {source.name}); miniclip.load reads it."
        if (page := self.run_folder / PAGE_FILE).is_file():
            best = read_run(self.run_folder).best()
            score = f"Best {best[0]}: {best[2]:.4f} at step {best[1]}. " if best else ""
            said = f"{score}{said} Report: {page}"
        print(said)


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
    return command_line([*command, "--ckpt_path", "last"], python)


def command_line(argv: list[str], python: str) -> str:
    """What was typed, for `python` as the interpreter."""
    return shlex.join([*([python] if argv[0].endswith(".py") else []), *argv])


def _folder(config: Any) -> Path:
    """The run's, which its name tells, or `trainer.default_root_dir`."""
    folder = config.trainer.default_root_dir
    if config.get("name") is None:
        return Path(folder or "runs/run")
    if folder is not None:
        raise ValueError(
            f"the run's folder is given twice: name {config.name!r} means runs/{config.name}, and "
            f"trainer.default_root_dir is {folder!r}; leave one of them out (a name in a file by --name null)"
        )
    if not re.fullmatch(r"\w[\w.-]*", config.name):
        raise ValueError(f"name is {config.name!r}; it may have letters, digits, '.', '-' and '_'")
    return Path("runs", config.name)


def _resumed(settings: Any) -> Path | None:
    """The checkpoint that a run goes on from."""
    if settings.ckpt_path == "last":
        last = _checkpoints(_folder(settings)) / "last.ckpt"
        return last if last.is_file() else None
    return Path(settings.ckpt_path) if settings.ckpt_path else None


def _dotted_settings(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Nested values by dotted names."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _dotted_settings(value, f"{prefix}.{name}") if isinstance(value, dict) else {f"{prefix}.{name}": value}
    return out


def _checkpoints(run: Path) -> Path:
    return run / "checkpoints"


def _results(run: Path) -> tuple[Path, ...]:
    """What a run leaves in its folder, and what beginning it anew removes."""
    return _checkpoints(run), run / "best", run / "logs", run / PAGE_FILE, run / NON_FINITE


def main(args: list[str] | None = None) -> None:
    """Trains as the flags and the YAML file of `--config` say."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it; no effect elsewhere
    for name in ("pytorch_lightning", "lightning_fabric"):  # what they would tell, RunProgress tells
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # a run that is resumed
    warnings.filterwarnings("ignore", message=".*could not find the monitored key.*")  # a run without a validation
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning's, of torch's newest
    warnings.filterwarnings("ignore", message=".*in eval mode at the start.*")  # a locked tower
    warnings.filterwarnings("ignore", message=".*need to be provided during `Trainer`.*")  # those of fit, to validate
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
