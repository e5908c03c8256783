"""A model goes to a hub and comes back, whatever breaks on the way; the hub is a server on the loopback."""

import io
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
import yaml
from command_line import fails
from helpers import picture, tiny_clip, write_picture
from hub import Hub
from PIL import Image

from miniclip.data.wordings.kept import Wording, Wordings
from miniclip.evaluation.encoder import from_clip
from miniclip.inference.card import CARD_FILE, card_for, is_untouched
from miniclip.inference.thresholds import CalibratedModel, ModelThreshold, write_threshold
from miniclip.weights.load import load, save

CAME_BACK = """
import sys, torch, miniclip
model, preprocess = miniclip.load(sys.argv[2], device="cpu")
for name in ("hf-hub:owner/birds", "owner/birds"):
    other, same = (miniclip.load if ":" in name else miniclip.from_pretrained)(name, device="cpu")
    assert other.config == model.config and same.mean == preprocess.mean
    for (key, value), (other_key, found) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert key == other_key and torch.equal(value, found), key
print("the same")
"""


def in_process(hub: Hub, home: Path, *command: str, token: str = Hub.token) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return warm.run([sys.executable, *command], env=environment)


def push(hub: Hub, home: Path, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
    return in_process(hub, home, "-m", "miniclip", "push", *options, **more)


@pytest.fixture
def model(tmp_path):
    save(tiny_clip(3), tmp_path / "birds")
    return tmp_path / "birds"


def test_a_pushed_model_comes_back_bit_for_bit(tmp_path, model):
    (model / "classnames.json").write_text("[]")  # lies there, and is no part of the model
    shown = write_picture(tmp_path / "robin.png", size=(400, 300))
    with Hub() as hub:
        done = push(hub, tmp_path / "home", str(model), "owner/birds", "--license", "mit", "--thumbnails", str(shown))
        assert done.returncode == 0, done.stderr
        files = hub.repositories["owner/birds"].files
        expected = {".gitattributes", "config.json", "model.safetensors", CARD_FILE, "pictures/0.jpg"}
        assert set(files) == expected
        assert files["model.safetensors"] == (model / "model.safetensors").read_bytes()
        assert len(hub.repositories["owner/birds"].commits) == 2  # all in one
        back = in_process(hub, tmp_path / "elsewhere", "-c", CAME_BACK, "", str(model))
        assert back.stdout.strip() == "the same", back.stderr[-800:]
    small = Image.open(io.BytesIO(files["pictures/0.jpg"]))
    assert (small.size, small.getexif(), small.info.get("comment")) == ((256, 192), {}, None)
    card = files[CARD_FILE].decode()
    assert is_untouched(card)
    assert "license: mit" in card
    assert "![a picture of its kind](pictures/0.jpg)" in card


def test_a_thumbnail_shows_transparency_as_the_model_sees_it(tmp_path, model):
    """White is stored under it, and OpenAI's way makes it black."""
    Image.new("RGBA", (300, 200), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    with Hub() as hub:
        shown = str(tmp_path / "clear.png")
        assert push(hub, tmp_path / "home", str(model), "owner/birds", "--thumbnails", shown).returncode == 0
        small = Image.open(io.BytesIO(hub.repositories["owner/birds"].files["pictures/0.jpg"]))
    assert small.getextrema() == ((0, 0),) * 3


@pytest.mark.long
def test_what_is_published_of_the_captions_is_what_many_share(tmp_path):
    clip = tiny_clip(3)
    clip.wordings = Wordings((Wording("a photo of a {}", 0.9),), ("a photo of a neighbour's address",), 100)
    save(clip, tmp_path / "birds")
    with Hub() as hub:
        done = push(hub, tmp_path / "home", str(tmp_path / "birds"), "owner/birds")
        assert done.returncode == 0, done.stderr
        published = hub.repositories["owner/birds"].files["wordings.json"].decode()
    assert "neighbour" not in published
    assert Wordings.from_json(published, "there").templates(["cat"]) == ("a photo of a {}",)
    assert "neighbour" in (tmp_path / "birds/wordings.json").read_text()


@pytest.mark.parametrize("where", [pytest.param("/lfs/", marks=pytest.mark.long), "/commit/"])
def test_a_push_that_breaks_leaves_the_repository_as_it_was_and_can_be_repeated(tmp_path, model, where):
    broken = [True]
    with Hub(fault=lambda method, path: 400 if broken[0] and where in path else None) as hub:
        done = push(hub, tmp_path / "home", str(model), "owner/birds")
        assert done.returncode == 2
        assert "owner/birds was not pushed" in done.stderr
        assert "Traceback" not in done.stderr
        assert set(hub.repositories["owner/birds"].files) == {".gitattributes"}
        broken[0], before = False, len(hub.requests)
        done = push(hub, tmp_path / "home", str(model), "owner/birds")
        assert done.returncode == 0, done.stderr
        files = hub.repositories["owner/birds"].files
        assert files["model.safetensors"] == (model / "model.safetensors").read_bytes()
        sent_again = [path for method, path in hub.requests[before:] if path.startswith("/lfs/") and method == "PUT"]
        assert bool(sent_again) == (where == "/lfs/")


@pytest.mark.long
def test_what_a_repository_has_is_replaced_on_request_alone(tmp_path, model):
    """A second push of the same is no commit; other weights, or a card that somebody edited, need --overwrite."""
    with Hub() as hub:
        assert push(hub, tmp_path / "home", str(model), "owner/birds").returncode == 0
        repository = hub.repositories["owner/birds"]
        again = push(hub, tmp_path / "home", str(model), "owner/birds")
        assert (again.returncode, len(repository.commits)) == (0, 2), again.stderr
        assert "it had all of them already" in again.stdout
        repository.files[CARD_FILE] += b"\nMy own words.\n"
        save(tiny_clip(4), model, overwrite=True)
        refused = push(hub, tmp_path / "home", str(model), "owner/birds")
        assert (refused.returncode, len(repository.commits)) == (2, 2)
        assert "owner/birds has another model.safetensors, README.md" in refused.stderr
        assert "--overwrite" in refused.stderr
        replaced = push(hub, tmp_path / "home", str(model), "owner/birds", "--overwrite")
        assert (replaced.returncode, len(repository.commits)) == (0, 3), replaced.stderr
        assert repository.files["model.safetensors"] == (model / "model.safetensors").read_bytes()


@pytest.mark.long
def test_a_model_is_not_pushed_to_where_open_clips_would_be_loaded_in_its_place(tmp_path, model):
    with Hub() as hub:
        assert push(hub, tmp_path / "home", str(model), "owner/birds", "--to", "openclip").returncode == 0
        repository = hub.repositories["owner/birds"]
        for more in ([], ["--overwrite"]):
            refused = push(hub, tmp_path / "home", str(model), "owner/birds", *more)
            assert (refused.returncode, len(repository.commits)) == (2, 2)
            assert "owner/birds holds open_clip_config.json" in refused.stderr


@pytest.mark.long
@pytest.mark.parametrize("token", ["hf_other", "hf_ä"])
def test_a_token_without_the_right_says_how_to_get_one(tmp_path, model, token):
    with Hub() as hub:
        done = push(hub, tmp_path / "home", str(model), "owner/birds", token=token)
    assert done.returncode == 2
    assert "hf auth login" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name",
    ["birds", "owner/", "owner/na me", "a/b/c", "https://host/owner/name", "ä/b", "a/-b", "a/b--c", "a/b.git", "a/.."],
)
def test_a_name_that_is_no_repository_is_refused_before_anything_is_sent(model, capsys, name):
    assert repr(name) in fails(capsys, ["push", str(model), name, "--dry-run"])


# ---------------------------------------------------------------------------------------------------------------------
# The card


@pytest.fixture
def trained(tmp_path):
    """A run's folder with all that a card is made from, of numbers worked out by hand."""
    run = tmp_path / "runs/birds"
    save(tiny_clip(3), run / "best")
    log = run / "logs/version_0"
    log.mkdir(parents=True)
    data = {"source": "/home/ada/secret/photos", "found": "1234 images", "pairs": 1200, "rejected": 34}
    settings = "seed_everything: 0\nmodel: {loss: clip, optimizer: {lr: 0.001}}\ndata: {train: shards}\n"
    (log / "config.yaml").write_text(settings)
    (log / "metrics.csv").write_text("epoch,step,train/rejected,val/loss\n0,9,3.0,1.5\n0,19,5.0,1.25\n")
    record = {"status": "finished", "command": "train", "began": "2026-01-02T03:04:05+00:00", "seconds": 7200.0}
    record |= {"step": 20, "max_steps": 20, "monitor": "val/loss", "monitor_mode": "min", "batch_size": 64}
    record |= {"world_size": 1, "device": "CPU", "precision": "32-true", "peak_source": "", "versions": {"torch": "2"}}
    (log / "run.json").write_text(json.dumps({**record, "epoch_samples": 1200, "training_data": [data]}))
    return run


def write_results(run: Path, model: str, created: float) -> Path:
    classes = [{"class": "robin", "recall": 0.5}, {"class": "wren", "recall": 0.95}]
    result = {"model": model, "dataset": "/home/ada/secret/test", "task": "zeroshot_classification", "num_images": 40}
    result |= {"metrics": {"acc1": 0.725, "macro_f1": 0.7}, "intervals_95": {"acc1": [0.6, 0.85]}, "unreadable": ["x"]}
    result |= {"templates": ["a {c}"], "classnames": ["robin", "wren"], "per_class": classes}
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(created))
    (run / "report").mkdir(exist_ok=True)
    (run / "report/results.json").write_text(json.dumps({"schema": 2, "created": stamp, "results": [result]}))
    return run / "report"


