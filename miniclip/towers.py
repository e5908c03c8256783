"""The other image towers: CLIP's modified residual network, and any image model of timm's.

The residual network has three changes (paper section 2.4; OpenAI's `ModifiedResNet`).

- The stem is three convolutions and an average pool, not one and a maximum pool (ResNet-D, He et al. 2018).
- Strides are an average pool before a convolution of stride 1, so that shifting the picture shifts the features
  (Zhang 2019).
- The features are pooled by attention, whose query is the mean of all places.

B batch, C channels, H, W height and width of a feature map, N = 1 + H * W tokens, R resolution, E embedding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import VisionConfig

_EXPANSION = 4  # a bottleneck's output channels, in units of its inner ones


def recomputed(function: Callable[..., Any], *inputs: Any, within: nn.Module) -> Any:
    """function(*inputs), whose activations are not kept but computed again for the gradient (Chen et al. 2016).

    What was drawn at random is drawn again the same, and the batch norms of `within` count the batch once.
    """
    if torch.compiler.is_compiling():  # the compiler repeats no update of a buffer, and takes no contexts
        return checkpoint(function, *inputs, use_reentrant=False)
    contexts = lambda: (nullcontext(), _running_statistics_held(within))  # noqa: E731 (first time, second time)
    return checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _running_statistics_held(model: nn.Module) -> Iterator[None]:
    """Batch norms count into copies that are thrown away; to do without the counting would be another computation."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    held = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in held:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in held:
            setattr(norm, name, buffer)


