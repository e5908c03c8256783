"""The life of a run: named, kept, stopped, requeued, resumed under other settings, and ended by what can go wrong.

Whatever can be is done in this process; signals of a scheduler and processes that die are real.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import torch
import warm
from helpers import pack_folder, tiny_clip, write_pairs
from pytorch_lightning import Callback
from pytorch_lightning.trainer.states import TrainerFn

import miniclip
from miniclip.commands import train as trainer
from miniclip.data.module import PairDataModule
from miniclip.reports.runs import read_run
from miniclip.training.checkpoints import LastCheckpoint
from miniclip.training.progress import Stalls
from miniclip.training.resume import Resumption
from miniclip.training.step import CLIPTraining
from miniclip.weights.convert import convert
from miniclip.weights.read import read_torch_file

ROOT = Path(__file__).parents[2]
TINY = [
    *runs.TINY,
    "--model.clip.vision.layers=1",
    "--model.clip.text.layers=1",
    "--data.num_workers=0",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """40 pairs to train on, so that an epoch is 3 steps, and 16 held out."""
    folder = tmp_path_factory.mktemp("data")
    for part, count in (("train", 40), ("val", 16)):
        write_pairs(folder / "src" / part, count)
        pack_folder(folder / "src" / part, folder / part, samples_per_shard=15)
    return folder


def arguments(data: Path, run: Path | None, *more: str, steps: int = 6) -> list[str]:
    where = [f"--trainer.default_root_dir={run}"] if run else []
    shards = [f"--data.{part}={data / part}" for part in ("train", "val")]
    return ["fit", *TINY, *shards, *where, f"--trainer.max_steps={steps}", *more]


def callbacks(*those: Callback) -> str:
    """As a flag: these callbacks, made again from what they were made of."""
    listed = [{"class_path": f"{__name__}.{type(one).__name__}", "init_args": vars(one)} for one in those]
    return f"--trainer.callbacks={json.dumps(listed)}"


def last(run: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run / f"checkpoints/{name}.ckpt", weights_only=True)


def step_of(run: Path, name: str = "last") -> int:
    return last(run, name)["global_step"]


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = last(one)["state_dict"], last(other)["state_dict"]
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def fails(capsys, args: list[str], status: int = 2) -> str:
    with pytest.raises(SystemExit) as stopped:
        trainer.main(args)
    assert stopped.value.code == status
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.err if status == 2 else said.out


def validated_at(run: Path) -> list[int]:
    steps = []
    for log in run.glob("logs/*/metrics.csv"):
        header, *rows = (line.split(",") for line in log.read_text().splitlines())
        steps += [int(row[header.index("step")]) + 1 for row in rows if row[header.index("val/loss")]]
    return sorted(steps)


# ---------------------------------------------------------------------------------------------------------------------
# When and where checkpoints are written


class StepsOnDisk(Callback):
    """Notes the step of last.ckpt as each step begins."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_start(self, trainer, *args) -> None:
        run = Path(trainer.default_root_dir)
        there = step_of(run) if (run / "checkpoints/last.ckpt").is_file() else 0
        with open(self.path, "a") as file:
            file.write(f"{there} ")


@pytest.mark.sample(1)
@pytest.mark.parametrize("minutes, expected", [(1e-9, [0, 1, 2, 3, 4, 5]), (1e9, [0, 0, 0, 0, 4, 4])])
def test_checkpoints_come_every_so_many_steps_or_minutes_whichever_is_first(data, tmp_path, minutes, expected):
    noted = tmp_path / "noted"
    args = arguments(data, tmp_path / "run", callbacks(StepsOnDisk(str(noted))), f"--save_every_minutes={minutes}")
    trainer.main([*args, "--save_every_n_steps=4"])
    assert [int(step) for step in noted.read_text().split()] == expected


@pytest.mark.parametrize(
    "every_n_steps, took_s, is_written", [(None, 0.4, True), (None, 0.6, False), (50, 0.6, True), (None, 0.0, True)]
)
def test_by_default_checkpoints_take_a_twentieth_of_the_time_at_most(tmp_path, every_n_steps, took_s, is_written):
    """Ten seconds after the last one; who asks for a number of steps gets it."""
    saved, trained = [], SimpleNamespace(is_global_zero=True, world_size=1, global_step=100, training=True)
    trained.save_checkpoint = saved.append
    trained.strategy = SimpleNamespace(checkpoint_io=None, broadcast=lambda value: value)
    callback = LastCheckpoint(tmp_path / "last.ckpt", every_n_steps, every_minutes=10, resume_command="")
    callback._saved_at, callback._last_took_s = time.monotonic() - 10, took_s
    callback._end_of_step(trained, [])
    assert bool(saved) is is_written
    callback._saved_at = time.monotonic() - 601
    callback._end_of_step(trained, [])
    assert len(saved) == 1 + is_written


