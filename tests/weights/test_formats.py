# weights.py on the layouts of other libraries. Oracles: open_clip for OpenAI's and its own, transformers for its own.

import io
import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import textwrap
import zipfile
import zlib

import open_clip
import pytest
import torch
import torch.distributed.checkpoint
import torch.nn.functional as F
import warm
from foreign_models import (
    TINY,
    TINY_RESNET,
    TINY_TEXT,
    TINY_VIT,
    OpenClip,
    assert_close,
    assert_same_as_openclip,
    hf_model,
    openclip_model,
    openclip_settings,
    probe,
    randomised,
    rounded,
    text,
    write_archive,
    write_openai_state_dict,
)
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, resize_pos_embed
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPForImageClassification,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    MetaClip2Config,
    MetaClip2Model,
    OwlViTConfig,
    OwlViTModel,
    SiglipConfig,
    SiglipModel,
)
from transformers import CLIPConfig as HFConfig

import miniclip.openclip
from miniclip.config import OPENAI_MODELS, CLIPConfig, TextConfig, VisionConfig
from miniclip.model import CLIP
from miniclip.tokenizer import random_ids
from miniclip.weights import pickles
from miniclip.weights.architecture import config_from_openclip
from miniclip.weights.convert import convert
from miniclip.weights.facts import inspect
from miniclip.weights.load import load, save
from miniclip.weights.read import read_checkpoint


@torch.no_grad()
def assert_same_as_transformers(path, reference, **options):
    model, _ = load(path, device="cpu", **options)
    images, tokens = probe(TINY_VIT)
    theirs = reference(input_ids=tokens, pixel_values=images)
    assert_close(model.encode_image(images, normalize=True), theirs.image_embeds)
    assert_close(model.encode_text(tokens, normalize=True), theirs.text_embeds)
    for found, expected in zip(model(images, tokens), (theirs.logits_per_image, theirs.logits_per_text), strict=True):
        assert_close(found, expected)
    return model


# ---- how those libraries write them


def is_a_matrix(name, tensor):
    """What OpenAI's convert_weights halves, more or less."""
    return tensor.ndim >= 2 and "embedding" not in name


def write_openclip_folder(model, config, folder, kind="safetensors", custom=False, wrap=lambda tensors: tensors):
    folder.mkdir()
    settings = openclip_settings(config) | {"quick_gelu": config.activation == "quick_gelu"}
    settings |= {"custom_text": True} if custom else {}
    pixels = {"mean": list(config.vision.mean), "std": list(config.vision.std)}
    pixels |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings, "preprocess_cfg": pixels}))
    if kind == "safetensors":
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    else:
        torch.save(wrap(model.state_dict()), folder / "open_clip_pytorch_model.bin")
    return folder


def wrapped(tensors):
    """As a trainer under DistributedDataParallel writes them."""
    return {"epoch": 3, "state_dict": {f"module.{key}": tensor for key, tensor in tensors.items()}}


# ---- OpenAI's archive and state dict


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("halved", [lambda *_: True, is_a_matrix, lambda *_: False], ids=["half", "mixed", "float"])
def test_an_openai_archive_gives_the_references_numbers(tmp_path, kind, halved):
    reference = openclip_model(TINY[kind], seed=1)
    path = write_archive(reference, TINY[kind], tmp_path / "model.pt", halved)
    assert_same_as_openclip(path, reference, TINY[kind])


@pytest.mark.parametrize("kind", TINY)
def test_an_openai_archive_gives_every_parameter_as_torch_jit_reads_it(tmp_path, kind):
    path = write_archive(openclip_model(TINY[kind], seed=2), TINY[kind], tmp_path / "model.pt", is_a_matrix)
    expected = torch.jit.load(path, map_location="cpu").state_dict()
    checkpoint = read_checkpoint(path)
    assert checkpoint.format == "openai"
    found = {key.removeprefix("text."): tensor for key, tensor in checkpoint.tensors.items()}
    extras = {"input_resolution", "context_length", "vocab_size", "attn_mask"}
    assert found.keys() == expected.keys() - extras
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("half", [True, False])
def test_an_openai_state_dict_gives_the_references_numbers_without_being_told_the_activation(tmp_path, kind, half):
    reference = openclip_model(TINY[kind], seed=3)
    path = write_openai_state_dict(reference, TINY[kind], tmp_path / "model.pt", half)
    assert_same_as_openclip(path, reference, TINY[kind])


@pytest.mark.parametrize("write", [write_archive, write_openai_state_dict])
def test_another_activation_than_openais_is_refused_for_openais_files(tmp_path, write):
    path = write(openclip_model(TINY_VIT), TINY_VIT, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="gelu") as caught:
        load(path, device="cpu", activation="gelu")
    assert str(path) in str(caught.value)
    assert load(path, device="cpu", activation="quick_gelu")[0].config.activation == "quick_gelu"


@pytest.mark.parametrize("how", ["scripted", "traced"])
def test_an_archive_that_is_not_openais_asks_for_what_it_does_not_tell_and_takes_it(tmp_path, how):
    vision = VisionConfig(image_size=24, patch_size=8, width=128, layers=2, head_width=32)
    config = CLIPConfig(24, "gelu", vision, TINY_TEXT)
    reference, path = openclip_model(config, seed=21), tmp_path / "model.pt"
    images, tokens = probe(config)
    if how == "scripted":
        torch.jit.script(reference).save(path)
    else:
        inputs = {"encode_image": images, "encode_text": tokens}
        torch.jit.trace_module(reference, inputs, check_trace=False).save(path)
    refused(path, "does not tell its activation")
    refused(path, "head_width", activation="gelu")
    assert_same_as_openclip(path, reference, config, activation="gelu", head_width=(32, 64))
    assert read_checkpoint(path, activation="gelu", head_width=(32, 64)).format == "openclip"


@pytest.mark.parametrize("activation", ["relu", "QuickGELU", ""])
def test_an_unknown_activation_is_refused_naming_the_valid_ones(tmp_path, activation):
    path = write_openai_state_dict(openclip_model(TINY_VIT), TINY_VIT, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"gelu, quick_gelu"):
        load(path, device="cpu", activation=activation)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_a_bare_state_dict_asks_for_its_activation_and_takes_it(tmp_path, kind, suffix):
    reference, path = openclip_model(TINY[kind], seed=4), tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(reference.state_dict(), path)
    else:
        torch.save(reference.state_dict(), path)
    with pytest.raises(ValueError, match="activation") as caught:
        load(path, device="cpu")
    assert str(path) in str(caught.value)
    assert_same_as_openclip(path, reference, TINY[kind], activation="quick_gelu", head_width=64)


def test_the_activation_that_is_given_is_the_one_that_runs(tmp_path):
    config = CLIPConfig(24, "gelu", TINY_VIT.vision, TINY_TEXT)
    reference = openclip_model(config, seed=5)
    torch.save(wrapped(reference.state_dict()), tmp_path / "epoch_3.pt")
    assert_same_as_openclip(tmp_path / "epoch_3.pt", reference, config, activation="gelu", head_width=64)


def full_depth(name, is_narrow):
    """One of OpenAI's models; `is_narrow` keeps only its depth, patch size and heads' width."""
    config = OPENAI_MODELS[name]
    if not is_narrow:
        return config
    vision, text = vars(config.vision), vars(config.text)
    if config.vision.kind == "vit":
        vision = vision | {"width": 128, "image_size": 4 * config.vision.patch_size}
    else:
        vision = vision | {"width": 8, "image_size": 64}
    text = text | {"vocab_size": 300, "eot_token": 299, "width": 128}
    return CLIPConfig(96, "quick_gelu", VisionConfig(**vision), TextConfig(**text))


