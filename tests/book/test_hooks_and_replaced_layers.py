"""Hooks fire, replaced and wrapped layers are called: a fast path acts on untouched modules alone.

Oracles: open_clip with the same weights and the same change, or the same change's closed form.
"""

import copy
from dataclasses import replace

import peft
import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, LayerGradCam, LayerIntegratedGradients
from test_model import EOT, TINY, assert_equal, open_clip_twin, random_images, random_tokens
from test_resnet import TINY as TINY_RESNETS
from test_resnet import images as resnet_images
from test_resnet import twins as resnet_twins
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune

from miniclip.config import CLIPConfig, VisionConfig
from miniclip.model import CLIP, QuickGELU

LAST = TINY.text.vocab_size - 1  # open_clip reads a text at its largest id
VIT = replace(TINY, activation="quick_gelu", text=replace(TINY.text, eot_token=LAST))
RESNET, RESNET_EMBED_DIM = TINY_RESNETS["several blocks"]


@pytest.fixture
def vits():
    ours, theirs = open_clip_twin(VIT, seed=5)
    return ours.eval(), theirs.eval()


@pytest.fixture
def resnets():
    ours, theirs = resnet_twins(RESNET, RESNET_EMBED_DIM)
    return ours.eval(), theirs.eval()


def tokens_for_open_clip(lengths=(5, 9, 77)):
    tokens = random_tokens(list(lengths))
    tokens[tokens == EOT] = LAST
    return tokens


def tiny_resnet_clip():
    torch.manual_seed(0)
    vision = VisionConfig(kind="resnet", image_size=64, width=8, blocks=(1, 2, 1, 1))
    model = CLIP(CLIPConfig(8, vision=vision, text=TINY.text)).double().eval()
    for module in model.visual.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def outputs(root, names, call):
    """{name: what each call of that module gave}, for one run of `call`."""
    seen = {name: [] for name in names}

    def record(name):
        return lambda _, inputs, out: seen[name].append((out[0] if isinstance(out, tuple) else out).detach().clone())

    handles = [root.get_submodule(name).register_forward_hook(record(name)) for name in names]
    call()
    for handle in handles:
        handle.remove()
    return seen


def shared_names(ours, theirs):
    """The modules that both have; open_clip computes attention and its pool without calling the layers in them."""
    both = {name for name, _ in ours.named_modules()} & {name for name, _ in theirs.named_modules()} - {""}
    inside = (".out_proj", ".q_proj", ".k_proj", ".v_proj", "attnpool.c_proj")
    return sorted(name for name in both if not name.endswith(inside) and not _is_a_list(ours.get_submodule(name)))


def _is_a_list(module):
    is_empty = isinstance(module, nn.Sequential) and not len(module)  # a shortcut without a convolution
    return is_empty or isinstance(module, nn.ModuleList)


def assert_heard_alike(ours, theirs, call_ours, call_theirs):
    names = shared_names(ours, theirs)
    found, expected = outputs(ours, names, call_ours), outputs(theirs, names, call_theirs)
    assert len(names) > 10
    for name in names:
        assert len(found[name]) == len(expected[name]) == 1, name
        assert_equal(found[name][0], expected[name][0])
    for name in names:  # and each of them alone
        assert_equal(outputs(ours, [name], call_ours)[name][0], expected[name][0])


# ---- hooks


@torch.no_grad()
def test_a_hook_on_any_module_of_a_vit_sees_what_it_sees_in_open_clip(vits):
    ours, theirs = vits
    images = random_images(3, 24)
    assert_heard_alike(
        ours.visual, theirs.visual, lambda: ours.encode_image(images), lambda: theirs.encode_image(images)
    )


@torch.no_grad()
def test_a_hook_on_any_module_of_the_text_tower_sees_what_it_sees_in_open_clip(vits):
    ours, theirs = vits
    tokens = tokens_for_open_clip()
    assert_heard_alike(ours.text, theirs, lambda: ours.encode_text(tokens), lambda: theirs.encode_text(tokens))


