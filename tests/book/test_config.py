# config.py, prompts.py, and what importing the package costs.

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from open_clip import zero_shot_metadata

import miniclip
from miniclip.config import OPENAI_MEAN, OPENAI_MODELS, OPENAI_STD, CLIPConfig, TextConfig, VisionConfig
from miniclip.evaluation.prompts import TEMPLATE_SETS, fill, imagenet_classnames, read_lines, template_set

ROOT = Path(miniclip.__file__).parents[1]

ODD = {
    "tiny": CLIPConfig(
        embed_dim=1,
        activation="gelu",
        vision=VisionConfig(image_size=6, patch_size=3, width=2, layers=1, head_width=1, mlp_ratio=0.5),
        text=TextConfig(context_length=3, vocab_size=2, eot_token=0, width=3, layers=1, head_width=3, mlp_ratio=2.5),
    ),
    "numbers that floats cannot hold exactly": CLIPConfig(
        vision=VisionConfig(mean=(0.1, 0.2, 1 / 3), std=(1 / 7, 1, 3))
    ),
}

# ---- JSON


@pytest.mark.parametrize("config", [*OPENAI_MODELS.values(), *ODD.values()], ids=[*OPENAI_MODELS, *ODD])
def test_json_gives_the_same_configuration_back(config):
    assert CLIPConfig.from_json(config.to_json()) == config
    assert CLIPConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json()) == config.to_dict()


def test_missing_keys_take_their_defaults():
    assert CLIPConfig.from_json("{}") == CLIPConfig() == OPENAI_MODELS["ViT-B/32"]
    assert CLIPConfig.from_dict({"text": {"width": 128}}).text == TextConfig(width=128)


def test_lists_become_tuples_so_that_configurations_compare_equal():
    config = VisionConfig(mean=list(OPENAI_MEAN), std=list(OPENAI_STD))
    assert config == VisionConfig()
    assert hash(config) == hash(VisionConfig())


def test_reading_a_configuration_leaves_the_given_values_alone():
    values = ODD["tiny"].to_dict()
    CLIPConfig.from_dict(values)
    assert values == ODD["tiny"].to_dict()


@pytest.mark.parametrize(
    "section, key, valid",
    [(None, "width", CLIPConfig), ("vision", "pixels", VisionConfig), ("text", "heads", TextConfig)],
)
def test_an_unknown_key_is_refused_naming_key_file_section_and_choices(section, key, valid):
    values = {section: {key: 1}} if section else {key: 1}
    with pytest.raises(ValueError, match="unknown key") as caught:
        CLIPConfig.from_json(json.dumps(values), "runs/x/config.json")
    message = str(caught.value)
    assert repr(key) in message
    assert message.startswith("runs/x/config.json")
    assert ", ".join(field.name for field in dataclasses.fields(valid)) in message
    assert section is None or f"section '{section}'" in message


@pytest.mark.parametrize("text", ["", "{", "{'embed_dim': 512}", "embed_dim: 512"])
def test_what_is_not_json_is_refused_naming_the_file(text):
    with pytest.raises(ValueError, match=r"^runs/x/config\.json is not JSON"):
        CLIPConfig.from_json(text, "runs/x/config.json")


@pytest.mark.parametrize("text", ["[]", "[1, 2]", "3", "null", '"ViT-B/32"', '{"vision": null}', '{"text": [1]}'])
def test_json_that_is_no_mapping_is_refused_naming_the_file(text):
    with pytest.raises(ValueError, match=r"^runs/x/config\.json.*mapping"):
        CLIPConfig.from_json(text, "runs/x/config.json")


# ---- values

