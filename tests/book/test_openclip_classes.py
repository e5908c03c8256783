"""Classes and small functions under open_clip's names take its arguments. Oracle: open_clip, with the same weights."""

import copy
import dataclasses
import json
import pickle

import open_clip
import pytest
import torch
from foreign_models import randomised
from helpers import picture
from torch import nn

import miniclip.openclip as ours

VISION = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32}
TEXT = {"width": 64, "heads": 2, "layers": 2}
TOWER = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "heads": 2, "mlp_ratio": 2.0}
# Of open_clip's VisionTransformer, up to `output_tokens`.
IN_PLACES = [*TOWER.values(), 0.3, False, 9, 3, 8, 0.2, False, "learnable", "tok", False, nn.ReLU, nn.LayerNorm, True]


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def assert_same(found, expected, *inputs):
    """Equal outputs for the weights of `expected`, whose names are those of `found`."""
    randomised(expected, 3).eval()
    found.load_state_dict(expected.state_dict())
    with torch.no_grad():
        pairs = zip(found.eval()(*inputs), expected(*inputs), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, options",
    [
        ((64, VISION, TEXT), {}),
        ((), {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True}),
        ((64, {**VISION, "layers": [1, 1, 1, 1], "width": 8, "image_size": 64}, TEXT), {"init_logit_scale": 1.0}),
        ((64, {**VISION, "mlp_ratio": 2.0}, {**TEXT, "context_length": 20}), {"init_logit_bias": -10.0}),
        ((64, {**VISION, "image_size": (32, 32), "patch_size": [16, 16]}, TEXT), {}),
        ((64, open_clip.CLIPVisionCfg(**VISION), ours.CLIPTextCfg(**TEXT)), {"cast_dtype": torch.float16}),
    ],
    ids=["places", "names", "resnet", "bias", "pairs", "dataclasses"],
)
def test_a_clip_takes_their_arguments(arguments, options):
    given = copy.deepcopy((arguments, options))
    found, expected = ours.CLIP(*arguments, **options), open_clip.CLIP(*arguments, **options)
    assert (arguments, options) == given
    assert found.logit_scale == expected.logit_scale
    assert (found.logit_bias is None) == (expected.logit_bias is None)
    resolution, length = found.config.vision.image_size, found.context_length
    tokens = ours.get_tokenizer(context_length=length)(["a cat", "two dogs"])
    assert_same(found, expected, noise(2, 3, resolution, resolution), tokens)


def test_a_clip_gives_its_outputs_as_it_is_asked_to():
    model = ours.CLIP(64, {**VISION, "output_tokens": True}, TEXT, output_dict=True)
    assert model(text=ours.tokenize("a"))["text_features"].shape == (1, 64)
    pooled, tokens = model.encode_image(noise(1, 3, 32, 32))
    assert pooled.shape == (1, 64)
    assert tokens.shape == (1, 4, 64)


@pytest.mark.parametrize("first", [True, False])
def test_patches_are_left_out_in_training_alone(first):
    found, expected = (each.PatchDropout(0.4, first) for each in (ours, open_clip.transformer))
    x = noise(3, 10, 8)
    assert torch.equal(found.eval()(x), x)
    drawn = []
    for each in (found, expected):
        torch.manual_seed(0)
        drawn.append(each.train()(x))
    assert torch.equal(*drawn)
    assert drawn[0].shape == (3, 6, 8)


@pytest.mark.parametrize("arguments", [(), (2.0,), (4.0, 0.1), (4.0, None, ours.QuickGELU), (2.0, 0.5, nn.ReLU)])
def test_a_block_and_a_transformer_take_their_arguments_by_place(arguments):
    theirs = open_clip.transformer
    layers = [open_clip.transformer.QuickGELU if each is ours.QuickGELU else each for each in arguments]
    found, expected = ours.ResidualAttentionBlock(64, 2, *arguments), theirs.ResidualAttentionBlock(64, 2, *layers)
    assert_same(found, expected, noise(3, 5, 64))
    assert_same(ours.Transformer(64, 2, 4, *arguments), theirs.Transformer(64, 2, 4, *layers), noise(3, 5, 64))


