"""Other libraries' models. Oracles: open_clip and transformers called directly, and ours on the same weights."""

from __future__ import annotations

import copy
import itertools
import json
import multiprocessing
import pickle
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import Served, picture, tiny_clip, tiny_config
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from miniclip import tokenizer
from miniclip.config import OPENAI_MEAN, OPENAI_STD, VisionConfig
from miniclip.evaluation import encoder
from miniclip.evaluation.encoder import Encoder, ModelError, from_clip, from_object
from miniclip.evaluation.fingerprints import _HASHED_AT_ONCE, digest_module, probe_pictures
from miniclip.evaluation.other_libraries import from_openclip, from_transformers, open_model
from miniclip.evaluation.zero_shot import zero_shot_classifier
from miniclip.model import CLIP
from miniclip.weights import load as weights
from miniclip.weights.convert import convert
from miniclip.weights.write import vocabulary_files

TEXTS = ["a photo of a cat.", "An OWL &amp; its nest", "two dogs"]


def close(found: torch.Tensor, expected: torch.Tensor, most: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert ((found - expected).abs().max() / expected.abs().max()).item() <= most
    assert expected.std(dim=0).max() > 1e-4 * expected.abs().max(), "the outputs are all alike, so they say nothing"


def pictures() -> list[Image.Image]:
    return [picture(0, (60, 40)), picture(1, (33, 71)), picture(2, (40, 40))]


def batch(model: Encoder) -> torch.Tensor:
    return torch.stack([model.preprocess(image) for image in pictures()])


def fingerprints(model: Encoder) -> tuple[str | None, str | None]:
    return replace(model).image_fingerprint(), replace(model).text_fingerprint()  # a copy has computed nothing yet


def ours(model: CLIP | None = None, name: str = "mine") -> Encoder:
    model = model or tiny_clip()
    return from_clip(model, weights.preprocess_for(model.config), name)


# ---- ours


def test_our_models_open_by_any_name_that_load_takes(tmp_path):
    weights.save(tiny_clip(), tmp_path / "mine")
    found = open_model(str(tmp_path / "mine"), "cpu")
    model, preprocess = weights.load(tmp_path / "mine", "cpu")
    assert (found.name, found.library) == (str(tmp_path / "mine"), "miniclip 0.1.0")
    images = torch.stack([preprocess(image) for image in pictures()])
    assert torch.equal(batch(found), images)
    assert torch.equal(found.tokenize(TEXTS), tokenizer.tokenize(TEXTS, 16))
    with torch.no_grad():  # as it does; with gradients other last bits are right, too
        expected = model.encode_image(images), model.encode_text(tokenizer.tokenize(TEXTS, 16))
        assert torch.equal(found.encode_pooled(images), encoder.pooled_features(model, images))
    assert torch.equal(found.encode_image(images), expected[0])
    assert torch.equal(found.encode_text(found.tokenize(TEXTS)), expected[1])
    assert found.logit_scale == model.logit_scale
    assert not found.encode_image(images).requires_grad


def test_texts_that_are_too_long_for_ours_are_cut_and_counted():
    tokenize = ours().tokenize
    exact = " ".join(["owl"] * 14)
    with pytest.warns(UserWarning, match=r"mine reads 16 tokens; 2 of 4 texts .* the first: 'owl owl owl"):
        tokens = tokenize([exact, exact + " owl", "cat", exact + " cat cat"])
    assert torch.equal(tokens, tokenizer.tokenize([exact, exact, "cat", exact], 16))


def test_a_model_of_other_token_ids_refuses_texts_and_takes_images():
    text = replace(tiny_config().text, vocab_size=60, eot_token=59)
    model = ours(tiny_clip(text=text), "digits")
    assert model.encode_image(batch(model)).shape == (3, 16)
    with pytest.raises(ValueError, match="digits has vocab_size 60 and eot_token 59; CLIP's ids need 49408"):
        model.tokenize(TEXTS)


def test_a_model_without_text_tower_has_no_fingerprint_of_it():
    model = ours(CLIP(tiny_config(towers="image")))
    assert model.image_fingerprint() is not None
    assert model.text_fingerprint() is None


# ---- open_clip's

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
COCA = {
    **TINY,
    "vision_cfg": TINY["vision_cfg"] | {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
    "text_cfg": TINY["text_cfg"] | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    "custom_text": True,
}
RESNET = {**TINY, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}}
TIMM = {**TINY, "vision_cfg": {"timm_model_name": "test_vit", "timm_proj": "linear", "image_size": 160}}
ARCHITECTURES = {"tiny": TINY, "tiny-custom": {**TINY, "custom_text": True}, "tiny-coca": COCA, "tiny-resnet": RESNET}
ARCHITECTURES |= {"tiny-timm": {**TIMM, "custom_text": True}, "tiny-quickgelu": {**TINY, "quick_gelu": True}}
ARCHITECTURES |= {"tiny-heads": {**TINY, "text_cfg": TINY["text_cfg"] | {"heads": 4}}}


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("architectures")
    for name, config in ARCHITECTURES.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    return folder


def openclip_twin(name: str, seed: int = 0) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.create_model(name, pretrained_text=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return model.eval()


def openclip_folder(folder: Path, name: str) -> torch.nn.Module:
    model = openclip_twin(name)
    folder.mkdir()
    settings = {"model_cfg": ARCHITECTURES[name], "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", ["tiny", "tiny-custom", "tiny-coca", "tiny-resnet", "tiny-timm"])
def test_open_clips_models_give_what_the_library_gives(tmp_path, name):
    twin = openclip_folder(tmp_path / "there", name)
    found = open_model(f"openclip:local-dir:{tmp_path / 'there'}", "cpu")
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'there'}")
    images = torch.stack([preprocess(image) for image in pictures()])
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'there'}")(TEXTS)
    assert found.library == f"open_clip {open_clip.__version__}"
    assert torch.equal(batch(found), images)
    assert torch.equal(found.tokenize(TEXTS), tokens)
    assert tokens.shape == (3, 16)
    with torch.no_grad():
        close(found.encode_image(images), twin.encode_image(images))
        close(found.encode_text(tokens), twin.encode_text(tokens))
        close(found.encode_pooled(images), pooled_by_open_clip(twin.visual, images))
    assert found.logit_scale.shape == ()
    assert found.logit_scale == twin.logit_scale
    assert not found.encode_text(tokens).requires_grad
    assert torch.equal(pickle.loads(pickle.dumps(found.preprocess))(pictures()[0]), images[0])


