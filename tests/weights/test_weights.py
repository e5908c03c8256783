# weights.py and files.py: real files, good and damaged. Nothing in a file may be run.

import copy
import dataclasses
import functools
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import zipfile

import accelerate.hooks
import foreign_models
import peft
import pytest
import torch
from foreign_models import TINY, assert_close, probe
from helpers import picture, tiny_clip, tiny_config
from torch.nn.utils import prune

from miniclip import openai, openclip_model
from miniclip.common.files import write_text
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.model import CLIP
from miniclip.training.recompute import drop_patches_in_training, recompute_blocks
from miniclip.weights.containers import write_safetensors
from miniclip.weights.convert import convert
from miniclip.weights.folders import CONFIG_FILE, WEIGHTS_FILE
from miniclip.weights.layouts import from_openai_keys
from miniclip.weights.load import load, save
from miniclip.weights.read import LIGHTNING_CONFIG_KEY

ODD = CLIPConfig(
    embed_dim=6,
    activation="gelu",
    vision=VisionConfig(
        image_size=12, patch_size=4, width=8, layers=1, head_width=4, mean=(0.1, 0.2, 0.3), std=(0.4, 1, 2)
    ),
    text=TextConfig(context_length=9, vocab_size=30, eot_token=29, width=12, layers=2, head_width=6, mlp_ratio=2.5),
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CLIP(ODD)


@pytest.fixture
def saved(model, tmp_path):
    save(model, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def checkpoint(model, tmp_path):
    """As the trainer writes them, with more beside the model."""
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, model)
    return path


def write_checkpoint(path, model, **changes):
    tensors = {f"clip.{key}": tensor for key, tensor in model.state_dict().items()}
    entries = {LIGHTNING_CONFIG_KEY: model.config.to_json(), "state_dict": {**tensors, "other.weight": torch.ones(2)}}
    torch.save({**entries, "epoch": 3, **changes}, path)


def assert_same_weights(model, expected):
    ours, theirs = model.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, theirs[name].float()), name


