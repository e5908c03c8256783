"""Results -> `Grid`s, which the terminal and the page both print. Shares are of 1, printed in %."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table

from ..common.wording import percent, printable
from ..evaluation.measures.classification import Subgroups
from ..evaluation.probes import METHODS
from ..evaluation.prompts import Prompts
from ..evaluation.robustness import Robustness
from ..evaluation.scores import Cell
from ..evaluation.suite import Result
from .comparison import Change
from .results import prompts_label

_MOST_SUBGROUPS = 30
_SIGNIFICANT = 0.05
NO_VALUE = "–"
_TEXTS = (
    "data", "model", "prompts", "find", "value", "images of none", "learnt from", "method", "chosen", "remark",
    "metric", "change", "class", "images gained", "images lost", "captions gained", "captions lost",
)  # fmt: skip  # columns of words, which may be broken anywhere


def _interval(ends: tuple[float, float]) -> str:
    return f"{percent(ends[0])} – {percent(ends[1])}"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def wordings(prompts: Prompts) -> tuple[str, ...]:
    """The templates as texts; for prompts by class, those of all classes one after the other."""
    if isinstance(prompts, Mapping):
        return tuple(prompt for each in prompts.values() for prompt in each)
    return tuple(map(str, prompts))


def _num_prompts(prompts: Prompts) -> str:
    """For each class."""
    counts = sorted({len(each) for each in prompts.values()} if isinstance(prompts, Mapping) else {len(prompts)})
    return " to ".join(str(count) for count in dict.fromkeys([counts[0], counts[-1]]))


def prompts_cell(result: Result) -> str:
    """Their name, and how many there are for each class; nothing without classes."""
    if not result.scores.prompts:
        return ""
    label, count = prompts_label(result), _num_prompts(result.scores.prompts)
    return f"{label} ({count})" if label else count


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@dataclass(frozen=True)
class Grid:
    """A table of texts, for the terminal and for the page.

    Args:
        rows: a cell for each column.
        main: the column to look at first.
        notes: sentences below it.
        links: an anchor on the page for each row, or none.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    main: str = ""
    notes: tuple[str, ...] = ()
    links: tuple[str, ...] = ()

    def is_text(self, column: str) -> bool:
        return column in _TEXTS


