# Which pictures are opened. A closed list, whatever a file is called: Pillow's other plugins are never asked.

import io
import os
import struct
import subprocess
import sys

import pytest
from helpers import write_pairs
from PIL import Image, features

from miniclip.data.reading.scan import UNREAD_PICTURES, holds_picture
from miniclip.images import FORMATS, open_image
from miniclip.inference.exporting.runner import RAW_SUFFIXES, open_picture

POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 32 32
0 0 32 32 rectfill
%%EOF
"""
OTHERS = ["DDS", "EPS", "ICNS", "ICO", "IM", "MSP", "PCX", "PDF", "SGI", "SPIDER", "TGA", "XBM"]


def written(kind, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, (32, 32)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "AVIF" or features.check("avif")])
def test_a_format_of_the_list_is_opened(kind):
    assert open_image(written(kind), "it").size == (32, 32)


@pytest.mark.parametrize("kind", OTHERS)
def test_any_other_format_is_refused_with_the_list(kind):
    mode = {"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(kind, "RGB")
    with pytest.raises(ValueError, match=r"^cat\.jpg is not an image.*allowed are JPEG, PNG, "):
        open_image(written(kind, mode), "cat.jpg")


def tiff(*directories, pixels=bytes(16)):
    """A TIFF by hand (TIFF 6.0, section 2): grey pictures of 4 x 4 pixels, each with further tags {number: value}."""
    data = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels  # which are those of all pictures
    for number, more in enumerate(directories):
        tags = {256: 4, 257: 4, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: 16, **more}
        data += struct.pack("<H", len(tags))
        data += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
        data += struct.pack("<I", len(data) + 4 if number < len(directories) - 1 else 0)
    return data


SMALLER = {256: 2, 257: 2, 278: 2, 279: 4}
RAW = {
    "Nikon's and Sony's": tiff({254: 1}, {254: 0}),
    "with the picture in a directory below": tiff({254: 1, 330: 8}),
    "DNG": tiff({50706: 0x0401}),
    "with a larger page after a smaller one": tiff({254: 1}, SMALLER, {256: 4, 257: 5, 278: 5, 279: 20}),
    "CR2": tiff({}, pixels=b"CR\2\0\0\0\0\0"),
}


@pytest.mark.parametrize("kind", RAW)
def test_a_raw_file_of_a_camera_is_refused_as_its_first_picture_is_a_preview(kind):
    with pytest.raises(ValueError, match=r"^it is an unreadable image: a camera's raw file, .* is a preview"):
        open_image(RAW[kind], "it")
    with pytest.raises(ValueError, match=r"a camera's raw file, .* is a preview"):
        open_picture(io.BytesIO(RAW[kind]))


@pytest.mark.parametrize(
    "directories",
    [({},), ({254: 0}, {254: 1}), ({254: 1},), ({254: 2}, {254: 2}), ({254: 1}, SMALLER), ({254: 1}, SMALLER, SMALLER)],
)
def test_a_tiff_whose_first_picture_is_the_whole_or_the_only_one_is_read(directories):
    for image in (open_image(tiff(*directories), "it"), open_picture(io.BytesIO(tiff(*directories)))):
        assert image.size == (4, 4)
        assert image.getextrema() == (0, 0)


@pytest.mark.parametrize("mark", [b"CR\2\0", b"CRT ", b"CR\0\2"])
def test_a_tiff_whose_first_pixels_are_the_letters_cr_is_read(mark):
    """libtiff writes the pixels before the directory, at 8, where a CR2 has its mark before the directory at 16."""
    data = tiff({}, pixels=mark + bytes(12))
    for image in (open_image(data, "it"), open_picture(io.BytesIO(data))):
        assert image.tobytes() == mark + bytes(12)


@pytest.fixture
def ghostscript(tmp_path):
    """An environment whose `gs` leaves a trace; and the trace."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho ran >> {tmp_path / 'trace'}\n")
    program.chmod(0o755)
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}, tmp_path / "trace"


def test_the_trace_of_a_program_that_opens_pictures_is_seen(tmp_path, ghostscript):
    environment, trace = ghostscript
    (tmp_path / "a.jpg").write_bytes(POSTSCRIPT)
    code = "import sys; from PIL import Image; Image.open(sys.argv[1]).load()"
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.jpg"], env=environment, capture_output=True)
    assert trace.exists()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "words", ["shards {folder} {out}", "check {folder} --image-size 32", "shards {table} {out}"], ids=str
)
def test_postscript_called_jpg_starts_no_program(tmp_path, ghostscript, words):
    environment, trace = ghostscript
    folder = write_pairs(tmp_path / "pairs", 3)
    for suffix in ("jpg", "tif"):
        (folder / f"bad {suffix}.{suffix}").write_bytes(POSTSCRIPT)
        (folder / f"bad {suffix}.txt").write_text("a black square")
    table = folder / "table.csv"
    table.write_text("file,caption\n0000.png,one\nbad jpg.jpg,two\n")
    words = words.format(folder=folder, out=tmp_path / "out", table=table)
    run = subprocess.run(
        [sys.executable, "-m", "miniclip", *words.split()], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "rejected" in run.stdout or "can't be used" in run.stdout
    assert not trace.exists()


@pytest.mark.long
def test_postscript_in_torchvisions_files_starts_no_program(tmp_path, ghostscript):
    environment, trace = ghostscript
    for kind in (
        *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
        *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
    ):
        folder = tmp_path / "eurosat" / "2750" / kind
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(POSTSCRIPT)
    code = """if True:
        import sys
        from miniclip.evaluation.datasets.open import open_dataset
        data = open_dataset("torchvision:EuroSAT", root=sys.argv[1])
        for number in range(len(data)):
            try:
                data.open(number)
            except (ValueError, OSError) as error:
                print(error)
    """
    run = subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 10
    assert not trace.exists()


def test_an_exports_runner_knows_the_suffixes_of_raw_files_that_packing_knows(tmp_path):
    assert set(RAW_SUFFIXES) == {*UNREAD_PICTURES[UNREAD_PICTURES.index(".dng") :]}
    picture = Image.new("RGB", (8, 8))
    for name in ("a.NEF", "a.raw", "a.tif", "a"):
        picture.save(tmp_path / name, "TIFF")
    for name in ("a.NEF", "a.raw"):
        assert not holds_picture((tmp_path / name).read_bytes()[:32], name)
        with pytest.raises(ValueError, match="a camera's raw file"):
            open_picture(tmp_path / name)
    assert open_picture(tmp_path / "a.tif").size == open_picture(tmp_path / "a").size == (8, 8)
