"""Captions in another language than most of a set, by `py3langid`, whose model of 97 languages comes with it.

The library is right about sentences and guesses about two words ("a pink nine" is Dutch to it). So a caption counts as
of another language only if the set's own language is all but excluded: half of the single words are missed for that.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_EXCLUDED = 0.01  # a probability below which a caption is not of the set's language
_FEWEST, _MOST = 10, 200  # different captions that decide on the set's language
_LONG = 4  # words that a caption has which may decide


def languages(
    captions: Sequence[Sequence[str]], are_junk: Sequence[bool], progress: Callable[[int], object]
) -> tuple[str, list[tuple[str, float] | None]]:
    """The language of most captions (ISO 639-1; empty where no language has most of them, or the captions are too few
    to know), and for each picture of whose captions none is in it, the language of
    the first with the probability that it is in the set's.

    Args:
        are_junk: pictures whose captions do not count.
        progress: called with the number of pictures done.
    """
    rank = _language_ranking()
    main = _main_language(rank, captions, are_junk)
    known: dict[str, tuple[str, float]] = {}
    found: list[tuple[str, float] | None] = []
    for picture, each in enumerate(captions):
        seen = []
        for caption in () if are_junk[picture] else each:
            if caption not in known:
                ranked = rank(caption)
                known[caption] = (ranked[0][0], dict(ranked).get(main, 0.0))
            seen.append(known[caption])
        is_other = bool(seen and main) and all(probability < _EXCLUDED for _, probability in seen)
        found.append(seen[0] if is_other else None)
        progress(picture + 1)
    return main, found


def _main_language(rank: Callable[[str], Any], captions: Sequence[Sequence[str]], are_junk: Sequence[bool]) -> str:
    texts = [each[0] for each, is_junk in zip(captions, are_junk, strict=True) if each and not is_junk]
    texts = sorted(set(texts))
    long = [text for text in texts if len(text.split()) >= _LONG or not text.isascii()] or texts
    chosen = np.random.default_rng(0).permutation(len(long))[:_MOST].tolist()
    votes = Counter(rank(long[index])[0][0] for index in chosen)
    name, count = max(votes.items(), key=lambda each: (each[1], each[0]), default=("", 0))
    return name if len(texts) >= _FEWEST and count > len(chosen) / 2 else ""


@functools.cache  # its model takes a second to unpack
def _language_ranking() -> Callable[[str], list[tuple[str, float]]]:
    """Languages with their probabilities, the likeliest first."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # an extra; `examine` asks for it first

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    return lambda text: [(str(name), float(probability)) for name, probability in identifier.rank(text.casefold())]
