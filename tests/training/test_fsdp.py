# Weights shared out over real processes (gloo), against one process with the whole batch and the whole weights.

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import warm
from batches import B, assert_near, options
from helpers import tiny_clip
from runs import command, state
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

import miniclip
from miniclip.loss import clip_loss
from miniclip.training.fsdp import OLDEST_TORCH, local, refuse_old_torch, shard, share_out, whole
from miniclip.training.optimizer import OptimizerConfig, make_optimizer

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH, reason="this PyTorch is too old, and refused"
)

RESNET = miniclip.VisionConfig(kind="resnet", image_size=32, width=8, blocks=(1, 1, 1, 1), head_width=32)

ZERO_SHOT = "miniclip.training.zero_shot.ZeroShotEvaluation"


def model_and_inputs(kind, dtype):
    model = tiny_clip(vision=RESNET) if kind == "resnet" else tiny_clip()
    model = model.to(dtype)
    # Its last bottleneck's norms start at zero, which would leave half of the tower without a gradient.
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.constant_(parameter, 0.5)
    random = torch.Generator().manual_seed(1)
    size = model.visual.input_resolution
    images = torch.randn(B, 3, size, size, generator=random, dtype=torch.float64).to(dtype)
    # Other lengths, and another number of them, in each process: what is gathered must not depend on that.
    texts = [f"picture number {n}" + " of many" * (n % 3 if n < B // 2 else 1) for n in range(B)]
    tokens = miniclip.tokenize(texts, context_length=16)
    return model, images, tokens


def encode(model, images, tokens):
    return model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)


def features(model, images, tokens, micro_batch_size):
    if micro_batch_size is None:
        return encode(model, images, tokens)
    parts = [
        checkpoint(encode, model, *part, use_reentrant=False)
        for part in zip(images.split(micro_batch_size), tokens.split(micro_batch_size), strict=True)
    ]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def five_steps(model, optimizer, loss_of):
    """Loss and gradients of the first, and the weights after all."""
    first = None
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        first = first or (loss.detach(), gradients)
        optimizer.step()
    return (*first, {name: whole(p.detach()).clone() for name, p in model.named_parameters()})


def optimizer_for(model, kind):
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.01)
    return make_optimizer(model, OptimizerConfig(kind=kind, lr=1e-3, muon_lr=0.01))


def runs():
    """Kind of tower, of optimiser, case of the loss, size of micro-batches, and precision."""
    # Any two of a case, a size and a precision come together in one of these.
    yield "vit", "sgd", "plain", None, "float64"
    yield "vit", "sgd", "plain", 2, "float32"
    yield "vit", "sgd", "holes and chunks", None, "float32"
    yield "vit", "sgd", "holes and chunks", 2, "float64"
    yield "vit", "sgd", "holes in one process alone", None, "float64"
    yield (
        "resnet",
        "sgd",
        "plain",
        None,
        "float64",
    )  # in evaluation mode: batches of their own have their own statistics
    for kind in ("adamw", "muon"):
        yield "vit", kind, "plain", None, "float64"


def alone(tower, kind, case, micro, dtype):
    model, images, tokens = model_and_inputs(tower, getattr(torch, dtype))
    return five_steps(
        model,
        optimizer_for(model, kind),
        lambda: clip_loss(*encode(model, images, tokens), model.logit_scale.exp(), **options(case)),
    )


