"""What a score hangs on: relevances equal to what others compute, scores worked by hand, maps at their place."""

import math
from functools import partial

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients, Occlusion
from helpers import picture, tiny_clip, tiny_config
from PIL import Image, ImageOps
from planted import SIDE, Planted, grey_with_patch, planted
from transformers import CLIPImageProcessor, CLIPModel

import miniclip
from miniclip.config import VisionConfig
from miniclip.evaluation.encoder import from_clip, from_object
from miniclip.evaluation.other_libraries import from_openclip, open_model
from miniclip.images import Preprocess
from miniclip.inference.explanation.attention import attention_relevance
from miniclip.inference.explanation.deletion import Removal
from miniclip.inference.explanation.explain import Explainer, Picture
from miniclip.inference.explanation.pixels import blurred, integrated_gradients, occlusion, spread_out
from miniclip.inference.explanation.placing import Box, find_box, laid_on
from miniclip.inference.explanation.words import Text
from miniclip.weights.convert import convert


def preprocess_of(model):
    vision = model.config.vision
    return Preprocess(vision.image_size, vision.mean, vision.std)


def encoder_of(model):
    return from_clip(model, preprocess_of(model), "tiny")


def direction(seed, width=16):
    return F.normalize(torch.randn(width, generator=torch.Generator().manual_seed(seed)), dim=0)


