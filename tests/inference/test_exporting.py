"""An export runs without miniclip and gives its answers; one that does not is not called done."""

import csv
import json
import py_compile
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import fails, run
from exports import VISIONS, run_alone, saved, small_clip, texts
from helpers import picture, tiny_clip, write_picture
from PIL import Image

import miniclip
from miniclip import tokenizer
from miniclip.commands import main as cli
from miniclip.common.files import stand_in
from miniclip.config import TextConfig
from miniclip.data.wordings.kept import Wording, Wordings
from miniclip.inference.exporting import onnx_files
from miniclip.inference.exporting.export import TARGETS, ExportDiffersError, export, refuse_existing
from miniclip.inference.exporting.facts import write_facts
from miniclip.inference.exporting.onnx_files import shrink_onnx, write_onnx
from miniclip.inference.exporting.openvino_files import write_openvino
from miniclip.inference.exporting.runner import Clip, open_tower
from miniclip.inference.exporting.torch_program import write_program
from miniclip.inference.exporting.towers import random_tokens, towers
from miniclip.inference.thresholds import ModelThreshold, write_threshold
from miniclip.weights.load import preprocess_for

CLASSES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of three classes of four pictures of noise, of all shapes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        size = (20 + 7 * (number % 5), 20 + 5 * (number % 4))
        write_picture(folder / CLASSES[number % 3] / f"{number}.png", number, size)
    return folder


@pytest.fixture(scope="module")
def model(pictures, tmp_path_factory):
    """A model with a threshold that half of the pictures reach."""
    folder = tmp_path_factory.mktemp("model") / "clip"
    name = saved(folder, small_clip())
    best = [cosine for *_, cosine in answers(*miniclip.load(name, "cpu"), sorted(pictures.rglob("*.png")), CLASSES)]
    by_eye = ModelThreshold(float(np.median(best)), "by eye", classnames=CLASSES, templates=("a {}",))
    write_threshold(folder / "threshold.json", by_eye)
    return name


@torch.no_grad()
def answers(clip, preprocess, paths, classnames, template="a {}"):
    """What miniclip guesses, by the public functions: class, probability and cosine of each picture."""
    classes = miniclip.zero_shot_classifier(clip, classnames, [template])  # (E, C)
    images = torch.stack([preprocess(Image.open(path)) for path in paths])
    cosines = F.normalize(clip.encode_image(images), dim=-1) @ classes
    odds = (clip.logit_scale.exp() * cosines).softmax(dim=1)
    best = [classnames[column] for column in cosines.argmax(dim=1).tolist()]
    return list(zip(best, odds.amax(dim=1).tolist(), cosines.amax(dim=1).tolist(), strict=True))


