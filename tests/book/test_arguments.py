"""Arguments of another kind than the book's functions take: each error names what was given and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import miniclip
from miniclip.config import CLIPConfig, TextConfig, VisionConfig
from miniclip.model import CLIP
from miniclip.weights.load import preprocess_for

CONFIG = CLIPConfig(
    embed_dim=32,
    vision=VisionConfig(image_size=32, patch_size=8, width=64, layers=1),
    text=TextConfig(width=64, layers=1, context_length=16),
)
MODEL = CLIP(CONFIG).eval()
TOKENS = miniclip.tokenize("a cat", context_length=16)
IMAGES = torch.zeros(2, 3, 32, 32)
ROWS = torch.ones(4, 5)

# The call, its argument, and what the error says of it.
WRONG: list[tuple[Callable[[Any], Any], Any, str]] = [
    (MODEL.encode_image, "x.png", "images is 'x.png'; it must be a tensor, pixels normalised as the model"),
    (MODEL.encode_image, None, "images is None; it must be a tensor"),
    (MODEL.encode_image, Image.new("RGB", (32, 32)), "images is a Image; it must be a tensor"),
    (MODEL.encode_image, [IMAGES[0]], "images is a list; it must be a tensor"),
    (MODEL.encode_image, IMAGES.numpy(), "images is a ndarray; it must be a tensor"),
    (MODEL.encode_image, IMAGES.to(torch.uint8), "images is of torch.uint8; it must be of floats"),
    (MODEL.encode_image, IMAGES.to(torch.complex64), "images is of torch.complex64; it must be of floats"),
    (MODEL.encode_image, IMAGES[0], "images have the shape (3, 32, 32); this model takes (N, 3, 32, 32)"),
    (MODEL.encode_image, torch.zeros(1, 3, 64, 64), "shape (1, 3, 64, 64); this model takes (N, 3, 32, 32)"),
    (MODEL.encode_text, "a cat", "tokens is 'a cat'; it must be a tensor, token ids, as `miniclip.tokenize` makes"),
    (MODEL.encode_text, [[1, 2]], "tokens is a list; it must be a tensor"),
    (MODEL.encode_text, TOKENS.float(), "tokens is of torch.float32; it must be of whole numbers"),
    (MODEL.encode_text, TOKENS.bool(), "tokens is of torch.bool; it must be of whole numbers"),
    (MODEL.encode_text, TOKENS[0], "tokens have the shape (16,); this model takes (N, L)"),
    (MODEL.encode_text, torch.tensor([[60_000, 49_407]]), "ids are 49407 to 60000; some of them have no embedding"),
    (MODEL.encode_text, torch.tensor([[-5, 49_407]]), "ids are -5 to 49407; some of them have no embedding"),
    (lambda value: miniclip.text_states(MODEL, value), "a cat", "tokens is 'a cat'; it must be a tensor"),
    (miniclip.tokenize, 3, "a text or a sequence of texts, not 3"),
    (lambda value: miniclip.tokenize("a cat", value), "77", "context_length is '77'; it must be a whole number"),
    (lambda value: miniclip.tokenize("a cat", value), 1, "context_length is 1; it must be a whole number of at least"),
    (preprocess_for(CONFIG), "x.png", "image is 'x.png'; it must be a picture of Pillow's"),
    (preprocess_for(CONFIG), np.zeros((8, 8, 3)), "image is a ndarray; it must be a picture of Pillow's"),
    (CLIP, "ViT-B/32", "config is 'ViT-B/32'; it must be a CLIPConfig"),
    (lambda value: CLIPConfig(vision=value), {}, "CLIPConfig.vision is {}; it must be a VisionConfig"),
    (lambda value: CLIPConfig(text=value), CONFIG.vision, "it must be a TextConfig"),
    (miniclip.load, None, "name is None; it must be a path"),
    (lambda value: miniclip.load("ViT-B/32", download_root=value), 3, "download_root is 3; it must be a path"),
    (miniclip.from_pretrained, 3, "name is 3; it must be a path"),
    (lambda value: miniclip.zero_shot_classifier(value, ["cat"], ["a {}"]), "ViT-B/32", "model is 'ViT-B/32'; it must"),
    (lambda value: miniclip.clip_loss(value, ROWS, 1.0), None, "image_features is None; it must be a tensor"),
    (lambda value: miniclip.clip_loss(ROWS, value, 1.0), ROWS.numpy(), "text_features is a ndarray; it must be"),
    (lambda value: miniclip.clip_loss(value, value, 1.0), ROWS.long(), "image_features is of torch.int64"),
    (lambda value: miniclip.clip_loss(ROWS, ROWS, value), "1", "logit_scale is '1'; it must be a number"),
    (lambda value: miniclip.clip_loss(ROWS, ROWS, value), torch.ones(4), "logit_scale is a Tensor; it must be"),
    (lambda value: miniclip.clip_loss(ROWS, ROWS, 1.0, value), "2", "chunk_size is '2'; it must be a whole number"),
    (lambda value: miniclip.clip_loss(ROWS, ROWS, 1.0, mask=value), [True] * 4, "mask is a list; it must be a tensor"),
    (lambda value: miniclip.clip_loss(ROWS, ROWS, 1.0, mask=value), torch.ones(4), "mask is of torch.float32"),
    (lambda value: miniclip.clip_loss(ROWS, ROWS, 1.0, groups=value), [0] * 4, "groups is a list; it must be a tensor"),
    (lambda value: miniclip.siglip_loss(ROWS, ROWS, 1.0, value), "0", "logit_bias is '0'; it must be a number"),
    (lambda value: miniclip.save(value, Path("x")), "x", "model is 'x'; it must be a CLIP"),
]  # fmt: skip


@pytest.mark.parametrize("call, argument, message", WRONG)
def test_an_argument_of_another_kind_is_named_with_what_is_allowed(
    call: Callable[[Any], Any], argument: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(argument)
