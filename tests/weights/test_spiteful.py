"""Files that claim what is not in them are refused with a ValueError, in little time and memory, without a network."""

import json
import re
import struct
import time
import zipfile

import pytest
import torch
from foreign_models import TINY_VIT, openclip_model
from helpers import tiny_clip

from miniclip.config import CLIPConfig, VisionConfig
from miniclip.weights.containers import write_safetensors
from miniclip.weights.facts import inspect
from miniclip.weights.load import load, save
from miniclip.weights.pickles import read_pickle
from miniclip.weights.shapes import Shapes, differences


def changed(folder, section, **values):
    """A sound directory whose configuration claims something else."""
    save(tiny_clip(), folder)
    settings = json.loads((folder / "config.json").read_text())
    (settings[section] if section else settings).update(values)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("number", [10**5, 10**12, 10**30])
@pytest.mark.parametrize("section", ["vision", "text"])
def test_blocks_that_are_not_in_the_file_are_missed_at_once(tmp_path, section, number):
    folder = changed(tmp_path / "model", section, layers=number)
    began = time.process_time()
    with pytest.raises(ValueError, match=r"resblocks\.10\b.*no such tensor(.|\n)*and \d+ more"):
        load(folder, device="cpu")
    assert "more" in inspect(folder).problems
    assert time.process_time() - began < 5


def test_bottlenecks_that_are_not_in_the_file_are_missed_at_once(tmp_path):
    vision = {"kind": "resnet", "image_size": 64, "width": 4, "head_width": 8, "blocks": [1, 10**9, 1, 1]}
    folder = changed(tmp_path / "model", "vision", **vision)
    with pytest.raises(ValueError, match="another architecture"):
        load(folder, device="cpu")


@pytest.mark.long
def test_blocks_that_a_name_alone_claims_are_missed_at_once(tmp_path):
    """One tensor a block; building a model of so many blocks takes a minute."""
    tensors = openclip_model(TINY_VIT).state_dict() | {"input_resolution": torch.tensor(24)}
    tensors |= {f"transformer.resblocks.{index}.ln_1.bias": torch.ones(1) for index in range(2, 100_000)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    began = time.process_time()
    with pytest.raises(ValueError, match="another architecture"):
        load(tmp_path / "model.safetensors", device="cpu")
    assert time.process_time() - began < 20


@pytest.mark.parametrize(
    "section, values",
    [
        ("vision", {"width": 8 * 10**12}),
        ("vision", {"width": 8 * 10**30}),
        ("vision", {"image_size": 8 * 10**12}),
        ("vision", {"mlp_ratio": float("inf")}),
        ("vision", {"mlp_ratio": float("nan")}),
        ("vision", {"mlp_ratio": 1e300}),
        ("vision", {"mean": [float("inf"), 0, 0]}),
        ("vision", {"std": [float("nan"), 1, 1]}),
        ("text", {"width": 8 * 10**18}),
        ("text", {"vocab_size": 10**40}),
        ("text", {"context_length": 10**40}),
        ("text", {"mlp_ratio": float("inf")}),
        (None, {"embed_dim": 10**25}),
        (None, {"embed_dim": 10**400}),
        ("vision", {"kind": "timm", "timm_model": "hf-hub:timm/vit_base_patch16_224"}),
        ("vision", {"kind": "timm", "timm_model": "hf_hub:timm/vit_base_patch16_224"}),
        ("vision", {"kind": "timm", "timm_model": "local-dir:/etc"}),
        ("vision", {"kind": "timm", "timm_model": "../x"}),
        ("vision", {"kind": "timm", "timm_model": "no_such_model"}),
        ("vision", {"kind": "timm", "timm_model": "resnet18.no_such_tag"}),
        ("vision", {"kind": "timm", "timm_model": "vit_base_patch16_224", "timm_pool": "odd"}),
        ("vision", {"kind": "timm", "timm_model": "."}),
        ("vision", {"kind": "timm", "timm_model": ["resnet18"]}),
    ],
    ids=str,
)
def test_sizes_and_names_that_no_model_has_are_value_errors(tmp_path, monkeypatch, section, values):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    folder = changed(tmp_path / "model", section, **values)
    with pytest.raises(ValueError, match=re.escape(str(folder))):
        load(folder, device="cpu")


def test_shapes_are_those_of_the_built_model_for_every_kind():
    vision = VisionConfig(kind="resnet", image_size=64, width=4, head_width=8, blocks=(1, 3, 2, 1))
    timm = VisionConfig(kind="timm", timm_model="resnet10t", image_size=32)
    for tower in (VisionConfig(image_size=16, patch_size=8, width=64, layers=3), vision, timm):
        config = CLIPConfig(vision=tower)
        from miniclip.model import CLIP

        expected = {key: tuple(tensor.shape) for key, tensor in CLIP(config).state_dict().items()}
        shapes = Shapes(config)
        assert {key: shapes.get(key) for key in shapes.names()} == expected
        assert shapes.count() == len(expected)
        assert shapes.get("visual.transformer.resblocks.03.ln_1.bias") is None
        assert differences(config, {key: torch.empty(shape, device="meta") for key, shape in expected.items()}) == []


def test_a_tensor_that_repeats_its_numbers_is_refused(tmp_path):
    """Small in a file of torch.save's, and as large as its shape once it is a parameter."""
    tensors = openclip_model(TINY_VIT).state_dict() | {"input_resolution": torch.tensor(24)}
    tensors["token_embedding.weight"] = torch.ones(1).expand(200_000_000, 128)
    torch.save(tensors, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"token_embedding.*repeats"):
        load(tmp_path / "model.pt", device="cpu")


def test_of_two_directories_in_a_zip_archive_one_is_read_by_all(tmp_path):
    """The records that were checked are those that are read: there is one reader."""
    torch.save({"a.b": torch.arange(4.0)}, tmp_path / "first.pt")
    with zipfile.ZipFile(tmp_path / "second.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    second, first = (tmp_path / "second.pt").read_bytes(), (tmp_path / "first.pt").read_bytes()
    (tmp_path / "both.pt").write_bytes(second + first)  # each has a directory; the last one counts
    assert read_pickle(tmp_path / "both.pt")["a.b"].tolist() == [0, 1, 2, 3]


def test_an_old_file_that_claims_more_numbers_than_it_has_is_refused(tmp_path):
    torch.save({"a.b": torch.arange(4.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "old.pt").read_bytes()
    assert read_pickle(tmp_path / "old.pt")["a.b"].tolist() == [0, 1, 2, 3]
    for cut in range(1, len(content), 37):
        (tmp_path / "cut.pt").write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"cut\.pt"):
            read_pickle(tmp_path / "cut.pt")
    huge = content.replace(b"K\x04N", b"J" + struct.pack("<i", 1 << 30) + b"N", 1)
    assert huge != content
    (tmp_path / "huge.pt").write_bytes(huge)
    with pytest.raises(ValueError, match="larger than the file"):
        read_pickle(tmp_path / "huge.pt")


def test_a_spare_tensor_is_named_whatever_its_name_looks_like(tmp_path):
    save(tiny_clip(), tmp_path)
    tensors = dict(tiny_clip().state_dict())
    for name in (
        "text.transformer.resblocks.-1.ln_1.bias",
        "text.transformer.resblocks.٣.ln_1.bias",
        "visual.layer1.0.x",
    ):
        write_safetensors(tmp_path / "model.safetensors", tensors | {name: torch.ones(2)})
        with pytest.raises(ValueError, match=re.escape(name)):
            load(tmp_path, device="cpu")
