"""Features, loss and gradient of the same pairs and weights: by either library, on either device, in any precision."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import peers
import samples
import steps
import torch
from contenders import OURS
from open_clip.loss import ClipLoss
from torch import Tensor

import miniclip
from miniclip.config import CLIPConfig
from miniclip.fast.packed_texts import trim_text
from miniclip.images import normalize
from miniclip.weights.layouts import from_openai_keys

CPU = torch.device("cpu")


class Way(NamedTuple):
    """A library, a device and a precision ("bf16" is autocast over float32)."""

    who: str
    where: torch.device
    precision: str

    def __str__(self) -> str:
        return f"{self.who}, {self.where.type}, {self.precision}"


def outcome(way: Way, model: Any, config: CLIPConfig, count: int) -> dict[str, Tensor]:
    """Both towers' features of random pairs, their loss, and its gradient over all weights but the scale.

    `model` is a float32 model of the library `way.who` on the CPU; a copy of it does the work.
    """
    matrices = {"tf32": "high"}.get(way.precision, "highest")
    dtype = torch.float64 if way.precision == "fp64" else torch.float32
    texts, before = samples.captions(count), (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)
    images = normalize(steps.pixels(config, count), config.vision.mean, config.vision.std).to(way.where, dtype)
    model = copy.deepcopy(model).train().to(way.where, dtype)
    try:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = matrices == "high"  # convolutions have their own switch, on by default
        with torch.autocast(way.where.type, torch.bfloat16, enabled=way.precision == "bf16"):
            if way.who == OURS:
                tokens = miniclip.tokenize(texts)
                if way.where.type != "cpu":  # the host cuts batches to their longest text
                    tokens = trim_text(tokens, config.text.eot_token).to(way.where)
                of_images = model.encode_image(images, normalize=True)
                of_texts = model.encode_text(tokens, normalize=True)
                loss = miniclip.clip_loss(of_images, of_texts, model.logit_scale.exp(), chunk_size=max(1, count // 2))
            else:
                tokens = peers.open_clip.get_tokenizer("ViT-B-32")(texts).to(way.where)
                of_images, of_texts, scale = model(images, tokens)
                loss = ClipLoss()(of_images, of_texts, scale)
        loss.backward()
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    parameters = dict(model.named_parameters())
    parameters = parameters if way.who == OURS else from_openai_keys(parameters)
    gradients = [parameters[name].grad for name in sorted(parameters) if name != "logit_scale"]
    found = {
        "image features": of_images,
        "text features": of_texts,
        "loss": loss,
        "gradient": torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]),
    }
    return {name: tensor.detach().to(CPU, torch.float64) for name, tensor in found.items()}