def test_nothing_is_written_to_the_systems_temporary_folder(data, tmp_path, monkeypatch):
    """On another file system, from where a rename would be a copy. A folder's time changes with each name in it."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir=memory) as elsewhere:
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setenv("TMPDIR", elsewhere)
        assert tempfile.gettempdir() == elsewhere  # tries it out by a file, once
        before = Path(elsewhere).stat().st_mtime_ns
        trainer.main(arguments(data, tmp_path / "run", "--save_every_n_steps=1", steps=2))
        assert Path(elsewhere).stat().st_mtime_ns == before
        tempfile.NamedTemporaryFile().close()
        assert Path(elsewhere).stat().st_mtime_ns != before  # so the test could have failed


# ---------------------------------------------------------------------------------------------------------------------
# A run's name, and one command for the first time and for every time after


def test_a_name_is_the_runs_folder_and_one_command_begins_goes_on_and_ends(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/digits-2"
    command = [*arguments(data, None, "--name=digits-2"), "--ckpt_path=last"]
    stopped = fails(capsys, [*command, callbacks(SignalAt(4, int(signal.SIGTERM)))], status=128 + signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "Run runs/digits-2: new, 6 steps" in stopped
    trainer.main(command)
    assert "Run runs/digits-2: goes on from step 4 of 6" in capsys.readouterr().out
    shutil.rmtree(run / "best")
    trainer.main(command)
    assert "Run runs/digits-2: is finished: step 6 of 6" in capsys.readouterr().out
    miniclip.load(run / "best", device="cpu")
    (run / "checkpoints/last.ckpt").unlink()
    said = fails(capsys, command)
    assert "last.ckpt to resume from, though runs/digits-2 holds a run; --overwrite true starts it anew" in said
    for path in ("runs/digits-2/checkpoints/nope.ckpt", "runs/digits-2/best", "runs/digits-2", "elsewhere.ckpt"):
        said = fails(capsys, [*command[:-1], f"--ckpt_path={path}"])
        assert f"no checkpoint {path} to resume from (" in said
        assert "there is runs/digits-2/checkpoints/best.ckpt" in said
        assert "--overwrite" not in said
        assert ("is a folder" in said) == Path(path).is_dir()
    trainer.main([*command, "--overwrite=true"])
    assert "new, 6 steps" in capsys.readouterr().out


@pytest.mark.long
def test_a_run_whose_best_was_converted_in_place_is_refused_before_it_goes_on(data, tmp_path, capsys):
    """Its model would lie beside OpenCLIP's, which `load` prefers."""
    run = tmp_path / "run"
    trainer.main(arguments(data, run, steps=1))
    convert(run / "best", run / "best", "openclip", overwrite=True)
    said = fails(capsys, arguments(data, run, "--ckpt_path=last", steps=2))
    assert "best holds open_clip_config.json" in said
    assert step_of(run) == 1
    trainer.main(arguments(data, run, "--overwrite=true", steps=2))
    miniclip.load(run / "best", device="cpu")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew_by_the_same_command(data, tmp_path):
    run = tmp_path / "run"
    (run / "logs/version_0").mkdir(parents=True)
    trainer.main(arguments(data, run, "--ckpt_path=last", steps=2))
    assert step_of(run) == 2