def test_a_norm_of_ones_own_is_taken():
    def norm(width):
        return nn.LayerNorm(width, eps=0.5)

    classes = (ours.Transformer, open_clip.transformer.Transformer)
    assert_same(*(each(width=64, layers=1, heads=2, norm_layer=norm) for each in classes), noise(3, 5, 64))


@pytest.mark.parametrize(
    "options",
    [{}, {"image_size": (32, 32), "ls_init_value": 0.3}, {"act_layer": nn.ReLU, "output_dim": 8, "output_tokens": True},
     {"patch_dropout": 0.0, "attn_pooler_heads": 3, "block_type": "default", "pool_type": "tok"}],
)  # fmt: skip
def test_an_image_tower_takes_their_arguments(options):
    settings = {**TOWER, **options}
    found, expected = ours.VisionTransformer(**settings), open_clip.transformer.VisionTransformer(**settings)
    assert_same(found, expected, noise(2, 3, 32, 32))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: ours.ResidualAttentionBlock(64, 2, is_cross_attention=True), "is_cross_attention is True"),
        (lambda: ours.ResidualAttentionBlock(64, 2, batch_first=False), "batch_first is False"),
        (
            lambda: ours.Transformer(64, 1, 2, qk_norm=True),
            "qk_norm is True; Transformer of miniclip.openclip has False",
        ),
        (lambda: ours.VisionTransformer(**TOWER, patch_dropout=1.0), r"patch_dropout is 1\.0"),
        (lambda: ours.VisionTransformer(**{**TOWER, "image_size": (32, 64)}), r"image_size is \(32, 64\)"),
        (lambda: ours.CLIP(64, {**VISION, "patch_dropout": "half"}, TEXT), "patch_dropout is 'half'"),
        (
            lambda: ours.CLIP(64, {**VISION, "image_size": [32, 64]}, TEXT),
            r"CLIP, vision_cfg: image_size is \[32, 64\];",
        ),
        (lambda: ours.CLIP(64, {**VISION, "patch_size": (16, 8)}, TEXT), r"patch_size is \(16, 8\); images and"),
        (lambda: ours.Transformer(64, 1, 2, 4.0, None, nn.GELU, nn.LayerNorm, False), "batch_first is False"),
        (
            lambda: ours.Transformer(64, 1, 2, 4.0, None, nn.GELU, nn.LayerNorm, True, "custom"),
            "block_type is 'custom'",
        ),
        (lambda: ours.VisionTransformer(*TOWER.values(), None, True), "attentional_pool is True"),
        (lambda: ours.VisionTransformer(*IN_PLACES[:14], "avg"), "pool_type is 'avg'"),
        (lambda: ours.VisionTransformer(*IN_PLACES, None, True), "qk_norm is True"),
        (lambda: ours.TimmModel("test_convnext", 8, 64, "rot_attn"), "'timm_pool': 'rot_attn'"),
        (lambda: ours.TimmModel("test_convnext", 8, pretrained=True), "pretrained is True; TimmModel"),
        (lambda: ours.TextTransformer(77, 49408, 512), "miniclip.openclip has no TextTransformer"),
        (lambda: ours.CLIP(64, {**VISION, "pool_type": "avg"}, TEXT), "CLIP, vision_cfg has 'pool_type': 'avg'"),
        (lambda: ours.CLIP(64, VISION, {**TEXT, "pool_type": "eos", "eos_id": 5}), "CLIP ends texts with 5"),
        (lambda: ours.CLIP(64, VISION, TEXT, nonscalar_logit_scale=True), "'nonscalar_logit_scale': True"),
    ],
)
def test_an_argument_that_asks_for_something_else_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_towers_take_their_arguments_by_place():
    for name, arguments, size in (
        ("VisionTransformer", (*IN_PLACES, None, False, False), 32),
        ("Transformer", (64, 1, 2, 2.0, 0.1, nn.ReLU, nn.LayerNorm, True, "default", False), None),
        ("TimmModel", ("test_convnext", 8, (64, 64), "avg", "mlp", True, 0.1, 0.2), 64),
    ):
        classes = [
            getattr(each, name) for each in (ours, open_clip.transformer, open_clip.timm_model) if hasattr(each, name)
        ]
        assert_same(*(each(*arguments) for each in classes), noise(2, 3, size, size) if size else noise(2, 5, 64))


