"""The settings of a training run: its folder, the command that resumes it, and the combinations that are refused."""

from __future__ import annotations

import datetime
import difflib
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.accelerators import AcceleratorRegistry
from pytorch_lightning.callbacks import (
    Callback,
    EarlyStopping,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    Timer,
)
from pytorch_lightning.strategies import StrategyRegistry

from ..common.wording import some
from ..data.module import PairDataModule
from ..data.wordings.kept import WORDINGS_FILE
from ..reports.runs import METRICS_FILE, PAGE_FILE, RUN_FILE, read_settings
from ..training import lightning_private, start
from ..training.checkpoints import BestCheckpoint
from ..training.finite import NON_FINITE
from ..training.measuring import logged_by_steps
from ..training.step import VALIDATED, CLIPTraining
from ..training.zero_shot import ZeroShotEvaluation
from ..weights.folders import THRESHOLD_FILE
from ..weights.write import FOLDER_FILES


def refuse_what_would_mislead(config: Any) -> None:
    """
    Args:
        config: the settings of `fit`.

    Raises:
        ValueError: a run under these settings would not be what it seems.
    """
    trainer = config.trainer
    if trainer.max_epochs in (None, -1) and trainer.max_steps == -1 and config.max_samples is None:
        raise ValueError(
            "the run has no end: set trainer.max_steps, trainer.max_epochs or max_samples; the schedule needs it"
        )
    if trainer.max_steps == 0 or trainer.max_epochs == 0:
        name = "max_steps" if trainer.max_steps == 0 else "max_epochs"
        raise ValueError(f"trainer.{name} is 0; a run has at least one step (`validate` scores without training)")
    if trainer.max_steps != -1 and config.max_samples is not None:
        raise ValueError(
            f"max_samples is {config.max_samples} and trainer.max_steps {trainer.max_steps}; only one of the two sets "
            "the run's length (--trainer.max_steps=-1 unsets it)"
        )
    refuse_trial(trainer)
    if trainer.barebones:
        raise ValueError("trainer.barebones is true, which switches off the log and the checkpoints; leave it out")
    if trainer.enable_checkpointing is False:
        raise ValueError(
            "trainer.enable_checkpointing is false, and a run needs its checkpoints to be resumed and to leave best/; "
            "raise save_every_n_steps and save_every_minutes to write fewer"
        )
    # Any value, because the parser turns 1 (one batch) into 1.0 (all of them) and back.
    if trainer.limit_train_batches is not None or trainer.overfit_batches:
        name = "limit_train_batches" if trainer.limit_train_batches is not None else "overfit_batches"
        raise ValueError(
            f"trainer.{name} is not supported, because an epoch is every sample once; use trainer.max_steps for a "
            "shorter run"
        )
    if trainer.limit_val_batches is not None:
        raise ValueError(
            f"trainer.limit_val_batches is {trainer.limit_val_batches}; a validation scores all held-out pairs, or "
            "data.val_pairs of them. Without data.val there is no validation"
        )
    if trainer.num_sanity_val_steps:
        raise ValueError(
            f"trainer.num_sanity_val_steps is {trainer.num_sanity_val_steps}; a validation scores all held-out pairs, "
            "so leave it out"
        )
    for name in ("val_check_interval", "check_val_every_n_epoch"):
        value = getattr(trainer, name)
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"trainer.{name} is {value}; it must be above 0. Without data.val there is no validation")
    for name, least in (("log_every_n_steps", 1), ("gradient_clip_val", 0), ("min_steps", 0), ("min_epochs", 0)):
        value = getattr(trainer, name)
        if value is not None and not value >= least:
            raise ValueError(f"trainer.{name} is {value}; it must be at least {least}")
    if trainer.gradient_clip_algorithm is not None and not trainer.gradient_clip_val:
        raise ValueError(
            f"trainer.gradient_clip_algorithm is {trainer.gradient_clip_algorithm}, and nothing is clipped: set "
            "trainer.gradient_clip_val, too"
        )
    start.refuse_half_weights(str(trainer.precision))
    if config.save_every_n_steps is not None and config.save_every_n_steps < 1:
        raise ValueError(f"save_every_n_steps is {config.save_every_n_steps}; it must be at least 1")
    if not config.save_every_minutes > 0:
        raise ValueError(f"save_every_minutes is {config.save_every_minutes}; it must be above 0")
    if config.monitor == "val/loss" and config.monitor_mode == "max":
        raise ValueError("monitor is val/loss, of which the lowest is best; add --monitor_mode min")
    if config.monitor_mode == "min" and config.monitor in (None, *_HIGHEST_IS_BEST) and config.data.val is not None:
        which = config.monitor or f"by default {' or '.join(_HIGHEST_IS_BEST)}"
        raise ValueError(
            f"monitor_mode is min and monitor {which}, of which the highest is best; name one of which the lowest "
            "is, or add --monitor_mode max"
        )
    if config.monitor and config.data.val is None:
        raise ValueError(f"monitor is {config.monitor!r}, which is read at validations; set data.val for them")


