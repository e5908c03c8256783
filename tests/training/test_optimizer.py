# Oracles: torch.optim.AdamW, and Muon written once more below, matrix by matrix.

import copy
import dataclasses
import itertools
import json
import math
import re
from itertools import pairwise

import pytest
import runs
import torch
from helpers import tiny_clip, tiny_config
from pytorch_lightning import Callback
from runs import arguments

from miniclip.commands import train as trainer
from miniclip.config import TextConfig, VisionConfig
from miniclip.training.muon import Muon, orthogonalize
from miniclip.training.optimizer import (
    OptimizerConfig,
    block_matrices,
    learning_rate_factor,
    make_optimizer,
    parameter_groups,
    rate_scales,
    warmup_steps,
)

ADAMW, MUON = OptimizerConfig(), OptimizerConfig(kind="muon")


def give_gradients(model, step):
    """The same random gradients for the same step."""
    random = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random) * 0.1


def run(model, optimizer, steps):
    for step in steps:
        give_gradients(model, step)
        optimizer.step()


def names_of(model, group):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


# ---- groups


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_every_parameter_is_in_exactly_one_group(config):
    model = tiny_clip()
    grouped = [id(parameter) for group in parameter_groups(model, config) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_gains_biases_and_the_logit_scale_do_not_decay_and_all_else_does(config):
    for group in parameter_groups(tiny_clip(), config):
        for parameter in group["params"]:
            assert (group["weight_decay"] == 0) == (parameter.ndim < 2)


def test_muon_takes_exactly_the_matrices_of_the_blocks():
    model = tiny_clip()
    expected = {
        f"{tower}.transformer.resblocks.{block}.{matrix}.weight"
        for tower in ("visual", "text")
        for block in (0, 1)
        for matrix in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")
    } | {
        f"{tower}.transformer.resblocks.{block}.attn.in_proj_weight" for tower in ("visual", "text") for block in (0, 1)
    }
    muon = [group for group in parameter_groups(model, MUON) if group["momentum"] is not None]
    assert set().union(*(names_of(model, group) for group in muon)) == expected
    assert {id(parameter) for parameter in block_matrices(model)} == {id(p) for group in muon for p in group["params"]}


def test_each_group_has_its_own_rate_and_decay():
    config = OptimizerConfig(
        kind="muon", lr=1e-3, weight_decay=0.3, muon_lr=0.05, muon_weight_decay=0.7, muon_momentum=0.8
    )
    matrices, vectors, *muon = parameter_groups(tiny_clip(), config)
    assert (matrices["lr"], matrices["weight_decay"], matrices["momentum"]) == (1e-3, 0.3, None)
    assert (vectors["lr"], vectors["weight_decay"], vectors["momentum"]) == (1e-3, 0.0, None)
    assert muon
    assert all((group["lr"], group["weight_decay"], group["momentum"]) == (0.05, 0.7, 0.8) for group in muon)


def test_adamw_alone_has_no_muon_group():
    assert all(group["momentum"] is None for group in parameter_groups(tiny_clip(), ADAMW))


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_frozen_parameters_are_in_no_group_and_stay_as_they_are(config):
    model = tiny_clip()
    model.visual.requires_grad_(False)
    frozen = {name: parameter.clone() for name, parameter in model.visual.named_parameters()}
    groups = parameter_groups(model, config)
    assert all(not name.startswith("visual.") for group in groups for name in names_of(model, group))
    run(model, make_optimizer(model, config), range(2))
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in model.visual.named_parameters())


# ---- AdamW


def test_adamw_steps_equal_torchs_bit_for_bit():
    config = OptimizerConfig(lr=0.01, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.3)
    ours, theirs = tiny_clip(), tiny_clip()
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim >= 2], "weight_decay": 0.3},
        {"params": [p for p in theirs.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    run(ours, make_optimizer(ours, config), range(5))
    run(theirs, torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-5, fused=True), range(5))
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    assert not torch.equal(ours.logit_scale, tiny_clip().logit_scale)


def test_beside_muon_the_other_parameters_take_adamw_steps():
    ours, theirs = tiny_clip(), tiny_clip()
    matrices = {id(parameter) for parameter in block_matrices(theirs)}
    rest = [parameter for parameter in theirs.parameters() if id(parameter) not in matrices]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": MUON.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    run(ours, make_optimizer(ours, MUON), range(3))
    run(theirs, torch.optim.AdamW(groups, lr=MUON.lr, betas=MUON.betas, eps=MUON.eps, fused=True), range(3))
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, expected) == (id(expected) not in matrices), name


# ---- Muon


