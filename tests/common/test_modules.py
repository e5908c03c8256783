"""A model that encodes in evaluation mode and is trained on. The right weights are those of a training without it."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import pytest
import torch
from helpers import picture, tiny_clip, tiny_config
from torch import nn

import miniclip
from miniclip.common.modules import evaluation_mode
from miniclip.evaluation.encoder import from_clip
from miniclip.weights.load import preprocess_for

CLASSES = ["cat", "dog", "owl"]


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def half_training() -> nn.Module:
    """A block whose norm alone is frozen, as for fine-tuning."""
    model = nn.Sequential(nn.Sequential(nn.Dropout(), nn.BatchNorm1d(4)), nn.Dropout()).train()
    model[0][1].eval()
    return model


def test_every_module_has_its_own_mode_again_also_after_an_error():
    model = half_training()
    before = modes(model)
    with evaluation_mode(model):
        assert not any(modes(model))
        with pytest.raises(KeyError), evaluation_mode(model):
            raise KeyError
        assert not any(modes(model))
    assert modes(model) == before
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert modes(model) == before
    model.eval()
    model[1].train()
    with evaluation_mode(model):
        assert not any(modes(model))
    assert modes(model) == [False, False, False, False, True]


def test_of_two_threads_the_last_gives_the_modes_back():
    model = half_training()
    before, begun, end = modes(model), threading.Event(), threading.Event()

    def first() -> None:
        with evaluation_mode(model):
            begun.set()
            assert end.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(60)
    with evaluation_mode(model):
        end.set()
        thread.join()
        assert not any(modes(model))
    assert modes(model) == before


@pytest.mark.parametrize("is_whole_first", [True, False])
@pytest.mark.parametrize("ends_first", [0, 1])
def test_of_calls_for_a_model_and_a_part_of_it_the_last_gives_a_modules_mode_back(is_whole_first, ends_first):
    model = half_training()
    before, part = modes(model), model[0]
    held = [(model, part), (part, model)][not is_whole_first]
    calls = [evaluation_mode(each) for each in held]
    for call in calls:
        call.__enter__()
    assert not any(modes(part))
    calls[ends_first].__exit__(None, None, None)
    assert not any(modes(held[1 - ends_first]))  # whatever the other gave back
    calls[1 - ends_first].__exit__(None, None, None)
    assert modes(model) == before


def test_a_layer_that_merges_its_weights_for_evaluation_is_told_of_its_mode():
    class Merging(nn.Linear):  # as loralib's
        told: tuple[bool, ...] = ()

        def train(self, mode: bool = True) -> nn.Module:
            self.told += (mode,)
            return super().train(mode)

    model = nn.Sequential(Merging(2, 2))
    with evaluation_mode(model), evaluation_mode(model[0]):
        assert model[0].told == (False,)
    assert model[0].told == (False, True)


def test_a_frozen_part_of_torchscripts_has_no_mode_to_give_back():
    frozen = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()))
    model = nn.Sequential(frozen, nn.Dropout())
    x = torch.ones(1, 2)
    for _ in range(2):
        with evaluation_mode(model):
            assert torch.equal(model(x), frozen(x))
        assert model.training
        assert model[1].training
    with evaluation_mode(frozen):
        assert torch.equal(model[0](x), frozen(x))


class Dropping(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(self.layer(x), 0.5, self.training)


def with_dropout() -> miniclip.CLIP:
    resnet = replace(tiny_config().vision, kind="resnet", image_size=32, width=8, blocks=(1, 1, 1, 1), head_width=32)
    model = tiny_clip(vision=resnet)
    for block in model.text.transformer.resblocks:
        block.mlp.c_proj = Dropping(block.mlp.c_proj)
    return model


def use_embed(model: miniclip.CLIP) -> torch.Tensor:
    images = miniclip.embed([picture(0), picture(1)], model)
    return torch.from_numpy(images) @ torch.from_numpy(miniclip.embed(CLASSES, model)).T


def use_pooled(model: miniclip.CLIP) -> torch.Tensor:
    encoder = from_clip(model, preprocess_for(model.config), "mine")
    return encoder.encode_pooled(encoder.preprocess(picture(0))[None])


def use_classifier(model: miniclip.CLIP) -> torch.Tensor:
    found = miniclip.ZeroShotClassifier(model, templates=["a {}"]).fit(y=CLASSES)
    return torch.from_numpy(found.predict_proba([picture(0), picture(1)]))


@pytest.mark.parametrize(
    "use",
    [use_embed, use_pooled, use_classifier, lambda model: miniclip.zero_shot_classifier(model, CLASSES, ["a {}"])],
    ids=["embed", "pooled features", "ZeroShotClassifier", "zero_shot_classifier"],
)
def test_what_encodes_with_a_model_in_training_leaves_the_training_as_it_is(use):
    model = with_dropout().train()
    model.visual.bn1.eval()
    before, tensors = modes(model), copy.deepcopy(model.state_dict())
    found = use(model)
    assert modes(model) == before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    assert torch.equal(found, use(model.eval()))
