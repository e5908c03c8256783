"""Ray's actors, on two CPUs of this machine. Oracle: one process without Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from helpers import tiny_clip, write_pairs

import miniclip
from miniclip.evaluation.other_libraries import open_model
from miniclip.inference.embedding.embed import embed_source
from miniclip.inference.sources import image_set, text_set

# Its actors end by SIGKILL, each kind once: the one that decodes at an image, the one that encodes at a batch.
MORTAL = """
import os, signal
from pathlib import Path
from miniclip.evaluation.other_libraries import open_model

HERE = Path(__file__).parent

def die_once(kind):
    try:
        (HERE / f"{kind} has died").touch(exist_ok=False)
    except FileExistsError:
        return
    (HERE / f"{kind} has died").write_text(str(os.getpid()))
    os.kill(os.getpid(), signal.SIGKILL)

class Preprocess:
    def __init__(self, preprocess):
        self.preprocess = preprocess
    def __call__(self, image):
        if os.environ.get("MORTAL") and image.size == (24, 20):  # none of those by which a model is recognised
            die_once("decoder")
        return self.preprocess(image)

class Mortal:
    fingerprint = "the tiny model"
    def __init__(self):
        model = open_model(str(HERE / "tiny"), "cpu")
        self.model, self.preprocess, self.logit_scale = model, Preprocess(model.preprocess), model.logit_scale
        self.tokenize = model.tokenize
    def encode_image(self, images):
        if os.environ.get("MORTAL"):
            die_once("encoder")
        return self.model.encode_image(images)
    def encode_text(self, tokens):
        return self.model.encode_text(tokens)
"""

ON_TWO_CPUS = """
import os, sys
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
import ray
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
from miniclip.commands.main import main
main(["embed", *sys.argv[1:], "--engine", "ray"])
"""


KILLED = """
import os, signal
from miniclip.inference.embedding.parts import ParquetLayout
write = ParquetLayout.write

def write_one(self, number, *rest):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, number, *rest)

ParquetLayout.write = write_one
"""


def on_ray(*args, code=0, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", ON_TWO_CPUS, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def assert_same_rows(found, expected):
    found, expected = (pd.read_parquet(out) for out in (found, expected))
    numbers = [np.stack(each.pop("embedding")) for each in (found, expected)]
    pd.testing.assert_frame_equal(found, expected)
    np.testing.assert_allclose(*numbers, atol=1e-6)


@pytest.fixture
def mortal(tmp_path, monkeypatch):
    (tmp_path / "mortal.py").write_text(MORTAL)
    miniclip.save(tiny_clip(), tmp_path / "tiny")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield f"python:{tmp_path / 'mortal.py'}:Mortal"
    sys.modules.pop("mortal", None)


@pytest.mark.long
def test_actors_that_are_killed_start_again_and_the_rows_are_those_of_one_process(tmp_path, mortal):
    photos = write_pairs(tmp_path / "photos", 60)
    (photos / "0017.png").write_bytes(b"torn")
    done = on_ray(photos, tmp_path / "ray", "--model", mortal, "--batch-size", 4, "--rows-per-file", 25, MORTAL="1")
    assert "59 embeddings in 3 files" in done.stdout
    dead = {kind: int((tmp_path / f"{kind} has died").read_text()) for kind in ("decoder", "encoder")}
    assert len({*dead.values(), os.getpid()}) == 3
    data, model = image_set(photos), open_model(mortal, "cpu")
    embed_source(data, model, tmp_path / "one", source=str(photos), rows_per_file=25)
    assert_same_rows(tmp_path / "ray", tmp_path / "one")
    for name in ("_manifest.json", "_left_out.csv"):
        assert (tmp_path / "ray" / name).read_text() == (tmp_path / "one" / name).read_text()


@pytest.mark.long
def test_texts_by_ray_are_those_of_one_process(tmp_path):
    miniclip.save(tiny_clip(), tmp_path / "tiny")
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"picture number {n}\n" for n in range(3000)))
    on_ray(texts, tmp_path / "ray", "--model", tmp_path / "tiny", "--texts")
    embed_source(text_set(texts), open_model(str(tmp_path / "tiny"), "cpu"), tmp_path / "one", source=str(texts))
    assert_same_rows(tmp_path / "ray", tmp_path / "one")


@pytest.mark.long
def test_a_run_on_ray_that_is_killed_goes_on_without_it(tmp_path, mortal):
    """The process that writes ends by SIGKILL as it writes its second file."""
    photos = write_pairs(tmp_path / "photos", 60)
    args = [photos, tmp_path / "out", "--model", mortal, "--rows-per-file", "20"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED + ON_TWO_CPUS, *map(str, args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (tmp_path / "out.partial").glob("*.parquet")] == ["part-00000.parquet"]
    data, model = image_set(photos), open_model(mortal, "cpu")
    for out in ("out", "one"):
        embed_source(data, model, tmp_path / out, source=str(photos), rows_per_file=20)
    assert_same_rows(tmp_path / "out", tmp_path / "one")


@pytest.mark.long
@pytest.mark.parametrize(
    "pixels, message",
    [
        ("torch.zeros(3, 8, 8)", "encode_image of {} gives a Tensor of shape (3, 4, 4); (B, E) is needed"),
        ("image.sizes", "preprocess of {} raised AttributeError: "),  # not a picture that can't be read
    ],
)
def test_a_mistake_that_an_actor_meets_is_one_sentence(tmp_path, pixels, message):
    photos = write_pairs(tmp_path / "photos", 3)
    (tmp_path / "other.py").write_text(
        "import torch, itertools\n"
        "class Other:\n"
        "    fingerprint, logit_scale = 'x', 1.0\n"
        f"    def preprocess(self, image): return {pixels}\n"
        "    def tokenize(self, texts): return torch.zeros(len(texts), 4)\n"
        "    def encode_image(self, images): return torch.zeros(len(images), 4, 4)\n"
        "    encode_text = encode_image\n"
    )
    model = f"python:{tmp_path / 'other.py'}:Other"
    done = on_ray(photos, tmp_path / "out", "--model", model, code=2)
    assert f"error: {message.format(model)}" in done.stderr
    assert "Traceback" not in done.stderr
