"""The sigmoid loss and the models that are trained with it.

Oracles: open_clip's SigLipLoss, numbers worked out by hand, the whole matrix written out, and open_clip's logits.
"""

import json
import math
import re

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conversions import assert_same_bits, refused, target
from helpers import LargestTensor, tiny_clip, tiny_config
from open_clip.loss import SigLipLoss
from runs import arguments, fails, metrics, state

import miniclip
from miniclip.commands import train as trainer
from miniclip.commands.main import main
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.loss import siglip_chance, siglip_loss
from miniclip.model import CLIP
from miniclip.training.step import CLIPTraining
from miniclip.weights.convert import convert
from miniclip.weights.load import load, save
from miniclip.weights.read import read_checkpoint

B, E = 7, 5
CHUNKS = [1, 3, B - 1, B, B + 5]
SIGLIP = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
STOP = {"class_path": "test_training.StopAt", "init_args": {"step": 7}}
FLAGS = ["--model.loss=siglip", "--model.clip.init_logit_bias=-10", f"--model.clip.init_logit_scale={math.log(10)}"]


def random_features(number=B, width=E, seed=0, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, number, width, generator=random, dtype=torch.float64)
    return F.normalize(drawn, dim=-1).to(dtype)


def written_out(images, texts, scale, bias, groups=None, mask=None):
    """From the whole matrix; masked pairs are not there in the first place."""
    groups = torch.arange(len(images)) if groups is None else groups
    if mask is not None:
        images, texts, groups = images[mask], texts[mask], groups[mask]
    z = 2 * (groups[:, None] == groups).to(images.dtype) - 1
    return -F.logsigmoid(z * (scale * images @ texts.T + bias)).sum() / len(images)


def value_and_gradients(loss, images, texts, scale=11.0, bias=-4.0, **options):
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (scale, bias)]
    inputs = [x.detach().clone().requires_grad_() for x in (images, texts, *numbers)]
    value = loss(*inputs, **options)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def assert_all_close(actual, expected, tolerance=1e-12):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# ---- values


def test_a_loss_worked_out_by_hand():
    images, texts = torch.eye(2, dtype=torch.float64), torch.tensor([[1, 0], [3, 1]], dtype=torch.float64)
    scale, bias = math.log(2), -math.log(2)  # logits / ln 2: [[0, 2], [-1, 0]]
    fits = (1 / 2) * (1 / 2)  # odds of 1 and 1
    fits_not = (1 / (1 + 4)) * (1 / (1 + 1 / 2))  # odds of 4 and 1/2, that it does not
    assert siglip_loss(images, texts, scale, bias).item() == pytest.approx(-math.log(fits * fits_not) / 2, rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 10])
def test_orthonormal_features_cost_what_one_works_out_by_hand(size):
    unit = torch.eye(size, dtype=torch.float64)
    expected = math.log1p(math.exp(-(7 - 2))) + (size - 1) * math.log1p(math.exp(-2))
    assert siglip_loss(unit, unit, 7.0, -2.0).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("scale, bias", [(10, -10), (1, 0.5), (117.3, -12.9)])
@pytest.mark.parametrize("size", [1, 2, 5, 33])
def test_value_and_gradients_equal_open_clip(size, scale, bias, chunk_size):
    images, texts = random_features(size, 16, seed=size)
    ours = value_and_gradients(siglip_loss, images, texts, scale, bias, chunk_size=chunk_size)
    assert_all_close(ours, value_and_gradients(SigLipLoss(), images, texts, scale, bias))


