"""Captions as units: words, numbers and marks, as CLIP's tokenizer sees them.

>>> units("A photo of a dog.")
('a', ' photo', ' of', ' a', ' dog', '.')

Joined they are the text in small letters, and have its tokens. A blank before a unit belongs to it.
"""

from __future__ import annotations

from collections.abc import Iterable

import regex

from ...tokenizer import decode, encode

# Scripts without blanks between words, whose letters are units: Chinese, Japanese, Thai, Lao, Burmese, Khmer.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff"
_UNIT = regex.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")
_MARKS = regex.compile(r"[^\p{L}\p{M}\p{N}]+")
_BOUND = regex.compile(r"[.,;:!?%)\]'’…。，、-]+|['’](s|t|re|ve|m|ll|d)|\p{M}+")  # no blank before these
_BINDING = ("-", "(", "[")  # nor after these


def units(text: str) -> tuple[str, ...]:
    """The units of a text."""
    return units_of_tokens(encode(text))


def units_of_tokens(tokens: Iterable[int]) -> tuple[str, ...]:
    """The units of a text by its token ids, without those of its start and end."""
    found: list[str] = []
    before = ""
    for word in decode(tokens).split():
        for number, part in enumerate(_UNIT.findall(word)):
            if part.isdigit() and before.isdigit():  # the tokenizer takes each digit for itself
                found[-1] += part
            else:
                found.append(part if number or not found or _is_bound(part, before) else f" {part}")
            before = found[-1].strip()
    return tuple(found)


def _is_bound(part: str, before: str) -> bool:
    """Whether the text has no blank between two units; two marks without one would be another token."""
    if not is_word(before):
        return before in _BINDING and is_word(part)
    return bool(_BOUND.fullmatch(part))


def is_word(unit: str) -> bool:
    """Whether a unit is a word or a number."""
    return not _MARKS.fullmatch(unit.strip())
