# convert.py: from every layout to every other and back. Oracles: open_clip, transformers, and arithmetic.

import contextlib
import json
import os
import re
import subprocess
import sys
import warnings
from inspect import signature
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import warm
from conversions import archive, assert_same_bits, refused, target
from foreign_models import (
    TINY,
    TINY_RESNET,
    TINY_VIT,
    assert_close,
    openclip_model,
    probe,
    write_archive,
    write_openai_state_dict,
)
from helpers import picture, tiny_clip
from open_clip.openai import load_openai_model
from PIL import Image
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer
from transformers import CLIPModel as HFModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging as transformers_logging

import miniclip
from miniclip.commands.main import main
from miniclip.common.files import stand_in
from miniclip.config import OPENAI_MODELS, CLIPConfig, TextConfig, VisionConfig
from miniclip.data.wordings.kept import Wording, Wordings
from miniclip.inference.thresholds import ModelThreshold, write_threshold
from miniclip.model import CLIP
from miniclip.weights.convert import FORMATS, convert
from miniclip.weights.facts import inspect
from miniclip.weights.load import load, save
from miniclip.weights.read import read_checkpoint

ROUND_TRIPS = {"vit": ("hf", "openclip", "native", "openai"), "resnet": ("openclip", "native", "openai")}
FULL_VOCABULARY = CLIPConfig(24, "quick_gelu", TINY_VIT.vision, TextConfig(width=64, layers=1))


@pytest.fixture(scope="module")
def full_vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    return write_archive(openclip_model(FULL_VOCABULARY, seed=2), FULL_VOCABULARY, folder / "model.pt")


# ---- there and back


@pytest.mark.sample(2)
@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("dtype", ["half", "float", "mixed"])
def test_a_round_trip_through_every_layout_keeps_every_bit_and_type(tmp_path, kind, dtype):
    halved = {"half": lambda *_: True, "float": lambda *_: False, "mixed": lambda _, tensor: tensor.ndim > 1}[dtype]
    path = archive(tmp_path, kind, halved)
    original = read_checkpoint(path)
    types = {tensor.dtype for tensor in original.tensors.values() if tensor.is_floating_point()}
    assert types == {"half": {torch.float16}, "float": {torch.float32}}.get(dtype, {torch.float16, torch.float32})
    for number, to in enumerate(ROUND_TRIPS[kind]):
        out = target(tmp_path, to, number)
        convert(path, out, to)
        checkpoint = read_checkpoint(out)
        assert checkpoint.format == to
        assert checkpoint.config.activation == "quick_gelu"
        assert_same_bits(checkpoint.tensors, original.tensors)
        path = out


def test_a_round_trip_by_the_command_gives_openais_state_dict(tmp_path, source, capsys):
    path = source
    for number, to in enumerate(ROUND_TRIPS["vit"]):
        out = target(tmp_path, to, number)
        main(["convert", str(path), str(out), "--to", to])
        said = capsys.readouterr().out
        assert str(out) in said
        assert "miniclip" in said
        assert {"hf": "transformers", "openclip": "open_clip"}.get(to, "") in said
        path = out
    found = dict(torch.jit.load(path, map_location="cpu").state_dict())
    sizes = {"input_resolution": 24, "context_length": 16, "vocab_size": 60}
    assert {name: int(found.pop(name)) for name in sizes} == sizes
    expected = torch.jit.load(source, map_location="cpu").state_dict()
    for name in (*sizes, "attn_mask"):
        expected.pop(name, None)
    assert_same_bits(found, expected)


@pytest.mark.parametrize("to", FORMATS)
def test_a_converted_model_gives_the_same_embeddings(tmp_path, source, to):
    convert(source, target(tmp_path, to), to)
    before, after = (load(path, device="cpu")[0] for path in (source, target(tmp_path, to)))
    images = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[58, 3, 5, 59], [58, 7, 59, 0]])
    with torch.no_grad():
        assert_close(after.encode_image(images), before.encode_image(images))
        assert_close(after.encode_text(tokens), before.encode_text(tokens))