def refused(path, *words):
    """load() raises a ValueError that names the path and all the words."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load(path, device="cpu")
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    return str(caught.value)


# ---- there and back


def test_loading_what_was_saved_gives_every_bit_and_the_configuration_back(model, saved):
    loaded, _ = load(saved, device="cpu")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


def test_the_path_may_be_a_string(model, saved):
    assert_same_weights(load(str(saved), device="cpu")[0], model)


def test_a_trainers_checkpoint_gives_the_model_in_it(model, checkpoint):
    loaded, preprocess = load(checkpoint, device="cpu")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert preprocess.image_size == 12


@pytest.mark.parametrize("source", ["saved", "checkpoint"])
def test_a_loaded_model_is_float32_in_evaluation_mode_and_trainable(source, request):
    loaded, _ = load(request.getfixturevalue(source), device="cpu")
    assert not any(module.training for module in loaded.modules())
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_precision_is_loaded_as_float32(model, tmp_path, dtype):
    save(model.to(dtype), tmp_path / "model")
    assert_same_weights(load(tmp_path / "model", device="cpu")[0], model)


def test_preprocess_has_the_resolution_mean_and_deviation_of_the_model(saved):
    _, preprocess = load(saved, device="cpu")
    assert (preprocess.image_size, preprocess.mean, preprocess.std) == (12, (0.1, 0.2, 0.3), (0.4, 1, 2))
    white = picture(size=(20, 30)).point(lambda _: 255)
    expected = torch.tensor([0.9 / 0.4, 0.8 / 1, 0.7 / 2]).view(3, 1, 1).expand(3, 12, 12)
    torch.testing.assert_close(preprocess(white), expected)


def test_a_loaded_model_gives_the_same_features(model, saved):
    loaded, preprocess = load(saved, device="cpu")
    images, tokens = preprocess(picture())[None], torch.tensor([[1, 2, 29]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_image(images), model.encode_image(images))
        torch.testing.assert_close(loaded.encode_text(tokens), model.encode_text(tokens))


def test_the_weights_file_is_plain_safetensors_with_the_models_names(model, saved):
    header = (saved / WEIGHTS_FILE).read_bytes()
    entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert entries.keys() - {"__metadata__"} == model.state_dict().keys()
    assert json.loads((saved / CONFIG_FILE).read_text()) == model.config.to_dict()
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]


@pytest.mark.parametrize("source", ["saved", "checkpoint"])
def test_changing_a_loaded_model_does_not_change_its_file(model, source, request):
    path = request.getfixturevalue(source)
    loaded, _ = load(path, device="cpu")
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert_same_weights(load(path, device="cpu")[0], model)


def test_a_loaded_model_outlives_the_replacement_of_its_file(model, saved):
    loaded, _ = load(saved, device="cpu")
    torch.manual_seed(1)
    save(CLIP(ODD), saved, overwrite=True)
    assert_same_weights(loaded, model)


# ---- nothing is overwritten unasked


def test_a_model_is_not_overwritten_unasked(model, saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ValueError, match=re.escape(str(saved)) + ".*overwrite=True"):
        save(tiny_clip(), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_model_is_overwritten_when_asked(saved):
    other = tiny_clip(seed=1)
    save(other, saved, overwrite=True)
    loaded, _ = load(saved, device="cpu")
    assert loaded.config == other.config
    assert_same_weights(loaded, other)


def test_a_config_file_without_weights_is_not_overwritten_unasked(model, tmp_path):
    (tmp_path / CONFIG_FILE).write_text("somebody's own")
    with pytest.raises(ValueError, match="overwrite=True"):
        save(model, tmp_path)
    assert (tmp_path / CONFIG_FILE).read_text() == "somebody's own"


@pytest.mark.parametrize("beside", [None, "native", "hf"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_would_be_loaded_as_open_clips_model_is_left_as_it_is(model, tmp_path, beside, overwrite):
    """`load` prefers open_clip's pair, with or without ours beside it."""
    save(tiny_clip(), tmp_path / "other")
    convert(tmp_path / "other", tmp_path / "model", "openclip")
    if beside is not None:
        convert(tmp_path / "other", tmp_path / "beside", beside)
        shutil.copytree(tmp_path / "beside", tmp_path / "model", dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(ValueError, match=r"model holds open_clip_config\.json, so what is loaded .* another place"):
        save(model, tmp_path / "model", overwrite)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


@pytest.mark.parametrize("name", ["adapter_config.json", "open_clip_config.json"])
def test_beside_a_file_that_load_goes_by_nothing_is_saved(model, tmp_path, name):
    (tmp_path / name).write_text("another's")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} holds {name}, so what is loaded from there would be")):
        save(model, tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "name",
    [
        CONFIG_FILE,
        WEIGHTS_FILE,
        "adapter_model.safetensors",
        "epoch_5.pt",
        "flax_model.msgpack",
        "last.ckpt",
        "model.onnx",
        "model.safetensors.index.json",
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.bin",
        "preprocessor_config.json",
        "pytorch_model.bin",
        "wordings.json",
    ],
)
def test_beside_any_other_file_what_was_saved_is_what_is_loaded(model, tmp_path, name):
    (tmp_path / name).write_text("another's")
    save(model, tmp_path, overwrite=True)
    for path in (tmp_path, tmp_path / WEIGHTS_FILE):
        loaded, _ = load(path, device="cpu")
        assert loaded.config == model.config
        assert_same_weights(loaded, model)


# ---- what is saved is what its configuration describes


@pytest.mark.parametrize("part", ["whole", "visual", "text"])
def test_a_compiled_model_is_saved_by_its_own_names(model, tmp_path, part):
    if part == "whole":
        compiled = torch.compile(model)
    else:
        compiled = model
        setattr(model, part, torch.compile(getattr(model, part)))
    assert any("_orig_mod" in name for name in compiled.state_dict())
    save(compiled, tmp_path / "model")
    torch.manual_seed(0)
    assert_same_weights(load(tmp_path / "model", device="cpu")[0], CLIP(ODD))


