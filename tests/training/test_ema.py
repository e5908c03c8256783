# Oracle: the recurrence of the average by hand, from the weights after each step.

import os

import pytest
import runs
import torch
import warm
from helpers import tiny_clip
from pytorch_lightning import Callback
from runs import arguments, command, metrics, state

import miniclip
from miniclip.commands import train as trainer
from miniclip.config import VisionConfig
from miniclip.training.step import CLIPTraining, move_average

EMA = "--model.ema_decay=0.6"


class Weights(Callback):
    """Keeps the weights at the start and after each step, in `seen`."""

    seen: list[dict[str, torch.Tensor]]

    def __init__(self) -> None:
        Weights.seen = []

    def on_train_start(self, trainer, module) -> None:
        self.keep(module)

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.keep(module)

    def keep(self, module) -> None:
        Weights.seen.append({name: tensor.double().clone() for name, tensor in module.clip.state_dict().items()})


WATCH = f'--trainer.callbacks=[{{"class_path": "{__name__}.Weights"}}]'


def part(run, prefix, name="last"):
    return {key.removeprefix(prefix): t for key, t in state(run, name).items() if key.startswith(prefix)}


def test_the_average_is_the_one_by_hand_and_the_last_checkpoint_holds_both(data, tmp_path):
    """Decays 1/10, 2/11, 3/12, … and 0.6 from the step on at which these pass it, the eleventh."""
    trainer.main(arguments(data, tmp_path / "run", EMA, WATCH, steps=14))
    start, *steps = Weights.seen
    assert len(steps) == 14
    average = start
    for n, weights in enumerate(steps):
        decay = min(0.6, (1 + n) / (10 + n))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in average}
    kept, current = part(tmp_path / "run", "average."), part(tmp_path / "run", "clip.")
    for name, expected in average.items():
        torch.testing.assert_close(kept[name].double(), expected, rtol=1e-6, atol=1e-7, msg=name)
        assert torch.equal(current[name].double(), steps[-1][name])
    assert not torch.equal(kept["visual.proj"], current["visual.proj"])


@pytest.mark.long
def test_training_itself_goes_on_as_without_an_average(data, tmp_path):
    trainer.main(arguments(data, tmp_path / "with", EMA, steps=6))
    trainer.main(arguments(data, tmp_path / "without", steps=6))
    current = part(tmp_path / "with", "clip.")
    assert all(torch.equal(current[name], tensor) for name, tensor in part(tmp_path / "without", "clip.").items())


@pytest.mark.long
def test_validation_scores_the_average_and_best_holds_it(data, tmp_path):
    zero_shot = (
        '--trainer.callbacks=[{"class_path": "miniclip.training.zero_shot.ZeroShotEvaluation", '
        f'"init_args": {{"data": "{data / "val.csv"}"}}}}]'
    )
    run = tmp_path / "run"
    once = ["--trainer.check_val_every_n_epoch=null", "--trainer.val_check_interval=40"]
    trainer.main(arguments(data, run, EMA, zero_shot, *once, "--monitor=val/zero_shot_acc1", steps=40))
    scores = [row for row in metrics(run) if row["val/loss"]]
    best, _ = miniclip.load(run / "best", device="cpu")
    expected = part(run, "average.", "best")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in best.state_dict().items())

    def validated(checkpoint):
        flags = [flag for flag in arguments(data, tmp_path / "again", zero_shot) if flag != "fit"]
        trainer.main(["validate", *flags, f"--ckpt_path={checkpoint}", EMA])
        row = metrics(tmp_path / "again", version=len(list((tmp_path / "again/logs").iterdir())) - 1)[-1]
        return float(row["val/loss"]), float(row["val/zero_shot_acc1"])

    at_end = float(scores[-1]["val/loss"]), float(scores[-1]["val/zero_shot_acc1"])
    assert at_end[1] > 0.4  # of four colours, so that it tells weights from noise
    assert validated(run / "checkpoints/last.ckpt") == pytest.approx(at_end, rel=1e-6)
    for prefix, is_scored in (("clip.", False), ("average.", True)):
        spoilt = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
        for name, tensor in spoilt["state_dict"].items():
            if name.startswith(prefix):
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)))
        torch.save(spoilt, tmp_path / "spoilt.ckpt")
        loss, accuracy = validated(tmp_path / "spoilt.ckpt")
        assert (loss == pytest.approx(at_end[0], rel=1e-6)) != is_scored
        assert (accuracy == at_end[1]) != is_scored