@pytest.mark.parametrize("to", FORMATS)
def test_mean_and_deviation_go_along_where_the_layout_has_a_place_for_them(tmp_path, to):
    vision = VisionConfig(image_size=24, patch_size=8, width=64, layers=1, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    torch.manual_seed(0)
    config = CLIPConfig(24, "quick_gelu", vision, TextConfig(16, 60, 59, 64, 1))
    save(CLIP(config), tmp_path / "model")
    convert(tmp_path / "model", target(tmp_path, to), to)
    if to != "openai":
        found = read_checkpoint(target(tmp_path, to)).config.vision
        assert (found.mean, found.std) == (vision.mean, vision.std)


def test_a_bare_state_dict_is_converted_when_its_activation_is_given(tmp_path, capsys):
    torch.save(openclip_model(TINY_VIT).state_dict(), tmp_path / "bare.pt")
    arguments = ["convert", str(tmp_path / "bare.pt"), str(tmp_path / "out"), "--to", "native"]
    with pytest.raises(SystemExit):
        main(arguments)
    assert "activation" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    main([*arguments, "--activation", "gelu", "--head-width", "64"])
    assert read_checkpoint(tmp_path / "out").config.activation == "gelu"


def test_a_resnet_is_refused_for_hugging_face(tmp_path):
    refused(archive(tmp_path, "resnet"), tmp_path / "out", "hf", "Hugging Face")


def test_a_gelu_model_is_refused_for_openai(tmp_path):
    save(tiny_clip(activation="gelu"), tmp_path / "model")
    refused(tmp_path / "model", tmp_path / "out.pt", "openai", "GELU")


@pytest.mark.parametrize("tower", ["vision", "text"])
@pytest.mark.parametrize("change, word", [({"head_width": 32}, "64"), ({"mlp_ratio": 3.0}, "mlp_ratio")])
def test_a_shape_that_openais_code_can_not_build_is_refused_for_openai(tmp_path, tower, change, word):
    sections = {"vision": vars(TINY_VIT.vision), "text": vars(TINY_VIT.text)}
    sections[tower] = sections[tower] | change
    config = CLIPConfig(24, "quick_gelu", VisionConfig(**sections["vision"]), TextConfig(**sections["text"]))
    save(CLIP(config), tmp_path / "model")
    refused(tmp_path / "model", tmp_path / "out.pt", "openai", word)


@pytest.mark.parametrize("end", [1, 7])
def test_an_end_token_is_written_where_the_layout_can_say_it_and_else_refused(tmp_path, end):
    """OpenAI's code pools at the largest id, and its layout has no place to say otherwise."""
    text = TextConfig(**{**vars(TINY_VIT.text), "eot_token": end})
    save(CLIP(CLIPConfig(24, "quick_gelu", TINY_VIT.vision, text)), tmp_path / "model")
    refused(tmp_path / "model", target(tmp_path, "openai"), "openai")
    assert "by open_clip" in convert(tmp_path / "model", tmp_path / "out", "openclip")
    assert read_checkpoint(tmp_path / "out").config.text.eot_token == end


@pytest.mark.parametrize("to", ["onnx", "", "HF"])
def test_an_unknown_layout_is_refused_naming_the_valid_ones(tmp_path, source, to):
    refused(source, tmp_path / "out", to, *FORMATS)


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_there_is_replaced_only_when_asked(tmp_path, source, to):
    out = target(tmp_path, to)
    convert(archive(tmp_path), out, to)
    other = write_openai_state_dict(openclip_model(TINY_VIT, seed=9), TINY_VIT, tmp_path / "other.pt")
    expected = read_checkpoint(other).tensors
    content = {path: path.read_bytes() for path in [out, *out.rglob("*")] if path.is_file()}
    refused(other, out, to, str(out))
    assert {path: path.read_bytes() for path in [out, *out.rglob("*")] if path.is_file()} == content
    convert(other, out, to, overwrite=True)
    assert_same_bits(read_checkpoint(out).tensors, expected)
    assert not list(tmp_path.glob(".*"))


def test_the_command_says_how_to_replace_what_is_there(tmp_path, source, capsys):
    arguments = ["convert", str(source), str(tmp_path / "out"), "--to", "hf"]
    main(arguments)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "--overwrite" in capsys.readouterr().err
    main([*arguments, "--overwrite"])


@pytest.mark.sample(5)
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("broken", ["visual.proj", "text_projection", "visual.conv1.weight", "ln_final.weight"])
def test_a_model_that_can_not_be_verified_leaves_the_old_one_as_it_was(tmp_path, source, to, broken):
    """Its features are infinite or NaN, which is equal to nothing, so nothing can be verified."""
    out = target(tmp_path, to)
    convert(source, out, to)
    content = {path: path.read_bytes() for path in [out, *out.rglob("*")] if path.is_file()}
    model = openclip_model(TINY_VIT)
    model.get_parameter(broken).data.fill_(3e38)
    bad = write_openai_state_dict(model, TINY_VIT, tmp_path / "bad.pt")
    refused(bad, out, to, overwrite=True)
    assert {path: path.read_bytes() for path in [out, *out.rglob("*")] if path.is_file()} == content


def test_a_source_that_is_spoilt_is_refused_and_nothing_is_written(tmp_path, source):
    source.write_bytes(source.read_bytes()[:5000])
    refused(source, tmp_path / "out", "native", str(source))


def test_a_source_inside_the_folder_to_replace_is_not_lost(tmp_path):
    (tmp_path / "models").mkdir()
    path = archive(tmp_path / "models")
    with contextlib.suppress(ValueError):
        convert(path, tmp_path / "models", "native", overwrite=True)
    assert path.exists()


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    "name",
    ["README.md", "notes.txt", "optimizer.pt", ".git/HEAD", "checkpoint-500/model.safetensors", "tokenizer.json"],
)
def test_overwriting_never_deletes_what_converting_did_not_write(tmp_path, source, name, in_place):
    out = tmp_path / "out"
    convert(source, out, "hf")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("a year's work")
    content = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    words = (f"{out} holds what `miniclip convert` did not write", f": {name}; move that away")
    refused(out if in_place else source, out, "native", *words, overwrite=True)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == content