def lora(model):
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["c_fc"]))


def pruned(model):
    prune.l1_unstructured(model.visual.transformer.resblocks[0].mlp.c_fc, "weight", 0.5)
    return model


def without_projection(model):
    model.visual.proj = None
    return model


def with_more_tokens(model):
    model.text.token_embedding = torch.nn.Embedding(32, 12)
    return model


def with_a_head(model):
    model.head = torch.nn.Linear(6, 2)
    return model


def diverged(model):
    model.visual.proj.data[0, 0] = torch.nan
    return model


def with_the_scale_itself(model):
    model.logit_scale.data.fill_(100)
    return model


def offloaded(model):
    return accelerate.cpu_offload(model, execution_device="cpu")


class Parts(torch.Tensor):
    """As FSDP2's DTensor and torchao's tensors: of a class of their own."""


def in_parts(model):
    model.visual.proj = torch.nn.Parameter(model.visual.proj.data.as_subclass(Parts))
    return model


UNREADABLE = {
    offloaded: ["logit_scale of the model is on the meta device", "remove_hook_from_module(model, recurse=True)"],
    in_parts: ["visual.proj of the model is a Parts, and `load` reads plain tensors", "full_tensor()"],
    lora: ["adapters of PEFT's", "base_layer", "call merge_and_unload()", "save what comes of it"],
    pruned: ["pruned weights", "weight_orig", "call prune.remove"],
    without_projection: ["visual.proj: the architecture has (8, 6), the model no such tensor", "torch.save"],
    with_more_tokens: ["token_embedding.weight: the architecture has (30, 12), the model (32, 12)", "model.config"],
    with_a_head: ["head.weight: the architecture has no such tensor, the model (2, 6)", "torch.save"],
    diverged: ["visual.proj", "NaN", "earlier state"],
    with_the_scale_itself: ["logit_scale of the model is 100", "store 4.60517"],
}


@pytest.mark.parametrize("change", UNREADABLE, ids=lambda change: change.__name__)
def test_a_model_that_could_not_be_read_back_is_refused_and_the_good_one_stays(model, saved, change):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(ValueError, match=r"the model") as caught:
        save(change(model), saved, overwrite=True)
    for word in UNREADABLE[change]:
        assert word in str(caught.value), caught.value
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def blocks(model):
    return [block for tower in (model.visual, model.text) for block in tower.transformer.resblocks]


def with_gelu(model):
    for block in blocks(model):
        block.mlp.activation = torch.nn.GELU()


def with_tanh(model):
    model.config = dataclasses.replace(model.config, activation="gelu")
    with_gelu(model)
    blocks(model)[0].mlp.activation.approximate = "tanh"


def without_causality(model):
    for block in model.text.transformer.resblocks:
        block.attn.is_causal = False


def with_other_heads(model):
    blocks(model)[0].attn.heads *= 2


def with_another_eps(model):
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6


def with_another_forward(model):
    forward = model.text.forward
    model.text.forward = lambda *inputs, **options: 2 * forward(*inputs, **options)


def with_a_wrapped_method(model):
    encode = model.encode_image
    model.encode_image = functools.wraps(encode)(lambda *inputs, **options: 2 * encode(*inputs, **options))


def with_another_class(model):
    class Doubled(CLIP):
        def encode_image(self, images, normalize=False):
            return 2 * super().encode_image(images, normalize)

    model.__class__ = Doubled


OTHERWISE = {
    with_gelu: r"blocks\.0\.mlp\.activation is GELU\(approximate='none'\), and QuickGELU\(\) by the config",
    with_tanh: r"resblocks\.0\.mlp\.activation\.approximate is 'tanh', and 'none' by the config",
    without_causality: r"text\.transformer\.resblocks\.1\.attn\.is_causal is False, and True by the config",
    with_other_heads: r"visual\.transformer\.resblocks\.0\.attn\.heads is 4, and 2 by the config",
    with_another_eps: r"visual\.ln_pre\.eps is 1e-06, and 1e-05 by the config",
    with_another_forward: r"text\.forward is .*lambda.*, and its class's by the config",
    with_a_wrapped_method: r"  encode_image is .*, and its class's by the config",
    with_another_class: "the model is Doubled, and CLIP by the config",
}


