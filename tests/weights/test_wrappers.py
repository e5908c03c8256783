"""Checkpoints as trainers leave them, and files that are none. The oracle is open_clip."""

import argparse
import collections
import json
import pathlib
import re
import resource
import types
import warnings

import numpy as np
import pytest
import torch
from foreign_models import TINY_VIT, assert_close, openclip_model, probe
from safetensors.torch import save_file

from miniclip.weights.load import load
from miniclip.weights.unwrap import unwrap

MODEL, AVERAGE = openclip_model(TINY_VIT, seed=1), openclip_model(TINY_VIT, seed=2)
WEIGHTS, AVERAGED = MODEL.state_dict(), AVERAGE.state_dict()
HINTS = {"activation": "quick_gelu", "head_width": 64}


def prefixed(prefix, tensors=WEIGHTS):
    return {prefix + key: tensor for key, tensor in tensors.items()}


def assert_loads(path, reference=MODEL):
    model, _ = load(path, device="cpu", **HINTS)
    images, tokens = probe(TINY_VIT)
    with torch.no_grad():
        assert_close(model.encode_image(images), reference.encode_image(images))
        assert_close(model.encode_text(tokens), reference.encode_text(tokens))


def refusal(path):
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load(path, device="cpu", **HINTS)
    return str(caught.value)