@torch.no_grad()
def test_a_hook_on_any_module_of_a_resnet_sees_what_it_sees_in_open_clip(resnets):
    ours, theirs = resnets
    images = resnet_images(2, RESNET.image_size)
    assert_heard_alike(ours, theirs, lambda: ours(images), lambda: theirs(images))


@pytest.mark.parametrize("name", ["relu1", "layer2.0.relu2", "layer4.0.relu3", "avgpool", "layer2.0.avgpool"])
@torch.no_grad()
def test_a_hook_on_a_relu_or_pool_of_a_resnet_fires(resnets, name):
    assert len(outputs(resnets[0], [name], lambda: resnets[0](resnet_images(1, RESNET.image_size)))[name]) == 1


@pytest.mark.parametrize("name", ["conv1", "transformer.resblocks.2", "transformer.resblocks.0.mlp.c_fc", "ln_post"])
def test_pre_hooks_and_backward_hooks_fire_too(vits, name):
    model, heard = vits[0], []
    module = model.visual.get_submodule(name)
    module.register_forward_pre_hook(lambda *_: heard.append("before"))
    module.register_full_backward_pre_hook(lambda *_: heard.append("gradient"))
    module.register_full_backward_hook(lambda *_: heard.append("gradients"))
    model.encode_image(random_images(2, 24).requires_grad_()).sum().backward()
    assert heard == ["before", "gradient", "gradients"]


@torch.no_grad()
def test_a_hook_for_all_modules_fires_for_each_of_them(vits, resnets):
    for tower, images in ((vits[0].visual, random_images(1, 24)), (resnets[0], resnet_images(1, RESNET.image_size))):
        called = set()
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_, called=called: called.add(module))
        tower(images)
        handle.remove()
        unused = {module for module in tower.modules() if isinstance(module, nn.ModuleList)}
        assert called == set(tower.modules()) - unused


@pytest.mark.parametrize("kind", ["pre", "forward", "backward"])
def test_a_hook_for_all_modules_sees_what_it_sees_in_open_clip(vits, kind):
    ours, theirs = vits
    images, tokens = random_images(3, 24), tokens_for_open_clip()
    found = _heard_by_all(ours, kind, lambda: ours.encode_image(images), lambda: ours.encode_text(tokens))
    expected = _heard_by_all(theirs, kind, lambda: theirs.encode_image(images), lambda: theirs.encode_text(tokens))
    both = [name for name in found.keys() & expected.keys() if not name.endswith(".out_proj")]
    assert len(both) > 20
    for name in both:
        assert_equal(found[name], expected[name])


def _heard_by_all(model, kind, *calls):
    """{open_clip's name of a module: the tensor that a hook of PyTorch's for all modules saw there}"""
    names, heard = {module: name.removeprefix("text.") for name, module in model.named_modules()}, {}
    register = {
        "pre": nn.modules.module.register_module_forward_pre_hook,
        "forward": nn.modules.module.register_module_forward_hook,
        "backward": nn.modules.module.register_module_full_backward_hook,
    }[kind]

    def hear(module, *seen):
        value = seen[-1][0] if isinstance(seen[-1], tuple) and seen[-1] else seen[-1]
        if module in names and isinstance(value, torch.Tensor):
            heard[names[module]] = value.detach()

    handle = register(hear)
    try:
        for call in calls:
            call().sum().backward()
    finally:
        handle.remove()
    return heard


@torch.no_grad()
def test_a_hook_may_change_what_a_module_gives(vits):
    ours, theirs = vits
    images = random_images(2, 24)
    for model in (ours, theirs):
        model.visual.conv1.register_forward_hook(lambda _, inputs, out: 2 * out)
    assert_equal(ours.encode_image(images), theirs.encode_image(images))


# ---- layers that somebody replaced, wrapped or pruned


