"""`miniclip train` and `train.py`: YAML files and flags -> a run (LightningCLI)."""

from __future__ import annotations

from ..common import lighter_lightning  # noqa: F401 (before Lightning)

# isort: split
import difflib
import json
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import get_loader, set_dumper, set_loader
from jsonargparse._actions import ActionConfigFile, _ActionConfigLoad
from jsonargparse._loaders_dumpers import comment_prefix, get_yaml_default_loader
from jsonargparse._typehints import ActionTypeHint
from jsonargparse.typing import PositiveInt
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.callbacks import Callback, ModelSummary, ProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import Logger
from pytorch_lightning.profilers import PassThroughProfiler, Profiler
from pytorch_lightning.strategies import DDPStrategy, ParallelStrategy

from ..common.arguments import shown
from ..common.files import user_errors, write_text
from ..common.storage import without_secrets, without_secrets_in
from ..common.wording import some
from ..config import CLIPConfig
from ..data.module import PairDataModule
from ..data.preflight import brief
from ..data.reading.unique_keys import RepeatedKeyError, UniqueKeys
from ..reports.runs import PAGE_FILE
from ..training import lightning_private
from ..training.checkpoints import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, RandomStates, score_in
from ..training.finite import StopIfNotFinite
from ..training.measuring import RejectedSamples, RunMetrics, StepMetrics
from ..training.progress import RunProgress, RunReport, Stalls
from ..training.resume import Resumption, refuse_another_run
from ..training.run_folder import TableLogger, hold
from ..training.start import HALF_WEIGHTS, refuse_another_architecture
from ..training.step import COMPILED_LENGTH_MULTIPLE, CLIPTraining
from ..training.stopping import LostProcesses, is_out_of_time, what_is_kept
from ..training.zero_shot import CaptionWordings
from ..weights.folders import refuse_misread
from ..weights.load import load, save
from ..weights.read import locate, read_checkpoint
from . import run_settings
from .overwriting import Overwriting, bring_back


def _is_file(value: Any) -> bool:
    return os.path.isfile(value)  # noqa: PTH113 (no error for settings that are longer than a file's name may be)


def _load_yaml(text: str) -> Any:
    """What jsonargparse's own loader makes of a text in which no key comes twice."""
    try:
        yaml.load(text, UniqueKeys)
    except RepeatedKeyError as error:
        raise TypeError(str(error)) from error  # which jsonargparse reports with the key
    return get_loader("yaml")(text)


class _Dumper(yaml.SafeDumper):
    """Writes what is a text and more, as the member of an enumeration that is a callback's default."""


_Dumper.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str.__str__(text)))


def _dump_yaml(settings: Any) -> str:
    return yaml.dump(settings, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)


# YAML 1.1 takes 010 for 8 and 10:00:00:00 for 36,000,000 (base 60); here they are the texts that they look like.
_INT, _DECIMAL = "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
_resolvers = get_yaml_default_loader().yaml_implicit_resolvers
_resolvers.update(
    {first: [(tag, _DECIMAL if tag == _INT else form) for tag, form in forms] for first, forms in _resolvers.items()}
)

_YAML = "yaml_of_unique_keys"  # jsonargparse's name of a way to read and write settings
set_loader(_YAML, _load_yaml, (yaml.YAMLError,))
set_dumper(_YAML, _dump_yaml)
comment_prefix[_YAML] = comment_prefix["yaml"]