WRAPPED = {
    "DDP": prefixed("module."),
    "torch.compile": prefixed("_orig_mod."),
    "compile of DDP": {"state_dict": prefixed("_orig_mod.module.")},
    "DDP of compile": {"state_dict": prefixed("module._orig_mod.")},
    "one tower compiled": {key.replace("visual.", "visual._orig_mod."): t for key, t in WEIGHTS.items()},
    "FSDP": {re.sub(r"resblocks\.(\d)\.", r"resblocks.\1._fsdp_wrapped_module.", key): t for key, t in WEIGHTS.items()},
    "checkpointed blocks": {key.replace(".mlp.", "._checkpoint_wrapped_module.mlp."): t for key, t in WEIGHTS.items()},
    "Lightning": {"state_dict": prefixed("model."), "epoch": 1, "pytorch-lightning_version": "2.0"},
    "Lightning, another name": {"state_dict": prefixed("net.clip_model.backbone."), "global_step": 7},
    "DeepSpeed": {"module": WEIGHTS, "dp_world_size": 8, "optimizer": None},
    "net": {"net": WEIGHTS, "acc": 0.7},
    "params": {"params": WEIGHTS},
    "weights in weights": {"checkpoint": {"model": WEIGHTS}},
    "with an optimiser": {"model_state_dict": WEIGHTS, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "parameters": {key: torch.nn.Parameter(tensor) for key, tensor in WEIGHTS.items()},
    "only an average": {"ema": WEIGHTS},
    "optimised": {"optimized_model": WEIGHTS, "optimizer": {"a.b": torch.ones(2)}},
    "optimal": {"model_optimal": WEIGHTS, "optim": {"a.b": torch.ones(2)}},
    "merged by PEFT": prefixed("base_model.model."),
    "average of torch's": {"n_averaged": torch.tensor(4), **prefixed("module.")},
    "a scale of one side": WEIGHTS | {"logit_scale": WEIGHTS["logit_scale"].reshape(1)},
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", "old"])
@pytest.mark.parametrize("name", WRAPPED)
def test_a_model_is_found_in_what_its_trainer_put_around_it(tmp_path, name, suffix):
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        if not all(isinstance(value, torch.Tensor) for value in WRAPPED[name].values()):
            pytest.skip("safetensors holds tensors alone")
        save_file({key: tensor.detach() for key, tensor in WRAPPED[name].items()}, path)
    else:
        torch.save(WRAPPED[name], path, _use_new_zipfile_serialization=suffix != "old")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out
        assert_loads(path)


BESIDE = {
    "Namespace": argparse.Namespace(lr=1e-4, betas=(0.9, 0.98), nested=argparse.Namespace(a=[1])),
    "SimpleNamespace": types.SimpleNamespace(lr=1e-4),
    "NumPy number": np.float64(0.7),
    "NumPy array": np.arange(5),
    "NumPy strings": np.array(["a", "b"]),
    "path": pathlib.Path("x") / "y",
    "defaultdict": collections.defaultdict(list, loss=[1.0]),
    "Counter": collections.Counter("abc"),
    "set": {1, 2},
    "bytes": b"\xff\x00",
    "device": torch.device("cpu"),
    "dtype": torch.float16,
    "size": torch.Size([1, 2]),
    "complex": 1j,
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", BESIDE)
def test_plain_values_beside_the_weights_do_not_matter(tmp_path, name, is_zip):
    torch.save({"state_dict": WEIGHTS, "x": BESIDE[name]}, tmp_path / "c.pt", _use_new_zipfile_serialization=is_zip)
    assert_loads(tmp_path / "c.pt")


class Settings:
    """An object of a training script's own."""


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize(
    "value, name", [(Settings(), "Settings"), (torch.nn.Linear(1, 1), "Linear")], ids=["own", "module"]
)
def test_a_class_that_is_not_on_the_list_is_named_with_what_to_do(tmp_path, value, name, is_zip):
    path = tmp_path / "c.pt"
    torch.save({"state_dict": WEIGHTS, "x": value}, path, _use_new_zipfile_serialization=is_zip)
    message = refusal(path)
    assert re.search(rf"\w\.{name}\b", message)
    assert "state_dict()" in message


@pytest.mark.parametrize(
    "checkpoint, left_out",
    [
        ({"model": WEIGHTS, "model_ema": AVERAGED}, "model_ema"),
        ({"state_dict": WEIGHTS, "state_dict_ema": AVERAGED}, "state_dict_ema"),
        ({"state_dict": WEIGHTS, "best": AVERAGED}, "best"),
        ({"state_dict": prefixed("student.") | prefixed("teacher.", AVERAGED)}, "teacher."),
        (WEIGHTS | prefixed("ema_model.", AVERAGED), "ema_model."),
        ({"state_dict": prefixed("model.") | {"head.weight": torch.ones(2, 2)}}, "head.weight"),
        (
            {"state_dict": prefixed("clip."), "current_model_state": prefixed("clip.", AVERAGED)},
            "the entry 'state_dict' under 'clip.' is loaded, not the entry 'current_model_state'",
        ),
        (prefixed("semantic_clip.") | prefixed("netEMA.", AVERAGED), "netEMA."),
        ({"model": WEIGHTS, "shadow_params": list(AVERAGED.values())}, f"shadow_params ({len(AVERAGED)} tensors)"),
        ({"model": WEIGHTS, "ema": {"decay": 0.99, "shadow_params": [torch.ones(2)]}}, "ema.shadow_params (1 tensor)"),
    ],
    ids=[
        "timm",
        "timm's other",
        "best",
        "student and teacher",
        "beside",
        "head",
        "Lightning's",
        "words",
        "diffusers",
        "torch_ema",
    ],
)
def test_what_is_left_out_is_warned_of_by_name(tmp_path, checkpoint, left_out):
    torch.save(checkpoint, tmp_path / "c.pt")
    with pytest.warns(UserWarning, match=re.escape(left_out)):
        assert_loads(tmp_path / "c.pt")


def test_the_logarithm_of_a_temperature_is_warned_of(tmp_path):
    torch.save(WEIGHTS | {"logit_scale": torch.tensor(0.07).log()}, tmp_path / "c.pt")
    with pytest.warns(UserWarning, match=r"is -2\.65926, so that cosines are multiplied by 0\.07 .*, store 2\.65926"):
        load(tmp_path / "c.pt", device="cpu", **HINTS)


@pytest.mark.parametrize(
    "checkpoint, words",
    [
        ({"first": WEIGHTS, "second": AVERAGED}, ["'first'", "'second'"]),
        (WEIGHTS | {"ln_final.bias": torch.full((128,), torch.nan)}, ["ln_final.bias", "NaN", "earlier checkpoint"]),
        (WEIGHTS | {"logit_scale": torch.tensor(torch.inf)}, ["logit_scale", "infinite", "earlier checkpoint"]),
        (WEIGHTS | {"logit_scale": torch.tensor(100.0)}, ["logit_scale", "is 100", "logarithm", "store 4.60517"]),
        (WEIGHTS | {"logit_scale": torch.tensor([1 / 0.07])}, ["is 14.2857", "store 2.65926"]),
        (prefixed("a.") | prefixed("b.", AVERAGED), ["'a.'", "'b.'"]),
        (WEIGHTS | prefixed("module.", AVERAGED), ["twice", "module.", "wrapper"]),
        (WEIGHTS | {"visual.proj": torch._neg_view(WEIGHTS["visual.proj"])}, ["negative", "resolve_neg"]),
        (
            {key.replace(".weight", ".lora_A.default.weight"): t for key, t in WEIGHTS.items()},
            ["LoRA", "merge_and_unload"],
        ),
        ({key: t for key, t in WEIGHTS.items() if key.startswith("visual.")}, ["no text tower"]),
        ({key.removeprefix("visual."): t for key, t in WEIGHTS.items() if key.startswith("visual.")}, ["image tower"]),
        ({"epoch": 3, "lr": 0.1}, ["epoch", "lr"]),
        ([WEIGHTS], ["a list"]),
        (
            {"module": {key: torch.empty(0) for key in WEIGHTS}, "param_shapes": [{}], "ds_version": "0.14"},
            ["tensors without numbers", "zero_to_fp32.py"],
        ),
    ],
    ids=[
        "two entries",
        "NaN",
        "infinite",
        "a scale itself",
        "a starting scale itself",
        "two prefixes",
        "with and without a wrapper",
        "negative view",
        "LoRA",
        "image tower",
        "image tower's own",
        "no tensors",
        "list",
        "DeepSpeed's ZeRO-3",
    ],
)
def test_what_is_not_one_whole_model_is_refused_saying_what_it_is(tmp_path, checkpoint, words):
    torch.save(checkpoint, tmp_path / "c.pt")
    message = refusal(tmp_path / "c.pt")
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "part, remedy",
    [
        ("lora_A", "merge_and_unload"),
        ("modules_to_save.default.weight", "merge_and_unload"),
        ("parametrizations.weight.original0", "remove_parametrizations"),
        ("weight_g", "remove_weight_norm"),
        ("weight_orig", "prune.remove"),
        ("SCB", "dequantise"),
        ("weight.quant_state.bitsandbytes__nf4", "dequantise"),
        ("_flat_param", "FULL_STATE_DICT"),
        ("weight_scale_inv", "dequantise"),
        ("scale_weight", "dequantise"),
        ("lora_down.weight", "fuse_lora"),
    ],
)
def test_what_is_no_weight_yet_is_named_with_what_makes_weights_of_it(tmp_path, part, remedy):
    name = f"visual.transformer.resblocks.0.mlp.c_fc.{part}"
    torch.save(WEIGHTS | {name: torch.zeros(3)}, tmp_path / "c.pt")
    message = refusal(tmp_path / "c.pt")
    assert name in message
    assert remedy in message


@pytest.mark.parametrize(
    "name, kind",
    [
        ("text_decoder.cross_attn.0.ln_1.bias", "a CoCa"),
        ("positional_embedding_res", "a Long-CLIP"),
        ("text.transformer.encoder.layer.0.output.dense.bias", "a model with a text tower of BERT's kind"),
    ],
)
def test_models_that_are_like_a_clip_are_refused_by_their_kind(tmp_path, name, kind):
    torch.save(WEIGHTS | {name: torch.zeros(3)}, tmp_path / "c.pt")
    assert f"is no CLIP but {kind}" in refusal(tmp_path / "c.pt")


def test_a_quantised_model_is_refused_naming_that(tmp_path):
    quantised = {
        k: torch.quantize_per_tensor(t, 0.01, 0, torch.qint8) if t.ndim == 2 else t for k, t in WEIGHTS.items()
    }
    torch.save(quantised, tmp_path / "c.pt")
    assert "quantised" in refusal(tmp_path / "c.pt")


class Parts(torch.Tensor):
    """As FSDP2's DTensor and torchao's tensors: of a class of their own."""


def test_tensors_of_a_class_of_their_own_are_named_with_what_to_do(tmp_path):
    torch.save({key: tensor.as_subclass(Parts) for key, tensor in WEIGHTS.items()}, tmp_path / "c.pt")
    assert "its tensors are of a class of their own, as FSDP2's DTensor and torchao's" in refusal(tmp_path / "c.pt")


def test_an_adapter_of_peft_is_named_as_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        assert "merge_and_unload" in refusal(path)


STAND_INS = {
    "pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 350000000\n",
    "web page": b"\n <!DOCTYPE html><html><body>Sign in</body></html>",
    "file is empty": b"",
}


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.safetensors", "model.ckpt", "model"])
@pytest.mark.parametrize("what", STAND_INS)
def test_what_stands_in_place_of_a_file_is_named(tmp_path, name, what):
    (tmp_path / name).write_bytes(STAND_INS[what])
    assert what in refusal(tmp_path / name)


@pytest.mark.parametrize("what", STAND_INS)
def test_what_stands_in_place_of_a_configuration_or_its_weights_is_named(tmp_path, what):
    (tmp_path / "config.json").write_bytes(STAND_INS[what])
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    assert what in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(STAND_INS[what])
    assert what in refusal(tmp_path)


def test_a_configuration_in_place_of_weights_is_answered_with_its_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert f"give the model's folder, {tmp_path}" in refusal(tmp_path / "config.json")


def write_openclip_config(folder):
    from foreign_models import openclip_settings

    settings = openclip_settings(TINY_VIT) | {"quick_gelu": True}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))


