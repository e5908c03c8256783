"""CLIPTraining and PairDataModule under a Trainer of one's own, without the command line."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import warm
from helpers import tiny_config
from pytorch_lightning.callbacks import (
    BaseFinetuning,
    Callback,
    ModelPruning,
    StochasticWeightAveraging,
)
from torch import nn
from torch.utils.data import DataLoader

from miniclip.data.module import PairDataModule
from miniclip.fast import bfloat16
from miniclip.training.optimizer import OptimizerConfig
from miniclip.training.resume import Resumption
from miniclip.training.step import CLIPTraining


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 1, "logger": False, **quiet, **options})


def pairs(data, **options: Any) -> PairDataModule:
    sizes = {"batch_size": 8, "num_workers": 0, "image_size": 16, "context_length": 16}
    return PairDataModule(str(data / "shards/train"), str(data / "shards/val"), **{**sizes, **options})


def set_up_pairs(data) -> PairDataModule:
    """Without a trainer."""
    module = pairs(data)
    module.setup("fit")
    return module


class Unfreezing(Callback):
    """Freezes the image tower at first, and has it learn from the second epoch on."""

    def setup(self, trainer, module, stage) -> None:
        module.clip.visual.requires_grad_(False)

    def on_train_epoch_start(self, trainer, module) -> None:
        if trainer.current_epoch == 1:
            module.clip.visual.requires_grad_(True)


class Adding(BaseFinetuning):
    """The same, by Lightning's recipe."""

    def freeze_before_training(self, module) -> None:
        self.freeze(module.clip.visual)

    def finetune_function(self, module, epoch, optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.clip.visual, optimizer, lr=1e-3)