def test_the_first_of_many_files_in_the_way_are_named_and_links_are_files(tmp_path, source):
    convert(source, tmp_path / "out", "native")
    (tmp_path / "data").mkdir()
    (tmp_path / "out" / "data").symlink_to(tmp_path / "data")
    for number in range(6):
        (tmp_path / "out" / f"epoch_{number}.pt").write_text("")
    words = "data, epoch_0.pt, epoch_1.pt, epoch_2.pt, epoch_3.pt and 2 more"
    refused(source, tmp_path / "out", "native", words, overwrite=True)


def test_all_that_the_command_writes_is_replaced_and_an_edited_card_is_not(tmp_path, full_vocabulary, capsys):
    out = tmp_path / "out"
    main(["convert", str(full_vocabulary), str(out), "--to", "hf"])
    (out / "wordings.json").write_text(Wordings((Wording("a photo of a {}", 0.9),), (), 100).to_json())
    for to, keeps_pixels in (("openclip", False), ("native", True), ("hf", False)):
        if not (out / "threshold.json").exists():
            write_threshold(out / "threshold.json", ModelThreshold(0.2, "by eye", classnames=("cat", "dog")))
        main(["convert", str(out), str(out), "--to", to, "--overwrite"])
        names = {path.name for path in out.iterdir()}
        assert "wordings.json" in names
        assert ("threshold.json" in names) == keeps_pixels
        assert read_checkpoint(out).format == to
    assert {"README.md", "merges.txt", "vocab.json"} < names
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMy own words.\n")
    with pytest.raises(SystemExit):
        main(["convert", str(out), str(out), "--to", "native", "--overwrite"])
    assert "did not write, so it is not overwritten: README.md" in capsys.readouterr().err
    assert "My own words." in (out / "README.md").read_text()


