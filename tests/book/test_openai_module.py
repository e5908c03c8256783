"""Clients that reach into OpenAI's package run on `miniclip.openai`. Oracle: open_clip, with the same weights.

Each client is a few lines in the style of a public one, with OpenAI's names, axis orders and precisions.
"""

import hashlib
import math
import sys
from contextlib import nullcontext
from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
import warm
from helpers import picture, tiny_clip, tiny_config
from open_clip.tokenizer import SimpleTokenizer as OpenClipTokenizer
from torch import nn

import miniclip
import miniclip.openai as clip
from miniclip.config import TextConfig, VisionConfig

VIT = (64, 32, 2, 128, 16, 77, 49408, 64, 1, 2)  # embedding, resolution, layers, width, patch, text
RESNET = (64, 64, (1, 2, 1, 1), 8, None, 77, 49408, 64, 1, 2)
NAMES = ["a cat", "a large dog", "seven", "a bicycle"]


def with_random_weights(model):
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name != "logit_scale":
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=random))
    return model.eval()


def twins(sizes):
    """OpenAI's model in ours and in open_clip's code."""
    torch.manual_seed(0)
    ours = with_random_weights(clip.CLIP(*sizes))
    embed_dim, resolution, layers, width, patch, *_ = sizes
    is_resnet = patch is None
    vision = open_clip.model.CLIPVisionCfg(layers, width, image_size=resolution, patch_size=patch or 16)
    text = open_clip.model.CLIPTextCfg(77, 49408, width=64, heads=1, layers=2)
    theirs = open_clip.model.CLIP(embed_dim, vision, text, quick_gelu=True)
    if is_resnet:
        assert isinstance(theirs.visual, open_clip.modified_resnet.ModifiedResNet)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours, theirs.eval()


@pytest.fixture(params=[VIT, RESNET], ids=["vit", "resnet"])
def both(request):
    return twins(request.param)


@pytest.fixture
def vit():
    return twins(VIT)


def images_for(model, number=3):
    R = model.visual.input_resolution
    return torch.randn(number, 3, R, R, generator=torch.Generator().manual_seed(1))