def refuse_trial(trainer: Any) -> None:
    """
    Args:
        trainer: the settings of `fit`'s or `validate`'s.

    Raises:
        ValueError: it would score a part of the held-out pairs.
    """
    if trainer.fast_dev_run:
        raise ValueError(
            f"trainer.fast_dev_run is {trainer.fast_dev_run}, which writes no log and scores a part of the held-out "
            "pairs; for a trial run use --trainer.max_steps 2 and a small data.val_pairs"
        )


# The metrics that choose the best checkpoint where no monitor is named.
_BY_LABELS, _BY_PAIRS = _HIGHEST_IS_BEST = ("val/zero_shot_acc1", "val/retrieval_r1")

# Of a trainer as Lightning's command line makes it: what this one sets itself, and why.
TRAINER_SETS = {
    "inference_mode": (False, "FSDP2 cannot gather weights in it, nor train after it"),
    "use_distributed_sampler": (False, "the data module's own order is exact"),
}


def _unused(config: Any) -> dict[str, str]:
    """The beginnings of names of settings of `fit` that nothing would use, each with the reason."""
    kind = config.model.optimizer.kind
    reasons: dict[str, str] = {}
    if kind != "muon":
        reasons["model.optimizer.muon_"] = f"model.optimizer.kind is {kind}; only muon uses it"
    if config.model.teacher is None:
        reasons["model.distillation"] = "model.teacher is null, from whom it would distil"
    if config.data.val is None:
        names = ("trainer.val_check_interval", "trainer.check_val_every_n_epoch", "data.val_pairs", "monitor_mode")
        reasons |= dict.fromkeys(names, "data.val is null, so nothing is validated")
    return reasons


def refuse_unused_flags(flags: Sequence[str], config: Any) -> None:
    """
    Args:
        flags: as they were typed.
        config: the settings of `fit`.

    Raises:
        ValueError: a flag that nothing would use.
    """
    for name, otherwise in _unused(config).items():
        unused = next((flag for flag in flags if flag.startswith(f"--{name}")), None)
        if unused is not None:
            raise ValueError(f"{unused.partition('=')[0]} has no effect: {otherwise}")


def without_effect(verb: str, config: Any, defaults: Mapping[str, Any]) -> list[str]:
    """What differs from the defaults and does nothing, a sentence each.

    A file's settings may be meant for another kind of optimiser, which a flag has replaced, so they are no error.

    Args:
        config: the settings of the verb, fit or validate.
        defaults: by dotted name.
    """
    reasons = _unused(config) if verb == "fit" else {}
    for part in ("test", "predict"):
        reasons[f"trainer.limit_{part}_batches"] = f"`{verb}` has no batches of that kind"
    for name, (value, why) in TRAINER_SETS.items():
        reasons[f"trainer.{name}"] = f"a run sets it to {str(value).lower()}, because {why}"
    given = dotted({name: config[name].as_dict() for name in ("data", "model", "trainer")})
    given["monitor_mode"] = config.get("monitor_mode")
    return [
        f"{name} is {json.dumps(value)}, which has no effect: {why}"
        for beginning, why in reasons.items()
        for name, value in given.items()
        if name.startswith(beginning) and value != defaults.get(name)
    ]