BAD_VALUES = [
    (VisionConfig, {"image_size": 225}, "image_size", "225"),
    (VisionConfig, {"image_size": 224, "patch_size": 15}, "patch_size", "15"),
    (VisionConfig, {"image_size": 0}, "image_size", "0"),
    (VisionConfig, {"image_size": 10**9}, "image_size", "1000000000; it must be at most 16384: pixels of a picture"),
    (VisionConfig, {"resize_size": 16385}, "resize_size", "16385; it must be at most 16384"),
    (VisionConfig, {"patch_size": 0}, "patch_size", "0"),
    (VisionConfig, {"width": 100}, "width", "100"),
    (VisionConfig, {"head_width": 0}, "head_width", "0"),
    (VisionConfig, {"head_width": 48, "width": 64}, "head_width", "48"),
    (VisionConfig, {"layers": 0}, "layers", "0"),
    (VisionConfig, {"layers": -2}, "layers", "-2"),
    (VisionConfig, {"mlp_ratio": 0.0}, "mlp_ratio", "0.0"),
    (VisionConfig, {"mlp_ratio": float("nan")}, "mlp_ratio", "nan"),
    (VisionConfig, {"kind": "resnext"}, "kind", "'resnext'"),
    (VisionConfig, {"mean": (0.5, 0.25)}, "mean", "(0.5, 0.25)"),
    (VisionConfig, {"std": (0.5, 0.25, 0.25, 1.0)}, "std", "(0.5, 0.25, 0.25, 1.0)"),
    (VisionConfig, {"std": (0.5, 0.0, 0.5)}, "std", "(0.5, 0.0, 0.5)"),
    (VisionConfig, {"std": (0.5, -1.0, 0.5)}, "std", "(0.5, -1.0, 0.5)"),
    (VisionConfig, {"std": (0.5, 1e-30, 0.5)}, "std", "(0.5, 1e-30, 0.5); it must be 3 numbers from 0.0001 to 10000"),
    (VisionConfig, {"std": (0.5, 1e300, 0.5)}, "std", "1e+300"),
    (VisionConfig, {"mean": (0.5, 1e300, 0.5)}, "mean", "1e+300"),
    (TextConfig, {"context_length": 0}, "context_length", "0"),
    (TextConfig, {"context_length": 10**9}, "context_length", "1000000000; it must be at most 16384: attention over"),
    (TextConfig, {"vocab_size": 0}, "vocab_size", "0"),
    (TextConfig, {"layers": 0}, "layers", "0"),
    (TextConfig, {"width": 65}, "width", "65"),
    (TextConfig, {"eot_token": 49408}, "eot_token", "49408"),
    (TextConfig, {"eot_token": -1}, "eot_token", "-1"),
    (CLIPConfig, {"embed_dim": 0}, "embed_dim", "0"),
    (CLIPConfig, {"activation": "relu"}, "activation", "'relu'"),
]
# What a hand-edited config.json may hold: right names, values of another type.
WRONG_TYPES = [
    (VisionConfig, {"width": "768"}, "width", "'768'"),
    (VisionConfig, {"layers": None}, "layers", "None"),
    (VisionConfig, {"layers": 2.5}, "layers", "2.5"),
    (VisionConfig, {"mean": 0.5}, "mean", "0.5"),
    (VisionConfig, {"mean": "rgb"}, "mean", "rgb"),
    (VisionConfig, {"mean": "123"}, "mean", "'123'"),
    (VisionConfig, {"mean": (0.5, True, 0.5)}, "mean", "(0.5, True, 0.5)"),
    (VisionConfig, {"kind": ["vit"]}, "kind", "['vit']"),
    (TextConfig, {"eot_token": "49407"}, "eot_token", "'49407'"),
    (CLIPConfig, {"embed_dim": [512]}, "embed_dim", "[512]"),
]


@pytest.mark.parametrize("section, values, field, value", BAD_VALUES)
def test_a_value_that_the_architecture_does_not_allow_is_refused_naming_field_and_value(section, values, field, value):
    with pytest.raises(ValueError, match=rf"\b{field}\b.*{re.escape(value)}"):
        section(**values)


@pytest.mark.parametrize("section, values, field, value", WRONG_TYPES)
def test_a_value_of_another_type_is_refused_naming_field_and_value(section, values, field, value):
    with pytest.raises(ValueError, match=rf"\b{field}\b.*{re.escape(value)}"):
        section(**values)


@pytest.mark.parametrize(
    "section, name, choices",
    [(VisionConfig, "kind", "vit, resnet, timm"), (CLIPConfig, "activation", "gelu, quick_gelu")],
)
def test_a_wrong_choice_is_answered_with_the_valid_ones(section, name, choices):
    with pytest.raises(ValueError, match=rf"{name} is 'nonsense'; valid are {choices}$"):
        section(**{name: "nonsense"})


def test_heads_and_patches_are_derived():
    vision = OPENAI_MODELS["ViT-L/14@336px"].vision
    assert (vision.heads, vision.num_patches) == (16, 576)
    assert OPENAI_MODELS["ViT-L/14"].text.heads == 12


@pytest.mark.parametrize(
    "name, resolution, patch, layers, width, embed_dim, text_width",
    [
        ("ViT-B/32", 224, 32, 12, 768, 512, 512),
        ("ViT-B/16", 224, 16, 12, 768, 512, 512),
        ("ViT-L/14", 224, 14, 24, 1024, 768, 768),
        ("ViT-L/14@336px", 336, 14, 24, 1024, 768, 768),
    ],
)
def test_openais_vision_transformers_are_those_of_the_paper(
    name, resolution, patch, layers, width, embed_dim, text_width
):
    vision = VisionConfig(image_size=resolution, patch_size=patch, layers=layers, width=width)
    assert vision.heads == width // 64
    text = TextConfig(context_length=77, vocab_size=49408, eot_token=49407, layers=12, width=text_width)
    assert OPENAI_MODELS[name] == CLIPConfig(embed_dim, "quick_gelu", vision, text)