def pooled_by_open_clip(visual: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    if hasattr(visual, "trunk"):
        return visual.trunk(images)
    visual = copy.deepcopy(visual)
    if hasattr(visual, "proj"):
        visual.proj = None
    features = visual(images)
    return features[0] if isinstance(features, tuple) else features


@pytest.mark.parametrize("name", ["tiny", "tiny-resnet"])
def test_ours_and_open_clips_give_the_same_features_of_the_same_weights(tmp_path, name):
    openclip_folder(tmp_path / "there", name)
    theirs, mine = open_model(f"openclip:local-dir:{tmp_path / 'there'}"), open_model(str(tmp_path / "there"))
    close(batch(mine), batch(theirs))
    close(mine.encode_image(batch(mine)), theirs.encode_image(batch(theirs)))
    close(mine.encode_text(mine.tokenize(TEXTS)), theirs.encode_text(theirs.tokenize(TEXTS)))
    close(mine.encode_pooled(batch(mine)), theirs.encode_pooled(batch(theirs)))
    assert mine.logit_scale == theirs.logit_scale


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_open_clips_architecture_takes_a_file_of_weights(tmp_path, monkeypatch, kind):
    twin = openclip_twin("tiny", seed=3)
    torch.save(twin.state_dict(), tmp_path / "my weights.pt")
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my weights.pt" if kind == "absolute" else "my weights.pt"
    found = open_model(f"openclip:tiny/{file}", "cpu")
    with torch.no_grad():
        close(found.encode_image(batch(found)), twin.encode_image(batch(found)))


@pytest.mark.parametrize(
    "name, told, runs, says",
    [
        ("tiny", True, "tiny-quickgelu", "QuickGELU"),
        ("tiny-quickgelu", False, "tiny", "GELU"),
        ("tiny-quickgelu", True, "tiny-quickgelu", None),
        ("tiny", None, "tiny", None),
        ("tiny-quickgelu", None, "tiny-quickgelu", None),  # as roberta-ViT-B-32, whose only tag does not tell
    ],
)
def test_weights_of_a_tag_run_with_the_activation_that_they_were_trained_with(
    tmp_path, monkeypatch, recwarn, name, told, runs, says
):
    twin = openclip_twin(runs)
    torch.save(twin.state_dict(), tmp_path / "weights.pt")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where open_clip keeps downloads
    with Served(tmp_path) as server:
        tag = {"url": f"{server.url}/weights.pt", "mean": (0.1, 0.2, 0.3)}
        tag |= {} if told is None else {"quick_gelu": told}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"web_text": tag})
        found = open_model(f"openclip:{name}/web-text", "cpu")
    with torch.no_grad():
        close(found.encode_text(found.tokenize(TEXTS)), twin.encode_text(found.tokenize(TEXTS)))
        close(found.encode_image(batch(found)), twin.encode_image(batch(found)))
    said = [str(warning.message) for warning in recwarn if "weights were trained" in str(warning.message)]
    assert said == (
        [f"openclip:{name}/web-text: these weights were trained with {says}, so {says} is used"] if says else []
    )


def as_tag(**pixels):
    """A tag as open_clip writes them: all settings, OpenAI's where nothing else is given."""
    usual = {"mean": OPENAI_MEAN, "std": OPENAI_STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    return {"url": "https://example.org/weights.pt", **usual, **pixels}


SIGLIPS = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}
MOBILE = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear"}


