"""Two threads give the same bits each time: no sum may depend on which thread adds first."""

import os
import subprocess
import sys

import pytest

# 512 x 64 numbers are enough for PyTorch to use both threads.
PREPARE = """
import torch, miniclip
from miniclip.config import TextConfig, VisionConfig

torch.set_num_threads(2)
torch.manual_seed(0)
vision = VisionConfig(image_size=16, patch_size=8, width=64, layers=1)
model = miniclip.CLIP(miniclip.CLIPConfig(64, vision=vision, text=TextConfig(width=64, layers=1, context_length=8)))
tokens = miniclip.tokenize(["a cat", "a dog", "seven", "a cat"] * 128, context_length=8)  # equal texts share an end
features = torch.nn.functional.normalize(torch.randn(2, 512, 64), dim=2).requires_grad_()
images = torch.randn(512, 3, 16, 16)
groups = torch.arange(512) // 4

def gradients(value):
    model.zero_grad()
    features.grad = None
    value.backward()
    found = [each.grad for each in (features, *model.parameters()) if each.grad is not None]
    return b"".join(each.numpy().tobytes() for each in found)
"""
SUMS = {
    "packed texts": "model.encode_text(tokens).square().sum()",
    "padded texts": "model.text(tokens).square().sum()",
    "images": "model.encode_image(images).square().sum()",
    "loss": "miniclip.clip_loss(*features, 10)",
    "loss in slices": "miniclip.clip_loss(*features, 10, chunk_size=100)",
    "loss of groups": "miniclip.clip_loss(*features, 10, groups=groups)",
    "sigmoid loss": "miniclip.siglip_loss(*features, 10, -1, groups=groups)",
}


@pytest.fixture(scope="module")
def distinct():
    """{what: how many different gradients 20 computations of it gave}."""
    count = "print(len({{gradients({}) for _ in range(20)}}))"
    script = "\n".join([PREPARE, *(count.format(value) for value in SUMS.values())])
    quiet = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=quiet)
    return dict(zip(SUMS, map(int, found.stdout.split()), strict=True))


@pytest.mark.parametrize("what", SUMS)
def test_two_threads_give_one_gradient(distinct, what):
    assert distinct[what] == 1