def test_of_two_conversions_at_once_into_one_folder_one_is_refused(tmp_path):
    for name, seed in (("first", 1), ("second", 2)):
        torch.manual_seed(seed)
        save(tiny_clip(), tmp_path / name)
    commands = [
        [sys.executable, "-m", "miniclip", "convert", name, "out", "--to", "hf"] for name in ("first", "second")
    ]
    both = [warm.Popen(each, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for each in commands]
    said = [each.communicate()[1] for each in both]
    assert sorted(each.returncode for each in both) == [0, 2]
    (refusal,) = [text for text, each in zip(said, both, strict=True) if each.returncode]
    assert re.search("error: (another process is writing out|out exists already)", refusal)
    (winner,) = [name for name, each in zip(("first", "second"), both, strict=True) if not each.returncode]
    assert_same_bits(read_checkpoint(tmp_path / "out").tensors, read_checkpoint(tmp_path / winner).tensors)


def test_a_conversion_into_what_another_process_writes_is_refused_with_or_without_overwriting(tmp_path, source):
    out = tmp_path / "out"
    for overwrite in (False, True):
        with stand_in(out, "busy"):
            refused(source, out, "native", "another process is writing", overwrite=overwrite)
        convert(source, out, "native", overwrite)


@pytest.mark.parametrize("to", ["native", "openai", "openclip", "hf"])
def test_a_disk_that_is_full_is_told_by_the_name_that_was_asked_for(tmp_path, source, to):
    code = (
        "import resource, sys; from miniclip.commands.main import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); main(['convert', *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "full"), "--to", to]
    done = warm.run(command)
    assert done.returncode == 2, done.stderr
    assert f"error: [Errno 27] File too large: '{tmp_path / 'full'}'" in done.stderr
    assert not list(tmp_path.glob("*full*"))


def test_a_model_converted_in_place_is_whole(tmp_path, source):
    convert(source, tmp_path / "out", "hf")
    before = read_checkpoint(tmp_path / "out").tensors
    before = {name: tensor.clone() for name, tensor in before.items()}
    convert(tmp_path / "out", tmp_path / "out", "native", overwrite=True)
    assert_same_bits(read_checkpoint(tmp_path / "out").tensors, before)
    assert read_checkpoint(tmp_path / "out").format == "native"


def test_folders_that_are_not_there_yet_are_made(tmp_path, source):
    for to in FORMATS:
        convert(source, target(tmp_path / "a" / to / "b", to), to)
        assert read_checkpoint(target(tmp_path / "a" / to / "b", to)).format == to


# ---- what becomes of pictures

LOGO = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
LOGO.paste((200, 30, 30, 255), (30, 30, 70, 70))


@pytest.mark.parametrize("began", ["openai", "hf"])
@pytest.mark.parametrize("to", FORMATS)
def test_a_conversion_says_whether_pictures_still_become_the_same_pixels(
    tmp_path, source, to, began, capsys, monkeypatch
):
    monkeypatch.setattr(transformers_logging, "_tqdm_active", True)  # whatever other tests do
    path = source
    if began == "hf":
        path = tmp_path / "began"
        convert(source, path, "hf")
    capsys.readouterr()
    out = target(tmp_path, to)
    main(["convert", str(path), str(out), "--to", to])
    said = capsys.readouterr()
    (before, before_pixels), (after, after_pixels) = (load(each, device="cpu") for each in (path, out))
    pictures = [picture(1, (77, 50)), LOGO]
    is_same = all(torch.equal(before_pixels(each), after_pixels(each)) for each in pictures)
    assert is_same == (to in ("native", began) or (began, to) == ("openai", "openclip"))
    assert (" prepares pictures in " in said.err) == (not is_same)
    assert "Loading weights" not in said.err  # a bar of transformers'
    assert transformers_logging.is_progress_bar_enabled()  # which others still see
    assert ("but of pictures cosine" in said.out) == (not is_same)
    with torch.no_grad():
        a, b = (
            model.encode_image(pixels(LOGO)[None]) for model, pixels in ((before, before_pixels), (after, after_pixels))
        )
    assert (float(torch.cosine_similarity(a, b)) > 0.99999) == is_same


@pytest.mark.parametrize("to", ["openclip", "hf"])
def test_the_pictures_of_the_proof_are_prepared_by_the_other_library_itself(tmp_path, source, to, monkeypatch):
    """With a preprocessing of its own for squares of the model's size, which no warning of ours could know of."""
    if to == "hf":
        monkeypatch.setattr(
            CLIPImageProcessorPil, "__call__", lambda _, pictures, **__: {"pixel_values": torch.zeros(3, 3, 24, 24)}
        )
    else:
        create = open_clip.create_model_and_transforms
        monkeypatch.setattr(
            open_clip,
            "create_model_and_transforms",
            lambda name: (create(name)[0], None, lambda _: torch.zeros(3, 24, 24)),
        )
    name = {"hf": "transformers", "openclip": "open_clip"}[to]
    assert f"same embeddings of the same pixels by {name} " in convert(source, tmp_path / "out", to)


def test_a_threshold_comes_along_where_pictures_stay_as_they_were_and_is_else_left_out_by_name(tmp_path, source):
    convert(source, tmp_path / "model", "openclip")
    write_threshold(tmp_path / "model/threshold.json", ModelThreshold(0.2, "by eye", classnames=("cat", "dog")))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert(tmp_path / "model", tmp_path / "native", "native")
    assert (tmp_path / "native/threshold.json").read_bytes() == (tmp_path / "model/threshold.json").read_bytes()
    with pytest.warns(UserWarning, match=r"threshold\.json is left out"):
        convert(tmp_path / "model", tmp_path / "hf", "hf")
    assert not (tmp_path / "hf/threshold.json").exists()


def test_writing_for_openais_package_shows_no_warnings_of_torchs(tmp_path, source):
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        convert(source, tmp_path / "out.pt", "openai")
    assert [str(each.message) for each in shown] == []


# ---- as the other libraries see it

TEXTS = ["a diagram", "a dog", "A photo of the number 7,  handwritten!", "naïve café ☕ 1,234.5", "", "don't", "x" * 60]


def test_transformers_makes_the_same_tokens_of_a_converted_folder(tmp_path, full_vocabulary):
    convert(full_vocabulary, tmp_path / "out", "hf")
    for tokenizer in (CLIPTokenizer.from_pretrained(tmp_path / "out"), CLIPProcessor.from_pretrained(tmp_path / "out")):
        for text, ours in zip(TEXTS, miniclip.tokenize(TEXTS), strict=True):
            ids = tokenizer(text=text, truncation=True)["input_ids"]
            ids = ids[0] if isinstance(ids[0], list) else ids
            assert ids == ours[ours != 0].tolist(), text
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "out")
    long = tokenizer("a word " * 100, truncation=True)["input_ids"]
    assert long == miniclip.tokenize("a word " * 100, truncate=True)[0].tolist()


@pytest.mark.parametrize("as_tokenizers_do", [False, True], ids=["vocab.json", "tokenizer.json"])
def test_as_many_tokens_of_another_vocabulary_are_not_taken_for_clips(tmp_path, full_vocabulary, as_tokenizers_do):
    """Ids 600 and 601 change places: texts with one of them would have been read as other words."""
    out = tmp_path / "out"
    convert(full_vocabulary, out, "hf")
    words = json.loads((out / "vocab.json").read_text())
    if as_tokenizers_do:
        CLIPTokenizer.from_pretrained(out).save_pretrained(out)
        (out / "vocab.json").unlink()
        assert json.loads((out / "tokenizer.json").read_text())["model"]["vocab"] == words
    load(out, device="cpu")
    one, other = (token for token, index in words.items() if index in (600, 601))
    words[one], words[other] = words[other], words[one]
    name, found = ("tokenizer.json", {"model": {"vocab": words}}) if as_tokenizers_do else ("vocab.json", words)
    (out / name).write_text(json.dumps(found))
    with pytest.raises(ValueError, match=rf"{name} is another vocabulary than CLIP's.*: 2 of CLIP's 49,406 .* the id"):
        load(out, device="cpu")
    (out / name).write_text(json.dumps({"model": {"vocab": [["▁a", -1.0]]}} if as_tokenizers_do else {"▁a": 0}))
    with pytest.raises(ValueError, match=r"49,406 of CLIP's 49,406 .* and has no id"):
        load(out, device="cpu")
    (out / name).unlink()
    load(out, device="cpu")


@pytest.mark.parametrize("padding", ["max_length", True])
def test_transformers_gives_the_same_logits_from_its_own_tokens(tmp_path, full_vocabulary, padding):
    convert(full_vocabulary, tmp_path / "out", "hf")
    model, preprocess = load(tmp_path / "out", device="cpu")
    other, tokenizer = HFModel.from_pretrained(tmp_path / "out"), CLIPTokenizer.from_pretrained(tmp_path / "out")
    texts = TEXTS[:4]
    images = torch.stack([preprocess(picture(seed, (40, 30))) for seed in range(2)])
    with torch.no_grad():
        theirs = other.float()(
            pixel_values=images, **tokenizer(texts, padding=padding, return_tensors="pt")
        ).logits_per_image
        assert_close(model(images, miniclip.tokenize(texts))[0], theirs)


PICTURES = [
    picture(seed, size, mode)
    for seed, (size, mode) in enumerate(
        [((24, 24), "RGB"), ((61, 40), "RGB"), ((40, 61), "L"), ((33, 47), "P"), ((90, 25), "RGBA"), ((13, 20), "LA")]
    )
]


def test_transformers_prepares_pictures_as_a_converted_folders_preprocess_does(tmp_path, full_vocabulary):
    convert(full_vocabulary, tmp_path / "out", "hf")
    _, preprocess = load(tmp_path / "out", device="cpu")
    assert preprocess.style == "hf"
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "out")
    for image in PICTURES:
        theirs = torch.from_numpy(np.asarray(processor(image)["pixel_values"][0]))
        torch.testing.assert_close(preprocess(image), theirs, rtol=0, atol=1e-6)
    assert CLIPImageProcessor.from_pretrained(tmp_path / "out").crop_size["height"] == 24


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_reader_of_openais_archives_gives_the_same_embeddings(tmp_path, kind, precision):
    """As OpenAI's `clip.load`: torch.jit.load, whose state dict makes a model with half-precision weights."""
    convert(archive(tmp_path, kind), tmp_path / "out.pt", "openai")
    tensors = torch.jit.load(tmp_path / "out.pt", map_location="cpu").state_dict()
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
    theirs = load_openai_model(str(tmp_path / "out.pt"), precision=precision, device="cpu").float().eval()
    ours, _ = load(tmp_path / "out.pt", device="cpu")
    images, tokens = probe(TINY[kind])
    with torch.no_grad():
        assert_close(ours.encode_image(images), theirs.encode_image(images))
        assert_close(ours.encode_text(tokens), theirs.encode_text(tokens))


