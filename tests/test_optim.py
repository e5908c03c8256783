# Oracles: torch.optim.AdamW, and Muon written once more below, matrix by matrix.

import copy
import math
from itertools import pairwise

import pytest
import torch
from helpers import tiny_clip, tiny_config

from miniclip.config import TextConfig, VisionConfig
from miniclip.optim import (
    Muon,
    OptimizerConfig,
    block_matrices,
    make_optimizer,
    orthogonalize,
    parameter_groups,
    warmup_cosine,
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
    whole, first = tiny_clip(), tiny_clip()
    run(whole, make_optimizer(whole, config), range(6))
    optimizer = make_optimizer(first, config)
    run(first, optimizer, range(3))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")

    resumed = tiny_clip(seed=9)
    optimizer = make_optimizer(resumed, config)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
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


@pytest.mark.parametrize(
    "total, warmup", [(100, 0.1), (1000, 0.25), (10, 0.5), (7, 0.0), (1, 0.0), (3, 0.1), (50, 0.98)]
)
def test_the_rate_rises_to_one_and_falls_to_zero_and_never_turns_in_between(total, warmup):
    factors = [warmup_cosine(step, total, warmup) for step in range(total + 1)]
    top = round(warmup * total)
    assert factors[top] == 1
    assert factors[-1] == pytest.approx(0, abs=1e-12)
    assert all(0 < factor <= 1 for factor in factors[:-1])
    rising, falling = factors[: top + 1], factors[top:]
    assert all(a < b for a, b in pairwise(rising))
    assert all(a > b for a, b in pairwise(falling))


def test_the_rise_is_linear_and_the_fall_a_cosine():
    factors = [warmup_cosine(step, 12, 0.25) for step in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[3 + 3] == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    assert [warmup_cosine(step, 10, 0.2) for step in (2, 6, 10)] == pytest.approx([1, 0.5, 0])


def test_steps_past_the_end_keep_the_rate_at_zero():
    assert warmup_cosine(15, 10, 0.1) == pytest.approx(0, abs=1e-12)


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
    ],
)
def test_a_bad_field_is_refused_naming_it_and_its_value(field, value):
    with pytest.raises(ValueError, match=rf"OptimizerConfig\.{field} is {value!r};"):
        OptimizerConfig(**{field: value})


def test_an_unknown_kind_is_answered_with_the_valid_ones():
    with pytest.raises(ValueError, match=r"valid are adamw, muon$"):
        OptimizerConfig(kind="lion")


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
