"""Towers in bfloat16 compute what float32's do, with 8 bits of each number. Oracle: float64 on the rounded numbers."""

import pytest
import torch
import torch.nn.functional as F
from random_weights import randomise
from torch import nn

import miniclip
from miniclip.config import TextConfig, VisionConfig
from miniclip.fast import bfloat16

TEXTS = [f"a photo of a {noun} in the {place}" for noun in ("cat", "dog") for place in ("snow", "dark old house")]
ULP = 2**-8  # of bfloat16, relative
TEXT = TextConfig(width=64, layers=2)
VISIONS = {
    "a ViT": VisionConfig(image_size=32, patch_size=8, width=64, layers=2),
    "a ResNet": VisionConfig(kind="resnet", image_size=64, width=16, blocks=(2, 1, 1, 1)),
}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(vision, activation="gelu"):
    config = miniclip.CLIPConfig(48, activation, vision=vision, text=TEXT)
    model = randomise(miniclip.CLIP(config), 0).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.copy_(draw(len(norm.running_mean), seed=1) * 0.2)
            norm.running_var.copy_(draw(len(norm.running_var), seed=2).abs() + 0.5)
    return model


def error(found, expected):
    return ((found.double() - expected.double()).abs().max() / expected.abs().max()).item()


@pytest.fixture(params=["this CPU", "one without instructions"])
def cpu(request, monkeypatch):
    if request.param != "this CPU":
        monkeypatch.setattr(bfloat16, "can_pack", lambda: False)
        monkeypatch.setattr(bfloat16, "is_fast", lambda: False)


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("activation", ["none", "gelu", "swish"])
@pytest.mark.parametrize("rows", [1, 50])
def test_a_layer_multiplies_rounded_numbers_and_rounds_once(rows, activation):
    x, weight, bias = draw(2, rows, 64), draw(96, 64, seed=1) / 8, draw(96, seed=2)
    layer = bfloat16.Linear(weight, bias, activation)
    with torch.no_grad():
        found = layer(x)
    exact = F.linear(*(each.bfloat16().double() for each in (x, weight, bias)))
    exact = {"none": exact, "gelu": F.gelu(exact), "swish": F.silu(exact)}[activation]
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= ULP * exact.abs() + 1e-5).all()
    assert error(layer(x), exact) < 2 * ULP  # with gradients PyTorch's own product, which rounds before activations


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("name", VISIONS)
def test_features_are_those_of_float32_but_for_rounding(name, activation):
    model, low = (build(VISIONS[name], activation) for _ in range(2))
    bfloat16.lower(low.visual)
    bfloat16.lower(low.text)
    side = low.visual.input_resolution
    images, tokens = draw(5, 3, side, side), miniclip.tokenize(TEXTS)
    with torch.no_grad():
        for encode, inputs in (("encode_image", images), ("encode_text", tokens)):
            found, expected = (getattr(each, encode)(inputs).float() for each in (low, model))
            assert 0 < error(found, expected) < 0.03
            assert F.cosine_similarity(found, expected).min() > 0.999
        assert error(low.visual(images, all_tokens=True), model.visual(images, all_tokens=True)) < 0.03


def test_texts_that_share_a_prefix_are_as_those_in_rows():
    model = build(VISIONS["a ViT"])
    bfloat16.lower(model.text)
    tokens = miniclip.tokenize(TEXTS)
    with torch.no_grad():
        assert error(model.encode_text(tokens), model.text(tokens)) < 0.02


def test_no_weight_of_float32_is_left_that_could_grow_stale():
    model = build(VISIONS["a ViT"])
    bfloat16.lower(model.visual)
    bfloat16.lower(model.text)
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    kept = {"visual.positional_embedding", "visual.proj", "text.positional_embedding", "text.text_projection"}
    assert matrices == {*kept, "text.token_embedding.weight"}


def test_a_hook_on_a_lowered_layer_is_called():
    model = build(VISIONS["a ViT"])
    bfloat16.lower(model.visual)
    images = draw(2, 3, 32, 32)
    with torch.no_grad():
        before = model.encode_image(images)
        model.visual.transformer.resblocks[1].mlp.c_proj.register_forward_hook(lambda *call: 2 * call[2])
        assert error(model.encode_image(images), before) > 0.1