@pytest.mark.parametrize("name", ["a/b", "..", "", "-x"])
def test_a_name_that_is_no_folders_name_is_refused(data, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert f"name is {name!r}" in fails(capsys, arguments(data, None, f"--name={name}"))
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_kept_configuration_alone_goes_on_with_a_named_run(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trainer.main(arguments(data, None, "--name=mine", steps=2))
    trainer.main(["fit", "--config=runs/mine/logs/version_0/config.yaml", "--ckpt_path=last", "--trainer.max_steps=3"])
    assert step_of(tmp_path / "runs/mine") == 3


@pytest.mark.long
def test_the_name_in_a_file_gives_way_to_another_folder(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("named.yaml").write_text("name: mine\n")
    trainer.main([*arguments(data, tmp_path / "elsewhere", steps=1), "--config=named.yaml", "--name=null"])
    assert step_of(tmp_path / "elsewhere") == 1
    assert not Path("runs").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The best checkpoint, and the last validation


@pytest.mark.sample(1)
@pytest.mark.parametrize("monitor, mode", [("val/loss", "min"), ("train/loss", "max")])
def test_best_is_by_any_logged_metric_in_either_direction(data, tmp_path, monitor, mode):
    run = tmp_path / "run"
    options = [f"--monitor={monitor}", f"--monitor_mode={mode}", "--trainer.val_check_interval=1"]
    trainer.main(arguments(data, run, *options))
    header, *rows = (line.split(",") for line in (run / "logs/version_0/metrics.csv").read_text().splitlines())
    column = header.index(monitor)
    scores = {int(row[header.index("step")]) + 1: float(row[column]) for row in rows if row[column]}
    assert len(scores) == 6
    assert scores[step_of(run, "best")] == (max if mode == "max" else min)(scores.values())


class LogsNothing(Callback):
    """A user's own, of which nobody knows before whether it logs the monitor."""


@pytest.mark.long
def test_a_monitor_that_nothing_logs_ends_the_run_at_the_first_validation(data, tmp_path, capsys):
    own = callbacks(LogsNothing())
    with pytest.raises(SystemExit) as stopped:
        trainer.main(arguments(data, tmp_path / "run", own, "--monitor=val/typo"))
    assert stopped.value.code == 2
    out, said = capsys.readouterr()
    assert "monitor is 'val/typo', which LogsNothing would have to log; the first validation shows whether" in out
    assert "monitor is 'val/typo', which nothing logs; logged are " in said
    assert all(name in said for name in ("train/loss", "val/loss", "val/retrieval_r1"))
    assert validated_at(tmp_path / "run") in ([], [3])
    assert "checkpoints/last.ckpt is of step 3: the same command with --ckpt_path last and another --monitor" in said
    more = ["--monitor=val/loss", "--monitor_mode=min", "--ckpt_path=last"]
    trainer.main(arguments(data, tmp_path / "run", *more))
    assert "goes on from step 3 of 6" in capsys.readouterr().out
    trainer.main(arguments(data, tmp_path / "straight", *more[:2]))
    one, other = (miniclip.load(tmp_path / name / "checkpoints/last.ckpt", "cpu")[0] for name in ("run", "straight"))
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@pytest.mark.long
def test_a_monitor_of_steps_that_are_logged_later_than_the_first_validation_chooses_among_later_ones(
    data, tmp_path, capsys
):
    run = tmp_path / "run"  # validations at steps 3, 6, 9 and 11, logs at 5, 10 and 11
    options = ["--monitor=train/loss", "--monitor_mode=min", "--trainer.log_every_n_steps=5"]
    trainer.main(arguments(data, run, *options, steps=11))
    said = capsys.readouterr().out
    assert said.count("chooses no best.ckpt: train/loss is not among what is logged by now") == 1
    assert "The validation at step 3 chooses" in said
    header, *rows = (line.split(",") for line in (run / "logs/version_0/metrics.csv").read_text().splitlines())
    column = header.index("train/loss")
    at = {int(row[header.index("step")]) + 1: float(row[column]) for row in rows if row[column]}
    assert set(at) == {5, 10, 11}
    by_validation = {6: at[5], 9: at[5], 11: at[11]}
    best = min(by_validation, key=by_validation.get)
    assert step_of(run, "best") == best
    assert read_run(run).best() == ("train/loss", best, pytest.approx(by_validation[best]))


@pytest.mark.sample(1)
@pytest.mark.parametrize("every", ["--trainer.check_val_every_n_epoch=1", "--trainer.check_val_every_n_epoch=2"])
def test_a_run_that_ends_between_validations_validates_at_its_end(data, tmp_path, every):
    run = tmp_path / "run"
    trainer.main(arguments(data, run, every, steps=8))
    assert validated_at(run) == ([3, 6, 8] if every.endswith("1") else [6, 8])


def test_a_validation_takes_the_same_sample_of_many_held_out_pairs(data, tmp_path, capsys):
    trainer.main(arguments(data, tmp_path / "run", "--data.val_pairs=5", steps=1))
    assert "validation is on 5 of 16 held-out pairs" in capsys.readouterr().out
    seen = []
    for seed in (0, 1):
        module = PairDataModule(
            str(data / "train"), str(data / "val"), image_size=8, num_workers=0, val_pairs=5, batch_size=4, seed=seed
        )
        module.setup("fit")
        seen.append([key for batch in module.val_dataloader() for key in batch.keys])
    assert seen[0] == seen[1] == sorted(set(seen[0]))
    assert len(seen[0]) == 5
    module = PairDataModule(str(data / "train"), str(data / "val"), image_size=8, num_workers=0)
    module.setup("fit")
    whole = [key for batch in module.val_dataloader() for key in batch.keys]
    assert len(whole) == 16
    assert seen[0] != whole[:5]


# ---------------------------------------------------------------------------------------------------------------------
# Signals and SLURM


class SignalAt(Callback):
    """Sends this process a signal while a step is trained, or, for step 0, before the first one begins."""

    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_fit_start(self, *args) -> None:
        if self.step == 0:
            os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), self.number)


def test_a_signal_before_the_first_step_leaves_a_checkpoint_after_it(data, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    process = launch(arguments(data, run, callbacks(SignalAt(0, int(signal.SIGTERM)))), out)
    assert process.wait(500) == 128 + signal.SIGTERM, out.read_text()
    assert "last.ckpt at step 1. To go on:" in out.read_text()
    assert step_of(run) == 1


class TerminateAll(Callback):
    """Another process sends SIGTERM to this one and all that it has begun, as SLURM does."""

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == 1:
            workers = [str(child.pid) for child in multiprocessing.active_children()]
            assert workers
            subprocess.run(["kill", "-TERM", str(os.getpid()), *workers], check=True)


@pytest.mark.long
def test_a_sigterm_for_every_process_of_the_job_leaves_a_checkpoint_and_no_process(data, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    process = launch(arguments(data, run, "--data.num_workers=2", callbacks(TerminateAll())), out)
    assert process.wait(500) == 128 + signal.SIGTERM, out.read_text()
    assert step_of(run) == 2
    assert "DataLoader worker" not in out.read_text()


def launch(args: list[str], out: Path, **environment: str) -> subprocess.Popen[bytes]:
    """A real process; what it says goes to a file."""
    path = os.pathsep.join(sys.path)
    with open(out, "wb") as file:
        return warm.Popen(
            [sys.executable, str(ROOT / "train.py"), *args],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


SLURM = {
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "clip",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.mark.long  # test_nodes has it of the script in examples/
def test_slurms_signal_has_the_job_requeued_and_the_same_command_goes_on_to_the_same_bits(data, tmp_path):
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    environment = {**SLURM, "PATH": f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"}
    run, out = tmp_path / "run", tmp_path / "out"
    command = arguments(data, run, "--ckpt_path=last", "--data.num_workers=1")
    first = launch([*command, callbacks(SignalAt(4, int(signal.SIGUSR1)))], out, **environment)
    assert first.wait(200) == 128 + signal.SIGUSR1, out.read_text()
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert "SLURM requeues job 4711" in out.read_text()
    assert step_of(run) == 4
    assert not list(run.rglob("hpc_ckpt*"))
    again = launch(command, out, **environment)
    assert again.wait(200) == 0, out.read_text()
    assert "goes on from step 4 of 6" in out.read_text()
    trainer.main(arguments(data, tmp_path / "straight"))
    assert_same_weights(run, tmp_path / "straight")


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong


class Poison(Callback):
    """The image tower gives NaN for one sample, wherever in a batch it comes."""

    def __init__(self, key: str) -> None:
        self.key = key

    def on_train_batch_start(self, trainer, pl_module, batch, *args) -> None:
        if self.key in batch.keys:
            row = batch.keys.index(self.key)
            flaw = torch.zeros(len(batch.keys), 1)
            flaw[row] = torch.nan
            pl_module.clip.visual.register_forward_hook(lambda module, inputs, features: features + flaw)


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.long)])
def test_one_sample_that_gives_nan_stops_the_run_before_the_weights_are_touched(data, tmp_path, devices):
    run, straight, out = tmp_path / "run", tmp_path / "straight", tmp_path / "out"
    more = ["--save_every_n_steps=1", f"--trainer.devices={devices}"]
    more += ["--trainer.strategy=ddp"] if devices > 1 else []
    key = "00001.tar:000000022"
    process = launch(arguments(data, run, callbacks(Poison(key)), *more), out)
    assert process.wait(500) not in (0, None)
    said = out.read_text()
    assert f"Only the features of {key} are not finite" in said, said
    assert "Traceback" not in said
    facts = json.loads((run / "non_finite.json").read_text())
    assert facts["loss"] == "nan"
    assert [sample["key"] for sample in facts["samples"] if not sample["is_finite"]] == [key]
    assert len(facts["samples"]) == 12
    assert {sample["rank"] for sample in facts["samples"]} == set(range(devices))
    (culprit,) = [sample for sample in facts["samples"] if sample["key"] == key]
    assert culprit["caption"] == "picture 2 2 , caption 0"
    if facts["step"] == 1:
        assert not (run / "checkpoints/last.ckpt").exists()
    else:
        assert step_of(run) == facts["step"] - 1
        if devices == 1:
            stop = callbacks(SignalAt(facts["step"] - 1, int(signal.SIGTERM)))
            with pytest.raises(SystemExit):
                trainer.main(arguments(data, straight, stop))
            assert_same_weights(run, straight)


class FullDisk(Callback):
    """From one step on, before another, no file may grow past 100 kB: real writes fail, as on a disk that is full."""

    def __init__(self, first: int, until: int) -> None:
        self.first, self.until = first, until

    def on_train_batch_start(self, trainer, *args) -> None:
        step = trainer.global_step + 1
        limit = 10**5 if self.first <= step < self.until else resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def room() -> Any:
    yield
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_disk_that_is_full_for_a_while_costs_warnings_and_nothing_else(data, tmp_path, capsys, room):
    run, noted = tmp_path / "run", tmp_path / "noted"
    full = callbacks(FullDisk(3, 5), StepsOnDisk(str(noted)))
    trainer.main(arguments(data, run, full, "--save_every_n_steps=1"))
    said = capsys.readouterr().err
    assert re.search(r"warning: \S+last.ckpt of step 3 could not be written \(.*File too large\)", said)
    assert "best at step 3. The earlier one is kept" in said or step_of(run, "best") != 3
    assert [int(step) for step in noted.read_text().split()] == [0, 1, 2, 2, 2, 5]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    trainer.main(arguments(data, tmp_path / "straight"))
    assert_same_weights(run, tmp_path / "straight")


@pytest.mark.sample(1)
@pytest.mark.parametrize("monitor", [None, "train/samples"])  # the latter grows, so each is the best so far
def test_a_full_disk_costs_no_checkpoint_of_lightnings_own_callback(data, tmp_path, capsys, room, monitor):
    """It writes the new file, and then removes the one that it keeps no longer."""
    run, own, noted = tmp_path / "run", tmp_path / "own", tmp_path / "noted"
    settings = {"dirpath": str(own), "filename": "{step}", "every_n_train_steps": 1, "monitor": monitor, "mode": "max"}
    given = [
        {"class_path": f"{__name__}.FullDisk", "init_args": {"first": 3, "until": 5}},
        {"class_path": f"{__name__}.FilesOnDisk", "init_args": {"folder": str(own), "path": str(noted)}},
        {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": settings},
    ]
    trainer.main(arguments(data, run, f"--trainer.callbacks={json.dumps(given)}"))
    said = capsys.readouterr().err
    for step in (3, 4):
        warning = rf"warning: \S+own/step={step}\.ckpt could not be written \(.*File too large\)\. Training goes on"
        assert len(re.findall(warning, said)) == 1, said
    kept = [line.split() for line in noted.read_text().splitlines()]
    assert kept == [
        [],
        ["step=1.ckpt"],
        ["step=2.ckpt"],
        ["step=2.ckpt"],
        ["step=2.ckpt"],
        ["step=2.ckpt", "step=5.ckpt"],
    ]
    assert torch.load(own / "step=6.ckpt", weights_only=True)["global_step"] == 6


class FilesOnDisk(Callback):
    """Notes the files of a folder as each step begins."""

    def __init__(self, folder: str, path: str) -> None:
        self.folder, self.path = folder, path

    def on_train_batch_start(self, trainer, *args) -> None:
        with open(self.path, "a") as file:
            file.write(" ".join(sorted(path.name for path in Path(self.folder).glob("*"))) + "\n")


def test_a_disk_that_is_full_at_the_end_is_an_error_and_keeps_the_previous_checkpoint(data, tmp_path, capsys, room):
    run = tmp_path / "run"
    said = fails(capsys, arguments(data, run, callbacks(FullDisk(3, 99)), "--save_every_n_steps=1"))
    assert re.search(r"error: \S+last.ckpt of step 6 could not be written .*File too large", said)
    assert "last.ckpt is the last checkpoint. To go on:\n" in said
    assert f"Step 2 is kept: {run / 'checkpoints/last.ckpt'} is" in said
    assert step_of(run) == 2
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]


class FullAfterTraining(Callback):
    """Once the run has left all its checkpoints, no file may grow past 4 kB."""

    def teardown(self, trainer, pl_module, stage) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.long
def test_a_disk_that_is_full_for_the_trained_model_costs_no_training(data, tmp_path, capsys, room):
    run = tmp_path / "run"
    said = fails(capsys, arguments(data, run, callbacks(FullAfterTraining())))
    weights, (best, kept) = (
        run / "best/model.safetensors",
        (run / f"checkpoints/{name}.ckpt" for name in ("best", "last")),
    )
    assert f"{run / 'best'} could not be written ([Errno {errno.EFBIG}] File too large: '{weights}')" in said
    assert f"Training is complete, and {best} and {kept} are whole" in said
    assert re.search(r"this writes it and trains nothing:\n  .*--ckpt_path last\n", said)
    _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    trainer.main(arguments(data, run, "--ckpt_path=last"))
    assert "is finished: step 6 of 6" in capsys.readouterr().out
    assert miniclip.load(run / "best", device="cpu")


@pytest.mark.long
@pytest.mark.parametrize("given", ["simple", "advanced", "SimpleProfiler"])
def test_a_profile_lies_beside_the_log_and_the_run_says_where(data, tmp_path, capsys, given):
    run = tmp_path / "run"
    trainer.main(arguments(data, run, f"--trainer.profiler={given}", steps=2))
    profile = run / "logs/version_0/fit-profile.txt"
    assert f"Profile: {profile}\n" in capsys.readouterr().out
    assert "on_train_batch_start" in profile.read_text()
    trainer.main(arguments(data, run, "--overwrite=true", steps=2))
    assert not profile.exists()


class FullLog(Callback):
    """A folder has the log's name, so no file can be written there."""

    def on_train_start(self, trainer, *args) -> None:
        (Path(trainer.logger.log_dir) / "metrics.csv").mkdir()


def test_a_log_that_cannot_be_written_does_not_end_the_run(data, tmp_path, capsys):
    trainer.main(arguments(data, tmp_path / "run", callbacks(FullLog()), steps=4))
    assert "warning: the log could not be written" in capsys.readouterr().err
    assert step_of(tmp_path / "run") == 4


class Die(Callback):
    """Ends one of several processes without a word, and notes when."""

    def __init__(self, rank: int, step: int, noted: str) -> None:
        self.rank, self.step, self.noted = rank, step, noted

    def on_before_optimizer_step(self, trainer, *args) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step - 1):
            Path(self.noted).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.long), 1])
