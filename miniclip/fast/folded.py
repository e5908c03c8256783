"""Fewer operations for the same numbers: patches as one product, factors and norms folded into the weights beside them.

Each function computes what the first line of its docstring says, and computes exactly that, module by module, where a
module is not plain or PyTorch only records what is done.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import matmul
from .plain import is_autocast, is_eager, is_guarded, is_plain


def patches(conv: nn.Module, images: Tensor) -> Tensor:
    """conv(images).flatten(2).mT: (B, 3, R, R) -> (B, patches, D).

    A convolution of patches that do not overlap is one matrix product, which is faster.
    """
    if not (is_guarded(images) and is_plain(conv, nn.Conv2d) and _cuts_patches(conv, images)):
        return conv(images).flatten(2).transpose(1, 2)  # .mT is unknown to the older ONNX exporter
    P = conv.kernel_size[0]
    x = images.unflatten(2, (-1, P)).unflatten(4, (-1, P))  # (B, 3, rows, P, columns, P)
    x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, patches, 3 * P * P)
    return matmul.linear(x, conv.weight.flatten(1), conv.bias)


def _cuts_patches(conv: nn.Conv2d, images: Tensor) -> bool:
    """Whether the convolution's windows are squares that tile the images."""
    P = conv.kernel_size[0]
    is_tiling = conv.kernel_size == conv.stride == (P, P) and not (images.shape[2] % P or images.shape[3] % P)
    return is_tiling and (conv.padding, conv.dilation, conv.groups) == ((0, 0), (1, 1), 1)


def quick_gelu_mlp(c_fc: nn.Module, activation: nn.Module, c_proj: nn.Module, slope: float, x: Tensor) -> Tensor:
    """c_proj(activation(c_fc(x))), where activation(x) is x * sigmoid(slope * x): (B, N, D).

    What goes in and comes out is multiplied and divided by the slope, and not what lies between, which is four times as
    wide.
    """
    is_folded = is_guarded(x) and is_plain(activation, type(activation))
    # In training, autocast would round a bias before or after its factor, by the precision that it was gathered in.
    is_folded = is_folded and not (is_autocast(x) and (torch.is_grad_enabled() or activation.training))
    if not (is_folded and is_plain(c_fc, nn.Linear) and is_plain(c_proj, nn.Linear) and c_fc.bias is not None):
        return c_proj(activation(c_fc(x)))
    if c_proj.bias is None:
        return c_proj(activation(c_fc(x)))
    y = matmul.linear(slope * x, c_fc.weight, slope * c_fc.bias)
    y = F.silu(y, inplace=not torch.is_grad_enabled())
    return matmul.linear(y, c_proj.weight, slope * c_proj.bias) / slope


def normed(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(x)): (B, C, H, W).

    In evaluation on a CPU, the norm's factors go into the convolution's weights, which moves less memory.
    """
    is_folded = is_eager(x) and x.device.type == "cpu" and not norm.training
    if not (is_folded and is_plain(conv, nn.Conv2d) and is_plain(norm, nn.BatchNorm2d)):
        return norm(conv(x))
    if norm.running_mean is None or norm.running_var is None or norm.weight is None or norm.bias is None:
        return norm(conv(x))
    if conv.bias is not None or conv.padding_mode != "zeros" or conv.weight.dtype != norm.weight.dtype:
        return norm(conv(x))
    has_more_weights = conv.weight.numel() > x.numel()  # the upper layers, on a single image
    if has_more_weights and conv.kernel_size != (1, 1):
        # A channels-last convolution would copy the weights to that order on each call.
        return norm(conv(x.contiguous())).contiguous(memory_format=torch.channels_last)
    if has_more_weights:
        return norm(conv(x))
    gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight, bias = conv.weight * gain[:, None, None, None], norm.bias - norm.running_mean * gain
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def shortcut(downsample: nn.Module, x: Tensor) -> Tensor:
    """downsample(x), a pool, a convolution and a norm in sequence: (B, C, H, W)."""
    if is_plain(downsample, nn.Sequential) and len(downsample) == 3:
        pool, conv, norm = downsample
        return normed(conv, norm, pool(x))
    return downsample(x)


def channels_last(images: Tensor) -> Tensor:
    """The same images in the order of memory that convolutions are fastest on; their outputs keep it."""
    return images.contiguous(memory_format=torch.channels_last) if is_eager(images) else images
