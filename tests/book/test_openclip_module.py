"""Scripts written for open_clip run on `miniclip.openclip`. Oracle: open_clip itself, with the same weights."""

import copy
import importlib
import inspect
import json
import pickle
import random
import sys
import types
import warnings

import open_clip
import pytest
import torch
import warm
from foreign_models import TINY_RESNET, TINY_VIT, openclip_model, openclip_settings, probe, randomised, write_archive
from helpers import picture, tiny_clip
from PIL import Image
from torch import nn

import miniclip
import miniclip.openclip as ours
from miniclip import openclip_names
from miniclip.weights.download import OPENAI_FILES

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
TINY = {
    "vit": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32},
    "resnet": {"image_size": 64, "patch_size": None, "width": 8, "layers": [1, 1, 1, 1], "head_width": 64},
    "timm": {"image_size": 32, "timm_model_name": "test_convnext", "timm_proj": "linear"},
}
NAMES = ["a cat", "a large dog", "seven bicycles"]


MADE = {}  # open_clip's models by their configurations, for most tests want one of three


def write_folder(folder, kind="vit", text=TEXT, **settings):
    """A folder of open_clip's, and the model whose weights are in it."""
    folder.mkdir()
    model = {"embed_dim": 48, "vision_cfg": TINY[kind], "text_cfg": text, **settings}
    pixels = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": pixels}))
    name, key = f"local-dir:{folder}", json.dumps(model)
    if key not in MADE:
        MADE[key] = randomised(open_clip.create_model(name, load_weights=False), 1)
    theirs = copy.deepcopy(MADE[key])
    torch.save(theirs.state_dict(), folder / "open_clip_pytorch_model.bin")
    return name, theirs


@pytest.fixture(params=TINY)
def twins(request, tmp_path):
    name, theirs = write_folder(tmp_path / "model", request.param)
    return ours.create_model(name).eval(), theirs


@pytest.fixture
def vit(tmp_path):
    return write_folder(tmp_path / "model")


def test_weights_that_are_not_asked_for_are_not_loaded_though_a_folder_brings_them(vit):
    name, theirs = vit
    weight = ours.create_model(name, load_weights=False).visual.conv1.weight
    assert weight.shape == theirs.visual.conv1.weight.shape
    assert not torch.equal(weight, theirs.visual.conv1.weight)


def images_for(model, number=3):
    R = model.visual.preprocess_cfg["size"]
    R = R if isinstance(R, int) else R[0]
    return torch.randn(number, 3, R, R, generator=torch.Generator().manual_seed(1))


