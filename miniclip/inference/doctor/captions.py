"""Captions that have something wrong by themselves: no words about a picture, one sentence for many, names of others'.

N pictures, B pairs of a batch.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...common.files import ASSETS
from ...data.wordings.equal_captions import same_caption, words_of

URL, FILE_NAME, PLACEHOLDER, MARKUP, NO_WORDS = "a URL", "a file name", "a placeholder", "markup", "no words"
NUMBER = "a number"

_URLS = re.compile(r"(?:\w+://|www\.)\S+", re.I)
_SITES = re.compile(r"\b[\w-]+(?:\.[\w-]+)*\.(?:com|org|net|de|fr|co|io|info|ru|cn|jp|uk)\b(?:/\S*)?", re.I)
_PICTURE_SUFFIXES = "jpe?g|jfif|png|gif|webp|bmp|tiff?|heic|avif|svg|raw|cr2|nef|psd|mp4|mov|pdf"
_FILES = re.compile(rf"(?:[\w()+%-]+[\\/.])*[\w()+ %-]+\.(?:{_PICTURE_SUFFIXES})", re.I)
# What cameras, phones and programs call a picture: IMG_1234, DSC01234, P1010203, 20210304_123456, a hash.
_AFTER_A_NUMBER = r"[\s\d_:.-]*(?:at[\s\d_:.-]*|wa\d+)?(?:\(\d+\)|copy|am|pm|edited)*"
_HEX = "(?=[0-9]*[a-f])(?=[a-f]*[0-9])[0-9a-f]"
_SYSTEM_NAMES = re.compile(
    r"(?:(?:img|imag|dsc[nf]?|dcim|pict|pxl|gopr|mvimg|fb[ _]img)[ _-]*\d{4,}|p[1-9a-c]\d{6}|wp[ _]\d{8}"
    r"|(?:screen ?shot|whatsapp image)[ _-]*\d{4}-?\d\d-?\d\d|(?:19|20)\d{6}[_-]\d{6})"
    rf"{_AFTER_A_NUMBER}|{_HEX}{{16,}}|[0-9a-f]{{8}}(?:-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}",
    re.I,
)
# What may be a name or not: "image 12" and "photo 51", a short hash and a serial number.
_NUMBERED_NAMES = re.compile(
    r"(?:img|dsc[nf]?|dcim|pict?|imag|image|photo|picture|foto|bild|screen ?shot|scan|untitled|unnamed|download|file"
    rf"|whatsapp image)[\s_-]*\d{_AFTER_A_NUMBER}|{_HEX}{{12,}}",
    re.I,
)
_BARE_NUMBERS = re.compile(r"\d[\d\s_:./-]{6,}")
_LONG_URL = re.compile(r"\w+://|data:", re.I)
_TAGS = (
    "a|b|big|body|br|center|div|em|fig(?:caption|ure)|font|h[1-6]|hr|html|i|iframe|img|li|ol|p|pre|script|small|span|"
    "strong|style|su[bp]|svg|table|tbody|t[dhr]|u|ul|video"
)  # <sks> and <cat-toy> are words that a text-to-image model has learnt
_MARKUP = re.compile(
    rf"</?(?:{_TAGS})(?:\s[^>]*)?/?>|&(?:nbsp|amp|lt|gt|quot|#\d+);|\{{\{{.*?\}}\}}|\[/?(?:caption|img|url)[^\]]*\]",
    re.I,
)
# Phrases that stand where a caption is missing, without punctuation.
_NO_CAPTIONS = re.compile(
    r"(?:(?:an?|the|eine?|une?|una?) )?(?:image|img|photo|photograph|pic|picture|screenshot|bild|foto)s?"
    r" (?:of|showing|von|de)(?: (?:an?|the))?"
    r"|(?:no )?alt text|no (?:alt text|caption|description)(?: is)? (?:available|found|given|provided|yet)"
    r"|click (?:here |(?:on )?(?:the )?(?:image|photo|picture) )?(?:to (?:enlarge|expand|view|zoom)|for (?:a )?larger)"
    r"(?: (?:the )?(?:image|photo|picture|version|view))?"
)
# Words about pictures; words that may be content, and say little by themselves; words that join others.
_ABOUT_PICTURES, _SAYING_LITTLE, _JOINING = (
    frozenset(word for line in part.splitlines() if not line.startswith("#") for word in line.split())
    for part in (ASSETS / "caption_words.txt").read_text(encoding="utf-8").split("\n\n")
)
_REPEATED_LEAST, _REPEATED_SHARE, _REPEATED_TIMES = 10, 0.005, 2.5
_MOST_NAMED_WORDS = 6  # a longer caption is no name
_MOST_EXAMPLES = 20
_LONGEST_JUNK = 500  # characters
_RIGHTS = "©®™℠"
_SEPARATING = "|<>=+~^`´¨→←►▶▸"


def normalised(caption: str) -> str:
    """Equal for captions that differ in case, accents' encoding, punctuation and white space alone; one of punctuation
    stands for itself."""
    return " ".join(words_of(caption)) or same_caption(caption)


def content_of(caption: str) -> frozenset[str]:
    """The words that say what a picture shows: without those that join, and those about pictures."""
    return frozenset(_spoken(caption)) - _JOINING - _ABOUT_PICTURES


def _spoken(caption: str) -> list[str]:
    """The words without the signs that stand between or beside them: | and © say nothing, and 🐶 and C++ do."""
    words = (word.strip(_RIGHTS) for word in words_of(caption))
    return [word for word in words if word.strip(_SEPARATING)]


def junk_in(caption: str, is_shared: bool = False) -> str:
    """What a caption is that no words about a picture can be: one of the names above; empty if it may be some.

    Args:
        is_shared: with other pictures, so that it is no camera's name for one of them.
    """
    text = _bare(caption)
    if len(text) > _LONGEST_JUNK:  # which the expressions below would take long for
        return URL if _LONG_URL.match(text) and " " not in text else ""
    if _FILES.fullmatch(text) or (not is_shared and _SYSTEM_NAMES.fullmatch(text)):
        return FILE_NAME
    without = _MARKUP.sub(" ", text)
    if without != text and junk_in(without, is_shared):
        return MARKUP
    without = _URLS.sub(" ", text)
    if without != text and not content_of(without):
        return URL
    if not any(unicodedata.category(character)[0] in "LNS" for character in text):
        return "" if len(caption.strip()) == 1 else NO_WORDS
    return PLACEHOLDER if _NO_CAPTIONS.fullmatch(" ".join(_spoken(text))) else ""


def doubt_in(caption: str, is_shared: bool = False) -> str:
    """What a caption may be that is not certainly junk, and says a word or a number at most; empty if it says more.

    "empty", "Zoom" and 00012345 are what pages and programs write, and captions of a car park, a logo, a meter.

    Args:
        is_shared: with other pictures, as the names of classes are.
    """
    text = _bare(caption)
    if len(text) > _LONGEST_JUNK:
        return ""
    if _SYSTEM_NAMES.fullmatch(text) or (not is_shared and _NUMBERED_NAMES.fullmatch(text)):
        return FILE_NAME
    if not is_shared and _BARE_NUMBERS.fullmatch(text):
        return NUMBER
    if len(caption.strip()) == 1 and not words_of(caption):
        return NO_WORDS
    without = _SITES.sub(" ", _URLS.sub(" ", _MARKUP.sub(" ", text)))
    says_more = content_of(without) - _SAYING_LITTLE
    if without != text and not says_more:
        return URL
    return PLACEHOLDER if _spoken(text) and not says_more else ""


def _bare(caption: str) -> str:
    return unicodedata.normalize("NFKC", caption).strip().strip("\"'()[]-–— ")


# ---------------------------------------------------------------------------------------------------------------------
# Many pictures


def repeated(captions: Sequence[Sequence[str]]) -> dict[str, int]:
    """Normalised captions of so many pictures that they are hardly about any, with the number of pictures.

    At least 10 pictures and 0.5 % of all, and 2.5 times as many as a typical caption has: where captions are classes,
    each of them is repeated.
    """
    of_picture = [{normalised(caption) for caption in each} for each in captions]
    counts = Counter(text for texts in of_picture for text in texts)
    typical = np.median([min(counts[text] for text in texts) for texts in of_picture if texts] or [0])
    least = max(_REPEATED_LEAST, _REPEATED_SHARE * len(captions), _REPEATED_TIMES * float(typical))
    return {text: count for text, count in counts.most_common() if count >= least}


@dataclass(frozen=True)
class Naming:
    """Captions that also name what other pictures show.

    Args:
        most: (N,) of how many other pictures a caption holds all that one of this picture's captions says; of several
            captions, that which names most.
        mean: (N,) the same, expected where one of the captions is drawn.
        examples: captions, each with its number of pictures, the number of others that it names, and one of their
            captions.
    """

    most: np.ndarray
    mean: np.ndarray
    examples: tuple[tuple[str, int, int, str], ...]


def naming(captions: Sequence[Sequence[str]], are_junk: Sequence[bool]) -> Naming:
    """Finds captions whose content is part of, or equal to, that of captions of other pictures in other words.

    "a red seven" names the picture of "someone wrote seven in red". Pictures of the very same caption do not count:
    to the softmax loss they are equally right.

    Args:
        are_junk: (N,) pictures whose captions do not count.
    """
    texts_of, text_of = _by_content(captions, are_junk)
    holding: dict[str, list[frozenset[str]]] = defaultdict(list)
    for content in texts_of:
        for word in content:
            holding[word].append(content)
    most, total = np.zeros(len(captions), dtype=np.int64), np.zeros(len(captions))
    found = []
    for content, texts in texts_of.items():
        if len(content) > _MOST_NAMED_WORDS:
            continue
        rarest = min((holding[word] for word in content), key=len)
        wider = [each for each in rarest if content <= each]
        named = set().union(*(pictures for each in wider for pictures in texts_of[each].values()))
        for text, pictures in texts.items():
            further = len(named) - len(pictures)
            for picture in pictures if further else ():
                most[picture] = max(most[picture], further)
                total[picture] += further
            if further:
                other = min(named - pictures)
                holder = next(each for each in captions[other] if content <= content_of(each))
                found.append((text_of[text], len(pictures), further, holder))
    found.sort(key=lambda each: (-each[1] * each[2], each[0]))
    return Naming(most, total / [max(1, len(each)) for each in captions], tuple(found[:_MOST_EXAMPLES]))


def _by_content(
    captions: Sequence[Sequence[str]], are_junk: Sequence[bool]
) -> tuple[dict[frozenset[str], dict[str, set[int]]], dict[str, str]]:
    """Normalised texts of each content, with the pictures that have them; and each of those texts as it is written."""
    texts_of: dict[frozenset[str], dict[str, set[int]]] = {}
    text_of: dict[str, str] = {}
    for picture, each in enumerate(captions):
        for caption in () if are_junk[picture] else each:
            if content := content_of(caption):
                text = normalised(caption)
                text_of.setdefault(text, caption)
                texts_of.setdefault(content, {}).setdefault(text, set()).add(picture)
    return texts_of, text_of
