"""A threshold travels with its model: written, found, read, applied, and refused where it does not belong."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import tiny_clip, tiny_config
from hub import Hub, Repository

import miniclip
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.evaluation.encoder import from_clip
from miniclip.evaluation.measures.conformal import Coverage
from miniclip.evaluation.other_libraries import open_model
from miniclip.inference.thresholds import (
    FILE,
    CalibratedModel,
    ModelThreshold,
    Tried,
    find_threshold,
    model_folder,
    plain_templates,
    read_threshold,
    write_threshold,
)
from miniclip.weights.convert import convert
from miniclip.weights.load import preprocess_for

NAMES, TEMPLATES = ("cat", "dog", "owl"), ("a {}", "the {c}")


def encoder(seed=0, name="tiny"):
    model = tiny_clip(seed)
    return from_clip(model, preprocess_for(model.config), name)


def threshold(**changes):
    values = {
        "cosine": 0.25,
        "rule": "at most 5 % of outside images accepted",
        "false_acceptance": 0.05,
        "inside": Tried("animals", 40, 41, 0.975, (0.87, 0.99)),
        "outside": Tried("streets", 50, 50, 0.04, (0.01, 0.13)),
        "classnames": NAMES,
        "templates": TEMPLATES,
        "coverages": (Coverage(0.9, math.log(4), 40, 41, 0.93, (0.8, 0.98), 1.2, 0.01),),
        "model": CalibratedModel("tiny", "miniclip", math.e, (0.6, 0.8), (0.0, 1.0)),
        "written": "2026-11-26 by miniclip 0.1.0",
    }
    return ModelThreshold(**(values | changes))


# ---------------------------------------------------------------------------------------------------------------------
# Applied


def test_an_image_below_the_cosine_is_rejected_and_one_that_reaches_it_is_not():
    assert threshold().rejects([0.1, 0.25, 0.3]).tolist() == [True, False, False]
    assert threshold().rejects(np.array([[0.1, 0.3, 0.2], [0.2, 0.1, 0.24]])).tolist() == [False, True]
    assert threshold().rejects([]).tolist() == []


@pytest.mark.parametrize("cosines", [0.3, np.zeros((2, 0)), np.zeros((1, 2, 3)), [0.1, np.nan]])
def test_what_is_no_cosine_is_not_compared(cosines):
    with pytest.raises(ValueError, match="cosines"):
        threshold().rejects(cosines)


def test_a_set_has_the_classes_that_are_likely_enough():
    # At a logit scale of e, cosines log(p) / e are logits log(p): probabilities 1/2, 1/4, 1/4 and 5/8, 1/8, 1/4;
    # a class is in a set from 1/4 up.
    probabilities = np.array([[1 / 2, 1 / 4, 1 / 4], [5 / 8, 1 / 8, 1 / 4], [0.24, 0.24, 0.52]])
    sets = threshold().sets(np.log(probabilities) / math.e, 0.9)
    assert sets.tolist() == [[True, True, True], [True, False, True], [False, False, True]]


def test_sets_of_another_coverage_or_number_of_classes_are_refused():
    with pytest.raises(ValueError, match=r"coverage 0\.95 .* has 0\.9; .*--coverage 0\.9 0\.95 --overwrite` calib"):
        threshold(source="m/threshold.json").sets(np.zeros((1, 3)), 0.95)
    with pytest.raises(ValueError, match=r"for 3 classes.*these have \(1, 2\)"):
        threshold().sets(np.zeros((1, 2)), 0.9)
    with pytest.raises(ValueError, match="given by hand has none"):
        ModelThreshold(0.3, "given by hand").sets(np.zeros((1, 2)), 0.9)


# ---------------------------------------------------------------------------------------------------------------------
# Found, written and read


@pytest.mark.parametrize(
    "templates", [TEMPLATES, {name: (f"a {name}", f"an old {name}") for name in NAMES}, None], ids=type
)
def test_what_is_read_is_what_was_written(tmp_path, templates):
    path = tmp_path / FILE
    before = threshold(templates=templates)
    write_threshold(path, before)
    assert read_threshold(path) == replace(before, source=str(path))


def test_templates_that_are_functions_become_prompts():
    found = threshold(templates=plain_templates(NAMES, ["the {}", lambda name: f"my {name}"]))
    assert found.templates == {name: (f"the {name}", f"my {name}") for name in NAMES}
    assert found.difference(NAMES, ("my {}", "the {}")) == ""
    assert plain_templates(NAMES, ["the {}"]) == ("the {}",)


def test_a_threshold_is_found_in_the_models_folder(tmp_path):
    miniclip.save(tiny_clip(), tmp_path / "model")
    assert find_threshold(str(tmp_path / "model")) is None
    write_threshold(tmp_path / "model" / FILE, threshold())
    for name in (f"{tmp_path}/model", f"transformers:{tmp_path}/model", f"openclip:local-dir:{tmp_path}/model"):
        assert find_threshold(name).cosine == 0.25
    for name in ("ViT-B/32", "openclip:ViT-B-32/openai", f"{tmp_path}/model/model.safetensors", "", "transformers:"):
        assert model_folder(name) is None
        assert find_threshold(name) is None


@pytest.mark.parametrize(
    ("to", "style"), [("native", "openai"), ("native", "hf"), ("openclip", "openai"), ("hf", "hf")]
)
def test_a_converted_model_of_the_same_pixels_has_the_threshold_and_it_holds(tmp_path, recwarn, to, style):
    miniclip.save(tiny_clip(vision=replace(tiny_config().vision, preprocess=style)), tmp_path / "model")
    calibrated = CalibratedModel.of(open_model(str(tmp_path / "model"), "cpu"))
    write_threshold(tmp_path / "model" / FILE, threshold(model=calibrated))
    convert(tmp_path / "model", tmp_path / "out", to)
    prefix = {"native": "", "openclip": "openclip:local-dir:", "hf": "transformers:"}[to]
    for name in (f"{tmp_path}/out", f"{prefix}{tmp_path}/out"):
        found = find_threshold(name)
        assert found.model == calibrated
        found.check_model(open_model(name, "cpu"))
    assert not [each for each in recwarn if "calibrated" in str(each.message)]


@pytest.mark.parametrize(("to", "style"), [("openclip", "hf"), ("hf", "openai")])
def test_a_converted_model_of_other_pixels_has_no_threshold_and_says_so(tmp_path, to, style):
    miniclip.save(tiny_clip(vision=replace(tiny_config().vision, preprocess=style)), tmp_path / "model")
    calibrated = CalibratedModel.of(open_model(str(tmp_path / "model"), "cpu"))
    write_threshold(tmp_path / "model" / FILE, threshold(model=calibrated))
    with pytest.warns(UserWarning, match=rf"{FILE} is left out.*calibrate the new model"):
        convert(tmp_path / "model", tmp_path / "out", to)
    assert find_threshold(f"{tmp_path}/out") is None


def test_a_converted_file_has_no_place_for_a_threshold(tmp_path):
    vision = VisionConfig(image_size=16, patch_size=8, width=64, layers=1)
    config = CLIPConfig(16, "quick_gelu", vision, TextConfig(width=64, layers=1))
    miniclip.save(miniclip.CLIP(config), tmp_path / "model")
    write_threshold(tmp_path / "model" / FILE, threshold())
    convert(tmp_path / "model", tmp_path / "out.pt", "openai")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out.pt"}


FIND = """
import sys
from miniclip.evaluation.other_libraries import open_model
from miniclip.inference.thresholds import find_threshold, threshold_path
found = find_threshold("hf-hub:owner/birds")
found.check_model(open_model("hf-hub:owner/birds", "cpu"))
print(found.cosine)
print(find_threshold("hf-hub:owner/bare"))
try:
    threshold_path("hf-hub:owner/birds")
