"""When captions are equal: to a model (`same_caption`), and to a reader, by their words (`words_of`)."""

from __future__ import annotations

import unicodedata

# Unicode counts these as punctuation, and captions use them as symbols: C# is not C, and 5 % not 5.
_SYMBOLS = "#%&@"
_APOSTROPHES = "'’"
# No width and no meaning: zero-width spaces, soft hyphens, marks of direction and of byte order, an emoji's style.
_UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufe0e\ufe0f\ufeff"))


def same_caption(text: str) -> str:
    """Equal for texts that differ in case, white space or the way in which accents are written alone, as CLIP's
    tokenizer takes them."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def words_of(text: str) -> list[str]:
    """Folded words, without the punctuation and white space between them.

    Letters, numbers, symbols and the marks that go with them stay: a tone is a part of a Thai word, a vowel sign of one
    in Hindi, and 🐶 is a word. An apostrophe within a word stays, too.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text.translate(_UNSEEN)).casefold())
    words = (word.strip("'") for word in folded.translate(_SEPARATED).split())
    return [word for word in words if word]


class _Separated(dict[int, str]):
    """For `str.translate`: a space in the place of each character that separates words."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        category = unicodedata.category(character)
        if character in _APOSTROPHES:
            found = "'"
        else:
            separates = character not in _SYMBOLS and (category[0] in "PZ" or category == "Cc")
            found = " " if separates else character
        self[code] = found
        return found


_SEPARATED = _Separated()
