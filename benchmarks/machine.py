"""The machine that a benchmark runs on: its best rates, the memory of this process, and the versions of libraries."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from miniclip.training import measuring

_LIBRARIES = ("torch", "torchvision", "numpy", "pytorch-lightning", "open_clip_torch", "transformers")


@dataclass(frozen=True)
class Machine:
    """flops: peak operations a second, by `source`. bandwidth: bytes a copy reads and writes a second."""

    name: str
    processor: str
    flops: float
    source: str
    bandwidth: float


def this_machine(where: torch.device | None = None, precision: str = "32-true") -> Machine:
    where = where or torch.device("cpu")
    moments = []  # in the best, no other process disturbed
    for _ in range(5 if where.type == "cpu" else 1):
        time.sleep(0.2)
        moments.append((measuring.peak(where, precision), bandwidth(where)))
    peak = max((peak for peak, _ in moments), key=lambda peak: peak.flops)
    if where.type == "cuda":
        processor = torch.cuda.get_device_name(where)
        name = re.sub(r"\W+", "-", processor).strip("-").lower()
    else:
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.+)", info.read_text()) if info.is_file() else None
        processor = model[1] if model else platform.processor() or platform.machine()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        name = f"cpu-{cores}-cores" + ("-amd" if "AMD" in processor else "")
    return Machine(name, processor, peak.flops, peak.source, max(copies for _, copies in moments))


def bandwidth(where: torch.device, megabytes: int = 256) -> float:
    """Bytes read and written a second, by the fastest of some copies that are larger than caches."""
    source = torch.ones(megabytes * 250_000, device=where)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        target.copy_(source)
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        best = max(best, 2 * source.numel() * 4 / (time.perf_counter() - begin))
    return best


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def resident_mb(peak: bool = False) -> float:
    """MB (10^6 bytes) of this process in memory: now, or the peak since the last `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"Vm{'HWM' if peak else 'RSS'}:\s+(\d+)", status)[1]) * 1024 / 1e6  # type: ignore[index]


def forget_peak() -> None:
    """Returns free memory to the system and resets the peak (Linux)."""
    gc.collect()
    with suppress(OSError, AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
