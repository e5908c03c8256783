"""Two threads give a training step the same gradients each time, with all that training adds to the book's towers."""

import os
import subprocess
import sys

import pytest

# 512 x 64 numbers are enough for PyTorch to use both threads.
SCRIPT = """
import torch, miniclip
from miniclip.config import TextConfig, VisionConfig
from miniclip.data.pairs import Batch
from miniclip.training.distillation import distillation_loss
from miniclip.training.step import CLIPTraining

torch.set_num_threads(2)
vision = VisionConfig(image_size=16, patch_size=4, width=64, layers=1)
config = miniclip.CLIPConfig(64, vision=vision, text=TextConfig(width=64, layers=1, context_length=8))
tokens = miniclip.tokenize(["a cat", "a dog", "seven", "a cat"] * 128, context_length=8).long()
torch.manual_seed(0)
images = torch.randint(0, 256, (512, 3, 16, 16), dtype=torch.uint8)
groups = torch.tensor([0, 1, 2, 0] * 128)
batch = Batch(images, tokens, None, ["key"] * 512, [], 0, groups)
taught = torch.nn.functional.normalize(torch.randn(2, 512, 32), dim=2)

def gradients(**options):
    torch.manual_seed(1)
    module = CLIPTraining(config, **options).train()
    features, scale = module.features(batch), module.clip.logit_scale.exp()
    loss = miniclip.clip_loss(*features, scale, groups=groups) + distillation_loss(*features, scale, *taught, 20.0, 100)
    loss.backward()
    return b"".join(each.grad.numpy().tobytes() for each in module.parameters())

print(len({gradients(OPTIONS) for _ in range(6)}))
"""
STEPS = {
    "micro-batches": "micro_batch_size=200, checkpoint_activations=True",
    "patch dropout": "patch_dropout=0.5",
}


@pytest.mark.long
@pytest.mark.parametrize("step", [pytest.param("micro-batches", marks=pytest.mark.long), "patch dropout"])
def test_two_threads_give_a_step_one_gradient(step):
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}
    script = SCRIPT.replace("OPTIONS", STEPS[step])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "1\n", done.stdout + done.stderr
