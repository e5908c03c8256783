# Packed texts against padded ones, the textbook's rectangle.

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_clip, tiny_config
from torch import Tensor
from torch.overrides import TorchFunctionMode

import miniclip
from miniclip.data.pairs import Batch
from miniclip.fast.packed_texts import pack_text, trim_text
from miniclip.model import CLIP
from miniclip.tokenizer import END_OF_TEXT
from miniclip.training.step import CLIPTraining

LENGTHS = [9, 3, 16, 3, 2, 9, 9, 1]


MANY, FEW = 1000, 2  # words to draw from; with few, texts share prefixes


def texts(lengths: list[int], words: int = MANY) -> Tensor:
    """Random texts of those lengths; after each end token come ids that must not matter, the end token among them."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 1 + words, (len(lengths), 16), generator=random)
    tokens[:, -1] = END_OF_TEXT
    tokens[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = END_OF_TEXT
    return tokens


def prefixes(tokens: Tensor, lengths: list[int]) -> set[tuple[int, ...]]:
    return {tuple(row[:end]) for row, n in zip(tokens.tolist(), lengths, strict=True) for end in range(1, n + 1)}


def rectangular(model: CLIP, tokens: Tensor) -> Tensor:
    return model.text(trim_text(tokens, END_OF_TEXT))


def gradients(model: CLIP, features: Tensor) -> dict[str, Tensor]:
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (features * weights).sum().backward()
    return {name: parameter.grad for name, parameter in model.text.named_parameters()}


def test_packed_texts_lie_one_behind_the_other_by_length():
    end = END_OF_TEXT
    tokens = torch.tensor([[1, 2, end, 0], [3, end, end, 4], [5, 6, end, end], [7, 8, 9, end]])
    packed, layout, indices = pack_text(tokens, END_OF_TEXT)
    assert packed.tolist() == [[3, end, 1, 2, end, 5, 6, end, 7, 8, 9, end]]
    assert layout.groups == ((1, 2), (2, 3), (1, 4))
    assert layout.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3]
    assert layout.ends.tolist() == [1, 4, 7, 11]
    assert layout.spread is None
    assert layout.unique is None
    assert indices.tolist() == [1, 0, 2, 3]


def test_a_shared_prefix_is_there_once():
    end = END_OF_TEXT
    tokens = torch.tensor([[1, 2, 3, end, 9], [1, end, 7, 7, 7], [1, 2, end, end, 5], [1, 2, 3, end, 4]])
    packed, layout, indices = pack_text(tokens, END_OF_TEXT)
    assert packed.tolist() == [[1, 2, 3, end, end, end]]  # 1, 12, 123 and its end, 12's end, 1's end
    assert layout.groups == ((1, 2), (1, 3), (2, 4))
    assert layout.positions.tolist() == [0, 1, 2, 3, 2, 1]
    assert layout.spread.tolist() == [0, 5, 0, 1, 4, 0, 1, 2, 3, 0, 1, 2, 3]
    assert layout.unique.tolist() == [0, 3, 7, 8, 4, 1]
    assert layout.ends.tolist() == [5, 4, 3, 3]
    assert indices.tolist() == [2, 0, 1, 3]


def test_prefixes_are_shared_if_at_least_one_token_in_eight_is_saved():
    tokens = texts([8, 8])
    tokens[1, 0] = tokens[0, 0]
    assert pack_text(tokens, END_OF_TEXT)[0].shape == (1, 16)
    tokens[1, 1] = tokens[0, 1]
    assert pack_text(tokens, END_OF_TEXT)[0].shape == (1, 14)


@pytest.mark.parametrize("seed", range(20))
def test_each_text_can_be_put_together_again_whatever_it_shares(seed):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 17, (12,), generator=random).tolist()
    tokens = texts(lengths, words=1 + seed % 4)
    packed, layout, indices = pack_text(tokens, END_OF_TEXT)
    spread = packed[0] if layout.spread is None else packed[0, layout.spread]
    texts_there = spread.split([length for count, length in layout.groups for _ in range(count)])
    for row, index, length in zip(tokens, indices.tolist(), lengths, strict=True):
        assert texts_there[index].tolist() == row[:length].tolist()
        assert packed[0, layout.ends[index]] == END_OF_TEXT
    if layout.spread is not None:
        assert packed.shape[1] == len(prefixes(tokens, lengths))


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


class RowsPerProduct(TorchFunctionMode):
    """While it lasts, `counts` lists how many rows each linear layer with the given weights is called on."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights, self.counts = {id(weight) for weight in weights}, list[int]()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and id(args[1]) in self.weights:
            self.counts.append(args[0].shape[:-1].numel())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("words", [MANY, FEW])