class _Parser(LightningArgumentParser):
    """Prints what is wrong and what may have been meant, without a page of usage before it.

    Configurations are UTF-8 on every system; jsonargparse reads and writes them in the encoding of the locale.
    """

    _class: type | None = None  # whose init_args this parser is for

    def add_class_arguments(self, class_type: Any, nested_key: str | None = None, *more: Any, **options: Any) -> Any:
        if nested_key is None:
            self._class = class_type
        return super().add_class_arguments(class_type, nested_key, *more, **options)

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        """A flag beats the files wherever it stands, one of a key that of a group, and a later file an earlier one."""
        if args is not None and self._subcommands_action is None:
            args = self._files_first(list(args))
        return super().parse_args(args, *more, **options)

    def _files_first(self, args: list[str]) -> list[str]:
        files: list[str] = []
        groups: list[tuple[int, list[str]]] = []  # with how deep they are: a narrower one beats a wider one
        flags: list[str] = []
        while args:
            action, value, count = self._first(args)
            if isinstance(action, ActionConfigFile) and value and not value.startswith("--"):
                files += args[:count]
            elif isinstance(action, _ActionConfigLoad):
                if _is_file(value):
                    files += args[:count]
                else:
                    groups.append((action.dest.count("."), args[:count]))
            else:
                count = 1
                flags += args[:count]
            del args[:count]
        return files + [each for _, group in sorted(groups, key=lambda group: group[0]) for each in group] + flags

    def _first(self, args: list[str]) -> tuple[Any, str, int]:
        """What the first argument sets, if it is a flag, to what value, and in how many arguments: `--config FILE`,
        `-cFILE`, `--trainer=FILE`, …"""
        name, sign, value = args[0].partition("=")
        if name[:2] in self._option_string_actions:  # -c
            name, sign, value = name[:2], sign or name[2:], value or name[2:]
        value = value if sign else "".join(args[1:2])
        return self._option_string_actions.get(name), value, 1 if sign else 2

    def parse_path(self, path: Any, *args: Any, **options: Any) -> Any:
        if not _is_file(path):  # `-`, a URL, or a mistake
            return super().parse_path(path, *args, **options)
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start:,})") from error
        try:
            read, values = yaml.load(text, UniqueKeys), get_loader("yaml")(text)
        except (yaml.YAMLError, RepeatedKeyError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):  # it takes a single key without a value for a text
            found = "is empty" if read in (None, "") else f"holds {shown(read)}"
            if isinstance(read, dict):
                found = f"gives {next(iter(read))} no value"
            raise ValueError(f"{path} {found}; a file of settings has keys and values, as `data: {{batch_size: 256}}`")
        own = self.prog.split()[-1]
        verbs = sorted(TrainingCLI.subcommands().keys() & set(read))
        if verbs and self._subcommands_action is None:
            raise ValueError(
                f"{path} has its settings under {' and '.join(map(repr, verbs))}; such a file stands before the verb: "
                f"{_program()} --config {path} {own if own in verbs else verbs[0]}"
            )
        return self.parse_string(text, Path(path).name, *args, **options)

    def _check_value_key(self, action: Any, value: Any, key: str, *args: Any, **options: Any) -> Any:
        """jsonargparse takes null for every key of a file, whatever the key's type."""
        if value is None and action.default is not None:
            if isinstance(action, _ActionConfigLoad):
                within = [each.dest for each in self._actions if each.dest.startswith(f"{action.dest}.")]
                keys = dict.fromkeys(name[len(action.dest) + 1 :].split(".")[0] for name in within)
                raise TypeError(
                    f"{key} is null, and it takes keys: {some(list(keys))}; leave it out for their defaults"
                )
            if isinstance(action, ActionTypeHint):
                return action._check_type_(value, mode=self.parser_mode)
        return super()._check_value_key(action, value, key, *args, **options)

    def save(self, namespace: Any, path: Any, *, skip_none: bool = False, **options: Any) -> None:
        del options
        write_text(path, self.dump(namespace, skip_none=skip_none))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        del ex
        unknown = re.search(r"(?:unrecognized arguments: --|does not accept option '|^Option ')([\w.-]+)", message)
        if unknown:
            parsers = [self, *(sub for a in self._actions if isinstance(a.choices, dict) for sub in a.choices.values())]
            valid = [action.dest for parser in parsers for action in parser._actions]
            name = unknown[1].removeprefix("fit.")
            near = difflib.get_close_matches(name, valid, n=1)
            message = f"unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        elif re.search(r"unrecognized arguments: [^-]", message):
            message += "; a pattern stands in quotes, so that the shell hands it over as it is"
        elif unusable := _UNUSABLE.search(message):
            message = f"class_path {unusable[1]!r} cannot be used: {unusable[2]}{_did_you_mean(unusable[1])}"
            if unusable[2].startswith("'NoneType' object"):
                message = (
                    f"class_path {unusable[1]!r} has init_args null, which takes keys; leave it out for the defaults"
                )
        elif wrong := re.match(r'Parser key "([\w.]+)":', message):
            message = _wrong_type(wrong[1], message) or message
        if self._class is not None:
            message = f"init_args of {self._class.__name__}: {message}"
        print(f"error: {without_secrets(message)}\n({_program()} fit --help lists every key)", file=sys.stderr)
        raise SystemExit(2)


