"""CLIP: two towers that map images and texts to one space (Radford et al. 2021, https://arxiv.org/abs/2103.00020).

Read from top to bottom: attention, block, transformer, the two towers, CLIP. Parameters keep the names of OpenAI's
code. Two things are done differently there and come out the same here with less work:

- Only one token of each tower's output is used (the class token; the end-of-text token), so the last block computes
  queries, hidden layer and norm for that token alone.
- Text attends only to what stands before it, so what follows the end-of-text token cannot reach the output. It is cut
  off before the tower runs, and a prompt of 10 tokens costs 10, not 77. On a CPU the texts of a batch are laid one
  behind the other (`pack_text`), so that none is as long as the longest, and what several begin with is computed once;
  elsewhere they stay a rectangle (`trim_text`).

B batch, N tokens of a tower (1 + patches, or L text tokens), D width of a tower, H heads, E embedding, R resolution,
T tokens of all packed texts, U different beginnings of texts among them (a token with all before it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Activation, CLIPConfig, TextConfig, VisionConfig
from .towers import ModifiedResNet, TimmTower, recomputed


class TextLayout(NamedTuple):
    """How packed texts lie in (1, U, D): one behind the other by length, but a beginning that several share only once.

    A token is made of itself and of those before it, so it is the same, in every block, in all texts that begin alike.

    Args:
        groups: how many texts there are of each length, (texts, tokens each).
        positions: (U,) of each token in its text.
        ends: (B,) where among the U each text ends.
        spread: (T,) where among the U each token of all texts is; None where so little is shared that U = T.
        unique: (U,) where among the T each of the U is first; None likewise.
    """

    groups: Sequence[tuple[int, int]]
    positions: Tensor
    ends: Tensor
    spread: Tensor | None = None
    unique: Tensor | None = None


class QuickGELU(nn.Module):
    """The approximation of GELU that OpenAI's models were trained with, x * sigmoid(1.702 * x)."""

    slope = 1.702

    def forward(self, x: Tensor) -> Tensor:
        # Keeps one tensor for the gradient, where the formula would keep two.
        return F.silu(self.slope * x).div_(self.slope)


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values (Vaswani et al. 2017, section 3.2).

    Args:
        is_causal: a token sees itself and those before it only.
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

    def forward(self, x: Tensor, pool: Tensor | None = None, layout: TextLayout | None = None) -> Tensor:
        """All tokens attend: (B, N, D) -> (B, N, D). With `pool` (B,), only the token at that place: -> (B, 1, D).

        With `layout`, of packed texts: (1, U, D) -> (1, U, D). `pool` is then where each one ends: -> (B, 1, D).
        """
        D = x.shape[2]
        weight, bias, heads = self.in_proj_weight, self.in_proj_bias, (self.heads, D // self.heads)
        if pool is None:
            q, k, v = _spread(F.linear(x, weight, bias), layout).unflatten(2, (3, *heads)).unbind(2)  # (B, N, H, D/H)
        else:
            q = F.linear(_pick(x, pool), weight[:D], bias[:D]).unflatten(1, (1, *heads))  # (B, 1, H, D/H)
            k, v = _spread(F.linear(x, weight[D:], bias[D:]), layout).unflatten(2, (2, *heads)).unbind(2)
        is_causal, visible = self.is_causal and pool is None, None
        if layout is not None:  # the end of a text sees all of it
            in_groups = zip(*(_by_group(each, layout.groups) for each in (q, k, v)), strict=True)
            parts = [_attend(q, k, v, is_causal).flatten(0, 1) for q, k, v in in_groups]
            y = parts[0] if len(parts) == 1 else torch.cat(parts)  # which would copy a single one, too
            if pool is None and layout.unique is not None:
                y = y.index_select(0, layout.unique)  # (U, D)
            return self.out_proj(y[None] if pool is None else y[:, None])  # (1, U, D) or (B, 1, D)
        if self.is_causal and pool is not None:
            visible = (torch.arange(k.shape[1], device=x.device) <= pool[:, None])[:, None, None]  # (B, 1, 1, N)
        return self.out_proj(_attend(q, k, v, is_causal, visible))  # (B, N or 1, D)


def _spread(x: Tensor, layout: TextLayout | None) -> Tensor:
    """Packed texts, shared beginnings once (1, U, D) -> all tokens of all texts (1, T, D); anything else as it is."""
    if layout is None or layout.spread is None:
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # for the gradient, a sum over all texts that share it
    return wide.index_select(1, layout.spread).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, visible: Tensor | None = None) -> Tensor:
    """Queries (B, N or 1, H, D/H), keys and values (B, N, H, D/H) -> (B, N or 1, D)."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=is_causal)
    return y.transpose(1, 2).flatten(2)


def _by_group(x: Tensor, groups: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Packed (1, T, …), or one token of each text (B, 1, …) -> of each group (texts, tokens or 1, …)."""
    rows, num_tokens = x.flatten(0, 1), sum(num_texts * length for num_texts, length in groups)
    sizes = [num_texts * length if len(rows) == num_tokens else num_texts for num_texts, length in groups]
    return [part.unflatten(0, (num_texts, -1)) for part, (num_texts, _) in zip(rows.split(sizes), groups, strict=True)]


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.activation = QuickGELU() if activation == "quick_gelu" else nn.GELU()
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled() or not isinstance(self.activation, QuickGELU):
            return self.c_proj(self.activation(self.c_fc(x)))
        if not (_is_plain(self.c_fc) and _is_plain(self.c_proj)):
            return self.c_proj(self.activation(self.c_fc(x)))
        # The same, but that the products take QuickGELU's factors along, for nothing.
        slope = self.activation.slope
        y = torch.addmm(self.c_fc.bias, x.flatten(0, 1), self.c_fc.weight.T, beta=slope, alpha=slope)
        y = torch.addmm(self.c_proj.bias, F.silu(y, inplace=True), self.c_proj.weight.T, alpha=1 / slope)
        return y.view_as(x)