def assert_near(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# ---- the model


def test_features_logits_and_gradients_are_those_of_the_same_weights(both):
    images, tokens = images_for(both[0]), clip.tokenize(NAMES[:3])
    results = []
    for model in both:
        image_features, text_features = model.encode_image(images), model.encode_text(tokens)
        (image_features.square().sum() + text_features.square().sum()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((image_features, text_features, gradients))
    (found_images, found_texts, found), (images_expected, texts_expected, expected) = results
    assert_near(found_images, images_expected)
    assert_near(found_texts, texts_expected)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * largest, name
    logits, transposed = both[0](images, tokens)
    assert_near(logits, both[1].get_logits(images, tokens)[0])
    assert torch.equal(logits.T, transposed)


def test_parameters_have_openais_names(both):
    ours, theirs = (dict(model.named_parameters()) for model in both)
    assert ours.keys() == theirs.keys()
    assert {name.split(".")[0] for name in ours} == {
        "visual", "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection", "logit_scale"
    }  # fmt: skip


def test_a_text_without_an_end_is_read_at_its_largest_id(vit):
    tokens = torch.tensor([[3, 900, 5, 0], [7, 1, 2, 800]])
    states = vit[0].ln_final(
        vit[0].transformer((vit[0].token_embedding(tokens) + vit[0].positional_embedding[:4]).transpose(0, 1))
    )
    expected = torch.stack([states[1, 0], states[3, 1]]) @ vit[0].text_projection
    assert_near(vit[0].encode_text(tokens), expected)


@pytest.mark.parametrize("name", ["visual.transformer.resblocks.1", "transformer.resblocks.0", "visual.transformer"])
def test_blocks_take_and_give_tokens_first(vit, name):
    shapes = []
    vit[0].get_submodule(name).register_forward_hook(lambda _, inputs, out: shapes.extend([inputs[0].shape, out.shape]))
    vit[0](images_for(vit[0], 3), clip.tokenize(NAMES))
    assert shapes == ([(5, 3, 128)] * 2 if name.startswith("visual") else [(77, 4, 64)] * 2)


def test_the_attributes_that_scripts_read(both):
    model = both[0]
    assert model.visual.output_dim == 64
    assert model.visual.input_resolution in (32, 64)
    assert (model.context_length, model.vocab_size, model.dtype) == (77, 49408, torch.float32)
    assert (model.transformer.width, model.transformer.layers) == (64, 2)
    assert model.ln_final.weight.shape == (64,)
    mask = model.build_attention_mask()
    assert torch.equal(mask == -math.inf, torch.ones(77, 77).triu(1).bool())
    assert model.transformer.resblocks[0].mlp.gelu(torch.ones(())) == pytest.approx(1 / (1 + math.exp(-1.702)))
    for name in ("relu1", "relu2", "relu3", "avgpool"):
        assert hasattr(model.visual, name) == isinstance(model.visual, clip.ModifiedResNet)


NORMED = "normalized_shape eps elementwise_affine weight bias"
BLOCK = "conv1 bn1 relu1 conv2 bn2 relu2 avgpool conv3 bn3 relu3"
# OpenAI's classes: how many of each its model has by VIT and by RESNET, and what each has beside nn.Module's own.
OPENAIS = {
    "CLIP": (1, 1, "context_length vocab_size visual transformer token_embedding positional_embedding ln_final "
                   "text_projection logit_scale dtype encode_image encode_text initialize_parameters "
                   "build_attention_mask"),
    "VisionTransformer": (1, 0, "input_resolution output_dim conv1 class_embedding positional_embedding ln_pre "
                                "transformer ln_post proj"),
    "ModifiedResNet": (0, 1, f"{BLOCK} input_resolution output_dim layer1 layer2 layer3 layer4 attnpool"),
    "Bottleneck": (0, 5, f"{BLOCK} expansion stride downsample"),
    "AttentionPool2d": (0, 1, "positional_embedding k_proj q_proj v_proj c_proj num_heads"),
    "Transformer": (2, 1, "width layers resblocks"),
    "ResidualAttentionBlock": (4, 2, "attn ln_1 mlp ln_2 attn_mask attention"),
    "LayerNorm": (11, 5, NORMED),
    "QuickGELU": (4, 2, ""),
}  # fmt: skip


def test_modules_have_openais_classes_and_attributes(both):
    is_resnet = isinstance(both[0].visual, clip.model.ModifiedResNet)
    for name, (of_vit, of_resnet, attributes) in OPENAIS.items():
        kind = getattr(clip.model, name)
        found = [module for module in both[0].modules() if isinstance(module, kind)]
        assert len(found) == (of_resnet if is_resnet else of_vit), name
        for module in found:
            assert [each for each in attributes.split() if not hasattr(module, each)] == [], name


def test_the_blocks_of_a_resnet_are_openais():
    blocks = {name: module for name, module in clip.CLIP(*RESNET).visual.named_modules() if "layer" in name}
    found = {name: (m.stride, m.downsample and [*m.downsample._modules], m.expansion)
             for name, m in blocks.items() if isinstance(m, clip.Bottleneck)}  # fmt: skip
    shortcut = ["-1", "0", "1"]
    assert found == {
        "layer1.0": (1, shortcut, 4), "layer2.0": (2, shortcut, 4), "layer2.1": (1, None, 4),
        "layer3.0": (2, shortcut, 4), "layer4.0": (2, shortcut, 4),
    }  # fmt: skip


def test_a_model_that_openais_code_pickled_computes(both):
    """Unpickled by the names of its classes, a module has the attributes that OpenAI's code gave it and no others."""
    model, expected = both[0], both[0].encode_image(images_for(both[0]))
    common = nn.Module().__dict__.keys()
    for module in model.modules():
        if (told := OPENAIS.get(type(module).__name__)) is not None:
            kept = {*common, *told[2].split()}
            for name in [name for name in module.__dict__ if name not in kept]:
                del module.__dict__[name]
    assert torch.equal(model.encode_image(images_for(model)), expected)
    assert_near(model.encode_text(clip.tokenize(NAMES)), both[1].encode_text(clip.tokenize(NAMES)))


def test_parameters_are_initialised_again(both):
    """OpenAI's leaves a vision transformer as it was made, and of a ResNet the norms and convolutions."""
    model = both[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9)
    model.initialize_parameters()
    drawn = {name: parameter for name, parameter in model.visual.named_parameters() if (parameter != 9).any()}
    if not isinstance(model.visual, clip.ModifiedResNet):
        assert drawn == {}
        return
    projections = {f"attnpool.{name}_proj.weight" for name in "qkvc"}
    zeroed = {f"layer{block}.bn3.weight" for block in ("1.0", "2.0", "2.1", "3.0", "4.0")}
    assert drawn.keys() == projections | zeroed
    assert not any(drawn[name].any() for name in zeroed)
    for name in projections:
        assert drawn[name].std().item() == pytest.approx(256**-0.5, rel=0.02), name  # fan-in 32 * 8


@pytest.mark.parametrize("sizes", [VIT, RESNET], ids=["vit", "resnet"])
def test_a_seed_draws_openais_weights(monkeypatch, sizes):
    """In the order of OpenAI's code, whose parts are open_clip's but for the moment when a pool is drawn again."""
    monkeypatch.setattr(open_clip.modified_resnet.ModifiedResNet, "init_parameters", lambda self: None)
    torch.manual_seed(0)
    found = dict(clip.CLIP(*sizes).named_parameters())
    embed_dim, R, layers, width, patch, context_length, vocab_size, text_width, heads, text_layers = sizes
    torch.manual_seed(0)
    visual = (
        open_clip.modified_resnet.ModifiedResNet(layers, embed_dim, 32 * width // 64, R, width)
        if patch is None
        else open_clip.transformer.VisionTransformer(R, patch, width, layers, width // 64, 4.0, output_dim=embed_dim)
    )
    blocks = open_clip.transformer.Transformer(text_width, text_layers, heads)
    expected = {"token_embedding.weight": nn.Embedding(vocab_size, text_width).weight}
    nn.init.normal_(expected["token_embedding.weight"], std=0.02)
    expected["positional_embedding"] = nn.init.normal_(torch.empty(context_length, text_width), std=0.01)
    if patch is None:
        for name in "qkvc":
            nn.init.normal_(visual.attnpool.get_parameter(f"{name}_proj.weight"), std=(32 * width) ** -0.5)
    residual_std = text_width**-0.5 * (2 * text_layers) ** -0.5
    for block in blocks.resblocks:
        nn.init.normal_(block.attn.in_proj_weight, std=text_width**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * text_width) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)
    expected["text_projection"] = nn.init.normal_(torch.empty(text_width, embed_dim), std=text_width**-0.5)
    for prefix, part in (("visual.", visual), ("transformer.", blocks)):
        expected |= {prefix + name: parameter for name, parameter in part.named_parameters()}
    assert found.keys() == expected.keys() | {"ln_final.weight", "ln_final.bias", "logit_scale"}
    for name, parameter in expected.items():
        if not name.endswith("bn3.weight"):  # of zeros
            assert torch.equal(found[name], parameter), name


@pytest.mark.parametrize("number", [2, 6])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_mask_is_of_all_rows_or_of_each_row_and_head(number, rank):
    """With fewer rows and heads than the 5 tokens of the text, and with more; the mask is for 7."""
    torch.manual_seed(0)
    block, x = clip.ResidualAttentionBlock(32, 2), torch.randn(5, number, 32)
    mask = torch.rand(7, 7) > 0.5 if rank == 2 else torch.rand(2 * number, 7, 7) > 0.5
    mask[..., 0] = False  # a token sees the first one at least
    block.attn_mask = torch.zeros(mask.shape).masked_fill(mask, -math.inf)
    y, attn = block.ln_1(x).transpose(0, 1), block.attn
    q, k, v = F.linear(y, attn.in_proj_weight, attn.in_proj_bias).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
    hidden = mask[..., :5, :5].expand(2 * number, 5, 5).unflatten(0, (number, 2))  # (B, H, N, N)
    weights = (q @ k.mT / 4).masked_fill(hidden, -math.inf).softmax(dim=-1)
    expected = x + attn.out_proj((weights @ v).transpose(1, 2).flatten(2)).transpose(0, 1)
    assert_near(block(x), expected + block.mlp(block.ln_2(expected)))


# ---- clients


def test_prompts_are_learnt_as_by_coop(vit):
    """Context vectors before each class name go through the text tower's parts, tokens first."""
    model, theirs = vit
    model.requires_grad_(False)
    prompts = clip.tokenize([f"X X {name}." for name in NAMES])

    def encode(embeddings):
        x = embeddings + model.positional_embedding.type(model.dtype)
        x = model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        x = model.ln_final(x).type(model.dtype)
        return x[torch.arange(x.shape[0]), prompts.argmax(dim=-1)] @ model.text_projection

    embeddings = model.token_embedding(prompts).type(model.dtype)
    assert_near(encode(embeddings), theirs.encode_text(prompts))
    context = nn.Parameter(0.02 * torch.randn(2, model.ln_final.weight.shape[0]))
    optimizer = torch.optim.SGD([context], lr=0.05)
    images = F.normalize(model.encode_image(images_for(model, 4)), dim=-1)
    losses = []
    for _ in range(8):
        joined = torch.cat([embeddings[:, :1], context.expand(4, -1, -1), embeddings[:, 3:]], dim=1)
        logits = model.logit_scale.exp() * images @ F.normalize(encode(joined), dim=-1).T
        losses.append(F.cross_entropy(logits, torch.arange(4)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1e-3


def test_a_cache_of_features_classifies_as_by_tip_adapter(both):
    model, theirs = both
    with torch.no_grad():
        keys = F.normalize(model.encode_image(images_for(model, 4)), dim=-1).T
        weights = F.normalize(model.encode_text(clip.tokenize(NAMES)), dim=-1).T
        queries = keys.T
        adapter = nn.Linear(*keys.shape, bias=False).to(model.dtype)
        adapter.weight.copy_(keys.T)
        affinity = adapter(queries)
        logits = 100 * queries @ weights + (-(5.5 - 5.5 * affinity)).exp() @ torch.eye(4)
        expected = F.normalize(theirs.encode_image(images_for(model, 4)), dim=-1)
        their_weights = F.normalize(theirs.encode_text(clip.tokenize(NAMES)), dim=-1).T
        assert_near(
            logits, 100 * expected @ their_weights + (5.5 * (expected @ expected.T - 1)).exp(), 1e-4
        )  # fmt: skip


def test_weights_are_interpolated_as_by_wise_ft(vit):
    model = vit[0]
    other = clip.CLIP(*VIT)
    first, second = model.state_dict(), other.state_dict()
    mixed = clip.build_model({name: 0.5 * first[name] + 0.5 * second[name] for name in first}).float()
    expected = 0.5 * model.transformer.resblocks[0].ln_1.bias + 0.5 * other.transformer.resblocks[0].ln_1.bias
    torch.testing.assert_close(mixed.transformer.resblocks[0].ln_1.bias, expected)


def test_an_encoder_without_its_text_tower_is_saved_whole_as_by_wise_ft(both, tmp_path):
    """The text tower is deleted, the module pickled, read back and mixed with itself."""
    model, theirs = both
    expected = theirs.encode_image(images_for(both[0]))
    del model.transformer
    torch.save(model, tmp_path / "encoder.pt")
    back = torch.load(tmp_path / "encoder.pt", weights_only=False)
    assert_near(back.encode_image(images_for(both[0])), expected)
    mixed = {name: 0.5 * tensor + 0.5 * back.state_dict()[name] for name, tensor in model.state_dict().items()}
    back.load_state_dict(mixed)
    assert_near(back.encode_image(images_for(both[0])), expected)


class TextParts(nn.Module):
    """The text tower put together from the model's parts, tokens first."""

    def __init__(self, model):
        super().__init__()
        self.token_embedding, self.transformer, self.ln_final = (
            model.token_embedding, model.transformer, model.ln_final
        )  # fmt: skip
        self.positional_embedding, self.text_projection = model.positional_embedding, model.text_projection

    def forward(self, text):
        x = (self.token_embedding(text) + self.positional_embedding).permute(1, 0, 2)
        x = self.ln_final(self.transformer(x).permute(1, 0, 2))
        return x[torch.arange(x.shape[0]), text.float().argmax(dim=-1)] @ self.text_projection


def test_both_towers_go_to_onnx_as_by_clip_onnx(both, tmp_path):
    """Exported with examples of one picture and three texts, run on others; the text tower is made of its parts."""
    import onnxruntime

    model, theirs = both
    tokens = clip.tokenize(["one", "two", "three whole words", "four", "five"])
    images = images_for(model, 4)
    for tower, example, inputs, expected in (
        (model.visual, images[:1], images, theirs.encode_image(images)),
        (TextParts(model), tokens[:3], tokens, theirs.encode_text(tokens)),
    ):
        path = tmp_path / f"{type(tower).__name__}.onnx"
        options = {"dynamic_axes": {"input": {0: "batch"}, "output": {0: "batch"}}, "opset_version": 17}
        torch.onnx.export(
            tower, (example,), path, input_names=["input"], output_names=["output"], dynamo=False, **options
        )  # fmt: skip
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert_near(torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0]), expected.detach())


def test_attention_is_written_out_as_by_clipseg(vit):
    """From in_proj, num_heads and head_dim, tokens first; the block's own result is the oracle."""
    model = vit[0]
    block, x = model.visual.transformer.resblocks[0], torch.randn(5, 3, 128)
    y = block.ln_1(x)
    q, k, v = F.linear(y, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, dim=-1)
    heads, width = block.attn.num_heads, block.attn.head_dim
    q, k, v = (each.reshape(5, 3 * heads, width).transpose(0, 1) for each in (q, k, v))
    attention = (q @ k.transpose(1, 2) * width**-0.5).softmax(dim=-1)
    y = block.attn.out_proj((attention @ v).transpose(0, 1).reshape(5, 3, 128))
    x = x + y
    assert_near(block(x - y), x + block.mlp(block.ln_2(x)))
    weights = block.attn(block.ln_1(x - y), block.ln_1(x - y), block.ln_1(x - y), need_weights=True)[1]
    assert_near(weights, attention.unflatten(0, (3, heads)).mean(dim=1))


def test_dense_features_as_by_maskclip(both):
    """The values of the pool or of the last attention, projected, without attending."""
    model, theirs = both
    if isinstance(model.visual, clip.ModifiedResNet):
        kept = []
        model.visual.layer4.register_forward_hook(lambda _, inputs, out: kept.append(out))
        model.encode_image(images_for(model))
        pool, x = model.visual.attnpool, kept[0]
        dense = F.conv2d(
            F.conv2d(x, pool.v_proj.weight[:, :, None, None], pool.v_proj.bias),
            pool.c_proj.weight[:, :, None, None],
            pool.c_proj.bias,
        )
        assert dense.shape == (3, model.visual.output_dim, 2, 2)
        other = theirs.visual.attnpool
        tokens = x.flatten(2).permute(2, 0, 1)
        expected = other.c_proj(other.v_proj(tokens)).permute(1, 2, 0).unflatten(2, (2, 2))
        assert_near(dense, expected)
    else:
        kept = []
        model.visual.transformer.resblocks[-1].ln_1.register_forward_hook(lambda _, inputs, out: kept.append(out))
        model.encode_image(images_for(model))
        assert kept[0].shape == (5, 3, 128)


def test_grad_cam_of_the_last_stage(both):
    model = both[0]
    name = "visual.layer4" if isinstance(model.visual, clip.ModifiedResNet) else "visual.transformer.resblocks.1.ln_1"
    maps = []
    for each in both:
        kept = []
        handle = each.get_submodule(name).register_forward_hook(lambda _, inputs, out, kept=kept: kept.append(out))
        score = each.encode_image(images_for(model))[:, 0].sum()
        handle.remove()
        gradient = torch.autograd.grad(score, kept[0])[0]
        activation = kept[0]
        if activation.ndim == 3 and each is model:  # OpenAI's order
            activation, gradient = activation.permute(1, 0, 2), gradient.permute(1, 0, 2)
        maps.append((activation * gradient).sum(dim=-1 if activation.ndim == 3 else 1))
    assert maps[0].abs().max() > 0
    assert_near(*maps, 1e-4)


def test_freezing_by_prefix_finds_the_text_transformer(vit):
    frozen = [name for name, _ in vit[0].named_parameters() if name.startswith("transformer")]
    assert len(frozen) == 2 * 12


class Float32Norm(nn.LayerNorm):
    def forward(self, x: torch.Tensor):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class Exported(clip.CLIP):
    @torch.jit.export
    def encode_image(self, image):
        return self.visual(image)

    @torch.jit.export
    def encode_text(self, text):
        x = self.token_embedding(text) + self.positional_embedding
        x = self.ln_final(self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
        return x[torch.arange(x.shape[0]), text.argmax(dim=-1)] @ self.text_projection

    @torch.jit.ignore
    def forward(self, image, text):
        return None


@pytest.mark.filterwarnings("ignore")  # torch.jit.script is on its way out
def test_a_subclass_is_scripted_as_by_karlo(vit, monkeypatch):
    monkeypatch.setattr(clip, "LayerNorm", Float32Norm)
    model = Exported(*VIT).eval()
    model.load_state_dict(vit[0].state_dict())
    scripted, images, tokens = torch.jit.script(model), images_for(vit[0]), clip.tokenize(NAMES)
    assert_near(scripted.encode_image(images), vit[1].encode_image(images))
    assert_near(scripted.encode_text(tokens), vit[1].encode_text(tokens))


# OpenAI's classes and the arguments that it makes them with.
PARTS = {
    "ResidualAttentionBlock": "d_model n_head attn_mask",
    "Transformer": "width layers heads attn_mask",
    "VisionTransformer": "input_resolution patch_size width layers heads output_dim",
    "Bottleneck": "inplanes planes stride",
    "AttentionPool2d": "spacial_dim embed_dim num_heads output_dim",
    "ModifiedResNet": "layers output_dim heads input_resolution width",
}


def twice(found):
    """A subclass that takes OpenAI's arguments alone and gives twice what `found` gives."""
    names = PARTS[found.__name__].split()

    class Twice(found):
        def __init__(self, *values, **options):
            super().__init__(**dict(zip(names, values, strict=False)), **options)
            assert options.keys() <= set(names)

        def forward(self, x):
            return 2 * super().forward(x)

    return Twice


@pytest.mark.parametrize("name", PARTS)
def test_a_class_that_a_program_puts_in_place_of_a_part_is_built(monkeypatch, name):
    """As programs of style transfer replace the image tower. Oracle: hooks on the parts."""
    sizes = RESNET if name in ("Bottleneck", "AttentionPool2d", "ModifiedResNet") else VIT
    plain = with_random_weights(clip.CLIP(*sizes))
    monkeypatch.setattr(clip, name, twice(getattr(clip, name)))
    model = clip.build_model(plain.state_dict()).float()
    assert sum(type(part).__name__ == "Twice" for part in model.modules()) > 0
    model.load_state_dict(plain.state_dict())
    for part in plain.modules():
        if type(part).__name__ == name:
            part.register_forward_hook(lambda _, __, output: 2 * output)
    images, tokens = images_for(plain), clip.tokenize(NAMES)
    assert_near(model.encode_image(images), plain.encode_image(images))
    assert_near(model.encode_text(tokens), plain.encode_text(tokens))


def test_a_class_that_a_program_puts_in_place_of_the_model_is_loaded(tmp_path, both, monkeypatch):
    class Mine(clip.CLIP):
        def __init__(
            self,
            embed_dim,
            image_resolution,
            vision_layers,
            vision_width,
            vision_patch_size,
            context_length,
            vocab_size,
            transformer_width,
            transformer_heads,
            transformer_layers,
        ):
            sizes = (embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size)
            text = (context_length, vocab_size, transformer_width, transformer_heads, transformer_layers)
            super().__init__(*sizes, *text)

    torch.save(both[0].state_dict(), tmp_path / "model.pt")
    monkeypatch.setattr(clip, "CLIP", Mine)
    with pytest.warns(UserWarning, match="does not tell"):
        model, _ = clip.load(str(tmp_path / "model.pt"), device="cpu")
    assert isinstance(model, Mine)
    images = images_for(model)
    assert_near(model.encode_image(images), both[0].encode_image(images))


def test_replaced_transforms_prepare_pictures(monkeypatch):
    from torchvision import transforms

    picture_, bilinear = picture(), transforms.InterpolationMode.BILINEAR
    monkeypatch.setattr(clip, "BICUBIC", bilinear)
    monkeypatch.setattr(clip, "Normalize", lambda mean, std: lambda pixels: pixels)
    steps = [transforms.Resize(24, bilinear), transforms.CenterCrop(24), transforms.ToTensor()]
    assert torch.equal(clip._transform(24)(picture_), transforms.Compose(steps)(picture_))


def test_a_model_without_its_projection_gives_the_towers_width(vit):
    vit[0].visual.proj = None
    assert vit[0].encode_image(images_for(vit[0])).shape == (3, 128)


def test_the_model_exports_for_other_batches(both):
    model = both[0]
    traced = torch.jit.trace_module(
        model, {"encode_image": images_for(model, 1), "encode_text": clip.tokenize(NAMES[:1])}, check_trace=False
    )
    with torch.no_grad():
        assert_near(traced.encode_image(images_for(model)), model.encode_image(images_for(model)))
        assert_near(traced.encode_text(clip.tokenize(NAMES)), model.encode_text(clip.tokenize(NAMES)))


# ---- precisions and checkpoints


def test_built_models_are_float16_but_for_norms_and_embeddings(both):
    tensors = both[0].state_dict() | {"input_resolution": torch.tensor(64)}
    model = clip.build_model(tensors)
    model.load_state_dict(tensors)  # the sizes are taken out, as by OpenAI's code
    assert model.dtype == torch.float16
    assert not model.training
    for name, parameter in model.named_parameters():
        kept = "ln_" in name or "embedding" in name or ".bn" in name or "downsample.1" in name or name == "logit_scale"
        assert parameter.dtype == (torch.float32 if kept else torch.float16), name


def test_a_half_model_computes_in_half(both):
    model = clip.build_model(both[0].state_dict())
    with torch.no_grad():
        found = model(images_for(model), clip.tokenize(NAMES))[0]
        assert found.dtype == torch.float16
        assert_near(found.float(), both[0](images_for(model), clip.tokenize(NAMES))[0], 0.02)


def test_tensors_of_something_else_are_refused_by_name():
    with pytest.raises(ValueError, match=r"not the tensors of an OpenAI CLIP: .*positional_embedding"):
        clip.build_model({"visual.proj": torch.zeros(2, 2), "visual.conv1.weight": torch.zeros(2, 3, 4, 4)})


def test_our_directory_and_openais_tensors_load_alike(tmp_path, both):
    model = both[0]
    file = tmp_path / "model.pt"
    torch.save(model.state_dict(), file)
    with pytest.warns(UserWarning, match=r"model\.pt does not tell its activation or its heads; .* QuickGELU"):
        loaded, preprocess = clip.load(str(file), device="cpu")
    assert_near(loaded(images_for(model), clip.tokenize(NAMES))[0], model(images_for(model), clip.tokenize(NAMES))[0])
    assert preprocess(picture()).shape == (3, model.visual.input_resolution, model.visual.input_resolution)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_a_model_of_ours_gives_the_same_features(tmp_path, activation):
    ours = tiny_clip(activation=activation)
    miniclip.save(ours, tmp_path / "model")
    model, preprocess = clip.load(str(tmp_path / "model"), device="cpu")
    tokens = clip.tokenize(NAMES, context_length=ours.context_length)
    image = preprocess(picture())
    assert torch.equal(image, miniclip.load(tmp_path / "model", device="cpu")[1](picture()))
    with torch.no_grad():
        assert_near(model.encode_image(image[None]), ours.encode_image(image[None]))
        assert_near(model.encode_text(tokens), ours.encode_text(tokens))
    back = miniclip.CLIP(ours.config)
    back.load_state_dict({
        name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": tensor
        for name, tensor in model.state_dict().items()
    })  # fmt: skip


def test_asking_for_a_jit_model_warns_and_goes_on(tmp_path):
    miniclip.save(tiny_clip(), tmp_path / "model")
    for load in (clip.load, miniclip.load):
        with pytest.warns(UserWarning, match="jit=True is ignored"):
            load(str(tmp_path / "model"), device="cpu", jit=True)


def test_a_name_that_is_not_known_is_the_runtime_error_of_openai():
    with pytest.raises(RuntimeError, match=r"Model ViT-B/64 not found; available models = \['RN50'"):
        clip.load("ViT-B/64", device="cpu")


def test_a_replaced_download_and_changed_addresses_are_honoured(tmp_path, monkeypatch):
    cached = tmp_path / "cache" / "ViT-B-32.pt"
    cached.parent.mkdir()
    for file, resolution in ((tmp_path / "other.pt", 64), (cached, 32)):
        torch.save(clip.CLIP(*VIT[:1], resolution, *VIT[2:]).state_dict(), file)
    asked = []
    monkeypatch.setitem(clip._MODELS, "mine", "https://there/0000/mine.pt")

    def download(url, root):
        asked.append((url, root))
        return str(tmp_path / "other.pt")

    monkeypatch.setattr(clip, "_download", download)
    for name in ("ViT-B/32", "mine"):
        with pytest.warns(UserWarning, match=r"other\.pt does not tell"):
            model, preprocess = clip.load(name, device="cpu", download_root=str(cached.parent))
        assert model.visual.input_resolution == 64
        assert preprocess(picture()).shape == (3, 64, 64)
    assert asked == [(clip._MODELS[name], str(cached.parent)) for name in ("ViT-B/32", "mine")]


def test_another_address_for_a_name_does_not_find_the_file_of_the_first(tmp_path, monkeypatch):
    file = tmp_path / "ViT-B-32.pt"
    torch.save(clip.CLIP(*VIT).state_dict(), file)
    monkeypatch.setitem(clip._MODELS, "ViT-B/32", f"https://there/{'0' * 64}/ViT-B-32.pt")
    with pytest.raises(ValueError, match=r"ViT-B-32\.pt is not the file of https://there/0000.*its SHA-256 is"):
        clip.load("ViT-B/32", device="cpu", download_root=str(tmp_path))
    checksum = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(clip._MODELS, "ViT-B/32", f"https://there/{checksum}/ViT-B-32.pt")
    with pytest.warns(UserWarning, match="does not tell"):
        assert clip.load("ViT-B/32", device="cpu", download_root=str(tmp_path))[0].visual.input_resolution == 32


def test_a_replaced_build_model_builds(tmp_path, vit, monkeypatch):
    torch.save(vit[0].state_dict(), tmp_path / "model.pt")
    build, given = clip.build_model, []

    def mine(state_dict):
        given.append(state_dict)
        model = build(state_dict)
        model.logit_scale.data.zero_()
        return model

    monkeypatch.setattr(clip, "build_model", mine)
    with pytest.warns(UserWarning, match="does not tell"):
        model, preprocess = clip.load(str(tmp_path / "model.pt"), device="cpu")
    assert given[0].keys() == vit[0].state_dict().keys()
    assert model.logit_scale == 0
    assert model.dtype == torch.float32
    assert preprocess(picture()).shape == (3, 32, 32)


TOLD_BY_TENSORS = tiny_config(
    activation="quick_gelu",
    vision=VisionConfig(image_size=16, patch_size=8, width=64, layers=1, head_width=64),
    text=TextConfig(width=64, layers=1, head_width=64),
)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({}, ""),
        ({"activation": "gelu"}, "model has activation gelu, which tensors don't tell"),
        ({"text": replace(TOLD_BY_TENSORS.text, head_width=32)}, "model has 2 heads of texts, which"),
        ({"vision": replace(TOLD_BY_TENSORS.vision, mean=(0.5, 0.5, 0.5))}, "model has other pixels, which"),
    ],
)
def test_a_replaced_build_model_is_not_given_what_tensors_do_not_tell(tmp_path, monkeypatch, changes, named):
    """It would build another model of the same tensors, without a word."""
    miniclip.save(miniclip.CLIP(replace(TOLD_BY_TENSORS, **changes)), tmp_path / "model")
    build, given = clip.build_model, []
    monkeypatch.setattr(clip, "build_model", lambda state_dict: given.append(state_dict) or build(state_dict))
    with pytest.raises(ValueError, match=named) if named else nullcontext():
        clip.load(str(tmp_path / "model"), device="cpu")
    assert len(given) == (not named)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"init_logit_bias": -10.0}, "bias"),
        ({"vision": VisionConfig(kind="timm", image_size=32, timm_model="resnet10t")}, "timm's resnet10t"),
        ({"text": replace(tiny_config().text, eot_token=5)}, "end of a text is 5"),
    ],
)
def test_an_architecture_that_openais_code_lacks_is_refused(tmp_path, changes, named):
    miniclip.save(tiny_clip(**changes), tmp_path / "model")
    with pytest.raises(ValueError, match=rf"model is no model that OpenAI's code has: .*{named}.*use miniclip.load"):
        clip.load(str(tmp_path / "model"), device="cpu")


