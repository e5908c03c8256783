# towers.py's modified ResNet. Oracle: open_clip.modified_resnet, whose parameters have the same names.

import copy

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet as OpenClipResNet
from torch import nn

from miniclip.config import OPENAI_MODELS, VisionConfig
from miniclip.fast.folded import normed
from miniclip.model import CLIP
from miniclip.resnet import AttentionPool, Bottleneck, ModifiedResNet

TINY = {
    "one block a stage": (VisionConfig(kind="resnet", image_size=64, width=4, blocks=(1, 1, 1, 1)), 24),
    "several blocks": (VisionConfig(kind="resnet", image_size=96, width=8, blocks=(2, 1, 3, 2)), 12),
    "narrow heads": (VisionConfig(kind="resnet", image_size=64, width=4, blocks=(1, 2, 1, 1), head_width=16), 40),
    "one place": (VisionConfig(kind="resnet", image_size=32, width=4, blocks=(1, 1, 1, 1)), 24),
}


@torch.no_grad()
def twins(config, embed_dim, seed=0):
    """Ours and open_clip's with the same weights, none of them 0 or 1, in fp64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ours = ModifiedResNet(config, embed_dim)
        theirs = OpenClipResNet(list(config.blocks), embed_dim, config.heads, config.image_size, config.width)
        for name, tensor in theirs.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn_like(tensor))
    ours, theirs = ours.double(), theirs.double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def images(count, size, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, error


# ---- the same numbers as open_clip


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_inference_equals_open_clip(name):
    ours, theirs = twins(*TINY[name])
    batch = images(3, TINY[name][0].image_size)
    assert_equal(ours.eval()(batch), theirs.eval()(batch))


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_training_equals_open_clip_and_learns_the_same_statistics(name):
    ours, theirs = twins(*TINY[name])
    ours.train()
    theirs.train()
    for step in range(2):
        batch = images(4, TINY[name][0].image_size, seed=step)
        assert_equal(ours(batch), theirs(batch), 1e-11)
    expected = theirs.state_dict()
    changed = twins(*TINY[name])[0].state_dict()
    for key, tensor in ours.state_dict().items():
        if "running" in key:
            assert_equal(tensor, expected[key], 1e-11)
            assert not torch.equal(tensor, changed[key])
        elif key.endswith("num_batches_tracked"):
            assert tensor == expected[key] == 2


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_the_gradient_of_every_parameter_and_of_the_images_equals_open_clip(name, is_training):
    ours, theirs = (model.train(is_training) for model in twins(*TINY[name]))
    batch = images(4, TINY[name][0].image_size)
    direction = torch.randn(4, TINY[name][1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for model in (ours, theirs):
        pixels = batch.clone().requires_grad_()
        (model(pixels) * direction).sum().backward()
        gradients.append({"the images": pixels.grad} | {key: p.grad for key, p in model.named_parameters()})
    found, expected = gradients
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert sum(gradient.any() for gradient in expected.values()) > 0.7 * len(expected)
    for key, gradient in expected.items():
        if key == "attnpool.k_proj.bias":  # analytically zero
            assert found[key].abs().max() <= 1e-12 * largest
        else:  # of a layer without a live unit it is 0
            error = (found[key] - gradient).abs().max()
            assert error <= 1e-9 * max(gradient.abs().max(), 1e-9 * largest), key


@torch.no_grad()
def test_rn50_at_full_size_equals_open_clip():
    config = OPENAI_MODELS["RN50"]
    ours, theirs = twins(config.vision, config.embed_dim)
    batch = images(1, 224)
    assert_equal(ours.eval()(batch), theirs.eval()(batch))


@torch.no_grad()
def test_a_batch_equals_its_images_one_by_one():
    ours = twins(*TINY["several blocks"])[0].eval()
    batch = images(3, 96)
    assert_equal(ours(batch), torch.cat([ours(image[None]) for image in batch]))


def test_names_and_shapes_are_open_clips():
    for config, embed_dim in TINY.values():
        ours, theirs = twins(config, embed_dim)
        shapes = [{key: tuple(tensor.shape) for key, tensor in model.state_dict().items()} for model in (ours, theirs)]
        assert shapes[0] == shapes[1]


# ---- the attention pool


def pool_and_features(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pool = AttentionPool(num_positions=9, channels=32, heads=4, embed_dim=12).double()
        for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
            torch.nn.init.normal_(projection.bias)
        return pool, torch.randn(3, 32, 3, 3, dtype=torch.float64)


@torch.no_grad()
def test_the_pool_equals_torchs_multi_head_attention_for_one_query_and_for_all():
    pool, features = pool_and_features()
    x = features.flatten(2).permute(2, 0, 1)
    x = torch.cat([x.mean(dim=0, keepdim=True), x]) + pool.positional_embedding[:, None]
    expected, _ = F.multi_head_attention_forward(
        x, x, x, 32, 4, None, torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None, False, 0.0,
        pool.c_proj.weight, pool.c_proj.bias, training=False, need_weights=False, use_separate_proj_weight=True,
        q_proj_weight=pool.q_proj.weight, k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
    )  # fmt: skip
    assert_equal(pool(features), expected[0])
    assert_equal(pool(features, all_tokens=True), expected.transpose(0, 1))


@torch.no_grad()
def test_the_first_of_all_tokens_is_the_pooled_one():
    pool, features = pool_and_features(1)
    assert_equal(pool(features, all_tokens=True)[:, 0], pool(features))
    for config, embed_dim in TINY.values():
        ours = twins(config, embed_dim)[0].eval()
        batch = images(2, config.image_size)
        tokens = ours(batch, all_tokens=True)
        assert tokens.shape == (2, 1 + config.num_patches, embed_dim)
        assert_equal(tokens[:, 0], ours(batch))


# ---- its parts


@pytest.mark.parametrize("side", [2, 3, 9])  # fewer numbers than either convolution's weights, than one's, and more
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_and_its_norm_in_one_equal_both_one_after_the_other(kernel, side):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, kernel, padding=kernel // 2, bias=False).double()
    norm = nn.BatchNorm2d(12).double()
    with torch.no_grad():
        for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
            tensor.uniform_(0.2, 2)
    x = torch.randn(2, 8, side, side, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    for is_training in (False, True):
        results = []
        norm.train(is_training)
        for compute in (lambda x: normed(conv, norm, x), lambda x: norm(conv(x))):
            image = x.clone().requires_grad_()
            y = compute(image)
            assert y.is_contiguous(memory_format=torch.channels_last)
            weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
            results.append((y, *torch.autograd.grad((y * weights).sum(), [image, conv.weight, *norm.parameters()])))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_a_block_starts_as_its_shortcut_alone(stride):
    block = Bottleneck(16, 4, stride)
    assert not block.bn3.weight.any()
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert (block.downsample is None) == (stride == 1)
    assert torch.equal(block(x), F.relu(x if stride == 1 else block.downsample(x)))


def test_every_block_of_a_new_tower_starts_as_its_shortcut():
    tower = ModifiedResNet(*TINY["several blocks"])
    blocks = [module for module in tower.modules() if isinstance(module, Bottleneck)]
    assert len(blocks) == 8
    assert all(not block.bn3.weight.any() for block in blocks)
    assert tower.bn3.weight.all(), "the stem has no shortcut"


@torch.no_grad()
def test_strides_are_average_pools_before_the_last_convolution():
    """A shift by the stride shifts the output by one, in the middle of the picture."""
    block = Bottleneck(8, 4, 2).eval()
    torch.nn.init.ones_(block.bn3.weight)
    x = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    shifted = torch.roll(x, 2, dims=3)
    torch.testing.assert_close(block(shifted)[..., 3:-3], torch.roll(block(x), 1, dims=3)[..., 3:-3])
    assert all(module.stride in (1, (1, 1)) for module in block.modules() if isinstance(module, torch.nn.Conv2d))


def test_a_new_tower_has_the_statistics_of_open_clips():
    """Standard deviations of all but the smallest tensors, over the same seed's worth of draws."""
    config = VisionConfig(kind="resnet", image_size=64, width=16, blocks=(1, 1, 1, 1))
    torch.manual_seed(0)
    ours = ModifiedResNet(config, 48).state_dict()
    theirs = OpenClipResNet([1, 1, 1, 1], 48, config.heads, 64, 16).state_dict()
    for key, tensor in theirs.items():
        if tensor.numel() > 2000:
            assert ours[key].std().item() == pytest.approx(tensor.std().item(), rel=0.1), key
        elif tensor.ndim == 1 and "attnpool" not in key:
            assert torch.equal(ours[key], tensor), key