TRACED_BY_DEFAULT = ("RN50", "RN101", "ViT-B/32", "ViT-L/14@336px")


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in TRACED_BY_DEFAULT else pytest.mark.long) for name in OPENAI_MODELS],
)
def test_an_archive_of_an_openai_models_depth_gives_the_references_numbers(tmp_path, name):
    config = full_depth(name, is_narrow=True)
    reference = openclip_model(config, seed=6)
    path = write_archive(reference, config, tmp_path / "model.pt")
    assert_same_as_openclip(path, reference, config)


@pytest.mark.sample(4)
@pytest.mark.parametrize("is_narrow", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", OPENAI_MODELS)
@pytest.mark.timeout(1500)  # the largest take minutes and 10 GB
def test_a_state_dict_of_an_openai_models_depth_gives_the_references_numbers(tmp_path, name, is_narrow):
    config = full_depth(name, is_narrow)
    reference = openclip_model(config, seed=7)
    path = write_openai_state_dict(reference, config, tmp_path / "model.pt")
    assert_same_as_openclip(path, reference, config)
    path.unlink()


@pytest.mark.long
@pytest.mark.parametrize("name", OPENAI_MODELS)
@pytest.mark.timeout(1500)  # the largest take minutes and 10 GB
def test_an_archive_of_an_openai_models_size_gives_the_references_numbers_and_its_configuration(tmp_path, name):
    config = OPENAI_MODELS[name]
    reference = openclip_model(config, seed=8)
    path = write_archive(reference, config, tmp_path / "model.pt")
    assert_same_as_openclip(path, reference, config)
    path.unlink()


# ---- OpenCLIP's folder


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize("cls", [OpenClip, CustomTextCLIP])
def test_an_openclip_folder_gives_the_references_numbers(tmp_path, kind, activation, weights, cls):
    config = CLIPConfig(24, activation, TINY[kind].vision, TINY_TEXT)
    reference = openclip_model(config, seed=9, cls=cls)
    folder = write_openclip_folder(reference, config, tmp_path / "model", weights, custom=cls is CustomTextCLIP)
    if cls is CustomTextCLIP:
        reference.get_logits = lambda *batch: OpenClip.get_logits(reference, *batch)
    assert_same_as_openclip(folder, reference, config)


def timm_settings(name, size, **changes):
    return {"image_size": size, "timm_model_name": name, "timm_pool": "token", **changes}


@pytest.mark.parametrize(("name", "size"), [("test_vit", 160), ("eva02_tiny_patch14_224", 224)])
@pytest.mark.parametrize("projection", [None, ""])
@torch.no_grad()
def test_an_openclip_folder_with_timms_own_classifier_as_the_projection_gives_open_clips_numbers(
    tmp_path, name, size, projection
):
    model = openclip_settings(TINY_VIT) | {"vision_cfg": timm_settings(name, size, timm_proj=projection)}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model | {"custom_text": True}}))
    reference = randomised(open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False), 27)
    save_file(reference.state_dict(), tmp_path / "open_clip_model.safetensors")
    found, _ = load(tmp_path, device="cpu")
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert_close(found.encode_image(images), reference.encode_image(images))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"timm_pool": "abs_attn", "timm_proj": None}, "'timm_pool': 'abs_attn'"),
        ({"timm_proj": "quadratic"}, "'timm_proj': 'quadratic'; supported are 'linear', 'mlp', 'none' and null or ''"),
    ],
)
def test_a_projection_after_a_timm_tower_that_ours_do_not_have_is_refused_by_its_value(changes, says):
    model = openclip_settings(TINY_VIT) | {"vision_cfg": timm_settings("test_vit", 160, **changes)}
    with pytest.raises(ValueError, match=says):
        config_from_openclip({"model_cfg": model}, "x")


@pytest.mark.parametrize("cls", [OpenClip, CustomTextCLIP])
def test_wrappers_that_trainers_put_around_a_state_dict_are_taken_off(tmp_path, cls):
    reference = openclip_model(TINY_VIT, seed=10, cls=cls)
    folder = write_openclip_folder(reference, TINY_VIT, tmp_path / "model", "bin", cls is CustomTextCLIP, wrapped)
    if cls is CustomTextCLIP:
        reference.get_logits = lambda *batch: OpenClip.get_logits(reference, *batch)
    assert_same_as_openclip(folder, reference, TINY_VIT)


def test_heads_of_another_width_are_read_from_openclips_configuration(tmp_path):
    vision = VisionConfig(image_size=24, patch_size=8, width=48, layers=2, head_width=16, mlp_ratio=3.0)
    text = TextConfig(context_length=12, vocab_size=60, eot_token=59, width=40, layers=1, head_width=8, mlp_ratio=2.0)
    config = CLIPConfig(24, "gelu", vision, text)
    reference = openclip_model(config, seed=11)
    assert_same_as_openclip(write_openclip_folder(reference, config, tmp_path / "model"), reference, config)


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "no_ln_pre", True),
        ("vision_cfg", "ls_init_value", 0.1),
        ("vision_cfg", "not_a_setting", 1),
        ("text_cfg", "hf_model_name", "roberta-base"),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "proj_bias", True),
        (None, "nonscalar_logit_scale", True),
    ],
)
def test_a_setting_of_openclips_that_our_towers_do_not_have_is_refused_by_name(tmp_path, section, key, value):
    folder = write_openclip_folder(openclip_model(TINY_VIT), TINY_VIT, tmp_path / "model")
    settings = json.loads((folder / "open_clip_config.json").read_text())
    (settings["model_cfg"][section] if section else settings["model_cfg"])[key] = value
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=key) as caught:
        load(folder, device="cpu")
    assert str(folder) in str(caught.value)


OPENAI_NAMES_AT_OPENCLIP = {
    name: name.removesuffix("@336px").replace("/", "-") + ("-336" if "@" in name else "") + "-quickgelu"
    for name in OPENAI_MODELS
}


@pytest.mark.parametrize("name", OPENAI_MODELS)
def test_openclips_own_configuration_of_an_openai_model_is_read_as_ours(name):
    settings = open_clip.get_model_config(OPENAI_NAMES_AT_OPENCLIP[name])
    assert config_from_openclip({"model_cfg": settings}, "x") == OPENAI_MODELS[name]


# ---- Hugging Face's folder


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("end", [59, 2])
@pytest.mark.parametrize("shard", [None, "20KB"])
def test_a_hugging_face_folder_gives_transformers_numbers(tmp_path, act, end, shard):
    reference = hf_model(seed=12, act=act, end=end)
    reference.save_pretrained(tmp_path / "model", **({"max_shard_size": shard} if shard else {}))
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > (2 if shard else 0)
    model = assert_same_as_transformers(tmp_path / "model", reference)
    assert (model.config.activation, model.config.text.eot_token) == (act, 59)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_hugging_face_folder_of_pickles_gives_transformers_numbers(tmp_path, shards):
    reference = hf_model(seed=13)
    reference.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    tensors = list(reference.state_dict().items())
    parts = [dict(tensors[start::shards]) for start in range(shards)]
    if shards == 1:
        torch.save(parts[0], tmp_path / "model" / "pytorch_model.bin")
    else:
        index = {}
        for number, part in enumerate(parts):
            file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
            torch.save(part, tmp_path / "model" / file)
            index |= dict.fromkeys(part, file)
        content = {"metadata": {}, "weight_map": index}
        (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(content))
    assert_same_as_transformers(tmp_path / "model", reference)


def test_a_half_precision_hugging_face_folder_gives_the_numbers_of_the_rounded_weights(tmp_path):
    reference = hf_model(seed=14)
    reference.half().save_pretrained(tmp_path / "model")
    assert_same_as_transformers(tmp_path / "model", reference.float())


