# transforms.py's two ways to make a picture square. Oracles: torchvision in OpenAI's order, transformers' processor.

import io
import struct
import zlib
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from miniclip.config import OPENAI_MEAN, OPENAI_STD
from miniclip.data.augmentation import decode_rgb
from miniclip.images import Preprocess, open_image, rgb_as_seen

MODES = ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"]
SIZES = [
    (24, 24), (25, 24), (24, 25), (27, 24), (24, 31), (61, 40), (40, 61), (23, 57), (57, 23), (13, 13), (1, 1), (3, 3),
    (1, 50), (50, 1), (3, 200), (200, 3), (640, 25), (101, 99),
]  # fmt: skip


def picture(mode, size, seed=0):
    """Smooth colours with noise, and transparency where there is some."""
    width, height = size
    chance = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    channels = [x * 200 // width, y * 195 // height, (x * y) % 190, (x + 2 * y) % 180]
    pixels = np.stack(channels, axis=-1) + chance.integers(0, 60, (height, width, 4))
    four = Image.fromarray(pixels.astype(np.uint8))
    if mode in ("RGBA", "CMYK"):
        return four if mode == "RGBA" else Image.fromarray(pixels.astype(np.uint8), mode="CMYK")
    if mode == "LA":
        return Image.merge("LA", [four.getchannel("R"), four.getchannel("A")])
    rgb = four.convert("RGB")
    return rgb.quantize(17) if mode == "P" else rgb.convert(mode)


def openai_transform(size):
    """`_transform` of OpenAI's clip/clip.py."""
    to_rgb = lambda image: image.convert("RGB")  # noqa: E731
    resize = Resize(size, interpolation=InterpolationMode.BICUBIC)
    return Compose([resize, CenterCrop(size), to_rgb, ToTensor(), Normalize(OPENAI_MEAN, OPENAI_STD)])


def preprocess(style, size=24):
    return Preprocess(size, OPENAI_MEAN, OPENAI_STD, style)


def hf_processor(size=24):
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def hf_pixels(processor, image):
    return torch.from_numpy(np.asarray(processor(image)["pixel_values"][0]))


@pytest.mark.parametrize("mode", MODES)
def test_openais_way_equals_torchvision_bit_for_bit(mode):
    for size in SIZES:
        for target in (24, 25):
            image = picture(mode, size)
            assert torch.equal(preprocess("openai", target)(image), openai_transform(target)(image)), (size, target)


@pytest.mark.parametrize("mode", MODES)
def test_hugging_faces_way_equals_its_processor(mode):
    for target in (24, 25):
        processor = hf_processor(target)
        for size in SIZES:
            image = picture(mode, size)
            found, expected = preprocess("hf", target)(image), hf_pixels(processor, image)
            assert found.shape == expected.shape == (3, target, target)
            assert (found - expected).abs().max() <= 1e-6, (size, target)


@pytest.mark.parametrize("style", ["openai", "hf"])
@pytest.mark.parametrize("size", [(640, 427), (333, 500), (224, 224), (225, 300)])
def test_both_ways_hold_at_the_resolution_of_real_models(style, size):
    image = picture("RGB", size)
    expected = hf_pixels(hf_processor(224), image) if style == "hf" else openai_transform(224)(image)
    assert (preprocess(style, 224)(image) - expected).abs().max() <= 1e-6


def test_the_two_ways_differ_for_palettes_and_odd_margins_alone():
    same = picture("RGB", (40, 24))
    assert torch.equal(preprocess("openai")(same), preprocess("hf")(same))
    palette = picture("P", (61, 40))
    assert not torch.equal(preprocess("openai")(palette), preprocess("hf")(palette))
    odd = picture("RGB", (27, 24))  # a margin of 1.5: OpenAI's rounds to 2, Hugging Face's down to 1
    assert torch.equal(preprocess("openai").crop(odd)[:, :, :-1], preprocess("hf").crop(odd)[:, :, 1:])


def test_transparency_lies_on_white_as_in_transformers():
    white = Image.new("RGB", (30, 30), (255, 255, 255))
    assert torch.equal(hf_pixels(hf_processor(), Image.new("RGBA", (30, 30))), hf_pixels(hf_processor(), white))
    assert torch.equal(preprocess("hf").crop(Image.new("RGBA", (30, 30))), preprocess("hf").crop(white))


def test_a_palette_with_a_transparent_colour_equals_both_oracles():
    buffer = io.BytesIO()
    picture("P", (61, 40)).save(buffer, "PNG", transparency=3)
    image = Image.open(io.BytesIO(buffer.getvalue()))
    assert torch.equal(preprocess("openai")(image), openai_transform(24)(image))
    assert (preprocess("hf")(image) - hf_pixels(hf_processor(), image)).abs().max() <= 1e-6


# ---- 16 bits


def gradient(most=65535, size=(60, 40)):
    """Grey from black on the left to `most` on the right."""
    row = np.linspace(0, most, size[0])
    return np.repeat(row[None], size[1], axis=0).round().astype(np.uint16)


def opened(array, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return open_image(buffer.getvalue(), "x")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_16_bit_picture_becomes_the_8_bit_one_that_it_looks_like(kind):
    values = gradient()
    image = opened(values, kind)
    assert image.mode == "L"
    assert np.abs(np.asarray(image).astype(int) - values / 257).max() <= 1
    for style in ("openai", "hf"):
        pixels = preprocess(style).crop(image).float()
        looks_like = preprocess(style).crop(Image.fromarray((values / 257).round().astype(np.uint8))).float()
        assert (pixels - looks_like).abs().max() <= 2


@pytest.mark.parametrize("most", [0, 300, 4095])
def test_a_16_bit_picture_that_is_dark_is_neither_brightened_to_white_nor_lost(most):
    image = np.asarray(opened(gradient(most)))
    assert image.dtype == np.uint8
    assert (np.diff(image[0].astype(int)) >= 0).all(), "brightness keeps its order"
    assert image.max() <= max(most // 256, 0) + 1


def test_16_bit_pictures_of_one_scene_with_and_without_a_bright_pixel_look_alike():
    """A picture's own brightest value must not decide how its depth is read: a 16-bit 200 is nearly black."""
    dark = gradient(200)
    bright = dark.copy()
    bright[0, 0] = 60_000
    found = [np.asarray(opened(array)).astype(int)[:, 1:] for array in (dark, bright)]
    assert np.abs(found[0] - found[1]).max() <= 1


def test_a_32_bit_picture_of_small_values_keeps_them():
    values = np.arange(256, dtype=np.int32).reshape(16, 16)
    buffer = io.BytesIO()
    Image.fromarray(values, mode="I").save(buffer, "TIFF")
    assert np.array_equal(np.asarray(open_image(buffer.getvalue(), "x")), values)


# ---- Shapes that would take gigabytes, or nothing


@pytest.mark.parametrize("style", ["openai", "hf"])
@pytest.mark.parametrize("size", [(2, 9000), (9001, 2), (3, 9001), (12000, 5)])
def test_of_a_long_strip_the_middle_alone_is_resized_to_the_same_pixels(style, size, monkeypatch):
    image, ours = picture("RGB", size), preprocess(style, 32)
    whole = ours.crop(image).int()
    resized = []
    original = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, *a: resized.append(to) or original(self, to, *a))
    monkeypatch.setattr(ours, "MOST_PIXELS", 1 << 18)
    assert (ours.crop(image).int() - whole).abs().max() <= 2
    assert max(resized[0]) <= 32 * 9


def test_a_picture_without_pixels_is_refused_with_its_size():
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        preprocess("openai")(Image.new("RGB", (0, 5)))


# ---- floats


@pytest.mark.parametrize("top", [1, 255])
def test_a_picture_of_floats_is_the_8_bit_one_that_it_looks_like_and_not_black(top):
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.float32), (8, 1))
    buffer = io.BytesIO()
    Image.fromarray(ramp * (top / 255)).save(buffer, "TIFF")
    assert np.array_equal(np.asarray(open_image(buffer.getvalue(), "a.tif")), ramp.astype(np.uint8))


