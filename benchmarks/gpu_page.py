"""The page of a GPU's results: times, agreement, and how to read them."""

from __future__ import annotations

from typing import Any

from contenders import OURS, THEIRS


def page(document: dict[str, Any]) -> str:
    machine = document["machine"]
    head = ["case", "ms", THEIRS, "ratio", "a second", THEIRS, "utilisation", THEIRS, "peak MB", THEIRS]
    head += ["largest batch", THEIRS]
    times, agreement, others = [head, ["---"] * len(head)], [], []
    for row in document["rows"]:
        if "differences" in row:
            for way, parts in row["differences"].items():
                if not agreement:
                    agreement = [["pairs", "computed by", *parts], ["---"] * (2 + len(parts))]
                agreement.append([row["case"], way, *(f"{value:.0e}" for value in parts.values())])
        elif "optimizers" in row:
            for kind, facts in row["optimizers"].items():
                others.append(f"{kind} alone takes {facts['seconds'] * 1e3:.1f} ms, {facts['share']:.1%} of a step")
        else:
            times.append(_cells(row))
    parts = [
        f"# {machine['processor']}",
        f"`python benchmarks/gpu.py --compile`, {document['date']}; "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        + ".",
        _table(times),
        f"bfloat16 under autocast, AdamW in one kernel on both sides, float32's products in TF32. Utilisation is of "
        f"{machine['flops'] / 1e12:.0f} TFLOP/s ({machine['source']}; a product of 8,192 × 8,192 reaches "
        f"{document['product'] / 1e12:.0f}), of what the towers have to compute: each text at its own length, backward "
        f"twice forward, nothing that is computed again; of the loss alone, its three products. Peak memory is "
        f"what tensors took, weights, gradients and the optimiser's state included. {'; '.join(others)}",
    ]
    if agreement:
        parts += [
            _table(agreement),
            "Differences from miniclip in float64 on the CPU, as a share of the largest number; bf16 is autocast.",
        ]
    return "\n\n".join(parts) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    ours, theirs = row[OURS], row.get(THEIRS, {})
    cells = [row["case"]]
    for name, form, factor in (
        ("seconds", "{:,.1f}", 1e3),
        ("per_second", "{:,.0f}", 1),
        ("utilisation", "{:.1%}", 1),
        ("peak_mb", "{:,.0f}", 1),
        ("largest_batch", "{:,}", 1),
    ):
        cells += [form.format(side[name] * factor) if name in side else "–" for side in (ours, theirs)]
    is_raced = "seconds" in ours and "seconds" in theirs
    cells.insert(3, f"{theirs['seconds'] / ours['seconds']:.2f}" if is_raced else "–")
    return cells


def _table(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