def test_pictures_that_openais_package_would_prepare_otherwise_are_warned_of(tmp_path):
    vision = VisionConfig(
        image_size=24, patch_size=8, width=64, layers=1, mean=(0.1, 0.2, 0.3), interpolation="bilinear"
    )
    save(CLIP(CLIPConfig(24, "quick_gelu", vision, TextConfig(16, 60, 59, 64, 1))), tmp_path / "model")
    with pytest.warns(UserWarning, match=r"mean, \(0\.1, 0\.2, 0\.3\)"), pytest.warns(UserWarning, match="bilinear"):
        convert(tmp_path / "model", tmp_path / "out.pt", "openai")


@pytest.mark.parametrize(
    "changes, to, word",
    [
        ({"resize": "squash"}, "openclip", ""),
        ({"interpolation": "bilinear"}, "openclip", ""),
        ({"interpolation": "lanczos"}, "openclip", "lanczos"),
        ({"resize_size": 40}, "openclip", "24 pixels"),
        ({"resize": "none"}, "openclip", "24 pixels"),
        ({"resize": "squash", "resize_size": 40, "interpolation": "lanczos"}, "hf", ""),
        ({"resize": "none"}, "hf", ""),
    ],
    ids=str,
)
def test_how_pictures_are_resized_goes_along_or_is_refused(tmp_path, changes, to, word):
    vision = VisionConfig(image_size=24, patch_size=8, width=64, layers=1, **changes)
    save(CLIP(CLIPConfig(24, "quick_gelu", vision, TextConfig(16, 60, 59, 64, 1))), tmp_path / "model")
    if word:
        refused(tmp_path / "model", tmp_path / "out", to, word)
        return
    convert(tmp_path / "model", tmp_path / "out", to)
    found = read_checkpoint(tmp_path / "out").config.vision
    assert {name: getattr(found, name) for name in changes} == changes
    preprocess = load(tmp_path / "out", device="cpu")[1]
    if to == "openclip":
        theirs = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")[2]
        for image in PICTURES:
            assert torch.equal(preprocess(image), theirs(image))


