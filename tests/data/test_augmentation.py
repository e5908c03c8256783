# Oracles: torchvision's transforms in the order of OpenAI's clip/clip.py, and Pillow's decoders.

import io
import math
import random
from functools import partial

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from torchvision.transforms.v2 import functional

from miniclip.config import OPENAI_MEAN, OPENAI_STD
from miniclip.data.augmentation import Augmentation, decode_rgb, jpeg_size
from miniclip.images import Preprocess, normalize, open_image


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


def openai(image_size, **options):
    return Preprocess(image_size, (0, 0, 0), (1, 1, 1), **options)


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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalising_leaves_the_pixels_alone(dtype):
    pixels = torch.full((2, 3, 4, 4), 7, dtype=dtype)
    normalize(pixels, OPENAI_MEAN, OPENAI_STD)
    assert pixels.eq(7).all()


def test_normalising_copies_nothing_to_the_device():
    """A copy from the host's memory would make the host wait for the GPU."""
    devices = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            devices.update(leaf.device.type for leaf in tree_leaves((args, kwargs, output)) if torch.is_tensor(leaf))
            return output

    with FakeTensorMode():
        pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8, device="cuda")
        with Watch():
            normalize(pixels, OPENAI_MEAN, OPENAI_STD)
    assert devices == {"cuda"}


@pytest.mark.parametrize("channels", [1, 4])
def test_every_channel_needs_a_mean(channels):
    with pytest.raises(ValueError, match="argument 2 is"):
        normalize(torch.zeros(2, channels, 4, 4, dtype=torch.uint8), OPENAI_MEAN, OPENAI_STD)


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


def by_pillow(data):
    """(3, H, W) uint8, or None where Pillow refuses."""
    try:
        return torch.from_numpy(np.array(open_image(data, "cat").convert("RGB"))).permute(2, 0, 1)
    except ValueError:
        return None


JPEGS = {
    "4:4:4": {"subsampling": "4:4:4"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:2:0": {"subsampling": "4:2:0"},
    "4:1:1": {"subsampling": "4:1:1"},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 3},
    "poor": {"quality": 5},
}


@pytest.mark.parametrize("width, height", [(64, 48), (61, 41), (17, 3), (1, 1)])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decoding_any_kind_of_jpeg_equals_pillow_but_for_rounding(mode, options, width, height):
    data = encoded(picture(width, height, mode), "JPEG", **options)
    assert jpeg_size(data) == (None if mode == "CMYK" else (height, width))
    assert (decode_rgb(data).int() - by_pillow(data).int()).abs().max() <= (0 if mode == "CMYK" else 2)


def test_a_jpeg_that_keeps_rgb_is_decoded_too():
    data = encoded(picture(61, 41), "JPEG", keep_rgb=True)
    assert (decode_rgb(data).int() - by_pillow(data).int()).abs().max() <= 2


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "PNG"])
def test_an_animation_is_decoded_to_its_first_picture(kind):
    first, second = picture(30, 20, seed=1), picture(30, 20, seed=2)
    data = encoded(first, kind, save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert torch.equal(decode_rgb(data), by_pillow(data))


@pytest.mark.parametrize("shrink", [1, 2, 4])
@pytest.mark.parametrize("width, height", [(64, 48), (61, 41), (66, 45)])
def test_shrinking_divides_the_sides_of_a_jpeg_and_rounds_up(width, height, shrink):
    data = encoded(picture(width, height), "JPEG")
    assert decode_rgb(data, shrink).shape == (3, math.ceil(height / shrink), math.ceil(width / shrink))
    flat = encoded(Image.new("RGB", (width, height), (200, 100, 50)), "JPEG", quality=100)
    assert (decode_rgb(flat, shrink).int() - torch.tensor([200, 100, 50]).view(3, 1, 1)).abs().max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "CMYK JPEG"])
def test_what_cannot_be_shrunk_comes_whole(kind):
    data = encoded(picture(64, 48, "CMYK"), "JPEG") if "CMYK" in kind else encoded(picture(64, 48), kind)
    assert torch.equal(decode_rgb(data, 4), by_pillow(data))