class Sine(nn.Module):
    """A layer of the user's around one of ours."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, **mask):  # open_clip gives its blocks a mask
        return self.layer(x, **mask).sin()


def replace_module(root, name, change):
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, change(root.get_submodule(name)))


@pytest.mark.parametrize(
    "name", ["conv1", "ln_pre", "transformer.resblocks.0", "transformer.resblocks.2", "transformer.resblocks.1.mlp",
             "transformer.resblocks.1.mlp.c_fc", "transformer.resblocks.2.mlp.c_proj", "ln_post"],
)  # fmt: skip
@torch.no_grad()
def test_a_wrapped_layer_of_a_vit_is_called(vits, name):
    images = random_images(2, 24)
    before = vits[0].encode_image(images)
    for model in vits:
        replace_module(model.visual, name, Sine)
    found = vits[0].encode_image(images)
    assert_equal(found, vits[1].encode_image(images))
    assert not torch.allclose(found, before)


class _InOpenClip(nn.Module):
    """A layer that knows nothing of masks, where open_clip gives its blocks one."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, attn_mask=None):
        if isinstance(self.layer, nn.Sequential):
            return self.layer[1](self.layer[0](x, attn_mask=attn_mask))
        return self.layer(x)

    def get_weight_dtype(self):
        return torch.double


TORCHS_OWN = {  # what mixes tokens, and what takes no `pool`
    "ln_1": lambda old: nn.Softmax(dim=1),
    "ln_2": lambda old: nn.Softmax(dim=1),
    "mlp": lambda old: nn.Sequential(old, nn.Softmax(dim=1)),
    "": lambda old: nn.Sequential(old, nn.GELU()),
    "none": lambda old: nn.Identity(),
}


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("part", TORCHS_OWN)
@torch.no_grad()
def test_a_layer_of_pytorchs_may_mix_tokens_or_stand_in_for_a_block(vits, part, block):
    ours, theirs = vits
    for model, towers in ((ours, (ours.visual, ours.text)), (theirs, (theirs.visual, theirs))):
        for tower in towers:
            name = f"transformer.resblocks.{block}.{part}".removesuffix(".none").removesuffix(".")
            new = TORCHS_OWN[part](tower.get_submodule(name))
            is_block_of_open_clip = model is theirs and part in ("", "none")
            replace_module(
                tower, name, lambda _, new=new, wrap=is_block_of_open_clip: _InOpenClip(new) if wrap else new
            )
    images, tokens = random_images(3, 24), tokens_for_open_clip()
    assert_equal(ours.encode_image(images), theirs.encode_image(images))
    assert_equal(ours.encode_text(tokens), theirs.encode_text(tokens))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("part", ["ln_1", "ln_2"])
@torch.no_grad()
def test_a_norm_over_tokens_gets_them_all(vits, part, norm):
    for model in vits:
        text = model.text if model is vits[0] else model
        for tower, num_tokens in ((model.visual, 10), (text, 77)):
            width = tower.get_submodule(f"transformer.resblocks.2.{part}").normalized_shape[0]
            replace_module(
                tower, f"transformer.resblocks.2.{part}", lambda _, N=num_tokens, D=width: norm((N, D)).double()
            )
    images, tokens = random_images(3, 24), tokens_for_open_clip()
    assert_equal(vits[0].encode_image(images), vits[1].encode_image(images))
    assert_equal(vits[0].encode_text(tokens), vits[1].encode_text(tokens))


@torch.no_grad()
def test_a_transformer_that_takes_tokens_alone_may_stand_in_for_ours(vits):
    model, images, tokens = vits[0], random_images(2, 24), tokens_for_open_clip()
    expected = model.encode_image(images), model.encode_text(tokens)
    for tower in (model.visual, model.text):
        tower.transformer = nn.Sequential(*tower.transformer.resblocks)
    assert_equal(model.encode_image(images), expected[0])
    assert_equal(model.encode_text(tokens), expected[1])


