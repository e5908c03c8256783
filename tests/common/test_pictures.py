"""Small pictures of pages have the colours that a model sees under transparency."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from miniclip.common.pictures import as_seen, shrunk, thumbnail
from miniclip.images import Preprocess
from miniclip.reports.heat import overlay


def logo(mode="RGBA", size=(40, 40)):
    """A red square, or a grey one, on white that is wholly transparent."""
    pixels = np.full((40, 40, 4), (255, 255, 255, 0), np.uint8)
    pixels[10:30, 10:30] = 200, 30, 30, 255
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("side", [16, 29, 64])
def test_an_alpha_channel_is_seen_as_preprocessing_sees_it(mode, side):
    image = logo(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    expected = Preprocess(side, (0,) * 3, (1,) * 3).crop(image).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(np.asarray(as_seen(image, (side, side), Image.Resampling.BICUBIC)), expected)


@pytest.mark.parametrize("side", [10, 40, 500])
def test_what_is_wholly_transparent_is_black_on_a_page(side):
    url = thumbnail(logo(size=(side, side)), (40, 40))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))), dtype=int)
    assert shown.shape == (40, 40, 3)
    assert shown[:6].max() < 60  # the rings of JPEG around an edge
    assert np.abs(shown[18:22, 18:22] - (200, 30, 30)).max() < 60
    small = np.asarray(shrunk(logo(size=(side, side)), 40))
    assert small.shape == (min(side, 40), min(side, 40), 3)
    assert small[0, 0].tolist() == [0, 0, 0]
    assert small[len(small) // 2, len(small) // 2].tolist() == [200, 30, 30]
    grey = np.asarray(overlay(logo(size=(side, side)), np.zeros((side, side))))
    assert grey[0, 0].max() == 70  # of black


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_colour_that_is_called_transparent_is_seen_as_it_is_stored(mode):
    image, buffer = logo("RGB").convert(mode), io.BytesIO()
    image.save(buffer, "PNG", transparency=image.getpixel((0, 0)))
    opened = Image.open(buffer)
    seen = Preprocess(40, (0,) * 3, (1,) * 3).crop(opened).permute(1, 2, 0).numpy()
    assert seen[0, 0].tolist() == [255, 255, 255]
    np.testing.assert_array_equal(np.asarray(as_seen(opened)), seen)
