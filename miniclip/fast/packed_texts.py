"""Texts without padding: laid one behind the other, with a prefix that several texts share computed once.

A causal token depends on itself and the tokens before it, so it is the same, in every block, in all texts with the
same prefix. Where `model.Rectangle` pads the texts of a batch to (B, L), `pack_text` lays them into (1, U): U tokens of
the T that the texts have in all. Norms, projections and MLPs work token by token and never notice. Attention spreads
the U over the T, goes through the texts by length, and picks the U out again.

B texts, L columns, T tokens of all texts, U distinct prefixes among them, H heads, D width, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plain import is_eager, is_unobserved

_MOST_UNIQUE = 7 / 8  # U / T; above it, spreading costs as much as sharing saves (docs/log.md)


class PackedTexts(NamedTuple):
    """Where packed texts lie in (1, U, D), and how they attend; what `model.Rectangle` is for padded texts.

    Args:
        groups: how many texts there are of each length, (texts, tokens each).
        positions: (U,) of each token in its text.
        ends: (B,) index among the U of each text's end-of-text token.
        spread: (T,) index among the U of each token of all texts; None where U = T.
        unique: (U,) index among the T of the first token with each prefix; None likewise.
    """

    groups: Sequence[tuple[int, int]]
    positions: Tensor
    ends: Tensor
    spread: Tensor | None = None
    unique: Tensor | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, pool: Tensor | None = None) -> Tensor:
        """`model.dot_product_attention`: (1, U, H, D/H) -> (1, U, D), or with `pool` q (B, 1, H, D/H) -> (B, 1, D)."""
        k, v = self.all_tokens(k), self.all_tokens(v)  # (1, T, H, D/H)
        q = self.all_tokens(q) if pool is None else q
        by_length = zip(*(self._by_length(each) for each in (q, k, v)), strict=True)
        # An end-of-text token sees all of its text, so pooled queries need no mask.
        parts = [_attend(q, k, v, is_causal and pool is None) for q, k, v in by_length]
        y = parts[0] if len(parts) == 1 else torch.cat(parts)  # (T or B, D); cat would copy a single part, too
        if pool is not None:
            return y[:, None]
        return (y if self.unique is None else y.index_select(0, self.unique))[None]

    def all_tokens(self, x: Tensor) -> Tensor:
        """(1, U, …) -> (1, T, …)."""
        if self.spread is None:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # its gradient is a sum over texts
        return wide.index_select(1, self.spread).to(x.dtype)

    def _by_length(self, x: Tensor) -> list[Tensor]:
        """(1, T, …), or one token of each text (B, 1, …) -> for each length (texts, tokens or 1, …)."""
        rows, num_tokens = x.flatten(0, 1), sum(texts * length for texts, length in self.groups)
        sizes = [texts * length if len(rows) == num_tokens else texts for texts, length in self.groups]
        return [part.unflatten(0, (texts, -1)) for part, (texts, _) in zip(rows.split(sizes), self.groups, strict=True)]


def _attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """Texts of one length, (texts, tokens, H, D/H) -> (texts * tokens, D)."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2).flatten(2).flatten(0, 1)


def encode(tower: nn.Module, tokens: Tensor, eot_token: int | None, device: torch.device, multiple: int) -> Tensor:
    """tower(tokens.to(device)), without its padding: (B, L) -> (B, E).

    Ids on the CPU are packed for a tower on the CPU. For a tower elsewhere, where each length would need kernels of
    its own, they are cut to the longest text and moved. Ids go in as they are if they are on a GPU (looking at them
    would make the host wait), if somebody observes the tower, or if PyTorch records the operations for later.

    Args:
        multiple: the columns left are a multiple of it, if there are so many. Above 1 nothing is packed: compiled
            graphs want few shapes.

    Raises:
        ValueError: a row of ids on the CPU has no end-of-text token, or one without an embedding.
    """
    if tokens.device.type != "cpu":
        return tower(tokens)
    if not (is_eager(tokens) and is_unobserved(tower, tokens, is_causal=True)):
        if device.type != "cpu":  # where the tower looks at them itself
            check_ends(tokens, eot_token)
        return tower(tokens.to(device))
    try:
        if device.type == "cpu" and multiple == 1 and len(tokens):
            packed, layout, rows = pack_text(tokens, eot_token)
            return tower(packed, layout=layout)[rows]
        return tower(trim_text(tokens, eot_token, multiple).to(device))
    except IndexError as error:  # an embedding's, on the CPU
        least, most = (int(each) for each in tokens.aminmax())
        raise ValueError(f"the tokens' ids are {least} to {most}; some of them have no embedding here") from error