@torch.no_grad()
def test_a_function_in_place_of_pytorchs_attention_sees_every_token(vits, monkeypatch):
    ours, theirs = vits
    images, tokens = random_images(2, 24), tokens_for_open_clip()
    expected, seen = (theirs.encode_image(images), theirs.encode_text(tokens)), []
    attention = F.scaled_dot_product_attention

    def watched(q, k, v, **options):
        seen.append((q.shape[2], k.shape[2]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for found, wanted in zip((ours.encode_image(images), ours.encode_text(tokens)), expected, strict=True):
        assert_equal(found, wanted)
    assert seen == 3 * [(10, 10)] + 3 * [(77, 77)]


@torch.no_grad()
def test_a_forward_that_was_put_into_the_class_is_called(vits, monkeypatch):
    model, images = vits[0], random_images(2, 24)
    twice = copy.deepcopy(model)
    for module in twice.modules():
        if type(module) is nn.Linear:
            module.weight.mul_(2)
            module.bias.mul_(2)
    expected = twice.encode_image(images)
    monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: 2 * F.linear(x, layer.weight, layer.bias))
    assert_equal(model.encode_image(images), expected)


@torch.no_grad()
def test_an_activation_derived_from_ours_is_called(vits):
    class Halved(QuickGELU):
        def forward(self, x):
            return super().forward(x) / 2

    model, images = vits[0], random_images(2, 24)
    other = copy.deepcopy(model)
    for block in model.visual.transformer.resblocks:
        block.mlp.activation = Halved()
    for block in other.visual.transformer.resblocks:
        block.mlp.c_proj.weight.div_(2)
    assert_equal(model.encode_image(images), other.encode_image(images))


@torch.no_grad()
def test_an_image_tower_of_ones_own_takes_what_it_takes(vits):
    model, _ = vits
    model.visual = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(model.dtype)
    images = torch.randn(2, 3, 24, 40)
    assert torch.equal(model.encode_image(images), model.visual(images.to(model.dtype)))
    with pytest.raises(ValueError, match=r"images have the shape \(2, 1, 8, 8\); this model takes \(N, 3, H, W\)"):
        model.encode_image(torch.randn(2, 1, 8, 8))


def test_a_text_tower_that_sees_ahead_is_neither_packed_nor_cut(vits):
    model, tokens = vits[0], tokens_for_open_clip((5, 9, 30))
    for block in model.text.transformer.resblocks:
        block.attn.is_causal = False
    assert_equal(model.encode_text(tokens), model.text(tokens))
    changed = tokens.clone()
    changed[0, 40] = 7  # behind the end of the text, where it sees now
    assert not torch.allclose(model.encode_text(changed)[0], model.encode_text(tokens)[0])


@torch.no_grad()
def test_attention_may_be_without_biases(vits):
    ours, theirs = vits
    for tower in (ours.visual, ours.text, theirs.visual, theirs):
        for block in tower.transformer.resblocks:
            block.attn.in_proj_bias = block.attn.out_proj.bias = None
    images, tokens = random_images(2, 24), tokens_for_open_clip()
    assert_equal(ours.encode_image(images), theirs.encode_image(images))
    assert_equal(ours.encode_text(tokens), theirs.encode_text(tokens))


@pytest.mark.parametrize("name", ["conv1", "bn1", "layer2.0.conv2", "layer2.0.bn3", "layer2.0.downsample",
                                  "layer3.0.downsample.0", "layer1", "layer4.1"])  # fmt: skip
@torch.no_grad()
def test_a_wrapped_layer_of_a_resnet_is_called(resnets, name):
    images = resnet_images(2, RESNET.image_size)
    before = resnets[0](images)
    for model in resnets:
        replace_module(model, name, Sine)
    found = resnets[0](images)
    assert_equal(found, resnets[1](images))
    assert not torch.allclose(found, before)


@torch.no_grad()
def test_norms_that_were_fused_into_convolutions_change_nothing(resnets):
    model, images = resnets[0], resnet_images(2, RESNET.image_size)
    expected = model(images)
    for module in list(model.modules()):
        for conv, norm in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
            if hasattr(module, norm) and isinstance(getattr(module, norm), nn.BatchNorm2d):
                fused = nn.utils.fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
                setattr(module, conv, fused)
                setattr(module, norm, nn.Identity())
    assert_equal(model(images), expected, 1e-10)


@pytest.mark.parametrize("factors", [{"affine": False}, {"track_running_stats": False}])
@torch.no_grad()
def test_norms_without_factors_or_statistics_are_called(resnets, factors):
    images = resnet_images(2, RESNET.image_size)
    for model in resnets:
        model.bn1 = nn.BatchNorm2d(model.bn1.num_features, **factors).double().eval()
    assert_equal(resnets[0](images), resnets[1](images))


@pytest.mark.parametrize("factor", ["weight", "bias"])
@torch.no_grad()
def test_a_norm_without_one_of_its_factors_is_called(resnets, factor):
    images = resnet_images(2, RESNET.image_size)
    for model in resnets:
        setattr(model.layer2[0].bn2, factor, None)
    assert_equal(resnets[0](images), resnets[1](images))


@pytest.mark.parametrize("change", [{"stride": (4, 4)}, {"stride": (6, 6)}, {"padding": (2, 2)}, {"dilation": (2, 2)}])
@torch.no_grad()
def test_patches_may_overlap(vits, change):
    model, images = vits[0], random_images(2, 24)
    for name, value in change.items():
        setattr(model.visual.conv1, name, value)
    grid = F.conv2d(images, model.visual.conv1.weight, **change | {"stride": change.get("stride", 8)})
    model.visual.positional_embedding = nn.Parameter(torch.randn(1 + grid.shape[2:].numel(), 24, dtype=torch.double))
    tokens = []
    model.visual.ln_pre.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0]))
    model.encode_image(images)
    assert_equal(tokens[0][:, 1:], grid.flatten(2).mT + model.visual.positional_embedding[1:])