def test_a_copied_tower_computes_the_same():
    ours = twins(*TINY["one place"])[0].eval()
    batch = images(2, 32)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(ours)(batch), ours(batch))


# ---- the nine models


@pytest.mark.parametrize(
    "name, parameters",
    [("RN50", 102_007_137), ("ViT-B/32", 151_277_313), ("ViT-B/16", 149_620_737), ("ViT-L/14", 427_616_513)],
)
def test_the_number_of_parameters_is_the_published(name, parameters):
    with torch.device("meta"):
        model = CLIP(OPENAI_MODELS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", OPENAI_MODELS)
def test_names_and_shapes_of_an_openai_model_are_those_of_open_clip(name):
    theirs = name.replace("/", "-").replace("@336px", "-336") + "-quickgelu"
    settings = open_clip.get_model_config(theirs)
    assert settings["quick_gelu"] is True
    settings.pop("custom_text", None)
    with torch.device("meta"):
        ours = CLIP(OPENAI_MODELS[name])
        other = open_clip.model.CLIP(**settings)
    found = {key.removeprefix("text."): tuple(tensor.shape) for key, tensor in ours.state_dict().items()}
    expected = {key: tuple(tensor.shape) for key, tensor in other.state_dict().items() if key != "attn_mask"}
    assert found == expected
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (ours, other)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", [name for name in OPENAI_MODELS if name.startswith("RN")])
def test_the_heads_of_an_openai_resnets_pool_are_64_channels_wide(name):
    with torch.device("meta"):
        pool = CLIP(OPENAI_MODELS[name]).visual.attnpool
    assert pool.heads == OPENAI_MODELS[name].vision.width * 32 // 64
    assert pool.q_proj.weight.shape[0] == 64 * pool.heads