def test_where_a_process_is_killed_the_others_end_and_say_so(data, tmp_path, rank):
    run, out, noted = tmp_path / "run", tmp_path / "out", tmp_path / "noted"
    die = callbacks(Die(rank, 3, str(noted)), Pids(str(tmp_path)))
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--save_every_n_steps=1"]
    process = launch(arguments(data, run, *options, die), out)
    try:
        status = process.wait(500)
        assert status != 0
        end = time.monotonic() + 300
        pids = [int(path.read_text()) for path in tmp_path.glob("*.pid")]
        assert len(pids) == 2
        while any(is_alive(pid) for pid in pids):
            assert time.monotonic() < end, f"still there minutes later:\n{out.read_text()}"
            time.sleep(0.05)
    finally:
        process.kill()
    said = out.read_text()
    assert "another process of this run is gone: it was killed" in said, said
    assert "last.ckpt is the last checkpoint. To go on:\n" in said
    # The kill may have come between these two's file operations, but what is there is whole.
    assert step_of(run) == 2


class Standstill(Callback):
    """Process 1 is stopped when two steps are done."""

    def __init__(self) -> None:
        Stalls.silence_s = 0.5

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.long
def test_a_process_that_waits_for_another_says_so_and_where_it_is(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Stalls, "silence_s", Stalls.silence_s)  # which the callback sets here as well
    out = tmp_path / "out"
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", callbacks(Standstill(), Pids(str(tmp_path)))]
    process = launch(arguments(data, tmp_path / "run", *options), out)
    try:
        waits = re.compile(r" in process 0 of 2 since step 2\. It is at\n( .*\n)* .*distributed_c10d\.py")
        end = time.monotonic() + 500
        while not waits.search(out.read_text()):
            assert time.monotonic() < end, out.read_text()
            time.sleep(0.05)
        os.kill(int((tmp_path / "1.pid").read_text()), signal.SIGCONT)
        assert process.wait(500) == 0, out.read_text()
    finally:
        process.kill()
        for path in tmp_path.glob("*.pid"):
            if is_alive(int(path.read_text())):
                os.kill(int(path.read_text()), signal.SIGKILL)
    assert "Trained model:" in out.read_text()