@pytest.fixture
def both(tmp_path):
    """A folder as LAION's on the hub: two libraries' configurations and weights; the weights of each are other ones."""
    from miniclip.weights.convert import convert

    folder = tmp_path / "both"
    for model, name in ((MODEL, "source.pt"), (AVERAGE, "other.pt")):
        torch.save(model.state_dict() | {"input_resolution": torch.tensor(24)}, tmp_path / name)
    convert(tmp_path / "other.pt", folder, "hf")
    write_openclip_config(folder)
    torch.save(WEIGHTS, folder / "open_clip_pytorch_model.bin")
    return folder


def test_a_folder_of_two_libraries_gives_open_clips_model_and_without_its_weights_the_other(both):
    assert_loads(both)
    names = "open_clip_pytorch_model.bin", "model.safetensors"  # each by the configuration of its own library
    assert [load(both / name, device="cpu")[1].style for name in names] == ["openai", "hf"]
    (both / "open_clip_pytorch_model.bin").unlink()
    assert_loads(both, AVERAGE)


@pytest.mark.parametrize("config", ["config.json", "open_clip_config.json"])
@pytest.mark.parametrize(
    "weights", ["open_clip_pytorch_model.bin", "open_clip_pytorch_model.safetensors", "epoch_32.pt"]
)
def test_either_librarys_configuration_describes_the_one_file_of_weights(both, config, weights):
    for name in ("model.safetensors", "open_clip_pytorch_model.bin", "config.json", "open_clip_config.json"):
        if name != config:
            (both / name).unlink()
    if weights.endswith(".safetensors"):
        save_file(WEIGHTS, both / weights)
    else:
        torch.save(WEIGHTS, both / weights)
    assert_loads(both)