# ---- the tokenizer


@pytest.mark.parametrize(
    "text",
    ["a photo of a cat", "Ünïcode 日本語 😀", "don't!!", "a <|endoftext|> b", "!!<|endoftext|>x", "<|StartOfText|>",
     "&lt;|endoftext|&gt;", "", "<end_of_text>"],
)  # fmt: skip
def test_ids_and_texts_are_openais(text):
    """open_clip's code is OpenAI's, with another spelling of the special tokens."""
    reference = OpenClipTokenizer()
    reference.pat = clip.SimpleTokenizer.pat
    special = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    reference.cache = {name: name for name in special}
    reference.encoder = {**{k: i for k, i in reference.encoder.items() if i < 49406}, **special}
    reference.decoder = {i: symbol for symbol, i in reference.encoder.items()}
    ours = clip.SimpleTokenizer()
    assert ours.encoder == reference.encoder
    assert ours.decoder == reference.decoder
    ids = ours.encode(text)
    assert ids == reference.encode(text)
    assert ours.decode(ids) == "".join(reference.decoder[i] for i in ids).replace("</w>", " ") or not text.isascii()


@pytest.mark.parametrize("word", ["cat", "a", "zebrafish", "日本", "ünïcode", "!!??", "😀"])
def test_words_are_split_into_symbols_as_openais(word):
    ours, reference = clip.SimpleTokenizer(), OpenClipTokenizer()
    assert [*ours.byte_encoder.items()] == [*reference.byte_encoder.items()]
    assert ours.byte_decoder == reference.byte_decoder
    token = "".join(ours.byte_encoder[byte] for byte in word.encode())
    assert ours.bpe(token) == reference.bpe(token)
    assert ours.bpe("<|endoftext|>") == ours.cache["<|endoftext|>"] == "<|endoftext|>"
    assert ours.bpe(token[:1]) == reference.bpe(token[:1])  # half of a character, perhaps