@pytest.mark.parametrize("stop", [1, *(pytest.param(stop, marks=pytest.mark.long) for stop in (3, 5))])
def test_a_run_resumes_to_the_same_average_bit_for_bit(data, tmp_path, stop):
    """An epoch is three steps and ends with a validation."""
    flags = [EMA, "--model.optimizer.kind=muon"]
    trainer.main(arguments(data, tmp_path / "whole", *flags, steps=7))
    stopper = f'--trainer.callbacks=[{{"class_path": "runs.StopAt", "init_args": {{"step": {stop}}}}}]'
    with pytest.raises(SystemExit):
        trainer.main(arguments(data, tmp_path / "broken", *flags, stopper, steps=7))
    trainer.main(arguments(data, tmp_path / "broken", *flags, "--ckpt_path=last", steps=7))
    expected, found = state(tmp_path / "whole"), state(tmp_path / "broken")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert runs.validations(tmp_path / "whole") == runs.validations(tmp_path / "broken")


@pytest.mark.long
def test_two_processes_average_as_one_does(data, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for devices in (1, 2):
        more = [f"--trainer.devices={devices}", f"--trainer.strategy={'auto' if devices == 1 else 'ddp'}", EMA]
        more += ["--trainer.precision=64-true", "--data.captions.order=first"]
        args = command(data, tmp_path / f"run{devices}", *more, steps=4)
        done = warm.run(args, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = part(tmp_path / "run1", "average."), part(tmp_path / "run2", "average.")
    for name, expected in one.items():
        assert (two[name] - expected).abs().max() < 1e-8 * expected.abs().max(), name


def test_batch_norms_statistics_are_averaged_and_its_counts_are_not():
    vision = VisionConfig(kind="resnet", image_size=32, width=8, blocks=(1, 1, 1, 1), head_width=32)
    average, model = tiny_clip(vision=vision), tiny_clip(seed=1, vision=vision)
    for clip, value in ((average, 2.0), (model, 6.0)):
        clip.visual.bn1.running_mean.fill_(value)
    model.visual.bn1.num_batches_tracked.fill_(7)
    move_average(average, model, 0.75)
    assert average.visual.bn1.running_mean.eq(3.0).all()
    assert average.visual.bn1.num_batches_tracked == 7
    expected = 0.75 * tiny_clip(vision=vision).visual.conv1.weight + 0.25 * model.visual.conv1.weight
    torch.testing.assert_close(average.visual.conv1.weight, expected)


def test_weights_loaded_after_the_module_was_made_are_where_the_average_begins(data, tmp_path):
    module = CLIPTraining(tiny_clip().config, ema_decay=0.9)
    with torch.no_grad():
        module.clip.visual.proj.fill_(3.0)
    module.on_train_start()
    assert module.average.visual.proj.eq(3.0).all()
    assert not any(parameter.requires_grad for parameter in module.average.parameters())


@pytest.mark.long
def test_an_average_can_neither_be_left_nor_begun_by_resuming(data, tmp_path, capsys):
    trainer.main(arguments(data, tmp_path / "with", EMA, steps=2))
    said = runs.fails(capsys, arguments(data, tmp_path / "with", "--ckpt_path=last", steps=4))
    assert "the checkpoint holds an average of the weights, and model.ema_decay is None; set it as" in said
    trainer.main(arguments(data, tmp_path / "without", steps=2))
    said = runs.fails(capsys, arguments(data, tmp_path / "without", "--ckpt_path=last", EMA, steps=4))
    assert "the checkpoint holds no average of the weights, and model.ema_decay is 0.6; it can be set" in said


@pytest.mark.parametrize("decay", [0, 1, 1.5, -0.1])
def test_a_decay_that_is_none_is_refused(data, tmp_path, capsys, decay):
    said = runs.fails(capsys, arguments(data, tmp_path / "run", f"--model.ema_decay={decay}"))
    assert f"model.ema_decay is {float(decay)}; it must be above 0 and below 1" in said