@pytest.mark.parametrize("bias", [-1e4, -60.0, 60.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_far_from_zero_neither_overflow_nor_vanish(dtype, bias):
    images, texts = random_features(dtype=dtype)
    found = value_and_gradients(siglip_loss, images, texts, 50.0, bias)
    expected = value_and_gradients(written_out, images.double(), texts.double(), 50.0, bias)
    assert_all_close([x.double() for x in found], expected, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("options", [{}, {"groups": [4, 1, 4, 4]}, {"mask": [True, False, True, True]}])
def test_gradients_pass_torchs_check(chunk_size, options):
    images, texts = random_features(4, 3)
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (3.0, -1.0)]
    inputs = [x.clone().requires_grad_() for x in (images, texts, *numbers)]
    options = {name: torch.tensor(value) for name, value in options.items()}
    assert torch.autograd.gradcheck(lambda *x: siglip_loss(*x, chunk_size=chunk_size, **options), inputs)


def test_without_gradients_the_value_is_the_same():
    images, texts = random_features()
    with torch.no_grad():
        value = siglip_loss(images, texts, 9.0, -3.0, chunk_size=3)
    torch.testing.assert_close(value, written_out(images, texts, 9.0, -3.0), rtol=1e-12, atol=0)


def test_gradients_of_twice_the_loss_are_twice_as_large_and_can_be_taken_again():
    images, texts = (x.clone().requires_grad_() for x in random_features())
    loss = siglip_loss(images, texts, 9.0, -3.0)
    once = torch.autograd.grad(loss, (images, texts), retain_graph=True)
    assert_all_close(torch.autograd.grad(2 * loss, (images, texts)), [2 * gradient for gradient in once])


# ---- chunks, masks, groups

MASKS = [None, [1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0, 0], [1] * B]


@pytest.mark.parametrize("groups", [None, [3, 5, 3, -2, 5, 3, 9]], ids=["pairs", "groups"])
@pytest.mark.parametrize("kept", MASKS)
@pytest.mark.parametrize("chunk_size", [None, *CHUNKS])
def test_slices_masks_and_groups_equal_the_matrix_of_what_is_left(chunk_size, kept, groups):
    images, texts = random_features(seed=5)
    mask = None if kept is None else torch.tensor(kept, dtype=torch.bool)
    groups = None if groups is None else torch.tensor(groups)
    options = {"mask": mask, "groups": groups}
    found = value_and_gradients(siglip_loss, images, texts, chunk_size=chunk_size, **options)
    assert_all_close(found, value_and_gradients(written_out, images, texts, **options))
    if mask is not None:
        assert all(gradient[~mask].eq(0).all() for gradient in found[1:3])


def test_a_group_worked_out_by_hand():
    features = torch.eye(3, dtype=torch.float64)[[0, 0, 1]]
    groups = torch.tensor([7, 7, 8])
    # Logits are 4 for what is alike, -1 for the rest: 5 that fit, and 4 that do not.
    expected = (5 * math.log1p(math.exp(-4)) + 4 * math.log1p(math.exp(-1))) / 3
    assert siglip_loss(features, features, 5.0, -1.0, groups=groups).item() == pytest.approx(expected, rel=1e-12)


def test_slices_hold_no_more_than_their_share_of_the_logits():
    features = [x.requires_grad_() for x in random_features(256, 8)]
    options = {"groups": torch.arange(256) // 2, "mask": torch.arange(256) > 3}
    with LargestTensor() as largest:
        siglip_loss(*features, 10.0, -10.0, chunk_size=16, **options).backward()
    assert largest.numel == 16 * 256


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_features_of_less_precision_lose_no_more_in_the_loss(dtype, autocast):
    images, texts = random_features(32, 16, seed=7, dtype=dtype)
    exact = value_and_gradients(written_out, images.double(), texts.double(), 20.0, -10.0)

    def loss_under_autocast(*inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return siglip_loss(*inputs, chunk_size=10)

    value, *gradients = value_and_gradients(loss_under_autocast, images, texts, 20.0, -10.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact[0].item(), rel=1e-5)
    spacing = torch.finfo(dtype).eps  # gradients are rounded to the type of the features, once
    for gradient, expected in zip(gradients, exact[1:], strict=True):
        assert (gradient - expected).abs().max() <= (spacing + 1e-5) * expected.abs().max()


# ---- chance


@pytest.mark.parametrize("groups", [None, [0, 0, 0, 1, 1, 2, 3], [1] * 6 + [2]])
def test_chance_is_the_least_that_equal_logits_can_reach(groups):
    groups = None if groups is None else torch.tensor(groups)
    alike = torch.eye(1, E, dtype=torch.float64).expand(B, E)
    losses = [siglip_loss(alike, alike, 0.0, bias / 100, groups=groups).item() for bias in range(-400, 400)]
    chance = siglip_chance(B, groups)
    assert chance <= min(losses) + 1e-12
    assert min(losses) == pytest.approx(chance, abs=1e-4)


def test_chance_is_about_the_logarithm_of_the_batch_and_one():
    assert siglip_chance(65536) == pytest.approx(math.log(65536) + 1, abs=1e-4)
    assert siglip_chance(2) == pytest.approx(2 * math.log(2))
    assert siglip_chance(1) == 0
    assert siglip_chance(3, torch.tensor([5, 5, 5])) == 0


# ---- errors


@pytest.mark.parametrize(
    "options, said",
    [
        ({"text_features": torch.zeros(3, 4)}, r"image features \(7, 5\) and text features \(3, 4\)"),
        ({"chunk_size": 0}, "chunk_size is 0;"),
        ({"mask": torch.zeros(B, dtype=torch.bool)}, r"mask of shape \(7,\) keeps 0 pairs"),
        ({"groups": torch.arange(3)}, r"groups of shape \(3,\)"),
        ({"logit_bias": None}, "logit_bias is None; .* init_logit_bias"),
    ],
)
def test_what_cannot_be_contrasted_is_refused_in_words(options, said):
    images, texts = random_features()
    given = {"image_features": images, "text_features": texts, "logit_scale": 1.0, "logit_bias": 0.0, **options}
    with pytest.raises(ValueError, match=said):
        siglip_loss(**given)


# ---- the model and its configuration


def test_a_bias_is_there_where_the_configuration_says_so_and_is_added_to_the_logits():
    plain, biased = tiny_clip(), tiny_clip(**SIGLIP)
    assert plain.logit_bias is None
    assert "logit_bias" not in plain.state_dict()
    assert biased.logit_bias.item() == -10
    assert biased.logit_scale.item() == pytest.approx(math.log(10))
    images, tokens = torch.randn(2, 3, 16, 16), miniclip.tokenize(["a", "b", "c"], context_length=16)
    with torch.no_grad():
        per_image, per_text = biased(images, tokens)
        cosines = biased.encode_image(images, normalize=True) @ biased.encode_text(tokens, normalize=True).T
    torch.testing.assert_close(per_image, 10 * cosines - 10)
    assert torch.equal(per_text, per_image.T)


def test_a_configuration_from_before_there_was_a_bias_is_read():
    values = tiny_config().to_dict()
    del values["init_logit_scale"], values["init_logit_bias"]
    assert CLIPConfig.from_json(json.dumps(values)) == tiny_config()
    assert tiny_config().init_logit_scale == pytest.approx(math.log(1 / 0.07))


def test_whole_numbers_are_read_as_the_floats_that_they_are():
    config = CLIPConfig.from_json('{"init_logit_scale": 2, "init_logit_bias": -10}')
    assert config == CLIPConfig(init_logit_scale=2.0, init_logit_bias=-10.0)
    assert CLIPConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("name", ["init_logit_scale", "init_logit_bias"])
@pytest.mark.parametrize("value", ["x", [1], True, math.inf, math.nan])
def test_what_is_no_number_is_refused_naming_field_and_value(name, value):
    with pytest.raises(
        ValueError, match=rf"CLIPConfig\.{name} is {re.escape(repr(value))}; it must be a finite number"
    ):
        CLIPConfig(**{name: value})


def test_a_scale_in_place_of_its_logarithm_is_refused():
    with pytest.raises(ValueError, match=r"init_logit_scale is 10; it must be the logarithm .* itself, store 2\.30259"):
        CLIPConfig(init_logit_scale=10)


# ---- formats

# Heads of 64 channels and an end token that is the largest id, so that every layout but for the bias could hold it.
VISION = VisionConfig(image_size=24, patch_size=8, width=128, layers=2)
TEXT = TextConfig(context_length=16, vocab_size=60, eot_token=59, width=128, layers=2)


def biased_model(**changes):
    torch.manual_seed(3)
    model = CLIP(CLIPConfig(24, "quick_gelu", VISION, TEXT, **{**SIGLIP, **changes})).eval()
    with torch.no_grad():
        model.logit_scale.fill_(3.21)
        model.logit_bias.fill_(-7.65)
    return model


def probe():
    tokens = torch.zeros(3, 16, dtype=torch.long)
    tokens[0, :3], tokens[1, :9] = torch.tensor([7, 8, 59]), torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 59])
    tokens[2, 0] = 59
    return torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)), tokens