def _is_plain(linear: nn.Linear) -> bool:
    """Whether it does nothing but its product: nobody has put another module in its place, or hooks on it."""
    return type(linear) is nn.Linear and not (linear._forward_hooks or linear._forward_pre_hooks)


class ResidualAttentionBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, activation: Activation, is_causal: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, is_causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), activation)

    def forward(self, x: Tensor, pool: Tensor | None = None, layout: TextLayout | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or with `pool` (B,) the token at that place alone: -> (B, 1, D)."""
        attended = self.attn(self.ln_1(x), pool, layout)
        x = attended + (x if pool is None else _pick(x, pool)[:, None])
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks.

    `checkpoint_activations`, in training: they keep their inputs alone for the gradient.
    """

    checkpoint_activations = False

    def __init__(self, config: VisionConfig | TextConfig, activation: Activation, is_causal: bool) -> None:
        super().__init__()
        width, heads, ratio = config.width, config.heads, config.mlp_ratio
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, ratio, activation, is_causal) for _ in range(config.layers)
        )

    def forward(self, x: Tensor, pool: Tensor | None = None, layout: TextLayout | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D), or with `pool` (B,) the last block's output for that token alone: -> (B, D)."""
        is_recomputed = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for number, block in enumerate(self.resblocks, start=1):
            inputs = (x, None if number < len(self.resblocks) else pool, layout)
            x = recomputed(block, *inputs, within=block) if is_recomputed else block(*inputs)
        return x if pool is None else x[:, 0]