@pytest.mark.parametrize("values, shown", [((-5, 90), "-5 to 90"), ((0, 4000), "0 to 4000"), ((0, np.nan), "nan")])
def test_floats_whose_black_and_white_are_unknown_are_refused(values, shown):
    buffer = io.BytesIO()
    Image.fromarray(np.tile(np.array(values, dtype=np.float32), (4, 2))).save(buffer, "TIFF")
    with pytest.raises(ValueError, match=rf"a\.tif has floats.*{shown}.*scale them to 0 to 1"):
        open_image(buffer.getvalue(), "a.tif")


@pytest.mark.parametrize(
    ("prepared", "colours"),
    [
        (preprocess("openai"), [[0, 0, 0], [200, 30, 30]]),  # 24 pixels of 40: what is wholly transparent turns black
        (
            preprocess("hf"),
            [[255, 255, 255], [227, 142, 142]],
        ),  # on white: 128 / 255 of 200, 30, 30 and the rest of 255
        (lambda image: torch.from_numpy(np.array(image.convert("RGB"))), [[9, 8, 7], [200, 30, 30]]),
    ],
)
def test_a_transparent_picture_has_the_colours_that_its_model_sees(prepared, colours):
    pixels = np.full((40, 40, 4), (9, 8, 7, 0), np.uint8)
    pixels[20:] = 200, 30, 30, 128
    seen = np.asarray(rgb_as_seen(Image.fromarray(pixels), prepared), dtype=int)
    assert seen.shape == (40, 40, 3)
    assert np.abs(seen[[0, -1], 0] - colours).max() <= 2


