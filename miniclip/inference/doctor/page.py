"""A diagnosis as tables of words, and as a page with pictures to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from ...common.wording import counted, cut_short, portion
from ...reports.sheet import Entry, Section, write_sheet
from .costs import chance
from .examine import Diagnosis
from .findings import REASONS, Finding
from .parts import TEST, TRAIN, VAL

_SHOWN_FINDINGS = 12  # findings of a reason, the worst and the mildest ones
_IN_PAIRS = ("leak", "near-leak", "copy", "near-duplicate")  # the page shows the other picture beside each


def tables_of(found: Diagnosis, reasons: Sequence[str], batch_size: int) -> dict[str, list[tuple[str, ...]]]:
    """Rows by title; the first of each has the names of the columns.

    Args:
        reasons: those for which a pair is dropped.
    """
    looked, dropped = found.looked, found.dropped(reasons)
    there = {part: len(looked.rows_of(part)) for part in (TRAIN, VAL, TEST)}
    counts = Counter((each.reason, part) for part in there for each in found.findings if looked.part(each.row) == part)
    listed = Counter((each.reason, looked.part(row)) for row, each in dropped.items())
    out: dict[str, list[tuple[str, ...]]] = {
        "what was looked at": [
            ("part", "source", "usable", "of"),
            *(
                (source.part, source.name, f"{int((looked.source == number).sum()):,}", f"{len(source.keys):,}")
                for number, source in enumerate(looked.sources)
            ),
        ],
        "what can't be used": [
            ("number", "reason", "such as"),
            *((f"{count:,}", reason, first) for reason, (count, first) in looked.problems.items()),
        ],
        "findings": [
            ("reason", "pairs", "share", "in drop.csv", "what it is"),
            *(
                (
                    reason if part == TRAIN else f"{reason}, {part}",
                    f"{count:,}",
                    portion(count / there[part]),
                    f"{listed[reason, part]:,}",
                    REASONS[reason],
                )
                for reason in REASONS
                for part in there
                if (count := counts[reason, part])
            ),
        ],
        f"the loss at batch size {batch_size:,} (chance is {chance(batch_size):.3f})": [
            ("because of", "others that fit a pair, too", "lowest loss"),
            *(
                (cost.what, f"{cost.others:.3g}", "-" if cost.lowest_loss is None else f"{cost.lowest_loss:.3f}")
                for cost in found.costs
            ),
        ],
        "captions that name other pictures": [
            ("pictures", "others named", "caption", "such as"),
            *(
                (f"{own:,}", f"{others:,}", cut_short(text, 80), cut_short(holder, 80))
                for text, own, others, holder in found.names
            ),
        ],
        "captions of many pictures": [
            ("pictures", "caption"),
            *((f"{count:,}", cut_short(text, 120)) for text, count in list(found.repeated.items())[:20]),
        ],
    }
    return {title: rows for title, rows in out.items() if len(rows) > 1}


def notes_of(found: Diagnosis) -> list[str]:
    """Sentences about the whole set."""
    looked = found.looked
    parts = {part: len(looked.rows_of(part)) for part in (TRAIN, VAL, TEST)}
    out = [", ".join(f"{part}: {counted(count, 'picture')}" for part, count in parts.items() if count)]
    if found.language:
        out.append(f"most captions are of the language {found.language!r}")
    if found.estimated_mismatch is not None:
        out.append(f"estimated share of pairs that were put together by chance: {portion(found.estimated_mismatch)}")
    if found.groups:
        num_pairs, groups = sum(map(len, found.groups)), counted(len(found.groups), "group")
        out.append(f"{num_pairs:,} pairs are in {groups} that should share a target")
    return out


def write_page(path: Path, found: Diagnosis, tables: dict[str, list[tuple[str, ...]]]) -> None:
    sections = []
    for reason, count in found.counts().items():
        of_reason = [finding for finding in found.findings if finding.reason == reason]
        shown = (
            of_reason
            if count <= _SHOWN_FINDINGS
            else [*of_reason[: _SHOWN_FINDINGS // 2], *of_reason[-_SHOWN_FINDINGS // 2 :]]
        )
        note = REASONS[reason] + (
            "" if count <= _SHOWN_FINDINGS else f"; {_SHOWN_FINDINGS} of {count:,}, the worst and the mildest"
        )
        sections.append(
            Section(f"{reason}: {count:,}", [e for each in shown for e in _finding_entries(found, each)], (), note)
        )
    write_sheet(path, "Doctor", notes_of(found), sections, tables)


def _finding_entries(found: Diagnosis, finding: Finding) -> list[Entry]:
    facts = {"score": f"{finding.score:.4g}"} | ({"note": cut_short(finding.note)} if finding.note else {})
    own = _picture_entry(found, finding.row, facts)
    if finding.reason not in _IN_PAIRS:
        return [own]
    return [own, _picture_entry(found, finding.like, {"as": found.looked.key(finding.row)})]


def _picture_entry(found: Diagnosis, row: int, facts: dict[str, str]) -> Entry:
    looked = found.looked
    texts = looked.captions[row]
    caption = {"caption": cut_short(texts[0]) + (f" (of {len(texts)})" if len(texts) > 1 else "")} if texts else {}
    return Entry(partial(_reopened, found, row), looked.key(row), facts={"part": looked.part(row), **caption, **facts})


def _reopened(found: Diagnosis, row: int) -> Image.Image:
    try:
        return found.looked.open(row)
    except OSError as error:
        raise ValueError(str(error)) from error