@pytest.mark.parametrize("change", OTHERWISE, ids=lambda change: change.__name__)
def test_a_model_that_computes_otherwise_than_its_config_says_is_refused(tmp_path, change):
    model = CLIP(TINY["vit"]).eval()
    change(model)
    with pytest.raises(ValueError, match=r"computes something else than its config describes") as caught:
        save(model, tmp_path / "model")
    assert re.search(OTHERWISE[change], str(caught.value)), caught.value
    assert not (tmp_path / "model").exists()


def test_another_activation_is_saved_once_the_configuration_has_it(tmp_path):
    model = CLIP(TINY["vit"]).eval()
    with_gelu(model)
    model.config = dataclasses.replace(model.config, activation="gelu")
    save(model, tmp_path / "model")
    images, tokens = probe(model.config)
    loaded, _ = load(tmp_path / "model", device="cpu")
    assert torch.equal(loaded.encode_image(images), model.encode_image(images))
    assert torch.equal(loaded.encode_text(tokens), model.encode_text(tokens))


@pytest.mark.parametrize("what", ["gelu", "mask"])
def test_a_model_of_our_open_clip_that_computes_otherwise_is_refused(tmp_path, what):
    model = openclip_model.CLIP.of(TINY["vit"])
    if what == "mask":
        model.attn_mask.zero_()
    else:
        model.transformer.resblocks[0].mlp.gelu = torch.nn.GELU()
    names = {"gelu": r"transformer\.resblocks\.0\.mlp\.gelu is GELU", "mask": "  attn_mask holds other numbers"}
    with pytest.raises(ValueError, match=names[what]):
        save(model, tmp_path / "model")


def subclassed(model):
    class Named(CLIP):
        nickname = "owl"

    model.__class__ = Named


def with_dropout(model):
    for block in blocks(model):
        block.mlp.activation = torch.nn.Sequential(block.mlp.activation, torch.nn.Dropout(0.5))


def recomputing(model):
    recompute_blocks(model)
    drop_patches_in_training(model, 0.5)


def over_its_own_method(model):
    forward, lock = model.text.forward, threading.Lock()  # a lock can't be copied

    def locked(*inputs, **options):
        with lock:
            return forward(*inputs, **options)

    model.text.forward = locked


def compiled(model):
    model.visual.compile(backend="eager")
    model.text_length_multiple = 8


def in_half_precision(model):
    model.half()


HARMLESS = [subclassed, with_dropout, recomputing, over_its_own_method, compiled, in_half_precision]