@torch.no_grad()
def test_without_a_projection_the_features_are_the_towers(vits):
    model, images, tokens = vits[0], random_images(2, 24), random_tokens([3, 9])
    tokens[tokens == EOT] = LAST
    projected = model.encode_image(images), model.encode_text(tokens)
    matrices = model.visual.proj.clone(), model.text.text_projection.clone()
    model.visual.proj = model.text.text_projection = None
    bare = model.encode_image(images), model.encode_text(tokens)
    for features, matrix, expected in zip(bare, matrices, projected, strict=True):
        assert features.shape[1] == matrix.shape[0]
        assert_equal(features @ matrix, expected)


@torch.no_grad()
def test_without_its_attention_pool_a_resnet_gives_the_feature_map(resnets):
    model, images = resnets[0], resnet_images(2, RESNET.image_size)
    expected = outputs(model, ["layer4"], lambda: model(images))["layer4"][0]
    model.attnpool = nn.Identity()
    assert_equal(model(images), expected)


PRUNED = {"conv1": "vit", "transformer.resblocks.0.mlp.c_fc": "vit", "transformer.resblocks.1.attn.out_proj": "vit",
          "layer2.0.conv2": "resnet", "conv3": "resnet"}  # fmt: skip
RULES = {
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight norm": lambda layer: parametrizations.weight_norm(layer),
    "old weight norm": lambda layer: nn.utils.weight_norm(layer),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer, n_power_iterations=1),
    "a parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
}


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", PRUNED)
@torch.no_grad()
def test_computed_weights_are_the_current_ones(vits, resnets, name, rule):
    """Changed after the rule was set, as an optimizer would; the oracle has the weights that then result."""
    model, images = (vits[0].visual, random_images(2, 24)) if PRUNED[name] == "vit" else (
        resnets[0], resnet_images(2, RESNET.image_size)
    )  # fmt: skip
    plain = copy.deepcopy(model)
    layer = model.get_submodule(name)
    RULES[rule](layer)
    for parameter in layer.parameters():
        parameter.add_(0.1)
    found = model(images)
    plain.get_submodule(name).weight.copy_(layer.weight)  # as the rule gave it in that call
    if layer.bias is not None:
        plain.get_submodule(name).bias.copy_(layer.bias)
    assert_equal(found, plain(images), 1e-10)


