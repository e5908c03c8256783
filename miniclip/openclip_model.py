"""open_clip's model in our code: its names, keys, shapes and conventions, over the modules of `openai`.

Differences from `openai`: transformers take (B, N, D) and their mask as an argument, calling a model gives unit
features and the exponentiated scale, image towers may be timm's. N tokens, B batch, D width, E embedding, R resolution.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import openai
from .config import Activation, CLIPConfig, TextConfig, VisionConfig
from .model import pick, project
from .timm_tower import TimmTower


class ResidualAttentionBlock(openai.ResidualAttentionBlock):
    """(B, N, D) -> (B, N, D)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Activation) -> None:
        super().__init__(width, heads, activation=activation, mlp_ratio=mlp_ratio)
        self.attn.batch_first = True
        for name in ("ln_1", "attn", "ln_2", "mlp"):  # in this order, as optimizers' states count parameters
            self._modules[name] = self._modules.pop(name)

    def get_weight_dtype(self) -> torch.dtype:
        weight: Any = self.mlp.c_fc.weight
        return weight.dtype if isinstance(weight, Tensor) else torch.float32  # of a quantized layer, a function

    def attention(self, q_x: Tensor, *, attn_mask: Tensor | None = None) -> Tensor:
        mask = None if attn_mask is None else attn_mask.to(q_x.dtype)
        return self.attn(q_x, q_x, q_x, need_weights=False, attn_mask=mask)[0]

    def forward(self, q_x: Tensor, *, attn_mask: Tensor | None = None) -> Tensor:
        x = q_x + self.attention(self.ln_1(q_x), attn_mask=attn_mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """(B, N, D) -> (B, N, D)."""

    batch_first = True

    def __init__(self, config: VisionConfig | TextConfig, activation: Activation) -> None:
        super().__init__()
        self.width, self.layers, self.grad_checkpointing = config.width, config.layers, False
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(config.width, config.heads, config.mlp_ratio, activation)
            for _ in range(config.layers)
        )

    def get_cast_dtype(self) -> torch.dtype:
        block: Any = self.resblocks[0]
        return block.get_weight_dtype()

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attn_mask=attn_mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=attn_mask)
        return x


class VisionTransformer(openai.VisionTransformer):
    """(B, 3, R, R) -> (B, E); with `output_tokens` also the patches (B, N - 1, D), normed and not projected."""

    def __init__(self, config: VisionConfig, embed_dim: int, activation: Activation) -> None:
        super().__init__(config.image_size, config.patch_size, config.width, 0, config.heads, embed_dim)
        self.transformer = Transformer(config, activation)  # type: ignore[assignment]
        self.output_tokens = False
        side = config.image_size // config.patch_size
        self.image_size, self.grid_size = (config.image_size, config.image_size), (side, side)
        self.patch_size = (config.patch_size, config.patch_size)

    def forward(self, x: Tensor) -> Any:
        x = self.conv1(x).flatten(2).transpose(1, 2)  # (B, patches, D)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)  # (B, N, D)
        x = self.ln_post(self.transformer(self.ln_pre(x + self.positional_embedding.to(x.dtype))))
        pooled = project(x[:, 0], self.proj)
        return (pooled, x[:, 1:]) if self.output_tokens else pooled


class CLIP(openai.CLIP):
    """open_clip's model: the text tower's parts stand at its top, beside `visual`.

    Called with images (B, 3, R, R), token ids (B, N) or both, it gives unit features (B, E) of each, None for what is
    not there, the exponentiated scale, and the bias of the logits if there is one; with `output_dict` by their names.
    """

    visual: Any
    transformer: Any
    attn_mask: Tensor

    def __init__(self, config: CLIPConfig, output_dict: bool = False) -> None:
        vision, text = config.vision, config.text
        sizes = (text.context_length, text.vocab_size, text.width, text.heads)
        super().__init__(config.embed_dim, vision.image_size, 0, 64, vision.image_size, *sizes, 0)  # without blocks
        self.config, self.output_dict = config, output_dict
        self.visual = _image_tower(config)
        self.visual.output_dim = config.embed_dim
        self.visual.preprocess_cfg = _preprocess_cfg(vision)
        self.visual.image_mean, self.visual.image_std = vision.mean, vision.std
        self.transformer = Transformer(text, config.activation)
        self.register_buffer("attn_mask", self.build_attention_mask(), persistent=False)
        bias = config.init_logit_bias
        self.logit_scale.data.fill_(config.init_logit_scale)
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self.initialize_parameters()

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.get_cast_dtype()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Of the transformers: their blocks are computed again for the gradient, which saves memory."""
        for module in self.modules():
            if isinstance(module, Transformer):
                module.grad_checkpointing = enable

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        features = self.visual(image.to(_input_dtype(self.visual, image.dtype)))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(B, N) -> (B, E), read at each row's largest id, which is the end of text."""
        N, dtype = text.shape[1], self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype) + self.positional_embedding[:N].to(dtype)  # (B, N, D)
        x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask[:N, :N]))
        features = project(pick(x, text.argmax(dim=-1)), self.text_projection)
        return F.normalize(features, dim=-1) if normalize else features

    def get_logits(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled cosines (B, M) plus any bias, and their transpose, as calling ours and OpenAI's models gives."""
        image_features, text_features = self.encode_image(image, normalize=True), self.encode_text(text, normalize=True)
        logits = self.logit_scale.exp() * image_features @ text_features.T
        logits = logits if self.logit_bias is None else logits + self.logit_bias
        return logits, logits.T

    def forward(self, image: Tensor | None = None, text: Tensor | None = None) -> Any:
        outputs = {
            "image_features": None if image is None else self.encode_image(image, normalize=True),
            "text_features": None if text is None else self.encode_text(text, normalize=True),
            "logit_scale": self.logit_scale.exp(),
        }
        if self.logit_bias is not None:
            outputs["logit_bias"] = self.logit_bias
        return outputs if self.output_dict else tuple(outputs.values())


def _input_dtype(tower: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """What an image tower computes its first convolution in."""
    weights = (each for each in tower.parameters() if each.ndim == 4 and each.is_floating_point())
    return next((each.dtype for each in weights), otherwise)


def _image_tower(config: CLIPConfig) -> nn.Module:
    vision, R = config.vision, config.vision.image_size
    if vision.kind == "vit":
        return VisionTransformer(vision, config.embed_dim, config.activation)
    if vision.kind == "timm":
        tower: Any = TimmTower(vision, config.embed_dim)
        tower.image_size = (R, R)
        return tower
    tower = openai.ModifiedResNet(vision.blocks, config.embed_dim, vision.heads, R, vision.width)
    tower.image_size = R  # a number for this tower, as open_clip's
    return tower


def _preprocess_cfg(vision: VisionConfig) -> dict[str, Any]:
    size = vision.image_size if vision.kind == "resnet" else (vision.image_size, vision.image_size)
    return {
        "size": size,
        "mode": "RGB",
        "mean": vision.mean,
        "std": vision.std,
        "interpolation": vision.interpolation,
        "resize_mode": vision.resize,
        "fill_color": 0,
    }
