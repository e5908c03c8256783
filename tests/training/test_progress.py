"""What a run tells: its metrics beside numbers found another way, its log however it ends, and its page."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import warm
from browser import WIDTHS, log
from helpers import tiny_clip, tiny_config
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.plugins import MixedPrecision
from runs import StopAt, arguments, command, fails, metrics, state
from torch.utils._python_dispatch import TorchDispatchMode

from miniclip.commands import main as cli
from miniclip.commands import train as trainer
from miniclip.common.watch import Watch
from miniclip.config import TextConfig, VisionConfig
from miniclip.data.module import PairDataModule
from miniclip.data.pack import pack
from miniclip.data.pairs import Batch
from miniclip.data.sample_files import Packing
from miniclip.data.sources import read_pairs
from miniclip.reports.run_page import differences, numbers, observations, write_page
from miniclip.reports.runs import Run, read_run, run_curves
from miniclip.training import measuring as device
from miniclip.training.measuring import RejectedSamples, RunMetrics, StepCost, StepMetrics
from miniclip.training.optimizer import OptimizerConfig, learning_rate_factor
from miniclip.training.progress import Stalls
from miniclip.training.step import CLIPTraining
from miniclip.weights.facts import forward_flops

SGD = {"kind": "timm", "timm_name": "sgd", "lr": 0.01, "warmup": 0.0}
EVERY_STEP = {
    "loss", "chance", "accuracy", "accuracy_image_to_text", "accuracy_text_to_image", "logit_scale", "grad_norm_image",
    "grad_norm_text", "lr", "images_per_s", "data_wait", "tflops", "mfu", "memory_gb", "samples", "rejected",
    "truncated",
}  # fmt: skip


def rows(run: Path, version: int = 0) -> list[dict[str, float]]:
    """Of training, not of validation."""
    return [{n: float(v) for n, v in row.items() if v} for row in metrics(run, version) if row["train/loss"]]


def with_callback(kind: type, **options: object) -> str:
    where = {"class_path": f"{kind.__module__}.{kind.__name__}", "init_args": options}
    return f"--trainer.callbacks={json.dumps([where])}"


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


class NormsTheLongWay(Callback):
    """Every gradient of a tower in one vector, at each step; in a file as the callback is made from its name."""

    def __init__(self, out: str) -> None:
        self.out, self.norms = Path(out), []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        towers = (pl_module.clip.visual, pl_module.clip.text)
        vectors = [torch.cat([p.grad.flatten() for p in tower.parameters()]) for tower in towers]
        self.norms.append([float((vector.double() ** 2).sum().sqrt()) for vector in vectors])
        self.out.write_text(json.dumps(self.norms))


def test_every_logged_step_has_every_metric_and_those_with_an_oracle_are_right(data, tmp_path):
    more = ["--model.optimizer.kind=muon", "--model.optimizer.muon_lr=0.05", "--trainer.gradient_clip_val=0.001"]
    norms = tmp_path / "norms.json"
    trainer.main(arguments(data, tmp_path / "run", *more, with_callback(NormsTheLongWay, out=str(norms)), steps=6))
    found = rows(tmp_path / "run")
    peak = read_run(tmp_path / "run").record["peak_tflops"]
    assert len(found) == 6
    for step, (row, (image, text)) in enumerate(zip(found, json.loads(norms.read_text()), strict=True)):
        assert {f"train/{name}" for name in EVERY_STEP | {"lr_muon"}} <= row.keys()
        assert (row["step"], row["train/samples"]) == (step, 12 * (step + 1))
        both = row["train/accuracy_image_to_text"], row["train/accuracy_text_to_image"]
        assert row["train/accuracy"] == pytest.approx(sum(both) / 2)
        assert row["train/grad_norm_image"] == pytest.approx(image, rel=1e-5)
        assert row["train/grad_norm_text"] == pytest.approx(text, rel=1e-5)
        factor = learning_rate_factor(step, 6, round(OptimizerConfig().warmup * 6))
        assert row["train/lr"] == pytest.approx(0.01 * factor)
        assert row["train/lr_muon"] == pytest.approx(0.05 * factor)
        assert row["train/mfu"] == pytest.approx(row["train/tflops"] / peak, rel=1e-5)
        assert 0.05 < row["train/memory_gb"] < 50


def fit(folder: Path, callbacks: list[Callback], module: CLIPTraining | None = None, **options: object) -> pl.Trainer:
    """Without the command line, in this process."""
    pl.seed_everything(0, verbose=False)
    loader = PairDataModule(str(folder / "shards/train"), None, None, 12, 0, image_size=16, context_length=16)
    made = pl.Trainer(
        max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        enable_model_summary=False, use_distributed_sampler=False, callbacks=callbacks, **options,
    )  # fmt: skip
    made.fit(module or CLIPTraining(tiny_config()), loader)
    return made


@pytest.mark.parametrize(
    "options, message",
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches is 2; .* Raise data.batch_size"),
        (
            {"callbacks": [GradientAccumulationScheduler({4: 3})]},
            "accumulate_grad_batches is 3; .* Raise data.batch_size",
        ),
        ({"limit_train_batches": 4}, "limit_train_batches is 4; an epoch is every sample once"),
        ({"limit_train_batches": 1}, "limit_train_batches is 1; an epoch is every sample once"),
        ({"limit_train_batches": 0.5}, "limit_train_batches is 0.5; an epoch is every sample once"),
        ({"overfit_batches": 2}, "limit_train_batches is 2; .*overfit_batches"),
    ],
)
def test_a_trainer_of_ones_own_whose_steps_are_not_the_batches_is_refused(data, options, message):
    with pytest.raises(ValueError, match=message):
        fit(data, **{"callbacks": [], **options})


def test_gradient_norms_are_those_of_unscaled_gradients(data):
    """Half precision scales the loss, here by 1024, so that small gradients do not become zero."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    half = fit(data, [StepMetrics()], log_every_n_steps=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    full = fit(data, [StepMetrics()], log_every_n_steps=1)
    for name in ("train/grad_norm_image", "train/grad_norm_text"):
        assert float(half.callback_metrics[name]) == pytest.approx(float(full.callback_metrics[name]), rel=0.1)


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