def newton_schulz(matrix):
    """Five steps of Jordan et al.'s quintic polynomial, applied to the singular values."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


def reference_muon(weight, gradients, lr, decay, momentum, parts):
    """Weights after one step for each gradient, in double precision."""
    weight, average = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient.double()
        update = momentum * average + (1 - momentum) * gradient.double()
        blocks = []
        for block in update.chunk(parts):
            rows, columns = block.shape
            blocks.append(math.sqrt(max(1, rows / columns)) * newton_schulz(block))
        weight = weight * (1 - lr * decay) - lr * torch.cat(blocks)
    return weight


def muon_beside_reference(model, config, steps=3):
    """Name -> (our weights after some steps, the reference's) of every block matrix."""
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: [] for name in start}
    for step in range(steps):
        give_gradients(model, step)
        for name, parameter in model.named_parameters():
            gradients[name].append(parameter.grad)
    optimizer = make_optimizer(model, config)
    run(model, optimizer, range(steps))
    matrices = {id(parameter) for parameter in block_matrices(model)}
    settings = (config.muon_lr, config.muon_weight_decay, config.muon_momentum)
    return {
        name: (p.detach(), reference_muon(start[name], gradients[name], *settings, 3 if "in_proj" in name else 1))
        for name, p in model.named_parameters()
        if id(p) in matrices
    }


@pytest.mark.parametrize(
    "config",
    [MUON, OptimizerConfig(kind="muon", muon_lr=0.1, muon_weight_decay=0.5, muon_momentum=0.7)],
    ids=["defaults", "other values"],
)
def test_muon_steps_equal_a_plain_implementation_matrix_by_matrix(config):
    compared = muon_beside_reference(tiny_clip(), config)
    assert len(compared) == 16
    for name, (ours, expected) in compared.items():
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("mlp_ratio", [1.0, 3.0, 0.5])
def test_only_queries_keys_and_values_are_taken_apart_whatever_the_shape_of_the_others(mlp_ratio):
    vision = VisionConfig(image_size=16, patch_size=8, width=16, layers=1, head_width=8, mlp_ratio=mlp_ratio)
    text = TextConfig(context_length=16, width=16, layers=1, head_width=8, mlp_ratio=mlp_ratio)
    model = tiny_clip(vision=vision, text=text)
    for name, (ours, expected) in muon_beside_reference(model, MUON).items():
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-6, msg=name)


