"""The machine that a benchmark runs on: its best rates, the memory of this process, and the versions of libraries."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miniclip.fast import matmul
from miniclip.inference.exporting.runner import own_signal_stack
from miniclip.training import measuring

_LIBRARIES = (
    *("torch", "torchvision", "numpy", "pytorch-lightning", "open_clip_torch", "transformers"),
    *("openvino", "nncf", "onnxruntime", "tokenizers", "instant-clip-tokenizer"),
)
_SIDE = 1024  # of the square matrices whose product measures a CPU


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
    if where.type != "cpu":
        peak, processor = measuring.peak(where, precision), torch.cuda.get_device_name(where)
        name = re.sub(r"\W+", "-", processor).strip("-").lower()
        return Machine(name, processor, peak.flops, peak.source, bandwidth(where))
    contenders, best, copies = _products(), dict[str, float](), 0.0
    for _ in range(5):  # in the best moment, no other process disturbed
        time.sleep(0.2)
        for library, run in contenders.items():
            best[library] = max(best.get(library, 0.0), 2 * _SIDE**3 / _least_seconds(run))
        copies = max(copies, bandwidth(where))
    source = "the best of " + ", ".join(f"{library} {flops / 1e9:.0f}" for library, flops in best.items())
    return Machine(_cpu_name(), processor_name(), max(best.values()), f"{source}; float32", copies)


def _cpu_name() -> str:
    """The name of a CPU's file of results: by cores, vendor if not Intel, AMD's generation and instruction sets."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    vendor, sets = vendor_name(), _cpu_fact("flags").split()
    suffix = {"Intel": "", "AMD": f"-amd-family-{_cpu_fact('cpu family')}"}.get(vendor, f"-{vendor.lower()}")
    if "amx_tile" in sets:
        suffix += "-amx"
    elif "avx2" in sets and "avx512f" not in sets:  # AMD's family 25 is both Zen 3 and Zen 4
        suffix += "-avx2"
    return f"cpu-{cores}-cores{suffix}"


def vendor_name() -> str:
    """Intel, AMD, or else the architecture."""
    return {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}.get(_cpu_fact("vendor_id"), platform.machine() or "other")


def processor_name() -> str:
    """As `lscpu` has it; AMD's virtual CPUs all have one name, so the generation stands with it."""
    name = _cpu_fact("model name") or platform.processor() or platform.machine()
    if vendor_name() == "AMD":
        name += f" (family {_cpu_fact('cpu family')}, model {_cpu_fact('model')})"
    return name


def _cpu_fact(name: str) -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(rf"^{name}\s*: (.+)", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1] if found else ""


def _products() -> dict[str, Callable[[], Any]]:
    """A product of two square matrices in float32 by each library that has one."""
    a = torch.ones(_SIDE, _SIDE)

    def by_torch(library: str) -> None:
        with matmul.using(library):
            matmul.linear(a, a)

    found: dict[str, Callable[[], Any]] = {
        matmul.TITLES[library]: partial(by_torch, library) for library in matmul.available()
    }
    with suppress(ImportError):
        found["OpenVINO"] = _openvino_product(a.numpy())
    return found


def _openvino_product(a: np.ndarray) -> Callable[[], Any]:
    import openvino

    ops, settings = (
        openvino.opset13,
        {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()},
    )
    left = ops.parameter(a.shape, np.float32)
    graph = openvino.Model([ops.matmul(left, ops.constant(a), False, True)], [left])
    with own_signal_stack():
        compiled = openvino.Core().compile_model(graph, "CPU", settings)
    return lambda: compiled(a)


def _least_seconds(run: Callable[[], Any], times: int = 4) -> float:
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


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