class WatchedSteps(StepMetrics):
    def __init__(self) -> None:
        self.asked: list[int] = []

    def on_before_optimizer_step(self, *everything) -> None:
        with Operations() as operations:
            super().on_before_optimizer_step(*everything)
        self.asked.append(operations.count)


class WatchedRun(RunMetrics):
    def __init__(self) -> None:
        self.asked: list[int] = []

    def on_train_batch_end(self, *everything) -> None:
        with Operations() as operations:
            super().on_train_batch_end(*everything)
        self.asked.append(operations.count)


def test_measuring_costs_the_device_nothing_at_steps_that_are_not_logged(data):
    steps, run = WatchedSteps(), WatchedRun()
    fit(data, [steps, run], log_every_n_steps=2)
    for asked in (steps.asked, run.asked):
        assert asked[::2] == [0, 0]
        assert min(asked[1::2]) > 0


def spoilt(data: Path, folder: Path) -> Path:
    """The training pairs again, of which one can't be read and one has a caption of 30 words."""
    copy = folder / "pairs"
    copy.mkdir()
    for path in (data / "train").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    for number in range(10):
        (copy / f"red{number}.txt").write_text("very " * 30 + "red")
    pack(read_pairs(copy), folder / "shards", source="x", packing=Packing(samples_per_shard=15))
    with open(folder / "shards/00000.tar", "r+b") as tar:
        tar.seek(tar.read().index(b"\x89PNG"))
        tar.write(b"spoilt!!")
    return folder / "shards"