def test_the_functions_of_its_tokenizer_are_openais():
    theirs = open_clip.tokenizer
    assert [*clip.simple_tokenizer.bytes_to_unicode().items()] == [*theirs.bytes_to_unicode().items()]
    for text in (" &amp;amp; Ã© \n a\t b ", "", "x"):
        assert clip.basic_clean(text) == theirs.basic_clean(text)
        assert clip.whitespace_clean(text) == theirs.whitespace_clean(text)
    for word in (("a", "b", "a", "b</w>"), ("a</w>",)):
        assert clip.get_pairs(word) == theirs.get_pairs(word)


def test_what_a_resnet_of_theirs_has_is_explained():
    tower = clip.CLIP(*RESNET).visual
    for name in ("_make_layer", "_inplanes"):
        with pytest.raises(
            AttributeError, match=rf"ModifiedResNet\.{name} is OpenAI's.*layers are made with the tower"
        ):
            getattr(tower, name)
        assert not hasattr(tower, name)
    with pytest.raises(AttributeError, match="has no attribute 'layer5'"):
        tower.layer5  # noqa: B018


def test_a_name_that_openais_package_lacks_is_told():
    with pytest.raises(AttributeError, match=r"miniclip\.openai has no bicubic; it has the names of OpenAI's"):
        clip.bicubic  # noqa: B018
    assert not hasattr(clip, "__path__")