@pytest.mark.parametrize(
    "name, resolution, blocks, width, embed_dim, text_width, heads",
    [
        ("RN50", 224, (3, 4, 6, 3), 64, 1024, 512, 32),
        ("RN101", 224, (3, 4, 23, 3), 64, 512, 512, 32),
        ("RN50x4", 288, (4, 6, 10, 6), 80, 640, 640, 40),
        ("RN50x16", 384, (6, 8, 18, 8), 96, 768, 768, 48),
        ("RN50x64", 448, (3, 15, 36, 10), 128, 1024, 1024, 64),
    ],
)
def test_openais_resnets_are_those_of_the_paper(name, resolution, blocks, width, embed_dim, text_width, heads):
    vision = VisionConfig(kind="resnet", image_size=resolution, blocks=blocks, width=width)
    assert vision.heads == heads  # width * 32 / 64
    text = TextConfig(context_length=77, vocab_size=49408, eot_token=49407, layers=12, width=text_width)
    assert OPENAI_MODELS[name] == CLIPConfig(embed_dim, "quick_gelu", vision, text)


def test_openais_models_are_nine():
    assert len(OPENAI_MODELS) == 9


def test_a_configuration_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OPENAI_MODELS["ViT-B/32"].embed_dim = 3


# ---- the package


def modules_after(code):
    """What a fresh interpreter has imported after `code`."""
    program = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


HEAVY = {"torchvision", "pytorch_lightning", "lightning", "timm", "webdataset", "matplotlib", "sklearn"}


def test_importing_miniclip_imports_neither_torch_nor_anything_heavy():
    assert not modules_after("import miniclip") & {"torch", "numpy", "PIL", *HEAVY}


def test_loading_and_tokenizing_need_no_torchvision_lightning_timm_webdataset_or_matplotlib():
    modules = modules_after(
        "import torch, miniclip; miniclip.tokenize; miniclip.load; miniclip.clip_loss; miniclip.CLIP"
    )
    assert "miniclip" in modules
    assert not modules & HEAVY


def test_every_public_name_resolves_and_is_listed():
    assert len(miniclip.__all__) > 5
    for name in miniclip.__all__:
        assert getattr(miniclip, name) is not None
        assert name in dir(miniclip)


def test_an_unknown_public_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="'miniclip' has no attribute 'NOSUCH'"):
        miniclip.NOSUCH  # noqa: B018


# ---- prompts


@pytest.mark.parametrize(
    "template, prompt",
    [
        ("a photo of a {}.", "a photo of a tabby cat."),
        ("a photo of a {c}.", "a photo of a tabby cat."),
        ("{} or {c}", "tabby cat or tabby cat"),
        ("{c}", "tabby cat"),
        ("a {b} of {{}} {c} }{", "a {b} of {tabby cat} tabby cat }{"),
        ("100% {c} %s {0}", "100% tabby cat %s {0}"),
        (lambda c: f"<{c.upper()}>", "<TABBY CAT>"),
    ],
)
def test_a_template_is_filled_and_other_braces_are_kept(template, prompt):
    assert fill(template, "tabby cat") == prompt


@pytest.mark.parametrize("name", ["{", "}", "{0}", "%s", "\\1"])
def test_a_class_name_may_hold_any_brace(name):
    assert fill("a {}.", name) == f"a {name}."


@pytest.mark.parametrize("template", ["{c} {}", "{} {c}"])
def test_a_class_name_that_looks_like_a_place_is_kept(template):
    assert fill(template, "{c}") == "{c} {c}"


@pytest.mark.parametrize("template", ["a photo", "", "a {C}", "a {0}", "a { }"])
def test_a_template_without_a_place_is_refused_by_name(template):
    with pytest.raises(ValueError, match=re.escape(repr(template))):
        fill(template, "cat")


def test_the_template_sets_begin_with_simple_imagenet80_and_imagenet7():
    assert TEMPLATE_SETS[:3] == ("simple", "imagenet80", "imagenet7")
    assert [len(template_set(name)) for name in TEMPLATE_SETS[:3]] == [1, 80, 7]
    assert fill(template_set("simple")[0], "cat") == "a photo of a cat."


def test_an_unknown_template_set_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="'imagenet'; built in are simple, imagenet80, imagenet7"):
        template_set("imagenet")


def test_class_names_equal_those_of_open_clip():
    assert list(imagenet_classnames()) == list(zero_shot_metadata.IMAGENET_CLASSNAMES)
    assert len(imagenet_classnames()) == 1000


@pytest.mark.parametrize(
    "name, theirs",
    [
        ("imagenet80", zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES),
        ("imagenet7", zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES),
    ],
)
def test_prompts_equal_those_of_open_clip(name, theirs):
    ours = [fill(template, "tabby cat") for template in template_set(name)]
    assert ours == [template("tabby cat") for template in theirs]


# ---- read_lines


def test_lines_are_read_without_their_ends_and_final_blanks(tmp_path):
    path = tmp_path / "names.txt"
    path.write_bytes("tabby cat\r\n  Löwe \nthe  dog\n\n\n".encode())
    assert read_lines(path) == ["tabby cat", "Löwe", "the  dog"]


@pytest.mark.parametrize("text, problem", [("", "is empty"), ("\n \n", "is empty"), ("a\n\nb\n", "is blank in line 2")])
def test_a_file_without_lines_or_with_a_blank_one_is_refused_by_name(tmp_path, text, problem):
    path = tmp_path / "names.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"names\.txt {problem}$"):
        read_lines(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*nosuch\.txt"):
        read_lines(tmp_path / "nosuch.txt")
