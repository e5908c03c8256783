import dataclasses
import json
import math
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from PIL import Image
from pytorch_lightning import Callback
from runs import COLOURS, StopAt, arguments, command, fails, metrics, random_batch, state, validations

import miniclip
from miniclip.commands import run_settings
from miniclip.commands import train as trainer
from miniclip.data.module import PairDataModule
from miniclip.data.pack import pack
from miniclip.data.pairs import Batch
from miniclip.data.sources import read_pairs
from miniclip.evaluation.measures.ranking import recall_at_1
from miniclip.training.measuring import in_batch_accuracy
from miniclip.training.step import CLIPTraining


@pytest.mark.long
def test_a_clip_learns_to_name_colours_it_was_only_told_of_in_captions(data, tmp_path):
    zero_shot = (
        '--trainer.callbacks=[{"class_path": "miniclip.training.zero_shot.ZeroShotEvaluation", '
        f'"init_args": {{"data": "{data / "val.csv"}"}}}}]'
    )
    run = tmp_path / "run"
    trainer.main(arguments(data, run, zero_shot, "--monitor=val/zero_shot_acc1", steps=90))
    rows = metrics(run)
    first, last = (float(row["train/loss"]) for row in (rows[0], [r for r in rows if r["train/loss"]][-1]))
    # Three pairs of each colour in a batch of 12 can't be told apart, so ln 3 is as low as the loss can get.
    assert first > 0.9 * math.log(12)
    assert math.log(3) * 0.9 < last < 0.7 * math.log(12)
    scores = [float(row["val/zero_shot_acc1"]) for row in rows if row["val/zero_shot_acc1"]]
    assert max(scores) == 1.0
    model, preprocess = miniclip.load(run / "best", device="cpu")
    classifier = miniclip.zero_shot_classifier(model, list(COLOURS), ["a {} square", "{} paint"])
    picture = preprocess(Image.new("RGB", (40, 30), COLOURS["blue"]))
    with torch.no_grad():
        assert int((model.encode_image(picture[None], normalize=True) @ classifier).argmax()) == 2


def test_the_log_tells_loss_chance_accuracy_speed_and_data_wait(data, tmp_path):
    trainer.main(arguments(data, tmp_path / "run", steps=6))
    rows = [row for row in metrics(tmp_path / "run") if row["train/loss"]]
    assert len(rows) == 6
    assert float(rows[0]["train/chance"]) == pytest.approx(math.log(12))
    assert 0 <= float(rows[0]["train/accuracy"]) <= 1
    assert float(rows[0]["train/logit_scale"]) == pytest.approx(1 / 0.07, rel=1e-4)
    assert any(float(row["train/images_per_s"] or 0) > 0 for row in metrics(tmp_path / "run"))
    assert all(0 <= float(row["train/data_wait"] or 0) <= 1 for row in metrics(tmp_path / "run"))


