"""Zero-shot validation: who decodes its images, and classes that it cannot tell apart."""

from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_config

from miniclip.training.step import CLIPTraining
from miniclip.training.zero_shot import ZeroShotEvaluation, num_decoders


@pytest.mark.parametrize(("device", "datamodule", "expected"), [("cpu", 3, 0), ("cuda:0", 3, 3), ("cuda:0", None, 0)])
def test_a_gpu_does_not_wait_for_one_process_that_decodes(device, datamodule, expected):
    data = None if datamodule is None else SimpleNamespace(num_workers=datamodule)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), datamodule=data)
    assert num_decoders(trainer) == expected


def test_classes_of_the_same_prompts_are_told(data, tmp_path):
    (tmp_path / "prompts.json").write_text('{"red": ["ink"], "green": ["paint"], "blue": ["ink"], "grey": ["chalk"]}')
    evaluation = ZeroShotEvaluation(str(data / "val.csv"), str(tmp_path / "prompts.json"))
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), is_global_zero=True)
    module = CLIPTraining(tiny_config())
    evaluation.setup(trainer, module, "validate")
    with pytest.warns(
        UserWarning, match="val/zero_shot_acc1: 2 classes have the prompts of 'blue'; all go to the first"
    ):
        evaluation._score(trainer, module)