@pytest.mark.parametrize(
    ("tags", "beside", "used", "says"),
    [
        ({"a": MOBILE, "b": MOBILE}, None, MOBILE, r"all of open_clip's weights for tiny: mean \(0.0, 0.0, 0.0\), std"),
        ({"a": SIGLIPS}, None, SIGLIPS, "resize_mode squash"),
        ({"a": {}, "b": {}}, None, {}, None),
        ({}, None, {}, None),
        ({"a": {}, "b": SIGLIPS}, None, {}, r"OpenAI's way.*some need another \(b: mean \(0.5, 0.5, 0.5\)"),
        ({"a": MOBILE, "b": SIGLIPS}, None, {}, r"OpenAI's way.*\(a: mean \(0.0.*; b: mean \(0.5"),
        ({"a": MOBILE}, TINY, SIGLIPS, "as the open_clip_config.json beside it says: mean"),
        ({"a": MOBILE}, {**TINY, "quick_gelu": True}, SIGLIPS, "trained with QuickGELU, so QuickGELU is used"),
        ({"a": MOBILE}, {**TINY, "embed_dim": 99}, MOBILE, "all of open_clip's weights for tiny"),
        ({"a": MOBILE}, {**TINY, "vision_cfg": TINY["vision_cfg"] | {"layers": 9}}, MOBILE, "all of"),
    ],
)
@torch.no_grad()
def test_pictures_for_a_file_are_prepared_as_for_the_architectures_weights(
    tmp_path, monkeypatch, recwarn, tags, beside, used, says
):
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {tag: as_tag(**each) for tag, each in tags.items()})
    is_quick = bool(beside and beside.get("quick_gelu"))
    twin = openclip_twin("tiny-quickgelu" if is_quick else "tiny")
    torch.save(twin.state_dict(), tmp_path / "weights.pt")
    if beside:
        settings = {"model_cfg": beside, "preprocess_cfg": SIGLIPS}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    found = open_model(f"openclip:tiny/{tmp_path / 'weights.pt'}", "cpu")
    expected = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=32, **used), is_train=False
    )
    assert torch.equal(batch(found), torch.stack([expected(image) for image in pictures()]))
    close(found.encode_image(batch(found)), twin.encode_image(batch(found)))
    said = [str(warning.message) for warning in recwarn if str(tmp_path) in str(warning.message)]
    assert len(said) == (0 if says is None else 2 if is_quick else 1)
    assert says is None or re.search(says, said[-1])


@pytest.mark.parametrize(
    ("beside", "says"),
    [
        ({"model_cfg": None}, "model_cfg is 'None'"),
        ({"model_cfg": {"vision_cfg": None}}, "vision_cfg is 'None'"),
        ({"model_cfg": TINY, "preprocess_cfg": None}, "preprocess_cfg is 'None'"),
    ],
)
def test_settings_beside_a_file_that_are_no_mappings_are_named(tmp_path, beside, says):
    torch.save(openclip_twin("tiny").state_dict(), tmp_path / "weights.pt")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(beside))
    with pytest.raises(ValueError, match=rf"open_clip_config\.json: {says}; it must be a mapping"):
        open_model(f"openclip:tiny/{tmp_path / 'weights.pt'}", "cpu")


# ---- transformers'

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = ["<pad>", "<unk>", "<eos>", "<bos>", "<mask>", "a", "photo", "of", "cat", "dog", ".", "two"]
TEXT = {"vocab_size": len(WORDS), "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 3} | SIZES
TEXT |= {"eos_token_id": 2}
VISION = {"image_size": 24, "patch_size": 8} | SIZES


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    table = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    table.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=table, model_max_length=64, **special)


def hf_clip(folder: Path) -> tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]:
    end = {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407}
    config = transformers.CLIPConfig(text_config=TEXT | end, vision_config=VISION, projection_dim=20)
    for name, content in vocabulary_files(16).items():
        (folder / name).write_text(content)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    return transformers.CLIPModel(config), transformers.CLIPProcessor(images, words)


def hf_siglip(folder: Path) -> tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]:
    images = transformers.SiglipImageProcessor(size={"height": 24, "width": 24})
    config = transformers.SiglipConfig(text_config=TEXT, vision_config=VISION)
    return transformers.SiglipModel(config), transformers.SiglipProcessor(images, word_tokenizer())


def hf_siglip2(folder: Path) -> tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]:
    images = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    vision = SIZES | {"patch_size": 8, "num_patches": 16}
    config = transformers.Siglip2Config(text_config=TEXT, vision_config=vision)
    return transformers.Siglip2Model(config), transformers.Siglip2Processor(images, word_tokenizer())


def hf_align(folder: Path) -> tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]:
    blocks = {"in_channels": [32], "out_channels": [16], "kernel_sizes": [3], "strides": [1], "expand_ratios": [1]}
    vision = {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 64} | blocks
    vision |= {"num_block_repeats": [1], "depthwise_padding": []}
    text = TEXT | {"max_position_embeddings": 64}
    config = transformers.AlignConfig(
        text_config=text, vision_config=vision, projection_dim=8, temperature_init_value=0.05
    )
    images = transformers.EfficientNetImageProcessor(size={"height": 32, "width": 32})
    return transformers.AlignModel(config), transformers.AlignProcessor(images, word_tokenizer())