@pytest.fixture(scope="module")
def exported(model, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", sys.stderr)
        cli.main(["export", model, str(out), "--to", "onnx", "--prove", str(pictures), "--workers", "0"])
    return out


# ---------------------------------------------------------------------------------------------------------------------
# It runs alone


@pytest.mark.parametrize("labels", ["", "red car, blue car, boat"])
def test_the_runner_alone_gives_miniclips_answers(exported, model, pictures, labels):
    paths = sorted(pictures.rglob("*.png"))
    clip, preprocess = miniclip.load(model, "cpu")
    names = [name.strip() for name in labels.split(",")] if labels else list(CLASSES)
    expected = answers(clip, preprocess, paths, names)
    threshold = json.loads((exported / "threshold.json").read_text())["cosine"]
    printed = run_alone(exported, *map(str, paths), *(("--labels", labels) if labels else ()))
    rows = [line.split("\t") for line in printed.splitlines() if "\t" in line]
    assert [row[0] for row in rows] == [str(path) for path in paths]
    assert [row[1] for row in rows] == [
        name if cosine >= threshold else "none of these" for name, _, cosine in expected
    ]
    assert labels or sum(row[1] == "none of these" for row in rows) == 6
    np.testing.assert_allclose([float(row[2]) for row in rows], [p for _, p, _ in expected], atol=6e-4)
    np.testing.assert_allclose([float(row[3]) for row in rows], [cosine for *_, cosine in expected], atol=1e-4)
    assert ("calibrated with other classes" in printed) == bool(labels)


def test_the_runner_reports_a_picture_that_is_not_there(exported):
    assert "nothing.png" in run_alone(exported, "nothing.png", code=2).splitlines()[-1]


def test_the_runner_names_a_picture_that_cant_be_read_and_goes_on(exported, pictures, tmp_path):
    whole = (pictures / "cat/0.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[:60])
    (tmp_path / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    there = [str(path) for path in sorted(pictures.rglob("*.png"))[:2]]
    lines = run_alone(exported, there[0], f"{tmp_path}/torn.png", f"{tmp_path}/program.jpg", there[1])
    lines = lines.splitlines()
    assert [line.split("\t")[0] for line in lines[:2]] == there
    assert [line.split(": ")[:2] for line in lines[2:]] == [
        ["left out", f"{tmp_path}/{name}"] for name in ("torn.png", "program.jpg")
    ]


@pytest.mark.parametrize(
    "labels",
    [
        '"Paris, Texas",London',
        ' cat , "a ""red"" dog"',
        '["a, b", "c"]',
        "dog,dog",
        "cat,,dog",
        "",
        "cat, ",
        "cat\r\ndog",
        "cat\rdog",
        "[a],[b]",
        pytest.param(f"cat,{'a' * 140_000}", id="long"),
    ],
)
def test_the_runner_reads_labels_as_classify_does(labels):
    from miniclip.inference.classify import choose_classes
    from miniclip.inference.exporting.runner import names_in

    try:
        expected = list(choose_classes(labels).classnames)
    except ValueError:
        with pytest.raises(ValueError, match=r"--labels (has|.* can't be read)"):
            names_in(labels)
    else:
        assert names_in(labels) == expected


def test_the_runner_refuses_templates_without_a_place_and_a_class_that_comes_twice(exported, pictures):
    path = str(pictures / "cat/0.png")
    said = run_alone(exported, path, "--labels", "dog,cat", "--templates", "a {}", "noplace", code=2)
    assert "template 'noplace' has no place for the class name" in said.splitlines()[-1]
    assert "'dog' twice" in run_alone(exported, path, "--labels", "dog,dog", code=2)


@pytest.mark.long
def test_an_export_of_a_threshold_of_upright_pictures_turns_them(tmp_path):
    clip = small_clip()
    name = saved(tmp_path / "model", clip)
    by_eye = ModelThreshold(0.0, "by eye", classnames=CLASSES, templates=("a {}",), upright=True)
    write_threshold(tmp_path / "model/threshold.json", by_eye)
    write_picture(tmp_path / "photos/a.png", 3, (40, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright, stored on its side
    Image.open(tmp_path / "photos/a.png").save(tmp_path / "photos/a.png", exif=exif)
    found = export(name, tmp_path / "out", "torch", prove=str(tmp_path / "photos"))
    assert found.proof.agreements[-1].cosine_min > 0.9999
    stored = np.asarray(Image.open(tmp_path / "photos/a.png"))
    as_seen = Image.fromarray(np.rot90(stored, -1))  # 90 degrees clockwise
    expected = preprocess_for(clip.config)(as_seen).numpy()
    np.testing.assert_allclose(
        Clip(tmp_path / "out").pixels(Image.open(tmp_path / "photos/a.png")), expected, atol=1e-6
    )


@pytest.mark.long
def test_the_proof_is_from_the_files_on(model, tmp_path, monkeypatch):
    """A runner that reads floats as Pillow does, as black, is found out; what it can't read at all is named."""
    from miniclip.inference.exporting import export as exporting
    from miniclip.inference.exporting import runner

    for n in range(2):
        path = tmp_path / f"data/{n}.tif"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.asarray(picture(n, (30, 24), "L")).astype(np.float32) / 255).save(path)
    found = export(model, tmp_path / "out", "torch", prove=str(tmp_path / "data"))
    assert found.proof.agreements[-1].cosine_min > 0.9999
    programs = tmp_path / "out"  # which take long to write, and are the same each time
    monkeypatch.setattr(exporting, "write_program", lambda tower, out, _: shutil.copyfile(programs / out.name, out))
    with monkeypatch.context() as patch:
        patch.setattr(runner, "to_8_bits", lambda image: image)
        with pytest.raises(ExportDiffersError, match="features of the pictures of data differ"):
            export(model, tmp_path / "other", "torch", prove=str(tmp_path / "data"))
    (write_picture(tmp_path / "data/3.png", 3)).rename(tmp_path / "data/3.bmp")
    monkeypatch.setattr(runner, "FORMATS", ("TIFF",))
    with pytest.raises(ValueError, match=r"the export reads 2 pictures, and miniclip 3; .*3\.bmp"):
        export(model, tmp_path / "third", "torch", prove=str(tmp_path / "data"))


def test_the_folder_says_what_the_model_is_and_how_it_was_proven(exported, model):
    facts = json.loads((exported / "export.json").read_text())
    assert facts["classnames"] == list(CLASSES)
    assert facts["templates"] == ["a {}"]
    assert facts["threshold"] == json.loads((exported / "threshold.json").read_text())["cosine"]
    proof = json.loads((exported / "proof.json").read_text())
    assert proof["problems"] == []
    assert proof["guesses"]["num_images"] == 12
    assert proof["guesses"]["changed"] == 0
    assert proof["guesses"]["comparison"]["mcnemar_p"] == 1
    for name, file in facts["files"].items():
        assert proof["bytes"][name] == (exported / file).stat().st_size


def test_no_program_names_the_folders_of_the_computer_that_made_it(exported, tmp_path):
    """PyTorch's exporters note for each node the lines of code that it came from, and an export may be published."""
    programs = list(exported.glob("**/*.onnx"))
    for tower in towers(small_clip()):
        programs.append(tmp_path / f"{tower.output}.pt2")
        write_program(tower, programs[-1], "float32")
    assert len(programs) == 4
    for program in programs:
        assert str(Path(miniclip.__file__).parent).encode() not in program.read_bytes()
        assert b"torch/nn/modules" not in program.read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Every tower, in every target, at every size


def assert_same_features(clip, folder):
    """To 1e-4, for batches and lengths that no example had."""
    runner, R = Clip(folder), clip.visual.input_resolution
    for batch in (1, 7, 32):
        images = torch.randn(batch, 3, R, R, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = clip.encode_image(images).numpy()
        np.testing.assert_allclose(runner.run("image", images.numpy()), expected, rtol=1e-4, atol=1e-4)
        for length in (5, 77):
            tokens = torch.randint(1, 400, (batch, length), generator=torch.Generator().manual_seed(length))
            tokens[:, -1] = tokenizer.END_OF_TEXT
            tokens[::2, 2:] = tokenizer.END_OF_TEXT
            with torch.no_grad():
                expected = clip.encode_text(tokens).numpy()
            np.testing.assert_allclose(runner.run("text", tokens.numpy()), expected, rtol=1e-4, atol=1e-4)


def test_onnx_files_give_the_models_features(exported, model):
    assert_same_features(miniclip.load(model, "cpu")[0], exported)


def test_openvinos_files_give_the_models_features(exported, model, tmp_path):
    facts = json.loads((exported / "export.json").read_text())
    for name, file in facts["files"].items():
        write_openvino(exported / file, tmp_path / f"{name}.xml", "float32")
    files = {name: f"{name}.xml" for name in facts["files"]}
    (tmp_path / "export.json").write_text(json.dumps(facts | {"files": files}))
    assert_same_features(miniclip.load(model, "cpu")[0], tmp_path)
    run(sys.executable, "-c", SIGNALLED, *(str(tmp_path / files[name]) for name in ("image", "text")))


# OpenVINO gives signal handlers a stack of its own and frees it with its last model; Python crashed at a later signal.
SIGNALLED = """
import ctypes, os, signal, sys
from pathlib import Path
from miniclip.inference.exporting.runner import open_tower
def stack():
    found = (ctypes.c_size_t * 3)()  # sigaltstack(2): address, flags, size
    ctypes.CDLL(None).sigaltstack(None, found)
    return list(found)
before = stack() if sys.platform == "linux" else []
first, second = (open_tower(Path(path)) for path in sys.argv[1:])
del first
del second
assert before == (stack() if sys.platform == "linux" else []), "a signal's handler has another stack"
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(1)
"""


QUICK = [("resnet", "torch")]
REST = [(kind, target) for kind in VISIONS for target in TARGETS if (kind, target) not in QUICK]


@pytest.mark.parametrize("kind, target", [*QUICK, *(pytest.param(*each, marks=pytest.mark.long) for each in REST)])
def test_an_exported_tower_gives_the_models_features(kind, target, tmp_path):
    clip = small_clip(kind)
    export(saved(tmp_path / "clip", clip), tmp_path / "out", target)
    assert_same_features(clip, tmp_path / "out")
    refuse_existing(tmp_path / "out", overwrite=True)  # it holds nothing else than an export


SHRUNK = {"float32": (0.999999, 1.01), "float16": (0.9999, 0.6), "bfloat16": (0.999, 0.6), "int8": (0.97, 0.35)}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["text", *(pytest.param(kind, marks=pytest.mark.long) for kind in VISIONS)])
def test_smaller_weights_give_smaller_files_and_nearly_the_same_features(kind, tmp_path):
    """The least cosine and the size in bytes; image towers are wide enough for the graph to be little of it."""
    clip = small_clip("vit" if kind == "text" else kind, width={"vit": 128, "resnet": 16}.get(kind))
    tower = towers(clip)[kind == "text"]
    x = random_tokens(clip, 7, 20, seed=1) if kind == "text" else torch.randn(7, *tower.example.shape[1:])
    with torch.no_grad():
        expected = tower.module(x)
    write_onnx(tower, tmp_path / "plain.onnx")
    size = (tmp_path / "plain.onnx").stat().st_size
    for precision, (cosine, share) in SHRUNK.items():
        shrink_onnx(tmp_path / "plain.onnx", tmp_path / "out.onnx", precision)
        found = torch.from_numpy(open_tower(tmp_path / "out.onnx")(x.numpy()))
        assert F.cosine_similarity(found, expected).min() > cosine
        assert (tmp_path / "out.onnx").stat().st_size < share * size


@pytest.mark.long
@pytest.mark.parametrize("precision", ["float32", pytest.param("int8", marks=pytest.mark.long)])
def test_weights_beyond_protobufs_limit_lie_in_a_file_beside_the_graph(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "_MOST_FILE_BYTES", 100_000)
    tower = towers(small_clip())[1]
    onnx_files.write_onnx(tower, tmp_path / "plain.onnx")
    onnx_files.shrink_onnx(tmp_path / "plain.onnx", tmp_path / "out.onnx", precision)
    assert (tmp_path / "out.onnx").stat().st_size < 500_000 < (tmp_path / "out.onnx.data").stat().st_size
    with torch.no_grad():
        expected = tower.module(tower.example)
    found = torch.from_numpy(open_tower(tmp_path / "out.onnx")(tower.example.numpy()))
    assert F.cosine_similarity(found, expected).min() > 0.97


@pytest.mark.long
@pytest.mark.parametrize("target, precision", [(to, each) for to, kinds in TARGETS.items() for each in kinds[1:]])
def test_every_precision_of_every_target_is_proven(target, precision, model, pictures, tmp_path):
    clip, preprocess = miniclip.load(model, "cpu")
    paths = sorted(pictures.rglob("*.png"))
    with torch.no_grad():
        images = torch.stack([preprocess(Image.open(path)) for path in paths])
        cosines = clip.encode_image(images, normalize=True) @ miniclip.zero_shot_classifier(clip, CLASSES, ["a {}"])
    (best, second), (guesses, _) = (each.T for each in cosines.topk(2))
    clear = (best - second).topk(4).indices.tolist()  # other guesses hang on the last bits of a narrow precision
    with open(tmp_path / "set.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "label"), *((paths[n], CLASSES[guesses[n]]) for n in clear)])
    prove = pictures / "cat" if precision == "int8" else tmp_path / "set.csv"  # in int8 all guesses do: no labels
    found = export(model, tmp_path / "out", target, precision=precision, prove=str(prove))
    assert all(timing.float32 for timing in found.proof.timings)
    if precision == "int8":
        assert found.proof.agreements[-1].what == "the pictures of cat"
    else:
        assert (found.proof.guesses.num_images, found.proof.guesses.changed) == (4, 0)


@pytest.mark.long
@pytest.mark.parametrize("towers", ["image", "text"])
def test_a_model_of_one_tower_is_exported_as_that_tower(towers, tmp_path):
    clip = small_clip(towers=towers)
    found = export(saved(tmp_path / "clip", clip), tmp_path / "out", "torch")
    assert list(found.facts["files"]) == [towers]
    runner = Clip(tmp_path / "out")
    if towers == "text":
        assert runner.encode_texts(["a cat"]).shape == (1, 16)
        with pytest.raises(ValueError, match="no image tower"):
            runner.encode_images([picture()])
    else:
        assert runner.encode_images([picture()]).shape == (1, 16)
        with pytest.raises(ValueError, match="has no tokenizer"):
            runner.encode_texts(["a cat"])


def test_a_model_that_reads_other_ids_is_exported_without_a_tokenizer(tmp_path):
    clip = tiny_clip(text=TextConfig(context_length=16, vocab_size=300, eot_token=2, width=16, layers=2, head_width=8))
    export(saved(tmp_path / "clip", clip), tmp_path / "out", "torch")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(ValueError, match="other token ids than CLIP's"):
        Clip(tmp_path / "out").encode_texts(["a cat"])


# ---------------------------------------------------------------------------------------------------------------------
# One that differs


def rounded_away():
    """A model whose first channel is so large, and so useless, that 8 bits for all leave nothing of the others."""
    clip = small_clip()
    for transformer in (clip.visual.transformer, clip.text.transformer):
        for block in transformer.resblocks:
            for norm, matrix in ((block.ln_1, block.attn.in_proj_weight), (block.ln_2, block.mlp.c_fc.weight)):
                norm.weight.data[0] = norm.bias.data[0] = 1e5
                matrix.data[:, 0] = 0
    return clip


@pytest.mark.long
def test_an_export_that_differs_is_kept_aside_and_not_called_done(tmp_path, capsys):
    name = saved(tmp_path / "clip", rounded_away())
    out = tmp_path / "out"
    error = fails(capsys, ["export", name, str(out), "--to", "onnx", "--precision", "int8"])
    assert "gives other answers" in error
    assert "random texts of 77 tokens in batches of 32 differ" in error
    assert str(out) + ".differs" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "out.differs"]
    assert json.loads((tmp_path / "out.differs" / "proof.json").read_text())["problems"]
    export(name, out, "torch")  # in float32 it is as good as any


@pytest.mark.long
def test_a_table_of_the_models_own_guesses_is_proven_right(model, pictures, tmp_path):
    clip, preprocess = miniclip.load(model, "cpu")
    paths = sorted(pictures.rglob("*.png"))
    guesses = [name for name, *_ in answers(clip, preprocess, paths, list(CLASSES))]
    with open(tmp_path / "set.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "label"), *zip(paths, guesses, strict=True)])
    found = export(model, tmp_path / "out", "torch", prove=str(tmp_path / "set.csv"))
    assert (found.proof.guesses.before, found.proof.guesses.after) == (1, 1)


@pytest.mark.long
@pytest.mark.parametrize("template, is_by_class", [("a drawing of the number {}", False), ("{}!", True)])
def test_the_proof_asks_with_the_prompts_of_the_export(template, is_by_class, pictures, tmp_path, capsys):
    clip = small_clip()
    clip.wordings = Wordings((Wording("picture: {}", 0.9),), (), 100)
    name = saved(tmp_path / "model", clip)
    paths = sorted(pictures.rglob("*.png"))
    best = [answer for answer, *_ in answers(clip, preprocess_for(clip.config), paths, CLASSES, template)]
    assert best != [answer for answer, *_ in answers(clip, preprocess_for(clip.config), paths, CLASSES, "picture: {}")]
    right = sum(answer == path.parent.name for answer, path in zip(best, paths, strict=True)) / len(paths)
    templates = {each: (template.format(each),) for each in CLASSES} if is_by_class else (template,)
    by_eye = ModelThreshold(-1.0, "by eye", classnames=CLASSES, templates=templates)
    write_threshold(tmp_path / "model/threshold.json", by_eye)
    cli.main(["export", name, str(tmp_path / "out"), "--to", "onnx", "--prove", str(pictures), "--workers", "0"])
    said = capsys.readouterr().out
    proof = json.loads((tmp_path / "out/proof.json").read_text())["guesses"]
    assert (proof["before"], proof["after"]) == (pytest.approx(right), pytest.approx(right))
    assert f"(those of {name}/threshold.json)" in said
    printed = run_alone(tmp_path / "out", *map(str, paths), "--labels", ",".join(CLASSES[::-1]))
    assert [line.split("\t")[1] for line in printed.splitlines()] == best


# ---------------------------------------------------------------------------------------------------------------------
# What lies in front of the towers


@pytest.fixture(scope="module")
def front(tmp_path_factory):
    """The files of an export without its towers."""
    folder = tmp_path_factory.mktemp("front")
    write_facts(folder, {"precision": "float32", "text": {"context_length": 77}, "files": {}}, small_clip().config)
    return Clip(folder)


@pytest.mark.parametrize("count", [2000, pytest.param(20_000, marks=pytest.mark.long)])
def test_its_token_ids_are_ours_or_the_text_is_refused_as_wrongly_decoded(front, count):
    import ftfy

    refused = 0
    for text in texts(count, seed=count):
        try:
            found = front.tokenize([text])[0].tolist()
        except ValueError as error:
            assert "decoded wrongly" in str(error)  # noqa: PT017
            refused += 1
            assert not text.isascii() or "&" in text
        else:
            assert found == tokenizer.encode_for_model(text, truncate=True), ascii(text)
            assert ftfy.fix_encoding(text) == text
    assert 0 < refused < count / 4


@pytest.mark.parametrize(
    "text", ["a photo of a cat.", "Чёрный кот", "crème brûlée", "写真の猫", "it’s “quoted” …", "x < y & z"]
)
def test_texts_that_people_write_are_not_refused(front, text):
    assert front.tokenize([text])[0].tolist() == tokenizer.encode_for_model(text)


def test_texts_in_a_batch_are_padded_and_long_ones_cut(front):
    found = front.tokenize(["one", "a " * 100])
    assert found.shape == (2, 77)
    assert (found == tokenizer.tokenize(["one", "a " * 100], truncate=True).numpy()).all()


def test_a_name_of_a_special_token_is_refused(front):
    with pytest.raises(ValueError, match="special token"):
        front.tokenize(["a <END_OF_TEXT> b"])


MODES = ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16", "F", "F of 255"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preprocess": "hf", "resize_size": 40},
        {"resize": "squash", "interpolation": "bilinear"},
        {"resize": "none", "preprocess": "hf"},
        {"interpolation": "lanczos", "resize_size": 21},
    ],
    ids=str,
)
def test_its_pixels_are_ours(mode, changes, tmp_path):
    import dataclasses

    vision = dataclasses.replace(VISIONS["vit"], **changes)
    clip = tiny_clip(vision=vision)
    preprocess = preprocess_for(clip.config)
    from miniclip.images import open_image
    from miniclip.inference.exporting.facts import Classes, export_facts

    (tmp_path / "export.json").write_text(json.dumps(export_facts(clip, preprocess, "x", {}, "float32", Classes())))
    runner = Clip(tmp_path)
    for size in ((24, 20), (9, 50), (61, 16), (16, 16), (2000, 3)):
        if mode == "I;16":
            image = Image.fromarray(np.asarray(picture(1, size, "L")).astype(np.uint16) * 257)
        elif mode.startswith("F"):
            scale = 255 if mode == "F" else 1.1
            image = Image.fromarray(np.asarray(picture(1, size, "L")).astype(np.float32) / scale)
        else:
            image = picture(1, size, "RGB").convert(mode)
        path = tmp_path / ("picture.tif" if mode in ("CMYK", "I;16") or "F" in mode else "picture.png")
        image.save(path)
        expected = preprocess(open_image(path.read_bytes(), "picture")).numpy()
        np.testing.assert_allclose(runner.pixels(Image.open(path)), expected, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Likeliest mistakes


@pytest.fixture
def refused(capsys, tmp_path):
    return lambda *args: fails(capsys, ["export", *args])


def test_mistakes_are_explained_before_anything_is_written(refused, model, tmp_path):
    out = str(tmp_path / "out")
    assert "no target 'onxx'; valid are onnx, torch, openvino" in refused(model, out, "--to", "onxx")
    assert "not offered in int8; valid are float32" in refused(model, out, "--to", "torch", "--precision", "int8")
    assert "not offered in float8" in refused(model, out, "--to", "onnx", "--precision", "float8")
    assert "nothing/there" in refused("nothing/there", out, "--to", "onnx")
    assert "nothing.csv" in refused(model, out, "--to", "onnx", "--prove", "nothing.csv")
    for name in ("openclip:ViT-B-32/openai", "transformers:openai/clip-vit-base-patch32", "python:x.py:f"):
        error = refused(name, out, "--to", "onnx")
        assert name in error
        assert "miniclip convert" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_what_is_there_is_replaced_only_if_it_is_an_export_and_one_asks(refused, exported, model, tmp_path):
    before = (exported / "proof.json").read_bytes()
    assert "exists already; pass --overwrite" in refused(model, str(exported), "--to", "onnx")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    error = refused(model, str(tmp_path / "mine"), "--to", "onnx", "--overwrite")
    assert "no export" in error
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    assert (exported / "proof.json").read_bytes() == before
    (tmp_path / "new.differs").mkdir()
    (tmp_path / "new.differs" / "letter.txt").write_text("dear")
    assert "new.differs is no export" in refused(model, str(tmp_path / "new"), "--to", "onnx")
    name = saved(tmp_path / "clip", small_clip())
    export(name, tmp_path / "out", "torch")
    py_compile.compile(str(tmp_path / "out" / "run.py"))  # as when it is imported
    export(name, tmp_path / "out", "torch", precision="bfloat16", overwrite=True)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["precision"] == "bfloat16"


@pytest.mark.sample(1)
@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_a_disk_that_is_full_is_told_by_the_name_that_was_asked_for(model, tmp_path, target):
    """PyTorch's own writer of programs ended the process there."""
    code = (
        "import resource, sys; from miniclip.commands.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5)); main(['export', *sys.argv[1:]])"
    )
    error = run(sys.executable, "-c", code, model, "out", "--to", target, code=2, cwd=tmp_path, is_warm=True).stderr
    assert "error: [Errno 27] File too large: 'out'" in error
    assert list(tmp_path.iterdir()) == []


def test_an_export_into_what_another_process_writes_is_refused(refused, model, tmp_path):
    with stand_in(tmp_path / "out", "busy"):
        error = refused(model, str(tmp_path / "out"), "--to", "torch", "--overwrite")
    assert f"another process is writing {tmp_path / 'out'}" in error


@pytest.mark.parametrize("name", ["CNAME", ".git/HEAD", "onnx/notes.txt", "search/mine.jpg", "vision_model.txt"])
def test_overwriting_never_deletes_what_exporting_did_not_write(refused, exported, model, name):
    refuse_existing(exported, overwrite=True)
    (exported / name).parent.mkdir(exist_ok=True)
    (exported / name).write_text("a year's work")
    content = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    error = refused(model, str(exported), "--to", "onnx", "--overwrite")
    assert f"did not write, so it is not overwritten: {name};" in error
    assert {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()} == content
    (exported / name).unlink()


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    "package, target, extra", [("onnxscript", "onnx", "onnx"), ("openvino", "openvino", "openvino")]
)
def test_a_missing_package_is_named_with_its_extra(model, tmp_path, package, target, extra):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        f"from miniclip.commands.main import main\nmain(['export', {model!r}, 'out', '--to', {target!r}])"
    )
    error = run(sys.executable, "-c", code, code=2, cwd=tmp_path, is_warm=True).stderr
    assert f"needs {package}: pip install 'miniclip[{target}]'" in error
    assert list(tmp_path.iterdir()) == []