class Pids(Callback):
    """Notes who takes part."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_start(self, trainer, *args) -> None:
        Path(self.folder, f"{trainer.global_rank}.pid").write_text(str(os.getpid()))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Resumed, as before and under other settings


class Dropout(Callback):
    """Noise of torch's, NumPy's and Python's global generators in every step."""

    def setup(self, trainer, pl_module, stage) -> None:
        import random

        def noise(module, inputs, features):
            if not module.training:
                return features
            scale = 1 + 0.1 * np.random.rand() + 0.1 * random.random()  # noqa: NPY002
            return torch.nn.functional.dropout(features, 0.3) * scale

        pl_module.clip.visual.ln_post.register_forward_hook(noise)


class Ending(Callback):
    """Ends the run at a step: as max_time and early stopping do, at the epoch's end, by a signal or by an error."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step != self.step:
            return
        if self.how == "asked":
            trainer.should_stop = True
        elif self.how == "killed":
            raise RuntimeError("killed")
        elif self.how != "asked at the epoch's end":
            os.kill(os.getpid(), getattr(signal, self.how))

    def on_train_epoch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step and self.how == "asked at the epoch's end":
            trainer.should_stop = True  # one more step follows if this one was not validated


TIMES = ("train/data_wait", "train/images_per_s", "train/memory_gb", "train/mfu", "train/tflops")
EVERY_SECOND = "--trainer.check_val_every_n_epoch=2"


def logged_by_step(run: Path) -> tuple[dict[int, Any], dict[int, Any]]:
    """The log without times, of the steps and of the validations; a step that was trained twice as it was last."""
    train: dict[int, Any] = {}
    val: dict[int, Any] = {}
    for version in range(len(list(run.glob("logs/version_*")))):
        for row in runs.metrics(run, version):
            kept = {name: value for name, value in row.items() if name not in TIMES and value}
            (val if row.get("val/loss") else train)[int(row["step"])] = kept
    return train, val


@pytest.fixture(scope="module")
def never_stopped(data, tmp_path_factory) -> tuple[dict[int, Any], dict[int, Any]]:
    """Four epochs of 3 steps, validated after the second and the fourth."""
    run = tmp_path_factory.mktemp("straight") / "run"
    trainer.main(arguments(data, run, EVERY_SECOND, steps=12))
    train, val = logged_by_step(run)
    assert [int(row["epoch"]) for row in train.values()] == [step // 3 for step in range(12)]
    assert list(val) == [5, 11]
    return train, val


@pytest.mark.sample(1)
@pytest.mark.parametrize("how", ["asked", "asked at the epoch's end", "SIGTERM", "SIGINT", "killed"])
@pytest.mark.parametrize("stops", [(4, 8), (3, 6)])
def test_a_run_resumed_twice_logs_and_validates_what_one_that_was_never_stopped_does(
    data, tmp_path, never_stopped, how, stops
):
    if how == "asked at the epoch's end":
        stops = [step for step in stops if step % 3 == 0]
    run = tmp_path / "run"
    more = [EVERY_SECOND, "--ckpt_path=last", "--save_every_n_steps=2"]
    ends = set()
    for stop in stops:
        ended = arguments(data, run, *more, callbacks(Ending(stop, how)), steps=12)
        if how.startswith("asked"):
            trainer.main(ended)
            ends.add(step_of(run) - 1)
        else:
            with pytest.raises(RuntimeError if how == "killed" else SystemExit):
                trainer.main(ended)
    trainer.main(arguments(data, run, *more, steps=12))
    train, val = logged_by_step(run)
    assert train == never_stopped[0]
    assert {step: val[step] for step in never_stopped[1]} == never_stopped[1]
    assert set(val) == set(never_stopped[1]) | ends  # whatever ends a run, its last step is validated


@pytest.mark.sample(1)
@pytest.mark.parametrize("ends", [(["max_steps=3"], ["max_steps=4"]), (["max_epochs=1"], ["max_epochs=2"])])
def test_a_run_that_is_made_longer_twice_counts_its_epochs_on(data, tmp_path, ends):
    run = tmp_path / "run"
    reached = []
    for end in (*ends, ["max_steps=12"]):
        options = ["--trainer.max_steps=-1", *(f"--trainer.{each}" for each in end)]
        trainer.main(arguments(data, run, EVERY_SECOND, "--ckpt_path=last", *options))
        reached.append(step_of(run))
        assert last(run)["epoch"] == reached[-1] // 3
    train, val = logged_by_step(run)
    assert [int(train[step]["epoch"]) for step in range(12)] == [step // 3 for step in range(12)]
    assert set(val) == {5, 11, *(step - 1 for step in reached)}


@pytest.mark.long
def test_a_checkpoint_whose_epoch_was_counted_too_high_goes_on_in_the_epoch_of_its_step(data, tmp_path, never_stopped):
    """As earlier versions left it: after step 4, in the second epoch, two epochs are said to be complete."""
    run = tmp_path / "run"
    trainer.main(arguments(data, run, EVERY_SECOND, callbacks(Ending(4, "asked")), steps=12))
    old = last(run)
    progress = old["loops"]["fit_loop"]["epoch_progress"]
    assert progress["current"] == {"ready": 2, "started": 2, "processed": 1, "completed": 1}
    for counts in progress.values():
        counts.update(ready=2, started=2, processed=2, completed=2)
    torch.save({**old, "epoch": 2}, run / "checkpoints/last.ckpt")
    trainer.main(arguments(data, run, EVERY_SECOND, "--ckpt_path=last", steps=12))
    train, val = logged_by_step(run)
    assert train == never_stopped[0]
    assert set(val) == {3, 5, 11}


@pytest.mark.long
@pytest.mark.parametrize(
    ("stop", "length"),
    [
        (5, "--trainer.max_epochs=3"),
        *(
            pytest.param(stop, length, marks=pytest.mark.long)
            for stop, length in (
                (3, "--trainer.max_epochs=3"),
                (9, "--trainer.max_epochs=3"),
                *((stop, "--trainer.max_steps=9") for stop in (3, 5, 9)),
            )
        ),
    ],
)
def test_a_resumed_run_draws_the_random_numbers_that_it_would_have_drawn(data, tmp_path, stop, length):
    """Within an epoch, at the end of one, and at the very end."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    ends = ["--trainer.max_steps=-1", length, "--data.num_workers=1"]
    trainer.main(arguments(data, straight, *ends, callbacks(Dropout())))
    stopped = arguments(data, broken, *ends, callbacks(Dropout(), SignalAt(stop, int(signal.SIGTERM))))
    with pytest.raises(SystemExit):
        trainer.main(stopped)
    assert step_of(broken) == stop
    trainer.main(arguments(data, broken, *ends, callbacks(Dropout()), "--ckpt_path=last"))
    assert_same_weights(straight, broken)
    # Three epochs of 40 pairs are exactly ten batches of 12; Lightning's epochs end after three of them.
    end = [10] if "epochs" in length else []
    assert validated_at(broken) == validated_at(straight) == [3, 6, 9, *end]


