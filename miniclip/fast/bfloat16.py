"""Towers whose matrix products, convolutions and attention run in bfloat16, for encoding alone.

bfloat16 has float32's range in half of its bits: 8 bits of each number remain. CPUs with AVX512-BF16 or AMX multiply it
at twice the speed, and add the products in float32. `lower` replaces the layers of a tower once and for good: each
keeps its rounded weights alone, in the order of memory that oneDNN reads, so there is no second copy that could grow
stale. Softmax runs in float32 inside PyTorch's attention. What is cheap, and would add its roundings up from block
to block, stays in float32: the sum that runs through a transformer's blocks, its norms, the embeddings, and the
projection to the shared space. A ResNet has no such sum: its norms are folded into its convolutions.

B batch, N tokens, D width, H heads; a layer takes numbers K to M wide.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plain import is_eager

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "gelu": F.gelu, "swish": F.silu}
_NORMS = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3", "0": "1"}  # of a ResNet's convolutions, the last a shortcut's


def is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("arm_bf16") or found.get("bf16"))
    asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # older versions of PyTorch
    return any(getattr(torch.cpu, name, bool)() for name in asks)


def lower(module: nn.Module) -> None:
    """Replaces all linear layers, convolutions and attentions in one of the book's towers, and folds norms that can be.

    The tower encodes from then on, and learns no more.
    """
    for name, child in list(module.named_children()):
        if hasattr(child, "in_proj_weight"):
            setattr(module, name, Attention(child))
        elif isinstance(child, nn.Linear):
            setattr(module, name, Linear(child.weight, child.bias))
        elif isinstance(child, nn.Conv2d):
            norm = getattr(module, _NORMS.get(name, ""), None)
            is_tiling = child.kernel_size == child.stride != (1, 1)
            setattr(module, name, Patches(child) if is_tiling else Convolution(child, norm))
            if norm is not None:
                setattr(module, _NORMS[name], nn.Identity())
        elif hasattr(child, "c_fc"):
            _lower_mlp(child)
        else:
            lower(child)


def _lower_mlp(mlp: Any) -> None:
    """The activation becomes the end of the first product. QuickGELU(x) is swish(slope * x) / slope."""
    slope = getattr(mlp.activation, "slope", 1.0)
    mlp.c_fc = Linear(slope * mlp.c_fc.weight, slope * mlp.c_fc.bias, "gelu" if slope == 1 else "swish")
    mlp.activation = nn.Identity()
    mlp.c_proj = Linear(mlp.c_proj.weight / slope, mlp.c_proj.bias)


class Linear(nn.Module):
    """activation(F.linear(x, weight, bias)): (…, K) -> (…, M) in bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        self.weight = _packed(_rounded(weight))  # no parameter: (M, K), in an order that only oneDNN knows
        self.bias = None if bias is None else _rounded(bias)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = x.bfloat16().to(self.weight.dtype), self.weight
        if weight.layout == torch.strided or torch.is_grad_enabled() or not is_eager(x):
            return _ACTIVATIONS[self.activation](F.linear(x, _unpacked(weight), self.bias)).bfloat16()
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, self.activation, [], "none")


class Attention(nn.Module):
    """`model.Attention`: (B, N, D) -> (B, N, D), or with `pool` (B,) -> (B, 1, D)."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.heads, self.is_causal = attention.heads, attention.is_causal
        D = attention.out_proj.in_features
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        self.q, self.kv = Linear(weight[:D], bias[:D]), Linear(weight[D:], bias[D:])
        self.out_proj = Linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(self, x: Tensor, pool: Tensor | None, attend: Callable[..., Tensor]) -> Tensor:
        x = x.bfloat16()
        queries = x if pool is None else _picked(x, pool)[:, None]
        q = self.q(queries).unflatten(2, (self.heads, -1))  # (B, N or 1, H, D/H)
        k, v = self.kv(x).unflatten(2, (2, self.heads, -1)).unbind(2)  # (B, N, H, D/H)
        return self.out_proj(attend(q, k, v, self.is_causal, pool))


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """`model.pick`: (B, N, D), (B,) -> (B, D); a single row serves every index."""
    B, N, _ = x.shape
    return x.flatten(0, 1).index_select(0, torch.arange(B, device=x.device) * N + index)


class Convolution(nn.Module):
    """norm(conv(x)), with a norm of evaluation folded into the weights, or conv(x): (B, C, H, W) in bfloat16."""

    def __init__(self, conv: nn.Conv2d, norm: Any = None) -> None:
        super().__init__()
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        if norm is not None:
            gain = norm.weight.detach() * torch.rsqrt(norm.running_var + norm.eps)
            shift = norm.bias.detach() - norm.running_mean * gain
            weight, bias = weight * gain[:, None, None, None], shift if bias is None else bias * gain + shift
        self.weight = _rounded(weight).contiguous(memory_format=torch.channels_last)
        self.bias = None if bias is None else _rounded(bias)
        self.stride, self.padding = conv.stride, conv.padding

    def forward(self, x: Tensor) -> Tensor:
        x = x.bfloat16().to(self.weight.dtype)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding).bfloat16()


class Patches(nn.Module):
    """conv(images), where the convolution's windows tile the images: (B, 3, R, R) -> (B, D, R / P, R / P)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.size = conv.kernel_size[0]
        self.linear = Linear(conv.weight.flatten(1), conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        P = self.size
        x = x.bfloat16().unflatten(2, (-1, P)).unflatten(4, (-1, P))  # (B, 3, rows, P, columns, P)
        return self.linear(x.permute(0, 2, 4, 1, 3, 5).flatten(3)).permute(0, 3, 1, 2)


def _packed(weight: Tensor) -> Tensor:
    """In the order of memory that oneDNN multiplies by, where it is there."""
    if not (weight.is_cpu and can_pack()):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def _unpacked(weight: Tensor) -> Tensor:
    return weight if weight.layout == torch.strided else weight.to_dense()


def _rounded(numbers: Tensor) -> Tensor:
    """To bfloat16. They stay in 32 bits on a CPU without instructions for it: PyTorch's own products of 16 take seven
    times as long there, and those of 32 are the same, as each is exact and sums are in float32 either way."""
    rounded = numbers.detach().bfloat16()
    return rounded.float() if numbers.is_cpu and not (can_pack() or is_fast()) else rounded


@cache
def can_pack() -> bool:
    """Whether this PyTorch can order weights for oneDNN, and multiply by them."""
    x, weight = torch.eye(32, dtype=torch.bfloat16), torch.eye(32, dtype=torch.bfloat16)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), x)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
