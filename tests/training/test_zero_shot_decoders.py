"""Who decodes the images of zero-shot validation."""

from types import SimpleNamespace

import pytest
import torch

from miniclip.training.zero_shot import num_decoders


@pytest.mark.parametrize(("device", "datamodule", "expected"), [("cpu", 3, 0), ("cuda:0", 3, 3), ("cuda:0", None, 0)])
def test_a_gpu_does_not_wait_for_one_process_that_decodes(device, datamodule, expected):
    data = None if datamodule is None else SimpleNamespace(num_workers=datamodule)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), datamodule=data)
    assert num_decoders(trainer) == expected