OTHER_SETTINGS = [  # what is given beside the same command; then what is said of it, and whether the run goes on
    (["--model.optimizer.kind=muon"], "trained with model.optimizer.kind adamw, this run has muon", False),
    (["--data.batch_size=10"], "trained with batch_size 12, this run has 10", False),
    (["--seed_everything=5"], "trained with seed 0, this run has 5", False),
    (["--model.clip.embed_dim=32"], "model.clip.embed_dim: the checkpoint has 16, this run 32", False),
    (["--model.optimizer.layer_decay=0.5"], "model.optimizer.layer_decay 1.0, this run has 0.5", False),
    (["--model.optimizer.text_lr_scale=2"], "model.optimizer.text_lr_scale 1.0, this run has 2.0", False),
    (["--trainer.max_steps=2"], "the checkpoint is of step 3, past the end of this run of 2 steps", False),
    (["--trainer.max_steps=8"], "steps: the checkpoint has 6, this run 8", True),
    (["--model.optimizer.lr=0.001"], "model.optimizer.lr: the checkpoint has 0.01, this run 0.001", True),
    (["--model.optimizer.betas=[0.8,0.9]"], "model.optimizer.betas: the checkpoint has [0.9, 0.98]", True),
    (["--model.positives=caption"], "model.positives: the checkpoint has pair, this run caption", True),
    (["--trainer.precision=64-true"], "trainer.precision: the checkpoint has 32-true, this run 64-true", True),
    (["--model.patch_dropout=0.5"], "model.patch_dropout: the checkpoint has 0.0, this run 0.5", True),
    (["--trainer.gradient_clip_val=1"], "trainer.gradient_clip_val: the checkpoint has None, this run 1", True),
    (
        ["--trainer.gradient_clip_algorithm=value", "--trainer.gradient_clip_val=1"],
        "trainer.gradient_clip_algorithm: the checkpoint has None, this run value",
        True,
    ),
    (["--model.max_rejected=0.5"], "model.max_rejected: the checkpoint has 0.01, this run 0.5", True),
    (["--data.val_pairs=7"], "data.val_pairs: the checkpoint has 5000, this run 7", True),
    (["--trainer.max_time=00:10:00:00"], "trainer.max_time: the checkpoint has None, this run 00:10:00:00", True),
    (["--model.checkpoint_activations=true", "--save_every_n_steps=2", "--monitor=val/retrieval_r1"], "", True),
    (["--model.micro_batch_size=4"], "", True),
    (["--data.num_workers=1"], "", True),
    ([], "", True),
]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["--monitor=val/loss", "--monitor_mode=min"],
            r"was the best by val/retrieval_r1 \(max\), and val/loss \(min\)",
        ),
        (["--data.val_pairs=2"], r"was the best by val/retrieval_r1 on other validation pairs \(0\.\d{4}\)"),
    ],
)
def test_a_score_of_another_kind_is_not_compared_and_the_last_line_tells_what_the_checkpoint_holds(
    data, tmp_path, capsys, more, said
):
    run = tmp_path / "run"
    trainer.main(arguments(data, run, steps=2))
    capsys.readouterr()
    trainer.main([*arguments(data, run, "--ckpt_path=last", steps=4), *more])
    out = capsys.readouterr().out
    assert re.search(rf"best\.ckpt {said}.*, so the next validation replaces it", out)
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    (state,) = (each for name, each in best["callbacks"].items() if name.startswith("BestCheckpoint"))
    assert f"Best {state['monitor']}: {state['score']:.4f} at step {best['global_step']}. " in out
    assert read_run(run).best() == (state["monitor"], best["global_step"], pytest.approx(state["score"], abs=1e-6))


