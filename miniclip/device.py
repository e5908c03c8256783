"""Devices by name; what one can do at best, and how much memory is in use: what a run's speed is measured against."""

from __future__ import annotations

import re
import resource
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

# 10^12 multiplications and additions a second by NVIDIA's data sheets and architecture papers: dense (without the
# sparsity that doubles most printed figures), products summed in fp32. The longest name that fits counts.
_DATA_SHEETS: dict[str, dict[str, float]] = {
    "V100": {"fp32": 15.7, "fp16": 125},
    "V100 PCIE": {"fp32": 14, "fp16": 112},
    "T4": {"fp32": 8.1, "fp16": 65},
    "A10": {"fp32": 31.2, "tf32": 62.5, "fp16": 125, "bf16": 125},
    "A30": {"fp32": 10.3, "tf32": 82, "fp16": 165, "bf16": 165},
    "A40": {"fp32": 37.4, "tf32": 74.8, "fp16": 149.7, "bf16": 149.7},
    "A100": {"fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312},
    "L4": {"fp32": 30.3, "tf32": 60, "fp16": 121, "bf16": 121},
    "L40S": {"fp32": 91.6, "tf32": 183, "fp16": 362, "bf16": 362},
    "H100": {"fp32": 66.9, "tf32": 494.7, "fp16": 989.4, "bf16": 989.4},
    "H100 PCIE": {"fp32": 51.2, "tf32": 378, "fp16": 756, "bf16": 756},
    "H100 NVL": {"fp32": 60, "tf32": 417.5, "fp16": 835.5, "bf16": 835.5},
    "H200": {"fp32": 66.9, "tf32": 494.7, "fp16": 989.4, "bf16": 989.4},
    "H200 NVL": {"fp32": 60, "tf32": 417.5, "fp16": 835.5, "bf16": 835.5},
    "RTX 3090": {"fp32": 35.6, "tf32": 35.6, "fp16": 71, "bf16": 71},
    "RTX 4090": {"fp32": 82.6, "tf32": 82.6, "fp16": 165.2, "bf16": 165.2},
}
_OTHER_CHIPS = {"LAPTOP", "MAX", "TI", "D", "SUPER", "MIG"}  # or a part of the chip
_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
_DTYPES["bf16"] = torch.bfloat16


def find_device(name: str | torch.device | None = None) -> torch.device:
    """The device of a name ("cpu", "cuda:1", …); by default a GPU if there is one.

    Raises:
        ValueError: it is no device, or a GPU where there is none.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"{name!r} is no device; valid are cpu, cuda, cuda:1, …") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, and torch finds no GPU here")
    return device


class Peak(NamedTuple):
    """The most floating-point operations a second, and where that number is from."""

    flops: float
    source: str


def peak(device: torch.device, precision: str) -> Peak:
    """Of a device when training in one of Lightning's precisions ("bf16-mixed", "32-true", …)."""
    arithmetic = _arithmetic(device, precision)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    printed = data_sheet_flops(name, arithmetic)
    if printed is not None:
        return Peak(printed, f"{name}, {arithmetic}, dense, by its data sheet")
    return Peak(_measure(device, _DTYPES[arithmetic]), f"{name}, {arithmetic}, measured by a matrix product")


def _arithmetic(device: torch.device, precision: str) -> str:
    bits = {"16": "fp16", "bf16": "bf16", "transformer": "bf16", "64": "fp64"}.get(precision.split("-")[0], "fp32")
    is_tf32 = bits == "fp32" and torch.get_float32_matmul_precision() != "highest" and device.type == "cuda"
    return "tf32" if is_tf32 and torch.cuda.get_device_capability(device) >= (8, 0) else bits


def data_sheet_flops(name: str, arithmetic: str) -> float | None:
    """Of an NVIDIA GPU by the name that its driver tells; None if it is not in the table."""
    words = re.split(r"[\s\-_]+", name.upper())
    fitting = [known for known in _DATA_SHEETS if set(known.split()) <= set(words)]
    if not fitting or _OTHER_CHIPS & set(words):
        return None
    printed = _DATA_SHEETS[max(fitting, key=lambda known: len(known.split()))].get(arithmetic)
    return None if printed is None else printed * 1e12


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of growing square products, until one takes a hundredth of a second."""
    best, side, seconds = 0.0, 256, 0.0
    while seconds < 0.01 and side <= 16384:
        a = torch.ones(side, side, device=device, dtype=dtype)
        for _ in range(3):
            _wait_for(device)
            begin = time.perf_counter()
            a @ a
            _wait_for(device)
            seconds = time.perf_counter() - begin
            best = max(best, 2 * side**3 / seconds)
        side *= 2
    return best


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_gb(device: torch.device) -> float:
    """10^9 bytes: the most that tensors took on a GPU so far, else what this process holds of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e9
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on a Mac, 1024 of them elsewhere
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9