def test_swapping_the_gradients_of_queries_and_keys_changes_the_step():
    """Else a step that mixes the three would go unseen."""
    model, other = tiny_clip(), tiny_clip()
    for clip in (model, other):
        give_gradients(clip, 0)
    weight, other_weight = (clip.text.transformer.resblocks[0].attn.in_proj_weight for clip in (model, other))
    q, k, v = weight.grad.chunk(3)
    other_weight.grad = torch.cat([100 * k, q, v])  # each part on its own: its scale does not matter
    for clip in (model, other):
        make_optimizer(clip, OptimizerConfig(kind="muon", muon_weight_decay=0)).step()
    before = tiny_clip().text.transformer.resblocks[0].attn.in_proj_weight.chunk(3)
    step, other_step = ([a - b for a, b in zip(w.chunk(3), before, strict=True)] for w in (weight, other_weight))
    torch.testing.assert_close(step[0], other_step[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(step[1], other_step[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(step[2], other_step[2], rtol=1e-4, atol=1e-6)
    assert (step[0] - step[1]).abs().max() > 1e-3


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_gradients_are_still_there_after_a_step(config):
    model = tiny_clip()
    give_gradients(model, 0)
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    make_optimizer(model, config).step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter.grad, before[name]), name


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_parameters_without_a_gradient_stay_as_they_are(config):
    model = tiny_clip()
    give_gradients(model, 0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.text.parameters():
        parameter.grad = None
    make_optimizer(model, config).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("text."), name


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_a_step_returns_the_loss_of_its_closure_computed_with_gradients(config):
    model = tiny_clip()
    optimizer = make_optimizer(model, config)

    def closure():
        loss = sum(parameter.square().sum() for parameter in model.parameters())
        loss.backward()
        return loss

    before = sum(parameter.square().sum() for parameter in model.parameters()).item()
    assert optimizer.step(closure).item() == pytest.approx(before)
    assert sum(parameter.square().sum() for parameter in model.parameters()).item() < before


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_a_run_resumed_from_its_state_continues_bit_for_bit(config, tmp_path):
    goes_on_bit_for_bit(config, tmp_path / "state.pt")


def goes_on_bit_for_bit(config, file):
    whole, first = tiny_clip(), tiny_clip()
    run(whole, make_optimizer(whole, config), range(6))
    optimizer = make_optimizer(first, config)
    run(first, optimizer, range(3))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)

    resumed = tiny_clip(seed=9)
    optimizer = make_optimizer(resumed, config)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run(resumed, optimizer, range(3, 6))
    for (name, parameter), expected in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, expected), name


def test_a_changed_rate_takes_effect_in_every_group():
    """What a schedule does: it sets `lr` of the groups."""
    model = tiny_clip()
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, MUON)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    run(model, optimizer, range(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_muon_on_one_matrix_moves_it_by_the_rate_in_every_direction():
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([{"params": [weight], "momentum": 0.95, "lr": 0.1, "weight_decay": 0.0, "parts": 1}], lr=0.1)
    weight.grad = torch.diag(torch.tensor([1.0, 2.0, 5.0, 9.0]))
    optimizer.step()
    moved = -weight.detach()
    assert torch.equal(moved, moved.diag().diag())
    assert ((moved.diag() > 0.06) & (moved.diag() < 0.13)).all()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has none")
@pytest.mark.parametrize("rows, columns", [(16, 16), (32, 8), (8, 32)])
def test_muon_steps_are_torchs_up_to_the_precision_of_its_iteration(rows, columns):
    """torch's iterates in bfloat16, which has two to three digits."""
    start = torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.8}
    optimizers = Muon([{"params": [ours], "parts": 1, **settings}]), torch.optim.Muon([theirs], **settings)
    for step in range(6):
        ours.grad = torch.randn(rows, columns, generator=torch.Generator().manual_seed(10 + step))
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    difference, moved = (ours - theirs).norm(), (theirs - start).norm()
    assert difference < 0.02 * moved


# ---- orthogonalisation

SHAPES = [(8, 32), (32, 8), (16, 16), (48, 16), (16, 64), (100, 20), (1, 9), (9, 1), (1, 1)]


def random_matrices(count, rows, columns, seed=0):
    return torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows, columns", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1, 1e3])
def test_singular_values_that_differ_up_to_twentyfold_end_near_one(rows, columns, scale):
    left, values, right = torch.linalg.svd(random_matrices(20, rows, columns), full_matrices=False)
    drawn = scale * (0.05 + 0.95 * torch.rand(values.shape, generator=torch.Generator().manual_seed(1)))
    values = torch.linalg.svdvals(orthogonalize(left @ drawn.diag_embed() @ right))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_singular_vectors_stay_as_they_are(rows, columns):
    matrices = random_matrices(5, rows, columns)
    expected = torch.stack([newton_schulz(matrix) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows, columns", SHAPES)
def test_a_batch_of_matrices_equals_them_one_by_one(rows, columns):
    matrices = random_matrices(5, rows, columns) * torch.tensor([1e-2, 1, 10, 3, 100]).view(5, 1, 1)
    one_by_one = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices), one_by_one, rtol=1e-5, atol=1e-6)


def test_a_matrix_of_zeros_stays_one():
    matrices = torch.zeros(2, 4, 6)
    matrices[1] = random_matrices(1, 4, 6)[0]
    result = orthogonalize(matrices)
    assert result[0].eq(0).all()
    assert result[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_result_has_the_type_of_the_matrices(dtype):
    assert orthogonalize(random_matrices(2, 4, 6).to(dtype)).dtype == dtype


# ---- schedule


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("total, warmup", [(100, 10), (1000, 250), (10, 5), (7, 0), (1, 0), (50, 49)])
def test_the_rate_rises_to_one_and_falls_to_zero_and_never_turns_in_between(total, warmup, schedule):
    factors = [learning_rate_factor(step, total, warmup, schedule) for step in range(total + 1)]
    assert factors[warmup] == 1
    assert factors[-1] == pytest.approx(0, abs=1e-12)
    assert all(0 < factor <= 1 for factor in factors[:-1])
    rising, falling = factors[: warmup + 1], factors[warmup:]
    assert all(a < b for a, b in pairwise(rising))
    assert all(a > b for a, b in pairwise(falling))


def test_the_rise_is_linear_and_the_fall_a_cosine():
    factors = [learning_rate_factor(step, 12, 3) for step in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[3 + 3] == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    assert [learning_rate_factor(step, 10, 2) for step in (2, 6, 10)] == pytest.approx([1, 0.5, 0])


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"schedule": "linear"}, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0]),
        ({"schedule": "linear", "final": 0.2}, [1 / 3, 2 / 3, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "cosine", "final": 0.2}, [1 / 3, 2 / 3, 1, None, 0.6, None, 0.2]),
        ({"schedule": "constant"}, [1 / 3, 2 / 3, 1, 1, 1, 1, 1]),
        ({"schedule": "constant", "cooldown": 1 / 3}, [1 / 3, 2 / 3, 1, 1, 1, 0.5, 0]),
        ({"schedule": "constant", "cooldown": 1 / 3, "final": 0.5}, [1 / 3, 2 / 3, 1, 1, 1, 0.75, 0.5]),
        ({"schedule": "constant", "cooldown": 2 / 3}, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0]),
    ],
)
def test_every_shape_by_hand(options, expected):
    found = [learning_rate_factor(step, 6, 2, **options) for step in range(7)]
    for value, by_hand in zip(found, expected, strict=True):
        assert by_hand is None or value == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize(
    "options, end",
    [({}, 0), ({"schedule": "linear", "final": 0.3}, 0.3), ({"schedule": "constant"}, 1),
     ({"schedule": "constant", "cooldown": 0.5}, 0)],
)  # fmt: skip
def test_steps_past_the_end_keep_the_rate_that_it_ended_with(options, end):
    assert learning_rate_factor(15, 10, 1, **options) == pytest.approx(end, abs=1e-12)