def test_a_text_that_is_too_long_is_a_runtime_error_or_is_cut():
    with pytest.raises(RuntimeError, match="too long for context length 77"):
        clip.tokenize("word " * 100)
    tokens = clip.tokenize(["word " * 100, "x"], truncate=True)
    assert tokens.dtype == torch.int32
    assert tokens[0, -1] == 49407


def test_another_vocabulary_is_refused(tmp_path):
    (tmp_path / "bpe.txt.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"bpe_path is .*bpe.txt.gz; only OpenAI's own"):
        clip.SimpleTokenizer(str(tmp_path / "bpe.txt.gz"))
    assert clip.SimpleTokenizer(clip.default_bpe()).encode("a") == [320]


# ---- under the name of OpenAI's package

SCRIPT = """
import sys
import miniclip.openai
miniclip.openai.install()
miniclip.openai.install()
import clip
import clip.model as model
from clip import clip as module
from clip.model import build_model, convert_weights
from clip.simple_tokenizer import SimpleTokenizer as Tokenizer, bytes_to_unicode
from clip.clip import BICUBIC, Compose, Normalize, _Tokenizer
assert BICUBIC.value == "bicubic" and _Tokenizer is Tokenizer
assert module._MODELS["ViT-B/32"].endswith("/ViT-B-32.pt") and module._download and module._transform(8)
assert clip.model.CLIP is model.CLIP is miniclip.openai.CLIP and build_model and convert_weights
assert len(module._tokenizer.encode("a cat")) == len(Tokenizer().encode("a cat")) == 2
assert clip.available_models()[0] == "RN50" and clip.tokenize("a").shape == (1, 77)
import miniclip.model
files = [m.__file__ for m in set(sys.modules.values()) if str(getattr(m, "__file__", "")).endswith("miniclip/model.py")]
assert len(files) == 1, files
print("right")
"""


def test_it_can_take_the_name_of_openais_package():
    assert warm.run([sys.executable, "-c", SCRIPT], check=True).stdout == "right\n"


def test_another_package_of_that_name_is_not_replaced():
    script = "import sys, types, miniclip.openai; sys.modules['clip'] = types.ModuleType('clip'); "
    done = warm.run([sys.executable, "-c", script + "miniclip.openai.install()"])
    assert "ValueError: clip is imported already, from elsewhere; call miniclip.openai.install() before" in done.stderr
