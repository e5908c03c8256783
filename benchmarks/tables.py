"""The pages of results: a table of all cases, and one of what runs without PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contenders import MOST_DIFFERENCE, OURS, OURS_BF16, PEERS, RIVALS, USUAL_DIFFERENCE, precision
from machine import Machine, versions

from miniclip.common.files import write_text


def summary(row: Mapping[str, Any]) -> str:
    """A line for the terminal."""
    parts = [f"{_time(row['seconds'][OURS])} ± {_time(row['spread'][OURS])}"]
    for name, ratio in row["times_as_fast"].items():
        parts.append(f"{ratio:.2f} × as fast as {name} ({row['times_as_fast_cpu'][name]:.2f} by processor time)")
    if OURS_BF16 in row["seconds"]:
        parts.append("engines in bf16 and int8 beside miniclip in bf16")
    memory = row["memory_mb"]
    if {OURS, "open_clip"} <= memory.keys():
        parts.append(f"{memory[OURS]:.0f} MB, {memory[OURS] / memory['open_clip']:.2f} of open_clip's")
    if row["reached"] is not None:
        parts.append("target reached" if row["reached"] else "below the target")
    return "; ".join(parts)


def other_processor(out: Path, machine: Machine) -> str | None:
    """The processor whose figures are in `out`.json, if it is another than this machine's."""
    path = out.with_suffix(".json")
    known = json.loads(path.read_text())["machine"]["processor"] if path.is_file() else machine.processor
    return known if known != machine.processor else None


def write(out: Path, machine: Machine, size: str, rows: Mapping[str, Any]) -> None:
    """Writes `out`.json and `out`.md: these rows, and the other rows that were there."""
    path = out.with_suffix(".json")
    known = json.loads(path.read_text()) if path.is_file() else {}
    facts = {"machine": asdict(machine), "versions": versions(), "size": size}
    document = {**facts, "rows": {**known.get("rows", {}), **rows}}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    write_text(out.with_suffix(".md"), _page(document))


def _page(document: Mapping[str, Any]) -> str:
    machine, rows = document["machine"], document["rows"]
    head = [
        "case",
        OURS,
        *PEERS,
        "× open_clip",
        "× best peer",
        "by CPU time",
        "target",
        "limit",
        "peak MB",
        "differ by",
    ]
    lines = [head, ["---"] * len(head), *(_cells(row) for row in rows.values())]
    days = sorted({row["date"] for row in rows.values()})
    threads = sorted({row["threads"] for row in rows.values()})
    product = f"{machine['flops'] / 1e9:.0f} GFLOP/s ({machine['source']})"
    text = [
        f"# {machine['name']}",
        f"`python benchmarks/run.py{'' if document['size'] == 'full' else ' --' + document['size']}`, "
        f"{' to '.join(dict.fromkeys([days[0], days[-1]]))}; {machine['processor']}; "
        f"{' or '.join(map(str, threads))} threads; "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        + ".",
        f"Matrix products reach {product}, copies {machine['bandwidth'] / 1e9:.1f} GB/s.",
        "\n".join("| " + " | ".join(line) + " |" for line in lines),
        "Each time is the median of rounds that the contenders take in turns, ± half of its range. A ratio above 1 "
        'means that miniclip is faster; "by CPU time" is the ratio to open_clip of what all processors worked, which '
        "other work on the machine hardly touches. The limit is what the matrix products, and the bytes that have to "
        "be moved, take at the rates above, or work that no contender can do without, in per cent of miniclip's time. "
        "Peak memory is above what imports take: miniclip's, open_clip's, and their ratio. Outputs may differ by "
        f"{MOST_DIFFERENCE:g} of the largest number; – stands where there is nothing to compare, as where crops are "
        "drawn at random. Targets in bold are not reached. docs/speed.md says how all this is measured and what bounds "
        "each case.",
        *_rivals(rows.values()),
    ]
    notes = [f"- {row['title']}: {row['note']}" for row in rows.values() if row["note"]]
    return "\n\n".join([*text, *(["\n".join(notes)] if notes else [])]) + "\n"