class VisionTransformer(nn.Module):
    """The image tower: patches and a class token through a transformer (Dosovitskiy et al. 2020; paper section 2.4).

    `patch_dropout`: share of the patches that training leaves out.
    """

    patch_dropout = 0.0

    def __init__(self, config: VisionConfig, embed_dim: int, activation: Activation) -> None:
        super().__init__()
        D = config.width
        self.input_resolution = config.image_size
        self.conv1 = nn.Conv2d(3, D, kernel_size=config.patch_size, stride=config.patch_size, bias=False)
        # OpenAI's code starts both at D**-0.5. Patches leave conv1, as PyTorch starts it, at 0.6 times the size of the
        # normalised pixels; beside that, places would be so faint that it takes long to learn what lies where
        # (docs/log.md). 0.5 is of the patches' order.
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
        # Patches that do not overlap are one matrix product, which is faster than a convolution.
        P = self.conv1.kernel_size[0]
        patches = images.unflatten(2, (-1, P)).unflatten(4, (-1, P))  # (B, 3, rows, P, columns, P)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, patches, 3 * P * P)
        x = F.linear(patches, self.conv1.weight.flatten(1))  # (B, patches, D)
        x = torch.cat([self.class_embedding.expand(B, 1, -1), x], dim=1) + self.positional_embedding  # (B, N, D)
        x = self.ln_pre(x)
        if all_tokens:
            return self.ln_post(self.transformer(x))
        if self.training and self.patch_dropout:
            x = drop_patches(x, self.patch_dropout)
        class_token = torch.zeros(B, dtype=torch.long, device=x.device)
        return self.ln_post(self.transformer(x, pool=class_token)) @ self.proj


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
        # OpenAI's code starts them at 0.02 and 0.01, so that a word is hardly told from its place, and what the blocks
        # add outweighs both. With words that stand out a tower learns in fewer steps what they mean (docs/log.md).
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        nn.init.normal_(self.positional_embedding, std=0.05)
        # As in OpenAI's code: deeper stacks start with smaller residuals (Radford et al. 2019, section 2.3). Only
        # the text tower is treated so there; the image tower's blocks keep PyTorch's defaults.
        nn.init.normal_(self.text_projection, std=D**-0.5)
        residual_std = D**-0.5 * (2 * config.layers) ** -0.5
        for block in self.transformer.resblocks:
            assert isinstance(block, ResidualAttentionBlock)
            nn.init.normal_(block.attn.in_proj_weight, std=D**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * D) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def forward(self, tokens: Tensor, all_tokens: bool = False, layout: TextLayout | None = None) -> Tensor:
        """Token ids (B, L), L up to the context length, or packed (1, U) with their `layout` -> (B, E).

        With `all_tokens` -> (B, L, D) or (1, T, D): every token normed but not projected (what diffusion models
        condition on).
        """
        if layout is not None:
            positions = F.embedding(layout.positions, self.positional_embedding)  # (U, D)
            end_of_text = layout.ends  # (B,)
        else:
            positions = self.positional_embedding[: tokens.shape[1]]  # (L, D)
            # The first end token, not the largest id: added tokens may have larger ones, and some pad with it.
            end_of_text = (tokens == self.eot_token).int().argmax(dim=1)  # (B,)
        x = self.token_embedding(tokens) + positions  # (B, L, D) or (1, U, D)
        if all_tokens:
            return _spread(self.ln_final(self.transformer(x, layout=layout)), layout)
        return self.ln_final(self.transformer(x, pool=end_of_text, layout=layout)) @ self.text_projection


class MissingTower(nn.Module):
    """Stands for the tower that a checkpoint of the other one alone does not have."""

    def __init__(self, name: str, input_resolution: int) -> None:
        super().__init__()
        self.name, self.input_resolution = name, input_resolution

    def forward(self, x: Tensor, all_tokens: bool = False, layout: TextLayout | None = None) -> Tensor:
        raise ValueError(f"this model has no {self.name} tower: it comes from a checkpoint of the other one alone")


class CLIP(nn.Module):
    """Two towers and the temperature of their contrast; for the sigmoid loss a bias as well (`logit_bias`, else None).

    `logit_scale` is stored as a logarithm, as OpenAI's; logits are exp(logit_scale) * cosine + logit_bias.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
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
        # Of the columns that encode_text leaves. Above 1 it packs no texts: compiled graphs want few shapes.
        self.text_length_multiple = 1
        self.logit_scale = nn.Parameter(torch.tensor(config.init_logit_scale))
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    @property
    def dtype(self) -> torch.dtype:
        return self.logit_scale.dtype

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Normalised images (N, 3, R, R) -> features (N, E), of unit length if `normalize`.

        Raises:
            ValueError: another shape, or integers (pixels that `preprocess` has not seen).
        """
        self.check_images(images)
        features = self.visual(images.to(self.dtype))
        return self._unit(features) if normalize else features

    def check_images(self, images: Tensor) -> None:
        """Raises the ValueError of `encode_image`."""
        R = self.visual.input_resolution
        if images.ndim != 4 or images.shape[1:] != (3, R, R):
            raise ValueError(f"images have the shape {tuple(images.shape)}; this model takes (N, 3, {R}, {R})")
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}; this model takes floats normalised as its preprocess does")

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (N, L), L up to the context length -> features (N, E), of unit length if `normalize`.

        Ids on the CPU are packed; if the weights are elsewhere, where each length of text would be kernels of its own,
        they are cut to the longest text and moved. Ids on a GPU are taken as they come, since to look at them would
        make it wait; leave them on the CPU, or `trim_text` them there.

        Raises:
            ValueError: another shape, or (on the CPU) a row without an end-of-text token.
        """
        if tokens.ndim != 2 or tokens.shape[1] > self.context_length:
            raise ValueError(
                f"tokens have the shape {tuple(tokens.shape)}; this model takes (N, L) with L at most the context "
                f"length {self.context_length}"
            )
        eot_token, device = self.config.text.eot_token, self.logit_scale.device
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            features = self.text(tokens)
        elif device.type == "cpu" and self.text_length_multiple == 1 and len(tokens):
            packed, layout, places = pack_text(tokens, eot_token)
            features = self.text(packed, layout=layout)[places]
        else:
            features = self.text(trim_text(tokens, eot_token, self.text_length_multiple).to(device))
        return self._unit(features) if normalize else features

    def _unit(self, features: Tensor) -> Tensor:
        """Of unit length, in the parameters' precision even where autocast left the features in a lower one."""
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