_UNUSABLE = re.compile(r"Problem with given class_path '([^']+)':\s*([^\n]*)")


def _wrong_type(key: str, message: str) -> str | None:
    """jsonargparse's ten lines about a value of a wrong type, as one; None for a key of a complicated type."""
    one_of = re.search(r"Subtypes: \[(.*)\]", message)
    types = one_of or re.search(r"Expected a (.*)\. Got value: ", message)
    value = re.search(r"Given value: (.*)" if one_of else r"Got value: (.*)", message)
    if types is None or value is None or "Not a valid subclass" in message:
        return None
    plain = re.sub(r"([a-z_]+\.)+(?=\w)", "", types[1])  # without names of modules
    expected: list[str] = []
    for name, values, generic in re.findall(r"<class '(\w+)'>|Literal\[([^]]*)\]|(\w+\[[^]]*\])", plain):
        expected += [each.strip("'") for each in values.split(", ")] if values else [name or generic]
    refused = HALF_WEIGHTS if key == "trainer.precision" else ()
    expected = expected or [plain]  # a tuple with 2 elements
    *most, last = dict.fromkeys("null" if name == "NoneType" else name for name in expected if name not in refused)
    allowed = f"{', '.join(most)} or {last}" if most else last
    is_number = re.search(r"value type: <class '(int|float|bool)'>", message)
    quote = f"; in YAML, write '{value[1]}' with quotes" if "str" in expected and is_number else ""
    quote += "; in YAML a tuple is a list, as [1, 2]" if last.startswith("tuple") else ""
    no_limit = "; -1 sets no limit" if key == "trainer.max_steps" else ""
    return f"{key} is {value[1]}, and it takes {allowed}{quote}{no_limit}"


def _did_you_mean(class_path: str) -> str:
    """The path of the callback or logger with the name that a class path ends with, or with a similar one."""
    classes: list[type] = [Callback, Logger]
    for known in classes:  # grows meanwhile
        classes += known.__subclasses__()
    paths = {known.__name__: f"{known.__module__}.{known.__name__}" for known in classes}
    near = difflib.get_close_matches(class_path.split(".")[-1], paths, n=1)
    return f"; did you mean {paths[near[0]]!r}?" if near else ""


