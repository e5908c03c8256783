"""CLIP: two networks, the towers, map images and texts to one space.

"The paper" is Radford et al. 2021, https://arxiv.org/abs/2103.00020.

Read from top to bottom: attention, block, transformer, the two towers, CLIP. Parameters have the names of OpenAI's
code, so its weights fit. One thing differs from OpenAI's code and gives the same result: each tower's output is one
token (an image's class token, a text's end-of-text token), so the last block computes queries, hidden layer and norm
for that token alone; `pool` (B,) is its index in each row. A call into `fast/` computes what the comment beside it
says, with less work; this file is complete without them.

B batch, N tokens of a tower (1 + patches, or L text tokens), D width of a tower, H heads, E embedding, R resolution
(height and width of the images). `CLIP`'s methods count N images and M texts, or N texts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common.arguments import shown
from .common.tensors import check_tensor
from .config import Activation, CLIPConfig, TextConfig, VisionConfig
from .fast import folded, matmul, packed_texts
from .fast.plain import is_asked, is_unobserved
from .resnet import ModifiedResNet
from .timm_tower import TimmTower

# From (q, k, v, is_causal, pool) to the output of all heads; `dot_product_attention` below gives the shapes.
Attend = Callable[[Tensor, Tensor, Tensor, bool, Tensor | None], Tensor]


def pick(x: Tensor, index: Tensor) -> Tensor:
    """Row b's token at index[b]: (B, N, D), (B,) -> (B, D). A single row serves every index: (1, N, D), (B,) -> (B, D).

    That is x[torch.arange(B), index], whose gradient would be summed in any order if there are several threads.
    """
    B, N, _ = x.shape
    return x.flatten(0, 1).index_select(0, torch.arange(B, device=x.device) * N + index)


def dot_product_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, pool: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / √(D/H)) v in each head (Vaswani et al. 2017, equation 1).

    Keys and values are (B, N, H, D/H), and so are queries; with `pool` (B,), the only query of a row is the token at
    that index: (B, 1, H, D/H). Returns (B, N or 1, D). If `is_causal`, a token sees itself and the tokens before it.
    """
    visible = None
    if is_causal and pool is not None:
        visible = (torch.arange(k.shape[1], device=k.device) <= pool[:, None])[:, None, None]  # (B, 1, 1, N)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # (B, H, N or 1, D/H)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=is_causal and pool is None)
    return y.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2); one matrix (3 D, D) gives queries, keys and values.

    Args:
        is_causal: a token sees itself and the tokens before it only.
    """

    def __init__(self, width: int, heads: int, is_causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.is_causal = is_causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, pool: Tensor | None = None, attend: Attend = dot_product_attention) -> Tensor:
        """(B, N, D) -> (B, N, D), or with `pool` (B,) the token at that index alone: -> (B, 1, D)."""
        D = x.shape[2]
        weight, bias, heads = self.in_proj_weight, self.in_proj_bias, (self.heads, D // self.heads)
        if pool is None:
            q, k, v = matmul.linear(x, weight, bias).unflatten(2, (3, *heads)).unbind(2)  # (B, N, H, D/H)
        else:
            q_bias, kv_bias = (None, None) if bias is None else (bias[:D], bias[D:])
            q = matmul.linear(pick(x, pool), weight[:D], q_bias).unflatten(1, (1, *heads))  # (B, 1, H, D/H)
            k, v = matmul.linear(x, weight[D:], kv_bias).unflatten(2, (2, *heads)).unbind(2)
        return matmul.layer(self.out_proj, attend(q, k, v, self.is_causal, pool))  # out_proj(attend(…))


class QuickGELU(nn.Module):
    """The approximation of GELU that OpenAI's models were trained with, x * sigmoid(1.702 * x)."""

    slope = 1.702

    def forward(self, x: Tensor) -> Tensor:
        # silu(x) = x * sigmoid(x) keeps one tensor for the gradient, where the formula would keep two.
        return F.silu(self.slope * x).div_(self.slope)


