"""Traced and exported models give the right numbers for other batches and lengths than the example's."""

import warnings
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from test_model import TINY, random_images, random_tokens, randomise
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from miniclip import openai, openclip_model
from miniclip.config import VisionConfig
from miniclip.model import CLIP

CONFIGS = {
    "vit": TINY,
    "quick_gelu": replace(TINY, activation="quick_gelu"),
    "resnet": replace(
        TINY, vision=VisionConfig(kind="resnet", image_size=64, width=4, blocks=(1, 2, 1, 1), head_width=16)
    ),
    "timm": replace(TINY, vision=VisionConfig(kind="timm", image_size=32, timm_model="resnet10t")),
}
LENGTHS = [5, 1, 9, 12, 2]
BATCH, LENGTH = torch.export.Dim("batch"), torch.export.Dim("length", max=77)


class Part(nn.Module):
    """A method of CLIP's as a module, which is what exporters take."""

    def __init__(self, clip, method):
        super().__init__()
        self.clip, self.method = clip, method
        self.eval()

    def forward(self, *inputs):
        return getattr(self.clip, self.method)(*inputs)

    def inputs(self, number, columns):
        images = random_images(number, self.clip.visual.input_resolution).float()
        tokens = random_tokens(LENGTHS[:number], columns)
        return {"encode_image": (images,), "encode_text": (tokens,), "forward": (images, tokens)}[self.method]

    def dimensions(self, batch, length):
        """What varies, per input."""
        images, tokens = {0: batch}, {0: batch, 1: length}
        return {"encode_image": (images,), "encode_text": (tokens,), "forward": (images, tokens)}[self.method]


def trace(part, example, folder):
    return torch.jit.trace(part, example, check_trace=False)


def export(part, example, folder):
    return torch.export.export(part, example, dynamic_shapes=(part.dimensions(BATCH, LENGTH),)).module()


def onnx_by_tracing(part, example, folder):
    names = [f"input_{index}" for index in range(len(example))]
    axes = dict(zip(names, part.dimensions("batch", "length"), strict=True))
    path = folder / "model.onnx"
    torch.onnx.export(part, example, path, dynamo=False, input_names=names, dynamic_axes=axes)
    return in_onnxruntime(path)


def onnx_by_dynamo(part, example, folder):
    path = folder / "model.onnx"
    torch.onnx.export(part, example, path, dynamo=True, dynamic_shapes=(part.dimensions(BATCH, LENGTH),), verbose=False)
    return in_onnxruntime(path)


def in_onnxruntime(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*inputs):
        found = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})
        tensors = [torch.from_numpy(np.asarray(each)) for each in found]
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    return run


def assert_right_for_other_batches(exporter, name, method, example, folder):
    part = Part(randomise(CLIP(CONFIGS[name]), 0), method)
    run = exporter(part, part.inputs(example, columns=14), folder)
    for number, columns in ((1, 77), (2, 14), (5, 20)):
        inputs = part.inputs(number, columns)
        torch.testing.assert_close(run(*inputs), part(*inputs), rtol=1e-4, atol=1e-4)


# An example of one is what most scripts take. torch.export makes a constant of a side of 1, and says so.
QUICK = [(trace, 1), (trace, 3), (onnx_by_tracing, 1), (export, 2)]
METHODS = ["encode_image", "encode_text"]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.sample(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("exporter, example", QUICK)
@torch.no_grad()
def test_an_exported_tower_is_right_for_every_batch(exporter, example, name, method, tmp_path):
    assert_right_for_other_batches(exporter, name, method, example, tmp_path)


@torch.no_grad()
def test_a_text_tower_exported_to_onnx_by_dynamo_is_right_for_every_batch(tmp_path):
    assert_right_for_other_batches(onnx_by_dynamo, "vit", "encode_text", 2, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("example", [2, 3])
@pytest.mark.parametrize("method", [*METHODS, "forward"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("exporter", [trace, export, onnx_by_tracing, onnx_by_dynamo])
@torch.no_grad()
def test_every_export_of_every_model_is_right_for_every_batch(exporter, name, method, example, tmp_path):
    assert_right_for_other_batches(exporter, name, method, example, tmp_path)


def test_a_trace_made_where_gradients_are_recorded_is_right_for_every_batch(tmp_path):
    assert_right_for_other_batches(trace, "quick_gelu", "forward", 1, tmp_path)


# ---- graphs of torch.fx


def with_clients(name):
    """An image tower of ours, and OpenAI's and open_clip's of the same kind, where there are any."""
    config = CONFIGS[name]
    towers = [CLIP(config).visual, openclip_model.CLIP.of(config).visual]
    if config.vision.kind != "timm":
        of_largest_id = replace(config, text=replace(config.text, eot_token=None))
        towers.append(openai._from_config(of_largest_id, name).visual)
    return [randomise(tower, 0).eval() for tower in towers]


LAYERS = {"resnet": "layer2", "timm": "trunk.layer2"}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("is_training", [False, True])
def test_an_image_tower_is_recorded_by_fx_for_every_batch(name, is_training):
    for tower in with_clients(name):
        graph = torch.fx.symbolic_trace(tower)
        for number in (1, 3):
            images = random_images(number, CONFIGS[name].vision.image_size).to(next(tower.parameters()))
            with torch.set_grad_enabled(is_training):
                assert_near(graph(images), tower(images))


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_extracted_as_by_a_hook(name):
    layer = LAYERS.get(name, "transformer.resblocks.1")
    for tower in with_clients(name):
        images, seen = random_images(2, CONFIGS[name].vision.image_size).to(next(tower.parameters())), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the graph in training has other nodes, of dropout
            extract = create_feature_extractor(tower, [layer])
        tower.get_submodule(layer).register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output))
        tower(images)
        assert_near(extract(images)[layer], seen[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_graph_of_fx_refuses_an_option_that_it_has_not_recorded(name):
    tower = CLIP(CONFIGS[name]).visual.eval()
    images = random_images(1, CONFIGS[name].vision.image_size).float()
    with pytest.raises(AssertionError, match="recorded with all options false"):
        torch.fx.symbolic_trace(tower)(images, all_tokens=True)


def assert_near(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