# Settings that change neither weights nor scores; or that are compared elsewhere, by what they come to.
_IMMATERIAL = {
    *("name", "overwrite", "save_every_n_steps", "save_every_minutes", "trainer.default_root_dir", "trainer.logger"),
    *("trainer.log_every_n_steps", "trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.profiler"),
    *("trainer.limit_test_batches", "trainer.limit_predict_batches", *(f"trainer.{name}" for name in TRAINER_SETS)),
    *("model.micro_batch_size", "model.checkpoint_activations", "model.compile"),
    *("data.num_workers", "data.cache_gb"),
    *("ckpt_path", "model.start_from", "model.image_weights"),  # the checkpoint is what the run starts from
    *("trainer.max_steps", "trainer.max_epochs", "max_samples"),  # the number of steps
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),  # that of processes
    *("monitor", "monitor_mode", "data.train", "data.val", "data.neighbours"),
}


def material(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a resumed run compares with its checkpoint: the settings of `fit` by dotted name.

    Args:
        settings: nested, as JSON has them.
    """
    listed = settings["trainer"]["callbacks"] or []
    by_class: dict[str, list[Any]] = {}  # a callback is compared with the same one
    for each in listed if isinstance(listed, list) else [listed]:
        by_class.setdefault(each["class_path"], []).append(each.get("init_args", {}))
    found = dotted({**settings, "trainer": {**settings["trainer"], "callbacks": None}})
    found = {name: value for name, value in found.items() if not _IMMATERIAL & _with_parents(name)}
    return {
        **found,
        "trainer.callbacks": {path: args[0] if len(args) == 1 else args for path, args in by_class.items()},
    }


def _with_parents(name: str) -> set[str]:
    """a.b.c -> a, a.b and a.b.c."""
    parts = name.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts) + 1)}


def dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values -> values by dotted name, which begins with the prefix."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else key
        out |= dotted(value, name) if isinstance(value, dict) else {name: value}
    return out


def refuse_callbacks(trainer: Any, run: Path) -> None:
    """
    Args:
        trainer: its settings, with the callbacks made.
        run: the run's folder.

    Raises:
        ValueError: a callback of Lightning's that changes what a step or a run is, makes a setting do nothing, or
            writes over the run's own checkpoints.
    """
    callbacks = callback_list(trainer.callbacks)
    start.refuse_callbacks(callbacks)
    if any(isinstance(each, OnExceptionCheckpoint) for each in callbacks):
        raise ValueError(
            "trainer.callbacks has OnExceptionCheckpoint, of whose file Lightning makes every run begin that names no "
            "checkpoint, another run's, too; leave it out: a run that is stopped leaves last.ckpt"
        )
    own = {(checkpoints(run) / name).resolve() for name in ("last.ckpt", "best.ckpt")}
    for each in callbacks:
        if isinstance(each, ModelCheckpoint) and (taken := sorted(own & _named_by(each, trainer, run))):
            raise ValueError(
                f"trainer.callbacks has {type(each).__name__}, whose file would be {taken[0]}, which the run itself "
                "writes to be resumed from; give it another dirpath or filename, and leave save_last to the run"
            )
    if sum(isinstance(each, ZeroShotEvaluation) for each in callbacks) > 1:
        raise ValueError(
            "trainer.callbacks has ZeroShotEvaluation more than once, which would log all scores under the same names; "
            "give the further labelled images to the first one's others: {NAME: DATA}"
        )
    if trainer.max_time is not None and any(isinstance(each, Timer) for each in callbacks):
        raise ValueError(
            f"trainer.max_time is {trainer.max_time} and trainer.callbacks has a Timer, beside which Lightning ignores "
            "it; leave one of them out"
        )


def _named_by(callback: ModelCheckpoint, trainer: Any, run: Path) -> set[Path]:
    """The files that are named whatever the step and its metrics; without a folder they lie with the run's log."""
    if callback.dirpath is None and trainer.logger is not False:
        return set()
    folder = checkpoints(run) if callback.dirpath is None else Path(callback.dirpath)
    names = [callback.filename, callback.CHECKPOINT_NAME_LAST if callback.save_last else None]
    return {(folder / f"{name}{callback.FILE_EXTENSION}").resolve() for name in names if name}


def refuse_times(trainer: Any) -> None:
    """
    Raises:
        ValueError: a time by its parts has others than a time has.
    """
    for name in ("max_time", "val_check_interval"):
        value = getattr(trainer, name)
        if isinstance(value, dict):
            try:
                datetime.timedelta(**value)
            except (TypeError, OverflowError) as error:
                raise ValueError(
                    f"trainer.{name} is {value}; the parts of a time are days, hours, minutes and seconds, all numbers"
                ) from error


def refuse_devices(trainer: Any) -> None:
    """
    Args:
        trainer: its settings.

    Raises:
        ValueError: an accelerator, devices or a strategy that do not exist, or not on this machine. What an object
            of a class sets is Lightning's to check.
    """
    if trainer.num_nodes < 1:
        raise ValueError(f"trainer.num_nodes is {trainer.num_nodes}; it must be at least 1")
    strategy, name = trainer.strategy, trainer.accelerator
    if isinstance(strategy, str):
        known = [
            "auto",
            *(each for each in StrategyRegistry.available_strategies() if not re.search("xla|tpu|single", each)),
        ]
        if strategy.lower() not in known:
            valid = [each for each in known if not re.search("spawn|fork|notebook", each)]  # refused later, in words
            raise ValueError(f"trainer.strategy is {strategy!r}; valid are {', '.join(valid)}")
    if not isinstance(name, str):
        return
    kinds = {each: AcceleratorRegistry[each]["accelerator"] for each in AcceleratorRegistry.available_accelerators()}
    here = sorted(each for each, kind in kinds.items() if kind.is_available())
    names = ["auto", *(["gpu"] if {"cuda", "mps"} & set(here) else []), *here]
    if name not in names:
        raise ValueError(f"trainer.accelerator is {name!r}; on this machine valid are {', '.join(names)}")
    if trainer.devices == "auto":
        return
    device = lightning_private.accelerator(name)
    try:
        is_right, why = bool(kinds[device].parse_devices(trainer.devices)), ""
    except (TypeError, ValueError, MisconfigurationException) as error:
        is_right, why = False, f" ({' '.join(str(error).split())})" if device != "cpu" else ""
    if not is_right:
        others = "a number of processes, 1 or more" if device == "cpu" else "a number, -1 for all, a list as [0, 1]"
        raise ValueError(f"trainer.devices is {trainer.devices!r}; on {device} it takes auto or {others}{why}")


def refuse_runs_beside(trainer: pl.Trainer, rank: int) -> None:
    """
    Args:
        rank: this process's by its environment, whatever the trainer makes of it.

    Raises:
        ValueError: torchrun or srun started more processes than the trainer has: each would be a run by itself.
    """
    environment = lightning_private.cluster_environment(trainer)
    is_torchrun = isinstance(environment, TorchElasticEnvironment)
    started = environment.world_size() if is_torchrun else max(rank + 1, _tasks_of_srun())
    if started > trainer.world_size:
        raise ValueError(
            f"this is a process of rank {rank} of several that torchrun or srun started, and trainer.strategy and "
            "trainer.devices make it a run by itself, in the folder that the others write to, too; set "
            "--trainer.strategy ddp, and --trainer.devices to the processes on each machine"
        )


def _tasks_of_srun() -> int:
    """How many tasks srun started beside this one. A batch script has its job's SLURM_NTASKS, and is one process; a
    shell by srun, as Lightning knows by its name or SLURM by its terminal, stands alone, too."""
    is_step = os.environ.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PTY_PORT" not in os.environ
    is_shell = SLURMEnvironment.job_name() in ("bash", "interactive")
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) if is_step and not is_shell else 1