@pytest.mark.parametrize(
    "model, targets",
    [
        ("vit", r".*\.c_fc|.*\.c_proj|.*\.out_proj|visual\.conv1"),
        ("resnet", r"visual\.conv\d|visual\.layer.*\.conv\d|visual\.layer.*downsample\.0|.*\.q_proj"),
    ],
)
def test_lora_of_peft_acts_on_every_layer_and_merges(vits, model, targets):
    clip = vits[0] if model == "vit" else tiny_resnet_clip()
    images, tokens = random_images(2, clip.visual.input_resolution), random_tokens([3, 9])
    tokens[0, 2] = tokens[1, 8] = clip.config.text.eot_token
    with torch.no_grad():
        before = clip.encode_image(images), clip.encode_text(tokens)
    adapted = peft.get_peft_model(clip, peft.LoraConfig(r=2, target_modules=targets)).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    (adapted.encode_image(images).sum() + adapted.encode_text(tokens).sum()).backward()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    with torch.no_grad():
        found = adapted.encode_image(images), adapted.encode_text(tokens)
        merged = adapted.merge_and_unload()
        for features, old, new in zip(
            found, before, (merged.encode_image(images), merged.encode_text(tokens)), strict=True
        ):
            assert_equal(features, new, 1e-9)
            if model == "vit":
                assert (features - old).abs().max() > 0.01


# ---- explanations


def test_integrated_gradients_of_captum_add_up(vits):
    model, images = vits[0], random_images(2, 24)
    explained = IntegratedGradients(lambda pixels: model.encode_image(pixels)[:, 0]).attribute(images, n_steps=200)
    difference = model.encode_image(images)[:, 0] - model.encode_image(torch.zeros_like(images))[:, 0]
    torch.testing.assert_close(explained.sum(dim=(1, 2, 3)), difference, rtol=0.02, atol=0.02)


def test_captum_explains_a_text_by_its_tokens(vits):
    model, tokens = vits[0], tokens_for_open_clip([6])
    layer = LayerIntegratedGradients(lambda ids: model.encode_text(ids)[:, 0], model.text.token_embedding)
    explained = layer.attribute(tokens, baselines=torch.zeros_like(tokens), n_steps=20)
    assert explained.shape == (1, 77, VIT.text.width)
    assert explained[0, :6].abs().max() > 0


@pytest.mark.parametrize("name", ["layer4", "layer4.1", "layer3", "layer4.1.conv3", "relu3", "conv1"])
def test_grad_cam_of_captum_equals_open_clips(resnets, name):
    images = resnet_images(2, RESNET.image_size)
    maps = [
        LayerGradCam(lambda pixels, model=model: model(pixels)[:, 0], _layer(model, name)).attribute(images)
        for model in resnets
    ]
    assert maps[0].abs().max() > 0
    assert_equal(*maps, 1e-9)


def _layer(model, name):
    return model.get_submodule(name if hasattr(model, "relu1") else name.replace("relu", "act"))


@pytest.mark.parametrize("name", ["transformer.resblocks.2.ln_1", "transformer.resblocks.2", "transformer", "conv1"])
def test_grad_cam_by_hand_on_a_vit_equals_open_clips(vits, name):
    """Activations from a forward hook, gradients from a hook on them (as in pytorch-grad-cam)."""
    maps = []
    for model in vits:
        kept = {}

        def keep(_, inputs, out, kept=kept):
            kept["activation"] = out
            out.register_hook(lambda gradient: kept.update(gradient=gradient))

        handle = model.visual.get_submodule(name).register_forward_hook(keep)
        model.encode_image(random_images(2, 24))[:, 1].sum().backward()
        handle.remove()
        maps.append(kept["activation"] * kept["gradient"])
    assert maps[0].abs().max() > 0
    assert_equal(*maps, 1e-9)


