"""How wide attention heads are, where no tensor's shape shows it. Oracles: open_clip and transformers."""

import json
import re
import warnings
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from foreign_models import TINY_VIT, hf_model, openclip_model, openclip_settings, probe, randomised
from safetensors.torch import save_file
from transformers import CLIPConfig as HFConfig
from transformers import CLIPModel as HFModel

from miniclip import openai
from miniclip.commands.main import main
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.weights.heads import Hints, Tower, head_widths
from miniclip.weights.load import load
from miniclip.weights.read import read_checkpoint


def narrow(image=32, text=16):
    """A small model whose heads are not 64 channels wide; attention is strong enough to show it."""
    vision = VisionConfig(image_size=24, patch_size=8, width=128, layers=2, head_width=image)
    words = TextConfig(context_length=16, vocab_size=60, eot_token=59, width=96, layers=1, head_width=text)
    return CLIPConfig(24, "gelu", vision, words)


def bare(folder, config, name="model.pt"):
    reference = openclip_model(config, seed=1)
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            if "in_proj_weight" in key:
                parameter.mul_(8)
    torch.save(reference.state_dict(), folder / name)
    return reference, folder / name


@torch.no_grad()
def assert_same(model, reference, config):
    images, tokens = probe(config)
    for found, expected in (
        (model.encode_image(images), reference.encode_image(images)),
        (model.encode_text(tokens), reference.encode_text(tokens)),
    ):
        assert F.cosine_similarity(found, expected).min() > 1 - 1e-6


