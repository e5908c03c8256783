"""CLIP's other image tower: a residual network with three changes (paper section 2.4; OpenAI's `ModifiedResNet`).

- The stem is three convolutions and an average pool, not one and a maximum pool (ResNet-D, He et al. 2018).
- Strides are an average pool before a convolution of stride 1, so that shifting the picture shifts the features
  (Zhang 2019).
- The features are pooled by attention, whose query is the mean of all positions.

A call into `folded` computes what the comment beside the first one says, with less work.

B batch, C channels (D after the stem), H, W height and width of a feature map, N = 1 + H * W tokens (the mean, then
every position), R resolution, E embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VisionConfig
from .fast import folded, matmul
from .fast.plain import is_asked


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolutions beside a shortcut (He et al. 2015); average pools take the strides."""

    expansion = 4  # output channels, in units of `planes`, the inner ones

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        outer = planes * self.expansion
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        self.relu3 = nn.ReLU(inplace=True)
        nn.init.zeros_(self.bn3.weight)  # a block starts as its shortcut alone
        self.downsample: Any = None
        if stride > 1 or inplanes != outer:
            shortcut = OrderedDict[str, Any]()
            shortcut["-1"] = nn.AvgPool2d(stride)  # OpenAI's names
            shortcut["0"] = nn.Conv2d(inplanes, outer, 1, bias=False)
            shortcut["1"] = nn.BatchNorm2d(outer)
            self.downsample = nn.Sequential(shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 4 * planes, H / stride, W / stride)."""
        y = self.relu1(folded.normed(self.conv1, self.bn1, x))  # relu1(bn1(conv1(x)))
        y = self.relu2(folded.normed(self.conv2, self.bn2, y))
        y = folded.normed(self.conv3, self.bn3, self.avgpool(y))
        y += x if self.downsample is None else folded.shortcut(self.downsample, x)  # downsample(x)
        return self.relu3(y)


class AttentionPool(nn.Module):
    """Attention over all positions, with their mean as its only query."""

    def __init__(self, num_positions: int, channels: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        scale = channels**-0.5
        self.positional_embedding = nn.Parameter(nn.init.normal_(torch.empty(1 + num_positions, channels), std=scale))
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, embed_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=scale)

    def forward(self, x: Tensor, all_tokens: bool = False) -> Tensor:
        """(B, C, H, W) -> (B, E), or with `all_tokens` every token as the query: -> (B, N, E)."""
        x = x.flatten(2).transpose(1, 2)  # (B, H * W, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding  # (B, N, C)
        q = self._split(matmul.layer(self.q_proj, x if all_tokens else x[:, :1]))  # (B, heads, 1 or N, C / heads)
        k, v = (self._split(matmul.layer(each, x)) for each in (self.k_proj, self.v_proj))  # (B, heads, N, C / heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, 1 or N, C)
        y = matmul.layer(self.c_proj, y)
        return y if all_tokens else y[:, 0]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class ModifiedResNet(nn.Module):
    """The image tower of OpenAI's RN50 to RN50x64."""

    block: type[Bottleneck] = Bottleneck
    pool: Callable[[int, int, int, int], AttentionPool] = AttentionPool

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        D = config.width
        self.input_resolution = config.image_size
        self.conv1 = nn.Conv2d(3, D // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(D // 2)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(D // 2, D // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(D // 2)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(D // 2, D, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(D)
        self.relu3 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(2)
        channels = D
        stages = []
        for stage, num_blocks in enumerate(config.blocks):
            planes = D * 2**stage
            blocks = []
            for block in range(num_blocks):
                blocks.append(self.block(channels, planes, 2 if stage and not block else 1))
                channels = planes * self.block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.attnpool = self.pool(config.num_patches, channels, config.heads, embed_dim)

    def forward(self, images: Tensor, all_tokens: bool = False) -> Tensor:
        """Normalised images (B, 3, R, R) -> (B, E).

        With `all_tokens` -> (B, N, E), N = 1 + (R / 32)^2: the mean's token, then the positions row by row, projected.
        """
        x = self.stem(folded.channels_last(images))  # (B, D, R / 4, R / 4)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
        # x is (B, 32 * D, R / 32, R / 32)
        return self.attnpool(x, all_tokens=True) if is_asked(all_tokens) else self.attnpool(x)

    def stem(self, x: Tensor) -> Tensor:
        """(B, 3, R, R) -> (B, D, R / 4, R / 4)."""
        x = self.relu1(folded.normed(self.conv1, self.bn1, x))  # (B, D / 2, R / 2, R / 2)
        x = self.relu2(folded.normed(self.conv2, self.bn2, x))
        return self.avgpool(self.relu3(folded.normed(self.conv3, self.bn3, x)))
