"""Equal scores mean something: they never fall to the one that rounding favours, in any accuracy and recall."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_clip

from miniclip import tokenizer
from miniclip.evaluation.datasets.sets import CaptionedImages, LabelledImages
from miniclip.evaluation.features import ImageFeatures, encode_texts
from miniclip.evaluation.measures.ranking import retrieval
from miniclip.evaluation.measures.ties import first_of_best, rank_classes
from miniclip.evaluation.probes import Outcome, nearest_neighbours
from miniclip.evaluation.retrieval import retrieve
from miniclip.evaluation.splits import Labelled, Splits
from miniclip.evaluation.zero_shot import classify, zero_shot_classifier

ROUNDING = 5e-8  # what another machine, batch or number of threads does to a unit feature's numbers


def units(seed: int, count: int, width: int = 32) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def rounded_elsewhere(features: torch.Tensor, seed: int) -> torch.Tensor:
    noise = torch.rand(features.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    return features + 2 * ROUNDING * noise


# ---------------------------------------------------------------------------------------------------------------------
# Classes


def test_equal_scores_rank_by_class_however_they_were_rounded():
    cosines = torch.tensor([[0.1, 0.5, 0.3, 0.5, 0.3, 0.5], [0.2] * 6, [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]])
    expected = [[1, 3, 5, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    for seed in range(20):
        assert rank_classes(rounded_elsewhere(cosines, seed), 4).tolist() == expected
        assert first_of_best(rounded_elsewhere(cosines, seed).numpy()).tolist() == [1, 0, 0]


def test_a_difference_in_the_sixth_digit_is_no_tie():
    assert rank_classes(torch.tensor([[0.3, 0.300001, 0.300002]]), 3).tolist() == [[2, 1, 0]]
    assert first_of_best(np.array([[0.3, 0.300001]])).tolist() == [1]


def test_every_rank_is_that_of_a_sort_by_score_and_then_by_class():
    random = np.random.default_rng(0)
    for k in (1, 3, 7):
        steps = random.integers(0, 4, (50, 7))  # many ties, also at the k-th
        expected = [sorted(range(7), key=lambda c, row=row: (-row[c], c))[:k] for row in steps]
        assert rank_classes(rounded_elsewhere(torch.tensor(steps / 10.0).float(), k), k).tolist() == expected


def test_classes_of_the_same_prompts_share_one_vector_and_the_first_gets_the_guess():
    model = tiny_clip()
    names = ("Kea", "barn owl", "kea", "  KEA ", "owl")
    classifier = zero_shot_classifier(model, names, ("a photo of a {}.", "art of the {}."))
    assert torch.equal(classifier[:, [2, 3]], classifier[:, [0, 0]])
    by_class = {"a": ["x one", "y two"], "b": ["y two", "x one"], "c": ["z"]}
    classifier_by_class = zero_shot_classifier(model, tuple(by_class), by_class)
    assert torch.equal(classifier_by_class[:, 0], classifier_by_class[:, 1])
    data = LabelledImages("pets", tuple("abcde"), (0, 1, 2, 3, 4), names, ("{}",), tuple("abcde"))
    scores = classify(ImageFeatures(data, np.arange(5), classifier.T.clone(), ()), data, classifier, 10.0)
    assert scores.ranked[:, 0].tolist() == [0, 1, 0, 0, 4]
    assert scores.same_prompts == (("Kea", "kea", "  KEA "),)


def test_texts_of_the_same_tokens_have_the_same_features_wherever_they_stand():
    model = tiny_clip()
    texts = ["A Kea", *(f"bird number {n}" for n in range(600)), "a  kea", "a KEA"]
    features = encode_texts(model, texts, lambda batch: tokenizer.tokenize(batch, context_length=16))
    assert torch.equal(features[0], features[-1])
    assert torch.equal(features[0], features[-2])


def test_a_case_that_a_tokenizer_distinguishes_stays_two_texts():
    class Exact:
        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens.float()

    def tokenize(batch: list[str]) -> torch.Tensor:
        return torch.tensor([[ord(text[0]), 1] for text in batch])

    features = encode_texts(Exact(), ["a", "A"], tokenize)
    assert not torch.equal(features[0], features[1])


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval


def test_equal_captions_are_right_answers_by_hand():
    """Images 0 and 2 have the caption "a dog", image 1 has "a cat". Image 2 is nearest to "a dog"."""
    images = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [1.0, 0.0, 0.0]])
    data = CaptionedImages("pets", tuple("abc"), (("a dog",), ("a cat",), ("A  DOG",)), tuple("abc"))
    scores = retrieve(ImageFeatures(data, np.arange(3), images, ()), data, texts)
    assert scores.metrics.images.ranks.tolist() == [1, 3, 1]  # by text; "a cat" has its image last
    assert scores.metrics.texts.ranks.tolist() == [2, 3, 1]  # image 0 is nearer to "a cat" than to "a dog"
    bare = retrieval(images, texts, [0, 1, 2])  # without the captions, a tie counts against the model
    assert bare.images.ranks.tolist() == [2, 3, 1]
    assert bare.texts.ranks.tolist() == [3, 3, 2]


@pytest.mark.parametrize("num_captions", [1, 3, 40])
def test_shared_captions_agree_with_the_long_way(num_captions, monkeypatch):
    from miniclip.evaluation.measures import ranking

    monkeypatch.setattr(ranking, "_NUM_ROWS", 7)
    monkeypatch.setattr(ranking, "_NUM_COLUMNS", 5)
    random = np.random.default_rng(num_captions)
    I, T = 23, 60  # noqa: E741
    caption = random.integers(num_captions, size=T)
    owner = np.sort(np.r_[np.arange(I), random.integers(I, size=T - I)])
    images, by_caption = units(0, I), units(1, num_captions)
    texts = by_caption[torch.from_numpy(caption)]
    found = retrieval(images, texts, owner, (1, 3, 10), caption.tolist())
    cosines = images.double() @ texts.double().T
    has = np.array([[caption[t] in caption[owner == i] for t in range(T)] for i in range(I)])
    for t in range(T):
        own = has[:, t]
        best = cosines[own, t].max()
        assert found.images.ranks[t] == 1 + (cosines[~own, t] >= best - 1e-6).sum()
    for position, i in enumerate(found.texts.queries):
        best = cosines[i, owner == i].max()
        assert found.texts.ranks[position] == 1 + (cosines[i, ~has[i]] >= best - 1e-6).sum()


def test_copies_of_an_image_rank_alike_however_they_were_rounded():
    """The texts can't tell an image from its copy: both rank second, the tie counting against the model."""
    images, texts = units(2, 10), units(2, 10)
    images, texts = torch.cat([images, images]), torch.cat([texts, texts])
    expected = retrieval(images, texts, range(20))
    assert set(expected.images.ranks.tolist()) == {2}
    for seed in range(10):
        found = retrieval(rounded_elsewhere(images, seed), rounded_elsewhere(texts, seed + 100), range(20))
        assert found.images.ranks.tolist() == expected.images.ranks.tolist()
        assert found.texts.ranks.tolist() == expected.texts.ranks.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Probes


def test_copies_at_the_last_neighbour_share_its_votes_in_any_order():
    """One neighbour of class 0 is nearest; three copies, of classes 0, 1 and 1, are as near as the second of k = 2."""
    near, copy = [1.0, 0.0], [0.8, 0.6]
    train = Labelled(np.array([near, copy, copy, copy, [0.0, 1.0]], dtype=np.float32), np.array([0, 0, 1, 1, 1]))
    test = Labelled(np.array([[1.0, 0.0]], dtype=np.float32), np.array([0]))
    weights = np.exp(np.array([1.0, 0.8]) / 0.07 - 1 / 0.07)
    expected = np.array([weights[0] + weights[1] / 3, weights[1] * 2 / 3]) / weights.sum()
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(5)
        splits = Splits(train.take(order), test, test, ("a", "b"))
        np.testing.assert_allclose(nearest_neighbours(splits, 2, refit=False).scores[0], expected, rtol=1e-5)


def test_a_guess_between_equal_scores_is_the_first_class():
    test = Labelled(np.zeros((2, 1), dtype=np.float32), np.array([0, 1]))
    assert Outcome(np.array([[0.5, 0.5 + 1e-12], [50.0, 50.00001]]), test).is_right.tolist() == [True, False]
