"""Hugging Face's image processors. The oracle is transformers' own PIL processor, on random settings and pictures."""

import json
import random
import re

import numpy as np
import pytest
import torch
from foreign_models import hf_model
from helpers import picture
from transformers import CLIPConfig as HFConfig
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from miniclip.weights.load import load, save
from miniclip.weights.write import vocabulary_files

SIDE = 24  # of `hf_model`'s input
PICTURES = [
    picture(seed, size, mode)
    for seed, (size, mode) in enumerate(
        [((24, 24), "RGB"), ((61, 40), "RGB"), ((40, 61), "L"), ((33, 47), "P"), ((90, 25), "RGBA"), ((13, 20), "LA"),
         ((25, 24), "RGB"), ((7, 90), "1")]
    )
]  # fmt: skip


def random_settings(seed):
    """Settings that make pictures of SIDE x SIDE, as people combine them."""
    chance = random.Random(seed)
    settings = {
        "resample": chance.choice([0, 1, 2, 3, 4, 5, None]),
        "do_rescale": chance.choice([True, True, False]),
        "rescale_factor": chance.choice([1 / 255, 1 / 127.5, 0.5]),
        "do_normalize": chance.choice([True, True, False]),
        "image_mean": chance.choice([[0.5, 0.4, 0.3], 0.5, None]),
        "image_std": chance.choice([[0.2, 0.3, 0.4], 0.25, None]),
        "do_convert_rgb": True,
    }
    if chance.random() < 0.25:
        settings |= {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}
        return {name: value for name, value in settings.items() if value is not None}
    size = chance.choice([SIDE, 17, 31, 40])
    sizes = [size, {"shortest_edge": size}, {"height": size, "width": size}, [size, size]]
    settings |= {"size": chance.choice(sizes), "do_resize": chance.random() < 0.85}
    settings |= {"crop_size": chance.choice([SIDE, {"height": SIDE, "width": SIDE}])}
    settings = {name: value for name, value in settings.items() if value is not None}
    if chance.random() < 0.2:  # null is no step
        settings[chance.choice(["do_resize", "do_rescale", "do_normalize"])] = None
    return settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    hf_model().save_pretrained(folder)
    return folder


def with_settings(model, settings, nested=False):
    for name in ("processor_config.json", "preprocessor_config.json"):
        (model / name).unlink(missing_ok=True)
    if nested:
        (model / "processor_config.json").write_text(json.dumps({"processor_class": "X", "image_processor": settings}))
        (model / "preprocessor_config.json").write_text(json.dumps({"image_mean": [9, 9, 9]}))  # the other one wins
    else:
        (model / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 600), marks=pytest.mark.long)], ids=str)
def test_pixels_are_those_of_transformers_own_processor_whatever_its_settings(model, seeds):
    for seed in seeds:
        settings = random_settings(seed)
        folder = with_settings(model, settings, nested=seed % 2 == 0)
        _, preprocess = load(folder, device="cpu")
        theirs = CLIPImageProcessorPil.from_pretrained(folder)
        for image in PICTURES:
            expected = torch.from_numpy(np.asarray(theirs(image)["pixel_values"][0])).float()
            found = preprocess(image)
            scale = expected.abs().max().item()
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * scale, msg=f"{seed}: {settings}, {image}")