def test_best_is_where_the_monitor_was_highest_and_last_is_the_end(data, tmp_path):
    run = tmp_path / "run"
    trainer.main(arguments(data, run, "--trainer.val_check_interval=1", steps=12))
    scores = {int(r["step"]): float(r["val/retrieval_r1"]) for r in metrics(run) if r["val/retrieval_r1"]}
    assert len(scores) == 12
    best = torch.load(run / "checkpoints/best.ckpt", weights_only=True)
    assert scores[best["global_step"] - 1] == max(scores.values())
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 12
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    native, _ = miniclip.load(run / "best", device="cpu")
    from_checkpoint, _ = miniclip.load(run / "checkpoints/best.ckpt", device="cpu")
    for (name, a), (_, b) in zip(native.state_dict().items(), from_checkpoint.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.long), signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_from_which_the_run_goes_on_to_the_same_bits(data, tmp_path, number):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    trainer.main(arguments(data, straight, "--model.optimizer.kind=muon", steps=40))
    args = command(data, broken, "--model.optimizer.kind=muon", steps=40)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = warm.Popen(
        args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step 5/40"):
            os.killpg(process.pid, number)  # as a terminal does: trainer and data workers alike
    assert process.wait() == 128 + number, "".join(said)
    text = "".join(said)
    assert "Traceback" not in text
    stopped_at = torch.load(broken / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 5 <= stopped_at < 40
    miniclip.load(broken / "checkpoints/last.ckpt", device="cpu")
    resume = re.search(r"To go on:\n  \S*python\S* (.*)\n", text)
    assert resume is not None
    assert resume[1].endswith("--ckpt_path last")
    warm.run([*args, "--ckpt_path=last"], check=True, env=environment)
    expected, found = state(straight), state(broken)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


EPOCHS, STEPS = "--trainer.max_epochs=3", "--trainer.max_steps=9"
SOME_STOPS = [(6, EPOCHS), (1, STEPS)]
OTHER_STOPS = [*((stop, EPOCHS) for stop in (1, 3, 5, 8)), *((stop, STEPS) for stop in (3, 5, 6, 8))]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "stop, length", [*SOME_STOPS, *(pytest.param(*each, marks=pytest.mark.long) for each in OTHER_STOPS)]
)
def test_a_run_stopped_at_any_step_goes_on_to_the_same_weights_and_validations(data, tmp_path, stop, length):
    """An epoch is three steps, each ends with a validation: steps 3 and 6 are the last of theirs."""
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    ends = ["--trainer.max_steps=-1", length] if "epochs" in length else [length]
    trainer.main(arguments(data, straight, *ends))
    stopper = f'[{{"class_path": "{StopAt.__module__}.StopAt", "init_args": {{"step": {stop}}}}}]'
    with pytest.raises(SystemExit) as stopped:
        trainer.main(arguments(data, broken, *ends, f"--trainer.callbacks={stopper}"))
    assert stopped.value.code == 130
    assert torch.load(broken / "checkpoints/last.ckpt", weights_only=True)["global_step"] == stop
    trainer.main(arguments(data, broken, *ends, "--ckpt_path=last"))
    expected, found = state(straight), state(broken)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert validations(broken) == validations(straight)
    assert list(validations(straight)) == ([2, 5, 8, 9] if length == EPOCHS else [2, 5, 8])  # 3 * 40 pairs / 12 is 10


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(data, tmp_path, capsys):
    said = fails(capsys, arguments(data, tmp_path / "run", "--model.optimizer.lr=1e30", steps=20))
    assert re.search(r"the loss at step \d+ is nan \(norm of the gradient: nan\); the weights were not touched", said)
    assert "No features are finite, so the weights are probably at fault" in said
    assert ".tar:0000" in (tmp_path / "run/non_finite.json").read_text()


def test_a_spoilt_sample_is_left_out_and_listed_and_too_many_stop_the_run(data, tmp_path, capsys):
    folder = tmp_path / "shards"
    pack(read_pairs(data / "train"), folder, source="train")
    shards = training_shards(folder)
    with open(folder / "00000.tar", "r+b") as tar:
        tar.seek(shards.offset(3))
        tar.write(b"spoilt!!")
    args = arguments(data, tmp_path / "run", f"--data.train={folder}", steps=4)
    trainer.main([*args, "--model.max_rejected=0.5"])
    assert "left out: 00000.tar:000000003: " in capsys.readouterr().err
    assert all(torch.isfinite(tensor).all() for tensor in state(tmp_path / "run").values())
    said = fails(capsys, [*args, "--model.max_rejected=0", "--overwrite=true"])
    assert "could not be read, more than the share 0.0 that model.max_rejected allows" in said


class training_shards:  # noqa: N801 (a word of the test's language)
    def __init__(self, folder: Path) -> None:
        self.arrays = np.load(folder / "00000.npz")

    def offset(self, number: int) -> int:
        return int(self.arrays["image"][number][0])


def callback(class_path: str, **options: Any) -> str:
    return "--trainer.callbacks=" + json.dumps([{"class_path": class_path, "init_args": options}])


RESNET = [
    "--model.clip.vision.kind=resnet",
    "--model.clip.vision.blocks=[1,1,1,1]",
    "--model.clip.vision.image_size=32",
]
ZERO_SHOT = '{"class_path": "miniclip.training.zero_shot.ZeroShotEvaluation", "init_args": {"data": "labels.csv"}}'
TWO_ZERO_SHOTS = f"--trainer.callbacks=[{ZERO_SHOT}, {ZERO_SHOT}]"
MISTAKES = [
    (["--data.batchsize=3"], "unknown key 'data.batchsize'; did you mean 'data.batch_size'?"),
    (["--model.clip.vision.widht=32"], "did you mean 'model.clip.vision.width'?"),
    (["--model.clip.activation=relu"], "relu"),
    (["--model.clip.vision.width=20"], "VisionConfig.width is 20, which is not a multiple of head_width 8"),
    (["--data.train=nowhere"], "nowhere is not a folder of shards: it does not exist. `miniclip shards SRC OUT`"),
    (["--data.batch_size=41"], "batch_size is 41 and the training set has 40 samples"),
    (["--data.batch_size=1"], "data.batch_size is 1"),
    (["--ckpt_path=nothing.ckpt"], "no checkpoint nothing.ckpt to resume from"),
    (["--ckpt_path="], "ckpt_path is ''; it takes a checkpoint's file, or last"),
    (["--trainer.max_steps=-1"], "the run has no end"),
    (["--trainer.accumulate_grad_batches=2"], "Raise data.batch_size instead"),
    (["--model.clip.text.vocab_size=50000"], "the tokenizer's ids need 49408"),
    (["--monitor=val/zero_shot_acc1"], "the callback miniclip.training.zero_shot.ZeroShotEvaluation"),
    (["--seed_everything=true"], "error: seed_everything is True, and it takes int"),
    (["--seed_everything=-3"], "error: seed_everything is -3; it must be from 0 to 4294967295"),
    (["--save_every_n_steps=0"], "save_every_n_steps is 0"),
    (["--save_every_minutes=0"], "save_every_minutes is 0.0; it must be above 0"),
    (["--monitor=val/loss"], "the lowest is best; add --monitor_mode min"),
    (["--monitor=val/loss", "--monitor_mode=lowest"], "lowest"),
    (["--monitor_mode=min"], "monitor by default val/zero_shot_acc1 or val/retrieval_r1, of which the highest is best"),
    (["--monitor=val/retrieval_r1", "--monitor_mode=min"], "monitor val/retrieval_r1, of which the highest is best"),
    (["--data.val=null", "--monitor_mode=min"], "--monitor_mode has no effect: data.val is null, so nothing is valid"),
    (["--data.val=null", "--monitor=train/loss"], "monitor is 'train/loss', which is read at validations"),
    (["--monitor=val/typo"], "monitor is 'val/typo', which nothing logs; did you mean 'val/loss'? It is one of "),
    (["--monitor=recall"], "monitor is 'recall', which nothing logs; logged are train/accuracy, "),
    (["--monitor=train/lr_muon"], "monitor is 'train/lr_muon', which nothing logs; did you mean 'train/lr'?"),
    (["--monitor=lr-AdamW"], "monitor is 'lr-AdamW', which nothing logs"),
    ([callback("ModelCheckpoint", monitor="val/los")], "ModelCheckpoint monitors 'val/los', which nothing logs; did"),
    ([callback("EarlyStopping", monitor="epoch")], "EarlyStopping monitors 'epoch', which nothing logs"),
    (
        ["--data.val=null", callback("ModelCheckpoint", monitor="val/loss")],
        "ModelCheckpoint monitors 'val/loss', which",
    ),
    (["--data.val_pairs=1"], "data.val_pairs is 1"),
    (["--name=mine"], "the run's folder is given twice: name 'mine' means runs/mine"),
    (["--name=mine"], "what a file gives, --name null or --trainer.default_root_dir null leaves out"),
    (["--trainer.limit_train_batches=2"], "use trainer.max_steps for a shorter run"),
    (["--trainer.limit_train_batches=1"], "use trainer.max_steps for a shorter run"),
    (["--trainer.overfit_batches=1"], "trainer.overfit_batches is not supported"),
    (["--trainer.limit_val_batches=1"], "a validation scores all held-out pairs, or data.val_pairs of them"),
    (
        ["--model.clip.vision.layer=3"],
        "unknown key 'model.clip.vision.layer'; did you mean 'model.clip.vision.layers'?",
    ),
    (["--model.optimizer.warmup=1.5"], "warmup is 1.5; it is a share of the run"),
    (["--config=nowhere.yaml"], "nowhere.yaml"),
    (["--data.batch_size=many"], "data.batch_size is many, and it takes int"),
    (["--data.val_pairs=many"], "data.val_pairs is many, and it takes int or null"),
    (["--data.train", "a/0.tar", "a/1.tar"], "unrecognized arguments: a/1.tar; a pattern stands in quotes"),
    (["--trainer.max_steps=null"], "trainer.max_steps is None, and it takes int; -1 sets no limit"),
    (["--trainer.max_steps=0"], "trainer.max_steps is 0; a run has at least one step"),
    (["--trainer.fast_dev_run=true"], "for a trial run use --trainer.max_steps 2"),
    (["--trainer.barebones=true"], "trainer.barebones is true"),
    (["--trainer.enable_checkpointing=false"], "raise save_every_n_steps and save_every_minutes"),
    (["--trainer.num_sanity_val_steps=2"], "trainer.num_sanity_val_steps is 2"),
    (["--trainer.val_check_interval=0"], "trainer.val_check_interval is 0; it must be above 0"),
    (["--trainer.val_check_interval=00:00:00:00"], "trainer.val_check_interval is 00:00:00:00; a time must be above 0"),
    (["--trainer.max_time={minuts: 3}"], "the parts of a time are days, hours, minutes and seconds, all numbers"),
    (["--trainer.check_val_every_n_epoch=-1"], "trainer.check_val_every_n_epoch is -1; it must be above 0"),
    (["--trainer.val_check_interval=4"], "trainer.val_check_interval is 4 and an epoch has 3 steps"),
    (["--trainer.log_every_n_steps=0"], "trainer.log_every_n_steps is 0; it must be at least 1"),
    (["--trainer.gradient_clip_val=-0.5"], "trainer.gradient_clip_val is -0.5; it must be at least 0"),
    (["--trainer.gradient_clip_algorithm=value"], "nothing is clipped: set trainer.gradient_clip_val, too"),
    (["--trainer.min_steps=-1"], "trainer.min_steps is -1; it must be at least 0"),
    (["--trainer.min_epochs=-1"], "trainer.min_epochs is -1; it must be at least 0"),
    (["--trainer.min_steps=11"], "trainer.min_steps is 11, and trainer.max_steps 10 ends the run before it, after 10"),
    (["--trainer.min_epochs=4"], "trainer.min_epochs is 4, and trainer.max_steps 10 ends the run before it, after 10"),
    (["--model.max_rejected=-0.1"], "model.max_rejected is -0.1; it is a share of the samples, 0 to 1"),
    (["--model.max_rejected=5"], "model.max_rejected is 5.0; it is a share of the samples, 0 to 1"),
    (["--data.num_workers=-1"], "data.num_workers is -1; it must be at least 0"),
    (["--data.cache_gb=-1"], "data.cache_gb is -1.0; it must be at least 0"),
    (["--model.optimizer.muon_lr=0.1"], "--model.optimizer.muon_lr has no effect: model.optimizer.kind is adamw"),
    (["--model.distillation", "0.7"], "--model.distillation has no effect: model.teacher is null"),
    (["--trainer.logger=WandbLogger"], "loggers.WandbLogger' cannot be used: Requirement 'wandb"),
    (
        [*RESNET, "--trainer.strategy=ddp", "--trainer.sync_batchnorm=true"],
        "trainer.sync_batchnorm is true and the device is cpu, where torch cannot synchronise",
    ),
    (
        [*RESNET, "--trainer.strategy=fsdp2", "--trainer.sync_batchnorm=true"],
        "trainer.sync_batchnorm is true, which has no effect under this strategy",
    ),
    (["--trainer.strategy=ddp_spawn"], "use --trainer.strategy ddp"),
    (["--trainer.strategy=ddp_notebook"], "use --trainer.strategy ddp"),
    ([callback("StochasticWeightAveraging", swa_lrs=0.1)], "set model.ema_decay"),
    ([callback("BackboneFinetuning")], "a CLIP has no backbone; set model.locked"),
    ([callback("ModelPruning", pruning_fn="l1_unstructured")], "was never validated"),
    ([callback("OnExceptionCheckpoint", dirpath=".")], "leave it out: a run that is stopped leaves last.ckpt"),
    (
        ["--trainer.logger=false", callback("ModelCheckpoint", save_last=True)],
        "run/checkpoints/last.ckpt, which the run itself writes to be resumed from; give it another dirpath",
    ),
    (
        [callback("ModelCheckpoint", dirpat=".")],
        "error: init_args of ModelCheckpoint: unknown key 'dirpat'; did you mean 'dirpath'?",
    ),
    (
        [callback("ModelCheckpoint", save_top_k="x")],
        "error: init_args of ModelCheckpoint: save_top_k is x, and it takes",
    ),
    ([callback("EarlyStopping")], "init_args of EarlyStopping: the following arguments are required: monitor"),
    (
        ["--trainer.logger=CSVLogger", "--trainer.logger.save_di=x"],
        "CSVLogger: unknown key 'save_di'; did you mean 'sa",
    ),
    ([TWO_ZERO_SHOTS], "ZeroShotEvaluation more than once, which would log all scores under the same names"),
    ([callback("GradientAccumulationScheduler", scheduling={0: 2})], "raise data.batch_size instead"),
    (["--data.val=null", callback("EarlyStopping", monitor="val/loss")], "EarlyStopping monitors 'val/loss'"),
    (
        [callback("miniclip.callbacks.ZeroShotEvaluation", data="labels.csv")],
        "did you mean 'miniclip.training.zero_shot.ZeroShotEvaluation'?",
    ),
    (
        [callback("miniclip.training.ZeroShotEvaluation", data="labels.csv")],
        "did you mean 'miniclip.training.zero_shot.ZeroShotEvaluation'?",
    ),
]


@pytest.mark.sample(12)
@pytest.mark.parametrize("more, message", MISTAKES, ids=[more[0] for more, _ in MISTAKES])
def test_a_mistake_is_answered_in_words_before_anything_is_written(data, tmp_path, capsys, more, message):
    said = fails(capsys, [*arguments(data, tmp_path / "run"), *more])
    assert message in said
    assert "Traceback" not in said
    assert len(said) < 600
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    "more",
    [
        ["--model.optimizer.kind=muon", "--model.clip.init_logit_bias=-2.5", "--model.loss=siglip"],
        ["--model.teacher={run}", "--data.val=null"],
        ["--model.start_from={run}", "--model.locked=text"],
    ],
    ids=["siglip", "teacher", "locked"],
)
def test_a_monitor_may_be_what_a_run_logs_and_nothing_else(data, tmp_path, capsys, more):
    zero_shot = callback(
        "miniclip.training.zero_shot.ZeroShotEvaluation",
        data=str(data / "val.csv"),
        others={"b": str(data / "val.csv")},
    )
    trainer.main(arguments(data, tmp_path / "start", steps=1))
    run = tmp_path / "run"
    more = [each.format(run=tmp_path / "start/best") for each in more]
    trainer.main(arguments(data, run, zero_shot, *more, steps=2))
    logged = set(metrics(run)[0]) - {"step", "epoch"}
    stop = json.loads(zero_shot.partition("=")[2])
    stop.append({"class_path": "EarlyStopping", "init_args": {"monitor": "recall"}})
    said = fails(capsys, arguments(data, tmp_path / "other", f"--trainer.callbacks={json.dumps(stop)}", *more))
    assert set(said.split("logged are ")[1].splitlines()[0].split(", ")) == logged


