"""Matrix products by the library that is fastest on this CPU, with the same exactness.

PyTorch sends float32 products on x86 to MKL, which Intel writes, and which knows AMD's CPUs without AVX-512. PyTorch
carries oneDNN as well. On a CPU of AMD's Zen 5 oneDNN needs half of the time, on Zen 4 a tenth to a quarter less
(docs/speed.md has the figures). The choice is a fact of the CPU, not a race: a run that is resumed goes on to the same
bits, so it needs the same library. The environment variable MINICLIP_PRODUCTS (mkl, onednn) overrides it.

`linear` and `layer` compute what the first line of their docstring says. They go to oneDNN if it is chosen, for plain
modules and tensors (`plain.py`), forwards and backwards; and to PyTorch's own function everywhere else.

A product takes N rows of K numbers to N rows of M numbers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plain import is_ordinary, is_plain

MKL, ONEDNN = "mkl", "onednn"
TITLES = {MKL: "MKL", ONEDNN: "oneDNN"}
VARIABLE = "MINICLIP_PRODUCTS"
_FAMILIES = {"AuthenticAMD": range(25, 27)}  # Zen 4 and 5: CPUs with AVX-512 on which oneDNN was measured to be faster
_LEAST_ROWS, _LEAST_SIZE = 3, 2**22  # below either, N or N * K * M, a call costs more than the product saves
_BLOCK = 1024  # rows, columns, and terms of a sum
_MOST_ERROR = 2e-6  # of a product, as a share of its largest number
_choice: str | None = None  # None until the first product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias): (…, K), (M, K), (M,) -> (…, M)."""
    if not is_faster(x, weight, bias):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def layer(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), where the module may be a linear layer: (…, K) -> (…, M)."""
    # The weight of another class may be computed when it is looked at.
    if type(module) is nn.Linear and _is_large(x, module.weight) and is_plain(module, nn.Linear):
        return linear(x, module.weight, module.bias)
    return module(x)


def product_into(out: Tensor, a: Tensor, b: Tensor, adds: bool = False) -> None:
    """torch.mm(a, b, out=out), or out.addmm_(a, b) if it `adds`; no gradient: (N, K), (K, M) -> (N, M)."""
    if not is_faster(a, b.mT, out):
        out.addmm_(a, b) if adds else torch.mm(a, b, out=out)
        return
    # oneDNN's products have memory of their own, and long sums of theirs lose a bit: both go block by block.
    for out_rows, a_rows in zip(out.split(_BLOCK), a.split(_BLOCK), strict=True):
        for part, b_columns in zip(out_rows.split(_BLOCK, dim=1), b.split(_BLOCK, dim=1), strict=True):
            terms = zip(a_rows.split(_BLOCK, dim=1), b_columns.split(_BLOCK), strict=True)
            for number, (left, right) in enumerate(terms):
                found = _product(left, right.mT)
                part.add_(found) if adds or number else part.copy_(found)


def is_faster(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether the product of (…, K) and (M, K) goes to oneDNN; `others` take part in it."""
    return _is_large(x, weight) and is_ordinary(x, weight, *others) and library() == ONEDNN


def _is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN, if it is chosen, computes the product faster. A quick answer where it is not."""
    if torch.compiler.is_compiling() or _choice == MKL or type(x) not in (Tensor, nn.Parameter):
        return False
    M, K = weight.shape
    return x.numel() >= _LEAST_ROWS * K and x.numel() * M >= _LEAST_SIZE and x.shape[-1] == K


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.mT + bias by oneDNN, without a gradient: (…, K), (M, K), (M,) -> (…, M); any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _textbook(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.mT


class _Linear(torch.autograd.Function):
    """`_product` with its gradients, which are products of the same size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, flat = gradient.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])  # (N, M), (N, K)
        # With create_graph the gradient is differentiated, too.
        is_plain_gradient = not torch.is_grad_enabled() and is_ordinary(rows, flat, weight)
        times = _product if is_plain_gradient else _textbook
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            times(gradient, weight.mT) if need_x else None,
            times(rows.mT, flat.mT) if need_weight else None,
            rows.sum(dim=0) if need_bias else None,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Which library


def library() -> str:
    """The library of this process's products, "mkl" (PyTorch's own way) or "onednn".

    Raises:
        ValueError: from `wanted`.
    """
    global _choice
    if _choice is None:
        _choice = wanted() or (ONEDNN if _is_fast_here() and is_exact() else MKL)
    return _choice


def wanted() -> str | None:
    """The library that MINICLIP_PRODUCTS names, or None.

    Raises:
        ValueError: it names none, or oneDNN where that is not to be had.
    """
    name = os.environ.get(VARIABLE) or None
    if name not in (None, *TITLES):
        raise ValueError(f"{VARIABLE} is {name!r}; valid are {' and '.join(TITLES)}")
    if name not in (None, *available()):
        raise ValueError(
            f"{VARIABLE} is {name!r}, but this PyTorch has no oneDNN, or none whose float32 products are exact on this "
            f"CPU; {MKL} is possible"
        )
    return name


def available() -> tuple[str, ...]:
    """The libraries that compute exactly here; the first is PyTorch's own choice."""
    return (MKL, ONEDNN) if is_exact() else (MKL,)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Products go to this one of the `available` libraries for a while, in all threads."""
    global _choice
    before, _choice = library(), name
    try:
        yield
    finally:
        _choice = before


def _is_fast_here() -> bool:
    """By the vendor, the family and the instruction sets of the CPU (Linux)."""
    info = Path("/proc/cpuinfo")
    if not info.is_file() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    text = info.read_text()
    vendor, family = re.search(r"^vendor_id\s*: (\w+)", text, re.M), re.search(r"^cpu family\s*: (\d+)", text, re.M)
    return vendor is not None and family is not None and int(family[1]) in _FAMILIES.get(vendor[1], ())


@cache
def is_exact() -> bool:
    """Whether oneDNN is there, and one product and its gradients, compared with float64, are exact.

    A CPU with AMX may round float32 to bfloat16 on the way.
    """
    random = torch.Generator().manual_seed(0)
    x, weight, gradient = torch.randn(3, 64, 256, generator=random, device="cpu", dtype=torch.float32)
    try:
        found = _product(x, weight), _product(gradient[:, :64], weight.mT), _product(gradient.mT, x.mT)
    except (AttributeError, NotImplementedError, RuntimeError):  # a build or a version of PyTorch without it
        return False
    x, weight, gradient = x.double(), weight.double(), gradient.double()
    exact = x @ weight.mT, gradient[:, :64] @ weight, gradient.mT @ x
    return all(((a - b).abs().max() <= _MOST_ERROR * b.abs().max()).item() for a, b in zip(found, exact, strict=True))