@pytest.mark.parametrize(
    "warmup, unit, steps",
    [(0.1, "share", 20), (0.0, "share", 0), (30, "steps", 30), (1280, "samples", 20), (0.5, "epochs", 15),
     (3, "epochs", 90)],
)  # fmt: skip
def test_warmup_may_be_a_share_or_steps_or_samples_or_epochs(warmup, unit, steps):
    config = OptimizerConfig(warmup=warmup, warmup_unit=unit)
    assert warmup_steps(config, total_steps=200, batch_size=64, steps_per_epoch=30) == steps


@pytest.mark.parametrize("warmup, unit", [(200, "steps"), (1e6, "samples"), (7, "epochs"), (0.999, "share")])
def test_a_run_whose_warmup_never_ends_is_refused(warmup, unit):
    config = OptimizerConfig(warmup=warmup, warmup_unit=unit)
    with pytest.raises(
        ValueError, match=rf"warmup is {re.escape(f'{warmup:g}')} \({unit}\), which is \d+ steps, and the run has 200"
    ):
        warmup_steps(config, total_steps=200, batch_size=64, steps_per_epoch=30)


@pytest.mark.parametrize("unit", ["steps", "samples", "epochs"])
def test_a_warmup_of_less_than_a_step_is_refused(unit):
    """As the default's tenth of a run is, where its unit alone was set to steps."""
    config = OptimizerConfig(warmup=0.001, warmup_unit=unit)
    with pytest.raises(ValueError, match=rf"warmup is 0\.001 \({unit}\), which is 0 steps: give it at least one step"):
        warmup_steps(config, total_steps=200, batch_size=64, steps_per_epoch=30)


def test_a_cooldown_that_begins_before_the_warmup_is_over_is_refused():
    config = OptimizerConfig(warmup=0.5, schedule="constant", cooldown=0.6)
    with pytest.raises(ValueError, match=r"cooldown 0\.6 of 200 begins before"):
        warmup_steps(config, total_steps=200, batch_size=64, steps_per_epoch=30)
    config = OptimizerConfig(warmup=0.5, schedule="constant", cooldown=0.5)
    assert warmup_steps(config, total_steps=200, batch_size=64, steps_per_epoch=30) == 100


# ---- rates by layer


def scales_by_name(model, config):
    scales = rate_scales(model, config)
    return {name: scales[id(parameter)] for name, parameter in model.named_parameters()}


def test_rates_fall_by_the_decay_from_layer_to_layer():
    """Two blocks in each tower of the tiny model, so embeddings have three layers above them."""
    scales = scales_by_name(tiny_clip(), OptimizerConfig(layer_decay=0.5))
    expected = {
        0: ("visual.proj", "visual.ln_post", "text.text_projection", "text.ln_final", "logit_scale"),
        1: ("visual.transformer.resblocks.1", "text.transformer.resblocks.1"),
        2: ("visual.transformer.resblocks.0", "text.transformer.resblocks.0"),
        3: ("visual.conv1", "visual.class_embedding", "visual.positional_embedding", "visual.ln_pre",
            "text.token_embedding", "text.positional_embedding"),
    }  # fmt: skip
    for name, scale in scales.items():
        (above,) = [above for above, starts in expected.items() if name.startswith(starts)]
        assert scale == 0.5**above, name


def test_more_than_ten_blocks_are_told_apart():
    text = TextConfig(context_length=16, width=16, layers=12, head_width=8)
    scales = scales_by_name(tiny_clip(text=text), OptimizerConfig(layer_decay=0.5))
    for block in range(12):
        assert scales[f"text.transformer.resblocks.{block}.ln_1.weight"] == 0.5 ** (12 - block)


