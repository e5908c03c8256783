"""`miniclip explain` as people run it: files, tables and errors."""

import csv
import io
import json
import re
import sys

import numpy as np
import pytest
from command_line import fails, run
from helpers import picture, tiny_clip, write_picture
from PIL import Image

import miniclip
from miniclip.commands import main as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("explain")
    miniclip.save(tiny_clip(1), folder / "model")
    for number in range(2):
        write_picture(folder / "photos" / f"{number}.png", number, (40, 24))
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return folder


def explain(capsys, folder, *args):
    cli.main(["explain", *map(str, args), "--model", str(folder / "model"), "--device", "cpu"])
    return capsys.readouterr()


def refused(capsys, folder, *args):
    return fails(capsys, ["explain", *map(str, args), "--model", str(folder / "model"), "--device", "cpu"])


def test_a_map_of_one_picture_lands_in_the_folder_and_its_scores_in_a_table(capsys, here, tmp_path):
    shown = explain(capsys, here, here / "photos/0.png", "--out", "explained", "A red car!")
    image = Image.open(tmp_path / "explained" / "0.a_red_car.png")
    assert image.size == (40 * 11, 24 * 11)  # enlarged by a whole factor
    header, row = shown.out.splitlines()
    assert header.split() == ["image", "text", "cosine", "deletion", "random", "insertion", "better", "words", "map"]
    assert "red " in row
    assert "0.a_red_car.png" in row
    assert shown.err == "" or "can't be told from random" in shown.err


def test_several_pictures_and_texts_give_a_map_each_and_arrays_by_their_names(capsys, here, tmp_path):
    (tmp_path / "texts.txt").write_text("a street\n\na tree\n")
    args = (here / "photos", "a car", "--texts", "texts.txt", "--out", "maps", "--array", "maps.npz", "--json")
    shown = explain(capsys, here, *args)
    rows = json.loads(shown.out)
    assert [(row["image"][-5:], row["text"]) for row in rows] == [
        (image, text) for image in ("0.png", "1.png") for text in ("a car", "a street", "a tree")
    ]
    assert "1 left out" in shown.err  # the blank line
    arrays = np.load("maps.npz")
    assert sorted(arrays) == sorted(path.stem for path in (tmp_path / "maps").iterdir())
    for row in rows:
        assert arrays[row["map"].removeprefix("maps/").removesuffix(".png")].shape == (24, 40)
        assert row["method"] == "attention"
        assert row["random_low"] <= row["random"] <= row["random_high"]
        assert row["words"] == row["text"].split()
        assert len(row["word_relevances"]) == len(row["words"])
        assert "".join(row["tokens"]).split() == row["words"]
        assert all(0 <= share <= 1 for share in row["token_relevances"])
    again = explain(capsys, here, *args, "--overwrite")
    assert again.out == shown.out  # the same random maps


def test_one_map_goes_to_a_file_and_its_array_to_another(capsys, here, tmp_path):
    args = (here / "photos/0.png", "a car", "--out", "map.png", "--array", "map.npy")
    rows = list(csv.DictReader(io.StringIO(explain(capsys, here, *args, "--csv").out)))
    assert rows[0]["map"] == "map.png"
    array = np.load("map.npy")
    assert array.shape == (24, 40)
    assert array.dtype == np.float32
    assert np.isnan(array[:, :7]).all()  # the model looks at the centre square
    assert np.isfinite(array[:, 9:31]).all()
    assert np.isnan(array[:, 33:]).all()


def test_parquet_holds_the_words_and_their_relevances(capsys, here, tmp_path):
    import pyarrow.parquet

    explain(capsys, here, here / "photos/0.png", "a car", "--parquet", "rows.parquet")
    (row,) = pyarrow.parquet.read_table("rows.parquet").to_pylist()
    assert row["words"] == ["a", "car"]
    assert all(isinstance(value, float) for value in row["word_relevances"])


def test_a_picture_that_is_stored_turned_is_mapped_as_viewers_show_it(capsys, here, tmp_path):
    image = picture(0, (40, 24))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save("turned.png", exif=exif)
    image.save("stored.png")
    for name in ("turned", "stored"):
        explain(capsys, here, f"{name}.png", "a car", "--out", f"{name}-map.png", "--array", f"{name}.npy")
    turned, stored = np.load("turned.npy"), np.load("stored.npy")
    np.testing.assert_array_equal(turned, np.rot90(stored, -1))  # the model reads both as they are stored
    assert Image.open("turned-map.png").size == Image.open("stored-map.png").size[::-1]


def test_pictures_of_one_name_and_texts_of_one_spelling_keep_files_of_their_own(capsys, here, tmp_path):
    for name in ("a/0.png", "b/0.png"):
        write_picture(tmp_path / "same" / name)
    explain(capsys, here, "same", "a car", "a car!", "a car")
    names = sorted(path.name for path in (tmp_path / "explained").iterdir())
    assert names == ["0.a_car-2.png", "0.a_car-3.png", "0.a_car-4.png", "0.a_car.png"]


