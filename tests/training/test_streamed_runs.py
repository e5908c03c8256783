"""Runs on tars without an index: killed and gone on with, on ranks that torchrun starts, and what they refuse."""

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import pack_folder, write_pairs
from pytorch_lightning.callbacks import Callback
from runs import ROOT, TINY, fails

from miniclip.commands.train import main

NUM_PAIRS, PER_TAR, BATCH_SIZE, STEPS, SAVE_EVERY = 96, 12, 12, 12, 3


class Diary(Callback):
    """Notes the keys of every batch trained on, and ends its process without a word after one step."""

    def __init__(self, path: str, last_step: int = 0) -> None:
        self.path, self.last_step = path, last_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        with open(f"{self.path}.{trainer.global_rank}", "a") as file:
            file.write(json.dumps([trainer.global_step, batch.keys]) + "\n")
        if trainer.global_step == self.last_step and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGKILL)


def seen(path: Path, ranks: int, until: int = STEPS) -> dict[int, list[str]]:
    """The keys of each step, of all ranks."""
    steps: dict[int, list[str]] = {}
    for rank in range(ranks):
        for line in Path(f"{path}.{rank}").read_text().splitlines():
            step, keys = json.loads(line)
            if step <= until:
                steps.setdefault(step, []).extend(keys)
    return steps


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """train/: eight tars and nothing else; val/: shards with their index."""
    folder = tmp_path_factory.mktemp("pairs")
    for part, count in (("train", NUM_PAIRS), ("val", 8)):
        write_pairs(folder / "src" / part, count, captions=2, size=(20, 16))
        pack_folder(folder / "src" / part, folder / "packed" / part, samples_per_shard=PER_TAR)
    (folder / "train").mkdir()
    for tar in (folder / "packed/train").glob("*.tar"):
        shutil.copy(tar, folder / "train")
    shutil.move(folder / "packed/val", folder / "val")
    return folder


def train(pairs: Path, run: Path, diary: Path, *more: str, ranks: int = 1, workers: int = 2, last_step: int = 0) -> Any:
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"] if ranks > 1 else []
    callback = {"class_path": f"{Diary.__module__}.Diary", "init_args": {"path": str(diary), "last_step": last_step}}
    command = [
        sys.executable,
        *launcher,
        str(ROOT / "train.py"),
        "fit",
        *TINY,
        f"--data.train={pairs}/train/{{00000..00007}}.tar",
        f"--data.val={pairs / 'val'}",
        "--data.order=stream",
        "--data.stream.shuffle=8",
        f"--data.batch_size={BATCH_SIZE}",
        f"--data.num_workers={workers}",
        "--model.micro_batch_size=4",
        f"--trainer.default_root_dir={run}",
        f"--trainer.max_steps={STEPS}",
        f"--trainer.devices={ranks}",
        f"--trainer.strategy={'ddp' if ranks > 1 else 'auto'}",
        f"--save_every_n_steps={SAVE_EVERY}",
        f"--trainer.callbacks={json.dumps([callback])}",
        *more,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun passes it on to its processes
        out, err = process.communicate()
    print(out, err)
    return SimpleNamespace(status=process.returncode, out=out)


@pytest.mark.long
@pytest.mark.timeout(1300)
def test_a_run_of_two_ranks_that_is_killed_goes_on_with_one_and_repeats_only_what_it_announces(pairs, tmp_path):
    killed = train(pairs, tmp_path / "run", tmp_path / "first", ranks=2, workers=1, last_step=5)
    assert killed.status != 0
    assert "2 readers (1 for each of 2 processes) share 8 tars" in killed.out
    assert "An epoch is the whole run of 12 steps" in killed.out

    resumed = train(pairs, tmp_path / "run", tmp_path / "second", "--ckpt_path=last", workers=1)
    assert resumed.status == 0
    announced = int(resumed.out.split("with 1 instead of 2 readers, so ")[1].split(" samples")[0])
    assert 0 < announced <= 2 * PER_TAR  # the bound: what each reader can have taken from a block, here of one tar
    first, second = seen(tmp_path / "first", 2, until=SAVE_EVERY), seen(tmp_path / "second", 1)
    assert list(first) == [1, 2, 3]
    assert list(second) == list(range(4, STEPS + 1))
    assert all(len(keys) == BATCH_SIZE for keys in [*first.values(), *second.values()])

    # The rest of the first pass is what was not taken, and what was announced.
    rest = [key for step in second for key in second[step]][: NUM_PAIRS - 3 * BATCH_SIZE + announced]
    times = Counter([key for keys in first.values() for key in keys] + rest)
    assert len(times) == NUM_PAIRS
    assert sum(times.values()) - NUM_PAIRS == announced
    scores = (tmp_path / "run/logs/version_1/metrics.csv").read_text()
    assert "val/retrieval_r1" in scores


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_goes_on_with_as_many_readers_to_the_same_bits(pairs, tmp_path, ranks):
    assert train(pairs, tmp_path / "whole", tmp_path / "straight", ranks=ranks).status == 0
    for number, last_step in enumerate((5, 8, 0)):
        more = ["--ckpt_path=last"] if number else []
        done = train(pairs, tmp_path / "run", tmp_path / str(number), *more, ranks=ranks, last_step=last_step)
        assert (done.status == 0) == (last_step == 0)
    expected = seen(tmp_path / "straight", ranks)
    for number, (start, stop) in enumerate(((0, 3), (3, 6), (6, STEPS))):
        found = seen(tmp_path / str(number), ranks, until=stop)
        assert found == {step: expected[step] for step in range(start + 1, stop + 1)}
    left, right = (
        torch.load(tmp_path / run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("whole", "run")
    )
    assert all(torch.equal(left[name], right[name]) for name in left)


def streamed(pairs: Path, run: Path, *more: str) -> list[str]:
    return [
        "fit",
        *TINY,
        f"--data.train={pairs}/train/{{00000..00007}}.tar",
        "--data.order=stream",
        f"--trainer.default_root_dir={run}",
        *more,
    ]


@pytest.mark.parametrize(
    "more, words",
    [
        (["--trainer.max_steps=5", "--data.num_workers=9"], ["8 tars", "9 readers", "data.num_workers to 8"]),
        (["--trainer.max_epochs=2"], ["no index", "trainer.max_steps", "data.stream.epoch_samples"]),
        (["--trainer.max_steps=5", "--data.weights=[1.0]"], ["data.weights", "data.order stream"]),
        (["--trainer.max_steps=5", "--data.order=steam"], ["data.order", "steam"]),
    ],
)
def test_what_a_stream_cannot_do_ends_before_the_first_step_in_one_sentence(pairs, tmp_path, capsys, more, words):
    message = fails(capsys, streamed(pairs, tmp_path / "run", *more))
    assert all(word in message for word in words), message
    assert "Traceback" not in message
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_short_stream_prints_no_warning_of_lightnings_about_what_is_as_it_should_be(pairs, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(streamed(pairs, tmp_path / "run", "--trainer.max_steps=2", "--data.num_workers=2"))
    words = ("has `__len__` defined", "smaller than the logging interval")
    assert not [each for each in caught if any(word in str(each.message) for word in words)]