def _rivals(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The second table: a line for each case and contender that runs without PyTorch, and for ours in bf16."""
    lines = [
        [row["title"], *_rival_cells(row, name)]
        for row in rows
        for name in (OURS_BF16, *RIVALS)
        if name in row["times_as_fast"]
    ]
    if not lines:
        return []
    head = ["case", "beside miniclip", "its time", "miniclip's", "× as fast", "by CPU time", "target", "differs by"]
    bounds = " and ".join(f"{bound:g} in {name}" for name, bound in USUAL_DIFFERENCE.items())
    return [
        "## Inference engines and tokenizers in Rust",
        "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]),
        "Engines run both towers as `miniclip export` writes them, texts padded to the longest of a batch. Those in "
        "bf16 and int8 stand beside miniclip in bf16 where there is such a row. In these precisions embeddings may "
        f"differ from float32's, usually by less than {bounds}; more is in bold. Weights are random, so this says "
        "nothing about answers. Of token ids stands the share of texts whose ids differ from OpenAI's.",
    ]


def _rival_cells(row: Mapping[str, Any], name: str) -> list[str]:
    ours, seconds, far = row["beside"][name], row["seconds"], row["difference"].get(name)
    target, is_met = row["targets"].get(name), _targets_met(row).get(name)
    wanted = "–" if target is None else f"{target:g}"
    is_ids = name in ("instant_clip_tokenizer", "tokenizers")
    apart = "–" if far is None else f"{far:.1%} of texts" if is_ids else f"{far:.0e}"
    is_usual = far is None or is_ids or far <= USUAL_DIFFERENCE.get(precision(name), MOST_DIFFERENCE)
    return [
        name,
        f"{_time(seconds[name])} ± {_time(row['spread'][name])}",
        _time(seconds[ours]) + (" in bf16" if ours == OURS_BF16 else ""),
        f"{row['times_as_fast'][name]:.2f}",
        f"{row['times_as_fast_cpu'][name]:.2f}",
        f"**{wanted}**" if is_met is False else wanted,
        apart if is_usual else f"**{apart}**",
    ]


def _cells(row: Mapping[str, Any]) -> list[str]:
    seconds, ratios, memory = row["seconds"], row["times_as_fast"], row["memory_mb"]
    times = [f"{_time(seconds[n])} ± {_time(row['spread'][n])}" if n in seconds else "–" for n in (OURS, *PEERS)]
    torch_targets = {name: target for name, target in row["targets"].items() if name not in RIVALS}
    wanted = [f"{target:g} × {name}" for name, target in torch_targets.items()]
    if row["memory_target"]:
        wanted.append(f"{row['memory_target']:g} of its memory")
    target = ", ".join(wanted) or "–"
    limit = row["limit_seconds"]
    peak = [f"{memory[name]:.0f}" for name in (OURS, "open_clip") if name in memory]
    if len(peak) == 2:
        peak.append(f"{memory[OURS] / memory['open_clip']:.2f}")
    cpu = row["times_as_fast_cpu"].get("open_clip")
    differences = [far for name, far in row["difference"].items() if name in PEERS]
    is_short = reached({**row, "targets": torch_targets}) is False
    return [
        row["title"],
        *times,
        f"{ratios['open_clip']:.2f}" if "open_clip" in ratios else "–",
        f"{_best(ratios):.2f}" if ratios.keys() & set(PEERS) else "–",
        "–" if cpu is None else f"{cpu:.2f}",
        f"**{target}**" if is_short else target,
        "–" if limit is None else f"{limit / seconds[OURS]:.0%}",
        " / ".join(peak) or "–",
        f"{max(differences):.0e}" if differences else "–",
    ]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.{0 if seconds >= 0.1 else 1}f} ms"


def reached(row: Mapping[str, Any]) -> bool | None:
    """Whether the targets are met; None without a target whose peer took part."""
    met = list(_targets_met(row).values())
    memory = row["memory_mb"]
    if row["memory_target"] and {OURS, "open_clip"} <= memory.keys():
        met.append(memory[OURS] <= row["memory_target"] * memory["open_clip"])
    return all(met) if met else None


def _targets_met(row: Mapping[str, Any]) -> dict[str, bool]:
    """Of each target whose peer took part; one of bf16 is for ours in bf16."""
    found = dict(row["times_as_fast"])
    if found.keys() & set(PEERS):
        found["best"] = _best(found)
    if OURS_BF16 not in row["seconds"]:
        found = {name: ratio for name, ratio in found.items() if precision(name) != "bf16"}
    return {name: found[name] >= target for name, target in row["targets"].items() if name in found}


def _best(times_as_fast: Mapping[str, float]) -> float:
    """How many times as fast as the fastest peer that runs on PyTorch."""
    return min(times for name, times in times_as_fast.items() if name in PEERS)