def test_what_transformers_5_writes_is_read(model, tmp_path):
    """Its processors save one processor_config.json and no preprocessor_config.json."""
    (tmp_path / "tokenizer").mkdir()
    for name, content in vocabulary_files().items():
        (tmp_path / "tokenizer" / name).write_text(content, encoding="utf-8")
    options = {"size": {"shortest_edge": 40}, "crop_size": {"height": SIDE, "width": SIDE}, "image_mean": [0.5] * 3}
    processor = CLIPProcessor(CLIPImageProcessor(**options), CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"))
    hf_model().save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model/preprocessor_config.json").exists()
    loaded, preprocess = load(tmp_path / "model", device="cpu")
    assert (loaded.config.vision.resize_size, loaded.config.vision.mean) == (40, (0.5, 0.5, 0.5))
    theirs = CLIPImageProcessorPil.from_pretrained(tmp_path / "model")
    image = PICTURES[1]
    expected = torch.from_numpy(np.asarray(theirs(image)["pixel_values"][0]))
    torch.testing.assert_close(preprocess(image), expected, rtol=0, atol=1e-5)
    save(loaded, tmp_path / "ours")
    assert torch.equal(load(tmp_path / "ours", device="cpu")[1](image), preprocess(image))


@pytest.mark.parametrize(
    "name, value",
    [
        ("crop_size", {"height": 20, "width": 20}),
        ("crop_size", {"height": SIDE, "width": 20}),
        ("crop_size", None),  # transformers' default, 224
        ("size", {"height": 30, "width": 40}),
        ("size", {"shortest_edge": SIDE, "longest_edge": 60}),
        ("size", {"max_height": 24, "max_width": 24}),
        ("size", {"shortest_edge": 0}),
        ("size", "small"),
        ("resample", 7),
        ("resample", "bicubic"),
        ("resample", 3.0),
        ("rescale_factor", 0),
        ("rescale_factor", "1/255"),
        ("image_mean", ["a", "b", "c"]),
        ("image_mean", [0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0]),
        ("image_std", 1e-300),
        ("image_mean", [1e300, 0, 0]),
        ("do_center_crop", False),
        ("do_resize", "yes"),
        ("do_flip_channel_order", True),
        ("pad_size", {"height": 40, "width": 40}),
        ("image_processor_type", "ViTImageProcessor"),
        ("feature_extractor_type", "BeitFeatureExtractor"),
    ],
    ids=str,
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_setting_that_can_not_be_followed_is_refused_by_name(model, name, value, nested):
    settings = {"crop_size": SIDE, "size": SIDE, "do_pad": name == "pad_size", name: value}
    folder = with_settings(model, settings, nested)
    file = folder / ("processor_config.json" if nested else "preprocessor_config.json")
    with pytest.raises(ValueError, match=f"^{re.escape(f'{file} has {name!r}: {value!r}')}, which is not supported"):
        load(folder, device="cpu")


def test_settings_that_change_no_pixel_are_passed_over(model):
    settings = {"size": SIDE, "crop_size": SIDE, "processor_class": "CLIPProcessor", "data_format": "channels_first"}
    settings |= {
        "do_pad": None,
        "pad_size": None,
        "do_reduce_labels": False,
        "feature_extractor_type": "CLIPFeatureExtractor",
    }
    assert load(with_settings(model, settings), device="cpu")[0].config.vision.preprocess == "hf"


@pytest.mark.parametrize("seed", range(8))
def test_a_config_dict_beside_a_config_has_transformers_precedence(model, tmp_path, seed):
    """`text_config_dict` and `vision_config_dict`, which old files hold besides, win with their defaults."""
    from miniclip.weights.architecture import config_from_hf

    chance = random.Random(seed)

    def section(values):
        return {name: chance.choice(choices) for name, choices in values.items() if chance.random() < 0.6}

    tower = {"hidden_size": [32, 64], "num_attention_heads": [2, 4], "num_hidden_layers": [1, 3]}
    tower |= {"intermediate_size": [64, 100]}
    values = {"model_type": "clip", "projection_dim": 20}
    for kind, more in (
        ("text", {"max_position_embeddings": [16, 20]}),
        ("vision", {"image_size": [32, 64], "patch_size": [8]}),
    ):
        values[f"{kind}_config"] = section(tower | more)
        if chance.random() < 0.7:
            values[f"{kind}_config_dict"] = chance.choice([section(tower | more), None, {}])
    try:
        theirs = HFConfig(**json.loads(json.dumps({k: v for k, v in values.items() if k != "model_type"})))
    except Exception:  # a width that is no multiple of the heads
        with pytest.raises(ValueError, match="head_width"):
            config_from_hf(values, "x")
        return
    ours = config_from_hf(values, "x")
    for found, expected in ((ours.text, theirs.text_config), (ours.vision, theirs.vision_config)):
        assert (found.width, found.heads, found.layers) == (
            expected.hidden_size, expected.num_attention_heads, expected.num_hidden_layers
        )  # fmt: skip
        assert int(found.width * found.mlp_ratio) == expected.intermediate_size
    assert ours.text.context_length == theirs.text_config.max_position_embeddings
    assert (ours.vision.image_size, ours.vision.patch_size) == (
        theirs.vision_config.image_size,
        theirs.vision_config.patch_size,
    )
