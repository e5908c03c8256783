"""--upright: pictures that EXIF turns are seen as viewers show them. Oracle: the same pictures turned by Pillow."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from command_line import fails
from helpers import picture, tiny_clip, write_picture
from PIL import Image, ImageOps

import miniclip
from miniclip.commands import main as cli
from miniclip.evaluation.datasets.sets import EvaluationSet
from miniclip.evaluation.other_libraries import open_model
from miniclip.images import open_image
from miniclip.inference.app.answers import Answers
from miniclip.inference.explanation.explain import Explainer
from miniclip.inference.search.index import Index
from miniclip.weights.load import save

KINDS = {"png": {}, "jpg": {"quality": 95}, "webp": {"lossless": True}, "tiff": {}}
STORED, SHOWN = "stored", "shown"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and pictures of every orientation in every format: as cameras store them, and as viewers show them."""
    folder = tmp_path_factory.mktemp("turned")
    model = tiny_clip()
    model.text.token_embedding.weight.data.mul_(50)
    save(model, folder / "model")
    for number, (kind, options) in enumerate(KINDS.items()):
        for tag in range(1, 9):
            image = picture(10 * number + tag, (40, 28))
            exif = image.getexif()
            exif[0x0112] = tag
            name = f"{'cat' if tag % 2 else 'dog'}/{kind}{tag}"
            for side in (STORED, SHOWN):
                (folder / side / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / STORED / f"{name}.{kind}", exif=exif.tobytes(), **options)
            with Image.open(folder / STORED / f"{name}.{kind}") as stored:
                ImageOps.exif_transpose(stored).save(folder / SHOWN / f"{name}.png")
    return folder


