"""`miniclip shards --upright`: turned pictures are stored as viewers show them. Oracle: Pillow's `exif_transpose`."""

import io
import json

import numpy as np
import pytest
from helpers import members, pack_folder
from PIL import Image, ImageOps

from miniclip.commands import main as cli

SIDES = (48, 32)  # multiples of a JPEG's blocks of 16 pixels


def smooth(size=SIDES, mode="RGB"):
    """A picture as cameras take them: no noise, no two corners alike."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return Image.fromarray((np.stack([x, y, x * y], axis=-1) * 250).astype(np.uint8)).convert(mode)


def write(path, tag, image=None, **options):
    image = image or smooth()
    exif = image.getexif()
    exif[0x0112] = tag
    image.save(path, exif=exif.tobytes(), **options)
    path.with_suffix(".txt").write_text(f"caption {tag}")
    return path


def packed_picture(tmp_path, path, suffix, **fields):
    packed = pack_folder(path.parent, tmp_path / "out", upright=True, **fields)
    found = members(tmp_path / "out" / "00000.tar")
    return packed, found[f"000000000.{suffix}"], json.loads(found["000000000.json"])


def oracle(path):
    return ImageOps.exif_transpose(Image.open(path))


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize(("kind", "stored"), [("jpg", "jpg"), ("png", "png"), ("webp", "png"), ("tiff", "png")])
def test_all_eight_orientations_are_stored_as_viewers_show_them(tmp_path, kind, stored, tag):
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / f"a.{kind}", tag, **({"lossless": True} if kind == "webp" else {}))
    is_kept = tag == 1 and kind != "tiff"
    packed, data, facts = packed_picture(tmp_path, path, kind if is_kept else stored)
    assert packed.turned == (tag > 1 and kind != "tiff")  # Pillow turns TIFF as it opens it
    expected = oracle(path)
    image = Image.open(io.BytesIO(data))
    assert image.size == expected.size == (facts["width"], facts["height"])
    assert image.getexif().get(0x0112, 1) == 1
    if is_kept:
        assert data == path.read_bytes()
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(expected.convert("RGB"), dtype=int))
    assert difference.max() <= (4 if kind == "jpg" else 0)


@pytest.mark.parametrize("quality", [60, 90])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("tag", [3, 6])
def test_a_jpeg_that_is_turned_loses_less_than_by_saving_it_at_the_best_quality(tmp_path, quality, subsampling, tag):
    (tmp_path / "in").mkdir()
    noisy = np.asarray(smooth()).astype(int) + np.random.default_rng(0).integers(-20, 20, (32, 48, 3))
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    path = write(tmp_path / "in" / "a.jpg", tag, image, quality=quality, subsampling=subsampling)
    _, data, _ = packed_picture(tmp_path, path, "jpg")
    expected, buffer = oracle(path), io.BytesIO()
    expected.save(buffer, "JPEG", quality=95)
    errors = [
        np.square(np.asarray(Image.open(io.BytesIO(each)), dtype=float) - np.asarray(expected, dtype=float)).mean()
        for each in (data, buffer.getvalue())
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpegs_of_other_colours_are_turned(tmp_path, mode):
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / "a.jpg", 6, smooth(mode=mode), quality=95)
    _, data, _ = packed_picture(tmp_path, path, "jpg")
    found, expected = (
        np.asarray(each.convert("RGB"), dtype=int) for each in (Image.open(io.BytesIO(data)), oracle(path))
    )
    assert np.abs(found - expected).max() <= 12


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1"])
def test_a_png_keeps_its_mode_and_its_transparency(tmp_path, mode):
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / "a.png", 8, smooth(mode=mode), **({"transparency": 3} if mode == "P" else {}))
    _, data, _ = packed_picture(tmp_path, path, "png")
    found, expected = Image.open(io.BytesIO(data)), oracle(path)
    assert found.mode == expected.mode
    assert found.convert("RGBA").tobytes() == expected.convert("RGBA").tobytes()


def test_pictures_are_turned_before_they_are_shrunk_and_judged(tmp_path):
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / "a.png", 6)
    _, data, facts = packed_picture(tmp_path, path, "jpg", resize=16)
    buffer = io.BytesIO()
    oracle(path).resize((16, 24), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    assert data == buffer.getvalue()
    assert (facts["width"], facts["height"]) == (16, 24)


def test_without_the_option_every_byte_is_kept(tmp_path):
    (tmp_path / "in").mkdir()
    path = write(tmp_path / "in" / "a.jpg", 6)
    packed = pack_folder(path.parent, tmp_path / "out")
    assert members(tmp_path / "out" / "00000.tar")["000000000.jpg"] == path.read_bytes()
    assert packed.turned == 0


def test_the_command_prints_how_many_it_turned_and_the_index_keeps_it(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for number, tag in enumerate((1, 3, 6, 8)):
        write(tmp_path / "in" / f"{number}.jpg", tag)
    (tmp_path / "in" / "4.jpg").write_bytes(b"\xff\xd8\xff\xe1 no picture \xff\xd9")
    (tmp_path / "in" / "4.txt").write_text("a damaged one")
    out = tmp_path / "out"
    cli.main(["shards", str(tmp_path / "in"), str(out), "--upright", "--val-fraction", "0.5"])
    assert "; 3 turned upright; 1 rejected" in capsys.readouterr().out
    assert {json.loads((out / side / "index.json").read_text())["turned"] for side in ("train", "val")} == {3}


def test_an_index_alone_turns_nothing_and_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["shards", str(tmp_path), "--index-only", "--upright"])
    assert "--upright is for packing, and --index-only leaves tars as they are" in capsys.readouterr().err
