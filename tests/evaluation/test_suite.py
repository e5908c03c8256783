"""Everything that is asked of a model on a data set: each answer is that of the long way, and images are seen once."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_clip, write_picture
from PIL import Image

from miniclip import tokenizer
from miniclip.evaluation import probes
from miniclip.evaluation.datasets.open import open_dataset, with_templates
from miniclip.evaluation.datasets.sets import CaptionedImages, EvaluationSet, LabelledImages, MultilabelImages
from miniclip.evaluation.encoder import from_clip
from miniclip.evaluation.features import FeatureCache
from miniclip.evaluation.measures import thresholds
from miniclip.evaluation.measures.classification import multilabel, subgroup_accuracy
from miniclip.evaluation.measures.statistics import wilson_interval
from miniclip.evaluation.splits import Labelled, make_splits
from miniclip.evaluation.suite import Task, evaluate
from miniclip.evaluation.zero_shot import zero_shot_classifier, zero_shot_scores
from miniclip.weights.load import preprocess_for

NAMES = ("cat", "dog", "kea")


class Watched:
    """A model that counts the images and texts that it is asked to encode."""

    def __init__(self, has_pooled: bool = False) -> None:
        self.clip = tiny_clip()
        self.images = self.texts = 0
        own = from_clip(self.clip, preprocess_for(self.clip.config), "tiny")
        self.model = replace(
            own,
            encode_image=lambda images: self._images(own.encode_image, images),
            encode_text=lambda tokens: self._texts(own.encode_text, tokens),
            encode_pooled=own.encode_pooled if has_pooled else None,
        )

    def _images(self, encode, images):
        self.images += len(images)
        return encode(images)

    def _texts(self, encode, tokens):
        self.texts += len(tokens)
        return encode(tokens)


def labelled(folder: Path, count: int = 12, first: int = 0, name: str = "pets", **options) -> LabelledImages:
    paths = tuple(write_picture(folder / f"{number}.png", number) for number in range(first, first + count))
    everyone = tuple(map(str, paths))
    labels = tuple(number % 3 for number in range(count))
    return LabelledImages(name, paths, labels, NAMES, ("a photo of a {}.",), everyone, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Classification


def test_every_set_of_prompts_is_scored_at_the_cost_of_one_look_at_the_images(tmp_path):
    data = labelled(tmp_path)
    variants = tuple(with_templates(data, each) for each in ("simple", "imagenet7"))
    watched = Watched()
    results = evaluate(watched.model, Task(data, variants), ks=(1, 2))
    assert watched.images == len(data)
    assert [result.task for result in results] == ["zeroshot_classification"] * 3
    assert [len(result.data.templates) for result in results] == [1, 1, 7]
    for result, variant in zip(results, (data, *variants), strict=True):
        expected = zero_shot_scores(watched.clip, watched.model.preprocess, variant)
        for name in ("indices", "labels", "ranked"):
            np.testing.assert_array_equal(getattr(result.scores, name), getattr(expected, name))
        np.testing.assert_allclose(result.scores.probabilities, expected.probabilities, atol=1e-6)
        assert result.scores.metrics.acc1 == expected.metrics.acc1
        assert set(result.scores.metrics.top_k) == {1, 2, 5}
        assert (result.model, result.scores.num_images) == ("tiny", 12)


def test_with_a_cache_a_second_run_encodes_nothing_and_says_the_same(tmp_path):
    data, cache = labelled(tmp_path / "images"), FeatureCache(tmp_path / "cache")
    first, second, changed = Watched(), Watched(), Watched()
    (expected,) = evaluate(first.model, Task(data), cache=cache)
    (found,) = evaluate(second.model, Task(data), cache=cache)
    assert (first.images, first.texts, second.images, second.texts) == (12, 3, 0, 0)
    np.testing.assert_array_equal(found.scores.probabilities, expected.scores.probabilities)
    with torch.no_grad():
        next(changed.clip.visual.parameters()).mul_(1.5)
    evaluate(changed.model, Task(data), cache=cache)
    assert (changed.images, changed.texts) == (12, 0)  # the texts' tower is the same
    other_words = Watched()
    evaluate(other_words.model, Task(replace(data, templates=("the {}",))), cache=cache)
    assert (other_words.images, other_words.texts) == (0, 3)
    write_picture(data.images[0], 99)
    evaluate(other_words.model, Task(data), cache=cache)
    assert other_words.images == 12


def test_classes_of_the_same_prompts_are_told_and_the_first_gets_the_guess(tmp_path):
    data = replace(labelled(tmp_path), classnames=("cat", "dog", "cat"))
    (result,) = evaluate(Watched().model, Task(data))
    assert result.scores.same_prompts == (("cat", "cat"),)
    assert 2 not in result.scores.ranked[:, 0]
    cats = np.isin(result.scores.ranked[:, 0], (0,))
    np.testing.assert_array_equal(result.scores.ranked[cats, 1], 2)  # as near, and after it
    np.testing.assert_array_equal(result.scores.cosines[cats, 0], result.scores.cosines[cats, 1])


def test_subgroups_are_scored_by_the_values_of_a_column(tmp_path):
    data = labelled(tmp_path, metadata={"light": ["day", "night"] * 6, "camera": ["a"] * 12})
    (result,) = evaluate(Watched().model, Task(data, subgroup_columns=("light", "camera")))
    right = result.scores.is_right
    found = {each.value: (each.num_images, each.accuracy) for each in result.subgroups["light"].subgroups}
    assert found == {"day": (6, right[::2].mean()), "night": (6, right[1::2].mean())}
    assert result.subgroups["camera"].subgroups[0].accuracy == result.scores.metrics.acc1


def test_subgroups_of_any_column_are_texts(tmp_path):
    """Of Parquet: dates, times, decimals, infinite numbers; of JSON: lists and mappings, which have no order."""
    day = datetime.date(2024, 2, 29)
    columns = {
        "day": ([day, None], ["2024-02-29", None]),
        "time": ([datetime.datetime(2024, 2, 29, 1, 2), None], ["2024-02-29 01:02:00", None]),
        "price": ([decimal.Decimal("1.50"), decimal.Decimal("2")], ["1.50", "2"]),
        "range": ([math.inf, math.nan], ["inf", None]),
        "tags": ([["a", "ü"], []], ['["a", "ü"]', "[]"]),
        "place": ([{"town": "Ü", "day": day}, None], ['{"town": "Ü", "day": "2024-02-29"}', None]),
        "is_new": ([True, 1], ["True", "1"]),
        "hat": (["None", "n/a"], [None, None]),
    }
    data = labelled(tmp_path, 12, metadata={name: cells * 6 for name, (cells, _) in columns.items()})
    with pytest.warns(UserWarning, match=r"pets: 'None' \(6 times\), 'n/a' \(6 times\) in column 'hat' are taken"):
        (result,) = evaluate(Watched().model, Task(data, subgroup_columns=tuple(columns)))
    for name, (_, expected) in columns.items():
        found = result.subgroups[name]
        assert [each.value for each in found.subgroups] == list(dict.fromkeys(expected)), name
        json.dumps(found.as_dict(), allow_nan=False)
    gap = subgroup_accuracy([1, 0], data.column("price")[:2], min_groups=1).as_dict()
    assert (gap["best"], gap["worst"]) == ("1.50", "2")


def test_none_of_these_is_chosen_on_one_half_and_tried_on_the_other(tmp_path):
    data = labelled(tmp_path / "inside", 20)
    paths = tuple(write_picture(tmp_path / "outside" / f"{n}.png", 100 + n, mode="L") for n in range(14))
    watched = Watched()
    (result,) = evaluate(watched.model, Task(data, outside=EvaluationSet("noise", paths), false_acceptance=0.2))
    found = result.outside
    assert found is not None
    assert (found.name, len(found.inside), len(found.outside)) == ("noise", 10, 7)
    assert (found.acceptance.threshold.num_inside, found.acceptance.threshold.num_outside) == (10, 7)
    classifier = zero_shot_classifier(watched.clip, NAMES, data.templates)
    preprocess = watched.model.preprocess
    with torch.no_grad():
        images = torch.stack([preprocess(Image.open(path)) for path in paths])
        best = (watched.clip.encode_image(images, normalize=True) @ classifier).amax(dim=1).numpy()
    assert all(np.abs(best - cosine).min() < 1e-6 for cosine in found.outside)
    assert found.separation == thresholds.separation(found.inside, found.outside)
    accepted = (found.outside >= found.acceptance.threshold.cosine).mean()
    assert found.acceptance.accepted_outside == accepted


# ---------------------------------------------------------------------------------------------------------------------
# Several labels, captions


def test_several_labels_are_ranked_by_cosine(tmp_path):
    plain = labelled(tmp_path)
    labels = np.random.default_rng(0).random((12, 3)) < 0.4
    labels[0] = True
    data = MultilabelImages("tags", plain.images, labels, NAMES, plain.templates, plain.groups)
    watched = Watched()
    first, second = evaluate(watched.model, Task(data, (with_templates(data, "imagenet7"),)))
    assert (first.task, watched.images) == ("zeroshot_multilabel", 12)
    with torch.no_grad():
        pixels = torch.stack([watched.model.preprocess(Image.open(path)) for path in plain.images])
        features = watched.clip.encode_image(pixels, normalize=True)
    for result in (first, second):
        cosines = features @ zero_shot_classifier(watched.clip, NAMES, result.data.templates)
        np.testing.assert_allclose(result.scores.cosines, cosines, atol=1e-6)
        assert result.scores.metrics.mean_average_precision == multilabel(cosines, labels).mean_average_precision


def test_captions_of_images_that_can_be_read_are_found(tmp_path):
    paths = tuple(write_picture(tmp_path / f"{n}.png", n) for n in range(7))
    paths[2].write_bytes(b"no picture")
    captions = tuple(tuple(f"picture {n}, caption {line}" for line in range(1 + n % 3)) for n in range(7))
    data = CaptionedImages("captioned", paths, captions, tuple(map(str, range(7))))
    watched = Watched()
    (result,) = evaluate(watched.model, Task(data))
    assert (result.task, result.scores.num_images, watched.images) == ("zeroshot_retrieval", 6, 7)
    kept = [n for n in range(7) if n != 2]
    texts = [text for n in kept for text in captions[n]]
    assert list(result.scores.captions) == texts
    with torch.no_grad():
        pixels = torch.stack([watched.model.preprocess(Image.open(paths[n])) for n in kept])
        features = watched.clip.encode_text(tokenizer.tokenize(texts, context_length=16))
        cosines = F.cosine_similarity(watched.clip.encode_image(pixels)[:, None], features[None], dim=-1).numpy()
    owner = np.repeat(np.arange(6), [len(captions[n]) for n in kept])
    np.testing.assert_array_equal(result.scores.image_of_text, owner)
    ranks = [1 + (np.delete(column, own) >= column[own]).sum() for column, own in zip(cosines.T, owner, strict=True)]
    np.testing.assert_array_equal(result.scores.metrics.images.ranks, ranks)
    for row, each in enumerate(cosines):
        best = each[owner == row].max()
        assert result.scores.metrics.texts.ranks[row] == 1 + (each[owner != row] >= best).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Probes


@pytest.mark.parametrize("has_pooled", [False, True])
def test_probes_are_those_of_the_features(tmp_path, has_pooled):
    train = labelled(tmp_path / "train", 30, first=100, name="train")
    test = labelled(tmp_path / "test", 9)
    watched = Watched(has_pooled)
    (result,) = evaluate(watched.model, Task(test, train=train, shots=(1, 2), seeds=(0, 1)))
    found = result.probes
    assert found is not None
    assert (found.train, found.is_pooled, watched.images) == ("train", has_pooled, 39)

    def features(data: LabelledImages, encode) -> Labelled:
        with torch.no_grad():
            pixels = torch.stack([watched.model.preprocess(Image.open(path)) for path in data.images])
            return Labelled(encode(pixels).numpy(), np.array(data.labels), np.array(data.groups))

    sides = [features(data, watched.clip.encode_image) for data in (train, test)]
    splits = make_splits(*sides, NAMES)
    classifier = zero_shot_classifier(watched.clip, NAMES, test.templates).numpy()
    for outcome in (found.neighbours, probes.nearest_neighbours(splits, 20)):
        np.testing.assert_allclose(outcome.scores, probes.nearest_neighbours(splits, 20).scores, atol=1e-5)
    assert (
        found.tip_adapter.outcome.accuracy
        == probes.tip_adapter(splits, classifier, logit_scale=result.logit_scale).outcome.accuracy
    )
    assert found.curve.zero_shot == result.scores.metrics.acc1
    assert found.curve.shots == (1, 2)
    width = found.linear.weight.shape[0]
    assert width == (watched.clip.config.vision.width if has_pooled else watched.clip.config.embed_dim)


def test_training_classes_in_another_order_are_the_same_classes(tmp_path):
    test = labelled(tmp_path / "test", 9)
    train = labelled(tmp_path / "train", 15, first=50, name="train")
    turned = replace(train, classnames=NAMES[::-1], labels=tuple(2 - label for label in train.labels))
    found = [
        evaluate(Watched().model, Task(test, train=each, shots=(1,), seeds=(0,)))[0].probes for each in (train, turned)
    ]
    np.testing.assert_array_equal(found[0].linear.outcome.scores, found[1].linear.outcome.scores)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused before any work


def test_one_class_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="pets has one class, 'cat'; there is nothing to tell apart"):
        Task(replace(labelled(tmp_path, 2), labels=(0, 0), classnames=("cat",)))


def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    with pytest.raises(ValueError, match="pets has no column 'age'; its columns are 'light'"):
        Task(labelled(tmp_path, 2, metadata={"light": ["day", "night"]}), subgroup_columns=("age",))


def test_other_classes_to_learn_from_are_refused_with_both(tmp_path):
    data = labelled(tmp_path)
    train = replace(data, name="train", classnames=("cat", "dog", "owl"))
    with pytest.raises(ValueError, match="the same: only pets has 'kea'; only train has 'owl'"):
        Task(data, train=train)


def test_captions_have_no_subgroups_and_nothing_to_learn(tmp_path):
    path = write_picture(tmp_path / "0.png")
    data = CaptionedImages("captioned", (path,), (("a",),), ("0",))
    with pytest.raises(ValueError, match="train needs a set of one label for each image, and captioned is not one"):
        Task(data, train=labelled(tmp_path))


def test_prompts_that_are_cut_are_told_and_so_are_classes_that_they_make_alike(tmp_path):
    data = replace(labelled(tmp_path), templates=("very " * 20 + "{}",))
    with pytest.warns(UserWarning, match="tiny reads 16 tokens; 3 of 3 texts are longer and were cut"):
        (result,) = evaluate(Watched().model, Task(data))
    assert result.scores.same_prompts == (NAMES,)


def write_pairs(root: Path) -> Path:
    rows = [f"{n}.png,a text {n},{n // 4}" for n in range(12)]
    for number in range(12):
        write_picture(root / f"{number}.png", number)
    (root / "pairs.csv").write_text("\n".join(["image,caption,scene", *rows, "0.png,the first,0"]))
    return root / "pairs.csv"


def test_retrieval_is_scored_at_the_ks_that_are_asked_for(tmp_path):
    data = open_dataset(write_pairs(tmp_path), task="retrieval")
    (usual,) = evaluate(Watched().model, Task(data))
    (found,) = evaluate(Watched().model, Task(data), ks=(2, 12))
    assert list(usual.scores.metrics.images.recall) == [1, 5, 10]
    for usual_ranking, ranking in (
        (usual.scores.metrics.images, found.scores.metrics.images),
        (usual.scores.metrics.texts, found.scores.metrics.texts),
    ):
        assert ranking.recall == {k: (usual_ranking.ranks <= k).mean() for k in (1, 2, 12)}
    assert {"R@1 %", "R@2 %", "R@12 %", "mAP@12 %"} <= set(found.scores.rows()[0])


def test_images_of_a_group_count_as_fewer_in_retrieval(tmp_path):
    source = write_pairs(tmp_path)
    data = open_dataset(source, task="retrieval", group_column="scene")
    assert data.groups == tuple("000011112222")
    (found,) = evaluate(Watched().model, Task(data))
    (alone,) = evaluate(Watched().model, Task(open_dataset(source, task="retrieval")))
    images = found.scores.metrics.images
    assert images.ranks.tolist() == alone.scores.metrics.images.ranks.tolist()
    groups = np.array(list("0000011112222"))  # of the captions: the first image has two
    assert found.scores.interval_images == wilson_interval(images.ranks == 1, groups)
    assert found.scores.interval_images != alone.scores.interval_images
    with pytest.raises(ValueError, match=r"has no column 'place' beside its images and captions; it has scene"):
        open_dataset(source, task="retrieval", group_column="place")
    with pytest.raises(ValueError, match=r"is read for its captions, so --label-column scene can't be followed"):
        open_dataset(source, task="retrieval", label_column="scene")
    source.write_text(source.read_text() + "\n0.png,once more,2")
    with pytest.raises(ValueError, match=r"0\.png has the scene '0' in one row and '2' in another"):
        open_dataset(source, task="retrieval", group_column="scene")