@pytest.mark.parametrize("change", HARMLESS, ids=lambda change: change.__name__)
def test_what_changes_no_feature_keeps_no_model_from_being_saved(tmp_path, change):
    model = CLIP(TINY["vit"]).train()
    expected, state = CLIP(TINY["vit"]), torch.random.get_rng_state()
    change(model)
    expected.load_state_dict(model.state_dict())
    save(model, tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert_same_weights(load(tmp_path / "model", device="cpu")[0], expected)


def test_hooks_see_nothing_of_a_save_and_are_not_saved(tmp_path):
    model, seen = CLIP(TINY["vit"]).eval(), []
    loaded_as = CLIP(TINY["vit"]).eval()
    loaded_as.load_state_dict(model.state_dict())
    over_its_own_method(model)  # so that features are compared
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.visual.register_forward_hook(lambda module, inputs, output: 2 * output)
    save(model, tmp_path / "model")
    assert not seen
    images, _ = probe(model.config)
    expected = loaded_as.encode_image(images)
    assert_close(model.encode_image(images), 2 * expected)  # it has its hooks again
    assert seen
    assert_close(load(tmp_path / "model", device="cpu")[0].encode_image(images), expected)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_comparison_takes_no_copy_of_the_weights(tmp_path, kind, monkeypatch):
    model = CLIP(TINY[kind]).train()
    over_its_own_method(model)
    there = {tensor.data_ptr() for tensor in model.state_dict().values()}
    seen = []
    encode = CLIP.encode_image

    def seen_encode(self, images, normalize=False):
        seen.append({tensor.data_ptr() for tensor in self.state_dict().values()} == there and not self.training)
        return encode(self, images, normalize)

    monkeypatch.setattr(CLIP, "encode_image", seen_encode)
    save(model, tmp_path / "model")
    assert seen == [True, True]  # the model and the one of its configuration


def that_fails(model):
    def fails(*inputs, **options):
        raise RuntimeError("a file is closed")

    model.text.forward = fails


def with_gelu_in_half(model):
    with_gelu(model)
    model.bfloat16()


NOT_COMPARED = {
    that_fails: r"\(RuntimeError: a file is closed\)\. These parts differ:\n  text\.forward is ",
    with_gelu_in_half: r"which rounding to torch\.bfloat16 may explain\)\. These parts differ:\n  .*activation is GELU",
}


@pytest.mark.parametrize("change", NOT_COMPARED, ids=lambda change: change.__name__)
def test_a_model_that_can_not_be_compared_is_saved_with_a_warning(tmp_path, change):
    model = CLIP(TINY["vit"]).train()
    change(model)
    with pytest.warns(UserWarning, match=NOT_COMPARED[change]):
        save(model, tmp_path / "model")
    assert model.training
    assert_same_weights(load(tmp_path / "model", device="cpu")[0], model.float())


def test_of_weights_that_are_not_finite_that_is_said_and_nothing_else(tmp_path):
    model = CLIP(TINY["vit"])
    with_gelu(model)
    model.logit_scale.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="logit_scale of the model holds infinite numbers or NaN"):
        save(model, tmp_path / "model")


def test_more_tokens_are_saved_once_the_configuration_has_them(model, tmp_path):
    model = with_more_tokens(model)
    model.config = dataclasses.replace(model.config, text=dataclasses.replace(model.config.text, vocab_size=32))
    save(model, tmp_path / "model")
    assert_same_weights(load(tmp_path / "model", device="cpu")[0], model)


def test_what_accelerate_keeps_elsewhere_is_saved_once_it_is_back(model, tmp_path):
    expected = copy.deepcopy(model)
    accelerate.hooks.remove_hook_from_module(offloaded(model), recurse=True)
    save(model, tmp_path / "model")
    assert_same_weights(load(tmp_path / "model", device="cpu")[0], expected)


@torch.no_grad()
def test_tensors_that_share_memory_are_saved_each(tmp_path):
    """Tied ones, and the parts of one vector."""
    model = CLIP(TINY["vit"])
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector, model.parameters())
    model.text.ln_final.weight = model.text.transformer.resblocks[0].ln_1.weight
    model.visual.ln_post.bias.data = model.visual.ln_pre.bias.data[:]
    save(model, tmp_path / "model")
    assert_same_weights(load(tmp_path / "model", device="cpu")[0], model)


def test_adapters_are_saved_once_they_are_merged(model, tmp_path):
    merged = lora(model).merge_and_unload()
    save(merged, tmp_path / "model")
    assert_same_weights(load(tmp_path / "model", device="cpu")[0], merged)


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_model_of_our_open_clip_is_saved_as_ours(tmp_path, kind):
    theirs = openclip_model.CLIP.of(TINY[kind]).eval()
    save(theirs, tmp_path / "model")
    ours, _ = load(tmp_path / "model", device="cpu")
    assert ours.config == TINY[kind]
    images, tokens = probe(TINY[kind])
    with torch.no_grad():
        assert_close(ours.encode_image(images), theirs.encode_image(images))
        assert_close(ours.encode_text(tokens), theirs.encode_text(tokens))