def hf_owl(version: str) -> Callable[[Path], tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]]:
    def made(folder: Path) -> tuple[transformers.PreTrainedModel, transformers.ProcessorMixin]:
        config = getattr(transformers, f"{version}Config")(text_config=TEXT, vision_config=VISION, projection_dim=20)
        images = getattr(transformers, f"{version}ImageProcessor")(size={"height": 24, "width": 24})
        processor = getattr(transformers, f"{version}Processor")(images, word_tokenizer())
        return getattr(transformers, f"{version}Model")(config), processor

    return made


KINDS = {"clip": hf_clip, "siglip": hf_siglip, "siglip2": hf_siglip2, "align": hf_align}
KINDS |= {"owlvit": hf_owl("OwlViT"), "owlv2": hf_owl("Owlv2")}


@pytest.fixture(scope="module", params=KINDS)
def hf(request, tmp_path_factory):
    """A folder with a random model, its kind, and what transformers reads from the folder."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = KINDS[request.param](folder)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in ("logit_scale", "temperature"):
                    parameter.add_(0.05 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    return folder, request.param, model, transformers.AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def test_transformers_models_give_what_the_library_gives(hf):
    folder, kind, twin, processor = hf
    found = open_model(f"transformers:{folder}", "cpu")
    texts = ["a photo of a cat.", "two", " ".join(["dog"] * 70)]
    assert found.library == f"transformers {transformers.__version__}"
    longest = {"max_length": 64 if kind == "align" else 16}
    is_full = "siglip" in kind or "owl" in kind
    padding = {"padding": "max_length" if is_full else True, "truncation": True} | longest
    inputs = processor.image_processor(images=pictures(), return_tensors="pt")
    words = processor.tokenizer(texts, return_tensors="pt", **padding)
    if "siglip" in kind:  # trained to attend to padding
        del words["attention_mask"]
    close(found.encode_image(batch(found)), twin.get_image_features(**inputs).pooler_output)
    close(found.encode_text(found.tokenize(texts)), twin.get_text_features(**words).pooler_output)
    close(found.encode_pooled(batch(found)), twin.vision_model(**inputs).pooler_output)
    # The logits of the whole model, so that scale and order are theirs, too.
    logits = twin(**inputs, **words).logits_per_image - getattr(twin, "logit_bias", 0)
    images, words = (F.normalize(f, dim=-1) for f in (found.encode_image(batch(found)), found.encode_text(words)))
    close(found.logit_scale.exp() * images @ words.T, logits)
    assert found.logit_scale.shape == ()
    preprocess = pickle.loads(pickle.dumps(found.preprocess))
    assert torch.equal(preprocess(pictures()[0]), batch(found)[0])
    assert preprocess(picture(0, mode="L")).shape == preprocess(picture(0, mode="P")).shape == batch(found)[0].shape


def test_ours_and_transformers_give_the_same_features_of_the_same_weights(tmp_path):
    mine = tiny_clip(text=replace(tiny_config().text, context_length=16))
    weights.save(mine, tmp_path / "mine")
    convert(tmp_path / "mine", tmp_path / "theirs", "hf")
    theirs, mine = open_model(f"transformers:{tmp_path / 'theirs'}"), open_model(str(tmp_path / "mine"))
    images = batch(mine)
    close(theirs.encode_image(images), mine.encode_image(images))
    plain = ["a photo of a cat.", "An OWL and its nest", "two dogs"]  # their tokenizer leaves entities as they are
    close(theirs.encode_text(theirs.tokenize(plain)), mine.encode_text(mine.tokenize(plain)))
    close(theirs.encode_pooled(images), mine.encode_pooled(images))
    assert theirs.logit_scale == mine.logit_scale


def test_a_model_of_transformers_that_is_no_clip_is_named(tmp_path):
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=20, **SIZES))
    with pytest.raises(ValueError, match="a BertModel and has no get_image_features"):
        from_transformers(bert, None, "transformers:x")
    with pytest.raises(ValueError, match=r"x is a .* and has no image_processor"):
        from_transformers(hf_siglip(tmp_path)[0], word_tokenizer(), "x")


def test_weights_that_lack_a_part_are_refused_instead_of_random(tmp_path):
    model, processor = hf_siglip(tmp_path)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "head.probe" not in name}
    model.save_pretrained(tmp_path, state_dict=tensors)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack vision_model.head.probe: they would be random"):
        open_model(f"transformers:{tmp_path}")


# ---- any object


class Own:
    """The five things, made by hand."""

    logit_scale = 2.5

    def __init__(self, **more):
        vars(self).update(more)

    def encode_image(self, images):
        return images.flatten(1)[:, :6]

    def encode_text(self, tokens):
        return np.stack([np.full(6, length, dtype=np.float32) for length in tokens])

    def tokenize(self, texts):
        return [len(text) for text in texts]

    def preprocess(self, image):
        return torch.from_numpy(np.array(image.convert("RGB").resize((4, 4)))).permute(2, 0, 1) / 255


def test_an_object_with_the_five_things_is_a_model():
    found = from_object(Own(), "own")
    images = batch(found)
    assert torch.equal(found.encode_image(images), images.flatten(1)[:, :6])
    assert torch.equal(found.encode_text(found.tokenize(["owl", "horse"])), torch.tensor([[3.0] * 6, [5.0] * 6]))
    assert float(found.logit_scale) == 2.5
    assert found.encode_pooled is None
    assert fingerprints(found) == (None, None)


def test_a_module_of_torchs_forgets_that_it_was_training():
    class Training(Own, torch.nn.Module):
        def __init__(self):
            torch.nn.Module.__init__(self)
            self.dropout = torch.nn.Dropout(0.9)

        def encode_image(self, images):
            return self.dropout(images.flatten(1))

    found = from_object(Training().train(), "own")
    images = batch(found)
    assert torch.equal(found.encode_image(images), images.flatten(1))


def test_the_fingerprint_that_an_object_names_counts_with_its_preprocessing_and_tokenizer():
    plain, again, other = (fingerprints(from_object(Own(fingerprint=text), "own")) for text in ("v1", "v1", "v2"))
    assert plain == again
    assert None not in plain
    assert not set(plain) & set(other)
    capitals = from_object(Own(fingerprint="v1", tokenize=lambda texts: [len(text.split()) for text in texts]), "own")
    assert fingerprints(capitals)[0] == plain[0]
    assert fingerprints(capitals)[1] != plain[1]
    noise = itertools.count()
    random = from_object(Own(fingerprint="v1", preprocess=lambda image: torch.full((3, 4, 4), next(noise))), "own")
    assert fingerprints(random) == (None, plain[1])


@pytest.mark.parametrize("lacking", encoder.FIVE_THINGS)
def test_an_object_that_lacks_one_of_the_five_is_told_which(lacking):
    with pytest.raises(ValueError, match=f"mine is a Own without {lacking}; needed are encode_image, encode_text"):
        from_object(Own(**{lacking: None}), "mine")


@pytest.mark.parametrize(
    "more, says",
    [
        ({"tokenize": 3}, "tokenize of mine is 3; it must be a function"),
        ({"logit_scale": "warm"}, "logit_scale of mine is 'warm'; it must be one number"),
        ({"logit_scale": torch.ones(2)}, "logit_scale of mine is .*; it must be one number"),
        ({"logit_scale": 100}, "logit_scale of mine is 100; it must be the logarithm .* itself, store 4.60517"),
        ({"fingerprint": 3}, "fingerprint of mine is 3; it must be a text"),
    ],
)
def test_five_things_of_no_use_are_named(more, says):
    with pytest.raises(ValueError, match=says):
        from_object(Own(**more), "mine")


@pytest.mark.parametrize("given, says", [([1.0], "a list;"), (torch.ones(3), r"a Tensor of shape \(3,\);")])
def test_features_of_no_use_are_named(given, says):
    found = from_object(Own(encode_image=lambda images: given), "mine")
    with pytest.raises(ValueError, match=f"encode_image of mine gives {says} \\(B, E\\) is needed"):
        found.encode_image(torch.zeros(2, 3, 4, 4))


OWN_FILE = """
    import torch
    from sibling_of_own import SCALE

    class Thing:
        logit_scale = SCALE
        def encode_image(self, images): return images.flatten(1)
        def encode_text(self, tokens): return tokens.float()
        def tokenize(self, texts): return torch.tensor([[len(text), text.count("a")] for text in texts])
        def preprocess(self, image): return torch.ones(3, 2, 2) * image.width

    def model(): return Thing()
    def model_on(device):
        thing = Thing()
        thing.logit_scale = torch.tensor(1.5, device=device)
        return thing
    number = 7
