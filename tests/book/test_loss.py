# Oracles: fractions worked out by hand, open_clip's ClipLoss, and torch's cross-entropy.

import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import LargestTensor
from open_clip.loss import ClipLoss

from miniclip.common.processes import gather
from miniclip.loss import clip_loss, siglip_loss

B, E = 7, 5
CHUNKS = [1, 3, B - 1, B, B + 5]


def random_features(number=B, width=E, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, number, width, generator=random, dtype=torch.float64)
    return F.normalize(drawn, dim=-1).to(dtype)


def with_logits(logits):
    """Features whose products are exactly these, images x texts."""
    logits = torch.tensor(logits, dtype=torch.float64)
    return torch.eye(len(logits), dtype=torch.float64), logits.T.contiguous()


def figure_3(images, texts, scale):
    """The paper's pseudocode."""
    logits = scale * images @ texts.T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def value_and_gradients(loss, images, texts, scale=11.0, **options):
    inputs = [x.detach().clone().requires_grad_() for x in (images, texts, torch.tensor(scale, dtype=torch.float64))]
    value = loss(*inputs, **options)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def assert_all_close(actual, expected, tolerance=1e-12):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# ---- values


@pytest.mark.parametrize("size", [1, 2, 3, 10])
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, 100.0])
def test_matching_orthonormal_features_cost_what_one_works_out_by_hand(size, scale):
    unit = torch.eye(size, dtype=torch.float64)
    expected = math.log(1 + (size - 1) * math.exp(-scale))
    assert clip_loss(unit, unit, scale).item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("size", [2, 3, 10])
def test_two_identical_texts_cost_a_coin_toss_whatever_the_scale(size):
    images = torch.eye(size, dtype=torch.float64)[[0, 0]]
    assert clip_loss(images, images, 30.0).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "odds, product",
    [
        # rows pick their column with 2/5 and 5/6, columns their row with 2/3 and 5/8
        ([[2, 3], [1, 5]], (2 / 5) * (5 / 6) * (2 / 3) * (5 / 8)),
        # rows with 1/2 each, columns with 1/3, 2/3 and 8/15
        ([[4, 1, 3], [2, 6, 4], [6, 2, 8]], (1 / 2) ** 3 * (1 / 3) * (2 / 3) * (8 / 15)),
    ],
)
def test_both_directions_count_equally(odds, product):
    images, texts = with_logits(np.log(odds))
    expected = -math.log(product) / (2 * len(odds))
    assert clip_loss(images, texts, 1.0).item() == pytest.approx(expected, rel=1e-12)
    assert clip_loss(texts, images, 1.0).item() == pytest.approx(expected, rel=1e-12)


def test_an_asymmetric_example_equals_numpy():
    random = np.random.default_rng(0)
    images, texts = random.normal(size=(2, 6, 4))
    logits = 3.7 * images @ texts.T
    rows = -np.log(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).diagonal().mean()
    columns = -np.log(np.exp(logits) / np.exp(logits).sum(axis=0, keepdims=True)).diagonal().mean()
    assert abs(rows - columns) > 0.1  # else a direction left out would go unseen
    loss = clip_loss(torch.from_numpy(images), torch.from_numpy(texts), 3.7)
    assert loss.item() == pytest.approx((rows + columns) / 2, rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 5, 33])
@pytest.mark.parametrize("scale", [1, 14.3, 100])
def test_value_and_gradients_equal_open_clip_and_cross_entropy(size, scale):
    images, texts = random_features(size, 16, seed=size)
    ours = value_and_gradients(clip_loss, images, texts, scale)
    assert_all_close(ours, value_and_gradients(ClipLoss(), images, texts, scale))
    assert_all_close(ours, value_and_gradients(figure_3, images, texts, scale))


@pytest.mark.parametrize("size", [2, 5, 100])
def test_without_any_contrast_the_loss_is_chance(size):
    images, texts = random_features(size)
    assert clip_loss(images, texts, 0.0).item() == pytest.approx(math.log(size), rel=1e-12)
    assert clip_loss(images, texts, 1e-9).item() == pytest.approx(math.log(size), rel=1e-8)