class MLP(nn.Module):
    """Two layers with an activation between, applied to each token (Vaswani et al. 2017, section 3.3)."""

    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.activation = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.activation) is QuickGELU:  # the same as below
            return folded.quick_gelu_mlp(self.c_fc, self.activation, self.c_proj, self.activation.slope, x)
        return matmul.layer(self.c_proj, self.activation(matmul.layer(self.c_fc, x)))  # c_proj(activation(c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Activation, is_causal: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, is_causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), activation)

    def forward(self, x: Tensor, pool: Tensor | None = None, attend: Attend = dot_product_attention) -> Tensor:
        """(B, N, D) -> (B, N, D), or with `pool` (B,) the token at that index alone: -> (B, 1, D)."""
        attended = self.attn(self.ln_1(x), pool, attend)
        x = attended + (x if pool is None else pick(x, pool)[:, None])
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, config: VisionConfig | TextConfig, activation: Activation, is_causal: bool) -> None:
        super().__init__()
        width, heads, ratio = config.width, config.heads, config.mlp_ratio
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, ratio, activation, is_causal) for _ in range(config.layers)
        )

    def forward(self, x: Tensor, pool: Tensor | None = None, attend: Attend = dot_product_attention) -> Tensor:
        """(B, N, D) -> (B, N, D), or with `pool` (B,) the last block's output for that token alone: -> (B, D)."""
        *blocks, last = self.resblocks
        options = () if attend is dot_product_attention else (None, attend)  # a plain block is called as block(x)
        for block in blocks:
            x = block(x, *options)
        return last(x, *options) if pool is None else last(x, pool, attend)[:, 0]


def project(x: Tensor, matrix: Tensor | None) -> Tensor:
    """To the shared space, or not at all where somebody took the projection away: (B, D) -> (B, E or D)."""
    return x if matrix is None else x @ matrix


class VisionTransformer(nn.Module):
    """The image tower: patches and a class token through a transformer (Dosovitskiy et al. 2020; paper section 2.4)."""

    def __init__(self, config: VisionConfig, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        D = config.width
        self.input_resolution = config.image_size
        self.conv1 = nn.Conv2d(3, D, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        # OpenAI initialises both embeddings with std D**-0.5. Patches leave conv1 at about 0.6 times the size of the
        # pixels, so positions would be too faint to learn from early on. 0.5 matches the patches (docs/log.md).
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(D), std=0.5))
        self.positional_embedding = nn.Parameter(nn.init.normal_(torch.empty(1 + config.num_patches, D), std=0.5))
        self.ln_pre = nn.LayerNorm(D)
        self.transformer = Transformer(config, activation, is_causal=False)
        self.ln_post = nn.LayerNorm(D)
        self.proj = nn.Parameter(nn.init.normal_(torch.empty(D, embed_dim), std=D**-0.5))

    def forward(self, images: Tensor, all_tokens: bool = False) -> Tensor:
        """Normalised images (B, 3, R, R) -> (B, E).

        With `all_tokens` -> (B, 1 + patches, D): class token, then patches row by row, normed but not projected
        (`@ proj` takes them to the shared space).
        """
        B = images.shape[0]
        x = folded.patches(self.conv1, images)  # conv1(images).flatten(2).mT, (B, patches, D)
        x = torch.cat([self.class_embedding.expand(B, 1, -1), x], dim=1) + self.positional_embedding  # (B, N, D)
        x = self.ln_pre(x)
        if is_asked(all_tokens):
            return self.ln_post(self.transformer(x))
        if not is_unobserved(self, images):  # a hook, or an export, gets every token in every block
            options = {"pool": None} if isinstance(self.transformer, Transformer) else {}
            return project(self.ln_post(self.transformer(x, **options))[:, 0], self.proj)
        class_token = torch.zeros(B, dtype=torch.long, device=x.device)
        return project(self.ln_post(self.transformer(x, pool=class_token)), self.proj)