class Rates(Callback):
    """The learning rates of the groups of each step, and whether the image tower has moved after it."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.has_moved: list[bool] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.before = copy.deepcopy(module.clip.visual.state_dict())
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer, module, *args) -> None:
        moved = module.clip.visual.state_dict()
        self.has_moved.append(all(not torch.equal(moved[name], tensor) for name, tensor in self.before.items()))


def unfrozen_tower(kind: str) -> CLIPTraining:
    torch.manual_seed(0)
    return CLIPTraining(tiny_config(), OptimizerConfig(kind=kind, warmup=0.0))


def test_a_tower_that_is_unfrozen_and_in_no_group_of_the_optimizer_is_refused(data):
    with pytest.raises(
        ValueError, match=r"visual\.class_embedding, .* and \d+ more were frozen when the optimizer was"
    ):
        trainer(max_epochs=2, callbacks=[Unfreezing()]).fit(unfrozen_tower("adamw"), pairs(data))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_lightnings_recipe_trains_a_tower_from_the_epoch_that_unfreezes_it(data, kind):
    """5 steps an epoch and 3 epochs; the cosine schedule by hand."""
    module, rates = unfrozen_tower(kind), Rates()
    fit = trainer(max_epochs=3, callbacks=[Adding(), rates])
    fit.fit(module, pairs(data))
    assert rates.has_moved == [False] * 5 + [True] * 10
    factors = [(1 + math.cos(math.pi * step / 15)) / 2 for step in range(15)]
    num_groups = len(rates.rates[0])
    peaks = {"adamw": [5e-4, 5e-4], "muon": [5e-4, 5e-4, 0.03, 0.03]}[kind]
    for step, factor in enumerate(factors):
        added = [] if step < 5 else [1e-3 * factor / factors[5]] * 2
        assert rates.rates[step] == pytest.approx([peak * factor for peak in peaks] + added)
    matrices, vectors = fit.optimizers[0].param_groups[num_groups:]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.2, 0.0)
    assert {p.ndim for p in vectors["params"]} == {1}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_run_that_unfroze_a_tower_resumes_to_the_bit(data, tmp_path, kind):
    straight = unfrozen_tower(kind)
    trainer(max_epochs=3, callbacks=[Adding(), Resumption({})]).fit(straight, pairs(data))
    broken = trainer(max_epochs=3, callbacks=[Adding(), Resumption({}), KeptAt(7, tmp_path / "7.ckpt")])
    broken.fit(unfrozen_tower(kind), pairs(data))
    resumed = unfrozen_tower(kind)
    trainer(max_epochs=3, callbacks=[Adding(), Resumption({})]).fit(
        resumed, pairs(data), ckpt_path=tmp_path / "7.ckpt", weights_only=False
    )
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


class KeptAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_run_of_a_model_that_computes_otherwise_than_its_config_warns(data):
    module = CLIPTraining(tiny_config(), checkpoint_activations=True, patch_dropout=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(max_steps=1).fit(module, pairs(data))
    assert not [warning for warning in caught if "config describes" in str(warning.message)]
    module.clip.text.transformer.resblocks[1].mlp.activation = nn.ReLU()
    with pytest.warns(
        UserWarning, match=r"this run's checkpoints:\n  text.*\.1\.mlp\.activation is ReLU\(\), and Quick"
    ):
        trainer(max_steps=1).fit(module, pairs(data))


@pytest.mark.parametrize(
    ("clip", "options", "lines"),
    [
        ({"resize": "squash"}, {}, ["resize: the model has 'squash', the data 'shortest'"]),
        ({}, {"interpolation": "bilinear"}, ["interpolation: the model has 'bicubic', the data 'bilinear'"]),
        ({}, {"preprocess": "hf", "resize_size": 18}, ["preprocess: the model has 'openai'", "resize_size: the model"]),
        ({}, {"image_size": 24}, ["image_size: the model has 16, the data 24"]),
        ({}, {"context_length": 12}, ["context_length: the model has 16, the data 12"]),
        ({}, {"positives": "caption"}, ["positives: the model has 'pair', the data 'caption'"]),
    ],
)
@pytest.mark.parametrize("what", ["fit", "validate"])
def test_data_that_prepare_other_pairs_than_the_model_takes_are_refused(data, clip, options, lines, what):
    module = CLIPTraining(tiny_config(vision=dataclasses.replace(tiny_config().vision, **clip)))
    with pytest.raises(ValueError, match="prepares other pairs than the model takes") as caught:
        getattr(trainer(), what)(module, datamodule=pairs(data, **options))
    for line in lines:
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16-true"}, "trainer.precision is bf16-true, .* bf16-mixed is as fast"),
        ({"callbacks": [StochasticWeightAveraging(1e-3)]}, "StochasticWeightAveraging, which is not supported: .*ema"),
        ({"callbacks": [ModelPruning("l1_unstructured")]}, "ModelPruning, which is not supported: .*never validated"),
        ({"max_steps": -1, "max_epochs": -1}, "the run has no end, .* max_steps or max_epochs"),
    ],
)
def test_what_the_command_line_refuses_a_trainer_of_ones_own_does_not_run(data, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(**options).fit(CLIPTraining(tiny_config()), pairs(data))


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_precision_that_the_cpu_has_no_instructions_for_is_warned_of(data, monkeypatch, is_fast):
    monkeypatch.setattr(bfloat16, "is_fast", lambda: is_fast)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(precision="bf16-mixed", max_steps=1).fit(CLIPTraining(tiny_config()), pairs(data))
    said = "trainer.precision is bf16-mixed, and this CPU has neither AVX512-BF16 nor AMX: steps are slower"
    assert any(said in str(each.message) for each in told) != is_fast


def own_loaders(data, steps: int) -> list[DataLoader[Any]]:
    """The batches of a run under PairDataModule, and those of its validation."""
    seen: list[Any] = []

    class Kept(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            seen.append(batch)

    module = pairs(data)
    trainer(max_steps=steps, callbacks=[Kept()], num_sanity_val_steps=0).fit(CLIPTraining(tiny_config()), module)
    return [DataLoader(batches, None, collate_fn=lambda batch: batch) for batches in (seen, [*module.val_dataloader()])]


def test_loaders_of_ones_own_train_and_validate_as_the_module_whose_batches_they_give(data):
    train, val = own_loaders(data, steps=3)
    found = []
    for loaders in ({"datamodule": pairs(data)}, {"train_dataloaders": train, "val_dataloaders": val}):
        torch.manual_seed(0)
        module, run = CLIPTraining(tiny_config()), trainer(max_steps=3, val_check_interval=3, num_sanity_val_steps=0)
        run.fit(module, **loaders)
        found.append((module.state_dict(), {key: float(value) for key, value in run.callback_metrics.items()}))
    (of_module, scores), (of_loaders, own_scores) = found
    assert all(torch.equal(of_loaders[name], tensor) for name, tensor in of_module.items())
    assert own_scores == scores
    assert "val/retrieval_r1" in scores


def test_batches_of_normalised_pictures_are_refused(data):
    """CLIPTraining would normalise them again."""
    (batch, *_), _ = own_loaders(data, steps=1)
    floats = DataLoader([batch._replace(images=batch.images / 255)], None, collate_fn=lambda batch: batch)
    for what in ("fit", "validate"):
        with pytest.raises(
            ValueError, match=r"images are float32; CLIPTraining normalises them itself and takes uint8"
        ):
            getattr(trainer(num_sanity_val_steps=0), what)(CLIPTraining(tiny_config()), floats)


def test_loaders_of_other_batches_and_warm_ups_in_samples_are_refused():
    loader = DataLoader([0] * 4, batch_size=2)
    for what in ("fit", "validate"):
        with pytest.raises(
            ValueError, match=r"the loader gives a Tensor for a batch; .*a miniclip\.data\.pairs\.Batch"
        ):
            getattr(trainer(), what)(CLIPTraining(tiny_config()), loader)
    module = CLIPTraining(tiny_config(), OptimizerConfig(warmup=8, warmup_unit="samples"))
    with pytest.raises(ValueError, match=r"warmup_unit is 'samples', which needs a PairDataModule"):
        trainer().fit(module, loader)


def test_a_data_module_without_a_trainer_says_what_its_batches_need(data):
    module = pairs(data)
    module.setup("fit")
    assert len(next(iter(module.val_dataloader())).keys) == 8
    with pytest.raises(ValueError, match="belongs to no Trainer, whose step tells which batch comes next"):
        module.train_dataloader()


# ---------------------------------------------------------------------------------------------------------------------
# Which pairs a validation scores


@pytest.mark.parametrize("limit", [1, 0.5])
@pytest.mark.parametrize("what", ["fit", "validate"])
def test_a_part_of_the_held_out_pairs_is_chosen_by_the_data_module_alone(data, limit, what):
    with pytest.raises(ValueError, match=rf"trainer\.limit_val_batches is {limit}; .*data\.val_pairs of them"):
        getattr(trainer(limit_val_batches=limit), what)(CLIPTraining(tiny_config()), datamodule=pairs(data))


def test_no_validation_is_none_and_not_a_part(data):
    run = trainer(limit_val_batches=0, max_steps=1)
    run.fit(CLIPTraining(tiny_config()), pairs(data))
    assert "val/loss" not in run.callback_metrics


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"fast_dev_run": 1}, r"the first 1 of 2 batches \(trainer.fast_dev_run is True\)"),
        ({"limit_val_batches": 1}, r"the first 1 of 2 batches \(trainer.limit_val_batches is 1\)"),
        ({"limit_val_batches": 0.5}, r"the first 1 of 2 batches \(trainer.limit_val_batches is 0.5\)"),
        ({"overfit_batches": 1}, r"the first 1 of 2 batches \(trainer.overfit_batches is 1\)"),
        ({"limit_val_batches": 2}, None),
        ({}, None),
    ],
)
def test_scores_of_a_part_of_a_loader_of_ones_own_are_called_that(data, options, part):
    """16 held-out pairs in batches of 8."""
    batches = [*set_up_pairs(data).val_dataloader()]
    loader = DataLoader(batches, None, collate_fn=lambda batch: batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(**options).validate(CLIPTraining(tiny_config()), loader)
    said = [str(each.message) for each in caught if "a part of the validation" in str(each.message)]
    if part is None:
        assert said == []
    else:
        (message,) = said
        assert re.search(rf"^val/loss and val/retrieval_r1 are of a part of the validation, {part}", message)


# Validates under loaders of one's own and under PairDataModule in as many processes as told, and writes each's scores.
VALIDATES = """
import json, sys
from pathlib import Path
import torch
from torch.utils.data import DataLoader, Subset
from helpers import tiny_config
from test_own_trainer import pairs, set_up_pairs, trainer
from miniclip.data.pairs import collate
from miniclip.training.step import CLIPTraining

