"""What a run's folder survives: a second run, a process that is killed, a full disk."""

import csv
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import arguments, command, fails, metrics

from miniclip.commands import run_settings
from miniclip.commands import train as trainer
from miniclip.commands.overwriting import Overwriting
from miniclip.training.run_folder import TableLogger


def test_a_run_keeps_others_out_of_its_folder_until_it_ends_or_is_killed(data, tmp_path, capsys):
    run = tmp_path / "run"
    args = command(data, run, "--save_every_n_steps=1", steps=100_000)
    process = warm.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        assert any(line.startswith("step 5/") for line in process.stdout)
        for more in ([], ["--ckpt_path=last"], ["--overwrite=true"]):
            message = fails(capsys, arguments(data, run, *more, steps=100_001))
            assert (
                f"{run} is in use by another run, process {process.pid} on {socket.gethostname()}, started 2" in message
            )
            assert "--name" in message
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    stopped_at = int(re.search(r"from step (\d+)", resumed(data, run, capsys))[1])
    assert stopped_at >= 5
    assert not (run / "running.json").exists()
    assert not (run / ".lock").exists()


def resumed(data, run, capsys) -> str:
    """The output of a run that is resumed after its process was killed, and is stopped soon."""
    stop = '--trainer.callbacks=[{"class_path": "test_run_folder.StopNow"}]'
    with pytest.raises(SystemExit) as stopped:
        trainer.main(arguments(data, run, "--ckpt_path=last", stop, steps=100_000))
    assert stopped.value.code == 128 + signal.SIGTERM
    output = capsys.readouterr().out
    assert re.search(rf"{run}: an earlier run, process \d+ on \S+, started \S+, was cut off", output)
    return output


class StopNow(Callback):
    def on_train_batch_start(self, *args) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_refused_run_leaves_no_folder(data, tmp_path, capsys):
    fails(capsys, arguments(data, tmp_path / "run", "--trainer.max_steps=0"))
    assert not (tmp_path / "run").exists()


FOREIGN = ("logs/notes.txt", "logs/version_7/metrics.csv", "checkpoints/resnet.ckpt", "best/cat.png", "checkpoints/a/b")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(data, tmp_path, capsys):
    run = tmp_path / "run"
    for name in FOREIGN:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    before = files(run)
    trainer.main(arguments(data, run, "--overwrite=true", steps=3))  # before it ever held a run
    assert before.items() <= files(run).items()
    first = files(run)
    (run / "best/threshold.json").write_text("{}")  # what verbs leave beside the model
    (run / "logs/version_8/checkpoints").mkdir()
    (run / "logs/version_8/checkpoints/epoch=0-step=3.ckpt").write_text("a ModelCheckpoint's")
    shutil.copytree(run / "logs/version_8", run / "logs/version_9")  # as `validate` leaves it
    (run / "logs/version_9/run.json").unlink()
    capsys.readouterr()
    trainer.main(arguments(data, run, "--overwrite=true", "--data.val=null", steps=2))
    after = files(run)
    assert {name: after[name] for name in FOREIGN} == before
    written = {name for name in after if name not in FOREIGN}
    assert written == {name for name in first if name not in FOREIGN} - {"checkpoints/best.ckpt"}
    kept = re.search(r"also holds what no run wrote, which stays: (.*)", capsys.readouterr().out)[1]
    assert set(kept.split(", ")) == set(FOREIGN)


@pytest.mark.parametrize("text", ["model: {lr: 1}", "model: resnet", "- model", "model: [", "model: null", "\xff"])
def test_a_log_whose_settings_are_another_programs_is_no_runs(tmp_path, text):
    log = tmp_path / "logs/version_0"
    log.mkdir(parents=True)
    (log / "config.yaml").write_bytes(text.encode("latin-1"))
    assert run_settings.results(tmp_path) == []
    (log / "config.yaml").write_text("model: {clip: {embed_dim: 16}}")
    assert run_settings.results(tmp_path) == [log / "config.yaml"]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "name, path",
    [
        ("model.start_from", "best"),
        ("model.start_from", "checkpoints/best.ckpt"),
        ("model.teacher", "best/../best/"),
        ("ckpt_path", "logs/version_0/checkpoints/epoch=0-step=2.ckpt"),
    ],
)
def test_a_run_that_reads_what_it_would_overwrite_is_refused(data, tmp_path, capsys, name, path):
    run = tmp_path / "run"
    trainer.main(arguments(data, run, steps=2))
    (run / "logs/version_0/checkpoints").mkdir()
    shutil.copyfile(run / "checkpoints/last.ckpt", run / "logs/version_0/checkpoints/epoch=0-step=2.ckpt")
    before = files(run)
    said = fails(capsys, arguments(data, run, "--overwrite=true", f"--{name}={run / path}"))
    assert f"{name} is '{run / path}', which --overwrite true would remove with the run in {run}; name another" in said
    assert files(run) == before