def test_two_processes_train_and_tell_what_one_does(data, tmp_path):
    shards = spoilt(data, tmp_path)
    found = {}
    for devices in (1, 2):
        run = tmp_path / f"run{devices}"
        more = [f"--trainer.devices={devices}", f"--trainer.strategy={'auto' if devices == 1 else 'ddp'}"]
        more += ["--trainer.precision=64-true", "--model.max_rejected=0.5", f"--data.train={shards}"]
        more += ["--data.captions.order=first"]
        if devices == 1:
            trainer.main(arguments(data, run, *more, steps=4))
        else:
            done = warm.run(command(data, run, *more, steps=4))
            assert done.returncode == 0, done.stdout + done.stderr
        found[devices] = rows(run)
    measured = {f"train/{name}" for name in ("images_per_s", "data_wait", "tflops", "mfu", "memory_gb")}
    assert len(found[1]) == 4
    for one, two in zip(found[1], found[2], strict=True):
        assert one.keys() == two.keys() >= {f"train/{name}" for name in EVERY_STEP}
        for name in one.keys() - measured:
            assert two[name] == pytest.approx(one[name], rel=1e-6), name
    assert found[2][-1]["train/rejected"] == 1
    assert found[2][-1]["train/truncated"] >= 9
    one, two = state(tmp_path / "run1"), state(tmp_path / "run2")
    for name, expected in one.items():
        difference = (two[name] - expected).abs().max() / expected.abs().max()
        assert difference < 1e-8, name
    record = read_run(tmp_path / "run2").record
    assert record["world_size"] == 2
    assert record["device"].startswith("2 × CPU")


# ---------------------------------------------------------------------------------------------------------------------
# The cost of a step


def test_the_cost_of_a_step_by_hand():
    """One block each, so of every block only the pooled token goes through queries, output and MLP."""
    vision = VisionConfig(image_size=16, patch_size=8, width=16, layers=1, head_width=8)
    text = TextConfig(context_length=16, width=16, layers=1, head_width=8)
    clip = tiny_clip(vision=vision, text=text)
    D = E = 16

    def block(N: int) -> int:
        return 2 * N * D * 2 * D + 2 * D * D + 2 * (2 * N * D) + 2 * D * D + 2 * (2 * D * 4 * D)

    image = 2 * 4 * (3 * 8 * 8) * D + block(5) + 2 * D * E  # four patches and the class token
    texts = {length: block(length) + 2 * D * E for length in (7, 12)}
    expected = 3 * (5 * image + 3 * texts[7] + 2 * texts[12])
    assert StepCost(clip).flops({7: 3, 12: 2}) == expected
    clip.visual.requires_grad_(False)
    assert StepCost(clip).flops({7: 3, 12: 2}) == expected - 2 * 5 * image


@pytest.mark.parametrize("context_length", [2, 16])
def test_the_cost_of_every_length_of_text_is_what_the_tower_takes(context_length):
    clip = tiny_clip(text=TextConfig(context_length=context_length, width=16, layers=3, head_width=8))
    with torch.device("meta"):
        tower = type(clip)(clip.config).eval().text
    cost = StepCost(clip)
    for length in range(1, context_length + 1):
        tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
        assert cost.flops({length: 2}) - cost.flops({1: 2}) == 6 * (
            forward_flops(tower, tokens) - forward_flops(tower, tokens[:, :1])
        )


