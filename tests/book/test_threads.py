"""At any number of threads a training step gives the same bits each time: no sum depends on which thread adds first.

By each library of products that PyTorch has, alone and beside a busy process. Between numbers of threads bits differ.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from miniclip.fast import matmul

# 512 x 64 numbers are enough for PyTorch to use both threads.
PREPARE = """
import torch, miniclip
from torch.utils._python_dispatch import TorchDispatchMode
from miniclip.config import TextConfig, VisionConfig

torch.set_num_threads(2)
torch.manual_seed(0)
vision = VisionConfig(image_size=16, patch_size=8, width=64, layers=1)
model = miniclip.CLIP(miniclip.CLIPConfig(64, vision=vision, text=TextConfig(width=64, layers=1, context_length=8)))
resnet = VisionConfig(kind="resnet", image_size=64, width=16, blocks=(1, 1, 1, 1))
resnet = miniclip.CLIP(miniclip.CLIPConfig(64, vision=resnet, text=TextConfig(width=64, layers=1))).train()
tokens = miniclip.tokenize(["a cat", "a dog", "seven", "a cat"] * 128, context_length=8)  # equal texts share an end
features = torch.nn.functional.normalize(torch.randn(2, 512, 64), dim=2).requires_grad_()
images, pictures = torch.randn(512, 3, 16, 16), torch.randn(24, 3, 64, 64)
groups = torch.arange(512) // 4
index = groups % 8

def gradients(value):
    model.zero_grad()
    resnet.zero_grad()
    features.grad = None
    value.backward()
    found = [each.grad for each in (features, *model.parameters(), *resnet.parameters()) if each.grad is not None]
    return b"".join(each.numpy().tobytes() for each in found)

class Unordered(TorchDispatchMode):
    # Counts the sums whose terms several threads add in the order in which they come.

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "index_put" in function.name() and any(each is True for each in args):  # accumulates
            indices = torch.stack(torch.broadcast_tensors(*[each for each in args[1] if each is not None])).flatten(1)
            self.count += indices.unique(dim=1).shape < indices.shape  # several terms for one place
        return function(*args, **(kwargs or {}))

def different(compute):
    # For 1, 2 and 3 threads: how many different gradients so many computations give.
    counts = []
    for threads, repeats in ((1, REPEATS), (2, 20), (3, 4)):
        torch.set_num_threads(threads)
        counts.append(len({gradients(compute()) for _ in range(repeats)}))
    return "-".join(map(str, counts))

def unordered(compute):
    with Unordered() as mode:
        gradients(compute())
    return mode.count
"""
SUMS = {
    "packed texts": "model.encode_text(tokens).square().sum()",
    "padded texts": "model.text(tokens).square().sum()",
    "images": "model.encode_image(images).square().sum()",
    "a ResNet": "resnet.encode_image(pictures).square().sum()",
    "loss": "miniclip.clip_loss(*features, 10)",
    "loss in slices": "miniclip.clip_loss(*features, 10, chunk_size=100)",
    "loss of groups": "miniclip.clip_loss(*features, 10, groups=groups)",
    "sigmoid loss": "miniclip.siglip_loss(*features, 10, -1, groups=groups)",
}


FAST = (matmul.library(), "alone")
LONG = [(library, how) for library in matmul.available() for how in ("alone", "busy", "alone, 20 times at each")]


@pytest.fixture(
    scope="module",
    params=[pytest.param(each, id=", ".join(each), marks=() if each == FAST else pytest.mark.long) for each in LONG],
)
def found(request):
    """What the chosen tests ask: {what: how many different gradients its computations gave, and how many of its sums
    have no order}.
    """
    library, how = request.param
    own = [item.callspec.params for item in request.session.items if item.path == Path(__file__)]
    asked = {what: SUMS[what] for what in dict.fromkeys(params["what"] for params in own if "what" in params)}
    count = "print(different(lambda: {0}), unordered(lambda: {0}))"
    prepare = PREPARE.replace("REPEATS", "20" if "20" in how else "2")
    script = "\n".join([prepare, *(count.format(value) for value in ("features[0][index].sum()", *asked.values()))])
    quiet = os.environ | {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2", matmul.VARIABLE: library}
    busy = "import os\nwhile os.getppid() == int(os.environ['PARENT']): sum(range(10**6))"
    with subprocess.Popen([sys.executable, "-c", busy if how == "busy" else "pass"],
                          env=os.environ | {"PARENT": str(os.getpid())}) as neighbour:  # fmt: skip
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=quiet)
        neighbour.kill()
    return dict(zip(("indices", *asked), (line.split() for line in done.stdout.splitlines()), strict=True))


@pytest.mark.sample(3)
@pytest.mark.parametrize("what", SUMS)
def test_each_number_of_threads_gives_one_gradient(found, what):
    assert found[what] == ["1-1-1", "0"]


def test_a_sum_without_order_would_be_counted(found):
    assert found["indices"][1] == "1"