def drop_patches(x: Tensor, share: float) -> Tensor:
    """Leaves out a random share of each image's patches (Li et al. 2022, section 3.1): (B, N, D) -> (B, 1 + kept, D).

    The class token, at place 0, stays. Places are drawn by torch's generator of the device, which never waits for it.
    """
    B, N, _ = x.shape
    kept = max(1, round((N - 1) * (1 - share)))
    order = torch.rand(B, N - 1, device=x.device).argsort(dim=1)
    places = F.pad(1 + order[:, :kept], (1, 0))  # (B, 1 + kept)
    return x[torch.arange(B, device=x.device)[:, None], places]


def text_lengths(tokens: Tensor, eot_token: int) -> Tensor:
    """Of each row (N, L) the tokens to its first end-of-text token, with that: (N,).

    Raises:
        ValueError: a row has no end-of-text token.
    """
    is_end = tokens == eot_token
    if not is_end.any(dim=1).all():
        row = int((~is_end.any(dim=1)).nonzero()[0])
        raise ValueError(f"row {row} of the tokens has no end-of-text token ({eot_token}): {tokens[row].tolist()}")
    return is_end.int().argmax(dim=1) + 1


def pack_text(tokens: Tensor, eot_token: int) -> tuple[Tensor, TextLayout, Tensor]:
    """Texts (N, L), N at least 1, each to its first end-of-text token, without padding.

    Returns:
        The tokens (1, U), in which a beginning that several texts share is there once, if that is worth it; how they
        lie; and where each of the N texts is among those of the layout (N,).

    Raises:
        ValueError: a row has no end-of-text token.
    """
    lengths, order = text_lengths(tokens, eot_token).sort(stable=True)
    tokens = tokens[order, : int(lengths[-1])]
    is_seen = torch.arange(tokens.shape[1]) < lengths[:, None]  # (N, L)
    packed, positions, ends = tokens[is_seen], is_seen.nonzero()[:, 1], lengths.cumsum(dim=0) - 1  # (T,), (T,), (N,)
    found, counts = lengths.unique_consecutive(return_counts=True)
    groups = tuple(zip(counts.tolist(), found.tolist(), strict=True))
    layout = TextLayout(groups, positions, ends)
    numbers, spread = _beginnings(tokens)[is_seen].unique(return_inverse=True)  # (U,), (T,)
    if len(numbers) <= _MOST_UNIQUE * len(packed):
        unique = torch.full_like(numbers, len(packed)).scatter_reduce_(0, spread, torch.arange(len(packed)), "amin")
        packed, layout = packed[unique], TextLayout(groups, positions[unique], spread[ends], spread, unique)
    return packed[None], layout, order.argsort()


_MOST_UNIQUE = 7 / 8  # U / T; where less is shared, spreading it costs as much as it saves (docs/log.md)


def _beginnings(tokens: Tensor) -> Tensor:
    """Numbers (N, L), the same where texts (N, L) are the same up to there."""
    rows, which = tokens.unique(
        dim=0, return_inverse=True
    )  # alphabetical, so that those that begin alike are neighbours
    N, L = rows.shape
    is_new = torch.ones(N, L, dtype=torch.bool)
    is_new[1:] = (rows[1:] != rows[:-1]).cumsum(dim=1) > 0
    first = torch.where(is_new, torch.arange(N)[:, None], 0).cummax(dim=0).values  # the row that was first to begin so
    return (first * L + torch.arange(L))[which]


def trim_text(tokens: Tensor, eot_token: int, length_multiple: int = 1) -> Tensor:
    """Cuts the columns (N, L) that no row's first end-of-text token can see, down to a multiple if there are so many.

    Raises:
        ValueError: a row has no end-of-text token.
    """
    if not len(tokens):
        return tokens
    length = int(text_lengths(tokens, eot_token).max())
    return tokens[:, : math.ceil(length / length_multiple) * length_multiple].contiguous()


def _pick(x: Tensor, place: Tensor) -> Tensor:
    """Row b's token at place[b]: (B, N, D), (B,) -> (B, D)."""
    return x[torch.arange(len(x), device=x.device), place]
