"""What was written for OpenAI's package runs with `import miniclip as clip` (the two examples of its README)."""

import numpy as np
import pytest
import torch
from helpers import tiny_clip
from PIL import Image

import miniclip as clip

NAMES = ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px"]


@pytest.fixture
def path(tmp_path) -> str:
    clip.save(tiny_clip(), tmp_path / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(tmp_path / "CLIP.png")
    return str(tmp_path / "model")


def test_the_readme_example(path, tmp_path):
    device = "cpu"
    model, preprocess = clip.load(path, device=device)
    image = preprocess(Image.open(tmp_path / "CLIP.png")).unsqueeze(0).to(device)
    text = clip.tokenize(["a diagram", "a dog", "a cat"], context_length=model.context_length).to(device)
    with torch.no_grad():
        image_features = model.encode_image(image)
        text_features = model.encode_text(text)
        logits_per_image, logits_per_text = model(image, text)
        probs = logits_per_image.softmax(dim=-1).cpu().numpy()
    assert probs.shape == (1, 3)
    assert probs.sum() == pytest.approx(1)
    cosines = torch.nn.functional.cosine_similarity(image_features, text_features)
    torch.testing.assert_close(logits_per_image[0], model.logit_scale.exp() * cosines)
    assert torch.equal(logits_per_image, logits_per_text.T)


def test_the_zero_shot_example(path, tmp_path):
    model, preprocess = clip.load(path, "cpu")
    classes = ["apple", "aquarium fish", "baby", "bear", "beaver", "bed"]
    image_input = preprocess(Image.open(tmp_path / "CLIP.png")).unsqueeze(0)
    text_inputs = torch.cat([clip.tokenize(f"a photo of a {c}", context_length=model.context_length) for c in classes])
    with torch.no_grad():
        image_features = model.encode_image(image_input)
        text_features = model.encode_text(text_inputs)
    image_features /= image_features.norm(dim=-1, keepdim=True)
    text_features /= text_features.norm(dim=-1, keepdim=True)
    similarity = (100.0 * image_features @ text_features.T).softmax(dim=-1)
    values, indices = similarity[0].topk(5)
    assert values.double().sum() <= 1 + 5 * torch.finfo(torch.float32).eps  # five numbers, each rounded
    assert len({classes[i] for i in indices}) == 5


def test_the_names_and_attributes_that_scripts_rely_on(path):
    assert clip.available_models() == NAMES
    model, _ = clip.load(path, device="cpu", jit=False)
    assert model.visual.input_resolution == 16
    assert (model.context_length, model.vocab_size) == (model.config.text.context_length, model.config.text.vocab_size)
    assert model.dtype == torch.float32
    with pytest.raises(RuntimeError):
        clip.tokenize("word " * 100)