class TextLayout(Protocol):
    """How a batch of texts lies in `tokens`: a row each (`Rectangle`), or one after another in a single row.

    positions: of each token in its text. ends: (B,), the index of each text's end-of-text token in its row. attend: the
    attention that lets a token see its own text alone.
    """

    @property
    def positions(self) -> Tensor: ...
    @property
    def ends(self) -> Tensor: ...
    @property
    def attend(self) -> Attend: ...


class Rectangle(NamedTuple):
    """The plain layout: each text a row, padded at its end to (B, L)."""

    positions: Tensor  # (L,)
    ends: Tensor  # (B,)
    attend: Attend = dot_product_attention

    @classmethod
    def of(cls, tokens: Tensor, eot_token: int | None) -> Rectangle:
        # The first end token, not the largest id: added tokens may have larger ids, and some tokenizers pad with it.
        ends = (tokens.int() if eot_token is None else (tokens == eot_token).int()).argmax(dim=1)
        return cls(torch.arange(tokens.shape[1], device=tokens.device), ends)


class TextTransformer(nn.Module):
    """The text tower: a causal transformer read at the end-of-text token (paper section 2.4)."""

    def __init__(self, config: TextConfig, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        D = config.width
        self.eot_token = config.eot_token
        self.token_embedding = nn.Embedding(config.vocab_size, D)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, D))
        self.transformer = Transformer(config, activation, is_causal=True)
        self.ln_final = nn.LayerNorm(D)
        self.text_projection = nn.Parameter(torch.empty(D, embed_dim))
        # OpenAI's token and position embeddings both begin near 0.02, so small that the residual branches drown them.
        # With tokens that stand out, a tower learns their meaning in fewer steps (docs/log.md).
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        nn.init.normal_(self.positional_embedding, std=0.05)
        # As in OpenAI's code, a deeper stack starts with smaller residuals (Radford et al. 2019, section 2.3), and only
        # the text tower's blocks do: the image tower's keep the initialisation of their modules.
        nn.init.normal_(self.text_projection, std=D**-0.5)
        residual_std = D**-0.5 * (2 * config.layers) ** -0.5
        for block in self.transformer.resblocks:
            assert isinstance(block, ResidualAttentionBlock)
            nn.init.normal_(block.attn.in_proj_weight, std=D**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * D) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def forward(self, tokens: Tensor, all_tokens: bool = False, layout: TextLayout | None = None) -> Tensor:
        """Token ids (B, L), L up to the context length -> (B, E).

        With `all_tokens` -> (B, L, D): every token normed but not projected (what diffusion models condition on).
        `layout` describes tokens that do not lie in a row a text: `fast.packed_texts` puts all into one, (1, L).

        Raises:
            ValueError: (on the CPU) a row whose embedding is asked for has no end-of-text token.
        """
        if not (layout or all_tokens):
            packed_texts.check_ends(tokens, self.eot_token)
        texts: TextLayout = layout or Rectangle.of(tokens, self.eot_token)
        x = self.token_embedding(tokens) + F.embedding(texts.positions, self.positional_embedding)  # (B, L, D)
        if all_tokens or not (layout or is_unobserved(self, tokens)):
            x = self.ln_final(self.transformer(x, attend=texts.attend) if layout else self.transformer(x))
            return x if all_tokens else project(pick(x, texts.ends), self.text_projection)
        return project(self.ln_final(self.transformer(x, texts.ends, texts.attend)), self.text_projection)


class MissingTower(nn.Module):
    """Stands for the tower that a checkpoint of the other one alone does not have."""

    def __init__(self, name: str, input_resolution: int) -> None:
        super().__init__()
        self.name, self.input_resolution = name, input_resolution

    def forward(self, x: Tensor, all_tokens: bool = False, layout: TextLayout | None = None) -> Tensor:
        raise ValueError(f"this model has no {self.name} tower: it comes from a checkpoint of the other one alone")