def readers(data):
    """Every way that training has of reading a picture, at full and at reduced resolution."""
    yield from (partial(decode_rgb, data, shrink) for shrink in (1, 2, 4))
    yield from (partial(Augmentation().decode, data, openai(R), np.random.default_rng(0)) for R in (5, 20, 40))


@pytest.mark.parametrize("kind, options", [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})])
@pytest.mark.parametrize("kept", [0.02, 0.1, 0.5, 0.9, 0.99])
def test_training_refuses_a_truncated_image(kind, options, kept):
    data = encoded(picture(90, 70), kind, **options)
    for read in readers(data[: int(kept * len(data))]):
        with pytest.raises(ValueError, match="the sample is "):
            read()


BOMBS = [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("WEBP", "RGB"), ("GIF", "P")]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind, mode", BOMBS)
def test_training_refuses_an_image_of_more_than_twice_pillows_limit(kind, mode, monkeypatch):
    data = encoded(picture(90, 70, mode), kind)
    for limit, is_refused in [(3149, True), (3150, False), (None, False)]:  # 90 * 70 = 2 * 3150
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for read in readers(data):
            if is_refused:
                with pytest.raises(ValueError, match=r"the sample is an unreadable image: .*decompression bomb"):
                    read()
            else:
                read()


def test_a_bomb_is_refused_by_its_header_before_memory_is_asked_for():
    data = bytearray(encoded(picture(90, 70), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xdc" * 2  # height and width: 65,500, which would unpack to 13 GB
    for read in readers(bytes(data)):
        with pytest.raises(ValueError, match="65500 x 65500 pixels, which could be a decompression bomb"):
            read()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("seeds", [range(80), pytest.param(range(80, 5000), marks=pytest.mark.long)], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_of_damaged_images_training_reads_those_that_pillow_reads(kind, seeds):
    whole, wrong = encoded(picture(20, 15), kind), []
    for seed in seeds:
        data = damaged(whole, seed)
        expected = by_pillow(data)
        try:
            found = decode_rgb(data)
        except ValueError:
            found = None
        if found is None or expected is None:
            is_right = found is expected
        else:
            is_right = found.shape == expected.shape and (found.int() - expected.int()).abs().max() <= 2
        if not is_right:
            wrong.append((seed, found))
    assert not wrong, f"{len(wrong)} of {len(seeds)}, the first: {wrong[:5]}"


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


@pytest.mark.parametrize("width, height", [(61, 40), (200, 150), (18, 15)])
def test_an_augmented_image_is_what_pillow_cuts_and_resizes_but_for_rounding(width, height):
    image, augmentation = picture(width, height), Augmentation(scale=(0.2, 1))
    for seed in range(10):
        top, left, h, w = augmentation.crop_box(height, width, np.random.default_rng(seed))
        expected = image.crop((left, top, left + w, top + h)).resize((16, 16), Image.Resampling.BICUBIC)
        found = augmentation(decode_rgb(encoded(image, "PNG")), 16, np.random.default_rng(seed))
        assert (found.permute(1, 2, 0).int() - torch.from_numpy(np.array(expected)).int()).abs().max() <= 1


def photograph(width, height, seed):
    """The spectrum of a photograph, which falls like 1 / f, and its pale colours."""
    drawn = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)).clip(1 / max(width, height))

    def field():
        noise = np.fft.irfft2(np.fft.rfft2(drawn.standard_normal((height, width))) / f**1.4, (height, width))
        return noise / noise.std()

    light, red, blue = 118 + 50 * field(), 16 * field(), 16 * field()
    return Image.fromarray(
        np.stack([light + red, light - (red + blue) / 3, light + blue], -1).clip(0, 255).astype("u1")
    )


WHOLE = [*BOMBS[3:5], ("small JPEG", "RGB"), ("small JPEG", "L"), ("damaged JPEG", "RGB")]
CROPS = [Augmentation(), Augmentation(flip=0.5), Augmentation(scale=(0.3, 1)), Augmentation(scale=(0.05, 0.2))]


def both_ways(augmentation, data, image_size, seed):
    """The picture augmented from its bytes and from all of its pixels, and the next random number after each."""
    for work, source, size in (
        (augmentation.decode, data, openai(image_size)),
        (augmentation, decode_rgb(data), image_size),
    ):
        drawn = np.random.default_rng(seed)
        yield work(source, size, drawn), drawn.random()


@pytest.mark.parametrize("augmentation", CROPS, ids=str)
@pytest.mark.parametrize("kind, mode", WHOLE)
def test_what_is_decoded_whole_is_augmented_as_its_pixels_are(kind, mode, augmentation):
    """The same pixels and the same use of random numbers, for small JPEGs and for all that cannot be shrunk."""
    data = encoded(
        picture(90, 70, mode), kind.split()[-1], **({"restart_marker_blocks": 3} if "damaged" in kind else {})
    )
    if "damaged" in kind:
        data = data.replace(b"\xff\xd0", bytes(5) + b"\xff\xd0", 1)
        assert jpeg_size(data) == (70, 90)
        with pytest.raises(ValueError, match="extraneous bytes"):
            simplejpeg.decode_jpeg(data)
    for seed in range(8):
        (found, after), (expected, expected_after) = both_ways(augmentation, data, 40 if "small" in kind else 7, seed)
        assert torch.equal(found, expected)
        assert after == expected_after


def clear_square(mode, size):
    """A blue square on orange, whose left half is wholly transparent, and whose lower half by a half."""
    W, H = size
    pixels = np.full((H, W, 4), (250, 120, 10, 255), np.uint8)
    pixels[H // 4 : H // 2, W // 4 : 3 * W // 4] = 10, 20, 250, 255
    pixels[H // 2 :, :, 3], pixels[:, : W // 2, 3] = 128, 0
    whole = Image.fromarray(pixels)
    if mode == "LA":
        return Image.merge("LA", [whole.convert("RGB").convert("L"), whole.getchannel("A")])
    return whole if mode == "RGBA" else whole.convert("RGB").quantize(8) if mode == "P" else whole.convert("RGB")


OWN_MODES = {
    "alpha": ("RGBA", "PNG", {}),
    "grey and alpha": ("LA", "PNG", {}),
    "palette": ("P", "GIF", {}),
    "transparent palette": ("P", "PNG", {"transparency": 1}),
    "transparent colour": ("RGB", "PNG", {"transparency": (250, 120, 10)}),
}


@pytest.mark.parametrize("kind", OWN_MODES)
@pytest.mark.parametrize("size", [(90, 70), (40, 61), (20, 13)])
def test_training_resizes_before_rgb_as_open_clip_trains(kind, size):
    """Its `image_transform(is_train=True)` is torchvision's crop of a picture of Pillow's, and RGB after that."""
    mode, file_format, options = OWN_MODES[kind]
    data, augmentation = encoded(clear_square(mode, size), file_format, **options), Augmentation(scale=(0.2, 1))
    stored = open_image(data, "cat")
    for seed in range(8):
        drawn, again = np.random.default_rng(seed), np.random.default_rng(seed)
        found = augmentation.decode(data, openai(24), drawn)
        box = augmentation.crop_box(stored.height, stored.width, again)
        again.random()  # of the flip
        expected = functional.resized_crop(stored, *box, [24, 24], interpolation=InterpolationMode.BICUBIC)
        difference = (found.int() - torch.from_numpy(np.array(expected.convert("RGB"))).permute(2, 0, 1).int()).abs()
        assert difference.max() <= (1 if stored.mode == "RGB" else 0)
        assert drawn.random() == again.random()


@pytest.mark.parametrize("style", ["openai", "hf"])
@pytest.mark.parametrize("kind", OWN_MODES)
@pytest.mark.parametrize("side", [24, 40, 90])
def test_training_without_a_crop_sees_transparency_as_the_models_inference_does(kind, style, side):
    """At 24 pixels, the model's own size, nothing is resized, and OpenAI's way keeps the colours that are stored."""
    mode, file_format, options = OWN_MODES[kind]
    data = encoded(clear_square(mode, (side, side)), file_format, **options)
    preprocess = openai(24, style=style)
    found = Augmentation(scale=(1, 1), ratio=(1, 1)).decode(data, preprocess, np.random.default_rng(0))
    assert (found.int() - preprocess.crop(open_image(data, "cat")).int()).abs().max() <= 1
    corner = {"hf": (255, 255, 255), "openai": (0, 0, 0) if side > 24 else (250, 120, 10)}[style]
    if mode == "RGBA":
        assert found[:, 0, 0].tolist() == list(corner)


def test_a_part_that_has_the_models_size_already_has_the_colours_of_all_others():
    image = clear_square("RGBA", (40, 40))
    parts = [np.asarray(openai(24).part(image, (0, 0, side, side)))[0, 0].tolist() for side in (23, 24, 25)]
    assert parts == [[0, 0, 0]] * 3
    kept = [np.asarray(openai(40).part(image, (0, 0, side, side)))[0, 0].tolist() for side in (23, 40)]
    assert kept == [[250, 120, 10]] * 2


@pytest.mark.parametrize("side, shrink", [(63, 1), (64, 2), (127, 2), (128, 4), (300, 4)])
def test_a_jpeg_is_shrunk_as_far_as_the_crop_keeps_the_models_pixels(side, shrink):
    data = encoded(photograph(side, side, 0), "JPEG")
    found = Augmentation(scale=(1, 1), ratio=(1, 1)).decode(data, openai(32), np.random.default_rng(0))
    whole = decode_rgb(data, shrink)[None]
    expected = functional.resize(whole, [32, 32], interpolation=InterpolationMode.BICUBIC, antialias=True)[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "width, height, image_size, shrink, mean, most",
    [(512, 512, 224, 2, 1.5, 16), (513, 511, 160, 2, 1.0, 12), (512, 512, 112, 4, 2.0, 18), (401, 467, 56, 4, 1.0, 10)],
)
def test_a_shrunk_jpeg_differs_by_little_from_the_whole_one_resized(width, height, image_size, shrink, mean, most):
    """In levels of 255: on the average of a picture at most `mean`, at any pixel at most `most`.

    Against the crop whose edges are the nearest to those drawn on the grid of 2 or 4 pixels.
    """
    augmentation = Augmentation()
    for seed in range(6):
        data = encoded(photograph(width, height, seed), "JPEG", quality=90)
        (found, after), (_, expected_after) = both_ways(augmentation, data, image_size, seed)
        assert after == expected_after
        top, left, h, w = augmentation.crop_box(height, width, np.random.default_rng(seed))
        assert shrink * image_size <= min(h, w)
        edges = [(edge + shrink // 2) // shrink * shrink for edge in (top, left, top + h, left + w)]
        top, left, bottom, right = edges
        expected = functional.resized_crop(
            torch.nn.functional.pad(decode_rgb(data)[None].float(), (0, shrink, 0, shrink), mode="replicate")[0].byte(),
            top, left, bottom - top, right - left,
            [image_size, image_size], interpolation=InterpolationMode.BICUBIC, antialias=True,
        )  # fmt: skip
        difference = (found.int() - expected.int()).abs().float()
        assert difference.mean() <= mean
        assert difference.max() <= most


@pytest.mark.parametrize("image_size", [1, 2, 3, 7, 15])
@pytest.mark.parametrize("H, W", ASPECTS)
def test_a_jpeg_of_any_shape_gives_a_square(H, W, image_size):
    data = encoded(Image.new("RGB", (W, H), (77, 77, 77)), "JPEG")
    for augmentation in SETTINGS:
        for seed in range(20):
            result = augmentation.decode(data, openai(image_size), np.random.default_rng(seed))
            assert (result.dtype, result.shape) == (torch.uint8, (3, image_size, image_size))
            assert result.eq(77).all()


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
        ("color", (0.1, 0.1, 0.1), "(0.1, 0.1, 0.1)"),
        ("color", (0.1, 0.1, 0.1, 0.6), "(0.1, 0.1, 0.1, 0.6)"),
        ("color", (1.1, 0, 0, 0), "(1.1, 0, 0, 0)"),
        ("color", (0, -1, 0, 0), "(0, -1, 0, 0)"),
        ("color", 0.4, "0.4"),
        ("color_probability", 2, "2"),
        ("color_probability", 0.5, "is 0.5, and color is (0.0, 0.0, 0.0, 0.0), so no picture is recoloured"),
        ("grey", -1, "-1"),
    ],
)
def test_a_bad_field_is_refused_naming_it_and_its_value(field, value, shown):
    with pytest.raises(ValueError, match=rf"\b{field}\b") as caught:
        Augmentation(**{field: value})
    assert shown in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Colours

WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


def augmented(number: int, **options) -> torch.Tensor:
    image = torch.from_numpy(np.array(picture(32, 32))).permute(2, 0, 1)
    return Augmentation(**WHOLE, **options)(image, 32, np.random.default_rng(number))


def test_without_colour_changes_the_random_numbers_and_the_pixels_are_those_of_before():
    image = torch.from_numpy(np.array(picture(32, 32))).permute(2, 0, 1)
    assert torch.equal(augmented(3), image)
    random = np.random.default_rng(3)
    Augmentation(**WHOLE)(image, 32, random)
    with_grey_off = np.random.default_rng(3)
    Augmentation(**WHOLE, color=(0, 0, 0, 0), grey=0.0)(image, 32, with_grey_off)
    assert random.random() == with_grey_off.random()


def test_grey_has_three_equal_channels_of_the_luma_and_comes_as_often_as_asked():
    plain = augmented(0).float()
    grey = augmented(0, grey=1.0)
    assert torch.equal(grey[0], grey[1])
    assert torch.equal(grey[0], grey[2])
    luma = 0.299 * plain[0] + 0.587 * plain[1] + 0.114 * plain[2]  # ITU-R 601
    assert (grey[0].float() - luma).abs().max() <= 1.05  # torchvision rounds down, and 0.299 to 0.2989
    times = sum(torch.equal(image[0], image[1]) for image in (augmented(n, grey=0.3) for n in range(300)))
    assert 60 <= times <= 120


def test_brightness_multiplies_and_stays_within_its_bounds():
    plain = augmented(0).float()
    factors = []
    for number in range(60):
        bright = augmented(number, color=(0.3, 0, 0, 0), color_probability=1.0).float()
        is_inside = (plain > 30) & (bright < 255)
        factor = float((bright[is_inside] / plain[is_inside]).median())
        assert (bright - (plain * factor).clamp(0, 255)).abs().max() <= 6
        factors.append(factor)
    assert 0.68 <= min(factors) < 0.8
    assert 1.2 < max(factors) <= 1.32


def test_saturation_and_contrast_keep_the_luma_or_its_mean_and_hue_keeps_grey():
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    plain = augmented(0).float()
    for number in range(10):
        saturated = augmented(number, color=(0, 0, 0.2, 0), color_probability=1.0).float()
        inside = ((saturated > 0) & (saturated < 255)).all(dim=0)
        assert ((saturated - plain) * weights).sum(dim=0)[inside].abs().max() <= 2
    grey = torch.full((3, 32, 32), 90, dtype=torch.uint8)
    turned = Augmentation(**WHOLE, color=(0, 0, 0, 0.5), color_probability=1.0)(grey, 32, np.random.default_rng(1))
    assert torch.equal(turned, grey)
    assert not torch.equal(augmented(1, color=(0, 0, 0, 0.5), color_probability=1.0), augmented(1))


def test_colours_are_the_same_for_the_same_random_state_and_change_as_often_as_asked():
    options = {"color": (0.4, 0.4, 0.4, 0.1), "color_probability": 0.5, "grey": 0.2}
    assert torch.equal(augmented(5, **options), augmented(5, **options))
    changed = sum(not torch.equal(augmented(n, **{**options, "grey": 0}), augmented(n)) for n in range(200))
    assert 70 <= changed <= 130
    assert augmented(5, **options).dtype == torch.uint8