def assert_near(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# ---- the model


def test_a_call_gives_unit_features_and_the_exponentiated_scale(twins):
    model, theirs = twins
    images, tokens = images_for(theirs), ours.tokenize(NAMES)
    for found, expected in zip(model(images, tokens), theirs(images, tokens), strict=True):
        assert_near(found, expected)
    image_features, text_features, scale = model(images, tokens)
    torch.testing.assert_close(image_features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(text_features.norm(dim=1), torch.ones(3))
    assert scale == model.logit_scale.exp()


@pytest.mark.parametrize("normalize", [False, True])
def test_encoding_is_theirs(twins, normalize):
    model, theirs = twins
    images, tokens = images_for(theirs), ours.tokenize(NAMES)
    assert_near(model.encode_image(images, normalize=normalize), theirs.encode_image(images, normalize=normalize))
    assert_near(model.encode_text(tokens, normalize), theirs.encode_text(tokens, normalize))
    for found, expected in zip(model.get_logits(images, tokens), theirs.get_logits(images, tokens), strict=True):
        assert_near(found, expected)


def test_one_tower_alone_can_be_called(twins):
    model, theirs = twins
    assert model(image=images_for(theirs))[1] is None
    assert model(text=ours.tokenize("a cat"))[0] is None


def quantize(model, name):
    setattr(model, name, torch.ao.quantization.quantize_dynamic(getattr(model, name), {nn.Linear}))


CHANGES = {
    "deleted": delattr,
    "in bfloat16": lambda model, name: getattr(model, name).bfloat16(),
    "in double": lambda model, name: getattr(model, name).double(),
    "quantized": quantize,
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("change", CHANGES)
def test_a_tower_computes_whatever_becomes_of_the_other(twins, change):
    images, tokens = images_for(twins[1]), ours.tokenize(NAMES)
    for name, encode in (
        ("transformer", lambda model: model.encode_image(images)),
        ("visual", lambda model: model.encode_text(tokens)),
    ):
        model, theirs = map(copy.deepcopy, twins)
        before = encode(model)
        for each in (model, theirs):
            CHANGES[change](each, name)
        assert torch.equal(encode(model), before)
        assert_near(encode(model), encode(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.double])
def test_each_tower_computes_in_its_own_precision(twins, dtype):
    images, tokens = images_for(twins[1]), ours.tokenize(NAMES)
    for model in twins:
        model.visual.to(dtype)
    found, expected = (model.encode_image(images.to(dtype)) for model in twins)
    assert found.dtype == expected.dtype == dtype
    assert_near(found, expected, 1e-12 if dtype == torch.double else 0.02)
    assert torch.equal(twins[0].encode_image(images), found), "pictures in float32 are taken, too"
    assert_near(twins[0].encode_text(tokens), twins[1].encode_text(tokens))


def test_a_quantized_text_tower_computes(twins):
    model, tokens = twins[0], ours.tokenize(NAMES)
    expected = model.encode_text(tokens)
    quantize(model, "transformer")
    assert_near(model.encode_text(tokens), expected, 0.05)


def test_outputs_come_by_name_if_asked(vit):
    name, theirs = vit
    model, expected = ours.create_model(name, output_dict=True).eval(), open_clip.create_model(name, output_dict=True)
    found = model(images_for(theirs), ours.tokenize(NAMES))
    assert found.keys() == expected.eval()(images_for(theirs), ours.tokenize(NAMES)).keys()


def test_a_bias_of_the_logits_comes_fourth(tmp_path):
    name, theirs = write_folder(tmp_path / "model", init_logit_scale=2.3, init_logit_bias=-10.0)
    model, images, tokens = ours.create_model(name).eval(), images_for(theirs), ours.tokenize(NAMES)
    found, expected = model(images, tokens), theirs(images, tokens)
    assert len(found) == len(expected) == 4
    assert found[3] == expected[3]
    assert_near(model.get_logits(images, tokens)[0], theirs.get_logits(images, tokens)[0])


def test_names_keys_and_their_order_are_theirs_so_weights_go_both_ways(twins):
    model, theirs = twins
    assert [*model.state_dict()] == [*theirs.state_dict()]
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    copy.deepcopy(theirs).load_state_dict(model.state_dict())
    model.load_state_dict(theirs.state_dict())


def test_gradients_are_theirs(vit):
    name, theirs = vit
    model = ours.create_model(name)
    model.set_grad_checkpointing()
    for each in (model, theirs.train()):
        image_features, text_features, scale = each(images_for(theirs), ours.tokenize(NAMES))
        ours.ClipLoss()(image_features, text_features, scale).backward()
    found = dict(model.named_parameters())
    largest = max(p.grad.abs().max() for p in theirs.parameters())
    for parameter_name, expected in theirs.named_parameters():
        assert (found[parameter_name].grad - expected.grad).abs().max() <= 1e-5 * largest, parameter_name


def test_the_attributes_that_scripts_read(twins):
    model, theirs = twins
    for name in ("image_size", "preprocess_cfg", "output_dim", "grid_size", "patch_size"):
        expected = getattr(theirs.visual, name, None)
        if expected is not None:
            found = getattr(model.visual, name)
            same = {k: tuple(v) if isinstance(v, list) else v for k, v in expected.items()} if name[:2] == "pr" else 0
            assert found == (same or expected), name
    assert (model.context_length, model.vocab_size) == (theirs.context_length, theirs.vocab_size)
    assert torch.equal(model.attn_mask, theirs.attn_mask)
    assert model.transformer.get_cast_dtype() == torch.float32
    assert model.transformer.batch_first == theirs.transformer.batch_first
    assert (model.transformer.width, model.transformer.layers) == (theirs.transformer.width, theirs.transformer.layers)


def test_modules_have_their_names_and_order(twins):
    model, theirs = twins
    assert [name for name, _ in model.named_modules()] == [name for name, _ in theirs.named_modules()]


def test_what_a_model_of_theirs_has_is_here_or_what_stands_in_its_place_is_named(twins):
    model, theirs = twins
    common, missing = {*dir(nn.Module())}, set()
    for path, module in theirs.named_modules():
        if path.startswith("visual.trunk"):
            continue  # timm's own
        mine = model.get_submodule(path)
        for name in {*dir(module)} - common - {*dir(mine)}:
            place = rf"^{type(mine).__name__}\.{name} is open_clip's, and not in miniclip\.openclip: .{{10}}"
            with pytest.raises(AttributeError, match=place):
                getattr(mine, name)
            missing.add(name)
    assert "forward_intermediates" in missing


def learning(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.sample(8)
@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("tower, unlocked", [(tower, n) for tower in ("image", "text") for n in (0, 1, 2, 3, 4, 9)])
def test_towers_are_locked_as_theirs(tmp_path, kind, tower, unlocked):
    model, theirs = (library.create_model(write_folder(tmp_path / library.__name__, kind)[0])
                     for library in (ours, open_clip))  # fmt: skip
    if (kind, tower, bool(unlocked)) == ("resnet", "image", True):
        with pytest.raises(ValueError, match=f"unlocked_groups is {unlocked}; a ResNet is locked whole"):
            model.lock_image_tower(unlocked)
        return
    for each in (model, theirs):
        getattr(each, f"lock_{tower}_tower")(unlocked)
    assert learning(model) == learning(theirs)


def test_norms_of_a_locked_text_tower_are_locked(vit):
    with pytest.raises(ValueError, match="freeze_layer_norm is False"):
        ours.create_model(vit[0]).lock_text_tower(freeze_layer_norm=False)


@pytest.mark.parametrize("kind, timm_model, unlocked", [
    ("resnet", None, 0), ("timm", "test_resnet", 0), ("timm", "test_resnet", 2), ("vit", None, 0)
])  # fmt: skip
def test_norms_of_a_locked_tower_count_no_more(tmp_path, monkeypatch, kind, timm_model, unlocked):
    if timm_model:
        monkeypatch.setitem(TINY[kind], "timm_model_name", timm_model)
    name, _ = write_folder(tmp_path / "model", kind)
    outputs = []
    for library in (ours, open_clip):
        model = library.create_model(name).train()
        model.lock_image_tower(unlocked, freeze_bn_stats=True)
        images = images_for(model)
        outputs.append([model.encode_image(images), {**model.state_dict()}, learning(model)])
    (found, tensors, learn), (expected, their_tensors, they_learn) = outputs
    assert_near(found, expected)
    assert learn == they_learn
    assert [*tensors] == [*their_tensors]
    for key, tensor in their_tensors.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=1e-6, atol=1e-7)


def test_blocks_are_recomputed_in_the_towers_that_are_asked(twins):
    for each in twins:
        each.set_grad_checkpointing()
    model, theirs = twins
    assert model.transformer.grad_checkpointing
    for path, module in theirs.named_modules():
        assert getattr(model.get_submodule(path), "grad_checkpointing", None) == getattr(
            module, "grad_checkpointing", None
        ), path
    images = images_for(theirs)
    for each in twins:
        each.zero_grad()
        each.encode_image(images).sum().backward()
    for (name, found), expected in zip(model.visual.named_parameters(), theirs.visual.parameters(), strict=True):
        assert (found.grad - expected.grad).abs().max() <= 1e-4 * (1 + expected.grad.abs().max()), name
    model.visual.set_grad_checkpointing(False)
    assert model.transformer.grad_checkpointing


def test_what_is_not_to_decay_is_theirs(twins):
    assert twins[0].no_weight_decay() == twins[1].no_weight_decay()


def test_a_block_takes_their_arguments_by_place(vit):
    block, theirs = (each.transformer.resblocks[0] for each in (ours.create_model(vit[0]).eval(), vit[1]))
    x, other = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.full((5, 5), -torch.inf).triu(1)
    assert_near(block(x, None, None, mask), theirs(x, None, None, mask))
    assert_near(block.attention(x, other, other, mask), theirs.attention(x, other, other, mask))
    with pytest.warns(UserWarning, match="k_x and v_x are ignored"):
        assert_near(block(x, other, other), theirs(x, other, other))


class Half(nn.Module):
    def forward(self, x):
        return 0.5 * x


@pytest.mark.parametrize("path", ["transformer.resblocks.1.ls_1", "transformer.resblocks.0.ls_2", "patch_dropout"])
def test_identities_that_are_replaced_act(vit, path):
    name, theirs = vit
    model = ours.create_model(name).eval()
    parent, _, last = path.rpartition(".")
    before = model.encode_image(images_for(theirs))
    for each in (model, theirs):
        setattr(each.visual.get_submodule(parent), last, Half())
    assert_near(model.encode_image(images_for(theirs)), theirs.encode_image(images_for(theirs)))
    assert not torch.allclose(model.encode_image(images_for(theirs)), before)


@pytest.mark.parametrize("path", ["act1", "layer1.0.act3", "layer2.0.act2"])
def test_activations_of_a_resnet_are_replaced_by_their_names(tmp_path, path):
    name, theirs = write_folder(tmp_path / "model", "resnet")
    model = ours.create_model(name).eval()
    parent, _, last = path.rpartition(".")
    for each in (model, theirs):
        setattr(each.visual.get_submodule(parent), last, nn.GELU())
    assert_near(model.encode_image(images_for(theirs)), theirs.encode_image(images_for(theirs)))


@pytest.mark.sample(1)
def test_an_image_tower_compiles_whole_and_is_copied(twins):
    model, theirs = twins
    compiled = torch.compile(copy.deepcopy(model.visual), backend="eager", fullgraph=True)
    assert_near(compiled(images_for(theirs)), theirs.visual(images_for(theirs)))


def test_patches_come_with_output_tokens(vit):
    name, theirs = vit
    model = ours.create_model(name).eval()
    model.visual.output_tokens = theirs.visual.output_tokens = True
    for found, expected in zip(model.visual(images_for(theirs)), theirs.visual(images_for(theirs)), strict=True):
        assert_near(found, expected)


def test_hooks_see_rows_first_and_their_numbers(vit):
    name, theirs = vit
    seen = []
    for model in (ours.create_model(name).eval(), theirs):
        for block in (model.visual.transformer.resblocks[-1], model.transformer.resblocks[0]):
            block.register_forward_hook(lambda module, inputs, output: seen.append(output))
        model(images_for(theirs), ours.tokenize(NAMES))
    assert [tuple(each.shape) for each in seen[:2]] == [(3, 5, 64), (3, 77, 64)]
    for found, expected in zip(seen[:2], seen[2:], strict=True):
        assert_near(found, expected)


def test_text_states_are_written_out_as_by_diffusion_models(vit):
    """Blocks are called one by one with the mask, up to the last but one."""
    name, theirs = vit
    states = []
    for model in (ours.create_model(name).eval(), theirs):
        x = model.token_embedding(ours.tokenize(NAMES)) + model.positional_embedding
        for block in model.transformer.resblocks[:-1]:
            x = block(x, attn_mask=model.attn_mask)
        states.append(model.ln_final(x))
    assert_near(*states)


def test_attention_gives_its_weights(vit):
    name, theirs = vit
    x = torch.randn(3, 5, 64)
    found, expected = (
        model.visual.transformer.resblocks[0].attn(x, x, x, need_weights=True)[1]
        for model in (ours.create_model(name), theirs)
    )
    assert_near(found, expected)


def test_double_is_computed_in_double(twins):
    model, theirs = (each.double() for each in twins)
    images, tokens = images_for(theirs).double(), ours.tokenize(NAMES)
    assert_near(model.encode_image(images), theirs.encode_image(images), 1e-12)
    assert_near(model.encode_text(tokens), theirs.encode_text(tokens), 1e-12)
    assert torch.autograd.gradcheck(model.visual, images[:1].requires_grad_(), fast_mode=True)
    x = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(model.ln_final, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, None])
def test_a_norm_in_half_is_computed_in_float32(dtype, weights):
    """With weights in float32, as precisions leave them, or in the input's type."""
    norm, x = ours.openai.LayerNorm(64), torch.randn(2, 64).to(dtype)
    nn.init.normal_(norm.weight)
    norm = norm.to(weights or dtype)
    expected = nn.functional.layer_norm(x.float(), (64,), norm.weight.float(), norm.bias.float())
    assert torch.equal(norm(x), expected.to(dtype))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "pure_fp16", "pure_bf16", "amp", "fp32"])
