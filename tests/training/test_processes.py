# Evaluation shared out over real processes (gloo) gives what one process gives.

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import warm
from helpers import tiny_clip, write_picture
from runs import command, metrics

from miniclip import openclip
from miniclip.common.processes import all_gather_objects, log_sum_exp, own_indices
from miniclip.evaluation.datasets.open import open_dataset
from miniclip.evaluation.zero_shot import zero_shot_scores
from miniclip.weights.load import preprocess_for

ZERO_SHOT = "miniclip.training.zero_shot.ZeroShotEvaluation"


def test_one_process_has_all_of_it():
    assert own_indices(5) == [0, 1, 2, 3, 4]
    assert all_gather_objects("all") == ["all"]


def scores_of(folder, batch_size):
    model = tiny_clip()
    return zero_shot_scores(model, preprocess_for(model.config), open_dataset(folder), batch_size=batch_size)


def exponents(world_size):
    """A row for each process: of all sizes, minus infinity in one, and in all."""
    rows = torch.randn(world_size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 300
    rows[0, 1] = rows[:, 3] = -torch.inf
    return rows


def work(rank, world_size, images, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    found = {"share": own_indices(7), "collected": all_gather_objects(rank)}
    values = exponents(world_size)[rank].requires_grad_()
    sums = log_sum_exp(values)
    (sums[:3] * (1.0 + rank)).sum().backward()
    found["sums"], found["gradient"] = sums.detach(), values.grad
    for batch_size in (1, 3, 64):
        scores = scores_of(images, batch_size)
        found[batch_size] = [
            torch.from_numpy(a)
            for a in (scores.indices, scores.labels, scores.ranked, scores.cosines, scores.probabilities)
        ]
        found[batch_size, "unreadable"] = list(scores.unreadable)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes, 8 pictures, and one that can't be read."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(8):
        write_picture(folder / f"class {number % 3}" / f"{number}.png", number)
    (folder / "class 1" / "spoilt.jpg").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_any_number_of_processes_and_any_batch_size_gives_the_scores_of_one(images, world_size):
    expected = scores_of(images, 64)
    with tempfile.TemporaryDirectory() as folder:
        warm.spawn(work, (world_size, images, folder), world_size)
        found = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(world_size)]
    assert len(expected.indices) == 8
    for each in found:
        assert each["collected"] == list(range(world_size))
        for batch_size in (1, 3, 64):
            numbers, labels, ranked, cosines, probabilities = (t.numpy() for t in each[batch_size])
            np.testing.assert_array_equal(numbers, expected.indices)
            np.testing.assert_array_equal(labels, expected.labels)
            np.testing.assert_array_equal(ranked, expected.ranked)
            np.testing.assert_allclose(cosines, expected.cosines, atol=1e-5)
            np.testing.assert_allclose(probabilities, expected.probabilities, atol=1e-5)
            assert each[batch_size, "unreadable"] == list(expected.unreadable)
    rows = exponents(world_size).requires_grad_()
    sums = rows.logsumexp(dim=0)
    (sums[:3] * sum(1.0 + rank for rank in range(world_size))).sum().backward()
    for rank, each in enumerate(found):
        torch.testing.assert_close(each["sums"], sums.detach(), rtol=1e-14, atol=0)
        torch.testing.assert_close(each["gradient"][:3], rows.grad[rank, :3], rtol=1e-12, atol=1e-300)
        assert each["gradient"][3] == 0
    size = -(-7 // world_size)
    assert [number for each in found for number in each["share"]][:7] == list(range(7))
    assert all(len(each["share"]) == size for each in found)


LOSSES = [
    (kind, {"local_loss": is_local, "gather_with_grad": is_gathered})
    for kind in ("ClipLoss", "DistillClipLoss")
    for is_local in (False, True)
    for is_gathered in (False, True)
] + [("SigLipLoss", {})]


def loss_and_gradients(library, kind, features, **options):
    """Of CLIP's losses with open_clip's names, on the (images, texts, a teacher's images and texts) of a process."""
    own = [each.clone().requires_grad_() for each in features[:2]]
    loss = getattr(library, kind)(**options)
    more = [*features[2:], 3.0] if kind == "DistillClipLoss" else [-2.0]
    value = loss(*own, 7.0, *more)
    value = sum(value) if kind == "DistillClipLoss" else value
    value.backward()
    return value.detach(), torch.stack([each.grad for each in own])


def features_of_all(world_size):
    drawn = torch.randn(4, 3 * world_size, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.normalize(drawn, dim=-1)


def lose(rank, world_size, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    own = features_of_all(world_size)[:, 3 * rank : 3 * rank + 3]
    found = [
        loss_and_gradients(openclip, kind, own, rank=rank, world_size=world_size, **options) for kind, options in LOSSES
    ]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_open_clips_losses_of_two_processes_are_those_of_one():
    """On average over the processes; where features are gathered without a gradient, its part is that of a process."""
    import open_clip  # two seconds, which the processes don't need

    features = features_of_all(2)
    with tempfile.TemporaryDirectory() as folder:
        warm.spawn(lose, (2, folder), 2)
        found = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(2)]
    for (kind, options), *ranks in zip(LOSSES, *found, strict=True):
        value, gradients = loss_and_gradients(open_clip.loss, kind, features)
        torch.testing.assert_close(sum(each for each, _ in ranks) / 2, value)
        joined = torch.cat([gradient for _, gradient in ranks], dim=1)
        if options.get("gather_with_grad", True):
            torch.testing.assert_close(joined / 2, gradients)
        elif not options["local_loss"]:
            torch.testing.assert_close(joined, gradients)
        else:  # of this process's rows as images and as texts that choose, not as those that are chosen
            assert 0 < (joined / 2 - gradients).abs().max() < gradients.abs().max()


@pytest.mark.long
def test_validation_shared_out_over_three_processes_scores_as_one(data, tmp_path):
    """Sixteen held-out pairs and three processes: it does not come out even."""
    zero_shot = [{"class_path": ZERO_SHOT, "init_args": {"data": str(data / "val.csv")}}]
    logged = []
    for devices, strategy in ((1, "auto"), (3, "ddp")):
        more = [f"--trainer.devices={devices}", f"--trainer.strategy={strategy}", "--data.captions.order=first"]
        more += [f"--trainer.callbacks={json.dumps(zero_shot)}"]
        args = command(data, tmp_path / strategy, *more, steps=6)
        done = warm.run(args)
        assert done.returncode == 0, done.stdout + done.stderr
        logged.append([row for row in metrics(tmp_path / strategy) if row["val/loss"]])
    one, three = logged
    assert len(one) == len(three) == 2
    for row, other in zip(one, three, strict=True):
        assert float(other["val/loss"]) == pytest.approx(float(row["val/loss"]), rel=1e-4)
        assert other["val/retrieval_r1"] == row["val/retrieval_r1"]
        assert other["val/zero_shot_acc1"] == row["val/zero_shot_acc1"]