def test_our_own_directory_keeps_the_bias(tmp_path):
    model = biased_model()
    save(model, tmp_path / "model")
    found, _ = load(tmp_path / "model", device="cpu")
    assert found.config == model.config
    assert_same_bits(found.state_dict(), model.state_dict())


def test_openclips_layout_keeps_the_bias_and_its_logits_are_ours(tmp_path):
    model = biased_model()
    save(model, tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "openclip", "openclip")
    settings = json.loads((tmp_path / "openclip/open_clip_config.json").read_text())["model_cfg"]
    assert {name: settings[name] for name in SIGLIP} == SIGLIP
    theirs, *_ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'openclip'}")
    theirs.eval()
    with torch.no_grad():
        for ours, other in zip(model(*probe()), theirs.get_logits(*probe()), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
    convert(tmp_path / "openclip", tmp_path / "back", "native")
    checkpoint = read_checkpoint(tmp_path / "back")
    assert checkpoint.config == model.config
    assert_same_bits(checkpoint.tensors, dict(model.state_dict()))


def test_openclips_own_folder_with_a_bias_gives_its_logits(tmp_path):
    vision = {"image_size": 24, "patch_size": 8, "width": 128, "head_width": 64, "layers": 2}
    text = {"context_length": 16, "vocab_size": 60, "width": 128, "heads": 2, "layers": 2}
    settings = {"embed_dim": 24, "init_logit_bias": -10, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(1)
    theirs = open_clip.CLIP(**settings).eval()
    with torch.no_grad():
        theirs.logit_bias.fill_(-4.3)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/open_clip_config.json").write_text(json.dumps({"model_cfg": settings}))
    torch.save(theirs.state_dict(), tmp_path / "model/open_clip_pytorch_model.bin")
    torch.save(theirs.state_dict(), tmp_path / "bare.pt")
    for path, options in ((tmp_path / "model", {}), (tmp_path / "bare.pt", {"activation": "gelu", "head_width": 64})):
        ours, _ = load(path, device="cpu", **options)
        assert ours.config.init_logit_bias == -10
        with torch.no_grad():
            torch.testing.assert_close(ours(*probe())[0], theirs.get_logits(*probe())[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", ["openai", "hf"])
def test_a_bias_is_refused_for_layouts_that_have_no_place_for_it(tmp_path, to):
    save(biased_model(), tmp_path / "model")
    refused(tmp_path / "model", target(tmp_path, to), to, "has no bias", "sigmoid loss")


def test_a_bias_too_many_or_too_few_is_named(tmp_path):
    save(tiny_clip(), tmp_path / "model")
    (tmp_path / "model/config.json").write_text(tiny_config(**SIGLIP).to_json())
    with pytest.raises(ValueError, match=r"logit_bias: the architecture has \(\), the file no such tensor"):
        load(tmp_path / "model", device="cpu")
    save(tiny_clip(**SIGLIP), tmp_path / "model", overwrite=True)
    (tmp_path / "model/config.json").write_text(tiny_config().to_json())
    with pytest.raises(ValueError, match=r"logit_bias: the architecture has no such tensor, the file \(\)"):
        load(tmp_path / "model", device="cpu")


def test_info_tells_the_loss_that_a_model_was_made_for(tmp_path, capsys):
    for number, (model, loss) in enumerate([(tiny_clip(), "softmax (CLIP)"), (biased_model(), "sigmoid (SigLIP)")]):
        save(model, tmp_path / str(number))
        main(["info", str(tmp_path / str(number))])
        assert re.search(rf"^ +loss  {re.escape(loss)}", capsys.readouterr().out, re.MULTILINE)


# ---- training


@pytest.mark.long
def test_a_run_with_the_sigmoid_loss_learns_resumes_and_scores(data, tmp_path):
    # From -10 a batch of 12 first brings everything together, to get its pairs above 0; -ln 12 is where they are rare.
    flags = [*FLAGS, "--model.clip.init_logit_bias=-2.5", "--model.positives=caption"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    trainer.main(arguments(data, straight, *flags, steps=60))
    rows = [row for row in metrics(straight) if row["train/loss"]]
    assert float(rows[0]["train/logit_bias"]) == -2.5
    assert float(rows[0]["train/logit_scale"]) == pytest.approx(10)
    for row in rows:  # a batch of 12 where some captions repeat
        assert float(row["train/chance"]) >= siglip_chance(12) - 1e-6
    last = rows[-5:]
    losses, chances = (sum(float(row[f"train/{name}"]) for row in last) for name in ("loss", "chance"))
    assert losses < 0.75 * chances
    assert sum(float(row["train/accuracy"]) for row in last) > 5 * 2 / 12
    model, _ = miniclip.load(straight / "best", device="cpu")
    assert model.config.init_logit_bias == -2.5
    assert model.logit_bias.item() != -2.5

    with pytest.raises(SystemExit):
        trainer.main(arguments(data, broken, *flags, f"--trainer.callbacks={json.dumps([STOP])}", steps=60))
    assert torch.load(broken / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 7
    trainer.main(arguments(data, broken, *flags, "--ckpt_path=last", steps=60))
    assert_same_bits(state(broken), state(straight))


def test_validation_has_the_same_loss(data, tmp_path):
    trainer.main(arguments(data, tmp_path / "run", *FLAGS, steps=3))
    (found,) = [float(row["val/loss"]) for row in metrics(tmp_path / "run") if row["val/loss"]]
    model, preprocess = miniclip.load(tmp_path / "run/checkpoints/last.ckpt", device="cpu")
    from PIL import Image

    pictures = sorted((data / "val").glob("*.png"))
    texts = [path.with_suffix(".txt").read_text().splitlines()[0] for path in pictures]
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(Image.open(path)) for path in pictures]), normalize=True)
        words = model.encode_text(miniclip.tokenize(texts, context_length=16), normalize=True)
        expected = written_out(images.double(), words.double(), model.logit_scale.exp(), model.logit_bias)
    assert found == pytest.approx(expected.item(), rel=1e-3)  # resized by other code


def test_a_loss_and_a_bias_that_do_not_belong_together_are_refused(data, tmp_path, capsys):
    said = fails(capsys, arguments(data, tmp_path / "run", "--model.loss=siglip"))
    assert "set model.clip.init_logit_bias and init_logit_scale; the paper's are -10 and 2.3026" in said
    said = fails(capsys, arguments(data, tmp_path / "run", *FLAGS[1:]))
    assert "leave it out, or set model.loss=siglip" in said
    assert not (tmp_path / "run/checkpoints").exists()
    with pytest.raises(ValueError, match=r"model\.loss is 'sigmoid'; valid are clip, siglip"):
        CLIPTraining(tiny_config(), loss="sigmoid")
    save(tiny_clip(), tmp_path / "start")
    for given in ({}, {"clip": tiny_config(init_logit_bias=-10.0)}):  # what it lacks can't be given it
        with pytest.raises(
            ValueError, match=r"which needs a bias, and the model of model\.start_from .*start' has none"
        ):
            CLIPTraining(**given, start_from=str(tmp_path / "start"), loss="siglip")


def test_the_scale_of_the_sigmoid_loss_is_not_bounded(data, tmp_path):
    trainer.main(arguments(data, tmp_path / "run", *FLAGS, "--model.clip.init_logit_scale=7", steps=1))
    assert float(state(tmp_path / "run")["clip.logit_scale"]) > 6.5  # the other loss's bound is ln 100 = 4.6