class CLIP(nn.Module):
    """Two towers and the scale of their logits; for the sigmoid loss a bias as well (`logit_bias`, else None).

    A logit is exp(logit_scale) * cosine + logit_bias, for an image and a text; the scale is learnt as its logarithm, as
    in OpenAI's code, and is the inverse of the softmax's temperature.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        if not isinstance(config, CLIPConfig):
            raise ValueError(f"config is {shown(config)}; it must be a CLIPConfig, and `load` takes names and paths")
        self.config = config
        self.visual: VisionTransformer | ModifiedResNet | TimmTower | MissingTower
        self.text: TextTransformer | MissingTower
        if config.towers == "text":
            self.visual = MissingTower("image", config.vision.image_size)
        elif config.vision.kind == "vit":
            self.visual = VisionTransformer(config.vision, config.embed_dim, config.activation)
        elif config.vision.kind == "resnet":
            self.visual = ModifiedResNet(config.vision, config.embed_dim)
        else:
            self.visual = TimmTower(config.vision, config.embed_dim)
        if config.towers == "image":
            self.text = MissingTower("text", config.vision.image_size)
        else:
            self.text = TextTransformer(config.text, config.embed_dim, config.activation)
        self.context_length = config.text.context_length
        self.vocab_size = config.text.vocab_size
        # `fast.packed_texts.encode` leaves a multiple of this many columns; torch.compile sets it, to see few shapes.
        self.text_length_multiple = 1
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        # The wordings of the captions that it was trained on (`data/wordings/`), if known; saved with the weights.
        self.wordings: Any = None

    @property
    def dtype(self) -> torch.dtype:
        return self.logit_scale.dtype

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Normalised images (N, 3, R, R) -> features (N, E), of unit length if `normalize`.

        Raises:
            ValueError: no tensor, another shape, or integers (pixels that `preprocess` has not seen).
        """
        self.check_images(images)
        features = self.visual(images.to(self.dtype))
        return self._unit(features) if normalize else features

    def check_images(self, images: Tensor) -> None:
        """Raises the ValueError of `encode_image`."""
        check_tensor("images", images, "floats", "pixels normalised as the model's preprocess does")
        R = getattr(self.visual, "input_resolution", None)  # a tower of one's own need not have one
        if images.ndim != 4 or images.shape[1:] != (3, *((R, R) if R else images.shape[2:])):
            raise ValueError(
                f"images have the shape {tuple(images.shape)}; this model takes (N, 3, {R or 'H'}, {R or 'W'})"
            )

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (N, L), L up to the context length -> features (N, E), of unit length if `normalize`.

        Padding costs nothing (`fast.packed_texts.encode`), unless the ids are on a GPU.

        Raises:
            ValueError: no tensor of ids, another shape, or (on the CPU) a row without an end-of-text token or an id
                without an embedding.
        """
        self.check_tokens(tokens)
        # self.text(tokens), computed without the padding
        features = packed_texts.encode(
            self.text, tokens, self.config.text.eot_token, self.logit_scale.device, self.text_length_multiple
        )
        return self._unit(features) if normalize else features

    def check_tokens(self, tokens: Tensor) -> None:
        """Raises the ValueErrors of `encode_text` about type and shape."""
        check_tensor("tokens", tokens, "whole numbers", "token ids, as `miniclip.tokenize` makes of texts")
        if tokens.ndim != 2 or tokens.shape[1] > self.context_length:
            raise ValueError(
                f"tokens have the shape {tuple(tokens.shape)}; this model takes (N, L) with L at most the context "
                f"length {self.context_length}"
            )

    def _unit(self, features: Tensor) -> Tensor:
        """Features scaled to unit length, in the parameters' precision even where autocast left a lower one."""
        wide = features.to(torch.promote_types(self.dtype, torch.float32))
        return F.normalize(wide, dim=-1).to(self.dtype)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 3, R, R), tokens (M, L) -> scaled cosines (N, M), plus any bias, and their transpose (M, N)."""
        image_features = self.encode_image(images, normalize=True)
        text_features = self.encode_text(tokens, normalize=True)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.T
        if self.logit_bias is not None:
            logits_per_image = logits_per_image + self.logit_bias
        return logits_per_image, logits_per_image.T