def test_of_several_files_without_a_usual_name_one_has_to_be_chosen(both):
    (both / "model.safetensors").unlink()
    (both / "open_clip_pytorch_model.bin").unlink()
    for name in ("epoch_1.pt", "epoch_2.pt"):
        torch.save(WEIGHTS, both / name)
    message = refusal(both)
    assert "epoch_1.pt" in message
    assert "epoch_2.pt" in message
    assert_loads(both / "epoch_2.pt")


@pytest.mark.parametrize(
    "files, says",
    [
        (
            ["modules.json", "0_CLIPModel/config.json", "0_CLIPModel/model.safetensors", "1_Pooling/config.json"],
            r"\. Models lie below it, in 0_CLIPModel; give the path of",
        ),
        (
            ["text_encoder/config.json", "text_encoder/model.fp16.safetensors", "b/open_clip_config.json", "b/c.pt"],
            r"\. Models lie below it, in b, text_encoder; give the path of",
        ),
        (["latest", "zero_to_fp32.py", "global_step9/mp_rank_00_model_states.pt"], r"`python zero_to_fp32\.py \. OUT`"),
        (["a.txt", "b/config.json"], "has config.json and weights$"),
    ],
    ids=["sentence-transformers", "diffusers", "DeepSpeed", "none"],
)
def test_a_folder_whose_model_lies_elsewhere_says_where(tmp_path, files, says):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert re.search(says, refusal(tmp_path))


def test_tensors_of_another_model_below_a_prefix_stay_out():
    with pytest.warns(UserWarning, match="student"):
        found = unwrap({**prefixed("student."), **prefixed("student.teacher.", AVERAGED)}, "x")
    assert found.keys() == WEIGHTS.keys()
    assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)


def test_a_checkpoint_of_thousands_of_tensors_is_read_where_few_files_may_be_open(tmp_path):
    state = {index: {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)} for index in range(1000)}
    torch.save({"state_dict": WEIGHTS, "optimizer": {"state": state}}, tmp_path / "c.pt")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(list(pathlib.Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 200, limit[1]))
    try:
        assert_loads(tmp_path / "c.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("flax_model.msgpack", r"from_flax=True\)\.save_pretrained"),
        ("tf_model.h5", r"from_tf=True\)\.save_pretrained"),
        ("model.onnx", "the model that it was made from"),
    ],
)
def test_weights_of_other_frameworks_are_named_with_what_to_do(tmp_path, name, remedy):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / name).write_bytes(b"\x08\x01")
    for what in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.*{re.escape(name)} is not read.*{remedy}"):
            load(what)


@pytest.mark.parametrize(
    ("name", "write"), [("renamed.pt", save_file), ("renamed.ckpt", save_file), ("renamed.safetensors", torch.save)]
)
def test_a_file_is_read_as_what_it_holds_whatever_its_suffix_says(tmp_path, name, write):
    write({key: tensor.contiguous() for key, tensor in WEIGHTS.items()}, tmp_path / name)
    assert_loads(tmp_path / name)