def check_ends(tokens: Tensor, eot_token: int | None) -> None:
    """Raises the ValueError of `text_lengths` where looking at the ids costs nothing: on the CPU, and run eagerly.

    A row of one id alone passes, as tools that explain a text compare it with one of zeros: it is read at its first
    token, where its largest id is as well.
    """
    if eot_token is not None and is_eager(tokens) and tokens.device.type == "cpu" and tokens.numel():
        is_one = tokens.amin(dim=1, keepdim=True) == tokens.amax(dim=1, keepdim=True)
        text_lengths(tokens.masked_fill(is_one, eot_token), eot_token)


def text_lengths(tokens: Tensor, eot_token: int | None) -> Tensor:
    """How many tokens each row (B, L) has up to and including its first end-of-text token: (B,).

    Args:
        eot_token: None for the row's largest id.

    Raises:
        ValueError: a row has no end-of-text token.
    """
    is_end = tokens == (tokens.amax(dim=1, keepdim=True) if eot_token is None else eot_token)
    if not is_end.any(dim=1).all():
        row = int((~is_end.any(dim=1)).nonzero()[0])
        raise ValueError(f"row {row} of the tokens has no end-of-text token ({eot_token}): {tokens[row].tolist()}")
    return is_end.int().argmax(dim=1) + 1


def pack_text(tokens: Tensor, eot_token: int | None) -> tuple[Tensor, PackedTexts, Tensor]:
    """Packs texts (B, L), B at least 1, each up to its first end-of-text token.

    Returns:
        The tokens (1, U), with each shared prefix once if enough is shared; their layout; and the index (B,) of each
        text among those of the layout, which are sorted by length.

    Raises:
        ValueError: a row has no end-of-text token.
    """
    lengths, order = text_lengths(tokens, eot_token).sort(stable=True)
    tokens = tokens[order, : int(lengths[-1])]
    is_seen = torch.arange(tokens.shape[1]) < lengths[:, None]  # (B, L)
    packed, positions, ends = tokens[is_seen], is_seen.nonzero()[:, 1], lengths.cumsum(dim=0) - 1  # (T,), (T,), (B,)
    found, counts = lengths.unique_consecutive(return_counts=True)
    groups = tuple(zip(counts.tolist(), found.tolist(), strict=True))
    layout = PackedTexts(groups, positions, ends)
    indices, spread = _prefix_indices(tokens)[is_seen].unique(return_inverse=True)  # (U,), (T,)
    if len(indices) <= _MOST_UNIQUE * len(packed):
        unique = torch.full_like(indices, len(packed)).scatter_reduce_(0, spread, torch.arange(len(packed)), "amin")
        packed, layout = packed[unique], PackedTexts(groups, positions[unique], spread[ends], spread, unique)
    return packed[None], layout, order.argsort()


def _prefix_indices(tokens: Tensor) -> Tensor:
    """Indices (B, L) that are equal where texts (B, L) are equal up to that column."""
    # unique sorts the rows, so texts with a common prefix become neighbours.
    rows, which = tokens.unique(dim=0, return_inverse=True)
    N, L = rows.shape
    is_new = torch.ones(N, L, dtype=torch.bool)
    is_new[1:] = (rows[1:] != rows[:-1]).cumsum(dim=1) > 0
    first = torch.where(is_new, torch.arange(N)[:, None], 0).cummax(dim=0).values  # the first row with this prefix
    return (first * L + torch.arange(L))[which]


def trim_text(tokens: Tensor, eot_token: int | None, length_multiple: int = 1) -> Tensor:
    """Cuts the columns of (B, L) that no row's first end-of-text token can see; exact, as attention is causal.

    Args:
        length_multiple: the columns left are a multiple of it, if there are so many.

    Raises:
        ValueError: a row has no end-of-text token.
    """
    if not len(tokens):
        return tokens
    length = int(text_lengths(tokens, eot_token).max())
    return tokens[:, : math.ceil(length / length_multiple) * length_multiple].contiguous()
