# What a GPU would do, on a machine without one: tensors that have a device, a shape and no numbers. Whatever needs a
# number on the host (unique, nonzero, item) cannot run with them, and a GPU would be waited for there. torch's fake
# CUDA tensors have no backward pass where there is no driver; those of the device "meta" have one.

from contextlib import nullcontext

import pytest
import torch
from helpers import tiny_clip
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from miniclip.data.module import PairDataModule
from miniclip.data.pairs import Batch
from miniclip.evaluation.encoder import from_clip
from miniclip.evaluation.features import _stacked
from miniclip.training.optimizer import OptimizerConfig, make_optimizer
from miniclip.training.step import MAX_LOGIT_SCALE, CLIPTraining, move_average

B = 6
FAKE = FakeTensorMode()


def fakes_a_gpu():
    """Whether fake CUDA tensors can be filled; up to PyTorch 2.9 that needs a driver."""
    try:
        with FAKE:
            torch.empty(1, device="cuda").uniform_()
    except RuntimeError:
        return False
    return True


needs_fake_gpu = pytest.mark.skipif(not fakes_a_gpu(), reason="fake CUDA tensors of this PyTorch need a driver")


class Dear(TorchDispatchMode):
    """Notes each copy from the host to the GPU or back, and each gradient that is summed after a sort."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = {each.device.type for each in (*args, result) if torch.is_tensor(each)}
            self.found += [{"waits": not (kwargs or {}).get("non_blocking")}] if len(devices) > 1 else []
        if "index_put" in str(function):
            self.found.append(str(function))
        return result


class Alone:
    """As much of a trainer as a step asks for."""

    world_size, global_step, global_rank = 1, 3, 0


def a_step(device, positives="pair", per_image=1, kind="adamw", **options):
    """One step as Lightning makes it, and the gradients' norm clipped. Returns the module, and what `Dear` found."""
    with torch.device(device):
        config = tiny_clip().config
        module = CLIPTraining(config, OptimizerConfig(kind=kind), positives=positives, **options).train()
        module._trainer = Alone()
        side, texts = config.vision.image_size, B * per_image
        batch = Batch(
            torch.zeros(B, 3, side, side, dtype=torch.uint8),
            torch.full((texts, 9), 49407),
            None, [str(n) for n in range(B)], [], 0,
            torch.arange(texts),
            torch.arange(texts) if positives == "group" or per_image > 1 else None,
        )  # fmt: skip
        optimizer = make_optimizer(module.clip, module.optimizer_config)
        with Dear() as dear:
            loss = module.training_step(batch, 0)
            if device == "meta":
                loss.backward()
            for p in module.clip.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None and device == "cuda" else p.grad
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                module.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
            if module.average is not None:
                move_average(module.average, module.clip, 0.9)
    assert loss.device.type == device
    return module, dear.found


@pytest.mark.sample(5)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_fake_gpu), "meta"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"positives": "caption"},
        {"positives": "group"},
        {"per_image": 2},
        {"micro_batch_size": 2, "positives": "caption"},
        {"checkpoint_activations": True},
        {"patch_dropout": 0.5},
        {"kind": "muon"},
        {"ema_decay": 0.9},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "plain",
)
def test_a_step_asks_a_gpu_for_no_number_copies_nothing_to_it_and_sorts_for_no_gradient(options, device, monkeypatch):
    if device == "cuda" and "ema_decay" in options:
        pytest.skip("fake tensors cannot be copied by copy.deepcopy")
    if device == "meta":
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know the device
    with FAKE if device == "cuda" else nullcontext():
        module, dear = a_step(device, **options)
    assert not dear
    assert all(p.grad is not None and p.grad.device.type == device for p in module.clip.parameters())


@needs_fake_gpu
@pytest.mark.parametrize("encode", ["encode_image", "encode_pooled"])
def test_pictures_to_encode_reach_a_gpu_while_the_host_goes_on(encode):
    with FAKE, torch.device("cuda"):
        encoder = from_clip(tiny_clip(), lambda image: image, "tiny")
        images = torch.zeros(2, 3, 16, 16, device="cpu")
        with Dear() as dear:
            assert getattr(encoder, encode)(images).device.type == "cuda"
    assert dear.found == [{"waits": False}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_no_memory_is_pinned():
    """That would make a context of CUDA, and fails where there is no driver."""
    assert not torch.cuda.is_initialized()
    assert not _stacked([torch.zeros(3, 4, 4)] * 2).is_pinned()
    assert not PairDataModule("shards", batch_size=2)._loader_options()["pin_memory"]
