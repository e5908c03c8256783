"""The cleaning of texts as data, for runners that have neither ftfy nor Python's tables of HTML.

Everything that `tokenizer.clean` does can be done by table but one thing: the repair of mojibake, for which ftfy tries
encodings. Runners refuse what ftfy would look at.
"""

from __future__ import annotations

import html.entities
import itertools
from collections.abc import Iterator
from typing import Any

import ftfy
from ftfy import badness, chardata

_NOTICE = (
    "The tables characters, controls and mojibake are those of ftfy {version} (Copyright Robyn Speer; Apache License "
    "2.0, https://www.apache.org/licenses/LICENSE-2.0), written as data; mojibake without its comments and spaces."
)


# Among them are all that HTML does not read as the character of that number, surrogates aside.
_NUMBERS = (
    *range(0xA0),
    *range(0xFDD0, 0xFDF0),
    *(plane + last for plane in range(0, 0x110000, 0x10000) for last in (0xFFFE, 0xFFFF)),
)


def cleaning_tables() -> dict[str, Any]:
    """
    Returns:
        entities: HTML's that end in a semicolon, and ftfy's capital ones, each with its characters.
        html: entities as HTML reads them, some without a semicolon.
        numbers: what HTML reads as another character than the one of that number.
        characters: ligatures, full and half widths and curly quotes, each with what replaces it.
        lower: each character that has a small form, with it.
        controls: characters that are dropped. mojibake: an expression for what was decoded wrongly.
        special: names of special tokens, which runners refuse.
    """
    return {
        "notice": _NOTICE.format(version=ftfy.__version__),
        "special": ["<start_of_text>", "<end_of_text>", "<|startoftext|>", "<|endoftext|>"],
        "mojibake": plain_expression(badness.BADNESS_RE.pattern),
        "controls": "".join(map(chr, sorted(chardata.CONTROL_CHARS))),
        "characters": _characters(),
        "lower": {chr(n): low for n in range(0x110000) if (low := chr(n).lower()) != chr(n)},
        "entities": dict(chardata.HTML_ENTITIES),
        "html": dict(html.entities.html5),
        "numbers": {str(n): text for n in _NUMBERS if (text := html.unescape(f"&#{n};")) != chr(n)},
    }


def _characters() -> dict[str, str]:
    """Each character that ftfy replaces one by one, with what is left after all of its replacements."""
    ends = {}
    for code in {*chardata.LIGATURES, *chardata.WIDTH_MAP, *range(0x2BC, 0x2BD), *range(0x2018, 0x2020)}:
        text = chr(code).translate(chardata.LIGATURES).translate(chardata.WIDTH_MAP)
        ends[chr(code)] = ftfy.fixes.uncurl_quotes(text)
    return dict(sorted(ends.items()))


def plain_expression(pattern: str) -> str:
    """A verbose regular expression without its spaces and comments, as JavaScript reads it, too.

    >>> plain_expression("[ab ]  # a class \\n | c")
    '[ab ]|c'
    """
    return "".join(_symbols(pattern))


def _symbols(pattern: str) -> Iterator[str]:
    characters = iter(pattern)
    is_class = False
    for character in characters:
        if character == "\\":
            yield character + next(characters)
        elif character == "#" and not is_class:
            for _ in itertools.takewhile(lambda each: each != "\n", characters):
                pass
        elif is_class or not character.isspace():
            is_class = character == "[" or (is_class and character != "]")
            yield character
