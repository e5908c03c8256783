# Oracles: open_clip (OpenAI's architecture), transformers' CLIPModel and torch's nn.MultiheadAttention, all with random
# weights: every parameter is drawn anew, so that no bias is 0 and no gain is 1.

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from random_weights import randomise
from torch import nn

from miniclip.config import OPENAI_MODELS, CLIPConfig, TextConfig, VisionConfig
from miniclip.fast.packed_texts import trim_text
from miniclip.model import CLIP, MLP, Attention, TextTransformer, VisionTransformer
from miniclip.tokenizer import tokenize
from miniclip.weights.layouts import from_openai_keys

EOT = 40
TINY = CLIPConfig(
    embed_dim=8,
    activation="gelu",
    vision=VisionConfig(image_size=24, patch_size=8, width=24, layers=3, head_width=8),
    text=TextConfig(context_length=77, vocab_size=50, eot_token=EOT, width=16, layers=3, head_width=8),
)


def tiny(seed=0, config=TINY):
    return randomise(CLIP(config).double(), seed).eval()


def open_clip_twin(config, seed):
    """open_clip's model of the same architecture with random weights, and ours with the same."""
    v, t = config.vision, config.text
    vision = open_clip.model.CLIPVisionCfg(v.layers, v.width, v.head_width, v.mlp_ratio, v.patch_size, v.image_size)
    text = open_clip.model.CLIPTextCfg(t.context_length, t.vocab_size, width=t.width, heads=t.heads, layers=t.layers)
    quick = config.activation == "quick_gelu"
    theirs = open_clip.model.CLIP(config.embed_dim, vision, text, quick_gelu=quick).double()
    randomise(theirs, seed)
    ours = CLIP(config).double()
    ours.load_state_dict(from_openai_keys(theirs.state_dict()))
    return ours, theirs


def random_images(number, size, seed=0):
    return torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_tokens(lengths, columns=77, pad=0, seed=0):
    """Rows of the given lengths, the end token counted, of ids 1 to 39."""
    tokens = torch.full((len(lengths), columns), pad)
    random = torch.Generator().manual_seed(seed)
    for row, length in zip(tokens, lengths, strict=True):
        row[: length - 1] = torch.randint(1, EOT, (length - 1,), generator=random)
        row[length - 1] = EOT
    return tokens


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_equal(actual, expected, tolerance=1e-12):
    assert relative_error(actual, expected) <= tolerance


# ---- the same numbers as the peers

PROMPTS = ["a diagram", "a dog", "a photo of the number 7, handwritten in blue ink on lined paper!"]


@pytest.fixture(scope="module")
def vit_b_32():
    """Outputs of both models at full size, {dtype: {what: (ours, theirs)}}."""
    theirs = randomise(open_clip.create_model("ViT-B-32-quickgelu").eval(), seed=0)
    with torch.device("meta"):
        ours = CLIP(OPENAI_MODELS["ViT-B/32"]).eval()
    outputs = {}
    for dtype in (torch.float32, torch.float64):
        theirs = theirs.to(dtype)
        ours.load_state_dict(from_openai_keys(theirs.state_dict()), assign=True)
        images, tokens = random_images(2, 224).to(dtype), tokenize(PROMPTS)
        with torch.no_grad():
            results = [
                [m.encode_image(images), m.encode_text(tokens), *logits(images, tokens), m.logit_scale.clone()]
                for m, logits in ((ours, ours), (theirs, theirs.get_logits))
            ]
        names = ["image features", "text features", "logits per image", "logits per text", "logit scale"]
        outputs[dtype] = dict(zip(names, zip(*results, strict=True), strict=True))
    return outputs


@pytest.mark.long
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize(
    "output", ["image features", "text features", "logits per image", "logits per text", "logit scale"]
)
def test_vit_b_32_equals_open_clip(vit_b_32, output, dtype, tolerance):
    ours, theirs = vit_b_32[dtype][output]
    assert ours.dtype == theirs.dtype == dtype
    assert_equal(ours, theirs, tolerance)