@pytest.mark.parametrize("kind", TINY)
def test_open_clip_loads_a_converted_folder_and_prepares_pictures_alike(tmp_path, kind):
    convert(archive(tmp_path, kind), tmp_path / "out", "openclip")
    other, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    other.eval()
    model, preprocess = load(tmp_path / "out", device="cpu")
    for image in PICTURES:
        assert torch.equal(preprocess(image), transform(image))
    images = torch.stack([preprocess(image) for image in PICTURES[:2]])
    tokens = torch.zeros(2, 16, dtype=torch.long)
    tokens[:, :4] = torch.tensor([[58, 3, 5, 59], [58, 7, 8, 59]])
    with torch.no_grad():
        assert_close(model.encode_image(images), other.encode_image(images))
        assert_close(model.encode_text(tokens), other.encode_text(tokens))


# ---- miniclip info


@pytest.fixture(scope="module")
def vit_b_32(tmp_path_factory):
    """Zeros of the right shapes, in half precision."""
    with torch.device("meta"):
        model = CLIP(OPENAI_MODELS["ViT-B/32"]).half()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    folder = tmp_path_factory.mktemp("info") / "model"
    save(model, folder)
    yield folder
    (folder / "model.safetensors").unlink()


def block_flops(tokens, width, queries=None):
    """Two for a multiplication and an addition: queries, keys and values; both products of attention; out; MLP."""
    queries = tokens if queries is None else queries
    linear = (
        queries * width * width + tokens * width * 2 * width + queries * width * width + 2 * queries * width * 4 * width
    )
    return 2 * (linear + 2 * queries * tokens * width)


