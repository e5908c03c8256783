"""CLIP's tokenizer: lower-cased byte-pair encoding with 49,408 ids (paper section 2.4; Sennrich et al. 2016).

A merge makes one token of two neighbours. The vocabulary is laid out so that ids need no table: 256 bytes, the same
256 bytes ending a word, one id for every merge in the order in which the merges were learnt, then two special tokens,
the start and the end of text. A smaller id is therefore an earlier merge. A word is encoded from its bytes up: as long
as a merge fits any two neighbours, the one of smallest id is applied.
"""

from __future__ import annotations

import gzip
import html
import re
from array import array
from collections.abc import Iterable, Sequence
from functools import cache
from heapq import heapify, heappop, heappush
from itertools import pairwise

import ftfy
import numpy as np
import regex
import torch

from .common.arguments import check_count, check_list
from .common.files import ASSETS
from .config import TextConfig

CONTEXT_LENGTH = 77
START_OF_TEXT, END_OF_TEXT = 49406, 49407
VOCAB_SIZE = 49408
_NUM_MERGES = VOCAB_SIZE - 2 * 256 - 2

# Words, digits one by one, English contractions ('s, 'll), runs of anything else that is not a space, and the special
# tokens by name. A match (a "piece") never holds a space, which `_Words` below relies on.
_PIECES = regex.compile(
    r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
_SPECIAL = {"<start_of_text>": START_OF_TEXT, "<end_of_text>": END_OF_TEXT}

# Text that cleaning cannot change but for case and white space: no entity to unescape but &amp; before a space, no byte
# outside ASCII to repair, no control character (nor the escape that starts a terminal's colour codes) to drop.
_CLEAN = r"[\t\n\r -%'-~]*(?:&(?:amp;)?(?=[\t\n ]|\Z)[\t\n\r -%'-~]*)*"
_IS_CLEAN = re.compile(_CLEAN).fullmatch  # of classes, `re` is ten times as fast as `regex`

_BREAK = "\0"  # a word between texts that are encoded together; cleaning drops it from the texts
_ARE_CLEAN = re.compile(_CLEAN.replace("[", "[" + _BREAK)).fullmatch
_BREAK_ID = 2**16 - 1
_TOGETHER = 256  # texts that are split together: their words fit into a processor's cache
_ROWS_TOGETHER = 8192  # that are written together
_MAX_LETTERS_TOGETHER = 4096  # of a text; only the first words of a longer one may be needed

_MAX_CACHED_WORDS = 1 << 19
_MAX_CACHED_LETTERS = 64  # of a word; longer ones hardly come twice
_MAX_SEARCHED_BYTES = 64  # of a word; for longer ones a heap is faster
_NO_MERGE = VOCAB_SIZE  # no id: larger than that of every merge
_GONE = -1  # no id: a token that became part of the one to its left


class TextTooLongError(ValueError, RuntimeError):
    """A text has more tokens than the model can read. Also a RuntimeError, which OpenAI's `tokenize` raises."""


@cache
def byte_symbols() -> dict[int, str]:
    """Byte -> the printable character that OpenAI's file spells it as, in the order of their ids.

    Latin-1's 188 printable characters come first and spell themselves; the other bytes follow as those from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


@cache
def _byte_ids() -> tuple[int, ...]:
    """The id of each byte."""
    ids = {byte: index for index, byte in enumerate(byte_symbols())}
    return tuple(ids[byte] for byte in range(256))


@cache
def _read_merges() -> tuple[dict[tuple[int, int], int], dict[str, int]]:
    """(left id, right id) -> id of the two together, and symbol -> id; a symbol is a token as OpenAI's file spells it.

    The file spells a byte as `byte_symbols` does; "</w>" marks the end of a word.
    """
    symbols: dict[str, int] = {}
    for index, character in enumerate(byte_symbols().values()):
        symbols[character] = index
        symbols[character + "</w>"] = 256 + index
    lines = gzip.decompress((ASSETS / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8").split("\n")
    merges = {}
    for index, line in enumerate(lines[1 : 1 + _NUM_MERGES], 2 * 256):
        left, right = line.split()
        merges[symbols[left], symbols[right]] = index
        symbols[left + right] = index
    return merges, symbols


def learnt_merges() -> dict[tuple[int, int], int]:
    return _read_merges()[0]


def symbol_ids() -> dict[str, int]:
    return _read_merges()[1]


@cache
def _token_bytes() -> tuple[bytes, ...]:
    """The bytes that each id stands for, a space ending a word; the special tokens by their names."""
    by_id = [b""] * (2 * 256)
    for byte, index in enumerate(_byte_ids()):
        by_id[index] = bytes([byte])
        by_id[256 + index] = bytes([byte]) + b" "
    for (left, right), _ in sorted(learnt_merges().items(), key=lambda item: item[1]):
        by_id.append(by_id[left] + by_id[right])
    return (*by_id, *(name.encode() for name in _SPECIAL))


def encode_piece(piece: str) -> list[int]:
    """Byte-pair encoding of a word or other run of characters without a space."""
    if piece in _SPECIAL:
        return [_SPECIAL[piece]]
    # Most words are in the vocabulary whole, and the merges lead to that entry: a test tries all of them.
    whole = symbol_ids().get(piece + "</w>") if piece.isascii() else None
    return merge(piece.encode("utf-8")) if whole is None else [whole]


def merge(piece: bytes) -> list[int]:
    """Starts from single bytes and applies the merge of smallest id first, and among equal ones the leftmost."""
    byte_ids = _byte_ids()
    ids = [byte_ids[byte] for byte in piece]
    ids[-1] += 256  # the last byte ends the word
    return _merge_by_search(ids) if len(ids) <= _MAX_SEARCHED_BYTES else _merge_by_heap(ids)


def _merge_by_search(ids: list[int]) -> list[int]:
    """Looks for the smallest id before each merge: the fastest way for a word, O(n²) for n bytes."""
    learnt = learnt_merges().get
    merged = [learnt(pair, _NO_MERGE) for pair in pairwise(ids)]  # of each token with the one to its right
    while (smallest := min(merged, default=_NO_MERGE)) != _NO_MERGE:
        left = merged.index(smallest)
        ids[left : left + 2] = [smallest]
        del merged[left]
        if left > 0:
            merged[left - 1] = learnt((ids[left - 1], smallest), _NO_MERGE)
        if left < len(merged):
            merged[left] = learnt((smallest, ids[left + 1]), _NO_MERGE)
    return ids


def _merge_by_heap(ids: list[int]) -> list[int]:
    """The same in O(n log n): some texts are one word of thousands of letters.

    A heap holds the pairs that can merge. A pair that changed since it was pushed is skipped when it comes up. `before`
    and `after` hold the indices of each token's neighbours; a _GONE at the end, which no merge has, stands for the
    right neighbour of the last.
    """
    merges = learnt_merges()
    ids = [*ids, _GONE]
    before, after = list(range(-1, len(ids) - 1)), list(range(1, len(ids) + 1))
    heap = [(merges[pair], left) for left, pair in enumerate(pairwise(ids)) if pair in merges]
    heapify(heap)
    while heap:
        merged, left = heappop(heap)
        right = after[left]
        if merges.get((ids[left], ids[right])) != merged:
            continue
        ids[left], ids[right], after[left] = merged, _GONE, after[right]
        before[after[left]] = left
        for first in (before[left], left) if left else (left,):
            pair = ids[first], ids[after[first]]
            if pair in merges:
                heappush(heap, (merges[pair], first))
    return [i for i in ids if i != _GONE]


def _as_bytes(ids: Iterable[int]) -> bytes:
    """Two bytes for each id, so that the ids of many words are joined in one call."""
    return array("H", ids).tobytes()


@cache
def _whole_words() -> dict[str, bytes]:
    """Words of letters that are in the vocabulary whole, and the break between texts."""
    found = {_BREAK: _as_bytes([_BREAK_ID])}
    for symbol, index in symbol_ids().items():
        if symbol.endswith("</w>") and (word := symbol[: -len("</w>")]).isascii() and word.isalpha():
            found[word] = _as_bytes([index])
    return found


class _Words(dict[str, bytes]):
    """White-space-separated word -> its ids as bytes, computed when first asked for.

    Splitting at white space before matching gives the same pieces as matching the whole text, as no piece holds any
    and none looks beyond itself. Words of the vocabulary are copied when they come up: the table of those that texts
    have is small, and looking up in it fast.
    """

    def __missing__(self, word: str) -> bytes:
        ids = _whole_words().get(word)
        if ids is None:
            ids = _as_bytes(i for piece in _PIECES.findall(word) for i in encode_piece(piece))
        if len(self) >= _MAX_CACHED_WORDS:
            self.clear()
        if len(word) <= _MAX_CACHED_LETTERS:
            self[word] = ids
        return ids


_words = _Words()


def clean(text: str) -> str:
    """Repairs mojibake, unescapes HTML (twice, as web captions often need), folds white space, lower-cases."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def cleaned(text: str) -> str:
    """clean(text) but for white space, without the work where there is nothing to repair."""
    return text.replace("&amp;", "&").lower() if _IS_CLEAN(text) else clean(text)


def encode(text: str, at_least: int | None = None) -> list[int]:
    """The ids of a text without start and end of text; `at_least` leaves out the words after that many ids."""
    words = cleaned(text).split()
    if at_least is None:
        return encode_words(words)
    ids = array("H")
    for word in words:
        ids.frombytes(_words[word])
        if len(ids) >= at_least:
            break
    return ids.tolist()


def encode_words(words: Iterable[str]) -> list[int]:
    """The ids of a text's words, cleaned and split at white space."""
    return array("H", b"".join(map(_words.__getitem__, words))).tolist()


def _encode_together(texts: Sequence[str]) -> np.ndarray:
    """The ids of all texts, one behind the other, each with a break behind it: (M,) uint16."""
    parts = (texts[start : start + _TOGETHER] for start in range(0, len(texts), _TOGETHER))
    return np.frombuffer(b"".join(map(_encode_part, parts)), np.uint16)


def _encode_part(texts: Sequence[str]) -> bytes:
    joined = f" {_BREAK} ".join(texts)
    if _ARE_CLEAN(joined) and joined.count(_BREAK) == len(texts) - 1:
        joined = joined.replace("&amp;", "&").lower()
    else:
        joined = f" {_BREAK} ".join(map(cleaned, texts))
    words = joined.split()
    words.append(_BREAK)
    return b"".join(map(_words.__getitem__, words))


def decode(tokens: Iterable[int]) -> str:
    """The text of some ids. Not quite the inverse of `encode`: case and spacing are lost.

    Zeros that follow the end-of-text token are padding and are left out.

    Raises:
        ValueError: a number that is no token id.
    """
    ids = [int(token) for token in tokens]
    if END_OF_TEXT in ids and not any(ids[ids.index(END_OF_TEXT) + 1 :]):
        ids = ids[: ids.index(END_OF_TEXT) + 1]
    table = _token_bytes()
    for i in ids:
        if not 0 <= i < len(table):
            raise ValueError(f"{i} is no token id; ids are 0 to {len(table) - 1}")
    return b"".join(table[i] for i in ids).decode("utf-8", errors="replace")


def encode_for_model(text: str, context_length: int = CONTEXT_LENGTH, truncate: bool = False) -> list[int]:
    """The ids of a text between start and end of text, at most `context_length` of them.

    Raises:
        TextTooLongError: the text has more, and `truncate` is False; if True, it is cut and the end token put last.
    """
    ids = [START_OF_TEXT, *encode(text, at_least=context_length if truncate else None), END_OF_TEXT]
    if len(ids) > context_length:
        if not truncate:
            shown = text if len(text) <= 200 else text[:200] + "…"
            raise TextTooLongError(
                f"text has {len(ids)} tokens, start and end included, and the context length is {context_length}; "
                f"shorten it, or pass truncate=True to cut it: {shown!r}"
            )
        ids = [*ids[: context_length - 1], END_OF_TEXT]
    return ids


def tokenize(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False) -> torch.Tensor:
    """Token ids of one or several texts, as the text tower takes them.

    Args:
        texts: a text, or a sequence of N.
        context_length: columns of the result.
        truncate: cut over-long texts instead of raising; the end token is kept.

    Returns:
        (N, context_length) int32, each row start, text, end, zeros. (OpenAI's `clip.tokenize`.)

    Raises:
        TextTooLongError: (a ValueError and a RuntimeError) names the text and its number of tokens.
        ValueError: `context_length` leaves no room, or something that is not a text.
    """
    check_count("context_length", context_length, least=2)  # start and end of text
    if not isinstance(texts, str | Iterable):
        raise ValueError(f"tokenize takes a text or a sequence of texts, not {texts!r}")
    texts = [texts] if isinstance(texts, str) else check_list("texts", texts, "texts")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"tokenize takes a text or a sequence of texts; one of them is {text!r}")
    tokens = np.zeros((len(texts), context_length), dtype=np.int32)
    for start in range(0, len(texts), _ROWS_TOGETHER):
        part = slice(start, start + _ROWS_TOGETHER)
        _fill_rows(tokens[part], texts[part], truncate)
    return torch.from_numpy(tokens)


