# Texts of a batch, packed, against the rectangle that they were before: the long way.

import pytest
import torch
from helpers import tiny_clip, tiny_config
from torch import Tensor

import miniclip
from miniclip.data import Batch
from miniclip.model import CLIP, pack_text, trim_text
from miniclip.tokenizer import END_OF_TEXT
from miniclip.training import CLIPTraining

LENGTHS = [9, 3, 16, 3, 2, 9, 9, 1]


MANY, FEW = 1000, 2  # words; of few, texts begin alike


def texts(lengths: list[int], words: int = MANY) -> Tensor:
    """Behind the end of each stand ids that must not matter, the end's among them."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 1 + words, (len(lengths), 16), generator=random)
    tokens[:, -1] = END_OF_TEXT
    tokens[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = END_OF_TEXT
    return tokens


def beginnings(tokens: Tensor, lengths: list[int]) -> set[tuple[int, ...]]:
    return {tuple(row[:place]) for row, n in zip(tokens.tolist(), lengths, strict=True) for place in range(1, n + 1)}


def rectangular(model: CLIP, tokens: Tensor) -> Tensor:
    return model.text(trim_text(tokens, END_OF_TEXT))


def gradients(model: CLIP, features: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (features * weights).sum().backward()
    return {name: parameter.grad for name, parameter in model.text.named_parameters()}


def test_packed_texts_lie_one_behind_the_other_by_length():
    end = END_OF_TEXT
    tokens = torch.tensor([[1, 2, end, 0], [3, end, end, 4], [5, 6, end, end], [7, 8, 9, end]])
    packed, packing, places = pack_text(tokens, END_OF_TEXT)
    assert packed.tolist() == [[3, end, 1, 2, end, 5, 6, end, 7, 8, 9, end]]
    assert packing.groups == ((1, 2), (2, 3), (1, 4))
    assert packing.places.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    assert packing.ends.tolist() == [1, 4, 7, 11]
    assert packing.spread is None
    assert packing.unique is None
    assert places.tolist() == [1, 0, 2, 3]


def test_what_texts_begin_with_alike_is_there_once():
    end = END_OF_TEXT
    tokens = torch.tensor([[1, 2, 3, end, 9], [1, end, 7, 7, 7], [1, 2, end, end, 5], [1, 2, 3, end, 4]])
    packed, packing, places = pack_text(tokens, END_OF_TEXT)
    assert packed.tolist() == [[1, 2, 3, end, end, end]]  # 1, 12, 123 and its end, 12's end, 1's end
    assert packing.groups == ((1, 2), (1, 3), (2, 4))
    assert packing.places.tolist() == [0, 1, 2, 3, 2, 1]
    assert packing.spread.tolist() == [0, 5, 0, 1, 4, 0, 1, 2, 3, 0, 1, 2, 3]
    assert packing.unique.tolist() == [0, 3, 7, 8, 4, 1]
    assert packing.ends.tolist() == [5, 4, 3, 3]
    assert places.tolist() == [2, 0, 1, 3]


def test_a_word_in_eight_that_is_shared_is_not_worth_the_copies():
    tokens = texts([8, 8])
    tokens[1, 0] = tokens[0, 0]
    assert pack_text(tokens, END_OF_TEXT)[0].shape == (1, 16)
    tokens[1, 1] = tokens[0, 1]
    assert pack_text(tokens, END_OF_TEXT)[0].shape == (1, 14)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_texts_share_each_is_put_together_again(seed):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 17, (12,), generator=random).tolist()
    tokens = texts(lengths, words=1 + seed % 4)
    packed, packing, places = pack_text(tokens, END_OF_TEXT)
    spread = packed[0] if packing.spread is None else packed[0, packing.spread]
    texts_there = spread.split([length for count, length in packing.groups for _ in range(count)])
    for row, place, length in zip(tokens, places.tolist(), lengths, strict=True):
        assert texts_there[place].tolist() == row[:length].tolist()
        assert packed[0, packing.ends[place]] == END_OF_TEXT
    if packing.spread is not None:
        assert packed.shape[1] == len(beginnings(tokens, lengths))


@pytest.mark.parametrize("words", [MANY, FEW])
@pytest.mark.parametrize("lengths", [LENGTHS, [5, 5, 5], [1, 1], [16], [1], [1, 2, 3]])
def test_packed_texts_have_the_features_and_gradients_of_padded_ones(lengths, words):
    tokens = texts(lengths, words)
    packed, padded = (tiny_clip(activation="quick_gelu").double() for _ in range(2))
    found, expected = packed.encode_text(tokens), rectangular(padded, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    of_packed, of_padded = gradients(packed, found), gradients(padded, expected)
    assert of_packed.keys() == of_padded.keys()
    for name, gradient in of_padded.items():
        torch.testing.assert_close(of_packed[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("words", [MANY, FEW])
def test_no_token_is_computed_that_the_end_of_its_text_can_not_see_or_that_was_computed_for_another_text(words):
    model, rows, tokens = tiny_clip(), [], texts(LENGTHS, words)
    for block in model.text.transformer.resblocks:
        block.mlp.register_forward_hook(lambda *all_: rows.append(all_[-1].shape[:2].numel()))
    model.encode_text(tokens)
    assert rows == [len(beginnings(tokens, LENGTHS)), len(LENGTHS)]  # the last block is for the ends alone
    assert (rows[0] == sum(LENGTHS)) == (words == MANY)


@pytest.mark.parametrize("words", [MANY, FEW])
@torch.no_grad()
def test_all_tokens_of_packed_texts_are_those_of_padded_ones(words):
    model, tokens = tiny_clip().double(), texts(LENGTHS, words)
    packed, packing, places = pack_text(tokens, END_OF_TEXT)
    states = model.text(packed, all_tokens=True, packing=packing)[0].split(sorted(LENGTHS))
    for row, place, length in zip(model.text(tokens, all_tokens=True), places.tolist(), LENGTHS, strict=True):
        torch.testing.assert_close(states[place], row[:length], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("words", [MANY, FEW])
@pytest.mark.parametrize("options", [{"checkpoint_activations": True}, {"micro_batch_size": 3}])
def test_packed_texts_train_alike_however_memory_is_saved(options, words):
    found = []
    for more in ({}, options):
        torch.manual_seed(0)
        module = CLIPTraining(tiny_config(), **more).double().train()
        images = torch.zeros(len(LENGTHS), 3, 16, 16, dtype=torch.uint8)
        batch = Batch(images, texts(LENGTHS, words), None, ["key"] * len(LENGTHS), [], 0, torch.arange(len(LENGTHS)))
        _, features = module.features(batch)
        found.append((features, gradients(module.clip, features)))
    (plain, expected), (saving, of_saving) = found
    torch.testing.assert_close(saving, plain, rtol=1e-11, atol=1e-13)
    for name, gradient in expected.items():
        torch.testing.assert_close(of_saving[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("words", [MANY, FEW])
@torch.no_grad()
def test_packed_texts_stay_near_under_autocast(words):
    model, tokens = tiny_clip(), texts(LENGTHS, words)
    exact = rectangular(model, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        found, padded = model.encode_text(tokens), rectangular(model, tokens)
    assert found.dtype == torch.bfloat16
    error = (found - exact).abs().max()
    assert 0 < error < 2 * (padded - exact).abs().max()


@torch.no_grad()
def test_texts_stay_a_rectangle_where_few_shapes_are_wanted():
    model, tokens, shapes = tiny_clip(), texts([3, 9]), []
    model.text.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    features = model.encode_text(tokens)
    model.text_length_multiple = 8  # as compiled towers have it
    torch.testing.assert_close(model.encode_text(tokens), features)
    assert shapes == [(1, 12), (2, 16)]


def test_a_text_without_an_end_is_refused_and_named_before_it_is_packed():
    with pytest.raises(ValueError, match=rf"row 1 .*no end-of-text token \({END_OF_TEXT}\): \[1, 2\]"):
        tiny_clip().encode_text(torch.tensor([[1, END_OF_TEXT], [1, 2]]))


@torch.no_grad()
def test_a_tower_that_is_missing_says_so():
    with pytest.raises(ValueError, match="has no text tower"):
        miniclip.CLIP(tiny_config(towers="image")).encode_text(texts([3, 9]))
