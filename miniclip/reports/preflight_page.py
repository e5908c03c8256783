"""The findings of `miniclip check` as tables in the terminal and as a page."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from ..common.files import write_text
from ..common.wording import cut_short, portion, printable, share_of
from ..data.advice import advice, what_spoils
from ..data.findings import Findings, Pipeline


def _spread(values: np.ndarray, digits: int = 0) -> str:
    if not len(values):
        return "–"
    least, low, median, high, most = (f"{v:,.{digits}f}" for v in np.quantile(values, (0, 0.05, 0.5, 0.95, 1)))
    ends = f"all {least}" if least == most else f"all from {least} to {most}"
    return f"median {median}, 90 % from {low} to {high}, {ends}"


def _kinds(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {portion(count / sum(counts.values()))}" for name, count in counts.items())


def rows(f: Findings, pipeline: Pipeline | None = None) -> dict[str, list[tuple[str, str]]]:
    """What was found, as (name, value) by heading."""
    N, M = f.num_usable, len(f.token_counts)
    cut, small = share_of(f.token_counts > f.context_length), share_of(f.short_sides < f.image_size)
    num_bad, num_others = f.num_sampled - N, f.batch_size - 1
    wording = f"{portion(f.template_share)}: {cut_short(f.template)!r}, different texts: {f.template_texts:,}"
    out = {
        "pairs": [
            ("in all", f"{f.num_pairs:,}"),
            ("looked at", f"{f.num_sampled:,}" + ("" if f.num_sampled == f.num_pairs else ", chosen at random")),
            ("can't be used", f"{num_bad:,} ({portion(num_bad / f.num_sampled)})"),
        ],
        "what can't be used": [
            (f"{problem.num_samples:,}", f"{problem.kind}\n{cut_short(', '.join(problem.examples), 300)}")
            for problem in f.problems
        ],
        f"images ({N:,})": [
            ("short side, pixels", _spread(f.short_sides)),
            (f"below {f.image_size} pixels", portion(small)),
            ("long side / short side", _spread(f.aspects, 2)),
            ("formats", _kinds(f.formats)),
            ("pixels", _kinds(f.modes)),
            ("turned by an EXIF tag", portion(f.num_rotated / max(N, 1))),
            ("with a copy, byte for byte", portion(f.num_copies / max(N, 1))),
        ],
        f"captions ({M:,})": [
            ("of an image", _spread(f.captions_per_image)),
            ("tokens, start and end included", _spread(f.token_counts)),
            (f"cut at {f.context_length} tokens", portion(cut)),
            ("blank", f"{f.num_blank:,}"),
            ("that another image has, too", portion(f.num_repeated / max(M, 1))),
            ("without a word", portion(len(f.wordless) / max(M, 1))),
            ("most frequent wording", wording),
        ],
        "most frequent captions": [(f"{count:,} images", cut_short(text)) for text, count in f.top_captions],
        f"the loss at batch size {f.batch_size:,}": [
            ("others with a row's caption", f"{f.false_negatives * num_others:.3g} of {num_others:,} expected"),
            ("lowest that can be reached", f"{f.lowest_loss:.3f}"),
            ("chance, ln(batch)", f"{math.log(f.batch_size):.3f}"),
        ],
        "speed": [
            ("an image file", f"{f.mean_bytes / 1e3:,.1f} kB"),
            ("reading", f"{f.read_bytes_per_s / 1e6:,.1f} MB/s, perhaps from the memory in which files are cached"),
            ("decoding and augmenting", f"{f.decode_images_per_s:,.0f} images/s to {f.image_size} pixels, on one core"),
        ],
    }
    if f.workers:
        out["speed"].append((f"workers for {f.needed:g} images/s", f"{f.workers:,}"))
    if pipeline:
        total, n = sum(pipeline.seconds.values()), pipeline.num_images
        out[f"input pipeline ({n:,} samples)"] = [
            *((stage, f"{1e3 * s / n:.3f} ms an image, {portion(s / total)}") for stage, s in pipeline.seconds.items()),
            ("all in one process", f"{pipeline.alone_images_per_s:,.0f} images/s"),
            (f"DataLoader, workers: {pipeline.workers}", f"{pipeline.loader_images_per_s:,.0f} images/s"),
        ]
    headings = list(out)[: None if N else 2]
    return {heading: out[heading] for heading in headings if out[heading]}


def tables(f: Findings, pipeline: Pipeline | None = None) -> list[Table]:
    """`rows`, for the terminal."""
    out = []
    for heading, lines in rows(f, pipeline).items():
        table = Table(title=heading, title_justify="left", show_header=False)
        for name, value in lines:
            table.add_row(escape(printable(name)), escape(printable(value)))
        out.append(table)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The page


def _histogram(values: np.ndarray, limit: int, label: str, limit_label: str) -> str:
    """An SVG. What lies beyond both the limit and the 99th percentile is in the last bar."""
    from .page_parts import bare_axes, svg  # imports matplotlib, which takes half a second

    top = max(float(np.quantile(values, 0.99)), 1.1 * limit)
    figure, axes = bare_axes(4.6, 2.6)
    axes.hist(np.minimum(values, top), bins=40, range=(0, top), color="#3b78b5")
    axes.axvline(limit, color="#b3372f", linestyle=":")
    above = axes.get_xaxis_transform()
    axes.text(limit, 1.02, f"{limit_label}, {limit}", color="#b3372f", fontsize=8, ha="center", transform=above)
    axes.set(xlabel=label, yticks=[])
    axes.spines["left"].set_visible(False)
    return svg(figure)


def write_html(path: str | Path, f: Findings, pipeline: Pipeline | None = None) -> None:
    """One self-contained page: advice, numbers, lengths, and samples to look at."""
    from .page_parts import page_template  # half a second, which `brief` must not wait for

    pictures = f.num_usable and [
        _histogram(f.token_counts, f.context_length, "tokens of a caption", "context length"),
        _histogram(f.short_sides, f.image_size, "short side of an image, pixels", "the model's input"),
    ]
    shown = {"advice": advice(f), "grave": what_spoils(f), "groups": rows(f, pipeline), "pictures": pictures or []}
    page = page_template("check.html", short=cut_short).render(f=f, created=time.strftime("%Y-%m-%d %H:%M"), **shown)
    write_text(path, page)
