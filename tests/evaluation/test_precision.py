"""Models that are opened in bf16: float32 features, close to float32's, and never taken for them."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from command_line import fails
from helpers import picture, tiny_clip, write_picture

import miniclip
from miniclip.commands import main as cli
from miniclip.config import VisionConfig
from miniclip.evaluation.encoder import from_object, in_bf16
from miniclip.evaluation.other_libraries import as_encoder, open_model
from miniclip.fast import bfloat16
from miniclip.inference.app.answers import Answers
from miniclip.inference.explanation.explain import Explainer
from miniclip.inference.search.index import Index
from miniclip.inference.thresholds import CalibratedModel, ModelThreshold

TEXTS = ["a photo of a cat.", "two dogs", "seven red birds"]
pytestmark = pytest.mark.filterwarnings("ignore:this CPU has neither")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    miniclip.save(tiny_clip(), folder := tmp_path_factory.mktemp("model") / "tiny")
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(8):
        write_picture(folder / ("cat", "dog")[number % 2] / f"{number}.png", number)
    return folder


def features(encoder):
    images = torch.stack([encoder.preprocess(picture(seed)) for seed in range(3)])
    return encoder.encode_image(images), encoder.encode_text(encoder.tokenize(TEXTS)), encoder.encode_pooled(images)


def refusal(capsys, *arguments):
    return fails(capsys, [str(each) for each in arguments])


def test_features_are_float32_and_close_to_those_of_float32(model):
    exact, rounded = (features(open_model(model, "cpu", precision)) for precision in (None, "bf16"))
    for found, expected in zip(rounded, exact, strict=True):
        assert found.dtype == torch.float32
        assert not torch.equal(found, expected)
        assert F.cosine_similarity(found, expected).min() > 0.999


def test_a_tower_of_timm_s_and_an_object_of_the_user_s_run_under_autocast(tmp_path):
    vision = VisionConfig(kind="timm", image_size=32, timm_model="resnet10t")
    miniclip.save(tiny_clip(vision=vision), tmp_path / "timm")
    for opened in (
        lambda: open_model(str(tmp_path / "timm"), "cpu"),
        lambda: from_object(open_model(str(tmp_path / "timm"), "cpu"), "an object"),
    ):
        exact, rounded = features(opened()), features(in_bf16(opened()))
        assert rounded[0].dtype == torch.float32
        assert 0 < (rounded[0] - exact[0]).abs().max() < 0.1 * exact[0].abs().max()


def test_fingerprints_name_the_precision_and_are_the_same_each_time(model):
    found = {}
    for precision in ("float32", "bf16", "bf16"):
        encoder = open_model(model, "cpu", precision)
        found.setdefault(precision, set()).add((encoder.image_fingerprint(), encoder.text_fingerprint()))
    assert all(len(each) == 1 for each in found.values())
    (exact,), (rounded,) = found.values()
    assert exact[0] != rounded[0]
    assert exact[1] != rounded[1]


def test_other_weights_have_other_fingerprints_in_bf16_too(tmp_path, model):
    miniclip.save(tiny_clip(1), tmp_path / "other")
    one, two = (open_model(name, "cpu", "bf16") for name in (model, str(tmp_path / "other")))
    assert one.image_fingerprint() != two.image_fingerprint()
    assert one.text_fingerprint() != two.text_fingerprint()


def test_a_precision_that_is_none_is_refused(model):
    with pytest.raises(ValueError, match=r"precision is 'fp16'; it must be float32 or bf16"):
        open_model(model, "cpu", "fp16")


def test_a_model_that_is_open_keeps_its_precision(model):
    rounded = open_model(model, "cpu", "bf16")
    assert as_encoder(rounded) is as_encoder(rounded, precision="bf16") is rounded
    with pytest.raises(ValueError, match=r"precision is float32, and the given model is open in bf16"):
        as_encoder(rounded, precision="float32")
    with pytest.raises(ValueError, match=r"precision is bf16, and the given model is open in float32"):
        as_encoder(miniclip.load(model), precision="bf16")


def test_a_model_in_bf16_is_not_explained(model):
    with pytest.raises(ValueError, match=r"open in bf16.*need float32"):
        Explainer(open_model(model, "cpu", "bf16"))


def test_a_cpu_without_the_instructions_is_warned_of(model, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert not bfloat16.is_fast()
    with pytest.warns(UserWarning, match="neither AVX512-BF16 nor AMX, so bf16 is no faster"):
        open_model(model, "cpu", "bf16")


def test_a_threshold_of_another_precision_is_warned_of(model):
    exact, rounded = open_model(model, "cpu"), open_model(model, "cpu", "bf16")
    threshold = ModelThreshold(0.2, "by hand", model=CalibratedModel.of(exact))
    threshold.check_model(exact)
    with pytest.warns(UserWarning, match=r"\(in bf16\) gives slightly other features.*\(in float32\)"):
        threshold.check_model(rounded)


def test_embed_does_not_go_on_in_another_precision(model, photos, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["embed", str(photos), str(out), "--model", model, "--workers", "0", "--device", "cpu"]
    cli.main([*command, "--precision", "bf16"])
    assert json.loads((out / "_manifest.json").read_text())["precision"] == "bf16"
    found = np.stack(pd.read_parquet(out).embedding)
    assert found.dtype == np.float32
    assert "precision was 'bf16' and is 'float32'" in refusal(capsys, *command)
    cli.main([*command, "--overwrite"])
    assert 0 < np.abs(np.stack(pd.read_parquet(out).embedding) - found).max() < 0.02


def test_an_index_is_searched_in_its_own_precision(model, photos, tmp_path, capsys):
    path = tmp_path / "photos.index"
    Index(path, model, device="cpu", precision="bf16").update(photos)
    index = Index(path, device="cpu")
    assert index.precision == index.encoder.precision == "bf16"
    assert len(index.search("a cat")) == 8
    wrong = refusal(capsys, "search", path, "a cat", "--precision", "float32")
    assert "was made in bf16, and float32 is asked for" in wrong
    with pytest.raises(ValueError, match=r"was made in bf16, and float32 is asked for"):
        Index(path, open_model(model, "cpu"))


def test_an_index_from_before_there_was_a_choice_is_in_float32(model, photos, tmp_path):
    Index(tmp_path / "an.index", model, device="cpu").update(photos)
    index = Index(tmp_path / "an.index")
    assert index.precision == "float32"
    with pytest.raises(ValueError, match=r"made in float32, and bf16 is asked for"):
        Index(tmp_path / "an.index", precision="bf16")


def test_eval_records_its_precision_and_compare_names_it(model, photos, tmp_path, capsys):
    common = ["eval", "--model", model, "--data", str(photos), "--workers", "0", "--device", "cpu"]
    common += ["--cache", str(tmp_path / "cache")]
    outs = {precision: tmp_path / precision for precision in ("float32", "bf16")}
    for precision, out in outs.items():
        cli.main([*common, "--out", str(out), "--precision", precision])
        (result,) = json.loads((out / "results.json").read_text())["results"]
        assert result["precision"] == precision
        assert pd.read_csv(out / "results.csv").precision.tolist() == [precision]
        assert (", bf16" in (out / "report.html").read_text()) == (precision == "bf16")
    assert f"eval --compare OTHER {outs['bf16']}" in capsys.readouterr().out
    cosines = [np.array(predicted(out)) for out in outs.values()]
    assert not np.array_equal(*cosines)  # no features came from the other's cache
    cli.main(["eval", "--compare", *map(str, outs.values())])
    assert "in bf16" in capsys.readouterr().out


def predicted(out):
    (path,) = (out / "predictions").glob("*.parquet")
    return pd.read_parquet(path).select_dtypes("float")


def test_classify_and_the_classifier_take_a_precision(model, photos, tmp_path, capsys):
    command = ["classify", str(photos), "--model", model, "--labels", "cat,dog", "--workers", "0", "--csv"]
    command += ["--cache", str(tmp_path / "cache"), "--device", "cpu"]
    cli.main(command)
    exact = capsys.readouterr().out
    cli.main([*command, "--precision", "bf16"])
    assert capsys.readouterr().out != exact
    pictures = [picture(seed) for seed in range(4)]
    one, two = (
        miniclip.ZeroShotClassifier(model, precision=each, device="cpu").fit(None, ["cat", "dog"])
        for each in (None, "bf16")
    )
    assert 0 < np.abs(one.predict_proba(pictures) - two.predict_proba(pictures)).max() < 0.05


def test_precision_is_a_field_that_replace_keeps(model):
    rounded = open_model(model, "cpu", "bf16")
    assert replace(rounded, name="other").image_fingerprint() == rounded.image_fingerprint()


def test_an_index_that_another_process_made_meanwhile_in_another_precision_is_not_mixed(model, photos, tmp_path):
    path = tmp_path / "photos.index"
    early = Index(path, model, device="cpu")
    Index(path, model, device="cpu", precision="bf16").update(photos / "cat")
    with pytest.raises(ValueError, match=r"made in bf16, and .* open in float32"):
        early.update(photos / "dog")
    assert len(Index(path)) == 4


def test_an_open_model_and_an_index_of_another_precision_do_not_go_together(model, tmp_path):
    with pytest.raises(ValueError, match=r"precision is bf16, and the given model is open in float32"):
        Index(tmp_path / "new.index", open_model(model, "cpu"), precision="bf16")
    with pytest.raises(ValueError, match=r"precision is 'fp17'; it must be float32 or bf16"):
        Index(tmp_path / "new.index", open_model(model, "cpu"), precision="fp17")


@pytest.mark.parametrize("precision", [0, "", False, ["bf16"]], ids=str)
def test_precisions_of_another_kind_are_refused(model, tmp_path, precision):
    for opens in (
        lambda: open_model(model, "cpu", precision),
        lambda: Index(tmp_path / "new.index", model, device="cpu", precision=precision),
        lambda: miniclip.ZeroShotClassifier(model, device="cpu", precision=precision).fit(None, ["a", "b"]),
    ):
        with pytest.raises(ValueError, match=r"precision is .*; it must be float32 or bf16"):
            opens()


def test_a_model_of_ones_own_code_that_is_open_in_bf16_is_known_as_such(model, tmp_path):
    lines = (
        "from miniclip.evaluation.other_libraries import open_model",
        f"model = lambda: open_model({model!r}, 'cpu', 'bf16')",
    )
    (tmp_path / "rounded.py").write_text("\n".join(lines))
    name = f"python:{tmp_path / 'rounded.py'}:model"
    assert [open_model(name, "cpu", each).precision for each in (None, "bf16")] == ["bf16", "bf16"]
    with pytest.raises(ValueError, match=r"precision is float32, and the given model is open in bf16"):
        open_model(name, "cpu", "float32")


def test_a_page_of_a_model_in_bf16_offers_no_heat_map(model):
    assert [Answers(open_model(model, "cpu", each)).can_explain for each in (None, "bf16")] == [True, False]


def test_a_verb_that_has_one_precision_takes_no_other(capsys):
    asked = ["interpolate", "a", "b", "--out", "c", "--precision", "bf16"]
    assert "unrecognized arguments: --precision" in refusal(capsys, *asked)