def test_a_residual_networks_layers_are_its_bottlenecks():
    vision = VisionConfig(kind="resnet", image_size=32, width=8, blocks=(2, 1, 1, 1), head_width=32)
    scales = scales_by_name(tiny_clip(vision=vision), OptimizerConfig(layer_decay=0.5))
    expected = {"conv1": 6, "bn3": 6, "layer1.0": 5, "layer1.1": 4, "layer2.0": 3, "layer3.0": 2, "layer4.0": 1}
    for name, above in {**expected, "attnpool": 0}.items():
        found = {scale for each, scale in scales.items() if each.startswith(f"visual.{name}.")}
        assert found == {0.5**above}, name
    assert scales["visual.attnpool.positional_embedding"] == 1


@pytest.mark.parametrize("name", ["test_vit", "resnet10t", "test_convnext"])
@pytest.mark.parametrize("projection", ["linear", "classifier"])
def test_the_layers_of_timms_models_have_the_rates_that_timm_gives_them(name, projection):
    """Oracle: timm's own `param_groups_layer_decay` for the same model, whose classifier stands for our projection."""
    import timm
    from timm.optim import param_groups_layer_decay

    size = 64 if name == "resnet10t" else 160
    vision = VisionConfig(kind="timm", timm_model=name, image_size=size, timm_projection=projection)
    tower = tiny_clip(vision=vision)
    scales = scales_by_name(tower, OptimizerConfig(layer_decay=0.5))
    reference = timm.create_model(name, num_classes=7)
    theirs = {
        id(p): group["lr_scale"]
        for group in param_groups_layer_decay(reference, layer_decay=0.5)
        for p in group["params"]
    }
    ours = {name.removeprefix("visual.trunk."): scale for name, scale in scales.items()}
    classifier = {id(p) for p in reference.get_classifier().parameters()}
    body = {n: theirs[id(p)] for n, p in reference.named_parameters() if id(p) not in classifier}
    assert len(set(body.values())) > 3
    for each, scale in body.items():
        assert ours[each] == scale, each
    if projection == "linear":
        assert scales["visual.head.proj.weight"] == 1


def test_a_tower_may_be_slower_than_the_other():
    config = OptimizerConfig(kind="muon", lr=1e-3, muon_lr=0.02, image_lr_scale=0.5, text_lr_scale=0.1, layer_decay=0.5)
    model = tiny_clip()
    rates = {name: group["lr"] for group in parameter_groups(model, config) for name in names_of(model, group)}
    assert rates["logit_scale"] == 1e-3
    assert rates["visual.proj"] == 5e-4
    assert rates["text.text_projection"] == 1e-4
    assert rates["text.transformer.resblocks.0.mlp.c_fc.weight"] == 0.02 * (0.1 * 0.25)
    assert rates["visual.transformer.resblocks.1.mlp.c_fc.weight"] == 0.02 * (0.5 * 0.5)
    assert rates["visual.transformer.resblocks.1.mlp.c_fc.bias"] == 1e-3 * (0.5 * 0.5)


LAYERED = [OptimizerConfig(kind=kind, layer_decay=0.7) for kind in ("adamw", "muon")]


@pytest.mark.parametrize("config", LAYERED, ids=["adamw", "muon"])
def test_with_rates_by_layer_every_parameter_is_in_one_group_still_and_moves_by_its_rate(config):
    """Steps of both are in proportion to the rate, where nothing decays."""
    config = dataclasses.replace(config, weight_decay=0, muon_weight_decay=0, lr=1e-3)
    model, plain = tiny_clip(), tiny_clip()
    grouped = [id(parameter) for group in parameter_groups(model, config) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}
    before = {name: parameter.detach().double() for name, parameter in tiny_clip().named_parameters()}
    run(model, make_optimizer(model, config), range(1))
    run(plain, make_optimizer(plain, dataclasses.replace(config, layer_decay=1.0)), range(1))
    scales = scales_by_name(model, config)
    for (name, moved), whole in zip(model.named_parameters(), plain.parameters(), strict=True):
        expected = scales[name] * (whole.detach().double() - before[name])
        torch.testing.assert_close(moved.detach().double() - before[name], expected, rtol=1e-3, atol=1e-6, msg=name)


# ---- timm's optimisers


def timms(name, **fields):
    return OptimizerConfig(kind="timm", timm_name=name, **fields)