def set_length(trainer: pl.Trainer, data: PairDataModule, max_samples: int | None) -> str:
    """Has the run end after the steps that `max_epochs`, `max_steps` or `max_samples` is, whichever comes first.

    An epoch is every sample once, in steps that go on across its end; Lightning's own is the whole batches of it.

    Args:
        trainer: whose max_steps is that of `max_samples`, if there is one.

    Returns:
        The length, for the log.

    Raises:
        ValueError: it ends before the least that it is to have.
    """
    ends: dict[str, int] = {}
    if trainer.max_steps != -1:
        name = f"trainer.max_steps {trainer.max_steps:,}" if max_samples is None else f"max_samples {max_samples:,}"
        ends[name] = trainer.max_steps
    if trainer.max_epochs is not None and trainer.max_epochs != -1:
        ends[f"trainer.max_epochs {trainer.max_epochs}"] = _steps_in(data, trainer.max_epochs)
    first, *others = sorted(ends, key=lambda name: ends[name])
    steps = ends[first]
    least = {"min_steps": trainer.min_steps or 0, "min_epochs": _steps_in(data, trainer.min_epochs or 0)}
    for name in (name for name in least if least[name] > steps):
        raise ValueError(
            f"trainer.{name} is {getattr(trainer, name):,}, and {first} ends the run before it, after {steps:,} steps; "
            "leave one of the two out, or make the run longer"
        )
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = -1, steps
    length = f"the run is {steps:,} steps: {steps * data.batch_size:,} samples"
    if data.train_stream is None:
        length += f", {steps * data.batch_size / data.epoch_samples():,.1f} epochs"
    return length + "".join(f"; {first} ends it before {other}" for other in others if ends[other] > steps)


