"""What all pages share: the template, plots as SVG, and labels that fit."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import jinja2
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..common.files import ASSETS

# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def svg(figure: Figure, is_tight: bool = True) -> str:
    """The picture as an element of a page; `is_tight` cuts its margins off."""
    buffer = io.StringIO()
    # Text stays text, for the browser's fonts, which know more scripts than matplotlib's.
    with rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*missing from font.*")
        figure.savefig(
            buffer,
            format="svg",
            dpi=216,  # of what is made of pixels
            transparent=True,  # the paper is the page's
            bbox_inches="tight" if is_tight else None,
            metadata={"Date": None, "Creator": None},
        )
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def bare_axes(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def short_label(name: str, most: int = 32) -> str:
    return name if len(name) <= most else name[: most // 2] + "…" + name[-(most // 2 - 1) :]


def page_template(name: str, **filters: Callable[..., str]) -> jinja2.Template:
    """One of assets/*.html; what goes into it is escaped, and what is missing is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(name)