def test_timms_optimiser_steps_as_it_does_by_itself():
    from timm.optim import create_optimizer_v2

    ours, theirs = tiny_clip(), tiny_clip()
    config = timms("lion", lr=1e-3, weight_decay=0.3, options={"betas": [0.8, 0.95]})
    run(ours, make_optimizer(ours, config), range(4))
    optimizer = create_optimizer_v2(theirs, "lion", lr=1e-3, weight_decay=0.3, betas=(0.8, 0.95))
    run(theirs, optimizer, range(4))
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    assert not torch.equal(ours.logit_scale, tiny_clip().logit_scale)


def test_timms_optimisers_have_our_groups():
    model = tiny_clip()
    config = timms("sgd", lr=0.1, weight_decay=0.3, layer_decay=0.5, options={"momentum": 0.7})
    optimizer = make_optimizer(model, config)
    for group in optimizer.param_groups:
        assert group["momentum"] == 0.7
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.ndim >= 2 else 0)
    scales = rate_scales(model, config)
    assert {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]} == {
        each: 0.1 * scale for each, scale in scales.items()
    }


TIMMS = ["sgd", "lion", "lamb", "nadamw", "adopt", "mars", "laprop", "adafactorbv", "muon", "lookahead_adamw"]


@pytest.mark.parametrize("name", TIMMS)
def test_a_run_of_timms_resumed_from_its_state_continues_bit_for_bit(name, tmp_path):
    goes_on_bit_for_bit(timms(name, layer_decay=0.8), tmp_path / "state.pt")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"timm_name": "lionn"}, r"timm_name is 'lionn', which timm does not have; did you mean lion[,?]"),
        ({"timm_name": "my_lion"}, "timm_name is 'my_lion', which timm does not have"),
        ({"timm_name": "zzzzzzzz"}, r"it has .*adamw, "),
        ({"timm_name": "adahessian"}, "second derivatives"),
        (
            {"timm_name": "lion", "options": {"beta": 1}},
            r"timm's optimiser 'lion' refuses options \{'beta': 1\}: .*beta",
        ),
        ({"timm_name": "lion", "options": {"betas": [2.0, 0.9]}}, r"refuses options .*beta"),
        (
            {"timm_name": "adamw", "betas": [0.5, 0.6]},
            r"betas is \(0\.5, 0\.6\); kind timm does not use it; give it in op",
        ),
        (
            {"timm_name": "adamw", "eps": 1e-3},
            r"OptimizerConfig\.eps is 0\.001; kind timm does not use it; give it in options",
        ),
        ({"timm_name": "lion", "options": {"lr": 1}}, r"options has 'lr'; set OptimizerConfig\.lr"),
        ({"timm_name": ""}, r"OptimizerConfig\.timm_name is ''"),
        ({"kind": "adamw", "timm_name": "lion"}, r"OptimizerConfig\.timm_name is 'lion'; .*kind"),
        (
            {"kind": "muon", "options": {"eps": 1}},
            r"OptimizerConfig\.options is \{'eps': 1\}; only kind timm has options",
        ),
    ],
)
def test_what_timm_does_not_have_or_take_is_refused_at_once(fields, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**{"kind": "timm", **fields})


# ---- configuration


@pytest.mark.parametrize(
    "field, value",
    [
        ("kind", "sgd"),
        ("lr", 0),
        ("lr", -1e-3),
        ("lr", float("nan")),
        ("muon_lr", 0.0),
        ("warmup", 1.0),
        ("warmup", -0.1),
        ("warmup", 20),
        ("warmup_unit", "minutes"),
        ("schedule", "step"),
        ("cooldown", 1.5),
        ("final_lr", -0.1),
        ("layer_decay", 0.0),
        ("layer_decay", 1.1),
        ("image_lr_scale", 0),
        ("text_lr_scale", -1.0),
        ("weight_decay", -0.1),
        ("muon_weight_decay", float("nan")),
        ("muon_momentum", 1.0),
    ],
)
def test_a_bad_field_is_refused_naming_it_and_its_value(field, value):
    with pytest.raises(ValueError, match=rf"OptimizerConfig\.{field} is {value!r};"):
        OptimizerConfig(**{field: value})


def test_an_unknown_kind_is_answered_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"valid are adamw, muon, timm$"):
        OptimizerConfig(kind="lion")


def test_what_would_have_no_effect_is_refused():
    with pytest.raises(ValueError, match=r"cooldown is 0\.2; a cosine schedule has none"):
        OptimizerConfig(cooldown=0.2)
    with pytest.raises(ValueError, match=r"final_lr is 0\.2; a constant schedule needs a cooldown to fall"):
        OptimizerConfig(schedule="constant", final_lr=0.2)
    with pytest.raises(ValueError, match=r"warmup is -5; it must be 0 or more"):
        OptimizerConfig(warmup=-5, warmup_unit="steps")