def _steps_in(data: PairDataModule, epochs: int) -> int:
    return math.ceil(epochs * data.epoch_samples() / data.batch_size)


def refuse_validations(trainer: pl.Trainer, steps_per_epoch: int, has_val: bool) -> None:
    """
    Raises:
        ValueError: validations would not come when they should.
    """
    interval, every = trainer.val_check_interval, trainer.check_val_every_n_epoch
    if has_val and every is not None and isinstance(interval, int) and interval > steps_per_epoch:
        raise ValueError(
            f"trainer.val_check_interval is {interval} and an epoch has {steps_per_epoch} steps; set "
            "trainer.check_val_every_n_epoch to null to count steps over epochs, or lower the interval"
        )
    if trainer.world_size > 1 and not isinstance(interval, int | float | None):
        raise ValueError(
            f"trainer.val_check_interval is {interval!r}, a time, and the clocks of {trainer.world_size} processes "
            "differ; give a number of steps"
        )


def refuse_unlogged_monitors(callbacks: Sequence[Callback], module: CLIPTraining, has_val: bool) -> list[str]:
    """
    Args:
        callbacks: all of the run's.

    Returns:
        A sentence for each callback that goes by a metric which miniclip does not log: a callback of the user's may.

    Raises:
        ValueError: a callback goes by a metric that nothing logs.
    """
    names = logged_by_steps(module)
    if has_val:
        scored = [name for each in callbacks if isinstance(each, ZeroShotEvaluation) for name in each.names]
        names = sorted({*names, *VALIDATED, *scored})
    rates = any(isinstance(each, LearningRateMonitor) for each in callbacks)  # logs lr-AdamW and the like
    others = [type(each).__name__ for each in callbacks if _may_log_anything(each)]
    unknown = []
    for callback in callbacks:
        if not isinstance(callback, BestCheckpoint | EarlyStopping | ModelCheckpoint) or not callback.monitor:
            continue
        is_own = isinstance(callback, BestCheckpoint)
        asked = callback.monitor
        is_counted = isinstance(callback, ModelCheckpoint) and asked in ("epoch", "step")
        if asked in names or is_counted or (rates and asked.startswith("lr-")) or (is_own and not has_val):
            continue
        what = f"monitor is {asked!r}" if is_own else f"{type(callback).__name__} monitors {asked!r}"
        if others:
            unknown.append(
                f"{what}, which {some(others)} would have to log; the first validation shows whether it does"
            )
            continue
        if asked.startswith("val") and not has_val:
            raise ValueError(f"{what}, which is logged by validations; set data.val for them")
        near = difflib.get_close_matches(asked, names, n=1)
        meant = f"did you mean {near[0]!r}? It is one of" if near else "logged are"
        raise ValueError(f"{what}, which nothing logs; {meant} {', '.join(names)}")
    return unknown