def work(rank, world_size, folder, asked):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    rows = slice(rank * B // world_size, (rank + 1) * B // world_size)
    results = {}
    for run in asked:
        tower, kind, case, micro, dtype = run
        model, images, tokens = model_and_inputs(tower, getattr(torch, dtype))
        with torch.no_grad():  # only the first process's weights count
            model.text.text_projection += rank
        shard(model, mesh)

        def loss_of(model=model, images=images, tokens=tokens, case=case, micro=micro):
            found = features(model, images[rows], tokens[rows], micro)
            scale = local(model.logit_scale).exp()
            return clip_loss(*found, scale, **options(case, rows), across_processes=True)

        loss, *rest = five_steps(model, optimizer_for(model, kind), loss_of)
        dist.all_reduce(loss)
        results[run] = (loss / world_size, *rest)
        most = max(p.to_local().numel() for p in model.parameters())
        results["largest slice"] = most, max(p.numel() for p in model.parameters())
    for ways in ways_of_a_mixed_run(world_size):
        results[ways] = mixed_step(mesh, rows, *ways)
    results["shares"] = shares(mesh)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def ways_of_a_mixed_run(world_size):
    """Precision of autocast and of what is gathered, and whether towers are compiled."""
    half = torch.bfloat16
    yield from ((half, None, False), (half, half, False))
    if world_size != 2:  # slow, and in the long run only
        yield from ((half, half, True), (None, None, False), (None, None, True))


def mixed_step(mesh, rows, autocast, gathered, is_compiled):
    """Gradients of one step, and what an MLP's first product multiplied by."""
    model, images, tokens = model_and_inputs("vit", torch.float32)
    if is_compiled:
        model.visual.compile(backend="eager")
        model.text.compile(backend="eager")
    shard(model, mesh, gathered)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        found = features(model, images[rows], tokens[rows], None)
        loss = clip_loss(*found, local(model.logit_scale).exp(), across_processes=True)
    loss.backward()
    gradients, seen = {name: whole(p.grad) for name, p in model.named_parameters()}, []
    if not is_compiled:
        # Only now: a model with a hook computes more of the textbook's way, and rounds otherwise.
        layer = model.visual.transformer.resblocks[0].mlp.c_fc
        layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
        with torch.autocast("cpu", autocast):
            model.encode_image(images[rows])
    return gradients, seen


def shares(mesh):
    """Tensors of odd shapes, ten times themselves plus their index, and the indices that were computed here."""
    tensors = [torch.arange(rows * columns).view(rows, columns) for rows, columns in ((5, 3), (1, 2), (4, 4), (2, 1))]
    computed = []

    def compute(some, indices):
        computed.extend(indices)
        return [10 * tensor + index for tensor, index in zip(some, indices, strict=True)]

    results = share_out([distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in tensors], compute)
    assert all(torch.equal(whole(r), 10 * t + i) for i, (r, t) in enumerate(zip(results, tensors, strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(share_out(tensors, compute), map(whole, results), strict=True))
    return computed[: -len(tensors)]


@pytest.fixture(scope="module", params=[2, *(pytest.param(count, marks=pytest.mark.long) for count in (1, 3))])
def results(request):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        warm.spawn(work, (request.param, folder, asked(request.session.items)), request.param)
        yield [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(request.param)]


def asked(items):
    """The runs that the chosen tests look at."""
    own = [item.callspec.params for item in items if item.path == Path(__file__) and hasattr(item, "callspec")]
    return list(dict.fromkeys(params["run"] for params in own if "run" in params))


@pytest.mark.sample(2)
@pytest.mark.parametrize("run", list(runs()), ids=lambda run: "-".join(map(str, run)))
def test_sharing_weights_out_changes_neither_loss_nor_gradients_nor_what_is_learnt(results, run):
    *_, dtype = run
    loss, gradients, weights = alone(*run)
    for result in results:
        found = result[run]
        assert_near({"loss": found[0]}, {"loss": loss}, getattr(torch, dtype))
        assert_near(found[1], gradients, getattr(torch, dtype))
        # Muon's iteration itself is in single precision.
        assert_near(
            without_keys(found[2], run),
            without_keys(weights, run),
            torch.float32 if run[1] == "muon" else getattr(torch, dtype),
        )


def without_keys(weights, run):
    """Key biases have no gradient but rounding, which Adam's steps make as large as any."""
    if run[1] == "sgd":
        return weights
    return {
        name: torch.cat([value[: len(value) // 3], value[-len(value) // 3 :]])
        if name.endswith("in_proj_bias")
        else value
        for name, value in weights.items()
    }


def test_each_process_holds_its_share_only(results):
    for result in results:
        held, all_of_it = result["largest slice"]
        assert held <= -(-all_of_it // len(results)) + 16  # rows are not cut


def test_each_process_computes_its_share_of_the_whole_tensors(results):
    assert sorted(index for result in results for index in result["shares"]) == [0, 1, 2, 3]
    assert max(len(result["shares"]) for result in results) == -(-4 // len(results))


def test_matrices_gathered_in_autocasts_precision_change_no_bit_of_the_gradients(results):
    for result in results:
        expected, wide = result[torch.bfloat16, None, False]
        found, narrow = result[torch.bfloat16, torch.bfloat16, False]
        assert (wide, narrow) == ([torch.float32], [torch.bfloat16])
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_an_old_pytorch_is_refused_in_a_sentence():
    refuse_old_torch("2.14.1+cu130")
    with pytest.raises(ValueError, match=r"^strategy fsdp2 needs PyTorch 2\.11 or newer, and this is 2\.10\.0\+cpu; "):
        refuse_old_torch("2.10.0+cpu")


@pytest.mark.long
@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_compiled_towers_whose_weights_are_sliced_give_the_same_gradients(results, half):
    if len(results) == 2:
        pytest.skip("compiled with other numbers of processes, in the long run")
    for result in results:
        expected, found = (result[half, half, is_compiled][0] for is_compiled in (False, True))
        assert_near(found, expected, half or torch.float32)


def train(data, run, strategy, *more):
    devices = 1 if strategy == "auto" else 2
    more = [f"--trainer.devices={devices}", f"--trainer.strategy={strategy}", "--trainer.precision=64-true", *more]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    args = command(data, run, *more, steps=6)
    return warm.run(args, env=environment)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_a_run_goes_on_under_another_strategy(data, tmp_path, kind):
    """Alone, then shared out, then with all weights in both processes: still one run."""
    common = ["--data.captions.order=first", f"--model.optimizer.kind={kind}", "--trainer.gradient_clip_val=0.5"]
    done = train(data, tmp_path / "alone", "auto", *common)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    for number, (strategy, stop) in enumerate((("auto", 2), ("fsdp2", 4), ("ddp", None))):
        stopper = [{"class_path": "test_training.StopAt", "init_args": {"step": stop}}] if stop else []
        go_on = ["--ckpt_path=last"] if number else []
        done = train(data, run, strategy, *common, *go_on, f"--trainer.callbacks={json.dumps(stopper)}")
        assert done.returncode == (130 if stop else 0), done.stdout + done.stderr
        assert not stop or f"at step {stop}" in done.stdout
    expected, found = state(tmp_path / "alone"), state(run)
    for name, value in expected.items():
        limit = 1e-5 if kind == "muon" else 1e-8  # Muon's iteration is in single precision
        assert (found[name] - value).abs().max() <= limit * value.abs().max().clamp(min=1e-3), name
    model, _ = miniclip.load(run / "best", device="cpu")
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.long
def test_fine_tuning_with_shared_out_weights_is_that_of_one_process(data, tmp_path):
    """Scores before the first step, by the weights and by their average, and a locked tower."""
    start = tmp_path / "start"
    miniclip.save(tiny_clip(1, init_logit_bias=-2.5), start)
    zero_shot = {
        "class_path": "miniclip.training.zero_shot.ZeroShotEvaluation",
        "init_args": {"data": str(data / "val.csv")},
    }
    more = [f"--model.start_from={start}", "--model.locked=text", "--model.loss=siglip", "--model.ema_decay=0.9"]
    more += ["--data.captions.order=first", f"--trainer.callbacks={json.dumps([zero_shot])}"]
    more += ["--monitor=val/zero_shot_acc1", "--model.clip.init_logit_bias=-2.5"]
    told = []
    for strategy in ("auto", "fsdp2"):
        done = train(data, tmp_path / strategy, strategy, *more)
        assert done.returncode == 0, done.stdout + done.stderr
        told.append([line for line in done.stdout.splitlines() if "before training" in line])
    assert len(told[0]) == 2
    assert told[0] == told[1]
    expected, found = state(tmp_path / "auto"), state(tmp_path / "fsdp2")
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-8 * value.abs().max().clamp(min=1e-3), name


@pytest.mark.long
def test_what_is_gathered_in_half_precision_is_scored_too(data, tmp_path):
    """Before the first step and at validations, where Lightning opens no autocast of its own."""
    miniclip.save(tiny_clip(1), tmp_path / "start")
    zero_shot = {"class_path": ZERO_SHOT, "init_args": {"data": str(data / "val.csv")}}
    more = [f"--model.start_from={tmp_path / 'start'}", "--trainer.precision=bf16-mixed"]
    done = train(data, tmp_path / "run", "fsdp2", *more, f"--trainer.callbacks={json.dumps([zero_shot])}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "before training" in done.stdout
    assert "val/zero_shot_acc1" in (tmp_path / "run/logs/version_0/metrics.csv").read_text()
