"""What a model keeps of the captions that it was trained on: their wordings, and some of them as examples.

It lies beside the weights, in wordings.json, and travels with them.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise

from ...common.wording import percent, some
from .units import is_word, units

WORDINGS_FILE = "wordings.json"
_MOST_TEMPLATES = 16  # of a class; more changed nothing in docs/prompts.md
_WORDINGS_SCHEMA = 1
_DIGITS = re.compile(r"\d+")
_LEAST_NAMED = 0.1  # share of the examples that hold a class's name, to take the prompts from them
_LEAST_OF_FIRST = 0.1  # share of the commonest wording's captions, to be a prompt beside it


@dataclass(frozen=True)
class Wording:
    """A template, with `{}` for what differs, and the share of the captions that have it."""

    text: str
    share: float


@dataclass(frozen=True)
class Wordings:
    """
    Args:
        wordings: the commonest first.
        examples: captions that have one of them, each of words that other captions have side by side, too.
        num_captions: that were looked at.
    """

    wordings: tuple[Wording, ...]
    examples: tuple[str, ...]
    num_captions: int

    def __str__(self) -> str:
        shown = [f"{each.text!r} ({percent(each.share)} %)" for each in self.wordings]
        return f"{some(shown, 3)}, of {self.num_captions:,} captions"

    def templates(self, classnames: Sequence[str] = ()) -> tuple[str, ...]:
        """Prompts in the words of the captions: the examples with a class's name taken out, where enough of them hold
        one; else the wordings themselves. So the gap is where the captions name these classes, and not something else.
        """
        found = self._around(classnames)
        if sum(found.values()) < _LEAST_NAMED * len(self.examples) or not found:
            found = Counter({each.text: each.share for each in self.wordings})
        most = max(found.values())
        common = [text for text, count in found.most_common(_MOST_TEMPLATES) if count >= _LEAST_OF_FIRST * most]
        return tuple(common)

    def _around(self, classnames: Sequence[str]) -> Counter[str]:
        """What stands around the names of classes in the examples, by the number of those that have it."""
        by_first = defaultdict[str, list[tuple[str, ...]]](list)
        for name in {_stripped(units(name)) for name in classnames} - {()}:
            by_first[name[0]].append(name)
        for names in by_first.values():
            names.sort(key=len, reverse=True)  # "polar bear" before "polar"
        found, first = Counter[str](), dict[str, str]()
        for example in self._examples:
            for text in set(_without_names(example, by_first)):
                found[first.setdefault(_DIGITS.sub("0", text), text)] += 1  # numbers are alike
        return found

    @cached_property
    def _examples(self) -> tuple[tuple[str, ...], ...]:
        return tuple(map(units, self.examples))

    def knows(self, template: str) -> bool:
        """Whether the words of a template stand side by side in the captions that are kept.

        Args:
            template: with `{}`, for what is not compared. Marks are not compared either.
        """
        return all(words in self._known for words in _neighbours(template))

    @cached_property
    def _known(self) -> frozenset[tuple[str, ...]]:
        texts = (*self.examples, *(each.text for each in self.wordings))
        pairs = {words for text in texts for words in _neighbours(text)}
        return frozenset(pairs | {(word,) for words in pairs for word in words})

    # -----------------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        return json.dumps({"schema": _WORDINGS_SCHEMA, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Wordings:
        """
        Raises:
            ValueError: not what `to_json` gives, or of a later version; names the source.
        """
        try:
            values = json.loads(text)
            if values["schema"] != _WORDINGS_SCHEMA:
                raise ValueError(f"its schema is {values['schema']!r}, and this version reads {_WORDINGS_SCHEMA}")
            wordings = tuple(Wording(str(each["text"]), float(each["share"])) for each in values["wordings"])
            if not wordings or not all("{}" in each.text for each in wordings):
                raise ValueError("a wording has no {} for what differs" if wordings else "it holds no wording")
            return cls(wordings, tuple(map(str, values["examples"])), int(values["num_captions"]))
        except (ValueError, TypeError, KeyError) as error:
            what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{source} holds no wordings of captions: {what}; delete it to do without") from error


def _stripped(text: Sequence[str]) -> tuple[str, ...]:
    return tuple(unit.strip() for unit in text)


def _without_names(caption: tuple[str, ...], by_first: dict[str, list[tuple[str, ...]]]) -> Iterator[str]:
    """The caption with each name in it replaced by a gap in turn."""
    plain, start = _stripped(caption), 0
    while start < len(plain):
        here = (each for each in by_first.get(plain[start], ()) if plain[start : start + len(each)] == each)
        if (name := next(here, None)) is None:
            start += 1
            continue
        blank, end = " " if caption[start].startswith(" ") else "", start + len(name)
        yield "".join((*caption[:start], blank, "{}", *caption[end:]))
        start = end


def _neighbours(text: str) -> Iterator[tuple[str, ...]]:
    """The words of a template or text that stand side by side, in twos; a word alone beside a gap for itself."""
    for part in text.split("{}"):
        words = [unit for unit in _stripped(units(part)) if is_word(unit)]
        yield from pairwise(words) if len(words) > 1 else [(word,) for word in words]