def test_the_scale_may_be_a_number_or_a_tensor():
    images, texts = random_features()
    assert clip_loss(images, texts, 14.3) == clip_loss(images, texts, torch.tensor(14.3, dtype=torch.float64))


def test_the_loss_is_a_scalar():
    assert clip_loss(*random_features(), 10.0).shape == ()


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradients_pass_torchs_check(chunk_size):
    images, texts = random_features(4, 3)
    mask = torch.tensor([True, False, True, True])
    scale = torch.tensor(3.0, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for x in (images, texts, scale)]
    assert torch.autograd.gradcheck(lambda *x: clip_loss(*x, chunk_size=chunk_size), inputs)
    assert torch.autograd.gradcheck(lambda *x: clip_loss(*x, chunk_size=chunk_size, mask=mask), inputs)


# ---- chunks


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_chunks_change_neither_value_nor_gradients(chunk_size):
    images, texts = random_features()
    whole = value_and_gradients(clip_loss, images, texts)
    assert_all_close(value_and_gradients(clip_loss, images, texts, chunk_size=chunk_size), whole)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_chunks_of_asymmetric_logits_change_nothing_either(chunk_size):
    images, texts = with_logits(torch.randn(B, B, generator=torch.Generator().manual_seed(3)).tolist())
    whole = value_and_gradients(figure_3, images, texts)
    assert_all_close(value_and_gradients(clip_loss, images, texts, chunk_size=chunk_size), whole)


# ---- mask

MASKS = {
    "one pair out": [1, 1, 0, 1, 1, 1, 1],
    "the ends out": [0, 1, 1, 1, 1, 1, 0],
    "the first chunk of three out": [0, 0, 0, 1, 1, 1, 1],
    "the middle chunk of three out": [1, 1, 1, 0, 0, 0, 1],
    "one pair left": [0, 0, 0, 0, 1, 0, 0],
    "all left": [1] * B,
}


@pytest.mark.parametrize("chunk_size", [None, *CHUNKS])
@pytest.mark.parametrize("kept", MASKS.values(), ids=MASKS)
def test_masked_pairs_are_as_good_as_absent(kept, chunk_size):
    images, texts = random_features(seed=5)
    mask = torch.tensor(kept, dtype=torch.bool)
    value, image_gradient, text_gradient, scale_gradient = value_and_gradients(
        clip_loss, images, texts, mask=mask, chunk_size=chunk_size
    )
    expected = value_and_gradients(figure_3, images[mask], texts[mask])
    assert_all_close([value, image_gradient[mask], text_gradient[mask], scale_gradient], expected)
    assert image_gradient[~mask].eq(0).all()
    assert text_gradient[~mask].eq(0).all()


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_rows_of_zeros_give_no_nan(chunk_size, dtype):
    images, texts = random_features(seed=6).clone().to(dtype)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1], dtype=torch.bool)
    images[~mask] = texts[~mask] = 0
    expected = value_and_gradients(figure_3, images[mask].double(), texts[mask].double(), 100.0)
    actual = value_and_gradients(clip_loss, images, texts, 100.0, mask=mask, chunk_size=chunk_size)
    assert all(tensor.isfinite().all() for tensor in actual)
    kept = [actual[0], actual[1][mask], actual[2][mask], actual[3]]
    assert_all_close(
        [tensor.double() for tensor in kept], expected, tolerance=1e-5 if dtype == torch.float32 else 1e-12
    )
    assert actual[1][~mask].eq(0).all()