# ---- functions of functions


@torch.no_grad()
def test_towers_can_be_mapped_over_batches_of_batches(vits, resnets):
    images, tokens = random_images(4, 24), tokens_for_open_clip([5, 9, 3, 77])
    for encode, inputs in ((vits[0].encode_image, images), (vits[0].encode_text, tokens),
                           (resnets[0], resnet_images(4, RESNET.image_size))):  # fmt: skip
        mapped = torch.func.vmap(encode)(inputs.unflatten(0, (2, 2)))
        assert_equal(mapped.flatten(0, 1), encode(inputs), 1e-10)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_gradients_of_each_sample_by_torch_func_are_those_of_each_sample_alone(vits, tower):
    model, images, tokens = vits[0], random_images(3, 24), tokens_for_open_clip([5, 9, 3])
    name, inputs = {"image": ("visual.conv1.weight", images), "text": ("text.text_projection", tokens)}[tower]
    encode = model.encode_image if tower == "image" else model.encode_text
    parameter = model.get_parameter(name)

    def total(value, one):
        module = model.visual if tower == "image" else model.text
        return functional_call(module, {name.partition(".")[2]: value}, (one[None],)).sum()

    mapped = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(parameter.detach(), inputs)
    for found, one in zip(mapped, inputs, strict=True):
        (expected,) = torch.autograd.grad(encode(one[None]).sum(), parameter)
        assert_equal(found, expected, 1e-10)


def test_gradients_of_each_texts_features_by_torch_func_are_those_of_each_text_alone(vits):
    """`encode_text` looks at the ids of a batch, and at none that vmap hides below another transformation."""
    model, tokens = vits[0], tokens_for_open_clip([5, 9, 3])
    projection = model.text.text_projection

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.clip = model

        def forward(self, ids):
            return self.clip.encode_text(ids)

    encoder = Encoder()

    def total(value, one):
        return functional_call(encoder, {"clip.text.text_projection": value}, (one[None],)).sum()

    mapped = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))(projection.detach(), tokens)
    for found, one in zip(mapped, tokens, strict=True):
        (expected,) = torch.autograd.grad(model.encode_text(one[None]).sum(), projection)
        assert_equal(found, expected, 1e-10)


@torch.no_grad()
def test_an_ensemble_of_models_is_mapped_over_its_stacked_weights(vits):
    model, images, tokens = vits[0], random_images(2, 24), tokens_for_open_clip([5, 9])
    members = [model, vits_of_other_weights(model)]
    weights, _ = torch.func.stack_module_state(members)
    mapped = torch.func.vmap(lambda each: functional_call(model, each, (images, tokens))[0])(weights)
    for found, member in zip(mapped, members, strict=True):
        assert_equal(found, member(images, tokens)[0], 1e-9)


def vits_of_other_weights(model):
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.add_(0.1)
    return other


@torch.no_grad()
def test_what_make_fx_and_fake_tensors_record_has_no_texts_lengths_in_it(vits):
    model, tokens, others = vits[0], tokens_for_open_clip([5, 9, 3]), tokens_for_open_clip([12, 2, 77])
    for mode in ("real", "fake"):
        recorded = make_fx(lambda ids: model.encode_text(ids), tracing_mode=mode, _allow_non_fake_inputs=True)(tokens)
        assert_equal(recorded(others), model.encode_text(others))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert model.encode_text(fake.from_tensor(tokens)).shape == (3, VIT.embed_dim)
    assert_equal(torch.func.functionalize(model.encode_text)(tokens), model.encode_text(tokens))