def write_openclip_folder(reference, config, folder):
    folder.mkdir()
    settings = openclip_settings(config) | {"quick_gelu": config.activation == "quick_gelu"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    save_file(reference.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def refusal(path, **options):
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load(path, device="cpu", activation="gelu", **options)
    return str(caught.value)


def test_a_bare_state_dict_of_no_published_shape_is_refused_saying_what_to_give(tmp_path):
    _, path = bare(tmp_path, narrow())
    message = refusal(path)
    for word in ("image tower", "128", "head_width=", "--head-width", "config.json", "open_clip_config.json"):
        assert word in message


@pytest.mark.parametrize("hint", [{"head_width": (32, 16)}, {"head_width": [32, 16]}, {"heads": (4, 6)}])
def test_widths_or_numbers_of_heads_that_are_given_are_those_that_run(tmp_path, hint):
    config = narrow()
    reference, path = bare(tmp_path, config)
    model, _ = load(path, device="cpu", activation="gelu", **hint)
    assert model.config == config
    assert_same(model, reference, config)


def test_one_width_serves_both_towers_and_another_one_is_another_model(tmp_path):
    config = narrow(32, 32)
    reference, path = bare(tmp_path, config)
    assert_same(load(path, device="cpu", activation="gelu", head_width=32)[0], reference, config)
    with pytest.raises(AssertionError):  # else the test above would prove nothing
        assert_same(load(path, device="cpu", activation="gelu", head_width=(64, 32))[0], reference, config)


@pytest.mark.parametrize(
    "hint, words",
    [
        ({"heads": 4}, "two numbers"),  # of which tower?
        ({"head_width": 48}, "no multiple"),
        ({"head_width": (64, 64)}, "text tower"),
        ({"heads": (3, 6)}, "image tower"),
        ({"head_width": 0}, "head_width is 0"),
        ({"head_width": (32, 16, 8)}, "head_width is (32, 16, 8)"),
        ({"head_width": "32"}, "head_width is '32'"),
        ({"heads": True}, "heads is True"),
        ({"heads": 4, "head_width": 32}, "one of them"),
    ],
    ids=str,
)
def test_a_hint_that_does_not_fit_or_is_not_clear_is_refused(tmp_path, hint, words):
    _, path = bare(tmp_path, narrow())
    with pytest.raises(ValueError, match=re.escape(words)):
        load(path, device="cpu", activation="gelu", **hint)


def test_a_tower_of_64_channels_has_one_head_and_a_warning_says_so():
    towers = [Tower("image", 64, (64, 1, 256)), Tower("text", 512, (512, 12, 2048))]
    with pytest.warns(UserWarning, match="image tower of 64 channels.*heads="):
        assert head_widths(towers, Hints(), "x") == [64, 64]
    assert head_widths(towers, Hints(head_width=(16, 64)), "x") == [16, 64]
    assert head_widths(towers, Hints(head_width=16), "x") == [16, 64]


def open_clips_towers():
    """Every architecture of open_clip that our towers can build, as (name, image tower, text tower, their heads).

    Read from the installed files: other tests add architectures of their own to those of the process.
    """
    for path in sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json")):
        name, model = path.stem, json.loads(path.read_text())
        vision, text = model["vision_cfg"], model["text_cfg"]
        if "timm_model_name" in vision or "hf_model_name" in text or "multimodal_cfg" in model:
            continue
        width, layers = vision["width"], vision["layers"]
        if isinstance(layers, list):
            image = Tower("image", 32 * width, (width, tuple(layers)))
        else:
            image = Tower("image", width, (width, layers, int(width * vision.get("mlp_ratio", 4))))
        width = text["width"]
        words = Tower("text", width, (width, text["layers"], int(width * text.get("mlp_ratio", 4))))
        yield name, image, words, [vision.get("head_width", 64), width // text["heads"]]


def test_every_architecture_of_open_clips_is_known_by_its_shapes():
    towers = list(open_clips_towers())
    assert len(towers) > 50
    for name, image, text, expected in towers:
        if text.published:  # SigLIP's text towers are not ours
            assert head_widths([image, text], Hints(), name) == expected, name
    assert {expected[0] for *_, expected in towers} == {64, 80, 88, 104, 112}


@pytest.mark.parametrize("hint", [None, 80, (80, 64)])
def test_one_number_is_for_the_tower_that_is_not_known_and_published_ones_keep_theirs(hint):
    huge, text = Tower("image", 1280, (1280, 32, 5120)), Tower("text", 1024, (1024, 24, 4096))
    assert head_widths([huge, text], Hints(head_width=hint), "x") == [80, 64]
    own = Tower("image", 1280, (1280, 1, 5120))
    if hint:
        assert head_widths([own, text], Hints(head_width=hint), "x") == [80, 64]
        assert head_widths([own, text], Hints(heads=16), "x") == [80, 64]
    with pytest.raises(ValueError, match="head_width=96"):
        head_widths([huge, text], Hints(head_width=96), "x")


@pytest.mark.parametrize("name", ["epoch_3.pt", "model.safetensors"])
def test_open_clips_configuration_beside_a_file_says_how_wide_its_heads_are(tmp_path, name):
    config = narrow()
    reference = openclip_model(config, seed=1)
    folder = write_openclip_folder(reference, config, tmp_path / "model")
    (folder / "open_clip_model.safetensors").unlink()
    if name.endswith(".pt"):
        torch.save(
            {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in reference.state_dict().items()}}, folder / name
        )
    else:
        save_file(reference.state_dict(), folder / name)
    for path in (folder / name, folder):
        model, _ = load(path, device="cpu")
        assert model.config == config
        assert_same(model, reference, config)


def test_hugging_faces_configuration_beside_its_file_says_how_wide_its_heads_are(tmp_path):
    text = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "eos_token_id": 59}
    vision = {"hidden_size": 160, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 24, "patch_size": 8}
    text |= {"num_attention_heads": 4, "max_position_embeddings": 16}
    reference = randomised(HFModel(HFConfig(text_config=text, vision_config=vision, projection_dim=20)), 1)
    reference.save_pretrained(tmp_path)
    whole, alone = load(tmp_path, device="cpu")[0], load(tmp_path / "model.safetensors", device="cpu")[0]
    assert whole.config == alone.config
    assert (alone.config.vision.head_width, alone.config.text.head_width) == (80, 8)
    (tmp_path / "config.json").unlink()
    assert "head_width" in refusal(tmp_path / "model.safetensors")


def test_a_configuration_of_another_model_beside_a_file_is_not_believed(tmp_path):
    hf_model().save_pretrained(tmp_path)
    _, path = bare(tmp_path, narrow())
    assert "head_width" in refusal(path)
    (tmp_path / "config.json").write_text("{")
    assert "head_width" in refusal(path)


UNFOLLOWED = {
    "pool_type": ("vision_cfg", "pool_type", "avg"),
    "no_causal_mask": ("text_cfg", "no_causal_mask", True),
    "norm_kwargs": ("vision_cfg", "norm_kwargs", {"eps": 1e-2}),
    "image_size": ("vision_cfg", "image_size", [24, 48]),
    "patch_size": ("vision_cfg", "patch_size", [4, 8]),
}


@pytest.mark.parametrize("name", UNFOLLOWED)
@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "epoch_3.pt"])
def test_a_configuration_of_a_file_that_can_not_be_followed_is_the_error_with_or_without_hints(tmp_path, name, file):
    reference = openclip_model(narrow(), seed=1)
    folder = write_openclip_folder(reference, narrow(), tmp_path / "model")
    torch.save(reference.state_dict(), folder / "epoch_3.pt")
    settings = json.loads((folder / "open_clip_config.json").read_text())
    section, key, value = UNFOLLOWED[name]
    settings["model_cfg"][section][key] = value
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    messages = set()
    for read in (
        lambda: load(folder, device="cpu"),
        lambda: load(folder / file, device="cpu"),
        lambda: load(folder / file, device="cpu", activation="gelu", head_width=(32, 16)),
        lambda: openai.load(str(folder / file), device="cpu"),
    ):
        with pytest.raises(ValueError, match="open_clip_config") as caught:
            read()
        messages.add(str(caught.value))
    assert len(messages) == 1