def lively(model):
    """Weights large enough that attention is far from even."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "in_proj_weight" in name:
                tensor.mul_(4)
    return model


@pytest.fixture(scope="module")
def model():
    return lively(tiny_clip(3))


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def rolled_out_by_hand(attentions, gradients, read):
    """Equations 5 and 6 of the paper, entry by entry: R = 1; Ā = mean over heads of (∇A ⊙ A)⁺; R = R + Ā R."""
    heads, tokens, _ = attentions[0].shape
    R = [[1.0 if i == j else 0.0 for j in range(tokens)] for i in range(tokens)]
    for A, gradient in zip(attentions, gradients, strict=True):
        bar = [
            [
                sum(max(float(gradient[h, i, j] * A[h, i, j].detach()), 0.0) for h in range(heads)) / heads
                for j in range(tokens)
            ]
            for i in range(tokens)
        ]
        R = [[R[i][j] + sum(bar[i][k] * R[k][j] for k in range(tokens)) for j in range(tokens)] for i in range(tokens)]
    return torch.tensor(R[read])


@pytest.fixture(scope="module")
def theirs(model, tmp_path_factory):
    """The same weights in transformers, which returns the probabilities of every block."""
    folder = tmp_path_factory.mktemp("model")
    miniclip.save(model, folder / "ours")
    convert(folder / "ours", folder / "hf", "hf")
    return CLIPModel.from_pretrained(folder / "hf", attn_implementation="eager").eval()


def test_relevance_of_patches_is_the_papers_formula_on_transformers_attention(model, theirs):
    pixels, target = preprocess_of(model)(picture(1))[None], direction(0)
    tower = model.visual
    found, cosine = attention_relevance(tower.transformer, lambda: model.encode_image(pixels), target, read=0)

    out = theirs.vision_model(pixels, output_attentions=True)
    features = theirs.visual_projection(out.pooler_output)
    expected_cosine = F.normalize(features, dim=-1)[0] @ target
    gradients = torch.autograd.grad(expected_cosine, out.attentions)
    expected = rolled_out_by_hand([a[0] for a in out.attentions], [g[0] for g in gradients], read=0)
    torch.testing.assert_close(cosine, expected_cosine.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found[1:].max() > 10 * found[1:].min()


def test_relevance_of_tokens_is_the_papers_formula_on_transformers_attention(model, theirs):
    tokens, target = miniclip.tokenize(["a small red car at night"], 16)[:, :8], direction(1)
    found, cosine = attention_relevance(model.text.transformer, lambda: model.text(tokens), target, read=7)

    out = theirs.text_model(tokens.long(), output_attentions=True)
    expected_cosine = F.normalize(theirs.text_projection(out.pooler_output), dim=-1)[0] @ target
    gradients = torch.autograd.grad(expected_cosine, out.attentions)
    expected = rolled_out_by_hand([a[0] for a in out.attentions], [g[0] for g in gradients], read=7)
    torch.testing.assert_close(cosine, expected_cosine.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_observed", [False, True], ids=["pooled token alone", "every token, as hooks see it"])
def test_the_forward_that_is_explained_is_the_ordinary_one(model, is_observed):
    pixels, tokens = preprocess_of(model)(picture(2))[None], miniclip.tokenize(["two words"], 16)[:, :4]
    hooks = [tower.register_forward_hook(lambda *_: None) for tower in (model.visual, model.text) if is_observed]
    try:
        for tower, inputs, read in ((model.visual, pixels, 0), (model.text, tokens, 3)):
            with torch.no_grad():
                ordinary = F.normalize(tower(inputs), dim=-1)[0]
            for target in torch.eye(16):
                _, cosine = attention_relevance(tower.transformer, partial(tower, inputs), target, read)
                assert abs(float(cosine - ordinary @ target)) < 1e-6
    finally:
        for hook in hooks:
            hook.remove()


def test_explaining_leaves_a_model_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = [parameter.requires_grad for parameter in model.parameters()]
    Explainer(encoder_of(model))(picture(1), ["a car"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == frozen
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_frozen_model_is_explained_like_any(model):
    expected = Picture(encoder_of(model), picture(1)).map(direction(0)).relevance
    frozen = lively(tiny_clip(3)).requires_grad_(False)
    np.testing.assert_array_equal(Picture(encoder_of(frozen), picture(1)).map(direction(0)).relevance, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels

TOWERS = {
    "vit": VisionConfig(image_size=28, patch_size=7, width=16, layers=2, head_width=8),
    "resnet": VisionConfig(kind="resnet", image_size=32, width=4, blocks=(1, 1, 1, 1), head_width=16),
    "timm": VisionConfig(kind="timm", image_size=32, timm_model="test_convnext"),
}


def tower_encoder(kind):
    return encoder_of(tiny_clip(0, vision=TOWERS[kind]))


def cosine_of(encoder, target):
    """As captum calls a model."""
    model = encoder.image_module
    return lambda images: F.normalize(model(images), dim=-1) @ target


@pytest.mark.parametrize("kind", TOWERS)
def test_integrated_gradients_are_captums(kind):
    encoder, target = tower_encoder(kind), direction(0)
    image = encoder.preprocess(picture(1))
    base = blurred(image)

    def encode(images):
        return F.normalize(encoder.image_module(images), dim=-1)

    found = integrated_gradients(encode, image, base, target)
    expected = IntegratedGradients(cosine_of(encoder, target)).attribute(
        image[None], base[None], n_steps=32, method="riemann_middle"
    )
    torch.testing.assert_close(found, expected[0].sum(dim=0).float(), rtol=1e-4, atol=1e-6)
    rise = (encode(image[None]) - encode(base[None]))[0] @ target
    assert abs(float((found.sum() - rise).detach())) < 0.02  # they add up


def test_occlusion_is_captums(model):
    encoder, target = tower_encoder("vit"), direction(0)
    image = encoder.preprocess(picture(1))
    found = occlusion(lambda images: F.normalize(encoder.image_module(images), dim=-1), image, blurred(image), target)
    expected = Occlusion(cosine_of(encoder, target)).attribute(
        image[None], (3, 4, 4), strides=(3, 4, 4), baselines=blurred(image)[None]
    )
    torch.testing.assert_close(found, expected[0, 0, ::4, ::4].float(), rtol=1e-4, atol=1e-6)


def test_a_blurred_picture_keeps_its_colours_and_nothing_else():
    image = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 1, 2])[:, None, None]
    base = blurred(image)
    assert (base.mean(dim=(1, 2)) - image.mean(dim=(1, 2))).abs().max() < 0.02
    assert base.std(dim=(1, 2)).max() < image.std(dim=(1, 2)).min() / 8
    flat = torch.full((3, 9, 9), 0.3)
    torch.testing.assert_close(blurred(flat), flat)


def test_cells_become_pixels_with_their_corners_in_place():
    spread = spread_out(torch.tensor([[[1.0, 0], [0, 0]]]), torch.Size([8, 8]))[0]
    assert spread[0, 0] == spread.max() == 1
    assert spread[-1, -1] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Deletion and insertion


def counted(weights):
    """Features whose cosine with (1, 0) is the weight of the parts that are there."""

    def encode(is_there):
        score = is_there.float() @ torch.tensor(weights)
        return torch.stack([score, (1 - score**2).clamp(min=0).sqrt()], dim=1)

    return encode


def test_deletion_and_insertion_are_those_worked_by_hand():
    weights = [0.4, 0.1, 0.3, 0.2]
    random = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    removal = Removal(counted(weights), random)
    target = torch.tensor([1.0, 0.0])
    right = removal.score(torch.tensor(weights), target)
    # By weight: 0, 0.4, 0.7, 0.9, 1 while parts are added; 1, 0.6, 0.3, 0.1, 0 while they go.
    assert right.insertion == pytest.approx((0 / 2 + 0.4 + 0.7 + 0.9 + 1 / 2) / 4)
    assert right.deletion == pytest.approx((1 / 2 + 0.6 + 0.3 + 0.1 + 0 / 2) / 4)
    wrong = removal.score(-torch.tensor(weights), target)
    assert (wrong.insertion, wrong.deletion) == pytest.approx((right.deletion, right.insertion))

    curves = []
    for order in random.argsort(dim=1, descending=True).tolist():
        steps = np.cumsum([0, *(weights[part] for part in order)])
        curves.append((steps[1:] + steps[:-1]).mean() / 2)
    half = 2.3646 * np.std(curves, ddof=1) * math.sqrt(1 + 1 / 8)
    assert right.random == pytest.approx(np.mean(curves))
    assert right.interval == pytest.approx((np.mean(curves) - half, np.mean(curves) + half), abs=1e-4)


def test_a_relevance_without_meaning_is_rarely_called_better():
    random = torch.Generator().manual_seed(0)
    weights = torch.rand(60, generator=random)
    weights = (weights / weights.sum()).tolist()
    target = torch.tensor([1.0, 0.0])
    called = 0
    for _ in range(200):
        removal = Removal(counted(weights), torch.rand(8, 60, generator=random))
        assert removal.score(torch.tensor(weights), target).is_better
        assert not removal.score(-torch.tensor(weights), target).is_better
        called += removal.score(torch.rand(60, generator=random), target).is_better
    assert called <= 10  # 5 in 100; 2.5 are expected


def test_a_single_part_can_be_scored():
    found = Removal(counted([1.0]), torch.zeros(8, 1)).score(torch.tensor([3.0]), torch.tensor([1.0, 0.0]))
    assert found.deletion == found.insertion == found.random == 0.5
    assert not found.is_better


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.mark.parametrize(
    "options, method",
    [({}, "gradients"), ({"has_gradients": False}, "occlusion")],
    ids=["torch's encoder", "a NumPy encoder, which has no gradients"],
)
def test_a_planted_reason_is_found_with_its_sign(options, method):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
    image.paste((220, 30, 30), (0, 0, 14, 14))
    image.paste((220, 30, 30), (14, 14, 28, 28))
    (found,) = Explainer(planted(**options))(image, ["red"])
    assert found.map.method == method
    relevance = found.map.relevance
    total = np.abs(relevance).sum()
    assert relevance[:12, :12].sum() > 0.2 * total
    assert relevance[16:, 16:].sum() < -0.2 * total
    assert np.abs(relevance[:12, 16:]).sum() < 0.1 * total
    assert found.map.deletion.is_better


def test_a_map_of_what_the_model_ignores_is_not_believed():
    image = grey_with_patch((SIDE, SIDE), (0, 0, 14, 14))
    seen = Picture(planted(), image)
    target = Text(planted(), "red").features
    ignored = torch.zeros(SIDE, SIDE)
    ignored[:14, 14:] = 1
    assert not seen.judge(ignored, target)[1].is_better


def test_the_method_is_the_first_that_the_model_allows(model):
    class Own(Planted):
        pass

    assert Picture(encoder_of(model), picture(1)).map(direction(0)).method == "attention"
    assert Picture(encoder_of(model), picture(1), "gradients").map(direction(0)).method == "gradients"
    assert Picture(tower_encoder("resnet"), picture(1)).map(direction(0)).method == "gradients"
    assert Picture(planted(), picture(1), "occlusion").map(direction(0, 2)).method == "occlusion"
    with pytest.raises(ValueError, match=r"planted is none; use gradients or occlusion"):
        Explainer(planted(), "attention")
    with pytest.raises(ValueError, match=r"'lime'.*attention, gradients, occlusion"):
        Explainer(planted(), "lime")
    with pytest.raises(ValueError, match=r"planted gives no gradients; use occlusion"):
        Explainer(planted(has_gradients=False), "gradients")(picture(1), ["red"])


def test_a_block_whose_attention_was_replaced_is_explained_by_gradients():
    model = tiny_clip(0)

    class Other(torch.nn.Module):
        def forward(self, x, pool=None, attend=None):
            return x if pool is None else x[:, :1]

    model.visual.transformer.resblocks[0].attn = Other()
    assert Picture(encoder_of(model), picture(1)).map(direction(0)).method == "gradients"
    with pytest.raises(ValueError, match="1 of 2 blocks"):
        Picture(encoder_of(model), picture(1), "attention").map(direction(0))


def test_features_that_are_no_numbers_are_refused():
    broken = Planted()
    broken.encode_image = lambda images: torch.full((len(images), 2), math.nan)
    with pytest.raises(ValueError, match=r"broken gives features .* not finite"):
        Explainer(from_object(broken, "broken"))(picture(1), ["red"])


class Patches:
    """A preprocessing whose result is no picture: (rows, values)."""

    def __call__(self, image):
        return Preprocess(SIDE, (0, 0, 0), (1, 1, 1))(image).reshape(-1, SIDE)


class OfPatches(Planted):
    def encode_image(self, rows):
        return super().encode_image(rows.reshape(len(rows), 3, SIDE, SIDE))


@pytest.mark.parametrize("size", [(60, 60), (900, 700)], ids=["small", "reduced first"])
def test_an_input_that_is_no_picture_is_explained_by_covering_parts_of_the_picture(size):
    encoder = from_object(OfPatches(Patches()), "patches")
    left, side = (size[0] - min(size)) // 2, min(size)
    image = grey_with_patch(size, (left, 0, left + side // 2, side // 2))
    (found,) = Explainer(encoder)(image, ["red"])
    laid = found.map.on_picture()
    assert found.map.method == "occlusion"
    assert laid.shape == size[::-1]
    y, x = np.unravel_index(np.nanargmax(laid), laid.shape)
    assert left <= x < left + side // 2
    assert y < side // 2
    assert found.map.deletion.is_better
    with pytest.raises(ValueError, match=r"patches gives no gradients; use occlusion"):
        Explainer(encoder, "gradients")(image, ["red"])


@pytest.mark.parametrize(
    "change, patch",
    [(ImageOps.exif_transpose, (0, 30, 30, 60)), (ImageOps.mirror, (30, 0, 60, 30))],
    ids=["turned by its EXIF tag", "mirrored"],
)
def test_a_preprocessing_that_turns_pictures_is_mapped_on_the_picture_as_it_is_stored(change, patch):
    """The patch is in the upper left of what the model sees, where it looks for red."""
    stored = grey_with_patch((60, 60), patch)
    stored.getexif()[0x0112] = 6
    stored.info["exif"] = stored.getexif().tobytes()
    encoder = planted(preprocess=lambda image: Preprocess(SIDE, (0, 0, 0), (1, 1, 1))(change(image)))
    (found,) = Explainer(encoder)(stored, ["red"])
    relevance = found.map.on_picture()
    y, x = np.unravel_index(np.nanargmax(relevance), relevance.shape)
    assert patch[0] <= x < patch[2]
    assert patch[1] <= y < patch[3]


# ---------------------------------------------------------------------------------------------------------------------
# The place in the picture


def exact_box(preprocess, width, height):
    """From the steps of `Preprocess`, for pictures that it does not cut beforehand."""
    R, side, short, long = preprocess.image_size, preprocess.resize_size, min(width, height), max(width, height)
    w, h = width, height
    if preprocess.resize == "squash":
        w, h = side, side
    elif preprocess.resize == "shortest":
        w, h = (side, int(side * long / short)) if width <= height else (int(side * long / short), side)
    is_hf = preprocess.style == "hf"
    left, top = ((w - R) // 2, (h - R) // 2) if is_hf else (round((w - R) / 2), round((h - R) / 2))
    return Box(left * width / w, top * height / h, (left + R) * width / w, (top + R) * height / h)


PREPROCESSORS = {
    "openai": Preprocess(64, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
    "hf, larger before the crop": Preprocess(64, (0, 0, 0), (1, 1, 1), "hf", "shortest", 80, "bilinear"),
    "squashed": Preprocess(64, (0, 0, 0), (1, 1, 1), resize="squash"),
    "not resized": Preprocess(64, (0, 0, 0), (1, 1, 1), resize="none"),
}
SIZES = [(64, 64), (640, 480), (200, 301), (100, 6000), (6000, 100), (28, 28), (70, 50), (7, 5)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", PREPROCESSORS)
def test_the_box_is_where_the_model_looks(name, size):
    preprocess = PREPROCESSORS[name]
    found, expected = find_box(preprocess, Image.new("RGB", size)), exact_box(preprocess, *size)
    for axis in (0, 1):
        tolerance = max(0.3, 0.01 * (expected[axis + 2] - expected[axis]))  # pixels of the picture
        assert found[axis::2] == pytest.approx(expected[axis::2], abs=tolerance)


def test_the_box_of_other_libraries_preprocessing():
    image = Image.new("RGB", (300, 200))
    theirs = open_clip.image_transform(64, is_train=False)
    assert find_box(theirs, image) == pytest.approx((50, 0, 250, 200), abs=0.5)
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    ours = find_box(lambda image: processor(image, return_tensors="pt")["pixel_values"][0], image)
    assert ours == pytest.approx((50, 0, 250, 200), abs=0.5)


def test_a_border_lies_outside_of_the_picture():
    def padded(image):
        return PREPROCESSORS["openai"](ImageOps.pad(image, (64, 64)))

    pixel = 200 / 43  # the picture has 43 of the 64 rows, from the tenth on
    expected = (0, -10 * pixel, 300, 200 + 11 * pixel)
    assert find_box(padded, Image.new("RGB", (300, 200))) == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.transpose(Image.Transpose.ROTATE_90),
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda image: image.rotate(10),
        lambda image: image.rotate(10, fillcolor=(255, 0, 255)),
        lambda image: Image.new("RGB", (300, 200)),
    ],
    ids=["turned", "mirrored", "tilted", "tilted on a colour", "forgotten"],
)
def test_a_preprocessing_that_does_more_is_refused(change):
    with pytest.raises(ValueError, match="more to a picture than to resize, cut and pad"):
        find_box(lambda image: PREPROCESSORS["openai"](change(image)), Image.new("RGB", (300, 200)))


def test_colours_may_be_changed():
    def negative(image):
        return PREPROCESSORS["openai"](ImageOps.invert(image).convert("L"))

    assert find_box(negative, Image.new("RGB", (300, 200))) == pytest.approx((50, 0, 250, 200), abs=0.5)


def test_a_preprocessing_that_turns_by_exif_is_noticed():
    image = Image.new("RGB", (300, 200))
    image.getexif()[0x0112] = 6
    image.info["exif"] = image.getexif().tobytes()
    assert find_box(PREPROCESSORS["openai"], image) == pytest.approx((50, 0, 250, 200), abs=0.5)
    with pytest.raises(ValueError, match="more to a picture"):
        find_box(lambda image: PREPROCESSORS["openai"](ImageOps.exif_transpose(image)), image)


def test_a_map_of_a_box_is_laid_on_it():
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    np.testing.assert_array_equal(laid_on(values, Box(0, 0, 4, 4), (4, 4)), values)
    laid = laid_on(values, Box(3, 1, 7, 5), (9, 6))
    np.testing.assert_allclose(laid[1:5, 3:7], values)
    assert np.isfinite(laid).sum() == 16
    twice = laid_on(values, Box(0, 0, 8, 8), (8, 8))
    assert twice[0, 0] == 0
    assert twice[-1, -1] == 15
    np.testing.assert_allclose(twice[0, 1:7], [0.25, 0.75, 1.25, 1.75, 2.25, 2.75])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
@pytest.mark.parametrize("size", [(400, 120), (120, 400), (90, 90), (60, 3000)], ids=str)
def test_a_map_lies_where_its_reason_lies(size, mode):
    """The model looks at the centre square; a red patch lies in the upper left quarter of that."""
    side, left, top = min(size), (size[0] - min(size)) // 2, (size[1] - min(size)) // 2
    corner = (left + side // 8, top + side // 8)
    patch = (*corner, corner[0] + side // 4, corner[1] + side // 4)
    found = Picture(planted(), grey_with_patch(size, patch, mode)).map(Text(planted(), "red").features)
    laid = found.on_picture()
    assert laid.shape == (size[1], size[0])
    y, x = np.unravel_index(np.nanargmax(laid), laid.shape)
    assert patch[0] <= x < patch[2]
    assert patch[1] <= y < patch[3]
    is_seen = np.isfinite(laid)
    assert is_seen[top : top + side, left : left + side].mean() > 0.95
    assert is_seen.sum() <= 1.05 * side**2


def test_a_grey_picture_has_a_map(model):
    assert np.isfinite(Picture(encoder_of(model), picture(1, mode="L")).map(direction(0)).on_picture()).any()


# ---------------------------------------------------------------------------------------------------------------------
# Words


def test_words_weigh_what_the_cosine_loses_without_them():
    encoder = planted()
    features = torch.tensor([0.0, 1.0])
    found = Text(encoder, "a red car, not").explain(features)
    assert found.words == ("a", "red", "car,", "not")

    def cosine(reds, nots):
        text = torch.tensor([0.3, reds - 2 * nots])
        return float(text[1] / text.norm())

    whole = cosine(1, 1)
    assert found.relevances == pytest.approx((0, whole - cosine(0, 1), 0, whole - cosine(1, 0)), abs=1e-6)
    assert found.tokens == ()


def test_the_words_that_decide_are_called_better_than_random():
    words = Text(planted(), "red one two three four five six red seven eight nine ten").explain(
        torch.tensor([0.0, 1.0])
    )
    assert words.deletion.deletion < words.deletion.random < words.deletion.insertion


def test_a_script_without_spaces_is_taken_apart(model):
    found = Text(encoder_of(model), "赤い車 and a cat").explain(direction(0))
    assert found.words == ("赤", "い", "車", "and", "a", "cat")


def test_tokens_have_shares_through_attention(model):
    found = Text(encoder_of(model), "an extraordinarily red car").explain(direction(0))
    assert "".join(found.tokens) == "an extraordinarily red car "
    assert len(found.tokens) == len(found.token_relevances)
    assert sum(found.token_relevances) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_an_empty_text_is_refused(text, model):
    with pytest.raises(ValueError, match="is empty"):
        Text(encoder_of(model), text)


def test_a_text_is_refused_that_the_model_does_not_read_to_its_end(model, recwarn):
    with pytest.raises(ValueError, match=r"has 22 tokens.* tiny reads 16; shorten it: 'word word"):
        Text(encoder_of(model), "word " * 20)
    cut = Planted()
    cut.tokenize = lambda texts: torch.tensor([[*map(len, text.split()), *[0] * 5][:5] for text in texts])
    cut.encode_text = lambda tokens: tokens[:, :2] + 1.0
    with pytest.raises(ValueError, match=r"planted does not read the end of the text.*shorten it: 'one three"):
        Text(from_object(cut, "planted"), "one three five seventh eleventh 13")
    assert Text(from_object(cut, "planted"), "one three five seventh eleventh").explain(direction(0, 2)).words
    assert not recwarn.list


def test_transformers_models_have_the_maps_of_ours(model, theirs, tmp_path):
    miniclip.save(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    image, text = picture(5, (16, 16)), "a red car"  # nothing to resize, which libraries do not do bit for bit
    found = Explainer(open_model(f"transformers:{tmp_path / 'hf'}", "cpu"))(image, [text])[0]
    ours = Explainer(encoder_of(model), "gradients")(image, [text])[0]
    assert found.map.method == "gradients"
    np.testing.assert_allclose(found.map.relevance, ours.map.relevance, atol=2e-5 * np.abs(ours.map.relevance).max())
    assert found.words.relevances == pytest.approx(ours.words.relevances, abs=1e-5)
    with pytest.raises(ValueError, match=r"does not read the end of the text"):
        Explainer(open_model(f"transformers:{tmp_path / 'hf'}", "cpu"))(image, ["word " * 30])


def test_open_clips_models_are_explained():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = open_clip.model.CLIP(
            32,
            open_clip.model.CLIPVisionCfg(image_size=28, patch_size=7, width=32, layers=2, head_width=16),
            open_clip.model.CLIPTextCfg(context_length=16, width=32, layers=1, heads=2),
        )
    encoder = from_openclip(
        theirs, open_clip.image_transform(28, is_train=False), partial(open_clip.tokenize, context_length=16), "theirs"
    )
    (found,) = Explainer(encoder)(picture(1), ["a red car"])
    assert found.map.method == "gradients"
    assert np.isfinite(found.map.relevance).all()
    assert found.words.words == ("a", "red", "car")


def test_half_precision_is_explained_nearly_alike(model):
    half = lively(tiny_clip(3)).bfloat16()
    expected = Picture(encoder_of(model), picture(1)).map(direction(0))
    found = Picture(encoder_of(half), picture(1)).map(direction(0))
    assert found.cosine == pytest.approx(expected.cosine, abs=0.03)
    assert np.corrcoef(found.relevance.ravel(), expected.relevance.ravel())[0, 1] > 0.9


def test_a_model_of_the_sigmoid_loss_is_explained():
    model = tiny_clip(0, init_logit_bias=-10.0)
    assert tiny_config(init_logit_bias=-10.0).init_logit_bias == -10
    (found,) = Explainer(encoder_of(model))(picture(1), ["a car"])
    assert -1 <= found.map.cosine <= 1
