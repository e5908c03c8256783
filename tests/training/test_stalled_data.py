# Runs whose data stand still: real processes, whose workers are stopped or killed while a step is trained.

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import runs
import torch
import warm
from helpers import pack_folder, write_pairs
from pytorch_lightning import Callback

from miniclip.common.waiting import PatientLoader


class ToWorkers(Callback):
    """Sends the workers a signal while step 3 is trained, and ends a wait after two seconds in which nothing moves."""

    def __init__(self, number: int, patience_s: float = 2.0) -> None:
        self.number = number
        PatientLoader.patience_s = patience_s

    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == 2:
            self.send()

    def send(self) -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, self.number)


class ToWorkersInValidation(ToWorkers):
    """Likewise while the first batch of the first validation is encoded."""

    def on_train_batch_start(self, trainer, *args) -> None:
        pass

    def on_validation_batch_start(self, trainer, *args) -> None:
        self.send()


def launch(
    data: Path, run: Path, out: Path, number: int, patience_s: float = 2.0, callback: type = ToWorkers, *more: str
) -> subprocess.Popen[bytes]:
    chosen = f"--trainer.callbacks+={Path(__file__).stem}.{callback.__name__}"
    more = [*more, chosen, f"--trainer.callbacks.number={number}", f"--trainer.callbacks.patience_s={patience_s}"]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    with open(out, "wb") as file:
        return warm.Popen(
            runs.command(data, run, *more, "--save_every_n_steps=100", "--data.num_workers=2", steps=30),
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def saved_step(run: Path) -> int:
    return int(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stalled")
    pack_folder(write_pairs(folder / "pairs", 160), folder / "shards", samples_per_shard=20, val_fraction=0.6)
    return folder


@pytest.mark.parametrize(
    "number, words",
    [
        (signal.SIGSTOP, r"error: no batch has come for .*worker (\d+) is stopped \(`kill -CONT \1` "),
        pytest.param(
            signal.SIGKILL,
            r"error: a worker that reads data was killed by SIGKILL.*memory ran out",
            marks=pytest.mark.long,
        ),
    ],
)
def test_data_that_stand_still_end_the_run_in_words_after_a_checkpoint(data, tmp_path, number, words):
    run, out = tmp_path / "run", tmp_path / "out"
    assert launch(data, run, out, int(number)).wait(200) == 2, out.read_text()
    told = out.read_text()
    assert re.search(words, told), told
    assert "Traceback" not in told
    assert f"{run / 'checkpoints' / 'last.ckpt'} is the last checkpoint. To go on:" in told
    step = saved_step(run)
    assert 3 <= step < 30
    resumed = warm.run(runs.command(data, run, "--ckpt_path=last", steps=step + 2), timeout=500)
    assert resumed.returncode == 0, resumed.stderr
    assert f"goes on from step {step}" in resumed.stdout


def test_a_signal_is_heard_while_data_stand_still(data, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    process = launch(data, run, out, int(signal.SIGSTOP), patience_s=1000)
    steps = run / "logs" / "version_0" / "metrics.csv"
    deadline = time.monotonic() + 500
    while not (steps.exists() and len(steps.read_text().splitlines()) > 3):
        assert process.poll() is None, out.read_text()
        assert time.monotonic() < deadline, out.read_text()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 128 + signal.SIGTERM, out.read_text()
    assert f"Saved {run / 'checkpoints' / 'last.ckpt'} at step {saved_step(run)}. To go on:" in out.read_text()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_validation_whose_data_stand_still_ends_likewise(data, tmp_path, number):
    run, out = tmp_path / "run", tmp_path / "out"
    process = launch(data, run, out, int(number), 2.0, ToWorkersInValidation, "--trainer.val_check_interval=4")
    assert process.wait(200) == 2, out.read_text()
    told = out.read_text()
    assert re.search(r"error: (no batch has come for .*is stopped|a worker that reads data was killed)", told), told
    assert "Traceback" not in told
    assert f"{run / 'checkpoints' / 'last.ckpt'} is the last checkpoint. To go on:" in told
    assert saved_step(run) == 4
