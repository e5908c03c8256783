# A block is given out again only when nobody can see it any more. Oracle: the long way, by PyTorch's operators.

import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from miniclip.config import OPENAI_MEAN, OPENAI_STD
from miniclip.fast import kept_memory
from miniclip.images import normalize

SHAPE = (4, 3, 32, 32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kept_memory, "_LEAST_BYTES", 4 * 4 * 3 * 32 * 32)
    monkeypatch.setattr(kept_memory, "_last", np.empty(0, dtype=np.float32))


def pixels(seed, shape=SHAPE):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def normalised(images):
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (OPENAI_MEAN, OPENAI_STD))
    return (images.float() / 255 - mean) / std


def test_the_next_block_lies_where_the_last_one_lay():
    places = set()
    for seed in range(5):
        found = normalize(pixels(seed), OPENAI_MEAN, OPENAI_STD)
        assert torch.equal(found, normalised(pixels(seed)))
        assert found.data_ptr() % 64 == 0
        places.add(found.data_ptr())
        del found
    assert len(places) == 1


@pytest.mark.parametrize("held", ["itself", "a view", "an array", "detached", "a list of parts"])
def test_what_somebody_holds_is_not_written_over(held):
    hold = {
        "itself": lambda x: x,
        "a view": lambda x: x[1:, :, 3],
        "an array": lambda x: x.numpy()[2],
        "detached": lambda x: x.detach().requires_grad_(),
        "a list of parts": lambda x: x.split(3)[1],
    }[held]
    kept = hold(normalize(pixels(0), OPENAI_MEAN, OPENAI_STD))
    for seed in range(1, 4):
        normalize(pixels(seed), OPENAI_MEAN, OPENAI_STD)
    assert torch.equal(torch.as_tensor(kept), torch.as_tensor(hold(normalised(pixels(0)))))


def test_what_the_gradient_needs_is_not_written_over():
    """A convolution keeps its input for the gradient of its weights; nobody else does."""
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def loss(make):
        return F.conv2d(make(pixels(0)), weight).square().sum()

    found = loss(lambda images: normalize(images, OPENAI_MEAN, OPENAI_STD))
    normalize(pixels(1), OPENAI_MEAN, OPENAI_STD)
    torch.testing.assert_close(
        torch.autograd.grad(found, weight), torch.autograd.grad(loss(normalised), weight), rtol=1e-6, atol=1e-6
    )


def test_blocks_of_another_size_or_held_by_somebody_are_let_go():
    for rows in (4, 5, 6):
        found = normalize(pixels(0, (rows, *SHAPE[1:])), OPENAI_MEAN, OPENAI_STD)
        assert kept_memory._last.size == found.numel() + 16
    held = [normalize(pixels(seed), OPENAI_MEAN, OPENAI_STD) for seed in range(3)]
    assert len({each.data_ptr() for each in held}) == 3
    block = kept_memory._last
    normalize(pixels(0, (1, *SHAPE[1:])), OPENAI_MEAN, OPENAI_STD)  # small blocks come from the heap
    assert kept_memory._last is block


def test_images_stay_on_the_cpu_and_in_their_order_of_memory(monkeypatch):
    rows = pixels(0)
    images = rows.contiguous(memory_format=torch.channels_last)
    for least in (0, 2**60):
        monkeypatch.setattr(kept_memory, "_LEAST_BYTES", least)
        with torch.device("meta"):
            assert normalize(rows, OPENAI_MEAN, OPENAI_STD).device.type == "cpu"
        assert normalize(images, OPENAI_MEAN, OPENAI_STD).is_contiguous(memory_format=torch.channels_last)


def test_nobody_waits_for_a_thread_that_a_fork_left_behind():
    with kept_memory._lock:
        found = normalize(pixels(0), OPENAI_MEAN, OPENAI_STD)
    assert torch.equal(found, normalised(pixels(0)))
    assert not kept_memory._last.size


def test_threads_do_not_share_a_block():
    wrong = []

    def work(number):
        for seed in range(50):
            images = pixels(50 * number + seed)
            if not torch.equal(normalize(images, OPENAI_MEAN, OPENAI_STD), normalised(images)):
                wrong.append((number, seed))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert not wrong
