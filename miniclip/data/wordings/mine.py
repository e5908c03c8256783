"""The wordings of captions: frames such as "a sketch of a {}, by hand" that many captions share.

A frame is what stands around a gap. Every gap of a caption is tried, and the caption votes for the frame that has the
most different fillings and the most words of its own. No class name and no label is needed for it.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from .kept import Wording, Wordings
from .units import is_word

NUM_CAPTIONS = 4000  # to look at: 20 of them have a wording that 1 in 200 has
_LONGEST, _LONGEST_FILLING = 40, 8  # units of a caption, and of what fills a frame
_COMMON_SHARE, _COVERED_SHARE = 0.005, 0.3  # of the captions: for one wording, and for all of them together
_MOST_WORDINGS, _MOST_DRAWN = 32, 256
_LONGEST_NAME = 3  # units, at most, of captions that are names alone
_LEAST_PAIR = 3  # captions that have two units side by side, for an example to have them
_MOST_GAPS = 250_000  # tried, which bounds time and memory; 4,000 captions of 10 units have 208,000
_PAIRED = tuple("()[]\"'“”«»")  # a frame with one of them lacks the other

Units = tuple[str, ...]


class _Frame(NamedTuple):
    """What stands around a gap, and whether a blank stands before it. All numbers are alike: 0."""

    before: Units
    blank: str
    after: Units

    @property
    def num_words(self) -> int:
        return sum(map(is_word, (*self.before, *self.after)))

    def score(self, fillings: Collection[Units]) -> float:
        """The different fillings, and the words of the frame more than in proportion; next to nothing for numbers."""
        num_different = len({_same_numbers(each) for each in fillings}) + 1e-3 * len(fillings)
        marks = [mark for unit in (*self.before, *self.after) if not is_word(mark := unit.strip())]
        bonus = sum(-0.1 if mark in _PAIRED else 0.1 for mark in marks)
        return num_different * (max(self.num_words, 0.5) + 0.5 + bonus) ** 2


def mine(captions: Sequence[Units]) -> Wordings | None:
    """The wordings of captions, the commonest first; None if they have none in common.

    Args:
        captions: as units, in random order; of long ones not all are looked at. Those of more than 40 units, or with
            braces, count as captions without a wording.
    """
    num_gaps = list(accumulate(min(len(each), _LONGEST) * _LONGEST_FILLING for each in captions))
    captions = captions[: bisect(num_gaps, _MOST_GAPS)]
    counts = Counter(each for each in captions if 0 < len(each) <= _LONGEST and not _has_braces(each))
    fillings, texts = _frames(counts, max(2, round(_COMMON_SHARE * len(captions))))
    repeats = Counter[Units]()  # captions with each filling
    for found in fillings.values():
        repeats.update(found)
    common = {frame: found for frame, found in fillings.items() if _is_wording(frame, found, repeats, len(captions))}
    votes: dict[_Frame, list[Units]] = defaultdict(list)
    scores = {frame: frame.score(found) for frame, found in common.items()}
    for caption in counts:
        if own := [frame for frame, _ in _gaps(caption) if frame in scores]:
            votes[max(own, key=scores.__getitem__)].append(caption)
    shares = {frame: sum(counts[each] for each in found) / len(captions) for frame, found in votes.items()}
    kept = sorted((frame for frame in shares if shares[frame] >= _COMMON_SHARE), key=lambda frame: -shares[frame])
    if sum(shares[frame] for frame in kept) < _COVERED_SHARE:
        return None
    wordings = tuple(Wording(texts[frame], round(shares[frame], 4)) for frame in kept[:_MOST_WORDINGS])
    examples = _drawn_examples(Counter({each: counts[each] for frame in kept for each in votes[frame]}), counts)
    return Wordings(wordings, examples, len(captions))


def _has_braces(caption: Units) -> bool:
    return any("{" in unit or "}" in unit for unit in caption)


def _same_numbers(text: Units) -> Units:
    """With 0 for every number."""
    return tuple(unit.replace(number, "0") if (number := unit.strip()).isdigit() else unit for unit in text)


def _gaps(caption: Units) -> Iterator[tuple[_Frame, Units]]:
    """Every frame of a caption, with what fills it."""
    alike = _same_numbers(caption)
    for start in range(len(caption)):
        blank = " " if caption[start].startswith(" ") else ""
        for end in range(start + 1, min(start + _LONGEST_FILLING, len(caption)) + 1):
            filling = tuple(unit.strip() for unit in caption[start:end])
            yield _Frame(alike[:start], blank, alike[end:]), filling


def _frames(counts: Counter[Units], least: int) -> tuple[dict[_Frame, Counter[Units]], dict[_Frame, str]]:
    """The frames of at least so many captions and of different fillings, with those; and each as a template."""
    support = Counter[int]()  # by hash, since there are many more frames than are kept
    for caption, count in counts.items():
        for frame, _ in _gaps(caption):
            support[hash(frame)] += count
    fillings: dict[_Frame, Counter[Units]] = defaultdict(Counter)
    texts: dict[_Frame, str] = {}
    for caption, count in counts.items():
        for frame, filling in _gaps(caption):
            if support[hash(frame)] >= least:
                fillings[frame][filling] += count
                before, after = caption[: len(frame.before)], caption[len(caption) - len(frame.after) :]
                texts.setdefault(frame, "".join((*before, frame.blank, "{}", *after)))
    return {frame: found for frame, found in fillings.items() if len(found) > 1}, texts


def _is_wording(frame: _Frame, found: Counter[Units], repeats: Mapping[Units, int], total: int) -> bool:
    """Whether what fills a frame comes again elsewhere, or the frame itself is long and common."""
    share = found.total() / total
    again = sum(count for filling, count in found.items() if repeats[filling] > 1) / found.total()
    if not frame.before and not frame.after:
        return bool(np.mean([len(each) for each in found.elements()]) <= _LONGEST_NAME)
    return again >= 0.5 or (frame.num_words > 1 and share >= 0.1)


def _drawn_examples(eligible: Counter[Units], counts: Counter[Units]) -> tuple[str, ...]:
    """A random sample of captions, by a fixed seed, without any that has two neighbours of its own."""
    pairs = Counter[tuple[str, str]]()
    for caption, count in counts.items():
        for pair in set(pairwise(caption)):
            pairs[pair] += count
    known = [each for each in eligible if all(pairs[pair] >= _LEAST_PAIR for pair in pairwise(each))]
    if not known:
        return ()
    share = np.array([eligible[each] for each in known]) / sum(eligible[each] for each in known)
    size = min(_MOST_DRAWN, len(known))
    chosen = np.random.default_rng(0).choice(len(known), size, replace=False, p=share)
    return tuple("".join(known[index]) for index in sorted(chosen.tolist()))