def encoded(kind, size=(64, 64), **options):
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, kind, **options)
    return file.getvalue()


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def chunk(name, content=b""):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def tiff(num_pages, more_tags=(), tail=b""):
    """Pages of a pixel, the first of which calls itself a smaller copy of another one, and has two."""
    file = bytearray(b"II*\0\x08\0\0\0")
    for page in range(num_pages):
        width = 2 - min(page, 1)
        tags = [(254, 4, 1, 1), (256, 3, 1, width), (257, 3, 1, 1), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
                (273, 4, 1, 8), (278, 3, 1, 1), (279, 4, 1, width), *more_tags]  # fmt: skip
        following = len(file) + 6 + 12 * len(tags)
        file += struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        file += struct.pack("<I", following if page + 1 < num_pages else 0)
    return bytes(file) + tail


def same_bytes(num_tags, num_bytes):
    return tiff(1, [(1000 + tag, 7, num_bytes, 8) for tag in range(num_tags)], bytes(num_bytes))


def exif(content):
    parts = (content[start : start + 65_000] for start in range(0, len(content), 65_000))
    return b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts)


JPEG, GIF, PNG, TOO_MANY = encoded("JPEG"), encoded("GIF"), encoded("PNG"), "more parts than any real picture has"
GIF_HEADER = 13 + 3 * 2 ** ((GIF[10] & 7) + 1)
SLOW = {
    "a JPEG of 400,000 segments": (lambda: JPEG[:2] + segment(0xFE, b"x") * 400_000 + JPEG[2:], TOO_MANY),
    "a JPEG of 10 MB before its first segment": (lambda: JPEG[:2] + b"\xff" * 10**7 + JPEG[2:], TOO_MANY),
    "a PPM with a comment of 50 MB": (lambda: b"P6\n#" + b"x" * 50_000_000 + b"\n1 1\n255\nabc", TOO_MANY),
    "a PPM with a comment at each pixel": (lambda: b"P3\n200 200\n255\n" + b"1#\n" * 120_000, "120,000 comments"),
    "a GIF with a comment of 10 MB": (
        lambda: GIF[:GIF_HEADER] + b"\x21\xfe" + (b"\xff" + b"x" * 255) * 40_000 + b"\0" + GIF[GIF_HEADER:],
        TOO_MANY,
    ),
    "a PNG of 60,000 chunks": (lambda: PNG[:-12] + chunk(b"ruSt") * 60_000 + PNG[-12:], TOO_MANY),
    "a TIFF of 20,000 pages": (lambda: tiff(20_000), TOO_MANY),
    "a TIFF whose tags are 1.2 GB": (lambda: same_bytes(4_000, 300_000), TOO_MANY),
    "a JPEG whose EXIF is 1.2 GB": (
        lambda: JPEG[:2] + exif(same_bytes(4_000, 300_000)) + JPEG[2:],
        "its EXIF names 4,009 tags in 65,000 bytes",
    ),
}