def test_position_ids_of_old_hugging_face_files_are_passed_over(tmp_path):
    reference = hf_model(seed=15)
    reference.save_pretrained(tmp_path / "model")
    extra = {f"{tower}_model.embeddings.position_ids": torch.arange(10)[None] for tower in ("text", "vision")}
    save_file({**reference.state_dict(), **extra}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert_same_as_transformers(tmp_path / "model", reference)


@pytest.mark.parametrize("part", ["../model.safetensors", "/etc/passwd", "missing.safetensors", 7])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(tmp_path, part):
    hf_model().save_pretrained(tmp_path / "model")
    os.rename(tmp_path / "model" / "model.safetensors", tmp_path / "model.safetensors")
    index = {"weight_map": {"logit_scale": part}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path / "model")


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": []}, {"weight_map": {"logit_scale": ["x"]}}, {"weight_map": None}]
)
def test_a_damaged_index_is_refused(tmp_path, index):
    hf_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path / "model")


@pytest.mark.parametrize(
    "section, key, value",
    [
        (None, "model_type", "siglip"),
        (None, "projection_dim", "wide"),
        ("text_config", "hidden_act", "relu"),
        ("text_config", "layer_norm_eps", 1e-6),
        ("text_config", "hidden_size", "wide"),
        ("text_config", "num_attention_heads", 0),
        ("text_config", "num_attention_heads", 5),
        ("text_config", "eos_token_id", None),
        ("vision_config", "image_size", 25),
        ("vision_config", "patch_size", 0),
        ("vision_config", "num_hidden_layers", None),
        ("vision_config", "hidden_size", 0),
        (None, "vision_config", [1]),
    ],
)
def test_a_configuration_of_hugging_faces_that_can_not_be_is_refused_naming_its_file(tmp_path, section, key, value):
    hf_model().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    (values[section] if section else values)[key] = value
    path.write_text(json.dumps(values))
    refused(path.parent)


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("vision_cfg", "width", 0),
        ("vision_cfg", "width", "wide"),
        ("vision_cfg", "layers", [1, 2]),
        ("vision_cfg", "image_size", [24, 32]),
        ("text_cfg", "heads", 0),
        ("text_cfg", "layers", None),
        (None, "embed_dim", None),
        (None, "vision_cfg", None),
        (None, "text_cfg", 3),
    ],
)
def test_a_configuration_of_openclips_that_can_not_be_is_refused_naming_its_file(tmp_path, section, key, value):
    folder = write_openclip_folder(openclip_model(TINY_VIT), TINY_VIT, tmp_path / "model")
    settings = json.loads((folder / "open_clip_config.json").read_text())
    (settings["model_cfg"][section] if section else settings["model_cfg"])[key] = value
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    refused(folder)


def test_a_missing_embedding_width_in_openclips_configuration_is_refused_naming_its_file(tmp_path):
    folder = write_openclip_folder(openclip_model(TINY_VIT), TINY_VIT, tmp_path / "model")
    settings = json.loads((folder / "open_clip_config.json").read_text())
    del settings["model_cfg"]["embed_dim"]
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    refused(folder)


# ---- vocabularies that were enlarged (resize_token_embeddings, textual inversion)

ENLARGED = TextConfig(context_length=12, vocab_size=49410, eot_token=None, width=64, layers=1)


def texts_with_clips_end():
    """Three texts that end with CLIP's end token, in the last of them one of the added ones."""
    tokens = torch.zeros(3, 12, dtype=torch.long)
    for row, length in zip(tokens, (3, 7, 12), strict=True):
        row[:length] = torch.tensor([49406, *range(300, 298 + length), 49407])
    tokens[2, 4] = 49408
    return tokens


@torch.no_grad()
def assert_same_texts_on_every_path(model, reference):
    """Packed, observed by a hook, straight through the tower, and exported."""
    tokens = texts_with_clips_end()
    expected = reference(tokens)
    exported = torch.export.export(model.text, (tokens,)).module()
    for encode in (model.encode_text, model.text, exported):
        assert_close(encode(tokens), expected)
    model.text.transformer.resblocks[0].register_forward_hook(lambda *_: None)
    assert_close(model.encode_text(tokens), expected)


def test_an_openclip_folder_with_added_tokens_is_read_at_the_largest_id_as_open_clip_does(tmp_path):
    config = CLIPConfig(24, "gelu", TINY_VIT.vision, ENLARGED)
    reference = openclip_model(config, seed=22)
    folder = write_openclip_folder(reference, config, tmp_path / "model")
    assert_same_texts_on_every_path(load(folder, device="cpu")[0], reference.encode_text)
    save(load(folder, device="cpu")[0], tmp_path / "ours")
    assert_same_texts_on_every_path(load(tmp_path / "ours", device="cpu")[0], reference.encode_text)
    torch.save(reference.state_dict(), folder / "open_clip_pytorch_model.bin")
    model, _ = load(folder / "open_clip_pytorch_model.bin", device="cpu")
    assert_same_texts_on_every_path(model, reference.encode_text)
    assert "by open_clip" in convert(folder, tmp_path / "again", "openclip")
    assert "by transformers" in convert(folder, tmp_path / "hf", "hf")


@pytest.mark.parametrize("end", [2, 49407])
def test_a_hugging_face_folder_with_added_tokens_gives_transformers_numbers(tmp_path, end):
    small = hf_model(seed=23, end=end).config.text_config
    small.vocab_size, small.max_position_embeddings = 49410, 12
    randomised(CLIPTextModelWithProjection(small), 1).save_pretrained(tmp_path / "text")
    reference = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text").eval()
    model, _ = load(tmp_path / "text", device="cpu")
    assert_same_texts_on_every_path(model, lambda tokens: reference(input_ids=tokens).text_embeds)


@pytest.mark.parametrize("names", ["openclip", "hf"])
def test_a_bare_state_dict_with_added_tokens_does_not_tell_its_end_and_is_refused(tmp_path, names):
    tensors = (openclip_model(TINY_VIT) if names == "openclip" else hf_model(seed=24)).state_dict()
    name = "token_embedding.weight" if names == "openclip" else "text_model.embeddings.token_embedding.weight"
    tensors[name] = torch.zeros(49410, tensors[name].shape[1])
    torch.save(tensors, tmp_path / "model.pt")
    hints = {"activation": "gelu", "head_width": (16, 8)}
    refused(tmp_path / "model.pt", "49410 tokens and does not tell which of them ends a text", **hints)


def worldwide(vocab_size, end, seed=0):
    """open_clip's model with the text tower of a MetaCLIP 2, its settings, and texts as their tokenizer pads them."""
    settings = openclip_settings(CLIPConfig(24, "gelu", TINY_VIT.vision, ENLARGED))
    settings["text_cfg"] |= {"vocab_size": vocab_size, "pool_type": "eos", "eos_id": end}
    text = CLIPTextCfg(**settings["text_cfg"])
    model = randomised(OpenClip(24, CLIPVisionCfg(**settings["vision_cfg"]), text), seed)
    tokens = torch.zeros(3, 12, dtype=torch.long)
    for row, length in zip(tokens, (3, 7, 12), strict=True):
        row[:length] = torch.tensor([*range(20, 19 + length), end])
    tokens[1, 2] = vocab_size - 1  # the largest id ends nothing
    return model, {"model_cfg": settings}, tokens