"""


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    (tmp_path / "own_model_of_mine.py").write_text(textwrap.dedent(OWN_FILE))
    (tmp_path / "sibling_of_own.py").write_text("SCALE = 1.25")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "own_model_of_mine.py"
    for name in ("own_model_of_mine", "sibling_of_own"):
        sys.modules.pop(name, None)


def test_a_function_of_ones_own_file_gives_a_model(own_file):
    name = f"python:{own_file}:model"
    found = open_model(name)
    assert (found.name, float(found.logit_scale)) == (name, 1.25)
    assert found.encode_image(batch(found)).shape == (3, 12)
    assert open_model(f"python:{own_file}:model_on", "cpu").logit_scale.device.type == "cpu"
    with multiprocessing.get_context("spawn").Pool(1) as workers:  # as worker processes may start that decode images
        assert torch.equal(workers.apply(found.preprocess, (pictures()[0],)), batch(found)[0])


def test_a_function_of_a_module_gives_a_model(own_file, monkeypatch):
    monkeypatch.chdir(own_file.parent)
    assert float(open_model("python:own_model_of_mine:model").logit_scale) == 1.25


@pytest.mark.parametrize(
    "name, says",
    [
        ("python:FILE:modle", r"has no modle; did you mean model\?"),
        ("python:FILE:number", "has 7, which is no function, as number"),
        ("python:FILE", "is not python:FILE.py:FUNCTION or python:MODULE:FUNCTION"),
        ("python:nowhere/x.py:model", "there is no file nowhere/x.py"),
        ("python:no_such_module.x:model", "there is no module 'no_such_module'"),
    ],
)
def test_mistakes_in_the_name_of_a_function_are_told(own_file, name, says):
    with pytest.raises(ValueError, match=says):
        open_model(name.replace("FILE", str(own_file), 1) if "FILE:" in name else name.replace("FILE", str(own_file)))


@pytest.mark.parametrize(
    "name, says", [("torch", "as 'torch', which is .*; rename"), ("my.own", "can't import .* as 'my.own'; rename")]
)
def test_a_file_that_is_no_module_of_its_name_is_refused(tmp_path, monkeypatch, name, says):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / f"{name}.py").write_text("def model(): return 1")
    with pytest.raises(ValueError, match=says):
        open_model(f"python:{tmp_path / name}.py:model")


def test_the_example_of_the_documentation_tells_colours(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    example = re.search(r"```python\n(# colours\.py\n.*?)```", text, re.DOTALL).group(1)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    Path("colours.py").write_text(example)
    found = open_model("python:colours.py:Colours")
    sys.modules.pop("colours")
    names = ["red", "olive", "teal", "hotpink"]
    classifier = zero_shot_classifier(found, names, ["the colour {}", "something {}"], found.tokenize)
    images = torch.stack([found.preprocess(Image.new("RGB", (20, 10), name)) for name in names])
    assert (found.encode_image(images) @ classifier).argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert None not in fingerprints(found)


def test_what_a_users_own_module_lacks_is_named_with_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "imports_what_is_missing.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    says = r"model 'python:imports_what_is_missing:model': .*ModuleNotFoundError: No module named 'no_such_package'"
    with pytest.raises(ModelError, match=rf"{says} \(.*imports_what_is_missing\.py:1\)") as caught:
        open_model("python:imports_what_is_missing:model")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


# ---- what a model is recognised by


def openclip_of(name: str, model: torch.nn.Module | None = None) -> Encoder:
    model = model or openclip_twin(name)
    size = ARCHITECTURES[name]["vision_cfg"]["image_size"]
    preprocess = open_clip.image_transform(size, is_train=False)
    return from_openclip(model, preprocess, open_clip.get_tokenizer(name), "theirs")


def make(kind: str, tmp_path: Path) -> tuple[Encoder, torch.nn.Module, str, str]:
    """A model, its module, and a tensor of each tower."""
    if kind == "ours":
        clip = tiny_clip()
        return ours(clip), clip, "visual.ln_post.weight", "text.ln_final.bias"
    if kind in ARCHITECTURES:
        model = openclip_twin(kind)
        image = {"tiny-timm": "visual.head.proj.weight", "tiny-resnet": "visual.layer4.0.bn1.running_mean"}
        text = "text.ln_final.bias" if hasattr(model, "text") else "ln_final.bias"
        return openclip_of(kind, model), model, image.get(kind, "visual.proj"), text
    torch.manual_seed(0)
    hugging_face, processor = KINDS[kind](tmp_path)
    like_clip = "clip", "owlvit", "owlv2"
    text = dict.fromkeys(like_clip, "text_projection.weight") | {"align": "text_projection.bias"}
    image = dict.fromkeys(like_clip, "visual_projection.weight")
    image |= {"align": "vision_model.embeddings.batchnorm.running_var"}
    found = from_transformers(hugging_face, processor, "theirs")
    text_name, image_name = text.get(kind, "text_model.head.bias"), image.get(kind, "vision_model.head.probe")
    return found, hugging_face, image_name, text_name


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", ["ours", *ARCHITECTURES, *KINDS])
def test_a_change_of_one_weight_changes_the_fingerprint_of_its_tower_alone(tmp_path, kind):
    found, module, image_name, text_name = make(kind, tmp_path)
    before = fingerprints(found)
    assert None not in before
    assert len(set(before)) == 2
    tensors = module.state_dict()
    changes = [(image_name, (True, False)), (text_name, (False, True))]
    changes += [(name, (False, False)) for name in ("logit_scale", "temperature") if name in tensors]
    for name, expected in changes:
        value = tensors[name].flatten()[-1].clone()
        tensors[name].view(-1)[-1] += 1e-3
        assert tuple(a != b for a, b in zip(before, fingerprints(found), strict=True)) == expected, name
        tensors[name].view(-1)[-1] = value
    assert fingerprints(found) == before


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", ["ours", *ARCHITECTURES, *KINDS])
def test_images_and_tokens_are_moved_to_the_device_and_precision_of_the_model(tmp_path, kind):
    found, module, _, _ = make(kind, tmp_path)
    images, tokens = batch(found), found.tokenize(["two dogs"])
    size = found.encode_image(images).shape
    found, module, _, _ = make(kind, tmp_path)
    # A device without numbers, where what stays behind on the CPU is an error. Some of transformers' look at numbers.
    device = "cpu" if kind in ("clip", "siglip2", "align", "owlvit", "owlv2") else "meta"
    module.to(device, torch.bfloat16)
    again = {"ours": lambda: ours(module), **dict.fromkeys(ARCHITECTURES, lambda: openclip_of(kind, module))}
    found = again[kind]() if kind in again else from_transformers(module, KINDS[kind](tmp_path)[1], "theirs")
    features = [found.encode_image(images), found.encode_text(tokens), found.encode_pooled(images), found.logit_scale]
    assert [(each.device.type, each.dtype) for each in features] == [(device, torch.bfloat16)] * 4
    assert (features[0].shape, features[1].shape) == (size, (1, size[1]))


@pytest.mark.parametrize("kind", ["ours", *ARCHITECTURES, *KINDS])
def test_a_model_in_training_encodes_in_evaluation_mode_and_goes_on_training(tmp_path, kind):
    found, module, _, _ = make(kind, tmp_path)
    images, tokens = batch(found), found.tokenize(["two dogs"])
    module.train()
    first = next(module.children())
    first.eval()
    modes, seen = [each.training for each in module.modules()], []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda part, _: seen.append(part.training))
    for encode, inputs in (
        (found.encode_image, images), (found.encode_text, tokens), (found.encode_pooled, images)
    ):  # fmt: skip
        encode(inputs)
        assert len(seen) > 3
        assert not any(seen)
        assert [each.training for each in module.modules()] == modes
        seen.clear()
    hook.remove()


def test_a_fingerprint_is_computed_once():
    clip = tiny_clip()
    found = ours(clip)
    before = found.text_fingerprint()
    with torch.no_grad():
        clip.text.text_projection.add_(1)
    assert found.text_fingerprint() == before
    assert ours(clip).text_fingerprint() != before


def test_the_captioning_decoder_of_coca_matters_to_neither_tower():
    model = openclip_twin("tiny-coca")
    before = fingerprints(openclip_of("tiny-coca", model))
    with torch.no_grad():
        model.text_decoder.text_projection.add_(1)
    assert fingerprints(openclip_of("tiny-coca", model)) == before


def test_preprocessing_and_tokenizer_belong_to_the_fingerprints():
    found, clip = ours(), tiny_clip()
    before = fingerprints(found)
    vision = clip.config.vision
    mean = weights.preprocess_for(replace(clip.config, vision=replace(vision, mean=(0.4, 0.4, 0.4))))
    style = weights.preprocess_for(replace(clip.config, vision=replace(vision, preprocess="hf")))
    for preprocess in (mean, style):
        image, text = fingerprints(replace(found, preprocess=preprocess))
        assert image != before[0]
        assert text == before[1]
    for tokenize in (lambda texts: tokenizer.tokenize(texts, 77), lambda texts: found.tokenize([texts[0].strip(".")])):
        image, text = fingerprints(replace(found, tokenize=tokenize))
        assert image == before[0]
        assert text != before[1]
    assert not set(fingerprints(replace(found, library="miniclip 9"))) & set(before)


@pytest.mark.parametrize("tower, changes", [("vision", {"head_width": 4}), ("text", {"head_width": 4})])
def test_an_architecture_that_no_tensor_tells_belongs_to_its_towers_fingerprint(tower, changes):
    clip = tiny_clip()
    other = CLIP(replace(clip.config, **{tower: replace(getattr(clip.config, tower), **changes)}))
    other.load_state_dict(clip.state_dict())
    before, after = fingerprints(ours(clip)), fingerprints(ours(other))
    assert [a == b for a, b in zip(before, after, strict=True)] == [tower == "text", tower == "vision"]


def test_heads_that_no_tensor_tells_belong_to_the_fingerprint_of_open_clips_tower():
    one, other = openclip_twin("tiny"), openclip_twin("tiny-heads")
    other.load_state_dict(one.state_dict())
    before, after = fingerprints(openclip_of("tiny", one)), fingerprints(openclip_of("tiny-heads", other))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]


def test_the_activation_belongs_to_both_fingerprints():
    clip = tiny_clip(activation="gelu")
    other = CLIP(replace(clip.config, activation="quick_gelu"))
    other.load_state_dict(clip.state_dict())
    assert not set(fingerprints(ours(clip))) & set(fingerprints(ours(other)))


@pytest.mark.long
@pytest.mark.parametrize("hf", ["clip"], indirect=True)
def test_fingerprints_are_the_same_from_another_place_and_in_another_process(tmp_path, hf):
    folder, *_ = hf
    weights.save(tiny_clip(), tmp_path / "mine")
    openclip_folder(tmp_path / "oc", "tiny")
    names = [str(tmp_path / "mine"), f"openclip:local-dir:{tmp_path / 'oc'}", f"transformers:{folder}"]
    here = [fingerprints(open_model(name, "cpu")) for name in names]
    moved = tmp_path / "elsewhere"
    tmp_path_there = moved / "mine"
    moved.mkdir()
    (tmp_path / "mine").rename(tmp_path_there)
    names[0] = str(tmp_path_there)
    code = f"""
        from miniclip.evaluation.other_libraries import open_model
        for name in {names!r}:
            model = open_model(name, "cpu")
            print("found", model.image_fingerprint(), model.text_fingerprint())
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    there = [tuple(line.split()[1:]) for line in ran.stdout.splitlines() if line.startswith("found")]
    assert there == here
    assert len({each for pair in here for each in pair}) == 6


