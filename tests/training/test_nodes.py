# Several machines, by torchrun and by SLURM: the scripts of examples/, with machines that are processes of this one.

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.utilities import rank_zero_only
from runs import ROOT, arguments, fails, state

from miniclip.commands import run_settings


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def settings(data, run):
    """What `fit` is given, without the word."""
    more = ["--trainer.precision=64-true", "--data.captions.order=first", f"--trainer.default_root_dir={run}"]
    return arguments(data, run, *more, steps=5)[1:]


def assert_same_weights(one, two):
    for name, expected in state(one).items():
        assert (state(two)[name] - expected).abs().max() <= 1e-8 * expected.abs().max().clamp(min=1e-3), name


def environment(**more):
    """With the interpreter that runs the tests as `python`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def alone(data, run):
    subprocess.run([sys.executable, ROOT / "train.py", "fit", *settings(data, run)], check=True, capture_output=True)


def launch(out, *command, **more):
    """Real processes, in a session of their own; what they say goes to a file."""
    with open(out, "wb") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**more),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def assert_ended(outs, processes, status):
    """Shows what all of them said if one does not end: processes that wait say where they are."""
    end = time.monotonic() + 900
    try:
        for process in processes:
            process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        for number in (signal.SIGTERM, signal.SIGKILL):  # torchrun passes the first on to sessions of its own
            for process in processes:
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(100)
    said = "\n".join(out.read_text() for out in outs)
    assert [process.returncode for process in processes] == [status] * len(processes), said


@pytest.mark.long
def test_two_machines_by_torchrun_train_the_weights_of_one(data, tmp_path):
    alone(data, tmp_path / "one")
    port, outs = str(free_port()), [tmp_path / f"said{rank}" for rank in range(2)]
    given = settings(data, tmp_path / "two")
    nodes = [
        launch(out, ROOT / "examples/torchrun.sh", "2", str(rank), "127.0.0.1", *given, MASTER_PORT=port, DEVICES="1")
        for rank, out in enumerate(outs)
    ]
    assert_ended(outs, nodes, 0)
    assert "Trained model:" in outs[0].read_text()
    assert "Trained model:" not in outs[1].read_text()
    assert_same_weights(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_of_which_each_would_be_a_run_by_itself_are_refused(data, tmp_path, capsys, monkeypatch, rank):
    """What torchrun sets for two processes, and a command that does not say how many there are."""
    for name, value in {"TORCHELASTIC_RUN_ID": "a", "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(rank_zero_only, "rank", rank)  # which Lightning reads when it is imported
    said = fails(capsys, arguments(data, tmp_path / "run"))
    assert f"this is a process of rank {rank} of several that torchrun or srun started" in said
    assert "set --trainer.strategy ddp, and --trainer.devices to the processes on each machine" in said
    assert not (tmp_path / "run").exists()


TASKS = dict.fromkeys(("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"), "2")
TASKS |= {"SLURM_JOB_NAME": "clip", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    "changes, is_refused",
    [
        ({}, True),
        ({"SLURM_STEP_ID": None, "SLURM_STEP_NUM_TASKS": None}, False),  # `python` in a batch script
        ({"SLURM_STEP_ID": "batch"}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),  # srun --ntasks 1
        ({"SLURM_JOB_NAME": "bash"}, False),  # srun --pty bash
        ({"SLURM_PTY_PORT": "4711"}, False),
    ],
)
def test_the_first_of_sruns_tasks_is_refused_as_the_others_are(monkeypatch, changes, is_refused):
    for name, value in (TASKS | changes).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    made = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    with (
        pytest.raises(ValueError, match="rank 0 of several that torchrun or srun")
        if is_refused
        else contextlib.nullcontext()
    ):
        run_settings.refuse_runs_beside(made, 0)


def test_tasks_that_lightning_cannot_count_are_refused_in_words(data, tmp_path, capsys, monkeypatch):
    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "clip", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    said = fails(capsys, arguments(data, tmp_path / "run"))
    assert "error: You set '--ntasks=4' in your SLURM bash script" in said
    assert "Traceback" not in said


def test_the_script_says_how_it_is_used(tmp_path):
    done = subprocess.run([ROOT / "examples/torchrun.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "examples/torchrun.sh NODES RANK MASTER" in done.stderr


class Requeue(Callback):
    """SLURM tells every task that its time is nearly up, while step 3 is trained."""

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)


# Starts the tasks of a job, one on each node, as srun does.
SRUN = """#!/usr/bin/env bash
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$rank SLURM_NODEID=$rank SLURM_LOCALID=0 "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit "${status:-0}"
"""


@pytest.mark.long
def test_two_nodes_under_slurm_are_requeued_and_train_the_weights_of_one(data, tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "miniclip",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{environment()['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    script = [ROOT / "examples/slurm.sh", *settings(data, tmp_path / "two")]
    stop = '--trainer.callbacks=[{"class_path": "test_nodes.Requeue"}]'

    def run(status, *more):
        out = tmp_path / "said"
        assert_ended([out], [launch(out, *script, *more, **job)], status)
        return out.read_text()

    run(128 + signal.SIGUSR1, stop)
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert "goes on from step 3 of 5" in run(0)
    alone(data, tmp_path / "one")
    assert_same_weights(tmp_path / "one", tmp_path / "two")