def test_a_masked_loss_worked_out_by_hand():
    images, texts = with_logits(np.log([[4, 1, 3], [2, 6, 4], [6, 2, 8]]))
    mask = torch.tensor([True, False, True])  # leaves [[4, 3], [6, 8]]
    expected = -math.log((4 / 7) * (8 / 14) * (4 / 10) * (8 / 11)) / 4
    assert clip_loss(images, texts, 1.0, mask=mask).item() == pytest.approx(expected, rel=1e-12)


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk_size", [None, 10])
@pytest.mark.parametrize("autocast", [False, True])
def test_features_of_less_precision_lose_no_more_in_the_loss(dtype, chunk_size, autocast):
    images, texts = random_features(32, 16, seed=7, dtype=dtype)
    texts = (0.3 * images + 0.7 * texts).to(dtype)  # as after some training, neither chance nor nothing
    exact = value_and_gradients(figure_3, images.double(), texts.double(), 20.0)
    assert 0.5 < exact[0] < math.log(32) - 0.5

    def loss_under_autocast(*features):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return clip_loss(*features, chunk_size=chunk_size)

    value, *gradients = value_and_gradients(loss_under_autocast, images, texts, 20.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact[0].item(), rel=1e-5)
    spacing = torch.finfo(dtype).eps  # gradients are rounded to the type of the features, once
    for gradient, expected in zip(gradients, exact[1:], strict=True):
        assert (gradient - expected).abs().max() <= (spacing + 1e-5) * expected.abs().max()


def test_double_precision_stays_double():
    assert clip_loss(*random_features(), 10.0).dtype == torch.float64


