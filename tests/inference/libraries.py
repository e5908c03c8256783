"""Random models as each library keeps them, and the features that the library itself gives: the oracle of the verbs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import transformers
from foreign_models import openclip_model, openclip_settings, randomised, write_archive
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.model import CLIP
from miniclip.weights.load import load, save
from miniclip.weights.write import vocabulary_files

CONFIG = CLIPConfig(
    24,
    "quick_gelu",
    VisionConfig(image_size=24, patch_size=8, width=64, layers=2),
    TextConfig(context_length=16, width=64, layers=2),
)
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
WORDS = ["<pad>", "<unk>", "<eos>", "a", "picture", "of", "cat", "dog", ".", "two", "red"]


@dataclass(frozen=True)
class Library:
    """A model, by the name that commands take, and its library's own features (N, E) of files and of texts.

    Each is of unit length. `scale` multiplies cosines for the softmax.
    """

    name: str
    of_images: Callable[[list[Path]], np.ndarray]
    of_texts: Callable[[list[str]], np.ndarray]
    scale: float


def ours(folder: Path) -> Library:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save(randomised(CLIP(CONFIG), 0), folder / "ours")
    model, preprocess = load(folder / "ours", "cpu")
    return _like_openclip(str(folder / "ours"), model, preprocess, _openclip_tokens)


def openclip(folder: Path) -> Library:
    folder = folder / "openclip"
    folder.mkdir()
    settings = {"model_cfg": openclip_settings(CONFIG), "preprocess_cfg": {"mean": [0.4] * 3, "std": [0.3] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(openclip_model(CONFIG).state_dict(), folder / "open_clip_model.safetensors")
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    return _like_openclip(
        f"openclip:local-dir:{folder}", model.eval(), preprocess, open_clip.get_tokenizer(f"local-dir:{folder}")
    )


def openai(folder: Path) -> Library:
    """OpenAI's archive, run by open_clip with OpenAI's preprocessing."""
    model = openclip_model(CONFIG, seed=1)
    write_archive(model, CONFIG, folder / "openai.pt")
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    preprocess = open_clip.image_transform(24, is_train=False, mean=mean, std=std)
    return _like_openclip(str(folder / "openai.pt"), model, preprocess, _openclip_tokens)


def _openclip_tokens(texts: list[str]) -> torch.Tensor:
    return open_clip.tokenize(texts, context_length=16)


def _like_openclip(name: str, model: Any, preprocess: Any, tokenize: Any) -> Library:
    @torch.no_grad()
    def of_images(paths: list[Path]) -> np.ndarray:
        return _unit(model.encode_image(torch.stack([preprocess(Image.open(path)) for path in paths])))

    @torch.no_grad()
    def of_texts(texts: list[str]) -> np.ndarray:
        return _unit(model.encode_text(tokenize(texts)))

    return Library(name, of_images, of_texts, float(model.logit_scale.detach().exp()))


def hf_clip(folder: Path) -> Library:
    folder = folder / "hf_clip"
    folder.mkdir()
    for name, content in vocabulary_files(16).items():
        (folder / name).write_text(content)
    text = SIZES | {"vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407}
    text |= {"max_position_embeddings": 16}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=SIZES | {"image_size": 24, "patch_size": 8}, projection_dim=20
    )
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    processor = transformers.CLIPProcessor(images, transformers.AutoTokenizer.from_pretrained(folder))
    return _of_transformers(folder, transformers.CLIPModel, config, processor, padding=True)


def hf_siglip(folder: Path) -> Library:
    folder = folder / "hf_siglip"
    folder.mkdir()
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    tokenize = transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **special)
    text = SIZES | {"vocab_size": len(WORDS), "max_position_embeddings": 16, "pad_token_id": 0, "eos_token_id": 2}
    config = transformers.SiglipConfig(text_config=text, vision_config=SIZES | {"image_size": 24, "patch_size": 8})
    images = transformers.SiglipImageProcessor(size={"height": 24, "width": 24})
    processor = transformers.SiglipProcessor(images, tokenize)
    return _of_transformers(folder, transformers.SiglipModel, config, processor, padding="max_length")


def _of_transformers(folder: Path, kind: Any, config: Any, processor: Any, padding: Any) -> Library:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        randomised(kind(config), 0).save_pretrained(folder)
    processor.save_pretrained(folder)
    model = kind.from_pretrained(folder).eval()

    @torch.no_grad()
    def of_images(paths: list[Path]) -> np.ndarray:
        pictures = [Image.open(path).convert("RGB") for path in paths]
        pixels = processor.image_processor(images=pictures, return_tensors="pt")
        return _unit(model.get_image_features(**pixels).pooler_output)

    @torch.no_grad()
    def of_texts(texts: list[str]) -> np.ndarray:
        words = processor.tokenizer(texts, return_tensors="pt", padding=padding, truncation=True, max_length=16)
        if padding == "max_length":  # SigLIP was trained to attend to padding
            del words["attention_mask"]
        return _unit(model.get_text_features(**words).pooler_output)

    return Library(f"transformers:{folder}", of_images, of_texts, float(model.logit_scale.detach().exp()))


def _unit(features: torch.Tensor) -> np.ndarray:
    return F.normalize(features, dim=-1).numpy()


LIBRARIES = {"ours": ours, "openclip": openclip, "openai": openai, "hf_clip": hf_clip, "hf_siglip": hf_siglip}
