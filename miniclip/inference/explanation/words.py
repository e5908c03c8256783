"""Relevance of a text's words to its cosine with a picture: how much it falls when a word is left out.

That needs nothing of the model but its features. Of this package's text towers, the relevance of each token through
attention is known as well.

W words, M selections of them, L tokens, E embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import regex
import torch
from torch import Tensor

from ... import tokenizer
from ...common.wording import cut_short
from ...evaluation.encoder import Encoder, collecting_cut
from ...evaluation.features import encode_texts
from ...evaluation.fingerprints import digest_value
from ...fast.packed_texts import trim_text
from ...model import TextTransformer
from .attention import attention_relevance
from .deletion import NUM_RANDOM, Deletion, Removal

# Where a script has no spaces between words, each character is one.
_WORDS = regex.compile(
    r"\s*(?:[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]|[^\s\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]+)"
)


@dataclass(frozen=True)
class Words:
    """What of a text mattered.

    Args:
        words: W, as they are written.
        relevances: W, how much the cosine falls without each.
        deletion: the score of those.
        tokens: L, as the tokenizer spells them, without start and end of text; empty for another library's model.
        token_relevances: L, through attention, in shares of 1; all 0 if no token raised the cosine.
    """

    words: tuple[str, ...]
    relevances: tuple[float, ...]
    deletion: Deletion
    tokens: tuple[str, ...] = ()
    token_relevances: tuple[float, ...] = ()


class Text:
    """A text as a model reads it, with and without some of its words.

    Args:
        features: (E,), of unit length.

    Raises:
        ValueError: it is empty, or longer than the model can read.
    """

    def __init__(self, encoder: Encoder, text: str) -> None:
        self._encoder, self._pieces = encoder, _WORDS.findall(text)
        if not self._pieces:
            raise ValueError(f"the text {text!r} is empty; a map needs words that it can show in a picture")
        self._tokens = _tokenized(encoder, text, self._joined(self._pieces[:-1]))
        self.text, self.features = text, self._encode_texts([text])[0]

    def explain(self, target: Tensor) -> Words:
        """
        Args:
            target: (E,), the picture's features, of unit length.
        """
        W = len(self._pieces)
        without_one = self._encode(~torch.eye(W, dtype=torch.bool))
        relevances = ((self.features - without_one) @ target).cpu()
        tokens, shares = self._through_attention(target)
        return Words(
            tuple(piece.strip() for piece in self._pieces),
            tuple(relevances.tolist()),
            self.judge(relevances, target),
            tokens,
            shares,
        )

    def judge(self, relevances: Tensor, target: Tensor) -> Deletion:
        """The score of any relevances of the words, (W,)."""
        return self._removal.score(relevances, target)

    @cached_property
    def _removal(self) -> Removal:
        random = torch.rand(NUM_RANDOM, len(self._pieces), generator=torch.Generator().manual_seed(0))
        return Removal(self._encode, random)

    def _encode(self, is_there: Tensor) -> Tensor:
        """(M, W) -> (M, E)."""
        return self._encode_texts(
            [
                self._joined([p for p, there in zip(self._pieces, row, strict=True) if there])
                for row in is_there.tolist()
            ]
        )

    def _encode_texts(self, texts: list[str]) -> Tensor:
        return encode_texts(self._encoder, texts, self._encoder.tokenize)

    def _joined(self, pieces: list[str]) -> str:
        return "".join(pieces).strip()

    def _through_attention(self, target: Tensor) -> tuple[tuple[str, ...], tuple[float, ...]]:
        """The tokens between the start and the end of the text, and their shares; nothing for others' text towers."""
        tower = self._encoder.text_module
        if not isinstance(tower, TextTransformer):
            return (), ()
        tokens = trim_text(self._tokens, tower.eot_token)  # (1, L + 2)
        on_device = tokens.to(target.device)
        try:
            found, _ = attention_relevance(tower.transformer, lambda: tower(on_device), target, tokens.shape[1] - 1)
        except ValueError:  # somebody else's attention
            return (), ()
        inner = found[1:-1]
        shares = inner / inner.sum().clamp(min=torch.finfo(inner.dtype).tiny)
        return tuple(tokenizer.decode([token]) for token in tokens[0, 1:-1].tolist()), tuple(shares.tolist())


def _tokenized(encoder: Encoder, text: str, shorter: str) -> Any:
    """The tokens of a text.

    Raises:
        ValueError: the model does not read all of it: nothing changes without the last word, nor with more words.
    """
    with collecting_cut():  # it is refused here
        tokens = encoder.tokenize([text])
        digests = [digest_value(encoder.tokenize([each])) for each in (shorter, f"{text} {text}")]
    tower = encoder.text_module
    if isinstance(tower, TextTransformer):
        num_tokens, most = len(tokenizer.encode(text)) + 2, len(tower.positional_embedding)
        if num_tokens > most:
            raise ValueError(
                f"the text has {num_tokens} tokens, start and end included, and {encoder.name} reads {most}; "
                f"shorten it: {cut_short(text)!r}"
            )
    elif digest_value(tokens) is not None and digests == [digest_value(tokens)] * 2:
        raise ValueError(
            f"{encoder.name} does not read the end of the text: its tokens are the same without the last word; "
            f"shorten it: {cut_short(text)!r}"
        )
    return tokens