def test_the_highest_scale_of_training_does_not_overflow():
    images, texts = random_features(dtype=torch.float32)
    value, *gradients = value_and_gradients(clip_loss, images, -images, 100.0)
    assert value.item() == pytest.approx(figure_3(images.double(), -images.double(), 100.0).item(), rel=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert torch.isfinite(clip_loss(images, texts, 1e6))


# ---- errors


@pytest.mark.parametrize(
    "image_shape, text_shape",
    [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((4,), (4,)), ((2, 3, 4), (2, 3, 4)), ((0, 4), (0, 4))],
)
def test_features_that_do_not_pair_up_are_refused_naming_both_shapes(image_shape, text_shape):
    with pytest.raises(ValueError, match="same shape") as caught:
        clip_loss(torch.zeros(image_shape), torch.zeros(text_shape), 1.0)
    assert f"image features {image_shape} and text features {text_shape}" in str(caught.value)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_a_chunk_size_below_one_is_refused_by_value(chunk_size):
    with pytest.raises(ValueError, match=rf"chunk_size is {chunk_size};"):
        clip_loss(*random_features(), 1.0, chunk_size=chunk_size)


def test_a_mask_that_leaves_no_pair_is_refused():
    with pytest.raises(ValueError, match="mask"):
        clip_loss(*random_features(), 1.0, mask=torch.zeros(B, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(1,), (B + 1,), (B, B), ()])
def test_a_mask_of_another_length_is_refused_naming_its_shape(shape):
    with pytest.raises(ValueError, match="mask") as caught:
        clip_loss(*random_features(), 1.0, mask=torch.ones(shape, dtype=torch.bool))
    assert str(shape) in str(caught.value)


def test_gathering_in_a_single_process_gives_the_features_themselves():
    images, _ = random_features()
    assert gather(images) is images


# ---- pairs that belong together


def shared_targets(images, texts, scale, groups, mask=None):
    """Cross-entropy with targets that are shared evenly in a group, from the whole matrix."""
    if mask is not None:
        images, texts, groups = images[mask], texts[mask], groups[mask]
    logits = scale * images @ texts.T
    targets = (groups[:, None] == groups).to(logits.dtype)
    targets = targets / targets.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@pytest.mark.parametrize("chunk_size", [None, *CHUNKS])
@pytest.mark.parametrize("kept", [None, [1, 0, 1, 1, 1, 0, 1]])
def test_groups_share_their_targets(kept, chunk_size):
    images, texts = random_features()
    groups = torch.tensor([3, 5, 3, -2, 5, 3, 9])
    mask = None if kept is None else torch.tensor(kept, dtype=torch.bool)
    found = value_and_gradients(clip_loss, images, texts, chunk_size=chunk_size, groups=groups, mask=mask)
    assert_all_close(found, value_and_gradients(shared_targets, images, texts, groups=groups, mask=mask))


def test_every_pair_in_a_group_of_its_own_is_the_plain_loss():
    images, texts = random_features()
    found = value_and_gradients(clip_loss, images, texts, groups=torch.arange(B))
    assert_all_close(found, value_and_gradients(figure_3, images, texts))


def test_with_equal_captions_in_a_group_the_least_loss_is_the_targets_entropy():
    features = torch.eye(4, dtype=torch.float64)[[0, 0, 1, 2]]  # the first two pairs are alike in image and text
    groups = torch.tensor([7, 7, 8, 9])
    assert clip_loss(features, features, 1e4, groups=groups).item() == pytest.approx(math.log(2) / 2)


EQUAL = torch.tensor([0, 0, 1, 2, 3, 3, 3])  # B pairs, of which two and three have the same caption


def with_equal_texts(loss, groups=EQUAL, swap=False):
    """Value and gradients by images, different texts and scale; swapped, the images are the equal ones."""

    def of_different(images, texts, scale, **options):
        features = images, texts[EQUAL]
        return loss(*(reversed(features) if swap else features), scale, **options)

    images, texts = random_features()
    options = {} if groups is None else {"groups": groups}
    return value_and_gradients(of_different, images, texts[: EQUAL.max() + 1], **options)


@pytest.mark.parametrize("swap", [False, True], ids=["texts", "images"])
def test_the_softmax_loss_of_equal_captions_is_the_same_with_and_without_groups(swap):
    assert_all_close(with_equal_texts(clip_loss, swap=swap), with_equal_texts(clip_loss, groups=None, swap=swap))


def test_equal_captions_worked_out_by_hand_with_and_without_groups():
    # Texts 0 and 1 are equal. Rows give their own text 2/5, 3/8 and 3/5, columns their own image 1/2, 3/8 and 3/7.
    images, texts = with_logits(np.log([[4, 4, 2], [3, 3, 2], [1, 1, 3]]))
    expected = -math.log((2 / 5) * (3 / 8) * (3 / 5) * (1 / 2) * (3 / 8) * (3 / 7)) / 6
    assert clip_loss(images, texts, 1.0).item() == pytest.approx(expected, rel=1e-12)
    groups = torch.tensor([0, 0, 1])
    assert clip_loss(images, texts, 1.0, groups=groups).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "case",
    [
        partial(with_equal_texts, partial(siglip_loss, logit_bias=-3.0)),  # equal captions under the sigmoid loss
        lambda **options: value_and_gradients(clip_loss, *random_features(), **({"groups": EQUAL} | options)),
    ],
    ids=["sigmoid loss", "captions that differ"],
)
def test_groups_change_value_and_gradients_otherwise(case):
    for shared, plain in zip(case(), case(groups=None), strict=True):
        assert (shared - plain).abs().max() > 1e-3


def test_groups_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"groups of shape \(3,\); it must be \(B,\)"):
        clip_loss(*random_features(), 1.0, groups=torch.arange(3))


def test_slices_hold_no_more_than_their_share_of_the_logits():
    """Peak memory of the backward pass counts tensors of the whole (B, B) kind: none may be made."""
    features = [x.requires_grad_() for x in random_features(256, 8)]
    with LargestTensor() as largest:
        clip_loss(*features, 10.0, chunk_size=16).backward()
    assert largest.numel == 16 * 256


# ---- compiled


@pytest.mark.sample(1)
@pytest.mark.parametrize("loss", [clip_loss, partial(siglip_loss, logit_bias=-3.0)], ids=["clip", "siglip"])
def test_a_compiled_loss_is_one_graph_with_the_same_value_and_gradients(loss):
    options = {"chunk_size": 3, "mask": torch.arange(B) != 2, "groups": torch.arange(B) // 2}
    expected = value_and_gradients(loss, *random_features(), **options)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_all_close(value_and_gradients(compiled, *random_features(), **options), expected, tolerance=1e-14)