except ValueError as error:
    print(error)
"""


@pytest.mark.long
def test_a_threshold_is_found_in_the_hubs_repository(tmp_path):
    miniclip.save(tiny_clip(), tmp_path / "model")
    bare = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    calibrated = CalibratedModel.of(open_model(str(tmp_path / "model"), "cpu"))
    write_threshold(tmp_path / FILE, threshold(model=calibrated))
    with Hub() as hub:
        hub.repositories["owner/bare"] = Repository([bare])
        hub.repositories["owner/birds"] = Repository([{**bare, FILE: (tmp_path / FILE).read_bytes()}])
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-W", "error::UserWarning:__main__", "-c", FIND]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]
    cosine, nothing, refused = done.stdout.splitlines()
    assert (float(cosine), nothing) == (0.25, "None")
    assert "--out FILE" in refused


def test_a_number_or_a_file_wins_over_the_models_folder(tmp_path):
    for folder, cosine in (("model", 0.1), ("other", 0.2)):
        (tmp_path / folder).mkdir()
        write_threshold(tmp_path / folder / FILE, threshold(cosine=cosine))
    model = str(tmp_path / "model")
    assert find_threshold(model).cosine == 0.1
    assert find_threshold(model, "0.3").cosine == 0.3
    assert find_threshold(model, 0).cosine == 0
    assert find_threshold(model, f"{tmp_path}/other/{FILE}").cosine == 0.2
    assert find_threshold(model, tmp_path / "other").cosine == 0.2


@pytest.mark.parametrize("given", ["1.5", "-2", "nan", "25", "nowhere.json"])
def test_what_is_no_threshold_is_refused(given):
    with pytest.raises(ValueError, match=given):
        find_threshold("ViT-B/32", given)


def test_a_threshold_is_not_overwritten_unasked(tmp_path):
    write_threshold(tmp_path / FILE, threshold())
    with pytest.raises(ValueError, match="is there already; pass --overwrite"):
        write_threshold(tmp_path / FILE, threshold(cosine=0.5))
    assert read_threshold(tmp_path / FILE).cosine == 0.25
    write_threshold(tmp_path / FILE, threshold(cosine=0.5), overwrite=True)
    assert read_threshold(tmp_path / FILE).cosine == 0.5
    with pytest.raises(ValueError, match="is a folder"):
        write_threshold(tmp_path, threshold(), overwrite=True)


def damaged(change):
    def damage(path):
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return damage


@pytest.mark.parametrize(
    "damage, says",
    [
        (lambda path: path.write_text("{"), "Expecting"),
        (lambda path: path.write_text("[1, 2]"), ""),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), ""),
        (damaged(lambda values: values.pop("cosine")), "cosine"),
        (damaged(lambda values: values.update(cosine="0.3")), "cosine is '0.3'"),
        (damaged(lambda values: values.update(cosine=math.nan)), "cosine is nan"),
        (damaged(lambda values: values.update(cosine=None)), "cosine is None"),
        (damaged(lambda values: values.update(cosine=True)), "cosine is True"),
        (damaged(lambda values: values.update(schema=99)), "its schema is 99"),
        (damaged(lambda values: values.update(more=1)), "more"),
        (damaged(lambda values: values["outside"].update(accepted="few")), "accepted is 'few'"),
        (damaged(lambda values: values["model"].update(image_probe=["a"])), "image_probe"),
        (damaged(lambda values: values.update(coverages=[{"coverage": 0.9}])), "cut"),
        (damaged(lambda values: values.update(classnames="cat")), "classnames is 'cat'"),
        (damaged(lambda values: values.update(templates=7)), "templates is 7"),
        (damaged(lambda values: values.update(inside=[1])), "inside"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, damage, says):
    path = tmp_path / FILE
    write_threshold(path, threshold())
    damage(path)
    with pytest.raises(ValueError, match=f"{FILE} is not a threshold that miniclip calibrate wrote.*{says}"):
        read_threshold(path)


# ---------------------------------------------------------------------------------------------------------------------
# Does it belong here?


def test_the_model_that_was_calibrated_is_known_by_what_it_computes(tmp_path, recwarn):
    write_threshold(tmp_path / FILE, threshold(model=CalibratedModel.of(encoder())))
    read_threshold(tmp_path / FILE).check_model(encoder(name="the same under another name"))
    assert not recwarn.list


@pytest.mark.parametrize("tower", ["visual", "text"])
def test_other_weights_of_either_tower_are_refused(tower):
    calibrated = threshold(model=CalibratedModel.of(encoder()))
    model = tiny_clip()
    setattr(model, tower, getattr(tiny_clip(1), tower))
    with pytest.raises(ValueError, match=r"other weights or other preprocessing than changed .*miniclip calibrate"):
        calibrated.check_model(from_clip(model, preprocess_for(model.config), "changed"))


def test_other_preprocessing_and_another_width_are_refused():
    calibrated = threshold(model=CalibratedModel.of(encoder()))
    model = tiny_clip()
    bright = replace(model.config.vision, mean=(0.1, 0.1, 0.1))
    with pytest.raises(ValueError, match="other preprocessing"):
        calibrated.check_model(from_clip(model, preprocess_for(replace(model.config, vision=bright)), "bright"))
    wide = tiny_clip(embed_dim=24)
    with pytest.raises(ValueError, match="other weights"):
        calibrated.check_model(from_clip(wide, preprocess_for(wide.config), "wide"))


def test_another_precision_is_a_warning():
    calibrated = threshold(model=CalibratedModel.of(encoder()))
    model = copy.deepcopy(tiny_clip()).bfloat16()
    with pytest.warns(UserWarning, match="slightly other features"):
        calibrated.check_model(from_clip(model, preprocess_for(model.config), "rounded"))


def test_a_number_given_by_hand_is_checked_against_nothing(recwarn):
    by_hand = find_threshold("ViT-B/32", "0.3")
    by_hand.check_model(encoder())
    by_hand.warn_if_other(NAMES, TEMPLATES)
    assert not recwarn.list
    assert str(by_hand) == "cosine ≥ 0.3000, given by hand"


def test_other_classes_or_prompts_are_a_warning_and_another_order_is_none():
    calibrated = threshold()
    for names, templates in ((NAMES, TEMPLATES), (NAMES[::-1], ("the {}", "a {c}"))):
        assert calibrated.difference(names, templates) == ""
    with pytest.warns(UserWarning, match=r"3 classes \('cat', 'dog', 'owl'\), and now there are 1 class \('cat'\)"):
        calibrated.warn_if_other(NAMES[:1], TEMPLATES)
    with pytest.warns(UserWarning, match="'cat' had 'a cat', 'the cat', and now has 'one cat'"):
        calibrated.warn_if_other(NAMES, ("one {}",))
