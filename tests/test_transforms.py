# Oracles: torchvision's transforms in the order of OpenAI's clip/clip.py, and Pillow's decoders.

import io
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms.v2 import functional

from miniclip.config import OPENAI_MEAN, OPENAI_STD
from miniclip.transforms import Augmentation, Preprocess, decode_rgb, normalize, open_image


def openai_transform(size):
    """`_transform` of OpenAI's clip/clip.py: RGB comes after resize and crop."""
    resize = Resize(size, interpolation=InterpolationMode.BICUBIC)
    to_rgb = lambda image: image.convert("RGB")  # noqa: E731
    return Compose([resize, CenterCrop(size), to_rgb, ToTensor(), Normalize(OPENAI_MEAN, OPENAI_STD)])


def picture(width, height, mode="RGB", seed=0):
    """Smooth shapes with noise, so that interpolation and rounding show, and colours that differ."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 4))
    y, x = np.mgrid[:height, :width]
    channels = [x * 200 // max(width, 1), y * 195 // max(height, 1), (x * y) % 190, (x + 2 * y) % 180]
    pixels = (np.stack(channels, axis=-1) + noise).astype(np.uint8)
    if mode in ("P", "1"):
        return (
            Image.fromarray(pixels[..., :3]).quantize(17)
            if mode == "P"
            else Image.fromarray(pixels[..., :3]).convert(mode)
        )
    if mode in ("L", "I;16", "F"):
        scale = {"L": np.uint8, "I;16": np.uint16, "F": np.float32}[mode]
        return Image.fromarray(pixels[..., 0].astype(scale))
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(pixels[..., i]) for i in (0, 3)])
    return Image.fromarray(pixels[..., : 3 if mode == "RGB" else 4], mode=mode)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---- preprocessing

MODES = ["RGB", "L", "P", "RGBA", "CMYK", "LA", "1", "I;16", "F"]
SIZES = [
    (61, 40),
    (40, 61),
    (50, 50),
    (32, 32),
    (32, 47),
    (47, 32),
    (20, 13),
    (13, 20),
    (1, 1),
    (33, 32),
    (200, 31),
    (5, 90),
]


def assert_preprocessed_as_openai(image, size):
    preprocess = Preprocess(size, OPENAI_MEAN, OPENAI_STD)
    expected = openai_transform(size)(image)
    assert torch.equal(preprocess(image), expected)
    cropped = preprocess.crop(image)
    assert (cropped.dtype, cropped.shape) == (torch.uint8, (3, size, size))
    assert torch.equal(normalize(cropped, OPENAI_MEAN, OPENAI_STD), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("width, height", SIZES)
def test_preprocessing_equals_openais_bit_for_bit(width, height, mode):
    assert_preprocessed_as_openai(picture(width, height, mode), 32)


@pytest.mark.parametrize("size", [1, 7, 14, 32])
@pytest.mark.parametrize("count", [40, pytest.param(3000, marks=pytest.mark.long)])
def test_preprocessing_equals_openais_for_any_sizes(size, count):
    drawn = random.Random(size)
    for number in range(count):
        width, height = drawn.randint(1, 90), drawn.randint(1, 90)
        assert_preprocessed_as_openai(picture(width, height, drawn.choice(MODES[:5]), seed=number), size)


def test_preprocessing_equals_openais_at_the_resolution_of_its_models():
    for number, (width, height) in enumerate([(640, 427), (225, 300), (224, 224)]):
        assert_preprocessed_as_openai(picture(width, height, seed=number), 224)


@pytest.mark.parametrize("difference, offset", [(1, 0), (2, 1), (3, 2), (5, 2), (7, 4), (9, 4)])
def test_the_centre_of_an_odd_difference_is_rounded_to_even_as_pythons_round_does(difference, offset):
    columns = torch.arange(8 + difference, dtype=torch.uint8).repeat(8, 1)
    cropped = Preprocess(8, OPENAI_MEAN, OPENAI_STD).crop(Image.fromarray(columns.numpy()))
    assert cropped[0, 0].tolist() == list(range(offset, offset + 8))


def test_a_palette_image_is_resized_before_it_becomes_rgb():
    image = picture(61, 40, "P")
    crop = Preprocess(32, OPENAI_MEAN, OPENAI_STD).crop
    colours = {tuple(colour) for colour in np.array(image.convert("RGB")).reshape(-1, 3).tolist()}
    assert {tuple(colour) for colour in crop(image).flatten(1).T.tolist()} <= colours  # nearest: no colour is mixed
    assert not torch.equal(crop(image), crop(image.convert("RGB")))


def test_preprocessing_leaves_the_image_alone():
    image = picture(61, 40)
    before = image.tobytes()
    Preprocess(32, OPENAI_MEAN, OPENAI_STD)(image)
    assert (image.size, image.tobytes()) == ((61, 40), before)


def test_a_batch_is_normalised_like_its_images():
    crop = Preprocess(32, OPENAI_MEAN, OPENAI_STD).crop
    images = [picture(61, 40, seed=seed) for seed in range(3)]
    batch = normalize(torch.stack([crop(image) for image in images]), OPENAI_MEAN, OPENAI_STD)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, torch.stack([openai_transform(32)(image) for image in images]))


def test_normalising_worked_out_by_hand():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    values = normalize(pixels, (0.5, 0.1, 0.25), (0.5, 0.2, 0.25)).flatten()
    torch.testing.assert_close(values, torch.tensor([-1.0, 0.5, 3.0]))


def test_the_representation_names_what_the_pixels_went_through():
    assert repr(Preprocess(32, [0.5, 0.25, 0.125], (1, 2, 3))) == (
        "Preprocess(image_size=32, mean=(0.5, 0.25, 0.125), std=(1, 2, 3))"
    )


# ---- decoding

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_good_image_is_opened_completely(kind):
    data = encoded(picture(30, 20), kind)
    image = open_image(data, "cat")
    assert image.size == (30, 20)
    assert np.array_equal(np.array(image.convert("RGB")), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(
    "data",
    [b"", b"a caption, not a picture", b"<html>404</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(1000)],
    ids=str,
)
def test_bytes_that_are_no_image_are_refused_naming_the_source(data):
    with pytest.raises(ValueError, match=r"^shard-3\.tar:cat\.jpg is "):
        open_image(data, "shard-3.tar:cat.jpg")


def test_the_error_for_no_image_says_how_many_bytes_there_were():
    with pytest.raises(ValueError, match=r"not an image that can be read \(9 bytes\)"):
        open_image(b"not image", "cat")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_image_is_refused_naming_the_source(kind, kept):
    data = encoded(picture(90, 70), kind)
    with pytest.raises(ValueError, match=r"^cat\.jpg is "):
        open_image(data[: int(kept * len(data))], "cat.jpg")


def test_an_image_that_would_unpack_to_far_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"^cat is an unreadable image: .*decompression bomb"):
        open_image(encoded(picture(90, 70), "PNG"), "cat")


def damaged(data, seed):
    drawn, data = random.Random(seed), bytearray(data)
    for _ in range(drawn.randint(1, 4)):
        data[drawn.randrange(len(data) if drawn.random() < 0.3 else min(80, len(data)))] = drawn.randrange(256)
    return bytes(data[: drawn.randint(1, len(data))] if drawn.random() < 0.3 else data)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("seeds", [range(200), pytest.param(range(200, 10_000), marks=pytest.mark.long)], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_image_is_opened_or_refused_with_a_value_error(kind, seeds):
    whole, escaped = encoded(picture(20, 15), kind), []
    for seed in seeds:
        try:
            open_image(damaged(whole, seed), "cat")
        except Exception as error:
            if not isinstance(error, ValueError) or not str(error).startswith("cat is "):
                escaped.append((seed, repr(error)))
    assert not escaped, f"{len(escaped)} of {len(seeds)}, the first: {escaped[:5]}"


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1"])
def test_decoding_a_png_equals_pillow(mode):
    data = encoded(picture(31, 22, mode), "PNG")
    pixels = decode_rgb(data)
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_decoding_a_lossy_image_equals_pillow_but_for_rounding(kind, mode):
    data = encoded(picture(64, 48, mode), kind, quality=90)
    expected = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
    assert (decode_rgb(data).int() - expected.int()).abs().max() <= 2


def test_both_decoders_leave_a_camera_rotation_alone_as_openai_does():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees when shown
    data = encoded(picture(30, 20), "JPEG", exif=exif)
    assert decode_rgb(data).shape == (3, 20, 30)
    assert open_image(data, "cat").size == (30, 20)


# ---- augmentation

ASPECTS = [(40, 40), (40, 60), (90, 30), (1, 500), (500, 1), (1, 1), (2, 3), (17, 23)]
SETTINGS = [
    Augmentation(),
    Augmentation(scale=(0.08, 1.0)),
    Augmentation(scale=(0.3, 0.5), ratio=(1, 1)),
    Augmentation(scale=(1, 1), ratio=(0.01, 100)),
    Augmentation(scale=(0.001, 0.002), ratio=(0.5, 2)),
    Augmentation(scale=(0.05, 0.2), ratio=(1.5, 3)),
]


@pytest.mark.parametrize("augmentation", SETTINGS, ids=str)
@pytest.mark.parametrize("H, W", ASPECTS)
def test_a_crop_lies_inside_the_image_and_has_an_allowed_shape(H, W, augmentation):
    low, high = augmentation.ratio
    for seed in range(100):
        top, left, h, w = augmentation.crop_box(H, W, np.random.default_rng(seed))
        assert 0 <= top < top + h <= H
        assert 0 <= left < left + w <= W
        assert (w + 0.51) / max(h - 0.51, 1e-9) >= low  # sides are rounded to whole pixels
        assert max(w - 0.51, 0) / (h + 0.51) <= high


@pytest.mark.parametrize("H, W", [(40, 40), (60, 45), (100, 130), (30, 90), (90, 30)])
@pytest.mark.parametrize("scale", [(0.08, 0.3), (0.1, 0.1), (0.2, 0.3)])
def test_a_crop_that_fits_takes_the_share_of_the_area_that_was_asked_for(H, W, scale):
    """With shares so small ten tries never fail, whatever the shape."""
    augmentation, shares, draw = Augmentation(scale=scale), [], np.random.default_rng(0)
    for _ in range(2000):
        _, _, h, w = augmentation.crop_box(H, W, draw)
        rounding = 0.5 * (h + w + 1) / (H * W)
        assert scale[0] - rounding <= h * w / (H * W) <= scale[1] + rounding
        shares.append(h * w / (H * W))
    middle = sum(scale) / 2
    assert np.mean(shares) == pytest.approx(middle, rel=0.05)  # uniform between the two


def test_crops_are_spread_over_the_whole_image():
    augmentation = Augmentation(scale=(0.1, 0.3))
    boxes = np.array([augmentation.crop_box(40, 60, np.random.default_rng(seed)) for seed in range(400)])
    top, left, h, w = boxes.T
    assert (top == 0).any()
    assert (left == 0).any()
    assert (top + h == 40).any()
    assert (left + w == 60).any()
    assert np.mean(top + h / 2) == pytest.approx(20, abs=2)
    assert np.mean(left + w / 2) == pytest.approx(30, abs=3)


def test_ratios_are_drawn_evenly_on_both_sides_of_the_square():
    augmentation = Augmentation(scale=(0.2, 0.3), ratio=(0.5, 2))
    boxes = [augmentation.crop_box(400, 400, np.random.default_rng(seed)) for seed in range(500)]
    logarithms = [math.log(w / h) for _, _, h, w in boxes]
    assert np.mean(logarithms) == pytest.approx(0, abs=0.06)
    assert min(logarithms) < -0.6
    assert max(logarithms) > 0.6


@pytest.mark.parametrize(
    "H, W, box",
    [
        (100, 400, (0, 133, 100, 133)),
        (400, 100, (133, 0, 133, 100)),
        (1, 500, (0, 249, 1, 1)),
        (500, 1, (249, 0, 1, 1)),
        (30, 32, (0, 0, 30, 32)),
    ],
)
def test_where_no_try_fits_the_largest_allowed_crop_is_taken_from_the_centre(H, W, box):
    class NeverFits:
        """The largest area at the most extreme ratio, which only fits a picture of that ratio."""

        def uniform(self, low, high):
            return high

    assert Augmentation(scale=(1, 1)).crop_box(H, W, NeverFits()) == box


def test_the_same_random_state_gives_the_same_pixels():
    image = decode_rgb(encoded(picture(61, 40), "PNG"))
    augmentation = Augmentation(scale=(0.2, 1), flip=0.5)
    results = [augmentation(image, 16, np.random.default_rng(seed)) for seed in (*range(20), *range(20))]
    assert all(torch.equal(first, again) for first, again in zip(results[:20], results[20:], strict=True))
    assert len({result.numpy().tobytes() for result in results}) == 20


@pytest.mark.parametrize("H, W", ASPECTS)
def test_an_augmented_image_is_square_uint8_whatever_it_was(H, W):
    pixels = torch.full((3, H, W), 77, dtype=torch.uint8)
    result = Augmentation()(pixels, 16, np.random.default_rng(0))
    assert (result.dtype, result.shape) == (torch.uint8, (3, 16, 16))
    assert result.eq(77).all()


def test_an_augmented_image_is_the_crop_resized():
    image = decode_rgb(encoded(picture(61, 40), "PNG"))
    augmentation = Augmentation(scale=(0.2, 0.5))
    top, left, h, w = augmentation.crop_box(40, 61, np.random.default_rng(4))
    crop = image[:, top : top + h, left : left + w]
    expected = functional.resize(crop, [16, 16], interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(augmentation(image, 16, np.random.default_rng(4)), expected)


def test_augmentation_leaves_the_image_alone():
    image = decode_rgb(encoded(picture(61, 40), "PNG"))
    before = image.clone()
    Augmentation(flip=1)(image, 16, np.random.default_rng(0))
    assert torch.equal(image, before)


@pytest.mark.parametrize("H, W", [(40, 40), (30, 60)])
def test_the_whole_area_at_the_images_own_ratio_gives_the_whole_image_resized(H, W):
    image = decode_rgb(encoded(picture(W, H), "PNG"))
    result = Augmentation(scale=(1, 1), ratio=(W / H, W / H))(image, 16, np.random.default_rng(0))
    expected = functional.resize(image, [16, 16], interpolation=InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(result, expected)


def test_flip_1_mirrors_left_and_right_and_flip_0_never_does():
    image = decode_rgb(encoded(picture(61, 40), "PNG"))
    for seed in range(20):
        never, always = (
            Augmentation(scale=(0.3, 1), flip=flip)(image, 16, np.random.default_rng(seed)) for flip in (0.0, 1.0)
        )
        assert torch.equal(always, never.flip(-1))
        assert not torch.equal(always, never)


def test_flip_one_half_mirrors_about_half():
    image = decode_rgb(encoded(picture(16, 16), "PNG"))
    augmentation = Augmentation(scale=(1, 1), ratio=(1, 1), flip=0.5)
    mirrored = sum(torch.equal(augmentation(image, 16, np.random.default_rng(i)), image.flip(-1)) for i in range(400))
    assert 160 <= mirrored <= 240


@pytest.mark.parametrize(
    "field, value, shown",
    [
        ("scale", (0, 1), "(0, 1)"),
        ("scale", (-0.5, 1), "(-0.5, 1)"),
        ("scale", (0.5, 0.2), "(0.5, 0.2)"),
        ("scale", (0.5, 1.5), "(0.5, 1.5)"),
        ("scale", (float("nan"), 1), "nan"),
        ("ratio", (0, 1), "(0, 1)"),
        ("ratio", (2, 0.5), "(2, 0.5)"),
        ("flip", -0.1, "-0.1"),
        ("flip", 2, "2"),
        ("flip", float("nan"), "nan"),
        ("scale", (0.2, 0.5, 1), "(0.2, 0.5, 1)"),
        ("scale", 0.5, "0.5"),
        ("ratio", (1,), "(1,)"),
    ],
)
def test_a_bad_field_is_refused_naming_it_and_its_value(field, value, shown):
    with pytest.raises(ValueError, match=rf"\b{field}\b") as caught:
        Augmentation(**{field: value})
    assert shown in str(caught.value)
