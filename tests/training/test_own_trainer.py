"""CLIPTraining and PairDataModule under a Trainer of one's own, without the command line."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
from helpers import tiny_config
from torch import nn

from miniclip.data.module import PairDataModule
from miniclip.training.step import CLIPTraining


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 1, "logger": False, **quiet, **options})


def pairs(data, **options: Any) -> PairDataModule:
    sizes = {"batch_size": 8, "num_workers": 0, "image_size": 16, "context_length": 16}
    return PairDataModule(str(data / "shards/train"), str(data / "shards/val"), **{**sizes, **options})


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