@pytest.mark.long
def test_full_size_features_differ_from_input_to_input(vit_b_32):
    """Else equality with the peers would say little."""
    for output in ("image features", "text features"):
        features = F.normalize(vit_b_32[torch.float64][output][0], dim=-1)
        cosines = features @ features.T
        assert cosines.fill_diagonal_(-1).max() < 0.98


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_either_activation_equals_open_clip(activation):
    config = CLIPConfig(TINY.embed_dim, activation, TINY.vision, TextConfig(vocab_size=50, eot_token=49, width=64))
    ours, theirs = open_clip_twin(config, seed=1)
    images, tokens = random_images(3, 24), random_tokens([2, 9, 77])
    tokens[tokens == EOT] = 49  # open_clip pools at the largest id
    assert_equal(ours.encode_image(images), theirs.encode_image(images))
    assert_equal(ours.encode_text(tokens), theirs.encode_text(tokens))


def mlp_and_input():
    mlp = randomise(MLP(16, 64, "quick_gelu").double(), 0).eval()
    return mlp, torch.randn(3, 5, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def formula(mlp, x):
    hidden = F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)
    return F.linear(hidden * torch.sigmoid(1.702 * hidden), mlp.c_proj.weight, mlp.c_proj.bias)


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("with_grad", [False, True])
def test_quick_gelu_is_its_formula_whether_or_not_its_factors_go_into_the_products(is_training, with_grad):
    mlp, x = mlp_and_input()
    with torch.set_grad_enabled(with_grad):
        found = mlp.train(is_training)(x)
    torch.testing.assert_close(found.detach(), formula(mlp, x), rtol=1e-12, atol=1e-12)