def _grid(
    title: str,
    rows: Sequence[Mapping[str, str]],
    shared: Sequence[str] = (),
    *,
    main: str = "",
    notes: Sequence[str] = (),
    links: Sequence[str] = (),
) -> Grid:
    """
    Args:
        rows: cells by column. What no row has is left out.
        shared: columns that go into the title if they are the same in all rows.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for name in shared:
        if name in columns and len(values := {row.get(name, "") for row in rows}) == 1:
            columns.remove(name)
            (value,) = values
            title += f", {name + ' ' if name in ('prompts', 'learnt from') else ''}{value}" if value else ""
    columns = [name for name in columns if any(row.get(name, "") not in ("", NO_VALUE) for row in rows)]
    cells = tuple(tuple(row.get(name, NO_VALUE) for name in columns) for row in rows)
    return Grid(title, tuple(columns), cells, main, tuple(notes), tuple(links))


def _printable(grid: Grid) -> Table:
    out = Table(title=_shown(grid.title), caption=_shown(" ".join(grid.notes)) or None, caption_justify="left")
    for number, name in enumerate(grid.columns):
        # On a narrow terminal numbers stay whole, and names are broken.
        words = [word for text in (name, *(row[number] for row in grid.rows)) for word in text.split()]
        is_text = grid.is_text(name)
        out.add_column(
            _shown(name),
            justify="left" if is_text else "right",
            style="bold" if name == grid.main else "",
            overflow="fold",
            min_width=None if is_text else max(map(cell_len, words), default=None),
        )
    for row in grid.rows:
        out.add_row(*map(_shown, row))
    return out


def _shown(text: str) -> str:
    """The text as it is: neither rich's markup nor the terminal's control characters mean anything in it."""
    return escape(printable(text))


def tables(results: Sequence[Result], robustness: Robustness | None = None) -> list[Table]:
    """One for each task, then those of subgroups, of images of no class, of probes, and of shifted sets."""
    grids = score_grids(results)
    for result in results:
        grids += [subgroup_grid(result, column) for column in result.subgroups]
    if outside := [result for result in results if result.outside is not None]:
        grids.append(_outside_grid(outside))
    if probed := [result for result in results if result.probes is not None]:
        grids.append(probe_grid(probed))
    if robustness is not None:
        grids.append(robustness_grid(robustness))
    return [_printable(grid) for grid in grids]


def score_grids(results: Sequence[Result], links: Sequence[str] = ()) -> list[Grid]:
    """
    Args:
        links: an anchor on the page for each result.
    """
    sets = [result.data.name for result in results]
    by_task: dict[str, list[int]] = {}
    for number in sorted(range(len(results)), key=lambda number: sets.index(sets[number])):
        by_task.setdefault(results[number].task, []).append(number)
    grids = []
    for task, numbers in by_task.items():
        rows, anchors = [], []
        for number in numbers:
            own = score_rows(results[number])
            rows += own
            anchors += [links[number]] * len(own) if links else []
        title = task.replace("zeroshot_", "zero-shot ")
        main = results[numbers[0]].scores.main_column
        grids.append(_grid(title, rows, ("model", "prompts"), main=main, links=anchors))
    return grids


def score_rows(result: Result) -> list[dict[str, str]]:
    """A row, or several, as the kind of scores has it."""
    scores = result.scores
    shared = {"data": result.data.name, "model": result.model, "prompts": prompts_cell(result)}
    shared["images"] = f"{scores.num_images} of {len(result.data)}" if scores.unreadable else str(scores.num_images)
    return [shared | {name: _cell(name, value) for name, value in row.items()} for row in scores.rows()]


def _cell(column: str, value: Cell) -> str:
    if value is None:
        return NO_VALUE
    if isinstance(value, tuple):
        return _interval(value)
    return percent(value) if isinstance(value, float) and column.endswith("%") else str(value)


def subgroup_grid(result: Result, column: str) -> Grid:
    found = result.subgroups[column]
    rows = [
        {
            "value": "(none)" if each.value is None else str(each.value),
            "images": str(each.num_images),
            "top-1 %": percent(each.accuracy),
            "95 % interval": _interval(each.interval),
            "remark": "too few" if each.is_too_small else "",
        }
        for each in found.subgroups[:_MOST_SUBGROUPS]
    ]
    notes = [_gap(found)]
    if more := found.subgroups[_MOST_SUBGROUPS:]:
        notes.append(f"And {len(more)} values of fewer images, in results.json.")
    parts = (result.data.name, result.model, f"prompts {prompts_cell(result)}")
    return _grid(f"top-1 by {column}, " + ", ".join(parts), rows, main="top-1 %", notes=notes)


def _gap(found: Subgroups) -> str:
    if found.gap is None or found.best is None or found.worst is None:
        return "No gap is reported: fewer than two values have enough independent images."
    low, high = found.best.interval[0], found.worst.interval[1]
    overlap = "do not overlap" if low > high else "overlap, so chance may have made it"
    return (
        f"Gap {percent(found.gap)} points, from {found.worst.value} to {found.best.value}; their intervals {overlap}."
    )


def _outside_grid(results: Sequence[Result]) -> Grid:
    rows, notes = [], []
    for result in results:
        outside = result.outside
        assert outside is not None
        acceptance, separation = outside.acceptance, outside.separation
        rows.append(
            {
                "data": result.data.name,
                "model": result.model,
                "images of none": outside.name,
                "accepted from cosine": f"{acceptance.threshold.cosine:.4f}",
                "accepts of the classes %": percent(acceptance.accepted_inside),
                "accepts of none %": percent(acceptance.accepted_outside),
                "95 % interval": _interval(acceptance.interval_outside),
                "AUROC %": percent(separation.auroc),
                "FPR at 95 % TPR %": percent(separation.fpr_at_95_tpr),
            }
        )
        notes.append(f"{result.data.name}: {acceptance}.")
    shared = ("data", "model", "images of none")
    return _grid("none of these", rows, shared, main="AUROC %", notes=notes if len(notes) == 1 else ())


def probe_grid(results: Sequence[Result]) -> Grid:
    rows, notes = [], []
    for result in results:
        probes, scores = result.probes, result.scores
        assert probes is not None
        linear, tip = probes.linear, probes.tip_adapter
        chosen = (f"C {linear.C:.3g}", f"k {probes.num_neighbours}", f"α {tip.alpha:.3g}, β {tip.beta:.3g}")
        found = [("zero-shot", "", scores.values()["acc1"], scores.intervals()["acc1"], "")]
        found += [
            (method, choice, outcome.accuracy, outcome.interval, probes.curve.verdict(method))
            for method, choice, outcome in zip(METHODS, chosen, probes.outcomes().values(), strict=True)
        ]
        rows += [
            {
                "data": result.data.name,
                "model": result.model,
                "learnt from": f"{probes.train} ({len(probes.splits.labelled)})",
                "method": method,
                "chosen": choice,
                "top-1 %": percent(accuracy),
                "95 % interval": _interval(interval),
                "remark": remark,
            }
            for method, choice, accuracy, interval, remark in found
        ]
        where = f"{result.data.name}: " if len(results) > 1 else ""
        if not linear.is_converged:
            notes.append(f"{where}The linear probe's fit did not come to its end.")
        if num_leaked := probes.splits.num_leaked:
            notes.append(f"{where}{num_leaked} test images are training images as well, so probes score too high.")
    if all(result.probes and result.probes.is_pooled for result in results):
        notes.append("The linear probe has the features before their projection.")
    return _grid("learnt from features", rows, ("data", "model", "learnt from"), main="top-1 %", notes=notes)


def robustness_grid(found: Robustness) -> Grid:
    rows = []
    for row in found.rows:
        cells = {
            "model": row.model + (" (baseline)" if row.is_baseline else ""),
            f"{found.standard} top-1 %": percent(row.standard),
        }
        for name, share, effective in zip(found.shifted, row.shifted, row.effective, strict=True):
            cells |= {f"{name} %": percent(share), f"{name}, beyond the line": NO_VALUE}
            if effective is not None:
                cells[f"{name}, beyond the line"] = _points(effective)
        rows.append(cells | {"mean %": percent(row.mean_shifted), "drop": percent(row.standard - row.mean_shifted)})
    notes = []
    if any(found.fits):
        notes.append("Beyond the line: points above what the baselines' accuracies lead one to expect.")
    elif any(row.is_baseline for row in found.rows):
        notes.append("The baselines give no line: it needs two of different accuracy, none of 0 or 100 %.")
    return _grid("under shifts, zero-shot top-1", rows, main="mean %", notes=notes)


_METRICS = {
    "acc1": "top-1",
    "image_retrieval_recall@1": "images by text, R@1",
    "text_retrieval_recall@1": "texts by image, R@1",
}


_TEST = (
    "p is of McNemar's exact test; where images or captions belong together, of its like for groups, an exact test of "
    "sign flips."
)


def comparison_tables(changes: Sequence[Change]) -> list[Table]:
    """What became better and worse, of which classes, and some of the images or captions that did."""
    grids = [_change_grid(changes)]
    for change in changes:
        found, title = change.comparison, f"{change.dataset}, {_METRICS[change.metric]}, {_before_after(change.models)}"
        changed = [row for row in change.by_class if row[2] != row[3]]
        rows = [
            {
                "class": name,
                "images": str(count),
                "before %": percent(before),
                "after %": percent(after),
                "difference": _points(after - before),
            }
            for name, count, before, after in changed[:10]
        ]
        if rows:
            notes = [f"And {len(changed) - 10} more classes."] if changed[10:] else []
            grids.append(_grid(f"classes that changed most: {title}", rows, main="difference", notes=notes))
        pairs = list(zip_longest(change.gained[:10], change.lost[:10], fillvalue=""))
        if pairs:
            counts = f"the first of {len(found.gained)} gained and {len(found.lost)} lost"
            columns = f"{change.unit}s gained", f"{change.unit}s lost"
            grids.append(_grid(f"{counts}: {title}", [dict(zip(columns, pair, strict=True)) for pair in pairs]))
    return [_printable(grid) for grid in grids]


def _change_grid(changes: Sequence[Change]) -> Grid:
    rows = [
        {
            "data": change.dataset,
            "metric": _METRICS[change.metric],
            "model": _before_after(change.models),
            "prompts": _before_after(change.prompts),
            "of": f"{change.count} {change.unit}s",
            "before %": percent(change.shares[0]),
            "after %": percent(change.shares[1]),
            "difference": _points(change.comparison.difference),
            "95 % interval": " – ".join(_points(end) for end in change.comparison.interval),
            "p": "<0.001" if change.comparison.p_value < 0.001 else f"{change.comparison.p_value:.3f}",
            "gained": str(len(change.comparison.gained)),
            "lost": str(len(change.comparison.lost)),
            "change": verdict(change),
        }
        for change in changes
    ]
    N = len(changes)
    notes = [f"One comparison, judged by p < {_SIGNIFICANT}."]
    if N > 1:
        notes = [
            f"{N} comparisons, each judged by p < {_SIGNIFICANT}: were nothing different, about {_SIGNIFICANT * N:.2g} "
            "of so many would seem to be."
        ]
    notes.append(_TEST)
    return _grid("what changed", rows, ("model", "prompts"), main="difference", notes=notes)


def verdict(change: Change) -> str:
    """In words, by the p-value."""
    if change.comparison.p_value >= _SIGNIFICANT:
        return "no difference beyond chance"
    return "better" if change.comparison.difference > 0 else "worse"


def _before_after(names: tuple[str, str]) -> str:
    return names[0] if names[0] == names[1] else " → ".join(names)