@pytest.mark.parametrize("change", ["hidden_act", "layer_norm_eps", "siglip", "clipseg", "processor"])
def test_a_configuration_of_hugging_faces_that_can_not_be_followed_is_the_error_of_its_file(tmp_path, change):
    hf_model().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    if change == "processor":
        processor = {"image_processor_type": "SiglipImageProcessor"}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    elif change in ("hidden_act", "layer_norm_eps"):
        values["vision_config"][change] = {"hidden_act": "gelu", "layer_norm_eps": 1e-6}[change]
    else:
        values["model_type"] = change
    (tmp_path / "config.json").write_text(json.dumps(values))
    word = {"hidden_act": "activations", "processor": "Siglip"}.get(change, change)
    with pytest.raises(ValueError, match=word) as caught:
        load(tmp_path, device="cpu")
    message = re.escape(str(caught.value))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "model.safetensors", device="cpu", activation="quick_gelu", heads=(3, 4))
    with pytest.raises(ValueError, match=message):
        openai.load(str(tmp_path / "model.safetensors"), device="cpu")


def test_a_second_file_that_takes_a_models_activation_is_warned_of_unless_it_is_given(tmp_path):
    reference = openclip_model(narrow(), seed=1)
    folder = write_openclip_folder(reference, narrow(), tmp_path / "model")
    torch.save(reference.state_dict(), folder / "fine-tuned.pt")
    with pytest.warns(UserWarning, match=r"fine-tuned\.pt does not tell .*: gelu and .*open_clip_config\.json, which"):
        assert load(folder / "fine-tuned.pt", device="cpu")[0].config == narrow()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder / "fine-tuned.pt", device="cpu", activation="gelu")
        load(folder / "open_clip_model.safetensors", device="cpu")
        (folder / "open_clip_model.safetensors").unlink()
        load(folder / "fine-tuned.pt", device="cpu")


@pytest.mark.parametrize("hint", [{"head_width": 32}, {"head_width": (64, 32)}, {"heads": 1}, {"heads": (2, 4)}])
def test_heads_other_than_the_checkpoint_tells_are_refused(tmp_path, hint):
    folder = write_openclip_folder(openclip_model(TINY_VIT), TINY_VIT, tmp_path / "model")
    with pytest.raises(ValueError, match=f"{next(iter(hint))} is .* was asked for"):
        load(folder, device="cpu", **hint)
    assert load(folder, device="cpu", heads=2)[0].config == TINY_VIT


def test_the_commands_take_the_width_and_write_what_was_given(tmp_path, capsys):
    path = tmp_path / "model.pt"
    torch.save(openclip_model(narrow(), seed=1).state_dict(), path)
    for verb in (["info", str(path)], ["convert", str(path), str(tmp_path / "out"), "--to", "openclip"]):
        with pytest.raises(SystemExit):
            main([*verb, "--activation", "gelu"])
        assert "--head-width" in capsys.readouterr().err
        main([*verb, "--activation", "gelu", "--head-width", "32,16"])
    assert "4 heads" in capsys.readouterr().out or read_checkpoint(tmp_path / "out").config.vision.heads == 4
    written = json.loads((tmp_path / "out/open_clip_config.json").read_text())["model_cfg"]
    assert (written["vision_cfg"]["head_width"], written["text_cfg"]["heads"]) == (32, 6)
    for wrong in ("0", "32,16,8", "wide", "-8"):
        with pytest.raises(SystemExit):
            main(["info", str(path), "--activation", "gelu", f"--head-width={wrong}"])
        assert "80,64" in capsys.readouterr().err


@pytest.mark.parametrize("width, hidden", [(1408, 6144), (1664, 8192), (1792, 15360), (49, 98), (30, 100), (7, 3)])
def test_the_hidden_layers_of_an_inferred_configuration_are_as_wide_as_the_files(tmp_path, width, hidden):
    """A ratio that is no binary fraction must not round to a layer of one channel less."""
    from miniclip.weights.architecture import _ratio

    assert int(width * _ratio(hidden, width)) == hidden


@pytest.mark.parametrize("heads", [0, -3, 1.5, "3", None, True])
def test_a_number_of_heads_that_is_none_is_refused_with_its_value(tmp_path, heads):
    hf_model().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["vision_config"]["num_attention_heads"] = heads
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"config\.json has {re.escape(repr(heads))} attention heads.*greater than 0"):
        load(tmp_path, device="cpu")
