"""The one-file CLIP of the examples computes what the package computes, and can be read in twenty minutes."""

import importlib.util
import math
import random
from pathlib import Path

import pytest
import torch
from helpers import write_pairs
from PIL import Image
from shape_comments import Source, judge, recording

import miniclip
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.images import Preprocess

ROOT = Path(__file__).parents[2]
CONFIG = CLIPConfig(
    embed_dim=128,
    activation="gelu",
    vision=VisionConfig(image_size=28, patch_size=7, width=128, layers=4, head_width=64),
    text=TextConfig(width=128, layers=3, head_width=64, context_length=32),
)
TEXTS = [
    "a handwritten seven in red ink",
    "It's  a <b>caf\u00e9</b> &amp;amp; 1234 \u2014 \U0001f642\U0001f642",
    "supercalifragilisticexpialidocious \u5b66\u6821 " + "very " * 40 + "long",
    "",
]


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


micro = load_example("microclip")


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    ours = miniclip.CLIP(CONFIG).eval()
    theirs = micro.Micro()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_it_has_at_most_250_lines():
    assert len((ROOT / "examples" / "microclip.py").read_text().splitlines()) <= 250


def test_tokens_are_the_packages():
    assert torch.equal(micro.Tokenizer()(TEXTS, 32), miniclip.tokenize(TEXTS, 32, truncate=True).long())


def test_features_and_loss_and_gradients_are_the_packages(models):
    ours, theirs = models
    images, tokens = torch.randn(4, 3, 28, 28), miniclip.tokenize(TEXTS, 32, truncate=True)
    features = ours.encode_image(images, normalize=True), ours.encode_text(tokens, normalize=True)
    micro_features = theirs.encode_image(images), theirs.encode_text(TEXTS)
    torch.testing.assert_close(micro_features, features)
    loss = miniclip.clip_loss(*features, ours.logit_scale.exp())
    micro_loss = micro.clip_loss(*micro_features, theirs.logit_scale)
    torch.testing.assert_close(micro_loss, loss)
    gradients = torch.autograd.grad(loss, list(ours.parameters()))
    micro_gradients = torch.autograd.grad(
        micro_loss, [dict(theirs.named_parameters())[n] for n, _ in ours.named_parameters()]
    )
    torch.testing.assert_close(micro_gradients, gradients, rtol=1e-4, atol=1e-6)


def test_guesses_are_the_packages(models, tmp_path):
    ours, theirs = models
    paths = sorted(write_pairs(tmp_path, 12).glob("*.png"))
    names, templates = ["zero", "one", "two"], ["a handwritten {c}", "the digit {c}"]
    weights = miniclip.zero_shot_classifier(ours, names, templates)
    torch.testing.assert_close(micro.classifier(theirs, names, templates), weights.detach())
    preprocess = Preprocess(28, CONFIG.vision.mean, CONFIG.vision.std)
    square = [Image.open(path).resize((28, 28)) for path in paths]
    for path, image in zip(paths, square, strict=True):
        image.save(path)
    with torch.no_grad():
        images = torch.stack([preprocess(image) for image in square])
        expected = (ours.encode_image(images, normalize=True) @ weights).argmax(dim=1)
    assert micro.classify(theirs, paths, names, templates) == [names[i] for i in expected]


def test_its_shape_comments_are_true(models):
    source = Source.of(ROOT / "examples" / "microclip.py")
    model, images = models[1], torch.randn(4, 3, 28, 28)
    seen = []
    with recording([source]) as calls:
        model.visual(images)
    seen.append(judge(calls.values(), {"B": 4, "R": 28, "N": 17, "patches": 16, "D": 128, "H": 2, "E": 128}))
    with recording([source]) as calls:
        model.encode_text(TEXTS[:3])
    seen.append(judge(calls.values(), {"B": 3, "L": 32, "N": 32, "D": 128, "H": 2, "E": 128}))
    with recording([source]) as calls:
        micro.clip_loss(model.encode_image(images), model.encode_text(TEXTS), model.logit_scale)
    seen.append(judge(calls.values(), {"B": 4, "E": 128, "D": 128, "H": 2}))
    assert [wrong for _, wrong in seen] == [[], [], []]
    assert set(source.comments()) == {comment for reached, _ in seen for comment in reached}


def test_a_folder_without_pictures_ends_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"no \.png in .*nowhere; examples/digits\.py makes some"):
        micro.train(micro.Micro(), tmp_path / "nowhere")


@pytest.mark.long
def test_training_learns_which_caption_is_whose(tmp_path, capsys):
    torch.manual_seed(0)
    random.seed(0)
    write_pairs(tmp_path, 16)
    micro.train(micro.Micro(), tmp_path, steps=21)
    first, last = (float(line.split("loss")[1].split()[0]) for line in capsys.readouterr().out.splitlines())
    assert first > math.log(16) / 2 > last