def test_unreadable_pictures_are_left_out_and_named(capsys, here, tmp_path):
    write_picture(tmp_path / "some" / "good.png")
    (tmp_path / "some" / "bad.png").write_bytes(b"no picture")
    shown = explain(capsys, here, "some", "a car", "--json")
    assert [row["image"] for row in json.loads(shown.out)] == ["some/good.png"]
    assert "left out: some/bad.png is not an image" in shown.err
    assert "1 of 2 images can't be read" in shown.err
    assert [path.name for path in (tmp_path / "explained").iterdir()] == ["good.a_car.png"]


@pytest.mark.parametrize(
    "args, words",
    [
        (("PHOTO",), ["a text is needed", "--texts FILE"]),
        (("PHOTO", ""), ["''", "empty"]),
        (("PHOTO", "   "), ["empty"]),
        (("PHOTO", "word " * 30), ["32 tokens", "model reads 16", "shorten"]),
        (("nowhere.jpg", "a car"), ["nowhere.jpg"]),
        (("empty", "a car"), ["no images in empty"]),
        (("bad.png", "a car"), ["bad.png is not an image", "allowed are JPEG"]),
        (("PHOTO", "PHOTO"), ["is a picture that is there", "quoted pattern"]),
        (("PHOTO", "a car", "--out", "no/such/map.png"), ["no folder no/such"]),
        (("PHOTO", "a car", "--out", "no/such"), ["no folder no"]),
        (("PHOTO", "a car", "--array", "no/map.npy"), ["no folder no"]),
        (("PHOTO", "a car", "--out", "map.jpg"), ["map.jpg", "neither a folder nor a .png"]),
        (("PHOTO", "a car", "--out", "bad.png"), ["bad.png is already there", "--overwrite"]),
        (("PHOTO", "a car", "--array", "map.txt"), [".txt", ".npy or .npz"]),
        (("PHOTO", "a car", "a tree", "--array", "map.npy"), ["2", ".npz"]),
        (("PHOTO", "a car", "a tree", "--out", "map.png"), ["2 maps", "name a folder"]),
        (("-", "--texts", "-"), ["standard input can be read once"]),
        (("PHOTO", "a car", "--texts", "lost.txt"), ["lost.txt"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_mistakes_are_named_in_a_sentence_and_nothing_is_written(capsys, here, tmp_path, args, words):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    message = refused(capsys, here, *(str(here / "photos/0.png") if arg == "PHOTO" else arg for arg in args))
    for word in words:
        assert word in message
    assert "Traceback" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_a_method_that_the_model_does_not_allow_is_refused(capsys, here, tmp_path):
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "from miniclip.images import Preprocess\n"
        "class Own:\n"
        "    logit_scale = 1.0\n"
        "    preprocess = Preprocess(16, (0, 0, 0), (1, 1, 1))\n"
        "    def encode_image(self, images): return images.flatten(1)[:, :4].numpy() + 1\n"
        "    def encode_text(self, tokens): return torch.ones(len(tokens), 4)\n"
        "    def tokenize(self, texts): return torch.tensor([[len(text)] for text in texts])\n"
    )
    options = ["--model", "python:own.py:Own", "--device", "cpu"]
    photo = str(here / "photos/0.png")
    message = fails(capsys, ["explain", photo, "a car", "--method", "attention", *options])
    assert "python:own.py:Own is none; use gradients or occlusion" in message
    message = fails(capsys, ["explain", photo, "a car", "--method", "gradients", *options])
    assert "gives no gradients; use occlusion" in message
    cli.main(["explain", photo, "a car", "--json", "--out", "own.png", *options])
    assert json.loads(capsys.readouterr().out)[0]["method"] == "occlusion"


@pytest.mark.long
def test_a_pipe_takes_a_picture_and_may_close_early(here, tmp_path):
    command = f"{sys.executable} -m miniclip explain - 'a car' 'a tree' --model {here}/model --device cpu --csv"
    done = run("sh", "-c", f"cat {here}/photos/0.png | {command} | head -n 1", cwd=tmp_path)
    assert done.stdout.startswith("image,text,cosine")
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes of `miniclip eval`


def test_eval_explains_its_worst_mistakes(capsys, here, tmp_path):
    for number in range(6):
        write_picture(tmp_path / "data" / f"class {number % 3}" / f"{number}.png", number)
    args = [
        "eval",
        "--model",
        str(here / "model"),
        "--data",
        "data",
        "--out",
        "report",
        "--no-cache",
        "--device",
        "cpu",
    ]
    cli.main([*args, "--explain"])
    page = (tmp_path / "report/report.html").read_text()
    wrong = int(re.search(r"Wrong, surest first \((\d+) of", page)[1])
    assert wrong  # a model that was never trained
    assert len(re.findall(r'alt="what spoke for class \d: deletion -?0\.\d\d, insertion', page)) == wrong
    assert page.count("random -0.") + page.count("random 0.") >= wrong
    cli.main([*args, "--overwrite"])
    assert "what spoke for" not in (tmp_path / "report/report.html").read_text()


def test_eval_refuses_to_explain_captions(capsys, here, tmp_path):
    write_picture(tmp_path / "pairs/0.png")
    (tmp_path / "pairs/0.txt").write_text("a picture")
    args = ["--data", "pairs", "--task", "retrieval", "--out", "report", "--device", "cpu", "--explain"]
    assert "--explain maps mistaken classes" in fails(capsys, ["eval", "--model", str(here / "model"), *args])