@pytest.mark.parametrize("other_tokenizer", [False, True])
@torch.no_grad()
def test_an_openclip_folder_whose_texts_end_with_an_id_of_their_own_gives_open_clips_numbers(tmp_path, other_tokenizer):
    reference, settings, tokens = worldwide(300, 2, seed=25)
    if other_tokenizer:
        of_theirs = {"hf_tokenizer_name": "google/mt5-base", "tokenizer_kwargs": {"clean": "canonicalize"}}
        settings["model_cfg"]["text_cfg"] |= of_theirs
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(reference.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    model, _ = load(folder, device="cpu")
    assert_close(model.encode_text(tokens), reference.encode_text(tokens))
    assert "by open_clip" in convert(folder, tmp_path / "again", "openclip")
    again, _ = load(tmp_path / "again", device="cpu")
    assert again.config == model.config
    with pytest.raises(ValueError, match=r"ends texts with 2.*miniclip.load takes it"):
        miniclip.openclip.create_model(f"local-dir:{folder}")


def metaclip_2(vocab_size=300, end=2):
    tower = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": vocab_size, "max_position_embeddings": 16, "eos_token_id": end, "bos_token_id": 0}
    config = MetaClip2Config(
        text_config=tower | text, vision_config=tower | {"image_size": 24, "patch_size": 8}, projection_dim=20
    )
    return randomised(MetaClip2Model(config), 3)


@pytest.mark.parametrize("end", [2, 7])
@torch.no_grad()
def test_hugging_faces_metaclip_2_is_read_at_its_end_as_transformers_does(tmp_path, end):
    """Where CLIP's classes take an end of 2 to mean the largest id."""
    reference = metaclip_2(end=end)
    reference.save_pretrained(tmp_path / "model")
    tokens = torch.tensor([[0, 200, 9, end, 1, 1], [0, 17, 250, 99, 33, end]])
    model, _ = load(tmp_path / "model", device="cpu")
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    theirs = reference(input_ids=tokens, pixel_values=pixels)
    assert_close(model.encode_text(tokens, normalize=True), theirs.text_embeds)
    assert_close(model.encode_image(pixels, normalize=True), theirs.image_embeds)
    assert model.config.text.eot_token == end
    convert(tmp_path / "model", tmp_path / "again", "openclip")
    assert load(tmp_path / "again", device="cpu")[0].config.text.eot_token == end


def test_a_metaclip_2_that_transformers_clip_would_read_at_the_largest_id_is_not_written_for_it(tmp_path):
    metaclip_2().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="an end of 2 to mean the largest id"):
        convert(tmp_path / "model", tmp_path / "out", "hf")


def test_a_metaclip_2_whose_ids_could_be_taken_for_clips_is_refused(tmp_path):
    metaclip_2(vocab_size=49408).save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", "'metaclip_2' with as many tokens as CLIP's, 49,408")


def test_a_text_tower_beside_the_processor_of_its_model_is_read(tmp_path):
    CLIPTextModelWithProjection(hf_model().config.text_config).save_pretrained(tmp_path / "model")
    processor = {"image_processor_type": "CLIPImageProcessor", "crop_size": 336, "size": 336}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    assert load(tmp_path / "model", device="cpu")[0].config.towers == "text"


def test_a_processor_of_another_models_size_is_refused_naming_both_files(tmp_path):
    hf_model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps({"crop_size": 336, "size": 336}))
    message = refused(tmp_path / "model", "crop_size", "336", "24 x 24 pixels (image_size in its config.json)")
    assert "preprocessor_config.json" in message


def test_shards_without_a_configuration_are_told_to_need_one(tmp_path):
    hf_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    (tmp_path / "model" / "config.json").unlink()
    refused(tmp_path / "model", "weights in shards (model.safetensors.index.json) and no config.json; put the model's")
    refused(tmp_path / "model" / "model.safetensors.index.json", "lists the shards", f"folder, {tmp_path / 'model'}")


def test_shards_beside_our_own_configuration_give_the_same_model(tmp_path):
    """As accelerate's save_model writes them, with the config.json that the error without one asks for."""
    model = CLIP(TINY_VIT).eval()
    save(model, tmp_path / "whole")
    names = list(model.state_dict())
    parts = {name: f"model-{which}.safetensors" for which in "12" for name in names[which == "2" :: 2]}
    for part in set(parts.values()):
        mine = {name: tensor for name, tensor in model.state_dict().items() if parts[name] == part}
        save_file(mine, tmp_path / "whole" / part)
    (tmp_path / "whole" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    (tmp_path / "whole" / "model.safetensors").unlink()
    found, _ = load(tmp_path / "whole", device="cpu")
    assert found.config == model.config
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_folder_of_torchs_distributed_checkpoints_is_told_the_command_that_makes_a_file_of_it(tmp_path):
    """What it makes is loaded."""
    folder, state = tmp_path / "parts", openclip_model(TINY_VIT).state_dict()
    torch.distributed.checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"step": 3}, folder / "meta.pt")
    part = next(folder.glob("*.distcp"))
    for path in (folder, part):
        message = refused(
            path, f"{part.name} is not read; it is a part of a checkpoint of torch.distributed.checkpoint"
        )
    module = re.search(r"python -m (\S+) dcp_to_torch FOLDER FILE", message)[1]
    command = [sys.executable, "-m", module, "dcp_to_torch", str(folder), str(tmp_path / "whole.pt")]
    warm.run(command, check=True)
    load(tmp_path / "whole.pt", device="cpu", activation="gelu", heads=(2, 2))