def test_an_unknown_key_in_a_file_is_named(data, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("data: {batchsize: 3}\n")
    said = fails(capsys, ["fit", f"--config={config}", *arguments(data, tmp_path / "run")[1:]])
    assert "unknown key 'data.batchsize'; did you mean 'data.batch_size'?" in said


def test_a_number_in_a_file_where_a_text_belongs_is_to_be_quoted(data, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("name: 12\n")
    message = fails(capsys, ["fit", f"--config={config}", *arguments(data, tmp_path / "run")[1:]])
    assert "name is 12, and it takes str or null; in YAML, write '12' with quotes" in message


@pytest.mark.long
def test_a_new_loader_for_each_epoch_goes_on_counting_the_wait_for_data(data, tmp_path):
    """Ten steps are four loaders of three steps each."""
    trainer.main(arguments(data, tmp_path / "run", "--trainer.reload_dataloaders_every_n_epochs=1"))
    waits = [float(row["train/data_wait"]) for row in metrics(tmp_path / "run") if row["train/data_wait"]]
    assert len(waits) == 10
    assert all(0 < wait <= 1 for wait in waits)


def test_a_run_is_never_overwritten_unasked(data, tmp_path, capsys):
    run = tmp_path / "run"
    trainer.main(arguments(data, run, steps=3))
    before = state(run)
    assert "already holds a run" in fails(capsys, arguments(data, run, steps=5))
    assert all(torch.equal(tensor, state(run)[name]) for name, tensor in before.items())
    trainer.main(arguments(data, run, "--overwrite=true", steps=5))
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 5


def test_resuming_with_another_architecture_or_batch_size_says_what_differs(data, tmp_path, capsys):
    run = tmp_path / "run"
    trainer.main(arguments(data, run, steps=3))
    other = ["--ckpt_path=last", "--data.train=nowhere"]  # what the file and the settings tell comes before the data
    said = fails(capsys, arguments(data, run, *other, "--model.clip.embed_dim=32", steps=5))
    assert "another architecture" in said
    assert "model.clip.embed_dim: the checkpoint has 16, this run 32" in said
    said = fails(capsys, arguments(data, run, *other, "--model.optimizer.kind=muon", steps=5))
    assert "the checkpoint was trained with model.optimizer.kind adamw, this run has muon" in said
    said = fails(capsys, arguments(data, run, "--ckpt_path=last", "--data.batch_size=10", steps=5))
    assert "was trained with batch_size 12, this run has 10" in said


def test_a_damaged_checkpoint_is_refused(data, tmp_path, capsys):
    damaged = tmp_path / "damaged.ckpt"
    damaged.write_bytes(b"PK\x03\x04 not a checkpoint")
    said = fails(capsys, arguments(data, tmp_path / "run", f"--ckpt_path={damaged}"))
    assert str(damaged) in said


class ScaleTooHigh(Callback):
    """Sets the logit scale far above its limit while the given step is trained, and stops the run there."""

    def __init__(self, step: int) -> None:
        self.stop = StopAt(step)

    def on_train_batch_start(self, trainer, module, *args) -> None:
        self.stop.on_train_batch_start(trainer)
        if trainer.global_step == self.stop.step - 1:
            with torch.no_grad():
                module.clip.logit_scale.fill_(7.0)


def test_the_logit_scale_never_passes_100_not_even_in_a_checkpoint_of_the_step_in_which_it_would(data, tmp_path):
    high = f'[{{"class_path": "{ScaleTooHigh.__module__}.ScaleTooHigh", "init_args": {{"step": 2}}}}]'
    with pytest.raises(SystemExit):
        trainer.main(arguments(data, tmp_path / "run", f"--trainer.callbacks={high}"))
    assert state(tmp_path / "run")["clip.logit_scale"].exp().item() == pytest.approx(100)


def tiny_config() -> miniclip.CLIPConfig:
    vision = miniclip.VisionConfig(image_size=16, patch_size=8, width=16, layers=1, head_width=8)
    return miniclip.CLIPConfig(16, vision=vision, text=miniclip.TextConfig(width=16, layers=1, head_width=8))


def test_in_batch_accuracy_by_hand():
    images = torch.eye(4)
    texts = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0.9], [0, 0, 0, 1]])
    # Image 2 sees only zeros and takes text 0; texts 2 and 3 both take image 3: 3 of 4, and 3 of 4.
    assert [share.item() for share in in_batch_accuracy(images, texts, None)] == [0.75, 0.75]
    mask = torch.tensor([True, True, False, True])
    assert [share.item() for share in in_batch_accuracy(images, texts, mask)] == [1.0, 1.0]
    texts[0] = torch.tensor([2.5, 2, 0, 0])  # the nearest of image 1, too, while its own nearest is still image 0
    assert [share.item() for share in in_batch_accuracy(images, texts, mask)] == pytest.approx([2 / 3, 1.0])


