"""What a keyboard and a screen reader need of the site, and what the theme leaves out."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

EXCHANGED = {
    'role="heading"': 'role="heading" aria-level="2"',  # captions of the contents
    '<summary aria-label="Toggle hidden content">': "<summary>",  # of a folded cell, which has words of its own
}


def exchange(app: Sphinx, page: str, template: str, context: dict[str, Any], *_: object) -> None:
    for part in {"furo_navigation_tree", "body"} & context.keys():
        for text, better in EXCHANGED.items():
            context[part] = context[part].replace(text, better)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", exchange, priority=1000)  # after the theme, which makes the tree
    app.add_js_file("site.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