def test_a_run_that_is_overwritten_stays_until_the_new_one_begins(data, tmp_path, capsys):
    run = tmp_path / "run"
    for name in ("checkpoints/last.ckpt", "best/config.json", "report.html", "logs/version_0/run.json", *FOREIGN):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    before = files(run)
    class_path = "miniclip.training.zero_shot.ZeroShotEvaluation"
    missing = f'--trainer.callbacks=[{{"class_path": "{class_path}", "init_args": {{"data": "nowhere.csv"}}}}]'
    Overwriting(run).__enter__()  # and killed here
    assert not (run / "checkpoints/last.ckpt").exists()
    said = fails(capsys, arguments(data, run, "--overwrite=true", missing))
    assert "data 'nowhere.csv' is not there" in said  # found when callbacks are set up
    assert files(run) == before


@pytest.mark.parametrize(
    "folder, options, taken",
    [
        ("run/checkpoints", {"save_last": True}, "last.ckpt"),
        ("run/logs/../checkpoints", {"filename": "best"}, "best.ckpt"),
        ("link", {"save_last": "link"}, "last.ckpt"),
        (None, {"save_last": True}, "last.ckpt"),  # without a logger it is the run's own folder
        ("run/checkpoints", {"filename": "{step}"}, None),
        ("elsewhere", {"save_last": True, "filename": "best"}, None),
    ],
)
def test_a_callback_that_would_write_over_the_runs_own_checkpoints_is_refused(tmp_path, folder, options, taken):
    (tmp_path / "link").symlink_to("run/checkpoints")
    callback = ModelCheckpoint(folder and tmp_path / folder, **options)
    settings = SimpleNamespace(callbacks=[callback], logger=False, max_time=None)
    refusal = pytest.raises(ValueError, match=f"ModelCheckpoint, whose file would be .*run/checkpoints/{taken}, which")
    with refusal if taken else nullcontext():
        run_settings.refuse_callbacks(settings, tmp_path / "run")
    settings.logger = None
    if folder is None:
        run_settings.refuse_callbacks(settings, tmp_path / "run")


class KillDataWorkers(Callback):
    def on_train_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == 3:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)


def test_a_killed_data_worker_ends_the_run_with_the_command_that_resumes_it(data, tmp_path, capsys):
    kill = '--trainer.callbacks=[{"class_path": "test_run_folder.KillDataWorkers"}]'
    with pytest.raises(SystemExit) as stopped:
        trainer.main(arguments(data, tmp_path / "run", kill, "--save_every_n_steps=1", steps=200))
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "a worker that reads data was killed by SIGKILL" in message
    assert "last.ckpt is the last checkpoint" in message
    assert "--ckpt_path last" in message
    assert "Traceback" not in message


@pytest.fixture
def room() -> Iterator[None]:
    """Whatever a test limits, the next one has its disk back."""
    yield
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_tears_no_row_of_the_log_and_loses_none(tmp_path, capsys, room):
    log = TableLogger(tmp_path, name="logs")
    table = tmp_path / "logs/version_0/metrics.csv"
    for step in range(2000):
        log.log_metrics({"train/loss": 1 / (step + 1)}, step)
    log.save()
    whole = table.read_bytes()
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for room_left, row in ((6, {"train/loss": 0.5}), (6, {"val/loss": 0.25}), (-100, {"val/loss": 0.125})):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room_left, hard))
        log.log_metrics(row, step := step + 1)
        log.save()
        assert table.read_bytes() == whole
    assert capsys.readouterr().err.count("warning: the log could not be written") == 3
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.log_metrics({"train/loss": 2.0}, step + 1)
    log.save()
    rows = metrics(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(2004))
    assert [row["train/loss"] for row in rows[-4:]] == ["0.5", "", "", "2.0"]
    assert [row["val/loss"] for row in rows[-4:]] == ["", "0.25", "0.125", ""]
    assert [float(row["train/loss"]) for row in rows[:2000]] == [1 / (step + 1) for step in range(2000)]
    assert len(list(csv.reader(table.open()))) == 2005
    assert [path.name for path in table.parent.iterdir()] == ["metrics.csv"]