class TrainingCLI(LightningCLI):
    """Lightning's command line, with the callbacks, logs and checkpoints of every run.

    A run is a folder, `runs/NAME` or `trainer.default_root_dir`, with `checkpoints/last.ckpt` and `best.ckpt`, `logs/`,
    and at the end `best/`, which `miniclip.load` reads.
    """

    def __init__(self, *args: Any, until_end: ExitStack, **kwargs: Any) -> None:
        """until_end: closed when the run has ended."""
        self._until_end = until_end
        self._overwriting: Overwriting | None = None
        words = sys.argv[1:] if kwargs.get("args") is None else kwargs["args"]
        own = {name: skipped for name, skipped in self.subcommands().items() if name in words[:1]}
        if own:  # the other verb's options are as many, and take a tenth of a second
            self.subcommands = lambda: own  # type: ignore[method-assign]
        super().__init__(*args, **kwargs)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Lightning's own also takes true, for a random seed, which each process of a run would draw for itself.
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=self.seed_everything_default,
            help="Seed of everything random: initialisation, order of the data, augmentation, choice of captions.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.clip.vision.image_size", "data.image_size")
        parser.link_arguments("model.clip.text.context_length", "data.context_length")
        for name in ("preprocess", "resize", "resize_size", "interpolation"):
            parser.link_arguments(f"model.clip.vision.{name}", f"data.{name}")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("model.positives", "data.positives")
        parser.link_arguments("model.compile", "data.text_length_multiple", compute_fn=_text_length_multiple)
        parser.add_argument(
            "--name", type=str | None, default=None, help="The run's folder is runs/NAME; by default runs/run."
        )
        parser.add_argument(
            "--monitor",
            type=str | None,
            default=None,
            help="The logged metric that chooses the best checkpoint; by default val/zero_shot_acc1 if labelled images "
            "are given, else val/retrieval_r1.",
        )
        parser.add_argument(
            "--monitor_mode",
            type=Literal["max", "min"],
            default="max",
            help="Whether the highest or the lowest is best.",
        )
        parser.add_argument(
            "--save_every_n_steps",
            type=int | None,
            default=None,
            help="How often last.ckpt is written; by default every 100 steps, or less often where writing would take "
            "more than a twentieth of the time.",
        )
        parser.add_argument(
            "--save_every_minutes", type=float, default=10.0, help="Minutes after which it is written sooner."
        )
        parser.add_argument(
            "--overwrite",
            nargs="?",
            const=True,
            type=bool,
            default=False,
            help="Removes the run that is in the folder already; files that no run wrote stay.",
        )
        parser.add_argument(
            "--max_samples",
            type=PositiveInt | None,
            default=None,
            help="The run's length in samples instead of steps: the batches that hold so many.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """A run that starts from a trained model takes its architecture.

        The architecture becomes model.clip's default and everything is parsed again, so that the links to the data's
        settings follow. A difference that remains was asked for, and is refused.
        """
        super().parse_arguments(parser, args)
        settings = self.config[self.config.subcommand]
        if not 0 <= settings.seed_everything < 2**32:
            raise ValueError(f"seed_everything is {settings.seed_everything}; it must be from 0 to {2**32 - 1}")
        model = settings.model
        if model.start_from is None and model.image_weights is None:
            return
        resumed = run_settings.checkpoint_to_resume(settings)
        source = model.start_from if resumed is None else str(resumed)
        if source is None or (resumed is not None and not resumed.is_file()):
            return
        start = read_checkpoint(locate(source)).config
        self._parser(self.config.subcommand).set_defaults(run_settings.dotted(start.to_dict(), "model.clip"))
        super().parse_arguments(parser, args)
        settings = self.config[self.config.subcommand]
        asked = CLIPConfig.from_dict(settings.model.clip.as_dict(), "model.clip")
        refuse_another_architecture(start, asked, f"model.start_from {source!r}" if resumed is None else source)
        if resumed is not None:  # the checkpoint holds the weights that the run started from
            settings.model.start_from, settings.model.image_weights = source, None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        options = LightningCLI.subcommands()
        return {name: options[name] for name in ("fit", "validate")}

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would look for hyper-parameters in the checkpoint, which holds none."""

    def _dump_config(self) -> None:
        """Lightning's would write the settings as YAML and read them, for the hyper-parameters that are not kept."""
        self.config_dump: dict[str, Any] = {}

    @property
    def run_folder(self) -> Path:
        return Path(self.config[self.subcommand].trainer.default_root_dir)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        run = run_settings.folder(config)
        # The configuration that is saved with the run has the folder and no name.
        config.trainer.default_root_dir, config.name = str(run), None
        if self.subcommand == "fit" and _is_rank_zero():
            self._until_end.enter_context(hold(run))
            bring_back(run)
        holds_a_run = run_settings.holds_a_run(run)
        asked_for = config.ckpt_path
        if asked_for == "":
            raise ValueError("ckpt_path is ''; it takes a checkpoint's file, or last")
        if asked_for == "last":
            last = run_settings.checkpoints(run) / "last.ckpt"
            # A job that SLURM requeues has the same command for its first start and for every later one.
            is_new = self.subcommand == "fit" and not last.is_file() and (config.overwrite or not holds_a_run)
            config.ckpt_path = None if is_new else str(last)
        if config.ckpt_path and not Path(config.ckpt_path).is_file():
            is_restart = self.subcommand == "fit" and asked_for == "last" and holds_a_run
            also = f", though {run} holds a run; --overwrite true starts it anew" if is_restart else ""
            what = "it is a folder" if Path(config.ckpt_path).is_dir() else "it is not there"
            if found := run_settings.checkpoints_near(Path(config.ckpt_path), run):
                what += f"; there {'is' if len(found) == 1 else 'are'} {some(list(map(str, found)))}"
            purpose = "to resume from" if self.subcommand == "fit" else "to score"
            raise ValueError(f"no checkpoint {config.ckpt_path} {purpose}{also} ({what})")
        if self.subcommand == "fit":
            run_settings.refuse_what_would_mislead(config)
            run_settings.refuse_unused_flags(self.parser.args, config)
            if _is_rank_zero() and holds_a_run and not self._goes_on() and not config.overwrite:
                raise ValueError(
                    f"{run} already holds a run. --ckpt_path last resumes it, --overwrite true starts it anew, and "
                    "--name names another"
                )
            if _is_rank_zero():
                is_removed = config.overwrite and not self._goes_on()
                if is_removed:
                    run_settings.refuse_inputs_within(run, config)
                removed = run_settings.results(run) if is_removed else []
                stays = {path.name for path in (run / "best").glob("*") if path not in removed}
                refuse_misread(stays, str(run / "best"))
        elif not config.ckpt_path and not config.model.start_from:
            raise ValueError(
                "validate needs --ckpt_path FILE (or last) or --model.start_from MODEL; without one it would score "
                "random weights"
            )
        elif config.data.val is None:
            raise ValueError("validate has nothing to score: set data.val")
        else:
            run_settings.refuse_trial(config.trainer)
        if _is_rank_zero():
            defaults = vars(self._parser(self.subcommand).get_defaults().as_flat())
            for sentence in run_settings.without_effect(str(self.subcommand), config, defaults):
                print(f"warning: {without_secrets(sentence)}", file=sys.stderr)

    def _goes_on(self) -> bool:
        """Whether the run is resumed in its own folder."""
        checkpoint = self.config[self.subcommand].ckpt_path
        return bool(checkpoint) and Path(checkpoint).resolve().is_relative_to(
            run_settings.checkpoints(self.run_folder).resolve()
        )

    def before_fit(self) -> None:
        """Checks everything that needs the data, and then takes the run that is to be overwritten out of the way."""
        if checkpoint := self.config.fit.ckpt_path:
            refuse_another_run(Path(checkpoint), self.model)
        data = self.datamodule
        data.trainer = self.trainer  # as Lightning does when it fits
        data.prepare_data()  # safe in several processes at once: one packs, the others wait
        data.setup("fit")
        if data.train_stream is not None:
            data.train_stream.refuse_idle_readers(data.num_workers, self.trainer.world_size)
        steps_per_epoch = data.steps_per_epoch()
        length = run_settings.set_length(self.trainer, data, self.config.fit.max_samples)
        self.model.warmup_steps(self.trainer.max_steps, data)
        run_settings.refuse_validations(self.trainer, steps_per_epoch, bool(data.val))
        if _is_rank_zero():
            print(f"{without_secrets(data.describe())}\n{length}", flush=True)
            if shards := data.trained_on():
                first = without_secrets(some(shards, 3))
                print(
                    f"warning: data.val has shards that are trained on ({first}), so its scores say little of other "
                    "pairs",
                    file=sys.stderr,
                )
            if shards := data.trained_on_twice():
                print(
                    f"warning: data.train names shards more than once ({without_secrets(some(shards, 3))}), so their "
                    "pairs may come twice in a batch; data.weights takes a source more often than another",
                    file=sys.stderr,
                )
            for warning in (
                []
                if data.train_shards is None
                else brief(
                    data.train_shards,
                    data.context_length,
                    data.batch_size,
                    data.seed,
                    image_size=data.image_size,
                    captions=data.captions,
                    positives=self.model.positives,
                )
            ):
                print(f"warning: {without_secrets(warning)}", file=sys.stderr)
        if self._overwriting is not None and _is_rank_zero():
            self._until_end.enter_context(self._overwriting)
        self._stalls.start(self.trainer)

    def before_validate(self) -> None:
        self._stalls.start(self.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        settings = self.config_init[self.subcommand]
        trainer = settings.trainer
        run_settings.refuse_callbacks(trainer, self.run_folder)
        run_settings.refuse_devices(trainer)
        run_settings.refuse_times(trainer)
        if self.subcommand == "fit" and settings.max_samples is not None:
            trainer.max_steps = math.ceil(settings.max_samples / settings.data.batch_size)
        given = run_settings.callback_list(trainer.callbacks)
        logger = trainer.logger
        if logger is not False:  # the report needs the table beside any other log
            others = [] if logger in (None, True) else logger if isinstance(logger, list) else [logger]
            logger = [TableLogger(self.run_folder, name="logs"), *others]
        has_summary = trainer.enable_model_summary is None and any(isinstance(each, ModelSummary) for each in given)
        rank = _own_rank()
        made: pl.Trainer = super().instantiate_trainer(
            callbacks=[*given, *self._own_callbacks(settings, given)],
            logger=logger,
            plugins=[*(trainer.plugins or []), AtomicCheckpointIO()],
            enable_model_summary=trainer.enable_model_summary or has_summary,
            num_sanity_val_steps=0,  # it would score a part of the held-out pairs
            **{name: value for name, (value, _) in run_settings.TRAINER_SETS.items()},
            **kwargs,
        )
        run_settings.refuse_runs_beside(made, rank)
        self._check_trainer(made, trainer)
        profiler: Profiler = made.profiler  # type: ignore[attr-defined]
        if not isinstance(profiler, PassThroughProfiler) and profiler.filename is None:
            profiler.filename = "profile"  # beside the run's log; otherwise it goes to Lightning's own
        return made

    def _own_callbacks(self, settings: Any, given: list[Callback]) -> list[Callback]:
        """Those of every run, after the ones that the settings have."""
        self._stalls = Stalls()
        has_own_bar = any(isinstance(each, ProgressBar) for each in given)
        bar = [] if settings.trainer.enable_progress_bar is False or has_own_bar else [RunProgress()]
        if self.subcommand != "fit":
            return [self._stalls, RejectedSamples(), *bar]
        run = self.run_folder
        own = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False, format="json")
        if settings.overwrite and not self._goes_on():
            self._overwriting = Overwriting(run)
        last, best = (run_settings.checkpoints(run) / f"{name}.ckpt" for name in ("last", "best"))
        python = run_settings.interpreter()
        typed = without_secrets(run_settings.command_line(sys.argv, python))
        resume_command = run_settings.resume_command(sys.argv, python)
        if (public := without_secrets(resume_command)) != resume_command:
            resume_command = f"{public}  # with each … as it was"
        self._resume_command = resume_command
        monitor, mode = run_settings.monitor(settings), settings.monitor_mode
        return [
            self._stalls,
            RejectedSamples(),
            Resumption(run_settings.material(without_secrets_in(json.loads(own)))),
            StopIfNotFinite(),
            StepMetrics(),
            RunMetrics(),
            CaptionWordings(),
            *([self._overwriting] if self._overwriting else []),
            *bar,
            LostProcesses(lambda: what_is_kept(last, resume_command)),
            RunReport(run, typed, monitor, mode),
            # last.ckpt is written after everything else that a step leaves, and so knows of it.
            RandomStates(),
            BestCheckpoint(best, monitor, mode),
            LastCheckpoint(last, settings.save_every_n_steps, settings.save_every_minutes, resume_command),
        ]

    def _check_trainer(self, made: pl.Trainer, trainer: Any) -> None:
        """
        Args:
            trainer: the settings that it was made of.

        Raises:
            ValueError: it would do other than they say.
        """
        if self.subcommand == "fit":
            listed: list[Callback] = made.callbacks  # type: ignore[attr-defined]
            unknown = run_settings.refuse_unlogged_monitors(listed, self.model, self.config.fit.data.val is not None)
            if _is_rank_zero():
                print("".join(f"{sentence}\n" for sentence in unknown), end="", flush=True)
        seconds = lightning_private.keep_validation_interval(made, trainer.val_check_interval)
        if seconds is not None and not seconds > 0:
            raise ValueError(f"trainer.val_check_interval is {trainer.val_check_interval}; a time must be above 0")
        if lightning_private.forks_or_spawns(made):
            raise ValueError(
                f"trainer.strategy {trainer.strategy!r} starts processes by fork or spawn, which would begin without "
                "this command's state; use --trainer.strategy ddp"
            )
        if trainer.sync_batchnorm and isinstance(made.strategy, ParallelStrategy):
            _refuse_unsynchronised(self.model, made.strategy)

    def after_validate(self) -> None:
        self._tell_of_profile()

    @rank_zero_only
    def _tell_of_profile(self) -> None:
        profiler: Profiler = self.trainer.profiler  # type: ignore[attr-defined]
        if profiler.dirpath is not None and profiler.filename is not None:
            found = sorted(Path(profiler.dirpath).glob(f"*{profiler.filename}*"))
            print(f"Profile: {some([str(path) for path in found], 3)}", flush=True)

    @rank_zero_only
    def after_fit(self) -> None:
        self._tell_of_profile()
        checkpoints = run_settings.checkpoints(self.run_folder)
        found = [path for name in ("best.ckpt", "last.ckpt") if (path := checkpoints / name).is_file()]
        settings = self.config.fit
        if not found and settings.ckpt_path is None:
            raise ValueError(
                f"the run ended before its first step, so {self.run_folder} holds no model; trainer.max_time is "
                f"{settings.trainer.max_time}"
            )
        if is_out_of_time(self.trainer):
            limit = "the callback Timer" if (time := settings.trainer.max_time) is None else f"trainer.max_time {time}"
            print(
                f"The time is up ({limit}, counted from each start) at step {self.trainer.global_step} of "
                f"{self.trainer.max_steps}. To go on:\n  {self._resume_command}"
            )
        if not found:  # a finished run of another folder was resumed, so this folder has nothing of its own
            return
        source = found[0]
        model, _ = load(source, device="cpu")
        try:
            save(model, self.run_folder / "best", overwrite=True)
        except OSError as error:
            whole = " and ".join(str(path) for path in found)
            raise ValueError(
                f"{self.run_folder / 'best'} could not be written ({error}). Training is complete, and {whole} "
                f"{'is' if len(found) == 1 else 'are'} whole. Once there is room, this writes it and trains nothing:\n"
                f"  {self._resume_command}"
            ) from error
        message = f"Trained model: {self.run_folder / 'best'} (from {source.name}); miniclip.load reads it."
        if (page := self.run_folder / PAGE_FILE).is_file():
            best = score_in(source) if source.name == "best.ckpt" else None
            score = f"Best {best[0]}: {best[2]:.4f} at step {best[1]}. " if best else ""
            message = f"{score}{message} Report: {page}"
        print(message)


def _refuse_unsynchronised(model: CLIPTraining, strategy: ParallelStrategy) -> None:
    """Raises a ValueError if trainer.sync_batchnorm would have no effect, or torch's error, with several processes."""
    if not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return
    device = strategy.root_device.type
    alone = "leave it out: each process then normalises by its own part of the batch"
    if not isinstance(strategy, DDPStrategy):
        raise ValueError(
            f"trainer.sync_batchnorm is true, which has no effect under this strategy: {alone}; or take "
            "--trainer.strategy ddp on GPUs"
        )
    if device != "cuda":
        raise ValueError(
            f"trainer.sync_batchnorm is true and the device is {device}, where torch cannot synchronise batch norm: "
            f"{alone}; or train on GPUs, or in one process (--trainer.devices 1 --trainer.strategy auto)"
        )


def _text_length_multiple(is_compiled: bool) -> int:
    return COMPILED_LENGTH_MULTIPLE if is_compiled else 1


def _program() -> str:
    name = Path(sys.argv[0]).name
    return {"miniclip": "miniclip train", "__main__.py": "python -m miniclip train"}.get(name, name)


def _own_rank() -> int:
    return getattr(rank_zero_only, "rank", 0) or 0


def _is_rank_zero() -> bool:
    return _own_rank() == 0


_USERS_ERRORS = ("Early stopping conditioned on metric", "You set `--ntasks=")  # Lightning's, as RuntimeErrors


@contextmanager
def _libraries_errors_in_words() -> Iterator[None]:
    """Ends in a sentence where a user, or the machine, is the cause of a library's error."""
    try:
        yield
    except ValueError as error:
        if unusable := _UNUSABLE.search(str(error)):  # a logger, say, whose package is missing
            raise ValueError(f"class_path {unusable[1]!r} cannot be used: {unusable[2]}") from error
        raise
    except RuntimeError as error:
        if str(error).startswith(_USERS_ERRORS):
            raise ValueError(str(error).replace("`", "'")) from error
        raise


def main(args: list[str] | None = None) -> None:
    """Trains with the settings of the YAML files (`--config`) and the flags."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it; no effect elsewhere
    for name in ("pytorch_lightning", "lightning_fabric"):  # RunProgress prints what matters of theirs
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger(ModelSummary.__module__).setLevel(logging.INFO)  # one that is asked for is printed so
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")  # a resumed run
    warnings.filterwarnings("ignore", message=".*could not find the monitored key.*")  # a run without a validation
    warnings.filterwarnings("ignore", message=".*`list` across ranks is zero.*")  # of its batches
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of a picture that it does not name
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")  # Lightning's own, with the newest torch
    warnings.filterwarnings("ignore", message=".*in eval mode at the start.*")  # a locked tower
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")  # the last step is logged, too
    warnings.filterwarnings("ignore", message=".*`IterableDataset` has `__len__` defined.*")  # a stream: readers differ
    warnings.filterwarnings(
        "ignore", message=".*need to be provided during `Trainer`.*"
    )  # fit's callbacks, in validate
    for message in (".*does not have many workers.*", ".*LightningCLI's args parameter.*"):
        warnings.filterwarnings("ignore", message=message)
    with user_errors(MisconfigurationException), _libraries_errors_in_words(), ExitStack() as until_end:
        TrainingCLI(
            CLIPTraining,
            PairDataModule,
            args=args,
            until_end=until_end,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={name: value for name, (value, _) in run_settings.TRAINER_SETS.items()},
            save_config_kwargs={"overwrite": True},
            parser_class=_Parser,
            parser_kwargs={
                "prog": _program(),
                "allow_abbrev": False,
                "parser_mode": _YAML,
                "description": "Train a CLIP on shards of image-text pairs.",
            },
        )