def test_an_argument_that_is_none_of_theirs_is_a_type_error():
    with pytest.raises(TypeError, match="1 arguments more than open_clip's, which end with scale_fc"):
        ours.Transformer(64, 1, 2, 4.0, None, nn.GELU, nn.LayerNorm, True, None, *[False] * 7)
    with pytest.raises(TypeError, match="Transformer has no argument 'activation'"):
        ours.Transformer(64, 1, 2, activation="gelu")


@pytest.mark.parametrize("options", [{}, {"pool_type": "first"}, {"pool_type": "last"}, {"pool_type": "none"},
                                     {"pool_type": "eos", "eos_token_id": 3}])  # fmt: skip
def test_pooling_and_expanding_are_theirs(options):
    x, text, theirs = noise(2, 4, 8), torch.tensor([[1, 9, 3, 0], [3, 2, 4, 0]]), open_clip.transformer
    assert torch.equal(ours.text_global_pool(x, text, **options), theirs.text_global_pool(x, text, **options))
    assert torch.equal(ours._expand_token(x[0, 0], 3), theirs._expand_token(x[0, 0], 3))
    with pytest.raises(ValueError, match="pool_type is 'argmax', which needs text"):
        ours.text_global_pool(x)


def test_tokens_are_pooled_as_by_anomaly_detectors():
    classes = (ours.VisionTransformer, open_clip.transformer.VisionTransformer)
    for found, expected in zip(*(each(**TOWER)._global_pool(noise(2, 5, 32)) for each in classes), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:the weights of")
def test_an_architecture_that_a_program_adds_is_built(monkeypatch):
    from open_clip.factory import _MODEL_CONFIGS, HF_HUB_PREFIX

    assert HF_HUB_PREFIX == ours.HF_HUB_PREFIX
    assert ours._MODEL_CONFIGS is ours._MODEL_CONFIGS
    assert {*ours._MODEL_CONFIGS} <= {*_MODEL_CONFIGS}
    for name, settings in ours._MODEL_CONFIGS.items():
        for rate in ("patch_dropout", "timm_drop_path"):
            assert settings["vision_cfg"].get(rate) == _MODEL_CONFIGS[name]["vision_cfg"].get(rate)
    settings = {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": TEXT}
    for configs in (ours._MODEL_CONFIGS, _MODEL_CONFIGS):
        monkeypatch.setitem(configs, "tiny", settings)
    assert "tiny" in ours.list_models()
    assert ours.get_model_config("tiny") == open_clip.get_model_config("tiny") == settings
    assert ours.get_tokenizer("tiny").context_length == 77
    found, expected = (library.create_model("tiny") for library in (ours, open_clip))
    assert_same(found, expected, noise(2, 3, 32, 32), ours.tokenize(["a cat", "two dogs"]))
    monkeypatch.setitem(ours._MODEL_CONFIGS, "my/model", settings)
    assert ours.create_model("my/model").config == found.config
    monkeypatch.setitem(ours._MODEL_CONFIGS, "ViT-B-32", settings)  # as open_clip's, whatever the name says
    assert ours.create_model("ViT-B-32").config.vision.width == 64
    monkeypatch.setitem(ours._MODEL_CONFIGS, "tiny", {**settings, "text_cfg": {"hf_model_name": "roberta-base"}})
    with pytest.raises(ValueError, match="tiny, text_cfg has 'hf_model_name'"):
        ours.create_model("tiny")


def test_architectures_of_files_are_added_by_their_names(tmp_path, monkeypatch):
    settings = {"embed_dim": 64, "vision_cfg": VISION, "text_cfg": TEXT}
    for name, values in {"Tiny-A": settings, "Tiny-B": settings, "labels": {"a": 1}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
        monkeypatch.setitem(ours._MODEL_CONFIGS, name, {})  # which is taken out again
    del ours._MODEL_CONFIGS["labels"]
    for name in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
        monkeypatch.setattr(open_clip.factory, name, copy.copy(getattr(open_clip.factory, name)))
    for library in (ours, open_clip):
        library.add_model_config(str(tmp_path / "Tiny-A.json"))
        assert library.get_model_config("Tiny-A") == settings
        assert library.get_model_config("Tiny-B") != settings
        library.add_model_config(tmp_path)
        assert library.get_model_config("Tiny-B") == settings
        assert library.create_model("Tiny-B").visual.grid_size == (2, 2)
        assert "labels" not in library.list_models()
    for path in (tmp_path / "labels.json", tmp_path / "no such file"):
        with pytest.raises(ValueError, match=rf"{path.name} has no architecture .*embed_dim, text_cfg, vision_cfg"):
            ours.add_model_config(path)


def test_settings_of_towers_have_their_fields_and_values():
    for name in ("CLIPVisionCfg", "CLIPTextCfg"):
        found, expected = (dataclasses.fields(getattr(library, name)) for library in (ours, open_clip))
        assert [(each.name, each.default) for each in found] == [(each.name, each.default) for each in expected]
        assert pickle.loads(pickle.dumps(getattr(ours, name)(width=32))) == getattr(ours, name)(width=32)


# ---- what a program puts in place of a part

FEW_WORDS, IDS = {**TEXT, "context_length": 5, "vocab_size": 20}, torch.tensor([[18, 7, 19, 0, 0], [18, 3, 4, 7, 19]])
RESNET = {**VISION, "layers": [1, 1, 1, 1], "width": 8, "image_size": 64}
TIMM = {"image_size": 32, "timm_model_name": "test_convnext", "timm_proj": "linear"}
# Their classes: where open_clip looks for each when it makes a model, and the image tower that has it.
PARTS = {
    "ResidualAttentionBlock": (open_clip.transformer, VISION),
    "Transformer": (open_clip.transformer, VISION),
    "VisionTransformer": (open_clip.model, VISION),
    "LayerNorm": (open_clip.model, VISION),
    "QuickGELU": (open_clip.model, VISION),
    "ModifiedResNet": (open_clip.model, RESNET),
    "Bottleneck": (open_clip.modified_resnet, RESNET),
    "AttentionPool2d": (open_clip.modified_resnet, RESNET),
    "TimmModel": (open_clip.model, TIMM),
}


def waved(found):
    class Waved(found):
        def forward(self, *inputs, **options):
            return super().forward(*inputs, **options).sin()

    return Waved


@pytest.mark.parametrize("name", PARTS)
def test_a_class_that_a_program_puts_in_place_of_theirs_is_built(monkeypatch, name):
    home, vision = PARTS[name]
    of_openai = getattr(ours.openai, name, None)
    for module in (home, ours):
        monkeypatch.setattr(module, name, waved(getattr(module, name)))
    models = [library.CLIP(64, vision, FEW_WORDS, quick_gelu=True) for library in (ours, open_clip)]
    assert any(type(part).__name__ == "Waved" for part in models[0].modules())
    assert_same(*models, noise(2, 3, vision["image_size"], vision["image_size"]), IDS)
    assert getattr(ours.openai, name, None) is of_openai
    monkeypatch.undo()
    assert getattr(ours, name).__name__ == name


@pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])
def test_a_seed_draws_their_weights(vision):
    weights = []
    for library in (ours, open_clip):
        torch.manual_seed(0)
        weights.append(library.CLIP(64, vision, FEW_WORDS).state_dict())
    for name, expected in weights[1].items():
        assert torch.equal(weights[0][name], expected), name


def test_a_function_that_a_program_puts_in_place_of_theirs_is_called(monkeypatch):
    def mean(x, text, pool_type, eos_token_id=None):
        return x.mean(dim=1)

    models = [library.CLIP(64, VISION, FEW_WORDS) for library in (ours, open_clip)]
    for module in (open_clip.model, ours):
        monkeypatch.setattr(module, "text_global_pool", mean)
    assert_same(*models, noise(2, 3, 32, 32), IDS)
    for module in (open_clip.tokenizer, ours):
        monkeypatch.setattr(module, "basic_clean", lambda text: text.replace("cat", "dog"))
    assert torch.equal(ours.SimpleTokenizer()("a cat"), open_clip.SimpleTokenizer()("a cat"))
    for module in (open_clip.transform, ours):
        monkeypatch.setattr(module, "OPENAI_DATASET_MEAN", (0.0, 0.5, 1.0))
    found, expected = (library.image_transform(8, False) for library in (ours, open_clip))
    assert torch.equal(found(picture()), expected(picture()))


@pytest.mark.filterwarnings("ignore:the weights of")
@pytest.mark.parametrize("vision", [VISION, RESNET, TIMM], ids=["vit", "resnet", "timm"])
def test_a_class_in_place_of_the_model_is_made_as_theirs(monkeypatch, vision):
    models = []
    for library, home in ((ours, ours), (open_clip, open_clip.factory)):

        class Adapted(library.CLIP):
            def __init__(self, embed_dim, vision_cfg, text_cfg, quick_gelu=False, output_dict=False, cast_dtype=None):
                super().__init__(embed_dim, vision_cfg, text_cfg, quick_gelu, output_dict=output_dict)
                self.adapter = nn.Linear(embed_dim, embed_dim)

            def encode_image(self, image, normalize=False):
                return self.adapter(super().encode_image(image, normalize))

        monkeypatch.setattr(home, "CLIP", Adapted)
        settings = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": FEW_WORDS, "quick_gelu": True}
        monkeypatch.setitem(home._MODEL_CONFIGS, "tiny", settings)
        size = {} if vision is TIMM else {"force_image_size": 64}
        models.append(library.create_model("tiny", **size))
    R = models[0].config.vision.image_size
    assert (R, models[0].visual.preprocess_cfg) == (32 if vision is TIMM else 64, models[1].visual.preprocess_cfg)
    assert_same(*models, noise(2, 3, R, R), IDS)


def test_a_replaced_load_checkpoint_is_not_called_and_a_warning_says_so(monkeypatch):
    monkeypatch.setattr(ours, "load_checkpoint", None)
    told = pytest.warns(UserWarning, match="in place of load_checkpoint is not called by create_model")
    with told, pytest.raises(ValueError, match="no folder or file"):
        ours.create_model("such a model is not there")


@pytest.mark.parametrize(
    "of_model, of_tower",
    [
        ({"text_pool_type": "last"}, {"pool_type": "avg"}),
        ({"text_pool_type": "eos", "text_eos_id": 7}, {"final_ln_after_pool": True, "pool_type": "avg"}),
        ({"attn_mask": None}, {"final_ln_after_pool": True}),
    ],
)
def test_what_a_program_sets_of_a_model_acts(of_model, of_tower):
    models = [library.CLIP(64, VISION, FEW_WORDS) for library in (ours, open_clip)]
    for model in models:
        for part, values in ((model, of_model), (model.visual, of_tower)):
            for name, value in values.items():
                setattr(part, name, value)
    assert_same(*models, noise(2, 3, 32, 32), IDS)


@pytest.mark.parametrize("is_patched", [False, True])
def test_a_loss_derived_from_theirs_is_computed_by_its_own_methods(monkeypatch, is_patched):
    losses = []
    for library in (ours, open_clip):

        class Distances(library.ClipLoss):
            def get_logits(self, image_features, text_features, logit_scale, logit_bias=None):
                first, second = super().get_logits(image_features, text_features, logit_scale, logit_bias)
                return first.abs(), second.abs()

            def get_ground_truth(self, device, num_logits):
                return super().get_ground_truth(device, num_logits).flip(0)

        loss = Distances(cache_labels=True)
        if is_patched:  # their class itself
            loss, own = library.ClipLoss(), library.ClipLoss.get_ground_truth
            monkeypatch.setattr(library.ClipLoss, "get_ground_truth", lambda *values, own=own: own(*values).flip(0))
        losses.append(loss(*noise(2, 5, 8), torch.tensor(3.0), torch.tensor(-1.0)))
    torch.testing.assert_close(*losses)
