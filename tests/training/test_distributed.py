# The loss and its gradients over real processes (gloo), against one process with the whole batch.

import itertools
import os
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import warm
from batches import CASES, B, E, assert_near, options
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from miniclip.common.processes import gather
from miniclip.loss import clip_loss, siglip_loss
from miniclip.training.distillation import distillation_loss

LOSSES = ("clip", "siglip", "distillation")


class Towers(nn.Module):
    """Two small towers, a temperature and a bias; and the loss of what they make of a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(7, E), nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, E))
        self.logit_scale, self.logit_bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-3.1))

    def forward(self, loss, images, texts, **options):
        features = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        scale, no_bias = self.logit_scale.exp(), 0 * self.logit_bias
        if loss == "clip":
            return clip_loss(*features, scale, **options) + no_bias
        if loss == "distillation":  # of a teacher that has the inputs as features
            taught = F.normalize(images[:, :6], dim=-1), F.normalize(texts, dim=-1)
            return distillation_loss(*features, scale, *taught, 9.0, **options) + no_bias
        return siglip_loss(*features, scale, self.logit_bias, **options)


RUNS = [
    (loss, case, dtype)
    for loss, case, dtype in itertools.product(LOSSES, CASES, (torch.float64, torch.float32))
    if not (loss == "distillation" and "groups" in CASES[case])
]


def inputs(dtype):
    random = torch.Generator().manual_seed(1)
    return [torch.randn(B, width, generator=random, dtype=torch.float64).to(dtype) for width in (7, 6)]


def alone(loss_name, case, dtype):
    """Loss, gradients, and weights after five steps of plain SGD, in one process with the whole batch."""
    towers = Towers().to(dtype)
    optimizer = torch.optim.SGD(towers.parameters(), lr=0.1)
    first = None
    for _ in range(5):
        optimizer.zero_grad()
        loss = towers(loss_name, *inputs(dtype), **options(case))
        loss.backward()
        first = first or (loss.detach(), {name: p.grad.clone() for name, p in towers.named_parameters()})
        optimizer.step()
    return (*first, {name: p.detach() for name, p in towers.named_parameters()})


def work(rank, world_size, folder):
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", "0"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    results = {}
    rows = slice(rank * B // world_size, (rank + 1) * B // world_size)
    for loss_name, case, dtype in RUNS:
        towers = DistributedDataParallel(Towers().to(dtype))
        optimizer = torch.optim.SGD(towers.parameters(), lr=0.1)
        first = None
        for _ in range(5):
            optimizer.zero_grad()
            own = [each[rows] for each in inputs(dtype)]
            loss = towers(loss_name, *own, **options(case, rows), across_processes=True)
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            gradients = {name: p.grad.clone() for name, p in towers.module.named_parameters()}
            first = first or (total / world_size, gradients)
            optimizer.step()
        results[loss_name, case, dtype] = (*first, {name: p.detach() for name, p in towers.module.named_parameters()})
    results["gathered"] = gather(torch.arange(2) + 10 * rank)
    few = F.normalize(torch.ones(4 - rank, 2), dim=1)
    for name, loss in (("clip", clip_loss), ("siglip", partial(siglip_loss, logit_bias=0.0))):
        try:
            results[f"unequal {name}"] = float(loss(few, few, 10.0, across_processes=True))
        except ValueError as error:
            results[f"unequal {name}"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2, pytest.param(3, marks=pytest.mark.long)])
def results(request):
    with tempfile.TemporaryDirectory() as folder:
        warm.spawn(work, (request.param, folder), request.param)
        yield [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("loss_name, case, dtype", RUNS, ids=str)
def test_processes_get_the_loss_gradients_and_weights_of_one_with_the_whole_batch(results, loss_name, case, dtype):
    loss, gradients, weights = alone(loss_name, case, dtype)
    for result in results:
        found = result[loss_name, case, dtype]
        assert_near({"loss": found[0]}, {"loss": loss}, dtype)
        assert_near(found[1], gradients, dtype)
        assert_near(found[2], weights, dtype)


def test_rows_are_gathered_in_the_order_of_the_ranks(results):
    expected = [n for rank in range(len(results)) for n in (10 * rank, 10 * rank + 1)]
    assert all(result["gathered"].tolist() == expected for result in results)


@pytest.mark.parametrize("loss_name", ["clip", "siglip"])
def test_unequal_numbers_of_pairs_are_an_error_in_every_process(results, loss_name):
    found = [result[f"unequal {loss_name}"] for result in results]
    if len(results) == 1:
        assert isinstance(found[0], float)
        return
    counts = ", ".join(str(4 - rank) for rank in range(len(results)))
    assert all(f"the processes hold {counts} pairs" in each and "`mask`" in each for each in found)