def test_large_tensors_and_all_kinds_of_numbers_are_hashed_whole():
    class Kinds(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("large", torch.zeros((_HASHED_AT_ONCE // 4) + 3))
            self.register_buffer("brain", torch.zeros(3, 2, dtype=torch.bfloat16).t())
            self.register_buffer("whole", torch.zeros((), dtype=torch.int64))
            self.register_buffer("none", torch.zeros(0))
            self.register_buffer("truth", torch.zeros(4, dtype=torch.bool), persistent=False)

    module = Kinds()
    seen = {digest_module(module)}
    for tensor, place in [("large", 0), ("large", -1), ("brain", (1, 2)), ("truth", 3)]:
        getattr(module, tensor)[place] = 1
        seen.add(digest_module(module))
    module.whole.fill_(1)
    seen.add(digest_module(module))
    assert len(seen) == 6


def test_the_pictures_of_the_fingerprint_are_of_every_kind_and_always_the_same():
    first, second = ([image.tobytes() for image in probe_pictures()] for _ in range(2))
    assert first == second
    assert [image.mode for image in probe_pictures()] == ["RGB", "RGB", "RGB", "L", "RGBA", "P"]


# ---- mistakes


@pytest.mark.parametrize(
    "name, says",
    [
        ("openclip:ViT-B-32", "would be open_clip's ViT-B-32 with random weights; name some after a slash: a file, or"),
        ("openclip:ViT-B-32/", "with random weights"),
        ("openclip:tiny", "as open_clip has no weights for it"),
        ("openclip:ViT-B32/openai", r"has no 'ViT-B32'; did you mean ViT-B-32"),
        ("openclip:qqqq/openai", r"has no 'qqqq'; open_clip.list_models\(\) gives its names"),
        ("openclip:ViT-B-32/laion2b_s34b", r"none of open_clip's tags for ViT-B-32: .*did you mean laion2b_s34b_b79k"),
        ("openclip:local-dir:/no/such", "there is no folder /no/such"),
        ("openclip:local-dir:EMPTY", "holds no open_clip_config.json"),
        ("openclip:", "names nothing after 'openclip'"),
        ("openclip:local-dir:", "names nothing after 'openclip:local-dir'"),
        ("transformers:", "names nothing after 'transformers'"),
        ("transformers:/no/such", "there is no folder /no/such"),
        ("transformers:bert", "there is no folder bert"),
        ("transformers:EMPTY", "holds no config.json"),
        ("open_clip:ViT-B-32/openai", r"begins with 'open_clip:'; did you mean 'openclip:'\?"),
        ("transformer:a/b", r"did you mean 'transformers:'\?"),
        ("no/such/model", "no checkpoint at 'no/such/model'"),
    ],
)
def test_names_of_nothing_are_told_with_what_is_near(tmp_path, name, says):
    with pytest.raises(ValueError, match=says):
        open_model(name.replace("EMPTY", str(tmp_path)), "cpu")


@pytest.mark.parametrize("name", ["tiny", "openclip:tiny/x", "transformers:a/b", "python:a:b"])
def test_a_device_that_is_none_is_refused_first(name):
    with pytest.raises(ValueError, match="no checkpoint" if name == "tiny" else "'gpu' is no device"):
        open_model(name, "cpu" if name == "tiny" else "gpu")


def test_the_weights_of_another_architecture_are_open_clips_error_with_the_name(tmp_path):
    save_file(openclip_twin("tiny-resnet").state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r"open_clip can't load 'openclip:tiny/.*resnet.safetensors': .*state_dict"):
        open_model(f"openclip:tiny/{tmp_path / 'resnet.safetensors'}")


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"visual.proj": Bomb()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="open_clip can't load"):
        open_model(f"openclip:tiny/{tmp_path / 'weights.pt'}")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name, module, package",
    [
        ("openclip:ViT-B-32/openai", "open_clip", "open_clip_torch"),
        ("transformers:a/b", "transformers", "transformers"),
    ],
)
def test_a_library_that_is_missing_is_named_with_the_command_that_brings_it(monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"needs {module}: pip install {package}"):
        open_model(name)


def test_the_resnets_vision_config_is_no_obstacle():
    vision = VisionConfig(kind="resnet", image_size=64, width=4, blocks=(1, 1, 1, 1))
    found = ours(tiny_clip(vision=vision))
    assert torch.equal(found.encode_pooled(batch(found)), found.encode_image(batch(found)))
    assert None not in fingerprints(found)