def labelled_table(path: Path, data: Path, count: int, first: str) -> Path:
    """Pictures of `data.val`: the first has the label `first`, the rest "b"."""
    pictures = sorted((data / "src/val").glob("*.png"))
    rows = [f"{picture},{'b' if number else first}" for number, picture in enumerate(pictures[:count])]
    path.write_text("\n".join(["file,label", *rows]) + "\n")
    return path


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("change", "is_anew"),
    [
        ("a label", True),
        ("a row", True),
        ("another table", True),
        ("prompts", True),
        ("data.val_pairs", False),
        ("a copy elsewhere", False),
    ],
)
def test_a_score_on_other_labelled_images_is_not_compared(data, tmp_path, capsys, change, is_anew):
    run, table = tmp_path / "run", labelled_table(tmp_path / "table.csv", data, 8, "a")

    def start(steps: int, *more: str) -> str:
        given = {"data": str(table), "templates": "imagenet7" if change == "prompts" and steps == 4 else None}
        callback = {"class_path": "miniclip.training.zero_shot.ZeroShotEvaluation", "init_args": given}
        flag = f"--trainer.callbacks={json.dumps([callback])}"
        trainer.main(arguments(data, run, flag, "--ckpt_path=last", *more, steps=steps))
        return capsys.readouterr().out

    start(2)
    state = next(each for name, each in last(run)["callbacks"].items() if name.startswith("BestCheckpoint"))
    for name in ("last", "best"):  # a score that no other can reach
        kept = last(run, name)
        next(each for key, each in kept["callbacks"].items() if key.startswith("BestCheckpoint"))["score"] = 1.5
        torch.save(kept, run / f"checkpoints/{name}.ckpt")
    if change == "another table":
        table = labelled_table(tmp_path / "other.csv", data, 7, "a")
    elif change == "a copy elsewhere":  # with other times
        copied = shutil.copytree(data, tmp_path / "elsewhere/copied", copy_function=shutil.copyfile)
        table = labelled_table(tmp_path / "copied.csv", copied, 8, "a")
    elif change != "prompts":
        labelled_table(table, data, 9 if change == "a row" else 8, "c" if change == "a label" else "a")
    out = start(4, *(["--data.val_pairs=2"] if change == "data.val_pairs" else []))
    said = f"{run}/checkpoints/best.ckpt was the best by val/zero_shot_acc1 on other labelled images (1.5000), so the"
    assert (said in out) == is_anew
    assert (step_of(run, "best") > 2) == is_anew
    now = next(each for name, each in last(run)["callbacks"].items() if name.startswith("BestCheckpoint"))
    assert (now["labelled"] != state["labelled"]) == is_anew
    assert [start["labelled_images"] for start in read_run(run).starts] == [state["labelled"], now["labelled"]]