@pytest.mark.parametrize("other", [torch.nn.Linear(2, 2), {"a": 1}, None], ids=repr)
def test_what_is_no_clip_is_refused_with_what_keeps_it(tmp_path, other):
    with pytest.raises(ValueError, match=r"must be a CLIP, as `miniclip\.load` returns it first\. torch\.save keeps"):
        save(other, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_clip_that_another_module_holds_is_named(model, tmp_path):
    with pytest.raises(
        ValueError, match=r"a DataParallel of torch\.\S+, which holds a CLIP as its \.module; save that"
    ):
        save(torch.nn.DataParallel(model), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_of_our_openai_module_comes_back_by_its_state_dict(tmp_path):
    clip = openai.build_model(foreign_models.openclip_model(TINY["vit"]).half().state_dict()).float()
    with pytest.raises(ValueError, match=r"model is a CLIP of miniclip\.openai; .* torch\.save keeps the state_dict"):
        save(clip, tmp_path / "model")
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    loaded, _ = load(tmp_path / "clip.pt", device="cpu", activation="quick_gelu", head_width=64)
    images, tokens = probe(TINY["vit"])
    with torch.no_grad():
        assert_close(loaded.encode_image(images), clip.encode_image(images))
        assert_close(loaded.encode_text(tokens), clip.encode_text(tokens))


def test_saving_makes_the_directories_it_needs(model, tmp_path):
    save(model, tmp_path / "a" / "b" / "c")
    assert_same_weights(load(tmp_path / "a" / "b" / "c", device="cpu")[0], model)


# ---- what is refused


def test_a_path_where_nothing_is_is_refused(tmp_path):
    refused(tmp_path / "nosuch", "no checkpoint")


@pytest.mark.parametrize("missing", [[CONFIG_FILE], [WEIGHTS_FILE], [CONFIG_FILE, WEIGHTS_FILE]])
def test_a_directory_without_one_of_its_files_is_refused_naming_it(saved, missing):
    for name in missing:
        (saved / name).unlink()
    message = refused(saved)
    assert any(name in message for name in missing)


def test_jit_is_ignored_with_a_warning(saved):
    with pytest.warns(UserWarning, match="jit=True is ignored"):
        load(saved, jit=True)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.5, -1])
def test_truncated_weights_are_refused(saved, kept):
    whole = (saved / WEIGHTS_FILE).read_bytes()
    (saved / WEIGHTS_FILE).write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    refused(saved, WEIGHTS_FILE, "damaged")


def test_the_folder_of_a_run_is_refused_with_the_place_of_its_model(saved, tmp_path):
    run = tmp_path / "a run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "last.ckpt").touch()
    refused(run, "whose model is", str(run / "checkpoints" / "last.ckpt"))
    saved.rename(run / "best")
    refused(run, "whose model is", str(run / "best"))


def test_a_misspelt_path_is_refused_with_what_is_there(saved):
    refused(saved.with_name(f"{saved.name}t"), f"did you mean {saved}?")


def test_weights_that_are_no_safetensors_are_refused(saved):
    (saved / WEIGHTS_FILE).write_text("<!DOCTYPE html><title>404 Not Found</title>" * 20)
    refused(saved, WEIGHTS_FILE, "no safetensors")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (json.dumps({**ODD.to_dict(), "embed_dims": 6}).encode(), "'embed_dims'"),
        (json.dumps({**ODD.to_dict(), "embed_dim": 0}).encode(), "embed_dim"),
        (b"[]", "mapping"),
        (b"\xff\xfe{}", ""),
    ],
    ids=["empty", "cut off", "unknown key", "bad value", "list", "not UTF-8"],
)
def test_a_bad_configuration_is_refused_naming_its_file(saved, content, words):
    (saved / CONFIG_FILE).write_bytes(content)
    refused(saved, str(saved / CONFIG_FILE), words)