def test_another_tokenizer_whose_ids_could_be_taken_for_clips_is_refused(tmp_path):
    _, settings, _ = worldwide(49408, 2)
    settings["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "google/mt5-base"
    with pytest.raises(ValueError, match="'hf_tokenizer_name': 'google/mt5-base'"):
        config_from_openclip(settings, "x")


@pytest.mark.parametrize("name", ["ViT-H-14-worldwide", "ViT-L-14-worldwide-quickgelu"])
@torch.no_grad()
def test_a_bare_state_dict_of_a_published_vocabulary_is_read_at_its_end_token(tmp_path, name):
    published = open_clip.get_model_config(name)["text_cfg"]
    reference, _, tokens = worldwide(published["vocab_size"], published["eos_id"], seed=26)
    torch.save(reference.state_dict(), tmp_path / "bare.pt")
    model, _ = load(tmp_path / "bare.pt", device="cpu", activation="gelu", head_width=(16, 64))
    assert_close(model.encode_text(tokens), reference.encode_text(tokens))


def test_an_end_that_is_not_the_largest_id_is_refused_where_the_layout_can_not_say_so(tmp_path):
    text = TextConfig(**vars(ENLARGED) | {"eot_token": 49407})
    save(CLIP(CLIPConfig(24, "quick_gelu", TINY_VIT.vision, text)), tmp_path / "model")
    with pytest.raises(ValueError, match="reads texts at the largest id, and here 49407 of 49410"):
        convert(tmp_path / "model", tmp_path / "out", "openai")
    assert "by open_clip" in convert(tmp_path / "model", tmp_path / "out", "openclip")


@pytest.mark.parametrize(("vocab_size", "eot", "end"), [(49410, None, 49407), (60, None, 59), (60, 7, 7)])
def test_what_a_proof_reads_ends_as_texts_do(vocab_size, eot, end):
    text = TextConfig(vocab_size=vocab_size, eot_token=eot)
    tokens, found = random_ids(text, (50, 77), torch.Generator().manual_seed(0))
    assert found == end
    assert not (tokens == end).any()
    assert eot is not None or tokens.max() < end


# ---- other sizes and precisions


@pytest.mark.parametrize("size", [16, 40, 56])
@torch.no_grad()
def test_a_vit_at_another_resolution_equals_open_clips_resizing(tmp_path, size):
    reference = openclip_model(TINY_VIT, seed=16)
    path = write_openai_state_dict(reference, TINY_VIT, tmp_path / "model.pt", half=False)
    vision = VisionConfig(**{**vars(TINY_VIT.vision), "image_size": size})
    resized = openclip_model(CLIPConfig(24, "quick_gelu", vision, TINY_TEXT))
    tensors = dict(reference.state_dict())
    for name in ("input_resolution", "context_length", "vocab_size"):
        tensors.pop(name, None)
    resize_pos_embed(tensors, resized)
    resized.load_state_dict(tensors)
    model, preprocess = load(path, device="cpu", image_size=size)
    assert model.visual.input_resolution == preprocess.image_size == model.config.vision.image_size == size
    images, tokens = probe(model.config)
    assert_close(model.encode_image(images), resized.encode_image(images))
    assert_close(model.encode_text(tokens), reference.encode_text(tokens))


@pytest.mark.parametrize("size", [32, 96, 160])
@torch.no_grad()
def test_a_resnet_at_another_resolution_interpolates_its_pools_positions(tmp_path, size):
    reference = openclip_model(TINY_RESNET, seed=17)
    path = write_openai_state_dict(reference, TINY_RESNET, tmp_path / "model.pt", half=False)
    table, side = reference.visual.attnpool.positional_embedding, size // 32
    grid = table[1:].reshape(1, 2, 2, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
    places = grid.flatten(2)[0].T
    model, preprocess = load(path, device="cpu", image_size=size)
    assert model.visual.input_resolution == preprocess.image_size == size
    assert_close(model.visual.attnpool.positional_embedding, torch.cat([table[:1], places]))
    reference.visual.attnpool.positional_embedding = torch.nn.Parameter(torch.cat([table[:1], places]))
    images, _ = probe(model.config)
    assert_close(model.encode_image(images), reference.encode_image(images))


@torch.no_grad()
def test_cutting_the_context_leaves_short_texts_exactly_as_they_were(tmp_path):
    path = write_openai_state_dict(openclip_model(TINY_VIT, seed=18), TINY_VIT, tmp_path / "model.pt")
    whole, cut = load(path, device="cpu")[0], load(path, device="cpu", context_length=9)[0]
    _, tokens = probe(TINY_VIT)
    assert (cut.context_length, cut.config.text.context_length) == (9, 9)
    assert cut.text.positional_embedding.shape == (9, 128)
    assert torch.equal(cut.encode_text(tokens[:2, :9]), whole.encode_text(tokens[:2]))
    with pytest.raises(ValueError, match="context length 9"):
        cut.encode_text(tokens)


@torch.no_grad()
def test_extending_the_context_repeats_the_last_position_and_keeps_the_others(tmp_path):
    path = write_openai_state_dict(openclip_model(TINY_VIT, seed=19), TINY_VIT, tmp_path / "model.pt")
    whole, long = load(path, device="cpu")[0], load(path, device="cpu", context_length=20)[0]
    _, tokens = probe(TINY_VIT)
    before, after = whole.text.positional_embedding, long.text.positional_embedding
    assert torch.equal(after[:16], before)
    assert torch.equal(after[16:], before[-1:].expand(4, -1))
    assert torch.equal(long.encode_text(tokens), whole.encode_text(tokens))
    assert long.encode_text(F.pad(tokens, (4, 0), value=1)).isfinite().all()


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("size", [0, -8, 25, 33, 24.0, "24", True])
def test_an_image_size_that_the_architecture_does_not_allow_is_refused(tmp_path, kind, size):
    path = write_openai_state_dict(openclip_model(TINY[kind]), TINY[kind], tmp_path / "model.pt")
    if size == 24.0 and kind == "vit":
        pytest.skip("equal to the size that it has")
    with pytest.raises(ValueError, match="image_size"):
        load(path, device="cpu", image_size=size)


@pytest.mark.parametrize("length", [0, -1, 7.5, "8"])
def test_a_context_length_that_can_not_be_is_refused(tmp_path, length):
    path = write_openai_state_dict(openclip_model(TINY_VIT), TINY_VIT, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="context_length"):
        load(path, device="cpu", context_length=length)


@pytest.mark.parametrize("size", [{"image_size": 32}, {"context_length": 9}], ids=str)
def test_what_is_to_be_resized_is_missed_by_its_name_where_it_is_not_there(tmp_path, size):
    save(CLIP(TINY_VIT), tmp_path / "model")
    tensors = {name: tensor for name, tensor in CLIP(TINY_VIT).state_dict().items() if "positional" not in name}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    refused(tmp_path / "model", "visual.positional_embedding: the architecture has (10, 128), the file no such", **size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", TINY)
@torch.no_grad()
def test_everything_floating_has_the_precision_that_was_asked_for(tmp_path, dtype, kind):
    reference = openclip_model(TINY[kind], seed=20)
    path = write_openai_state_dict(reference, TINY[kind], tmp_path / "model.pt")
    model, _ = load(path, device="cpu", dtype=dtype)
    assert model.dtype == dtype
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {dtype}
    images, tokens = probe(TINY[kind])
    for found, expected in (
        (model.encode_image(images), reference.encode_image(images)),
        (model.encode_text(tokens), reference.encode_text(tokens)),
    ):
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1 * expected.abs().max().item())


@pytest.mark.parametrize("write", [write_archive, write_openai_state_dict])
def test_jit_is_ignored_with_a_warning_for_openais_files(tmp_path, write):
    path = write(openclip_model(TINY_VIT), TINY_VIT, tmp_path / "model.pt")
    with pytest.warns(UserWarning, match="jit=True is ignored"):
        load(path, jit=True)


@pytest.mark.parametrize("write", [write_archive, write_openai_state_dict])
def test_changing_a_loaded_model_leaves_an_openai_file_alone(tmp_path, write):
    path = write(openclip_model(TINY_VIT), TINY_VIT, tmp_path / "model.pt")
    before = path.read_bytes()
    for dtype in (torch.float32, torch.float16):
        model, _ = load(path, device="cpu", dtype=dtype)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1)
    assert path.read_bytes() == before


# ---- files that are none, or worse


def refused(path, *words, **options):
    """load() raises a ValueError that names the path and all the words, and leaves nothing behind."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load(path, device="cpu", **options)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert sorted(path.parent.rglob("*")) == before
    return str(caught.value)


class Malicious:
    """Unpickling it calls something."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write_zip(path, records, root="archive"):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"constants.pkl": b"\x80\x02).", "version": b"3\n", **records}.items():
            archive.writestr(f"{root}/{name}", content)
    return path


@pytest.mark.parametrize("activation", [None, "quick_gelu"])
@pytest.mark.parametrize("where", ["model.pt", "model.bin", "model.ckpt", "hf", "hf shard", "openclip", "zip"])
@pytest.mark.parametrize("function", [os.system, eval, torch.load, pickle.loads], ids=lambda f: f.__name__)
def test_a_file_that_asks_for_code_to_be_run_is_refused_and_nothing_runs(tmp_path, where, function, activation):
    trace, command = tmp_path / "code-was-run", f"touch {tmp_path / 'code-was-run'}"
    payload = Malicious(os.system, command)
    if function is eval:
        payload = Malicious(eval, f"__import__('os').system({command!r})")
    elif function is pickle.loads:
        payload = Malicious(pickle.loads, pickle.dumps(payload))
    elif function is torch.load:
        torch.save(payload, tmp_path / "inner.pt")
        payload = Malicious(torch.load, str(tmp_path / "inner.pt"))
    tensors = {"input_resolution": torch.tensor(2), "visual.proj": torch.ones(2, 2), "logit_scale": payload}
    path = tmp_path / "model"
    if where.startswith("hf"):
        hf_model().save_pretrained(path)
        (path / "model.safetensors").unlink()
        torch.save(tensors, path / "pytorch_model.bin")
        if where == "hf shard":
            os.rename(path / "pytorch_model.bin", path / "part.bin")
            (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "part.bin"}}))
    elif where == "openclip":
        write_openclip_folder(openclip_model(TINY_VIT), TINY_VIT, path, "bin", wrap=lambda _: tensors)
    elif where == "zip":
        write_zip(path, {"data.pkl": pickle.dumps(tensors | {"visual.proj": 1, "input_resolution": 1}, protocol=2)})
    else:
        path = tmp_path / where
        torch.save(tensors, path)
    message = refused(path, activation=activation)
    assert not trace.exists()
    assert "weights_only" not in message


def test_the_malicious_pickles_would_run_code_elsewhere(tmp_path):
    """Else the test above would prove nothing."""
    trace = tmp_path / "code-was-run"
    pickle.loads(pickle.dumps({"a": Malicious(os.system, f"touch {trace}")}, protocol=2))
    assert trace.exists()