def _may_log_anything(callback: Callback) -> bool:
    """Whether it is a user's own. Lightning's log nothing that a monitor reads, but for the rates."""
    is_known = type(callback).__module__.partition(".")[0] in (__package__.partition(".")[0], pl.__name__)
    return not is_known or isinstance(callback, LambdaCallback)


def monitor(settings: Any) -> str:
    """The metric that chooses the best checkpoint.

    Raises:
        ValueError: it is the zero-shot score, and no callback logs it.
    """
    is_logged = any(isinstance(each, ZeroShotEvaluation) for each in callback_list(settings.trainer.callbacks))
    if settings.monitor == _BY_LABELS and not is_logged:
        raise ValueError(
            f"monitor is {_BY_LABELS}, which the callback miniclip.training.zero_shot.ZeroShotEvaluation logs; add it "
            f"to trainer.callbacks, or monitor {_BY_PAIRS}"
        )
    return settings.monitor or (_BY_LABELS if is_logged else _BY_PAIRS)


def callback_list(callbacks: Callback | list[Callback] | None) -> list[Callback]:
    """trainer.callbacks, which may be one, several or none."""
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder


def folder(config: Any) -> Path:
    """The run's folder: runs/NAME, or trainer.default_root_dir.

    Raises:
        ValueError: both are given, or the name cannot be a folder's.
    """
    path = config.trainer.default_root_dir
    if config.get("name") is None:
        return Path(path or "runs/run")
    if path is not None:
        raise ValueError(
            f"the run's folder is given twice: name {config.name!r} means runs/{config.name}, and "
            f"trainer.default_root_dir is {path!r}; leave one of them out; what a file gives, "
            "--name null or --trainer.default_root_dir null leaves out"
        )
    if not re.fullmatch(r"\w[\w.-]*", config.name):
        raise ValueError(f"name is {config.name!r}; it may have letters, digits, '.', '-' and '_'")
    return Path("runs", config.name)


def checkpoints(run: Path) -> Path:
    return run / "checkpoints"


def checkpoints_near(path: Path, run: Path) -> list[Path]:
    """Of a run, and of where a path leads to nothing: beside it, in it, and in the run that it is a folder of."""
    folders = [path.parent, path, *(checkpoints(each) for each in (run, path, path.parent))]
    return sorted({found for folder in folders for found in folder.glob("*.ckpt")})


def holds_a_run(run: Path) -> bool:
    return any((checkpoints(run) / f"{name}.ckpt").exists() for name in ("last", "best")) or (run / "best").exists()