@pytest.mark.parametrize("kind", SLOW)
def test_a_file_that_no_camera_or_program_writes_and_that_pillow_takes_long_for_is_refused(kind):
    data, message = SLOW[kind]
    with pytest.raises(ValueError, match=f"a.x is an unreadable image: .*{message}"):
        open_image(data(), "a.x")


def test_a_jpeg_of_thousands_of_scans_that_each_pass_over_all_pixels_is_refused():
    """Progressive, or with a scan for each channel."""
    scans = (b"\xff\xda\0\x08\1" + bytes([channel, 0, 0, 63, 0]) for channel in (1, 2, 3))
    end = JPEG.index(b"\xff\xda")
    size = JPEG.index(b"\xff\xc0") + 5
    by_channel = JPEG[:size] + struct.pack(">HH", 1000, 1000) + JPEG[size + 4 : end] + b"".join(scans) * 2_000
    progressive = encoded("JPEG", (1000, 1000), progressive=True)
    start = progressive.rindex(b"\xff\xda")
    for data in (by_channel, progressive[:start] + progressive[start : start + 12] * 5_000 + progressive[start:]):
        for read in (partial(open_image, source="a"), decode_rgb):  # by Pillow, and as training does
            with pytest.raises(ValueError, match="its 1000 x 1000 pixels are stored in more than 4,294 scans"):
                read(data)


REAL = {
    "a colour profile of 500 kB in a GIF": lambda: (
        GIF[:GIF_HEADER] + b"\x21\xff\x0bICCRGBG1012" + (b"\xff" + bytes(255)) * 2_000 + b"\0" + GIF[GIF_HEADER:]
    ),
    "a JPEG with 32 MB of XMP": lambda: JPEG[:2] + segment(0xE1, b"http" + bytes(65_000)) * 500 + JPEG[2:],
    "a PPM with its history": lambda: b"P6\n" + b"# made by a program\n" * 50 + b"1 1\n255\nabc",
    "EXIF of 600 kB": lambda: JPEG[:2] + exif(same_bytes(100, 600_000)) + JPEG[2:],
    "a TIFF of 100 pages": lambda: tiff(100),
    "a PNG of a chunk for each row": lambda: rows(1_000),
    "a progressive JPEG before many others": lambda: encoded("JPEG", (600, 600), progressive=True) + JPEG * 12_000,
}


def rows(height):
    pixels, packer = bytes(4), zlib.compressobj()
    data = b"".join(
        chunk(b"IDAT", packer.compress(pixels) + packer.flush(zlib.Z_SYNC_FLUSH)) for _ in range(height)
    ) + chunk(b"IDAT", packer.flush())
    return PNG[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, height, 8, 2, 0, 0, 0)) + data + chunk(b"IEND")


@pytest.mark.parametrize("kind", REAL)
def test_a_file_of_many_parts_as_cameras_and_programs_write_them_is_read(kind):
    picture = open_image(REAL[kind](), "a")
    picture.load()
    assert min(picture.size) > 0