def archive_bytes(path, config=TINY_VIT):
    return write_archive(openclip_model(config), config, path).read_bytes()


def rewritten(source, out, change):
    """A zip archive with every record as change(name, content) gives it; None leaves it out."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(out, "w") as copy:
        for info in archive.infolist():
            content = change(info.filename, archive.read(info))
            if content is not None:
                copy.writestr(info.filename, content)
    return out


def test_an_archive_that_was_cut_off_anywhere_is_refused(tmp_path):
    content, path = archive_bytes(tmp_path / "whole.pt"), tmp_path / "cut.pt"
    for share in (0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999):
        path.write_bytes(content[: int(len(content) * share)])
        refused(path)
    path.write_bytes(content[:-1])
    refused(path)


def record_of(path, name):
    """Where a record's bytes are in an archive, by its local header (PKWARE's APPNOTE, 4.3.7), and how many."""
    with zipfile.ZipFile(path) as archive:
        info = next(each for each in archive.infolist() if each.filename.endswith(name))
    lengths = struct.unpack_from("<HH", path.read_bytes(), info.header_offset + 26)
    return info.header_offset + 30 + sum(lengths), info.file_size


@pytest.mark.parametrize("kind", ["archive", "state dict"])
@pytest.mark.parametrize("damage", ["a block of zeros", "a bit"])
def test_numbers_that_are_not_those_that_were_saved_are_refused_by_their_record(tmp_path, kind, damage):
    path = tmp_path / "model.pt"
    write = write_archive if kind == "archive" else write_openai_state_dict
    write(openclip_model(TINY_VIT), TINY_VIT, path)
    load(path, device="cpu")
    content = bytearray(path.read_bytes())
    start, size = record_of(path, "data/3")
    assert any(content[start : start + size])
    if damage == "a bit":
        content[start + size // 2] ^= 1
    else:
        content[start : start + size] = bytes(size)
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:  # another reader's word
        assert archive.testzip().endswith("data/3")
    refused(path, "is damaged", "data/3", f"{zlib.crc32(content[start : start + size]):08x}")


def test_a_damaged_description_is_refused_by_its_record(tmp_path):
    path = write_openai_state_dict(openclip_model(TINY_VIT), TINY_VIT, tmp_path / "model.pt")
    content = path.read_bytes()
    assert content.count(b"visual.ln_pre.weight") == 1
    path.write_bytes(content.replace(b"visual.ln_pre.weight", b"visual.ln_pre.weighs"))
    refused(path, "is damaged", "data.pkl")


def test_a_file_that_torch_wrote_without_checksums_is_read(tmp_path):
    """Its fields hold 0, which zipfile takes for wrong ones."""
    tensors = {"a.b": torch.arange(1000.0), "c.d": torch.ones(3, 4), "e.f": torch.zeros(0)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "without.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "without.pt") as archive:
        assert {info.CRC for info in archive.infolist()} == {0}
        assert archive.testzip() is not None
    found = pickles.read_pickle(tmp_path / "without.pt")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in found)


def test_records_that_lie_in_each_other_are_refused_before_they_are_read_a_thousand_times(tmp_path):
    size = 1 << 16
    codes = {f"w{i}": tensor_code(key=str(i), count=4) for i in range(1000)}
    records = {"data.pkl": stub_module(**codes), **{f"data/{i}": b"" for i in range(1000)}}
    with zipfile.ZipFile(tmp_path / "bad.pt", "w") as archive:
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
        archive.writestr("archive/data/all", bytes(size))
        whole = archive.filelist[-1]
        for info in archive.filelist:
            if "/data/" in info.filename:
                info.header_offset, info.file_size, info.compress_size = whole.header_offset, size, size
                info.CRC = whole.CRC
    refused(tmp_path / "bad.pt", "overlap")


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_file_that_was_cut_short_is_called_damaged_with_its_size(tmp_path, is_zip):
    path = tmp_path / "model.pt"
    torch.save(openclip_model(TINY_VIT).state_dict(), path, _use_new_zipfile_serialization=is_zip)
    content = path.read_bytes()
    for share in (0.02, 0.5, 0.9, 0.9999):
        path.write_bytes(content[: int(len(content) * share)])
        message = refused(path, "is damaged", f"{int(len(content) * share):,} bytes", activation="quick_gelu")
        assert "safely" not in message


def test_an_archive_that_lost_its_beginning_is_refused(tmp_path):
    content, path = archive_bytes(tmp_path / "whole.pt"), tmp_path / "cut.pt"
    for lost in (1, 100, 5000, len(content) // 2):
        path.write_bytes(content[lost:])
        refused(path)


@pytest.mark.parametrize("kind", ["state dict", "safetensors", "hf", "openclip"])
def test_a_checkpoint_that_was_cut_off_anywhere_is_refused(tmp_path, kind):
    whole = path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    if kind == "state dict":
        write_openai_state_dict(openclip_model(TINY_VIT), TINY_VIT, path)
    elif kind == "safetensors":
        save_file(openclip_model(TINY_VIT).state_dict(), path)
    elif kind == "hf":
        path = tmp_path / "model"
        hf_model().save_pretrained(path)
        whole = path / "model.safetensors"
    else:
        path = write_openclip_folder(openclip_model(TINY_VIT), TINY_VIT, tmp_path / "model", "bin")
        whole = path / "open_clip_pytorch_model.bin"
    content = whole.read_bytes()
    for share in (0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999):
        whole.write_bytes(content[: int(len(content) * share)])
        refused(path, activation="quick_gelu")


@pytest.mark.parametrize("missing", ["/data.pkl", "/data/0", "/data/7"])
def test_an_archive_without_one_of_its_records_is_refused(tmp_path, missing):
    archive_bytes(tmp_path / "whole.pt")
    drop = lambda name, content: None if name.endswith(missing) else content  # noqa: E731
    refused(rewritten(tmp_path / "whole.pt", tmp_path / "bad.pt", drop))


def test_a_record_that_is_shorter_than_its_tensor_is_refused(tmp_path):
    archive_bytes(tmp_path / "whole.pt")
    cut = lambda name, content: content[:-2] if "/data/" in name and len(content) > 64 else content  # noqa: E731
    refused(rewritten(tmp_path / "whole.pt", tmp_path / "bad.pt", cut), "shorter")


def stub_module(**attributes):
    """The pickle of a TorchScript module with attributes (protocol 2), each the pickle's own code."""
    out = io.BytesIO()
    out.write(b"\x80\x02c__torch__.model\nCLIP\n)\x81}(")
    for name, code in attributes.items():
        out.write(b"X" + struct.pack("<I", len(name)) + name.encode() + code)
    out.write(b"ub.")
    return out.getvalue()


def number(value):
    return b"\x8a\x08" + struct.pack("<q", value)


def tensor_code(kind="HalfStorage", key="0", count=4, offset=0, size=(2, 2), stride=(2, 1)):
    sides = lambda values: b"(" + b"".join(number(value) for value in values) + b"t"  # noqa: E731
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(count) + b"tQ"
    rebuilt = storage + number(offset) + sides(size) + sides(stride) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + rebuilt + b"tR"


def test_the_handmade_archives_are_read_when_nothing_is_wrong_with_them(tmp_path):
    """Else the tests below would prove nothing."""
    from miniclip.weights.pickles import read_torchscript

    content = torch.tensor([[1, 2], [3, 4]], dtype=torch.float16)
    records = {"data.pkl": stub_module(weight=tensor_code()), "data/0": content.numpy().tobytes()}
    assert torch.equal(read_torchscript(write_zip(tmp_path / "good.pt", records))["weight"], content)


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 5},
        {"count": 1 << 40},
        {"count": -1},
        {"offset": 1},
        {"offset": -1},
        {"size": (3, 2)},
        {"stride": (3, 1)},
        {"size": (1 << 40, 2)},
        {"size": (-1, 2)},
        {"size": (2,)},
        {"stride": (-1, 1)},
        {"key": "1"},
        {"key": "../data.pkl"},
        {"kind": "ComplexFloatStorage"},
        {"kind": "FloatStorage"},
        {"kind": "load"},
    ],
    ids=str,
)
def test_a_tensor_that_reaches_beyond_its_record_is_refused(tmp_path, wrong):
    records = {"data.pkl": stub_module(weight=tensor_code(**wrong)), "data/0": bytes(8)}
    refused(write_zip(tmp_path / "bad.pt", records))


