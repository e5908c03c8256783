"""Factors and norms folded into matrix products that are computed anyway."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .plain import is_plain


def patches(images: Tensor, conv: nn.Conv2d) -> Tensor:
    """conv(images).flatten(2).mT for a convolution of patches that do not overlap: (B, 3, R, R) -> (B, N, D).

    Such patches are one matrix product, which is faster than a convolution.
    """
    P = conv.kernel_size[0]
    x = images.unflatten(2, (-1, P)).unflatten(4, (-1, P))  # (B, 3, rows, P, columns, P)
    x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, 3 * P * P)
    return F.linear(x, conv.weight.flatten(1))


def quick_gelu_mlp(c_fc: nn.Linear, c_proj: nn.Linear, x: Tensor, slope: float) -> Tensor | None:
    """c_proj(quick_gelu(c_fc(x))), with both multiplications by the slope done inside the products: (B, N, D).

    Returns None when a gradient is wanted or a layer is not plain: the caller then takes the long way.
    """
    if torch.is_grad_enabled() or not (is_plain(c_fc, nn.Linear) and is_plain(c_proj, nn.Linear)):
        return None
    y = torch.addmm(c_fc.bias, x.flatten(0, 1), c_fc.weight.T, beta=slope, alpha=slope)
    y = torch.addmm(c_proj.bias, F.silu(y, inplace=True), c_proj.weight.T, alpha=1 / slope)
    return y.view_as(x)


def normed(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(conv(x)); with fixed statistics on a CPU, in the way that moves less memory: (B, C, H, W)."""
    if norm.training or x.device.type != "cpu":
        return norm(conv(x))
    has_more_weights = conv.weight.numel() > x.numel()  # the upper layers, on a single image
    if has_more_weights and conv.kernel_size != (1, 1):
        # A channels-last convolution would copy the weights to that order on each call.
        return norm(conv(x.contiguous())).contiguous(memory_format=torch.channels_last)
    if has_more_weights:
        return norm(conv(x))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight, bias = conv.weight * gain[:, None, None, None], norm.bias - norm.running_mean * gain
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)
