"""oneDNN's products are as exact as PyTorch's own, and take part only where nobody could see a difference.

Oracles: float64, and PyTorch's own functions.
"""

import copy
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import miniclip
from miniclip.config import TextConfig, VisionConfig
from miniclip.fast import matmul

EXACT = 2e-6  # of the largest number
needs_onednn = pytest.mark.skipif(not matmul.is_exact(), reason="this PyTorch has no oneDNN that is exact here")


@pytest.fixture(autouse=True)
def onednn():
    """Every product that may go to oneDNN does."""
    if not matmul.is_exact():
        yield
        return
    with matmul.using(matmul.ONEDNN):
        yield


def apart(found, expected):
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(found, expected):
    """Whether all bits are equal; those of the two libraries are not, in sums of this length."""
    return torch.equal(found, expected)


LAYOUTS = {
    "rows": lambda: draw(700, 768),
    "a batch of rows": lambda: draw(7, 100, 768),
    "columns of more": lambda: draw(700, 1000)[:, 50:818],
    "transposed": lambda: draw(768, 700).mT,
    "one row for all": lambda: draw(1, 768).expand(700, 768),
    "some tokens of each": lambda: draw(20, 50, 768)[:, 3:38],
}


@pytest.mark.sample(2)
@needs_onednn
@pytest.mark.parametrize(
    "layout, has_bias",
    [*((name, True) for name in LAYOUTS), *(pytest.param(name, False, marks=pytest.mark.long) for name in LAYOUTS)],
)
def test_a_product_and_its_gradients_are_those_of_float64(layout, has_bias):
    x, weight, bias = LAYOUTS[layout](), draw(160, 768, seed=1)[:128], draw(128, seed=2) if has_bias else None
    inputs = [each.requires_grad_() for each in (x, weight, bias) if each is not None]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    direction = draw(*x.shape[:-1], 128, seed=3)
    found, expected = matmul.linear(*inputs), F.linear(*exact)
    assert not same(found, F.linear(*inputs))
    assert apart(found, expected) < EXACT
    ours, theirs = (
        torch.autograd.grad(found, inputs, direction),
        torch.autograd.grad(expected, exact, direction.double()),
    )
    for ours_, theirs_ in zip(ours, theirs, strict=True):
        assert apart(ours_, theirs_) < EXACT
    for some in torch.autograd.grad(matmul.linear(*inputs).sum(), inputs):  # a gradient that is one number everywhere
        assert some.isfinite().all()


@pytest.mark.sample(1)
@needs_onednn
@pytest.mark.parametrize(
    "shape, adds",
    [
        ((1100, 2100, 64), False),
        ((2500, 40, 1100), True),
        pytest.param((64, 3000, 1500), False, marks=pytest.mark.long),
        pytest.param((64, 3000, 1500), True, marks=pytest.mark.long),
        pytest.param((1100, 2100, 64), True, marks=pytest.mark.long),
        pytest.param((2500, 40, 1100), False, marks=pytest.mark.long),
    ],
)
def test_a_product_into_memory_that_is_there_is_that_of_float64(shape, adds):
    N, M, K = shape
    a, b, out = draw(N, K), draw(M, K, seed=1).mT, draw(N, M, seed=2)
    expected = a.double() @ b.double() + adds * out.double()
    matmul.product_into(out, a, b, adds)
    assert apart(out, expected) < EXACT


def tiny(**vision):
    torch.manual_seed(0)
    vision = VisionConfig(**{"image_size": 32, "patch_size": 8, "width": 256, "layers": 1, **vision})
    return miniclip.CLIP(miniclip.CLIPConfig(64, vision=vision, text=TextConfig(width=256, layers=1)))


MODELS = {
    "a ViT": lambda: tiny(),
    "with QuickGELU": lambda: miniclip.CLIP(
        miniclip.CLIPConfig(64, "quick_gelu", VisionConfig(image_size=32, patch_size=8, width=256, layers=1),
                            TextConfig(width=256, layers=1))
    ),
    "a ResNet": lambda: tiny(kind="resnet", image_size=64, width=32, blocks=(1, 1, 1, 1)),
}  # fmt: skip