def test_precisions_leave_in_float32_what_open_clip_leaves(vit, precision):
    name, _ = vit
    found, expected = (
        {n: p.dtype for n, p in library.create_model(name, precision=precision).named_parameters()}
        for library in (ours, open_clip)
    )
    assert found == expected


def test_a_precision_that_is_none_is_refused(vit):
    with pytest.raises(ValueError, match=r"precision is 'fp15'.*fp16"):
        ours.create_model(vit[0], precision="fp15")


# ---- pictures


@pytest.mark.parametrize("size", [(40, 30), (30, 70), (9, 20)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_pictures_become_the_same_pixels(vit, size, mode):
    (_, train, val), (_, their_train, their_val) = (
        library.create_model_and_transforms(vit[0]) for library in (ours, open_clip)
    )
    image = picture(3, size, mode)
    assert torch.equal(val(image), their_val(image))
    for transform in (train, their_train):
        torch.manual_seed(4)
        image.seen = [*getattr(image, "seen", []), transform(image)]
    assert torch.equal(*image.seen)


@pytest.mark.parametrize(
    "options",
    [
        {"resize_mode": "squash", "interpolation": "bilinear"},
        {"mean": (0.5, 0.5, 0.5), "std": (0.1, 0.2, 0.3)},
        {"interpolation": "random", "mean": 0.4, "std": 0.3},
        {"resize_mode": "longest", "fill_color": 7},
        {"aug_cfg": {"color_jitter": (0.4, 0.3, 0.2, 0.1), "color_jitter_prob": 0.5, "gray_scale_prob": 0.5}},
        {"aug_cfg": {"use_timm": True, "ratio": (0.5, 2), "color_jitter": 0.4, "re_prob": 0.9}},
    ],
)
def test_image_transform_is_theirs(options):
    for seed, size in ((0, (50, 31)), (1, (31, 50)), (2, (7, 9)), (3, (24, 24)), (4, (90, 5))):
        for is_train in (False, True):
            found = []
            for library in (ours, open_clip):
                torch.manual_seed(seed)
                random.seed(seed)
                transform = pickle.loads(pickle.dumps(library.image_transform(24, is_train, **options)))
                found.append(transform(picture(1, size)))
            assert torch.equal(*found)


def test_settings_of_pixels_are_theirs():
    for library in (ours, open_clip.transform):
        base = library.PreprocessCfg(size=(24, 24), mean=(0.1, 0.2, 0.3))
        assert base.input_size == (base.num_channels, 24, 24) == library.PreprocessCfg(size=24).input_size
        merged = library.merge_preprocess_dict(base, {"std": (0.5,) * 3, "size": None, "other": 1})
        assert merged == library.merge_preprocess_kwargs(vars(base), std=(0.5,) * 3)
        assert vars(library.PreprocessCfg(**merged)) == vars(open_clip.transform.PreprocessCfg(**merged))
        image = library.image_transform_v2(library.PreprocessCfg(**merged), is_train=False)(picture(0, (40, 30)))
        assert torch.equal(
            image, open_clip.image_transform(24, False, merged["mean"], merged["std"])(picture(0, (40, 30)))
        )
    with pytest.raises(ValueError, match="mode is 'L'"):
        ours.PreprocessCfg(mode="L")


def test_arguments_change_the_pixels(vit):
    options = {"image_mean": (0.1, 0.2, 0.3), "image_interpolation": "bilinear", "image_resize_mode": "squash"}
    (model, val), (theirs, their_val) = (
        library.create_model_from_pretrained(vit[0], **options) for library in (ours, open_clip)
    )
    assert torch.equal(val(picture(2, (50, 40))), their_val(picture(2, (50, 40))))
    assert model.visual.preprocess_cfg["mean"] == tuple(theirs.visual.preprocess_cfg["mean"])


def test_the_crop_of_training_can_be_set(vit):
    found = []
    for library in (ours, open_clip):
        _, train, _ = library.create_model_and_transforms(vit[0], aug_cfg={"scale": (0.2, 0.3)})
        torch.manual_seed(0)
        found.append(train(picture(0, (60, 60))))
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="color_jitter"):
        ours.create_model_and_transforms(vit[0], aug_cfg={"color_jitter": 0.4})


@pytest.mark.parametrize("name, value", [("resize_mode", "stretch"), ("interpolation", "nearest")])
def test_another_resizing_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is '{value}'"):
        ours.image_transform(24, False, **{name: value})


# ---- words

TEXTS = [
    "a photo of a cat",
    "",
    "ÀÉÎ õ ü",
    "don't  stop!!",
    "😀😀 <start_of_text> 12,345",
    "&lt;b&gt; &amp;amp;",
    "日本語のテキスト",
]


def test_tokens_are_theirs_and_long():
    assert torch.equal(ours.tokenize(TEXTS), open_clip.tokenize(TEXTS))
    assert ours.tokenize(TEXTS).dtype == torch.int64
    found, expected = ours.get_tokenizer(), open_clip.get_tokenizer("ViT-B-32")
    for text in TEXTS:
        assert found.encode(text) == expected.encode(text)
        assert found.decode(found.encode(text)) == expected.decode(expected.encode(text))
    for name in ("vocab_size", "sot_token_id", "eot_token_id", "context_length"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.encoder == expected.encoder
    assert ours.decode(ours.tokenize("a cat")[0]) == open_clip.decode(open_clip.tokenize("a cat")[0])


def test_a_text_that_is_too_long_is_cut_as_theirs_and_a_warning_counts_it():
    texts = ["a cat", "word " * 90, "dog " * 200]
    with pytest.warns(UserWarning, match=r"2 of 3 texts have more than 77 tokens.*'word word"):
        found = ours.get_tokenizer("ViT-B-32")(texts)
    assert torch.equal(found, open_clip.get_tokenizer("ViT-B-32")(texts))


def test_a_text_that_just_fits_is_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens = ours.tokenize("word " * 75)
    assert tokens[0, -1] == 49407


def test_a_tokenizer_has_its_models_length(tmp_path):
    name, _ = write_folder(tmp_path / "model", text={**TEXT, "context_length": 20})
    assert ours.get_tokenizer(name)(["a cat"]).shape == (1, 20)
    assert ours.get_tokenizer(name)("a cat", context_length=9).shape == (1, 9)
    assert ours.get_tokenizer(name, context_length=11)("a cat").shape == (1, 11)


def test_a_tokenizer_of_other_ids_is_refused(tmp_path):
    miniclip.save(miniclip.CLIP(TINY_VIT), tmp_path / "other")
    with pytest.raises(ValueError, match="vocab_size 60"):
        ours.get_tokenizer(str(tmp_path / "other"))


def test_a_zero_shot_classifier_is_theirs(vit):
    name, theirs = vit
    model, tokenizer = ours.create_model(name).eval(), ours.get_tokenizer(name)
    for templates in (["a photo of a {}.", "a {}"], [lambda c: f"the {c}"]):
        found = ours.build_zero_shot_classifier(model, tokenizer, NAMES, templates)
        assert_near(found, open_clip.build_zero_shot_classifier(theirs, tokenizer, NAMES, templates))
    assert list(open_clip.IMAGENET_CLASSNAMES) == ours.IMAGENET_CLASSNAMES


def test_the_loss_is_theirs():
    features = nn.functional.normalize(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    found, expected = (
        library.ClipLoss()(*features, torch.tensor(20.0), output_dict=True) for library in (ours, open_clip)
    )
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found["contrastive_loss"], expected["contrastive_loss"])
    for loss in (ours.ClipLoss(rank=1, world_size=2), ours.SigLipLoss(rank=1, world_size=2)):
        with pytest.raises(ValueError, match=r"rank is 1 of 2 \(world_size\); torch.distributed has rank 0 of 1"):
            loss(*features, torch.tensor(20.0), torch.tensor(0.0))
    with pytest.raises(ValueError, match="use_horovod is True"):
        ours.ClipLoss(world_size=2, use_horovod=True)(*features, torch.tensor(20.0))


# ---- names of architectures and weights


def test_architectures_are_open_clips():
    names = ours.list_models()
    assert [name for name in open_clip.list_models() if name in names] == names
    assert (len(names), len(ours.list_pretrained())) == (55, 108), "docs/openclip.md has these numbers"
    assert {"ViT-B-32", "ViT-B-32-quickgelu", "ViT-L-14-336", "ViT-H-14", "RN50x64", "convnext_base_w"} <= set(names)
    for name in names:
        settings = open_clip.get_model_config(name)
        expected = miniclip.weights.architecture.config_from_openclip({"model_cfg": settings}, name)
        assert ours._published()[name][0] == expected


def test_tags_their_repositories_and_how_they_were_trained_are_open_clips():
    names = ours.list_models()
    assert ours.list_pretrained() == [pair for pair in open_clip.list_pretrained() if pair[0] in names]
    assert ours.list_pretrained(as_str=True)[0] == open_clip.list_pretrained(as_str=True)[0]
    for name, tag in ours.list_pretrained():
        config, weights = ours._published()[name]
        theirs, trained = open_clip.pretrained.get_pretrained_cfg(name, tag), weights[tag].applied(config)
        if tag == "openai":
            assert theirs["url"].endswith(OPENAI_FILES[weights[tag].source])
        else:
            assert theirs["hf_hub"] == weights[tag].source + "/"
        assert (trained.activation == "quick_gelu") == bool(theirs.get("quick_gelu"))
        vision = trained.vision
        assert (vision.mean, vision.std) == (theirs["mean"], theirs["std"])
        assert (vision.resize, vision.interpolation) == (theirs["resize_mode"], theirs["interpolation"])
    tags = ours.list_pretrained_tags_by_model("ViT-B-32")
    assert tags == open_clip.list_pretrained_tags_by_model("ViT-B-32")
    assert "ViT-B-16" in ours.list_pretrained_models_by_tag("laion2b-s34b-b88k")


@pytest.fixture(scope="module")
def rn50():
    """With random weights that half precision holds."""
    torch.manual_seed(0)
    return open_clip.create_model("RN50-quickgelu").half().float().eval()


def test_the_tag_openai_is_openais_file_and_its_activation_wins_aloud(rn50, tmp_path):
    sizes = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    tensors = rn50.state_dict() | {name: torch.tensor(size) for name, size in sizes.items()}
    torch.save({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "RN50.pt")
    with pytest.warns(UserWarning, match="OpenAI was trained with quick_gelu"):
        model, _ = ours.create_model_from_pretrained("RN50", "OpenAI", cache_dir=str(tmp_path))
    assert_near(model.eval().encode_text(ours.tokenize(NAMES)), rn50.encode_text(ours.tokenize(NAMES)))


@pytest.mark.long
def test_a_tag_finds_its_weights_in_the_hubs_cache(rn50, tmp_path):
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--timm--resnet50_clip.yfcc15m"
    for path, text in (
        ("refs/main", revision),
        (f"snapshots/{revision}/open_clip_config.json", json.dumps({"model_cfg": SETTINGS_OF_RN50})),
    ):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
    torch.save(rn50.state_dict(), folder / "snapshots" / revision / "open_clip_pytorch_model.bin")
    images = torch.randn(1, 3, 224, 224)
    model = ours.create_model("RN50-quickgelu", "yfcc15m", cache_dir=str(tmp_path)).eval()
    assert_near(model.encode_image(images), rn50.encode_image(images))


SETTINGS_OF_RN50 = open_clip.get_model_config("RN50-quickgelu")


@pytest.mark.parametrize("model", ["ViT-S-32-alt", "ViT-S-32/alt"])
def test_a_file_belongs_to_the_architecture_of_the_name(tmp_path, model):
    theirs = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save(
        {"state_dict": {f"module.{key}": value for key, value in theirs.state_dict().items()}}, tmp_path / "w.pt"
    )
    found = ours.create_model(model, pretrained=str(tmp_path / "w.pt")).eval()
    tokens = ours.tokenize(NAMES)
    assert_near(found.encode_text(tokens), theirs.encode_text(tokens))
    assert found.config.activation == "gelu"
    quick = ours.create_model(model, pretrained=str(tmp_path / "w.pt"), force_quick_gelu=True)
    assert isinstance(quick.transformer.resblocks[0].mlp.gelu, ours.openai.QuickGELU)
    with pytest.raises(ValueError, match="another architecture"):
        ours.create_model("ViT-S-16", pretrained=str(tmp_path / "w.pt"))


def test_a_file_of_an_architecture_some_of_whose_weights_need_other_pictures_is_named(tmp_path, monkeypatch, recwarn):
    name, file = "ViT-S-32-alt", str(tmp_path / "w.pt")
    torch.save(open_clip.create_model(name).state_dict(), file)
    ours.create_model(name, pretrained=file)
    assert not [each for each in recwarn if "pictures" in str(each.message)]
    tags = {"usual": ours._Weights("x", {"activation": "quick_gelu"}), "odd": ours._Weights("x", {"resize": "squash"})}
    monkeypatch.setitem(ours._published(), name, (ours._published()[name][0], tags))
    with pytest.warns(UserWarning, match=rf"w.pt does not say how its pictures.*weights of {name}.*\(odd: .*squash"):
        _, _, preprocess = ours.create_model_and_transforms(name, pretrained=file)
    _, _, theirs = open_clip.create_model_and_transforms(name, pretrained=file)
    noise = Image.effect_noise((300, 250), 50).convert("RGB")
    assert torch.equal(preprocess(noise), theirs(noise))


def test_a_file_that_tells_its_architecture_must_have_the_names(tmp_path):
    miniclip.save(tiny_clip(), tmp_path / "tiny")
    with pytest.raises(
        ValueError, match=r"another architecture than ViT-B-32(.|\n)*width: the name's 768, the file's 16"
    ):
        ours.create_model("ViT-B-32", pretrained=str(tmp_path / "tiny"))


def test_a_resolution_and_a_length_can_be_forced(vit):
    name, _ = vit
    options = {"force_image_size": 64, "force_context_length": 40}
    model = ours.create_model(name, **options).eval()
    assert model.visual.image_size == (64, 64)
    assert model.context_length == 40
    theirs = open_clip.create_model(name, force_image_size=64).eval()
    assert_near(model.encode_image(images_for(theirs)), theirs.encode_image(images_for(theirs)))
    assert ours.create_model("ViT-S-32-alt", force_image_size=(64, 64)).visual.grid_size == (2, 2)
    with pytest.raises(ValueError, match="square"):
        ours.create_model("ViT-S-32-alt", force_image_size=(64, 32))


FORCED = {"force_image_size": [16, 48, 96], "force_context_length": [32, 76, 128], "force_quick_gelu": [True]}
TRAINING = {"force_patch_dropout"}  # see `test_what_a_configuration_leaves_out_in_training_is_left_out`
REFUSED = {"force_custom_text": True, "force_preprocess_cfg": {"size": 48}}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in FORCED.items() for value in values])
def test_what_is_forced_gives_their_weights_and_features(vit, name, value):
    model, theirs = (library.create_model(vit[0], **{name: value}).eval() for library in (ours, open_clip))
    found, expected = model.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert_near(found[key], tensor, 1e-6)
    images, tokens = images_for(theirs), ours.get_tokenizer(vit[0], context_length=theirs.context_length)(NAMES)
    assert model.context_length == theirs.context_length
    assert_near(model.encode_image(images), theirs.encode_image(images))
    assert_near(model.encode_text(tokens), theirs.encode_text(tokens))


VITS = {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": ""}
LEFT_OUT = {
    "patches": ({**TINY["vit"], "patch_dropout": 0.5}, {}),
    "forced": (TINY["vit"], {"force_patch_dropout": 0.75}),
    "forced off": ({**TINY["vit"], "patch_dropout": 0.5}, {"force_patch_dropout": 0.0}),
    "of timm's": ({**VITS, "patch_dropout": 0.5, "timm_drop": 0.3, "timm_drop_path": 0.4}, {}),
    "of an MLP": ({**TINY["timm"], "timm_drop": 0.3, "timm_drop_path": 0.4, "timm_proj": "mlp"}, {}),
}


@pytest.mark.parametrize("vision, options", LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_a_configuration_leaves_out_in_training_is_left_out(tmp_path, monkeypatch, vision, options):
    monkeypatch.setitem(TINY, "drawn", vision)
    name, _ = write_folder(tmp_path / "model", "drawn", {**TEXT, "vocab_size": 99}, output_dict=True)
    models = [library.create_model(name, **options) for library in (ours, open_clip)]
    images = images_for(models[1])
    for is_training in (True, False):
        features = []
        for model in models:
            torch.manual_seed(3)
            features.append(model.train(is_training)(images)["image_features"])
        assert_near(*features)
    assert ours.get_model_config(name)["vision_cfg"] == vision
    by_file = ours.create_model(str(tmp_path / "model" / "open_clip_pytorch_model.bin"), **options)
    assert str(by_file) == str(models[0])


def test_every_argument_of_theirs_that_forces_is_compared_or_refused(vit):
    names = {name for name in inspect.signature(open_clip.create_model).parameters if name.startswith("force_")}
    assert names == FORCED.keys() | TRAINING | REFUSED.keys()
    for name, value in REFUSED.items():
        with pytest.raises(ValueError, match=name):
            ours.create_model(vit[0], **{name: value})


def test_random_weights_are_warned_about_and_refused_where_trained_ones_are_needed():
    with pytest.warns(UserWarning, match="the weights of ViT-S-32-alt are random"):
        model = ours.create_model("ViT-S-32-alt")
    assert model.training  # as open_clip's
    assert next(model.parameters()).device.type == "cpu"
    with pytest.raises(ValueError, match=r"ViT-L-14 needs weights.*laion2b_s32b_b82k"):
        ours.create_model_from_pretrained("ViT-L-14")


@pytest.mark.parametrize(
    "name, pretrained, message",
    [
        ("ViT-B-33", "openai", r"'ViT-B-33'.*did you mean ViT-B-32"),
        ("ViT-B-16-SigLIP", "webli", "openclip:NAME/TAG"),
        ("ViT-B-32", "laion2b_s34b_b79", r"'laion2b_s34b_b79'.*did you mean laion2b_s34b_b79k"),
        ("ViT-S-32", "openai", "which has none"),
        ("local-dir:nowhere", None, "no folder 'nowhere'"),
    ],
)
def test_what_is_not_there_is_named(name, pretrained, message):
    with pytest.raises(ValueError, match=message):
        ours.create_model(name, pretrained)


@pytest.mark.parametrize(
    "option", [{"force_preprocess_cfg": {"mode": "L"}}, {"force_custom_text": True}, {"pretrained_image_path": "x"}]
)
def test_what_is_not_supported_is_refused_and_what_asks_for_nothing_is_not(vit, option):
    (name,) = option
    with pytest.raises(ValueError, match=name):
        ours.create_model(vit[0], **option)
    ours.create_model(vit[0], **dict.fromkeys(option), pretrained_image=False, pretrained_hf=True)


def test_a_schema_ignores_a_tag_aloud(vit):
    with pytest.warns(UserWarning, match="pretrained='openai' is ignored"):
        ours.create_model(vit[0], "openai")


# ---- other checkpoints


@pytest.mark.parametrize("config", [TINY_VIT, TINY_RESNET], ids=["vit", "resnet"])
def test_openais_archive_by_path_is_open_clips_model(tmp_path, config):
    theirs = openclip_model(config)
    write_archive(theirs, config, tmp_path / "model.pt")
    images, tokens = probe(config)
    for model in (
        ours.load_openai_model(str(tmp_path / "model.pt"), device="cpu").eval(),
        ours.create_model(str(tmp_path / "model.pt")).eval(),
    ):
        assert_near(model.encode_image(images), theirs.encode_image(images))
        assert_near(model.encode_text(tokens), theirs.encode_text(tokens))
    assert openclip_settings(config)["embed_dim"] == model.visual.output_dim
    tensors = ours.load_state_dict(tmp_path / "model.pt")
    assert {*tensors} - {"attn_mask"} == {*model.state_dict()}
    ours.resize_pos_embed(tensors, model)
    assert_near(tensors["visual.conv1.weight"].float(), theirs.visual.conv1.weight)


def test_our_own_model_has_our_own_pixels_and_features(tmp_path):
    reference = tiny_clip()
    miniclip.save(reference, tmp_path / "model")
    model, _, preprocess = miniclip.create_model_and_transforms(str(tmp_path / "model"))
    _, expected = miniclip.load(tmp_path / "model", device="cpu")
    assert torch.equal(preprocess(picture(0)), expected(picture(0)))
    images, tokens = torch.randn(2, 3, 16, 16), miniclip.get_tokenizer(str(tmp_path / "model"))(["a cat", "a dog"])
    assert tokens.shape == (2, 16)
    assert_near(model.eval().encode_image(images), reference.encode_image(images))
    assert_near(model.encode_text(tokens), reference.encode_text(tokens))
    assert_near(model.get_logits(images, tokens)[0], reference(images, tokens)[0])
    assert ("ViT-B-32", "openai") in miniclip.list_pretrained()


# ---- in place of the package

SCRIPT = """
import miniclip.openclip
miniclip.openclip.install()
import open_clip, sys, torch
from open_clip import create_model_from_pretrained, get_tokenizer
from open_clip.factory import create_model_and_transforms
from open_clip.tokenizer import SimpleTokenizer, tokenize
from open_clip.transform import image_transform
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, convert_weights_to_lp, get_cast_dtype
import open_clip.transformer
import open_clip_train.train
from open_clip.transformer import VisionTransformer
from open_clip.constants import OPENAI_DATASET_MEAN
from open_clip.utils import freeze_batch_norm_2d
from open_clip.tokenizer import _tokenizer
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES, zero_shot_classifier
from open_clip.openai import load_openai_model
assert open_clip.transformer.VisionTransformer is VisionTransformer
import importlib
open_clip.model.CLIP = type("Adapted", (CLIP,), {})  # and the modules that took the name are imported again
importlib.reload(open_clip.factory)
model, _, preprocess = open_clip.create_model_and_transforms(sys.argv[1], device="cpu", jit=True)
tokenizer = open_clip.get_tokenizer(sys.argv[1])
assert type(model.eval()).__name__ == "Adapted"
with torch.no_grad():
    image_features, text_features, scale = model(torch.zeros(1, 3, 32, 32), tokenizer(["a cat", "a dog"]))
print((scale * image_features @ text_features.T).softmax(dim=-1).sum().item())
"""


def test_scripts_that_import_open_clip_get_this_module(vit):
    run = warm.run([sys.executable, "-c", SCRIPT, vit[0]])
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(1)
    assert "jit=True is ignored" in run.stderr


def test_another_open_clip_is_not_replaced_in_silence():
    with pytest.raises(ValueError, match=r"open_clip is imported already.*miniclip.openclip.install"):
        ours.install()


# ---- names


def test_every_name_of_theirs_is_here_or_what_stands_in_its_place_is_told():
    lacking = set()
    for module in [open_clip, *(importlib.import_module(f"open_clip.{name}") for name in openclip_names.MODULES)]:
        for name, value in vars(module).items():
            is_theirs = getattr(value, "__module__", "").startswith("open_clip") or name.isupper()
            if not is_theirs or name.startswith("__") or isinstance(value, types.ModuleType):
                continue
            try:
                getattr(ours, name)
            except AttributeError as error:
                lacking.add((name, str(error)))
    assert {name for name, message in lacking if not message.startswith(f"miniclip.openclip has no {name}; ")} == set()
    told = dict(lacking)
    assert "openclip:NAME/TAG" in told["CoCaLoss"]
    assert "openclip:NAME/TAG" in told["HFTokenizer"]
    assert "list_pretrained() has" in told["get_pretrained_url"]
    assert not hasattr(ours, "__path__")
    assert {"get_cast_dtype", "VisionTransformer", "create_loss"} <= {*dir(ours)}


@pytest.mark.parametrize("name", ["_pcfg", "_slpcfg", "_apcfg", "_mccfg", "_mc2cfg", "_pecfg"])
def test_settings_of_weights_are_theirs(name):
    """Loaders of weights of their own prepare pictures by them, as Marqo's."""
    own, theirs = getattr(ours, name), getattr(open_clip.pretrained, name)
    assert own() == theirs()
    changed = {"hf_hub": "owner/name/", "mean": (0.1, 0.2, 0.3), "size": 240}
    assert own("https://x/y.pt", **changed) == theirs("https://x/y.pt", **changed)
    settings = {key: value for key, value in own().items() if key in ("mean", "std", "interpolation", "resize_mode")}
    assert ours.image_transform_v2(ours.PreprocessCfg(**settings), is_train=False)


LACKING = """
import miniclip.openai, miniclip.openclip
miniclip.openai.install()
miniclip.openclip.install()
import clip, open_clip
assert not hasattr(open_clip, "CoCaLoss") and getattr(clip, "nothing", 3) == 3 and not hasattr(open_clip, "__path__")
for statement in (
    "from open_clip import get_pretrained_url",
    "from open_clip.tokenizer import tokenize, HFTokenizer as H",
    "from open_clip.loss import ClipLoss, CoCaLoss",
    "from clip.model import CLIP, ViT",
    "open_clip.CoCaLoss",
):
    try:
        exec(statement)
    except (ImportError, AttributeError) as error:
        print(type(error).__name__, error)
"""


def test_what_stands_in_the_place_of_a_missing_name_is_told_to_an_import_too():
    run = warm.run([sys.executable, "-c", LACKING])
    assert run.returncode == 0, run.stderr
    starts = [
        "ImportError miniclip.openclip has no get_pretrained_url; ",
        "ImportError miniclip.openclip has no HFTokenizer; ",
        "ImportError miniclip.openclip has no CoCaLoss; `miniclip eval`",
        "ImportError miniclip.openai has no ViT; it has the names of",
        "AttributeError miniclip.openclip has no CoCaLoss; `miniclip eval`",
    ]
    for line, start in zip(run.stdout.splitlines(), starts, strict=True):
        assert line.startswith(start)


def test_kinds_of_models_that_are_not_here_can_be_asked_for(vit):
    model = ours.create_model(vit[0])
    for name in openclip_names.KINDS:
        kind = getattr(ours, name)
        assert kind.__name__ == name
        assert isinstance(model, ours.CLIP)
        assert not any(isinstance(module, kind) for module in model.modules())
        with pytest.raises(ValueError, match=rf"miniclip\.openclip has no {name}; .*openclip:NAME/TAG"):
            kind(64, vision_cfg={})


def test_weights_of_another_architecture_are_named_by_their_file(tmp_path):
    torch.save(ours.CLIP(64, {**TINY["vit"], "width": 128}, TEXT).state_dict(), tmp_path / "epoch.pt")
    with pytest.raises(ValueError, match=r"the weights in .*epoch\.pt for ViT-S-32 belong to another architecture"):
        ours.create_model("ViT-S-32", pretrained=str(tmp_path / "epoch.pt"))


def test_a_folder_of_theirs_without_weights_names_their_files(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has no open_clip_model\.safetensors or open_clip_pytorch_model\.bin; .* has "
                                         r"open_clip_config\.json and weights"):  # fmt: skip
        ours.create_model(f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").rename(tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"has no open_clip_config\.json; "):
        ours.create_model(f"local-dir:{tmp_path}")


def test_templates_and_constants_are_theirs():
    for name in ("OPENAI_IMAGENET_TEMPLATES", "SIMPLE_IMAGENET_TEMPLATES"):
        found, expected = getattr(ours, name), getattr(open_clip, name)
        assert [template("{cat}") for template in found] == [template("{cat}") for template in expected]
    for name in ("OPENAI_DATASET_MEAN", "OPENAI_DATASET_STD", "IMAGENET_MEAN", "IMAGENET_STD", "INCEPTION_MEAN"):
        assert getattr(ours, name) == getattr(open_clip.constants, name)
    for precision in ("fp32", "amp", "fp16", "bf16", "pure_fp16", "pure_bf16"):
        assert ours.get_cast_dtype(precision) == open_clip.get_cast_dtype(precision)
        assert ours.get_input_dtype(precision) == open_clip.get_input_dtype(precision)


def test_settings_of_architectures_build_the_same():
    to_config = miniclip.weights.architecture.config_from_openclip
    for name in ours.list_models():
        found, expected = ours.get_model_config(name), open_clip.get_model_config(name)
        assert to_config({"model_cfg": found}, name) == to_config({"model_cfg": expected}, name)
    assert ours.get_model_config("ViT-B-33") is open_clip.get_model_config("ViT-B-33") is None
    assert ours.is_pretrained_cfg("ViT-B-32", "OpenAI")
    assert not ours.is_pretrained_cfg("ViT-B-33", "openai")


def test_settings_of_a_model_are_theirs(vit):
    model, theirs = ours.create_model(vit[0]), vit[1]
    assert ours.get_model_config(vit[0])["vision_cfg"]["patch_size"] == 16
    assert ours.get_model_tokenize_cfg(model) == open_clip.get_model_tokenize_cfg(theirs)
    found, expected = ours.get_model_preprocess_cfg(model), open_clip.get_model_preprocess_cfg(theirs)
    assert {name: value for name, value in found.items() if name not in ("mean", "std")} == {
        name: value for name, value in expected.items() if name not in ("mean", "std")
    }
    ours.set_model_preprocess_cfg(model, {**found, "mean": (0.1, 0.2, 0.3)})
    assert model.visual.image_mean == model.visual.preprocess_cfg["mean"] == (0.1, 0.2, 0.3)


def test_the_loss_of_arguments_is_theirs(vit):
    given = types.SimpleNamespace(distill=False, siglip=False, model="ViT-B-32", local_loss=False, rank=0, world_size=1,
                                  gather_with_grad=False, horovod=False)  # fmt: skip
    features = nn.functional.normalize(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    scale = torch.tensor(20.0)
    for changes, inputs in (
        ({}, (*features, scale)),
        ({"siglip": True, "loss_dist_impl": None}, (*features, scale, torch.tensor(-3.0))),
        ({"distill": True}, (*features, scale, *features.flip(0), torch.tensor(5.0))),
    ):
        args = types.SimpleNamespace(**{**vars(given), **changes})
        losses = [library.create_loss(args) for library in (ours, open_clip.factory)]
        assert type(losses[0]).__name__ == type(losses[1]).__name__
        for options in ({}, {"output_dict": True}):
            torch.testing.assert_close(*(loss(*inputs, **options) for loss in losses))
    with pytest.raises(ValueError, match=r"args.model is 'coca_ViT-B-32'.*openclip:NAME/TAG"):
        ours.create_loss(types.SimpleNamespace(**{**vars(given), "model": "coca_ViT-B-32"}))


def test_a_model_begins_with_the_scale_and_bias_that_are_asked_for(vit):
    """A bias that weights have not is 0 when they are loaded, whatever a new model's is."""
    name, _ = vit
    options = {"init_logit_scale": 2.5, "init_logit_bias": -10}
    for more in ({"load_weights": False}, {}):
        found, expected = (library.create_model(name, **options, **more) for library in (ours, open_clip))
        assert found.logit_bias == expected.logit_bias == (0 if not more else -10)
        assert found.logit_scale == expected.logit_scale
    file = f"{name.removeprefix('local-dir:')}/open_clip_pytorch_model.bin"
    model = ours.create_model(name, load_weights=False, **options)
    ours.load_checkpoint(model, file)
    assert model.logit_bias == 0


def test_a_traced_model_is_right_for_other_batches(vit):
    name, theirs = vit
    images, tokens = images_for(theirs), ours.tokenize(NAMES).int()
    traced = ours.trace_model(ours.create_model(name), batch_size=2)
    assert traced.visual.image_size == (32, 32)
    assert_near(traced(images, tokens)[0], theirs(images, tokens)[0])
    assert_near(traced.encode_image(images), theirs.encode_image(images))
    assert_near(traced.encode_text(tokens), theirs.encode_text(tokens))


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("options", [{}, {"force_image_size": 64, "force_context_length": 40}])
def test_a_checkpoint_is_loaded_into_a_model(tmp_path, kind, options):
    name, _ = write_folder(tmp_path / "model", kind)
    options = options if kind == "vit" else {}
    file = str(tmp_path / "model" / "open_clip_pytorch_model.bin")
    model, expected = (
        library.create_model(name, load_weights=False, **options).eval() for library in (ours, open_clip)
    )
    for library, each in ((ours, model), (open_clip, expected)):
        keys = library.load_checkpoint(each, file)
        assert keys.missing_keys == keys.unexpected_keys == []
    for key, tensor in expected.state_dict().items():
        assert_near(model.state_dict()[key].double(), tensor.double(), 1e-6)


@pytest.mark.parametrize("options", [{}, {"force_image_size": 64, "force_context_length": 40}])
def test_the_tensors_of_a_file_fit_a_model_as_theirs(vit, tmp_path, options):
    name, theirs = vit
    torch.save({"state_dict": {f"module.{key}": each for key, each in theirs.state_dict().items()}}, tmp_path / "e.pt")
    tensors = []
    for library in (ours, open_clip):
        model = library.create_model(name, load_weights=False, **options)
        tensors.append(library.factory.load_state_dict(str(tmp_path / "e.pt")))
        library.model.resize_pos_embed(tensors[-1], model)
        library.model.resize_text_pos_embed(tensors[-1], model)
        model.load_state_dict(tensors[-1])
    assert [*tensors[0]] == [*tensors[1]]
    for key, expected in tensors[1].items():
        assert_near(tensors[0][key], expected, 1e-6)


def test_a_checkpoint_of_something_else_is_refused(vit, tmp_path):
    model = ours.create_model(vit[0])
    with pytest.raises(ValueError, match="strict is False"):
        ours.load_checkpoint(model, "x.pt", strict=False)
    miniclip.save(tiny_clip(), tmp_path / "other")
    with pytest.raises(ValueError, match="other holds another architecture than the model"):
        ours.load_checkpoint(model, str(tmp_path / "other"))
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt"):
        ours.load_checkpoint(model, str(tmp_path / "w.pt"))
    with pytest.raises(ValueError, match="belong to another architecture"):
        ours.create_model("ViT-S-32-alt", pretrained=str(tmp_path / "w.pt"), force_context_length=32)


def test_a_legacy_classifier_is_theirs(vit):
    name, theirs = vit
    model, tokenizer = ours.create_model(name).eval(), ours.get_tokenizer(name)
    templates = ours.SIMPLE_IMAGENET_TEMPLATES[:2]
    found = ours.build_zero_shot_classifier_legacy(model, tokenizer, NAMES, templates, "cpu")
    assert_near(found, open_clip.build_zero_shot_classifier_legacy(theirs, tokenizer, NAMES, templates, "cpu"))


def test_augmentation_by_its_class_is_theirs(vit):
    found = []
    for library in (ours, open_clip):
        options = library.AugmentationCfg(scale=(0.2, 0.3))
        torch.manual_seed(0)
        found.append(library.create_model_and_transforms(vit[0], aug_cfg=options)[1](picture(0, (60, 60))))
    with pytest.raises(ValueError, match="re_prob"):
        ours.create_model_and_transforms(vit[0], aug_cfg=ours.AugmentationCfg(re_prob=0.1))