def test_a_card_has_data_recipe_scores_and_limits_and_no_path_of_the_machine(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_results(trained, "runs/birds/best", time.time() + 60)
    card = card_for(trained / "best", "owner/birds")
    for line in (
        "# birds",
        "| secret/photos | 1234 images | 1,200 | 34 |",
        "- 5 samples could not be read while training, and were left out.",
        "| steps | 20 of 20 (finished) |",
        "| time | 2.0 h |",
        "| seed | 0 |",
        "- The best val/loss was 1.25, after 20 steps.",
        "| test | 40 | 1 | acc1 | 0.725 | 0.600 – 0.850 |",
        "- Left out: 1 picture that could not be read.",
        "- On test it finds fewer than 90 % of: robin (50.0 %).",
        "- No license is stated.",
        "library_name: miniclip",
    ):
        assert f"\n{line}\n" in card, line
    assert "/home/ada" not in card
    assert str(tmp_path) not in card


def test_a_card_promises_a_threshold_only_in_a_layout_whose_library_makes_the_same_pixels(trained):
    threshold = ModelThreshold(0.2, "by eye", classnames=("cat", "dog"), templates=("a {}",))
    write_threshold(trained / "best/threshold.json", threshold)
    ways = "transformers prepares pictures in Hugging Face's way"
    for to, is_promised in (("native", True), ("openclip", True), ("hf", False)):
        card = card_for(trained / "best", to=to)
        assert ("threshold.json rejects pictures of none of the classes" in card) == is_promised
        assert ("unless the threshold is applied" in card) == is_promised
        assert (ways in card) == (not is_promised)


def test_a_card_believes_what_the_run_recorded_and_no_shards_that_lie_about(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = trained / "logs/version_0/run.json"
    recorded = json.loads(record.read_text())
    other = {"source": "/data/others", "found": "9 images", "samples": 9, "rejected": 0}
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/index.json").write_text(json.dumps(other))
    card = card_for(trained / "best")
    assert "trained on 1,200 pairs" in card
    assert "9 images" not in card
    recorded["training_data"].append({"source": "stream/{0..3}.tar"})  # which nobody has counted
    record.write_text(json.dumps(recorded | {"epoch_samples": 200}))
    card = card_for(trained / "best")
    assert (
        "\n| secret/photos | 1234 images | 1,200 | 34 |\n| stream/{0..3}.tar | unknown | unknown | unknown |\n" in card
    )
    assert "trained on" not in card
    del recorded["training_data"]  # a run of before
    record.write_text(json.dumps(recorded))
    card = card_for(trained / "best")
    assert "\n| shards | unknown | unknown | unknown |\n" in card
    assert "trained on" not in card


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("/home/ada/photos", "photos"),
        ("/home/ada", "…"),
        ("/data/birds/2024/photos/", "2024/photos"),
        ("~/photos", "photos"),
        ("~ada/birds/photos", "birds/photos"),
        ("$HOME/photos", "$HOME/photos"),
        ("../ada/../photos", "ada/photos"),
        ("file:///home/ada/my%20birds/{0..3}.tar", "my birds/{0..3}.tar"),
        ("file://localhost/home/ada/x.tar", "x.tar"),
        ("C:\\Users\\ada\\photos", "photos"),
        ("d:/birds/photos", "birds/photos"),
        ("\\\\server\\birds\\photos", "birds/photos"),
        ("pipe:cat /home/ada/x.tar", "pipe:…"),
        ("s3://key:word@bucket/birds", "s3://bucket/birds"),
        ("https://ada:word@host/birds/{0..3}.tar?token=word", "https://host/birds/{0..3}.tar?token=…"),
        ("hf-hub:owner/birds", "hf-hub:owner/birds"),
        ("photos", "photos"),
    ],
)
def test_no_user_folder_or_secret_of_a_source_is_published(trained, source, shown):
    record = trained / "logs/version_0/run.json"
    recorded = json.loads(record.read_text())
    found = "3 images from column 'image' in /home/ada/my photos, captions from 'text'"
    recorded["training_data"] = [{"source": source, "found": found, "pairs": 3, "rejected": 0}]
    record.write_text(json.dumps(recorded))
    assert f"\n| {shown} | 3 images from column 'image', captions from 'text' | 3 | 0 |\n" in card_for(trained / "best")