def test_the_cost_of_vit_b_32_is_that_worked_out_by_hand(vit_b_32):
    facts = inspect(vit_b_32)
    image = 2 * 49 * 3 * 32 * 32 * 768 + 11 * block_flops(50, 768) + block_flops(50, 768, queries=1) + 2 * 768 * 512
    text = 11 * block_flops(77, 512) + block_flops(77, 512, queries=1) + 2 * 512 * 512
    assert facts.image_gflops == pytest.approx(image / 1e9, rel=1e-3)
    assert facts.text_gflops == pytest.approx(text / 1e9, rel=1e-3)
    # What is published counts the last block for all tokens: 4.41 and 2.98 GMACs less what miniclip leaves out.
    spared = [block_flops(n, d) - block_flops(n, d, queries=1) for n, d in ((50, 768), (77, 512))]
    assert facts.image_gflops + spared[0] / 1e9 == pytest.approx(8.82, rel=0.02)
    assert facts.text_gflops + spared[1] / 1e9 == pytest.approx(5.96, rel=0.02)


def test_info_tells_format_sizes_cost_and_activation(vit_b_32, capsys):
    main(["info", str(vit_b_32)])
    said = capsys.readouterr().out
    rows = dict(line.strip().split("  ", 1) for line in said.splitlines())
    assert rows["format"].strip() == "native"
    assert rows["activation"].strip() == "quick_gelu"
    assert rows["parameters"].strip() == "87.8 M image, 63.4 M text"
    assert rows["dtype"].strip() == "float16"
    assert rows["loads"].strip() == "yes"
    assert "patches of 32" in said
    assert re.search(r"[78]\.\d\d GFLOPs an image, 5\.\d\d a text", said)


@pytest.mark.long
def test_the_cost_of_rn50_is_about_the_published(tmp_path):
    """The paper's RN50 takes 12.2 GFLOPs an image (6.1 GMACs) with every token as a query of its pool."""
    with torch.device("meta"):
        model = CLIP(OPENAI_MODELS["RN50"]).half()
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():  # what lies in memory may be no number
        tensor.zero_()
    save(model, tmp_path / "model")
    assert inspect(tmp_path / "model").image_gflops == pytest.approx(12.0, rel=0.06)
    (tmp_path / "model" / "model.safetensors").unlink()


@pytest.mark.parametrize("to", FORMATS)
def test_info_names_the_format_of_what_convert_wrote(tmp_path, source, to, capsys):
    convert(source, target(tmp_path, to), to)
    main(["info", str(target(tmp_path, to))])
    said = capsys.readouterr().out
    assert re.search(rf"format\s+{to}\b", said)
    assert re.search(r"loads\s+yes", said)
    assert "float16" in said


def test_info_of_a_spoilt_checkpoint_lists_what_is_missing_and_what_does_not_belong(tmp_path, capsys):
    tensors = openclip_model(TINY_RESNET).state_dict() | {"input_resolution": torch.tensor(64), "spare": torch.ones(2)}
    del tensors["visual.bn1.bias"]
    torch.save(tensors, tmp_path / "model.pt")
    main(["info", str(tmp_path / "model.pt")])
    said = capsys.readouterr().out
    assert "visual.bn1.bias" in said
    assert "spare" in said
    assert not re.search(r"loads\s+yes", said)


def test_info_of_no_checkpoint_is_answered_in_words(tmp_path, capsys):
    Path(tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path / "notes.txt", tmp_path / "nowhere", tmp_path):
        with pytest.raises(SystemExit) as caught:
            main(["info", os.fspath(path)])
        assert caught.value.code == 2
        assert str(path) in capsys.readouterr().err


def test_a_written_openclip_configuration_has_nothing_that_open_clip_does_not_know(tmp_path, source):
    convert(source, tmp_path / "out", "openclip")
    settings = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert settings["model_cfg"].keys() <= signature(open_clip.CLIP).parameters.keys()
    assert settings["preprocess_cfg"]["interpolation"] == "bicubic"
