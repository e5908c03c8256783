"""Pictures that were found, as one self-contained page: a section for each query, a thumbnail for each picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..common.files import write_text
from ..common.pictures import thumbnail
from .page_parts import page_template

_THUMBNAIL = (160, 160)  # pixels of a thumbnail


@dataclass(frozen=True)
class Entry:
    """A picture of the page.

    Args:
        open: gives the picture, or raises ValueError; called once.
        name: the path, the URL or the key; a `link` leads to it.
        facts: what else is shown, by name.
        note: a sentence below them.
    """

    open: Callable[[], Image.Image]
    name: str
    cosine: float | None = None
    link: str | None = None
    facts: dict[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Section:
    """
    Args:
        asked: pictures that were asked by.
        note: a sentence below the title.
    """

    title: str
    found: Sequence[Entry]
    asked: Sequence[Entry] = ()
    note: str = ""


def write_sheet(
    path: str | Path,
    title: str,
    notes: Sequence[str],
    sections: Sequence[Section],
    tables: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> None:
    """Writes the page. A picture that can't be read any more is shown as the reason why.

    Args:
        tables: above the pictures, rows by title, of which the first has the names of the columns.
    """
    shown = [
        {
            "title": section.title,
            "note": section.note,
            "asked": [_figure(each) for each in section.asked],
            "found": [_figure(each) for each in section.found],
        }
        for section in sections
    ]
    template = page_template("sheet.html")
    created = time.strftime("%Y-%m-%d %H:%M")
    write_text(path, template.render(title=title, notes=notes, tables=tables or {}, sections=shown, created=created))


def _figure(entry: Entry) -> dict[str, object]:
    picture, problem = "", ""
    try:
        picture = thumbnail(entry.open(), _THUMBNAIL)
    except ValueError as error:
        problem = str(error)
    return {
        "picture": picture,
        "problem": problem,
        "name": entry.name,
        "short": entry.name.rpartition("/")[2],
        "cosine": entry.cosine,
        "link": entry.link,
        "facts": entry.facts,
        "note": entry.note,
    }