def _fill_rows(tokens: np.ndarray, texts: list[str], truncate: bool) -> None:
    """Writes `encode_for_model`'s ids of each text into its row of zeros: (B, L)."""
    B, L = tokens.shape
    is_long = np.fromiter(map(len, texts), int, B) > _MAX_LETTERS_TOGETHER  # (B,)
    short = ["" if long else text for text, long in zip(texts, is_long, strict=True)] if is_long.any() else texts
    ids = _encode_together(short)  # (M,)
    ends = np.flatnonzero(ids == _BREAK_ID)  # (B,)
    lengths = np.diff(ends, prepend=-1)  # of texts with their break, where the end of text goes
    is_alone = is_long if truncate else is_long | (lengths >= L)  # rows that are encoded one by one
    kept = np.where(is_alone, 0, np.minimum(lengths, L - 1))  # of a row's ids and its break
    last = np.repeat(ends - lengths + kept, lengths)  # for each of the M ids, the place of its row's last that is kept
    tokens[:, 0] = START_OF_TEXT
    tokens[:, 1:][np.arange(1, L) <= kept[:, None]] = ids[np.arange(len(ids)) <= last]
    tokens[~is_alone, kept[~is_alone]] = END_OF_TEXT
    for row in np.flatnonzero(is_alone):
        found = encode_for_model(texts[row], L, truncate)
        tokens[row, : len(found)] = found


def random_ids(text: TextConfig, shape: tuple[int, int], generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Ids for a text tower that end no text, and the id that does: CLIP's own where the largest of a row does."""
    end, num_ids = text.eot_token, text.vocab_size
    if end is None:
        end = min(END_OF_TEXT, text.vocab_size - 1)
        num_ids = end + 1
    return (end + torch.randint(1, num_ids, shape, generator=generator)) % num_ids, end


def refuse_other_ids(text: TextConfig, name: str, whose: str) -> None:
    """Makes sure that a text tower reads this tokenizer's ids.

    Args:
        name: the model's, for the error.
        whose: whose ids the tower would read, for the error ("CLIP's").

    Raises:
        ValueError: a text tower reads other token ids than this tokenizer's.
    """
    if (text.vocab_size, text.eot_token) != (VOCAB_SIZE, END_OF_TEXT):
        raise ValueError(
            f"{name} has vocab_size {text.vocab_size} and eot_token {text.eot_token}; {whose} ids need {VOCAB_SIZE} "
            f"and {END_OF_TEXT}"
        )