def test_betas_from_a_yaml_list_compare_equal():
    assert OptimizerConfig(betas=[0.9, 0.98]) == OptimizerConfig()


def test_the_tiny_model_has_all_kinds_of_shapes():
    """Else the tests above would say less than they seem to."""
    shapes = {tuple(parameter.shape) for parameter in block_matrices(tiny_clip())}
    width = tiny_config().text.width
    assert shapes == {(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)}


@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_an_overflow_in_mixed_precision_leaves_the_weights_alone(config):
    model = tiny_clip()
    optimizer = make_optimizer(model, config)
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- a run by the command line


def rates(run_folder):
    """The rates that each group ended with, and what the schedule began with."""
    saved = torch.load(run_folder / "checkpoints/last.ckpt", weights_only=True)
    groups = saved["optimizer_states"][0]["param_groups"]
    return saved["global_step"], [group["lr"] for group in groups], [group["initial_lr"] for group in groups]


@pytest.mark.long
def test_a_run_may_be_as_long_as_so_many_samples(data, tmp_path):
    """Batches of 12: 50 samples begin the fifth."""
    trainer.main(arguments(data, tmp_path / "run", "--max_samples=50", steps=-1))
    step, ends, begins = rates(tmp_path / "run")
    assert step == 5
    assert ends == pytest.approx([0.0] * len(begins), abs=1e-12)
    again = tmp_path / "run/logs/version_0/config.yaml"
    trainer.main(["fit", f"--config={again}", "--overwrite=true"])  # the configuration that a run keeps can be run
    assert rates(tmp_path / "run")[0] == 5


PRESET = ["--trainer.max_steps=-1", "--trainer.max_epochs=2"]  # of 40 pairs, in batches of 12 or 8


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "more, steps, message",
    [
        ([*PRESET], 7, "an epoch is 40 samples in 3.3 steps: each once\nthe run is 7 steps: 84 samples, 2.1 epochs\n"),
        (
            [*PRESET, "--data.batch_size=8"],
            10,
            "40 samples in 5 steps: each once\nthe run is 10 steps: 80 samples, 2.0",
        ),
        ([*PRESET, "--data.batch_size=32"], 3, "the run is 3 steps: 96 samples, 2.4 epochs\n"),  # and not two
        (
            [*PRESET, "--max_samples=50"],
            5,
            "60 samples, 1.5 epochs; max_samples 50 ends it before trainer.max_epochs 2\n",
        ),
        ([*PRESET, "--max_samples=5000"], 7, "; trainer.max_epochs 2 ends it before max_samples 5,000\n"),
        ([*PRESET[1:], "--trainer.max_steps=4"], 4, "; trainer.max_steps 4 ends it before trainer.max_epochs 2\n"),
        (["--trainer.max_steps=4"], 4, "the run is 4 steps: 48 samples, 1.2 epochs\n"),
    ],
)
def test_a_run_of_epochs_goes_through_all_their_samples_and_says_how_long_it_is(
    data, tmp_path, capsys, recwarn, more, steps, message
):
    trainer.main(arguments(data, tmp_path / "run", "--data.val=null", *more))
    told = [str(each.message) for each in recwarn if issubclass(each.category, UserWarning)]
    assert not any("across ranks" in text for text in told), told  # of a validation that nobody asked for
    out = capsys.readouterr().out
    assert message in out
    assert f"run: new, {steps} steps" in out
    step, ends, _ = rates(tmp_path / "run")
    assert step == steps
    assert ends == pytest.approx([0.0] * len(ends), abs=1e-12)  # the schedule has the same end


def test_the_schedule_is_the_one_that_the_run_was_told(data, tmp_path):
    flags = ["--model.optimizer.schedule=linear", "--model.optimizer.final_lr=0.25", "--model.optimizer.warmup=24"]
    trainer.main(arguments(data, tmp_path / "run", *flags, "--model.optimizer.warmup_unit=samples", steps=6))
    step, ends, begins = rates(tmp_path / "run")
    assert (step, begins) == (6, [0.01, 0.01])
    assert ends == pytest.approx([0.0025, 0.0025])