# Of the files of a run; of a model's folder what `save`, `convert` and `calibrate` write, and of a log's what its
# loggers and a ModelCheckpoint without a folder do.
_CHECKPOINTS = ("last.ckpt", "best.ckpt", ".last.ckpt.*.tmp", ".best.ckpt.*.tmp")
_MODEL = (*FOLDER_FILES, THRESHOLD_FILE, WORDINGS_FILE)
_PROFILES = ("fit-profile*.txt", "validate-profile*.txt")  # beside the log; without a logger in the run's folder
_LOG = (
    METRICS_FILE,
    RUN_FILE,
    "config.yaml",
    "hparams.yaml",
    "events.out.tfevents.*",
    "checkpoints/*.ckpt",
    *_PROFILES,
)


def results(run: Path) -> list[Path]:
    """The files that a run and its `validate` wrote into its folder, which --overwrite removes."""
    logs = [log for log in run.glob("logs/version_*") if (log / RUN_FILE).is_file() or _is_of_validate(log)]
    patterns = [(checkpoints(run), _CHECKPOINTS), (run / "best", _MODEL), (run, (PAGE_FILE, NON_FINITE, *_PROFILES))]
    patterns += [(log, _LOG) for log in logs]
    return sorted(path for folder, names in patterns for name in names for path in folder.glob(name) if path.is_file())


def _is_of_validate(log: Path) -> bool:
    """Whether the settings there are of a run's. Other programs have such folders, too."""
    try:
        settings, _ = read_settings((log / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return "clip" in (settings.get("model") or ())


def others(run: Path) -> list[Path]:
    """What lies in the folders of a run's results and was not written by it, which stays."""
    written = set(results(run))
    found = (path for name in ("checkpoints", "best", "logs") for path in (run / name).rglob("*"))
    return sorted(path for path in found if path not in written and not path.is_dir())


def refuse_inputs_within(run: Path, settings: Any) -> None:
    """
    Args:
        settings: those of `fit`, of a run that would remove the results in this folder.

    Raises:
        ValueError: the run reads what it would remove, as the model that it starts from.
    """
    removed = {path.resolve() for path in results(run)}
    folders = {path.parent for path in removed} - {run.resolve()}
    named = {"ckpt_path": settings.ckpt_path}
    named |= {f"{part}.{name}": value for part in ("model", "data") for name, value in settings[part].items()}
    for name, value in named.items():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and Path(path).resolve() in removed | folders:
                raise ValueError(
                    f"{name} is {path!r}, which --overwrite true would remove with the run in {run}; name another run "
                    "by --name, or copy that elsewhere first"
                )


def checkpoint_to_resume(settings: Any) -> Path | None:
    """The checkpoint that the settings name, if there is to be one."""
    if settings.ckpt_path == "last":
        last = checkpoints(folder(settings)) / "last.ckpt"
        return last if last.is_file() else None
    return Path(settings.ckpt_path) if settings.ckpt_path else None


# ---------------------------------------------------------------------------------------------------------------------
# Commands to type


def interpreter() -> str:
    """This Python as one would type it: a virtual environment below the working folder need not be activated."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "python"


def resume_command(argv: list[str], python: str) -> str:
    """The command that resumes the run that `argv` started with the interpreter `python`."""
    command = [argument for argument in argv if not argument.startswith(("--overwrite=", "--ckpt_path="))]
    for flag in ("--ckpt_path", "--overwrite"):
        if flag in command:
            index = command.index(flag)
            has_value = not command[index + 1 : index + 2] or not command[index + 1].startswith("--")
            del command[index : index + 1 + has_value]
    return command_line([*command, "--ckpt_path", "last"], python)


def command_line(argv: list[str], python: str) -> str:
    """The command line that was typed, with `python` as the interpreter."""
    program, *arguments = argv
    if Path(program).name == "__main__.py":  # the package's, whose imports are relative
        return shlex.join([python, "-m", "miniclip", *arguments])
    return shlex.join([*([python] if program.endswith(".py") else []), *argv])