def test_scores_of_several_prompts_are_told_apart_and_names_are_no_markdown(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write_results(trained, "runs/birds/best", time.time() + 60) / "results.json"
    content = json.loads(file.read_text())
    (first,) = content["results"]
    names = ['12" pizza `$HOME`', "cats, dogs", "--help", "*bold* <b>|[x](http://y)", "wren's"]
    first |= {"classnames": names, "per_class": [{"class": name, "recall": 0.5} for name in names]}
    own = first | {"templates_from": "the captions of the training", "templates": ["a {c}", "the {c}"]}
    built_in = first | {"templates_from": "the built-in set 'openai'", "precision": "bf16", "upright": True}
    file.write_text(json.dumps(content | {"results": [own, built_in]}))
    card = card_for(trained / "best", "owner/birds")
    line = next(line for line in card.splitlines() if "--labels" in line)
    labels = shlex.split(line.removeprefix("# "))[-1]
    assert labels == "12\" pizza `$HOME`,*bold* <b>|[x](http://y),wren's"
    assert "\n| test, upright, precision bf16 | 40 | 1, openai | acc1 | 0.725 |" in card
    assert '\n- On test, prompts openai, upright, precision bf16, it finds fewer than 90 % of: 12" pizza' in card
    assert r"\*bold\* \<b>\|[x]\(http://y) (50.0 %)" in card
    metadata = yaml.safe_load(card.split("---\n")[1])
    (results,) = metadata["model-index"][0]["results"]
    assert [metric["args"]["prompts"] for metric in results["metrics"]] == ["the captions of the training", "openai"]


def test_scores_of_other_weights_are_not_published(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = write_results(trained, "runs/birds/best", time.time() - 3600)
    with pytest.warns(UserWarning, match="older than .*model.safetensors"):
        assert "acc1" not in card_for(trained / "best")
    with pytest.raises(ValueError, match=r"older than .*model.safetensors"):
        card_for(trained / "best", results=[report])
    write_results(trained, "runs/cats/best", time.time() + 60)
    with pytest.raises(ValueError, match=r"no scores of .*birds/best; it has those of runs/cats/best"):
        card_for(trained / "best", results=[report])


def test_a_threshold_of_other_weights_is_not_published(model):
    encoder = from_clip(*load(model, "cpu"), str(model))
    write_threshold(model / "threshold.json", ModelThreshold(0.25, "by eye", model=CalibratedModel.of(encoder)))
    assert "a cosine of at least 0.2500" in card_for(model)
    save(tiny_clip(4), model, overwrite=True)
    with pytest.raises(ValueError, match=r"threshold\.json was calibrated with other weights"):
        card_for(model)


def test_a_card_knows_whether_its_body_was_edited(model):
    card = card_for(model)
    assert is_untouched(card)
    assert is_untouched(card.replace("pipeline_tag: zero-shot-image-classification\n", ""))  # the hub edits its part
    assert not is_untouched(card.replace("# birds", "# Birds of my garden"))
    assert not is_untouched("# a card by hand\n")
    assert "not recorded with these weights" in card


def test_converting_to_hugging_faces_layout_writes_a_card_that_shows_its_library(model, tmp_path, capsys):
    from miniclip.commands.main import main

    main(["convert", str(model), str(tmp_path / "hf"), "--to", "hf"])
    card = (tmp_path / "hf" / CARD_FILE).read_text()
    assert "library_name: transformers" in card
    assert "CLIPModel.from_pretrained" in card
    images = torch.stack([load(model)[1](picture())])
    found, expected = (load(folder, "cpu")[0].encode_image(images) for folder in (tmp_path / "hf", model))
    assert torch.allclose(found, expected, atol=1e-5)


# ---- what is loaded from the hub, and from its cache

LOADED = """
import sys, warnings, miniclip
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        print(float(miniclip.from_pretrained("owner/birds", device="cpu")[0].text.text_projection.double().sum()))
    except ValueError as error:
        print(error)
print(*(each.message for each in caught if "hf-hub" in str(each.message)), sep="\\n")
"""
CONFIG_ALONE = "from huggingface_hub import hf_hub_download; hf_hub_download('owner/birds', 'config.json')"


def loaded(hub: Hub, home: Path, **offline: str) -> tuple[str, str]:
    """What a process of its own loads (the sum of a weight) or why not, and its warnings."""
    done = warm.run(
        [sys.executable, "-c", LOADED],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **offline},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    value, _, warned = done.stdout.partition("\n")
    return value, warned.strip()


def weight_of(clip) -> str:
    return str(float(clip.text.text_projection.double().sum()))


@pytest.fixture
def shared(model, tmp_path):
    """A hub that has the model."""
    with Hub() as hub:
        assert push(hub, tmp_path / "pusher", str(model), "owner/birds").returncode == 0
        yield hub


@pytest.mark.long
def test_what_another_library_left_of_a_model_in_the_cache_is_completed(shared, tmp_path):
    home = tmp_path / "home"
    assert in_process(shared, home, "-c", CONFIG_ALONE).returncode == 0
    value, _ = loaded(shared, home, HF_HUB_OFFLINE="1")
    assert "of it the cache has only config.json" in value
    assert loaded(shared, home) == (weight_of(tiny_clip(3)), "")
    assert loaded(shared, home, HF_HUB_OFFLINE="1") == (weight_of(tiny_clip(3)), "")


@pytest.mark.long
def test_a_model_that_was_loaded_once_is_loaded_offline(shared, tmp_path):
    home = tmp_path / "home"
    loaded(shared, home)
    num_requests = len(shared.requests)
    assert loaded(shared, home, HF_HUB_OFFLINE="1") == (weight_of(tiny_clip(3)), "")
    assert len(shared.requests) == num_requests
    shared.fault = lambda method, path: 503
    value, warned = loaded(shared, home)
    assert value == weight_of(tiny_clip(3))
    assert f"the cache's commit {shared.repositories['owner/birds'].sha()}" in warned


@pytest.mark.long
def test_a_second_load_fetches_nothing_and_one_after_a_push_says_which_commit_it_is(shared, model, tmp_path):
    home = tmp_path / "home"
    loaded(shared, home)
    before, shared.requests[:] = shared.repositories["owner/birds"].sha(), []
    assert loaded(shared, home) == (weight_of(tiny_clip(3)), "")
    assert not [path for _, path in shared.requests if "/resolve/" in path]
    save(tiny_clip(4), model, overwrite=True)
    assert push(shared, tmp_path / "pusher", str(model), "owner/birds", "--overwrite").returncode == 0
    shared.requests.clear()
    value, warned = loaded(shared, home)
    assert value == weight_of(tiny_clip(4))
    assert (
        warned == f"hf-hub:owner/birds is commit {shared.repositories['owner/birds'].sha()} now; the cache had {before}"
    )
    assert [path.rpartition("/")[2] for method, path in shared.requests if method == "GET" and "/resolve/" in path] == [
        "model.safetensors"
    ]
    assert loaded(shared, home, HF_HUB_OFFLINE="1") == (weight_of(tiny_clip(4)), "")
