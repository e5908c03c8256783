"""Pictures that EXIF asks a viewer to turn. Oracle: Pillow's `exif_transpose`."""

import io
import struct

import numpy as np
import pytest
from helpers import picture
from PIL import Image, ImageOps

from miniclip.images import open_image, orientation, read_header, upright

FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"]


def encoded(image, kind, tag):
    exif = image.getexif()
    exif[0x0112] = tag
    buffer = io.BytesIO()
    image.save(buffer, kind, exif=exif.tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("tag", range(1, 9))
def test_all_eight_orientations_are_turned_as_pillow_turns_them(kind, tag):
    data = encoded(picture(1), kind, tag)
    stored = open_image(data, "x")
    found, expected = upright(stored), ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert found.size == expected.size == ((20, 24) if tag > 4 else (24, 20))
    assert found.tobytes() == expected.tobytes()
    assert (found is stored) == (tag == 1 or kind == "TIFF")  # Pillow turns TIFF as it opens it
    assert orientation(stored) == orientation(read_header(data)) == (1 if kind == "TIFF" else tag)
    assert upright(found) is found
    assert ImageOps.exif_transpose(found).tobytes() == found.tobytes(), "no library turns it twice"


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA"])
def test_pictures_of_every_mode_are_turned(mode):
    data = encoded(picture(1, mode=mode), "PNG", 6)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    found = upright(open_image(data, "x"))
    assert (found.mode, found.tobytes(), found.getpalette()) == (mode, expected.tobytes(), expected.getpalette())


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_16_bit_picture_is_turned_too(kind):
    values = np.arange(12, dtype=np.uint16).reshape(3, 4) << 8
    found = upright(open_image(encoded(Image.fromarray(values), kind, 6), "x"))
    assert np.array_equal(np.asarray(found), np.rot90(values >> 8, -1))


def test_the_tag_of_xmp_counts_as_in_pillow():
    buffer = io.BytesIO()
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    picture(1).save(buffer, "JPEG", xmp=packet)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue())))
    found = upright(open_image(buffer.getvalue(), "x"))
    assert found.tobytes() == expected.tobytes()
    assert ImageOps.exif_transpose(found).tobytes() == found.tobytes()


def with_exif(block):
    """A JPEG whose EXIF segment holds these bytes."""
    buffer = io.BytesIO()
    picture(1).save(buffer, "JPEG")
    segment = b"Exif\0\0" + block
    return b"\xff\xd8\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + buffer.getvalue()[2:]


def one_tag(kind, count, value):
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI", 0x0112, kind, count) + value + b"\0\0\0\0"


BROKEN = {
    "no TIFF": b"nonsense",
    "empty": b"",
    "cut short": b"MM\0*\0\0\0\x08\0\x05\x01\x12",
    "an offset beyond the end": b"II*\0\xff\xff\xff\x7f",
    "a value beyond the end": one_tag(3, 1000, b"\xff\xff\xff\x7f"),
    "a text": one_tag(2, 4, b"six\0"),
    "zero": one_tag(3, 1, struct.pack("<HH", 0, 0)),
    "nine": one_tag(3, 1, struct.pack("<HH", 9, 0)),
    "an unknown type": one_tag(77, 1, b"\x06\0\0\0"),
}


@pytest.mark.parametrize("block", BROKEN.values(), ids=BROKEN)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of corrupt EXIF
def test_broken_exif_turns_nothing(block):
    data = with_exif(block)
    stored = open_image(data, "x")
    assert upright(stored) is stored
    assert orientation(read_header(data)) == 1


def test_exif_whose_tags_all_name_the_same_bytes_turns_nothing():
    """Pillow would copy 2 GB."""
    for num_tags, tag in ((10, 6), (10_000, 1)):
        others = b"".join(struct.pack("<HHII", 1000 + each, 7, 200_000, 8) for each in range(num_tags))
        exif = b"II*\0\x08\0\0\0" + struct.pack("<H", num_tags + 1) + one_tag(3, 1, b"\6\0\0\0")[10:22] + others
        exif += bytes(200_000)
        for name, value in (("exif", b"Exif\0\0" + exif), ("Raw profile type exif", "\nexif\n8\n" + exif.hex())):
            stored = picture(1)
            stored.info[name] = value
            assert orientation(stored) == tag