def test_a_locked_trunk_of_timms_costs_its_forward_pass_alone():
    vision = VisionConfig(kind="timm", image_size=32, timm_model="test_resnet", timm_projection="linear")
    clip = tiny_clip(vision=vision)
    trained = StepCost(clip).flops({7: 1})
    clip.visual.trunk.requires_grad_(False)
    assert trained - StepCost(clip).flops({7: 1}) == 2 * forward_flops(clip.visual, torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    "name, arithmetic, tflops",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A100-SXM4-40GB", "tf32", 156),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("Tesla T4", "fp16", 65),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA L40S", "bf16", 362),
        ("Tesla T4", "bf16", None),  # it has none
        ("NVIDIA A10G", "bf16", None),  # neither an A10
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),  # nor a 4090
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),  # a seventh of one
        ("NVIDIA GH200 480GB", "bf16", None),
        ("CPU", "fp32", None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_data_sheet(name, arithmetic, tflops):
    found = device.data_sheet_flops(name, arithmetic)
    assert found == (None if tflops is None else tflops * 1e12)


@pytest.mark.parametrize("precision, arithmetic", [("32-true", "fp32"), ("bf16-mixed", "bf16"), ("64-true", "fp64")])
def test_the_peak_of_a_cpu_is_measured_in_the_arithmetic_of_training(precision, arithmetic):
    found = device.peak(torch.device("cpu"), precision)
    assert found.source == f"CPU, {arithmetic}, measured by a matrix product"
    assert 1e8 < found.flops < 1e14


# ---------------------------------------------------------------------------------------------------------------------
# However it ends


def test_a_run_that_sigterm_stops_has_all_its_rows_and_a_page_and_a_resumed_one_is_joined(data, tmp_path, capsys):
    run = tmp_path / "run"
    args = command(data, run, steps=30)
    process = warm.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("step 5/30"):
            os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, said
    stopped_at = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert [row["step"] for row in rows(run)] == list(range(stopped_at))
    assert f"Report: {run / 'report.html'}" in said
    page = (run / "report.html").read_text()
    assert f"stopped by SIGTERM, {stopped_at} of 30 steps" in page
    trainer.main(arguments(data, run, "--ckpt_path=last", steps=30))
    said = capsys.readouterr().out
    best = read_run(run).best()
    assert best is not None
    told = re.search(r"Best val/retrieval_r1: (\S+) at step (\d+)\. Trained model: (\S+) .*Report: (\S+)\n", said)
    assert told is not None, said
    assert (float(told[1]), int(told[2])) == (pytest.approx(best[2], abs=1e-4), best[1])
    assert (told[3], told[4]) == (str(run / "best"), str(run / "report.html"))
    joined = read_run(run)
    assert [step for step, _ in joined.curves["train/loss"]] == list(range(30))
    assert [start["first_step"] for start in joined.starts] == [0, stopped_at]
    assert [start["status"] for start in joined.starts] == ["stopped by SIGTERM", "finished"]
    assert "in 2 parts" in (run / "report.html").read_text()


@pytest.mark.parametrize("stop", [*(pytest.param(stop, marks=pytest.mark.long) for stop in (3, 4)), 7])
def test_rows_stay_at_the_same_steps_after_a_resumption(data, tmp_path, stop):
    """An epoch is three steps: one is stopped at its end, one amid one after a row and one before."""
    run = tmp_path / "run"
    more = ["--trainer.log_every_n_steps=2", "--data.val=null"]
    with pytest.raises(SystemExit):
        trainer.main(arguments(data, run, *more, with_callback(StopAt, step=stop), steps=12))
    trainer.main(arguments(data, run, *more, "--ckpt_path=last", steps=12))
    found = rows(run) + rows(run, 1)
    assert [(row["step"], row["train/samples"]) for row in found] == [(n - 1, 12 * n) for n in (2, 4, 6, 8, 10, 12)]


@pytest.mark.long
def test_rows_stay_at_the_same_steps_when_a_finished_run_is_made_longer(data, tmp_path):
    run = tmp_path / "run"
    more = ["--trainer.log_every_n_steps=2", "--data.val=null"]
    trainer.main(arguments(data, run, *more, steps=3))
    trainer.main(arguments(data, run, *more, "--ckpt_path=last", steps=8))
    found = rows(run) + rows(run, 1)
    assert [(row["step"], row["train/samples"]) for row in found] == [(n - 1, 12 * n) for n in (2, 3, 4, 6, 8)]


@pytest.mark.long
def test_the_rate_of_an_optimiser_of_timms_with_momentum_is_not_muons(data, tmp_path):
    trainer.main(arguments(data, tmp_path / "run", f"--model.optimizer={json.dumps(SGD)}", "--data.val=null", steps=1))
    (row,) = rows(tmp_path / "run")
    assert row["train/lr"] == pytest.approx(0.01)
    assert "train/lr_muon" not in row


WAITS = re.compile(r" since step 1\. It is at\n( .*\n)* .*test_progress\.py:\d+ on_train_batch_start\n")


class Waits(Callback):
    """In the second step, for it to be told that it does."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == 1:
            while not WAITS.search(sys.stderr.getvalue()):  # type: ignore[attr-defined]
                time.sleep(0.05)


def test_a_step_that_does_not_end_is_told_with_the_place_it_is_at(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Stalls, "silence_s", 0.1)
    monkeypatch.setattr(sys, "stderr", said := io.StringIO())
    before = set(threading.enumerate())
    trainer.main(arguments(data, tmp_path / "run", with_callback(Waits), steps=2))
    assert WAITS.search(said.getvalue())
    for thread in set(threading.enumerate()) - before:
        if thread.name == "watch":
            thread.join(300)
            assert not thread.is_alive()


def test_what_takes_long_is_told_at_once_as_long_twice_as_long_and_four_times():
    told: list[float] = []
    is_enough = threading.Event()

    def tell(seconds: float) -> None:
        told.append(seconds)
        if len(told) == 3:
            is_enough.set()

    with Watch(tell, silence_s=0.1) as watch:
        watch.begin()
        assert is_enough.wait(60)
    assert told[0] >= 0.1
    assert told[1] >= 2 * told[0]
    assert told[2] >= 2 * told[1]


def test_a_watch_is_silent_about_what_has_come_and_waits_twice_as_long_as_anything_has_taken():
    told, looks = [], threading.Semaphore(0)

    class Observed(Watch):
        """Lets it be known when its thread has looked."""

        @property
        def _began(self) -> float | None:
            looks.release()
            return self.since

        @_began.setter
        def _began(self, since: float | None) -> None:
            self.since = since

    def look(times: int) -> None:
        while looks.acquire(blocking=False):
            pass
        for _ in range(times):
            assert looks.acquire(timeout=300)

    with Observed(told.append, silence_s=0.02) as watch:
        watch.begin()
        watch.end()
        look(10)
        assert not told
        watch._longest = 1000.0
        watch.begin()
        look(10)
        assert not told


def test_a_run_that_fails_has_a_page_that_says_so(data, tmp_path, capsys):
    fails(capsys, arguments(data, tmp_path / "run", "--model.optimizer.lr=1e30", steps=20))
    record = read_run(tmp_path / "run").record
    assert re.fullmatch(r"failed: the loss at step \d+ is nan.*", record["status"])
    assert "the weights were not touched" in (tmp_path / "run/report.html").read_text()


def test_the_table_is_written_beside_any_other_log(data, tmp_path):
    run = tmp_path / "run"
    more = ["--trainer.logger=TensorBoardLogger", f"--trainer.logger.save_dir={tmp_path / 'board'}"]
    trainer.main(arguments(data, run, *more, "--trainer.enable_progress_bar=false", steps=3))
    assert len(rows(run)) == 3
    assert list((tmp_path / "board").rglob("events.out.*"))
    assert (run / "report.html").is_file()
    assert (run / "logs/version_0/config.yaml").is_file()


def test_without_a_log_there_is_no_page_and_overwriting_removes_an_old_one(data, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.html").write_text("of another run")
    trainer.main(arguments(data, run, "--trainer.logger=false", "--overwrite=true", steps=2))
    assert not (run / "report.html").exists()
    assert "Report" not in capsys.readouterr().out


@pytest.mark.long
def test_rejected_samples_are_counted_over_resumptions_and_listed_on_the_page(data, tmp_path):
    run, more = tmp_path / "run", [f"--data.train={spoilt(data, tmp_path)}", "--model.max_rejected=0.5"]
    with pytest.raises(SystemExit):  # an epoch is three steps and a third
        trainer.main(arguments(data, run, *more, with_callback(StopAt, step=4), steps=8))
    trainer.main(arguments(data, run, *more, "--ckpt_path=last", steps=8))
    curve = dict(run_curves(run)["train/rejected"])
    assert 2 <= curve[7] <= 3
    assert list(curve.values()) == sorted(curve.values())
    page = (run / "report.html").read_text()
    assert "00000.tar:" in page
    assert f"{curve[7]:.0f} samples" in page


# ---------------------------------------------------------------------------------------------------------------------
# From a folder to numbers


def test_what_was_trained_once_more_counts_as_the_last_time_and_counts_go_on(tmp_path):
    log(tmp_path, "version_0", "step,train/loss,train/rejected,val/loss", "0,5,0,", "1,4,2,", "2,3,5,", "2,,,9")
    log(tmp_path, "version_1", "step,train/loss,train/rejected,val/loss", "2,2.5,1,", "3,2,1,", "3,,,7")
    with open(tmp_path / "logs/version_1/metrics.csv", "a") as file:
        file.write("4,1")  # of 1.75, and the process was killed here
    assert run_curves(tmp_path) == {
        "train/loss": [(0, 5.0), (1, 4.0), (2, 2.5), (3, 2.0)],
        "train/rejected": [(0, 0.0), (1, 2.0), (2, 3.0), (3, 3.0)],
        "val/loss": [(3, 7.0)],
    }


def test_a_log_that_no_start_of_the_run_recorded_is_none_of_its_own(tmp_path):
    """`validate` logs in the run's folder, at step 0, after which no curve was left."""
    log(tmp_path, "version_0", "step,val/loss", "0,5", "1,4")
    (tmp_path / "logs/version_0/run.json").write_text("{}")
    log(tmp_path, "version_1", "step,val/loss", "0,9")
    assert run_curves(tmp_path) == {"val/loss": [(0, 5.0), (1, 4.0)]}


def made_up(**curves: list[float]) -> Run:
    points = {name.replace("__", "/"): list(enumerate(values)) for name, values in curves.items()}
    record = {"status": "finished", "step": 4, "batch_size": 100, "monitor": "val/zero_shot_acc1", "seconds": 4000}
    return Run("runs/x", points, ({**record, "seconds": 200}, record), "")


def test_the_best_is_among_scores_of_the_same_kind():
    """Step 2 has the highest score, on other pairs than the last start's, which began at step 2 (counted from 0)."""
    run = made_up(val__zero_shot_acc1=[0.5, 0.9, 0.6, 0.7])
    assert run.best() == ("val/zero_shot_acc1", 2, 0.9)
    first, last = ({**start, "first_step": step} for start, step in zip(run.starts, (0, 2), strict=True))
    for name, before, now in (("validation_pairs", "a", "b"), ("monitor", "val/loss", "val/zero_shot_acc1")):
        other = dataclasses.replace(run, starts=({**first, name: before}, {**last, name: now}))
        assert other.best() == ("val/zero_shot_acc1", 4, 0.7)
    for before, now, best in (("a", "b", (4, 0.7)), ("a", "a", (2, 0.9))):  # whatever the pairs
        kinds = ({"labelled_images": before, "validation_pairs": "c"}, {"labelled_images": now})
        other = dataclasses.replace(run, starts=({**first, **kinds[0]}, {**last, "validation_pairs": "d", **kinds[1]}))
        assert other.best() == ("val/zero_shot_acc1", *best)
    same = dataclasses.replace(run, starts=({**first, "validation_pairs": "a"}, {**last, "validation_pairs": "a"}))
    assert same.best() == run.best()
    unknown = dataclasses.replace(run, starts=(first, {**last, "validation_pairs": "a"}))
    assert unknown.best() == run.best()
    # Two starts of before labelled images were recorded, and then one that records them.
    for before, best in (("a", (4, 0.7)), ("b", (2, 0.9))):
        newest = {**last, "first_step": 3, "labelled_images": "x", "validation_pairs": "b"}
        starts = ({**first, "validation_pairs": before}, {**last, "validation_pairs": "b"}, newest)
        assert dataclasses.replace(run, starts=starts).best() == ("val/zero_shot_acc1", *best)


def test_the_best_by_a_metric_of_steps_is_its_last_value_at_a_validation():
    """Logged at each second step, validated at 3, 5 and 8: the values there are 4, 2 and 3; the least, 1, is none."""
    run = made_up()
    record = {**run.record, "monitor": "train/loss", "monitor_mode": "min"}
    loss = [(1, 4.0), (3, 2.0), (5, 1.0), (7, 3.0)]  # steps count from 0
    curves = {"train/loss": loss, "val/loss": [(2, 9.0), (4, 9.0), (7, 9.0)]}
    assert dataclasses.replace(run, starts=(record,), curves=curves).best() == ("train/loss", 5, 2.0)
    resumed = {**record, "monitor_mode": "max", "first_step": 2}  # nothing of it was logged by the validation at 3
    assert dataclasses.replace(run, starts=(resumed,), curves=curves).best() == ("train/loss", 8, 3.0)
    diverged = {**curves, "train/loss": [*loss[:3], (7, math.nan)]}
    assert dataclasses.replace(run, starts=(record,), curves=diverged).best() == ("train/loss", 5, 2.0)
    assert dataclasses.replace(run, starts=(record,), curves={"train/loss": loss}).best() is None


def test_numbers_of_a_run():
    run = made_up(
        train__loss=[4, 3, 2.5], train__chance=[4.6] * 3, val__zero_shot_acc1=[0.1, 0.7, math.nan, 0.6],
        train__images_per_s=[10, 30, 2000], train__memory_gb=[1.5, 2.25, 2], train__rejected=[0, 1, 1],
    )  # fmt: skip
    found = {number.label: (number.value, number.note) for number in numbers(run)}
    assert found["best score"] == ("70.0 %", "zero-shot top-1, step 2")
    assert found["loss at the end"] == ("2.500", "chance 4.60")
    assert found["samples seen"] == ("400", "")
    assert found["duration"] == ("1 h 10 min", "in 2 parts")
    assert found["images/s"] == ("30", "median")
    assert found["memory"] == ("2.25 GB", "at most")
    assert found["rejected"] == ("1", "samples left out")


@pytest.mark.parametrize(
    "curves, words",
    [
        ({"train__loss": [4.6, 4.58], "train__chance": [4.6, 4.6]}, ["nothing was learnt"]),
        ({"train__loss": [4.6, 2.0], "train__chance": [4.6, 4.6]}, []),
        ({"val__zero_shot_acc1": [0.2, 0.8, 0.5]}, ["zero-shot top-1 was best at step 2, 80.0 %, and fell to 50.0 %"]),
        ({"val__zero_shot_acc1": [0.2, 0.8, 0.79]}, []),
        ({"train__logit_scale": [14, 100]}, ["logit scale reached the highest"]),
        ({"train__data_wait": [0.2, 0.3, 0.25]}, ["waited for data 25 % of the time"]),
        ({"train__rejected": [0, 3], "train__samples": [100, 200]}, ["3 samples (1.5 %) could not be read"]),
        ({"train__truncated": [0, 30], "train__samples": [100, 200]}, ["15 % of the captions were cut"]),
        (
            {"train__truncated": [0, 30], "train__samples": [100, 200], "train__rejected": [0, 50]},
            ["50 samples (25 %) could not be read", "20 % of the captions were cut"],
        ),
        ({"train__grad_norm_text": [1, math.inf, 2]}, ["1 of 3 logged gradient norms"]),
    ],
)
def test_what_stands_out_is_said(curves, words):
    found = observations(made_up(**curves))
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


def test_what_was_cut_is_a_share_of_the_captions_that_could_be_read(capsys):
    """Of two samples with two captions each, and one with one; a third of four could not be read."""
    seen = RejectedSamples()
    module = SimpleNamespace(max_rejected=1.0, clip=SimpleNamespace(context_length=5))
    tokens, ids = torch.ones(8, 5, dtype=torch.long), torch.arange(8)
    mask = torch.tensor([True, True, True, True, False, False, True, False])
    for batch in (
        Batch(torch.zeros(4, 3, 1, 1), tokens, mask, list("abcd"), ["c: no picture"], 2, ids),
        Batch(torch.zeros(4, 3, 1, 1), tokens, None, list("efgh"), [], 1, ids),
    ):
        seen.on_train_batch_start(None, module, batch, 0)
    seen.on_train_end(None, module)
    assert "3 of 13 captions were cut to 5 tokens." in capsys.readouterr().err
    assert (seen.num_seen, seen.num_rejected) == (8, 1)


def test_of_several_captions_an_image_all_count():
    run = made_up(train__truncated=[0, 30], train__samples=[100, 200], train__rejected=[0, 50])
    run = dataclasses.replace(run, settings={"data": {"captions": {"per_image": 2}}})
    assert "10 % of the captions were cut" in observations(run)[-1]


def test_the_settings_in_which_runs_differ():
    first, second = (
        dataclasses.replace(made_up(), settings={"model": {"optimizer": {"lr": lr}, "width": 3}, "seed": 1, **more})
        for lr, more in ((0.1, {}), (0.2, {"flip": True}))
    )
    assert differences([first, second]) == [("model.optimizer.lr", ["0.1", "0.2"]), ("flip", ["–", "True"])]


MISTAKES = [
    (["{tmp}/nowhere"], "nowhere is not the folder of a run: it has no logs/version_0"),
    (["{run}", "{run}"], "of several runs the page needs a name: --out HTML"),
    (["{run}", "--out", "{run}/there.html"], "there.html exists already; pass --overwrite to replace it"),
]


@pytest.mark.parametrize("args, message", MISTAKES, ids=[message[:20] for _, message in MISTAKES])
def test_a_mistake_in_asking_for_a_page_is_answered_in_words(tmp_path, capsys, args, message):
    run = tmp_path / "run"
    log(run, "version_0", "step,train/loss", "0,5")
    (run / "there.html").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report", *[arg.format(tmp=tmp_path, run=run) for arg in args]])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert (run / "there.html").read_text() == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# The page, in a browser


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "first"
    more = ["--trainer.val_check_interval=10", "--model.optimizer.kind=muon", "--trainer.check_val_every_n_epoch=null"]
    trainer.main(arguments(data, run, *more, steps=70))
    return run


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_a_run_shows_its_numbers_curves_and_settings(browser, finished, width):
    browser.open(finished / "report.html", width)
    browser.check()
    run = read_run(finished)
    shown = browser.js("return [...document.querySelectorAll('#numbers div')].map(d => d.innerText.split('\\n'))")
    assert [line[:2] for line in shown] == [[number.label, number.value] for number in numbers(run)]
    headings = browser.js("return [...document.querySelectorAll('#curves h3')].map(h => h.innerText)")
    assert headings == [
        "Contrastive loss", "In-batch accuracy, %", "Held-out scores, %", "Logit scale", "Gradient norm",
        "Learning rate, % of its peak", "Images per second", "Use of the device, %", "Memory, GB",
    ]  # fmt: skip
    assert "chance 2.48" in browser.text("#curves section")  # ln 12
    assert "finished, 70 of 70 steps" in browser.text("#facts")
    assert not browser.js("return document.querySelector('details').open")
    browser.js("document.querySelector('summary').click()")
    assert "kind: muon" in browser.text("details")
    browser.check()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_two_runs_lays_their_curves_over_each_other(browser, finished, tmp_path, width):
    other = tmp_path / "second"
    log(other, "version_0", "step,train/loss,train/chance,other/x", "0,2.5,2.48,1", "9,2.2,2.48,1")
    (other / "logs/version_0/config.yaml").write_text("model: {optimizer: {kind: adamw}}\n")
    cli.main(["report", str(finished), str(other), "--out", str(tmp_path / "both.html")])
    browser.open(tmp_path / "both.html", width)
    browser.check()
    assert browser.text("h1") == "first · second"
    assert browser.text("#legend").split() == ["first", "second"]
    table = browser.js("return [...document.querySelectorAll('#runs tr')].map(r => [...r.cells].map(c => c.innerText))")
    assert table[0] == ["", "first", "second"]
    (loss,) = [row for row in table if row[0] == "loss at the end"]
    assert loss[2] == "2.200 chance 2.48"
    lines = "return document.querySelector('#curves svg').querySelectorAll('path[style*=\"d0672f\"]').length"
    assert browser.js(lines) >= 1
    assert "model.optimizer.kind\tmuon\tadamw" in browser.text("#differences")


def test_a_page_can_be_made_before_anything_is_logged_and_refers_to_nothing_outside(tmp_path, finished):
    log(tmp_path, "version_0", "")
    write_page(tmp_path / "early.html", [tmp_path])
    assert "Nothing is logged yet" in (tmp_path / "early.html").read_text()
    page = re.sub(
        r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', "", (finished / "report.html").read_text(), flags=re.S
    )
    assert "http" not in page
    assert not re.search(r"<(script|link|iframe|object|embed|img)\b", page)