def test_a_configuration_of_another_architecture_is_refused_listing_both_shapes(saved):
    write_text(saved / CONFIG_FILE, dataclasses.replace(ODD, embed_dim=7).to_json())
    lines = refused(saved, "another architecture").splitlines()[1:]
    assert lines == [
        "  text.text_projection: the architecture has (12, 7), the file (12, 6)",
        "  visual.proj: the architecture has (8, 7), the file (8, 6)",
    ]


def test_the_list_of_differences_is_cut_and_counted(saved):
    write_text(saved / CONFIG_FILE, tiny_config().to_json())
    lines = refused(saved).splitlines()[1:]
    assert len(lines) == 11
    assert re.fullmatch(r"  and \d+ more", lines[-1])


def test_a_missing_tensor_is_refused_by_name(model, saved):
    tensors = model.state_dict()
    del tensors["visual.proj"]
    write_safetensors(saved / WEIGHTS_FILE, tensors)
    assert "\n  visual.proj: the architecture has (8, 6), the file no such tensor" in refused(saved)


def test_an_extra_tensor_is_refused_by_name(model, saved):
    write_safetensors(saved / WEIGHTS_FILE, {**model.state_dict(), "visual.extra": torch.ones(2)})
    assert "\n  visual.extra: the architecture has no such tensor, the file (2,)" in refused(saved)


# ---- checkpoints that are none, or worse


class Malicious:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def as_zip_archive(entry, path):
    torch.save({LIGHTNING_CONFIG_KEY: "{}", "state_dict": {}, "payload": entry}, path)


def as_old_torch_file(entry, path):
    torch.save({LIGHTNING_CONFIG_KEY: "{}", "payload": entry}, path, _use_new_zipfile_serialization=False)


def as_plain_pickle(entry, path):
    path.write_bytes(pickle.dumps({LIGHTNING_CONFIG_KEY: "{}", "payload": entry}))


WRITERS = [as_zip_archive, as_old_torch_file, as_plain_pickle]


@pytest.mark.parametrize("write", WRITERS)
def test_a_checkpoint_that_asks_for_code_to_be_run_is_refused_and_nothing_runs(tmp_path, write):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "code-was-run"
    write(Malicious(f"touch {trace}"), path)
    message = refused(path)
    assert not trace.exists()
    assert "weights_only" not in message, "torch's advice to run the file's code must not be passed on"


@pytest.mark.parametrize("write", WRITERS)
def test_the_malicious_checkpoints_would_run_code_elsewhere(tmp_path, write):
    """Else the test above would prove nothing."""
    path, trace = tmp_path / "evil.ckpt", tmp_path / "code-was-run"
    write(Malicious(f"touch {trace}"), path)
    if write is as_plain_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.exists()


def test_a_malicious_file_named_as_safetensors_is_refused_and_nothing_runs(saved, tmp_path):
    trace = tmp_path / "code-was-run"
    as_plain_pickle(Malicious(f"touch {trace}"), saved / WEIGHTS_FILE)
    refused(saved, WEIGHTS_FILE)
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"PK\3\4", b"hello world\n", random.Random(0).randbytes(5000)],
    ids=lambda content: len(content),
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    refused(path, "is damaged: it is a zip archive of 4 bytes" if content[:2] == b"PK" else "is not a checkpoint")


def test_a_zip_archive_of_something_else_is_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README.txt", "hello")
    refused(path, "is not a checkpoint")


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.ones(3), {"epoch": 1}], ids=str)
def test_a_checkpoint_of_another_program_is_refused(tmp_path, content):
    path = tmp_path / "last.ckpt"
    torch.save(content, path)
    refused(path)


@pytest.mark.parametrize(
    "changes",
    [
        {LIGHTNING_CONFIG_KEY: "{"},
        {LIGHTNING_CONFIG_KEY: 3},
        {LIGHTNING_CONFIG_KEY: '{"embed_dims": 6}'},
        {"state_dict": {}},
        {"state_dict": None},
    ],
    ids=str,
)
def test_a_checkpoint_with_a_bad_entry_is_refused(tmp_path, model, changes):
    path = tmp_path / "last.ckpt"
    write_checkpoint(path, model, **changes)
    refused(path)


