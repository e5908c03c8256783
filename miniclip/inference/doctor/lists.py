"""A diagnosis -> tables: every finding, the pairs to drop, the groups that should share a target, and the sources."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...common.files import write_csv
from ...data.reading.listed import SOURCES_FILE
from .examine import Diagnosis
from .findings import Finding
from .parts import TRAIN

FINDINGS_FILE, DROP_FILE, GROUPS_FILE, PAGE_FILE = "findings.csv", "drop.csv", "groups.csv", "doctor.html"


def write_findings(folder: Path, found: Diagnosis) -> None:
    """A line for each reason of each pair: key, source, reason, score, the other pair that it is about, a note."""
    rows = (
        (*_listed_line(found, finding), "" if finding.like < 0 else found.looked.key(finding.like), finding.note)
        for finding in found.findings
    )
    write_csv(folder / FINDINGS_FILE, ("key", "source", "reason", "score", "like", "note"), rows)


def write_drop(folder: Path, found: Diagnosis, reasons: Sequence[str]) -> int:
    """The pairs to drop, each once under its gravest reason, for `miniclip shards --drop`; returns their number."""
    dropped = found.dropped(reasons)
    rows = [_listed_line(found, dropped[row]) for row in sorted(dropped)]
    write_csv(folder / DROP_FILE, ("key", "source", "reason", "score"), rows)
    return len(rows)


def write_groups(folder: Path, found: Diagnosis) -> int:
    """key and group, numbered from 0, of the pairs of train that should share a target; returns the number of groups.

    With several sources of train their names stand in a third column, `source`.
    """
    has_several = sum(source.part == TRAIN for source in found.looked.sources) > 1
    rows = []
    for number, group in enumerate(found.groups):
        for row in group:
            source = [found.looked.sources[found.looked.source[row]].name] if has_several else []
            rows.append((found.looked.key(row), number, *source))
    write_csv(folder / GROUPS_FILE, ("key", "group", *(["source"] if has_several else [])), rows)
    return len(found.groups)


def write_sources(folder: Path, found: Diagnosis) -> None:
    """What was looked at, so that a source that no row is about is not taken for one that the lists don't know."""
    write_csv(folder / SOURCES_FILE, ("part", "source"), [(each.part, each.name) for each in found.looked.sources])


def _listed_line(found: Diagnosis, finding: Finding) -> tuple[str, str, str, str]:
    looked = found.looked
    source = looked.sources[looked.source[finding.row]]
    key = source.listed(looked.index[finding.row])
    return key, source.name, finding.reason, f"{finding.score:.4g}"