def test_all_blocks_but_the_last_compute_each_prefix_once(words):
    model, tokens = tiny_clip(), texts(LENGTHS, words)
    with RowsPerProduct([block.mlp.c_fc.weight for block in model.text.transformer.resblocks]) as rows:
        model.encode_text(tokens)
    assert rows.counts == [len(prefixes(tokens, LENGTHS)), len(LENGTHS)]  # the last block: the end tokens alone
    assert (rows.counts[0] == sum(LENGTHS)) == (words == MANY)


@pytest.mark.parametrize("words", [MANY, FEW])
@torch.no_grad()
def test_all_tokens_of_packed_texts_are_those_of_padded_ones(words):
    model, tokens = tiny_clip().double(), texts(LENGTHS, words)
    packed, layout, indices = pack_text(tokens, END_OF_TEXT)
    states = layout.all_tokens(model.text(packed, all_tokens=True, layout=layout))[0].split(sorted(LENGTHS))
    for row, index, length in zip(model.text(tokens, all_tokens=True), indices.tolist(), LENGTHS, strict=True):
        torch.testing.assert_close(states[index], row[:length], rtol=1e-11, atol=1e-13)


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


def test_compiled_towers_get_padded_texts_of_few_lengths():
    model, tokens = tiny_clip(), texts([3, 9])
    features = model.encode_text(tokens)
    model.text_length_multiple = 8  # as training sets it for compiled towers
    with RowsPerProduct([model.text.transformer.resblocks[0].mlp.c_fc.weight]) as rows:
        torch.testing.assert_close(model.encode_text(tokens), features)
    assert rows.counts == [2 * 16]


def test_a_text_without_an_end_is_refused_and_named_before_it_is_packed():
    with pytest.raises(ValueError, match=rf"row 1 .*no end-of-text token \({END_OF_TEXT}\): \[1, 2\]"):
        tiny_clip().encode_text(torch.tensor([[1, END_OF_TEXT], [1, 2]]))


def test_a_text_without_an_end_is_refused_on_the_plain_paths_too():
    """Where every token comes back there is no end to read, so none is needed."""
    model, tokens = tiny_clip(), torch.tensor([[1, END_OF_TEXT], [1, 2]])
    model.text.transformer.register_forward_hook(lambda *_: None)
    for encode in (model.encode_text, model.text):
        with pytest.raises(ValueError, match=r"row 1 .*no end-of-text token"):
            encode(tokens)
    assert model.text(tokens, all_tokens=True).shape[:2] == (2, 2)


@torch.no_grad()
def test_a_tower_that_is_missing_says_so():
    with pytest.raises(ValueError, match="has no text tower"):
        miniclip.CLIP(tiny_config(towers="image")).encode_text(texts([3, 9]))


def test_the_gradient_of_a_shared_prefix_is_summed_in_full_precision_under_autocast():
    tokens = texts([10] * 512)
    tokens[:, :8] = tokens[0, :8]
    exact = gradients(model := tiny_clip().double(), rectangular(model, tokens))

    def error(encode: Callable[[CLIP], Tensor]) -> float:
        model = tiny_clip()
        with torch.autocast("cpu", torch.bfloat16):
            features = encode(model)
        found = gradients(model, features)
        return max(float((found[name] - each).norm() / each.norm()) for name, each in exact.items())

    packed, padded = error(lambda model: model.encode_text(tokens)), error(lambda model: rectangular(model, tokens))
    assert 0 < packed < 1.5 * padded


@pytest.mark.parametrize(
    "change",
    [
        lambda tokens: tokens.int(),
        lambda tokens: tokens.T.contiguous().T,
        lambda tokens: torch.stack([tokens, tokens], dim=2)[:, :, 0],
    ],
    ids=["int32", "by columns", "strided"],
)
@torch.no_grad()
def test_tokens_may_have_any_type_and_strides(change):
    model, tokens = tiny_clip(), texts(LENGTHS, FEW)
    assert torch.equal(model.encode_text(change(tokens)), model.encode_text(tokens))


def test_features_of_packed_texts_can_be_differentiated_by_functions():
    model, tokens = tiny_clip(), texts(LENGTHS, FEW)
    gradient = torch.func.grad(lambda factor: (model.encode_text(tokens) * factor).sum())(torch.tensor(2.0))
    torch.testing.assert_close(gradient, model.encode_text(tokens).sum())