def test_a_checkpoint_without_a_state_dict_is_refused(tmp_path, model):
    path = tmp_path / "last.ckpt"
    torch.save({LIGHTNING_CONFIG_KEY: model.config.to_json()}, path)
    refused(path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_checkpoint_that_was_cut_off_is_refused(checkpoint, kept):
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(kept * len(whole))])
    refused(checkpoint, f"is damaged: it is a zip archive of {int(kept * len(whole)):,} bytes")


def damage(data, seed, first, last):
    """A few bytes between the two places drawn anew; sometimes the end cut off."""
    drawn, damaged = random.Random(seed), bytearray(data)
    for _ in range(drawn.randint(1, 3)):
        damaged[drawn.randrange(first, last)] = drawn.randrange(256)
    return bytes(damaged[: drawn.randrange(len(damaged))] if drawn.random() < 0.1 else damaged)


def loads_or_is_refused(path, named):
    """Damage may be harmless; it must not surface as any other error."""
    try:
        load(path, device="cpu")
    except ValueError as error:
        return str(named) in str(error)
    return True


def damaged_checkpoints_that_escape(checkpoint, seeds):
    whole = checkpoint.read_bytes()
    with zipfile.ZipFile(checkpoint) as archive:
        first = whole.index(archive.read("last/data.pkl"))
        last = first + archive.getinfo("last/data.pkl").file_size
    for seed in seeds:
        checkpoint.write_bytes(damage(whole, seed, first, last))
        try:
            good = loads_or_is_refused(checkpoint, checkpoint)
        except Exception as error:
            yield seed, repr(error)
        else:
            if not good:
                yield seed, "the error does not name the file"


@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(150, 3000), marks=pytest.mark.long)], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_checkpoint_is_refused_by_name_and_never_crashes(checkpoint, seeds):
    escaped = list(damaged_checkpoints_that_escape(checkpoint, seeds))
    assert not escaped, f"{len(escaped)} of {len(seeds)}, the first: {escaped[:5]}"


@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(150, 3000), marks=pytest.mark.long)], ids=str)
def test_a_damaged_safetensors_header_is_refused_by_name_and_never_crashes(saved, seeds):
    whole = (saved / WEIGHTS_FILE).read_bytes()
    escaped = []
    for seed in seeds:
        (saved / WEIGHTS_FILE).write_bytes(damage(whole, seed, 0, 8 + int.from_bytes(whole[:8], "little")))
        try:
            if not loads_or_is_refused(saved, saved):
                escaped.append((seed, "the error does not name the file"))
        except Exception as error:
            escaped.append((seed, repr(error)))
    assert not escaped, f"{len(escaped)} of {len(seeds)}, the first: {escaped[:5]}"


# ---- OpenAI's names


def test_openais_names_become_ours_and_its_bookkeeping_entries_are_dropped():
    names = [
        "visual.proj",
        "logit_scale",
        "token_embedding.weight",
        "transformer.resblocks.0.ln_1.bias",
        "ln_final.bias",
    ]
    theirs = {name: torch.full((1,), float(i)) for i, name in enumerate(names)}
    bookkeeping = dict.fromkeys(["input_resolution", "context_length", "vocab_size"], torch.tensor(1))
    ours = from_openai_keys({**theirs, **bookkeeping})
    assert list(ours) == ["visual.proj", "logit_scale", *(f"text.{name}" for name in names[2:])]
    assert [int(tensor) for tensor in ours.values()] == [0, 1, 2, 3, 4]


def test_loading_imports_no_compiler(tmp_path):
    """torch's takes a second and 200 MB; a random number drawn on the device "meta" is enough to bring it in."""
    save(tiny_clip(), tmp_path)
    code = "import sys, miniclip; miniclip.load(sys.argv[1], device='cpu'); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