class Rates(Callback):
    """Notes the settings that the optimiser goes by in each step."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        with open(self.path, "a") as file:
            group = optimizer.param_groups[0]
            file.write(json.dumps([trainer.global_step + 1, group["lr"], list(group["betas"])]) + "\n")


@pytest.fixture(scope="module")
def half(data, tmp_path_factory) -> Path:
    """A run of six steps that was stopped after three."""
    run = tmp_path_factory.mktemp("half") / "run"
    with pytest.raises(SystemExit):
        trainer.main(arguments(data, run, callbacks(SignalAt(3, int(signal.SIGTERM)))))
    return run


@pytest.mark.sample(3)
@pytest.mark.parametrize("more, message, goes_on", OTHER_SETTINGS, ids=[str(more) for more, _, _ in OTHER_SETTINGS])
def test_what_a_run_resumed_under_other_settings_says(data, tmp_path, capsys, half, more, message, goes_on):
    run = tmp_path / "run"
    shutil.copytree(half, run)
    args = [*arguments(data, run, "--ckpt_path=last"), *more]
    if not goes_on:
        assert message in fails(capsys, args)
        assert step_of(run) == 3
        return
    noted = tmp_path / "rates"
    trainer.main([*args, callbacks(Rates(str(noted)))])
    said = capsys.readouterr().out
    assert message in said
    assert ("other settings than its checkpoint" in said) == bool(message)
    total = 8 if "--trainer.max_steps=8" in more else 6
    assert step_of(run) == total
    peak = 0.001 if "lr=0.001" in str(more) else 0.01
    betas = [0.8, 0.9] if "betas" in str(more) else [0.9, 0.98]
    lines = [json.loads(line) for line in noted.read_text().splitlines()]
    assert [step for step, _, _ in lines] == list(range(4, total + 1))
    warmup = round(0.1 * total)
    for step, rate, found in lines:  # the cosine by hand
        share = (step - 1 - warmup) / (total - warmup)
        assert rate == pytest.approx(peak * 0.5 * (1 + math.cos(math.pi * share)))
        assert found == betas


@pytest.mark.long
def test_a_resumed_run_prints_another_teacher_and_other_settings_of_its_callbacks(data, tmp_path, capsys):
    run = tmp_path / "run"
    for name in ("one", "other"):
        miniclip.save(tiny_clip(), tmp_path / name)

    def run_with(teacher: str, noted: str, steps: int) -> str:
        more = [f"--model.teacher={tmp_path / teacher}", callbacks(StepsOnDisk(noted), Inference())]
        trainer.main(arguments(data, run, *more, "--ckpt_path=last", steps=steps))
        return capsys.readouterr().out

    run_with("one", f"{tmp_path}/a", 2)
    steps = "  steps: the checkpoint has 2, this run 4\n"
    teacher = f"  model.teacher: the checkpoint has {tmp_path / 'one'}, this run {tmp_path / 'other'}\n"
    path = f"  trainer.callbacks.{__name__}.StepsOnDisk.path: the checkpoint has {tmp_path}/a, this run {tmp_path}/b\n"
    printed = run_with("other", f"{tmp_path}/b", 4).split("other settings than its checkpoint:\n")[1]
    assert printed.startswith(steps + path + teacher)
    assert "other settings" not in run_with("other", f"{tmp_path}/b", 4)
    trainer.main(arguments(data, run, callbacks(Inference()), "--ckpt_path=last", steps=6))
    printed = capsys.readouterr().out
    assert f"  model.teacher: the checkpoint has {tmp_path / 'other'}, this run None\n" in printed


def test_validate_needs_no_setting_of_training(data, tmp_path, capsys, half):
    """Neither the optimiser nor the length concerns it; held-out pairs do."""
    given = [flag for flag in arguments(data, half)[1:] if "max_steps" not in flag]
    before = read_run(half)
    trainer.main(["validate", *given, "--ckpt_path=last", "--model.optimizer.kind=muon"])
    assert "val/loss" in capsys.readouterr().out
    assert read_run(half) == before
    without = [flag for flag in given if "data.val" not in flag]
    assert "set data.val" in fails(capsys, ["validate", *without, "--ckpt_path=last"])
    trial = ["validate", *given, "--ckpt_path=last", "--trainer.fast_dev_run=true"]
    assert "scores a part of the held-out pairs" in fails(capsys, trial)


class Inference(Callback):
    """Looks whether a validation is in a mode in which slices of weights can't be gathered."""

    def on_validation_end(self, trainer, pl_module) -> None:
        assert not torch.is_inference_mode_enabled()


def test_validation_leaves_tensors_that_training_can_use(data, tmp_path):
    trainer.main(arguments(data, tmp_path / "run", callbacks(Inference()), steps=1))
    assert validated_at(tmp_path / "run") == [1]


@pytest.mark.long
def test_overwriting_by_a_run_that_goes_on_from_another_folder_leaves_nothing_of_the_old_one(data, tmp_path, half):
    """An old best.ckpt would count as the new run's."""
    run = tmp_path / "run"
    trainer.main(arguments(data, run, "--trainer.val_check_interval=1", steps=4))
    assert validated_at(run) == [1, 2, 3, 4]
    checkpoint = half / "checkpoints/last.ckpt"
    trainer.main(arguments(data, run, "--overwrite=true", f"--ckpt_path={checkpoint}", "--data.val=null"))
    assert step_of(run) == 6
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert [path.name for path in (run / "logs").iterdir()] == ["version_0"]


def test_two_processes_go_on_where_one_stopped_and_say_so(data, tmp_path, half):
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(half, run)
    process = launch(arguments(data, run, "--ckpt_path=last", "--trainer.devices=2", "--trainer.strategy=ddp"), out)
    assert process.wait(500) == 0, out.read_text()
    assert "processes: the checkpoint has 1, this run 2" in out.read_text()
    assert step_of(run) == 6
    assert len(last(run)["random_states"]) == 2


class _Own:
    """A class of some program's."""


@pytest.mark.parametrize(
    ("saved", "what"),
    [
        (argparse.Namespace(lr=1.0), "holds a argparse.Namespace, which miniclip's trainer writes into no checkpoint"),
        (_Own(), f"holds a {__name__}._Own, which miniclip's trainer writes into no checkpoint"),
        (1.0, "was not written by miniclip's trainer: it has no entry 'miniclip_config'"),
    ],
    ids=["namespace", "class", "plain"],
)
def test_another_trainers_checkpoint_is_called_that_and_what_to_do_instead(data, tmp_path, capsys, saved, what):
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"a.b": torch.zeros(3)}, "global_step": 7, "args": saved}, path)
    # Said before the data are prepared, which takes minutes where there are many: these can't be.
    said = fails(capsys, arguments(data, tmp_path / "run", f"--ckpt_path={path}", "--data.train=nowhere"))
    line = next(line for line in said.splitlines() if str(path) in line)
    assert line.startswith(f"error: {path} {what}")
    assert line.endswith(
        f"; resume it with the program that wrote it, or start from its weights: --model.start_from {path}"
    )


def test_a_file_that_no_trainer_writes_is_called_what_it_is(tmp_path):
    miniclip.save(tiny_clip(), tmp_path / "model")
    shutil.copyfile(tmp_path / "model/model.safetensors", tmp_path / "weights.ckpt")
    for path in (tmp_path / "model/model.safetensors", tmp_path / "weights.ckpt"):
        with pytest.raises(
            ValueError,
            match="is a safetensors file, which holds weights alone, and holds no run to re.*"
            f"; start from its weights: --model.start_from {path}$",
        ):
            read_torch_file(path)
    (tmp_path / "notes.ckpt").write_text("epochs: 3")
    with pytest.raises(
        ValueError, match=r"notes\.ckpt is no file of torch\.save's, and holds no run to resume, as a run"
    ):
        read_torch_file(tmp_path / "notes.ckpt")


def test_a_checkpoint_of_weights_alone_is_called_that():
    loading = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING), ckpt_path="weights.ckpt")
    module = CLIPTraining(tiny_clip().config)
    with pytest.raises(ValueError, match=r"weights\.ckpt holds weights alone, .*: --model\.start_from weights\.ckpt"):
        Resumption().on_load_checkpoint(loading, module, {"state_dict": module.state_dict()})