def test_rounding_decides_no_accuracy_and_equal_captions_are_right():
    """Ten pictures, four captions: the last bits of features, which differ from machine to machine, change nothing."""
    random = torch.Generator().manual_seed(0)
    captions = torch.tensor([0, 1, 0, 2, 3, 3, 1, 0, 2, 0])
    words = torch.nn.functional.normalize(torch.randn(4, 8, generator=random), dim=1)
    images = torch.nn.functional.normalize(words[captions] + 0.3 * torch.randn(10, 8, generator=random), dim=1)
    images[4] = images[0]  # the same picture with another caption
    by_image = ((images @ words.T).argmax(dim=1) == captions).float().mean()
    found = set()
    for _ in range(20):
        texts = words[captions] + 1e-7 * torch.randn(10, 8, generator=random)
        pictures = images + 1e-7 * torch.randn(10, 8, generator=random)
        of_images, of_texts = in_batch_accuracy(pictures, texts, None, captions)
        assert of_images == by_image
        recall = recall_at_1(pictures, texts, groups=captions)
        assert recall == pytest.approx(float(by_image))
        found.add(float(of_texts))
    assert len(found) == 1


@pytest.mark.long
def test_what_a_validation_logs_over_processes_is_numbers_and_no_tensors_of_the_host(data, tmp_path, monkeypatch):
    """NCCL moves only what lies on a GPU; Lightning puts numbers there, and leaves tensors where they are."""
    logged: dict[str, Any] = {}
    log_dict = CLIPTraining.log_dict

    def noting(self: CLIPTraining, values: dict[str, Any], **options: Any) -> None:
        logged.update(values if options.get("sync_dist") else {})
        log_dict(self, values, **options)

    monkeypatch.setattr(CLIPTraining, "log_dict", noting)
    zero_shot = callback("miniclip.training.zero_shot.ZeroShotEvaluation", data=str(data / "val.csv"))
    trainer.main(arguments(data, tmp_path / "run", zero_shot, steps=1))
    assert {"val/loss", "val/retrieval_r1", "val/zero_shot_acc1"} <= logged.keys()
    assert all(isinstance(value, float) for name, value in logged.items() if name.startswith("val/"))