@pytest.mark.parametrize(
    "more, message",
    [
        (["--max_samples=50"], "max_samples is 50 and trainer.max_steps 10; only one of the two"),
        (["--max_samples=0", "--trainer.max_steps=-1"], "max_samples"),
        (
            ["--model.optimizer.warmup=10", "--model.optimizer.warmup_unit=steps"],
            "warmup is 10 (steps), which is 10 steps, and the run has 10",
        ),
        (
            ["--model.optimizer.warmup=2", "--model.optimizer.warmup_unit=epochs", "--trainer.max_epochs=2"],
            "warmup is 2 (epochs), which is 7 steps, and the run has 7",  # of 12 pairs, and an epoch has 40
        ),
        (["--model.optimizer.warmup_unit=minutes"], "minutes"),
        (["--model.optimizer.kind=timm", "--model.optimizer.timm_name=lionn"], "did you mean lion"),
        (
            [
                "--model.optimizer.kind=timm",
                "--model.optimizer.timm_name=lion",
                '--model.optimizer.options={"beta": 1}',
            ],
            "timm's optimiser 'lion' refuses options {'beta': 1}",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_is_removed(data, tmp_path, capsys, more, message):
    run_folder = tmp_path / "run"
    (run_folder / "best").mkdir(parents=True)
    (run_folder / "best/kept").write_text("")
    said = runs.fails(capsys, [*arguments(data, run_folder, "--overwrite=true"), *more])
    assert message in said
    assert "Traceback" not in said
    assert (run_folder / "best/kept").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [
        ["timm", "--model.optimizer.timm_name=lion", '--model.optimizer.options={"betas": [0.9, 0.98]}'],
        ["timm", "--model.optimizer.timm_name=adopt", "--model.optimizer.options.eps=1e-6"],
        ["muon", "--model.optimizer.layer_decay=0.8", "--model.optimizer.schedule=constant"],
    ],
    ids=["lion", "adopt", "muon by layers"],
)
def test_a_run_of_any_optimiser_resumes_to_the_same_bits(data, tmp_path, flags):
    flags = [f"--model.optimizer.kind={flags[0]}", *flags[1:], "--model.optimizer.lr=0.001"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    trainer.main(arguments(data, whole, *flags, steps=6))
    stop = f'[{{"class_path": "{runs.__name__}.StopAt", "init_args": {{"step": 3}}}}]'
    with pytest.raises(SystemExit):
        trainer.main(arguments(data, broken, *flags, f"--trainer.callbacks={stop}", steps=6))
    trainer.main(arguments(data, broken, *flags, "--ckpt_path=last", steps=6))
    expected, found = runs.state(whole), runs.state(broken)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


class GradientNorms(Callback):
    """The norm of all gradients that the optimiser stepped by, in `seen` by step."""

    seen: dict[int, float]

    def __init__(self) -> None:
        GradientNorms.seen = {}

    def on_train_start(self, trainer, module) -> None:
        (optimizer,) = trainer.optimizers
        optimizer.register_step_post_hook(lambda optimizer, *_: self.keep(trainer.global_step, optimizer))

    def keep(self, step, optimizer) -> None:
        """Muon calls AdamW's step within its own, so this is called twice, and the second time counts."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.seen[step] = float(torch.stack([gradient.norm() for gradient in gradients]).norm())


WATCH = f'--trainer.callbacks=[{{"class_path": "{__name__}.GradientNorms"}}]'
SCALER = {"class_path": "torch.amp.GradScaler", "init_args": {"device": "cpu", "init_scale": 1024.0}}
HALF = {"class_path": "pytorch_lightning.plugins.MixedPrecision",
        "init_args": {"precision": "16-mixed", "device": "cpu", "scaler": SCALER}}  # fmt: skip
PRECISIONS = {
    "float32": "--trainer.precision=32-true",
    "bfloat16": "--trainer.precision=bf16-mixed",
    "float16 with a scaler": f"--trainer.plugins=[{json.dumps(HALF)}]",
}


CLIPPED = [("muon", "float32"), ("adamw", "float16 with a scaler")]
OTHERS_CLIPPED = [each for each in itertools.product(["adamw", "muon", "timm"], PRECISIONS) if each not in CLIPPED]


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("kind", "precision"), [*CLIPPED, *(pytest.param(*each, marks=pytest.mark.long) for each in OTHERS_CLIPPED)]
)
def test_gradients_are_clipped_to_the_norm_asked_for(data, tmp_path, kind, precision):
    flags = [f"--model.optimizer.kind={kind}", *(["--model.optimizer.timm_name=lion"] if kind == "timm" else [])]
    flags += [WATCH, PRECISIONS[precision], "--model.optimizer.lr=0.001"]
    trainer.main(arguments(data, tmp_path / "plain", *flags, steps=3))
    plain = GradientNorms.seen
    assert len(plain) == 3
    assert all(0.1 < norm < 100 for norm in plain.values())  # a loss scaled by 1024 gives far more
    trainer.main(arguments(data, tmp_path / "run", *flags, "--trainer.gradient_clip_val=0.1", steps=3))
    assert list(GradientNorms.seen.values()) == pytest.approx([0.1] * 3, rel=1e-4)
    assert all(tensor.isfinite().all() for tensor in runs.state(tmp_path / "run").values())