def normed(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(conv(x)). On a CPU and with statistics that stand, by what moves less memory: the image or the weights."""
    if norm.training or x.device.type != "cpu":
        return norm(conv(x))
    has_more_weights = conv.weight.numel() > x.numel()  # as the upper layers have, of a single image
    if has_more_weights and conv.kernel_size != (1, 1):
        # Weights are kept in order, and would be copied to channels side by side each time.
        return norm(conv(x.contiguous())).contiguous(memory_format=torch.channels_last)
    if has_more_weights:
        return norm(conv(x))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight, bias = conv.weight * gain[:, None, None, None], norm.bias - norm.running_mean * gain
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


class Bottleneck(nn.Module):
    """1 × 1, 3 × 3 and 1 × 1 convolutions around a shortcut (He et al. 2015), strides by average pools."""

    def __init__(self, channels: int, inner: int, stride: int) -> None:
        super().__init__()
        outer = inner * _EXPANSION
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(inner, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        nn.init.zeros_(self.bn3.weight)  # a block starts as its shortcut alone
        shortcut = OrderedDict[str, Any]()
        if stride > 1 or channels != outer:
            shortcut["pool"] = nn.AvgPool2d(stride)
            shortcut["0"] = nn.Conv2d(channels, outer, 1, bias=False)  # OpenAI's names
            shortcut["1"] = nn.BatchNorm2d(outer)
        self.downsample: Any = nn.Sequential(shortcut)  # empty for an identity

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 4 * inner, H / stride, W / stride)."""
        y = normed(self.conv1, self.bn1, x).relu_()
        y = self.pool(normed(self.conv2, self.bn2, y).relu_())
        y = normed(self.conv3, self.bn3, y)
        if self.downsample:
            pool, conv, norm = self.downsample
            x = normed(conv, norm, pool(x))
        return y.add_(x).relu_()


class AttentionPool(nn.Module):
    """One token for all places: attention with the mean as its only query."""

    def __init__(self, num_places: int, channels: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        scale = channels**-0.5
        self.positional_embedding = nn.Parameter(nn.init.normal_(torch.empty(1 + num_places, channels), std=scale))
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
        q = self._split(self.q_proj(x if all_tokens else x[:, :1]))  # (B, heads, 1 or N, C / heads)
        k, v = self._split(self.k_proj(x)), self._split(self.v_proj(x))  # (B, heads, N, C / heads)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, 1 or N, C)
        y = self.c_proj(y)
        return y if all_tokens else y[:, 0]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class ModifiedResNet(nn.Module):
    """The image tower of OpenAI's RN50 to RN50x64.

    `checkpoint_activations`, in training: stem and bottlenecks keep their inputs alone for the gradient.
    """

    checkpoint_activations = False

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        D = config.width
        self.input_resolution = config.image_size
        self.conv1 = nn.Conv2d(3, D // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(D // 2)
        self.conv2 = nn.Conv2d(D // 2, D // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(D // 2)
        self.conv3 = nn.Conv2d(D // 2, D, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(D)
        channels = D
        stages = []
        for stage, num_blocks in enumerate(config.blocks):
            inner = D * 2**stage
            blocks = []
            for block in range(num_blocks):
                blocks.append(Bottleneck(channels, inner, stride=2 if stage and not block else 1))
                channels = inner * _EXPANSION
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.attnpool = AttentionPool(config.num_patches, channels, config.heads, embed_dim)

    def forward(self, images: Tensor, all_tokens: bool = False) -> Tensor:
        """Normalised images (B, 3, R, R) -> (B, E).

        With `all_tokens` -> (B, 1 + (R / 32)^2, E): the mean's token, then the places row by row, in the shared space.
        """
        # Channels side by side in memory are what convolutions are fastest on; their outputs follow the input.
        x = images.contiguous(memory_format=torch.channels_last)
        is_recomputed = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        # (B, D, R / 4, R / 4) after the stem, (B, 32 * D, R / 32, R / 32) at the end
        for part in (self._stem, *self.layer1, *self.layer2, *self.layer3, *self.layer4):
            within = part if isinstance(part, nn.Module) else self
            x = recomputed(part, x, within=within) if is_recomputed else part(x)
        return self.attnpool(x, all_tokens)

    def _stem(self, x: Tensor) -> Tensor:
        """(B, 3, R, R) -> (B, D, R / 4, R / 4)."""
        x = normed(self.conv1, self.bn1, x).relu_()  # (B, D / 2, R / 2, R / 2)
        x = normed(self.conv2, self.bn2, x).relu_()
        return F.avg_pool2d(normed(self.conv3, self.bn3, x).relu_(), 2)


class TimmTower(nn.Module):
    """An image model of timm's with a projection, laid out as in OpenCLIP's checkpoints."""

    trunk: Any  # timm's models have no common type

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        try:
            import timm  # half a second, and an extra: only this tower needs it
            from timm.layers.mlp import Mlp
        except ImportError as error:
            raise ValueError(
                f"the image tower {config.timm_model!r} needs timm: pip install 'miniclip[timm]'"
            ) from error
        self.input_resolution = config.image_size
        pool: dict[str, Any] = {"global_pool": config.timm_pool} if config.timm_pool else {}
        try:
            self.trunk = timm.create_model(config.timm_model, num_classes=_num_classes(config, embed_dim), **pool)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"timm has no model {config.timm_model!r} with {pool or 'its own pooling'}: {error}"
            ) from error
        # Some models have a layer more between what they call features and their classifier.
        width = getattr(self.trunk, "head_hidden_size", None) or self.trunk.num_features
        bias = config.timm_projection_bias
        layers = OrderedDict[str, nn.Module]()
        if config.timm_projection == "linear":
            layers["proj"] = nn.Linear(width, embed_dim, bias=bias)
        elif config.timm_projection == "mlp":
            layers["mlp"] = Mlp(width, 2 * embed_dim, embed_dim, bias=(True, bias))
        elif config.timm_projection == "none" and width != embed_dim:
            raise ValueError(
                f"{config.timm_model} gives {width} channels and embed_dim is {embed_dim}; it needs a projection"
            )
        self.head = nn.Sequential(layers)

    def load_trunk(self, config: VisionConfig, embed_dim: int, file: str | None = None) -> None:
        """Takes over weights of timm's: those that it has for the model, downloaded once, or a file with its names.

        Raises:
            ValueError: there are none, they do not fit, or `config` normalises images otherwise than they need.
        """
        import timm

        what = f"weights of timm's for {config.timm_model!r}" + (f" in {file}" if file else "")
        pool: dict[str, Any] = {"global_pool": config.timm_pool} if config.timm_pool else {}
        try:
            trunk: Any = timm.create_model(
                config.timm_model,
                pretrained=True,
                pretrained_cfg_overlay={"file": file} if file else None,
                num_classes=_num_classes(config, embed_dim),
                **pool,
            )
        except Exception as error:  # of downloads and damaged files anything
            raise ValueError(f"no {what}: {error}") from error
        for name in ("mean", "std"):
            theirs, ours = tuple(trunk.pretrained_cfg[name]), getattr(config, name)
            if any(abs(a - b) > 1e-3 for a, b in zip(theirs, ours, strict=True)):
                raise ValueError(
                    f"{what} need images of {name} {theirs}; set model.clip.vision.{name}, which is {ours}"
                )
        self.trunk.load_state_dict(trunk.state_dict())

    def checkpoint_blocks(self) -> None:
        """From now on timm's blocks keep their inputs alone for the gradient, in training.

        Raises:
            ValueError: timm can't do that for this model, or not without counting a batch twice in its batch norms.
        """
        name = type(self.trunk).__name__
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.trunk.modules()):
            raise ValueError(
                f"model.checkpoint_activations: timm's {name} has batch norms, which would count each batch twice; "
                "model.micro_batch_size saves memory without that"
            )
        try:
            self.trunk.set_grad_checkpointing()
        except (AssertionError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"model.checkpoint_activations: timm can't do that for {name}; model.micro_batch_size saves memory, too"
            ) from error

    def forward(self, images: Tensor, all_tokens: bool = False) -> Tensor:
        """Normalised images (B, 3, R, R) -> (B, E), or with `all_tokens` what the model gives before pooling."""
        return self.trunk.forward_features(images) if all_tokens else self.head(self.trunk(images))


def _num_classes(config: VisionConfig, embed_dim: int) -> int:
    """Of timm's own classifier, which may serve as the projection."""
    return embed_dim if config.timm_projection == "classifier" else 0