def test_a_checkpoint_is_read_by_miniclip_and_not_by_lightnings_own_loader(data, tmp_path):
    trainer.main(arguments(data, tmp_path / "run", steps=1))
    path = tmp_path / "run/checkpoints/last.ckpt"
    with pytest.raises(ValueError, match=r"last\.ckpt.*miniclip\.load.*--ckpt_path"):
        CLIPTraining.load_from_checkpoint(path)
    with pytest.raises(ValueError, match=r"last\.ckpt.*config\.yaml.*--ckpt_path"):
        PairDataModule.load_from_checkpoint(path)
    miniclip.load(path, device="cpu")


def test_features_are_of_unit_length_and_pixels_are_normalised_once():
    module = CLIPTraining(tiny_config())
    batch = Batch(
        torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8),
        miniclip.tokenize(["a", "b c", "d"]).long(),
        None,
        ["1", "2", "3"],
        [],
        0,
        torch.arange(3),
    )
    images, texts = module.features(batch)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (miniclip.VisionConfig().mean, miniclip.VisionConfig().std))
    expected = module.clip.encode_image((batch.images / 255 - mean) / std, normalize=True)
    torch.testing.assert_close(images, expected)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3))


def test_the_resume_command_repeats_what_was_typed():
    typed = ["train.py", "fit", "--config", "my run.yaml", "--overwrite", "true", "--ckpt_path=last", "--data.seed=8"]
    expected = ".venv/bin/python train.py fit --config 'my run.yaml' --data.seed=8 --ckpt_path last"
    assert run_settings.resume_command(typed, ".venv/bin/python") == expected
    typed = ["/bin/miniclip", "train", "fit", "--overwrite", "--config", "run.yaml"]
    assert run_settings.resume_command(typed, "python") == "/bin/miniclip train fit --config run.yaml --ckpt_path last"
    assert run_settings.resume_command(["a.py", "fit", "--overwrite"], "python") == "python a.py fit --ckpt_path last"
    typed = ["/site/miniclip/__main__.py", "train", "fit"]  # of `python -m miniclip`; that file alone can't be run
    assert run_settings.resume_command(typed, "python") == "python -m miniclip train fit --ckpt_path last"