@pytest.fixture(autouse=True)
def here(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MINICLIP_CACHE", str(tmp_path / "cache"))


def cosines(capsys, *arguments: str) -> dict[str, str]:
    cli.main(["classify", *arguments, "--labels", "cat,dog", "--model", "model", "--csv", "--workers", "0"])
    rows = csv.DictReader(io.StringIO(capsys.readouterr().out))
    return {Path(row["image"]).stem: row["cosine"] for row in rows}


def embeddings(out: Path) -> dict[str, list[float]]:
    table = pyarrow.parquet.read_table(out).to_pylist()
    return {Path(row["key"]).stem: row["embedding"] for row in table}


def embed(*arguments: str) -> None:
    cli.main(["embed", *arguments, "--model", "model", "--workers", "0"])


def test_classify_sees_what_viewers_see_and_no_kept_feature_of_the_other_way(capsys):
    expected = cosines(capsys, SHOWN, "--no-cache")
    stored = cosines(capsys, STORED)
    assert len(stored) == 32
    upright = stored if expected == stored else cosines(capsys, STORED, "--upright")
    assert upright == expected
    assert cosines(capsys, STORED) == stored, "the cache keeps the two ways apart"
    assert cosines(capsys, STORED, "--upright") == expected
    different = {name for name in stored if stored[name] != expected[name]}
    assert different == {f"{kind}{tag}" for kind in ("png", "jpg", "webp") for tag in range(2, 9)}


def test_eval_sees_what_viewers_see_and_writes_that_it_did(tmp_path):
    found = {}
    for name, arguments in {"shown": [SHOWN], "upright": [STORED, "--upright"], "stored": [STORED]}.items():
        cli.main(["eval", "--model", "model", "--data", *arguments, "--out", str(tmp_path / name), "--workers", "0"])
        (found[name],) = json.loads((tmp_path / name / "results.json").read_text())["results"]
    assert found["upright"]["metrics"] == found["shown"]["metrics"] != found["stored"]["metrics"]
    assert [found[name]["upright"] for name in ("upright", "stored")] == [True, False]


def test_embeddings_remember_it_and_are_not_mixed(tmp_path, capsys):
    embed(STORED, str(tmp_path / "upright"), "--upright")
    embed(SHOWN, str(tmp_path / "shown"))
    found, expected = embeddings(tmp_path / "upright"), embeddings(tmp_path / "shown")
    assert found == expected
    assert json.loads((tmp_path / "upright" / "_manifest.json").read_text())["upright"] is True
    message = fails(capsys, ["embed", STORED, str(tmp_path / "upright"), "--model", "model"])
    assert "upright was True and is False" in message
    assert "changed" not in message
    embed(STORED, str(tmp_path / "upright"), "--upright")
    assert "were there already" in capsys.readouterr().out


def test_embeddings_of_before_there_was_the_option_are_gone_on_with(tmp_path, capsys):
    embed(STORED, str(tmp_path / "out"))
    manifest = tmp_path / "out" / "_manifest.json"
    facts = json.loads(manifest.read_text())
    del facts["upright"]
    manifest.write_text(json.dumps(facts))
    embed(STORED, str(tmp_path / "out"))
    assert "were there already" in capsys.readouterr().out


def test_texts_are_not_turned(tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("a cat\n")
    arguments = ["embed", str(tmp_path / "texts.txt"), str(tmp_path / "out"), "--texts", "--upright"]
    assert "--upright turns images" in fails(capsys, arguments)


def test_an_index_remembers_it_for_its_pictures_and_for_those_of_queries(tmp_path, capsys):
    where = str(tmp_path / "photos.index")
    cli.main(["index", STORED, where, "--model", "model", "--upright", "--workers", "0"])
    shown = Index(tmp_path / "shown.index", "model")
    shown.update(SHOWN)
    upright = Index(where)
    assert upright.upright
    for query in (f"{STORED}/cat/jpg3.jpg", f"{STORED}/dog/png6.png"):
        like = Path(SHOWN, *Path(query).with_suffix(".png").parts[1:])
        found, expected = upright.search(like=[query], topk=32), shown.search(like=[like], topk=32)
        assert [(Path(hit.key).stem, hit.cosine) for hit in found] == [(Path(h.key).stem, h.cosine) for h in expected]
        assert Path(found[0].key).stem == Path(query).stem
        assert upright.open(found[0]).size == Image.open(like).size
    write_picture(tmp_path / "more" / "new.png", 99)
    cli.main(["index", str(tmp_path / "more"), where, "--workers", "0"])  # no word of it, and turned as the others are
    for verb in (["index", STORED], ["search"]):
        other = str(tmp_path / "shown.index")
        message = fails(capsys, [*verb, other, *(["a cat"] if verb == ["search"] else []), "--upright"])
        assert f"{other} was made without --upright" in message
        assert "make a new index" in message
    with pytest.raises(ValueError, match=r"made with --upright.*turned upright"):
        Index(where, upright=False)


def test_python_takes_it_where_it_takes_pictures():
    stored, shown = ([*sorted(Path(side).rglob("png*.*"))] for side in (STORED, SHOWN))
    expected = miniclip.embed(shown, "model")
    assert np.array_equal(miniclip.embed(stored, "model", upright=True), expected)
    assert not np.allclose(miniclip.embed(stored, "model"), expected)
    in_memory = [Image.open(path) for path in stored]
    assert np.array_equal(miniclip.embed(in_memory, "model", upright=True), expected)
    options = {"model": "model", "method": "tip_adapter", "alpha": 1.0, "beta": 1.0}
    labels = ["a", "b"] * 4
    turned = miniclip.ZeroShotClassifier(**options, upright=True).fit(stored, labels)
    plain = miniclip.ZeroShotClassifier(**options).fit(shown, labels)
    assert np.array_equal(turned.decision_function(stored), plain.decision_function(shown))


def test_pictures_of_one_content_and_two_orientations_are_two_in_the_cache():
    images = []
    for tag in (1, 6):
        image = picture(1)
        image.getexif()[0x0112] = tag
        images.append(image)
    sets = [EvaluationSet("x", (image,), keys=("x",), upright=up) for image in images for up in (False, True)]
    assert len({data.fingerprint() for data in sets}) == 4


def test_a_map_and_the_page_are_of_the_picture_as_viewers_show_it():
    encoder = open_model("model")
    stored = EvaluationSet("x", (Path(STORED, "dog/png6.png"),), upright=True)
    shown = EvaluationSet("x", (Path(SHOWN, "dog/png6.png"),))
    found, expected = (Explainer(encoder)(data.open(0), ["a cat"])[0] for data in (stored, shown))
    assert found.map.size == (28, 40)
    assert np.array_equal(found.map.relevance, expected.map.relevance)
    data = [Path(side, "dog/png6.png").read_bytes() for side in (STORED, SHOWN)]
    assert Answers(encoder, upright=True).guess(data[0], "cat,dog") == Answers(encoder).guess(data[1], "cat,dog")
    assert Answers(encoder).guess(data[0], "cat,dog") != Answers(encoder).guess(data[1], "cat,dog")
    assert open_image(data[0], "x").size == (40, 28)


def test_explain_writes_the_same_map(tmp_path):
    for side, more in ((STORED, ["--upright"]), (SHOWN, [])):
        out = [str(tmp_path / f"{side}{suffix}") for suffix in (".png", ".npy")]
        arguments = [f"{side}/dog/png6.png", "a cat", "--model", "model", "--out", out[0], "--array", out[1]]
        cli.main(["explain", *arguments, *more])
    assert np.array_equal(np.load(tmp_path / "stored.npy"), np.load(tmp_path / "shown.npy"), equal_nan=True)
    assert np.load(tmp_path / "stored.npy").shape == (40, 28)
    assert (tmp_path / "stored.png").read_bytes() == (tmp_path / "shown.png").read_bytes()


def test_a_threshold_remembers_how_its_images_were_read(tmp_path, capsys):
    for number in range(60):
        write_picture(tmp_path / "outside" / f"{number}.png", 1000 + number)
        write_picture(tmp_path / "inside" / "ab"[number % 2] / f"{number}.png", 2000 + number)
    file = str(tmp_path / "t.json")
    sets = ["--data", str(tmp_path / "inside"), "--outside", str(tmp_path / "outside")]
    more = ["--false-acceptance", "0.1", "--coverage", "0.9", "--out", file, "--upright", "--workers", "0"]
    cli.main(["calibrate", "model", *sets, *more])
    assert json.loads(Path(file).read_text())["upright"] is True
    capsys.readouterr()
    ask = ["classify", STORED, "--threshold", file, "--model", "model", "--labels", "a,b", "--workers", "0"]
    cli.main(ask)
    assert "calibrated with images read upright, and now they are read as they are stored" in capsys.readouterr().err
    cli.main([*ask, "--upright"])
    assert "images read" not in capsys.readouterr().err


def test_a_damaged_tag_and_a_damaged_picture_stop_nothing(tmp_path, capsys):
    data = Path(STORED, "dog/jpg6.jpg").read_bytes()
    (tmp_path / "in").mkdir()
    at = data.index(b"Exif\0\0") + 6
    (tmp_path / "in" / "tag.jpg").write_bytes(data[:at] + b"\xff" * 20 + data[at + 20 :])
    (tmp_path / "in" / "cut.jpg").write_bytes(data[: len(data) // 2])
    found = cosines(capsys, str(tmp_path / "in"), "--upright")
    assert found == cosines(capsys, str(tmp_path / "in"))
    assert list(found) == ["tag"]