class Samples(torch.utils.data.Dataset):
    def __init__(self, dataset): self.dataset = dataset
    def __len__(self): return len(self.dataset)
    def __getitem__(self, index): return self.dataset[0, index]

data, devices, out = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
samples = DataLoader(Subset(Samples(set_up_pairs(data).val_dataloader().dataset), range(13)), 2, collate_fn=collate)
batches = DataLoader(list(samples), None, collate_fn=lambda batch: batch)
cases = [({"dataloaders": samples}, True), ({"dataloaders": batches}, True), ({"datamodule": pairs(data)}, True)]
results = []
for loaders, is_sampled in [*cases, ({"dataloaders": samples}, False)]:
    torch.manual_seed(0)
    strategy = "ddp" if devices > 1 else "auto"
    run = trainer(devices=devices, strategy=strategy, use_distributed_sampler=is_sampled)
    try:
        run.validate(CLIPTraining(tiny_config()), **loaders)
        results.append({name: float(value) for name, value in run.callback_metrics.items()})
    except ValueError as error:
        results.append(str(error))
if run.is_global_zero:
    out.write_text(json.dumps(results))
"""


@pytest.fixture(scope="module")
def validated(data, tmp_path_factory) -> list[list[Any]]:
    """What VALIDATES writes from one process and from two."""
    folder, here = tmp_path_factory.mktemp("validated"), Path(__file__).parent
    (folder / "validates.py").write_text(VALIDATES)
    known = {"PYTHONPATH": os.pathsep.join(map(str, (here.parents[1], here.parent, here))), "OMP_NUM_THREADS": "1"}
    results = []
    for devices in (1, 2):
        out = folder / f"{devices}.json"
        command = [sys.executable, str(folder / "validates.py"), str(data), str(devices), str(out)]
        done = warm.run(command, env=os.environ | known, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(json.loads(out.read_text()))
    return results


@pytest.mark.long
def test_samples_that_a_distributed_sampler_repeats_count_once(validated):
    """Of 13 samples in two processes each has 7 of Lightning's sampler, and of 7 batches 4."""
    alone, together = validated
    for of_one, of_two in zip(alone[:2], together[:2], strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-5)


@pytest.mark.long
def test_a_data_module_needs_no_setting_for_several_processes(validated):
    alone, together = validated
    assert together[2] == pytest.approx(alone[2], rel=1e-5)


@pytest.mark.long
def test_samples_that_every_process_reads_are_refused(validated):
    alone, together = validated
    assert alone[3] == alone[0]
    assert re.match("13 of the 13 samples of the validation come in several of the 2 processes [(]", together[3])
    assert "give the loader a torch.utils.data.DistributedSampler" in together[3]