@pytest.mark.sample(2)
@needs_onednn
@pytest.mark.parametrize("is_training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_towers_and_loss_give_the_numbers_that_they_give_by_mkl(name, is_training):
    torch.manual_seed(0)
    model = MODELS[name]().train(is_training)
    side = model.visual.input_resolution
    images, tokens = draw(64, 3, side, side), miniclip.tokenize([f"a photo of {n} cats" for n in range(64)])

    def outcome():
        model.zero_grad()
        with torch.set_grad_enabled(is_training):
            features = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
            loss = miniclip.clip_loss(*features, 10.0)
        if is_training:
            loss.backward()
        return [*features, loss, *(p.grad for p in model.parameters() if p.grad is not None)]

    found = outcome()
    with matmul.using(matmul.MKL):
        expected = outcome()
    assert not same(found[0], expected[0])
    largest = max(each.abs().max() for each in expected[3:]) if is_training else 1
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        scale = theirs.abs().max() if number < 3 else largest  # a gradient may be 0 but for rounding
        # Batch norms over few positions divide by small deviations.
        assert (ours - theirs).abs().max() / scale < (EXACT if name != "a ResNet" else 1e-4)


@needs_onednn
@pytest.mark.long
def test_a_resnet_in_training_is_as_far_from_float64_as_by_mkl():
    """Batch norms over few positions divide by small deviations, so the yardstick is float32's own error."""
    torch.manual_seed(0)
    model = MODELS["a ResNet"]().train()
    exact = copy.deepcopy(model).double()
    images = draw(48, 3, 64, 64)

    def gradients(model, images):
        model.zero_grad()
        features = model.encode_image(images)
        (features * draw(*features.shape, seed=3).to(features)).sum().backward()
        return [features.detach(), *(each.grad for each in model.visual.parameters())]

    truth = gradients(exact, images.double())
    found = gradients(model, images)
    with matmul.using(matmul.MKL):
        by_mkl = gradients(model, images)
    assert not same(found[0], by_mkl[0])
    largest = max(each.abs().max() for each in truth[1:])
    for ours, theirs, expected in zip(found, by_mkl, truth, strict=True):
        scale = expected.abs().max() if expected is truth[0] else largest
        ours, theirs = (((each - expected).abs().max() / scale).item() for each in (ours, theirs))
        assert ours < max(EXACT, 2 * theirs)


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


X, WEIGHT, BIAS = draw(700, 768), draw(128, 768, seed=1), draw(128, seed=2)
INPUTS = X, WEIGHT, BIAS


def within(context):
    def compute(linear):
        with context():
            return linear(*INPUTS)

    return compute


@contextmanager
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def exported(linear):
    class Layer(nn.Module):
        def forward(self, x):
            return linear(x, WEIGHT, BIAS)

    return torch.export.export(Layer(), (X,)).module()(X)


def derivative(linear):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, X.flip(0))
        return torch.cat(list(torch.autograd.forward_ad.unpack_dual(linear(dual, WEIGHT, BIAS))))


ELSEWHERE = {
    "a mode that watches operations": within(Seen),
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "deterministic algorithms": within(deterministic),
    "oneDNN switched off": within(lambda: torch.backends.mkldnn.flags(enabled=False)),
    "a run by MKL": within(lambda: matmul.using(matmul.MKL)),
    "torch.compile": lambda linear: torch.compile(linear, backend="eager", fullgraph=True)(*INPUTS),
    "torch.export": exported,
    "torch.jit.trace": lambda linear: torch.jit.trace(linear, INPUTS)(*INPUTS),
    "torch.func.grad": lambda linear: torch.func.grad(lambda w: linear(X, w, BIAS).square().sum())(WEIGHT),
    "torch.func.vmap": lambda linear: torch.func.vmap(lambda x: linear(x, WEIGHT, BIAS))(X.view(2, 350, 768)),
    "a forward-mode derivative": derivative,
    "float64": lambda linear: linear(*(each.double() for each in INPUTS)),
    "bfloat16": lambda linear: linear(*(each.bfloat16() for each in INPUTS)),
    "a small product": lambda linear: linear(X[:40], WEIGHT, BIAS),
    "two rows": lambda linear: linear(draw(2, 4096), draw(2048, 4096)),
    "tensors without memory": lambda linear: linear(*(each.to("meta") for each in INPUTS)),
}