def test_a_hook_on_a_layer_of_the_mlp_sees_what_it_gives():
    mlp, x = mlp_and_input()
    seen = []
    mlp.c_fc.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        mlp(x)
        torch.testing.assert_close(seen[0], F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", ["c_fc", "c_proj"])
def test_a_module_in_the_place_of_a_layer_of_the_mlp_is_called(layer):
    class Negated(nn.Linear):
        def forward(self, x):
            return -super().forward(x)

    mlp, x = mlp_and_input()
    weights = getattr(mlp, layer).state_dict()
    setattr(mlp, layer, Negated(*((16, 64) if layer == "c_fc" else (64, 16))).double())
    getattr(mlp, layer).load_state_dict(weights)
    with torch.no_grad():
        found = mlp(x)
        for tensor in getattr(mlp, layer).parameters():
            tensor.neg_()
        torch.testing.assert_close(found, formula(mlp, x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_activations_give_different_features():
    gelu, quick = (
        tiny(config=CLIPConfig(TINY.embed_dim, activation, TINY.vision, TINY.text))
        for activation in ("gelu", "quick_gelu")
    )
    images, tokens = random_images(2, 24), random_tokens([5, 9])
    assert relative_error(quick.encode_image(images), gelu.encode_image(images)) > 1e-4
    assert relative_error(quick.encode_text(tokens), gelu.encode_text(tokens)) > 1e-4


def from_hugging_face(theirs):
    """Their state dict under OpenAI's names."""
    renames = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.encoder.layers.": "transformer.resblocks.",
        "text_model.final_layer_norm.": "ln_final.",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "vision_model.encoder.layers.": "visual.transformer.resblocks.",
        "vision_model.pre_layrnorm.": "visual.ln_pre.",
        "vision_model.post_layernorm.": "visual.ln_post.",
        "text_projection.weight": "text_projection",
        "visual_projection.weight": "visual.proj",
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    ours, parts = {}, {}
    for key, tensor in theirs.items():
        name = key
        for old, new in renames.items():
            name = name.replace(old, new)
        if "_proj." in key and "self_attn.out" not in key and "self_attn" in key:
            head, _, tail = name.partition("self_attn.")
            parts.setdefault(f"{head}attn.in_proj_{tail[7:]}", {})[tail[0]] = tensor
        else:
            ours[name] = tensor.T if name in ("text_projection", "visual.proj") else tensor
    return {**ours, **{key: torch.cat([part[x] for x in "qkv"]) for key, part in parts.items()}}


@torch.no_grad()
def test_a_tiny_twin_equals_transformers():
    shared = {"num_hidden_layers": 3, "hidden_act": "quick_gelu"}
    text = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 50, **shared}
    text |= {"eos_token_id": EOT, "bos_token_id": 0, "pad_token_id": 1}
    vision = {"hidden_size": 24, "intermediate_size": 96, "num_attention_heads": 3, **shared}
    vision |= {"image_size": 24, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    theirs = randomise(transformers.CLIPModel(config).double().eval(), seed=2)
    ours = CLIP(CLIPConfig(TINY.embed_dim, "quick_gelu", TINY.vision, TINY.text)).double()
    ours.load_state_dict(from_openai_keys(from_hugging_face(theirs.state_dict())))

    images, tokens = random_images(3, 24), random_tokens([2, 9, 30])
    tokens[1, 1] = EOT + 5  # an id above the end token: the end is the first end token, not the largest id
    assert_equal(ours.encode_image(images), theirs.get_image_features(pixel_values=images).pooler_output)
    assert_equal(ours.encode_text(tokens), theirs.get_text_features(input_ids=tokens).pooler_output)
    logits = theirs(input_ids=tokens, pixel_values=images)
    assert_equal(ours(images, tokens)[0], logits.logits_per_image)
    assert_equal(ours(images, tokens)[1], logits.logits_per_text)


def contrastive_loss(images, texts, logit_scale):
    """Figure 3 of the paper."""
    logits = logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def test_the_gradient_of_every_parameter_equals_open_clip():
    ours, theirs = open_clip_twin(TINY, seed=3)
    images, tokens = random_images(4, 24), random_tokens([2, 5, 13, 77])
    for model in (ours, theirs):
        contrastive_loss(model.encode_image(images), model.encode_text(tokens), model.logit_scale).backward()
    expected = from_openai_keys({name: parameter.grad for name, parameter in theirs.named_parameters()})
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        if name.endswith("in_proj_bias"):
            (q, k, v), (their_q, their_k, their_v) = gradient.chunk(3), expected[name].chunk(3)
            assert k.abs().max() < 1e-14 > their_k.abs().max(), name  # a constant added to all keys changes nothing
            gradient, expected[name] = torch.cat([q, v]), torch.cat([their_q, their_v])
        assert expected[name].abs().max() > 1e-6, name
        assert relative_error(gradient, expected[name]) <= 1e-9, name


@pytest.mark.parametrize("is_causal", [False, True])
@torch.no_grad()
def test_attention_equals_torchs_for_all_tokens_and_for_a_pooled_one(is_causal):
    theirs = randomise(nn.MultiheadAttention(24, 3, batch_first=True).double(), seed=4)
    ours = Attention(24, 3, is_causal).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if is_causal else None
    expected, _ = theirs(x, x, x, attn_mask=hidden, need_weights=False)
    assert_equal(ours(x), expected)
    pool = torch.tensor([0, 3, 6, 1])
    assert_equal(ours(x, pool), expected[torch.arange(4), pool][:, None])


@pytest.mark.parametrize("first, second", [("q", "k"), ("k", "v"), ("q", "v")])
@torch.no_grad()
def test_swapping_queries_keys_or_values_changes_the_output(first, second):
    """Else the tests above could not see their order."""
    attention = randomise(Attention(24, 3, is_causal=True).double(), seed=4)
    x = torch.randn(2, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = attention(x)
    parts = dict(zip("qkv", attention.in_proj_weight.chunk(3), strict=True))
    parts[first], parts[second] = parts[second], parts[first]
    attention.in_proj_weight.copy_(torch.cat([parts[name] for name in "qkv"]))
    assert relative_error(attention(x), before) > 0.01


# ---- text: its length, its end, and what it can see


@pytest.mark.parametrize("pad", [0, EOT, 49])
def test_columns_after_the_end_change_neither_embedding_nor_gradient(pad):
    long, short = random_tokens([13], 77, pad), random_tokens([13], 13)
    results = []
    for tokens in (long, short):
        model = tiny()
        features = model.encode_text(tokens)
        features.square().sum().backward()
        results.append((features.detach(), {name: p.grad for name, p in model.text.named_parameters()}))
    (long_features, long_gradients), (short_features, short_gradients) = results
    assert_equal(long_features, short_features)
    for name, gradient in long_gradients.items():
        torch.testing.assert_close(gradient, short_gradients[name], rtol=1e-11, atol=1e-13, msg=name)


@torch.no_grad()
def test_ids_after_the_end_do_not_matter():
    model, tokens = tiny(), random_tokens([3, 8, 20])
    junk = tokens.clone()
    for row, length in zip(junk, [3, 8, 20], strict=True):
        row[length:] = torch.randint(0, 50, (77 - length,), generator=torch.Generator().manual_seed(length))
    assert not torch.equal(junk, tokens)
    assert_equal(model.encode_text(junk), model.encode_text(tokens))
    assert_equal(model.text(junk), model.encode_text(tokens))


@torch.no_grad()
def test_a_batch_of_different_lengths_equals_its_texts_one_by_one():
    model, tokens = tiny(), random_tokens([77, 1, 2, 13, 40])
    together = model.encode_text(tokens)
    assert_equal(together, torch.cat([model.encode_text(row[None]) for row in tokens]))


@torch.no_grad()
def test_trimming_changes_nothing():
    model, tokens = tiny(), random_tokens([3, 8, 20])
    assert_equal(model.encode_text(tokens), model.text(tokens))


@torch.no_grad()
def test_a_batch_of_images_equals_its_images_one_by_one():
    model, images = tiny(), random_images(4, 24)
    assert_equal(model.encode_image(images), torch.cat([model.encode_image(image[None]) for image in images]))


@pytest.mark.parametrize("place", [0, 4, 9])
@torch.no_grad()
def test_a_token_is_seen_by_itself_and_later_ones_only(place):
    model, tokens = tiny(), random_tokens([12], 12)
    changed = tokens.clone()
    changed[0, place] = tokens[0, place] % (EOT - 1) + 1
    before, after = (model.text(ids, all_tokens=True)[0] for ids in (tokens, changed))
    difference = (after - before).abs().amax(dim=1)
    assert (difference[:place] < 1e-13).all()
    assert (difference[place:] > 1e-6).all()


@torch.no_grad()
def test_every_patch_sees_every_other():
    model, images = tiny(), random_images(1, 24)
    changed = images.clone()
    changed[..., -1, -1] += 1  # in the last patch
    before, after = (model.visual(pixels, all_tokens=True)[0] for pixels in (images, changed))
    assert ((after - before).abs().amax(dim=1) > 1e-6).all()


@torch.no_grad()
def test_the_class_token_among_all_tokens_projects_to_the_image_features():
    model, images = tiny(), random_images(3, 24)
    tokens = model.visual(images, all_tokens=True)
    assert tokens.shape == (3, 1 + 9, 24)
    assert_equal(tokens[:, 0] @ model.visual.proj, model.encode_image(images))


@torch.no_grad()
def test_the_end_token_among_all_tokens_projects_to_the_text_features():
    model, tokens = tiny(), random_tokens([2, 9, 77])
    states = model.text(tokens, all_tokens=True)
    assert states.shape == (3, 77, 16)
    end = states[torch.arange(3), torch.tensor([1, 8, 76])]
    assert_equal(end @ model.text.text_projection, model.encode_text(tokens))


@torch.no_grad()
def test_the_text_is_read_at_its_first_end_token_and_not_at_the_largest_id():
    model = tiny()
    tokens = torch.tensor([[45, 3, EOT, 49, EOT, 48]])
    expected = model.text(tokens, all_tokens=True)[:, 2] @ model.text.text_projection
    assert_equal(model.encode_text(tokens), expected)
    assert_equal(model.text(tokens), expected)


def test_trimming_cuts_after_the_last_of_the_first_end_tokens():
    tokens = torch.tensor([[1, EOT, 5, EOT, 7], [1, 2, EOT, EOT, 0]])
    assert trim_text(tokens, EOT).tolist() == [[1, EOT, 5], [1, 2, EOT]]


def test_a_row_without_an_end_token_is_refused_and_named():
    tokens = torch.tensor([[1, EOT, 5], [7, 8, 9], [1, 2, 3]])
    with pytest.raises(ValueError, match=rf"row 1 .*end-of-text token \({EOT}\): \[7, 8, 9\]"):
        trim_text(tokens, EOT)
    with pytest.raises(ValueError, match="row 1 "):
        tiny().encode_text(tokens)


def test_no_texts_can_be_trimmed():
    assert trim_text(torch.zeros(0, 77, dtype=torch.long), EOT).shape == (0, 77)


@torch.no_grad()
def test_an_empty_batch_of_texts_gives_no_features():
    assert tiny().encode_text(torch.zeros(0, 77, dtype=torch.long)).shape == (0, 8)


@torch.no_grad()
def test_an_empty_batch_of_images_gives_no_features():
    assert tiny().encode_image(torch.zeros(0, 3, 24, 24)).shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@torch.no_grad()
def test_ids_may_be_32_or_64_bits_wide(dtype):
    model, tokens = tiny(), random_tokens([2, 9])
    assert_equal(model.encode_text(tokens.to(dtype)), model.encode_text(tokens))


# ---- CLIP


@torch.no_grad()
def test_normalize_gives_the_features_unit_length():
    model, images, tokens = tiny(), random_images(3, 24), random_tokens([2, 9])
    for encode, inputs in ((model.encode_image, images), (model.encode_text, tokens)):
        plain, unit = encode(inputs), encode(inputs, normalize=True)
        assert_equal(unit.norm(dim=1), torch.ones(len(inputs), dtype=torch.float64))
        assert_equal(unit * plain.norm(dim=1, keepdim=True), plain)
        assert (plain.norm(dim=1) - 1).abs().min() > 0.01


@torch.no_grad()
def test_forward_gives_scaled_cosines_of_every_image_with_every_text():
    model, images, tokens = tiny(), random_images(3, 24), random_tokens([2, 9, 4, 6])
    per_image, per_text = model(images, tokens)
    features, texts = model.encode_image(images), model.encode_text(tokens)
    cosines = F.cosine_similarity(features[:, None], texts[None], dim=-1)
    assert per_image.shape == (3, 4)
    assert_equal(per_image, math.exp(model.logit_scale) * cosines)
    assert torch.equal(per_text, per_image.T)


@pytest.mark.parametrize("shape", [(2, 3, 25, 24), (2, 3, 32, 32), (2, 1, 24, 24), (3, 24, 24), (2, 24, 24, 3)])
def test_images_of_another_shape_are_refused_naming_both(shape):
    with pytest.raises(ValueError, match=r"^images have the shape ") as caught:
        tiny().encode_image(torch.zeros(shape))
    assert str(shape) in str(caught.value)
    assert "(N, 3, 24, 24)" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_images_that_were_not_normalised_are_refused_naming_their_type(dtype):
    with pytest.raises(ValueError, match=str(dtype)):
        tiny().encode_image(torch.zeros(2, 3, 24, 24, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 78), (13,), (1, 2, 13), ()])
def test_tokens_of_another_shape_are_refused_naming_it_and_the_context_length(shape):
    with pytest.raises(ValueError, match=r"^tokens have the shape ") as caught:
        tiny().encode_text(torch.full(shape, EOT))
    assert str(shape) in str(caught.value)
    assert "77" in str(caught.value)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 0), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@torch.no_grad()
def test_the_model_computes_in_the_type_of_its_weights(dtype, tolerance):
    exact, images, tokens = tiny(), random_images(3, 24), random_tokens([2, 9])
    model = tiny().to(dtype)
    assert model.dtype == dtype
    for encode, inputs in (("encode_image", images), ("encode_text", tokens)):
        features = getattr(model, encode)(inputs)
        assert features.dtype == dtype
        assert_equal(features.double(), getattr(exact, encode)(inputs), tolerance)


def test_the_attributes_that_scripts_for_openais_package_read():
    model = CLIP(TINY)
    assert model.visual.input_resolution == 24
    assert model.context_length == 77
    assert model.vocab_size == 50
    assert model.dtype == torch.float32
    assert model.config == TINY


# ---- sizes and initial values


@pytest.mark.parametrize("name, parameters", [("ViT-B/32", 151_277_313), ("ViT-L/14", 427_616_513)])
def test_the_number_of_parameters_is_openais(name, parameters):
    with torch.device("meta"):
        model = CLIP(OPENAI_MODELS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_logit_scale_starts_at_the_papers_temperature():
    assert CLIP(TINY).logit_scale.item() == pytest.approx(math.log(1 / 0.07), rel=1e-6)


D, LAYERS = 256, 3
TEXT_STD = {
    "token_embedding.weight": 0.5,  # OpenAI's 0.02
    "positional_embedding": 0.05,  # OpenAI's 0.01
    "text_projection": D**-0.5,
    "attn.in_proj_weight": D**-0.5,
    "attn.out_proj.weight": D**-0.5 * (2 * LAYERS) ** -0.5,
    "mlp.c_fc.weight": (2 * D) ** -0.5,
    "mlp.c_proj.weight": D**-0.5 * (2 * LAYERS) ** -0.5,
}


def test_the_text_tower_starts_with_openais_standard_deviations_but_with_stronger_words():
    torch.manual_seed(0)
    config = TextConfig(vocab_size=1000, eot_token=999, width=D, layers=LAYERS)
    seen = set()
    for name, parameter in TextTransformer(config, 128, "gelu").named_parameters():
        kind = name.split(".", 3)[-1] if name.startswith("transformer") else name
        if kind in TEXT_STD:
            seen.add(kind)
            assert parameter.std().item() == pytest.approx(TEXT_STD[kind], rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * TEXT_STD[kind], name
    assert seen == TEXT_STD.keys()


def test_the_image_tower_starts_with_the_same_statistics_as_open_clip_but_with_places_as_strong_as_patches():
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(
        128, open_clip.model.CLIPVisionCfg(2, D, 64, 4.0, 16, 112), open_clip.model.CLIPTextCfg(layers=1, width=64)
    ).visual
    ours = VisionTransformer(VisionConfig(image_size=112, patch_size=16, width=D, layers=2), 128, "gelu")
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        std, mean, spread = expected[name].std().item(), expected[name].mean().item(), parameter.numel() ** -0.5
        if name in ("class_embedding", "positional_embedding"):
            assert std == pytest.approx(D**-0.5, rel=0.2)  # theirs
            std, mean = 0.5, 0.0
        assert parameter.std().item() == pytest.approx(std, rel=max(0.05, 4 * spread), abs=1e-9), name
        assert parameter.mean().item() == pytest.approx(mean, abs=6 * spread * std + 1e-9), name


def test_a_compiled_image_tower_cuts_its_patches_by_a_product_too():
    """With a convolution, a compiled training step on a GPU took 119 ms instead of 97."""
    vision = VisionConfig(image_size=32, patch_size=8, width=64, layers=1)
    tower = CLIP(CLIPConfig(32, "quick_gelu", vision, TextConfig(width=64, layers=1))).visual
    operations = []

    def note(graph, inputs):
        operations.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    images = torch.randn(2, 3, 32, 32)
    with torch.compiler.set_stance("default"):  # a validation that an error ended leaves another one in its process
        assert torch.equal(torch.compile(tower, backend=note, fullgraph=True)(images), tower(images))
    assert operations
    assert not any("conv" in str(operation) for operation in operations)


def test_a_resolution_that_a_transformer_of_timms_does_not_take_is_refused_when_it_is_built():
    vision = VisionConfig(kind="timm", timm_model="vit_tiny_patch16_224", image_size=32)
    with pytest.raises(ValueError, match=r"vit_tiny_patch16_224 takes images of \(224, 224\) pixels, not 32"):
        CLIP(CLIPConfig(vision=vision, text=TextConfig(width=16, layers=1, head_width=16, vocab_size=30, eot_token=29)))