def run_limited(code, *arguments, gigabytes=8):
    """Runs code in a process of its own that can't take the machine's memory; gives its result and its peak in MB."""
    script = f"""
        import resource, sys
        import torch
        from miniclip.weights.load import load
        resource.setrlimit(resource.RLIMIT_AS, ({gigabytes} << 30, {gigabytes} << 30))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        {code}
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


LOAD_REFUSED = """
        try:
            load(sys.argv[1], device='cpu', activation='quick_gelu')
        except ValueError as error:
            assert sys.argv[1] in str(error), error
        else:
            raise SystemExit('it was loaded')
"""


def assert_refused_in_little_memory(path, megabytes=200):
    result = run_limited(LOAD_REFUSED.strip(), path)
    assert result.returncode == 0, result.stderr[-800:]
    assert int(result.stdout) < megabytes


def deflated_zeros(gigabytes=1):
    """That many GiB of zeros as a deflate stream of a megabyte, without making them."""
    compress = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = bytes(1 << 20)
    stream, crc = [], 0
    first = compress.compress(block) + compress.flush(zlib.Z_FULL_FLUSH)
    for _ in range(gigabytes << 10):
        stream.append(first)
        crc = zlib.crc32(block, crc)
    return b"".join([*stream, compress.flush()]), gigabytes << 30, crc


@pytest.mark.sample(1)
@pytest.mark.parametrize("bomb", ["data.pkl", "data/0"])
@pytest.mark.parametrize("kind", ["archive", "state dict"])
def test_a_zip_bomb_is_refused_without_unpacking_it(tmp_path, bomb, kind):
    stream, size, crc = deflated_zeros()
    path = tmp_path / "bomb.pt"
    records = {"data.pkl": stub_module(weight=tensor_code("ByteStorage")), "data/0": bytes(8)}
    if kind == "archive":
        records = {"data.pkl": stub_module(weight=tensor_code(count=1 << 29, size=(1 << 29,), stride=(1,)))}
        records |= {"constants.pkl": b"\x80\x02)."}
    else:
        buffer = io.BytesIO()
        torch.save({"visual.proj": torch.ones(4, 4), "input_resolution": torch.tensor(4)}, buffer)
        with zipfile.ZipFile(buffer) as archive:
            records = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**records, bomb: stream}.items():
            archive.writestr(f"archive/{name}", content)
            if name == bomb:  # only the directory at the end, which is what is read, says what the record really is
                info = archive.filelist[-1]
                info.compress_type, info.file_size, info.CRC = zipfile.ZIP_DEFLATED, size, crc
    assert path.stat().st_size < 4 << 20
    with zipfile.ZipFile(path) as archive, archive.open(f"archive/{bomb}") as record:
        assert record.read(5 << 20) == bytes(5 << 20)
    assert_refused_in_little_memory(path)


def test_a_memo_that_would_fill_the_memory_is_refused(tmp_path):
    description = b"\x80\x02Nr" + struct.pack("<I", 1 << 27) + b"."
    assert_refused_in_little_memory(write_zip(tmp_path / "bomb.pt", {"data.pkl": description}))


@pytest.mark.long
def test_a_tensor_that_repeats_one_number_without_end_is_refused(tmp_path):
    """A view of stride 0 lies inside its record, however large it is."""
    huge = {"size": (1 << 20, 1 << 20), "stride": (0, 0)}
    attributes = {name: tensor_code(**huge) for name in ("visual.proj", "logit_scale")}
    reference = openclip_model(TINY_VIT)
    write_archive(reference, TINY_VIT, tmp_path / "whole.pt")
    tensors = {key: rounded(tensor) for key, tensor in reference.state_dict().items()}
    tensors["logit_scale"] = torch.ones(1, dtype=torch.float16).expand(1 << 40)
    torch.save(tensors, tmp_path / "state.pt")
    assert_refused_in_little_memory(tmp_path / "state.pt")
    records = {"data.pkl": stub_module(**attributes), "data/0": bytes(8)}
    assert_refused_in_little_memory(write_zip(tmp_path / "archive.pt", records))


def test_a_refused_file_does_not_change_how_the_next_one_is_read(tmp_path):
    good = write_archive(openclip_model(TINY_VIT), TINY_VIT, tmp_path / "good.pt")
    expected, before = read_checkpoint(good).tensors, dict(vars(pickles._Stub))
    for target in ("c__torch__.model\nCLIP\n", "ctorch._utils\n_rebuild_tensor_v2\n", "ccollections\nOrderedDict\n"):
        for name in ("__init__", "__setstate__", "__defaults__", "__kwdefaults__", "__dict__"):
            # BUILD with (None, {name: list}) sets an attribute of the class or function itself
            state = b"N}" + text(name) + b"ctorch.jit._pickle\nbuild_intlist\ns\x86b."
            evil = write_zip(tmp_path / "evil.pt", {"data.pkl": b"\x80\x02" + target.encode() + state})
            refused(evil)
    try:
        found = read_checkpoint(good).tensors
        assert dict(vars(pickles._Stub)) == before
    finally:  # else the tests after this one would fail, too
        pickles._Stub.__setstate__ = before["__setstate__"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize(
    "description",
    [
        b"",
        b"\x80\x02.",
        b"\x80\x02N.",
        b"\x80\x02}.",
        b"\x80\x02c__torch__.model\nCLIP\n.",
        b"\x80\x02c__torch__.model\nCLIP\n)\x81.",
        b"\x80\x02c__torch__.model\nCLIP\n)\x81K\x01b.",
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02" + b"(l" * 100_000 + b".",
        b"\x80\x02K\x01Q.",
        b"\x80\x05\x8e" + struct.pack("<Q", 1 << 62) + b".",
        b"cos\nsystem\n(X\x04\x00\x00\x00truetR.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        b"\x80\x04\x8c\x0ccollections\x8c\x14OrderedDict.__init__\x93.",
        b"\x80\x02\x82\x01.",
        random.Random(0).randbytes(500),
    ],
    ids=range(16),
)
def test_a_damaged_description_of_an_archive_is_refused(tmp_path, description):
    refused(write_zip(tmp_path / "bad.pt", {"data.pkl": description, "data/0": bytes(8)}))


def test_a_module_that_holds_itself_is_refused(tmp_path):
    description = b"\x80\x02c__torch__.model\nCLIP\n)\x81q\x00}" + text("self") + b"h\x00sb."
    refused(write_zip(tmp_path / "bad.pt", {"data.pkl": description}))


def test_modules_that_hold_each_other_twice_are_refused_in_time(tmp_path):
    """Thirty modules, each with the next under two names: 2^30 paths."""
    code = b"\x80\x02c__torch__.m\nM\n)\x81q\x00"
    for level in range(30):
        child = b"h" + bytes([level])
        code += (
            b"c__torch__.m\nM\n)\x81q"
            + bytes([level + 1])
            + b"}"
            + text("a")
            + child
            + b"s"
            + text("b")
            + child
            + b"sb"
        )
    path = write_zip(tmp_path / "bad.pt", {"data.pkl": code + b"."})
    command = "signal.alarm(4); load(sys.argv[1], device='cpu')"
    try:
        result = warm.run(
            [sys.executable, "-c", f"import signal, sys; from miniclip.weights.load import load; {command}", path],
            timeout=300,
        )
    finally:
        path.unlink()
    assert "ValueError" in result.stderr, f"ended by {result.returncode}"


@pytest.mark.parametrize("seeds", [range(25), pytest.param(range(25, 600), marks=pytest.mark.long)])
def test_an_archive_with_damaged_bytes_is_read_or_refused_by_name(tmp_path, seeds):
    content, path = archive_bytes(tmp_path / "whole.pt"), tmp_path / "bad.pt"
    for seed in seeds:
        chance = random.Random(seed)
        damaged = bytearray(content)
        # most of the file is tensors, where a flipped bit goes unnoticed: aim at its two ends, too
        for _ in range(chance.choice((1, 4, 60))):
            place = chance.choice(
                (chance.randrange(len(content)), chance.randrange(20_000), -1 - chance.randrange(20_000))
            )
            damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            load(path, device="cpu")
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors", ".ckpt", ""])
def test_a_text_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_text("This is no model.\n" * 20)
    refused(path)


def test_a_text_only_model_of_hugging_faces_is_refused_naming_its_type(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=30, **sizes)).save_pretrained(tmp_path / "bert")
    refused(tmp_path / "bert", "bert")
    refused(tmp_path / "bert" / "model.safetensors", "no image tower", activation="gelu")


@pytest.mark.parametrize(
    ("kind", "config", "says"),
    [
        (SiglipModel, SiglipConfig, "is no CLIP but a SigLIP"),
        (OwlViTModel, OwlViTConfig, "is no CLIP but an OWL-ViT"),
        (CLIPForImageClassification, HFConfig, "is of a CLIPForImageClassification: an image tower and a classifier"),
    ],
)
def test_hugging_faces_other_models_with_an_image_tower_are_refused_by_their_kind(tmp_path, kind, config, says):
    """By what their config.json says in a folder, and else by their tensors."""
    sections = {name: hf_model().config.to_dict()[name] for name in ("text_config", "vision_config")}
    kind(config(**sections)).save_pretrained(tmp_path / "model")
    if kind is CLIPForImageClassification:
        refused(tmp_path / "model", says)
    else:
        refused(tmp_path / "model", f"of type {config.model_type!r}")
        (tmp_path / "model" / "config.json").unlink()
        refused(tmp_path / "model" / "model.safetensors", says, activation="gelu")


@pytest.mark.parametrize("end", [59, 2])
def test_hugging_faces_text_tower_with_its_projection_gives_transformers_numbers(tmp_path, end):
    whole = hf_model(end=end)
    reference = randomised(CLIPTextModelWithProjection(whole.config.text_config), 1).eval()
    reference.save_pretrained(tmp_path / "text")
    model, preprocess = load(tmp_path / "text", device="cpu")
    _, tokens = probe(model.config)
    with torch.no_grad():
        expected = reference(input_ids=tokens).text_embeds
        found = model.encode_text(tokens)
    assert_close(found, expected)
    of_file, _ = load(tmp_path / "text" / "model.safetensors", device="cpu")
    assert torch.equal(of_file.encode_text(tokens), model.encode_text(tokens))
    with pytest.raises(ValueError, match="no image tower"):
        model.encode_image(preprocess(Image.new("RGB", (9, 9)))[None])
    assert load(tmp_path / "text", device="cpu", context_length=9)[0].context_length == 9
    with pytest.raises(ValueError, match="image_size=32: this model has no image tower"):
        load(tmp_path / "text", device="cpu", image_size=32)
    save(model, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "ours", device="cpu")[0].encode_text(tokens), found)


def test_hugging_faces_image_tower_with_its_projection_gives_transformers_numbers(tmp_path):
    reference = randomised(CLIPVisionModelWithProjection(hf_model().config.vision_config), 1).eval()
    reference.save_pretrained(tmp_path / "image")
    model, _ = load(tmp_path / "image", device="cpu")
    images, tokens = probe(model.config)
    with torch.no_grad():
        assert_close(model.encode_image(images), reference(pixel_values=images).image_embeds)
    with pytest.raises(ValueError, match="no text tower"):
        model.encode_text(tokens)
    with pytest.raises(ValueError, match="context_length=9: this model has no text tower"):
        load(tmp_path / "image", device="cpu", context_length=9)
    with pytest.raises(ValueError, match="the image tower alone"):
        convert(tmp_path / "image", tmp_path / "out", "hf")
    assert "same embeddings" in convert(tmp_path / "image", tmp_path / "out", "native")
    assert inspect(tmp_path / "image").problems == ""


def test_hugging_faces_tower_without_its_projection_is_refused_saying_so(tmp_path):
    CLIPTextModel(hf_model().config.text_config).save_pretrained(tmp_path / "text")
    refused(tmp_path / "text", "without its projection", "look for transformers' CLIPTextModelWithProjection of it")


@pytest.mark.parametrize("tower", ["text", "visual"])
@pytest.mark.parametrize("layout", ["openai", "hf"])
def test_the_state_dict_of_one_tower_is_refused(tmp_path, layout, tower):
    if layout == "openai":
        tensors = openclip_model(TINY_VIT).state_dict()
        tensors = {key: t for key, t in tensors.items() if key.startswith("visual.") == (tower == "visual")}
    else:
        prefix = "text_" if tower == "text" else "vi"
        tensors = {key: t for key, t in hf_model().state_dict().items() if key.startswith(prefix)}
    torch.save(tensors, tmp_path / "tower.pt")
    refused(tmp_path / "tower.pt", activation="quick_gelu")


def test_a_missing_a_spare_and_a_misshapen_tensor_are_named(tmp_path):
    tensors = openclip_model(TINY_VIT).state_dict() | {"input_resolution": torch.tensor(24)}
    del tensors["visual.ln_pre.bias"]
    tensors |= {"spare": torch.ones(2), "ln_final.weight": torch.ones(5)}
    torch.save(tensors, tmp_path / "model.pt")
    message = refused(tmp_path / "model.pt", "  visual.ln_pre.bias: ", "  spare: ", "  ln_final.weight: ", "(5,)")
    assert "text." not in message
    del tensors["positional_embedding"]
    torch.save(tensors, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "no tensor positional_embedding")


def test_tensors_that_do_not_fit_are_named_as_hugging_faces_file_names_them(tmp_path):
    hf_model().save_pretrained(tmp_path / "model")
    tensors = dict(hf_model().state_dict())
    lost = [
        "text_model.final_layer_norm.bias",
        "vision_model.encoder.layers.1.mlp.fc2.weight",
        "visual_projection.weight",
    ]
    lost += [f"text_model.encoder.layers.0.self_attn.{part}_proj.bias" for part in "qkv"]
    for name in lost:
        del tensors[name]
    tensors |= {"text_model.extra": torch.ones(2)}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    message = refused(
        tmp_path / "model", "text_model.extra: ", "text_model.encoder.layers.0.self_attn.{q,k,v}_proj.bias"
    )
    named = {line.split()[0].removesuffix(":") for line in message.splitlines()[1:]}
    assert named == {*lost[:3], "text_model.extra", "text_model.encoder.layers.0.self_attn.{q,k,v}_proj.bias"}


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.to(torch.int32),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to("meta"),
    ],
    ids=["whole numbers", "complex", "sparse", "without data"],
)
def test_weights_that_are_no_plain_floating_numbers_are_refused(tmp_path, change):
    tensors = openclip_model(TINY_VIT).state_dict() | {"input_resolution": torch.tensor(24)}
    tensors["visual.proj"] = change(tensors["visual.proj"])
    torch.save(tensors, tmp_path / "model.pt")
    refused(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["config.json", "open_clip_config.json"])
def test_a_configuration_that_is_nested_without_end_is_refused(tmp_path, name):
    if name == "config.json":
        hf_model().save_pretrained(tmp_path / "model")
    else:
        write_openclip_folder(openclip_model(TINY_VIT), TINY_VIT, tmp_path / "model")
    (tmp_path / "model" / name).write_text("[" * 100_000)
    refused(tmp_path / "model")
