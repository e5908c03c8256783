"""CLIP_benchmark and scikit-learn as judges: one model, sets in CLIP_benchmark's layouts, the same numbers from all.

Where definitions differ, both are written down.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_clip
from PIL import Image
from random_weights import randomise
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, top_k_accuracy_score
from written_sets import lines, tar

import miniclip
from miniclip.commands import main as cli
from miniclip.evaluation.datasets.open import open_dataset
from miniclip.evaluation.datasets.sets import CaptionedImages, LabelledImages, MultilabelImages
from miniclip.evaluation.features import encode_texts
from miniclip.evaluation.measures.ranking import retrieval
from miniclip.evaluation.zero_shot import zero_shot_classifier
from miniclip.weights.convert import convert

BENCHMARK = Path(sys.prefix) / "clip_benchmark"  # `make test` puts it there, with what it needs other versions of
RECALL_AT = (1, 5, 10)
BIRDS = ("barn owl", "crane", "kea", "little auk", "wren", "hoopoe", "snipe", "dodo")
TEMPLATES = ("a photo of a {c}.", "{c}!", "the {c} in the rain")
LABELS = [c for c, images in enumerate((9, 7, 6, 4, 3, 2, 1, 0)) for _ in range(images)]  # no dodo is left
N = len(LABELS)
WITHOUT_CAPTION = 3


def encoded(number: int, kind: str) -> bytes:
    """A picture of a few coloured fields; no two look alike."""
    fields = np.random.default_rng(number).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(fields).resize((24, 20), Image.Resampling.BILINEAR)
    image.save(buffer, kind, **({"lossless": True} if kind == "webp" else {}))
    return buffer.getvalue()


def npy(row: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, row)
    return buffer.getvalue()


def write_set(root: Path, images: str, kind: str, values: list[bytes], **texts: tuple[str, ...]) -> None:
    """N images, and beside each its member of a kind (cls, npy or txt), in two shards of unequal size."""
    samples = {f"s{n:07d}": {images: encoded(n, images.replace("jpg", "jpeg")), kind: values[n]} for n in range(N)}
    for shard, numbers in enumerate((range(N // 3), range(N // 3, N))):
        tar(root / "test" / f"{shard}.tar", {key: samples[key] for key in (f"s{n:07d}" for n in numbers)})
    lines(root / "test" / "nshards.txt", "2")
    for name, content in texts.items():
        lines(root / f"{name}.txt", *content)


def write_sets(root: Path) -> None:
    """The layouts of the three tasks; and for each, one of which there is more than one opinion."""
    random = np.random.default_rng(0)
    prompts = {"zeroshot_classification_templates": TEMPLATES}
    labels = [b"%d" % label for label in random.permutation(LABELS)]
    write_set(root / "birds", "png", "cls", labels, classnames=BIRDS, **prompts)
    labels = [b"%d" % label for label in random.integers(0, 4, N)]
    write_set(root / "four", "jpg", "cls", labels, classnames=BIRDS[:4], **prompts)
    twins = ("crane", "kea", "crane", "wren", "snipe")  # the bird, and the machine
    write_set(root / "twins", "jpg", "cls", [b"%d" % label for label in random.integers(0, 5, N)], classnames=twins,
              **prompts)  # fmt: skip

    hot = random.integers(0, 2, (N, 6))
    hot[5], hot[6] = 0, 1  # none of the classes, and all
    write_set(root / "flocks", "jpg", "npy", [npy(row) for row in hot], classnames=BIRDS[:6],
              dataset_type=("multilabel",), **prompts)  # fmt: skip
    hot[:, 2] = 0
    write_set(root / "keas gone", "png", "npy", [npy(row) for row in hot], classnames=BIRDS[:6],
              dataset_type=("multilabel",), **prompts)  # fmt: skip

    words = ("red", "blue", "small", "old", "wet", "far", "near", "tall")
    captions = [[f"{' '.join(random.permutation(words)[:3])} bird {n} {k}" for k in range(1 + n % 5)] for n in range(N)]
    texts = ["\n".join(each).encode() for each in captions]
    write_set(root / "captions", "webp", "txt", texts, dataset_type=("retrieval",))
    texts[WITHOUT_CAPTION] = b""
    write_set(root / "captions missing", "webp", "txt", texts, dataset_type=("retrieval",))


CLASSIFIED = ("birds", "four", "twins", "flocks", "keas gone")
CAPTIONED = ("captions", "captions missing")


def clip_benchmark(*commands: list[str]) -> None:
    """Its command line, for which it has a process and a NumPy of its own; one process, as it takes long to import."""
    if not BENCHMARK.is_dir():
        pytest.fail(f"CLIP_benchmark is not in {BENCHMARK}; `make test` puts it there")
    run = "import json, sys\nfrom clip_benchmark import cli\nfor sys.argv in json.loads(sys.argv[1]):\n    cli.main()"
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARK), "HF_HUB_OFFLINE": "1"}
    argv = json.dumps([["clip_benchmark", *command] for command in commands])
    done = subprocess.run([sys.executable, "-c", run, argv], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """The sets, the model in open_clip's layout, and beside them what CLIP_benchmark wrote about each set."""
    root = tmp_path_factory.mktemp("judged")
    write_sets(root)
    miniclip.save(randomise(tiny_clip(), seed=45), root / "native")
    convert(root / "native", root / "model", "openclip")
    ks = [str(k) for k in RECALL_AT]
    # Unless told not to, it encodes in bfloat16 here, which moves its numbers in the third digit.
    evaluate = ["eval", "--model", f"local-dir:{root / 'model'}", "--pretrained", "random", "--no_amp"]
    evaluate += ["--dataset_root", str(root / "{dataset}"), "--output", str(root / "{dataset}.json")]
    evaluate += ["--batch_size", "7", "--num_workers", "0", "--dump_classnames", "--dump_templates", "--quiet"]
    clip_benchmark(
        [*evaluate, "--task", "zeroshot_classification", "--dataset", *(f"wds/{name}" for name in CLASSIFIED)],
        [*evaluate, "--task", "zeroshot_retrieval", "--recall_k", *ks, "--dataset", *(f"wds/{n}" for n in CAPTIONED)],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINICLIP_CACHE", str(root / "cache"))
        yield root


def theirs(judged: Path, name: str) -> dict:
    return json.loads((judged / f"{name}.json").read_text())


LIBRARIES = ("ours", "open_clip's")


@pytest.fixture(scope="module")
def reports(judged):
    """What `miniclip eval` wrote about every set, of the same weights in either library's hands; and what is beside."""
    models = [str(judged / "native"), f"openclip:local-dir:{judged / 'model'}"]
    sets = [str(judged / name) for name in (*CLASSIFIED, "captions")]
    cli.main(["eval", "--model", *models, "--data", *sets, "--out", str(judged / "report"), "--device", "cpu"])
    return judged / "report"


@pytest.fixture(scope="module", params=LIBRARIES)
def scored(reports, request) -> dict[str, dict]:
    """By set, what our command line says."""
    found = json.loads((reports / "results.json").read_text())["results"]
    is_open_clips = request.param == "open_clip's"
    return {each["dataset"]: each for each in found if each["model"].startswith("openclip:") == is_open_clips}


@pytest.fixture(scope="module", params=LIBRARIES)
def encoder(judged, request):
    """Model, preprocessing and tokenizer of either library, of the same weights."""
    folder = judged / "model"
    if request.param == "ours":
        model, preprocess = miniclip.load(folder, device="cpu")
        return model, preprocess, lambda texts: miniclip.tokenize(texts, context_length=model.context_length)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")


@torch.no_grad()
def image_features(encoder, data) -> torch.Tensor:
    model, preprocess, _ = encoder
    return F.normalize(model.encode_image(torch.stack([preprocess(data.open(n)) for n in range(len(data))])), dim=-1)


def class_cosines(encoder, data) -> np.ndarray:
    """(N, C)"""
    model, _, tokenize = encoder
    return (
        image_features(encoder, data) @ zero_shot_classifier(model, data.classnames, data.templates, tokenize)
    ).numpy()


def text_features(encoder, captions) -> tuple[torch.Tensor, np.ndarray]:
    """(T, E), and (T,) the image that each belongs to."""
    model, _, tokenize = encoder
    owner = np.repeat(np.arange(len(captions)), [len(each) for each in captions])
    return encode_texts(model, [caption for each in captions for caption in each], tokenize), owner


def retrieval_metrics(images, texts, owner) -> dict[str, float]:
    found = retrieval(images, texts, owner, RECALL_AT)
    recalls = {f"image_retrieval_recall@{k}": found.images.recall[k] for k in RECALL_AT}
    return recalls | {f"text_retrieval_recall@{k}": found.texts.recall[k] for k in RECALL_AT}


def assert_no_near_ties(scores, is_own) -> None:
    """In no row does an own column come so near to another that rounding could order them; equality is no luck then."""
    gaps = np.abs(scores[:, :, None] - scores[:, None, :])
    assert gaps[is_own[:, :, None] & ~is_own[:, None, :]].min() > 3e-6


def same(values: dict[str, float]):
    return pytest.approx(values, rel=0, abs=1e-6)


def hot(labels, num_classes: int) -> np.ndarray:
    return np.eye(num_classes, dtype=bool)[list(labels)]


@pytest.mark.sample(2)
def test_classification_equals_clip_benchmarks_and_scikit_learns(judged, scored, encoder):
    data = open_dataset(judged / "birds")
    assert isinstance(data, LabelledImages)
    cosines, labels = class_cosines(encoder, data), np.array(data.labels)
    assert_no_near_ties(cosines, hot(labels, 8))
    guesses = cosines.argmax(axis=1)
    assert len(set(guesses)) >= 4
    ours = {name: scored["birds"]["metrics"][name] for name in ("acc1", "acc5", "mean_per_class_recall")}
    assert len({0, 1, *ours.values()}) == 5  # so that it tells one from another
    assert theirs(judged, "birds")["metrics"] == same(ours)
    learnt = {f"acc{k}": top_k_accuracy_score(labels, cosines, k=k, labels=range(8)) for k in (1, 5)}
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        learnt["mean_per_class_recall"] = balanced_accuracy_score(labels, guesses)
    assert learnt == same(ours)
    present = sorted(set(labels))
    assert f1_score(labels, guesses, labels=present, average="macro") == pytest.approx(
        scored["birds"]["metrics"]["macro_f1"], abs=1e-6
    )
    assert scored["birds"]["samples"]["guesses"] == guesses.tolist()


def test_the_benchmark_saw_the_same_names_and_prompts(judged, scored):
    said, ours = theirs(judged, "birds"), scored["birds"]
    assert (said["classnames"], said["templates"]) == (ours["classnames"], ours["templates"])


def test_the_first_five_of_four_classes_are_all_to_us_and_undefined_to_clip_benchmark(judged, scored):
    ours = {name: scored["four"]["metrics"][name] for name in ("acc1", "acc5", "mean_per_class_recall")}
    assert ours["acc5"] == 1
    assert '"acc5": NaN' in (judged / "four.json").read_text()  # which is not JSON to all readers
    assert theirs(judged, "four")["metrics"] == pytest.approx({**ours, "acc5": math.nan}, rel=0, abs=1e-6, nan_ok=True)


def test_of_classes_that_tie_the_first_is_guessed_by_us_and_either_by_clip_benchmark(judged, scored):
    samples = scored["twins"]["samples"]
    labels, guesses = np.array(samples["labels"]), np.array(samples["guesses"])
    assert scored["twins"]["same_prompts"] == [["crane", "crane"]]
    assert 2 not in guesses
    assert 0 in guesses
    either = np.isin(guesses, (0, 2)) & np.isin(labels, (0, 2))
    others = (guesses == labels) & ~either
    their = theirs(judged, "twins")["metrics"]["acc1"]
    assert others.mean() - 1e-6 <= their <= (others | either).mean() + 1e-6


def test_multilabel_equals_clip_benchmarks_and_scikit_learns(judged, scored, encoder):
    data = open_dataset(judged / "flocks")
    assert isinstance(data, MultilabelImages)
    cosines = class_cosines(encoder, data)
    assert_no_near_ties(cosines.T, data.labels.T)
    assert theirs(judged, "flocks")["metrics"] == same(scored["flocks"]["metrics"])
    learnt = average_precision_score(data.labels, cosines, average=None)
    ours = [each["average_precision"] for each in scored["flocks"]["per_class"]]
    np.testing.assert_allclose(ours, learnt, rtol=0, atol=1e-6)


def test_a_class_without_positives_is_left_out_by_us_and_0_to_the_others(judged, scored, encoder):
    data, ours = open_dataset(judged / "keas gone"), scored["keas gone"]
    assert [each["average_precision"] is None for each in ours["per_class"]] == [c == 2 for c in range(6)]
    theirs_by_our_numbers = {"mean_average_precision": ours["metrics"]["mean_average_precision"] * 5 / 6}
    assert theirs(judged, "keas gone")["metrics"] == same(theirs_by_our_numbers)
    with pytest.warns(UserWarning, match="No positive class found"):
        learnt = {"mean_average_precision": average_precision_score(data.labels, class_cosines(encoder, data))}
    assert learnt == same(theirs_by_our_numbers)


@pytest.mark.sample(2)
def test_retrieval_equals_clip_benchmarks_and_scikit_learns(judged, scored, encoder):
    data = open_dataset(judged / "captions")
    assert isinstance(data, CaptionedImages)
    images = image_features(encoder, data)
    texts, owner = text_features(encoder, data.captions)
    scores, is_own = (texts @ images.T).numpy(), hot(owner, N)
    for both in ((scores, is_own), (scores.T, is_own.T)):
        assert_no_near_ties(*both)
    ours = {name: value for name, value in scored["captions"]["metrics"].items() if "recall" in name}
    assert ours == same(retrieval_metrics(images, texts, owner))
    assert theirs(judged, "captions")["metrics"] == same(ours)
    assert 0 < ours["image_retrieval_recall@1"] < ours["image_retrieval_recall@10"] < 1
    assert 0 < ours["text_retrieval_recall@1"] < ours["text_retrieval_recall@10"] < 1
    # An image is to its texts what a class is to images; so that scikit-learn, which ranks no several, judges one side.
    learnt = {
        f"image_retrieval_recall@{k}": top_k_accuracy_score(owner, scores, k=k, labels=range(N)) for k in RECALL_AT
    }
    assert {**ours, **learnt} == same(ours)


def test_an_image_without_caption_is_refused_by_us_and_finds_nothing_to_clip_benchmark(judged, encoder):
    with pytest.raises(ValueError, match=f"1 of {N} images have no caption: 0.tar:s000000{WITHOUT_CAPTION}"):
        open_dataset(judged / "captions missing")
    data = open_dataset(judged / "captions")
    captions = [() if n == WITHOUT_CAPTION else each for n, each in enumerate(data.captions)]
    ours = retrieval_metrics(image_features(encoder, data), *text_features(encoder, captions))
    by_all = {name: recall * ((N - 1) / N if name.startswith("text") else 1) for name, recall in ours.items()}
    assert theirs(judged, "captions missing")["metrics"] == same(by_all)


@pytest.mark.long
def test_its_build_gathers_our_files_beside_its_own(judged, reports):
    out = judged / "benchmark.csv"
    clip_benchmark(["build", str(reports / "clip_benchmark"), str(judged / "birds.json"), "--output", str(out)])
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (len(CLASSIFIED) + 1) + 1
    found = json.loads((reports / "results.json").read_text())["results"]
    for result in found:
        (row,) = (r for r in rows if (r["model"], r["dataset"]) == (result["model"], result["dataset"]))
        for name, value in result["metrics"].items():
            if name != "acc5" or len(result["classnames"]) >= 5:
                assert float(row[name]) == pytest.approx(value, abs=1e-9)
    ours = next(row for row in rows if row["dataset"] == "birds" and row["model"].endswith("native"))
    (their,) = (row for row in rows if row["dataset"] == "wds/birds")
    assert float(ours["acc1"]) == pytest.approx(float(their["acc1"]), abs=1e-6)