def loss_and_gradients(module: CLIPTraining, batch: Batch) -> dict[str, torch.Tensor]:
    module.zero_grad()
    images, texts = module.features(batch)
    loss = miniclip.clip_loss(images, texts, module.clip.logit_scale.exp())
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.parametrize("size", [1, 3, 7, 8, 50])
def test_micro_batches_change_neither_loss_nor_gradients(size):
    torch.manual_seed(0)
    plain = CLIPTraining(tiny_config()).double()
    micro = CLIPTraining(tiny_config(), micro_batch_size=size).double()
    micro.load_state_dict(plain.state_dict())
    batch = random_batch(8, 16)
    found, expected = loss_and_gradients(micro, batch), loss_and_gradients(plain, batch)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-12 * value.norm().clamp(min=1e-3), name


class Noisy(torch.nn.Module):
    """Dropout after a layer: what is encoded once more has to meet the same random numbers."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.dropout = inner, torch.nn.Dropout(0.3)

    def forward(self, *inputs):
        return self.dropout(self.inner(*inputs))


@pytest.mark.parametrize("precision", ["fp64", "bf16 autocast"])
def test_micro_batches_with_dropout_equal_plain_backpropagation_through_the_same_ones(precision):
    torch.manual_seed(0)
    module = CLIPTraining(tiny_config(), micro_batch_size=3)
    module.clip.visual.ln_post = Noisy(module.clip.visual.ln_post)
    module = module.double() if precision == "fp64" else module
    batch = random_batch(8, 16)
    # As Lightning opens it: without copies of the weights, in which parts would sum their gradients in bfloat16.
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp64", cache_enabled=False):
        torch.manual_seed(5)
        found = loss_and_gradients(module, batch)
        torch.manual_seed(5)
        module.zero_grad()

        splits = zip(batch.images.split(3), batch.tokens.split(3), strict=True)
        parts = [(module.encode_images(i), module.encode_texts(t)) for i, t in splits]
        images, texts = (torch.cat(each) for each in zip(*parts, strict=True))
        loss = miniclip.clip_loss(images, texts, module.clip.logit_scale.exp())
        loss.backward()
    assert torch.equal(found["loss"], loss.detach())
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-12, msg=name)


def test_gradients_of_many_micro_batches_are_as_exact_under_autocast_as_those_of_one():
    """Their sum is taken in float32, however many there are."""
    torch.manual_seed(0)
    module, batch = CLIPTraining(tiny_config()), random_batch(96, 16)
    errors, expected = [], loss_and_gradients(module, batch)
    for module.micro_batch_size in (None, 1):
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # as Lightning opens it
            found = loss_and_gradients(module, batch)
        matrices = [name for name, p in module.clip.named_parameters(prefix="clip") if p.ndim > 1]
        errors.append(sum(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in matrices))
    assert errors[1] <= 1.05 * errors[0]


def test_batch_norm_counts_each_micro_batch_once():
    vision = miniclip.VisionConfig(kind="resnet", image_size=32, width=8, blocks=(1, 1, 1, 1), head_width=32)
    torch.manual_seed(0)
    module = CLIPTraining(dataclasses.replace(tiny_config(), vision=vision), micro_batch_size=4)
    plain = CLIPTraining(dataclasses.replace(tiny_config(), vision=vision))
    plain.load_state_dict(module.state_dict())
    batch = random_batch(8, 32)
    loss_and_gradients(module, batch)
    with torch.no_grad():
        for images, tokens in zip(batch.images.split(4), batch.tokens.split(4), strict=True):
            plain.encode_images(images)
            plain.encode_texts(tokens)
    assert module.clip.visual.bn1.num_batches_tracked == 2
    for (name, found), expected in zip(module.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_a_micro_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match=r"model\.micro_batch_size is 0; it must be at least 1"):
        CLIPTraining(tiny_config(), micro_batch_size=0)
