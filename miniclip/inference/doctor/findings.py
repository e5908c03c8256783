"""What a finding is, and which of them are certain enough to drop a pair for."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

# Gravest first: the one under which a pair is listed that has several. What each means, and what its score is.
REASONS = {
    "leak": "the same pixels are in val or test",
    "near-leak": "nearly the same picture is in val or test; score: likeness",
    "copy": "another pair has the same pixels and all of its captions",
    "near-duplicate": "nearly the same picture as another's, which is kept; score: likeness",
    "blank": "nothing is in the picture; score: levels from its darkest to its brightest field",
    "junk-caption": "no caption says anything: a URL, a file name, markup, a missing caption's phrase",
    "boilerplate": "every caption is one of many pictures; score: pictures",
    "says-little": "no caption says more than a word of web pages, a site or a number, which may be what is shown",
    "mismatch": "the caption fits others better; score: share of others that fit at least as well",
    "language": "every caption is of another language; score: probability that it is of the set's",
    "turned": "an EXIF tag turns the picture, and training does not",
    "turned-pixels": "the picture fits its caption much better when it is turned; score: gain",
    "tiny": "the short side is less than half of the model's; score: pixels",
    "blurred": "blurred at the size that the model sees; score: blur from 0 to 1",
    "names-others": "a caption also names other pictures; score: how many",
}
# Nothing is lost with these pairs. All else is a suspicion, and dropped only if it is asked for.
CERTAIN = ("leak", "copy", "blank", "junk-caption")
_ONLY_WITH = {
    **dict.fromkeys(("leak", "near-leak"), ("--val", "--test")),
    **dict.fromkeys(("mismatch", "turned-pixels"), ("--model",)),
}


_SETS = {"certain": CERTAIN, "all": tuple(REASONS), "none": ()}


class Finding(NamedTuple):
    """
    Args:
        row: of the pictures that were looked at.
        like: the row of another that it is about, or -1.
        note: what was seen, for a person.
    """

    row: int
    reason: str
    score: float
    note: str = ""
    like: int = -1


def chosen_reasons(text: str, given: Collection[str] = ("--val", "--test", "--model")) -> tuple[str, ...]:
    """What `--drop-reasons` names: reasons with commas between them, or `certain`, `all`, `none`.

    Args:
        given: the options by which more is looked for; without them, sets of reasons have fewer.

    Raises:
        ValueError: another name, or a reason that is not looked for without another option.
    """
    unlooked = {reason: options for reason, options in _ONLY_WITH.items() if not {*options} & {*given}}
    names = [name for part in text.split(",") if (name := part.strip())]
    sets = {name: [each for each in reasons if each not in unlooked] for name, reasons in _SETS.items()}
    out = dict.fromkeys(reason for name in names for reason in sets.get(name, (name,)))
    if unknown := [name for name in out if name not in REASONS]:
        raise ValueError(f"{unknown[0]!r} is no reason to drop a pair; valid are {', '.join((*sets, *REASONS))}")
    if unasked := [name for name in out if name in unlooked]:
        raise ValueError(
            f"--drop-reasons names {unasked[0]}, which is looked for only with {' or '.join(unlooked[unasked[0]])}"
        )
    return tuple(reason for reason in REASONS if reason in out)
