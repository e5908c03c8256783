"""Whatever ends a run, its last step is validated."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.loops import evaluation_loop, fit_loop, training_epoch_loop
from runs import arguments, fails, validations

from miniclip.commands import train as trainer
from miniclip.data.indexing.index_tars import index_shards


def early_stopping(**options: object) -> str:
    each = {"class_path": "EarlyStopping", "init_args": {"monitor": "train/loss", "stopping_threshold": 99, **options}}
    return f"--trainer.callbacks={json.dumps([each])}"


RARELY = "--trainer.check_val_every_n_epoch=5"
ENDINGS = {
    "max_steps amid an epoch": ["--trainer.max_steps=4", RARELY],
    "as many min_epochs as the run has": ["--trainer.max_steps=4", "--trainer.min_epochs=1", RARELY],
    "as many min_steps as the run has": ["--trainer.max_epochs=1", "--trainer.min_steps=4", RARELY],
    "max_time": ["--trainer.max_steps=100000", "--trainer.max_time=00:00:00:01", RARELY],
    "early stopping at the end of an epoch": [
        "--trainer.max_steps=90",
        RARELY,
        early_stopping(check_on_train_epoch_end=True),
    ],
    "early stopping at a validation": ["--trainer.max_steps=90", "--trainer.val_check_interval=2", early_stopping()],
}
STEPS = {"max_steps amid an epoch": 4, "early stopping at the end of an epoch": 4}


SOME = ("max_steps amid an epoch", "max_time", "early stopping at a validation")


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "ending", [pytest.param(each, marks=() if each in SOME else pytest.mark.long) for each in ENDINGS]
)
def test_the_last_step_is_validated(data, tmp_path, ending):
    run = tmp_path / "run"
    trainer.main([*arguments(data, run), "--trainer.max_steps=-1", *ENDINGS[ending]])
    steps = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert max(validations(run)) == steps - 1
    assert steps == STEPS.get(ending, steps)


def test_a_run_that_early_stopping_ended_is_finished(data, tmp_path, capsys):
    """No validation, one every three steps, is better by 5 than the first: each uses up some of the patience."""
    run = tmp_path / "run"

    def train(*more: str) -> tuple[str, int]:
        options = ["--model.optimizer.lr=1e-9", "--ckpt_path=last", *more]
        trainer.main([*arguments(data, run, steps=90), *options])
        return capsys.readouterr().out, torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]

    stop = {"monitor": "val/loss", "min_delta": 5.0, "stopping_threshold": None}
    printed, step = train(early_stopping(**stop, patience=2))
    assert step == 9
    best = float(validations(run)[2])  # the first, as none is better by 5
    assert (
        "EarlyStopping ended the run at step 9 of 90 by val/loss. Monitored metric val/loss did not improve in the "
        f"last 2 records. Best score: {best:.3f}. To train on, give it more patience or another threshold, or leave "
        "it out:\n  "
    ) in printed
    assert printed.count("EarlyStopping ended") == 1
    for _ in range(2):
        shutil.rmtree(run / "best")
        printed, step = train(early_stopping(**stop, patience=2))
        assert (
            f"{run}: is finished: EarlyStopping ended it by val/loss at step 9 of 90. To train on, give it" in printed
        )
        assert step == 9
        assert (run / "best/config.json").is_file()
    printed, step = train(early_stopping(**stop, patience=4))
    assert "goes on from step 9 of 90" in printed
    assert "EarlyStopping.patience: the checkpoint has 2, this run 4" in printed
    assert step == 15
    assert sorted(validations(run)) == [2, 5, 8, 11, 14]
    printed, step = train("--trainer.max_steps=17")
    assert "goes on from step 15 of 17" in printed
    assert step == 17


@pytest.mark.long
def test_a_run_that_passed_a_threshold_is_finished_until_that_is_another(data, tmp_path, capsys):
    run = tmp_path / "run"

    def train(threshold: float) -> tuple[str, int]:
        stopping = early_stopping(monitor="val/loss", stopping_threshold=threshold, patience=50)
        trainer.main([*arguments(data, run, steps=6), "--ckpt_path=last", stopping])
        return capsys.readouterr().out, torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]

    printed, step = train(100.0)
    assert step == 3
    value = float(validations(run)[2])
    assert f"ended the run at step 3 of 6 by val/loss. Stopping threshold reached: val/loss = {value}"[:-3] in printed
    printed, step = train(100.0)
    assert "is finished: EarlyStopping ended it by val/loss at step 3 of 6" in printed
    assert step == 3
    printed, step = train(0.001)
    assert "goes on from step 3 of 6" in printed
    assert "stopping_threshold: the checkpoint has 100.0, this run 0.001" in printed
    assert step == 6


def test_a_run_that_ends_before_its_first_step_says_so(data, tmp_path, capsys):
    message = fails(capsys, arguments(data, tmp_path / "run", "--trainer.max_time=00:00:00:00"))
    assert "trainer.max_time" in message
    assert "before its first step" in message


class Tick(Callback):
    """A step takes a second of a clock of its own."""

    now = 0

    def on_train_batch_start(self, *args) -> None:
        Tick.now += 1


@pytest.mark.long
@pytest.mark.parametrize("interval, apart", [("00:00:00:10", 10), ('{"seconds": 4}', 4)])
def test_validations_come_at_times_and_at_the_last_step(data, tmp_path, monkeypatch, interval, apart):
    for module in (evaluation_loop, fit_loop, training_epoch_loop):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: Tick.now))
    run = tmp_path / "run"
    callbacks = [json.loads(early_stopping(stopping_threshold=None, monitor="val/loss", patience=99).partition("=")[2])]
    options = [
        f"--trainer.val_check_interval={interval}",
        f"--trainer.callbacks={json.dumps([*callbacks[0], {'class_path': 'test_endings.Tick'}])}",
        "--ckpt_path=last",
    ]
    trainer.main([*arguments(data, run, steps=2 * apart + 2), *options])
    first = [apart, 2 * apart, 2 * apart + 2]
    assert sorted(validations(run)) == [step - 1 for step in first]
    trainer.main([*arguments(data, run, steps=3 * apart + 4), *options])  # a start begins to count anew
    assert sorted(validations(run)) == [step - 1 for step in [*first, 3 * apart + 2, 3 * apart + 4]]


TIMER = '--trainer.callbacks=[{"class_path": "Timer", "init_args": {"duration": "00:00:00:01"}}]'


@pytest.mark.sample(1)
@pytest.mark.parametrize("limit, name", [("--trainer.max_time=00:00:00:01", "trainer.max_time 00"), (TIMER, "Timer")])
def test_a_limit_of_time_counts_from_each_start_and_is_named(data, tmp_path, capsys, limit, name):
    run, reached = tmp_path / "run", [0]
    for _ in range(2):
        trainer.main([*arguments(data, run, steps=100_000), "--ckpt_path=last", limit])
        reached.append(torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"])
        printed = capsys.readouterr().out
        assert f"at step {reached[-1]} of 100000. To go on:\n" in printed
        assert name in printed
        assert printed.count("report.html") == 1
        assert f"stopped by its limit of time, {reached[-1]:,} of 100,000 steps" in (run / "report.html").read_text()
    assert reached[0] < reached[1] < reached[2]
    trainer.main([*arguments(data, run, steps=reached[2] + 2), "--ckpt_path=last", "--trainer.max_time=00:01:00:00"])
    assert "The time is up" not in capsys.readouterr().out
    assert "finished, " in (run / "report.html").read_text()


def test_two_limits_of_time_of_which_one_would_be_ignored_are_refused(data, tmp_path, capsys):
    message = fails(capsys, arguments(data, tmp_path / "run", TIMER, "--trainer.max_time=00:00:00:05"))
    assert "trainer.max_time is 00:00:00:05 and trainer.callbacks has a Timer" in message


def test_early_stopping_on_a_metric_that_nothing_logs_is_an_error_that_names_those_that_are(data, tmp_path, capsys):
    message = fails(capsys, [*arguments(data, tmp_path / "run", steps=6), early_stopping(monitor="val_loss")])
    assert "'val_loss'" in message
    assert "'val/loss'" in message
    assert "Traceback" not in message


def spoilt(shards: Path, out: Path) -> Path:
    """A copy of shards in which no image can be read."""
    shutil.copytree(shards, out)
    for tar in sorted(out.glob("*.tar")):
        with open(tar, "r+b") as file:
            for offset, _ in np.load(tar.with_suffix(".npz"))["image"]:
                file.seek(int(offset))
                file.write(b"spoilt!!")
    index_shards(str(out), overwrite=True)
    return out


def test_an_error_in_a_validation_names_its_cause_and_leaves_torch_compile_on(data, tmp_path, capsys):
    val = spoilt(data / "shards/val", tmp_path / "val")
    message = fails(
        capsys, [*arguments(data, tmp_path / "run", steps=2), f"--data.val={val}", "--model.max_rejected=1"]
    )
    assert "not one sample of data.val could be read" in message
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.zeros(1))
    assert len(compiled) == 1