@needs_onednn
@pytest.mark.parametrize("what", ELSEWHERE)
@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_everything_else_goes_pytorchs_way(what):
    assert not same(matmul.linear(*INPUTS), F.linear(*INPUTS))
    found, expected = ELSEWHERE[what](matmul.linear), ELSEWHERE[what](F.linear)
    assert found.dtype == expected.dtype
    assert found.is_meta or same(found, expected)


@needs_onednn
def test_gradients_can_be_differentiated():
    found = []
    for linear in (matmul.linear, F.linear):
        x, weight, bias = (each.clone().requires_grad_() for each in (X, WEIGHT, BIAS))
        first = torch.autograd.grad(linear(x, weight, bias).square().sum(), [x, weight, bias], create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), [x, weight, bias]))
    for ours, theirs in zip(*found, strict=True):
        assert apart(ours, theirs) < 1e-5


@needs_onednn
def test_gradients_of_several_directions_at_once_are_those_of_each():
    x, weight = X.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    directions = draw(3, 700, 128, seed=5)
    out = matmul.linear(x, weight)
    for ours, theirs in zip(
        torch.autograd.grad(out, [x, weight], directions, is_grads_batched=True, retain_graph=True),
        zip(*(torch.autograd.grad(out, [x, weight], one, retain_graph=True) for one in directions), strict=True),
        strict=True,
    ):
        assert apart(ours, torch.stack(theirs)) < EXACT


@needs_onednn
def test_a_layer_with_a_hook_or_of_another_class_is_called():
    layer, heard = nn.Linear(768, 128), []
    layer.register_forward_hook(lambda *_: heard.append("hook"))
    matmul.layer(layer, X)
    assert heard == ["hook"]
    for other in (nn.utils.parametrizations.weight_norm(nn.Linear(768, 128)), nn.Sequential(nn.Linear(768, 128))):
        assert torch.equal(matmul.layer(other, X), other(X))
    layer = nn.Linear(768, 128)
    assert not same(matmul.layer(layer, X), layer(X))


def run(code, **environment):
    quiet = {name: value for name, value in os.environ.items() if name != matmul.VARIABLE} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=quiet)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "name, expected",
    [("mkl", "mkl"), pytest.param("onednn", "onednn", marks=needs_onednn), ("", matmul.library()), ("blas", "'blas'")],
)
def test_an_environment_variable_overrides(name, expected):
    done = run("from miniclip.fast import matmul; print(matmul.library())", MINICLIP_PRODUCTS=name)
    if name != "blas":
        assert done.stdout.strip() == expected
        return
    assert "MINICLIP_PRODUCTS is 'blas'; valid are mkl and onednn" in done.stderr


@needs_onednn
@pytest.mark.parametrize(
    "vendor, family, capability, expected",
    [
        pytest.param("AuthenticAMD", 26, "AVX512", "onednn", id="Zen 5"),
        pytest.param("AuthenticAMD", 25, "AVX512", "onednn", id="Zen 4"),
        pytest.param("AuthenticAMD", 25, "AVX2", "mkl", id="Zen 3, of the same family"),
        pytest.param("AuthenticAMD", 27, "AVX512", "mkl", id="AMD's next, which nobody measured"),
        pytest.param("GenuineIntel", 6, "AVX512", "mkl", id="Intel"),
    ],
)
def test_the_library_is_a_fact_of_the_cpu(vendor, family, capability, expected, tmp_path, monkeypatch):
    facts = tmp_path / "cpuinfo"
    facts.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 17\n")
    monkeypatch.setattr(matmul, "Path", lambda _: facts)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.delenv(matmul.VARIABLE, raising=False)
    monkeypatch.setattr(matmul, "_choice", None)
    assert matmul.library() == expected
